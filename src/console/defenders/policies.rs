//! `defenders/policy`: what all Defenders watch, and the versions before. Must never let a policy pass that a Defender
//! would refuse, nor one take the place of another that its author has not seen.

use std::sync::Arc;

use axum::{Json, extract::State, http::Method};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sqlx::{FromRow, Row as _, sqlite::SqliteRow};

use crate::{
    console::{
        Console, audit_log,
        clock::unix_time,
        errors::ApiError,
        extract::{Body, Name, Search},
        route::{Access, Entry, route},
        store::{Store, StoreError},
        user::{Role, User},
    },
    defender::wire::Policy,
};

/// Name of the setting.
const POLICY: &str = "defenderPolicy";
/// Versions that are kept.
const VERSIONS: i64 = 20;

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let (get, post) = (Method::GET, Method::POST);
    vec![
        route(get.clone(), "/defenders/policy", Access::Any, "What all Defenders watch", policy).answer::<Policy>(),
        route(post, "/defenders/policy", Access::Roles(Role::OPERATORS), "Set what all Defenders watch", set_policy)
            .changes("set", "defenders/policy")
            .query::<Basis>()
            .body::<Policy>()
            .answer::<Policy>(),
        route(
            get.clone(),
            "/defenders/policy/versions",
            Access::Any,
            "The versions of the policy that are kept, the newest first",
            versions,
        )
        .answer::<Vec<Version>>(),
        route(get, "/defenders/policy/versions/{version}", Access::Any, "A version of the policy", version)
            .answer::<Policy>(),
    ]
}

/// The policy in force.
///
/// # Errors
/// Those of a setting.
pub(super) async fn policy_of(store: &Store) -> Result<Policy, StoreError> {
    Ok(store.setting(POLICY).await?.unwrap_or_default())
}

/// `GET defenders/policy`.
async fn policy(State(console): State<Arc<Console>>) -> Result<Json<Policy>, ApiError> {
    Ok(Json(policy_of(&console.store).await?))
}

/// What the author of a policy has seen.
#[derive(Debug, Deserialize, JsonSchema)]
struct Basis {
    /// Only if this version is in force; whatever is, if not given.
    basis: Option<u64>,
}

/// `POST defenders/policy`: all that are connected have it within a moment. Its version is up to the Console.
async fn set_policy(
    State(console): State<Arc<Console>>,
    user: User,
    Search(Basis { basis }): Search<Basis>,
    Body(wanted): Body<Policy>,
) -> Result<Json<Policy>, ApiError> {
    wanted.check().map_err(ApiError::bad)?;
    let mut writing = console.store.begin().await?;
    let before: Policy = writing.setting(POLICY).await?.unwrap_or_default();
    if basis.is_some_and(|basis| basis != before.version) {
        return Err(ApiError::Conflict(format!(
            "version {} is in force by now: look at it, and set yours again",
            before.version
        )));
    }
    let wanted = Policy { version: before.version + 1, ..wanted };
    writing.set_setting(POLICY, &wanted).await?;
    let number = |version: u64| i64::try_from(version).unwrap_or(i64::MAX);
    let keep = "INSERT OR REPLACE INTO defender_policies (version, time, by, policy) VALUES (?, ?, ?, ?)";
    let text = serde_json::to_string(&wanted).unwrap_or_default(); // strings and numbers
    let keep = sqlx::query(keep).bind(number(wanted.version)).bind(unix_time()).bind(user.name.clone()).bind(text);
    writing.execute(keep).await?;
    // After a restore there may be later ones, which never were.
    let forget = sqlx::query("DELETE FROM defender_policies WHERE version <= ?1 OR version > ?2");
    writing.execute(forget.bind(number(wanted.version) - VERSIONS).bind(number(wanted.version))).await?;
    let difference = audit_log::difference(&before, &wanted);
    audit_log::record(&mut writing, &user, "set", "defenders/policy", difference).await?;
    writing.commit().await?;
    console.defenders.announce(wanted.clone());
    Ok(Json(wanted))
}

/// A version of the policy in a list.
#[derive(Debug, Serialize, JsonSchema)]
struct Version {
    version: u64,
    /// When it was set, in seconds since 1970.
    time: i64,
    /// Who has set it.
    by: String,
    /// How many paths it lists.
    paths: u32,
}

impl FromRow<'_, SqliteRow> for Version {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Self {
            version: row.try_get::<i64, _>("version")?.unsigned_abs(),
            time: row.try_get("time")?,
            by: row.try_get("by")?,
            paths: row.try_get("paths")?,
        })
    }
}

