//! Whenever a process dies while it installs a snapshot, the next start has all of it, or what was there before.

use raft::eraftpb::{ConfState, Entry};

use super::*;
use crate::{
    cluster::ClusterId,
    storage::{
        checkpoint::Record,
        folder::catalogue::{Catalogue, Change},
        raft_log::{Options, RealDisk},
        snapshot::{
            CHUNK, Course, Incoming,
            tests::{manifest, resting, with_service},
        },
        transaction::CONSOLE_DATABASE,
    },
};

const PAGES: u32 = 3000;
const INDEX: u64 = 40;
const TERM: u64 = 3;

fn open_log(data: &Path) -> RaftLog {
    let initial = ConfState { voters: vec![1, 2, 3], ..ConfState::default() };
    let options = Options { segment_bytes: 64 << 10, helper: false, ..Options::default() };
    RaftLog::open(&data.join("raft-log"), (ClusterId(7), 3), initial, options, RealDisk).unwrap()
}

/// A node whose raft log has entries of `term` up to `last`, is committed up to `commit`, and begins behind
/// `compacted`.
fn node(last: u64, term: u64, commit: u64, compacted: u64) -> tempfile::TempDir {
    let data = tempfile::tempdir().unwrap();
    let log = open_log(data.path());
    let data_of = |index: u64| vec![index as u8; 30].into();
    let entry = |index| Entry { index, term, data: data_of(index), ..Entry::default() };
    let entries: Vec<Entry> = (2..=last).map(entry).collect();
    let hard = HardState { term: TERM, commit, ..HardState::default() };
    log.append(&entries, Some(&hard)).unwrap().sync().unwrap();
    log.compact(compacted).unwrap();
    fs::create_dir(data.path().join(FOLDER)).unwrap();
    fs::write(data.path().join(FOLDER).join(DATABASE), "an older database").unwrap();
    let record = Record { index: 9, page_size: 512, pages: 1, checksum: 5 };
    record.write(&data.path().join(FOLDER).join(RECORD), CONSOLE_DATABASE).unwrap();
    stage(data.path(), &[]);
    data
}

/// Stages a snapshot whose service has databases of so many pages.
fn stage(data: &Path, service: &[u32]) {
    let (resting, ..) = resting(1, PAGES, INDEX);
    let (mut manifest, service) = with_service(manifest(resting.record(), TERM), service);
    // A change of the configuration was in force when the database rested at an older index.
    (manifest.conf_index, manifest.membership_index) = (INDEX + 2, INDEX + 3);
    let mut course = Course::new(&manifest);
    let mut incoming = Incoming::begin(data, manifest).unwrap();
    let (all, mut bytes) = (std::iter::once(resting).chain(service).collect::<Vec<_>>(), Vec::new());
    while let Some((id, _, done)) = course.current() {
        let sum = all[id as usize - 1].read(done, &mut bytes).unwrap();
        incoming.push(sum, &bytes).unwrap();
        course.advance((bytes.len() / 512) as u32);
    }
    incoming.finish().unwrap();
    assert!(PAGES as usize * 512 > CHUNK);
}

/// Everything that counts after a start.
#[derive(Debug, PartialEq)]
struct State {
    database: Vec<u8>,
    record: Record,
    log: (u64, u64, HardState),
    entries: Vec<u64>,
    conf: (ConfState, u64),
    membership: Option<StoredMembership>,
    key: Option<ClusterKey>,
    /// The catalogue of the service; path, record and content of each of its databases.
    service: (Catalogue, Vec<(PathBuf, Record, Vec<u8>)>),
    /// All files of the service.
    files: Vec<PathBuf>,
    leftovers: Vec<String>,
}

fn look_at_service(data: &Path) -> (Catalogue, Vec<(PathBuf, Record, Vec<u8>)>) {
    let places = Places::of(data);
    let catalogue = Catalogue::read(&places.catalogue()).unwrap();
    let database = |(id, path): (u32, &Path)| {
        let record = Record::read(&places.record(id), id).unwrap();
        (path.to_owned(), record, fs::read(places.files().join(path)).unwrap())
    };
    let databases = catalogue.iter().map(database).collect();
    (catalogue, databases)
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        paths.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect();
    files.sort();
    files
}

