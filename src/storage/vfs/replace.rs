//! Replaces the whole content of a primary's database with that of another file, in one transaction. It is SQLite's own
//! backup between two connections. The target goes through our VFS, so its commit waits for a majority like any other.
//! Must never run while anybody else writes.

use std::{ffi::c_int, path::Path};

use libsqlite3_sys as sqlite;

use super::{
    SqliteError, VFS_NAME_C,
    connection::{Connection, c_path},
};
use crate::storage::gate::Gate;

/// Pages copied between two questions whether to go on.
const STEP: c_int = 256;
/// How long to wait for a checkpoint that holds the write lock, in milliseconds.
const PATIENCE: c_int = 2_000;

/// Replaces the content of the gate's database. `go_on` gets the pages done and their total, and stops the work by
/// returning false; nothing has changed then.
///
/// # Errors
/// SQLite's error when it cannot be done or `go_on` stopped it: nothing has changed. If the gate is fenced afterwards,
/// the outcome is unknown.
pub(in crate::storage) fn replace(
    gate: &Gate,
    from: &Path,
    mut go_on: impl FnMut(u32, u32) -> bool,
) -> Result<(), SqliteError> {
    let source = Connection::open(&c_path(from)?, sqlite::SQLITE_OPEN_READONLY, None)?;
    let target = Connection::open(&c_path(gate.path())?, sqlite::SQLITE_OPEN_READWRITE, Some(VFS_NAME_C))?;
    target.run("prepare the database", c"PRAGMA wal_autocheckpoint=0; PRAGMA synchronous=OFF;")?;
    // SAFETY: both handles are open and stay so; the backup is finished below, before they are closed.
    unsafe {
        sqlite::sqlite3_busy_timeout(target.raw(), PATIENCE);
        let backup = sqlite::sqlite3_backup_init(target.raw(), c"main".as_ptr(), source.raw(), c"main".as_ptr());
        if backup.is_null() {
            return target.check("begin to replace the database", sqlite::SQLITE_ERROR);
        }
        let mut stopped = false;
        let mut code = sqlite::SQLITE_OK;
        while code == sqlite::SQLITE_OK && !stopped {
            code = sqlite::sqlite3_backup_step(backup, STEP);
            let total = sqlite::sqlite3_backup_pagecount(backup);
            let done = total - sqlite::sqlite3_backup_remaining(backup);
            stopped = code == sqlite::SQLITE_OK && (gate.is_fenced() || !go_on(done as u32, total as u32));
        }
        // Rolls back what is not finished.
        let finished = sqlite::sqlite3_backup_finish(backup);
        if code == sqlite::SQLITE_DONE {
            return target.check("replace the database", finished);
        }
        let code = if stopped { sqlite::SQLITE_INTERRUPT } else { code };
        let message = if stopped { "it was stopped".into() } else { super::describe(code) };
        Err(SqliteError { what: "replace the database", message, code })
    }
}
