//! The raft log on disk: our own segmented log behind `raft::Storage`.
//!
//! Owns entries, term, vote, commit index and configuration of this node. It must never report anything as synced that is
//! not, never go on after a failed write or sync, and never bring back an entry that was replaced.
//!
//! The log is one stream of records (`record.rs`), cut into files of fixed size (`segment.rs`). It is only ever written
//! at its end: an entry record with an index that exists replaces that entry and all behind it, so nothing on disk is
//! overwritten and there is no moment between the old and the new tail. All records of one [`RaftLog::append`] are a batch,
//! which a crash leaves whole or not at all (`recovery.rs`). Every segment begins with a copy of the state, so that
//! the ones before it can go. Files are filled ahead by a helper thread and used again after [`RaftLog::compact`].
//!
//! Threads: `append` writes to the page cache under the writer's lock and then publishes to readers; [`Pending::sync`]
//! holds neither lock, so appending, reading and syncing run side by side.

pub mod disk;
pub mod record;
mod recovery;
pub mod segment;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

use raft::{
    GetEntriesContext, RaftState, Storage, StorageError,
    eraftpb::{ConfState, Entry, EntryType, HardState, Snapshot},
};
use thiserror::Error;

pub use self::disk::{Disk, DiskFile, RealDisk};
use self::{
    record::{Kind, Position, Record, Start, space},
    recovery::Contents,
    segment::{FIRST, Names, Segment, Supply, segment_path},
};
use crate::{
    cluster::{ClusterId, NodeId},
    storage::EntrySource,
};

/// Largest segment, in bytes.
pub const MAX_SEGMENT: usize = 64 << 20;
/// Smallest segment, in bytes; only tests want it that small. It bounds the size of an entry.
pub const MIN_SEGMENT: usize = 16 << 10;
/// Kept free in every segment for compaction alone, so that space can still be given back when the disk is full.
const RESERVE: usize = 512;
/// Records are collected up to this size before they are written.
const WRITE: usize = 1 << 20;
/// Entries that the applier reads at once, in bytes; one larger entry is read all the same.
const READ: u64 = 1 << 20;

/// Cluster and node that a log belongs to.
pub type Owner = (ClusterId, NodeId);

/// Why the log could not do what was asked.
#[derive(Debug, Error)]
pub enum LogError {
    /// An earlier write or sync failed. Nothing can be relied on until the process has started again.
    #[error("the raft log is out of use since an earlier error: {0}")]
    Poisoned(String),
    /// No space for the next segment. Nothing was written; the same can be tried again later.
    #[error("no space for the next segment of the raft log in {} ({needed} bytes); free some space", path.display())]
    Full { path: PathBuf, needed: u64 },
    #[error("cannot {verb} {}: {source}", path.display())]
    Io { verb: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{} is damaged at offset {offset}: {reason}; this node's log must not be used any more: replace the member",
        path.display()
    )]
    Damaged { path: PathBuf, offset: u64, reason: String },
    #[error("{} has format {found}, and this program knows formats up to {known}; upgrade this node", path.display())]
    Newer { path: PathBuf, found: u32, known: u32 },
    #[error(
        "{} belongs to node {} of cluster {}, and not to node {} of cluster {}; is this the right data directory?",
        path.display(), found.1, found.0, expected.1, expected.0
    )]
    Foreign { path: PathBuf, found: Owner, expected: Owner },
    /// The caller asked for something that a raft log must not do. Nothing was written.
    #[error("refused by the raft log: {0}")]
    Refused(String),
}

impl LogError {
    fn io(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { verb, path: path.to_owned(), source }
    }

    fn damaged(path: &Path, offset: u64, reason: &str) -> Self {
        Self::Damaged { path: path.to_owned(), offset, reason: reason.to_owned() }
    }
}

/// How a log is laid out.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Size of a segment, in bytes: [`MIN_SEGMENT`] to [`MAX_SEGMENT`]. Segments that exist keep theirs.
    pub segment_bytes: usize,
    /// Most bytes of recent entries that are kept in memory.
    pub cache_bytes: usize,
    /// Prepare segments on a thread of the log's own; otherwise in [`Pending::sync`], which tests want.
    pub helper: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { segment_bytes: 16 << 20, cache_bytes: 16 << 20, helper: true }
    }
}

