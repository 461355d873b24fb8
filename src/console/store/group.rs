//! Group commit: writers that wait for each other anyway share one transaction, and one wait for a majority. Each has
//! a savepoint, so that one that fails takes nobody along. Owns the writers' line and its transaction. Must never
//! report a part before the COMMIT of its transaction has returned, and never let anybody learn what no majority has:
//! see [`settled`].
//!
//! The last in the line commits; one that is alone waits for nobody. Whoever comes while a COMMIT is under way takes
//! part in the next transaction: so the groups grow with the load, and nothing is delayed to make them larger.

use std::{
    cell::RefCell,
    future::Future,
    mem,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use sqlx::{SqliteConnection, SqlitePool, SqliteTransaction};
use tokio::{
    runtime::Handle,
    sync::{Mutex, OwnedMutexGuard, watch},
};

use super::StoreError;
use crate::telemetry::{
    COMMIT_LATENCY, WRITES,
    steps::{self, Step},
};

/// The most parts of one transaction. More would gain little: a COMMIT costs as much as a few parts.
const PARTS: usize = 64;
/// How long a transaction takes parts in: whoever came first waits for those behind it.
const COLLECTS: Duration = Duration::from_millis(10);

/// What has become of a transaction; none as long as nobody knows.
type Outcome = watch::Receiver<Option<Result<(), StoreError>>>;

tokio::task_local! {
    /// The transactions that a request has seen before they were committed.
    static SEEN: RefCell<Vec<Outcome>>;
}

/// Runs `answer` and returns when a majority has everything that it saw of others' writes: an answer that builds upon
/// what is undone later would be untrue, even if it is a refusal.
///
/// # Errors
/// Those of the first COMMIT that failed.
pub(in crate::console) async fn settled<T>(answer: impl Future<Output = T>) -> Result<T, StoreError> {
    let work = async {
        let answered = answer.await;
        (answered, SEEN.with(RefCell::take))
    };
    let (answered, seen) = SEEN.scope(RefCell::default(), work).await;
    for outcome in seen {
        known(outcome).await?;
    }
    Ok(answered)
}

async fn known(mut outcome: Outcome) -> Result<(), StoreError> {
    let lost = || StoreError::Unknown(Arc::new(sqlx::Error::WorkerCrashed));
    match outcome.wait_for(Option::is_some).await {
        Ok(known) => known.clone().unwrap_or_else(|| Err(lost())),
        Err(_) => Err(lost()),
    }
}

/// The writers, in the order in which they came.
#[derive(Clone, Debug)]
pub(super) struct Line(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Of one connection.
    pool: SqlitePool,
    rollbacks: Rollbacks,
    open: Arc<Mutex<Option<Group>>>,
    /// Writers that wait for `open`.
    waiting: AtomicUsize,
    /// How often transactions have ended that changed users or sessions.
    login_revision: AtomicU64,
}

/// How often SQLite has rolled back a whole transaction on the connection. It does so by itself after some errors, and
/// what follows would be a transaction of its own, without the parts before it.
#[derive(Clone, Debug, Default)]
pub(super) struct Rollbacks(Arc<AtomicU64>);

impl Rollbacks {
    /// Counts those of a new connection.
    ///
    /// # Errors
    /// When the connection's thread has ended.
    pub(super) async fn count_on(&self, connection: &mut SqliteConnection) -> sqlx::Result<()> {
        let counter = Arc::clone(&self.0);
        connection.lock_handle().await?.set_rollback_hook(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        Ok(())
    }

    fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// An open transaction.
#[derive(Debug)]
struct Group {
    transaction: SqliteTransaction<'static>,
    parts: usize,
    began: Instant,
    /// There is a savepoint, at the begin of the last part.
    saved: bool,
    /// The last part came to nothing: what it wrote is to be undone.
    undo: bool,
    /// Users or sessions may be changed by it.
    changes_logins: bool,
    /// As they were at its begin.
    rollbacks: (Rollbacks, u64),
    /// What the database could not do last.
    trouble: Option<StoreError>,
    outcome: watch::Sender<Option<Result<(), StoreError>>>,
}

/// A place in the line.
struct Place<'a> {
    line: &'a Line,
    served: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let last = self.line.0.waiting.fetch_sub(1, Ordering::SeqCst) == 1;
        // Whoever would have committed for all may have counted on this one.
        if last && !self.served {
            self.line.finish_later();
        }
    }
}

impl Line {
    pub(super) fn new(pool: SqlitePool, rollbacks: Rollbacks) -> Self {
        Self(Arc::new(Inner {
            pool,
            rollbacks,
            open: Arc::default(),
            waiting: AtomicUsize::new(0),
            login_revision: AtomicU64::new(0),
        }))
    }

    /// Waits for its turn, `patience` at most, and begins a part.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub(super) async fn turn(&self, patience: Duration) -> Result<Turn, StoreError> {
        let begun = steps::begin();
        self.0.waiting.fetch_add(1, Ordering::SeqCst);
        let mut place = Place { line: self, served: false };
        let open = tokio::time::timeout(patience, Arc::clone(&self.0.open).lock_owned());
        // Whoever closes the database must not wait for the whole line.
        let open = self.0.pool.close_event().do_until(open).await.map_err(unavailable)?;
        let open = open.map_err(|_| unavailable(sqlx::Error::PoolTimedOut))?;
        begun.end(Step::RequestTurn);
        place.served = true;
        drop(place);
        let mut turn = Turn { line: self.clone(), open: Some(open), begun: false };
        turn.begin().await?;
        Ok(turn)
    }

    /// Changes with each transaction that changes users or sessions, before anybody is told of its end.
    pub(super) fn login_revision(&self) -> u64 {
        self.0.login_revision.load(Ordering::SeqCst)
    }

    /// Commits what is there if nobody else is in the line who would.
    fn finish_later(&self) {
        // Without a runtime there is nobody to be told.
        let Ok(runtime) = Handle::try_current() else { return };
        let line = self.clone();
        runtime.spawn(async move {
            let open = Arc::clone(&line.0.open).lock_owned().await;
            if line.is_empty() {
                line.finish(open).await;
            }
        });
    }

    /// Commits the transaction, and tells everybody who has a part in it.
    async fn finish(&self, mut open: OwnedMutexGuard<Option<Group>>) {
        // The line is held until the end.
        let Some(group) = open.take() else { return };
        let (changes_logins, outcome) = (group.changes_logins, group.outcome.clone());
        let done = group.commit().await;
        // Whatever has become of it: who has looked a user up before does it again.
        if changes_logins {
            self.0.login_revision.fetch_add(1, Ordering::SeqCst);
        }
        // Nobody may wait any more.
        outcome.send_replace(Some(done));
    }

    /// Nobody waits for a turn.
    fn is_empty(&self) -> bool {
        self.0.waiting.load(Ordering::SeqCst) == 0
    }
}

