//! DECIDES. The consensus core: pure, no tokio, no sockets, no files, no clock. Its caller passes in the time and what
//! happened. It answers with one [`Output`], whose fields are in the order in which they must be carried out.
//!
//! Times are nanoseconds of one clock that never stops or jumps (CLOCK_BOOTTIME in a daemon).

mod candidacy;
mod configure;
pub mod election;
pub mod level;
pub mod limits;
pub mod membership;
mod memory;
pub mod reach;
pub mod role;
pub mod roster;
pub mod shared;
pub mod trust;
pub mod validity;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use raft::{
    Ready, Storage,
    eraftpb::{Entry, HardState, Message, MessageType},
};

pub use configure::{ChangeError, ChangeInForce, NotUnderstood};
pub use level::{feature_level, program_version};
pub use membership::{Change, ClusterId, Membership, Newcomer};
pub use role::{Cause, Lease, Phase, Role, Transition};
pub use roster::{Member, NodeId};

use candidacy::Campaign;
use election::Election;

/// The spans that the core works with, in nanoseconds unless they say ticks.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// One raft tick, and one lease round of the primary.
    pub tick: u64,
    /// Ticks of silence before a voter forgets its leader.
    pub election_ticks: usize,
    /// How long ports stay open after the sending of a round that a majority answered.
    pub lease: u64,
    /// Head start of each place over the next when the leader is known to be gone.
    pub stagger: u64,
    /// How long a process that has just started neither votes nor campaigns: the longest promise that an earlier one of
    /// this node may have given.
    pub quiet: u64,
    /// How long a planned handover may take before the role is simply given up.
    pub handover: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            tick: 25_000_000,
            election_ticks: election::ELECTION_TICKS,
            lease: 400_000_000,
            quiet: 475_000_000,
            stagger: 60_000_000,
            handover: 500_000_000,
        }
    }
}

/// What must be written to the raft log before [`Cluster::written`] is called.
#[derive(Debug, Default)]
pub struct Persist {
    /// To be named in [`Cluster::persisted`] once it is durable.
    pub number: u64,
    /// Entries to append; an index that exists replaces it and all behind it.
    pub entries: Vec<Entry>,
    pub hard_state: Option<HardState>,
    /// False if nothing here needs to be durable (only the commit index moved).
    pub must_sync: bool,
}

/// What to do, in this order.
#[derive(Debug, Default)]
pub struct Output {
    /// 1. The deadline of the lease, 0 for none. Before anything else leaves this node.
    pub lease: u64,
    /// 2. Changes of phase, oldest first: fence the database at `to == Demoting`.
    pub transitions: Vec<Transition>,
    /// 3. Messages that may leave now: what they promise is durable already.
    pub send: Vec<Message>,
    /// 4. Changes of the configuration that are in force now, oldest first: to be made durable before [`Cluster::persisted`] is
    ///    called with the number of `persist`, which is there then.
    pub changes_in_force: Vec<ChangeInForce>,
    /// 5. What to append to the raft log.
    pub persist: Option<Persist>,
    /// 6. Everything up to here is in the logs of a majority: waiting commits may be released.
    pub committed: u64,
    /// 7. The database may apply the raft log up to here.
    pub apply: u64,
    /// 8. The database is to be opened for writing in this epoch, once it has applied everything up to `apply`.
    pub promote: Option<u64>,
}

/// Where a node stands when it starts: what it has stored of the configuration and of the database.
#[derive(Clone, Debug)]
pub struct Start<'a> {
    pub membership: &'a Membership,
    /// Raft index of the entry that made this membership; 1 for that of the founders.
    pub membership_index: u64,
    /// Raft index of the configuration that the log's [`raft::Storage::initial_state`] returns.
    pub conf_index: u64,
    /// Index up to which the database has everything.
    pub applied: u64,
    /// The feature level that this node's program has, and its version.
    pub level: u32,
    pub version: &'a str,
    /// This node lost some of its durable memory: it takes part in nothing.
    pub forgotten: bool,
}

