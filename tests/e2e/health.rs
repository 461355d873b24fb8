//! The health port of real daemons: what it says about each of them, and that it never calls a node PRIMARY that is not.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use twistlock_ha::{
    admin::SwitchoverReport,
    control::{self, Call},
    node::Status,
};

use super::{
    WRITERS, alone, beside,
    cluster::{self, Cluster, FROZEN, LEASE_LOST, LIMIT},
    writers::Writers,
};

/// `HEALTH_PORT` before the offset.
const PORT: u16 = 8087;
const TOKEN: &str = "a-token-of-enough-length";
/// How long a check waits for its answer.
const CHECK: Duration = Duration::from_millis(500);

/// Starts a cluster with the health port open on all nodes.
pub fn start() -> Cluster {
    let cluster = Cluster::start();
    cluster.configure("HEALTH_PORT", &port(&cluster).to_string());
    cluster.configure("METRICS_TOKEN", TOKEN);
    cluster.restart_all();
    cluster
}

/// The health port of all nodes.
pub fn port(cluster: &Cluster) -> u16 {
    PORT + cluster.port_offset
}

fn connect(cluster: &Cluster, node: usize) -> io::Result<TcpStream> {
    connect_to(&format!("127.0.0.{}:{}", node + 1, port(cluster)))
}

fn connect_to(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address.parse().unwrap(), CHECK)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// Everything that comes back: code, head and body. An error if it is no whole answer.
fn read_answer(mut stream: TcpStream) -> io::Result<(u16, String, String)> {
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
    Ok((code, head.to_lowercase(), body.to_owned()))
}

fn ask(cluster: &Cluster, node: usize, request: &str) -> (u16, String, String) {
    ask_with(cluster, node, request, "")
}

fn ask_with(cluster: &Cluster, node: usize, request: &str, headers: &str) -> (u16, String, String) {
    let mut stream = connect(cluster, node).expect("the health port is open");
    stream.write_all(format!("{request} HTTP/1.1\r\nhost: health\r\n{headers}\r\n").as_bytes()).unwrap();
    read_answer(stream).unwrap_or_else(|error| panic!("{request}: {error}"))
}

fn code(cluster: &Cluster, node: usize, path: &str) -> u16 {
    ask(cluster, node, &format!("GET {path}")).0
}

#[test]
fn every_node_says_what_it_is() {
    let _beside = beside();
    let cluster = start();
    let primary = cluster.primary();
    let other = (primary + 1) % 3;
    // The role comes first, then the ports.
    let deadline = Instant::now() + LIMIT;
    while code(&cluster, primary, "/") != 200 {
        assert!(Instant::now() < deadline, "the primary does not serve");
        poll_pause();
    }
    for (path, on_primary, on_secondary) in [
        ("/", 200, 503),
        ("/primary", 200, 503),
        ("/secondary", 503, 200),
        ("/primary?secondary=429", 200, 429),
        ("/?primary=404&secondary=200", 404, 200),
        ("/livez", 200, 200),
        ("/livez?within=60000", 200, 200),
        ("/readyz", 200, 200),
        ("/readyz?verbose", 200, 200),
        ("/status", 200, 200),
        ("/status?format=json", 200, 200),
        ("/?format=json", 200, 200),
        ("/status?format=xml", 400, 400),
        ("/primary?secondary=204", 400, 400),
        ("/primary?other=200", 400, 400),
        ("/primary?standby=200", 400, 400),
        ("/livez?within=0", 400, 400),
        ("/metrics", 401, 401),
        ("/nothing", 404, 404),
    ] {
        let found = (code(&cluster, primary, path), code(&cluster, other, path));
        assert_eq!(found, (on_primary, on_secondary), "{path}");
    }
    let (code, head, body) = ask(&cluster, other, "HEAD /primary");
    assert_eq!((code, body.as_str()), (503, ""));
    assert!(head.contains("content-type: application/json") && head.contains("no-store"), "{head}");
    assert_eq!(ask(&cluster, other, "POST /primary").0, 405);
    let told: Value = serde_json::from_str(&ask(&cluster, other, "GET /").2).unwrap();
    assert_eq!((&told["state"], &told["serves"]), (&"SECONDARY".into(), &false.into()), "{told}");
    assert_eq!(told["primary"], cluster.node(primary).name.as_str(), "{told}");
    every_node_has_a_page(&cluster, primary, other);
    let told: Value = serde_json::from_str(&ask(&cluster, primary, "GET /readyz?verbose").2).unwrap();
    let names: Vec<&str> = told["checks"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["loop", "role", "console", "database", "disk", "peers", "certificates", "clock"], "{told}");
    let (code, _, body) = ask_with(&cluster, other, "GET /metrics", &format!("authorization: Bearer {TOKEN}\r\n"));
    assert_eq!(code, 200, "{body}");
    assert!(body.contains("twistlock_primary 0") && !body.contains(TOKEN), "{body}");
    println!("health port: {}", cluster.finish(&[]));
}

