//! The gauges: what this node publishes as numbers, twice a second. And what a node does whose database file was measured and
//! found wanting. Must never cost the loop more than a moment.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

use tracing::error;

use super::{Status, driver::Driver, lease::boottime};
use crate::{
    cluster::{NodeId, Role},
    telemetry,
};

impl Driver {
    /// Twice a second.
    pub(super) fn measure(&self) {
        let log = &self.log;
        metrics::gauge!(telemetry::RAFT_LOG_BYTES).set(log.size_bytes() as f64);
        metrics::gauge!(telemetry::RAFT_LOG_ENTRIES)
            .set((log.last_index() + 1).saturating_sub(log.first_index()) as f64);
        let (bytes, age) = self.database_thread.figures();
        metrics::gauge!(telemetry::DATABASE_BYTES).set(bytes as f64);
        metrics::gauge!(telemetry::CHECKPOINT_AGE).set(age.as_secs_f64());
        metrics::gauge!(telemetry::WAL_BYTES).set(self.serving.wal_bytes() as f64);
        let unheard: BTreeSet<NodeId> = self.links.unheard_by().collect();
        for member in self.in_force.borrow().roster.members.iter().filter(|member| member.id != self.config.node) {
            let unheard = truth(unheard.contains(&member.id));
            metrics::gauge!(telemetry::PEER_DATAGRAMS_UNHEARD, "member" => member.name.clone()).set(unheard);
        }
    }

    /// A page that SQLite changes goes to all members as it is: a primary with a damaged file must not go on, as long as
    /// another one can.
    pub(super) fn database_rots(&mut self, why: String) {
        let Some(to) = self.members.secondary_with_space() else {
            error!(reason = why, "the database file of this PRIMARY is damaged, and no other member can take over");
            let text =
                format!("{why}; this is the only member that can serve: bring another one up, it takes over then");
            return self.publisher.warn("scrub", Some(text));
        };
        if self.cluster.is_takeover_paused(boottime()) {
            error!(reason = why, "the database file of this PRIMARY is damaged, and takeover is paused");
            let text = format!(
                "{why}; takeover is paused: end the pause with `twistcli ha resume`, another member takes over then"
            );
            return self.publisher.warn("scrub", Some(text));
        }
        error!(reason = why, to, "the database file of this PRIMARY is damaged: the role goes to another member");
        self.publisher.warn("scrub", None);
        self.mark_diverged(why);
        let now = boottime();
        self.cluster.set_unfit(now, u64::MAX);
        self.cluster.hand_over(now, Some(to));
    }
}

/// The gauges of a picture.
pub(super) fn status(status: &Status) {
    metrics::gauge!(telemetry::EPOCH).set(status.epoch as f64);
    metrics::gauge!(telemetry::APPLIED_INDEX).set(status.applied as f64);
    metrics::gauge!(telemetry::COMMITTED_INDEX).set(status.committed as f64);
    metrics::gauge!(telemetry::PRIMARY).set(truth(status.role == Role::Primary));
    metrics::gauge!(telemetry::LEASE_REMAINING).set(status.lease_ms.unwrap_or(0) as f64 / 1e3);
    metrics::gauge!(telemetry::WARNINGS).set(status.warnings.len() as f64);
    metrics::gauge!(telemetry::BUILD_INFO, "version" => status.version.clone()).set(1.0);
    for word in telemetry::ROLES {
        metrics::gauge!(telemetry::ROLE, "role" => *word).set(truth(status.role.to_string() == *word));
    }
    forget_the_gone(status);
    for member in &status.members {
        let name = || member.name.clone();
        metrics::gauge!(telemetry::MEMBER_LAG, "member" => name()).set(member.lag as f64);
        if let Some(bytes) = member.lag_bytes {
            metrics::gauge!(telemetry::MEMBER_LAG_BYTES, "member" => name()).set(bytes as f64);
        }
        let up = !matches!(member.state, Role::Down | Role::Unknown);
        metrics::gauge!(telemetry::MEMBER_UP, "member" => name()).set(truth(up));
        if let Some(ms) = member.last_contact_ms {
            metrics::gauge!(telemetry::MEMBER_CONTACT, "member" => name()).set(ms as f64 / 1e3);
        }
    }
}

/// A gauge stays once it was set: those of a member that is gone become no number, of which no alert is made.
fn forget_the_gone(status: &Status) {
    static SHOWN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut shown = SHOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if status.members.iter().map(|member| &member.name).eq(shown.iter()) {
        return;
    }
    let now: BTreeSet<String> = status.members.iter().map(|member| member.name.clone()).collect();
    for gone in shown.difference(&now) {
        for name in [
            telemetry::MEMBER_LAG,
            telemetry::MEMBER_LAG_BYTES,
            telemetry::MEMBER_UP,
            telemetry::MEMBER_CONTACT,
            telemetry::PEER_DATAGRAMS_UNHEARD,
        ] {
            metrics::gauge!(name, "member" => gone.clone()).set(f64::NAN);
        }
    }
    *shown = now;
}

fn truth(truth: bool) -> f64 {
    f64::from(u8::from(truth))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_role_is_a_state_set_of_all_words() {
        use Role::{Down, Primary, Recovering, Removed, RequestJoin, Rollback, Secondary, Startup, Startup2, Unknown};
        let all = [RequestJoin, Startup, Startup2, Recovering, Secondary, Primary, Rollback, Down, Unknown, Removed];
        assert_eq!(all.map(|role| role.to_string()).as_slice(), telemetry::ROLES);
    }
}
