//! The payload of one raft log entry, format version 1.
//!
//! A transaction is one or more *parts* with one transaction id, in order; other kinds of entries may stand between
//! them. Only the last part carries a [`Commit`], and makes the transaction take effect. A part whose number is 0
//! starts a transaction and drops an unfinished one. A new epoch drops an unfinished one, too.
//!
//! Layout (all integers little-endian): `version u8 = 1`, `kind u8 = 1 (pages)`, `flags u8 (bit 0: commit, bit 1:
//! compressed)`, `0 u8`, `database u32`, `transaction u64`, `part u32`, `page_size u32`, `count u32`, then if
//! committing `database pages u32, checksum u64`, then `count` page numbers `u32` in ascending order, then `count` page
//! images of `page_size` bytes, all of them together as one LZ4 block if compressed. Pages are mostly half empty:
//! compressing them takes less time than it saves on the link and on the disk. Must never panic on any input: these
//! bytes come from other hosts and from disk.

use std::borrow::Cow;

use thiserror::Error;

use crate::{
    cluster::level::FORMAT_VERSION,
    little_endian::{find_u32, find_u64, u32_at},
};

/// Largest part, in bytes, encoded without compression: room for 16 pages of 64 KiB and their headers.
pub const MAX_PART: usize = (1 << 20) + 4096;
/// The Console's database. Another one needs a feature level above today's ([`crate::cluster::level`]).
pub const CONSOLE_DATABASE: u32 = 1;

const KIND_PAGES: u8 = 1;
const FLAG_COMMIT: u8 = 1;
const FLAG_COMPRESSED: u8 = 2;
const HEADER: usize = 28;
const COMMIT: usize = 12;

/// Why bytes are not a command. Nothing was applied.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum TransactionError {
    #[error("command format version {0} is not known to this program (it knows {FORMAT_VERSION}): upgrade this node")]
    Version(u8),
    #[error("malformed command: {0}")]
    Malformed(&'static str),
}

/// The end of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Size of the database after the transaction, in pages.
    pub database_pages: u32,
    /// XOR of the checksums of all pages after the transaction (`docs/design.md`, "Integrity").
    pub checksum: u64,
}

/// One part of a transaction: page images, last-writer-wins, ascending by page number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pages<'a> {
    pub database: u32,
    pub transaction: u64,
    pub part: u32,
    pub page_size: u32,
    pub commit: Option<Commit>,
    numbers: &'a [u8],
    images: Cow<'a, [u8]>,
}

/// True for the page sizes that SQLite knows: powers of two from 512 to 65536.
pub fn valid_page_size(size: u32) -> bool {
    size.is_power_of_two() && (512..=65536).contains(&size)
}

/// The database that a part is for, by its header alone.
///
/// # Errors
/// [`TransactionError::Version`] for another format version, [`TransactionError::Malformed`] if the header is not
/// whole.
pub fn database(bytes: &[u8]) -> Result<u32, TransactionError> {
    match bytes.first() {
        Some(&FORMAT_VERSION) => find_u32(bytes, 4).ok_or(TransactionError::Malformed("short header")),
        Some(&version) => Err(TransactionError::Version(version)),
        None => Err(TransactionError::Malformed("empty")),
    }
}

/// True for any part of a transaction but the first, by its header alone.
pub fn continues(bytes: &[u8]) -> bool {
    find_u32(bytes, 16).is_some_and(|part| part > 0)
}

/// How many parts the transaction has that this part ends, by its header alone; none if it does not end one.
pub fn parts_at_end(bytes: &[u8]) -> Option<u32> {
    let ends = bytes.get(2).is_some_and(|flags| flags & FLAG_COMMIT != 0);
    find_u32(bytes, 16).filter(|_| ends).map(|part| part.saturating_add(1))
}

/// The page images, `length` bytes of them. The caller has checked that a command can have that many.
fn decode_images(bytes: &[u8], length: usize, compressed: bool) -> Result<Cow<'_, [u8]>, TransactionError> {
    if !compressed {
        let fits = bytes.len() == length;
        return if fits {
            Ok(Cow::Borrowed(bytes))
        } else {
            Err(TransactionError::Malformed("page count does not match the length"))
        };
    }
    let mut images = vec![0; length];
    match lz4_flex::block::decompress_into(bytes, &mut images) {
        Ok(got) if got == length => Ok(Cow::Owned(images)),
        _ => Err(TransactionError::Malformed("compressed page images")),
    }
}

