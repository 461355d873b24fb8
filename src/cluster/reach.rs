//! How far the durable memory of a member had reached, as it reports and as others remember. Pure. Must never say that
//! a raft log forgot if it only lost what it had promised to nobody.
//!
//! What a member has promised can only grow, though its raft log may become shorter: a new leader replaces an end that
//! no majority has. So what is compared is not the end of the log, but the epoch, the vote in that epoch, the index
//! that was acknowledged to the leader of that epoch, and the index that is known to be committed.

use std::collections::BTreeMap;

use raft::eraftpb::{HardState, Message, MessageType};
use serde::{Deserialize, Serialize};

use super::{Membership, NodeId};

/// Processes of one member that are remembered as checked.
const LIVES: usize = 8;

/// The least that a member is known to have had on its disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reach {
    pub term: u64,
    /// Whom it voted for in that term; 0 for nobody.
    pub vote: NodeId,
    /// What it acknowledged in that term.
    pub acked: u64,
    /// What it had of what is committed.
    pub committed: u64,
}

/// What a raft log has when its node starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    pub term: u64,
    pub vote: NodeId,
    pub last: u64,
}

impl Claim {
    /// What a raft log with this hard state and last index has.
    pub fn of(hard: &HardState, last: u64) -> Self {
        Self { term: hard.term, vote: hard.vote, last }
    }
}

impl Reach {
    /// What is missing from a log; none if nothing is.
    pub fn missing(&self, claim: &Claim) -> Option<String> {
        let Claim { term, vote, last } = *claim;
        if self.term > term {
            return Some(format!("it had reached epoch {}, and its raft log ends in epoch {term}", self.term));
        }
        if self.term == term && self.vote != 0 && self.vote != vote {
            return Some(format!("it had voted in epoch {term}, and its raft log does not say so"));
        }
        if self.term == term && self.acked > last {
            return Some(format!("it had acknowledged index {}, and its raft log ends at index {last}", self.acked));
        }
        (self.committed > last)
            .then(|| format!("it had index {}, which is committed, and its raft log ends at {last}", self.committed))
    }

    /// Takes in what is known from elsewhere.
    pub fn raise(&mut self, other: &Self) {
        self.enter(other.term);
        if self.term == other.term {
            if self.vote == 0 {
                self.vote = other.vote;
            }
            self.acked = self.acked.max(other.acked);
        }
        self.committed = self.committed.max(other.committed);
    }

    /// Takes in what a message of the member proves: one of these leaves only when what it promises is on disk. A
    /// pre-vote speaks of a term that nobody has entered yet, and a leader does not wait for its disk.
    pub fn heard(&mut self, message: &Message) {
        use MessageType::{MsgAppendResponse, MsgHeartbeatResponse, MsgRequestVote, MsgRequestVoteResponse};
        let kind = message.get_msg_type();
        if !matches!(kind, MsgAppendResponse | MsgHeartbeatResponse | MsgRequestVote | MsgRequestVoteResponse) {
            return;
        }
        self.enter(message.term);
        if message.term < self.term {
            return;
        }
        match kind {
            MsgAppendResponse if !message.reject => self.acked = self.acked.max(message.index),
            MsgRequestVoteResponse if !message.reject && self.vote == 0 => self.vote = message.to,
            MsgRequestVote if self.vote == 0 => self.vote = message.from,
            _ => {}
        }
    }

    /// What it acknowledged in an epoch is what the leader of that epoch has; so is what was committed up to that
    /// epoch.
    pub fn settle(&mut self, term: u64, committed: u64) {
        if self.term == term {
            self.committed = self.committed.max(self.acked.min(committed));
        }
    }

    fn enter(&mut self, term: u64) {
        if term > self.term {
            (self.term, self.vote, self.acked) = (term, 0, 0);
        }
    }
}

/// What a node says about its own memory when it calls another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// Nothing: an older program, or not a member yet.
    #[default]
    Unsaid,
    /// That it lost some of it: it takes part in nothing.
    Forgotten,
    /// What its raft log had when its process started.
    Whole(Claim),
}

/// What is remembered of another member.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    pub reach: Reach,
    /// It said that it forgot, and has kept its vote since. Whatever it comes back with before that was taken away is
    /// old. Not kept: an older copy of this memory must not accuse a member that is whole again.
    #[serde(skip)]
    pub forgotten: bool,
    /// It has a vote.
    pub voter: bool,
    /// Processes of it, newest last, that were found to have everything: what they did since is in `reach`, too.
    lives: Vec<u64>,
}

impl Known {
    /// Why a process of the member must not be heard; none if it may.
    pub fn objection(&self, life: u64, standing: &Standing) -> Option<String> {
        match standing {
            Standing::Unsaid | Standing::Forgotten => None,
            Standing::Whole(_) if self.lives.contains(&life) => None,
            Standing::Whole(_) if self.forgotten => {
                Some("it said that it forgot, and its vote has not been taken away since".to_owned())
            }
            Standing::Whole(claim) => self.reach.missing(claim),
        }
    }

