//! What a node shows of itself and the cluster: the picture that everybody reads. Data only, with its form in JSON;
//! must never decide anything, nor show what lets a host in.

use serde::{Deserialize, Serialize};

use super::history::Recent;
use crate::{
    cluster::{ClusterId, Membership, NodeId, Role, roster::SizePolicy, trust::Holdings},
    pki::CertificateInfo,
};

/// One consistent picture of this node, published through a watch channel at every change and at least every half
/// second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// The membership in force here, with requests to join, removals and a pause.
    #[serde(serialize_with = "without_secrets")]
    pub membership: Membership,
    /// What is wrong and what to do about it, in sentences; empty when all is well.
    pub warnings: Vec<String>,
    /// The certificates that this node uses; empty until somebody has looked.
    #[serde(default)]
    pub certificates: Vec<CertificateStatus>,
    /// The database is open for writing, and can be had ([`super::Serving`]); only in the role PRIMARY.
    #[serde(default)]
    pub serving: bool,
    /// What this node went through lately.
    #[serde(skip)]
    pub recent: Recent,
}

/// Whoever may look at a status may not see what lets a host in.
fn without_secrets<S: serde::Serializer>(membership: &Membership, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Shown {
        #[serde(flatten)]
        membership: Membership,
        /// Always present, for the page: the membership itself omits what is usual.
        size: SizePolicy,
    }
    let (mut membership, size) = (membership.public(), membership.roster.size);
    membership.roster.size = SizePolicy::ha();
    Shown { membership, size }.serialize(serializer)
}

impl Status {
    /// The picture of a host whose node does not run: it starts, or asks to join.
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
            recent: Recent::default(),
        }
    }

    /// The epoch in which this node may serve: only in the role PRIMARY with an open database. It says nothing about
    /// the lease.
    pub fn serving(&self) -> Option<u64> {
        (self.role == Role::Primary && self.serving).then_some(self.epoch)
    }
}

/// One certificate of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct CertificateStatus {
    /// What it is for: `node`, `console` or `ca`.
    pub of: String,
    /// Where it is from.
    pub source: CertificateSource,
    /// Names that clients use and that it is not good for.
    #[serde(default)]
    pub missing: Vec<String>,
    #[serde(flatten)]
    pub info: CertificateInfo,
}

/// Where a certificate is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CertificateSource {
    /// The cluster's own authority: it is renewed by itself.
    Cluster,
    /// An administrator has given it to all Consoles.
    Upload,
    /// An administrator has put it into a folder of this host.
    Folder,
}

impl CertificateSource {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Upload => "upload",
            Self::Folder => "folder",
        }
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
    /// Bytes of the raft log that it is behind; none if that is not known here.
    #[serde(default)]
    pub lag_bytes: Option<u64>,
    pub lease_ms: Option<u64>,
    /// Milliseconds since it was last heard of; 0 for the node itself; none if never.
    pub last_contact_ms: Option<u64>,
    pub version: String,
    /// False until it has caught up after it was admitted.
    pub voter: bool,
    /// How far the copy of the whole database is that is on its way to it; on the node that sends or receives it.
    pub sync: Option<SyncProgress>,
    /// Its disk is full, by its last report.
    #[serde(default)]
    pub full: bool,
    /// Bytes that are free for its data, by its last report; none if it does not tell.
    #[serde(default)]
    pub free: Option<u64>,
    /// The feature level of its program; 0 if it was never heard of.
    #[serde(default)]
    pub level: u32,
    /// What it has on its disk of what all members share, by its last report.
    #[serde(default)]
    pub holds: Holdings,
}

/// How far the copy of a database is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncProgress {
    pub bytes: u64,
    pub total: u64,
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
