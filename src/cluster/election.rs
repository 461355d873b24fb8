//! Raft, wrapped: the only file that speaks of leaders and followers. Owns the `RawNode`; knows no clock, only ticks.
//! Must never decide about ports: leadership alone opens nothing.

use raft::{
    Config, GetEntriesContext, INVALID_ID, INVALID_INDEX, RawNode, ReadOnlyOption, Ready, SnapshotStatus, StateRole,
    Storage,
    eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, ConfState, EntryType, Message, MessageType},
};

use super::{Membership, NodeId, roster::MOST};

/// Ticks of silence after which a voter may campaign or vote for somebody else.
pub const ELECTION_TICKS: usize = 20;
/// Bytes of entries in one append message: small enough that a heartbeat behind it is not late on a slow link.
const MAX_MESSAGE_BYTES: u64 = 512 << 10;
/// Append messages that may be in flight to one member.
const MAX_INFLIGHT: usize = 64;
/// Bytes of proposals that wait for a majority; more are refused.
const MAX_UNCOMMITTED_BYTES: u64 = 64 << 20;
/// Bytes of committed entries handed out at once.
const MAX_COMMITTED_BYTES: u64 = 1 << 20;

/// Entries by which a member may be behind and still count as caught up: under load it is never quite up to date.
const CAUGHT_UP: u64 = 200;

/// One node's view of the election, and the replicated log behind it.
pub struct Election<S: Storage> {
    raw: RawNode<S>,
}

impl<S: Storage> Election<S> {
    /// Wraps a log. `ticks`: for how long a voter keeps its promise to its leader. `applied`: the index up to which the
    /// database needs no entry. `configured`: the index of the configuration that the log returns. A configuration in
    /// force is committed, even if the commit index in the log is lower, because that reaches the disk last. A member
    /// that has not yet heard of a new voter learns of it from this node's requests for votes.
    ///
    /// # Errors
    /// When the log cannot be read or contradicts itself.
    pub fn new(node: NodeId, ticks: usize, (applied, configured): (u64, u64), log: S) -> raft::Result<Self> {
        let config = Config {
            id: node,
            election_tick: ticks,
            // Heartbeats come from the lease rounds (`confirm`), one a tick; raft's own are only a fallback.
            heartbeat_tick: ticks - 1,
            // What raft draws between these is replaced before each tick: see `patience`.
            min_election_tick: patience(ticks, 0),
            max_election_tick: patience(ticks, MOST),
            applied,
            check_quorum: true,
            pre_vote: true,
            read_only_option: ReadOnlyOption::Safe,
            // Saves two messages a commit; the others learn of it with the next entry or heartbeat, a tick at most.
            skip_bcast_commit: true,
            max_size_per_msg: MAX_MESSAGE_BYTES,
            max_inflight_msgs: MAX_INFLIGHT,
            max_uncommitted_size: MAX_UNCOMMITTED_BYTES,
            max_committed_size_per_ready: MAX_COMMITTED_BYTES,
            ..Config::default()
        };
        // Raft's own log lines are dropped: whoever drives the node logs what matters, once.
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let mut raw = RawNode::new(&config, log, &logger)?;
        let log = &mut raw.raft.raft_log;
        // A snapshot may have brought a configuration that is newer than it is, to a log with an end that nobody else
        // has.
        if (log.first_index()..=log.last_index()).contains(&configured) {
            let own = log.slice(configured, configured + 1, None, GetEntriesContext::empty(false))?;
            if own.iter().any(|entry| entry.get_entry_type() != EntryType::EntryNormal) {
                log.commit_to(configured);
            }
        }
        Ok(Self { raw })
    }

    pub fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    /// Gives up leadership or candidacy if this node has no vote any more: the change that removed it was made by an
    /// earlier primary. Raft itself would go on, and panic for want of its own progress.
    pub fn stop_if_removed(&mut self) {
        if !self.raw.raft.promotable() && self.raw.raft.state != StateRole::Follower {
            self.forget_leader();
        }
    }

    /// True while real votes (not pre-votes) are being collected: another attempt would throw them away.
    pub fn is_candidate(&self) -> bool {
        self.raw.raft.state == StateRole::Candidate
    }

    /// The leader that this node follows or is; none while it looks for one.
    pub fn leader(&self) -> Option<NodeId> {
        Some(self.raw.raft.leader_id).filter(|id| *id != INVALID_ID)
    }

    pub fn term(&self) -> u64 {
        self.raw.raft.term
    }

    /// The epoch and vote that are durable at the start.
    pub fn vote(&self) -> (u64, NodeId) {
        (self.raw.raft.term, self.raw.raft.vote)
    }

    /// Whether voters should prefer this node: they refuse one that is not preferred unless its log is longer than
    /// theirs.
    pub fn prefer(&mut self, preferred: bool) {
        self.raw.set_priority(if preferred { 0 } else { -1 });
    }

    /// Highest index known to be in the logs of a majority.
    pub fn committed(&self) -> u64 {
        self.raw.raft.raft_log.committed
    }

    pub fn last_index(&self) -> u64 {
        self.raw.raft.raft_log.last_index()
    }

