//! `audits/mgmt`: who did what, when and from where, as JSON or for a spreadsheet. Must never write into the table: see
//! [`super::audit_log`].

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{HeaderValue, Method, header},
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sqlx::{FromRow, Row as _, sqlite::SqliteRow};

use super::{
    Console,
    errors::ApiError,
    extract::Search,
    paging::{Page, Start, Statements, page_headers},
    route::{Access, Entry, route},
    store::StoreError,
    user::Role,
};
use crate::admin::audit::RECORD;

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let summary = "Who did what, the newest first";
    vec![
        route(Method::GET, "/audits/mgmt", Access::Roles(Role::AUDITORS), summary, list)
            .query::<Wanted>()
            .paged()
            .answer::<Vec<Audit>>()
            .also("text/csv"),
    ]
}

/// Which rows are wanted, and in which format.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Wanted {
    /// At most this many rows; 50 if not given.
    #[schemars(range(min = 1, max = 1000))]
    limit: Option<u32>,
    /// This many newer rows are skipped.
    offset: Option<u32>,
    /// Instead of an offset: the `X-Next-Cursor` of the page before, or `first`. The answer comes as fast for the last
    /// page as for the first, and has no `X-Total-Count`.
    cursor: Option<String>,
    /// Only what this user did. The rows are sorted by their time then.
    user: Option<String>,
    /// Only what happened then or later, in seconds since 1970. The rows are sorted by their time then.
    since: Option<i64>,
    format: Option<Format>,
}

/// How the rows are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Format {
    Json,
    Csv,
}

/// One row.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Audit {
    id: i64,
    /// Seconds since 1970.
    time: i64,
    user: String,
    /// The address that the request came from.
    source: String,
    action: String,
    what: String,
    /// False for what was refused or failed, and for what is not known to have been done (yet).
    ok: bool,
    /// What changed, or was to be changed: `{"field": {"old": ..., "new": ...}}`, or null.
    difference: Difference,
    /// How it ended, if the row was written before the end: `begun`, `done`, or `refused`, `failed` or `unknown` and
    /// why.
    outcome: Option<String>,
}

impl FromRow<'_, SqliteRow> for Audit {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        let (difference, outcome) = apart(row.try_get::<String, _>("difference")?);
        Ok(Self {
            id: row.try_get("id")?,
            time: row.try_get("time")?,
            user: row.try_get("user")?,
            source: row.try_get("source")?,
            action: row.try_get("action")?,
            what: row.try_get("what")?,
            ok: row.try_get("ok")?,
            difference: Difference(difference),
            outcome,
        })
    }
}

/// JSON as it was recorded.
#[derive(Debug, Serialize, JsonSchema)]
struct Difference(Value);

/// What was changed, and how that ended.
fn apart(text: String) -> (Value, Option<String>) {
    let mut value: Value = serde_json::from_str(&text).unwrap_or(Value::String(text));
    let record = value.as_object_mut().and_then(|fields| fields.remove(RECORD));
    let Some(record) = record else { return (value, None) };
    let empty = value.as_object().is_some_and(Map::is_empty);
    let outcome = record["outcome"].as_str().map(str::to_owned);
    (if empty { Value::Null } else { value }, outcome)
}

/// What a row is found again by: its time and its id.
type Key = (i64, i64);

/// Parameters of both: 1 user, 2 since, 3 and 4 the key of the row before the page, 5 and 6 limit and offset.
macro_rules! statements {
    (rows $rows:literal, page $page:literal) => {
        Statements {
            page: concat!(
                "SELECT id, time, user, source, action, what, ok, difference FROM audits ",
                $page,
                " LIMIT +?5 OFFSET ?6"
            ),
            count: concat!("SELECT count(*) FROM audits ", $rows),
        }
    };
}

/// In the order in which they were written, so that whoever looks for new rows finds them in front.
pub(super) const ALL: Statements = statements!(rows "", page "WHERE id < ?4 ORDER BY id DESC");
pub(super) const SINCE: Statements = statements!(
    rows "WHERE time >= ?2",
    page "WHERE time >= ?2 AND (time, id) < (?3, ?4) ORDER BY time DESC, id DESC"
);
pub(super) const OF_USER: Statements = statements!(
    rows "WHERE user = ?1 AND time >= ?2",
    page "WHERE user = ?1 AND time >= ?2 AND (time, id) < (?3, ?4) ORDER BY time DESC, id DESC"
);

