//! The database thread itself: compares the goal with where it is, and takes the next step. Must never apply what it does
//! not trust, nor drop entries of the raft log that its last checkpoint lacks.

use std::{
    io,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use raft::eraftpb::EntryType;
use tracing::{debug, info, warn};

use super::{
    CheckpointPolicy, Goal, Shared,
    copies::CopyRequest,
    lock,
    saver::{Outcome, Saver, Task},
};
use crate::{
    cluster::command,
    node::{
        disk::trouble,
        inbox::{DatabaseEvent, Input, Proposer, Sender},
        lease::boottime,
        scrub::{Finding, Scrub},
    },
    storage::{
        database::{ApplyError, Database, DatabaseError},
        raft_log::{LogError, RaftLog},
    },
    telemetry::{DAMAGE_FOUND, RAFT_LOG_OVERRUNS, SCRUB_FAILURES, note_now},
};

/// Every raft log begins as if everything up to here had been applied and compacted.
const ORIGIN: u64 = 1;
/// Pause between two checkpoints that only the length of the WAL calls for.
const LONG_WAL_PAUSE: Duration = Duration::from_secs(1);
/// Entries that stay in the raft log although everybody has them.
const KEPT_ENTRIES: u64 = 1000;
/// Pause before a database on a full disk is applied to again.
const FULL_PAUSE: Duration = Duration::from_millis(500);
/// While the database file rests for a snapshot, the WAL may grow to this many bytes, to four times the length that calls for a
/// checkpoint otherwise, or to the size of the database; then the snapshot has to be begun again.
const HELD_WAL: u64 = 1 << 30;
/// The raft log stays from a snapshot on for so long after it was read: the node that gets it has to restart with it.
const KEPT_FOR_SNAPSHOT: Duration = Duration::from_secs(60);
/// How often it is tried to begin a scrub that is due.
const SCRUB_LOOK: Duration = Duration::from_millis(100);
/// Entries applied between two looks at the goal.
const SLICE: u64 = 256;

pub(super) struct Worker {
    database: Database,
    log: RaftLog,
    sender: Sender,
    shared: Arc<Shared>,
    deadline: Duration,
    checkpoints: CheckpointPolicy,
    /// When the last checkpoint was tried, and how much had been appended then.
    checkpointed: (Instant, u64),
    /// The epoch in which the database is open for writing.
    epoch: Option<u64>,
    reported_empty: u64,
    /// The epoch in which opening failed: not tried again in it.
    refused: u64,
    reported_demotion: u64,
    /// How many requests for a snapshot have been answered.
    snapshots: u64,
    /// How many requests about copies have been answered.
    copies: u64,
    /// The checkpoint that a snapshot was last seen to be read at, and until when the raft log behind it is kept.
    snapshot_at: Option<(u64, Instant)>,
    /// The raft log is too long, and that was reported.
    overrun: bool,
    /// The disk is full, and that was looked at.
    full: bool,
    /// Its content is not to be trusted: nothing is applied any more.
    broken: bool,
    /// The process was asked to end; nothing more happens here.
    ended: bool,
    scrub: Scrub,
    /// How many answers of the scrub were seen.
    scrubbed: u64,
    saver: Saver,
    /// How many tasks of the saver were over when it was looked at last.
    saved: u64,
    /// The raft log was to be compacted while the saver was busy.
    compaction_due: bool,
    /// The disk is full: nothing is applied before then.
    full_until: Option<Instant>,
    told_full: bool,
}

/// How long a checkpoint waits for the loop, which hands out what the file has already.
const LOOP_IS_BEHIND: Duration = Duration::from_millis(500);
/// How often it looks.
const MOMENT: Duration = Duration::from_millis(2);

/// Whether a checkpoint at `index` may count. A write is in the file as soon as a majority has it, which can be before the loop
/// comes by it, and by a change of the members before it: the checkpoint must not leave that out.
fn may_save(shared: &Shared, index: u64) -> bool {
    let end = Instant::now() + LOOP_IS_BEHIND;
    let mut goal = lock(shared);
    while goal.applied < index && !goal.stop && Instant::now() < end {
        // The loop wakes nobody for a single commit.
        goal = shared.changed.wait_timeout(goal, MOMENT).unwrap_or_else(PoisonError::into_inner).0;
    }
    goal.applied >= index && !goal.pinned
}

/// A membership is on its way to its file: that takes moments, unless the disk is full.
fn waits_for_pin(goal: &Goal) -> bool {
    goal.pinned && !goal.full
}

impl Worker {
    pub fn new(
        mut database: Database,
        log: RaftLog,
        sender: Sender,
        shared: Arc<Shared>,
        deadline: Duration,
        checkpoints: CheckpointPolicy,
    ) -> io::Result<Self> {
        let goal = Arc::clone(&shared);
        database.save_if(move |index| may_save(&goal, index));
        let (reader, saver) = (Arc::clone(&shared), Arc::clone(&shared));
        let saver = Saver::start(move || {
            lock(&saver).saved += 1;
            saver.changed.notify_one();
        })?;
        let scrub = Scrub::start(checkpoints.scrub, move || {
            lock(&reader).scrubbed += 1;
            reader.changed.notify_one();
        })?;
        let broken = database.distrusted().is_some();
        Ok(Self {
            scrub,
            scrubbed: 0,
            saver,
            saved: 0,
            compaction_due: false,
            checkpointed: (Instant::now(), 0),
            database,
            log,
            sender,
            shared,
            deadline,
            checkpoints,
            epoch: None,
            reported_empty: 0,
            refused: 0,
            reported_demotion: 0,
            snapshots: 0,
            copies: 0,
            snapshot_at: None,
            overrun: false,
            full: false,
            broken,
            ended: false,
            full_until: None,
            told_full: false,
        })
    }

    pub fn run(mut self) {
        if let Some(why) = self.database.distrusted().map(str::to_owned) {
            self.mistrust(why);
        }
        loop {
            let goal = self.wait();
            if goal.stop {
                return self.close();
            }
            if self.ended {
                return;
            }
            if self.epoch.is_some() && self.epoch != goal.epoch {
                self.demote(&goal);
            } else if self.epoch.is_some() {
                self.database.note_committed(goal.applied);
            } else if self.behind(&goal) {
                if self.pause().is_none() {
                    self.apply(goal.applied);
                } else {
                    self.refuse_while_full(&goal);
                }
            } else if let Some(epoch) = goal.epoch.filter(|epoch| *epoch != self.refused) {
                self.promote(epoch);
            }
            self.report_demotion(&goal);
            self.shared.applied.store(self.database.applied(), Ordering::Relaxed);
            if goal.snapshots != self.snapshots && !waits_for_pin(&goal) {
                self.snapshots = goal.snapshots;
                self.rest(goal.pinned);
            }
            if goal.saved != self.saved {
                self.saved = goal.saved;
                while let Some(outcome) = self.saver.poll() {
                    self.note(outcome);
                }
            }
            if goal.full != self.full {
                self.full = goal.full;
                self.compact();
            }
            if goal.copies != self.copies {
                self.copies = goal.copies;
                self.copy();
            }
            if !goal.pinned {
                self.checkpoint_if_due();
            }
            self.scrub(&goal);
            self.measure();
        }
    }

    /// Lets a scrub go on, when there is nothing more important to do.
    fn scrub(&mut self, goal: &Goal) {
        self.scrubbed = goal.scrubbed;
        // A scrub of the PRIMARY's file begins with a checkpoint, which must not be while checkpoints are pinned, nor beside another.
        let kept = (goal.pinned || self.saver.is_busy()) && self.epoch.is_some();
        if self.broken || self.ended || kept || self.behind(goal) || self.epoch != goal.epoch {
            return;
        }
        match self.scrub.turn(&mut self.database) {
            Finding::Nothing => {}
            Finding::Clean => {
                self.sender.send(Input::Warning { about: "scrub", text: None });
            }
            Finding::Rot(why) => {
                metrics::counter!(SCRUB_FAILURES).increment(1);
                note_now(DAMAGE_FOUND);
                if self.epoch.is_some() {
                    // Whether another node can take over, the loop knows.
                    self.report(DatabaseEvent::Rotten { why });
                } else {
                    self.mistrust(why);
                }
            }
        }
    }

    fn measure(&self) {
        self.shared.bytes.store(self.database.file_bytes(), Ordering::Relaxed);
        let saved = self.database.applied() <= self.database.checkpointed();
        if saved {
            self.shared.unsaved.store(0, Ordering::Relaxed);
        } else if self.shared.unsaved.load(Ordering::Relaxed) == 0 {
            self.shared.unsaved.store(boottime(), Ordering::Relaxed);
        }
    }

    /// Closed is enough: what is behind is applied before the next promotion.
    fn report_demotion(&mut self, goal: &Goal) {
        if self.epoch.is_none() && goal.demotion != self.reported_demotion {
            self.reported_demotion = goal.demotion;
            self.report(DatabaseEvent::Demoted { demotion: goal.demotion });
        }
    }

    fn report(&self, event: DatabaseEvent) {
        self.sender.send(Input::Database(event));
    }

    fn fatal(&mut self, why: String) {
        self.ended = true;
        self.report(DatabaseEvent::Fatal { why });
    }

    fn behind(&self, goal: &Goal) -> bool {
        !self.broken && self.database.applied().max(ORIGIN) < goal.applied
    }

    /// How long nothing is applied yet because the disk is full.
    fn pause(&self) -> Option<Duration> {
        self.full_until.and_then(|until| until.checked_duration_since(Instant::now())).filter(|left| !left.is_zero())
    }

    /// What the new primary needs cannot be applied here now: another node may have the space.
    fn refuse_while_full(&mut self, goal: &Goal) {
        if let Some(epoch) = goal.epoch.filter(|epoch| *epoch != self.refused) {
            self.refused = epoch;
            self.report(DatabaseEvent::Failed { epoch, why: "the disk is full".to_owned() });
        }
    }

    fn note_full(&mut self, what: &str) {
        if !std::mem::replace(&mut self.told_full, true) {
            warn!("the disk is full: {what} waits until there is space");
        }
    }

    /// Waits until there is something to do, or a checkpoint is due.
    fn wait(&self) -> Goal {
        let mut goal = lock(&self.shared);
        // What cannot be begun now is not asked for without a pause.
        let scrub = if self.broken { Duration::MAX } else { self.scrub.due_in().max(SCRUB_LOOK) };
        loop {
            let pause = if self.behind(&goal) { self.pause() } else { None };
            let idle = match goal.epoch {
                _ if goal.stop || goal.demotion != self.reported_demotion => false,
                _ if goal.snapshots != self.snapshots && !waits_for_pin(&goal) => false,
                _ if goal.copies != self.copies => false,
                _ if goal.scrubbed != self.scrubbed || goal.full != self.full || goal.saved != self.saved => false,
                _ if self.epoch != goal.epoch && self.epoch.is_some() => false,
                Some(epoch) if pause.is_some() => epoch == self.refused,
                None if pause.is_some() => true,
                Some(epoch) if self.epoch.is_none() => {
                    let waits = self.reported_empty == epoch && self.database.is_empty();
                    !self.behind(&goal) && (waits || self.refused == epoch)
                }
                _ => !self.behind(&goal),
            };
            if !idle {
                return *goal;
            }
            let (guard, time) = self
                .shared
                .changed
                .wait_timeout(goal, pause.unwrap_or(self.checkpoints.interval).min(scrub))
                .unwrap_or_else(PoisonError::into_inner);
            goal = guard;
            if time.timed_out() {
                return *goal;
            }
        }
    }

    /// Applies a slice of the raft log, so that a change of the goal is seen soon.
    fn apply(&mut self, goal: u64) {
        let first = (self.database.applied() + 1).max(ORIGIN + 1);
        let last = goal.min(first + SLICE);
        let Self { database, log, shared, .. } = self;
        let mut failed = None;
        let result = log.entries_between(first, last, &mut |entry| {
            let applied = if entry.get_entry_type() == EntryType::EntryNormal && !entry.data.is_empty() {
                let parts = command::parts_at_end(&entry.data).filter(|parts| *parts > 1).unwrap_or(0);
                shared.finishing.store(u64::from(parts), Ordering::Relaxed);
                let applied = database.apply(entry.index, entry.term, &entry.data, log);
                shared.finishing.store(0, Ordering::Relaxed);
                applied
            } else {
                database.apply_empty(entry.index, entry.term)
            };
            applied.map_err(|error| {
                failed = Some(error);
                io::Error::other("see the error that was kept")
            })
        });
        match (failed, result) {
            (None, Ok(())) => {
                if self.full_until.take().is_some() && std::mem::take(&mut self.told_full) {
                    info!("the database is applied to again: there is space on the disk");
                }
            }
            (Some(error), _) if error.is_full() => {
                self.full_until = Some(Instant::now() + FULL_PAUSE);
                self.note_full("applying to the database");
            }
            // Another start from the checkpoint would end the same way: the copy is wrong, or this program too old for it.
            (
                Some(
                    error @ (ApplyError::Diverged { .. } | ApplyError::Command { .. } | ApplyError::OutOfOrder { .. }),
                ),
                _,
            ) => {
                self.mistrust(error.to_string());
            }
            (Some(error), _) => self.fatal(format!("apply the raft log to the database: {error}")),
            (None, Err(error)) => self.fatal(format!("read the raft log from {first} to {last}: {error}")),
        }
    }

    fn mistrust(&mut self, why: String) {
        self.broken = true;
        self.report(DatabaseEvent::Diverged { why });
    }

    fn promote(&mut self, epoch: u64) {
        if self.broken {
            self.refused = epoch;
            let why = "this copy of the database is not to be trusted".to_owned();
            return self.report(DatabaseEvent::Failed { epoch, why });
        }
        if self.database.is_empty() {
            if self.reported_empty != epoch {
                self.reported_empty = epoch;
                self.report(DatabaseEvent::Empty { epoch });
            }
            return;
        }
        let proposer = Proposer { epoch, sender: self.sender.clone(), log: self.log.clone() };
        match self.database.promote(epoch, Arc::new(proposer)) {
            Ok(database) => {
                self.epoch = Some(epoch);
                self.report(DatabaseEvent::Promoted { epoch, database });
            }
            Err(error @ DatabaseError::Diverged { .. }) => self.mistrust(error.to_string()),
            Err(error) => {
                self.refused = epoch;
                self.report(DatabaseEvent::Failed { epoch, why: format!("open the database for writing: {error}") });
            }
        }
    }

    /// The next primary waits for the closing, not for the reading of a large file behind it.
    fn demote(&mut self, goal: &Goal) {
        let start = Instant::now();
        let ms = |start: Instant| start.elapsed().as_millis() as u64;
        while let Err(error) = self.database.close(Instant::now() + self.deadline) {
            // Another process could not close it sooner, and this one can say what it waits for. The others go on meanwhile.
            let Some(trouble) = trouble() else {
                return self.fatal(format!("close the database within {} ms: {error}", self.deadline.as_millis()));
            };
            warn!("the database cannot be closed yet: {trouble}");
        }
        let closed_ms = ms(start);
        self.epoch = None;
        // Behind again: others should rather be primary until the file is read and the raft log re-applied.
        self.shared.applied.store(self.database.applied(), Ordering::Relaxed);
        self.report_demotion(goal);
        let stops = || lock(&self.shared).stop;
        match self.database.reopen(&|| !stops()) {
            Ok(()) => {
                let (index, ms) = (self.database.applied(), ms(start));
                info!(index, closed_ms, ms, "database closed, raft log is re-applied from its checkpoint");
            }
            Err(_) if stops() => info!(closed_ms, "database closed; the next start reads it again"),
            Err(error) => self.fatal(format!("go back to the checkpoint of the database: {error}")),
        }
    }

    fn checkpoint_if_due(&mut self) {
        let (at, before) = self.checkpointed;
        let appended = self.shared.appended.load(Ordering::Relaxed);
        // A reader can keep the WAL long: then it is not tried again at once.
        let long = self.database.wal_bytes() >= self.checkpoints.bytes && at.elapsed() >= LONG_WAL_PAUSE;
        let due = long || appended - before >= self.checkpoints.bytes || at.elapsed() >= self.checkpoints.interval;
        let able = !self.broken && !self.saver.is_busy();
        if due && able && self.database.applied() > self.database.checkpointed() && !self.is_held() {
            self.checkpointed = (Instant::now(), appended);
            self.begin_checkpoint();
        }
    }

    /// A snapshot is being read, and may go on.
    fn is_held(&mut self) -> bool {
        if !self.database.is_held() {
            return false;
        }
        self.snapshot_at = Some((self.database.checkpointed(), Instant::now() + KEPT_FOR_SNAPSHOT));
        let bytes = self.database.wal_bytes();
        // A large database takes longer to send. A full disk needs what a checkpoint gives back.
        let too_long = self.full || bytes >= HELD_WAL.max(4 * self.checkpoints.bytes).max(self.database.file_bytes());
        if too_long {
            warn!(bytes, "the -wal file has grown too long while the database was read: whoever read it begins again");
        }
        !too_long
    }

    /// Answers everybody who wants to read the database file.
    fn rest(&mut self, pinned: bool) {
        let replies = std::mem::take(&mut *self.shared.snapshots.lock().unwrap_or_else(PoisonError::into_inner));
        for reply in replies {
            if pinned {
                let resting = Err("the disk of the primary is full".to_owned());
                self.report(DatabaseEvent::Resting { resting, reply });
                continue;
            }
            self.settle();
            let result = self.database.rest();
            if result.is_ok() {
                let appended = self.shared.appended.load(Ordering::Relaxed);
                self.checkpointed = (Instant::now(), appended);
                self.snapshot_at = Some((self.database.checkpointed(), Instant::now() + KEPT_FOR_SNAPSHOT));
            }
            match result {
                // On a full disk nobody gets a snapshot; that is no reason to end the primary.
                Err(error @ (DatabaseError::Io { .. } | DatabaseError::Failed(_))) if !error.is_full() => {
                    return self.fatal(format!("checkpoint the database: {error}"));
                }
                result => {
                    let resting = result.map_err(|error| error.to_string());
                    self.report(DatabaseEvent::Resting { resting, reply });
                }
            }
        }
    }

    /// Answers everybody who makes a copy. Whoever does not wait any more asks again.
    fn copy(&mut self) {
        let requests = std::mem::take(&mut *self.shared.copies.lock().unwrap_or_else(PoisonError::into_inner));
        for request in requests {
            match request {
                CopyRequest::Begin(reply) => drop(reply.send(self.database.begin_copy())),
                CopyRequest::Finish(copy, reply) => drop(reply.send(self.database.finish_copy(&copy))),
            }
        }
    }

    /// The waits for the disk are left to the saver: a takeover would have to wait for them, too.
    fn begin_checkpoint(&mut self) {
        match self.database.begin_checkpoint() {
            Ok((_, Some(saving))) => self.saver.begin(Task::Save(saving)),
            Ok((_, None)) => self.compact(),
            Err(error) => self.checkpoint_failed(&error),
        }
    }

    /// Takes what came of a task of the saver.
    fn note(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Saved(saved) => match self.database.saved(saved) {
                Ok(()) => {
                    self.told_full &= self.full_until.is_some();
                    self.compact();
                }
                Err(error) => self.checkpoint_failed(&error),
            },
            Outcome::Compacted { to, result } => {
                match result {
                    Ok(()) => debug!(index = to, bytes = self.log.size_bytes(), "raft log compacted"),
                    // Nothing was done; the next checkpoint tries again.
                    Err(LogError::Full { .. } | LogError::Refused(_)) => {}
                    Err(error) => return self.fatal(format!("compact the raft log: {error}")),
                }
                if std::mem::take(&mut self.compaction_due) {
                    self.compact();
                }
            }
        }
    }

    /// Waits for the saver.
    fn settle(&mut self) {
        while let Some(outcome) = self.saver.wait() {
            self.note(outcome);
        }
    }

    fn checkpoint_failed(&mut self, error: &DatabaseError) {
        if error.is_full() {
            self.compact(); // it may give space back
            return self.note_full("the checkpoint of the database");
        }
        // Nothing is lost: the raft log has everything since the last good checkpoint. But a disk that fails to sync
        // is not used any further.
        self.fatal(format!("checkpoint the database: {error}"));
    }

    /// Lets go of what neither this node's database nor another member needs. While a member is away, the raft log grows
    /// up to its limit, or until the disk is full; then that member has to be given the whole database.
    fn compact(&mut self) {
        self.compaction_due = self.saver.is_busy();
        if self.compaction_due {
            return;
        }
        let released = lock(&self.shared).released;
        let snapshot =
            self.snapshot_at.filter(|(_, until)| Instant::now() < *until).map_or(u64::MAX, |(index, _)| index);
        let possible = self.database.checkpointed().min(snapshot).saturating_sub(KEPT_ENTRIES);
        let kind = released.saturating_sub(KEPT_ENTRIES);
        // A full disk lets go for a member that is really away, not for one that has just not answered yet.
        let full = self.full && kind + KEPT_ENTRIES < possible;
        let too_long = full || self.log.size_bytes() > self.checkpoints.raft_log_limit && kind < possible;
        let to = if too_long { possible } else { kind.min(possible) };
        if to < self.log.first_index() + KEPT_ENTRIES {
            return; // not worth a write
        }
        if too_long && !self.overrun {
            let limit = self.checkpoints.raft_log_limit;
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

    fn close(&mut self) {
        if self.epoch.is_some() {
            let goal = *lock(&self.shared);
            self.demote(&goal);
        }
        let pinned = lock(&self.shared).pinned;
        let closed = self.epoch.is_some() || self.database.is_closed();
        self.settle();
        if !closed && !self.broken && !self.database.is_empty() && !pinned {
            self.begin_checkpoint();
            self.settle();
        } else if self.broken {
            warn!("the database is left as it is: it needs to be restored");
        }
    }
}
