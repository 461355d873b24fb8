//! The verdict on a status: healthy, degraded or without a primary, and what to do about it. Pure: must never read a
//! clock or ask a node.

use super::{MemberStatus, Status, Waiting};
use crate::cluster::{Role, roster::Pause};

/// A member that is more Raft entries behind than this is worth a warning. A busy cluster commits about 1,000 a second,
/// so this is the work of several seconds; a healthy secondary is never that far behind.
pub const LAG_LIMIT: u64 = 5_000;

/// The health of the cluster. The number is the exit code of `twistcli ha status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Health {
    /// One PRIMARY, all others SECONDARY and close behind.
    Healthy = 0,
    /// The Console is served, but something needs attention.
    Degraded = 1,
    /// As far as this node knows, nobody serves.
    NoPrimary = 2,
}

/// The verdict with its reasons.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The summary.
    pub health: Health,
    /// One line for the top of the output.
    pub headline: String,
    /// What is wrong and what to do about it, a sentence or two each.
    pub advice: Vec<String>,
}

/// Judges a status at the time `now`, in seconds since 1970.
pub fn judge(status: &Status, now: u64) -> Verdict {
    if let Some(headline) = outside(status) {
        // The headline already contains the reason.
        let mut advice: Vec<String> =
            status.warnings.iter().filter(|warning| **warning != status.reason).cloned().collect();
        advice.extend(status.waiting.iter().flat_map(ways_into_a_pool));
        return Verdict { health: Health::Degraded, headline, advice };
    }
    let primary = status.members.iter().find(|member| member.state == Role::Primary);
    let up = status.members.iter().filter(|member| is_up(member)).count();
    let mut advice: Vec<String> = status.warnings.clone();
    advice.extend(status.members.iter().filter_map(|member| advise(member, status)));
    let count = format!("{up} of {} members up", status.members.len());
    let (health, headline) = match primary {
        None => {
            advice.insert(0, no_primary(status, up));
            (Health::NoPrimary, format!("NO PRIMARY: nobody serves the Console ({count})"))
        }
        Some(primary) if advice.is_empty() && paused(status, now).is_none() => {
            (Health::Healthy, format!("HEALTHY: {} is PRIMARY ({count})", primary.name))
        }
        Some(primary) => (Health::Degraded, format!("DEGRADED: {} is PRIMARY ({count})", primary.name)),
    };
    Verdict { health, headline, advice }
}

/// The pause of automatic takeover, if one is in force at the time `now`, in seconds since 1970.
pub fn paused(status: &Status, now: u64) -> Option<&Pause> {
    status.membership.roster.pause.as_ref().filter(|pause| pause.in_force(now))
}

/// A span of milliseconds in the unit that reads best, such as `75 s`.
pub fn duration(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..120_000 => format!("{} s", ms / 1_000),
        120_000..7_200_000 => format!("{} min", ms / 60_000),
        7_200_000..172_800_000 => format!("{} h", ms / 3_600_000),
        _ => format!("{} days", ms / 86_400_000),
    }
}

/// The headline of a host that is not a member, or has not started yet.
fn outside(status: &Status) -> Option<String> {
    let Status { name, reason, .. } = status;
    match status.role {
        Role::Waiting => Some(format!("WAITING: {reason}")),
        Role::RequestJoin => Some(format!("REQUEST_JOIN: {reason}")),
        Role::Startup if status.members.is_empty() => Some(format!("STARTUP: {name} starts: {reason}")),
        Role::Startup2 if status.members.is_empty() => Some(format!("STARTUP2: {name} joins: {reason}")),
        Role::Removed => Some(format!("REMOVED: this host ({name}) is not a member: {reason}")),
        _ => None,
    }
}

/// Since when a host waits for a pool, and what can be done with it.
fn ways_into_a_pool(waiting: &Waiting) -> [String; 3] {
    let Waiting { fingerprint, since, secret, address, console } = waiting;
    let at = i64::try_from(*since).ok().and_then(|since| jiff::Timestamp::from_second(since).ok());
    let at = at.map(|at| at.strftime("%Y-%m-%d %H:%M").to_string()).unwrap_or_default();
    let accepts = match secret {
        true => "It accepts a pool that knows the secret of CLUSTERED_DB_SECRET_FILE, and no other one.",
        false => "Without CLUSTERED_DB_SECRET_FILE, it takes the first pool that calls.",
    };
    let seed = match console {
        Some(url) => format!("To make it the first member of a pool, sign up at {url} at once: whoever is first may."),
        None => "To make it the first member of a pool, set MANAGEMENT_PORT_HTTPS and sign up there.".to_owned(),
    };
    let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
    let proof = if *secret { String::new() } else { format!(" --member-fingerprint {fingerprint}") };
    [
        format!("It waits since {at} UTC. {accepts}"),
        seed,
        format!("To add it to a pool, at its PRIMARY: `twistcli clustered-db add --member-address {host}{proof}`"),
    ]
}

