//! What the consensus loop knows of the other members and of its own node: it is told here, the others hear of it in
//! reports, and everybody sees it as the [`Status`] (`picture`). Must never wait for anybody, nor decide a role.

mod picture;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::{
    NodeConfig,
    history::History,
    lease::boottime,
    status::{CertificateStatus, Status, SyncProgress},
};
use crate::{
    cluster::{Membership, NodeId, Phase, Role, level::FIRST_LEVEL, role::Transition, trust::Holdings},
    peer::{Condition, Links, More, NodeReport, Remembers},
};

/// A member that was not heard of for this long is shown as DOWN.
const DOWN_AFTER: Duration = Duration::from_secs(1);
/// For how long a member is not chosen that told of a disk in trouble and has begun again: its new process knows nothing of that.
const DISK_MEMORY: Duration = Duration::from_secs(20);
/// Ticks between two reports to the other members, and between two pictures when nothing changes.
const REPORT_TICKS: u32 = 20;

/// What is known about another member.
#[derive(Default)]
struct Peer {
    heard: Option<Instant>,
    report: Option<NodeReport>,
    /// The highest index that it has reported as applied: its raft log has had everything up to there on disk.
    has: u64,
    /// Its process is known to be dead, until something is heard of it again.
    dead: bool,
    /// When it has last told that its disk is in trouble, and whether it has begun again since then.
    bad_disk: Option<(Instant, bool)>,
    sync: Option<SyncProgress>,
}

/// Keeps the picture together. Lives on the consensus loop.
pub(super) struct Publisher {
    config: NodeConfig,
    peers: BTreeMap<NodeId, Peer>,
    warnings: BTreeMap<&'static str, String>,
    certificates: Vec<CertificateStatus>,
    membership: Membership,
    phase: Phase,
    reason: &'static str,
    diverged: bool,
    /// Entries of its raft log were replaced, and its database is not level again.
    rolling_back: bool,
    /// The disk of this node is full.
    full: bool,
    /// Bytes that are free there, and how that disk does.
    free: Option<u64>,
    disk: Condition,
    /// What this node has on its disk.
    holds: Holdings,
    /// Why this node is no member any more.
    removed: Option<String>,
    /// What the others are told of its memory.
    remembers: Remembers,
    history: History,
    /// The copy of the database that is on its way to this node.
    sync: Option<SyncProgress>,
    sender: watch::Sender<Arc<Status>>,
    ticks: u32,
    stale: bool,
    /// What was published last: epoch and primary.
    shown: (u64, Option<NodeId>),
    /// What the others were told last: role and epoch.
    announced: (Role, u64),
}

impl Publisher {
    pub fn new(config: &NodeConfig) -> (Self, watch::Receiver<Arc<Status>>) {
        let membership = config.configuration.membership.clone();
        let others = membership.roster.members.iter().filter(|member| member.id != config.node);
        let name = membership.get(config.node).map_or_else(|| config.name.clone(), |member| member.name.clone());
        let (version, reason) = (&config.version, "starts".to_owned());
        let still = Status::without_node(name, version, membership.clone(), Role::Startup, reason);
        let first = Status { node: config.node, ..still };
        let (sender, receiver) = watch::channel(Arc::new(first));
        let publisher = Self {
            config: config.clone(),
            peers: others.map(|member| (member.id, Peer::default())).collect(),
            warnings: BTreeMap::new(),
            certificates: Vec::new(),
            membership: membership.clone(),
            removed: None,
            remembers: Remembers { forgotten: config.forgotten.is_some(), ..Remembers::default() },
            history: History::default(),
            sync: None,
            phase: Phase::Startup,
            reason: "starts: an earlier process of this node may have promised its vote",
            diverged: false,
            rolling_back: false,
            full: false,
            free: None,
            disk: Condition::Good,
            holds: Holdings::default(),
            sender,
            ticks: 0,
            stale: true,
            shown: (0, None),
            announced: (Role::Startup, 0),
        };
        (publisher, receiver)
    }

    pub fn heard(&mut self, from: NodeId) {
        if let Some(peer) = self.peers.get_mut(&from) {
            peer.heard = Some(Instant::now());
            self.stale |= std::mem::take(&mut peer.dead);
        }
    }

