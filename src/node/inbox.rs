//! How other threads reach the consensus loop: one bounded queue and a wake-up. Owns the waiting side of the commit
//! path: the [`Proposer`], in which SQLite's thread waits for a majority, and the proposals that [wait](Waiting). Must
//! never be used by the loop to wait for itself.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use thiserror::Error;
use tokio::sync::oneshot;

use super::{
    status::{CertificateStatus, SyncProgress},
    syncer::Done,
    warning::Warning,
};
use crate::{
    cluster::{self, Change, Membership, NodeId, limits::MAX_ENCODED, trust::Holdings},
    peer::LinkSender,
    storage::{
        ReplicateError, Replicator,
        database::DatabaseError,
        databases::Opened,
        raft_log::RaftLog,
        snapshot::{Manifest, Whole},
        transaction,
    },
    telemetry::steps::{self, Begun, Step},
};

/// Inputs that may wait for the loop; far more than there are threads that send them.
const INBOX: usize = 1024;
/// Parts of one long transaction that may wait for a majority at once: 8 MiB.
const PARTS_IN_FLIGHT: u64 = 8;
/// A transaction of several parts is given up when no majority has taken anything for this long. While it waits, nobody
/// else can write, and a restore keeps the Console closed.
pub(super) const STALLED: Duration = Duration::from_secs(30);

/// The raft index of a proposal's entry, and when the answer was given, while that is measured.
type Answer = (Result<u64, ReplicateError>, Begun);

/// Where the answer to a proposal goes.
pub(super) struct ProposalReply(SyncSender<Answer>);

impl ProposalReply {
    pub fn answer(self, result: Result<u64, ReplicateError>) {
        let _ = self.0.send((result, steps::begin())); // the caller may be gone
    }
}

/// What other threads can send to the loop.
pub(super) enum Input {
    Propose(Proposal),
    /// Answer once everything that was proposed so far is committed.
    Settle {
        reply: ProposalReply,
    },
    /// The sync thread has done what it was asked for.
    Synced(Done),
    Database(DatabaseEvent),
    HandOver {
        to: Option<NodeId>,
        done: oneshot::Sender<()>,
    },
    Change {
        change: Change,
        reply: ChangeReply,
    },
    Sync {
        node: NodeId,
        progress: Option<SyncProgress>,
    },
    Restart {
        why: String,
    },
    IgnorePause,
    Holds {
        holds: Holdings,
    },
    Snapshot(SnapshotRequest),
    Warning {
        about: Warning,
        text: Option<String>,
    },
    Certificates(Vec<CertificateStatus>),
    Stop,
}

/// A request for the whole database.
pub(super) struct SnapshotRequest {
    /// The member that it is for, if that member lost its memory and starts again with it.
    pub forgotten: Option<NodeId>,
    pub reply: oneshot::Sender<Result<(Manifest, Arc<Whole>), SnapshotError>>,
}

impl SnapshotRequest {
    pub fn answer(self, offer: Result<(Manifest, Arc<Whole>), SnapshotError>) {
        let _ = self.reply.send(offer); // the caller may be gone: dropping the offer frees the file
    }

    /// Answers with an error.
    pub fn refuse(self, why: SnapshotError) {
        self.answer(Err(why));
    }
}

/// Why a request for the whole database was refused.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// Ask the primary instead.
    #[error("this node is not primary")]
    NotPrimary,
    /// The node that asked may not have it now; the sentence says why.
    #[error("{0}")]
    Refused(String),
    /// Ask again in a moment.
    #[error("{0}: ask again")]
    Busy(&'static str),
    /// There is no space for the checkpoint with which a snapshot begins.
    #[error("the disk of the primary is full")]
    DiskFull,
    /// The raft log begins after the entry of the snapshot, or is damaged.
    #[error("its raft log has no entry {index}: {error}")]
    NoEntry { index: u64, error: raft::Error },
    /// The database file cannot be held at rest.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// The loop has ended.
    #[error("the node stops")]
    Stops,
}

