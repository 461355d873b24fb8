//! Places for connections: so many for each server, kept apart from those of all others. When they are short, whoever
//! has not said anything yet makes room, the oldest of the most crowded network first; some places are always kept for
//! members and for users who have logged in. Must never let anybody have all of them, and never turn somebody away
//! without a trace.

use std::{
    collections::{BTreeSet, HashMap, HashSet, hash_map::Entry},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::network;
use crate::{
    mutex::locked,
    telemetry::{CONNECTIONS_ENDED, CONNECTIONS_REFUSED},
};

/// Between two warnings about connections that were turned away, or ended to make room.
const TOLD: Duration = Duration::from_secs(60);
/// A handshake or a request that takes longer than this also makes room, unless its client has logged in: it may be
/// sent drop by drop.
const SLOW: Duration = Duration::from_millis(250);
/// How long a network is known after a login.
const KNOWN: Duration = Duration::from_secs(3600);
/// How long who has logged in on a connection need not be noted again.
const VOUCHED: Duration = Duration::from_secs(60);
/// Networks that are known, beside those of the members.
const KNOWN_MOST: usize = 4096;
/// How many connections may have been told to end and not ended yet: more must wait, or the descriptors would run
/// short.
const LEAVING: usize = 64;

/// A site: what an attacker with many addresses usually has.
fn site(network: IpAddr) -> IpAddr {
    match network {
        IpAddr::V4(address) => IpAddr::V4(Ipv4Addr::from_bits(address.to_bits() & !0 << 8)),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !0 << 72)),
    }
}

/// Whom places are kept for: members, and networks from which somebody has logged in lately.
#[derive(Debug, Default)]
pub struct Acquaintances {
    members: Mutex<HashSet<IpAddr>>,
    users: Mutex<HashMap<IpAddr, Instant>>,
}

impl Acquaintances {
    /// Nobody is known yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// These are the members' addresses from now on.
    pub fn set_members(&self, addresses: impl Iterator<Item = IpAddr>) {
        let mut members = locked(&self.members);
        *members = addresses.map(network).collect();
    }

    fn note(&self, network: IpAddr) {
        let mut users = locked(&self.users);
        if users.len() >= KNOWN_MOST {
            users.retain(|_, since| since.elapsed() < KNOWN);
        }
        if users.len() < KNOWN_MOST || users.contains_key(&network) {
            users.insert(network, Instant::now());
        }
    }

    fn knows(&self, network: IpAddr) -> bool {
        let user = |since: &Instant| since.elapsed() < KNOWN;
        locked(&self.members).contains(&network) || locked(&self.users).get(&network).is_some_and(user)
    }
}

/// How many places a server has.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    pub places: usize,
    /// At most for one network.
    pub from_one: usize,
    /// At most for one that is known.
    pub from_known: usize,
    /// Places that are only for those who are known.
    pub reserved: usize,
}

/// What a connection is doing, in the order in which they make room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It has not sent anything yet.
    Silent,
    /// It has begun to speak TLS, and not asked for anything yet.
    Greeted,
    /// Its last request is answered.
    Idle,
    Busy,
}

/// Connections in the same stage, by site and network.
#[derive(Debug, Default)]
struct Crowd(HashMap<IpAddr, (usize, HashMap<IpAddr, BTreeSet<u64>>)>);

impl Crowd {
    fn add(&mut self, network: IpAddr, id: u64) {
        let (count, networks) = self.0.entry(site(network)).or_default();
        *count += usize::from(networks.entry(network).or_default().insert(id));
    }

    fn remove(&mut self, network: IpAddr, id: u64) {
        let Entry::Occupied(mut site) = self.0.entry(site(network)) else { return };
        let (count, networks) = site.get_mut();
        if let Entry::Occupied(mut ids) = networks.entry(network)
            && ids.get_mut().remove(&id)
        {
            *count -= 1;
            if ids.get().is_empty() {
                ids.remove();
            }
        }
        if *count == 0 {
            site.remove();
        }
    }

    /// The oldest one of the most crowded network of the most crowded site.
    fn first(&self) -> Option<u64> {
        let (_, networks) = self.0.values().max_by_key(|(count, _)| *count)?;
        networks.values().max_by_key(|ids| ids.len())?.first().copied()
    }

