//! What the consensus loop tells of its node: the other members hear of it in reports, and everybody sees it as the
//! [`Status`] (`picture`). Must never wait for anybody, nor give answers that the loop decides by.

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

/// Ticks between two reports to the other members, and between two pictures when nothing changes.
const REPORT_TICKS: u32 = 20;

/// What the others are told of this node, besides what the picture has.
struct Own {
    /// Its disk is full.
    full: bool,
    /// Bytes that are free there, and the condition of that disk.
    free: Option<u64>,
    disk: Condition,
    /// What it has on its disk of what all members share.
    holds: Holdings,
    /// What they should remember of it.
    remembers: Remembers,
}

/// Where this node stands, besides what the [`Publisher`] was told.
pub(super) struct Seen<'a> {
    pub cluster: &'a Cluster<RaftLog>,
    pub log: &'a RaftLog,
    /// The raft index up to which the database has everything.
    pub applied: u64,
}

/// Keeps the picture together. Lives on the consensus loop.
pub(super) struct Publisher {
    config: NodeConfig,
    warnings: BTreeMap<Warning, String>,
    certificates: Vec<CertificateStatus>,
    membership: Membership,
    phase: Phase,
    reason: &'static str,
    diverged: bool,
    /// Entries of its raft log were replaced, and its database is not level again.
    rolling_back: bool,
    own: Own,
    /// Why this node is no longer a member.
    removed: Option<String>,
    history: History,
    /// The copies of the database that are on their way, by the node that gets them.
    sync: BTreeMap<NodeId, SyncProgress>,
    sender: watch::Sender<Arc<Status>>,
    ticks: u32,
    stale: bool,
    /// What was published last: epoch and primary.
    shown: (u64, Option<NodeId>),
    /// What the others were told last: role and epoch.
    announced: (Role, u64),
    /// Something else changed that they must hear of at once.
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

    /// A member says that it is not primary.
    pub fn not_primary(&mut self, member: NodeId) {
        self.history.not_primary(member, boottime());
    }

    /// The process of a member that was heard of last at `heard` is dead.
    pub fn dead(&mut self, member: NodeId, heard: u64) {
        self.history.dead(member, heard);
    }

    /// The members from now on.
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

    /// How far the copy of the database for a member, or for this node, is.
    pub fn sync(&mut self, node: NodeId, progress: Option<SyncProgress>) {
        match progress.filter(|_| node == self.config.node || self.membership.get(node).is_some()) {
            Some(progress) => self.sync.insert(node, progress),
            None => self.sync.remove(&node),
        };
        self.stale = true;
    }

    /// What the others are to remember of this node; they are told of a vote at once.
    pub fn remembers(&mut self, remembers: Remembers) {
        let vote = |remembers: &Remembers| (remembers.forgotten, remembers.reach.term, remembers.reach.vote);
        self.unsaid |= vote(&std::mem::replace(&mut self.own.remembers, remembers)) != vote(&remembers);
    }

    /// What this node has on its disk; the others are told at once.
    pub fn holds(&mut self, holds: Holdings) {
        self.own.holds = holds;
        (self.stale, self.unsaid) = (true, true);
    }

    /// The disk of this node is full, or is not any more; the others are told at once.
    pub fn full(&mut self, full: bool) {
        self.own.full = full;
        (self.stale, self.unsaid) = (true, true);
    }

    /// The condition of the disk of this node; the others are told at once.
    pub fn disk(&mut self, condition: Condition) {
        self.own.disk = condition;
        (self.stale, self.unsaid) = (true, true);
    }

    /// So many bytes are free for the data of this node; the others learn of it with the next report.
    pub fn free(&mut self, free: Option<u64>) {
        self.own.free = free;
    }

    /// True while a warning of this kind is shown.
    pub fn warns(&self, about: Warning) -> bool {
        self.warnings.contains_key(&about)
    }

    /// Sets or takes back a warning of one kind.
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

    /// This node's copy of the database is not to be trusted.
    pub fn diverged(&mut self, why: String) {
        self.diverged = true;
        self.warn(Warning::Diverged, Some(format!("{why}; this node needs its database restored from the primary")));
    }

    pub fn rolling_back(&mut self, rolling_back: bool) {
        self.rolling_back = rolling_back;
        self.stale = true;
    }

    /// The primary lets this node campaign at once: it gives its role up on purpose.
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

    /// Tells the others at once when the role changes, for which they wait, as in a switchover, or what else they are
    /// to hear of.
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
                    // What follows the report is sent with it.
                    free: own.free.or((own.disk != Condition::Good || own.remembers.forgotten).then_some(0)),
                    disk: Some(own.disk),
                    memory: Some(own.remembers),
                }),
            };
            links.send_report(peer, &report);
        }
    }
}
