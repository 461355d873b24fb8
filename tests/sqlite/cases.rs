//! One case per promise or trap.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use libsqlite3_sys as sqlite;
use twistlock_ha::{
    console::connect_options,
    storage::database::{ApplyError, DatabaseError},
};

use super::support::{Answer, Node, Sql, assert_same_beginning, assert_same_files, assert_sound, new_log, pair};

const IOERR_WRITE: i32 = sqlite::SQLITE_IOERR_WRITE;

fn assert_equal(first: &mut Node, second: &mut Node) {
    second.follow();
    first.checkpoint_all();
    assert_eq!(first.database.checksum(), second.database.checksum());
    assert_same_files(&first.database, &second.database);
    assert_sound(&second.database);
}

#[test]
fn a_transaction_arrives_on_the_secondary() {
    for page_size in [512, 1024, 4096, 65536] {
        let (mut first, mut second, primary) = pair(page_size);
        let sql = Sql::open(&primary);
        sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
        sql.run("INSERT INTO t(data) VALUES (randomblob(100)), (randomblob(100000))").unwrap();
        assert_equal(&mut first, &mut second);
        assert_eq!(first.database.page_size(), page_size);
        sql.run("UPDATE t SET data = randomblob(50000)").unwrap();
        sql.run("DELETE FROM t WHERE id = 2; VACUUM").unwrap();
        assert_equal(&mut first, &mut second);
    }
}

#[test]
fn a_refused_commit_leaves_no_trace() {
    let (mut first, mut second, primary) = pair(4096);
    let (sql, other) = (Sql::open(&primary), Sql::open(&primary));
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data); INSERT INTO t(data) VALUES ('kept')").unwrap();
    for spill in [false, true] {
        if spill {
            sql.run("PRAGMA cache_size=2").unwrap();
        }
        first.log.answer(Answer::Refuse);
        let text = format!("BEGIN; {}; COMMIT", fill("t(data)", 50, 3000));
        assert_eq!(sql.run(&text).unwrap_err().0, IOERR_WRITE);
        assert!(!sql.in_transaction());
        assert!(primary.gate().last_refusal().unwrap().contains("the test says no"));
        assert!(!primary.gate().is_fenced());
        let fresh = Sql::open(&primary);
        for connection in [&sql, &other, &fresh] {
            assert_eq!(connection.number("SELECT count(*) FROM t"), 1);
            assert_eq!(connection.text("PRAGMA integrity_check"), "ok");
        }
        assert_equal(&mut first, &mut second);
    }
    sql.run("INSERT INTO t(data) VALUES ('later')").unwrap();
    assert_eq!(other.number("SELECT count(*) FROM t"), 2);
    assert_equal(&mut first, &mut second);
}

/// Not even in the files: whoever recovers them finds only what was committed.
#[test]
fn a_refused_commit_is_not_in_the_wal() {
    let (first, _second, primary) = pair(4096);
    let sql = Sql::open(&primary);
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data); INSERT INTO t VALUES (1, 'kept')").unwrap();
    let name = primary.path.display().to_string();
    for _ in 0..3 {
        // The same bytes at the same place each time: the frame's data may lie there already when its header comes.
        first.log.answer(Answer::Refuse);
        sql.run("INSERT INTO t VALUES (2, zeroblob(9000))").unwrap_err();
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("copy.db");
        let copy_wal = folder.path().join("copy.db-wal");
        for (from, to) in [(name.clone(), &copy), (format!("{name}-wal"), &copy_wal)] {
            assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
        }
        assert_eq!(Sql::open_with(&copy, None).unwrap().text("SELECT group_concat(id) FROM t"), "1");
    }
}

