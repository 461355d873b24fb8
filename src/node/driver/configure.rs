//! Changes of the membership on the consensus loop: proposes them, hands those that are in force to the sync thread,
//! and updates links and status. Must never confirm a change that is not on disk, nor wait for the disk itself.

use std::sync::Arc;

use raft::eraftpb::Message;
use tracing::{error, info, warn};

use super::{Driver, space::NoRoom};
use crate::{
    clock::since_1970,
    cluster::{
        Change, ChangeInForce, Membership, NodeId,
        limits::MAX_ENCODED,
        membership::{Difference, differences},
        roster::Pause,
    },
    node::{
        inbox::{ChangeError, ChangeReply},
        lease::boottime,
        syncer::{Keep, Kept},
    },
    peer::Edition,
    storage::membership::StoredMembership,
};

/// Changes that may wait for a majority. Raft takes one at a time.
const WAITING: usize = 16;

/// Callers that wait for a change to come into force, each with the raft index of its change.
#[derive(Default)]
pub(super) struct Changes(Vec<(u64, ChangeReply)>);

impl Changes {
    /// The role is gone: the raft log of the next primary decides whether the changes are made.
    pub fn fail(&mut self) {
        for (_, reply) in self.0.drain(..) {
            let why = "the role was lost while a majority was awaited".to_owned();
            let _ = reply.send(Err(ChangeError::Unknown(why))); // the caller may be gone
        }
    }

    fn release(&mut self, index: u64, membership: &Arc<Membership>) {
        for (_, reply) in self.0.extract_if(.., |(at, _)| *at <= index) {
            let _ = reply.send(Ok(membership.clone()));
        }
    }
}

impl Driver {
    pub(super) fn change(&mut self, change: &Change, reply: ChangeReply) {
        let impossible = |why: String| Err(ChangeError::Impossible(why));
        let room = if self.in_force.unwritten { Err(NoRoom::Full) } else { self.check_room(MAX_ENCODED) };
        let result = match room {
            Err(NoRoom::Full) => impossible(format!("{}: free some space first", NoRoom::Full)),
            Err(NoRoom::NotYet) => impossible(format!("{}: try again", NoRoom::NotYet)),
            Ok(()) if self.in_force.changes.0.len() < WAITING => {
                self.cluster.change(boottime(), change).map_err(ChangeError::from)
            }
            Ok(()) => impossible("too many changes of the membership wait already: try again".to_owned()),
        };
        match result {
            Ok(index) => self.in_force.changes.0.push((index, reply)),
            Err(error) => {
                let _ = reply.send(Err(error));
            }
        }
        self.carry_out_all();
    }

    /// Applies the changes that are in force, and returns what has to be written of them. Until that is on disk, the
    /// database makes no checkpoint: a start from an earlier state then reads these entries again, as if for the first
    /// time. The caller of a change waits for the disk, and so does everything that this node promises from here on.
    pub(super) fn put_in_force(&mut self, changes: Vec<ChangeInForce>) -> Keep {
        let mut keep = Keep::default();
        if changes.is_empty() {
            return keep;
        }
        self.lane.thread.pin(true);
        for ChangeInForce { index, conf, membership } in changes {
            if let Some(membership) = membership {
                self.config.stored = StoredMembership { index, membership };
                keep.membership = Some(self.config.stored.clone());
                self.follow_membership();
            }
            if let Some(conf) = conf {
                info!(index, voters = ?conf.voters, joint = ?conf.voters_outgoing, learners = ?conf.learners, "the voters change");
                keep.conf = Some((conf, index));
            }
        }
        keep
    }

    /// What had to be written is on disk, except a membership for which there was no space. `all`: nothing more is
    /// being written.
    pub(super) fn kept(&mut self, kept: Kept, all: bool) {
        let index = self.config.stored.index;
        let before = self.in_force.unwritten;
        self.in_force.unwritten = kept.is_unwritten(before);
        match (before, self.in_force.unwritten) {
            (false, true) => {
                warn!("the disk is full: the membership in force is kept in memory until there is space for its file");
            }
            (true, false) => info!(index, "the membership in force is in its file again"),
            _ => {}
        }
        if all {
            self.lane.thread.pin(self.in_force.unwritten);
            // The membership is in the raft logs of a majority, so it is safe even without its file.
            let membership = self.in_force.membership.borrow().clone();
            self.in_force.changes.release(index, &membership);
        }
    }

    /// Tries again to write a membership for which there was no space.
    pub(super) fn write_membership_again(&mut self) {
        if self.in_force.unwritten && self.syncer.is_idle() {
            self.syncer.keep_again(self.config.stored.clone());
        }
    }

