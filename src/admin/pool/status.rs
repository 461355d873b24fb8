//! The status of a pool, as its API and `twistcli clustered-db status` have it. Pure: made from what a member knows.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{PoolSettings, PoolSize, in_pool, pool_settings, state::pool_state, up};
use crate::{
    admin::AdminError,
    cluster::{Role, level::behind_pool, roster::Removed},
    node::{
        MemberStatus, Status,
        verdict::{Health, advise, judge},
    },
};

/// How long a removed member is still shown, in seconds.
const SHOWN_REMOVED: u64 = 30;

/// A pool as one of its members sees it. In the API: `StatusResponse`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "StatusResponse")]
pub struct PoolStatus {
    /// When this was so, as RFC 3339 has it.
    pub date: String,
    /// Where the pool is reached.
    #[serde(flatten)]
    pub settings: PoolSettings,
    /// In the order in which they were added.
    pub members: Vec<PoolMember>,
    /// `healthy`, `degraded` (it serves, but something needs attention) or `noPrimary`.
    pub health: PoolHealth,
    /// How many there are, and what that tolerates.
    #[serde(flatten)]
    pub size: Option<PoolSize>,
    /// The highest version of a program that was PRIMARY: members with older ones only replicate.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub database_version: String,
    /// What is wrong and what to do about it, a sentence or two each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub advice: Vec<String>,
}

/// How a pool is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum PoolHealth {
    Healthy,
    NoPrimary,
    /// Also what only a newer program has a word for.
    #[serde(other)]
    Degraded,
}

/// One member of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolMember {
    /// Its address.
    pub name: String,
    /// See [`pool_state`].
    pub state_str: String,
    /// What its host is called.
    #[serde(default)]
    pub host: String,
    /// Why it is not well, and what to do; none if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Milliseconds since it was last heard of; none if never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen_ms: Option<u64>,
    /// Of its program; empty if it was never heard of.
    #[serde(default)]
    pub version: String,
    /// False until it has caught up.
    #[serde(default)]
    pub voter: bool,
}

/// The status of a pool from that of one of its members, or of a host that is to be one; `now` in seconds since 1970.
///
/// # Errors
/// `Refused` in HA mode.
pub fn pool_status(status: &Status, now: u64) -> Result<PoolStatus, AdminError> {
    let membership = &status.membership;
    // A host that starts or waits may not know of what it will be a member.
    let outside = status.members.is_empty();
    if !outside {
        in_pool(membership)?;
    }
    let verdict = judge(status, now);
    let mut members: Vec<PoolMember> = status.members.iter().map(|member| of_member(member, status)).collect();
    let own = status.members.iter().any(|member| member.id == status.node);
    if status.role == Role::Removed || !own {
        members.retain(|member| member.host != status.name);
        members.push(itself(status));
    } else {
        let gone = |removed: &&Removed| {
            let back = || membership.roster.members.iter().any(|member| member.address == removed.address);
            !removed.address.is_empty() && removed.at <= now && now - removed.at < SHOWN_REMOVED && !back()
        };
        members.extend(membership.roster.removed.iter().filter(gone).map(of_removed));
    }
    let date = i64::try_from(now).ok().and_then(|now| Timestamp::from_second(now).ok()).unwrap_or_default();
    Ok(PoolStatus {
        date: date.to_string(),
        settings: pool_settings(membership),
        members,
        health: match verdict.health {
            Health::Healthy => PoolHealth::Healthy,
            Health::Degraded => PoolHealth::Degraded,
            Health::NoPrimary => PoolHealth::NoPrimary,
        },
        size: (!outside).then(|| PoolSize::of(membership, up(membership, status))),
        database_version: membership.shared.pool.version.clone(),
        advice: verdict.advice,
    })
}

fn of_member(member: &MemberStatus, status: &Status) -> PoolMember {
    let MemberStatus { id, name, state, version, voter, last_contact_ms, .. } = member;
    let shared = &status.membership.shared;
    let behind = shared.is_behind_pool(version).then(|| behind_pool(name, version, &shared.pool.version));
    let own = (*id == status.node && *state != Role::Primary).then(|| status.reason.clone());
    let unwell = advise(member, status);
    PoolMember {
        name: status.membership.get(*id).map_or_else(|| member.address.clone(), |member| member.address.clone()),
        state_str: pool_state(*state).to_owned(),
        host: name.clone(),
        // Of itself a member knows more than what to do.
        reason: unwell.map(|advice| own.map_or_else(|| advice.clone(), |why| format!("{why}. {advice}"))).or(behind),
        last_seen_ms: *last_contact_ms,
        version: version.clone(),
        voter: *voter,
    }
}

