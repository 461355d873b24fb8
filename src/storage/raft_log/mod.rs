//! The raft log on disk: our own segmented log behind `raft::Storage`.
//!
//! Owns this node's entries, term, vote, commit index and configuration. It must never report anything as synced that
//! is not, never go on after a failed write or sync, and never bring back an entry that was replaced.
//!
//! The log is one stream of records (`record.rs`), cut into files of fixed size (`segment.rs`). It is only ever written
//! at its end. An entry record whose index exists replaces that entry and all after it, so nothing on disk is
//! overwritten, and there is no moment between the old tail and the new one. All records of one [`RaftLog::append`] are
//! a batch, which a crash leaves whole or not at all (`recovery.rs`). Every segment begins with a copy of the state, so
//! that earlier ones can be removed. A helper thread fills files ahead of time. [`RaftLog::compact`] frees them for
//! reuse.
//!
//! Threads: `append` writes to the page cache under the writer's lock, and then shows readers what it wrote.
//! [`Pending::sync`] holds neither lock, so appending, reading and syncing run side by side.

pub mod disk;
mod engine;
pub mod record;
mod recovery;
mod retained;
mod room;
pub mod segment;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, OnceLock, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

use nix::errno::Errno;
use raft::{
    GetEntriesContext, RaftState, Storage, StorageError,
    eraftpb::{ConfState, Entry, EntryType, HardState, Snapshot},
};
use thiserror::Error;

pub use self::{
    disk::{Disk, DiskFile, RealDisk},
    retained::RetainedTail,
};
use self::{
    engine::{Cache, RESERVE, Shared, State, Writer, plain},
    record::{Kind, Position, Record, Start},
    recovery::Contents,
    segment::{FIRST, Names, Supply, segment_path},
};
use crate::{
    cluster::{ClusterId, NodeId},
    mutex::locked,
    storage::EntrySource,
};

/// Every raft log begins as if everything up to this index had been applied and compacted.
pub const ORIGIN: u64 = 1;
/// Largest segment, in bytes.
pub const MAX_SEGMENT: usize = 64 << 20;
/// Smallest segment, in bytes; only tests want it that small. The size of a segment limits the size of an entry.
pub const MIN_SEGMENT: usize = 16 << 10;
/// Bytes of entries that [`RaftLog::entries_between`] reads at once. A larger entry is read all the same.
const READ: u64 = 1 << 20;

/// Cluster and node that a log belongs to.
pub type Owner = (ClusterId, NodeId);

/// Why the log could not do what was asked.
#[derive(Debug, Error)]
pub enum LogError {
    /// An earlier write or sync failed. Nothing can be relied on until the process has restarted.
    #[error("the raft log cannot be used since an earlier error: {0}")]
    Poisoned(String),
    /// No space for the next segment. Nothing was written; try again later.
    #[error("no space for the next segment of the raft log in {} ({needed} bytes); free some space", path.display())]
    Full { path: PathBuf, needed: u64 },
    #[error("cannot {verb} {}: {error}", path.display())]
    Io { verb: &'static str, path: PathBuf, error: io::Error },
    #[error("{} is damaged at offset {offset}: {reason}", path.display())]
    Damaged { path: PathBuf, offset: u64, reason: String },
    /// There is no log, and none may be created: it was lost. Nothing was written.
    #[error("the raft log in {} is gone", path.display())]
    Gone { path: PathBuf },
    #[error("{} has format {found}, and this program knows formats up to {known}; upgrade this node", path.display())]
    Newer { path: PathBuf, found: u32, known: u32 },
    #[error(
        "{} belongs to node {} of cluster {}, and not to node {} of cluster {}; is this the right data folder?",
        path.display(), found.1, found.0, expected.1, expected.0
    )]
    Foreign { path: PathBuf, found: Owner, expected: Owner },
    /// The caller asked for something that a raft log must not do. Nothing was written.
    #[error("refused by the raft log: {0}")]
    Refused(String),
}

impl LogError {
    fn io(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io { verb, path: path.to_owned(), error }
    }

    fn damaged(path: &Path, offset: u64, reason: &str) -> Self {
        Self::Damaged { path: path.to_owned(), offset, reason: reason.to_owned() }
    }
}

/// The log's own error, without the two errors that raft wraps around it and that repeat it.
fn unwrapped(error: raft::Error) -> io::Error {
    match error {
        raft::Error::Store(StorageError::Other(cause)) => io::Error::other(cause),
        other => io::Error::other(other),
    }
}

