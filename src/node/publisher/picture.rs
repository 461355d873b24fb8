//! The status that is published: made from what the [`Publisher`] knows, with the state of each member and sentences on
//! what is wrong. Must never take part in a decision of the consensus loop.

use std::sync::Arc;

use super::{Publisher, Seen, gauges};
use crate::{
    clock::unix_time,
    cluster::{Cluster, Member, NodeId, Phase, Role, level::behind_pool, roster::Roster},
    node::{
        history::Recent,
        lease::boottime,
        members::{Members, disk_of, level_of},
        serving::OpenDatabases,
        status::{MemberStatus, Status},
    },
    peer::Condition,
    storage::raft_log::RaftLog,
};

impl Publisher {
    /// Publishes a new status if anything has changed that a reader may wait for.
    pub fn publish(&mut self, seen: &Seen, members: &mut Members, open: &OpenDatabases) {
        let primary = self.primary(seen.cluster, members);
        let shown = (seen.cluster.epoch(), primary);
        let stale = std::mem::take(&mut self.stale) | members.take_news();
        if shown == self.shown && !stale {
            return;
        }
        self.shown = shown;
        if let Some(primary) = primary {
            self.history.primary_is(primary);
        }
        let mut status = self.picture(seen, members);
        status.primary = primary;
        status.serving = self.phase == Phase::Primary && open.lend();
        status.warnings = self.sentences(&status, members);
        gauges::show(&status);
        // A reader of "it serves" must find the database: lend it before, withdraw it after.
        let serving = status.serving;
        self.sender.send_replace(Arc::new(status));
        if !serving {
            open.withdraw();
        }
    }

    fn primary(&self, cluster: &Cluster<RaftLog>, members: &Members) -> Option<NodeId> {
        match cluster.leader()? {
            leader if leader == self.config.node => (self.phase == Phase::Primary).then_some(leader),
            leader => members.primary(leader, cluster.epoch()),
        }
    }

    fn picture(&self, seen: &Seen, others: &Members) -> Status {
        let Seen { cluster, log, applied } = *seen;
        let committed = cluster.committed();
        let lease_ms = cluster.lease().deadline().map(|deadline| deadline.saturating_sub(boottime()) / 1_000_000);
        let role = self.role();
        let own = MemberStatus {
            id: self.config.node,
            name: String::new(),
            address: String::new(),
            state: role,
            epoch: cluster.epoch(),
            applied,
            lag: committed.saturating_sub(applied),
            lag_bytes: log.bytes_between(applied, committed),
            lease_ms,
            last_contact_ms: Some(0),
            version: self.config.version.clone(),
            voter: true,
            sync: self.sync.get(&self.config.node).copied(),
            full: self.own.full,
            free: self.own.free,
            level: self.config.level,
            holds: self.own.holds,
        };
        let members = &self.membership.roster.members;
        Status {
            cluster: self.membership.cluster,
            node: self.config.node,
            name: self.config.name_in(&self.membership),
            version: self.config.version.clone(),
            role,
            reason: self.reason(),
            epoch: cluster.epoch(),
            primary: None,
            applied,
            committed,
            lease_ms,
            members: members.iter().map(|member| self.member(member, &own, seen, others)).collect(),
            membership: self.membership.clone(),
            warnings: Vec::new(),
            certificates: self.certificates.clone(),
            serving: false,
            waiting: None,
            recent: Recent { role_changes: self.history.changes().clone(), warnings: self.warnings.clone() },
        }
    }

