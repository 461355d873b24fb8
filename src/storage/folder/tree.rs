//! The files and folders that are served: what the kernel asks for by number becomes a call on the
//! [backing folder](super::backing) by path. Owns the inode table and what is open. Must never wait for a majority, and
//! never hold a lock while the disk is synced.
//!
//! `names` is held for reading while a path is worked out and used, and for writing while one changes: a folder that is
//! renamed meanwhile takes no call elsewhere.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::{
    fs::{FileType, Gid, Mode, OFlags, RenameFlags, Stat, StatVfs, Timestamps, Uid, fchmod, fchown, fstat, futimens},
    io::Errno,
};

use super::{
    backing::{Backing, Listed, Owner, identity},
    overlay::read_up_to,
    paths::Table,
    sqlite::{Part, Registry, failure},
};
use crate::mutex::locked;

const LINKED: &str = "a database, its WAL and its journal have one name each: no link is made";
const RENAMED: &str =
    "a database that is served is not renamed or replaced: stop the service, and import it under its new name";

/// Files and folders that are open at once.
pub(super) const MOST_OPEN: usize = 1 << 16;

/// A file as the kernel knows it.
#[derive(Debug)]
pub(super) struct Entry {
    pub number: u64,
    pub stat: Stat,
}

/// An open file.
#[derive(Debug)]
pub(super) struct Open {
    pub number: u64,
    pub file: File,
}

/// What is to change about a file.
#[derive(Debug, Default)]
pub(super) struct Change {
    pub mode: Option<u32>,
    pub user: Option<u32>,
    pub group: Option<u32>,
    pub size: Option<u64>,
    pub times: Option<Timestamps>,
}

#[derive(Debug)]
pub(super) struct Tree {
    backing: Backing,
    /// The databases; none where the folder is no more than a folder.
    registry: Option<Arc<Registry>>,
    table: Mutex<Table>,
    names: RwLock<()>,
    files: RwLock<HashMap<u64, Arc<Open>>>,
    folders: Mutex<HashMap<u64, Arc<Vec<Listed>>>>,
    next: AtomicU64,
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

impl Tree {
    /// Serves this folder.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn new(path: &Path, registry: Option<Arc<Registry>>) -> Result<Self, Errno> {
        let backing = Backing::open(path)?;
        let table = Mutex::new(Table::new(identity(&backing.stat_root()?)));
        let (names, files, folders) = (RwLock::default(), RwLock::default(), Mutex::default());
        Ok(Self { backing, registry, table, names, files, folders, next: AtomicU64::new(1) })
    }

    fn read_names(&self) -> RwLockReadGuard<'_, ()> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change_names(&self) -> RwLockWriteGuard<'_, ()> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn child(&self, parent: u64, name: &OsStr) -> Result<PathBuf, Errno> {
        locked(&self.table).child(parent, name)
    }

    fn path(&self, number: u64) -> Result<PathBuf, Errno> {
        locked(&self.table).path(number)
    }

    /// Tells the kernel of what has this name.
    fn entry(&self, parent: u64, name: &OsStr, path: &Path) -> Result<Entry, Errno> {
        let stat = self.backing.stat(path)?;
        let number = locked(&self.table).looked_up(parent, name, identity(&stat))?;
        if let Some(registry) = &self.registry {
            registry.seen(path, number);
        }
        Ok(Entry { number, stat: self.as_seen(number, stat) })
    }

    /// What a file is to a database.
    pub fn part(&self, number: u64) -> Option<Part> {
        self.registry.as_ref()?.part(number)
    }

    /// A database is as long as its application sees it.
    fn as_seen(&self, number: u64, mut stat: Stat) -> Stat {
        if let Some(Part::Database(guarded)) = self.part(number)
            && let Some(size) = guarded.size()
        {
            stat.st_size = size as i64;
        }
        stat
    }

    /// Has the databases look at a file that is about to be made or written to.
    fn opens(&self, path: &Path) -> Result<(), Errno> {
        let number_of = |file| locked(&self.table).number(file);
        self.registry.as_ref().map_or(Ok(()), |registry| registry.opens(path, &self.backing, number_of))
    }

    /// Refuses what cannot be done to a file of a database.
    fn keep(&self, path: &Path, what: &str) -> Result<(), Errno> {
        self.registry.as_ref().map_or(Ok(()), |registry| registry.keep(path, what))
    }

    /// What has this name.
    ///
    /// # Errors
    /// `ENOENT` when there is nothing.
    pub fn look_up(&self, parent: u64, name: &OsStr) -> Result<Entry, Errno> {
        let _names = self.read_names();
        let path = self.child(parent, name)?;
        self.entry(parent, name, &path)
    }

    pub fn forget(&self, number: u64, count: u64) {
        let unknown = locked(&self.table).forget(number, count);
        if let Some(registry) = self.registry.as_ref().filter(|_| unknown) {
            registry.forget(number);
        }
    }

