//! REMEMBERS. What survives a crash on this host.
//!
//! This file owns the data directory: its lock, its identity and the durable replacement of small files. It must never
//! decide anything about roles, and never hand a directory to two processes or to a member it does not belong to.

mod capture;
mod checked;
pub mod checkpoint;
pub mod checksum;
pub mod database;
pub mod databases;
pub mod gate;
pub mod membership;
pub mod memory;
pub mod online_copy;
pub mod raft_log;
pub mod replica;
pub mod scrub;
pub mod snapshot;
pub mod tail;
pub mod transaction;
#[allow(unsafe_code, reason = "SQLite speaks C: this folder is the only place where we do, too")]
pub mod vfs;
pub mod wal;
pub mod watch;

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    cluster::{ClusterId, Membership, NodeId},
    descriptors,
};
use watch::{Act, Place};

/// Version of `identity.json` that this program writes.
pub const IDENTITY_FORMAT: u32 = 1;
/// Largest `identity.json` that is read, in bytes: far above any three members.
const IDENTITY_LIMIT: u64 = 1 << 20;
/// Name of the file that says whose a data directory is.
const IDENTITY: &str = "identity.json";

/// Why a data directory cannot be used.
#[derive(Debug, Error)]
pub enum DataDirError {
    #[error("cannot {verb} {}: {error}", path.display())]
    Io { verb: &'static str, path: PathBuf, error: io::Error },
    #[error("data directory {} is in use by the process with pid {pid}; stop it first", path.display())]
    Locked { path: PathBuf, pid: String },
    #[error("data directory {} has no identity yet (identity.json is missing): it was never set up", path.display())]
    NoIdentity { path: PathBuf },
    #[error("data directory {} already belongs to node {node} ({name}) of cluster {cluster}; use an empty directory", path.display())]
    Exists { path: PathBuf, cluster: ClusterId, node: NodeId, name: String },
    #[error(
        "data directory {} belongs to node {found_node} ({found_name}) of cluster {found_cluster}, but node {node} of \
         cluster {cluster} is expected; set DATA_FOLDER to that node's own directory, or use an empty one",
        path.display()
    )]
    Foreign {
        path: PathBuf,
        found_cluster: ClusterId,
        found_node: NodeId,
        found_name: String,
        cluster: ClusterId,
        node: NodeId,
    },
    #[error("{} has format {found}, and this program knows formats up to {IDENTITY_FORMAT}; upgrade this node", path.display())]
    Newer { path: PathBuf, found: u64 },
    #[error("{} is damaged: {reason}", path.display())]
    Damaged { path: PathBuf, reason: String },
}

/// Who a data directory belongs to: kept in `identity.json`, written once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Format of the file: [`IDENTITY_FORMAT`].
    pub format: u32,
    pub cluster: ClusterId,
    pub node: NodeId,
    pub name: String,
    /// The members at the time the directory was set up.
    pub membership: Membership,
}

impl Identity {
    /// Reads the identity of a data folder, which another process may have.
    ///
    /// # Errors
    /// [`DataDirError::NoIdentity`] when there is none, [`DataDirError::Damaged`] when it can never be read,
    /// [`DataDirError::Newer`] when a newer program wrote it, [`DataDirError::Io`] when it cannot be read now.
    pub fn read(data: &Path) -> Result<Self, DataDirError> {
        let path = data.join(IDENTITY);
        let mut text = Vec::new();
        match File::open(&path).and_then(|file| file.take(IDENTITY_LIMIT).read_to_end(&mut text)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(DataDirError::NoIdentity { path: data.to_owned() });
            }
            Err(error) if is_rot(&error) => return Err(DataDirError::Damaged { path, reason: error.to_string() }),
            Err(error) => return Err(DataDirError::Io { verb: "read", path, error }),
        }
        let damaged = |reason: String| DataDirError::Damaged { path: path.clone(), reason };
        // The format is looked at first: a newer file may differ in everything else.
        let value = checked::decode(&text).map_err(damaged)?;
        match value.get("format").and_then(serde_json::Value::as_u64) {
            Some(found) if found > u64::from(IDENTITY_FORMAT) => Err(DataDirError::Newer { path, found }),
            _ => serde_json::from_value(value).map_err(|error| damaged(error.to_string())),
        }
    }
}

