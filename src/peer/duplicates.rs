//! Notices two processes with the identity of one node: a data folder that was copied together with its certificate.
//! Must never hold a restart against a node.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::{cluster::NodeId, mutex::locked};

/// Earlier processes of a node that are remembered.
const EARLIER: usize = 8;
/// This many returns of an earlier process within [`WINDOW`] prove that two are alive at once. A single one does not: a
/// call may be answered later than that of the caller's successor.
const RETURNS: usize = 2;
const WINDOW: Duration = Duration::from_secs(60);

/// The processes that called as each node. Bounded by the number of members that ever called.
#[derive(Default)]
pub(super) struct Duplicates(Mutex<BTreeMap<NodeId, Processes>>);

#[derive(Default)]
struct Processes {
    /// The one that called last and was answered.
    current: Option<u64>,
    /// Those before it, newest last: none of them may ever come back.
    earlier: VecDeque<u64>,
    /// When one of them did.
    returns: VecDeque<Instant>,
}

impl Duplicates {
    /// Notes that a process calls as `node`. True if another process with the same identity is alive, too, and is
    /// `linked`: this call must not be answered.
    pub fn calls(&self, node: NodeId, incarnation: u64, linked: bool) -> bool {
        self.calls_at(Instant::now(), node, incarnation, linked)
    }

    fn calls_at(&self, now: Instant, node: NodeId, incarnation: u64, linked: bool) -> bool {
        let mut nodes = locked(&self.0);
        let known = nodes.entry(node).or_default();
        if known.current == Some(incarnation) {
            return false;
        }
        if known.earlier.contains(&incarnation) {
            known.returns.retain(|at| now.duration_since(*at) < WINDOW);
            if known.returns.len() >= RETURNS {
                known.returns.pop_front();
            }
            known.returns.push_back(now);
            if linked && known.returns.len() >= RETURNS {
                return true;
            }
            known.earlier.retain(|earlier| *earlier != incarnation);
        }
        if let Some(before) = known.current.replace(incarnation) {
            if known.earlier.len() >= EARLIER {
                known.earlier.pop_front();
            }
            known.earlier.push_back(before);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_are_no_twins() {
        let duplicates = Duplicates::default();
        for incarnation in 0..100 {
            assert!(!duplicates.calls(1, incarnation, true) && !duplicates.calls(1, incarnation, true));
        }
        assert_eq!(duplicates.0.lock().unwrap()[&1].earlier.len(), EARLIER);
    }

    #[test]
    fn who_comes_back_twice_is_refused_while_the_other_is_linked() {
        let (duplicates, now) = (Duplicates::default(), Instant::now());
        let calls = |seconds, incarnation, linked| {
            duplicates.calls_at(now + Duration::from_secs(seconds), 1, incarnation, linked)
        };
        assert!(!calls(0, 10, true) && !calls(1, 20, true), "a restart");
        assert!(!calls(2, 10, true), "the first return may be a late call");
        assert!(calls(3, 20, true) && calls(4, 20, true));
        assert!(!calls(5, 10, true), "the one that is linked may call again");
        assert!(!calls(6, 30, true), "and may be restarted");
        assert!(!calls(7, 20, false), "when it is gone, the other one is answered");
        assert!(!duplicates.calls(2, 20, true), "another node is another matter");
    }

    #[test]
    fn returns_that_are_far_apart_are_forgiven() {
        let (duplicates, now) = (Duplicates::default(), Instant::now());
        for (round, incarnation) in (0..20).zip([10, 20].into_iter().cycle()) {
            assert!(!duplicates.calls_at(now + WINDOW * round, 1, incarnation, true), "{round}");
        }
    }
}