    /// The oldest one of a network.
    fn first_of(&self, network: IpAddr) -> Option<u64> {
        self.0.get(&site(network))?.1.get(&network)?.first().copied()
    }
}

#[derive(Debug)]
struct Occupant {
    network: IpAddr,
    /// The crowd that it is in: it may be told to make room. None for those who have logged in.
    crowd: Option<(bool, Stage)>,
    since: Instant,
    end: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Now {
    next: u64,
    occupants: HashMap<u64, Occupant>,
    counts: HashMap<IpAddr, usize>,
    /// Of strangers and of those from a known network, by stage.
    crowds: [[Crowd; 4]; 2],
    /// Those that were told to end and have not ended yet.
    leaving: usize,
    told: Option<Instant>,
}

impl Now {
    fn crowd(&mut self, (known, stage): (bool, Stage)) -> &mut Crowd {
        &mut self.crowds[usize::from(known)][stage as usize]
    }

    fn place(&mut self, id: u64, crowd: Option<(bool, Stage)>) {
        let Some(occupant) = self.occupants.get_mut(&id) else { return };
        occupant.since = Instant::now();
        let (network, before) = (occupant.network, std::mem::replace(&mut occupant.crowd, crowd));
        if let Some(before) = before {
            self.crowd(before).remove(network, id);
        }
        if let Some(crowd) = crowd {
            self.crowd(crowd).add(network, id);
        }
    }

    fn remove(&mut self, id: u64) -> Option<Occupant> {
        self.place(id, None);
        let occupant = self.occupants.remove(&id)?;
        if let Entry::Occupied(mut count) = self.counts.entry(occupant.network) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
        Some(occupant)
    }

    /// Who is to make room: strangers first, and the silent first. Of that network alone, if one is given.
    fn candidate(&self, of: Option<IpAddr>) -> Option<u64> {
        let slow = |id: &u64| self.occupants.get(id).is_some_and(|occupant| occupant.since.elapsed() >= SLOW);
        self.crowds.iter().find_map(|[silent, greeted, idle, busy]| {
            let first = |crowd: &Crowd| of.map_or_else(|| crowd.first(), |network| crowd.first_of(network));
            let slow = |crowd: &Crowd| first(crowd).filter(slow);
            first(silent).or_else(|| slow(greeted)).or_else(|| first(idle)).or_else(|| slow(busy))
        })
    }

