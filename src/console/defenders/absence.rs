//! Defenders that are away for too long: the PRIMARY tells of them, and later removes those that have not come back.
//! `settings/defenders` says when. Must never count the time in which nobody could connect, nor remove one that nobody
//! was told of.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State, http::Method};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::{FromRow, Row as _, sqlite::SqliteRow};

use super::{Hub, tables::REMOVED};
use crate::{
    admin::Actor,
    console::{
        Console, audit_log,
        clock::unix_time,
        errors::ApiError,
        extract::Body,
        route::{Access, Entry, route},
        store::{Store, StoreError},
        user::{Role, User},
    },
    events::{Event, Kind, Recorder, Scope, Severity},
    node::verdict::duration,
    telemetry::{DEFENDERS_AWAY, DEFENDERS_REMOVED},
};

/// Name of the setting.
const ABSENCE: &str = "defenderAbsence";
/// The usual spans, in seconds: from the last connection to the alert, and to the removal.
const USUAL: (u32, u32) = (6 * 3600, 86_400);
/// Bounds of both in seconds. A Defender that is connected is written down every ten minutes, at least.
const ALERT: (u32, u32) = (900, 30 * 86_400);
const REMOVE: u32 = 365 * 86_400;
/// How long Defenders have to find a Console that has just opened, and from one look at the absent ones to the next.
const PACE: Pace = Pace { settle: Duration::from_secs(120), every: Duration::from_secs(30) };
/// Defenders that one look removes at most: each has its row in the audit.
const BATCH: i64 = 100;
/// Names that one event lists.
const NAMED: usize = 5;
/// How long one that was removed is listed at least, in seconds.
const LISTED: i64 = 30 * 86_400;

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let path = "/settings/defenders";
    let set = "Set after which absence a Defender is told of and removed";
    vec![
        route(Method::GET, path, Access::Any, "After which absence a Defender is told of and removed", absence)
            .answer::<Absence>(),
        route(Method::POST, path, Access::Roles(Role::OPERATORS), set, set_absence)
            .changes("set", "settings/defenders")
            .body::<Absence>()
            .answer::<Absence>(),
    ]
}

/// What follows from an absence. What a body leaves out gets its default; what is unknown is ignored, because a newer
/// version may have stored it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
struct Absence {
    /// Seconds without a connection after which an event tells of it.
    #[schemars(range(min = 900, max = 2_592_000))]
    alert_sec: u32,
    /// Seconds without a connection after which a Defender is removed: it has to be registered again. 0: never.
    #[schemars(range(max = 31_536_000))]
    remove_sec: u32,
}

impl Default for Absence {
    fn default() -> Self {
        Self { alert_sec: USUAL.0, remove_sec: USUAL.1 }
    }
}

impl Absence {
    fn check(self) -> Result<(), ApiError> {
        if !(ALERT.0..=ALERT.1).contains(&self.alert_sec) {
            return Err(ApiError::bad(format!("alertSec must be {} to {}", ALERT.0, ALERT.1)));
        }
        if self.remove_sec != 0 && !(self.alert_sec + 1..=REMOVE).contains(&self.remove_sec) {
            return Err(ApiError::bad(format!("removeSec must be 0, or more than alertSec and at most {REMOVE}")));
        }
        Ok(())
    }
}

/// `GET settings/defenders`.
async fn absence(State(console): State<Arc<Console>>) -> Result<Json<Absence>, ApiError> {
    Ok(Json(console.store.setting(ABSENCE).await?.unwrap_or_default()))
}

/// `POST settings/defenders`: it counts for those that are away, too.
async fn set_absence(
    State(console): State<Arc<Console>>,
    user: User,
    Body(wanted): Body<Absence>,
) -> Result<Json<Absence>, ApiError> {
    wanted.check()?;
    let mut writing = console.store.begin().await?;
    let before: Absence = writing.setting(ABSENCE).await?.unwrap_or_default();
    writing.set_setting(ABSENCE, &wanted).await?;
    let difference = audit_log::difference(&before, &wanted);
    audit_log::record(&mut writing, &user, "set", "settings/defenders", difference).await?;
    writing.commit().await?;
    Ok(Json(wanted))
}

struct Pace {
    settle: Duration,
    every: Duration,
}

/// Looks after the absent ones until the store is closed.
pub(in crate::console) async fn run(store: Store, hub: Arc<Hub>, events: Option<Recorder>) {
    watch(store, hub, events, PACE).await;
}