    /// A process of the member, to which there is no objection, is heard from now on.
    pub fn admit(&mut self, life: u64) {
        if !self.lives.contains(&life) {
            if self.lives.len() >= LIVES {
                self.lives.remove(0);
            }
            self.lives.push(life);
        }
    }

    /// The member itself says how far its memory has reached, or that it lost some of it.
    pub fn reported(&mut self, reach: &Reach, forgotten: bool) {
        if !forgotten {
            self.reach.raise(reach);
        } else if self.voter {
            self.forgotten = true;
        } else {
            // Without a vote it has promised nothing that anybody relies on.
            *self = Self::default();
        }
    }
}

/// Follows the membership in what is remembered. A member whose vote was taken away begins again: until it has its vote
/// back, nobody relies on what it promised before, and then its raft log begins behind that.
pub fn follow_membership(known: &mut BTreeMap<NodeId, Known>, membership: &Membership, me: NodeId) {
    known.retain(|id, _| membership.get(*id).is_some() && *id != me);
    for member in membership.roster.members.iter().filter(|member| member.id != me) {
        let known = known.entry(member.id).or_default();
        if known.voter && !member.voter {
            *known = Known::default();
        }
        known.voter = member.voter;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REACH: Reach = Reach { term: 5, vote: 2, acked: 40, committed: 30 };

    #[test]
    fn what_was_promised_must_be_there_and_what_was_not_may_go() {
        let has = |term, vote, last| REACH.missing(&Claim { term, vote, last });
        assert_eq!(has(5, 2, 40), None);
        assert_eq!(has(5, 2, 99), None);
        assert!(has(4, 2, 99).unwrap().contains("epoch 5"));
        assert!(has(5, 0, 40).unwrap().contains("voted") && has(5, 3, 40).is_some());
        assert!(has(5, 2, 39).unwrap().contains("index 40"));
        // A leader of a later epoch may have replaced what was not committed, and nothing else.
        assert_eq!(has(6, 0, 30), None);
        assert!(has(6, 0, 29).unwrap().contains("committed"));
        assert_eq!(Reach::default().missing(&Claim::default()), None);
    }

    fn message(kind: MessageType, term: u64, index: u64, reject: bool) -> Message {
        let mut message = Message { from: 3, to: 1, term, index, reject, ..Message::default() };
        message.set_msg_type(kind);
        message
    }

    #[test]
    fn messages_tell_what_is_on_disk_and_pre_votes_tell_nothing() {
        let mut reach = Reach::default();
        reach.heard(&message(MessageType::MsgRequestPreVote, 9, 0, false));
        reach.heard(&message(MessageType::MsgRequestPreVoteResponse, 9, 0, false));
        reach.heard(&message(MessageType::MsgHeartbeat, 9, 0, false));
        assert_eq!(reach, Reach::default());
        reach.heard(&message(MessageType::MsgRequestVoteResponse, 4, 0, false));
        reach.heard(&message(MessageType::MsgAppendResponse, 4, 20, false));
        reach.heard(&message(MessageType::MsgAppendResponse, 4, 30, true));
        reach.heard(&message(MessageType::MsgAppendResponse, 3, 90, false));
        assert_eq!(reach, Reach { term: 4, vote: 1, acked: 20, committed: 0 });
        reach.settle(3, 50);
        reach.settle(4, 15);
        assert_eq!(reach.committed, 15);
        reach.heard(&message(MessageType::MsgRequestVote, 5, 0, false));
        assert_eq!(reach, Reach { term: 5, vote: 3, acked: 0, committed: 15 });
    }

    #[test]
    fn a_member_that_forgot_is_heard_again_only_after_its_vote_was_taken_away() {
        let whole = |term, last| Standing::Whole(Claim { term, vote: 0, last });
        let member = |id| super::super::Member::founder(id, &format!("n{id}"), "127.0.0.1", 8086);
        let mut membership = Membership::founded(super::super::ClusterId(7), (1..=3).map(member).collect());
        let mut known = BTreeMap::new();
        follow_membership(&mut known, &membership, 1);
        assert_eq!(known.keys().copied().collect::<Vec<_>>(), [2, 3]);
        let of = |known: &mut BTreeMap<NodeId, Known>| known.get_mut(&3).unwrap().clone();
        known.get_mut(&3).unwrap().admit(100);
        known.get_mut(&3).unwrap().reported(&Reach { term: 5, vote: 0, acked: 40, committed: 30 }, false);
        assert_eq!(
            of(&mut known).objection(100, &whole(1, 1)),
            None,
            "what this process did since is not held against it"
        );
        assert!(of(&mut known).objection(101, &whole(1, 1)).is_some());
        assert_eq!(of(&mut known).objection(101, &Standing::Forgotten), None);
        known.get_mut(&3).unwrap().reported(&Reach::default(), true);
        assert!(of(&mut known).objection(102, &whole(9, 99)).unwrap().contains("vote"));
        membership.roster.members[2].voter = false;
        follow_membership(&mut known, &membership, 1);
        assert_eq!(of(&mut known).objection(102, &whole(1, 1)), None);
        membership.roster.members.remove(2);
        follow_membership(&mut known, &membership, 1);
        assert!(!known.contains_key(&3));
    }
}
