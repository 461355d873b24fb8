//! `defenders/events`: what Defenders have told, as it is listed. Must never read more than a page for one.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::Method,
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tables::{self, Stored};
use crate::console::{
    Console,
    errors::ApiError,
    extract::Search,
    paging::{Page, Start, Statements, page_headers},
    route::{Access, Entry, route},
    store::StoreError,
};

/// The kind of most events.
const FILE: &str = "file";

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    vec![
        route(Method::GET, "/defenders/events", Access::Any, "What Defenders have told, the newest first", events)
            .query::<Wanted>()
            .paged()
            .answer::<Vec<Shown>>(),
    ]
}

/// Which events are wanted.
#[derive(Debug, Deserialize, JsonSchema)]
struct Wanted {
    /// At most this many rows; 50 if not given.
    #[schemars(range(min = 1, max = 1000))]
    limit: Option<u32>,
    /// This many newer rows are skipped.
    offset: Option<u32>,
    /// Instead of an offset: the `X-Next-Cursor` of the page before, or `first`.
    cursor: Option<String>,
    /// Only those of the Defender with this id.
    defender: Option<String>,
    /// Only those of this kind, such as `file`, or `others`: all but `file`.
    kind: Option<String>,
}

/// An event as it is shown.
#[derive(Debug, Serialize, JsonSchema)]
struct Shown {
    /// The id of its Defender, and how that is called.
    defender: String,
    name: String,
    /// Its number among the events of its Defender.
    sequence: i64,
    /// When it happened by the clock of its host, in milliseconds since 1970.
    time: i64,
    /// When it was stored, in seconds since 1970.
    received: i64,
    kind: String,
    /// All that the Defender told.
    event: Value,
}

/// What an event is found again by. Those of all are listed as they were stored, so that one that comes late is not
/// missed; those of one Defender by their numbers, which ascend as they are stored, and for which there is an index.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum Key {
    Row(i64),
    /// The Defender's number, and that of its event.
    Of(i64, i64),
}

/// Parameters: 1 the Defender's number, 2 the row or number before the page, 3 and 4 limit and offset, 5 the kind. The
/// indexes are chosen by the text of the condition.
macro_rules! statements {
    ($of:literal by $key:literal) => {
        Statements {
            page: concat!(
                "SELECT e.id AS row, d.id, d.name, e.sequence, e.time, e.received, e.kind, e.event \
                 FROM defender_events e JOIN defenders d ON d.number = e.defender WHERE ",
                $of,
                " AND ",
                $key,
                " < ?2 ORDER BY ",
                $key,
                " DESC LIMIT +?3 OFFSET ?4"
            ),
            count: concat!("SELECT count(*) FROM defender_events e WHERE ", $of),
        }
    };
}

/// The statements for these wishes: of one Defender, of a kind.
fn statements(of_one: bool, kind: Option<&str>) -> Statements {
    match (of_one, kind) {
        (false, None) => statements!("?1 IS ?1 AND ?5 IS ?5" by "e.id"),
        (true, None) => statements!("e.defender = ?1 AND ?5 IS ?5" by "e.sequence"),
        (false, Some(FILE)) => statements!("?1 IS ?1 AND e.kind = ?5" by "e.id"),
        (false, Some("others")) => statements!("?1 IS ?1 AND ?5 IS ?5 AND e.kind <> 'file'" by "e.id"),
        (false, Some(_)) => statements!("?1 IS ?1 AND e.kind = ?5 AND e.kind <> 'file'" by "e.id"),
        (true, Some("others")) => statements!("e.defender = ?1 AND ?5 IS ?5 AND e.kind <> 'file'" by "e.sequence"),
        (true, Some(_)) => statements!("e.defender = ?1 AND e.kind = ?5" by "e.sequence"),
    }
}

