//! `defenders`: the agents of other hosts, their policy, and what they have told. Must never show a token, and never
//! let a policy pass that a Defender would refuse.

mod hub;
mod intake;
mod registration;
mod session;
mod tables;

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
    routing::get,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub(super) use hub::Hub;

use self::tables::{Defender, Stored};
use super::{
    BODY, Console, audit_log,
    clock::unix_time,
    errors::ApiError,
    extract::{Body, Name, Search},
    paging::{Page, Paged, Start, Statements, page_headers},
    route::{Access, Entry, route},
    store::{Store, StoreError},
    user::{Role, User},
};
use crate::{
    cluster::program_version,
    defender::wire::{self, Facts, Policy, Registered, Registration},
    telemetry,
};

/// Name of the setting.
const POLICY: &str = "defenderPolicy";
/// Defenders that have been away for so long are left out of the list, in seconds.
const REMOVED: i64 = 86_400;

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let (get, post) = (Method::GET, Method::POST);
    let installers = Access::Roles(Role::INSTALLERS);
    vec![
        route(get.clone(), "/defenders", Access::Any, "The Defenders, by name", list)
            .query::<Wanted>()
            .paged()
            .answer::<Vec<Shown>>(),
        route(Method::DELETE, "/defenders/{id}", installers, "Withdraw a Defender for good", withdraw)
            .changes("withdraw", "Defender"),
        route(get.clone(), "/defenders/events", Access::Any, "What Defenders have told, the newest first", events)
            .query::<WantedEvents>()
            .paged()
            .answer::<Vec<ShownEvent>>(),
        route(get, "/defenders/policy", Access::Any, "What all Defenders watch", policy).answer::<Policy>(),
        route(
            post.clone(),
            "/defenders/policy",
            Access::Roles(Role::OPERATORS),
            "Set what all Defenders watch",
            set_policy,
        )
        .changes("set", "defenders/policy")
        .body::<Policy>()
        .answer::<Policy>(),
        route(post.clone(), "/defenders/tokens", installers, "Invite hosts to become Defenders", registration::invite)
            .changes("invite", "Defenders")
            .body::<registration::Wish>()
            .answer::<registration::Invitation>(),
        route(
            post,
            "/defenders/register",
            Access::Open,
            "Register a host that has a token, and sign its certificate",
            registration::register,
        )
        .traced()
        .body::<Registration>()
        .answer::<Registered>(),
    ]
}

/// What is on the port of the Defenders.
pub(super) fn router(console: &Arc<Console>) -> Router {
    // There is a figure before the first one connects.
    metrics::gauge!(telemetry::DEFENDERS).increment(0.0);
    Router::new()
        .route(wire::PATH, get(session::upgrade))
        .fallback(super::no_route)
        .layer(DefaultBodyLimit::max(BODY))
        .with_state(Arc::clone(console))
}

/// The policy in force.
///
/// # Errors
/// Those of a setting.
async fn policy_of(store: &Store) -> Result<Policy, StoreError> {
    Ok(store.setting(POLICY).await?.unwrap_or_default())
}

/// Which Defenders are wanted.
#[derive(Debug, Deserialize, JsonSchema)]
struct Wanted {
    /// At most this many rows; 50 if not given.
    #[schemars(range(min = 1, max = 1000))]
    limit: Option<u32>,
    /// This many rows of the list are skipped.
    offset: Option<u32>,
    /// Also those that have been away for more than a day, and those that were withdrawn.
    #[serde(default)]
    all: bool,
}

/// A Defender as it is shown.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct Shown {
    id: String,
    name: String,
    connected: bool,
    /// Where it is connected from.
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
    /// When something about it changed, in seconds since 1970; so are all times.
    last_modified: i64,
    /// When it was there last; now, if it is connected.
    last_seen: i64,
    registered: i64,
    certificate_expiration: i64,
    version: String,
    /// Its program is one that this Console understands.
    compatible_version: bool,
    withdrawn: bool,
    /// All its events up to this number are stored.
    stored: u64,
    facts: Facts,
}

impl Shown {
    fn of(console: &Console, row: Defender) -> Self {
        let address = console.defenders.address(&row.id);
        let connected = address.is_some();
        Self {
            connected,
            address,
            last_modified: row.modified,
            last_seen: if connected { unix_time() } else { row.seen },
            registered: row.registered,
            certificate_expiration: row.expires,
            compatible_version: is_compatible(&row.version),
            version: row.version,
            withdrawn: row.withdrawn,
            stored: row.stored,
            facts: row.facts,
            id: row.id,
            name: row.name,
        }
    }
}

