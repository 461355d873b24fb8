//! The thread that waits for the disk, so that the consensus loop need not: for entries, votes, and the configuration
//! that came into force. It has one slot: a later request covers the earlier ones, so the loop never waits for room,
//! however long a sync takes. Must never retry a failed sync, and never record who votes before it has written the
//! membership of the same entry. On a full disk that file stays behind: the raft log keeps the entry until it can be
//! written.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Instant,
};

use raft::eraftpb::ConfState;
use thiserror::Error;

use crate::{
    mutex::locked,
    scheduling,
    storage::{
        is_full,
        membership::StoredMembership,
        raft_log::{LogError, Pending, RaftLog},
    },
    telemetry::steps::{self, Begun, Step},
};

/// What came into force and has to be written: the newest of each.
#[derive(Default)]
pub(super) struct Keep {
    pub membership: Option<StoredMembership>,
    /// Who votes, with the raft index of the entry that says so.
    pub conf: Option<(ConfState, u64)>,
}

impl Keep {
    pub fn is_empty(&self) -> bool {
        self.membership.is_none() && self.conf.is_none()
    }

    fn cover(&mut self, newer: Self) {
        self.membership = newer.membership.or_else(|| self.membership.take());
        self.conf = newer.conf.or_else(|| self.conf.take());
    }
}

/// The outcome of a request.
pub(super) struct Done {
    /// Everything up to here is durable.
    pub number: u64,
    /// The request that this answers, with all before it.
    pub request: u64,
    pub result: Result<(), SyncError>,
    /// How long it took.
    pub micros: u64,
    /// None if there was nothing to keep.
    pub kept: Option<Kept>,
    /// When the loop was told of it, while that is measured.
    pub begun: Begun,
}

/// What could not be made durable. The process must end.
#[derive(Debug, Error)]
pub(super) enum SyncError {
    #[error("make the raft log durable: {0}")]
    Log(LogError),
    #[error("keep the membership: {0}")]
    Membership(io::Error),
    #[error("keep the configuration: {0}")]
    Votes(LogError),
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kept {
    /// Who votes; there was no membership to write.
    Votes,
    Membership,
    /// There was no space for the membership: its file is as before.
    Unwritten,
}

impl Kept {
    /// True if the membership in force is not in its file now. `before`: that was so before.
    pub fn is_unwritten(self, before: bool) -> bool {
        match self {
            Self::Votes => before,
            Self::Membership => false,
            Self::Unwritten => true,
        }
    }
}

/// What has to become durable next.
#[derive(Default)]
struct Request {
    id: u64,
    number: u64,
    /// The newest write that has to be on disk for it; `None` if nothing has to.
    pending: Option<Pending>,
    keep: Keep,
    /// When it was asked for, while that is measured.
    begun: Begun,
}

#[derive(Default)]
struct Slot {
    request: Mutex<Option<Request>>,
    filled: Condvar,
}

pub(super) struct Syncer {
    slot: Arc<Slot>,
    /// The last request, the last one that had something to write besides the log, and the last one that was answered.
    asked: u64,
    keeps: u64,
    done: u64,
    /// The number of the last request.
    number: u64,
}

impl Syncer {
    /// Starts the thread. It ends after a failed sync, or when `report` returns false. The membership is written to the
    /// folder `data`, and who votes to `log`.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(report: impl Fn(Done) -> bool + Send + 'static, data: PathBuf, log: RaftLog) -> io::Result<Self> {
        let slot = Arc::new(Slot::default());
        let worker = Worker { slot: Arc::clone(&slot), report, data, log };
        thread::Builder::new().name("raft-log-sync".to_owned()).spawn(move || {
            // A COMMIT and the answer of a member wait for this thread.
            scheduling::urgent();
            worker.run();
        })?;
        Ok(Self { slot, asked: 0, keeps: 0, done: 0, number: 0 })
    }

    /// True if nothing waits for the disk.
    pub fn is_idle(&self) -> bool {
        self.asked == self.done
    }

    /// Asks for everything up to `number` to become durable; `pending` is `None` if no write has to be on disk for it.
    /// `keep` is on disk before this or a later number is reported as durable.
    pub fn ask(&mut self, number: u64, pending: Option<Pending>, keep: Keep) {
        self.asked += 1;
        self.number = number;
        if !keep.is_empty() {
            self.keeps = self.asked;
        }
        let mut slot = locked(&self.slot.request);
        let request = slot.get_or_insert_default();
        (request.id, request.number) = (self.asked, number);
        if !request.begun.runs() {
            request.begun = steps::begin();
        }
        request.pending = pending.or_else(|| request.pending.take());
        request.keep.cover(keep);
        drop(slot);
        self.slot.filled.notify_one();
    }

    /// Tries again to write a membership for which there was no space.
    pub fn keep_again(&mut self, membership: StoredMembership) {
        self.ask(self.number, None, Keep { membership: Some(membership), conf: None });
    }

    /// Notes that a request was answered. True if nothing is left to write besides the log.
    pub fn note(&mut self, request: u64) -> bool {
        self.done = self.done.max(request);
        self.has_kept_all()
    }

