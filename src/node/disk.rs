//! A disk that fails or does not answer: the role goes to a member whose disk works, this one stands back, and everybody is told
//! what is wrong. Looks at the [watch](watch) only. Must never touch a file, nor give the role up when nobody could take it.

use std::{
    io,
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    thread,
    time::{Duration, Instant},
};

use tracing::{error, info, warn};

use crate::{
    cluster::{Cause, Phase},
    peer::Condition,
    storage::watch::{self, Act, Failure, Look, Operation, Place, Slow},
    telemetry,
};

use super::{driver::Driver, lease::boottime, pulse::Pulse};

/// An operation that has not come back after this long counts as one that never does.
const OVERDUE: Duration = Duration::from_millis(750);
/// The same for a sync of the database file: it may have much to write, and nobody waits for it.
const OVERDUE_CHECKPOINT: Duration = Duration::from_secs(10);
/// For how long a disk is not trusted after an operation that was overdue, and after one that failed.
const AFTER_HANG: Duration = Duration::from_secs(3);
const AFTER_FAILURE: Duration = Duration::from_secs(20);
/// For how long a slow operation is told of.
const AFTER_SLOW: Duration = Duration::from_secs(6);
/// What hangs here may hang on all hosts, as on a storage that they share: the others get this long to say so.
const GRACE: Duration = Duration::from_millis(100);
/// Not more often than this: a role that went round would help nobody.
const PAUSE: Duration = Duration::from_secs(10);
/// How often the sentence in the status gets new figures.
const RETELL: Duration = Duration::from_secs(1);
/// The kind of the warning in the status.
const ABOUT: &str = "disk-trouble";

/// What is the matter with the disk of this host, in a sentence with the file and the error or the time; none if it works. Of this
/// very moment, also when the consensus loop itself waits for the disk.
pub fn trouble() -> Option<String> {
    let (condition, sentence) = judge(&watch::look());
    sentence.filter(|_| condition == Condition::Bad)
}

/// What to make of it.
fn judge(look: &Look) -> (Condition, Option<String>) {
    let told = |condition, sentence| (condition, Some(sentence));
    if let Some(Slow { operation, took, .. }) = overdue(look) {
        return told(
            Condition::Bad,
            format!("the disk of this host does not answer: to {operation} has taken {} s so far", seconds(took)),
        );
    }
    if let Some(Failure { operation, errno, .. }) = look.failed.filter(|failed| failed.ago < AFTER_FAILURE) {
        let error = match errno {
            0 => "an error without a number".to_owned(),
            errno => std::io::Error::from_raw_os_error(errno).to_string(),
        };
        return told(Condition::Bad, format!("the disk of this host fails: cannot {operation}: {error}"));
    }
    let was_overdue = |slow: &&Slow| slow.took >= limit(slow.operation) && slow.ago < AFTER_HANG;
    if let Some(Slow { operation, took, .. }) = look.slow.iter().flatten().find(was_overdue).copied() {
        return told(
            Condition::Bad,
            format!("the disk of this host hardly answers: to {operation} took {} s", seconds(took)),
        );
    }
    let running = look.running.iter().flatten().find(|running| running.took >= watch::SLOW);
    let slow = || look.slow.iter().flatten().find(|slow| slow.ago < AFTER_SLOW);
    match running.or_else(slow).copied() {
        Some(Slow { operation, took, .. }) => {
            let waits = if limit(operation) == OVERDUE { "; every write waits for it" } else { "" };
            let sentence = format!("the disk of this host is slow: to {operation} took {} s{waits}", seconds(took));
            told(Condition::Slow, sentence)
        }
        None => (Condition::Good, None),
    }
}

/// The operation that should have come back.
fn overdue(look: &Look) -> Option<Slow> {
    look.running.iter().flatten().find(|running| running.took >= limit(running.operation)).copied()
}

fn limit(operation: Operation) -> Duration {
    match operation {
        Operation { place: Place::Database, act: Act::Sync } => OVERDUE_CHECKPOINT,
        _ => OVERDUE,
    }
}

fn seconds(took: Duration) -> String {
    format!("{:.1}", took.as_secs_f64())
}

