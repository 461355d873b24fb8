//! Checks whether a name and a password are right. What was right lately is remembered, as each request would cost a
//! password hash otherwise. Whoever guesses is slowed down before that is looked at, so that a guess learns nothing
//! from it. Must never keep a password in clear, nor let a stranger who guesses keep somebody out.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use ring::{hmac, rand::SystemRandom};
use tokio::sync::watch;

use super::{errors::ApiError, password::Hasher, user::Login};
use crate::{
    clients::{
        network,
        throttle::{FORGET, Limits, Throttle},
    },
    mutex::locked,
};

/// How long a verified name and password need not be verified again.
const CACHE_LIFE: Duration = Duration::from_secs(60);
/// Verified names and passwords remembered, and networks of users.
const CACHE_SIZE: usize = 1024;
/// Wrong passwords for one account from one address.
const ACCOUNT: Limits = Limits { free: 5, longest: Duration::from_secs(30) };
/// Wrong passwords for one account from all addresses together: wide and short, since whoever knows a name could
/// otherwise keep its owner out.
const NAME: Limits = Limits { free: 50, longest: Duration::from_secs(1) };
/// Wrong passwords from one address: wide, because all clients behind a load balancer come from the same one.
const ADDRESS: Limits = Limits { free: 50, longest: Duration::from_secs(2) };

/// A user's name and the network that they come from.
type Account = (String, IpAddr);
/// Stands for a name, a password and the stored hash.
type Tag = [u8; 32];

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) right: bool,
    /// True if it was computed for this request: not remembered, nor found out for another one that asked the same.
    pub(super) computed: bool,
}

/// What verification needs besides the database.
#[derive(Debug)]
pub(super) struct Logins {
    pub(super) hasher: Hasher,
    accounts: Throttle<Account>,
    names: Throttle<String>,
    addresses: Throttle<IpAddr>,
    /// Random for each process, so that the tables below are of no use to anybody else.
    key: hmac::Key,
    memory: Mutex<Memory>,
}

/// Held while an attempt begins, so that of many at once each sees those before it.
#[derive(Debug, Default)]
struct Memory {
    verified: HashMap<Tag, Instant>,
    /// What is being found out. Bounded by the number of requests.
    pending: HashMap<Tag, watch::Receiver<Option<bool>>>,
    /// Where users have logged in from before: nobody elsewhere keeps them out there.
    known: HashSet<Account>,
}

/// What is to be done for a request.
enum Begun<'a> {
    Remembered,
    /// Another request asks the same.
    Pending(watch::Receiver<Option<bool>>),
    Compute(Attempt<'a>),
}

/// An attempt that counts as a failure. It is taken back if it ends before it has begun to compute.
struct Attempt<'a> {
    logins: &'a Logins,
    account: Account,
    tag: Tag,
    /// Not counted against the name.
    known: bool,
    computes: bool,
    outcome: watch::Sender<Option<bool>>,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        self.logins.memory().pending.remove(&self.tag);
        if !self.computes {
            self.logins.accounts.forgive(&self.account);
            if !self.known {
                self.logins.names.forgive(&self.account.0);
            }
        }
    }
}

fn slow_down(wait: Duration) -> ApiError {
    ApiError::TooMany(wait.as_secs() + 1)
}

