//! Reads the files of this host while its daemon does not answer: what this node went through, and who belonged to the
//! cluster. Must never show that as the present state, and never change or lock a file.

use std::{
    fs,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use super::{
    columns::{self, Paint},
    quantity::{duration, moment},
};
use crate::{
    cluster::{Membership, Role},
    events::{self, Event, Kind, MAX_PAGE, Wanted, Word},
    storage::membership::StoredMembership,
};

/// Folders of the data folder whose files a running node writes.
const WRITTEN: [&str; 3] = ["", "raft-log", "database"];
/// Most files in each folder whose time is read.
const LOOKED_AT: usize = 1000;

/// What the files of a stopped daemon tell.
#[derive(Debug)]
pub(super) struct Past {
    /// Name of this host, as its events have it.
    pub name: Option<String>,
    /// Version of the daemon that started last.
    pub version: Option<String>,
    /// Members of the cluster, by the last change that this host knows.
    pub membership: Option<Membership>,
    /// When a file of the daemon was written last, in milliseconds since 1970: it ran at that time.
    last_write: Option<u64>,
    /// When and how the daemon said that it was ending; none if it was killed, alone or with its host.
    ended: Option<(u64, String)>,
    /// The last state, and since when.
    state: Option<(u64, Role)>,
    /// Who was PRIMARY last, and since when.
    primary: Option<(u64, String)>,
}

impl Past {
    /// Reads the files; none if there are none that can be read.
    pub(super) fn read(data: &Path) -> Option<Self> {
        let membership = StoredMembership::read(data).ok().flatten().map(|found| found.membership);
        let wanted = Wanted { limit: Some(MAX_PAGE), ..Wanted::default() };
        let events = events::read(data, &wanted).unwrap_or_default();
        if membership.is_none() && events.is_empty() {
            return None;
        }
        let mut past = Self::of(&events);
        (past.membership, past.last_write) = (membership, last_write(data));
        Some(past)
    }

    /// From the events of this node, the newest first.
    fn of(events: &[Event]) -> Self {
        let time = |event: &Event| u64::try_from(event.time.as_millisecond()).unwrap_or(0);
        let text = |event: &Event, name: &str| event.fields.get(name).and_then(Value::as_str).map(str::to_owned);
        let roles = || events.iter().filter(|event| event.kind == Kind::Role);
        let state = |event: &Event| match event.fields.get("to").and_then(Value::as_str) {
            Some("Primary") => Some((time(event), Role::Primary)),
            Some("Secondary" | "Promoting") => Some((time(event), Role::Secondary)),
            Some("Demoting") => Some((time(event), Role::Recovering)),
            Some("Startup") => Some((time(event), Role::Startup)),
            // A start.
            _ => text(event, "version").map(|_| (time(event), Role::Startup)),
        };
        let primary = |event: &Event| {
            let name = match event.kind {
                Word::Known(Kind::Primary) => text(event, "primary"),
                Word::Known(Kind::Role) if state(event).is_some_and(|(_, role)| role == Role::Primary) => {
                    Some(event.node.clone())
                }
                _ => None,
            };
            name.map(|name| (time(event), name))
        };
        let newest = roles().next().filter(|event| event.fields.contains_key("ended"));
        Self {
            name: events.first().map(|event| event.node.clone()),
            version: roles().find_map(|event| text(event, "version")),
            membership: None,
            last_write: None,
            ended: newest.map(|event| (time(event), event.sentence.clone())),
            state: roles().find_map(state),
            primary: events.iter().find_map(primary),
        }
    }

    /// Name of this host, for people.
    pub(super) fn host(&self) -> &str {
        self.name.as_deref().unwrap_or("this host")
    }

    /// When the daemon ran for certain.
    fn seen(&self) -> Option<u64> {
        self.ended.as_ref().map(|(time, _)| *time).or(self.last_write)
    }

    /// How old all of this is, in milliseconds.
    fn age(&self, now: u64) -> Option<u64> {
        self.seen().map(|seen| now.saturating_sub(seen))
    }

    /// The last known status, for people.
    pub(super) fn render(&self, now: u64, paint: Paint) -> String {
        let host = self.host();
        let when = |time: u64| format!("{} UTC, {} ago", moment(time), duration(now.saturating_sub(time)));
        let unknown = || "unknown".to_owned();
        let end = match (&self.ended, self.last_write) {
            (Some((time, sentence)), _) => ("ended", format!("{}: {sentence}", when(*time))),
            (None, Some(time)) => ("last written", format!("{}; its end was not recorded", when(time))),
            (None, None) => ("ended", unknown()),
        };
        let state = self.state.map_or_else(unknown, |(time, role)| format!("{role}, since {}", when(time)));
        let primary =
            self.primary.as_ref().map_or_else(unknown, |(time, name)| format!("{name}, since {}", when(*time)));
        let members = self.membership.as_ref().map_or_else(unknown, |membership| {
            let all = membership.roster.members.iter().map(|member| format!("{} ({})", member.name, member.place()));
            all.collect::<Vec<_>>().join(", ")
        });
        let head = format!("OLD: twistlockd on {host} does not answer. This is what its files say:");
        let lines = [end, ("last state", state), ("last PRIMARY", primary), ("members", members)];
        let lines: String =
            lines.iter().map(|(what, text)| format!("  {what:13} {}\n", columns::harmless(text))).collect();
        format!("{}\n{lines}", paint.text("1;33", &columns::harmless(&head)))
    }

    /// What the files tell, for programs. Nothing in it has the name of a field of a status.
    pub(super) fn json(&self, now: u64, why: &str) -> Value {
        let members = self.membership.iter().flat_map(|membership| &membership.roster.members);
        json!({
            "stale": true,
            "ageMs": self.age(now),
            "host": self.name,
            "why": why,
            "ended": self.ended.as_ref().map(|(time, sentence)| json!({ "timeMs": time, "sentence": sentence })),
            "lastWriteMs": self.last_write,
            "lastState": self.state.map(|(time, role)| json!({ "state": role, "sinceMs": time })),
            "lastPrimary": self.primary.as_ref().map(|(time, name)| json!({ "host": name, "sinceMs": time })),
            "lastMembers": members.map(|member| json!({ "host": member.name, "address": member.place() })).collect::<Vec<_>>(),
        })
    }
}

/// When a file of the data folder was written last. The socket and the lock do not count: others may touch those.
fn last_write(data: &Path) -> Option<u64> {
    let folders = WRITTEN.iter().filter_map(|folder| fs::read_dir(data.join(folder)).ok());
    let files = folders.flat_map(|entries| entries.flatten().take(LOOKED_AT)).filter_map(|entry| entry.metadata().ok());
    let written = files.filter(fs::Metadata::is_file).filter_map(|file| file.modified().ok());
    written.max().map(|time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::events::Severity;

    fn event(second: i64, kind: Kind, sentence: &str, field: (&str, &str)) -> Event {
        let mut event = Event::new(kind, Severity::Info, sentence).field(field.0, field.1);
        (event.time, event.node) = (Timestamp::from_second(second).unwrap(), "node2".to_owned());
        event
    }

    #[test]
    fn what_was_is_told_with_its_age_and_never_as_what_is() {
        let started = event(1_793_383_200, Kind::Role, "node2 starts (version 0.1.0)", ("version", "0.1.0"));
        let primary = event(1_793_383_201, Kind::Primary, "node1 is PRIMARY (epoch 2)", ("primary", "node1"));
        let secondary = event(1_793_383_202, Kind::Role, "node2 follows", ("to", "Secondary"));
        let ended = event(1_793_383_260, Kind::Role, "node2 stops as it was asked to", ("ended", "Stopped"));
        let all = [ended, secondary, primary, started];
        let (past, now) = (Past::of(&all), 1_793_383_320_000);
        let expected = "\
OLD: twistlockd on node2 does not answer. This is what its files say:
  ended         2026-10-30 18:01:00 UTC, 60 s ago: node2 stops as it was asked to
  last state    SECONDARY, since 2026-10-30 18:00:02 UTC, 118 s ago
  last PRIMARY  node1, since 2026-10-30 18:00:01 UTC, 119 s ago
  members       unknown
";
        assert_eq!(past.render(now, Paint(false)), expected);
        let json = past.json(now, "gone");
        assert_eq!((&json["stale"], &json["ageMs"]), (&true.into(), &60_000.into()));
        assert_eq!(json["lastState"]["state"], "SECONDARY");
        // It was killed: the files only say until when it wrote.
        let killed = Past { last_write: Some(1_793_383_310_000), ..Past::of(&all[1..]) };
        assert!(killed.render(now, Paint(false)).contains("18:01:50 UTC, 10 s ago; its end was not recorded"));
        assert_eq!(killed.json(now, "")["ageMs"], 10_000);
        let again =
            [event(1_793_383_300, Kind::Role, "node2 starts", ("version", "0.2.0")), all[0].clone(), all[1].clone()];
        let again = Past::of(&again);
        assert_eq!(
            (again.ended, again.state.unwrap().1, again.version.unwrap()),
            (None, Role::Startup, "0.2.0".to_owned())
        );
        let became = Past::of(&[event(1_793_383_200, Kind::Role, "node2 is PRIMARY", ("to", "Primary"))]);
        assert_eq!(became.primary.unwrap().1, "node2");
    }
}
