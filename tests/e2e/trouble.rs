//! The disk of a node fails or hangs: the role is with another member soon, the node says that it is its disk, and it comes back by
//! itself. With the real things: a file system that is shut down or frozen, and a preloaded library that fails or delays
//! operations on chosen files. Needs root.
//!
//! `DISK_ROWS=all` does what takes longer, too.

use std::{
    cell::Cell,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use twistlock_ha::{
    cluster::Role,
    control::{self, Call},
    node::Status,
};

use super::{
    WRITERS, alone,
    cluster::{Cluster, LIMIT, RESTART_AFTER},
    disk::{in_private_mounts, run, wait_role},
    preload::{Preload, compile},
    sampler::Sampler,
    writers::{Pen, Writers},
};

/// A file system that is thawed in any case.
struct Frozen(PathBuf);

impl Frozen {
    fn new(path: &Path) -> Self {
        run("fsfreeze", &["-f", path.to_str().unwrap()]);
        Self(path.to_owned())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.0).status();
    }
}

/// A cluster with the preloaded library, whose first node has its data in an ext4 file system of its own.
struct Stage {
    cluster: Cluster,
    preload: Preload,
    _tools: tempfile::TempDir,
    image: PathBuf,
    shutdown: PathBuf,
    table: Cell<Vec<String>>,
}

impl Stage {
    fn start() -> Self {
        let tools = tempfile::tempdir().unwrap();
        let preload = Preload::build(tools.path());
        let shutdown = compile(tools.path(), "shutdown.c", &[]);
        let image = tools.path().join("image");
        File::create(&image).unwrap().set_len(256 << 20).unwrap();
        run("mkfs.ext4", &["-q", image.to_str().unwrap()]);
        let cluster = Cluster::start_under(&preload.environment(), RESTART_AFTER, |folder| {
            let data = folder.join("node1/data");
            fs::create_dir_all(&data).unwrap();
            mount(&image, &data);
        });
        Self { cluster, preload, _tools: tools, image, shutdown, table: Cell::default() }
    }

    fn data(&self, node: usize) -> PathBuf {
        self.cluster.node(node).data
    }

    /// A rule for the data of one node.
    fn rule(&self, node: usize, operations: &str, file: &str, action: &str) -> String {
        format!("{operations} /{}/data/{file} {action}\n", self.cluster.node(node).name)
    }

    fn note(&self, row: String) {
        println!("  {row}");
        let mut table = self.table.take();
        table.push(row);
        self.table.set(table);
    }

    /// Harms the disk of the PRIMARY: another member takes over, and the node is back once it is mended.
    fn row<T>(&self, name: &str, writers: &Writers, harm: impl FnOnce(usize) -> T, mend: impl FnOnce(usize, T)) {
        self.cluster.wait_healthy();
        let node = self.cluster.primary();
        let logged = self.cluster.log(node).len();
        let fault = Instant::now();
        let harmed = harm(node);
        let gap = writers.wait_success(fault, |by| by != node);
        let gap = gap.unwrap_or_else(|| {
            self.preload.set(0, "");
            self.cluster.show_logs();
            panic!("{name}: no other member takes over");
        });
        // It names its disk, in its status if it lives, and in its log.
        self.cluster.wait_for("a word of its disk", |statuses| {
            let tells = |text: &str| DISK.iter().any(|words| text.contains(words));
            let says = |status: &Status| status.warnings.iter().any(|warning| tells(warning));
            let log = &self.cluster.log(node)[logged..];
            // A process that cannot begin says it with the words of the kernel.
            let logs = tells(log) || ["os error 5", "No space left on device"].iter().any(|text| log.contains(text));
            logs && statuses[node].as_ref().is_none_or(|status| says(status) || status.role != Role::Recovering)
        });
        let mended = Instant::now();
        mend(node, harmed);
        self.cluster.wait_healthy();
        self.note(format!(
            "{name}: writes stopped for {} ms; back {} ms after its end",
            gap.as_millis(),
            mended.elapsed().as_millis()
        ));
    }

    fn rule_row(&self, name: &str, writers: &Writers, rules: impl Fn(usize) -> String) {
        self.row(name, writers, |node| self.preload.set(0, &rules(node)), |_, ()| self.preload.set(0, ""));
    }
}

fn mount(image: &Path, at: &Path) {
    run("mount", &["-o", "loop", image.to_str().unwrap(), at.to_str().unwrap()]);
}

fn all_rows() -> bool {
    std::env::var("DISK_ROWS").is_ok_and(|rows| rows == "all")
}

/// What a node calls its disk.
const DISK: [&str; 2] = ["the disk of this host", "the disk is full"];

/// Any line may tell of a disk that is broken on purpose; only a panic may not.
const ANY: &[&str] = &["WARN", "ERROR", "port guard:"];

