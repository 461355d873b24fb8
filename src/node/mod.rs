//! DRIVES. Connects the consensus core to links, raft log, database and clock, and publishes a [`Status`]. Must know
//! nothing of ports and workloads.

mod database_thread;
mod disk;
mod driver;
pub mod history;
mod inbox;
pub mod lease;
mod members;
mod publisher;
mod pulse;
mod rollback;
mod serving;
pub mod status;
mod syncer;
#[cfg(test)]
mod tests;
mod throttle;
pub mod verdict;
mod warning;

use std::{
    io,
    path::PathBuf,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use raft::{Storage, eraftpb::HardState};
use tokio::sync::{oneshot, watch};

pub use database_thread::CheckpointPolicy;
pub use disk::trouble;
pub use inbox::{ChangeError, SnapshotError};
pub use lease::Lease;
pub use pulse::Pulse;
pub use serving::{Serving, ServingFolder};
pub use status::{CertificateSource, CertificateStatus, MemberStatus, Status, SyncProgress, Waiting};
pub use warning::Warning;

use crate::{
    cluster::{self, Change, Cluster, Membership, NodeId, Timing, reach::Reach, trust::Holdings},
    peer::{Edition, LinkSender, Links, Memory},
    scheduling,
    storage::{
        databases::Databases,
        membership::StoredMembership,
        online_copy::{CopyError, FinishedWhole, WholeCopy},
        raft_log::RaftLog,
        snapshot::{Manifest, Whole},
    },
};
use driver::{Driver, Parts, Views};
use inbox::{Input, Sender, SnapshotRequest};

/// What a node is made of.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The membership to start with.
    pub stored: StoredMembership,
    /// The data folder. Changes of the membership and dropped tails of the raft log are kept there.
    pub data: PathBuf,
    pub node: NodeId,
    /// This node's name while it is in no membership.
    pub name: String,
    pub timing: Timing,
    /// How long a demotion may take to close the database before the process exits.
    pub demotion_deadline: Duration,
    pub checkpoints: CheckpointPolicy,
    /// Page size, in bytes, of a database that this node founds.
    pub page_size: u32,
    /// Take over at once when the primary's process is proven dead; `lib.rs` says what that assumes.
    pub fast_takeover: bool,
    /// The version of this program that people see.
    pub version: String,
    /// The feature level of this program: see [`crate::cluster::level`].
    pub level: u32,
    /// The shared lease, which this node extends.
    pub lease: Lease,
    /// Set if this node lost some of its durable memory and therefore takes part in nothing: the reason.
    pub forgotten: Option<String>,
    /// The least that this node's own memory had reached.
    pub reach: Reach,
    /// What this node remembers of the other members.
    pub memory: Memory,
}

impl NodeConfig {
    /// This node's name in a membership, or its own if it is not a member.
    fn name_in(&self, membership: &Membership) -> String {
        membership.get(self.node).map_or_else(|| self.name.clone(), |member| member.name.clone())
    }
}

/// Why the loop ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It was asked to stop.
    Stopped,
    /// It is not safe to continue, but it is safe to restart. The sentence says what failed.
    Fatal(String),
    /// Nothing is wrong, but the process has to start again, for example to install a snapshot. The sentence says why.
    Restart(String),
}

/// How the rest of the process reaches a running node.
#[derive(Clone)]
pub struct Handle {
    sender: Sender,
    views: Views,
    pulse: Pulse,
}

impl Handle {
    /// The latest status. A receiver can wait for a change.
    pub fn status(&self) -> watch::Receiver<Arc<Status>> {
        self.views.status.clone()
    }

    /// The Console's database, while this node is PRIMARY and has it open for writing.
    pub fn serving(&self) -> Serving {
        self.views.serving.clone()
    }

    /// The databases of a service, while this node is PRIMARY: their folder may be served.
    pub fn serving_folder(&self) -> ServingFolder {
        self.views.folder.clone()
    }

