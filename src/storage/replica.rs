//! Applies replicated transactions to a database file: writes page images to their places, and nothing else. No SQLite
//! here.
//!
//! A transaction takes effect with its last part. Earlier parts are only counted as they arrive, and are read again
//! then. Writing page images can be repeated: after a crash everything since the last checkpoint is applied again. Must
//! never run while SQLite has the database open.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use thiserror::Error;

use super::transaction::{self, CONSOLE_DATABASE, Commit, Pages, TransactionError};
use super::{
    EntrySource,
    checkpoint::Record,
    checksum::{PageTable, page_checksum},
    is_full,
    online_copy::Tracking,
    watch::{Act, Place, run},
};

/// Why an entry was not applied. After any of these, except a full disk, the database applies nothing more until it is
/// opened again.
#[derive(Debug, Error)]
pub enum ApplyError {
    /// This node's database is not what the primary's was: it must be fetched from the primary.
    #[error("database differs from the primary's at index {index}: checksum {computed:016x}, expected {expected:016x}")]
    Diverged { index: u64, expected: u64, computed: u64 },
    #[error("entry {index}: {error}")]
    Command { index: u64, error: TransactionError },
    /// A newer program wrote the entry. Nothing is wrong with what has been applied.
    #[error("entry {index} is for database {database}, which this program does not know: upgrade this node")]
    UnknownDatabase { index: u64, database: u32 },
    /// The entry is not what a primary of this version writes, or it comes in the wrong order.
    #[error("entry {index}: {what}")]
    OutOfOrder { index: u64, what: &'static str },
    #[error("cannot apply entry {index}: {error}")]
    Io { index: u64, error: io::Error },
    /// An earlier failure.
    #[error("nothing is applied any more: {0}")]
    Failed(String),
    /// The database is open for writing here.
    #[error("entry {index} cannot be applied: this node is the primary")]
    Primary { index: u64 },
}

impl ApplyError {
    /// True if a newer program wrote the entry. What has been applied is good, and a newer program can go on from
    /// there.
    pub fn is_of_newer_program(&self) -> bool {
        let version = matches!(self, Self::Command { error: TransactionError::Version(_), .. });
        version || matches!(self, Self::UnknownDatabase { .. })
    }

    /// True if the disk had no space: the same entry can be applied once there is some.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { error, .. } if is_full(error))
    }
}

/// A transaction whose last part has not arrived yet.
#[derive(Clone, Copy, Debug)]
struct Unfinished {
    transaction: u64,
    term: u64,
    first: u64,
    next_part: u32,
    page_size: u32,
}

/// A database file that follows the raft log.
#[derive(Debug)]
pub(super) struct Replica {
    pub file: Arc<File>,
    database: u32,
    pub table: PageTable,
    /// Index of the last entry applied.
    pub applied: u64,
    /// Checksum of the database that the last applied transaction stated.
    pub claim: u64,
    /// Its size in pages then. The table can have another size: it is resized before a transaction takes effect, which
    /// may fail.
    claimed_pages: u32,
    /// Size of a page then, in bytes.
    claimed_page_size: u32,
    /// Up to this index the file may be ahead of what is being applied, so its checksum proves nothing.
    pub touched: u64,
    unfinished: Option<Unfinished>,
    /// A transaction is written in part, for lack of space: neither the file nor the table is of any index.
    pub half_applied: bool,
    /// Notes what is written, for whoever copies the file while it changes.
    pub copy: Option<Tracking>,
}

impl Replica {
    /// Starts at a checkpoint: reads the whole file, for as long as `go_on` returns true.
    ///
    /// # Errors
    /// When the file cannot be read. [`io::ErrorKind::Interrupted`] when `go_on` returned false.
    pub fn at(
        file: Arc<File>,
        database: u32,
        record: &Record,
        touched: u64,
        go_on: &dyn Fn() -> bool,
    ) -> io::Result<Self> {
        let table = match record.pages {
            0 => PageTable::empty(0),
            pages => PageTable::read(&file, record.page_size, pages, go_on)?,
        };
        let (applied, claim, claimed_pages) = (record.index, record.checksum, record.pages);
        Ok(Self {
            file,
            database,
            table,
            applied,
            claim,
            claimed_pages,
            claimed_page_size: record.page_size,
            touched,
            unfinished: None,
            half_applied: false,
            copy: None,
        })
    }

    /// Where a checkpoint can be made now: at what is applied, but not in the middle of a transaction.
    pub fn record(&self) -> Record {
        let index = self.unfinished.map_or(self.applied, |open| open.first - 1);
        Record { index, page_size: self.claimed_page_size, pages: self.claimed_pages, checksum: self.claim }
    }

    fn check_order(&self, index: u64) -> Result<(), ApplyError> {
        if index > self.applied { Ok(()) } else { Err(ApplyError::OutOfOrder { index, what: "already applied" }) }
    }

    /// Notes an entry that is no command. A new term drops what the old primary had begun.
    pub fn apply_empty(&mut self, index: u64, term: u64) -> Result<(), ApplyError> {
        self.check_order(index)?;
        self.unfinished.take_if(|open| open.term != term);
        self.applied = index;
        Ok(())
    }

