//! Who sends a request: a bearer token, the page's cookie, or Basic. Checks names and passwords, and slows down guessing.
//! Must never keep a token or a password in clear.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use axum::{
    extract::{ConnectInfo, FromRequestParts},
    http::{HeaderMap, Method, header, request::Parts},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use ring::{hmac, rand::SystemRandom};
use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    Console, audits, cookie,
    errors::ApiError,
    password::Hasher,
    routes::Role,
    sessions::{self, Session},
    store::{StoreError, Writing},
    throttle::{Limits, Throttle},
};
use crate::clients::network;

/// How long a verified name and password need not be verified again: else each request would cost a password hash.
const CACHE_LIFE: Duration = Duration::from_secs(60);
/// Verified names and passwords remembered, and networks of users.
const CACHE_SIZE: usize = 1024;
const WRONG: ApiError = ApiError::Unauthorized("wrong user name or password");
/// Wrong passwords for one account from one address.
const ACCOUNT: Limits = Limits { free: 5, longest: Duration::from_secs(30) };
/// The same from all addresses together: wide and short, since whoever knows a name could keep its owner out by it.
const NAME: Limits = Limits { free: 50, longest: Duration::from_secs(1) };
/// Wrong passwords from one address: wide, because all clients behind a load balancer come from the same one.
const ADDRESS: Limits = Limits { free: 50, longest: Duration::from_secs(2) };
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
    /// None for a login by Basic.
    pub(super) session: Option<Session>,
}

/// What verification needs besides the database.
#[derive(Debug)]
pub(super) struct Logins {
    pub(super) hasher: Hasher,
    accounts: Throttle<(String, IpAddr)>,
    names: Throttle<String>,
    addresses: Throttle<IpAddr>,
    /// Where users have logged in from before: nobody else keeps them out there.
    known: Mutex<HashSet<(String, IpAddr)>>,
    /// Random for each process, so that the table below is of no use to anybody else.
    key: hmac::Key,
    verified: Mutex<HashMap<[u8; 32], Instant>>,
}

impl Logins {
    pub(super) fn new() -> Result<Self, ring::error::Unspecified> {
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())?;
        let (accounts, names, addresses) = (Throttle::new(ACCOUNT), Throttle::new(NAME), Throttle::new(ADDRESS));
        let hasher = Hasher::new();
        Ok(Self { hasher, accounts, names, addresses, known: Mutex::default(), key, verified: Mutex::default() })
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

    fn is_known(&self, account: &(String, IpAddr)) -> bool {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).contains(account)
    }

    /// How long the next attempt for this account from this network must wait.
    fn wait(&self, account: &(String, IpAddr), now: Instant) -> Duration {
        let (name, from) = account;
        let all = if self.is_known(account) { Duration::ZERO } else { self.names.wait(name, now) };
        all.max(self.accounts.wait(account, now)).max(self.addresses.wait(from, now))
    }

    /// Counts an attempt, up to the table that refuses it.
    fn attempt(&self, account: &(String, IpAddr), now: Instant) -> Result<(), Duration> {
        let (name, from) = account;
        self.addresses.attempt(from, now)?;
        self.accounts.attempt(account, now)?;
        if self.is_known(account) { Ok(()) } else { self.names.attempt(name, now) }
    }

    fn succeeded(&self, account: &(String, IpAddr)) {
        let (name, from) = account;
        self.accounts.succeeded(account);
        self.names.succeeded(name);
        self.addresses.succeeded(from);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= CACHE_SIZE {
            known.clear();
        }
        known.insert(account.clone());
    }

    /// Checks a name and a password against the hash of that user, if there is one. True if it was computed and not
    /// remembered. `Unauthorized` has always been computed.
    async fn verify(&self, login: Login, stored: Option<String>, from: IpAddr) -> Result<bool, ApiError> {
        let tag = self.tag(&login, stored.as_deref());
        if self.is_verified(&tag) {
            return Ok(false);
        }
        let from = network(from);
        let account = (login.username, from);
        let slow_down = |wait: Duration| ApiError::TooMany(wait.as_secs() + 1);
        // Asked here too, so that nobody queues up in vain.
        let wait = self.wait(&account, Instant::now());
        if !wait.is_zero() {
            return Err(slow_down(wait));
        }
        let turn = self.hasher.turn().await?;
        // Of many requests that came with the same password at once, only the first ones compute.
        if self.is_verified(&tag) {
            return Ok(false);
        }
        self.attempt(&account, Instant::now()).map_err(slow_down)?;
        if !turn.verify(login.password, stored).await? {
            return Err(WRONG);
        }
        self.succeeded(&account);
        self.remember(tag);
        Ok(true)
    }
}

