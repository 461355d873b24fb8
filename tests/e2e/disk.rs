//! The disk of one node is full: nothing is lost, no process ends, and it heals by itself. Needs root, for a small file system that
//! only this test sees.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use nix::{
    errno::Errno,
    fcntl::posix_fallocate,
    sched::{CloneFlags, unshare},
    sys::statvfs::fstatvfs,
    unistd::geteuid,
};
use twistlock_ha::{
    cluster::Role,
    control::{self, Call},
    node::Status,
};

use super::{
    WRITERS, alone,
    cluster::{Cluster, LEASE_LOST, LIMIT, RESTART_AFTER},
    writers::Writers,
};

/// Some segments of the raft log, the database, and what is free again without the ballast.
const SIZE: &str = "size=160m,mode=700";
/// Characters in the description of each tag: enough to fill a raft log soon, few enough for the small disk.
const LONG: usize = 300;
/// What may be said about a full disk.
pub const FULL: &[&str] = &[
    "the disk is full",
    "the disk of the primary is full",
    "cannot prepare the next segments",
    "database or disk is full",
];

pub fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

/// Runs the test on a thread that alone sees what is mounted there, with all that it starts.
pub fn in_private_mounts(test: impl FnOnce() + Send + 'static) {
    assert!(
        geteuid().is_root(),
        "this test mounts a small file system: run it as root, or leave it out with --skip disk"
    );
    let enter = move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        run("mount", &["--make-rprivate", "/"]);
        test();
    };
    let thread = std::thread::Builder::new().name("private mounts".into()).spawn(enter).unwrap();
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A cluster in which the data folder of one node is small.
fn start(small: usize) -> Cluster {
    Cluster::start_with(RESTART_AFTER, |folder: &Path| {
        let data = folder.join(format!("node{}", small + 1)).join("data");
        fs::create_dir_all(&data).unwrap();
        run("mount", &["-t", "tmpfs", "-o", SIZE, "tmpfs", data.to_str().unwrap()]);
    })
}

/// Takes all space in the file system of a node.
pub fn fill(cluster: &Cluster, node: usize) -> PathBuf {
    leave(cluster, node, 0)
}

/// Takes space in the file system of a node until so many bytes are left. Nothing is written, so that it is done at once.
pub fn leave(cluster: &Cluster, node: usize, bytes: u64) -> PathBuf {
    let path = cluster.node(node).data.join("ballast");
    let file = File::create(&path).unwrap();
    let (mut taken, begin) = (0, Instant::now());
    loop {
        assert!(begin.elapsed() < LIMIT, "{}: its file system does not fill up", path.display());
        let found = fstatvfs(&file).unwrap();
        let more = (found.blocks_available() * found.fragment_size()).saturating_sub(bytes);
        if more == 0 {
            return path;
        }
        match posix_fallocate(&file, taken, more as i64) {
            Ok(()) => taken += more as i64,
            // The node was faster.
            Err(Errno::ENOSPC) => {}
            Err(error) => panic!("{}: {error}", path.display()),
        }
    }
}

/// Moves the role until the node has it, or has it not.
pub fn wait_role(cluster: &Cluster, node: usize, primary: bool) {
    for _ in 0..20 {
        let now = cluster.primary();
        if (now == node) == primary {
            return;
        }
        let operation = Call::post("high-availability/switchover").with(serde_json::json!({}));
        control::send(&cluster.node(now).control, &operation, LIMIT).unwrap();
        cluster.wait_for("another primary", |statuses| {
            let serves = |status: &Status| status.role == Role::Primary;
            !statuses[now].as_ref().is_some_and(serves)
        });
        cluster.wait_healthy();
    }
    panic!("the role does not move as wanted");
}

fn warns(cluster: &Cluster, node: usize) -> bool {
    let status = cluster.statuses()[node].clone();
    status.is_some_and(|status| status.warnings.iter().any(|warning| warning.contains("the disk is full")))
}

