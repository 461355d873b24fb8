//! How a host that is not yet a member asks to become one: what it sends, what it is answered, and the token that lets
//! it ask. Must never let a host trust a cluster whose authority is not the one in its token, or let a private key
//! leave its host.

mod adoption;
mod asking;
mod client;
mod files;
mod offer;
mod script;

use std::{fmt, str::FromStr};

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use ring::digest;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use crate::cluster::{Membership, NodeId};

pub use adoption::Candidate;
pub use asking::{Newcomer, Stage, run, wanted};
pub use files::{Host, JOIN_FILE, JoinFile, clear};
pub use offer::Offer;
pub use script::{JoinAssets, JoinAssetsError, Program, Purpose, refusal};

/// The beginning of every token: its kind and version.
const TOKEN_PREFIX: &str = "TWJ1";
/// Length of a token in characters.
const TOKEN_LENGTH: usize = TOKEN_PREFIX.len() + 2 * (1 + 64);

/// What a host that wants to join tells about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct JoinRequest {
    pub name: String,
    /// Host name or IP address by which the members reach it.
    pub address: String,
    /// Its `HIGH_AVAILABILITY_PORT`.
    pub port: u16,
    /// Version of its program.
    pub version: String,
    /// What its program can do ([`crate::cluster::level`]); a request without it is of the first level.
    #[serde(default)]
    pub level: u32,
    /// Signing request for its node certificate, PEM. Names inside it mean nothing: the cluster decides them.
    pub csr: String,
    /// Signing request for its Console certificate, PEM; made with another key.
    pub console_csr: String,
    /// The names that its Console certificate is to have: host names and IP addresses, the common name first.
    pub console_names: Vec<String>,
    /// Its wall clock, in milliseconds since 1970.
    pub time_ms: u64,
}

/// Where a request stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "state", rename_all = "kebab-case")]
#[allow(clippy::large_enum_variant, reason = "one at a time exists, as an answer")]
pub enum RequestState {
    /// An administrator has to decide.
    Pending {
        /// Whoever knows it may ask for the answer: to be kept secret.
        id: String,
        /// Fingerprint of the host's public key, for the administrator to compare.
        fingerprint: String,
        /// When the request expires, in seconds since 1970.
        until: u64,
    },
    /// The host is not wanted.
    Rejected {
        /// A sentence.
        reason: String,
    },
    /// The host is a member.
    Admitted {
        /// Its id in the cluster.
        node: NodeId,
        /// Its node certificate, PEM.
        certificate: String,
        /// Its Console certificate, PEM.
        console_certificate: String,
        /// The authority's certificate, PEM.
        ca: String,
        /// The members, without anything secret.
        #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
        membership: Membership,
    },
}

/// Lets a host ask to join, and tells it which cluster to trust: `TWJ1.<SHA-256 of the authority's
/// certificate>.<secret>`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    authority: [u8; 32],
    secret: [u8; 32],
}

impl Token {
    /// A new token of the cluster whose authority has this certificate (DER).
    pub fn new(authority: &[u8]) -> Self {
        Self { authority: sha256(authority), secret: rand::random() }
    }

    /// True if it was made by the cluster whose authority has this certificate (DER).
    pub fn trusts(&self, authority: &[u8]) -> bool {
        self.authority == sha256(authority) // nothing secret
    }

    /// SHA-256 of the secret in hexadecimal digits: what the cluster keeps of a token.
    pub fn secret_hash(&self) -> String {
        HEXLOWER.encode(&sha256(&self.secret))
    }

    /// True if the secret has this hash. Takes the same time wherever they differ.
    pub fn has_hash(&self, hash: &str) -> bool {
        self.secret_hash().as_bytes().ct_eq(hash.as_bytes()).into()
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{TOKEN_PREFIX}.{}.{}", HEXLOWER.encode(&self.authority), HEXLOWER.encode(&self.secret))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{TOKEN_PREFIX}.{}.(secret)", HEXLOWER.encode(&self.authority))
    }
}

impl FromStr for Token {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WRONG: &str = "this is not a join token (TWJ1. and two groups of 64 hexadecimal digits)";
        if text.len() != TOKEN_LENGTH {
            return Err(WRONG);
        }
        let mut parts = text.split('.');
        let (Some(TOKEN_PREFIX), Some(authority), Some(secret), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(WRONG);
        };
        Ok(Self { authority: unhex(authority).ok_or(WRONG)?, secret: unhex(secret).ok_or(WRONG)? })
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, bytes);
    std::array::from_fn(|index| digest.as_ref()[index])
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    HEXLOWER_PERMISSIVE.decode(text.as_bytes()).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_as_it_was_written_and_nothing_else_is() {
        let token = Token::new(b"authority");
        let text = token.to_string();
        assert_eq!(text.parse::<Token>().unwrap(), token);
        assert!(token.trusts(b"authority") && !token.trusts(b"another"));
        assert!(!format!("{token:?}").contains(text.rsplit('.').next().unwrap()));
        let hash = token.secret_hash();
        assert!(token.has_hash(&hash) && !token.has_hash(&hash[1..]) && !token.has_hash(""));
        assert!(!token.has_hash(&Token::new(b"authority").secret_hash()));
        assert_ne!(Token::new(b"authority").secret_hash(), token.secret_hash());
        let swapped = text.replacen('.', "-", 1);
        let foreign = format!("{}é", &text[..text.len() - 2]);
        for wrong in [&text[1..], "", &text.replace("TWJ1", "TWJ2"), &swapped, &foreign, &text.replace('a', "g")] {
            assert!(wrong == text || wrong.parse::<Token>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn states_are_tagged() {
        let state = RequestState::Pending { id: "a".into(), fingerprint: "B".into(), until: 7 };
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(json, r#"{"state":"pending","id":"a","fingerprint":"B","until":7}"#);
        assert_eq!(serde_json::from_str::<RequestState>(&json).unwrap(), state);
    }
}
