//! What an application does in each journal mode, and what cannot be replicated.

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
};

use libsqlite3_sys as sqlite;
use twistlock_ha::storage::{
    database::initial_transaction,
    folder::catalogue::is_change,
    transaction::{CONSOLE_DATABASE, Pages},
};

use super::{
    super::support::{Node, Sql, new_log},
    MODES, Site, assert_equal_files, start_python,
};

/// The pages of all transactions in a log: for each, (database pages, page, image).
fn transactions(site: &super::Log) -> Vec<Vec<(u32, u32, Vec<u8>)>> {
    let (mut all, mut open) = (Vec::new(), Vec::new());
    for index in 1..=site.last_index() {
        let (_, payload) = site.entry(index).unwrap();
        if payload.is_empty() || is_change(&payload) {
            continue;
        }
        let part = Pages::decode(&payload).unwrap();
        open.extend(part.iter().map(|(number, image)| (0, number, image.to_vec())));
        if let Some(commit) = part.commit {
            open.iter_mut().for_each(|page| page.0 = commit.database_pages);
            all.push(std::mem::take(&mut open));
        }
    }
    all
}

#[test]
fn each_mode_and_page_size_ends_in_the_same_file() {
    for mode in MODES {
        for page_size in [512, 1024, 4096, 8192, 65536] {
            let mut site = Site::serving();
            let sql = site.open("a b ä.db");
            // What an application may set besides, each with another size.
            let also = match page_size {
                512 => "PRAGMA locking_mode=EXCLUSIVE",
                1024 => "PRAGMA mmap_size=100000000",
                8192 => "PRAGMA journal_size_limit=1000; PRAGMA wal_autocheckpoint=3",
                65536 => "PRAGMA synchronous=OFF",
                _ => "PRAGMA synchronous=EXTRA",
            };
            sql.run(&format!("{also}; PRAGMA page_size={page_size}; PRAGMA journal_mode={mode}")).unwrap();
            sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
            let mut last = site.log.last_index();
            for round in 0..12 {
                sql.run(&format!("INSERT INTO t(data) VALUES (randomblob({}))", page_size * (round % 4) + 10)).unwrap();
                assert!(site.log.last_index() > last, "{mode} {page_size}: a commit is an entry");
                last = site.log.last_index();
                let before = sql.text("SELECT count(*) || total(length(data)) FROM t");
                sql.run("BEGIN; UPDATE t SET data = 'x'; DELETE FROM t WHERE id > 3; ROLLBACK").unwrap();
                assert_eq!(sql.text("SELECT count(*) || total(length(data)) FROM t"), before);
                assert_eq!(site.log.last_index(), last, "{mode} {page_size}: a rollback is none");
            }
            sql.run("BEGIN; DELETE FROM t WHERE id % 2; INSERT INTO t(data) VALUES ('last'); COMMIT").unwrap();
            sql.run("VACUUM").unwrap();
            assert_eq!(sql.text("PRAGMA integrity_check"), "ok");
            assert_eq!(sql.text("PRAGMA journal_mode"), mode.to_lowercase());
            drop(sql);
            site.compare();
            site.end();
        }
    }
}

#[test]
fn a_database_changes_its_mode_and_the_size_of_its_pages() {
    let mut site = Site::serving();
    let sql = site.open("x.db");
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
    for (round, mode) in ["WAL", "DELETE", "WAL", "TRUNCATE", "PERSIST", "WAL", "PERSIST"].iter().enumerate() {
        assert_eq!(sql.text(&format!("PRAGMA journal_mode={mode}")), mode.to_lowercase());
        for _ in 0..5 {
            sql.run("INSERT INTO t(data) VALUES (randomblob(3000))").unwrap();
        }
        if *mode != "WAL" {
            sql.run(&format!("PRAGMA page_size={}; VACUUM", 512 << round)).unwrap();
            assert_eq!(sql.number("PRAGMA page_size"), 512 << round);
        }
    }
    assert_eq!(sql.number("SELECT count(*) FROM t"), 35);
    drop(sql);
    site.compare();
    // Another member serves it, from its own files, which are the service's then.
    site.end();
    std::mem::swap(&mut site.primary, &mut site.follower);
    site.owner = (65534, 65534);
    site.serve();
    assert_eq!(fs::metadata(site.path("x.db")).unwrap().uid(), 65534);
    let sql = site.open("x.db");
    assert_eq!(sql.number("SELECT count(*) FROM t WHERE length(data) = 3000"), 35);
    sql.run("DELETE FROM t WHERE id > 30").unwrap();
    drop(sql);
    site.compare();
}