/// A part of a transaction on its way. Dropped without [`Self::commit`], it comes to nothing.
#[derive(Debug)]
pub(super) struct Turn {
    line: Line,
    /// None once it has ended.
    open: Option<OwnedMutexGuard<Option<Group>>>,
    /// It may have changed something.
    begun: bool,
}

impl Turn {
    async fn begin(&mut self) -> Result<(), StoreError> {
        let Some(open) = &mut self.open else { return Err(ended()) };
        match &mut **open {
            None => {
                // IMMEDIATE: what it reads first is still true when it writes.
                let begun = steps::begin();
                let transaction = self.line.0.pool.begin_with("BEGIN IMMEDIATE").await;
                begun.end(Step::RequestBegin);
                **open = Some(Group::new(transaction.map_err(unavailable)?, self.line.0.rollbacks.clone()));
            }
            Some(group) => {
                let begun = steps::begin();
                group.separate().await?;
                begun.end(Step::RequestSavepoint);
                // Whoever does not answer a request has nobody to be untrue to.
                let _ = SEEN.try_with(|seen| seen.borrow_mut().push(group.outcome.subscribe()));
            }
        }
        self.begun = true;
        Ok(())
    }

    /// The connection of the transaction. What comes of its use goes through [`Self::judge`].
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when there is no transaction any more.
    pub(super) fn connection(&mut self) -> Result<&mut SqliteConnection, StoreError> {
        let group = self.open.as_deref_mut().and_then(Option::as_mut).ok_or_else(ended)?;
        group.intact()?;
        Ok(&mut group.transaction)
    }

    /// To be said before users or sessions are changed.
    pub(super) fn changes_logins(&mut self) {
        if let Some(group) = self.open.as_deref_mut().and_then(Option::as_mut) {
            group.changes_logins = true;
        }
    }

    /// What the use of the connection has come to.
    ///
    /// # Errors
    /// See [`StoreError::within`]. This part comes to nothing.
    pub(super) fn judge<T>(&mut self, result: sqlx::Result<T>) -> Result<T, StoreError> {
        let group = self.open.as_deref_mut().and_then(Option::as_mut);
        result.map_err(|error| {
            let error = StoreError::within(error);
            if let (Some(group), StoreError::Unavailable(_)) = (group, &error) {
                group.trouble = Some(error.clone());
            }
            error
        })
    }

