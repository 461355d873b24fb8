//! The tokens of sessions: made, found and ended, in the replicated database, so that nobody is logged out when the
//! primary role moves. Must never store a token: only its digest.

use std::net::IpAddr;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::{
    digest,
    rand::{SecureRandom, SystemRandom},
};

use super::{
    Console,
    clock::Time,
    errors::ApiError,
    recent::Found,
    settings::Logon,
    store::{StoreError, Writing},
    user::{From, Session, User, role_of},
};
use crate::cluster::validity::{self, in_force};

/// Seconds that a renewed token stays valid: the answer with the new one may be lost in a takeover, and the requests
/// that are under way carry the old one.
pub(super) const GRACE: i64 = 30;
pub(super) const INVALID: ApiError = ApiError::Unauthorized("the token is not valid or has expired");

/// A new token.
pub(super) struct Issued {
    pub(super) token: String,
    pub(super) seconds: i64,
}

/// Finds the user whose session a token belongs to.
pub(super) async fn find(console: &Console, token: &str, from: IpAddr, page: bool) -> Result<User, ApiError> {
    let digest = digest_of(token);
    // Held while the session is looked at: they are moved together.
    let time = console.clock.hold().await;
    let (found, time) = match console.recent.find(&console.store, &digest) {
        Some(found) => (Some(found), time),
        None => {
            drop(time);
            read(console, &digest).await?
        }
    };
    let in_force = |found: &Found| is_in_force(found.began, found.expires, time.now());
    let Found { name, role, began, expires } = found.filter(in_force).ok_or(INVALID)?;
    let session = Session { digest, began, expires, page };
    Ok(User { role: role_of(&name, &role)?, name, from: From::Network(from), session: Some(session) })
}

/// The session with this digest, and the time when it was read.
async fn read<'a>(console: &'a Console, digest: &[u8]) -> Result<(Option<Found>, Time<'a>), StoreError> {
    let mut reading = console.store.read().await?;
    let time = console.clock.hold().await;
    let since = console.store.login_revision();
    let query = "SELECT users.name, users.role, tokens.began, tokens.expires FROM tokens JOIN users \
                 ON users.name = tokens.user WHERE tokens.digest = ?";
    let query = sqlx::query_as(query).bind(digest.to_vec());
    let found: Option<(String, String, i64, i64)> = query.fetch_optional(&mut *reading).await?;
    let found = found.map(|(name, role, began, expires)| Found { name, role, began, expires });
    if let Some(found) = &found {
        console.recent.remember(since, digest.to_vec(), found.clone());
    }
    Ok((found, time))
}

/// Ends all sessions of a user.
pub(super) async fn end_all(writing: &mut Writing, user: &str) -> Result<(), StoreError> {
    writing.execute(sqlx::query("DELETE FROM tokens WHERE user = ?").bind(user.to_owned())).await.map(|_| ())
}

/// Ends one session.
pub(super) async fn end(writing: &mut Writing, digest: Vec<u8>) -> Result<(), StoreError> {
    writing.execute(sqlx::query("DELETE FROM tokens WHERE digest = ?").bind(digest)).await.map(|_| ())
}

/// No time of a session is before 1970.
fn is_in_force(began: i64, expires: i64, now: i64) -> bool {
    let [began, expires, now] = [began, expires, now].map(|time| u64::try_from(time).unwrap_or(0));
    in_force(began, expires, now)
}

/// Makes a token for a new session, or for the one that it `renews`. The user's oldest sessions end if there are too
/// many; the one that is renewed does not count, and has its [`GRACE`].
pub(super) async fn issue(
    console: &Console,
    writing: &mut Writing,
    user: &str,
    renews: Option<&Session>,
) -> Result<Issued, ApiError> {
    let logon = Logon::of(writing).await?;
    let now = console.clock.now().await;
    let began = renews.map_or(now, |session| session.began);
    let renews = renews.map(|session| session.digest.clone());
    let expires = (now + logon.timeout()).min(began + logon.maximum());
    if expires <= now {
        return Err(ApiError::Unauthorized("the session has lasted as long as it may: log in again"));
    }
    let mut secret = [0; 32];
    SystemRandom::new().fill(&mut secret).map_err(|_| ApiError::Internal)?;
    let token = BASE64_URL_SAFE_NO_PAD.encode(secret);
    let over = sqlx::query("DELETE FROM tokens WHERE expires <= ?1 OR began > ?1 + ?2").bind(now);
    writing.execute(over.bind(validity::SKEW as i64)).await?;
    let surplus = "DELETE FROM tokens WHERE user = ?1 AND digest IS NOT ?2 AND digest NOT IN \
                   (SELECT digest FROM tokens WHERE user = ?1 AND digest IS NOT ?2 ORDER BY expires DESC, digest LIMIT ?3)";
    let surplus = sqlx::query(surplus).bind(user.to_owned()).bind(renews);
    writing.execute(surplus.bind(logon.sessions() - 1)).await?;
    let insert = sqlx::query("INSERT INTO tokens (digest, user, expires, began) VALUES (?, ?, ?, ?)");
    let insert = insert.bind(digest_of(&token)).bind(user.to_owned()).bind(expires).bind(began);
    writing.execute(insert).await?;
    Ok(Issued { token, seconds: expires - now })
}

/// What is stored of a token.
pub(super) fn digest_of(token: &str) -> Vec<u8> {
    digest::digest(&digest::SHA256, token.as_bytes()).as_ref().to_vec()
}
