//! `high-availability`: the cluster's status, and what an administrator does to it; and the two resources with which a
//! host that is no member asks to become one. Owns the roles and the HTTP side; what is done is up to [`crate::admin`].

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, Method, StatusCode},
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    Console, ConsoleServices, auth,
    errors::ApiError,
    extract::{Body, Name, OptionalBody, Search},
    route::{Access, Entry, node, route},
    user::{Role, Source, User},
};
use crate::{
    admin::{AdminError, SwitchoverReport},
    join::{JoinRequest, RequestState},
    node::Status,
};

impl From<AdminError> for ApiError {
    fn from(error: AdminError) -> Self {
        match error {
            AdminError::Refused(why) => Self::Conflict(why),
            AdminError::Denied(why) => Self::Forbidden(why),
            AdminError::TooMany(why) => Self::Request(StatusCode::TOO_MANY_REQUESTS, why),
            AdminError::Unknown(why) => Self::Unknown(why),
            AdminError::NotPrimary { .. } => Self::Unavailable(error.to_string()),
        }
    }
}

impl Console {
    /// # Errors
    /// When this Console runs without a cluster.
    pub(super) fn services(&self) -> Result<&ConsoleServices, ApiError> {
        self.services.as_ref().ok_or_else(super::no_cluster)
    }
}

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let (get, post) = (Method::GET, Method::POST);
    let mut all = vec![
        route(get.clone(), "/high-availability", Access::Any, "The state of the cluster", status)
            .here(own_status)
            .at_once()
            .answer::<Map<String, Value>>(),
        route(post, "/high-availability/requests", Access::Open, "Ask to join, with a join token", request)
            .operates("ask to join", "host")
            .body::<JoinRequest>()
            .answer::<RequestState>()
            .status(StatusCode::ACCEPTED),
        route(
            get.clone(),
            "/high-availability/requests/{id}",
            Access::Open,
            "Where a request to join stands",
            request_state,
        )
        .answer::<RequestState>(),
        node(get, "/high-availability/console", Access::Any, "Where the Consoles are", place)
            .answer::<Consoles>()
            .on_socket_alone()
            .at_once(),
    ];
    all.extend(operations());
    all
}

/// The operations of administrators.
fn operations() -> Vec<Entry> {
    const ADMINISTRATORS: Access = Access::Roles(Role::ADMINISTRATORS);
    let (post, put, delete) = (Method::POST, Method::PUT, Method::DELETE);
    vec![
        node(delete.clone(), "/high-availability/requests/{id}", ADMINISTRATORS, "Turn a host down", reject)
            .operates("reject", "request to join")
            .answer::<Done>(),
        node(
            delete.clone(),
            "/high-availability/join-script",
            ADMINISTRATORS,
            "Close all invitations: join scripts that were given out no longer work",
            uninvite,
        )
        .operates("uninvite", "high availability")
        .answer::<Done>(),
        node(post.clone(), "/high-availability/apply", ADMINISTRATORS, "Admit the hosts that ask to join", apply)
            .operates("apply", "high availability")
            .optional_body::<Approval>()
            .answer::<Admitted>(),
        node(delete, "/high-availability/members/{member}", ADMINISTRATORS, "Remove a member", remove)
            .operates("remove", "member")
            .query::<Removal>()
            .answer::<Gone>(),
        node(
            put,
            "/high-availability/members/{member}/address",
            ADMINISTRATORS,
            "Change a member's address",
            readdress,
        )
        .operates("readdress", "member")
        .body::<Place>()
        .answer::<Done>(),
        node(post.clone(), "/high-availability/switchover", ADMINISTRATORS, "Hand the primary role over", switchover)
            .here(switchover_to_its_end)
            .operates("switchover", "high availability")
            .body::<Switchover>()
            .answer::<SwitchoverReport>()
            .status(StatusCode::ACCEPTED),
        node(post.clone(), "/high-availability/pause", ADMINISTRATORS, "Suspend automatic takeover for a while", pause)
            .operates("pause", "high availability")
            .body::<Pause>()
            .answer::<Paused>(),
        node(post.clone(), "/high-availability/rotate-key", ADMINISTRATORS, "Replace the cluster key", rotate_key)
            .operates("rotate", "cluster key")
            .answer::<Done>(),
        node(
            post.clone(),
            "/high-availability/rotate-ca",
            ADMINISTRATORS,
            "Replace the certificate authority",
            rotate_ca,
        )
        .operates("rotate", "certificate authority")
        .body::<Overlap>()
        .answer::<Done>(),
        node(post, "/high-availability/resume", ADMINISTRATORS, "End a pause", resume)
            .operates("resume", "high availability")
            .answer::<Done>(),
    ]
}

