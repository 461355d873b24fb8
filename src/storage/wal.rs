//! The format of SQLite's `-wal` file, and which of its frames make up a transaction. Pure: no files, locks or SQLite.
//!
//! The format is that of <https://www.sqlite.org/fileformat2.html#walformat>: a header of 32 bytes, then frames, each a
//! header of 24 bytes and one page. All integers are big-endian. Frames are counted from 1, as SQLite does.
//!
//! [`Tracker`] watches the writes that SQLite makes while it holds the WAL's write lock. It relies on what SQLite 3.51
//! does (`walFrames` and what that calls):
//! - A transaction's frames follow the last committed frame without a gap. `ROLLBACK` and `ROLLBACK TO` make no call at
//!   all: SQLite just goes back and overwrites its frames. So a header written where there already is one means that
//!   all later frames are gone.
//! - A page that is written again inside a transaction either overwrites the data (never the header) of its earlier
//!   frame, or gets another frame. The last frame counts.
//! - The committing frame is the last one whose data is written. Its header, with the new size of the database, comes
//!   directly before. After it, any header of the transaction may be rewritten with a new checksum.
//! - A WAL that restarts from its beginning gets a new header first.
//!
//! Must never guess: an unexpected write is an error.

use thiserror::Error;

/// Size of the WAL's header, in bytes.
pub const WAL_HEADER: usize = 32;
/// Size of a frame's header, in bytes.
pub const FRAME_HEADER: usize = 24;

const MAGIC: [u8; 3] = [0x37, 0x7f, 0x06];
/// Frames of one transaction for which the memory is kept between transactions, 4 bytes each.
const KEEP: usize = 1 << 14;

/// A write that a correct SQLite would not make here. It must be refused.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("unexpected write to the WAL at {offset}, {length} bytes: {what}")]
pub struct Violation {
    pub offset: u64,
    pub length: usize,
    pub what: &'static str,
}

/// What to do with a write.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Pass it down.
    Pass,
    /// Pass it down; the WAL restarts at frame 1.
    Restart,
    /// Hold it back: [`Tracker::held`] has it until the transaction is replicated.
    Hold,
    /// This is the data of the committing frame: replicate [`Tracker::pages`], then pass the held header down.
    Commit,
}

/// The header of a committing frame, held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingCommit {
    /// The committing frame.
    pub frame: u32,
    /// Size of the database after the transaction, in pages.
    pub database_pages: u32,
    /// The header as SQLite wrote it.
    pub header: [u8; FRAME_HEADER],
}

/// The frames of the transaction in progress.
#[derive(Debug)]
pub struct Tracker {
    page_size: usize,
    /// Frames before this one belong to earlier transactions.
    committed: u32,
    /// Page numbers of the frames after `committed`.
    frames: Vec<u32>,
    held: Option<PendingCommit>,
    /// The first frame of a committed transaction, while SQLite still holds the write lock.
    settled: Option<u32>,
}

