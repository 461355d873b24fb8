//! `authenticate`, its renewal, and `logout`: a session begins, goes on and ends.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Extension, State},
    http::{HeaderMap, Method, uri::Scheme},
    response::{AppendHeaders, IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use super::{
    Console, audit_log, auth, cookie,
    errors::ApiError,
    extract::Body,
    route::{Access, Entry, route},
    tokens::{self, GRACE, INVALID, Issued},
    user::{From, Login, Role, Source, User},
};
use crate::clients::places::Visit;

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let (get, post) = (Method::GET, Method::POST);
    vec![
        route(post.clone(), "/authenticate", Access::Open, "Log in: a token for a name and a password", authenticate)
            .traced()
            .body::<Login>()
            .answer::<Granted>(),
        route(get.clone(), "/authenticate", Access::Any, "Who is logged in, and for how long", current)
            .answer::<Granted>(),
        route(get, "/authenticate/renew", Access::Any, "A new token for one that is still valid", renew)
            .traced()
            .answer::<Granted>(),
        route(post, "/logout", Access::Any, "End the session of this token", logout).traced().tag("authenticate"),
    ]
}

/// The answer of a login.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Granted {
    /// Missing for the page, which gets a cookie, and where no new token was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
    username: String,
    role: Role,
    /// For how many more seconds the token is valid; missing for a login by Basic.
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_in_sec: Option<i64>,
}

fn answer(Issued { token, seconds }: Issued, user: User, page: bool) -> Result<Response, ApiError> {
    let cookie = page.then(|| cookie::set(&token, seconds)).transpose()?;
    let token = (!page).then_some(token);
    let granted = Granted { token, username: user.name, role: user.role, expires_in_sec: Some(seconds) };
    Ok((AppendHeaders(cookie), Json(granted)).into_response())
}

/// `POST authenticate`.
async fn authenticate(
    State(console): State<Arc<Console>>,
    Source(from): Source,
    (scheme, visit): (Option<Extension<Scheme>>, Option<Extension<Visit>>),
    headers: HeaderMap,
    Body(login): Body<Login>,
) -> Result<Response, ApiError> {
    let page = cookie::is_page(&headers);
    if page {
        cookie::check_scheme(scheme.as_deref())?;
        cookie::check_page(&headers)?;
    }
    let name = login.username.clone();
    let verified = auth::verify(&console, login, from).await?;
    let user = User { name, role: verified.role, from: From::Network(from), session: None };
    let mut writing = console.store.begin().await?;
    // The password may have changed since: a session with the old one would outlive the change.
    verified.recheck(&mut writing, &user.name).await?;
    if let Some(Extension(visit)) = visit {
        visit.vouch();
    }
    // Whoever planted a session in this browser loses it.
    if let Some(token) = cookie::token(&headers).filter(|_| page) {
        tokens::end(&mut writing, tokens::digest_of(token)).await?;
    }
    let issued = tokens::issue(&console, &mut writing, &user.name, None).await?;
    audit_log::record(&mut writing, &user, "login", "session", Value::Null).await?;
    writing.commit().await?;
    answer(issued, user, page)
}

/// `GET authenticate`.
async fn current(State(console): State<Arc<Console>>, user: User) -> Json<Granted> {
    let now = console.clock.now().await;
    let expires_in_sec = user.session.map(|session| session.expires - now);
    Json(Granted { token: None, username: user.name, role: user.role, expires_in_sec })
}

/// `GET authenticate/renew`: the old token stays valid for [`GRACE`] seconds. Not audited: nothing changes hands.
async fn renew(State(console): State<Arc<Console>>, headers: HeaderMap, user: User) -> Result<Response, ApiError> {
    let session = user.session.clone().ok_or_else(|| ApiError::bad("a login by Basic needs no renewal"))?;
    if session.page {
        // It is a GET that changes something.
        cookie::check_page(&headers)?;
    }
    let mut writing = console.store.begin().await?;
    // Nobody sets the clock while this has the writer's connection.
    let now = console.clock.now().await;
    let update = sqlx::query("UPDATE tokens SET expires = min(expires, ?) WHERE digest = ? AND expires > ?");
    if writing.execute(update.bind(now + GRACE).bind(session.digest.clone()).bind(now)).await? == 0 {
        return Err(INVALID);
    }
    let issued = tokens::issue(&console, &mut writing, &user.name, Some(&session)).await?;
    writing.commit().await?;
    answer(issued, user, session.page)
}

