//! Who sends a request: bearer tokens from `POST authenticate`, or Basic. Tokens live in the replicated database, so
//! that nobody is logged out when the primary role moves. Must never keep a token or a password in clear.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use axum::{
    Json,
    extract::{ConnectInfo, FromRequestParts, State},
    http::{HeaderMap, Method, header, request::Parts},
};
use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use ring::{
    digest, hmac,
    rand::{SecureRandom, SystemRandom},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Console,
    errors::ApiError,
    extract::Body,
    password::Hasher,
    routes::{Access, Entry, Role, route},
    store::StoreError,
    throttle::Throttle,
};

/// How long a token is valid.
const TOKEN_LIFE: Duration = Duration::from_secs(30 * 60);
/// How long a verified name and password need not be verified again: else each request would cost a password hash.
const CACHE_LIFE: Duration = Duration::from_secs(60);
/// Verified names and passwords remembered.
const CACHE_SIZE: usize = 1024;
/// The page's token. The prefix makes browsers insist on Secure, on the path `/` and on no domain.
pub(super) const COOKIE: &str = "__Host-twistlock";
const WRONG: ApiError = ApiError::Unauthorized("wrong user name or password");
/// How every join token begins; no token of `authenticate` does, since those have no dot.
const JOIN_TOKEN: &str = "TWJ1.";
/// Longest name and password that are looked at, in bytes.
pub(super) const LONGEST: usize = 1024;

/// The sender of a request, verified: what a handler behind a route that asks for one may take as an argument.
#[derive(Clone, Debug)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) role: Role,
    pub(super) from: IpAddr,
}

/// What verification needs besides the database.
#[derive(Debug)]
pub(super) struct Logins {
    pub(super) hasher: Hasher,
    throttle: Throttle,
    /// Random for each process, so that the table below is of no use to anybody else.
    key: hmac::Key,
    verified: Mutex<HashMap<[u8; 32], Instant>>,
}

impl Logins {
    pub(super) fn new() -> Result<Self, ring::error::Unspecified> {
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())?;
        Ok(Self { hasher: Hasher::new(), throttle: Throttle::default(), key, verified: Mutex::default() })
    }

    /// With the stored hash, so that a changed password is not remembered as a good one.
    fn tag(&self, login: &Login, stored: Option<&str>) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.key);
        for part in [&login.username, stored.unwrap_or_default(), &login.password] {
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part.as_bytes());
        }
        let mut tag = [0; 32];
        tag.copy_from_slice(context.sign().as_ref());
        tag
    }

    fn is_verified(&self, tag: &[u8; 32]) -> bool {
        let verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        verified.get(tag).is_some_and(|since| since.elapsed() < CACHE_LIFE)
    }

    fn remember(&self, tag: [u8; 32]) {
        let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        if verified.len() >= CACHE_SIZE {
            verified.retain(|_, since| since.elapsed() < CACHE_LIFE);
        }
        if verified.len() < CACHE_SIZE {
            verified.insert(tag, Instant::now());
        }
    }

    /// Checks a name and a password against the hash of that user, if there is one.
    async fn verify(&self, login: Login, stored: Option<String>) -> Result<(), ApiError> {
        let tag = self.tag(&login, stored.as_deref());
        if self.is_verified(&tag) {
            return Ok(());
        }
        let slow_down = |wait: Duration| ApiError::TooMany(wait.as_secs() + 1);
        // Asked here too, so that nobody queues up in vain.
        let wait = self.throttle.wait(&login.username, Instant::now());
        if !wait.is_zero() {
            return Err(slow_down(wait));
        }
        let turn = self.hasher.turn().await?;
        // Of many requests that came with the same password at once, only the first ones compute.
        if self.is_verified(&tag) {
            return Ok(());
        }
        self.throttle.attempt(&login.username, Instant::now()).map_err(slow_down)?;
        if !turn.verify(login.password, stored).await? {
            return Err(WRONG);
        }
        self.throttle.succeeded(&login.username);
        self.remember(tag);
        Ok(())
    }
}

/// A name and a password: the body of `signup` and `authenticate`, or what Basic carries.
#[derive(Deserialize, JsonSchema)]
pub(super) struct Login {
    pub(super) username: String,
    pub(super) password: String,
}

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    vec![
        route(Method::POST, "/authenticate", Access::Open, "Log in: a token for a name and a password", authenticate)
            .body::<Login>()
            .answer::<Token>(),
    ]
}

/// The answer of `authenticate`.
#[derive(Serialize, JsonSchema)]
pub(super) struct Token {
    token: String,
}

/// `POST authenticate`.
pub(super) async fn authenticate(
    State(console): State<Arc<Console>>,
    Body(login): Body<Login>,
) -> Result<Json<Token>, ApiError> {
    let name = login.username.clone();
    verify(&console, login).await?;
    let mut secret = [0; 32];
    SystemRandom::new().fill(&mut secret).map_err(|_| ApiError::Internal)?;
    let token = BASE64_URL_SAFE_NO_PAD.encode(secret);
    let now = unix_time();
    let mut writing = console.store.begin().await?;
    writing.execute(sqlx::query("DELETE FROM tokens WHERE expires <= ?").bind(now)).await?;
    let insert = sqlx::query("INSERT INTO tokens (digest, user, expires, began) VALUES (?, ?, ?, ?)");
    let insert = insert.bind(digest_of(&token)).bind(name).bind(now + TOKEN_LIFE.as_secs() as i64).bind(now);
    writing.execute(insert).await?;
    writing.commit().await?;
    Ok(Json(Token { token }))
}

