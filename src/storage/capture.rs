//! The first half of the [gate](super::gate): sees what SQLite writes to the `-wal` file in one transaction, holds back
//! the header that would commit it, and hands out its pages. Knows files and offsets. Must never know who is primary,
//! or what happens to the pages.

use super::wal::{FRAME_HEADER, PendingCommit, Step, Tracker, Violation, WAL_HEADER};

/// Why the file below failed: one of SQLite's result codes below the VFS, an error number of the kernel below the
/// folder of a service.
pub(super) type Code = i32;
/// `SQLITE_FULL`: the disk has no space.
pub(super) const FULL: Code = 13;

/// The `-wal` file below the shim.
pub(super) trait WalFile {
    /// Fills `bytes` with what is at `offset`; a short read is an error.
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> Result<(), Code>;
    /// Writes all of `bytes`.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Code>;
}

/// The size in bytes of a `-wal` file with this many frames.
pub(super) fn wal_bytes(page_size: u32, frames: u32) -> u64 {
    WAL_HEADER as u64 + u64::from(frames) * (FRAME_HEADER as u64 + u64::from(page_size))
}

/// What SQLite has written since it took the WAL's write lock.
pub(super) struct Capture {
    tracker: Tracker,
    page_size: u32,
}

/// A transaction that waits for its commit: its data is in the `-wal`, and counts for nothing until the header of its
/// last frame is.
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

    /// Size of the database after it, in pages.
    pub fn database_pages(&self) -> u32 {
        self.held.database_pages
    }

    /// The numbers of its pages, in ascending order.
    pub fn numbers(&self) -> impl Iterator<Item = u32> {
        self.pages.iter().map(|(number, _)| *number)
    }

    /// Its last frame.
    pub fn frame(&self) -> u32 {
        self.held.frame
    }
}

impl Capture {
    /// A capture of an empty WAL.
    pub fn new(page_size: u32) -> Self {
        Self { tracker: Tracker::new(page_size), page_size }
    }

    /// For who does not see SQLite's locks: ends a transaction that this write shows to be over. Call it before
    /// [`Self::note`].
    pub fn infer_end(&mut self, offset: u64, length: usize) {
        self.tracker.infer_end(offset, length);
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

    /// Size of a page, in bytes.
    pub fn page_size(&self) -> u32 {
        self.page_size
    }

    /// The header of the committing frame while it is held back, and where it belongs.
    pub fn held_header(&self) -> Option<(u64, [u8; FRAME_HEADER])> {
        self.tracker.held().map(|held| (self.tracker.header_offset(held.frame), held.header))
    }

    /// Bytes of the `-wal` file up to the end of the last transaction that passed.
    pub fn committed_bytes(&self) -> u64 {
        wal_bytes(self.page_size, self.tracker.committed())
    }

    /// At [`Step::Commit`]: writes the data of the last frame, and returns what the transaction is made of. The data is
    /// written first, so that a full disk shows before anything is proposed.
    ///
    /// # Errors
    /// The file's code when the frame cannot be written: the transaction fails, and nothing has been proposed.
    pub fn complete(&self, file: &mut dyn WalFile, data: &[u8]) -> Result<Captured, Code> {
        let held = self.tracker.held().expect("a commit step follows a held header");
        file.write_at(self.tracker.data_offset(held.frame), data)?;
        Ok(Captured { held, pages: self.tracker.pages() })
    }

    /// Hands out the pages one by one. `data` is the content of the last frame.
    ///
    /// # Errors
    /// The file's code when a page cannot be read back. An error of `take` ends the reading.
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

    /// Lets the header through: SQLite's readers see the transaction from now on.
    ///
    /// # Errors
    /// The file's code when the header cannot be written. The transaction counts as committed all the same.
    pub fn commit(&mut self, captured: &Captured, file: &mut dyn WalFile) -> Result<(), Code> {
        let at = self.tracker.header_offset(captured.held.frame);
        self.tracker.commit();
        file.write_at(at, &captured.held.header)
    }

    /// SQLite has released its write lock: what is not committed by now never will be.
    pub fn end(&mut self) {
        self.tracker.end();
    }
}
