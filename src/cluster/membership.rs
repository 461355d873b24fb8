//! Who belongs to the cluster: the identities, ranks and addresses of the members, and what else all must agree on. How
//! that may change is in `change`. Never talks to anybody.
//!
//! A [`Membership`] is replicated as a whole: the entry of a change carries the membership after it, as JSON, in its
//! context, so that a node that missed an entry has lost nothing once it has a later one.

mod admission;
mod change;
mod differences;
mod encoding;

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

pub use self::{
    admission::{Adoption, Newcomer},
    change::Change,
    differences::{Difference, differences},
};
use super::{
    limits::Impossible,
    roster::{Member, NodeId, Removed, Roster},
    shared::Shared,
};

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

/// What all nodes agree on: who they are, and what else they share. In JSON both are one object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    pub cluster: ClusterId,
    #[serde(flatten)]
    pub roster: Roster,
    #[serde(flatten)]
    pub shared: Shared,
}

impl Membership {
    /// The membership of a new cluster.
    pub fn founded(cluster: ClusterId, members: Vec<Member>) -> Self {
        Self { cluster, roster: Roster::founded(members), shared: Shared::founded() }
    }

    /// The addresses of the members, of those that are not given by name.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.roster.members.iter().filter_map(|member| member.address.parse().ok())
    }

    /// The member with this id.
    pub fn get(&self, id: NodeId) -> Option<&Member> {
        self.roster.get(id)
    }

    /// What a member is called; a node that is no member has its number.
    pub fn name(&self, id: NodeId) -> String {
        self.get(id).map_or_else(|| format!("node {id}"), |member| member.name.clone())
    }

    /// The place of a member in the order of elections; the first one campaigns first.
    pub fn rank(&self, id: NodeId) -> Option<usize> {
        self.get(id).map(|member| usize::from(member.rank))
    }

    /// The ids of all members with a vote.
    pub fn voters(&self) -> impl Iterator<Item = NodeId> {
        self.roster.members.iter().filter(|member| member.voter).map(|member| member.id)
    }

    /// The ids of all members that have no vote yet.
    pub fn learners(&self) -> impl Iterator<Item = NodeId> {
        self.roster.members.iter().filter(|member| !member.voter).map(|member| member.id)
    }

    /// The record of a member of the past.
    pub fn removed(&self, id: NodeId) -> Option<&Removed> {
        self.roster.removed.iter().find(|removed| removed.id == id)
    }

    /// True if a host is on its way in at this time: it was told which authority to trust, and by which it will know
    /// the cluster.
    pub fn has_newcomers(&self, at: u64) -> bool {
        self.shared.requests.iter().any(|open| open.in_force(at)) || self.learners().next().is_some()
    }

    /// What everybody who may look at the cluster may see: no key, no webhook, nothing that could be picked up.
    pub fn public(&self) -> Self {
        Self { cluster: self.cluster, roster: self.roster.public(), shared: self.shared.public() }
    }

    /// What must hold for every membership, whoever made it.
    pub(super) fn check(&self) -> Result<(), Impossible> {
        self.roster.check()
    }
}

#[cfg(test)]
mod tests;
