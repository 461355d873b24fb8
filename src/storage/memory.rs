//! What a member keeps beside its raft log, so that a loss of either is noticed: how far its own memory had reached,
//! what it remembers of the others, whether a raft log may be begun, and whether this node forgot. Owns those files,
//! and the folder of what is set aside. Must never delete a raft log that was in use, except the oldest of those set
//! aside.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{clear_away, durable_write, fsync_dir, make_private_dir};
use crate::cluster::{
    ClusterId, NodeId,
    reach::{Known, Reach},
};

/// What is remembered of this node itself and of the others.
pub const FILE: &str = "memory.json";
/// Exists if this node forgot, and says why.
pub const FORGOTTEN: &str = "forgotten.json";
/// Exists if this node has never had a raft log.
pub const NO_LOG: &str = "raft-log.none";
/// Exists if it has had one, for programs that do not know [`NO_LOG`].
pub const LOG_CREATED: &str = "raft-log.created";
/// The raft log.
pub const LOG: &str = "raft-log";
/// The folder that a node that forgot works in meanwhile.
pub const SCRATCH: &str = "forgotten";
/// The folder of raft logs that were set aside.
pub const ASIDE: &str = "set-aside";
/// The raft log that is being moved into [`ASIDE`].
const MOVING: &str = "moving";
/// Raft logs that are kept in [`ASIDE`].
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
    /// A memory of nothing.
    pub fn new(cluster: ClusterId) -> Self {
        Self { format: FORMAT, cluster, edition: 0, own: Reach::default(), others: BTreeMap::new() }
    }

    /// Reads the file. It is a memory of nothing if there is no file, or one of another cluster.
    ///
    /// # Errors
    /// A sentence for the log when the file cannot be read. A node can go on without it: it is only a second proof.
    pub fn read(data: &Path, cluster: ClusterId) -> Result<Self, String> {
        let path = data.join(FILE);
        let failed = |why: String| format!("{} cannot be read ({why}): a new one is made", path.display());
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

    /// Writes the file, durably.
    ///
    /// # Errors
    /// When the disk fails or is full. The file then has either its old content or the new one.
    pub fn write(&self, data: &Path) -> io::Result<()> {
        durable_write(&data.join(FILE), &serde_json::to_vec(self)?)
    }
}

#[derive(Serialize, Deserialize)]
struct Forgotten {
    cluster: ClusterId,
    reason: String,
    /// The raft log that was not whole has been set aside. If there is one in its place, it was begun later, and
    /// nothing was promised with it.
    #[serde(default)]
    log_aside: bool,
}

