//! What this node knows of the other members: when they were last heard of, and what they report. Answers the questions
//! of the loop. Must never decide anything itself, nor know how any of it is shown.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::lease::boottime;
use crate::{
    cluster::{
        Membership, NodeId, Role,
        level::{FIRST_LEVEL, is_older},
    },
    peer::{Condition, NodeReport, ReportExtension},
};

/// A member that was not heard of for this long is shown as DOWN, and is not chosen for anything.
const DOWN_AFTER: Duration = Duration::from_secs(1);
/// How long a member is not chosen after it reported a bad disk and then restarted: its new process does not know of
/// the trouble.
const DISK_MEMORY: Duration = Duration::from_secs(20);

/// What is known about another member.
#[derive(Default)]
pub(super) struct Peer {
    heard: Option<Instant>,
    report: Option<NodeReport>,
    /// The highest index that it has reported as applied: it had all entries up to there on disk.
    has: u64,
    /// Its process is known to be dead, and nothing was heard of it since.
    dead: bool,
    /// When it last reported a bad disk, and whether it has restarted since.
    bad_disk: Option<(Instant, bool)>,
}

impl Peer {
    /// How long ago it was last heard of; `None` if never.
    pub fn silence(&self) -> Option<Duration> {
        self.heard.map(|heard| heard.elapsed())
    }

    /// Its last report.
    pub fn report(&self) -> Option<&NodeReport> {
        self.report.as_ref()
    }

    /// True if its process is dead, or it was not heard of for [`DOWN_AFTER`].
    pub fn is_down(&self) -> bool {
        self.dead || !self.is_heard()
    }

    fn is_heard(&self) -> bool {
        self.silence().is_some_and(|silence| silence < DOWN_AFTER)
    }

    fn has_working_disk(&self) -> bool {
        self.bad_disk.is_none_or(|(at, _)| at.elapsed() >= DISK_MEMORY)
    }

    /// Its last report, if it is up and claims this role.
    fn reports(&self, role: Role) -> Option<&NodeReport> {
        self.report.as_ref().filter(|report| report.state == role && self.is_heard())
    }
}

/// The other members of the membership in force.
pub(super) struct Members {
    node: NodeId,
    peers: BTreeMap<NodeId, Peer>,
    /// Those that vote, in the order of the membership.
    voters: Vec<NodeId>,
    /// Programs of older versions must not become primary; empty: all may.
    pool_version: String,
    /// Something has changed that the status shows.
    news: bool,
}

impl Members {
    pub fn new(node: NodeId, membership: &Membership) -> Self {
        let mut members =
            Self { node, peers: BTreeMap::new(), voters: Vec::new(), pool_version: String::new(), news: true };
        members.update(membership);
        members
    }

    /// Follows a change of the membership.
    pub fn update(&mut self, membership: &Membership) {
        let others: Vec<_> = membership.roster.members.iter().filter(|member| member.id != self.node).collect();
        self.peers.retain(|id, _| others.iter().any(|other| other.id == *id));
        for other in &others {
            self.peers.entry(other.id).or_default();
        }
        self.pool_version.clone_from(&membership.shared.pool.version);
        self.voters = others.iter().filter(|other| other.voter).map(|other| other.id).collect();
    }

    pub fn get(&self, id: NodeId) -> Option<&Peer> {
        self.peers.get(&id)
    }

    /// True, once, if something has changed that the status shows.
    pub fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    pub fn heard(&mut self, from: NodeId) {
        if let Some(peer) = self.peers.get_mut(&from) {
            peer.heard = Some(Instant::now());
            self.news |= std::mem::take(&mut peer.dead);
        }
    }

    pub fn report(&mut self, from: NodeId, report: NodeReport) {
        self.heard(from);
        let Some(peer) = self.peers.get_mut(&from) else { return };
        // The free space changes all the time, so it waits for the next picture.
        let more = |report: &NodeReport| report.more.map(|more| ReportExtension { free: None, memory: None, ..more });
        let shown = |report: &NodeReport| (report.state, report.epoch, report.full, more(report));
        self.news |= peer.report.as_ref().map(shown) != Some(shown(&report));
        peer.has = peer.has.max(report.applied);
        peer.bad_disk = match (disk_of(&report), peer.bad_disk) {
            (Condition::Bad, _) => Some((Instant::now(), false)),
            (_, Some((at, again))) => Some((at, again || report.state == Role::Startup)).filter(|(_, again)| *again),
            (_, None) => None,
        };
        peer.report = Some(report);
    }

