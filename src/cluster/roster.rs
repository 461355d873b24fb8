//! Who belongs to the cluster, who votes, and whether somebody else may take over. Owns the rules for one member; must
//! never talk to anybody.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{
    limits::{Impossible, MAX_NAME, MAX_PEM, fits, in_json},
    validity::in_force,
};

/// Identity of a node inside its cluster: Raft's node id, 1 or more, never used again after a removal.
pub type NodeId = u64;

/// The most members that any cluster may have: what bounds the size of a [`Roster`].
pub const MOST: usize = 7;

/// How many members a cluster has once it is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SizePolicy {
    /// With fewer members, hosts are missing.
    pub least: usize,
    /// More members are never admitted; at most [`MOST`].
    pub most: usize,
}

impl SizePolicy {
    /// HA mode: exactly three.
    pub const fn ha() -> Self {
        Self { least: 3, most: 3 }
    }

    /// A pool.
    pub const fn pool() -> Self {
        Self { least: 3, most: MOST }
    }

    fn is_ha(&self) -> bool {
        *self == Self::ha()
    }

    /// True for a pool, whatever its members are at the moment.
    pub fn is_pool(self) -> bool {
        !self.is_ha()
    }

    /// True if a complete cluster may have so many members.
    pub fn permits(self, members: usize) -> bool {
        (self.least..=self.most).contains(&members)
    }

    /// True if one member less would tolerate fewer failures: an even number is permitted, and gains nothing.
    pub fn is_advised(self, members: usize) -> bool {
        self.permits(members) && members % 2 == 1
    }

    /// Hosts that are missing with so many members.
    pub fn missing(self, members: usize) -> usize {
        self.least.saturating_sub(members)
    }
}

impl fmt::Display for SizePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { least, most } = self;
        if least == most { write!(f, "{most}") } else { write!(f, "{least} to {most}") }
    }
}

/// How many of so many voters are a majority.
pub const fn majority(voters: usize) -> usize {
    voters / 2 + 1
}

/// How many of so many voters may fail and leave a majority; 0 without voters.
pub const fn tolerated(voters: usize) -> usize {
    voters.saturating_sub(majority(voters))
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
    /// primary; none for a founder and for members with a vote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admission: Option<Admission>,
}

/// What a newcomer picks up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// The id of its request ([`super::shared::Request::id`]).
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

/// `host:port`, as people read it and URLs have it: an IPv6 address stands in brackets (RFC 3986 section 3.2.2).
pub fn place(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// A member of the past.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    pub id: NodeId,
    pub name: String,
    /// When, in seconds since 1970.
    pub at: u64,
    /// Where it was, in a pool: whoever removes it by its address sees it go. Empty in HA mode.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub address: String,
}

/// Maintenance: no automatic takeover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// When it ends by itself, in seconds since 1970.
    pub until: u64,
    /// The only node that may become primary meanwhile: the one that was primary when the pause began.
    pub primary: NodeId,
}

impl Pause {
    /// The longest pause, in seconds.
    pub const LONGEST: u64 = 86_400;

    /// True while nobody else may take over; `now` in seconds since 1970. No pause ends later than [`Self::LONGEST`]
    /// from now: if one seems to, the clock that set its end was ahead, and it must not prevent takeovers until then.
    pub fn in_force(&self, now: u64) -> bool {
        in_force(self.until.saturating_sub(Self::LONGEST), self.until, now)
    }
}

/// Bytes of one member, at most: two names, and the two certificates and the request of an admission.
const MAX_MEMBER: usize = 3 * MAX_NAME + 2 * in_json(MAX_PEM) + 256;
/// Bytes of one removed member.
const MAX_REMOVED: usize = 2 * MAX_NAME + 94;
/// Bytes of a roster of [`MOST`] members with all at its limit.
pub(super) const MAX_ROSTER: usize = MOST * MAX_MEMBER + REMEMBERED * MAX_REMOVED + 512;
/// Removed members that are remembered, newest last, so that they can be told why they are refused.
const REMEMBERED: usize = 32;

