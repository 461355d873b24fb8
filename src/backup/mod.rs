//! Backups of the database: made from this host's own copy while replication goes on, kept in `DATA_RECOVERY_VOLUME`,
//! verified, and brought back. The Console's API and the control socket both come here, and so does the schedule.
//!
//! Owns the folder of the backups and the one thing at a time that is done with it. Must never keep a takeover waiting,
//! never call a backup good that was not read again, and never leave a cluster with half of one.
//!
//! - `name.rs`: file names; the only way from a client's word to a path
//! - `copy.rs`: this host's databases into files, as of one raft index
//! - `archive.rs`, `cipher.rs`: these files into an archive, and back
//! - `make.rs`: a new backup, step by step; the verification of an old one
//! - `offsite.rs`, `store.rs`, `wire.rs`: copies of all that elsewhere (`BACKUP_URL`), and back
//! - `members.rs`: what the other members have
//! - `folder_access.rs`: the folder on a disk that may not answer
//! - `restore.rs`: a backup into the cluster; `unpack.rs`: into ordinary files
//! - `schedule.rs`: what is due when, and what is not kept any longer
//! - `jobs.rs`: what is under way and how it ended

mod archive;
mod cipher;
mod copy;
mod folder;
mod folder_access;
mod jobs;
mod make;
mod members;
mod name;
mod offsite;
mod restore;
mod schedule;
mod state;
mod store;
mod unpack;
mod wire;

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use thiserror::Error;

pub use name::{BackupId, Kind};
pub use restore::{Agreed, RestoreFrom};
pub use state::{Backup, BackupState, CopyRunning, CopyState, Keep, MemberBackups, Outcome, Running, Started, Work};
pub use store::RemoteBackup;
pub use unpack::{Unpacked, UnpackedFile, unpack};

use crate::{
    admin::{Act, Actor, Admin, audit},
    ask::Asker,
    events::Recorder,
    mutex::locked,
    node::Handle,
};
use cipher::Secret;
use folder::Folder;
use folder_access::FolderAccess;
use jobs::Jobs;
use members::{Round, Way};
use offsite::Offsite;

/// How the backups of this host are set up.
#[derive(Clone, Debug)]
pub struct BackupConfig {
    /// `DATA_RECOVERY_ENABLED`.
    pub enabled: bool,
    /// `DATA_RECOVERY_VOLUME`.
    pub folder: PathBuf,
    /// `BACKUP_KEEP_DAILY`, `_WEEKLY`, `_MONTHLY`.
    pub keep: Keep,
    /// `BACKUP_KEY_FILE`.
    pub key_file: Option<PathBuf>,
    /// `BACKUP_URL` and `BACKUP_CREDENTIALS_FILE`.
    pub url: Option<String>,
    pub credentials: Option<PathBuf>,
    /// `BACKUP_DELAY_SECONDS`.
    pub delay: Duration,
    /// The data folder of the node.
    pub data: PathBuf,
    /// Version of this program.
    pub version: String,
}

/// Why something was not done.
#[derive(Debug, Error)]
pub enum BackupError {
    /// The text says what is in the way and what to do. Nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// A name cannot be that of a backup; the text says what is allowed.
    #[error("{0}")]
    Name(String),
    /// There is no such backup.
    #[error("{0}")]
    NotFound(String),
    /// A backup is not what it should be.
    #[error("the backup is damaged: {0}")]
    Damaged(String),
    #[error(
        "{} bytes are needed in {}, and {free} are free: free some space, or set DATA_RECOVERY_VOLUME to a larger file system",
        needed,
        path.display()
    )]
    NoSpace { path: PathBuf, needed: u64, free: u64 },
    #[error("{} does not answer: check its file system", .0.display())]
    Hangs(PathBuf),
    #[error("cannot {verb} {}: {error}", path.display())]
    Io { verb: &'static str, path: PathBuf, error: io::Error },
    /// The place of the copies could not be used; the text says why.
    #[error("the place of BACKUP_URL: {0}")]
    Remote(String),
    /// It may have been done or not.
    #[error("{0}")]
    Unknown(String),
}

