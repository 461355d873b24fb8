//! `settings/retention`: how much of the audit, of the history of events and of what Defenders tell is kept. The PRIMARY deletes the rest, the
//! oldest first, a few rows in a transaction. Must never hold up writers for longer than one of them does, nor a
//! takeover, and never let many failures push out what succeeded.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State, http::Method};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Console, audit_log,
    clock::unix_time,
    errors::ApiError,
    extract::Body,
    route::{Access, Entry, route},
    store::{Store, StoreError},
    user::{Role, User},
};
use crate::telemetry::RETENTION_ROWS;

/// Name of the setting.
const RETENTION: &str = "retention";
/// From one look at the tables to the next. They have at most what comes in meanwhile beyond what is kept.
const EVERY: Duration = Duration::from_secs(10);
/// Rows that one transaction deletes at most: milliseconds, and some hundred kilobytes of pages.
const BATCH: i64 = 500;
/// Pause between two such transactions. Even so, more rows go than can come in.
const GAP: Duration = Duration::from_millis(50);
/// One of so many rows of the audit may be of something that failed: whoever guesses passwords must not push out what
/// others did.
const FAILURES: u32 = 10;
/// Seconds of a day.
const DAY: i64 = 86_400;

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let path = "/settings/retention";
    let readers = Access::Roles(Role::READERS);
    let set = "Set how much of the audit and of the history of events is kept";
    vec![
        route(Method::GET, path, readers, "How much of the audit and of the history of events is kept", retention)
            .answer::<Retention>(),
        route(Method::POST, path, Access::Roles(Role::ADMINISTRATORS), set, set_retention)
            .changes("set", "settings/retention")
            .body::<Retention>(),
    ]
}

/// How much is kept. What a body leaves out gets its default; what is unknown is ignored, because a newer version may
/// have stored it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Retention {
    /// Rows of the audit; a tenth of them may be of what failed. A member whose program does not have this setting yet
    /// keeps the default when it is PRIMARY: raise it when all members have it.
    #[schemars(range(min = 10_000, max = 10_000_000))]
    audit_rows: u32,
    /// Days after which a row of the audit goes, by the clock of the PRIMARY's host; 0: never.
    #[schemars(range(max = 36_500))]
    audit_days: u32,
    /// Events in the history.
    #[schemars(range(min = 1_000, max = 1_000_000))]
    event_rows: u32,
    /// Days after which an event goes; 0: never.
    #[schemars(range(max = 36_500))]
    event_days: u32,
    /// Events of Defenders.
    #[schemars(range(min = 1_000, max = 10_000_000))]
    defender_event_rows: u32,
    /// Days after which an event of a Defender goes, counted from its arrival; 0: never.
    #[schemars(range(max = 36_500))]
    defender_event_days: u32,
}

impl Default for Retention {
    fn default() -> Self {
        let (defender_event_rows, defender_event_days) = (100_000, 0);
        let (audit_rows, audit_days, event_rows, event_days) = (100_000, 0, 10_000, 0);
        Self { audit_rows, audit_days, event_rows, event_days, defender_event_rows, defender_event_days }
    }
}

impl Retention {
    fn check(&self) -> Result<(), ApiError> {
        for (name, value, range) in [
            ("auditRows", self.audit_rows, 10_000..=10_000_000),
            ("auditDays", self.audit_days, 0..=36_500),
            ("eventRows", self.event_rows, 1_000..=1_000_000),
            ("eventDays", self.event_days, 0..=36_500),
            ("defenderEventRows", self.defender_event_rows, 1_000..=10_000_000),
            ("defenderEventDays", self.defender_event_days, 0..=36_500),
        ] {
            if !range.contains(&value) {
                return Err(ApiError::bad(format!("{name} must be {} to {}", range.start(), range.end())));
            }
        }
        Ok(())
    }

