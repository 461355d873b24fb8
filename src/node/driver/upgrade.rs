//! Feature level and version while the node runs: raises the level when all members have the next one, notes the
//! version of a pool's primary, and ends a program that is too old. Must never raise the level while a member is away:
//! its host may be going back to the older program.

use std::time::{Duration, Instant};

use tracing::{error, info};

use super::Driver;
use crate::{
    cluster::{
        Cause, Change, Phase,
        level::{POOLS, SERVICES, is_older, lacks_services, outdated},
        limits::MAX_ENCODED,
    },
    node::{Exit, lease::boottime, members::level_of, warning::Warning},
    storage::folder::catalogue,
};

/// How long all members must have reported the next level before it is raised. An upgrade that fails is taken back
/// within its first moments.
const SETTLED: Duration = Duration::from_secs(5);

/// The level above the one in force that all members have, and since when.
#[derive(Default)]
pub(super) struct Upgrade {
    ready: Option<(u32, Instant)>,
}

impl Upgrade {
    /// The level to raise to now, if any. `common`: the level that the programs of all members have; `None` while a
    /// member is away.
    fn due(&mut self, common: Option<u32>, in_force: u32, now: Instant) -> Option<u32> {
        let Some(level) = common.filter(|level| *level > in_force) else {
            self.ready = None;
            return None;
        };
        let since = match self.ready {
            Some((ready, since)) if ready == level => since,
            _ => {
                self.ready = Some((level, now));
                now
            }
        };
        (now.duration_since(since) >= SETTLED).then_some(level)
    }
}

impl Driver {
    /// Once per tick.
    pub(super) fn follow_level(&mut self) {
        let in_force = self.config.stored.membership.shared.level;
        let serves = self.cluster.phase() == Phase::Primary;
        let common = if serves { self.members.common_level(self.config.level) } else { None };
        let Some(level) = self.in_force.upgrade.due(common, in_force, Instant::now()) else { return };
        let raise = Change::Raise { level, version: self.config.version.clone() };
        // If it is refused (another change is under way, no lease, no room), the next tick tries again.
        if self.check_room(MAX_ENCODED).is_ok() && self.cluster.change(boottime(), &raise).is_ok() {
            info!(level, before = in_force, "the programs of all members have the next feature level: raising it");
            self.in_force.upgrade.ready = None;
        }
    }

    /// Once per tick: the first primary of a newer version makes that the version of the pool's database, which older
    /// programs only replicate from then on. Before, while most members run older ones, it lets those go first.
    pub(super) fn follow_pool_version(&mut self) {
        let membership = &self.config.stored.membership;
        let (pool, own) = (&membership.shared.pool.version, &self.config.version);
        let newer = membership.roster.size.is_pool() && (pool.is_empty() || is_older(pool, own));
        let ahead = newer && !pool.is_empty() && self.members.most_are_older(own);
        self.cluster.set_ahead(ahead);
        if !newer || self.cluster.phase() != Phase::Primary || membership.shared.level < POOLS {
            return;
        }
        let (before, change) = (pool.clone(), Change::PoolVersion { version: own.clone() });
        // If it is refused, the next tick tries again.
        if self.check_room(MAX_ENCODED).is_ok() && self.cluster.change(boottime(), &change).is_ok() {
            info!(
                before,
                version = self.config.version,
                "the pool's database has this version: older programs only replicate it"
            );
        }
    }

    /// Why a part may not be proposed before the next feature level: it would add a database, which older programs do
    /// not take. Names the members that hold it up.
    pub(super) fn lacks_level(&self, part: &[u8]) -> Option<String> {
        let membership = &self.config.stored.membership;
        if !catalogue::is_change(part) || membership.shared.level >= SERVICES {
            return None;
        }
        let level = |id| self.members.get(id).and_then(|peer| peer.report()).map_or(0, level_of);
        let others = membership.roster.members.iter().filter(|member| member.id != self.config.node);
        let older: Vec<_> =
            others.filter(|member| level(member.id) < SERVICES).map(|member| member.name.as_str()).collect();
        Some(lacks_services(membership.shared.level, &older))
    }

    /// Ends a program that lacks what the cluster relies on from now on. The next start of such a program refuses as
    /// well.
    pub(super) fn leave_if_outdated(&mut self) {
        let membership = &self.config.stored.membership;
        if membership.shared.level > self.config.level {
            let own = (self.config.version.as_str(), self.config.level);
            self.exit = Some(Exit::Fatal(outdated(
                "this node",
                own,
                (&membership.shared.level_version, membership.shared.level),
            )));
        }
    }

    /// A newer program has written an entry that this one cannot apply. This node keeps its vote and its raft log, and
    /// does not serve. Only members at a feature level that this program does not have may write such entries
    /// (`crate::cluster::level`).
    pub(super) fn entry_outdated(&mut self, why: String) {
        self.cluster.set_unfit_until(boottime(), u64::MAX);
        self.cluster.give_up(boottime(), Cause::DatabaseFailed);
        self.note_outdated(why);
    }

    /// A member refuses this node because its program is too old.
    pub(super) fn note_outdated(&mut self, why: String) {
        error!(reason = why, "the program of this node is too old for the cluster");
        self.publisher.warn(Warning::Level, Some(why));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_due_when_all_have_shown_it_for_a_while() {
        let (mut upgrade, start) = (Upgrade::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(upgrade.due(Some(2), 2, after(0)), None);
        assert_eq!(upgrade.due(Some(3), 2, after(0)), None);
        assert_eq!(upgrade.due(Some(3), 2, after(4)), None);
        assert_eq!(upgrade.due(None, 2, after(5)), None, "one is away");
        assert_eq!(upgrade.due(Some(3), 2, after(6)), None, "it begins again");
        assert_eq!(upgrade.due(Some(4), 2, after(10)), None, "another level");
        assert_eq!(upgrade.due(Some(4), 2, after(15)), Some(4));
        assert_eq!(upgrade.due(Some(4), 2, after(16)), Some(4), "until it is in force");
        assert_eq!(upgrade.due(Some(4), 4, after(17)), None);
    }
}
