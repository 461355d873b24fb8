//! `audits/mgmt`: who did what, when and from where. Owns the table of it and its bounds. Must never hold a secret: what is
//! recorded is what a reader of the table may see.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{Method, header},
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sqlx::{FromRow, Row as _, sqlite::SqliteRow};

use super::{
    Console,
    auth::User,
    clock::unix_time,
    errors::ApiError,
    extract::{Page, Paged, Search, TOTAL},
    logins::Logins,
    routes::{Access, Entry, Role, route},
    store::{Store, StoreError, Writing},
};

/// Rows kept; the oldest go first.
const ROWS: i64 = 100_000;
/// Rows of failed logins kept among them: who guesses passwords must not push out what others did.
const FAILURES: i64 = 10_000;
/// Rows that are looked at for the last logins.
const RECALLED: i64 = 2000;
/// Longest name, action and description in characters: what is longer is cut.
const TEXT: usize = 256;
/// Longest difference in bytes; a longer one is replaced by a remark.
const DIFFERENCE: usize = 8 << 10;

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

/// What is wanted, and how.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Wanted {
    /// At most so many rows, 50 if not given.
    #[schemars(range(min = 1, max = 1000))]
    limit: Option<u32>,
    /// So many newer rows are left out.
    offset: Option<u32>,
    /// Only what this user did.
    user: Option<String>,
    /// Only what happened then or later, in seconds since 1970.
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
    /// False for a login that failed.
    ok: bool,
    /// What changed: `{"field": {"old": ..., "new": ...}}`, or null.
    difference: Difference,
}

impl FromRow<'_, SqliteRow> for Audit {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: row.try_get("id")?,
            time: row.try_get("time")?,
            user: row.try_get("user")?,
            source: row.try_get("source")?,
            action: row.try_get("action")?,
            what: row.try_get("what")?,
            ok: row.try_get("ok")?,
            difference: Difference::from(row.try_get::<String, _>("difference")?),
        })
    }
}

/// JSON as it was recorded.
#[derive(Debug, Serialize, JsonSchema)]
struct Difference(Value);

impl From<String> for Difference {
    fn from(text: String) -> Self {
        Self(serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }
}

/// `GET audits/mgmt`.
async fn list(State(console): State<Arc<Console>>, Search(wanted): Search<Wanted>) -> Result<Response, ApiError> {
    let (limit, offset) = Page { limit: wanted.limit, offset: wanted.offset }.bounds()?;
    let (user, since) = (wanted.user, wanted.since.unwrap_or(i64::MIN));
    let mut reading = console.store.read().await?;
    let query = "SELECT id, time, user, source, action, what, ok, difference FROM audits \
                 WHERE (?1 IS NULL OR user = ?1) AND time >= ?2 ORDER BY id DESC LIMIT ?3 OFFSET ?4";
    let query = sqlx::query_as(query).bind(user.clone()).bind(since).bind(limit).bind(offset);
    let rows: Vec<Audit> = query.fetch_all(&mut *reading).await.map_err(StoreError::from)?;
    let total = "SELECT count(*) FROM audits WHERE (?1 IS NULL OR user = ?1) AND time >= ?2";
    let total = sqlx::query_scalar(total).bind(user).bind(since);
    let total: i64 = total.fetch_one(&mut *reading).await.map_err(StoreError::from)?;
    if wanted.format != Some(Format::Csv) {
        return Ok(Paged { rows, total }.into_response());
    }
    // Not AppendHeaders: the text has a type already, which these replace.
    let headers = [
        (header::CONTENT_TYPE, "text/csv; charset=utf-8".to_owned()),
        (header::CONTENT_DISPOSITION, "attachment; filename=\"audits.csv\"".to_owned()),
        (TOTAL, total.to_string()),
    ];
    Ok((headers, csv(&rows)).into_response())
}

fn csv(rows: &[Audit]) -> String {
    let mut text = "id,time,user,source,action,what,ok,difference\r\n".to_owned();
    for row in rows {
        let difference = row.difference.0.to_string();
        let cells = [&row.user, &row.source, &row.action, &row.what].map(|text| cell(text));
        let [user, source, action, what] = cells;
        let (id, time, ok, difference) = (row.id, row.time, row.ok, cell(&difference));
        text.push_str(&format!("{id},{time},{user},{source},{action},{what},{ok},{difference}\r\n"));
    }
    text
}

/// One cell, quoted. What a spreadsheet would take for a formula gets a quotation mark in front and stays text.
fn cell(text: &str) -> String {
    let formula = text.trim_start().starts_with(['=', '+', '-', '@', '\u{ff1d}', '\u{ff0b}', '\u{ff0d}', '\u{ff20}'])
        || text.starts_with(['\t', '\r', '\n']);
    format!("\"{}{}\"", if formula { "'" } else { "" }, text.replace('"', "\"\""))
}

/// Records a change in the transaction that makes it. `action` is a word as "create", `what` names the thing as
/// "tag 'a'", `difference` is what [`difference`] gives, or `Value::Null`.
///
/// # Errors
/// As those of [`Writing::execute`].
pub(super) async fn record(
    writing: &mut Writing,
    user: &User,
    action: &str,
    what: &str,
    difference: Value,
) -> Result<(), StoreError> {
    insert(writing, &Row { user: &user.name, source: &user.from.to_string(), action, what, ok: true, difference }).await
}

/// Records what is about to be done where it is no write of the database (apply, switchover): a transaction of its own,
/// before the action is begun, because afterwards the database may not be here any more.
///
/// # Errors
/// As those of [`Writing::commit`]; then the action must not be begun.
pub(super) async fn note(
    store: &Store,
    user: &User,
    action: &str,
    what: &str,
    difference: Value,
) -> Result<(), StoreError> {
    let mut writing = store.begin().await?;
    record(&mut writing, user, action, what, difference).await?;
    writing.commit().await
}

/// Records a login that was computed and is no other write: one that failed, or by Basic. If it cannot be written (the disk
/// is full), the login counts all the same: reads must go on then.
pub(super) async fn note_login(store: &Store, name: &str, from: IpAddr, ok: bool) {
    let written = async {
        let mut writing = store.begin().await?;
        let source = from.to_string();
        let row = Row { user: name, source: &source, action: "login", what: "", ok, difference: Value::Null };
        insert(&mut writing, &row).await?;
        writing.commit().await
    };
    if let Err(error) = written.await {
        tracing::info!(%from, ok, "a login could not be audited: {error}");
    }
}

/// Tells what the last logins were, before this primary is asked for the first time. The clocks of two hosts differ: what seems
/// to be of tomorrow counts as of now.
pub(super) async fn recall_logins(store: &Store, logins: &Logins) {
    let rows = async {
        let mut reading = store.read().await?;
        let query = "SELECT user, source, ok, time FROM audits \
                     WHERE id > (SELECT max(id) FROM audits) - ? AND action = 'login' ORDER BY id";
        let rows = sqlx::query_as(query).bind(RECALLED).fetch_all(&mut *reading).await;
        rows.map_err(StoreError::from)
    };
    let rows: Vec<(String, String, bool, i64)> = match rows.await {
        Ok(rows) => rows,
        Err(error) => return tracing::warn!("the last logins cannot be looked up: guessing begins anew: {error}"),
    };
    for (user, source, ok, time) in rows {
        let age = u64::try_from(unix_time() - time).unwrap_or(0);
        if let Ok(from) = source.parse() {
            logins.recall(&user, from, ok, Duration::from_secs(age));
        }
    }
}

struct Row<'a> {
    user: &'a str,
    source: &'a str,
    action: &'a str,
    what: &'a str,
    ok: bool,
    difference: Value,
}

