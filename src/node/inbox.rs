//! How other threads reach the consensus loop: one bounded queue and a wake-up. Owns the commit path's waiting side: the
//! [`Proposer`] on which SQLite's thread waits for a majority.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
};

use tokio::sync::oneshot;

use super::{CertificateStatus, ChangeError, snapshots, status::SyncProgress};
use crate::{
    cluster::{Change, Membership, NodeId, trust::Holdings},
    peer::LinkSender,
    storage::{ReplicateError, Replicator, database::PrimaryDatabase, raft_log::RaftLog, snapshot::Resting},
};

/// Requests that may wait for the loop; far more than the threads that make them.
const INBOX: usize = 1024;
/// Parts of one long transaction that may be on their way at once: 8 MiB.
const PARTS_IN_FLIGHT: u64 = 8;

/// What the loop can be told.
pub(super) enum Input {
    Propose(Proposal),
    Synced { number: u64, result: Result<(), String>, micros: u64 },
    Database(DatabaseEvent),
    HandOver { to: Option<NodeId>, done: oneshot::Sender<()> },
    Change { change: Change, reply: oneshot::Sender<Result<Arc<Membership>, ChangeError>> },
    Sync { node: NodeId, progress: Option<SyncProgress> },
    Restart { why: String },
    IgnorePause,
    Holds { holds: Holdings },
    Snapshot { reply: snapshots::Reply },
    Warning { about: &'static str, text: Option<String> },
    Certificates(Vec<CertificateStatus>),
    Stop,
}

/// One part of a transaction on its way into the raft log.
pub(super) struct Proposal {
    pub epoch: u64,
    pub part: Vec<u8>,
    pub last: bool,
    pub reply: SyncSender<Result<u64, ReplicateError>>,
}

/// What the database thread reports.
pub(super) enum DatabaseEvent {
    /// The database does not exist yet: somebody must propose its first transaction.
    Empty {
        epoch: u64,
    },
    Promoted {
        epoch: u64,
        database: Arc<PrimaryDatabase>,
    },
    /// Everything that the given demotion had to close is closed.
    Demoted {
        demotion: u64,
    },
    /// It cannot be opened for writing, or failed while in use; the node goes on as a secondary.
    Failed {
        epoch: u64,
        why: String,
    },
    /// This node's copy is not to be trusted: nothing more is applied to it.
    Diverged {
        why: String,
    },
    /// The file of a database that is open for writing is damaged.
    Rotten {
        why: String,
    },
    /// The database file rests for a snapshot, or cannot.
    Resting {
        resting: Result<Resting, String>,
        reply: snapshots::Reply,
    },
    /// The process must end: a restart is the safe way on.
    Fatal {
        why: String,
    },
}

/// The sending side of the inbox.
#[derive(Clone)]
pub(super) struct Sender {
    queue: SyncSender<Input>,
    waker: LinkSender,
}

pub(super) fn inbox(waker: LinkSender) -> (Sender, Receiver<Input>) {
    let (queue, receiver) = sync_channel(INBOX);
    (Sender { queue, waker }, receiver)
}

impl Sender {
    /// Queues an input, waiting for room. False if the loop has ended.
    pub fn send(&self, input: Input) -> bool {
        let sent = self.queue.send(input).is_ok();
        self.waker.wake();
        sent
    }

    /// Queues an input if there is room.
    pub fn try_send(&self, input: Input) -> bool {
        let sent = !matches!(self.queue.try_send(input), Err(TrySendError::Full(_) | TrySendError::Disconnected(_)));
        self.waker.wake();
        sent
    }
}

/// The database's way into the cluster for one epoch.
pub(super) struct Proposer {
    pub epoch: u64,
    pub sender: Sender,
    pub log: RaftLog,
}

impl Replicator for Proposer {
    fn replicate(&self, part: Vec<u8>, last: bool) -> Result<u64, ReplicateError> {
        // What room it needs is made on this thread, which may wait for a slow disk: the consensus loop asks again, and decides.
        self.log.has_room([part.len()]);
        let (reply, answer) = sync_channel(1);
        let proposal = Proposal { epoch: self.epoch, part, last, reply };
        if !self.sender.try_send(Input::Propose(proposal)) {
            return Err(ReplicateError::Refused("the consensus loop takes no more proposals".to_owned()));
        }
        // The wait is bounded by the lease: when it lapses, the loop answers every waiting proposal.
        let gone = || ReplicateError::Unknown("the consensus loop ended while the transaction was waiting".to_owned());
        answer.recv().map_err(|_| gone())?
    }

    fn make_durable(&self) -> io::Result<()> {
        self.log.sync_written().map_err(io::Error::other)
    }
}

/// Proposals that are in the raft log and wait for a majority, oldest first.
#[derive(Default)]
pub(super) struct Waiting {
    queue: VecDeque<(u64, u64, SyncSender<Result<u64, ReplicateError>>)>,
}

impl Waiting {
    /// Takes in a proposal that got `index`. A part that is not the last one is only held back while too many are ahead.
    pub fn add(&mut self, index: u64, last: bool, reply: SyncSender<Result<u64, ReplicateError>>) {
        let release = if last { index } else { index.saturating_sub(PARTS_IN_FLIGHT) };
        self.queue.push_back((release, index, reply));
    }

    /// Answers everything that `committed` covers.
    pub fn release(&mut self, committed: u64) {
        while self.queue.front().is_some_and(|(release, _, _)| *release <= committed) {
            if let Some((_, index, reply)) = self.queue.pop_front() {
                let _ = reply.send(Ok(index)); // nobody waits any more: nothing to tell
            }
        }
    }

    /// The role is gone: the outcome of everything that waits is unknown here. Returns how many there were.
    pub fn fail(&mut self, why: &str) -> usize {
        let count = self.queue.len();
        for (_, _, reply) in self.queue.drain(..) {
            let _ = reply.send(Err(ReplicateError::Unknown(why.to_owned())));
        }
        count
    }
}