#[test]
fn an_unknown_outcome_fences_and_the_log_decides() {
    for kept in [false, true] {
        let (mut first, mut second, primary) = pair(4096);
        let sql = Sql::open(&primary);
        sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
        first.log.answer(Answer::Unknown { kept });
        assert_eq!(sql.run("INSERT INTO t(data) VALUES ('perhaps')").unwrap_err().0, IOERR_WRITE);
        assert!(primary.gate().is_fenced());
        assert_eq!(sql.number("SELECT count(*) FROM t"), 0);
        assert_eq!(sql.run("INSERT INTO t(data) VALUES ('no')").unwrap_err().0, IOERR_WRITE);
        assert!(Sql::open_with(&primary.path, Some(c"twistlock")).is_err(), "fenced: not opened");
        drop(sql);
        first.demote();
        let primary = first.promote();
        let sql = Sql::open(&primary);
        assert_eq!(sql.number("SELECT count(*) FROM t"), i64::from(kept));
        assert_equal(&mut first, &mut second);
    }
}

#[test]
fn a_fence_from_another_thread_stops_the_writer() {
    let (mut first, mut second, primary) = pair(4096);
    let sql = Sql::open(&primary);
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
    let gate = primary.gate().clone();
    let writer = std::thread::spawn(move || {
        let mut done = 0;
        while sql.run("INSERT INTO t(data) VALUES (randomblob(500))").is_ok() {
            done += 1;
        }
        (done, sql)
    });
    while gate.last_index() < 40 {
        std::thread::yield_now();
    }
    gate.fence();
    let (done, sql) = writer.join().unwrap();
    assert_eq!(sql.number("SELECT count(*) FROM t"), done, "what was acknowledged is there, and nothing else");
    drop(sql);
    first.demote();
    let primary = first.promote();
    assert_eq!(Sql::open(&primary).number("SELECT count(*) FROM t"), done);
    assert_equal(&mut first, &mut second);
}

#[test]
fn whatever_goes_around_the_log_is_refused() {
    let (first, _second, primary) = pair(4096);
    let sql = Sql::open(&primary);
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
    for pragma in [
        "journal_mode=DELETE",
        "journal_mode=off",
        "main.journal_mode='memory'",
        "locking_mode=EXCLUSIVE",
        "page_size=8192",
        "mmap_size=1000000",
        "wal_checkpoint(TRUNCATE)",
        "wal_checkpoint",
    ] {
        let (_, message) = sql.run(&format!("PRAGMA {pragma}")).unwrap_err();
        assert!(message.contains("this database is replicated"), "{pragma}: {message}");
    }
    for allowed in ["journal_mode", "journal_mode=WAL", "page_size", "locking_mode", "mmap_size=0", "user_version=7"] {
        sql.run(&format!("PRAGMA {allowed}")).unwrap();
    }
    assert_eq!(sql.text("PRAGMA journal_mode"), "wal");
    let elsewhere = first.folder.path().join("elsewhere.db");
    for name in [
        format!("'{}'", elsewhere.display()),
        format!("'file:{}?vfs=unix'", elsewhere.display()),
        format!("'{}' || ''", elsewhere.display()),
        format!("'{}'", primary.path.display()),
    ] {
        assert!(sql.run(&format!("ATTACH {name} AS x")).is_err(), "{name}");
        assert!(sql.run(&format!("VACUUM INTO {name}")).is_err(), "{name}");
    }
    assert!(!elsewhere.exists());
    sql.run("ATTACH ':memory:' AS x; CREATE TABLE x.y(z); DETACH x").unwrap();
    sql.run("CREATE TEMP TABLE mine(z); INSERT INTO mine VALUES (1)").unwrap();
    assert!(Sql::open_with(&elsewhere, Some(c"twistlock")).is_err(), "a database without a gate");
    for mode in [sqlite::SQLITE_CHECKPOINT_PASSIVE, sqlite::SQLITE_CHECKPOINT_FULL, sqlite::SQLITE_CHECKPOINT_TRUNCATE]
    {
        assert_eq!(sql.checkpoint(mode), sqlite::SQLITE_BUSY);
    }
}

