//! The Console's access to its database: one writer connection, a few readers, the schema, and the one place that
//! decides what a database error means to a client. Must never report a write whose outcome is unknown as failed.

mod group;
mod readers;

use std::{sync::Arc, time::Duration};

use serde::{Serialize, de::DeserializeOwned};
use sqlx::{
    ConnectOptions, Execute, FromRow, Row as _, Sqlite, SqlitePool,
    migrate::{Migration, MigrationType, Migrator},
    query::{Query, QueryAs, QueryScalar},
    sqlite::{SqliteArguments, SqliteConnectOptions, SqlitePoolOptions, SqliteRow},
};
use thiserror::Error;

pub(super) use group::settled;
use group::{Line, Rollbacks, Turn};
use readers::Readers;
pub use readers::Reading;

use crate::storage::database::{PrimaryDatabase, VFS_NAME};

/// Readers at once; more requests than this wait for their turn.
pub(super) const READERS: u32 = 4;
/// Rows that a reading statement may be ahead of whoever takes them: the longest page. Otherwise its thread would stop
/// and be woken in the middle.
const AHEAD: usize = 1024;
/// What a statement names that changes users or sessions. Sessions end with their user.
const LOGINS: [&str; 2] = ["users", "tokens"];
/// How long a request waits for its turn at the database, in all.
const TURN: Duration = Duration::from_secs(5);

/// The schema in the order in which it came to be. A file never changes once it is released: sqlx compares digests.
const MIGRATIONS: &[(i64, &str, &str)] = &[
    (1, "first", include_str!("migrations/0001_first.sql")),
    (2, "api", include_str!("migrations/0002_api.sql")),
    (3, "events", include_str!("migrations/0003_events.sql")),
];

/// The tables of the Defenders, by name.
const TABLES: [(&str, &str); 5] = [
    (
        "defenders",
        "CREATE TABLE IF NOT EXISTS defenders (
            number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, key TEXT NOT NULL UNIQUE,
            facts TEXT NOT NULL DEFAULT '{}', version TEXT NOT NULL DEFAULT '',
            registered INTEGER NOT NULL, modified INTEGER NOT NULL, seen INTEGER NOT NULL, expires INTEGER NOT NULL,
            stored INTEGER NOT NULL DEFAULT 0, stored_time INTEGER NOT NULL DEFAULT 0,
            withdrawn INTEGER NOT NULL DEFAULT 0
        ) STRICT",
    ),
    (
        "defender_events",
        "CREATE TABLE IF NOT EXISTS defender_events (
            id INTEGER PRIMARY KEY, defender INTEGER NOT NULL, sequence INTEGER NOT NULL, time INTEGER NOT NULL,
            received INTEGER NOT NULL, kind TEXT NOT NULL, event TEXT NOT NULL, UNIQUE (defender, sequence)
        ) STRICT",
    ),
    (
        "defender_tokens",
        "CREATE TABLE IF NOT EXISTS defender_tokens (
            digest TEXT NOT NULL PRIMARY KEY, until INTEGER NOT NULL, by TEXT NOT NULL
        ) STRICT, WITHOUT ROWID",
    ),
    // Those that are away for too long, and since when somebody was told of it.
    (
        "defender_alerts",
        "CREATE TABLE IF NOT EXISTS defender_alerts (
            defender INTEGER PRIMARY KEY, since INTEGER NOT NULL
        ) STRICT",
    ),
    (
        "defender_policies",
        "CREATE TABLE IF NOT EXISTS defender_policies (
            version INTEGER PRIMARY KEY, time INTEGER NOT NULL, by TEXT NOT NULL, policy TEXT NOT NULL
        ) STRICT",
    ),
];

/// The indexes of long lists, by name. Neither they nor [`TABLES`] are migrations: an older program keeps an index up
/// that it does not know, and leaves a table alone, but does not open a Console whose database has a migration that it
/// does not know. It must, in a rolling upgrade.
const INDEXES: [(&str, &str); 4] = [
    ("audits_by_time", "CREATE INDEX IF NOT EXISTS audits_by_time ON audits (time)"),
    ("audits_by_user", "CREATE INDEX IF NOT EXISTS audits_by_user ON audits (user, time)"),
    // Most are changes of files: finding the others costs those nothing.
    (
        "defender_events_but_files",
        "CREATE INDEX IF NOT EXISTS defender_events_but_files ON defender_events (kind, id) WHERE kind <> 'file'",
    ),
    ("events_by_kind", "CREATE INDEX IF NOT EXISTS events_by_kind ON events (kind, time, id)"),
];

