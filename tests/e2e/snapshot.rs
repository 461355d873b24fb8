//! A member that was away for longer than the raft log is kept gets the whole database, whoever dies on the way.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use twistlock_ha::dev::NodeFile;

use super::{
    WRITERS, alone,
    cluster::{Cluster, FROZEN, LEASE_LOST},
    writers::Writers,
};

/// Characters in the description of each tag: 3 KB, as many as are allowed.
const LONG: usize = 1024;
/// How long the database may take to get the size that a measurement wants.
const FILL: Duration = Duration::from_secs(1800);
/// What a node installs is logged so.
const INSTALLED: &str = "the snapshot has become this node's database";
/// The warnings that belong to it.
const EXPECTED: &[&str] = &[
    "the raft log is too long to be kept for a member that is away",
    "this node lacks entries that the raft log does not have any more",
];
/// What is said when one of the two dies on the way.
const BROKEN_OFF: &[&str] =
    &["the whole database could not be fetched; trying again", "the whole database could not be sent to this node"];

/// A cluster under load in which one SECONDARY has been frozen until the others have let go of what it lacks. It is still
/// frozen.
fn behind() -> (Cluster, Writers, usize) {
    let cluster = Cluster::start();
    cluster.configure("CHECKPOINT_SECONDS", "1");
    cluster.configure("RAFT_LOG_SEGMENT_MB", "4");
    cluster.configure("RAFT_LOG_LIMIT_MB", &log_limit().to_string());
    cluster.restart_all();
    let writers = Writers::start_long(&cluster.file(), WRITERS, LONG);
    let away = (cluster.primary() + 1) % 3;
    let files = Files::watch(&cluster);
    cluster.freeze(away);
    // Both: either may be primary when it comes back.
    let let_go = |node| cluster.log(node).contains(EXPECTED[0]);
    wait_long("a raft log beyond its limit", || (0..3).filter(|node| *node != away).all(let_go));
    wait_size(&cluster);
    files.report();
    (cluster, writers, away)
}

/// `RAFT_LOG_LIMIT_MB` of the nodes: as in the environment, for measurements.
fn log_limit() -> u64 {
    std::env::var("RAFT_LOG_LIMIT_MB").ok().and_then(|text| text.parse().ok()).unwrap_or(64)
}

/// Bytes of the files of a folder whose names end so.
fn bytes_of(folder: &Path, ending: &str) -> u64 {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let files = files.filter(|file| file.file_name().to_string_lossy().ends_with(ending));
    files.filter_map(|file| file.metadata().ok()).map(|file| file.len()).sum()
}

/// Looks at the sizes of the raft logs and `-wal` files again and again.
struct Files {
    stop: Arc<AtomicBool>,
    looking: JoinHandle<(u64, u64)>,
}

impl Files {
    fn watch(cluster: &Cluster) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (asked, nodes) = (stop.clone(), cluster.file().nodes);
        let looking = thread::spawn(move || sample_sizes(&nodes, &asked));
        Self { stop, looking }
    }

    /// Says how long they became, and fails the test if that is too long. The log may pass its limit by what is written until
    /// the next checkpoint has ended and by the segments at its two ends.
    fn report(self) {
        self.stop.store(true, Ordering::Relaxed);
        let (log, wal) = self.looking.join().unwrap();
        println!("files: raft log at most {} MiB (limit {}), -wal at most {} MiB", log >> 20, log_limit(), wal >> 20);
        assert!(log >> 20 <= log_limit() + 128, "the raft log grows beyond its limit");
        assert!(wal >> 20 <= 128, "the -wal file grows beyond its limit");
    }
}

fn sample_sizes(nodes: &[NodeFile], stop: &AtomicBool) -> (u64, u64) {
    let (mut log, mut wal) = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        for node in nodes {
            log = log.max(bytes_of(&node.data.join("raft-log"), ""));
            wal = wal.max(bytes_of(&node.data.join("database"), "-wal"));
        }
        thread::sleep(Duration::from_millis(50));
    }
    (log, wal)
}

fn database(cluster: &Cluster, node: usize) -> PathBuf {
    cluster.node(node).data.join("database/console.db")
}