/// Why a proposal was refused. Its entry is not in the log and never will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    #[error("this node is not primary in the epoch of the transaction")]
    NotPrimary,
    #[error("the lease of the primary has lapsed")]
    LeaseLapsed,
    #[error("too much is waiting for a majority already")]
    Overloaded,
}

/// One member of the cluster, as pure state.
pub struct Cluster<S: Storage> {
    node: NodeId,
    /// What this program can do, and its version: see [`level`].
    level: u32,
    version: String,
    /// Most members have older programs: see [`Cluster::set_ahead`].
    ahead: bool,
    membership: Membership,
    /// Raft indexes of the newest membership and configuration that are in force, and of the newest proposed one.
    membership_index: u64,
    conf_index: u64,
    changing: u64,
    /// When a message of another member came last.
    heard: BTreeMap<NodeId, u64>,
    /// End of the time in which this node must not take over by itself.
    paused_until: u64,
    changes_in_force: Vec<ChangeInForce>,
    timing: Timing,
    election: Election<S>,
    phase: Phase,
    lease: Lease,
    /// End of the time in which this node neither votes nor campaigns.
    quiet_until: u64,
    /// End of the time in which this node should not be elected, because it could not serve.
    unfit_until: u64,
    /// It should not be elected for now: see [`Cluster::set_unfit_now`].
    unfit_now: bool,
    /// An order of the leader to campaign, which came while this node was unfit.
    order: Option<Message>,
    /// Since when no leader is known.
    leaderless_since: Option<u64>,
    /// Ticks for which it has held back its own candidacy.
    withheld: usize,
    /// The epoch in which this node last was on its way to the ports. It never serves twice in one epoch.
    served: u64,
    promote_sent: bool,
    /// The epoch for which the first lease round was sent.
    confirmed: u64,
    handover: Option<Handover>,
    campaign: Option<Campaign>,
    last_round: u64,
    applied: u64,
    transitions: Vec<Transition>,
    /// Messages that wait until everything up to a number is durable.
    held: VecDeque<(u64, Vec<Message>)>,
    free: Vec<Message>,
    /// The last epoch and vote that were to be persisted, the number they have, and the last durable number.
    vote: (u64, NodeId),
    voted: u64,
    durable: u64,
    ready: Option<Ready>,
    /// This node lost some of its durable memory; see `memory`.
    forgotten: bool,
    /// What shows that it did, found out by this process.
    forgot: Option<String>,
    /// The highest index that was acknowledged, with its term.
    acked: (u64, u64),
    /// Other members that lost some of theirs.
    forgetful: BTreeSet<NodeId>,
    /// Those whose process is known to be dead.
    dead: BTreeSet<NodeId>,
}

#[derive(Clone, Copy, Debug)]
struct Handover {
    until: u64,
    /// When another member gets the order, unless the one that has it campaigns before.
    other: u64,
    to: Option<NodeId>,
}

/// Time without a leader, in nanoseconds, after which even a node that could not serve well campaigns like any other.
const LAST_RESORT_AFTER: u64 = 1_500_000_000;

