//! A client that connects to every Console port of every node once a millisecond, and proves from the answers when two
//! nodes were open at once. Must never report an overlap that was none.
//!
//! The proof: a successful connect means that the port was open at some moment between the start and the end of the call.
//! If A answers, then B, then A again, with no refusal by A in between and at most [`BRIDGE`] between A's two answers, then
//! A was open while B answered: to close, be elected again and open takes a node longer than that.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Socket, Type};

/// Two answers of a port this close together, without a refusal between them, belong to one opening.
const BRIDGE: Duration = Duration::from_millis(20);
/// Pause between two rounds.
const PERIOD: Duration = Duration::from_millis(1);
/// A connect that takes longer proves nothing.
const CONNECT_LIMIT_MS: u16 = 5;
/// `MANAGEMENT_PORT_HTTPS` and `COMMUNICATION_PORT` before the offset.
const PORTS: [u16; 2] = [8083, 8084];

/// One port of one node.
struct Port {
    node: usize,
    address: SocketAddr,
    /// Start and end of the last successful connect, unless a refusal came after it.
    open: Option<(Instant, Instant)>,
}

/// What was found.
#[derive(Default)]
pub struct Findings {
    pub samples: u64,
    pub answers: u64,
    pub overlaps: Vec<String>,
    /// Longest time between the starts of two rounds: how blind the sampler was at worst.
    pub longest_gap: Duration,
}

/// The running sampler.
pub struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Findings>,
}

impl Sampler {
    /// Starts to sample a cluster with this port offset.
    pub fn start(port_offset: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("sampler".into())
            .spawn(move || sample_until(&stopped, port_offset))
            .expect("a thread can be started");
        Self { stop, thread }
    }

    /// Stops, and fails the test if two nodes were ever open at once. Returns a line for the report.
    pub fn verify(self) -> String {
        self.stop.store(true, Ordering::Relaxed);
        let found = self.thread.join().unwrap();
        assert!(found.answers > 0, "the sampler never found an open port: it looks at the wrong ones");
        assert!(found.overlaps.is_empty(), "two nodes open at once:\n{}", found.overlaps.join("\n"));
        format!(
            "{} samples of both ports of all nodes, {} answered, never two nodes at once (longest gap {} ms)",
            found.samples,
            found.answers,
            found.longest_gap.as_millis()
        )
    }
}

fn sample_until(stop: &AtomicBool, port_offset: u16) -> Findings {
    let mut ports: Vec<Port> = (0..3usize)
        .flat_map(|node| PORTS.map(|port| (node, port + port_offset)))
        .map(|(node, port)| {
            let address = SocketAddr::from((Ipv4Addr::new(127, 0, 0, node as u8 + 1), port));
            Port { node, address, open: None }
        })
        .collect();
    let mut found = Findings::default();
    let mut round = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        found.longest_gap = found.longest_gap.max(round.elapsed());
        round = Instant::now();
        for index in 0..ports.len() {
            sample_port(&mut ports, index, &mut found);
        }
        thread::sleep(PERIOD.saturating_sub(round.elapsed()));
    }
    found
}

fn sample_port(ports: &mut [Port], index: usize, found: &mut Findings) {
    let start = Instant::now();
    let answer = connect(ports[index].address);
    let end = Instant::now();
    found.samples += 1;
    match answer {
        Ok(true) => {
            found.answers += 1;
            if let Some((_, last)) = ports[index].open
                && start - last <= BRIDGE
            {
                report_overlaps(ports, index, (last, start), found);
            }
            ports[index].open = Some((start, end));
        }
        // Refused: whatever it said before belongs to an earlier opening.
        Ok(false) => ports[index].open = None,
        // No proof either way; the bridge limits what is concluded.
        Err(_) => {}
    }
}

/// The port was open throughout `span`: no other node may have answered wholly within it.
fn report_overlaps(ports: &[Port], index: usize, span: (Instant, Instant), found: &mut Findings) {
    let me = &ports[index];
    for other in ports.iter().filter(|other| other.node != me.node) {
        if let Some((start, end)) = other.open
            && span.0 <= start
            && end <= span.1
            && found.overlaps.len() < 20
        {
            found.overlaps.push(format!("  {} and {} (span {:?})", me.address, other.address, span.1 - span.0));
        }
    }
}

/// True if the port took the connection, false if it was refused.
fn connect(address: SocketAddr) -> io::Result<bool> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // Gone with a reset: thousands of connections a second must not fill the port range with TIME_WAIT.
    socket.set_linger(Some(Duration::ZERO))?;
    match socket.connect(&address.into()) {
        Ok(()) => return Ok(true),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(false),
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::EINPROGRESS as i32) => {}
        Err(error) => return Err(error),
    }
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut fds, PollTimeout::from(CONNECT_LIMIT_MS))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    match socket.take_error()? {
        None => Ok(true),
        Some(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(false),
        Some(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// The sampler must be known to find what it looks for.
    #[test]
    fn two_open_nodes_are_found_and_one_is_not() {
        let offset = 3500;
        let listen = |node: u8| TcpListener::bind((Ipv4Addr::new(127, 0, 0, node), PORTS[1] + offset)).unwrap();
        let count = |found: &Findings| (found.answers > 5, found.overlaps.is_empty());
        let one = listen(1);
        assert_eq!(count(&wait_findings(offset, |found| found.answers > 5)), (true, true));
        let two = listen(3);
        assert_eq!(count(&wait_findings(offset, |found| !found.overlaps.is_empty())), (true, false));
        drop((one, two));
    }

    fn wait_findings(offset: u16, enough: impl Fn(&Findings) -> bool) -> Findings {
        let mut ports: Vec<Port> = (0..3usize)
            .map(|node| {
                let address = SocketAddr::from((Ipv4Addr::new(127, 0, 0, node as u8 + 1), PORTS[1] + offset));
                Port { node, address, open: None }
            })
            .collect();
        let (mut found, deadline) = (Findings::default(), Instant::now() + Duration::from_secs(10));
        while (!enough(&found) || found.samples < 100) && Instant::now() < deadline {
            for index in 0..ports.len() {
                sample_port(&mut ports, index, &mut found);
            }
        }
        found
    }
}