/// `GET defenders/policy/versions`.
async fn versions(State(console): State<Arc<Console>>) -> Result<Json<Vec<Version>>, ApiError> {
    let query = "SELECT version, time, by, json_array_length(policy, '$.paths') AS paths FROM defender_policies \
                 ORDER BY version DESC";
    let mut reading = console.store.read().await?;
    Ok(Json(sqlx::query_as(query).fetch_all(&mut *reading).await.map_err(StoreError::from)?))
}

/// `GET defenders/policy/versions/{version}`.
async fn version(State(console): State<Arc<Console>>, Name(version): Name) -> Result<Json<Policy>, ApiError> {
    let none = || ApiError::NotFound(format!("version {version:?} of the policy is not kept: the last {VERSIONS} are"));
    let number: i64 = version.parse().map_err(|_| none())?;
    let query = sqlx::query_scalar("SELECT policy FROM defender_policies WHERE version = ?").bind(number);
    let mut reading = console.store.read().await?;
    let text: Option<String> = query.fetch_optional(&mut *reading).await.map_err(StoreError::from)?;
    Ok(Json(serde_json::from_str(&text.ok_or_else(none)?).map_err(|_| ApiError::Internal)?))
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use serde_json::{Value, json};

    use super::*;
    use crate::console::test_console::TestConsole;

    #[tokio::test]
    async fn a_policy_gets_the_next_version_and_is_audited() {
        let test = TestConsole::start().await;
        let admin = test.login().await;
        let ask = async |method, body| test.call(method, "/api/v1/defenders/policy", &admin, body).await;
        let (_, usual) = ask(Method::GET, Value::Null).await;
        assert_eq!(usual, json!({ "version": 0, "paths": [], "perMinute": 10, "hashBytes": 64 << 20 }));
        let announced = test.console.defenders.policies();
        let (status, text) = ask(Method::POST, json!({ "paths": [{ "path": "etc" }] })).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{text}");
        let (status, text) = ask(Method::POST, json!({ "paths": [["/etc", true]] })).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{text}");
        let wanted = json!({ "version": 99, "paths": [{ "path": "/etc", "recursive": true }], "perMinute": 5 });
        let (status, set) = ask(Method::POST, wanted).await;
        assert_eq!((status, &set["version"]), (StatusCode::OK, &json!(1)));
        assert_eq!(ask(Method::GET, Value::Null).await.1, set);
        assert_eq!(announced.borrow().as_ref().unwrap().version, 1);
        let (_, rows) = test.call(Method::GET, "/api/v1/audits/mgmt?limit=1", &admin, Value::Null).await;
        assert_eq!((&rows[0]["what"], &rows[0]["user"]), (&json!("defenders/policy"), &json!("admin")));
    }

    #[tokio::test]
    async fn versions_are_kept_and_none_is_overwritten_unseen() {
        let test = TestConsole::start().await;
        let admin = test.login().await;
        let post = async |query: &str, paths: Value| {
            let path = format!("/api/v1/defenders/policy{query}");
            test.call(Method::POST, &path, &admin, json!({ "paths": paths })).await
        };
        for version in 0..VERSIONS + 3 {
            let (status, text) = post(&format!("?basis={version}"), json!([{ "path": format!("/{version}") }])).await;
            assert_eq!(status, StatusCode::OK, "{text}");
        }
        let (status, text) = post("?basis=3", json!([])).await;
        assert!(
            status == StatusCode::CONFLICT && text["err"].as_str().unwrap().contains("version 23 is in force"),
            "{text}"
        );
        let get = async |path: &str| {
            test.call(Method::GET, &format!("/api/v1/defenders/policy/versions{path}"), &admin, Value::Null).await
        };
        let (_, kept) = get("").await;
        let numbers: Vec<i64> = kept.as_array().unwrap().iter().map(|row| row["version"].as_i64().unwrap()).collect();
        assert_eq!(numbers, (4..=VERSIONS + 3).rev().collect::<Vec<_>>());
        assert_eq!((&kept[0]["by"], &kept[0]["paths"]), (&json!("admin"), &json!(1)));
        assert_eq!(get("/4").await.1["paths"], json!([{ "path": "/3", "recursive": false }]));
        for none in ["/3", "/x", "/99"] {
            assert_eq!(get(none).await.0, StatusCode::NOT_FOUND, "{none}");
        }
    }
}