/// An answer that says nothing but that it is done.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Done {}

/// `GET high-availability`: the cluster as this node sees it.
pub(super) async fn status(State(console): State<Arc<Console>>, _: User) -> Result<Json<Value>, ApiError> {
    let status = console.status.borrow().clone();
    serde_json::to_value(&*status).map(Json).map_err(|error| {
        tracing::error!("cannot write the status as JSON: {error}");
        ApiError::Internal
    })
}

/// The status on the control socket, of any member.
async fn own_status(State(services): State<ConsoleServices>) -> Json<Status> {
    public(&services.admin.status())
}

/// A status without secrets: people pass it on when they ask for help.
pub(super) fn public(status: &Status) -> Json<Status> {
    Json(Status { membership: status.membership.public(), ..status.clone() })
}

/// `GET high-availability/console`: where the Consoles of the cluster are.
async fn place(State(services): State<ConsoleServices>) -> Json<Consoles> {
    Json(Consoles { https_port: services.admin.https_port() })
}

/// The answer of [`place`].
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Consoles {
    /// `MANAGEMENT_PORT_HTTPS`, the same on all members.
    pub https_port: Option<u16>,
}

/// `POST high-availability/requests`: a host asks to join. The join token is the bearer token.
pub(super) async fn request(
    State(console): State<Arc<Console>>,
    Source(from): Source,
    headers: HeaderMap,
    Body(request): Body<JoinRequest>,
) -> Result<(StatusCode, Json<RequestState>), ApiError> {
    let token = auth::join_token(&headers).ok_or(ApiError::Unauthorized("send the join token as a bearer token"))?;
    let state = console.services()?.admin.request(&token, from, request).await?;
    Ok((StatusCode::ACCEPTED, Json(state)))
}

/// `GET high-availability/requests/{id}`: where a request stands. Its id is a secret of the host that asked.
pub(super) async fn request_state(
    State(console): State<Arc<Console>>,
    Name(id): Name,
) -> Result<Json<RequestState>, ApiError> {
    let state = console.services()?.admin.request_state(&id);
    state.map(Json).ok_or_else(|| ApiError::NotFound("there is no such request to join, or it has expired".to_owned()))
}

/// `DELETE high-availability/join-script`: closes all invitations.
pub(super) async fn uninvite(State(services): State<ConsoleServices>, user: User) -> Result<Json<Done>, ApiError> {
    services.admin.uninvite(&user.actor()).await?;
    Ok(Json(Done {}))
}

/// The body of [`apply`], if there is one.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Approval {
    /// The fingerprints of all hosts that are to be admitted, as somebody has compared them.
    pub fingerprints: Option<Vec<String>>,
}

/// The answer of [`apply`]: the ids of those who were admitted.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Admitted {
    /// Their ids.
    pub admitted: Vec<u64>,
}

/// `POST high-availability/apply`: admits all hosts that ask; with their fingerprints only if no other one asks.
pub(super) async fn apply(
    State(services): State<ConsoleServices>,
    user: User,
    OptionalBody(approval): OptionalBody<Approval>,
) -> Result<Json<Admitted>, ApiError> {
    let compared = approval.and_then(|approval| approval.fingerprints);
    let admitted = services.admin.apply(compared, &user.actor()).await?;
    Ok(Json(Admitted { admitted }))
}

/// `DELETE high-availability/requests/{name or fingerprint}`: turns a host down.
pub(super) async fn reject(
    State(services): State<ConsoleServices>,
    user: User,
    Name(request): Name,
) -> Result<Json<Done>, ApiError> {
    services.admin.reject(&request, &user.actor()).await?;
    Ok(Json(Done {}))
}

/// The query of [`remove`].
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Removal {
    #[serde(default)]
    force: bool,
}