/// How a log is laid out.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Size of a segment, in bytes: [`MIN_SEGMENT`] to [`MAX_SEGMENT`]. Segments that exist keep theirs.
    pub segment_bytes: usize,
    /// Most bytes of recent entries that are kept in memory.
    pub cache_bytes: usize,
    /// Prepare segments on a thread of its own. Otherwise [`Pending::sync`] does so, for tests.
    pub helper: bool,
    /// Create the log if there is none. Otherwise a missing log is [`LogError::Gone`].
    pub create: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { segment_bytes: 16 << 20, cache_bytes: 16 << 20, helper: true, create: true }
    }
}

/// What [`RaftLog::open`] found, for the caller to log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// True if there was no log before.
    pub created: bool,
    /// Entries that were found.
    pub entries: u64,
    pub segments: u64,
    /// Bytes of records that were dropped after the end of the log: written shortly before a crash, and never synced.
    pub torn_bytes: u64,
    /// Bytes that were written and synced again, because nothing proved that they had been synced.
    pub unproven_bytes: u64,
}

/// Stops the helper when the last user of the log is gone: nobody may touch the files after that.
struct Core {
    shared: Arc<Shared>,
    helper: Option<(SyncSender<()>, JoinHandle<()>)>,
}

impl Drop for Core {
    fn drop(&mut self) {
        if let Some((work, thread)) = self.helper.take() {
            drop(work);
            let _ = thread.join();
        }
    }
}

/// The raft log of this node. Clones are the same log.
#[derive(Clone)]
pub struct RaftLog {
    core: Arc<Core>,
}

/// An append that can be read, but is not on disk yet.
pub struct Pending {
    log: RaftLog,
    position: Position,
}

