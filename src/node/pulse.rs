//! A sign of life of the consensus loop, for whoever asks whether it still turns. Must never be taken for a lease: a
//! loop that turns may have lost its majority.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::lease::boottime;

/// When the loop turned last, on the clock of [`boottime`].
#[derive(Clone, Debug)]
pub struct Pulse(Arc<AtomicU64>);

impl Pulse {
    /// One that has just beaten.
    pub fn new() -> Self {
        Self(Arc::new(AtomicU64::new(boottime())))
    }

    /// The loop turns. Called by the loop only, and by tests that play its part.
    pub fn beat(&self) {
        self.0.store(boottime(), Ordering::Relaxed);
    }

    /// How long ago that was.
    pub fn age(&self) -> Duration {
        Duration::from_nanos(boottime().saturating_sub(self.0.load(Ordering::Relaxed)))
    }
}

impl Default for Pulse {
    fn default() -> Self {
        Self::new()
    }
}
