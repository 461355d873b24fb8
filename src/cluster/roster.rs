//! Who belongs to the cluster, who votes, and whether somebody else may take over. Owns the rules for one member; must never talk to
//! anybody.

use serde::{Deserialize, Serialize};

use super::{
    limits::{Impossible, MAX_NAME},
    validity::in_force,
};

/// Identity of a node inside its cluster: Raft's node id, 1 or more, never used again after a removal.
pub type NodeId = u64;

/// A complete cluster has this many members; more are never admitted.
pub const CLUSTER_SIZE: usize = 3;
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

/// Removed members that are remembered, newest last, so that they can be told why they are refused.
const REMEMBERED: usize = 32;

/// The members in the order of their ids, those of the past, and the pause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roster {
    pub members: Vec<Member>,
    /// The id that the next newcomer gets; all below are or were in use.
    pub next_id: NodeId,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<Removed>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<Pause>,
}

impl Roster {
    /// That of a new cluster.
    pub fn founded(members: Vec<Member>) -> Self {
        let next_id = members.iter().map(|member| member.id).max().unwrap_or(0) + 1;
        Self { members, next_id, removed: Vec::new(), pause: None }
    }

    /// The member with this id.
    pub fn get(&self, id: NodeId) -> Option<&Member> {
        self.members.iter().find(|member| member.id == id)
    }

    /// The same without what newcomers pick up.
    pub(super) fn public(&self) -> Self {
        let members = self.members.iter().map(|member| Member { admission: None, ..member.clone() }).collect();
        Self { members, ..self.clone() }
    }

    /// A member without a vote that takes the first free rank.
    pub(super) fn push(
        &mut self,
        id: NodeId,
        (name, address, port): (String, String, u16),
        admission: Option<Admission>,
    ) -> Result<(), Impossible> {
        let taken = |rank: &u8| self.members.iter().any(|member| member.rank == *rank);
        let Some(rank) = (0..CLUSTER_SIZE as u8).find(|rank| !taken(rank)) else {
            return Err(Impossible(format!("a cluster has {CLUSTER_SIZE} members: remove one first")));
        };
        self.members.push(Member { id, name, address, port, rank, voter: false, admission });
        self.members.sort_by_key(|member| member.id);
        Ok(())
    }

    /// All members have a vote.
    pub(super) fn promote(&mut self) -> Result<(), Impossible> {
        if self.members.iter().all(|member| member.voter) {
            return Err(Impossible("all members have a vote already".to_owned()));
        }
        self.members.iter_mut().for_each(|member| member.voter = true);
        Ok(())
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
        self.removed.push(Removed { id: gone.id, name: gone.name, at });
        Ok(())
    }

    /// What must hold whoever made it.
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
