//! The names of keys and authorities, and which of them a member holds. How they are replaced is in
//! [`super::shared::authority`]. Must never hold a key itself.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Names a key or an authority without telling anything about it: 128 bits of a digest.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct KeyId(pub u128);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

impl FromStr for KeyId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match u128::from_str_radix(text, 16) {
            Ok(id) if text.len() == 32 => Ok(Self(id)),
            _ => Err(format!("'{text}' is not the id of a key: 32 hexadecimal digits")),
        }
    }
}

impl Serialize for KeyId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for KeyId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What a member has on its disk, as it says itself. A zero: nothing, or nothing that it could name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holdings {
    /// The cluster key that was announced, if it has that one; else the one that it uses.
    pub key: KeyId,
    /// The newest authority that it trusts.
    pub trusts: KeyId,
    /// The authority that signed the certificates that it shows.
    pub shows: KeyId,
}
