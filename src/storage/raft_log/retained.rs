//! Entries that stay readable after the log has replaced them, for whoever wants to keep a dropped tail elsewhere.
//!
//! Must never be held for long: the files with the entries cannot be reused meanwhile.

use std::{io, sync::Arc};

use raft::eraftpb::Entry;

use super::{
    RaftLog,
    record::{Slot, space},
    segment::Segment,
};

/// A run of consecutive entries at the end of the log, as it was when this was made. The log is only ever written at
/// its end, so replacing entries leaves their bytes where they are, and a file that somebody holds is not reused. So
/// nothing has to be copied in time.
pub struct RetainedTail {
    log: RaftLog,
    first: u64,
    entries: Vec<(Slot, Arc<Segment>)>,
}

impl RetainedTail {
    /// Index of the first entry.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Index of the last entry.
    pub fn last(&self) -> u64 {
        self.first + self.entries.len() as u64 - 1
    }

    /// Epoch of the last entry.
    pub fn last_term(&self) -> u64 {
        self.entries.last().map_or(0, |(slot, _)| slot.term)
    }

    /// Bytes that the entries take on disk.
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|(slot, _)| u64::from(slot.length)).sum()
    }

    /// True if at least one entry has content: the first one of a new primary has none.
    pub fn has_content(&self) -> bool {
        self.entries.iter().any(|(slot, _)| slot.length as usize > space(0))
    }

    /// Calls `each` with one entry after the other.
    ///
    /// # Errors
    /// When an entry cannot be read. An error of `each` ends the reading.
    pub fn for_each(&self, each: &mut dyn FnMut(Entry) -> io::Result<()>) -> io::Result<()> {
        for (index, (slot, segment)) in (self.first..).zip(&self.entries) {
            each(self.log.core.shared.load(index, *slot, segment).map_err(io::Error::other)?)?;
        }
        Ok(())
    }
}

impl RaftLog {
    /// Holds all entries from `first` on; `None` if there are none, or the first of them is gone.
    pub fn hold(&self, first: u64) -> Option<RetainedTail> {
        let state = self.core.shared.read_state();
        let skip = usize::try_from(first.checked_sub(state.log.first)?).ok()?;
        let oldest = state.segments.front()?.sequence;
        let entries: Vec<_> = state
            .log
            .slots
            .iter()
            .skip(skip)
            .map(|slot| (*slot, state.segments[(slot.at.sequence() - oldest) as usize].clone()))
            .collect();
        let log = self.clone();
        (!entries.is_empty()).then_some(RetainedTail { log, first, entries })
    }
}
