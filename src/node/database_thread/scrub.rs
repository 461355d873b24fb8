//! The background scrub: reads the files of all databases again, slowly and from the disk, so that damage is found
//! before a file is needed. A thread of its own reads; the database thread checks what was read, because only it
//! knows what the pages have to be. Must never write, and never make the database thread wait for a disk.

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
        database::Scrubbable,
        databases::Databases,
        scrub::{from_disk, page_checksums},
        snapshot::{Resting, Whole},
        transaction::CONSOLE_DATABASE,
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
    /// Compute the checksums of these pages, in the file of a database that follows the raft log.
    Pages { id: u32, file: Arc<File>, page_size: u32, done: u32, count: u32 },
    /// Read all databases as of one raft index. Each must have the checksum that it had there.
    Resting(Arc<Whole>),
}

pub(super) enum Answer {
    Pages { id: u32, done: u32, sums: io::Result<Vec<u64>> },
    Resting(io::Result<()>),
}

/// What a turn of the scrub found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Finding {
    Nothing,
    /// A whole pass is over and found nothing wrong.
    Clean,
    /// A file is damaged; the sentence says where.
    Rot(String),
}

/// A pass that is under way.
struct Pass {
    begun: Instant,
    /// True if the files follow the raft log and are read page by page; those of a PRIMARY are read as of one moment.
    follows: bool,
    /// The database that is being read, and its pages that were.
    id: u32,
    done: u32,
}