impl Logins {
    pub(super) fn new() -> Result<Self, ring::error::Unspecified> {
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())?;
        let (accounts, names, addresses) = (Throttle::new(ACCOUNT), Throttle::new(NAME), Throttle::new(ADDRESS));
        Ok(Self { hasher: Hasher::new(), accounts, names, addresses, key, memory: Mutex::default() })
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        locked(&self.memory)
    }

    /// It covers the stored hash, so that an old password is not remembered as right after a change.
    fn tag(&self, login: &Login, stored: Option<&str>) -> Tag {
        let mut context = hmac::Context::with_key(&self.key);
        for part in [&login.username, stored.unwrap_or_default(), &login.password] {
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part.as_bytes());
        }
        let mut tag = [0; 32];
        tag.copy_from_slice(context.sign().as_ref());
        tag
    }

    /// Takes over what another primary saw of this login, so long ago: whoever guesses gains nothing by a takeover, and
    /// whoever has logged in from somewhere stays known there.
    pub(super) fn recall(&self, name: &str, from: IpAddr, right: bool, age: Duration) {
        let account = (name.to_owned(), network(from));
        if right {
            return self.succeeded(&account);
        }
        if age >= FORGET {
            return;
        }
        let now = Instant::now();
        let at = now.checked_sub(age).unwrap_or(now);
        self.addresses.recall(&account.1, at);
        self.accounts.recall(&account, at);
        if !self.memory().known.contains(&account) {
            self.names.recall(&account.0, at);
        }
    }

    /// How long the next attempt for this account from this network must wait.
    fn wait(&self, account: &Account, known: bool, now: Instant) -> Duration {
        let (name, from) = account;
        let all = if known { Duration::ZERO } else { self.names.wait(name, now) };
        all.max(self.accounts.wait(account, now)).max(self.addresses.wait(from, now))
    }

    /// Asks in this order: may this one try at all, is the answer known, is it being found out? Otherwise it is an
    /// attempt, which is counted before it waits for its turn.
    fn begin(&self, account: &Account, tag: Tag, now: Instant) -> Result<Begun<'_>, Duration> {
        let mut memory = self.memory();
        let known = memory.known.contains(account);
        let wait = self.wait(account, known, now);
        if !wait.is_zero() {
            return Err(wait);
        }
        if memory.verified.get(&tag).is_some_and(|since| since.elapsed() < CACHE_LIFE) {
            return Ok(Begun::Remembered);
        }
        if let Some(outcome) = memory.pending.get(&tag) {
            return Ok(Begun::Pending(outcome.clone()));
        }
        self.accounts.attempt(account, now)?;
        if !known && let Err(wait) = self.names.attempt(&account.0, now) {
            self.accounts.forgive(account);
            return Err(wait);
        }
        let outcome = watch::Sender::new(None);
        memory.pending.insert(tag, outcome.subscribe());
        Ok(Begun::Compute(Attempt { logins: self, account: account.clone(), tag, known, computes: false, outcome }))
    }

    fn succeeded(&self, account: &Account) {
        let (name, from) = account;
        self.accounts.succeeded(account);
        self.names.succeeded(name);
        self.addresses.succeeded(from);
        let mut memory = self.memory();
        if memory.known.len() >= CACHE_SIZE {
            memory.known.clear();
        }
        memory.known.insert(account.clone());
    }

    fn remember(&self, tag: Tag) {
        let verified = &mut self.memory().verified;
        if verified.len() >= CACHE_SIZE {
            verified.retain(|_, since| since.elapsed() < CACHE_LIFE);
        }
        if verified.len() < CACHE_SIZE {
            verified.insert(tag, Instant::now());
        }
    }

    /// Checks a name and a password against the hash of that user, if there is one.
    pub(super) async fn verify(&self, login: Login, stored: Option<String>, from: IpAddr) -> Result<Verdict, ApiError> {
        let tag = self.tag(&login, stored.as_deref());
        let account = (login.username, network(from));
        loop {
            let attempt = match self.begin(&account, tag, Instant::now()).map_err(slow_down)? {
                Begun::Remembered => return Ok(Verdict { right: true, computed: false }),
                Begun::Compute(attempt) => attempt,
                Begun::Pending(mut outcome) => match outcome.wait_for(Option::is_some).await.map(|right| *right) {
                    Ok(right) => return Ok(Verdict { right: right == Some(true), computed: false }),
                    // That request has gone away.
                    Err(_) => continue,
                },
            };
            return attempt.compute(login.password, stored).await.map(|right| Verdict { right, computed: true });
        }
    }
}

impl Attempt<'_> {
    async fn compute(mut self, password: String, stored: Option<String>) -> Result<bool, ApiError> {
        let turn = self.logins.hasher.turn(self.known).await?;
        // Not before its turn: those behind one load balancer must not be refused for coming at once.
        self.logins.addresses.attempt(&self.account.1, Instant::now()).map_err(slow_down)?;
        self.computes = true;
        let right = turn.verify(password, stored).await?;
        if right {
            self.logins.succeeded(&self.account);
            self.logins.remember(self.tag);
        }
        self.outcome.send_replace(Some(right));
        Ok(right)
    }
}

#[cfg(test)]
mod tests {
    use std::{pin::pin, sync::Arc};

    use futures_util::future::join_all;
    use tokio::runtime::Runtime;

    use super::*;

    fn login(username: &str, password: &str) -> Login {
        Login { username: username.into(), password: password.into() }
    }

    fn attempt(logins: &Logins, account: &Account, number: usize, now: Instant) -> Result<(), Duration> {
        let mut tag = [0; 32];
        tag[..8].copy_from_slice(&number.to_le_bytes());
        match logins.begin(account, tag, now)? {
            Begun::Compute(mut attempt) => attempt.computes = true,
            _ => panic!("each is another guess"),
        }
        Ok(())
    }

    #[test]
    fn the_cache_is_bounded_and_tells_logins_apart() {
        let logins = Logins::new().unwrap();
        assert_ne!(logins.tag(&login("ab", "c"), None), logins.tag(&login("a", "bc"), None));
        assert_ne!(logins.tag(&login("a", "b"), Some("old")), logins.tag(&login("a", "b"), Some("new")));
        for number in 0..CACHE_SIZE + 5 {
            logins.remember(logins.tag(&login("a", &number.to_string()), None));
        }
        assert_eq!(logins.memory().verified.len(), CACHE_SIZE);
    }

