//! Who sends a request: a bearer token, the page's cookie, or Basic. Must never keep a token or a password in clear.
//!
//! A token has 256 random bits: nobody guesses one, so whoever holds one is never slowed down. What people guess is
//! passwords: see [`super::logins`].

use std::net::IpAddr;

use axum::http::{HeaderMap, Method, header};
use base64::{Engine, prelude::BASE64_STANDARD};

use super::{
    Console, audit_log, cookie,
    errors::ApiError,
    logins::Verdict,
    password::LONGEST,
    store::{StoreError, Writing},
    tokens,
    user::{From, Login, Role, Source, User, role_of},
};
use crate::telemetry::LOGINS_REFUSED;

const WRONG: ApiError = ApiError::Unauthorized("wrong user name or password");
/// How every join token begins. No token of `authenticate` does: those have no dot.
const JOIN_TOKEN: &str = "TWJ1.";

/// A name and a password that were right.
pub(super) struct Verified {
    pub(super) role: Role,
    hash: String,
}

impl Verified {
    /// Refuses if the password was changed in the meantime, or the user deleted.
    pub(super) async fn recheck(&self, writing: &mut Writing, name: &str) -> Result<(), ApiError> {
        let query = sqlx::query_scalar("SELECT password = ? FROM users WHERE name = ?");
        let query = query.bind(self.hash.clone()).bind(name.to_owned());
        let same: Option<bool> = writing.value(query).await?;
        if same == Some(true) { Ok(()) } else { Err(WRONG) }
    }
}

/// Checks a name and a password. A wrong one is audited if its hash was computed.
pub(super) async fn verify(console: &Console, login: Login, from: IpAddr) -> Result<Verified, ApiError> {
    verify_noting(console, login, from).await.map(|(verified, _)| verified)
}

/// Verifies a login. True if the hash was computed, not remembered.
async fn verify_noting(console: &Console, login: Login, from: IpAddr) -> Result<(Verified, bool), ApiError> {
    let name = login.username.clone();
    if name.len() > LONGEST || login.password.len() > LONGEST {
        return Err(WRONG);
    }
    let mut reading = console.store.read().await?;
    let query = sqlx::query_as("SELECT password, role FROM users WHERE name = ?").bind(name.clone());
    let stored: Option<(String, String)> = query.fetch_optional(&mut *reading).await.map_err(StoreError::from)?;
    // There are few readers: none is kept during the computation.
    drop(reading);
    let (hash, role) = stored.unzip();
    let verdict = console.logins.verify(login, hash.clone(), from).await;
    let why = match &verdict {
        Ok(Verdict { right: true, .. }) => None,
        Ok(_) => Some("wrong"),
        Err(ApiError::TooMany(_)) => Some("wait"),
        Err(_) => Some("busy"),
    };
    if let Some(why) = why {
        metrics::counter!(LOGINS_REFUSED, "why" => why).increment(1);
    }
    let Verdict { right, computed } = verdict?;
    if !right {
        if computed {
            audit_log::note_login(&console.store, &name, from, false).await;
        }
        return Err(WRONG);
    }
    let (hash, role) = hash.zip(role).ok_or(WRONG)?;
    Ok((Verified { role: role_of(&name, &role)?, hash }, computed))
}

/// Finds out who sends this request, and verifies it.
pub(super) async fn identify(
    console: &Console,
    method: &Method,
    headers: &HeaderMap,
    Source(from): Source,
) -> Result<User, ApiError> {
    if !headers.contains_key(header::AUTHORIZATION)
        && let Some(token) = cookie::token(headers)
    {
        if !method.is_safe() {
            cookie::check_page(headers)?;
        }
        return tokens::find(console, token, from, true).await;
    }
    match credentials(headers) {
        Some(Credentials::Bearer(token)) => tokens::find(console, &token, from, false).await,
        Some(Credentials::Basic(login)) => {
            let name = login.username.clone();
            let (Verified { role, .. }, computed) = verify_noting(console, login, from).await?;
            if computed {
                audit_log::note_login(&console.store, &name, from, true).await;
            }
            Ok(User { name, role, from: From::Network(from), session: None })
        }
        None => Err(ApiError::Unauthorized("log in with a bearer token or with Basic")),
    }
}

/// The bearer token of a request, of whatever kind.
pub(super) fn bearer(headers: &HeaderMap) -> Option<String> {
    match credentials(headers)? {
        Credentials::Bearer(token) => Some(token),
        Credentials::Basic(_) => None,
    }
}

/// The join token that is sent as a bearer token, valid or not.
pub(super) fn join_token(headers: &HeaderMap) -> Option<String> {
    match credentials(headers)? {
        Credentials::Bearer(token) if token.starts_with(JOIN_TOKEN) => Some(token),
        _ => None,
    }
}

enum Credentials {
    Bearer(String),
    Basic(Login),
}

/// What the Authorization header carries, if it can be read.
fn credentials(headers: &HeaderMap) -> Option<Credentials> {
    let (scheme, value) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let value = value.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(Credentials::Bearer(value.to_owned()));
    }
    if !scheme.eq_ignore_ascii_case("basic") || value.len() > 4 * LONGEST {
        return None;
    }
    let text = String::from_utf8(BASE64_STANDARD.decode(value).ok()?).ok()?;
    let (username, password) = text.split_once(':')?;
    Some(Credentials::Basic(Login { username: username.to_owned(), password: password.to_owned() }))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn read(value: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        credentials(&headers).map(|credentials| match credentials {
            Credentials::Bearer(token) => token,
            Credentials::Basic(login) => format!("{}/{}", login.username, login.password),
        })
    }

    #[test]
    fn credentials_are_read_from_the_header() {
        assert_eq!(read("Bearer abc").as_deref(), Some("abc"));
        assert_eq!(read("bearer  abc ").as_deref(), Some("abc"));
        assert_eq!(read("Basic YWRtaW46YTpi").as_deref(), Some("admin/a:b"));
        for bad in ["", "Basic", "Basic ???", "Basic YWRtaW4=", "Digest x"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
