//! What a test does to a calm world, and how long the service is interrupted by it. Must never look into a node further than its
//! administrator could.

use twistlock_ha::cluster::Change;

use super::{
    databases::{IDS, database_of, decode},
    node::MILLI,
    world::World,
};

impl World {
    /// Pauses automatic takeover for ever, and waits until every node knows.
    pub fn pause(&mut self) {
        let at = self.primary().expect("somebody serves");
        let now = self.nodes[at].clock(self.time);
        let cluster = self.nodes[at].cluster.as_mut().expect("it serves");
        let until = u64::MAX;
        cluster.change(now, &Change::Pause { until }).expect("nothing else is under way");
        self.drive(at);
        while self.nodes.iter().any(|node| node.membership.0.roster.pause.is_none()) {
            self.step();
        }
    }

    /// Crashes the node with open ports; it starts again within two seconds. Returns its position.
    pub fn crash_primary(&mut self) -> usize {
        let at = self.primary().expect("somebody serves");
        self.crash(at);
        at
    }

    /// The processes of so many nodes end for good, the one with open ports last: those that would take over first are among them.
    /// Returns how long it takes until another one's ports are open, in nanoseconds.
    pub fn lose_primary(&mut self, dead: usize) -> u64 {
        let primary = self.primary().expect("somebody serves");
        let others: Vec<_> = (0..self.nodes.len()).filter(|at| *at != primary).take(dead - 1).collect();
        for at in others {
            self.stop(at);
        }
        self.run_until(self.time + 100 * MILLI);
        let primary = self.primary().expect("it serves on");
        self.stop(primary);
        self.until_somebody_serves()
    }

    /// Hands the role over, and returns how long nobody's ports are open, in nanoseconds.
    pub fn hand_over_primary(&mut self, to: Option<usize>) -> u64 {
        let at = self.primary().expect("somebody serves");
        let now = self.nodes[at].clock(self.time);
        let to = to.map(|to| self.nodes[to].id);
        self.nodes[at].open = false;
        self.nodes[at].cluster.as_mut().expect("it serves").hand_over(now, to);
        self.drive(at);
        self.until_somebody_serves()
    }

    fn until_somebody_serves(&mut self) -> u64 {
        let begin = self.time;
        while self.primary().is_none() && self.time < begin + 10_000 * MILLI {
            self.step();
        }
        self.time - begin
    }

    /// Runs calmly for so many milliseconds.
    pub fn run_for(&mut self, ms: u64) {
        self.run_until(self.time + ms * MILLI);
    }

    /// Installs a program that knows so many of the databases, which takes a restart.
    pub fn install_databases(&mut self, at: usize, count: usize) {
        self.nodes[at].knows = &IDS[..count];
        self.crash(at);
    }

    /// The node has met an entry of a database that it does not know, and went no further.
    pub fn assert_halted(&self, at: usize) {
        let node = &self.nodes[at];
        let next = node.log.read(|image| image.entry(node.databases.applied() + 1).cloned()).expect("there is more");
        assert!(node.halted && decode(&next.data).is_some_and(|value| !node.knows.contains(&database_of(value))));
    }

    /// A node has much to replay, for so many nanoseconds from now on.
    pub fn fall_behind(&mut self, at: usize, lasts: u64) {
        let now = self.nodes[at].clock(self.time);
        self.nodes[at].cluster.as_mut().expect("it runs").set_unfit_until(now, now + lasts);
        self.drive(at);
    }
}