impl RaftLog {
    /// Opens the log in `dir`, or creates it there if the options permit. A new log begins as if compacted at index 1
    /// of term 1 with the configuration `initial`, so that all first members of a cluster begin alike. An existing log
    /// ignores `initial`.
    ///
    /// # Errors
    /// [`LogError::Gone`] when there is none and none may be created. [`LogError::Damaged`] when it must not be used
    /// any more. [`LogError::Newer`] or [`LogError::Foreign`] when only a newer program or another node may use it.
    /// [`LogError::Full`] or [`LogError::Io`] when the disk is full or fails: a later start may succeed.
    /// [`LogError::Refused`] for a segment size out of range.
    pub fn open(
        dir: &Path,
        owner: Owner,
        initial: ConfState,
        options: Options,
        disk: impl Disk,
    ) -> Result<Self, LogError> {
        if !(MIN_SEGMENT..=MAX_SEGMENT).contains(&options.segment_bytes) {
            let size = options.segment_bytes;
            return Err(LogError::Refused(format!("segment size {size} is not in {MIN_SEGMENT}..={MAX_SEGMENT}")));
        }
        let disk: Arc<dyn Disk> = Arc::new(disk);
        let gone = || LogError::Gone { path: dir.to_owned() };
        if options.create {
            disk.make_dir(dir).map_err(LogError::io("create directory", dir))?;
        }
        let list = match disk.list(dir) {
            Err(error) if !options.create && is_no_folder(&error) => return Err(gone()),
            list => list.map_err(LogError::io("list", dir))?,
        };
        let names = Names::parse(&list);
        let mut found = recovery::read(&*disk, dir, &names.segments, owner)?;
        // Checked before anything is written: a new, empty log would later be taken for one that never had any entries.
        if found.segments.is_empty() && !options.create {
            return Err(gone());
        }
        let next_sequence = found.segments.back().map_or(1, |last| last.sequence + 1);
        let mut supply = Supply::new(disk, dir, owner, &options, &names, next_sequence)?;
        recovery::settle(dir, &mut found, &mut supply)?;
        if found.segments.is_empty() {
            create(dir, &mut found, &mut supply, initial)?;
        }
        let active = found.segments.back().expect("a log has a segment after it was created");
        let writer = Writer { segment: active.clone(), offset: found.end.offset(), buffer: Vec::new() };
        let cache = Cache { entries: VecDeque::new(), bytes: 0, limit: options.cache_bytes };
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            helper: options.helper,
            recovered: found.recovered,
            writer: Mutex::new(writer),
            state: RwLock::new(State { segments: found.segments, log: found.log, cache }),
            supply_bytes: AtomicU64::new(supply.size_bytes()),
            segment_size: supply.segment_size(),
            supply: Mutex::new(supply),
            made: Condvar::new(),
            syncing: Mutex::new(()),
            retiring: Mutex::new(()),
            written: AtomicU64::new(found.end.0),
            durable: AtomicU64::new(found.end.0),
            hurry: Arc::default(),
            wanted: AtomicBool::new(false),
            full: AtomicBool::new(false),
            poison: OnceLock::new(),
        });
        let helper = if options.helper { Some(start_helper(&shared, dir)?) } else { None };
        Ok(Self { core: Arc::new(Core { shared, helper }) })
    }

    /// Writes a run of consecutive entries, a hard state, or both, as one batch. They can be read at once, and are on
    /// disk after [`Pending::sync`]. An entry whose index exists replaces that entry and all after it.
    ///
    /// # Errors
    /// [`LogError::Full`] and [`LogError::Refused`] change nothing. After any other error the log is
    /// [poisoned](Self::poison).
    pub fn append(&self, entries: &[Entry], hard: Option<&HardState>) -> Result<Pending, LogError> {
        let shared = &self.core.shared;
        let mut writer = locked(&shared.writer);
        let before = shared.read_state().log.hard.clone();
        shared.check_append(entries, hard, &before)?;
        let vote = hard.map_or(0, |hard| hard.vote).to_le_bytes();
        let mut records = Vec::with_capacity(entries.len() + 1);
        // The hard state comes first: an entry must never be there without the term in which it was accepted.
        records.extend(hard.map(|hard| plain(Kind::Hard, hard.commit, hard.term, &vote)));
        records.extend(entries.iter().map(|entry| Record {
            context: &entry.context,
            ..plain(Kind::Entry(entry.entry_type), entry.index, entry.term, &entry.data)
        }));
        let written = shared.write(&mut writer, &mut records, hard.unwrap_or(&before), RESERVE)?;
        shared.publish(&writer, written, |state, slots| {
            if let Some(hard) = hard {
                state.log.hard = hard.clone();
            }
            let Some(first) = entries.first() else { return };
            if state.log.slots.is_empty() {
                state.log.first = first.index;
            }
            state.log.slots.truncate((first.index - state.log.first) as usize);
            state.log.slots.extend(slots);
            entries.iter().for_each(|entry| state.cache.push(entry));
        });
        Ok(self.pending())
    }

    /// Returns when everything appended so far is on disk.
    ///
    /// # Errors
    /// Any error poisons the log.
    pub fn sync_written(&self) -> Result<(), LogError> {
        self.pending().sync()
    }

    /// Durably drops all entries up to `to`, which must be applied, and not needed by followers. Their space is reused.
    ///
    /// # Errors
    /// [`LogError::Refused`] above the commit index. [`LogError::Full`] changes nothing. After any other error the log
    /// is poisoned.
    pub fn compact(&self, to: u64) -> Result<(), LogError> {
        let shared = &self.core.shared;
        {
            let mut writer = locked(&shared.writer);
            let (hard, term) = {
                let state = shared.read_state();
                let (first, commit) = (state.log.compacted.0 + 1, state.log.hard.commit);
                if to < first {
                    return Ok(());
                }
                if to > commit {
                    return Err(LogError::Refused(format!("compacting up to {to}, above the commit index {commit}")));
                }
                (state.log.hard.clone(), state.log.slots[(to - first) as usize].term)
            };
            let written = shared.write(&mut writer, &mut [plain(Kind::Compact, to, term, &[])], &hard, 0)?;
            shared.publish(&writer, written, |state, _| {
                state.log.compacted = (to, term);
                state.log.drop_front(to);
                state.cache.drop_front(to);
            });
        }
        self.pending().sync()?;
        shared.retire()?;
        self.wake_helper();
        Ok(())
    }

    /// Durably records the configuration as of an applied index. [`Storage::initial_state`] returns it from now on.
    ///
    /// # Errors
    /// [`LogError::Full`] leaves everything as it was. After any other error the log is poisoned.
    pub fn set_applied_conf(&self, conf: ConfState, index: u64) -> Result<(), LogError> {
        let shared = &self.core.shared;
        {
            let mut writer = locked(&shared.writer);
            let hard = self.hard_state();
            let mut data = Vec::new();
            record::encode_conf(&conf, &mut data);
            let written = shared.write(&mut writer, &mut [plain(Kind::Conf, index, 0, &data)], &hard, RESERVE)?;
            shared.publish(&writer, written, |state, _| (state.log.conf_index, state.log.conf) = (index, conf));
        }
        self.pending().sync()
    }

    /// Durably drops all entries and begins again after `index`: a snapshot of that index replaces them.
    ///
    /// # Errors
    /// [`LogError::Refused`] below the commit index. [`LogError::Full`] changes nothing. After any other error the log
    /// is poisoned.
    pub fn reset(&self, index: u64, term: u64, conf: ConfState) -> Result<(), LogError> {
        let shared = &self.core.shared;
        {
            let mut writer = locked(&shared.writer);
            let mut hard = self.hard_state();
            if index < hard.commit {
                let commit = hard.commit;
                return Err(LogError::Refused(format!("a reset to {index}, below the commit index {commit}")));
            }
            if term > hard.term {
                (hard.term, hard.vote) = (term, 0);
            }
            hard.commit = index;
            let vote = hard.vote.to_le_bytes();
            let mut data = Vec::new();
            record::encode_conf(&conf, &mut data);
            let mut records =
                [plain(Kind::Hard, hard.commit, hard.term, &vote), plain(Kind::Reset, index, term, &data)];
            let written = shared.write(&mut writer, &mut records, &hard, RESERVE)?;
            shared.publish(&writer, written, |state, _| {
                state.log.slots.clear();
                state.cache.drop_front(u64::MAX);
                (state.log.first, state.log.compacted, state.log.hard) = (index + 1, (index, term), hard);
                (state.log.conf_index, state.log.conf) = (index, conf);
            });
        }
        self.pending().sync()?;
        shared.retire()?;
        self.wake_helper();
        Ok(())
    }

    /// Calls `each` with every entry of `first..=last`, in order. Holds about 1 MiB of them at a time.
    ///
    /// # Errors
    /// When an entry is gone or cannot be read. An error of `each` ends the reading.
    pub fn entries_between(
        &self,
        first: u64,
        last: u64,
        each: &mut dyn FnMut(&Entry) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut next = first;
        while next <= last {
            for entry in self.core.shared.read(next, last + 1, READ).map_err(unwrapped)? {
                each(&entry)?;
                next = entry.index + 1;
            }
        }
        Ok(())
    }

    /// Index of the first entry, or of the first to come: 1 above the compacted index.
    pub fn first_index(&self) -> u64 {
        self.core.shared.read_state().log.compacted.0 + 1
    }

    /// Index of the last entry.
    pub fn last_index(&self) -> u64 {
        self.core.shared.read_state().log.last()
    }

    /// The last hard state that was appended.
    pub fn hard_state(&self) -> HardState {
        self.core.shared.read_state().log.hard.clone()
    }

    /// The last configuration that was recorded, and its index.
    pub fn applied_conf(&self) -> (ConfState, u64) {
        let state = self.core.shared.read_state();
        (state.log.conf.clone(), state.log.conf_index)
    }

    /// Bytes that the entries after `after` up to `last` take in the log; `None` if some of them are not there.
    pub fn bytes_between(&self, after: u64, last: u64) -> Option<u64> {
        if after >= last {
            return Some(0);
        }
        let state = self.core.shared.read_state();
        let slot = |index: u64| state.log.slots.get(usize::try_from(index.checked_sub(state.log.first)?).ok()?);
        let (from, to) = (slot(after + 1)?, slot(last)?);
        // Computed from their places, not one by one: a member may be a million of them behind.
        let between = from.at.sequence()..to.at.sequence();
        let files: usize =
            state.segments.iter().filter(|one| between.contains(&one.sequence)).map(|one| one.size).sum();
        let end = files + to.at.offset() + to.length as usize;
        Some(end.saturating_sub(from.at.offset()) as u64)
    }

    /// Bytes on disk, including files that are kept ready.
    pub fn size_bytes(&self) -> u64 {
        let shared = &self.core.shared;
        let live: usize = shared.read_state().segments.iter().map(|segment| segment.size).sum();
        live as u64 + shared.supply_bytes.load(Ordering::Relaxed)
    }

    /// Why the log cannot be used any more: the first write or sync that failed. `None` while it can be used.
    pub fn poison(&self) -> Option<&str> {
        self.core.shared.poison.get().map(String::as_str)
    }

    /// What [`RaftLog::open`] found.
    pub fn recovered(&self) -> Recovered {
        self.core.shared.recovered
    }

    fn pending(&self) -> Pending {
        let position = Position(self.core.shared.written.load(Ordering::Acquire));
        self.wake_helper();
        Pending { log: self.clone(), position }
    }

    fn wake_helper(&self) {
        if let Some((work, _)) = &self.core.helper
            && self.core.shared.wanted.load(Ordering::Relaxed)
        {
            // One message waiting is enough: the helper looks for itself what there is to do.
            let _ = work.try_send(());
        }
    }
}

