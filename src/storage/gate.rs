//! The gate that every transaction of a primary passes: takes its pages from [`super::capture`], hands them to the
//! [`Replicator`], and lets SQLite's commit through only when a majority has it. There is one gate for each promotion.
//! Safe code only, called by [`super::vfs`].
//!
//! Also counts who has the database open, and knows which raft index a checkpoint has reached. Must never let a write
//! pass once it is fenced, except the rest of a transaction that the cluster has committed.
//!
//! A transaction that grows the database over a page without writing that page is refused. The secondaries would have
//! zeros in it, while the primary's file could still have old bytes there from when it was larger. SQLite 3.51 never
//! does this in WAL mode: `pagerWalFrames` writes every dirty page, free ones too, and only rollback journals leave
//! pages out. The one exception is the page with SQLite's locks, which nobody ever writes.
//!
//! There are two locks, so that nobody but another writer ever waits for a majority. `writer` is taken by whoever holds
//! SQLite's WAL write lock, and is held through [`Replicator::replicate`]. `marks` is only held for moments.

use std::{
    fmt,
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use crate::{
    mutex::locked as lock,
    telemetry::steps::{self, Step, Sum},
};

use super::{
    ReplicateError, Replicator,
    capture::{Capture, Captured, Code, WalFile, wal_bytes},
    checksum::{PageTable, Preview},
    parts::Parts,
    wal::Step as Write,
};

/// Why a write to the `-wal` file did not take place.
#[derive(Debug)]
pub(super) enum Stop {
    /// The file below returned this code.
    File(Code),
    /// This host has no space for it.
    Full,
    /// The gate refused it; [`Gate::last_refusal`] has the reason.
    Gate,
}

impl From<Code> for Stop {
    fn from(code: Code) -> Self {
        Self::File(code)
    }
}

/// The database after one committed transaction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    /// Last frame of the transaction in the WAL; 0 if the WAL has no frames.
    pub frame: u32,
    /// Raft index of the transaction.
    pub index: u64,
    /// Size of the database, in pages.
    pub pages: u32,
    /// Checksum of the database.
    pub checksum: u64,
}

/// Called with how many pages of a long transaction the cluster has taken so far, and with how many there are in all.
pub type Sent = Box<dyn Fn(u32, u32) + Send>;

struct Writer {
    capture: Capture,
    table: PageTable,
    transaction: u64,
    /// What the frames of a transaction have taken, while that is measured.
    frames: Sum,
}

struct Marks {
    /// The last transaction that a majority has.
    committed: Mark,
    /// The last transaction that SQLite's other connections see, and that a checkpoint therefore sees, too.
    visible: Mark,
    /// While a checkpoint runs: the transactions that it may have reached, oldest first.
    recording: Option<Vec<Mark>>,
}

/// What a gate is made of.
pub(super) struct GateConfig {
    pub path: PathBuf,
    pub database: u32,
    pub epoch: u64,
    pub replicator: Arc<dyn Replicator>,
    pub table: PageTable,
    pub index: u64,
    /// Where SQLite's locks lie in a database file, in bytes.
    pub lock_byte: u32,
    pub file: Arc<File>,
}

/// The gate of one promotion, which every transaction of the primary passes.
pub struct Gate {
    path: PathBuf,
    database: u32,
    epoch: u64,
    page_size: u32,
    /// The page that is never written, because SQLite's locks lie there: all zeros on every member.
    lock_page: u32,
    replicator: Arc<dyn Replicator>,
    fenced: AtomicBool,
    /// A checkpoint that restarts the WAL is running: no other connection may begin to write.
    restarting: AtomicBool,
    last_index: AtomicU64,
    refusal: Mutex<Option<String>>,
    sent: Mutex<Option<Sent>>,
    open: Mutex<usize>,
    closed: Condvar,
    writer: Mutex<Writer>,
    marks: Mutex<Marks>,
    /// Kept open as long as SQLite's own descriptors: closing any descriptor of the file drops SQLite's POSIX locks on
    /// it.
    _file: Arc<File>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("path", &self.path).field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

impl Gate {
    pub(super) fn new(config: GateConfig) -> Self {
        let mark =
            Mark { frame: 0, index: config.index, pages: config.table.pages(), checksum: config.table.checksum() };
        let page_size = config.table.page_size();
        // Far from the largest number, so that counting never wraps around; different in each promotion.
        let transaction = rand::random::<u64>() >> 1;
        Self {
            path: config.path,
            database: config.database,
            epoch: config.epoch,
            page_size,
            lock_page: config.lock_byte / page_size + 1,
            replicator: config.replicator,
            fenced: AtomicBool::new(false),
            restarting: AtomicBool::new(false),
            last_index: AtomicU64::new(config.index),
            refusal: Mutex::new(None),
            sent: Mutex::new(None),
            open: Mutex::new(0),
            closed: Condvar::new(),
            writer: Mutex::new(Writer {
                capture: Capture::new(page_size),
                table: config.table,
                transaction,
                frames: Sum::default(),
            }),
            marks: Mutex::new(Marks { committed: mark, visible: mark, recording: None }),
            _file: config.file,
        }
    }

