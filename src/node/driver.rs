//! The consensus loop: inputs -> cluster -> persist -> send -> apply -> status, on an OS thread of its own. Owns the
//! links and the order of effects. Must never wait for anything but its own poll: disk and database have their own
//! threads.

mod bad_disk;
mod configure;
mod measure;
mod memory;
mod snapshots;
mod space;
mod spans;
mod upgrade;

use std::{
    io, mem,
    sync::{
        Arc,
        mpsc::{Receiver, sync_channel},
    },
    time::{Duration, Instant},
};

use raft::eraftpb::MessageType;
use tokio::sync::{oneshot, watch};
use tracing::{error, info, warn};

use crate::{
    cluster::{Cause, Cluster, Membership, NodeId, Output, Phase, role::Transition},
    peer::{Edition, Links, PeerEvent},
    storage::{
        ReplicateError, database,
        databases::Databases,
        membership::StoredMembership,
        raft_log::{Pending, RaftLog},
    },
    telemetry::{
        self,
        steps::{self, Step},
    },
};

use super::{
    Exit, NodeConfig,
    database_thread::{self, OnlineCopies},
    disk::Disk,
    inbox::{DatabaseEvent, Input, Piece, Proposal, Sender, Waiting},
    lease::boottime,
    members::Members,
    publisher::{Publisher, Seen},
    pulse::Pulse,
    rollback::Rollback,
    serving::{OpenDatabases, Serving, ServingFolder},
    status::Status,
    syncer::{Done, Keep, Syncer},
    throttle::Throttle,
    warning::Warning,
};
use configure::Changes;
use memory::Keeper;
use space::{NoRoom, Space};
use spans::Spans;
use upgrade::Upgrade;

/// Inputs taken per turn, so that a flood of proposals cannot delay a heartbeat.
const INPUTS_PER_TURN: usize = 64;
/// How late the tick of a node may be that hears its primary.
const SLACK: Duration = Duration::from_millis(5);
/// A node whose database lacks more committed entries than this leaves the role to others that can take it.
const MUCH_BEHIND: u64 = 1000;
/// How long a node whose database cannot be used, or whose disk is full, leaves the role to others, in nanoseconds.
const UNFIT: u64 = 10_000_000_000;

/// What the loop needs to run.
pub(super) struct Parts {
    pub config: NodeConfig,
    pub cluster: Cluster<RaftLog>,
    pub log: RaftLog,
    pub links: Links,
    pub sender: Sender,
    pub inbox: Receiver<Input>,
    pub databases: Databases,
    pub pulse: Pulse,
}

/// What the rest of the process can read.
#[derive(Clone)]
pub(super) struct Views {
    pub status: watch::Receiver<Arc<Status>>,
    pub serving: Serving,
    pub folder: ServingFolder,
    pub membership: watch::Receiver<Arc<Membership>>,
    pub editions: watch::Receiver<Edition>,
    /// See [`super::Handle::refetch_from`].
    pub refetch_from: watch::Receiver<Option<NodeId>>,
    pub online_copies: OnlineCopies,
}

pub(super) struct Driver {
    config: NodeConfig,
    cluster: Cluster<RaftLog>,
    log: RaftLog,
    syncer: Syncer,
    links: Links,
    throttle: Throttle,
    spans: Spans,
    inbox: Receiver<Input>,
    members: Members,
    publisher: Publisher,
    lane: Lane,
    in_force: InForce,
    refetch: Refetch,
    host: Host,
    /// Callers that wait for the end of a handover.
    handed_over: Vec<oneshot::Sender<()>>,
    exit: Option<Exit>,
}

/// The databases, and the proposals that wait for a majority.
struct Lane {
    thread: database_thread::Handle,
    open: OpenDatabases,
    waiting: Waiting,
    /// The demotion that the database thread has not yet answered.
    demotion: Option<u64>,
}

