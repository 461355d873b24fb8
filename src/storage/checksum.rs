//! The checksum of a whole database, kept incrementally (`docs/design.md`, "Integrity").
//!
//! Every page has a CRC-64/NVME of its number (u32, little-endian) and its content. The database's checksum is the XOR
//! of those of all pages `1..=n`. A page that was never written counts as a page of zeros. Owns the table of these
//! values, 8 bytes for each page. Must never write to a file.

use std::{
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::FileExt,
};

use crc_fast::{CrcAlgorithm, Digest};

use super::watch::{Act, Place, run};

/// Bytes of a database that are read and sent at once; a multiple of every page size.
pub const CHUNK: usize = 1 << 20;

/// The checksum of one page.
pub fn page_checksum(number: u32, image: &[u8]) -> u64 {
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    digest.update(&number.to_le_bytes());
    digest.update(image);
    digest.finalize()
}

/// What a transaction would change in a [`PageTable`].
#[derive(Debug)]
pub struct Preview {
    /// Size of the database afterwards, in pages.
    pub pages: u32,
    /// Checksum of the database afterwards.
    pub checksum: u64,
    /// Pages that the database grows over without writing them, in ascending order. They count as zeros.
    pub holes: Vec<u32>,
    changes: Vec<(u32, u64)>,
}

/// The checksums of all pages of one database.
#[derive(Debug)]
pub struct PageTable {
    page_size: u32,
    pages: Vec<u64>,
    total: u64,
}

impl PageTable {
    /// The table of an empty database.
    pub fn empty(page_size: u32) -> Self {
        Self { page_size, pages: Vec::new(), total: 0 }
    }

    /// Reads the first `pages` pages of a file. What is beyond the file's end counts as zeros.
    ///
    /// # Errors
    /// When the file cannot be read. [`ErrorKind::Interrupted`] as soon as `go_on` returns false.
    pub fn read(file: &File, page_size: u32, pages: u32, go_on: &dyn Fn() -> bool) -> io::Result<Self> {
        let mut table = Self { page_size, pages: Vec::with_capacity(pages as usize), total: 0 };
        let mut chunk = Vec::new();
        let mut number = 0;
        while number < pages {
            if !go_on() {
                return Err(ErrorKind::Interrupted.into());
            }
            read_chunk(file, page_size, pages, number, &mut chunk)?;
            for image in chunk.chunks_exact(page_size as usize) {
                number += 1;
                table.push(page_checksum(number, image));
            }
        }
        Ok(table)
    }

    /// The checksum of the database.
    pub fn checksum(&self) -> u64 {
        self.total
    }

    /// The size of the database, in pages.
    pub fn pages(&self) -> u32 {
        self.pages.len() as u32
    }

    /// The size of a page, in bytes.
    pub fn page_size(&self) -> u32 {
        self.page_size
    }

    fn push(&mut self, value: u64) {
        self.pages.push(value);
        self.total ^= value;
    }

    /// Changes the size. Added pages are zeros.
    pub fn resize(&mut self, pages: u32) {
        while self.pages() > pages {
            self.total ^= self.pages.pop().expect("the table is longer than wanted");
        }
        let zeros = vec![0; self.page_size as usize];
        while self.pages() < pages {
            self.push(page_checksum(self.pages() + 1, &zeros));
        }
    }

    /// The checksum of a page, counted from 1; none beyond the end.
    pub fn get(&self, number: u32) -> Option<u64> {
        self.pages.get(number.checked_sub(1)? as usize).copied()
    }

    /// Notes the checksum of a page's new content. Panics if the page is not within the size: a bug of the caller.
    pub fn set(&mut self, number: u32, value: u64) {
        let slot = &mut self.pages[number as usize - 1];
        self.total ^= *slot ^ value;
        *slot = value;
    }