/// How to open a connection to the database of a PRIMARY.
pub fn connect_options(database: &PrimaryDatabase) -> SqliteConnectOptions {
    let options = SqliteConnectOptions::new().filename(&database.path).vfs(VFS_NAME).create_if_missing(false);
    PrimaryDatabase::pragmas().into_iter().fold(options, |options, (name, value)| options.pragma(name, value))
}

/// What a failed access means. Several writers may learn of the same failure.
#[derive(Clone, Debug, Error)]
pub enum StoreError {
    /// Another row has this key. Nothing was written.
    #[error("the name exists already")]
    Duplicate,
    /// The database could not be used at all. Nothing was written.
    #[error("the database is not available: {0}")]
    Unavailable(Arc<sqlx::Error>),
    /// The error came after the change may have been handed to the cluster: it may be there later, or not.
    #[error("outcome unknown: {0}")]
    Unknown(Arc<sqlx::Error>),
    /// A statement that SQLite does not accept: a bug. Nothing was written.
    #[error("the database does not accept a statement: {0}")]
    Statement(Arc<sqlx::Error>),
    /// A setting that this program cannot read or write as JSON. Nothing was written.
    #[error("the setting '{0}' cannot be used: {1}")]
    Setting(&'static str, Arc<serde_json::Error>),
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
                Self::Statement(Arc::new(error))
            }
            _ => Self::Unavailable(Arc::new(error)),
        }
    }

    /// The meaning of an error of a statement in a transaction that is not committed yet: nothing was written.
    fn within(error: sqlx::Error) -> Self {
        match primary_code(&error) {
            Some(libsqlite3_sys::SQLITE_CONSTRAINT) => Self::constraint(error),
            _ => Self::before(error),
        }
    }

    /// The meaning of an error of COMMIT. Only codes that SQLite gives before it writes the commit frame are definite;
    /// everything else counts as unknown.
    fn commit(error: sqlx::Error) -> Self {
        use libsqlite3_sys as code;
        match primary_code(&error) {
            Some(code::SQLITE_CONSTRAINT) => Self::constraint(error),
            Some(code::SQLITE_BUSY | code::SQLITE_LOCKED | code::SQLITE_READONLY | code::SQLITE_FULL) => {
                Self::Unavailable(Arc::new(error))
            }
            Some(code::SQLITE_ERROR | code::SQLITE_MISUSE | code::SQLITE_RANGE | code::SQLITE_MISMATCH) => {
                Self::Statement(Arc::new(error))
            }
            _ => Self::Unknown(Arc::new(error)),
        }
    }

    fn constraint(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(database) if database.is_unique_violation() => Self::Duplicate,
            _ => Self::Statement(Arc::new(error)),
        }
    }
}

/// Connections to the database while this node is PRIMARY.
#[derive(Clone, Debug)]
pub struct Store {
    /// One connection: writers wait for it in order, instead of for SQLite's lock in no order.
    writer: SqlitePool,
    /// The writers that wait for it.
    line: Line,
    readers: Readers,
}

impl Store {
    /// Prepares the connections; they are opened when first used.
    pub fn new(options: SqliteConnectOptions) -> Self {
        // The only other holder of SQLite's write lock is a checkpoint, for an instant.
        let options = options.busy_timeout(Duration::from_secs(2));
        let thread = |kind: &'static str| move |number| format!("console-{kind}{number}");
        let reading = options.clone().pragma("query_only", "ON").row_buffer_size(AHEAD).thread_name(thread("r"));
        let rollbacks = Rollbacks::default();
        let counted = rollbacks.clone();
        let writer = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(TURN)
            .idle_timeout(None)
            .max_lifetime(None)
            // A connection to a local file does not break while it is idle.
            .test_before_acquire(false)
            .after_connect(move |connection, _| {
                let counted = counted.clone();
                Box::pin(async move { counted.count_on(connection).await })
            })
            // A COMMIT may wait for a majority, which is nothing to warn of: a metric says how long it takes.
            .connect_lazy_with(options.thread_name(thread("w")).disable_statement_logging());
        Self { line: Line::new(writer.clone(), rollbacks), writer, readers: Readers::new(reading, READERS) }
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
        self.line.give_back();
        Migrator::with_migrations(migrations.collect()).run(&self.writer).await
    }