/// The membership in force, and what depends on it.
struct InForce {
    membership: watch::Sender<Arc<Membership>>,
    /// The membership in force with its raft index.
    editions: watch::Sender<Edition>,
    changes: Changes,
    /// The disk is full, and the membership is not in its file yet.
    unwritten: bool,
    upgrade: Upgrade,
    /// The administrator allows a takeover in spite of a pause.
    paused_ignored: bool,
    /// Why this node is no longer a member.
    removed: Option<String>,
}

/// Whether this node needs the whole database from another one.
struct Refetch {
    /// The member to fetch it from, while it is needed.
    from: watch::Sender<Option<NodeId>>,
    /// This node needs entries up to this index that the leader's raft log no longer has.
    lacks: u64,
    /// Its copy of the database cannot be trusted.
    diverged: bool,
}

/// This host: its disk, and what is kept on it besides the raft log and the database.
struct Host {
    space: Space,
    disk: Disk,
    rollback: Rollback,
    /// What this node and the others must remember.
    keeper: Keeper,
    /// Shows that the loop runs.
    pulse: Pulse,
}

impl Driver {
    /// Starts the threads around the loop.
    ///
    /// # Errors
    /// When one of them cannot be started.
    pub fn new(parts: Parts) -> io::Result<(Self, Views)> {
        let Parts { config, cluster, log, links, sender, inbox, databases, pulse } = parts;
        let StoredMembership { index, membership } = &config.stored;
        let members = Members::new(config.node, membership);
        let membership = Arc::new(membership.clone());
        let (editions, edition) = watch::channel(Edition { index: *index, membership: membership.clone() });
        let (in_force, membership) = watch::channel(membership);
        let (from, refetch_from) = watch::channel(None);
        let (open, serving, folder) = OpenDatabases::new();
        let (publisher, status) = Publisher::new(&config);
        let host = Host {
            space: Space::start(config.data.clone())?,
            disk: Disk::start(pulse.clone())?,
            rollback: Rollback::new(&config, databases.console().file(), sender.clone()),
            keeper: Keeper::start(&config)?,
            pulse,
        };
        let synced = sender.clone();
        let report = move |done| synced.send(Input::Synced(done));
        let syncer = Syncer::start(report, config.data.clone(), log.clone())?;
        let (deadline, checkpoints) = (config.demotion_deadline, config.checkpoints);
        let thread = database_thread::Handle::start(databases, log.clone(), sender, deadline, checkpoints)?;
        let online_copies = thread.online_copies();
        let mut driver = Self {
            config,
            cluster,
            log,
            syncer,
            links,
            throttle: Throttle::default(),
            spans: Spans::default(),
            inbox,
            members,
            publisher,
            lane: Lane { thread, open, waiting: Waiting::new(Instant::now()), demotion: None },
            in_force: InForce {
                membership: in_force,
                editions,
                changes: Changes::default(),
                unwritten: false,
                upgrade: Upgrade::default(),
                paused_ignored: false,
                removed: None,
            },
            refetch: Refetch { from, lacks: 0, diverged: false },
            host,
            handed_over: Vec::new(),
            exit: None,
        };
        driver.follow_membership();
        Ok((driver, Views { status, serving, folder, membership, editions: edition, refetch_from, online_copies }))
    }

    /// Runs until it is asked to stop, or until it is not safe to continue.
    pub fn run(mut self) -> Exit {
        let tick = Duration::from_nanos(self.config.timing.tick);
        let mut next_tick = Instant::now() + tick;
        let mut events = Vec::new();
        let mut more = false;
        loop {
            let wait = if more { Duration::ZERO } else { self.time_to_wait(next_tick) };
            if let Err(error) = self.links.poll(wait, &mut events) {
                return self.end(Exit::Fatal(format!("wait for peer links: {error}")));
            }
            events.drain(..).for_each(|event| self.peer_event(event));
            more = self.take_inputs();
            self.host.pulse.beat();
            let now = Instant::now();
            if now >= next_tick {
                self.cluster.tick(boottime());
                // A late tick delays the following ones: a voter's promise is counted in ticks, so they must not bunch
                // up.
                next_tick = now + tick;
                if self.publisher.tick(&mut self.links) {
                    self.measure();
                }
                self.watch_disk();
                self.watch_database();
                self.watch_stall();
                self.lane.thread.nudge();
                self.lane.thread.release(self.members.everybody_has());
                if self.host.rollback.note_ends() {
                    self.publisher.warn(Warning::Rollback, None);
                }
                self.watch_space();
                self.restore_if_needed();
                self.follow_pause();
                self.follow_level();
                self.follow_pool_version();
                self.follow_memory();
            }
            self.prefer_others_while_unfit();
            self.carry_out_all();
            if self.host.rollback.is_over(self.lane.thread.applied()) {
                self.publisher.rolling_back(false);
            }
            self.publish();
            if let Some(exit) = self.exit.take() {
                return self.end(exit);
            }
        }
    }