    /// The process of this member is dead.
    pub fn dead(&mut self, peer: NodeId) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.dead = true;
            self.news = true;
        }
    }

    /// When a member was last heard of, in nanoseconds of [`boottime`].
    pub fn last_heard(&self, member: NodeId) -> Option<u64> {
        let silence = self.peers.get(&member)?.silence()?;
        Some(boottime().saturating_sub(silence.as_nanos() as u64))
    }

    /// The leader of an epoch, once it has reported that it is PRIMARY in it.
    pub fn primary(&self, leader: NodeId, epoch: u64) -> Option<NodeId> {
        let report = self.peers.get(&leader)?.report.as_ref()?;
        (report.state == Role::Primary && report.epoch == epoch).then_some(leader)
    }

    /// Who reports to be PRIMARY, in the highest epoch: for a node that takes no part in elections.
    pub fn reported_primary(&self) -> Option<NodeId> {
        let serving = |(id, peer): (&NodeId, &Peer)| Some((peer.reports(Role::Primary)?.epoch, *id));
        self.peers.iter().filter_map(serving).max().map(|(_, id)| id)
    }

    /// True if more than half of the voters, this node's program of the version `own` among them, have an older one by
    /// their last report.
    pub fn most_are_older(&self, own: &str) -> bool {
        let version = |id: &NodeId| self.peers.get(id)?.report.as_ref().map(|report| &report.version);
        let older = self.voters.iter().filter_map(version).filter(|version| is_older(version, own)).count();
        2 * older > self.voters.len() + 1
    }

    /// The member to hand the role to: of the voters that are SECONDARY, up, have a working disk with space, and a
    /// program that may serve, the one that has applied most; of equals the first in the membership. Of a pool, one
    /// with a newer program than its primaries had comes last.
    pub fn best_successor(&self) -> Option<NodeId> {
        let able = |id: &NodeId| {
            let peer = self.peers.get(id).filter(|peer| !peer.dead && peer.has_working_disk())?;
            let may_serve = |report: &&NodeReport| !report.full && !is_older(&report.version, &self.pool_version);
            let report = peer.reports(Role::Secondary).filter(may_serve)?;
            Some(((is_older(&self.pool_version, &report.version), Reverse(report.applied)), *id))
        };
        self.voters.iter().filter_map(able).min_by_key(|(lacks, _)| *lacks).map(|(_, id)| id)
    }

    /// The feature level that the programs of all members have, this node's `own` included; `None` while a member is
    /// down.
    pub fn common_level(&self, own: u32) -> Option<u32> {
        let level = |peer: &Peer| peer.report.as_ref().filter(|_| !peer.is_down()).map(level_of);
        self.peers.values().map(level).try_fold(own, |least, level| Some(least.min(level?)))
    }

    /// True if it has said so in its last report.
    pub fn has_full_disk(&self, member: NodeId) -> bool {
        let report = self.peers.get(&member).and_then(|peer| peer.report.as_ref());
        report.is_some_and(|report| report.full)
    }

    /// All other members have the raft log up to this index: none of them will ask for it again.
    pub fn everybody_has(&self) -> u64 {
        self.peers.values().map(|peer| peer.has).min().unwrap_or(u64::MAX)
    }
}

/// The feature level of a reporting program; a report without one comes from the first level.
pub(super) fn level_of(report: &NodeReport) -> u32 {
    report.more.map_or(FIRST_LEVEL, |more| more.level)
}

