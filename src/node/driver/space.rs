//! A full disk: drops entries that the raft log has no room for, lets another member be primary, and goes on when there
//! is space again. Must never let raft accept what cannot be written: that would end the process.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{sys::statvfs::statvfs, unistd::geteuid};
use raft::eraftpb::{Message, MessageType};
use tracing::{info, warn};

use crate::{
    cluster::{NodeId, Phase},
    node::{lease::boottime, warning::Warning},
    storage::{
        raft_log::RaftLog,
        transaction::MAX_PART,
        watch::{self, Act, Place},
    },
    telemetry,
};

use super::{Driver, UNFIT};

/// Less free space than this, in bytes, is a full disk; twice as much is space again.
const LOW: u64 = 8 << 20;
/// How often the thread asks for the free space.
const LOOK: Duration = Duration::from_millis(250);
/// How long a disk has to be full before the role goes to another member.
const PATIENCE: Duration = Duration::from_millis(200);
/// A disk that refused something counts as full for at least this long, whatever its free space is.
const REFUSED: Duration = Duration::from_secs(2);
/// The role is not given up again within this time: it would go round when all disks are full.
const PAUSE: Duration = Duration::from_secs(60);

/// Why the raft log takes no entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoRoom {
    #[error("the disk of the primary is full")]
    Full,
    /// Its helper is still filling the next segment, which takes long on a slow disk.
    #[error("the raft log of the primary is making room")]
    NotYet,
}

/// What the thread that asks the file system has found.
#[derive(Default)]
struct Found {
    /// Bytes that this process may still use; `u64::MAX` if that is not known.
    free: AtomicU64,
    looks: AtomicU64,
}

/// What is known about the space of this host.
pub(super) struct Space {
    found: Arc<Found>,
    /// Dropping it ends the thread.
    _look: SyncSender<()>,
    /// How many of the looks the loop has seen.
    seen: u64,
    /// How many operations were refused for want of space, and when the loop last noticed one.
    refused: (u64, Option<Instant>),
    full: Option<Instant>,
    given_up: Option<Instant>,
    /// Lengths of the entries that were given to raft since the last append.
    taken: Vec<usize>,
    /// An append has been dropped since the disk became full.
    dropped: bool,
}

impl Space {
    /// Starts the thread that asks the file system: one that does not answer must not stop the loop.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(data: PathBuf) -> io::Result<Self> {
        let found = Arc::new(Found { free: AtomicU64::new(u64::MAX), looks: AtomicU64::new(0) });
        let (look, ended) = sync_channel(1);
        let theirs = Arc::clone(&found);
        thread::Builder::new().name("disk-space".to_owned()).spawn(move || keep_looking(&data, &theirs, &ended))?;
        let (full, given_up, refused) = (None, None, (watch::observed().refused, None));
        Ok(Self { found, _look: look, seen: 0, refused, full, given_up, taken: Vec::new(), dropped: false })
    }

    /// False for a message whose entries do not fit into the raft log. It is dropped as if the network had lost it;
    /// raft sends the entries again.
    pub fn admits(&mut self, log: &RaftLog, message: &Message) -> bool {
        if message.get_msg_type() != MessageType::MsgAppend || message.entries.is_empty() {
            return true;
        }
        let before = self.taken.len();
        self.taken.extend(message.entries.iter().map(|entry| entry.data.len() + entry.context.len()));
        // This does not wait: heartbeats must be answered while a slow disk makes room.
        let fits = log.has_room_now(self.taken.iter().copied());
        if !fits {
            self.taken.truncate(before);
            if log.is_full() && !std::mem::replace(&mut self.dropped, true) {
                warn!("the disk is full: this node takes no more entries into its raft log until there is space");
            }
        }
        fits
    }

    pub fn is_full(&self) -> bool {
        self.full.is_some()
    }

    /// Everything that was given to raft has been appended.
    pub fn appended(&mut self) {
        self.taken.clear();
    }

    fn free(&self) -> Option<u64> {
        Some(self.found.free.load(Ordering::Relaxed)).filter(|free| *free < u64::MAX)
    }

    /// True if the thread has looked, or an operation was refused, since the last call.
    fn has_news(&mut self, now: Instant) -> bool {
        let (looks, refused) = (self.found.looks.load(Ordering::Relaxed), watch::observed().refused);
        let news = looks != self.seen || refused != self.refused.0;
        if refused != self.refused.0 {
            self.refused = (refused, Some(now));
        }
        self.seen = looks;
        news
    }

    fn was_refused(&self, now: Instant) -> bool {
        self.refused.1.is_some_and(|at| now.duration_since(at) < REFUSED)
    }
}

