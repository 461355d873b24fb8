//! Where the time of a request and of a COMMIT goes: the microseconds of each step, while `LOG_LEVEL` is `trace`. Every
//! few seconds the log gets a line for each step that was taken: how often, the median, p99, the longest, and the share
//! of the time. Owns one histogram of fixed size for each step. Must cost one relaxed load when it is off, and never
//! compare the clocks of two hosts: a step begins and ends in one process.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::mutex::locked;

/// Makes [`Step`] and [`NAMES`].
macro_rules! steps {
    ($($(#[doc = $doc:literal])* $step:ident = $name:literal,)*) => {
        /// Something that takes time. Those of a request are on the runtime, those of a COMMIT on the thread of the
        /// connection that writes, and those of the loop and of syncs on every member.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Step {
            $($(#[doc = $doc])* $step,)*
        }

        /// As the log has them.
        const NAMES: &[&str] = &[$($name),*];
    };
}

steps! {
    /// From the bytes of a request to its handler: TLS, HTTP.
    RequestRead = "request.read",
    /// Whose session it is.
    RequestSession = "request.session",
    /// The place in the line of writers.
    RequestTurn = "request.turn",
    /// A statement, there and back; with the first one goes BEGIN, or the savepoint of its part.
    RequestSql = "request.sql",
    /// From the end of a part to the end of the COMMIT that it shares.
    RequestOutcome = "request.outcome",
    /// The whole request, from its head to its answer.
    RequestWhole = "request.whole",
    /// From the answer to the socket: HTTP, TLS.
    RequestWrite = "request.write",
    /// COMMIT, as the task sees it that asks for it.
    CommitWhole = "commit.whole",
    /// What SQLite writes to the `-wal` in one transaction.
    CommitFrames = "commit.frames",
    /// The gate: all of the following.
    CommitGate = "commit.gate",
    /// The pages are taken, and their checksums computed.
    CommitCapture = "commit.capture",
    /// They are compressed and made a part of.
    CommitEncode = "commit.encode",
    /// Until the consensus loop takes the part.
    CommitQueue = "commit.queue",
    /// Until a majority has it on disk.
    CommitMajority = "commit.majority",
    /// Until the connection's thread goes on.
    CommitWake = "commit.wake",
    /// All three: the connection only waits.
    CommitWait = "commit.wait",
    /// The header of the last frame is written.
    CommitHeader = "commit.header",
    /// What came on the links is read: TLS, decoding.
    LoopReceive = "loop.receive",
    /// A part becomes an entry, is sent and appended.
    LoopPropose = "loop.propose",
    /// Entries are sent to one member: encoding, TLS, the socket.
    LoopSend = "loop.send",
    /// Entries are appended to the raft log, without a sync.
    LoopAppend = "loop.append",
    /// Until the thread that syncs begins.
    SyncWake = "sync.wake",
    /// The sync of the raft log.
    SyncDisk = "sync.disk",
    /// Until the loop hears of it.
    SyncReport = "sync.report",
    /// On a PRIMARY: from the entries sent to the answer of the member.
    MemberAnswer = "member.answer",
    /// On a SECONDARY: from the entries received to its own answer.
    OwnAnswer = "own.answer",
}

/// Parts of each power of two: the figures are right to 3 %.
const PARTS: usize = 16;
/// Up to 68 s; whatever takes longer counts as that.
const BUCKETS: usize = 33 * PARTS;

/// How often a step has taken how long, since it was last told of.
struct Histogram {
    buckets: [AtomicU32; BUCKETS],
    nanos: AtomicU64,
    longest: AtomicU64,
}

impl Histogram {
    const fn new() -> Self {
        Self { buckets: [const { AtomicU32::new(0) }; BUCKETS], nanos: AtomicU64::new(0), longest: AtomicU64::new(0) }
    }

    fn add(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(nanos)].fetch_add(1, Relaxed);
        self.nanos.fetch_add(nanos, Relaxed);
        self.longest.fetch_max(nanos, Relaxed);
    }

    /// Empties it. None if there was nothing.
    fn take(&self) -> Option<Figures> {
        let counts: Vec<u32> = self.buckets.iter().map(|bucket| bucket.swap(0, Relaxed)).collect();
        let (nanos, longest) = (self.nanos.swap(0, Relaxed), self.longest.swap(0, Relaxed));
        let count: u64 = counts.iter().map(|count| u64::from(*count)).sum();
        let at = |part: u64| {
            let mut left = (count.saturating_sub(1) * part) / 100;
            let place = counts.iter().position(|count| {
                let here = left < u64::from(*count);
                left = left.saturating_sub(u64::from(*count));
                here
            });
            middle(place.unwrap_or(0))
        };
        (count > 0).then(|| Figures { count, median: at(50), p99: at(99), longest, nanos })
    }
}

/// What a histogram has to say, in nanoseconds.
#[derive(Debug)]
struct Figures {
    count: u64,
    median: u64,
    p99: u64,
    longest: u64,
    /// All of them together.
    nanos: u64,
}

fn bucket(nanos: u64) -> usize {
    let shift = (u64::BITS - nanos.leading_zeros()).saturating_sub(5) as usize;
    (shift * PARTS + (nanos >> shift) as usize).min(BUCKETS - 1)
}

/// The value that stands for a bucket.
fn middle(bucket: usize) -> u64 {
    let shift = (bucket / PARTS).saturating_sub(1);
    let low = (bucket - shift * PARTS) as u64;
    (low << shift) + (1 << shift) / 2
}

static ON: AtomicBool = AtomicBool::new(false);
static TABLE: [Histogram; NAMES.len()] = [const { Histogram::new() }; NAMES.len()];
/// When the table was last told of.
static TOLD: Mutex<Option<Instant>> = Mutex::new(None);

/// Begins or ends to measure.
pub(super) fn measure(on: bool) {
    let mut told = locked(&TOLD);
    if on && !ON.load(Relaxed) {
        for histogram in &TABLE {
            histogram.take();
        }
        *told = Some(Instant::now());
    }
    ON.store(on, Relaxed);
}

/// Writes to the log what was measured since the last time.
pub(super) fn tell() {
    if !ON.load(Relaxed) {
        return;
    }
    let now = Instant::now();
    let span = locked(&TOLD).replace(now).map_or(Duration::ZERO, |told| now - told);
    for (name, histogram) in NAMES.iter().zip(&TABLE) {
        let Some(Figures { count, median, p99, longest, nanos }) = histogram.take() else { continue };
        let micros = |nanos: u64| format!("{:.1}", nanos as f64 / 1e3);
        let share = format!("{:.1}", 100.0 * nanos as f64 / span.as_nanos().max(1) as f64);
        let (p50_us, p99_us, max_us) = (micros(median), micros(p99), micros(longest));
        tracing::trace!("step {name}: count {count} p50_us {p50_us} p99_us {p99_us} max_us {max_us} percent {share}");
    }
}

/// When a step began; nothing while steps are not measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Begun(Option<Instant>);

/// Begins a step.
#[inline]
pub fn begin() -> Begun {
    Begun(if ON.load(Relaxed) { Some(Instant::now()) } else { None })
}

impl Begun {
    /// Ends the step.
    #[inline]
    pub fn end(self, step: Step) {
        if let Some(begun) = self.0 {
            note(step, begun.elapsed());
        }
    }

    /// Ends the step, and begins the next one.
    #[inline]
    pub fn next(&mut self, step: Step) {
        if let Some(begun) = self.0 {
            let now = Instant::now();
            note(step, now - begun);
            self.0 = Some(now);
        }
    }

    /// Takes it away: what has begun ends once.
    #[inline]
    pub fn take(&mut self) -> Self {
        std::mem::take(self)
    }

    /// True if there is something to end.
    #[inline]
    pub fn runs(self) -> bool {
        self.0.is_some()
    }
}

/// The sum of several spans that make one step.
#[derive(Debug, Default)]
pub struct Sum(Duration);

impl Sum {
    /// Adds a span.
    #[inline]
    pub fn add(&mut self, begun: Begun) {
        if let Begun(Some(begun)) = begun {
            self.0 += begun.elapsed();
        }
    }

    /// Ends the step, if it had any span.
    #[inline]
    pub fn end(&mut self, step: Step) {
        if !self.0.is_zero() {
            note(step, std::mem::take(&mut self.0));
        }
    }
}

/// Whoever begins a step is somebody else than who ends it.
#[derive(Debug, Default)]
pub struct Stopwatch(Mutex<Begun>);

impl Stopwatch {
    /// Begins the step, again if it has begun.
    #[inline]
    pub fn start(&self) {
        let begun = begin();
        if begun.runs() {
            *locked(&self.0) = begun;
        }
    }

    /// Ends the step, if it has begun.
    #[inline]
    pub fn stop(&self, step: Step) {
        if ON.load(Relaxed) {
            locked(&self.0).take().end(step);
        }
    }
}

#[cold]
fn note(step: Step, took: Duration) {
    TABLE[step as usize].add(took);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_right_to_three_percent() {
        let mut last = 0;
        for nanos in (0..40_000u64).chain((0..34).map(|power| 1 << power)).chain((5..35).map(|power| (1 << power) - 1))
        {
            let found = middle(bucket(nanos));
            assert!(found.abs_diff(nanos) * 100 <= nanos * 4, "{nanos} ns count as {found}");
            last = last.max(bucket(nanos));
        }
        assert!(last < BUCKETS && bucket(u64::MAX) == BUCKETS - 1);
    }

    #[test]
    fn a_histogram_tells_its_figures_once() {
        let histogram = Histogram::new();
        for micros in 1..=1000 {
            histogram.add(Duration::from_micros(micros));
        }
        let figures = histogram.take().unwrap();
        assert_eq!((figures.count, figures.longest, figures.nanos), (1000, 1_000_000, 500_500_000));
        assert!((485_000..515_000).contains(&figures.median), "{figures:?}");
        assert!((960_000..1_020_000).contains(&figures.p99), "{figures:?}");
        assert!(histogram.take().is_none());
    }

    #[test]
    fn nothing_is_measured_unless_it_is_asked_for() {
        assert!(!begin().runs());
        measure(true);
        assert!(begin().runs());
        measure(false);
        let mut begun = begin();
        begun.next(Step::LoopSend);
        begun.end(Step::LoopSend);
        assert!(!begun.runs());
    }
}