/// A program of another major version speaks another language, and a newer one may say more than is understood.
fn is_compatible(version: &str) -> bool {
    let parts = |version: &str| -> Option<(u32, u32)> {
        let mut parts = version.split(['.', '-']).map(|part| part.parse().ok());
        Some((parts.next()??, parts.next()??))
    };
    match (parts(version), parts(program_version())) {
        (Some((major, minor)), Some(own)) => major == own.0 && minor <= own.1,
        _ => false,
    }
}

/// `GET defenders`.
async fn list(State(console): State<Arc<Console>>, Search(wanted): Search<Wanted>) -> Result<Paged<Shown>, ApiError> {
    let (limit, offset) = Page { limit: wanted.limit, offset: wanted.offset }.bounds()?;
    let since = if wanted.all { i64::MIN } else { unix_time() - REMOVED };
    let mut reading = console.store.read().await?;
    let rows = "SELECT * FROM defenders WHERE seen >= ? AND withdrawn <= ? ORDER BY name, number LIMIT ? OFFSET ?";
    let rows = sqlx::query_as(rows).bind(since).bind(wanted.all).bind(limit).bind(offset);
    let rows: Vec<Defender> = rows.fetch_all(&mut *reading).await.map_err(StoreError::from)?;
    let total = sqlx::query_scalar("SELECT count(*) FROM defenders WHERE seen >= ? AND withdrawn <= ?");
    let total = total.bind(since).bind(wanted.all).fetch_one(&mut *reading).await.map_err(StoreError::from)?;
    Ok(Paged { rows: rows.into_iter().map(|row| Shown::of(&console, row)).collect(), total })
}

/// `DELETE defenders/{id}`: its certificate is worth nothing any more. What it has told stays.
async fn withdraw(State(console): State<Arc<Console>>, user: User, Name(id): Name) -> Result<StatusCode, ApiError> {
    let mut writing = console.store.begin().await?;
    let query = sqlx::query_scalar("SELECT name FROM defenders WHERE id = ? AND withdrawn = 0").bind(id.clone());
    let name: Option<String> = writing.value(query).await?;
    let name = name.ok_or_else(|| ApiError::NotFound(format!("there is no Defender '{id}'")))?;
    let update = sqlx::query("UPDATE defenders SET withdrawn = 1, modified = ? WHERE id = ?");
    writing.execute(update.bind(unix_time()).bind(id.clone())).await?;
    let difference = audit_log::difference(&json!({ "name": name }), &Value::Null);
    audit_log::record(&mut writing, &user, "withdraw", &format!("Defender '{id}'"), difference).await?;
    writing.commit().await?;
    console.defenders.disconnect(&id, "this Defender is withdrawn");
    Ok(StatusCode::OK)
}

/// Which events are wanted.
#[derive(Debug, Deserialize, JsonSchema)]
struct WantedEvents {
    /// At most this many rows; 50 if not given.
    #[schemars(range(min = 1, max = 1000))]
    limit: Option<u32>,
    /// This many newer rows are skipped.
    offset: Option<u32>,
    /// Instead of an offset: the `X-Next-Cursor` of the page before, or `first`.
    cursor: Option<String>,
    /// Only those of the Defender with this id.
    defender: Option<String>,
}

