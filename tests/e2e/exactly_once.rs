//! Defenders: real agents watch a real folder while one PRIMARY after the other dies, and they die themselves. In the end each of
//! them has told of each file exactly once. Must never take the Defender's word for that: only what the Console shows counts.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

#[allow(dead_code, reason = "the benchmark uses all of it")]
#[path = "../../benches/defenders/crowd.rs"]
mod crowd;

use crowd::{Crowd, Desk};

use super::{
    beside,
    cluster::{Cluster, FROZEN, LEASE_LOST, LIMIT},
    writers::Pen,
};

/// `COMMUNICATION_PORT` of a dev cluster without an offset.
const PORT: u16 = 8084;
/// Rows of a page.
const PAGE: usize = 1000;
/// From one new file to the next.
const PACE: Duration = Duration::from_millis(5);
/// How the primary is lost. One that is frozen keeps its connections: only silence tells.
const FAULTS: [Signal; 3] = [Signal::SIGKILL, Signal::SIGSTOP, Signal::SIGKILL];
/// Defenders without a folder, and events of each between two deaths.
const CROWD: usize = 40;
const EVENTS: u64 = 25;

/// An agent, and the folder of what it keeps.
struct Agent {
    folder: PathBuf,
    id: String,
    process: Child,
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Agent {
    /// Registers a host by whichever Console answers, and runs it.
    fn start(base: &Path, name: &str, cluster: &Cluster, token: &Path) -> Self {
        let folder = base.join(name);
        let mut register = program(&folder);
        register.args(["register", "--name", name, "--port", &(PORT + cluster.port_offset).to_string()]);
        for node in cluster.file().nodes {
            register.args(["--console", node.console_url.trim_start_matches("https://")]);
        }
        let done = register.arg("--token-file").arg(token).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let said = String::from_utf8(done.stdout).unwrap();
        let id = said.trim_end().trim_end_matches('.').rsplit(' ').next().unwrap().to_owned();
        let process = run(&folder);
        Self { folder, id, process }
    }

    /// Kills it while it does whatever it does, and starts it again.
    fn kill_and_run(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = run(&self.folder);
    }

    /// What it says, for a test that fails.
    fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }
}

fn program(folder: &Path) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_defender"));
    program.arg("--folder").arg(folder).stdin(Stdio::null());
    program
}

fn run(folder: &Path) -> Child {
    let log = File::options().create(true).append(true).open(folder.join("log")).unwrap();
    program(folder).arg("run").stderr(log).spawn().unwrap()
}

/// What puts one file after the other into the folder that is watched, each of them whole, and changes another one all the time.
struct Changes {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

impl Changes {
    fn start(staging: PathBuf, watched: PathBuf) -> Self {
        let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&made));
        let pace = move || {
            while !stopped.load(Ordering::Relaxed) {
                let number = count.load(Ordering::Relaxed) + 1;
                make(&staging, &watched, number);
                count.store(number, Ordering::Relaxed);
                fs::write(watched.join("changing"), number.to_string()).unwrap();
                super::pace_until(Instant::now() + PACE);
            }
        };
        Self { stop, made, thread: thread::spawn(pace) }
    }

    fn count(&self) -> usize {
        self.made.load(Ordering::Relaxed)
    }

    fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.made.load(Ordering::Relaxed)
    }
}

/// A file that appears as a whole changes once.
fn make(staging: &Path, watched: &Path, number: usize) {
    let (from, name) = (staging.join("new"), format!("file-{number:06}"));
    fs::write(&from, &name).unwrap();
    fs::rename(from, watched.join(name)).unwrap();
}

/// What the Console shows, and who asks it.
struct Site {
    cluster: Cluster,
    pen: Pen,
    base: TempDir,
}