impl<S: Storage> Cluster<S> {
    /// A node that starts at `now` with its raft log.
    ///
    /// # Errors
    /// When the raft log cannot be read or contradicts itself.
    pub fn new(start: &Start<'_>, node: NodeId, timing: Timing, log: S, now: u64) -> raft::Result<Self> {
        let applied = start.applied;
        let election = Election::new(node, timing.election_ticks, (applied, start.conf_index), log)?;
        Ok(Self {
            node,
            level: start.level,
            version: start.version.to_owned(),
            ahead: false,
            membership: start.membership.clone(),
            membership_index: start.membership_index,
            conf_index: start.conf_index,
            changing: 0,
            heard: BTreeMap::new(),
            paused_until: 0,
            changes_in_force: Vec::new(),
            timing,
            served: 0,
            phase: Phase::Startup,
            lease: Lease::default(),
            quiet_until: if start.forgotten { u64::MAX } else { now + timing.quiet },
            unfit_until: 0,
            unfit_now: false,
            order: None,
            leaderless_since: None,
            withheld: 0,
            promote_sent: false,
            confirmed: 0,
            handover: None,
            campaign: None,
            last_round: 0,
            applied,
            transitions: Vec::new(),
            held: VecDeque::new(),
            free: Vec::new(),
            vote: election.vote(),
            voted: 0,
            durable: 0,
            ready: None,
            forgotten: start.forgotten,
            forgot: None,
            acked: (0, 0),
            forgetful: BTreeSet::new(),
            dead: BTreeSet::new(),
            election,
        })
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    pub fn epoch(&self) -> u64 {
        self.election.term()
    }

    /// Who leads the epoch, as far as this node knows; not necessarily with open ports.
    pub fn leader(&self) -> Option<NodeId> {
        self.election.leader()
    }

    pub fn lease(&self) -> Lease {
        self.lease
    }

    pub fn committed(&self) -> u64 {
        self.election.committed()
    }

    pub fn last_index(&self) -> u64 {
        self.election.last_index()
    }

    /// Index up to which committed entries were handed out, and with them the changes of the membership.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// Raft index that another member is known to have, on the primary only.
    pub fn matched(&self, id: NodeId) -> Option<u64> {
        self.election.matched(id)
    }

    /// True while a planned handover has not come to its end.
    pub fn is_handing_over(&self) -> bool {
        self.handover.is_some()
    }

    /// A tick of the clock: missed ones are dropped by the caller, never repeated.
    pub fn tick(&mut self, now: u64) {
        self.observe(now);
        if self.has_forgotten() || self.phase == Phase::Startup && !self.election.is_leader() {
            return;
        }
        if self.phase == Phase::Demoting && !self.election.is_leader() {
            return; // its own election time-out must not make it a candidate
        }
        let place = self.place();
        if (self.is_paused(now) || self.is_outdated()) && self.election.is_impatient(place) {
            return; // it votes, but does not take over by itself
        }
        if self.is_unfit(now) && self.election.is_impatient(place) && self.withheld < 2 * self.timing.election_ticks {
            // Its turn comes after those who can serve; it votes for them meanwhile.
            self.withheld += 1;
            return;
        }
        self.withheld = 0;
        self.election.tick(place);
        if self.election.is_leader() {
            self.round(now);
            self.demote_forgetful(now);
            self.promote_learners(now);
        }
        self.observe(now);
    }

    /// Sends a heartbeat round that extends the lease when a majority answers it.
    fn round(&mut self, now: u64) {
        self.last_round = now.max(self.last_round + 1);
        self.election.confirm(self.last_round.to_le_bytes().to_vec());
    }

    /// True if the next tick may come a little late: the primary was heard of a moment ago.
    pub fn hears_primary(&self) -> bool {
        self.election.hears_leader()
    }

    /// When [`Cluster::wake`] should be called at the latest, besides ticks.
    pub fn deadline(&self) -> Option<u64> {
        let quiet = (self.phase == Phase::Startup && !self.forgotten).then_some(self.quiet_until);
        let campaign = self.campaign.map(|campaign| campaign.at);
        // Ticks look at what has no known end.
        let ordered = self.order.as_ref().filter(|_| !self.unfit_now).map(|_| self.unfit_until);
        [
            quiet,
            campaign,
            ordered.filter(|until| *until < u64::MAX),
            self.lease.deadline(),
            self.handover.map(|handover| handover.until),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Lets time-outs take effect.
    pub fn wake(&mut self, now: u64) {
        self.observe(now);
    }

    /// A message of another member.
    pub fn step(&mut self, now: u64, message: Message) {
        self.observe(now);
        if self.has_forgotten() || !self.is_sound(&message) {
            return;
        }
        self.forgetful.remove(&message.from);
        self.dead.remove(&message.from);
        if self.membership.get(message.from).is_some() {
            self.heard.insert(message.from, now);
        }
        let silent = matches!(self.phase, Phase::Startup | Phase::Demoting);
        if silent && (election::asks_for_vote(&message) || election::orders_campaign(&message)) {
            return;
        }
        if election::orders_campaign(&message) {
            if self.is_paused(now) || self.is_outdated() {
                return;
            }
            if self.is_unfit(now) {
                self.order = Some(message);
                return;
            }
        }
        self.election.step(message);
        self.observe(now);
    }

    /// Messages to a member may have been lost.
    pub fn peer_unreachable(&mut self, peer: NodeId) {
        self.election.report_unreachable(peer);
    }

    /// Appends one encoded command to the log of the primary, and returns its index.
    ///
    /// # Errors
    /// [`ProposeError`]: the command is not in the log and never will be.
    pub fn propose(&mut self, now: u64, epoch: u64, data: Vec<u8>) -> Result<u64, ProposeError> {
        self.observe(now);
        if epoch != self.epoch() || !matches!(self.phase, Phase::Promoting | Phase::Primary) {
            return Err(ProposeError::NotPrimary);
        }
        if !self.lease.is_valid(now) {
            return Err(ProposeError::LeaseLapsed);
        }
        self.election.propose(data).ok_or(ProposeError::Overloaded)
    }

    /// The database is open for writing in this epoch: the ports may open.
    pub fn promoted(&mut self, now: u64, epoch: u64) {
        self.observe(now);
        if self.phase == Phase::Promoting && epoch == self.epoch() {
            self.enter(Cause::DatabaseOpened);
        }
    }

    /// This node could not serve before `until` (`u64::MAX`: never again): it goes on voting and replicating, but
    /// others are preferred. It is elected only if its log is longer than theirs, so that they get what it has.
    pub fn set_unfit_until(&mut self, now: u64, until: u64) {
        self.unfit_until = self.unfit_until.max(until);
        self.observe(now);
    }

    /// Says whether this node could serve now: it cannot while it replays much of its log, or its disk is full.
    pub fn set_unfit_now(&mut self, now: u64, unfit_now: bool) {
        self.unfit_now = unfit_now;
        self.observe(now);
    }

    fn is_unfit(&self, now: u64) -> bool {
        self.unfit_now || now < self.unfit_until
    }

    /// Gives up the role for a reason that lies outside of the election.
    pub fn give_up(&mut self, now: u64, cause: Cause) {
        self.observe(now);
        if matches!(self.phase, Phase::Promoting | Phase::Primary) {
            self.enter(cause);
            self.election.forget_leader();
        }
        self.observe(now);
    }

    /// Planned handover: the caller has drained the ports. Leadership goes over once the database is closed. It goes to
    /// `to`, or else to the member that has most. Does nothing while takeover is paused: nobody would take it.
    pub fn hand_over(&mut self, now: u64, to: Option<NodeId>) {
        self.hand_over_because(now, to, Cause::Handover);
    }

    /// Hands the role over for another reason: what cannot go on here is still good enough to let another member begin
    /// at once.
    pub fn hand_over_because(&mut self, now: u64, to: Option<NodeId>, cause: Cause) {
        self.observe(now);
        if matches!(self.phase, Phase::Promoting | Phase::Primary) && !self.is_takeover_paused(now) {
            self.handover = Some(Handover { until: now + self.timing.handover, other: u64::MAX, to });
            self.enter(cause);
        }
    }

    /// Ports, workload and database are closed after a demotion.
    pub fn demoted(&mut self, now: u64) {
        self.observe(now);
        if self.phase == Phase::Demoting {
            self.enter(Cause::DatabaseClosed);
        }
        self.observe(now);
    }

    /// Takes what there is to do; none if there is nothing. [`Cluster::written`] must follow before the next call.
    ///
    /// # Errors
    /// [`NotUnderstood`]: the node must not go on.
    pub fn poll(&mut self, now: u64) -> Result<Option<Output>, NotUnderstood> {
        self.observe(now);
        assert!(self.ready.is_none(), "written() follows poll()");
        let mut persist = None;
        if let Some(mut ready) = self.election.ready() {
            self.confirm(now, &ready);
            self.configure(ready.committed_entries())?;
            persist = Some(self.collect(&mut ready));
            self.ready = Some(ready);
        } else if self.transitions.is_empty() && self.free.is_empty() {
            return Ok(None);
        }
        let promote = self.may_promote(now);
        self.note_acknowledged();
        Ok(Some(Output {
            lease: self.lease.deadline().unwrap_or(0),
            transitions: std::mem::take(&mut self.transitions),
            send: std::mem::take(&mut self.free),
            persist,
            changes_in_force: std::mem::take(&mut self.changes_in_force),
            committed: if matches!(self.phase, Phase::Promoting | Phase::Primary) { self.committed() } else { 0 },
            apply: self.applied,
            promote,
        }))
    }

    /// The last output's entries are in the raft log and can be read, though they need not be durable.
    pub fn written(&mut self) {
        if let Some(ready) = self.ready.take() {
            self.election.written(ready);
        }
        self.election.stop_if_removed();
    }

    /// Everything up to this number is durable.
    pub fn persisted(&mut self, number: u64) {
        self.durable = self.durable.max(number);
        self.election.persisted(number);
        while self.held.front().is_some_and(|(held, _)| *held <= number) {
            self.free.extend(self.held.pop_front().into_iter().flat_map(|(_, messages)| messages));
        }
    }

    /// Rounds that a majority has answered extend the lease.
    fn confirm(&mut self, now: u64, ready: &Ready) {
        for state in ready.read_states() {
            let Ok(sent) = state.request_ctx.as_slice().try_into().map(u64::from_le_bytes) else { continue };
            if matches!(self.phase, Phase::Promoting | Phase::Primary) && self.election.is_leader() {
                assert!(sent <= now.max(self.last_round), "a round was confirmed before it was sent");
                self.lease.confirm(sent, self.timing.lease);
            }
        }
    }

    /// Sorts what raft wants: what may leave now, what must be durable first.
    fn collect(&mut self, ready: &mut Ready) -> Persist {
        let number = ready.number();
        let hard_state = ready.hs().cloned();
        let must_sync = ready.must_sync();
        if let Some(state) = &hard_state
            && (state.term, state.vote) != self.vote
        {
            self.vote = (state.term, state.vote);
            self.voted = number;
        }
        let mut messages = ready.take_messages();
        let mut after = ready.take_persisted_messages();
        for message in messages.iter().chain(&after).filter(|m| m.get_msg_type() == MessageType::MsgSnapshot) {
            // It is a signal and no more: the member fetches the database on another connection, restarts with it, and
            // is found there by the next probe.
            self.election.snapshot_over(message.to);
        }
        self.free.append(&mut messages);
        if self.voted <= self.durable {
            // An answer to a heartbeat promises no entry: a stalled disk must not cost the primary its lease.
            let at = |message: &mut Message| message.get_msg_type() == MessageType::MsgHeartbeatResponse;
            self.free.extend(after.extract_if(.., at));
        }
        if !after.is_empty() {
            self.held.push_back((number, after));
        }
        if let Some(entry) = ready.committed_entries().last() {
            self.applied = entry.index;
        }
        Persist { number, entries: ready.take_entries(), hard_state, must_sync }
    }

    /// Asks once per epoch for the database, when nothing can be missing from it.
    fn may_promote(&mut self, now: u64) -> Option<u64> {
        // A round can be confirmed after its lease is over: this process may have been stopped in between.
        let known = self.phase == Phase::Promoting && self.election.committed_in_term() && self.lease.is_valid(now);
        // The entry that opened this epoch is among those handed out for application.
        let complete = known && self.applied >= self.committed();
        if !complete || self.promote_sent || self.is_outdated() {
            return None;
        }
        self.promote_sent = true;
        Some(self.epoch())
    }

    /// Brings the phase in line with the election and the clock. Called at both ends of every input.
    fn observe(&mut self, now: u64) {
        if self.phase == Phase::Startup && now >= self.quiet_until {
            self.enter(Cause::QuietPeriodOver);
            self.schedule_campaign(now);
        }
        if matches!(self.phase, Phase::Promoting | Phase::Primary) {
            if !self.election.is_leader() || self.epoch() != self.served {
                self.enter(Cause::LeadershipLost);
            } else if self.lease.deadline().is_some() && !self.lease.is_valid(now) {
                self.enter(Cause::LeaseLapsed);
                self.election.forget_leader();
            }
        }
        // It was elected before it knew the level. Once it has applied all entries of earlier epochs, it does.
        if self.phase == Phase::Promoting && self.is_outdated() {
            self.enter(Cause::Outdated);
            self.election.forget_leader();
        }
        if self.phase == Phase::Secondary && self.election.is_leader() {
            self.lead(now);
        }
        if self.phase == Phase::Promoting && self.confirmed < self.epoch() && self.election.committed_in_term() {
            // The takeover waits for this round: it must not wait for a tick, too.
            self.confirmed = self.epoch();
            self.round(now);
        }
        if self.handover.is_some_and(|handover| now >= handover.until) || !self.election.is_leader() {
            if self.election.is_leader() && self.handover.is_some() {
                self.election.forget_leader();
            }
            self.handover = None;
        }
        if self.election.leader().is_some() {
            self.leaderless_since = None;
        }
        let since = *self.leaderless_since.get_or_insert(now);
        // A voter with a longer log of an older epoch refuses whoever is not preferred, although it must not be elected
        // itself: after a while any primary is better than none. It lets the others catch up, and gives up.
        self.election.prefer(!self.is_unfit(now) || now - since >= LAST_RESORT_AFTER);
        self.follow_order(now);
        self.run_campaign(now);
    }

    /// The leader that ordered this node to campaign has closed its ports and waits, so begin as soon as possible. An
    /// order that comes too late is harmless: raft drops it with its epoch, and its leader never serves again in the
    /// same epoch.
    fn follow_order(&mut self, now: u64) {
        if self.order.is_some() && !self.is_unfit(now) {
            let order = self.order.take().filter(|_| self.phase == Phase::Secondary);
            if let Some(order) = order.filter(|_| !self.is_paused(now) && !self.is_outdated()) {
                self.election.step(order);
            }
        }
    }

    /// A leader without ports: new in this epoch, or on its way out of the role.
    fn lead(&mut self, now: u64) {
        if self.served < self.epoch() {
            self.served = self.epoch();
            self.promote_sent = false;
            // What this node proposed in an earlier epoch is committed and applied, or gone.
            self.changing = 0;
            self.campaign = None;
            self.enter(Cause::ElectionWon);
        } else if let Some(handover) = &mut self.handover {
            match self.election.transferee() {
                // Again and again: raft may not know just now who answers, and it forgets an order that has taken long.
                None => {
                    handover.other = now + self.timing.handover / 3;
                    self.election.transfer(handover.to, None);
                }
                // It could not serve well, or the order was lost.
                Some(idle) if now >= handover.other => {
                    handover.other = u64::MAX;
                    self.election.transfer(None, Some(idle));
                }
                Some(_) => {}
            }
        } else {
            // An order to campaign from an aborted handover may still be under way: only a new epoch makes it harmless.
            self.election.forget_leader();
        }
    }

    fn enter(&mut self, cause: Cause) {
        let Some(edge) = role::transition(self.phase, cause) else {
            panic!("no transition from {:?} by {cause:?}", self.phase)
        };
        self.phase = edge.to;
        if edge.to == Phase::Demoting {
            self.lease.revoke();
        }
        self.transitions.push(edge);
    }
}
