//! One thing at a time: what is under way with the backups of this host, how far it is, and how the last one ended.
//! Must never let a second one begin beside it.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{sync::watch, time::timeout};

use super::{BackupError, Outcome, Running, Started, Work};
use crate::{clock::unix_time, mutex::locked};

/// What is under way, and what came of the last ones.
#[derive(Debug, Default)]
pub(super) struct Jobs(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    begun: u64,
    running: Option<Arc<Job>>,
    last: Option<Outcome>,
}

impl Table {
    fn check_idle(&self) -> Result<(), BackupError> {
        let Some(other) = &self.running else { return Ok(()) };
        let doing = match other.work {
            Work::Create => "made",
            Work::Verify => "verified",
            Work::Restore => "restored",
            Work::Fetch => "fetched",
            Work::Other => "worked on",
        };
        Err(BackupError::Refused(format!("{} is being {doing}: wait until that is over", other.id)))
    }
}

/// Something under way.
#[derive(Debug)]
pub(super) struct Job {
    number: u64,
    work: Work,
    id: String,
    begun: Instant,
    step: Mutex<&'static str>,
    done: AtomicU64,
    total: AtomicU64,
    ended: watch::Sender<bool>,
}

impl Job {
    /// Goes on to the next step, which has this many bytes in total.
    pub fn step(&self, what: &'static str, total: u64) {
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
        *locked(&self.step) = what;
    }

    /// Notes that this many more bytes are done.
    pub fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The backup that it is about.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn picture(&self) -> Running {
        Running {
            number: self.number,
            work: self.work,
            id: self.id.clone(),
            step: (*locked(&self.step)).to_owned(),
            done: self.done.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
        }
    }
}

impl Jobs {
    fn table(&self) -> MutexGuard<'_, Table> {
        locked(&self.0)
    }

    /// Begins something, unless something is under way. It must be [ended](Self::end).
    pub fn begin(&self, work: Work, id: String) -> Result<Arc<Job>, BackupError> {
        let mut table = self.table();
        table.check_idle()?;
        table.begun += 1;
        let (step, begun) = (Mutex::new("begins"), Instant::now());
        let (done, total) = (AtomicU64::new(0), AtomicU64::new(0));
        let job =
            Arc::new(Job { number: table.begun, work, id, begun, step, done, total, ended: watch::Sender::new(false) });
        table.running = Some(Arc::clone(&job));
        Ok(job)
    }

    /// Waits for the end of what was begun under this number; none if it does not come in time.
    pub async fn wait(&self, number: u64, limit: Duration) -> Option<Outcome> {
        let running = self.table().running.clone().filter(|job| job.number == number);
        if let Some(job) = running {
            let mut ended = job.ended.subscribe();
            // Not over in time: the picture has no outcome yet.
            let _ = timeout(limit, ended.wait_for(|ended| *ended)).await;
        }
        self.table().last.clone().filter(|last| last.number == number)
    }

    /// Notes how it ended.
    pub fn end(&self, job: &Job, result: &Result<String, BackupError>) -> Outcome {
        let (ok, text) = match result {
            Ok(text) => (true, text.clone()),
            Err(error) => (false, error.to_string()),
        };
        let Job { number, work, ref id, begun, .. } = *job;
        let outcome = Outcome {
            number,
            work,
            id: id.clone(),
            ok,
            text,
            time: unix_time(),
            ms: begun.elapsed().as_millis() as u64,
        };
        let mut table = self.table();
        table.running = None;
        table.last = Some(outcome.clone());
        job.ended.send_replace(true);
        outcome
    }

    /// What is under way, and how the last one ended.
    pub fn picture(&self) -> (Option<Running>, Option<Outcome>) {
        let table = self.table();
        (table.running.as_ref().map(|job| job.picture()), table.last.clone())
    }

    /// Refuses work on the backup that is in use.
    pub fn check_free(&self, id: &str) -> Result<(), BackupError> {
        let table = self.table();
        let busy = table.running.as_ref().is_some_and(|job| job.id == id);
        if busy { Err(BackupError::Refused(format!("{id} is in use: wait until that is over"))) } else { Ok(()) }
    }
}

impl From<&Job> for Started {
    fn from(job: &Job) -> Self {
        Self { number: job.number, id: job.id.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_its_end_is_remembered() {
        let jobs = Jobs::default();
        let job = jobs.begin(Work::Create, "a".into()).unwrap();
        job.step("copies", 10);
        job.advance(4);
        let running = jobs.picture().0.unwrap();
        assert_eq!((running.number, &*running.step, running.done, running.total), (1, "copies", 4, 10));
        let error = jobs.begin(Work::Verify, "b".into()).unwrap_err().to_string();
        assert!(error.contains("a is being made"), "{error}");
        assert!(jobs.check_free("a").is_err() && jobs.check_free("b").is_ok());
        jobs.end(&job, &Err(BackupError::Refused("no".into())));
        let (running, last) = jobs.picture();
        assert!(running.is_none() && last.is_some_and(|last| !last.ok && last.text == "no" && last.number == 1));
        assert_eq!(Started::from(&*jobs.begin(Work::Verify, "b".into()).unwrap()).number, 2);
    }
}
