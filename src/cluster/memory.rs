//! How the core deals with an incomplete durable memory: its own, and that of others. A node that forgot takes part in
//! nothing; a primary takes the vote of a member that says that it forgot. Must never count what a member acknowledged
//! before it forgot.
//!
//! `docs/memory.md` says who finds which loss, and why what is done here is enough.

use raft::{
    Storage,
    eraftpb::{Message, MessageType},
};

use super::{Change, Cluster, NodeId, Phase, reach::Reach};

impl<S: Storage> Cluster<S> {
    /// True once this node is known to have lost some of its durable memory.
    pub fn has_forgotten(&self) -> bool {
        self.forgotten || self.forgot.is_some()
    }

    /// What is missing from this node's memory, as a message has shown. The node must start again as one that forgot.
    pub fn forgot(&self) -> Option<&str> {
        self.forgot.as_deref()
    }

    /// What this node has promised and has on its disk; `None` while a vote is not yet durable.
    pub fn reach(&self) -> Option<Reach> {
        if self.forgotten || self.voted > self.durable {
            return None;
        }
        let (term, vote) = self.vote;
        let persisted = self.election.persisted_index();
        let acked = match self.acked {
            _ if self.election.is_leader() && self.epoch() == term => persisted,
            (of, index) if of == term => index,
            _ => 0,
        };
        Some(Reach { term, vote, acked, committed: self.committed().min(persisted) })
    }

    /// Remembers what the messages that leave now acknowledge. No message of a node that forgot may leave.
    pub(super) fn note_acknowledged(&mut self) {
        if self.has_forgotten() {
            self.free.clear();
        }
        for message in self.free.iter().filter(|message| message.get_msg_type() == MessageType::MsgAppendResponse) {
            if !message.reject {
                self.acked = self.acked.max((message.term, message.index));
            }
        }
    }

    /// False for a message that raft must not see. Raft takes for granted what these messages contradict, and panics.
    pub(super) fn is_sound(&mut self, message: &Message) -> bool {
        let (last, index) = (self.last_index(), message.index);
        match message.get_msg_type() {
            // A leader's heartbeat names no index that this node has not acknowledged to it.
            MessageType::MsgHeartbeat if message.term >= self.epoch() && message.commit > last => {
                let what = format!("it had acknowledged index {}, and its raft log ends at {last}", message.commit);
                self.forgot = Some(what);
                false
            }
            MessageType::MsgAppendResponse => message.reject || index <= last || message.term < self.epoch(),
            MessageType::MsgAppend => {
                let consecutive = message.entries.iter().zip(index + 1..).all(|(entry, index)| entry.index == index);
                consecutive && message.entries.iter().all(|entry| entry.term <= message.term)
            }
            MessageType::MsgPropose | MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => false,
            _ => true,
        }
    }

    /// Another member says that it lost some of its durable memory: nothing of what it acknowledged counts any more.
    pub fn peer_forgot(&mut self, now: u64, peer: NodeId) {
        self.observe(now);
        self.election.forget_progress(peer);
        self.forgetful.insert(peer);
    }

    /// Checks whether a member that forgot may have the database now: it must have no vote, and no change that gives it
    /// one may be under way. What it acknowledges later, it acknowledges with a raft log that begins after the loss of
    /// its vote.
    ///
    /// # Errors
    /// If it may not: a sentence for that member that says why.
    pub fn may_begin_again(&self, peer: NodeId) -> Result<(), String> {
        let conf = self.election.conf();
        let votes = conf.voters.contains(&peer) || conf.voters_outgoing.contains(&peer);
        let settled = self.changing <= self.applied && !self.election.is_changing();
        match self.membership.get(peer) {
            _ if self.phase != Phase::Primary => Err("this node is not primary".to_owned()),
            None => Err("it is not a member".to_owned()),
            Some(member) if !member.voter && !votes && settled && self.forgetful.contains(&peer) => Ok(()),
            Some(_) => Err("its vote has to be taken away first, which needs all other members".to_owned()),
        }
    }

