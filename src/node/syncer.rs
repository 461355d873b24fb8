//! The thread that waits for the disk, so that the consensus loop need not. Syncs end in the order in which they were
//! asked for; one sync covers all that wait. Must never retry a failed one.

use std::{
    io,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
    time::Instant,
};

use crate::storage::raft_log::Pending;

use super::inbox::{Input, Sender};

/// Writes that may wait for the disk; the loop itself waits beyond that.
const QUEUE: usize = 1024;

pub(super) struct Syncer {
    queue: SyncSender<(u64, Option<Pending>)>,
    /// Highest number handed over, and highest number reported back.
    asked: u64,
    done: u64,
}

impl Syncer {
    /// Starts the thread; it ends when the syncer is dropped.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(sender: Sender) -> io::Result<Self> {
        let (queue, receiver) = sync_channel(QUEUE);
        thread::Builder::new().name("raft-log-sync".to_owned()).spawn(move || run(&receiver, &sender))?;
        Ok(Self { queue, asked: 0, done: 0 })
    }

    /// True when nothing waits for the disk.
    pub fn is_idle(&self) -> bool {
        self.asked == self.done
    }

    /// Asks for everything up to `number` to become durable; `pending` is none if it need not.
    pub fn ask(&mut self, number: u64, pending: Option<Pending>) {
        self.asked = number;
        let _ = self.queue.send((number, pending)); // the thread ends only with the process
    }

    /// Notes what the thread reported.
    pub fn note(&mut self, number: u64) {
        self.done = self.done.max(number);
    }
}

fn run(queue: &Receiver<(u64, Option<Pending>)>, sender: &Sender) {
    while let Ok((mut number, mut pending)) = queue.recv() {
        while let Ok((next, more)) = queue.try_recv() {
            number = next;
            pending = more.or(pending); // a later sync covers the earlier writes
        }
        let start = Instant::now();
        let result = pending.map_or(Ok(()), |pending| pending.sync().map_err(|error| error.to_string()));
        let micros = start.elapsed().as_micros() as u64;
        let failed = result.is_err();
        if !sender.send(Input::Synced { number, result, micros }) || failed {
            return;
        }
    }
}