    pub fn report(&mut self, from: NodeId, report: NodeReport) {
        self.heard(from);
        if let Some(peer) = self.peers.get_mut(&from) {
            if report.state != Role::Primary {
                self.history.not_primary(from, boottime());
            }
            // What is free changes all the time: the next picture has it.
            let more = |report: &NodeReport| report.more.map(|more| More { free: None, memory: None, ..more });
            let role = |report: &NodeReport| (report.state, report.epoch, report.full, more(report));
            self.stale |= peer.report.as_ref().map(role) != Some(role(&report));
            peer.has = peer.has.max(report.applied);
            peer.bad_disk = match (disk_of(&report), peer.bad_disk) {
                (Condition::Bad, _) => Some((Instant::now(), false)),
                (_, Some((at, again))) => {
                    Some((at, again || report.state == Role::Startup)).filter(|(_, again)| *again)
                }
                (_, None) => None,
            };
            peer.report = Some(report);
        }
    }

    pub fn dead(&mut self, peer: NodeId) {
        if let Some(heard) = self.last_heard(peer) {
            self.history.dead(peer, heard);
        }
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.dead = true;
            self.stale = true;
        }
    }

    /// The members from now on.
    pub fn set_membership(&mut self, membership: &Membership) {
        let node = self.config.node;
        let is_other = |id: &NodeId| *id != node && membership.get(*id).is_some();
        self.peers.retain(|id, _| is_other(id));
        for id in membership.roster.members.iter().map(|member| member.id).filter(is_other) {
            self.peers.entry(id).or_default();
        }
        self.membership = membership.clone();
        self.stale = true;
    }

    /// This node is no member any more.
    pub fn removed(&mut self, why: String) {
        self.removed = Some(why);
        self.stale = true;
    }

    /// How far the copy of the database for a member, or for this node, is.
    pub fn sync(&mut self, node: NodeId, progress: Option<SyncProgress>) {
        if node == self.config.node {
            self.sync = progress;
        } else if let Some(peer) = self.peers.get_mut(&node) {
            peer.sync = progress;
        }
        self.stale = true;
    }

    pub fn is_diverged(&self) -> bool {
        self.diverged
    }

    /// Who is primary, as it was published last.
    pub fn known_primary(&self) -> Option<NodeId> {
        self.shown.1
    }

    /// What the others are to remember of this node; they are told of a vote at once.
    pub fn remembers(&mut self, remembers: Remembers) {
        let vote = |remembers: &Remembers| (remembers.forgotten, remembers.reach.term, remembers.reach.vote);
        if vote(&std::mem::replace(&mut self.remembers, remembers)) != vote(&remembers) {
            self.announced.1 = u64::MAX;
        }
    }

    /// Who says to be primary, for a node that takes no part in elections.
    pub fn reported_primary(&self) -> Option<NodeId> {
        let serves = |peer: &Peer| {
            let report = peer.report.as_ref().filter(|report| report.state == Role::Primary);
            report.filter(|_| peer.heard.is_some_and(|heard| heard.elapsed() < DOWN_AFTER)).map(|report| report.epoch)
        };
        let serving = self.peers.iter().filter_map(|(id, peer)| Some((serves(peer)?, *id)));
        serving.max().map(|(_, id)| id)
    }

    /// The voter with the most that is SECONDARY, has a disk that works and space on it, and was heard of lately; of equals the first
    /// in rank.
    pub fn secondary_with_space(&self) -> Option<NodeId> {
        let able = |peer: &&Peer| {
            let heard = peer.heard.is_some_and(|heard| heard.elapsed() < DOWN_AFTER);
            let report = peer.report.as_ref();
            let works = peer.bad_disk.is_none_or(|(at, _)| at.elapsed() >= DISK_MEMORY);
            works && !peer.dead && heard && report.is_some_and(|report| report.state == Role::Secondary && !report.full)
        };
        let voters = self.membership.roster.members.iter().filter(|member| member.voter).map(|member| member.id);
        let lacks = |peer: &Peer| std::cmp::Reverse(peer.report.as_ref().map_or(0, |report| report.applied));
        let found = voters.filter_map(|id| self.peers.get(&id).filter(able).map(|peer| (lacks(peer), id)));
        found.min_by_key(|(lacks, _)| *lacks).map(|(_, id)| id)
    }

    /// The feature level that the programs of all members have; none while one of them is not heard of.
    pub fn common_level(&self) -> Option<u32> {
        let level = |peer: &Peer| {
            let heard = !peer.dead && peer.heard.is_some_and(|heard| heard.elapsed() < DOWN_AFTER);
            peer.report.as_ref().filter(|_| heard).map(level_of)
        };
        self.peers.values().map(level).try_fold(self.config.level, |least, level| Some(least.min(level?)))
    }

    /// What this node has on its disk; the others are told at once.
    pub fn holds(&mut self, holds: Holdings) {
        self.holds = holds;
        self.stale = true;
        // Not one of the roles that are announced: the next turn of the loop does it.
        self.announced.1 = u64::MAX;
    }

    /// By its last report.
    pub fn has_full_disk(&self, member: NodeId) -> bool {
        let report = self.peers.get(&member).and_then(|peer| peer.report.as_ref());
        report.is_some_and(|report| report.full)
    }

    /// The disk of this node is full, or is not any more; the others are told at once.
    pub fn full(&mut self, full: bool) {
        self.full = full;
        self.stale = true;
        self.announced.1 = u64::MAX;
    }

    /// How the disk of this node does; the others are told at once.
    pub fn disk(&mut self, condition: Condition) {
        self.disk = condition;
        self.stale = true;
        self.announced.1 = u64::MAX;
    }

    /// So many bytes are free for the data of this node; the others learn of it with the next report.
    pub fn free(&mut self, free: Option<u64>) {
        self.free = free;
    }

    /// The index up to which all other members have the raft log: nobody will ask for it again.
    pub fn everybody_has(&self) -> u64 {
        self.peers.values().map(|peer| peer.has).min().unwrap_or(u64::MAX)
    }

    /// True while a warning of this kind is shown.
    pub fn warns(&self, about: &'static str) -> bool {
        self.warnings.contains_key(about)
    }

    /// Sets or takes back a warning of one kind.
    pub fn warn(&mut self, about: &'static str, text: Option<String>) {
        self.stale |= self.warnings.get(about) != text.as_ref();
        match text {
            Some(text) => self.warnings.insert(about, text),
            None => self.warnings.remove(about),
        };
    }

    /// Shows these certificates from now on.
    pub fn certificates(&mut self, certificates: Vec<CertificateStatus>) {
        self.certificates = certificates;
        self.stale = true;
    }

    pub fn diverged(&mut self, why: String) {
        self.diverged = true;
        self.warn("diverged", Some(format!("{why}; this node needs its database restored from the primary")));
    }

    pub fn rolling_back(&mut self, rolling_back: bool) {
        self.rolling_back = rolling_back;
        self.stale = true;
    }

    /// When a member was heard of last, on the clock of [`boottime`].
    fn last_heard(&self, node: NodeId) -> Option<u64> {
        let silence = self.peers.get(&node)?.heard?.elapsed();
        Some(boottime().saturating_sub(silence.as_nanos() as u64))
    }

    /// The primary lets this node campaign at once: it gives its role up on purpose.
    pub fn handed_over(&mut self, by: NodeId) {
        self.history.handed_over(by, boottime());
    }

    pub fn transition(&mut self, epoch: u64, transition: &Transition) {
        let heard = self.history.lost_primary().and_then(|primary| self.last_heard(primary));
        self.history.note(self.config.node, epoch, transition, boottime(), heard);
        self.phase = transition.to;
        self.reason = transition.sentence;
        self.stale = true;
    }

    /// Once per tick: tells the others where this node stands, now and then. True if it did.
    pub fn tick(&mut self, links: &mut Links) -> bool {
        self.ticks += 1;
        if self.ticks % REPORT_TICKS != 1 {
            return false;
        }
        self.stale = true;
        self.send_reports(links);
        true
    }

    /// Tells the others at once when the role changes: they wait for it, as in a switchover.
    pub fn announce(&mut self, links: &mut Links) {
        let (role, epoch) = (self.sender.borrow().role, self.shown.0);
        if std::mem::replace(&mut self.announced, (role, epoch)) != (role, epoch) {
            self.send_reports(links);
        }
    }

    fn send_reports(&self, links: &mut Links) {
        let status = self.sender.borrow().clone();
        for peer in self.peers.keys() {
            let report = NodeReport {
                state: status.role,
                epoch: status.epoch,
                applied: status.applied,
                committed: status.committed,
                lease_ms: status.lease_ms,
                full: self.full,
                version: status.version.clone(),
                more: Some(More {
                    level: self.config.level,
                    holds: self.holds,
                    // What comes behind it comes with it.
                    free: self.free.or((self.disk != Condition::Good || self.remembers.forgotten).then_some(0)),
                    disk: Some(self.disk),
                    memory: Some(self.remembers),
                }),
            };
            links.send_report(*peer, &report);
        }
    }
}

