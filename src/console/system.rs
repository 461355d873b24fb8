//! What the Console says about itself: `_ping`, `version`, `high-availability`, and the page at `/`.

use std::sync::Arc;

use axum::{Json, extract::State, response::Html};
use serde_json::Value;

use super::{Console, auth::User, errors::ApiError};

/// `GET _ping`: for load balancers. Needs no login, and one that comes with it is not looked at.
pub(super) async fn ping() -> &'static str {
    "OK"
}

/// `GET version`: the version of this program as a JSON string.
pub(super) async fn version(_: User) -> Json<&'static str> {
    Json(env!("CARGO_PKG_VERSION"))
}

/// `GET high-availability`: this node's picture of the cluster.
pub(super) async fn high_availability(State(console): State<Arc<Console>>, _: User) -> Result<Json<Value>, ApiError> {
    // Turned into JSON here and not by the response: a status holds the database and must not be kept.
    let status = serde_json::to_value(&**console.status.borrow());
    status.map(Json).map_err(|error| {
        tracing::error!("cannot write the status as JSON: {error}");
        ApiError::Internal
    })
}

/// `GET /`.
pub(super) async fn index() -> Html<&'static str> {
    Html(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Twistlock HA</title>\
         <h1>Twistlock HA</h1><p>This node is PRIMARY. The API is at <code>/api/v1</code>.</p></html>\n",
    )
}
