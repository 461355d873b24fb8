//! How two memberships differ, in sentences, for the log and the history. Must never decide who is told.

use std::fmt;

use super::Membership;
use crate::cluster::{
    roster::{Member, Pause},
    shared::Request,
};

/// One thing that changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference<'a> {
    /// A member that gets a vote when it has caught up.
    Admitted(&'a Member),
    /// It has a vote now.
    Votes(&'a Member),
    /// It has no vote any more.
    VoteTaken(&'a Member),
    /// From one name or place to another.
    Moved(&'a Member, &'a Member),
    /// It is no longer a member.
    Removed(&'a Member),
    /// A host that was not known before.
    Asks(&'a Request),
    /// A request that is gone without its host being a member.
    NotAdmitted(&'a Request),
    /// The feature level, and the version of the program that raised it.
    Level(u32, &'a str),
    /// Until when takeover is paused; none if it is no longer.
    Pause(Option<&'a Pause>),
}

impl Difference<'_> {
    /// The member or host that it is about.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Admitted(member) | Self::Votes(member) | Self::VoteTaken(member) | Self::Removed(member) => {
                Some(&member.name)
            }
            Self::Moved(_, now) => Some(&now.name),
            Self::Asks(request) | Self::NotAdmitted(request) => Some(&request.name),
            Self::Level(..) | Self::Pause(_) => None,
        }
    }
}

impl fmt::Display for Difference<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Admitted(member) => write!(f, "{} ({}) was admitted to the cluster", member.name, member.place()),
            Self::Votes(member) => write!(f, "{} has caught up and votes", member.name),
            Self::VoteTaken(Member { name, .. }) => {
                write!(f, "{name} lost some of its durable memory: it gets its vote back when it has caught up")
            }
            Self::Moved(was, now) => {
                write!(f, "{} ({}) is {} ({}) from now on", was.name, was.place(), now.name, now.place())
            }
            Self::Removed(member) => write!(f, "{} was removed from the cluster", member.name),
            Self::Asks(Request { name, address, port, fingerprint, .. }) => {
                write!(f, "{name} ({address}:{port}) asks to join: {fingerprint}")
            }
            Self::NotAdmitted(request) => {
                write!(f, "the request of {} to join was turned down, or has expired", request.name)
            }
            Self::Level(level, version) => write!(
                f,
                "feature level {level} of version {version} is in force: programs that do not have it are refused from now on"
            ),
            Self::Pause(Some(_)) => f.write_str("automatic takeover is paused"),
            Self::Pause(None) => f.write_str("automatic takeover is no longer paused"),
        }
    }
}

/// How `new` differs from `old`.
pub fn differences<'a>(old: &'a Membership, new: &'a Membership) -> Vec<Difference<'a>> {
    let mut all = Vec::new();
    for now in &new.roster.members {
        all.extend(match old.get(now.id) {
            None => Some(Difference::Admitted(now)),
            Some(was) if !was.voter && now.voter => Some(Difference::Votes(now)),
            Some(was) if was.voter && !now.voter => Some(Difference::VoteTaken(now)),
            Some(was) if (&was.name, &was.address, was.port) != (&now.name, &now.address, now.port) => {
                Some(Difference::Moved(was, now))
            }
            Some(_) => None,
        });
    }
    all.extend(old.roster.members.iter().filter(|was| new.get(was.id).is_none()).map(Difference::Removed));
    let asks =
        |membership: &Membership, print: &str| membership.shared.requests.iter().any(|open| open.fingerprint == print);
    let is_member = |request: &Request| {
        new.roster.members.iter().any(|member| member.address == request.address && member.port == request.port)
    };
    let asking = new.shared.requests.iter().filter(|request| !asks(old, &request.fingerprint));
    all.extend(asking.map(Difference::Asks));
    let gone = old.shared.requests.iter().filter(|request| !asks(new, &request.fingerprint) && !is_member(request));
    all.extend(gone.map(Difference::NotAdmitted));
    if old.shared.level != new.shared.level {
        all.push(Difference::Level(new.shared.level, &new.shared.level_version));
    }
    if old.roster.pause != new.roster.pause {
        all.push(Difference::Pause(new.roster.pause.as_ref()));
    }
    all
}
