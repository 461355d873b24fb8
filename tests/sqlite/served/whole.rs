//! All databases of a primary at one raft index, read while everybody writes: the Console's through our VFS, those of a
//! service through its folder.

use std::{
    fs::{self, File},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
};

use raft::eraftpb::ConfState;
use twistlock_ha::{
    cluster::{ClusterId, Member as ClusterMember, Membership},
    storage::{
        Replicator,
        checkpoint::Record,
        database::{Database, DatabaseError, PrimaryDatabase, initial_transaction},
        folder::{members::Members, rest::rest},
        raft_log::{Options, RaftLog, RealDisk},
        snapshot::{Course, Incoming, Manifest, Ready, Resting, Whole},
        transaction::{CONSOLE_DATABASE, database},
    },
};

use super::{super::support::Sql, Log, MODES, Site};

/// A primary with both.
struct Primary {
    site: Site,
    console: Database,
    primary: Arc<PrimaryDatabase>,
}

/// Feeds a member what the log has up to an index.
fn feed(console: &mut Database, members: &mut Members, log: &Log, last: u64) {
    for index in console.applied().min(members.applied()) + 1..=last {
        let (term, payload) = log.entry(index).unwrap();
        let of_console = !payload.is_empty() && database(&payload) == Ok(CONSOLE_DATABASE);
        if console.applied() < index {
            match of_console {
                true => console.apply(index, term, &payload, log).unwrap(),
                false => console.apply_empty(index, term).unwrap(),
            }
        }
        if members.applied() < index {
            match of_console || payload.is_empty() {
                true => members.apply_empty(index, term).unwrap(),
                false => members.apply(index, term, &payload, log).unwrap(),
            }
        }
    }
}

impl Primary {
    fn new() -> Self {
        let mut site = Site::new();
        let part = initial_transaction(CONSOLE_DATABASE, 4096).unwrap().remove(0);
        site.log.push(part);
        site.serve();
        let folder = site.root.path().join("console");
        fs::create_dir(&folder).unwrap();
        let mut console = Database::open(&folder, CONSOLE_DATABASE, 0).unwrap();
        let mut nobody = Members::open(&site.root.path().join("nobody"), 0).unwrap();
        feed(&mut console, &mut nobody, &site.log, site.log.last_index());
        let log: Arc<dyn Replicator> = Arc::<Log>::clone(&site.log);
        let primary = console.promote(site.log.entry(site.log.last_index()).unwrap().0, log).unwrap();
        Self { site, console, primary }
    }

