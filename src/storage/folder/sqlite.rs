//! Which file of the folder belongs to which database, and what may be done to it. A file is a database once a journal
//! or a WAL is made beside it, or once the members know it by its path. Must never take a file for a database that is
//! something else, or a database for a plain file once it is known.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::File,
    os::unix::{ffi::OsStrExt, fs::FileExt},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, PoisonError, RwLock},
    time::Instant,
};

use rustix::{
    fs::{FileType, OFlags},
    io::Errno,
};

use super::{
    backing::{Backing, identity},
    guarded::{Enters, Guarded, GuardedConfig, RAW},
    image,
    passage::Passage,
    paths::FileId,
    places::{MOST_DATABASES, Places},
    plain::Plain,
};
use crate::{
    mutex::locked,
    storage::{checksum::PageTable, gate::Stop, transaction::valid_page_size},
};

/// Characters of a super-journal's name behind `-mj`.
const SUPER: usize = 9;

/// What a file is to a database.
#[derive(Clone, Debug)]
pub(super) enum Part {
    Database(Arc<Guarded>),
    Wal(Arc<Guarded>),
    Journal(Arc<Guarded>),
}

impl Part {
    fn guarded(&self) -> &Guarded {
        match self {
            Self::Database(guarded) | Self::Wal(guarded) | Self::Journal(guarded) => guarded,
        }
    }
}

/// The suffix of a file that SQLite keeps beside a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Suffix {
    Wal,
    Journal,
}

/// The databases of a folder on the PRIMARY.
pub struct Registry {
    passage: Arc<Passage>,
    enters: Arc<dyn Enters>,
    lock_byte: u32,
    places: Places,
    /// How often the folder is served now, and told when it is not any more.
    served: Mutex<u32>,
    withdrawn: Condvar,
    plain: Plain,
    /// By their paths below the folder.
    known: Mutex<HashMap<PathBuf, Arc<Guarded>>>,
    /// By the kernel's numbers.
    parts: RwLock<HashMap<u64, Part>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("known", &self.known).finish_non_exhaustive()
    }
}

/// A folder that is served.
#[derive(Debug)]
pub(super) struct Served(Arc<Registry>);

impl Drop for Served {
    fn drop(&mut self) {
        *locked(&self.0.served) -= 1;
        self.0.withdrawn.notify_all();
    }
}

/// The error number that an application gets.
pub(super) fn failure(stop: &Stop) -> Errno {
    match stop {
        Stop::File(code) => Errno::from_raw_os_error(*code),
        Stop::Full => Errno::NOSPC,
        Stop::Gate => Errno::IO,
    }
}

/// The database that a file would belong to by its name.
fn base(path: &Path) -> Option<(PathBuf, Suffix)> {
    let bytes = path.as_os_str().as_bytes();
    let found = [("-wal", Suffix::Wal), ("-journal", Suffix::Journal)];
    found.into_iter().find_map(|(suffix, kind)| {
        let base = bytes.strip_suffix(suffix.as_bytes()).filter(|base| !base.is_empty() && !base.ends_with(b"/"))?;
        Some((PathBuf::from(OsStr::from_bytes(base)), kind))
    })
}

/// True for the name of a super-journal: it would commit transactions of several databases at once.
fn is_super_journal(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    let Some(at) = bytes.len().checked_sub(SUPER + 3) else { return false };
    let (mark, number) = bytes[at..].split_at(3);
    at > 0 && mark == b"-mj" && number.iter().all(u8::is_ascii_hexdigit) && number[6] == b'9'
}

impl Registry {
    pub(super) fn new(passage: Arc<Passage>, enters: Arc<dyn Enters>, lock_byte: u32, places: Places) -> Self {
        let (served, withdrawn, plain) = (Mutex::new(0), Condvar::new(), Plain::default());
        let (known, parts) = (Mutex::default(), RwLock::default());
        Self { passage, enters, lock_byte, places, served, withdrawn, plain, known, parts }
    }

    /// The folder below: what the service sees.
    pub fn files(&self) -> PathBuf {
        self.places.files()
    }

    /// Makes the folder below if it is missing, and gives it to this user and group, with what this member has made
    /// there. Call it before it is mounted.
    ///
    /// # Errors
    /// When it cannot be made, or not be given away.
    pub fn prepare(&self, owner: (u32, u32)) -> std::io::Result<()> {
        self.places.make()?;
        let known: Vec<PathBuf> = locked(&self.known).keys().cloned().collect();
        self.places.give_to(owner, &known)?;
        self.plain.look(&self.files(), &|path| self.belongs(path));
        Ok(())
    }

