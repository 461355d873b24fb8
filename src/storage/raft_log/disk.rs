//! The few file operations that the raft log needs, so that a test can simulate a crash after each of them. Must never
//! decide anything: it does what it is told, and reports every error as it is.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use crate::{
    descriptors,
    storage::{
        fsync_dir, make_private_dir,
        watch::{Act, Place, run},
    },
};

/// A file system with the files of a raft log.
pub trait Disk: Send + Sync + 'static {
    /// Creates the folder of the log, durably, unless it is there.
    ///
    /// # Errors
    /// What the file system reports; so do all other methods.
    fn make_dir(&self, dir: &Path) -> io::Result<()>;
    /// Creates an empty file, or empties an existing one.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Opens an existing file for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Renames a file, replacing the target. Durable after [`Disk::sync_dir`].
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file. Durable after [`Disk::sync_dir`].
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes all earlier creations, renames and removals in the folder durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// The names in the folder, in any order.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
}

/// One open file.
pub trait DiskFile: Send + Sync {
    /// Fills `bytes` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file is shorter. Otherwise what the file system reports; so do all other methods.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `bytes` at `offset`. Durable after [`DiskFile::sync_data`].
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes all earlier writes durable, and the file's size with them.
    fn sync_data(&self) -> io::Result<()>;
    /// Size in bytes.
    fn size(&self) -> io::Result<u64>;
}

/// The real file system, under the [watch](crate::storage::watch). Files have mode 0600 and are not inherited by child
/// processes.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        make_private_dir(dir)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        Ok(Box::new(run(Place::RaftLog, Act::Open, || descriptors::open(|| options.open(path)))?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        Ok(Box::new(run(Place::RaftLog, Act::Open, || descriptors::open(|| options.open(path)))?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        run(Place::RaftLog, Act::Rename, || fs::rename(from, to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        run(Place::RaftLog, Act::Remove, || fs::remove_file(path))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        run(Place::RaftLog, Act::Sync, || fsync_dir(dir))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        descriptors::open(|| fs::read_dir(dir))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    }
}

impl DiskFile for File {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        run(Place::RaftLog, Act::Read, || self.read_exact_at(bytes, offset))
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        run(Place::RaftLog, Act::Write, || self.write_all_at(bytes, offset))
    }

    fn sync_data(&self) -> io::Result<()> {
        run(Place::RaftLog, Act::Sync, || File::sync_data(self))
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}
