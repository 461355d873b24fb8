//! The Console's access to its database: one writer connection, a few readers, the schema, and the one place that
//! decides what a database error means to a client. Must never report a write whose outcome is unknown as failed.

use std::time::{Duration, Instant};

use serde::{Serialize, de::DeserializeOwned};
use sqlx::{
    Connection, Sqlite, SqliteConnection, SqlitePool, SqliteTransaction,
    migrate::{Migration, MigrationType, Migrator},
    pool::PoolConnection,
    query::Query,
    sqlite::{SqliteArguments, SqliteConnectOptions, SqlitePoolOptions},
};
use thiserror::Error;

use crate::{
    storage::database::{PrimaryDatabase, VFS_NAME},
    telemetry::COMMIT_LATENCY,
};

/// Readers at once; more requests than this wait for their turn.
const READERS: u32 = 4;
/// How long a request waits for its turn at the database, in all.
const TURN: Duration = Duration::from_secs(5);

/// The schema in the order in which it came to be. A file never changes once it is released: sqlx compares digests.
const MIGRATIONS: &[(i64, &str, &str)] = &[
    (1, "first", include_str!("migrations/0001_first.sql")),
    (2, "api", include_str!("migrations/0002_api.sql")),
    (3, "events", include_str!("migrations/0003_events.sql")),
];

/// How to open a connection to the database of a PRIMARY.
pub fn connect_options(database: &PrimaryDatabase) -> SqliteConnectOptions {
    let options = SqliteConnectOptions::new().filename(&database.path).vfs(VFS_NAME).create_if_missing(false);
    PrimaryDatabase::pragmas().into_iter().fold(options, |options, (name, value)| options.pragma(name, value))
}

/// What a failed access means.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Another row has this key. Nothing was written.
    #[error("the name exists already")]
    Duplicate,
    /// The database could not be used at all. Nothing was written.
    #[error("the database is not available: {0}")]
    Unavailable(sqlx::Error),
    /// The error came after the change may have been handed to the cluster: it may be there later, or not.
    #[error("outcome unknown: {0}")]
    Unknown(sqlx::Error),
    /// A statement that SQLite does not accept: a bug. Nothing was written.
    #[error("the database does not accept a statement: {0}")]
    Statement(sqlx::Error),
    /// A setting that this program cannot read or write as JSON. Nothing was written.
    #[error("the setting '{0}' cannot be used: {1}")]
    Setting(&'static str, serde_json::Error),
}

/// SQLite's primary result code, without the extension in the higher bits.
fn primary_code(error: &sqlx::Error) -> Option<i32> {
    let sqlx::Error::Database(database) = error else { return None };
    database.code()?.parse::<i32>().ok().map(|code| code & 0xff)
}

impl StoreError {
    /// The meaning of an error before anything was changed, or of a read.
    fn before(error: sqlx::Error) -> Self {
        match primary_code(&error) {
            Some(libsqlite3_sys::SQLITE_ERROR | libsqlite3_sys::SQLITE_MISUSE | libsqlite3_sys::SQLITE_RANGE) => {
                Self::Statement(error)
            }
            _ => Self::Unavailable(error),
        }
    }

    /// The meaning of an error of a statement that commits, or of COMMIT itself. Only codes that SQLite gives before it
    /// writes the commit frame are definite; everything else counts as unknown.
    fn commit(error: sqlx::Error) -> Self {
        use libsqlite3_sys as code;
        match primary_code(&error) {
            Some(code::SQLITE_CONSTRAINT) => Self::constraint(error),
            Some(code::SQLITE_BUSY | code::SQLITE_LOCKED | code::SQLITE_READONLY | code::SQLITE_FULL) => {
                Self::Unavailable(error)
            }
            Some(code::SQLITE_ERROR | code::SQLITE_MISUSE | code::SQLITE_RANGE | code::SQLITE_MISMATCH) => {
                Self::Statement(error)
            }
            _ => Self::Unknown(error),
        }
    }

    fn constraint(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(database) if database.is_unique_violation() => Self::Duplicate,
            _ => Self::Statement(error),
        }
    }
}

/// False if sqlx thinks that a transaction is still open on the writer's connection. After a COMMIT that failed, SQLite
/// has none any more, its ROLLBACK fails, and sqlx would refuse every later transaction. The pool then opens another
/// one.
async fn is_usable(connection: &mut SqliteConnection) -> sqlx::Result<bool> {
    if connection.is_in_transaction() {
        // Behind it in the queue of the connection's thread: a rollback on its way is done then.
        connection.ping().await?;
    }
    Ok(!connection.is_in_transaction())
}

/// Connections to the database while this node is PRIMARY.
#[derive(Clone, Debug)]
pub struct Store {
    /// One connection: writers wait for it in order, instead of for SQLite's lock in no order.
    writer: SqlitePool,
    readers: SqlitePool,
}

impl Store {
    /// Prepares the connections; they are opened when first used.
    pub fn new(options: SqliteConnectOptions) -> Self {
        // The only other holder of SQLite's write lock is a checkpoint, for an instant.
        let options = options.busy_timeout(Duration::from_secs(2));
        let pool = |size| {
            SqlitePoolOptions::new()
                .max_connections(size)
                .acquire_timeout(TURN)
                .idle_timeout(None)
                .max_lifetime(None)
                // A connection to a local file does not break while it is idle.
                .test_before_acquire(false)
        };
        let thread = |kind: &'static str| move |number| format!("console-{kind}{number}");
        let reading = options.clone().pragma("query_only", "ON").thread_name(thread("r"));
        Self {
            writer: pool(1)
                .before_acquire(|connection, _| Box::pin(is_usable(connection)))
                .connect_lazy_with(options.thread_name(thread("w"))),
            readers: pool(READERS).connect_lazy_with(reading),
        }
    }

