//! This host's copy of all databases at one raft index, each into a file of its own: on the PRIMARY as of a moment
//! while everybody writes, on a SECONDARY from the files that go on changing. Takes its time, so that others get
//! theirs. Must never call a copy whole that does not have the checksum which all members agree on.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, ErrorKind},
    ops::Range,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::{
    BackupError,
    archive::Digest,
    blocking,
    folder::{Workshop, create},
    jobs::Job,
};
use crate::{
    node::Handle,
    storage::{
        checkpoint::Record,
        folder::catalogue::Catalogue,
        online_copy::{CopyError, FinishedCopy, FinishedWhole, OnlineCopy, WholeCopy, checksum},
        pacer::{self, Pacer},
        snapshot::Whole,
        transaction::CONSOLE_DATABASE,
    },
};

/// How often a copy is begun again after a change of the role or a necessary checkpoint ended it, and how long the
/// pause is.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);
/// How often pages that have changed are read again before the copy is given up.
const PASSES: u32 = 100;
/// Longest pause after one piece of work.
const LONGEST_REST: Duration = Duration::from_millis(250);

/// Leaves the disk and the processor to others for as long as it has used them.
pub(super) struct Pace(Instant);

impl Pace {
    pub fn new() -> Self {
        Self(Instant::now())
    }

    /// To be called after each piece of about a megabyte, on a thread of its own.
    pub fn rest(&mut self) {
        std::thread::sleep(self.0.elapsed().min(LONGEST_REST));
        self.0 = Instant::now();
    }
}

/// A copy of a database, verified by its checksum.
#[derive(Debug)]
pub(super) struct Copied {
    pub record: Record,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

/// Copies of all databases, as of one raft index.
#[derive(Debug)]
pub(super) struct CopiedAll {
    pub catalogue: Catalogue,
    /// By their ids: the Console's, and those of the catalogue.
    pub databases: BTreeMap<u32, Copied>,
}

/// Where the copy of a database lies in the workshop.
pub(super) fn place(workshop: &Workshop, id: u32) -> PathBuf {
    match id {
        CONSOLE_DATABASE => workshop.join("copy.db"),
        id => workshop.join(&format!("copy-{id}.db")),
    }
}

/// The files of one attempt, by the ids of the databases.
type Files = BTreeMap<u32, Arc<File>>;

/// What all databases are at one raft index.
type Records = BTreeMap<u32, Record>;

/// Copies all databases to new files in the workshop. `room` is asked whether there is room for so many bytes.
pub(super) async fn copy(
    node: &Handle,
    workshop: &Arc<Workshop>,
    job: &Arc<Job>,
    room: &(dyn Fn(u64) -> Result<(), BackupError> + Sync),
) -> Result<CopiedAll, BackupError> {
    let mut tries = 0;
    let (catalogue, records, files) = loop {
        let serves = node.status().borrow().serving().is_some();
        let result = if serves {
            of_primary(node, workshop, job, room).await
        } else {
            of_secondary(node, workshop, job, room).await
        };
        match result {
            Ok(copied) => break copied,
            Err(Stop::Failed(error)) => return Err(error),
            Err(Stop::Again(why)) if tries == TRIES => {
                return Err(BackupError::Refused(format!("the databases could not be copied: {why}")));
            }
            Err(Stop::Again(why)) => {
                tracing::info!(reason = why, "the copy for a backup is begun again");
                tries += 1;
                tokio::time::sleep(PAUSE).await;
            }
        }
    };
    job.step("checks the copy", records.values().map(bytes).sum());
    let (job, workshop) = (Arc::clone(job), Arc::clone(workshop));
    blocking(move || {
        let verified = files
            .iter()
            .zip(records)
            .map(|((id, file), (_, record))| Ok((*id, verify(file, &record, &place(&workshop, *id), &job)?)));
        Ok(CopiedAll { catalogue, databases: verified.collect::<Result<_, BackupError>>()? })
    })
    .await
}

/// New files for these databases.
fn create_files(workshop: &Workshop, ids: impl Iterator<Item = u32>) -> Result<Files, Stop> {
    let create = |id| {
        let path = place(workshop, id);
        // Of an attempt that was given up.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(BackupError::io("delete", &path)(error)),
            _ => {}
        }
        Ok((id, Arc::new(create(&path)?)))
    };
    ids.map(create).collect::<Result<_, _>>().map_err(Stop::Failed)
}

