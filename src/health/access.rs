//! Who is answered on the health port: this host itself, the members, and whom the configuration names. Must never make
//! a connection wait for a name to be looked up.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use tokio::{
    net::lookup_host,
    time::{Instant, sleep, timeout},
};

use super::Sources;
use crate::config::Audience;

/// How often the members are compared with those that are known.
const PACE: Duration = Duration::from_secs(1);
/// How often names are looked up again.
const AGAIN: Duration = Duration::from_secs(60);
/// Longest time for one name.
const LOOK_UP: Duration = Duration::from_secs(5);

pub(super) struct AccessList {
    allow: Audience,
    members: RwLock<BTreeSet<IpAddr>>,
}

impl AccessList {
    pub(super) fn new(allow: Audience) -> Self {
        Self { allow, members: RwLock::default() }
    }

    /// `own` is the address that was called: whoever calls from there is this host, too.
    pub(super) fn lets_in(&self, from: IpAddr, own: Option<IpAddr>) -> bool {
        let from = from.to_canonical();
        let here = from.is_loopback() || own.is_some_and(|own| own.to_canonical() == from);
        let member = || self.members.read().unwrap_or_else(PoisonError::into_inner).contains(&from);
        here || self.allow.has(from) || self.allow.has_members() && member()
    }

    /// Keeps the addresses of the members, until the task is dropped.
    pub(super) async fn run(self: Arc<Self>, sources: Sources) {
        let mut known: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
        let mut next = Instant::now();
        loop {
            let members: BTreeSet<String> =
                sources.status().membership.roster.members.iter().map(|member| member.address.clone()).collect();
            let again = Instant::now() >= next;
            if again || !members.iter().eq(known.keys()) {
                known.retain(|name, _| members.contains(name));
                for name in members {
                    // A name that cannot be looked up at the moment keeps the addresses that it had.
                    let found = if again || !known.contains_key(&name) { look_up(&name).await } else { None };
                    let addresses = known.entry(name).or_default();
                    *addresses = found.unwrap_or_else(|| std::mem::take(addresses));
                }
                next = if again { Instant::now() + AGAIN } else { next };
                let all = known.values().flatten().copied().collect();
                *self.members.write().unwrap_or_else(PoisonError::into_inner) = all;
            }
            sleep(PACE).await;
        }
    }
}

async fn look_up(name: &str) -> Option<BTreeSet<IpAddr>> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Some(BTreeSet::from([address.to_canonical()]));
    }
    let found = timeout(LOOK_UP, lookup_host((name, 0))).await.ok()?.ok()?;
    Some(found.map(|address| address.ip().to_canonical()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn this_host_and_the_members_are_let_in_and_nobody_else() {
        let access =
            |allow: Audience| AccessList { allow, members: RwLock::new(BTreeSet::from([address("192.0.2.2")])) };
        let config = crate::config::Config::default();
        let usual = access(config.health_allow);
        let own = Some(address("::ffff:192.0.2.1"));
        assert!(usual.lets_in(address("127.0.0.9"), own) && usual.lets_in(address("::1"), own));
        assert!(usual.lets_in(address("::ffff:192.0.2.1"), own), "this host by its own address");
        assert!(usual.lets_in(address("::ffff:192.0.2.2"), own), "a member");
        assert!(!usual.lets_in(address("192.0.2.3"), own));
        assert!(access(Audience::everybody()).lets_in(address("192.0.2.3"), own));
        let alone = access(Audience::default());
        assert!(alone.lets_in(address("127.0.0.1"), own) && !alone.lets_in(address("192.0.2.2"), own));
    }
}