async fn insert(writing: &mut Writing, row: &Row<'_>) -> Result<(), StoreError> {
    let mut difference = row.difference.to_string();
    if difference.len() > DIFFERENCE {
        difference = json!({ "tooLong": difference.len() }).to_string();
    }
    let insert = sqlx::query(
        "INSERT INTO audits (time, user, source, action, what, ok, difference) VALUES (?, ?, ?, ?, ?, ?, ?)",
    );
    let cut = |text: &str| text.chars().take(TEXT).collect::<String>();
    let insert = insert.bind(unix_time()).bind(cut(row.user)).bind(row.source.to_owned());
    let insert = insert.bind(cut(row.action)).bind(cut(row.what)).bind(row.ok).bind(difference);
    writing.execute(insert).await?;
    let delete = sqlx::query("DELETE FROM audits WHERE id <= (SELECT max(id) FROM audits) - ?");
    writing.execute(delete.bind(ROWS)).await?;
    if !row.ok {
        let surplus = "DELETE FROM audits WHERE ok = 0 AND id <= \
                       (SELECT id FROM audits WHERE ok = 0 ORDER BY id DESC LIMIT 1 OFFSET ?)";
        writing.execute(sqlx::query(surplus).bind(FAILURES)).await?;
    }
    Ok(())
}

/// The fields in which two states of a thing differ: `{"field": {"old": ..., "new": ...}}`. Null stands for "did not
/// exist" and "does not exist any more".
pub(super) fn difference(old: &impl Serialize, new: &impl Serialize) -> Value {
    let fields = |value: Value| match value {
        Value::Object(fields) => fields,
        Value::Null => Map::new(),
        other => Map::from_iter([("value".to_owned(), other)]),
    };
    // What cannot be written as JSON was not sent as JSON either.
    let old = fields(serde_json::to_value(old).unwrap_or_default());
    let new = fields(serde_json::to_value(new).unwrap_or_default());
    let mut changed = Map::new();
    for name in old.keys().chain(new.keys()) {
        let (before, after) = (old.get(name), new.get(name));
        if before != after {
            changed.insert(name.clone(), json!({ "old": before, "new": after }));
        }
    }
    Value::Object(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_cell_becomes_a_formula() {
        for bad in ["=1+1", "+1", "-1", "@x", "\t=1", " =1", "\r=1"] {
            assert!(cell(bad).starts_with("\"'"), "{bad}");
        }
        assert_eq!(cell("a \"b\", c"), "\"a \"\"b\"\", c\"");
    }

    #[test]
    fn only_what_differs_is_recorded() {
        let old = json!({"a": 1, "b": 2});
        assert_eq!(difference(&old, &json!({"a": 1, "b": 3})), json!({"b": {"old": 2, "new": 3}}));
        assert_eq!(difference(&old, &old), json!({}));
        assert_eq!(difference(&Value::Null, &json!({"a": 1})), json!({"a": {"old": null, "new": 1}}));
        assert_eq!(difference(&"x", &"y"), json!({"value": {"old": "x", "new": "y"}}));
    }
}
