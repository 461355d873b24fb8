//! Copies a database that goes on following the raft log meanwhile. Whoever copies reads the file at their own pace,
//! and then again the pages that were written meanwhile. The database thread reads the last few of those itself,
//! between two transactions, so that the copy is the database at one raft index.
//!
//! Owns the record of which pages were written since the copy began. Must never make the database thread wait: a copy
//! that is given up, or a promotion, leaves nothing behind but a flag.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use thiserror::Error;

use crate::mutex::locked;

use super::{
    checkpoint::Record,
    checksum::{read_chunk, read_pages},
    folder::catalogue::Catalogue,
    snapshot::chunk_checksum,
};

/// Bytes that the database thread reads itself at the end of a copy: about a millisecond.
const LAST_BYTES: usize = 4 << 20;

/// Why there is no copy.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CopyError {
    /// More pages were written than the database thread reads itself: read them, then try again.
    #[error("{0} pages were written since they were read")]
    Changed(usize),
    /// The database does not follow any more, or not yet. The text says why.
    #[error("{0}")]
    Ended(String),
}

/// The pages written since they were last read, one bit each.
#[derive(Debug, Default)]
struct Written {
    bits: Mutex<Vec<u64>>,
    ended: AtomicBool,
}

impl Written {
    fn bits(&self) -> MutexGuard<'_, Vec<u64>> {
        locked(&self.bits)
    }

    fn note(&self, number: u32) {
        let (word, bit) = (number as usize / 64, number % 64);
        let mut bits = self.bits();
        if bits.len() <= word {
            bits.resize(word + 1, 0);
        }
        bits[word] |= 1 << bit;
    }

    /// Takes the noted pages, in ascending order: none are noted afterwards.
    fn take(&self) -> Vec<u32> {
        let words = std::mem::take(&mut *self.bits());
        let of_word = |(at, word): (usize, u64)| {
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| at as u32 * 64 + bit)
        };
        words.into_iter().enumerate().flat_map(of_word).collect()
    }
}

/// The database's side: notes what is written. It is dropped when the database stops following, and that ends the copy.
#[derive(Debug)]
pub(super) struct Tracking(Arc<Written>, u32);

impl Tracking {
    /// Call this **after** the page is in the file. Whoever copies first takes the note and then reads, so a page that
    /// is written during the read is noted again.
    pub fn note(&self, number: u32) {
        self.0.note(number);
    }

    /// True while somebody is making the copy.
    pub fn is_wanted(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// How many pages are noted, of this copy.
    pub fn pending(&self, copy: &CopyId, record: &Record) -> Result<usize, CopyError> {
        if !Arc::ptr_eq(&self.0, &copy.0) {
            return Err(CopyError::Ended("another copy of the database was begun".to_owned()));
        }
        if record.page_size != self.1 {
            return Err(CopyError::Ended("the database has another size of pages since the copy began".to_owned()));
        }
        Ok(self.0.bits().iter().map(|word| word.count_ones() as usize).sum())
    }

    /// Completes the copy: reads the pages that are still noted. `record` describes the database at this moment.
    pub fn finish(&self, copy: &CopyId, file: &File, record: Record) -> Result<FinishedCopy, CopyError> {
        self.pending(copy, &record)?;
        let mut numbers = self.0.take();
        numbers.retain(|number| *number <= record.pages);
        if numbers.len() * record.page_size as usize > LAST_BYTES {
            numbers.iter().for_each(|number| self.0.note(*number));
            return Err(CopyError::Changed(numbers.len()));
        }
        let page = |number: u32| {
            let mut image = Vec::new();
            read_pages(file, record.page_size, number - 1, 1, &mut image)?;
            Ok((number, image))
        };
        let pages = numbers.into_iter().map(page).collect::<io::Result<_>>();
        let pages = pages.map_err(|error| CopyError::Ended(format!("the database file cannot be read: {error}")))?;
        Ok(FinishedCopy { record, pages })
    }
}

/// Tells the database thread which copy to finish.
#[derive(Clone, Debug)]
pub struct CopyId(Arc<Written>);

/// A copy of a following database: the side that reads.
#[derive(Debug)]
pub struct OnlineCopy {
    // Never a duplicate: closing any descriptor of the file would drop SQLite's locks on it (POSIX).
    file: Arc<File>,
    written: Arc<Written>,
    page_size: u32,
    pages: u32,
}

/// The end of a copy: what it is a copy of, and the pages that still have to be written into it.
#[derive(Debug)]
pub struct FinishedCopy {
    /// Raft index, size and checksum of the copied database.
    pub record: Record,
    /// Page numbers and images.
    pub pages: Vec<(u32, Vec<u8>)>,
}

impl OnlineCopy {
    /// Begins a copy of a database of `pages` pages. The other half notes the writes to it from now on.
    pub(super) fn begin(file: Arc<File>, page_size: u32, pages: u32) -> (Self, Tracking) {
        let written = Arc::<Written>::default();
        (Self { file, written: Arc::clone(&written), page_size, pages }, Tracking(written, page_size))
    }