    /// What is deleted at this time, in seconds since 1970.
    fn rules(&self, now: i64) -> [Rule; 7] {
        let before = |days: u32| if days == 0 { i64::MIN } else { now - i64::from(days) * DAY };
        let rule = |table, count, delete, before, kept: u32| Rule { table, count, delete, before, kept: kept.into() };
        let (audits, events, of_defenders) = ("audits", "events", "defender_events");
        [
            rule(audits, OLD_AUDITS, DELETE_OLD_AUDITS, before(self.audit_days), 0),
            rule(audits, FAILED_AUDITS, DELETE_FAILED_AUDITS, 0, self.audit_rows / FAILURES),
            rule(audits, AUDITS, DELETE_AUDITS, 0, self.audit_rows),
            rule(events, OLD_EVENTS, DELETE_OLD_EVENTS, before(self.event_days).saturating_mul(1000), 0),
            rule(events, EVENTS, DELETE_EVENTS, 0, self.event_rows),
            rule(of_defenders, OLD_OF_DEFENDERS, DELETE_OLD_OF_DEFENDERS, before(self.defender_event_days), 0),
            rule(of_defenders, OF_DEFENDERS, DELETE_OF_DEFENDERS, 0, self.defender_event_rows),
        ]
    }
}

// How many rows a rule is about, and the deletion of the oldest of them. Parameters: 1 the time before which a row is
// too old, 2 the number of rows that go.
const OLD_AUDITS: &str = "SELECT count(*) FROM audits WHERE time < ?1";
const DELETE_OLD_AUDITS: &str =
    "DELETE FROM audits WHERE id IN (SELECT id FROM audits WHERE time < ?1 ORDER BY time LIMIT ?2)";
const FAILED_AUDITS: &str = "SELECT count(*) FROM audits WHERE ok = 0";
const DELETE_FAILED_AUDITS: &str =
    "DELETE FROM audits WHERE id IN (SELECT id FROM audits WHERE ok = 0 ORDER BY id LIMIT ?2)";
const AUDITS: &str = "SELECT count(*) FROM audits";
const DELETE_AUDITS: &str = "DELETE FROM audits WHERE id IN (SELECT id FROM audits ORDER BY id LIMIT ?2)";
const OLD_EVENTS: &str = "SELECT count(*) FROM events WHERE time < ?1";
const DELETE_OLD_EVENTS: &str =
    "DELETE FROM events WHERE id IN (SELECT id FROM events WHERE time < ?1 ORDER BY time, id LIMIT ?2)";
const EVENTS: &str = "SELECT count(*) FROM events";
const DELETE_EVENTS: &str = "DELETE FROM events WHERE id IN (SELECT id FROM events ORDER BY time, id LIMIT ?2)";
// They are stored in the order of their arrival. The number up to which all of a Defender's are stored is elsewhere.
const OLD_OF_DEFENDERS: &str = "SELECT count(*) FROM defender_events WHERE received < ?1";
const DELETE_OLD_OF_DEFENDERS: &str = "DELETE FROM defender_events WHERE id IN \
    (SELECT id FROM defender_events WHERE received < ?1 ORDER BY id LIMIT ?2)";
const OF_DEFENDERS: &str = "SELECT count(*) FROM defender_events";
const DELETE_OF_DEFENDERS: &str =
    "DELETE FROM defender_events WHERE id IN (SELECT id FROM defender_events ORDER BY id LIMIT ?2)";

/// Of the rows that `count` counts, the newest `kept` stay.
struct Rule {
    table: &'static str,
    count: &'static str,
    delete: &'static str,
    before: i64,
    kept: i64,
}

impl Rule {
    /// How many rows there are too many.
    async fn surplus(&self, store: &Store) -> Result<i64, StoreError> {
        let count: i64 = {
            let mut reading = store.read().await?;
            sqlx::query_scalar(self.count).bind(self.before).fetch_one(&mut *reading).await?
        };
        Ok(count - self.kept)
    }

    /// Deletes a few rows of the surplus. Returns how many.
    async fn delete(&self, store: &Store, surplus: i64) -> Result<i64, StoreError> {
        let delete = sqlx::query(self.delete).bind(self.before).bind(surplus.min(BATCH));
        let gone = store.write(delete).await?;
        metrics::counter!(RETENTION_ROWS, "table" => self.table).increment(gone);
        Ok(gone as i64)
    }

    /// Deletes the surplus. Returns how many rows that was.
    async fn enforce(&self, store: &Store) -> Result<i64, StoreError> {
        let surplus = self.surplus(store).await?;
        let mut gone = 0;
        while gone < surplus {
            match self.delete(store, surplus - gone).await? {
                0 => break,
                some => gone += some,
            }
            if gone < surplus {
                tokio::time::sleep(GAP).await;
            }
        }
        Ok(gone)
    }
}