impl<'a> Pages<'a> {
    /// Decodes and checks one command.
    ///
    /// # Errors
    /// [`TransactionError::Version`] for another format version, [`TransactionError::Malformed`] for anything that no
    /// member of this version would have written.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, TransactionError> {
        use TransactionError::Malformed;
        let database = database(bytes)?;
        if bytes.len() < HEADER || bytes.len() > MAX_PART {
            return Err(Malformed("length out of range"));
        }
        let (kind, flags, reserved) = (bytes[1], bytes[2], bytes[3]);
        if kind != KIND_PAGES || flags & !(FLAG_COMMIT | FLAG_COMPRESSED) != 0 || reserved != 0 {
            return Err(Malformed("unknown kind or flags"));
        }
        let short = Malformed("short header");
        let (Some(transaction), Some(part), Some(page_size), Some(count)) =
            (find_u64(bytes, 8), find_u32(bytes, 16), find_u32(bytes, 20), find_u32(bytes, 24))
        else {
            return Err(short);
        };
        if !valid_page_size(page_size) {
            return Err(Malformed("page size"));
        }
        let mut at = HEADER;
        let commit = if flags & FLAG_COMMIT != 0 {
            let (Some(database_pages), Some(checksum)) = (find_u32(bytes, at), find_u64(bytes, at + 4)) else {
                return Err(short);
            };
            at += COMMIT;
            Some(Commit { database_pages, checksum })
        } else {
            None
        };
        let (numbers_len, images_len) = (u64::from(count) * 4, u64::from(count) * u64::from(page_size));
        let body = bytes.get(at..).ok_or(short)?;
        if numbers_len + images_len > MAX_PART as u64 || numbers_len > body.len() as u64 {
            return Err(Malformed("page count out of range"));
        }
        let (numbers, images) = body.split_at(numbers_len as usize);
        let images = decode_images(images, images_len as usize, flags & FLAG_COMPRESSED != 0)?;
        let pages = Self { database, transaction, part, page_size, commit, numbers, images };
        let mut last = 0;
        for (number, _) in pages.iter() {
            if number <= last {
                return Err(Malformed("page numbers do not ascend"));
            }
            last = number;
        }
        if commit.is_some_and(|commit| last > commit.database_pages || commit.database_pages == 0) {
            return Err(Malformed("page beyond the end of the database"));
        }
        Ok(pages)
    }

    /// The pages as (number from 1, image).
    pub fn iter(&self) -> impl Iterator<Item = (u32, &[u8])> {
        let numbers = self.numbers.chunks_exact(4).map(|n| u32_at(n, 0));
        numbers.zip(self.images.chunks_exact(self.page_size as usize))
    }

    /// Number of page images in this part.
    pub fn len(&self) -> usize {
        self.numbers.len() / 4
    }

    /// True if the part carries no page image, only a size and a checksum.
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }
}

/// Builds one part. Push the pages in ascending order of their numbers.
pub struct PagesBuilder {
    database: u32,
    transaction: u64,
    part: u32,
    page_size: u32,
    numbers: Vec<u8>,
    images: Vec<u8>,
}

impl PagesBuilder {
    /// Starts an empty part.
    pub fn new(database: u32, transaction: u64, part: u32, page_size: u32) -> Self {
        assert!(valid_page_size(page_size), "page size {page_size}");
        Self { database, transaction, part, page_size, numbers: Vec::new(), images: Vec::new() }
    }

    /// True when no further page fits into this part.
    pub fn is_full(&self) -> bool {
        let next = self.images.len() + self.page_size as usize;
        HEADER + COMMIT + self.numbers.len() + 4 + next > MAX_PART
    }

    /// Adds a page image. Panics if it has the wrong size or the part is full: both are bugs of the caller.
    pub fn push(&mut self, number: u32, image: &[u8]) {
        assert!(!self.is_full() && image.len() == self.page_size as usize);
        self.numbers.extend_from_slice(&number.to_le_bytes());
        self.images.extend_from_slice(image);
    }

