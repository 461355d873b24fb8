//! Installs a complete snapshot when the process starts, before anything else uses the database.
//!
//! The installation is a list of steps, and each of them can be repeated. A process that dies anywhere in between
//! leaves the folder of the snapshot, and the next start begins with the first step. Must never drop entries after the
//! snapshot that this node may have acknowledged, and never go below the commit index.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use raft::{Storage, eraftpb::HardState};
use tracing::{info, warn};

use super::{CLUSTER_KEY, ClusterKey, DATABASE, INCOMING, MANIFEST, Manifest, READY, SnapshotError};
use crate::{
    cluster::NodeId,
    storage::{
        clear_away, durable_write, fsync_dir, is_rot, make_private_dir, membership::StoredMembership,
        raft_log::RaftLog, tail, transaction::CONSOLE_DATABASE,
    },
};

/// The folder of a snapshot that has been installed, or is of no use.
const DONE: &str = "snapshot.done";
/// A file beside the manifest: if it exists, the end of the raft log has been kept already.
const TAIL_KEPT: &str = "tail-kept";
/// Where the database and its checkpoint record are, in the data folder.
const FOLDER: &str = "database";
const RECORD: &str = "console.checkpoint";

/// A complete snapshot that waits for its installation.
#[derive(Debug)]
pub struct Ready {
    data: PathBuf,
    manifest: Manifest,
}

/// What a step found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Done,
    /// The snapshot is of no use here.
    Useless,
}

type Work = fn(&Ready, &RaftLog) -> Result<Step, SnapshotError>;

/// In this order: the raft log may be ahead of the database, which then has less to apply, but the database must never
/// be ahead of the raft log.
const STEPS: [Work; 6] = [
    Ready::fix_raft_log,
    Ready::keep_configuration,
    Ready::keep_key,
    Ready::place_database,
    Ready::write_record,
    Ready::tidy_away,
];

