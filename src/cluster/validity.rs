//! Whether what begins and ends at times of day is in force. Must never count what begins in the future: a clock that
//! was ahead has made it, and it would stay in force for as long as that clock was wrong.

/// Seconds by which the clocks of two members may differ without a doubt about what one of them has made.
pub const SKEW: u64 = 300;

/// True between `from` and `until`, in seconds since 1970. `from` may be [`SKEW`] after `now`: another host's clock set
/// it.
pub fn in_force(from: u64, until: u64, now: u64) -> bool {
    from <= now.saturating_add(SKEW) && now < until
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_clock_that_was_ahead_has_made_is_not_in_force() {
        let (day, now) = (86_400, 1_700_000_000);
        assert!(in_force(now, now + day, now) && in_force(now - day, now + 1, now));
        assert!(!in_force(now - day, now, now), "it has ended");
        assert!(in_force(now + SKEW, now + day, now) && !in_force(now + SKEW + 1, now + day, now));
        assert!(!in_force(now + 400 * day, now + 401 * day, now));
        assert!(!in_force(0, 0, 0) && in_force(u64::MAX, u64::MAX, u64::MAX - 1));
    }
}
