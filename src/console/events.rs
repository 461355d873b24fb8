//! `high-availability/events`: the history of the cluster in the replicated database. Writes what this PRIMARY records,
//! and lets it be read. Must never hold up the opening of the ports or what it records.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    http::Method,
    response::{IntoResponse, Response},
};
use tokio::task;

use super::{
    Console, ConsoleServices,
    errors::ApiError,
    extract::Search,
    paging::{Start, Statements, page_headers},
    route::{Access, Entry, route},
    store::{Store, StoreError},
};
use crate::events::{self, Event, Recorder, Wanted};

/// Time from an event to its writing. While all three nodes are stopped one after the other, the last one would
/// otherwise write that the others are gone, and leave a transaction behind that nobody acknowledges any more.
const SETTLE: Duration = Duration::from_secs(1);
/// Pause after a failed write.
const PAUSE: Duration = Duration::from_secs(2);

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let summary = "What happened to the cluster, newest first";
    vec![
        route(Method::GET, "/high-availability/events", Access::Any, summary, list)
            .here(of_this_host)
            .query::<Wanted>()
            .paged()
            .answer::<Vec<Event>>(),
    ]
}

/// Writes events into the history until the Console is closed. What could not be written by then stays with the
/// recorder, and is written when this node is PRIMARY again.
pub(super) async fn write_history(store: Store, recorder: Recorder) {
    let write = async {
        loop {
            recorder.pending_events().await;
            tokio::time::sleep(SETTLE).await;
            let events = recorder.pending_events().await;
            match write(&store, &events).await {
                Ok(()) => recorder.stored(&events),
                Err(error) => {
                    tracing::debug!("events could not be written into the history: {error}; trying again");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = store.closing() => {}
        () = write => {}
    }
}

async fn write(store: &Store, events: &[Event]) -> Result<(), StoreError> {
    let mut writing = store.begin().await?;
    for event in events {
        let text = serde_json::to_string(event).unwrap_or_default(); // has no maps with keys that JSON lacks
        // An earlier attempt whose outcome was unknown may have got through.
        let insert = sqlx::query("INSERT OR IGNORE INTO events (id, time, kind, event) VALUES (?, ?, ?, ?)");
        let insert = insert.bind(event.id.clone()).bind(event.time.as_millisecond()).bind(event.kind.word());
        writing.execute(insert.bind(text)).await?;
    }
    writing.commit().await
}

/// What an event is found again by: its time in milliseconds and its id.
type Key = (i64, String);

/// Parameters of both: 1 kind, 2 since, 3 and 4 the key of the event before the page, 5 and 6 limit and offset.
macro_rules! statements {
    ($filter:literal) => {
        Statements {
            // Inside, only an index is read: what is passed over is not looked up in the table.
            page: concat!(
                "SELECT time, id, event FROM events WHERE id IN (SELECT id FROM events WHERE ",
                $filter,
                " AND (time, id) < (?3, ?4) ORDER BY time DESC, id DESC LIMIT +?5 OFFSET ?6)",
                " ORDER BY time DESC, id DESC"
            ),
            count: concat!("SELECT count(*) FROM events WHERE ", $filter),
        }
    };
}

pub(super) const ALL: Statements = statements!("time >= ?2");
pub(super) const OF_KIND: Statements = statements!("kind = ?1 AND time >= ?2");

/// `GET high-availability/events?limit&offset&cursor&kind&since`.
async fn list(State(console): State<Arc<Console>>, Search(wanted): Search<Wanted>) -> Result<Response, ApiError> {
    let (limit, _) = wanted.page().map_err(ApiError::bad)?;
    let start = Start::<Key>::of(wanted.cursor.as_deref(), wanted.offset)?;
    let statements = if wanted.kind.is_some() { OF_KIND } else { ALL };
    let kind = wanted.kind.map(|kind| kind.word());
    let since = wanted.since.map_or(i64::MIN, |since| since.as_millisecond());
    let mut reading = console.store.read().await?;
    let mut total = None;
    if start.is_counted() {
        let count = sqlx::query_scalar(statements.count).bind(kind).bind(since);
        total = Some(count.fetch_one(&mut *reading).await.map_err(StoreError::from)?);
    }
    let ((time, id), offset) = start.bounds((i64::MAX, String::new()));
    let query = sqlx::query_as(statements.page).bind(kind).bind(since).bind(time).bind(id);
    let query = query.bind(limit + 1).bind(offset);
    let mut rows: Vec<(i64, String, String)> = query.fetch_all(&mut *reading).await.map_err(StoreError::from)?;
    let headers = page_headers(&mut rows, limit, total, |(time, id, _)| (*time, id.clone()));
    // Of one that a newer version wrote, the words are kept; what is no event at all is left out.
    let events: Vec<Event> = rows.iter().filter_map(|(.., text)| serde_json::from_str(text).ok()).collect();
    Ok((headers, Json(events)).into_response())
}

/// The events on the control socket: what happened to this node, from its own file.
async fn of_this_host(
    State(services): State<ConsoleServices>,
    Search(wanted): Search<Wanted>,
) -> Result<Json<Vec<Event>>, ApiError> {
    if wanted.cursor.is_some() {
        return Err(ApiError::bad("the events of one host have no cursors: say an offset"));
    }
    let read = task::spawn_blocking(move || events::read(&services.data, &wanted)).await;
    let read = read.map_err(|error| ApiError::Unknown(error.to_string()))?;
    read.map(Json).map_err(|error| ApiError::Conflict(format!("the events cannot be read: {error}")))
}