impl Ready {
    /// Looks for a complete snapshot, and deletes the remains of others. The data folder must be locked.
    ///
    /// # Errors
    /// [`SnapshotError::Io`] when the data folder cannot be read, or remains cannot be deleted.
    pub fn find(data: &Path) -> Result<Option<Self>, SnapshotError> {
        for remains in [INCOMING, DONE] {
            delete(&data.join(remains))?;
        }
        let path = data.join(READY).join(MANIFEST);
        let manifest = match fs::read(&path) {
            Ok(bytes) => Manifest::decode(&bytes),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) if is_rot(&error) => Err(error.to_string()),
            Err(error) => return Err(SnapshotError::io("read", &path)(error)),
        };
        let sound = manifest.and_then(|manifest| match fs::metadata(data.join(READY).join(DATABASE)) {
            Ok(found) if found.len() != manifest.bytes() => Err("its database has another length".to_owned()),
            _ => Ok(manifest), // the installation has moved it already
        });
        match sound {
            Ok(manifest) => Ok(Some(Self { data: data.to_owned(), manifest })),
            // Whoever needs the database fetches it again, and so does a node that died while installing this one.
            Err(why) => {
                warn!("{} is damaged ({why}): the snapshot is thrown away", path.display());
                dismiss(data)?;
                Ok(None)
            }
        }
    }

    /// Describes the snapshot.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Installs it on the node that this log belongs to. Afterwards the database can be opened, and is at the
    /// snapshot's index. Returns false if the snapshot was of no use here, and nothing has changed.
    ///
    /// # Errors
    /// [`SnapshotError::Io`] or [`SnapshotError::Log`] when the disk fails: the next start tries again.
    /// [`SnapshotError::Contradiction`] when it cannot be installed here.
    pub fn install(&self, log: &RaftLog, node: NodeId) -> Result<bool, SnapshotError> {
        self.keep_tail(log, node);
        for work in STEPS {
            if work(self, log)? == Step::Useless {
                self.tidy_away(log)?;
                return Ok(false);
            }
        }
        let record = self.manifest.record;
        info!(index = record.index, bytes = self.manifest.bytes(), "the snapshot has become this node's database");
        Ok(true)
    }

    /// If the raft log is about to begin again, keeps the entries that a majority may or may not have, for the
    /// administrator. Most likely they are in the snapshot, too. Safety does not depend on this file.
    fn keep_tail(&self, log: &RaftLog, node: NodeId) {
        let index = self.manifest.record.index;
        let stays = log.first_index() > index + 1 || log.term(index).is_ok_and(|term| term == self.manifest.term);
        let held = log.hold(log.hard_state().commit + 1).filter(|held| held.has_content() && !stays);
        // An earlier start may have kept it, and then failed.
        let noted = self.data.join(READY).join(TAIL_KEPT);
        let Some(held) = held.filter(|_| !noted.exists()) else { return };
        let folder = self.data.join(tail::FOLDER);
        // Nobody else has the database open yet.
        let database = File::open(self.data.join(FOLDER).join(DATABASE)).ok();
        let written = tail::write(&folder, self.manifest.membership.cluster, node, &held);
        match written.and_then(|draft| draft.finish(database.as_ref())) {
            Ok((kept, _)) => info!(
                entries = kept.dropped,
                transactions = kept.transactions,
                file = %kept.path.with_extension("txt").display(),
                "the end of the raft log is kept in a file: this node did not know whether a majority has it"
            ),
            Err(error) => warn!(%error, "cannot keep the end of the raft log, which the snapshot replaces"),
        }
        // Also after an error, as on a full disk: otherwise each start would leave another part of it.
        if let Err(error) = durable_write(&noted, b"") {
            warn!(%error, "cannot note that the end of the raft log was kept");
        }
    }

    /// Keeps entries after the snapshot if they continue it: they may have been acknowledged.
    fn fix_raft_log(&self, log: &RaftLog) -> Result<Step, SnapshotError> {
        let (index, term) = (self.manifest.record.index, self.manifest.term);
        let (first, last, hard) = (log.first_index(), log.last_index(), log.hard_state());
        if first > index + 1 {
            let why = "the fetched snapshot is older than this node's raft log: another one is fetched";
            warn!(index, first, "{why}");
            return Ok(Step::Useless);
        }
        if index <= last {
            let own = log.term(index).map_err(|error| unreadable(index, &error))?;
            if own == term {
                if hard.commit < index {
                    let hard = HardState { commit: index, ..hard };
                    log.append(&[], Some(&hard))?.sync()?;
                }
                return Ok(Step::Done);
            }
            if index <= hard.commit {
                return Err(SnapshotError::Contradiction(format!(
                    "the snapshot has term {term} at index {index}, and this node's raft log has term {own} there, \
                     although it is committed (up to {}): this node or the primary has been given the data of another \
                     cluster; remove this member and join it anew",
                    hard.commit
                )));
            }
        }
        log.reset(index, term, self.manifest.conf.clone())?;
        info!(index, term, before = last, "the raft log begins again after the snapshot");
        Ok(Step::Done)
    }

    fn keep_configuration(&self, log: &RaftLog) -> Result<Step, SnapshotError> {
        let Manifest { membership, membership_index, conf, conf_index, .. } = &self.manifest;
        let read =
            StoredMembership::read(&self.data).map_err(SnapshotError::io("read the membership in", &self.data))?;
        // The membership first and then the configuration, as in any change of the membership.
        if read.is_none_or(|known| known.index < *membership_index) {
            let configuration = StoredMembership { index: *membership_index, membership: membership.clone() };
            configuration.write(&self.data).map_err(SnapshotError::io("write the membership in", &self.data))?;
        }
        if log.applied_conf().1 < *conf_index {
            log.set_applied_conf(conf.clone(), *conf_index)?;
        }
        Ok(Step::Done)
    }

    fn keep_key(&self, _: &RaftLog) -> Result<Step, SnapshotError> {
        let Some(key) = &self.manifest.cluster_key else { return Ok(Step::Done) };
        let path = self.data.join(CLUSTER_KEY);
        let known = ClusterKey::read(&self.data).map_err(SnapshotError::io("read", &path))?;
        // The key that is here may be newer than the manifest's. If it is older, the other members provide the right
        // one.
        if known.is_none() {
            let write = || {
                make_private_dir(path.parent().unwrap_or(&self.data))?;
                durable_write(&path, &key.0)
            };
            write().map_err(SnapshotError::io("write", &path))?;
        }
        Ok(Step::Done)
    }

    fn place_database(&self, _: &RaftLog) -> Result<Step, SnapshotError> {
        let (ready, folder) = (self.data.join(READY), self.data.join(FOLDER));
        let (from, to) = (ready.join(DATABASE), folder.join(DATABASE));
        let place = || -> io::Result<()> {
            make_private_dir(&folder)?;
            match fs::rename(&from, &to) {
                // An earlier start has moved it: nothing else does.
                Err(error) if error.kind() == ErrorKind::NotFound && to.exists() => {}
                result => result?,
            }
            fsync_dir(&folder)?;
            fsync_dir(&ready)
        };
        place().map_err(SnapshotError::io("move into its place", &from))?;
        let size = fs::metadata(&to).map_err(SnapshotError::io("get the size of", &to))?.len();
        if size != self.manifest.bytes() {
            let expected = self.manifest.bytes();
            warn!(
                size,
                expected,
                "the fetched database is gone, and is fetched again: {} is the old one",
                to.display()
            );
            return Ok(Step::Useless);
        }
        Ok(Step::Done)
    }

    fn write_record(&self, _: &RaftLog) -> Result<Step, SnapshotError> {
        let path = self.data.join(FOLDER).join(RECORD);
        let written = self.manifest.record.write(&path, CONSOLE_DATABASE);
        written.map_err(SnapshotError::io("write", &path))?;
        Ok(Step::Done)
    }

    fn tidy_away(&self, _: &RaftLog) -> Result<Step, SnapshotError> {
        dismiss(&self.data)?;
        Ok(Step::Done)
    }
}

