//! Who a connection comes from, and how many of the places everybody gets. Must never let one client have all of them, nor turn
//! somebody away without a trace.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::telemetry::CONNECTIONS_REFUSED;

/// Between two warnings about connections that were turned away.
const TOLD: Duration = Duration::from_secs(60);

/// What counts as one client: a host of IPv6 usually has a whole /64 of addresses (RFC 6177).
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !0 << 64)),
        address => address,
    }
}

/// How many connections each network has to one server.
#[derive(Debug)]
pub struct Clients {
    server: &'static str,
    share: usize,
    now: Mutex<Now>,
}

#[derive(Debug, Default)]
struct Now {
    counts: HashMap<IpAddr, usize>,
    told: Option<Instant>,
}

/// A connection that is counted until this is dropped.
#[derive(Debug)]
pub struct Counted {
    clients: Arc<Clients>,
    network: IpAddr,
}

impl Clients {
    /// Nobody yet, and at most `share` connections from each network to this server, which is named in the log and the metric.
    pub fn new(server: &'static str, share: usize) -> Arc<Self> {
        Arc::new(Self { server, share, now: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// None if that network has its share already. There are never more networks than connections.
    pub fn enter(self: &Arc<Self>, from: IpAddr) -> Option<Counted> {
        let network = network(from);
        let mut now = self.lock();
        let count = now.counts.entry(network).or_default();
        if *count < self.share {
            *count += 1;
            return Some(Counted { clients: Arc::clone(self), network });
        }
        metrics::counter!(CONNECTIONS_REFUSED, "server" => self.server).increment(1);
        if now.told.is_none_or(|at| at.elapsed() >= TOLD) {
            now.told = Some(Instant::now());
            let (server, share) = (self.server, self.share);
            tracing::warn!(%from, server, share, "connections are turned away: this network has its share of them already");
        }
        None
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Entry::Occupied(mut entry) = self.clients.lock().counts.entry(self.network) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_host_of_ipv6_is_one_client() {
        let of = |text: &str| network(address(text));
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), of("2001:db8:1:2::1"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }

    #[test]
    fn one_network_gets_its_share_and_is_forgotten_when_it_leaves() {
        const SHARE: usize = 5;
        let clients = Clients::new("test", SHARE);
        let from = |host: usize| address(&format!("2001:db8::{host}"));
        let mut counted: Vec<_> = (0..SHARE).map(|host| clients.enter(from(host)).unwrap()).collect();
        assert!(clients.enter(from(9)).is_none());
        assert!(clients.enter(address("2001:db8:1::")).is_some());
        counted.pop();
        counted.push(clients.enter(from(9)).unwrap());
        drop(counted);
        assert!(clients.lock().counts.is_empty());
    }
}
