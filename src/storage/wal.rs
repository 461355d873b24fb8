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
//! - While a transaction has data that was written again, the headers behind it have neither salt nor checksums. SQLite
//!   completes them after the commit.
//! - A WAL that restarts from its beginning gets a new header first.
//!
//! Must never guess: an unexpected write is an error.

use thiserror::Error;

/// Size of the WAL's header, in bytes.
pub const WAL_HEADER: usize = 32;
/// Size of a frame's header, in bytes.
pub const FRAME_HEADER: usize = 24;
/// Bytes of the checksums at the end of each header.
pub const SUMS: usize = 8;
/// Bytes at the beginning of a frame's header that its checksums go over.
pub const SUMMED: usize = 8;
/// Bytes of the salt, between them.
const SALT: usize = 8;

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

/// The checksums of a WAL. Those of a frame go over the first eight bytes of its header and its page, and continue
/// those of the frame before it; the first frame continues the header of the file.
#[derive(Clone, Copy, Debug)]
pub struct Sums {
    big_endian: bool,
    sums: (u32, u32),
}

impl Sums {
    /// Continues what the header of a frame ends with, or that of the file.
    pub fn after(big_endian: bool, end: [u8; SUMS]) -> Self {
        Self { big_endian, sums: (self::big_endian(&end, 0), self::big_endian(&end, 4)) }
    }

    /// Adds a multiple of eight bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        let number = match self.big_endian {
            true => u32::from_be_bytes,
            false => u32::from_le_bytes,
        };
        let (mut first, mut second) = self.sums;
        for pair in bytes.chunks_exact(8) {
            let (one, other) = ([pair[0], pair[1], pair[2], pair[3]], [pair[4], pair[5], pair[6], pair[7]]);
            first = first.wrapping_add(number(one)).wrapping_add(second);
            second = second.wrapping_add(number(other)).wrapping_add(first);
        }
        self.sums = (first, second);
    }

    /// As a header ends.
    pub fn bytes(self) -> [u8; SUMS] {
        let mut bytes = [0; SUMS];
        bytes[..4].copy_from_slice(&self.sums.0.to_be_bytes());
        bytes[4..].copy_from_slice(&self.sums.1.to_be_bytes());
        bytes
    }
}

/// The frames of the transaction in progress.
#[derive(Debug)]
pub struct Tracker {
    page_size: usize,
    /// Checksums take the numbers in this order.
    big_endian: bool,
    /// What all its headers repeat of that of the file.
    salt: [u8; SALT],
    /// Frames before this one belong to earlier transactions.
    committed: u32,
    /// Page numbers of the frames after `committed`.
    frames: Vec<u32>,
    /// The last of them has a header, and no data yet.
    due: bool,
    /// The first of them whose data was written again: from there on, the checksums are wrong.
    rewritten: Option<u32>,
    held: Option<PendingCommit>,
    /// A committed transaction, while SQLite still holds the write lock.
    settled: Option<Settled>,
    /// Page numbers of its frames.
    last: Vec<u32>,
}

/// A committed transaction that ends with the frame `committed`.
#[derive(Clone, Copy, Debug)]
struct Settled {
    first: u32,
    /// The last of its frames whose header came again as it was; the frame before `first` if none has.
    again: u32,
}