/// The condition of a member's disk; good if the report does not say.
pub(super) fn disk_of(report: &NodeReport) -> Condition {
    report.more.and_then(|more| more.disk).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{ClusterId, Member, trust::Holdings};

    fn membership() -> Membership {
        let member = |id| Member::founder(id, &format!("node{id}"), &format!("127.0.0.{id}"), 8086);
        Membership::founded(ClusterId(7), (1..=3).map(member).collect())
    }

    fn members() -> Members {
        Members::new(1, &membership())
    }

    fn report(applied: u64) -> NodeReport {
        let version = "1.2.3".to_owned();
        NodeReport {
            state: Role::Secondary,
            epoch: 2,
            applied,
            committed: applied,
            lease_ms: None,
            full: false,
            version,
            more: None,
        }
    }

    #[test]
    fn the_common_level_is_that_of_the_oldest_program_and_needs_everybody() {
        let mut members = members();
        let says = |level| NodeReport {
            more: Some(ReportExtension { level, holds: Holdings::default(), free: None, disk: None, memory: None }),
            ..report(5)
        };
        members.report(2, says(9));
        assert_eq!(members.common_level(2), None, "one was never heard of");
        members.report(3, report(5));
        assert_eq!(members.common_level(2), Some(1), "one says no level");
        members.report(3, says(3));
        assert_eq!(members.common_level(2), Some(2), "our own");
        members.dead(3);
        assert_eq!(members.common_level(2), None);
    }

    /// A primary whose disk is full must not give the role to a member that cannot write either.
    #[test]
    fn only_a_secondary_voter_with_space_is_named() {
        let mut members = members();
        assert_eq!(members.best_successor(), None);
        members.report(2, report(70));
        members.report(3, report(900));
        assert_eq!(members.best_successor(), Some(3));
        members.report(3, NodeReport { full: true, ..report(900) });
        assert_eq!(members.best_successor(), Some(2));
        let more = |disk| {
            Some(ReportExtension {
                level: 2,
                holds: Holdings::default(),
                free: Some(9),
                disk: Some(disk),
                memory: None,
            })
        };
        let mut tell = |state, disk| {
            members.report(2, NodeReport { state, more: more(disk), ..report(950) });
            members.best_successor()
        };
        assert_eq!(tell(Role::Secondary, Condition::Bad), None);
        assert_eq!(tell(Role::Secondary, Condition::Slow), Some(2), "it says itself that it is over");
        assert_eq!(tell(Role::Secondary, Condition::Bad), None);
        assert_eq!(tell(Role::Startup, Condition::Good), None);
        assert_eq!(tell(Role::Secondary, Condition::Good), None, "a new process does not know");
        members.peers.get_mut(&2).unwrap().bad_disk = None;
        let mut membership = membership();
        membership.roster.members[1].voter = false;
        members.update(&membership);
        assert_eq!(members.best_successor(), None);
        membership.roster.members[1].voter = true;
        members.update(&membership);
        members.report(2, NodeReport { state: Role::Startup, ..report(70) });
        assert_eq!(members.best_successor(), None);
        members.report(2, report(70));
        members.dead(2);
        assert_eq!(members.best_successor(), None);
    }

    /// The programs of a pool are exchanged one by one.
    #[test]
    fn a_pool_goes_to_no_older_program_and_to_a_newer_one_last() {
        let mut membership = membership();
        membership.shared.pool.version = "1.2.3".to_owned();
        let mut members = Members::new(1, &membership);
        let mut tell = |node, version: &str, applied| {
            members.report(node, NodeReport { version: version.to_owned(), ..report(applied) });
            (members.best_successor(), members.most_are_older("1.3.0"))
        };
        assert_eq!(tell(2, "1.2.2", 900), (None, false));
        assert_eq!(tell(3, "1.3.0", 800), (Some(3), false));
        assert_eq!(tell(2, "1.2.3", 10), (Some(2), false), "the newer one comes last, although it has more");
        assert_eq!(tell(3, "1.2.3", 800), (Some(3), true));
    }

    /// The raft log is compacted up to this index: an entry that a member lacks must stay.
    #[test]
    fn the_raft_log_is_kept_for_a_member_that_was_never_heard_of() {
        let mut members = members();
        members.report(2, report(5000));
        assert_eq!(members.everybody_has(), 0);
        members.report(3, report(70));
        assert_eq!(members.everybody_has(), 70);
    }

    /// A member that was demoted applies again from its checkpoint, but its raft log is as long as before.
    #[test]
    fn what_a_member_has_does_not_go_back_and_survives_its_death() {
        let mut members = members();
        members.report(2, report(900));
        members.report(3, report(800));
        members.report(3, report(10));
        members.dead(3);
        assert_eq!(members.everybody_has(), 800);
    }

    #[test]
    fn a_member_is_primary_when_it_says_so_of_the_epoch_in_which_it_leads() {
        let mut members = members();
        assert_eq!((members.primary(2, 5), members.reported_primary()), (None, None));
        let serves = |epoch| NodeReport { state: Role::Primary, epoch, ..report(70) };
        members.report(2, serves(4));
        assert_eq!((members.primary(2, 5), members.reported_primary()), (None, Some(2)));
        members.report(3, serves(5));
        assert_eq!((members.primary(3, 5), members.reported_primary()), (Some(3), Some(3)));
        assert_eq!(members.primary(2, 5), None);
    }
}