/// The feature level of the program that reports: one that says none is of the first.
fn level_of(report: &NodeReport) -> u32 {
    report.more.map_or(FIRST_LEVEL, |more| more.level)
}

/// How the disk of a member does, by its report.
fn disk_of(report: &NodeReport) -> Condition {
    report.more.and_then(|more| more.disk).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cluster::{ClusterId, Member, Timing},
        node::CheckpointPolicy,
        storage::configuration::Configuration,
    };

    fn publisher() -> Publisher {
        let member = |id| Member::founder(id, &format!("node{id}"), &format!("127.0.0.{id}"), 8086);
        let membership = Membership::founded(ClusterId(7), (1..=3).map(member).collect());
        let config = NodeConfig {
            configuration: Configuration { index: 1, membership },
            data: std::path::PathBuf::new(),
            name: "node1".to_owned(),
            node: 1,
            timing: Timing::default(),
            demotion_deadline: Duration::from_secs(2),
            checkpoints: CheckpointPolicy {
                bytes: 1 << 20,
                interval: Duration::from_secs(60),
                raft_log_limit: 1 << 30,
                scrub: Duration::ZERO,
            },
            page_size: 4096,
            fast_takeover: true,
            version: "1.2.3".to_owned(),
            level: 2,
            lease: crate::node::Lease::new().unwrap(),
            forgotten: None,
            reach: Default::default(),
            memory: Default::default(),
        };
        Publisher::new(&config).0
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
        let mut publisher = publisher();
        let says = |level| NodeReport {
            more: Some(More { level, holds: Holdings::default(), free: None, disk: None, memory: None }),
            ..report(5)
        };
        publisher.report(2, says(9));
        assert_eq!(publisher.common_level(), None, "one was never heard of");
        publisher.report(3, report(5));
        assert_eq!(publisher.common_level(), Some(1), "one says no level");
        publisher.report(3, says(3));
        assert_eq!(publisher.common_level(), Some(2), "our own");
        publisher.dead(3);
        assert_eq!(publisher.common_level(), None);
    }

    /// A primary whose disk is full must not give the role to a member that could not write either.
    #[test]
    fn only_a_secondary_voter_with_space_is_named() {
        let mut publisher = publisher();
        assert_eq!(publisher.secondary_with_space(), None);
        publisher.report(2, report(70));
        publisher.report(3, report(900));
        assert_eq!(publisher.secondary_with_space(), Some(3));
        publisher.report(3, NodeReport { full: true, ..report(900) });
        assert_eq!(publisher.secondary_with_space(), Some(2));
        let more =
            |disk| Some(More { level: 2, holds: Holdings::default(), free: Some(9), disk: Some(disk), memory: None });
        let mut tell = |state, disk| {
            publisher.report(2, NodeReport { state, more: more(disk), ..report(950) });
            publisher.secondary_with_space()
        };
        assert_eq!(tell(Role::Secondary, Condition::Bad), None);
        assert_eq!(tell(Role::Secondary, Condition::Slow), Some(2), "it says itself that it is over");
        assert_eq!(tell(Role::Secondary, Condition::Bad), None);
        assert_eq!(tell(Role::Startup, Condition::Good), None);
        assert_eq!(tell(Role::Secondary, Condition::Good), None, "a new process does not know");
        publisher.peers.get_mut(&2).unwrap().bad_disk = None;
        let mut membership = publisher.membership.clone();
        membership.roster.members[1].voter = false;
        publisher.set_membership(&membership);
        assert_eq!(publisher.secondary_with_space(), None);
        membership.roster.members[1].voter = true;
        publisher.set_membership(&membership);
        publisher.report(2, NodeReport { state: Role::Startup, ..report(70) });
        assert_eq!(publisher.secondary_with_space(), None);
        publisher.report(2, report(70));
        publisher.dead(2);
        assert_eq!(publisher.secondary_with_space(), None);
    }

    /// The raft log is compacted by this: an entry that a member lacks must stay.
    #[test]
    fn the_raft_log_is_kept_for_a_member_that_was_never_heard_of() {
        let mut publisher = publisher();
        publisher.report(2, report(5000));
        assert_eq!(publisher.everybody_has(), 0);
        publisher.report(3, report(70));
        assert_eq!(publisher.everybody_has(), 70);
    }

    /// A member that was demoted applies again from its checkpoint, but its raft log has what it had.
    #[test]
    fn what_a_member_has_does_not_go_back_and_survives_its_death() {
        let mut publisher = publisher();
        publisher.report(2, report(900));
        publisher.report(3, report(800));
        publisher.report(3, report(10));
        publisher.dead(3);
        assert_eq!(publisher.everybody_has(), 800);
    }
}
