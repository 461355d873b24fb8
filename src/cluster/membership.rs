//! Who belongs to the cluster: the identities, ranks and addresses of the members, and what else all must agree on. How that
//! may change is in `change`. Never talks to anybody.
//!
//! A [`Membership`] is replicated as a whole: the entry of a change carries the membership after it, as JSON, in its
//! context, so that a node that missed an entry has lost nothing once it has a later one.

mod change;
mod encoding;

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

pub use self::change::{Change, Impossible};
use super::{
    console_certificate::CustomCertificate,
    level,
    trust::{Coming, KeyId, Rekey, Retired},
    validity::in_force,
};

/// Identity of a node inside its cluster: Raft's node id, 1 or more, never used again after a removal.
pub type NodeId = u64;

/// A complete cluster has this many members; more are never admitted.
pub const CLUSTER_SIZE: usize = 3;
/// Largest encoded membership, in bytes.
pub const MAX_ENCODED: usize = 32 << 10;
/// Longest name and address of a member, in bytes: that of a DNS name.
pub(super) const MAX_NAME: usize = 253;
/// Longest certificate, in bytes of PEM.
pub(super) const MAX_PEM: usize = 2048;
/// Length of all names of a host's Console certificate together, in bytes: the certificate must stay below [`MAX_PEM`].
pub(super) const MAX_NAMES: usize = 768;
/// What a certificate needs for a name beside it, at most.
pub(super) const PER_NAME: usize = 3;
/// Names of a Console certificate.
pub const MAX_CONSOLE_NAMES: usize = 32;

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
    /// Place in the order of elections, 0 first: unlike that of any other member, and kept for life.
    pub rank: u8,
    /// False until it has caught up after it was admitted: it replicates, but has no vote (STARTUP2).
    pub voter: bool,
    /// The request by which it joined and the certificate that was signed for it, for the newcomer to pick up from any
    /// primary; none for a founder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admission: Option<Admission>,
}

/// What a newcomer picks up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// [`Request::id`].
    pub request: String,
    /// The node's certificate, PEM.
    pub certificate: String,
    /// The certificate of its Console, PEM.
    pub console_certificate: String,
}

impl Member {
    /// Where the other members reach it.
    pub fn place(&self) -> String {
        place(&self.address, self.port)
    }

    /// A founding member: a voter whose rank is that of its id.
    pub fn founder(id: NodeId, name: &str, address: &str, port: u16) -> Self {
        let rank = u8::try_from(id.saturating_sub(1)).unwrap_or(u8::MAX);
        Self { id, name: name.to_owned(), address: address.to_owned(), port, rank, voter: true, admission: None }
    }
}

/// A host that asks to join (REQUEST_JOIN).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Random and secret between the host and the cluster: whoever knows it may pick up the answer.
    pub id: String,
    pub name: String,
    pub address: String,
    pub port: u16,
    /// Version of its program.
    pub version: String,
    /// What its program can do.
    #[serde(default = "level::first", skip_serializing_if = "level::is_first")]
    pub level: u32,
    /// Fingerprint of its public key, which both sides show.
    pub fingerprint: String,
    /// Its signing request for the node's certificate, PEM.
    pub csr: String,
    /// Its signing request for the Console's certificate, PEM, and the names that it is to have.
    pub console_csr: String,
    pub console_names: Vec<String>,
    /// Milliseconds by which its clock is ahead of the primary's.
    pub clock_ms: i64,
    /// When it came and when it expires, in seconds since 1970.
    pub at: u64,
    pub until: u64,
}

/// The permission to ask for admission: what a join script carries is the secret to this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// SHA-256 of the secret, in hexadecimal digits.
    pub hash: String,
    /// When it was made and when it expires, in seconds since 1970.
    pub at: u64,
    pub until: u64,
    /// Who made it.
    pub by: String,
}

/// Hexadecimal digits of an invitation's hash by which it is known to those who may not use it.
const INVITATION_ID: usize = 16;

