//! The port guard against real processes: an owner that is frozen, killed, or loses its guard. The owner is this test
//! program itself, started again with an environment variable.

use std::{
    fs,
    io::{BufRead, BufReader, Lines, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use socket2::{Domain, Socket, Type};
use twistlock_ha::{
    guard::PortGuard,
    node::{Lease, lease::boottime},
};

const OWNER: &str = "TWISTLOCK_TEST_OWNER";
const LEASE: Duration = Duration::from_millis(400);
/// Far above everything that is waited for.
const BOUND: Duration = Duration::from_secs(10);

fn program() -> std::path::PathBuf {
    env!("CARGO_BIN_EXE_twistlockd").into()
}

/// Polls until the condition holds and returns the time it took.
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) -> Duration {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < BOUND, "waited too long until {what}");
        thread::park_timeout(Duration::from_millis(1));
    }
    begin.elapsed()
}

fn refused(address: SocketAddr) -> bool {
    match TcpStream::connect(address) {
        Ok(_) => false,
        // A connection that the kernel had queued when the port was closed is reset.
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => false,
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{error}");
            true
        }
    }
}

/// Alive and not a zombie that its parent has not reaped.
fn is_running(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" Z")))
}

fn bound_socket() -> (Socket, SocketAddr) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.cloexec(), None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, address)
}

fn extend(lease: &Lease) {
    lease.set(boottime() + LEASE.as_nanos() as u64).unwrap();
}

/// The owner process: not a test of its own. Prints its guard and its ports, extends its lease until it is frozen or
/// killed, and reports the guard's lapses and replacements.
#[test]
fn owner_process() {
    if std::env::var_os(OWNER).is_none() {
        return;
    }
    let lease = Lease::new().unwrap();
    let consensus = TcpListener::bind("127.0.0.1:0").unwrap();
    let guard = PortGuard::spawn(program(), &lease, Some(consensus.as_fd())).unwrap();
    let (first, first_at) = bound_socket();
    let (second, second_at) = bound_socket();
    extend(&lease);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(guard.open(&[first.as_fd(), second.as_fd()])).unwrap();
    let state = guard.state();
    let mut last = state.borrow().clone();
    let say = |line: String| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "@ {line}").unwrap();
        out.flush().unwrap();
    };
    say(format!("{} {} {first_at} {second_at}", last.pid.unwrap(), consensus.local_addr().unwrap()));
    // The test holds the other end of standard input: whatever happens to it, this process does not stay behind.
    let input = thread::spawn(|| std::io::stdin().read_line(&mut String::new()));
    while !input.is_finished() {
        extend(&lease);
        let now = state.borrow().clone();
        if now.lapses != last.lapses {
            say(format!("lapsed {}", now.lapses));
            last.lapses = now.lapses;
        }
        if let Some(pid) = now.pid.filter(|pid| last.pid != Some(*pid)) {
            say(format!("guard {pid}"));
            last.pid = now.pid;
        }
        thread::park_timeout(Duration::from_millis(20));
    }
}

struct Owner {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    guard: u32,
    consensus: SocketAddr,
    ports: [SocketAddr; 2],
    _input: ChildStdin,
}

