//! Who belongs to the cluster, and how that may change. Owns the identities, ranks and addresses of the members and the
//! rules of every change; never talks to anybody.
//!
//! A [`Membership`] is replicated as a whole: the entry of a change carries the membership after it, as JSON, in its
//! context, so that a node that missed an entry has lost nothing once it has a later one.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{
    console_certificate::{CustomCertificate, sound_names},
    level,
    trust::{Coming, KeyId, Rekey, Retired},
};

/// Identity of a node inside its cluster: Raft's node id, 1 or more, never used again after a removal.
pub type NodeId = u64;

/// A complete cluster has this many members; more are never admitted.
pub const CLUSTER_SIZE: usize = 3;
/// Version of the encoding that this program writes.
const FORMAT: u32 = 1;
/// Largest encoded membership, in bytes.
pub const MAX_ENCODED: usize = 32 << 10;
/// Longest name and address of a member, in bytes: that of a DNS name.
pub(super) const MAX_NAME: usize = 253;
/// Removed members that are remembered, newest last, so that they can be told why they are refused.
const REMEMBERED: usize = 32;
/// Longest certificate, in bytes of PEM.
pub(super) const MAX_PEM: usize = 2048;
/// Length of all names of a host's Console certificate together, in bytes: the certificate must stay below [`MAX_PEM`].
pub(super) const MAX_NAMES: usize = 768;
/// What a certificate needs for a name beside it, at most.
pub(super) const PER_NAME: usize = 3;
/// Webhooks of a cluster.
const MAX_WEBHOOKS: usize = 3;
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

/// A change that an administrator (or, for [`Change::Promote`], the primary itself) wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "change")]
pub enum Change {
    /// Lets hosts that know the secret ask for admission.
    Invite { invitation: Invitation },
    /// Closes all invitations.
    Uninvite,
    /// A host asks for admission.
    Request { request: Request },
    /// Turns a request down.
    Reject { request: String },
    /// Takes all hosts that ask in as members without a vote, and closes the invitations.
    Admit { hosts: Vec<Newcomer> },
    /// Keeps the certificate authority.
    Authority { authority: SealedAuthority },
    /// Gives all members a vote, in one joint change.
    Promote,
    /// Drops a member; `at` in seconds since 1970. `force` although the rest has no majority that answers.
    Remove { node: NodeId, at: u64, force: bool },
    /// A member is reached at another address from now on.
    Readdress { node: NodeId, name: String, address: String, port: u16 },
    /// Sends events there from now on, and nowhere else.
    Notify { webhooks: Vec<Webhook> },
    /// No automatic takeover until then, in seconds since 1970.
    Pause { until: u64 },
    /// Automatic takeover again.
    Resume,
    /// The programs of all members have this feature level; `version` is that of the primary's.
    Raise { level: u32, version: String },
    /// The cluster key is to be replaced.
    Rekey,
    /// The primary has made a cluster key; all members fetch it.
    AnnounceKey { id: KeyId },
    /// All members have the announced cluster key: the authority is sealed with it, and so is the certificate that was given
    /// to the Consoles, if there is one.
    Reseal { authority: SealedAuthority, certificate: Option<CustomCertificate> },
    /// All members are to trust this authority, too.
    IntroduceAuthority { coming: Coming },
    /// All members trust it: it signs from now on; `at` in seconds since 1970.
    SwitchAuthority { at: u64 },
    /// All members show certificates of the authority that signs: the old one is not trusted any more.
    DropAuthority,
    /// What all Consoles' certificates are good for, beside the names of their hosts.
    ConsoleNames { names: Vec<String> },
    /// What all Consoles serve; none: certificates of the cluster's authority.
    CustomCertificate { certificate: Option<CustomCertificate> },
}

/// Why a change is not possible. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Impossible(pub String);

#[derive(Serialize, Deserialize)]
struct Encoded {
    format: u32,
    #[serde(flatten)]
    membership: Membership,
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

