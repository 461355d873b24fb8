//! Publishes what the consensus loop knows of its node: in reports to the other members, and as the [`Status`]
//! (`picture`). Must never wait, nor answer questions that the loop decides by.

mod gauges;
mod picture;

pub(super) use gauges::flag;

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::watch;

use super::{
    NodeConfig,
    history::History,
    lease::boottime,
    members::Members,
    status::{CertificateStatus, Status, SyncProgress},
    warning::Warning,
};
use crate::{
    cluster::{Cluster, Membership, NodeId, Phase, Role, role::Transition, trust::Holdings},
    peer::{Condition, Links, NodeReport, Remembers, ReportExtension},
    storage::raft_log::RaftLog,
};

/// Ticks between two reports to the other members, and between two statuses while nothing changes.
const REPORT_TICKS: u32 = 20;

/// What reports to the others say of this node that the rest of the publisher does not know.
struct Own {
    /// Its disk is full.
    full: bool,
    /// Free bytes for its data, and the condition of its disk.
    free: Option<u64>,
    disk: Condition,
    /// Which of the shared keys and certificates are on its disk.
    holds: Holdings,
    /// What the others should remember of it.
    remembers: Remembers,
}

/// What the [`Publisher`] reads from the loop for each status.
pub(super) struct Seen<'a> {
    pub cluster: &'a Cluster<RaftLog>,
    pub log: &'a RaftLog,
    /// The raft index up to which the database has everything.
    pub applied: u64,
}

/// Collects what the status shows. Used by the consensus loop.
pub(super) struct Publisher {
    config: NodeConfig,
    warnings: BTreeMap<Warning, String>,
    certificates: Vec<CertificateStatus>,
    membership: Membership,
    phase: Phase,
    reason: &'static str,
    diverged: bool,
    /// Entries of its raft log were replaced, and its database has not yet caught up.
    rolling_back: bool,
    own: Own,
    /// Why this node is no longer a member.
    removed: Option<String>,
    history: History,
    /// Copies of the whole database that are being transferred, by the node that receives them.
    sync: BTreeMap<NodeId, SyncProgress>,
    sender: watch::Sender<Arc<Status>>,
    ticks: u32,
    stale: bool,
    /// Epoch and primary of the status that was published last.
    shown: (u64, Option<NodeId>),
    /// Role and epoch that the others last heard of at once.
    announced: (Role, u64),
    /// Something else has changed that the others must hear of at once.
    unsaid: bool,
}

impl Publisher {
    pub fn new(config: &NodeConfig) -> (Self, watch::Receiver<Arc<Status>>) {
        let membership = config.stored.membership.clone();
        let (name, reason) = (config.name_in(&membership), "starts".to_owned());
        let still = Status::without_node(name, &config.version, membership.clone(), Role::Startup, reason);
        let first = Status { node: config.node, ..still };
        let (sender, receiver) = watch::channel(Arc::new(first));
        let publisher = Self {
            config: config.clone(),
            warnings: BTreeMap::new(),
            certificates: Vec::new(),
            membership: membership.clone(),
            removed: None,
            history: History::default(),
            sync: BTreeMap::new(),
            phase: Phase::Startup,
            reason: "starts: an earlier process of this node may have promised its vote",
            diverged: false,
            rolling_back: false,
            own: Own {
                full: false,
                free: None,
                disk: Condition::Good,
                holds: Holdings::default(),
                remembers: Remembers { forgotten: config.forgotten.is_some(), ..Remembers::default() },
            },
            sender,
            ticks: 0,
            stale: true,
            shown: (0, None),
            announced: (Role::Startup, 0),
            unsaid: false,
        };
        (publisher, receiver)
    }

    /// A member reports that it is not primary.
    pub fn not_primary(&mut self, member: NodeId) {
        self.history.not_primary(member, boottime());
    }

    /// The process of a member is dead; it was last heard of at `heard`.
    pub fn dead(&mut self, member: NodeId, heard: u64) {
        self.history.dead(member, heard);
    }

    /// Follows a change of the membership.
    pub fn set_membership(&mut self, membership: &Membership) {
        self.sync.retain(|id, _| membership.get(*id).is_some());
        self.membership = membership.clone();
        self.stale = true;
    }

    /// This node is no longer a member.
    pub fn removed(&mut self, why: String) {
        self.removed = Some(why);
        self.stale = true;
    }

