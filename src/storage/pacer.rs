//! Keeps what is written in bulk from standing before the raft log at the disk: checkpoints, new segments, snapshots,
//! backups. Each of them writes a step, waits until the disk has it, and leaves the disk to others for a while. So a
//! sync of the raft log waits for one step at most, and not for all that happens to be dirty.
//!
//! A step is as large as the disk writes in [`STEP_TIME`], and smaller while the raft log's own syncs are slow. Must
//! never stop the work: a step has [`SMALLEST`] bytes at least, and the rests of a task end with its patience.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    ops::Range,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::libc::O_NOFOLLOW;

use super::{folder_of, fsync_dir, vfs};

/// Bounds of a step, in bytes.
pub const SMALLEST: u64 = 64 << 10;
pub const LARGEST: u64 = 1 << 20;
/// How long the disk may be busy with a step.
const STEP_TIME: Duration = Duration::from_millis(2);
/// A sync of the raft log that takes longer has waited for something.
const LOG_TIME: Duration = Duration::from_millis(2);
/// A step that took less found nothing to write, or hardly anything: there is nothing to rest from.
const NOTHING: Duration = Duration::from_micros(200);
/// A rest is as long as the step took; so many times as long while the raft log is slow.
const LONGER: u32 = 3;
const LONGEST_REST: Duration = Duration::from_millis(50);

/// Bytes of a removed file that are given back at once, and the rest after that: a disk may be busy with much space
/// that becomes free, too.
const FREED: u64 = 4 << 20;
const AFTER_FREED: Duration = Duration::from_millis(10);

/// How long the last sync of this process's raft log took, in microseconds.
static LOG: AtomicU64 = AtomicU64::new(0);

/// Notes how long a sync of the raft log took.
pub fn log_synced(took: Duration) {
    LOG.store(took.as_micros() as u64, Ordering::Relaxed);
}

/// The pace of one task.
#[derive(Debug)]
pub struct Pacer {
    /// Bytes of the next step.
    step: u64,
    /// What is left of all rests.
    patience: Duration,
    /// Somebody waits for the task: no more rests.
    hurry: Arc<AtomicBool>,
}

impl Pacer {
    /// Rests for `patience` in all at most.
    pub fn new(patience: Duration) -> Self {
        Self::until(patience, Arc::default())
    }

    /// Rests for `patience` in all at most, and never once `hurry` is true.
    pub fn until(patience: Duration, hurry: Arc<AtomicBool>) -> Self {
        Self { step: LARGEST, patience, hurry }
    }

    /// Has the disk write what is dirty in this part of a file, step by step. It is durable after a sync of the file,
    /// which has hardly anything left to do.
    ///
    /// # Errors
    /// When it could not be written. A later sync does not report that again: treat it as a failed sync.
    pub fn write_back(&mut self, file: &File, range: Range<u64>) -> io::Result<()> {
        self.in_steps(range, |from, bytes| vfs::write_back(file, from, bytes))
    }

    /// Calls `step` with the beginning and the length of one part after the other, and rests after each. It returns
    /// when the disk has the part.
    ///
    /// # Errors
    /// The first error of a step.
    pub fn in_steps(&mut self, range: Range<u64>, mut step: impl FnMut(u64, u64) -> io::Result<()>) -> io::Result<()> {
        let mut from = range.start;
        while from < range.end {
            let (bytes, begun) = (self.step.min(range.end - from), Instant::now());
            step(from, bytes)?;
            from += bytes;
            let rest = self.note(begun.elapsed(), Duration::from_micros(LOG.load(Ordering::Relaxed)));
            if !rest.is_zero() {
                thread::sleep(rest);
            }
        }
        Ok(())
    }

    /// Takes how long a step and the raft log's last sync took. Returns how long to rest.
    fn note(&mut self, took: Duration, log: Duration) -> Duration {
        let slow = log > LOG_TIME;
        self.step = match took {
            _ if took < NOTHING => self.step * 2,
            _ if slow || took > STEP_TIME => self.step / 2,
            _ if took < STEP_TIME / 2 => self.step * 2,
            _ => self.step,
        };
        self.step = self.step.clamp(SMALLEST, LARGEST);
        if took < NOTHING || self.hurry.load(Ordering::Relaxed) {
            return Duration::ZERO;
        }
        let rest = (took * if slow { LONGER } else { 1 }).min(LONGEST_REST).min(self.patience);
        self.patience -= rest;
        rest
    }
}

/// Removes a file durably, and then gives its space back step by step if it has no other name.
///
/// # Errors
/// When its name cannot be removed, or that cannot be made durable.
pub fn remove(path: &Path) -> io::Result<()> {
    // What cannot be opened is removed all the same.
    let file = OpenOptions::new().write(true).custom_flags(O_NOFOLLOW).open(path);
    fs::remove_file(path)?;
    // Before it is cut: after a crash the name may be there again.
    fsync_dir(folder_of(path))?;
    let Ok(file) = file else { return Ok(()) };
    let Ok(found) = file.metadata() else { return Ok(()) };
    let mut left = if found.is_file() && found.nlink() == 0 { found.len() } else { 0 };
    while left > FREED {
        left -= FREED;
        if file.set_len(left).is_err() {
            break; // the rest is given back when it is closed
        }
        thread::sleep(AFTER_FREED);
    }
    Ok(())
}

