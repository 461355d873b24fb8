//! Watches over the files of the data folder. Every operation on them registers here while it runs, and reports how it
//! ended. Anybody can ask what hangs, what was slow and what failed, without touching a file. There is one watch for
//! the process, which has one data folder. Must never wait, and never decide: roles are not its business.

mod clock;

use std::{
    cell::Cell,
    fmt, io,
    sync::{
        Mutex,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use nix::{
    errno::Errno,
    time::{ClockId, clock_gettime},
};

use self::clock::Clock;
use crate::mutex::locked;

pub use self::clock::STEP;

/// Operations that are watched at once: more than there are threads that do any.
const SLOTS: usize = 128;
/// An operation that takes at least this long is noted as slow.
pub const SLOW: Duration = Duration::from_millis(300);

/// The files of the data folder, as people know them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Place {
    RaftLog,
    Wal,
    WalIndex,
    Database,
    Checkpoint,
    Membership,
    /// One of the small files that are replaced as a whole.
    Small,
    /// The file system itself.
    Folder,
}

/// What is done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Act {
    Open,
    Read,
    Write,
    Sync,
    Resize,
    Rename,
    Remove,
    Look,
}

const PLACES: [Place; 8] = [
    Place::RaftLog,
    Place::Wal,
    Place::WalIndex,
    Place::Database,
    Place::Checkpoint,
    Place::Membership,
    Place::Small,
    Place::Folder,
];
const ACTS: [Act; 8] = [Act::Open, Act::Read, Act::Write, Act::Sync, Act::Resize, Act::Rename, Act::Remove, Act::Look];

/// One kind of operation, shown as a verb and a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    pub place: Place,
    pub act: Act,
}

impl Operation {
    /// Which of two kinds this is: 0 for what a transaction waits for, 1 for a sync of the database file, which may
    /// have much to write and which nobody waits for. They must not hide each other.
    fn kind(self) -> usize {
        usize::from(matches!(self, Self { place: Place::Database, act: Act::Sync }))
    }

    fn code(self) -> u32 {
        (self.place as u32) << 8 | self.act as u32
    }

    fn of(code: u32) -> Self {
        let at = |index: u32, length: usize| (index as usize).min(length - 1);
        Self { place: PLACES[at(code >> 8, PLACES.len())], act: ACTS[at(code & 0xff, ACTS.len())] }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.act {
            Act::Open => "open",
            Act::Read => "read",
            Act::Write => "write",
            Act::Sync => "sync",
            Act::Resize => "resize",
            Act::Rename => "rename",
            Act::Remove => "remove",
            Act::Look => "look at",
        };
        let file = match self.place {
            Place::RaftLog => "a file in raft-log",
            Place::Wal => "database/console.db-wal",
            Place::WalIndex => "database/console.db-shm",
            Place::Database => "database/console.db",
            Place::Checkpoint => "database/console.checkpoint",
            Place::Membership => "membership.json",
            Place::Small => "a small file",
            Place::Folder => "the data folder",
        };
        write!(f, "{verb} {file}")
    }
}

/// An operation that took long, or is taking long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slow {
    pub operation: Operation,
    pub took: Duration,
    /// Time since its end; zero while it runs.
    pub ago: Duration,
}

/// An operation that failed, though not for lack of space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    pub operation: Operation,
    /// The kernel's error number; 0 if it is not known.
    pub errno: i32,
    pub ago: Duration,
}

/// What the watch knows at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The oldest running operation: of those that transactions wait for, and of syncs of the database file.
    pub running: [Option<Slow>; 2],
    /// The last operation that was [`SLOW`], in the same order.
    pub slow: [Option<Slow>; 2],
    /// The last operation that failed.
    pub failed: Option<Failure>,
    /// How many have failed, and how many were refused for lack of space.
    pub failures: u64,
    pub refused: u64,
}

/// In a cache line of its own: each is written to at every operation, mostly by one thread.
#[repr(align(64))]
struct Slot {
    /// When its operation began; 0 if the slot is free.
    since: AtomicU64,
    operation: AtomicU32,
}

struct Watch {
    clock: Clock,
    slots: [Slot; SLOTS],
    /// Operation, duration and end of the last slow one of each kind.
    slow: Mutex<[Option<(Operation, u64, u64)>; 2]>,
    /// Operation, error and moment of the last failure.
    failed: Mutex<Option<(Operation, i32, u64)>>,
    failures: AtomicU64,
    refused: AtomicU64,
}

static WATCH: Watch = Watch {
    clock: Clock::new(),
    slots: [const { Slot { since: AtomicU64::new(0), operation: AtomicU32::new(0) } }; SLOTS],
    slow: Mutex::new([None; 2]),
    failed: Mutex::new(None),
    failures: AtomicU64::new(0),
    refused: AtomicU64::new(0),
};

/// Nanoseconds by the kernel's monotonic clock, which stops while the host sleeps. As of its last tick, 10 ms ago at
/// most: this is asked twice for each page that SQLite reads.
fn monotonic() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).expect("every kernel has this clock");
    (time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64).max(1)
}

/// Nanoseconds for which this process has been running.
fn now() -> u64 {
    WATCH.clock.at(monotonic())
}

/// Notes that this process is running. A thread that never waits for the disk calls this every [`STEP`], until it calls
/// [`rest`].
pub fn tick() {
    WATCH.clock.tick(monotonic());
}

/// Notes that nobody calls [`tick`] from now on.
pub fn rest() {
    WATCH.clock.rest();
}

/// The slot that this thread tries first, so that threads do not get in each other's way.
fn home() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static HOME: Cell<usize> = Cell::new(NEXT.fetch_add(1, Ordering::Relaxed) % SLOTS));
    HOME.with(Cell::get)
}

