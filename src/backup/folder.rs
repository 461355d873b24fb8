//! The folder of the backups: which backups there are, how much space is free, and a place to work in. Every path is
//! made of a [`BackupId`] or of a name in this file. Must never delete or rename anything else in that folder.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};

use super::{Backup, BackupError, BackupId, Kind};
use crate::{
    cluster::NodeId,
    storage::{fsync_dir, make_private_dir, pacer},
};

/// Most backups that are read from a folder.
const MAX_ENTRIES: usize = 10_000;
/// What the name of a workshop begins with; the number of the member follows.
const WORKSHOP: &str = ".work-";
/// A workshop without a new file for this long was left behind.
const ABANDONED: Duration = Duration::from_secs(3600);
/// Free space that is left to everything else on the same file system, in bytes.
const SPARE: u64 = 64 << 20;

/// The folder of the backups of this host.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    path: PathBuf,
    node: NodeId,
}

/// What identifies a file on every member that shares its folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Mark {
    pub inode: u64,
    /// When, in nanoseconds since 1970.
    pub changed: i64,
    pub bytes: u64,
}

/// Where a backup is made or unpacked; empty at first, and deleted when it is dropped.
#[derive(Debug)]
pub(super) struct Workshop(PathBuf);

impl Workshop {
    /// A file in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        // What is left over is deleted before the next work.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Free space of the file system that this lies in, in bytes.
pub(super) fn free(path: &Path) -> Result<u64, BackupError> {
    let space =
        statvfs(path).map_err(|errno| BackupError::io("look at the free space of", path)(io::Error::from(errno)))?;
    Ok(space.blocks_available() * space.fragment_size())
}

/// Makes a file that only its owner may read.
pub(super) fn create(path: &Path) -> Result<File, BackupError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600).open(path).map_err(BackupError::io("create", path))
}

impl Folder {
    pub fn new(path: PathBuf, node: NodeId) -> Self {
        Self { path, node }
    }

    /// All backups, newest first.
    pub fn list(&self) -> Result<Vec<Backup>, BackupError> {
        Ok(self.marked()?.into_iter().map(|(backup, _)| backup).collect())
    }

