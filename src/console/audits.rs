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
pub(super) use crate::admin::audit::difference;
use crate::admin::{Act, Actor, Outcome, Ticket, audit::RECORD};

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
/// Longest outcome in characters, its reason included: what is longer is cut.
const REASON: usize = 500;
/// So many of the newest rows are searched for that of an operation.
const NEAR: i64 = 5_000;
/// The action of a drill.
pub(super) const DRILL: &str = "drill";
/// The outcome of an operation that is under way.
const BEGUN: &str = "begun";

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
    /// False for what was refused or failed, and for what is not known to have been done (yet).
    ok: bool,
    /// What changed, or was to be changed: `{"field": {"old": ..., "new": ...}}`, or null.
    difference: Difference,
    /// How it ended, if the row was written before that: `begun`, `done`, or `refused`, `failed` or `unknown` and why.
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
    let Actor { name, source } = user.actor();
    insert(writing, &Row { user: &name, source: &source, action, what, ok: true, difference }).await
}

/// Records a request to change something of the Console's own tables that was refused.
///
/// # Errors
/// As those of [`Writing::commit`].
pub(super) async fn note_refusal(
    store: &Store,
    actor: &Actor,
    action: &str,
    what: &str,
    why: &str,
) -> Result<(), StoreError> {
    let mut writing = store.begin().await?;
    let difference = json!({ RECORD: { "outcome": Outcome::Refused(shortened(why)).to_string() } });
    let row = Row { user: &actor.name, source: &actor.source, action, what, ok: false, difference };
    insert(&mut writing, &row).await?;
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

/// What is short enough to be kept of a difference.
fn bounded(difference: &Value) -> Value {
    let length = difference.to_string().len();
    if length > DIFFERENCE { json!({ "tooLong": length }) } else { difference.clone() }
}

async fn insert(writing: &mut Writing, row: &Row<'_>) -> Result<(), StoreError> {
    insert_at(writing, row, unix_time()).await
}

async fn insert_at(writing: &mut Writing, row: &Row<'_>, time: i64) -> Result<(), StoreError> {
    // Whoever adds to it what is short has cut it before.
    let difference = match row.difference.get(RECORD) {
        Some(_) => row.difference.to_string(),
        None => bounded(&row.difference).to_string(),
    };
    let insert = sqlx::query(
        "INSERT INTO audits (time, user, source, action, what, ok, difference) VALUES (?, ?, ?, ?, ?, ?, ?)",
    );
    let cut = |text: &str| text.chars().take(TEXT).collect::<String>();
    let insert = insert.bind(time).bind(cut(row.user)).bind(cut(row.source));
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

/// An operation of [`crate::admin`] as a row has it.
pub(super) struct Operation<'a> {
    pub(super) ticket: &'a Ticket,
    /// Seconds since 1970.
    pub(super) time: i64,
    pub(super) actor: &'a Actor,
    pub(super) act: &'a Act,
    /// Name of the member that carries it out, and the epoch.
    pub(super) at: (&'a str, u64),
    /// None as long as it is under way.
    pub(super) outcome: Option<&'a Outcome>,
}

/// Writes the row of an operation, or what has become of it into the row that it has.
///
/// # Errors
/// As those of [`Writing::commit`].
pub(super) async fn write_operation(store: &Store, operation: &Operation<'_>) -> Result<(), StoreError> {
    let Operation { ticket: Ticket(ticket), time, actor, act, at: (member, epoch), outcome } = operation;
    let mut writing = store.begin().await?;
    let told = outcome.map_or_else(|| BEGUN.to_owned(), |outcome| shortened(&outcome.to_string()));
    let mut difference = bounded(&act.difference);
    if !difference.is_object() {
        difference = json!({});
    }
    difference[RECORD] = json!({ "ticket": ticket, "member": member, "epoch": epoch, "outcome": told });
    let ok = outcome.is_some_and(Outcome::is_done);
    let find = "SELECT id FROM audits WHERE id > (SELECT max(id) FROM audits) - ?1 AND instr(difference, ?2) > 0";
    let find = sqlx::query_scalar(find).bind(NEAR).bind(format!("\"ticket\":\"{ticket}\""));
    let found: Option<i64> = match outcome {
        None => None,
        Some(_) => find.fetch_optional(writing.connection()).await.map_err(StoreError::from)?,
    };
    match found {
        Some(id) => {
            let update = sqlx::query("UPDATE audits SET ok = ?, difference = ? WHERE id = ?");
            writing.execute(update.bind(ok).bind(difference.to_string()).bind(id)).await?;
        }
        None => {
            let Actor { name: user, source } = actor;
            let row = Row { user, source, action: &act.action, what: &act.what, ok, difference };
            insert_at(&mut writing, &row, *time).await?;
        }
    }
    writing.commit().await
}

/// A row of an operation whose outcome nobody has written yet.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Begun {
    id: i64,
    pub(super) ticket: String,
    pub(super) time: i64,
    pub(super) action: String,
    pub(super) what: String,
    pub(super) member: String,
    pub(super) epoch: u64,
    difference: Value,
}

#[cfg(test)]
impl Begun {
    pub(super) fn sample(action: &str, what: &str, member: &str, epoch: u64) -> Self {
        let (id, time, ticket) = (1, 0, "0".to_owned());
        let (action, what, member) = (action.to_owned(), what.to_owned(), member.to_owned());
        Self { id, ticket, time, action, what, member, epoch, difference: Value::Null }
    }
}

/// All such rows.
///
/// # Errors
/// [`StoreError::Unavailable`].
pub(super) async fn begun(store: &Store) -> Result<Vec<Begun>, StoreError> {
    let mut reading = store.read().await?;
    let find = "SELECT id, time, action, what, difference FROM audits \
                WHERE id > (SELECT max(id) FROM audits) - ?1 AND ok = 0 AND instr(difference, ?2) > 0";
    let mark = format!("\"outcome\":\"{BEGUN}\"");
    let rows = sqlx::query(find).bind(NEAR).bind(mark).fetch_all(&mut *reading).await.map_err(StoreError::from)?;
    let read = |row: &SqliteRow| -> Option<Begun> {
        let difference: Value = serde_json::from_str(&row.try_get::<String, _>("difference").ok()?).ok()?;
        let record = &difference[RECORD];
        let text = |name: &str| record[name].as_str().unwrap_or_default().to_owned();
        (record["outcome"] == BEGUN).then(|| Begun {
            id: row.try_get("id").unwrap_or_default(),
            time: row.try_get("time").unwrap_or_default(),
            action: row.try_get("action").unwrap_or_default(),
            what: row.try_get("what").unwrap_or_default(),
            ticket: text("ticket"),
            member: text("member"),
            epoch: record["epoch"].as_u64().unwrap_or_default(),
            difference: difference.clone(),
        })
    };
    Ok(rows.iter().filter_map(read).collect())
}

/// Writes what has become of it into such a row.
///
/// # Errors
/// As those of [`Writing::commit`].
pub(super) async fn settle(store: &Store, mut row: Begun, outcome: &Outcome) -> Result<(), StoreError> {
    row.difference[RECORD]["outcome"] = Value::String(shortened(&outcome.to_string()));
    let update = "UPDATE audits SET ok = ?, difference = ? WHERE id = ?";
    let update = sqlx::query(update).bind(outcome.is_done()).bind(row.difference.to_string()).bind(row.id);
    store.write(update).await.map(|_| ())
}

/// A drill that is under way, as its row has it.
#[derive(Clone, Debug)]
pub(super) struct Drilled {
    id: i64,
    pub(super) time: i64,
    pub(super) user: String,
    /// Digest of the secret of its token.
    pub(super) secret: String,
    difference: Value,
}

/// Writes the row of a drill. Returns its id.
///
/// # Errors
/// As those of [`Writing::commit`].
pub(super) async fn begin_drill(
    store: &Store,
    Ticket(ticket): &Ticket,
    (actor, act): (&Actor, &Act),
    (member, epoch): (&str, u64),
    secret: &str,
) -> Result<i64, StoreError> {
    let mut writing = store.begin().await?;
    let mut difference = bounded(&act.difference);
    difference[RECORD] =
        json!({ "ticket": ticket, "member": member, "epoch": epoch, "secret": secret, "outcome": BEGUN });
    let Actor { name: user, source } = actor;
    insert(&mut writing, &Row { user, source, action: &act.action, what: &act.what, ok: false, difference }).await?;
    let id = writing.number("SELECT max(id) FROM audits").await?;
    writing.commit().await?;
    Ok(id)
}

/// The drill of that row and ticket, if it is under way.
///
/// # Errors
/// [`StoreError::Unavailable`].
pub(super) async fn drill(store: &Store, id: i64, ticket: &str) -> Result<Option<Drilled>, StoreError> {
    let mut reading = store.read().await?;
    let query = "SELECT time, user, difference FROM audits WHERE id = ? AND action = ?";
    let row = sqlx::query(query).bind(id).bind(DRILL).fetch_optional(&mut *reading).await.map_err(StoreError::from)?;
    let read = |row: SqliteRow| -> Option<Drilled> {
        let difference: Value = serde_json::from_str(&row.try_get::<String, _>("difference").ok()?).ok()?;
        let record = &difference[RECORD];
        let secret = record["secret"].as_str()?.to_owned();
        if record["ticket"] != ticket || record["outcome"] != BEGUN {
            return None;
        }
        Some(Drilled { id, time: row.try_get("time").ok()?, user: row.try_get("user").ok()?, secret, difference })
    };
    Ok(row.and_then(read))
}

/// Writes into its row what came out of a drill.
///
/// # Errors
/// As those of [`Writing::execute`].
pub(super) async fn end_drill(
    writing: &mut Writing,
    mut drill: Drilled,
    outcome: &Outcome,
    text: &str,
) -> Result<(), StoreError> {
    drill.difference[RECORD]["outcome"] = Value::String(shortened(&outcome.to_string()));
    drill.difference["result"] = json!({ "old": null, "new": text });
    if let Some(record) = drill.difference[RECORD].as_object_mut() {
        record.remove("secret");
    }
    let update = sqlx::query("UPDATE audits SET ok = ?, difference = ? WHERE id = ?");
    writing.execute(update.bind(outcome.is_done()).bind(drill.difference.to_string()).bind(drill.id)).await?;
    Ok(())
}

fn shortened(text: &str) -> String {
    text.chars().take(REASON).collect()
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
    fn a_row_tells_its_outcome_apart_from_what_was_changed() {
        let text = json!({"a": {"old": 1, "new": 2}, RECORD: {"ticket": "t", "outcome": "done"}}).to_string();
        assert_eq!(apart(text), (json!({"a": {"old": 1, "new": 2}}), Some("done".to_owned())));
        assert_eq!(apart(json!({RECORD: {"outcome": "begun"}}).to_string()), (Value::Null, Some("begun".to_owned())));
        assert_eq!(apart("null".to_owned()), (Value::Null, None));
        assert_eq!(apart("{}".to_owned()), (json!({}), None));
        assert_eq!(bounded(&json!({"a": "x".repeat(DIFFERENCE)})), json!({"tooLong": DIFFERENCE + 8}));
    }
}
