//! The routes of the health port. Each check's answer is a code, which a balancer reads, and a JSON body, which a
//! person reads; the status page is for people in a browser, and the same as JSON for programs.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    extract::{ConnectInfo, Query, State},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    middleware,
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Serialize;
use serde_json::json;

use super::{Sources, checks, claim::Claim, page, report::Report};
use crate::{cluster::Role, node::Status};

/// The loop turns once per tick; one that has not turned for this long does no work. `?within=` asks for another limit.
const LIVE: Duration = Duration::from_secs(1);
/// What `?within=` may ask for, in milliseconds.
const WITHIN: std::ops::RangeInclusive<u64> = 50..=60_000;

/// The routes for those who are let in.
pub(super) fn router(sources: Sources) -> Router {
    Router::new()
        .route("/", get(root))
        .route("/primary", get(primary))
        .route("/secondary", get(secondary))
        .route("/status", get(status))
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .fallback(nothing)
        .layer(middleware::map_response(mark))
        .with_state(sources)
}

/// The routes for those who are not let in: they are told what to do about it. The metrics have a token of their own.
pub(super) fn for_strangers(sources: Sources) -> Router {
    let mut router = Router::new();
    if sources.settings.metrics.needs_token() {
        router = router.route("/metrics", get(metrics));
    }
    router.fallback(not_allowed).layer(middleware::map_response(mark)).with_state(sources)
}

/// What a balancer may think of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// PRIMARY with a valid lease and open ports.
    Primary,
    /// In its place as SECONDARY.
    Secondary,
    /// Anything else: on its way to a role, cut off, removed, or its loop does not turn.
    Other,
}

/// The codes for the three standings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Codes {
    primary: StatusCode,
    secondary: StatusCode,
    other: StatusCode,
}