    /// All backups, newest first, each with the mark of its file.
    pub fn marked(&self) -> Result<Vec<(Backup, Mark)>, BackupError> {
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(BackupError::io("read the folder", &self.path)(error)),
        };
        let mut all: Vec<(Backup, Mark)> = entries
            .flatten()
            .filter_map(|entry| {
                let id = BackupId::parse(entry.file_name().to_str()?)?;
                // Of the file itself, not of what a link points to.
                let found = entry.metadata().ok().filter(fs::Metadata::is_file)?;
                let changed = found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec());
                Some((describe(&id, found.len()), Mark { inode: found.ino(), changed, bytes: found.len() }))
            })
            .take(MAX_ENTRIES)
            .collect();
        all.sort_by(|(one, _), (other, _)| (other.time, &one.id).cmp(&(one.time, &other.id)));
        Ok(all)
    }

    /// Free space in bytes.
    pub fn free(&self) -> Result<u64, BackupError> {
        free(&self.path)
    }

    /// Refuses what would fill the file system.
    pub fn check_space(&self, bytes: u64) -> Result<(), BackupError> {
        let (needed, free) = (bytes + SPARE, self.free()?);
        if free < needed { Err(BackupError::NoSpace { path: self.path.clone(), needed, free }) } else { Ok(()) }
    }

    /// The path of a backup that is there.
    pub fn find(&self, id: &BackupId) -> Result<PathBuf, BackupError> {
        let path = self.place(id);
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_file() => Ok(path),
            _ => Err(BackupError::NotFound(format!("there is no backup {id} in {}", self.path.display()))),
        }
    }

    /// Where a backup of this name lies, or would lie.
    pub fn place(&self, id: &BackupId) -> PathBuf {
        self.path.join(id.to_string())
    }

    /// Gives a finished archive its name, durably.
    pub fn publish(&self, made: &Path, id: &BackupId) -> Result<(), BackupError> {
        let path = self.place(id);
        if path.exists() && Kind::AUTOMATIC.contains(&id.kind()) {
            // Another member that shares the folder was less than a second faster: its backup is as good.
            return fs::remove_file(made).map_err(BackupError::io("delete", made));
        }
        if path.exists() {
            return Err(BackupError::Refused(format!("a backup {id} exists already")));
        }
        fs::rename(made, &path).and_then(|()| fsync_dir(&self.path)).map_err(BackupError::io("rename", &path))
    }

    /// Makes the file a backup of another kind as well, which takes no space.
    pub fn link(&self, from: &BackupId, to: &BackupId) -> Result<(), BackupError> {
        let (old, new) = (self.place(from), self.place(to));
        let linked = match fs::hard_link(&old, &new) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            // Not every file system has links.
            Err(_) => {
                let copy = self.path.join(format!(".link-{}", self.node));
                fs::copy(&old, &copy).and_then(|_| File::open(&copy)?.sync_all()).and_then(|()| fs::rename(&copy, &new))
            }
            done => done,
        };
        linked.and_then(|()| fsync_dir(&self.path)).map_err(BackupError::io("create", &new))
    }

    /// Gives a backup another name, durably.
    pub fn rename(&self, from: &BackupId, to: &BackupId) -> Result<Backup, BackupError> {
        let (old, new) = (self.find(from)?, self.place(to));
        if new.exists() {
            return Err(BackupError::Refused(format!("a backup {to} exists already")));
        }
        fs::rename(&old, &new).and_then(|()| fsync_dir(&self.path)).map_err(BackupError::io("rename", &old))?;
        let length = fs::metadata(&new).map(|found| found.len()).map_err(BackupError::io("read", &new))?;
        Ok(describe(to, length))
    }

    /// Deletes a backup, durably.
    pub fn delete(&self, id: &BackupId) -> Result<(), BackupError> {
        let path = self.find(id)?;
        pacer::remove(&path).map_err(BackupError::io("delete", &path))
    }

    /// True while another member that shares the folder makes a backup in it.
    pub fn is_used_by_another(&self) -> bool {
        let own = format!("{WORKSHOP}{}", self.node);
        let fresh = |entry: &fs::DirEntry| {
            let made = entry.metadata().and_then(|found| found.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            // The clocks of two hosts differ a little, either way.
            made.elapsed().unwrap_or_else(|error| error.duration()) < ABANDONED
        };
        let another = |entry: &fs::DirEntry| {
            let name = entry.file_name();
            name.to_str().is_some_and(|name| name.starts_with(WORKSHOP) && name != own) && fresh(entry)
        };
        fs::read_dir(&self.path).is_ok_and(|entries| entries.flatten().any(|entry| another(&entry)))
    }

    /// Makes an empty place to work in; what an earlier process has left there is deleted.
    pub fn workshop(&self) -> Result<Workshop, BackupError> {
        make_private_dir(&self.path).map_err(BackupError::io("create the folder", &self.path))?;
        // Members may share a folder.
        let path = self.path.join(format!("{WORKSHOP}{}", self.node));
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(BackupError::io("delete", &path)(error)),
            _ => {}
        }
        make_private_dir(&path).map_err(BackupError::io("create", &path))?;
        Ok(Workshop(path))
    }
}

