//! Two databases behind one raft log: a gate, a file and a checkpoint each, and one order of all transactions.

use std::{
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tempfile::TempDir;
use twistlock_ha::storage::{
    ReplicateError, Replicator,
    checkpoint::Saving,
    database::{Database, DatabaseError, PrimaryDatabase, initial_transaction},
    databases::Databases,
    transaction::{CONSOLE_DATABASE, Pages, database},
};

use super::support::{Log, Sql, assert_same_files, assert_sound};

const OTHER: u32 = 2;
/// Each has a page size of its own.
const ALL: [(u32, u32); 2] = [(CONSOLE_DATABASE, 4096), (OTHER, 1024)];

/// The raft log; the Console's database has a transaction between all parts of a long one of the other.
struct Between {
    log: Arc<Log>,
    console: Mutex<Option<Sql>>,
}

impl Replicator for Between {
    fn replicate(&self, part: Vec<u8>, last: bool) -> Result<u64, ReplicateError> {
        let of_other = database(&part) == Ok(OTHER);
        let index = self.log.replicate(part, last)?;
        if of_other
            && !last
            && let Some(console) = &*self.console.lock().unwrap()
        {
            console.run("INSERT INTO t(data) VALUES ('between')").unwrap();
        }
        Ok(index)
    }
}

/// A member with both databases.
struct Member {
    folder: TempDir,
    databases: Databases,
    log: Arc<Log>,
}

fn open(folder: &Path, log_last: u64) -> Databases {
    Databases::new(ALL.map(|(id, _)| (id, Database::open(folder, id, log_last).unwrap())))
}

impl Member {
    fn new(log: &Arc<Log>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { databases: open(folder.path(), 0), folder, log: Arc::clone(log) }
    }

    /// A process that was killed at this moment, and starts again with what was in its files.
    fn killed(&self) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Another process copies: closing a descriptor in this one drops SQLite's locks.
        let copied = Command::new("cp").arg("-a").arg(self.folder.path().join(".")).arg(folder.path()).status();
        assert!(copied.unwrap().success());
        Self { databases: open(folder.path(), self.log.last_index()), folder, log: Arc::clone(&self.log) }
    }

    fn follow_to(&mut self, last: u64) {
        while self.databases.applied() < last {
            let index = self.databases.applied() + 1;
            let (term, payload) = self.log.entry(index).unwrap();
            match payload.as_slice() {
                [] => self.databases.apply_empty(index, term).unwrap(),
                payload => self.databases.apply(index, term, payload, &*self.log).unwrap(),
            }
        }
    }

    fn follow(&mut self) {
        self.follow_to(self.log.last_index());
    }

    fn promote(&mut self) -> (Vec<Arc<PrimaryDatabase>>, Arc<Between>) {
        let between = Arc::new(Between { log: Arc::clone(&self.log), console: Mutex::new(None) });
        let term = self.log.new_term();
        self.follow();
        let replicator: Arc<dyn Replicator> = Arc::<Between>::clone(&between);
        (self.databases.promote(term, &replicator).unwrap().own, between)
    }

    /// Saves all that can be saved.
    fn checkpoint(&mut self) {
        let (savings, result) = self.databases.begin_checkpoint();
        result.unwrap();
        self.databases.saved(savings.into_iter().map(Saving::save).collect()).unwrap();
    }

    /// The whole log is applied, and all files are those of the other.
    fn assert_equal(&mut self, other: &Databases) {
        self.follow();
        for (mine, theirs) in self.databases.iter().zip(other.iter()) {
            mine.verify().unwrap();
            assert_eq!(mine.checksum(), theirs.checksum());
            assert_same_files(mine, theirs);
            assert_sound(mine);
        }
    }
}

/// A log in which both are founded.
fn new_log() -> Arc<Log> {
    let log = Log::new();
    ALL.iter()
        .flat_map(|(id, page_size)| initial_transaction(*id, *page_size).unwrap())
        .for_each(|part| log.push(part));
    log
}

/// A primary that has written to both, long transactions of one among short ones of the other. Returns the index of a part in the
/// middle of a long one, behind which the other database has gone on.
fn written(first: &mut Member) -> (Vec<Arc<PrimaryDatabase>>, u64) {
    let (primary, between) = first.promote();
    let [console, other] = [0, 1].map(|at| Sql::open(&primary[at]));
    for sql in [&console, &other] {
        sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
    }
    *between.console.lock().unwrap() = Some(console);
    for _ in 0..3 {
        other.run("INSERT INTO t(data) VALUES (randomblob(4000000))").unwrap();
        other.run("UPDATE t SET data = randomblob(9) WHERE id % 2 = 0").unwrap();
    }
    let console = between.console.lock().unwrap().take().unwrap();
    assert!(console.number("SELECT count(*) FROM t") >= 9, "parts of the other database stand between them");
    assert_eq!(other.number("SELECT count(*) FROM t"), 3);
    let third = |index: &u64| {
        let (_, payload) = first.log.entry(*index).unwrap();
        !payload.is_empty() && Pages::decode(&payload).is_ok_and(|part| (part.database, part.part) == (OTHER, 2))
    };
    let middle = (1..=first.log.last_index()).rfind(third).unwrap() + 1;
    assert_eq!(database(&first.log.entry(middle).unwrap().1), Ok(CONSOLE_DATABASE));
    (primary, middle)
}

