//! Which Defenders are connected to this Console, and the policy that they are to have. One connection for each: a
//! newer one ends the one before. Must never keep a connection waiting.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use tokio::sync::watch;

use crate::{defender::wire::Policy, mutex::locked};

/// The connections of one Console.
#[derive(Debug, Default)]
pub(in crate::console) struct Hub {
    connected: Mutex<HashMap<String, Connected>>,
    policy: watch::Sender<Option<Arc<Policy>>>,
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
    /// Why the connection has to end.
    pub(super) end: watch::Receiver<Option<&'static str>>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut connected = locked(&self.hub.connected);
        if connected.get(&self.id).is_some_and(|held| held.seat == self.seat) {
            connected.remove(&self.id);
        }
    }
}

impl Hub {
    /// This Defender is connected from now on.
    pub(super) fn connect(self: &Arc<Self>, id: &str, address: String) -> Seat {
        let (sender, end) = watch::channel(None);
        let mut connected = locked(&self.connected);
        let before = connected.remove(id);
        let seat = before.as_ref().map_or(0, |before| before.seat + 1);
        before.inspect(|before| before.end("the Defender has connected again"));
        connected.insert(id.to_owned(), Connected { seat, address, end: sender });
        Seat { hub: Arc::clone(self), id: id.to_owned(), seat, end }
    }

    /// Ends the connection of this Defender, if it has one.
    pub(super) fn disconnect(&self, id: &str, why: &'static str) {
        locked(&self.connected).get(id).inspect(|connected| connected.end(why));
    }

    /// Where this Defender is connected from.
    pub(super) fn address(&self, id: &str) -> Option<String> {
        locked(&self.connected).get(id).map(|connected| connected.address.clone())
    }

    /// This policy is in force from now on.
    pub(super) fn announce(&self, policy: Policy) {
        self.policy.send_if_modified(|known| {
            let newer = known.as_ref().is_none_or(|known| known.version < policy.version);
            if newer {
                *known = Some(Arc::new(policy));
            }
            newer
        });
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
        let first = hub.connect("a", "1".to_owned());
        let second = hub.connect("a", "2".to_owned());
        assert!(first.end.borrow().is_some() && second.end.borrow().is_none());
        drop(first);
        assert_eq!(hub.address("a").as_deref(), Some("2"));
        hub.disconnect("a", "so it is");
        assert_eq!(*second.end.borrow(), Some("so it is"));
        drop(second);
        assert_eq!(hub.address("a"), None);
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
