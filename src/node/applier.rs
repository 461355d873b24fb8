//! The loop's side of the database thread, which brings the database in line with what the consensus loop wants of it.
//! Level-triggered: the loop sets a goal, the thread (`worker`) compares it with where it is. The loop never touches the disk
//! for the database, and must never wait for the thread but at the end.

mod copies;
mod saver;
mod worker;

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

pub(super) use copies::Copies;
use copies::CopyRequest;
use worker::Worker;

use crate::storage::{database::Database, raft_log::RaftLog};

use super::{inbox::Sender, lease::boottime, snapshots::Reply};

/// A part of a long transaction is a MiB, as many times larger than most entries.
const PART_WEIGHT: u64 = 16;

/// What the loop wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Goal {
    /// Apply the raft log up to here.
    applied: u64,
    /// Be open for writing in this epoch.
    epoch: Option<u64>,
    /// How many times this node was demoted.
    demotion: u64,
    /// No other member needs the raft log up to here.
    released: u64,
    /// How often a snapshot was asked for.
    snapshots: u64,
    /// How often something was asked about a copy.
    copies: u64,
    /// How often a scrub has read something.
    scrubbed: u64,
    /// How often a checkpoint was saved or the raft log compacted.
    saved: u64,
    /// The disk is full.
    full: bool,
    /// No checkpoint: what is in force since the last one is not in its file yet.
    pinned: bool,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    goal: Mutex<Goal>,
    changed: Condvar,
    /// Who waits for a snapshot.
    snapshots: Mutex<Vec<Reply>>,
    /// Who waits for a copy, or for its end. One backup at a time asks, so this stays short.
    copies: Mutex<Vec<CopyRequest>>,
    applied: AtomicU64,
    /// Bytes ever appended to the raft log by this process.
    appended: AtomicU64,
    /// Parts of the transaction that is being written just now, all of them at once.
    finishing: AtomicU64,
    /// Since when the database has something that its checkpoint lacks, on the clock of [`boottime`]; 0: it has nothing.
    unsaved: AtomicU64,
    /// Bytes of the database.
    bytes: AtomicU64,
}

/// The loop's side of the database thread.
pub(super) struct Applier {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// When a checkpoint is due.
#[derive(Clone, Copy, Debug)]
pub struct CheckpointPolicy {
    /// Bytes appended to the raft log since the last one, or length of SQLite's `-wal` file.
    pub bytes: u64,
    pub interval: Duration,
    /// Bytes of the raft log on disk beyond which nothing is kept for members that are away.
    pub raft_log_limit: u64,
    /// From the end of one scrub of the database file to the next; zero: never.
    pub scrub: Duration,
}

impl Applier {
    pub fn start(
        database: Database,
        log: RaftLog,
        sender: Sender,
        deadline: Duration,
        checkpoints: CheckpointPolicy,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        shared.applied.store(database.applied(), Ordering::Relaxed);
        let worker = Worker::new(database, log, sender, Arc::clone(&shared), deadline, checkpoints)?;
        let thread = thread::Builder::new().name("database".to_owned()).spawn(move || worker.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Where copies are asked for.
    pub fn copies(&self) -> Copies {
        Copies(Arc::clone(&self.shared))
    }

    /// The raft index up to which the database has everything.
    pub fn applied(&self) -> u64 {
        self.shared.applied.load(Ordering::Relaxed)
    }

    /// Everything up to here may be applied. The thread is woken by the next [`Applier::nudge`], promotion or demotion: a
    /// wake-up for each commit would take the processor from the commit behind it.
    pub fn apply(&self, index: u64) {
        let mut goal = lock(&self.shared);
        goal.applied = goal.applied.max(index);
    }

    /// No other member needs the raft log up to here; it is compacted after the next checkpoint.
    pub fn release(&self, index: u64) {
        lock(&self.shared).released = index;
    }

    /// How large the database is, in bytes, and for how long its checkpoint has lacked something.
    pub fn figures(&self) -> (u64, Duration) {
        let unsaved = self.shared.unsaved.load(Ordering::Relaxed);
        let age = if unsaved == 0 { 0 } else { boottime().saturating_sub(unsaved) };
        (self.shared.bytes.load(Ordering::Relaxed), Duration::from_nanos(age))
    }

    /// The disk is full, or is not any more: nothing is kept for members that are away then.
    pub fn full(&self, full: bool) {
        self.change(|goal| goal.full = full);
    }

    /// Allows no checkpoint, or allows it again. To be called before whatever the checkpoint must not pass is applied.
    pub fn pin(&self, pinned: bool) {
        self.change(|goal| goal.pinned = pinned);
    }

    /// Entries that may be applied and are not yet.
    pub fn lag(&self) -> u64 {
        lock(&self.shared).applied.saturating_sub(self.applied())
    }

    /// Entries that have to be written yet before another node could begin here: those of [`Self::lag`], and the parts of a long
    /// transaction, which count as applied until its last part has them written at once.
    pub fn burden(&self) -> u64 {
        self.lag() + PART_WEIGHT * self.shared.finishing.load(Ordering::Relaxed)
    }

    /// Once per tick: lets the thread catch up.
    pub fn nudge(&self) {
        if self.lag() > 0 {
            self.shared.changed.notify_one();
        }
    }

    /// Tells how much the raft log grew: a checkpoint becomes due by it.
    pub fn appended(&self, bytes: usize) {
        self.shared.appended.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn promote(&self, epoch: u64) {
        self.change(|goal| goal.epoch = Some(epoch));
    }

    /// Close the database; answered by [`DatabaseEvent::Demoted`] with the number returned here.
    pub fn demote(&self) -> u64 {
        self.change(|goal| {
            goal.epoch = None;
            goal.demotion += 1;
        })
        .demotion
    }

    /// Lets the database file rest for a snapshot; answered by [`DatabaseEvent::Resting`].
    pub fn rest(&self, reply: Reply) {
        self.shared.snapshots.lock().unwrap_or_else(PoisonError::into_inner).push(reply);
        self.change(|goal| goal.snapshots += 1);
    }

    /// Ends the thread after a last checkpoint.
    pub fn stop(&mut self) {
        self.change(|goal| goal.stop = true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    fn change(&self, change: impl FnOnce(&mut Goal)) -> Goal {
        let mut goal = lock(&self.shared);
        let before = *goal;
        change(&mut goal);
        if *goal != before {
            self.shared.changed.notify_one();
        }
        *goal
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, Goal> {
    // A panic aborts the process, so a poisoned lock cannot be seen; its content would be sound in any case.
    shared.goal.lock().unwrap_or_else(PoisonError::into_inner)
}