    /// Ends the part, and returns when its transaction is committed.
    ///
    /// # Errors
    /// Those of COMMIT.
    pub(super) async fn commit(self) -> Result<(), StoreError> {
        self.end(false).await
    }

    /// As [`Self::commit`], and nobody else gets a turn before it returns.
    ///
    /// # Errors
    /// As those of [`Self::commit`].
    pub(super) async fn commit_at_once(self) -> Result<(), StoreError> {
        self.end(true).await
    }

    async fn end(mut self, at_once: bool) -> Result<(), StoreError> {
        let Some(mut open) = self.open.take() else { return Err(ended()) };
        let Some(group) = open.as_mut() else { return Err(ended()) };
        group.parts += 1;
        let outcome = group.outcome.subscribe();
        let full = group.parts >= PARTS || group.began.elapsed() >= COLLECTS || group.is_undone();
        // Whoever waits here may go away. Then nobody else may want to know how it ends.
        let own = group.parts == 1 && !group.changes_logins;
        let line = self.line.clone();
        if !(at_once || full || line.is_empty()) {
            drop(open);
        } else if own {
            line.finish(open).await;
        } else {
            tokio::spawn(async move { line.finish(open).await });
        }
        let begun = steps::begin();
        let known = known(outcome).await;
        begun.end(Step::RequestOutcome);
        known
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(mut open) = self.open.take() else { return };
        let Some(group) = open.as_mut() else { return };
        if group.parts == 0 {
            // Nobody else has a part in it: it is rolled back.
            drop(open.take());
            return;
        }
        // What it has not begun, it cannot have changed.
        group.undo |= self.begun;
        let over = group.is_undone() || self.line.is_empty();
        if over && let Ok(runtime) = Handle::try_current() {
            let line = self.line.clone();
            runtime.spawn(async move { line.finish(open).await });
        }
    }
}

impl Group {
    fn new(transaction: SqliteTransaction<'static>, rollbacks: Rollbacks) -> Self {
        let rollbacks = (rollbacks.clone(), rollbacks.now());
        let (outcome, _) = watch::channel(None);
        let (parts, began, trouble) = (0, Instant::now(), None);
        let (saved, undo, changes_logins) = (false, false, false);
        Self { transaction, parts, began, saved, undo, changes_logins, rollbacks, trouble, outcome }
    }

    /// SQLite has rolled it back.
    fn is_undone(&self) -> bool {
        self.rollbacks.0.now() != self.rollbacks.1
    }

    /// Draws a line behind the last part.
    async fn separate(&mut self) -> Result<(), StoreError> {
        self.clean().await?;
        let saved = mem::take(&mut self.saved);
        // Released, for a savepoint keeps a copy of every page that is changed behind it. If this is cut off in the
        // middle, it leaves one that does no harm.
        let sql = if saved { "RELEASE part; SAVEPOINT part" } else { "SAVEPOINT part" };
        self.execute(sql).await?;
        self.saved = true;
        self.intact()
    }

    /// Undoes what came to nothing, so that the parts before it are left.
    async fn clean(&mut self) -> Result<(), StoreError> {
        self.intact()?;
        if self.undo {
            // It may be cut off: then it is done again.
            self.execute("ROLLBACK TO part").await?;
            self.undo = false;
        }
        self.intact()
    }

    fn intact(&self) -> Result<(), StoreError> {
        if !self.is_undone() {
            return Ok(());
        }
        let unsaid = || unavailable(sqlx::Error::Protocol("it was rolled back".to_owned()));
        Err(self.trouble.clone().unwrap_or_else(unsaid))
    }

    async fn commit(mut self) -> Result<(), StoreError> {
        // Dropped, it is rolled back.
        self.clean().await?;
        let (begin, begun) = (Instant::now(), steps::begin());
        self.transaction.commit().await.map_err(StoreError::commit)?;
        begun.end(Step::CommitWhole);
        metrics::histogram!(COMMIT_LATENCY).record(begin.elapsed().as_secs_f64());
        metrics::counter!(WRITES).increment(self.parts as u64);
        Ok(())
    }

    async fn execute(&mut self, sql: &'static str) -> Result<(), StoreError> {
        let done = sqlx::query(sql).execute(&mut *self.transaction).await;
        done.map(|_| ()).map_err(|error| self.trouble.insert(unavailable(error)).clone())
    }
}

fn unavailable(error: sqlx::Error) -> StoreError {
    StoreError::Unavailable(Arc::new(error))
}

fn ended() -> StoreError {
    unavailable(sqlx::Error::PoolClosed)
}

#[cfg(test)]
mod tests;