impl Site {
    fn start() -> Self {
        let cluster = Cluster::start();
        let pen = Pen::new(&cluster.file());
        let base = tempfile::Builder::new().prefix("twdef").tempdir().unwrap();
        ["staging", "watched"].iter().for_each(|name| fs::create_dir(base.path().join(name)).unwrap());
        Self { cluster, pen, base }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    fn call(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let (status, text) = self.pen.call(self.cluster.primary(), method, path, body);
        assert_eq!(status, 200, "{method} {path}: {text}");
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// The newest events of a Defender, all if `all` is true.
    fn events(&self, agent: &Agent, all: bool) -> Vec<Value> {
        let mut events: Vec<Value> = Vec::new();
        loop {
            let (id, offset) = (&agent.id, events.len());
            let page = self.call("GET", &format!("/defenders/events?defender={id}&limit={PAGE}&offset={offset}"), None);
            let page = page.as_array().unwrap();
            events.extend(page.iter().cloned());
            if !all || page.len() < PAGE {
                return events;
            }
        }
    }

    /// The highest number of a file that a Defender has told of.
    fn newest(&self, agent: &Agent) -> usize {
        self.events(agent, false).iter().filter_map(number).max().unwrap_or(0)
    }

    /// How many times a Defender has told of each file.
    fn files(&self, agent: &Agent) -> BTreeMap<usize, usize> {
        let mut files = BTreeMap::new();
        self.events(agent, true).iter().filter_map(number).for_each(|number| *files.entry(number).or_default() += 1);
        files
    }

    /// The Console of the primary.
    fn desk(&self) -> Desk {
        let (file, primary) = (self.cluster.file(), self.cluster.primary());
        Desk::new(&file.ca, &file.nodes[primary].console_url, self.pen.authorization()).unwrap()
    }

    /// Many more Defenders, of which only what they say is real.
    fn crowd(&self) -> Crowd {
        let token = fs::read_to_string(self.path("token")).unwrap();
        let port = PORT + self.cluster.port_offset;
        let consoles = self.cluster.file().nodes.iter().map(|node| format!("{}:{port}", node.address)).collect();
        let crowd = Crowd::register(&self.desk(), &token, consoles, CROWD).unwrap();
        crowd.start(Duration::from_millis(500));
        crowd.wait_for("all are connected", LIMIT, |tally| tally.connected.load(Ordering::Relaxed) == CROWD).unwrap();
        crowd
    }

    fn wait_until(&self, what: &str, agents: &[Agent], condition: impl Fn(&Agent) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !agents.iter().all(&condition) {
            if Instant::now() > deadline {
                agents.iter().for_each(|agent| println!("--- {}\n{}", agent.id, agent.log()));
                panic!("{what}: not within {} s", LIMIT.as_secs());
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Which file an event is about.
fn number(event: &Value) -> Option<usize> {
    event["event"]["path"].as_str()?.rsplit_once("/file-")?.1.parse().ok()
}

#[test]
fn each_event_of_a_defender_is_there_once_however_often_the_primary_and_a_defender_die() {
    let _beside = beside();
    let site = Site::start();
    let invitation = site.call("POST", "/defenders/tokens", Some(json!({})));
    fs::write(site.path("token"), invitation["token"].as_str().unwrap()).unwrap();
    let policy = json!({ "paths": [{ "path": site.path("watched") }], "perMinute": 1000 });
    site.call("POST", "/defenders/policy", Some(policy));
    let start = |name: &str| Agent::start(site.base.path(), name, &site.cluster, &site.path("token"));
    let mut agents = ["one", "two", "three"].map(start);
    let knows = |agent: &Agent| site.events(agent, false).iter().any(|event| event["kind"] == "baseline");
    site.wait_until("all know what was there before", &agents, knows);

    let mut crowd = site.crowd();
    let changes = Changes::start(site.path("staging"), site.path("watched"));
    for (agent, fault) in FAULTS.into_iter().enumerate() {
        let before = changes.count();
        site.wait_until("all tell what changes", &agents, |agent| site.newest(agent) > before);
        let primary = site.cluster.primary();
        crowd.count_arrivals();
        crowd.give(EVENTS);
        site.cluster.signal(primary, fault);
        let since = Instant::now();
        agents[agent].kill_and_run();
        let before = changes.count();
        site.wait_until("all tell the next primary", &agents, |agent| site.newest(agent) > before);
        crowd.wait_for("all are back", LIMIT, |_| crowd.arrivals().len() >= CROWD).unwrap();
        println!("{fault}: all are back after {} ms", since.elapsed().as_millis());
        crowd.give(EVENTS);
        crowd.wait_stored(LIMIT).unwrap();
        let (resumed, full) = (&crowd.tally.resumed, &crowd.tally.full);
        let (resumed, full) = (resumed.load(Ordering::Relaxed), full.load(Ordering::Relaxed));
        assert!(resumed > full, "the next primary knows them by their tickets: {resumed} resumed, {full} in full");
        if fault == Signal::SIGSTOP {
            site.cluster.signal(primary, Signal::SIGCONT);
        }
        site.cluster.wait_healthy();
    }
    let made = changes.end();
    site.wait_until("all have told everything", &agents, |agent| site.files(agent).len() >= made);
    let expected: BTreeMap<usize, usize> = (1..=made).map(|number| (number, 1)).collect();
    for agent in &agents {
        let events = site.events(agent, true);
        let mut numbers: Vec<u64> = events.iter().map(|event| event["sequence"].as_u64().unwrap()).collect();
        numbers.reverse();
        assert!(numbers.iter().copied().eq(1..=events.len() as u64), "a number is missing or comes twice: {numbers:?}");
        assert!(site.files(agent) == expected, "{made} files: {:?}", site.files(agent));
    }
    let told = agents.iter().map(|agent| site.events(agent, true).len()).sum::<usize>();
    println!(
        "{} primaries lost, as many Defenders killed: {made} files, {told} events, each exactly once",
        FAULTS.len()
    );
    let stored = crowd.verify(&site.desk()).unwrap();
    assert_eq!(stored, CROWD as u64 * EVENTS * 2 * FAULTS.len() as u64);
    println!("{stored} events of {CROWD} more Defenders, each exactly once");
    is_withdrawn(&site, &agents);
    drop((agents, crowd));
    println!("{}", site.cluster.finish(&[LEASE_LOST, FROZEN].concat()));
}

/// One of them is withdrawn: the others go on, and it is heard no more.
fn is_withdrawn(site: &Site, agents: &[Agent; 3]) {
    let [one, others @ ..] = agents;
    site.call("DELETE", &format!("/defenders/{}", one.id), None);
    let before = site.events(one, true).len();
    make(&site.path("staging"), &site.path("watched"), 999_999);
    site.wait_until("the others tell it", others, |agent| site.newest(agent) == 999_999);
    site.wait_until("it is told why it ends", &agents[..1], |agent| agent.log().contains("this Defender is withdrawn"));
    assert_eq!(site.events(one, true).len(), before);
}
