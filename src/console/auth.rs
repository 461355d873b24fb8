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
    http::{HeaderMap, header, request::Parts},
};
use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use ring::{
    digest, hmac,
    rand::{SecureRandom, SystemRandom},
};
use serde::{Deserialize, Serialize};

use super::{
    Console, errors::ApiError, extract::Body, password::Hasher, programs, store::StoreError, throttle::Throttle,
};

/// How long a token is valid.
const TOKEN_LIFE: Duration = Duration::from_secs(30 * 60);
/// How long a verified name and password need not be verified again: else each request would cost a password hash.
const CACHE_LIFE: Duration = Duration::from_secs(60);
/// Verified names and passwords remembered.
const CACHE_SIZE: usize = 1024;
/// The role that may change the cluster, as the database has it.
const ADMINISTRATOR: &str = "admin";
/// The roles that may let a host ask to join: Defender Manager or higher.
const INSTALLERS: [&str; 3] = [ADMINISTRATOR, "operator", "defenderManager"];
/// How every join token begins; no token of `authenticate` does, since those have no dot.
const JOIN_TOKEN: &str = "TWJ1.";
/// Longest name and password that are looked at, in bytes.
pub(super) const LONGEST: usize = 1024;

/// The sender of a request, verified. Handlers that take it as an argument are closed to strangers.
#[derive(Clone, Debug)]
pub(super) struct User {
    pub(super) name: String,
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

    fn tag(&self, login: &Login) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(&(login.username.len() as u64).to_le_bytes());
        context.update(login.username.as_bytes());
        context.update(login.password.as_bytes());
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

    /// Checks a name and a password; `stored` reads the hash of that user, if it comes to that.
    async fn verify(
        &self,
        login: Login,
        stored: impl Future<Output = Result<Option<String>, ApiError>>,
    ) -> Result<(), ApiError> {
        const WRONG: ApiError = ApiError::Unauthorized("wrong user name or password");
        if login.username.len() > LONGEST || login.password.len() > LONGEST {
            return Err(WRONG);
        }
        let tag = self.tag(&login);
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
        let stored = stored.await?;
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
#[derive(Deserialize)]
pub(super) struct Login {
    pub(super) username: String,
    pub(super) password: String,
}

/// The answer of `authenticate`.
#[derive(Serialize)]
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
    let insert = sqlx::query("INSERT INTO tokens (digest, user, expires) VALUES (?, ?, ?)");
    let insert = insert.bind(digest_of(&token)).bind(name).bind(now + TOKEN_LIFE.as_secs() as i64);
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

/// Checks a name and a password.
async fn verify(console: &Console, login: Login) -> Result<(), ApiError> {
    let name = login.username.clone();
    let stored = async {
        let mut reading = console.store.read().await?;
        let query = sqlx::query_scalar("SELECT password FROM users WHERE name = ?").bind(name);
        Ok(query.fetch_optional(&mut *reading).await.map_err(StoreError::from)?)
    };
    console.logins.verify(login, stored).await
}

impl FromRequestParts<Arc<Console>> for User {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, console: &Arc<Console>) -> Result<Self, ApiError> {
        match credentials(&parts.headers) {
            Some(Credentials::Bearer(token)) => bearer(console, &token).await,
            Some(Credentials::Basic(login)) => {
                let name = login.username.clone();
                verify(console, login).await?;
                Ok(User { name })
            }
            None => Err(ApiError::Unauthorized("log in with a bearer token or with Basic")),
        }
    }
}

/// A user who may change the cluster.
#[derive(Clone, Debug)]
pub(super) struct Administrator(pub(super) User);

impl FromRequestParts<Arc<Console>> for Administrator {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, console: &Arc<Console>) -> Result<Self, ApiError> {
        let user = User::from_request_parts(parts, console).await?;
        permit(console, &user, &[ADMINISTRATOR], "an Administrator").await?;
        Ok(Self(user))
    }
}

/// Who may have the join script and the programs.
#[derive(Clone)]
pub(super) enum Installer {
    User(User),
    /// A host that is no member yet, by its join token.
    Host {
        token: String,
    },
}

impl FromRequestParts<Arc<Console>> for Installer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, console: &Arc<Console>) -> Result<Self, ApiError> {
        let source = Source::from_request_parts(parts, console).await?;
        if let Some(host) = programs::installer(console, &parts.headers, source)? {
            return Ok(host);
        }
        let user = User::from_request_parts(parts, console).await?;
        permit(console, &user, &INSTALLERS, "a Defender Manager or higher").await?;
        Ok(Self::User(user))
    }
}

async fn permit(console: &Console, user: &User, roles: &[&str], needed: &str) -> Result<(), ApiError> {
    let mut reading = console.store.read().await?;
    let query = sqlx::query_scalar("SELECT role FROM users WHERE name = ?").bind(&user.name);
    let role: Option<String> = query.fetch_optional(&mut *reading).await.map_err(StoreError::from)?;
    if role.is_some_and(|role| roles.contains(&role.as_str())) {
        return Ok(());
    }
    Err(ApiError::Forbidden(format!("this needs the role of {needed}")))
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

async fn bearer(console: &Console, token: &str) -> Result<User, ApiError> {
    let mut reading = console.store.read().await?;
    let query = sqlx::query_scalar("SELECT user FROM tokens WHERE digest = ? AND expires > ?");
    let query = query.bind(digest_of(token)).bind(unix_time());
    let user: Option<String> = query.fetch_optional(&mut *reading).await.map_err(StoreError::from)?;
    user.map(|name| User { name }).ok_or(ApiError::Unauthorized("the token is not valid or has expired"))
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
        assert_ne!(logins.tag(&login("ab", "c")), logins.tag(&login("a", "bc")));
        for number in 0..CACHE_SIZE + 5 {
            logins.remember(logins.tag(&login("a", &number.to_string())));
        }
        assert_eq!(logins.verified.lock().unwrap().len(), CACHE_SIZE);
        assert!(logins.is_verified(&logins.tag(&login("a", "0"))));
        assert!(!logins.is_verified(&logins.tag(&login("b", "0"))));
    }

    #[test]
    fn of_many_guesses_at_once_a_handful_is_computed() {
        let logins = Arc::new(Logins::new().unwrap());
        let guess = |number: u32| {
            let logins = logins.clone();
            let login = Login { username: "admin".into(), password: number.to_string() };
            async move { logins.verify(login, async { Ok(None) }).await.unwrap_err() }
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
