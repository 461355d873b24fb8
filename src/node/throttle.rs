//! Holds back entries for a member whose disk is full: with each heartbeat, raft sends again what was not answered, and
//! the member drops it again. Must never hold back entries that the member can take: a majority may need it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use raft::eraftpb::{Message, MessageType};

use crate::cluster::NodeId;

/// Bytes of entries that a member with a full disk may leave unanswered before the next ones are held back. More than
/// are ever in flight to a member that takes them.
const UNANSWERED: usize = 8 << 20;
/// How often entries are sent all the same.
const TRY: Duration = Duration::from_secs(1);

/// What was sent to each member with a full disk since its last answer.
#[derive(Debug, Default)]
pub(super) struct Throttle(BTreeMap<NodeId, Sent>);

#[derive(Debug)]
struct Sent {
    bytes: usize,
    last: Instant,
}

impl Throttle {
    /// False for entries that are held back; raft sends them again, as if the network had lost them. `full`: the member
    /// reports that its disk is full.
    pub fn admits(&mut self, message: &Message, full: bool, now: Instant) -> bool {
        if message.get_msg_type() != MessageType::MsgAppend || message.entries.is_empty() {
            return true;
        }
        if !full {
            self.0.remove(&message.to);
            return true;
        }
        let sent = self.0.entry(message.to).or_insert(Sent { bytes: 0, last: now });
        if sent.bytes >= UNANSWERED && now.duration_since(sent.last) < TRY {
            return false;
        }
        sent.bytes += message.entries.iter().map(|entry| entry.data.len() + entry.context.len()).sum::<usize>();
        sent.last = now;
        true
    }

    /// Notes a message: a member that answers entries takes or refuses them itself, so none are held back.
    pub fn heard(&mut self, message: &Message) {
        if message.get_msg_type() == MessageType::MsgAppendResponse {
            self.0.remove(&message.from);
        }
    }
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::Entry;

    use super::*;

    fn append(to: NodeId, bytes: usize) -> Message {
        let entry = Entry { data: vec![0; bytes].into(), ..Entry::default() };
        let mut message = Message { to, ..Message::default() };
        message.set_msg_type(MessageType::MsgAppend);
        message.set_entries(vec![entry].into());
        message
    }

    #[test]
    fn a_member_that_answers_nothing_is_tried_once_a_second_and_the_others_are_not_held_back() {
        let (mut throttle, now) = (Throttle::default(), Instant::now());
        let mut sent = 0;
        // A heartbeat every 25 ms, each with half a MiB of entries.
        for tick in 0..40u32 {
            let at = now + Duration::from_millis(25) * tick;
            sent += usize::from(throttle.admits(&append(2, 1 << 19), true, at));
            assert!(throttle.admits(&append(3, 1 << 19), false, at));
        }
        assert_eq!(sent, UNANSWERED >> 19);
        assert!(throttle.admits(&append(2, 1 << 19), true, now + Duration::from_secs(2)));
        assert!(!throttle.admits(&append(2, 1 << 19), true, now + Duration::from_millis(2100)));
        assert!(throttle.admits(&append(2, 0), false, now), "it has space again");
    }

    #[test]
    fn a_member_that_answers_gets_everything() {
        let (mut throttle, now) = (Throttle::default(), Instant::now());
        let mut answer = Message { from: 2, ..Message::default() };
        answer.set_msg_type(MessageType::MsgAppendResponse);
        for _ in 0..100 {
            assert!(throttle.admits(&append(2, 1 << 20), true, now));
            throttle.heard(&answer);
        }
        let mut heartbeat = Message { to: 2, ..Message::default() };
        heartbeat.set_msg_type(MessageType::MsgHeartbeat);
        while throttle.admits(&append(2, 1 << 20), true, now) {}
        assert!(throttle.admits(&heartbeat, true, now));
    }
}