    /// Takes the vote of a member that forgot, while the other voters are a majority without it.
    pub(super) fn demote_forgetful(&mut self, now: u64) {
        if self.phase != Phase::Primary || self.changing > self.applied || self.election.is_changing() {
            return;
        }
        let forgot = self.membership.voters().find(|id| self.forgetful.contains(id) && *id != self.node);
        let Some(node) = forgot else { return };
        let heard = self.membership.voters().filter(|id| self.hears(*id, now)).count();
        if heard > self.membership.voters().count() / 2 {
            // Refused only while something else is under way: the next tick tries again.
            let _ = self.change(now, &Change::Demote { node });
        }
    }
}

#[cfg(test)]
mod tests {
    use raft::storage::MemStorage;

    use super::*;
    use crate::cluster::{ClusterId, Member, Membership, Start, Timing, feature_level};

    fn cluster(forgotten: bool) -> Cluster<MemStorage> {
        let member = |id| Member::founder(id, &format!("node{id}"), &format!("127.0.0.{id}"), 8086);
        let membership = Membership::founded(ClusterId(7), (1..=3).map(member).collect());
        let log = MemStorage::new_with_conf_state((vec![1, 2, 3], vec![]));
        let start = Start {
            membership: &membership,
            membership_index: 1,
            conf_index: 1,
            applied: 0,
            level: feature_level(),
            version: "1.2.3",
            forgotten,
        };
        Cluster::new(&start, 1, Timing::default(), log, 0).unwrap()
    }

    fn message(kind: MessageType, term: u64, change: impl FnOnce(&mut Message)) -> Message {
        let mut message = Message { from: 2, to: 1, term, ..Message::default() };
        message.set_msg_type(kind);
        change(&mut message);
        message
    }

    /// What is sent within a second of whatever may make it campaign.
    fn sent(cluster: &mut Cluster<MemStorage>) -> Vec<Message> {
        let mut sent = Vec::new();
        for tick in 1..60 {
            cluster.tick(tick * Timing::default().tick);
            while let Some(output) = cluster.poll(tick * Timing::default().tick).unwrap() {
                sent.extend(output.send);
                let number = output.persist.map(|persist| persist.number);
                cluster.written();
                number.into_iter().for_each(|number| cluster.persisted(number));
            }
        }
        sent
    }

    #[test]
    fn a_heartbeat_that_speaks_of_what_is_gone_is_no_panic_but_the_end_of_all_promises() {
        let mut whole = cluster(false);
        whole.step(1, message(MessageType::MsgHeartbeat, 5, |_| ()));
        assert!(!whole.has_forgotten() && !sent(&mut whole).is_empty());
        let mut node = cluster(false);
        node.step(1, message(MessageType::MsgHeartbeat, 5, |message| message.commit = 320));
        assert!(node.forgot().unwrap().contains("index 320"));
        node.step(2, message(MessageType::MsgRequestVote, 9, |message| message.index = 400));
        assert!(sent(&mut node).is_empty() && node.epoch() < 5);
    }

    #[test]
    fn a_node_that_forgot_neither_answers_nor_campaigns() {
        let mut node = cluster(true);
        node.step(1, message(MessageType::MsgHeartbeat, 5, |_| ()));
        node.step(2, message(MessageType::MsgRequestVote, 9, |message| message.index = 400));
        node.step(3, message(MessageType::MsgTimeoutNow, 9, |_| ()));
        assert!(sent(&mut node).is_empty());
        assert_eq!((node.phase(), node.reach()), (Phase::Startup, None));
    }

    #[test]
    fn an_acknowledgement_of_what_was_never_sent_is_not_heard() {
        let mut node = cluster(false);
        node.step(1, message(MessageType::MsgAppendResponse, 1, |message| message.index = 1000));
        assert!(!node.is_sound(&message(MessageType::MsgAppendResponse, 1, |message| message.index = 1000)));
        let entry = |index| raft::eraftpb::Entry { index, term: 1, ..Default::default() };
        let gap = message(MessageType::MsgAppend, 1, |message| message.entries = vec![entry(1), entry(3)].into());
        assert!(!node.is_sound(&gap) && !node.has_forgotten());
    }
}
