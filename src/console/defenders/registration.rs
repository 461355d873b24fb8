//! How a host becomes a Defender: a certificate for those who have a token. Must never sign a name that a request
//! chose.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Json,
    extract::{ConnectInfo, State},
};
use serde_json::{Value, json};

use super::{
    tables::{self, DEFENDERS, Defender, REMOVED},
    tokens,
};
use crate::{
    admin::{Actor, Signer},
    console::{Console, audit_log, clock::unix_time, errors::ApiError, extract::Body, store::StoreError, user::User},
    defender::wire::{Registered, Registration},
    pki::{SigningRequest, certificate_validity},
};

/// Longest name of a host, in characters.
const NAME: usize = 128;

/// `POST defenders/register`: the same key gets the same id, however often it asks.
pub(super) async fn register(
    State(console): State<Arc<Console>>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    Body(Registration { token, name, csr }): Body<Registration>,
) -> Result<Json<Registered>, ApiError> {
    let by = tokens::check(&console, &token).await?.by;
    let length = name.chars().count();
    if !(1..=NAME).contains(&length) || name.contains(char::is_control) {
        return Err(ApiError::bad(format!("name must have 1 to {NAME} characters and no control characters")));
    }
    let key = SigningRequest::parse(&csr).map_err(|error| ApiError::bad(error.to_string()))?.fingerprint().to_owned();
    let known = tables::with_key(&console.store, &key).await?;
    if let Some(why) = known.as_ref().filter(|known| !known.removed).and_then(Defender::refusal) {
        return Err(ApiError::Forbidden(why.to_owned()));
    }
    let new = known.is_none();
    let id = known.map_or_else(|| format!("{:032x}", rand::random::<u128>()), |known| known.id);
    // It has no other one to go back to.
    let certificate = sign(&console, &csr, &id, &name, Signer::Present).await?;
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
        // One that was removed is back, with all that it has told, and not away from this moment on.
        let back = sqlx::query("UPDATE defenders SET withdrawn = 0, seen = ? WHERE id = ? AND withdrawn = ?");
        writing.execute(back.bind(unix_time()).bind(id.clone()).bind(REMOVED)).await?;
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
    let certificate = sign(console, csr, &defender.id, &defender.name, Signer::Newest).await?;
    console.store.write(renewed(&defender.id, &defender.name, ends(&certificate))).await?;
    Ok(certificate)
}

async fn sign(console: &Console, csr: &str, id: &str, name: &str, by: Signer) -> Result<String, ApiError> {
    let admin = Arc::clone(&console.services()?.admin);
    let (csr, id, name) = (csr.to_owned(), id.to_owned(), name.to_owned());
    let signed = tokio::task::spawn_blocking(move || admin.certify_defender(&csr, &id, &name, by)).await;
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
