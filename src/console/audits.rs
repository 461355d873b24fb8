//! `audits/mgmt`: who did what, when and from where. Owns the table of it and its bounds. Must never hold a secret: what is
//! recorded is what a reader of the table may see.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    auth::{User, unix_time},
    routes::Entry,
    store::{Store, StoreError, Writing},
};

/// Rows kept; the oldest go first.
const ROWS: i64 = 100_000;
/// Longest difference in bytes; a longer one is replaced by a remark.
const DIFFERENCE: usize = 8 << 10;

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    Vec::new()
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
    let insert = insert.bind(unix_time()).bind(row.user.to_owned()).bind(row.source.to_owned());
    let insert = insert.bind(row.action.to_owned()).bind(row.what.to_owned()).bind(row.ok).bind(difference);
    writing.execute(insert).await?;
    let delete = sqlx::query("DELETE FROM audits WHERE id <= (SELECT max(id) FROM audits) - ?");
    writing.execute(delete.bind(ROWS)).await?;
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
    fn only_what_differs_is_recorded() {
        let old = json!({"a": 1, "b": 2});
        assert_eq!(difference(&old, &json!({"a": 1, "b": 3})), json!({"b": {"old": 2, "new": 3}}));
        assert_eq!(difference(&old, &old), json!({}));
        assert_eq!(difference(&Value::Null, &json!({"a": 1})), json!({"a": {"old": null, "new": 1}}));
        assert_eq!(difference(&"x", &"y"), json!({"value": {"old": "x", "new": "y"}}));
    }
}
