//! Snapshots of all databases on the consensus loop: makes the manifest for what the database thread lets rest. Must
//! never read or wait for these files.

use std::sync::Arc;

use raft::Storage;

use super::Driver;
use crate::{
    cluster::Phase,
    node::{
        inbox::{SnapshotError, SnapshotRequest},
        lease::boottime,
    },
    storage::snapshot::{Manifest, Whole},
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

    /// The files rest. One may hold a write that a majority has, but that this loop has not handed out yet, with the
    /// changes of the membership before it. The snapshot must not leave one of these out, so they are handed out first.
    pub(super) fn resting(&mut self, whole: Result<Arc<Whole>, SnapshotError>, request: SnapshotRequest) {
        let offer = whole.and_then(|whole| {
            self.carry_out_all();
            // Check again: it may have taken long until the file rested.
            self.may_begin_again(&request)?;
            Ok((self.manifest(&whole)?, whole))
        });
        request.answer(offer);
    }

    fn manifest(&self, whole: &Whole) -> Result<Manifest, SnapshotError> {
        let (record, service) = (whole.console.record(), whole.service_part());
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
        Ok(Manifest { record, service, term, conf, conf_index, membership, membership_index, epoch, cluster_key: None })
    }
}
