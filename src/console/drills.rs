//! `high-availability/drill`: a takeover for practice, as `twistcli ha drill` runs it. It has one row in the audit: its
//! writes, its takeover and its end are asked for with the drill's own token, which is good for nothing else. Must
//! never let that token write anything else.

use std::sync::Arc;

use axum::{
    Json,
    extract::{FromRequestParts, State},
    http::{HeaderMap, Method, StatusCode, request::Parts},
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use data_encoding::HEXLOWER;
use ring::{
    digest,
    rand::{SecureRandom, SystemRandom},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Console,
    audit_log::{self, DRILL, Drilled},
    auth,
    clock::unix_time,
    errors::ApiError,
    extract::Body,
    route::{Access, Entry, route},
    store::StoreError,
    user::{Role, User, admitted},
};
use crate::admin::{Act, Outcome, SwitchoverReport, Ticket};

/// How the token of a drill begins.
const TOKEN: &str = "TWD1.";
/// How long a drill may last, in seconds.
pub(super) const LONGEST: i64 = 900;
/// Writes of one drill.
const WRITES: u32 = 50_000;
/// Longest sentence about the result, in characters.
const TEXT: usize = 300;
const DESCRIPTION: &str = "rehearsal of a takeover";

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    const ADMINISTRATORS: Access = Access::Roles(Role::ADMINISTRATORS);
    let (get, post) = (Method::GET, Method::POST);
    let begin = route(post.clone(), "/high-availability/drill", ADMINISTRATORS, "Begin a drill", begin)
        .operates(DRILL, "high availability")
        .body::<Plan>()
        .answer::<Begun>();
    let parts = vec![
        route(post.clone(), "/high-availability/drill/writes", Access::Drill, "Make one write of a drill", write)
            .body::<u32>(),
        route(
            get,
            "/high-availability/drill/writes",
            Access::Drill,
            "List the writes of a drill that are there",
            writes,
        )
        .answer::<Vec<u32>>(),
        route(
            post.clone(),
            "/high-availability/drill/takeover",
            Access::Drill,
            "Begin the switchover of a drill",
            take_over,
        )
        .answer::<SwitchoverReport>()
        .status(StatusCode::ACCEPTED),
        route(post, "/high-availability/drill/end", Access::Drill, "End a drill, and remove its writes", end)
            .body::<Upshot>()
            .answer::<Removed>(),
    ];
    std::iter::once(begin).chain(parts.into_iter().map(Entry::traced)).collect()
}

/// How the role is to be taken.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum How {
    Switchover,
    /// The process of the PRIMARY is killed on its host.
    Kill,
}

/// The body of [`begin`].
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Plan {
    takeover: How,
}

/// The answer of [`begin`].
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Begun {
    /// The bearer token of all that follows, on every member.
    token: String,
    /// The tags that are written have this and a number as their names.
    prefix: String,
    /// The port of HTTPS of all Consoles.
    https_port: Option<u16>,
}

/// The result of a drill.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Upshot {
    /// Another member took over, and every acknowledged write is there.
    ok: bool,
    /// The outcome, for people.
    text: String,
}

/// The answer of [`end`].
#[derive(Serialize, JsonSchema)]
pub(super) struct Removed {
    /// How many tags were removed.
    removed: u64,
}

/// A drill that is under way: what [`Access::Drill`] leaves for the handlers.
#[derive(Clone, Debug)]
pub(super) struct Drill {
    ticket: String,
    row: Drilled,
}

impl FromRequestParts<Arc<Console>> for Drill {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<Console>) -> Result<Self, ApiError> {
        admitted(parts)
    }
}

impl Drill {
    fn tag(&self, number: impl std::fmt::Display) -> String {
        format!("{}{number}", prefix(&self.ticket))
    }
}

fn prefix(ticket: &str) -> String {
    format!("drill-{ticket}-")
}

fn digest_of(secret: &str) -> String {
    HEXLOWER.encode(digest::digest(&digest::SHA256, secret.as_bytes()).as_ref())
}

