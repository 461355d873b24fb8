//! The planned switchover: checks, one by one, then the handover. Must never leave the ports closed when the role
//! stays, not even when whoever asked has gone away.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::{net::TcpStream, time};
use tracing::{info, warn};

use super::{AdminError, Operations, Ports};
use crate::{
    clock::unix_time,
    cluster::{
        NodeId, Role,
        level::{behind_pool, outdated},
    },
    node::{Handle, MemberStatus, Status},
};

/// Entries that the new primary may lack, as of its last report, which is up to half a second old.
const MAX_LAG: u64 = 5_000;
/// What must remain of the lease at the beginning.
const MIN_LEASE_MS: u64 = 50;
/// How long another primary is awaited, and then its ports.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two attempts to connect to the new primary's Console.
const KNOCK: Duration = Duration::from_millis(2);

/// One precondition of a switchover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Check {
    pub name: String,
    pub ok: bool,
    /// What was found, and what to do if it is not ok.
    pub detail: String,
}

/// What was found before a switchover, and how it went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct SwitchoverReport {
    pub checks: Vec<Check>,
    /// Name of the new primary, or of the one that it would be.
    pub to: Option<String>,
    /// Milliseconds from the closing of the ports here to those of the new primary being open, as seen from here; none
    /// for a dry run, or when its ports could not be reached from here in time.
    pub gap_ms: Option<f64>,
}

impl SwitchoverReport {
    /// What is in the way, in sentences.
    pub fn objections(&self) -> Option<String> {
        let failed: Vec<_> = self.checks.iter().filter(|check| !check.ok).map(|check| check.detail.as_str()).collect();
        (!failed.is_empty()).then(|| failed.join("; "))
    }
}

impl Operations {
    /// All preconditions, and who would be primary.
    pub(super) fn check_switchover(&self, to: Option<&str>) -> Result<SwitchoverReport, AdminError> {
        self.preconditions(to).map(|(report, _)| report)
    }

    fn preconditions(&self, to: Option<&str>) -> Result<(SwitchoverReport, Option<NodeId>), AdminError> {
        let status = self.primary()?;
        let wanted = to.map(|to| Self::member(&status.membership, to)).transpose()?;
        let (checks, target) = checks(&status, wanted);
        let to = target.map(|target| status.membership.name(target));
        Ok((SwitchoverReport { checks, to, gap_ms: None }, target))
    }

    pub(super) async fn switchover(&self, to: Option<&str>, by: &str) -> Result<SwitchoverReport, AdminError> {
        let (report, target) = self.preconditions(to)?;
        let failed = report.objections();
        let Some(target) = target.filter(|_| failed.is_none()) else {
            return Err(AdminError::Refused(failed.unwrap_or_default()));
        };
        let SwitchoverReport { checks, to, .. } = report;
        let Ok(_one) = self.changing.try_lock() else {
            return Err(AdminError::Refused("another change is under way: try again".to_owned()));
        };
        info!(by, to, "a switchover begins");
        // A task of its own: a caller that goes away in the middle must not leave the ports closed.
        let (handle, ports) = (self.handle.clone(), self.ports.clone());
        let carried_out = tokio::spawn(carry_out(handle, ports, target, self.config.https_port));
        let ended = carried_out.await.map_err(|error| AdminError::Unknown(format!("the switchover ended: {error}")))?;
        let (new, gap) = ended.inspect_err(|error| warn!(by, to, "the switchover failed: {error}"))?;
        let gap_ms = gap.map(|gap| gap.as_secs_f64() * 1e3);
        info!(by, to = new, gap_ms, "the switchover is done");
        Ok(SwitchoverReport { checks, to: Some(new), gap_ms })
    }
}

/// Returns the name of the new primary and how long no Console was open.
async fn carry_out(
    handle: Handle,
    ports: Arc<dyn Ports>,
    target: NodeId,
    https_port: Option<u16>,
) -> Result<(String, Option<Duration>), AdminError> {
    let (begin, node) = (Instant::now(), handle.status().borrow().node);
    ports.drain("a planned switchover").await;
    handle.hand_over(Some(target)).await;
    let mut status = handle.status();
    let other = |status: &Arc<Status>| status.primary.is_some_and(|primary| primary != node);
    let found =
        time::timeout(PATIENCE, status.wait_for(other)).await.ok().and_then(Result::ok).map(|found| found.clone());
    // In any case: they open again only if the role is here.
    ports.resume();
    let Some(found) = found else {
        let here = handle.status().borrow().primary == Some(node);
        return Err(match here {
            true => {
                ports.reopened().await;
                AdminError::Refused("the role has stayed here, and the Console is open again: see the log".to_owned())
            }
            false => AdminError::Unknown("the role was given up, but no new primary is known yet".to_owned()),
        });
    };
    let new = found.primary.unwrap_or(target);
    let address = found.membership.get(new).map(|member| member.address.clone());
    let gap = match address.zip(https_port) {
        Some(place) => time::timeout(PATIENCE, opened(place)).await.ok().map(|()| begin.elapsed()),
        None => None,
    };
    Ok((found.membership.name(new), gap))
}