    /// True if there may be more inputs than one turn takes.
    fn take_inputs(&mut self) -> bool {
        for _ in 0..INPUTS_PER_TURN {
            let Ok(input) = self.inbox.try_recv() else { return false };
            self.input(input);
            if self.exit.is_some() {
                return false;
            }
        }
        true
    }

    /// A node that still replays its raft log, for example after a start, would keep the ports closed until it is done.
    /// One whose disk is full or does not work could not write.
    fn prefer_others_while_unfit(&mut self) {
        let unfit_now =
            self.lane.thread.pending_work() > MUCH_BEHIND || self.host.space.is_full() || self.host.disk.is_bad();
        self.cluster.set_unfit_now(boottime(), unfit_now && self.cluster.phase() == Phase::Secondary);
    }

    /// The database fences itself when this host's files fail after a majority has the transaction. It must be
    /// replayed.
    fn watch_database(&mut self) {
        if self.lane.open.is_fenced() {
            error!("the database has fenced itself after a failure of its files on this host");
            self.leave_role_for_a_while();
        }
    }

    /// This node cannot use its database now: another member should be primary.
    fn leave_role_for_a_while(&mut self) {
        let now = boottime();
        self.cluster.set_unfit_until(now, now + UNFIT);
        self.cluster.give_up(now, Cause::DatabaseFailed);
    }

    /// A writer must not wait for ever for a majority: it may keep the Console closed meanwhile.
    fn watch_stall(&mut self) {
        if self.lane.waiting.give_up_stalled(Instant::now()) {
            warn!("gave up a transaction of several parts: no majority of the members takes more of it");
        }
    }

    fn publish(&mut self) {
        let Self { cluster, log, lane, .. } = self;
        let seen = Seen { cluster, log, applied: lane.thread.applied() };
        self.publisher.publish(&seen, &mut self.members, &lane.open);
        self.publisher.announce(&mut self.links);
    }

    /// This node's copy of the database cannot be trusted: it has to be replaced with the primary's.
    pub(super) fn mark_diverged(&mut self, why: String) {
        self.refetch.diverged = true;
        self.publisher.diverged(why);
    }

    /// Until the next tick, or until a time-out. The tick of a secondary that hears its primary waits a little longer,
    /// so that the next heartbeat and the tick are one turn.
    fn time_to_wait(&self, next_tick: Instant) -> Duration {
        let slack = if self.cluster.hears_primary() { SLACK } else { Duration::ZERO };
        let until_tick = (next_tick + slack).saturating_duration_since(Instant::now());
        let deadline = self.cluster.deadline().map(|at| Duration::from_nanos(at.saturating_sub(boottime())));
        deadline.map_or(until_tick, |deadline| until_tick.min(deadline))
    }

    /// Ends in an orderly way: the lease first, then the database, then the links, with a farewell so that the others
    /// do not take it for a crash.
    fn end(mut self, exit: Exit) -> Exit {
        if let Err(error) = self.config.lease.set(0) {
            error!(%error, "the port guard could not be told that the lease is over");
        }
        match &exit {
            Exit::Fatal(why) => self.lane.waiting.fail(&format!("this node ends itself: {why}")),
            Exit::Stopped | Exit::Restart(_) => self.lane.waiting.fail("the node stops"),
        };
        self.in_force.changes.fail();
        self.lane.open.fence();
        // No more input is taken, so threads that still send, such as the database thread, must not wait for room.
        drop(mem::replace(&mut self.inbox, sync_channel(0).1));
        if matches!(exit, Exit::Stopped | Exit::Restart(_)) {
            self.lane.thread.stop();
        }
        self.links.shutdown();
        self.keep_memory_at_last(&exit);
        exit
    }

