//! A client that tries every Console port of every node once a millisecond, each from a thread of its own, and proves from
//! the answers when two nodes were open at once. Must never report an overlap that was none.
//!
//! The proof: a successful connect means that the port was open at some moment between the start and the end of the call.
//! Two such answers of one port, with no refusal between them and at most [`BRIDGE`] from the start of the first to the end
//! of the second, belong to one opening: to close, be elected again and open takes a node longer than that. So a row of
//! answers ([`Run`]) proves that the port was open from the end of its first call to the start of its last. Two nodes were
//! open at once if two such spans meet, or if a whole call that one answered lies within the other's span.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsFd,
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::gettid,
};
use socket2::{Domain, Socket, Type};

/// Where the sampler looks from. A wall lets it through, so that it sees what a cut-off node does.
pub const OBSERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 100);
/// Longest time that two answers of one opening may span together.
const BRIDGE: Duration = Duration::from_millis(20);
/// From the start of one attempt to the start of the next, for each port.
const PERIOD: Duration = Duration::from_millis(1);
/// A connect that takes longer proves nothing.
const CONNECT_LIMIT_MS: u16 = 1;
/// `MANAGEMENT_PORT_HTTPS` and `COMMUNICATION_PORT` before the offset.
const PORTS: [u16; 2] = [8083, 8084];
/// Width of a class of periods, and the number of classes: the last one takes all that are longer.
const CLASS: Duration = Duration::from_micros(50);
const CLASSES: usize = 2000;
/// How long a change that must come may take to be seen.
const SEEN_LIMIT: Duration = Duration::from_secs(10);

/// Start and end of a connect call.
type Call = (Instant, Instant);

/// What a call has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Open,
    Refused,
    /// Neither: no time, or no resources on our side.
    Unknown,
}

/// A row of answers that belong to one opening.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: Call,
    last: Call,
}

impl Run {
    /// The span throughout which the port was open for certain; none if there was one answer only.
    fn certain(&self) -> Option<Call> {
        (self.first.1 < self.last.0).then_some((self.first.1, self.last.0))
    }

    /// True if it is proved that the ports of both runs were open at the same moment.
    fn meets(&self, other: &Run) -> bool {
        let holds = |span: Option<Call>, call: Call| span.is_some_and(|span| span.0 <= call.0 && call.1 <= span.1);
        let (mine, its) = (self.certain(), other.certain());
        let spans_meet = mine.zip(its).is_some_and(|(mine, its)| mine.0.max(its.0) < mine.1.min(its.1));
        let call_within = holds(mine, other.first) || holds(mine, other.last);
        spans_meet || call_within || holds(its, self.first) || holds(its, self.last)
    }
}

/// What is known about one port of one node. Grows with its openings, not with the attempts.
struct Port {
    node: usize,
    address: SocketAddr,
    runs: Vec<Run>,
    /// The last run may go on: no refusal has come since.
    goes_on: bool,
    /// The first refusal after each run.
    refusals: Vec<Call>,
    answers: u64,
    unknown: u64,
    previous: Option<Instant>,
    longest: Duration,
    /// How often the time between the starts of two attempts was in each class.
    periods: Vec<u64>,
}

impl Port {
    fn new(node: usize, port: u16) -> Self {
        Self {
            node,
            address: SocketAddr::from((Ipv4Addr::new(127, 0, 0, node as u8 + 1), port)),
            runs: Vec::new(),
            goes_on: false,
            refusals: Vec::new(),
            answers: 0,
            unknown: 0,
            previous: None,
            longest: Duration::ZERO,
            periods: vec![0; CLASSES],
        }
    }

    fn note(&mut self, call: Call, answer: Answer) {
        if let Some(previous) = self.previous.replace(call.0) {
            let period = call.0 - previous;
            self.longest = self.longest.max(period);
            let class = (period.as_nanos() / CLASS.as_nanos()) as usize;
            self.periods[class.min(CLASSES - 1)] += 1;
        }
        match answer {
            Answer::Open => {
                self.answers += 1;
                match self.runs.last_mut().filter(|run| self.goes_on && call.1 - run.last.0 <= BRIDGE) {
                    Some(run) => run.last = call,
                    None => self.runs.push(Run { first: call, last: call }),
                }
                self.goes_on = true;
            }
            // Whatever it said before belongs to an earlier opening.
            Answer::Refused => {
                if self.goes_on {
                    self.refusals.push(call);
                }
                self.goes_on = false;
            }
            // No proof either way; the bridge limits what is concluded.
            Answer::Unknown => self.unknown += 1,
        }
    }
}

/// Every proof that two nodes were open at once.
fn overlaps(ports: &[&Port]) -> Vec<String> {
    let mut found = Vec::new();
    for (index, one) in ports.iter().enumerate() {
        for other in ports[index + 1..].iter().filter(|other| other.node != one.node) {
            let pairs = one.runs.iter().flat_map(|run| other.runs.iter().map(move |its| (run, its)));
            let met = pairs.filter(|(run, its)| run.meets(its));
            found.extend(met.map(|(run, its)| {
                let (begin, end) = (run.first.0.max(its.first.0), run.last.1.min(its.last.1));
                format!("  {} and {} for about {:?}", one.address, other.address, end.saturating_duration_since(begin))
            }));
        }
    }
    found
}

