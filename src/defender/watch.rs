//! Looks after the files of the policy. inotify says where to look, the baseline says what is new, and what is new goes
//! into the queue. Must never take a notice for more than a hint: what counts is what is found. Runs on a thread of its
//! own, which is the only one that writes into the queue while it runs.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor},
};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{
    baseline::{Baseline, FILE, Known, shown},
    folder::Folder,
    queue::{Draft, Queue},
    wire::{EVENT, Policy, Watched},
};
use crate::{clock::unix_time_ms, mutex::locked};

/// What is told when everything below a path is known, and when there is too much.
const BASELINE: &str = "baseline";
const LIMIT: &str = "limit";
/// Paths that are known, at most.
const PATHS: usize = 100_000;
/// Looks in one round, and events that are taken at once.
const LOOKS: usize = 500;
const BATCH: usize = 100;
/// How long notices are collected before somebody looks: one change gives several of them.
const SETTLE: Duration = Duration::from_millis(100);
/// From one round to the next when nothing happens.
const IDLE: Duration = Duration::from_secs(1);
/// From one look at paths that are missing, or cannot be watched, to the next, and from one look at everything to the
/// next.
const MISSING: Duration = Duration::from_secs(10);
const EVERYTHING: Duration = Duration::from_secs(3600);
/// From one writing of the baseline to the next.
const KEEP: Duration = Duration::from_secs(5);
/// The span that the policy's rate is about, and paths that it is counted for.
const MINUTE: Duration = Duration::from_secs(60);
const PACED: usize = 10_000;

/// What the watch shares with the connection.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) folder: Arc<Folder>,
    pub(super) queue: Arc<Mutex<Queue>>,
    /// The number of the next event: all before it may be sent.
    pub(super) next: watch::Sender<u64>,
    /// The events up to this number are with the Console.
    pub(super) stored: watch::Sender<u64>,
    pub(super) policy: watch::Sender<Policy>,
}

/// The watch.
pub(super) struct Watch {
    shared: Shared,
    policy: Policy,
    baseline: Baseline,
    /// Events have changed the baseline since it was kept.
    changed: bool,
    kept: Instant,
    /// The events up to this number are in the baseline on disk.
    kept_through: u64,
    inotify: Inotify,
    folders: HashMap<WatchDescriptor, PathBuf>,
    /// Folders whose content was listed since the last look at everything began.
    listed: BTreeSet<PathBuf>,
    /// What is to be looked at.
    dirty: BTreeSet<PathBuf>,
    paces: HashMap<PathBuf, Pace>,
    drafts: Vec<Draft>,
    looked: Instant,
    missed: Instant,
    /// It was told that there is too much.
    full: bool,
}

/// How often a path has changed lately.
struct Pace {
    since: Instant,
    events: u32,
    /// Notices that came when there had been too many events.
    held: u64,
}

const MASK: AddWatchFlags = AddWatchFlags::IN_CLOSE_WRITE
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_CREATE)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MOVED_FROM)
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF)
    .union(AddWatchFlags::IN_ONLYDIR)
    .union(AddWatchFlags::IN_DONT_FOLLOW);

impl Watch {
    /// Takes up where the last process left off.
    ///
    /// # Errors
    /// When the queue cannot be read, or the kernel has no inotify.
    pub(super) fn open(shared: Shared) -> Result<Self> {
        let kept: Option<Baseline> = shared.folder.baseline().unwrap_or_else(|error| {
            tracing::warn!("what was known of the files is lost: {error:#}");
            None
        });
        let mut baseline = kept.unwrap_or_default();
        let mut queue = locked(&shared.queue);
        if baseline.through >= queue.next() {
            // The queue has begun anew.
            baseline.through = 0;
        }
        let kept_through = baseline.through;
        loop {
            let events = queue.read(baseline.through + 1, 1000, EVENT * BATCH).context("read the queue")?;
            if events.is_empty() {
                break;
            }
            events.iter().for_each(|event| baseline.catch_up(event.sequence, &event.kind, &event.event));
        }
        drop(queue);
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context("begin to watch files")?;
        let policy = shared.policy.borrow().clone();
        let now = Instant::now();
        let mut watch = Self {
            shared,
            policy,
            baseline,
            changed: true,
            kept: now,
            kept_through,
            inotify,
            folders: HashMap::new(),
            listed: BTreeSet::new(),
            dirty: BTreeSet::new(),
            paces: HashMap::new(),
            drafts: Vec::new(),
            looked: now,
            missed: now,
            full: false,
        };
        watch.look_at_everything();
        Ok(watch)
    }

    /// Goes on until something fails that only another process can mend.
    ///
    /// # Errors
    /// When the queue or the baseline cannot be written.
    pub(super) fn run(mut self) -> Result<()> {
        loop {
            let busy = !self.dirty.is_empty();
            self.wait(if busy { Duration::ZERO } else { IDLE })?;
            self.round()?;
        }
    }

