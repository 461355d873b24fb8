//! Puts together what SQLite has written to a `-wal` file in one piece: the kernel cuts a write at the end of a page of
//! its cache that it does not have. The [tracker](crate::storage::wal) then sees whole headers and whole pages. Pure.

use crate::storage::wal::{FRAME_HEADER, WAL_HEADER};

/// A write that belongs to no unit of the file, or does not continue the one before it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Misplaced;

/// What has come of the unit that is not whole yet.
#[derive(Debug, Default)]
pub(super) struct Units {
    start: u64,
    bytes: Vec<u8>,
}

/// Where the unit of this offset begins, and how long it is: the header of the file, the header of a frame, or a page.
fn unit(offset: u64, page_size: u32) -> (u64, usize) {
    let Some(body) = offset.checked_sub(WAL_HEADER as u64) else { return (0, WAL_HEADER) };
    let (header, page) = (FRAME_HEADER as u64, u64::from(page_size));
    let frame = offset - body % (header + page);
    if body % (header + page) < header { (frame, FRAME_HEADER) } else { (frame + header, page_size as usize) }
}

impl Units {
    /// Takes a piece. Returns the whole unit and its offset if this completes it.
    ///
    /// # Errors
    /// [`Misplaced`] for what no SQLite writes: the unit before it counts for nothing then.
    pub fn take<'a>(
        &'a mut self,
        offset: u64,
        piece: &'a [u8],
        page_size: u32,
    ) -> Result<Option<(u64, &'a [u8])>, Misplaced> {
        let (start, length) = unit(offset, page_size);
        let within = (offset - start) as usize;
        if within == 0 && piece.len() == length {
            self.bytes.clear();
            return Ok(Some((start, piece)));
        }
        if within == 0 {
            self.bytes.clear();
            self.start = start;
        }
        if self.start != start || self.bytes.len() != within || within + piece.len() > length {
            self.bytes.clear();
            return Err(Misplaced);
        }
        self.bytes.extend_from_slice(piece);
        Ok((self.bytes.len() == length).then_some((start, self.bytes.as_slice())))
    }

    /// The unit is dealt with.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// What has come of a unit that is not whole, and where it begins.
    pub fn pending(&self) -> (u64, &[u8]) {
        (self.start, &self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_in_order_are_a_unit_and_others_are_not() {
        let mut units = Units::default();
        let (header, page) = (32 + 536, 32 + 536 + 24);
        assert_eq!(units.take(0, &[1; 32], 512), Ok(Some((0, &[1; 32][..]))));
        assert_eq!(units.take(header, &[2; 10], 512), Ok(None));
        assert_eq!(units.pending(), (header, &[2; 10][..]));
        assert_eq!(units.take(header + 10, &[2; 14], 512), Ok(Some((header, &[2; 24][..]))));
        units.clear();
        for (at, length, whole) in [(0, 100, false), (100, 400, false), (500, 12, true)] {
            assert_eq!(units.take(page + at, &vec![3; length], 512).unwrap().is_some(), whole);
        }
        units.clear();
        // Somebody else begins anew.
        assert_eq!(units.take(page, &[3; 100], 512), Ok(None));
        assert_eq!(units.take(header, &[3; 24], 512), Ok(Some((header, &[3; 24][..]))));
        for (offset, length) in [(page + 100, 412), (page + 100, 3), (header + 1, 23), (page, 513), (8, 24)] {
            assert_eq!(units.take(offset, &vec![0; length], 512), Err(Misplaced), "{offset} {length}");
        }
    }
}
