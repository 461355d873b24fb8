//! Judges the disk of this host by what the [`watch`] has seen. Must never touch a file, nor know what follows from its
//! judgement.

use std::{
    io,
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    thread,
    time::{Duration, Instant},
};

use tracing::error;

use crate::{
    peer::Condition,
    storage::watch::{self, Act, Failure, Observed, Operation, Place, Slow},
};

use super::pulse::Pulse;

/// An operation that takes longer than this counts as one that never comes back.
const OVERDUE: Duration = Duration::from_millis(750);
/// A sync of the database file may take this long: it may have much to write, and nobody waits for it.
const OVERDUE_CHECKPOINT: Duration = Duration::from_secs(10);
/// How long a disk counts as bad after an overdue operation, and after one that failed.
const AFTER_HANG: Duration = Duration::from_secs(3);
const AFTER_FAILURE: Duration = Duration::from_secs(20);
/// How long the status mentions a slow operation.
const AFTER_SLOW: Duration = Duration::from_secs(6);
/// How often the sentence in the status gets new figures.
pub(super) const REFRESH: Duration = Duration::from_secs(1);

/// What is wrong with the disk of this host now: a sentence with the file, and the error or the time. `None` if the
/// disk works. Answers even while the consensus loop itself waits for the disk.
pub fn trouble() -> Option<String> {
    let (condition, sentence) = judge(&watch::observed());
    sentence.filter(|_| condition == Condition::Bad)
}

/// The condition of the disk, with a sentence unless it is good.
pub(super) fn judge(observed: &Observed) -> (Condition, Option<String>) {
    let found = |condition, sentence| (condition, Some(sentence));
    if let Some(Slow { operation, took, .. }) = overdue(observed) {
        return found(
            Condition::Bad,
            format!("the disk of this host does not answer: to {operation} has taken {} s so far", seconds(took)),
        );
    }
    if let Some(Failure { operation, errno, .. }) = observed.failed.filter(|failed| failed.ago < AFTER_FAILURE) {
        let error = match errno {
            0 => "an error without a number".to_owned(),
            errno => std::io::Error::from_raw_os_error(errno).to_string(),
        };
        return found(Condition::Bad, format!("the disk of this host fails: cannot {operation}: {error}"));
    }
    if let Some(&Slow { operation, took, .. }) = were_overdue(observed).next() {
        return found(
            Condition::Bad,
            format!("the disk of this host hardly answers: to {operation} took {} s", seconds(took)),
        );
    }
    let running = observed.running.iter().flatten().find(|running| running.took >= watch::SLOW);
    let slow = || observed.slow.iter().flatten().find(|slow| slow.ago < AFTER_SLOW);
    match running.or_else(slow).copied() {
        Some(Slow { operation, took, .. }) => {
            let waits = if delays_writes(operation) { "; writes wait for it" } else { "" };
            let sentence = format!("the disk of this host is slow: to {operation} took {} s{waits}", seconds(took));
            found(Condition::Slow, sentence)
        }
        None => (Condition::Good, None),
    }
}

/// An operation that is overdue.
pub(super) fn overdue(observed: &Observed) -> Option<Slow> {
    observed.running.iter().flatten().find(|running| running.took >= limit(running.operation)).copied()
}

/// Operations that came back too late, not long ago.
fn were_overdue(observed: &Observed) -> impl Iterator<Item = &Slow> {
    let was_overdue = |slow: &&Slow| slow.took >= limit(slow.operation) && slow.ago < AFTER_HANG;
    observed.slow.iter().flatten().filter(was_overdue)
}

/// For how long [`judge`] will go on to find this disk bad if it does all that it is asked from now on; zero if it is
/// not bad.
pub(super) fn distrusted_for(observed: &Observed) -> Duration {
    let hangs = overdue(observed).map(|_| AFTER_HANG);
    let hung = were_overdue(observed).map(|slow| AFTER_HANG.saturating_sub(slow.ago));
    let failed = observed.failed.map(|failed| AFTER_FAILURE.saturating_sub(failed.ago));
    hung.chain(hangs).chain(failed).max().unwrap_or_default()
}

fn limit(operation: Operation) -> Duration {
    match operation {
        Operation { place: Place::Database, act: Act::Sync } => OVERDUE_CHECKPOINT,
        _ => OVERDUE,
    }
}

/// True if a transaction of this node cannot end before this operation does.
fn delays_writes(operation: Operation) -> bool {
    matches!(operation.place, Place::RaftLog | Place::Wal | Place::WalIndex)
}

fn seconds(took: Duration) -> String {
    format!("{:.1}", took.as_secs_f64())
}

/// Starts a thread that never waits for the disk, unlike those of the runtime. It shows the watch that this process
/// runs, and logs for a consensus loop that hangs. It ends when the other end of `ended` is dropped.
///
/// # Errors
/// When the thread cannot be started.
fn witness(pulse: Pulse, ended: Receiver<()>) -> io::Result<()> {
    let witness = move || {
        let mut logged = false;
        while ended.recv_timeout(watch::STEP) == Err(RecvTimeoutError::Timeout) {
            watch::tick();
            let hangs = pulse.age() >= REFRESH;
            if hangs
                && !logged
                && let Some(trouble) = trouble()
            {
                error!("the consensus loop of this node hangs: {trouble}");
                logged = true;
            }
            logged &= hangs;
        }
        watch::rest();
    };
    thread::Builder::new().name("disk-watch".to_owned()).spawn(witness).map(drop)
}

