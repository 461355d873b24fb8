//! What a transaction with a rollback journal has written to its database, beside the file, until it commits: the file
//! never has anything that is not committed. In memory up to a limit, then in a file without a name. Must never write
//! to the database.
//!
//! Kept in chunks of 4 KiB with a bit for each 512 bytes, the smallest page: pages of any size fit, also while the
//! transaction changes the size of the pages.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::storage::watch::{Act, Place as Watched, run};

/// Smallest unit, in bytes; all that is written is a multiple of it.
pub(super) const SECTOR: u64 = 512;
/// Bytes that are kept together.
const CHUNK: u64 = 4096;
/// What is kept in memory for all databases together, in bytes; more goes to files.
pub(super) const MEMORY: usize = 64 << 20;

/// The memory that all overlays share.
#[derive(Debug)]
pub(super) struct Budget {
    left: AtomicUsize,
}

impl Budget {
    /// So many bytes.
    pub fn new(bytes: usize) -> Self {
        Self { left: AtomicUsize::new(bytes) }
    }

    /// Takes a chunk, if there is one.
    fn take(&self) -> bool {
        let chunk = CHUNK as usize;
        self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(chunk)).is_ok()
    }

    fn give(&self, chunks: usize) {
        self.left.fetch_add(chunks * CHUNK as usize, Ordering::SeqCst);
    }
}

#[derive(Debug)]
enum Place {
    Memory(Box<[u8]>),
    /// In this slot of the spill file.
    Spilled(u64),
}

#[derive(Debug)]
struct Chunk {
    /// The sectors that were written, from the lowest bit on.
    written: u8,
    place: Place,
}

/// Written content of one database.
#[derive(Debug)]
pub(super) struct Overlay {
    chunks: BTreeMap<u64, Chunk>,
    budget: Arc<Budget>,
    spill: Option<File>,
    slots: u64,
    /// Size of the database as its application sees it, in bytes.
    size: u64,
    /// Up to here, in bytes, what was not written is what the file has. Behind it are zeros.
    base: u64,
}

impl Overlay {
    /// Over a file of which this many bytes count. `size` is how long it looks.
    pub fn new(base: u64, size: u64, budget: Arc<Budget>) -> Self {
        Self { chunks: BTreeMap::new(), budget, spill: None, slots: 0, size, base: base.min(size) }
    }

    /// Size of the database, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Up to here, in bytes, what was not written is what the file has.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Bytes that are kept in the spill file.
    pub fn spilled(&self) -> u64 {
        self.slots * CHUNK
    }

