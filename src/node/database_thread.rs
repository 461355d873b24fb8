//! The loop's side of the database thread, which does with the databases what the consensus loop wants.
//! Level-triggered: the loop sets a goal; the thread compares it with where it stands, and takes the next step
//! (`next`). Requests to the thread and answers of its helpers wait in one mailbox. The loop must never touch the disk
//! for a database, nor wait for the thread except at the end.

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

/// A part of a long transaction is a MiB; it counts as so many entries, because most are that much smaller.
const PART_WEIGHT: u64 = 16;
/// Requests of one kind that may wait. All members and a backup together make fewer.
const MAILBOX: usize = 16;

/// What the loop wants. Levels only, so the thread misses nothing if it looks late.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Goal {
    /// Apply the raft log up to here.
    applied: u64,
    /// Be open for writing in this epoch.
    epoch: Option<u64>,
    /// Everything that the demotions up to this one have to close must be closed.
    demotion: u64,
    /// No other member needs the raft log up to this index.
    released: u64,
    /// The disk is full.
    full: bool,
    /// No checkpoint may be made: a membership that came into force since the last one is not in its file yet.
    pinned: bool,
    stop: bool,
}

/// What waits for the thread. Each helper does one thing at a time, so it has one answer at most.
#[derive(Default)]
struct Mailbox {
    /// Requests for a snapshot.
    snapshots: VecDeque<SnapshotRequest>,
    /// Requests to begin or to end a copy.
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

/// What the thread reads before each step.
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
    /// Parts of the long transaction that is being written now; 0 if none is.
    finishing: AtomicU64,
    /// Since when the databases have something that their checkpoints lack, on the clock of [`boottime`]; 0 if they do
    /// not.
    unsaved: AtomicU64,
    /// Size of the database files, in bytes.
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
    /// A checkpoint is due after so many bytes of the raft log, or of SQLite's `-wal` file.
    pub bytes: u64,
    pub interval: Duration,
    /// Bytes of the raft log on disk beyond which no entries are kept for members that are away.
    pub raft_log_limit: u64,
    /// The time from the end of one scrub of the database file to the next; zero for none.
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

    /// For requests to copy the database of a SECONDARY.
    pub fn online_copies(&self) -> OnlineCopies {
        OnlineCopies(Arc::clone(&self.shared))
    }

    /// The raft index up to which all databases have everything.
    pub fn applied(&self) -> u64 {
        self.shared.applied.load(Ordering::Relaxed)
    }

    /// Lets everything up to this index be applied. The thread wakes up at the next [`Handle::nudge`], promotion or
    /// demotion: a wake-up for each commit would take the processor from the next commit.
    pub fn apply(&self, index: u64) {
        let goal = &mut self.shared.lock().goal;
        goal.applied = goal.applied.max(index);
    }

    /// No other member needs the raft log up to this index. It is compacted after the next checkpoint.
    pub fn release(&self, index: u64) {
        self.shared.lock().goal.released = index;
    }

    /// The size of the database files in bytes, and for how long their checkpoints have lacked something.
    pub fn figures(&self) -> (u64, Duration) {
        let unsaved = self.shared.unsaved.load(Ordering::Relaxed);
        let age = if unsaved == 0 { 0 } else { boottime().saturating_sub(unsaved) };
        (self.shared.bytes.load(Ordering::Relaxed), Duration::from_nanos(age))
    }

    /// Sets whether the disk is full. While it is, no entries are kept for members that are away.
    pub fn full(&self, full: bool) {
        self.change(|goal| goal.full = full);
    }

    /// Forbids checkpoints, or allows them again. Call it before applying what a checkpoint must not pass.
    pub fn pin(&self, pinned: bool) {
        self.change(|goal| goal.pinned = pinned);
    }

    /// How many entries may be applied but are not yet.
    pub fn lag(&self) -> u64 {
        self.shared.lock().goal.applied.saturating_sub(self.applied())
    }

    /// How many entries must still be written before this node could serve: those of [`Self::lag`], and the parts of a
    /// long transaction. Those count as applied before they are written, all at once with the last part.
    pub fn pending_work(&self) -> u64 {
        self.lag() + PART_WEIGHT * self.shared.finishing.load(Ordering::Relaxed)
    }

    /// Once per tick: wakes the thread if it is behind.
    pub fn nudge(&self) {
        if self.lag() > 0 {
            self.shared.changed.notify_one();
        }
    }

    /// Counts what was appended to the raft log, for when a checkpoint is due.
    pub fn appended(&self, bytes: usize) {
        self.shared.appended.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn promote(&self, epoch: u64) {
        self.change(|goal| goal.epoch = Some(epoch));
    }

    /// Closes the databases. [`super::inbox::DatabaseEvent::Demoted`] answers, with the number returned here.
    pub fn demote(&self) -> u64 {
        self.change(|goal| {
            goal.epoch = None;
            goal.demotion += 1;
        })
        .demotion
    }

    /// Lets the database file rest for a snapshot. [`super::inbox::DatabaseEvent::Resting`] answers.
    pub fn request_snapshot(&self, request: SnapshotRequest) {
        let waiting = &mut self.shared.lock().mailbox.snapshots;
        if waiting.len() >= MAILBOX {
            return request.refuse(SnapshotError::Busy("too many members ask for the database"));
        }
        waiting.push_back(request);
        self.shared.changed.notify_one();
    }

    /// Ends the thread after a last checkpoint, and waits for it.
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
