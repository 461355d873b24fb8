//! Whether the log has room for more. It is asked before raft sees an entry, because what raft has accepted must be
//! written.
//!
//! Must never promise room that the next append does not find: only segments that exist count, not free space on the
//! disk.

use std::sync::atomic::Ordering;

use crate::mutex::locked;

use super::{RaftLog, engine::RESERVE, record::space, segment::FIRST};

/// Bytes left free in every segment for hundreds of votes and epochs, so that a node whose disk is full still takes
/// part in elections.
const VOTES: usize = 64 << 10;
/// More bytes than the copy of the state at the head of a segment takes.
const HEAD: usize = 1024;

impl RaftLog {
    /// True if entries with payloads of these lengths can be appended. May make a segment, as the append itself would.
    /// Whoever must not wait for the disk has another thread ask first, or uses [`Self::has_room_now`].
    pub fn has_room(&self, payloads: impl IntoIterator<Item = usize>) -> bool {
        let shared = &self.core.shared;
        let count = self.segments_for(payloads);
        if count <= locked(&shared.supply).ready() {
            return true;
        }
        // Any other error shows up at the append, which handles it.
        !self.is_full() && (shared.prepare(count).is_ok() || !self.is_full())
    }

    /// As [`Self::has_room`], but never waits: it is also false while the helper is still making the needed segments.
    pub fn has_room_now(&self, payloads: impl IntoIterator<Item = usize>) -> bool {
        if self.core.helper.is_none() {
            return self.has_room(payloads);
        }
        let fits = self.segments_for(payloads) <= locked(&self.core.shared.supply).ready();
        if !fits && !self.is_full() {
            self.core.shared.hurry.store(true, Ordering::Relaxed);
            self.retry();
        }
        fits
    }

    /// How many segments these payloads need in addition to the present one.
    fn segments_for(&self, payloads: impl IntoIterator<Item = usize>) -> usize {
        let shared = &self.core.shared;
        let reserve = RESERVE + VOTES.min(shared.segment_size / 16);
        let (mut offset, mut size) = {
            let writer = locked(&shared.writer);
            (writer.offset, writer.segment.size)
        };
        let mut count = 0;
        for payload in payloads {
            let length = space(payload);
            if offset + length + reserve > size {
                (offset, size, count) = (FIRST + HEAD, shared.segment_size, count + 1);
            }
            offset += length;
        }
        count
    }

    /// True if the last attempt to make a segment found no space.
    pub fn is_full(&self) -> bool {
        self.core.shared.full.load(Ordering::Relaxed)
    }

    /// True if a segment can be made with this many free bytes: from a spare file, or as a new one.
    pub fn can_prepare(&self, free: u64) -> bool {
        let supply = locked(&self.core.shared.supply);
        supply.has_spare() || free >= supply.segment_size() as u64
    }

    /// Tries again to make segments. Does not wait if the log has a helper.
    pub fn retry(&self) {
        match &self.core.helper {
            Some((work, _)) => {
                // One waiting message is enough: the helper finds out what there is to do.
                let _ = work.try_send(());
            }
            None => {
                // `is_full` has the result; anything worse poisons the log.
                let _ = self.core.shared.prepare_ahead();
            }
        }
    }
}