    /// Shows how much of the database has been copied to a member, or to this node; `None` when the copy has ended.
    pub fn sync(&mut self, node: NodeId, progress: Option<SyncProgress>) {
        match progress.filter(|_| node == self.config.node || self.membership.get(node).is_some()) {
            Some(progress) => self.sync.insert(node, progress),
            None => self.sync.remove(&node),
        };
        self.stale = true;
    }

    /// Sets what the others should remember of this node. They hear of a vote at once.
    pub fn remembers(&mut self, remembers: Remembers) {
        let vote = |remembers: &Remembers| (remembers.forgotten, remembers.reach.term, remembers.reach.vote);
        self.unsaid |= vote(&std::mem::replace(&mut self.own.remembers, remembers)) != vote(&remembers);
    }

    /// Sets which of the shared keys and certificates are on this node's disk. The others hear of it at once.
    pub fn holds(&mut self, holds: Holdings) {
        self.own.holds = holds;
        (self.stale, self.unsaid) = (true, true);
    }

    /// Sets whether this node's disk is full. The others hear of it at once.
    pub fn full(&mut self, full: bool) {
        self.own.full = full;
        (self.stale, self.unsaid) = (true, true);
    }

    /// Sets the condition of this node's disk. The others hear of it at once.
    pub fn disk(&mut self, condition: Condition) {
        self.own.disk = condition;
        (self.stale, self.unsaid) = (true, true);
    }

    /// Sets how many bytes are free for this node's data, if known. The others hear of it with the next report.
    pub fn free(&mut self, free: Option<u64>) {
        self.own.free = free;
    }

    /// True while a warning of this kind is shown.
    pub fn warns(&self, about: Warning) -> bool {
        self.warnings.contains_key(&about)
    }

    /// Sets a warning of one kind; `None` removes it.
    pub fn warn(&mut self, about: Warning, text: Option<String>) {
        self.stale |= self.warnings.get(&about) != text.as_ref();
        match text {
            Some(text) => self.warnings.insert(about, text),
            None => self.warnings.remove(&about),
        };
    }

    /// Shows these certificates from now on.
    pub fn certificates(&mut self, certificates: Vec<CertificateStatus>) {
        self.certificates = certificates;
        self.stale = true;
    }

    /// This node's copy of the database cannot be trusted.
    pub fn diverged(&mut self, why: String) {
        self.diverged = true;
        self.warn(Warning::Diverged, Some(format!("{why}; this node fetches the database from the primary by itself")));
    }

    pub fn rolling_back(&mut self, rolling_back: bool) {
        self.rolling_back = rolling_back;
        self.stale = true;
    }

    /// The primary `by` has ordered this node to campaign at once: it hands its role over.
    pub fn handed_over(&mut self, by: NodeId) {
        self.history.handed_over(by, boottime());
    }

    pub fn transition(&mut self, epoch: u64, transition: &Transition, members: &Members) {
        let heard = self.history.lost_primary().and_then(|primary| members.last_heard(primary));
        self.history.note(self.config.node, epoch, transition, boottime(), heard);
        self.phase = transition.to;
        self.reason = transition.sentence;
        self.stale = true;
    }

    /// Once per tick: sends the regular reports when they are due. True if it did.
    pub fn tick(&mut self, links: &mut Links) -> bool {
        self.ticks += 1;
        if self.ticks % REPORT_TICKS != 1 {
            return false;
        }
        self.stale = true;
        self.send_reports(links);
        true
    }

    /// Sends reports now if the role has changed, for which the others wait in a switchover, or something else that
    /// they must hear of at once.
    pub fn announce(&mut self, links: &mut Links) {
        let now = (self.sender.borrow().role, self.shown.0);
        let news = std::mem::replace(&mut self.announced, now) != now;
        if std::mem::take(&mut self.unsaid) || news {
            self.send_reports(links);
        }
    }

    fn send_reports(&self, links: &mut Links) {
        let status = self.sender.borrow().clone();
        let own = &self.own;
        for peer in self.membership.roster.members.iter().map(|member| member.id).filter(|id| *id != self.config.node) {
            let report = NodeReport {
                state: status.role,
                epoch: status.epoch,
                applied: status.applied,
                committed: status.committed,
                lease_ms: status.lease_ms,
                full: own.full,
                version: status.version.clone(),
                more: Some(ReportExtension {
                    level: self.config.level,
                    holds: own.holds,
                    // The encoding of a report has room for the last two fields only behind this one.
                    free: own.free.or((own.disk != Condition::Good || own.remembers.forgotten).then_some(0)),
                    disk: Some(own.disk),
                    memory: Some(own.remembers),
                }),
            };
            links.send_report(peer, &report);
        }
    }
}
