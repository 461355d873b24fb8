//! The background scrub: reads the database file again, slowly and from the disk, so that damage is found before the
//! file is needed. A thread of its own reads; the database thread checks what was read, because only it knows what the
//! pages have to be. Must never write, and never make the database thread wait for a disk.

use std::{
    fs::File,
    io::{self, ErrorKind},
    sync::{
        Arc,
        mpsc::{SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::{debug, info};

use crate::{
    scheduling,
    storage::{
        database::{Database, Scrubbable},
        scrub::{from_disk, page_checksums},
        snapshot::Resting,
    },
    telemetry::{SCRUB_PROGRESS, SCRUB_SUCCESS, note_now},
};

/// Bytes that are read at a time.
const CHUNK: u32 = 1 << 20;
/// Shortest pause between two chunks, for about 32 MiB a second.
const PACE: Duration = Duration::from_millis(30);
/// A longer one is so many times as long as the last chunk took: others get most of a busy disk.
const REST: u32 = 4;
const LONGEST_REST: Duration = Duration::from_secs(1);
/// The longest wait before a scrub that could not be completed starts again.
const AGAIN: Duration = Duration::from_secs(60);
/// How often the thread tries to begin or continue a scrub that is due.
const LOOK: Duration = Duration::from_millis(100);
/// The longest wait for the first scrub after a start, when there is more important work.
const FIRST: Duration = Duration::from_secs(600);

enum Job {
    /// Compute the checksums of these pages, in a file that follows the raft log.
    Pages { file: Arc<File>, page_size: u32, done: u32, count: u32 },
    /// Read the whole file, which rests. It must have the checksum of its checkpoint.
    Resting(Resting),
}

pub(super) enum Answer {
    Pages { done: u32, sums: io::Result<Vec<u64>> },
    Resting(io::Result<()>),
}

/// What a turn of the scrub found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Finding {
    Nothing,
    /// A whole pass is over and found nothing wrong.
    Clean,
    /// The file is damaged; the sentence says where.
    Rot(String),
}

/// A pass that is under way.
struct Pass {
    begun: Instant,
    /// True if the file follows the raft log and is read page by page; a file that rests is read as a whole.
    follows: bool,
    done: u32,
}

/// The database thread's side.
pub(super) struct Scrub {
    /// Zero for no scrub.
    interval: Duration,
    next: Instant,
    pass: Option<Pass>,
    /// The reader is busy.
    busy: bool,
    /// When the last turn was.
    tried: Instant,
    jobs: SyncSender<Job>,
}

impl Scrub {
    /// Starts the reader, a thread that reports what it has read.
    pub fn start(interval: Duration, report: impl Fn(Answer) + Send + 'static) -> io::Result<Self> {
        let (jobs, taken) = sync_channel(1);
        thread::Builder::new().name("scrub".to_owned()).spawn(move || {
            scheduling::leisurely();
            let mut took = Duration::ZERO;
            for job in taken {
                report(read(job, &mut took));
            }
        })?;
        if !interval.is_zero() {
            note_now(SCRUB_SUCCESS); // until the first pass, a scrub is overdue from here on
        }
        let now = Instant::now();
        Ok(Self { interval, next: now + interval.min(FIRST), pass: None, busy: false, tried: now, jobs })
    }

    /// True if a turn is due, but not sooner than [`LOOK`] after the last one.
    pub fn is_due(&self) -> bool {
        let due = self.pass.is_some() && !self.busy || self.due_in().is_zero();
        due && self.tried.elapsed() >= LOOK
    }

    /// How long to wait before calling [`Self::is_due`] again.
    pub fn ask_again_in(&self) -> Duration {
        self.due_in().max(LOOK)
    }

    /// The time until a pass has to begin.
    fn due_in(&self) -> Duration {
        if self.interval.is_zero() || self.busy {
            return Duration::MAX;
        }
        self.next.saturating_duration_since(Instant::now())
    }

    /// The last pass does not count: starts it again soon.
    pub fn postpone(&mut self) {
        self.pass = None;
        self.next = Instant::now() + self.interval.min(AGAIN);
    }

    /// Checks what was read, if anything was, and lets more be read.
    pub fn turn(&mut self, read: Option<Answer>, database: &mut Database) -> Finding {
        self.tried = Instant::now();
        let mut finding = match read {
            Some(answer) => {
                self.busy = false;
                self.judge(answer, database)
            }
            None => Finding::Nothing,
        };
        if !self.busy && finding == Finding::Nothing {
            finding = self.go_on(database);
        }
        match &finding {
            Finding::Nothing => {}
            Finding::Clean => self.clean(database),
            Finding::Rot(_) => self.postpone(),
        }
        finding
    }

    fn judge(&mut self, answer: Answer, database: &Database) -> Finding {
        let unreadable = |error: io::Error| Finding::Rot(format!("the database file cannot be read: {error}"));
        match answer {
            Answer::Pages { done, sums } => {
                let Some(pass) = self.pass.as_mut().filter(|pass| pass.follows && pass.done == done) else {
                    return Finding::Nothing; // the role has changed since
                };
                match sums.and_then(|sums| Ok((database.differs(done, &sums)?, sums.len() as u32))) {
                    Ok((Some(page), _)) => {
                        Finding::Rot(format!("page {page} of the database file has rotted on the disk"))
                    }
                    Ok((None, count)) => {
                        pass.done += count;
                        Finding::Nothing
                    }
                    Err(error) => unreadable(error),
                }
            }
            Answer::Resting(result) => match result {
                _ if self.pass.as_ref().is_none_or(|pass| pass.follows) => Finding::Nothing,
                Ok(()) => Finding::Clean,
                Err(error) if error.kind() == ErrorKind::Interrupted => {
                    debug!("a scrub is begun again: {error}");
                    self.postpone();
                    Finding::Nothing
                }
                Err(error) if error.kind() == ErrorKind::InvalidData => Finding::Rot(error.to_string()),
                Err(error) => unreadable(error),
            },
        }
    }

    fn go_on(&mut self, database: &mut Database) -> Finding {
        let found = database.scrubbable();
        let follows = match found {
            Scrubbable::Not => return Finding::Nothing,
            Scrubbable::Follows { .. } => true,
            Scrubbable::Serves => false,
        };
        if self.pass.as_ref().is_some_and(|pass| pass.follows != follows) {
            self.pass = None; // what was read in the other role does not count
            self.next = Instant::now();
        }
        if self.pass.is_none() && !self.due_in().is_zero() {
            return Finding::Nothing;
        }
        let done = self.pass.get_or_insert_with(|| Pass { begun: Instant::now(), follows, done: 0 }).done;
        let job = match found {
            Scrubbable::Follows { file, page_size, pages } => {
                metrics::gauge!(SCRUB_PROGRESS).set(f64::from(done) / f64::from(pages.max(1)));
                if done >= pages {
                    return database
                        .verify_settled()
                        .map_or_else(|error| Finding::Rot(error.to_string()), |()| Finding::Clean);
                }
                let count = (CHUNK / page_size).min(pages - done);
                Job::Pages { file, page_size, done, count }
            }
            _ => match database.rest() {
                Ok(resting) => Job::Resting(resting),
                Err(error) => {
                    // Whatever it is, the next checkpoint finds it as well.
                    debug!("the database file does not rest for a scrub: {error}");
                    self.postpone();
                    return Finding::Nothing;
                }
            },
        };
        self.busy = self.jobs.try_send(job).is_ok();
        Finding::Nothing
    }

    fn clean(&mut self, database: &Database) {
        let ms = self.pass.take().map_or(0, |pass| pass.begun.elapsed().as_millis() as u64);
        self.next = Instant::now() + self.interval;
        note_now(SCRUB_SUCCESS);
        metrics::gauge!(SCRUB_PROGRESS).set(1.0);
        info!(bytes = database.file_bytes(), ms, "the scrub of the database file found nothing wrong");
    }
}

/// Does a job. `took` is how long the last chunk took.
fn read(job: Job, took: &mut Duration) -> Answer {
    match job {
        Job::Pages { file, page_size, done, count } => {
            let read = || from_disk(&file, page_size, done, count, || page_checksums(&file, page_size, done, count));
            Answer::Pages { done, sums: after_a_rest(took, read) }
        }
        Job::Resting(resting) => Answer::Resting(whole(&resting, took)),
    }
}

/// Reads a chunk after a pause that leaves time to others.
fn after_a_rest<T>(took: &mut Duration, read: impl FnOnce() -> T) -> T {
    thread::sleep((*took * REST).clamp(PACE, LONGEST_REST));
    let begun = Instant::now();
    let found = read();
    *took = begun.elapsed();
    found
}

fn whole(resting: &Resting, took: &mut Duration) -> io::Result<()> {
    let record = resting.record();
    let (mut done, mut checksum, mut bytes) = (0, 0, Vec::new());
    while done < record.pages {
        checksum ^= after_a_rest(took, || resting.read_from_disk(done, &mut bytes))?;
        done += bytes.len() as u32 / record.page_size;
        metrics::gauge!(SCRUB_PROGRESS).set(f64::from(done) / f64::from(record.pages));
    }
    if checksum == record.checksum {
        return Ok(());
    }
    let why = format!("the database file does not have the checksum of its checkpoint at raft index {}", record.index);
    Err(io::Error::new(ErrorKind::InvalidData, why))
}
