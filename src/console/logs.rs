//! `logs/console`: the last lines of this process's log.

use axum::{Json, http::Method};
use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    errors::ApiError,
    extract::Search,
    route::{Access, Entry, route},
    user::Role,
};
use crate::telemetry::{self, Line, RECENT_LINES};

/// Lines if the client does not say.
const LINES: usize = 200;

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let summary = "The last lines of this node's log, the oldest first";
    vec![
        route(Method::GET, "/logs/console", Access::Roles(Role::AUDITORS), summary, console)
            .query::<Wanted>()
            .answer::<Vec<Line>>(),
    ]
}

/// How many lines are wanted.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Wanted {
    /// At most this many lines; 200 if not given.
    #[schemars(range(min = 1, max = 2000))]
    lines: Option<u32>,
}

/// `GET logs/console`.
async fn console(Search(wanted): Search<Wanted>) -> Result<Json<Vec<Line>>, ApiError> {
    let lines = wanted.lines.map_or(LINES, |lines| lines as usize);
    if !(1..=RECENT_LINES).contains(&lines) {
        return Err(ApiError::bad(format!("lines must be 1 to {RECENT_LINES}")));
    }
    Ok(Json(telemetry::recent(lines)))
}