/// A running operation: it ends when this is dropped.
pub(super) struct Running {
    slot: Option<usize>,
    operation: Operation,
    since: u64,
}

/// Notes that an operation begins.
pub(super) fn begin(place: Place, act: Act) -> Running {
    let (operation, since) = (Operation { place, act }, now());
    let home = home();
    let free = |at: &usize| {
        let slot = &WATCH.slots[*at];
        slot.since.compare_exchange(0, since, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    };
    // Without a slot, only how long it took is noted, at its end: so many others hang that this one says nothing new.
    let slot = (0..SLOTS).map(|step| (home + step) % SLOTS).find(free);
    if let Some(slot) = slot {
        WATCH.slots[slot].operation.store(operation.code(), Ordering::Release);
    }
    Running { slot, operation, since }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            WATCH.slots[slot].since.store(0, Ordering::Release);
        }
        let end = now();
        let took = end.saturating_sub(self.since);
        if took >= SLOW.as_nanos() as u64 {
            locked(&WATCH.slow)[self.operation.kind()] = Some((self.operation, took, end));
        }
    }
}

/// Runs an operation under the watch.
///
/// # Errors
/// The error of the operation.
pub fn run<T>(place: Place, act: Act, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let running = begin(place, act);
    let result = work();
    drop(running);
    if let Err(error) = &result {
        note(Operation { place, act }, error.raw_os_error().unwrap_or(0), error.kind());
    }
    result
}

/// Notes that an operation has failed with this error of the kernel.
pub(super) fn failed(place: Place, act: Act, errno: i32) {
    note(Operation { place, act }, errno, io::Error::from_raw_os_error(errno).kind());
}

/// Notes that an operation was refused for lack of space.
pub(super) fn refused() {
    WATCH.refused.fetch_add(1, Ordering::Relaxed);
}

fn note(operation: Operation, errno: i32, kind: io::ErrorKind) {
    use io::ErrorKind::{Interrupted, InvalidData, NotFound, QuotaExceeded, StorageFull, UnexpectedEof, WouldBlock};
    match kind {
        StorageFull | QuotaExceeded => return refused(),
        // What is missing, or not what was expected, is no failure of the disk.
        NotFound | UnexpectedEof | InvalidData | Interrupted | WouldBlock => return,
        _ => {}
    }
    // Nor is a lack of descriptors, or a mode that forbids something.
    if matches!(Errno::from_raw(errno), Errno::EMFILE | Errno::ENFILE | Errno::EACCES | Errno::EPERM | Errno::EEXIST) {
        return;
    }
    *locked(&WATCH.failed) = Some((operation, errno, now()));
    WATCH.failures.fetch_add(1, Ordering::Relaxed);
}

/// What is known now.
pub fn observed() -> Observed {
    let now = now();
    let since = |at: u64| Duration::from_nanos(now.saturating_sub(at));
    let running = WATCH.slots.iter().filter_map(|slot| {
        let began = slot.since.load(Ordering::Acquire);
        (began > 0).then(|| (began, Operation::of(slot.operation.load(Ordering::Acquire))))
    });
    let mut oldest: [Option<(u64, Operation)>; 2] = [None; 2];
    for (began, operation) in running {
        let oldest = &mut oldest[operation.kind()];
        if oldest.is_none_or(|(before, _)| began < before) {
            *oldest = Some((began, operation));
        }
    }
    let slow = *locked(&WATCH.slow);
    let failed = *locked(&WATCH.failed);
    Observed {
        running: oldest
            .map(|oldest| oldest.map(|(began, operation)| Slow { operation, took: since(began), ago: Duration::ZERO })),
        slow: slow.map(|slow| {
            let told = |(operation, took, end)| Slow { operation, took: Duration::from_nanos(took), ago: since(end) };
            slow.map(told)
        }),
        failed: failed.map(|(operation, errno, at)| Failure { operation, errno, ago: since(at) }),
        failures: WATCH.failures.load(Ordering::Relaxed),
        refused: WATCH.refused.load(Ordering::Relaxed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_and_what_failed_is_seen_and_what_is_usual_is_not() {
        for (place, act) in PLACES.into_iter().zip(ACTS) {
            let operation = Operation { place, act };
            assert_eq!(Operation::of(operation.code()), operation);
        }
        let hangs = begin(Place::Wal, Act::Write);
        let oldest = observed().running[0].expect("it runs");
        assert!(oldest.took < Duration::from_secs(60));
        let flush = begin(Place::Database, Act::Sync);
        let [write, sync] = observed().running.map(|running| running.expect("both are seen").operation);
        assert!(write != sync && sync == flush.operation);
        drop((hangs, flush));
        let error = |errno: Errno| io::Error::from_raw_os_error(errno as i32);
        for usual in [Errno::ENOENT, Errno::EMFILE, Errno::EINTR, Errno::ENOSPC] {
            let before = observed();
            run(Place::Folder, Act::Look, || Err::<(), _>(error(usual))).unwrap_err();
            assert!(observed().failed.is_none_or(|failed| failed.errno != usual as i32));
            assert!(observed().refused > before.refused || usual != Errno::ENOSPC);
        }
        run(Place::Folder, Act::Look, || Err::<(), _>(error(Errno::EUCLEAN))).unwrap_err();
        let failed = observed().failed.expect("a failure");
        assert_eq!((failed.errno, failed.operation.to_string()), (117, "look at the data folder".to_owned()));
        *locked(&WATCH.failed) = None; // other tests of this process must not find it
    }
}
