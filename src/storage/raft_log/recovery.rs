//! Reads a log after a crash. Owns the rule for torn tails. Must never take a damaged log for a shorter one when there
//! is proof that it was longer, and never leave anything after the end of the log that could later be taken for a
//! record.
//!
//! The log is the longest run of intact records from the first segment on, up to the end of the last complete batch.
//! What follows that end is one of two things:
//! - **A torn tail**: batches that were being written when the host stopped. Before a sync, sectors and files reach the
//!   disk in any order, so intact records may well follow a broken one. Nobody was told that any of them was on disk,
//!   so all are dropped, intact or not.
//! - **Damage**: a record had been synced and is not intact any more. The proof is any intact record further on, in
//!   this segment or a later one, whose `durable` position is after the end: when it was written, everything up to
//!   there was on disk. Such a log is refused, since going on with it would lose acknowledged entries.
//!
//! The one thing that looks the same as a torn tail is damage to the last synced batches, if no intact record with a
//! later `durable` position follows. Every change of the commit index writes one, so this can only be the very last
//! batch or two.

use std::{collections::VecDeque, path::Path, sync::Arc};

use raft::eraftpb::{ConfState, HardState};

use super::{
    LogError, Owner, Recovered,
    disk::Disk,
    record::{self, Kind, Position, Record, Slot, Start, hard_state},
    segment::{FIRST, Segment, Supply, segment_path},
};

/// The state of the log that the records describe.
#[derive(Default)]
pub struct Contents {
    pub slots: VecDeque<Slot>,
    /// Index of the first slot.
    pub first: u64,
    /// Index and term up to which entries are gone.
    pub compacted: (u64, u64),
    pub hard: HardState,
    pub conf: ConfState,
    pub conf_index: u64,
}

/// One record without its payload, kept until its batch is complete.
enum Change {
    Entry(u64, Slot),
    Hard(HardState),
    Conf(u64, ConfState),
    Compact(u64, u64),
    Reset(u64, u64, ConfState),
    Start(u64, u64, Start),
}

impl Change {
    fn decode(record: &Record<'_>, at: Position, length: u32) -> Option<Self> {
        let (index, term) = (record.index, record.term);
        Some(match record.kind {
            Kind::Entry(_) => Change::Entry(index, Slot { at, length, term }),
            Kind::Hard => {
                let vote = u64::from_le_bytes(record.data.try_into().ok()?);
                Change::Hard(hard_state(term, vote, index))
            }
            Kind::Conf => Change::Conf(index, record::decode_conf(record.data)?),
            Kind::Compact => Change::Compact(index, term),
            Kind::Reset => Change::Reset(index, term, record::decode_conf(record.data)?),
            Kind::Start => Change::Start(index, term, Start::decode(record.data)?),
        })
    }
}

impl Contents {
    /// Index of the last entry.
    pub fn last(&self) -> u64 {
        if self.slots.is_empty() { self.compacted.0 } else { self.first + self.slots.len() as u64 - 1 }
    }

    /// Drops the slots up to `index`.
    pub fn drop_front(&mut self, index: u64) {
        let count = (index + 1).saturating_sub(self.first).min(self.slots.len() as u64);
        self.slots.drain(..count as usize);
        self.first += count;
    }

    /// Applies one change; `None` if it contradicts what is there: no program of this version would have written it.
    fn apply(&mut self, change: Change) -> Option<()> {
        match change {
            Change::Entry(index, slot) => {
                if index <= self.compacted.0 {
                    return None;
                }
                // Entries before the first one here may have been in a segment that is gone. Whether any are missing is
                // checked at the end.
                if self.slots.is_empty() || index < self.first {
                    self.slots.clear();
                    self.first = index;
                }
                let at = usize::try_from(index - self.first).ok().filter(|at| *at <= self.slots.len())?;
                self.slots.truncate(at);
                self.slots.push_back(slot);
            }
            Change::Hard(hard) => self.hard = hard,
            Change::Conf(index, conf) => (self.conf_index, self.conf) = (index, conf),
            Change::Compact(index, term) => {
                self.compacted = (index, term);
                self.drop_front(index);
            }
            Change::Reset(index, term, conf) => {
                self.slots.clear();
                (self.compacted, self.conf_index, self.conf) = ((index, term), index, conf);
            }
            Change::Start(index, term, start) => {
                self.compacted = (index, term);
                (self.hard, self.conf_index, self.conf) = (start.hard, start.conf_index, start.conf);
            }
        }
        Some(())
    }

