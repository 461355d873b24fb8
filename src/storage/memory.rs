//! What a member keeps beside its raft log, so that a loss of either is seen: how far its own memory had reached, what it
//! remembers of the others, that a raft log may be begun, and that this node forgot. Owns those files and the place of what
//! is set aside. Must never delete a raft log that was in use.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{durable_write, fsync_dir, make_private_dir};
use crate::cluster::{
    ClusterId, NodeId,
    reach::{Known, Reach},
};

/// What is remembered of this node itself and of the others.
pub const FILE: &str = "memory.json";
/// Says that this node forgot, and why.
pub const FORGOTTEN: &str = "forgotten.json";
/// Says that this node has never had a raft log.
pub const NO_LOG: &str = "raft-log.none";
/// Says that it has had one, to programs that do not know [`NO_LOG`].
pub const LOG_CREATED: &str = "raft-log.created";
/// The raft log.
pub const LOG: &str = "raft-log";
/// What a node that forgot works with meanwhile.
pub const SCRATCH: &str = "forgotten";
/// What was set aside.
pub const ASIDE: &str = "set-aside";
/// Raft logs that are kept there.
const KEPT: usize = 3;
/// Version of the files that this program writes.
const FORMAT: u32 = 1;

/// The content of [`FILE`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    format: u32,
    cluster: ClusterId,
    /// Raft index of the membership that was in force then.
    pub edition: u64,
    pub own: Reach,
    pub others: BTreeMap<NodeId, Known>,
}

impl Memory {
    /// Nothing is remembered yet.
    pub fn new(cluster: ClusterId) -> Self {
        Self { format: FORMAT, cluster, edition: 0, own: Reach::default(), others: BTreeMap::new() }
    }

    /// Reads the file. Nothing is remembered if there is none, or one of another cluster.
    ///
    /// # Errors
    /// A sentence for a file that cannot be read. What it said was a second proof: a node can go on without it.
    pub fn read(data: &Path, cluster: ClusterId) -> Result<Self, String> {
        let path = data.join(FILE);
        let failed = |why: String| format!("{} cannot be read ({why}): it is made anew", path.display());
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::new(cluster)),
            Err(error) => return Err(failed(error.to_string())),
        };
        let found: Self = serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))?;
        match found.format {
            FORMAT if found.cluster == cluster => Ok(found),
            FORMAT => Ok(Self::new(cluster)),
            newer => Err(failed(format!("format {newer} is not known to this program"))),
        }
    }

    /// Keeps it, durably.
    ///
    /// # Errors
    /// Those of the file system; the old file is in place then.
    pub fn write(&self, data: &Path) -> io::Result<()> {
        durable_write(&data.join(FILE), &serde_json::to_vec(self)?)
    }
}

#[derive(Serialize, Deserialize)]
struct Forgotten {
    cluster: ClusterId,
    reason: String,
}

