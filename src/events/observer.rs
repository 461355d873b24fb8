//! Makes events of what a node publishes: compares each picture with the one before. Must never hold up whoever
//! publishes.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;
use tracing::info;

use super::{
    Event, Kind, Recorder, Scope, Severity,
    certificates::{self, Certificates, Ends},
};
use crate::{
    clock::unix_time,
    cluster::{
        Member, Membership, NodeId, Phase, Role,
        membership::{Difference, differences},
    },
    node::{
        Status, Warning,
        history::{Loss, RoleChange, Takeover},
    },
    telemetry,
};

/// A member that is DOWN for this long is reported, by a node that has known a primary all the time. One that was
/// itself cut off or stopped must not report others.
const DOWN_FOR: Duration = Duration::from_secs(1);
/// Longest time between two looks of a node that was not stopped; a picture comes twice a second.
const LATE: Duration = Duration::from_secs(2);
/// A cluster without a primary for so long is worth telling: any takeover is over by then.
const WITHOUT_PRIMARY: Duration = Duration::from_secs(5);

/// What is compared of a picture.
#[derive(Clone, Debug)]
struct Seen {
    node: NodeId,
    name: String,
    role: Role,
    epoch: u64,
    primary: Option<NodeId>,
    /// State and full disk of the other members.
    others: BTreeMap<NodeId, (Role, bool)>,
    membership: Membership,
    warnings: BTreeMap<Warning, String>,
    certificates: Certificates,
}

impl Seen {
    fn of(status: &Status) -> Self {
        let others = status.members.iter().filter(|member| member.id != status.node);
        Self {
            node: status.node,
            name: status.name.clone(),
            role: status.role,
            epoch: status.epoch,
            primary: status.primary,
            others: others.map(|member| (member.id, (member.state, member.full))).collect(),
            membership: status.membership.public(),
            warnings: status.recent.warnings.clone(),
            certificates: Certificates::of(status),
        }
    }

    fn name(&self, id: NodeId) -> String {
        self.membership.name(id)
    }

    /// True if this node is the first of those that it knows to be up: it speaks for them.
    fn is_first_of_those_up(&self) -> bool {
        let up = |member: &&Member| {
            let other = self.others.get(&member.id);
            other.is_none_or(|(state, _)| !matches!(state, Role::Down | Role::Unknown | Role::Removed))
        };
        let first = self.membership.roster.members.iter().filter(up).min_by_key(|member| member.rank);
        first.is_some_and(|first| first.id == self.node)
    }
}

/// Records what happens until the node ends. `opened` says when the Console's ports were opened last, on the clock of
/// [`crate::node::lease::boottime`].
pub async fn record_changes(
    recorder: Recorder,
    mut status: watch::Receiver<Arc<Status>>,
    mut opened: watch::Receiver<Option<u64>>,
) {
    let mut observer = Observer::new(recorder, &status.borrow_and_update());
    loop {
        let ended = tokio::select! {
            changed = status.changed() => changed.is_err(),
            changed = opened.changed() => changed.is_err(),
        };
        let open = *opened.borrow_and_update();
        // Not under the guard, which keeps the consensus loop from publishing.
        let now = Arc::clone(&status.borrow_and_update());
        observer.observe(&now, open, Instant::now());
        if ended {
            return;
        }
    }
}

/// Another member that is DOWN.
struct Down {
    /// Since when this node, which was well itself, has seen it so.
    since: Instant,
    was: Role,
    told: bool,
}

struct Observer {
    recorder: Recorder,
    down: BTreeMap<NodeId, Down>,
    looked: Option<Instant>,
    seen: Seen,
    /// Number of the last change of the role that was recorded.
    number: u64,
    /// The ports of this primary are not open yet.
    opening: Option<RoleChange>,
    /// Since when no primary is known, and with which scope that was told.
    without: Option<(Instant, Option<Scope>)>,
    /// The primary that was known last.
    last_primary: Option<NodeId>,
    ends: Ends,
}

impl Observer {
    fn new(recorder: Recorder, status: &Status) -> Self {
        let seen = Seen::of(status);
        let (down, looked, ends) = Default::default();
        Self { recorder, down, looked, last_primary: None, seen, number: 0, opening: None, without: None, ends }
    }