impl BackupError {
    fn io(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io { verb, path: path.to_owned(), error }
    }

    /// What the error means for a change of the folder: if the disk hangs, the change may be made later.
    fn of_change(self) -> Self {
        match self {
            Self::Hangs(path) => Self::Unknown(format!("{} does not answer: it may be done later", path.display())),
            other => other,
        }
    }
}

impl From<&BackupError> for audit::Outcome {
    fn from(error: &BackupError) -> Self {
        match error {
            BackupError::Unknown(why) => Self::Unknown(why.clone()),
            BackupError::Refused(why) | BackupError::Name(why) | BackupError::NotFound(why) => {
                Self::Refused(why.clone())
            }
            other => Self::Failed(other.to_string()),
        }
    }
}

/// A backup as an audit names it.
fn of_backup(action: &'static str, id: &str) -> Act {
    Act::new(action, format!("backup '{id}'"))
}

/// The backups of this host.
pub struct Backups {
    config: BackupConfig,
    folder: Folder,
    node: Handle,
    admin: Arc<Admin>,
    events: Recorder,
    jobs: Jobs,
    access: FolderAccess,
    /// When the next automatic one is due.
    next: Mutex<Option<u64>>,
    offsite: Offsite,
    asker: Asker,
    round: Round,
}

impl std::fmt::Debug for Backups {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backups").field("folder", &self.config.folder).finish_non_exhaustive()
    }
}

impl Backups {
    /// Prepares the backups of the node behind `node`. Nothing is touched yet.
    pub fn new(config: BackupConfig, node: Handle, admin: Arc<Admin>, events: Recorder, asker: Asker) -> Arc<Self> {
        let folder = Folder::new(config.folder.clone(), node.status().borrow().node);
        let offsite = Offsite::new(config.url.clone());
        let (jobs, access, next, round) = Default::default();
        Arc::new(Self { config, folder, node, admin, events, jobs, access, next, offsite, asker, round })
    }

    /// All backups in the folder of this host, newest first.
    ///
    /// # Errors
    /// [`BackupError::Io`] when the folder cannot be read, [`BackupError::Hangs`] when it does not answer.
    pub async fn list(&self) -> Result<Vec<Backup>, BackupError> {
        self.in_folder(Folder::list).await
    }

