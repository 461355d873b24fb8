//! Reads the parts of a request that handlers ask for, and turns every refusal of the framework into `{"err": "..."}`.

use axum::{
    Json,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{HeaderName, HeaderValue, request::Parts},
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::errors::ApiError;

/// Rows of a list in one answer if the client does not say, and at most.
const PAGE: (u32, u32) = (50, 1000);
/// The header that says how long the whole list is.
pub(super) const TOTAL: HeaderName = HeaderName::from_static("x-total-count");

/// Which part of a list is wanted. A query with more fields has these two itself, since a flattened one reads no
/// numbers.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
pub(super) struct Page {
    /// At most this many rows; 50 if not given.
    #[schemars(range(min = 1, max = 1000))]
    pub(super) limit: Option<u32>,
    /// This many rows of the list are skipped.
    pub(super) offset: Option<u32>,
}

impl Page {
    /// `LIMIT` and `OFFSET` for SQL.
    pub(super) fn bounds(self) -> Result<(u32, u32), ApiError> {
        let limit = self.limit.unwrap_or(PAGE.0);
        if !(1..=PAGE.1).contains(&limit) {
            return Err(ApiError::bad(format!("limit must be 1 to {}", PAGE.1)));
        }
        Ok((limit, self.offset.unwrap_or(0)))
    }
}

/// The answer of a list: a part of it as a JSON array, and how many rows there are in all as `X-Total-Count`.
#[derive(Debug)]
pub(super) struct Paged<T> {
    pub(super) rows: Vec<T>,
    pub(super) total: i64,
}

impl<T: Serialize> IntoResponse for Paged<T> {
    fn into_response(self) -> Response {
        ([(TOTAL, HeaderValue::from(self.total))], axum::Json(self.rows)).into_response()
    }
}

/// A JSON body. Only with the content type of JSON: a browser then asks before it sends it for another site.
#[derive(Debug)]
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match Json::from_request(request, state).await {
            Ok(Json(value)) => Ok(Self(value)),
            Err(refusal) => Err(ApiError::Request(refusal.status(), without_values(&refusal.body_text()))),
        }
    }
}

/// What is wrong with a body, without quoting it: it may have a password or a key in the wrong place.
fn without_values(refusal: &str) -> String {
    let (mut text, mut rest) = (String::new(), refusal);
    while let Some((before, value)) = rest.split_once("string \"") {
        let end = value.find("\", expected").or_else(|| value.rfind('"'));
        text = text + before + "a string";
        rest = end.map_or("", |end| &value[end + 1..]);
    }
    text + rest
}

/// A JSON body that may be missing or `null`.
#[derive(Debug)]
pub(super) struct OptionalBody<T>(pub(super) Option<T>);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for OptionalBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        if hyper::body::Body::is_end_stream(request.body()) {
            return Ok(Self(None));
        }
        Body::from_request(request, state).await.map(|Body(value)| Self(value))
    }
}

/// A part of the path, decoded.
#[derive(Debug)]
pub(super) struct Name(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(Self(name)),
            Err(refusal) => Err(ApiError::Request(refusal.status(), refusal.body_text())),
        }
    }
}

/// The query string.
#[derive(Debug)]
pub(super) struct Search<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Search<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(value)) => Ok(Self(value)),
            Err(refusal) => Err(ApiError::Request(refusal.status(), refusal.body_text())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_does_not_say_what_a_text_was() {
        let why = |body: &str| serde_json::from_str::<Vec<u32>>(body).unwrap_err().to_string();
        for body in ["\"hidden\"", "[1, \"hid\\\"den\\\", expected\"]", "[\"string \\\"hidden\"]"] {
            let said = without_values(&why(body));
            assert!(said.contains("invalid type: a string, expected") && !said.contains("hid"), "{body}: {said}");
        }
        assert_eq!(without_values(&why("[1, 2")), why("[1, 2"));
    }
}
