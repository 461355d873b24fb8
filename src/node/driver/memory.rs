//! Durable memory on the consensus loop: keeps what this node must remember of itself and of the others, and acts when
//! others find that it forgot. Must never wait for the disk, except for the last note of a process that ends: a thread
//! of its own writes the files.

use std::{
    io,
    path::Path,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tracing::{error, warn};

use super::Driver;
use crate::{
    cluster::{NodeId, Role},
    node::{Exit, NodeConfig, lease::boottime},
    peer::{NodeReport, Remembers},
    storage::{
        is_full,
        memory::{Memory, note_forgotten},
    },
};

/// How often the memory is written while it changes. A vote is written at once.
const EVERY: Duration = Duration::from_secs(1);

/// How long the end of the process waits for the last write: a disk that hangs must not hold it up.
const AT_LAST: Duration = Duration::from_secs(2);
const MOMENT: Duration = Duration::from_millis(1);

/// Hands the memory to the thread that writes it.
pub(super) struct Keeper {
    /// `None` once the node ends.
    queue: Option<SyncSender<Memory>>,
    thread: Option<JoinHandle<()>>,
    /// What to write next.
    next: Memory,
    /// What was written last, and when.
    last: (Memory, Instant),
}

impl Keeper {
    /// Starts the thread; it ends when this is dropped.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(config: &NodeConfig) -> io::Result<Self> {
        let (queue, memories) = sync_channel(1);
        let data = config.data.clone();
        let thread = thread::Builder::new().name("memory".to_owned()).spawn(move || write(&data, &memories))?;
        let mut next = Memory::new(config.stored.membership.cluster);
        (next.own, next.others) = (config.reach, config.memory.known());
        next.edition = config.stored.index;
        Ok(Self { queue: Some(queue), thread: Some(thread), last: (next.clone(), Instant::now()), next })
    }
}

/// Waits until `done` is true. False if `end` comes first.
fn poll_until(end: Instant, mut done: impl FnMut() -> bool) -> bool {
    while !done() {
        if Instant::now() > end {
            return false;
        }
        thread::sleep(MOMENT);
    }
    true
}

fn write(data: &Path, memories: &Receiver<Memory>) {
    let mut logged = false;
    for memory in memories {
        match memory.write(data) {
            Ok(()) => logged = false,
            // The warning about the full disk says it.
            Err(error) if is_full(&error) => {}
            // Not fatal: this is only a second proof beside the raft log, whose errors are handled elsewhere.
            Err(error) if !logged => {
                warn!(%error, "cannot write what this node remembers of the members; trying again");
                logged = true;
            }
            Err(_) => {}
        }
    }
}

impl Driver {
    pub(super) fn reported(&mut self, peer: NodeId, report: NodeReport) {
        let remembers = report.more.and_then(|more| more.memory);
        if remembers.is_some_and(|remembers| self.config.memory.reported(peer, &remembers)) {
            self.cluster.peer_forgot(boottime(), peer);
        }
        if report.state != Role::Primary {
            self.publisher.not_primary(peer);
        }
        self.members.report(peer, report);
    }

    /// Once per tick.
    pub(super) fn follow_memory(&mut self) {
        if let Some(why) = self.cluster.forgot().map(str::to_owned) {
            self.note_lost_memory(&why);
        }
        if self.config.forgotten.is_some() {
            return self.publisher.remembers(Remembers { forgotten: true, ..Remembers::default() });
        }
        let Some(reach) = self.cluster.reach() else { return };
        let keeper = &mut self.host.keeper;
        keeper.next.own.raise(&reach);
        self.publisher.remembers(Remembers { forgotten: false, reach: keeper.next.own });
        let vote = |memory: &Memory| (memory.own.term, memory.own.vote);
        if vote(&keeper.next) == vote(&keeper.last.0) && keeper.last.1.elapsed() < EVERY {
            return;
        }
        self.config.memory.settle(self.cluster.epoch(), self.cluster.committed());
        keeper.next.others = self.config.memory.known();
        keeper.next.edition = self.config.stored.index;
        // While the thread is busy, the next tick tries again.
        let taken = |memory: &Memory| keeper.queue.as_ref().is_some_and(|queue| queue.try_send(memory.clone()).is_ok());
        if keeper.next != keeper.last.0 && taken(&keeper.next) {
            keeper.last = (keeper.next.clone(), Instant::now());
        }
    }

    /// Writes the memory a last time at an orderly end, so that the next start has nothing to guess.
    pub(super) fn keep_memory_at_last(&mut self, exit: &Exit) {
        if self.config.forgotten.is_some() || !matches!(exit, Exit::Stopped | Exit::Restart(_)) {
            return;
        }
        if let Some(reach) = self.cluster.reach() {
            self.host.keeper.next.own.raise(&reach);
        }
        self.host.keeper.next.others = self.config.memory.known();
        self.host.keeper.next.edition = self.config.stored.index;
        let Keeper { queue, thread, next, .. } = &mut self.host.keeper;
        let (Some(queue), Some(thread)) = (queue.take(), thread.take()) else { return };
        // Only this one thread may write the file, so wait for it.
        let end = Instant::now() + AT_LAST;
        if poll_until(end, || queue.try_send(next.clone()).is_ok()) {
            drop(queue);
            poll_until(end, || thread.is_finished());
        }
    }

    /// This node's disk has less than it had. The process starts again as a node that forgot.
    pub(super) fn note_lost_memory(&mut self, why: &str) {
        if self.config.forgotten.is_some() || self.in_force.removed.is_some() || self.exit.is_some() {
            return;
        }
        error!(reason = why, "this node lost some of its durable memory: it takes part in nothing until it is whole");
        let cluster = self.config.stored.membership.cluster;
        self.exit = Some(match note_forgotten(&self.config.data, cluster, why) {
            Ok(()) => Exit::Restart("it lost some of its durable memory".to_owned()),
            Err(error) => Exit::Fatal(format!("note that this node forgot: {error}")),
        });
    }
}