/// Returns when this port accepts connections.
async fn opened((host, port): (String, u16)) {
    while TcpStream::connect((host.as_str(), port)).await.is_err() {
        time::sleep(KNOCK).await;
    }
}

/// All preconditions, and who would be primary.
fn checks(status: &Status, wanted: Option<NodeId>) -> (Vec<Check>, Option<NodeId>) {
    let check = |name: &str, ok, detail: String| Check { name: name.to_owned(), ok, detail };
    let target = wanted.or_else(|| furthest(status));
    let member = target.and_then(|target| status.members.iter().find(|member| member.id == target));
    let mut list = vec![check("role", status.role == Role::Primary, format!("{} is {}", status.name, status.role))];
    list.push(match status.membership.roster.pause.as_ref().filter(|pause| pause.in_force(unix_time())) {
        None => check("no pause", true, "automatic takeover is not paused".to_owned()),
        Some(_) => check("no pause", false, "automatic takeover is paused: end the pause first".to_owned()),
    });
    let lease = status.lease_ms.unwrap_or(0);
    let detail = format!("{lease} ms of the lease remain: a majority of the members answers");
    let short = format!("only {lease} ms of the lease remain: wait until a majority of the members answers");
    let fine = lease >= MIN_LEASE_MS;
    list.push(check("lease", fine, if fine { detail } else { short }));
    let serving = status.serving().is_some();
    let state = if serving { "the database is open" } else { "the database is not open: look at the log" };
    list.push(check("database", serving, state.to_owned()));
    let Some(member) = member else {
        list.push(check("target", false, "no other member is SECONDARY with a vote: bring one up first".to_owned()));
        return (list, None);
    };
    let MemberStatus { name, state, lag, .. } = member;
    list.push(match (member.id == status.node, member.voter, state) {
        (true, ..) => check("target", false, format!("{name} is PRIMARY already")),
        (_, false, _) => check("target", false, format!("{name} has no vote yet: wait until it has caught up")),
        (_, true, Role::Secondary) => check("target", true, format!("{name} is SECONDARY and has a vote")),
        (_, true, state) => check("target", false, format!("{name} is {state}, not SECONDARY")),
    });
    let detail = format!("{name} is {lag} entries behind by its last report (allowed: {MAX_LAG})");
    list.push(check("caught up", *lag <= MAX_LAG, detail));
    list.push(match member.full {
        false => check("disk space", true, format!("{name} has space on its disk")),
        true => check("disk space", false, format!("the disk of {name} is full: free some space there first")),
    });
    let (own, other) = (&status.version, &member.version);
    let membership = &status.membership;
    list.push(match member.level >= membership.shared.level {
        true if membership.shared.is_behind_pool(other) => {
            check("version", false, behind_pool(name, other, &membership.shared.pool.version))
        }
        true if own == other => check("version", true, format!("{name} runs version {own}, too")),
        true => {
            let both =
                format!("version {other:?}, this node {own}: both have feature level {}", membership.shared.level);
            check("version", true, format!("{name} runs {both}, which the cluster runs"))
        }
        false => {
            let needed = (membership.shared.level_version.as_str(), membership.shared.level);
            check("version", false, outdated(name, (other, member.level), needed))
        }
    });
    (list, target)
}

