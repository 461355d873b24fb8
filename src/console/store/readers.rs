//! The connections that read. A pool of sqlx asks the connection's thread whether it is still there before it takes a
//! connection back, and that takes as long as reading a row. These go back at once. Must never wait for a writer.

use std::{
    mem,
    ops::{Deref, DerefMut},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{ConnectOptions, Connection, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::mutex::locked;

const HERE: &str = "it is there until this is dropped";

/// A limited number of connections that are opened when they are needed, and stay open.
#[derive(Clone, Debug)]
pub(super) struct Readers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: SqliteConnectOptions,
    free: Mutex<Vec<SqliteConnection>>,
    /// One for each connection that may be in use.
    places: Arc<Semaphore>,
    most: u32,
    closing: AtomicBool,
}

/// A connection for reading. It goes back when this is dropped, also in the middle of a statement: the next one waits
/// until its thread has noticed.
#[derive(Debug)]
pub struct Reading {
    /// None only while this is dropped.
    connection: Option<SqliteConnection>,
    readers: Arc<Inner>,
    _place: OwnedSemaphorePermit,
}

impl Readers {
    /// At most so many connections; none is opened yet.
    pub(super) fn new(options: SqliteConnectOptions, most: u32) -> Self {
        let places = Arc::new(Semaphore::new(most as usize));
        let (free, closing) = (Mutex::default(), AtomicBool::new(false));
        Self(Arc::new(Inner { options, free, places, most, closing }))
    }

    /// A connection, as soon as one is free.
    ///
    /// # Errors
    /// When none is free or can be opened within `patience`, or they are being closed.
    pub(super) async fn take(&self, patience: Duration) -> sqlx::Result<Reading> {
        let taken = tokio::time::timeout(patience, self.take_one()).await;
        taken.unwrap_or(Err(sqlx::Error::PoolTimedOut))
    }

    async fn take_one(&self) -> sqlx::Result<Reading> {
        let place = Arc::clone(&self.0.places).acquire_owned().await.map_err(|_| sqlx::Error::PoolClosed)?;
        if self.0.closing.load(Ordering::SeqCst) {
            return Err(sqlx::Error::PoolClosed);
        }
        let free = locked(&self.0.free).pop();
        let connection = match free {
            Some(connection) => connection,
            None => self.0.options.connect().await?,
        };
        Ok(Reading { connection: Some(connection), readers: Arc::clone(&self.0), _place: place })
    }

    /// Closes all; waits for those that are in use. Whoever waits for one is refused.
    pub(super) async fn close(&self) {
        self.0.closing.store(true, Ordering::SeqCst);
        // An error means that they are closed already.
        let Ok(_all) = self.0.places.acquire_many(self.0.most).await else { return };
        let free = mem::take(&mut *locked(&self.0.free));
        for connection in free {
            // An error means that its thread has ended: it is closed then.
            let _ = connection.close().await;
        }
        self.0.places.close();
    }
}

impl Deref for Reading {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        self.connection.as_ref().expect(HERE)
    }
}

impl DerefMut for Reading {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        self.connection.as_mut().expect(HERE)
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        // Before the place is free.
        locked(&self.readers.free).extend(self.connection.take());
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn there_are_so_many_and_whoever_waits_is_refused_when_they_are_closed() {
        let folder = tempfile::tempdir().unwrap();
        let options = SqliteConnectOptions::new().filename(folder.path().join("db")).create_if_missing(true);
        let readers = Readers::new(options, 2);
        let (first, mut second) = (readers.take(PATIENCE).await.unwrap(), readers.take(PATIENCE).await.unwrap());
        assert!(matches!(readers.take(Duration::ZERO).await, Err(sqlx::Error::PoolTimedOut)));
        let mut waits = Box::pin(readers.take(PATIENCE));
        assert!(poll!(waits.as_mut()).is_pending());
        drop(first);
        let third = waits.await.unwrap();
        // Given up in the middle.
        let long = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) SELECT i FROM n";
        let mut reads = Box::pin(sqlx::query(long).fetch_all(&mut *second));
        assert!(poll!(reads.as_mut()).is_pending());
        drop(reads);
        drop(second);
        let mut second = readers.take(PATIENCE).await.unwrap();
        let read: i64 = sqlx::query_scalar("SELECT 7").fetch_one(&mut *second).await.unwrap();
        assert_eq!(read, 7);
        let mut waits = Box::pin(readers.take(PATIENCE));
        assert!(poll!(waits.as_mut()).is_pending());
        let mut closing = Box::pin(readers.close());
        assert!(poll!(closing.as_mut()).is_pending());
        drop(second);
        assert!(matches!(waits.await, Err(sqlx::Error::PoolClosed)));
        assert!(poll!(closing.as_mut()).is_pending(), "one is in use");
        drop(third);
        closing.await;
        assert!(matches!(readers.take(PATIENCE).await, Err(sqlx::Error::PoolClosed)));
    }
}