    /// Size of a page in bytes.
    pub fn page_size(&self) -> u32 {
        self.page_size
    }

    /// Size of the database when the copy began, in pages.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Identifies this copy to [`crate::node::Handle::finish_copy`].
    pub fn id(&self) -> CopyId {
        CopyId(Arc::clone(&self.written))
    }

    fn check(&self) -> io::Result<()> {
        if !self.written.ended.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::Interrupted,
            "the role of this node is changing, or its database has gone back to a checkpoint",
        ))
    }

    /// Reads the next pages after page `done`: at most [`CHUNK`](super::checksum::CHUNK) bytes, none at the end.
    ///
    /// # Errors
    /// When the file cannot be read. [`io::ErrorKind::Interrupted`] once the database does not follow any more: begin
    /// another copy.
    pub fn read(&self, done: u32, bytes: &mut Vec<u8>) -> io::Result<()> {
        self.check()?;
        read_chunk(&self.file, self.page_size, self.pages, done, bytes)
    }

    /// Takes the pages that were written since they were read. Read them again. They are noted again if they are
    /// written again.
    pub fn changed(&self) -> Vec<u32> {
        self.written.take()
    }

    /// Reads one page.
    ///
    /// # Errors
    /// When the file cannot be read. [`io::ErrorKind::Interrupted`] once the database does not follow any more: begin
    /// another copy.
    pub fn read_page(&self, number: u32, image: &mut Vec<u8>) -> io::Result<()> {
        self.check()?;
        read_pages(&self.file, self.page_size, number - 1, 1, image)
    }
}

/// A copy of all databases of a member that follows: the side that reads.
#[derive(Debug)]
pub struct WholeCopy {
    /// Which databases of a service there are.
    pub catalogue: Catalogue,
    /// By their ids.
    pub databases: BTreeMap<u32, OnlineCopy>,
}

/// Tells the database thread which copies to finish.
#[derive(Clone, Debug)]
pub struct WholeCopyId {
    pub(super) changed: u64,
    pub(super) copies: BTreeMap<u32, CopyId>,
}

impl WholeCopy {
    /// Identifies this copy to [`crate::node::Handle::finish_copy`].
    pub fn id(&self) -> WholeCopyId {
        let copies = self.databases.iter().map(|(id, copy)| (*id, copy.id())).collect();
        WholeCopyId { changed: self.catalogue.changed(), copies }
    }
}

/// The ends of all copies, as of one raft index.
pub type FinishedWhole = BTreeMap<u32, FinishedCopy>;

/// Refuses to finish copies that still lack more pages together than the database thread reads itself. `pending` has
/// the pages of each, and their size.
pub(super) fn check_pending(pending: impl Iterator<Item = (usize, u32)> + Clone) -> Result<(), CopyError> {
    let bytes = pending.clone().map(|(pages, size)| pages * size as usize).sum::<usize>();
    match bytes > LAST_BYTES {
        true => Err(CopyError::Changed(pending.map(|(pages, _)| pages).sum())),
        false => Ok(()),
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::SeqCst);
    }
}