/// Makes the indexes that are missing, and deletes what is not kept, until the store is closed.
pub(super) async fn run(store: Store) {
    let forever = async {
        let mut told = false;
        loop {
            if let Err(error) = async { store.supplement().await.and(store.index().await) }.await {
                tracing::debug!("a table or an index could not be made: {error}; trying again");
            }
            // Also before the first time: no takeover waits for this.
            tokio::time::sleep(EVERY).await;
            match shorten(&store, unix_time()).await {
                Ok(rows) if rows > 0 && !told => {
                    tracing::info!(rows, "old rows of the audit or of the events are deleted: see settings/retention");
                    told = true;
                }
                Ok(_) => {}
                Err(error) => tracing::debug!("old rows could not be deleted: {error}; trying again"),
            }
        }
    };
    tokio::select! {
        () = store.closing() => {}
        () = forever => {}
    }
}

/// Deletes what is not kept. Returns how many rows that was.
async fn shorten(store: &Store, now: i64) -> Result<i64, StoreError> {
    let kept: Retention = store.setting(RETENTION).await?.unwrap_or_default();
    let mut gone = 0;
    for rule in kept.rules(now) {
        gone += rule.enforce(store).await?;
    }
    Ok(gone)
}

/// `GET settings/retention`.
async fn retention(State(console): State<Arc<Console>>) -> Result<Json<Retention>, ApiError> {
    Ok(Json(console.store.setting(RETENTION).await?.unwrap_or_default()))
}