/// An event as it is shown.
#[derive(Debug, Serialize, JsonSchema)]
struct ShownEvent {
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

macro_rules! statements {
    ($of:literal) => {
        Statements {
            page: concat!(
                "SELECT e.id AS row, d.id, d.name, e.sequence, e.time, e.received, e.kind, e.event \
                 FROM defender_events e JOIN defenders d ON d.number = e.defender WHERE ",
                $of,
                " AND e.id < ?2 ORDER BY e.id DESC LIMIT ?3 OFFSET ?4"
            ),
            count: concat!("SELECT count(*) FROM defender_events e WHERE ", $of),
        }
    };
}

const ALL: Statements = statements!("?1 IS ?1");
const OF_ONE: Statements = statements!("e.defender = ?1");

/// `GET defenders/events`.
async fn events(
    State(console): State<Arc<Console>>,
    Search(wanted): Search<WantedEvents>,
) -> Result<Response, ApiError> {
    let (limit, _) = Page { limit: wanted.limit, offset: None }.bounds()?;
    let start = Start::<i64>::of(wanted.cursor.as_deref(), wanted.offset)?;
    let number = match &wanted.defender {
        Some(id) => {
            let found = tables::find(&console.store, id).await?;
            Some(found.ok_or_else(|| ApiError::NotFound(format!("there is no Defender '{id}'")))?.number)
        }
        None => None,
    };
    let statements = if number.is_some() { OF_ONE } else { ALL };
    let mut reading = console.store.read().await?;
    let mut total = None;
    if start.is_counted() {
        let count = sqlx::query_scalar(statements.count).bind(number);
        total = Some(count.fetch_one(&mut *reading).await.map_err(StoreError::from)?);
    }
    let (before, offset) = start.bounds(i64::MAX);
    let query = sqlx::query_as(statements.page).bind(number).bind(before).bind(limit + 1).bind(offset);
    let mut rows: Vec<Stored> = query.fetch_all(&mut *reading).await.map_err(StoreError::from)?;
    let headers = page_headers(&mut rows, limit, total, |row| row.row);
    let shown = |Stored { defender, name, sequence, time, received, kind, event, .. }| ShownEvent {
        defender,
        name,
        sequence,
        time,
        received,
        kind,
        event,
    };
    let rows: Vec<ShownEvent> = rows.into_iter().map(shown).collect();
    Ok((headers, Json(rows)).into_response())
}

/// `GET defenders/policy`.
async fn policy(State(console): State<Arc<Console>>) -> Result<Json<Policy>, ApiError> {
    Ok(Json(policy_of(&console.store).await?))
}

/// `POST defenders/policy`: all that are connected have it within a moment. Its version is up to the Console.
async fn set_policy(
    State(console): State<Arc<Console>>,
    user: User,
    Body(wanted): Body<Policy>,
) -> Result<Json<Policy>, ApiError> {
    wanted.check().map_err(ApiError::bad)?;
    let mut writing = console.store.begin().await?;
    let before: Policy = writing.setting(POLICY).await?.unwrap_or_default();
    let wanted = Policy { version: before.version + 1, ..wanted };
    writing.set_setting(POLICY, &wanted).await?;
    let difference = audit_log::difference(&before, &wanted);
    audit_log::record(&mut writing, &user, "set", "defenders/policy", difference).await?;
    writing.commit().await?;
    console.defenders.announce(wanted.clone());
    Ok(Json(wanted))
}

#[cfg(test)]
mod tests {
    use super::{super::test_console::TestConsole, *};

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
        let wanted = json!({ "version": 99, "paths": [{ "path": "/etc", "recursive": true }], "perMinute": 5 });
        let (status, set) = ask(Method::POST, wanted).await;
        assert_eq!((status, &set["version"]), (StatusCode::OK, &json!(1)));
        assert_eq!(ask(Method::GET, Value::Null).await.1, set);
        assert_eq!(announced.borrow().as_ref().unwrap().version, 1);
        let (_, rows) = test.call(Method::GET, "/api/v1/audits/mgmt?limit=1", &admin, Value::Null).await;
        assert_eq!((&rows[0]["what"], &rows[0]["user"]), (&json!("defenders/policy"), &json!("admin")));
    }

    #[tokio::test]
    async fn lists_show_what_is_stored() {
        let test = TestConsole::start().await;
        let admin = test.login().await;
        let insert = "INSERT INTO defenders (id, name, key, registered, modified, seen, expires, version) \
                      VALUES ('d', 'host', 'k', 1, 2, ?, 4, '0.1.0'), ('e', 'away', 'l', 1, 2, 3, 4, '99.1')";
        test.console.store.write(sqlx::query(insert).bind(unix_time())).await.unwrap();
        let get =
            async |path: &str| test.call(Method::GET, &format!("/api/v1/defenders{path}"), &admin, Value::Null).await.1;
        let rows = get("").await;
        assert_eq!(rows.as_array().unwrap().len(), 1, "{rows}");
        let expected = json!({ "id": "d", "connected": false, "lastModified": 2, "certificateExpiration": 4,
            "version": "0.1.0", "compatibleVersion": true });
        expected.as_object().unwrap().iter().for_each(|(name, value)| assert_eq!(&rows[0][name], value, "{name}"));
        let rows = get("?all=true").await;
        assert_eq!((&rows[0]["name"], &rows[0]["compatibleVersion"]), (&json!("away"), &json!(false)));
        let events: Vec<_> = (1..=3)
            .map(|sequence| wire::Numbered { sequence, time: 5, kind: "file".into(), event: json!({ "n": sequence }) })
            .collect();
        tables::store_events(&test.console.store, 1, &events).await.unwrap();
        for path in ["/events", "/events?defender=d", "/events?cursor=first"] {
            let rows = get(path).await;
            assert_eq!((&rows[0]["sequence"], &rows[2]["event"]), (&json!(3), &json!({ "n": 1 })), "{path}: {rows}");
        }
        assert_eq!(get("/events?defender=e").await, json!([]));
        let gone = test.call(Method::DELETE, "/api/v1/defenders/d", &admin, Value::Null).await;
        assert_eq!(gone.0, StatusCode::OK, "{gone:?}");
        assert_eq!(get("").await, json!([]));
        assert_eq!(tables::store_events(&test.console.store, 1, &events).await.unwrap(), None, "withdrawn");
    }
}