#[test]
fn connections_that_come_and_go_do_not_checkpoint() {
    let (mut first, mut second, primary) = pair(4096);
    for round in 0..5 {
        let sql = Sql::open(&primary);
        sql.run("PRAGMA wal_autocheckpoint=1").unwrap();
        sql.run(&format!("CREATE TABLE t{round}(data); INSERT INTO t{round} VALUES (randomblob(9000))")).unwrap();
        drop(sql);
        second.follow();
        assert_eq!(first.database.checkpointed(), 0);
        assert_eq!(std::fs::metadata(first.database.path()).unwrap().len(), 4096);
    }
    // Nor does the last one of all, our own.
    first.demote();
    assert_eq!(std::fs::metadata(first.database.path()).unwrap().len(), 4096);
    first.promote();
    assert_equal(&mut first, &mut second);
}

/// Pages that were allocated and freed in one transaction, where the primary's file still has old bytes from when it
/// was larger. SQLite writes such pages in WAL mode; if it ever stopped, the gate would refuse the transaction.
#[test]
fn pages_allocated_and_freed_at_once_are_the_same_everywhere() {
    for checkpoint_between in [false, true] {
        let (mut first, mut second, primary) = pair(4096);
        let sql = Sql::open(&primary);
        sql.run("PRAGMA cache_size=100000; CREATE TABLE t(id INTEGER PRIMARY KEY, data); CREATE TABLE keep(data)")
            .unwrap();
        let fill = fill("t(data)", 300, 4000);
        sql.run(&fill).unwrap();
        if checkpoint_between {
            assert_equal(&mut first, &mut second);
        }
        sql.run("DELETE FROM t; VACUUM").unwrap();
        let small = sql.number("PRAGMA page_count");
        sql.run(&format!("BEGIN; {fill}; INSERT INTO keep VALUES (randomblob(9000)); DELETE FROM t; COMMIT")).unwrap();
        assert!(sql.number("PRAGMA page_count") > small + 250);
        assert_equal(&mut first, &mut second);
        sql.run(&fill).unwrap();
        assert_equal(&mut first, &mut second);
    }
}

#[test]
fn a_long_reader_holds_the_checkpoint_back_and_keeps_its_view() {
    let (mut first, mut second, primary) = pair(4096);
    let (sql, reader) = (Sql::open(&primary), Sql::open(&primary));
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data); INSERT INTO t(data) VALUES (randomblob(90000))").unwrap();
    first.checkpoint_all();
    let before = first.database.checkpointed();
    reader.run("BEGIN").unwrap();
    assert_eq!(reader.number("SELECT count(*) FROM t"), 1);
    sql.run("INSERT INTO t(data) VALUES (1); DELETE FROM t WHERE id = 1; VACUUM").unwrap();
    sql.run("INSERT INTO t(data) VALUES (randomblob(40000)), (randomblob(40000))").unwrap();
    for _ in 0..2 {
        let checkpoint = first.database.checkpoint().unwrap();
        assert!(!checkpoint.complete);
        assert_eq!(checkpoint.index, before);
        assert_eq!(reader.number("SELECT count(*) FROM t"), 1);
        assert_eq!(reader.number("SELECT sum(length(data)) FROM t"), 90000);
        assert_eq!(reader.text("PRAGMA integrity_check"), "ok");
    }
    reader.run("COMMIT").unwrap();
    assert_equal(&mut first, &mut second);
    assert!(first.database.checkpointed() > before);
}