/// The checksum of the first `record.pages` pages of a file, to be compared with that of the record. Calls `each` with
/// every chunk, in order.
///
/// # Errors
/// When the file cannot be read. An error of `each` ends the reading.
pub fn checksum(file: &File, record: &Record, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<u64> {
    let (mut done, mut sum, mut bytes) = (0, 0, Vec::new());
    while done < record.pages {
        read_chunk(file, record.page_size, record.pages, done, &mut bytes)?;
        sum ^= chunk_checksum(done, record.page_size, &bytes);
        each(&bytes)?;
        done += bytes.len() as u32 / record.page_size;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt, sync::atomic::AtomicU32};

    use super::*;

    const SIZE: u32 = 512;

    fn record(file: &File, pages: u32) -> Record {
        let mut record = Record { index: 9, page_size: SIZE, pages, checksum: 0 };
        record.checksum = checksum(file, &record, |_| Ok(())).unwrap();
        record
    }

    /// Copies while another thread writes without a pause, growing the database, as the database thread does.
    #[test]
    fn a_copy_under_load_is_the_database_at_its_end() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let pages = 6000;
        file.write_all_at(&vec![1; pages as usize * SIZE as usize], 0).unwrap();
        let (copy, tracking) = OnlineCopy::begin(Arc::clone(&file), SIZE, pages);
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let writer = std::thread::spawn({
            let (file, stop, rounds) = (Arc::clone(&file), Arc::clone(&stop), Arc::clone(&rounds));
            move || {
                let (mut size, mut round) = (pages, 0u32);
                while !stop.load(Ordering::SeqCst) {
                    round += 1;
                    let number = if round % 50 == 0 && size < 7000 {
                        size += 1;
                        size
                    } else {
                        round.wrapping_mul(2_654_435_761) % size + 1
                    };
                    let image = [(round % 251) as u8; SIZE as usize];
                    file.write_all_at(&image, u64::from(number - 1) * u64::from(SIZE)).unwrap();
                    tracking.note(number);
                    rounds.store(round, Ordering::SeqCst);
                }
                (tracking, size)
            }
        });
        let to = tempfile::tempfile().unwrap();
        let (mut done, mut bytes) = (0, Vec::new());
        while done < pages {
            copy.read(done, &mut bytes).unwrap();
            to.write_all_at(&bytes, u64::from(done) * u64::from(SIZE)).unwrap();
            done += bytes.len() as u32 / SIZE;
        }
        for _ in 0..3 {
            for number in copy.changed() {
                copy.read_page(number, &mut bytes).unwrap();
                to.write_all_at(&bytes, u64::from(number - 1) * u64::from(SIZE)).unwrap();
            }
        }
        let before = rounds.load(Ordering::SeqCst);
        while rounds.load(Ordering::SeqCst) < before + 100 {
            std::thread::yield_now();
        }
        stop.store(true, Ordering::SeqCst);
        let (tracking, size) = writer.join().unwrap();
        let record = record(&file, size);
        let finished = tracking.finish(&copy.id(), &file, record).unwrap();
        assert!(!finished.pages.is_empty(), "the last pass must have had something to do");
        for (number, image) in finished.pages {
            to.write_all_at(&image, u64::from(number - 1) * u64::from(SIZE)).unwrap();
        }
        assert_eq!(checksum(&to, &record, |_| Ok(())).unwrap(), record.checksum);
    }

    #[test]
    fn too_many_changes_stay_noted_and_an_end_is_seen() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let pages = LAST_BYTES as u32 / SIZE + 2;
        file.set_len(u64::from(pages * SIZE)).unwrap();
        let (copy, tracking) = OnlineCopy::begin(Arc::clone(&file), SIZE, pages);
        (2..=pages).for_each(|number| tracking.note(number));
        let record = record(&file, pages);
        let error = tracking.finish(&copy.id(), &file, record).unwrap_err();
        assert_eq!(error, CopyError::Changed(pages as usize - 1));
        assert_eq!(copy.changed(), (2..=pages).collect::<Vec<_>>());
        // Pages behind the end of a database that has shrunk are of no interest.
        tracking.note(pages + 5);
        assert!(tracking.finish(&copy.id(), &file, record).unwrap().pages.is_empty());
        let (other, _other) = OnlineCopy::begin(Arc::clone(&file), SIZE, pages);
        assert!(matches!(tracking.finish(&other.id(), &file, record), Err(CopyError::Ended(_))));
        assert!(tracking.is_wanted());
        drop(tracking);
        assert_eq!(copy.read(0, &mut Vec::new()).unwrap_err().kind(), io::ErrorKind::Interrupted);
    }
}