    /// Applies one command.
    pub fn apply(&mut self, index: u64, term: u64, payload: &[u8], source: &dyn EntrySource) -> Result<(), ApplyError> {
        self.check_order(index)?;
        let pages = Pages::decode(payload).map_err(|error| ApplyError::Command { index, error })?;
        let wrong = |what| ApplyError::OutOfOrder { index, what };
        if pages.database != self.database {
            return Err(ApplyError::UnknownDatabase { index, database: pages.database });
        }
        // Only a service's database changes the size of its pages. Such a transaction has them all.
        let resized = self.table.pages() > 0 && pages.page_size != self.table.page_size();
        if resized && self.database == CONSOLE_DATABASE {
            return Err(wrong("it has another page size than the database"));
        }
        self.unfinished.take_if(|open| pages.part == 0 || open.term != term);
        if pages.part > 0 {
            let open = self.unfinished.as_ref().ok_or_else(|| wrong("the beginning of its transaction is missing"))?;
            let next = (open.transaction, open.next_part, open.page_size);
            if (pages.transaction, pages.part, pages.page_size) != next {
                return Err(wrong("it does not continue the transaction before it"));
            }
        }
        if let Some(commit) = pages.commit {
            self.take_effect(index, &pages, commit, source)?;
            self.unfinished = None;
        } else if let Some(open) = &mut self.unfinished {
            open.next_part += 1;
        } else {
            let (transaction, page_size) = (pages.transaction, pages.page_size);
            self.unfinished = Some(Unfinished { transaction, term, first: index, next_part: 1, page_size });
        }
        self.applied = index;
        Ok(())
    }

    fn take_effect(
        &mut self,
        index: u64,
        last: &Pages<'_>,
        commit: Commit,
        source: &dyn EntrySource,
    ) -> Result<(), ApplyError> {
        let failed = |error| ApplyError::Io { index, error };
        self.half_applied = true;
        if self.table.pages() == 0 || self.table.page_size() != last.page_size {
            self.table = PageTable::empty(last.page_size);
            run(Place::Database, Act::Resize, || self.file.set_len(0)).map_err(failed)?;
            self.copy = None;
        }
        self.table.resize(commit.database_pages);
        self.set_pages(commit.database_pages, last.page_size).map_err(failed)?;
        if let Some(open) = self.unfinished {
            self.write_earlier(open, index - 1, source).map_err(failed)?;
        }
        self.write_pages(last).map_err(failed)?;
        (self.claim, self.claimed_pages, self.half_applied) = (commit.checksum, commit.database_pages, false);
        self.claimed_page_size = last.page_size;
        if index > self.touched && self.table.checksum() != commit.checksum {
            let (expected, computed) = (commit.checksum, self.table.checksum());
            return Err(ApplyError::Diverged { index, expected, computed });
        }
        Ok(())
    }

    /// Gives the file the size of the database. After a start, and before the first transaction, the file can be longer
    /// or shorter: a crash may have dropped what it had reached.
    pub fn trim(&self) -> io::Result<()> {
        self.set_pages(self.table.pages(), self.table.page_size())
    }

    fn set_pages(&self, pages: u32, page_size: u32) -> io::Result<()> {
        run(Place::Database, Act::Resize, || self.file.set_len(u64::from(pages) * u64::from(page_size)))
    }

    /// Reads the earlier parts of the transaction again, and writes them.
    fn write_earlier(&mut self, open: Unfinished, to: u64, source: &dyn EntrySource) -> io::Result<()> {
        let mut next = 0;
        source.for_each(open.first, to, &mut |_, payload| {
            // Parts for other databases can stand between them.
            if transaction::database(payload) != Ok(self.database) {
                return Ok(());
            }
            let part = Pages::decode(payload).map_err(io::Error::other)?;
            if (part.transaction, part.part) == (open.transaction, next) {
                next += 1;
                self.write_pages(&part)?;
            }
            Ok(())
        })?;
        if next == open.next_part { Ok(()) } else { Err(io::Error::other("parts of the transaction are missing")) }
    }

    fn write_pages(&mut self, part: &Pages<'_>) -> io::Result<()> {
        self.copy.take_if(|copy| !copy.is_wanted());
        for (number, image) in part.iter() {
            if number > self.table.pages() {
                return Err(io::Error::other("a page beyond the end of the database"));
            }
            let offset = u64::from(number - 1) * u64::from(part.page_size);
            run(Place::Database, Act::Write, || self.file.write_all_at(image, offset))?;
            self.table.set(number, page_checksum(number, image));
            if let Some(copy) = &self.copy {
                copy.note(number);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::transaction::PagesBuilder;

    /// For transactions of one part.
    struct Nothing;

    impl EntrySource for Nothing {
        fn for_each(&self, _: u64, _: u64, _: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
            Ok(())
        }
    }

    /// A transaction that writes all pages of a database of this many.
    fn transaction(pages: u32) -> Vec<u8> {
        let mut builder = PagesBuilder::new(1, 1, 0, 512);
        let images = (1..=pages).map(|number| (number, [number as u8; 512]));
        images.clone().for_each(|(number, image)| builder.push(number, &image));
        let checksum = images.fold(0, |sum, (number, image)| sum ^ page_checksum(number, &image));
        builder.finish(Some(Commit { database_pages: pages, checksum }))
    }

    #[test]
    fn a_checkpoint_after_a_failure_is_of_the_last_whole_transaction() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let file = Arc::new(File::create_new(&path).unwrap());
        let empty = Record { index: 1, page_size: 0, pages: 0, checksum: 0 };
        let mut replica = Replica::at(Arc::clone(&file), 1, &empty, 0, &|| true).unwrap();
        replica.apply(2, 1, &transaction(3), &Nothing).unwrap();
        let before = replica.record();
        assert_eq!((before.index, before.pages), (2, 3));
        // Refuses to grow, as a full disk does.
        replica.file = Arc::new(File::open(&path).unwrap());
        replica.apply(3, 1, &transaction(9), &Nothing).unwrap_err();
        assert_eq!(replica.record(), before);
        replica.file = file;
        replica.apply(3, 1, &transaction(9), &Nothing).unwrap();
        assert_eq!((replica.record().index, replica.record().pages), (3, 9));
    }
}
