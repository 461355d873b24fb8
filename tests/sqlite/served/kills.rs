//! Processes of the application that are killed while the folder goes on: what a majority has is what the next process
//! finds, and what the one that lives on has not seen is taken back before it writes. Nobody is fenced for that.

use std::{
    io::{BufRead, BufReader, Lines, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use twistlock_ha::storage::{ReplicateError, Replicator, folder::Trace};

use super::{
    super::support::{Answer, Log, Sql},
    MODES, Site, digest_of,
};

const DIGEST: &str = "SELECT count(*) || ':' || coalesce(sum(length(data)), 0) || ':' || coalesce(sum(id), 0) FROM t";

/// A process that runs the SQL that it is sent, with SQLite as it comes.
pub(super) struct Process {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Process {
    pub fn start(site: &Site, name: &str) -> Self {
        let program = "import sqlite3, sys\n\
                       db = sqlite3.connect(sys.argv[1], isolation_level=None)\n\
                       db.execute('PRAGMA cache_size=5')\n\
                       for line in sys.stdin:\n    \
                       try: print([db.execute(s).fetchall() for s in line.split(';')], flush=True)\n    \
                       except sqlite3.Error as error: print('refused', error, flush=True)";
        let mut command = Command::new("python3");
        command.args(["-c", program]).arg(site.path(name)).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { child, input, output: BufReader::new(output).lines() }
    }

    /// What it was told, if it lived to hear it.
    pub fn run(&mut self, sql: &str) -> Option<String> {
        writeln!(self.input, "{sql}").ok()?;
        self.output.next()?.ok()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The raft log; kills a process inside of its next commit: it is dead once the call is answered.
struct Killing {
    log: Arc<Log>,
    next: Mutex<Option<Pid>>,
}

impl Replicator for Killing {
    fn replicate(&self, part: Vec<u8>, last: bool) -> Result<u64, ReplicateError> {
        if last && let Some(pid) = self.next.lock().unwrap().take() {
            kill(pid, Signal::SIGKILL).unwrap();
        }
        self.log.replicate(part, last)
    }
}

struct Stage {
    site: Site,
    killing: Arc<Killing>,
}

impl Stage {
    fn new(mode: &str, page_size: u32) -> Self {
        let mut site = Site::new();
        let killing = Arc::new(Killing { log: Arc::clone(&site.log), next: Mutex::new(None) });
        site.serve_by(Arc::<Killing>::clone(&killing));
        let sql = site.open("x.db");
        sql.run(&format!("PRAGMA page_size={page_size}; PRAGMA journal_mode={mode}")).unwrap();
        sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data); INSERT INTO t(data) VALUES (1)").unwrap();
        Self { site, killing }
    }

    /// Another process runs this, and is killed inside of its commit. `prepared` is done before.
    fn kill_in(&self, prepared: &str, sql: &str) {
        let mut writer = Process::start(&self.site, "x.db");
        assert!(writer.run(prepared).is_some());
        *self.killing.next.lock().unwrap() = Some(writer.pid());
        assert_eq!(writer.run(sql), None, "it was killed before it could say anything");
        assert!(self.killing.next.lock().unwrap().is_none());
    }

    /// What the members have.
    fn replicated(&mut self) -> String {
        self.site.follower.follow(&self.site.log);
        let path = self.site.follower.members.iter().next().unwrap().path().to_owned();
        digest_of(&path, DIGEST)
    }

    fn is_fenced(&self) -> bool {
        self.site.registry().passage().is_fenced()
    }
}

const SMALL: &str = "INSERT INTO t(data) VALUES ('small')";
/// Pages are written into the WAL more than once before the commit, so that checksums are written again behind it.
const AGAIN: &str = "BEGIN;INSERT INTO t(data) WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n LIMIT 90) \
                     SELECT hex(zeroblob(i * 20)) FROM n;UPDATE t SET data = data || 'x';UPDATE t SET data = data || 'y';COMMIT";
const STATEMENTS: [&str; 3] = [
    "INSERT INTO t(data) VALUES (zeroblob(100))",
    "INSERT INTO t(data) WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n LIMIT 12) SELECT zeroblob(i * 90) FROM n;\
     UPDATE t SET data = zeroblob(800);UPDATE t SET data = zeroblob(801)",
    "DELETE FROM t WHERE id % 2 = 0",
];
const SHRINKS: &str = "BEGIN;DELETE FROM t WHERE id > 3;PRAGMA incremental_vacuum;COMMIT";

#[test]
fn a_commit_whose_writer_was_killed_is_what_the_next_process_finds() {
    for (mode, page_size) in MODES.iter().flat_map(|mode| [512, 4096, 16384].map(|size| (mode, size))) {
        let mut stage = Stage::new(mode, page_size);
        for sql in [SMALL, AGAIN, "UPDATE t SET data = 'short'", SMALL, "VACUUM", AGAIN, "DELETE FROM t WHERE id > 5"] {
            let what = format!("{mode} {page_size}: {sql}");
            stage.kill_in("SELECT 1", sql);
            let replicated = stage.replicated();
            // As a crash of all leaves it, and as the folder shows it.
            assert_eq!(digest_of(&stage.site.below("x.db"), DIGEST), replicated, "{what}");
            let next = stage.site.open("x.db");
            assert_eq!(next.text(DIGEST), replicated, "{what}");
            assert_eq!(next.text("PRAGMA integrity_check"), "ok", "{what}");
            // The killed process had no time to cut the file.
            next.run("VACUUM").unwrap_or_else(|error| panic!("{what}: {error:?}, {}", stage.site.refusal()));
            assert!(!stage.is_fenced(), "{what}: {}", stage.site.refusal());
            drop(next);
            stage.site.compare();
        }
    }
}

#[test]
fn a_commit_that_nobody_who_lives_has_seen_is_taken_back_before_the_next_write() {
    let writes = [
        SMALL,
        "INSERT INTO t(data) VALUES ('other')",
        AGAIN,
        "BEGIN;DELETE FROM t WHERE id % 2;INSERT INTO t(data) VALUES (hex(zeroblob(90000)));ROLLBACK;INSERT INTO t(data) VALUES (7)",
        "PRAGMA wal_checkpoint(PASSIVE);INSERT INTO t(data) VALUES (8)",
        "PRAGMA wal_checkpoint(RESTART);INSERT INTO t(data) VALUES (9)",
        "PRAGMA wal_checkpoint(RESTART);BEGIN;INSERT INTO t(data) VALUES (9);ROLLBACK;INSERT INTO t(data) VALUES (10)",
    ];
    let all = [("WAL", 512), ("WAL", 4096), ("WAL", 16384), ("DELETE", 4096), ("TRUNCATE", 4096), ("PERSIST", 1024)];
    for (mode, page_size) in all {
        let mut stage = Stage::new(mode, page_size);
        let lives = stage.site.open("x.db");
        lives.run("PRAGMA cache_size=5; PRAGMA wal_autocheckpoint=0").unwrap();
        let killed = match (mode, page_size) {
            ("WAL", 4096) => &[SMALL, AGAIN, SHRINKS, "VACUUM"][..],
            ("WAL", 512) => &[SMALL, AGAIN],
            _ => &[AGAIN],
        };
        for (killed, next) in killed.iter().flat_map(|killed| writes.map(|next| (killed, next))) {
            let what = format!("{mode} {page_size}: {killed}, then {next}");
            let before = lives.text(DIGEST);
            stage.kill_in("SELECT 1", killed);
            let replicated = stage.replicated();
            let seen = lives.text(DIGEST);
            assert!(seen == before || seen == replicated, "{what}");
            // One after the other, as each may be refused.
            for statement in next.split(';') {
                let refused = |error| panic!("{what}: {error:?}, {}", stage.site.refusal());
                lives.run(statement).unwrap_or_else(refused);
            }
            assert!(!stage.is_fenced(), "{what}: {}", stage.site.refusal());
            assert_eq!(lives.text("PRAGMA integrity_check"), "ok", "{what}");
            let digest = lives.text(DIGEST);
            assert_eq!(stage.replicated(), digest, "{what}");
            // Another one agrees, and a crash does.
            assert_eq!(Process::start(&stage.site, "x.db").run(DIGEST), Some(format!("[[('{digest}',)]]")), "{what}");
            assert_eq!(digest_of(&stage.site.below("x.db"), DIGEST), digest, "{what}");
        }
        lives.run("VACUUM").unwrap();
        drop(lives);
        stage.site.compare();
    }
}

/// A folder that kills a process at one of its calls.
struct Trap {
    site: Site,
    calls: Arc<AtomicU64>,
    left: Arc<AtomicU64>,
    victim: Arc<Mutex<Option<Pid>>>,
}

impl Trap {
    fn new(mode: &str) -> (Self, Sql) {
        let mut site = Site::new();
        let (calls, left, victim) = (Arc::default(), Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(None)));
        let trap = (Arc::<AtomicU64>::clone(&calls), Arc::clone(&left), Arc::clone(&victim));
        let trace: Trace = Arc::new(move |_| {
            trap.0.fetch_add(1, Ordering::SeqCst);
            let left = trap.1.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
            if left == Ok(1)
                && let Some(pid) = *trap.2.lock().unwrap()
            {
                kill(pid, Signal::SIGKILL).unwrap();
            }
        });
        let log: Arc<dyn Replicator> = Arc::<Log>::clone(&site.log);
        site.serve_traced(log, Some(trace));
        let sql = site.open("x.db");
        sql.run(&format!("PRAGMA page_size=1024; PRAGMA journal_mode={mode}")).unwrap();
        sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data); CREATE TABLE done(round, number)").unwrap();
        (Self { site, calls, left, victim }, sql)
    }

    /// Runs the workload in a process that is killed at this call. Returns how many transactions it was told of, and
    /// whether it has come to its end.
    fn kill_at(&self, call: u64) -> (usize, bool) {
        self.left.store(call, Ordering::SeqCst);
        let mut process = Process::start(&self.site, "x.db");
        *self.victim.lock().unwrap() = Some(process.pid());
        let told = STATEMENTS.iter().enumerate().take_while(|(number, statement)| {
            let insert = format!("INSERT INTO done VALUES ({call}, {number})");
            let checkpoint = ["SELECT 1", "PRAGMA wal_checkpoint(RESTART)"][number % 2];
            let answer = process.run(&format!("BEGIN;{statement};{insert};COMMIT;{checkpoint}"));
            answer.is_some_and(|answer| {
                assert!(!answer.starts_with("refused"), "call {call}: {answer}, {}", self.site.refusal());
                true
            })
        });
        let told = told.count();
        *self.victim.lock().unwrap() = None;
        (told, told == STATEMENTS.len())
    }

    /// What a process finds that was told of so many transactions, and that it can go on.
    fn look(&mut self, looks: &Sql, call: u64, told: usize, what: &str) {
        let done = looks.number(&format!("SELECT count(*) FROM done WHERE round = {call}"));
        let whole = told == STATEMENTS.len();
        assert!(done == told as i64 || (!whole && done == told as i64 + 1), "{what}: {told} and {done}");
        let next = "INSERT INTO t(data) VALUES (zeroblob(700)); DELETE FROM t WHERE id % 3 = 0";
        looks.run(next).unwrap_or_else(|error| panic!("{what}: {error:?}, {}", self.site.refusal()));
        assert!(!self.site.registry().passage().is_fenced(), "{what}: {}", self.site.refusal());
        assert_eq!(looks.text("PRAGMA integrity_check"), "ok", "{what}");
        self.site.follower.follow(&self.site.log);
        let path = self.site.follower.members.iter().next().unwrap().path().to_owned();
        assert_eq!(digest_of(&path, DIGEST), looks.text(DIGEST), "{what}");
    }
}

/// A process is killed at calls all along its way, from its first look at the file on; with `EVERY` in the environment, at
/// each call. What it was told of is there, and at most one transaction more, for the next process and for one that was
/// there all the time.
#[test]
fn a_process_may_be_killed_at_any_call() {
    for (mode, alone) in MODES.iter().flat_map(|mode| [(mode, false), (mode, true)]) {
        let (mut trap, first) = Trap::new(mode);
        let lives = Some(first).filter(|_| !alone);
        let before = trap.calls.load(Ordering::SeqCst);
        assert_eq!(trap.kill_at(0), (STATEMENTS.len(), true));
        let calls = trap.calls.load(Ordering::SeqCst) - before;
        assert!(calls > 50, "{mode}: the workload does not do its work");
        let step = if std::env::var_os("EVERY").is_some() { 1 } else { calls / 12 };
        let mut killed = 0;
        for call in (1..calls).step_by(step as usize) {
            let what = format!("{mode}, alone: {alone}, call {call} of {calls}");
            let (told, whole) = trap.kill_at(call);
            killed += usize::from(!whole);
            match &lives {
                Some(lives) => trap.look(lives, call, told, &what),
                None => {
                    let next = trap.site.open("x.db");
                    trap.look(&next, call, told, &what);
                }
            }
        }
        println!("{mode}, alone: {alone}: killed {killed} times, {calls} calls");
        assert!(killed > 5, "{mode}: nobody was killed");
        let last = lives.unwrap_or_else(|| trap.site.open("x.db"));
        last.run("VACUUM").unwrap();
        drop(last);
        trap.site.compare();
    }
}

/// The file has the data of the commit already, so that its header alone would commit for whoever recovers the WAL.
#[test]
fn a_commit_that_is_tried_again_is_none_before_a_majority_has_it() {
    let same = "INSERT INTO t(data) VALUES ('same')";
    let (mut trap, first) = Trap::new("WAL");
    drop(first);
    for call in 1.. {
        let mut process = Process::start(&trap.site, "x.db");
        trap.site.log.answer(Answer::Refuse);
        let refused = process.run(same).unwrap();
        assert!(refused.starts_with("refused"), "{refused}");
        trap.left.store(call, Ordering::SeqCst);
        *trap.victim.lock().unwrap() = Some(process.pid());
        let told = process.run(same);
        *trap.victim.lock().unwrap() = None;
        let next = trap.site.open("x.db");
        trap.site.follower.follow(&trap.site.log);
        let path = trap.site.follower.members.iter().next().unwrap().path().to_owned();
        assert_eq!(next.text(DIGEST), digest_of(&path, DIGEST), "call {call}");
        next.run(SMALL).unwrap_or_else(|error| panic!("call {call}: {error:?}, {}", trap.site.refusal()));
        assert!(!trap.site.registry().passage().is_fenced(), "call {call}: {}", trap.site.refusal());
        if told.is_some() {
            assert!(call > 4, "a commit has more calls");
            break;
        }
    }
    let last = trap.site.open("x.db");
    last.run(SMALL).unwrap();
    drop(last);
    trap.site.compare();
}

/// A process was killed that had begun a journal. Whoever keeps none would write into its transaction, and never end it.
#[test]
fn a_journal_that_was_only_begun_lets_no_raw_write_pass() {
    let mut stage = Stage::new("DELETE", 4096);
    let mut process = Process::start(&stage.site, "x.db");
    assert!(process.run("BEGIN;INSERT INTO t(data) VALUES (2)").is_some());
    assert!(stage.site.below("x.db-journal").exists());
    drop(process);
    let sql = stage.site.open("x.db");
    sql.run("PRAGMA journal_mode=MEMORY").unwrap();
    sql.run("INSERT INTO t(data) VALUES (3)").unwrap_err();
    assert!(stage.site.refusal().contains("outside of a transaction"), "{}", stage.site.refusal());
    sql.run("PRAGMA journal_mode=DELETE").unwrap();
    assert_eq!(sql.number("SELECT count(*) FROM t"), 1);
    sql.run("INSERT INTO t(data) VALUES (4)").unwrap();
    assert_eq!(sql.text("PRAGMA journal_mode=WAL"), "wal");
    sql.run("INSERT INTO t(data) VALUES (5)").unwrap();
    drop(sql);
    stage.site.compare();
}
