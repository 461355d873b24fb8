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

use futures_util::TryStreamExt;
use sqlx::{
    AssertSqlSafe, Either, Execute, Executor, Sqlite, SqliteConnection, SqlitePool,
    pool::PoolConnection,
    query::Query,
    sqlite::{SqliteArguments, SqliteRow},
};
use tokio::{
    runtime::Handle,
    sync::{Mutex, OwnedMutexGuard, watch},
};

use super::{StoreError, primary_code};
use crate::{
    mutex::locked,
    telemetry::{
        COMMIT_LATENCY, WRITES,
        steps::{self, Step},
    },
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
    /// That connection between two transactions: the pool would ask it each time how it is.
    kept: std::sync::Mutex<Option<PoolConnection<Sqlite>>>,
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

/// A transaction. Its connection's thread takes messages in order and is woken for each: so BEGIN, and the savepoint of
/// a part, are in one message with the first statement that needs them.
#[derive(Debug)]
struct Group {
    /// None once it has ended. With a group that is dropped before, it is closed, which rolls back.
    connection: Option<PoolConnection<Sqlite>>,
    /// Something was sent, and BEGIN may have been.
    sent: bool,
    /// BEGIN was, as everybody knows who has a part in it.
    begun: bool,
    parts: usize,
    began: Instant,
    savepoint: Savepoint,
    /// The last part that wrote came to nothing: what it wrote is to be undone.
    undo: bool,
    /// Users or sessions may be changed by it.
    changes_logins: bool,
    /// As they were at its begin.
    rollbacks: (Rollbacks, u64),
    /// What the database could not do last.
    trouble: Option<StoreError>,
    outcome: watch::Sender<Option<Result<(), StoreError>>>,
}

/// What stands before the writes of the last part that wrote. Two names take turns: so one that was cut off on its way
/// is never mistaken for the one before, behind which others have written.
#[derive(Clone, Copy, Debug)]
struct Savepoint {
    number: u32,
    state: Saved,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Saved {
    /// Nobody has set one of this name.
    No,
    Yes,
    /// It was sent, and nobody has heard what became of it.
    Unknown,
}

/// What a statement has come to.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// Rows that were changed.
    pub(super) changed: u64,
    pub(super) first: Option<SqliteRow>,
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
            kept: std::sync::Mutex::default(),
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
        let mut turn = Turn { line: self.clone(), open: Some(open), wrote: false };
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
        let Some(group) = open.take() else { return };
        let (changes_logins, outcome) = (group.changes_logins, group.outcome.clone());
        let done = group.commit(self).await;
        // Whatever has become of it: who has looked a user up before does it again.
        if changes_logins {
            self.0.login_revision.fetch_add(1, Ordering::SeqCst);
        }
        // The line goes on first: those who are told now keep the processors busy for a while.
        drop(open);
        // Nobody may wait any more.
        outcome.send_replace(Some(done));
    }

    /// The connection, for a transaction.
    async fn connection(&self) -> sqlx::Result<PoolConnection<Sqlite>> {
        let kept = locked(&self.0.kept).take();
        match kept {
            Some(connection) => Ok(connection),
            None => self.0.pool.acquire().await,
        }
    }

    /// Takes the connection back when its transaction has ended for certain.
    fn keep(&self, connection: PoolConnection<Sqlite>) {
        let mut kept = locked(&self.0.kept);
        // Whoever has closed the pool waits for it.
        if !self.0.pool.is_closed() {
            *kept = Some(connection);
        }
    }

    /// Gives the connection to the pool: for others who need it, or once the pool is closed.
    pub(super) fn give_back(&self) {
        drop(locked(&self.0.kept).take());
    }

    /// Nobody waits for a turn.
    fn is_empty(&self) -> bool {
        self.0.waiting.load(Ordering::SeqCst) == 0
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Returning it would need a runtime.
        locked(&self.kept).take().map(PoolConnection::detach);
    }
}

/// A part of a transaction on its way. Dropped without [`Self::commit`], it comes to nothing.
#[derive(Debug)]
pub(super) struct Turn {
    line: Line,
    /// None once it has ended.
    open: Option<OwnedMutexGuard<Option<Group>>>,
    /// It may have changed something.
    wrote: bool,
}

impl Turn {
    async fn begin(&mut self) -> Result<(), StoreError> {
        let Some(open) = &mut self.open else { return Err(ended()) };
        match &mut **open {
            None => {
                let connection = self.line.connection().await.map_err(unavailable)?;
                **open = Some(Group::new(connection, self.line.0.rollbacks.clone()));
            }
            Some(group) => {
                group.clean().await?;
                // Whoever does not answer a request has nobody to be untrue to.
                let _ = SEEN.try_with(|seen| seen.borrow_mut().push(group.outcome.subscribe()));
            }
        }
        Ok(())
    }

