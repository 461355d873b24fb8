//! Durable memory in the simulation: what nodes remember of each other, what they lose of their disks, and how one that forgot
//! begins again. Links are not simulated, but what they guarantee is: nothing of an earlier process of a node arrives after
//! something of a later one, and nothing of a process that the receiver has not compared with what it remembers.

use raft::eraftpb::{ConfState, Message, MessageType};
use rand::RngExt;
use std::collections::BTreeMap;
use twistlock_ha::cluster::{
    Membership, Phase,
    reach::{self, Claim, Known, Reach, Standing},
};

use super::{
    databases::{IDS, Values, copied, empty, of},
    disk::{Image, SimLog},
    node::{Event, MILLI, Node},
    world::World,
};

/// The process that sent something.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    pub life: u64,
    pub standing: Standing,
}

/// A copy of a disk.
#[derive(Clone)]
pub struct Copy {
    image: Image,
    conf: (ConfState, u64),
    checkpoint: Vec<Values>,
    membership: (Membership, u64),
    kept: (Reach, BTreeMap<u64, Known>),
    edition: u64,
}

impl Copy {
    fn of(node: &Node) -> Self {
        Self {
            image: node.log.durable(Image::clone),
            conf: node.log.conf(),
            checkpoint: copied(&node.checkpoint),
            membership: node.kept.clone(),
            kept: node.noted.clone(),
            edition: node.edition,
        }
    }

    fn put(self, node: &mut Node) {
        node.log.replace(self.image, self.conf);
        (node.checkpoint, node.membership, node.kept) = (of(self.checkpoint), self.membership.clone(), self.membership);
        (node.noted, node.edition) = (self.kept, self.edition);
    }
}

impl Node {
    pub fn caller(&self) -> Caller {
        Caller { life: self.life, standing: self.standing }
    }

    fn claim(&self) -> Claim {
        self.log.durable(|image| Claim::of(&image.hard_state, image.last()))
    }

    /// A process begins with what survived of its memory, and compares it with its log.
    pub fn remember(&mut self, trusting: bool) {
        self.mind = self.noted.clone();
        if self.membership.1 > self.edition {
            self.mind.1.clear();
        }
        self.mind.1.values_mut().for_each(|known| known.forgotten = false);
        self.linked.clear();
        self.newest.clear();
        self.follow();
        let claim = self.claim();
        let short = self.checkpoint.newest() > claim.last || self.mind.0.missing(&claim).is_some();
        self.forgotten |= short && !trusting;
        if trusting && self.checkpoint.newest() > claim.last {
            self.checkpoint = empty(&IDS);
        }
        if self.forgotten {
            self.mind.1.clear();
        }
        self.standing = if self.forgotten { Standing::Forgotten } else { Standing::Whole(claim) };
    }

    /// Follows the membership in force in what is remembered of the others.
    pub fn follow(&mut self) {
        reach::follow_membership(&mut self.mind.1, &self.membership.0, self.id);
    }
}

impl World {
    /// What a link does with what comes from another node: whoever has less than it had is told so, and not heard.
    pub fn admits(&mut self, at: usize, from: u64, caller: &Caller) -> bool {
        let node = &mut self.nodes[at];
        let newest = node.linked.get(&from).copied().unwrap_or(0);
        if caller.life < newest {
            return false;
        }
        let known = node.mind.1.entry(from).or_default();
        let objection = known.objection(caller.life, &caller.standing).filter(|_| !self.trusting);
        if let Some(why) = objection {
            let (id, sender) = (self.nodes[at].id, from as usize - 1);
            if !self.cut.contains(&(id, from)) {
                self.note(format!("node {id} tells node {from} that it forgot: {why}"));
                self.schedule(MILLI, sender, Event::Told { life: caller.life });
            }
            return false;
        }
        known.admit(caller.life);
        self.nodes[at].linked.insert(from, caller.life);
        true
    }

    /// Nobody votes twice in an epoch.
    pub fn count_vote(&mut self, message: &Message) {
        let candidate = match message.get_msg_type() {
            MessageType::MsgRequestVote => message.from,
            MessageType::MsgRequestVoteResponse if !message.reject => message.to,
            _ => return,
        };
        let first = *self.votes.entry((message.term, message.from)).or_insert(candidate);
        assert_eq!(first, candidate, "node {} votes twice in epoch {}: {:?}", message.from, message.term, self.trace);
    }