/// Why there is no copy this time.
enum Stop {
    Again(String),
    Failed(BackupError),
}

impl From<CopyError> for Stop {
    fn from(error: CopyError) -> Self {
        Self::Again(error.to_string())
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::Interrupted => Self::Again(error.to_string()),
            _ => Self::Failed(BackupError::Refused(format!("the databases could not be copied: {error}"))),
        }
    }
}

fn bytes(record: &Record) -> u64 {
    u64::from(record.pages) * u64::from(record.page_size)
}

/// Copies what the PRIMARY has at one raft index, while everybody writes.
async fn of_primary(
    node: &Handle,
    workshop: &Workshop,
    job: &Arc<Job>,
    room: &(dyn Fn(u64) -> Result<(), BackupError> + Sync),
) -> Result<(Catalogue, Records, Files), Stop> {
    let (manifest, whole) = node.snapshot(None).await.map_err(|error| Stop::Again(error.to_string()))?;
    let records: Records = manifest.contents().collect();
    room(manifest.bytes()).map_err(Stop::Failed)?;
    let files = create_files(workshop, records.keys().copied())?;
    job.step("copies the databases", manifest.bytes());
    let (to, job) = (files.clone(), Arc::clone(job));
    on_thread(move || read_whole(&whole, &to, &job)).await?;
    Ok((manifest.service.catalogue, records, files))
}

fn read_whole(whole: &Whole, files: &Files, job: &Job) -> io::Result<()> {
    // Both are in the order of the ids.
    for (resting, file) in whole.all().zip(files.values()) {
        let record = resting.record();
        read_all((record.pages, record.page_size), |done, chunk| resting.read(done, chunk).map(|_| ()), file, job)?;
    }
    Ok(())
}

async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, Stop> {
    Ok(tokio::task::spawn_blocking(work).await.map_err(io::Error::other)??)
}

/// Writes all pages to the file, as `read` gives the next ones behind a page.
fn read_all(
    (pages, page_size): (u32, u32),
    mut read: impl FnMut(u32, &mut Vec<u8>) -> io::Result<()>,
    file: &File,
    job: &Job,
) -> io::Result<()> {
    let mut out = Output::new(file, page_size);
    let (mut done, mut chunk, mut pace) = (0, Vec::new(), Pace::new());
    file.set_len(0)?;
    while done < pages {
        read(done, &mut chunk)?;
        out.write(done + 1, &chunk)?;
        done += chunk.len() as u32 / page_size;
        job.advance(chunk.len() as u64);
        pace.rest();
    }
    Ok(())
}

