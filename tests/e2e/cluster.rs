//! A cluster of real daemons under `twistlockd dev`, and the means to harm it. Must never know what a test wants to show.

use std::{
    cell::{Cell, RefCell},
    fs::DirEntry,
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::databases;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use twistlock_ha::{
    cluster::Role,
    control,
    dev::{ClusterFile, NodeFile, read_cluster},
    node::Status,
};

/// How long anything that should happen by itself may take before a test fails. Far above what is aimed at: only the report
/// judges speed, so that a busy machine fails no test.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Seconds until a node that was killed is started again: long enough that no takeover can be the old primary's return.
pub const RESTART_AFTER: &str = "1";
/// What a primary says that is frozen or cut off: its lease lapses, and the role goes while transactions wait.
pub const LEASE_LOST: &[&str] = &[
    "the lease lapsed while ports were open; the port guard has closed them",
    "the outcome of waiting transactions is decided by the next primary",
    "database fenced: outcome unknown: the role was lost while a majority was awaited",
];
/// What a former primary says that had transactions no majority had: any loss of a primary under load may leave some.
pub const ROLLED_BACK: &str = "ROLLBACK: the tail of the raft log that no majority had was dropped";
/// What the sampler may cause, which knocks at every port up to a thousand times a second and says nothing.
const SAMPLED: &str = "places for connections are short: silent ones are ended for new ones";
/// What waited in a process while it was frozen.
pub const FROZEN: &[&str] = &[
    "slow statement: execution time exceeded alert threshold",
    "acquired connection, but time to acquire exceeded slow threshold",
];

/// The port of a service before the offset.
const SERVICE_PORT: u16 = 8087;
/// Ports of the clusters: each cluster of this process gets its own, below the ephemeral ones.
static NEXT_OFFSET: AtomicU16 = AtomicU16::new(4000);

/// A running cluster. Stopped in an orderly way when dropped.
pub struct Cluster {
    dev: Child,
    /// Reads what dev says to its end; the lines that tell of a stop that was not orderly.
    listener: Option<JoinHandle<Vec<String>>>,
    folder: TempDir,
    pub port_offset: u16,
    members: usize,
}

impl Cluster {
    /// Starts a new cluster and waits until all members are in their places.
    pub fn start() -> Self {
        Self::start_with(RESTART_AFTER, |_| {})
    }

    /// The same, with nodes that start again after so many seconds when they were killed ("0": never), in a folder that was
    /// prepared.
    pub fn start_with(restart_after: &str, prepare: impl FnOnce(&Path)) -> Self {
        Self::start_under(&[], restart_after, prepare)
    }

    /// The same with more in the environment of all daemons.
    pub fn start_under(environment: &[(&str, &Path)], restart_after: &str, prepare: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::Builder::new().prefix("tw").tempdir().unwrap();
        prepare(folder.path());
        let mut program = Command::new(env!("CARGO_BIN_EXE_twistlockd"));
        program.envs(environment.iter().copied());
        Self::start_in(folder, program, restart_after)
    }

    /// The same with so many members.
    pub fn start_pool(members: usize, restart_after: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("tw").tempdir().unwrap();
        let cluster = Self::begin(folder, Command::new(env!("CARGO_BIN_EXE_twistlockd")), restart_after, members, &[]);
        cluster.wait_healthy();
        cluster
    }

    /// Three nodes with a service beside the Console: its command, and the port at which it listens on 127.0.0.1. Clients
    /// reach it at [`Self::service_port`].
    pub fn start_service(command: &str, inside: u16) -> Self {
        let folder = tempfile::Builder::new().prefix("tw").tempdir().unwrap();
        let program = Command::new(env!("CARGO_BIN_EXE_twistlockd"));
        let pair = |offset: u16| format!("{}:{inside}", SERVICE_PORT + offset);
        let cluster = Self::begin(
            folder,
            program,
            RESTART_AFTER,
            3,
            &[&|offset| vec!["--service".to_owned(), command.to_owned(), "--service-ports".to_owned(), pair(offset)]],
        );
        cluster.wait_healthy();
        cluster
    }

    /// The port at which clients reach the service.
    pub fn service_port(&self) -> u16 {
        SERVICE_PORT + self.port_offset
    }

    /// The same with nodes that may have no more than so many files open.
    pub fn start_limited(files: u32) -> Self {
        let folder = tempfile::Builder::new().prefix("tw").tempdir().unwrap();
        let mut limited = Command::new("sh");
        let (program, files) = (env!("CARGO_BIN_EXE_twistlockd"), files.to_string());
        limited.args(["-c", "ulimit -n \"$1\" && shift && exec \"$@\"", "sh", &files, program]);
        Self::start_in(folder, limited, RESTART_AFTER)
    }

    /// Three nodes that run another program, as soon as it says that they are ready: it may not understand what this one asks.
    pub fn start_other(program: &Path) -> Self {
        let folder = tempfile::Builder::new().prefix("tw").tempdir().unwrap();
        Self::begin(folder, Command::new(program), RESTART_AFTER, 3, &[])
    }

    fn start_in(folder: TempDir, program: Command, restart_after: &str) -> Self {
        let cluster = Self::begin(folder, program, restart_after, 3, &[]);
        cluster.wait_healthy();
        cluster
    }

    /// `more`: further arguments, by the offset of the ports.
    fn begin(
        folder: TempDir,
        mut program: Command,
        restart_after: &str,
        members: usize,
        more: &[&dyn Fn(u16) -> Vec<String>],
    ) -> Self {
        let port_offset = NEXT_OFFSET.fetch_add(10, Ordering::Relaxed);
        program.args(["dev", "--restart-after", restart_after, "--port-offset", &port_offset.to_string()]);
        if members != 3 {
            // An earlier program does not know it.
            program.args(["--members", &members.to_string()]);
        }
        for more in more {
            program.args(more(port_offset));
        }
        let dev = program.arg("--dir").arg(folder.path()).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut cluster = Self { dev, listener: None, folder, port_offset, members };
        cluster.wait_ready();
        cluster
    }

    /// Reads what dev says until it is ready, and goes on reading it.
    fn wait_ready(&mut self) {
        use std::io::{BufRead, BufReader};
        let mut lines = BufReader::new(self.dev.stdout.take().unwrap()).lines();
        let ready = lines.by_ref().map_while(Result::ok).any(|line| line.contains("The cluster is ready"));
        assert!(ready, "the dev cluster ended before it was ready (see its message above)");
        let tell = |line: &String| println!("  dev: {line}");
        let odd = |line: &String| line.contains("did not stop in an orderly way");
        let listen = move || lines.map_while(Result::ok).inspect(tell).filter(odd).collect();
        self.listener = Some(thread::spawn(listen));
    }

    /// The current `cluster.json`.
    pub fn file(&self) -> ClusterFile {
        read_cluster(self.folder.path()).unwrap()
    }

    /// The position of a node in `cluster.json`, by its status.
    pub fn node(&self, index: usize) -> NodeFile {
        self.file().nodes[index].clone()
    }

    /// Changes a setting of all nodes; they read it when they start again.
    pub fn configure(&self, key: &str, value: &str) {
        for node in self.file().nodes {
            let path = self.folder.path().join(&node.name).join("twistlock.cfg");
            let text = std::fs::read_to_string(&path).unwrap();
            let old = text.lines().find(|line| line.starts_with(&format!("{key}="))).unwrap();
            std::fs::write(&path, text.replace(old, &format!("{key}={value}"))).unwrap();
        }
    }

    /// The configuration file of a node.
    pub fn config_path(&self, index: usize) -> PathBuf {
        self.folder.path().join(self.node(index).name).join("twistlock.cfg")
    }

    /// What a node has logged so far.
    pub fn log(&self, index: usize) -> String {
        std::fs::read_to_string(self.log_path(&self.node(index).name)).unwrap()
    }

    /// Kills all of them at once and waits until dev has started them again and they are in their places.
    pub fn restart_all(&self) {
        let before: Vec<Option<u32>> = self.file().nodes.iter().map(|node| node.pid).collect();
        (0..self.members).for_each(|node| self.signal(node, Signal::SIGKILL));
        self.wait_for("a new process of each", |_| {
            self.file().nodes.iter().zip(&before).all(|(node, old)| node.pid.is_some() && node.pid != *old)
        });
        self.wait_healthy();
    }

    /// What each node says about itself; none for one that does not answer.
    pub fn statuses(&self) -> Vec<Option<Status>> {
        let ask = |node: &NodeFile| control::status(&node.control, Duration::from_millis(500)).ok();
        self.file().nodes.iter().map(ask).collect()
    }

    /// What each node says about itself, once all of them answer.
    pub fn all_statuses(&self) -> Vec<Status> {
        let all = RefCell::new(Vec::new());
        self.wait_for("an answer of each", |statuses| {
            all.replace(statuses.iter().flatten().cloned().collect::<Vec<_>>());
            all.borrow().len() == self.members
        });
        all.into_inner()
    }

    /// What a node says about itself, once it answers.
    pub fn status(&self, index: usize) -> Status {
        let status = RefCell::new(None);
        self.wait_for("an answer of the node", |statuses| {
            status.replace(statuses[index].clone());
            status.borrow().is_some()
        });
        status.into_inner().expect("it was waited for")
    }

    /// Waits for a condition; the test fails with the last picture of the cluster if it does not come.
    pub fn wait_for(&self, what: &str, condition: impl Fn(&[Option<Status>]) -> bool) {
        self.wait_within(LIMIT, what, condition);
    }

    /// The same with another limit, for what takes longer the more there is of it.
    pub fn wait_within(&self, limit: Duration, what: &str, condition: impl Fn(&[Option<Status>]) -> bool) {
        let deadline = Instant::now() + limit;
        loop {
            let statuses = self.statuses();
            if condition(&statuses) {
                return;
            }
            if Instant::now() > deadline {
                self.show_logs();
                panic!("{what}: not within {} s; the nodes say {:#?}", limit.as_secs(), summary(&statuses));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until one node is PRIMARY and serves, and the others are SECONDARY under it.
    pub fn wait_healthy(&self) {
        self.wait_for("one PRIMARY, and all others SECONDARY", |statuses| {
            let known: Vec<&Status> = statuses.iter().flatten().collect();
            let count = |role| known.iter().filter(|status| status.role == role).count();
            let one = |value: fn(&Status) -> u64| known.iter().all(|status| value(status) == value(known[0]));
            known.len() == self.members
                && (count(Role::Primary), count(Role::Secondary)) == (1, self.members - 1)
                && one(|status| status.epoch)
                && one(|status| status.primary.unwrap_or(0))
                && self.serving(statuses).is_some()
        });
    }

    /// Waits until all have applied everything that is committed. Only without writers.
    fn wait_level(&self) {
        // A picture may be half a second old: it counts when it is the same for more than twice that.
        let last = Cell::new((0, Instant::now()));
        self.wait_for("the same applied index everywhere", |statuses| {
            let known: Vec<&Status> = statuses.iter().flatten().collect();
            let committed = known.iter().map(|status| status.committed).max().unwrap_or(0);
            let level = known.len() == self.members && known.iter().all(|status| status.applied == committed);
            if !level || last.get().0 != committed {
                last.set((committed, Instant::now()));
            }
            level && last.get().1.elapsed() > Duration::from_millis(1100)
        });
    }

    /// Waits until a node is PRIMARY and serves, and returns its position.
    pub fn primary(&self) -> usize {
        let found = Cell::new(None);
        self.wait_for("a PRIMARY", |statuses| {
            found.set(self.serving(statuses));
            found.get().is_some()
        });
        found.get().expect("it was waited for")
    }

    /// The node that says that it is PRIMARY, if its Console takes connections: its ports open a moment after the role came.
    fn serving(&self, statuses: &[Option<Status>]) -> Option<usize> {
        let primary = position(statuses, Role::Primary)?;
        let address = self.node(primary).console_url.trim_start_matches("https://").parse().expect("an address");
        TcpStream::connect_timeout(&address, Duration::from_millis(500)).ok().map(|_| primary)
    }

    /// Does something while dev starts no node again: a harmed file is found as it is then.
    pub fn without_restarts(&self, harm: impl FnOnce()) {
        let dev = Pid::from_raw(self.dev.id() as i32);
        kill(dev, Signal::SIGSTOP).unwrap();
        harm();
        kill(dev, Signal::SIGCONT).unwrap();
    }

    /// Sends a signal to a node's daemon. Its pid must be known, that is, it must run.
    pub fn signal(&self, index: usize, signal: Signal) {
        let pid = self.node(index).pid.expect("the node runs");
        kill(Pid::from_raw(pid as i32), signal).unwrap();
    }

    /// Freezes a node's daemon, and returns when none of its threads runs any more.
    pub fn freeze(&self, index: usize) {
        self.signal(index, Signal::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.node(index).pid.expect("it was there a moment ago"));
        let stopped = |task: std::io::Result<DirEntry>| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat"));
            // The state follows the name in parentheses. A thread that is gone does not run.
            stat.ok().is_none_or(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['T', 't'])))
        };
        let deadline = Instant::now() + LIMIT;
        while !std::fs::read_dir(&tasks).unwrap().all(stopped) {
            assert!(Instant::now() < deadline, "SIGSTOP does not stop it");
            thread::yield_now();
        }
    }

    /// Fails the test if a daemon logged anything above INFO that is not expected: by a part of its text.
    fn check_logs(&self, expected: &[&str]) {
        let mut odd = String::new();
        for (name, line) in self.log_lines() {
            let levels = ["WARN", "ERROR", "panicked"];
            let serious = levels.iter().any(|level| line.contains(level)) || line.starts_with("port guard:");
            let always = [ROLLED_BACK, SAMPLED].iter().any(|part| line.contains(part));
            if serious && !always && !expected.iter().any(|part| line.contains(part)) {
                odd.push_str(&format!("  {name}: {line}\n"));
            }
        }
        assert!(odd.is_empty(), "unexpected log lines:\n{odd}");
    }

    /// Ends a test: fails it if the logs say anything above INFO beyond what is `expected`, or if the databases
    /// differ after an orderly stop. Nobody may write any more. Returns a line for the report.
    pub fn finish(mut self, expected: &[&str]) -> String {
        self.wait_healthy();
        self.wait_level();
        self.check_logs(expected);
        self.stop();
        let disorderly = self.listener.take().map(|listener| listener.join().unwrap());
        assert_eq!(disorderly, Some(Vec::new()));
        // The last one to be stopped loses its majority, which may cost it its lease.
        self.check_logs(&[expected, LEASE_LOST].concat());
        databases::compare(&self.file().nodes)
    }

    fn stop(&mut self) {
        // Not yet waited for: the number is still that of our child.
        if matches!(self.dev.try_wait(), Ok(None)) {
            let dev = Pid::from_raw(self.dev.id() as i32);
            // The test may have failed while it was held.
            let _ = kill(dev, Signal::SIGTERM).and_then(|()| kill(dev, Signal::SIGCONT));
        }
        let _ = self.dev.wait();
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name).join("log")
    }

    fn log_lines(&self) -> Vec<(String, String)> {
        let read = |node: &NodeFile| {
            let text = std::fs::read(self.log_path(&node.name)).unwrap_or_default();
            let lines: Vec<String> = String::from_utf8_lossy(&text).lines().map(str::to_owned).collect();
            lines.into_iter().map(|line| (node.name.clone(), line)).collect::<Vec<_>>()
        };
        self.file().nodes.iter().flat_map(read).collect()
    }

    /// Prints the ends of the logs: for a test that is about to fail.
    pub fn show_logs(&self) {
        for node in &self.file().nodes {
            let lines: Vec<_> = self.log_lines().into_iter().filter(|(name, _)| *name == node.name).collect();
            println!("--- {} ({} log lines)", node.name, lines.len());
            for (_, line) in &lines[lines.len().saturating_sub(40)..] {
                println!("{line}");
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop();
        if thread::panicking() {
            self.show_logs();
        }
    }
}

fn position(statuses: &[Option<Status>], role: Role) -> Option<usize> {
    statuses.iter().position(|status| status.as_ref().is_some_and(|status| status.role == role))
}

fn summary(statuses: &[Option<Status>]) -> Vec<String> {
    let tell = |status: &Option<Status>| match status {
        Some(s) => format!("{} {} epoch {} applied {}: {}", s.name, s.role, s.epoch, s.applied, s.reason),
        None => "no answer".to_owned(),
    };
    statuses.iter().map(tell).collect()
}
