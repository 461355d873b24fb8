//! The page that Prometheus reads, and the token that it may need. The same page is offered on the health port and by the Console.
//! Must never compare a token in a time that depends on it.

use anyhow::{Context, Result, anyhow};
use axum::{
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use ring::{hmac, rand::SystemRandom};

use crate::telemetry;

/// `/metrics`, see [`MetricsPage::answer`].
#[derive(Clone, Debug)]
pub struct MetricsPage {
    /// A key of this process, and the token's tag under it.
    expected: Option<(hmac::Key, hmac::Tag)>,
}

impl MetricsPage {
    /// A page for everybody, or for those who know the token.
    ///
    /// # Errors
    /// When the system has no random bytes.
    pub fn new(token: Option<&str>) -> Result<Self> {
        let tag = |token: &str| {
            let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())
                .map_err(|_| anyhow!("the system gives no random bytes"))?;
            let tag = hmac::sign(&key, token.as_bytes());
            Ok::<_, anyhow::Error>((key, tag))
        };
        Ok(Self { expected: token.map(tag).transpose().context("prepare METRICS_TOKEN")? })
    }

    /// True if a token is needed.
    pub fn needs_token(&self) -> bool {
        self.expected.is_some()
    }

    /// True if no token is needed, or the request has it as `Authorization: Bearer TOKEN`.
    pub fn permits(&self, headers: &HeaderMap) -> bool {
        let Some((key, tag)) = &self.expected else { return true };
        let given = headers.get(header::AUTHORIZATION).map_or(&b""[..], HeaderValue::as_bytes);
        let (scheme, token) = given.split_at(given.len().min(7));
        scheme.eq_ignore_ascii_case(b"bearer ") && hmac::verify(key, token, tag.as_ref()).is_ok()
    }

    /// The metrics of this process as text, or 401.
    pub fn answer(&self, headers: &HeaderMap) -> Response {
        if !self.permits(headers) {
            let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
            let body = "the metrics need METRICS_TOKEN of twistlock.cfg: Authorization: Bearer TOKEN\n";
            return (StatusCode::UNAUTHORIZED, challenge, body).into_response();
        }
        self.shown()
    }

    /// The metrics, for whoever may read them by another right.
    pub fn shown(&self) -> Response {
        match telemetry::metrics_handle() {
            Ok(metrics) => {
                let format = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
                (format, metrics.render()).into_response()
            }
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("no metrics: {error:#}\n")).into_response(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_static(value))])
    }

    #[test]
    fn only_the_whole_token_opens_the_page() {
        let page = MetricsPage::new(Some("0123456789abcdef")).unwrap();
        for right in ["Bearer 0123456789abcdef", "bearer 0123456789abcdef"] {
            assert_eq!(page.answer(&with(right)).status(), StatusCode::OK, "{right}");
        }
        let wrong =
            ["Bearer 0123456789abcde", "Bearer 0123456789abcdef0", "Basic 0123456789abcdef", "Bearer ", "B", ""];
        for wrong in wrong {
            assert_eq!(page.answer(&with(wrong)).status(), StatusCode::UNAUTHORIZED, "{wrong}");
        }
        assert_eq!(page.answer(&HeaderMap::new()).status(), StatusCode::UNAUTHORIZED);
        assert_eq!(MetricsPage::new(None).unwrap().answer(&HeaderMap::new()).status(), StatusCode::OK);
    }
}