/// See [`run`].
async fn watch(store: Store, hub: Arc<Hub>, events: Option<Recorder>, pace: Pace) {
    let away = metrics::gauge!(DEFENDERS_AWAY);
    away.set(0.0);
    let forever = async {
        tokio::time::sleep(pace.settle).await;
        loop {
            match look(&store, &hub, unix_time()).await {
                Ok(found) => {
                    away.set(found.away as f64);
                    metrics::counter!(DEFENDERS_REMOVED).increment(found.removed.len() as u64);
                    tell(&found, events.as_ref());
                }
                Err(error) => tracing::debug!("absent Defenders could not be looked after: {error}; trying again"),
            }
            tokio::time::sleep(pace.every).await;
        }
    };
    tokio::select! {
        () = store.closing() => {}
        () = forever => {}
    }
    // Whoever is PRIMARY next looks after them.
    away.set(0.0);
}

/// A Defender that is absent, or was until now.
struct Absent {
    number: i64,
    id: String,
    name: String,
    seen: i64,
    /// When it was told of, in seconds since 1970.
    alerted: Option<i64>,
}

impl FromRow<'_, SqliteRow> for Absent {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Self {
            number: row.try_get("number")?,
            id: row.try_get("id")?,
            name: row.try_get("name")?,
            seen: row.try_get("seen")?,
            alerted: row.try_get("since")?,
        })
    }
}

/// What one look has found and done: the names of those that are told of, are there again, and are removed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    alerted: Vec<String>,
    back: Vec<String>,
    removed: Vec<String>,
    /// How many are away for too long, and not removed.
    away: usize,
    /// The spans by which it went, in seconds.
    spans: (i64, i64),
}

/// Looks once, at this time in seconds since 1970.
async fn look(store: &Store, hub: &Hub, now: i64) -> Result<Found, StoreError> {
    let Absence { alert_sec, remove_sec } = store.setting(ABSENCE).await?.unwrap_or_default();
    let (alert, remove) = (i64::from(alert_sec), i64::from(remove_sec));
    let query = "SELECT d.number, d.id, d.name, d.seen, a.since FROM defenders d \
                 LEFT JOIN defender_alerts a ON a.defender = d.number \
                 WHERE d.withdrawn = 0 AND (a.since IS NOT NULL OR d.seen < ?) ORDER BY d.name, d.number";
    let rows = sqlx::query_as(query).bind(now - alert).fetch_all(&mut *store.read().await?).await;
    let rows: Vec<Absent> = rows?;
    let (away, there): (Vec<Absent>, Vec<Absent>) =
        rows.into_iter().partition(|one| one.seen < now - alert && hub.address(&one.id).is_none());
    let back: Vec<&Absent> = there.iter().filter(|one| one.alerted.is_some()).collect();
    let new: Vec<&Absent> = away.iter().filter(|one| one.alerted.is_none()).collect();
    // Also told of for as long as it usually takes from the alert to the removal: perhaps nobody could connect before.
    let is_over = |one: &&Absent| one.alerted.is_some_and(|at| at <= now - (remove - alert)) && one.seen < now - remove;
    let over: Vec<&Absent> = away.iter().filter(|one| remove > 0 && is_over(one)).take(BATCH as usize).collect();
    let mut found = Found { away: away.len(), spans: (alert, remove), ..Found::default() };
    forget(store, now).await?;
    if back.is_empty() && new.is_empty() && over.is_empty() {
        return Ok(found);
    }
    let numbers = |all: &[&Absent]| json!(all.iter().map(|one| one.number).collect::<Vec<_>>()).to_string();
    let names = |all: &[&Absent]| all.iter().map(|one| one.name.clone()).collect::<Vec<_>>();
    let mut writing = store.begin().await?;
    let note = "INSERT OR IGNORE INTO defender_alerts (defender, since) SELECT value, ? FROM json_each(?)";
    writing.execute(sqlx::query(note).bind(now).bind(numbers(&new))).await?;
    let end = "DELETE FROM defender_alerts WHERE defender IN (SELECT value FROM json_each(?))";
    writing.execute(sqlx::query(end).bind(numbers(&[&back[..], &over[..]].concat()))).await?;
    let console = User::within(Actor { name: "the Console".to_owned(), source: "itself".to_owned() });
    let mut gone = Vec::new();
    for one in over {
        // It may connect at this moment: then it is not removed.
        let update = "UPDATE defenders SET withdrawn = ?, modified = ? WHERE number = ? AND withdrawn = 0 AND seen < ?";
        let update = sqlx::query(update).bind(REMOVED).bind(now).bind(one.number).bind(now - remove);
        if writing.execute(update).await? == 1 {
            let difference = audit_log::difference(&json!({ "name": one.name, "seen": one.seen }), &Value::Null);
            audit_log::record(&mut writing, &console, "remove", &format!("Defender '{}'", one.id), difference).await?;
            found.removed.push(one.name.clone());
            found.away -= 1;
            gone.push(&one.id);
        }
    }
    writing.commit().await?;
    gone.into_iter().for_each(|id| hub.disconnect(id, "this Defender was removed: register this host again"));
    (found.alerted, found.back) = (names(&new), names(&back));
    Ok(found)
}

