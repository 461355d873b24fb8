//! Snapshots of the whole database on the consensus loop: says what belongs to the file that the database thread lets rest.
//! Must never read or wait for that file.

use raft::Storage;
use tokio::sync::oneshot;

use super::driver::Driver;
use crate::{
    cluster::Phase,
    storage::snapshot::{Manifest, Resting},
};

/// Who asked for a snapshot.
pub(super) type Reply = oneshot::Sender<Result<(Manifest, Resting), String>>;

impl Driver {
    pub(super) fn snapshot(&mut self, reply: Reply) {
        if self.cluster.phase() == Phase::Primary {
            self.applier.rest(reply);
        } else {
            refuse(reply, "this node is not primary".to_owned());
        }
    }

    /// The file rests. A write is let through when a majority has it, which can be before this loop hands it out with the changes
    /// of the membership before it: the snapshot must not leave one of these out.
    pub(super) fn resting(&mut self, resting: Result<Resting, String>, reply: Reply) {
        let resting = match resting {
            Ok(resting) => resting,
            Err(why) => return refuse(reply, why),
        };
        let record = resting.record();
        self.carry_out_all();
        if record.index > self.cluster.applied() {
            return refuse(reply, "its disk is behind those of the others: ask again".to_owned());
        }
        let term = match self.log.term(record.index) {
            Ok(term) => term,
            Err(error) => return refuse(reply, format!("its raft log has no entry {}: {error}", record.index)),
        };
        let (conf, conf_index) = self.log.applied_conf();
        let (membership, membership_index) = self.cluster.membership();
        let membership = membership.clone();
        let manifest = Manifest { record, term, conf, conf_index, membership, membership_index, cluster_key: None };
        let _ = reply.send(Ok((manifest, resting))); // whoever asked may be gone: the file is free again then
    }
}

fn refuse(reply: Reply, why: String) {
    let _ = reply.send(Err(why));
}