/// `POST settings/retention`: what is not kept any more goes within seconds.
async fn set_retention(
    State(console): State<Arc<Console>>,
    user: User,
    Body(wanted): Body<Retention>,
) -> Result<(), ApiError> {
    wanted.check()?;
    let mut writing = console.store.begin().await?;
    let before: Retention = writing.setting(RETENTION).await?.unwrap_or_default();
    writing.set_setting(RETENTION, &wanted).await?;
    let difference = audit_log::difference(&before, &wanted);
    audit_log::record(&mut writing, &user, "set", "settings/retention", difference).await?;
    Ok(writing.commit().await?)
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use serde_json::{Value, json};

    use super::{super::test_console::TestConsole, *};

    const NOW: i64 = 1_800_000_000;
    const PATH: &str = "/api/v1/settings/retention";

    /// As many rows, the last one just now and each one a day after the one before.
    async fn fill(test: &TestConsole, audits: i64, events: i64) {
        let store = &test.console.store;
        let numbers = "WITH RECURSIVE n (i) AS (SELECT ?1 - 1 UNION ALL SELECT i - 1 FROM n WHERE i > 0)";
        let rows = format!(
            "{numbers} INSERT INTO audits (time, user, source, action, what, ok, difference) \
             SELECT {NOW} - i * {DAY}, 'ann', 'here', 'create', i, 1, 'null' FROM n LIMIT ?1"
        );
        store.write(sqlx::query(sqlx::AssertSqlSafe(rows)).bind(audits)).await.unwrap();
        let rows = format!(
            "{numbers} INSERT INTO events SELECT printf('%09d', {NOW} - i), ({NOW} - i * {DAY}) * 1000, 'test', i FROM n LIMIT ?1"
        );
        store.write(sqlx::query(sqlx::AssertSqlSafe(rows)).bind(events)).await.unwrap();
    }

    async fn started(audits: i64, events: i64) -> TestConsole {
        let test = TestConsole::start().await;
        // Not the row of the first administrator.
        test.console.store.write(sqlx::query("DELETE FROM audits")).await.unwrap();
        fill(&test, audits, events).await;
        test
    }

    async fn number(test: &TestConsole, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&mut *test.console.store.read().await.unwrap()).await.unwrap()
    }

    /// Carries out the rules, whatever is set.
    async fn enforce(test: &TestConsole, kept: Retention) -> Vec<i64> {
        let mut gone = Vec::new();
        for rule in kept.rules(NOW) {
            gone.push(rule.enforce(&test.console.store).await.unwrap());
        }
        gone
    }

    #[tokio::test]
    async fn the_oldest_rows_go_when_there_are_too_many() {
        let test = started(30, 40).await;
        let kept = Retention { audit_rows: 20, event_rows: 15, ..Retention::default() };
        assert_eq!(enforce(&test, kept.clone()).await, [0, 0, 10, 0, 25, 0, 0]);
        assert_eq!(number(&test, "SELECT max(CAST(what AS INTEGER)) FROM audits").await, 19);
        assert_eq!(number(&test, "SELECT max(CAST(event AS INTEGER)) FROM events").await, 14);
        assert_eq!(enforce(&test, kept).await, [0; 7], "nothing is left to do");
    }

    #[tokio::test]
    async fn rows_go_when_they_are_too_old() {
        let test = started(30, 40).await;
        assert_eq!(enforce(&test, Retention::default()).await, [0; 7], "by default no row is too old");
        let kept = Retention { audit_days: 7, event_days: 9, ..Retention::default() };
        assert_eq!(enforce(&test, kept).await, [22, 0, 0, 30, 0, 0, 0]);
        assert_eq!(number(&test, "SELECT max(CAST(what AS INTEGER)) FROM audits").await, 7);
        assert_eq!(number(&test, "SELECT max(CAST(event AS INTEGER)) FROM events").await, 9);
    }

    #[tokio::test]
    async fn failures_push_out_nothing_but_failures() {
        let test = started(30, 0).await;
        fill(&test, 300, 0).await;
        test.console.store.write(sqlx::query("UPDATE audits SET ok = 0 WHERE id > 30")).await.unwrap();
        let kept = Retention { audit_rows: 100, ..Retention::default() };
        assert_eq!(enforce(&test, kept).await, [0, 290, 0, 0, 0, 0, 0]);
        assert_eq!(number(&test, "SELECT count(*) FROM audits WHERE ok = 1").await, 30);
        assert_eq!(number(&test, "SELECT min(id) FROM audits WHERE ok = 0").await, 321, "the newest failures stay");
    }

    /// Writers wait for no more than one of them.
    #[tokio::test]
    async fn one_transaction_deletes_a_few_rows() {
        let test = started(2 * BATCH + 10, 2 * BATCH + 10).await;
        let kept = Retention { audit_rows: 5, audit_days: 1, event_rows: 5, event_days: 1, ..Retention::default() };
        for rule in kept
            .rules(NOW)
            .into_iter()
            .filter(|rule| ![FAILED_AUDITS, OLD_OF_DEFENDERS, OF_DEFENDERS].contains(&rule.count))
        {
            let surplus = rule.surplus(&test.console.store).await.unwrap();
            assert_eq!(rule.delete(&test.console.store, surplus).await.unwrap(), surplus.min(BATCH));
        }
        assert_eq!(enforce(&test, kept).await[..3], [8, 0, 0]);
    }

    #[tokio::test]
    async fn what_is_set_is_audited_and_counts() {
        let test = started(1, 1203).await;
        let admin = test.login().await;
        let ask = async |method, body| test.call(method, PATH, &admin, body).await;
        let usual = json!({ "auditRows": 100_000, "auditDays": 0, "eventRows": 10_000, "eventDays": 0,
            "defenderEventRows": 100_000, "defenderEventDays": 0 });
        assert_eq!(ask(Method::GET, Value::Null).await, (StatusCode::OK, usual));
        let (status, text) = ask(Method::POST, json!({ "auditRows": 9_999 })).await;
        assert_eq!((status, &text["err"]), (StatusCode::BAD_REQUEST, &json!("auditRows must be 10000 to 10000000")));
        let wanted = json!({ "auditRows": 1_000_000, "auditDays": 0, "eventRows": 1000, "eventDays": 0,
            "defenderEventRows": 1_000, "defenderEventDays": 7 });
        assert_eq!(ask(Method::POST, wanted.clone()).await.0, StatusCode::OK);
        assert_eq!(ask(Method::GET, Value::Null).await.1, wanted);
        let (_, rows) = test.call(Method::GET, "/api/v1/audits/mgmt?limit=1", &admin, Value::Null).await;
        let rows = rows.as_array().unwrap();
        assert_eq!((&rows[0]["action"], &rows[0]["what"]), (&json!("set"), &json!("settings/retention")));
        assert_eq!(rows[0]["difference"]["eventRows"], json!({ "old": 10_000, "new": 1000 }));
        shorten(&test.console.store, NOW).await.unwrap();
        assert_eq!(number(&test, "SELECT count(*) FROM events").await, 1000);
    }
}