/// Deletes rows of Defenders that nobody needs: they may not connect, and none of their events is left. One that was
/// withdrawn stays as long as its certificate is good.
async fn forget(store: &Store, now: i64) -> Result<(), StoreError> {
    let gone = "SELECT number FROM defenders d WHERE \
                (withdrawn = ?1 AND modified < ?2 OR withdrawn = 1 AND expires < ?3) AND NOT EXISTS \
                (SELECT 1 FROM defender_events e WHERE e.defender = d.number) LIMIT ?4";
    let gone = sqlx::query_scalar(gone).bind(REMOVED).bind(now - LISTED).bind(now).bind(BATCH);
    let gone: Vec<i64> = gone.fetch_all(&mut *store.read().await?).await?;
    for number in gone {
        let delete = sqlx::query("DELETE FROM defenders WHERE number = ? AND withdrawn <> 0").bind(number);
        store.write(delete).await?;
    }
    Ok(())
}

/// Tells of what was found: an event for all that happened at once.
fn tell(found: &Found, events: Option<&Recorder>) {
    let (alert, remove) = found.spans;
    let span = |seconds: i64| duration(1000 * seconds.unsigned_abs());
    let record = |severity, names: &[String], sentence: String| {
        if names.is_empty() {
            return;
        }
        match severity {
            Severity::Info => tracing::info!("{sentence}"),
            _ => tracing::warn!("{sentence}"),
        }
        let event = Event::new(Kind::Defender, severity, sentence).scope(Scope::Cluster).field("count", names.len());
        events.inspect(|events| events.record(event));
    };
    let (away, back, removed) = (&found.alerted, &found.back, &found.removed);
    let text = format!("{} not connected for more than {}", many(away, "has", "have"), span(alert));
    record(Severity::Warning, away, text);
    record(Severity::Info, back, format!("{} there again", many(back, "is", "are")));
    let text = format!(
        "{} removed, not connected for more than {}: register such a host again if it comes back",
        many(removed, "is", "are"),
        span(remove)
    );
    record(Severity::Warning, removed, text);
}