    /// The name of a member: see [`Membership::name`].
    pub fn name(&self, id: NodeId) -> String {
        self.views.membership.borrow().name(id)
    }

    /// The membership in force. A receiver can wait for a change.
    pub fn membership(&self) -> watch::Receiver<Arc<Membership>> {
        self.views.membership.clone()
    }

    /// The membership in force with its raft index, for the links.
    pub fn editions(&self) -> watch::Receiver<Edition> {
        self.views.editions.clone()
    }

    /// The member from which this node should fetch the whole database. None unless it has to: because its raft log is
    /// too far behind, or its copy of the database cannot be trusted.
    pub fn refetch_from(&self) -> watch::Receiver<Option<NodeId>> {
        self.views.refetch_from.clone()
    }

    /// The heartbeat of the consensus loop.
    pub fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// Changes the membership; only on the primary. Returns the new membership once it is in force on this node.
    ///
    /// # Errors
    /// [`ChangeError::NotPrimary`], [`ChangeError::Impossible`] with the reason, or [`ChangeError::Busy`]: nothing was
    /// changed. [`ChangeError::Unknown`]: the change may have been made, so read the membership again.
    pub async fn change(&self, change: Change) -> Result<Arc<Membership>, ChangeError> {
        let (reply, wait) = oneshot::channel();
        let ended = || ChangeError::Unknown("the node stops".to_owned());
        if !self.sender.send(Input::Change { change, reply }) {
            return Err(ended());
        }
        // The lease limits this wait: when it lapses, the loop answers everyone who waits.
        wait.await.map_err(|_| ended())?
    }

    /// Hands the primary role to another member: to `to`, or to any that can take it. Returns when the handover has
    /// succeeded or its time is up ([`Timing::handover`]); at once if this node is not primary. Drain the Console
    /// first.
    pub async fn hand_over(&self, to: Option<NodeId>) {
        let (done, wait) = oneshot::channel();
        if self.sender.send(Input::HandOver { to, done }) {
            let _ = wait.await; // a loop that has ended has no role either
        }
    }

    /// Shows in the status how much of the database has been copied to a member; `None` when the copy has ended.
    pub fn report_sync(&self, node: NodeId, progress: Option<SyncProgress>) {
        self.sender.send(Input::Sync { node, progress });
    }

    /// Lets all databases be read while writers go on, until the [`Whole`] is dropped or a hold of it is
    /// broken; only on the primary. `forgotten` names the member that the database is for, if that member lost its
    /// memory. The manifest does not contain the cluster key.
    ///
    /// # Errors
    /// [`SnapshotError::Busy`]: ask again in a moment. Any other [`SnapshotError`] is the reason to give to the node
    /// that wants the database.
    pub async fn snapshot(&self, forgotten: Option<NodeId>) -> Result<(Manifest, Arc<Whole>), SnapshotError> {
        let (reply, wait) = oneshot::channel();
        if !self.sender.send(Input::Snapshot(SnapshotRequest { forgotten, reply })) {
            return Err(SnapshotError::Stops);
        }
        wait.await.map_err(|_| SnapshotError::Stops)?
    }

    /// Begins a copy of this node's own databases; only on a SECONDARY. A change of the role ends the copy.
    ///
    /// # Errors
    /// [`CopyError::Ended`] with the reason: the database does not follow the raft log here, or its thread is busy.
    pub async fn begin_copy(&self) -> Result<WholeCopy, CopyError> {
        self.views.online_copies.begin().await
    }

    /// Ends a copy of all databases at the last applied transaction.
    ///
    /// # Errors
    /// [`CopyError::Changed`] when too many pages have been written meanwhile: read those, and call this again.
    /// [`CopyError::Ended`] when the databases do not follow any more, were reopened, or are others: begin another
    /// copy.
    pub async fn finish_copy(&self, copy: &WholeCopy) -> Result<FinishedWhole, CopyError> {
        self.views.online_copies.finish(copy.id()).await
    }