    fn observe(&mut self, status: &Status, opened: Option<u64>, now: Instant) {
        let before = std::mem::replace(&mut self.seen, Seen::of(status));
        self.recorder.set_primary(self.seen.role == Role::Primary);
        let known = self.number;
        for change in status.recent.role_changes.iter().filter(|change| change.number > known) {
            self.recorder.record(role_changed(&self.seen.name, change));
            self.opening = Some(change.clone()).filter(|change| change.to == Phase::Primary);
            self.number = change.number;
        }
        if let Some(opened) = opened
            && let Some(change) = self.opening.take_if(|change| opened >= change.at)
            && let Some(takeover) = change.takeover
        {
            self.took_over(&change, takeover, opened);
        }
        self.observe_primary(now);
        let mut events = self.observe_down(&before, now);
        events.extend(members(&before, &self.seen));
        events.iter().for_each(|event| info!("{}", event.sentence));
        events.extend(membership(&before, &self.seen));
        events.extend(warnings(&before, &self.seen));
        let Seen { name, certificates: seen, .. } = &self.seen;
        events.extend(certificates::changes(name, &before.certificates, seen));
        let now = unix_time();
        events.extend(self.ends.new_events(name, seen, now));
        events.into_iter().for_each(|event| self.recorder.record(event));
    }

    fn took_over(&self, change: &RoleChange, takeover: Takeover, opened: u64) {
        let ms = takeover.since.map(|since| opened.saturating_sub(since) as f64 / 1e6);
        let event = took_over(&self.seen, change.epoch, takeover, ms);
        info!("{}", event.sentence);
        self.recorder.record(event);
        if takeover.loss != Loss::FirstStart {
            metrics::counter!(telemetry::FAILOVERS, "reason" => takeover.loss.word()).increment(1);
            if let Some(ms) = ms {
                metrics::histogram!(telemetry::TAKEOVER).record(ms / 1e3);
            }
        }
    }

    /// Which other members have gone DOWN, and which are back; each once.
    fn observe_down(&mut self, before: &Seen, now: Instant) -> Vec<Event> {
        let (seen, mut events) = (&self.seen, Vec::new());
        let late = self.looked.replace(now).is_some_and(|last| now.duration_since(last) > LATE);
        if matches!(seen.role, Role::Removed | Role::RequestJoin | Role::Waiting) {
            self.down.clear();
            return events;
        }
        let unwell = late || seen.primary.is_none();
        self.down.retain(|id, _| seen.others.contains_key(id));
        for (id, (state, _)) in &seen.others {
            let name = seen.name(*id);
            let event = |severity, sentence, from: Role| {
                let event = Event::new(Kind::Member, severity, sentence).scope(Scope::Cluster);
                event.field("member", name.clone()).field("from", from.to_string()).field("to", state.to_string())
            };
            if *state == Role::Down {
                let was = before.others.get(id).map_or(Role::Unknown, |(was, _)| *was);
                let down = self.down.entry(*id).or_insert(Down { since: now, was, told: false });
                if unwell {
                    down.since = now;
                }
                if !down.told && now.duration_since(down.since) >= DOWN_FOR {
                    down.told = true;
                    let was = down.was;
                    let sentence = match was {
                        Role::Down | Role::Unknown => format!("{name} is DOWN: it is not heard of"),
                        was => format!("{name} went DOWN: it was {was}, and is not heard of any more"),
                    };
                    events.push(event(Severity::Warning, sentence, was));
                }
            } else if *state != Role::Unknown && self.down.remove(id).is_some_and(|down| down.told) {
                events.push(event(Severity::Info, format!("{name} is back: DOWN -> {state}"), Role::Down));
            }
        }
        events
    }