#[test]
fn the_same_sql_makes_the_same_entries_by_the_folder_and_by_the_vfs() {
    let statements: Vec<String> = ["CREATE TABLE t(id INTEGER PRIMARY KEY, k, data)", "CREATE INDEX i ON t(k)"]
        .map(str::to_owned)
        .into_iter()
        .chain((0..40).map(|n| match n % 5 {
            0 => format!("UPDATE t SET data = zeroblob({}) WHERE id % 3 = 0", n * 100),
            1 => format!("BEGIN; DELETE FROM t WHERE id % 4 = 1; ROLLBACK; INSERT INTO t(k) VALUES ({n})"),
            2 => format!("BEGIN; INSERT INTO t(k) VALUES (1); SAVEPOINT s; DELETE FROM t; ROLLBACK TO s; COMMIT; DELETE FROM t WHERE k = {n}"),
            _ => format!("INSERT INTO t(k, data) WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n LIMIT 60) SELECT i * {n}, printf('%0500d', i) FROM n"),
        }))
        .chain(["VACUUM".to_owned()])
        .collect();
    let run = |sql: &Sql| {
        sql.run("PRAGMA cache_size=5; PRAGMA wal_autocheckpoint=0; PRAGMA synchronous=NORMAL").unwrap();
        statements.iter().for_each(|statement| sql.run(statement).unwrap());
    };
    let log = new_log(1024);
    let mut node = Node::new(&log);
    let primary = node.promote();
    run(&Sql::open(&primary));
    let by_vfs = transactions(&log);
    // The folder begins with the same image, which is a database in WAL mode.
    let mut site = Site::new();
    let initial = initial_transaction(CONSOLE_DATABASE, 1024).unwrap();
    let image: Vec<_> = Pages::decode(&initial[0]).unwrap().iter().flat_map(|(_, image)| image.to_vec()).collect();
    fs::create_dir_all(site.primary.members.files()).unwrap();
    fs::write(site.below("x.db"), image).unwrap();
    site.serve();
    let sql = site.open("x.db");
    run(&sql);
    let by_folder = transactions(&site.log);
    assert_eq!(by_folder.len(), by_vfs.len());
    for (number, (one, other)) in by_folder.iter().zip(&by_vfs).enumerate() {
        let numbers = |pages: &[(u32, u32, Vec<u8>)]| pages.iter().map(|page| (page.0, page.1)).collect::<Vec<_>>();
        assert_eq!(numbers(one), numbers(other), "transaction {number}");
        assert!(one == other, "transaction {number} has other images");
    }
    drop(sql);
    site.compare();
}