    /// Lets this node take over in spite of a pause, until the next change of the membership. For the case that the
    /// only node that may be primary is gone.
    pub fn ignore_pause(&self) {
        self.sender.send(Input::IgnorePause);
    }

    /// Stops the loop in an orderly way, with [`Exit::Restart`].
    pub fn restart(&self, why: String) {
        self.sender.send(Input::Restart { why });
    }

    /// Reports to the other members which of the shared keys and certificates are on this node's disk.
    pub fn report_holdings(&self, holds: Holdings) {
        self.sender.send(Input::Holds { holds });
    }

    /// Shows a warning in the status; `None` removes it.
    pub fn warn(&self, about: Warning, text: Option<String>) {
        self.sender.send(Input::Warning { about, text });
    }

    /// Shows in the status which certificates this node uses.
    pub fn show_certificates(&self, certificates: Vec<CertificateStatus>) {
        self.sender.send(Input::Certificates(certificates));
    }

    /// Stops the loop in an orderly way. Join its thread afterwards.
    pub fn stop(&self) {
        self.sender.send(Input::Stop);
    }
}

/// Starts the node's threads.
///
/// # Errors
/// When the raft log contradicts the database or itself, or a thread cannot be started. The node must not run then.
pub fn spawn(
    config: NodeConfig,
    log: RaftLog,
    mut databases: Databases,
    (links, waker): (Links, LinkSender),
) -> io::Result<(Handle, JoinHandle<Exit>)> {
    let applied = first_applied(&log, &mut databases);
    trust_checkpoints(&log, databases.newest().max(applied))?;
    let StoredMembership { index, membership } = &config.stored;
    let (membership_index, conf_index) = (*index, log.applied_conf().1);
    let forgotten = config.forgotten.is_some();
    let (level, version) = (config.level, config.version.as_str());
    let start = cluster::Start { membership, membership_index, conf_index, applied, level, version, forgotten };
    let cluster = Cluster::new(&start, config.node, config.timing, log.clone(), lease::boottime())
        .map_err(|error| io::Error::other(format!("start from the raft log: {error}")))?;
    let (sender, inbox) = inbox::inbox(waker);
    let pulse = Pulse::new();
    let parts = Parts { config, cluster, log, links, sender: sender.clone(), inbox, databases, pulse: pulse.clone() };
    let (driver, views) = Driver::new(parts)?;
    let thread = thread::Builder::new().name("consensus".to_owned()).spawn(move || {
        scheduling::urgent();
        driver.run()
    })?;
    Ok((Handle { sender, views, pulse }, thread))
}

/// The index after which raft hands out committed entries. A database that the raft log cannot bring up to date is of
/// no use: it is distrusted, and nothing is applied to it.
fn first_applied(log: &RaftLog, databases: &mut Databases) -> u64 {
    let before = log.first_index() - 1;
    for database in databases.all_mut() {
        let applied = database.applied().max(1);
        if applied < before && database.distrusted().is_none() {
            database.distrust(format!(
                "the database in {} has everything up to raft index {applied}, but the raft log begins after {before}",
                database.path().display()
            ));
        }
    }
    databases.applied().max(1).max(before)
}

/// Everything in a checkpointed database is committed, even if the commit index, which is written lazily, is lower.
fn trust_checkpoints(log: &RaftLog, applied: u64) -> io::Result<()> {
    let state = log.initial_state().map_err(io::Error::other)?;
    if log.last_index() < applied {
        return Err(io::Error::other(format!(
            "the database has index {applied}, which the raft log does not have: they do not belong together"
        )));
    }
    if state.hard_state.commit < applied {
        let hard_state = HardState { commit: applied, ..state.hard_state };
        log.append(&[], Some(&hard_state)).and_then(|pending| pending.sync()).map_err(io::Error::other)?;
    }
    Ok(())
}