    /// One round: policy, notices, looks, events.
    fn round(&mut self) -> Result<()> {
        let policy = self.shared.policy.borrow().clone();
        if policy != self.policy {
            self.adopt(policy);
        }
        self.hear()?;
        if self.looked.elapsed() >= EVERYTHING {
            self.look_at_everything();
        } else if self.missed.elapsed() >= MISSING {
            self.missed = Instant::now();
            let roots = self.policy.paths.iter().map(|root| PathBuf::from(&root.path));
            self.dirty.extend(roots.filter(|root| !self.listed.contains(root)));
        }
        self.release_held();
        // What goes from a full queue must be in the baseline that is kept; now there is nothing in it that is not in
        // the queue.
        if self.changed && locked(&self.shared.queue).is_full(2 * LOOKS * EVENT) {
            self.keep()?;
        }
        for _ in 0..LOOKS {
            let Some(path) = self.dirty.pop_first() else { break };
            self.look(&path);
        }
        let complete = self.dirty.is_empty() && self.note_complete();
        self.hand_over()?;
        // What was there at first is in no event: a start that did not know it would take what is new for old.
        if complete || (self.changed && self.kept.elapsed() >= KEEP) {
            self.keep()?;
        }
        let through = self.kept_through.min(*self.shared.stored.borrow());
        locked(&self.shared.queue).release(through).context("release events of the queue")
    }

    fn wait(&self, limit: Duration) -> Result<()> {
        let mut fds = [PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, timeout) {
            // So that one look answers all notices of one change.
            Ok(count) if count > 0 => std::thread::sleep(SETTLE),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for notices of files"),
        }
        Ok(())
    }

