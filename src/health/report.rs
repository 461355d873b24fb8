//! What the status page tells: one picture of the cluster as this host sees it, with the age of everything in it. Must
//! never say more than this host knows, nor anything that helps to become a member.

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::Sources;
use crate::{
    clock::unix_time,
    cluster::{Member, Role, roster::place},
    node::{
        MemberStatus, Status,
        verdict::{Health, duration, judge},
    },
};

/// A loop that has not turned for this long knows nothing any more: it should turn every few milliseconds.
const FRESH: Duration = Duration::from_secs(2);

/// The answer of the status page, as JSON. Its first fields are those that load balancers get.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    pub name: String,
    pub state: Role,
    /// PRIMARY with a valid lease and open ports.
    pub serves: bool,
    pub epoch: u64,
    pub primary: Option<String>,
    pub lag: u64,
    pub warnings: usize,
    pub version: String,
    /// Why the state is what it is.
    pub reason: String,
    /// HEALTHY, DEGRADED, NO_PRIMARY or UNKNOWN.
    pub verdict: &'static str,
    pub headline: String,
    /// What is wrong and what to do.
    pub advice: Vec<String>,
    /// Where the PRIMARY's Console is.
    pub console: Option<String>,
    pub as_of: Timestamp,
    /// How old all of this was then: how long ago the node's loop turned.
    pub age_ms: u64,
    pub members: Vec<Seen>,
}

/// A member as this host sees it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Seen {
    pub name: String,
    pub address: String,
    /// UNKNOWN if its last report is too old to say anything about now.
    pub state: Role,
    /// Its state for people, with its age.
    pub words: String,
    pub last_seen_ms: Option<u64>,
    pub here: bool,
    /// Its status page.
    pub status: String,
}

impl Report {
    /// The picture of this moment. `serves`: what the answer may claim.
    pub(super) fn of(sources: &Sources, serves: bool) -> Self {
        let status = sources.status();
        let turned = sources.turned().unwrap_or_default();
        let now = unix_time();
        let settings = &sources.settings;
        Self::make(&status, turned, serves, now).links(&status, settings.address.port(), settings.console_port)
    }

    fn make(status: &Status, turned: Duration, serves: bool, now: u64) -> Self {
        let fresh = turned < FRESH;
        let primary = status.primary.and_then(|id| status.membership.get(id));
        let primary = primary.filter(|_| fresh && status.role != Role::Removed);
        let (verdict, headline, advice) = words(status, turned, serves, now);
        Self {
            name: status.name.clone(),
            state: status.role,
            serves,
            epoch: status.epoch,
            primary: primary.map(|member| member.name.clone()),
            lag: status.committed.saturating_sub(status.applied),
            warnings: status.warnings.len(),
            version: status.version.clone(),
            reason: status.reason.clone(),
            verdict,
            headline,
            advice,
            console: None,
            as_of: i64::try_from(now).ok().and_then(|now| Timestamp::from_second(now).ok()).unwrap_or_default(),
            age_ms: turned.as_millis() as u64,
            members: members(status, turned),
        }
    }

    /// Where the PRIMARY's Console and the other pages are.
    fn links(mut self, status: &Status, port: u16, console_port: Option<u16>) -> Self {
        let find = |name: &str| status.membership.roster.members.iter().find(|member| member.name == name);
        let primary = self.primary.as_deref().and_then(find);
        self.console =
            primary.zip(console_port).map(|(member, port)| format!("https://{}/", place(&member.address, port)));
        for seen in &mut self.members {
            seen.status = find(&seen.name)
                .map(|member| format!("http://{}/status", place(&member.address, port)))
                .unwrap_or_default();
        }
        self
    }
}

fn words(status: &Status, turned: Duration, serves: bool, now: u64) -> (&'static str, String, Vec<String>) {
    let judged = judge(status, now);
    if turned >= FRESH {
        let age = duration(turned.as_millis() as u64);
        let headline = format!("UNKNOWN: the daemon of {} has not moved for {age}", status.name);
        let advice = "Its disk or its processor may be stuck: see `journalctl -u twistlockd` on this host. What follows is what it knew then.";
        return ("UNKNOWN", headline, vec![advice.to_owned()]);
    }
    if status.role == Role::Primary && !serves {
        let headline =
            format!("NOT SERVING: {} has the PRIMARY role, but no valid lease or no open ports", status.name);
        return ("DEGRADED", headline, judged.advice);
    }
    let verdict = match judged.health {
        Health::Healthy => "HEALTHY",
        Health::Degraded => "DEGRADED",
        Health::NoPrimary => "NO_PRIMARY",
    };
    (verdict, judged.headline, judged.advice)
}

