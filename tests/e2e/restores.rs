//! Restores that cannot come to their end: members without space while the parts are on their way. Whatever happens, the Console
//! opens again, with the whole old state or the whole new one.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    thread,
    time::Instant,
};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, Connection, sqlite::SqliteConnectOptions};
use twistlock_ha::{control::Operation, events::Wanted, storage::checksum::PageTable};

use super::{
    alone,
    backup::{ask, begin_restore, make, restore, wait_ended, wait_replacing},
    cluster::{Cluster, LIMIT, RESTART_AFTER},
    disk::{FULL, fill, in_private_mounts, run, wait_role},
    writers::Pen,
};

/// Bytes that a backup is made larger by: more than the prepared segments of a raft log take.
const LARGE: u64 = 100 << 20;

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

/// A cluster in which the data folders of the second and the third node have so much space.
fn with_small_secondaries(size: &str) -> Cluster {
    let cluster = Cluster::start_with(RESTART_AFTER, |folder: &Path| {
        for node in ["node2", "node3"] {
            let data = folder.join(node).join("data");
            fs::create_dir_all(&data).unwrap();
            let option = format!("size={size}");
            run("mount", &["-t", "tmpfs", "-o", &option, "tmpfs", data.to_str().unwrap()]);
        }
    });
    wait_role(&cluster, 0, true);
    cluster
}

/// The disks of both secondaries fill up while the parts are on their way.
#[test]
fn a_restore_that_nobody_has_space_for_is_given_up() {
    let _alone = alone();
    in_private_mounts(|| {
        let cluster = with_small_secondaries("480m");
        let pen = Pen::new(&cluster.file());
        assert!(pen.write(0, "kept"));
        let large = enlarged(&make(&cluster, 0, "whole"), LARGE);
        assert!(pen.write(0, "after"));
        let begin = Instant::now();
        let started = begin_restore(&cluster, 0, &large, true).unwrap();
        assert!(wait_replacing(&cluster, 0, &started), "it was over before anything could fill up");
        let ballast = [1, 2].map(|node| fill(&cluster, node));
        let outcome = wait_ended(&cluster, 0, &started);
        println!("  given up after {} ms: {}", begin.elapsed().as_millis(), outcome.text);
        assert!(!outcome.ok && outcome.text.contains("nothing was changed"), "{}", outcome.text);
        assert!(outcome.text.contains("no majority of the members can take it"), "{}", outcome.text);
        let events: Value = ask(&cluster, 0, Operation::Events { wanted: Wanted::default() }).unwrap();
        assert!(events.to_string().contains("the restore of large-"), "{events}");
        // Open again, with the old state: everybody is still logged in.
        let opened = Instant::now();
        while pen.call(0, "GET", "/users", None).0 != 200 {
            assert!(opened.elapsed() < LIMIT, "the Console does not open again");
            thread::yield_now();
        }
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