/// The subject of a sentence, with its verb.
fn many(names: &[String], one: &str, more: &str) -> String {
    match names {
        [name] => format!("the Defender {name} {one}"),
        _ => {
            let listed = names.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
            let rest = names.len().saturating_sub(NAMED);
            let rest = if rest > 0 { format!(" and {rest} more") } else { String::new() };
            format!("{} Defenders ({listed}{rest}) {more}", names.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;

    use super::*;
    use crate::{
        console::test_console::TestConsole,
        events::{self, Wanted},
    };

    const NOW: i64 = 1_800_000_000;
    const HOUR: i64 = 3_600;

    async fn known(test: &TestConsole, defenders: &[(&str, i64)]) {
        for (name, seen) in defenders {
            let insert = "INSERT INTO defenders (id, name, key, registered, modified, seen, expires) \
                          VALUES (?1, ?1, ?1, 1, 1, ?2, 1)";
            test.console.store.write(sqlx::query(insert).bind(name.to_string()).bind(seen)).await.unwrap();
        }
    }

    async fn looked(test: &TestConsole, now: i64) -> (Vec<String>, Vec<String>, Vec<String>, usize) {
        let found = look(&test.console.store, &test.console.defenders, now).await.unwrap();
        (found.alerted, found.back, found.removed, found.away)
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[tokio::test]
    async fn absent_ones_are_told_of_once_and_removed_later() {
        let test = TestConsole::start().await;
        let hub = Arc::clone(&test.console.defenders);
        known(&test, &[("a", NOW), ("b", NOW - 7 * HOUR), ("c", NOW - 7 * HOUR), ("d", NOW - 7 * HOUR)]).await;
        let seat = hub.connect("c", "here".to_owned(), 0);
        assert_eq!(looked(&test, NOW).await, (names(&["b", "d"]), vec![], vec![], 2), "c is connected");
        assert_eq!(looked(&test, NOW + 60).await, (vec![], vec![], vec![], 2), "once is enough");
        let back = hub.connect("d", "here".to_owned(), 0);
        assert_eq!(looked(&test, NOW + 90).await, (vec![], names(&["d"]), vec![], 1));
        // A day after b was there, but not yet long enough after somebody was told.
        assert_eq!(looked(&test, NOW + 17 * HOUR + 1).await, (names(&["a"]), vec![], vec![], 2));
        assert_eq!(looked(&test, NOW + 18 * HOUR).await, (vec![], vec![], names(&["b"]), 1));
        let audited =
            sqlx::query_scalar("SELECT user || ': ' || action || ' ' || what FROM audits WHERE action = 'remove'");
        let audited: String = audited.fetch_one(&mut *test.console.store.read().await.unwrap()).await.unwrap();
        assert_eq!(audited, "the Console: remove Defender 'b'");
        drop((seat, back));
    }

    /// While no Console was open, nobody could connect.
    #[tokio::test]
    async fn after_a_long_outage_nobody_is_removed_who_was_not_told_of() {
        let test = TestConsole::start().await;
        known(&test, &[("a", NOW - 100 * 24 * HOUR)]).await;
        assert_eq!(looked(&test, NOW).await, (names(&["a"]), vec![], vec![], 1));
        assert_eq!(looked(&test, NOW + 17 * HOUR).await, (vec![], vec![], vec![], 1));
        assert_eq!(looked(&test, NOW + 18 * HOUR).await, (vec![], vec![], names(&["a"]), 0));
    }

    #[tokio::test]
    async fn the_spans_are_settings_with_bounds() {
        let test = TestConsole::start().await;
        let admin = test.login().await;
        let ask = async |method, body| test.call(method, "/api/v1/settings/defenders", &admin, body).await;
        assert_eq!(ask(Method::GET, Value::Null).await.1, json!({ "alertSec": 21_600, "removeSec": 86_400 }));
        for (alert, remove) in [(899, 86_400), (2_592_001, 0), (3_600, 3_600), (3_600, 31_536_001)] {
            let (status, text) = ask(Method::POST, json!({ "alertSec": alert, "removeSec": remove })).await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{text}");
        }
        known(&test, &[("a", NOW - 2 * HOUR)]).await;
        assert_eq!(looked(&test, NOW).await.0, names(&[]));
        let (status, set) = ask(Method::POST, json!({ "alertSec": 3600, "removeSec": 0 })).await;
        assert_eq!((status, &set), (StatusCode::OK, &json!({ "alertSec": 3600, "removeSec": 0 })));
        assert_eq!(looked(&test, NOW).await.0, names(&["a"]));
        assert_eq!(looked(&test, NOW + 1000 * 24 * HOUR).await.2, names(&[]), "never");
    }

    #[tokio::test]
    async fn rows_that_nobody_needs_go() {
        let test = TestConsole::start().await;
        known(&test, &[("kept", NOW), ("removed", 1), ("told", 1), ("withdrawn", 1)]).await;
        let store = &test.console.store;
        for set in [
            "UPDATE defenders SET withdrawn = 2 WHERE id IN ('removed', 'told')",
            "UPDATE defenders SET withdrawn = 1, expires = 1900000000 WHERE id = 'withdrawn'",
            "INSERT INTO defender_events (defender, sequence, time, received, kind, event) \
             SELECT number, 1, 1, 1, 'file', '{}' FROM defenders WHERE id = 'told'",
        ] {
            store.write(sqlx::query(set)).await.unwrap();
        }
        let left = async |now: i64| -> String {
            look(store, &test.console.defenders, now).await.unwrap();
            let ids = sqlx::query_scalar("SELECT group_concat(id, ' ') FROM (SELECT id FROM defenders ORDER BY id)");
            ids.fetch_one(&mut *store.read().await.unwrap()).await.unwrap()
        };
        assert_eq!(left(LISTED).await, "kept removed told withdrawn");
        assert_eq!(left(NOW).await, "kept told withdrawn");
        assert_eq!(left(1_900_000_001).await, "kept told");
    }

    #[tokio::test]
    async fn what_was_found_is_an_event() {
        let (test, folder) = (TestConsole::start().await, tempfile::tempdir().unwrap());
        known(&test, &[("web1", 1)]).await;
        let recorder = Recorder::start("node1", folder.path()).unwrap();
        let pace = Pace { settle: Duration::ZERO, every: Duration::from_millis(20) };
        let (store, hub) = (test.console.store.clone(), Arc::clone(&test.console.defenders));
        let watching = tokio::spawn(watch(store, hub, Some(recorder.clone()), pace));
        let wanted = Wanted { kind: Some(Kind::Defender), ..Wanted::default() };
        let found = async {
            loop {
                recorder.flush();
                let found = events::read(folder.path(), &wanted).unwrap();
                if !found.is_empty() {
                    return found;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let found = tokio::time::timeout(Duration::from_secs(20), found).await.unwrap();
        assert_eq!(found[0].sentence, "the Defender web1 has not connected for more than 6 h");
        assert_eq!((found.len(), found[0].severity), (1, Severity::Warning));
        test.console.store.close().await;
        watching.await.unwrap();
    }

    #[test]
    fn sentences_read_well() {
        assert_eq!(many(&names(&["a"]), "has", "have"), "the Defender a has");
        let all: Vec<String> = (1..=7).map(|number| format!("web{number}")).collect();
        assert_eq!(many(&all, "has", "have"), "7 Defenders (web1, web2, web3, web4, web5 and 2 more) have");
    }
}
