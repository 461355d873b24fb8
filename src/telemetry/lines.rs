//! The way of a log line to standard error: through a bounded queue to a thread that may wait for whoever reads it.
//! Must never make the thread that logs wait, and never drop a line without counting it.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel},
    },
    thread,
    time::Duration,
};

use nix::sys::signal::SigSet;
use tracing_subscriber::fmt::MakeWriter;

use super::LOG_LINES_LOST;

/// Lines that may wait; most have less than 200 bytes.
const QUEUE: usize = 4096;
/// How long the end of the process waits for the lines before it.
const LAST_LINES: Duration = Duration::from_secs(1);

enum Task {
    Line(Vec<u8>),
    /// Answered when everything before it is written.
    Flush(SyncSender<()>),
}

static TASKS: OnceLock<SyncSender<Task>> = OnceLock::new();
/// Lines that found no place since the last one that says so.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Hands each line to the thread of [`start`].
#[derive(Clone, Debug)]
pub(super) struct Lines(SyncSender<Task>);

/// Starts the thread that writes to standard error.
///
/// # Errors
/// When standard error is not open, or the thread cannot be started.
pub(super) fn start() -> io::Result<Lines> {
    let (sender, tasks) = sync_channel(QUEUE);
    // Not `io::stderr()` itself: a panic reports there, and must not find its lock taken while nobody reads.
    let out = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    thread::Builder::new().name("log".to_owned()).spawn(move || run(&tasks, out))?;
    // Of a second log, which is refused, nothing has to be waited for.
    let _ = TASKS.set(sender.clone());
    Ok(Lines(sender))
}

/// Waits until all lines so far are written, but no longer than a second: for the last lines of a process.
pub fn flush() {
    let Some(tasks) = TASKS.get() else { return };
    let (written, wait) = sync_channel(1);
    // A full queue means that nobody reads: then nothing is worth waiting for.
    if tasks.try_send(Task::Flush(written)).is_ok() {
        let _ = wait.recv_timeout(LAST_LINES);
    }
}

fn run(tasks: &Receiver<Task>, mut out: File) {
    // This thread is older than whoever waits for signals: it must not take one of those, which would end the process.
    let _ = SigSet::all().thread_block();
    loop {
        let task = match tasks.try_recv() {
            Ok(task) => task,
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => {
                tell_of_lost();
                let Ok(task) = tasks.recv() else { return };
                task
            }
        };
        match task {
            // Nobody reads standard error any more: there is no place left to say that.
            Task::Line(line) => drop(out.write_all(&line)),
            Task::Flush(written) => drop(written.try_send(())),
        }
    }
}

/// Once the queue is empty again: one line for all that it did not take.
fn tell_of_lost() {
    let lines = LOST.swap(0, Ordering::Relaxed);
    if lines > 0 {
        tracing::warn!(lines, "lines of the log were dropped: whoever reads standard error was too slow");
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

impl Write for &Lines {
    /// Takes one whole line, as it comes from the layer that formats them.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = self.0.try_send(Task::Line(line.to_vec())) {
            LOST.fetch_add(1, Ordering::Relaxed);
            metrics::counter!(LOG_LINES_LOST).increment(1);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
