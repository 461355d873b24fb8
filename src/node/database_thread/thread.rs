//! The database thread itself: waits until there is a step ([`Standing::next`]), and carries it out. Must never apply
//! what it does not trust.

use std::{
    io,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use raft::eraftpb::EntryType;
use tracing::{info, warn};

use super::{
    CheckpointPolicy, Goal, Shared,
    checkpoints::{Checkpoints, Failure},
    next::{Mail, Standing, Step},
    online_copies::CopyRequest,
    scrub::{Finding, Scrub},
};
use crate::{
    node::{
        disk::trouble,
        inbox::{DatabaseEvent, Input, Proposer, Sender, SnapshotError},
        lease::boottime,
        warning::Warning,
    },
    storage::{
        Replicator,
        database::{ApplyError, DatabaseError},
        databases::Databases,
        raft_log::{ORIGIN, RaftLog},
        transaction,
    },
    telemetry::{DAMAGE_FOUND, SCRUB_FAILURES, note_now},
};

/// Pause before applying to a database on a full disk is tried again.
const FULL_PAUSE: Duration = Duration::from_millis(500);
/// Entries to apply before the goal is read again.
const SLICE: u64 = 256;
/// How long a checkpoint waits until the loop has handed out what the file already has.
const LOOP_IS_BEHIND: Duration = Duration::from_millis(500);
/// How often it checks that.
const MOMENT: Duration = Duration::from_millis(2);

/// Why nothing is applied any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Halt {
    /// The content of a database cannot be trusted: it has to be fetched.
    Distrusted,
    /// A newer program has written the next entry. What is here is good, and waits for that program.
    Outdated,
}

pub(super) struct Thread {
    databases: Databases,
    log: RaftLog,
    sender: Sender,
    shared: Arc<Shared>,
    deadline: Duration,
    /// The longest wait before the thread checks what is due.
    interval: Duration,
    /// The epoch in which the databases are open for writing.
    epoch: Option<u64>,
    reported_empty: Option<u64>,
    /// The epoch in which opening failed; it is not tried again in that epoch.
    refused: u64,
    /// The last demotion that was reported as done.
    demotion: u64,
    halt: Option<Halt>,
    /// The process ends: no further step is taken.
    ended: bool,
    checkpoints: Checkpoints,
    scrub: Scrub,
    /// The disk was full: nothing is applied before then.
    full_until: Option<Instant>,
    logged_full: bool,
}

/// True if a checkpoint at `index` may count. A write is in the file as soon as a majority has it. That can be before
/// the loop has handed out that entry, and a change of the membership before it, which the checkpoint must not leave
/// out. Waits for the loop, for [`LOOP_IS_BEHIND`] at most.
fn may_save(shared: &Shared, index: u64) -> bool {
    let end = Instant::now() + LOOP_IS_BEHIND;
    let mut state = shared.lock();
    while state.goal.applied < index && !state.goal.stop && Instant::now() < end {
        // The loop does not wake this thread for a single commit.
        state = shared.changed.wait_timeout(state, MOMENT).unwrap_or_else(PoisonError::into_inner).0;
    }
    state.goal.applied >= index && !state.goal.pinned
}

impl Thread {
    pub fn new(
        mut databases: Databases,
        log: RaftLog,
        sender: Sender,
        shared: Arc<Shared>,
        deadline: Duration,
        policy: CheckpointPolicy,
    ) -> io::Result<Self> {
        let goal = Arc::clone(&shared);
        databases.save_if(move |index| may_save(&goal, index));
        let answers = Arc::clone(&shared);
        let scrub = Scrub::start(policy.scrub, move |read| answers.answer(|mailbox| mailbox.read = Some(read)))?;
        let checkpoints = Checkpoints::start(policy, log.clone(), Arc::clone(&shared))?;
        let halt = databases.distrusted().map(|_| Halt::Distrusted);
        Ok(Self {
            databases,
            log,
            sender,
            shared,
            deadline,
            interval: policy.interval,
            epoch: None,
            reported_empty: None,
            refused: 0,
            demotion: 0,
            halt,
            ended: false,
            checkpoints,
            scrub,
            full_until: None,
            logged_full: false,
        })
    }

    pub fn run(mut self) {
        if let Some(why) = self.databases.distrusted().map(str::to_owned) {
            self.mark_diverged(why);
        }
        while !self.ended {
            let (step, goal) = self.wait();
            self.carry_out(step, &goal);
        }
    }

