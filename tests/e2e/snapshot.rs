//! A member that was away for longer than the raft log is kept gets the whole database, whoever dies on the way.

use std::{
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use twistlock_ha::{cluster::Role, node::Status};

use super::{
    WRITERS, alone,
    cluster::{Cluster, FROZEN, LEASE_LOST, LIMIT},
    damage::MENDED,
    databases::checkpointed,
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
    "the raft log of the primary no longer has the entries that this node needs",
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
    cluster.configure("RAFT_LOG_LIMIT_MB", "64");
    cluster.restart_all();
    let writers = Writers::start_long(&cluster.file(), WRITERS, LONG);
    let away = (cluster.primary() + 1) % 3;
    cluster.freeze(away);
    // Both: either may be primary when it comes back.
    let let_go = |node| cluster.log(node).contains(EXPECTED[0]);
    cluster.wait_for("a raft log beyond its limit", |_| (0..3).filter(|node| *node != away).all(let_go));
    wait_size(&cluster, mebibytes("SNAPSHOT_MIB", 0) << 20);
    (cluster, writers, away)
}

/// How long a database of so many bytes may be on its way: a slow disk that others use as well takes 8 MiB a second.
fn limit(bytes: u64) -> Duration {
    LIMIT + Duration::from_secs(bytes >> 23)
}

fn database(cluster: &Cluster, node: usize) -> PathBuf {
    cluster.node(node).data.join("database/console.db")
}

/// Waits until the primary's database has so many bytes: for measurements, `SNAPSHOT_MIB`.
fn wait_size(cluster: &Cluster, wanted: u64) {
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

/// The last snapshot that a node has fetched, by its log: bytes of the database, those that were not sent, milliseconds.
fn fetched(cluster: &Cluster, node: usize) -> [u64; 3] {
    let log = cluster.log(node);
    let line = log.lines().rfind(|line| line.contains("the whole database has been fetched")).expect("it was fetched");
    ["bytes=", "unchanged=", "ms="].map(|key| {
        let text = line.split_whitespace().find_map(|word| word.strip_prefix(key)).expect("the line has it");
        text.parse().expect("a number")
    })
}

/// Says how long the snapshot took, beside a copy on the same disk.
fn report(cluster: &Cluster, node: usize) {
    let [bytes, unchanged, ms] = fetched(cluster, node);
    let (ms, copy) = (ms as f64, copy(cluster, node).as_secs_f64() * 1e3);
    println!(
        "snapshot: {} MiB in {ms:.0} ms, {} MiB of it were there, dd and fsync {copy:.0} ms, ratio {:.2}",
        bytes >> 20,
        unchanged >> 20,
        ms / copy
    );
}

/// Has a member miss a hundredth of the database and lose what it knows of its own copy: it is sent what it lacks, and
/// little more.
fn miss_a_hundredth(cluster: &Cluster, writers: &mut Writers, away: usize) {
    let size = || std::fs::metadata(database(cluster, cluster.primary())).unwrap().len();
    cluster.freeze(away);
    let before = size();
    wait_size(cluster, before + before.div_ceil(100));
    writers.stop();
    let (record, earlier) = (database(cluster, away).with_extension("checkpoint"), installed(cluster, away));
    cluster.without_restarts(|| {
        cluster.signal(away, Signal::SIGKILL);
        std::fs::write(record, "").unwrap();
    });
    cluster.wait_within(limit(before), "the installation of what was missing", |_| installed(cluster, away) > earlier);
    cluster.wait_healthy();
    let [bytes, unchanged, ms] = fetched(cluster, away);
    // A tag of 8 bytes for each page that it had.
    let (sent, tags) = (bytes - unchanged, before / 4096 * 8);
    println!(
        "difference: {} MiB, which grew by {} KiB while a member was away; it was sent {} KiB and said {} KiB in {ms} ms: \
         {:.2} % of the database",
        bytes >> 20,
        (size() - before) >> 10,
        sent >> 10,
        tags >> 10,
        (sent + tags) as f64 * 100.0 / bytes as f64
    );
    // What is written until the writers have stopped is much of a small database.
    let most = if bytes >= 1 << 30 { 3 } else { 50 };
    assert!((sent + tags) * 100 <= bytes * most, "{} of {bytes} bytes", sent + tags);
}

fn installed(cluster: &Cluster, node: usize) -> usize {
    cluster.log(node).matches(INSTALLED).count()
}

/// Waits until the member has the database, the cluster is healthy, and nothing of snapshots is left over.
fn finish(cluster: Cluster, writers: Writers, away: usize, expected: &[&[&str]]) {
    cluster.wait_for("the installation of a snapshot", |_| installed(&cluster, away) > 0);
    cluster.wait_healthy();
    let written = writers.verify();
    // A PRIMARY that stops does not wait until it has applied what came behind its checkpoint: its next start does that.
    cluster.wait_for("a checkpoint of the PRIMARY that has everything", |statuses| {
        let primary = statuses.iter().flatten().find(|status| status.role == Role::Primary);
        primary.is_some_and(|status| {
            cluster.file().nodes.iter().any(|node| node.name == status.name && checkpointed(node) >= status.committed)
        })
    });
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
fn timed_a_member_beyond_the_raft_log_gets_the_whole_database() {
    let _alone = alone();
    let (cluster, mut writers, away) = behind();
    let pid = cluster.node(away).pid;
    cluster.signal(away, Signal::SIGCONT);
    let start = Instant::now();
    let size = std::fs::metadata(database(&cluster, cluster.primary())).unwrap().len();
    cluster.wait_within(limit(size), "the installation of a snapshot", |_| installed(&cluster, away) > 0);
    cluster.wait_healthy();
    println!("snapshot: back after {} ms", start.elapsed().as_millis());
    assert_eq!(cluster.node(away).pid, pid, "it begins again as the same process");
    assert!(writers.wait_success(Instant::now(), |_| true).is_some());
    report(&cluster, away);
    assert_eq!(installed(&cluster, away), 1, "one snapshot is enough");
    miss_a_hundredth(&cluster, &mut writers, away);
    finish(cluster, writers, away, &[MENDED]);
}

/// A number of MiB that a measurement may set.
fn mebibytes(name: &str, usual: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// Sizes in bytes, and how many segments the raft log has had.
#[derive(Clone, Copy, Debug, Default)]
struct Sizes {
    raft_log: u64,
    wal: u64,
    segments: u64,
}

impl Sizes {
    fn of(data: &Path) -> Self {
        let names = std::fs::read_dir(data.join("raft-log")).unwrap().map(|entry| entry.unwrap().path());
        let files: Vec<_> = names.filter_map(|path| Some((std::fs::metadata(&path).ok()?.len(), path))).collect();
        let number = |path: &Path| u64::from_str_radix(path.file_name()?.to_str()?.strip_prefix("segment-")?, 16).ok();
        let wal = std::fs::metadata(data.join("database/console.db-wal")).map_or(0, |file| file.len());
        let segments = files.iter().filter_map(|(_, path)| number(path)).max().unwrap_or(0);
        Self { raft_log: files.iter().map(|(length, _)| length).sum(), wal, segments }
    }

    fn max(self, other: Self) -> Self {
        let (raft_log, wal) = (self.raft_log.max(other.raft_log), self.wal.max(other.wal));
        Self { raft_log, wal, segments: self.segments.max(other.segments) }
    }
}

/// Looks at the sizes on some nodes until the condition holds; returns the largest of them.
fn sample_sizes(cluster: &Cluster, nodes: &[usize], over: impl Fn(Sizes) -> bool) -> Sizes {
    let folders: Vec<PathBuf> = nodes.iter().map(|node| cluster.node(*node).data).collect();
    let (mut largest, deadline) = (Sizes::default(), Instant::now() + FILL);
    while !over(largest) {
        assert!(Instant::now() < deadline, "it does not come to an end: {largest:?}");
        largest = folders.iter().map(|folder| Sizes::of(folder)).fold(largest, Sizes::max);
        thread::sleep(Duration::from_millis(100));
    }
    largest
}

/// Many times what is kept of the raft log is written while a member is away; `scripts/bench/absent.sh` writes 2 GiB.
#[test]
fn timed_the_raft_log_and_the_wal_stay_within_bounds_while_a_member_is_away() {
    const CHECKPOINT: u64 = 16;
    // What `storage::database` lets the file grow to before writers wait; it is cut back to half of that.
    const WAL: u64 = 128;
    let _alone = alone();
    let (total, limit, segment) = (mebibytes("ABSENT_MIB", 160), mebibytes("ABSENT_LIMIT_MIB", 64), 4);
    let cluster = Cluster::start();
    cluster.configure("RAFT_LOG_SEGMENT_MB", &segment.to_string());
    cluster.configure("RAFT_LOG_LIMIT_MB", &limit.to_string());
    // The size of the -wal calls for most checkpoints long before that.
    cluster.configure("CHECKPOINT_SECONDS", "15");
    cluster.restart_all();
    let writers = Writers::start_long(&cluster.file(), WRITERS, LONG);
    let away = (cluster.primary() + 1) % 3;
    let others: Vec<usize> = (0..3).filter(|node| *node != away).collect();
    let before = sample_sizes(&cluster, &others, |sizes| sizes.segments > 0).segments;
    cluster.freeze(away);
    let begin = Instant::now();
    let meanwhile = sample_sizes(&cluster, &others, |sizes| sizes.segments.saturating_sub(before) * segment >= total);
    let written = begin.elapsed();
    let let_go = others.iter().all(|node| cluster.log(*node).contains(EXPECTED[0]));
    assert!(let_go, "{total} MiB are too few for a limit of {limit} MiB");
    let back = Instant::now();
    cluster.signal(away, Signal::SIGCONT);
    let returned = || installed(&cluster, away) > 0 && cluster.statuses()[away].as_ref().is_some_and(is_level);
    let returning = sample_sizes(&cluster, &others, |_| returned());
    let secondary = back.elapsed();
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    println!(
        "absent: {total} MiB of transactions in {:.0} s with one member away; raft log at most {} MiB (limit {limit}), -wal \
         at most {} MiB (checkpoint at {CHECKPOINT}, limit {WAL}); SECONDARY again under load after {:.1} s, database {} MiB, raft log \
         then at most {} MiB, -wal {} MiB",
        written.as_secs_f64(),
        mib(meanwhile.raft_log),
        mib(meanwhile.wal),
        secondary.as_secs_f64(),
        mib(std::fs::metadata(database(&cluster, cluster.primary())).unwrap().len()),
        mib(returning.raft_log),
        mib(returning.wal),
    );
    // Beyond the limit: what comes until the next checkpoint, the entries that are always kept, and files made ahead.
    let bound = limit + 4 * CHECKPOINT + 8 * segment;
    assert!(mib(meanwhile.raft_log) <= bound, "the raft log had {} MiB", mib(meanwhile.raft_log));
    assert!(mib(meanwhile.wal) <= WAL, "the -wal file had {} MiB", mib(meanwhile.wal));
    finish(cluster, writers, away, &[]);
}

fn is_level(status: &Status) -> bool {
    status.role == Role::Secondary && status.committed - status.applied < 1000
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
fn timed_the_receiver_dies_while_it_fetches() {
    let _alone = alone();
    let (cluster, writers, away) = behind();
    cluster.signal(away, Signal::SIGCONT);
    assert!(wait_frozen_while_fetching(&cluster, away), "the snapshot was there before anybody could die");
    cluster.signal(away, Signal::SIGKILL);
    finish(cluster, writers, away, &[BROKEN_OFF]);
}

#[test]
fn timed_the_sender_dies_while_it_sends() {
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