    fn peer_event(&mut self, event: PeerEvent) {
        let now = boottime();
        match event {
            PeerEvent::Raft(message) => {
                self.members.heard(message.from);
                self.config.memory.heard(&message);
                if self.cluster.has_forgotten() {
                    return;
                }
                if message.get_msg_type() == MessageType::MsgTimeoutNow {
                    self.publisher.handed_over(message.from);
                }
                self.throttle.heard(&message);
                self.spans.heard(&message);
                if self.cluster.needs_snapshot(&message) {
                    self.wants_snapshot(&message);
                } else if self.takes_in() && self.host.space.admits(&self.log, &message) {
                    self.cluster.step(now, message);
                }
            }
            PeerEvent::Report(peer, report) => self.reported(peer, report),
            PeerEvent::Down { peer, .. } => self.cluster.peer_unreachable(peer),
            PeerEvent::Up(peer) | PeerEvent::InboundUp(peer) => self.cluster.peer_alive(peer),
            PeerEvent::InboundDown { .. } => {}
            PeerEvent::Removed { by, reason } => self.note_removed(self.reported_by(by, &reason)),
            PeerEvent::Forgot { reason, .. } => self.note_lost_memory(&reason),
            PeerEvent::Outdated { by, reason } => self.note_outdated(self.reported_by(by, &reason)),
            PeerEvent::DuplicateIdentity { peer, gone } => self.publisher.warn(
                Warning::DuplicateIdentity,
                (!gone).then(|| {
                    format!(
                        "two processes use the identity of {}: was its data folder copied? Stop one of them",
                        self.in_force.membership.borrow().name(peer)
                    )
                }),
            ),
            PeerEvent::Dead(peer) => {
                if let Some(heard) = self.members.last_heard(peer) {
                    self.publisher.dead(peer, heard);
                }
                self.members.dead(peer);
                if self.config.fast_takeover {
                    self.cluster.peer_dead(now, peer);
                }
            }
        }
    }

    fn reported_by(&self, member: NodeId, reason: &str) -> String {
        format!("{} says: {reason}", self.in_force.membership.borrow().name(member))
    }

    fn input(&mut self, input: Input) {
        let now = boottime();
        match input {
            Input::Propose(proposal) => self.propose(proposal),
            Input::Settle { reply } => self.lane.waiting.settle(reply, Instant::now()),
            Input::Synced(done) => self.synced(done),
            Input::Database(event) => self.database_event(event),
            Input::HandOver { to, done } => {
                self.cluster.hand_over(now, to);
                self.handed_over.push(done);
            }
            Input::Change { change, reply } => self.change(&change, reply),
            Input::IgnorePause => self.ignore_pause(),
            Input::Holds { holds } => self.publisher.holds(holds),
            Input::Sync { node, progress } => self.publisher.sync(node, progress),
            Input::Restart { why } => self.exit = Some(Exit::Restart(why)),
            Input::Snapshot(request) => self.snapshot(request),
            Input::Warning { about, text } => self.publisher.warn(about, text),
            Input::Certificates(certificates) => self.publisher.certificates(certificates),
            Input::Stop => self.exit = Some(Exit::Stopped),
        }
    }

