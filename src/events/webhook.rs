//! One event as an HTTP POST with a JSON body. Blocking: runs on a thread that may wait. Must never follow a redirect,
//! read an answer without a bound, or let a secret into an error.

use std::{sync::Arc, time::Duration};

use data_encoding::HEXLOWER;
use ring::hmac;
use ureq::{
    Agent,
    http::Uri,
    tls::{Certificate, RootCerts, TlsConfig},
};

use crate::{
    clock::unix_time,
    cluster::{program_version, shared::webhook::Webhook},
    pki::pem,
};

/// Longest time for one attempt.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest time until a connection is there.
const CONNECT: Duration = Duration::from_secs(5);

/// Why an attempt failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub why: String,
    /// Another attempt may succeed.
    pub passes: bool,
}

impl Failure {
    pub fn passing(why: impl Into<String>) -> Self {
        Self { why: why.into(), passes: true }
    }
}

/// Checks the address and the authority of a webhook.
///
/// # Errors
/// When one of them cannot be used: a sentence that names the webhook and says why.
pub fn check_url(webhook: &Webhook) -> Result<(), String> {
    let name = &webhook.name;
    let uri: Uri = webhook.url.parse().map_err(|error| format!("the address of webhook {name:?}: {error}"))?;
    let known = matches!(uri.scheme_str(), Some("http" | "https"));
    let host = uri.host().is_some_and(|host| !host.is_empty());
    let login = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
    if !known || !host || login {
        return Err(format!(
            "the address of webhook {name:?} must be like https://host/path, without a user name in it"
        ));
    }
    if let Some(ca) = &webhook.ca {
        pem::certificates(ca).map_err(|error| format!("the authority of webhook {name:?}: {error}"))?;
    }
    Ok(())
}

/// Sends `body` once.
pub(super) fn post(webhook: &Webhook, kind: &str, id: &str, body: &[u8]) -> Result<(), Failure> {
    let agent = agent(webhook).map_err(Failure::passing)?;
    let time = unix_time();
    let mut request = agent
        .post(&webhook.url)
        .header("content-type", "application/json")
        .header("user-agent", format!("twistlockd/{}", program_version()))
        .header("x-twistlock-event", kind)
        .header("x-twistlock-id", id)
        .header("x-twistlock-timestamp", time.to_string());
    if let Some(secret) = &webhook.secret {
        request = request.header("x-twistlock-signature", signature(secret, time, body));
    }
    let answer = request.send(body).map_err(|error| Failure::passing(explain(&error)))?;
    match answer.status().as_u16() {
        200..=299 => Ok(()),
        // Not now, or something of the server: worth another attempt.
        status @ (408 | 425 | 429 | 500..) => Err(Failure::passing(format!("it answers with status {status}"))),
        status @ 300..=399 => Err(Failure {
            why: format!("it answers with status {status}: redirects are not followed, write down the final address"),
            passes: false,
        }),
        status => Err(Failure { why: format!("it answers with status {status}"), passes: false }),
    }
}

/// HMAC-SHA256 of the time, a dot and the body: the receiver can tell an old request that somebody repeats.
pub(super) fn signature(secret: &str, time: u64, body: &[u8]) -> String {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()));
    context.update(time.to_string().as_bytes());
    context.update(b".");
    context.update(body);
    format!("sha256={}", HEXLOWER.encode(context.sign().as_ref()))
}

fn agent(webhook: &Webhook) -> Result<Agent, String> {
    let roots = match &webhook.ca {
        Some(ca) => pem::certificates(ca).map_err(|error| format!("its authority: {error}"))?,
        // Read each time: there are few events, and the host's authorities may change.
        None => rustls_native_certs::load_native_certs().certs,
    };
    let roots = roots.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).collect();
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(roots)))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build();
    let config = Agent::config_builder()
        .tls_config(tls)
        .proxy(None)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .max_response_header_size(16 << 10)
        .timeout_global(Some(LIMIT))
        .timeout_connect(Some(CONNECT))
        .build();
    Ok(config.into())
}

/// Without the address, which may be a secret.
fn explain(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Timeout(_) => format!("no answer within {} s", LIMIT.as_secs()),
        ureq::Error::HostNotFound => "its host is not found".to_owned(),
        ureq::Error::ConnectionFailed => "no connection".to_owned(),
        ureq::Error::Io(error) => error.to_string(),
        ureq::Error::BadUri(_) => "its address cannot be used".to_owned(),
        other => other.to_string().chars().filter(|c| !c.is_control()).take(200).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn webhook(url: &str) -> Webhook {
        Webhook { name: "ops".into(), url: url.into(), secret: None, ca: None, severity: "info".into() }
    }

    #[test]
    fn addresses_are_checked() {
        for good in ["https://example.com/a?b=c", "http://192.0.2.1:8080", "https://[2001:db8::1]/x"] {
            assert_eq!(check_url(&webhook(good)), Ok(()), "{good}");
        }
        for bad in
            ["", "example.com", "/path", "file:///etc/passwd", "ftp://a/", "https://", "https://u:p@a/", "https://a b/"]
        {
            assert!(check_url(&webhook(bad)).is_err(), "{bad}");
        }
        let odd = Webhook { ca: Some("no PEM".into()), ..webhook("https://example.com") };
        assert!(check_url(&odd).unwrap_err().contains("authority"));
    }

    #[test]
    fn the_signature_is_that_of_the_standard_tools() {
        // printf '7.{}' | openssl dgst -sha256 -hmac key
        let expected = "sha256=77bc83bd1f40422311e47918b203449aecf84b02c1568bb1b570ac2a474cc2d8";
        assert_eq!(signature("key", 7, b"{}"), expected);
    }
}
