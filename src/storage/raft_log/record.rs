//! The bytes of one record, format version 1. Pure: no files. Must never panic on any input.
//!
//! Layout (little-endian): `length u32` (of the whole record), `crc u32`, `magic u16`, `kind u8`, `flags u8 (bit 0:
//! last record of its batch)`, `data u32` (length of an entry's data; its context is the rest), `index u64`, `term
//! u64`, `durable u64`, then the payload; zeros up to a multiple of 8 bytes follow. A length of 0 means: nothing here.
//!
//! The CRC-32C covers the seed of the segment (which depends on its sequence number and a random salt), the offset, the
//! length and everything after the CRC. So a record counts only in the segment and at the place for which it was
//! written. `durable` is the position up to which the log was known to be on disk when the record was written: a valid
//! record proves that everything before that position had been synced.

use raft::eraftpb::{ConfState, Entry, EntryType, HardState};

use crate::little_endian::{find_u32, u32_at, u64_at};

/// Bytes before the payload.
pub const HEADER: usize = 40;
/// Every record starts at a multiple of this.
pub const ALIGN: usize = 8;
const MAGIC: u16 = 0x7452;
const FLAG_LAST: u8 = 1;

/// Where an entry is. There is one in memory for each entry.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    pub at: Position,
    pub term: u64,
    /// Bytes that it takes, with padding.
    pub length: u32,
}

/// A place in the log: the sequence number of a segment, and an offset in bytes. Positions are ordered as the log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position(pub u64);

impl Position {
    /// The place `offset` bytes into segment `sequence`.
    pub fn new(sequence: u64, offset: usize) -> Self {
        debug_assert!(offset <= u32::MAX as usize && sequence <= u64::from(u32::MAX));
        Self(sequence << 32 | offset as u64)
    }

    pub fn sequence(self) -> u64 {
        self.0 >> 32
    }

    pub fn offset(self) -> usize {
        (self.0 & u64::from(u32::MAX)) as usize
    }
}

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A raft entry. It replaces every entry from its index on.
    Entry(EntryType),
    /// Term, vote and commit index.
    Hard,
    /// The configuration as of an applied index.
    Conf,
    /// Entries up to `index` are no longer needed.
    Compact,
    /// The log restarts, empty, after `index`: a snapshot replaces everything before.
    Reset,
    /// The first record of a segment: where the log ended in the segment before, and the state at that time.
    Start,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Kind::Entry(EntryType::EntryNormal) => 1,
            Kind::Entry(EntryType::EntryConfChange) => 2,
            Kind::Entry(EntryType::EntryConfChangeV2) => 3,
            Kind::Hard => 16,
            Kind::Conf => 17,
            Kind::Compact => 18,
            Kind::Reset => 19,
            Kind::Start => 20,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Kind::Entry(EntryType::EntryNormal),
            2 => Kind::Entry(EntryType::EntryConfChange),
            3 => Kind::Entry(EntryType::EntryConfChangeV2),
            16 => Kind::Hard,
            17 => Kind::Conf,
            18 => Kind::Compact,
            19 => Kind::Reset,
            20 => Kind::Start,
            _ => return None,
        })
    }
}

/// One record. The payload is borrowed.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    pub kind: Kind,
    /// True for the last record of a batch: a batch counts as a whole or not at all.
    pub last: bool,
    pub index: u64,
    pub term: u64,
    pub durable: Position,
    pub data: &'a [u8],
    /// The context of an entry; empty for other kinds.
    pub context: &'a [u8],
}

/// The bytes that a record with a payload of this length takes, padding included.
pub fn space(payload: usize) -> usize {
    (HEADER + payload).next_multiple_of(ALIGN)
}

impl Record<'_> {
    /// Appends the record to `out`, encoded for this `offset` of the segment with this `seed`.
    pub fn encode(&self, seed: u32, offset: usize, out: &mut Vec<u8>) {
        let start = out.len();
        let length = HEADER + self.data.len() + self.context.len();
        out.extend_from_slice(&(length as u32).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&[self.kind.code(), u8::from(self.last) * FLAG_LAST]);
        out.extend_from_slice(&(self.data.len() as u32).to_le_bytes());
        for word in [self.index, self.term, self.durable.0] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(self.data);
        out.extend_from_slice(self.context);
        let crc = checksum(seed, offset, &out[start..]);
        out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
        out.resize(start + length.next_multiple_of(ALIGN), 0);
    }
}

fn checksum(seed: u32, offset: usize, record: &[u8]) -> u32 {
    let mut place = [0; 8];
    place[..4].copy_from_slice(&(offset as u32).to_le_bytes());
    place[4..].copy_from_slice(&record[..4]);
    crc32c::crc32c_append(crc32c::crc32c_append(seed, &place), &record[8..])
}

/// Decodes the record at the beginning of `bytes`, which are at `offset` of the segment with this `seed`. Returns it
/// with the bytes that it takes; `None` unless it is intact.
pub fn decode(bytes: &[u8], seed: u32, offset: usize) -> Option<(Record<'_>, usize)> {
    if bytes.len() < HEADER || bytes[8..10] != MAGIC.to_le_bytes() {
        return None;
    }
    let length = u32_at(bytes, 0) as usize;
    let data = u32_at(bytes, 12) as usize;
    if length < HEADER || length > bytes.len() || data > length - HEADER || bytes[11] & !FLAG_LAST != 0 {
        return None;
    }
    let kind = Kind::from_code(bytes[10])?;
    if checksum(seed, offset, &bytes[..length]) != u32_at(bytes, 4) {
        return None;
    }
    let (data, context) = bytes[HEADER..length].split_at(data);
    let record = Record {
        kind,
        last: bytes[11] & FLAG_LAST != 0,
        index: u64_at(bytes, 16),
        term: u64_at(bytes, 24),
        durable: Position(u64_at(bytes, 32)),
        data,
        context,
    };
    Some((record, length.next_multiple_of(ALIGN)))
}

