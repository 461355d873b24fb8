//! Strangers who open as many connections as they can: members find each other, clients get in, no descriptor is missing, and the
//! log stays readable.

use std::{
    collections::{BTreeMap, VecDeque},
    io::Write,
    net::{IpAddr, SocketAddr, TcpStream},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::Signal,
};
use socket2::{Domain, Socket, Type};
use twistlock_ha::{cluster::Role, node::Status};

use super::{
    WRITERS, alone,
    cluster::{Cluster, LEASE_LOST},
    network::{cut, heal, in_private_network, lose},
    pace_until,
    writers::{Pen, Writers},
};

/// What may be said about a flood.
const FLOODED: &[&str] = &[
    "places for connections are short",
    "connections are turned away",
    "refused a connection to the high availability port",
    "the connection was lost",
    "is not reached",
    "slow statement",
    "too few members are heard of",
    "acquired connection, but time to acquire",
];
/// What may be said while packets get lost.
const LOST: &[&str] = &[
    "lost",
    "is not reached",
    "too few members",
    "slow statement",
    "acquired connection",
    "cannot",
    "gives the role up",
    "timed out",
];
/// Connections that a thread of a flood holds at most.
const HELD: usize = 1000;
/// Pause of such a thread: the processors of this host are shared with those who are flooded.
const PACE: Duration = Duration::from_millis(1);

/// Threads that connect again and again, from many addresses.
struct Flood {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
}

impl Flood {
    /// Each connection sends `hello` and then nothing more.
    fn start(targets: Vec<SocketAddr>, threads: usize, hello: Vec<u8>) -> Self {
        let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let run = |thread: usize| {
            let (stop, made, targets, hello) = (stop.clone(), made.clone(), targets.clone(), hello.clone());
            thread::spawn(move || {
                let mut held = VecDeque::new();
                while !stop.load(Ordering::Relaxed) {
                    let number = made.fetch_add(1, Ordering::Relaxed);
                    let from = IpAddr::from([127, 10 + thread as u8, (number / 50 % 4) as u8, (number % 50) as u8 + 1]);
                    if let Some(mut stream) = connect(from, targets[number % targets.len()]) {
                        // It may be refused by then.
                        let _ = stream.write_all(&hello);
                        held.push_back(stream);
                    }
                    if held.len() > HELD {
                        held.pop_front();
                    }
                    pace_until(Instant::now() + PACE);
                }
            })
        };
        let threads = (0..threads).map(run).collect();
        Self { stop, made, threads }
    }

    fn wait_made(&self, count: usize) {
        let deadline = Instant::now() + super::cluster::LIMIT;
        while self.made.load(Ordering::Relaxed) < count {
            assert!(Instant::now() < deadline, "the flood does not come about");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        self.made.load(Ordering::Relaxed)
    }
}

fn connect(from: IpAddr, to: SocketAddr) -> Option<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).ok()?;
    socket.bind(&SocketAddr::new(from, 0).into()).ok()?;
    socket.connect_timeout(&to.into(), Duration::from_millis(200)).ok()?;
    Some(socket.into())
}

/// The beginning of a TLS connection, as anybody can make it.
fn hello() -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
    let mut client = rustls::ClientConnection::new(Arc::new(config), "node-1".try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

fn port(cluster: &Cluster, node: usize, port: u16) -> SocketAddr {
    SocketAddr::new(cluster.node(node).address.parse().unwrap(), port + cluster.port_offset)
}

/// How long logins take, each by a new connection.
fn logins(cluster: &Cluster, what: &str) {
    let mut times: Vec<_> = (0..5)
        .map(|_| {
            let begin = Instant::now();
            Pen::new(&cluster.file());
            begin.elapsed()
        })
        .collect();
    times.sort();
    println!("  {what}: a login takes {:?} (median), {:?} at most", times[2], times[4]);
    assert!(times[2] < Duration::from_secs(3), "{what}: {times:?}");
}

fn open_files(cluster: &Cluster, node: usize) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", cluster.node(node).pid.unwrap())).unwrap().count()
}