fn is_up(member: &MemberStatus) -> bool {
    matches!(member.state, Role::Primary | Role::Secondary)
}

fn no_primary(status: &Status, up: usize) -> String {
    let needed = status.membership.voters().count() / 2 + 1;
    if up >= needed {
        return "An election should end within seconds. If it does not: do the members reach each other on \
                the HIGH_AVAILABILITY_PORT?"
            .into();
    }
    format!("{needed} members that reach each other are needed to elect a primary: start or reconnect the others.")
}

/// What to do about a member that is not well; none if it is.
pub fn advise(member: &MemberStatus, status: &Status) -> Option<String> {
    let who = format!("{} ({})", member.name, member.address);
    let text = match member.state {
        Role::Primary | Role::Secondary if member.lag > LAG_LIMIT => {
            format!("{who} is {} entries behind: is its disk or its network slow?", member.lag)
        }
        Role::Primary | Role::Secondary => return None,
        Role::Down => format!(
            "{who} is DOWN{}: check that its host is up and see `systemctl status twistlockd` there.",
            last_heard(member)
        ),
        Role::Unknown => {
            format!("{who} has not been heard of: start twistlockd there, or check the network between the hosts.")
        }
        Role::Waiting => format!("{who} waits for a pool."),
        Role::RequestJoin => format!("{who} asks to join."),
        Role::Removed => format!("{who} is no longer a member: stop twistlockd there and delete its data folder."),
        Role::Startup2 => format!("{who} is in STARTUP2: it becomes SECONDARY by itself when it has caught up."),
        Role::Startup | Role::Recovering | Role::Rollback => {
            let state = member.state;
            let where_ = if member.id == status.node { "here" } else { "there" };
            format!(
                "{who} is in {state}: it should become SECONDARY by itself; if not, read the daemon's log {where_}."
            )
        }
    };
    Some(text)
}