    /// Waits until there is a step to take.
    fn wait(&mut self) -> (Step, Goal) {
        loop {
            self.publish_figures();
            self.checkpoints.watch_hold(&self.databases);
            let mut standing = self.standing();
            let state = self.shared.lock();
            standing.mail = state.mailbox.mail();
            if let Some(step) = standing.next(&state.goal) {
                return (step, state.goal);
            }
            // Nothing wakes this thread when a task becomes due with time.
            let scrub = if self.halt.is_some() { Duration::MAX } else { self.scrub.ask_again_in() };
            let pause = standing.pause.unwrap_or(self.interval).min(scrub);
            drop(self.shared.changed.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Where the thread stands, without the mail, which changes at any time.
    fn standing(&self) -> Standing {
        let pause = self.full_until.map(|until| until.saturating_duration_since(Instant::now()));
        Standing {
            applied: self.databases.applied(),
            epoch: self.epoch,
            halted: self.halt.is_some(),
            reported_empty: self.reported_empty.filter(|_| self.databases.empty().next().is_some()),
            refused: self.refused,
            demotion: self.demotion,
            full: self.checkpoints.is_full(),
            pause: pause.filter(|left| !left.is_zero()),
            checkpoint: self.halt != Some(Halt::Distrusted) && self.checkpoints.is_due(&self.databases),
            saving: self.checkpoints.is_saving(),
            scrub: self.scrub.is_due(),
            mail: Mail::default(),
        }
    }

    fn carry_out(&mut self, step: Step, goal: &Goal) {
        match step {
            Step::Close => self.close(goal),
            Step::Demote => self.demote(goal),
            Step::ReportDemotion(demotion) => self.report_demotion(demotion),
            Step::NoteCommitted => self.databases.note_committed(goal.applied),
            Step::Promote(epoch) => self.promote(epoch),
            Step::Refuse(epoch) => self.refuse_for_space(epoch),
            Step::TakeSaved => self.take_saved(),
            Step::Rest => self.rest(goal.pinned),
            Step::Copy => self.copy(),
            Step::NoteFull => self.checkpoints.note_full(goal.full, &self.databases),
            Step::Checkpoint => {
                let begun = self.checkpoints.begin_due(&mut self.databases);
                self.report_failure(begun);
            }
            Step::Apply => self.apply(goal.applied),
            Step::Scrub => self.scrub(),
        }
    }

    /// Publishes figures for the loop and the gauges.
    fn publish_figures(&self) {
        let (Self { databases, .. }, Shared { applied, bytes, unsaved, .. }) = (self, &*self.shared);
        applied.store(databases.applied(), Ordering::Relaxed);
        bytes.store(databases.file_bytes(), Ordering::Relaxed);
        if databases.applied() <= databases.checkpointed() {
            unsaved.store(0, Ordering::Relaxed);
        } else if unsaved.load(Ordering::Relaxed) == 0 {
            unsaved.store(boottime(), Ordering::Relaxed);
        }
    }

    fn report(&self, event: DatabaseEvent) {
        self.sender.send(Input::Database(event));
    }

    fn fatal(&mut self, why: String) {
        self.ended = true;
        self.report(DatabaseEvent::Fatal { why });
    }

    fn mark_diverged(&mut self, why: String) {
        self.halt = Some(Halt::Distrusted);
        self.report(DatabaseEvent::Diverged { why });
    }

    /// Fetching the database would not help: the same entry would come again, or a snapshot that this program cannot
    /// read.
    fn mark_outdated(&mut self, error: &ApplyError) {
        self.halt = Some(Halt::Outdated);
        let why = format!("{error} (until then it applies nothing more and does not become PRIMARY)");
        self.report(DatabaseEvent::Outdated { why });
    }

    fn note_full(&mut self, what: &str) {
        if !std::mem::replace(&mut self.logged_full, true) {
            warn!("the disk is full: {what} waits until there is space");
        }
    }

    /// Reports that a checkpoint failed, if it did.
    fn report_failure(&mut self, result: Result<(), Failure>) {
        match result {
            Ok(()) => {}
            Err(Failure::Full) => self.note_full("the checkpoint of the database"),
            Err(Failure::Fatal(why)) => self.fatal(why),
        }
    }

    /// Applies a slice of the raft log: no more at once, so that a change of the goal is seen soon.
    fn apply(&mut self, goal: u64) {
        let first = (self.databases.applied() + 1).max(ORIGIN + 1);
        let last = goal.min(first + SLICE);
        let Self { databases, log, shared, .. } = self;
        let mut failed = None;
        let result = log.entries_between(first, last, &mut |entry| {
            let applied = if entry.get_entry_type() == EntryType::EntryNormal && !entry.data.is_empty() {
                let parts = transaction::parts_at_end(&entry.data).filter(|parts| *parts > 1).unwrap_or(0);
                shared.finishing.store(u64::from(parts), Ordering::Relaxed);
                let applied = databases.apply(entry.index, entry.term, &entry.data, log);
                shared.finishing.store(0, Ordering::Relaxed);
                applied
            } else {
                databases.apply_empty(entry.index, entry.term)
            };
            applied.map_err(|error| {
                failed = Some(error);
                io::Error::other("see the error that was kept")
            })
        });
        match (failed, result) {
            (None, Ok(())) => {
                if self.full_until.take().is_some() && std::mem::take(&mut self.logged_full) {
                    info!("applying to the database again: there is space on the disk");
                }
            }
            (Some(error), _) if error.is_full() => {
                self.full_until = Some(Instant::now() + FULL_PAUSE);
                self.note_full("applying to the database");
            }
            (Some(error), _) if error.is_of_newer_program() => self.mark_outdated(&error),
            // A restart from the checkpoint would end in the same way.
            (
                Some(
                    error @ (ApplyError::Diverged { .. } | ApplyError::Command { .. } | ApplyError::OutOfOrder { .. }),
                ),
                _,
            ) => {
                self.mark_diverged(error.to_string());
            }
            (Some(error), _) => self.fatal(format!("apply the raft log to the database: {error}")),
            (None, Err(error)) => self.fatal(format!("read the raft log from {first} to {last}: {error}")),
        }
    }

    fn promote(&mut self, epoch: u64) {
        if let Some(halt) = self.halt {
            self.refused = epoch;
            let why = match halt {
                Halt::Distrusted => "this copy of the database cannot be trusted",
                Halt::Outdated => "a newer program than this one has written to the raft log: upgrade this node",
            };
            return self.report(DatabaseEvent::Failed { epoch, why: why.to_owned() });
        }
        let empty: Vec<_> = self.databases.empty().collect();
        if !empty.is_empty() {
            self.reported_empty = Some(epoch);
            return self.report(DatabaseEvent::Empty { epoch, databases: empty });
        }
        let proposer = Proposer { epoch, sender: self.sender.clone(), log: self.log.clone() };
        let proposer: Arc<dyn Replicator> = Arc::new(proposer);
        match self.databases.promote(epoch, &proposer) {
            Ok(databases) => {
                self.epoch = Some(epoch);
                self.report(DatabaseEvent::Promoted { epoch, databases });
            }
            Err(error @ DatabaseError::Diverged { .. }) => self.mark_diverged(error.to_string()),
            // Not even its checkpoint can be read: only another start can.
            Err(error) if self.databases.is_closed() => self.fatal(format!("open the database for writing: {error}")),
            Err(error) if error.is_full() => self.refuse_for_space(epoch),
            Err(error) => {
                self.refused = epoch;
                self.report(DatabaseEvent::Failed { epoch, why: format!("open the database for writing: {error}") });
            }
        }
    }

    /// The disk is full here: another node may have the space.
    fn refuse_for_space(&mut self, epoch: u64) {
        self.refused = epoch;
        self.report(DatabaseEvent::NoSpace { epoch });
    }

    /// The databases are closed, which is enough: what is missing is applied before the next promotion.
    fn report_demotion(&mut self, demotion: u64) {
        self.demotion = demotion;
        self.report(DatabaseEvent::Demoted { demotion });
    }

    /// The next primary waits until the databases are closed here, but not until large files have been read again.
    fn demote(&mut self, goal: &Goal) {
        let start = Instant::now();
        let ms = |start: Instant| start.elapsed().as_millis() as u64;
        while let Err(error) = self.databases.close(Instant::now() + self.deadline) {
            // A new process could not close it sooner, and this one can say what it waits for. The others go on
            // meanwhile.
            let Some(trouble) = trouble() else {
                return self.fatal(format!("close the database within {} ms: {error}", self.deadline.as_millis()));
            };
            warn!("the database is not closed yet: {trouble}");
        }
        let closed_ms = ms(start);
        self.epoch = None;
        // This node is behind now: others should be primary until the file is read and the raft log is applied again.
        self.shared.applied.store(self.databases.applied(), Ordering::Relaxed);
        if goal.demotion != self.demotion {
            self.report_demotion(goal.demotion);
        }
        let stops = || self.shared.lock().goal.stop;
        match self.databases.reopen(&|| !stops()) {
            Ok(()) => {
                let (index, ms) = (self.databases.applied(), ms(start));
                info!(index, closed_ms, ms, "database closed; applying the raft log again from its checkpoint");
            }
            Err(_) if stops() => info!(closed_ms, "database closed; the next start reads it again"),
            Err(error) => self.fatal(format!("go back to the checkpoint of the database: {error}")),
        }
    }

    /// Answers everyone who asked for a snapshot.
    fn rest(&mut self, pinned: bool) {
        let requests = std::mem::take(&mut self.shared.lock().mailbox.snapshots);
        for request in requests {
            if pinned {
                let resting = Err(SnapshotError::DiskFull);
                self.report(DatabaseEvent::Resting { resting, request });
                continue;
            }
            self.wait_for_saver();
            let result = self.databases.rest();
            if result.is_ok() {
                self.checkpoints.rests(&self.databases);
            }
            match result {
                // A full disk means no snapshot, but the primary goes on.
                Err(error @ (DatabaseError::Io { .. } | DatabaseError::Failed(_))) if !error.is_full() => {
                    return self.fatal(format!("checkpoint the database: {error}"));
                }
                result => {
                    let resting = result.map_err(SnapshotError::from);
                    self.report(DatabaseEvent::Resting { resting, request });
                }
            }
        }
    }

    /// Answers everyone who makes a copy. A caller that has stopped waiting asks again.
    fn copy(&mut self) {
        let requests = std::mem::take(&mut self.shared.lock().mailbox.copies);
        let databases = &mut self.databases;
        for request in requests {
            match request {
                CopyRequest::Begin(reply) => drop(reply.send(databases.begin_copy())),
                CopyRequest::Finish(copy, reply) => drop(reply.send(databases.finish_copy(&copy))),
            }
        }
    }

    /// Takes a turn of the scrub: there is nothing more important to do.
    fn scrub(&mut self) {
        let read = self.shared.lock().mailbox.read.take();
        match self.scrub.turn(read, &mut self.databases) {
            Finding::Nothing => {}
            Finding::Clean => {
                self.sender.send(Input::Warning { about: Warning::Scrub, text: None });
            }
            Finding::Rot(why) => {
                metrics::counter!(SCRUB_FAILURES).increment(1);
                note_now(DAMAGE_FOUND);
                if self.epoch.is_some() {
                    // The loop knows whether another node can take over.
                    self.report(DatabaseEvent::Corrupt { why });
                } else {
                    self.mark_diverged(why);
                }
            }
        }
    }

    fn take_saved(&mut self) {
        let saved = self.shared.lock().mailbox.saved.take();
        let Some(outcome) = saved else { return };
        let taken = self.checkpoints.take(outcome, &mut self.databases);
        if matches!(taken, Ok(true)) {
            self.logged_full &= self.full_until.is_some();
        }
        self.report_failure(taken.map(drop));
    }

    /// Waits until the saver is free, for as long as its disk takes.
    fn wait_for_saver(&mut self) {
        while self.checkpoints.is_saving() {
            self.checkpoints.hurry();
            let shared = Arc::clone(&self.shared);
            let unsaved = |state: &mut super::State| state.mailbox.saved.is_none();
            drop(shared.changed.wait_while(shared.lock(), unsaved).unwrap_or_else(PoisonError::into_inner));
            self.take_saved();
        }
    }

    fn close(&mut self, goal: &Goal) {
        if self.epoch.is_some() {
            self.demote(goal);
        }
        let pinned = self.shared.lock().goal.pinned;
        let closed = self.epoch.is_some() || self.databases.is_closed();
        self.wait_for_saver();
        let distrusted = self.halt == Some(Halt::Distrusted);
        if !closed && !distrusted && self.databases.empty().next().is_none() && !pinned {
            let begun = self.checkpoints.begin(&mut self.databases);
            self.report_failure(begun);
            self.wait_for_saver();
        } else if distrusted {
            warn!("the database is left as it is: it has to be fetched again");
        }
        self.ended = true;
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, sync::mpsc::Receiver, thread};

    use raft::eraftpb::ConfState;

    use super::*;
    use crate::{
        cluster::ClusterId,
        node::inbox::inbox,
        peer::{Links, LinksConfig},
        storage::{
            database::{Database, initial_transaction},
            raft_log::{Options, RealDisk},
            transaction::CONSOLE_DATABASE,
        },
    };

    /// The thread of a database that has its first transaction, in this folder, and what it reports.
    fn thread_in(folder: &Path) -> (Thread, Receiver<Input>, Links) {
        let conf = ConfState { voters: vec![1], ..ConfState::default() };
        let options = Options { segment_bytes: 1 << 20, helper: false, ..Options::default() };
        let log = RaftLog::open(&folder.join("raft-log"), (ClusterId(1), 1), conf, options, RealDisk).unwrap();
        let mut database = Database::open(folder, CONSOLE_DATABASE, log.last_index()).unwrap();
        database.apply(1, 1, &initial_transaction(CONSOLE_DATABASE, 4096).unwrap()[0], &log).unwrap();
        let (links, waker) = Links::new(LinksConfig::new(1, Vec::new())).unwrap();
        let (sender, inputs) = inbox(waker);
        let minute = Duration::from_secs(60);
        let policy =
            CheckpointPolicy { bytes: 1 << 20, interval: minute, raft_log_limit: 1 << 30, scrub: Duration::ZERO };
        let databases = Databases::of_console(database);
        (Thread::new(databases, log, sender, Arc::default(), minute, policy).unwrap(), inputs, links)
    }

    /// A failure of the database has a warning that stays until this node is primary; a full disk has one that ends.
    #[test]
    fn a_full_disk_is_not_reported_as_a_failure_of_the_database() {
        let folder = tempfile::tempdir().unwrap();
        let (mut thread, inputs, _links) = thread_in(folder.path());
        thread.carry_out(Step::Refuse(7), &Goal::default());
        assert!(matches!(inputs.recv().unwrap(), Input::Database(DatabaseEvent::NoSpace { epoch: 7 })));
        assert_eq!(thread.standing().refused, 7, "it is not tried again in this epoch");
    }

    /// Nothing of it is in memory any more: it would be taken for an empty one, which a PRIMARY founds.
    #[test]
    fn a_database_that_can_neither_be_opened_nor_read_ends_the_process() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("data");
        fs::create_dir(&folder).unwrap();
        let (mut thread, inputs, _links) = thread_in(&folder);
        let proposer: Arc<dyn Replicator> =
            Arc::new(Proposer { epoch: 6, sender: thread.sender.clone(), log: thread.log.clone() });
        thread.databases.promote(6, &proposer).unwrap();
        thread.databases.close(Instant::now()).unwrap();
        fs::rename(&folder, outer.path().join("elsewhere")).unwrap();
        fs::write(&folder, "not a folder").unwrap();
        thread.carry_out(Step::Promote(7), &Goal::default());
        let event = inputs.recv().unwrap();
        assert!(matches!(event, Input::Database(DatabaseEvent::Fatal { .. })));
        assert!(thread.ended, "no later epoch finds it");
    }

    #[test]
    fn a_checkpoint_counts_once_the_loop_has_handed_it_out_and_no_membership_waits_for_its_file() {
        let shared = Shared::default();
        let goal = |applied: u64, pinned: bool, stop: bool| {
            shared.lock().goal = Goal { applied, pinned, stop, ..Goal::default() };
            may_save(&shared, 5)
        };
        assert!(goal(5, false, false));
        assert!(goal(9, false, false));
        assert!(!goal(5, true, false), "a membership is being written to its file");
        assert!(!goal(4, false, false), "the loop does not hand it out");
        assert!(!goal(4, false, true), "the process ends");
        // The loop hands it out meanwhile, with a change of the membership or without.
        for pinned in [true, false] {
            shared.lock().goal = Goal { applied: 4, ..Goal::default() };
            thread::scope(|scope| {
                let saving = scope.spawn(|| may_save(&shared, 5));
                shared.lock().goal = Goal { applied: 6, pinned, ..Goal::default() };
                assert_eq!(saving.join().unwrap(), !pinned);
            });
        }
    }
}
