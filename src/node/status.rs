//! What a node shows of itself and the cluster. Plain data with its JSON form. Must never decide anything, nor show a
//! secret that lets a host join.

use serde::{Deserialize, Serialize};

use super::history::Recent;
use crate::{
    cluster::{ClusterId, Membership, NodeId, Role, roster::SizePolicy, trust::Holdings},
    pki::CertificateInfo,
};

/// One consistent picture of this node. The consensus loop publishes it at every change, and every [20
/// ticks](crate::cluster::Timing::tick) otherwise: half a second with the default timing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub name: String,
    pub version: String,
    pub role: Role,
    /// Why the node has this role: the sentence that was logged at the last change.
    pub reason: String,
    pub epoch: u64,
    /// The PRIMARY, as far as this node knows.
    pub primary: Option<NodeId>,
    /// Raft index up to which this node's database has everything.
    pub applied: u64,
    /// Highest raft index that this node knows to be committed.
    pub committed: u64,
    /// Milliseconds that remain of the lease; only on the primary.
    pub lease_ms: Option<u64>,
    /// All members in the order of their ids, this one included.
    pub members: Vec<MemberStatus>,
    /// The membership in force on this node, with requests to join, removals and a pause.
    #[serde(serialize_with = "without_secrets")]
    pub membership: Membership,
    /// What is wrong and what to do about it, in sentences; empty if all is well.
    pub warnings: Vec<String>,
    /// The certificates that this node uses; empty until they have been read.
    #[serde(default)]
    pub certificates: Vec<CertificateStatus>,
    /// True if the database is open for writing and [lent](super::Serving); only in the role PRIMARY.
    #[serde(default)]
    pub serving: bool,
    /// What is known of a host that waits for a pool; only in the role WAITING.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<Waiting>,
    /// The recent past of this node.
    #[serde(skip)]
    pub recent: Recent,
}

/// A reader of the status must not see what would let a host join.
fn without_secrets<S: serde::Serializer>(membership: &Membership, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Shown {
        #[serde(flatten)]
        membership: Membership,
        /// Always present, for the page: the membership itself omits the default.
        size: SizePolicy,
    }
    let (mut membership, size) = (membership.public(), membership.roster.size);
    membership.roster.size = SizePolicy::ha();
    Shown { membership, size }.serialize(serializer)
}

impl Status {
    /// The status of a host whose node does not run yet: it starts, or asks to join.
    pub fn without_node(name: String, version: &str, membership: Membership, role: Role, reason: String) -> Self {
        Self {
            cluster: membership.cluster,
            node: 0,
            name,
            version: version.to_owned(),
            role,
            reason,
            epoch: 0,
            primary: None,
            applied: 0,
            committed: 0,
            lease_ms: None,
            members: Vec::new(),
            membership,
            warnings: Vec::new(),
            certificates: Vec::new(),
            serving: false,
            waiting: None,
            recent: Recent::default(),
        }
    }

    /// The epoch in which this node may serve; `None` unless it is PRIMARY with an open database. This says nothing
    /// about the lease.
    pub fn serving(&self) -> Option<u64> {
        (self.role == Role::Primary && self.serving).then_some(self.epoch)
    }
}

/// A host that waits to become the seed of a pool, or to be added to one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Waiting {
    /// SHA-256 of its public key: what whoever adds it compares.
    pub fingerprint: String,
    /// Since when, in seconds since 1970.
    pub since: u64,
    /// True if it accepts nobody without the secret of `CLUSTERED_DB_SECRET_FILE`.
    pub secret: bool,
    /// By which the pool's members reach it, as far as it knows.
    pub address: String,
    /// Where an administrator signs up to make it the seed; none if it has no HTTPS port.
    pub console: Option<String>,
}

/// One certificate of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct CertificateStatus {
    /// What it is used for: `node`, `console` or `ca`.
    pub of: String,
    /// Where it comes from.
    pub source: CertificateSource,
    /// Names that clients use but that it does not cover.
    #[serde(default)]
    pub missing: Vec<String>,
    #[serde(flatten)]
    pub info: CertificateInfo,
}

/// Where a certificate comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CertificateSource {
    /// From the cluster's own authority; the node renews it by itself.
    Cluster,
    /// An administrator has uploaded it for all Consoles.
    Upload,
    /// An administrator has put it into a folder on this host.
    Folder,
    /// From a place that only a newer program has a word for.
    #[serde(other)]
    Other,
}

impl CertificateSource {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Upload => "upload",
            Self::Folder => "folder",
            Self::Other => "other",
        }
    }
}

/// One member, as this node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberStatus {
    pub id: NodeId,
    pub name: String,
    /// `host:port` of its HIGH_AVAILABILITY_PORT.
    pub address: String,
    pub state: Role,
    pub epoch: u64,
    pub applied: u64,
    /// How many Raft entries it is behind the highest index that this node knows to be committed.
    pub lag: u64,
    /// How many bytes of the raft log it is behind; `None` if this node does not know.
    #[serde(default)]
    pub lag_bytes: Option<u64>,
    pub lease_ms: Option<u64>,
    /// Milliseconds since it was last heard of; 0 for the node itself, `None` if never.
    pub last_contact_ms: Option<u64>,
    pub version: String,
    /// False for a new member until it has caught up.
    pub voter: bool,
    /// How much of the whole database has been copied to it, while that is under way. Only known to the node that sends
    /// or receives it.
    pub sync: Option<SyncProgress>,
    /// True if its disk is full, by its last report.
    #[serde(default)]
    pub full: bool,
    /// Free bytes for its data, by its last report; `None` if it does not report any.
    #[serde(default)]
    pub free: Option<u64>,
    /// The feature level of its program; 0 if it was never heard of.
    #[serde(default)]
    pub level: u32,
    /// Which of the shared keys and certificates are on its disk, by its last report.
    #[serde(default)]
    pub holds: Holdings,
}

/// How much of a database has been copied, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncProgress {
    pub bytes: u64,
    pub total: u64,
    /// Those of `bytes` that the member had already, so that they were not sent.
    #[serde(default)]
    pub unchanged: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_of_an_older_program_is_read_and_says_nothing_of_serving() {
        let nobody = Membership::founded(ClusterId(1), Vec::new());
        let status = Status::without_node("one".to_owned(), "1", nobody, Role::Primary, String::new());
        let mut json = serde_json::to_value(Status { serving: true, epoch: 7, ..status }).unwrap();
        let read = |json: &serde_json::Value| serde_json::from_value::<Status>(json.clone()).unwrap().serving();
        assert_eq!(read(&json), Some(7));
        json.as_object_mut().unwrap().remove("serving");
        assert_eq!(read(&json), None);
        json["serving"] = true.into();
        json["role"] = serde_json::to_value(Role::Secondary).unwrap();
        assert_eq!(read(&json), None, "whatever it says, only a PRIMARY serves");
    }
}