/// What [`RaftLog::open`] found, to be logged by the caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// True if there was no log before.
    pub created: bool,
    /// Entries that are there.
    pub entries: u64,
    pub segments: u64,
    /// Bytes of records behind the end of the log that were dropped: written shortly before a crash and never synced.
    pub torn_bytes: u64,
    /// Bytes that were written and synced again because nothing proved that they had been synced.
    pub unproven_bytes: u64,
}

/// Where an entry is. One per entry is in memory.
#[derive(Clone, Copy, Debug)]
struct Slot {
    at: Position,
    term: u64,
    /// With padding, in bytes.
    length: u32,
}

/// The entries appended last, without a gap, up to a number of bytes.
struct Cache {
    entries: VecDeque<Entry>,
    bytes: usize,
    limit: usize,
}

impl Cache {
    fn weight(entry: &Entry) -> usize {
        entry.data.len() + entry.context.len() + size_of::<Entry>()
    }

    fn push(&mut self, entry: &Entry) {
        while self.entries.back().is_some_and(|last| last.index >= entry.index) {
            self.bytes -= self.entries.pop_back().map_or(0, |last| Self::weight(&last));
        }
        self.bytes += Self::weight(entry);
        self.entries.push_back(entry.clone());
        while self.bytes > self.limit {
            self.pop_front();
        }
    }

    fn pop_front(&mut self) {
        self.bytes -= self.entries.pop_front().map_or(0, |first| Self::weight(&first));
    }

    fn drop_front(&mut self, index: u64) {
        while self.entries.front().is_some_and(|first| first.index <= index) {
            self.pop_front();
        }
    }

    fn get(&self, index: u64) -> Option<&Entry> {
        let first = self.entries.front()?.index;
        self.entries.get(usize::try_from(index.checked_sub(first)?).ok()?)
    }
}

/// What readers see.
struct State {
    /// Ascending, without a gap; the last one is being written.
    segments: VecDeque<Arc<Segment>>,
    log: Contents,
    cache: Cache,
}

/// The end of the log.
struct Writer {
    segment: Arc<Segment>,
    offset: usize,
    buffer: Vec<u8>,
}

/// What a batch has become on disk.
#[derive(Default)]
struct Written {
    slots: Vec<Slot>,
    segments: Vec<Arc<Segment>>,
}

// Locks are taken in the order writer, supply, state; syncing is taken alone or with state.
struct Shared {
    dir: PathBuf,
    helper: bool,
    recovered: Recovered,
    writer: Mutex<Writer>,
    state: RwLock<State>,
    supply: Mutex<Supply>,
    supply_bytes: AtomicU64,
    syncing: Mutex<()>,
    /// End of what has been written, and of what has been synced: [`Position`]s.
    written: AtomicU64,
    durable: AtomicU64,
    poison: OnceLock<String>,
}

/// Stops the helper before the last user of the log is gone: nobody may touch the files after that.
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

/// Written, and readable, but not on disk yet.
pub struct Pending {
    log: RaftLog,
    position: Position,
}

