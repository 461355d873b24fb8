//! Invitations: whoever has the token of one may register hosts while it is in force. Must never keep a token.

use std::sync::Arc;

use axum::{Json, extract::State};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::tables;
use crate::{
    console::{Console, audit_log, clock::unix_time, errors::ApiError, extract::Body, user::User},
    join::Token,
    pki::certificate_der,
};

/// How long an invitation is good, in seconds: if nothing else is wanted, and at most.
const VALID: (u32, u32) = (86_400, 30 * 86_400);

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
    let (token, until) = new(&console, valid_sec)?;
    put_into_force(&console, &user, &token, until).await?;
    Ok(Json(Invitation { token: token.to_string(), until }))
}

/// A token that is in force nowhere yet, and when it is to end, in seconds since 1970.
///
/// # Errors
/// When it would be in force for longer than one may be, or the cluster has no certificate authority.
pub(in crate::console) fn new(console: &Console, valid_sec: Option<u32>) -> Result<(Token, i64), ApiError> {
    let valid = valid_sec.unwrap_or(VALID.0);
    if !(1..=VALID.1).contains(&valid) {
        return Err(ApiError::bad(format!("validSec must be 1 to {}", VALID.1)));
    }
    let status = console.status.borrow().clone();
    let authority = status.membership.shared.authority.as_ref().ok_or_else(no_authority)?;
    let der = certificate_der(&authority.certificate).map_err(|error| ApiError::Conflict(error.to_string()))?;
    Ok((Token::new(&der), unix_time() + i64::from(valid)))
}

fn no_authority() -> ApiError {
    ApiError::Conflict("this cluster has no certificate authority in its membership, which Defenders need".to_owned())
}

/// Has hosts with this token registered from now on.
///
/// # Errors
/// When it could not be written.
pub(in crate::console) async fn put_into_force(
    console: &Console,
    user: &User,
    token: &Token,
    until: i64,
) -> Result<(), ApiError> {
    let mut writing = console.store.begin().await?;
    tables::invite(&mut writing, &token.secret_hash(), until, &user.name).await?;
    let difference = audit_log::difference(&Value::Null, &json!({ "until": until }));
    audit_log::record(&mut writing, user, "invite", "Defenders", difference).await?;
    Ok(writing.commit().await?)
}

/// The invitation that a token is of.
///
/// # Errors
/// When it is none, or not in force. Strangers ask, too: none of them takes a turn of a writer, since an invitation
/// that somebody has is committed.
pub(in crate::console) async fn check(console: &Console, token: &str) -> Result<tables::Invited, ApiError> {
    let denied =
        || ApiError::Forbidden("the token is not one for Defenders of this cluster, or it has ended".to_owned());
    let token: Token = token.parse().map_err(|_| denied())?;
    tables::invitation(&console.store, &token.secret_hash()).await?.ok_or_else(denied)
}