/// `POST logout`.
async fn logout(State(console): State<Arc<Console>>, user: User) -> Result<Response, ApiError> {
    let Some(session) = user.session.clone() else { return Ok(().into_response()) };
    let mut writing = console.store.begin().await?;
    tokens::end(&mut writing, session.digest).await?;
    audit_log::record(&mut writing, &user, "logout", "session", Value::Null).await?;
    writing.commit().await?;
    let cookie = session.page.then(cookie::clear).transpose()?;
    Ok(AppendHeaders(cookie).into_response())
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use serde_json::json;

    use super::{
        super::{settings::Logon, store::READERS, test_console::TestConsole},
        *,
    };

    async fn asks(test: &TestConsole, token: &str) -> (StatusCode, Value) {
        test.call(Method::GET, "/api/v1/authenticate", token, Value::Null).await
    }

    async fn renews(test: &TestConsole, token: &str) -> (StatusCode, Value) {
        test.call(Method::GET, "/api/v1/authenticate/renew", token, Value::Null).await
    }

    #[tokio::test]
    async fn a_session_ends_when_it_is_idle_and_when_it_is_old() {
        let test = TestConsole::start().await;
        let token = test.login().await;
        let (store, now) = (&test.console.store, test.console.clock.now().await);
        assert_eq!(asks(&test, &token).await.0, StatusCode::OK);
        store.write(sqlx::query("UPDATE tokens SET expires = ?").bind(now)).await.unwrap();
        assert_eq!(asks(&test, &token).await.0, StatusCode::UNAUTHORIZED);
        assert_eq!(renews(&test, &token).await.0, StatusCode::UNAUTHORIZED);

        let token = test.login().await;
        let age = Logon::default().maximum();
        store.write(sqlx::query("UPDATE tokens SET began = ?").bind(now - age + 20)).await.unwrap();
        let (status, granted) = renews(&test, &token).await;
        assert!(status == 200 && (1..=20).contains(&granted["expiresInSec"].as_i64().unwrap()), "{granted}");
        store.write(sqlx::query("UPDATE tokens SET began = ?").bind(now - age)).await.unwrap();
        assert_eq!(renews(&test, &token).await.0, StatusCode::UNAUTHORIZED);
        assert_eq!(asks(&test, &token).await.0, StatusCode::OK, "it is refused a new token, and goes on until its end");
    }

    /// And no longer than until something changes.
    #[tokio::test]
    async fn a_session_that_was_read_is_known() {
        let test = TestConsole::start().await;
        let (token, other) = (test.login().await, test.login().await);
        for token in [&token, &other] {
            assert_eq!(asks(&test, token).await.0, StatusCode::OK);
        }
        let tag = json!({ "name": "of no concern" });
        assert_eq!(test.call(Method::POST, "/api/v1/tags", &token, tag).await.0, StatusCode::OK);
        let mut readers = Vec::new();
        for _ in 0..READERS {
            readers.push(test.console.store.read().await.unwrap());
        }
        for token in [&token, &other] {
            let (status, answer) = asks(&test, token).await;
            assert_eq!(status, StatusCode::OK, "it is read again: {answer}");
        }
        drop(readers);
        let become_auditor = sqlx::query("UPDATE users SET role = 'auditor'");
        test.console.store.write(become_auditor).await.unwrap();
        assert_eq!(asks(&test, &token).await.1["role"], "auditor");
        assert_eq!(test.call(Method::POST, "/api/v1/logout", &token, Value::Null).await.0, StatusCode::OK);
        assert_eq!(asks(&test, &token).await.0, StatusCode::UNAUTHORIZED);
        assert_eq!(asks(&test, &other).await.0, StatusCode::OK);
        let gone = sqlx::query("DELETE FROM users WHERE name = 'admin'");
        test.console.store.write(gone).await.unwrap();
        assert_eq!(asks(&test, &other).await.0, StatusCode::UNAUTHORIZED, "its session goes with a user");
    }

    #[tokio::test]
    async fn a_renewed_token_is_good_for_a_moment_only() {
        let test = TestConsole::start().await;
        let old = test.login().await;
        let (status, granted) = renews(&test, &old).await;
        let new = format!("Bearer {}", granted["token"].as_str().unwrap());
        assert!(status == 200 && new != old && granted["username"] == "admin" && granted["role"] == "admin");
        let left = async |token| asks(&test, token).await.1["expiresInSec"].as_i64().unwrap();
        assert!(left(&old).await <= GRACE && left(&new).await > GRACE);
        assert_eq!(test.call(Method::POST, "/api/v1/logout", &new, Value::Null).await.0, StatusCode::OK);
        assert_eq!(asks(&test, &new).await.0, StatusCode::UNAUTHORIZED);
    }

    /// An answer that got lost, or a request that was on its way with the old one, logs nobody out.
    #[tokio::test]
    async fn a_renewed_token_has_its_moment_at_the_limit_of_sessions_too() {
        let test = TestConsole::start().await;
        let old = test.login().await;
        let logon = json!({ "sessionsPerUser": 1 });
        assert_eq!(test.call(Method::POST, "/api/v1/settings/logon", &old, logon).await.0, StatusCode::OK);
        let (status, granted) = renews(&test, &old).await;
        let new = format!("Bearer {}", granted["token"].as_str().unwrap());
        assert_eq!(status, StatusCode::OK);
        for token in [&old, &new] {
            assert_eq!(asks(&test, token).await.0, StatusCode::OK);
        }
        test.login().await;
        assert_eq!(asks(&test, &new).await.0, StatusCode::UNAUTHORIZED, "the limit holds");
    }

    #[tokio::test]
    async fn new_sessions_end_the_oldest_ones_of_the_same_user() {
        let test = TestConsole::start().await;
        let first = test.login().await;
        let logon = json!({ "sessionsPerUser": 2 });
        assert_eq!(test.call(Method::POST, "/api/v1/settings/logon", &first, logon).await.0, StatusCode::OK);
        let age = sqlx::query("UPDATE tokens SET expires = expires - 5");
        test.console.store.write(age).await.unwrap();
        let (second, third) = (test.login().await, test.login().await);
        assert_eq!(asks(&test, &first).await.0, StatusCode::UNAUTHORIZED);
        for token in [second, third] {
            assert_eq!(asks(&test, &token).await.0, StatusCode::OK);
        }
    }
}