/// The drill whose token a request carries.
///
/// # Errors
/// `Unauthorized` if there is no such drill, or it is over.
pub(super) async fn identify(console: &Console, headers: &HeaderMap) -> Result<Drill, ApiError> {
    const NONE: ApiError = ApiError::Unauthorized("the token is not that of a drill that is under way");
    let text = auth::bearer(headers).ok_or(NONE)?;
    let mut parts = text.strip_prefix(TOKEN).ok_or(NONE)?.splitn(3, '.');
    let (Some(id), Some(ticket), Some(secret)) = (parts.next(), parts.next(), parts.next()) else { return Err(NONE) };
    let id: i64 = id.parse().map_err(|_| NONE)?;
    let row = audit_log::drill(&console.store, id, ticket).await?.ok_or(NONE)?;
    // These are digests: the time that the comparison takes says nothing about the secret.
    let same = row.secret == digest_of(secret);
    match same && unix_time() - row.time < LONGEST {
        true => Ok(Drill { ticket: ticket.to_owned(), row }),
        false => Err(NONE),
    }
}

/// `POST high-availability/drill`.
async fn begin(
    State(console): State<Arc<Console>>,
    user: User,
    Body(plan): Body<Plan>,
) -> Result<Json<Begun>, ApiError> {
    let admin = &console.services()?.admin;
    admin.check_primary()?;
    let mut secret = [0; 32];
    SystemRandom::new().fill(&mut secret).map_err(|_| ApiError::Internal)?;
    let secret = BASE64_URL_SAFE_NO_PAD.encode(secret);
    let ticket = format!("{:016x}", rand::random::<u64>());
    let act = Act::new(DRILL, "high availability").wish(&plan);
    let status = console.status.borrow().clone();
    let at = (status.name.as_str(), status.epoch);
    let (actor, wanted) = (user.actor(), Ticket(ticket.clone()));
    let id = audit_log::begin_drill(&console.store, &wanted, (&actor, &act), at, &digest_of(&secret)).await?;
    tracing::info!(by = %actor, "a drill begins");
    let token = format!("{TOKEN}{id}.{ticket}.{secret}");
    Ok(Json(Begun { token, prefix: prefix(&ticket), https_port: admin.https_port() }))
}

/// `POST high-availability/drill/writes` with the number of the write; the same one may come twice.
async fn write(State(console): State<Arc<Console>>, drill: Drill, Body(number): Body<u32>) -> Result<(), ApiError> {
    if number >= WRITES {
        return Err(ApiError::bad(format!("a drill has at most {WRITES} writes")));
    }
    let insert = "INSERT INTO tags (name, color, description) VALUES (?, '', ?) ON CONFLICT DO UPDATE SET color = ''";
    console.store.write(sqlx::query(insert).bind(drill.tag(number)).bind(DESCRIPTION)).await?;
    Ok(())
}

/// `GET high-availability/drill/writes`.
async fn writes(State(console): State<Arc<Console>>, drill: Drill) -> Result<Json<Vec<u32>>, ApiError> {
    let mut reading = console.store.read().await?;
    let query = sqlx::query_scalar::<_, String>("SELECT name FROM tags WHERE name GLOB ?").bind(drill.tag('*'));
    let names = query.fetch_all(&mut *reading).await.map_err(StoreError::from)?;
    let prefix = prefix(&drill.ticket);
    Ok(Json(names.iter().filter_map(|name| name.strip_prefix(&prefix)?.parse().ok()).collect()))
}

/// `POST high-availability/drill/takeover`: as `POST high-availability/switchover`, but part of the drill.
async fn take_over(
    State(console): State<Arc<Console>>,
    drill: Drill,
) -> Result<(StatusCode, Json<SwitchoverReport>), ApiError> {
    let admin = &console.services()?.admin;
    let report = admin.begin_switchover_of_drill(&drill.row.user)?;
    if let Some(why) = report.objections() {
        return Err(ApiError::Conflict(why));
    }
    Ok((StatusCode::ACCEPTED, Json(report)))
}

/// `POST high-availability/drill/end`: removes the tags of the drill, and writes its result into its row.
async fn end(
    State(console): State<Arc<Console>>,
    drill: Drill,
    Body(Upshot { ok, text }): Body<Upshot>,
) -> Result<Json<Removed>, ApiError> {
    let text: String = text.chars().filter(|c| !c.is_control()).take(TEXT).collect();
    let mut writing = console.store.begin().await?;
    let delete = sqlx::query("DELETE FROM tags WHERE name GLOB ?").bind(drill.tag('*'));
    let removed = writing.execute(delete).await?;
    let outcome = if ok { Outcome::Done } else { Outcome::Failed(text.clone()) };
    audit_log::end_drill(&mut writing, drill.row, &outcome, &text).await?;
    writing.commit().await?;
    Ok(Json(Removed { removed }))
}