    /// Notes a write. `spill` makes a file without a name.
    ///
    /// # Errors
    /// `InvalidInput` for what is not a multiple of the smallest page. Otherwise when the spill file cannot be made or
    /// written: what was written before is still there.
    pub fn write(&mut self, offset: u64, bytes: &[u8], spill: &dyn Fn() -> io::Result<File>) -> io::Result<()> {
        let aligned = offset.is_multiple_of(SECTOR) && (bytes.len() as u64).is_multiple_of(SECTOR);
        let end = offset.checked_add(bytes.len() as u64).filter(|_| aligned).ok_or(ErrorKind::InvalidInput)?;
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let (number, within) = (at / CHUNK, (at % CHUNK) as usize);
            let (piece, later) = rest.split_at(rest.len().min(CHUNK as usize - within));
            self.write_chunk(number, within, piece, spill)?;
            (at, rest) = (at + piece.len() as u64, later);
        }
        self.size = self.size.max(end);
        Ok(())
    }

    fn write_chunk(
        &mut self,
        number: u64,
        within: usize,
        piece: &[u8],
        spill: &dyn Fn() -> io::Result<File>,
    ) -> io::Result<()> {
        if !self.chunks.contains_key(&number) {
            let place = if self.budget.take() {
                Place::Memory(vec![0; CHUNK as usize].into())
            } else {
                if self.spill.is_none() {
                    self.spill = Some(spill()?);
                }
                self.slots += 1;
                Place::Spilled(self.slots - 1)
            };
            self.chunks.insert(number, Chunk { written: 0, place });
        }
        let Some(chunk) = self.chunks.get_mut(&number) else { return Err(ErrorKind::NotFound.into()) };
        match (&mut chunk.place, &self.spill) {
            (Place::Memory(memory), _) => memory[within..within + piece.len()].copy_from_slice(piece),
            (Place::Spilled(slot), Some(file)) => {
                let offset = *slot * CHUNK + within as u64;
                run(Watched::Database, Act::Write, || file.write_all_at(piece, offset))?;
            }
            (Place::Spilled(_), None) => return Err(ErrorKind::NotFound.into()),
        }
        let sectors = within / SECTOR as usize..(within + piece.len()) / SECTOR as usize;
        sectors.for_each(|sector| chunk.written |= 1 << sector);
        Ok(())
    }

    /// Changes the size. What is cut off is zeros if it comes back.
    ///
    /// # Errors
    /// `InvalidInput` for a cut that is not at a multiple of the smallest page: nothing has changed.
    pub fn resize(&mut self, size: u64) -> io::Result<()> {
        if size < self.size && !size.is_multiple_of(SECTOR) {
            return Err(ErrorKind::InvalidInput.into());
        }
        if size < self.size {
            let removed = self.chunks.split_off(&size.div_ceil(CHUNK));
            self.give_back(&removed);
            if let Some(chunk) = self.chunks.get_mut(&(size / CHUNK)) {
                chunk.written &= ((1u16 << ((size % CHUNK) / SECTOR)) - 1) as u8;
            }
        }
        (self.size, self.base) = (size, self.base.min(size));
        Ok(())
    }

    /// Fills `bytes` with what the application sees at `offset`. Returns how many there are up to the end.
    ///
    /// # Errors
    /// When the database or the spill file cannot be read.
    pub fn read(&self, file: &File, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        let length = self.size.saturating_sub(offset).min(bytes.len() as u64);
        let bytes = &mut bytes[..length as usize];
        bytes.fill(0);
        let below = self.base.saturating_sub(offset).min(length) as usize;
        read_up_to(file, offset, &mut bytes[..below])?;
        let end = offset + length;
        for (number, chunk) in self.chunks.range(offset / CHUNK..end.div_ceil(CHUNK)) {
            for sector in (0..CHUNK / SECTOR).filter(|sector| chunk.written & (1 << sector) != 0) {
                let at = number * CHUNK + sector * SECTOR;
                let (from, to) = (at.max(offset), (at + SECTOR).min(end));
                if from >= to {
                    continue;
                }
                let target = &mut bytes[(from - offset) as usize..(to - offset) as usize];
                let within = from - number * CHUNK;
                match (&chunk.place, &self.spill) {
                    (Place::Memory(memory), _) => {
                        target.copy_from_slice(&memory[within as usize..within as usize + target.len()]);
                    }
                    (Place::Spilled(slot), Some(spill)) => spill.read_exact_at(target, slot * CHUNK + within)?,
                    (Place::Spilled(_), None) => return Err(ErrorKind::NotFound.into()),
                }
            }
        }
        Ok(length as usize)
    }

    /// The numbers of all pages of this size, counted from 1, of which something was written, in ascending order.
    pub fn pages(&self, page_size: u32) -> impl Iterator<Item = u32> {
        let size = u64::from(page_size);
        let mut last = 0;
        let sectors = self.chunks.iter().flat_map(|(number, chunk)| {
            let written = (0..CHUNK / SECTOR).filter(move |sector| chunk.written & (1 << sector) != 0);
            written.map(move |sector| number * CHUNK + sector * SECTOR)
        });
        sectors.filter_map(move |at| {
            let page = (at / size + 1) as u32;
            (std::mem::replace(&mut last, page) != page).then_some(page)
        })
    }
}

impl Overlay {
    fn give_back(&self, chunks: &BTreeMap<u64, Chunk>) {
        self.budget.give(chunks.values().filter(|chunk| matches!(chunk.place, Place::Memory(_))).count());
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        self.give_back(&self.chunks);
    }
}

