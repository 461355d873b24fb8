//! What a node publishes about itself and the cluster. Written by the consensus loop, read by everybody.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{
    cluster::{ClusterId, NodeId, Role},
    storage::database::PrimaryDatabase,
};

/// One consistent picture of this node, published through a watch channel at every change and at least every second.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub name: String,
    pub version: String,
    pub role: Role,
    /// Why the role is what it is: the sentence that was logged at the last change.
    pub reason: String,
    pub epoch: u64,
    /// Who is PRIMARY, as far as this node knows.
    pub primary: Option<NodeId>,
    /// Raft index up to which the database has everything, here.
    pub applied: u64,
    /// Raft index known to be committed, here.
    pub committed: u64,
    /// Milliseconds of the lease that remain; only on the primary.
    pub lease_ms: Option<u64>,
    /// All members in rank order, this one included.
    pub members: Vec<MemberStatus>,
    /// What is wrong and what to do about it, in sentences; empty when all is well.
    pub warnings: Vec<String>,
    /// The database, opened for writing. Present only in the role PRIMARY. Whoever holds a clone of it or a connection to it
    /// must let go as soon as the role changes: the daemon exits when that takes longer than the demotion deadline.
    #[serde(skip)]
    pub database: Option<Arc<PrimaryDatabase>>,
}

impl Status {
    /// The epoch in which this node may serve: only in the role PRIMARY with an open database. The lease is another
    /// matter.
    pub fn serving(&self) -> Option<u64> {
        (self.role == Role::Primary && self.database.is_some()).then_some(self.epoch)
    }
}

/// One member as this node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberStatus {
    pub id: NodeId,
    pub name: String,
    /// `host:port` of its consensus link.
    pub address: String,
    pub state: Role,
    pub epoch: u64,
    pub applied: u64,
    /// Raft entries that it is behind the highest committed index known here.
    pub lag: u64,
    pub lease_ms: Option<u64>,
    /// Milliseconds since it was last heard of; 0 for the node itself; none if never.
    pub last_contact_ms: Option<u64>,
    pub version: String,
}
