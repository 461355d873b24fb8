//! A clock that stops while this process does, because a signal has frozen it or it gets no processor. Whatever waits
//! for the disk meanwhile proves nothing about the disk. Must never be used as the time of anything else.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::mutex::locked;

/// How often [`Clock::tick`] is to be called.
pub const STEP: Duration = Duration::from_millis(100);
/// Nanoseconds between two ticks beyond which the process was not running. It is shorter than what makes an operation
/// slow, so that a freeze makes none slow.
const LATE: u64 = 250_000_000;

/// All times are nanoseconds.
#[derive(Debug)]
pub(super) struct Clock {
    /// What the clock showed at the last tick; 0 if nobody ticks, and the process is assumed to run.
    mark: AtomicU64,
    /// For how long it has been stopped.
    still: AtomicU64,
    ticking: Mutex<()>,
}

impl Clock {
    pub(super) const fn new() -> Self {
        Self { mark: AtomicU64::new(0), still: AtomicU64::new(0), ticking: Mutex::new(()) }
    }

    /// What the clock shows at a `moment` of the kernel's monotonic clock.
    pub(super) fn at(&self, moment: u64) -> u64 {
        // In this order: a mark is stored after the stop before it.
        let mark = self.mark.load(Ordering::Acquire);
        let runs = moment.saturating_sub(self.still.load(Ordering::Acquire));
        // After a freeze, nobody may have ticked yet.
        if mark == 0 { runs } else { runs.min(mark + LATE) }
    }

    /// Notes that the process is running at this moment. Called by a thread that never waits for the disk.
    pub(super) fn tick(&self, moment: u64) {
        let _one_at_a_time = locked(&self.ticking);
        let shown = self.at(moment);
        self.still.store(moment.saturating_sub(shown), Ordering::Release);
        self.mark.store(shown, Ordering::Release);
    }

    /// Notes that nobody ticks any more.
    pub(super) fn rest(&self) {
        self.mark.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn a_freeze_is_not_counted_and_a_hung_disk_is() {
        let clock = Clock::new();
        assert_eq!(clock.at(500 * MS), 500 * MS, "nobody ticks");
        for moment in (1000..=2000).step_by(100) {
            clock.tick(moment * MS);
            assert_eq!(clock.at(moment * MS), moment * MS);
        }
        // Eleven seconds; whoever wakes up first sees the same.
        assert_eq!(clock.at(13_000 * MS), 2250 * MS);
        clock.tick(13_000 * MS);
        assert_eq!(clock.at(13_000 * MS), 2250 * MS);
        for moment in (13_100..=14_000).step_by(100) {
            clock.tick(moment * MS);
        }
        assert_eq!(clock.at(14_010 * MS), 3260 * MS);
        clock.rest();
        assert_eq!(clock.at(20_000 * MS), 9250 * MS, "it never goes back");
        clock.tick(20_000 * MS);
        assert_eq!(clock.at(20_100 * MS), 9350 * MS);
    }
}
