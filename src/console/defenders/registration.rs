//! How a host becomes a Defender: invitations, and certificates for those who have one. Must never sign a name that a
//! request chose, and never keep a token.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Json,
    extract::{ConnectInfo, State},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::tables::{self, DEFENDERS, Defender};
use crate::{
    admin::Actor,
    console::{Console, audit_log, clock::unix_time, errors::ApiError, extract::Body, store::StoreError, user::User},
    defender::wire::{Registered, Registration},
    join::Token,
    pki::{SigningRequest, certificate_der, certificate_validity},
};

/// How long an invitation is good, in seconds: if nothing else is wanted, and at most.
const VALID: (u32, u32) = (86_400, 30 * 86_400);
/// Longest name of a host, in characters.
const NAME: usize = 128;

/// Which invitation is wanted.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Wish {
    /// How long it is good: up to 30 days; one day if not given.
    #[schemars(range(min = 1, max = 2_592_000))]
    valid_sec: Option<u32>,
}

/// An invitation.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Invitation {
    /// Kept nowhere: who has it may register hosts.
    token: String,
    /// In seconds since 1970.
    until: i64,
}

/// `POST defenders/tokens`.
pub(super) async fn invite(
    State(console): State<Arc<Console>>,
    user: User,
    Body(Wish { valid_sec }): Body<Wish>,
) -> Result<Json<Invitation>, ApiError> {
    let valid = valid_sec.unwrap_or(VALID.0);
    if !(1..=VALID.1).contains(&valid) {
        return Err(ApiError::bad(format!("validSec must be 1 to {}", VALID.1)));
    }
    let status = console.status.borrow().clone();
    let authority = status.membership.shared.authority.as_ref().ok_or_else(no_authority)?;
    let der = certificate_der(&authority.certificate).map_err(|error| ApiError::Conflict(error.to_string()))?;
    let (token, until) = (Token::new(&der), unix_time() + i64::from(valid));
    let mut writing = console.store.begin().await?;
    tables::invite(&mut writing, &token.secret_hash(), until, &user.name).await?;
    let difference = audit_log::difference(&Value::Null, &json!({ "until": until }));
    audit_log::record(&mut writing, &user, "invite", "Defenders", difference).await?;
    writing.commit().await?;
    Ok(Json(Invitation { token: token.to_string(), until }))
}

fn no_authority() -> ApiError {
    ApiError::Conflict("this cluster has no certificate authority in its membership, which Defenders need".to_owned())
}

/// `POST defenders/register`: the same key gets the same id, however often it asks.
pub(super) async fn register(
    State(console): State<Arc<Console>>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    Body(Registration { token, name, csr }): Body<Registration>,
) -> Result<Json<Registered>, ApiError> {
    let denied =
        || ApiError::Forbidden("the token is not one for Defenders of this cluster, or it has ended".to_owned());
    let token: Token = token.parse().map_err(|_| denied())?;
    // Strangers ask, too: none of them takes a turn of a writer. An invitation that somebody has is committed.
    let by = tables::inviter(&console.store, &token.secret_hash()).await?.ok_or_else(denied)?;
    let length = name.chars().count();
    if !(1..=NAME).contains(&length) || name.contains(char::is_control) {
        return Err(ApiError::bad(format!("name must have 1 to {NAME} characters and no control characters")));
    }
    let key = SigningRequest::parse(&csr).map_err(|error| ApiError::bad(error.to_string()))?.fingerprint().to_owned();
    let known = tables::with_key(&console.store, &key).await?;
    if known.as_ref().is_some_and(|known| known.withdrawn) {
        return Err(ApiError::Forbidden("this Defender is withdrawn: it needs another key".to_owned()));
    }
    let new = known.is_none();
    let id = known.map_or_else(|| format!("{:032x}", rand::random::<u128>()), |known| known.id);
    let certificate = sign(&console, &csr, &id, &name).await?;
    let expires = ends(&certificate);
    let mut writing = console.store.begin().await?;
    if new {
        if writing.number("SELECT count(*) FROM defenders").await? >= DEFENDERS {
            return Err(ApiError::Conflict(format!("there are {DEFENDERS} Defenders already")));
        }
        let insert =
            "INSERT INTO defenders (id, name, key, registered, modified, seen, expires) VALUES (?, ?, ?, ?, ?, ?, ?)";
        let (insert, now) = (sqlx::query(insert).bind(id.clone()).bind(name.clone()).bind(key), unix_time());
        writing.execute(insert.bind(now).bind(now).bind(now).bind(expires)).await.map_err(|error| match error {
            StoreError::Duplicate => ApiError::Conflict("this host asks twice at the same time: ask again".to_owned()),
            other => other.into(),
        })?;
    } else {
        writing.execute(renewed(&id, &name, expires)).await?;
    }
    let actor = Actor { name: format!("Defender {name}, invited by {by}"), source: from.ip().to_string() };
    let difference = audit_log::difference(&Value::Null, &json!({ "id": id, "expires": expires }));
    audit_log::record(&mut writing, &User::within(actor), "register", &format!("Defender '{id}'"), difference).await?;
    writing.commit().await?;
    tracing::info!(id, name, from = %from.ip(), "a Defender is registered");
    let authorities = console.status.borrow().membership.shared.trust_bundle();
    Ok(Json(Registered { id, certificate, authorities }))
}

/// Another certificate for a Defender that is connected, for this key.
///
/// # Errors
/// When it cannot be signed, or it could not be written that it was.
pub(super) async fn certify(console: &Console, csr: &str, defender: &Defender) -> Result<String, ApiError> {
    let certificate = sign(console, csr, &defender.id, &defender.name).await?;
    console.store.write(renewed(&defender.id, &defender.name, ends(&certificate))).await?;
    Ok(certificate)
}

async fn sign(console: &Console, csr: &str, id: &str, name: &str) -> Result<String, ApiError> {
    let admin = Arc::clone(&console.services()?.admin);
    let (csr, id, name) = (csr.to_owned(), id.to_owned(), name.to_owned());
    let signed = tokio::task::spawn_blocking(move || admin.certify_defender(&csr, &id, &name)).await;
    Ok(signed.map_err(|_| ApiError::Internal)??)
}

fn renewed(
    id: &str,
    name: &str,
    expires: i64,
) -> sqlx::query::Query<'static, sqlx::Sqlite, sqlx::sqlite::SqliteArguments> {
    let update = sqlx::query("UPDATE defenders SET name = ?, expires = ?, modified = ? WHERE id = ?");
    update.bind(name.to_owned()).bind(expires).bind(unix_time()).bind(id.to_owned())
}

fn ends(certificate: &str) -> i64 {
    certificate_validity(certificate).map_or(0, |(_, until)| i64::try_from(until).unwrap_or(i64::MAX))
}