/// Why this node forgot; none if it did not, or as a member of another cluster.
///
/// # Errors
/// Those of the file system. A file that says nothing readable is still one.
pub fn forgotten(data: &Path, cluster: ClusterId) -> io::Result<Option<String>> {
    match fs::read(data.join(FORGOTTEN)) {
        Ok(bytes) => {
            let unread = |_| Forgotten { cluster, reason: "an earlier process said so".to_owned() };
            let found = serde_json::from_slice(&bytes).unwrap_or_else(unread);
            Ok((found.cluster == cluster).then_some(found.reason))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// From now on this node is one that forgot, until it has begun again.
///
/// # Errors
/// Those of the file system.
pub fn note_forgotten(data: &Path, cluster: ClusterId, reason: &str) -> io::Result<()> {
    // A snapshot that was fetched before may rest on what was forgotten.
    super::snapshot::discard(data)?;
    let forgotten = Forgotten { cluster, reason: reason.to_owned() };
    durable_write(&data.join(FORGOTTEN), &serde_json::to_vec(&forgotten)?)
}

/// This node has begun again: nothing that it remembered of itself counts any more.
///
/// # Errors
/// Those of the file system; then it is still one that forgot.
pub fn begun_again(data: &Path, memory: &Memory) -> io::Result<()> {
    memory.write(data)?;
    delete(fs::remove_file(data.join(FORGOTTEN)))?;
    fsync_dir(data)?;
    delete(fs::remove_dir_all(data.join(SCRATCH)))
}

/// Lets the next start begin a raft log. Whoever makes a data folder says so, and nobody else.
///
/// # Errors
/// Those of the file system.
pub fn permit_new_log(data: &Path) -> io::Result<()> {
    durable_write(&data.join(NO_LOG), b"")
}

/// True if a raft log may be begun.
pub fn may_begin_log(data: &Path) -> bool {
    data.join(NO_LOG).exists()
}

/// There is a raft log now.
///
/// # Errors
/// Those of the file system.
pub fn note_log(data: &Path) -> io::Result<()> {
    if !data.join(LOG_CREATED).exists() {
        durable_write(&data.join(LOG_CREATED), b"")?;
    }
    if may_begin_log(data) {
        delete(fs::remove_file(data.join(NO_LOG)))?;
        fsync_dir(data)?;
    }
    Ok(())
}

/// Moves the raft log away, for whoever wants to look at it. The oldest that were moved are deleted. None if there is no log.
///
/// # Errors
/// Those of the file system.
pub fn set_log_aside(data: &Path) -> io::Result<Option<PathBuf>> {
    let (from, folder) = (data.join(LOG), data.join(ASIDE));
    if !from.exists() {
        return Ok(None);
    }
    make_private_dir(&folder)?;
    let now = jiff::Timestamp::now();
    let to = folder.join(format!("{LOG}-{}-{:09}", now.strftime("%Y%m%dT%H%M%S"), now.subsec_nanosecond()));
    fs::rename(&from, &to)?;
    fsync_dir(&folder)?;
    fsync_dir(data)?;
    let mut kept: Vec<_> = fs::read_dir(&folder)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    kept.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(LOG)));
    kept.sort();
    for old in &kept[..kept.len().saturating_sub(KEPT)] {
        fs::remove_dir_all(old)?;
    }
    Ok(Some(to))
}

fn delete(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_survives_and_belongs_to_one_cluster() {
        let data = tempfile::tempdir().unwrap();
        let mut memory = Memory::read(data.path(), ClusterId(7)).unwrap();
        assert_eq!(memory, Memory::new(ClusterId(7)));
        memory.own = Reach { term: 3, vote: 1, acked: 9, committed: 8 };
        memory.others.entry(2).or_default().admit(77);
        memory.write(data.path()).unwrap();
        assert_eq!(Memory::read(data.path(), ClusterId(7)).unwrap(), memory);
        assert_eq!(Memory::read(data.path(), ClusterId(8)).unwrap(), Memory::new(ClusterId(8)));
        for odd in ["", "{", "[]", "{\"format\":2}"] {
            fs::write(data.path().join(FILE), odd).unwrap();
            assert!(Memory::read(data.path(), ClusterId(7)).is_err(), "{odd}");
        }
    }

    #[test]
    fn a_node_is_one_that_forgot_until_it_has_begun_again() {
        let data = tempfile::tempdir().unwrap();
        assert_eq!(forgotten(data.path(), ClusterId(7)).unwrap(), None);
        note_forgotten(data.path(), ClusterId(7), "its raft log is gone").unwrap();
        assert_eq!(forgotten(data.path(), ClusterId(7)).unwrap().unwrap(), "its raft log is gone");
        assert_eq!(forgotten(data.path(), ClusterId(8)).unwrap(), None);
        fs::write(data.path().join(FORGOTTEN), "").unwrap();
        assert!(forgotten(data.path(), ClusterId(7)).unwrap().is_some());
        begun_again(data.path(), &Memory::new(ClusterId(7))).unwrap();
        assert_eq!(forgotten(data.path(), ClusterId(7)).unwrap(), None);
    }

    #[test]
    fn a_log_is_begun_with_permission_only_and_set_aside_in_bounds() {
        let data = tempfile::tempdir().unwrap();
        assert!(!may_begin_log(data.path()));
        permit_new_log(data.path()).unwrap();
        assert!(may_begin_log(data.path()));
        note_log(data.path()).unwrap();
        assert!(!may_begin_log(data.path()) && data.path().join(LOG_CREATED).exists());
        assert_eq!(set_log_aside(data.path()).unwrap(), None);
        for round in 0..KEPT + 2 {
            fs::create_dir(data.path().join(LOG)).unwrap();
            fs::write(data.path().join(LOG).join("a"), round.to_string()).unwrap();
            let to = set_log_aside(data.path()).unwrap().unwrap();
            assert_eq!(fs::read_to_string(to.join("a")).unwrap(), round.to_string());
        }
        assert_eq!(fs::read_dir(data.path().join(ASIDE)).unwrap().count(), KEPT);
    }
}