impl Pending {
    /// Makes everything up to this append durable. Can run on any thread. Syncing a later append covers the earlier
    /// ones.
    ///
    /// # Errors
    /// Any error poisons the log: nobody knows what is on disk.
    pub fn sync(self) -> Result<(), LogError> {
        self.log.core.shared.sync(self.position)
    }
}

/// True for an error that says that there is no folder with this name.
fn is_no_folder(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        || error.raw_os_error() == Some(Errno::ELOOP as i32)
}

/// Writes the first batch of a new log.
fn create(dir: &Path, found: &mut recovery::Found, supply: &mut Supply, initial: ConfState) -> Result<(), LogError> {
    let job = supply.begin().expect("nobody else uses the supply yet");
    supply.finish(job.run(&Arc::new(AtomicBool::new(true))))?;
    let segment = supply.take().expect("one segment was made");
    let hard = record::hard_state(1, 0, 1);
    let start = Start { previous: Position(0), hard: hard.clone(), conf_index: ORIGIN, conf: initial.clone() };
    let data = start.encode();
    let mut bytes = Vec::new();
    Record { last: true, ..plain(Kind::Start, 1, 1, &data) }.encode(segment.seed, FIRST, &mut bytes);
    let path = segment_path(dir, segment.sequence);
    segment.file.write_at(&bytes, FIRST as u64).map_err(LogError::io("write", &path))?;
    segment.file.sync_data().map_err(LogError::io("sync", &path))?;
    found.end = Position::new(segment.sequence, FIRST + bytes.len());
    found.segments.push_back(segment);
    found.recovered.segments = 1;
    let compacted = (ORIGIN, 1);
    found.log =
        Contents { first: ORIGIN + 1, compacted, hard, conf: initial, conf_index: ORIGIN, ..Contents::default() };
    Ok(())
}