    /// Tries until it is not too busy.
    fn rest(&mut self) -> Whole {
        for _ in 0..200 {
            self.console.note_committed(self.site.log.last_index());
            match rest(&mut self.console, &self.site.primary.members, self.site.registry()) {
                Ok(whole) => return whole,
                Err(DatabaseError::Refused(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
        panic!("the databases are busy for ever");
    }

    fn manifest(&self, whole: &Whole) -> Manifest {
        let member = ClusterMember::founder(1, "host1", "127.0.0.1", 8086);
        Manifest {
            record: whole.console.record(),
            service: whole.service_part(),
            term: self.site.log.entry(whole.index()).unwrap().0,
            conf: ConfState { voters: vec![1], learners: vec![3], ..ConfState::default() },
            conf_index: 1,
            membership: Membership::founded(ClusterId(7), vec![member]),
            membership_index: 1,
            epoch: 2,
            cluster_key: None,
        }
    }
}

/// The whole content, whose checksum must be that of the record.
fn read(resting: &Resting) -> Vec<u8> {
    let Record { page_size, pages, checksum, .. } = resting.record();
    let (mut all, mut chunk, mut sum) = (Vec::new(), Vec::new(), 0);
    while all.len() < pages as usize * page_size as usize {
        sum ^= resting.read((all.len() / page_size as usize) as u32, &mut chunk).unwrap();
        all.extend_from_slice(&chunk);
    }
    assert_eq!(sum, checksum);
    all
}

/// Another member at exactly the index of a whole: all its files are what was read.
fn assert_is_member_at(log: &Log, whole: &Whole, images: &[Vec<u8>]) {
    let folder = tempfile::tempdir().unwrap();
    let mut console = Database::open(folder.path(), CONSOLE_DATABASE, 0).unwrap();
    let mut members = Members::open(&folder.path().join("service"), 0).unwrap();
    feed(&mut console, &mut members, log, whole.index());
    let databases: Vec<_> = std::iter::once(&console).chain(members.iter()).collect();
    assert_eq!(databases.len(), images.len());
    assert_eq!(members.catalogue().iter().collect::<Vec<_>>(), whole.catalogue.iter().collect::<Vec<_>>());
    for ((database, image), resting) in databases.into_iter().zip(images).zip(whole.all()) {
        assert_eq!(database.checksum(), resting.record().checksum, "database {}", database.id());
        let file = fs::read(database.path()).unwrap();
        assert!(file[..image.len()] == image[..], "database {}", database.id());
    }
}

const ROUND: &str = "INSERT INTO t(data) VALUES (randomblob(3000)); \
                     UPDATE t SET data = randomblob(2500) WHERE id % 7 = abs(random()) % 7; \
                     DELETE FROM t WHERE id % 11 = abs(random()) % 11";

/// Writers in all modes, one of the Console, and somebody who makes databases and removes them.
fn write_until(primary: &Primary, stop: &Arc<AtomicBool>, rounds: &Arc<AtomicU32>) -> Vec<thread::JoinHandle<()>> {
    let writers = MODES.iter().map(|mode| (primary.site.open(&format!("{mode}.db")), *mode));
    let console = std::iter::once((Sql::open(&primary.primary), "WAL"));
    let mut threads: Vec<_> = writers
        .chain(console)
        .map(|(sql, mode)| {
            let (stop, rounds) = (Arc::clone(stop), Arc::clone(rounds));
            sql.run(&format!("PRAGMA busy_timeout=20000; PRAGMA journal_mode={mode}")).unwrap();
            sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
            thread::spawn(move || {
                let mut own = 0;
                while !stop.load(Ordering::SeqCst) {
                    sql.run(ROUND).unwrap();
                    own += 1;
                    if own % 20 == 0 {
                        sql.run("VACUUM").unwrap();
                    }
                    rounds.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    let (stop, folder) = (Arc::clone(stop), primary.site.path(""));
    threads.push(thread::spawn(move || {
        while !stop.load(Ordering::SeqCst) {
            let path = folder.join("short-lived.db");
            File::create_new(&path).unwrap();
            let sql = Sql::open_with(&path, None).unwrap();
            sql.run("CREATE TABLE t(data); INSERT INTO t VALUES (randomblob(9000))").unwrap();
            drop(sql);
            fs::remove_file(&path).unwrap();
        }
    }));
    threads
}

#[test]
fn all_databases_are_read_as_of_one_index_while_everybody_writes() {
    let mut primary = Primary::new();
    let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let threads = write_until(&primary, &stop, &rounds);
    let mut found = Vec::new();
    for number in 0..6 {
        let whole = primary.rest();
        // Everybody writes while it is read, and afterwards, too.
        let first: Vec<_> = whole.all().map(read).collect();
        let before = rounds.load(Ordering::SeqCst);
        while rounds.load(Ordering::SeqCst) < before + 60 {
            thread::yield_now();
        }
        assert!(primary.site.log.last_index() > whole.index());
        let again: Vec<_> = whole.all().map(read).collect();
        assert!(!whole.is_broken() && first == again, "whole {number}");
        found.push((whole, first));
    }
    stop.store(true, Ordering::SeqCst);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(found.iter().take(5).all(|(whole, _)| whole.is_broken()), "one is kept at a time");
    for (whole, images) in &found {
        assert_is_member_at(&primary.site.log, whole, images);
    }
    let (whole, images) = found.pop().unwrap();
    begin_with(&primary, &whole, &images);
    primary.site.compare();
}

/// A member begins with it, and follows from there.
fn begin_with(primary: &Primary, whole: &Whole, images: &[Vec<u8>]) {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    let manifest = primary.manifest(whole);
    let mut course = Course::new(&manifest);
    let mut incoming = Incoming::begin(data, manifest).unwrap();
    let (all, mut bytes) = (whole.all().collect::<Vec<_>>(), Vec::new());
    let ids: Vec<_> = std::iter::once(CONSOLE_DATABASE).chain(whole.service.keys().copied()).collect();
    let place = |id: u32| ids.iter().position(|other| *other == id).unwrap();
    while let Some((id, record, done)) = course.current() {
        let sum = all[place(id)].read(done, &mut bytes).unwrap();
        incoming.push(sum, &bytes).unwrap();
        course.advance(bytes.len() as u32 / record.page_size);
    }
    incoming.finish().unwrap();
    let conf = ConfState { voters: vec![1], ..ConfState::default() };
    let options = Options { segment_bytes: 1 << 20, helper: false, ..Options::default() };
    let raft_log = RaftLog::open(&data.join("raft-log"), (ClusterId(7), 3), conf, options, RealDisk).unwrap();
    assert!(Ready::find(data).unwrap().unwrap().install(&raft_log, 3).unwrap());
    let last = primary.site.log.last_index();
    let mut console = Database::open(&data.join("database"), CONSOLE_DATABASE, last).unwrap();
    let mut members = Members::open(&data.join("service"), last).unwrap();
    assert_eq!((console.applied(), members.applied()), (whole.index(), whole.index()));
    for (database, image) in std::iter::once(&console).chain(members.iter()).zip(images) {
        assert!(&fs::read(database.path()).unwrap() == image);
        database.verify().unwrap();
    }
    feed(&mut console, &mut members, &primary.site.log, last);
    assert_eq!(console.checksum(), primary.console.checksum());
    for guarded in primary.site.registry().all().iter().filter(|guarded| guarded.id().is_some()) {
        let mine = members.iter().find(|database| Some(database.id()) == guarded.id()).unwrap();
        assert_eq!(mine.checksum(), guarded.checksum(), "{}", guarded.path().display());
    }
}

/// What only the WAL has is read from there: another process keeps the application's checkpoints from copying it.
#[test]
fn what_no_checkpoint_has_copied_is_there() {
    let mut primary = Primary::new();
    let sql = primary.site.open("x.db");
    sql.run("PRAGMA journal_mode=WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
    for _ in 0..30 {
        sql.run("INSERT INTO t(data) VALUES (randomblob(20000))").unwrap();
    }
    sql.checkpoint(libsqlite3_sys::SQLITE_CHECKPOINT_TRUNCATE);
    let reader = primary.site.open("x.db");
    reader.run("BEGIN; SELECT count(*) FROM t").unwrap();
    for _ in 0..3 {
        sql.run("UPDATE t SET data = randomblob(15000) WHERE id % 3 = 0; DELETE FROM t WHERE id = 5").unwrap();
    }
    let guarded = primary.site.registry().all().remove(0);
    assert!(guarded.behind() > 0);
    let whole = primary.rest();
    let images: Vec<_> = whole.all().map(read).collect();
    // From here on nothing of that is left in the WAL.
    reader.run("COMMIT").unwrap();
    sql.run("UPDATE t SET data = randomblob(100)").unwrap();
    sql.checkpoint(libsqlite3_sys::SQLITE_CHECKPOINT_TRUNCATE);
    assert_eq!(guarded.behind(), 0);
    sql.run("VACUUM").unwrap();
    sql.checkpoint(libsqlite3_sys::SQLITE_CHECKPOINT_TRUNCATE);
    let again: Vec<_> = whole.all().map(read).collect();
    assert!(images == again);
    assert_is_member_at(&primary.site.log, &whole, &images);
    drop((sql, reader));
    primary.site.compare();
}

#[test]
fn what_nobody_has_written_to_is_as_of_what_is_committed() {
    let mut primary = Primary::new();
    let sql = primary.site.open("first.db");
    sql.run("CREATE TABLE t(data)").unwrap();
    let whole = primary.rest();
    let images: Vec<_> = whole.all().map(read).collect();
    assert_eq!((whole.service.len(), whole.index()), (1, primary.site.log.last_index()));
    begin_with(&primary, &whole, &images);
    primary.site.log.push(Vec::new());
    let again = primary.rest();
    assert!(again.index() >= whole.index() && whole.is_broken());
    assert!(again.all().map(read).eq(images));
}