    fn observe_primary(&mut self, now: Instant) {
        let seen = &self.seen;
        if let Some(primary) = seen.primary {
            let name = seen.name(primary);
            if self.last_primary.replace(primary) != Some(primary) && primary != seen.node {
                let event =
                    Event::new(Kind::Primary, Severity::Info, format!("{name} is PRIMARY (epoch {})", seen.epoch));
                info!("{}", event.sentence);
                self.recorder.record(event.field("primary", name.clone()).field("epoch", seen.epoch));
            }
            if let Some((since, Some(scope))) = self.without.take() {
                let seconds = now.duration_since(since).as_secs();
                let sentence = format!("{name} is PRIMARY after {seconds} s without one, as seen from {}", seen.name);
                let event = Event::new(Kind::Primary, Severity::Info, sentence).scope(scope);
                self.recorder.record(event.field("primary", name).field("seconds", seconds));
            }
            return;
        }
        if matches!(seen.role, Role::Removed | Role::RequestJoin | Role::Waiting) {
            return;
        }
        let (since, told) = self.without.get_or_insert((now, None));
        if told.is_none() && now.duration_since(*since) >= WITHOUT_PRIMARY {
            let scope = if seen.is_first_of_those_up() { Scope::Node } else { Scope::Local };
            *told = Some(scope);
            let state = |(id, (state, _)): (&NodeId, &(Role, bool))| format!("{} {state}", seen.name(*id));
            let states = seen.others.iter().map(state).collect::<Vec<_>>().join(", ");
            let sentence = format!(
                "nobody is PRIMARY, as seen from {} ({}; {states}): start twistlockd on the other hosts and check the network between them",
                seen.name, seen.role
            );
            self.recorder.record(Event::new(Kind::Primary, Severity::Critical, sentence).scope(scope));
        }
    }
}

fn role_changed(name: &str, change: &RoleChange) -> Event {
    let severity = match change.from {
        Phase::Primary if change.cause != crate::cluster::Cause::Handover => Severity::Warning,
        _ => Severity::Info,
    };
    Event::new(Kind::Role, severity, format!("{name} {}", change.sentence))
        .field("from", format!("{:?}", change.from))
        .field("to", format!("{:?}", change.to))
        .field("cause", format!("{:?}", change.cause))
        .field("epoch", change.epoch)
}

fn took_over(seen: &Seen, epoch: u64, takeover: Takeover, ms: Option<f64>) -> Event {
    let Takeover { from, loss, .. } = takeover;
    let (name, old) = (&seen.name, from.map(|from| seen.name(from)));
    let former = old.as_deref().unwrap_or("nobody");
    let why = match loss {
        Loss::HandedOver => format!("{former} handed the role over"),
        Loss::ProcessDead => format!("the process of {former} is dead"),
        Loss::NotHeard => format!("{former} was not heard of any more"),
        Loss::GaveUp => format!("{former} gave the role up"),
        Loss::Regained => "it had lost the role itself".to_owned(),
        Loss::FirstStart => "none was known since it started".to_owned(),
    };
    let sentence = match (from.filter(|from| *from != seen.node), ms) {
        (Some(_), Some(ms)) => format!("{name} took over from {former} within {ms:.0} ms: {why}"),
        (Some(_), None) => format!("{name} took over from {former}: {why}"),
        (None, _) => format!("{name} is PRIMARY: {why}"),
    };
    let severity = match loss {
        Loss::HandedOver | Loss::FirstStart => Severity::Info,
        _ => Severity::Warning,
    };
    let event = Event::new(Kind::Takeover, severity, sentence).scope(Scope::Cluster);
    let event = event.field("to", name.clone()).field("reason", loss.word()).field("epoch", epoch);
    let event = old.into_iter().fold(event, |event, old| event.field("from", old));
    ms.into_iter().fold(event, |event, ms| event.field("durationMs", (ms * 10.0).round() / 10.0))
}

/// What became of the other members, as seen from here, beside what [`Observer::observe_down`] tells.
fn members(before: &Seen, after: &Seen) -> Vec<Event> {
    let mut events = Vec::new();
    for (id, (state, full)) in &after.others {
        let Some((was, was_full)) = before.others.get(id) else { continue };
        let name = after.name(*id);
        if was != state && ![was, state].into_iter().any(|role| matches!(role, Role::Down | Role::Unknown)) {
            let event = Event::new(Kind::Member, Severity::Info, format!("{name}: {was} -> {state}"));
            let event = event.scope(Scope::Cluster);
            events.push(
                event.field("member", name.clone()).field("from", was.to_string()).field("to", state.to_string()),
            );
        }
        if was_full != full {
            let (severity, sentence) = match full {
                true => (Severity::Warning, format!("the disk of {name} is full: free some space there")),
                false => (Severity::Info, format!("there is space on the disk of {name} again")),
            };
            events.push(Event::new(Kind::Disk, severity, sentence).scope(Scope::Cluster).field("member", name));
        }
    }
    events
}

