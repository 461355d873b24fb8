//! The bytes of a [`Membership`]: JSON with the version of its format. Must never read what is longer than
//! [`MAX_ENCODED`], of a newer format, or what no change could have made.

use serde::{Deserialize, Serialize};

use super::Membership;
use crate::cluster::limits::MAX_ENCODED;

#[derive(Serialize, Deserialize)]
struct Encoded {
    format: u32,
    #[serde(flatten)]
    membership: Membership,
}

impl Membership {
    /// Version of the encoding that this program writes.
    pub const FORMAT: u32 = 1;

    /// The bytes of this membership.
    pub fn encode(&self) -> Vec<u8> {
        let encoded = Encoded { format: Self::FORMAT, membership: self.clone() };
        serde_json::to_vec(&encoded).expect("a membership has no maps with keys that JSON lacks")
    }

    /// The inverse of [`Membership::encode`].
    ///
    /// # Errors
    /// A sentence that says what is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > MAX_ENCODED {
            return Err(format!("a membership of {} bytes is longer than {MAX_ENCODED}", bytes.len()));
        }
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        match value.get("format").and_then(serde_json::Value::as_u64) {
            Some(found) if found > u64::from(Self::FORMAT) => {
                return Err(format!(
                    "membership format {found} is newer than this program's {}: upgrade it",
                    Self::FORMAT
                ));
            }
            _ => {}
        }
        let Encoded { membership, .. } = serde_json::from_value(value).map_err(|error| error.to_string())?;
        membership.check().map_err(|error| error.to_string())?;
        Ok(membership)
    }
}
