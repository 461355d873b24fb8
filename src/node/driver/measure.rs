//! Sets the gauges of what the loop owns, and gives the role up when the database file turns out to be damaged. Must
//! never hold the loop up.

use std::collections::BTreeSet;

use tracing::error;

use super::Driver;
use crate::{
    cluster::NodeId,
    node::{lease::boottime, publisher::flag, warning::Warning},
    telemetry,
};

impl Driver {
    /// Sets the gauges; called twice a second.
    pub(super) fn measure(&self) {
        let log = &self.log;
        metrics::gauge!(telemetry::RAFT_LOG_BYTES).set(log.size_bytes() as f64);
        metrics::gauge!(telemetry::RAFT_LOG_ENTRIES)
            .set((log.last_index() + 1).saturating_sub(log.first_index()) as f64);
        let (bytes, age) = self.lane.thread.figures();
        metrics::gauge!(telemetry::DATABASE_BYTES).set(bytes as f64);
        metrics::gauge!(telemetry::CHECKPOINT_AGE).set(age.as_secs_f64());
        metrics::gauge!(telemetry::WAL_BYTES).set(self.lane.open.wal_bytes() as f64);
        let unheard: BTreeSet<NodeId> = self.links.unheard_by().collect();
        for member in
            self.in_force.membership.borrow().roster.members.iter().filter(|member| member.id != self.config.node)
        {
            let unheard = flag(unheard.contains(&member.id));
            metrics::gauge!(telemetry::PEER_DATAGRAMS_UNHEARD, "member" => member.name.clone()).set(unheard);
        }
    }

    /// SQLite changes a page and sends the whole page to all members, damage included. So a primary with a damaged file
    /// must hand the role over, as long as another member can take it.
    pub(super) fn database_damaged(&mut self, why: String) {
        let Some(to) = self.members.best_successor() else {
            error!(reason = why, "the database file of this PRIMARY is damaged, and no other member can take over");
            let text =
                format!("{why}; this is the only member that can serve: bring another one up, and it takes over");
            return self.publisher.warn(Warning::Scrub, Some(text));
        };
        if self.cluster.is_takeover_paused(boottime()) {
            error!(reason = why, "the database file of this PRIMARY is damaged, and takeover is paused");
            let text = format!(
                "{why}; takeover is paused: end the pause with `twistcli ha resume`, and another member takes over"
            );
            return self.publisher.warn(Warning::Scrub, Some(text));
        }
        error!(reason = why, to, "the database file of this PRIMARY is damaged: the role goes to another member");
        self.publisher.warn(Warning::Scrub, None);
        self.mark_diverged(why);
        let now = boottime();
        self.cluster.set_unfit_until(now, u64::MAX);
        self.cluster.hand_over(now, Some(to));
    }
}