/// What a database's file is called in sentences.
fn file_of(id: u32) -> String {
    if id == CONSOLE_DATABASE { "the database file".to_owned() } else { format!("the file of database {id}") }
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
    pub fn turn(&mut self, read: Option<Answer>, databases: &mut Databases) -> Finding {
        self.tried = Instant::now();
        let mut finding = match read {
            Some(answer) => {
                self.busy = false;
                self.judge(answer, databases)
            }
            None => Finding::Nothing,
        };
        if !self.busy && finding == Finding::Nothing {
            finding = self.go_on(databases);
        }
        match &finding {
            Finding::Nothing => {}
            Finding::Clean => self.clean(databases),
            Finding::Rot(_) => self.postpone(),
        }
        finding
    }

    fn judge(&mut self, answer: Answer, databases: &Databases) -> Finding {
        let unreadable = |id, error: io::Error| Finding::Rot(format!("{} cannot be read: {error}", file_of(id)));
        match answer {
            Answer::Pages { id, done, sums } => {
                let same = |pass: &&mut Pass| pass.follows && (pass.id, pass.done) == (id, done);
                // The role may have changed since, or the database may be no more.
                let Some((pass, database)) = self.pass.as_mut().filter(same).zip(databases.following(id)) else {
                    return Finding::Nothing;
                };
                match sums.and_then(|sums| Ok((database.differs(done, &sums)?, sums.len() as u32))) {
                    Ok((Some(page), _)) => {
                        Finding::Rot(format!("page {page} of {} has rotted on the disk", file_of(id)))
                    }
                    Ok((None, count)) => {
                        pass.done += count;
                        Finding::Nothing
                    }
                    Err(error) => unreadable(id, error),
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
                Err(error) => unreadable(CONSOLE_DATABASE, error),
            },
        }
    }

    fn go_on(&mut self, databases: &mut Databases) -> Finding {
        let follows = match databases.console().scrubbable() {
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
        let pass = self.pass.get_or_insert_with(|| Pass { begun: Instant::now(), follows, id: 0, done: 0 });
        let job = match follows {
            true => match pass.next_pages(databases) {
                Ok(Some(job)) => job,
                Ok(None) => return Finding::Clean,
                Err(why) => return Finding::Rot(why),
            },
            false => match databases.rest() {
                Ok(whole) => Job::Resting(whole),
                Err(error) => {
                    // Whatever it is, the next checkpoint finds it as well.
                    debug!("the databases do not rest for a scrub: {error}");
                    self.postpone();
                    return Finding::Nothing;
                }
            },
        };
        self.busy = self.jobs.try_send(job).is_ok();
        Finding::Nothing
    }

    fn clean(&mut self, databases: &Databases) {
        let ms = self.pass.take().map_or(0, |pass| pass.begun.elapsed().as_millis() as u64);
        self.next = Instant::now() + self.interval;
        note_now(SCRUB_SUCCESS);
        metrics::gauge!(SCRUB_PROGRESS).set(1.0);
        info!(bytes = databases.file_bytes(), ms, "the scrub of the database file found nothing wrong");
    }
}

impl Pass {
    /// The pages to read next, of this database or a later one; none at the end. Checks each database that was read to
    /// its end.
    fn next_pages(&mut self, databases: &Databases) -> Result<Option<Job>, String> {
        while let Some(database) = databases.following_from(self.id) {
            if self.id != database.id() {
                (self.id, self.done) = (database.id(), 0);
            }
            if let Scrubbable::Follows { file, page_size, pages } = database.scrubbable() {
                metrics::gauge!(SCRUB_PROGRESS).set(f64::from(self.done) / f64::from(pages.max(1)));
                if self.done < pages {
                    let count = (CHUNK / page_size).min(pages - self.done);
                    return Ok(Some(Job::Pages { id: self.id, file, page_size, done: self.done, count }));
                }
                database.verify_settled().map_err(|error| error.to_string())?;
            }
            (self.id, self.done) = (self.id + 1, 0);
        }
        Ok(None)
    }
}

/// Does a job. `took` is how long the last chunk took.
fn read(job: Job, took: &mut Duration) -> Answer {
    match job {
        Job::Pages { id, file, page_size, done, count } => {
            let read = || from_disk(&file, page_size, done, count, || page_checksums(&file, page_size, done, count));
            Answer::Pages { id, done, sums: after_a_rest(took, read) }
        }
        Job::Resting(all) => {
            let ids = std::iter::once(CONSOLE_DATABASE).chain(all.service.keys().copied());
            Answer::Resting(ids.zip(all.all()).try_for_each(|(id, resting)| whole(id, resting, took)))
        }
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

fn whole(id: u32, resting: &Resting, took: &mut Duration) -> io::Result<()> {
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
    let (file, index) = (file_of(id), record.index);
    let why = format!("{file} does not have the checksum of its checkpoint at raft index {index}");
    Err(io::Error::new(ErrorKind::InvalidData, why))
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::FileExt,
        sync::mpsc::{Receiver, channel},
    };

    use super::*;
    use crate::storage::{
        EntrySource,
        database::{Database, initial_transaction},
    };

    const OTHER: u32 = 2;

    struct Nothing;

    impl EntrySource for Nothing {
        fn for_each(&self, _: u64, _: u64, _: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
            Ok(())
        }
    }

    /// Lets it read until it has found something.
    fn pass(scrub: &mut Scrub, answers: &Receiver<Answer>, databases: &mut Databases) -> Finding {
        scrub.next = Instant::now();
        let mut finding = scrub.turn(None, databases);
        while finding == Finding::Nothing {
            finding = scrub.turn(Some(answers.recv().unwrap()), databases);
        }
        finding
    }

    #[test]
    fn the_files_of_all_databases_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let ids = [CONSOLE_DATABASE, OTHER];
        let mut databases = Databases::new(ids.map(|id| (id, Database::open(folder.path(), id, 0).unwrap())));
        for (index, id) in (1..).zip(ids) {
            let part = initial_transaction(id, 4096).unwrap().remove(0);
            databases.apply(index, 1, &part, &Nothing).unwrap();
        }
        let (told, answers) = channel();
        let mut scrub = Scrub::start(Duration::from_secs(3600), move |answer| drop(told.send(answer))).unwrap();
        assert_eq!(pass(&mut scrub, &answers, &mut databases), Finding::Clean);
        for (id, file) in
            [(OTHER, "page 1 of the file of database 2 has"), (CONSOLE_DATABASE, "page 1 of the database file has")]
        {
            let path = databases.get(id).unwrap().path();
            let file_of_it = File::options().read(true).write(true).open(path).unwrap();
            let mut byte = [0];
            file_of_it.read_exact_at(&mut byte, 77).unwrap();
            file_of_it.write_all_at(&[byte[0] ^ 1], 77).unwrap();
            let Finding::Rot(why) = pass(&mut scrub, &answers, &mut databases) else { panic!("nothing was found") };
            assert!(why.starts_with(file), "{why}");
        }
    }
}
