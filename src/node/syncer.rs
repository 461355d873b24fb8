//! The thread that waits for the disk, so that the consensus loop need not. One slot: a later request covers the earlier
//! ones, so the loop never waits for room, however long a sync takes. Must never retry a failed sync.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Instant,
};

use crate::storage::raft_log::Pending;

use super::inbox::{Input, Sender};

/// What is to become durable next.
#[derive(Default)]
struct Request {
    number: u64,
    /// The newest write that has to be on disk for it; none if nothing has to.
    pending: Option<Pending>,
}

#[derive(Default)]
struct Slot {
    request: Mutex<Option<Request>>,
    filled: Condvar,
}

fn lock(slot: &Slot) -> MutexGuard<'_, Option<Request>> {
    // A panic ends the process, so a poisoned lock cannot be seen.
    slot.request.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) struct Syncer {
    slot: Arc<Slot>,
    /// Highest number handed over, and highest number reported back.
    asked: u64,
    done: u64,
}

impl Syncer {
    /// Starts the thread; it ends with the process or after a failed sync.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(sender: Sender) -> io::Result<Self> {
        let slot = Arc::new(Slot::default());
        let shared = Arc::clone(&slot);
        thread::Builder::new().name("raft-log-sync".to_owned()).spawn(move || run(&shared, &sender))?;
        Ok(Self { slot, asked: 0, done: 0 })
    }

    /// True when nothing waits for the disk.
    pub fn is_idle(&self) -> bool {
        self.asked == self.done
    }

    /// Asks for everything up to `number` to become durable; `pending` is none if it need not.
    pub fn ask(&mut self, number: u64, pending: Option<Pending>) {
        self.asked = number;
        let mut slot = lock(&self.slot);
        let request = slot.get_or_insert_default();
        request.number = number;
        request.pending = pending.or_else(|| request.pending.take());
        drop(slot);
        self.slot.filled.notify_one();
    }

    /// Notes what the thread reported.
    pub fn note(&mut self, number: u64) {
        self.done = self.done.max(number);
    }
}

fn run(slot: &Slot, sender: &Sender) {
    loop {
        let empty = |request: &mut Option<Request>| request.is_none();
        let taken = slot.filled.wait_while(lock(slot), empty).unwrap_or_else(PoisonError::into_inner).take();
        let Some(Request { number, pending }) = taken else { continue };
        let start = Instant::now();
        let result = pending.map_or(Ok(()), |pending| pending.sync().map_err(|error| error.to_string()));
        let micros = start.elapsed().as_micros() as u64;
        let failed = result.is_err();
        if !sender.send(Input::Synced { number, result, micros }) || failed {
            return;
        }
    }
}