    /// True once the leader has committed an entry of its own term.
    pub fn committed_in_term(&self) -> bool {
        self.is_leader() && self.raw.raft.commit_to_current_term()
    }

    /// A tick of a node that is in this `place` of those who may campaign: see [`super::candidacy`].
    pub fn tick(&mut self, place: usize) {
        let patience = self.patience(place);
        self.raw.raft.set_randomized_election_timeout(patience);
        if !self.must_wait_for_disk() {
            self.raw.tick();
        }
    }

    /// True if this node follows a leader that it has heard of since the last tick but one.
    pub fn hears_leader(&self) -> bool {
        let raft = &self.raw.raft;
        !self.is_leader() && raft.leader_id != INVALID_ID && raft.election_elapsed <= 1
    }

    /// True if the next tick ends this voter's patience and makes it a candidate.
    pub fn is_impatient(&self, place: usize) -> bool {
        let raft = &self.raw.raft;
        !self.is_leader() && raft.promotable() && raft.election_elapsed + 1 >= self.patience(place)
    }

    fn patience(&self, place: usize) -> usize {
        patience(self.raw.raft.election_timeout(), place.min(MOST - 1))
    }

    /// One heartbeat round. Once an entry of this term is committed, it carries `context`, which comes back from
    /// [`Ready::read_states`] when a majority has answered.
    pub fn confirm(&mut self, context: Vec<u8>) {
        if self.committed_in_term() { self.raw.read_index(context) } else { self.raw.ping() }
    }

    /// Takes in a message of another member. Refusals are raft's way of ignoring it.
    pub fn step(&mut self, message: Message) {
        let _ = self.raw.step(message);
    }

    /// Appends a proposal to the leader's log and returns its index; none if raft refuses it (not leader, a transfer is
    /// under way, too much is uncommitted).
    pub fn propose(&mut self, data: Vec<u8>) -> Option<u64> {
        let before = self.last_index();
        self.raw.propose(Vec::new(), data).ok()?;
        let index = self.last_index();
        (self.is_leader() && index == before + 1).then_some(index)
    }

    /// Appends a proposal that carries the membership after it, and returns its index. It changes who votes if that
    /// differs from the configuration in force. None if raft refuses it, as while another such change is under way.
    pub fn propose_membership(&mut self, membership: &Membership) -> Option<u64> {
        let conf = self.conf();
        if !self.is_leader() || self.raw.raft.has_pending_conf() || !conf.voters_outgoing.is_empty() {
            return None;
        }
        let before = self.last_index();
        let (context, change) = (membership.encode(), difference(&conf, membership));
        if change.changes.is_empty() {
            self.raw.propose(context, Vec::new()).ok()?;
        } else {
            self.raw.propose_conf_change(context, change).ok()?;
        }
        let index = self.last_index();
        (self.is_leader() && index == before + 1).then_some(index)
    }

    /// Who votes and who only replicates, at the moment.
    pub fn conf(&self) -> ConfState {
        self.raw.raft.prs().conf().to_conf_state()
    }

    /// Applies a committed change of the configuration: to what `membership` says, or, without one, the end of a joint
    /// configuration. All nodes do this at the same index, so all come to the same configuration.
    ///
    /// # Errors
    /// A change that is not possible, which no primary would have proposed.
    pub fn configure(&mut self, membership: Option<&Membership>) -> raft::Result<ConfState> {
        let change = membership.map(|membership| difference(&self.conf(), membership)).unwrap_or_default();
        if membership.is_some() && change.changes.is_empty() {
            return Ok(self.conf());
        }
        self.raw.apply_conf_change(&change)
    }

    /// True if this member has the entry at `least`, and about as much of the log as the leader, which we are.
    pub fn has_caught_up(&self, id: NodeId, least: u64) -> bool {
        let Some(progress) = self.raw.raft.prs().get(id) else { return false };
        progress.matched >= least && progress.matched + CAUGHT_UP >= self.last_index()
    }

    /// A sole voter is elected without a message, and raft panics if its log is not durable then.
    fn must_wait_for_disk(&self) -> bool {
        let log = &self.raw.raft.raft_log;
        self.raw.raft.prs().is_singleton() && !self.is_leader() && log.persisted < log.last_index()
    }

    /// Tells raft that a snapshot is not on its way any more, so that it looks again where that member stands.
    pub fn snapshot_over(&mut self, id: NodeId) {
        self.raw.report_snapshot(id, SnapshotStatus::Failure);
    }

    /// Asks the others for their votes, pre-vote first.
    pub fn campaign(&mut self) {
        if self.raw.raft.promotable() && !self.must_wait_for_disk() {
            let _ = self.raw.campaign();
        }
    }

    /// Gives up leadership, or forgets the leader, without a new term.
    pub fn forget_leader(&mut self) {
        let term = self.term();
        self.raw.raft.become_follower(term, INVALID_ID);
    }

