//! How a pool and a host that waits for one come together, before the host is a member: the PRIMARY calls it at its
//! `HIGH_AVAILABILITY_PORT`, both prove who they are, and the host is told that it was taken in. Must never believe an
//! address, say anything of either side before the proofs, or change anything when one of the two refuses.
//!
//! What is proven, in this order:
//!
//! 1. TLS 1.3 proves to each end that the other has the key that it shows. The caller knows the host by the fingerprint
//!    of that key, if somebody has compared it.
//! 2. With a [`Secret`] on both sides, first the caller and then the host send an HMAC over what only these two ends of
//!    this very connection share (TLS keying material, RFC 8446 section 7.5), both nonces, the role of the sender and
//!    the host's fingerprint. Whoever stands between has two connections with different keying material; an earlier
//!    proof, or one of the other role, is a wrong one.
//! 3. The caller's certificate must be one of a node, signed by the authority that it offers: a host knows which pool
//!    has added it. Without a secret that is all it knows, and it takes the first pool that calls.
//!
//! Then the host tells of itself, is reserved, and is told; `docs/formats.md` has the words. A sign-up and a meeting
//! exclude each other.

mod caller;
mod host;
mod secret;
#[cfg(test)]
mod tests;
mod wire;

use thiserror::Error;

pub use caller::{Caller, Met};
pub use host::{Desk, Waiting};
pub use secret::Secret;
pub use wire::Offer;

use wire::Refusal;

/// Why a meeting came to nothing. Nothing was changed on either side.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MeetingError {
    /// No connection, or it ended.
    #[error("{0}")]
    Unreachable(String),
    /// Something else answers there.
    #[error(
        "no host waits there: a member, a member that was removed, or another service answers. A host waits when twistlockd \
         runs with CLUSTERED_DB_ENABLED=true and an empty data folder (set aside what is in it)"
    )]
    NotWaiting,
    /// The programs of the two do not understand each other.
    #[error("it speaks version {theirs} of the meeting, and this one version {ours}: install the same version on both")]
    Protocol {
        /// Of the other side.
        theirs: u32,
        /// Of this program.
        ours: u32,
    },
    /// Another host than the one that is meant, or somebody between.
    #[error(
        "the key there has the fingerprint {found}, and not {expected}: is it another host, or is somebody between?"
    )]
    Fingerprint {
        /// What was seen.
        found: String,
        /// What was asked for.
        expected: String,
    },
    /// Only the other side has a secret.
    #[error("CLUSTERED_DB_SECRET_FILE is set there, but not here: set the same secret on both")]
    SecretMissingHere,
    /// Only this side has a secret.
    #[error("CLUSTERED_DB_SECRET_FILE is set here, but not there: set the same secret on both")]
    SecretMissingThere,
    /// The other side does not know it, or somebody stands between.
    #[error("the secrets of CLUSTERED_DB_SECRET_FILE differ, or somebody stands between the two")]
    WrongSecret,
    /// What it says of itself does not fit what it proves.
    #[error("{0}")]
    Stranger(String),
    /// The other side refuses; its sentence.
    #[error("it refuses: {0}")]
    Refused(String),
    /// It is being signed up, or another member talks to it.
    #[error("it is being added or signed up just now: look at its status, and try again")]
    Busy,
    /// The rules of the meeting were broken.
    #[error("it does not keep to the meeting: {0}")]
    Broken(String),
}

impl MeetingError {
    /// What the other side is told.
    fn refusal(&self) -> Refusal {
        match self {
            Self::Protocol { .. } => Refusal::Protocol,
            Self::SecretMissingHere => Refusal::NoSecret,
            Self::SecretMissingThere => Refusal::NeedsSecret,
            Self::WrongSecret => Refusal::WrongSecret,
            Self::Busy => Refusal::Busy,
            _ => Refusal::Other,
        }
    }
}

/// What goes wrong with a connection.
fn broken(error: std::io::Error) -> MeetingError {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => MeetingError::Unreachable("it closed the connection".to_owned()),
        std::io::ErrorKind::InvalidData => MeetingError::Broken(error.to_string()),
        _ => MeetingError::Unreachable(error.to_string()),
    }
}
