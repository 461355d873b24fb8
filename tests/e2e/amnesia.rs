//! A member loses some of its durable memory, or gets an older copy of it: it never counts before it is whole again, nothing
//! that was acknowledged is lost, and nobody has to do anything. `docs/memory.md` says who finds out what.

use std::{
    fs::{self, DirBuilder, File},
    os::unix::fs::{DirBuilderExt, FileExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use twistlock_ha::{cluster::Role, node::Status};

use super::{
    alone, beside,
    cluster::{Cluster, FROZEN, LEASE_LOST},
    disk::{in_private_mounts, run},
    sampler::Sampler,
    writers::{Pen, Writers},
};

/// What the members say of a loss.
pub const EXPECTED: &[&str] = &[
    "this node lost some of its durable memory",
    "lost some of its durable memory: it gets its vote back",
    "the raft log that was not whole is kept there",
    "lost some of its durable memory, as node",
    "the whole database could not be",
    "refused to send the whole database to this node",
    "it was rebuilt from this host's certificate and the membership",
];
/// The sentence with which a member ends its loss.
pub const AGAIN: &str = "this node begins again behind the snapshot";

fn times(cluster: &Cluster, node: usize, sentence: &str) -> usize {
    cluster.log(node).matches(sentence).count()
}

/// Kills a member and waits until its process is gone. Dev starts it again after a while.
fn kill(cluster: &Cluster, node: usize) {
    let proc = PathBuf::from(format!("/proc/{}", cluster.node(node).pid.expect("it runs")));
    cluster.signal(node, Signal::SIGKILL);
    cluster.wait_for("the end of the process", |_| !proc.exists() || is_zombie(&proc));
}

fn is_zombie(proc: &Path) -> bool {
    fs::read_to_string(proc.join("stat")).map_or(true, |stat| stat.contains(") Z "))
}

fn copy(from: &Path, to: &Path) {
    let done = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(done.success(), "copy {} to {}", from.display(), to.display());
}

/// The segments of the raft log that are in use or have been, oldest first.
fn segments(data: &Path) -> Vec<PathBuf> {
    let names = fs::read_dir(data.join("raft-log")).unwrap().map(|entry| entry.unwrap().path());
    let mut segments: Vec<_> =
        names.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("segment-")).collect();
    segments.sort();
    segments
}

/// The last segment with records, and where these end.
fn end_of_log(data: &Path) -> (PathBuf, usize) {
    let used = |path: &PathBuf| fs::read(path).unwrap().iter().rposition(|byte| *byte != 0).unwrap_or(0);
    let segment = segments(data).into_iter().rfind(|path| used(path) > 200).expect("a segment with records");
    let end = used(&segment);
    (segment, end)
}

/// Takes the last records away, as if they had never been written: zeros follow the end of the log.
fn blank_end(data: &Path, bytes: usize) {
    let (segment, end) = end_of_log(data);
    let begin = end.saturating_sub(bytes).max(4096);
    let file = File::options().write(true).open(&segment).unwrap();
    file.write_all_at(&vec![0; end + 1 - begin], begin as u64).unwrap();
}

/// Turns a bit of the last segment that has records; `place` is given the length of what is written there. It is in the first
/// byte from there on that is not zero: what fills a record up to its length is zero, says nothing, and has no checksum.
fn flip(data: &Path, place: impl Fn(usize) -> usize) {
    let (segment, end) = end_of_log(data);
    let bytes = fs::read(&segment).unwrap();
    let at = (place(end)..=end).find(|at| bytes[*at] != 0).expect("the last byte is not zero");
    let file = File::options().write(true).open(&segment).unwrap();
    file.write_all_at(&[bytes[at] ^ 0x20], at as u64).unwrap();
}

/// The member is SECONDARY with a vote, and says that it has begun again once more.
fn wait_restored(cluster: &Cluster, node: usize, before: usize) {
    cluster.wait_for("the member to begin again", |_| times(cluster, node, AGAIN) > before);
    cluster.wait_healthy();
    let votes = |status: &Status| status.members.iter().all(|member| member.voter);
    cluster.wait_for("three votes", |statuses| statuses.iter().flatten().all(votes));
}

/// One way to lose memory: what is done to the data folder of a stopped member, and whether it needs to be restored; none
/// where that depends on what was there.
type Harm = (&'static str, fn(&Path, &Path), Option<bool>);

const HARMS: [Harm; 13] = [
    ("raft log removed", |data, _| fs::remove_dir_all(data.join("raft-log")).unwrap(), Some(true)),
    (
        "raft log emptied",
        |data, _| {
            fs::remove_dir_all(data.join("raft-log")).unwrap();
            DirBuilder::new().mode(0o700).create(data.join("raft-log")).unwrap();
        },
        Some(true),
    ),
    (
        "raft log and all that tells of it removed",
        |data, _| {
            fs::remove_dir_all(data.join("raft-log")).unwrap();
            let others = ["raft-log.created", "memory.json", "membership.json", "membership.json.copy"];
            others.iter().for_each(|name| drop(fs::remove_file(data.join(name))));
        },
        Some(true),
    ),
    ("oldest segment removed", |data, _| fs::remove_file(&segments(data)[0]).unwrap(), Some(true)),
    ("byte in the middle turned", |data, _| flip(data, |length| length / 2), Some(true)),
    // Nothing in the log itself proves that it was longer: what is gone was acknowledged, and somebody must remember that.
    ("end of the raft log gone", |data, _| blank_end(data, 3000), Some(true)),
    // The last record may say no more than what is committed, and to lose that is no loss.
    ("byte at the end turned", |data, _| flip(data, |length| length - 30), None),
    (
        "older copy of the raft log",
        |data, old| {
            fs::remove_dir_all(data.join("raft-log")).unwrap();
            copy(&old.join("raft-log"), &data.join("raft-log"));
        },
        Some(true),
    ),
    (
        "older copy of everything",
        |data, old| {
            fs::remove_dir_all(data).unwrap();
            copy(old, data);
        },
        Some(true),
    ),
    ("marker removed", |data, _| fs::remove_file(data.join("raft-log.created")).unwrap(), Some(false)),
    (
        "raft log behind a link, oldest segment removed",
        |data, _| {
            let elsewhere = data.with_file_name("raft-log-elsewhere");
            fs::rename(data.join("raft-log"), &elsewhere).unwrap();
            symlink(&elsewhere, data.join("raft-log")).unwrap();
            fs::remove_file(&segments(data)[0]).unwrap();
        },
        Some(true),
    ),
    (
        "raft log on a file system of its own, oldest segment removed",
        |data, _| {
            let (log, before) = (data.join("raft-log"), data.with_file_name("raft-log-before"));
            fs::rename(&log, &before).unwrap();
            DirBuilder::new().mode(0o700).create(&log).unwrap();
            run("mount", &["-t", "tmpfs", "-o", "size=400m,mode=700", "tmpfs", log.to_str().unwrap()]);
            copy(&before.join("."), &log);
            fs::remove_dir_all(&before).unwrap(); // what is mounted keeps the folder of the test from being deleted
            fs::remove_file(&segments(data)[0]).unwrap();
        },
        Some(true),
    ),
    (
        "identity and raft log removed",
        |data, _| {
            fs::remove_file(data.join("identity.json")).unwrap();
            fs::remove_dir_all(data.join("raft-log")).unwrap();
        },
        Some(true),
    ),
];

#[test]
fn a_member_that_forgot_is_whole_again_by_itself() {
    let _beside = beside();
    in_private_mounts(lose_in_every_way);
}

fn lose_in_every_way() {
    let cluster = Cluster::start_with("2", |_| {});
    let sampler = Sampler::start(cluster.port_offset);
    let (pen, copies) = (Pen::new(&cluster.file()), tempfile::tempdir().unwrap());
    let mut written = Vec::new();
    for (number, (what, harm, restored)) in HARMS.iter().enumerate() {
        let primary = cluster.primary();
        let node = (primary + 1 + number % 2) % 3;
        let (data, old) = (cluster.node(node).data, copies.path().join(number.to_string()));
        kill(&cluster, node);
        copy(&data, &old);
        cluster.wait_healthy();
        // Some may be too slow on a busy host.
        let tags = (0..200).map(|tag| format!("amnesia-{number}-{tag}"));
        let acknowledged: Vec<_> = tags.filter(|tag| pen.write(cluster.primary(), tag)).take(20).collect();
        assert_eq!(acknowledged.len(), 20, "{what}: the cluster writes");
        written.extend(acknowledged);
        let before = times(&cluster, node, AGAIN);
        cluster.without_restarts(|| {
            kill(&cluster, node);
            harm(&data, &old);
        });
        let start = Instant::now();
        if *restored == Some(true) {
            wait_restored(&cluster, node, before);
        } else {
            cluster.wait_healthy();
            let again = times(&cluster, node, AGAIN) > before;
            assert!(!again || restored.is_none(), "{what} is no loss");
        }
        println!("  {what}: SECONDARY with a vote {} ms after the loss", start.elapsed().as_millis());
        let lost: Vec<_> = written.iter().filter(|tag| !pen.has(tag)).collect();
        assert!(lost.is_empty(), "{what}: {lost:?}");
    }
    let sampled = sampler.verify();
    let kept = fs::read_dir(cluster.node(0).data.join("set-aside")).map_or(0, Iterator::count);
    assert!(kept <= 3, "{kept} raft logs are kept");
    println!("  {sampled}\n  {}", cluster.finish(&[EXPECTED, LEASE_LOST, FROZEN].concat()));
}

/// B is frozen, P and S acknowledge, S loses its raft log, P dies, B goes on: S must not elect B.
#[test]
fn timed_a_member_that_lost_its_raft_log_elects_nobody() {
    let _alone = alone();
    let cluster = Cluster::start_with("2", |_| {});
    let sampler = Sampler::start(cluster.port_offset);
    let writers = Writers::start(&cluster.file(), 4);
    let primary = cluster.primary();
    let (behind, forgets) = ((primary + 1) % 3, (primary + 2) % 3);
    cluster.freeze(behind);
    let frozen = Instant::now();
    assert!(writers.wait_success(frozen + Duration::from_millis(500), |_| true).is_some(), "two of three write");
    let starts = times(&cluster, forgets, "node runs");
    kill(&cluster, forgets);
    fs::remove_dir_all(cluster.node(forgets).data.join("raft-log")).unwrap();
    cluster.wait_for("its start", |_| times(&cluster, forgets, "node runs") > starts);
    kill(&cluster, forgets);
    cluster.wait_for("another start", |_| times(&cluster, forgets, "node runs") > starts + 1);
    cluster.wait_for("RECOVERING", |statuses| {
        statuses[forgets].as_ref().is_some_and(|status| status.role == Role::Recovering)
    });
    let epoch = cluster.statuses()[primary].as_ref().map_or(0, |status| status.epoch);
    kill(&cluster, primary);
    cluster.signal(behind, Signal::SIGCONT);
    // Until the killed one is back, the other two must not elect anybody.
    let back = times(&cluster, primary, "node runs");
    cluster.wait_for("the return of the one that was killed", |statuses| {
        let returned = times(&cluster, primary, "node runs") > back;
        let served = statuses.iter().flatten().any(|status| status.role == Role::Primary && status.epoch > epoch);
        assert!(returned || !served, "a member that forgot has elected a primary");
        returned
    });
    let start = Instant::now();
    wait_restored(&cluster, forgets, 0);
    println!("  SECONDARY with a vote {} ms after there was a majority again", start.elapsed().as_millis());
    println!("  {}\n  {}", writers.verify(), sampler.verify());
    println!("  {}", cluster.finish(&[EXPECTED, LEASE_LOST, FROZEN].concat()));
}
