//! Writes, syncs, reads and shortens the log: the part of [`super::RaftLog`] that several threads share.
//!
//! Must never write anywhere but at the end of the log, never report a position as synced unless everything up to it
//! is, and never hold a lock during a sync that appending or reading needs.

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use raft::{
    StorageError,
    eraftpb::{Entry, HardState},
};

use crate::{mutex::locked, storage::pacer};

use super::{
    LogError, Recovered,
    record::{self, Kind, Position, Record, Slot, Start, space},
    recovery::Contents,
    segment::{FIRST, Segment, Supply, segment_path},
};

/// Bytes kept free in every segment for compaction alone, so that space can still be freed when the disk is full.
pub const RESERVE: usize = 512;
/// Segments that are kept ready: enough for the writer while a slow disk makes the next one.
pub const AHEAD: usize = 2;
/// Records are collected up to this many bytes before they are written.
const WRITE: usize = 1 << 20;

/// The last entries appended, without a gap, up to a number of bytes.
pub struct Cache {
    pub entries: VecDeque<Entry>,
    pub bytes: usize,
    pub limit: usize,
}

impl Cache {
    fn weight(entry: &Entry) -> usize {
        entry.data.len() + entry.context.len() + size_of::<Entry>()
    }

    pub fn push(&mut self, entry: &Entry) {
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

    pub fn drop_front(&mut self, index: u64) {
        while self.entries.front().is_some_and(|first| first.index <= index) {
            self.pop_front();
        }
    }

    pub fn get(&self, index: u64) -> Option<&Entry> {
        let first = self.entries.front()?.index;
        self.entries.get(usize::try_from(index.checked_sub(first)?).ok()?)
    }
}

/// What readers see.
pub struct State {
    /// In ascending order without a gap. The last one is being written.
    pub segments: VecDeque<Arc<Segment>>,
    pub log: Contents,
    pub cache: Cache,
}

/// The end of the log.
pub struct Writer {
    pub segment: Arc<Segment>,
    pub offset: usize,
    pub buffer: Vec<u8>,
}

/// Where a batch is on disk.
#[derive(Default)]
pub struct Written {
    pub slots: Vec<Slot>,
    pub segments: Vec<Arc<Segment>>,
}

/// What the log's threads share. Locks are taken in the order writer, supply, state. `syncing` is taken alone or before
/// state, `retiring` before supply and state.
pub struct Shared {
    pub dir: PathBuf,
    pub helper: bool,
    pub recovered: Recovered,
    pub writer: Mutex<Writer>,
    pub state: RwLock<State>,
    /// Size of every segment to come, in bytes.
    pub segment_size: usize,
    /// Appending waits for this lock: it must not be held while a file is filled.
    pub supply: Mutex<Supply>,
    /// Signalled when a segment for the supply is ready, or could not be made.
    pub made: Condvar,
    pub supply_bytes: AtomicU64,
    pub syncing: Mutex<()>,
    /// Held while a segment leaves the log.
    pub retiring: Mutex<()>,
    /// Ends of what has been written and of what has been synced: [`Position`]s.
    pub written: AtomicU64,
    pub durable: AtomicU64,
    /// Somebody waits for the segment that is being made.
    pub hurry: Arc<AtomicBool>,
    /// Segments were taken: there is work for the helper.
    pub wanted: AtomicBool,
    /// The last attempt to make a segment found no space.
    pub full: AtomicBool,
    pub poison: OnceLock<String>,
}

/// A record without a context, not placed yet.
pub fn plain(kind: Kind, index: u64, term: u64, data: &[u8]) -> Record<'_> {
    Record { kind, last: false, index, term, durable: Position(0), data, context: &[] }
}

