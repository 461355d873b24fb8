//! Which Defenders are connected to this Console, and the policy that they are to have. One connection for each: a
//! newer one ends the one before. Must never keep a connection waiting.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::{budget::Budgets, intake::Intake, lookups::Lookups, policy_of};
use crate::{
    console::store::{Store, StoreError},
    defender::wire::{FromConsole, Policy},
    mutex::locked,
    telemetry::DEFENDERS,
};

/// How long a policy that was read is told to others: after a takeover all Defenders come within seconds.
const FRESH: Duration = Duration::from_secs(1);

/// The connections of one Console.
#[derive(Debug, Default)]
pub(in crate::console) struct Hub {
    connected: Mutex<HashMap<String, Connected>>,
    /// How often a Defender was shut out.
    shut_out: AtomicU64,
    policy: watch::Sender<Option<Arc<Policy>>>,
    trust: watch::Sender<Option<Arc<Trust>>>,
    read: Mutex<Read>,
    pub(super) intake: Arc<Intake>,
    pub(super) lookups: Arc<Lookups>,
    pub(super) budgets: Budgets,
}

/// What changes for those that are connected when the authorities of the cluster change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trust {
    /// Certificates of the authorities to trust, PEM.
    pub(super) authorities: String,
    /// Another authority signs from now on: how many milliseconds they have to ask for another certificate.
    pub(super) renew_within_ms: Option<u64>,
}

impl Trust {
    /// As a Defender is told of it.
    pub(super) fn told(&self) -> FromConsole {
        let Self { authorities, renew_within_ms } = self.clone();
        FromConsole::Trust { authorities, renew_within_ms }
    }
}

/// The policy as it was read last, and how often another one was announced.
#[derive(Debug, Default)]
struct Read {
    announced: u64,
    policy: Option<(Instant, Arc<Policy>)>,
}

#[derive(Debug)]
struct Connected {
    /// Who holds it: see [`Seat`].
    seat: u64,
    address: String,
    end: watch::Sender<Option<&'static str>>,
}

/// The place of one connection; it is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Seat {
    hub: Arc<Hub>,
    id: String,
    seat: u64,
    /// What was read of the Defender may not be so any more: there was a connection before, which may have something
    /// under way yet, or somebody was shut out since.
    pub(super) again: bool,
    /// Why the connection has to end.
    pub(super) end: watch::Receiver<Option<&'static str>>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut connected = locked(&self.hub.connected);
        if connected.get(&self.id).is_some_and(|held| held.seat == self.seat) {
            connected.remove(&self.id);
            metrics::gauge!(DEFENDERS).decrement(1.0);
        }
    }
}

impl Hub {
    /// To be asked for before the Defender is looked up, for [`Self::connect`].
    pub(super) fn shut_out(&self) -> u64 {
        self.shut_out.load(Ordering::SeqCst)
    }

    /// This Defender is connected from now on. It was looked up when so many had been `shut_out`.
    pub(super) fn connect(self: &Arc<Self>, id: &str, address: String, shut_out: u64) -> Seat {
        let (sender, end) = watch::channel(None);
        let mut connected = locked(&self.connected);
        let before = connected.remove(id);
        let again = before.is_some() || self.shut_out() != shut_out;
        let seat = before.as_ref().map_or(0, |before| before.seat + 1);
        match before {
            Some(before) => before.end("the Defender has connected again"),
            // As many as there are places; two Consoles of one process may be open for a moment.
            None => metrics::gauge!(DEFENDERS).increment(1.0),
        }
        connected.insert(id.to_owned(), Connected { seat, address, end: sender });
        Seat { hub: Arc::clone(self), id: id.to_owned(), seat, again, end }
    }

    /// Ends the connection of this Defender, if it has one.
    pub(super) fn disconnect(&self, id: &str, why: &'static str) {
        // First, so that one that is about to connect looks again.
        self.shut_out.fetch_add(1, Ordering::SeqCst);
        locked(&self.connected).get(id).inspect(|connected| connected.end(why));
    }

    /// Where this Defender is connected from.
    pub(super) fn address(&self, id: &str) -> Option<String> {
        locked(&self.connected).get(id).map(|connected| connected.address.clone())
    }

    /// The ids of those that are connected.
    pub(super) fn ids(&self) -> Vec<String> {
        locked(&self.connected).keys().cloned().collect()
    }

    /// Other authorities are in force from now on.
    pub(super) fn announce_trust(&self, trust: Trust) {
        self.trust.send_replace(Some(Arc::new(trust)));
    }

    /// Which other authorities are announced from now on.
    pub(super) fn trusts(&self) -> watch::Receiver<Option<Arc<Trust>>> {
        let mut receiver = self.trust.subscribe();
        receiver.mark_unchanged();
        receiver
    }

    /// This policy is in force from now on, and in the database.
    pub(super) fn announce(&self, policy: Policy) {
        {
            let mut read = locked(&self.read);
            *read = Read { announced: read.announced + 1, policy: None };
        }
        self.policy.send_if_modified(|known| {
            let newer = known.as_ref().is_none_or(|known| known.version < policy.version);
            if newer {
                *known = Some(Arc::new(policy));
            }
            newer
        });
    }

    /// The policy in force. Who wants to miss none asks for [`Self::policies`] first: what is announced while this
    /// reads comes there, and is not kept here.
    ///
    /// # Errors
    /// Those of a setting.
    pub(super) async fn policy(&self, store: &Store) -> Result<Arc<Policy>, StoreError> {
        let announced = {
            let read = locked(&self.read);
            match &read.policy {
                Some((at, policy)) if at.elapsed() < FRESH => return Ok(Arc::clone(policy)),
                _ => read.announced,
            }
        };
        let policy = Arc::new(policy_of(store).await?);
        let mut read = locked(&self.read);
        if read.announced == announced {
            read.policy = Some((Instant::now(), Arc::clone(&policy)));
        }
        Ok(policy)
    }

    /// What is announced from now on.
    pub(super) fn policies(&self) -> watch::Receiver<Option<Arc<Policy>>> {
        let mut receiver = self.policy.subscribe();
        receiver.mark_unchanged();
        receiver
    }
}

impl Connected {
    fn end(&self, why: &'static str) {
        self.end.send_replace(Some(why));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_connection_ends_the_one_before_and_keeps_its_place() {
        let hub = Arc::new(Hub::default());
        let first = hub.connect("a", "1".to_owned(), 0);
        let second = hub.connect("a", "2".to_owned(), 0);
        assert!(!first.again && second.again);
        assert!(first.end.borrow().is_some() && second.end.borrow().is_none());
        drop(first);
        assert_eq!(hub.address("a").as_deref(), Some("2"));
        hub.disconnect("a", "so it is");
        assert_eq!(*second.end.borrow(), Some("so it is"));
        drop(second);
        assert_eq!(hub.address("a"), None);
        assert!(hub.connect("b", "3".to_owned(), 0).again, "somebody was shut out since, and it may be this one");
        assert!(!hub.connect("b", "3".to_owned(), hub.shut_out()).again);
    }

    #[test]
    fn only_a_newer_policy_is_announced() {
        let hub = Hub::default();
        let policy = |version| Policy { version, ..Policy::default() };
        let receiver = hub.policies();
        hub.announce(policy(2));
        assert!(receiver.has_changed().unwrap());
        let receiver = hub.policies();
        hub.announce(policy(1));
        hub.announce(policy(2));
        assert!(!receiver.has_changed().unwrap());
    }
}
