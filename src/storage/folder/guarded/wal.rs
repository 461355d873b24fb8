//! The WAL of a [`Guarded`] database: what the Console's VFS does at each write, one layer lower, where SQLite's locks
//! are not seen. Must never show anybody the header of a commit that has not passed.
//!
//! The kernel keeps what it has read and written of the file in its cache, and a later application recovers from that.
//! So whoever reads gets what was written, also a header that is held back; when a commit is refused, the kernel has to
//! forget its header.

use std::{fs::File, io, os::unix::fs::FileExt, sync::atomic::Ordering};

use super::{Guarded, Writer, code, doubt::Doubt};
use crate::{
    mutex::locked,
    storage::{
        capture::{Capture, Captured, Code, WalFile},
        checksum::{Preview, page_checksum},
        folder::{image, overlay::read_up_to},
        gate::Stop,
        parts::Parts,
        wal::{FRAME_HEADER, Step, WAL_HEADER},
        watch::{Act, Place, run},
    },
};

/// The `-wal` file of a database, below the folder.
struct Wal<'a>(&'a File);

impl Wal<'_> {
    /// True if these bytes are there already.
    fn has(&mut self, offset: u64, bytes: &[u8]) -> bool {
        let mut there = vec![0; bytes.len()];
        self.read_at(offset, &mut there).is_ok() && there == bytes
    }

    /// In bytes.
    fn length(&self) -> Result<u64, Code> {
        Ok(self.0.metadata().map_err(|error| code(&error))?.len())
    }
}

impl WalFile for Wal<'_> {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> Result<(), Code> {
        run(Place::Wal, Act::Read, || self.0.read_exact_at(bytes, offset)).map_err(|error| code(&error))
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Code> {
        run(Place::Wal, Act::Write, || self.0.write_all_at(bytes, offset)).map_err(|error| code(&error))
    }
}

/// What was written to the WAL and is not in its file yet. Whoever reads the file gets it, too: the kernel keeps what
/// it reads.
#[derive(Default)]
pub(super) struct Unwritten {
    /// The header of the committing frame.
    held: Option<(u64, [u8; FRAME_HEADER])>,
    /// The beginning of a unit.
    begun: Option<(u64, Vec<u8>)>,
}

impl Guarded {
    /// A write to its WAL. `forget` makes the kernel forget what it has cached of the file between two offsets: it has
    /// the header of a commit, which was refused.
    pub(in crate::storage::folder) fn wal_write(
        &self,
        wal: &File,
        offset: u64,
        bytes: &[u8],
        forget: &dyn Fn(u64, u64),
    ) -> Result<(), Stop> {
        let mut writer = locked(&self.writer);
        if writer.journal.is_hot() {
            return Err(self.refuse("a write to its WAL while it has a rollback journal"));
        }
        // One that nobody plays back, of a process that was killed when it had just begun.
        writer.journal.end();
        let page_size = match bytes.get(8..12) {
            Some(size) if offset == 0 && bytes.len() == WAL_HEADER => image::big_endian(size),
            _ => writer.capture.as_ref().map_or(0, Capture::page_size),
        };
        if page_size > 0 && locked(&self.pages).table.pages() == 0 {
            self.enter_whole(&mut writer)?;
        }
        if page_size == 0 || page_size != locked(&self.pages).table.page_size() {
            return Err(self.refuse("a WAL that does not fit to its database"));
        }
        let Writer { units, capture, transaction, .. } = &mut *writer;
        let capture = capture.get_or_insert_with(|| Capture::new(page_size));
        let whole = units.take(offset, bytes, page_size).map_err(|_| self.refuse("an unexpected write to its WAL"))?;
        let Some((at, unit)) = whole.map(|(at, unit)| (at, unit.to_vec())) else {
            let (start, begun) = units.pending();
            locked(&self.unwritten).begun = Some((start, begun.to_vec()));
            return Ok(());
        };
        units.clear();
        if page_size != capture.page_size() {
            *capture = Capture::new(page_size);
        }
        let result = self.wal_unit((capture, transaction), &mut Wal(wal), (at, &unit));
        let mut unwritten = locked(&self.unwritten);
        (unwritten.held, unwritten.begun) = (capture.held_header(), None);
        drop(unwritten);
        result.inspect_err(|_| {
            if at > WAL_HEADER as u64 {
                forget(at - FRAME_HEADER as u64, offset);
            }
        })
    }

