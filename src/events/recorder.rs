//! Takes events from everywhere and hands them on: to the file by a thread of its own, to the history in the database
//! and to the notifications through bounded queues. Must never wait for a disk, a database or a network.

use std::{
    collections::VecDeque,
    fmt,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use tokio::sync::{Notify, broadcast, watch};
use tracing::warn;

use super::{Event, Scope, file::EventFile};
use crate::{mutex::locked, telemetry};

/// Events on their way to the file.
const QUEUE: usize = 256;
/// Events on their way into the history; the oldest go first.
const PENDING: usize = 256;
/// Events on their way to the notifications.
const NOTIFIED: usize = 64;

enum Order {
    Add(Box<Event>),
    /// Tell when everything before is in the file.
    Flush(SyncSender<()>),
}

struct Inner {
    node: String,
    file: SyncSender<Order>,
    primary: AtomicBool,
    pending: Mutex<VecDeque<Event>>,
    added: Notify,
    notify: broadcast::Sender<Event>,
    /// Changes when something was written into the history.
    written: watch::Sender<()>,
}

/// Where events are recorded. Clones are handles of the same.
#[derive(Clone)]
pub struct Recorder(Arc<Inner>);

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").field("node", &self.0.node).finish_non_exhaustive()
    }
}

impl Recorder {
    /// Records the events of this node (its name) in its data folder. A file that cannot be opened is warned of, and
    /// events go on elsewhere.
    ///
    /// # Errors
    /// When the system has no thread.
    pub fn start(node: &str, folder: &Path) -> std::io::Result<Self> {
        let (file, orders) = sync_channel(QUEUE);
        let folder = folder.to_owned();
        thread::Builder::new().name("events".to_owned()).spawn(move || write(&folder, &orders))?;
        let (notify, _) = broadcast::channel(NOTIFIED);
        Ok(Self(Arc::new(Inner {
            node: node.to_owned(),
            file,
            primary: AtomicBool::new(false),
            pending: Mutex::default(),
            added: Notify::new(),
            notify,
            written: watch::Sender::new(()),
        })))
    }

    /// Takes note of an event.
    pub fn record(&self, mut event: Event) {
        event.node.clone_from(&self.0.node);
        metrics::counter!(telemetry::EVENTS, "severity" => event.severity.word()).increment(1);
        let primary = self.0.primary.load(Ordering::Relaxed);
        if self.0.file.try_send(Order::Add(Box::new(event.clone()))).is_err() {
            metrics::counter!(telemetry::EVENTS_LOST).increment(1);
        }
        if primary && event.scope != Scope::Local {
            let mut pending = self.pending();
            if pending.len() >= PENDING {
                pending.pop_front();
                metrics::counter!(telemetry::EVENTS_LOST).increment(1);
            }
            pending.push_back(event.clone());
            drop(pending);
            self.0.added.notify_one();
        }
        if event.scope == Scope::Node || primary && event.scope == Scope::Cluster {
            let _ = self.0.notify.send(event); // nobody wants to be notified
        }
    }

    /// Whether this node is PRIMARY: then it speaks for the cluster.
    pub(super) fn set_primary(&self, primary: bool) {
        self.0.primary.store(primary, Ordering::Relaxed);
    }

    /// Waits a moment for everything recorded so far to be in the file.
    pub fn flush(&self) {
        let (done, wait) = sync_channel(1);
        if self.0.file.try_send(Order::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(Duration::from_millis(500)); // a disk that hangs is not waited for
        }
    }

    /// Events that are to go into the history of the cluster, oldest first; waits for one.
    pub async fn pending_events(&self) -> Vec<Event> {
        loop {
            let added = self.0.added.notified();
            let events: Vec<_> = self.pending().iter().cloned().collect();
            if !events.is_empty() {
                return events;
            }
            added.await;
        }
    }

    /// These are in the history.
    pub fn stored(&self, events: &[Event]) {
        self.pending().retain(|event| !events.iter().any(|stored| stored.id == event.id));
        self.0.written.send_replace(());
    }

    /// Changes whenever this node has written something into the history.
    pub fn written(&self) -> watch::Receiver<()> {
        self.0.written.subscribe()
    }

    /// The events that somebody has to be notified of, from now on.
    pub(super) fn to_notify(&self) -> broadcast::Receiver<Event> {
        self.0.notify.subscribe()
    }

    /// The name of this node.
    pub fn node(&self) -> &str {
        &self.0.node
    }

    fn pending(&self) -> MutexGuard<'_, VecDeque<Event>> {
        locked(&self.0.pending)
    }
}

/// The thread of the file.
fn write(folder: &Path, orders: &Receiver<Order>) {
    let mut file = None;
    let mut failing = false;
    while let Ok(order) = orders.recv() {
        let event = match order {
            Order::Add(event) => event,
            Order::Flush(done) => {
                let _ = done.send(()); // whoever asked does not wait any more
                continue;
            }
        };
        let opened = match file.take() {
            Some(open) => Ok(open),
            None => EventFile::open(folder),
        };
        let added = opened.and_then(|mut open| {
            open.add(&event)?;
            // After a failure it is opened again: it may not be where it was.
            file = Some(open);
            Ok(())
        });
        if let Err(error) = &added {
            metrics::counter!(telemetry::EVENTS_LOST).increment(1);
            if !failing {
                warn!(%error, "events cannot be written to {}: they are lost until that is possible", super::FILE);
            }
        }
        failing = added.is_err();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Kind, Severity, Wanted, read};

    fn event(scope: Scope) -> Event {
        Event::new(Kind::Backup, Severity::Info, "done").scope(scope)
    }

    #[tokio::test]
    async fn only_the_primary_writes_the_history_and_speaks_for_the_cluster() {
        let folder = tempfile::tempdir().unwrap();
        let recorder = Recorder::start("node1", folder.path()).unwrap();
        let mut told = recorder.to_notify();
        let scopes = [Scope::Local, Scope::Node, Scope::Cluster];
        scopes.iter().for_each(|scope| recorder.record(event(*scope)));
        assert_eq!(told.try_recv().unwrap().scope, Scope::Node);
        assert!(told.try_recv().is_err());
        recorder.set_primary(true);
        scopes.iter().for_each(|scope| recorder.record(event(*scope)));
        assert_eq!([told.try_recv(), told.try_recv()].map(|event| event.unwrap().scope), [Scope::Node, Scope::Cluster]);
        let pending = recorder.pending_events().await;
        assert_eq!(pending.iter().map(|event| event.scope).collect::<Vec<_>>(), [Scope::Node, Scope::Cluster]);
        recorder.stored(&pending[..1]);
        assert_eq!(recorder.pending_events().await, pending[1..]);
        recorder.flush();
        let written = read(folder.path(), &Wanted::default()).unwrap();
        assert!(written.len() == 6 && written.iter().all(|event| event.node == "node1"));
    }

    #[test]
    fn nothing_grows_when_nobody_takes_the_events() {
        let folder = tempfile::tempdir().unwrap();
        let recorder = Recorder::start("node1", &folder.path().join("missing")).unwrap();
        recorder.set_primary(true);
        for _ in 0..3 * PENDING {
            recorder.record(event(Scope::Cluster));
        }
        assert_eq!(recorder.pending().len(), PENDING);
    }
}
