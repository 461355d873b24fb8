//! One database of the service, and the gate that its transactions pass: those of a WAL at the frame that commits, as
//! the Console's do, those with a rollback journal when the journal ends. Must never let the file have what a majority
//! has not, and never pass a write that belongs to no transaction.
//!
//! There are three locks. `writer` is held through [`Passage::propose`] by whoever commits, so calls that take it may
//! wait for a majority. `pages` is held for moments, and `overlay` while it is read or written. They are taken in this
//! order. Reading takes `overlay` alone, and only while a transaction has one.
//!
//! A page is *behind* from the commit of its WAL frame until the application's checkpoint has copied that content. When
//! none is behind, the file is the database at its last transaction: nobody has to know which frames a checkpoint has
//! reached, or to look into the memory that the application's connections share.

mod doubt;
mod still;
mod wal;

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

pub(super) use self::still::Still;
use self::{doubt::Doubt, wal::Unwritten};
use super::{
    image::{self, After},
    journal::{Journal, Meaning},
    overlay::{Overlay, read_up_to},
    passage::Passage,
    units::Units,
};
use crate::{
    mutex::locked,
    storage::{
        capture::{Capture, Code},
        checkpoint::Record,
        checksum::{PageTable, Preview, page_checksum},
        gate::Stop,
        parts::Parts,
        snapshot::Kept,
        watch::{Act, Place, run},
    },
};

/// Why a write is refused that belongs to no transaction.
pub(super) const RAW: &str = "a change outside of a transaction: set journal_mode to WAL, DELETE, TRUNCATE or PERSIST (MEMORY \
                              and OFF cannot be replicated); a database is not copied over another one, but imported";

/// Where a database gets its id, and gives it back: a majority must know the id before its first transaction.
pub(super) trait Enters: Send + Sync {
    /// The id of the database with this path, which has none so far.
    fn enter(&self, path: &Path) -> Result<u32, Stop>;

    /// The database is no more.
    fn leave(&self, id: u32) -> Result<(), Stop>;
}

/// What a database of the service is made of.
pub(super) struct GuardedConfig {
    /// Below the folder.
    pub path: PathBuf,
    /// None while no member knows of it.
    pub id: Option<u32>,
    pub file: Arc<File>,
    /// What members have of it, as of `index`.
    pub table: PageTable,
    pub index: u64,
    /// Where SQLite's locks lie in a database file, in bytes.
    pub lock_byte: u32,
    /// The folder of what does not fit into memory.
    pub spill: PathBuf,
}

/// What is known of a database while its folder is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    /// None before its first transaction.
    pub id: Option<u32>,
    /// Below the folder.
    pub path: PathBuf,
    /// In bytes.
    pub page_size: u32,
    pub pages: u32,
    /// Whether its last transaction went by a WAL (true) or a rollback journal; none if there was none in this epoch.
    pub wal: Option<bool>,
    /// Transactions in this epoch.
    pub commits: u64,
    /// Pages with committed content that only its WAL has.
    pub behind: usize,
}

struct Writer {
    capture: Option<Capture>,
    units: Units,
    journal: Journal,
    transaction: u64,
}

struct Pages {
    table: PageTable,
    behind: BTreeSet<u32>,
    /// The WAL has frames of transactions that passed.
    in_wal: bool,
    /// What was before the last of them.
    doubt: Option<Doubt>,
    /// A transaction with a rollback journal is under way, and may write.
    live: bool,
    /// Its outcome is being found out: what it has written must stay as it is.
    committing: bool,
    index: u64,
    /// The last transaction at which no page was behind.
    rests: Option<Record>,
    /// What it was, for whoever reads that: to be told before the file changes.
    kept: Weak<Kept>,
    /// Transactions so far, and whether the last one went by the WAL.
    commits: u64,
    wal: Option<bool>,
}

/// A database of the service on the PRIMARY.
pub struct Guarded {
    path: PathBuf,
    id: OnceLock<u32>,
    enters: Arc<dyn Enters>,
    passage: Arc<Passage>,
    file: Arc<File>,
    lock_byte: u32,
    spill: PathBuf,
    writer: Mutex<Writer>,
    pages: Mutex<Pages>,
    overlay: RwLock<Option<Overlay>>,
    overlaid: AtomicBool,
    unwritten: Mutex<Unwritten>,
    /// The kernel may have other checksums of the WAL in its cache than the file.
    stale: AtomicBool,
    /// It was removed. Who has it open still has the file, which is no database of ours any more.
    gone: AtomicBool,
    /// Up to this raft index this host's raft log is on its disk.
    durable: AtomicU64,
}