/// A host that is no member, or not any more, or not yet.
fn itself(status: &Status) -> PoolMember {
    let removed = status.membership.removed(status.node).map(|removed| removed.address.clone());
    let known = status.membership.get(status.node).map(|member| member.address.clone()).or(removed);
    PoolMember {
        name: known.filter(|address| !address.is_empty()).unwrap_or_else(|| status.name.clone()),
        state_str: pool_state(status.role).to_owned(),
        host: status.name.clone(),
        reason: Some(status.reason.clone()),
        last_seen_ms: Some(0),
        version: status.version.clone(),
        voter: false,
    }
}

fn of_removed(removed: &Removed) -> PoolMember {
    PoolMember {
        name: removed.address.clone(),
        state_str: pool_state(Role::Removed).to_owned(),
        host: removed.name.clone(),
        reason: Some(
            "no longer a member: stop twistlockd there, and set its data aside before it is added again".to_owned(),
        ),
        last_seen_ms: None,
        version: String::new(),
        voter: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cluster::roster::SizePolicy, node::verdict::tests::healthy};

    /// 28 March 2022, 18:25 UTC.
    const NOW: u64 = 1_648_491_900;

    fn pool() -> Status {
        let mut status = healthy();
        status.membership.roster.size = SizePolicy::pool();
        status
    }

    fn states(status: &Status) -> Vec<String> {
        pool_status(status, NOW).unwrap().members.into_iter().map(|member| member.state_str).collect()
    }

    #[test]
    fn the_status_has_the_fields_of_the_interface_that_we_keep() {
        let mut status = pool();
        status.membership.shared.pool.load_balancer = "lb.example".to_owned();
        let shown = pool_status(&status, NOW).unwrap();
        assert_eq!((shown.health, shown.advice.len()), (PoolHealth::Healthy, 0));
        let json = serde_json::to_value(&shown).unwrap();
        assert_eq!(json["date"], "2022-03-28T18:25:00Z");
        assert_eq!(json["loadBalancerAddress"], "lb.example");
        assert_eq!(json["members"][1]["name"], "127.0.0.2");
        assert_eq!(json["members"][1]["stateStr"], "SECONDARY");
        assert_eq!((&json["majority"], &json["failuresTolerated"]), (&2.into(), &1.into()));
        assert_eq!(serde_json::from_value::<PoolStatus>(json).unwrap(), shown);
        assert!(pool_status(&healthy(), NOW).unwrap_err().to_string().contains("HA mode"));
    }

    #[test]
    fn who_is_not_well_says_why_and_when_it_was_seen() {
        let mut status = pool();
        status.members[2].state = Role::Down;
        status.members[2].last_contact_ms = Some(75_000);
        let shown = pool_status(&status, NOW).unwrap();
        let down = &shown.members[2];
        assert_eq!((down.state_str.as_str(), down.last_seen_ms), ("DOWN", Some(75_000)));
        assert!(down.reason.as_ref().unwrap().contains("last heard of 75 s ago"), "{down:?}");
        assert_eq!(shown.size.unwrap().failures_tolerated, 0);
        assert_eq!(shown.health, PoolHealth::Degraded);
        status.members[2].state = Role::Secondary;
        status.members[2].version = "0.0.9".to_owned();
        status.membership.shared.pool.version = "0.1.0".to_owned();
        let shown = pool_status(&status, NOW).unwrap();
        assert!(shown.members[2].reason.as_ref().unwrap().contains("does not become PRIMARY before version 0.1.0"));
        assert_eq!(shown.members[1].reason, None);
    }

    #[test]
    fn a_removed_member_is_shown_for_a_moment_and_by_itself() {
        let mut status = pool();
        let gone = status.membership.roster.members.pop().unwrap();
        status.members.pop();
        let removed = Removed { id: 3, name: gone.name, at: NOW - 29, address: gone.address };
        status.membership.roster.removed.push(removed);
        assert_eq!(states(&status), ["PRIMARY", "SECONDARY", "REMOVED"]);
        status.membership.roster.removed[0].at = NOW - 30;
        assert_eq!(states(&status), ["PRIMARY", "SECONDARY"]);
        let mut there = pool();
        (there.node, there.role, there.name) = (3, Role::Removed, "node3".to_owned());
        there.members.iter_mut().for_each(|member| member.state = Role::Unknown);
        assert_eq!(states(&there), ["UNKNOWN", "UNKNOWN", "REMOVED"]);
        there.members.clear();
        (there.node, there.role) = (0, Role::RequestJoin);
        assert_eq!(states(&there), ["STARTUP"]);
        assert_eq!(pool_status(&there, NOW).unwrap().members[0].name, "node3");
    }
}