/// The answer of [`remove`].
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Gone {
    /// What remains to be done about what it knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// `DELETE high-availability/members/{id or name}?force=true`.
pub(super) async fn remove(
    State(services): State<ConsoleServices>,
    user: User,
    Name(member): Name,
    Search(removal): Search<Removal>,
) -> Result<Json<Gone>, ApiError> {
    let warning = services.admin.remove(&member, removal.force, &user.actor()).await?;
    Ok(Json(Gone { warning }))
}

/// The body of [`switchover`].
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Switchover {
    /// The member that is to take over; none: the best prepared one.
    pub to: Option<String>,
    /// Only check whether it could be done.
    #[serde(default)]
    pub dry_run: bool,
}

/// What [`switchover`] answers when a check fails.
#[derive(Serialize)]
struct Failed {
    err: String,
    #[serde(flatten)]
    report: SwitchoverReport,
}

/// `POST high-availability/switchover`: 202 with the checks, and the switchover begins right after: this node's ports
/// close, and the connection may end before or after the answer has come. 409 if a check fails. With `dryRun` 200 with
/// the checks, and nothing else.
pub(super) async fn switchover(
    State(services): State<ConsoleServices>,
    user: User,
    Body(wish): Body<Switchover>,
) -> Result<Response, ApiError> {
    let admin = &services.admin;
    if wish.dry_run {
        return Ok(Json(admin.check_switchover(wish.to.as_deref())?).into_response());
    }
    // Does not wait for the end: this request would be one of those that the switchover waits for.
    let report = admin.begin_switchover(wish.to.as_deref(), &user.actor()).await?;
    if let Some(failed) = report.checks.iter().find(|check| !check.ok) {
        let err = format!("{}: {}", failed.name, failed.detail);
        return Ok((StatusCode::CONFLICT, Json(Failed { err, report })).into_response());
    }
    Ok((StatusCode::ACCEPTED, Json(report)).into_response())
}

/// A switchover on the control socket: answers 200 with the checks and the gap when it is over. The switchover does not
/// wait for this request.
async fn switchover_to_its_end(
    State(services): State<ConsoleServices>,
    user: User,
    Body(wish): Body<Switchover>,
) -> Result<Json<SwitchoverReport>, ApiError> {
    let (admin, to) = (&services.admin, wish.to.as_deref());
    Ok(Json(if wish.dry_run { admin.check_switchover(to)? } else { admin.switchover(to, &user.actor()).await? }))
}

/// The body of [`pause`].
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pause {
    /// How long, in minutes.
    pub minutes: Option<u32>,
    /// How long, in seconds: one of the two.
    pub seconds: Option<u32>,
}

/// The answer of [`pause`]: when it ends by itself, in seconds since 1970.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Paused {
    /// In seconds since 1970.
    pub until: u64,
}

/// `POST high-availability/pause`: suspends automatic takeover.
pub(super) async fn pause(
    State(services): State<ConsoleServices>,
    user: User,
    Body(wish): Body<Pause>,
) -> Result<Json<Paused>, ApiError> {
    let seconds = match (wish.minutes, wish.seconds) {
        (Some(minutes), None) => u64::from(minutes) * 60,
        (None, Some(seconds)) => u64::from(seconds),
        _ => return Err(ApiError::bad("say how long: either minutes or seconds")),
    };
    let span = Duration::from_secs(seconds);
    let until = services.admin.pause(span, &user.actor()).await?;
    Ok(Json(Paused { until }))
}

/// `POST high-availability/resume`: ends a pause.
pub(super) async fn resume(State(services): State<ConsoleServices>, user: User) -> Result<Json<Done>, ApiError> {
    services.admin.resume(&user.actor()).await?;
    Ok(Json(Done {}))
}

/// `POST high-availability/rotate-key`: answers when the exchange has begun.
pub(super) async fn rotate_key(State(services): State<ConsoleServices>, user: User) -> Result<Json<Done>, ApiError> {
    services.admin.rotate_cluster_key(&user.actor()).await?;
    Ok(Json(Done {}))
}

/// The body of [`rotate_ca`].
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Overlap {
    /// How long the new authority is trusted before it signs, in seconds.
    pub overlap_sec: u32,
}

/// `POST high-availability/rotate-ca`: answers when the replacement has begun.
pub(super) async fn rotate_ca(
    State(services): State<ConsoleServices>,
    user: User,
    Body(Overlap { overlap_sec }): Body<Overlap>,
) -> Result<Json<Done>, ApiError> {
    services.admin.rotate_authority(Duration::from_secs(overlap_sec.into()), &user.actor()).await?;
    Ok(Json(Done {}))
}

/// The body of [`readdress`]; what is missing stays the same.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Its new name.
    pub name: Option<String>,
    /// Its new host name or IP address.
    pub address: Option<String>,
    /// Its new `HIGH_AVAILABILITY_PORT`.
    pub port: Option<u16>,
}

/// `PUT high-availability/members/{id or name}/address`.
pub(super) async fn readdress(
    State(services): State<ConsoleServices>,
    user: User,
    Name(member): Name,
    Body(place): Body<Place>,
) -> Result<Json<Done>, ApiError> {
    let Place { name, address, port } = place;
    services.admin.readdress(&member, name, address, port, &user.actor()).await?;
    Ok(Json(Done {}))
}

/// Refuses a join token that is not valid, and counts that against `from`.
pub(super) fn check_join_token(console: &Console, token: &str, from: IpAddr) -> Result<(), ApiError> {
    Ok(console.services()?.admin.check_token(token, from)?)
}