fn big_endian(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl Tracker {
    /// A tracker of an empty WAL.
    pub fn new(page_size: u32) -> Self {
        Self { page_size: page_size as usize, committed: 0, frames: Vec::new(), held: None, settled: None }
    }

    /// Where the header of a frame lies in the file.
    pub fn header_offset(&self, frame: u32) -> u64 {
        assert!(frame > 0, "frames are counted from 1");
        WAL_HEADER as u64 + u64::from(frame - 1) * (FRAME_HEADER + self.page_size) as u64
    }

    /// Where the data of a frame lies in the file.
    pub fn data_offset(&self, frame: u32) -> u64 {
        self.header_offset(frame) + FRAME_HEADER as u64
    }

    /// Takes note of a write before it is made.
    ///
    /// # Errors
    /// [`Violation`] for anything that SQLite is not known to do; nothing is noted then.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<Step, Violation> {
        let violation = |what| Violation { offset, length: bytes.len(), what };
        if offset == 0 {
            return self.restart(bytes).map_err(violation);
        }
        let body = offset.checked_sub(WAL_HEADER as u64).ok_or_else(|| violation("inside the header"))?;
        let size = (FRAME_HEADER + self.page_size) as u64;
        let frame = u32::try_from(body / size + 1).map_err(|_| violation("too many frames"))?;
        match (body % size, bytes.len()) {
            (0, FRAME_HEADER) => self.frame_header(frame, bytes).map_err(violation),
            (within, length) if within == FRAME_HEADER as u64 && length == self.page_size => {
                self.frame_data(frame).map_err(violation)
            }
            _ => Err(violation("neither a frame's header nor its data")),
        }
    }

    fn restart(&mut self, bytes: &[u8]) -> Result<Step, &'static str> {
        if bytes.len() != WAL_HEADER || bytes[..3] != MAGIC || bytes[3] & !1 != 0x82 {
            return Err("not a WAL header");
        }
        if big_endian(bytes, 8) as usize != self.page_size {
            return Err("the page size changed");
        }
        if self.settled.is_some() || self.held.is_some() {
            return Err("a WAL header inside a commit");
        }
        self.committed = 0;
        self.frames.clear();
        Ok(Step::Restart)
    }

    fn frame_header(&mut self, frame: u32, bytes: &[u8]) -> Result<Step, &'static str> {
        if let Some(first) = self.settled {
            let own = (first..=self.committed).contains(&frame);
            return if own { Ok(Step::Pass) } else { Err("a frame outside the transaction just committed") };
        }
        if self.held.is_some() {
            return Err("a header where the committing frame's data was due");
        }
        if frame <= self.committed {
            return Err("a committed frame's header");
        }
        let place = (frame - self.committed - 1) as usize;
        if place > self.frames.len() {
            return Err("frames left out");
        }
        let (page, database_pages) = (big_endian(bytes, 0), big_endian(bytes, 4));
        if page == 0 {
            return Err("page number 0");
        }
        self.frames.truncate(place);
        self.frames.push(page);
        if database_pages == 0 {
            return Ok(Step::Pass);
        }
        let mut header = [0; FRAME_HEADER];
        header.copy_from_slice(bytes);
        self.held = Some(PendingCommit { frame, database_pages, header });
        Ok(Step::Hold)
    }

    fn frame_data(&mut self, frame: u32) -> Result<Step, &'static str> {
        if self.settled.is_some() {
            return Err("data after the commit");
        }
        match self.held {
            Some(held) if held.frame == frame => Ok(Step::Commit),
            Some(_) => Err("data where the committing frame's data was due"),
            None if frame > self.committed && (frame - self.committed) as usize <= self.frames.len() => Ok(Step::Pass),
            None => Err("data of a frame without a header"),
        }
    }

    /// For who does not see SQLite's locks: ends a transaction that this write shows to be over. After a commit that is
    /// a header behind it; where a commit was refused, or its writer has died, it is any header.
    pub fn infer_end(&mut self, offset: u64, length: usize) {
        let begins = offset == 0 || length == FRAME_HEADER;
        let behind = offset == 0 || offset == self.header_offset(self.committed + 1);
        if begins && (self.held.is_some() || (self.settled.is_some() && behind)) {
            self.end();
        }
    }

    /// The last frame that belongs to a transaction that passed; 0 if none does.
    pub fn committed(&self) -> u32 {
        self.committed
    }

    /// The committing frame's header, between [`Step::Hold`] and the end of the transaction.
    pub fn held(&self) -> Option<PendingCommit> {
        self.held
    }

    /// True between the commit and the release of SQLite's write lock.
    pub fn is_settled(&self) -> bool {
        self.settled.is_some()
    }

    /// The pages of the committing transaction as (page, frame that holds its content), in ascending order. Pages
    /// beyond the new size are left out: SQLite spilled them before it shrank the database.
    pub fn pages(&self) -> Vec<(u32, u32)> {
        let limit = self.held.map_or(0, |held| held.database_pages);
        let frames = (self.committed + 1..).zip(&self.frames);
        let mut pages: Vec<_> = frames.map(|(frame, page)| (*page, frame)).filter(|(page, _)| *page <= limit).collect();
        // The last frame of a page counts: it is sorted to the front, and the others are dropped.
        pages.sort_unstable_by_key(|(page, frame)| (*page, u32::MAX - frame));
        pages.dedup_by_key(|(page, _)| *page);
        pages
    }

    /// The held transaction is committed: its header may be passed down, and its headers may be rewritten.
    pub fn commit(&mut self) {
        let held = self.held.take().expect("only a held transaction commits");
        self.settled = Some(self.committed + 1);
        self.committed = held.frame;
        self.frames.clear();
    }

    /// SQLite has released its write lock: what is not committed by now never will be.
    pub fn end(&mut self) {
        self.frames.clear();
        self.frames.shrink_to(KEEP);
        self.held = None;
        self.settled = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 512;

    fn header(page: u32, size: u32) -> [u8; FRAME_HEADER] {
        let mut bytes = [0; FRAME_HEADER];
        bytes[..4].copy_from_slice(&page.to_be_bytes());
        bytes[4..8].copy_from_slice(&size.to_be_bytes());
        bytes
    }

    fn start() -> Tracker {
        let mut tracker = Tracker::new(PAGE as u32);
        assert_eq!(tracker.write(0, &wal_header()), Ok(Step::Restart));
        tracker
    }

    fn wal_header() -> [u8; WAL_HEADER] {
        let mut bytes = [0; WAL_HEADER];
        bytes[..4].copy_from_slice(&0x377f_0682u32.to_be_bytes());
        bytes[8..12].copy_from_slice(&(PAGE as u32).to_be_bytes());
        bytes
    }

    fn frame(tracker: &mut Tracker, frame: u32, page: u32, size: u32) -> Step {
        let at = tracker.header_offset(frame);
        let step = tracker.write(at, &header(page, size)).unwrap();
        assert_eq!(step, if size > 0 { Step::Hold } else { Step::Pass });
        data(tracker, frame).unwrap()
    }

    fn data(tracker: &mut Tracker, frame: u32) -> Result<Step, Violation> {
        tracker.write(tracker.data_offset(frame), &[0; PAGE])
    }

    #[test]
    fn a_commit_lists_its_pages_once_in_order() {
        let mut tracker = start();
        for (number, page) in [(1, 9), (2, 3), (3, 9), (4, 1)] {
            frame(&mut tracker, number, page, 0);
        }
        assert_eq!(data(&mut tracker, 2), Ok(Step::Pass), "an overwrite in place");
        assert_eq!(frame(&mut tracker, 5, 2, 9), Step::Commit);
        assert_eq!(tracker.pages(), [(1, 4), (2, 5), (3, 2), (9, 3)]);
    }

    #[test]
    fn a_silent_rollback_drops_the_frames_behind_it() {
        let mut tracker = start();
        for (number, page) in [(1, 4), (2, 5), (3, 6)] {
            frame(&mut tracker, number, page, 0);
        }
        assert_eq!(frame(&mut tracker, 2, 8, 8), Step::Commit);
        assert_eq!(tracker.pages(), [(4, 1), (8, 2)]);
        assert!(data(&mut tracker, 3).is_err());
    }

    #[test]
    fn a_spilled_page_beyond_the_new_size_is_left_out() {
        let mut tracker = start();
        frame(&mut tracker, 1, 100, 0);
        assert_eq!(frame(&mut tracker, 2, 1, 50), Step::Commit);
        assert_eq!(tracker.pages(), [(1, 2)]);
    }

    #[test]
    fn headers_of_the_committed_transaction_may_be_rewritten_until_the_lock_goes() {
        let mut tracker = start();
        frame(&mut tracker, 1, 2, 0);
        assert_eq!(frame(&mut tracker, 2, 1, 2), Step::Commit);
        tracker.commit();
        for number in [1, 2] {
            let at = tracker.header_offset(number);
            assert_eq!(tracker.write(at, &header(1, 2)), Ok(Step::Pass));
        }
        assert!(data(&mut tracker, 2).is_err());
        tracker.end();
        let at = tracker.header_offset(2);
        assert_eq!(tracker.write(at, &header(1, 2)).unwrap_err().what, "a committed frame's header");
        assert_eq!(frame(&mut tracker, 3, 1, 2), Step::Commit);
    }

    #[test]
    fn a_refused_commit_is_forgotten() {
        let mut tracker = start();
        frame(&mut tracker, 1, 2, 0);
        assert_eq!(frame(&mut tracker, 2, 1, 2), Step::Commit);
        tracker.end();
        assert_eq!(tracker.held(), None);
        assert_eq!(frame(&mut tracker, 1, 7, 7), Step::Commit);
        assert_eq!(tracker.pages(), [(7, 1)]);
    }

    #[test]
    fn an_end_that_nobody_sees_is_inferred() {
        let mut tracker = start();
        let write = |tracker: &mut Tracker, frame: u32, page: u32, size: u32| {
            let at = tracker.header_offset(frame);
            tracker.infer_end(at, FRAME_HEADER);
            let step = tracker.write(at, &header(page, size));
            (step, data(tracker, frame))
        };
        // Refused: its frames are written again from the first one.
        assert_eq!(write(&mut tracker, 1, 1, 0).1, Ok(Step::Pass));
        assert_eq!(write(&mut tracker, 2, 2, 2).1, Ok(Step::Commit));
        assert_eq!(write(&mut tracker, 1, 1, 0), (Ok(Step::Pass), Ok(Step::Pass)));
        assert_eq!(write(&mut tracker, 2, 2, 2).1, Ok(Step::Commit));
        assert_eq!(tracker.pages(), [(1, 1), (2, 2)]);
        tracker.commit();
        // Its headers may be rewritten until the next one begins. Other content there is none that it knows.
        let at = tracker.header_offset(1);
        tracker.infer_end(at, FRAME_HEADER);
        assert_eq!(tracker.write(at, &header(1, 0)), Ok(Step::Pass));
        assert!(tracker.is_settled() && data(&mut tracker, 1).is_err());
        assert_eq!(write(&mut tracker, 3, 1, 2).1, Ok(Step::Commit));
        tracker.commit();
        tracker.infer_end(0, WAL_HEADER);
        assert_eq!(tracker.write(0, &wal_header()), Ok(Step::Restart));
        assert_eq!(tracker.committed(), 0);
    }

    #[test]
    fn a_restart_counts_from_the_first_frame() {
        let mut tracker = start();
        frame(&mut tracker, 1, 1, 1);
        tracker.commit();
        assert!(tracker.write(0, &wal_header()).is_err(), "not before the lock goes");
        tracker.end();
        assert_eq!(tracker.write(0, &wal_header()), Ok(Step::Restart));
        assert_eq!(frame(&mut tracker, 1, 3, 3), Step::Commit);
    }

    #[test]
    fn other_shapes_are_refused() {
        let mut tracker = start();
        for (offset, length) in [(0, 31), (8, 24), (32, 25), (32, 512), (56, 512), (57, 24), (32 + 536, 24)] {
            assert!(tracker.write(offset, &vec![0; length]).is_err(), "{offset} {length}");
        }
        let at = tracker.header_offset(1);
        assert_eq!(tracker.write(at, &header(1, 1)), Ok(Step::Hold));
        assert!(tracker.write(at, &header(1, 1)).is_err());
    }
}
