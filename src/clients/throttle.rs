//! Slows down guessing of secrets: by whatever is counted, the wait doubles with each failure. Must never be asked
//! after something that knows the answer already: whoever is told to wait must not learn from it whether the guess was
//! right.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::mutex::locked;

/// After this time without a failure all is forgotten.
pub const FORGET: Duration = Duration::from_secs(600);
/// Accounts (or addresses) remembered; when full, one with the fewest failures is forgotten, the oldest of them first.
/// So nobody who makes up names makes the table forget an account that is being guessed at.
const ACCOUNTS: usize = 1024;

/// How many failures are tolerated.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Failures without any wait.
    pub free: u32,
    /// The longest wait.
    pub longest: Duration,
}

#[derive(Debug)]
struct Failures {
    count: u32,
    last: Instant,
}

impl Failures {
    fn wait(&self, limits: Limits) -> Duration {
        match self.count.checked_sub(limits.free) {
            None | Some(0) => Duration::ZERO,
            Some(over) => Duration::from_secs(1 << (over - 1).min(5)).min(limits.longest),
        }
    }

    fn left(&self, limits: Limits, now: Instant) -> Duration {
        (self.last + self.wait(limits)).saturating_duration_since(now)
    }
}

/// The table of failures.
#[derive(Debug)]
pub struct Throttle<K> {
    limits: Limits,
    accounts: Mutex<HashMap<K, Failures>>,
}

impl<K: Clone + Eq + Hash> Throttle<K> {
    /// Nobody has failed yet.
    pub fn new(limits: Limits) -> Self {
        Self { limits, accounts: Mutex::default() }
    }

    /// How long this account must wait before the next attempt; zero if not at all.
    pub fn wait(&self, account: &K, now: Instant) -> Duration {
        let accounts = locked(&self.accounts);
        accounts.get(account).map_or(Duration::ZERO, |failures| failures.left(self.limits, now))
    }

    /// Begins an attempt, which counts as a failure until it has succeeded: many at once, or clients that go away, are
    /// counted like those that come one by one.
    ///
    /// # Errors
    /// How long this account must wait; then nothing is counted.
    pub fn attempt(&self, account: &K, now: Instant) -> Result<(), Duration> {
        let mut accounts = locked(&self.accounts);
        let wait = accounts.get(account).map_or(Duration::ZERO, |failures| failures.left(self.limits, now));
        if !wait.is_zero() {
            return Err(wait);
        }
        Self::count(&mut accounts, account, now);
        Ok(())
    }

    /// Takes back an attempt that was neither right nor wrong.
    pub fn forgive(&self, account: &K) {
        let mut accounts = locked(&self.accounts);
        if let Some(failures) = accounts.get_mut(account) {
            failures.count = failures.count.saturating_sub(1);
        }
    }

    /// Notes an earlier failure, even one that would have had to wait: another process let it pass.
    pub fn recall(&self, account: &K, at: Instant) {
        let mut accounts = locked(&self.accounts);
        Self::count(&mut accounts, account, at);
    }

    fn count(accounts: &mut HashMap<K, Failures>, account: &K, now: Instant) {
        if accounts.len() >= ACCOUNTS && !accounts.contains_key(account) {
            accounts.retain(|_, failures| now.duration_since(failures.last) < FORGET);
            if accounts.len() >= ACCOUNTS {
                let least = accounts.iter().min_by_key(|(_, failures)| (failures.count, failures.last));
                let least = least.map(|(name, _)| name.clone());
                least.and_then(|name| accounts.remove(&name));
            }
        }
        let failures = accounts.entry(account.clone()).or_insert(Failures { count: 0, last: now });
        if now.duration_since(failures.last) >= FORGET {
            failures.count = 0;
        }
        *failures = Failures { count: failures.count.saturating_add(1), last: now };
    }

    /// Notes a success.
    pub fn succeeded(&self, account: &K) {
        locked(&self.accounts).remove(account);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: u32 = 5;
    const LONGEST: Duration = Duration::from_secs(30);

    fn throttle() -> Throttle<String> {
        Throttle::new(Limits { free: FREE, longest: LONGEST })
    }

    #[test]
    fn the_wait_doubles_up_to_a_bound_and_ends_with_a_success() {
        let (throttle, mut now) = (throttle(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..FREE + 7 {
            throttle.attempt(&"admin".into(), now).unwrap();
            let wait = throttle.wait(&"admin".into(), now);
            if !wait.is_zero() {
                assert_eq!(throttle.attempt(&"admin".into(), now), Err(wait));
            }
            waits.push(wait.as_secs());
            now += wait;
        }
        assert_eq!(waits, [0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 30, 30]);
        throttle.attempt(&"admin".into(), now).unwrap();
        assert_eq!(throttle.wait(&"admin".into(), now), LONGEST);
        assert_eq!(throttle.wait(&"other".into(), now), Duration::ZERO);
        throttle.succeeded(&"admin".into());
        assert_eq!(throttle.wait(&"admin".into(), now), Duration::ZERO);
    }

    #[test]
    fn the_table_is_bounded_and_forgets_the_fewest_failures_then_the_oldest() {
        let (throttle, now) = (throttle(), Instant::now());
        for _ in 0..=FREE {
            throttle.attempt(&"admin".into(), now).unwrap();
        }
        for account in 0..ACCOUNTS as u64 + 10 {
            throttle.attempt(&account.to_string(), now + Duration::from_millis(account / 10)).unwrap();
        }
        let accounts = throttle.accounts.lock().unwrap();
        assert_eq!(accounts.len(), ACCOUNTS);
        assert_eq!(accounts["admin"].count, FREE + 1);
        assert!(!accounts.contains_key("0") && accounts.contains_key("1000"));
    }
}
