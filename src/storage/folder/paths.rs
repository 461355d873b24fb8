//! The inode table of a served folder: which number of the kernel's stands for which file, and by what names it can be
//! reached. Pure: no files, no locks. Must never give one number to two files, and never one file two numbers while the
//! kernel knows it: each would have a page cache of its own.
//!
//! A number is never used twice, so that the kernel cannot take a new file for one that had the same inode before.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    path::PathBuf,
};

use rustix::io::Errno;

/// The folder itself.
pub(super) const ROOT: u64 = 1;
/// Files and folders that the kernel knows at once; about 200 bytes each here.
pub(super) const MOST_NODES: usize = 1 << 20;
/// Names of one file that are kept: any of them reaches it.
const MOST_NAMES: usize = 64;
/// Folders inside folders.
const DEEPEST: usize = 512;

/// A file of the backing folder: device and inode.
pub(super) type FileId = (u64, u64);

#[derive(Debug)]
struct Node {
    file: FileId,
    /// Folder and name in it, the newest last. None when all are gone and it is still open.
    names: Vec<(u64, OsString)>,
    /// How often the kernel was told of it.
    lookups: u64,
}

/// The files that the kernel knows.
#[derive(Debug)]
pub(super) struct Table {
    nodes: HashMap<u64, Node>,
    numbers: HashMap<FileId, u64>,
    next: u64,
}

impl Table {
    /// Of a folder that nobody has looked into.
    pub fn new(root: FileId) -> Self {
        let node = Node { file: root, names: Vec::new(), lookups: 1 };
        Self { nodes: [(ROOT, node)].into(), numbers: [(root, ROOT)].into(), next: ROOT + 1 }
    }

    /// The path of a file below the folder; `.` for the folder itself.
    ///
    /// # Errors
    /// `ENOENT` when it has no name any more, `ESTALE` when it is not known, `ELOOP` when it lies too deep.
    pub fn path(&self, number: u64) -> Result<PathBuf, Errno> {
        let (mut names, mut at) = (Vec::new(), number);
        while at != ROOT {
            let node = self.nodes.get(&at).ok_or(Errno::STALE)?;
            let (parent, name) = node.names.last().ok_or(Errno::NOENT)?;
            names.push(name);
            at = *parent;
            if names.len() > DEEPEST {
                return Err(Errno::LOOP);
            }
        }
        if names.is_empty() { Ok(PathBuf::from(".")) } else { Ok(names.into_iter().rev().collect()) }
    }

    /// The path of a name in a folder.
    ///
    /// # Errors
    /// As [`Self::path`] of the folder.
    pub fn child(&self, parent: u64, name: &OsStr) -> Result<PathBuf, Errno> {
        match parent {
            ROOT => Ok(PathBuf::from(name)),
            parent => Ok(self.path(parent)?.join(name)),
        }
    }

    /// Notes that the kernel is told of a file by this name. Returns its number.
    ///
    /// # Errors
    /// `ENFILE` when it knows too many.
    pub fn looked_up(&mut self, parent: u64, name: &OsStr, file: FileId) -> Result<u64, Errno> {
        let number = match self.numbers.get(&file) {
            Some(number) => *number,
            None if self.nodes.len() >= MOST_NODES => return Err(Errno::NFILE),
            None => {
                let number = self.next;
                self.next += 1;
                self.numbers.insert(file, number);
                self.nodes.insert(number, Node { file, names: Vec::new(), lookups: 0 });
                number
            }
        };
        let node = self.nodes.get_mut(&number).ok_or(Errno::STALE)?;
        node.lookups += 1;
        if number != ROOT {
            node.named(parent, name);
        }
        Ok(number)
    }

    /// The kernel has forgotten that it was told of a file so many times. True if it does not know it any more.
    pub fn forget(&mut self, number: u64, count: u64) -> bool {
        let Some(node) = self.nodes.get_mut(&number).filter(|_| number != ROOT) else { return false };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups > 0 {
            return false;
        }
        let file = node.file;
        self.nodes.remove(&number);
        if self.numbers.get(&file) == Some(&number) {
            self.numbers.remove(&file);
        }
        true
    }

    /// A name of a file is gone. With `last`, the file itself will be, too, and its inode may become another file's.
    pub fn unlinked(&mut self, parent: u64, name: &OsStr, file: FileId, last: bool) {
        let Some(number) = self.numbers.get(&file).copied() else { return };
        if let Some(node) = self.nodes.get_mut(&number) {
            node.names.retain(|known| (known.0, known.1.as_os_str()) != (parent, name));
        }
        if last {
            self.numbers.remove(&file);
        }
    }

    /// A file has another name now.
    pub fn renamed(&mut self, file: FileId, from: (u64, &OsStr), to: (u64, &OsStr)) {
        let Some(node) = self.numbers.get(&file).and_then(|number| self.nodes.get_mut(number)) else { return };
        node.names.retain(|known| (known.0, known.1.as_os_str()) != from);
        node.named(to.0, to.1);
    }

    /// The number of a file, if the kernel knows it.
    pub fn number(&self, file: FileId) -> Option<u64> {
        self.numbers.get(&file).copied()
    }
}

impl Node {
    fn named(&mut self, parent: u64, name: &OsStr) {
        self.names.retain(|known| (known.0, known.1.as_os_str()) != (parent, name));
        if self.names.len() == MOST_NAMES {
            self.names.remove(0);
        }
        self.names.push((parent, name.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> &OsStr {
        OsStr::new(text)
    }

    #[test]
    fn a_path_follows_its_folders_wherever_they_go() {
        let mut table = Table::new((1, 100));
        let folder = table.looked_up(ROOT, name("a b"), (1, 101)).unwrap();
        let file = table.looked_up(folder, name("ä"), (1, 102)).unwrap();
        assert_eq!(table.path(file).unwrap(), PathBuf::from("a b/ä"));
        assert_eq!(table.path(ROOT).unwrap(), PathBuf::from("."));
        table.renamed((1, 101), (ROOT, name("a b")), (ROOT, name("c")));
        assert_eq!(table.path(file).unwrap(), PathBuf::from("c/ä"));
        assert_eq!(table.child(folder, name("new")).unwrap(), PathBuf::from("c/new"));
    }

    #[test]
    fn a_new_file_with_the_inode_of_a_dead_one_has_another_number() {
        let mut table = Table::new((1, 100));
        let old = table.looked_up(ROOT, name("x"), (1, 7)).unwrap();
        table.unlinked(ROOT, name("x"), (1, 7), true);
        assert_eq!(table.path(old), Err(Errno::NOENT));
        let new = table.looked_up(ROOT, name("y"), (1, 7)).unwrap();
        assert_ne!(old, new);
        assert!(table.forget(old, 1), "the kernel lets go of the old one");
        assert_eq!(table.number((1, 7)), Some(new), "which does not concern the new one");
        assert_eq!(table.path(old), Err(Errno::STALE));
    }

    #[test]
    fn a_file_with_two_names_has_one_number_and_is_reached_by_either() {
        let mut table = Table::new((1, 100));
        let number = table.looked_up(ROOT, name("x"), (1, 7)).unwrap();
        assert_eq!(table.looked_up(ROOT, name("y"), (1, 7)).unwrap(), number);
        table.unlinked(ROOT, name("y"), (1, 7), false);
        assert_eq!(table.path(number).unwrap(), PathBuf::from("x"));
        assert!(!table.forget(number, 1));
        assert!(table.forget(number, 1));
    }
}
