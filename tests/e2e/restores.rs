//! Restores that something happens to: a member dies while the parts are on their way, or has no space for them. Whatever it is,
//! the Console opens again, with the whole old state or the whole new one.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    thread,
    time::Instant,
};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use nix::sys::signal::Signal;
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, Connection, sqlite::SqliteConnectOptions};
use twistlock_ha::{
    backup::{BackupState, Started},
    cluster::Role,
    control::Call,
    node::Status,
    storage::checksum::PageTable,
};

use super::{
    backup::{ask, begin_restore, make, restore, wait_ended},
    beside,
    cluster::{Cluster, FROZEN, LIMIT, RESTART_AFTER},
    disk::{FULL, fill, in_private_mounts, leave, run, wait_role},
    writers::Pen,
};

/// Bytes that a backup is made larger by: more than the prepared segments of a raft log take.
const LARGE: u64 = 100 << 20;
/// Bytes of it that are on their way when somebody dies, and entries of the raft log that are committed then at least.
const SENT: u64 = 32 << 20;
const PARTS: u64 = 20;
/// A busy machine may be too late for the right moment.
const MOST_ROUNDS: usize = 6;

/// The same backup with so many bytes more in it, which no compression makes smaller.
fn enlarged(backup: &Path, bytes: u64) -> PathBuf {
    let folder = backup.parent().unwrap();
    let database = folder.join("enlarged.db");
    let mut archive = tar::Archive::new(GzDecoder::new(File::open(backup).unwrap()));
    let mut manifest = Value::Null;
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if &*entry.path_bytes() == b"manifest.json" {
            manifest = serde_json::from_reader(&mut entry).unwrap();
        } else {
            std::io::copy(&mut entry, &mut File::create(&database).unwrap()).unwrap();
        }
    }
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let options = SqliteConnectOptions::new().filename(&database);
        let mut connection = options.connect().await.unwrap();
        sqlx::raw_sql("CREATE TABLE ballast (content BLOB)").execute(&mut connection).await.unwrap();
        for _ in 0..bytes >> 20 {
            sqlx::raw_sql("INSERT INTO ballast VALUES (randomblob(1 << 20))").execute(&mut connection).await.unwrap();
        }
        // As a member has it: without a file beside it.
        sqlx::raw_sql("PRAGMA journal_mode=DELETE").execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    });
    let mut image = Vec::new();
    File::open(&database).unwrap().read_to_end(&mut image).unwrap();
    let page_size = manifest["page_size"].as_u64().unwrap() as u32;
    let pages = (image.len() / page_size as usize) as u32;
    let table = PageTable::read(&File::open(&database).unwrap(), page_size, pages, &|| true).unwrap();
    manifest["pages"] = json!(pages);
    manifest["checksum"] = json!(format!("{:016x}", table.checksum()));
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    manifest["sha256"] = json!(hex(digest(&SHA256, &image).as_ref()));
    fs::remove_file(&database).unwrap();
    let path = folder.join(backup.file_name().unwrap().to_str().unwrap().replacen("whole", "large", 1));
    let mut tar = tar::Builder::new(GzEncoder::new(File::create(&path).unwrap(), Compression::fast()));
    let text = serde_json::to_vec(&manifest).unwrap();
    for (name, content) in [("manifest.json", &text), ("console.db", &image)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        tar.append_data(&mut header, name, content.as_slice()).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap();
    path
}

/// A cluster in which the data folders of these nodes have so much space; the first node is PRIMARY.
fn with_small_disks(nodes: &[usize], size: &str) -> Cluster {
    let cluster = Cluster::start_with(RESTART_AFTER, |folder: &Path| {
        for node in nodes {
            let data = folder.join(format!("node{}", node + 1)).join("data");
            fs::create_dir_all(&data).unwrap();
            // As every data folder: nobody else may look into it.
            let option = format!("size={size},mode=700");
            run("mount", &["-t", "tmpfs", "-o", &option, "tmpfs", data.to_str().unwrap()]);
        }
    });
    wait_role(&cluster, 0, true);
    cluster
}

/// Waits until the restore has done so many bytes of a step. False if it was over before that was seen.
fn wait_step(cluster: &Cluster, node: usize, started: &Started, step: &str, bytes: u64) -> bool {
    let deadline = Instant::now() + LIMIT;
    loop {
        let state: BackupState = ask(cluster, node, Call::get("settings/backup")).unwrap();
        if state.last.is_some_and(|last| last.number == started.number) {
            return false;
        }
        if state.running.is_some_and(|running| running.step.contains(step) && running.done >= bytes) {
            return true;
        }
        assert!(Instant::now() < deadline, "it does not get that far");
        thread::yield_now();
    }
}

