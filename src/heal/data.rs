//! The database file and its checkpoint record: both can be rebuilt from the whole raft log, or fetched from another
//! member. Must never let a new database be founded in the place of an old one.

use std::path::Path;

use anyhow::{Context, Result};

use super::{Notes, aside::set_aside};
use crate::storage::{
    database::{Database, DatabaseError},
    folder::{members::Members, places::FOLDER},
    make_private_dir,
    raft_log::{ORIGIN, RaftLog},
    transaction::CONSOLE_DATABASE,
};

/// The checkpoint record, as a path in the data folder.
const RECORD: &str = "database/console.checkpoint";

/// Opens the database. One that cannot be read is rebuilt from the first entry of the raft log, if that is still there.
/// Otherwise it is [lost](Database::lost) until it has been fetched.
///
/// # Errors
/// When a file cannot be read now, so that a later start may succeed, or a damaged record cannot be moved away.
pub fn database(data: &Path, log: &RaftLog, notes: &mut Notes) -> Result<Database> {
    let dir = data.join("database");
    make_private_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
    let open = || Database::open(&dir, CONSOLE_DATABASE, log.last_index());
    let why = match open() {
        Err(error @ (DatabaseError::Damaged { .. } | DatabaseError::Missing(_))) => error.to_string(),
        opened => return opened.context("open the database"),
    };
    set_aside(data, RECORD).with_context(|| format!("{why}; its checkpoint record cannot be moved away"))?;
    if log.first_index() <= ORIGIN + 1
        && let Ok(database) = open()
    {
        notes.add(format!("{why}: the database is rebuilt from the raft log"));
        return Ok(database);
    }
    notes.add(format!("{why}: the database is fetched from another member"));
    Database::lost(&dir, CONSOLE_DATABASE, why).context("open the database")
}

/// Opens the databases of a service, below the data folder or another one. What cannot be read is
/// [lost](Members::lost) until all databases have been fetched.
///
/// # Errors
/// When a file cannot be read now, so that a later start may succeed.
pub fn service(around: &Path, log: &RaftLog, notes: &mut Notes) -> Result<Members> {
    let root = around.join(FOLDER);
    match Members::open(&root, log.last_index()) {
        Err(error @ (DatabaseError::Damaged { .. } | DatabaseError::Missing(_))) => {
            let why = format!("the databases of the service: {error}");
            notes.add(format!("{why}: all databases are fetched from another member"));
            Members::lost(&root, why).context("open the databases of the service")
        }
        opened => opened.context("open the databases of the service"),
    }
}
