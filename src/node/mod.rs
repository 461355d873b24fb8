//! DRIVES. Joins the consensus core to the world: links, raft log, database, clock. Publishes what it sees through
//! `watch<Status>` and knows nothing of ports and workloads.

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
pub use serving::Serving;
pub use status::{CertificateSource, CertificateStatus, MemberStatus, Status, SyncProgress};
pub use warning::Warning;

use crate::{
    cluster::{self, Change, Cluster, Membership, NodeId, Timing, reach::Reach, trust::Holdings},
    peer::{Edition, LinkSender, Links, Memory},
    scheduling,
    storage::{
        databases::Databases,
        membership::StoredMembership,
        online_copy::{CopyError, FinishedCopy, OnlineCopy},
        raft_log::RaftLog,
        snapshot::{Manifest, Resting},
    },
};
use driver::{Driver, Parts, Views};
use inbox::{Input, Sender, SnapshotRequest};

/// What a node is made of.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The membership to start with.
    pub stored: StoredMembership,
    /// The data folder, where changes of the membership and dropped tails of the raft log are kept.
    pub data: PathBuf,
    pub node: NodeId,
    /// This node's name, for as long as no membership names it otherwise.
    pub name: String,
    pub timing: Timing,
    /// How long closing the database may take at a demotion before the process gives up and exits.
    pub demotion_deadline: Duration,
    pub checkpoints: CheckpointPolicy,
    /// Page size, in bytes, of a database that this node founds.
    pub page_size: u32,
    /// Take over at once when the primary's process is proven dead (`lib.rs` says what that assumes).
    pub fast_takeover: bool,
    /// Version of this program, as shown to people.
    pub version: String,
    /// What this program can do: see [`crate::cluster::level`].
    pub level: u32,
    /// The shared lease that this node extends.
    pub lease: Lease,
    /// Why this node takes part in nothing: it lost some of its durable memory. None if it did not.
    pub forgotten: Option<String>,
    /// How far its own memory had reached, at least.
    pub reach: Reach,
    /// What it remembers of the others.
    pub memory: Memory,
}

impl NodeConfig {
    /// What this node is called in a membership; one that it is not in does not say.
    fn name_in(&self, membership: &Membership) -> String {
        membership.get(self.node).map_or_else(|| self.name.clone(), |member| member.name.clone())
    }
}

/// Why the loop ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// As it was told to.
    Stopped,
    /// Going on would not be safe; a restart is. The sentence says what failed.
    Fatal(String),
    /// All is well, but the process has to begin again, as to install a snapshot. The sentence says why.
    Restart(String),
}

/// The rest of the process' view of a running node.
#[derive(Clone)]
pub struct Handle {
    sender: Sender,
    views: Views,
    pulse: Pulse,
}

impl Handle {
    /// The latest picture; changes can be awaited.
    pub fn status(&self) -> watch::Receiver<Arc<Status>> {
        self.views.status.clone()
    }

    /// The database, while this node is PRIMARY and has it open for writing.
    pub fn serving(&self) -> Serving {
        self.views.serving.clone()
    }

    /// What a member is called.
    pub fn name(&self, id: NodeId) -> String {
        self.views.membership.borrow().name(id)
    }

    /// The membership in force; changes can be awaited.
    pub fn membership(&self) -> watch::Receiver<Arc<Membership>> {
        self.views.membership.clone()
    }

    /// The membership in force with its raft index, for the links.
    pub fn editions(&self) -> watch::Receiver<Edition> {
        self.views.editions.clone()
    }

    /// The member that can give this node the whole database, while it needs that: its raft log is too far behind those
    /// of the others, or its copy is not to be trusted.
    pub fn refetch_from(&self) -> watch::Receiver<Option<NodeId>> {
        self.views.refetch_from.clone()
    }

    /// When the consensus loop turned last.
    pub fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// Changes the membership; only on the primary. Returns the membership after it when it is in force here.
    ///
    /// # Errors
    /// [`ChangeError::NotPrimary`], [`ChangeError::Impossible`] with the reason, or [`ChangeError::Busy`]: nothing was
    /// changed. [`ChangeError::Unknown`]: it may have been made, look at the membership.
    pub async fn change(&self, change: Change) -> Result<Arc<Membership>, ChangeError> {
        let (reply, wait) = oneshot::channel();
        let ended = || ChangeError::Unknown("the node stops".to_owned());
        if !self.sender.send(Input::Change { change, reply }) {
            return Err(ended());
        }
        // Bounded by the lease: when it lapses, the loop answers everybody who waits.
        wait.await.map_err(|_| ended())?
    }