/// Why a change of the membership was not made.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ChangeError {
    /// Only the primary changes the membership.
    #[error("this node is not primary")]
    NotPrimary,
    /// The change cannot be made; the sentence says why. Nothing was changed.
    #[error("{0}")]
    Impossible(String),
    /// Nothing was changed; try again in a moment.
    #[error("another change of the membership is under way: try again")]
    Busy,
    /// The change was proposed, but the role was lost before its outcome was known: read the membership again.
    #[error("the outcome is unknown: {0}")]
    Unknown(String),
}

impl From<cluster::ChangeError> for ChangeError {
    fn from(error: cluster::ChangeError) -> Self {
        match error {
            cluster::ChangeError::NotPrimary => Self::NotPrimary,
            cluster::ChangeError::Busy => Self::Busy,
            other => Self::Impossible(other.to_string()),
        }
    }
}

/// Where the answer to a change goes: the new membership.
pub(super) type ChangeReply = oneshot::Sender<Result<Arc<Membership>, ChangeError>>;

/// One part of a transaction, to be appended to the raft log.
pub(super) struct Proposal {
    pub epoch: u64,
    pub part: Vec<u8>,
    pub last: bool,
    /// True if its transaction has more parts than this one.
    pub long: bool,
    pub reply: ProposalReply,
    pub begun: Begun,
}

/// What the database thread reports.
pub(super) enum DatabaseEvent {
    /// These databases do not exist yet: the loop has to propose their first transactions.
    Empty {
        epoch: u64,
        databases: Vec<u32>,
    },
    Promoted {
        epoch: u64,
        databases: Opened,
    },
    /// Everything that the given demotion had to close is closed.
    Demoted {
        demotion: u64,
    },
    /// A database cannot be opened for writing, or failed in use; the node goes on as a secondary.
    Failed {
        epoch: u64,
        why: String,
    },
    /// The disk is too full to bring the databases up to date and open them for writing.
    NoSpace {
        epoch: u64,
    },
    /// This node's copy of the database cannot be trusted: nothing more is applied to it.
    Diverged {
        why: String,
    },
    /// A newer program has written the next entry of the raft log: nothing more is applied. What is here is good.
    Outdated {
        why: String,
    },
    /// The file of a database that is open for writing is damaged.
    Corrupt {
        why: String,
    },
    /// The database file rests for a snapshot, or the reason why it does not.
    Resting {
        resting: Result<Arc<Whole>, SnapshotError>,
        request: SnapshotRequest,
    },
    /// The process must end; a restart is safe.
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
        let sent = self.queue.try_send(input).is_ok();
        self.waker.wake();
        sent
    }
}

/// Through this, the databases of one epoch propose their transactions.
pub(super) struct Proposer {
    pub epoch: u64,
    pub sender: Sender,
    pub log: RaftLog,
}

impl Proposer {
    /// Asks the loop, and waits for its answer. The lease limits the wait: when it lapses, the loop answers everyone
    /// who waits. For a transaction of several parts, [`STALLED`] does as well.
    fn ask(&self, request: impl FnOnce(ProposalReply) -> Input) -> Result<u64, ReplicateError> {
        let (reply, answer) = sync_channel(1);
        let waits = steps::begin();
        if !self.sender.try_send(request(ProposalReply(reply))) {
            return Err(ReplicateError::Refused("the consensus loop takes no more proposals".to_owned()));
        }
        let gone = || ReplicateError::Unknown("the consensus loop ended while the transaction was waiting".to_owned());
        let (answer, answered) = answer.recv().map_err(|_| gone())?;
        answered.end(Step::CommitWake);
        waits.end(Step::CommitWait);
        answer
    }
}

impl Replicator for Proposer {
    fn replicate(&self, part: Vec<u8>, last: bool) -> Result<u64, ReplicateError> {
        let long = !last || transaction::continues(&part);
        if last && long {
            // Until its last part is proposed, a transaction that gets stuck can be given up safely.
            self.ask(|reply| Input::Settle { reply })?;
        }
        // This thread makes room in the raft log, because it may wait for a slow disk. The consensus loop checks again
        // without waiting, and decides. At most one change of the membership may come in between.
        self.log.has_room([MAX_ENCODED, part.len()]);
        self.ask(|reply| Input::Propose(Proposal { epoch: self.epoch, part, last, long, reply, begun: steps::begin() }))
    }

