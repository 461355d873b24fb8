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

use super::{
    CLUSTER_KEY, ClusterKey, DATABASE, INCOMING, MANIFEST, Manifest, READY, SnapshotError,
    service::{bytes, known, staged},
};
use crate::{
    cluster::NodeId,
    storage::{
        clear_away, durable_write, folder::places::Places, folder_of, fsync_dir, is_rot, make_private_dir,
        membership::StoredMembership, raft_log::RaftLog, tail, transaction::CONSOLE_DATABASE,
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

/// In this order: the raft log may be ahead of a database, which then has less to apply, but a database must never be
/// ahead of the raft log. The files of all databases are in their places before the first record says so.
const STEPS: [Work; 9] = [
    Ready::know_all,
    Ready::fix_raft_log,
    Ready::keep_configuration,
    Ready::keep_key,
    Ready::place_database,
    Ready::place_service,
    Ready::write_record,
    Ready::write_service,
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
        let sound = manifest.and_then(|manifest| {
            let ready = data.join(READY);
            // One that is not there was moved by the installation already.
            let odd = |id, record: &_| fs::metadata(staged(&ready, id)).is_ok_and(|found| found.len() != bytes(record));
            let odd = manifest.contents().find(|(id, record)| odd(*id, record));
            odd.map_or(Ok(manifest), |(id, _)| Err(format!("its database {id} has another length")))
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
        let (index, databases) = (self.manifest.record.index, self.manifest.contents().count());
        info!(index, databases, bytes = self.manifest.bytes(), "the snapshot has become this node's database");
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

    /// Refuses a snapshot without a database that this node knows of, before anything has changed.
    fn know_all(&self, _: &RaftLog) -> Result<Step, SnapshotError> {
        let Some(why) = self.manifest.lacks(&known(&self.data)?) else { return Ok(Step::Done) };
        warn!("the fetched snapshot is thrown away: {why}");
        Ok(Step::Useless)
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
        let folder = self.data.join(FOLDER);
        make_private_dir(&folder).map_err(SnapshotError::io("create", &folder))?;
        self.place(CONSOLE_DATABASE, &folder.join(DATABASE), self.manifest.bytes_of(CONSOLE_DATABASE))
    }

    /// Moves the file of a database into its place.
    fn place(&self, id: u32, to: &Path, expected: u64) -> Result<Step, SnapshotError> {
        let from = staged(&self.data.join(READY), id);
        let place = || -> io::Result<()> {
            if fs::symlink_metadata(to).is_ok_and(|found| found.is_dir()) {
                clear_away(to)?;
            }
            match fs::rename(&from, to) {
                // An earlier start has moved it: nothing else does.
                Err(error) if error.kind() == ErrorKind::NotFound && to.exists() => {}
                result => result?,
            }
            fsync_dir(folder_of(to))?;
            fsync_dir(folder_of(&from))
        };
        place().map_err(SnapshotError::io("move into its place", &from))?;
        let size = fs::metadata(to).map_err(SnapshotError::io("get the size of", to))?.len();
        if size != expected {
            warn!(
                size,
                expected,
                "the fetched database {id} is gone, and is fetched again: {} is the old one",
                to.display()
            );
            return Ok(Step::Useless);
        }
        Ok(Step::Done)
    }

    fn place_service(&self, _: &RaftLog) -> Result<Step, SnapshotError> {
        let (places, service) = (Places::of(&self.data), &self.manifest.service);
        for (id, path) in service.catalogue.iter() {
            places.make_room(path).map_err(SnapshotError::io("make room for", path))?;
            let placed = self.place(id, &places.files().join(path), self.manifest.bytes_of(id))?;
            if placed == Step::Useless {
                return Ok(placed);
            }
        }
        Ok(Step::Done)
    }

    fn write_record(&self, _: &RaftLog) -> Result<Step, SnapshotError> {
        let path = self.data.join(FOLDER).join(RECORD);
        let written = self.manifest.record.write(&path, CONSOLE_DATABASE);
        written.map_err(SnapshotError::io("write", &path))?;
        Ok(Step::Done)
    }

    /// The catalogue last: until then the next start knows which databases were there before, and are no more.
    fn write_service(&self, _: &RaftLog) -> Result<Step, SnapshotError> {
        let (places, service) = (Places::of(&self.data), &self.manifest.service);
        let (catalogue, known) = (places.catalogue(), known(&self.data)?);
        if service.catalogue.is_untouched() && known.is_untouched() {
            // There is none, or one that is damaged.
            clear_away(&catalogue).map_err(SnapshotError::io("delete", &catalogue))?;
            return Ok(Step::Done);
        }
        make_private_dir(&places.records()).map_err(SnapshotError::io("create", &places.records()))?;
        for (id, record) in &service.records {
            let path = places.record(*id);
            record.write(&path, *id).map_err(SnapshotError::io("write", &path))?;
        }
        for (id, path) in known.iter() {
            // One of now that is in the same place, or below or above it, has replaced it already.
            if !service.catalogue.iter().any(|(_, other)| other.starts_with(path) || path.starts_with(other)) {
                let file = places.files().join(path);
                clear_away(&file).map_err(SnapshotError::io("delete", &file))?;
            }
            if !service.records.contains_key(&id) {
                let record = places.record(id);
                clear_away(&record).map_err(SnapshotError::io("delete", &record))?;
            }
        }
        service.catalogue.write(&catalogue).map_err(SnapshotError::io("write", &catalogue))?;
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
mod tests;
