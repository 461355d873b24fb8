//! The secret that all hosts of a pool share, and the proof of knowing it. Must never show the secret, or compare in a
//! time that depends on where two proofs differ.

use std::{fmt, fs, io::Read, ops::RangeInclusive, path::Path};

use data_encoding::HEXLOWER_PERMISSIVE;
use ring::hmac;

use super::wire::NONCE;

/// Length in bytes, without the line feed at its end. Whoever answers in a host's place sees a proof, and could try
/// secrets that people make up.
const LENGTH: RangeInclusive<usize> = 32..=1024;
/// What a proof begins with.
const LABEL: &[u8] = b"twistlock pool meeting 1\0";

/// Who proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Caller,
    Host,
}

/// What a proof is about: all that two ends of one connection share.
pub(super) struct Bond {
    /// Keying material of the TLS connection.
    pub material: [u8; 32],
    pub caller: [u8; NONCE],
    pub host: [u8; NONCE],
    /// Of the host's key.
    pub fingerprint: String,
}

/// The content of `CLUSTERED_DB_SECRET_FILE`. Shows nothing of itself.
#[derive(Clone)]
pub struct Secret(hmac::Key);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// Reads the file.
    ///
    /// # Errors
    /// A sentence that names the file when it cannot be read, or is too short or too long.
    pub fn read(path: &Path) -> Result<Self, String> {
        let refused = |why: String| format!("CLUSTERED_DB_SECRET_FILE {} cannot be used: {why}", path.display());
        let mut bytes = Vec::new();
        let file = fs::File::open(path).map_err(|error| refused(error.to_string()))?;
        file.take(*LENGTH.end() as u64 + 3).read_to_end(&mut bytes).map_err(|error| refused(error.to_string()))?;
        while bytes.ends_with(b"\n") || bytes.ends_with(b"\r") {
            bytes.pop();
        }
        Self::new(&bytes).ok_or_else(|| {
            let (least, most) = (LENGTH.start(), LENGTH.end());
            refused(format!("it must hold {least} to {most} bytes (openssl rand -hex 32 makes them)"))
        })
    }

    /// None if it is too short or too long.
    pub(super) fn new(bytes: &[u8]) -> Option<Self> {
        LENGTH.contains(&bytes.len()).then(|| Self(hmac::Key::new(hmac::HMAC_SHA256, bytes)))
    }

    pub(super) fn prove(&self, side: Side, bond: &Bond) -> String {
        data_encoding::HEXLOWER.encode(hmac::sign(&self.0, &statement(side, bond)).as_ref())
    }

    pub(super) fn is_proven(&self, side: Side, bond: &Bond, proof: &str) -> bool {
        let Ok(proof) = HEXLOWER_PERMISSIVE.decode(proof.as_bytes()) else { return false };
        hmac::verify(&self.0, &statement(side, bond), &proof).is_ok()
    }
}

/// Everything but the fingerprint, which comes last, has a length of its own.
fn statement(side: Side, bond: &Bond) -> Vec<u8> {
    let side: &[u8] = match side {
        Side::Caller => b"caller\0",
        Side::Host => b"host\0\0\0",
    };
    [LABEL, side, &bond.material, &bond.caller, &bond.host, bond.fingerprint.as_bytes()].concat()
}