    fn propose(&mut self, proposal: Proposal) {
        let Proposal { epoch, part, last, long, reply, mut begun } = proposal;
        begun.next(Step::CommitQueue);
        if let Err(lacking) = self.check_room(part.len()) {
            let why = lacking.to_string();
            let refusal = match lacking {
                NoRoom::Full => ReplicateError::Full(why),
                // Rare: the writer's thread has just made room for this part and for a change of the membership.
                NoRoom::NotYet => ReplicateError::Refused(why),
            };
            return reply.answer(Err(refusal));
        }
        // Better to refuse it now than to let it get stuck. Without its last part the transaction has no effect, and
        // the parts that were sent do no harm.
        if let Some(why) = self.lacks_space().filter(|_| long).or_else(|| self.lacks_level(&part)) {
            return reply.answer(Err(ReplicateError::Refused(why)));
        }
        let piece = match (last, long) {
            (false, _) => Piece::Part,
            (true, true) => Piece::Last,
            (true, false) => Piece::Whole,
        };
        match self.cluster.propose(boottime(), epoch, part) {
            Ok(index) => self.lane.waiting.add(index, piece, reply, Instant::now()),
            Err(error) => reply.answer(Err(ReplicateError::Refused(error.to_string()))),
        }
        // Send the entry now, not after the inputs that follow.
        self.carry_out_all();
        begun.end(Step::LoopPropose);
    }

    fn synced(&mut self, done: Done) {
        let Done { number, request, result, micros, kept, begun } = done;
        begun.end(Step::SyncReport);
        let all = self.syncer.note(request);
        metrics::histogram!(telemetry::SYNC_LATENCY).record(micros as f64 / 1e6);
        match result {
            Ok(()) => {
                if let Some(kept) = kept {
                    self.kept(kept, all);
                }
                self.cluster.persisted(number);
            }
            // The kernel may have dropped what was to be written. Only a restart, which reads the log again, may use
            // it.
            Err(error) => self.exit = Some(Exit::Fatal(error.to_string())),
        }
    }

    fn database_event(&mut self, event: DatabaseEvent) {
        let now = boottime();
        match event {
            DatabaseEvent::Empty { epoch, databases } => self.found_databases(epoch, &databases),
            DatabaseEvent::Promoted { epoch, databases } => {
                self.lane.open.offer(databases);
                self.publisher.warn(Warning::Database, None);
                self.cluster.promoted(now, epoch);
                if self.cluster.phase() != Phase::Primary || self.cluster.epoch() != epoch {
                    self.lane.open.fence();
                }
            }
            DatabaseEvent::Demoted { demotion } => {
                if self.lane.demotion == Some(demotion) {
                    self.lane.demotion = None;
                    self.cluster.demoted(now);
                }
            }
            DatabaseEvent::Failed { epoch, why } => {
                error!(reason = why, epoch, "the database cannot be used for writing");
                self.publisher.warn(Warning::Database, Some(why));
                self.leave_role_for_a_while();
            }
            // It gets no warning of its own: there is one about the disk, which ends when there is space.
            DatabaseEvent::NoSpace { epoch } => {
                error!(epoch, "the database cannot be used for writing: the disk is full");
                self.leave_role_for_a_while();
            }
            DatabaseEvent::Diverged { why } => {
                error!(reason = why, "this copy of the database is not applied to any further");
                metrics::counter!(telemetry::CHECKSUM_FAILURES).increment(1);
                telemetry::note_now(telemetry::DAMAGE_FOUND);
                self.mark_diverged(why);
                self.cluster.set_unfit_until(now, u64::MAX);
                self.cluster.give_up(now, Cause::DatabaseFailed);
            }
            DatabaseEvent::Outdated { why } => self.entry_outdated(why),
            DatabaseEvent::Corrupt { why } => self.database_damaged(why),
            DatabaseEvent::Resting { resting, request } => self.resting(resting, request),
            DatabaseEvent::Fatal { why } => self.exit = Some(Exit::Fatal(why)),
        }
    }