fn last_heard(member: &MemberStatus) -> String {
    match member.last_contact_ms {
        Some(ms) => format!(", last heard of {} ago", duration(ms)),
        None => ", never heard of".into(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::cluster::{ClusterId, Member, Membership, feature_level, trust::Holdings};

    /// A healthy cluster of three as node 1, its primary, sees it.
    pub(crate) fn healthy() -> Status {
        let member = |id: u64, state| MemberStatus {
            id,
            name: format!("node{id}"),
            address: format!("127.0.0.{id}:8086"),
            state,
            epoch: 3,
            applied: 120,
            lag: 0,
            lag_bytes: Some(0),
            lease_ms: (state == Role::Primary).then_some(380),
            last_contact_ms: Some(if id == 1 { 0 } else { 12 }),
            version: "0.1.0".into(),
            voter: true,
            sync: None,
            full: false,
            free: None,
            level: feature_level(),
            holds: Holdings::default(),
        };
        let founder = |id| Member::founder(id, &format!("node{id}"), &format!("127.0.0.{id}"), 8086);
        Status {
            cluster: ClusterId(0xabc),
            node: 1,
            name: "node1".into(),
            version: "0.1.0".into(),
            role: Role::Primary,
            reason: "elected".into(),
            epoch: 3,
            primary: Some(1),
            applied: 120,
            committed: 120,
            lease_ms: Some(380),
            members: vec![member(1, Role::Primary), member(2, Role::Secondary), member(3, Role::Secondary)],
            membership: Membership::founded(ClusterId(0xabc), (1..=3).map(founder).collect()),
            warnings: Vec::new(),
            certificates: Vec::new(),
            serving: false,
            waiting: None,
            recent: Default::default(),
        }
    }

    #[test]
    fn a_host_that_waits_says_both_ways_out() {
        let (fingerprint, address) = ("AB:CD".to_owned(), "192.0.2.7:8086".to_owned());
        let console = Some("https://192.0.2.7:8083/".to_owned());
        let waiting = Waiting { fingerprint, since: 60, secret: false, address, console };
        let mut status = Status { role: Role::Waiting, reason: "AB:CD".into(), waiting: Some(waiting), ..healthy() };
        let verdict = judge(&status, 0);
        assert_eq!((verdict.health, verdict.headline.as_str()), (Health::Degraded, "WAITING: AB:CD"));
        let told = verdict.advice.join("\n");
        for part in ["since 1970-01-01 00:01 UTC", "takes the first pool", "sign up at https://192.0.2.7:8083/ at once"]
        {
            assert!(told.contains(part), "{told}");
        }
        assert!(told.ends_with("--member-address 192.0.2.7 --member-fingerprint AB:CD`"), "{told}");
        status.waiting.as_mut().expect("it waits").secret = true;
        assert!(judge(&status, 0).advice[2].ends_with("--member-address 192.0.2.7`"));
    }

    #[test]
    fn durations_read_well() {
        let texts = [0, 999, 1_000, 119_999, 120_000, 7_200_000, 172_800_000].map(duration);
        assert_eq!(texts, ["0 ms", "999 ms", "1 s", "119 s", "2 min", "2 h", "2 days"]);
    }

    #[test]
    fn all_well() {
        let verdict = judge(&healthy(), 0);
        assert_eq!(verdict.health, Health::Healthy);
        assert_eq!(verdict.headline, "HEALTHY: node1 is PRIMARY (3 of 3 members up)");
        assert!(verdict.advice.is_empty());
    }

    #[test]
    fn a_member_down_degrades() {
        let mut status = healthy();
        status.members[2].state = Role::Down;
        status.members[2].last_contact_ms = Some(75_000);
        let verdict = judge(&status, 0);
        assert_eq!(verdict.health, Health::Degraded);
        assert_eq!(verdict.headline, "DEGRADED: node1 is PRIMARY (2 of 3 members up)");
        assert!(verdict.advice[0].contains("node3 (127.0.0.3:8086) is DOWN, last heard of 75 s ago"), "{verdict:?}");
    }

    #[test]
    fn lag_and_warnings_degrade() {
        let mut status = healthy();
        status.members[1].lag = LAG_LIMIT + 1;
        assert_eq!(judge(&status, 0).health, Health::Degraded);
        let mut status = healthy();
        status.warnings.push("The disk is full.".into());
        assert_eq!(judge(&status, 0).advice, ["The disk is full."]);
        assert_eq!(judge(&status, 0).health, Health::Degraded);
    }

    #[test]
    fn without_a_primary_the_majority_is_explained() {
        let mut status = healthy();
        status.members[0].state = Role::Secondary;
        assert!(judge(&status, 0).advice[0].contains("An election should end"));
        status.members[0].state = Role::Down;
        status.members[1].state = Role::Down;
        let verdict = judge(&status, 0);
        assert_eq!(verdict.health, Health::NoPrimary);
        assert_eq!(verdict.headline, "NO PRIMARY: nobody serves the Console (1 of 3 members up)");
        assert!(verdict.advice[0].starts_with("2 members that reach each other are needed"));
    }

    #[test]
    fn a_pause_degrades_until_it_ends() {
        let mut status = healthy();
        status.membership.roster.pause = Some(crate::cluster::roster::Pause { until: 10, primary: 1 });
        assert_eq!(judge(&status, 9).health, Health::Degraded);
        assert_eq!(judge(&status, 10).health, Health::Healthy);
    }

    #[test]
    fn a_host_outside_says_so() {
        let mut status = healthy();
        status.members.clear();
        (status.role, status.primary, status.reason) = (Role::RequestJoin, None, "node1 waits for APPLY".into());
        status.warnings = vec![status.reason.clone(), "The disk is full.".into()];
        let verdict = judge(&status, 0);
        assert_eq!(verdict.headline, "REQUEST_JOIN: node1 waits for APPLY");
        assert_eq!(verdict.advice, ["The disk is full."]);
        status.role = Role::Startup2;
        assert_eq!(judge(&status, 0).headline, "STARTUP2: node1 joins: node1 waits for APPLY");
        status.role = Role::Removed;
        assert!(judge(&status, 0).headline.starts_with("REMOVED: this host (node1) is not a member: "));
        assert_eq!(judge(&status, 0).health, Health::Degraded);
    }
}