/// A thread of its own that never waits for the disk, as those of the runtime may: tells the watch that this process runs, and says
/// in the log what a loop that stands still cannot say itself. Ends when the other end of `ended` is dropped.
///
/// # Errors
/// When the thread cannot be started.
fn witness(pulse: Pulse, ended: Receiver<()>) -> io::Result<()> {
    let witness = move || {
        let mut told = false;
        while ended.recv_timeout(watch::STEP) == Err(RecvTimeoutError::Timeout) {
            watch::tick();
            let stands = pulse.age() >= RETELL;
            if stands
                && !told
                && let Some(trouble) = trouble()
            {
                error!("this node stands still: {trouble}");
                told = true;
            }
            told &= stands;
        }
        watch::rest();
    };
    thread::Builder::new().name("disk-watch".to_owned()).spawn(witness).map(drop)
}

/// What was made of it last.
pub(super) struct Disk {
    condition: Condition,
    /// Since when it is that.
    since: Instant,
    told: Option<Instant>,
    given_up: Option<Instant>,
    failures: u64,
    /// It was said that nobody else could take the role.
    stuck: bool,
    /// Ends the thread of [`witness`] with this.
    _witness: SyncSender<()>,
}

impl Disk {
    /// What has gone wrong before, as at the start, is nothing to act upon.
    ///
    /// # Errors
    /// When the witness cannot be started.
    pub fn start(pulse: Pulse) -> io::Result<Self> {
        let (_witness, ended) = sync_channel(1);
        witness(pulse, ended)?;
        let (since, failures, condition) = (Instant::now(), watch::look().failures, Condition::Good);
        Ok(Self { condition, since, told: None, given_up: None, failures, stuck: false, _witness })
    }

    /// This host could not serve.
    pub fn is_bad(&self) -> bool {
        self.condition == Condition::Bad
    }
}

impl Driver {
    /// Once per tick.
    pub(super) fn watch_disk(&mut self) {
        let look = watch::look();
        let (condition, sentence) = judge(&look);
        if look.failures > self.disk.failures {
            metrics::counter!(telemetry::DISK_FAILURES).increment(look.failures - self.disk.failures);
            self.disk.failures = look.failures;
        }
        if condition != self.disk.condition {
            self.disk_becomes(condition, sentence.as_deref());
        }
        if condition == Condition::Bad {
            self.leave_bad_disk(overdue(&look).is_some());
        }
        let now = Instant::now();
        if self.disk.told.is_some_and(|at| now.duration_since(at) >= RETELL) || self.disk.told.is_none() {
            let waits = look.running.iter().flatten().map(|running| running.took).max().unwrap_or_default();
            metrics::gauge!(telemetry::DISK_WAIT).set(waits.as_secs_f64());
            metrics::gauge!(telemetry::DISK_TROUBLE).set(match condition {
                Condition::Good => 0.0,
                Condition::Slow => 1.0,
                Condition::Bad => 2.0,
            });
            self.disk.told = Some(now);
            if sentence.is_some() || self.publisher.warns(ABOUT) {
                let advice = self.disk_advice();
                self.publisher.warn(ABOUT, sentence.map(|sentence| sentence + advice));
            }
        }
    }