#[test]
fn what_cannot_be_replicated_is_refused_in_a_line_that_names_the_file() {
    let mut site = Site::serving();
    let sql = site.open("x.db");
    sql.run("CREATE TABLE t(data); INSERT INTO t VALUES (1)").unwrap();
    let other = site.open("other.db");
    other.run("CREATE TABLE t(data); INSERT INTO t VALUES (1)").unwrap();
    let last = site.log.last_index();
    for mode in ["MEMORY", "OFF"] {
        sql.run(&format!("PRAGMA journal_mode={mode}")).unwrap();
        sql.run("INSERT INTO t VALUES (randomblob(9000))").unwrap_err();
        assert!(site.refusal().starts_with("x.db: ") && site.refusal().contains("journal_mode"), "{}", site.refusal());
        sql.run("PRAGMA journal_mode=DELETE").unwrap();
        assert_eq!(sql.number("SELECT count(*) FROM t"), 1);
    }
    // A new database without a journal.
    let new = site.open("new.db");
    new.run("PRAGMA journal_mode=MEMORY; CREATE TABLE t(data)").unwrap_err();
    assert!(site.refusal().starts_with("new.db: "), "{}", site.refusal());
    drop(new);
    // One transaction over two databases.
    sql.run(&format!("ATTACH '{}' AS other", site.path("other.db").display())).unwrap();
    sql.run("BEGIN; INSERT INTO main.t VALUES (2); INSERT INTO other.t VALUES (2)").unwrap();
    sql.run("COMMIT").unwrap_err();
    assert!(site.refusal().contains("over several databases"), "{}", site.refusal());
    if sql.in_transaction() {
        sql.run("ROLLBACK").unwrap();
    }
    assert_eq!(sql.number("SELECT (SELECT count(*) FROM main.t) + (SELECT count(*) FROM other.t)"), 2);
    drop((sql, other));
    // Raw changes, other names, removal.
    let file = fs::File::options().write(true).open(site.path("x.db")).unwrap();
    for error in [
        file.write_all_at(b"garbage", 5000).unwrap_err(),
        file.write_all_at(&[7; 4096], 4096).unwrap_err(),
        file.set_len(0).unwrap_err(),
        fs::copy(site.path("other.db"), site.path("x.db")).unwrap_err(),
        fs::rename(site.path("x.db"), site.path("y.db")).unwrap_err(),
        fs::rename(site.path("new.db"), site.path("x.db")).unwrap_err(),
        fs::hard_link(site.path("x.db"), site.path("y.db")).unwrap_err(),
    ] {
        assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::EROFS as i32), "{error}: {}", site.refusal());
        assert!(site.refusal().starts_with("x.db: "), "{}", site.refusal());
    }
    assert_eq!(site.log.last_index(), last, "nothing of all that is an entry");
    // What is no database is none of our business.
    fs::write(site.path("notes.txt"), [1; 4096]).unwrap();
    fs::write(site.path("notes.txt-journal"), "dear diary").unwrap();
    fs::write(site.path("notes.txt"), "shorter").unwrap();
    fs::remove_file(site.path("notes.txt-journal")).unwrap();
    fs::copy(site.path("other.db"), site.path("backup.db")).unwrap();
    fs::remove_file(site.path("backup.db")).unwrap();
    site.compare();
}

#[test]
fn a_database_that_is_removed_is_gone_everywhere_and_another_one_takes_its_name() {
    let mut site = Site::serving();
    for (round, mode) in MODES.iter().enumerate() {
        let sql = site.open("x.db");
        sql.run(&format!("PRAGMA journal_mode={mode}; CREATE TABLE t(data); INSERT INTO t VALUES ({round})")).unwrap();
        assert_eq!(sql.number("SELECT data FROM t"), round as i64);
        sql.run("BEGIN; INSERT INTO t VALUES (0)").unwrap();
        if *mode == "DELETE" {
            let error = fs::remove_file(site.path("x.db")).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::EROFS as i32), "a transaction is under way");
        }
        sql.run("ROLLBACK").unwrap();
        drop(sql);
        site.compare();
        fs::remove_file(site.path("x.db")).unwrap();
        let _ = fs::remove_file(site.path("x.db-journal"));
        site.compare();
        assert_eq!(site.follower.members.iter().count(), 0);
        assert_eq!(fs::read_dir(site.follower.members.files()).unwrap().count(), 0);
    }
    site.log.answer(super::super::support::Answer::Refuse);
    let sql = site.open("y.db");
    sql.run("CREATE TABLE t(data)").unwrap_err();
    sql.run("CREATE TABLE t(data)").unwrap();
    drop(sql);
    site.log.answer(super::super::support::Answer::Refuse);
    assert!(fs::remove_file(site.path("y.db")).is_err());
    site.compare();
    assert_eq!(site.follower.members.iter().count(), 1, "it is still there");
    // The members begin again.
    site.end();
    site.serve();
    assert_eq!(site.open("y.db").number("SELECT count(*) FROM t"), 0);
}