    fn member(&self, member: &Member, own: &MemberStatus, seen: &Seen, others: &Members) -> MemberStatus {
        let (log, committed) = (seen.log, seen.cluster.committed());
        let (name, address) = (member.name.clone(), member.place());
        let Some(peer) = others.get(member.id) else {
            return MemberStatus { name, address, voter: member.voter, ..own.clone() };
        };
        let (silence, report) = (peer.silence(), peer.report());
        let state = match (silence, report) {
            // The others refuse this node, so it knows nothing about them.
            _ if self.removed.is_some() => Role::Unknown,
            (None, _) => Role::Unknown,
            (Some(_), _) if peer.is_down() => Role::Down,
            (Some(_), Some(report)) => report.state,
            (Some(_), None) => Role::Unknown,
        };
        MemberStatus {
            id: member.id,
            name,
            address,
            state,
            epoch: report.map_or(0, |report| report.epoch),
            applied: report.map_or(0, |report| report.applied),
            lag: report.map_or(0, |report| committed.saturating_sub(report.applied)),
            lag_bytes: report.and_then(|report| log.bytes_between(report.applied, committed)),
            lease_ms: report.and_then(|report| report.lease_ms).filter(|_| state == Role::Primary),
            last_contact_ms: silence.map(|silence| silence.as_millis() as u64),
            version: report.map(|report| report.version.clone()).unwrap_or_default(),
            voter: member.voter,
            sync: self.sync.get(&member.id).copied(),
            full: report.is_some_and(|report| report.full),
            free: report.and_then(|report| report.more).and_then(|more| more.free),
            level: report.map_or(0, level_of),
            holds: report.and_then(|report| report.more).map(|more| more.holds).unwrap_or_default(),
        }
    }

    /// The state of this node itself.
    fn role(&self) -> Role {
        let role = self.phase.role();
        let votes = self.membership.get(self.config.node).is_none_or(|member| member.voter);
        match role {
            _ if self.removed.is_some() => Role::Removed,
            _ if self.config.forgotten.is_some() => Role::Recovering,
            _ if self.diverged || self.sync.contains_key(&self.config.node) && votes => Role::Recovering,
            Role::Startup | Role::Secondary if self.rolling_back => Role::Rollback,
            Role::Startup | Role::Secondary if !votes => Role::Startup2,
            role => role,
        }
    }

    fn reason(&self) -> String {
        let forgot = || Some(format!("lost some of its durable memory: {}", self.config.forgotten.as_ref()?));
        self.removed.clone().or_else(forgot).unwrap_or_else(|| self.reason.to_owned())
    }

    /// What is wrong and what to do about it: one sentence or two for each point, the own warnings first.
    fn sentences(&self, status: &Status, others: &Members) -> Vec<String> {
        if status.role == Role::Removed {
            return vec![format!(
                "this host is no longer a member, and knows nothing about the others: {}; otherwise stop twistlockd here and \
                     delete its data folder",
                match status.membership.roster.size.is_pool() {
                    true => "to come back, set its data folder aside, and add it again by `twistcli clustered-db add`",
                    false => "to come back, run here the command that `twistcli ha join-script` prints on the PRIMARY",
                }
            )];
        }
        let mut sentences: Vec<_> = self.warnings.values().cloned().collect();
        if let Some(why) = &self.config.forgotten {
            sentences.push(format!(
                "this member lost some of its durable memory ({why}): it neither votes nor counts until it is whole. While the \
                 other members have a primary, it fetches the database and then gets its vote back by itself. If all members \
                 lost theirs, stop them and run `twistlockd recover --force-new-cluster` on the one that has most"
            ));
        }
        sentences.extend(of_silent(&status.members));
        for member in status.members.iter().filter(|member| !is_silent(member)) {
            let condition = others.get(member.id).and_then(|peer| peer.report()).map(disk_of);
            if condition == Some(Condition::Bad) {
                sentences.push(format!(
                    "the disk of {} fails or does not answer: `twistcli ha status` on that host says more",
                    member.name
                ));
            }
        }
        let shared = &status.membership.shared;
        let behind = |member: &&MemberStatus| !is_silent(member) && shared.is_behind_pool(&member.version);
        let sentence = |MemberStatus { name, version, .. }: &_| behind_pool(name, version, &shared.pool.version);
        sentences.extend(status.members.iter().filter(behind).map(sentence));
        let now = unix_time();
        if let Some(pause) = status.membership.roster.pause.as_ref().filter(|pause| pause.in_force(now)) {
            sentences.push(format!(
                "automatic takeover is paused for {} more minutes: if {} fails, nobody takes over; end it with `twistcli ha resume`",
                (pause.until - now).div_ceil(60),
                self.membership.name(pause.primary)
            ));
        }
        sentences.extend(of_roster(&status.membership.roster));
        if status.primary.is_none() && status.role != Role::Startup {
            sentences
                .push("no primary is known here: a majority of the members must be up and reach each other".to_owned());
        }
        sentences
    }
}