/// Who belongs to the cluster, and whether it is paused.
fn membership(before: &Seen, after: &Seen) -> Vec<Event> {
    let told = |difference: &Difference| {
        let kind = match difference {
            // The warnings of the member itself are told.
            Difference::VoteTaken(_) | Difference::Level(..) => return None,
            Difference::Pause(_) => Kind::Pause,
            _ => Kind::Membership,
        };
        let event = Event::new(kind, Severity::Info, difference.to_string()).scope(Scope::Cluster);
        let event = difference.name().into_iter().fold(event, |event, name| event.field("member", name));
        Some(match difference {
            Difference::Pause(Some(pause)) => event.field("until", pause.until),
            _ => event,
        })
    };
    differences(&before.membership, &after.membership).iter().filter_map(told).collect()
}

/// What the status warns of, when it begins and when it ends.
fn warnings(before: &Seen, after: &Seen) -> Vec<Event> {
    let mut events = Vec::new();
    let new = |(about, _): &(&Warning, &String)| !before.warnings.contains_key(*about) && !told_elsewhere(**about);
    for (about, text) in after.warnings.iter().filter(new) {
        let (kind, severity, scope) = weight(*about);
        let sentence = format!("{}: {text}", after.name);
        events.push(Event::new(kind, severity, sentence).scope(scope).field("about", about.word()));
    }
    for about in before.warnings.keys().filter(|about| !after.warnings.contains_key(*about) && !told_elsewhere(**about))
    {
        let ((kind, _, scope), word) = (weight(*about), about.word());
        let sentence = format!("{}: the warning about {word} is over", after.name);
        events.push(Event::new(kind, Severity::Info, sentence).scope(scope).field("about", word));
    }
    events
}

/// True if the warning is told elsewhere: with its dates by [`Ends`], or by whoever starts the node.
fn told_elsewhere(about: Warning) -> bool {
    matches!(about, Warning::CertificateExpiry | Warning::Mended)
}

