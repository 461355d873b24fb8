//! A cluster of real daemons under `twistlockd dev`, and the means to harm it. Must never know what a test wants to show.

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    thread,
    time::{Duration, Instant},
};

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
/// Log lines above INFO that belong to the faults that the tests inject, by a part of their text.
const EXPECTED_LINES: &[&str] = &[];

/// Ports of the clusters: each cluster of this process gets its own, below the ephemeral ones.
static NEXT_OFFSET: AtomicU16 = AtomicU16::new(4000);

/// A running cluster. Stopped in an orderly way when dropped.
pub struct Cluster {
    dev: Child,
    folder: TempDir,
    pub port_offset: u16,
}

impl Cluster {
    /// Starts a new cluster and waits until all three members are in their places.
    pub fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("tw").tempdir().unwrap();
        let port_offset = NEXT_OFFSET.fetch_add(10, Ordering::Relaxed);
        let dev = Command::new(env!("CARGO_BIN_EXE_twistlockd"))
            .args(["dev", "--restart-after", RESTART_AFTER, "--port-offset", &port_offset.to_string(), "--dir"])
            .arg(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut cluster = Self { dev, folder, port_offset };
        cluster.wait_ready();
        cluster.wait_healthy();
        cluster
    }

    /// Reads what dev says until it is ready, and goes on reading it for nobody.
    fn wait_ready(&mut self) {
        use std::io::{BufRead, BufReader};
        let mut lines = BufReader::new(self.dev.stdout.take().unwrap()).lines();
        let ready = lines.by_ref().map_while(Result::ok).any(|line| line.contains("The cluster is ready"));
        assert!(ready, "the dev cluster ended before it was ready (see its message above)");
        thread::spawn(move || lines.map_while(Result::ok).for_each(|line| println!("  dev: {line}")));
    }

    /// The current `cluster.json`.
    pub fn file(&self) -> ClusterFile {
        read_cluster(self.folder.path()).unwrap()
    }

    /// The position of a node in `cluster.json`, by its status.
    pub fn node(&self, index: usize) -> NodeFile {
        self.file().nodes[index].clone()
    }

    /// What each node says about itself; none for one that does not answer.
    pub fn statuses(&self) -> Vec<Option<Status>> {
        let ask = |node: &NodeFile| control::status(&node.control, Duration::from_millis(500)).ok();
        self.file().nodes.iter().map(ask).collect()
    }

    /// Waits for a condition; the test fails with the last picture of the cluster if it does not come.
    pub fn wait_for(&self, what: &str, condition: impl Fn(&[Option<Status>]) -> bool) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let statuses = self.statuses();
            if condition(&statuses) {
                return;
            }
            if Instant::now() > deadline {
                self.show_logs();
                panic!("{what}: not within {} s; the nodes say {:#?}", LIMIT.as_secs(), summary(&statuses));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until one node is PRIMARY, the others are SECONDARY under it, and all have applied the same.
    pub fn wait_healthy(&self) {
        self.wait_for("one PRIMARY and two SECONDARY", |statuses| {
            let known: Vec<&Status> = statuses.iter().flatten().collect();
            let count = |role| known.iter().filter(|status| status.role == role).count();
            let one = |value: fn(&Status) -> u64| known.iter().all(|status| value(status) == value(known[0]));
            known.len() == 3
                && (count(Role::Primary), count(Role::Secondary)) == (1, 2)
                && one(|status| status.epoch)
                && one(|status| status.primary.unwrap_or(0))
        });
    }

    /// Waits until all three have applied the same index. Only without writers.
    pub fn wait_level(&self) {
        self.wait_for("the same applied index everywhere", |statuses| {
            let known: Vec<u64> = statuses.iter().flatten().map(|status| status.applied).collect();
            known.len() == 3 && known.iter().all(|index| *index == known[0])
        });
    }

    /// The position of the node that is PRIMARY.
    pub fn primary(&self) -> usize {
        self.wait_for("a PRIMARY", |statuses| position(statuses, Role::Primary).is_some());
        position(&self.statuses(), Role::Primary).expect("it was there a moment ago")
    }

    /// Sends a signal to a node's daemon. Its pid must be known, that is, it must run.
    pub fn signal(&self, index: usize, signal: Signal) {
        let pid = self.node(index).pid.expect("the node runs");
        kill(Pid::from_raw(pid as i32), signal).unwrap();
    }

    /// Fails the test if a daemon logged anything above INFO that is not expected.
    pub fn check_logs(&self, also_expected: &[&str]) {
        let expected = |line: &str| EXPECTED_LINES.iter().chain(also_expected).any(|part| line.contains(part));
        let mut odd = String::new();
        for (name, line) in self.log_lines() {
            let serious = ["WARN", "ERROR", "panicked"].iter().any(|level| line.contains(level));
            if serious && !expected(&line) {
                odd.push_str(&format!("  {name}: {line}\n"));
            }
        }
        assert!(odd.is_empty(), "unexpected log lines:\n{odd}");
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
        let _ = kill(Pid::from_raw(self.dev.id() as i32), Signal::SIGTERM);
        let _ = self.dev.wait();
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
