//! The files of the folder after each call of the kernel, as a crash at that moment would leave them: SQLite finds the
//! transactions in them that a majority has, and no other. A member that begins again from them and the raft log has
//! what all have.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use twistlock_ha::storage::{Replicator, folder::Trace};

use super::{
    super::support::{Answer, Log, Sql},
    MODES, Member, Site, digest_of,
};

const DIGEST: &str = "SELECT count(*) || ':' || coalesce(sum(length(data)), 0) || ':' || coalesce(sum(id), 0) FROM t";

/// Everything in a folder, by its path.
type Files = Vec<(PathBuf, Vec<u8>)>;

fn read(root: &Path, below: &Path, files: &mut Files) {
    for entry in fs::read_dir(root.join(below)).unwrap() {
        let entry = entry.unwrap();
        let path = below.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => read(root, &path, files),
            false => files.push((path, fs::read(entry.path()).unwrap())),
        }
    }
}

fn write(root: &Path, files: &Files) {
    for (path, content) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

struct Image {
    call: &'static str,
    /// The raft log's last transaction.
    index: u64,
    files: Files,
}

/// Runs statements, some of which are refused. Returns the images, and what the table holds from which index on.
fn run(site: &Site, sql: &Sql, images: &Mutex<Vec<Image>>) -> Vec<(u64, String)> {
    let mut states = vec![(site.log.last_commit(), sql.text(DIGEST))];
    images.lock().unwrap().clear();
    for (number, statement) in [
        "INSERT INTO t(data) VALUES (randomblob(20))",
        "BEGIN; INSERT INTO t(data) VALUES (randomblob(30000)); UPDATE t SET data = randomblob(3000); UPDATE t SET data = zeroblob(2999); COMMIT",
        "INSERT INTO t(data) VALUES (randomblob(500))",
        "BEGIN; DELETE FROM t; INSERT INTO t(data) VALUES (randomblob(20000)); ROLLBACK",
        "PRAGMA wal_checkpoint(RESTART)",
        "UPDATE t SET data = randomblob(100)",
        "VACUUM",
        "DELETE FROM t WHERE id % 2",
        "PRAGMA wal_checkpoint(TRUNCATE)",
        "INSERT INTO t(data) VALUES (1)",
    ]
    .iter()
    .enumerate()
    {
        let before = site.log.last_commit();
        if number % 3 == 2 {
            site.log.answer(Answer::Refuse);
            let _ = sql.run(statement);
            if sql.in_transaction() {
                sql.run("ROLLBACK").unwrap();
            }
            site.log.answer(Answer::Accept);
            assert_eq!(site.log.last_commit(), before);
        }
        sql.run(statement).unwrap();
        states.push((site.log.last_commit(), sql.text(DIGEST)));
    }
    states
}

#[test]
fn a_crash_after_any_call_leaves_what_a_majority_has() {
    for mode in MODES {
        let mut site = Site::new();
        let images = Arc::new(Mutex::new(Vec::new()));
        let trace: Trace = {
            let (root, log, images) = (site.primary.root.clone(), Arc::clone(&site.log), Arc::clone(&images));
            Arc::new(move |call| {
                if !["read", "lookup", "getattr", "fsync"].contains(&call) {
                    let (mut files, index) = (Vec::new(), log.last_commit());
                    read(&root, Path::new(""), &mut files);
                    images.lock().unwrap().push(Image { call, index, files });
                }
            })
        };
        let log: Arc<dyn Replicator> = Arc::<Log>::clone(&site.log);
        site.serve_traced(log, Some(trace));
        let sql = site.open("x.db");
        sql.run(&format!("PRAGMA page_size=1024; PRAGMA journal_mode={mode}; PRAGMA cache_size=5")).unwrap();
        sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data); INSERT INTO t(data) VALUES (1)").unwrap();
        let states = run(&site, &sql, &images);
        drop(sql);
        site.compare();
        let images = std::mem::take(&mut *images.lock().unwrap());
        println!("{mode}: {} images", images.len());
        assert!(images.len() > 50, "{mode}: the trace does not do its work");
        for (number, image) in images.iter().enumerate() {
            let what = format!("{mode}: call {number}, {}, at index {}", image.call, image.index);
            let (_, expected) = states.iter().rfind(|(index, _)| *index <= image.index).unwrap();
            let copy = tempfile::tempdir().unwrap();
            write(copy.path(), &image.files);
            let database = copy.path().join("files/x.db");
            assert_eq!(digest_of(&database, DIGEST), *expected, "{what}");
            assert_eq!(digest_of(&database, "PRAGMA integrity_check"), "ok", "{what}");
            // The daemon itself goes by its raft log, and not by what SQLite would find.
            if number % 9 == 0 {
                let mut member = Member::open(copy.path().to_owned(), &site.log);
                member.follow(&site.log);
                for (mine, theirs) in member.members.iter().zip(site.follower.members.iter()) {
                    mine.verify().unwrap();
                    assert_eq!(mine.checksum(), theirs.checksum(), "{what}");
                }
            }
        }
    }
}