    /// The open file of a handle.
    ///
    /// # Errors
    /// `EBADF` when there is none.
    pub fn opened(&self, handle: u64) -> Result<Arc<Open>, Errno> {
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        files.get(&handle).cloned().ok_or(Errno::BADF)
    }

    /// A file that is open, by its number: it may have no name any more.
    fn open_by_number(&self, number: u64) -> Option<Arc<Open>> {
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        files.values().find(|open| open.number == number).cloned()
    }

    pub fn attributes(&self, number: u64, handle: Option<u64>) -> Result<Stat, Errno> {
        self.attributes_below(number, handle).map(|stat| self.as_seen(number, stat))
    }

    fn attributes_below(&self, number: u64, handle: Option<u64>) -> Result<Stat, Errno> {
        if let Some(handle) = handle {
            return fstat(&self.opened(handle)?.file);
        }
        let _names = self.read_names();
        match self.path(number).and_then(|path| self.backing.stat(&path)) {
            Err(Errno::NOENT) => fstat(&self.open_by_number(number).ok_or(Errno::NOENT)?.file),
            found => found,
        }
    }

    /// Changes a file, and returns what it is then. May wait for a majority.
    pub fn change(&self, number: u64, handle: Option<u64>, change: &Change) -> Result<Stat, Errno> {
        if let Some(size) = change.size {
            let resize = || self.resize(number, handle, size);
            match self.part(number) {
                None => resize(),
                Some(Part::Database(guarded)) => guarded.resize(size).map_err(|stop| failure(&stop)),
                Some(Part::Journal(guarded)) => {
                    let resize = || resize().map_err(std::io::Error::from);
                    guarded.journal_resize(size, resize).map_err(|stop| failure(&stop))
                }
                Some(Part::Wal(guarded)) => {
                    guarded.may_cut_wal(size).map_err(|stop| failure(&stop)).and_then(|()| resize())
                }
            }?;
        }
        self.change_others(number, handle, change).map(|stat| self.as_seen(number, stat))
    }

    fn resize(&self, number: u64, handle: Option<u64>, size: u64) -> Result<(), Errno> {
        let set = |file: &File| file.set_len(size).map_err(|error| errno(&error));
        if let Some(handle) = handle {
            return set(&self.opened(handle)?.file);
        }
        let _names = self.read_names();
        match self.path(number).and_then(|path| self.backing.open_file(&path, OFlags::RDWR)) {
            Err(Errno::NOENT) => set(&self.open_by_number(number).ok_or(Errno::NOENT)?.file),
            file => set(&file?),
        }
    }

    /// Changes all but the size.
    fn change_others(&self, number: u64, handle: Option<u64>, change: &Change) -> Result<Stat, Errno> {
        if let Some(handle) = handle {
            // By its descriptor: it may have no name any more.
            return change_open(&self.opened(handle)?.file, change);
        }
        let _names = self.read_names();
        let path = match self.path(number) {
            Err(error) => return change_open(&self.open_by_number(number).ok_or(error)?.file, change),
            Ok(path) => path,
        };
        if change.user.is_some() || change.group.is_some() {
            self.backing.set_owner(&path, change.user, change.group)?;
        }
        // After the owner, whose change takes away some bits.
        if let Some(mode) = change.mode {
            self.backing.set_mode(&path, Mode::from_raw_mode(mode))?;
        }
        if let Some(times) = &change.times {
            self.backing.set_times(&path, times)?;
        }
        self.backing.stat(&path)
    }

    pub fn read_symlink(&self, number: u64) -> Result<Vec<u8>, Errno> {
        let _names = self.read_names();
        Ok(self.backing.read_symlink(&self.path(number)?)?.into_bytes())
    }

    pub fn make_node(
        &self,
        (parent, name): (u64, &OsStr),
        mode: u32,
        device: u64,
        owner: Owner,
    ) -> Result<Entry, Errno> {
        let _names = self.read_names();
        let path = self.child(parent, name)?;
        self.opens(&path)?;
        let (kind, mode) = (FileType::from_raw_mode(mode), Mode::from_raw_mode(mode));
        self.backing.make_node(&path, kind, mode, device, owner)?;
        self.entry(parent, name, &path)
    }

    pub fn make_folder(&self, parent: u64, name: &OsStr, mode: u32, owner: Owner) -> Result<Entry, Errno> {
        let _names = self.read_names();
        let path = self.child(parent, name)?;
        self.backing.make_folder(&path, Mode::from_raw_mode(mode), owner)?;
        self.entry(parent, name, &path)
    }