    /// What a transaction would change that leaves `pages` pages and writes `changes`. These are (number, checksum), in
    /// ascending order and within the new size.
    pub fn preview(&self, pages: u32, mut changes: Vec<(u32, u64)>) -> Preview {
        let mut checksum = self.total;
        for gone in self.pages.iter().skip(pages as usize) {
            checksum ^= gone;
        }
        let mut written =
            changes.iter().map(|(number, _)| *number).skip_while(|number| *number <= self.pages()).peekable();
        let mut holes = Vec::new();
        for number in self.pages() + 1..=pages {
            if written.next_if_eq(&number).is_none() {
                holes.push(number);
            }
        }
        if !holes.is_empty() {
            let zeros = vec![0; self.page_size as usize];
            changes.extend(holes.iter().map(|number| (*number, page_checksum(*number, &zeros))));
            // In ascending order again, because `accept` appends the new ones.
            changes.sort_unstable();
        }
        for (number, value) in &changes {
            checksum ^= value ^ self.pages.get(*number as usize - 1).copied().unwrap_or(0);
        }
        Preview { pages, checksum, holes, changes }
    }

    /// Makes the changes of a preview. It must be one of this very table, which has not changed since.
    pub fn accept(&mut self, preview: Preview) {
        if preview.pages < self.pages() {
            self.resize(preview.pages);
        }
        for (number, value) in preview.changes {
            if number <= self.pages() {
                self.set(number, value);
            } else {
                assert_eq!(number, self.pages() + 1, "a page is missing from the preview");
                self.push(value);
            }
        }
        assert_eq!((self.pages(), self.total), (preview.pages, preview.checksum), "the table and its preview differ");
    }
}

/// Reads the next pages of a database of `pages` pages after page `done`: at most [`CHUNK`] bytes, none at the end.
///
/// # Errors
/// When the file cannot be read.
pub(super) fn read_chunk(file: &File, page_size: u32, pages: u32, done: u32, bytes: &mut Vec<u8>) -> io::Result<()> {
    read_pages(file, page_size, done, (pages - done).min(CHUNK as u32 / page_size), bytes)
}

/// Reads `count` pages after page `done`. What is beyond the end of the file counts as zeros.
///
/// # Errors
/// When the file cannot be read.
pub(super) fn read_pages(file: &File, page_size: u32, done: u32, count: u32, bytes: &mut Vec<u8>) -> io::Result<()> {
    bytes.resize(count as usize * page_size as usize, 0);
    let (mut rest, mut offset) = (bytes.as_mut_slice(), u64::from(done) * u64::from(page_size));
    while !rest.is_empty() {
        match run(Place::Database, Act::Read, || file.read_at(rest, offset)) {
            Ok(0) => {
                rest.fill(0);
                return Ok(());
            }
            Ok(n) => {
                rest = &mut rest[n..];
                offset += n as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_depends_on_number_and_content() {
        assert_ne!(page_checksum(1, &[7; 512]), page_checksum(2, &[7; 512]));
        assert_ne!(page_checksum(1, &[7; 512]), page_checksum(1, &[8; 512]));
    }

    #[test]
    fn a_preview_is_what_happens() {
        let mut table = PageTable::empty(512);
        let change = |number: u32, byte: u8| (number, page_checksum(number, &[byte; 512]));
        for (pages, changes, holes) in [
            (3, vec![change(1, 1), change(2, 2), change(3, 3)], vec![]),
            (7, vec![change(2, 4), change(6, 5)], vec![4, 5, 7]),
            (2, vec![change(1, 9)], vec![]),
            (4, vec![], vec![3, 4]),
        ] {
            let preview = table.preview(pages, changes.clone());
            assert_eq!(preview.holes, holes);
            let expected = preview.checksum;
            table.accept(preview);
            assert_eq!(table.checksum(), expected);
            let mut again = PageTable::empty(512);
            again.resize(table.pages());
            for (number, value) in table.pages.iter().enumerate() {
                again.set(number as u32 + 1, *value);
            }
            assert_eq!(again.checksum(), expected);
        }
    }

    #[test]
    fn a_file_reads_as_the_table_that_wrote_it() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[3; 512], 512).unwrap();
        let mut table = PageTable::empty(512);
        table.resize(4);
        table.set(2, page_checksum(2, &[3; 512]));
        assert_eq!(PageTable::read(&file, 512, 4, &|| true).unwrap().checksum(), table.checksum());
    }
}
