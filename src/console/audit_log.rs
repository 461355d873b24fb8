//! The table of the audit: what is written into it, and the bounds of a row. Must never hold a secret: whoever may read
//! the table sees all of it. How many rows are kept is up to [`super::retention`].

use std::{net::IpAddr, time::Duration};

use serde_json::{Value, json};
use sqlx::{
    Row as _, Sqlite,
    query::Query,
    sqlite::{SqliteArguments, SqliteRow},
};

use super::{
    clock::unix_time,
    logins::Logins,
    store::{Store, StoreError, Writing},
    user::User,
};
pub(super) use crate::admin::audit::difference;
use crate::admin::{Act, Actor, Outcome, Ticket, audit::RECORD};

/// Newest rows that are searched for the last logins.
const RECALLED: i64 = 2000;
/// Longest name, action and description in characters: what is longer is cut.
const TEXT: usize = 256;
/// Longest difference in bytes; a longer one is replaced by a remark.
const DIFFERENCE: usize = 8 << 10;
/// Longest outcome in characters, its reason included: what is longer is cut.
const REASON: usize = 500;
/// Newest rows that are searched for that of an operation.
const NEAR: i64 = 5_000;
/// The action of a drill.
pub(super) const DRILL: &str = "drill";
/// The outcome of an operation that is under way.
const BEGUN: &str = "begun";

/// The statement that adds a row.
macro_rules! insert_row {
    () => {
        "INSERT INTO audits (time, user, source, action, what, ok, difference) VALUES (?, ?, ?, ?, ?, ?, ?)"
    };
}

/// The SQL of a change with that of the row that records it. They go together: each statement by itself is a way to the
/// connection's thread and back. The caller binds what the change needs, and then calls [`recorded`].
macro_rules! audited {
    ($change:literal) => {
        concat!($change, "; ", $crate::console::audit_log::insert_row!())
    };
}

pub(super) use {audited, insert_row};

/// Binds what the row of [`audited`] needs. `action` is a word such as "create", `what` names the thing, such as
/// "tag 'a'", and `difference` is what [`difference`] gives, or `Value::Null`. If the change fails, nothing is recorded.
pub(super) fn recorded<'q>(change: Change<'q>, user: &User, action: &str, what: &str, difference: Value) -> Change<'q> {
    let Actor { name, source } = user.actor();
    bind(change, &Row { user: &name, source: &source, action, what, ok: true, difference }, unix_time())
}

/// Records a change in the transaction that makes it; the arguments are those of [`recorded`].
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
    writing.execute(recorded(sqlx::query(insert_row!()), user, action, what, difference)).await.map(|_| ())
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

/// Records a login whose password hash was computed and that writes nothing else: one that failed, or one by Basic. If
/// the row cannot be written (the disk is full), the login counts all the same: reads must go on then.
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

/// Tells `logins` of the last logins, before this primary is asked for the first time. The clocks of two hosts differ:
/// what seems to be in the future counts as now.
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

/// Statements that change something, with what is bound to them.
type Change<'q> = Query<'q, Sqlite, SqliteArguments>;

struct Row<'a> {
    user: &'a str,
    source: &'a str,
    action: &'a str,
    what: &'a str,
    ok: bool,
    difference: Value,
}

/// A difference, or only its length if it is too long to be kept.
fn bounded(difference: &Value) -> Value {
    let length = difference.to_string().len();
    if length > DIFFERENCE { json!({ "tooLong": length }) } else { difference.clone() }
}

fn bind<'q>(change: Change<'q>, row: &Row<'_>, time: i64) -> Change<'q> {
    // One with a record in it was bounded before the record was added.
    let difference = match row.difference.get(RECORD) {
        Some(_) => row.difference.to_string(),
        None => bounded(&row.difference).to_string(),
    };
    let cut = |text: &str| text.chars().take(TEXT).collect::<String>();
    let change = change.bind(time).bind(cut(row.user)).bind(cut(row.source));
    change.bind(cut(row.action)).bind(cut(row.what)).bind(row.ok).bind(difference)
}

async fn insert(writing: &mut Writing, row: &Row<'_>) -> Result<(), StoreError> {
    insert_at(writing, row, unix_time()).await
}

async fn insert_at(writing: &mut Writing, row: &Row<'_>, time: i64) -> Result<(), StoreError> {
    writing.execute(bind(sqlx::query(insert_row!()), row, time)).await.map(|_| ())
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

/// Writes the row of an operation, or its outcome into the row that it has.
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
        Some(_) => writing.value(find).await?,
    };
    match found {
        Some(id) => {
            writing.execute(update(id, ok, &difference)).await?;
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

/// All rows of operations whose outcome nobody has written yet.
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

/// Writes the outcome into such a row.
///
/// # Errors
/// As those of [`Writing::commit`].
pub(super) async fn settle(store: &Store, mut row: Begun, outcome: &Outcome) -> Result<(), StoreError> {
    row.difference[RECORD]["outcome"] = Value::String(shortened(&outcome.to_string()));
    store.write(update(row.id, outcome.is_done(), &row.difference)).await.map(|_| ())
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

/// Writes the result of a drill into its row.
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
    writing.execute(update(drill.id, outcome.is_done(), &drill.difference)).await.map(|_| ())
}

/// Replaces what a row says of its outcome.
fn update(id: i64, ok: bool, difference: &Value) -> Query<'static, Sqlite, SqliteArguments> {
    let update = sqlx::query("UPDATE audits SET ok = ?, difference = ? WHERE id = ?");
    update.bind(ok).bind(difference.to_string()).bind(id)
}

fn shortened(text: &str) -> String {
    text.chars().take(REASON).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_difference_is_left_out() {
        assert_eq!(bounded(&json!({"a": "x".repeat(DIFFERENCE)})), json!({"tooLong": DIFFERENCE + 8}));
    }
}
