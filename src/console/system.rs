//! What the Console says about itself: `_ping` and `version`.

use axum::Json;

use super::auth::User;

/// `GET _ping`: for load balancers. Needs no login, and one that comes with it is not looked at.
pub(super) async fn ping() -> &'static str {
    "OK"
}

/// `GET version`: the version of this program as a JSON string.
pub(super) async fn version(_: User) -> Json<&'static str> {
    Json(env!("CARGO_PKG_VERSION"))
}
