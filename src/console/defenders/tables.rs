//! What the database has of Defenders and their events, and the one transaction that stores events. Must never store an
//! event twice, and never tell of a number before a majority has it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value;
use sqlx::{FromRow, Row as _, sqlite::SqliteRow};

use crate::{
    console::{
        clock::unix_time,
        store::{Store, StoreError, Writing},
    },
    defender::wire::{Facts, Numbered},
};

/// The most Defenders that are kept, and the most invitations in force.
pub(super) const DEFENDERS: i64 = 20_000;
const TOKENS: i64 = 64;

/// What is known of one Defender.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Defender {
    /// By which its events name it.
    pub(super) number: i64,
    pub(super) id: String,
    pub(super) name: String,
    pub(super) facts: Facts,
    pub(super) version: String,
    /// In seconds since 1970, as all that follow.
    pub(super) registered: i64,
    pub(super) modified: i64,
    pub(super) seen: i64,
    pub(super) expires: i64,
    /// All of its events up to this number are stored.
    pub(super) stored: u64,
    /// When the last of them happened, in milliseconds since 1970: what tells it from another one with its number.
    pub(super) stored_time: u64,
    /// It may not connect.
    pub(super) withdrawn: bool,
    /// It may be registered again: nobody has withdrawn it, it was away for too long.
    pub(super) removed: bool,
}

/// What `withdrawn` says of a Defender that was removed. An older program takes it for one that was withdrawn.
pub(super) const REMOVED: i64 = 2;

impl Defender {
    /// Why it may not connect.
    pub(super) fn refusal(&self) -> Option<&'static str> {
        match (self.withdrawn, self.removed) {
            (false, _) => None,
            (true, false) => Some("this Defender is withdrawn: it needs another key"),
            (true, true) => {
                Some("this Defender was removed because it had been away for too long: register this host again")
            }
        }
    }
}

impl FromRow<'_, SqliteRow> for Defender {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        let facts: String = row.try_get("facts")?;
        Ok(Self {
            number: row.try_get("number")?,
            id: row.try_get("id")?,
            name: row.try_get("name")?,
            facts: serde_json::from_str(&facts).unwrap_or_default(),
            version: row.try_get("version")?,
            registered: row.try_get("registered")?,
            modified: row.try_get("modified")?,
            seen: row.try_get("seen")?,
            expires: row.try_get("expires")?,
            stored: u64::try_from(row.try_get::<i64, _>("stored")?).unwrap_or(0),
            stored_time: u64::try_from(row.try_get::<i64, _>("stored_time")?).unwrap_or(0),
            withdrawn: row.try_get("withdrawn")?,
            removed: row.try_get::<i64, _>("withdrawn")? == REMOVED,
        })
    }
}

/// A Defender in a list.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Listed {
    pub(super) defender: Defender,
    /// It has been away for too long.
    pub(super) alerted: bool,
}

impl FromRow<'_, SqliteRow> for Listed {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Self { defender: Defender::from_row(row)?, alerted: row.try_get("alerted")? })
    }
}

/// The Defender with this id.
///
/// # Errors
/// Those of a read.
pub(super) async fn find(store: &Store, id: &str) -> Result<Option<Defender>, StoreError> {
    let query = sqlx::query_as("SELECT * FROM defenders WHERE id = ?").bind(id.to_owned());
    Ok(query.fetch_optional(&mut *store.read().await?).await?)
}

/// The Defenders with these ids, in any order, without those that are not there.
///
/// # Errors
/// Those of a read.
pub(super) async fn find_all(store: &Store, ids: &[&str]) -> Result<Vec<Defender>, StoreError> {
    let query = sqlx::query_as("SELECT * FROM defenders WHERE id IN (SELECT value FROM json_each(?))");
    Ok(query.bind(json(ids)).fetch_all(&mut *store.read().await?).await?)
}

/// The Defender whose key has this fingerprint.
///
/// # Errors
/// Those of a read.
pub(super) async fn with_key(store: &Store, key: &str) -> Result<Option<Defender>, StoreError> {
    let query = sqlx::query_as("SELECT * FROM defenders WHERE key = ?").bind(key.to_owned());
    Ok(query.fetch_optional(&mut *store.read().await?).await?)
}

