//! `settings/notifications`: where events are sent, and a test of it; and `/metrics`, for those who would rather fetch.
//! Must never give a secret back.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, Method},
    response::Response,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Console, ConsoleServices, auth,
    errors::ApiError,
    extract::Body,
    route::{Access, Entry, node, route},
    user::{Role, Source, User},
};
use crate::{
    cluster::shared::webhook::Webhook,
    events::{Severity, check_url, notify::Delivery},
    health::Permission,
};

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    const ADMINISTRATORS: Access = Access::Roles(Role::ADMINISTRATORS);
    let path = "/settings/notifications";
    let test = "/settings/notifications/test";
    vec![
        node(Method::GET, path, ADMINISTRATORS, "Where events are sent", settings).answer::<Settings>(),
        node(Method::POST, path, ADMINISTRATORS, "Set where events are sent", set)
            .operates("set", "notifications")
            .body::<Wish>(),
        node(Method::POST, test, ADMINISTRATORS, "Send a test event everywhere", send_test)
            .operates("test", "notifications")
            .answer::<Vec<Delivery>>(),
        route(Method::GET, "/metrics", Access::Open, "For Prometheus: needs METRICS_TOKEN or a login", metrics)
            .here(own_metrics)
            .at_once()
            .at_root()
            .tag("metrics")
            .file("text/plain"),
    ]
}

/// A webhook as it is set.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Hook {
    /// Different from that of every other webhook.
    #[schemars(length(min = 1, max = 64))]
    name: String,
    /// `https://` or `http://`; redirects are not followed.
    #[schemars(length(max = 512))]
    url: String,
    /// Key of the signature in `x-twistlock-signature`. Not given: as it was; empty: none.
    #[schemars(length(max = 128))]
    secret: Option<String>,
    /// The only authority that its certificate may come from, in PEM.
    #[schemars(length(max = 2048))]
    ca: Option<String>,
    /// The least severe event that is sent.
    #[serde(default = "usual")]
    severity: Severity,
}

fn usual() -> Severity {
    Severity::Warning
}

/// All webhooks as they are set.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Wish {
    #[schemars(length(max = 3))]
    webhooks: Vec<Hook>,
}

/// A webhook as it is shown.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct Shown {
    name: String,
    url: String,
    ca: Option<String>,
    severity: String,
    /// It has a secret.
    signed: bool,
}

/// Where events are sent.
#[derive(Serialize, JsonSchema)]
pub(super) struct Settings {
    webhooks: Vec<Shown>,
    /// The PRIMARY has a NOTIFY_COMMAND, too. That is set only in the twistlock.cfg of each host.
    command: bool,
}

fn shown((webhook, signed): (Webhook, bool)) -> Shown {
    let Webhook { name, url, ca, severity, .. } = webhook;
    Shown { name, url, ca, severity, signed }
}

async fn settings(State(services): State<ConsoleServices>) -> Result<Json<Settings>, ApiError> {
    let webhooks = services.admin.webhooks().into_iter().map(shown).collect();
    Ok(Json(Settings { webhooks, command: services.notifier.has_command() }))
}

async fn set(State(services): State<ConsoleServices>, user: User, Body(wish): Body<Wish>) -> Result<(), ApiError> {
    let admin = &services.admin;
    let webhooks = wish.webhooks.into_iter().map(|hook| {
        let Hook { name, url, secret, ca, severity } = hook;
        let webhook = Webhook { name, url, secret, ca, severity: severity.word().to_owned() };
        check_url(&webhook).map(|()| webhook).map_err(ApiError::bad)
    });
    let webhooks = webhooks.collect::<Result<Vec<_>, _>>()?;
    Ok(admin.set_webhooks(webhooks, &user.actor()).await?)
}

async fn send_test(State(services): State<ConsoleServices>, user: User) -> Result<Json<Vec<Delivery>>, ApiError> {
    Ok(Json(services.admin.test_notifications(&user.actor(), services.notifier.test()).await))
}

/// `GET /metrics`: the health port without a token shows them to whoever reaches it, which an administrator has
/// decided; the Console's port is open to more people.
async fn metrics(
    State(console): State<Arc<Console>>,
    source: Source,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let page = &console.services()?.metrics;
    // A login first: a token of a session is no guess at the other one.
    let login = auth::identify(&console, &Method::GET, &headers, source).await;
    let Err(denied) = login else { return Ok(page.shown()) };
    if !page.needs_token() {
        return Err(denied);
    }
    match page.permission(&headers, source.0) {
        Permission::Granted => Ok(page.shown()),
        Permission::Denied => Err(denied),
        Permission::Wait(wait) => Err(ApiError::TooMany(wait.as_secs() + 1)),
    }
}

/// The metrics on the control socket.
async fn own_metrics(State(services): State<ConsoleServices>) -> Response {
    services.metrics.shown()
}
