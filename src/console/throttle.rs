//! Slows down guessing of passwords: per account, the wait doubles with each failure. Knows nothing of sessions: who
//! holds a token is not disturbed by somebody who guesses.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Failures without any wait.
const FREE: u32 = 5;
/// The longest wait: short enough that nobody is locked out of the account by a stranger for long.
const LONGEST: Duration = Duration::from_secs(30);
/// After this time without a failure all is forgotten.
const FORGET: Duration = Duration::from_secs(600);
/// Accounts remembered; when full, the one with the oldest failure is forgotten.
const ACCOUNTS: usize = 1024;

#[derive(Debug)]
struct Failures {
    count: u32,
    last: Instant,
}

impl Failures {
    fn wait(&self) -> Duration {
        match self.count.checked_sub(FREE) {
            None | Some(0) => Duration::ZERO,
            Some(over) => Duration::from_secs(1 << (over - 1).min(5)).min(LONGEST),
        }
    }
}

/// The table of failures.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    accounts: Mutex<HashMap<String, Failures>>,
}

impl Throttle {
    /// How long this account must wait before the next attempt; zero if not at all.
    pub(super) fn wait(&self, account: &str, now: Instant) -> Duration {
        let accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(failures) = accounts.get(account) else { return Duration::ZERO };
        (failures.last + failures.wait()).saturating_duration_since(now)
    }

    /// Notes a failure.
    pub(super) fn failed(&self, account: &str, now: Instant) {
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        if accounts.len() >= ACCOUNTS && !accounts.contains_key(account) {
            accounts.retain(|_, failures| now.duration_since(failures.last) < FORGET);
            if accounts.len() >= ACCOUNTS {
                let oldest = accounts.iter().min_by_key(|(_, failures)| failures.last).map(|(name, _)| name.clone());
                oldest.and_then(|name| accounts.remove(&name));
            }
        }
        let failures = accounts.entry(account.to_owned()).or_insert(Failures { count: 0, last: now });
        if now.duration_since(failures.last) >= FORGET {
            failures.count = 0;
        }
        *failures = Failures { count: failures.count.saturating_add(1), last: now };
    }

    /// Notes a success.
    pub(super) fn succeeded(&self, account: &str) {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner).remove(account);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_up_to_a_bound_and_ends_with_a_success() {
        let (throttle, now) = (Throttle::default(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..FREE + 7 {
            throttle.failed("admin", now);
            waits.push(throttle.wait("admin", now).as_secs());
        }
        assert_eq!(waits, [0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(throttle.wait("admin", now + LONGEST), Duration::ZERO);
        assert_eq!(throttle.wait("other", now), Duration::ZERO);
        throttle.succeeded("admin");
        assert_eq!(throttle.wait("admin", now), Duration::ZERO);
    }

    #[test]
    fn the_table_is_bounded_and_forgets_the_oldest() {
        let (throttle, now) = (Throttle::default(), Instant::now());
        for account in 0..ACCOUNTS as u64 + 10 {
            for _ in 0..=FREE {
                throttle.failed(&account.to_string(), now + Duration::from_millis(account));
            }
        }
        assert_eq!(throttle.accounts.lock().unwrap().len(), ACCOUNTS);
        assert_eq!(throttle.wait("0", now), Duration::ZERO);
        assert!(throttle.wait("1000", now) > Duration::ZERO);
    }
}
