//! The last transaction of a WAL, as long as nobody knows whether SQLite knows of it: its writer may be killed behind
//! the write that commits, and before it has said so in the memory that the application's processes share. Those that
//! live go on as if it had never been. This remembers what is needed to take it back. Pure.

use std::collections::BTreeSet;

use super::Pages;
use crate::storage::checksum::{PageTable, Preview};

/// A page as it was before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Old {
    pub number: u32,
    pub checksum: u64,
    /// The file does not have this content.
    behind: bool,
}

/// What was before the last transaction.
#[derive(Clone, Debug)]
pub(super) struct Doubt {
    /// Frames of the WAL.
    pub frames: u32,
    /// Size of the database, in pages.
    pub pages: u32,
    /// Checksum of the database.
    pub checksum: u64,
    /// The pages that it has changed or cut off, in ascending order.
    pub before: Vec<Old>,
}

impl Doubt {
    /// Remembers what a transaction will change: the pages `numbers`, in ascending order, of a database that has
    /// `pages` then.
    pub fn new(
        table: &PageTable,
        behind: &BTreeSet<u32>,
        (numbers, pages): (impl Iterator<Item = u32>, u32),
        frames: u32,
    ) -> Self {
        let cut = pages.saturating_add(1)..=table.pages();
        let old = |number| table.get(number).map(|checksum| Old { number, checksum, behind: behind.contains(&number) });
        let before = numbers.chain(cut).filter_map(old).collect();
        Self { frames, pages: table.pages(), checksum: table.checksum(), before }
    }

    /// A page was written to the database.
    fn written(&mut self, number: u32, checksum: u64) {
        if let Ok(at) = self.before.binary_search_by_key(&number, |old| old.number) {
            self.before[at].behind = self.before[at].checksum != checksum;
        }
    }
}

impl Pages {
    /// A page was written to the database.
    pub(super) fn written(&mut self, number: u32, checksum: u64) {
        if let Some(doubt) = &mut self.doubt {
            doubt.written(number, checksum);
        }
    }

    /// True if the file is the database as it was before the last transaction.
    pub(super) fn is_before_copied(&self) -> bool {
        let Some(doubt) = &self.doubt else { return false };
        let changed = |number: &u32| doubt.before.binary_search_by_key(number, |old| old.number).is_ok();
        let others = self.behind.iter().filter(|number| **number <= doubt.pages && !changed(number));
        others.count() == 0 && !doubt.before.iter().any(|old| old.behind)
    }

    /// The last transaction is taken back.
    pub(super) fn take_back(&mut self, preview: Preview, index: u64) {
        self.accept(preview, index, true);
        for old in self.doubt.take().into_iter().flat_map(|doubt| doubt.before) {
            match old.behind {
                true => self.behind.insert(old.number),
                false => self.behind.remove(&old.number),
            };
        }
        self.note_rest();
    }
}