    fn make_durable(&self) -> io::Result<()> {
        self.log.sync_written().map_err(io::Error::other)
    }
}

/// What a waiting proposal is of its transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// A transaction of one part.
    Whole,
    /// A part that does not end its transaction. Without the last part it has no effect.
    Part,
    /// The last part of a transaction of several parts.
    Last,
}

struct Waiter {
    /// The answer is sent when this index is committed.
    release: u64,
    index: u64,
    piece: Piece,
    reply: ProposalReply,
    begun: Begun,
}

/// Proposals that are in the raft log and wait for a majority, oldest first. The lease of the primary limits the wait.
pub(super) struct Waiting {
    queue: VecDeque<Waiter>,
    /// The last proposed index, and the highest one that is known to be committed.
    proposed: u64,
    committed: u64,
    /// When an entry was last committed, or the first in the queue began to wait.
    last_progress: Instant,
}

impl Waiting {
    pub fn new(now: Instant) -> Self {
        Self { queue: VecDeque::new(), proposed: 0, committed: 0, last_progress: now }
    }

    /// Adds a proposal that got `index`. A part that is not the last one waits only while [`PARTS_IN_FLIGHT`] are ahead
    /// of it.
    pub fn add(&mut self, index: u64, piece: Piece, reply: ProposalReply, now: Instant) {
        let release = if piece == Piece::Part { index.saturating_sub(PARTS_IN_FLIGHT) } else { index };
        self.proposed = index;
        self.wait(Waiter { release, index, piece, reply, begun: steps::begin() }, now);
    }

    /// Answers once everything that was proposed so far is committed. Only for a transaction whose last part is still
    /// to come.
    pub fn settle(&mut self, reply: ProposalReply, now: Instant) {
        let index = self.proposed;
        if index <= self.committed {
            reply.answer(Ok(index));
        } else {
            self.wait(Waiter { release: index, index, piece: Piece::Part, reply, begun: Begun::default() }, now);
        }
    }

    fn wait(&mut self, waiter: Waiter, now: Instant) {
        if self.queue.is_empty() {
            self.last_progress = now;
        }
        self.queue.push_back(waiter);
    }

    /// Answers every proposal up to `committed`.
    pub fn release(&mut self, committed: u64, now: Instant) {
        if committed > self.committed {
            (self.committed, self.last_progress) = (committed, now);
        }
        while let Some(first) = self.queue.pop_front_if(|first| first.release <= committed) {
            first.begun.end(Step::CommitMajority);
            first.reply.answer(Ok(first.index));
        }
    }

    /// Gives up the transactions of several parts if no majority has taken anything for [`STALLED`]. True if there was
    /// one. Those that lack their last part never take effect and count as refused; the outcome of the others is
    /// unknown.
    pub fn give_up_stalled(&mut self, now: Instant) -> bool {
        let long = |waiter: &Waiter| waiter.piece != Piece::Whole;
        if now.duration_since(self.last_progress) < STALLED || !self.queue.iter().any(long) {
            return false;
        }
        let why = format!("no majority of the members has taken any of it for {} s", STALLED.as_secs());
        let (stalled, others): (VecDeque<_>, _) = std::mem::take(&mut self.queue).into_iter().partition(long);
        self.queue = others;
        for waiter in stalled {
            let why = why.clone();
            let error = match waiter.piece {
                Piece::Last => ReplicateError::Unknown(why),
                _ => ReplicateError::Refused(why),
            };
            waiter.reply.answer(Err(error));
        }
        true
    }