    pub fn make_symlink(&self, parent: u64, name: &OsStr, target: &Path, owner: Owner) -> Result<Entry, Errno> {
        let _names = self.read_names();
        let path = self.child(parent, name)?;
        self.backing.make_symlink(&path, target, owner)?;
        self.entry(parent, name, &path)
    }

    pub fn link(&self, number: u64, parent: u64, name: &OsStr) -> Result<Entry, Errno> {
        let _names = self.read_names();
        let (from, path) = (self.path(number)?, self.child(parent, name)?);
        self.keep(&from, LINKED)?;
        self.keep(&path, LINKED)?;
        self.backing.link(&from, &path)?;
        self.entry(parent, name, &path)
    }

    /// Removes a name. May wait for a majority.
    pub fn remove(&self, parent: u64, name: &OsStr, folder: bool) -> Result<(), Errno> {
        let path = {
            let _names = self.read_names();
            self.child(parent, name)?
        };
        let remove = || self.remove_below(parent, name, folder);
        let Some(registry) = &self.registry else { return remove() };
        match registry.by_path(&path) {
            Some(Part::Journal(guarded)) => {
                // Nothing is committed by the removal of what is not there.
                self.look_for(&path)?;
                guarded.journal_remove(|| remove().map_err(std::io::Error::from)).map_err(|stop| failure(&stop))
            }
            Some(Part::Wal(guarded)) => {
                self.look_for(&path)?;
                guarded.may_cut_wal(0).map_err(|stop| failure(&stop))?;
                remove()
            }
            Some(Part::Database(guarded)) => {
                self.look_for(&path)?;
                registry.remove(&guarded, || remove().map_err(std::io::Error::from)).map_err(|stop| failure(&stop))
            }
            None => remove(),
        }
    }

    fn look_for(&self, path: &Path) -> Result<(), Errno> {
        let _names = self.read_names();
        self.backing.stat(path).map(|_| ())
    }

    fn remove_below(&self, parent: u64, name: &OsStr, folder: bool) -> Result<(), Errno> {
        let _names = self.change_names();
        let path = self.child(parent, name)?;
        let stat = self.backing.stat(&path)?;
        if folder { self.backing.remove_folder(&path) } else { self.backing.remove_file(&path) }?;
        if let Some(registry) = &self.registry {
            registry.forget_plain(&path);
        }
        self.gone(parent, name, &stat, folder);
        Ok(())
    }

    fn gone(&self, parent: u64, name: &OsStr, stat: &Stat, folder: bool) {
        locked(&self.table).unlinked(parent, name, identity(stat), folder || stat.st_nlink <= 1);
    }