/// The members as this host sees them. A host that was removed hears from nobody, and says nothing about those who go
/// on without it.
fn members(status: &Status, turned: Duration) -> Vec<Seen> {
    if status.role == Role::Removed {
        return Vec::new();
    }
    let seen = |member: &Member| {
        let found = status.members.iter().find(|seen| seen.id == member.id);
        let here = member.id == status.node;
        let (state, words, last_seen_ms) = match found {
            Some(found) => state(found, here, turned),
            None if here => (status.role, "this host".to_owned(), Some(0)),
            None => (Role::Unknown, "unknown: not heard of yet".to_owned(), None),
        };
        let address = member.place();
        Seen { name: member.name.clone(), address, state, words, last_seen_ms, here, status: String::new() }
    };
    status.membership.roster.members.iter().map(seen).collect()
}

fn state(member: &MemberStatus, here: bool, turned: Duration) -> (Role, String, Option<u64>) {
    let age = member.last_contact_ms.map(|ms| ms + turned.as_millis() as u64);
    let ago = age.map_or("never seen".to_owned(), |ms| format!("last seen {} ago", duration(ms)));
    if turned >= FRESH {
        return (Role::Unknown, format!("unknown, {ago}; it was {} then", member.state), age);
    }
    let words = match member.state {
        Role::Down | Role::Unknown => return (member.state, format!("unknown, {ago}"), age),
        _ if here => "this host".to_owned(),
        _ => ago,
    };
    let lag = match member.lag {
        0 => String::new(),
        lag => format!(", {lag} entries behind"),
    };
    let vote = if member.voter { "" } else { ", no vote yet" };
    let full = if member.full { ", its disk is full" } else { "" };
    (member.state, format!("{words}{lag}{vote}{full}"), age)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::node::verdict::tests::healthy;

    pub(in crate::health) fn report(change: impl FnOnce(&mut Status), turned: Duration, serves: bool) -> Report {
        let mut status = healthy();
        change(&mut status);
        Report::make(&status, turned, serves, 1_000).links(&status, 8085, Some(8083))
    }

    const NOW: Duration = Duration::from_millis(3);

    #[test]
    fn a_whole_cluster_is_told_with_the_way_to_its_console() {
        let told = report(|_| {}, NOW, true);
        assert_eq!(
            (told.verdict, told.headline.as_str()),
            ("HEALTHY", "HEALTHY: node1 is PRIMARY (3 of 3 members up)")
        );
        assert_eq!(told.console.as_deref(), Some("https://127.0.0.1:8083/"));
        assert_eq!(told.members[1].status, "http://127.0.0.2:8085/status");
        assert_eq!(
            (told.members[0].words.as_str(), told.members[1].words.as_str()),
            ("this host", "last seen 15 ms ago")
        );
        assert_eq!(place("fd00::1", 8085), "[fd00::1]:8085");
    }

    #[test]
    fn what_is_not_known_is_not_told_as_if_it_were() {
        let down = |status: &mut Status| {
            status.primary = None;
            status.role = Role::Secondary;
            status.members[0].state = Role::Secondary;
            for at in [1, 2] {
                status.members[at].state = Role::Down;
                status.members[at].last_contact_ms = Some(12_000);
            }
        };
        let told = report(down, NOW, false);
        assert_eq!((told.verdict, told.console, told.primary), ("NO_PRIMARY", None, None));
        assert_eq!(told.members[2].words, "unknown, last seen 12 s ago");
        assert!(told.advice[0].contains("start or reconnect"), "{:?}", told.advice);

        let stuck = report(|_| {}, Duration::from_secs(14), false);
        assert_eq!((stuck.verdict, stuck.console, stuck.age_ms), ("UNKNOWN", None, 14_000));
        assert!(stuck.headline.contains("has not moved for 14 s"), "{}", stuck.headline);
        assert_eq!(stuck.members[1].words, "unknown, last seen 14 s ago; it was SECONDARY then");

        let lapsed = report(|_| {}, NOW, false);
        assert!(lapsed.headline.starts_with("NOT SERVING: node1"), "{}", lapsed.headline);
        let removed = report(|status| status.role = Role::Removed, NOW, false);
        assert!(
            removed.members.is_empty() && removed.console.is_none() && removed.headline.starts_with("REMOVED"),
            "{removed:?}"
        );
    }
}
