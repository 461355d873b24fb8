//! A commit that the majority does not take leaves no trace, in any mode: not for the application, not for others, not
//! after a crash. One whose outcome is not known lets nothing pass any more.

use super::{super::support::Answer, MODES, Site, digest_of};

const DIGEST: &str = "SELECT count(*) || ':' || coalesce(total(length(data)), 0) || ':' || coalesce(sum(id), 0) FROM t";

#[test]
fn a_refusal_at_every_commit_leaves_no_trace() {
    for mode in MODES {
        for page_size in [512, 4096, 32768] {
            let mut site = Site::serving();
            let sql = site.open("x.db");
            sql.run(&format!("PRAGMA page_size={page_size}; PRAGMA journal_mode={mode}; PRAGMA cache_size=5")).unwrap();
            sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data); INSERT INTO t(data) VALUES (1)").unwrap();
            let other = site.open("x.db");
            for (number, statement) in [
                "INSERT INTO t(data) VALUES (randomblob(20))",
                "INSERT INTO t(data) VALUES (randomblob(100000))",
                "BEGIN; UPDATE t SET data = zeroblob(1 + id % 5000); INSERT INTO t(data) VALUES ('x'); COMMIT",
                "DELETE FROM t WHERE id % 2 = 0",
                "VACUUM",
                "CREATE INDEX i ON t(data)",
            ]
            .iter()
            .enumerate()
            {
                let what = format!("{mode} {page_size}: {statement}");
                let before = other.text(DIGEST);
                let last = site.log.last_index();
                site.log.answer(Answer::Refuse);
                sql.run(statement).expect_err(&what);
                assert_eq!(site.log.answered(), Answer::Accept, "{what}: a commit was refused");
                if sql.in_transaction() {
                    sql.run("ROLLBACK").unwrap();
                }
                // As a crash leaves it, before anybody has looked at it again.
                let crashed = digest_of(&site.below("x.db"), DIGEST);
                assert_eq!(crashed, before, "{what}: after a crash");
                assert_eq!(digest_of(&site.below("x.db"), "PRAGMA integrity_check"), "ok", "{what}");
                assert_eq!((sql.text(DIGEST), other.text(DIGEST)), (before.clone(), before), "{what}");
                assert!(site.log.last_commit() <= last, "{what}");
                // What was refused can be done again, and by another one.
                let again = if number % 2 == 0 { &sql } else { &other };
                again.run(statement).unwrap_or_else(|error| panic!("{what}: again: {error:?}, {}", site.refusal()));
                assert!(site.log.last_commit() > last, "{what}");
                assert_eq!(sql.text("PRAGMA integrity_check"), "ok", "{what}");
            }
            drop((sql, other));
            site.compare();
        }
    }
}

/// All that has the file open goes away, and the next one recovers what it finds.
#[test]
fn a_refused_commit_does_not_come_back_when_the_application_starts_again() {
    for mode in MODES {
        for page_size in [512, 1024, 4096, 16384] {
            let mut site = Site::serving();
            let path = site.path("x.db").display().to_string();
            let sql = site.open("x.db");
            sql.run(&format!("PRAGMA page_size={page_size}; PRAGMA journal_mode={mode}")).unwrap();
            sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data); INSERT INTO t(data) VALUES (1)").unwrap();
            let before = sql.text(DIGEST);
            drop(sql);
            for size in [10, 700, 5000, 40000] {
                site.log.answer(Answer::Refuse);
                // Dies without closing anything.
                let program = "import os, sqlite3, sys\n\
                               db = sqlite3.connect(sys.argv[1], isolation_level=None)\n\
                               try: db.execute('INSERT INTO t(data) VALUES (randomblob(?))', (int(sys.argv[2]),))\n\
                               except sqlite3.Error: os._exit(7)\n";
                let mut process = super::start_python(program, &[&path, &size.to_string()]);
                assert_eq!(process.wait().unwrap().code(), Some(7), "{mode} {page_size} {size}");
                let sql = site.open("x.db");
                assert_eq!(sql.text(DIGEST), before, "{mode} {page_size} {size}");
                assert_eq!(sql.text("PRAGMA integrity_check"), "ok");
            }
            site.compare();
        }
    }
}

#[test]
fn an_unknown_outcome_fences_all_databases_and_the_log_decides() {
    for (mode, kept) in MODES.iter().flat_map(|mode| [(mode, false), (mode, true)]) {
        let mut site = Site::serving();
        let (sql, other) = (site.open("x.db"), site.open("other.db"));
        for sql in [&sql, &other] {
            sql.run(&format!("PRAGMA journal_mode={mode}")).unwrap();
            sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data); INSERT INTO t(data) VALUES (1)").unwrap();
        }
        site.log.answer(Answer::Unknown { kept });
        sql.run("INSERT INTO t(data) VALUES (2)").unwrap_err();
        assert!(site.registry().passage().is_fenced());
        other.run("INSERT INTO t(data) VALUES (2)").unwrap_err();
        assert!(site.refusal().contains("no longer the primary"), "{}", site.refusal());
        drop((sql, other));
        site.end();
        site.serve();
        let (sql, other) = (site.open("x.db"), site.open("other.db"));
        assert_eq!(sql.number("SELECT count(*) FROM t"), 1 + i64::from(kept), "{mode}");
        assert_eq!(other.number("SELECT count(*) FROM t"), 1, "{mode}");
        sql.run("INSERT INTO t(data) VALUES (3)").unwrap();
        drop((sql, other));
        site.compare();
    }
}