    /// Takes all notices that have come.
    fn hear(&mut self) -> Result<()> {
        loop {
            let notices = match self.inotify.read_events() {
                Ok(notices) => notices,
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
                Err(error) => return Err(error).context("read notices of files"),
            };
            for notice in notices {
                if notice.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    tracing::info!("too many notices of files have come: everything is looked at");
                    self.look_at_everything();
                    continue;
                }
                let Some(folder) = self.folders.get(&notice.wd).cloned() else { continue };
                if notice.mask.intersects(AddWatchFlags::IN_MOVE_SELF) {
                    // Its path is another one now. An error means that it is gone in any case.
                    let _ = self.inotify.rm_watch(notice.wd);
                }
                if notice
                    .mask
                    .intersects(AddWatchFlags::IN_IGNORED | AddWatchFlags::IN_MOVE_SELF | AddWatchFlags::IN_DELETE_SELF)
                {
                    self.folders.remove(&notice.wd);
                    self.listed.remove(&folder);
                }
                let path = notice.name.map_or_else(|| folder.clone(), |name| folder.join(name));
                self.note(path);
            }
        }
    }

    /// Something may have happened to a path.
    fn note(&mut self, path: PathBuf) {
        if !covers(&self.policy.paths, &path) {
            // A path of the policy may have come to be below this one.
            let roots = self.policy.paths.iter().map(|root| PathBuf::from(&root.path));
            self.dirty.extend(roots.filter(|root| root.starts_with(&path)));
            return;
        }
        match self.paces.get_mut(&path) {
            Some(pace) if pace.events >= self.policy.per_minute && pace.since.elapsed() < MINUTE => pace.held += 1,
            _ => drop(self.dirty.insert(path)),
        }
    }

    /// Looks at what was held back, once its time has come.
    fn release_held(&mut self) {
        let due = |pace: &Pace| pace.since.elapsed() >= MINUTE;
        let held = self.paces.iter().filter(|(_, pace)| due(pace) && pace.held > 0).map(|(path, _)| path.clone());
        self.dirty.extend(held);
        self.paces.retain(|_, pace| !due(pace) || pace.held > 0);
    }

    fn adopt(&mut self, policy: Policy) {
        tracing::info!(version = policy.version, paths = policy.paths.len(), "another policy is in force");
        self.policy = policy;
        let paths = &self.policy.paths;
        self.baseline.retain(|path| covers(paths, path));
        self.baseline.complete.retain(|root| paths.contains(root));
        self.paces.clear();
        self.changed = true;
        self.look_at_everything();
    }

    fn look_at_everything(&mut self) {
        (self.looked, self.missed, self.full) = (Instant::now(), Instant::now(), false);
        self.listed.clear();
        self.dirty.extend(self.policy.paths.iter().map(|root| PathBuf::from(&root.path)));
        self.dirty.extend(self.baseline.paths());
    }

    /// Compares a path with what is known of it.
    fn look(&mut self, path: &Path) {
        let before = self.baseline.get(path).cloned();
        let after = match Known::look(path, before.as_ref(), self.policy.hash_bytes) {
            Ok(after) => after,
            Err(error) => {
                tracing::debug!("{} cannot be looked at: {error}", path.display());
                self.paces.remove(path);
                return;
            }
        };
        if before.is_none() && after.is_some() && self.baseline.len() >= PATHS {
            self.tell_full();
            return;
        }
        if before.as_ref().is_some_and(Known::is_folder) && !after.as_ref().is_some_and(Known::is_folder) {
            self.dirty.extend(self.baseline.below(path));
        }
        if self.policy.paths.iter().any(|root| Path::new(&root.path) == path) {
            // So that its coming and going is noticed.
            self.watch(path.parent().unwrap_or(path));
        }
        if after.as_ref().is_some_and(Known::is_folder) {
            self.list(path);
        }
        let known = covers(&self.baseline.complete, path);
        let change = self.baseline.change(path, after.as_ref()).filter(|_| known);
        let held = self.paces.get(path).map_or(0, |pace| pace.held);
        if change.is_none() && held == 0 {
            self.changed |= before != after;
            self.baseline.set(path, after);
            return;
        }
        if !self.may_tell(path) {
            return;
        }
        let unchanged = || json!({ "path": shown(path), "change": "none" });
        let mut event = change.unwrap_or_else(unchanged);
        if held > 0 {
            event["heldBack"] = Value::from(held);
        }
        self.drafts.push(Draft { time: unix_time_ms(), kind: FILE, event });
        self.baseline.set(path, after);
        self.changed = true;
    }

    /// True if one more event of this path may be told now, which is counted.
    fn may_tell(&mut self, path: &Path) -> bool {
        if let Some(pace) = self.paces.get_mut(path) {
            if pace.since.elapsed() >= MINUTE {
                *pace = Pace { since: Instant::now(), events: 0, held: 0 };
            }
            if pace.events >= self.policy.per_minute {
                pace.held += 1;
                return false;
            }
            pace.events += 1;
            return true;
        }
        // Of more paths than that, each may tell all that happens to it.
        if self.paces.len() < PACED {
            self.paces.insert(path.to_owned(), Pace { since: Instant::now(), events: 1, held: 0 });
        }
        true
    }

    /// Has a folder watched, and all that is in it looked at.
    fn list(&mut self, folder: &Path) {
        let inside = folder.join("x");
        if self.listed.contains(folder) || !covers(&self.policy.paths, &inside) {
            return;
        }
        // First the watch: what comes behind the list is noticed.
        if self.watch(folder) {
            self.listed.insert(folder.to_owned());
        }
        match fs::read_dir(folder) {
            Ok(entries) => self.dirty.extend(entries.filter_map(|entry| entry.ok().map(|entry| entry.path()))),
            Err(error) => tracing::debug!("{} cannot be listed: {error}", folder.display()),
        }
        self.dirty.extend(self.baseline.below(folder));
    }

    fn watch(&mut self, folder: &Path) -> bool {
        match self.inotify.add_watch(folder, MASK) {
            Ok(descriptor) => {
                self.folders.insert(descriptor, folder.to_owned());
                true
            }
            Err(Errno::ENOSPC) => {
                self.tell_full();
                // It is looked at once an hour.
                true
            }
            Err(_) => false,
        }
    }

    fn tell_full(&mut self) {
        if !std::mem::replace(&mut self.full, true) {
            let event = json!({ "paths": self.baseline.len(), "folders": self.folders.len() });
            self.drafts.push(Draft { time: unix_time_ms(), kind: LIMIT, event });
        }
    }

    /// Everything was looked at: from now on, what is new below these paths is told. Returns whether it was not before.
    fn note_complete(&mut self) -> bool {
        let before = self.baseline.complete.len();
        let paths = self.policy.paths.clone();
        for root in paths.into_iter().filter(|root| !self.baseline.complete.contains(root)).collect::<Vec<_>>() {
            let count = self.baseline.paths().filter(|path| covers(std::slice::from_ref(&root), path)).count();
            let event = json!({ "path": root.path, "recursive": root.recursive, "paths": count });
            self.drafts.push(Draft { time: unix_time_ms(), kind: BASELINE, event });
            self.baseline.complete.push(root);
            self.changed = true;
        }
        self.baseline.complete.len() > before
    }

    /// Puts the events into the queue.
    fn hand_over(&mut self) -> Result<()> {
        while !self.drafts.is_empty() {
            let some: Vec<Draft> = self.drafts.drain(..self.drafts.len().min(BATCH)).collect();
            let next = {
                let mut queue = locked(&self.shared.queue);
                queue.append(&some).context("write into the queue")?;
                queue.next()
            };
            if self.drafts.is_empty() {
                self.baseline.through = next - 1;
            }
            self.changed = true;
            self.shared.next.send_replace(next);
        }
        Ok(())
    }

    fn keep(&mut self) -> Result<()> {
        self.shared.folder.keep_baseline(&self.baseline)?;
        (self.changed, self.kept, self.kept_through) = (false, Instant::now(), self.baseline.through);
        Ok(())
    }
}

/// True if one of these is about the path.
fn covers(paths: &[Watched], path: &Path) -> bool {
    paths.iter().any(|Watched { path: root, recursive }| {
        let root = Path::new(root);
        path == root || path.parent() == Some(root) || (*recursive && path.starts_with(root))
    })
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