fn look(data: &Path, log: &RaftLog) -> State {
    let (first, last) = (log.first_index(), log.last_index());
    let mut entries = Vec::new();
    let mut note = |entry: &Entry| {
        entries.push(entry.term);
        Ok(())
    };
    log.entries_between(first, last, &mut note).unwrap();
    let names = fs::read_dir(data).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    State {
        database: fs::read(data.join(FOLDER).join(DATABASE)).unwrap(),
        record: Record::read(&data.join(FOLDER).join(RECORD), CONSOLE_DATABASE).unwrap(),
        log: (first, last, log.hard_state()),
        entries,
        conf: log.applied_conf(),
        membership: StoredMembership::read(data).unwrap(),
        key: ClusterKey::read(data).unwrap(),
        service: look_at_service(data),
        files: files_below(&data.join("service")),
        leftovers: names.filter(|name| name.starts_with("snapshot.")).collect(),
    }
}

/// Starts with what is there. What it returns does not have the name of the data folder.
fn start(data: &Path) -> State {
    let state = begin(data);
    let files = state.files.iter().map(|file| file.strip_prefix(data).unwrap().to_owned()).collect();
    State { files, ..state }
}

fn begin(data: &Path) -> State {
    let ready = Ready::find(data).unwrap();
    let log = open_log(data);
    if let Some(ready) = ready {
        assert!(ready.install(&log, 3).unwrap());
    }
    let state = look(data, &log);
    drop(log);
    // What was found is what is on disk.
    assert_eq!(look(data, &open_log(data)), state);
    state
}

/// Starts, dies after each number of steps, starts again; returns where all of them end.
fn install_with_crashes(node: impl Fn() -> tempfile::TempDir) -> State {
    let data = node();
    let expected = start(data.path());
    assert_eq!(start(data.path()), expected, "another start changes nothing");
    for steps in 0..=STEPS.len() {
        for again in [false, true] {
            let data = node();
            for _ in 0..=usize::from(again) {
                let Some(ready) = Ready::find(data.path()).unwrap() else { continue };
                let log = open_log(data.path());
                for work in &STEPS[..steps] {
                    assert_eq!(work(&ready, &log).unwrap(), Step::Done);
                }
            }
            assert_eq!(start(data.path()), expected, "dies after {steps} steps, twice: {again}");
        }
    }
    let (_, _, image) = resting(1, PAGES, INDEX);
    assert!(expected.database == image);
    assert_eq!((expected.record.index, expected.record.pages), (INDEX, PAGES));
    assert_eq!(expected.membership.as_ref().unwrap().index, INDEX + 3);
    assert_eq!((expected.conf.0.learners.as_slice(), expected.conf.1), (&[3][..], INDEX + 2));
    assert_eq!(expected.key, Some(ClusterKey(b"secret of the members".to_vec())));
    assert!(expected.leftovers.is_empty());
    expected
}

/// A node that has an older service: a database under another id and name, one that is no more, one that has moved,
/// and a link where a folder has to be.
fn node_with_service(last: u64) -> tempfile::TempDir {
    let data = node(last, 2, 25, 10);
    let places = Places::of(data.path());
    let mut known = Catalogue::default();
    let old = [(2, "files/2.db"), (3, "files/4.db"), (4, "gone.db"), (5, "files/3.db/gone.db")];
    for (at, (id, path)) in (10..).zip(old) {
        known.apply(at, id, &Change::Add(path.into())).unwrap();
        places.make_room(Path::new(path)).unwrap();
        fs::write(places.files().join(path), format!("an older database {id}")).unwrap();
        make_private_dir(&places.records()).unwrap();
        let record = Record { index: 9, page_size: 512, pages: 1, checksum: 5 };
        record.write(&places.record(id), id).unwrap();
    }
    known.write(&places.catalogue()).unwrap();
    fs::write(places.files().join("a file of the application"), "stays").unwrap();
    stage(data.path(), &[2500, 0, 3]);
    data
}

