//! What the Console says about itself: `_ping` and `version`.

use axum::{Json, http::Method};

use super::route::{Access, Entry, route};
use crate::cluster::program_version;

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let get = Method::GET;
    vec![
        route(get.clone(), "/_ping", Access::Open, "For load balancers: 200 on the PRIMARY", ping).file("text/plain"),
        route(get, "/version", Access::Any, "The version of this program", version).answer::<String>(),
    ]
}

/// `GET _ping`: for load balancers. Needs no login, and ignores one that comes with it.
pub(super) async fn ping() -> &'static str {
    "OK"
}

/// `GET version`: the version of this program as a JSON string.
pub(super) async fn version() -> Json<&'static str> {
    Json(program_version())
}