/// A new file that is written from its beginning to its end at a pace.
#[derive(Debug)]
pub struct PacedFile {
    file: File,
    pacer: Pacer,
    /// What was written, and not given to the disk yet.
    dirty: Range<u64>,
}

impl PacedFile {
    /// Takes an empty file.
    pub fn new(file: File, pacer: Pacer) -> Self {
        Self { file, pacer, dirty: 0..0 }
    }

    /// Makes all of it durable.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn sync_all(mut self) -> io::Result<()> {
        self.give()?;
        self.file.sync_all()
    }

    fn give(&mut self) -> io::Result<()> {
        self.pacer.write_back(&self.file, self.dirty.clone())?;
        self.dirty.start = self.dirty.end;
        Ok(())
    }
}

impl Write for PacedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.dirty.end += count as u64;
        if self.dirty.end - self.dirty.start >= self.pacer.step {
            self.give()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_micros(10);
    const FOREVER: Duration = Duration::MAX;

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn a_step_is_what_the_disk_writes_in_its_time_and_less_while_the_raft_log_is_slow() {
        let mut pacer = Pacer::new(FOREVER);
        assert_eq!(pacer.step, LARGEST);
        assert_eq!((pacer.note(ms(8), QUICK), pacer.step), (ms(8), LARGEST / 2));
        assert_eq!((pacer.note(ms(4), QUICK), pacer.step), (ms(4), LARGEST / 4));
        assert_eq!((pacer.note(ms(2), QUICK), pacer.step), (ms(2), LARGEST / 4), "as it should be");
        assert_eq!((pacer.note(ms(1), ms(30)), pacer.step), (ms(3), LARGEST / 8), "the raft log has waited");
        for _ in 0..20 {
            assert_eq!(pacer.note(Duration::from_secs(9), ms(900)), LONGEST_REST);
        }
        assert_eq!(pacer.step, SMALLEST, "however slow the disk is");
        assert_eq!((pacer.note(QUICK, ms(900)), pacer.step), (Duration::ZERO, 2 * SMALLEST), "nothing was there");
        for _ in 0..20 {
            pacer.note(Duration::from_micros(900), QUICK);
        }
        assert_eq!(pacer.step, LARGEST);
    }

    #[test]
    fn rests_end_when_patience_does_and_when_somebody_waits() {
        let mut pacer = Pacer::new(ms(70));
        let rests = [(); 4].map(|()| pacer.note(ms(300), QUICK));
        assert_eq!(rests, [ms(50), ms(20), Duration::ZERO, Duration::ZERO]);
        let hurry = Arc::new(AtomicBool::new(false));
        let mut pacer = Pacer::until(FOREVER, Arc::clone(&hurry));
        assert_eq!(pacer.note(ms(7), QUICK), ms(7));
        hurry.store(true, Ordering::Relaxed);
        assert_eq!((pacer.note(ms(7), QUICK), pacer.step), (Duration::ZERO, LARGEST / 4), "steps stay small");
    }

    #[test]
    fn only_what_has_no_other_name_is_cut_when_it_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let [one, other, link] = ["one", "other", "link"].map(|name| folder.path().join(name));
        let bytes = vec![7; 2 * FREED as usize + 1];
        fs::write(&one, &bytes).unwrap();
        fs::hard_link(&one, &other).unwrap();
        std::os::unix::fs::symlink(&other, &link).unwrap();
        remove(&one).unwrap();
        remove(&link).unwrap();
        assert!(!one.exists() && !link.exists() && fs::read(&other).unwrap() == bytes);
        let open = File::open(&other).unwrap();
        remove(&other).unwrap();
        assert_eq!((open.metadata().unwrap().len(), other.exists()), (1, false), "almost all is given back");
        assert_eq!(remove(&other).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_written_at_a_pace_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let bytes: Vec<u8> = (0..3 * LARGEST as usize + 77).map(|at| (at / 7) as u8).collect();
        let mut file = PacedFile::new(File::create(&path).unwrap(), Pacer::new(Duration::ZERO));
        for part in bytes.chunks(300_000) {
            file.write_all(part).unwrap();
            let waits = file.dirty.end - file.dirty.start;
            assert!(waits < LARGEST, "{waits} bytes are left to the last sync");
        }
        file.sync_all().unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes);
        // What is no file cannot be written back, and that is said.
        let (_, pipe) = io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
        assert!(Pacer::new(Duration::ZERO).write_back(&pipe, 0..1).is_err());
    }
}
