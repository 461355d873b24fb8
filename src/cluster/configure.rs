//! How the configuration changes: the core's part that proposes, puts into force and completes changes of the
//! membership. Must never put a change into force that a majority does not have, or one that is in force already.

use raft::{
    Storage,
    eraftpb::{ConfState, Entry, EntryType, Message, MessageType},
};

use super::{Change, Cluster, Membership, NodeId, Phase, limits::Impossible, roster::Pause};

/// A member that was not heard of for this long, in nanoseconds, does not count for a majority after a removal.
const HEARD_LATELY: u64 = 1_000_000_000;

/// A change of the configuration, as a committed entry makes it.
#[derive(Clone, Debug, PartialEq)]
pub struct ChangeInForce {
    /// Raft index of the entry.
    pub index: u64,
    /// Who votes from now on; none if that has not changed.
    pub conf: Option<ConfState>,
    /// The membership from now on; none at the end of a joint configuration, which changes only who votes.
    pub membership: Option<Membership>,
}

/// A committed entry that this program cannot read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this program does not understand entry {index} of the raft log: {why}")]
pub struct NotUnderstood {
    pub index: u64,
    pub why: String,
}

/// Why a change of the membership was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    #[error("this node is not primary")]
    NotPrimary,
    #[error("another change of the membership is under way: try again")]
    Busy,
    #[error(transparent)]
    Impossible(#[from] Impossible),
}

impl<S: Storage> Cluster<S> {
    /// The membership in force, and the raft index of the entry that made it.
    pub fn membership(&self) -> (&Membership, u64) {
        (&self.membership, self.membership_index)
    }

    /// Until then (0: from now on) only [`Pause::primary`] may become primary, if the membership names one.
    pub fn set_paused(&mut self, now: u64, until: u64) {
        self.paused_until = until;
        self.observe(now);
    }

    /// True while takeover is paused: no node takes over, and the role is not handed over either.
    pub fn is_takeover_paused(&self, now: u64) -> bool {
        now < self.paused_until && self.membership.roster.pause.is_some()
    }

    /// True if the cluster relies on what this program does not have, or a newer program was primary of the pool: this
    /// one must not become primary.
    pub fn is_outdated(&self) -> bool {
        let shared = &self.membership.shared;
        shared.level > self.level || shared.is_behind_pool(&self.version)
    }

    /// Refuses a change that not all members would understand.
    fn check_level(&self, change: &Change) -> Result<(), Impossible> {
        let needed = match change {
            Change::Raise { level, .. } if *level > self.level => {
                return Err(Impossible(format!("this program has feature level {}, not {level}", self.level)));
            }
            change => change.needs(),
        };
        if needed > self.membership.shared.level {
            return Err(Impossible(format!(
                "this needs feature level {needed}, and the cluster runs level {}: it rises by itself once all members run a \
                 program that has it (twistcli ha status shows the versions)",
                self.membership.shared.level
            )));
        }
        Ok(())
    }

    pub(super) fn is_paused(&self, now: u64) -> bool {
        let other = |pause: &Pause| pause.primary != self.node;
        self.is_takeover_paused(now) && self.membership.roster.pause.as_ref().is_some_and(other)
    }

    /// True for a message of a leader whose raft log no longer has the entries that this node needs.
    pub fn needs_snapshot(&self, message: &Message) -> bool {
        let index = || message.get_snapshot().get_metadata().index;
        message.get_msg_type() == MessageType::MsgSnapshot && message.term >= self.epoch() && index() > self.committed()
    }

    /// Gives admitted members their votes, all at once, when all of them have caught up. Any primary does it, so an
    /// admission goes on even if the primary that began it is gone.
    pub(super) fn promote_learners(&mut self, now: u64) {
        let learners: Vec<_> = self.membership.learners().collect();
        // Raft counts a new member as active before it has heard of it. But a member that has the entry of its
        // admission has answered, and has a database: it does not begin without one.
        let least = self.membership_index;
        let ready = learners.iter().all(|id| self.hears(*id, now) && self.election.has_caught_up(*id, least));
        if !learners.is_empty() && ready && self.changing <= self.applied {
            // Refused only while something else is under way: the next tick tries again.
            let _ = self.change(now, &Change::Promote);
        }
    }

    /// Proposes a change of the membership and returns its raft index: it is in force once
    /// [`Cluster::membership`] has come there.
    ///
    /// # Errors
    /// [`ChangeError`]: the change was not proposed and never will be.
    pub fn change(&mut self, now: u64, change: &Change) -> Result<u64, ChangeError> {
        self.observe(now);
        // A primary has applied everything of earlier epochs: no change that it does not know of is under way.
        if self.phase != Phase::Primary || !self.lease.is_valid(now) {
            return Err(ChangeError::NotPrimary);
        }
        if self.changing > self.applied {
            return Err(ChangeError::Busy);
        }
        self.check_level(change)?;
        let next = self.membership.changed(change, self.node)?;
        if let Change::Remove { node, force: false, .. } = change {
            self.check_majority_without(*node, now, &next)?;
        }
        let index = self.election.propose_membership(&next).ok_or(ChangeError::Busy)?;
        self.changing = index;
        Ok(index)
    }

    /// True if a message of that member came lately and it has not said that it forgot, or if it is this node.
    pub(super) fn hears(&self, id: NodeId, now: u64) -> bool {
        let lately = |at: &u64| now - at.min(&now) < HEARD_LATELY;
        id == self.node || !self.forgetful.contains(&id) && self.heard.get(&id).is_some_and(lately)
    }

    /// Refuses a removal after which nothing could be committed, not even its reversal.
    fn check_majority_without(&self, gone: NodeId, now: u64, next: &Membership) -> Result<(), ChangeError> {
        let (up, all) = (next.voters().filter(|id| self.hears(*id, now)).count(), next.voters().count());
        if up > all / 2 {
            return Ok(());
        }
        let name = self.membership.get(gone).map_or("this member", |member| &member.name);
        Err(ChangeError::Impossible(Impossible(format!(
            "without {name}, only {up} of {all} members with a vote answer: that is no majority, and the service would stop \
             until another one is back; remove the member that does not answer instead, or use force"
        ))))
    }

    /// Puts into force the changes of membership and configuration among these committed entries. After a restart some
    /// are handed out again; those that are in force already change nothing.
    pub(super) fn configure(&mut self, committed: &[Entry]) -> Result<(), NotUnderstood> {
        for entry in committed {
            let changes_conf = entry.get_entry_type() != EntryType::EntryNormal;
            if !changes_conf && entry.context.is_empty() {
                continue;
            }
            let unreadable = |why: String| NotUnderstood { index: entry.index, why };
            let membership = match entry.context.is_empty() {
                true => None,
                false => Some(Membership::decode(&entry.context).map_err(unreadable)?),
            };
            let mut conf = None;
            if changes_conf && entry.index > self.conf_index {
                let result = self.election.configure(membership.as_ref());
                conf = Some(result.map_err(|error| unreadable(error.to_string()))?);
                self.conf_index = entry.index;
            }
            let membership = membership.filter(|_| entry.index > self.membership_index);
            if let Some(membership) = &membership {
                self.membership = membership.clone();
                self.membership_index = entry.index;
            }
            if conf.is_some() || membership.is_some() {
                self.changes_in_force.push(ChangeInForce { index: entry.index, conf, membership });
            }
        }
        Ok(())
    }
}