/// An invitation that is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::console) struct Invited {
    /// Who made it.
    pub(in crate::console) by: String,
    /// In seconds since 1970.
    pub(in crate::console) until: i64,
}

/// The invitation with this digest, if it is in force.
///
/// # Errors
/// Those of a read.
pub(super) async fn invitation(store: &Store, digest: &str) -> Result<Option<Invited>, StoreError> {
    let query = sqlx::query_as("SELECT by, until FROM defender_tokens WHERE digest = ? AND until > ?");
    let found = query.bind(digest.to_owned()).bind(unix_time()).fetch_optional(&mut *store.read().await?).await?;
    Ok(found.map(|(by, until)| Invited { by, until }))
}

/// Keeps an invitation. Those that have ended go, and the one that ends first when there are too many.
///
/// # Errors
/// As those of [`Writing::execute`].
pub(super) async fn invite(writing: &mut Writing, digest: &str, until: i64, by: &str) -> Result<(), StoreError> {
    writing.execute(sqlx::query("DELETE FROM defender_tokens WHERE until <= ?").bind(unix_time())).await?;
    let surplus = "DELETE FROM defender_tokens WHERE digest IN \
                   (SELECT digest FROM defender_tokens ORDER BY until DESC LIMIT -1 OFFSET ?)";
    writing.execute(sqlx::query(surplus).bind(TOKENS - 1)).await?;
    let insert = sqlx::query("INSERT INTO defender_tokens (digest, until, by) VALUES (?, ?, ?)");
    writing.execute(insert.bind(digest.to_owned()).bind(until).bind(by.to_owned())).await.map(|_| ())
}

/// Keeps what a Defender said when it connected. Seconds count for little: what is seldom new is seldom written.
///
/// # Errors
/// As those of [`Store::write`].
pub(super) async fn note(store: &Store, number: i64, version: &str, facts: &Facts) -> Result<(), StoreError> {
    let facts = json(facts);
    let update = sqlx::query("UPDATE defenders SET version = ?, facts = ?, seen = ?, modified = ? WHERE number = ?");
    let now = unix_time();
    let update = update.bind(version.to_owned()).bind(facts).bind(now).bind(now).bind(number);
    store.write(update).await.map(|_| ())
}

/// An event as it is kept until it is stored: its text takes as much memory as it took on the wire, while its parts
/// could take many times that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Told {
    pub(super) sequence: u64,
    pub(super) time: u64,
    pub(super) kind: Box<str>,
    pub(super) event: Box<str>,
}

impl From<Numbered> for Told {
    fn from(Numbered { sequence, time, kind, event }: Numbered) -> Self {
        Self { sequence, time, kind: kind.into(), event: event.to_string().into() }
    }
}

/// What has come from one Defender, named by its number: events, their numbers ascending, or none, if it only is there.
pub(super) type Delivery = (i64, Vec<Told>);

/// An event for the statement that inserts it.
#[derive(Serialize)]
struct Row<'a> {
    defender: i64,
    #[serde(flatten)]
    event: &'a Told,
}