/// A network that loses packets: nothing is lost or undone, and writes go on, about as fast as they would without a loss if one in
/// ten is lost. `SECONDS=n` sets how long each part lasts, `PERCENT=1,30` what is lost in each.
#[test]
fn timed_packets_that_get_lost_cost_no_write() {
    let _alone = alone();
    in_private_network(|| {
        let asked = |name| std::env::var(name).ok();
        let seconds = asked("SECONDS").map_or(2, |text| text.parse().expect("SECONDS is a number"));
        let percents = asked("PERCENT").unwrap_or_else(|| "0,10,30".to_owned());
        let cluster = Cluster::start();
        let writers = Writers::start(&cluster.file(), WRITERS);
        let epoch = |cluster: &Cluster| cluster.statuses().iter().flatten().map(|status| status.epoch).max().unwrap();
        let mut rates = BTreeMap::new();
        for percent in percents.split(',').map(|text| text.parse().expect("PERCENT has numbers")) {
            let (before, begin) = (epoch(&cluster), Instant::now());
            lose(percent, cluster.port_offset);
            pace_until(begin + Duration::from_secs(seconds));
            let written = writers.successes_since(begin);
            heal();
            let healed = Instant::now();
            let after = writers.wait_success(healed, |_| true).expect("writes go on");
            let (silence, changes) = (writers.longest_silence(begin), epoch(&cluster) - before);
            println!(
                "  {percent} % lost for {seconds} s: {written} writes, longest silence {silence:?}, {changes} elections, the next \
                 write {after:?} after the end"
            );
            rates.insert(percent, written);
            cluster.wait_healthy();
        }
        if let (Some(all), Some(most)) = (rates.get(&0), rates.get(&10)) {
            // By TCP alone it is one in twenty: the heartbeats behind what was lost come after the lease.
            assert!(most * 5 > *all, "{most} writes while one packet in ten is lost, {all} without a loss");
        }
        let written = writers.verify();
        println!("packet loss: {written}\n  {}", cluster.finish(&[LEASE_LOST, LOST].concat()));
    });
}

#[test]
fn timed_floods_cost_neither_the_role_nor_a_member_nor_a_client() {
    let _alone = alone();
    in_private_network(floods);
}

fn floods() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let cluster = Cluster::start_limited(600);
    let primary = cluster.primary();
    let epoch = |cluster: &Cluster| cluster.statuses().iter().flatten().map(|status| status.epoch).max();
    let before = epoch(&cluster);
    println!("  {} files open at rest", open_files(&cluster, primary));
    let writers = Writers::start_paced(&cluster.file(), 4, Duration::from_millis(50));
    for (what, ports, greeting) in [
        ("the port for Defenders", vec![8084], Vec::new()),
        ("all ports of the Console", vec![8083, 8081, 8084], Vec::new()),
        ("TLS to the Console", vec![8083], hello()),
    ] {
        let targets = ports.into_iter().map(|number| port(&cluster, primary, number)).collect();
        let flood = Flood::start(targets, 2, greeting);
        flood.wait_made(2000);
        logins(&cluster, what);
        println!("  {} files open, {} connections", open_files(&cluster, primary), flood.end());
    }
    for (what, greeting) in [("silent", Vec::new()), ("greeting", hello())] {
        let targets = (0..3).map(|node| port(&cluster, node, 8086)).collect();
        let flood = Flood::start(targets, 2, greeting);
        flood.wait_made(1000);
        let lost = (cluster.primary() + 1) % 3;
        let old = cluster.node(lost).pid;
        cluster.signal(lost, Signal::SIGKILL);
        let role = |statuses: &[Option<Status>]| statuses[lost].as_ref().map(|status| status.role);
        cluster.wait_for("a new process", |_| cluster.node(lost).pid.is_some_and(|pid| Some(pid) != old));
        let begin = Instant::now();
        cluster.wait_for("the member is back", |statuses| role(statuses) == Some(Role::Secondary));
        let back = begin.elapsed();
        println!(
            "  {what} flood of the HA ports: a killed member is back {back:?} after its start, {} connections",
            flood.end()
        );
        assert!(back < Duration::from_secs(10), "{back:?}");
    }
    cluster.wait_healthy();
    assert_eq!(epoch(&cluster), before, "no flood costs the role");
    cut_off_during_a_flood(&cluster, &writers);
    // With far too few, the daemon says so instead of beginning what it cannot do.
    let mut few = Command::new("sh");
    few.args(["-c", "ulimit -n 80 && exec \"$0\" run --config \"$1\"", env!("CARGO_BIN_EXE_twistlockd")]);
    let few = few.arg(cluster.config_path(0)).output().unwrap();
    let said = String::from_utf8_lossy(&few.stderr).into_owned();
    assert!(few.status.code() == Some(69) && said.contains("needs at least 256"), "{said}");
    let written = writers.verify();
    let lines: usize = (0..3).map(|node| cluster.log(node).lines().count()).sum();
    assert!(lines < 1500, "{lines} lines in the logs");
    println!("floods: {written}, {lines} lines in the logs\n  {}", cluster.finish(&[FLOODED, LEASE_LOST].concat()));
}

/// The members find each other again among strangers who knock at the same ports.
fn cut_off_during_a_flood(cluster: &Cluster, writers: &Writers) {
    let flood = Flood::start((0..3).map(|node| port(cluster, node, 8086)).collect(), 2, hello());
    flood.wait_made(1000);
    cut(cluster.port_offset);
    pace_until(Instant::now() + Duration::from_secs(3));
    heal();
    let after = writers.wait_success(Instant::now(), |_| true).expect("writes go on");
    println!("  a cut of 3 s during a flood of the HA ports: writes go on {after:?} after it");
    flood.end();
    cluster.wait_healthy();
}
