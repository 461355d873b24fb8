//! Calls that may wait for a majority or for a disk, kept apart from those that read: however many wait, some threads
//! that serve the kernel are left. Must never run more of them at once than there is room for.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use rustix::io::Errno;

use super::sqlite::Served;

/// Threads that serve the kernel.
pub(super) const THREADS: usize = 8;
/// How many of them never wait.
const READERS: usize = 2;
/// Calls that wait on threads of their own, beyond those of the others.
const MOST_APART: usize = 128;

/// How many calls are waiting now.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    here: AtomicUsize,
    apart: AtomicUsize,
    /// Dropped with the last call: nobody of this process uses the databases then.
    _served: Option<Served>,
}

/// Takes one of `most` places, unless all are taken.
fn enter(places: &AtomicUsize, most: usize) -> bool {
    places.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |taken| (taken < most).then_some(taken + 1)).is_ok()
}

impl Waiting {
    /// Nobody waits yet.
    pub fn new(served: Option<Served>) -> Self {
        Self { _served: served, ..Self::default() }
    }

    /// Does work that may wait: on this thread if enough others are left, otherwise on one of its own. It gets
    /// `EAGAIN` instead of the bytes when too many are waiting.
    pub fn run(self: &Arc<Self>, bytes: &[u8], work: impl FnOnce(Result<&[u8], Errno>) + Send + 'static) {
        if enter(&self.here, THREADS - READERS) {
            work(Ok(bytes));
            self.here.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        if !enter(&self.apart, MOST_APART) {
            return work(Err(Errno::AGAIN));
        }
        let (bytes, waiting) = (bytes.to_vec(), Arc::clone(self));
        let started = thread::Builder::new().name("folder-wait".into()).spawn(move || {
            work(Ok(&bytes));
            waiting.apart.fetch_sub(1, Ordering::SeqCst);
        });
        // The work is dropped with its reply, which then says EIO.
        if let Err(error) = started {
            self.apart.fetch_sub(1, Ordering::SeqCst);
            tracing::warn!("a call on the service's folder fails: no thread can be started for it: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn some_threads_never_wait_and_there_is_a_limit() {
        let waiting = Arc::new(Waiting::default());
        let (done, all_done) = mpsc::sync_channel(MOST_APART);
        let mut held = Vec::new();
        thread::scope(|scope| {
            let (entered, all_entered) = mpsc::sync_channel(THREADS);
            for _ in 0..THREADS - READERS {
                let (release, wait) = mpsc::sync_channel::<()>(1);
                held.push(release);
                let (waiting, entered) = (&waiting, entered.clone());
                scope.spawn(move || {
                    waiting.run(b"", move |_| {
                        entered.send(()).unwrap();
                        let _ = wait.recv();
                    });
                });
            }
            (0..THREADS - READERS).for_each(|_| all_entered.recv().unwrap());
            // All others are apart: this thread comes back at once.
            for _ in 0..MOST_APART {
                let (release, wait) = mpsc::sync_channel::<()>(1);
                held.push(release);
                let done = done.clone();
                waiting.run(b"content", move |bytes| {
                    let _ = wait.recv();
                    done.send(bytes == Ok(b"content")).unwrap();
                });
            }
            let (answer, refused) = mpsc::sync_channel(1);
            waiting.run(b"", move |bytes| answer.send(bytes == Err(Errno::AGAIN)).unwrap());
            assert!(refused.recv().unwrap());
            held.clear();
        });
        assert!((0..MOST_APART).all(|_| all_done.recv().unwrap()));
    }
}
