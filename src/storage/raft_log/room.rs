//! Whether the log could take more: asked before raft sees an entry, since what raft has accepted must be written.
//!
//! Must never promise room that the next append does not find: segments count when they exist, not when the disk has
//! space.

use std::sync::atomic::Ordering;

use crate::mutex::locked;

use super::{
    RaftLog,
    engine::{AHEAD, RESERVE},
    record::space,
    segment::FIRST,
};

/// Left free in every segment for votes and epochs: some hundreds of them. A node whose disk is full still takes part
/// in elections.
const VOTES: usize = 64 << 10;
/// More than the copy of the state at the head of a segment takes.
const HEAD: usize = 1024;

impl RaftLog {
    /// True if entries with payloads of these lengths can be appended. May make a segment, as the append itself would:
    /// whoever must not wait for the disk lets another thread ask first, or uses [`Self::has_room_now`].
    pub fn has_room(&self, payloads: impl IntoIterator<Item = usize>) -> bool {
        let shared = &self.core.shared;
        let count = self.segments_for(payloads);
        if count <= locked(&shared.supply).ready() {
            return true;
        }
        // An error of another kind shows at the append, which knows what to do with it.
        !self.is_full() && (shared.prepare(count).is_ok() || !self.is_full())
    }

    /// As [`Self::has_room`], but never waits: also false while the helper still makes the segments that are needed.
    pub fn has_room_now(&self, payloads: impl IntoIterator<Item = usize>) -> bool {
        if self.core.helper.is_none() {
            return self.has_room(payloads);
        }
        let fits = self.segments_for(payloads) <= locked(&self.core.shared.supply).ready();
        if !fits && !self.is_full() {
            self.retry();
        }
        fits
    }

    /// How many segments beyond the present one these payloads need.
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

    /// True if a segment can be made with so many free bytes: of a spare file, or of a new one.
    pub fn can_prepare(&self, free: u64) -> bool {
        let supply = locked(&self.core.shared.supply);
        supply.has_spare() || free >= supply.segment_size() as u64
    }

    /// Tries again to make segments, without waiting for it where the log has a helper.
    pub fn retry(&self) {
        match &self.core.helper {
            Some((work, _)) => {
                // One message waiting is enough: the helper looks for itself what there is to do.
                let _ = work.try_send(());
            }
            None => {
                // What it found is in `is_full`; anything worse poisons the log.
                let _ = self.core.shared.prepare(AHEAD);
            }
        }
    }
}
