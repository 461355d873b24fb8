//! The ways of a message from one node to another: the link, and the datagrams beside it. Must never change what is said.

use raft::eraftpb::{Message, MessageType};
use rand::RngExt;

use super::{
    node::{Event, MILLI},
    world::World,
};

impl World {
    pub(super) fn send(&mut self, message: Message) {
        if self.cut.contains(&(message.from, message.to)) {
            return;
        }
        let to = message.to as usize - 1;
        if to < self.nodes.len() && self.datagrams {
            self.send_datagram(&message, to);
        }
        if self.rng.random_bool(self.loss) {
            return;
        }
        self.count_vote(&message);
        if to >= self.nodes.len() {
            return; // a newcomer that has not started yet
        }
        let copies = if self.rng.random_bool(0.02) { 2 } else { 1 };
        for _ in 0..copies {
            let late = self.rng.random_bool(self.late);
            let delay = self.rng.random_range(50_000..if late { 400 * MILLI } else { 3 * MILLI });
            let caller = self.nodes[message.from as usize - 1].caller();
            self.schedule(delay, to, Event::Deliver(Box::new(message.clone()), caller));
        }
    }

    /// The copy of a message that goes beside the link: lost, doubled, and late by more than any lease, promise or election,
    /// independently of the other. Its session ends with the process at either end. A heartbeat that another has overtaken is
    /// dropped.
    fn send_datagram(&mut self, message: &Message, to: usize) {
        let caller = self.nodes[message.from as usize - 1].caller();
        for _ in 0..if self.datagram_rng.random_bool(0.1) { 2 } else { 1 } {
            if self.datagram_rng.random_bool(0.5 + self.loss / 2.0) {
                continue;
            }
            let longest = [3, 3, 3, 400, 5_000][self.datagram_rng.random_range(0..5)];
            let delay = self.datagram_rng.random_range(50_000..longest * MILLI);
            self.count_vote(message);
            self.summary.datagrams += 1;
            self.summary.late += u64::from(delay > self.timing.lease);
            let (number, life) = (self.summary.datagrams, self.nodes[to].life);
            self.schedule(delay, to, Event::Datagram { life, number, message: Box::new(message.clone()), caller });
        }
    }

    /// What the reader of datagrams makes of an event: the message of one that it takes.
    pub(super) fn taken(&mut self, at: usize, event: Event) -> Option<Event> {
        let Event::Datagram { life, number, message, caller } = event else { return Some(event) };
        let node = &mut self.nodes[at];
        let newest = node.newest.entry(message.from).or_default();
        let overtaken = number < *newest;
        *newest = number.max(*newest);
        let stale = overtaken && message.get_msg_type() == MessageType::MsgHeartbeat;
        (life == node.life && !stale).then_some(Event::Deliver(message, caller))
    }
}