    /// Somebody else's guesses, as many as are borne from there: who knows the password waits for a second at most, and
    /// not at all where he has logged in before.
    #[test]
    fn a_stranger_who_guesses_keeps_nobody_out() {
        let logins = Logins::new().unwrap();
        let at = |last: u8| ("admin".to_owned(), IpAddr::from([192, 0, last, 1]));
        logins.succeeded(&at(250));
        let (begin, mut guesses) = (Instant::now(), 0);
        let mut now = begin;
        while now < begin + Duration::from_secs(120) {
            for stranger in 0..20 {
                guesses += usize::from(attempt(&logins, &at(stranger), guesses, now).is_ok());
            }
            assert!(logins.wait(&at(200), false, now) <= NAME.longest);
            assert!(logins.wait(&at(250), true, now).is_zero());
            now += Duration::from_millis(100);
        }
        assert!(guesses < 300, "{guesses} guesses in two minutes from 20 networks");
        assert!(logins.wait(&at(0), false, now) > NAME.longest);
        attempt(&logins, &at(200), guesses, now + NAME.longest).unwrap();
        // One host of IPv6 has as many addresses as it likes, and a site has many networks: the name is what counts
        // then.
        let sites = |number: u16| IpAddr::from([0x2001, 0xdb8, 1, number, 0, 0, 0, 1]);
        let tried = (0..500)
            .filter(|n| attempt(&logins, &("other".into(), network(sites(*n))), 1000 + *n as usize, now).is_ok());
        assert!((40..60).contains(&tried.count()));
    }

    #[test]
    fn of_many_guesses_at_once_a_handful_is_computed() {
        let (runtime, logins) = (Runtime::new().unwrap(), Arc::new(Logins::new().unwrap()));
        let from = IpAddr::from([192, 0, 2, 1]);
        let stored =
            runtime.block_on(async { logins.hasher.turn(true).await.unwrap().hash("right".into()).await.unwrap() });
        let verify = |password: String, from: IpAddr| {
            let (logins, stored) = (logins.clone(), stored.clone());
            async move { logins.verify(login("admin", &password), Some(stored), from).await }
        };
        // The owner is logged in from elsewhere: what is remembered must not tell anybody else.
        let right = Verdict { right: true, computed: true };
        assert_eq!(runtime.block_on(verify("right".into(), IpAddr::from([192, 0, 2, 9]))).unwrap(), right);
        let guesses: Vec<_> = (0..100).map(|number| runtime.spawn(verify(number.to_string(), from))).collect();
        let mut computed = 0;
        for guess in guesses {
            match runtime.block_on(guess).unwrap() {
                Ok(verdict) => computed += usize::from(!verdict.right),
                Err(error) => assert!(matches!(error, ApiError::TooMany(_)), "{error}"),
            }
        }
        // Six, and a few more if this machine takes seconds for them.
        assert!((6..=9).contains(&computed), "{computed} guesses were computed");
        (0..20).for_each(|_| logins.recall("admin", from, false, Duration::ZERO));
        for guess in ["wrong", "right"] {
            let refused = runtime.block_on(verify(guess.into(), from)).unwrap_err();
            assert!(matches!(refused, ApiError::TooMany(_)), "{guess}: {refused}");
        }
        let cached = Verdict { right: true, computed: false };
        assert_eq!(runtime.block_on(verify("right".into(), IpAddr::from([192, 0, 2, 9]))).unwrap(), cached);
    }

    #[test]
    fn many_who_say_the_same_at_once_cost_one_hash_and_one_failure() {
        let (runtime, logins) = (Runtime::new().unwrap(), Arc::new(Logins::new().unwrap()));
        let from = IpAddr::from([192, 0, 2, 1]);
        let verdicts = runtime.block_on(async {
            // Whoever could compute waits for its turn until all have asked.
            let turns = [logins.hasher.turn(true).await.unwrap(), logins.hasher.turn(true).await.unwrap()];
            let mut all = pin!(join_all((0..50).map(|_| logins.verify(login("admin", "same"), None, from))));
            tokio::time::timeout(Duration::from_millis(100), all.as_mut()).await.unwrap_err();
            drop(turns);
            all.await
        });
        let verdicts: Vec<_> = verdicts.into_iter().map(Result::unwrap).collect();
        assert!(verdicts.iter().all(|verdict| !verdict.right));
        assert_eq!(verdicts.iter().filter(|verdict| verdict.computed).count(), 1);
        assert!(logins.memory().pending.is_empty());
        // Who leaves before the turn comes has not guessed.
        let turns = runtime
            .block_on(async { (logins.hasher.turn(true).await.unwrap(), logins.hasher.turn(true).await.unwrap()) });
        for number in 0..20 {
            let guess = logins.verify(login("other", &number.to_string()), None, from);
            runtime.block_on(async { tokio::time::timeout(Duration::from_millis(1), guess).await.unwrap_err() });
        }
        assert!(logins.wait(&("other".into(), from), false, Instant::now()).is_zero());
        drop(turns);
    }

    #[test]
    fn a_takeover_forgets_neither_who_guesses_nor_who_is_known() {
        let logins = Logins::new().unwrap();
        let (guesser, owner) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        logins.recall("admin", owner, true, Duration::from_secs(3600));
        for _ in 0..60 {
            logins.recall("admin", guesser, false, Duration::ZERO);
        }
        let now = Instant::now();
        assert!(logins.begin(&("admin".into(), guesser), [1; 32], now).is_err());
        assert!(logins.begin(&("admin".into(), owner), [2; 32], now).is_ok());
        logins.recall("old", guesser, false, FORGET);
        assert!(logins.accounts.wait(&("old".into(), guesser), now).is_zero());
    }
}