fn unreadable(index: u64, error: &raft::Error) -> SnapshotError {
    SnapshotError::Contradiction(format!("the raft log cannot be read at index {index}: {error}"))
}

/// Deletes all snapshots, complete ones too.
pub(super) fn clear(data: &Path) -> Result<(), SnapshotError> {
    delete(&data.join(INCOMING))?;
    dismiss(data)
}

/// Deletes a complete snapshot. It loses its name before its first file is deleted.
fn dismiss(data: &Path) -> Result<(), SnapshotError> {
    let (ready, done) = (data.join(READY), data.join(DONE));
    delete(&done)?;
    match fs::rename(&ready, &done).and_then(|()| fsync_dir(data)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        result => result.map_err(SnapshotError::io("rename", &ready))?,
    }
    delete(&done)
}

/// Deletes all snapshots, for a node that must fetch another one.
///
/// # Errors
/// When something is there and cannot be deleted.
pub fn discard(data: &Path) -> io::Result<()> {
    clear(data).map_err(io::Error::other)
}

fn delete(folder: &Path) -> Result<(), SnapshotError> {
    clear_away(folder).map_err(SnapshotError::io("delete", folder))
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::{ConfState, Entry};

    use super::*;
    use crate::{
        cluster::ClusterId,
        storage::{
            checkpoint::Record,
            raft_log::{Options, RealDisk},
            snapshot::{
                CHUNK, Incoming,
                tests::{manifest, resting},
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
        stage(data.path());
        data
    }

    fn stage(data: &Path) {
        let (resting, ..) = resting(1, PAGES, INDEX);
        let mut manifest = manifest(resting.record(), TERM);
        // A change of the configuration was in force when the database rested at an older index.
        (manifest.conf_index, manifest.membership_index) = (INDEX + 2, INDEX + 3);
        let mut incoming = Incoming::begin(data, manifest).unwrap();
        let (mut done, mut bytes) = (0, Vec::new());
        while done < PAGES {
            let sum = resting.read(done, &mut bytes).unwrap();
            incoming.push(sum, &bytes).unwrap();
            done += (bytes.len() / 512) as u32;
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
        leftovers: Vec<String>,
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
            leftovers: names.filter(|name| name.starts_with("snapshot.")).collect(),
        }
    }

    fn start(data: &Path) -> State {
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
}
