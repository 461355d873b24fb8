//! What a client gets when a request fails: a status and `{"err": "..."}`. A write whose outcome is unknown must never
//! look like a definite failure: it is 503 and says so.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use thiserror::Error;

use super::store::StoreError;
use crate::node::trouble;

/// How the text of a 503 begins if the change may have been made.
pub const UNKNOWN: &str = "outcome unknown";

/// Why a request failed. Every 4xx is definite: nothing was changed.
#[derive(Debug, Error)]
pub enum ApiError {
    /// 400 or another 4xx that the framework chose.
    #[error("{1}")]
    Request(StatusCode, String),
    /// 401.
    #[error("{0}")]
    Unauthorized(&'static str),
    /// 403.
    #[error("{0}")]
    Forbidden(String),
    /// 404.
    #[error("{0}")]
    NotFound(String),
    /// 409.
    #[error("{0}")]
    Conflict(String),
    /// 429 for a login: seconds to wait.
    #[error("too many failed logins; try again in {0} s")]
    TooMany(u64),
    /// 503 with the advice to try again in a second; nothing was changed.
    #[error("{0}")]
    Busy(String),
    /// 503; nothing was changed.
    #[error("{0}")]
    Unavailable(String),
    /// 503; the change may be there later, or not.
    #[error("{UNKNOWN}: {0}; the change may have been made, look before you repeat it")]
    Unknown(String),
    /// 500; nothing was changed.
    #[error("internal error")]
    Internal,
}

impl ApiError {
    /// A 400.
    pub fn bad(text: impl Into<String>) -> Self {
        Self::Request(StatusCode::BAD_REQUEST, text.into())
    }

    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Request(status, _) => *status,
            Self::Unauthorized(_) => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::TooMany(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Busy(_) | Self::Unavailable(_) | Self::Unknown(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

fn is_full(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.and_then(|code| code.parse().ok()) == Some(libsqlite3_sys::SQLITE_FULL)
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Duplicate => Self::Conflict("the name exists already".into()),
            StoreError::Unavailable(error) if is_full(&error) => {
                tracing::info!("a write was refused: {error}");
                Self::Unavailable("the disk of the primary is full: nothing was changed".into())
            }
            // Usual while the primary role moves, so no warning.
            StoreError::Unavailable(error) => {
                tracing::info!("a request found the database not available: {error}");
                Self::Unavailable(trouble().unwrap_or_else(|| "the database is not available at the moment".into()))
            }
            StoreError::Unknown(error) => {
                tracing::info!("the outcome of a write is unknown: {error}");
                Self::Unknown(trouble().unwrap_or_else(|| "the cluster did not confirm the write in time".into()))
            }
            StoreError::Setting(..) => {
                tracing::error!("{error}");
                Self::Internal
            }
            StoreError::Statement(error) => {
                tracing::error!("the database does not accept a statement of the Console: {error}");
                Self::Internal
            }
        }
    }
}

/// Why a request was refused: an extension of the answer, for the audit.
#[derive(Clone, Debug)]
pub(super) struct Reason(pub(super) String);

/// The body of every error.
#[derive(Serialize)]
struct Body {
    err: String,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(Body { err: self.to_string() })).into_response();
        response.extensions_mut().insert(Reason(self.to_string()));
        let (name, value) = match &self {
            Self::Unauthorized(_) => {
                (header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"Twistlock HA\", Bearer"))
            }
            Self::TooMany(seconds) => (header::RETRY_AFTER, HeaderValue::from(*seconds)),
            Self::Busy(_) => (header::RETRY_AFTER, HeaderValue::from(1)),
            _ => return response,
        };
        response.headers_mut().insert(name, value);
        response
    }
}