    /// What to do about it.
    fn disk_advice(&self) -> &'static str {
        match self.disk.condition {
            Condition::Bad if !self.disk.stuck => "; look at this host's disk, and at its kernel log (dmesg)",
            Condition::Bad if self.cluster.is_takeover_paused(boottime()) => {
                "; takeover is paused, so the role stays here: repair this disk, or type twistcli ha resume"
            }
            Condition::Bad => {
                "; no other member with a working disk answers, so the role stays here: repair this disk, or bring another member up"
            }
            _ => "",
        }
    }

    fn disk_becomes(&mut self, condition: Condition, sentence: Option<&str>) {
        let sentence = sentence.unwrap_or_default();
        match condition {
            Condition::Bad => error!("{sentence}"),
            Condition::Slow => info!("{sentence}"),
            Condition::Good => info!("the disk of this host works as it should again"),
        }
        (self.disk.condition, self.disk.since) = (condition, Instant::now());
        self.disk.told = None;
        self.disk.stuck = false;
        self.publisher.disk(condition);
    }

    /// A primary whose disk cannot be relied on lets another member be primary. If the disk still answers, that one begins as soon
    /// as the database is closed; else nobody waits for it: the others elect one of them when their promise has run out.
    fn leave_bad_disk(&mut self, hangs: bool) {
        let now = boottime();
        let serves = matches!(self.cluster.phase(), Phase::Primary | Phase::Promoting);
        let early = hangs && self.disk.since.elapsed() < GRACE;
        if !serves || early || self.disk.given_up.is_some_and(|at| at.elapsed() < PAUSE) {
            return;
        }
        let paused = self.cluster.is_takeover_paused(now);
        let to = self.members.secondary_with_space().filter(|_| !paused);
        let Some(to) = to else {
            if !std::mem::replace(&mut self.disk.stuck, true) {
                self.disk.told = None;
                let why = if paused { "takeover is paused" } else { "no other member could take over" };
                warn!("the disk of this PRIMARY is in trouble, and {why}: the role stays here");
            }
            return;
        };
        self.disk.given_up = Some(Instant::now());
        warn!(to, hangs, "the disk of this PRIMARY is in trouble: the role goes to a member whose disk works");
        let unfit = if hangs { AFTER_HANG } else { AFTER_FAILURE };
        self.cluster.set_unfit(now, now + unfit.as_nanos() as u64);
        if hangs {
            self.cluster.give_up(now, Cause::DiskFailed);
        } else {
            self.cluster.hand_over_because(now, Some(to), Cause::DiskFailed);
        }
    }

    /// What this node could not write must not reach raft: the loop would wait for the disk. A former primary is not needed for a
    /// majority, and gets everything again; the answers of a SECONDARY keep the lease of the primary.
    pub(super) fn takes_in(&self) -> bool {
        self.cluster.phase() != Phase::Demoting || !self.disk.is_bad()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAL: Operation = Operation { place: Place::Wal, act: Act::Write };

    fn slow(operation: Operation, ms: u64, ago: u64) -> Option<Slow> {
        Some(Slow { operation, took: Duration::from_millis(ms), ago: Duration::from_secs(ago) })
    }

    #[test]
    fn a_disk_is_judged_by_what_hangs_what_failed_and_what_was_slow() {
        let judged = |look: Look| judge(&look).0;
        let running = |write, sync| Look { running: [write, sync], ..Look::default() };
        let was = |write, sync| Look { slow: [write, sync], ..Look::default() };
        assert_eq!(judged(Look::default()), Condition::Good);
        assert_eq!(judged(running(slow(WAL, 250, 0), None)), Condition::Good);
        assert_eq!(judged(running(slow(WAL, 400, 0), None)), Condition::Slow);
        assert_eq!(judged(running(slow(WAL, 900, 0), None)), Condition::Bad);
        let checkpoint = |ms, ago| slow(Operation { place: Place::Database, act: Act::Sync }, ms, ago);
        assert_eq!(judged(running(None, checkpoint(5_000, 0))), Condition::Slow);
        assert_eq!(judged(running(None, checkpoint(10_000, 0))), Condition::Bad);
        assert_eq!(judged(running(slow(WAL, 900, 0), checkpoint(5_000, 0))), Condition::Bad, "it hides no write");
        assert_eq!(judged(running(slow(WAL, 20, 0), checkpoint(10_000, 0))), Condition::Bad);
        assert_eq!(judged(was(slow(WAL, 1_500, 1), None)), Condition::Bad);
        assert_eq!(judged(was(slow(WAL, 1_500, 1), checkpoint(600, 0))), Condition::Bad);
        let again = Look { running: [slow(WAL, 400, 0), None], slow: [slow(WAL, 1_500, 1), None], ..Look::default() };
        assert_eq!(judged(again), Condition::Bad, "the next one is not better for being younger");
        assert_eq!(judged(was(slow(WAL, 1_500, 3), None)), Condition::Slow);
        assert_eq!(judged(was(slow(WAL, 1_500, 6), None)), Condition::Good);
        let failed = |ago| Some(Failure { operation: WAL, errno: 5, ago: Duration::from_secs(ago) });
        assert_eq!(judged(Look { failed: failed(20), ..Look::default() }), Condition::Good);
        let (condition, sentence) = judge(&Look { failed: failed(19), ..Look::default() });
        let expected =
            "the disk of this host fails: cannot write database/console.db-wal: Input/output error (os error 5)";
        assert_eq!((condition, sentence.as_deref()), (Condition::Bad, Some(expected)));
    }
}
