//! A Defender from its installation to its end: the real line in a real shell, the real agent below a prefix, a real cluster
//! whose PRIMARY dies and whose authority is replaced. Its events are read by `twistcli`.

use std::{
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{
    agent::{Agent, said},
    beside,
    cluster::{Cluster, LEASE_LOST, LIMIT},
    rotation::NOT_YET,
    writers::Pen,
};

fn wait_until(what: &str, agent: &Agent, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < LIMIT, "{what}: not within {} s; the Defender: {}", LIMIT.as_secs(), agent.log());
        thread::sleep(Duration::from_millis(50));
    }
}

/// An administrator who is elsewhere.
struct Desk<'a> {
    cluster: &'a Cluster,
    pen: Pen,
}

impl Desk<'_> {
    fn call(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let (status, text) = self.pen.call(self.cluster.primary(), method, path, body);
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    fn ok(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let (status, answer) = self.call(method, path, body);
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    /// What `twistcli` prints with `--json`.
    fn twistcli(&self, words: &[&str]) -> Value {
        let file = self.cluster.file();
        let nodes: Vec<_> = file.nodes.iter().map(|node| node.console_url.clone()).collect();
        let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
        command.args(words).arg("--json").env("TWISTLOCK_CACERT", file.ca).env("TWISTLOCK_ADDRESS", nodes.join(","));
        command.env("TWISTLOCK_USER", file.user).env("TWISTLOCK_PASSWORD", file.password);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// How often the path of a file is in the events.
    fn seen(&self, agent: &Agent, name: &str) -> usize {
        let path = agent.watched().join(name).display().to_string();
        let events = self.twistcli(&["defender", "events", "--limit", "1000"]);
        events.as_array().unwrap().iter().filter(|event| event["event"]["path"] == *path).count()
    }

    fn row(&self, all: bool) -> Option<Value> {
        let words: &[&str] = if all { &["defender", "list", "--all"] } else { &["defender", "list"] };
        let rows = self.twistcli(words);
        assert!(rows.as_array().unwrap().len() < 2, "{rows}");
        rows.get(0).cloned()
    }

    fn wait_connected(&self, agent: &Agent) -> Value {
        wait_until("it is connected", agent, || self.row(false).is_some_and(|row| row["connected"] == true));
        self.row(false).unwrap()
    }
}

#[test]
fn a_host_that_runs_the_line_is_a_defender_through_everything() {
    let _beside = beside();
    let cluster = Cluster::start();
    let desk = Desk { cluster: &cluster, pen: Pen::new(&cluster.file()) };
    let agent = Agent::new();
    install(&desk, &agent);
    watch(&desk, &agent);
    takeover(&desk, &agent);
    rotation(&desk, &agent);
    withdraw(&desk, &agent);
    drop(agent);
    println!("Defender: {}", cluster.finish(&[LEASE_LOST, NOT_YET].concat()));
}

fn install(desk: &Desk<'_>, agent: &Agent) {
    let line = desk.twistcli(&["defender", "install-script", "--for", "1h"])["line"].as_str().unwrap().to_owned();
    let bad = line.replacen("TWJ1.", "TWJ1.00", 1);
    let output = agent.run_line(&bad, "");
    assert_eq!(output.status.code(), Some(77), "{}", said(&output));
    assert!(said(&output).contains("Get a new line: twistcli defender install-script"), "{}", said(&output));
    let output = agent.run_line(&line, "--name web1");
    assert!(output.status.success(), "{}", said(&output));
    let installed = fs::read(agent.program()).unwrap();
    assert!(installed == fs::read(env!("CARGO_BIN_EXE_defender")).unwrap(), "the program is that of the Console");
    let left = fs::read_dir(agent.program().parent().unwrap()).unwrap();
    assert_eq!(left.count(), 1, "nothing else is left there");
    let row = desk.wait_connected(agent);
    assert_eq!((&row["name"], &row["compatibleVersion"]), (&json!("web1"), &json!(true)));
    // Again, it is the same Defender, and one agent.
    let before = agent.pid().unwrap();
    let output = agent.run_line(&line, "--name web1");
    assert!(output.status.success() && said(&output).contains("is installed"), "{}", said(&output));
    wait_until("another agent runs", agent, || agent.pid().is_some_and(|pid| pid != before));
    assert!(!Path::new(&format!("/proc/{before}/exe")).exists(), "the old one is gone");
    assert_eq!(desk.wait_connected(agent)["id"], row["id"]);
}

fn watch(desk: &Desk<'_>, agent: &Agent) {
    let wanted = json!({ "paths": [{ "path": agent.watched(), "recursive": true }] });
    let version = desk.ok("POST", "/defenders/policy", Some(wanted))["version"].clone();
    wait_until("the policy has arrived", agent, || {
        serde_json::from_str::<Value>(&agent.file("policy.json")).is_ok_and(|policy| policy["version"] == version)
    });
    // What is there when it looks first is no change.
    let events = || desk.twistcli(&["defender", "events", "--kind", "baseline"]);
    wait_until("it knows what there is", agent, || events().as_array().is_some_and(|found| !found.is_empty()));
    agent.write("first");
    wait_until("the event is there", agent, || desk.seen(agent, "first") > 0);
}

/// What happens while nobody is PRIMARY comes later, and what was there stays once.
fn takeover(desk: &Desk<'_>, agent: &Agent) {
    desk.cluster.signal(desk.cluster.primary(), Signal::SIGKILL);
    agent.write("meanwhile");
    desk.cluster.wait_healthy();
    wait_until("the event is there", agent, || desk.seen(agent, "meanwhile") > 0);
    agent.write("afterwards");
    wait_until("the event is there", agent, || desk.seen(agent, "afterwards") > 0);
    for name in ["first", "meanwhile", "afterwards"] {
        assert_eq!(desk.seen(agent, name), 1, "{name}");
    }
}

/// Another authority takes the place of the one that the Defender was registered under. It is connected all the time, then
/// has to connect anew with what it got meanwhile; nobody touches it.
fn rotation(desk: &Desk<'_>, agent: &Agent) {
    desk.wait_connected(agent);
    let (pid, authority, certificate) = (agent.pid(), agent.file("ca.pem"), agent.file("certificate.pem"));
    desk.ok("POST", "/high-availability/rotate-ca", Some(json!({ "overlapSec": 4 })));
    wait_until("it trusts both", agent, || agent.file("ca.pem").matches("BEGIN CERTIFICATE").count() == 2);
    wait_until("it has another certificate", agent, || agent.file("certificate.pem") != certificate);
    assert!(agent.file("ca.pem").contains(authority.trim()), "the old one is in force");
    wait_until("the old one is gone", agent, || agent.file("ca.pem").matches("BEGIN CERTIFICATE").count() == 1);
    assert_ne!(agent.file("ca.pem"), authority);
    // The administrators have the new one, too.
    fs::write(desk.cluster.file().ca, agent.file("ca.pem")).unwrap();
    agent.write("rotated");
    wait_until("the event is there", agent, || desk.seen(agent, "rotated") > 0);
    let connections = agent.log().matches("connected to the Console").count();
    desk.cluster.signal(desk.cluster.primary(), Signal::SIGKILL);
    desk.cluster.wait_healthy();
    wait_until("it has connected anew", agent, || {
        agent.log().matches("connected to the Console").count() > connections
    });
    agent.write("under the new one");
    wait_until("the event is there", agent, || desk.seen(agent, "under the new one") > 0);
    assert_eq!((agent.pid(), desk.seen(agent, "rotated")), (pid, 1));
}

/// An administrator shuts it out: it is told so, and its key gets no other certificate.
fn withdraw(desk: &Desk<'_>, agent: &Agent) {
    let id = desk.wait_connected(agent)["id"].as_str().unwrap().to_owned();
    desk.ok("DELETE", &format!("/defenders/{id}"), None);
    wait_until("it is told", agent, || agent.log().contains("this Defender is withdrawn"));
    assert!(desk.row(false).is_none() && desk.row(true).is_some_and(|row| row["withdrawn"] == true));
    let line = desk.ok("POST", "/defenders/install-script", Some(json!({})))["line"].as_str().unwrap().to_owned();
    let output = agent.run_line(&line, "");
    assert!(!output.status.success() && said(&output).contains("it needs another key"), "{}", said(&output));
    assert_eq!(desk.seen(agent, "first"), 1, "what it has told stays");
    let output = agent.defender(&["uninstall", "--purge"]);
    assert!(output.status.success(), "{}", said(&output));
    assert!(!agent.folder().exists() && !agent.program().exists());
}