impl Shared {
    pub fn read_state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn write_state(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_poison(&self) -> Result<(), LogError> {
        self.poison.get().map_or(Ok(()), |reason| Err(LogError::Poisoned(reason.clone())))
    }

    /// Passes an error on. Poisons the log, unless the error says that nothing was written.
    fn fail(&self, error: LogError) -> LogError {
        if !matches!(error, LogError::Full { .. } | LogError::Refused(_) | LogError::Poisoned(_)) {
            let _ = self.poison.set(error.to_string());
        }
        error
    }

    /// Runs `work` on the supply of segments.
    pub fn supplied<T>(&self, work: impl FnOnce(&mut Supply) -> Result<T, LogError>) -> Result<T, LogError> {
        let mut supply = locked(&self.supply);
        let result = work(&mut supply).map_err(|error| self.fail(error));
        self.supply_bytes.store(supply.size_bytes(), Ordering::Relaxed);
        result
    }

    /// Makes sure that `count` segments are ready, for somebody who waits. Of several callers one does the work, and
    /// each goes on when there are enough.
    ///
    /// # Errors
    /// [`LogError::Full`] changes nothing: try again. Any other error poisons the log.
    pub fn prepare(&self, count: usize) -> Result<(), LogError> {
        self.make(count, true)
    }

    /// As [`Self::prepare`], before anybody needs them.
    pub fn prepare_ahead(&self) -> Result<(), LogError> {
        self.make(AHEAD, false)
    }

    fn make(&self, count: usize, urgent: bool) -> Result<(), LogError> {
        loop {
            self.check_poison()?;
            let mut supply = locked(&self.supply);
            if supply.ready() >= count {
                return Ok(());
            }
            let Some(job) = supply.begin() else {
                if urgent {
                    self.hurry.store(true, Ordering::Relaxed);
                }
                drop(self.made.wait(supply).unwrap_or_else(PoisonError::into_inner));
                continue;
            };
            self.hurry.store(urgent || supply.ready() == 0, Ordering::Relaxed);
            drop(supply);
            let made = job.run(&self.hurry);
            let result = self.supplied(|supply| supply.finish(made));
            self.full.store(matches!(result, Err(LogError::Full { .. })), Ordering::Relaxed);
            self.made.notify_all();
            result?;
        }
    }

    /// Refuses what raft must never ask for, before it is on disk.
    pub fn check_append(
        &self,
        entries: &[Entry],
        hard: Option<&HardState>,
        before: &HardState,
    ) -> Result<(), LogError> {
        self.check_poison()?;
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
    pub fn write(
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
        // Segments are made ready before anything is written, so that a full disk leaves no part of a batch.
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
        // One huge batch must not keep its memory for ever.
        writer.buffer.shrink_to(2 * WRITE);
        Ok(written)
    }

    /// Takes the segments that the batch needs in addition to the present one.
    fn plan(
        &self,
        writer: &Writer,
        records: &[Record<'_>],
        head: usize,
        reserve: usize,
    ) -> Result<VecDeque<Arc<Segment>>, LogError> {
        let (mut offset, mut size, mut count) = (writer.offset, writer.segment.size, 0);
        for record in records {
            let length = space(record.data.len() + record.context.len());
            if offset + length + reserve > size {
                size = self.segment_size;
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
        // As a rule the helper has made them already. Nobody else takes segments meanwhile: the caller holds the
        // writer.
        self.prepare(count)?;
        self.supplied(|supply| {
            self.wanted.store(true, Ordering::Relaxed);
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

    /// Shows what was written to readers.
    pub fn publish(&self, writer: &Writer, written: Written, change: impl FnOnce(&mut State, Vec<Slot>)) {
        let mut state = self.write_state();
        state.segments.extend(written.segments);
        change(&mut state, written.slots);
        let end = Position::new(writer.segment.sequence, writer.offset);
        self.written.store(end.0, Ordering::Release);
    }

    pub fn sync(&self, position: Position) -> Result<(), LogError> {
        let guard = locked(&self.syncing);
        self.check_poison()?;
        let durable = Position(self.durable.load(Ordering::Acquire));
        if durable >= position {
            return Ok(());
        }
        // The sync covers whatever was written before it begins, so the next one may have nothing left to do.
        let (target, segments): (Position, Vec<Arc<Segment>>) = {
            let state = self.read_state();
            let dirty = state.segments.iter().filter(|segment| segment.sequence >= durable.sequence());
            (Position(self.written.load(Ordering::Acquire)), dirty.cloned().collect())
        };
        // In order: a segment must not be on disk while the one before it is not.
        for segment in segments {
            let path = || segment_path(&self.dir, segment.sequence);
            let begun = Instant::now();
            segment.file.sync_data().map_err(|error| self.fail(LogError::io("sync", &path())(error)))?;
            pacer::log_synced(begun.elapsed());
        }
        self.durable.store(target.0, Ordering::Release);
        drop(guard);
        if !self.helper && target.sequence() > durable.sequence() {
            match self.prepare_ahead() {
                Err(LogError::Full { .. }) => {}
                result => result?,
            }
        }
        Ok(())
    }

    /// Gives back the segments in which no entry is left.
    pub fn retire(&self) -> Result<(), LogError> {
        // The oldest first, and each durably before the next.
        let _one = locked(&self.retiring);
        while let Some(segment) = self.take_unused() {
            // Outside the lock: appending waits for the supply, and must not wait for the disk.
            let retiring = self.supplied(|supply| Ok(supply.begin_retiring(segment)))?;
            let spare = retiring.run().map_err(|error| self.fail(error))?;
            self.supplied(|supply| {
                supply.retired(spare);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn take_unused(&self) -> Option<Arc<Segment>> {
        let durable = Position(self.durable.load(Ordering::Acquire));
        let mut state = self.write_state();
        let needed = state.log.slots.front().map_or(u64::MAX, |slot| slot.at.sequence());
        let front = state.segments.front()?.sequence;
        // What is durable includes the record that dropped these entries, and the copy of the state that follows them.
        (front < needed && front < durable.sequence()).then(|| state.segments.pop_front())?
    }

    /// Reads entries of `low..high`: up to `max` bytes, but at least one entry.
    pub fn read(&self, low: u64, high: u64, max: u64) -> Result<Vec<Entry>, raft::Error> {
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
        // The cache holds the end of the log, so what is read from disk comes before it.
        let mut all = Vec::with_capacity(stored.len() + entries.len());
        for (index, slot, segment) in stored {
            all.push(self.load(index, slot, &segment).map_err(|error| StorageError::Other(Box::new(error)))?);
        }
        all.append(&mut entries);
        Ok(all)
    }

    /// Reads one entry back.
    ///
    /// # Errors
    /// [`LogError::Io`] when the segment cannot be read, [`LogError::Damaged`] when the entry is not where it was
    /// written.
    pub fn load(&self, index: u64, slot: Slot, segment: &Segment) -> Result<Entry, LogError> {
        let offset = slot.at.offset();
        let path = || segment_path(&self.dir, segment.sequence);
        let mut bytes = vec![0; slot.length as usize];
        segment.file.read_at(&mut bytes, offset as u64).map_err(|error| LogError::io("read", &path())(error))?;
        let found = record::decode(&bytes, segment.seed, offset).map(|(record, _)| record);
        match found.map(|record| (record.kind, record.index, record.term)) {
            Some((Kind::Entry(kind), found, term)) if (found, term) == (index, slot.term) => {
                Ok(record::into_entry(bytes, kind, index, term))
            }
            _ => Err(LogError::damaged(&path(), offset as u64, &format!("entry {index} cannot be read back"))),
        }
    }
}