impl Owner {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "owner_process", "--nocapture", "--test-threads=1"])
            .env(OWNER, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = said(&mut lines);
        let words: Vec<&str> = line.split(' ').collect();
        Self {
            guard: words[0].parse().unwrap(),
            consensus: words[1].parse().unwrap(),
            ports: [words[2].parse().unwrap(), words[3].parse().unwrap()],
            _input: child.stdin.take().unwrap(),
            lines,
            child,
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    fn said(&mut self) -> String {
        said(&mut self.lines)
    }

    fn refused(&self) -> bool {
        self.ports.into_iter().all(refused)
    }

    fn open(&self) -> bool {
        self.ports.into_iter().all(|port| TcpStream::connect(port).is_ok())
    }
}

/// The owner's next line; the test harness prints others.
fn said(lines: &mut Lines<BufReader<ChildStdout>>) -> String {
    loop {
        let line = lines.next().expect("the owner goes on").unwrap();
        if let Some((_, text)) = line.split_once("@ ") {
            return text.to_owned();
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn ports_of_a_frozen_owner_refuse_from_the_deadline_on_and_after_it_wakes() {
    let mut owner = Owner::start();
    assert!(owner.open());
    owner.signal(Signal::SIGSTOP);
    let took = wait_until("the frozen owner's ports refuse", || owner.refused());
    println!("ports of a frozen owner refused after {took:?} (lease {LEASE:?})");
    assert!(is_running(owner.guard));
    owner.signal(Signal::SIGCONT);
    // It extends its lease again at once, and has had the time to do so when it reports the lapse.
    assert_eq!(owner.said(), "lapsed 1");
    assert!(owner.refused());
}

#[test]
fn a_killed_owner_takes_its_guard_and_all_ports_along() {
    let owner = Owner::start();
    assert!(owner.open() && TcpStream::connect(owner.consensus).is_ok());
    owner.signal(Signal::SIGKILL);
    let took = wait_until("all ports refuse", || owner.refused() && refused(owner.consensus));
    wait_until("the guard is gone", || !is_running(owner.guard));
    println!("ports of a killed owner refused after {took:?}");
}

#[test]
fn the_consensus_port_refuses_only_when_the_guard_is_dead() {
    let owner = Owner::start();
    // A frozen guard cannot notice anything, but the kernel kills it all the same.
    kill(Pid::from_raw(owner.guard as i32), Signal::SIGSTOP).unwrap();
    owner.signal(Signal::SIGKILL);
    wait_until("the consensus port refuses", || refused(owner.consensus));
    assert!(owner.refused());
    wait_until("the guard is gone", || !is_running(owner.guard));
}

#[test]
fn a_dead_guard_is_replaced_and_its_successor_does_its_work() {
    let mut owner = Owner::start();
    kill(Pid::from_raw(owner.guard as i32), Signal::SIGKILL).unwrap();
    let successor: u32 = owner.said().strip_prefix("guard ").unwrap().parse().unwrap();
    assert_ne!(successor, owner.guard);
    assert!(owner.open(), "the ports stay open while the guard is replaced");
    owner.signal(Signal::SIGSTOP);
    wait_until("the frozen owner's ports refuse", || owner.refused());
    assert!(is_running(successor));
}

#[test]
fn signals_for_the_group_do_not_stop_the_guard() {
    let owner = Owner::start();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        kill(Pid::from_raw(owner.guard as i32), signal).unwrap();
    }
    owner.signal(Signal::SIGSTOP);
    wait_until("the frozen owner's ports refuse", || owner.refused());
    assert!(is_running(owner.guard));
}

#[test]
fn a_released_socket_can_be_bound_and_opened_again() {
    let lease = Lease::new().unwrap();
    let guard = PortGuard::spawn(program(), &lease, None).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (mut socket, address) = bound_socket();
    for _ in 0..20 {
        extend(&lease);
        assert!(refused(address), "bound, not open");
        runtime.block_on(guard.open(&[socket.as_fd()])).unwrap();
        let _client = TcpStream::connect(address).unwrap();
        socket.shutdown(std::net::Shutdown::Both).unwrap();
        assert!(refused(address), "closed for every holder");
        drop(socket);
        runtime.block_on(guard.release()).unwrap();
        socket = Socket::new(Domain::IPV4, Type::STREAM.cloexec(), None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&address.into()).unwrap();
    }
}

#[test]
fn without_a_lease_nothing_is_opened() {
    let lease = Lease::new().unwrap();
    let guard = PortGuard::spawn(program(), &lease, None).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (socket, address) = bound_socket();
    assert!(runtime.block_on(guard.open(&[socket.as_fd()])).is_err());
    assert!(refused(address));
    extend(&lease);
    runtime.block_on(guard.open(&[socket.as_fd()])).unwrap();
    assert!(TcpStream::connect(address).is_ok());
    // The lease ends without a word.
    wait_until("the port refuses", || refused(address));
    assert!(boottime() >= lease.deadline(), "not before the deadline");
}

#[test]
fn the_guard_ends_with_its_handle() {
    let lease = Lease::new().unwrap();
    let guard = PortGuard::spawn(program(), &lease, None).unwrap();
    let pid = guard.state().borrow().pid.unwrap();
    drop(guard);
    wait_until("the guard is gone", || !is_running(pid));
}

#[test]
fn a_guard_started_by_hand_explains_itself() {
    let output = Command::new(program()).arg("port-guard").stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("internal to twistlockd"), "{text}");
}

#[test]
fn a_program_that_is_no_guard_is_an_error() {
    let lease = Lease::new().unwrap();
    let (done, result) = mpsc::channel();
    thread::spawn(move || done.send(PortGuard::spawn("/bin/false".into(), &lease, None).map(drop)));
    assert!(result.recv_timeout(BOUND).unwrap().is_err());
}
