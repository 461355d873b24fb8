//! What an administrator adds to the Console's certificates: names, and a certificate of their own. Owns the rules for
//! both; must never see a private key that is not sealed.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::Shared;
use crate::cluster::{
    limits::{Impossible, MAX_CONSOLE_NAMES, MAX_NAME, PER_NAME, fits, in_json},
    trust::KeyId,
};

/// Length of all names together that an administrator adds to the Console's certificates, in bytes.
const MAX_ADDED: usize = 2048;
/// Longest certificate chain of an administrator, in bytes of PEM: three certificates with RSA keys of 4096 bits.
pub const MAX_CHAIN: usize = 10 << 10;
/// Longest private key of an administrator, sealed: an RSA key of 4096 bits needs 3300 bytes.
pub(in crate::cluster) const MAX_SEALED: usize = 4096;

/// Bytes of a certificate that was given, in the membership.
pub(super) const MAX_CUSTOM: usize = in_json(MAX_CHAIN) + in_json(MAX_SEALED) + MAX_NAME + 160;
/// Bytes of the names of the Consoles' certificates, in the membership.
pub(super) const MAX_ADDED_ENCODED: usize = MAX_ADDED + MAX_CONSOLE_NAMES * PER_NAME + 32;

/// A certificate that an administrator has given the Console, for all members to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CustomCertificate {
    /// The chain, its own certificate first; PEM.
    pub chain: String,
    /// Its private key, encrypted with the key that only members hold; base64.
    pub sealed_key: String,
    /// Names that key.
    pub key: KeyId,
    /// Who gave it, and when, in seconds since 1970.
    pub by: String,
    pub at: u64,
}

impl Shared {
    /// True if the certificate that the Consoles were given is sealed with another key than the authority: no member
    /// keeps that one, so that only those who have unsealed it before can serve it.
    pub fn certificate_is_stranded(&self) -> bool {
        let sealed_with = self.authority.as_ref().and_then(|authority| authority.key);
        let certificate = self.custom_certificate.as_ref();
        certificate.is_some_and(|certificate| sealed_with.is_some_and(|key| key != certificate.key))
    }

    /// Refuses a certificate that is too long, or that members would soon be unable to unseal.
    pub(in crate::cluster) fn sound_certificate(
        &self,
        certificate: Option<CustomCertificate>,
    ) -> Result<Option<CustomCertificate>, Impossible> {
        let Some(CustomCertificate { chain, sealed_key, key, by, .. }) = &certificate else { return Ok(None) };
        if chain.len() > MAX_CHAIN || sealed_key.len() > MAX_SEALED || by.len() > MAX_NAME {
            return Err(Impossible(format!(
                "the certificate is too long: at most {MAX_CHAIN} bytes of PEM for the chain and a key of 4096 bits are allowed"
            )));
        }
        fits("the certificate", &certificate, MAX_CUSTOM)?;
        if self.authority.as_ref().and_then(|authority| authority.key).is_some_and(|current| current != *key) {
            return Err(Impossible("the cluster key was replaced meanwhile: try again".to_owned()));
        }
        Ok(certificate)
    }
}

/// The names as they are kept: in lower case, each once.
pub(in crate::cluster) fn sound_names(names: &[String]) -> Result<Vec<String>, Impossible> {
    let mut sound: Vec<String> = Vec::new();
    for name in names {
        let name = name.to_ascii_lowercase();
        if !is_console_name(&name) {
            return Err(Impossible(format!(
                "{name:?} cannot be in a certificate: host names (also *.example.com) and IP addresses are allowed, without \
                 port and scheme"
            )));
        }
        if !sound.contains(&name) {
            sound.push(name);
        }
    }
    let length: usize = sound.iter().map(String::len).sum();
    if sound.len() > MAX_CONSOLE_NAMES || length > MAX_ADDED {
        return Err(Impossible(format!(
            "{} names of {length} bytes: at most {MAX_CONSOLE_NAMES} names of {MAX_ADDED} bytes together are allowed",
            sound.len()
        )));
    }
    Ok(sound)
}

/// True for a DNS name, one with a wildcard as its first label, and an IP address.
fn is_console_name(name: &str) -> bool {
    if name.parse::<IpAddr>().is_ok() {
        return true;
    }
    let plain = name.strip_prefix("*.").unwrap_or(name);
    let wildcard_of_a_domain = plain.len() == name.len() || plain.contains('.');
    let label = |label: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        (1..=63).contains(&label.len()) && label.chars().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    // The last label tells a host name from something that looks like an IP address and is none.
    let numeric = plain.rsplit('.').next().is_some_and(|last| last.chars().all(|c| c.is_ascii_digit()));
    name.len() <= MAX_NAME && wildcard_of_a_domain && !numeric && plain.split('.').all(label)
}
