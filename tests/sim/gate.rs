//! The gates against older programs: of two feature levels in HA mode, and of two versions in a pool, with the version that its
//! database has come to. Must never decide who serves: what the core decides is checked.

use twistlock_ha::cluster::{Change, Membership, Phase, Timing, level::is_older};

use super::{
    node::{NEW, Node, Programs},
    world::World,
};

/// Of a program that takes itself for newer than all others.
const BLIND: &str = "9.0.0";

impl World {
    /// The members of a pool.
    pub fn pool(seed: u64, size: u64, timing: Timing) -> Self {
        Self::with(seed, size, timing, Programs::Versions)
    }

    /// The primary of a pool notes its version in the membership, as a node does with each tick until it is there.
    pub(super) fn note_version(&mut self, at: usize) {
        let (now, node) = (self.nodes[at].clock(self.time), &mut self.nodes[at]);
        let noted = &node.membership.0.shared.pool.version;
        if self.programs != Programs::Versions || !(noted.is_empty() || is_older(noted, node.version)) {
            return;
        }
        let version = node.version.to_owned();
        let primary = node.cluster.as_mut().filter(|cluster| cluster.phase() == Phase::Primary);
        if primary.is_some_and(|primary| primary.change(now, &Change::PoolVersion { version }).is_ok()) {
            self.summary.versions += 1;
            self.note(format!("node {} notes version {}", self.nodes[at].id, self.nodes[at].version));
        }
    }

    /// The version that a process says it has.
    pub(super) fn said_version(&self, at: usize) -> &'static str {
        let node = &self.nodes[at];
        match self.programs {
            Programs::Versions if self.blind => BLIND,
            Programs::Versions => node.version,
            Programs::Levels if self.blind || node.level == NEW => "1.3.0",
            Programs::Levels => "1.2.3",
        }
    }

    /// Another program is installed on a host, which takes a restart.
    pub(super) fn install(&mut self, at: usize, level: u32) {
        if std::mem::replace(&mut self.nodes[at].level, level) != level {
            self.note(format!("node {} gets a program of level {level}", self.nodes[at].id));
            self.summary.programs += 1;
            self.crash(at);
        }
    }

    /// Whoever believes to be the primary raises the level to that of its own program, whatever the others have: worse than
    /// what a node does, which asks them first.
    pub(super) fn raise(&mut self, at: usize) {
        let (now, level) = (self.nodes[at].clock(self.time), self.nodes[at].level);
        let node = &mut self.nodes[at];
        let Some(cluster) = node.cluster.as_mut().filter(|_| !node.paused) else { return };
        if cluster.change(now, &Change::Raise { level, version: "3".to_owned() }).is_ok() {
            self.summary.raised += 1;
            self.note(format!("node {} raises the level to {level}", self.nodes[at].id));
        }
        self.drive(at);
    }

    /// A program of another version is installed on a host, which takes a restart.
    pub(super) fn install_version(&mut self, at: usize, version: &'static str) {
        if std::mem::replace(&mut self.nodes[at].version, version) != version {
            self.note(format!("node {} gets a program of version {version}", self.nodes[at].id));
            self.summary.programs += 1;
            self.crash(at);
        }
    }

    /// The next membership comes into force on a node.
    pub(super) fn follow_version(&mut self, at: usize, next: &Membership) {
        let version = &next.shared.pool.version;
        let before = &self.nodes[at].membership.0.shared.pool.version;
        assert!(!is_older(version, before), "the version of the pool's database was lowered");
        if self.newest.is_empty() || is_older(&self.newest, version) {
            self.newest.clone_from(version);
        }
    }

    /// No member serves with a program that is older than the pool's database.
    pub(super) fn check_version(&self) {
        let older = |node: &&Node| node.ports_open(self.time) && is_older(node.version, &self.newest);
        if let Some(node) = self.nodes.iter().find(older) {
            panic!("node {} serves with version {} in a pool of {}", node.id, node.version, self.newest);
        }
    }
}
