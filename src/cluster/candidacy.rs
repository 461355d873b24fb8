//! When a node stands for election while nobody leads: whose turn it is, and when the next attempt comes. Must never
//! let a voter break its promise: how long a promise lasts is the same in each place.
//!
//! Two nodes that stand at the same time split the votes, so each has a place in a queue: the number of voters with a
//! lower rank that may stand at all. With seven members, the last rank waits for those that are there, not for its own
//! number.

use std::collections::BTreeSet;

use raft::Storage;

use super::{Cluster, Membership, NodeId, Phase};

/// A planned attempt to be elected while no leader is known.
#[derive(Clone, Copy, Debug)]
pub(super) struct Campaign {
    pub(super) at: u64,
    retry: u64,
}

/// First pause between two attempts to be elected, in nanoseconds; doubled each time.
const FIRST_RETRY: u64 = 10_000_000;
const LAST_RETRY: u64 = 640_000_000;

impl<S: Storage> Cluster<S> {
    /// The process of another member is known to be dead (`docs/design.md`, "The fast takeover").
    pub fn peer_dead(&mut self, now: u64, peer: NodeId) {
        self.observe(now);
        self.election.report_unreachable(peer);
        self.dead.insert(peer);
        if self.election.leader() == Some(peer) && self.phase == Phase::Secondary {
            self.election.forget_leader();
            self.schedule_campaign(now);
        }
        self.observe(now);
    }

    /// There is a process of that member again, or still.
    pub fn peer_alive(&mut self, peer: NodeId) {
        self.dead.remove(&peer);
    }

    /// Says whether the programs of most members are older than this node's, in a pool. Once it is primary, they never
    /// are again, and the pool has nobody to lose: so it stands behind all others, unless it is told to.
    pub fn set_ahead(&mut self, ahead: bool) {
        self.ahead = ahead;
    }

    /// This node's place among those that may stand: see [`place`].
    pub(super) fn place(&self) -> usize {
        let place = place(&self.membership, self.node, self.election.leader(), &self.dead);
        if self.ahead { place + self.membership.roster.members.len() } else { place }
    }

    /// Plans to be elected when it is its turn; behind all others if this node could not serve well.
    pub(super) fn schedule_campaign(&mut self, now: u64) {
        let before = self.place();
        let before = if self.is_unfit(now) { before + self.membership.roster.members.len() } else { before };
        self.campaign = Some(Campaign { at: now + before as u64 * self.timing.stagger, retry: FIRST_RETRY });
    }

    pub(super) fn run_campaign(&mut self, now: u64) {
        let Some(campaign) = self.campaign else { return };
        if self.has_forgotten()
            || self.phase != Phase::Secondary
            || self.election.leader().is_some()
            || self.is_paused(now)
            || self.is_outdated()
        {
            self.campaign = None;
        } else if now >= campaign.at {
            let retry = (campaign.retry * 2).min(LAST_RETRY);
            self.campaign = Some(Campaign { at: now + campaign.retry, retry });
            if !self.election.is_candidate() {
                self.election.campaign();
            }
        }
    }
}

/// How many voters stand for election before this node: those of a lower rank, but for the leader that it still follows
/// (if it waits in vain, that one is gone) and those whose process is known to be dead. Once the leader is forgotten
/// without another in its place, it counts again: it may be back.
fn place(membership: &Membership, node: NodeId, leader: Option<NodeId>, dead: &BTreeSet<NodeId>) -> usize {
    // A node that was removed has no rank, and needs none: it is never elected.
    let own = membership.rank(node).unwrap_or(usize::MAX);
    let stands = |id: &NodeId| Some(*id) != leader && !dead.contains(id);
    let before = |id: &NodeId| membership.rank(*id).is_some_and(|rank| rank < own);
    membership.voters().filter(|id| before(id) && stands(id)).count()
}

#[cfg(test)]
mod tests {
    use raft::storage::MemStorage;

    use super::*;
    use crate::cluster::{ClusterId, Member, Start, Timing, election::asks_for_vote, feature_level};

    /// The first of three members of a pool whose newest primary had version 1.3.0; it has another.
    fn first(version: &str) -> Cluster<MemStorage> {
        let member = |id| Member::founder(id, &format!("node{id}"), &format!("127.0.0.{id}"), 8086);
        let mut membership = Membership::founded(ClusterId(7), (1..=3).map(member).collect());
        membership.shared.pool.version = "1.3.0".to_owned();
        let log = MemStorage::new_with_conf_state((vec![1, 2, 3], vec![]));
        let (level, forgotten) = (feature_level(), false);
        let start = Start {
            membership: &membership,
            membership_index: 1,
            conf_index: 1,
            applied: 0,
            level,
            version,
            forgotten,
        };
        Cluster::new(&start, 1, Timing::default(), log, 0).unwrap()
    }

    /// The tick in which it first asks for a vote, if it does within two seconds.
    fn asks(mut cluster: Cluster<MemStorage>) -> Option<u64> {
        (1..80).find(|tick| {
            let (now, mut asked) = (tick * Timing::default().tick, false);
            cluster.tick(now);
            while let Some(output) = cluster.poll(now).unwrap() {
                asked |= output.send.iter().any(asks_for_vote);
                let number = output.persist.map(|persist| persist.number);
                cluster.written();
                number.into_iter().for_each(|number| cluster.persisted(number));
            }
            asked
        })
    }

    #[test]
    fn an_older_program_never_stands_in_a_pool_and_one_that_is_ahead_stands_last() {
        assert_eq!(asks(first("1.2.9")), None);
        let turn = asks(first("1.3.0")).expect("the first in rank stands");
        assert_eq!(asks(first("1.4.0-rc1")), Some(turn), "newer ones, too");
        let mut ahead = first("1.4.0");
        ahead.set_ahead(true);
        assert_eq!(ahead.place(), 3, "behind two others");
        assert!(asks(ahead).is_some_and(|later| later > turn));
    }

    #[test]
    fn the_place_counts_those_that_are_there_and_not_ranks() {
        let member = |id| Member::founder(id, &format!("node{id}"), &format!("127.0.0.{id}"), 8086);
        let mut membership = Membership::founded(ClusterId(7), (1..=7).map(member).collect());
        let none = BTreeSet::new();
        let places = |membership: &Membership, leader, dead: &BTreeSet<NodeId>| {
            (1..=7).map(|node| place(membership, node, leader, dead)).collect::<Vec<_>>()
        };
        assert_eq!(places(&membership, None, &none), [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(places(&membership, Some(1), &none)[1..], [0, 1, 2, 3, 4, 5], "the leader has fallen silent");
        assert_eq!(places(&membership, Some(4), &none)[4..], [3, 4, 5]);
        assert_eq!(places(&membership, Some(1), &BTreeSet::from([2, 5]))[2..], [0, 1, 2, 2, 3]);
        assert_eq!(place(&membership, 7, None, &BTreeSet::from([1, 2, 3])), 3, "the last of four that are left");
        membership.roster.members[1].voter = false;
        assert_eq!(places(&membership, Some(1), &none)[2..], [0, 1, 2, 3, 4], "who has no vote never stands");
        assert_eq!(place(&membership, 9, None, &none), 6);
    }
}
