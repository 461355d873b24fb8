//! Where the parts of a service's folder lie, below `DATA_FOLDER/service`: the names of `files`, `checkpoints`, `spill`
//! and `catalogue.json`, how a file of `files` is reached, and whose they are. Must never follow a link: an application
//! may have made it.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{MetadataExt, lchown},
    path::{Path, PathBuf},
};

use nix::unistd::{getegid, geteuid};
use rustix::fs::OFlags;

use super::backing::Backing;
use crate::storage::{clear_away, make_private_dir};

/// The folder of a service, in the data folder.
pub const FOLDER: &str = "service";
/// The file in it that says which databases there are.
pub const CATALOGUE: &str = "catalogue.json";
/// Databases of one folder.
pub const MOST_DATABASES: usize = 256;

/// The places of one service.
#[derive(Clone, Debug)]
pub(in crate::storage) struct Places {
    pub root: PathBuf,
}

impl Places {
    /// Those in a data folder.
    pub fn of(data: &Path) -> Self {
        Self { root: data.join(FOLDER) }
    }

    /// The folder that is served, and that all members have.
    pub fn files(&self) -> PathBuf {
        self.root.join("files")
    }

    /// Which databases there are.
    pub fn catalogue(&self) -> PathBuf {
        self.root.join(CATALOGUE)
    }

    /// The folder of the checkpoint records.
    pub fn records(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The checkpoint record of a database.
    pub fn record(&self, id: u32) -> PathBuf {
        self.records().join(id.to_string())
    }

    /// The folder of what does not fit into memory.
    pub fn spill(&self) -> PathBuf {
        self.root.join("spill")
    }

    /// Opens the file of a database to be read.
    ///
    /// # Errors
    /// When it is not there, is not reached without a link, or cannot be opened.
    pub fn open(&self, path: &Path) -> io::Result<File> {
        Ok(Backing::open(&self.files())?.open_file(path, OFlags::RDONLY)?)
    }

    /// Makes the folders that a database lies in. What is in their way is no folder, or a link, and is removed.
    ///
    /// # Errors
    /// When the disk fails or is full.
    pub fn make_room(&self, path: &Path) -> io::Result<()> {
        let files = self.files();
        make_private_dir(&files)?;
        let mut folders: Vec<_> = path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty()).collect();
        folders.reverse();
        for folder in folders {
            let folder = files.join(folder);
            if fs::symlink_metadata(&folder).is_ok_and(|found| !found.is_dir()) {
                clear_away(&folder)?;
            }
            make_private_dir(&folder)?;
        }
        Ok(())
    }

    /// Makes all folders: a member without a service has none.
    ///
    /// # Errors
    /// When one of them cannot be made.
    pub fn make(&self) -> io::Result<()> {
        let folders = [self.root.clone(), self.files(), self.spill(), self.records()];
        folders.iter().try_for_each(|folder| make_private_dir(folder))
    }

    /// Gives the files to a user and a group, and of these paths below them what members have made.
    ///
    /// # Errors
    /// When the owner of one cannot be read or changed.
    pub fn give_to(&self, (user, group): (u32, u32), paths: &[PathBuf]) -> io::Result<()> {
        let (own, files) = ((geteuid().as_raw(), getegid().as_raw()), self.files());
        let give = |path: &Path, always: bool| {
            let found = fs::symlink_metadata(path)?;
            let owner = (found.uid(), found.gid());
            // What the service has given to somebody stays theirs.
            if owner == (user, group) || !(always || owner == own) {
                return Ok(());
            }
            lchown(path, Some(user), Some(group))
        };
        give(&files, true)?;
        for path in paths {
            let parts = path.ancestors().filter(|part| !part.as_os_str().is_empty());
            parts.map(|part| files.join(part)).try_for_each(|part| give(&part, false))?;
        }
        Ok(())
    }
}