impl std::fmt::Debug for Guarded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guarded").field("path", &self.path).field("id", &self.id).finish_non_exhaustive()
    }
}

fn code(error: &io::Error) -> Code {
    error.raw_os_error().unwrap_or(nix::errno::Errno::EIO as Code)
}

impl Guarded {
    pub(super) fn new(config: GuardedConfig, passage: Arc<Passage>, enters: Arc<dyn Enters>) -> Self {
        let (pages, checksum) = (config.table.pages(), config.table.checksum());
        let rests = Record { index: config.index, page_size: config.table.page_size(), pages, checksum };
        // Far from the largest number, so that counting never wraps around; different in each promotion.
        let transaction = rand::random::<u64>() >> 1;
        Self {
            path: config.path,
            id: config.id.map_or_else(OnceLock::new, OnceLock::from),
            enters,
            passage,
            file: config.file,
            lock_byte: config.lock_byte,
            spill: config.spill,
            writer: Mutex::new(Writer {
                capture: None,
                units: Units::default(),
                journal: Journal::default(),
                transaction,
            }),
            pages: Mutex::new(Pages {
                table: config.table,
                behind: BTreeSet::new(),
                in_wal: false,
                doubt: None,
                live: false,
                committing: false,
                index: config.index,
                rests: Some(rests),
                kept: Weak::new(),
                commits: 0,
                wal: None,
            }),
            overlay: RwLock::default(),
            overlaid: AtomicBool::new(false),
            unwritten: Mutex::default(),
            stale: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            durable: AtomicU64::new(config.index),
        }
    }

    /// Its id; none before its first transaction.
    pub fn id(&self) -> Option<u32> {
        self.id.get().copied()
    }

    /// Where it lies below the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checksum of the database after its last transaction.
    pub fn checksum(&self) -> u64 {
        locked(&self.pages).table.checksum()
    }

    /// What the file is known to hold, once it is synced. It may be ahead of that.
    pub fn rests(&self) -> Option<Record> {
        locked(&self.pages).rests
    }

    /// What the file is known to hold once it is synced, and the raft log before it. A database that nobody writes to
    /// holds everything up to `committed`.
    pub(super) fn holds(&self, committed: u64) -> Option<Record> {
        let idle = self.writer.try_lock();
        let pages = locked(&self.pages);
        let is_idle = idle.is_ok() && !self.passage.is_fenced() && pages.behind.is_empty();
        pages.rests.map(|rests| match is_idle && rests.index == pages.index {
            true => Record { index: rests.index.max(committed), ..rests },
            false => rests,
        })
    }

    /// What is known of it now.
    pub fn figures(&self) -> Figures {
        let pages = locked(&self.pages);
        let (page_size, count) = (pages.table.page_size(), pages.table.pages());
        let (wal, commits, behind) = (pages.wal, pages.commits, pages.behind.len());
        Figures { id: self.id(), path: self.path.clone(), page_size, pages: count, wal, commits, behind }
    }

    /// The open file, for whoever syncs it.
    pub(super) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// The raft index of its last transaction.
    pub(super) fn index(&self) -> u64 {
        locked(&self.pages).index
    }

    /// How many pages have committed content that the file does not have.
    pub fn behind(&self) -> usize {
        locked(&self.pages).behind.len()
    }

    /// Bytes of the transaction under way that did not fit into memory.
    pub fn spilled(&self) -> u64 {
        self.read_overlay().as_ref().map_or(0, Overlay::spilled)
    }

    fn read_overlay(&self) -> RwLockReadGuard<'_, Option<Overlay>> {
        self.overlay.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change_overlay(&self) -> RwLockWriteGuard<'_, Option<Overlay>> {
        self.overlay.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse(&self, why: &str) -> Stop {
        self.passage.refuse(format!("{}: {why}", self.path.display()))
    }

    /// Refuses what belongs to no transaction.
    fn raw(&self, why: &str) -> Stop {
        self.refuse(why);
        Stop::File(nix::errno::Errno::EROFS as Code)
    }

    /// A majority has a transaction, but the files here do not. Never the file's own error: a full disk must not look
    /// as if the transaction had not been made.
    fn broken(&self, error: &dyn std::fmt::Display) -> Stop {
        self.passage
            .fence_because(format!("{}: a committed transaction could not be written: {error}", self.path.display()))
    }