    pub fn deliver(&mut self, at: usize, message: Message) {
        let node = &mut self.nodes[at];
        let now = node.clock(self.time);
        if let Some(known) = node.mind.1.get_mut(&message.from) {
            known.reach.heard(&message);
        }
        if let Some(cluster) = &mut node.cluster {
            cluster.step(now, message);
        }
    }

    pub fn reported(&mut self, at: usize, from: u64, reach: &Reach, caller: &Caller) {
        let node = &mut self.nodes[at];
        let now = node.clock(self.time);
        let forgotten = caller.standing == Standing::Forgotten;
        if let Some(cluster) = &mut node.cluster {
            cluster.peer_alive(from);
        }
        if let Some(known) = node.mind.1.get_mut(&from) {
            known.reported(reach, forgotten);
        }
        if let Some(cluster) = node.cluster.as_mut().filter(|_| forgotten) {
            cluster.peer_forgot(now, from);
        }
    }

    /// Once per tick: tells the others, and keeps what is remembered. A vote is told and kept at once.
    pub fn remember(&mut self, at: usize) {
        let (tell, keep) = (self.rng.random_bool(0.05), self.rng.random_bool(0.025));
        let node = &mut self.nodes[at];
        let Some(cluster) = &node.cluster else { return };
        if let Some(why) = cluster.forgot().map(str::to_owned) {
            self.note(format!("node {} finds out that it forgot: {why}", self.nodes[at].id));
            return self.told(at);
        }
        let reach = cluster.reach();
        if reach.is_none() && !node.forgotten {
            return;
        }
        let before = (node.mind.0.term, node.mind.0.vote);
        if let Some(reach) = reach {
            node.mind.0.raise(&reach);
        }
        let voted = (node.mind.0.term, node.mind.0.vote) != before;
        node.mind.1.values_mut().for_each(|known| known.reach.settle(cluster.epoch(), cluster.committed()));
        if (keep || voted) && !node.forgotten {
            (node.noted, node.edition) = (node.mind.clone(), node.membership.1);
        }
        let (id, reach, caller) = (node.id, node.mind.0, node.caller());
        let others: Vec<u64> = node.membership.0.roster.members.iter().map(|member| member.id).collect();
        let all = self.nodes.len();
        for to in others.into_iter().filter(|to| *to != id && *to as usize <= all) {
            let lost = self.cut.contains(&(id, to)) || self.rng.random_bool(self.loss);
            if (tell || voted) && !lost {
                let delay = self.rng.random_range(50_000..3 * MILLI);
                self.schedule(delay, to as usize - 1, Event::Report { from: id, reach, caller });
            }
        }
        if self.rng.random_bool(0.005) && !self.nodes[at].forgotten {
            self.nodes[at].copy = Some(Copy::of(&self.nodes[at]));
        }
    }

    /// A node that forgot begins again as one that knows.
    pub fn told(&mut self, at: usize) {
        if self.nodes[at].forgotten || self.trusting {
            return;
        }
        (self.nodes[at].forgotten, self.nodes[at].ever_forgot) = (true, true);
        self.stop(at);
        let delay = self.rng.random_range(MILLI..100 * MILLI);
        self.schedule(delay, at, Event::Restart);
    }

    /// A node that forgot asks whoever is primary for the database, and begins again with that.
    pub fn fetch(&mut self, at: usize) {
        let (id, life) = (self.nodes[at].id, self.nodes[at].life);
        let linked = |node: &Node| !self.cut.contains(&(id, node.id)) && !self.cut.contains(&(node.id, id));
        let serves = |node: &Node| node.cluster.as_ref().is_some_and(|cluster| cluster.phase() == Phase::Primary);
        let source =
            self.nodes.iter().position(|node| !node.paused && linked(node) && serves(node) && node.keeping.is_empty());
        let allowed = source.is_some_and(|source| {
            let now = self.nodes[source].clock(self.time);
            let cluster = self.nodes[source].cluster.as_mut().expect("it serves");
            cluster.peer_forgot(now, id);
            cluster.may_begin_again(id).is_ok()
        });
        let Some(source) = source.filter(|_| allowed) else {
            return self.schedule(300 * MILLI, at, Event::Fetch { life });
        };
        self.stop(at);
        let from = &self.nodes[source];
        let mut image = from.log.durable(Image::clone);
        // The database file of a primary is as of its last transaction: the log begins behind that.
        let applied = from.databases.applied();
        image.entries.truncate(applied as usize - 1);
        let written = |entry: &raft::eraftpb::Entry| !entry.data.is_empty() && entry.context.is_empty();
        let index = image.entries.iter().rfind(|entry| written(entry)).map_or(applied, |entry| entry.index);
        let mut databases = copied(&from.databases);
        databases.iter_mut().for_each(|database| database.applied = index);
        image.entries.truncate(index as usize - 1);
        image.hard_state.term = from.cluster.as_ref().map_or(1, |cluster| cluster.epoch());
        (image.hard_state.vote, image.hard_state.commit) = (id, index);
        let copy = Copy {
            image,
            conf: from.log.conf(),
            checkpoint: databases,
            membership: from.membership.clone(),
            kept: Default::default(),
            edition: 0,
        };
        self.note(format!("node {id} begins again at index {}", index));
        let node = &mut self.nodes[at];
        copy.put(node);
        (node.forgotten, node.copy) = (false, None);
        self.summary.again += 1;
        let delay = self.rng.random_range(MILLI..300 * MILLI);
        self.schedule(delay, at, Event::Restart);
    }