/// Copies what a SECONDARY has, while its files go on changing.
async fn of_secondary(
    node: &Handle,
    workshop: &Workshop,
    job: &Arc<Job>,
    room: &(dyn Fn(u64) -> Result<(), BackupError> + Sync),
) -> Result<(Catalogue, Records, Files), Stop> {
    let copy = Arc::new(node.begin_copy().await?);
    let size = |copy: &OnlineCopy| u64::from(copy.pages()) * u64::from(copy.page_size());
    let total = copy.databases.values().map(size).sum();
    room(total).map_err(Stop::Failed)?;
    let files = create_files(workshop, copy.databases.keys().copied())?;
    job.step("copies the databases", total);
    {
        let (copy, files, job) = (Arc::clone(&copy), files.clone(), Arc::clone(job));
        on_thread(move || read_copies(&copy, &files, &job)).await?;
    }
    for _ in 0..PASSES {
        match node.finish_copy(&copy).await {
            Ok(finished) => {
                let to = files.clone();
                let records = on_thread(move || write_ends(&finished, &to)).await?;
                return Ok((copy.catalogue.clone(), records, files));
            }
            Err(CopyError::Changed(_)) => {
                let (copy, files) = (Arc::clone(&copy), files.clone());
                on_thread(move || read_changes(&copy, &files)).await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let why = "the databases change faster than they can be copied: try again when there are fewer writes";
    Err(Stop::Failed(BackupError::Refused(why.to_owned())))
}

fn read_copies(copy: &WholeCopy, files: &Files, job: &Job) -> io::Result<()> {
    let mut all = copy.databases.values().zip(files.values());
    all.try_for_each(|(copy, file)| {
        read_all((copy.pages(), copy.page_size()), |done, chunk| copy.read(done, chunk), file, job)
    })
}

fn read_changes(copy: &WholeCopy, files: &Files) -> io::Result<()> {
    copy.databases.values().zip(files.values()).try_for_each(|(copy, file)| read_changed(copy, file))
}

fn write_ends(finished: &FinishedWhole, files: &Files) -> io::Result<Records> {
    let all = finished.iter().zip(files.values());
    all.map(|((id, finished), file)| Ok((*id, write_last(finished, file)?))).collect()
}

/// Reads again the pages that have changed. Without a pause: the fewer change meanwhile, the sooner this ends.
fn read_changed(copy: &OnlineCopy, file: &File) -> io::Result<()> {
    let mut out = Output::new(file, copy.page_size());
    let mut image = Vec::new();
    for number in copy.changed() {
        copy.read_page(number, &mut image)?;
        out.write(number, &image)?;
    }
    Ok(())
}

fn write_last(finished: &FinishedCopy, file: &File) -> io::Result<Record> {
    let mut out = Output::new(file, finished.record.page_size);
    for (number, image) in &finished.pages {
        out.write(*number, image)?;
    }
    file.set_len(bytes(&finished.record))?;
    Ok(finished.record)
}

/// The file that the copy goes to.
struct Output<'a> {
    file: &'a File,
    page_size: u64,
    /// Without rests: whoever copies takes them ([`Pace`]).
    pacer: Pacer,
    /// Bytes that the disk does not have yet, and what they are among.
    pending: u64,
    among: Option<Range<u64>>,
}

impl<'a> Output<'a> {
    fn new(file: &'a File, page_size: u32) -> Self {
        let pacer = Pacer::new(Duration::ZERO);
        Self { file, page_size: u64::from(page_size), pacer, pending: 0, among: None }
    }

    /// Writes pages from this number on.
    fn write(&mut self, number: u32, pages: &[u8]) -> io::Result<()> {
        let (from, bytes) = (u64::from(number - 1) * self.page_size, pages.len() as u64);
        self.file.write_all_at(pages, from)?;
        self.pending += bytes;
        let before = self.among.take().unwrap_or(from..from);
        let Range { start, end } = before.start.min(from)..before.end.max(from + bytes);
        self.among = Some(start..end);
        if self.pending >= pacer::LARGEST {
            (self.pending, self.among) = (0, None);
            self.pacer.write_back(self.file, start..end)?;
            // What the disk has leaves the page cache. An error costs memory, and no more.
            let (at, length) = (start as i64, (end - start) as i64);
            let _ = posix_fadvise(self.file, at, length, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
        Ok(())
    }
}

/// Reads the copy again: it must have the checksum that the members agreed on at its index.
fn verify(file: &File, record: &Record, path: &std::path::Path, job: &Job) -> Result<Copied, BackupError> {
    let (mut digest, mut pace) = (Digest::new(), Pace::new());
    let found = checksum(file, record, |chunk| {
        digest.add(chunk);
        job.advance(chunk.len() as u64);
        pace.rest();
        Ok(())
    });
    let found = found.map_err(BackupError::io("read", path))?;
    if found != record.checksum {
        return Err(BackupError::Damaged(format!(
            "this host's copy of the database has the checksum {found:016x} at index {}, and the cluster agreed on {:016x}: look \
             for faults of its disk, and remove this member and let it join again",
            record.index, record.checksum
        )));
    }
    Ok(Copied { record: *record, sha256: digest.finish() })
}