    /// Tells one to end; false if there is none that could.
    fn make_room(&mut self, of: Option<IpAddr>) -> bool {
        let Some(occupant) = self.candidate(of).and_then(|id| self.remove(id)) else { return false };
        occupant.end.notify_one();
        self.leaving += 1;
        true
    }
}

/// The places of one server.
#[derive(Debug)]
pub struct Places {
    server: &'static str,
    room: Room,
    acquaintances: Arc<Acquaintances>,
    now: Mutex<Now>,
    /// One of those who were told to end has done so.
    left: Notify,
}

impl Places {
    /// All are free. The server is named in the log and the metrics.
    pub fn new(server: &'static str, room: Room, acquaintances: Arc<Acquaintances>) -> Arc<Self> {
        Arc::new(Self { server, room, acquaintances, now: Mutex::default(), left: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        locked(&self.now)
    }

    /// A place for a connection, another one may have to end for it; none if nobody can be asked to.
    pub async fn enter(self: &Arc<Self>, from: IpAddr) -> Option<Place> {
        loop {
            let left = self.left.notified();
            if self.lock().leaving < LEAVING {
                return self.admit(network(from));
            }
            left.await;
        }
    }

    fn admit(self: &Arc<Self>, network: IpAddr) -> Option<Place> {
        let known = self.acquaintances.knows(network);
        let mut now = self.lock();
        let Room { places, from_one, from_known, reserved } = self.room;
        let (places, share) = if known { (places, from_known) } else { (places - reserved, from_one) };
        let (full, own) = (now.occupants.len() >= places, now.counts.get(&network).copied().unwrap_or(0));
        let (ended, admitted) = if own >= share {
            let made = now.make_room(Some(network));
            (made, made)
        } else if full {
            let made = now.make_room(None);
            (made, made)
        } else {
            (false, true)
        };
        if ended || !admitted {
            self.tell(&mut now, network, admitted);
        }
        if !admitted {
            return None;
        }
        let (id, end) = (now.next, Arc::new(Notify::new()));
        now.next += 1;
        *now.counts.entry(network).or_default() += 1;
        now.occupants.insert(id, Occupant { network, crowd: None, since: Instant::now(), end: Arc::clone(&end) });
        now.place(id, Some((known, Stage::Silent)));
        let visit = Visit { places: Arc::clone(self), network, id, end, vouched: Arc::default() };
        Some(Place { visit })
    }

    /// Ends one connection that can make room, because descriptors are short.
    pub fn make_room(&self) {
        if self.lock().make_room(None) {
            metrics::counter!(CONNECTIONS_ENDED, "server" => self.server).increment(1);
        }
    }

    fn tell(&self, now: &mut Now, from: IpAddr, admitted: bool) {
        let server = self.server;
        let counter = if admitted { CONNECTIONS_ENDED } else { CONNECTIONS_REFUSED };
        metrics::counter!(counter, "server" => server).increment(1);
        if now.told.is_some_and(|at| at.elapsed() < TOLD) {
            return;
        }
        now.told = Some(Instant::now());
        let (places, share) = (self.room.places, self.room.from_one);
        if admitted {
            tracing::warn!(%from, server, places, share, "places for connections are short: silent ones are ended for new ones");
        } else {
            tracing::warn!(%from, server, places, share, "connections are turned away: there are too many, in all or from this network");
        }
    }
}

/// A place that is taken until this is dropped.
#[derive(Debug)]
pub struct Place {
    visit: Visit,
}

impl Place {
    /// What is known of the connection, to note more of it.
    pub fn visit(&self) -> Visit {
        self.visit.clone()
    }

    /// Returns when the connection must make room for others.
    pub async fn ended(&self) {
        self.visit.end.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let places = &self.visit.places;
        let mut now = places.lock();
        if now.remove(self.visit.id).is_none() {
            // It was told to end.
            now.leaving = now.leaving.saturating_sub(1);
            drop(now);
            places.left.notify_waiters();
        }
    }
}

/// Whose connection it is that a request comes by.
#[derive(Clone, Debug)]
pub struct Visit {
    places: Arc<Places>,
    network: IpAddr,
    id: u64,
    end: Arc<Notify>,
    /// Since when, lately.
    vouched: Arc<Mutex<Option<Instant>>>,
}

impl Visit {
    /// It has begun to speak TLS.
    pub fn greeted(&self) {
        self.stage(Stage::Greeted);
    }

    /// A request has come.
    pub fn busy(&self) {
        self.stage(Stage::Busy);
    }

    /// It is answered.
    pub fn idle(&self) {
        self.stage(Stage::Idle);
    }

    /// Nobody can tell whether it is busy: it stays, and when there are too many, new ones are turned away.
    pub fn stays(&self) {
        self.places.lock().place(self.id, None);
    }

    fn stage(&self, stage: Stage) {
        // Somebody who has logged in makes room for nobody.
        if locked(&self.vouched).is_some() {
            return;
        }
        let known = self.places.acquaintances.knows(self.network);
        let mut now = self.places.lock();
        if now.occupants.get(&self.id).is_some_and(|occupant| occupant.crowd.is_some()) {
            now.place(self.id, Some((known, stage)));
        }
    }

    /// Somebody has proven here who they are: this connection stays, and others from there find a place.
    pub fn vouch(&self) {
        let mut vouched = locked(&self.vouched);
        // Every request says so: not all the books are opened each time.
        if vouched.is_some_and(|at| at.elapsed() < VOUCHED) {
            return;
        }
        self.places.acquaintances.note(self.network);
        self.places.lock().place(self.id, None);
        *vouched = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const ROOM: Room = Room { places: 40, from_one: 20, from_known: 20, reserved: 4 };

    fn at(site: u8, host: u8) -> IpAddr {
        IpAddr::from([10, 0, site, host])
    }

    async fn is_ended(place: &Place) -> bool {
        timeout(Duration::ZERO, place.ended()).await.is_ok()
    }

    fn places() -> (Arc<Acquaintances>, Arc<Places>) {
        let known = Acquaintances::new();
        (Arc::clone(&known), Places::new("test", ROOM, known))
    }

    #[tokio::test]
    async fn silent_ones_of_the_most_crowded_network_make_room_first() {
        let (_, places) = places();
        let one = places.enter(at(1, 1)).await.unwrap();
        let mut flood = Vec::new();
        for round in 0..10 {
            for host in 0..20 {
                flood.push(places.enter(at(2, host)).await.unwrap());
                let mut stay = Vec::new();
                for place in flood.drain(..) {
                    if !is_ended(&place).await {
                        stay.push(place);
                    }
                }
                flood = stay;
                assert!(flood.len() < ROOM.places - ROOM.reserved, "round {round}");
            }
        }
        assert!(!is_ended(&one).await, "it is alone in its network");
        // Whoever asks for something stays, and those of the same site who do not make room.
        flood[0].visit().busy();
        for host in 100..160 {
            let new = places.enter(at(2, host)).await.unwrap();
            assert!(!is_ended(&flood[0]).await && !is_ended(&new).await);
        }
        drop((one, flood));
        let now = places.lock();
        assert!(now.occupants.is_empty() && now.counts.is_empty() && now.leaving == 0, "{now:?}");
        assert!(now.crowds.iter().flatten().all(|crowd| crowd.0.is_empty()));
    }

    #[tokio::test]
    async fn places_are_kept_for_members_and_users_and_one_network_has_its_share() {
        let (known, places) = places();
        known.set_members([at(9, 1)].into_iter());
        let mut busy = Vec::new();
        for number in 0..36 {
            let place = places.enter(at(number, 1)).await.unwrap();
            place.visit().busy();
            busy.push(place);
        }
        assert!(places.enter(at(100, 1)).await.is_none(), "nobody can be asked to end");
        let member = places.enter(at(9, 1)).await.unwrap();
        // A login makes its network known, and its connection stays.
        busy[0].visit().vouch();
        busy[0].visit().idle();
        let user = places.enter(at(0, 1)).await.unwrap();
        assert!(!is_ended(&busy[0]).await && !is_ended(&member).await && !is_ended(&user).await);
        drop(busy.split_off(1));
        let mut own = Vec::new();
        for _ in 0..ROOM.from_one {
            own.push(places.enter(at(7, 7)).await.unwrap());
        }
        let next = places.enter(at(7, 7)).await.unwrap();
        assert!(is_ended(&own[0]).await && !is_ended(&next).await && !is_ended(&user).await);
        own[1..].iter().chain([&next]).for_each(|place| place.visit().busy());
        assert!(places.enter(at(7, 7)).await.is_none(), "it has its share");
    }

    #[tokio::test]
    async fn those_who_leave_are_waited_for() {
        let room = Room { places: LEAVING * 3, from_one: LEAVING * 3, from_known: 0, reserved: 0 };
        let places = Places::new("test", room, Acquaintances::new());
        let mut all = Vec::new();
        for number in 0..room.places + LEAVING {
            all.push(places.enter(at((number % 200) as u8, 1)).await.unwrap());
        }
        let waits = places.enter(at(250, 1));
        let mut waits = std::pin::pin!(waits);
        assert!(timeout(Duration::from_millis(20), waits.as_mut()).await.is_err());
        let mut gone = 0;
        for place in all {
            gone += usize::from(is_ended(&place).await);
            drop(place);
        }
        assert_eq!(gone, LEAVING);
        assert!(waits.await.is_some());
    }

    #[test]
    fn a_site_has_many_networks() {
        let of = |text: &str| site(network(text.parse().unwrap()));
        assert_eq!(of("192.0.2.1"), of("192.0.2.254"));
        assert_ne!(of("192.0.2.1"), of("192.0.3.1"));
        assert_eq!(of("2001:db8:1:2::1"), of("2001:db8:1:ff::1"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:102::1"));
    }
}
