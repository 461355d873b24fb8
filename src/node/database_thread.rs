//! The loop's side of the database thread, which brings the databases in line with what the consensus loop wants of
//! them. Level-triggered: the loop sets a goal, the thread compares it with where it is, and takes the next step
//! (`next`). What others ask of the thread, and what its helpers answer, waits in one mailbox. The loop never touches
//! the disk for the database, and must never wait for the thread but at the end.

mod checkpoints;
mod next;
mod online_copies;
mod saver;
mod scrub;
mod thread;

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use next::Mail;
use online_copies::CopyRequest;
pub(super) use online_copies::OnlineCopies;
use thread::Thread;

use crate::{
    mutex::locked,
    storage::{databases::Databases, raft_log::RaftLog},
};

use super::{
    inbox::{Sender, SnapshotError, SnapshotRequest},
    lease::boottime,
};

/// A part of a long transaction is a MiB, as many times larger than most entries.
const PART_WEIGHT: u64 = 16;
/// Requests of one kind that may wait: as many members as ask for the database at once, and one backup, are far less.
const MAILBOX: usize = 16;

/// What the loop wants. Levels only: whoever looks late misses nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Goal {
    /// Apply the raft log up to here.
    applied: u64,
    /// Be open for writing in this epoch.
    epoch: Option<u64>,
    /// Everything of the demotions up to this one is to be closed.
    demotion: u64,
    /// No other member needs the raft log up to here.
    released: u64,
    /// The disk is full.
    full: bool,
    /// No checkpoint: what is in force since the last one is not in its file yet.
    pinned: bool,
    stop: bool,
}

/// What waits for the thread. The helpers do one thing at a time, so that each has one answer at most.
#[derive(Default)]
struct Mailbox {
    /// Who waits for a snapshot.
    snapshots: VecDeque<SnapshotRequest>,
    /// Who waits for a copy, or for its end.
    copies: VecDeque<CopyRequest>,
    saved: Option<saver::Outcome>,
    read: Option<scrub::Answer>,
}

impl Mailbox {
    fn mail(&self) -> Mail {
        Mail {
            snapshot: !self.snapshots.is_empty(),
            copy: !self.copies.is_empty(),
            saved: self.saved.is_some(),
            read: self.read.is_some(),
        }
    }
}

/// What the thread looks at before each step.
#[derive(Default)]
struct State {
    goal: Goal,
    mailbox: Mailbox,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    applied: AtomicU64,
    /// Bytes ever appended to the raft log by this process.
    appended: AtomicU64,
    /// Parts of the transaction that is being written just now, all of them at once.
    finishing: AtomicU64,
    /// Since when the database has something that its checkpoint lacks, on the clock of [`boottime`]; 0: it has
    /// nothing.
    unsaved: AtomicU64,
    /// Bytes of the database.
    bytes: AtomicU64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Puts an answer into the mailbox.
    fn answer(&self, put: impl FnOnce(&mut Mailbox)) {
        put(&mut self.lock().mailbox);
        self.changed.notify_one();
    }
}

/// The loop's side of the database thread.
pub(super) struct Handle {
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

impl Handle {
    pub fn start(
        databases: Databases,
        log: RaftLog,
        sender: Sender,
        deadline: Duration,
        checkpoints: CheckpointPolicy,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        shared.applied.store(databases.applied(), Ordering::Relaxed);
        let thread = Thread::new(databases, log, sender, Arc::clone(&shared), deadline, checkpoints)?;
        let thread = std::thread::Builder::new().name("database".to_owned()).spawn(move || thread.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Where copies are asked for.
    pub fn online_copies(&self) -> OnlineCopies {
        OnlineCopies(Arc::clone(&self.shared))
    }

    /// The raft index up to which all databases have everything.
    pub fn applied(&self) -> u64 {
        self.shared.applied.load(Ordering::Relaxed)
    }

    /// Everything up to here may be applied. The thread is woken by the next [`Handle::nudge`], promotion or demotion:
    /// a wake-up for each commit would take the processor from the commit behind it.
    pub fn apply(&self, index: u64) {
        let goal = &mut self.shared.lock().goal;
        goal.applied = goal.applied.max(index);
    }

    /// No other member needs the raft log up to here; it is compacted after the next checkpoint.
    pub fn release(&self, index: u64) {
        self.shared.lock().goal.released = index;
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
        self.shared.lock().goal.applied.saturating_sub(self.applied())
    }

    /// Entries that have to be written yet before another node could begin here: those of [`Self::lag`], and the parts
    /// of a long transaction, which count as applied until its last part has them written at once.
    pub fn pending_work(&self) -> u64 {
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

    /// Close the database; answered by [`super::inbox::DatabaseEvent::Demoted`] with the number returned here.
    pub fn demote(&self) -> u64 {
        self.change(|goal| {
            goal.epoch = None;
            goal.demotion += 1;
        })
        .demotion
    }

    /// Lets the database file rest for a snapshot; answered by [`super::inbox::DatabaseEvent::Resting`].
    pub fn request_snapshot(&self, request: SnapshotRequest) {
        let waiting = &mut self.shared.lock().mailbox.snapshots;
        if waiting.len() >= MAILBOX {
            return request.refuse(SnapshotError::Busy("too many members ask for the database"));
        }
        waiting.push_back(request);
        self.shared.changed.notify_one();
    }

    /// Ends the thread after a last checkpoint.
    pub fn stop(&mut self) {
        self.change(|goal| goal.stop = true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    fn change(&self, change: impl FnOnce(&mut Goal)) -> Goal {
        let goal = &mut self.shared.lock().goal;
        let before = *goal;
        change(goal);
        if *goal != before {
            self.shared.changed.notify_one();
        }
        *goal
    }
}