/// What the loop knows about the disk.
pub(super) struct Disk {
    pub condition: Condition,
    /// Since when it has been in this condition.
    pub since: Instant,
    pub shown_at: Option<Instant>,
    pub given_up: Option<Instant>,
    pub failures: u64,
    /// The role stays here because no other member can take it, and that was logged.
    pub no_successor: bool,
    /// Dropping it ends the thread of [`witness`].
    _witness: SyncSender<()>,
}

impl Disk {
    /// Starts the thread. Failures from before, such as during the start of the process, are not counted again.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(pulse: Pulse) -> io::Result<Self> {
        let (_witness, ended) = sync_channel(1);
        witness(pulse, ended)?;
        let (since, failures, condition) = (Instant::now(), watch::observed().failures, Condition::Good);
        Ok(Self { condition, since, shown_at: None, given_up: None, failures, no_successor: false, _witness })
    }

    /// True while this host could not serve.
    pub fn is_bad(&self) -> bool {
        self.condition == Condition::Bad
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAL: Operation = Operation { place: Place::Wal, act: Act::Write };
    const CHECKPOINT: Operation = Operation { place: Place::Database, act: Act::Sync };

    fn slow(operation: Operation, ms: u64, ago: u64) -> Option<Slow> {
        Some(Slow { operation, took: Duration::from_millis(ms), ago: Duration::from_secs(ago) })
    }

    #[test]
    fn a_disk_is_judged_by_what_hangs_what_failed_and_what_was_slow() {
        let judged = |observed: Observed| judge(&observed).0;
        let running = |write, sync| Observed { running: [write, sync], ..Observed::default() };
        let was = |write, sync| Observed { slow: [write, sync], ..Observed::default() };
        assert_eq!(judged(Observed::default()), Condition::Good);
        assert_eq!(judged(running(slow(WAL, 250, 0), None)), Condition::Good);
        assert_eq!(judged(running(slow(WAL, 400, 0), None)), Condition::Slow);
        assert_eq!(judged(running(slow(WAL, 900, 0), None)), Condition::Bad);
        let checkpoint = |ms, ago| slow(CHECKPOINT, ms, ago);
        assert_eq!(judged(running(None, checkpoint(5_000, 0))), Condition::Slow);
        assert_eq!(judged(running(None, checkpoint(10_000, 0))), Condition::Bad);
        assert_eq!(judged(running(slow(WAL, 900, 0), checkpoint(5_000, 0))), Condition::Bad, "it hides no write");
        assert_eq!(judged(running(slow(WAL, 20, 0), checkpoint(10_000, 0))), Condition::Bad);
        assert_eq!(judged(was(slow(WAL, 1_500, 1), None)), Condition::Bad);
        assert_eq!(judged(was(slow(WAL, 1_500, 1), checkpoint(600, 0))), Condition::Bad);
        let again =
            Observed { running: [slow(WAL, 400, 0), None], slow: [slow(WAL, 1_500, 1), None], ..Observed::default() };
        assert_eq!(judged(again), Condition::Bad, "the next one is not better for being younger");
        assert_eq!(judged(was(slow(WAL, 1_500, 3), None)), Condition::Slow);
        assert_eq!(judged(was(slow(WAL, 1_500, 6), None)), Condition::Good);
        let says_so = |place, act| {
            let (_, sentence) = judge(&running(slow(Operation { place, act }, 400, 0), None));
            sentence.unwrap().contains("writes wait for it")
        };
        assert!(says_so(Place::RaftLog, Act::Sync) && says_so(Place::Wal, Act::Write));
        assert!(!says_so(Place::Folder, Act::Look) && !says_so(Place::Checkpoint, Act::Write));
        let failed = |ago| Some(Failure { operation: WAL, errno: 5, ago: Duration::from_secs(ago) });
        assert_eq!(judged(Observed { failed: failed(20), ..Observed::default() }), Condition::Good);
        let (condition, sentence) = judge(&Observed { failed: failed(19), ..Observed::default() });
        let expected =
            "the disk of this host fails: cannot write database/console.db-wal: Input/output error (os error 5)";
        assert_eq!((condition, sentence.as_deref()), (Condition::Bad, Some(expected)));
    }

    /// A member that others take for sound must not refuse the role, or nobody has it meanwhile.
    #[test]
    fn a_disk_is_distrusted_as_long_as_it_is_judged_bad() {
        let failed = |ago| Some(Failure { operation: WAL, errno: 5, ago: Duration::from_secs(ago) });
        let hung = |ago| Observed { slow: [slow(WAL, 1_500, ago), None], ..Observed::default() };
        for (observed, seconds) in [
            (Observed::default(), 0),
            (Observed { running: [slow(WAL, 400, 0), None], ..Observed::default() }, 0),
            (Observed { running: [slow(WAL, 900, 0), None], ..Observed::default() }, 3),
            (hung(0), 3),
            (hung(2), 1),
            (hung(3), 0),
            (Observed { slow: [slow(WAL, 1_500, 2), slow(CHECKPOINT, 11_000, 0)], ..Observed::default() }, 3),
            (Observed { failed: failed(5), ..Observed::default() }, 15),
            (Observed { failed: failed(19), ..hung(0) }, 3),
            (Observed { failed: failed(25), ..Observed::default() }, 0),
        ] {
            assert_eq!(distrusted_for(&observed), Duration::from_secs(seconds), "{observed:?}");
            assert_eq!(judge(&observed).0 == Condition::Bad, seconds > 0, "{observed:?}");
        }
    }
}
