//! A node of the simulation: what of it survives a crash, what does not, and what can happen to it. Must never decide anything.

use std::collections::{BTreeMap, VecDeque};

use raft::eraftpb::{ConfState, Message};
use rand::{RngExt, rngs::SmallRng};
use twistlock_ha::{
    cluster::{
        Cluster, ClusterId, Member, Membership,
        reach::{Known, Reach, Standing},
        roster::SizePolicy,
        shared::Request,
    },
    storage::databases::Databases,
};

use super::{
    databases::{IDS, Values, empty},
    disk::SimLog,
    memory::{Caller, Copy},
};

pub const MILLI: u64 = 1_000_000;
/// The feature levels of the programs that there are. Both know the rule.
pub const OLD: u32 = 2;
pub const NEW: u32 = 3;
/// Their versions, in a pool. The first one is everywhere in the beginning.
pub const VERSIONS: [&str; 2] = ["1.3.0", "1.4.0"];

/// In what the programs of a cluster differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Programs {
    /// In HA mode: in their feature levels.
    Levels,
    /// In a pool: in their versions, which a pool never goes back from.
    Versions,
}

/// What happened in one seed; equal for equal seeds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub steps: u64,
    pub acknowledged: u64,
    pub takeovers: u64,
    pub crashes: u64,
    pub handovers: u64,
    pub removed: u64,
    pub joined: u64,
    /// How often another program was installed on a node, and how often the feature level was raised.
    pub programs: u64,
    pub raised: u64,
    /// How often the PRIMARY of a pool noted its version, and how often a process began that is older than that.
    pub versions: u64,
    pub behind: u64,
    /// How often a node lost some of its durable memory, and how often one began again.
    pub forgot: u64,
    pub again: u64,
    /// Messages that came by datagram, and those among them that were later than a lease.
    pub datagrams: u64,
    pub late: u64,
}

impl Summary {
    pub fn add(&mut self, other: &Summary) {
        self.steps += other.steps;
        self.acknowledged += other.acknowledged;
        self.takeovers += other.takeovers;
        self.crashes += other.crashes;
        self.handovers += other.handovers;
        self.removed += other.removed;
        self.joined += other.joined;
        self.programs += other.programs;
        self.raised += other.raised;
        self.versions += other.versions;
        self.behind += other.behind;
        self.forgot += other.forgot;
        self.again += other.again;
        self.datagrams += other.datagrams;
        self.late += other.late;
    }
}

#[derive(Debug)]
pub enum Event {
    Tick {
        life: u64,
    },
    Wake {
        life: u64,
    },
    Deliver(Box<Message>, Caller),
    /// The life is that of the receiver.
    Datagram {
        life: u64,
        number: u64,
        message: Box<Message>,
        caller: Caller,
    },
    Report {
        from: u64,
        reach: Reach,
        caller: Caller,
    },
    /// Another node says that this one forgot.
    Told {
        life: u64,
    },
    /// A node that forgot asks for the database.
    Fetch {
        life: u64,
    },
    PeerDead {
        life: u64,
        peer: u64,
    },
    Synced {
        life: u64,
        number: u64,
    },
    Promoted {
        life: u64,
        epoch: u64,
    },
    Demoted {
        life: u64,
    },
    PortsOpen {
        life: u64,
        epoch: u64,
    },
    CannotOpen {
        life: u64,
    },
    Restart,
    Resume,
}

/// A write that waits for a majority on one node.
pub struct Waiting {
    pub index: u64,
    pub epoch: u64,
    pub value: u64,
}

pub struct Node {
    pub id: u64,
    pub log: SimLog,
    pub cluster: Option<Cluster<SimLog>>,
    /// Counts the processes of this node: events of an earlier one are void.
    pub life: u64,
    pub paused: bool,
    /// Its database cannot be opened for writing.
    pub unfit: bool,
    /// The feature level of its program.
    pub level: u32,
    /// The version of its program, in a pool.
    pub version: &'static str,
    pub deferred: Vec<Event>,
    /// Local clock = offset + rate * time / 1000.
    pub rate: u64,
    pub offset: u64,
    /// What the supervisor has open, and the deadline in the port guard's memory.
    pub open: bool,
    pub lease: u64,
    /// The databases that its program knows.
    pub knows: &'static [u32],
    pub databases: Databases<Values>,
    /// Its program does not know the database of the next entry: it applies nothing more.
    pub halted: bool,
    /// The state that survives a crash; each database has its own index.
    pub checkpoint: Databases<Values>,
    pub waiting: Vec<Waiting>,
    /// The last own transaction that this primary released: visible in its database before it is applied from the log.
    pub released: u64,
    /// When the slowest sync so far will have ended: syncs end in order.
    pub disk_busy: u64,
    /// The membership in force here, and its index.
    pub membership: (Membership, u64),
    /// The smallest majority of the voters of that one and the one before.
    pub quorum: usize,
    /// What came into force and is not on disk yet, oldest first; no checkpoint is made meanwhile.
    pub keeping: VecDeque<Keep>,
    /// The membership that survives a crash.
    pub kept: (Membership, u64),
    /// What this process says of its memory, and the newest process that it was linked with, by node.
    pub standing: Standing,
    pub linked: BTreeMap<u64, u64>,
    /// The newest datagram that came to this process, by node.
    pub newest: BTreeMap<u64, u64>,
    /// What it remembers of itself and of the others, and as much of that as survives a crash.
    pub mind: (Reach, BTreeMap<u64, Known>),
    pub noted: (Reach, BTreeMap<u64, Known>),
    /// Raft index of the membership that was in force when that was kept.
    pub edition: u64,
    /// It knows that it forgot; survives a crash.
    pub forgotten: bool,
    pub ever_forgot: bool,
    /// An older copy of its disk.
    pub copy: Option<Copy>,
}

