//! What a transaction with a rollback journal leaves: the size of the database's pages, and how many there are
//! (<https://www.sqlite.org/fileformat2.html#the_database_header>). Pure, but for reading.

use std::{fs::File, io};

use super::overlay::Overlay;
use crate::storage::transaction::valid_page_size;

/// How a database file begins.
pub(super) const MAGIC: &[u8; 16] = b"SQLite format 3\0";
/// Bytes of the header.
pub(super) const HEADER: usize = 100;

/// A database after a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct After {
    /// In bytes.
    pub page_size: u32,
    pub pages: u32,
}

impl After {
    /// Size of the database, in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.page_size) * u64::from(self.pages)
    }
}

/// A number of four bytes in SQLite's order.
pub(super) fn big_endian(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).fold(0, |number, byte| number << 8 | u32::from(*byte))
}

/// The size of a page, by the header of a database; none if it is not one.
pub(super) fn page_size(header: &[u8]) -> Option<u32> {
    let size = header.get(16..18).filter(|_| header.starts_with(MAGIC))?;
    // 1 stands for 65536, which two bytes cannot hold.
    let size = match u32::from(size[0]) << 8 | u32::from(size[1]) {
        1 => 65536,
        size => size,
    };
    valid_page_size(size).then_some(size)
}

/// The number of pages in the header, where SQLite itself would believe it; none otherwise.
pub(super) fn stated_pages(header: &[u8]) -> Option<u32> {
    let believed = header.get(24..28)? == header.get(92..96)?;
    Some(big_endian(&header[28..32])).filter(|pages| believed && *pages > 0)
}

/// What the overlay leaves of the database; none if that is no database.
///
/// # Errors
/// When it cannot be read.
pub(super) fn after(overlay: &Overlay, file: &File) -> io::Result<Option<After>> {
    let mut header = [0; HEADER];
    if overlay.read(file, 0, &mut header)? < HEADER {
        return Ok(None);
    }
    let Some(page_size) = page_size(&header) else { return Ok(None) };
    let there = u32::try_from(overlay.size() / u64::from(page_size)).unwrap_or(u32::MAX);
    let pages = stated_pages(&header).filter(|pages| *pages <= there).unwrap_or(there);
    Ok((pages > 0).then_some(After { page_size, pages }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_says_how_large_a_database_is() {
        let mut header = [0; HEADER];
        assert_eq!(page_size(&header), None);
        header[..16].copy_from_slice(MAGIC);
        for (bytes, size) in [([2, 0], Some(512)), ([0x10, 0], Some(4096)), ([0, 1], Some(65536)), ([3, 0], None)] {
            header[16..18].copy_from_slice(&bytes);
            assert_eq!(page_size(&header), size);
        }
        header[28..32].copy_from_slice(&7u32.to_be_bytes());
        assert_eq!(stated_pages(&header), Some(7));
        header[24] = 1;
        assert_eq!(stated_pages(&header), None, "written by a program that does not know the field");
        assert_eq!(stated_pages(&header[..50]), None);
    }
}