fn is_silent(member: &MemberStatus) -> bool {
    matches!(member.state, Role::Down | Role::Unknown)
}

/// How many of the voters may fail and leave a majority; `None` if there is none.
fn spare(voters: usize, up: usize) -> Option<usize> {
    up.checked_sub(voters / 2 + 1)
}

/// A sentence on each member that is not heard of, with what that means for the cluster.
fn of_silent(members: &[MemberStatus]) -> impl Iterator<Item = String> {
    let voters = members.iter().filter(|member| member.voter);
    let cost = match spare(voters.clone().count(), voters.filter(|member| !is_silent(member)).count()) {
        None => "there is no majority, and nobody can write, until enough members are back",
        Some(0) => "no further failure is tolerated until it is back",
        Some(_) => "fewer failures are tolerated until it is back",
    };
    members.iter().filter(|member| is_silent(member)).map(move |member| {
        let MemberStatus { name, address, .. } = member;
        format!("{name} ({address}) is not heard of: start twistlockd there, or check the host and its network; {cost}")
    })
}

/// What a roster lacks: votes, and members.
fn of_roster(roster: &Roster) -> impl Iterator<Item = String> {
    let (members, size) = (roster.members.len(), roster.size);
    let voters = roster.members.iter().filter(|member| member.voter).count();
    let fewer = if spare(voters, voters) == Some(0) { "no failure is" } else { "fewer failures are" };
    let votes = (voters < members)
        .then(|| format!("{voters} of {members} members vote: {fewer} tolerated until the others have caught up"));
    let how = if size.is_pool() { "twistcli clustered-db add" } else { "join script, then APPLY" };
    let hosts = (size.missing(members) > 0).then(|| {
        format!(
            "the cluster has {members} of {size} members: {fewer} tolerated until the missing hosts have joined ({how})"
        )
    });
    votes.into_iter().chain(hosts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::verdict::tests::healthy;

    #[test]
    fn what_a_loss_costs_follows_from_how_many_vote() {
        let cost = |voters: u64, silent: u64| {
            let like = healthy().members.remove(1);
            let state = |id| if id <= silent { Role::Down } else { Role::Secondary };
            let members: Vec<_> =
                (1..=voters).map(|id| MemberStatus { id, state: state(id), ..like.clone() }).collect();
            of_silent(&members).next().unwrap().rsplit("; ").next().unwrap().to_owned()
        };
        assert_eq!(cost(3, 1), "no further failure is tolerated until it is back");
        assert_eq!(cost(2, 1), "there is no majority, and nobody can write, until enough members are back");
        assert_eq!(cost(5, 1), "fewer failures are tolerated until it is back");
        assert_eq!(cost(7, 3), "no further failure is tolerated until it is back");
        let mut roster = healthy().membership.roster;
        assert_eq!(of_roster(&roster).next(), None);
        roster.members[2].voter = false;
        let caught_up = "2 of 3 members vote: no failure is tolerated until the others have caught up";
        assert_eq!(of_roster(&roster).collect::<Vec<_>>(), [caught_up]);
        roster.members.truncate(2);
        assert!(
            of_roster(&roster).next().unwrap().starts_with("the cluster has 2 of 3 members: no failure is tolerated")
        );
    }
}
