//! What this node remembers of how far the durable memories of the others had reached: asked when they call, kept up by
//! the consensus loop. Must never wait for anything, and never forget while a process of this node lives.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use raft::eraftpb::Message;

use super::codec::Remembers;
use crate::{
    cluster::{
        Membership, NodeId,
        reach::{self, Known, Standing},
    },
    mutex::locked,
};

/// A process of another member, as it says itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub life: u64,
    pub standing: Standing,
}

/// What is remembered of all other members. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Memory(Arc<Mutex<BTreeMap<NodeId, Known>>>);

impl Memory {
    /// Begins with what an earlier process has kept.
    pub fn new(known: BTreeMap<NodeId, Known>) -> Self {
        Self(Arc::new(Mutex::new(known)))
    }

    /// What is remembered, for the next process to begin with.
    pub fn known(&self) -> BTreeMap<NodeId, Known> {
        self.lock().clone()
    }

    /// Forgets everything: it may rest on a vote that was taken away and given back since.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// Forgets whoever is no member any more, and what a member promised before its vote was taken away.
    pub fn follow_membership(&self, membership: &Membership, me: NodeId) {
        reach::follow_membership(&mut self.lock(), membership, me);
    }

    /// Notes a message that came on an admitted link.
    pub fn heard(&self, message: &Message) {
        self.of(message.from, |known| known.reach.heard(message));
    }

    /// Notes a report that came on an admitted link. True if the member says that it forgot.
    pub fn reported(&self, from: NodeId, remembers: &Remembers) -> bool {
        self.of(from, |known| known.reported(&remembers.reach, remembers.forgotten));
        remembers.forgotten
    }

    /// Notes that everything up to `committed` is committed, in the epoch `term`.
    pub fn settle(&self, term: u64, committed: u64) {
        self.lock().values_mut().for_each(|known| known.reach.settle(term, committed));
    }

    /// Why a caller must not be heard; none if it may.
    pub(super) fn objection(&self, from: NodeId, caller: &Caller) -> Option<String> {
        self.lock().get(&from)?.objection(caller.life, &caller.standing)
    }

    /// Lets a caller be heard from now on; false if there is an objection. Only the consensus loop asks, between what
    /// came on the link before and what comes on this one.
    pub(super) fn admit(&self, from: NodeId, caller: &Caller) -> bool {
        let mut all = self.lock();
        let known = all.entry(from).or_default();
        let admitted = known.objection(caller.life, &caller.standing).is_none();
        if admitted {
            known.admit(caller.life);
        }
        admitted
    }

    fn of(&self, member: NodeId, change: impl FnOnce(&mut Known)) {
        if let Some(known) = self.lock().get_mut(&member) {
            change(known);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Known>> {
        // Held for some comparisons only; a panic ends the process.
        locked(&self.0)
    }
}
