//! Slows down those who guess join tokens: so many failures for each source address, a few more each minute. Owns the
//! counts; must never grow with the number of addresses that somebody makes up.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use crate::clients::network;

/// Failures that an address may have at once.
const BURST: f64 = 10.0;
/// Time in which one more is allowed: ten a minute.
const PER_FAILURE: Duration = Duration::from_secs(6);
/// Addresses that are remembered.
const ADDRESSES: usize = 1024;

/// How many failures each address has had lately.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    failures: HashMap<IpAddr, (f64, Instant)>,
}

impl Attempts {
    /// False while this address has failed too often to be listened to.
    pub fn may_try(&self, from: IpAddr, now: Instant) -> bool {
        self.failures.get(&network(from)).is_none_or(|count| left(*count, now) + 1.0 <= BURST)
    }

    /// Counts a failure.
    pub fn failed(&mut self, from: IpAddr, now: Instant) {
        let from = network(from);
        if !self.failures.contains_key(&from) && self.failures.len() >= ADDRESSES {
            self.failures.retain(|_, count| left(*count, now) > 0.0);
        }
        if !self.failures.contains_key(&from) && self.failures.len() >= ADDRESSES {
            // Whoever has failed least is forgotten: made-up addresses do not push out one that is guessing.
            let least = self.failures.iter().min_by(|a, b| left(*a.1, now).total_cmp(&left(*b.1, now)));
            if let Some(address) = least.map(|(address, _)| *address) {
                self.failures.remove(&address);
            }
        }
        let count = self.failures.get(&from).map_or(0.0, |count| left(*count, now));
        self.failures.insert(from, ((count + 1.0).min(BURST), now));
    }
}

/// What remains of a count after the time since.
fn left((count, since): (f64, Instant), now: Instant) -> f64 {
    let forgiven = now.saturating_duration_since(since).as_secs_f64() / PER_FAILURE.as_secs_f64();
    (count - forgiven).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_failures_then_one_every_six_seconds() {
        let (mut attempts, now) = (Attempts::default(), Instant::now());
        let (guesser, other) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        for _ in 0..10 {
            assert!(attempts.may_try(guesser, now));
            attempts.failed(guesser, now);
        }
        assert!(!attempts.may_try(guesser, now));
        assert!(!attempts.may_try("::ffff:192.0.2.1".parse().unwrap(), now));
        assert!(attempts.may_try(other, now));
        let later = now + PER_FAILURE;
        assert!(attempts.may_try(guesser, later));
        attempts.failed(guesser, later);
        assert!(!attempts.may_try(guesser, later));
        assert!(attempts.may_try(guesser, now + PER_FAILURE * 30));
    }

    #[test]
    fn made_up_addresses_do_not_help_and_do_not_fill_the_memory() {
        let (mut attempts, now) = (Attempts::default(), Instant::now());
        let guesser = "192.0.2.1".parse().unwrap();
        for _ in 0..10 {
            attempts.failed(guesser, now);
        }
        for address in 0..3 * ADDRESSES as u32 {
            attempts.failed(IpAddr::V4((0x0a00_0000 + address).into()), now);
        }
        assert_eq!(attempts.failures.len(), ADDRESSES);
        assert!(!attempts.may_try(guesser, now));
        let (one, same_network) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
        for _ in 0..10 {
            attempts.failed(one, now);
        }
        assert!(!attempts.may_try(same_network, now));
    }
}
