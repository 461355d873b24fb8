//! Decides when the database thread makes a checkpoint, and which entries of the raft log go after one. Must never drop
//! entries that the last checkpoint lacks.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tracing::{debug, warn};

use super::{
    CheckpointPolicy, Shared,
    saver::{Outcome, Saver, Task},
};
use crate::{
    storage::{
        database::DatabaseError,
        databases::Databases,
        raft_log::{LogError, RaftLog},
    },
    telemetry::RAFT_LOG_OVERRUNS,
};

/// Least time between two checkpoints that are due only because of the length of the WAL.
const LONG_WAL_PAUSE: Duration = Duration::from_secs(1);
/// How many entries stay in the raft log although all members have them, and the part of its limit that they may take.
const KEPT_ENTRIES: u64 = 1000;
const KEPT_SHARE: u64 = 8;
/// While the database file rests for a snapshot, the WAL may grow to the largest of three lengths: this many bytes,
/// four times the length at which a checkpoint is due, or the size of the database. Then the snapshot has to start
/// again.
const HELD_WAL: u64 = 1 << 30;
/// How long the raft log behind a snapshot is kept after the snapshot was read: the node that gets it has to restart
/// with it.
const KEPT_FOR_SNAPSHOT: Duration = Duration::from_secs(60);

/// Why there is no checkpoint.
pub(super) enum Failure {
    /// The disk is full: try again later.
    Full,
    /// The disk must not be used any more, and the process must end.
    Fatal(String),
}

pub(super) struct Checkpoints {
    policy: CheckpointPolicy,
    log: RaftLog,
    shared: Arc<Shared>,
    saver: Saver,
    /// When the last checkpoint was tried, and how many bytes had been appended by then.
    last: (Instant, u64),
    /// The checkpoint of the snapshot that was last being read, and until when the raft log behind it is kept.
    snapshot_at: Option<(u64, Instant)>,
    /// The disk is full.
    full: bool,
    /// The raft log is too long, and that was logged.
    overrun: bool,
    /// The raft log has to be compacted once the saver is free.
    compaction_due: bool,
}

impl Checkpoints {
    pub fn start(policy: CheckpointPolicy, log: RaftLog, shared: Arc<Shared>) -> io::Result<Self> {
        let answers = Arc::clone(&shared);
        let saver = Saver::start(move |outcome| answers.answer(|mailbox| mailbox.saved = Some(outcome)))?;
        let last = (Instant::now(), 0);
        let (snapshot_at, full, overrun, compaction_due) = (None, false, false, false);
        Ok(Self { policy, log, shared, saver, last, snapshot_at, full, overrun, compaction_due })
    }

    pub fn is_saving(&self) -> bool {
        self.saver.is_busy()
    }

    /// Has what is being saved take no more rests: somebody waits for it.
    pub fn hurry(&self) {
        self.saver.hurry();
    }

    /// True if the disk is full, by the last [`Self::note_full`].
    pub fn is_full(&self) -> bool {
        self.full
    }

    pub fn note_full(&mut self, full: bool, databases: &Databases) {
        self.full = full;
        self.compact(databases);
    }

    /// True if a checkpoint has to begin. A snapshot that is being read delays it, unless that takes too long.
    pub fn is_due(&self, databases: &Databases) -> bool {
        let (at, before) = self.last;
        // A reader can keep the WAL long, so it is not tried again at once.
        let long = databases.wal_bytes() >= self.policy.bytes && at.elapsed() >= LONG_WAL_PAUSE;
        let due = long || self.appended() - before >= self.policy.bytes || at.elapsed() >= self.policy.interval;
        let held = databases.is_held() && !self.is_held_too_long(databases);
        due && !self.saver.is_busy() && databases.applied() > databases.checkpointed() && !held
    }

    /// A large database takes longer to send, so its WAL may grow longer. A full disk needs the space that a checkpoint
    /// frees.
    fn is_held_too_long(&self, databases: &Databases) -> bool {
        let limit = HELD_WAL.max(4 * self.policy.bytes).max(databases.file_bytes());
        self.full || databases.wal_bytes() >= limit
    }

    /// Called whenever the thread looks for work: notes that a snapshot is being read.
    pub fn watch_hold(&mut self, databases: &Databases) {
        if databases.is_held() {
            self.keep_for_snapshot(databases);
        }
    }

    fn keep_for_snapshot(&mut self, databases: &Databases) {
        self.snapshot_at = Some((databases.checkpointed(), Instant::now() + KEPT_FOR_SNAPSHOT));
    }

    /// Notes that the database rests for a snapshot, at a checkpoint that was just made.
    pub fn rests(&mut self, databases: &Databases) {
        self.last = (Instant::now(), self.appended());
        self.keep_for_snapshot(databases);
    }

    /// Begins a checkpoint that is due.
    pub fn begin_due(&mut self, databases: &mut Databases) -> Result<(), Failure> {
        if databases.is_held() {
            let bytes = databases.wal_bytes();
            warn!(bytes, "the -wal file has grown too long during a snapshot, which has to start again");
        }
        self.last = (Instant::now(), self.appended());
        self.begin(databases)
    }

    /// Begins a checkpoint. The saver waits for the disk; otherwise a takeover would have to wait for it too.
    pub fn begin(&mut self, databases: &mut Databases) -> Result<(), Failure> {
        let (savings, result) = databases.begin_checkpoint();
        if !savings.is_empty() {
            self.saver.begin(Task::Save(savings));
        } else if result.is_ok() {
            self.compact(databases);
        }
        result.map_err(|error| self.failed(&error, databases))
    }