    /// Fills `bytes` with what the database has at `offset`, as its application sees it.
    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        if self.overlaid.load(Ordering::SeqCst)
            && let Some(overlay) = &*self.read_overlay()
        {
            return overlay.read(&self.file, offset, bytes);
        }
        read_up_to(&self.file, offset, bytes)
    }

    /// Its size in bytes, as its application sees it, while that is not the file's.
    pub(super) fn size(&self) -> Option<u64> {
        self.read_overlay().as_ref().map(Overlay::size)
    }

    /// Does something to the overlay, which is made if there is none.
    fn overlaying(&self, pages: &Pages, work: impl FnOnce(&mut Overlay) -> io::Result<()>) -> Result<(), Stop> {
        if pages.committing {
            return Err(self.refuse("a write while its transaction commits"));
        }
        let mut overlay = self.change_overlay();
        let overlay = match &mut *overlay {
            Some(overlay) => overlay,
            none => {
                let size = self.file.metadata().map_err(|error| Stop::File(code(&error)))?.len();
                let counts = u64::from(pages.table.pages()) * u64::from(pages.table.page_size());
                // A file that members know nothing of yet counts as it is.
                none.insert(Overlay::new(if counts == 0 { size } else { counts }, size, self.passage.memory()))
            }
        };
        self.overlaid.store(true, Ordering::SeqCst);
        work(overlay).map_err(|error| Stop::File(code(&error)))
    }

    /// A write to the database.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Stop> {
        self.passage.check()?;
        let mut pages = locked(&self.pages);
        if pages.live {
            let spill = || tempfile_in(&self.spill);
            return self.overlaying(&pages, |overlay| overlay.write(offset, bytes, &spill));
        }
        let size = u64::from(pages.table.page_size());
        let whole = size > 0 && offset.is_multiple_of(size) && bytes.len() as u64 == size;
        let number = u32::try_from(offset / size.max(1) + 1).unwrap_or(u32::MAX);
        let checksum = if whole { page_checksum(number, bytes) } else { 0 };
        let newest = whole && pages.table.get(number) == Some(checksum);
        let older = pages.behind.contains(&number) || (number > pages.table.pages() && pages.in_wal);
        if !whole || !(newest || older) {
            return Err(self.raw(RAW));
        }
        self.be_durable(pages.index)?;
        pages.before_change(offset, bytes.len());
        run(Place::Database, Act::Write, || self.file.write_all_at(bytes, offset))
            .map_err(|error| Stop::File(code(&error)))?;
        pages.written(number, checksum);
        if newest {
            pages.behind.remove(&number);
            pages.note_rest();
        }
        Ok(())
    }

    /// Waits until this host's raft log is on its disk up to `index`: the file must not get ahead of it.
    fn be_durable(&self, index: u64) -> Result<(), Stop> {
        if self.durable.load(Ordering::SeqCst) < index {
            self.passage.make_durable()?;
            self.durable.fetch_max(index, Ordering::SeqCst);
        }
        Ok(())
    }

    /// A change of the database's size.
    pub(super) fn resize(&self, size: u64) -> Result<(), Stop> {
        self.passage.check()?;
        let pages = locked(&self.pages);
        if pages.live {
            return self.overlaying(&pages, |overlay| overlay.resize(size));
        }
        let page_size = u64::from(pages.table.page_size());
        let kept = u32::try_from(size / page_size.max(1)).unwrap_or(u32::MAX);
        let mut gone = kept.saturating_add(1)..=pages.table.pages();
        if page_size == 0 || !gone.all(|number| pages.behind.contains(&number)) {
            return Err(self.raw(RAW));
        }
        pages.before_resize(size);
        run(Place::Database, Act::Resize, || self.file.set_len(size)).map_err(|error| Stop::File(code(&error)))
    }

    /// A write to its journal.
    pub(super) fn journal_write(&self, journal: &File, offset: u64, bytes: &[u8]) -> Result<(), Stop> {
        let mut writer = locked(&self.writer);
        self.passage.check()?;
        let meaning = writer.journal.write(offset, bytes);
        self.journal_means(&mut writer, meaning, || journal.write_all_at(bytes, offset))?;
        writer.journal.written(offset, bytes);
        if writer.journal.is_live() {
            locked(&self.pages).live = writer.journal.is_hot();
        }
        Ok(())
    }

    /// A change of the size of its journal.
    pub(super) fn journal_resize(&self, size: u64, resize: impl FnOnce() -> io::Result<()>) -> Result<(), Stop> {
        let mut writer = locked(&self.writer);
        self.passage.check()?;
        let meaning = writer.journal.resize(size);
        self.journal_means(&mut writer, meaning, resize)
    }

    /// The removal of its journal.
    pub(super) fn journal_remove(&self, remove: impl FnOnce() -> io::Result<()>) -> Result<(), Stop> {
        let mut writer = locked(&self.writer);
        self.passage.check()?;
        let meaning = writer.journal.remove();
        self.journal_means(&mut writer, meaning, remove)
    }

    /// The removal of the database, which must have no transaction under way.
    pub(super) fn leave(&self, remove: impl FnOnce() -> io::Result<()>) -> Result<(), Stop> {
        let writer = locked(&self.writer);
        self.passage.check()?;
        if writer.journal.is_live() || !locked(&self.pages).behind.is_empty() {
            return Err(self.raw("it is in use and cannot be removed: close it first"));
        }
        match self.id() {
            Some(id) => {
                self.enters.leave(id)?;
                remove().map_err(|error| self.broken(&error))?;
            }
            None => remove().map_err(|error| Stop::File(code(&error)))?,
        }
        self.gone.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// True once it was removed.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    fn journal_means(
        &self,
        writer: &mut Writer,
        meaning: Meaning,
        pass: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), Stop> {
        match meaning {
            Meaning::Nothing => {}
            Meaning::Begin => {
                if !locked(&self.pages).behind.is_empty() {
                    return Err(self.refuse("a rollback journal while its WAL is in use"));
                }
                writer.journal.begin();
            }
            Meaning::End => {
                let changed = self.commit_journal(writer)?;
                writer.journal.end();
                return pass().map_err(|error| match changed {
                    true => self.broken(&error),
                    false => Stop::File(code(&error)),
                });
            }
        }
        pass().map_err(|error| Stop::File(code(&error)))
    }

    /// Commits what the transaction with a rollback journal has changed. True if that was anything.
    fn commit_journal(&self, writer: &mut Writer) -> Result<bool, Stop> {
        locked(&self.pages).committing = true;
        let result = self.replicate_overlay(writer);
        let mut pages = locked(&self.pages);
        pages.committing = false;
        let changed = result?;
        *self.change_overlay() = None;
        self.overlaid.store(false, Ordering::SeqCst);
        pages.live = false;
        Ok(changed)
    }

    /// Has the members get a database that was there before they knew of it.
    fn enter_whole(&self, writer: &mut Writer) -> Result<(), Stop> {
        {
            let pages = locked(&self.pages);
            self.overlaying(&pages, |_| Ok(()))?;
        }
        self.commit_journal(writer).map(|_| ())
    }

    fn replicate_overlay(&self, writer: &mut Writer) -> Result<bool, Stop> {
        let overlay = self.read_overlay();
        let Some(overlay) = &*overlay else { return Ok(false) };
        let failed = |error: io::Error| Stop::File(code(&error));
        let before = {
            let pages = locked(&self.pages);
            (pages.table.pages(), pages.table.page_size())
        };
        let after = match image::after(overlay, &self.file).map_err(failed)? {
            Some(after) => after,
            // It has never had any content.
            None if before.0 == 0 => return Ok(false),
            None => return Err(self.refuse("a transaction that leaves nothing of the database, or no database")),
        };
        let Some((parts, numbers)) = self.encode(writer, overlay, before, after)? else {
            // Rolled back, or only longer than the database needs.
            let length = overlay.size().max(after.bytes());
            return self.fit(length).map(|()| false).map_err(failed);
        };
        let (index, preview) = self.propose_last(parts, before, after)?;
        self.be_durable(index)?;
        // From here on a majority has it.
        self.write_down(overlay, before, after, &numbers).map_err(|error| self.broken(&error))?;
        let mut pages = locked(&self.pages);
        if after.page_size != before.1 {
            pages.table = PageTable::empty(after.page_size);
        }
        pages.accept(preview, index, false);
        numbers.iter().for_each(|number| {
            pages.behind.remove(number);
        });
        pages.note_rest();
        Ok(true)
    }

    /// Encodes the pages that differ, and proposes all but the last part. None if there is nothing to commit.
    fn encode(
        &self,
        writer: &mut Writer,
        overlay: &Overlay,
        before: (u32, u32),
        after: After,
    ) -> Result<Option<(Parts, Vec<u32>)>, Stop> {
        let (page_size, whole) = (after.page_size, before.0 == 0 || after.page_size != before.1);
        let lock_page = self.lock_byte / page_size + 1;
        // What was cut off and has come back is zeros, though nobody has written it.
        let cut = overlay.base() < u64::from(before.0) * u64::from(before.1);
        let numbers: Box<dyn Iterator<Item = u32> + '_> =
            if whole || cut { Box::new(1..=after.pages) } else { Box::new(overlay.pages(page_size)) };
        let mut image = vec![0; page_size as usize];
        let (mut parts, mut changed) = (None, Vec::new());
        for number in numbers.take_while(|number| *number <= after.pages).filter(|number| *number != lock_page) {
            let count = overlay.read(&self.file, u64::from(number - 1) * u64::from(page_size), &mut image);
            let count = count.map_err(|error| Stop::File(code(&error)))?;
            image[count..].fill(0);
            let checksum = page_checksum(number, &image);
            if !whole && locked(&self.pages).table.get(number) == Some(checksum) {
                continue;
            }
            if parts.is_none() {
                parts = Some(self.begin_parts(writer, page_size, 0)?);
            }
            let full = parts.as_mut().and_then(|parts| parts.push_summed(number, checksum, &image));
            changed.push(number);
            if let Some(full) = full {
                self.passage.propose(full, false)?;
            }
        }
        if whole {
            // All others are in the file.
            changed = overlay.pages(page_size).take_while(|number| *number <= after.pages).collect();
        }
        // Pages may only have been cut off.
        if parts.is_none() && after.pages != before.0 {
            parts = Some(self.begin_parts(writer, page_size, 0)?);
        }
        Ok(parts.map(|parts| (parts, changed)))
    }

    fn begin_parts(&self, writer: &mut Writer, page_size: u32, expected: usize) -> Result<Parts, Stop> {
        self.passage.check()?;
        let id = match self.id.get() {
            Some(id) => *id,
            None => {
                let _turn = self.passage.turn();
                let id = self.enters.enter(&self.path)?;
                *self.id.get_or_init(|| id)
            }
        };
        writer.transaction += 1;
        Ok(Parts::new(id, writer.transaction, page_size, expected))
    }

    fn propose_last(&self, mut parts: Parts, before: (u32, u32), after: After) -> Result<(u64, Preview), Stop> {
        let preview = if after.page_size == before.1 {
            parts.preview(&locked(&self.pages).table, after.pages)
        } else {
            parts.preview(&PageTable::empty(after.page_size), after.pages)
        };
        let part = parts.finish(&preview);
        Ok((self.passage.propose(part, true)?, preview))
    }

    /// Writes a committed transaction into the file.
    fn write_down(&self, overlay: &Overlay, before: (u32, u32), after: After, numbers: &[u32]) -> io::Result<()> {
        let page_size = u64::from(after.page_size);
        if before.1 == after.page_size {
            // What it grows over without writing it is zeros, whatever was there once.
            let kept = u64::from(before.0.min(after.pages)) * page_size;
            if self.file.metadata()?.len() > kept && after.pages != before.0 {
                locked(&self.pages).before_resize(kept);
                run(Place::Database, Act::Resize, || self.file.set_len(kept))?;
            }
        }
        self.fit(overlay.size().max(after.bytes()))?;
        let mut image = vec![0; after.page_size as usize];
        for number in numbers {
            let offset = u64::from(*number - 1) * page_size;
            let count = overlay.read(&self.file, offset, &mut image)?;
            image[count..].fill(0);
            locked(&self.pages).before_change(offset, image.len());
            run(Place::Database, Act::Write, || self.file.write_all_at(&image, offset))?;
        }
        Ok(())
    }

    fn fit(&self, length: u64) -> io::Result<()> {
        if self.file.metadata()?.len() != length {
            locked(&self.pages).before_resize(length);
            run(Place::Database, Act::Resize, || self.file.set_len(length))?;
        }
        Ok(())
    }
}

impl Pages {
    /// To be called before the file changes there.
    fn before_change(&self, offset: u64, length: usize) {
        if let Some(kept) = self.kept.upgrade() {
            kept.before_change(offset, length as u64);
        }
    }

    /// To be called before the file gets this size.
    fn before_resize(&self, size: u64) {
        if let Some(kept) = self.kept.upgrade() {
            kept.before_resize(size);
        }
    }

    fn accept(&mut self, preview: Preview, index: u64, wal: bool) {
        (self.commits, self.wal) = (self.commits + 1, Some(wal));
        self.table.accept(preview);
        self.index = index;
        let cut = self.table.pages() + 1;
        self.behind.split_off(&cut);
    }

    /// Notes that the file is the database at its last transaction, if it is.
    fn note_rest(&mut self) {
        if self.behind.is_empty() {
            let (page_size, pages, checksum) = (self.table.page_size(), self.table.pages(), self.table.checksum());
            self.rests = Some(Record { index: self.index, page_size, pages, checksum });
        }
    }
}

/// A file without a name in this folder.
fn tempfile_in(folder: &Path) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, open};
    let file = open(folder, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?;
    Ok(File::from(file))
}