    /// Runs statements that write, all of them.
    ///
    /// # Errors
    /// See [`StoreError::within`]. This part comes to nothing.
    pub(super) async fn write(&mut self, query: Query<'_, Sqlite, SqliteArguments>) -> Result<Done, StoreError> {
        let group = self.open.as_deref_mut().and_then(Option::as_mut).ok_or_else(ended)?;
        group.usable()?;
        // Of the first part nothing is left if it is the only one; else it has ended well.
        let apart = !mem::replace(&mut self.wrote, true) && group.parts > 0;
        let done = group.run(query, apart, false).await;
        group.judge(done)
    }

    /// The first row of a query that does not write.
    ///
    /// # Errors
    /// As those of [`Self::write`].
    pub(super) async fn read(&mut self, query: Query<'_, Sqlite, SqliteArguments>) -> Result<Done, StoreError> {
        let group = self.open.as_deref_mut().and_then(Option::as_mut).ok_or_else(ended)?;
        group.usable()?;
        let done = group.run(query, false, true).await;
        group.judge(done)
    }

    /// To be said before users or sessions are changed.
    pub(super) fn changes_logins(&mut self) {
        if let Some(group) = self.open.as_deref_mut().and_then(Option::as_mut) {
            group.changes_logins = true;
        }
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
        // Dropped, it is undone.
        let group = self.open.as_deref().and_then(Option::as_ref).ok_or_else(ended)?;
        let nothing = !group.begun;
        if group.sent && (nothing || group.savepoint.state == Saved::Unknown) {
            return Err(ended());
        }
        let Some(mut open) = self.open.take() else { return Err(ended()) };
        let Some(group) = open.as_mut() else { return Err(ended()) };
        if nothing {
            // Nobody else has a part in it yet.
            group.connection.take().into_iter().for_each(|connection| self.line.keep(connection));
            *open = None;
            return Ok(());
        }
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
        let (runtime, line) = (Handle::try_current(), self.line.clone());
        if group.parts == 0 {
            // Nobody else has a part in it. Without a runtime it is closed.
            if let (Some(group), Ok(runtime)) = (open.take(), runtime) {
                runtime.spawn(async move {
                    group.roll_back(&line).await;
                    drop(open);
                });
            }
            return;
        }
        group.undo |= self.wrote;
        let over = group.is_undone() || self.line.is_empty();
        if over && let Ok(runtime) = runtime {
            runtime.spawn(async move { line.finish(open).await });
        }
    }
}

impl Group {
    fn new(connection: PoolConnection<Sqlite>, rollbacks: Rollbacks) -> Self {
        let (connection, rollbacks) = (Some(connection), (rollbacks.clone(), rollbacks.now()));
        let (outcome, _) = watch::channel(None);
        let (sent, begun, undo, changes_logins) = (false, false, false, false);
        let (parts, began, trouble) = (0, Instant::now(), None);
        let savepoint = Savepoint { number: 0, state: Saved::No };
        Self { connection, sent, begun, parts, began, savepoint, undo, changes_logins, rollbacks, trouble, outcome }
    }

    /// SQLite has rolled it back.
    fn is_undone(&self) -> bool {
        self.rollbacks.0.now() != self.rollbacks.1
    }

    /// Runs `query`; `apart`: behind a savepoint of its own. Of a query that `reads`, only up to the first row.
    async fn run(&mut self, query: Query<'_, Sqlite, SqliteArguments>, apart: bool, reads: bool) -> sqlx::Result<Done> {
        let begun = steps::begin();
        let (before, count) = self.before(apart);
        let query = prefixed(&before, query)?;
        let Some(connection) = &mut self.connection else { return Err(sqlx::Error::PoolClosed) };
        self.sent = true;
        let mut results = (&mut **connection).fetch_many(query);
        let (mut ended, mut done) = (0, Done::default());
        while let Some(result) = results.try_next().await? {
            match result {
                Either::Left(result) => {
                    // What stands before it says what was changed before that.
                    done.changed += if ended < count { 0 } else { result.rows_affected() };
                    ended += 1;
                }
                Either::Right(row) => done.first = done.first.or(Some(row)),
            }
            if ended >= count {
                self.begun = true;
                self.savepoint.state = if apart { Saved::Yes } else { self.savepoint.state };
            }
            if reads && done.first.is_some() {
                break;
            }
        }
        begun.end(Step::RequestSql);
        Ok(done)
    }

