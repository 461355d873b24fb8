//! The first half of the [gate](super::gate): sees what SQLite writes to the `-wal` file in one transaction, holds back
//! the header that would commit it, and hands out its pages. Knows files and offsets. Must never know who is primary,
//! or what happens to the pages.

use std::collections::HashMap;

use super::wal::{FRAME_HEADER, PendingCommit, SUMMED, SUMS, Step, Sums, Tracker, Violation, WAL_HEADER};

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

    /// For who does not see SQLite's locks: see [`Tracker::came_again`].
    pub fn came_again(&mut self, offset: u64, length: usize) {
        self.tracker.came_again(offset, length);
    }

    /// For who does not see SQLite's locks: see [`Tracker::written_over`].
    ///
    /// # Errors
    /// [`Violation`] if a correct SQLite would not do that here.
    pub fn written_over(&self, offset: u64, length: usize) -> Result<u32, Violation> {
        self.tracker.written_over(offset, length)
    }

    /// For who does not see SQLite's locks: see [`Tracker::reopen`].
    pub fn reopen(&mut self, frame: u32, header: bool) {
        self.tracker.reopen(frame, header);
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

    /// The last frame of a transaction that passed; 0 if there is none.
    pub fn committed(&self) -> u32 {
        self.tracker.committed()
    }

    fn sums_before(&self, file: &mut dyn WalFile, frame: u32) -> Result<Sums, Code> {
        let mut end = [0; SUMS];
        file.read_at(self.tracker.sums_before(frame), &mut end)?;
        Ok(self.tracker.sums_after(end))
    }

    fn read_frame(
        &self,
        file: &mut dyn WalFile,
        frame: u32,
        header: &mut [u8; FRAME_HEADER],
        image: &mut [u8],
    ) -> Result<(), Code> {
        file.read_at(self.tracker.header_offset(frame), header)?;
        file.read_at(self.tracker.data_offset(frame), image)
    }

    /// At [`Step::Hold`]: the data of the last frame, if the file happens to have it already. The header alone would
    /// then commit for whoever recovers the WAL.
    ///
    /// # Errors
    /// The file's code when it cannot be read.
    pub fn completed_by_header(&self, file: &mut dyn WalFile, length: u64) -> Result<Option<Vec<u8>>, Code> {
        let Some(held) = self.tracker.held() else { return Ok(None) };
        if length < wal_bytes(self.page_size, held.frame) {
            return Ok(None);
        }
        let mut image = vec![0; self.page_size as usize];
        file.read_at(self.tracker.data_offset(held.frame), &mut image)?;
        let mut sums = self.sums_before(file, held.frame)?;
        sums.add(&held.header[..SUMMED]);
        sums.add(&image);
        Ok((sums.bytes() == held.header[FRAME_HEADER - SUMS..]).then_some(image))
    }

    /// At [`Step::Commit`]: puts the checksums right that SQLite would put right after the commit, so that whoever
    /// recovers the WAL finds the transaction as soon as its last header is there. `data` is the content of the last
    /// frame. True if there was anything to do.
    ///
    /// # Errors
    /// The file's code when it cannot be read or written: the transaction fails.
    pub fn sum_again(&mut self, file: &mut dyn WalFile, data: &[u8]) -> Result<bool, Code> {
        let (Some(first), Some(held)) = (self.tracker.rewritten(), self.tracker.held()) else { return Ok(false) };
        let mut sums = self.sums_before(file, first)?;
        let (mut header, mut image) = ([0; FRAME_HEADER], vec![0; self.page_size as usize]);
        for frame in first..held.frame {
            self.read_frame(file, frame, &mut header, &mut image)?;
            sums.add(&header[..SUMMED]);
            sums.add(&image);
            self.tracker.seal(&mut header, sums);
            file.write_at(self.tracker.header_offset(frame), &header)?;
        }
        sums.add(&held.header[..SUMMED]);
        sums.add(data);
        self.tracker.seal_held(sums);
        Ok(true)
    }

    /// True if whoever recovers the WAL finds all of it, from the frame after `before` on up to the last one that
    /// passed.
    ///
    /// # Errors
    /// The file's code when it cannot be read.
    pub fn is_recoverable(&self, file: &mut dyn WalFile, before: u32) -> Result<bool, Code> {
        let mut sums = self.sums_before(file, before + 1)?;
        let (mut header, mut image) = ([0; FRAME_HEADER], vec![0; self.page_size as usize]);
        for frame in before + 1..=self.tracker.committed() {
            self.read_frame(file, frame, &mut header, &mut image)?;
            sums.add(&header[..SUMMED]);
            sums.add(&image);
            if header[FRAME_HEADER - SUMS..] != sums.bytes() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The last frame of each page among the first `frames` ones.
    ///
    /// # Errors
    /// The file's code when it cannot be read.
    pub fn frames_of_pages(&self, file: &mut dyn WalFile, frames: u32) -> Result<HashMap<u32, u32>, Code> {
        let (mut found, mut page) = (HashMap::new(), [0; 4]);
        for frame in 1..=frames {
            file.read_at(self.tracker.header_offset(frame), &mut page)?;
            found.insert(u32::from_be_bytes(page), frame);
        }
        Ok(found)
    }

    /// Reads the page of a frame.
    ///
    /// # Errors
    /// The file's code when it cannot be read.
    pub fn read_page(&self, file: &mut dyn WalFile, frame: u32, image: &mut [u8]) -> Result<(), Code> {
        file.read_at(self.tracker.data_offset(frame), image)
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