/// The highest raft index that some member knows to be committed.
fn committed(cluster: &Cluster) -> u64 {
    cluster.statuses().iter().flatten().map(|status| status.committed).max().unwrap()
}

/// "Some of the parts were committed, and the last one was not" is what must leave the old state: by the raft index, and by what the
/// database has afterwards.
#[test]
fn the_primary_dies_while_the_parts_of_a_restore_are_on_their_way() {
    let _beside = beside();
    let cluster = Cluster::start();
    // The last one to be stopped has no time to apply what is behind its checkpoint.
    cluster.configure("CHECKPOINT_SECONDS", "1");
    cluster.restart_all();
    let mut pen = Pen::new(&cluster.file());
    assert!(pen.write(cluster.primary(), "kept"));
    let whole = pen.tags();
    let large = enlarged(&make(&cluster, cluster.primary(), "whole"), LARGE);
    let (mut amid, mut new) = (0, 0);
    for round in 0..MOST_ROUNDS {
        let primary = cluster.primary();
        let more = format!("more-{round}");
        assert!(pen.write(primary, &more));
        let before = committed(&cluster);
        let started = begin_restore(&cluster, primary, &large, true).unwrap();
        let seen = wait_step(&cluster, primary, &started, "sends it", SENT);
        cluster.signal(primary, Signal::SIGKILL);
        cluster.wait_for("a new primary", |statuses| {
            let serves = |status: &Status| status.role == Role::Primary;
            statuses.iter().enumerate().any(|(node, status)| node != primary && status.as_ref().is_some_and(serves))
        });
        cluster.wait_healthy();
        pen = Pen::new(&cluster.file());
        let parts = committed(&cluster) - before;
        let tags = pen.tags();
        let (restored, untouched) = (tags == whole, tags.len() == whole.len() + 1 && tags.contains(&more));
        assert!(restored || untouched, "round {round}: {} tags, neither {} nor one more", tags.len(), whole.len());
        println!("  round {round}: {parts} entries, {}", if restored { "the new state" } else { "the old state" });
        if untouched {
            amid += usize::from(seen && parts >= PARTS);
            pen.call(cluster.primary(), "DELETE", &format!("/tags/{more}"), None);
        }
        new += usize::from(restored);
        if amid == 2 {
            break;
        }
    }
    assert!(amid > 0, "in no round did it die with some of the parts committed and the last one not");
    println!("kill -9 during a restore: {amid} times amid the parts and the old state, {new} times the new state");
    println!("  {}", cluster.finish(&[]));
}

/// The restore goes on with the other member, and the one that died gets it when it is back.
#[test]
fn a_secondary_dies_while_the_parts_of_a_restore_are_on_their_way() {
    let _beside = beside();
    let cluster = Cluster::start();
    let (primary, secondary) = (cluster.primary(), (cluster.primary() + 1) % 3);
    let pen = Pen::new(&cluster.file());
    assert!(pen.write(primary, "kept"));
    let large = enlarged(&make(&cluster, primary, "whole"), LARGE);
    assert!(pen.write(primary, "after"));
    let started = begin_restore(&cluster, primary, &large, true).unwrap();
    assert!(wait_step(&cluster, primary, &started, "sends it", SENT), "it was over before anybody could die");
    cluster.signal(secondary, Signal::SIGKILL);
    let outcome = wait_ended(&cluster, primary, &started);
    assert!(outcome.ok, "{}", outcome.text);
    assert_eq!(cluster.primary(), primary, "the role did not move");
    let pen = Pen::new(&cluster.file());
    assert!(pen.has("kept") && !pen.has("after") && pen.write(primary, "goes-on"));
    let closed =
        cluster.log(primary).lines().any(|line| line.contains("is closed after") && line.ends_with("a restore"));
    assert!(closed, "the log does not say why the Console was closed");
    cluster.wait_healthy();
    println!("  {}", cluster.finish(&[]));
}