/// Reads until the end of the file or of the bytes. What is behind the end is left as it is.
pub(super) fn read_up_to(file: &File, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match run(Watched::Database, Act::Read, || file.read_at(&mut bytes[done..], offset + done as u64)) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file of 40 sectors, each full of its number from 1 on.
    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        (0..40u64).for_each(|sector| file.write_all_at(&[sector as u8 + 1; 512], sector * SECTOR).unwrap());
        file
    }

    fn spill() -> io::Result<File> {
        tempfile::tempfile()
    }

    #[test]
    fn the_pages_of_any_size_are_named_once() {
        let mut overlay = Overlay::new(40 * SECTOR, 40 * SECTOR, Arc::new(Budget::new(MEMORY)));
        for sector in [0, 1, 9, 17, 30] {
            overlay.write(sector * SECTOR, &[0; 512], &spill).unwrap();
        }
        assert_eq!(overlay.pages(512).collect::<Vec<_>>(), [1, 2, 10, 18, 31]);
        assert_eq!(overlay.pages(1024).collect::<Vec<_>>(), [1, 5, 9, 16]);
        assert_eq!(overlay.pages(4096).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(overlay.pages(65536).collect::<Vec<_>>(), [1]);
        assert!(overlay.write(3, &[0; 512], &spill).is_err() && overlay.write(0, &[0; 511], &spill).is_err());
    }

    #[test]
    fn what_does_not_fit_into_memory_is_in_the_file() {
        let budget = Arc::new(Budget::new(9000));
        let mut overlay = Overlay::new(40 * SECTOR, 40 * SECTOR, Arc::clone(&budget));
        (0..5).for_each(|page| overlay.write(page * 4096, &[page as u8 + 100; 4096], &spill).unwrap());
        assert_eq!(overlay.spilled(), 3 * CHUNK);
        let mut bytes = vec![0; 5 * 4096];
        assert_eq!(overlay.read(&file(), 0, &mut bytes).unwrap(), 5 * 4096);
        assert!(bytes.chunks(4096).zip(100..).all(|(page, value)| page.iter().all(|byte| *byte == value)));
        assert!(overlay.write(1 << 30, &[0; 512], &|| Err(ErrorKind::StorageFull.into())).is_ok(), "it has a file");
        overlay.resize(4096).unwrap();
        let mut other = Overlay::new(0, 0, Arc::clone(&budget));
        (0..2).for_each(|page| other.write(page * 4096, &[1; 4096], &spill).unwrap());
        assert_eq!(other.spilled(), CHUNK, "they share the memory");
        drop((overlay, other));
        assert_eq!(budget.left.load(Ordering::SeqCst), 9000);
    }

    #[derive(Clone, Debug)]
    enum Act {
        Write(u64, u64, u8),
        Resize(u64),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            (0..60u64, 1..12u64, any::<u8>()).prop_map(|(at, count, value)| Act::Write(at, count, value)),
            (0..60u64).prop_map(|sectors| Act::Resize(sectors * SECTOR)),
        ]
    }

    proptest! {
        /// Whatever is written and cut, it reads as a file would.
        #[test]
        fn it_is_a_file(acts in proptest::collection::vec(act(), 0..40), memory in 0usize..40_000) {
            let (file, model) = (file(), file());
            let mut overlay = Overlay::new(40 * SECTOR, 40 * SECTOR, Arc::new(Budget::new(memory)));
            for act in acts {
                match act {
                    Act::Write(at, count, value) => {
                        let bytes = vec![value; (count * SECTOR) as usize];
                        overlay.write(at * SECTOR, &bytes, &spill).unwrap();
                        model.write_all_at(&bytes, at * SECTOR).unwrap();
                    }
                    Act::Resize(size) => {
                        overlay.resize(size).unwrap();
                        model.set_len(size).unwrap();
                    }
                }
                prop_assert_eq!(overlay.size(), model.metadata().unwrap().len());
                for (offset, length) in [(0, 70 * 512), (700, 5000), (4096, 4096)] {
                    let (mut ours, mut theirs) = (vec![9; length], vec![9; length]);
                    let count = overlay.read(&file, offset, &mut ours).unwrap();
                    prop_assert_eq!(read_up_to(&model, offset, &mut theirs).unwrap(), count);
                    prop_assert_eq!(&ours[..count], &theirs[..count]);
                }
            }
        }
    }
}
