//! How many bytes all connections of Defenders together may keep in memory. Who needs more waits in the order of
//! asking, and its connection is not read meanwhile, so that the Defender keeps its events on its own disk. Must never
//! let one of them wait for ever, nor count what nobody keeps any more.

use std::{
    fmt, mem,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Instant,
};

use tokio::sync::Semaphore;

use crate::{
    mutex::locked,
    telemetry::{DEFENDER_BYTES, DEFENDERS_WAITING},
};

/// Bytes of messages that come or have come, and whose events are not committed yet.
const READ: usize = 64 << 20;
/// Bytes of messages that are made for Defenders and not yet taken by the kernel.
const WRITTEN: usize = 32 << 20;
/// What each connection may have besides, in either direction: a hello, some events, an acknowledgement. So whoever has
/// little to say is read and answered at any time.
pub(super) const OWN: usize = 4 << 10;

/// The budgets of one Console.
#[derive(Clone, Debug)]
pub(super) struct Budgets {
    pub(super) read: Arc<Budget>,
    pub(super) written: Arc<Budget>,
}

impl Default for Budgets {
    fn default() -> Self {
        Self::of(READ, WRITTEN)
    }
}

impl Budgets {
    /// So many bytes for what is read, and for what is written.
    pub(super) fn of(read: usize, written: usize) -> Self {
        Self { read: Budget::new("read", read), written: Budget::new("written", written) }
    }
}

/// Bytes that connections share. Each place of the semaphore is one of them.
#[derive(Debug)]
pub(super) struct Budget {
    /// As the log and the metrics name it.
    way: &'static str,
    bytes: usize,
    free: Arc<Semaphore>,
    now: Mutex<Now>,
}

#[derive(Debug, Default)]
struct Now {
    /// Who waits for a share.
    waiting: usize,
    /// Since when it has been used up, and how many have waited at once.
    short: Option<(Instant, usize)>,
}

impl Budget {
    fn new(way: &'static str, bytes: usize) -> Arc<Self> {
        metrics::gauge!(DEFENDER_BYTES, "way" => way).set(0.0);
        metrics::gauge!(DEFENDERS_WAITING, "way" => way).set(0.0);
        Arc::new(Self { way, bytes, free: Arc::new(Semaphore::new(bytes)), now: Mutex::default() })
    }

    /// A share, if there is one and nobody has asked before.
    fn try_take(self: &Arc<Self>, bytes: usize) -> Option<Share> {
        let places = u32::try_from(bytes.min(self.bytes)).ok()?;
        self.free.try_acquire_many(places).ok()?.forget();
        self.show();
        Some(Share { budget: Arc::clone(self), bytes: places as usize })
    }

    /// A share, when its turn has come; all of the budget at most. It may be given up at any time.
    pub(super) async fn take(self: Arc<Self>, bytes: usize) -> Share {
        if let Some(share) = self.try_take(bytes) {
            return share;
        }
        let _waiting = Waiting::begin(&self);
        let places = u32::try_from(bytes.min(self.bytes)).unwrap_or(u32::MAX);
        // The error would mean that it is closed, which nobody does.
        self.free.acquire_many(places).await.into_iter().for_each(tokio::sync::SemaphorePermit::forget);
        self.show();
        Share { budget: Arc::clone(&self), bytes: places as usize }
    }

    /// Bytes that are taken.
    pub(super) fn used(&self) -> usize {
        self.bytes.saturating_sub(self.free.available_permits())
    }

    fn show(&self) {
        metrics::gauge!(DEFENDER_BYTES, "way" => self.way).set(self.used() as f64);
    }

    /// Something was given back, or somebody waits no longer.
    fn settle(&self) {
        self.show();
        let mut now = locked(&self.now);
        metrics::gauge!(DEFENDERS_WAITING, "way" => self.way).set(now.waiting as f64);
        // Not as soon as there is a byte: it would be used up again at once.
        if now.waiting > 0 || self.used() > self.bytes / 2 {
            return;
        }
        if let Some((since, most)) = now.short.take() {
            let (seconds, way) = (since.elapsed().as_secs_f64(), self.way);
            drop(now);
            tracing::info!(way, most, "there is room again for what Defenders say and are told, after {seconds:.1} s");
        }
    }
}

/// Somebody who waits for a share, until this is dropped.
struct Waiting<'a>(&'a Budget);

impl<'a> Waiting<'a> {
    fn begin(budget: &'a Budget) -> Self {
        let mut now = locked(&budget.now);
        now.waiting += 1;
        let (waiting, began) = (now.waiting, now.short.is_none());
        let short = now.short.get_or_insert((Instant::now(), 0));
        short.1 = short.1.max(waiting);
        drop(now);
        metrics::gauge!(DEFENDERS_WAITING, "way" => budget.way).set(waiting as f64);
        if began {
            let (way, mebibytes) = (budget.way, budget.bytes >> 20);
            match way {
                "read" => tracing::warn!(
                    way,
                    mebibytes,
                    "Defenders send faster than the cluster commits: who sends much is read in turn, and keeps the rest"
                ),
                _ => tracing::warn!(way, mebibytes, "Defenders take slowly what they are told: they are told in turn"),
            }
        }
        Self(budget)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        locked(&self.0.now).waiting -= 1;
        self.0.settle();
    }
}