/// How a warning is told, and to whom.
fn weight(about: Warning) -> (Kind, Severity, Scope) {
    match about {
        // The PRIMARY sees the disks of the others by itself, and all see what the Consoles were given.
        Warning::Disk => (Kind::Disk, Severity::Warning, Scope::Cluster),
        Warning::GivenCertificate => (Kind::Certificate, Severity::Warning, Scope::Cluster),
        Warning::Certificates | Warning::CertificateExpiry => (Kind::Certificate, Severity::Warning, Scope::Node),
        Warning::Rollback => (Kind::Rollback, Severity::Warning, Scope::Node),
        Warning::Diverged | Warning::Scrub => (Kind::Damage, Severity::Critical, Scope::Node),
        Warning::Snapshot => (Kind::Snapshot, Severity::Warning, Scope::Node),
        Warning::Backup | Warning::BackupCopies => (Kind::Backup, Severity::Warning, Scope::Node),
        Warning::Database
        | Warning::DiskTrouble
        | Warning::Health
        | Warning::Level
        | Warning::Mended
        | Warning::Ports
        | Warning::Rotation
        | Warning::Service
        | Warning::ServiceFiles
        | Warning::DuplicateIdentity => (Kind::Warning, Severity::Warning, Scope::Node),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cluster::{Cause, ClusterId, role::transition, roster::Pause},
        events::{Wanted, read},
    };

    fn seen(states: &[(Role, bool)]) -> Seen {
        let founder = |id| Member::founder(id, &format!("node{id}"), &format!("127.0.0.{id}"), 8086);
        Seen {
            node: 1,
            name: "node1".to_owned(),
            role: Role::Secondary,
            epoch: 4,
            primary: None,
            others: (2..).zip(states.iter().copied()).collect(),
            membership: Membership::founded(ClusterId(7), (1..=3).map(founder).collect()),
            warnings: BTreeMap::new(),
            certificates: Certificates::default(),
        }
    }

    fn told(events: &[Event]) -> Vec<(Severity, &str)> {
        events.iter().map(|event| (event.severity, event.sentence.as_str())).collect()
    }

    #[test]
    fn states_of_others_are_told_but_not_the_first_sight_of_them() {
        let unknown = seen(&[(Role::Unknown, false), (Role::Unknown, false)]);
        let up = seen(&[(Role::Secondary, false), (Role::Primary, false)]);
        let down = seen(&[(Role::Secondary, true), (Role::Down, false)]);
        assert_eq!(members(&unknown, &up), []);
        let events = members(&up, &down);
        let disk = (Severity::Warning, "the disk of node2 is full: free some space there");
        assert_eq!(told(&events), [disk], "that it is DOWN is told later");
        assert!(events.iter().all(|event| event.scope == Scope::Cluster));
        let recovering = seen(&[(Role::Recovering, false), (Role::Primary, false)]);
        assert_eq!(told(&members(&up, &recovering)), [(Severity::Info, "node2: SECONDARY -> RECOVERING")]);
        assert!(down.is_first_of_those_up());
        assert!(!Seen { node: 2, others: BTreeMap::from([(1, (Role::Startup, false))]), ..up }.is_first_of_those_up());
    }

    #[tokio::test]
    async fn a_member_goes_down_and_comes_back_once_each_and_only_by_who_is_well_itself() {
        let folder = tempfile::tempdir().unwrap();
        let recorder = Recorder::start("node1", folder.path()).unwrap();
        let mut observer = Observer::new(recorder, &status(Role::Primary, Some(1)));
        let (mut before, mut now) = (seen(&[]), Instant::now());
        let mut look = |node2: Role, primary: Option<NodeId>, ms: u64| {
            now += Duration::from_millis(ms);
            let (role, others) = (Role::Primary, BTreeMap::from([(2, (node2, false))]));
            observer.seen = Seen { role, others, primary, ..before.clone() };
            let events = observer.observe_down(&before, now);
            before = observer.seen.clone();
            events.into_iter().map(|event| event.sentence).collect::<Vec<_>>()
        };
        let none = Vec::<String>::new();
        assert_eq!(look(Role::Secondary, Some(1), 500), none);
        assert_eq!(look(Role::Down, Some(1), 500), none);
        assert_eq!(look(Role::Down, Some(1), 500), none);
        let went = ["node2 went DOWN: it was SECONDARY, and is not heard of any more"];
        assert_eq!(look(Role::Down, Some(1), 500), went);
        assert_eq!(look(Role::Down, Some(1), 500), none, "told twice");
        assert_eq!(look(Role::Startup, Some(1), 500), ["node2 is back: DOWN -> STARTUP"]);
        assert_eq!(look(Role::Secondary, Some(1), 500), none);
        // Cut off: it hears of nobody, and of no primary.
        assert_eq!(look(Role::Down, Some(1), 500), none);
        for _ in 0..20 {
            assert_eq!(look(Role::Down, None, 500), none);
        }
        assert_eq!(look(Role::Secondary, Some(2), 500), none, "nobody was told that it was DOWN");
        // Stopped: what it remembers is old.
        assert_eq!(look(Role::Down, Some(1), 500), none);
        assert_eq!(look(Role::Down, Some(1), 9_000), none);
        assert_eq!(look(Role::Secondary, Some(1), 500), none);
    }

    #[test]
    fn membership_and_pause_are_told() {
        let before = seen(&[]);
        let mut after = before.clone();
        after.membership.roster.members.remove(2);
        after.membership.roster.members[1].address = "10.0.0.2".to_owned();
        after.membership.roster.pause = Some(Pause { until: 7, primary: 1 });
        let events = membership(&before, &after);
        let sentences = [
            "node2 (127.0.0.2:8086) is node2 (10.0.0.2:8086) from now on",
            "node3 was removed from the cluster",
            "automatic takeover is paused",
        ];
        assert_eq!(told(&events).iter().map(|(_, sentence)| *sentence).collect::<Vec<_>>(), sentences);
        assert!(membership(&after, &before).iter().any(|event| event.sentence.contains("was admitted")));
        assert_eq!(membership(&after, &after), []);
    }

    #[test]
    fn warnings_begin_and_end_once() {
        let before = seen(&[]);
        let warned =
            Seen { warnings: BTreeMap::from([(Warning::Diverged, "it differs".to_owned())]), ..before.clone() };
        assert_eq!(told(&warnings(&before, &warned)), [(Severity::Critical, "node1: it differs")]);
        assert_eq!(warnings(&warned, &warned), []);
        let over = (Severity::Info, "node1: the warning about diverged is over");
        assert_eq!(told(&warnings(&warned, &before)), [over]);
    }

    fn change(number: u64, takeover: Option<Takeover>) -> RoleChange {
        let edge = transition(Phase::Promoting, Cause::DatabaseOpened).unwrap();
        let (from, to, cause, sentence) = (edge.from, edge.to, edge.cause, edge.sentence);
        RoleChange { number, at: 1000, epoch: 4, from, to, cause, sentence, takeover }
    }

    /// A picture of the same node.
    fn status(role: Role, primary: Option<NodeId>) -> Status {
        let seen = seen(&[]);
        let text = serde_json::json!({
            "cluster": seen.membership.cluster, "node": 1, "name": "node1", "version": "1", "role": role, "reason": "",
            "epoch": 4, "primary": primary, "applied": 0, "committed": 0, "lease_ms": null, "members": [],
            "membership": seen.membership, "warnings": [],
        });
        serde_json::from_value(text).unwrap()
    }

    #[tokio::test]
    async fn a_takeover_is_told_once_when_the_ports_are_open_and_a_loss_after_a_while() {
        let folder = tempfile::tempdir().unwrap();
        let recorder = Recorder::start("node1", folder.path()).unwrap();
        let mut notified = recorder.to_notify();
        let mut observer = Observer::new(recorder.clone(), &status(Role::Secondary, Some(2)));
        let now = Instant::now();
        observer.observe(&status(Role::Secondary, Some(2)), None, now);
        observer.observe(&status(Role::Secondary, None), None, now);
        let mut primary = status(Role::Primary, Some(1));
        let takeover = Takeover { from: Some(2), loss: Loss::ProcessDead, since: Some(900) };
        primary.recent.role_changes.push_back(change(1, Some(takeover)));
        observer.observe(&primary, Some(10), now);
        assert!(notified.try_recv().is_err(), "the ports were opened by an earlier term");
        observer.observe(&primary, Some(24_000_900), now);
        observer.observe(&primary, Some(24_000_900), now);
        let event = notified.try_recv().unwrap();
        assert_eq!(event.sentence, "node1 took over from node2 within 24 ms: the process of node2 is dead");
        assert_eq!((&event.fields["reason"], &event.fields["durationMs"]), (&"process_dead".into(), &24.0.into()));
        assert!(notified.try_recv().is_err(), "told twice");
        observer.observe(&status(Role::Secondary, None), None, now);
        observer.observe(&status(Role::Secondary, None), None, now + WITHOUT_PRIMARY);
        observer.observe(&status(Role::Secondary, None), None, now + 2 * WITHOUT_PRIMARY);
        observer.observe(&status(Role::Secondary, Some(3)), None, now + 2 * WITHOUT_PRIMARY);
        let sentences = [notified.try_recv().unwrap().sentence, notified.try_recv().unwrap().sentence];
        assert!(sentences[0].starts_with("nobody is PRIMARY, as seen from node1"), "{sentences:?}");
        assert_eq!(sentences[1], "node3 is PRIMARY after 10 s without one, as seen from node1");
        assert!(notified.try_recv().is_err());
        recorder.flush();
        let kinds: Vec<_> =
            read(folder.path(), &Wanted::default()).unwrap().iter().map(|event| event.kind.clone()).collect();
        let (primary, change, takeover) = (Kind::Primary, Kind::Role, Kind::Takeover);
        assert_eq!(kinds, [primary, primary, primary, takeover, change, primary]);
    }
}