    /// The membership after a change that `primary` makes.
    ///
    /// # Errors
    /// [`Impossible`], with a sentence for the administrator.
    pub fn changed(&self, change: &Change, primary: NodeId) -> Result<Self, Impossible> {
        let mut next = self.clone();
        match change {
            Change::Invite { invitation } => next.invite(invitation),
            Change::Uninvite => next.invitations.clear(),
            Change::Request { request } => next.request(request)?,
            Change::Reject { request } => {
                let place = next.requests.iter().position(|open| open.id == *request);
                next.requests.remove(place.ok_or_else(|| Impossible("there is no such request".to_owned()))?);
            }
            Change::Admit { hosts } => next.admit(hosts)?,
            Change::Authority { authority } => next.authority = Some(authority.clone()),
            Change::Notify { webhooks } => {
                check_webhooks(webhooks)?;
                next.webhooks.clone_from(webhooks);
            }
            Change::Promote => {
                if self.learners().next().is_none() {
                    return Err(Impossible("all members have a vote already".to_owned()));
                }
                next.members.iter_mut().for_each(|member| member.voter = true);
            }
            Change::Remove { node, at, .. } => next.remove(*node, *at, primary)?,
            Change::Readdress { node, name, address, port } => {
                let member = next.members.iter_mut().find(|member| member.id == *node);
                let member = member.ok_or_else(|| no_member(*node))?;
                (member.name, member.address, member.port) = (name.clone(), address.clone(), *port);
            }
            Change::Pause { until } => next.pause = Some(Pause { until: *until, primary }),
            Change::Resume => {
                if next.pause.take().is_none() {
                    return Err(Impossible("automatic takeover is not paused".to_owned()));
                }
            }
            Change::Raise { level, version } => next.raise(*level, version)?,
            Change::Rekey => next.rekey()?,
            Change::AnnounceKey { id } => next.announce_key(*id)?,
            Change::Reseal { authority, certificate } => next.reseal(authority, certificate.as_ref())?,
            Change::IntroduceAuthority { coming } => next.introduce_authority(coming)?,
            Change::SwitchAuthority { at } => next.switch_authority(*at)?,
            Change::DropAuthority => next.drop_authority()?,
            Change::ConsoleNames { names } => next.console_names = sound_names(names)?,
            Change::CustomCertificate { certificate } => {
                next.custom_certificate = next.sound_certificate(certificate.clone())?;
            }
        }
        next.check()?;
        // Checked here, too: an entry that no member can read would stop them all.
        match next.encode().len() {
            0..=MAX_ENCODED => Ok(next),
            length => Err(Impossible(format!("a membership of {length} bytes is longer than {MAX_ENCODED}"))),
        }
    }

    /// What everybody who may look at the cluster may see: no key, no invitation, no webhook, no request that could be picked
    /// up. Of an authority that is introduced its certificate.
    pub fn public(&self) -> Self {
        let (invitations, webhooks) = (Vec::new(), Vec::new());
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

    fn raise(&mut self, level: u32, version: &str) -> Result<(), Impossible> {
        if level <= self.level {
            return Err(Impossible(format!("the cluster runs feature level {} already", self.level)));
        }
        if version.len() > MAX_NAME {
            return Err(Impossible("the version is too long".to_owned()));
        }
        let before = std::mem::replace(&mut self.level, level);
        self.level_version = version.to_owned();
        // Removals so far could not have the cluster key replaced.
        if before < 2 && !self.removed.is_empty() {
            self.distrust();
        }
        Ok(())
    }

    fn remove(&mut self, node: NodeId, at: u64, primary: NodeId) -> Result<(), Impossible> {
        let place = self.members.iter().position(|member| member.id == node).ok_or_else(|| no_member(node))?;
        if node == primary {
            let name = &self.members[place].name;
            return Err(Impossible(format!("{name} is PRIMARY: switch over to another member first, then remove it")));
        }
        let gone = self.members.remove(place);
        // Nobody could become primary any more.
        self.pause.take_if(|pause| pause.primary == gone.id);
        if self.removed.len() >= REMEMBERED {
            self.removed.remove(0);
        }
        self.removed.push(Removed { id: gone.id, name: gone.name, at });
        self.distrust();
        Ok(())
    }

    /// What must hold for every membership, whoever made it.
    pub(super) fn check(&self) -> Result<(), Impossible> {
        for (place, member) in self.members.iter().enumerate() {
            check_host(&member.name, &member.address, member.port)?;
            for other in &self.members[..place] {
                let same_place = (&member.address, member.port) == (&other.address, other.port);
                if member.name == other.name || same_place || member.rank == other.rank || member.id == other.id {
                    return Err(Impossible(format!(
                        "{} ({}:{}) and {} ({}:{}) cannot be told apart: names and addresses must differ",
                        other.name, other.address, other.port, member.name, member.address, member.port
                    )));
                }
            }
        }
        match self.voters().next() {
            Some(_) => Ok(()),
            None => Err(Impossible("no member with a vote would remain".to_owned())),
        }
    }

    /// The bytes of this membership.
    pub fn encode(&self) -> Vec<u8> {
        let encoded = Encoded { format: FORMAT, membership: self.clone() };
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
            Some(found) if found > u64::from(FORMAT) => {
                return Err(format!("membership format {found} is newer than this program's {FORMAT}: upgrade it"));
            }
            _ => {}
        }
        let Encoded { membership, .. } = serde_json::from_value(value).map_err(|error| error.to_string())?;
        membership.check().map_err(|error| error.to_string())?;
        Ok(membership)
    }
}