    /// Starts to hand leadership to `to`, or else to the most advanced voter but `not` that has answered lately.
    pub fn transfer(&mut self, to: Option<NodeId>, not: Option<NodeId>) {
        let me = self.raw.raft.id;
        let voters = self.conf().voters;
        let best = self
            .raw
            .raft
            .prs()
            .iter()
            .filter(|(id, progress)| **id != me && progress.recent_active && voters.contains(id))
            .filter(|(id, _)| to.is_none_or(|to| to == **id) && not != Some(**id))
            .max_by_key(|(id, progress)| (progress.matched, std::cmp::Reverse(**id)))
            .map(|(id, _)| *id);
        if let Some(best) = best {
            self.raw.transfer_leader(best);
        }
    }

    /// The member that has got the order to campaign, or gets it as soon as it has all entries.
    pub fn transferee(&self) -> Option<NodeId> {
        self.raw.raft.lead_transferee
    }

    /// What this member acknowledged is gone: nothing is counted for it until it acknowledges something again.
    pub fn forget_progress(&mut self, id: NodeId) {
        let next = self.last_index() + 1;
        let leads = self.is_leader();
        if let Some(progress) = self.raw.raft.mut_prs().get_mut(id).filter(|_| leads) {
            (progress.matched, progress.pending_snapshot, progress.pending_request_snapshot) = (0, 0, INVALID_INDEX);
            progress.become_probe();
            progress.next_idx = next;
        }
    }

    /// True while a change of the voters is under way.
    pub fn is_changing(&self) -> bool {
        self.raw.raft.has_pending_conf() || !self.conf().voters_outgoing.is_empty()
    }

    /// The highest index that is known to be on this node's disk.
    pub fn persisted_index(&self) -> u64 {
        self.raw.raft.raft_log.persisted
    }

    /// Tells raft that messages to this member may be lost, so that it probes before it streams.
    pub fn report_unreachable(&mut self, id: NodeId) {
        self.raw.report_unreachable(id);
    }

    /// Index that a member is known to have in its log; only the leader knows.
    pub fn matched(&self, id: NodeId) -> Option<u64> {
        let progress = self.raw.raft.prs().get(id)?;
        self.is_leader().then_some(progress.matched)
    }

    pub fn ready(&mut self) -> Option<Ready> {
        self.raw.has_ready().then(|| self.raw.ready())
    }

    /// The log holds what `ready` carried, readable though not yet durable. Committed entries count as applied for raft
    /// as soon as they were handed out: it uses that mark for membership changes only, and those are applied here.
    pub fn written(&mut self, ready: Ready) {
        self.raw.advance_append_async(ready);
        self.raw.advance_apply();
    }

    /// Everything up to the ready of this number is durable.
    pub fn persisted(&mut self, number: u64) {
        self.raw.on_persist_ready(number);
    }
}

/// Ticks of silence after which a voter campaigns, by its place in the queue. By then its promise is over, whatever its
/// place, and those before it have had the time to be elected. Not random, because that splits votes (`docs/design.md`
/// has the figures).
fn patience(ticks: usize, place: usize) -> usize {
    ticks + 2 + 3 * place
}

/// The change that leads from a configuration to the voters and learners of a membership. More than one step at a time
/// goes through a joint configuration, which raft ends by itself.
fn difference(conf: &ConfState, membership: &Membership) -> ConfChangeV2 {
    let mut changes = Vec::new();
    let mut push = |kind, id| {
        let mut single = ConfChangeSingle::default();
        single.set_change_type(kind);
        single.node_id = id;
        changes.push(single);
    };
    for id in membership.voters().filter(|id| !conf.voters.contains(id)) {
        push(ConfChangeType::AddNode, id);
    }
    for id in membership.learners().filter(|id| !conf.learners.contains(id)) {
        push(ConfChangeType::AddLearnerNode, id);
    }
    for id in conf.voters.iter().chain(&conf.learners).filter(|id| membership.get(**id).is_none()) {
        push(ConfChangeType::RemoveNode, *id);
    }
    let mut change = ConfChangeV2::default();
    change.set_changes(changes.into());
    change
}

/// True for the requests by which others ask this node for its vote.
pub fn asks_for_vote(message: &Message) -> bool {
    matches!(message.get_msg_type(), MessageType::MsgRequestVote | MessageType::MsgRequestPreVote)
}

/// True for the order of a leader to campaign at once.
pub fn orders_campaign(message: &Message) -> bool {
    message.get_msg_type() == MessageType::MsgTimeoutNow
}

#[cfg(test)]
mod tests {
    use raft::storage::MemStorage;

    use super::*;

    #[test]
    fn a_leader_is_heard_until_two_ticks_without_a_word() {
        let log = MemStorage::new_with_conf_state((vec![1, 2, 3], vec![]));
        let mut election = Election::new(1, ELECTION_TICKS, (0, 0), log).unwrap();
        assert!(!election.hears_leader(), "nobody leads yet");
        for _ in 0..3 {
            election.step(Message {
                msg_type: MessageType::MsgHeartbeat,
                from: 2,
                to: 1,
                term: 1,
                ..Message::default()
            });
            election.tick(0);
            assert!(election.hears_leader(), "the next heartbeat is awaited");
            election.tick(0);
            assert!(!election.hears_leader(), "silence is counted without delay");
        }
    }
}