    /// Makes the [`TABLES`] that are missing: a restore may have taken them away.
    ///
    /// # Errors
    /// As those of [`Self::write`].
    pub(super) async fn supplement(&self) -> Result<(), StoreError> {
        self.make(&TABLES).await
    }

    /// Makes the [`INDEXES`] that are missing. Without them everything works, and lists take longer: nothing waits for
    /// this.
    ///
    /// # Errors
    /// As those of [`Self::write`].
    pub(super) async fn index(&self) -> Result<(), StoreError> {
        self.make(&INDEXES).await
    }

    async fn make(&self, parts: &[(&'static str, &'static str)]) -> Result<(), StoreError> {
        for &(name, sql) in parts {
            let find = sqlx::query_scalar("SELECT count(*) FROM sqlite_schema WHERE name = ?");
            let found: i64 = find.bind(name).fetch_one(&mut *self.read().await?).await?;
            // Not a transaction for nothing.
            if found == 0 {
                self.write(sqlx::query(sql)).await?;
            }
        }
        Ok(())
    }

    /// A connection for reading only.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn read(&self) -> Result<Reading, StoreError> {
        self.readers.take(TURN).await.map_err(|error| StoreError::Unavailable(Arc::new(error)))
    }

    /// The rows of a statement, and the number that the statement behind it counts. Both in one go: the way to the
    /// connection's thread and back takes longer than a short list.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub(super) async fn counted<T>(
        &self,
        statements: Query<'_, Sqlite, SqliteArguments>,
    ) -> Result<(Vec<T>, i64), StoreError>
    where
        T: for<'r> FromRow<'r, SqliteRow>,
    {
        let mut rows = statements.fetch_all(&mut *self.read().await?).await?;
        let total = rows.pop().map(|count| count.try_get(0)).transpose()?;
        let rows = rows.iter().map(T::from_row).collect::<sqlx::Result<_>>()?;
        Ok((rows, total.unwrap_or_default()))
    }

    /// The rows that a statement makes one JSON array of, and how many there are in all. Each row that comes from the
    /// connection's thread costs more than SQLite takes to write it.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub(super) async fn written(
        &self,
        statement: QueryAs<'_, Sqlite, (String, i64), SqliteArguments>,
    ) -> Result<(String, i64), StoreError> {
        Ok(statement.fetch_one(&mut *self.read().await?).await?)
    }

    /// What an administrator has set under this name; `None` if nobody has.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`], [`StoreError::Setting`].
    pub async fn setting<T: DeserializeOwned>(&self, name: &'static str) -> Result<Option<T>, StoreError> {
        let mut reading = self.read().await?;
        let text = stored_setting(name).fetch_optional(&mut *reading).await?;
        parsed(name, text)
    }

    /// Runs one statement and returns the number of changed rows. When it returns, a majority of the nodes has the
    /// change.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn write(&self, statement: Query<'_, Sqlite, SqliteArguments>) -> Result<u64, StoreError> {
        let mut writing = self.begin().await?;
        let changed = writing.execute(statement).await?;
        writing.commit().await?;
        Ok(changed)
    }

    /// A number that changes with users and sessions, before anybody is told that they have changed. What was read
    /// after this was asked for is still so as long as it is the same.
    pub fn login_revision(&self) -> u64 {
        self.line.login_revision()
    }

    /// Begins what is written as a whole or not at all. It is undone when it is dropped. Others may share the
    /// transaction: see [`group`].
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when it is nobody's turn within 5 s, or the database cannot be used.
    pub async fn begin(&self) -> Result<Writing, StoreError> {
        Ok(Writing { turn: self.line.turn(TURN).await? })
    }

    #[cfg(test)]
    fn line(&self) -> &Line {
        &self.line
    }

    /// Returns when the connections are being closed.
    pub async fn closing(&self) {
        self.writer.close_event().await;
    }

    /// Closes all connections; waits for the statements that run. Later uses fail.
    pub async fn close(&self) {
        let (writer, readers) = (self.writer.close(), self.readers.close());
        // From now on it is closed, and waits for its connection.
        self.line.give_back();
        tokio::join!(writer, readers);
    }
}

/// Several statements that are written as a whole or not at all.
#[derive(Debug)]
pub struct Writing {
    turn: Turn,
}