/// Checkpoints beside writers that never stop: whatever index one names, the file is the database at that index.
#[test]
fn a_checkpoint_names_exactly_what_the_file_holds() {
    let (mut first, mut second, primary) = pair(512);
    let sql = Sql::open(&primary);
    sql.run("CREATE TABLE t0(data); CREATE TABLE t1(data); CREATE TABLE keep(data)").unwrap();
    sql.run("PRAGMA auto_vacuum=1; VACUUM").unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let stop = &stop;
    let (mut exact, mut nothing_new, mut tries) = (0, 0, 0);
    std::thread::scope(|scope| {
        for writer in 0..2 {
            let sql = Sql::open(&primary);
            sql.run("PRAGMA busy_timeout=5000").unwrap();
            scope.spawn(move || {
                let mut round = 0;
                while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    round += 1;
                    let size = 1000 + round * 997 % 9000;
                    let text = match round % 4 {
                        0 => format!("DELETE FROM t{writer}"),
                        // Pages that are allocated and freed at once.
                        1 => format!(
                            "BEGIN IMMEDIATE; INSERT INTO t{writer} VALUES (randomblob(30000)); \
                             INSERT INTO keep VALUES (randomblob({size})); DELETE FROM t{writer}; COMMIT"
                        ),
                        2 if round % 16 == 2 => "DELETE FROM keep".to_owned(),
                        _ => format!("INSERT INTO t{writer} VALUES (randomblob({size}))"),
                    };
                    sql.run(&text).unwrap();
                }
            });
        }
        let start = Instant::now();
        while exact < 40 && start.elapsed() < Duration::from_secs(4) {
            tries += 1;
            let before = first.database.checkpointed();
            let checkpoint = first.database.checkpoint().unwrap();
            nothing_new += u32::from(checkpoint.complete && checkpoint.index == before);
            if checkpoint.complete && checkpoint.index > before {
                exact += 1;
                second.follow_to(checkpoint.index);
                assert_same_beginning(&first.database, &second.database);
            }
        }
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
    });
    println!(
        "{exact} of {tries} checkpoints moved on, {nothing_new} had nothing to do, {} commits",
        first.log.last_index()
    );
    assert!(exact > 3);
    assert_equal(&mut first, &mut second);
}

#[test]
fn the_wal_starts_again_after_a_checkpoint() {
    let (mut first, mut second, primary) = pair(1024);
    let sql = Sql::open(&primary);
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
    let mut largest = 0;
    for round in 0..20 {
        // A rollback that spilled, right after the restart: its frames are written over without a word.
        sql.run("PRAGMA cache_size=2; BEGIN").unwrap();
        sql.run("INSERT INTO t(data) VALUES (randomblob(30000)), (randomblob(30000)); ROLLBACK").unwrap();
        first.log.answer(if round % 3 == 0 { Answer::Refuse } else { Answer::Accept });
        let refused = sql.run("INSERT INTO t(data) VALUES (randomblob(9000))").is_err();
        assert_eq!(refused, round % 3 == 0);
        sql.run("INSERT INTO t(data) VALUES (randomblob(20000)); DELETE FROM t WHERE id % 3 = 0").unwrap();
        assert_equal(&mut first, &mut second);
        largest = largest.max(first.database.checkpoint().unwrap().frames);
    }
    assert!(largest < 300, "{largest} frames: the WAL never started again");
}

/// A writer that never pauses: without help, every checkpoint would leave the frames that were written during it, and
/// SQLite would never start the WAL again.
#[test]
fn the_wal_starts_again_under_load() {
    const TRANSACTIONS: u32 = 600;
    const TEXT: u32 = 500_000;
    let (mut first, mut second, primary) = pair(4096);
    let sql = Sql::open(&primary);
    sql.run("PRAGMA busy_timeout=5000; CREATE TABLE t(data); INSERT INTO t VALUES (NULL)").unwrap();
    let (sender, due) = std::sync::mpsc::channel();
    let writer = std::thread::spawn(move || {
        for round in 1..=TRANSACTIONS {
            let (half, digit) = (TEXT / 2, round % 10);
            sql.run(&format!("UPDATE t SET data = replace(hex(zeroblob({half})), '0', '{digit}')")).unwrap();
            if round % 16 == 0 {
                sender.send(()).unwrap();
            }
        }
        sql
    });
    let mut largest = 0;
    while due.recv().is_ok() {
        due.try_iter().for_each(drop);
        largest = largest.max(first.database.wal_bytes());
        let checkpoint = first.database.checkpoint().unwrap();
        if checkpoint.complete {
            second.follow_to(checkpoint.index);
            assert_same_beginning(&first.database, &second.database);
        }
    }
    let sql = writer.join().unwrap();
    let written = u64::from(TRANSACTIONS) * u64::from(TEXT);
    println!("the WAL had up to {largest} of {written} bytes");
    assert!(largest < 128 << 20, "the WAL has grown to {largest} of {written} bytes");
    assert_equal(&mut first, &mut second);
    drop(sql);
    first.demote();
    assert_eq!(first.database.wal_bytes(), 0);
}

