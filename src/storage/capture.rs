//! The first half of the [gate](super::gate): sees what SQLite writes to the `-wal` file in one transaction, keeps the
//! header back that would commit it, and gives out its pages. Knows files and offsets. Must never know who is primary,
//! nor what becomes of the pages.

use super::wal::{FRAME_HEADER, PendingCommit, Step, Tracker, Violation, WAL_HEADER};

/// SQLite's result codes, as the real file gave them.
pub(super) type Code = i32;
/// SQLITE_FULL: the disk has no space.
pub(super) const FULL: Code = 13;

/// The `-wal` file below the shim.
pub(super) trait WalFile {
    /// Fills `bytes` from `offset` on; a short read is an error.
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> Result<(), Code>;
    /// Writes all of `bytes`.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Code>;
}

/// Bytes of a `-wal` file that ends with this frame.
pub(super) fn wal_bytes(page_size: u32, frames: u32) -> u64 {
    WAL_HEADER as u64 + u64::from(frames) * (FRAME_HEADER as u64 + u64::from(page_size))
}

/// What SQLite has written since it took the WAL's write lock.
pub(super) struct Capture {
    tracker: Tracker,
    page_size: u32,
}

/// A transaction that waits for its commit: its data is in the `-wal`, and means nothing before the header of its last
/// frame.
pub(super) struct Captured {
    held: PendingCommit,
    /// The pages in ascending order, with the frames that hold them.
    pages: Vec<(u32, u32)>,
}

impl Captured {
    /// How many pages it changes.
    pub fn count(&self) -> usize {
        self.pages.len()
    }

    /// Size of the database behind it, in pages.
    pub fn database_pages(&self) -> u32 {
        self.held.database_pages
    }

    /// Its last frame.
    pub fn frame(&self) -> u32 {
        self.held.frame
    }
}

impl Capture {
    /// Begins with an empty WAL.
    pub fn new(page_size: u32) -> Self {
        Self { tracker: Tracker::new(page_size), page_size }
    }

    /// Takes note of a write before it is made.
    ///
    /// # Errors
    /// [`Violation`] for anything that SQLite is not known to do; nothing is noted then.
    pub fn note(&mut self, offset: u64, bytes: &[u8]) -> Result<Step, Violation> {
        self.tracker.write(offset, bytes)
    }

    /// True between the commit and the release of SQLite's write lock.
    pub fn is_settled(&self) -> bool {
        self.tracker.is_settled()
    }

    /// At [`Step::Commit`]: writes the data of the last frame, and gives out what the transaction is made of. The data
    /// comes before all else: a full disk shows before anything is proposed.
    ///
    /// # Errors
    /// The code of SQLite when the frame cannot be written: the transaction fails, and nothing has been proposed.
    pub fn complete(&self, file: &mut dyn WalFile, data: &[u8]) -> Result<Captured, Code> {
        let held = self.tracker.held().expect("a commit step follows a held header");
        file.write_at(self.tracker.data_offset(held.frame), data)?;
        Ok(Captured { held, pages: self.tracker.pages() })
    }

    /// Hands out the pages one by one; `data` is that of the last frame.
    ///
    /// # Errors
    /// The code of SQLite when a page cannot be read again. An error of `take` ends it.
    pub fn pages<E: From<Code>>(
        &self,
        captured: &Captured,
        file: &mut dyn WalFile,
        data: &[u8],
        mut take: impl FnMut(u32, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut image = vec![0; self.page_size as usize];
        for (number, frame) in &captured.pages {
            if *frame == captured.held.frame {
                take(*number, data)?;
            } else {
                file.read_at(self.tracker.data_offset(*frame), &mut image)?;
                take(*number, &image)?;
            }
        }
        Ok(())
    }

    /// Lets the header through: SQLite's readers can see the transaction from now on.
    ///
    /// # Errors
    /// The code of SQLite when the header cannot be written; the transaction counts as committed nevertheless.
    pub fn commit(&mut self, captured: &Captured, file: &mut dyn WalFile) -> Result<(), Code> {
        let at = self.tracker.header_offset(captured.held.frame);
        self.tracker.commit();
        file.write_at(at, &captured.held.header)
    }

    /// SQLite gave up its write lock: whatever is not committed now never will be.
    pub fn end(&mut self) {
        self.tracker.end();
    }
}