fn every_node_has_a_page(cluster: &Cluster, primary: usize, other: usize) {
    let browser = "accept: text/html,application/xhtml+xml,*/*;q=0.8\r\n";
    for (node, at_the_root) in [(primary, 200), (other, 503)] {
        let (code, head, page) = ask_with(cluster, node, "GET /status", browser);
        assert!(code == 200 && head.contains("content-type: text/html") && head.contains("no-store"), "{head}");
        let name = &cluster.node(primary).name;
        assert!(page.contains(&format!("HEALTHY: {name} is PRIMARY (3 of 3 members up)")), "{page}");
        assert!(page.contains(&format!("href=\"{}/\"", cluster.node(primary).console_url)), "{page}");
        // The code is for balancers, whatever the body is.
        let (code, head, _) = ask_with(cluster, node, "GET /", browser);
        assert!(code == at_the_root && head.contains("text/html"), "{head}");
        let (_, head, body) = ask_with(cluster, node, "GET /status", "accept: application/json\r\n");
        assert!(head.contains("application/json") && head.contains("vary: accept"), "{head}");
        let told: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((&told["verdict"], &told["serves"]), (&"HEALTHY".into(), &(node == primary).into()), "{told}");
        assert_eq!((&told["primary"], told["members"].as_array().unwrap().len()), (&name.as_str().into(), 3), "{told}");
        let next = told["members"][other]["status"].as_str().unwrap();
        assert_eq!(next, format!("http://127.0.0.{}:{}/status", other + 1, port(cluster)));
    }
}

/// A port that another program has is tried again, and the status says so meanwhile.
#[test]
fn a_health_port_that_is_taken_is_opened_when_it_is_free() {
    let _beside = beside();
    let cluster = Cluster::start();
    let taken = std::net::TcpListener::bind(format!("127.0.0.2:{}", port(&cluster))).unwrap();
    cluster.configure("HEALTH_PORT", &port(&cluster).to_string());
    cluster.restart_all();
    let warned = |status: &Status| status.warnings.iter().any(|warning| warning.contains("the health port"));
    cluster.wait_for("a warning of node2", |statuses| statuses[1].as_ref().is_some_and(warned));
    assert_eq!(code(&cluster, 0, "/livez"), 200);
    drop(taken);
    cluster.wait_for("no warning", |statuses| statuses.iter().flatten().all(|status| !warned(status)));
    assert_eq!(code(&cluster, 1, "/readyz"), 200);
    println!("health port taken: {}", cluster.finish(&["the health port"]));
}

/// A member without the others is not ready, and a monitor sees why.
#[test]
fn a_member_that_is_alone_is_alive_but_not_ready() {
    let _beside = beside();
    let cluster = start();
    let left = (cluster.primary() + 1) % 3;
    let others: Vec<usize> = (0..3).filter(|node| *node != left).collect();
    others.iter().for_each(|node| cluster.freeze(*node));
    let deadline = Instant::now() + LIMIT;
    let told = loop {
        let (code, _, body) = ask(&cluster, left, "GET /readyz");
        if code == 503 && body.contains("peers") && body.contains("no primary is known") {
            break body;
        }
        assert!(Instant::now() < deadline, "still ready: {body}");
        poll_pause();
    };
    assert!(!told.contains("disk"), "{told}");
    assert_eq!((code(&cluster, left, "/livez"), code(&cluster, left, "/primary")), (200, 503));
    // Its page says that it does not know, and since when.
    let told: Value = serde_json::from_str(&ask(&cluster, left, "GET /status?format=json").2).unwrap();
    assert_eq!(
        (&told["verdict"], &told["primary"], &told["console"]),
        (&"NO_PRIMARY".into(), &Value::Null, &Value::Null)
    );
    let words = others.iter().map(|other| told["members"][*other]["words"].as_str().unwrap());
    assert!(words.clone().all(|words| words.starts_with("unknown, last seen ")), "{told}");
    assert!(!told.to_string().contains("no further failure is tolerated"), "none is tolerated any more: {told}");
    others.iter().for_each(|node| cluster.signal(*node, Signal::SIGCONT));
    cluster.wait_healthy();
    println!("a member that is alone says: {told}\n  {}", cluster.finish(&[LEASE_LOST, FROZEN].concat()));
}