/// Stores, in one transaction, those of the events that are not stored yet, and notes that their Defenders are there.
/// Returns for each delivery the number up to which all are stored; none if the Defender is not known (any more).
///
/// # Errors
/// See [`StoreError`]: nothing of all of them was stored, or nobody knows whether it was.
pub(super) async fn store_all(store: &Store, deliveries: &[Delivery]) -> Result<Vec<Option<u64>>, StoreError> {
    let mut writing = store.begin().await?;
    // Three statements for all: each way to the connection's thread costs more than a row.
    let numbers: BTreeSet<i64> = deliveries.iter().map(|(number, _)| *number).collect();
    let query = "SELECT json_group_array(json_array(number, stored)) FROM defenders \
                 WHERE withdrawn = 0 AND number IN (SELECT value FROM json_each(?))";
    let known: Option<String> = writing.value(sqlx::query_scalar(query).bind(json(&numbers))).await?;
    let known: Vec<(i64, i64)> = serde_json::from_str(&known.unwrap_or_default()).unwrap_or_default(); // made above
    // Up to which number each has stored its events, and when the last of these happened, if one of them is new.
    let mut progress: BTreeMap<i64, (u64, Option<u64>)> =
        known.into_iter().map(|(number, stored)| (number, (u64::try_from(stored).unwrap_or(0), None))).collect();
    let (mut rows, mut answers) = (Vec::new(), Vec::new());
    for (defender, events) in deliveries {
        let Some((stored, time)) = progress.get_mut(defender) else {
            answers.push(None);
            continue;
        };
        for event in events.iter().filter(|event| event.sequence > *stored).collect::<Vec<_>>() {
            (*stored, *time) = (event.sequence, Some(event.time));
            rows.push(Row { defender: *defender, event });
        }
        answers.push(Some(*stored));
    }
    let now = unix_time();
    if !rows.is_empty() {
        let insert = "INSERT INTO defender_events (defender, received, sequence, time, kind, event) \
                      SELECT value ->> 'defender', ?, value ->> 'sequence', value ->> 'time', value ->> 'kind', \
                      value ->> 'event' FROM json_each(?)";
        writing.execute(sqlx::query(insert).bind(now).bind(json(&rows))).await?;
    }
    if !progress.is_empty() {
        let update = "UPDATE defenders SET seen = ?, stored = coalesce(told.value ->> 1, stored), \
                      stored_time = coalesce(told.value ->> 2, stored_time) \
                      FROM json_each(?) AS told WHERE number = told.value ->> 0";
        let told: Vec<(i64, Option<u64>, Option<u64>)> =
            progress.iter().map(|(number, (stored, time))| (*number, time.map(|_| *stored), *time)).collect();
        writing.execute(sqlx::query(update).bind(now).bind(json(&told))).await?;
    }
    // Also when all were known: what this part has seen of the others in its transaction must be on a majority, too.
    writing.commit().await?;
    Ok(answers)
}

/// Strings, numbers and JSON: that cannot fail.
fn json<T: Serialize + ?Sized>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// As [`store_all`], for one Defender.
///
/// # Errors
/// See [`StoreError`].
#[cfg(test)]
pub(super) async fn store_events(store: &Store, number: i64, events: &[Numbered]) -> Result<Option<u64>, StoreError> {
    let events = events.iter().cloned().map(Told::from).collect();
    Ok(store_all(store, &[(number, events)]).await?.remove(0))
}

/// One event as it is listed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stored {
    pub(super) row: i64,
    pub(super) defender: String,
    pub(super) name: String,
    pub(super) sequence: i64,
    pub(super) time: i64,
    pub(super) received: i64,
    pub(super) kind: String,
    pub(super) event: Value,
}

