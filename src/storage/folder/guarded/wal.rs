//! The WAL of a [`Guarded`] database: what the Console's VFS does at each write, one layer lower, where SQLite's locks
//! are not seen. Must never show anybody the header of a commit that has not passed.
//!
//! The kernel keeps what it has read and written of the file in its cache, and a later application recovers from that.
//! So whoever reads gets what was written, also a header that is held back; when a commit is refused, the kernel has to
//! forget its header.

use std::{fs::File, io, os::unix::fs::FileExt};

use super::{Guarded, Writer, code};
use crate::{
    mutex::locked,
    storage::{
        capture::{Capture, Captured, Code, WalFile},
        checksum::Preview,
        folder::{image, overlay::read_up_to},
        gate::Stop,
        parts::Parts,
        wal::{FRAME_HEADER, Step, WAL_HEADER},
        watch::{Act, Place, run},
    },
};

/// The `-wal` file of a database, below the folder.
struct Wal<'a>(&'a File);

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
        if writer.journal.is_live() {
            return Err(self.refuse("a write to its WAL while it has a rollback journal"));
        }
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
        capture.infer_end(at, unit.len());
        let settled = capture.is_settled();
        let step = capture.note(at, unit).map_err(|violation| match settled {
            // Somebody writes over what a majority has: whoever committed it has died before others could see it.
            true => self.broken(&violation),
            false => self.refuse(&violation.to_string()),
        })?;
        if !settled {
            self.passage.check()?;
        }
        match step {
            Step::Hold => Ok(()),
            Step::Commit => {
                let committed = self.commit_wal((capture, transaction), file, unit);
                if committed.is_err() {
                    // What was refused never comes back: its header is dropped.
                    capture.end();
                }
                committed
            }
            Step::Pass => file.write_at(at, unit).map_err(|code| match settled {
                true => self.broken(&code),
                false => Stop::File(code),
            }),
            Step::Restart => {
                file.write_at(at, unit)?;
                locked(&self.pages).in_wal = false;
                Ok(())
            }
        }
    }

    fn commit_wal(
        &self,
        (capture, transaction): (&mut Capture, &mut u64),
        file: &mut Wal<'_>,
        data: &[u8],
    ) -> Result<(), Stop> {
        let captured = capture.complete(file, data)?;
        let Some(id) = self.id() else { return Err(self.refuse("a WAL of a database without content")) };
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
        self.committed(&captured, preview, index);
        capture.commit(&captured, file).map_err(|code| self.broken(&code))
    }

    fn committed(&self, captured: &Captured, preview: Preview, index: u64) {
        let mut pages = locked(&self.pages);
        pages.accept(preview, index, true);
        pages.behind.extend(captured.numbers());
        pages.in_wal = true;
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
            (writer.capture, pages.in_wal) = (None, false);
        }
        Ok(())
    }
}