    /// Does something short with the folder.
    async fn in_folder<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Folder) -> Result<T, BackupError> + Send + 'static,
    ) -> Result<T, BackupError> {
        let folder = self.folder.clone();
        self.access.run(&self.config.folder, move || work(&folder)).await
    }

    /// How backups are set up, and what is under way.
    pub async fn state(&self) -> BackupState {
        // A folder that cannot be read shows where it is used.
        let found = self.in_folder(|folder| Ok((folder.free().ok(), folder.list().unwrap_or_default()))).await;
        let (free, list) = found.unwrap_or_default();
        let (running, last) = self.jobs.picture();
        BackupState {
            enabled: self.config.enabled,
            folder: self.config.folder.display().to_string(),
            free,
            encrypted: self.config.key_file.is_some(),
            keep: self.config.keep,
            next: *locked(&self.next),
            newest: list.iter().map(|backup| backup.time).max(),
            running,
            last,
            copies: self.offsite.picture(),
            members: self.round.picture(),
        }
    }

    /// Waits for the end of what was begun under this number; none if it is not over by then, or was forgotten.
    pub async fn wait(&self, number: u64, limit: Duration) -> Option<Outcome> {
        self.jobs.wait(number, limit).await
    }

    /// Where a backup lies: the name has been checked, and the file is there.
    ///
    /// # Errors
    /// [`BackupError::NotFound`] when it is not in the folder, [`BackupError::Hangs`] when the folder does not answer.
    pub async fn path(&self, id: &str) -> Result<PathBuf, BackupError> {
        let id = BackupId::read(id)?;
        self.in_folder(move |folder| folder.find(&id)).await
    }

    /// A backup for a download, and its length.
    ///
    /// # Errors
    /// [`BackupError::NotFound`] when it is not on this host; the text says where it is. [`BackupError::Io`] when it
    /// cannot be read, [`BackupError::Hangs`] when the folder does not answer.
    pub async fn download(&self, id: &str, by: &Actor) -> Result<(File, u64), BackupError> {
        // It has everything, the hashes of the passwords, too.
        self.admin.audited(by, of_backup("download", id), self.open(id)).await
    }

    async fn open(&self, id: &str) -> Result<(File, u64), BackupError> {
        let wanted = BackupId::read(id)?;
        let opened = self.in_folder(move |folder| {
            let path = folder.find(&wanted)?;
            let file = File::open(&path).map_err(BackupError::io("open", &path))?;
            let length = file.metadata().map_err(BackupError::io("look at", &path))?.len();
            Ok((file, length))
        });
        self.or_where(id, Way::Here, opened.await).await
    }

    /// Gives a manual backup another name.
    ///
    /// # Errors
    /// [`BackupError::Name`] for a name that no backup can have. [`BackupError::Refused`] for an automatic backup, for
    /// one that is in use, and when another one has the name. [`BackupError::NotFound`] when it is not on this host;
    /// the text says where it is. [`BackupError::Io`] when the disk fails, [`BackupError::Unknown`] when it does not
    /// answer: the backup may be renamed later.
    pub async fn rename(&self, id: &str, new: &str, by: &Actor) -> Result<Backup, BackupError> {
        let act = of_backup("rename", id).wish(&serde_json::json!({ "name": new }));
        self.admin.audited(by, act, self.give_name(id, new, by)).await
    }

    async fn give_name(&self, id: &str, new: &str, by: &Actor) -> Result<Backup, BackupError> {
        let old = BackupId::read(id)?;
        name::check_name(new)?;
        if old.kind() != Kind::Manual {
            return Err(BackupError::Refused("an automatic backup keeps its name".to_owned()));
        }
        self.jobs.check_free(id)?;
        let to = BackupId { name: new.to_owned(), ..old.clone() };
        let done = self.in_folder(move |folder| folder.rename(&old, &to)).await.map_err(BackupError::of_change);
        let done = self.or_where(id, Way::There(&format!("rename {id} {new}")), done).await?;
        tracing::info!(%by, from = id, to = done.id, "a backup was renamed");
        Ok(done)
    }

    /// Deletes a backup.
    ///
    /// # Errors
    /// [`BackupError::Refused`] while it is in use. [`BackupError::NotFound`] when it is not on this host; the text
    /// says where it is. [`BackupError::Io`] when the disk fails, [`BackupError::Unknown`] when it does not answer: the
    /// backup may be deleted later.
    pub async fn delete(&self, id: &str, by: &Actor) -> Result<(), BackupError> {
        self.admin.audited(by, of_backup("delete", id), self.drop(id, by)).await
    }

    async fn drop(&self, id: &str, by: &Actor) -> Result<(), BackupError> {
        let old = BackupId::read(id)?;
        self.jobs.check_free(id)?;
        let done = self.in_folder(move |folder| folder.delete(&old)).await.map_err(BackupError::of_change);
        self.or_where(id, Way::There(&format!("delete {id}")), done).await?;
        tracing::info!(%by, id, "a backup was deleted");
        Ok(())
    }

    fn secret(&self) -> Result<Option<Secret>, BackupError> {
        self.config.key_file.as_deref().map(Secret::read).transpose()
    }
}

/// Runs file work on a thread that may wait for a disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BackupError> + Send + 'static,
) -> Result<T, BackupError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(BackupError::Unknown(format!("it ended without an outcome: {error}"))),
    }
}
