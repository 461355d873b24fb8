//! What the Console says about itself: `_ping`, `version`, and the page at `/`.

use axum::{Json, http::Method, response::Html};

use super::routes::{Access, Entry, route};

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let get = Method::GET;
    vec![
        route(get.clone(), "/", Access::Open, "The page", index).at_root().file("text/html").tag("page"),
        route(get.clone(), "/_ping", Access::Open, "For load balancers: 200 on the PRIMARY", ping).file("text/plain"),
        route(get, "/version", Access::Any, "The version of this program", version).answer::<String>(),
    ]
}

/// `GET _ping`: for load balancers. Needs no login, and one that comes with it is not looked at.
pub(super) async fn ping() -> &'static str {
    "OK"
}

/// `GET version`: the version of this program as a JSON string.
pub(super) async fn version() -> Json<&'static str> {
    Json(env!("CARGO_PKG_VERSION"))
}

/// `GET /`.
pub(super) async fn index() -> Html<&'static str> {
    Html(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Twistlock HA</title>\
         <h1>Twistlock HA</h1><p>This node is PRIMARY. The API is at <code>/api/v1</code>.</p></html>\n",
    )
}
