//! A [`Guarded`] database that is read as of one moment while its application goes on: what the file has of it, what
//! only its WAL has, and what the file loses from then on. Must never keep the application waiting for longer than it
//! takes to copy what is in the WAL.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::FileExt,
    sync::{Arc, MutexGuard, TryLockError},
};

use super::{Guarded, Pages, Writer, tempfile_in};
use crate::{
    mutex::locked,
    storage::{
        capture::Capture,
        checkpoint::Record,
        checksum::page_checksum,
        folder::image,
        snapshot::Kept,
        wal::{FRAME_HEADER, WAL_HEADER},
        watch::{Act, Place, run},
    },
};

/// A database in which nothing is committed until this is dropped.
pub(in crate::storage::folder) struct Still<'a> {
    guarded: &'a Guarded,
    writer: MutexGuard<'a, Writer>,
}

impl Guarded {
    /// Keeps its transactions from committing; none while one does.
    pub(in crate::storage::folder) fn hold_still(&self) -> Option<Still<'_>> {
        match self.writer.try_lock() {
            Ok(writer) => Some(Still { guarded: self, writer }),
            Err(TryLockError::Poisoned(poisoned)) => Some(Still { guarded: self, writer: poisoned.into_inner() }),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl Still<'_> {
    /// Which database it is; none if no member knows of it.
    pub fn id(&self) -> Option<u32> {
        self.guarded.id().filter(|_| !self.guarded.is_gone())
    }

    /// True if this is that database.
    pub fn is(&self, guarded: &Guarded) -> bool {
        std::ptr::eq(self.guarded, guarded)
    }

    /// The raft index of its last transaction.
    pub fn index(&self) -> u64 {
        locked(&self.guarded.pages).index
    }

    /// Has what it is now kept for a reader, who may say that it is as of `index`. `wal` opens its WAL. An earlier
    /// reader's is not kept any more.
    ///
    /// # Errors
    /// When the WAL cannot be read, or a file cannot be made for what is kept.
    pub fn keep(&self, index: u64, wal: impl FnOnce() -> io::Result<File>) -> io::Result<(Record, Arc<Kept>)> {
        let mut pages = locked(&self.guarded.pages);
        let (page_size, checksum) = (pages.table.page_size(), pages.table.checksum());
        let record = Record { index, page_size, pages: pages.table.pages(), checksum };
        let aside = tempfile_in(&self.guarded.spill)?;
        let kept = Arc::new(Kept::new(Arc::clone(&self.guarded.file), record, aside));
        if !pages.behind.is_empty() {
            let committed = self.writer.capture.as_ref().map_or(0, Capture::committed_bytes);
            copy_newest(&wal()?, committed, &pages, &kept)?;
        }
        if let Some(earlier) = pages.kept.upgrade() {
            earlier.break_off();
        }
        pages.kept = Arc::downgrade(&kept);
        Ok((record, kept))
    }
}

/// Lays aside the pages that only the WAL has: of each its last committed frame.
fn copy_newest(wal: &File, committed: u64, pages: &Pages, kept: &Kept) -> io::Result<()> {
    let page_size = pages.table.page_size();
    let frame = FRAME_HEADER as u64 + u64::from(page_size);
    let newest = newest_frames(wal, committed, frame, &pages.behind)?;
    let mut image = vec![0; page_size as usize];
    for number in &pages.behind {
        let at = newest.get(number).ok_or_else(|| lost(*number))?;
        read_at(wal, &mut image, at + FRAME_HEADER as u64)?;
        if pages.table.get(*number) != Some(page_checksum(*number, &image)) {
            return Err(lost(*number));
        }
        kept.lay_aside(*number, &image)?;
    }
    Ok(())
}

/// Where the last frame of each wanted page begins.
fn newest_frames(wal: &File, committed: u64, frame: u64, wanted: &BTreeSet<u32>) -> io::Result<BTreeMap<u32, u64>> {
    let (mut newest, mut at, mut number) = (BTreeMap::new(), WAL_HEADER as u64, [0; 4]);
    while at + frame <= committed {
        read_at(wal, &mut number, at)?;
        let number = image::big_endian(&number);
        if wanted.contains(&number) {
            newest.insert(number, at);
        }
        at += frame;
    }
    Ok(newest)
}

fn read_at(wal: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    run(Place::Wal, Act::Read, || wal.read_exact_at(bytes, at))
}

fn lost(number: u32) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("its WAL does not have the last content of page {number}"))
}
