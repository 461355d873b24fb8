//! How long the texts may be that all members keep, and the refusal of what cannot be. Owns what the parts of the
//! membership have in common; must never know one of them.

use serde::Serialize;
use thiserror::Error;

/// Largest encoded membership, in bytes: that of a pool of seven with everything at its limit. A raft entry and a
/// message between members hold it.
pub const MAX_ENCODED: usize = 128 << 10;
/// Largest encoded membership while programs of feature level 2 take part: they read no more.
pub const MAX_ENCODED_BEFORE: usize = 32 << 10;
/// The feature level from which on a membership may be longer than [`MAX_ENCODED_BEFORE`].
pub const LONG_MEMBERSHIPS: u32 = 3;
/// Longest name and address of a member, in bytes: that of a DNS name.
pub const MAX_NAME: usize = 253;
/// Longest certificate, in bytes of PEM.
pub const MAX_PEM: usize = 2048;
/// Length of all names of a host's Console certificate together, in bytes: the certificate must stay below [`MAX_PEM`].
pub const MAX_NAMES: usize = 768;
/// What a certificate needs for a name beside it, at most.
pub const PER_NAME: usize = 3;
/// Names of a Console certificate.
pub const MAX_CONSOLE_NAMES: usize = 32;

/// Why a change is not possible. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Impossible(pub String);

/// Bytes that PEM of a length may have in JSON: each end of a line is one byte more there, or two.
pub const fn in_json(pem: usize) -> usize {
    pem + pem / 16
}

/// Refuses a part of the membership that needs more than `most` bytes in it.
///
/// # Errors
/// [`Impossible`], naming the part.
pub fn fits<T: Serialize>(what: &str, part: &T, most: usize) -> Result<(), Impossible> {
    match serde_json::to_vec(part).map_or(usize::MAX, |bytes| bytes.len()) {
        length if length <= most => Ok(()),
        length => Err(Impossible(format!("{what} is too long: {length} bytes of at most {most}"))),
    }
}