/// What is shown of a backup of this name and length.
pub(super) fn describe(id: &BackupId, bytes: u64) -> Backup {
    Backup {
        id: id.to_string(),
        node: String::new(),
        name: id.name.clone(),
        version: id.version.clone(),
        time: id.time,
        bytes,
        kind: id.kind(),
        encrypted: id.sealed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> BackupId {
        BackupId::parse(text).unwrap()
    }

    #[test]
    fn only_backups_are_seen_and_touched() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path().join("b"), 2);
        assert!(folder.list().unwrap().is_empty(), "a folder that is not there yet is empty");
        let workshop = folder.workshop().unwrap();
        let (old, new) = (id("a-0.1.0-5.tar.gz"), id("z-0.1.0-9.tar.gz"));
        for one in [&old, &new] {
            fs::write(workshop.join("x"), "12345").unwrap();
            folder.publish(&workshop.join("x"), one).unwrap();
        }
        fs::write(folder.path.join("notes.txt"), "mine").unwrap();
        fs::create_dir(folder.path.join("dir-0.1.0-7.tar.gz")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path.join("link-0.1.0-7.tar.gz")).unwrap();
        let ids: Vec<_> = folder.list().unwrap().into_iter().map(|backup| backup.id).collect();
        assert_eq!(ids, ["z-0.1.0-9.tar.gz", "a-0.1.0-5.tar.gz"]);
        for odd in ["dir-0.1.0-7.tar.gz", "link-0.1.0-7.tar.gz", "none-0.1.0-7.tar.gz"] {
            assert!(matches!(folder.delete(&id(odd)), Err(BackupError::NotFound(_))), "{odd}");
        }
        assert!(folder.rename(&old, &new).is_err());
        folder.link(&old, &id("weekly-0.1.0-5.tar.gz")).unwrap();
        folder.link(&old, &id("weekly-0.1.0-5.tar.gz")).unwrap();
        assert_eq!(folder.rename(&old, &id("b-0.1.0-5.tar.gz")).unwrap().bytes, 5);
        folder.delete(&new).unwrap();
        assert_eq!(folder.list().unwrap().len(), 2);
        drop(workshop);
        fs::create_dir(folder.path.join(".work-2")).unwrap();
        fs::write(folder.path.join(".work-2/left-over"), "").unwrap();
        let workshop = folder.workshop().unwrap();
        assert!(!workshop.join("left-over").exists());
        drop(workshop);
        assert!(!folder.path.join(".work-2").exists() && folder.path.join("notes.txt").exists());
    }

    #[test]
    fn members_that_share_a_folder_are_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (Folder::new(dir.path().to_owned(), 1), Folder::new(dir.path().to_owned(), 2));
        let first = one.workshop().unwrap();
        assert!(two.is_used_by_another() && !one.is_used_by_another());
        let second = two.workshop().unwrap();
        let (daily, mine) = (id("daily-0.1.0-5.tar.gz"), id("mine-0.1.0-5.tar.gz"));
        for (folder, workshop, text) in [(&one, &first, "of one"), (&two, &second, "of two")] {
            fs::write(workshop.join("x"), text).unwrap();
            folder.publish(&workshop.join("x"), &daily).unwrap();
        }
        assert_eq!(fs::read_to_string(one.place(&daily)).unwrap(), "of one");
        assert!(!second.join("x").exists());
        fs::write(second.join("x"), "of two").unwrap();
        two.publish(&second.join("x"), &mine).unwrap();
        assert!(two.publish(&second.join("x"), &mine).is_err(), "somebody wants it under this name");
        drop(first);
        assert!(!two.is_used_by_another());
        // Of a host that is gone for good.
        fs::create_dir(dir.path().join(".work-3")).unwrap();
        assert!(two.is_used_by_another());
        let long_ago = SystemTime::now() - 2 * ABANDONED;
        File::open(dir.path().join(".work-3")).unwrap().set_modified(long_ago).unwrap();
        assert!(!two.is_used_by_another());
    }

    #[test]
    fn space_is_looked_at_before() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path().to_owned(), 1);
        folder.check_space(0).unwrap();
        let error = folder.check_space(1 << 60).unwrap_err();
        assert!(error.to_string().contains("DATA_RECOVERY_VOLUME"), "{error}");
    }
}
