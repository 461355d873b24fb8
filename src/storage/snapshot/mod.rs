//! A snapshot: the whole database of the primary at one raft index, on its way to another node.
//!
//! Owns its description (the [`Manifest`]), how it is read on the primary ([`Resting`]), how it is staged on the node
//! that needs it ([`Incoming`]), which pages that node has already ([`difference`]), and its installation there when
//! the process starts ([`Ready`]). A snapshot replaces the old database only as a whole, verified and durable. It must
//! never be used in part, and never remove an entry that this node has promised to keep.
//!
//! In the data folder it is `snapshot.incoming` while it arrives, `snapshot.ready` once it is complete and durable, and
//! `snapshot.done` when it is no longer needed. Only a rename turns one into the next.

pub mod difference;
mod incoming;
mod install;

use std::{
    fmt,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use base64::{Engine, engine::general_purpose::STANDARD};
use raft::eraftpb::ConfState;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

pub use self::{
    incoming::Incoming,
    install::{Ready, discard},
};
pub use super::checksum::CHUNK;
use super::{
    checkpoint::Record,
    checksum::{page_checksum, read_chunk},
    scrub::from_disk,
    transaction::valid_page_size,
};
use crate::cluster::{Membership, NodeId, limits::MAX_ENCODED};

/// The folder of a snapshot while it arrives. It is deleted at the next start, and before the next attempt.
const INCOMING: &str = "snapshot.incoming";
/// The folder of a complete snapshot.
const READY: &str = "snapshot.ready";
/// Names in these folders.
const DATABASE: &str = "console.db";
const MANIFEST: &str = "manifest.json";
/// Largest encoded manifest, in bytes.
pub const MAX_MANIFEST: usize = 4 * MAX_ENCODED;
/// The key that unseals the certificate authority's private key, by its path in the data folder. Only members have it.
pub const CLUSTER_KEY: &str = "certificates/cluster.key";
/// Longest content of [`CLUSTER_KEY`], in bytes.
const MAX_KEY: usize = 1024;
/// Version of the manifest that this program writes.
const FORMAT: u64 = 1;

/// Why a snapshot cannot be stored or installed.
#[derive(Debug, Error)]
pub enum SnapshotError {
    #[error("cannot {verb} {}: {error}", path.display())]
    Io { verb: &'static str, path: PathBuf, error: io::Error },
    #[error(
        "a snapshot of {needed} bytes does not fit beside the database: {} has {free} bytes free; free some space",
        path.display()
    )]
    NoSpace { path: PathBuf, needed: u64, free: u64 },
    /// What arrived is not what was announced. It is thrown away and fetched again.
    #[error("the snapshot is damaged: {0}")]
    Damaged(String),
    /// It cannot be installed here, and fetching it again would not help.
    #[error("{0}")]
    Contradiction(String),
    #[error(transparent)]
    Log(#[from] super::raft_log::LogError),
}

impl SnapshotError {
    fn io(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io { verb, path: path.to_owned(), error }
    }
}

/// The content of the file [`CLUSTER_KEY`]. Its `Debug` output does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey(Vec<u8>);

impl ClusterKey {
    /// Reads the key of this node; `None` if it has none.
    ///
    /// # Errors
    /// When the file cannot be read. `InvalidData` when it is too long to be a key.
    pub fn read(data: &Path) -> io::Result<Option<Self>> {
        use std::io::Read;
        let mut bytes = Vec::new();
        match File::open(data.join(CLUSTER_KEY)).and_then(|file| file.take(MAX_KEY as u64 + 1).read_to_end(&mut bytes))
        {
            Ok(_) if bytes.len() > MAX_KEY => Err(io::Error::new(io::ErrorKind::InvalidData, "too long for a key")),
            Ok(_) => Ok(Some(Self(bytes))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterKey(..)")
    }
}

/// Describes a snapshot, and has what else a node needs to go on from there.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// The checkpoint: raft index, size and checksum of the database.
    pub record: Record,
    /// Raft term of the entry at that index.
    pub term: u64,
    /// Who votes, and the raft index from which on they do. It may be above that of the database.
    pub conf: ConfState,
    pub conf_index: u64,
    /// The membership, and the raft index of the entry that made it. It may be above that of the database.
    pub membership: Membership,
    pub membership_index: u64,
    /// The epoch of the primary that sent it; 0 from a program that does not say.
    pub epoch: u64,
    /// See [`CLUSTER_KEY`]; `None` in a cluster whose founder has none.
    pub cluster_key: Option<ClusterKey>,
}

/// A [`Manifest`] as it is sent, and as it is stored beside the staged database.
#[derive(Serialize, Deserialize)]
struct Encoded {
    format: u64,
    index: u64,
    term: u64,
    page_size: u32,
    pages: u32,
    checksum: u64,
    voters: Vec<u64>,
    learners: Vec<u64>,
    voters_outgoing: Vec<u64>,
    learners_next: Vec<u64>,
    auto_leave: bool,
    conf_index: u64,
    membership: Value,
    membership_index: u64,
    #[serde(default)]
    epoch: u64,
    cluster_key: Option<String>,
}

impl Manifest {
    /// Bytes of the database.
    pub fn bytes(&self) -> u64 {
        u64::from(self.record.pages) * u64::from(self.record.page_size)
    }

    /// True if this node has a vote according to the manifest.
    pub fn votes(&self, node: NodeId) -> bool {
        let conf = &self.conf;
        conf.voters.contains(&node)
            || conf.voters_outgoing.contains(&node)
            || self.membership.voters().any(|voter| voter == node)
    }

    /// The manifest as JSON.
    pub fn encode(&self) -> Vec<u8> {
        let membership = serde_json::from_slice(&self.membership.encode()).unwrap_or(Value::Null);
        let encoded = Encoded {
            format: FORMAT,
            index: self.record.index,
            term: self.term,
            page_size: self.record.page_size,
            pages: self.record.pages,
            checksum: self.record.checksum,
            voters: self.conf.voters.clone(),
            learners: self.conf.learners.clone(),
            voters_outgoing: self.conf.voters_outgoing.clone(),
            learners_next: self.conf.learners_next.clone(),
            auto_leave: self.conf.auto_leave,
            conf_index: self.conf_index,
            membership,
            membership_index: self.membership_index,
            epoch: self.epoch,
            cluster_key: self.cluster_key.as_ref().map(|key| STANDARD.encode(&key.0)),
        };
        serde_json::to_vec(&encoded).unwrap_or_default()
    }

    /// Decodes a manifest that another program may have written.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > MAX_MANIFEST {
            return Err(format!("a manifest of {} bytes is too long", bytes.len()));
        }
        let value: Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        // The format comes first: a newer one may differ in everything else.
        match value["format"].as_u64() {
            Some(FORMAT) => {}
            Some(other) => return Err(format!("format {other} is not known to this program (it knows {FORMAT})")),
            None => return Err("it has no format".to_owned()),
        }
        let found: Encoded = serde_json::from_value(value).map_err(|error| error.to_string())?;
        let Encoded { index, page_size, pages, checksum, .. } = found;
        // The first entry of every raft log has index 2.
        if index < 2 || found.term == 0 || pages == 0 || !valid_page_size(page_size) || found.voters.is_empty() {
            return Err("it describes an impossible database".to_owned());
        }
        let mut conf = ConfState { voters: found.voters, learners: found.learners, ..ConfState::default() };
        conf.voters_outgoing = found.voters_outgoing;
        conf.learners_next = found.learners_next;
        conf.auto_leave = found.auto_leave;
        let key = found.cluster_key.map(|text| STANDARD.decode(text)).transpose();
        let key = key.map_err(|_| "its cluster key is not base64".to_owned())?;
        if key.as_ref().is_some_and(|key| key.len() > MAX_KEY) {
            return Err("its cluster key is too long".to_owned());
        }
        Ok(Self {
            record: Record { index, page_size, pages, checksum },
            term: found.term,
            conf,
            conf_index: found.conf_index,
            membership: Membership::decode(found.membership.to_string().as_bytes())?,
            membership_index: found.membership_index,
            epoch: found.epoch,
            cluster_key: key.map(ClusterKey),
        })
    }
}