#[test]
fn both_databases_of_all_members_are_equal() {
    let log = new_log();
    let (mut first, mut second) = (Member::new(&log), Member::new(&log));
    let (primary, _) = written(&mut first);
    assert_eq!(primary.iter().map(|database| database.id).collect::<Vec<_>>(), [CONSOLE_DATABASE, OTHER]);
    first.checkpoint();
    second.assert_equal(&first.databases);
    drop(primary);
    // The other way round, from the checkpoints of the first.
    first.databases.close(Instant::now() + Duration::from_secs(5)).unwrap();
    first.databases.reopen(&|| true).unwrap();
    drop(written_again(&mut second));
    second.checkpoint();
    first.assert_equal(&second.databases);
}

fn written_again(member: &mut Member) -> Vec<Arc<PrimaryDatabase>> {
    let (primary, _) = member.promote();
    for database in &primary {
        Sql::open(database).run("INSERT INTO t(data) VALUES (randomblob(5000)); DELETE FROM t WHERE id = 1").unwrap();
    }
    primary
}

/// In the middle of a long transaction of one of them, with whichever checkpoints it has by then; and a primary at its end.
#[test]
fn a_member_that_is_killed_goes_on_with_each_database_from_its_own_checkpoint() {
    let log = new_log();
    let mut first = Member::new(&log);
    let (_primary, middle) = written(&mut first);
    first.databases.note_committed(log.last_index());
    let as_it_was_written = first.killed();
    first.checkpoint();
    for mut killed in [as_it_was_written, first.killed()] {
        killed.assert_equal(&first.databases);
    }
    for saved in [vec![], vec![CONSOLE_DATABASE], vec![OTHER], vec![CONSOLE_DATABASE, OTHER]] {
        let mut second = Member::new(&log);
        second.follow_to(middle);
        for id in &saved {
            second.databases.get_mut(*id).unwrap().checkpoint().unwrap();
        }
        let mut again = second.killed();
        let (console, other) = (again.databases.console(), again.databases.get(OTHER).unwrap());
        assert_eq!(console.applied(), if saved.contains(&CONSOLE_DATABASE) { middle } else { 0 });
        assert!(other.applied() < middle, "its transaction had not ended");
        assert_eq!(other.applied() > 0, saved.contains(&OTHER));
        assert_eq!(again.databases.applied(), console.applied().min(other.applied()));
        again.follow_to(middle + 1);
        again.killed().assert_equal(&first.databases);
        again.assert_equal(&first.databases);
    }
}

#[test]
fn the_raft_log_is_needed_from_the_least_checkpoint_on() {
    let log = new_log();
    let mut first = Member::new(&log);
    let (primary, _) = written(&mut first);
    let [console, other] = [0, 1].map(|at| Sql::open(&primary[at]));
    first.databases.note_committed(log.last_index());
    first.checkpoint();
    let all = first.databases.checkpointed();
    assert_eq!(all, log.last_index(), "nobody holds anything back");
    // A reader of one keeps its checkpoint where it is.
    other.run("BEGIN").unwrap();
    assert_eq!(other.number("SELECT count(*) FROM t"), 3);
    let writer = Sql::open(&primary[1]);
    for sql in [&console, &writer] {
        sql.run("INSERT INTO t(data) VALUES ('later')").unwrap();
    }
    first.databases.note_committed(log.last_index());
    first.checkpoint();
    assert_eq!(first.databases.console().checkpointed(), log.last_index());
    assert_eq!(first.databases.checkpointed(), all);
    // Of one that nobody writes to, all that the others write is noted.
    other.run("COMMIT").unwrap();
    for _ in 0..3 {
        console.run("INSERT INTO t(data) VALUES ('much later')").unwrap();
    }
    first.databases.note_committed(log.last_index());
    first.checkpoint();
    assert_eq!(first.databases.checkpointed(), log.last_index());
    // Something that must not be passed, such as a change of the members, is no reason for a file not to rest.
    let before = log.last_index();
    log.push(Vec::new());
    for may_pass in [false, true] {
        first.databases.note_committed(log.last_index());
        first.databases.save_if(move |_| may_pass);
        assert!(first.databases.console_mut().checkpoint().unwrap().complete);
        let reached = if may_pass { log.last_index() } else { before };
        assert_eq!(first.databases.console().checkpointed(), reached);
    }
    first.killed().assert_equal(&first.databases);
}

#[test]
fn a_node_opens_all_of_its_databases_or_none() {
    let log = new_log();
    let (mut first, mut second) = (Member::new(&log), Member::new(&log));
    drop(written(&mut first));
    first.checkpoint();
    second.follow();
    let path = second.databases.get(OTHER).unwrap().path().to_owned();
    second.checkpoint();
    let sound = std::fs::read(&path).unwrap();
    let mut rotten = sound.clone();
    rotten[5000] ^= 1;
    std::fs::write(&path, rotten).unwrap();
    let mut again = second.killed();
    let replicator: Arc<dyn Replicator> = Arc::<Log>::clone(&log);
    let term = log.new_term();
    again.follow();
    let error = again.databases.promote(term, &replicator).unwrap_err();
    assert!(matches!(error, DatabaseError::Diverged { .. }), "{error}");
    let console = again.databases.console().path();
    assert!(Sql::open_with(console, Some(c"twistlock")).is_err(), "the Console's is not open either");
    again.follow();
    assert_eq!(again.databases.applied(), log.last_index(), "they follow on");
}
