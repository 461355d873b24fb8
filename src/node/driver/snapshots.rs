//! Snapshots of the whole database on the consensus loop: makes the manifest for the file that the database thread lets
//! rest. Must never read or wait for that file.

use raft::Storage;

use super::Driver;
use crate::{
    cluster::Phase,
    node::{
        inbox::{SnapshotError, SnapshotRequest},
        lease::boottime,
    },
    storage::snapshot::{Manifest, Resting},
};

impl Driver {
    pub(super) fn snapshot(&mut self, request: SnapshotRequest) {
        if let Some(peer) = request.forgotten {
            self.cluster.peer_forgot(boottime(), peer);
        }
        if let Err(error) = self.may_begin_again(&request) {
            return request.refuse(error);
        }
        if self.cluster.phase() == Phase::Primary {
            self.lane.thread.request_snapshot(request);
        } else {
            request.refuse(SnapshotError::NotPrimary);
        }
    }

    fn may_begin_again(&self, request: &SnapshotRequest) -> Result<(), SnapshotError> {
        let allowed = request.forgotten.map_or(Ok(()), |peer| self.cluster.may_begin_again(peer));
        allowed.map_err(SnapshotError::Refused)
    }

    /// The file rests. It may hold a write that a majority has, but that this loop has not handed out yet, with the
    /// changes of the membership before it. The snapshot must not leave one of these out, so they are handed out first.
    pub(super) fn resting(&mut self, resting: Result<Resting, SnapshotError>, request: SnapshotRequest) {
        let offer = resting.and_then(|resting| {
            self.carry_out_all();
            // Check again: it may have taken long until the file rested.
            self.may_begin_again(&request)?;
            Ok((self.manifest(&resting)?, resting))
        });
        request.answer(offer);
    }

    fn manifest(&self, resting: &Resting) -> Result<Manifest, SnapshotError> {
        let record = resting.record();
        if record.index > self.cluster.applied() {
            return Err(SnapshotError::Busy("its disk is behind those of the others"));
        }
        // The raft log says who votes as of what is on its disk. That must not be older than the file.
        if !self.syncer.has_kept_all() {
            return Err(SnapshotError::Busy("a change of the members is on its way to its disk"));
        }
        let index = record.index;
        let term = self.log.term(index).map_err(|error| SnapshotError::NoEntry { index, error })?;
        let (conf, conf_index) = self.log.applied_conf();
        let (membership, membership_index) = self.cluster.membership();
        let (membership, epoch) = (membership.clone(), self.cluster.epoch());
        Ok(Manifest { record, term, conf, conf_index, membership, membership_index, epoch, cluster_key: None })
    }
}