/// `GET /`: as `/primary`, and in a browser with the status page below the code; with `?format` it is the status page.
async fn root(
    sources: State<Sources>,
    claim: Extension<Arc<Claim>>,
    query: Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Response {
    if query.contains_key("format") {
        return status(sources, claim, query, headers).await;
    }
    if !wants_page(&headers, false) {
        return primary(sources, claim, query).await;
    }
    let serves = claim.make();
    let checked = primary(sources.clone(), claim, query).await;
    page::shown(checked.status(), &Report::of(&sources, serves))
}

/// `GET /status`: the status page; as JSON where `?format=json` or the header `Accept` asks for it.
async fn status(
    State(sources): State<Sources>,
    Extension(claim): Extension<Arc<Claim>>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Response {
    let format = query.get("format").map(String::as_str);
    let as_page = match format {
        None => wants_page(&headers, true),
        Some("html") => true,
        Some("json") => false,
        Some(other) => return refuse(format!("format: found \"{other:.40}\", allowed: html, json")),
    };
    if query.len() > usize::from(format.is_some()) {
        return refuse("unknown parameter, allowed: format".to_owned());
    }
    let report = Report::of(&sources, claim.make());
    let mut response = match as_page {
        true => page::shown(StatusCode::OK, &report),
        false => Json(report).into_response(),
    };
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("accept"));
    response
}

/// True if HTML is asked for rather than JSON. `usual` is the answer for those who take either.
fn wants_page(headers: &HeaderMap, usual: bool) -> bool {
    let mut wish = (None, None);
    let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    for range in values.flat_map(|value| value.split(',')) {
        let mut parts = range.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
        let weight = parts.find_map(|part| part.strip_prefix("q=")?.parse::<f32>().ok()).unwrap_or(1.0);
        let place = match kind.as_str() {
            "text/html" | "application/xhtml+xml" => &mut wish.0,
            "application/json" => &mut wish.1,
            _ => continue,
        };
        *place = Some(place.unwrap_or(0.0_f32).max(weight));
    }
    match wish {
        (None, None) => usual,
        (page, json) => page.unwrap_or(0.0) >= json.unwrap_or(0.0) && page != Some(0.0) && page.is_some(),
    }
}

/// The answer for those who are not let in.
async fn not_allowed(headers: HeaderMap) -> Response {
    const WHAT: &str = "This host does not answer your address";
    const WHY: &str = "HEALTH_ALLOW in its twistlock.cfg says who is answered here: this host itself and the members, if it says \
                       nothing else. Add your address or network to it on every member and restart twistlockd there, one member \
                       after the other. Or ask on a member: sudo twistcli ha status";
    if wants_page(&headers, false) {
        return page::refused(StatusCode::FORBIDDEN, WHAT, WHY);
    }
    (StatusCode::FORBIDDEN, Json(json!({ "err": format!("{WHAT}. {WHY}") }))).into_response()
}

/// `GET /primary`: 200 where the Console is, 503 elsewhere.
async fn primary(
    sources: State<Sources>,
    claim: Extension<Arc<Claim>>,
    query: Query<HashMap<String, String>>,
) -> Response {
    let unavailable = StatusCode::SERVICE_UNAVAILABLE;
    let usual = Codes { primary: StatusCode::OK, secondary: unavailable, other: unavailable };
    tell(&sources, &claim, &query, usual)
}

/// `GET /secondary`: 200 on a SECONDARY, 503 elsewhere.
async fn secondary(
    sources: State<Sources>,
    claim: Extension<Arc<Claim>>,
    query: Query<HashMap<String, String>>,
) -> Response {
    let unavailable = StatusCode::SERVICE_UNAVAILABLE;
    let usual = Codes { primary: unavailable, secondary: StatusCode::OK, other: unavailable };
    tell(&sources, &claim, &query, usual)
}

fn tell(sources: &Sources, claim: &Claim, query: &HashMap<String, String>, usual: Codes) -> Response {
    let codes = match usual.with(query) {
        Ok(codes) => codes,
        Err(problem) => return refuse(problem),
    };
    let status = sources.status();
    let standing = match status.role {
        _ if claim.make() => Standing::Primary,
        Role::Secondary if sources.turned().is_some_and(|age| age < LIVE) => Standing::Secondary,
        _ => Standing::Other,
    };
    let code = match standing {
        Standing::Primary => codes.primary,
        Standing::Secondary => codes.secondary,
        Standing::Other => codes.other,
    };
    (code, Json(Body::of(&status, standing == Standing::Primary))).into_response()
}

/// The body of a check. No secrets, and of the members only who is primary.
#[derive(Debug, Serialize)]
struct Body {
    name: String,
    state: Role,
    /// PRIMARY with a valid lease and open ports.
    serves: bool,
    epoch: u64,
    primary: Option<String>,
    lag: u64,
    warnings: usize,
    /// What is wrong with the disk of this host, if anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    disk: Option<String>,
}

impl Body {
    fn of(status: &Status, serves: bool) -> Self {
        let member = |id| status.members.iter().find(|member| member.id == id);
        Self {
            name: status.name.clone(),
            state: status.role,
            serves,
            epoch: status.epoch,
            primary: status.primary.and_then(member).map(|member| member.name.clone()),
            lag: status.committed.saturating_sub(status.applied),
            warnings: status.warnings.len(),
            disk: crate::node::trouble(),
        }
    }
}

impl Codes {
    /// With the codes that the request asks for: `?primary=200&secondary=429&other=500`. A node that is not well never
    /// says that all is well, whatever is asked for.
    fn with(mut self, query: &HashMap<String, String>) -> Result<Self, String> {
        for (name, value) in query {
            let (code, may_be_200) = match name.as_str() {
                "primary" => (&mut self.primary, true),
                "secondary" => (&mut self.secondary, true),
                "other" => (&mut self.other, false),
                _ => return Err(format!("{name:.40}: unknown parameter, allowed: primary, secondary, other")),
            };
            let number = value.parse::<u16>().ok().filter(|n| (may_be_200 && *n == 200) || (400..=599).contains(n));
            let given = number.and_then(|number| StatusCode::from_u16(number).ok());
            *code = given.ok_or_else(|| {
                let allowed = if may_be_200 { "200, or 400 to 599" } else { "400 to 599" };
                format!("{name}: found \"{value:.40}\", allowed: {allowed}")
            })?;
        }
        Ok(self)
    }
}

/// `GET /livez`: 200 while the consensus loop turns. While no node runs there is nothing that could turn:
/// `?waiting=200` says yes then, for whoever would end a process that is not live.
async fn live(sources: State<Sources>, Query(query): Query<HashMap<String, String>>) -> Response {
    let (mut limit, mut while_waiting) = (LIVE, false);
    for (name, value) in &query {
        match (name.as_str(), value.parse()) {
            ("within", Ok(within)) if WITHIN.contains(&within) => limit = Duration::from_millis(within),
            ("waiting", Ok(200)) => while_waiting = true,
            _ => {
                let (least, most) = WITHIN.into_inner();
                return refuse(format!(
                    "found \"{name:.40}={value:.40}\", allowed: within={least} to {most} (milliseconds), waiting=200"
                ));
            }
        }
    }
    let age = sources.turned();
    let live = age.map_or(while_waiting, |age| age <= limit);
    let body = json!({ "live": live, "turned_ms_ago": age.map(|age| age.as_millis() as u64) });
    (code(live), Json(body)).into_response()
}

/// `GET /readyz`: 200 if this node does its work and could take over; `?verbose` lists all checks, not only those that
/// fail.
async fn ready(
    State(sources): State<Sources>,
    Extension(claim): Extension<Arc<Claim>>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let verbose = query.contains_key("verbose");
    if query.len() > usize::from(verbose) {
        return refuse("unknown parameter, allowed: verbose".to_owned());
    }
    // The checks tell the role.
    claim.make();
    // A small file is read, which a disk in trouble may keep from coming to an end.
    let checking = tokio::task::spawn_blocking(move || checks::all(&sources));
    let (checks, trouble) = match tokio::time::timeout(LIVE, checking).await {
        Ok(Ok(checks)) => (checks, crate::node::trouble()),
        Ok(Err(_)) => return code(false).into_response(),
        Err(_) => (Vec::new(), crate::node::trouble().or_else(|| Some("the checks wait for the disk".to_owned()))),
    };
    let mut checks = checks::with_disk(checks, trouble);
    let ready = checks.iter().all(|check| check.ok);
    checks.retain(|check| verbose || !check.ok);
    (code(ready), Json(json!({ "ready": ready, "checks": checks }))).into_response()
}

/// `GET /metrics`.
async fn metrics(
    State(sources): State<Sources>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    sources.settings.metrics.answer(&headers, from.ip())
}

async fn nothing(uri: Uri) -> Response {
    let text = format!(
        "there is nothing at {:.200}: try /status, /primary, /secondary, /livez, /readyz or /metrics",
        uri.path()
    );
    (StatusCode::NOT_FOUND, Json(json!({ "err": text }))).into_response()
}

fn code(fine: bool) -> StatusCode {
    if fine { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn refuse(problem: String) -> Response {
    (StatusCode::BAD_REQUEST, Json(json!({ "err": problem }))).into_response()
}

/// Marks an answer as good for the moment only.
async fn mark(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_browser_gets_the_page_and_a_program_what_it_asks_for() {
        let wants = |accept: &str, usual| {
            let headers = HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_str(accept).unwrap())]);
            wants_page(&headers, usual)
        };
        for usual in [true, false] {
            assert!(wants("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", usual));
            assert!(wants("application/json;q=0.5, text/html", usual));
            assert!(!wants("application/json", usual) && !wants("text/html;q=0.1, application/json", usual));
            assert!(!wants("text/html;q=0", usual));
            assert_eq!(wants("*/*", usual), usual);
            assert_eq!(wants_page(&HeaderMap::new(), usual), usual);
        }
    }
}
