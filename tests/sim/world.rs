//! The world around the nodes: time, messages, faults, clients, and the checks after every step.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
};

use raft::eraftpb::EntryType;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use twistlock_ha::{
    cluster::{Cause, Change, ChangeInForce, Cluster, Membership, Newcomer, Output, Phase, Start, Timing, Transition},
    storage::database::ApplyError,
};

use super::{
    databases::{Nothing, compare, decode, empty, encode, known},
    disk::SimLog,
    node::{
        Event, Keep, MILLI, NEW, Node, OLD, Programs, Summary, VERSIONS, Waiting, first_membership, founders, majority,
        request,
    },
};

pub struct World {
    /// Members of a complete cluster.
    pub(super) size: u64,
    pub(super) timing: Timing,
    pub(super) rng: SmallRng,
    pub(super) time: u64,
    pub(super) nodes: Vec<Node>,
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    events: BTreeMap<u64, Event>,
    next_event: u64,
    /// Directed links that drop everything.
    pub(super) cut: BTreeSet<(u64, u64)>,
    pub(super) loss: f64,
    stall: f64,
    /// How often a message by a link is late.
    pub late: f64,
    /// How often a survivor learns at once that a process has died.
    pub tells: f64,
    /// What the cluster decided, by index, as first seen applied anywhere.
    decided: BTreeMap<u64, (u64, Option<u64>)>,
    /// What each database was at an index, as first seen anywhere.
    states: BTreeMap<(u64, u32), u64>,
    acknowledged: BTreeSet<u64>,
    highest_ack: u64,
    epochs: BTreeMap<u64, u64>,
    next_value: u64,
    /// The highest feature level that came into force on any node.
    in_force: u32,
    /// In what the programs differ, and the highest version of a pool that came into force on any node.
    pub(super) programs: Programs,
    pub(super) newest: String,
    /// The programs do not know their own level or version: the checks must find out.
    pub blind: bool,
    /// Nobody compares what a node has with what it had: the checks must find out.
    pub trusting: bool,
    /// Messages go by datagrams, too: see [`World::send_datagram`].
    pub datagrams: bool,
    /// Apart, so that a seed without datagrams runs as it always did.
    pub(super) datagram_rng: SmallRng,
    /// Apart as well: which of the databases have their checkpoint on the disk at a crash.
    pub(super) checkpoint_rng: SmallRng,
    /// Whom each voter chose, by epoch.
    pub(super) votes: BTreeMap<(u64, u64), u64>,
    /// Nobody is removed before.
    pub(super) no_removal_until: u64,
    pub(super) summary: Summary,
    /// What led here, for the message of a failed check.
    pub(super) trace: VecDeque<String>,
}

impl World {
    pub fn new(seed: u64, size: u64, timing: Timing) -> Self {
        Self::with(seed, size, timing, Programs::Levels)
    }