impl FromRow<'_, SqliteRow> for Stored {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        let event: String = row.try_get("event")?;
        Ok(Self {
            row: row.try_get("row")?,
            defender: row.try_get("id")?,
            name: row.try_get("name")?,
            sequence: row.try_get("sequence")?,
            time: row.try_get("time")?,
            received: row.try_get("received")?,
            kind: row.try_get("kind")?,
            event: serde_json::from_str(&event).unwrap_or(Value::String(event)),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::console::test_console::TestConsole;

    fn event(sequence: u64) -> Numbered {
        let event = json!({ "path": "/a \"b\"", "n": sequence });
        Numbered { sequence, time: 1000 + sequence, kind: "file".to_owned(), event }
    }

    async fn known(test: &TestConsole) -> i64 {
        let insert = "INSERT INTO defenders (id, name, key, registered, modified, seen, expires) \
                      VALUES ('d', 'n', 'k', 1, 1, 1, 1), ('e', 'n', 'l', 1, 1, 1, 1), ('f', 'n', 'm', 1, 1, 1, 1)";
        test.console.store.write(sqlx::query(insert)).await.unwrap();
        find(&test.console.store, "d").await.unwrap().unwrap().number
    }

    #[tokio::test]
    async fn what_comes_again_is_stored_once() {
        let test = TestConsole::start().await;
        let (store, number) = (&test.console.store, known(&test).await);
        let send = async |range: std::ops::RangeInclusive<u64>| {
            let events: Vec<_> = range.map(event).collect();
            store_events(store, number, &events).await.unwrap()
        };
        assert_eq!(send(1..=3).await, Some(3));
        assert_eq!(send(1..=3).await, Some(3), "the acknowledgement got lost");
        assert_eq!(send(2..=5).await, Some(5));
        assert_eq!(send(9..=9).await, Some(9), "numbers may be left out");
        assert_eq!(store_events(store, number + 9, &[event(1)]).await.unwrap(), None);
        let rows: Vec<(i64, i64, String, String)> =
            sqlx::query_as("SELECT sequence, time, kind, event FROM defender_events ORDER BY id")
                .fetch_all(&mut *store.read().await.unwrap())
                .await
                .unwrap();
        let expected = |n: i64| (n, 1000 + n, "file".to_owned(), event(n as u64).event.to_string());
        let rows: Vec<_> = rows
            .into_iter()
            .map(|(a, b, c, d)| (a, b, c, serde_json::from_str::<Value>(&d).unwrap().to_string()))
            .collect();
        assert_eq!(rows, [1, 2, 3, 4, 5, 9].map(expected));
        let found = find(store, "d").await.unwrap().unwrap();
        assert_eq!((found.stored, found.stored_time), (9, 1009));
    }

    #[tokio::test]
    async fn those_of_many_defenders_are_one_transaction() {
        let test = TestConsole::start().await;
        let (store, number) = (&test.console.store, known(&test).await);
        let withdraw = "UPDATE defenders SET withdrawn = 1 WHERE id = 'f'";
        store.write(sqlx::query(withdraw)).await.unwrap();
        let events = |range: std::ops::RangeInclusive<u64>| range.map(event).map(Told::from).collect::<Vec<_>>();
        // One of them comes by two connections, one is only there, one is withdrawn, one was never known.
        let all = [
            (number, events(1..=3)),
            (number + 1, Vec::new()),
            (number, events(2..=4)),
            (number + 2, events(1..=1)),
            (number + 9, events(1..=1)),
        ];
        assert_eq!(store_all(store, &all).await.unwrap(), [Some(3), Some(0), Some(4), None, None]);
        let query = "SELECT count(*), count(DISTINCT sequence), count(DISTINCT defender) FROM defender_events";
        let counts: (i64, i64, i64) = sqlx::query_as(query).fetch_one(&mut *store.read().await.unwrap()).await.unwrap();
        assert_eq!(counts, (4, 4, 1));
        let of = async |id: &str| find(store, id).await.unwrap().unwrap();
        let (first, second, third) = (of("d").await, of("e").await, of("f").await);
        assert_eq!((first.stored, first.stored_time), (4, 1004));
        assert_eq!((second.stored, second.stored_time), (0, 0));
        assert!(first.seen > 1 && second.seen > 1 && third.seen == 1);
    }

    /// As two connections of one Defender would, of which the older one has not noticed yet that it is dead.
    #[tokio::test]
    async fn the_same_events_at_the_same_time_are_stored_once() {
        let test = TestConsole::start().await;
        let (store, number) = (test.console.store.clone(), known(&test).await);
        let events: Vec<_> = (1..=50).map(event).collect();
        let mut all = tokio::task::JoinSet::new();
        for end in (5..=50).step_by(5).chain((5..=50).rev().step_by(5)) {
            let (store, events) = (store.clone(), events[..end].to_vec());
            all.spawn(async move { (end as u64, store_events(&store, number, &events).await.unwrap()) });
        }
        while let Some(done) = all.join_next().await {
            let (end, stored) = done.unwrap();
            assert!(stored >= Some(end), "{end} {stored:?}");
        }
        let query = "SELECT count(*), count(DISTINCT sequence), max(sequence) FROM defender_events";
        let counts: (i64, i64, i64) = sqlx::query_as(query).fetch_one(&mut *store.read().await.unwrap()).await.unwrap();
        assert_eq!(counts, (50, 50, 50));
    }
}