    /// Hands the primary role to another member, to `to` if named: returns when it has gone over, or when the time for
    /// it is up. At once if this node is not primary. The Console must have been drained before.
    pub async fn hand_over(&self, to: Option<NodeId>) {
        let (done, wait) = oneshot::channel();
        if self.sender.send(Input::HandOver { to, done }) {
            let _ = wait.await; // an ended loop has no role either
        }
    }

    /// Shows how far the copy of the database for a member is, or that it is over.
    pub fn report_sync(&self, node: NodeId, progress: Option<SyncProgress>) {
        self.sender.send(Input::Sync { node, progress });
    }

    /// Lets the whole database be read while writers go on, until the [`Resting`] file is dropped or its hold is
    /// broken; only on the primary. It may be for a member that forgot, which is named then. The manifest comes without
    /// the cluster key.
    ///
    /// # Errors
    /// [`SnapshotError::Busy`] when the same can be asked for again in a moment. Any other [`SnapshotError`] says, for
    /// the node that wants the database, why there is none.
    pub async fn snapshot(&self, forgotten: Option<NodeId>) -> Result<(Manifest, Resting), SnapshotError> {
        let (reply, wait) = oneshot::channel();
        if !self.sender.send(Input::Snapshot(SnapshotRequest { forgotten, reply })) {
            return Err(SnapshotError::Stops);
        }
        wait.await.map_err(|_| SnapshotError::Stops)?
    }

    /// Begins a copy of this node's own database while it follows; on a SECONDARY. A change of the role ends it.
    ///
    /// # Errors
    /// [`CopyError::Ended`] when the database does not follow, with the reason.
    pub async fn begin_copy(&self) -> Result<OnlineCopy, CopyError> {
        self.views.online_copies.begin().await
    }

    /// Ends a copy at the transaction that was applied last.
    ///
    /// # Errors
    /// [`CopyError::Changed`] when too many pages were written meanwhile: read them, and ask again.
    /// [`CopyError::Ended`] when the database does not follow, or was begun again: begin another copy.
    pub async fn finish_copy(&self, copy: &OnlineCopy) -> Result<FinishedCopy, CopyError> {
        self.views.online_copies.finish(copy.id()).await
    }

    /// Lets this node take over in spite of a pause, until the next change of the membership: for when the only node
    /// that may be primary is gone.
    pub fn ignore_pause(&self) {
        self.sender.send(Input::IgnorePause);
    }

    /// Ends the loop in order with [`Exit::Restart`].
    pub fn restart(&self, why: String) {
        self.sender.send(Input::Restart { why });
    }

    /// Tells the others what this node has on its disk of what they go on with together.
    pub fn report_holdings(&self, holds: Holdings) {
        self.sender.send(Input::Holds { holds });
    }

    /// Shows a warning in the status, or takes it back.
    pub fn warn(&self, about: Warning, text: Option<String>) {
        self.sender.send(Input::Warning { about, text });
    }

    /// Shows the certificates that this node uses in the status.
    pub fn show_certificates(&self, certificates: Vec<CertificateStatus>) {
        self.sender.send(Input::Certificates(certificates));
    }

    /// Ends the loop in order; join its thread afterwards.
    pub fn stop(&self) {
        self.sender.send(Input::Stop);
    }
}

/// Starts the node's threads.
///
/// # Errors
/// When the raft log contradicts the database or itself, or a thread cannot be started.
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
    let start = cluster::Start { membership, membership_index, conf_index, applied, level: config.level, forgotten };
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

/// The index behind which raft hands out what is committed. A database that the raft log cannot bring up to date is of
/// no use, and is not applied to.
fn first_applied(log: &RaftLog, databases: &mut Databases) -> u64 {
    let before = log.first_index() - 1;
    for database in databases.iter_mut() {
        let applied = database.applied().max(1);
        if applied < before && database.distrusted().is_none() {
            database.distrust(format!(
                "the database in {} has everything up to raft index {applied}, and the raft log begins behind {before}",
                database.path().display()
            ));
        }
    }
    databases.applied().max(1).max(before)
}

/// Everything that a checkpointed database has is committed, even if the lazily written commit index says less.
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