fn big_endian(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The frame that has this offset; none in the header of the file.
fn frame_at(offset: u64, page_size: usize) -> Option<u32> {
    let body = offset.checked_sub(WAL_HEADER as u64)?;
    u32::try_from(body / (FRAME_HEADER + page_size) as u64 + 1).ok()
}

impl Tracker {
    /// A tracker of an empty WAL.
    pub fn new(page_size: u32) -> Self {
        Self {
            page_size: page_size as usize,
            big_endian: false,
            salt: [0; SALT],
            committed: 0,
            frames: Vec::new(),
            due: false,
            rewritten: None,
            held: None,
            settled: None,
            last: Vec::new(),
        }
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
        let frame = frame_at(offset, self.page_size).ok_or_else(|| violation("too many frames"))?;
        match (body % (FRAME_HEADER + self.page_size) as u64, bytes.len()) {
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
        self.big_endian = bytes[3] & 1 != 0;
        self.salt.copy_from_slice(&bytes[WAL_HEADER - SUMS - SALT..WAL_HEADER - SUMS]);
        self.committed = 0;
        self.begin();
        Ok(Step::Restart)
    }

    fn frame_header(&mut self, frame: u32, bytes: &[u8]) -> Result<Step, &'static str> {
        if let Some(settled) = self.settled {
            let own = (settled.first..=self.committed).contains(&frame);
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
        self.due = true;
        self.rewritten = self.rewritten.filter(|rewritten| *rewritten < frame);
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
            None if frame > self.committed && (frame - self.committed) as usize <= self.frames.len() => {
                let last = (frame - self.committed) as usize == self.frames.len();
                if !(last && std::mem::take(&mut self.due)) {
                    self.rewritten = Some(self.rewritten.map_or(frame, |first| first.min(frame)));
                }
                Ok(Step::Pass)
            }
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

    /// For who does not see SQLite's locks: a header of the transaction that passed last came again as it was. Its
    /// writer puts checksums right, or somebody who has not seen it does the same once more.
    pub fn came_again(&mut self, offset: u64, length: usize) {
        if let Some(settled) = &mut self.settled
            && length == FRAME_HEADER
            && let Some(frame) = frame_at(offset, self.page_size)
        {
            settled.again = frame;
        }
    }

    /// For who does not see SQLite's locks: the frame from which on somebody writes something else over the transaction
    /// that passed last, because the WAL ends before it for all who live.
    ///
    /// # Errors
    /// [`Violation`] if a correct SQLite would not do that here.
    pub fn written_over(&self, offset: u64, length: usize) -> Result<u32, Violation> {
        let frame = frame_at(offset, self.page_size).unwrap_or(0);
        let found = self.settled.is_some_and(|Settled { first, again }| match length {
            FRAME_HEADER => (first..=(again + 1).min(self.committed)).contains(&frame),
            _ => (first..=again).contains(&frame),
        });
        let what = "it is neither in the transaction that passed last, nor behind it";
        if found { Ok(frame) } else { Err(Violation { offset, length, what }) }
    }

    /// For who does not see SQLite's locks: the transaction that passed last is taken back, because of a write to this
    /// [frame](Self::written_over). The frames before it came again as they were, and so did its header if this is
    /// data.
    pub fn reopen(&mut self, frame: u32, header: bool) {
        let Some(settled) = self.settled.take() else { return };
        self.committed = settled.first - 1;
        self.frames.clear();
        let kept = if header { frame - settled.first } else { settled.again + 1 - settled.first };
        self.frames.extend_from_slice(&self.last[..(kept as usize).min(self.last.len())]);
        (self.due, self.rewritten) = (false, None);
        self.last.clear();
    }

    /// The first frame of the transaction in progress whose data was written again: from there on to the end, the
    /// headers in the file have wrong checksums.
    pub fn rewritten(&self) -> Option<u32> {
        self.rewritten
    }

    /// Checksums that continue what the header of a frame ends with, or that of the file.
    pub fn sums_after(&self, end: [u8; SUMS]) -> Sums {
        Sums::after(self.big_endian, end)
    }

    /// Where the checksums are that a frame continues.
    pub fn sums_before(&self, frame: u32) -> u64 {
        match frame {
            1 => (WAL_HEADER - SUMS) as u64,
            frame => self.header_offset(frame - 1) + (FRAME_HEADER - SUMS) as u64,
        }
    }

    /// Completes a header. SQLite leaves out salt and checksums while it knows that it has to write them later.
    pub fn seal(&self, header: &mut [u8; FRAME_HEADER], sums: Sums) {
        header[SUMMED..SUMMED + SALT].copy_from_slice(&self.salt);
        header[FRAME_HEADER - SUMS..].copy_from_slice(&sums.bytes());
    }

    /// Completes the header that is held back, and so the transaction.
    pub fn seal_held(&mut self, sums: Sums) {
        if let Some(mut held) = self.held {
            self.seal(&mut held.header, sums);
            self.held = Some(held);
        }
        self.rewritten = None;
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
        self.settled = Some(Settled { first: self.committed + 1, again: self.committed });
        self.committed = held.frame;
        std::mem::swap(&mut self.frames, &mut self.last);
        self.begin();
    }

    fn begin(&mut self) {
        self.frames.clear();
        (self.due, self.rewritten) = (false, None);
    }

    /// SQLite has released its write lock: what is not committed by now never will be.
    pub fn end(&mut self) {
        self.begin();
        self.frames.shrink_to(KEEP);
        self.last.clear();
        self.last.shrink_to(KEEP);
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
    fn what_passed_last_may_come_again_and_may_be_written_over() {
        let mut tracker = start();
        for (number, page) in [(1, 4), (2, 5)] {
            frame(&mut tracker, number, page, 0);
        }
        frame(&mut tracker, 3, 6, 9);
        tracker.commit();
        let at = |frame: u64| (WAL_HEADER as u64 + (frame - 1) * 536, FRAME_HEADER);
        let data_at = |frame: u64| (at(frame).0 + FRAME_HEADER as u64, PAGE);
        let over = |tracker: &Tracker, (offset, length)| tracker.written_over(offset, length).ok();
        assert_eq!([1, 2, 3].map(|frame| over(&tracker, at(frame))), [Some(1), None, None]);
        assert_eq!(over(&tracker, data_at(1)), None, "its header did not come again");
        tracker.came_again(at(1).0, FRAME_HEADER);
        tracker.came_again(data_at(1).0, PAGE);
        assert_eq!([1, 2, 3, 4].map(|frame| over(&tracker, at(frame))), [Some(1), Some(2), None, None]);
        assert_eq!([1, 2].map(|frame| over(&tracker, data_at(frame))), [Some(1), None]);
        let mut other = start();
        std::mem::swap(&mut other, &mut tracker);
        other.reopen(2, true);
        assert_eq!((other.committed(), frame(&mut other, 2, 8, 8)), (0, Step::Commit));
        assert_eq!(other.pages(), [(4, 1), (8, 2)]);
    }

    #[test]
    fn frames_whose_data_was_written_again_are_known_until_their_headers_are() {
        let mut tracker = start();
        for number in 1..=4 {
            frame(&mut tracker, number, number, 0);
        }
        assert_eq!(tracker.rewritten(), None);
        for (number, first) in [(3, 3), (4, 3), (2, 2)] {
            data(&mut tracker, number).unwrap();
            assert_eq!(tracker.rewritten(), Some(first));
        }
        frame(&mut tracker, 3, 7, 0);
        assert_eq!(tracker.rewritten(), Some(2));
        frame(&mut tracker, 2, 7, 0);
        assert_eq!(tracker.rewritten(), None);
        data(&mut tracker, 2).unwrap();
        assert_eq!(frame(&mut tracker, 3, 1, 9), Step::Commit);
        assert_eq!(tracker.rewritten(), Some(2));
        tracker.commit();
        assert_eq!(tracker.rewritten(), None);
    }

    #[test]
    fn checksums_are_those_of_sqlite() {
        // The header of a WAL that SQLite 3.40 has written.
        let header = [
            0x37, 0x7f, 0x06, 0x82, 0x00, 0x2d, 0xe2, 0x18, 0x00, 0x00, 0x10, 0x00, 0x00, 0x00, 0x00, 0x00, 0xf1, 0x1c,
            0x56, 0xda, 0x25, 0x68, 0xb3, 0x2a, 0xaf, 0x3d, 0x20, 0x04, 0x91, 0xd8, 0x5f, 0xce,
        ];
        let mut sums = Sums::after(false, [0; SUMS]);
        sums.add(&header[..WAL_HEADER - SUMS]);
        assert_eq!(sums.bytes(), header[WAL_HEADER - SUMS..]);
        let mut other = Sums::after(true, [0; SUMS]);
        other.add(&header[..WAL_HEADER - SUMS]);
        assert_ne!(other.bytes(), sums.bytes());
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