/// The running sampler.
pub struct Sampler {
    stop: Arc<AtomicBool>,
    ports: Vec<Arc<Mutex<Port>>>,
    threads: Vec<JoinHandle<bool>>,
}

impl Sampler {
    /// Starts to sample a cluster with this port offset.
    pub fn start(port_offset: u16) -> Self {
        Self::start_every(PERIOD, 3, port_offset)
    }

    /// The same with so many members, and a longer time between two attempts at a port, for a machine that has more to do.
    pub fn start_every(period: Duration, members: usize, port_offset: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let all = (0..members).flat_map(|node| PORTS.map(|port| Port::new(node, port + port_offset)));
        let ports: Vec<_> = all.map(|port| Arc::new(Mutex::new(port))).collect();
        let spawn = |port: &Arc<Mutex<Port>>| {
            let (stop, port) = (Arc::clone(&stop), Arc::clone(port));
            let name = "sampler".to_owned();
            thread::Builder::new()
                .name(name)
                .spawn(move || sample_until(&stop, period, &port))
                .expect("a thread can be started")
        };
        let threads = ports.iter().map(spawn).collect();
        Self { stop, ports, threads }
    }

    /// How long all ports of `node` had been seen refused before another node answered for the first time after `since`.
    /// None if another answered before they were seen closed: that alone proves nothing. Waits until it was all seen.
    pub fn wait_margin(&self, node: usize, since: Instant) -> Option<Duration> {
        let deadline = Instant::now() + SEEN_LIMIT;
        loop {
            if let Some((closed, opened)) = self.change(node, since) {
                return opened.checked_duration_since(closed);
            }
            assert!(
                Instant::now() < deadline,
                "the sampler does not see that node {} closed, another opened",
                node + 1
            );
            thread::sleep(PERIOD);
        }
    }

    /// When the last port of `node` was proved closed, and when the first port of another node may have opened.
    fn change(&self, node: usize, since: Instant) -> Option<Call> {
        let (mut closed, mut opened) = (Vec::new(), Vec::new());
        for port in &self.ports {
            let port = lock(port);
            if port.node == node {
                closed.push(port.refusals.iter().find(|call| call.0 > since).map(|call| call.1));
            } else {
                opened.extend(port.runs.iter().map(|run| run.first.0).find(|start| *start > since));
            }
        }
        let closed: Option<Vec<Instant>> = closed.into_iter().collect();
        closed?.into_iter().max().zip(opened.into_iter().min())
    }

