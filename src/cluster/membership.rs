//! Who belongs to the cluster: the identities, ranks and addresses of the members, and what else all must agree on. How that
//! may change is in `change`. Never talks to anybody.
//!
//! A [`Membership`] is replicated as a whole: the entry of a change carries the membership after it, as JSON, in its
//! context, so that a node that missed an entry has lost nothing once it has a later one.

mod admission;
mod change;
mod encoding;

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

pub use self::{admission::Newcomer, change::Change};
use super::{
    level,
    limits::Impossible,
    roster::{Member, NodeId, Pause, Removed, check_host},
    shared::{
        Invitation, Request,
        authority::{Coming, Rekey, Retired, SealedAuthority},
        console_certificate::CustomCertificate,
        webhook::Webhook,
    },
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

/// The members in the order of their ids, and what else all nodes must agree on about them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    pub cluster: ClusterId,
    pub members: Vec<Member>,
    /// The id that the next newcomer gets; all below are or were in use.
    pub next_id: NodeId,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<Removed>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<Pause>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requests: Vec<Request>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub invitations: Vec<Invitation>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<SealedAuthority>,
    /// What every Console's certificate is good for beside the names of its own host: those of a load balancer, say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub console_names: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub custom_certificate: Option<CustomCertificate>,
    /// The feature level in force: what the programs of all members have. Never lowered.
    #[serde(default = "level::first", skip_serializing_if = "level::is_first")]
    pub level: u32,
    /// Version of the program that raised it: older ones may not take part.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub level_version: String,
    /// See [`super::shared::authority`], these three.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rekey: Option<Rekey>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coming: Option<Coming>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retired: Option<Retired>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub webhooks: Vec<Webhook>,
}

impl Membership {
    /// Where the members are, as far as that is an address and no name.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.members.iter().filter_map(|member| member.address.parse().ok())
    }

    /// The membership of a new cluster.
    pub fn founded(cluster: ClusterId, members: Vec<Member>) -> Self {
        let next_id = members.iter().map(|member| member.id).max().unwrap_or(0) + 1;
        Self {
            cluster,
            members,
            next_id,
            removed: Vec::new(),
            pause: None,
            requests: Vec::new(),
            invitations: Vec::new(),
            authority: None,
            console_names: Vec::new(),
            custom_certificate: None,
            level: level::FEATURE_LEVEL,
            level_version: level::PROGRAM_VERSION.to_owned(),
            rekey: None,
            coming: None,
            retired: None,
            webhooks: Vec::new(),
        }
    }

    /// The member with this id.
    pub fn get(&self, id: NodeId) -> Option<&Member> {
        self.members.iter().find(|member| member.id == id)
    }

    /// The place of a member in the order of elections; the first one campaigns first.
    pub fn rank(&self, id: NodeId) -> Option<usize> {
        self.get(id).map(|member| usize::from(member.rank))
    }

    /// The ids of all members with a vote.
    pub fn voters(&self) -> impl Iterator<Item = NodeId> {
        self.members.iter().filter(|member| member.voter).map(|member| member.id)
    }

    /// The ids of all members that have no vote yet.
    pub fn learners(&self) -> impl Iterator<Item = NodeId> {
        self.members.iter().filter(|member| !member.voter).map(|member| member.id)
    }

    /// The record of a member of the past.
    pub fn removed(&self, id: NodeId) -> Option<&Removed> {
        self.removed.iter().find(|removed| removed.id == id)
    }

    /// What everybody who may look at the cluster may see: no key, no webhook, no request that could be picked up. Of an
    /// invitation its [`Invitation::id`], of an authority that is introduced its certificate.
    pub fn public(&self) -> Self {
        let (invitations, webhooks) = (self.invitations.iter().map(Invitation::public).collect(), Vec::new());
        let (authority, custom_certificate) = (None, None);
        let mut public = Self { invitations, authority, custom_certificate, webhooks, ..self.clone() };
        if let Some(coming) = &mut public.coming {
            coming.authority.sealed_key.clear();
        }
        public.members.iter_mut().for_each(|member| member.admission = None);
        for request in &mut public.requests {
            (request.id, request.csr, request.console_csr) = Default::default();
        }
        public
    }

    /// What must hold for every membership, whoever made it.
    pub(super) fn check(&self) -> Result<(), Impossible> {
        for (place, member) in self.members.iter().enumerate() {
            check_host(&member.name, &member.address, member.port)?;
            for other in &self.members[..place] {
                let same_place = (&member.address, member.port) == (&other.address, other.port);
                if member.name == other.name || same_place || member.rank == other.rank || member.id == other.id {
                    return Err(Impossible(format!(
                        "{} ({}) and {} ({}) cannot be told apart: names and addresses must differ",
                        other.name,
                        other.place(),
                        member.name,
                        member.place()
                    )));
                }
            }
        }
        match self.voters().next() {
            Some(_) => Ok(()),
            None => Err(Impossible("no member with a vote would remain".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests;