/// A data directory, locked for this process until it is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    /// Held for its flock.
    _lock: Flock<File>,
}

impl DataDir {
    /// Creates the directory (mode 0700) where it is missing, and takes its lock.
    ///
    /// # Errors
    /// [`DataDirError::Locked`] when another process has it, [`DataDirError::Io`] when it cannot be made or locked.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, DataDirError> {
        let path = path.into();
        let failed = |verb, path: &Path| {
            let path = path.to_owned();
            move |error| DataDirError::Io { verb, path, error }
        };
        make_private_dir(&path).map_err(failed("create directory", &path))?;
        let lock_path = path.join("lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(failed("open", &lock_path))?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((file, Errno::EWOULDBLOCK)) => return Err(DataDirError::Locked { path, pid: holder(&file) }),
            Err((_, errno)) => return Err(failed("lock", &lock_path)(errno.into())),
        };
        let record = || {
            lock.set_len(0)?;
            lock.write_all_at(format!("{}\n", std::process::id()).as_bytes(), 0)
        };
        // Only for the message another process would print; a full disk must not keep a node from starting.
        let _ = record();
        Ok(Self { path, _lock: lock })
    }

    /// Where the directory is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the identity of a new directory.
    ///
    /// # Errors
    /// [`DataDirError::Exists`] when there is one already, the error of [`Identity::read`] when there is one that
    /// cannot be read, [`DataDirError::Io`] when the disk fails or is full.
    pub fn create_identity(&self, identity: &Identity) -> Result<(), DataDirError> {
        // With an identity, a raft log that is not there was lost.
        self.write_identity(identity, memory::permit_new_log)
    }

    /// Writes the identity of a directory that has lost it. It may have lost its raft log, too: a new one is not
    /// permitted.
    ///
    /// # Errors
    /// [`DataDirError::Exists`] when there is one, the error of [`Identity::read`] when there is one that cannot be
    /// read, [`DataDirError::Io`] when the disk fails or is full.
    pub fn restore_identity(&self, identity: &Identity) -> Result<(), DataDirError> {
        self.write_identity(identity, memory::forbid_new_log)
    }

    fn write_identity(&self, identity: &Identity, before: fn(&Path) -> io::Result<()>) -> Result<(), DataDirError> {
        self.check_unused()?;
        let path = self.identity_path();
        let write = || {
            before(&self.path)?;
            durable_write(&path, &checked::encode(serde_json::to_value(identity)?)?)
        };
        write().map_err(|error| DataDirError::Io { verb: "write", path: path.clone(), error })
    }

    /// Refuses a directory that has an identity.
    ///
    /// # Errors
    /// [`DataDirError::Exists`] when there is one, the error of [`Identity::read`] when there is one that cannot be
    /// read.
    pub fn check_unused(&self) -> Result<(), DataDirError> {
        match self.identity() {
            Err(DataDirError::NoIdentity { .. }) => Ok(()),
            Err(error) => Err(error),
            Ok(Identity { cluster, node, name, .. }) => {
                Err(DataDirError::Exists { path: self.path.clone(), cluster, node, name })
            }
        }
    }

    /// Reads the identity.
    ///
    /// # Errors
    /// [`DataDirError::NoIdentity`], [`DataDirError::Damaged`], [`DataDirError::Newer`] or [`DataDirError::Io`], as
    /// [`Identity::read`] has them.
    pub fn identity(&self) -> Result<Identity, DataDirError> {
        Identity::read(&self.path)
    }

    /// Writes the identity anew, with a checksum, if an older program wrote it without one.
    ///
    /// # Errors
    /// [`DataDirError::Io`] when the file cannot be read or written. It is as it was then.
    pub fn check_identity(&self, identity: &Identity) -> Result<(), DataDirError> {
        let path = self.identity_path();
        let io = |verb| {
            let path = path.clone();
            move |error| DataDirError::Io { verb, path, error }
        };
        if checked::has_checksum(&fs::read(&path).map_err(io("read"))?) {
            return Ok(());
        }
        let write = || durable_write(&path, &checked::encode(serde_json::to_value(identity)?)?);
        write().map_err(io("write"))
    }

    /// Reads the identity and refuses it unless it is that of this node of this cluster.
    ///
    /// # Errors
    /// [`DataDirError::Foreign`] when it is that of another node or cluster. Otherwise the error of [`Identity::read`].
    pub fn check(&self, cluster: ClusterId, node: NodeId) -> Result<Identity, DataDirError> {
        let found = self.identity()?;
        if (found.cluster, found.node) == (cluster, node) {
            return Ok(found);
        }
        Err(DataDirError::Foreign {
            path: self.path.clone(),
            found_cluster: found.cluster,
            found_node: found.node,
            found_name: found.name,
            cluster,
            node,
        })
    }

    fn identity_path(&self) -> PathBuf {
        self.path.join(IDENTITY)
    }
}