/// `GET audits/mgmt`.
async fn list(State(console): State<Arc<Console>>, Search(wanted): Search<Wanted>) -> Result<Response, ApiError> {
    let (limit, _) = Page { limit: wanted.limit, offset: None }.bounds()?;
    let start = Start::<Key>::of(wanted.cursor.as_deref(), wanted.offset)?;
    let statements = match (&wanted.user, wanted.since) {
        (Some(_), _) => OF_USER,
        (None, Some(_)) => SINCE,
        (None, None) => ALL,
    };
    let (user, since) = (wanted.user, wanted.since.unwrap_or(i64::MIN));
    let mut reading = console.store.read().await?;
    let mut total = None;
    if start.is_counted() {
        let count = sqlx::query_scalar(statements.count).bind(user.clone()).bind(since);
        total = Some(count.fetch_one(&mut *reading).await.map_err(StoreError::from)?);
    }
    let ((time, id), offset) = start.bounds((i64::MAX, i64::MAX));
    let query = sqlx::query_as(statements.page).bind(user).bind(since).bind(time).bind(id);
    let query = query.bind(limit + 1).bind(offset);
    let mut rows: Vec<Audit> = query.fetch_all(&mut *reading).await.map_err(StoreError::from)?;
    let mut headers = page_headers(&mut rows, limit, total, |row| (row.time, row.id));
    if wanted.format != Some(Format::Csv) {
        return Ok((headers, Json(rows)).into_response());
    }
    let attachment = HeaderValue::from_static("attachment; filename=\"audits.csv\"");
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/csv; charset=utf-8"));
    headers.insert(header::CONTENT_DISPOSITION, attachment);
    Ok((headers, csv(&rows)).into_response())
}

fn csv(rows: &[Audit]) -> String {
    let mut text = "id,time,user,source,action,what,ok,difference,outcome\r\n".to_owned();
    for row in rows {
        let difference = row.difference.0.to_string();
        let cells = [&row.user, &row.source, &row.action, &row.what].map(|text| cell(text));
        let [user, source, action, what] = cells;
        let (id, time, ok, difference) = (row.id, row.time, row.ok, cell(&difference));
        let outcome = row.outcome.as_deref().map(cell).unwrap_or_default();
        text.push_str(&format!("{id},{time},{user},{source},{action},{what},{ok},{difference},{outcome}\r\n"));
    }
    text
}

/// One cell, quoted. What a spreadsheet would take for a formula gets a quotation mark in front and stays text.
fn cell(text: &str) -> String {
    let formula = text.trim_start().starts_with(['=', '+', '-', '@', '\u{ff1d}', '\u{ff0b}', '\u{ff0d}', '\u{ff20}'])
        || text.starts_with(['\t', '\r', '\n']);
    format!("\"{}{}\"", if formula { "'" } else { "" }, text.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn no_cell_becomes_a_formula() {
        for bad in ["=1+1", "+1", "-1", "@x", "\t=1", " =1", "\r=1"] {
            assert!(cell(bad).starts_with("\"'"), "{bad}");
        }
        assert_eq!(cell("a \"b\", c"), "\"a \"\"b\"\", c\"");
    }

    #[test]
    fn a_row_tells_its_outcome_apart_from_what_was_changed() {
        let text = json!({"a": {"old": 1, "new": 2}, RECORD: {"ticket": "t", "outcome": "done"}}).to_string();
        assert_eq!(apart(text), (json!({"a": {"old": 1, "new": 2}}), Some("done".to_owned())));
        assert_eq!(apart(json!({RECORD: {"outcome": "begun"}}).to_string()), (Value::Null, Some("begun".to_owned())));
        assert_eq!(apart("null".to_owned()), (Value::Null, None));
        assert_eq!(apart("{}".to_owned()), (json!({}), None));
    }
}