    /// Updates links, status and watchers to the membership in force.
    pub(super) fn follow_membership(&mut self) {
        let membership = self.config.stored.membership.clone();
        log_differences(&self.in_force.membership.borrow(), &membership);
        self.in_force.paused_ignored = false;
        self.members.update(&membership);
        self.publisher.set_membership(&membership);
        let others: Vec<_> = membership.roster.members.iter().map(|member| member.id).collect();
        self.links.set_peers(&others);
        self.config.memory.follow_membership(&membership, self.config.node);
        if membership.get(self.config.node).is_none() {
            let at = membership.removed(self.config.node).and_then(|removed| i64::try_from(removed.at).ok());
            let at = at.and_then(|at| jiff::Timestamp::from_second(at).ok()).map(|at| format!(" at {at}"));
            let at = at.unwrap_or_default();
            self.note_removed(format!(
                "it was removed from the cluster{at} by the administrator; run the join script to come back"
            ));
        }
        self.leave_if_outdated();
        let membership = Arc::new(membership);
        let index = self.config.stored.index;
        self.in_force.editions.send_replace(Edition { index, membership: membership.clone() });
        self.in_force.membership.send_replace(membership);
        self.follow_pause();
    }

    /// Also called once per tick: a pause ends by the wall clock, which may be corrected after the start.
    pub(super) fn follow_pause(&mut self) {
        let pause = &self.config.stored.membership.roster.pause;
        let until = pause.as_ref().filter(|_| !self.in_force.paused_ignored).map_or(0, boottime_of);
        self.cluster.set_paused(boottime(), until);
    }

    /// The administrator wants a primary although takeover is paused: the only node that may be primary is gone.
    pub(super) fn ignore_pause(&mut self) {
        warn!("the administrator asked this node to ignore the pause: it may take over from now on");
        self.in_force.paused_ignored = true;
        self.follow_pause();
    }

    /// This node is no longer a member: shows that, and takes part in nothing.
    pub(super) fn note_removed(&mut self, why: String) {
        if self.in_force.removed.is_none() {
            error!(reason = why, "this node is REMOVED");
            self.publisher.removed(why.clone());
            self.cluster.set_unfit_until(boottime(), u64::MAX);
            self.in_force.removed = Some(why);
        }
    }

    /// The leader's raft log begins after the end of ours: this node needs the whole database.
    pub(super) fn wants_snapshot(&mut self, message: &Message) {
        let (from, index) = (message.from, message.get_snapshot().get_metadata().index);
        self.refetch.lacks = index;
        if self.want_refetch(from) {
            warn!(
                from,
                index,
                "the raft log of the primary no longer has the entries that this node needs: fetching the database"
            );
        }
    }

    /// Once per tick: fetches the database from whoever is primary by now, or no longer, when what was missing has come
    /// another way, for example from another primary with a longer raft log.
    pub(super) fn restore_if_needed(&mut self) {
        if self.cluster.has_forgotten() {
            if let Some(primary) = self.members.reported_primary() {
                self.want_refetch(primary);
            }
        } else if self.refetch.diverged {
            // A copy that cannot be trusted is replaced with that of the primary, whoever that is by now.
            let primary = self.cluster.leader().and_then(|leader| self.members.primary(leader, self.cluster.epoch()));
            if let Some(primary) = primary {
                self.want_refetch(primary);
            }
        } else if self.cluster.committed() >= self.refetch.lacks {
            self.refetch.from.send_if_modified(|wanted| wanted.take().is_some());
        }
    }

    /// Asks for the database of `from`. True unless it is asked for already.
    pub(super) fn want_refetch(&mut self, from: NodeId) -> bool {
        let wanted = Some(from).filter(|from| *from != self.config.node);
        wanted.is_some() && self.refetch.from.send_if_modified(|now| std::mem::replace(now, wanted) != wanted)
    }
}

/// Logs one line for each thing that changed.
fn log_differences(before: &Membership, after: &Membership) {
    for difference in differences(before, after) {
        match difference {
            Difference::VoteTaken(_) => warn!("{difference}"),
            Difference::Pause(Some(Pause { until, .. })) => warn!(until, "{difference}"),
            _ => info!("{difference}"),
        }
    }
}

/// The end of a pause on the clock of [`boottime`], which never jumps; 0 if the pause is not in force.
fn boottime_of(pause: &Pause) -> u64 {
    let now = since_1970();
    if !pause.in_force(now.as_secs()) {
        return 0;
    }
    let left = std::time::Duration::from_secs(pause.until).saturating_sub(now);
    boottime().saturating_add(u64::try_from(left.as_nanos()).unwrap_or(u64::MAX))
}
