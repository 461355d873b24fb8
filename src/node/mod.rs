//! DRIVES. Joins the consensus core to the world: links, raft log, database, clock. Publishes what it sees through
//! `watch<Status>` and knows nothing of ports and workloads.

mod applier;
mod driver;
mod inbox;
pub mod lease;
mod rollback;
pub mod status;
mod syncer;

use std::{
    io,
    path::PathBuf,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use raft::{Storage, eraftpb::HardState};
use tokio::sync::{oneshot, watch};

pub use applier::CheckpointPolicy;
pub use lease::Lease;
pub use status::{MemberStatus, Status};

use crate::{
    cluster::{Cluster, Membership, NodeId, Timing},
    peer::{LinkSender, Links},
    storage::{database::Database, raft_log::RaftLog},
};
use applier::Applier;
use driver::Driver;
use inbox::{Input, Sender, Waiting};
use rollback::Rollback;
use status::Publisher;
use syncer::Syncer;

/// What a node is made of.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    pub membership: Membership,
    pub node: NodeId,
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
    /// The shared lease that this node extends.
    pub lease: Lease,
    /// Where dropped tails of the raft log are kept.
    pub rollback: PathBuf,
}

/// Why the loop ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// As it was told to.
    Stopped,
    /// Going on would not be safe; a restart is. The sentence says what failed.
    Fatal(String),
}

/// The rest of the process' view of a running node.
#[derive(Clone)]
pub struct Handle {
    sender: Sender,
    status: watch::Receiver<Arc<Status>>,
}

impl Handle {
    /// The latest picture; changes can be awaited.
    pub fn status(&self) -> watch::Receiver<Arc<Status>> {
        self.status.clone()
    }

    /// Hands the primary role to another member: returns when it has gone over, or when the time for it is up. At once if this node
    /// is not primary. The Console must have been drained before.
    pub async fn hand_over(&self) {
        let (done, wait) = oneshot::channel();
        if self.sender.send(Input::HandOver { done }) {
            let _ = wait.await; // an ended loop has no role either
        }
    }

    /// Shows a warning in the status, or takes it back.
    pub fn warn(&self, about: &'static str, text: Option<String>) {
        self.sender.send(Input::Warning { about, text });
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
    database: Database,
    (links, waker): (Links, LinkSender),
) -> io::Result<(Handle, JoinHandle<Exit>)> {
    let applied = database.applied().max(1);
    trust_checkpoint(&log, applied)?;
    let cluster = Cluster::new(&config.membership, config.node, config.timing, applied, log.clone(), lease::boottime())
        .map_err(|error| io::Error::other(format!("start from the raft log: {error}")))?;
    let (sender, inbox) = inbox::inbox(waker);
    let applier = Applier::start(database, log.clone(), sender.clone(), config.demotion_deadline, config.checkpoints)?;
    let (publisher, status) = Publisher::new(&config);
    let driver = Driver {
        syncer: Syncer::start(sender.clone())?,
        rollback: Rollback::new(config.rollback.clone(), (config.membership.cluster, config.node), sender.clone()),
        cluster,
        log,
        links,
        inbox,
        applier,
        publisher,
        config,
        waiting: Waiting::default(),
        handed_over: None,
        demotion: None,
        inline_sync_after: Instant::now(),
        exit: None,
    };
    let thread = thread::Builder::new().name("consensus".to_owned()).spawn(move || driver.run())?;
    Ok((Handle { sender, status }, thread))
}

/// Everything that a checkpointed database has is committed, even if the lazily written commit index says less.
fn trust_checkpoint(log: &RaftLog, applied: u64) -> io::Result<()> {
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
