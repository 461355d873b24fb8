//! `settings/initialized` and `signup`: the first administrator.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{Method, StatusCode},
};
use schemars::JsonSchema;
use serde::Serialize;

use super::{
    Console,
    auth::{LONGEST, Login, unix_time},
    errors::ApiError,
    extract::Body,
    routes::{Access, Entry, route},
    store::StoreError,
};

/// Shortest password in characters.
const SHORTEST_PASSWORD: usize = 8;
/// Longest name in characters.
const LONGEST_NAME: usize = 64;

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let initial = "Whether the first administrator exists";
    vec![
        route(Method::GET, "/settings/initialized", Access::Open, initial, initialized).answer::<Initialized>(),
        route(Method::POST, "/signup", Access::Open, "Create the first administrator, once", signup).body::<Login>(),
    ]
}

/// The answer of [`initialized`].
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Initialized {
    initialized: bool,
}

/// `GET settings/initialized`: whether the first administrator exists. Open to everybody.
pub(super) async fn initialized(State(console): State<Arc<Console>>) -> Result<Json<Initialized>, ApiError> {
    let mut reading = console.store.read().await?;
    let query = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM users)");
    let exists: bool = query.fetch_one(&mut *reading).await.map_err(StoreError::from)?;
    Ok(Json(Initialized { initialized: exists }))
}

/// `POST signup`: creates the first administrator, once.
pub(super) async fn signup(
    State(console): State<Arc<Console>>,
    Body(login): Body<Login>,
) -> Result<StatusCode, ApiError> {
    let done = || ApiError::bad("system already initialized");
    check(&login)?;
    // Asked first, so that a password hash is not spent on every attempt; asked again in the transaction.
    let Json(state) = initialized(State(Arc::clone(&console))).await?;
    if state.initialized {
        return Err(done());
    }
    let hash = console.logins.hasher.turn().await?.hash(login.password).await?;
    let mut writing = console.store.begin().await?;
    if writing.number("SELECT count(*) FROM users").await? > 0 {
        return Err(done());
    }
    let insert = sqlx::query("INSERT INTO users (name, password, role, created) VALUES (?, ?, 'admin', ?)");
    writing.execute(insert.bind(login.username.clone()).bind(hash).bind(unix_time())).await?;
    writing.commit().await?;
    tracing::info!("signed up the first administrator '{}'", login.username);
    Ok(StatusCode::OK)
}

fn check(login: &Login) -> Result<(), ApiError> {
    let name = &login.username;
    let length = name.chars().count();
    if length == 0 || length > LONGEST_NAME || name.contains(|c: char| c.is_control() || c == ':') {
        return Err(ApiError::bad(format!(
            "username must have 1 to {LONGEST_NAME} characters, no ':' and no control characters"
        )));
    }
    if login.password.chars().count() < SHORTEST_PASSWORD || login.password.len() > LONGEST {
        return Err(ApiError::bad(format!("password must have at least {SHORTEST_PASSWORD} characters")));
    }
    Ok(())
}