fn digest_of(token: &str) -> Vec<u8> {
    digest::digest(&digest::SHA256, token.as_bytes()).as_ref().to_vec()
}

/// Seconds since 1970. The wall clock, not a monotonic one: another node may check the token's expiry.
pub(super) fn unix_time() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64)
}

/// Checks a name and a password; returns the role.
async fn verify(console: &Console, login: Login) -> Result<Role, ApiError> {
    let name = login.username.clone();
    if name.len() > LONGEST || login.password.len() > LONGEST {
        return Err(WRONG);
    }
    let mut reading = console.store.read().await?;
    let query = sqlx::query_as("SELECT password, role FROM users WHERE name = ?").bind(name.clone());
    let stored: Option<(String, String)> = query.fetch_optional(&mut *reading).await.map_err(StoreError::from)?;
    // Not kept during the computation: there are few of them.
    drop(reading);
    let (stored, role) = stored.unzip();
    console.logins.verify(login, stored).await?;
    role_of(&name, &role.ok_or(WRONG)?)
}

/// Who sends this request, verified.
pub(super) async fn identify(
    console: &Console,
    _method: &Method,
    headers: &HeaderMap,
    Source(from): Source,
) -> Result<User, ApiError> {
    match credentials(headers) {
        Some(Credentials::Bearer(token)) => bearer(console, &token, from).await,
        Some(Credentials::Basic(login)) => {
            let name = login.username.clone();
            let role = verify(console, login).await?;
            Ok(User { name, role, from })
        }
        None => Err(ApiError::Unauthorized("log in with a bearer token or with Basic")),
    }
}

/// The address that a request comes from: what guesses of secrets are counted against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source(pub(super) IpAddr);

impl FromRequestParts<Arc<Console>> for Source {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<Console>) -> Result<Self, ApiError> {
        // Whoever serves the connection puts it there.
        let info = parts.extensions.get::<ConnectInfo<SocketAddr>>().ok_or(ApiError::Internal)?;
        Ok(Self(info.0.ip()))
    }
}

/// The join token that is sent as a bearer token, good or not.
pub(super) fn join_token(headers: &HeaderMap) -> Option<String> {
    match credentials(headers)? {
        Credentials::Bearer(token) if token.starts_with(JOIN_TOKEN) => Some(token),
        _ => None,
    }
}

async fn bearer(console: &Console, token: &str, from: IpAddr) -> Result<User, ApiError> {
    const INVALID: ApiError = ApiError::Unauthorized("the token is not valid or has expired");
    let mut reading = console.store.read().await?;
    let query = "SELECT users.name, users.role FROM tokens JOIN users ON users.name = tokens.user \
                 WHERE tokens.digest = ? AND tokens.expires > ?";
    let query = sqlx::query_as(query).bind(digest_of(token)).bind(unix_time());
    let user: Option<(String, String)> = query.fetch_optional(&mut *reading).await.map_err(StoreError::from)?;
    let (name, role) = user.ok_or(INVALID)?;
    Ok(User { role: role_of(&name, &role)?, name, from })
}

/// A role that this program does not know: of a newer one, so it permits nothing here.
fn role_of(name: &str, role: &str) -> Result<Role, ApiError> {
    Role::of(role).ok_or_else(|| {
        tracing::error!("user '{name}' has the role '{role}', which this version does not know");
        ApiError::Forbidden("this version does not know your role".to_owned())
    })
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

    #[test]
    fn the_cache_is_bounded_and_tells_logins_apart() {
        let logins = Logins::new().unwrap();
        let login = |username: &str, password: &str| Login { username: username.into(), password: password.into() };
        assert_ne!(logins.tag(&login("ab", "c"), None), logins.tag(&login("a", "bc"), None));
        assert_ne!(logins.tag(&login("a", "b"), Some("old")), logins.tag(&login("a", "b"), Some("new")));
        for number in 0..CACHE_SIZE + 5 {
            logins.remember(logins.tag(&login("a", &number.to_string()), None));
        }
        assert_eq!(logins.verified.lock().unwrap().len(), CACHE_SIZE);
        assert!(logins.is_verified(&logins.tag(&login("a", "0"), None)));
        assert!(!logins.is_verified(&logins.tag(&login("b", "0"), None)));
    }

    #[test]
    fn of_many_guesses_at_once_a_handful_is_computed() {
        let logins = Arc::new(Logins::new().unwrap());
        let guess = |number: u32| {
            let logins = logins.clone();
            let login = Login { username: "admin".into(), password: number.to_string() };
            async move { logins.verify(login, None).await.unwrap_err() }
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        let guesses: Vec<_> = (0..100).map(|number| runtime.spawn(guess(number))).collect();
        let mut computed = 0;
        for guess in guesses {
            match runtime.block_on(guess).unwrap() {
                ApiError::Unauthorized(_) => computed += 1,
                ApiError::TooMany(_) => {}
                other => panic!("{other}"),
            }
        }
        // Six, and a few more if this machine takes seconds for them.
        assert!((6..=9).contains(&computed), "{computed} guesses were computed");
    }
}
