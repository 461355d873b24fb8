//! A snapshot: all databases of the primary at one raft index, on their way to another node.
//!
//! Owns its description (the [`Manifest`]), how it is read on the primary ([`Whole`]), how it is staged on the node
//! that needs it ([`Incoming`]), which pages that node has already ([`difference`]), and its installation there when
//! the process starts ([`Ready`]). A snapshot replaces the old databases only as a whole, verified and durable. It must
//! never be used in part, and never remove an entry that this node has promised to keep.
//!
//! In the data folder it is `snapshot.incoming` while it arrives, `snapshot.ready` once it is complete and durable, and
//! `snapshot.done` when it is no longer needed. Only a rename turns one into the next.

pub mod difference;
mod incoming;
mod install;
mod kept;
mod service;

use std::{
    collections::BTreeMap,
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

pub(super) use self::kept::Kept;
pub use self::{
    difference::Own,
    incoming::Incoming,
    install::{Ready, discard},
    service::{Course, ServicePart, known},
};
pub use super::checksum::CHUNK;
use super::{
    checkpoint::Record,
    checksum::{page_checksum, read_chunk},
    folder::{
        catalogue::{Catalogue, LONGEST_PATH},
        places::MOST_DATABASES,
    },
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
pub const MAX_MANIFEST: usize = 4 * MAX_ENCODED + MOST_DATABASES * (2 * LONGEST_PATH + 256);
/// The key that unseals the certificate authority's private key, by its path in the data folder. Only members have it.
pub const CLUSTER_KEY: &str = "certificates/cluster.key";
/// Longest content of [`CLUSTER_KEY`], in bytes.
const MAX_KEY: usize = 1024;
/// Version of the manifest of a snapshot without a service.
const FORMAT: u64 = 1;
/// Version of the manifest of one with a service. Before feature level 4 no program writes it.
const WITH_SERVICE: u64 = 2;

/// Why a snapshot cannot be stored or installed.
#[derive(Debug, Error)]
pub enum SnapshotError {
    #[error("cannot {verb} {}: {error}", path.display())]
    Io { verb: &'static str, path: PathBuf, error: io::Error },
    #[error(
        "a snapshot of {needed} bytes does not fit beside the databases: {} has {free} bytes free; free some space",
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
    /// The checkpoint: raft index of all databases, size and checksum of the Console's.
    pub record: Record,
    /// The databases of the service at that index.
    pub service: ServicePart,
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    service: Option<service::Encoded>,
}

impl Manifest {
    /// Bytes of all databases.
    pub fn bytes(&self) -> u64 {
        self.contents().map(|(_, record)| service::bytes(&record)).sum()
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
        let service = self.service.encode();
        let encoded = Encoded {
            format: if service.is_some() { WITH_SERVICE } else { FORMAT },
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
            service,
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
        let has_service = match value["format"].as_u64() {
            Some(FORMAT) => false,
            Some(WITH_SERVICE) => true,
            Some(other) => {
                return Err(format!("format {other} is not known to this program (it knows up to {WITH_SERVICE})"));
            }
            None => return Err("it has no format".to_owned()),
        };
        let found: Encoded = serde_json::from_value(value).map_err(|error| error.to_string())?;
        let Encoded { index, page_size, pages, checksum, .. } = found;
        if has_service != found.service.is_some() {
            return Err("its format and its content differ".to_owned());
        }
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
        let service = found.service.map(|service| ServicePart::decode(service, index)).transpose()?;
        Ok(Self {
            record: Record { index, page_size, pages, checksum },
            service: service.unwrap_or_default(),
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

/// A database of a primary as of one raft index, while others go on writing. The Console's file stays as it is until
/// this is dropped, as no checkpoint writes to it; that of a service's database changes, and what it had is laid aside.
#[derive(Debug)]
pub struct Resting {
    source: Source,
    record: Record,
    hold: CheckpointHold,
}

#[derive(Debug)]
enum Source {
    // Never a duplicate: closing any descriptor of the file would drop SQLite's locks on it (POSIX).
    File(Arc<File>),
    Kept(Arc<Kept>),
}

/// All databases of a primary at one raft index.
#[derive(Debug)]
pub struct Whole {
    /// The Console's.
    pub console: Resting,
    /// Which databases the service has.
    pub catalogue: Catalogue,
    /// Those of the service, by their ids.
    pub service: BTreeMap<u32, Resting>,
}

impl Whole {
    /// Of a primary whose cluster has never had a service.
    pub fn of_console(console: Resting) -> Self {
        Self { console, catalogue: Catalogue::default(), service: BTreeMap::new() }
    }

    /// The raft index of all.
    pub fn index(&self) -> u64 {
        self.console.record.index
    }

    /// What a manifest says of the service.
    pub fn service_part(&self) -> ServicePart {
        let records = self.service.iter().map(|(id, resting)| (*id, resting.record)).collect();
        ServicePart { catalogue: self.catalogue.clone(), records }
    }

    /// All in the order of [`Manifest::contents`].
    pub fn all(&self) -> impl Iterator<Item = &Resting> {
        std::iter::once(&self.console).chain(self.service.values())
    }

    /// True once one of them may have changed: begin the snapshot again.
    pub fn is_broken(&self) -> bool {
        self.all().any(Resting::is_broken)
    }
}

impl Resting {
    pub(super) fn new(file: Arc<File>, record: Record, hold: CheckpointHold) -> Self {
        Self { source: Source::File(file), record, hold }
    }

    /// As of what was kept, for as long as the Console's database is held.
    pub(super) fn of_kept(kept: Arc<Kept>, record: Record, hold: CheckpointHold) -> Self {
        Self { source: Source::Kept(kept), record, hold }
    }

    /// What keeps checkpoints from the Console's file.
    pub(super) fn hold(&self) -> CheckpointHold {
        self.hold.clone()
    }

    /// As of a later raft index: no entry in between concerns it, so its content is the same.
    pub(super) fn raised(self, index: u64) -> Self {
        Self { record: Record { index, ..self.record }, ..self }
    }

    /// The checkpoint at which the file rests.
    pub fn record(&self) -> Record {
        self.record
    }

    /// True once the file may have changed: begin the snapshot again.
    pub fn is_broken(&self) -> bool {
        self.hold.is_broken() || matches!(&self.source, Source::Kept(kept) if kept.is_broken())
    }

    /// Reads the next pages after page `done`: at most [`CHUNK`] bytes, none at the end. Returns the XOR of their
    /// checksums.
    ///
    /// # Errors
    /// When the file cannot be read. `Interrupted` once the hold is broken: what was read is useless.
    pub fn read(&self, done: u32, bytes: &mut Vec<u8>) -> io::Result<u64> {
        let Record { page_size, pages, .. } = self.record;
        match &self.source {
            Source::File(file) => read_chunk(file, page_size, pages, done, bytes)?,
            Source::Kept(kept) => kept.read_chunk(done, bytes)?,
        }
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
        let file = match &self.source {
            Source::File(file) => file,
            Source::Kept(kept) => kept.file(),
        };
        from_disk(file, page_size, done, CHUNK as u32 / page_size, || self.read(done, bytes))
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
    use crate::{
        cluster::{ClusterId, Member},
        storage::folder::catalogue::Change,
    };

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
            service: ServicePart::default(),
            term,
            conf: ConfState { voters: vec![1, 2], learners: vec![3], ..ConfState::default() },
            conf_index: record.index,
            membership: Membership::founded(ClusterId(7), (1..=3).map(member).collect()),
            membership_index: record.index,
            epoch: term + 1,
            cluster_key: Some(ClusterKey(b"secret of the members".to_vec())),
        }
    }

    /// Adds the databases of a service, of so many pages each, and says what they are.
    pub fn with_service(plain: Manifest, pages: &[u32]) -> (Manifest, Vec<Resting>) {
        let index = plain.record.index;
        let (mut service, mut databases) = (ServicePart::default(), Vec::new());
        for (id, pages) in (2..).zip(pages) {
            let path = format!("files/{id}.db").into();
            service.catalogue.apply(index - 12 + u64::from(id), id, &Change::Add(path)).unwrap();
            let (resting, ..) = resting(id as u8, *pages, index);
            service.records.insert(id, resting.record());
            databases.push(resting);
        }
        (Manifest { service, ..plain }, databases)
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
