//! Who belongs to the cluster. Owns the identities and the order (rank) of the members; never talks to anybody.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Identity of a node inside its cluster: Raft's node id, 1 or more, never used again after a removal.
pub type NodeId = u64;

/// Identity of a cluster: 128 random bits, written as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClusterId(pub u128);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterId({self})")
    }
}

impl FromStr for ClusterId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match u128::from_str_radix(text, 16) {
            Ok(id) if text.len() == 32 => Ok(Self(id)),
            _ => Err(format!("'{text}' is not a cluster id of 32 hexadecimal digits")),
        }
    }
}

impl Serialize for ClusterId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ClusterId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One member of the cluster as the others reach it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub id: NodeId,
    pub name: String,
    /// Host name or IP address that the other members dial, and that this one dials from when it is an IP address.
    pub address: String,
    /// `HIGH_AVAILABILITY_PORT` of this member.
    pub port: u16,
}

/// The members in the order of their ids. The position is the member's rank in elections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    pub cluster: ClusterId,
    pub members: Vec<Member>,
}

impl Membership {
    /// The member with this id.
    pub fn get(&self, id: NodeId) -> Option<&Member> {
        self.members.iter().find(|member| member.id == id)
    }

    /// The position of a member in the configured order; the first one campaigns first.
    pub fn rank(&self, id: NodeId) -> Option<usize> {
        self.members.iter().position(|member| member.id == id)
    }
}
