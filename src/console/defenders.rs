//! `defenders`: the agents of other hosts, their policy, and what they have told. Must never show a token.

pub(super) mod absence;
mod budget;
mod frames;
mod hub;
mod intake;
mod line;
mod lookups;
mod policies;
mod registration;
mod session;
mod tables;
pub(super) mod tokens;
mod told;
pub(super) mod trust;

use std::sync::Arc;

use axum::{
    Router,
    extract::{DefaultBodyLimit, State},
    http::{Method, StatusCode},
    routing::get,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub(super) use hub::Hub;
use policies::policy_of;

use self::tables::Listed;
use super::{
    BODY, Console, audit_log,
    clock::unix_time,
    errors::ApiError,
    extract::{Name, Search},
    paging::{Page, Paged},
    route::{Access, Entry, route},
    store::StoreError,
    user::{Role, User},
};
use crate::{
    cluster::program_version,
    defender::wire::{self, Facts, Registered, Registration},
    telemetry,
};

/// The routes of this file and of those below it.
pub(super) fn routes() -> Vec<Entry> {
    let (get, post) = (Method::GET, Method::POST);
    let installers = Access::Roles(Role::INSTALLERS);
    let own = vec![
        route(get, "/defenders", Access::Any, "The Defenders, by name", list)
            .query::<Wanted>()
            .paged()
            .answer::<Vec<Shown>>(),
        route(Method::DELETE, "/defenders/{id}", installers, "Withdraw a Defender for good", withdraw)
            .changes("withdraw", "Defender"),
        route(post.clone(), "/defenders/tokens", installers, "Invite hosts to become Defenders", tokens::invite)
            .changes("invite", "Defenders")
            .body::<tokens::Wish>()
            .answer::<tokens::Invitation>(),
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
    ];
    [own, told::routes(), policies::routes(), absence::routes()].into_iter().flatten().collect()
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

/// Which Defenders are wanted.
#[derive(Debug, Deserialize, JsonSchema)]
struct Wanted {
    /// At most this many rows; 50 if not given.
    #[schemars(range(min = 1, max = 1000))]
    limit: Option<u32>,
    /// This many rows of the list are skipped.
    offset: Option<u32>,
    /// Also those that were removed or withdrawn.
    #[serde(default)]
    all: bool,
    /// Only those in this state.
    state: Option<Standing>,
    /// Only those whose name or host name has this in it; capital letters or not.
    name: Option<String>,
    /// Only those whose program is of this version.
    version: Option<String>,
}

/// How a Defender stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
enum Standing {
    Connected,
    /// It is not connected.
    Away,
    /// It has been away for longer than `settings/defenders` permits.
    Alert,
    /// It was away for so long that it has to be registered again.
    Removed,
    /// Somebody has shut it out.
    Withdrawn,
}

impl Standing {
    /// As the list is searched for it.
    fn word(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Away => "away",
            Self::Alert => "alert",
            Self::Removed => "removed",
            Self::Withdrawn => "withdrawn",
        }
    }
}

/// A Defender as it is shown.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct Shown {
    id: String,
    name: String,
    state: Standing,
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
    fn of(console: &Console, row: Listed) -> Self {
        let Listed { defender: row, alerted } = row;
        let address = console.defenders.address(&row.id).filter(|_| !row.withdrawn);
        let connected = address.is_some();
        let state = match (row.withdrawn, row.removed) {
            (true, true) => Standing::Removed,
            (true, false) => Standing::Withdrawn,
            _ if connected => Standing::Connected,
            _ if alerted => Standing::Alert,
            _ => Standing::Away,
        };
        Self {
            state,
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

/// The Defenders that are wanted. Parameters: 1 the ids of those that are connected, as JSON, 2 whether those that may
/// not connect are wanted, 3 the state, 4 a part of the name, 5 the version.
macro_rules! wanted {
    ($what:literal, $end:literal) => {
        concat!(
            "SELECT ",
            $what,
            " FROM defenders d LEFT JOIN defender_alerts a ON a.defender = d.number WHERE (?2 OR d.withdrawn = 0) \
             AND (?3 IS NULL OR ?3 = CASE WHEN d.withdrawn = 2 THEN 'removed' WHEN d.withdrawn THEN 'withdrawn' \
             WHEN d.id IN (SELECT value FROM json_each(?1)) THEN 'connected' \
             WHEN a.since IS NOT NULL THEN 'alert' ELSE 'away' END) \
             AND (?4 IS NULL OR instr(lower(d.name), lower(?4)) > 0 \
             OR instr(lower(d.facts ->> 'hostname'), lower(?4)) > 0) AND (?5 IS NULL OR d.version = ?5)",
            $end
        )
    };
}

/// `GET defenders`.
async fn list(State(console): State<Arc<Console>>, Search(wanted): Search<Wanted>) -> Result<Paged<Shown>, ApiError> {
    let (limit, offset) = Page { limit: wanted.limit, offset: wanted.offset }.bounds()?;
    let Wanted { state, name, version, .. } = wanted;
    let all = wanted.all || matches!(state, Some(Standing::Removed | Standing::Withdrawn));
    // They are asked for only if it matters: there may be many.
    let connected = if state.is_some() { json!(console.defenders.ids()) } else { json!([]) }.to_string();
    let (state, name) = (state.map(Standing::word), name.filter(|name| !name.is_empty()));
    let version = version.filter(|version| !version.is_empty());
    let mut reading = console.store.read().await?;
    let rows = wanted!("d.*, a.since IS NOT NULL AS alerted", " ORDER BY d.name, d.number LIMIT +?6 OFFSET ?7");
    let rows = sqlx::query_as(rows).bind(connected.clone()).bind(all).bind(state).bind(name.clone());
    let rows = rows.bind(version.clone()).bind(limit).bind(offset).fetch_all(&mut *reading).await;
    let rows: Vec<Listed> = rows.map_err(StoreError::from)?;
    let total = sqlx::query_scalar(wanted!("count(*)", "")).bind(connected).bind(all).bind(state).bind(name);
    let total = total.bind(version).fetch_one(&mut *reading).await.map_err(StoreError::from)?;
    Ok(Paged { rows: rows.into_iter().map(|row| Shown::of(&console, row)).collect(), total })
}

/// `DELETE defenders/{id}`: its certificate is worth nothing any more. What it has told stays.
async fn withdraw(State(console): State<Arc<Console>>, user: User, Name(id): Name) -> Result<StatusCode, ApiError> {
    let mut writing = console.store.begin().await?;
    let query = sqlx::query_scalar("SELECT name FROM defenders WHERE id = ? AND withdrawn <> 1").bind(id.clone());
    let name: Option<String> = writing.value(query).await?;
    let name = name.ok_or_else(|| ApiError::NotFound(format!("there is no Defender '{id}'")))?;
    let update = sqlx::query("UPDATE defenders SET withdrawn = 1, modified = ? WHERE id = ?");
    writing.execute(update.bind(unix_time()).bind(id.clone())).await?;
    let end = "DELETE FROM defender_alerts WHERE defender IN (SELECT number FROM defenders WHERE id = ?)";
    writing.execute(sqlx::query(end).bind(id.clone())).await?;
    let difference = audit_log::difference(&json!({ "name": name }), &Value::Null);
    audit_log::record(&mut writing, &user, "withdraw", &format!("Defender '{id}'"), difference).await?;
    writing.commit().await?;
    console.defenders.disconnect(&id, "this Defender is withdrawn");
    Ok(StatusCode::OK)
}

#[cfg(test)]
mod tests {
    use super::{super::test_console::TestConsole, *};

    #[tokio::test]
    async fn the_list_is_searched_by_state_name_and_version() {
        let test = TestConsole::start().await;
        let admin = test.login().await;
        let insert = "INSERT INTO defenders (id, name, key, facts, version, registered, modified, seen, expires, withdrawn) \
                      SELECT value ->> 0, value ->> 1, value ->> 0, value ->> 2, value ->> 3, 1, 1, 1, 1, value ->> 4 \
                      FROM json_each(?)";
        let facts = |host: &str| json!({ "hostname": host }).to_string();
        let all = json!([
            ["a", "Web1", facts("one.example"), "0.1.0", 0],
            ["b", "web2", facts("two.example"), "0.2.0", 0],
            ["c", "db", facts("three.example"), "0.1.0", 0],
            ["d", "old", facts(""), "0.1.0", 2],
            ["e", "bad", facts(""), "0.1.0", 1],
        ]);
        let store = &test.console.store;
        store.write(sqlx::query(insert).bind(all.to_string())).await.unwrap();
        store.write(sqlx::query("INSERT INTO defender_alerts VALUES (2, 1)")).await.unwrap();
        let _seat = test.console.defenders.connect("c", "192.0.2.7:9".to_owned(), 0);
        for (query, expected) in [
            ("", "a b c"),
            ("all=true", "a e c d b"),
            ("state=connected", "c"),
            ("state=away", "a"),
            ("state=alert", "b"),
            ("state=removed", "d"),
            ("state=withdrawn", "e"),
            ("name=WEB", "a b"),
            ("name=three.e", "c"),
            ("name=web&version=0.1.0", "a"),
            ("name=&version=", "a b c"),
            ("name=%25", ""),
        ] {
            let (_, rows) = test.call(Method::GET, &format!("/api/v1/defenders?{query}"), &admin, Value::Null).await;
            let mut ids: Vec<_> = rows.as_array().unwrap().iter().map(|row| row["id"].as_str().unwrap()).collect();
            let mut expected: Vec<_> = expected.split_whitespace().collect();
            ids.sort_unstable();
            expected.sort_unstable();
            assert_eq!(ids, expected, "{query}");
            for row in rows.as_array().unwrap().iter().filter(|_| query.starts_with("state=")) {
                assert_eq!(row["state"].as_str(), query.strip_prefix("state="), "{row}");
            }
        }
        let (status, _) = test.call(Method::GET, "/api/v1/defenders?state=lost", &admin, Value::Null).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
    }

    #[tokio::test]
    async fn lists_show_what_is_stored() {
        let test = TestConsole::start().await;
        let admin = test.login().await;
        let insert = "INSERT INTO defenders (id, name, key, registered, modified, seen, expires, version) \
                      VALUES ('d', 'host', 'k', 1, 2, 3, 4, '0.1.0'), ('e', 'away', 'l', 1, 2, 3, 4, '99.1')";
        test.console.store.write(sqlx::query(insert)).await.unwrap();
        let out = sqlx::query("UPDATE defenders SET withdrawn = 1 WHERE id = 'e'");
        test.console.store.write(out).await.unwrap();
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