    /// True if no entry is missing between the compacted index and the last one, and the commit index is between the
    /// two.
    fn is_whole(&self) -> bool {
        (self.slots.is_empty() || self.first == self.compacted.0 + 1)
            && self.hard.commit <= self.last()
            && self.hard.commit >= self.compacted.0
    }
}

/// A log as it was found.
pub struct Found {
    /// Its segments, of which the last is the one to go on with. Empty for a log that has never been used.
    pub segments: VecDeque<Arc<Segment>>,
    /// Segments that hold nothing of the log.
    pub surplus: Vec<Arc<Segment>>,
    pub log: Contents,
    /// Where to go on.
    pub end: Position,
    /// The records themselves prove that everything up to here was synced.
    pub proven: Position,
    pub recovered: Recovered,
}

struct Scan {
    log: Contents,
    batch: Vec<Change>,
    /// Where the next record is expected.
    at: Position,
    /// End of the last complete batch.
    end: Position,
    proven: Position,
}

impl Scan {
    /// Reads the records of one segment until one is not intact. Returns false if the log does not go on in this
    /// segment.
    fn segment(&mut self, segment: &Segment, bytes: &[u8], first: bool, path: &Path) -> Result<bool, LogError> {
        let mut offset = FIRST;
        while let Some((record, space)) = record::decode(&bytes[offset..], segment.seed, offset) {
            let at = Position::new(segment.sequence, offset);
            let damaged = |reason| LogError::damaged(path, at.offset() as u64, reason);
            let change = Change::decode(&record, at, space as u32)
                .ok_or_else(|| damaged("this program does not understand an intact record"))?;
            match &change {
                Change::Start(_, _, start) if offset == FIRST && !first && start.previous != self.at => {
                    return Ok(false);
                }
                Change::Start(..) if offset == FIRST => {}
                Change::Start(..) => return Err(damaged("a segment starts twice")),
                _ if offset == FIRST => return Err(damaged("a segment does not say how it starts")),
                _ => {}
            }
            self.proven = self.proven.max(record.durable);
            // Later segments repeat what the records before them say. A batch may begin in the first segment and end in
            // another, so this is decided here and not when the batch is applied.
            if first || !matches!(change, Change::Start(..)) {
                self.batch.push(change);
            }
            offset += space;
            self.at = Position::new(segment.sequence, offset);
            if record.last {
                for change in self.batch.drain(..) {
                    self.log.apply(change).ok_or_else(|| damaged("its batch contradicts the log before it"))?;
                }
                self.end = self.at;
            }
        }
        Ok(offset > FIRST)
    }
}

/// Reads a log. Changes nothing on disk.
///
/// # Errors
/// [`LogError::Damaged`] when something is missing or wrong in the middle of it, [`LogError::Newer`] or
/// [`LogError::Foreign`] when only another program or node may use it, [`LogError::Io`] when it cannot be read now.
pub fn read(disk: &dyn Disk, dir: &Path, sequences: &[u64], owner: Owner) -> Result<Found, LogError> {
    let mut all = Vec::with_capacity(sequences.len());
    for sequence in sequences {
        if all.last().is_some_and(|last: &Arc<Segment>| last.sequence + 1 != *sequence) {
            return Err(LogError::damaged(&segment_path(dir, sequence - 1), 0, "the segment is missing"));
        }
        all.push(Arc::new(Segment::open(disk, dir, *sequence, owner)?));
    }
    let start = Position::new(sequences.first().copied().unwrap_or(0), FIRST);
    let mut scan = Scan { log: Contents::default(), batch: Vec::new(), at: start, end: start, proven: Position(0) };
    let mut used = 0;
    for (number, segment) in all.iter().enumerate() {
        let path = segment_path(dir, segment.sequence);
        let bytes = segment.read_from(0).map_err(LogError::io("read", &path))?;
        if !scan.segment(segment, &bytes, number == 0, &path)? {
            break;
        }
        used = number + 1;
    }
    let dropped = check_tail(dir, &all, scan.end)?;
    if scan.end.offset() == FIRST {
        // No batch is complete. If this is the very first segment, the log was being created. A later one must have a
        // complete batch.
        if let Some(first) = all.first().filter(|first| first.sequence > 1) {
            let path = segment_path(dir, first.sequence);
            return Err(LogError::damaged(&path, FIRST as u64, "the first batch of a segment in use is not intact"));
        }
        used = 0;
    }
    let keep = if used == 0 { 0 } else { (scan.end.sequence() - sequences[0]) as usize + 1 };
    let surplus = all.split_off(keep);
    let log = scan.log;
    if keep > 0 && !log.is_whole() {
        let path = segment_path(dir, sequences[0]);
        return Err(LogError::damaged(
            &path,
            FIRST as u64,
            "entries between the compacted and the last index are missing",
        ));
    }
    let recovered = Recovered {
        created: keep == 0,
        entries: log.slots.len() as u64,
        segments: keep as u64,
        torn_bytes: dropped,
        unproven_bytes: 0,
    };
    let (end, proven) = (scan.end, scan.proven);
    Ok(Found { segments: all.into(), surplus, log, end, proven, recovered })
}