    /// The database file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The epoch that this gate serves.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Page size of the database, in bytes.
    pub fn page_size(&self) -> u32 {
        self.page_size
    }

    /// Lets no further write of this promotion pass. Can be called by any thread at any time, and never blocks. A
    /// commit that waits for a majority gets its answer from the replicator.
    pub fn fence(&self) {
        self.fenced.store(true, Ordering::SeqCst);
    }

    /// True after [`Gate::fence`], and after the gate has fenced itself, because an outcome is unknown or a local file
    /// failed after the cluster had committed. The node must give up its role then.
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::SeqCst)
    }

    /// Sets the function that is called after each part of a long transaction from now on.
    pub fn tell_sent(&self, sent: Option<Sent>) {
        *lock(&self.sent) = sent;
    }

    /// Why a write was last refused, in a sentence. SQLite's own error says only `disk I/O error`.
    pub fn last_refusal(&self) -> Option<String> {
        lock(&self.refusal).clone()
    }

    /// Raft index of the last transaction that passed.
    pub fn last_index(&self) -> u64 {
        self.last_index.load(Ordering::SeqCst)
    }

    /// True if the transaction at this index is the last one, none is under way, and no outcome is unknown. Later
    /// entries of the raft log do not concern this database then. Never waits.
    pub(super) fn rests_at(&self, index: u64) -> bool {
        let Ok(_writer) = self.writer.try_lock() else { return false };
        !self.is_fenced() && self.last_index() == index
    }

    /// Checksum of the database after the last transaction that passed.
    pub fn checksum(&self) -> u64 {
        lock(&self.marks).committed.checksum
    }

    /// Bytes of the `-wal` file up to the end of the last transaction that passed. The file can be longer.
    pub fn wal_bytes(&self) -> u64 {
        wal_bytes(self.page_size, lock(&self.marks).committed.frame)
    }

    /// True while a checkpoint wants SQLite's write lock for itself: writers must try again later.
    pub(super) fn is_restarting(&self) -> bool {
        self.restarting.load(Ordering::SeqCst)
    }

    /// The number of connections that have the database open.
    pub fn open_connections(&self) -> usize {
        *lock(&self.open)
    }

    /// Waits until no connection has the database open. Returns false if some still have it at the deadline.
    pub fn wait_closed(&self, deadline: Instant) -> bool {
        let mut open = lock(&self.open);
        while *open > 0 {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            open = self.closed.wait_timeout(open, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Counts a connection that is about to open the database file. Returns false once the gate is fenced: nothing may
    /// be opened.
    pub(super) fn opened(&self) -> bool {
        let mut open = lock(&self.open);
        if self.is_fenced() {
            return false;
        }
        *open += 1;
        true
    }

    /// Counts down for a connection that has closed the database file.
    pub(super) fn closed(&self) {
        let mut open = lock(&self.open);
        *open = open.checked_sub(1).expect("every close follows an open");
        if *open == 0 {
            self.closed.notify_all();
        }
    }

    /// Called before a checkpoint copies pages of the `-wal` into the database file. True if this host's raft log has
    /// them all on disk.
    pub(super) fn may_copy(&self) -> bool {
        let result = self.replicator.make_durable();
        if let Err(error) = &result {
            self.refuse(format!("this host's raft log could not be made durable before a checkpoint: {error}"));
        }
        result.is_ok()
    }

    /// Notes why something is refused. Whoever called SQLite gets an error and reports it, so this does not.
    pub(super) fn refuse(&self, reason: String) -> Stop {
        tracing::debug!(epoch = self.epoch, "database write refused: {reason}");
        *lock(&self.refusal) = Some(reason);
        Stop::Gate
    }

    fn fence_because(&self, reason: String) -> Stop {
        self.fence();
        tracing::warn!(epoch = self.epoch, "database fenced: {reason}");
        *lock(&self.refusal) = Some(reason);
        Stop::Gate
    }

    /// Handles one write of SQLite to the `-wal` file.
    pub(super) fn wal_write(&self, file: &mut dyn WalFile, offset: u64, bytes: &[u8]) -> Result<(), Stop> {
        let mut writer = lock(&self.writer);
        let step = writer.capture.note(offset, bytes).map_err(|violation| self.refuse(violation.to_string()))?;
        if self.is_fenced() && !writer.capture.is_settled() {
            return Err(self.refuse("this node is no longer the primary of its epoch".into()));
        }
        match step {
            Write::Hold => Ok(()),
            Write::Commit => self.commit(&mut writer, file, bytes),
            // Settled: SQLite rewrites the checksums of frames of the transaction just committed.
            Write::Pass if writer.capture.is_settled() => {
                file.write_at(offset, bytes).map_err(|code| self.broken(code))
            }
            Write::Pass => {
                let begun = steps::begin();
                file.write_at(offset, bytes)?;
                writer.frames.add(begun);
                Ok(())
            }
            Write::Restart => {
                file.write_at(offset, bytes)?;
                let mut marks = lock(&self.marks);
                marks.committed.frame = 0;
                marks.visible.frame = 0;
                let mark = marks.committed;
                // Recorded once: transactions that roll back can restart the same empty WAL again and again.
                marks.record_unless(mark, |last| last.frame == 0);
                Ok(())
            }
        }
    }

    fn commit(&self, writer: &mut Writer, file: &mut dyn WalFile, data: &[u8]) -> Result<(), Stop> {
        let whole = steps::begin();
        let captured = writer.capture.complete(file, data)?;
        writer.frames.add(whole);
        writer.frames.end(Step::CommitFrames);
        let (index, preview) = self.replicate(writer, file, &captured, data)?;
        self.last_index.store(index, Ordering::SeqCst);
        {
            let mark = Mark { frame: captured.frame(), index, pages: preview.pages, checksum: preview.checksum };
            let mut marks = lock(&self.marks);
            marks.committed = mark;
            marks.record_unless(mark, |_| false);
        }
        writer.table.accept(preview);
        let begun = steps::begin();
        writer.capture.commit(&captured, file).map_err(|code| self.broken(code))?;
        begun.end(Step::CommitHeader);
        whole.end(Step::CommitGate);
        Ok(())
    }

    /// A majority has the transaction, but SQLite's files here do not. Never returns the file's own code: a full disk
    /// must not look as if the transaction had not been made.
    fn broken(&self, code: Code) -> Stop {
        self.fence_because(format!("a committed transaction could not be written to the -wal file (code {code})"))
    }

    /// Hands all parts to the replicator and waits for the last one.
    fn replicate(
        &self,
        writer: &mut Writer,
        file: &mut dyn WalFile,
        captured: &Captured,
        data: &[u8],
    ) -> Result<(u64, Preview), Stop> {
        let mut begun = steps::begin();
        let transaction = writer.transaction;
        writer.transaction += 1;
        let mut parts = Parts::new(self.database, transaction, self.page_size, captured.count());
        writer.capture.pages(captured, file, data, |number, image| {
            let done = parts.count();
            if let Some(full) = parts.push(number, image) {
                self.propose(full, false)?;
                if let Some(sent) = &*lock(&self.sent) {
                    sent(done as u32, captured.count() as u32);
                }
            }
            Ok::<_, Stop>(())
        })?;
        let preview = parts.preview(&writer.table, captured.database_pages());
        if let Some(hole) = preview.holes.iter().find(|number| **number != self.lock_page) {
            return Err(self.refuse(format!("the database would grow over page {hole} without writing it")));
        }
        begun.next(Step::CommitCapture);
        let part = parts.finish(&preview);
        begun.end(Step::CommitEncode);
        let index = self.propose(part, true)?;
        Ok((index, preview))
    }

    fn propose(&self, part: Vec<u8>, last: bool) -> Result<u64, Stop> {
        if self.is_fenced() {
            return Err(self.refuse("this node is no longer the primary of its epoch".into()));
        }
        self.replicator.replicate(part, last).map_err(|error| match error {
            ReplicateError::Refused(_) => self.refuse(error.to_string()),
            ReplicateError::Full(_) => {
                self.refuse(error.to_string());
                Stop::Full
            }
            ReplicateError::Unknown(_) => self.fence_because(error.to_string()),
        })
    }

    /// Called before SQLite releases its WAL write lock. `frames` is the number of valid frames in its wal-index.
    pub(super) fn write_lock_released(&self, frames: Option<u32>) {
        let mut writer = lock(&self.writer);
        if writer.capture.is_settled() {
            let mut marks = lock(&self.marks);
            if frames == Some(marks.committed.frame) {
                marks.visible = marks.committed;
            } else {
                // Something failed between the last write and the update of the wal-index. SQLite has reported an error
                // and rolled back what the cluster has committed, so its view is wrong from here on.
                drop(marks);
                self.fence_because("SQLite did not finish a transaction that the cluster has committed".into());
            }
        }
        writer.capture.end();
        writer.frames = Sum::default();
    }

    /// Called when a checkpoint begins: notes what it can reach. With `restart`, nobody else may begin to write until
    /// it ends.
    pub(super) fn begin_checkpoint(&self, restart: bool) {
        self.restarting.store(restart, Ordering::SeqCst);
        let mut marks = lock(&self.marks);
        let (visible, committed) = (marks.visible, marks.committed);
        // The committed one is about to become visible: SQLite may have updated its wal-index already.
        marks.recording = Some(if visible.index == committed.index { vec![visible] } else { vec![visible, committed] });
    }

    /// Called when a checkpoint has ended. `frames` is the number of frames that it has copied, if those were all that
    /// it saw. Returns the transaction that the first [`Mark::pages`] pages of the database file hold now, if that is
    /// certain.
    pub(super) fn end_checkpoint(&self, frames: Option<u32>) -> Option<Mark> {
        self.restarting.store(false, Ordering::SeqCst);
        let recording = lock(&self.marks).recording.take()?;
        let frames = frames?;
        let mut matching = recording.iter().filter(|mark| mark.frame == frames);
        match (matching.next(), matching.next()) {
            (Some(mark), None) => Some(*mark),
            // The WAL has restarted meanwhile and has grown to the same length: it may be either transaction.
            (Some(_), Some(_)) => None,
            // A WAL without frames whose new header is not written yet: everything visible is in the file.
            (None, _) => (frames == 0).then(|| recording[0]),
        }
    }
}

impl Marks {
    fn record_unless(&mut self, mark: Mark, known: impl Fn(&Mark) -> bool) {
        if let Some(recording) = &mut self.recording
            && !recording.last().is_some_and(known)
        {
            recording.push(mark);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::capture::FULL;

    const PAGE: usize = 512;

    /// A disk whose chosen write fails.
    struct Disk {
        writes: usize,
        fails_at: usize,
    }

    impl WalFile for Disk {
        fn read_at(&mut self, _offset: u64, bytes: &mut [u8]) -> Result<(), Code> {
            bytes.fill(0);
            Ok(())
        }

        fn write_at(&mut self, _offset: u64, _bytes: &[u8]) -> Result<(), Code> {
            self.writes += 1;
            if self.writes == self.fails_at { Err(FULL) } else { Ok(()) }
        }
    }

    struct Count(AtomicU64);

    impl Replicator for Count {
        fn replicate(&self, _part: Vec<u8>, _last: bool) -> Result<u64, ReplicateError> {
            Ok(self.0.fetch_add(1, Ordering::SeqCst) + 1)
        }
    }

    fn gate() -> (Gate, Arc<Count>) {
        let count = Arc::new(Count(AtomicU64::new(0)));
        let replicator = Arc::<Count>::clone(&count);
        let (path, file) = (PathBuf::from("/nowhere"), Arc::new(tempfile::tempfile().unwrap()));
        let table = PageTable::empty(PAGE as u32);
        (
            Gate::new(GateConfig {
                path,
                database: 1,
                epoch: 1,
                replicator,
                table,
                index: 0,
                lock_byte: 1 << 30,
                file,
            }),
            count,
        )
    }

    /// A whole transaction of one page: the WAL's header, the frame's header, its data.
    fn transaction(gate: &Gate, disk: &mut Disk) -> Result<(), Stop> {
        transaction_of(gate, disk, 1, 1)
    }

    fn transaction_of(gate: &Gate, disk: &mut Disk, page: u8, pages: u8) -> Result<(), Stop> {
        let mut header = [0; 32];
        header[..4].copy_from_slice(&0x377f_0682u32.to_be_bytes());
        header[8..12].copy_from_slice(&(PAGE as u32).to_be_bytes());
        gate.wal_write(disk, 0, &header)?;
        let mut frame = [0; 24];
        frame[3] = page;
        frame[7] = pages;
        gate.wal_write(disk, 32, &frame)?;
        gate.wal_write(disk, 56, &[5; PAGE])
    }

    #[test]
    fn a_full_disk_before_the_majority_refuses() {
        let (gate, count) = gate();
        let result = transaction(&gate, &mut Disk { writes: 0, fails_at: 2 });
        assert!(matches!(result, Err(Stop::File(FULL))));
        gate.write_lock_released(Some(0));
        assert_eq!(count.0.load(Ordering::SeqCst), 0, "nothing was proposed");
        assert!(!gate.is_fenced());
        transaction(&gate, &mut Disk { writes: 0, fails_at: 99 }).unwrap();
        gate.write_lock_released(Some(1));
        assert!(!gate.is_fenced());
    }

    #[test]
    fn a_failure_after_the_majority_fences() {
        let (gate, count) = gate();
        let result = transaction(&gate, &mut Disk { writes: 0, fails_at: 3 });
        // Not the disk's own code: a majority has the transaction, whatever this host's files say.
        assert!(matches!(result, Err(Stop::Gate)));
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert!(gate.is_fenced());
    }

    #[test]
    fn a_commit_that_sqlite_does_not_take_over_fences() {
        let (gate, _) = gate();
        transaction(&gate, &mut Disk { writes: 0, fails_at: 99 }).unwrap();
        assert!(!gate.is_fenced());
        gate.write_lock_released(Some(0));
        assert!(gate.is_fenced());
    }

    #[test]
    fn a_checkpoint_that_fits_two_transactions_names_none() {
        let (gate, _) = gate();
        let mut disk = Disk { writes: 0, fails_at: 99 };
        gate.begin_checkpoint(false);
        for _ in 0..2 {
            // Each begins with a new header of the WAL.
            transaction(&gate, &mut disk).unwrap();
            gate.write_lock_released(Some(1));
        }
        assert!(gate.end_checkpoint(Some(1)).is_none());
        gate.begin_checkpoint(false);
        assert_eq!(gate.end_checkpoint(Some(1)).unwrap().index, 2);
    }

    #[test]
    fn it_rests_only_at_its_last_transaction_and_never_in_doubt() {
        let (gate, _) = gate();
        assert!(gate.rests_at(0));
        transaction(&gate, &mut Disk { writes: 0, fails_at: 99 }).unwrap();
        assert!(gate.rests_at(1) && !gate.rests_at(0));
        let writer = lock(&gate.writer);
        assert!(!gate.rests_at(1), "somebody writes");
        drop(writer);
        gate.fence();
        assert!(!gate.rests_at(1), "what was on its way may be committed later");
    }

    #[test]
    fn growth_over_an_unwritten_page_is_refused() {
        let (gate, count) = gate();
        let mut disk = Disk { writes: 0, fails_at: 99 };
        assert!(matches!(transaction_of(&gate, &mut disk, 3, 3), Err(Stop::Gate)));
        assert!(gate.last_refusal().unwrap().contains("page 1 without writing"));
        gate.write_lock_released(Some(0));
        assert_eq!(count.0.load(Ordering::SeqCst), 0);
        assert!(!gate.is_fenced());
    }
}