#[test]
fn a_crash_at_any_point_ends_in_the_same_file() {
    let (mut first, mut second, primary) = pair(512);
    let sql = Sql::open(&primary);
    sql.run("PRAGMA cache_size=2; CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
    for round in 0..30 {
        sql.run("INSERT INTO t(data) VALUES (randomblob(abs(random()) % 20000))").unwrap();
        if round % 7 == 3 {
            sql.run("DELETE FROM t WHERE id % 2 = 0; VACUUM").unwrap();
        }
        if round % 5 == 2 {
            first.database.checkpoint().unwrap();
        }
        if round % 4 == 1 {
            second.follow();
            second.database.checkpoint().unwrap();
        }
        if round % 3 == 0 {
            second.follow();
            second.crash();
        }
    }
    assert_equal(&mut first, &mut second);
    // The primary goes down without a checkpoint: its file is behind, its WAL is thrown away.
    sql.run("INSERT INTO t(data) VALUES (randomblob(70000))").unwrap();
    let rows = sql.number("SELECT count(*) FROM t");
    drop(sql);
    first.demote();
    let primary = first.promote();
    assert_eq!(Sql::open(&primary).number("SELECT count(*) FROM t"), rows);
    assert_equal(&mut first, &mut second);
}

/// Power fails while pages are written: of each page any state since the checkpoint may be on the disk, and of the
/// file any length. Feeding the entries again must repair all of it.
#[test]
fn a_torn_file_is_repaired_by_the_log() {
    let (mut first, mut second, primary) = pair(512);
    let sql = Sql::open(&primary);
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
    sql.run("INSERT INTO t(data) VALUES (randomblob(40000)), (randomblob(40000))").unwrap();
    second.follow();
    second.database.checkpoint().unwrap();
    let mut states = vec![std::fs::read(second.database.path()).unwrap()];
    let fill = "BEGIN; INSERT INTO t(data) VALUES (randomblob(50000)); DELETE FROM t WHERE id > 3; COMMIT";
    for text in [
        "UPDATE t SET data = randomblob(20000) WHERE id = 1",
        "DELETE FROM t WHERE id = 2; VACUUM",
        fill,
        "INSERT INTO t(data) VALUES (randomblob(60000))",
        "DELETE FROM t WHERE id > 1; VACUUM",
        fill,
    ] {
        sql.run(text).unwrap();
        second.follow();
        states.push(std::fs::read(second.database.path()).unwrap());
    }
    let last = states.last().unwrap().clone();
    let mut random = 1u64;
    let mut pick = |limit: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % limit
    };
    for _ in 0..60 {
        let length = states[pick(states.len())].len();
        let mut torn = Vec::new();
        while torn.len() < length {
            let state = &states[pick(states.len())];
            torn.extend_from_slice(state.get(torn.len()..torn.len() + 512).unwrap_or(&[0; 512]));
        }
        std::fs::write(second.database.path(), torn).unwrap();
        second.crash();
        second.follow();
        assert!(std::fs::read(second.database.path()).unwrap() == last);
    }
    assert_equal(&mut first, &mut second);
    // A primary starts with a file that a lost state has made longer, and nothing comes after the checkpoint.
    second.database.checkpoint().unwrap();
    let mut longer = std::fs::read(second.database.path()).unwrap();
    longer.extend_from_slice(&[7; 5120]);
    std::fs::write(second.database.path(), longer).unwrap();
    second.crash();
    drop(sql);
    first.demote();
    let primary = second.promote();
    Sql::open(&primary).run("INSERT INTO t(data) VALUES (1)").unwrap();
    assert_equal(&mut second, &mut first);
}