/// The pid in a lock file, or "unknown".
fn holder(mut file: &File) -> String {
    let mut text = String::new();
    match file.read_to_string(&mut text) {
        Ok(_) if !text.trim().is_empty() => text.trim().to_owned(),
        _ => "unknown".to_owned(),
    }
}

/// Creates a directory and its missing parents, mode 0700, durably. An existing one is left as it is.
///
/// # Errors
/// When the directory, or one on the way, cannot be made or synced.
pub fn make_private_dir(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = folder_of(path);
    // Each of them is a name in the one above it, which is to be synced.
    if !parent.exists() {
        make_private_dir(parent)?;
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    fsync_dir(parent)
}

/// The folder that a path is in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Replaces the content of a small file so that a crash leaves either the old or the new one. Mode 0600.
///
/// # Errors
/// When the disk fails or is full. The old content is in place then, or the new one.
pub fn durable_write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_file(Place::Small, path, bytes)
}

/// [`durable_write`], seen by the watch as a write to this place.
fn replace_file(place: Place, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let Some(name) = path.file_name() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a path of a file"));
    };
    let parent = folder_of(path);
    let mut temporary = name.to_owned();
    temporary.push(".new");
    let temporary = parent.join(temporary);
    let write = || {
        // What an earlier attempt left may be a link, or readable by others.
        clear_away(&temporary)?;
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let mut file = descriptors::open(|| options.open(&temporary))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        fsync_dir(parent)
    };
    watch::run(place, Act::Write, write).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Removes whatever has this name: a file, a link, or a folder with all that is in it.
///
/// # Errors
/// When something is there and cannot be removed.
pub fn clear_away(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Makes the names in a directory durable: creations, renames and removals.
///
/// # Errors
/// When the directory cannot be opened or synced.
pub fn fsync_dir(path: &Path) -> io::Result<()> {
    descriptors::open(|| File::open(path))?.sync_all()
}

/// True for an error that says that what is on the disk cannot be read, now or later: the place is bad, or the content
/// is not what it should be. Not for what the system lacks at the moment.
pub fn is_rot(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, IsADirectory, NotADirectory, UnexpectedEof};
    matches!(error.kind(), InvalidData | IsADirectory | NotADirectory | UnexpectedEof)
        || matches!(
            error.raw_os_error().map(Errno::from_raw),
            Some(Errno::EIO | Errno::EBADMSG | Errno::EUCLEAN | Errno::ELOOP)
        )
}

/// True for an error that says that the disk, or the quota of this user, has no space left.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Why a captured transaction did not get a majority.
#[derive(Debug, Clone, Error)]
pub enum ReplicateError {
    /// It is certain that the transaction will never be committed: the last part was never proposed.
    #[error("not replicated: {0}")]
    Refused(String),
    /// It will never be committed either: this host has no space for it.
    #[error("not replicated: {0}")]
    Full(String),
    /// The last part was proposed; the new primary's raft log decides. The caller must fence itself.
    #[error("outcome unknown: {0}")]
    Unknown(String),
}

