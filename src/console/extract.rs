//! Reads the parts of a request that handlers ask for, and turns every refusal of the framework into `{"err": "..."}`.

use axum::{
    Json,
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{StatusCode, request::Parts},
};
use serde::de::DeserializeOwned;

use super::{errors::ApiError, objects};

/// A JSON body. Only with the content type of JSON: a browser then asks before it sends it for another site.
#[derive(Debug)]
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let (head, body) = request.into_parts();
        let body = Bytes::from_request(Request::from_parts(head.clone(), body), state).await;
        let body = body.map_err(|refusal| ApiError::Request(refusal.status(), refusal.body_text()))?;
        match Json::from_request(Request::from_parts(head, body.clone().into()), state).await {
            Ok(Json(value)) => match objects::check::<T>(&body) {
                Ok(()) => Ok(Self(value)),
                Err(why) => Err(ApiError::Request(StatusCode::UNPROCESSABLE_ENTITY, format!("{WRONG}{why}"))),
            },
            Err(refusal) => Err(ApiError::Request(refusal.status(), without_values(&refusal.body_text()))),
        }
    }
}

/// As the framework says it.
const WRONG: &str = "Failed to deserialize the JSON body into the target type: ";

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

    #[tokio::test]
    async fn an_array_is_no_object_whatever_its_members_are() {
        #[derive(Debug, Default, serde::Deserialize)]
        #[serde(default)]
        struct Setting {
            name: String,
            inner: Vec<Setting>,
        }
        let ask = async |body: &'static str| {
            let request = Request::post("/").header("content-type", "application/json").body(body.into()).unwrap();
            Body::<Setting>::from_request(request, &()).await.map(|Body(setting)| setting.name)
        };
        assert_eq!(ask(r#" {"name": "a"}"#).await.unwrap(), "a");
        assert_eq!(ask(r#"{"name": "a", "inner": [{"name": "b"}], "later": [1]}"#).await.unwrap(), "a");
        let within = r#"{"inner": [{"inner": [["a"]]}]}"#;
        for array in ["[]", r#" ["a"]"#, "\n[\"a\"]", r#"{"inner": [[]]}"#, r#"{"inner": [{}, ["a"]]}"#, within] {
            let refusal = ask(array).await.unwrap_err();
            assert!(matches!(&refusal, ApiError::Request(status, _) if *status == 422), "{array}: {refusal:?}");
        }
        assert!(matches!(ask("[").await.unwrap_err(), ApiError::Request(status, _) if status == 400));
    }

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