    pub(super) fn with(seed: u64, size: u64, timing: Timing, programs: Programs) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let nodes = founders(size, programs, &mut rng);
        let mut world = Self {
            size,
            timing,
            rng,
            time: 0,
            nodes,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            next_event: 0,
            cut: BTreeSet::new(),
            loss: 0.01,
            stall: 0.01,
            late: 0.02,
            tells: 0.8,
            decided: BTreeMap::new(),
            states: BTreeMap::new(),
            acknowledged: BTreeSet::new(),
            highest_ack: 0,
            epochs: BTreeMap::new(),
            next_value: 1,
            in_force: OLD,
            programs,
            newest: String::new(),
            blind: false,
            trusting: false,
            datagrams: false,
            datagram_rng: SmallRng::seed_from_u64(seed.wrapping_add(0xDA7A)),
            checkpoint_rng: SmallRng::seed_from_u64(seed.wrapping_add(0xC4EC)),
            votes: BTreeMap::new(),
            no_removal_until: 0,
            summary: Summary::default(),
            trace: VecDeque::new(),
        };
        for at in 0..size as usize {
            world.start(at);
        }
        world
    }

    pub fn summary(&self) -> Summary {
        self.summary.clone()
    }

    pub(super) fn note(&mut self, what: String) {
        if self.trace.len() == 40 {
            self.trace.pop_front();
        }
        self.trace.push_back(format!("{} ms: {what}\n", self.time / MILLI));
    }

    pub(super) fn schedule(&mut self, delay: u64, at: usize, event: Event) {
        self.next_event += 1;
        self.queue.push(Reverse((self.time + delay, self.next_event, at)));
        self.events.insert(self.next_event, event);
    }

    pub(super) fn start(&mut self, at: usize) {
        let (time, version) = (self.time, self.said_version(at));
        let node = &mut self.nodes[at];
        node.life += 1;
        node.remember(self.trusting);
        node.databases = known(node.knows, &node.checkpoint);
        node.halted = false;
        if node.forgotten {
            node.databases = empty(node.knows);
        } else {
            node.log.raise_commit(node.databases.newest());
        }
        let forgotten = node.forgotten;
        let log = if forgotten { SimLog::new(self.size) } else { node.log.clone() };
        let now = node.clock(time);
        let (membership, membership_index) = (&node.membership.0, node.membership.1);
        let (conf_index, applied) = (log.conf_index(), node.databases.applied());
        let level = if self.blind { u32::MAX } else { node.level };
        self.summary.behind += u64::from(membership.shared.is_behind_pool(version));
        let start = Start { membership, membership_index, conf_index, applied, level, version, forgotten };
        let cluster = Cluster::new(&start, node.id, self.timing, log, now);
        node.cluster = Some(cluster.expect("the log can be read"));
        let cluster = node.cluster.as_mut().expect("it was just made");
        if node.unfit {
            cluster.set_unfit_until(now, u64::MAX);
        }
        cluster.set_paused(now, node.membership.0.roster.pause.as_ref().map_or(0, |pause| pause.until));
        let life = node.life;
        let phase = self.rng.random_range(0..25 * MILLI);
        self.schedule(phase, at, Event::Tick { life });
        if forgotten {
            self.schedule(300 * MILLI, at, Event::Fetch { life });
        }
        self.drive(at);
    }

    pub(super) fn crash(&mut self, at: usize) {
        if self.stop(at) {
            self.summary.crashes += 1;
            let down = self.rng.random_range(MILLI..2_000 * MILLI);
            self.schedule(down, at, Event::Restart);
        }
    }

    /// A process ends at once; false if there is none.
    pub(super) fn stop(&mut self, at: usize) -> bool {
        let node = &mut self.nodes[at];
        if node.cluster.take().is_none() {
            return false;
        }
        node.life += 1;
        node.open = false;
        node.lease = 0;
        node.paused = false;
        node.deferred.clear();
        node.waiting.clear();
        node.released = 0;
        node.disk_busy = 0;
        let (survive, part) = (self.rng.random_range(0..4), self.rng.random_range(0..8));
        self.nodes[at].log.crash(survive, part);
        let survive = self.rng.random_range(0..3);
        self.nodes[at].lose(survive);
        let dead = self.nodes[at].id;
        for other in (0..self.nodes.len()).filter(|other| *other != at) {
            if self.rng.random_bool(self.tells) && !self.cut.contains(&(self.nodes[other].id, dead)) {
                let life = self.nodes[other].life;
                let delay = self.rng.random_range(MILLI..50 * MILLI);
                self.schedule(delay, other, Event::PeerDead { life, peer: dead });
            }
        }
        true
    }

    /// Runs under faults. More members have them faster, and write less: what happens to a cluster costs about the same.
    pub fn storm_until(&mut self, end: u64) {
        let mut next_fault = self.rng.random_range(0..2_000 * MILLI);
        let mut next_write = 0;
        while self.time < end {
            if self.time >= next_fault {
                self.fault();
                next_fault = self.time + self.rng.random_range(20 * MILLI..1_200 * MILLI) * 3 / self.size;
            }
            if self.time >= next_write {
                self.write();
                next_write = self.time + self.rng.random_range(0..40 * MILLI) * self.size / 3;
            }
            self.step();
        }
    }

    pub fn run_until(&mut self, end: u64) {
        let mut next_write = 0;
        while self.time < end {
            if self.time >= next_write {
                self.write();
                next_write = self.time + 20 * MILLI * self.size / 3;
            }
            self.step();
        }
    }

    /// Ends every fault; crashed and paused nodes come back by themselves, a node that cannot serve stays one.
    pub fn heal(&mut self) {
        self.cut.clear();
        self.loss = 0.0;
        self.stall = 0.0;
        // Whoever is outdated needs the newer program to serve again.
        if self.summary.raised > 0 {
            (0..self.nodes.len()).for_each(|at| self.install(at, NEW));
        }
        if self.summary.versions > 0 {
            (0..self.nodes.len()).for_each(|at| self.install_version(at, VERSIONS[1]));
        }
        if self.nodes.iter().any(|node| node.membership.0.voters().count() < self.size as usize) {
            // Soon there may be a sole voter: one that cannot serve has nobody to leave the role to.
            (0..self.nodes.len()).for_each(|at| self.repair(at));
        }
    }

    /// After the calm there is one primary, and it has every acknowledged write.
    pub fn assert_alive(&mut self) {
        let open: Vec<_> = self.nodes.iter().filter(|node| node.ports_open(self.time)).map(|node| node.id).collect();
        assert_eq!(open.len(), 1, "nodes with open ports after the calm: {open:?} {:?}", self.trace);
        let primary = self.nodes.iter().find(|node| node.ports_open(self.time)).expect("there is one");
        let mut values: BTreeSet<_> = primary.databases.iter().flat_map(|database| database.values.clone()).collect();
        // What was released a moment ago may not be in the database yet.
        let value = |index| primary.log.read(|image| decode(&image.entry(index)?.data));
        values.extend((primary.databases.applied() + 1..=primary.released).filter_map(value));
        assert!(self.acknowledged.is_subset(&values), "an acknowledged write is gone");
        let before = self.acknowledged.len();
        self.run_until(self.time + 200 * MILLI);
        assert!(self.acknowledged.len() > before, "no write succeeds after the calm");
        self.assert_whole();
    }

    fn fault(&mut self) {
        let at = self.rng.random_range(0..self.nodes.len());
        let (id, last) = (self.nodes[at].id, self.nodes.len() as u64);
        let kind = self.rng.random_range(0..24);
        self.note(format!("fault {kind} at node {id}"));
        match kind {
            0..3 => self.crash(at),
            3 => (0..self.nodes.len()).for_each(|at| self.crash(at)),
            4..6 => {
                if self.nodes[at].cluster.is_some() && !self.nodes[at].paused {
                    self.nodes[at].paused = true;
                    let pause = self.rng.random_range(10 * MILLI..3_000 * MILLI);
                    self.schedule(pause, at, Event::Resume);
                }
            }
            6 => {
                for other in (1..=last).filter(|other| *other != id) {
                    self.cut.extend([(id, other), (other, id)]);
                }
            }
            7 => {
                let to = 1 + (id + self.rng.random_range(0..last - 1)) % last;
                self.cut.insert((id, to));
            }
            8 => self.cut.clear(),
            9 => self.loss = [0.0, 0.01, 0.1, 0.4][self.rng.random_range(0..4)],
            // One at a time: with two of them there may be nobody left to serve.
            10 if self.nodes.iter().all(|node| !node.unfit) => self.nodes[at].unfit = true,
            10 => (0..self.nodes.len()).for_each(|at| self.repair(at)),
            11 => self.stall = [0.0, 0.01, 0.3][self.rng.random_range(0..3)],
            12 => self.hand_over(at),
            13..18 if self.programs == Programs::Versions => {
                let newer = self.rng.random_range(0..3) > 0;
                self.install_version(at, VERSIONS[usize::from(newer)]);
            }
            13 => {
                // Twice as often up as down.
                let level = [OLD, NEW, NEW][self.rng.random_range(0..3)];
                self.install(at, level);
            }
            14..18 => (0..self.nodes.len()).for_each(|at| self.raise(at)),
            18..22 => (0..self.nodes.len()).for_each(|at| self.reconfigure(at)),
            _ => self.forget(at),
        }
        self.check();
    }

    /// The position of the node with open ports.
    pub fn primary(&self) -> Option<usize> {
        self.nodes.iter().position(|node| node.ports_open(self.time))
    }

    /// A node that could not serve is repaired, which takes a restart: it had given up on serving for good.
    fn repair(&mut self, at: usize) {
        if std::mem::take(&mut self.nodes[at].unfit) {
            self.crash(at);
        }
    }

    /// The administrator removes a member of a complete cluster, or lets a new host join an incomplete one. Whoever
    /// believes to be the primary is asked.
    fn reconfigure(&mut self, at: usize) {
        let now = self.nodes[at].clock(self.time);
        let (pick, next) = (self.rng.random_range(0..self.size as usize), self.nodes.len() as u64 + 1);
        // Of two voters that are left, none may be one that forgot: nobody could bring it back.
        let forgetful = self.datagrams && self.nodes.iter().any(|node| node.forgotten);
        let node = &mut self.nodes[at];
        let Some(cluster) = node.cluster.as_mut().filter(|_| !node.paused) else { return };
        let membership = cluster.membership().0.clone();
        let all = membership.shared.requests.is_empty() && membership.roster.members.len() as u64 == self.size;
        if all && (forgetful || self.time < self.no_removal_until) {
            return;
        }
        let change = if all {
            Change::Remove { node: membership.roster.members[pick].id, at: 0, force: false }
        } else if membership.shared.requests.is_empty() {
            Change::Request { request: request(membership.roster.next_id) }
        } else if membership.roster.next_id == next {
            let (certificate, console_certificate) = Default::default();
            let newcomer = Newcomer { id: next, request: request(next).id, certificate, console_certificate };
            Change::Admit { hosts: vec![newcomer] }
        } else {
            return;
        };
        if cluster.change(now, &change).is_ok() {
            self.note(format!("node {} proposes {change:?}", self.nodes[at].id));
        }
        self.drive(at);
    }

    /// What came into force on a node is followed at once, and on its disk before it promises anything behind `number`.
    fn put_in_force(&mut self, at: usize, number: u64, change: ChangeInForce) {
        let ChangeInForce { index, conf, membership } = change;
        if let Some(conf) = &conf {
            assert!(!conf.voters.is_empty() && conf.voters.len() as u64 <= self.size, "impossible voters {conf:?}");
        }
        let membership = membership.map(|membership| (membership, index));
        let keep = Keep { number, membership: membership.clone(), conf: conf.map(|conf| (conf, index)) };
        self.nodes[at].keeping.push_back(keep);
        if let Some((membership, index)) = membership {
            let before = &self.nodes[at].membership.0;
            let new = membership.roster.members.iter().any(|member| member.id as usize > self.nodes.len());
            let first = membership.roster.next_id > before.roster.next_id
                || membership.roster.removed.len() > before.roster.removed.len();
            if first && self.nodes.iter().all(|node| node.membership.1 < index) {
                self.summary.joined += u64::from(membership.roster.next_id > before.roster.next_id);
                self.summary.removed += u64::from(membership.roster.removed.len() > before.roster.removed.len());
            }
            assert!(membership.shared.level >= self.nodes[at].membership.0.shared.level, "a feature level was lowered");
            self.in_force = self.in_force.max(membership.shared.level);
            self.follow_version(at, &membership);
            let now = self.nodes[at].clock(self.time);
            if let Some(cluster) = &mut self.nodes[at].cluster {
                cluster.set_paused(now, membership.roster.pause.as_ref().map_or(0, |pause| pause.until));
            }
            let votes = |membership: &Membership| majority(membership.voters().count());
            self.nodes[at].quorum = votes(&self.nodes[at].membership.0).min(votes(&membership));
            self.nodes[at].membership = (membership, index);
            self.nodes[at].follow();
            if new {
                let newcomer =
                    Node::new(self.nodes.len() as u64 + 1, first_membership(self.size, self.programs), &mut self.rng);
                self.nodes.push(newcomer);
                // It fetches its certificate and the database first.
                let delay = self.rng.random_range(0..4_000 * MILLI);
                self.schedule(delay, self.nodes.len() - 1, Event::Restart);
            }
        }
    }

    fn hand_over(&mut self, at: usize) {
        let now = self.nodes[at].clock(self.time);
        let (give_up, hangs) = (self.rng.random_bool(0.3), self.rng.random_bool(0.3));
        let node = &mut self.nodes[at];
        if let Some(cluster) = node.cluster.as_mut().filter(|_| !node.paused) {
            if cluster.phase() == Phase::Primary {
                node.open = false;
                self.summary.handovers += 1;
            }
            match give_up {
                true if hangs => cluster.give_up(now, Cause::DiskFailed),
                true => cluster.give_up(now, Cause::DatabaseFailed),
                false if hangs => cluster.hand_over_because(now, None, Cause::DiskFailed),
                false => cluster.hand_over(now, None),
            }
        }
        self.drive(at);
    }

    /// A client writes to every node whose ports it finds open.
    fn write(&mut self) {
        for at in 0..self.nodes.len() {
            let node = &mut self.nodes[at];
            if node.paused || !node.ports_open(self.time) {
                continue;
            }
            // A read through open ports must show every write acknowledged so far.
            assert!(
                self.highest_ack <= node.databases.applied().max(node.released),
                "node {} serves a stale database at {}",
                node.id,
                self.time
            );
            let now = node.clock(self.time);
            let Some(cluster) = node.cluster.as_mut() else { continue };
            let (value, epoch) = (self.next_value, cluster.epoch());
            self.next_value += 1;
            if let Ok(index) = cluster.propose(now, epoch, encode(value)) {
                node.waiting.push(Waiting { index, epoch, value });
            }
            self.drive(at);
        }
    }

    pub(super) fn step(&mut self) {
        let Some(Reverse((time, id, at))) = self.queue.pop() else { panic!("nothing will ever happen again") };
        self.time = time;
        let event = self.events.remove(&id).expect("queued once");
        self.summary.steps += 1;
        self.handle(at, event);
        self.check();
    }

    fn handle(&mut self, at: usize, event: Event) {
        match event {
            Event::Restart => return self.start(at),
            Event::Resume => {
                self.nodes[at].paused = false;
                let deferred = std::mem::take(&mut self.nodes[at].deferred);
                deferred.into_iter().for_each(|event| self.handle(at, event));
                return;
            }
            _ => {}
        }
        if self.nodes[at].paused {
            return self.nodes[at].deferred.push(event);
        }
        let (now, life) = (self.nodes[at].clock(self.time), self.nodes[at].life);
        let Some(event) = self.taken(at, event) else { return };
        let node = &mut self.nodes[at];
        let Some(cluster) = node.cluster.as_mut() else { return };
        match event {
            Event::Tick { life: of } if of == life => {
                cluster.tick(now);
                self.schedule(25 * MILLI, at, Event::Tick { life });
                self.remember(at);
                self.note_version(at);
            }
            Event::Wake { life: of } if of == life => cluster.wake(now),
            Event::Deliver(message, caller) => {
                if !self.admits(at, message.from, &caller) {
                    return;
                }
                self.deliver(at, *message);
            }
            Event::Report { from, reach, caller } => {
                if self.admits(at, from, &caller) {
                    self.reported(at, from, &reach, &caller);
                }
            }
            Event::Told { life: of } if of == life => return self.told(at),
            Event::Fetch { life: of } if of == life => return self.fetch(at),
            Event::PeerDead { life: of, peer } if of == life => cluster.peer_dead(now, peer),
            Event::Synced { life: of, number } if of == life => {
                node.log.sync(number);
                cluster.persisted(number);
                node.keep(number);
            }
            Event::Promoted { life: of, epoch } if of == life => cluster.promoted(now, epoch),
            Event::Demoted { life: of } if of == life => {
                node.waiting.clear();
                cluster.demoted(now);
            }
            Event::CannotOpen { life: of } if of == life => {
                cluster.set_unfit_until(now, u64::MAX);
                cluster.give_up(now, Cause::DatabaseFailed);
            }
            Event::PortsOpen { life: of, epoch } if of == life => {
                node.open |= cluster.phase() == Phase::Primary && cluster.epoch() == epoch;
            }
            _ => return,
        }
        self.drive(at);
    }

    /// Carries out what a node wants, in the order of `Output`.
    pub(super) fn drive(&mut self, at: usize) {
        loop {
            let now = self.nodes[at].clock(self.time);
            let Some(cluster) = self.nodes[at].cluster.as_mut() else { return };
            let Some(output) = cluster.poll(now).expect("all entries can be read") else { break };
            self.carry_out(at, output);
        }
        let node = &self.nodes[at];
        let now = node.clock(self.time);
        if let Some(deadline) = node.cluster.as_ref().and_then(Cluster::deadline) {
            let delay = deadline.saturating_sub(now) * 1000 / node.rate + 1;
            let life = node.life;
            if delay < 25 * MILLI {
                self.schedule(delay, at, Event::Wake { life });
            }
        }
    }

    fn carry_out(&mut self, at: usize, output: Output) {
        self.nodes[at].lease = output.lease;
        for transition in &output.transitions {
            self.transition(at, *transition);
        }
        output.send.into_iter().for_each(|message| self.send(message));
        let keeps = !output.changes_in_force.is_empty();
        assert!(!keeps || output.persist.is_some(), "nothing says when it is durable");
        let number = output.persist.as_ref().map_or(0, |persist| persist.number);
        output.changes_in_force.into_iter().for_each(|change| self.put_in_force(at, number, change));
        if let Some(persist) = output.persist {
            let node = &mut self.nodes[at];
            node.log.append(persist.number, persist.entries, persist.hard_state);
            let slow = self.rng.random_bool(self.stall);
            let sync = if slow { self.rng.random_range(0..2_000 * MILLI) } else { self.rng.random_range(0..2 * MILLI) };
            let node = &mut self.nodes[at];
            node.disk_busy = node.disk_busy.max(self.time + if persist.must_sync || keeps { sync } else { 0 });
            let (delay, life) = (node.disk_busy - self.time, node.life);
            self.schedule(delay, at, Event::Synced { life, number: persist.number });
        }
        let cluster = self.nodes[at].cluster.as_mut().expect("it is running");
        cluster.written();
        let epoch = cluster.epoch();
        self.apply(at, output.apply);
        self.release(at, output.committed, epoch);
        if let Some(epoch) = output.promote {
            let (node, applied) = (&self.nodes[at], self.nodes[at].databases.applied());
            assert!(
                self.highest_ack <= applied || node.halted,
                "node {} is promoted in epoch {epoch} at index {applied} without the acknowledged write {}: {:?}",
                node.id,
                self.highest_ack,
                self.trace
            );
            let (delay, life) = (self.rng.random_range(MILLI..20 * MILLI), self.nodes[at].life);
            let event = if self.nodes[at].unfit || self.nodes[at].halted {
                Event::CannotOpen { life }
            } else {
                Event::Promoted { life, epoch }
            };
            self.schedule(delay, at, event);
        }
    }

    fn transition(&mut self, at: usize, transition: Transition) {
        let life = self.nodes[at].life;
        let node = &mut self.nodes[at];
        let epoch = node.cluster.as_ref().map_or(0, Cluster::epoch);
        let what = format!(
            "node {} in epoch {epoch}: {transition:?}, log {}",
            node.id,
            node.log.read(super::disk::Image::last)
        );
        self.note(what);
        let node = &mut self.nodes[at];
        match transition.to {
            Phase::Primary => {
                self.summary.takeovers += 1;
                let holder = *self.epochs.entry(epoch).or_insert(node.id);
                assert_eq!(holder, node.id, "two primaries in epoch {epoch}");
                let delay = self.rng.random_range(0..5 * MILLI);
                self.schedule(delay, at, Event::PortsOpen { life, epoch });
            }
            Phase::Demoting => {
                node.open = false;
                node.waiting.clear();
                node.released = 0;
                // A disk that does not answer keeps the database from being closed.
                let longest = if transition.cause == Cause::DiskFailed { 5_000 } else { 50 };
                let delay = self.rng.random_range(MILLI..longest * MILLI);
                self.schedule(delay, at, Event::Demoted { life });
            }
            _ => {}
        }
    }

    fn apply(&mut self, at: usize, up_to: u64) {
        let (node, time) = (&mut self.nodes[at], self.time);
        for index in node.databases.applied() + 1..=up_to {
            if node.halted {
                return;
            }
            let entry = node.log.read(|image| image.entry(index).cloned()).expect("applied entries are in the log");
            let durable = node.log.durable(|image| image.entry(index).map(|entry| entry.term));
            assert_eq!(durable, Some(entry.term), "index {index} was applied before it was durable here");
            let normal = entry.get_entry_type() == EntryType::EntryNormal;
            let value = decode(&entry.data).filter(|_| normal);
            let first = *self.decided.entry(index).or_insert((entry.term, value));
            assert_eq!(first, (entry.term, value), "node {} differs at index {index}", node.id);
            let applied = match value {
                Some(_) => node.databases.apply(index, entry.term, &entry.data, &Nothing),
                None => node.databases.apply_empty(index, entry.term),
            };
            node.halted = applied.as_ref().is_err_and(ApplyError::is_of_newer_program);
            if node.halted {
                let now = node.clock(time);
                node.cluster.as_mut().expect("it is running").set_unfit_until(now, u64::MAX);
                return;
            }
            applied.expect("all comes in order");
            compare(&mut self.states, node, index);
        }
        if self.rng.random_bool(0.02) && self.nodes[at].keeping.is_empty() {
            self.checkpoint(at);
        }
    }

    /// Acknowledges writes whose entry a majority has.
    fn release(&mut self, at: usize, committed: u64, epoch: u64) {
        let time = self.time;
        let waiting = std::mem::take(&mut self.nodes[at].waiting);
        let (done, rest): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|waiting| waiting.index <= committed);
        self.nodes[at].waiting = rest;
        for write in done {
            assert_eq!(write.epoch, epoch, "a write was confirmed in another epoch than its own");
            let holders = self.nodes.iter().filter(|node| {
                let value = encode(write.value);
                // What a node had before it forgot was acknowledged in good faith.
                node.ever_forgot
                    || node
                        .log
                        .durable(|image| image.entry(write.index).is_some_and(|entry| entry.data.as_ref() == value))
            });
            // The voters may have changed since the write was committed.
            assert!(holders.count() >= self.nodes[at].quorum, "committed without a majority of disks");
            self.nodes[at].released = write.index;
            if self.nodes[at].ports_open(time) {
                self.note(format!("node {} acknowledges {} in epoch {epoch}", self.nodes[at].id, write.index));
                self.acknowledged.insert(write.value);
                self.highest_ack = self.highest_ack.max(write.index);
                self.summary.acknowledged += 1;
            }
        }
    }

    /// The invariants that can be seen at any moment.
    fn check(&self) {
        let open: Vec<_> = self.nodes.iter().filter(|node| node.ports_open(self.time)).map(|node| node.id).collect();
        assert!(open.len() <= 1, "ports are open on nodes {open:?} at {} ms", self.time / MILLI);
        let halted = self.nodes.iter().find(|node| node.halted && node.ports_open(self.time));
        assert!(halted.is_none(), "a node serves without what it does not know");
        self.check_version();
        let outdated = self.nodes.iter().find(|node| node.ports_open(self.time) && node.level < self.in_force);
        if let Some(node) = outdated {
            panic!(
                "node {} serves with a program of level {} in a cluster of level {}",
                node.id, node.level, self.in_force
            );
        }
    }
}