    /// True if nothing is on its way to the disk besides writes of the log.
    pub fn has_kept_all(&self) -> bool {
        self.keeps <= self.done
    }
}

struct Worker<R> {
    slot: Arc<Slot>,
    report: R,
    data: PathBuf,
    log: RaftLog,
}

impl<R: Fn(Done) -> bool> Worker<R> {
    fn run(self) {
        loop {
            let empty = |request: &mut Option<Request>| request.is_none();
            let slot = &self.slot;
            let taken =
                slot.filled.wait_while(locked(&slot.request), empty).unwrap_or_else(PoisonError::into_inner).take();
            let Some(Request { id, number, pending, keep, mut begun }) = taken else { continue };
            begun.next(Step::SyncWake);
            let start = Instant::now();
            let kept = if keep.is_empty() { Ok(None) } else { self.write(keep).map(Some) };
            let synced = kept.and_then(|kept| {
                let sync = |pending: Pending| pending.sync().map_err(SyncError::Log);
                pending.map_or(Ok(()), sync).map(|()| kept)
            });
            begun.next(Step::SyncDisk);
            let micros = start.elapsed().as_micros() as u64;
            let (result, kept) = match synced {
                Ok(kept) => (Ok(()), kept),
                Err(error) => (Err(error), None),
            };
            let failed = result.is_err();
            let done = Done { number, request: id, result, micros, kept, begun };
            if !(self.report)(done) || failed {
                return;
            }
        }
    }

    /// Writes the membership first, then who votes: see [`crate::storage::membership`].
    fn write(&self, keep: Keep) -> Result<Kept, SyncError> {
        let kept = match keep.membership.map(|membership| membership.write(&self.data)) {
            None => Kept::Votes,
            Some(Ok(())) => Kept::Membership,
            Some(Err(error)) if is_full(&error) => Kept::Unwritten,
            Some(Err(error)) => return Err(SyncError::Membership(error)),
        };
        if let Some((conf, index)) = keep.conf {
            self.log.set_applied_conf(conf, index).map_err(SyncError::Votes)?;
        }
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::{
        cluster::{ClusterId, Member, Membership},
        storage::raft_log::{Options, RealDisk},
    };

    fn stored(index: u64) -> StoredMembership {
        let member = Member::founder(1, "n1", "127.0.0.1", 8086);
        StoredMembership { index, membership: Membership::founded(ClusterId(7), vec![member]) }
    }

    #[test]
    fn what_is_to_be_kept_is_down_when_it_is_reported_and_what_became_of_it_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let conf = |voters: &[u64]| ConfState { voters: voters.to_vec(), ..ConfState::default() };
        let owner = (ClusterId(7), 1);
        let options = Options { segment_bytes: 64 << 10, helper: false, ..Options::default() };
        let log = RaftLog::open(&folder.path().join("raft-log"), owner, conf(&[1]), options, RealDisk).unwrap();
        let (sender, receiver) = channel();
        let mut syncer =
            Syncer::start(move |done| sender.send(done).is_ok(), folder.path().to_owned(), log.clone()).unwrap();
        let mut ask = |keep: Keep| {
            let number = syncer.asked + 10;
            syncer.ask(number, None, keep);
            let kept_before = syncer.has_kept_all();
            let done = receiver.recv().unwrap();
            assert!(done.number == number && done.result.is_ok());
            (kept_before, syncer.note(done.request), done.kept)
        };
        assert_eq!(ask(Keep::default()), (true, true, None), "a sync alone");
        let votes = Keep { membership: None, conf: Some((conf(&[1, 2]), 3)) };
        assert_eq!(ask(votes), (false, true, Some(Kept::Votes)));
        assert_eq!(log.applied_conf(), (conf(&[1, 2]), 3));
        let both = Keep { membership: Some(stored(4)), conf: Some((conf(&[1]), 4)) };
        assert_eq!(ask(both), (false, true, Some(Kept::Membership)));
        assert_eq!(StoredMembership::read(folder.path()).unwrap(), Some(stored(4)));
        assert_eq!(log.applied_conf(), (conf(&[1]), 4));
    }

    #[test]
    fn a_keep_counts_as_on_its_way_until_its_own_request_is_reported() {
        let mut syncer = Syncer { slot: Arc::default(), asked: 0, keeps: 0, done: 0, number: 0 };
        syncer.ask(1, None, Keep::default());
        syncer.keep_again(stored(2));
        syncer.ask(2, None, Keep::default());
        assert!(!syncer.note(1), "the one before it");
        assert!(!syncer.has_kept_all());
        assert!(syncer.note(3), "one report answers for all before it");
        // A newer value stays when a later request has none.
        let request = locked(&syncer.slot.request).take().unwrap();
        assert_eq!((request.id, request.number, request.keep.membership), (3, 2, Some(stored(2))));
    }

    #[test]
    fn only_a_membership_that_was_written_ends_the_want_of_space_for_it() {
        let after = |kept: Kept| [false, true].map(|before| kept.is_unwritten(before));
        assert_eq!(after(Kept::Votes), [false, true]);
        assert_eq!(after(Kept::Unwritten), [true, true]);
        assert_eq!(after(Kept::Membership), [false, false]);
    }
}