#[test]
fn roles_change_hands() {
    let (mut first, mut second, primary) = pair(4096);
    let sql = Sql::open(&primary);
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
    drop(sql);
    first.demote();
    for round in 0..6 {
        let (old, new) = if round % 2 == 0 { (&mut first, &mut second) } else { (&mut second, &mut first) };
        let primary = new.promote();
        let sql = Sql::open(&primary);
        sql.run(&format!("INSERT INTO t(data) VALUES ({round}), (randomblob(9000))")).unwrap();
        assert_eq!(sql.number("SELECT count(*) FROM t"), 2 * (round + 1));
        old.follow();
        if round % 3 == 1 {
            new.database.checkpoint().unwrap();
        }
        drop(sql);
        new.demote();
        new.follow();
        assert_same_files(&new.database, &old.database);
        assert_sound(&new.database);
    }
}

/// A checkpoint is saved while the database goes on, changes its role, or goes back to the one before: what counts is what was
/// whole when it began.
#[test]
fn a_checkpoint_is_saved_while_the_role_changes() {
    let (mut first, mut second, primary) = pair(4096);
    let sql = Sql::open(&primary);
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
    second.follow();
    let write = || sql.run("INSERT INTO t(data) VALUES (randomblob(20000))").unwrap();
    // It follows, and is ahead of the checkpoint when that is saved.
    let (reached, saving) = second.database.begin_checkpoint().unwrap();
    assert!(reached.index < second.database.applied());
    assert!(matches!(second.database.begin_checkpoint(), Err(DatabaseError::Refused(_))));
    let index = second.database.applied();
    write();
    second.follow();
    second.database.saved(saving.unwrap().save()).unwrap();
    assert_eq!(second.database.checkpointed(), index);
    second.crash();
    assert_eq!(second.database.applied(), index);
    second.follow();
    assert_equal(&mut first, &mut second);
    // It serves, and has gone back to the checkpoint before when this one is saved.
    first.database.checkpoint().unwrap();
    write();
    let before = first.database.checkpointed();
    let saving = first.database.begin_checkpoint().unwrap().1.expect("something was written");
    drop(sql);
    first.demote();
    first.database.saved(saving.save()).unwrap();
    assert_eq!((first.database.checkpointed(), first.database.applied()), (before, before));
    first.follow();
    second.follow();
    assert_equal(&mut first, &mut second);
    // The record on the disk is the newer one: another start begins there.
    first.crash();
    assert!(first.database.applied() > before);
    first.follow();
    assert_equal(&mut first, &mut second);
    assert_sound(&first.database);
}

#[test]
fn an_open_connection_makes_the_demotion_miss_its_deadline() {
    let (mut first, _second, primary) = pair(4096);
    let sql = Sql::open(&primary);
    let deadline = Instant::now() + Duration::from_millis(30);
    assert!(matches!(first.database.demote(deadline), Err(DatabaseError::StillOpen { connections: 1 })));
    let waiter = std::thread::spawn(move || drop(sql));
    first.demote();
    waiter.join().unwrap();
}

/// In a process of its own: memory of other tests must not count.
#[test]
fn a_large_transaction_needs_little_memory() {
    const CHILD: &str = "MEASURE_MEMORY";
    if std::env::var_os(CHILD).is_none() {
        let output = Command::new(std::env::current_exe().unwrap())
            .arg("a_large_transaction_needs_little_memory")
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        return;
    }
    let (first, _second, primary) = pair(4096);
    let sql = Sql::open(&primary);
    sql.run("PRAGMA cache_size=100; CREATE TABLE t(data); INSERT INTO t VALUES (zeroblob(10000))").unwrap();
    first.log.forget_content();
    let before = resident();
    sql.run(&format!("BEGIN; {}; COMMIT", fill("t(data)", 6400, 10_000))).unwrap();
    let grown = resident().saturating_sub(before);
    assert!(first.log.last_index() > 60, "many parts");
    assert!(first.log.largest_part() <= twistlock_ha::storage::transaction::MAX_PART);
    assert!(grown < 12 << 20, "memory grew by {grown} bytes for a transaction of 64 MB");
    assert_eq!(sql.number("SELECT count(*) FROM t"), 6401);
}

