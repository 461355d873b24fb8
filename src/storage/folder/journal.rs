//! The rollback journal of a database, as far as it says when a transaction begins and ends
//! (<https://www.sqlite.org/fileformat2.html#the_rollback_journal>). Pure.
//!
//! A transaction begins with the first write to its journal, and ends, with whatever it has written to the database by
//! then, when the journal counts for nothing any more: it is removed (DELETE), cut to nothing (TRUNCATE), or the
//! beginning of its header is zeros (PERSIST). SQLite ends it in the same way after a rollback, when it has written the
//! old pages back; then nothing has changed.
//!
//! A header that is not synced yet begins with zeros as well, but only the first 12 bytes: behind them are the size of
//! a sector and of a page, which are never zero. Nobody would play such a journal back, and so nothing is written to
//! the database while it is like that. Who does so keeps no journal here, though a process that was killed has left
//! one.

/// How a journal begins that whoever finds it plays back.
const MAGIC: [u8; 8] = [0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7];
/// Bytes of zeros that make a header invalid.
const ZEROED: usize = 28;

/// What a change of the journal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Nothing that concerns the database.
    Nothing,
    /// A transaction begins.
    Begin,
    /// The transaction ends with this.
    End,
}

/// Whether a transaction is under way.
#[derive(Debug, Default)]
pub(super) struct Journal {
    live: bool,
    hot: bool,
}

impl Journal {
    /// True from the first write to the journal to the end of the transaction.
    pub fn is_live(&self) -> bool {
        self.live
    }

    /// True while whoever finds the journal would play it back.
    pub fn is_hot(&self) -> bool {
        self.hot
    }

    /// Takes note of a write that was made, inside of the transaction.
    pub fn written(&mut self, offset: u64, bytes: &[u8]) {
        if offset == 0 && self.live {
            self.hot = bytes.starts_with(&MAGIC);
        }
    }

    /// What a write would mean.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Meaning {
        let zeroes = offset == 0 && bytes.len() >= ZEROED && bytes[..ZEROED].iter().all(|byte| *byte == 0);
        match (self.live, zeroes) {
            (true, true) => Meaning::End,
            (false, false) => Meaning::Begin,
            _ => Meaning::Nothing,
        }
    }

    /// What a change of its size would mean.
    pub fn resize(&self, size: u64) -> Meaning {
        if size == 0 { self.remove() } else { Meaning::Nothing }
    }

    /// What its removal would mean.
    pub fn remove(&self) -> Meaning {
        if self.live { Meaning::End } else { Meaning::Nothing }
    }

    /// A transaction has begun.
    pub fn begin(&mut self) {
        self.live = true;
    }

    /// The transaction has ended.
    pub fn end(&mut self) {
        (self.live, self.hot) = (false, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_ends_in_three_ways_and_begins_in_one() {
        let mut journal = Journal::default();
        let mut unsynced = [7; 512];
        unsynced[..12].fill(0);
        let ends: [fn(&Journal) -> Meaning; 4] = [
            Journal::remove,
            |journal| journal.resize(0),
            |journal| journal.write(0, &[0; 28]),
            |journal| journal.write(0, &[0; 512]),
        ];
        for end in ends {
            assert_eq!(end(&journal), Meaning::Nothing, "none is under way");
            assert_eq!(journal.write(0, &unsynced), Meaning::Begin);
            journal.begin();
            assert_eq!(journal.write(512, &[0; 512]), Meaning::Nothing);
            assert_eq!(journal.write(0, &[0; 12]), Meaning::Nothing);
            assert_eq!(journal.write(0, &unsynced), Meaning::Nothing);
            journal.written(0, &unsynced);
            assert!(!journal.is_hot());
            journal.written(0, &[&MAGIC[..], &[0, 0, 0, 1]].concat());
            journal.written(512, &unsynced);
            assert!(journal.is_hot());
            assert_eq!(journal.resize(512), Meaning::Nothing);
            assert_eq!(end(&journal), Meaning::End);
            journal.end();
            assert!(!journal.is_hot());
        }
    }
}