    /// Brings the schema up to this program's version.
    ///
    /// # Errors
    /// When the database cannot be used or its schema is newer than this program.
    pub async fn migrate(&self) -> Result<(), sqlx::migrate::MigrateError> {
        let migrations = MIGRATIONS.iter().map(|&(version, description, sql)| {
            let sql = sqlx::SqlSafeStr::into_sql_str(sql);
            Migration::new(version, description.into(), MigrationType::Simple, sql, false)
        });
        Migrator::with_migrations(migrations.collect()).run(&self.writer).await
    }

    /// A connection for reading only.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn read(&self) -> Result<PoolConnection<Sqlite>, StoreError> {
        self.readers.acquire().await.map_err(StoreError::Unavailable)
    }

    /// What an administrator has set under this name; `None` if nobody has.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`], [`StoreError::Setting`].
    pub async fn setting<T: DeserializeOwned>(&self, name: &'static str) -> Result<Option<T>, StoreError> {
        let mut reading = self.read().await?;
        setting(&mut reading, name).await
    }

    /// Runs one statement as a transaction of its own and returns the number of changed rows. When it returns, a
    /// majority of the nodes has the change.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn write(&self, statement: Query<'_, Sqlite, SqliteArguments>) -> Result<u64, StoreError> {
        let mut connection = self.writer.acquire().await.map_err(StoreError::Unavailable)?;
        let begin = Instant::now();
        let done = statement.execute(&mut *connection).await.map_err(StoreError::commit)?;
        note_commit(begin);
        Ok(done.rows_affected())
    }

    /// Starts a transaction of several statements. It is rolled back when it is dropped.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn begin(&self) -> Result<Writing, StoreError> {
        // IMMEDIATE: what it reads first is still true when it writes.
        let transaction = self.writer.begin_with("BEGIN IMMEDIATE").await.map_err(StoreError::Unavailable)?;
        Ok(Writing { transaction })
    }

    /// Returns when the connections are being closed.
    pub async fn closing(&self) {
        self.writer.close_event().await;
    }

    /// Closes all connections; waits for the statements that run. Later uses fail.
    pub async fn close(&self) {
        tokio::join!(self.writer.close(), self.readers.close());
    }
}

/// A transaction of several statements.
#[derive(Debug)]
pub struct Writing {
    transaction: SqliteTransaction<'static>,
}

impl Writing {
    /// Runs one statement and returns the number of changed rows.
    ///
    /// # Errors
    /// All of them mean that nothing was written: the transaction is not committed yet.
    pub async fn execute(&mut self, statement: Query<'_, Sqlite, SqliteArguments>) -> Result<u64, StoreError> {
        let done = statement.execute(&mut *self.transaction).await;
        done.map(|done| done.rows_affected()).map_err(|error| match primary_code(&error) {
            Some(libsqlite3_sys::SQLITE_CONSTRAINT) => StoreError::constraint(error),
            _ => StoreError::before(error),
        })
    }

    /// The first column of the only row of a query.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn number(&mut self, sql: &'static str) -> Result<i64, StoreError> {
        sqlx::query_scalar(sql).fetch_one(&mut *self.transaction).await.map_err(StoreError::before)
    }

    /// What is set under this name, as the transaction sees it.
    ///
    /// # Errors
    /// As [`Self::execute`], and [`StoreError::Setting`].
    pub async fn setting<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<Option<T>, StoreError> {
        setting(&mut self.transaction, name).await
    }

    /// Sets the value of this name.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn set_setting<T: Serialize>(&mut self, name: &'static str, value: &T) -> Result<(), StoreError> {
        let text = serde_json::to_string(value).map_err(|error| StoreError::Setting(name, error))?;
        let upsert =
            "INSERT INTO settings (name, value) VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value";
        self.execute(sqlx::query(upsert).bind(name).bind(text)).await.map(|_| ())
    }

    /// The connection of this transaction, for queries that answer with rows.
    pub fn connection(&mut self) -> &mut SqliteConnection {
        &mut self.transaction
    }

    /// Commits. When it returns, a majority of the nodes has the change.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn commit(self) -> Result<(), StoreError> {
        let begin = Instant::now();
        self.transaction.commit().await.map_err(StoreError::commit)?;
        note_commit(begin);
        Ok(())
    }
}

async fn setting<T: DeserializeOwned>(
    connection: &mut SqliteConnection,
    name: &'static str,
) -> Result<Option<T>, StoreError> {
    let query = sqlx::query_scalar("SELECT value FROM settings WHERE name = ?").bind(name);
    let text: Option<String> = query.fetch_optional(connection).await?;
    text.map(|text| serde_json::from_str(&text)).transpose().map_err(|error| StoreError::Setting(name, error))
}

/// For errors of reads.
impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        Self::before(error)
    }
}

fn note_commit(begin: Instant) {
    metrics::histogram!(COMMIT_LATENCY).record(begin.elapsed().as_secs_f64());
}