#[test]
fn all_databases_are_there_or_none_wherever_the_process_dies() {
    for state in [install_with_crashes(|| node_with_service(30)), start(node_with_service(60).path())] {
        let (catalogue, databases) = state.service;
        assert_eq!((catalogue.changed(), catalogue.next()), (32, 5));
        let names = ["files/2.db", "files/3.db", "files/4.db"];
        for (((path, record, content), name), (seed, pages)) in
            databases.into_iter().zip(names).zip([(2, 2500), (3, 0), (4, 3)])
        {
            let (expected, _, image) = resting(seed, pages, INDEX);
            assert_eq!((path.as_path(), record), (Path::new(name), expected.record()));
            assert!(content == image, "{name}");
        }
        let expected = [
            "service/catalogue.json",
            "service/checkpoints/2",
            "service/checkpoints/3",
            "service/checkpoints/4",
            "service/files/a file of the application",
            "service/files/files/2.db",
            "service/files/files/3.db",
            "service/files/files/4.db",
        ];
        assert_eq!(state.files, expected.map(PathBuf::from));
    }
}

#[test]
fn a_link_of_the_application_leads_nowhere() {
    let (data, elsewhere) = (node(30, 2, 25, 10), tempfile::tempdir().unwrap());
    let files = Places::of(data.path()).files();
    make_private_dir(&files).unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), files.join("files")).unwrap();
    stage(data.path(), &[3]);
    start(data.path());
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    assert_eq!(look_at_service(data.path()).1.len(), 1);
}

#[test]
fn a_snapshot_that_lacks_a_database_of_this_node_changes_nothing() {
    for (known_at, useless) in [(INDEX, true), (INDEX + 1, false)] {
        let data = node(60, TERM, 55, 10);
        let places = Places::of(data.path());
        let mut known = Catalogue::default();
        known.apply(known_at, 2, &Change::Add("kept.db".into())).unwrap();
        places.make_room(Path::new("kept.db")).unwrap();
        fs::write(places.files().join("kept.db"), "the only copy here").unwrap();
        known.write(&places.catalogue()).unwrap();
        let ready = Ready::find(data.path()).unwrap().unwrap();
        let log = open_log(data.path());
        let before = look(data.path(), &log);
        assert_eq!(ready.install(&log, 3).unwrap(), !useless);
        if useless {
            assert_eq!(look(data.path(), &log), State { leftovers: Vec::new(), ..before });
        } else {
            // It was added later, and the raft log has that entry.
            assert!(look_at_service(data.path()).0.is_untouched());
            assert!(log.last_index() > known_at);
        }
    }
}

#[test]
fn a_damaged_catalogue_is_replaced() {
    for service in [&[][..], &[3]] {
        let data = node(30, 2, 25, 10);
        stage(data.path(), service);
        let catalogue = Places::of(data.path()).catalogue();
        make_private_dir(catalogue.parent().unwrap()).unwrap();
        fs::write(&catalogue, "{").unwrap();
        start(data.path());
        assert_eq!(look_at_service(data.path()).1.len(), service.len());
    }
}

#[test]
fn a_database_of_the_service_that_was_lost_is_fetched_again() {
    let data = node_with_service(30);
    let ready = Ready::find(data.path()).unwrap().unwrap();
    fs::remove_file(staged(&data.path().join(READY), 4)).unwrap();
    assert!(!ready.install(&open_log(data.path()), 3).unwrap());
    let places = Places::of(data.path());
    let catalogue = Catalogue::read(&places.catalogue()).unwrap();
    assert_eq!(catalogue.changed(), 13, "the old catalogue and the old records count");
    assert!(catalogue.iter().all(|(id, _)| Record::read(&places.record(id), id).unwrap().index == 9));
    // One with another length is seen before anything is done.
    let data = node_with_service(30);
    let file = staged(&data.path().join(READY), 4);
    File::options().write(true).open(&file).unwrap().set_len(512).unwrap();
    assert!(Ready::find(data.path()).unwrap().is_none());
}

#[test]
fn a_member_that_is_far_behind_begins_behind_the_snapshot() {
    let State { log: (first, last, hard), .. } = install_with_crashes(|| node(30, 2, 25, 10));
    assert_eq!((first, last, hard.commit, hard.term), (INDEX + 1, INDEX, INDEX, TERM));
}

#[test]
fn entries_that_continue_the_snapshot_stay() {
    let state = install_with_crashes(|| node(60, TERM, 30, 10));
    assert_eq!((state.log.0, state.log.1, state.log.2.commit), (11, 60, INDEX));
    assert_eq!(state.entries, [TERM; 50]);
    // Even if all that is left of the raft log is the entry of the snapshot.
    let state = install_with_crashes(|| node(INDEX, TERM, INDEX, INDEX));
    assert_eq!((state.log.0, state.log.1, state.log.2.commit), (INDEX + 1, INDEX, INDEX));
}