/// The secondary that has the most, by its reports; of equals the first in rank. One with a full disk only if there is
/// no other.
fn furthest(status: &Status) -> Option<NodeId> {
    let shared = &status.membership.shared;
    let able = |member: &&MemberStatus| {
        let secondary = member.id != status.node && member.voter && member.state == Role::Secondary;
        secondary && !shared.is_behind_pool(&member.version)
    };
    status.members.iter().filter(able).min_by_key(|member| (member.full, member.lag)).map(|member| member.id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{ClusterId, Member, Membership, feature_level, roster::Pause, trust::Holdings};

    /// Node 1 is primary; the others as given.
    fn status(others: &[(Role, u64, &str)]) -> Status {
        let all = std::iter::once(&(Role::Primary, 0, "1.2.3")).chain(others);
        let founder = |id| Member::founder(id, &format!("node{id}"), "127.0.0.1", 8080 + id as u16);
        let ids = 1..=others.len() as u64 + 1;
        let members = ids.zip(all).map(|(id, (state, lag, version))| MemberStatus {
            id,
            name: format!("node{id}"),
            address: String::new(),
            state: *state,
            epoch: 2,
            applied: 9,
            lag: *lag,
            lag_bytes: None,
            lease_ms: None,
            last_contact_ms: Some(1),
            version: (*version).to_owned(),
            voter: true,
            sync: None,
            full: false,
            free: None,
            level: if *version == "1.2.4" { 1 } else { feature_level() },
            holds: Holdings::default(),
        });
        Status {
            cluster: ClusterId(7),
            node: 1,
            name: "node1".to_owned(),
            version: "1.2.3".to_owned(),
            role: Role::Primary,
            reason: String::new(),
            epoch: 2,
            primary: Some(1),
            applied: 9,
            committed: 9,
            lease_ms: Some(390),
            members: members.collect(),
            membership: Membership::founded(ClusterId(7), (1..=others.len() as u64 + 1).map(founder).collect()),
            warnings: Vec::new(),
            certificates: Vec::new(),
            serving: false,
            waiting: None,
            recent: Default::default(),
        }
    }

    /// The names of the checks that failed; that of the database always does, as there is none in these tests.
    fn failed(status: &Status, wanted: Option<NodeId>) -> Vec<String> {
        let (list, _) = checks(status, wanted);
        let failed = list.into_iter().filter(|check| !check.ok).map(|check| check.name);
        failed.filter(|name| name != "database").collect()
    }

    #[test]
    fn the_furthest_secondary_is_chosen_and_nothing_is_in_the_way() {
        let status = status(&[(Role::Secondary, 7, "1.2.3"), (Role::Secondary, 3, "1.2.3")]);
        let (list, target) = checks(&status, None);
        assert_eq!(target, Some(3));
        let names: Vec<_> = list.iter().map(|check| check.name.as_str()).collect();
        assert_eq!(names, ["role", "no pause", "lease", "database", "target", "caught up", "disk space", "version"]);
        assert_eq!(failed(&status, None), Vec::<String>::new());
        assert_eq!(checks(&status, Some(2)).1, Some(2));
    }

    #[test]
    fn another_version_is_no_hindrance_while_it_has_the_level_in_force() {
        let mut status = status(&[(Role::Secondary, 0, "9.9.9"), (Role::Secondary, 3, "1.2.3")]);
        assert_eq!(failed(&status, Some(2)), Vec::<String>::new());
        let (list, _) = checks(&status, Some(2));
        assert!(list.iter().any(|check| check.detail.contains("both have feature level")), "{list:?}");
        status.membership.shared.level = feature_level() + 1;
        assert_eq!(failed(&status, Some(2)), ["version"]);
    }

    #[test]
    fn each_check_can_fail() {
        let good = || status(&[(Role::Secondary, 0, "1.2.3"), (Role::Down, MAX_LAG + 1, "1.2.4")]);
        assert_eq!(failed(&good(), Some(3)), ["target", "caught up", "version"]);
        assert_eq!(failed(&good(), Some(1)), ["target"]);
        assert!(checks(&good(), None).0.iter().any(|check| check.name == "database" && !check.ok));
        let paused = Some(Pause { until: unix_time() + 60, primary: 1 });
        let mut other = Status { lease_ms: None, role: Role::Secondary, ..good() };
        other.membership.roster.pause = paused;
        assert_eq!(failed(&other, None), ["role", "no pause", "lease"]);
        let mut over = good();
        over.membership.roster.pause = Some(Pause { until: unix_time() - 1, primary: 1 });
        assert_eq!(failed(&over, Some(2)), Vec::<String>::new());
        let mut full = status(&[(Role::Secondary, 0, "1.2.3"), (Role::Secondary, 3, "1.2.3")]);
        full.members[1].full = true;
        assert_eq!(failed(&full, Some(2)), ["disk space"]);
        assert_eq!((failed(&full, None), checks(&full, None).1), (Vec::new(), Some(3)));
        full.members[2].full = true;
        assert_eq!(failed(&full, None), ["disk space"]);
        let mut learner = good();
        learner.members[1].voter = false;
        assert_eq!(failed(&learner, Some(2)), ["target"]);
        assert_eq!(failed(&learner, None), ["target"]);
        assert_eq!(checks(&learner, None).1, None);
    }
}