/// Waits until the database has `SNAPSHOT_MIB`, for measurements; without it any size will do.
fn wait_size(cluster: &Cluster) {
    let wanted = std::env::var("SNAPSHOT_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(0u64) << 20;
    let primary = database(cluster, cluster.primary());
    let (mut before, deadline) = (0, Instant::now() + FILL);
    loop {
        assert!(Instant::now() < deadline, "the database does not grow");
        let size = std::fs::metadata(&primary).unwrap().len();
        if size >= wanted {
            return;
        }
        if size >> 26 > before >> 26 {
            println!("  the database has {} of {} MiB", size >> 20, wanted >> 20);
            before = size;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// How long it takes to copy the database on the same disk and to sync the copy.
fn copy(cluster: &Cluster, node: usize) -> Duration {
    let from = database(cluster, node);
    let to = from.with_extension("copy");
    let start = Instant::now();
    // Through memory, as the snapshot: the file system must not share the blocks.
    let status = Command::new("dd")
        .args(["bs=1M", "conv=fsync", "status=none"])
        .arg(format!("if={}", from.display()))
        .arg(format!("of={}", to.display()))
        .status();
    assert!(status.unwrap().success());
    let time = start.elapsed();
    std::fs::remove_file(to).unwrap();
    time
}

/// Says how long the snapshot took, by the log of the node that has fetched it, beside a copy on the same disk.
fn report(cluster: &Cluster, node: usize) {
    let log = cluster.log(node);
    let line = log.lines().find(|line| line.contains("the whole database has been fetched")).expect("it was fetched");
    let value = |key: &str| -> u64 {
        let text = line.split_whitespace().find_map(|word| word.strip_prefix(key)).expect("the line has it");
        text.parse().expect("a number")
    };
    let (bytes, ms, copy) = (value("bytes="), value("ms=") as f64, copy(cluster, node).as_secs_f64() * 1e3);
    println!("snapshot: {} MiB in {ms:.0} ms, dd and fsync {copy:.0} ms, ratio {:.2}", bytes >> 20, ms / copy);
}

/// Waits for what takes longer than anything else in these tests if a measurement wants a large database.
fn wait_long(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + FILL;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {} s", FILL.as_secs());
        thread::sleep(Duration::from_millis(20));
    }
}

fn installed(cluster: &Cluster, node: usize) -> usize {
    cluster.log(node).matches(INSTALLED).count()
}

/// Waits until the member has the database, the cluster is healthy, and nothing of snapshots is left over.
fn finish(cluster: Cluster, writers: Writers, away: usize, expected: &[&[&str]]) {
    cluster.wait_for("the installation of a snapshot", |_| installed(&cluster, away) > 0);
    cluster.wait_healthy();
    let written = writers.verify();
    for node in cluster.file().nodes {
        let names =
            std::fs::read_dir(&node.data).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let left: Vec<_> = names.filter(|name| name.starts_with("snapshot.")).collect();
        assert!(left.is_empty(), "{}: {left:?}", node.name);
    }
    let expected = [&[EXPECTED, FROZEN][..], expected].concat().concat();
    println!("  {written}\n  {}", cluster.finish(&expected));
}

#[test]
fn a_member_beyond_the_raft_log_gets_the_whole_database() {
    let _alone = alone();
    let (cluster, writers, away) = behind();
    let pid = cluster.node(away).pid;
    cluster.signal(away, Signal::SIGCONT);
    let start = Instant::now();
    wait_long("the installation of a snapshot", || installed(&cluster, away) > 0);
    cluster.wait_healthy();
    println!("snapshot: back after {} ms", start.elapsed().as_millis());
    assert_eq!(cluster.node(away).pid, pid, "it begins again as the same process");
    assert!(writers.wait_success(Instant::now(), |_| true).is_some());
    report(&cluster, away);
    assert_eq!(installed(&cluster, away), 1, "one snapshot is enough");
    finish(cluster, writers, away, &[]);
}

/// Waits until a snapshot is on its way to a node, and freezes the node then. False if it was complete before that.
fn wait_frozen_while_fetching(cluster: &Cluster, node: usize) -> bool {
    let data: PathBuf = cluster.node(node).data;
    let deadline = Instant::now() + super::cluster::LIMIT;
    while !data.join("snapshot.incoming/console.db").exists() {
        assert!(Instant::now() < deadline, "no snapshot arrives");
        thread::sleep(Duration::from_micros(200));
    }
    cluster.freeze(node);
    data.join("snapshot.incoming").exists()
}

#[test]
fn the_receiver_dies_while_it_fetches() {
    let _alone = alone();
    let (cluster, writers, away) = behind();
    cluster.signal(away, Signal::SIGCONT);
    assert!(wait_frozen_while_fetching(&cluster, away), "the snapshot was there before anybody could die");
    cluster.signal(away, Signal::SIGKILL);
    finish(cluster, writers, away, &[BROKEN_OFF]);
}

#[test]
fn the_sender_dies_while_it_sends() {
    let _alone = alone();
    let (cluster, writers, away) = behind();
    let primary = cluster.primary();
    cluster.signal(away, Signal::SIGCONT);
    assert!(wait_frozen_while_fetching(&cluster, away), "the snapshot was there before anybody could die");
    cluster.signal(primary, Signal::SIGKILL);
    cluster.signal(away, Signal::SIGCONT);
    // With the sender gone and this one behind, there is no majority until the sender is back.
    finish(cluster, writers, away, &[BROKEN_OFF, LEASE_LOST]);
}
