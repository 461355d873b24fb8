//! Snapshots of the whole database on the consensus loop: says what belongs to the file that the database thread lets rest.
//! Must never read or wait for that file.

use raft::Storage;
use tokio::sync::oneshot;

use super::{driver::Driver, lease::boottime};
use crate::{
    cluster::{NodeId, Phase},
    storage::snapshot::{Manifest, Resting},
};

/// What whoever asks for a snapshot waits for.
pub(super) type Answer = oneshot::Sender<Result<(Manifest, Resting), String>>;

/// Who asked for a snapshot.
pub(super) struct Reply {
    /// The member that begins again with it because it forgot.
    forgotten: Option<NodeId>,
    answer: Answer,
}

impl Reply {
    /// Sends whoever asked away.
    pub fn refuse(self, why: String) {
        let _ = self.answer.send(Err(why)); // whoever asked may be gone
    }
}

impl Driver {
    pub(super) fn snapshot(&mut self, forgotten: Option<NodeId>, answer: Answer) {
        let reply = Reply { forgotten, answer };
        if let Some(peer) = forgotten {
            self.cluster.peer_forgot(boottime(), peer);
        }
        if let Err(why) = forgotten.map_or(Ok(()), |peer| self.cluster.may_begin_again(peer)) {
            return reply.refuse(why);
        }
        if self.cluster.phase() == Phase::Primary {
            self.database_thread.rest(reply);
        } else {
            reply.refuse("this node is not primary".to_owned());
        }
    }

    /// The file rests. A write is let through when a majority has it, which can be before this loop hands it out with the changes
    /// of the membership before it: the snapshot must not leave one of these out.
    pub(super) fn resting(&mut self, resting: Result<Resting, String>, reply: Reply) {
        let resting = match resting {
            Ok(resting) => resting,
            Err(why) => return reply.refuse(why),
        };
        let record = resting.record();
        self.carry_out_all();
        // Again: the file may have come to rest long after it was asked for.
        if let Err(why) = reply.forgotten.map_or(Ok(()), |peer| self.cluster.may_begin_again(peer)) {
            return reply.refuse(why);
        }
        if record.index > self.cluster.applied() {
            return reply.refuse("its disk is behind those of the others: ask again".to_owned());
        }
        // The raft log says who votes as of what is on its disk, which must not be older than the file is.
        if !self.syncer.has_kept_all() {
            return reply.refuse("a change of the members is on its way to its disk: ask again".to_owned());
        }
        let term = match self.log.term(record.index) {
            Ok(term) => term,
            Err(error) => return reply.refuse(format!("its raft log has no entry {}: {error}", record.index)),
        };
        let (conf, conf_index) = self.log.applied_conf();
        let (membership, membership_index) = self.cluster.membership();
        let membership = membership.clone();
        let epoch = self.cluster.epoch();
        let manifest =
            Manifest { record, term, conf, conf_index, membership, membership_index, epoch, cluster_key: None };
        let _ = reply.answer.send(Ok((manifest, resting))); // whoever asked may be gone: the file is free again then
    }
}
