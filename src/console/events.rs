//! `high-availability/events`: the history of the cluster in the replicated database. Writes what this PRIMARY records,
//! and lets it be read. Must never hold up the opening of the ports or what it records.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State, http::Method};
use tokio::task;

use super::{
    Console, ConsoleServices,
    errors::ApiError,
    extract::{Paged, Search},
    route::{Access, Entry, route},
    store::{Store, StoreError},
};
use crate::events::{self, Event, Recorder, Wanted};

/// Events that are kept; the oldest go first.
const KEPT: i64 = 10_000;
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
    let old = "DELETE FROM events WHERE id IN (SELECT id FROM events ORDER BY time DESC, id DESC LIMIT -1 OFFSET ?)";
    writing.execute(sqlx::query(old).bind(KEPT)).await?;
    writing.commit().await
}

/// `GET high-availability/events?limit&offset&kind&since`.
async fn list(State(console): State<Arc<Console>>, Search(wanted): Search<Wanted>) -> Result<Paged<Event>, ApiError> {
    let (limit, offset) = wanted.page().map_err(ApiError::bad)?;
    let kind = wanted.kind.map(|kind| kind.word());
    let since = wanted.since.map_or(i64::MIN, |since| since.as_millisecond());
    let mut reading = console.store.read().await?;
    let count = "SELECT count(*) FROM events WHERE time >= ? AND (? IS NULL OR kind = ?)";
    let count = sqlx::query_scalar(count).bind(since).bind(kind).bind(kind);
    let total = count.fetch_one(&mut *reading).await.map_err(StoreError::from)?;
    let sql = "SELECT event FROM events WHERE time >= ? AND (? IS NULL OR kind = ?) \
               ORDER BY time DESC, id DESC LIMIT ? OFFSET ?";
    let query = sqlx::query_scalar::<_, String>(sql).bind(since).bind(kind).bind(kind).bind(limit).bind(offset);
    let rows = query.fetch_all(&mut *reading).await.map_err(StoreError::from)?;
    // One that a newer version wrote and this one does not understand is left out.
    Ok(Paged { rows: rows.iter().filter_map(|text| serde_json::from_str(text).ok()).collect(), total })
}

/// The events on the control socket: what happened to this node, from its own file.
async fn of_this_host(
    State(services): State<ConsoleServices>,
    Search(wanted): Search<Wanted>,
) -> Result<Json<Vec<Event>>, ApiError> {
    let read = task::spawn_blocking(move || events::read(&services.data, &wanted)).await;
    let read = read.map_err(|error| ApiError::Unknown(error.to_string()))?;
    read.map(Json).map_err(|error| ApiError::Conflict(format!("the events cannot be read: {error}")))
}
