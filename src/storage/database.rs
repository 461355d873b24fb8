//! (owned by the database work) Stand-in until it is merged: a plain SQLite file.
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode};

#[derive(Debug)]
pub struct PrimaryDatabase {
    pub path: std::path::PathBuf,
    pub epoch: u64,
}

impl PrimaryDatabase {
    /// How sqlx opens this database.
    pub fn connect_options(&self) -> SqliteConnectOptions {
        SqliteConnectOptions::new().filename(&self.path).create_if_missing(true).journal_mode(SqliteJournalMode::Wal)
    }
}