#[test]
fn timed_a_primary_whose_disk_fails_or_hangs_gives_the_role_up_and_comes_back() {
    let _alone = alone();
    in_private_mounts(|| {
        let stage = Stage::start();
        let sampler = Sampler::start(stage.cluster.port_offset);
        let writers = Writers::start(&stage.cluster.file(), WRITERS);
        wait_role(&stage.cluster, 0, true);
        let shut_down = |node: usize| {
            run(stage.shutdown.to_str().unwrap(), &[stage.data(node).to_str().unwrap()]);
        };
        let remount = |node: usize, ()| {
            run("umount", &["-l", stage.data(node).to_str().unwrap()]);
            mount(&stage.image, &stage.data(node));
        };
        stage.row("ext4 shut down", &writers, shut_down, remount);
        let hang = |node| stage.rule(node, "ws", "", "hang");
        stage.rule_row("writes and syncs hang", &writers, hang);
        stage.rule_row("writes fail", &writers, |node| stage.rule(node, "w", "", "eio"));
        stage.rule_row("no space is left", &writers, |node| stage.rule(node, "w", "", "enospc"));
        stage.rule_row("all hangs, reads too", &writers, |node| stage.rule(node, "rws", "", "hang"));
        wait_role(&stage.cluster, 0, true);
        stage.row("file system frozen", &writers, |node| Frozen::new(&stage.data(node)), |_, frozen| drop(frozen));
        if all_rows() {
            stage.rule_row("reads hang", &writers, |node| stage.rule(node, "r", "database/", "hang"));
        }
        stage.rule_row("reads of the database fail", &writers, |node| {
            stage.rule(node, "r", "database/console.db$", "eio")
        });
        let written = writers.verify();
        println!("  {written}\n  {}\n  {}", sampler.verify(), stage.cluster.finish(ANY));
    });
}

/// A secondary is done without; what all members have moves no role, and each says so; and no change waits on the loop.
#[test]
fn timed_a_disk_that_is_no_worse_elsewhere_moves_no_role() {
    let _alone = alone();
    in_private_mounts(|| {
        let stage = Stage::start();
        let cluster = &stage.cluster;
        let primary = cluster.primary();
        let epoch = || cluster.statuses()[primary].as_ref().map(|status| (status.role, status.epoch));
        let (before, pen) = (epoch(), Pen::new(&cluster.file()));
        let says = |statuses: &[Option<Status>], node: usize, text: &str| {
            let status = statuses[node].as_ref();
            status.is_some_and(|status| status.warnings.iter().any(|warning| warning.contains(text)))
        };
        let secondary = (primary + 1) % 3;
        stage.preload.set(0, &stage.rule(secondary, "s", "raft-log/", "hang"));
        assert!(pen.write(primary, "without-one"), "the others are a majority");
        cluster.wait_for("a word of the secondary's disk", |statuses| {
            says(statuses, secondary, "the disk of this host does not answer: to sync a file in raft-log")
                && says(statuses, primary, &format!("the disk of {} fails", cluster.node(secondary).name))
        });
        // Every sync of every member takes a second.
        stage.preload.set(0, "s /data/ delay:1000\n");
        let control = cluster.node(primary).control;
        let administer = |operation| control::send(&control, &operation, LIMIT).unwrap();
        administer(Call::post("high-availability/pause").with(serde_json::json!({ "seconds": 600 })));
        assert!(pen.write(primary, "slowly"));
        cluster.wait_for("a word of all disks", |statuses| {
            (0..3).all(|node| says(statuses, node, "the disk of this host"))
        });
        stage.preload.set(0, "");
        assert_eq!(epoch(), before, "the role has moved, or the lease has lapsed");
        administer(Call::post("high-availability/resume"));
        let troubled = |statuses: &[Option<Status>]| (0..3).any(|node| says(statuses, node, "answer"));
        cluster.wait_for("no word of it", |statuses| !troubled(statuses));
        // The same trouble on all: it goes round once, and then stays.
        stage.preload.set(0, "w /data/database/console.db-wal$ eio\n");
        let begin = Instant::now();
        let (stuck, mut text) = (Cell::new(None), String::new());
        while stuck.get().is_none() && begin.elapsed() < LIMIT {
            // No answer: it has just given the role up.
            let serves = |status: &Option<Status>| status.as_ref().is_some_and(|status| status.role == Role::Primary);
            let primary = cluster.statuses().iter().position(serves);
            if let Some((code, told)) = primary.and_then(|node| pen.attempt(node, "never")) {
                assert_eq!(code, 503, "{told}");
                text = told;
            }
            cluster.wait_for("a PRIMARY, or a word of why not", |statuses| {
                stuck.set((0..3).find(|node| says(statuses, *node, "no other member with a working disk answers")));
                stuck.get().is_some() || statuses.iter().flatten().any(|status| status.role == Role::Primary)
            });
        }
        let stuck = stuck.get().expect("a word of why the role stays");
        println!(
            "  all the same: after {} ms the role stays with node {stuck}; a request says {text}",
            begin.elapsed().as_millis()
        );
        assert!(text.contains("the disk of this host fails: cannot write database/console.db-wal"), "{text}");
        stage.preload.set(0, "");
        println!("  {}", stage.cluster.finish(ANY));
    });
}