/// Whether the others have the space is known before anything is unpacked.
#[test]
fn a_restore_that_a_member_has_no_space_for_is_refused() {
    let _beside = beside();
    in_private_mounts(|| {
        let cluster = with_small_disks(&[1], "480m");
        let pen = Pen::new(&cluster.file());
        assert!(pen.write(0, "kept"));
        let large = enlarged(&make(&cluster, 0, "whole"), LARGE);
        let ballast = leave(&cluster, 1, LARGE);
        let free = |status: &Status, name: &str| {
            status.members.iter().find(|member| member.name == name).and_then(|member| member.free)
        };
        cluster.wait_for("its free space in the status of the others", |statuses| {
            let told = |status: &Option<Status>| free(status.as_ref()?, "node2").filter(|free| *free <= LARGE);
            statuses.iter().all(|status| told(status).is_some())
        });
        assert!(free(&cluster.status(0), "node3").is_some_and(|free| free > LARGE));
        let outcome = restore(&cluster, &large);
        assert!(!outcome.ok && outcome.text.contains("are needed in the data folder of node2"), "{}", outcome.text);
        fs::remove_file(ballast).unwrap();
        cluster.signal(1, Signal::SIGSTOP);
        cluster.wait_for("a member that is DOWN", |statuses| {
            let down = |status: &Status| status.members.iter().any(|member| member.state == Role::Down);
            statuses[0].as_ref().is_some_and(down)
        });
        let outcome = restore(&cluster, &large);
        assert!(!outcome.ok && outcome.text.contains("node2 is not heard of"), "{}", outcome.text);
        assert!(!cluster.log(0).contains("the Console may open again"), "it was closed");
        cluster.signal(1, Signal::SIGCONT);
        assert!(pen.write(0, "goes-on"));
        println!("  {}", cluster.finish(&[FULL, FROZEN, &["the restore failed"]].concat()));
    });
}

/// Somebody else takes the space while the backup is unpacked: the Console is not even closed.
#[test]
fn the_free_space_is_looked_at_again_before_the_console_is_closed() {
    let _beside = beside();
    in_private_mounts(|| {
        let cluster = with_small_disks(&[0], "480m");
        let pen = Pen::new(&cluster.file());
        assert!(pen.write(0, "kept"));
        let large = enlarged(&make(&cluster, 0, "whole"), LARGE);
        let started = begin_restore(&cluster, 0, &large, true).unwrap();
        assert!(wait_step(&cluster, 0, &started, "reads the backup", 1), "it was unpacked before that was seen");
        let ballast = leave(&cluster, 0, LARGE);
        let outcome = wait_ended(&cluster, 0, &started);
        assert!(!outcome.ok && outcome.text.contains("are needed in the data folder"), "{}", outcome.text);
        assert!(!cluster.log(0).contains("the Console may open again"), "it was closed");
        assert!(pen.write(0, "goes-on"));
        fs::remove_file(ballast).unwrap();
        println!("  {}", cluster.finish(&[FULL, &["the restore failed"]].concat()));
    });
}

/// The disks of both secondaries fill up while the parts are on their way.
#[test]
fn a_restore_that_nobody_has_space_for_is_given_up() {
    let _beside = beside();
    in_private_mounts(|| {
        let cluster = with_small_disks(&[1, 2], "480m");
        let pen = Pen::new(&cluster.file());
        assert!(pen.write(0, "kept"));
        let large = enlarged(&make(&cluster, 0, "whole"), LARGE);
        assert!(pen.write(0, "after"));
        let begin = Instant::now();
        let started = begin_restore(&cluster, 0, &large, true).unwrap();
        assert!(wait_step(&cluster, 0, &started, "replaces", 1), "it was over before anything could fill up");
        let ballast = [1, 2].map(|node| fill(&cluster, node));
        let outcome = wait_ended(&cluster, 0, &started);
        println!("  given up after {} ms: {}", begin.elapsed().as_millis(), outcome.text);
        assert!(!outcome.ok && outcome.text.contains("nothing was changed"), "{}", outcome.text);
        assert!(outcome.text.contains("no majority of the members can take it"), "{}", outcome.text);
        let events: Value = ask(&cluster, 0, Call::get("high-availability/events")).unwrap();
        assert!(events.to_string().contains("the restore of large-"), "{events}");
        // Open again when its end is told, with the old state: everybody is still logged in.
        assert_eq!(pen.call(0, "GET", "/users", None).0, 200);
        assert!(pen.has("kept") && pen.has("after"));
        ballast.iter().for_each(|file| fs::remove_file(file).unwrap());
        cluster.wait_for("space everywhere", |statuses| {
            let known: Vec<_> = statuses.iter().flatten().collect();
            known.len() == 3 && known.iter().all(|status| !status.members.iter().any(|member| member.full))
        });
        assert!(pen.write(0, "goes-on"));
        // What was left of it is in nobody's way.
        let outcome = restore(&cluster, &large);
        assert!(outcome.ok, "{}", outcome.text);
        let pen = Pen::new(&cluster.file());
        assert!(pen.has("kept") && !pen.has("after") && pen.write(cluster.primary(), "and-on"));
        println!("  {}", cluster.finish(&[FULL, &["the restore failed"]].concat()));
    });
}