/// The members in the order of their ids, those of the past, the pause, and how many members there may be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roster {
    pub members: Vec<Member>,
    /// The id that the next newcomer gets; all below are or were in use.
    pub next_id: NodeId,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<Removed>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<Pause>,
    /// Chosen when the cluster is founded.
    #[serde(default = "SizePolicy::ha", skip_serializing_if = "SizePolicy::is_ha")]
    pub size: SizePolicy,
}

impl Roster {
    /// The roster of a new cluster.
    pub fn founded(members: Vec<Member>) -> Self {
        let next_id = members.iter().map(|member| member.id).max().unwrap_or(0) + 1;
        Self { members, next_id, removed: Vec::new(), pause: None, size: SizePolicy::ha() }
    }

    /// The member with this id.
    pub fn get(&self, id: NodeId) -> Option<&Member> {
        self.members.iter().find(|member| member.id == id)
    }

    /// The roster as everybody may see it: without what newcomers pick up.
    pub(super) fn public(&self) -> Self {
        let members = self.members.iter().map(|member| Member { admission: None, ..member.clone() }).collect();
        Self { members, ..self.clone() }
    }

    /// Adds a member without a vote, which takes the first free rank.
    pub(super) fn push(
        &mut self,
        id: NodeId,
        (name, address, port): (String, String, u16),
        admission: Option<Admission>,
    ) -> Result<(), Impossible> {
        let taken = |rank: &u8| self.members.iter().any(|member| member.rank == *rank);
        let Some(rank) = (0..self.size.most as u8).find(|rank| !taken(rank)) else {
            return Err(Impossible(format!("a cluster has {} members: remove one first", self.size)));
        };
        let member = Member { id, name, address, port, rank, voter: false, admission };
        fits("a member", &member, MAX_MEMBER)?;
        self.members.push(member);
        self.members.sort_by_key(|member| member.id);
        Ok(())
    }

    /// All members have a vote. That ends their admissions.
    pub(super) fn promote(&mut self) -> Result<(), Impossible> {
        if self.members.iter().all(|member| member.voter) {
            return Err(Impossible("all members have a vote already".to_owned()));
        }
        self.members.iter_mut().for_each(|member| member.voter = true);
        Ok(())
    }

    /// An admission is over when its host votes. Until then the host may need it at any time: it may not have fetched
    /// its certificates, or may have been restarted before they were on its disk. To catch up it had to show them to
    /// the others, and it keeps them on its disk before it does. Those that older programs have left go with the next
    /// change of any kind.
    pub(super) fn end_admissions(&mut self) {
        self.members.iter_mut().filter(|member| member.voter).for_each(|member| member.admission = None);
    }

    pub(super) fn demote(&mut self, node: NodeId) -> Result<(), Impossible> {
        let member = self.members.iter_mut().find(|member| member.id == node && member.voter);
        member.ok_or_else(|| no_member(node))?.voter = false;
        Ok(())
    }

    pub(super) fn readdress(&mut self, node: NodeId, name: &str, address: &str, port: u16) -> Result<(), Impossible> {
        let member = self.members.iter_mut().find(|member| member.id == node);
        let member = member.ok_or_else(|| no_member(node))?;
        (member.name, member.address, member.port) = (name.to_owned(), address.to_owned(), port);
        Ok(())
    }

    pub(super) fn resume(&mut self) -> Result<(), Impossible> {
        let none = || Impossible("automatic takeover is not paused".to_owned());
        self.pause.take().map(|_| ()).ok_or_else(none)
    }

    pub(super) fn remove(&mut self, node: NodeId, at: u64, primary: NodeId) -> Result<(), Impossible> {
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
        let address = if self.size.is_pool() { gone.address } else { String::new() };
        self.removed.push(Removed { id: gone.id, name: gone.name, at, address });
        Ok(())
    }

    /// What must hold for every roster, whoever made it.
    pub(super) fn check(&self) -> Result<(), Impossible> {
        let SizePolicy { least, most } = self.size;
        if least == 0 || least > most || most > MOST {
            return Err(Impossible(format!("a cluster of {} members is not possible: {MOST} are the most", self.size)));
        }
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
        match self.members.iter().any(|member| member.voter) {
            true => Ok(()),
            false => Err(Impossible("no member with a vote would remain".to_owned())),
        }
    }
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
