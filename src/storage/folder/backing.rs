//! The backing folder: what the served folder is made of. Reaches everything by a descriptor of the folder and a path
//! below it, and never follows a link. Must never open a path by its absolute name: that could lead into the mount that
//! this very process serves, and wait for itself.

use std::{
    ffi::{CString, OsString},
    fs::File,
    os::{fd::OwnedFd, unix::ffi::OsStringExt},
    path::Path,
};

use rustix::{
    fs::{
        AtFlags, Dir, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Stat, StatVfs, Timestamps, Uid, chmodat,
        chownat, fstat, fstatvfs, linkat, mkdirat, mknodat, openat2, readlinkat, renameat_with, statat, symlinkat,
        unlinkat, utimensat,
    },
    io::Errno,
};

use super::paths::FileId;
use crate::descriptors;

/// Who makes a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    pub user: u32,
    pub group: u32,
}

/// A name in a folder, as it is listed.
#[derive(Debug)]
pub(super) struct Listed {
    pub name: OsString,
    pub inode: u64,
    pub kind: FileType,
}

/// Which file it is.
pub(super) fn identity(stat: &Stat) -> FileId {
    (stat.st_dev, stat.st_ino)
}

#[derive(Debug)]
pub(super) struct Backing {
    root: OwnedFd,
}

impl Backing {
    /// Opens the folder.
    ///
    /// # Errors
    /// When it cannot be opened, or is no folder.
    pub fn open(path: &Path) -> Result<Self, Errno> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(Self { root: rustix::fs::open(path, flags, Mode::empty())? })
    }

    pub fn stat_root(&self) -> Result<Stat, Errno> {
        fstat(&self.root)
    }

    pub fn space(&self) -> Result<StatVfs, Errno> {
        fstatvfs(&self.root)
    }

    pub fn stat(&self, path: &Path) -> Result<Stat, Errno> {
        statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Opens a file or folder. What opening alone would change is done by calls of their own.
    pub fn open_file(&self, path: &Path, flags: OFlags) -> Result<File, Errno> {
        self.open_with(path, flags - OFlags::CREATE - OFlags::EXCL, Mode::empty())
    }

    /// Makes a file and opens it. Its mode is exactly `mode`.
    pub fn create_file(&self, path: &Path, flags: OFlags, mode: Mode, owner: Owner) -> Result<File, Errno> {
        let file = self.open_with(path, flags | OFlags::CREATE | OFlags::EXCL, mode)?;
        self.hand_over(path, owner, Some(mode))?;
        Ok(file)
    }

    fn open_with(&self, path: &Path, flags: OFlags, mode: Mode) -> Result<File, Errno> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let open = || openat2(&self.root, path, flags, mode, resolve).map_err(std::io::Error::from);
        match descriptors::open(open) {
            Ok(file) => Ok(File::from(file)),
            Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
        }
    }

    /// Gives a new file to whoever made it: this process is root. The group is that of a folder that says so.
    fn hand_over(&self, path: &Path, owner: Owner, mode: Option<Mode>) -> Result<(), Errno> {
        let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let inherits = Mode::from_raw_mode(self.stat(folder)?.st_mode).contains(Mode::SGID);
        let group = (!inherits).then(|| Gid::from_raw(owner.group));
        chownat(&self.root, path, Some(Uid::from_raw(owner.user)), group, AtFlags::SYMLINK_NOFOLLOW)?;
        match mode {
            Some(mode) => self.set_mode(path, mode),
            None => Ok(()),
        }
    }

    pub fn make_folder(&self, path: &Path, mode: Mode, owner: Owner) -> Result<(), Errno> {
        mkdirat(&self.root, path, mode)?;
        let inherited = Mode::from_raw_mode(self.stat(path)?.st_mode) & Mode::SGID;
        self.hand_over(path, owner, Some(mode | inherited))
    }

    pub fn make_node(&self, path: &Path, kind: FileType, mode: Mode, device: u64, owner: Owner) -> Result<(), Errno> {
        mknodat(&self.root, path, kind, mode, device)?;
        self.hand_over(path, owner, Some(mode))
    }

    pub fn make_symlink(&self, path: &Path, target: &Path, owner: Owner) -> Result<(), Errno> {
        symlinkat(target, &self.root, path)?;
        self.hand_over(path, owner, None)
    }

    pub fn read_symlink(&self, path: &Path) -> Result<CString, Errno> {
        readlinkat(&self.root, path, Vec::new())
    }

    pub fn link(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        linkat(&self.root, from, &self.root, to, AtFlags::empty())
    }

    pub fn remove_file(&self, path: &Path) -> Result<(), Errno> {
        unlinkat(&self.root, path, AtFlags::empty())
    }

    pub fn remove_folder(&self, path: &Path) -> Result<(), Errno> {
        unlinkat(&self.root, path, AtFlags::REMOVEDIR)
    }

    pub fn rename(&self, from: &Path, to: &Path, flags: RenameFlags) -> Result<(), Errno> {
        renameat_with(&self.root, from, &self.root, to, flags)
    }

    pub fn set_mode(&self, path: &Path, mode: Mode) -> Result<(), Errno> {
        // A link has no mode of its own, and the kernel never asks for it.
        chmodat(&self.root, path, mode, AtFlags::empty())
    }

    pub fn set_owner(&self, path: &Path, user: Option<u32>, group: Option<u32>) -> Result<(), Errno> {
        let (user, group) = (user.map(Uid::from_raw), group.map(Gid::from_raw));
        chownat(&self.root, path, user, group, AtFlags::SYMLINK_NOFOLLOW)
    }

    pub fn set_times(&self, path: &Path, times: &Timestamps) -> Result<(), Errno> {
        utimensat(&self.root, path, times, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// All names in a folder, without `.` and `..`.
    pub fn list(&self, path: &Path) -> Result<Vec<Listed>, Errno> {
        let file = self.open_file(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut listed = Vec::new();
        for entry in Dir::new(OwnedFd::from(file))? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                let name = OsString::from_vec(name.to_vec());
                let kind = match entry.file_type() {
                    FileType::Unknown => FileType::from_raw_mode(self.stat(&path.join(&name))?.st_mode),
                    kind => kind,
                };
                listed.push(Listed { name, inode: entry.ino(), kind });
            }
        }
        Ok(listed)
    }
}
