//! The heartbeat of the consensus loop, for checks that it still runs. Must never be taken for a lease: a loop that
//! runs may have lost its majority.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::lease::boottime;

/// When the loop last completed a turn, on the clock of [`boottime`].
#[derive(Clone, Debug)]
pub struct Pulse(Arc<AtomicU64>);

impl Pulse {
    /// A pulse that beats now.
    pub fn new() -> Self {
        Self(Arc::new(AtomicU64::new(boottime())))
    }

    /// Notes that the loop runs. Only the loop calls this, and tests that stand in for it.
    pub fn beat(&self) {
        self.0.store(boottime(), Ordering::Relaxed);
    }

    /// The time since the last beat.
    pub fn age(&self) -> Duration {
        Duration::from_nanos(boottime().saturating_sub(self.0.load(Ordering::Relaxed)))
    }
}

impl Default for Pulse {
    fn default() -> Self {
        Self::new()
    }
}
