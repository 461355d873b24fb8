//! REMEMBERS. What survives a crash on this host.
//!
//! This file owns the data folder: its lock, its identity and the durable replacement of small files. It must never
//! decide anything about roles, and never hand a folder to two processes or to a member it does not belong to.

mod capture;
mod checked;
pub mod checkpoint;
pub mod checksum;
pub mod database;
pub mod databases;
pub mod folder;
pub mod gate;
pub mod membership;
pub mod memory;
pub mod online_copy;
pub mod pacer;
mod parts;
pub mod raft_log;
pub mod replica;
pub mod scrub;
pub mod snapshot;
pub mod tail;
pub mod transaction;
#[allow(unsafe_code, reason = "SQLite has a C interface: this folder is the only place that calls it")]
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
/// Largest `identity.json` that is read, in bytes: far more than the largest cluster needs.
const IDENTITY_LIMIT: u64 = 1 << 20;
/// Name of the file that says which member a data folder belongs to.
const IDENTITY: &str = "identity.json";

/// Why a data folder cannot be used.
#[derive(Debug, Error)]
pub enum DataDirError {
    #[error("cannot {verb} {}: {error}", path.display())]
    Io { verb: &'static str, path: PathBuf, error: io::Error },
    #[error("data folder {} is in use by the process with pid {pid}; stop it first", path.display())]
    Locked { path: PathBuf, pid: String },
    #[error("data folder {} has no identity (identity.json is missing): it was never set up", path.display())]
    NoIdentity { path: PathBuf },
    #[error("data folder {} already belongs to node {node} ({name}) of cluster {cluster}; use an empty folder", path.display())]
    Exists { path: PathBuf, cluster: ClusterId, node: NodeId, name: String },
    #[error(
        "data folder {} belongs to node {found_node} ({found_name}) of cluster {found_cluster}, but node {node} of \
         cluster {cluster} is expected; set DATA_FOLDER to that node's own folder, or use an empty one",
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

/// Whom a data folder belongs to: kept in `identity.json`, written once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Format of the file: [`IDENTITY_FORMAT`].
    pub format: u32,
    pub cluster: ClusterId,
    pub node: NodeId,
    pub name: String,
    /// The members when the folder was set up.
    pub membership: Membership,
}

impl Identity {
    /// Reads the identity of a data folder. Another process may be using the folder.
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
        // The format comes first: a newer file may differ in everything else.
        let value = checked::decode(&text).map_err(damaged)?;
        match value.get("format").and_then(serde_json::Value::as_u64) {
            Some(found) if found > u64::from(IDENTITY_FORMAT) => Err(DataDirError::Newer { path, found }),
            _ => serde_json::from_value(value).map_err(|error| damaged(error.to_string())),
        }
    }
}

/// A data folder, locked for this process until this is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    /// Held for its flock.
    _lock: Flock<File>,
}

impl DataDir {
    /// Creates the folder (mode 0700) if it is missing, and takes its lock.
    ///
    /// # Errors
    /// [`DataDirError::Locked`] when another process has it, [`DataDirError::Io`] when it cannot be created or locked.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, DataDirError> {
        let path = path.into();
        let failed = |verb, path: &Path| {
            let path = path.to_owned();
            move |error| DataDirError::Io { verb, path, error }
        };
        make_private_dir(&path).map_err(failed("create the folder", &path))?;
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
        // Only for the message that another process would print: a full disk must not keep a node from starting.
        let _ = record();
        Ok(Self { path, _lock: lock })
    }

    /// Where the folder is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the identity of a new folder.
    ///
    /// # Errors
    /// [`DataDirError::Exists`] when there is one already, the error of [`Identity::read`] when there is one that
    /// cannot be read, [`DataDirError::Io`] when the disk fails or is full.
    pub fn create_identity(&self, identity: &Identity) -> Result<(), DataDirError> {
        // Once there is an identity, a missing raft log is a lost one.
        self.write_identity(identity, memory::permit_new_log)
    }

    /// Writes the identity of a folder that has lost it. The folder may have lost its raft log, too, so no new one is
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

    /// Refuses a folder that has an identity.
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
    /// The error of [`Identity::read`].
    pub fn identity(&self) -> Result<Identity, DataDirError> {
        Identity::read(&self.path)
    }

    /// Rewrites the identity with a checksum if an older program wrote it without one.
    ///
    /// # Errors
    /// [`DataDirError::Io`] when the file cannot be read or written. It is unchanged then.
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

    /// Reads the identity, and refuses it unless it belongs to this node of this cluster.
    ///
    /// # Errors
    /// [`DataDirError::Foreign`] when it belongs to another node or cluster. Otherwise the error of [`Identity::read`].
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