    /// The raft log begins with the initial database as its first transaction (`docs/design.md`, "The commit path").
    fn found_databases(&mut self, epoch: u64, databases: &[u32]) {
        let made: Result<Vec<_>, _> =
            databases.iter().map(|id| database::initial_transaction(*id, self.config.page_size)).collect();
        let parts = match made {
            Ok(parts) => parts,
            Err(error) => {
                error!(%error, "the first transaction of the database cannot be made");
                return self.cluster.give_up(boottime(), Cause::DatabaseFailed);
            }
        };
        for part in parts.into_iter().flatten() {
            if let Err(error) = self.cluster.propose(boottime(), epoch, part) {
                warn!(%error, "the first transaction of the database was not taken; the next primary tries again");
                return self.cluster.give_up(boottime(), Cause::OutcomeUnknown);
            }
        }
        info!(epoch, page_size = self.config.page_size, "proposed the first transaction of a new database");
    }

    pub(super) fn carry_out_all(&mut self) {
        while self.exit.is_none() {
            match self.cluster.poll(boottime()) {
                Ok(Some(output)) => self.carry_out(output),
                Ok(None) => break,
                Err(error) => self.exit = Some(Exit::Fatal(error.to_string())),
            }
        }
        if !self.cluster.is_handing_over() {
            for done in self.handed_over.drain(..) {
                let _ = done.send(()); // the caller may have stopped waiting
            }
        }
    }

    /// Carries out one output in the order of its fields.
    fn carry_out(&mut self, output: Output) {
        if output.lease != self.config.lease.deadline()
            && let Err(error) = self.config.lease.set(output.lease)
        {
            self.exit = Some(Exit::Fatal(format!("tell the port guard the lease: {error}")));
            return;
        }
        output.transitions.iter().for_each(|transition| self.transition(transition));
        for message in output.send {
            if self.throttle.admits(&message, self.members.has_full_disk(message.to), Instant::now()) {
                self.spans.sends(&message);
                let begun = steps::begin();
                self.links.send(&message);
                if !message.entries.is_empty() {
                    begun.end(Step::LoopSend);
                }
            }
        }
        if let Some(persist) = output.persist {
            let keep = self.put_in_force(output.changes_in_force);
            let bytes = persist.entries.iter().map(|entry| entry.data.len()).sum();
            self.lane.thread.appended(bytes);
            if self.host.rollback.watch(&self.log, &persist.entries) {
                self.publisher.rolling_back(true);
            }
            let begun = steps::begin();
            let appended = self.log.append(&persist.entries, persist.hard_state.as_ref());
            if !persist.entries.is_empty() {
                begun.end(Step::LoopAppend);
            }
            match appended {
                Ok(pending) => {
                    self.host.space.appended();
                    self.cluster.written();
                    self.persist(persist.number, persist.must_sync.then_some(pending), keep);
                }
                Err(error) => {
                    self.exit = Some(Exit::Fatal(format!("append to the raft log: {error}")));
                    return;
                }
            }
        }
        self.lane.waiting.release(output.committed, Instant::now());
        self.lane.thread.apply(output.apply);
        if let Some(epoch) = output.promote {
            self.lane.thread.promote(epoch);
        }
    }

    /// The loop never syncs by itself, not even on a secondary, where the answer would be two thread switches faster.
    /// Members that share storage stall together, and then the primary would lose its majority and its lease.
    fn persist(&mut self, number: u64, pending: Option<Pending>, keep: Keep) {
        if pending.is_none() && keep.is_empty() && self.syncer.is_idle() {
            self.cluster.persisted(number);
        } else {
            self.syncer.ask(number, pending, keep);
        }
    }

    fn transition(&mut self, transition: &Transition) {
        let epoch = self.cluster.epoch();
        if transition.to == Phase::Demoting {
            self.lane.open.fence();
            self.lane.demotion = Some(self.lane.thread.demote());
            let unknown = self.lane.waiting.fail("the role was lost while a majority was awaited");
            self.in_force.changes.fail();
            if unknown > 0 {
                warn!(transactions = unknown, "the outcome of waiting transactions is decided by the next primary");
            }
        }
        self.publisher.transition(epoch, transition, &self.members);
        info!(epoch, from = ?transition.from, to = ?transition.to, "{}", transition.sentence);
        metrics::counter!(telemetry::ROLE_CHANGES, "cause" => format!("{:?}", transition.cause)).increment(1);
    }
}
