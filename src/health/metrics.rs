//! The page that Prometheus reads, and the token that it may need. The same page is offered on the health port and by
//! the Console. Must never compare a token in a time that depends on it, and never at all for somebody who has to wait:
//! an administrator has chosen it, so it may be easy to guess.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use axum::{
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use ring::{hmac, rand::SystemRandom};

use crate::{
    clients::{
        network,
        throttle::{Limits, Throttle},
    },
    telemetry,
};

/// How many wrong tokens one network may send: a collector comes again within a minute.
const GUESSES: Limits = Limits { free: 10, longest: Duration::from_secs(10) };

/// `/metrics`, see [`MetricsPage::answer`].
#[derive(Clone, Debug)]
pub struct MetricsPage {
    /// A key of this process, and the token's tag under it.
    expected: Option<(hmac::Key, hmac::Tag)>,
    guesses: Arc<Throttle<IpAddr>>,
}

/// What a request may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    Granted,
    /// No token, or a wrong one.
    Denied,
    /// Too many wrong ones came from there: nobody looks whether this one is right.
    Wait(Duration),
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
        let expected = token.map(tag).transpose().context("prepare METRICS_TOKEN")?;
        Ok(Self { expected, guesses: Arc::new(Throttle::new(GUESSES)) })
    }

    /// True if a token is needed.
    pub fn needs_token(&self) -> bool {
        self.expected.is_some()
    }

    /// Whether no token is needed, or the request has it as `Authorization: Bearer TOKEN`.
    pub fn permission(&self, headers: &HeaderMap, from: IpAddr) -> Permission {
        let Some((key, tag)) = &self.expected else { return Permission::Granted };
        let given = headers.get(header::AUTHORIZATION).map_or(&b""[..], HeaderValue::as_bytes);
        let (scheme, token) = given.split_at(given.len().min(7));
        if !scheme.eq_ignore_ascii_case(b"bearer ") {
            return Permission::Denied;
        }
        let from = network(from);
        if let Err(wait) = self.guesses.attempt(&from, Instant::now()) {
            return Permission::Wait(wait);
        }
        if hmac::verify(key, token, tag.as_ref()).is_err() {
            return Permission::Denied;
        }
        self.guesses.succeeded(&from);
        Permission::Granted
    }

    /// The metrics of this process as text, 401, or 429.
    pub fn answer(&self, headers: &HeaderMap, from: IpAddr) -> Response {
        match self.permission(headers, from) {
            Permission::Granted => self.shown(),
            Permission::Denied => {
                let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
                let body = "the metrics need METRICS_TOKEN of twistlock.cfg: Authorization: Bearer TOKEN\n";
                (StatusCode::UNAUTHORIZED, challenge, body).into_response()
            }
            Permission::Wait(wait) => {
                let seconds = wait.as_secs() + 1;
                let body = format!("too many wrong tokens came from this network: try again in {seconds} s\n");
                (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, seconds.to_string())], body).into_response()
            }
        }
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
        let status = |page: &MetricsPage, value: &'static str, host: u8| {
            page.answer(&with(value), IpAddr::from([192, 0, 2, host])).status()
        };
        for right in ["Bearer 0123456789abcdef", "bearer 0123456789abcdef"] {
            assert_eq!(status(&page, right, 1), StatusCode::OK, "{right}");
        }
        let wrong =
            ["Bearer 0123456789abcde", "Bearer 0123456789abcdef0", "Basic 0123456789abcdef", "Bearer ", "B", ""];
        for wrong in wrong {
            assert_eq!(status(&page, wrong, 1), StatusCode::UNAUTHORIZED, "{wrong}");
        }
        let nothing = HeaderMap::new();
        assert_eq!(page.answer(&nothing, IpAddr::from([192, 0, 2, 1])).status(), StatusCode::UNAUTHORIZED);
        let open = MetricsPage::new(None).unwrap();
        assert_eq!(open.answer(&nothing, IpAddr::from([192, 0, 2, 1])).status(), StatusCode::OK);
        // Whoever guesses is made to wait before the guess is looked at, and nobody else is.
        for _ in 0..GUESSES.free {
            status(&page, "Bearer 1", 3);
        }
        status(&page, "Bearer 1", 3);
        for guess in ["Bearer 1", "Bearer 0123456789abcdef"] {
            assert_eq!(status(&page, guess, 3), StatusCode::TOO_MANY_REQUESTS, "{guess}");
        }
        assert_eq!(status(&page, "Bearer 0123456789abcdef", 4), StatusCode::OK);
    }
}