    /// A whole header or page of the WAL.
    fn wal_unit(
        &self,
        (capture, transaction): (&mut Capture, &mut u64),
        file: &mut Wal<'_>,
        (at, unit): (u64, &[u8]),
    ) -> Result<(), Stop> {
        let settled = capture.is_settled();
        capture.infer_end(at, unit.len());
        if settled && !capture.is_settled() && at != 0 {
            // Whoever writes behind a transaction has seen it.
            locked(&self.pages).doubt = None;
        }
        if capture.is_settled() {
            if file.has(at, unit) {
                // Checksums that are right already.
                capture.came_again(at, unit.len());
                return Ok(());
            }
            let frame = capture.written_over(at, unit.len()).map_err(|violation| self.broken(&violation))?;
            self.take_back((capture, transaction), file)?;
            capture.reopen(frame, unit.len() == FRAME_HEADER);
        }
        if at == 0 && !locked(&self.pages).behind.is_empty() {
            // For whoever begins it anew, all that it had is in the database.
            if !locked(&self.pages).is_before_copied() {
                return Err(self.broken(&"its WAL begins anew, and not all of it is in the database"));
            }
            self.take_back((capture, transaction), file)?;
        }
        let step = capture.note(at, unit).map_err(|violation| self.refuse(&violation.to_string()))?;
        self.passage.check()?;
        let committing = match step {
            Step::Hold => {
                let length = file.length()?;
                let Some(data) = capture.completed_by_header(file, length)? else { return Ok(()) };
                // For whoever recovers the WAL, this header commits.
                self.commit_wal((capture, transaction), file, &data)
            }
            Step::Commit => self.commit_wal((capture, transaction), file, unit),
            Step::Pass => return Ok(file.write_at(at, unit)?),
            Step::Restart => {
                file.write_at(at, unit)?;
                let mut pages = locked(&self.pages);
                (pages.in_wal, pages.doubt) = (false, None);
                return Ok(());
            }
        };
        if committing.is_err() {
            // What was refused never comes back: its header is dropped.
            capture.end();
        }
        committing
    }

    fn commit_wal(
        &self,
        (capture, transaction): (&mut Capture, &mut u64),
        file: &mut Wal<'_>,
        data: &[u8],
    ) -> Result<(), Stop> {
        let Some(id) = self.id() else { return Err(self.refuse("a WAL of a database without content")) };
        if capture.sum_again(file, data)? {
            self.stale.store(true, Ordering::SeqCst);
        }
        let before = capture.committed();
        let captured = capture.complete(file, data)?;
        *transaction += 1;
        let mut parts = Parts::new(id, *transaction, capture.page_size(), captured.count());
        capture.pages(&captured, file, data, |number, image| {
            parts.push(number, image).map_or(Ok(()), |full| self.passage.propose(full, false).map(|_| ()))
        })?;
        let preview = parts.preview(&locked(&self.pages).table, captured.database_pages());
        let lock_page = self.lock_byte / capture.page_size() + 1;
        if let Some(hole) = preview.holes.iter().find(|number| **number != lock_page) {
            return Err(self.refuse(&format!("it would grow over page {hole} without writing it")));
        }
        let part = parts.finish(&preview);
        let index = self.passage.propose(part, true)?;
        self.committed(&captured, preview, index, before);
        capture.commit(&captured, file).map_err(|code| self.broken(&code))
    }

    fn committed(&self, captured: &Captured, preview: Preview, index: u64, before: u32) {
        let mut pages = locked(&self.pages);
        let doubt = Doubt::new(&pages.table, &pages.behind, (captured.numbers(), preview.pages), before);
        pages.accept(preview, index, true);
        pages.behind.extend(captured.numbers());
        (pages.in_wal, pages.doubt) = (true, Some(doubt));
    }