    pub fn rename(&self, from: (u64, &OsStr), to: (u64, &OsStr), flags: RenameFlags) -> Result<(), Errno> {
        // Whiteouts belong to layered file systems.
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Errno::INVAL);
        }
        let _names = self.change_names();
        let (source, target) = (self.child(from.0, from.1)?, self.child(to.0, to.1)?);
        self.keep(&source, RENAMED)?;
        self.keep(&target, RENAMED)?;
        let moved = self.backing.stat(&source)?;
        let replaced = self.backing.stat(&target).ok();
        self.backing.rename(&source, &target, flags)?;
        if let Some(registry) = self.registry.as_ref().filter(|_| is_no_folder(&moved)) {
            registry.forget_plain(&source);
            registry.note_plain(&target);
        }
        if let Some(replaced) = replaced.filter(|replaced| identity(replaced) != identity(&moved)) {
            if flags.contains(RenameFlags::EXCHANGE) {
                locked(&self.table).renamed(identity(&replaced), to, from);
            } else {
                let folder = FileType::from_raw_mode(replaced.st_mode) == FileType::Directory;
                self.gone(to.0, to.1, &replaced, folder);
            }
        }
        // Two names of one file: rename(2) does nothing then.
        if self.backing.stat(&source).map(|left| identity(&left)) != Ok(identity(&moved)) {
            locked(&self.table).renamed(identity(&moved), from, to);
        }
        Ok(())
    }

    fn keep_open(&self, number: u64, file: File) -> Result<u64, Errno> {
        let mut files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        if files.len() >= MOST_OPEN {
            return Err(Errno::NFILE);
        }
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        files.insert(handle, Arc::new(Open { number, file }));
        Ok(handle)
    }

    /// Opens a file. Returns its handle.
    pub fn open(&self, number: u64, flags: OFlags) -> Result<u64, Errno> {
        let _names = self.read_names();
        let (path, own) = (self.path(number)?, own_flags(flags));
        if own == OFlags::RDWR {
            self.opens(&path)?;
            if let Some(registry) = &self.registry {
                registry.seen(&path, number);
                registry.note_plain(&path);
            }
        }
        self.keep_open(number, self.backing.open_file(&path, own)?)
    }

    /// Makes a file and opens it. Returns its handle as well.
    pub fn create(
        &self,
        (parent, name): (u64, &OsStr),
        mode: u32,
        flags: OFlags,
        owner: Owner,
    ) -> Result<(Entry, u64), Errno> {
        let _names = self.read_names();
        let path = self.child(parent, name)?;
        self.opens(&path)?;
        let file = match self.backing.create_file(&path, own_flags(flags), Mode::from_raw_mode(mode), owner) {
            Err(Errno::EXIST) if !flags.contains(OFlags::EXCL) => self.backing.open_file(&path, own_flags(flags))?,
            made => made?,
        };
        if let Some(registry) = &self.registry {
            registry.note_plain(&path);
        }
        let entry = self.entry(parent, name, &path)?;
        let handle = self.keep_open(entry.number, file)?;
        Ok((entry, handle))
    }

    pub fn close(&self, handle: u64) {
        self.files.write().unwrap_or_else(PoisonError::into_inner).remove(&handle);
    }

    /// Reads up to `size` bytes; fewer only at the end of the file.
    pub fn read(&self, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let open = self.opened(handle)?;
        let mut bytes = vec![0; size as usize];
        let count = match self.part(open.number) {
            Some(Part::Database(guarded)) => guarded.read(offset, &mut bytes),
            Some(Part::Wal(guarded)) => guarded.wal_read(&open.file, offset, &mut bytes),
            Some(Part::Journal(_)) | None => read_up_to(&open.file, offset, &mut bytes),
        };
        bytes.truncate(count.map_err(|error| errno(&error))?);
        Ok(bytes)
    }

    /// Writes to what belongs to no database.
    pub fn write(&self, open: &Open, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        if let Some(registry) = &self.registry {
            let path = || self.path(open.number).unwrap_or_else(|_| PathBuf::from("a file without a name"));
            registry.plain_write(path, &open.file, offset, bytes)?;
        }
        open.file.write_all_at(bytes, offset).map_err(|error| errno(&error))
    }

    /// Reads the names in a folder, as they are now.
    pub fn open_folder(&self, number: u64) -> Result<u64, Errno> {
        let _names = self.read_names();
        let mut listed = self.backing.list(&self.path(number)?)?;
        let device = self.backing.stat_root()?.st_dev;
        {
            let table = locked(&self.table);
            for name in &mut listed {
                // As stat(2) shows it, for those that the kernel knows.
                name.inode = table.number((device, name.inode)).unwrap_or(name.inode);
            }
        }
        let mut folders = locked(&self.folders);
        if folders.len() >= MOST_OPEN {
            return Err(Errno::NFILE);
        }
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        folders.insert(handle, Arc::new(listed));
        Ok(handle)
    }

    /// The names that [`Self::open_folder`] has read.
    ///
    /// # Errors
    /// `EBADF` when there is no such handle.
    pub fn listed(&self, handle: u64) -> Result<Arc<Vec<Listed>>, Errno> {
        locked(&self.folders).get(&handle).cloned().ok_or(Errno::BADF)
    }

    pub fn close_folder(&self, handle: u64) {
        locked(&self.folders).remove(&handle);
    }

    pub fn space(&self) -> Result<StatVfs, Errno> {
        self.backing.space()
    }
}

/// Writes to a file of a database. May wait for a majority. `forget` makes the kernel forget what it has cached of the
/// file between two offsets.
///
/// # Errors
/// `EIO` when a transaction is refused, `EROFS` when it is none, `ENOSPC` when this host has no space for it.
pub(super) fn write_part(
    part: &Part,
    open: &Open,
    offset: u64,
    bytes: &[u8],
    forget: &dyn Fn(u64, u64),
) -> Result<(), Errno> {
    match part {
        Part::Database(guarded) => guarded.write(offset, bytes),
        Part::Journal(guarded) => guarded.journal_write(&open.file, offset, bytes),
        Part::Wal(guarded) => guarded.wal_write(&open.file, offset, bytes, forget),
    }
    .map_err(|stop| failure(&stop))
}

fn is_no_folder(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) != FileType::Directory
}

/// How this process opens what an application opens: the kernel has done what the other flags ask for, and says where
/// each write goes, also one that appends. What is written to must be readable, as a page cache fills itself.
fn own_flags(flags: OFlags) -> OFlags {
    let mode = flags & OFlags::RWMODE;
    if mode == OFlags::WRONLY { OFlags::RDWR } else { mode }
}

fn change_open(file: &File, change: &Change) -> Result<Stat, Errno> {
    if change.user.is_some() || change.group.is_some() {
        fchown(file, change.user.map(Uid::from_raw), change.group.map(Gid::from_raw))?;
    }
    if let Some(mode) = change.mode {
        fchmod(file, Mode::from_raw_mode(mode))?;
    }
    if let Some(times) = &change.times {
        futimens(file, times)?;
    }
    fstat(file)
}
