//! How long the texts may be that all members keep, and the refusal of what cannot be. Owns what the parts of the membership have in
//! common; must never know one of them.

use thiserror::Error;
/// Largest encoded membership, in bytes.
pub const MAX_ENCODED: usize = 32 << 10;
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
