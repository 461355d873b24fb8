//! The thread that waits for the disk instead of the database thread: saves checkpoints and compacts the raft log, one
//! at a time, so that neither a promotion nor a demotion waits for a sync. Must never decide what may be dropped.

use std::{
    io,
    sync::mpsc::{self, SyncSender},
    thread,
};

use crate::storage::{
    checkpoint::{Saved, Saving},
    raft_log::{LogError, RaftLog},
};

/// A task that waits for the disk: the checkpoints of all databases at once, or a compaction.
pub(super) enum Task {
    Save(Vec<Saving>),
    Compact { log: RaftLog, to: u64 },
}

/// The outcome of a task.
pub(super) enum Outcome {
    Saved(Vec<Saved>),
    Compacted { to: u64, result: Result<(), LogError> },
}

/// The database thread's side.
pub(super) struct Saver {
    tasks: SyncSender<Task>,
    busy: bool,
}

impl Saver {
    /// Starts the thread; it ends when this is dropped. It reports the outcome of each task.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(report: impl Fn(Outcome) + Send + 'static) -> io::Result<Self> {
        let (tasks, todo) = mpsc::sync_channel::<Task>(1);
        let carry_out = move || {
            for task in todo {
                report(match task {
                    Task::Save(savings) => Outcome::Saved(savings.into_iter().map(Saving::save).collect()),
                    Task::Compact { log, to } => Outcome::Compacted { to, result: log.compact(to) },
                });
            }
        };
        thread::Builder::new().name("checkpoint".to_owned()).spawn(carry_out)?;
        Ok(Self { tasks, busy: false })
    }

    /// True until the outcome of the last task has been taken.
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Hands a task over. Panics while another one is under way.
    pub fn begin(&mut self, task: Task) {
        assert!(!self.busy, "one task at a time");
        self.busy = self.tasks.send(task).is_ok();
    }

    /// Notes that the outcome of the task has been taken.
    pub fn taken(&mut self) {
        self.busy = false;
    }
}