    /// A node dies, and starts again at once with less than it had. Only if somebody can know: when all who do are away, nobody
    /// finds out (`docs/memory.md`).
    pub fn forget(&mut self, at: usize) {
        if !self.may_forget(at) || !self.stop(at) {
            return;
        }
        let had = Copy::of(&self.nodes[at]);
        let kind = self.rng.random_range(0..5);
        let dropped = self.rng.random_range(1..6);
        let size = self.size;
        let node = &mut self.nodes[at];
        let mut has = had.clone();
        match (kind, node.copy.clone()) {
            (0, _) => {
                has.image = SimLog::new(size).durable(Image::clone);
                has.conf = SimLog::new(size).conf();
                // There is no log, and nobody permitted a new one.
                node.forgotten = !self.trusting;
            }
            (1, Some(copy)) => (has.image, has.conf) = (copy.image, copy.conf),
            (2 | 3, Some(copy)) => has = copy,
            _ => {
                let left = has.image.entries.len().saturating_sub(dropped);
                has.image.entries.truncate(left);
                let term = has.image.entries.last().map_or(1, |entry| entry.term);
                (has.image.hard_state.term, has.image.hard_state.vote) = (term, 0);
                has.image.hard_state.commit = has.image.hard_state.commit.min(has.image.last());
            }
        }
        has.put(node);
        let itself = node.forgotten || {
            let claim = node.claim();
            node.checkpoint.newest() > claim.last || node.noted.0.missing(&claim).is_some()
        };
        let standing = Standing::Whole(self.nodes[at].claim());
        let id = self.nodes[at].id;
        let told = self.nodes.iter().any(|node| {
            let reached = !self.cut.contains(&(id, node.id)) && !self.cut.contains(&(node.id, id));
            let knows = node.mind.1.get(&id).is_some_and(|known| known.objection(u64::MAX, &standing).is_some());
            reached && node.cluster.is_some() && !node.paused && node.id != id && knows
        });
        if itself || told {
            self.summary.forgot += 1;
            self.note(format!("node {id} forgets in way {kind}: finds out itself {itself}, is told {told}"));
            let node = &mut self.nodes[at];
            // It is told before it may vote: that takes less than the quiet time of a start.
            (node.forgotten, node.ever_forgot) = (!self.trusting, true);
            self.no_removal_until = self.time + 3_000 * MILLI;
        } else {
            had.put(&mut self.nodes[at]);
        }
        self.start(at);
    }

    /// One at a time, and while the others can be a majority without it.
    fn may_forget(&self, at: usize) -> bool {
        let newest = self.nodes.iter().map(|node| node.membership.clone()).max_by_key(|membership| membership.1);
        let Some((membership, index)) = newest else { return false };
        let changing = self.nodes.iter().any(|node| {
            node.log.read(|image| image.entries.iter().any(|entry| entry.index > index && !entry.context.is_empty()))
        });
        let id = self.nodes[at].id;
        let others = membership.roster.members.iter().filter(|member| member.id != id && member.voter).count();
        let whole = |member: u64| self.nodes.get(member as usize - 1).is_some_and(|node| !node.forgotten);
        !changing
            && membership.get(id).is_some()
            && others as u64 + 1 == self.size
            && membership.roster.members.iter().all(|m| whole(m.id))
    }

    /// After the calm every member is whole.
    pub fn assert_whole(&self) {
        let newest = self.nodes.iter().max_by_key(|node| node.membership.1).expect("there are nodes");
        let forgot = newest
            .membership
            .0
            .roster
            .members
            .iter()
            .find(|member| self.nodes.get(member.id as usize - 1).is_some_and(|node| node.forgotten));
        assert!(forgot.is_none(), "{forgot:?} has not begun again after the calm");
    }
}