    /// Stops, and fails the test if two nodes were ever open at once. Returns a line for the report.
    pub fn verify(mut self) -> String {
        self.stop.store(true, Ordering::Relaxed);
        let preferred =
            self.threads.drain(..).map(|thread| thread.join().unwrap()).filter(|preferred| *preferred).count();
        let ports: Vec<_> = self.ports.iter().map(|port| lock(port)).collect();
        let sum = |count: fn(&Port) -> u64| ports.iter().map(|port| count(port)).sum::<u64>();
        let (answers, unknown) = (sum(|port| port.answers), sum(|port| port.unknown));
        let samples = sum(|port| port.periods.iter().sum());
        let found = overlaps(&ports.iter().map(|port| &**port).collect::<Vec<_>>());
        assert!(answers > 0, "the sampler never found an open port: it looks at the wrong ones");
        assert!(found.is_empty(), "two nodes open at once:\n{}", found[..found.len().min(20)].join("\n"));
        let count = ports.len();
        let longest = ports.iter().map(|port| port.longest).max().unwrap_or_default();
        format!(
            "{samples} samples of {count} ports, {answers} answered, {unknown} unknown: never two nodes open at once (period of each \
             port p50/p99/max {:.1}/{:.1}/{:.1} ms{})",
            quantile(&ports, 0.5).as_secs_f64() * 1e3,
            quantile(&ports, 0.99).as_secs_f64() * 1e3,
            longest.as_secs_f64() * 1e3,
            if preferred == ports.len() { ", at real-time priority" } else { "" }
        )
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn lock(port: &Mutex<Port>) -> MutexGuard<'_, Port> {
    port.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The upper end of the class in which this part of all periods has been reached.
fn quantile(ports: &[MutexGuard<'_, Port>], part: f64) -> Duration {
    let total: u64 = ports.iter().flat_map(|port| &port.periods).sum();
    let mut left = (total as f64 * part) as u64;
    for class in 0..CLASSES {
        let here: u64 = ports.iter().map(|port| port.periods[class]).sum();
        if here > left {
            return CLASS * (class as u32 + 1);
        }
        left -= here;
    }
    CLASS * CLASSES as u32
}

/// True if this thread runs before all ordinary ones from now on: a late look is a blind one. Only root may do this.
fn prefer_this_thread() -> bool {
    let mut command = Command::new("chrt");
    command.args(["--fifo", "--pid", "1", &gettid().to_string()]);
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

fn sample_until(stop: &AtomicBool, period: Duration, port: &Mutex<Port>) -> bool {
    let preferred = prefer_this_thread();
    let address = lock(port).address;
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        let answer = connect(address).unwrap_or(Answer::Unknown);
        let end = Instant::now();
        lock(port).note((start, end), answer);
        // What was missed is not made up for.
        next = (next + period).max(end);
        thread::sleep(next - end);
    }
    preferred
}

fn connect(address: SocketAddr) -> io::Result<Answer> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // Gone with a reset: thousands of connections a second must not fill the port range with TIME_WAIT.
    socket.set_linger(Some(Duration::ZERO))?;
    socket.bind(&SocketAddr::from((OBSERVER, 0)).into())?;
    let refused = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    match socket.connect(&address.into()) {
        Ok(()) => return Ok(Answer::Open),
        Err(error) if refused(&error) => return Ok(Answer::Refused),
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::EINPROGRESS as i32) => {}
        Err(error) => return Err(error),
    }
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut fds, PollTimeout::from(CONNECT_LIMIT_MS))? == 0 {
        return Ok(Answer::Unknown);
    }
    Ok(match socket.take_error()? {
        None => Answer::Open,
        Some(error) if refused(&error) => Answer::Refused,
        Some(_) => Answer::Unknown,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Notes calls that begin at these microseconds and take 100.
    fn port(node: usize, begin: Instant, calls: &[(u64, Answer)]) -> Port {
        let mut port = Port::new(node, PORTS[0]);
        for (at, answer) in calls {
            let start = begin + Duration::from_micros(*at);
            port.note((start, start + Duration::from_micros(100)), *answer);
        }
        port
    }

    #[test]
    fn only_what_is_proved_is_an_overlap() {
        use Answer::{Open, Refused, Unknown};
        let begin = Instant::now();
        let count = |one: &[(u64, Answer)], other: &[(u64, Answer)]| {
            let (one, other) = (port(0, begin, one), port(2, begin, other));
            (overlaps(&[&one, &other]).len(), overlaps(&[&other, &one]).len())
        };
        // One call within the span of two others, also when something unknown lies between.
        assert_eq!(count(&[(0, Open), (1000, Open)], &[(500, Open)]), (1, 1));
        assert_eq!(count(&[(0, Open), (500, Unknown), (1000, Open)], &[(500, Open)]), (1, 1));
        // Two rows of calls that alternate.
        assert_eq!(count(&[(0, Open), (1000, Open)], &[(500, Open), (1500, Open)]), (1, 1));
        // One after the other, even without a refusal; calls that touch or cross prove nothing.
        assert_eq!(count(&[(0, Open), (1000, Open)], &[(1150, Open), (2000, Open)]), (0, 0));
        assert_eq!(count(&[(0, Open), (1000, Open)], &[(1050, Open), (2000, Open)]), (0, 0));
        assert_eq!(count(&[(0, Open), (1000, Open)], &[(950, Open)]), (0, 0));
        assert_eq!(count(&[(0, Open)], &[(0, Open)]), (0, 0));
        // A refusal between them: two openings. The same for a silence that is longer than the bridge.
        assert_eq!(count(&[(0, Open), (300, Refused), (1000, Open)], &[(500, Open)]), (0, 0));
        assert_eq!(count(&[(0, Open), (19_950, Open)], &[(500, Open)]), (0, 0));
        assert_eq!(count(&[(0, Open), (19_900, Open)], &[(500, Open)]), (1, 1));
        // Two ports of one node are no two nodes.
        let row = [(0, Open), (1000, Open)];
        assert!(overlaps(&[&port(1, begin, &row), &port(1, begin, &row)]).is_empty());
    }

    /// The sampler must be known to find what it looks for, and to see the order of a change.
    #[test]
    fn two_open_nodes_are_found_and_one_is_not() {
        let offset = 3500;
        let listen = |node: usize| {
            let bind =
                |port: u16| TcpListener::bind((Ipv4Addr::new(127, 0, 0, node as u8 + 1), port + offset)).unwrap();
            PORTS.map(bind)
        };
        let sampler = Sampler::start(offset);
        let (begin, one) = (Instant::now(), listen(0));
        wait_answers(&sampler, 0);
        drop(one);
        let two = listen(2);
        wait_answers(&sampler, 2);
        assert!(sampler.wait_margin(0, begin).is_none_or(|margin| margin < SEEN_LIMIT));
        drop(two);
        let line = sampler.verify();
        assert!(line.contains("never two nodes"), "{line}");

        let sampler = Sampler::start(offset);
        let both = (listen(0), listen(2));
        wait_answers(&sampler, 0);
        wait_answers(&sampler, 2);
        assert!(thread::spawn(move || sampler.verify()).join().is_err());
        drop(both);
    }

    fn wait_answers(sampler: &Sampler, node: usize) {
        let deadline = Instant::now() + SEEN_LIMIT;
        let many = |port: &Arc<Mutex<Port>>| lock(port).node != node || lock(port).answers > 50;
        while !sampler.ports.iter().all(many) && Instant::now() < deadline {
            thread::sleep(PERIOD);
        }
    }
}
