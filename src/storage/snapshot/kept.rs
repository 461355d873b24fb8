//! What a database file had at one moment, while it goes on changing. Whoever changes it first lays aside the pages
//! that it had; whoever reads takes those before what the file has by now. Owns what is laid aside. Must never keep a
//! writer from writing: when there is no more room, the reader begins again.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::FileExt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    mutex::locked,
    storage::{
        checkpoint::Record,
        checksum::{read_chunk, read_pages},
        watch::{Act, Place, run},
    },
};

/// Bytes that may be laid aside for a small database. A larger one may have as many as it has itself.
const LEAST_ROOM: u64 = 64 << 20;

/// One database at one moment.
#[derive(Debug)]
pub(in crate::storage) struct Kept {
    file: Arc<File>,
    record: Record,
    aside: Mutex<Aside>,
    broken: AtomicBool,
}

/// Pages in a file without a name.
#[derive(Debug)]
struct Aside {
    slots: BTreeMap<u32, u64>,
    file: File,
}

impl Kept {
    /// Of a file that has what `record` says, but for what is laid aside next. `aside` is empty, and has no name.
    pub fn new(file: Arc<File>, record: Record, aside: File) -> Self {
        let aside = Mutex::new(Aside { slots: BTreeMap::new(), file: aside });
        Self { file, record, aside, broken: AtomicBool::new(false) }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// True once something is lost of what the file had.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// Nobody lays anything aside any more.
    pub fn break_off(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }

    /// Lays a page aside that the file does not have.
    ///
    /// # Errors
    /// When it cannot be written: nobody may read this.
    pub fn lay_aside(&self, number: u32, image: &[u8]) -> io::Result<()> {
        locked(&self.aside).add(number, image)
    }

    /// To be called before these bytes of the file change, each time, by whoever changes them.
    pub fn before_change(&self, offset: u64, length: u64) {
        let size = u64::from(self.record.page_size).max(1);
        let first = offset / size + 1;
        let last = offset.saturating_add(length).div_ceil(size).min(u64::from(self.record.pages));
        if self.is_broken() || first > last {
            return;
        }
        let mut aside = locked(&self.aside);
        // Within the pages of the database, whose numbers have 32 bits.
        let kept = (first as u32..=last as u32).try_for_each(|number| self.keep(&mut aside, number));
        if let Err(error) = kept {
            tracing::debug!(%error, "what a database had cannot be laid aside: whoever reads it begins again");
            self.break_off();
        }
    }

    /// To be called before the file gets this size.
    pub fn before_resize(&self, size: u64) {
        self.before_change(size, u64::MAX);
    }

    fn keep(&self, aside: &mut Aside, number: u32) -> io::Result<()> {
        if aside.slots.contains_key(&number) {
            return Ok(());
        }
        let size = u64::from(self.record.page_size);
        let room = LEAST_ROOM.max(size * u64::from(self.record.pages));
        if (aside.slots.len() as u64 + 1) * size > room {
            return Err(ErrorKind::StorageFull.into());
        }
        let mut image = Vec::new();
        read_pages(&self.file, self.record.page_size, number - 1, 1, &mut image)?;
        aside.add(number, &image)
    }

    /// Reads the next pages after page `done`, as they were: at most [`CHUNK`](super::CHUNK) bytes, none at the end.
    pub(super) fn read_chunk(&self, done: u32, bytes: &mut Vec<u8>) -> io::Result<()> {
        let Record { page_size, pages, .. } = self.record;
        read_chunk(&self.file, page_size, pages, done, bytes)?;
        // After the file: what changes meanwhile is laid aside before it changes.
        let aside = locked(&self.aside);
        let page = page_size as usize;
        let count = (bytes.len() / page) as u32;
        for (number, slot) in aside.slots.range(done + 1..done + 1 + count) {
            let at = (number - done - 1) as usize * page;
            let image = &mut bytes[at..at + page];
            run(Place::Database, Act::Read, || aside.file.read_exact_at(image, slot * u64::from(page_size)))?;
        }
        Ok(())
    }
}

impl Aside {
    fn add(&mut self, number: u32, image: &[u8]) -> io::Result<()> {
        let slot = self.slots.len() as u64;
        run(Place::Database, Act::Write, || self.file.write_all_at(image, slot * image.len() as u64))?;
        self.slots.insert(number, slot);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::snapshot::{CheckpointHold, Resting, chunk_checksum};

    const PAGES: u32 = 5000;

    fn begin(pages: u32) -> (Arc<File>, Arc<Kept>, Vec<u8>, Record) {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let image: Vec<u8> = (0..pages as usize * 512).map(|at| (at / 5) as u8).collect();
        file.write_all_at(&image, 0).unwrap();
        let record = Record { index: 9, page_size: 512, pages, checksum: chunk_checksum(0, 512, &image) };
        let kept = Kept::new(Arc::clone(&file), record, tempfile::tempfile().unwrap());
        (file, Arc::new(kept), image, record)
    }

    fn read(resting: &Resting) -> io::Result<(Vec<u8>, u64)> {
        let (mut all, mut sum, mut bytes, mut done) = (Vec::new(), 0, Vec::new(), 0);
        while done < resting.record().pages {
            sum ^= resting.read(done, &mut bytes)?;
            done += bytes.len() as u32 / 512;
            all.extend_from_slice(&bytes);
        }
        Ok((all, sum))
    }

    #[test]
    fn what_was_there_is_read_while_everything_changes() {
        let (file, kept, mut image, mut record) = begin(PAGES);
        // A page whose newest content is elsewhere when it begins.
        image[511 * 512..512 * 512].fill(77);
        record.checksum = chunk_checksum(0, 512, &image);
        kept.lay_aside(512, &image[511 * 512..512 * 512]).unwrap();
        let resting = Resting::of_kept(Arc::clone(&kept), record, CheckpointHold::default());
        let writer = std::thread::spawn(move || {
            for round in 0..3u8 {
                for number in (0..PAGES).rev().step_by(3) {
                    let offset = u64::from(number) * 512;
                    kept.before_change(offset, 512);
                    file.write_all_at(&[round; 512], offset).unwrap();
                }
                let size = u64::from(PAGES / 2 + u32::from(round)) * 512;
                kept.before_resize(size);
                file.set_len(size).unwrap();
                // Behind what it had: of no interest.
                kept.before_change(u64::from(PAGES) * 512, 1 << 20);
                file.write_all_at(&vec![9; 1 << 20], u64::from(PAGES) * 512).unwrap();
            }
        });
        let while_it_changes = read(&resting).unwrap();
        writer.join().unwrap();
        for (found, sum) in [while_it_changes, read(&resting).unwrap()] {
            assert!(found == image && sum == record.checksum);
        }
    }

    #[test]
    fn a_reader_that_cannot_have_all_begins_again_and_the_writer_goes_on() {
        let (_, kept, ..) = begin(9);
        let nowhere = File::open("/dev/null").unwrap();
        let (file, _, _, record) = begin(9);
        let full = Arc::new(Kept::new(file, record, nowhere));
        let resting = Resting::of_kept(Arc::clone(&full), record, CheckpointHold::default());
        read(&resting).unwrap();
        full.before_change(512, 1);
        assert!(full.is_broken() && resting.is_broken());
        assert_eq!(read(&resting).unwrap_err().kind(), ErrorKind::Interrupted);
        // The end of the Console's rest is the end of all.
        let hold = CheckpointHold::default();
        let resting = Resting::of_kept(kept, record, hold.clone());
        read(&resting).unwrap();
        hold.break_off();
        assert_eq!(read(&resting).unwrap_err().kind(), ErrorKind::Interrupted);
    }
}