    /// Files of the folder that belong to no database: they are on this host alone. At most
    /// [`MOST_PLAIN`](super::plain::MOST_PLAIN) of them, below the folder.
    pub fn plain_files(&self) -> Vec<PathBuf> {
        self.plain.list()
    }

    /// A file was made, or is about to be written to. It may become a database.
    pub(super) fn note_plain(&self, path: &Path) {
        if !self.belongs(path) {
            self.plain.note(path);
        }
    }

    /// A file is gone.
    pub(super) fn forget_plain(&self, path: &Path) {
        self.plain.forget(path);
    }

    /// True for a database, and for what SQLite keeps beside one.
    fn belongs(&self, path: &Path) -> bool {
        let shared = path.as_os_str().as_bytes().strip_suffix(b"-shm");
        let of = shared.map_or(path, |base| Path::new(OsStr::from_bytes(base)));
        self.by_path(of).is_some()
    }

    /// The folder is about to be served, until the answer is dropped. None once it is fenced.
    pub(super) fn serve(self: &Arc<Self>) -> Option<Served> {
        let mut served = locked(&self.served);
        if self.passage.is_fenced() {
            return None;
        }
        *served += 1;
        Some(Served(Arc::clone(self)))
    }

    /// Waits until the folder is not served any more. False if it still is at the deadline.
    pub(super) fn wait_withdrawn(&self, deadline: Instant) -> bool {
        let mut served = locked(&self.served);
        while *served > 0 {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            served = self.withdrawn.wait_timeout(served, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// The way of this promotion to the majority: fence it from any thread.
    pub fn passage(&self) -> &Passage {
        &self.passage
    }

    /// Adds a database that the members know.
    pub(super) fn add(&self, guarded: Arc<Guarded>) {
        locked(&self.known).insert(guarded.path().to_owned(), guarded);
    }

    /// All databases.
    pub fn all(&self) -> Vec<Arc<Guarded>> {
        locked(&self.known).values().cloned().collect()
    }

    /// What the file with this number is.
    pub(super) fn part(&self, number: u64) -> Option<Part> {
        let parts = self.parts.read().unwrap_or_else(PoisonError::into_inner);
        parts.get(&number).filter(|part| !part.guarded().is_gone()).cloned()
    }

    /// The kernel does not know the number any more.
    pub(super) fn forget(&self, number: u64) {
        let mut parts = self.parts.write().unwrap_or_else(PoisonError::into_inner);
        parts.remove(&number);
    }

    fn note(&self, number: u64, part: Part) {
        let mut parts = self.parts.write().unwrap_or_else(PoisonError::into_inner);
        parts.insert(number, part);
    }

    /// A database is removed by `remove`. May wait for a majority.
    ///
    /// # Errors
    /// When it is in use, or the majority does not take it: it is still there then.
    pub(super) fn remove(&self, guarded: &Guarded, remove: impl FnOnce() -> std::io::Result<()>) -> Result<(), Stop> {
        guarded.leave(remove)?;
        locked(&self.known).remove(guarded.path());
        Ok(())
    }

    fn known(&self, path: &Path) -> Option<Arc<Guarded>> {
        locked(&self.known).get(path).cloned()
    }

    /// The kernel knows a file by this number.
    pub(super) fn seen(&self, path: &Path, number: u64) {
        if let Some(part) = self.by_path(path) {
            self.note(number, part);
        }
    }

    /// What a path is, if its database is known.
    pub(super) fn by_path(&self, path: &Path) -> Option<Part> {
        if let Some(guarded) = self.known(path) {
            return Some(Part::Database(guarded));
        }
        let (base, suffix) = base(path)?;
        let guarded = self.known(&base)?;
        Some(match suffix {
            Suffix::Wal => Part::Wal(guarded),
            Suffix::Journal => Part::Journal(guarded),
        })
    }

    /// A file is about to be made or written to. If it is a journal or a WAL, the file beside it is a database from now
    /// on. `number_of` says the kernel's number of a file.
    ///
    /// # Errors
    /// `EROFS` for a super-journal, `ENFILE` when there are too many databases. Otherwise when the database cannot be
    /// opened.
    pub(super) fn opens(
        &self,
        path: &Path,
        backing: &Backing,
        number_of: impl Fn(FileId) -> Option<u64>,
    ) -> Result<(), Errno> {
        if is_super_journal(path) {
            self.passage.refuse(format!(
                "{}: a transaction over several databases with rollback journals cannot be replicated as one: set \
                 journal_mode to WAL in each, or use one database",
                path.display()
            ));
            return Err(Errno::ROFS);
        }
        let Some((base, _)) = base(path) else { return Ok(()) };
        if self.known(&base).is_some() {
            return Ok(());
        }
        let stat = match backing.stat(&base) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => stat,
            _ => return Ok(()),
        };
        let file = backing.open_file(&base, OFlags::RDWR)?;
        if stat.st_size > 0 && page_size_of(&file).is_none() {
            return Ok(());
        }
        let guarded = self.adopt(base, file)?;
        if let Some(number) = number_of(identity(&stat)) {
            self.note(number, Part::Database(guarded));
        }
        Ok(())
    }

    fn adopt(&self, path: PathBuf, file: File) -> Result<Arc<Guarded>, Errno> {
        self.plain.forget(&path);
        let mut known = locked(&self.known);
        if known.len() >= MOST_DATABASES && !known.contains_key(&path) {
            self.passage.refuse(format!("{}: this folder has {MOST_DATABASES} databases already", path.display()));
            return Err(Errno::NFILE);
        }
        let config = GuardedConfig {
            path: path.clone(),
            id: None,
            file: Arc::new(file),
            table: PageTable::empty(0),
            index: 0,
            lock_byte: self.lock_byte,
            spill: self.places.spill(),
        };
        let new = || Arc::new(Guarded::new(config, Arc::clone(&self.passage), Arc::clone(&self.enters)));
        Ok(Arc::clone(known.entry(path).or_insert_with(new)))
    }

    /// Looks at a write to a plain file: one page in its place, of what has the header of a database, comes from a
    /// SQLite that keeps no journal in the folder.
    ///
    /// # Errors
    /// `EROFS` for such a write.
    pub(super) fn plain_write(
        &self,
        path: impl Fn() -> PathBuf,
        file: &File,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), Errno> {
        let length = bytes.len() as u64;
        if !u32::try_from(length).is_ok_and(valid_page_size) || !offset.is_multiple_of(length) {
            return Ok(());
        }
        let there = page_size_of(file);
        let new = (offset == 0).then(|| image::page_size(bytes)).flatten();
        let begins = there.is_none() && image::stated_pages(bytes).is_some_and(|pages| pages > 1);
        if there.or(new.filter(|_| begins)).map(u64::from) != Some(length) {
            return Ok(());
        }
        self.passage.refuse(format!("{}: {RAW}", path().display()));
        Err(Errno::ROFS)
    }

    /// Refuses what cannot be done to a file of a database, or to a folder around one.
    ///
    /// # Errors
    /// `EROFS` if it is one.
    pub(super) fn keep(&self, path: &Path, what: &str) -> Result<(), Errno> {
        let around = locked(&self.known).keys().any(|known| known.starts_with(path));
        if !around && self.by_path(path).is_none() {
            return Ok(());
        }
        self.passage.refuse(format!("{}: {what}", path.display()));
        Err(Errno::ROFS)
    }
}

/// The size of the pages of a database file; none if it is no database.
fn page_size_of(file: &File) -> Option<u32> {
    let mut header = [0; image::HEADER];
    file.read_exact_at(&mut header, 0).ok()?;
    image::page_size(&header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_belongs_to_what() {
        let of = |name: &str| base(Path::new(name)).map(|(base, kind)| (base.to_str().unwrap().to_owned(), kind));
        assert_eq!(of("a b/ä.db-wal"), Some(("a b/ä.db".into(), Suffix::Wal)));
        assert_eq!(of("x-journal"), Some(("x".into(), Suffix::Journal)));
        for name in ["-wal", "a/-journal", "x-shm", "x", "x-wal2", "wal"] {
            assert_eq!(of(name), None, "{name}");
        }
    }

    #[test]
    fn a_super_journal_is_known_by_its_name() {
        assert!(is_super_journal(Path::new("a/main.db-mj1A2B3C9D4")));
        for name in ["main.db-mj1A2B3C8D4", "main.db-mj1A2B3C9D", "-mj1A2B3C9D4", "main.db-mjxA2B3C9D4", "x"] {
            assert!(!is_super_journal(Path::new(name)), "{name}");
        }
    }
}