    /// The role is lost: everyone who waits gets [`ReplicateError::Unknown`]. Returns how many there were.
    pub fn fail(&mut self, why: &str) -> usize {
        // This node no longer learns when those are committed, so nobody may begin to wait for them.
        self.proposed = self.committed;
        let count = self.queue.len();
        for waiter in self.queue.drain(..) {
            waiter.reply.answer(Err(ReplicateError::Unknown(why.to_owned())));
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::TryRecvError;

    use super::*;

    struct Reply(Receiver<Answer>);

    impl Reply {
        fn try_recv(&self) -> Result<Result<u64, ReplicateError>, TryRecvError> {
            self.0.try_recv().map(|(answer, _)| answer)
        }
    }

    fn add(waiting: &mut Waiting, index: u64, piece: Piece, now: Instant) -> Reply {
        let (reply, answer) = sync_channel(1);
        waiting.add(index, piece, ProposalReply(reply), now);
        Reply(answer)
    }

    fn settle(waiting: &mut Waiting, now: Instant) -> Reply {
        let (reply, answer) = sync_channel(1);
        waiting.settle(ProposalReply(reply), now);
        Reply(answer)
    }

    #[test]
    fn parts_wait_only_while_too_many_are_ahead_and_the_end_waits_for_all() {
        let now = Instant::now();
        let mut waiting = Waiting::new(now);
        waiting.release(10, now);
        let first = add(&mut waiting, 11, Piece::Part, now);
        waiting.release(10, now);
        assert_eq!(first.try_recv().unwrap().unwrap(), 11);
        let far = add(&mut waiting, 19, Piece::Part, now);
        waiting.release(10, now);
        assert!(far.try_recv().is_err());
        waiting.release(11, now);
        assert!(far.try_recv().unwrap().is_ok());
        let settled = settle(&mut waiting, now);
        waiting.release(18, now);
        assert!(settled.try_recv().is_err(), "a part is not committed");
        waiting.release(19, now);
        assert!(settled.try_recv().unwrap().is_ok());
        assert!(settle(&mut waiting, now).try_recv().unwrap().is_ok(), "nothing to wait for");
        let last = add(&mut waiting, 20, Piece::Last, now);
        waiting.release(19, now);
        assert!(last.try_recv().is_err());
        waiting.release(20, now);
        assert_eq!(last.try_recv().unwrap().unwrap(), 20);
    }

    /// A writer that is between two parts when the role is lost must not hold the demotion up.
    #[test]
    fn nobody_waits_for_what_was_proposed_before_the_role_was_lost() {
        let now = Instant::now();
        let mut waiting = Waiting::new(now);
        let part = add(&mut waiting, 40, Piece::Part, now);
        assert_eq!(waiting.fail("the role was lost"), 1);
        assert!(matches!(part.try_recv().unwrap(), Err(ReplicateError::Unknown(_))));
        assert!(settle(&mut waiting, now).try_recv().unwrap().is_ok(), "its last part is refused at once");
    }

    #[test]
    fn a_long_transaction_that_comes_to_a_stand_is_given_up_and_a_short_one_waits() {
        let now = Instant::now();
        let mut waiting = Waiting::new(now);
        let whole = add(&mut waiting, 30, Piece::Whole, now);
        assert!(!waiting.give_up_stalled(now + 2 * STALLED), "it holds up only writers");
        let part = add(&mut waiting, 31, Piece::Part, now);
        // It is slow, but not stuck.
        waiting.release(20, now + STALLED);
        assert!(!waiting.give_up_stalled(now + STALLED + STALLED / 2));
        assert!(waiting.give_up_stalled(now + 2 * STALLED));
        assert!(matches!(part.try_recv().unwrap(), Err(ReplicateError::Refused(_))), "it never takes effect");
        assert!(whole.try_recv().is_err() && !waiting.give_up_stalled(now + 3 * STALLED));
        waiting.release(31, now + 3 * STALLED);
        assert!(whole.try_recv().unwrap().is_ok());
        // It begins to wait after a long time without work.
        let later = now + 10 * STALLED;
        let last = add(&mut waiting, 32, Piece::Last, later);
        assert!(!waiting.give_up_stalled(later + STALLED / 2));
        assert!(waiting.give_up_stalled(later + STALLED));
        assert!(matches!(last.try_recv().unwrap(), Err(ReplicateError::Unknown(_))), "its end may be in a raft log");
    }
}
