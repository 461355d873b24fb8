//! The thread that waits for the disk in the place of the database thread: saves checkpoints and compacts the raft log, one at
//! a time, so that neither a promotion nor a demotion waits for a sync. Must never decide what may be let go of.

use std::{
    io,
    sync::mpsc::{self, Receiver, SyncSender},
    thread,
};

use crate::storage::{
    checkpoint::{Saved, Saving},
    raft_log::{LogError, RaftLog},
};

/// What waits for the disk.
pub(super) enum Task {
    Save(Saving),
    Compact { log: RaftLog, to: u64 },
}

/// What came of it.
pub(super) enum Outcome {
    Saved(Saved),
    Compacted { to: u64, result: Result<(), LogError> },
}

/// The database thread's side of it.
pub(super) struct Saver {
    tasks: SyncSender<Task>,
    outcomes: Receiver<Outcome>,
    busy: bool,
}

impl Saver {
    /// Starts the thread, which ends with this. `done` is called after each task.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(done: impl Fn() + Send + 'static) -> io::Result<Self> {
        let (tasks, todo) = mpsc::sync_channel::<Task>(1);
        let (sender, outcomes) = mpsc::sync_channel(1);
        let carry_out = move || {
            for task in todo {
                let outcome = match task {
                    Task::Save(saving) => Outcome::Saved(saving.save()),
                    Task::Compact { log, to } => Outcome::Compacted { to, result: log.compact(to) },
                };
                if sender.send(outcome).is_err() {
                    return;
                }
                done();
            }
        };
        thread::Builder::new().name("checkpoint".to_owned()).spawn(carry_out)?;
        Ok(Self { tasks, outcomes, busy: false })
    }

    /// True until the outcome of the last task was taken.
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Hands a task over; not while it is busy.
    pub fn begin(&mut self, task: Task) {
        assert!(!self.busy, "one task at a time");
        self.busy = self.tasks.send(task).is_ok();
    }

    /// Takes the outcome of the task, if it is there.
    pub fn poll(&mut self) -> Option<Outcome> {
        let outcome = self.outcomes.try_recv().ok();
        self.busy &= outcome.is_none();
        outcome
    }

    /// Waits for the outcome of the task; none if there is no task.
    pub fn wait(&mut self) -> Option<Outcome> {
        std::mem::take(&mut self.busy).then(|| self.outcomes.recv().ok()).flatten()
    }
}