/// The pid in a lock file, or "unknown" if it cannot be read.
fn holder(mut file: &File) -> String {
    let mut text = String::new();
    match file.read_to_string(&mut text) {
        Ok(_) if !text.trim().is_empty() => text.trim().to_owned(),
        _ => "unknown".to_owned(),
    }
}

/// Creates a folder and its missing parents, mode 0700, durably. An existing folder is left as it is.
///
/// # Errors
/// When one of the folders cannot be created or synced.
pub fn make_private_dir(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = folder_of(path);
    // Each new folder is an entry in the one above it, which has to be synced.
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

/// Replaces the content of a small file so that a crash leaves either the old or the new content. Mode 0600.
///
/// # Errors
/// When the disk fails or is full. The file then has either its old content or the new one.
pub fn durable_write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_file(Place::Small, path, bytes)
}

/// As [`durable_write`], and the [watch] sees a write to this place.
fn replace_file(place: Place, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let Some(name) = path.file_name() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a path of a file"));
    };
    let parent = folder_of(path);
    let mut temporary = name.to_owned();
    temporary.push(".new");
    let temporary = parent.join(temporary);
    let write = || {
        // An earlier attempt may have left a link, or a file that others can read.
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

/// Removes whatever has this name: a file, a link, or a folder with all its content. Does nothing if there is nothing.
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

/// Makes creations, renames and removals in a folder durable.
///
/// # Errors
/// When the folder cannot be opened or synced.
pub fn fsync_dir(path: &Path) -> io::Result<()> {
    descriptors::open(|| File::open(path))?.sync_all()
}

/// True for an error that will not go away: what is on the disk cannot be read, or is not what it should be. False for
/// what the system lacks at the moment, as memory or descriptors.
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
    /// The transaction will certainly never be committed: its last part was not proposed.
    #[error("not replicated: {0}")]
    Refused(String),
    /// The transaction will never be committed, either: this host has no space for it.
    #[error("not replicated: {0}")]
    Full(String),
    /// The last part was proposed, and the next primary's raft log decides. The caller must fence itself.
    #[error("outcome unknown: {0}")]
    Unknown(String),
}

/// Where captured transactions go: to the consensus loop in a daemon, to a test double in tests of the capture.
pub trait Replicator: Send + Sync {
    /// Proposes one encoded part ([`crate::storage::transaction`]). With `last == false` it returns as soon as the part
    /// is accepted, and blocks only to bound the parts in flight; the index that it returns means nothing. With `last
    /// == true` it blocks until a majority has the whole transaction in its raft logs, and returns the raft index of
    /// the last part.
    ///
    /// # Errors
    /// [`ReplicateError::Refused`] and [`ReplicateError::Full`] when the transaction will never be committed.
    /// [`ReplicateError::Unknown`] when it may be: the caller must fence itself.
    fn replicate(&self, part: Vec<u8>, last: bool) -> Result<u64, ReplicateError>;

    /// Returns when this host's own disk has everything for which [`Replicator::replicate`] has returned. The majority
    /// may be the other hosts, and the database file must not get ahead of this host's raft log: a crash would leave a
    /// file that no replay explains. Does nothing where `replicate` waits for this host's disk anyway.
    ///
    /// # Errors
    /// When the disk fails. Nothing may be copied into the database file then.
    fn make_durable(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Where the earlier parts of a long transaction are read again when its last part commits: the raft log, or a test's
/// list.
pub trait EntrySource {
    /// Calls `each` with the index and payload of every command entry in `first..=last`, in order and in bounded
    /// memory.
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