#[test]
fn timed_a_secondary_with_a_full_disk_is_done_without() {
    let _alone = alone();
    in_private_mounts(|| {
        let node = 2;
        let cluster = start(node);
        wait_role(&cluster, node, false);
        let pid = cluster.node(node).pid;
        let writers = Writers::start_long(&cluster.file(), WRITERS, LONG);
        let ballast = fill(&cluster, node);
        cluster.wait_for("a warning", |_| warns(&cluster, node));
        let refuses = || cluster.log(node).contains("takes no more entries into its raft log");
        cluster.wait_for("a full raft log", |_| refuses());
        writers.wait_success(Instant::now(), |_| true).expect("the others go on");
        // What it has missed must fit into its small disk.
        let written = writers.verify();
        fs::remove_file(ballast).unwrap();
        cluster.wait_for("no warning", |_| !warns(&cluster, node));
        cluster.wait_healthy();
        assert_eq!(cluster.node(node).pid, pid, "the node did not go on, it was started again");
        println!("full disk of a secondary: {written}\n  {}", cluster.finish(FULL));
    });
}

/// What the raft log has room for and `membership.json` has not is kept in memory, and written when there is space.
#[test]
fn timed_a_change_of_the_membership_waits_for_space() {
    let _alone = alone();
    in_private_mounts(|| {
        let node = 2;
        let cluster = start(node);
        wait_role(&cluster, node, false);
        let pid = cluster.node(node).pid;
        let ballast = fill(&cluster, node);
        cluster.wait_for("a warning", |_| warns(&cluster, node));
        let primary = cluster.node(cluster.primary()).control;
        let administer = |operation| {
            control::send(&primary, &operation, LIMIT).unwrap();
        };
        administer(Call::post("high-availability/pause").with(serde_json::json!({ "seconds": 600 })));
        let paused = |status: &Status| status.membership.roster.pause.is_some();
        cluster
            .wait_for("a pause on all nodes", |statuses| statuses.iter().flatten().filter(|s| paused(s)).count() == 3);
        let kept = || fs::read_to_string(cluster.node(node).data.join("membership.json")).unwrap_or_default();
        assert!(!kept().contains("\"until\""), "there was space for it after all: {}", kept());
        // Checkpoints are held back, not writes.
        let writers = Writers::start(&cluster.file(), WRITERS);
        writers.wait_success(Instant::now(), |_| true).expect("a write");
        fs::remove_file(ballast).unwrap();
        cluster.wait_for("the membership in its file", |_| kept().contains("\"until\""));
        administer(Call::post("high-availability/resume"));
        cluster.wait_for("no pause", |statuses| !statuses.iter().flatten().any(paused));
        let written = writers.verify();
        assert_eq!(cluster.node(node).pid, pid, "the node did not go on, it was started again");
        let expected = [FULL, &["automatic takeover is paused"]].concat();
        println!("membership on a full disk: {written}\n  {}", cluster.finish(&expected));
    });
}

#[test]
fn timed_a_primary_with_a_full_disk_hands_the_role_over() {
    let _alone = alone();
    in_private_mounts(|| {
        let node = 0;
        let cluster = start(node);
        wait_role(&cluster, node, true);
        let pid = cluster.node(node).pid;
        let writers = Writers::start(&cluster.file(), WRITERS);
        let fault = Instant::now();
        let ballast = fill(&cluster, node);
        let gap = writers.wait_success(fault, |by| by != node).expect("another node takes over");
        cluster.wait_for("a warning", |_| warns(&cluster, node));
        fs::remove_file(ballast).unwrap();
        cluster.wait_for("no warning", |_| !warns(&cluster, node));
        let written = writers.verify();
        cluster.wait_healthy();
        assert_eq!(cluster.node(node).pid, pid, "the node did not go on, it was started again");
        let compared = cluster.finish(&[FULL, LEASE_LOST].concat());
        println!(
            "full disk of the primary: another node answers after {} ms\n  {written}\n  {compared}",
            gap.as_millis()
        );
    });
}