#[test]
fn a_tail_of_another_term_is_dropped() {
    let state = install_with_crashes(|| node(60, 2, 30, 10));
    assert_eq!((state.log.0, state.log.1, state.log.2.commit), (INDEX + 1, INDEX, INDEX));
    // Dropped, but not lost; once, however often the installation is begun again.
    let data = node(60, 2, 30, 10);
    let ready = Ready::find(data.path()).unwrap().unwrap();
    (0..3).for_each(|_| ready.keep_tail(&open_log(data.path()), 3));
    start(data.path());
    let files = fs::read_dir(data.path().join(tail::FOLDER)).unwrap().map(|file| file.unwrap().path());
    let tails: Vec<_> = files.filter(|path| path.extension().is_some_and(|end| end == "tail")).collect();
    let [file] = &tails[..] else { panic!("{tails:?}") };
    let entries = tail::read(file).unwrap().1;
    assert_eq!((entries[0].index, entries.len()), (31, 30));
}

#[test]
fn a_damaged_snapshot_is_thrown_away_and_the_old_database_stays() {
    let damages: [fn(&Path); 4] = [
        |ready| fs::write(ready.join(MANIFEST), "{").unwrap(),
        |ready| File::options().write(true).open(ready.join(DATABASE)).unwrap().set_len(512).unwrap(),
        |ready| {
            fs::remove_file(ready.join(MANIFEST)).unwrap();
            fs::create_dir(ready.join(MANIFEST)).unwrap();
        },
        |ready| {
            fs::remove_dir_all(ready).unwrap();
            fs::write(ready, "a file").unwrap();
        },
    ];
    for damage in damages {
        let data = node(30, 2, 25, 10);
        damage(&data.path().join(READY));
        assert!(Ready::find(data.path()).unwrap().is_none());
        assert!(!data.path().join(READY).exists() && !data.path().join(DONE).exists());
    }
    // Its database was lost after its manifest was read.
    let data = node(30, 2, 25, 10);
    let ready = Ready::find(data.path()).unwrap().unwrap();
    fs::remove_file(data.path().join(READY).join(DATABASE)).unwrap();
    assert!(!ready.install(&open_log(data.path()), 3).unwrap());
    assert_eq!(fs::read_to_string(data.path().join(FOLDER).join(DATABASE)).unwrap(), "an older database");
}

#[test]
fn a_snapshot_older_than_the_raft_log_changes_nothing() {
    let data = node(60, TERM, 55, 50);
    let ready = Ready::find(data.path()).unwrap().unwrap();
    let log = open_log(data.path());
    let before = look(data.path(), &log);
    assert!(!ready.install(&log, 3).unwrap());
    assert_eq!(look(data.path(), &log), State { leftovers: Vec::new(), ..before });
    assert!(Ready::find(data.path()).unwrap().is_none());
}

#[test]
fn another_term_below_the_commit_index_is_fatal_and_changes_nothing() {
    let data = node(60, 2, 50, 10);
    let ready = Ready::find(data.path()).unwrap().unwrap();
    let log = open_log(data.path());
    let before = look(data.path(), &log);
    let error = ready.install(&log, 3).unwrap_err();
    assert!(error.to_string().contains("another cluster"), "{error}");
    assert_eq!(look(data.path(), &log), before);
}

#[test]
fn remains_are_deleted_and_what_is_newer_here_stays() {
    let data = node(30, 2, 25, 10);
    for remains in [INCOMING, DONE] {
        fs::create_dir(data.path().join(remains)).unwrap();
        fs::write(data.path().join(remains).join(DATABASE), "half").unwrap();
    }
    let mut newer = Ready::find(data.path()).unwrap().unwrap().manifest().membership.clone();
    newer.roster.next_id += 5;
    StoredMembership { index: INDEX + 9, membership: newer.clone() }.write(data.path()).unwrap();
    let state = start(data.path());
    assert_eq!(state.membership.unwrap().membership, newer);
    assert!(state.leftovers.is_empty());
}
