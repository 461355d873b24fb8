//! When the database thread makes a checkpoint, and what of the raft log goes behind one. Must never drop entries that
//! the last checkpoint lacks.

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

/// Pause between two checkpoints that only the length of the WAL calls for.
const LONG_WAL_PAUSE: Duration = Duration::from_secs(1);
/// Entries that stay in the raft log although everybody has them, and the share of its limit that they may take.
const KEPT_ENTRIES: u64 = 1000;
const KEPT_SHARE: u64 = 8;
/// While the database file rests for a snapshot, the WAL may grow to this many bytes, to four times the length that
/// calls for a checkpoint otherwise, or to the size of the database; then the snapshot has to be begun again.
const HELD_WAL: u64 = 1 << 30;
/// The raft log stays from a snapshot on for so long after it was read: the node that gets it has to restart with it.
const KEPT_FOR_SNAPSHOT: Duration = Duration::from_secs(60);

/// Why a checkpoint did not come about.
pub(super) enum Failure {
    /// The disk is full: a later one may.
    Full,
    /// The disk is not used any further, and the process must end.
    Fatal(String),
}

pub(super) struct Checkpoints {
    policy: CheckpointPolicy,
    log: RaftLog,
    shared: Arc<Shared>,
    saver: Saver,
    /// When the last checkpoint was tried, and how much had been appended then.
    last: (Instant, u64),
    /// The checkpoint that a snapshot was last seen to be read at, and until when the raft log behind it is kept.
    snapshot_at: Option<(u64, Instant)>,
    /// The disk is full.
    full: bool,
    /// The raft log is too long, and that was reported.
    overrun: bool,
    /// The raft log was to be compacted while the saver was busy.
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

    /// The disk is full, as far as was noted.
    pub fn is_full(&self) -> bool {
        self.full
    }

    pub fn note_full(&mut self, full: bool, databases: &Databases) {
        self.full = full;
        self.compact(databases);
    }

    /// True if one has to be begun. Not while a snapshot is being read, which may go on.
    pub fn is_due(&self, databases: &Databases) -> bool {
        let (at, before) = self.last;
        // A reader can keep the WAL long: then it is not tried again at once.
        let long = databases.wal_bytes() >= self.policy.bytes && at.elapsed() >= LONG_WAL_PAUSE;
        let due = long || self.appended() - before >= self.policy.bytes || at.elapsed() >= self.policy.interval;
        let held = databases.is_held() && !self.is_held_too_long(databases);
        due && !self.saver.is_busy() && databases.applied() > databases.checkpointed() && !held
    }

    /// A large database takes longer to send. A full disk needs what a checkpoint gives back.
    fn is_held_too_long(&self, databases: &Databases) -> bool {
        let limit = HELD_WAL.max(4 * self.policy.bytes).max(databases.file_bytes());
        self.full || databases.wal_bytes() >= limit
    }

    /// Whenever the thread looks for work: remembers a snapshot that is being read.
    pub fn watch_hold(&mut self, databases: &Databases) {
        if databases.is_held() {
            self.keep_for_snapshot(databases);
        }
    }

    fn keep_for_snapshot(&mut self, databases: &Databases) {
        self.snapshot_at = Some((databases.checkpointed(), Instant::now() + KEPT_FOR_SNAPSHOT));
    }

    /// The database rests at a checkpoint of this moment, for a snapshot.
    pub fn rests(&mut self, databases: &Databases) {
        self.last = (Instant::now(), self.appended());
        self.keep_for_snapshot(databases);
    }

    /// Begins one that is due.
    pub fn begin_due(&mut self, databases: &mut Databases) -> Result<(), Failure> {
        if databases.is_held() {
            let bytes = databases.wal_bytes();
            warn!(bytes, "the -wal file has grown too long while the database was read: whoever read it begins again");
        }
        self.last = (Instant::now(), self.appended());
        self.begin(databases)
    }

    /// The waits for the disk are left to the saver: a takeover would have to wait for them, too.
    pub fn begin(&mut self, databases: &mut Databases) -> Result<(), Failure> {
        let (savings, result) = databases.begin_checkpoint();
        if !savings.is_empty() {
            self.saver.begin(Task::Save(savings));
        } else if result.is_ok() {
            self.compact(databases);
        }
        result.map_err(|error| self.failed(&error, databases))
    }

    /// Takes what came of a task of the saver. True if a checkpoint is saved.
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
                    // Nothing was done; the next checkpoint tries again.
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
            self.compact(databases); // it may give space back
            return Failure::Full;
        }
        // Nothing is lost: the raft log has everything since the last good checkpoint. But a disk that fails to sync
        // is not used any further.
        Failure::Fatal(format!("checkpoint the database: {error}"))
    }

    /// Lets go of what neither this node's databases nor another member need. While a member is away, the raft log
    /// grows up to its limit, or until the disk is full; then that member has to be given the whole database.
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
        // A full disk lets go for a member that is really away, not for one that has just not answered yet.
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
                "the raft log is too long to be kept for a member that is away: it will get the whole database"
            );
            metrics::counter!(RAFT_LOG_OVERRUNS).increment(1);
        }
        self.overrun = too_long;
        self.saver.begin(Task::Compact { log: self.log.clone(), to });
    }

    /// Bytes ever appended to the raft log by this process.
    fn appended(&self) -> u64 {
        self.shared.appended.load(Ordering::Relaxed)
    }
}

/// The last entry that may go if none up to `unneeded` is needed. Entries differ in size, as many writes may share one:
/// a thousand large ones would be more than the whole limit.
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