/// Keeps checkpoints from writing to a database file that is being read, until this is dropped or
/// [broken](CheckpointHold::break_off).
#[derive(Clone, Debug, Default)]
pub(crate) struct CheckpointHold(Arc<AtomicBool>);

impl CheckpointHold {
    /// Notes that the file may change from now on: what was read before this is good, and nothing after it.
    pub fn break_off(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    fn is_broken(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// True if somebody else still has a clone.
    pub fn is_wanted(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

/// The database file of a primary while no checkpoint writes to it. Dropping this lets checkpoints go on.
#[derive(Debug)]
pub struct Resting {
    // Never a duplicate: closing any descriptor of the file would drop SQLite's locks on it (POSIX).
    file: Arc<File>,
    record: Record,
    hold: CheckpointHold,
}

impl Resting {
    pub(super) fn new(file: Arc<File>, record: Record, hold: CheckpointHold) -> Self {
        Self { file, record, hold }
    }

    /// The checkpoint at which the file rests.
    pub fn record(&self) -> Record {
        self.record
    }

    /// True once the file may have changed: begin the snapshot again.
    pub fn is_broken(&self) -> bool {
        self.hold.is_broken()
    }

    /// Reads the next pages after page `done`: at most [`CHUNK`] bytes, none at the end. Returns the XOR of their
    /// checksums.
    ///
    /// # Errors
    /// When the file cannot be read. `Interrupted` once the hold is broken: what was read is useless.
    pub fn read(&self, done: u32, bytes: &mut Vec<u8>) -> io::Result<u64> {
        let Record { page_size, pages, .. } = self.record;
        read_chunk(&self.file, page_size, pages, done, bytes)?;
        // After the read: a checkpoint breaks the hold before it writes.
        if self.is_broken() {
            return Err(io::Error::new(
                io::ErrorKind::Interrupted,
                "a checkpoint was due, or this node is no longer PRIMARY",
            ));
        }
        Ok(chunk_checksum(done, page_size, bytes))
    }

    /// As [`Self::read`], but from the disk and not from memory.
    ///
    /// # Errors
    /// See [`Self::read`].
    pub fn read_from_disk(&self, done: u32, bytes: &mut Vec<u8>) -> io::Result<u64> {
        let page_size = self.record.page_size;
        from_disk(&self.file, page_size, done, CHUNK as u32 / page_size, || self.read(done, bytes))
    }
}

/// The XOR of the checksums of the pages in `bytes`, the first of which has the number `done + 1`.
pub(crate) fn chunk_checksum(done: u32, page_size: u32, bytes: &[u8]) -> u64 {
    let pages = bytes.chunks_exact(page_size as usize);
    (done + 1..).zip(pages).fold(0, |sum, (number, image)| sum ^ page_checksum(number, image))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::cluster::{ClusterId, Member};

    /// A database of `pages` pages of 512 bytes, the same for the same seed, at a raft index.
    pub fn resting(seed: u8, pages: u32, index: u64) -> (Resting, CheckpointHold, Vec<u8>) {
        let file = tempfile::tempfile().unwrap();
        let image: Vec<u8> = (0..pages as usize * 512).map(|at| (at / 7) as u8 ^ seed).collect();
        file.write_all_at(&image, 0).unwrap();
        let checksum = chunk_checksum(0, 512, &image);
        let (record, hold) = (Record { index, page_size: 512, pages, checksum }, CheckpointHold::default());
        (Resting::new(Arc::new(file), record, hold.clone()), hold, image)
    }

    /// What belongs to it.
    pub fn manifest(record: Record, term: u64) -> Manifest {
        let member = |id| Member::founder(id, &format!("node{id}"), &format!("127.0.0.{id}"), 8086);
        Manifest {
            record,
            term,
            conf: ConfState { voters: vec![1, 2], learners: vec![3], ..ConfState::default() },
            conf_index: record.index,
            membership: Membership::founded(ClusterId(7), (1..=3).map(member).collect()),
            membership_index: record.index,
            epoch: term + 1,
            cluster_key: Some(ClusterKey(b"secret of the members".to_vec())),
        }
    }

    #[test]
    fn a_manifest_survives_and_odd_ones_are_refused() {
        let (resting, ..) = resting(1, 9, 40);
        let mut manifest = manifest(resting.record(), 3);
        manifest.conf.voters_outgoing = vec![1];
        manifest.conf.auto_leave = true;
        let bytes = manifest.encode();
        assert_eq!(Manifest::decode(&bytes).unwrap(), manifest);
        assert!(!format!("{manifest:?}").contains("secret"));
        let text = String::from_utf8(bytes).unwrap();
        for (from, to) in [
            ("\"format\":1", "\"format\":2"),
            ("\"page_size\":512", "\"page_size\":513"),
            ("\"pages\":9", "\"pages\":0"),
            ("\"index\":40", "\"index\":1"),
            ("\"term\":3", "\"term\":0"),
            ("\"voters\":[1,2]", "\"voters\":[]"),
            ("\"cluster_key\":\"", "\"cluster_key\":\"?"),
            ("\"members\":", "\"others\":"),
        ] {
            let odd = text.replacen(from, to, 1);
            assert!(odd != text && Manifest::decode(odd.as_bytes()).is_err(), "{to}");
        }
        assert!(Manifest::decode(&vec![b' '; MAX_MANIFEST + 1]).unwrap_err().contains("too long"));
    }

    #[test]
    fn a_resting_file_is_read_in_chunks_until_its_hold_is_broken() {
        let (resting, hold, image) = resting(1, 5000, 40);
        let (mut done, mut sum, mut read, mut chunk) = (0, 0, Vec::new(), Vec::new());
        while done < 5000 {
            sum ^= resting.read(done, &mut chunk).unwrap();
            done += chunk.len() as u32 / 512;
            read.extend_from_slice(&chunk);
        }
        assert!(read == image && sum == resting.record().checksum && chunk.len() < CHUNK);
        resting.read(done, &mut chunk).unwrap();
        assert!(chunk.is_empty());
        assert!(hold.is_wanted());
        hold.break_off();
        assert_eq!(resting.read(0, &mut chunk).unwrap_err().kind(), io::ErrorKind::Interrupted);
        drop(resting);
        assert!(!hold.is_wanted());
    }

    #[test]
    fn a_key_is_read_if_there_is_one() {
        let data = tempfile::tempdir().unwrap();
        assert_eq!(ClusterKey::read(data.path()).unwrap(), None);
        std::fs::create_dir(data.path().join("certificates")).unwrap();
        std::fs::write(data.path().join(CLUSTER_KEY), "abc").unwrap();
        assert_eq!(ClusterKey::read(data.path()).unwrap(), Some(ClusterKey(b"abc".to_vec())));
        std::fs::write(data.path().join(CLUSTER_KEY), [0; MAX_KEY + 1]).unwrap();
        assert!(ClusterKey::read(data.path()).is_err());
    }
}