impl Writing {
    /// Runs one statement and returns the number of changed rows.
    ///
    /// # Errors
    /// All of them mean that nothing was written: the transaction is not committed yet.
    pub async fn execute(&mut self, mut statement: Query<'_, Sqlite, SqliteArguments>) -> Result<u64, StoreError> {
        let arguments = statement.take_arguments().map_err(sqlx::Error::Encode).map_err(StoreError::within)?;
        let sql = statement.sql();
        if LOGINS.iter().any(|table| sql.as_str().contains(table)) {
            self.turn.changes_logins();
        }
        let done = self.turn.write(sqlx::query_with(sql, arguments.unwrap_or_default())).await?;
        Ok(done.changed)
    }

    /// The first row of a query, as the transaction sees it.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn row<T>(&mut self, mut query: QueryAs<'_, Sqlite, T, SqliteArguments>) -> Result<Option<T>, StoreError>
    where
        T: for<'r> FromRow<'r, SqliteRow> + Send + Unpin,
    {
        let arguments = query.take_arguments().map_err(sqlx::Error::Encode).map_err(StoreError::within)?;
        let done = self.turn.read(sqlx::query_with(query.sql(), arguments.unwrap_or_default())).await?;
        done.first.map(|row| T::from_row(&row)).transpose().map_err(StoreError::within)
    }

    /// The first column of the first row of a query.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn value<T>(
        &mut self,
        mut query: QueryScalar<'_, Sqlite, T, SqliteArguments>,
    ) -> Result<Option<T>, StoreError>
    where
        (T,): for<'r> FromRow<'r, SqliteRow>,
        T: Send + Unpin,
    {
        let arguments = query.take_arguments().map_err(sqlx::Error::Encode).map_err(StoreError::within)?;
        let found = self.row(sqlx::query_as_with(query.sql(), arguments.unwrap_or_default())).await?;
        Ok(found.map(|(value,)| value))
    }

    /// The number that a query counts; 0 if it has no row.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn number(&mut self, sql: &'static str) -> Result<i64, StoreError> {
        Ok(self.value(sqlx::query_scalar(sql)).await?.unwrap_or_default())
    }

    /// What is set under this name, as the transaction sees it.
    ///
    /// # Errors
    /// As [`Self::execute`], and [`StoreError::Setting`].
    pub async fn setting<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<Option<T>, StoreError> {
        let text = self.value(stored_setting(name)).await?;
        parsed(name, text)
    }

    /// Sets the value of this name.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn set_setting<T: Serialize>(&mut self, name: &'static str, value: &T) -> Result<(), StoreError> {
        let text = serde_json::to_string(value).map_err(|error| StoreError::Setting(name, Arc::new(error)))?;
        let upsert =
            "INSERT INTO settings (name, value) VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value";
        self.execute(sqlx::query(upsert).bind(name).bind(text)).await.map(|_| ())
    }

    /// Commits. When it returns, a majority of the nodes has the change.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn commit(self) -> Result<(), StoreError> {
        self.turn.commit().await
    }

    /// As [`Self::commit`], and no other writer gets a turn before it returns: for whoever holds what they may need.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn commit_at_once(self) -> Result<(), StoreError> {
        self.turn.commit_at_once().await
    }
}

fn stored_setting(name: &'static str) -> QueryScalar<'static, Sqlite, String, SqliteArguments> {
    sqlx::query_scalar("SELECT value FROM settings WHERE name = ?").bind(name)
}

fn parsed<T: DeserializeOwned>(name: &'static str, text: Option<String>) -> Result<Option<T>, StoreError> {
    let parsed = text.map(|text| serde_json::from_str(&text)).transpose();
    parsed.map_err(|error| StoreError::Setting(name, Arc::new(error)))
}

/// For errors of reads.
impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        Self::before(error)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::test_console::TestConsole, *};

    /// As long as the feature level is the same, a member with an older program may become PRIMARY.
    #[tokio::test]
    async fn an_older_program_opens_the_database_of_a_newer_one() {
        let test = TestConsole::start().await;
        let store = &test.console.store;
        store.write(sqlx::query("CREATE INDEX of_a_later_version ON audits (what)")).await.unwrap();
        store.migrate().await.unwrap();
        assert_eq!(MIGRATIONS.len(), 3, "another migration needs another level: docs/formats.md says why");
    }
}
