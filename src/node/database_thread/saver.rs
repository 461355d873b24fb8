//! The thread that waits for the disk instead of the database thread: saves checkpoints and compacts the raft log, one
//! at a time, so that neither a promotion nor a demotion waits for a sync. Must never decide what may be dropped.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, SyncSender},
    },
    thread,
    time::Duration,
};

use crate::storage::{
    checkpoint::{Saved, Saving},
    pacer::Pacer,
    raft_log::{LogError, RaftLog},
};

/// How much longer a checkpoint may take for the sake of those who commit. Meanwhile the raft log grows.
const PATIENCE: Duration = Duration::from_secs(2);

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
    /// Somebody waits for the task.
    hurry: Arc<AtomicBool>,
}

impl Saver {
    /// Starts the thread; it ends when this is dropped. It reports the outcome of each task.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(report: impl Fn(Outcome) + Send + 'static) -> io::Result<Self> {
        let (tasks, todo) = mpsc::sync_channel::<Task>(1);
        let hurry = Arc::<AtomicBool>::default();
        let hurried = Arc::clone(&hurry);
        let save = move |saving: Saving| saving.save_paced(Pacer::until(PATIENCE, Arc::clone(&hurried)));
        let carry_out = move || {
            for task in todo {
                report(match task {
                    Task::Save(savings) => Outcome::Saved(savings.into_iter().map(&save).collect()),
                    Task::Compact { log, to } => Outcome::Compacted { to, result: log.compact(to) },
                });
            }
        };
        thread::Builder::new().name("checkpoint".to_owned()).spawn(carry_out)?;
        Ok(Self { tasks, busy: false, hurry })
    }

    /// True until the outcome of the last task has been taken.
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Hands a task over. Panics while another one is under way.
    pub fn begin(&mut self, task: Task) {
        assert!(!self.busy, "one task at a time");
        self.hurry.store(false, Ordering::Relaxed);
        self.busy = self.tasks.send(task).is_ok();
    }

    /// Has the task that is under way take no more rests.
    pub fn hurry(&self) {
        self.hurry.store(true, Ordering::Relaxed);
    }

    /// Notes that the outcome of the task has been taken.
    pub fn taken(&mut self) {
        self.busy = false;
    }
}