    /// Takes back the last transaction of its WAL: its writer was killed before SQLite's other processes could see it,
    /// and so nobody was told of it. They go on from what was before it, and so do all members.
    ///
    /// # Errors
    /// As a commit. Fenced when it may have been seen, or what was before it is not to be found.
    fn take_back(&self, (capture, transaction): (&Capture, &mut u64), file: &mut Wal<'_>) -> Result<(), Stop> {
        let doubt = locked(&self.pages).doubt.clone();
        let lost = |what: &str| self.broken(&format_args!("its WAL goes on before the last transaction: {what}"));
        let (Some(doubt), Some(id)) = (doubt, self.id()) else { return Err(lost("that was seen already")) };
        // Otherwise the WAL is damaged, and whoever has recovered it has not found what others had seen.
        if !capture.is_recoverable(file, doubt.frames)? {
            return Err(lost("it is damaged"));
        }
        *transaction += 1;
        let mut parts = Parts::new(id, *transaction, capture.page_size(), doubt.before.len());
        let frames = capture.frames_of_pages(file, doubt.frames)?;
        let mut image = vec![0; capture.page_size() as usize];
        let lock_page = self.lock_byte / capture.page_size() + 1;
        for old in doubt.before.iter().filter(|old| old.number != lock_page) {
            match frames.get(&old.number) {
                Some(frame) => capture.read_page(file, *frame, &mut image)?,
                None => {
                    let offset = u64::from(old.number - 1) * u64::from(capture.page_size());
                    let count = read_up_to(&self.file, offset, &mut image).map_err(|error| Stop::File(code(&error)))?;
                    image[count..].fill(0);
                }
            }
            if page_checksum(old.number, &image) != old.checksum {
                return Err(lost("what was before it is not there"));
            }
            if let Some(full) = parts.push_summed(old.number, old.checksum, &image) {
                self.passage.propose(full, false)?;
            }
        }
        let preview = parts.preview(&locked(&self.pages).table, doubt.pages);
        if preview.checksum != doubt.checksum {
            return Err(lost("what was before it is something else"));
        }
        let part = parts.finish(&preview);
        let index = self.passage.propose(part, true)?;
        tracing::info!(
            "{}: a process was killed inside of its commit, before others could see it: taken back",
            self.path.display()
        );
        locked(&self.pages).take_back(preview, index);
        Ok(())
    }

    /// Fills `bytes` with what its WAL has at `offset`, as its application has written it.
    pub(in crate::storage::folder) fn wal_read(&self, wal: &File, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        // Before the file is read: what is written to it meanwhile is still here then.
        let unwritten = locked(&self.unwritten);
        let mut count = read_up_to(wal, offset, bytes)?;
        bytes[count..].fill(0);
        let held = unwritten.held.as_ref().map(|(at, header)| (*at, &header[..]));
        let begun = unwritten.begun.as_ref().map(|(at, begun)| (*at, begun.as_slice()));
        for (start, content) in [held, begun].into_iter().flatten() {
            let (from, to) = (start.max(offset), (start + content.len() as u64).min(offset + bytes.len() as u64));
            if from < to {
                let target = (from - offset) as usize..(to - offset) as usize;
                bytes[target.clone()].copy_from_slice(&content[(from - start) as usize..(to - start) as usize]);
                count = count.max(target.end);
            }
        }
        Ok(count)
    }

    /// True once after a commit of whose WAL the kernel may have other checksums in its cache than the file: whoever
    /// opens it then must not read from the cache.
    pub(in crate::storage::folder) fn is_wal_stale(&self) -> bool {
        self.stale.swap(false, Ordering::SeqCst)
    }

    /// Lets its WAL be cut to `size`, or be removed (0), if the file has all that is cut off.
    pub(in crate::storage::folder) fn may_cut_wal(&self, size: u64) -> Result<(), Stop> {
        let mut writer = locked(&self.writer);
        self.passage.check()?;
        let mut pages = locked(&self.pages);
        let used = writer.capture.as_ref().map_or(0, Capture::committed_bytes);
        if !pages.behind.is_empty() && size < used {
            return Err(self.refuse("its WAL has transactions that no checkpoint has copied, and cannot be removed"));
        }
        if size < used {
            (writer.capture, pages.in_wal, pages.doubt) = (None, false, None);
        }
        Ok(())
    }
}