/// `GET defenders/events`.
async fn events(State(console): State<Arc<Console>>, Search(wanted): Search<Wanted>) -> Result<Response, ApiError> {
    let (limit, _) = Page { limit: wanted.limit, offset: None }.bounds()?;
    let start = Start::<Key>::of(wanted.cursor.as_deref(), wanted.offset)?;
    let number = match &wanted.defender {
        Some(id) => {
            let found = tables::find(&console.store, id).await?;
            Some(found.ok_or_else(|| ApiError::NotFound(format!("there is no Defender '{id}'")))?.number)
        }
        None => None,
    };
    let statements = statements(number.is_some(), wanted.kind.as_deref());
    let mut reading = console.store.read().await?;
    let mut total = None;
    if start.is_counted() {
        // The same parameters: those that the text does not name in between are there all the same.
        let count = sqlx::query_scalar(statements.count).bind(number).bind(0).bind(0).bind(0).bind(wanted.kind.clone());
        total = Some(count.fetch_one(&mut *reading).await.map_err(StoreError::from)?);
    }
    let top = number.map_or(Key::Row(i64::MAX), |number| Key::Of(number, i64::MAX));
    let (before, offset) = start.bounds(top);
    let before = match (number, before) {
        (None, Key::Row(before)) => before,
        (Some(number), Key::Of(of, before)) if of == number => before,
        _ => return Err(ApiError::bad("this list has no such cursor: begin again at 'first'")),
    };
    let query = sqlx::query_as(statements.page).bind(number).bind(before).bind(limit + 1).bind(offset);
    let query = query.bind(wanted.kind);
    let mut rows: Vec<Stored> = query.fetch_all(&mut *reading).await.map_err(StoreError::from)?;
    let key = |row: &Stored| number.map_or(Key::Row(row.row), |number| Key::Of(number, row.sequence));
    let headers = page_headers(&mut rows, limit, total, key);
    let shown = |Stored { defender, name, sequence, time, received, kind, event, .. }| Shown {
        defender,
        name,
        sequence,
        time,
        received,
        kind,
        event,
    };
    let rows: Vec<Shown> = rows.into_iter().map(shown).collect();
    Ok((headers, Json(rows)).into_response())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{console::test_console::TestConsole, defender::wire::Numbered};

    #[tokio::test]
    async fn events_are_found_by_defender_and_by_kind() {
        let test = TestConsole::start().await;
        let admin = test.login().await;
        for id in ["a", "b"] {
            let insert = "INSERT INTO defenders (id, name, key, registered, modified, seen, expires) \
                          VALUES (?1, ?1, ?1, 1, 2, 3, 4)";
            test.console.store.write(sqlx::query(insert).bind(id)).await.unwrap();
        }
        for number in [1, 2] {
            let event = |(sequence, kind): (u64, &str)| Numbered {
                sequence,
                time: 5,
                kind: kind.to_owned(),
                event: json!({ "n": sequence }),
            };
            let events: Vec<_> = [(1, "file"), (2, "dropped"), (3, "file"), (4, "setBack")].map(event).to_vec();
            tables::store_events(&test.console.store, number, &events).await.unwrap();
        }
        // As it is found when the index is there.
        test.console.store.index().await.unwrap();
        for (query, expected) in [
            ("", vec!["b4", "b3", "b2", "b1", "a4", "a3", "a2", "a1"]),
            ("defender=a", vec!["a4", "a3", "a2", "a1"]),
            ("kind=file", vec!["b3", "b1", "a3", "a1"]),
            ("kind=dropped", vec!["b2", "a2"]),
            ("kind=others", vec!["b4", "b2", "a4", "a2"]),
            ("defender=a&kind=file", vec!["a3", "a1"]),
            ("defender=b&kind=others", vec!["b4", "b2"]),
            ("defender=b&kind=none", vec![]),
        ] {
            let (mut cursor, mut found) = ("first".to_owned(), Vec::new());
            loop {
                let path = format!("/api/v1/defenders/events?{query}&limit=3");
                let request = |path: String| {
                    let request = axum::extract::Request::builder().uri(path).header("authorization", &admin);
                    request.body(axum::body::Body::empty()).unwrap()
                };
                let (status, headers, text) = test.send(request(format!("{path}&cursor={cursor}"))).await;
                assert_eq!(status, 200, "{query}: {text}");
                let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
                let (_, counted, _) = test.send(request(path)).await;
                assert_eq!(counted["x-total-count"].to_str().unwrap(), expected.len().to_string(), "{query}");
                found.extend(rows.iter().map(|row| format!("{}{}", row["name"].as_str().unwrap(), row["sequence"])));
                match headers.get("x-next-cursor") {
                    Some(next) => cursor = next.to_str().unwrap().to_owned(),
                    None => break,
                }
            }
            assert_eq!(found, expected, "{query}");
        }
        // A cursor leads on in the list that it is of.
        let page = async |query: &str| {
            let request = axum::extract::Request::builder().uri(format!("/api/v1/defenders/events?{query}"));
            let request = request.header("authorization", &admin).body(axum::body::Body::empty()).unwrap();
            let (status, headers, _) = test.send(request).await;
            (status, headers.get("x-next-cursor").map(|next| next.to_str().unwrap().to_owned()))
        };
        for (list, others) in [("limit=1&defender=a", ["defender=b", "kind=file"]), ("limit=1", ["defender=a"; 2])] {
            let (_, next) = page(&format!("{list}&cursor=first")).await;
            let next = next.unwrap();
            assert_eq!(page(&format!("{list}&cursor={next}")).await.0, 200);
            for other in others {
                assert_eq!(page(&format!("{other}&cursor={next}")).await.0, 400, "{list} {other}");
            }
        }
        // A page is found by an index, and what is behind it is not read to sort it.
        for (of_one, kind, index) in [
            (false, Some("dropped"), "defender_events_but_files"),
            (false, None, "INTEGER PRIMARY KEY (rowid<?)"),
            (true, None, "(defender=? AND sequence<?)"),
            (true, Some("file"), "(defender=? AND sequence<?)"),
        ] {
            let plan = format!("EXPLAIN QUERY PLAN {}", statements(of_one, kind).page);
            let plan: Vec<(i64, i64, i64, String)> = sqlx::query_as(sqlx::AssertSqlSafe(plan))
                .fetch_all(&mut *test.console.store.read().await.unwrap())
                .await
                .unwrap();
            let steps: Vec<String> = plan.into_iter().map(|step| step.3).collect();
            assert!(steps.iter().any(|step| step.contains(index)), "{of_one} {kind:?}: {steps:?}");
            assert!(!steps.iter().any(|step| step.contains("TEMP B-TREE")), "{of_one} {kind:?}: {steps:?}");
        }
    }
}