/// Looks for proof, after the end, that the log was longer: see the rule above. Returns how many bytes intact records
/// take after the end.
fn check_tail(dir: &Path, all: &[Arc<Segment>], end: Position) -> Result<u64, LogError> {
    let mut dropped = 0;
    for segment in all.iter().filter(|segment| segment.sequence >= end.sequence()) {
        let path = segment_path(dir, segment.sequence);
        let bytes = segment.read_from(0).map_err(LogError::io("read", &path))?;
        let start = if segment.sequence == end.sequence() { end.offset() } else { FIRST };
        let (mut offset, mut reach) = (start, start);
        while offset + record::HEADER <= bytes.len() {
            let Some((record, space)) = record::decode(&bytes[offset..], segment.seed, offset) else {
                offset += record::ALIGN;
                continue;
            };
            if record.durable > end {
                let path = segment_path(dir, end.sequence());
                let reason = format!(
                    "a record that was on disk is not intact any more: {} proves at offset {offset} that the log reached \
                     at least segment {} offset {}",
                    segment_path(dir, segment.sequence).display(),
                    record.durable.sequence(),
                    record.durable.offset()
                );
                return Err(LogError::damaged(&path, end.offset() as u64, &reason));
            }
            offset += space;
            reach = offset;
        }
        dropped += (reach - start) as u64;
    }
    Ok(dropped)
}

/// Makes the log on disk what was found: drops everything after its end, and syncs what is not proven to be synced.
///
/// A crash at any point in here leaves a log in which the same is found again.
///
/// # Errors
/// [`LogError::Io`] when the disk fails. Then the log must not be used.
pub fn settle(dir: &Path, found: &mut Found, supply: &mut Supply) -> Result<(), LogError> {
    // The last segment first: the numbers of those that remain must have no gap.
    while let Some(segment) = found.surplus.pop() {
        let spare = supply.begin_retiring(segment).run()?;
        supply.retired(spare);
    }
    let Some(active) = found.segments.back() else { return Ok(()) };
    let path = segment_path(dir, active.sequence);
    let failed = |verb| LogError::io(verb, &path);
    let tail = active.read_from(found.end.offset()).map_err(failed("read"))?;
    if tail.iter().any(|byte| *byte != 0) {
        active.file.write_at(&vec![0; tail.len()], found.end.offset() as u64).map_err(failed("write"))?;
    }
    for segment in found.segments.iter().filter(|segment| segment.sequence >= found.proven.sequence()) {
        let path = segment_path(dir, segment.sequence);
        let failed = |verb| LogError::io(verb, &path);
        // After a failed sync the kernel may hold a page that it believes to be on disk, though it is not. Writing the
        // same bytes again makes the kernel write the page.
        let from = if segment.sequence == found.proven.sequence() { found.proven.offset() } else { FIRST };
        let mut bytes = segment.read_from(from).map_err(failed("read"))?;
        if segment.sequence == found.end.sequence() {
            bytes.truncate(found.end.offset().saturating_sub(from));
        }
        found.recovered.unproven_bytes += bytes.len() as u64;
        segment.file.write_at(&bytes, from as u64).map_err(failed("write"))?;
        segment.file.sync_data().map_err(failed("sync"))?;
    }
    Ok(())
}