/// Where captured transactions go: the consensus loop in a daemon, a test double of it in tests of the capture.
pub trait Replicator: Send + Sync {
    /// Proposes one encoded part ([`crate::storage::transaction`]). For `last == false` it returns as soon as the part
    /// is accepted (it blocks only to bound the parts in flight) and the returned index is meaningless. For `last ==
    /// true` it blocks until a majority has the whole transaction in its raft logs and returns the raft index of the
    /// last part.
    ///
    /// # Errors
    /// [`ReplicateError::Refused`] and [`ReplicateError::Full`] when the transaction will never be committed.
    /// [`ReplicateError::Unknown`] when it may be: the caller must fence itself.
    fn replicate(&self, part: Vec<u8>, last: bool) -> Result<u64, ReplicateError>;

    /// Returns when this host's own disk has everything that [`Replicator::replicate`] has returned for. A majority can
    /// be the two other hosts: the database file must not get ahead of this host's raft log, or a crash would leave a
    /// file that no replay explains. Does nothing where `replicate` waits for this host's disk in any case.
    ///
    /// # Errors
    /// When the disk fails. Nothing may be copied into the database file then.
    fn make_durable(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Where the parts of a long transaction are read again when its last part commits: the raft log, or a test's list.
pub trait EntrySource {
    /// Calls `each` with index and payload of every command entry in `first..=last`, in order, in bounded memory.
    ///
    /// # Errors
    /// When an entry cannot be read. An error of `each` ends it.
    fn for_each(
        &self,
        first: u64,
        last: u64,
        each: &mut dyn FnMut(u64, &[u8]) -> std::io::Result<()>,
    ) -> std::io::Result<()>;
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::cluster::Member;

    fn identity() -> Identity {
        let cluster = ClusterId(7);
        let member = Member::founder(2, "b", "127.0.0.2", 8085);
        let membership = Membership::founded(cluster, vec![member]);
        Identity { format: IDENTITY_FORMAT, cluster, node: 2, name: "b".into(), membership }
    }

    #[test]
    fn a_directory_is_private_and_locked() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        let first = DataDir::open(&path).unwrap();
        for made in [&path, &root.path().join("a")] {
            assert_eq!(fs::metadata(made).unwrap().permissions().mode() & 0o777, 0o700);
        }
        let error = DataDir::open(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        drop(first);
        DataDir::open(&path).unwrap();
    }

    #[test]
    fn an_identity_is_written_once_and_checked() {
        let root = tempfile::tempdir().unwrap();
        let dir = DataDir::open(root.path()).unwrap();
        assert!(matches!(dir.identity(), Err(DataDirError::NoIdentity { .. })));
        dir.create_identity(&identity()).unwrap();
        assert!(matches!(dir.create_identity(&identity()), Err(DataDirError::Exists { node: 2, .. })));
        assert_eq!(dir.check(ClusterId(7), 2).unwrap(), identity());
        let error = dir.check(ClusterId(8), 3).unwrap_err().to_string();
        assert!(error.contains(&ClusterId(7).to_string()) && error.contains(&ClusterId(8).to_string()), "{error}");
        assert!(error.contains("node 2 (b)") && error.contains("node 3"), "{error}");
    }

    #[test]
    fn a_newer_or_damaged_identity_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let dir = DataDir::open(root.path()).unwrap();
        durable_write(&root.path().join("identity.json"), b"{\"format\": 2, \"other\": 1}").unwrap();
        assert!(matches!(dir.identity(), Err(DataDirError::Newer { found: 2, .. })));
        assert!(matches!(dir.create_identity(&identity()), Err(DataDirError::Newer { .. })));
        durable_write(&root.path().join("identity.json"), b"{\"format\": 1").unwrap();
        assert!(matches!(dir.identity(), Err(DataDirError::Damaged { .. })));
    }
}