/// Bytes of a budget, which are given back when this is dropped.
pub(super) struct Share {
    budget: Arc<Budget>,
    bytes: usize,
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Share").field("way", &self.budget.way).field("bytes", &self.bytes).finish()
    }
}

impl Share {
    /// How many they are.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// This and another one.
    pub(super) fn and(mut self, mut other: Self) -> Self {
        self.bytes += mem::take(&mut other.bytes);
        self
    }

    /// A part, as much as there is.
    fn split(&mut self, bytes: usize) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self { budget: Arc::clone(&self.budget), bytes }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.budget.free.add_permits(self.bytes);
            self.budget.settle();
        }
    }
}

/// What one connection needs of the budget, and what it has.
pub(super) struct Account {
    budget: Arc<Budget>,
    need: usize,
    have: Share,
    /// The share that it waits for.
    asked: Option<Pin<Box<dyn Future<Output = Share> + Send>>>,
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account").field("need", &self.need).field("have", &self.have).finish_non_exhaustive()
    }
}

impl Account {
    /// It needs nothing yet.
    pub(super) fn new(budget: &Arc<Budget>) -> Self {
        Self { budget: Arc::clone(budget), need: 0, have: Share { budget: Arc::clone(budget), bytes: 0 }, asked: None }
    }

    /// So many bytes more are about to be kept.
    pub(super) fn need(&mut self, bytes: usize) {
        self.need += bytes;
    }

    /// So many bytes are not kept any more.
    pub(super) fn spare(&mut self, bytes: usize) {
        self.need = self.need.saturating_sub(bytes);
        let surplus = self.have.bytes.saturating_sub(self.need);
        drop(self.have.split(surplus));
        if self.need <= self.have.bytes {
            self.asked = None;
        }
    }

    /// Somebody else keeps so many bytes from now on, and their share. None if the share is not there yet.
    pub(super) fn hand_on(&mut self, bytes: usize) -> Option<Share> {
        (bytes <= self.have.bytes).then(|| {
            self.need = self.need.saturating_sub(bytes);
            self.have.split(bytes)
        })
    }

    /// True if what is needed may be kept already: of what has no share, each connection may have a little.
    pub(super) fn may_read(&self) -> bool {
        self.need <= self.have.bytes + OWN
    }

    /// Asks for what is missing. True if some of it has come; otherwise the task is woken when it does.
    pub(super) fn poll_cover(&mut self, cx: &mut Context<'_>) -> bool {
        let mut more = false;
        while self.need > self.have.bytes {
            let missing = self.need - self.have.bytes;
            // A future is made only for those who have to wait.
            let at_once = if self.asked.is_none() { self.budget.try_take(missing) } else { None };
            let come = at_once.map_or_else(
                || {
                    let budget = &self.budget;
                    let asked = self.asked.get_or_insert_with(|| Box::pin(Arc::clone(budget).take(missing)));
                    asked.as_mut().poll(cx)
                },
                Poll::Ready,
            );
            let Poll::Ready(mut share) = come else { break };
            self.asked = None;
            self.have.bytes += mem::take(&mut share.bytes);
            more = true;
        }
        more
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    fn covered(account: &mut Account) -> bool {
        account.poll_cover(&mut Context::from_waker(Waker::noop()));
        account.asked.is_none()
    }

    #[test]
    fn who_needs_much_waits_in_order_and_who_needs_little_goes_on() {
        let budget = Budgets::of(100 << 10, 0).read;
        let mut all: Vec<Account> = (0..4).map(|_| Account::new(&budget)).collect();
        let needs = [60 << 10, 60 << 10, 30 << 10, OWN];
        for (account, bytes) in all.iter_mut().zip(needs) {
            account.need(bytes);
        }
        let now: Vec<bool> = all.iter_mut().map(covered).collect();
        assert_eq!(now, [true, false, false, false], "nobody is served before the second one, though there is room");
        let may_read: Vec<bool> = all.iter().map(Account::may_read).collect();
        assert_eq!(may_read, [true, false, false, true]);
        let told = |now: &Now| (now.waiting, now.short.map(|(_, most)| most));
        assert_eq!(told(&locked(&budget.now)), (3, Some(3)));
        // Its events are with somebody else, who keeps the share.
        assert!(all[1].hand_on(1).is_none(), "there is no share to hand on");
        let share = all[0].hand_on(60 << 10).unwrap();
        assert!(!covered(&mut all[1]));
        drop(share);
        let now: Vec<bool> = all.iter_mut().map(covered).collect();
        assert_eq!((now, budget.used()), (vec![true; 4], (90 << 10) + OWN));
        assert!(locked(&budget.now).short.is_some(), "it is still used up by more than half");
        all[1].spare(60 << 10);
        assert!(locked(&budget.now).short.is_none());
        drop(all);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn what_is_given_up_goes_to_the_next() {
        let budget = Budgets::of(100, 0).read;
        let [mut first, mut gone, mut last] = [(); 3].map(|()| Account::new(&budget));
        first.need(90);
        gone.need(50);
        last.need(20);
        assert!(covered(&mut first) && !covered(&mut gone) && !covered(&mut last));
        drop(gone);
        first.spare(30);
        assert!(covered(&mut last));
        // More than there is: all of it, when the others have left.
        first.need(1000);
        assert!(!covered(&mut first));
        first.spare(1000);
        assert!(first.asked.is_none() && covered(&mut first));
        drop((first, last));
        assert_eq!((budget.used(), locked(&budget.now).waiting), (0, 0));
    }
}
