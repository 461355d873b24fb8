//! Where events are sent. Owns the limits of that; must never show an address or a key.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::cluster::limits::{Impossible, MAX_PEM, fits};

/// Webhooks of a cluster.
pub(in crate::cluster) const MAX_WEBHOOKS: usize = 3;
/// Bytes of one of them in the membership.
pub(super) const MAX_WEBHOOK: usize = 3584;

/// Where events are sent: an HTTP request for each.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Webhook {
    /// Unlike that of any other.
    pub name: String,
    /// `https://` or `http://`; may itself be a secret.
    pub url: String,
    /// Key that signs each request; without one, requests are not signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
    /// The only authority that its certificate may come from, PEM; none: those that the host trusts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// The least severe event that is sent: info, warning or critical.
    pub severity: String,
}

impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Webhook").field("name", &self.name).field("severity", &self.severity).finish_non_exhaustive()
    }
}
/// The bounds of a webhook: a membership with all else at its limits must still fit.
pub(in crate::cluster) fn check_webhooks(webhooks: &[Webhook]) -> Result<(), Impossible> {
    if webhooks.len() > MAX_WEBHOOKS {
        return Err(Impossible(format!("at most {MAX_WEBHOOKS} webhooks are possible")));
    }
    for (place, webhook) in webhooks.iter().enumerate() {
        let Webhook { name, url, secret, ca, .. } = webhook;
        if name.is_empty() || name.len() > 64 || name.contains(char::is_control) {
            return Err(Impossible(format!("{name:?} is no name of a webhook: 1 to 64 bytes, no control characters")));
        }
        if webhooks[..place].iter().any(|other| other.name == *name) {
            return Err(Impossible(format!("two webhooks are called {name:?}")));
        }
        let lengths = [(url.len(), 512), (length(secret), 128), (length(ca), MAX_PEM)];
        if lengths.iter().any(|(length, most)| length > most) {
            return Err(Impossible(format!(
                "webhook {name:?}: the address may have 512 bytes, the secret 128, the authority {MAX_PEM}"
            )));
        }
        fits(&format!("webhook {name:?}"), webhook, MAX_WEBHOOK)?;
    }
    Ok(())
}

fn length(text: &Option<String>) -> usize {
    text.as_ref().map_or(0, String::len)
}
