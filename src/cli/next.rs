//! What the administrator should type next, from a status. Pure.

use crate::{
    cluster::Role,
    node::{Status, verdict::paused},
};

/// A member that is down for this long may not come back by itself.
const LONG_GONE_MS: u64 = 10 * 60 * 1000;

/// Sentences with a command in each, most urgent first.
pub(super) fn steps(status: &Status, now: u64) -> Vec<String> {
    let mut steps = Vec::new();
    let primary = status.members.iter().find(|member| Some(member.id) == status.primary);
    let on = match primary {
        Some(member) if member.id == status.node => String::new(),
        Some(member) => format!("on {}: ", member.name),
        None => "on the PRIMARY: ".to_owned(),
    };
    match status.role {
        // The verdict says it.
        Role::Waiting => return steps,
        Role::RequestJoin => {
            steps.push("on the PRIMARY: compare the fingerprints, then `twistcli ha apply`".to_owned());
            return steps;
        }
        Role::Removed => {
            // The status itself says it, as it does elsewhere.
            return steps;
        }
        _ => {}
    }
    let (members, requests) = (status.membership.roster.members.len(), status.membership.shared.requests.len());
    let size = status.membership.roster.size;
    let missing = size.missing(members + requests);
    if size.is_pool() {
        let more = (missing > 0)
            .then(|| format!("{on}`twistcli clustered-db add --member-address ADDRESS` for {missing} more"));
        steps.extend(more);
    } else if requests > 0 && size.permits(members + requests) {
        let (who, them) = match requests {
            1 => ("1 host asks".to_owned(), "fingerprint"),
            more => (format!("{more} hosts ask"), "fingerprints"),
        };
        steps.push(format!("{who} to join; {on}compare the {them}, then `twistcli ha apply`"));
    } else if missing > 0 {
        let what = match missing {
            1 => "one more host",
            2 => "each of two more hosts",
            _ => "each of the hosts that are missing",
        };
        steps.push(format!("{on}`twistcli ha join-script`, and run its line on {what}"));
    }
    if status.membership.learners().next().is_some() {
        steps.push("wait until the newcomers have caught up: `twistcli ha status --watch`".to_owned());
    }
    if paused(status, now).is_some() {
        steps.push(format!("when the maintenance is done, {on}`twistcli ha resume`"));
    }
    let another = match size.is_pool() {
        true => "`twistcli clustered-db add` for another host",
        false => "`twistcli ha join-script` for another host",
    };
    let gone = |ms: Option<u64>| ms.is_some_and(|ms| ms > LONG_GONE_MS);
    for member in status.members.iter().filter(|member| member.state == Role::Down && gone(member.last_contact_ms)) {
        steps.push(format!(
            "if {name} will not come back, {on}`twistcli ha remove {name}`, then {another}",
            name = member.name
        ));
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::table::tests::request,
        cluster::{NodeId, roster::Pause},
        node::verdict::tests::healthy,
    };

    fn without(ids: &[NodeId]) -> Status {
        let mut status = healthy();
        status.members.retain(|member| !ids.contains(&member.id));
        status.membership.roster.members.retain(|member| !ids.contains(&member.id));
        status
    }

    #[test]
    fn from_one_host_to_a_cluster() {
        let mut status = without(&[2, 3]);
        assert_eq!(steps(&status, 0), ["`twistcli ha join-script`, and run its line on each of two more hosts"]);
        status.membership.shared.requests.push(request("node2"));
        assert_eq!(steps(&status, 0), ["`twistcli ha join-script`, and run its line on one more host"]);
        status.membership.shared.requests.push(request("node3"));
        assert_eq!(steps(&status, 0), ["2 hosts ask to join; compare the fingerprints, then `twistcli ha apply`"]);
        let mut status = healthy();
        assert!(steps(&status, 0).is_empty());
        status.membership.roster.members[2].voter = false;
        assert!(steps(&status, 0)[0].contains("twistcli ha status --watch"));
    }

    #[test]
    fn another_host_is_named_where_it_has_to_be_done() {
        let mut status = without(&[3]);
        (status.primary, status.role) = (Some(2), Role::Secondary);
        assert_eq!(steps(&status, 0), ["on node2: `twistcli ha join-script`, and run its line on one more host"]);
        status.primary = None;
        assert!(steps(&status, 0)[0].starts_with("on the PRIMARY: "));
        status.role = Role::RequestJoin;
        assert_eq!(steps(&status, 0), ["on the PRIMARY: compare the fingerprints, then `twistcli ha apply`"]);
    }

    #[test]
    fn pauses_end_and_the_dead_are_replaced() {
        let mut status = healthy();
        status.membership.roster.pause = Some(Pause { until: 100, primary: 1 });
        assert_eq!(steps(&status, 99), ["when the maintenance is done, `twistcli ha resume`"]);
        assert!(steps(&status, 100).is_empty());
        status.members[2].state = Role::Down;
        status.members[2].last_contact_ms = Some(1_000);
        assert!(steps(&status, 100).is_empty());
        status.members[2].last_contact_ms = Some(LONG_GONE_MS + 1);
        assert!(steps(&status, 100)[0].starts_with("if node3 will not come back, `twistcli ha remove node3`"));
    }
}