/// `host:port`, as people read it and URLs have it: an IPv6 address stands in brackets (RFC 3986 section 3.2.2).
pub fn place(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

impl Request {
    /// Where the host is reached.
    pub fn place(&self) -> String {
        place(&self.address, self.port)
    }

    /// True while an administrator may admit the host; `now` in seconds since 1970.
    pub fn in_force(&self, now: u64) -> bool {
        in_force(self.at, self.until, now)
    }
}

impl Invitation {
    /// True while hosts may ask for admission with it; `now` in seconds since 1970.
    pub fn in_force(&self, now: u64) -> bool {
        in_force(self.at, self.until, now)
    }

    /// What tells it from others: too little of its hash to prove anything.
    pub fn id(&self) -> String {
        self.hash.chars().take(INVITATION_ID).collect()
    }

    /// That there is one, and until when.
    fn public(&self) -> Self {
        Self { hash: self.id(), by: String::new(), ..*self }
    }
}

/// Where events are sent: an HTTP request for each.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Webhook {
    /// Unlike that of any other.
    pub name: String,
    /// `https://` or `http://`; may itself be a secret.
    pub url: String,
    /// Key of the signature of each request; none: they are not signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
    /// The only authority that its certificate may come from, PEM; none: those that the host trusts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// The least severe event that is sent: info, warning or critical.
    pub severity: String,
}

impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Webhook").field("name", &self.name).field("severity", &self.severity).finish_non_exhaustive()
    }
}

/// The cluster's certificate authority, as all members keep it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedAuthority {
    /// Its certificate, PEM.
    pub certificate: String,
    /// Its private key, encrypted with the key that only members hold; base64.
    pub sealed_key: String,
    /// Names that key; none if it is the one that the cluster was founded with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyId>,
}

/// A host that is to be admitted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Newcomer {
    /// [`Membership::next_id`] or above: its certificate was signed for this id.
    pub id: NodeId,
    /// [`Request::id`].
    pub request: String,
    /// The node's certificate, PEM.
    pub certificate: String,
    /// The certificate of its Console, PEM.
    pub console_certificate: String,
}

/// A member of the past.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    pub id: NodeId,
    pub name: String,
    /// When, in seconds since 1970.
    pub at: u64,
}

/// Maintenance: no automatic takeover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// When it ends by itself, in seconds since 1970.
    pub until: u64,
    /// The only node that may become primary meanwhile: the one that was, when the pause began.
    pub primary: NodeId,
}

impl Pause {
    /// The longest pause, in seconds.
    pub const LONGEST: u64 = 86_400;

    /// True while nobody else may take over; `now` in seconds since 1970. No pause ends later than [`Self::LONGEST`] from
    /// now: if one seems to, the clock that set its end was ahead, and it must not keep takeovers off until then.
    pub fn in_force(&self, now: u64) -> bool {
        in_force(self.until.saturating_sub(Self::LONGEST), self.until, now)
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
    /// See [`super::trust`], these three.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rekey: Option<Rekey>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coming: Option<Coming>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retired: Option<Retired>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub webhooks: Vec<Webhook>,
}

/// Of the names that a host would like in its Console certificate, the first ones that a request may have.
pub fn console_names_that_fit(names: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut room = MAX_NAMES;
    let fits = |name: &String| {
        let left = room.checked_sub(name.len() + PER_NAME).filter(|_| !name.is_empty() && name.len() <= MAX_NAME);
        room = left.unwrap_or(room);
        left.is_some()
    };
    names.into_iter().filter(fits).take(MAX_CONSOLE_NAMES).collect()
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

/// Refuses names and addresses that could not be shown, dialled or told apart.
///
/// # Errors
/// [`Impossible`], naming the value.
pub fn check_host(name: &str, address: &str, port: u16) -> Result<(), Impossible> {
    let readable = |text: &str, extra: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || extra.contains(c);
        !text.is_empty() && text.len() <= MAX_NAME && text.chars().all(allowed)
    };
    if !readable(name, "-._") {
        return Err(Impossible(format!("{name:?} is not a host name: letters, digits, '-', '.' and '_' are allowed")));
    }
    if !readable(address, "-.:_") {
        return Err(Impossible(format!("{address:?} is neither a host name nor an IP address")));
    }
    if port == 0 {
        return Err(Impossible(format!("port 0 of {name} cannot be dialled")));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