/// A name and a password: the body of `signup` and `authenticate`, or what Basic carries.
#[derive(Deserialize, JsonSchema)]
pub(super) struct Login {
    pub(super) username: String,
    pub(super) password: String,
}

/// Seconds since 1970. The wall clock, not a monotonic one: another node may check the token's expiry.
pub(super) fn unix_time() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64)
}

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
        let same: Option<bool> = query.fetch_optional(writing.connection()).await.map_err(StoreError::from)?;
        if same == Some(true) { Ok(()) } else { Err(WRONG) }
    }
}

/// Checks a name and a password. Each that was computed and wrong is audited.
pub(super) async fn verify(console: &Console, login: Login, from: IpAddr) -> Result<Verified, ApiError> {
    verify_noting(console, login, from).await.map(|(verified, _)| verified)
}

/// The same; true if it was computed and not remembered.
async fn verify_noting(console: &Console, login: Login, from: IpAddr) -> Result<(Verified, bool), ApiError> {
    let name = login.username.clone();
    if name.len() > LONGEST || login.password.len() > LONGEST {
        return Err(WRONG);
    }
    let mut reading = console.store.read().await?;
    let query = sqlx::query_as("SELECT password, role FROM users WHERE name = ?").bind(name.clone());
    let stored: Option<(String, String)> = query.fetch_optional(&mut *reading).await.map_err(StoreError::from)?;
    // Not kept during the computation: there are few of them.
    drop(reading);
    let (hash, role) = stored.unzip();
    let computed = match console.logins.verify(login, hash.clone(), from).await {
        Err(ApiError::Unauthorized(why)) => {
            audits::note_login(&console.store, &name, from, false).await;
            return Err(ApiError::Unauthorized(why));
        }
        other => other?,
    };
    let (hash, role) = hash.zip(role).ok_or(WRONG)?;
    Ok((Verified { role: role_of(&name, &role)?, hash }, computed))
}

/// Who sends this request, verified.
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
        return sessions::find(console, token, from, true).await;
    }
    match credentials(headers) {
        Some(Credentials::Bearer(token)) => sessions::find(console, &token, from, false).await,
        Some(Credentials::Basic(login)) => {
            let name = login.username.clone();
            let (Verified { role, .. }, computed) = verify_noting(console, login, from).await?;
            if computed {
                audits::note_login(&console.store, &name, from, true).await;
            }
            Ok(User { name, role, from, session: None })
        }
        None => Err(ApiError::Unauthorized("log in with a bearer token or with Basic")),
    }
}

/// A role that this program does not know: of a newer one, so it permits nothing here.
pub(super) fn role_of(name: &str, role: &str) -> Result<Role, ApiError> {
    Role::of(role).ok_or_else(|| {
        tracing::error!("user '{name}' has the role '{role}', which this version does not know");
        ApiError::Forbidden("this version does not know your role".to_owned())
    })
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

    /// Somebody else's guesses, as many as are borne from there: who knows the password waits for a second at most, and not at all
    /// where he has logged in before.
    #[test]
    fn a_stranger_who_guesses_keeps_nobody_out() {
        let logins = Logins::new().unwrap();
        let at = |last: u8| ("admin".to_owned(), IpAddr::from([192, 0, last, 1]));
        logins.succeeded(&at(250));
        let (begin, mut guesses) = (Instant::now(), 0);
        let mut now = begin;
        while now < begin + Duration::from_secs(120) {
            guesses += (0..20).filter(|stranger| logins.attempt(&at(*stranger), now).is_ok()).count();
            assert!(logins.wait(&at(200), now) <= NAME.longest);
            assert!(logins.wait(&at(250), now).is_zero());
            now += Duration::from_millis(100);
        }
        assert!(guesses < 300, "{guesses} guesses in two minutes from 20 networks");
        assert!(logins.wait(&at(0), now) > NAME.longest);
        logins.attempt(&at(200), now + NAME.longest).unwrap();
    }

    #[test]
    fn of_many_guesses_at_once_a_handful_is_computed() {
        let logins = Arc::new(Logins::new().unwrap());
        let guess = |number: u32| {
            let (logins, from) = (logins.clone(), IpAddr::from([192, 0, 2, 1]));
            let login = Login { username: "admin".into(), password: number.to_string() };
            async move { logins.verify(login, None, from).await.unwrap_err() }
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
