//! What the Console says about itself: `_ping`, `version`, and the page at `/`.

use axum::{Json, response::Html};

use super::auth::User;

/// `GET _ping`: for load balancers. Needs no login, and one that comes with it is not looked at.
pub(super) async fn ping() -> &'static str {
    "OK"
}

/// `GET version`: the version of this program as a JSON string.
pub(super) async fn version(_: User) -> Json<&'static str> {
    Json(env!("CARGO_PKG_VERSION"))
}

/// `GET /`.
pub(super) async fn index() -> Html<&'static str> {
    Html(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Twistlock HA</title>\
         <h1>Twistlock HA</h1><p>This node is PRIMARY. The API is at <code>/api/v1</code>.</p></html>\n",
    )
}