/// Turns the bytes of an entry's record into the entry without copying them. The record must have been found intact.
pub(super) fn into_entry(mut bytes: Vec<u8>, kind: EntryType, index: u64, term: u64) -> Entry {
    let data = HEADER + u32_at(&bytes, 12) as usize;
    bytes.truncate(u32_at(&bytes, 0) as usize);
    let mut entry = Entry { entry_type: kind, index, term, ..Entry::default() };
    entry.data = bytes.into();
    entry.context = entry.data.slice(data..);
    entry.data = entry.data.slice(HEADER..data);
    entry
}

/// A configuration as a payload: four lists (count `u32`, ids `u64`) and `auto_leave u8`.
pub fn encode_conf(conf: &ConfState, out: &mut Vec<u8>) {
    for list in [&conf.voters, &conf.learners, &conf.voters_outgoing, &conf.learners_next] {
        out.extend_from_slice(&(list.len() as u32).to_le_bytes());
        list.iter().for_each(|id| out.extend_from_slice(&id.to_le_bytes()));
    }
    out.push(u8::from(conf.auto_leave));
}

/// The inverse of [`encode_conf`]; `None` for anything that it would not have written.
pub fn decode_conf(mut bytes: &[u8]) -> Option<ConfState> {
    let mut list = || {
        let count = find_u32(bytes, 0)? as usize;
        let (ids, rest) = bytes[4..].split_at_checked(8 * count)?;
        bytes = rest;
        Some(ids.chunks_exact(8).map(|id| u64_at(id, 0)).collect())
    };
    let mut conf = ConfState { voters: list()?, learners: list()?, ..ConfState::default() };
    (conf.voters_outgoing, conf.learners_next) = (list()?, list()?);
    conf.auto_leave = *bytes.first()? != 0;
    (bytes.len() == 1).then_some(conf)
}

/// The state that a segment starts with; see [`Kind::Start`].
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    /// Where the log ended in the segment before; 0 in the first segment of a log.
    pub previous: Position,
    pub hard: HardState,
    pub conf_index: u64,
    pub conf: ConfState,
}

impl Start {
    /// Payload: `previous u64`, `term u64`, `vote u64`, `commit u64`, `conf_index u64`, configuration.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        for word in [self.previous.0, self.hard.term, self.hard.vote, self.hard.commit, self.conf_index] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        encode_conf(&self.conf, &mut out);
        out
    }

    /// The inverse of [`Start::encode`].
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, conf) = bytes.split_at_checked(40)?;
        let hard = hard_state(u64_at(words, 8), u64_at(words, 16), u64_at(words, 24));
        let (previous, conf_index) = (Position(u64_at(words, 0)), u64_at(words, 32));
        Some(Self { previous, hard, conf_index, conf: decode_conf(conf)? })
    }
}

/// A hard state with these values.
pub(super) fn hard_state(term: u64, vote: u64, commit: u64) -> HardState {
    HardState { term, vote, commit, ..HardState::default() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Vec<u8> {
        let kind = Kind::Entry(EntryType::EntryConfChangeV2);
        let durable = Position::new(3, 4096);
        let record = Record { kind, last: true, index: 5, term: 2, durable, data: b"data!", context: b"context" };
        let mut out = Vec::new();
        record.encode(77, 4096, &mut out);
        out
    }

    #[test]
    fn a_record_survives_the_round_trip_only_in_its_place() {
        let bytes = sample();
        assert_eq!(bytes.len(), space(12));
        let (record, length) = decode(&bytes, 77, 4096).unwrap();
        assert_eq!((record.data, record.context, length), (&b"data!"[..], &b"context"[..], bytes.len()));
        assert_eq!((record.index, record.term, record.durable, record.last), (5, 2, Position::new(3, 4096), true));
        assert!(decode(&bytes, 78, 4096).is_none());
        assert!(decode(&bytes, 77, 4104).is_none());
        assert!(decode(&[0; 64], 77, 4096).is_none());
        let entry = into_entry(bytes, EntryType::EntryConfChangeV2, 5, 2);
        assert_eq!((&entry.data[..], &entry.context[..]), (&b"data!"[..], &b"context"[..]));
    }

    #[test]
    fn a_start_survives_the_round_trip() {
        let mut conf = ConfState { voters: vec![1, 2, 3], learners: vec![4], ..ConfState::default() };
        (conf.voters_outgoing, conf.auto_leave) = (vec![1], true);
        let start = Start { previous: Position::new(1, 5000), hard: hard_state(3, 2, 9), conf_index: 4, conf };
        let bytes = start.encode();
        assert_eq!(Start::decode(&bytes), Some(start));
        for end in 0..bytes.len() {
            assert_eq!(Start::decode(&bytes[..end]), None);
        }
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = (decode(&bytes, 1, 0), Start::decode(&bytes), decode_conf(&bytes));
        }

        #[test]
        fn every_flipped_bit_is_found(at in 0usize..52, bit in 0u8..8) {
            let mut bytes = sample();
            bytes[at] ^= 1 << bit;
            prop_assert!(decode(&bytes, 77, 4096).is_none());
        }
    }
}