/// Asks for the free space until the other end of `ended` is dropped.
fn keep_looking(data: &Path, found: &Found, ended: &Receiver<()>) {
    loop {
        let system = watch::run(Place::Folder, Act::Look, || Ok(statvfs(data)?));
        let free = system.map_or(u64::MAX, |system| {
            let blocks = if geteuid().is_root() { system.blocks_free() } else { system.blocks_available() };
            blocks * system.fragment_size()
        });
        found.free.store(free, Ordering::Relaxed);
        found.looks.fetch_add(1, Ordering::Relaxed);
        if ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
}

impl Driver {
    /// Once per tick.
    pub(super) fn watch_space(&mut self) {
        let now = Instant::now();
        let news = self.host.space.has_news(now);
        // At once when the raft log finds no space, or a write was refused: the primary has to know.
        let short = self.log.is_full() || self.host.space.was_refused(now);
        if news || short && self.host.space.full.is_none() {
            self.look_at_space(now);
        }
    }

    fn look_at_space(&mut self, now: Instant) {
        // That the disk does not answer is shown elsewhere.
        let free = self.host.space.free();
        if let Some(free) = free {
            metrics::gauge!(telemetry::DISK_FREE).set(free as f64);
        }
        self.publisher.free(free);
        let free = free.unwrap_or(u64::MAX);
        // Only if it helps: otherwise each retry would fill the disk with a segment and remove it again.
        if self.log.is_full() && self.log.can_prepare(free.saturating_sub(LOW)) {
            self.log.retry();
        }
        self.write_membership_again();
        let was = self.host.space.full.is_some();
        let low = if was { 2 * LOW } else { LOW };
        let full = self.log.is_full() || self.in_force.unwritten || free < low || self.host.space.was_refused(now);
        metrics::gauge!(telemetry::DISK_FULL).set(f64::from(u8::from(full)));
        if full != was {
            self.host.space.full = full.then_some(now);
            let text = full.then(|| {
                let data = self.config.data.display();
                format!(
                    "the disk is full: free some space in the file system of {data}; this node goes on by itself then"
                )
            });
            match &text {
                Some(text) => warn!("{text}"),
                None => info!("there is space on the disk again"),
            }
            self.host.space.dropped &= full;
            self.publisher.warn(Warning::Disk, text);
            self.publisher.full(full);
            self.lane.thread.full(full);
        }
        self.leave_role_to_others(now);
    }

    /// A primary that cannot write lets a member with space be primary.
    fn leave_role_to_others(&mut self, now: Instant) {
        let lasts = self.host.space.full.is_some_and(|since| now.duration_since(since) >= PATIENCE);
        let tried = self.host.space.given_up.is_some_and(|at| now.duration_since(at) < PAUSE);
        let paused = self.cluster.is_takeover_paused(boottime());
        let serves = self.cluster.phase() == Phase::Primary;
        if !serves || !lasts || tried || paused {
            return;
        }
        // Reports can be half a second old: a member whose disk has just become full may be chosen, and gives the role
        // up again.
        let Some(to) = self.members.best_successor() else { return };
        self.host.space.given_up = Some(now);
        warn!(to, "the disk of the primary is full: the role goes to a member with space");
        let now = boottime();
        self.cluster.set_unfit_until(now, now + UNFIT);
        self.cluster.hand_over(now, Some(to));
    }

    /// If the disks of too many voters are full for a majority to take a long transaction, by their last reports: whose
    /// they are, in a sentence.
    pub(super) fn lacks_space(&self) -> Option<String> {
        let membership = self.in_force.membership.borrow();
        let full: Vec<NodeId> = membership.voters().filter(|voter| self.members.has_full_disk(*voter)).collect();
        let voters = membership.voters().count();
        if full.len() <= voters - (voters / 2 + 1) {
            return None;
        }
        let names: Vec<String> = full.iter().map(|id| membership.name(*id)).collect();
        Some(format!("no majority of the members can take it: the disk is full on {}", names.join(" and ")))
    }

    /// Checks that the raft log can take a command of this length, and the entry of the next epoch after it. Never
    /// waits for the disk.
    pub(super) fn check_room(&self, length: usize) -> Result<(), NoRoom> {
        debug_assert!(length <= MAX_PART);
        if self.log.has_room_now([length]) {
            return Ok(());
        }
        Err(if self.log.is_full() { NoRoom::Full } else { NoRoom::NotYet })
    }
}