fn poll_pause() {
    thread::sleep(Duration::from_millis(20));
}

/// Asks one node for ever whether it is the primary.
struct Checker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Yes>>,
}

/// A 200.
#[derive(Clone, Copy, Debug)]
struct Yes {
    asked: Instant,
    answered: Instant,
    node: usize,
    epoch: u64,
}

impl Checker {
    fn start(cluster: &Cluster, node: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (ended, address) = (Arc::clone(&stop), format!("127.0.0.{}:{}", node + 1, port(cluster)));
        let run = move || {
            let mut yes = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                let asked = Instant::now();
                let answer = connect_to(&address).and_then(|mut stream| {
                    stream.write_all(b"GET /primary HTTP/1.1\r\nhost: health\r\n\r\n")?;
                    read_answer(stream)
                });
                if let Ok((200, _, body)) = answer {
                    let epoch = serde_json::from_str::<Value>(&body).unwrap()["epoch"].as_u64().unwrap();
                    yes.push(Yes { asked, answered: Instant::now(), node, epoch });
                }
                poll_check();
            }
            yes
        };
        Self { stop, thread: thread::spawn(run) }
    }
}

fn poll_check() {
    thread::sleep(Duration::from_millis(2));
}

/// Nobody who was asked after a primary had answered may claim an earlier epoch, and no two nodes the same one.
fn verify(checkers: Vec<Checker>) -> String {
    checkers.iter().for_each(|checker| checker.stop.store(true, Ordering::Relaxed));
    let mut all: Vec<Yes> = checkers.into_iter().flat_map(|checker| checker.thread.join().unwrap()).collect();
    all.sort_by_key(|yes| yes.asked);
    let mut answered = all.clone();
    answered.sort_by_key(|yes| yes.answered);
    let (mut known, mut highest): (usize, Option<Yes>) = (0, None);
    for yes in &all {
        while answered[known].answered < yes.asked {
            highest = highest.filter(|high| high.epoch > answered[known].epoch).or(Some(answered[known]));
            known += 1;
        }
        if let Some(high) = highest {
            assert!(yes.epoch >= high.epoch, "{yes:?} was asked after {high:?}");
            assert!(yes.epoch > high.epoch || yes.node == high.node, "{yes:?} and {high:?}");
        }
    }
    let mut epochs: Vec<u64> = all.iter().map(|yes| yes.epoch).collect();
    epochs.dedup();
    format!(
        "{} times 200 on the health ports, by the primaries of {} epochs, never by two at once",
        all.len(),
        epochs.len()
    )
}

/// Requests that a frozen primary has got, before and while it is frozen, are never answered with 200 when it wakes.
#[test]
fn timed_a_primary_that_was_frozen_is_never_called_primary() {
    let _alone = alone();
    let cluster = start();
    let checkers: Vec<_> = (0..3).map(|node| Checker::start(&cluster, node)).collect();
    let writers = Writers::start(&cluster.file(), WRITERS / 4);
    for round in 0..3 {
        let primary = cluster.primary();
        let mut early: Vec<_> = (0..8).map(|_| connect(&cluster, primary).unwrap()).collect();
        for stream in &mut early {
            stream.write_all(b"GET /primary HTTP/1.1\r\nhost:").unwrap();
        }
        let frozen = Instant::now();
        cluster.freeze(primary);
        // Half of them with the lease still valid, half of them with another primary.
        let mut late = early.split_off(4);
        early.iter_mut().for_each(|stream| stream.write_all(b" health\r\n\r\n").unwrap());
        writers.wait_success(frozen, |node| node != primary).expect("a write on another node");
        late.iter_mut().for_each(|stream| stream.write_all(b" health\r\n\r\n").unwrap());
        cluster.signal(primary, Signal::SIGCONT);
        let answers: Vec<_> = early.into_iter().chain(late).map(|s| read_answer(s).map(|answer| answer.0)).collect();
        assert!(answers.iter().all(|answer| !matches!(answer, Ok(200))), "round {round}: {answers:?}");
        cluster.wait_healthy();
    }
    let primary = cluster.primary();
    cluster.signal(primary, Signal::SIGKILL);
    writers.wait_success(Instant::now(), |node| node != primary).expect("a write on another node");
    cluster.wait_healthy();
    let operation = Call::post("high-availability/switchover").with(json!({}));
    let _: SwitchoverReport =
        control::ask(&cluster.node(cluster.primary()).control, &operation, cluster::LIMIT).unwrap();
    cluster.wait_healthy();
    println!("{}\n  {}", verify(checkers), writers.verify());
    println!("  {}", cluster.finish(&[LEASE_LOST, FROZEN].concat()));
}