/// What came into force by one entry: on disk once everything up to the number is.
pub struct Keep {
    pub number: u64,
    pub membership: Option<(Membership, u64)>,
    pub conf: Option<(ConfState, u64)>,
}

impl Node {
    /// A host that never ran, with the first membership. One that joins later begins with the log of the founders, as they did.
    pub fn new(id: u64, founders: Membership, rng: &mut SmallRng) -> Self {
        let size = founders.roster.members.len();
        Self {
            id,
            log: SimLog::new(size as u64),
            cluster: None,
            life: 0,
            paused: false,
            unfit: false,
            level: founders.shared.level,
            version: VERSIONS[0],
            deferred: Vec::new(),
            rate: rng.random_range(950..=1050),
            offset: rng.random_range(0..1_000_000 * MILLI),
            open: false,
            lease: 0,
            knows: &IDS,
            databases: empty(&IDS),
            halted: false,
            checkpoint: empty(&IDS),
            waiting: Vec::new(),
            released: 0,
            disk_busy: 0,
            membership: (founders.clone(), 1),
            quorum: majority(size),
            keeping: VecDeque::new(),
            kept: (founders, 1),
            standing: Standing::Unsaid,
            linked: BTreeMap::new(),
            newest: BTreeMap::new(),
            mind: Default::default(),
            noted: Default::default(),
            edition: 1,
            forgotten: false,
            ever_forgot: false,
            copy: None,
        }
    }

    /// Everything up to this number is on disk.
    pub fn keep(&mut self, number: u64) {
        while let Some(keep) = self.keeping.pop_front_if(|keep| keep.number <= number) {
            self.kept = keep.membership.unwrap_or_else(|| self.kept.clone());
            if let Some((conf, index)) = keep.conf {
                self.log.set_conf(conf, index);
            }
        }
    }

    /// A crash: what was on its way is lost, but for so many of the oldest, and for the membership of the next one, which is written
    /// before the configuration.
    pub fn lose(&mut self, survive: usize) {
        if let Some(number) = self.keeping.iter().take(survive).last().map(|keep| keep.number) {
            self.keep(number);
        }
        if let Some(membership) =
            self.keeping.front_mut().filter(|_| survive > 0).and_then(|keep| keep.membership.take())
        {
            self.kept = membership;
        }
        self.keeping.clear();
        self.membership = self.kept.clone();
    }

    pub fn clock(&self, time: u64) -> u64 {
        self.offset + time / 1000 * self.rate
    }

    /// What a load balancer would find.
    pub fn ports_open(&self, time: u64) -> bool {
        self.open && self.clock(time) < self.lease
    }
}

/// That of the founders: exactly so many members are a complete cluster.
pub fn first_membership(founders: u64, programs: Programs) -> Membership {
    let member = |id| Member::founder(id, &format!("node{id}"), &format!("127.0.0.{id}"), 8086);
    let mut membership = Membership::founded(ClusterId(7), (1..=founders).map(member).collect());
    membership.roster.size = SizePolicy { least: founders as usize, most: founders as usize };
    membership.shared.level = if programs == Programs::Levels { OLD } else { NEW };
    membership
}

/// The members of a cluster in its beginning.
pub fn founders(size: u64, programs: Programs, rng: &mut SmallRng) -> Vec<Node> {
    (1..=size).map(|id| Node::new(id, first_membership(size, programs), rng)).collect()
}

/// More than half of so many.
pub fn majority(voters: usize) -> usize {
    voters / 2 + 1
}

pub fn request(id: u64) -> Request {
    Request {
        id: format!("request{id}"),
        name: format!("node{id}"),
        address: format!("127.0.0.{id}"),
        port: 8086,
        version: "1.2.3".to_owned(),
        level: OLD,
        fingerprint: format!("AB:{id}"),
        csr: String::new(),
        console_csr: String::new(),
        console_names: Vec::new(),
        clock_ms: 0,
        at: 0,
        until: 1,
    }
}