    /// What has to be sent before a statement, and how many statements that is.
    fn before(&mut self, apart: bool) -> (String, usize) {
        if !self.begun {
            // IMMEDIATE: what it reads first is still true when it writes.
            return ("BEGIN IMMEDIATE; ".to_owned(), 1);
        }
        if !apart {
            return (String::new(), 0);
        }
        let Savepoint { number, state } = self.savepoint;
        if state == Saved::No {
            self.savepoint.state = Saved::Unknown;
            return (format!("SAVEPOINT part{number}; "), 1);
        }
        // Released, for a savepoint keeps a copy of every page that is changed behind it.
        self.savepoint = Savepoint { number: number ^ 1, state: Saved::Unknown };
        (format!("RELEASE part{number}; SAVEPOINT part{}; ", number ^ 1), 2)
    }

    /// Undoes what came to nothing, so that the parts before it are left.
    async fn clean(&mut self) -> Result<(), StoreError> {
        self.intact()?;
        if self.undo {
            let Savepoint { number, state } = self.savepoint;
            // It may be cut off: then it is done again. What it undoes was sent before.
            match self.send(format!("ROLLBACK TO part{number}")).await {
                Ok(()) => self.savepoint.state = Saved::Yes,
                // It was cut off before it was set. So nothing was written behind it, and the one before it may be
                // left: its name is not used again.
                Err(error) if state == Saved::Unknown && is_refused(&error) => {
                    self.savepoint = Savepoint { number: (number | 1) + 1, state: Saved::No };
                }
                Err(error) => return Err(self.trouble.insert(unavailable(error)).clone()),
            }
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

    /// A statement may be sent. After a savepoint that failed, its part has to end first.
    fn usable(&self) -> Result<(), StoreError> {
        if self.savepoint.state == Saved::Unknown {
            return Err(ended());
        }
        self.intact()
    }

    /// What a statement has come to.
    fn judge<T>(&mut self, result: sqlx::Result<T>) -> Result<T, StoreError> {
        result.map_err(|error| {
            let error = StoreError::within(error);
            if let StoreError::Unavailable(_) = &error {
                self.trouble = Some(error.clone());
            }
            error
        })
    }

    async fn commit(mut self, line: &Line) -> Result<(), StoreError> {
        self.clean().await?;
        let (begin, begun) = (Instant::now(), steps::begin());
        self.send("COMMIT".to_owned()).await.map_err(StoreError::commit)?;
        begun.end(Step::CommitWhole);
        metrics::histogram!(COMMIT_LATENCY).record(begin.elapsed().as_secs_f64());
        metrics::counter!(WRITES).increment(self.parts as u64);
        self.connection.take().into_iter().for_each(|connection| line.keep(connection));
        Ok(())
    }

    /// Nobody has a part in it.
    async fn roll_back(mut self, line: &Line) {
        let over = if self.sent { self.send("ROLLBACK".to_owned()).await } else { Ok(()) };
        // Refused if nothing was begun, or SQLite has rolled it back itself.
        if over.is_ok() || over.is_err_and(|error| is_refused(&error)) {
            self.connection.take().into_iter().for_each(|connection| line.keep(connection));
        }
    }

    async fn send(&mut self, sql: String) -> sqlx::Result<()> {
        let Some(connection) = &mut self.connection else { return Err(sqlx::Error::PoolClosed) };
        sqlx::query(AssertSqlSafe(sql)).execute(&mut **connection).await.map(|_| ())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        if Handle::try_current().is_ok() {
            // The pool opens another one when this one has ended.
            connection.close_on_drop();
        } else {
            drop(connection.detach());
        }
    }
}

/// The query with statements before it, in one message.
fn prefixed<'q>(
    before: &str,
    mut query: Query<'q, Sqlite, SqliteArguments>,
) -> sqlx::Result<Query<'q, Sqlite, SqliteArguments>> {
    if before.is_empty() {
        return Ok(query);
    }
    let arguments = query.take_arguments().map_err(sqlx::Error::Encode)?.unwrap_or_default();
    Ok(sqlx::query_with(AssertSqlSafe(format!("{before}{}", query.sql().as_str())), arguments))
}

/// SQLite says that a statement makes no sense now.
fn is_refused(error: &sqlx::Error) -> bool {
    primary_code(error) == Some(libsqlite3_sys::SQLITE_ERROR)
}

fn unavailable(error: sqlx::Error) -> StoreError {
    StoreError::Unavailable(Arc::new(error))
}

fn ended() -> StoreError {
    unavailable(sqlx::Error::PoolClosed)
}

#[cfg(test)]
mod tests;