type Helper = (SyncSender<()>, JoinHandle<()>);

fn start_helper(shared: &Arc<Shared>, dir: &Path) -> Result<Helper, LogError> {
    let (work, queue) = sync_channel(1);
    let shared = shared.clone();
    // The first segments to come are prepared right away.
    let _ = work.try_send(());
    let run = move || prepare_ahead(&shared, &queue);
    let thread = std::thread::Builder::new().name("raft-log-files".into()).spawn(run);
    Ok((work, thread.map_err(LogError::io("start the helper thread of", dir))?))
}

/// Keeps segments ready until the log is dropped.
fn prepare_ahead(shared: &Shared, queue: &Receiver<()>) {
    let mut warned = false;
    while queue.recv().is_ok() {
        shared.wanted.store(false, Ordering::Relaxed);
        if shared.poison.get().is_some() {
            return;
        }
        match shared.prepare_ahead() {
            Ok(()) => warned = false,
            // This is tried again until there is space; one warning is enough.
            Err(LogError::Full { .. }) if warned => {}
            Err(error @ LogError::Full { .. }) => {
                warned = true;
                tracing::warn!("cannot prepare the next segments: {error}");
            }
            Err(error) => tracing::error!("{error}"),
        }
    }
}

impl Storage for RaftLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let state = self.core.shared.read_state();
        Ok(RaftState::new(state.log.hard.clone(), state.log.conf.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        self.core.shared.read(low, high, max_size.into().unwrap_or(u64::MAX))
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        let state = self.core.shared.read_state();
        let (compacted, term) = state.log.compacted;
        match index.checked_sub(compacted) {
            None => Err(StorageError::Compacted.into()),
            Some(0) => Ok(term),
            Some(above) => {
                let slot = usize::try_from(above - 1).ok().and_then(|above| state.log.slots.get(above));
                slot.map(|slot| slot.term).ok_or(StorageError::Unavailable.into())
            }
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.first_index())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last_index())
    }

    /// Only the metadata: the database itself is sent on another connection (`docs/design.md`, "Snapshot and rejoin").
    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        let state = self.core.shared.read_state();
        let (index, term) = state.log.compacted;
        if index <= 1 || index < request_index {
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        }
        let mut snapshot = Snapshot::default();
        let metadata = snapshot.mut_metadata();
        (metadata.index, metadata.term) = (index, term);
        metadata.set_conf_state(state.log.conf.clone());
        Ok(snapshot)
    }
}

impl EntrySource for RaftLog {
    fn for_each(&self, first: u64, last: u64, each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        self.entries_between(first, last, &mut |entry| {
            if entry.entry_type == EntryType::EntryNormal && !entry.data.is_empty() {
                each(entry.index, &entry.data)?;
            }
            Ok(())
        })
    }
}
