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

    /// The file rests. Everything up to its index has been through this loop, so the configuration is not older than it.
    pub(super) fn resting(&mut self, resting: Result<Resting, String>, reply: Reply) {
        let resting = match resting {
            Ok(resting) => resting,
            Err(why) => return refuse(reply, why),
        };
        let record = resting.record();
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