    /// Encodes the part.
    pub fn finish(self, commit: Option<Commit>) -> Vec<u8> {
        let count = (self.numbers.len() / 4) as u32;
        let compressed = Some(lz4_flex::block::compress(&self.images)).filter(|small| small.len() < self.images.len());
        let flags = u8::from(commit.is_some()) * FLAG_COMMIT + u8::from(compressed.is_some()) * FLAG_COMPRESSED;
        let images = compressed.unwrap_or(self.images);
        let mut out = Vec::with_capacity(HEADER + COMMIT + self.numbers.len() + images.len());
        out.extend_from_slice(&[FORMAT_VERSION, KIND_PAGES, flags, 0]);
        out.extend_from_slice(&self.database.to_le_bytes());
        out.extend_from_slice(&self.transaction.to_le_bytes());
        out.extend_from_slice(&self.part.to_le_bytes());
        out.extend_from_slice(&self.page_size.to_le_bytes());
        out.extend_from_slice(&count.to_le_bytes());
        if let Some(commit) = commit {
            out.extend_from_slice(&commit.database_pages.to_le_bytes());
            out.extend_from_slice(&commit.checksum.to_le_bytes());
        }
        out.extend_from_slice(&self.numbers);
        out.extend_from_slice(&images);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(commit: Option<Commit>) -> Vec<u8> {
        let mut part = PagesBuilder::new(CONSOLE_DATABASE, 7, 0, 512);
        part.push(1, &[1; 512]);
        part.push(3, &[3; 512]);
        part.finish(commit)
    }

    #[test]
    fn a_part_survives_the_round_trip() {
        let commit = Some(Commit { database_pages: 3, checksum: 0x1234_5678_9abc_def0 });
        for commit in [None, commit] {
            let bytes = sample(commit);
            let pages = Pages::decode(&bytes).unwrap();
            assert_eq!((pages.database, pages.transaction, pages.part, pages.page_size), (1, 7, 0, 512));
            assert_eq!(pages.commit, commit);
            assert_eq!(pages.iter().collect::<Vec<_>>(), vec![(1, &[1u8; 512][..]), (3, &[3u8; 512][..])]);
        }
    }

    #[test]
    fn a_header_says_where_in_its_transaction_a_part_stands() {
        let commit = Some(Commit { database_pages: 1, checksum: 0 });
        let of = |part, commit| PagesBuilder::new(CONSOLE_DATABASE, 7, part, 512).finish(commit);
        for (part, commit, behind, parts) in
            [(0, None, false, None), (0, commit, false, Some(1)), (4, None, true, None), (4, commit, true, Some(5))]
        {
            let bytes = of(part, commit);
            assert_eq!((continues(&bytes), parts_at_end(&bytes)), (behind, parts));
            assert_eq!(database(&bytes), Ok(CONSOLE_DATABASE));
        }
        assert!(!continues(&[]) && parts_at_end(&[1, 1, 1]).is_none(), "what is no command is refused elsewhere");
    }

    #[test]
    fn images_that_do_not_shrink_stay_as_they_are() {
        let noise = std::iter::repeat_with(rand::random::<u8>).take(512).collect::<Vec<_>>();
        let mut part = PagesBuilder::new(CONSOLE_DATABASE, 7, 0, 512);
        part.push(9, &noise);
        let bytes = part.finish(None);
        assert_eq!(bytes[2] & FLAG_COMPRESSED, 0);
        assert_eq!(Pages::decode(&bytes).unwrap().iter().collect::<Vec<_>>(), vec![(9, &noise[..])]);
        assert!(sample(None)[2] & FLAG_COMPRESSED != 0);
    }

    #[test]
    fn a_page_count_beyond_a_command_allocates_nothing() {
        let mut bytes = sample(None);
        bytes[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Pages::decode(&bytes), Err(TransactionError::Malformed("page count out of range")));
    }

    #[test]
    fn a_page_beyond_the_end_is_refused() {
        let bytes = sample(Some(Commit { database_pages: 2, checksum: 0 }));
        assert_eq!(Pages::decode(&bytes), Err(TransactionError::Malformed("page beyond the end of the database")));
    }

    #[test]
    fn a_newer_version_names_itself() {
        assert_eq!(Pages::decode(&[9, 9]), Err(TransactionError::Version(9)));
        assert_eq!(database(&[9, 9]), Err(TransactionError::Version(9)));
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = Pages::decode(&bytes);
        }

        #[test]
        fn no_mutation_panics(at in 0usize..1080, value: u8, cut in 0usize..1080) {
            let mut bytes = sample(Some(Commit { database_pages: 3, checksum: 1 }));
            let index = at % bytes.len();
            bytes[index] = value;
            bytes.truncate(bytes.len() - cut % bytes.len());
            let _ = Pages::decode(&bytes);
        }
    }
}