/// More than is kept in memory.
#[test]
fn a_transaction_larger_than_the_memory_goes_through_a_file() {
    let mut site = Site::serving();
    let sql = site.open("x.db");
    sql.run("PRAGMA page_size=65536; PRAGMA cache_size=10; CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
    sql.run("BEGIN").unwrap();
    for _ in 0..80 {
        sql.run("INSERT INTO t(data) VALUES (zeroblob(1000000))").unwrap();
    }
    let guarded = site.registry().all().pop().unwrap();
    assert!(guarded.spilled() > 8 << 20, "{} bytes", guarded.spilled());
    assert!(fs::metadata(site.below("x.db")).unwrap().len() < 1 << 20, "nothing of it is in the file");
    sql.run("COMMIT").unwrap();
    assert_eq!((guarded.spilled(), sql.number("SELECT count(*) FROM t")), (0, 80));
    drop(sql);
    site.compare();
}

#[test]
fn several_databases_are_of_the_same_index_and_ends_do_not_lose_them() {
    let mut site = Site::serving();
    fs::create_dir(site.path("folder")).unwrap();
    for round in 0..3 {
        let connections: Vec<_> = MODES
            .iter()
            .map(|mode| {
                let sql = site.open(&format!("folder/{mode}.db"));
                sql.run(&format!("PRAGMA journal_mode={mode}; CREATE TABLE IF NOT EXISTS t(data)")).unwrap();
                sql
            })
            .collect();
        for number in 0..20 {
            connections[number % 4].run("INSERT INTO t VALUES (randomblob(5000))").unwrap();
        }
        drop(connections);
        assert!(fs::rename(site.path("folder"), site.path("other")).is_err(), "they have their paths");
        site.compare();
        if round == 1 {
            let committed = site.log.last_index();
            site.checkpoint(committed);
            assert_eq!(site.primary.members.checkpointed(), Some(committed), "no database needs the log any more");
        }
        site.end();
        for (mine, theirs) in site.primary.members.iter().zip(site.follower.members.iter()) {
            assert_equal_files(mine.path(), theirs.path());
        }
        assert_eq!(site.primary.members.iter().count(), 4);
        site.serve();
    }
}

#[test]
fn several_processes_write_and_read_what_all_have_written() {
    const PROGRAM: &str = "import sqlite3, sys\n\
         path, mode, name = sys.argv[1:]\n\
         db = sqlite3.connect(path, timeout=60, isolation_level=None)\n\
         seen = 0\n\
         for number in range(60):\n    \
             db.execute('BEGIN IMMEDIATE')\n    \
             db.execute('INSERT INTO t(name, data) VALUES (?, zeroblob(2000))', (name,))\n    \
             db.execute('UPDATE n SET total = total + 1')\n    \
             db.execute('COMMIT')\n    \
             rows, total = db.execute('SELECT (SELECT count(*) FROM t), (SELECT total FROM n)').fetchone()\n    \
             assert rows == total and rows > seen, (rows, total, seen)\n    \
             seen = rows\n";
    for mode in MODES {
        let mut site = Site::serving();
        let sql = site.open("x.db");
        sql.run(&format!("PRAGMA journal_mode={mode}")).unwrap();
        sql.run("CREATE TABLE t(name, data); CREATE TABLE n(total); INSERT INTO n VALUES (0)").unwrap();
        let path = site.path("x.db").display().to_string();
        let writers: Vec<_> = (0..3).map(|n| start_python(PROGRAM, &[&path, mode, &n.to_string()])).collect();
        for mut writer in writers {
            assert!(writer.wait().unwrap().success(), "{mode}: {}", site.refusal());
        }
        assert_eq!(sql.number("SELECT total FROM n"), 180);
        assert_eq!(sql.text("PRAGMA integrity_check"), "ok");
        sql.checkpoint(sqlite::SQLITE_CHECKPOINT_TRUNCATE);
        drop(sql);
        site.compare();
    }
}