impl Forgotten {
    fn read(data: &Path, cluster: ClusterId) -> io::Result<Option<Self>> {
        match fs::read(data.join(FORGOTTEN)) {
            Ok(bytes) => {
                let reason = || "an earlier process found that out".to_owned();
                let unread = |_| Self { cluster, reason: reason(), log_aside: false };
                let found: Self = serde_json::from_slice(&bytes).unwrap_or_else(unread);
                Ok((found.cluster == cluster).then_some(found))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn write(&self, data: &Path) -> io::Result<()> {
        durable_write(&data.join(FORGOTTEN), &serde_json::to_vec(self)?)
    }
}

/// Why this node forgot; `None` if it did not, or did so as a member of another cluster.
///
/// # Errors
/// When it is not known whether the file is there. A file that cannot be understood counts, too.
pub fn forgotten(data: &Path, cluster: ClusterId) -> io::Result<Option<String>> {
    Ok(Forgotten::read(data, cluster)?.map(|forgotten| forgotten.reason))
}

/// Notes that this node forgot. That holds until it has [begun again](begun_again).
///
/// # Errors
/// When the disk fails or is full. It may not be noted then, and the node must not take part in anything.
pub fn note_forgotten(data: &Path, cluster: ClusterId, reason: &str) -> io::Result<()> {
    // A snapshot that was fetched earlier may depend on what was forgotten.
    super::snapshot::discard(data)?;
    Forgotten { cluster, reason: reason.to_owned(), log_aside: false }.write(data)
}

/// Notes that this node has begun again: what it remembered of itself no longer counts.
///
/// # Errors
/// When the disk fails or is full. The node still counts as one that forgot.
pub fn begun_again(data: &Path, memory: &Memory) -> io::Result<()> {
    memory.write(data)?;
    clear_away(&data.join(FORGOTTEN))?;
    fsync_dir(data)?;
    clear_away(&data.join(SCRATCH))
}

/// Lets the next start begin a raft log. Only what makes a data folder may call this.
///
/// # Errors
/// When the disk fails or is full. The next start may refuse to begin a raft log then.
pub fn permit_new_log(data: &Path) -> io::Result<()> {
    durable_write(&data.join(NO_LOG), b"")
}

/// True if a raft log may be begun.
pub fn may_begin_log(data: &Path) -> bool {
    data.join(NO_LOG).exists()
}

/// Notes that there is a raft log now.
///
/// # Errors
/// When the disk fails or is full: do not use the log before this has succeeded.
pub fn note_log(data: &Path) -> io::Result<()> {
    if !data.join(LOG_CREATED).exists() {
        durable_write(&data.join(LOG_CREATED), b"")?;
    }
    forbid_new_log(data)
}

/// Lets no start begin a raft log from now on: a missing one is a lost one.
///
/// # Errors
/// When the disk fails.
pub fn forbid_new_log(data: &Path) -> io::Result<()> {
    if may_begin_log(data) {
        clear_away(&data.join(NO_LOG))?;
        fsync_dir(data)?;
    }
    Ok(())
}

/// Makes room for the raft log with which a node that forgot begins again. The one that was not whole is set aside, for
/// whoever wants to look at it, and the oldest of those are deleted. Can be repeated: a log begun later holds nothing
/// that anybody could miss, and is deleted. Returns where the old log is now; `None` if there was nothing to set aside.
///
/// # Errors
/// When this node did not forget, or the disk fails. Nothing is lost then.
pub fn make_room_for_log(data: &Path, cluster: ClusterId) -> io::Result<Option<PathBuf>> {
    let Some(forgotten) = Forgotten::read(data, cluster)? else {
        return Err(io::Error::other("this node did not forget: its raft log stays"));
    };
    if forgotten.log_aside {
        empty(&data.join(LOG))?;
        return Ok(None);
    }
    let aside = set_log_aside(data)?;
    Forgotten { log_aside: true, ..forgotten }.write(data)?;
    Ok(aside)
}

fn set_log_aside(data: &Path) -> io::Result<Option<PathBuf>> {
    let (from, folder) = (data.join(LOG), data.join(ASIDE));
    make_private_dir(&folder)?;
    let moving = folder.join(MOVING);
    match fs::symlink_metadata(&from) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        // The next raft log goes where the link leads, too. A link that leads nowhere is moved itself.
        Ok(found) if found.is_symlink() && from.is_dir() => move_files(&from, &moving)?,
        _ => match fs::rename(&from, &moving) {
            // It is a mount point, it is on another file system, or an earlier attempt has moved a part of it.
            Err(error) if is_immovable(&error) && from.is_dir() => move_files(&from, &moving)?,
            moved => moved?,
        },
    }
    fsync_dir(data)?;
    // An empty folder is not worth keeping.
    match fs::remove_dir(&moving) {
        Err(error) if error.kind() != ErrorKind::NotFound => {}
        _ => return Ok(None),
    }
    let now = jiff::Timestamp::now();
    let to = folder.join(format!("{LOG}-{}-{:09}", now.strftime("%Y%m%dT%H%M%S"), now.subsec_nanosecond()));
    fs::rename(&moving, &to)?;
    fsync_dir(&folder)?;
    let mut kept: Vec<_> = fs::read_dir(&folder)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    kept.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(LOG)));
    kept.sort();
    for old in &kept[..kept.len().saturating_sub(KEPT)] {
        clear_away(old)?;
    }
    Ok(Some(to))
}

fn is_immovable(error: &io::Error) -> bool {
    use ErrorKind::{CrossesDevices, DirectoryNotEmpty, ResourceBusy};
    matches!(error.kind(), CrossesDevices | DirectoryNotEmpty | ResourceBusy)
}

/// Moves the files of a folder into another one, and leaves the folder itself. Each file is in one of the two at any
/// moment, so this can be repeated after a crash.
fn move_files(from: &Path, to: &Path) -> io::Result<()> {
    make_private_dir(to)?;
    for (path, name) in files(from)? {
        let to = to.join(name);
        match fs::rename(&path, &to) {
            Err(error) if error.kind() == ErrorKind::CrossesDevices => copy_and_remove(&path, &to)?,
            moved => moved?,
        }
    }
    fsync_dir(to)?;
    fsync_dir(from)
}

fn copy_and_remove(from: &Path, to: &Path) -> io::Result<()> {
    let mut source = File::open(from)?;
    // An earlier attempt may have copied only half of it.
    clear_away(to)?;
    let mut copy = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    // After a failure, as on a full disk, the half of a copy does not keep its space.
    io::copy(&mut source, &mut copy).and_then(|_| copy.sync_all()).inspect_err(|_| drop(clear_away(to)))?;
    to.parent().map_or(Ok(()), fsync_dir)?;
    fs::remove_file(from)
}

/// Removes the files of a folder, or whatever is in its place.
fn empty(folder: &Path) -> io::Result<()> {
    if !folder.is_dir() {
        return clear_away(folder);
    }
    for (path, _) in files(folder)? {
        fs::remove_file(path)?;
    }
    fsync_dir(folder)
}

