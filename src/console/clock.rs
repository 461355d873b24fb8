//! The clock that sessions count by. It goes on evenly when the host's clock is set: then the sessions are moved with
//! it, so that none ends early or lasts longer. Must never be used for what people read: audit rows have the time of
//! day.

use std::time::Duration;

use tokio::sync::{RwLock, RwLockReadGuard};

use super::store::{Store, StoreError};
use crate::{clock, node::lease::boottime};

/// How often the host's clock is looked at.
const EVERY: Duration = Duration::from_secs(1);
/// A difference of up to so many seconds is simply followed: time synchronization makes such all the time.
const SMALL: u64 = 2;

/// The time of day in seconds since 1970, as the host's clock says and SQLite counts.
pub(super) fn unix_time() -> i64 {
    clock::unix_time() as i64
}

/// Seconds since 1970 that do not jump while the Console is open.
#[derive(Debug)]
pub(super) struct Clock {
    /// How far it is ahead of CLOCK_BOOTTIME, in seconds.
    ahead: RwLock<i64>,
}

/// The clock, which is not set while this is held.
pub(super) struct Time<'a>(RwLockReadGuard<'a, i64>);

impl Time<'_> {
    pub(super) fn now(&self) -> i64 {
        boottime_seconds().saturating_add(*self.0)
    }
}

impl Clock {
    pub(super) fn new() -> Self {
        Self { ahead: RwLock::new(unix_time() - boottime_seconds()) }
    }

    /// Holds the clock. Whoever holds it must not wait for the writer's connection: [`Self::set`] has that when it
    /// waits for the clock.
    pub(super) async fn hold(&self) -> Time<'_> {
        Time(self.ahead.read().await)
    }

    pub(super) async fn now(&self) -> i64 {
        self.hold().await.now()
    }

    /// Follows the host's clock until the store is closed.
    pub(super) async fn run(&self, store: Store) {
        let forever = async {
            loop {
                tokio::time::sleep(EVERY).await;
                // It may be impossible at the moment, as while the role is given up: the next second tries again.
                if let Err(error) = self.set(&store, unix_time()).await {
                    tracing::debug!("sessions could not be moved with the host's clock: {error}; trying again");
                }
            }
        };
        tokio::select! {
            () = store.closing() => {}
            () = forever => {}
        }
    }

    /// Sets the clock to `wall`, and moves all sessions by as much if that is a jump.
    async fn set(&self, store: &Store, wall: i64) -> Result<(), StoreError> {
        let jump = wall.saturating_sub(self.now().await);
        if jump.unsigned_abs() <= SMALL {
            *self.ahead.write().await += jump;
            return Ok(());
        }
        let mut writing = store.begin().await?;
        let mut ahead = self.ahead.write().await;
        let moved = "UPDATE tokens SET began = began + ?1, expires = expires + ?1";
        let moved = writing.execute(sqlx::query(moved).bind(jump)).await?;
        // Others in the same transaction could wait for the clock.
        writing.commit_at_once().await?;
        *ahead += jump;
        let way = if jump > 0 { "ahead" } else { "back" };
        let seconds = jump.unsigned_abs();
        tracing::warn!(
            sessions = moved,
            "the clock of this host was set {way} by {seconds} s: sessions keep their time"
        );
        Ok(())
    }
}

fn boottime_seconds() -> i64 {
    (boottime() / 1_000_000_000) as i64
}

#[cfg(test)]
mod tests {
    use axum::http::{Method, StatusCode};
    use serde_json::Value;

    use super::{super::test_console::TestConsole, *};

    const DAY: i64 = 86_400;

    async fn left(test: &TestConsole, token: &str) -> Option<i64> {
        let (status, granted) = test.call(Method::GET, "/api/v1/authenticate", token, Value::Null).await;
        (status == StatusCode::OK).then(|| granted["expiresInSec"].as_i64().unwrap())
    }

    #[tokio::test]
    async fn a_session_keeps_its_time_when_the_clock_jumps_either_way() {
        let test = TestConsole::start().await;
        let console = &test.console;
        let token = test.login().await;
        let first = left(&test, &token).await.unwrap();
        for jump in [400 * DAY, -400 * DAY, 3, -3, 3600, 10 * 365 * DAY, 0] {
            let jumped = unix_time() + jump;
            console.clock.set(&console.store, jumped).await.unwrap();
            assert!((0..=2).contains(&(console.clock.now().await - jumped)), "the clock follows");
            let now = left(&test, &token).await;
            assert!(now.is_some_and(|now| (first - 30..=first).contains(&now)), "by {jump} s: {now:?} of {first} s");
            // One that begins now has its whole time, too, and it lasts across the way back.
            let other = test.login().await;
            console.clock.set(&console.store, unix_time()).await.unwrap();
            let other = left(&test, &other).await;
            assert!(other.is_some_and(|other| (first - 30..=first).contains(&other)), "by {jump} s: {other:?}");
        }
    }

    /// The clock was ahead before this Console opened, on this host or another.
    #[tokio::test]
    async fn a_session_from_the_future_is_none() {
        let test = TestConsole::start().await;
        let token = test.login().await;
        let store = &test.console.store;
        let ahead = async |seconds: i64| {
            let moved = sqlx::query("UPDATE tokens SET began = began + ?1, expires = expires + ?1").bind(seconds);
            store.write(moved).await.unwrap();
        };
        ahead(60).await;
        assert!(left(&test, &token).await.is_some(), "clocks of two hosts differ a little");
        ahead(400 * DAY).await;
        assert_eq!(left(&test, &token).await, None);
        let other = test.login().await;
        assert!(left(&test, &other).await.is_some());
        let kept = sqlx::query_scalar("SELECT count(*) FROM tokens");
        let kept: i64 = kept.fetch_one(&mut *store.read().await.unwrap()).await.unwrap();
        assert_eq!(kept, 1, "the one from the future is deleted with those that have ended");
    }
}