/// A panic elsewhere does not make a lock's content wrong here: whatever is half done has poisoned the log.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RaftLog {
    /// Opens the log in `dir`, or creates it there. A new log begins as if compacted at index 1 of term 1 with
    /// the configuration `initial`, so that all first members of a cluster begin alike; an existing one ignores `initial`.
    ///
    /// # Errors
    /// [`LogError::Damaged`], [`LogError::Newer`], [`LogError::Foreign`], [`LogError::Full`] or [`LogError::Io`].
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
        disk.make_dir(dir).map_err(LogError::io("create directory", dir))?;
        let names = Names::parse(&disk.list(dir).map_err(LogError::io("list", dir))?);
        let mut found = recovery::read(&*disk, dir, &names.segments, owner)?;
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
            supply: Mutex::new(supply),
            syncing: Mutex::new(()),
            written: AtomicU64::new(found.end.0),
            durable: AtomicU64::new(found.end.0),
            poison: OnceLock::new(),
        });
        let helper = if options.helper { Some(start_helper(&shared, dir)?) } else { None };
        Ok(Self { core: Arc::new(Core { shared, helper }) })
    }

    /// Writes one run of consecutive entries, a hard state, or both, as one batch. They can be read at once, and are on
    /// disk after [`Pending::sync`]. An entry whose index exists replaces that entry and all behind it.
    ///
    /// # Errors
    /// [`LogError::Full`] and [`LogError::Refused`] leave everything as it was. After any other error the log is poisoned.
    pub fn append(&self, entries: &[Entry], hard: Option<&HardState>) -> Result<Pending, LogError> {
        let shared = &self.core.shared;
        let mut writer = lock(&shared.writer);
        let before = shared.read_state().log.hard.clone();
        shared.check_append(entries, hard, &before)?;
        let vote = hard.map_or(0, |hard| hard.vote).to_le_bytes();
        let mut records = Vec::with_capacity(entries.len() + 1);
        // The hard state comes first: an entry must never be there without the term it was accepted in.
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

    /// Durably lets go of all entries up to `to`, which must be applied and not needed by followers. Their space is used again.
    ///
    /// # Errors
    /// [`LogError::Refused`] above the commit index, [`LogError::Full`]; after any other error the log is poisoned.
    pub fn compact(&self, to: u64) -> Result<(), LogError> {
        let shared = &self.core.shared;
        {
            let mut writer = lock(&shared.writer);
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

    /// Durably records the configuration as of an applied index; [`Storage::initial_state`] returns it from now on.
    ///
    /// # Errors
    /// [`LogError::Full`]; after any other error the log is poisoned.
    pub fn set_applied_conf(&self, conf: ConfState, index: u64) -> Result<(), LogError> {
        let shared = &self.core.shared;
        {
            let mut writer = lock(&shared.writer);
            let hard = self.hard_state();
            let mut data = Vec::new();
            record::encode_conf(&conf, &mut data);
            let written = shared.write(&mut writer, &mut [plain(Kind::Conf, index, 0, &data)], &hard, RESERVE)?;
            shared.publish(&writer, written, |state, _| (state.log.conf_index, state.log.conf) = (index, conf));
        }
        self.pending().sync()
    }

    /// Durably drops all entries and begins again behind `index`: a snapshot of that index has taken their place.
    ///
    /// # Errors
    /// [`LogError::Refused`] below the commit index, [`LogError::Full`]; after any other error the log is poisoned.
    pub fn reset(&self, index: u64, term: u64, conf: ConfState) -> Result<(), LogError> {
        let shared = &self.core.shared;
        {
            let mut writer = lock(&shared.writer);
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

    /// Calls `each` with every entry of `first..=last` in order, holding about 1 MiB of them at a time.
    ///
    /// # Errors
    /// Those of reading (an entry that is gone included) and those of `each`.
    pub fn entries_between(
        &self,
        first: u64,
        last: u64,
        each: &mut dyn FnMut(&Entry) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut next = first;
        while next <= last {
            for entry in self.core.shared.read(next, last + 1, READ).map_err(io::Error::other)? {
                each(&entry)?;
                next = entry.index + 1;
            }
        }
        Ok(())
    }

    /// Index of the first entry that is there, or would be: 1 above the compacted index.
    pub fn first_index(&self) -> u64 {
        self.core.shared.read_state().log.compacted.0 + 1
    }

    /// Index of the last entry.
    pub fn last_index(&self) -> u64 {
        self.core.shared.read_state().log.last()
    }

    /// The hard state that was appended last.
    pub fn hard_state(&self) -> HardState {
        self.core.shared.read_state().log.hard.clone()
    }

    /// The configuration that was recorded last, and its index.
    pub fn applied_conf(&self) -> (ConfState, u64) {
        let state = self.core.shared.read_state();
        (state.log.conf.clone(), state.log.conf_index)
    }

    /// Bytes on disk, files kept ready included.
    pub fn size_bytes(&self) -> u64 {
        let shared = &self.core.shared;
        let live: usize = shared.read_state().segments.iter().map(|segment| segment.size).sum();
        live as u64 + shared.supply_bytes.load(Ordering::Relaxed)
    }

    /// Why the log is out of use; none while it is in use.
    pub fn poison(&self) -> Option<&str> {
        self.core.shared.poison.get().map(String::as_str)
    }

    /// True once a write or sync has failed.
    pub fn is_poisoned(&self) -> bool {
        self.poison().is_some()
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

    /// One message waiting is enough: the helper looks for itself what there is to do.
    fn wake_helper(&self) {
        if let Some((work, _)) = &self.core.helper {
            let _ = work.try_send(());
        }
    }
}

impl Pending {
    /// Makes everything up to this append durable. May run on any thread; syncing a later append covers the earlier ones.
    ///
    /// # Errors
    /// Any error poisons the log: it is unknown what is on disk.
    pub fn sync(self) -> Result<(), LogError> {
        self.log.core.shared.sync(self.position)
    }
}

fn plain(kind: Kind, index: u64, term: u64, data: &[u8]) -> Record<'_> {
    Record { kind, last: false, index, term, durable: Position(0), data, context: &[] }
}

/// The first batch of a new log.
fn create(dir: &Path, found: &mut recovery::Found, supply: &mut Supply, initial: ConfState) -> Result<(), LogError> {
    supply.prepare(1)?;
    let segment = supply.take().expect("one segment was prepared");
    let hard = record::hard_state(1, 0, 1);
    let start = Start { previous: Position(0), hard: hard.clone(), conf_index: 1, conf: initial.clone() };
    let data = start.encode();
    let mut bytes = Vec::new();
    Record { last: true, ..plain(Kind::Start, 1, 1, &data) }.encode(segment.seed, FIRST, &mut bytes);
    let path = segment_path(dir, segment.sequence);
    segment.file.write_at(&bytes, FIRST as u64).map_err(LogError::io("write", &path))?;
    segment.file.sync_data().map_err(LogError::io("sync", &path))?;
    found.end = Position::new(segment.sequence, FIRST + bytes.len());
    found.segments.push_back(segment);
    found.recovered.segments = 1;
    found.log = Contents { first: 2, compacted: (1, 1), hard, conf: initial, conf_index: 1, ..Contents::default() };
    Ok(())
}

type Helper = (SyncSender<()>, JoinHandle<()>);

fn start_helper(shared: &Arc<Shared>, dir: &Path) -> Result<Helper, LogError> {
    let (work, queue) = sync_channel(1);
    let shared = shared.clone();
    // The first segment to come is prepared right away.
    let _ = work.try_send(());
    let run = move || prepare_ahead(&shared, &queue);
    let thread = std::thread::Builder::new().name("raft-log-files".into()).spawn(run);
    Ok((work, thread.map_err(LogError::io("start the helper thread of", dir))?))
}

/// Keeps one segment ready until the log is dropped.
fn prepare_ahead(shared: &Shared, queue: &Receiver<()>) {
    let mut full = false;
    while queue.recv().is_ok() {
        if shared.poison.get().is_some() {
            return;
        }
        match shared.supplied(|supply| supply.prepare(1)) {
            Ok(()) => full = false,
            Err(error @ LogError::Full { .. }) => {
                // Said once: it is tried again after every append.
                if !full {
                    tracing::warn!("cannot prepare ahead: {error}");
                }
                full = true;
            }
            Err(error) => tracing::error!("{error}"),
        }
    }
}

impl Shared {
    fn read_state(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_state(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_poison(&self) -> Result<(), LogError> {
        self.poison.get().map_or(Ok(()), |reason| Err(LogError::Poisoned(reason.clone())))
    }

    /// Passes an error on, after which the log is out of use unless nothing happened.
    fn fail(&self, error: LogError) -> LogError {
        if !matches!(error, LogError::Full { .. } | LogError::Refused(_) | LogError::Poisoned(_)) {
            let _ = self.poison.set(error.to_string());
        }
        error
    }

    /// Works on the supply of segments.
    fn supplied<T>(&self, work: impl FnOnce(&mut Supply) -> Result<T, LogError>) -> Result<T, LogError> {
        let mut supply = lock(&self.supply);
        let result = work(&mut supply).map_err(|error| self.fail(error));
        self.supply_bytes.store(supply.size_bytes(), Ordering::Relaxed);
        result
    }

    /// What raft must never ask for is refused here, since afterwards it would be on disk.
    fn check_append(&self, entries: &[Entry], hard: Option<&HardState>, before: &HardState) -> Result<(), LogError> {
        let refuse = |what: String| Err(LogError::Refused(what));
        let (last, commit) = (self.read_state().log.last(), before.commit);
        let first = entries.first().map_or(last + 1, |entry| entry.index);
        if first > last + 1 || first <= commit {
            return refuse(format!("an entry at {first}, with the commit index {commit} and the last entry {last}"));
        }
        if entries.iter().zip(first..).any(|(entry, index)| entry.index != index) {
            return refuse("entries that do not follow each other".into());
        }
        let last = entries.last().map_or(last, |entry| entry.index);
        if let Some(hard) = hard {
            let revoted = hard.term == before.term && before.vote != 0 && hard.vote != before.vote;
            if hard.term < before.term || revoted || hard.commit < commit || hard.commit > last {
                return refuse(format!("{hard:?} after {before:?}, with the last entry {last}"));
            }
        }
        Ok(())
    }

    /// Writes the records as one batch at the end of the log. `hard` is the hard state after the batch.
    fn write(
        &self,
        writer: &mut Writer,
        records: &mut [Record<'_>],
        hard: &HardState,
        reserve: usize,
    ) -> Result<Written, LogError> {
        self.check_poison()?;
        let Some(last) = records.last_mut() else { return Ok(Written::default()) };
        last.last = true;
        let (mut start, compacted) = {
            let log = &self.read_state().log;
            let (conf, conf_index) = (log.conf.clone(), log.conf_index);
            (Start { previous: Position(0), hard: hard.clone(), conf_index, conf }, log.compacted)
        };
        // Segments are made ready before anything is written, so that a full disk leaves no half batch.
        let mut fresh = self.plan(writer, records, space(start.encode().len()), reserve)?;
        let durable = Position(self.durable.load(Ordering::Acquire));
        let mut written = Written::default();
        let mut base = writer.offset;
        writer.buffer.clear();
        for record in records {
            record.durable = durable;
            let length = space(record.data.len() + record.context.len());
            if writer.offset + length + reserve > writer.segment.size {
                self.flush(writer, &mut base)?;
                start.previous = Position::new(writer.segment.sequence, writer.offset);
                writer.segment = fresh.pop_front().expect("the plan counted the segments in the same way");
                (writer.offset, base) = (FIRST, FIRST);
                written.segments.push(writer.segment.clone());
                let data = start.encode();
                let head = Record { durable, ..plain(Kind::Start, compacted.0, compacted.1, &data) };
                head.encode(writer.segment.seed, FIRST, &mut writer.buffer);
                writer.offset += writer.buffer.len();
            }
            if matches!(record.kind, Kind::Entry(_)) {
                let at = Position::new(writer.segment.sequence, writer.offset);
                written.slots.push(Slot { at, term: record.term, length: length as u32 });
            }
            record.encode(writer.segment.seed, writer.offset, &mut writer.buffer);
            writer.offset += length;
            if writer.buffer.len() >= WRITE {
                self.flush(writer, &mut base)?;
            }
        }
        self.flush(writer, &mut base)?;
        // One huge batch must not hold its memory for ever.
        writer.buffer.shrink_to(2 * WRITE);
        Ok(written)
    }

    /// Takes the segments that the batch will need beyond the present one.
    fn plan(
        &self,
        writer: &Writer,
        records: &[Record<'_>],
        head: usize,
        reserve: usize,
    ) -> Result<VecDeque<Arc<Segment>>, LogError> {
        let (mut offset, mut size, mut count) = (writer.offset, writer.segment.size, 0);
        let fresh_size = || lock(&self.supply).segment_size();
        for record in records {
            let length = space(record.data.len() + record.context.len());
            if offset + length + reserve > size {
                size = fresh_size();
                (offset, count) = (FIRST + head, count + 1);
                if offset + length + reserve > size {
                    return Err(LogError::Refused(format!("a record of {length} bytes in segments of {size}")));
                }
            }
            offset += length;
        }
        if count == 0 {
            return Ok(VecDeque::new());
        }
        self.supplied(|supply| {
            supply.prepare(count)?;
            Ok((0..count).filter_map(|_| supply.take()).collect())
        })
    }

    fn flush(&self, writer: &mut Writer, base: &mut usize) -> Result<(), LogError> {
        if writer.buffer.is_empty() {
            return Ok(());
        }
        let result = writer.segment.file.write_at(&writer.buffer, *base as u64);
        *base += writer.buffer.len();
        writer.buffer.clear();
        let path = || segment_path(&self.dir, writer.segment.sequence);
        result.map_err(|error| self.fail(LogError::io("write", &path())(error)))
    }

    /// Shows readers what was written.
    fn publish(&self, writer: &Writer, written: Written, change: impl FnOnce(&mut State, Vec<Slot>)) {
        let mut state = self.write_state();
        state.segments.extend(written.segments);
        change(&mut state, written.slots);
        let end = Position::new(writer.segment.sequence, writer.offset);
        self.written.store(end.0, Ordering::Release);
    }

    fn sync(&self, position: Position) -> Result<(), LogError> {
        let guard = lock(&self.syncing);
        self.check_poison()?;
        let durable = Position(self.durable.load(Ordering::Acquire));
        if durable >= position {
            return Ok(());
        }
        // Whatever was written before the sync begins is covered by it, so the next one may have nothing left to do.
        let (target, segments): (Position, Vec<Arc<Segment>>) = {
            let state = self.read_state();
            let dirty = state.segments.iter().filter(|segment| segment.sequence >= durable.sequence());
            (Position(self.written.load(Ordering::Acquire)), dirty.cloned().collect())
        };
        // In order: a segment must not be on disk when the one before it is not.
        for segment in segments {
            let path = || segment_path(&self.dir, segment.sequence);
            segment.file.sync_data().map_err(|error| self.fail(LogError::io("sync", &path())(error)))?;
        }
        self.durable.store(target.0, Ordering::Release);
        drop(guard);
        if !self.helper && target.sequence() > durable.sequence() {
            match self.supplied(|supply| supply.prepare(1)) {
                Err(LogError::Full { .. }) => {}
                result => result?,
            }
        }
        Ok(())
    }

    /// Gives segments back in which no entry is left.
    fn retire(&self) -> Result<(), LogError> {
        self.supplied(|supply| {
            // The oldest first, each one durably: the numbers of those that remain must have no gap.
            while let Some(segment) = self.take_unused() {
                supply.retire(segment)?;
            }
            Ok(())
        })
    }

    fn take_unused(&self) -> Option<Arc<Segment>> {
        let durable = Position(self.durable.load(Ordering::Acquire));
        let mut state = self.write_state();
        let needed = state.log.slots.front().map_or(u64::MAX, |slot| slot.at.sequence());
        let front = state.segments.front()?.sequence;
        // What is durable includes the record that lets go of these entries, and the copy of the state behind them.
        (front < needed && front < durable.sequence()).then(|| state.segments.pop_front())?
    }

    /// Reads entries of `low..high` up to `max` bytes, but at least one.
    fn read(&self, low: u64, high: u64, max: u64) -> Result<Vec<Entry>, raft::Error> {
        let mut stored = Vec::new();
        let mut entries = Vec::new();
        {
            let state = self.read_state();
            if low <= state.log.compacted.0 {
                return Err(StorageError::Compacted.into());
            }
            if high > state.log.last() + 1 {
                return Err(StorageError::Unavailable.into());
            }
            let mut bytes = 0;
            for index in low..high {
                let slot = state.log.slots[(index - state.log.first) as usize];
                bytes += u64::from(slot.length);
                if bytes > max && index > low {
                    break;
                }
                match state.cache.get(index) {
                    Some(entry) => entries.push(entry.clone()),
                    None => {
                        let first = state.segments[0].sequence;
                        let segment = &state.segments[(slot.at.sequence() - first) as usize];
                        stored.push((index, slot, segment.clone()));
                    }
                }
            }
        }
        // The cache holds the end of the log, so whatever is read from disk comes before it.
        let mut all = Vec::with_capacity(stored.len() + entries.len());
        for (index, slot, segment) in stored {
            all.push(self.load(index, slot, &segment).map_err(|error| StorageError::Other(Box::new(error)))?);
        }
        all.append(&mut entries);
        Ok(all)
    }

    fn load(&self, index: u64, slot: Slot, segment: &Segment) -> Result<Entry, LogError> {
        let offset = slot.at.offset();
        let path = || segment_path(&self.dir, segment.sequence);
        let mut bytes = vec![0; slot.length as usize];
        segment.file.read_at(&mut bytes, offset as u64).map_err(|error| LogError::io("read", &path())(error))?;
        let found = record::decode(&bytes, segment.seed, offset).map(|(record, _)| record);
        match found.map(|record| (record.kind, record.index, record.term, record.data.len() + record.context.len())) {
            Some((Kind::Entry(kind), found, term, payload)) if (found, term) == (index, slot.term) => {
                bytes.truncate(record::HEADER + payload);
                Ok(record::into_entry(bytes, kind, index, term))
            }
            _ => Err(LogError::damaged(&path(), offset as u64, &format!("entry {index} cannot be read back"))),
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

    /// Metadata only: the database itself travels on another connection (DESIGN section 7).
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