    /// Takes the outcome of a task of the saver. True if it saved a checkpoint.
    pub fn take(&mut self, outcome: Outcome, databases: &mut Databases) -> Result<bool, Failure> {
        self.saver.taken();
        match outcome {
            Outcome::Saved(saved) => {
                databases.saved(saved).map_err(|error| self.failed(&error, databases))?;
                self.compact(databases);
                Ok(true)
            }
            Outcome::Compacted { to, result } => {
                match result {
                    Ok(()) => debug!(index = to, bytes = self.log.size_bytes(), "raft log compacted"),
                    // Nothing was done. The next checkpoint tries again.
                    Err(LogError::Full { .. } | LogError::Refused(_)) => {}
                    Err(error) => return Err(Failure::Fatal(format!("compact the raft log: {error}"))),
                }
                if std::mem::take(&mut self.compaction_due) {
                    self.compact(databases);
                }
                Ok(false)
            }
        }
    }

    fn failed(&mut self, error: &DatabaseError, databases: &Databases) -> Failure {
        if error.is_full() {
            self.compact(databases); // it may free space
            return Failure::Full;
        }
        // Nothing is lost: the raft log has everything since the last good checkpoint. But a disk that fails to sync
        // must not be used any more.
        Failure::Fatal(format!("checkpoint the database: {error}"))
    }

    /// Drops entries that neither this node's databases nor another member need. While a member is away, the raft log
    /// grows up to its limit, or until the disk is full. Then that member needs the whole database.
    fn compact(&mut self, databases: &Databases) {
        self.compaction_due = self.saver.is_busy();
        if self.compaction_due {
            return;
        }
        let released = self.shared.lock().goal.released;
        let snapshot =
            self.snapshot_at.filter(|(_, until)| Instant::now() < *until).map_or(u64::MAX, |(index, _)| index);
        let unneeded = databases.checkpointed().min(snapshot);
        let share = self.policy.raft_log_limit / KEPT_SHARE;
        let possible = below_the_kept(&self.log, unneeded, share);
        let unneeded_by_all = below_the_kept(&self.log, unneeded.min(released), share);
        // A full disk drops what a member needs only if that member is really away, not just late with an answer.
        let full = self.full && released.saturating_add(KEPT_ENTRIES) < unneeded;
        let too_long = full || self.log.size_bytes() > self.policy.raft_log_limit && unneeded_by_all < possible;
        let to = if too_long { possible } else { unneeded_by_all.min(possible) };
        let first = self.log.first_index();
        let little = self.log.bytes_between(first - 1, to).is_none_or(|bytes| bytes < share);
        if to < first || to < first + KEPT_ENTRIES && little {
            return; // not worth a write
        }
        if too_long && !self.overrun {
            let limit = self.policy.raft_log_limit;
            warn!(
                index = to,
                limit,
                full,
                "the raft log is too long to be kept for a member that is away: that member will get the whole database"
            );
            metrics::counter!(RAFT_LOG_OVERRUNS).increment(1);
        }
        self.overrun = too_long;
        self.saver.begin(Task::Compact { log: self.log.clone(), to });
    }

    /// Bytes that this process has appended to the raft log.
    fn appended(&self) -> u64 {
        self.shared.appended.load(Ordering::Relaxed)
    }
}

/// The last entry to drop if none up to `unneeded` is needed: keeps at most [`KEPT_ENTRIES`], of `bytes` at most.
/// Entries differ in size, because many writes may share one: a thousand large ones could be more than the whole limit.
fn below_the_kept(log: &RaftLog, unneeded: u64, bytes: u64) -> u64 {
    let fits = |after: u64| log.bytes_between(after, unneeded).is_none_or(|between| between <= bytes);
    let (mut low, mut high) = (unneeded.saturating_sub(KEPT_ENTRIES), unneeded);
    low = low.max(log.first_index() - 1).min(high);
    while low < high {
        let middle = low + (high - low) / 2;
        if fits(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    high
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::{ConfState, Entry};

    use super::*;
    use crate::{
        cluster::ClusterId,
        storage::raft_log::{Options, RealDisk},
    };

    #[test]
    fn what_is_kept_for_nobody_is_bounded_in_entries_and_in_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let conf = ConfState { voters: vec![1], ..ConfState::default() };
        let log = RaftLog::open(dir.path(), (ClusterId(1), 1), conf, Options::default(), RealDisk).unwrap();
        let entry = |index, length| Entry { index, term: 1, data: vec![0; length].into(), ..Entry::default() };
        let small: Vec<_> = (2..=2501).map(|index| entry(index, 10)).collect();
        let large: Vec<_> = (2502..=2601).map(|index| entry(index, 10_000)).collect();
        log.append(&[small, large].concat(), None).unwrap();
        assert_eq!(below_the_kept(&log, 2501, 1 << 20), 1501, "as many as there may be");
        let kept = 2601 - below_the_kept(&log, 2601, 100_000);
        assert!((8..=10).contains(&kept), "{kept} large ones");
        assert_eq!(below_the_kept(&log, 2601, 100), 2601, "none that is too large");
        assert_eq!(below_the_kept(&log, 500, 1 << 20), 1, "no more than there are");
        assert_eq!(below_the_kept(&log, 0, 1 << 20), 0);
    }
}
