//! A service beside the Console, in a real cluster: clients reach it at the PRIMARY alone, and it follows the role, whatever
//! happens to the process that is there. Must never judge by speed: the figures are reported.

use std::{
    fs,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use twistlock_ha::{
    admin::SwitchoverReport,
    control::{self, Call},
};

mod folder;
mod whole;

use super::{
    audit::here,
    beside,
    cluster::{Cluster, FROZEN, LEASE_LOST, LIMIT},
};

/// What a node says whose service was using its folder when the role went.
const FOLDER_LOST: &[&str] =
    &["the service's folder is fenced", "refused: this node is no longer the primary of its epoch"];
/// Says which node it runs on, in which epoch, and as which process.
const PROGRAM: &str = "
import http.server, os, sys
class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        text = '%s %s %d' % (os.environ['TWISTLOCK_NODE'], os.environ['TWISTLOCK_EPOCH'], os.getpid())
        self.send_response(200)
        self.send_header('content-length', str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
    def log_message(self, *words): pass
http.server.ThreadingHTTPServer.allow_reuse_address = True
http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Site).serve_forever()
";

/// A port of this host that nobody has.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What the service on a node says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    node: String,
    epoch: u64,
    pid: i32,
}

fn ask(node: usize, port: u16) -> io::Result<Said> {
    let mut stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, node as u8 + 1], port)))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let odd = || io::Error::other(format!("an odd answer: {text:?}"));
    let mut words = text.split("\r\n\r\n").nth(1).ok_or_else(odd)?.split(' ');
    let mut next = || words.next().ok_or_else(odd);
    let (node, epoch, pid) = (next()?.to_owned(), next()?, next()?);
    Ok(Said { node, epoch: epoch.parse().map_err(io::Error::other)?, pid: pid.parse().map_err(io::Error::other)? })
}

/// Waits until a service that is as wanted answers on some node, and nobody but it; returns where, and after how long.
fn wait_for_answer(port: u16, is: impl Fn(&Said) -> bool) -> (usize, Said, Duration) {
    let begin = Instant::now();
    loop {
        let all: Vec<_> = (0..3).filter_map(|node| Some((node, ask(node, port).ok()?))).collect();
        // Two would be asked one after the other: between them the role may have gone from one to the other.
        if let [(node, said)] = all.as_slice()
            && is(said)
        {
            return (*node, said.clone(), begin.elapsed());
        }
        assert!(begin.elapsed() < LIMIT, "no service answers as it should: {all:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn lives(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" Z")))
}

fn wait_until_gone(pid: i32) -> Duration {
    let begin = Instant::now();
    while lives(pid) {
        assert!(begin.elapsed() < LIMIT, "the process {pid} of the service lives");
        thread::sleep(Duration::from_millis(1));
    }
    begin.elapsed()
}

fn an_administrator_stops_and_starts_it(cluster: &Cluster, node: usize, port: u16) {
    let cli = |args: &[&str]| here(cluster, node, &[&["service"], args].concat());
    let state = || {
        let (_, text) = cli(&["status", "--json"]);
        serde_json::from_str::<serde_json::Value>(&text).unwrap()
    };
    assert_eq!((&state()["state"], cli(&["status"]).0), (&"ready".into(), Some(0)));
    assert_eq!(cli(&["stop"]).0, Some(0));
    let wait_for_state = |wanted: &str| {
        let begin = Instant::now();
        while state()["state"] != wanted {
            assert!(begin.elapsed() < LIMIT, "{}", state());
        }
    };
    wait_for_state("stopped");
    assert_eq!(state()["held"], true);
    assert!(ask(node, port).is_err(), "its port is closed");
    assert_eq!(cluster.primary(), node, "and the Console's is not");
    assert_eq!(cli(&["start"]).0, Some(0));
    wait_for_state("ready");
    let (elsewhere, text) = here(cluster, (node + 1) % 3, &["service", "restart"]);
    assert!(elsewhere == Some(75) && text.contains("only the PRIMARY does this"), "{text}");
    let (_, audits) = here(cluster, node, &["audits", "--json"]);
    let rows: Vec<serde_json::Value> = serde_json::from_str(&audits).unwrap();
    let of_service =
        |action: &str| rows.iter().filter(|row| row["action"] == action && row["what"] == "service").count();
    assert_eq!((of_service("stop"), of_service("start")), (1, 1), "{audits}");
}

#[test]
fn a_service_is_where_the_primary_is() {
    let _beside = beside();
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("site.py");
    fs::write(&program, PROGRAM).unwrap();
    let inside = free_port();
    let command = format!("python3 {} {inside}", program.display());
    let cluster = Cluster::start_service(&command, inside);
    let port = cluster.service_port();
    let (node, first, _) = wait_for_answer(port, |_| true);
    assert_eq!((node, first.node), (cluster.primary(), cluster.node(node).name));

    // The service dies alone: it is started again on the spot.
    kill(Pid::from_raw(first.pid), Signal::SIGKILL).unwrap();
    let (same, again, took) = wait_for_answer(port, |said| said.pid != first.pid);
    println!("  the service is killed: it answers again on the same node after {took:?}");
    assert_eq!((same, again.epoch), (node, first.epoch));

    // The daemon dies: another node has it, and nothing is left here.
    cluster.signal(node, Signal::SIGKILL);
    let (other, next, took) = wait_for_answer(port, |said| said.epoch > first.epoch);
    println!("  kill -9 of the PRIMARY: the service answers on another node after {took:?}");
    assert_ne!(other, node);
    wait_until_gone(again.pid);
    cluster.wait_healthy();

    // It is frozen: its port guard closes the ports and ends the service.
    cluster.freeze(other);
    let gone = wait_until_gone(next.pid);
    let (third, _, took) = wait_for_answer(port, |said| said.epoch > next.epoch);
    println!("  SIGSTOP of the PRIMARY: its service is gone after {gone:?}, another answers {took:?} later");
    assert_ne!(third, other);
    cluster.signal(other, Signal::SIGCONT);
    cluster.wait_healthy();

    an_administrator_stops_and_starts_it(&cluster, third, port);
    let (_, after, _) = wait_for_answer(port, |_| true);

    // In order.
    let begin = Instant::now();
    let call = Call::post("high-availability/switchover").with(serde_json::json!({}));
    let _: SwitchoverReport = control::ask(&cluster.node(third).control, &call, LIMIT).unwrap();
    let (_, last, _) = wait_for_answer(port, |said| said.epoch > after.epoch);
    println!("  a switchover: the service answers on another node {:?} after it was asked for", begin.elapsed());
    assert!(!lives(after.pid) && lives(last.pid));
    let expected = [LEASE_LOST, FROZEN, FOLDER_LOST, &["the service has ended ("]];
    println!("{}", cluster.finish(&expected.concat()));
    assert!(!lives(last.pid), "it ends with the cluster");
}