/// Bounds, so that a membership with all else at its limits still fits.
fn check_webhooks(webhooks: &[Webhook]) -> Result<(), Impossible> {
    if webhooks.len() > MAX_WEBHOOKS {
        return Err(Impossible(format!("at most {MAX_WEBHOOKS} webhooks are possible")));
    }
    for (place, webhook) in webhooks.iter().enumerate() {
        let Webhook { name, url, secret, ca, .. } = webhook;
        if name.is_empty() || name.len() > 64 || name.contains(char::is_control) {
            return Err(Impossible(format!("{name:?} is no name of a webhook: 1 to 64 bytes, no control characters")));
        }
        if webhooks[..place].iter().any(|other| other.name == *name) {
            return Err(Impossible(format!("two webhooks are called {name:?}")));
        }
        let lengths = [(url.len(), 512), (length(secret), 128), (length(ca), MAX_PEM)];
        if lengths.iter().any(|(length, most)| length > most) {
            return Err(Impossible(format!(
                "webhook {name:?}: the address may have 512 bytes, the secret 128, the authority {MAX_PEM}"
            )));
        }
    }
    Ok(())
}

fn length(text: &Option<String>) -> usize {
    text.as_ref().map_or(0, String::len)
}

fn no_member(node: NodeId) -> Impossible {
    Impossible(format!("node {node} is not a member of this cluster"))
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
mod tests {
    use super::{
        super::{
            admission::{MAX_CSR, MAX_OPEN},
            console_certificate::{MAX_CHAIN, MAX_SEALED},
        },
        *,
    };

    fn request(id: NodeId) -> Request {
        Request {
            id: format!("request{id}"),
            name: format!("host{id}"),
            address: format!("127.0.0.{id}"),
            port: 8086,
            version: "1.2.3".to_owned(),
            level: level::FEATURE_LEVEL,
            fingerprint: format!("AB:{id}"),
            csr: String::new(),
            console_csr: String::new(),
            console_names: Vec::new(),
            clock_ms: 0,
            at: 10,
            until: 20,
        }
    }

    fn newcomer(id: NodeId) -> Newcomer {
        let request = format!("request{id}");
        Newcomer { id, request, certificate: String::new(), console_certificate: String::new() }
    }

    fn ask(membership: &Membership, id: NodeId) -> Membership {
        change(membership, Change::Request { request: request(id) }).unwrap()
    }

    fn one() -> Membership {
        Membership::founded(ClusterId(7), vec![Member::founder(1, "host1", "127.0.0.1", 8086)])
    }

    fn change(membership: &Membership, change: Change) -> Result<Membership, String> {
        membership.changed(&change, 1).map_err(|error| error.to_string())
    }

    #[test]
    fn two_hosts_are_admitted_and_get_a_vote_together() {
        let asked = ask(&ask(&one(), 2), 3);
        let admitted = change(&asked, Change::Admit { hosts: vec![newcomer(2), newcomer(3)] }).unwrap();
        assert_eq!(admitted.learners().collect::<Vec<_>>(), [2, 3]);
        assert_eq!(admitted.next_id, 4);
        let all = change(&admitted, Change::Promote).unwrap();
        assert_eq!(all.voters().collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(all.members.iter().map(|member| member.rank).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(change(&all, Change::Request { request: request(4) }).unwrap_err().contains("complete"));
        assert!(
            change(&ask(&one(), 2), Change::Admit { hosts: vec![newcomer(2)] }).unwrap_err().contains("1 requests")
        );
        assert!(change(&all, Change::Promote).unwrap_err().contains("already"));
        assert_eq!(Membership::decode(&all.encode()).unwrap(), all);
    }

    /// Days may pass until the new authority signs.
    #[test]
    fn a_host_may_join_while_an_authority_is_introduced_and_is_waited_for() {
        let authority = |name: &str| {
            let (certificate, sealed_key) = (name.to_owned(), "sealed".to_owned());
            SealedAuthority { certificate, sealed_key, key: None }
        };
        let alone = Membership { authority: Some(authority("old")), ..one() };
        let coming = Coming { authority: authority("new"), overlap: 60 };
        let both = change(&ask(&alone, 2), Change::IntroduceAuthority { coming }).unwrap();
        assert_eq!(both.public().coming.unwrap().authority.sealed_key, "");
        let switch = |membership: &Membership, at| change(membership, Change::SwitchAuthority { at });
        let asked = ask(&both, 3);
        assert!(switch(&asked, 19).unwrap_err().contains("on their way"));
        assert!(switch(&asked, 20).unwrap().requests.is_empty(), "they have expired");
        let admitted = change(&asked, Change::Admit { hosts: vec![newcomer(2), newcomer(3)] }).unwrap();
        assert!(switch(&admitted, 90).unwrap_err().contains("on their way"));
        let all = change(&admitted, Change::Promote).unwrap();
        assert_eq!(switch(&all, 90).unwrap().authority, Some(authority("new")));
    }

    #[test]
    fn a_removed_member_leaves_its_rank_and_keeps_its_id() {
        let asked = ask(&ask(&one(), 2), 3);
        let admitted = change(&asked, Change::Admit { hosts: vec![newcomer(2), newcomer(3)] }).unwrap();
        let all = change(&admitted, Change::Promote).unwrap();
        let remove = |node| Change::Remove { node, at: 99, force: false };
        assert!(change(&all, remove(1)).unwrap_err().contains("switch over"));
        assert!(change(&all, remove(9)).unwrap_err().contains("not a member"));
        let two = change(&all, remove(2)).unwrap();
        assert_eq!(two.removed(2).unwrap().name, "host2");
        let asked = ask(&two, 2);
        assert!(change(&asked, Change::Admit { hosts: vec![newcomer(2)] }).unwrap_err().contains("meanwhile"));
        let again = Newcomer { id: 4, ..newcomer(2) };
        let three = change(&asked, Change::Admit { hosts: vec![again] }).unwrap();
        assert_eq!((three.rank(4), three.rank(3)), (Some(1), Some(2)));
    }

    #[test]
    fn what_cannot_be_told_apart_or_dialled_is_refused() {
        let join = |edit: fn(&mut Request)| {
            let mut request = request(2);
            edit(&mut request);
            change(&one(), Change::Request { request })
        };
        assert!(join(|host| host.name = "host1".to_owned()).unwrap_err().contains("told apart"));
        assert!(join(|host| host.address = "127.0.0.1".to_owned()).unwrap_err().contains("told apart"));
        assert!(join(|host| host.name = "<script>".to_owned()).unwrap_err().contains("not a host name"));
        assert!(join(|host| host.address = "a b".to_owned()).unwrap_err().contains("neither"));
        assert!(join(|host| host.port = 0).unwrap_err().contains("port 0"));
        assert!(join(|host| host.csr = " ".repeat(MAX_CSR + 1)).unwrap_err().contains("too long"));
        assert!(join(|host| host.console_names = vec!["a".repeat(99); 9]).unwrap_err().contains("too long"));
        let fitting =
            console_names_that_fit(["b".to_owned(), "c".repeat(254)].into_iter().chain(vec!["a".repeat(99); 9]));
        assert_eq!(fitting.len(), 8, "the first ones are kept");
        let many = console_names_that_fit(vec!["a".repeat(9); 99]);
        assert_eq!(many.len(), MAX_CONSOLE_NAMES);
        for names in [fitting, many] {
            let host = Request { console_names: names, ..request(2) };
            change(&one(), Change::Request { request: host }).unwrap();
        }
        assert!(join(|_| {}).is_ok());
    }

    #[test]
    fn requests_and_invitations_are_bounded_and_expire() {
        let asked = ask(&one(), 2);
        let other = Request { fingerprint: "CD".to_owned(), ..request(2) };
        assert!(change(&asked, Change::Request { request: other.clone() }).unwrap_err().contains("reject one"));
        let later = Request { at: 20, until: 30, ..other };
        assert_eq!(change(&asked, Change::Request { request: later.clone() }).unwrap().requests, [later]);
        assert_eq!(ask(&asked, 2).requests.len(), 1);
        assert!(change(&asked, Change::Reject { request: "request2".into() }).unwrap().requests.is_empty());
        assert!(change(&asked, Change::Reject { request: "other".into() }).is_err());
        let invite = |membership: &Membership, at| {
            let invitation = Invitation { hash: format!("{at:x}"), at, until: at + 100, by: "admin".to_owned() };
            change(membership, Change::Invite { invitation })
        };
        let mut invited = one();
        for at in 0..MAX_OPEN as u64 {
            invited = invite(&invited, at).unwrap();
        }
        assert_eq!(invite(&invited, 101).unwrap().invitations.len(), MAX_OPEN - 1, "two have expired");
        let ends = |membership: &Membership| membership.invitations.iter().map(|open| open.until).collect::<Vec<_>>();
        invited.invitations[0].until = 900;
        let more = invite(&invited, 99).unwrap();
        assert_eq!(ends(&more), [900, 102, 103, 104, 105, 106, 107, 199], "the one that ends first gives way");
        assert_eq!(ends(&invite(&more, 99).unwrap())[..2], [900, 103]);
        assert!(change(&invited, Change::Uninvite).unwrap().invitations.is_empty());
    }

    #[test]
    fn a_pause_names_who_may_serve() {
        let paused = change(&one(), Change::Pause { until: 5 }).unwrap();
        assert_eq!(paused.pause, Some(Pause { until: 5, primary: 1 }));
        assert_eq!(change(&paused, Change::Resume).unwrap(), one());
        assert!(change(&one(), Change::Resume).unwrap_err().contains("not paused"));
    }

    #[test]
    fn names_of_the_console_are_dns_names_or_addresses() {
        let set = |names: &[&str]| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            change(&one(), Change::ConsoleNames { names })
        };
        let good = ["lb.example.com", "LB.example.com", "*.example.com", "192.0.2.7", "2001:db8::7", "console", "a_b"];
        let set_to = set(&good).unwrap();
        assert_eq!(set_to.console_names[0], "lb.example.com");
        assert_eq!(set_to.console_names.len(), good.len() - 1, "each once");
        assert_eq!(Membership::decode(&set_to.encode()).unwrap(), set_to);
        assert!(set(&[]).unwrap().console_names.is_empty());
        for wrong in
            ["", "a b", "https://a", "a:8083", "*.com", "*", "a.*.b", "-a", "a..b", "1.2.3", "1.2.3.4.5", "a\n", "ä"]
        {
            assert!(set(&[wrong]).unwrap_err().contains("cannot be in a certificate"), "{wrong}");
        }
        assert!(set(&["a".repeat(64).as_str()]).is_err());
        let many: Vec<String> = (0..33).map(|n| format!("h{n}")).collect();
        assert!(change(&one(), Change::ConsoleNames { names: many }).unwrap_err().contains("at most 32 names"));
        let long = (0..30).map(|n| format!("{n}x.{}.example", "a".repeat(60))).collect();
        assert!(change(&one(), Change::ConsoleNames { names: long }).unwrap_err().contains("2048"));
    }

    #[test]
    fn a_custom_certificate_is_bounded_and_not_for_everybody() {
        let with = |chain: usize, key: usize| {
            let (chain, sealed_key) = ("c".repeat(chain), "k".repeat(key));
            let certificate =
                Some(CustomCertificate { chain, sealed_key, key: KeyId(1), by: "admin".to_owned(), at: 7 });
            change(&one(), Change::CustomCertificate { certificate })
        };
        assert!(with(MAX_CHAIN + 1, 1).unwrap_err().contains("too long"));
        assert!(with(1, MAX_SEALED + 1).unwrap_err().contains("too long"));
        let largest = with(MAX_CHAIN, MAX_SEALED).unwrap();
        assert_eq!(Membership::decode(&largest.encode()).unwrap(), largest);
        assert_eq!(largest.public(), one());
        assert_eq!(change(&largest, Change::CustomCertificate { certificate: None }).unwrap(), one());
    }

    #[test]
    fn a_level_rises_and_never_falls_and_an_older_program_reads_past_it() {
        let raise =
            |membership: &Membership, level| change(membership, Change::Raise { level, version: format!("{level}.0") });
        let old = Membership { level: 1, level_version: String::new(), ..one() };
        assert!(!String::from_utf8(old.encode()).unwrap().contains("level"), "as before there were levels");
        assert_eq!(Membership::decode(&old.encode()).unwrap(), old);
        let raised = raise(&old, 7).unwrap();
        assert_eq!((raised.level, raised.level_version.as_str()), (7, "7.0"));
        assert_eq!(Membership::decode(&raised.encode()).unwrap(), raised);
        for level in [6, 7] {
            assert!(raise(&raised, level).unwrap_err().contains("level 7 already"));
        }
        let paused = change(&raised, Change::Pause { until: 5 }).unwrap();
        assert_eq!(paused.level, 7);
    }

    #[test]
    fn damaged_and_newer_bytes_are_refused() {
        let bytes = one().encode();
        assert!(Membership::decode(&bytes[1..]).is_err());
        let newer = String::from_utf8(bytes).unwrap().replace("\"format\":1", "\"format\":2");
        assert!(Membership::decode(newer.as_bytes()).unwrap_err().contains("newer"));
        assert!(Membership::decode(&vec![b' '; MAX_ENCODED + 1]).is_err());
    }
}
