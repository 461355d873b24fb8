//! The way of one promotion from the service's databases to the majority: proposes, and lets nothing pass any more once
//! it is fenced. All databases of the folder share it: if the outcome of one transaction is unknown, none of them may
//! go on.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use super::overlay::{Budget, MEMORY};
use crate::{
    mutex::locked,
    storage::{ReplicateError, Replicator, gate::Stop},
};

/// The passage of one promotion.
pub struct Passage {
    epoch: u64,
    replicator: Arc<dyn Replicator>,
    fenced: AtomicBool,
    refusal: Mutex<Option<String>>,
    memory: Arc<Budget>,
    turn: Mutex<()>,
}

impl fmt::Debug for Passage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Passage").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

impl Passage {
    /// Open for this epoch.
    pub fn new(epoch: u64, replicator: Arc<dyn Replicator>) -> Self {
        let memory = Arc::new(Budget::new(MEMORY));
        let (fenced, refusal, turn) = (AtomicBool::new(false), Mutex::new(None), Mutex::default());
        Self { epoch, replicator, fenced, refusal, memory, turn }
    }

    /// The turn of whoever gives a database its id, which may wait for a majority. Taken behind the lock of the
    /// database's writer.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        locked(&self.turn)
    }

    /// As [`Self::turn`], for whoever wants no database to get an id; none while one gets it.
    pub(super) fn try_turn(&self) -> Option<MutexGuard<'_, ()>> {
        self.turn.try_lock().ok()
    }

    /// The epoch of this promotion.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Lets nothing pass any more. Can be called by any thread at any time, and never waits.
    pub fn fence(&self) {
        self.fenced.store(true, Ordering::SeqCst);
    }

    /// True after [`Self::fence`], and after it has fenced itself: the node must give up its role then.
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::SeqCst)
    }

    /// Why something was last refused, in a sentence that names the file. The application's own error says less.
    pub fn last_refusal(&self) -> Option<String> {
        locked(&self.refusal).clone()
    }

    /// The memory of transactions that are under way.
    pub(super) fn memory(&self) -> Arc<Budget> {
        Arc::clone(&self.memory)
    }

    /// Notes and says why something is refused: the application may keep its error to itself.
    pub(super) fn refuse(&self, why: String) -> Stop {
        let mut refusal = locked(&self.refusal);
        if refusal.as_ref() != Some(&why) {
            tracing::warn!(epoch = self.epoch, "refused: {why}");
        }
        *refusal = Some(why);
        Stop::Gate
    }

    pub(super) fn fence_because(&self, why: String) -> Stop {
        self.fence();
        tracing::warn!(epoch = self.epoch, "the service's folder is fenced: {why}");
        *locked(&self.refusal) = Some(why);
        Stop::Gate
    }

    /// Refuses if it is fenced.
    pub(super) fn check(&self) -> Result<(), Stop> {
        if self.is_fenced() {
            return Err(self.refuse("this node is no longer the primary of its epoch".into()));
        }
        Ok(())
    }

    /// Proposes a part: see [`Replicator::replicate`].
    pub(super) fn propose(&self, part: Vec<u8>, last: bool) -> Result<u64, Stop> {
        self.check()?;
        self.replicator.replicate(part, last).map_err(|error| match error {
            ReplicateError::Refused(_) => self.refuse(error.to_string()),
            ReplicateError::Full(_) => {
                self.refuse(error.to_string());
                Stop::Full
            }
            ReplicateError::Unknown(_) => self.fence_because(error.to_string()),
        })
    }

    /// See [`Replicator::make_durable`].
    pub(super) fn make_durable(&self) -> Result<(), Stop> {
        self.replicator.make_durable().map_err(|error| {
            self.refuse(format!("this host's raft log could not be made durable before its databases: {error}"))
        })
    }
}