/// SQL that inserts many rows of random bytes.
fn fill(target: &str, rows: u32, bytes: u32) -> String {
    format!(
        "INSERT INTO {target} WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n LIMIT {rows}) \
         SELECT randomblob({bytes}) FROM n"
    )
}

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn a_transaction_of_many_parts_survives_interruptions() {
    let (mut first, mut second, primary) = pair(4096);
    let sql = Sql::open(&primary);
    sql.run("PRAGMA cache_size=2; CREATE TABLE t(data)").unwrap();
    let big = &fill("t", 500, 9000);
    // Refused at its last part: the earlier ones are in the log and mean nothing.
    first.log.answer(Answer::Refuse);
    let before = first.log.last_index();
    sql.run(big).unwrap_err();
    assert!(first.log.last_index() > before + 2);
    second.follow();
    let checkpoint = second.database.checkpoint().unwrap();
    assert_eq!(checkpoint.index, before, "not inside a transaction");
    second.crash();
    sql.run(big).unwrap();
    assert_equal(&mut first, &mut second);
    // An epoch ends in the middle.
    first.log.answer(Answer::Unknown { kept: false });
    sql.run(big).unwrap_err();
    drop(sql);
    first.demote();
    let primary = first.promote();
    assert_eq!(Sql::open(&primary).number("SELECT count(*) FROM t"), 500);
    assert_equal(&mut first, &mut second);
}

#[test]
fn a_bit_flip_on_a_secondary_is_found() {
    let (first, mut second, primary) = pair(4096);
    let sql = Sql::open(&primary);
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data); INSERT INTO t(data) VALUES (randomblob(9000))").unwrap();
    second.follow();
    second.database.checkpoint().unwrap();
    let mut bytes = std::fs::read(second.database.path()).unwrap();
    bytes[9000] ^= 1; // An overflow page that the next transaction does not write.
    std::fs::write(second.database.path(), bytes).unwrap();
    second.crash();
    sql.run("INSERT INTO t(data) VALUES (1)").unwrap();
    let index = first.log.last_index();
    let (term, payload) = first.log.entry(index).unwrap();
    let error = second.database.apply(index, term, &payload, &*first.log).unwrap_err();
    assert!(matches!(error, ApplyError::Diverged { index: at, .. } if at == index), "{error}");
    assert!(matches!(second.database.apply_empty(index + 1, term), Err(ApplyError::Failed(_))));
}

#[test]
fn an_impossible_entry_is_an_error() {
    let log = new_log(4096);
    let mut node = Node::new(&log);
    assert!(node.database.is_empty());
    assert!(matches!(node.database.promote(1, log.clone()), Err(DatabaseError::Refused(_))));
    node.follow();
    assert!(!node.database.is_empty());
    let (term, payload) = log.entry(1).unwrap();
    assert!(matches!(node.database.apply(1, term, &payload, &*log), Err(ApplyError::OutOfOrder { .. })));
    node.crash();
    assert!(node.database.is_empty(), "never checkpointed");
    assert!(matches!(node.database.apply(1, term, &payload[..99], &*log), Err(ApplyError::Command { .. })));
}

/// The way the Console does it.
#[tokio::test]
async fn sqlx_commits_through_the_gate() {
    use sqlx::{Connection, Row, SqliteConnection};
    let (mut first, mut second, primary) = pair(4096);
    let mut connection = SqliteConnection::connect_with(&connect_options(&primary)).await.unwrap();
    sqlx::query("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").execute(&mut connection).await.unwrap();
    sqlx::query("INSERT INTO t(data) VALUES (?)").bind("a").execute(&mut connection).await.unwrap();
    first.log.answer(Answer::Refuse);
    let mut transaction = connection.begin().await.unwrap();
    sqlx::query("INSERT INTO t(data) VALUES (?)").bind("b").execute(&mut *transaction).await.unwrap();
    transaction.commit().await.unwrap_err();
    sqlx::query("INSERT INTO t(data) VALUES (?)").bind("c").execute(&mut connection).await.unwrap();
    let row = sqlx::query("SELECT group_concat(data) FROM t").fetch_one(&mut connection).await.unwrap();
    assert_eq!(row.get::<String, _>(0), "a,c");
    connection.close().await.unwrap();
    assert_equal(&mut first, &mut second);
    first.demote();
}