/// What is in a folder, except for folders: if it is a file system of its own, it may have some that are not ours.
fn files(folder: &Path) -> io::Result<Vec<(PathBuf, OsString)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            files.push((entry.path(), entry.file_name()));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, process::Command};

    use nix::{
        sched::{CloneFlags, unshare},
        unistd::geteuid,
    };

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
        assert!(make_room_for_log(data.path(), ClusterId(7)).is_err(), "it did not forget");
        for round in 0..KEPT + 2 {
            note_forgotten(data.path(), ClusterId(7), "a test says so").unwrap();
            fs::create_dir_all(data.path().join(LOG)).unwrap();
            fs::write(data.path().join(LOG).join("a"), round.to_string()).unwrap();
            let to = make_room_for_log(data.path(), ClusterId(7)).unwrap().unwrap();
            assert_eq!(fs::read_to_string(to.join("a")).unwrap(), round.to_string());
            // What was begun and not finished takes no place, and is not in the way.
            fs::create_dir_all(data.path().join(LOG)).unwrap();
            fs::write(data.path().join(LOG).join("a"), "begun").unwrap();
            assert_eq!(make_room_for_log(data.path(), ClusterId(7)).unwrap(), None);
            assert_eq!(fs::read_dir(data.path().join(LOG)).unwrap().count(), 0);
        }
        let kept = fs::read_dir(data.path().join(ASIDE)).unwrap().map(|entry| entry.unwrap().path().join("a"));
        let mut kept: Vec<_> = kept.map(|path| fs::read_to_string(path).unwrap()).collect();
        kept.sort();
        assert_eq!(kept, ["2", "3", "4"]);
    }

    /// A data folder whose raft log is a link to a folder with these files; the second path.
    fn linked(names: &[&str]) -> (tempfile::TempDir, tempfile::TempDir) {
        let (data, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        symlink(elsewhere.path(), data.path().join(LOG)).unwrap();
        names.iter().for_each(|name| fs::write(elsewhere.path().join(name), *name).unwrap());
        note_forgotten(data.path(), ClusterId(7), "a test says so").unwrap();
        (data, elsewhere)
    }

    #[test]
    fn what_a_link_leads_to_is_set_aside_and_the_link_stays() {
        // In the same file system, and in another one.
        for other in [None, tempfile::tempdir_in("/dev/shm").ok()] {
            let (data, elsewhere) = linked(&["segment-1", "segment-2"]);
            fs::create_dir(elsewhere.path().join("lost+found")).unwrap();
            if let Some(other) = &other {
                symlink(other.path(), data.path().join(ASIDE)).unwrap();
            }
            // An attempt that died has moved one file, and copied the half of another one.
            let moving = data.path().join(ASIDE).join(MOVING);
            fs::create_dir_all(&moving).unwrap();
            fs::write(moving.join("segment-0"), "segment-0").unwrap();
            fs::write(moving.join("segment-1"), "seg").unwrap();
            let to = make_room_for_log(data.path(), ClusterId(7)).unwrap().unwrap();
            assert_eq!(fs::read_dir(&to).unwrap().count(), 3);
            for name in ["segment-0", "segment-1", "segment-2"] {
                assert_eq!(fs::read_to_string(to.join(name)).unwrap(), name);
            }
            assert!(fs::symlink_metadata(data.path().join(LOG)).unwrap().is_symlink());
            let left: Vec<_> =
                fs::read_dir(elsewhere.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(left, ["lost+found"]);
            fs::write(elsewhere.path().join("segment-1"), "begun").unwrap();
            assert_eq!(make_room_for_log(data.path(), ClusterId(7)).unwrap(), None);
            assert!(!elsewhere.path().join("segment-1").exists(), "it was begun and not finished");
        }
    }

    /// Needs root, for a small file system that only this test sees.
    #[test]
    fn a_mount_point_stays_and_its_files_are_set_aside() {
        if !geteuid().is_root() {
            return;
        }
        let test = || {
            unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
            let run = |arguments: &[&str]| assert!(Command::new("mount").args(arguments).status().unwrap().success());
            run(&["--make-rprivate", "/"]);
            let data = tempfile::tempdir().unwrap();
            let log = data.path().join(LOG);
            fs::create_dir(&log).unwrap();
            run(&["-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", log.to_str().unwrap()]);
            fs::write(log.join("segment-1"), "in use").unwrap();
            note_forgotten(data.path(), ClusterId(7), "a test says so").unwrap();
            let to = make_room_for_log(data.path(), ClusterId(7)).unwrap().unwrap();
            assert_eq!(fs::read_to_string(to.join("segment-1")).unwrap(), "in use");
            assert_eq!(fs::read_dir(&log).unwrap().count(), 0);
            fs::write(log.join("segment-1"), "begun").unwrap();
            assert_eq!(make_room_for_log(data.path(), ClusterId(7)).unwrap(), None);
            assert_eq!(fs::read_dir(&log).unwrap().count(), 0);
            assert_eq!(fs::rename(&log, data.path().join("b")).unwrap_err().kind(), ErrorKind::ResourceBusy);
            assert!(Command::new("umount").arg(&log).status().unwrap().success());
        };
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn a_raft_log_that_leads_nowhere_is_not_in_the_way() {
        let (data, elsewhere) = linked(&[]);
        drop(elsewhere);
        let to = make_room_for_log(data.path(), ClusterId(7)).unwrap().unwrap();
        assert!(fs::symlink_metadata(&to).unwrap().is_symlink(), "it says where the raft log was");
        assert!(fs::symlink_metadata(data.path().join(LOG)).is_err());
        assert_eq!(make_room_for_log(data.path(), ClusterId(7)).unwrap(), None);
    }
}
