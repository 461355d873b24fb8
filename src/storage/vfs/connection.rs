//! The SQLite connections of the storage itself: the one that makes the checkpoints, and a short-lived one in memory
//! that makes the first image of a database. Must never run SQL that comes from elsewhere.

use std::{
    ffi::{CStr, CString, c_int},
    os::unix::ffi::OsStrExt,
    path::Path,
    ptr, slice,
};

use libsqlite3_sys as sqlite;

use super::{SqliteError, VFS_NAME_C, file::FCNTL_CHECKPOINTER, register};
use crate::storage::gate::Gate;

/// How long a checkpoint that restarts the WAL waits for the writer and for readers, in milliseconds.
const RESTART_PATIENCE: c_int = 20;
/// `application_id` of our databases: "TwHA" (<https://www.sqlite.org/pragma.html#pragma_application_id>).
const APPLICATION_ID: u32 = 0x5477_4841;

/// A path as SQLite takes it.
///
/// # Errors
/// `SQLITE_CANTOPEN` for a path with a NUL byte.
pub(super) fn c_path(path: &Path) -> Result<CString, SqliteError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| SqliteError {
        what: "open the database",
        message: "its path contains a NUL byte".into(),
        code: sqlite::SQLITE_CANTOPEN,
    })
}

/// A raw connection.
pub(super) struct Connection(*mut sqlite::sqlite3);

// SAFETY: opened with SQLITE_OPEN_FULLMUTEX, so any thread may use it.
unsafe impl Send for Connection {}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: opened by us and closed once; no statement outlives a method.
        unsafe { sqlite::sqlite3_close(self.0) };
    }
}

impl Connection {
    pub(super) fn open(name: &CStr, flags: c_int, vfs: Option<&CStr>) -> Result<Self, SqliteError> {
        let mut db = ptr::null_mut();
        let vfs = vfs.map_or(ptr::null(), CStr::as_ptr);
        // SAFETY: the strings live through the call; a handle is returned also with most errors, and closed by Drop.
        let code =
            unsafe { sqlite::sqlite3_open_v2(name.as_ptr(), &mut db, flags | sqlite::SQLITE_OPEN_FULLMUTEX, vfs) };
        let connection = Self(db);
        connection.check("open the database", code)?;
        Ok(connection)
    }

    /// The handle, for calls that this file does not make. It lives as long as this connection.
    pub(super) fn raw(&self) -> *mut sqlite::sqlite3 {
        self.0
    }

    pub(super) fn check(&self, what: &'static str, code: c_int) -> Result<(), SqliteError> {
        if code == sqlite::SQLITE_OK {
            return Ok(());
        }
        // SAFETY: the handle is open or null, which the function allows; the text is copied at once.
        let message = unsafe { CStr::from_ptr(sqlite::sqlite3_errmsg(self.0)) }.to_string_lossy().into_owned();
        Err(SqliteError { what, message, code })
    }

    pub(super) fn run(&self, what: &'static str, sql: &CStr) -> Result<(), SqliteError> {
        // SAFETY: an open handle and a C string; no callback.
        let code = unsafe { sqlite::sqlite3_exec(self.0, sql.as_ptr(), None, ptr::null_mut(), ptr::null_mut()) };
        self.check(what, code)
    }
}

/// The only connection that may checkpoint. It stays open as long as the database is open for writing, so that the WAL
/// always has a connection.
pub(in crate::storage) struct Checkpointer(Connection);

impl Checkpointer {
    /// Opens the gate's database. The gate must be admitted.
    pub(in crate::storage) fn open(gate: &Gate) -> Result<Self, SqliteError> {
        let connection = Connection::open(&c_path(gate.path())?, sqlite::SQLITE_OPEN_READWRITE, Some(VFS_NAME_C))?;
        // SAFETY: the file control takes no argument.
        let code = unsafe {
            sqlite::sqlite3_file_control(connection.0, c"main".as_ptr(), FCNTL_CHECKPOINTER, ptr::null_mut())
        };
        connection.check("mark the checkpointer", code)?;
        // Opens the WAL too. The sync is done by the caller, after the checkpoint.
        let sql = c"PRAGMA wal_autocheckpoint=0; PRAGMA synchronous=OFF; SELECT count(*) FROM sqlite_schema;";
        connection.run("read the schema", sql)?;
        // SAFETY: an open handle. Only a checkpoint that restarts the WAL waits at all.
        let code = unsafe { sqlite::sqlite3_busy_timeout(connection.0, RESTART_PATIENCE) };
        connection.check("set the time to wait", code)?;
        Ok(Self(connection))
    }

    /// Makes a PASSIVE checkpoint, which never waits. With `restart`, makes one that holds the write lock, so that the
    /// next transaction restarts the WAL: it waits up to [`RESTART_PATIENCE`] for the lock, and copies like a PASSIVE
    /// one if it does not get it. Returns the frames in the WAL, and how many of them are in the database file now;
    /// `None` if another checkpoint or a recovery was in the way.
    pub(in crate::storage) fn run(&self, restart: bool) -> Result<Option<(u32, u32)>, SqliteError> {
        let (mut frames, mut done) = (-1, -1);
        // SAFETY: an open handle and two integers to write.
        let code = unsafe {
            let mode = if restart { sqlite::SQLITE_CHECKPOINT_RESTART } else { sqlite::SQLITE_CHECKPOINT_PASSIVE };
            sqlite::sqlite3_wal_checkpoint_v2(self.0.0, c"main".as_ptr(), mode, &mut frames, &mut done)
        };
        // SQLite also returns busy if it only could not wait long enough. It has copied and counted then.
        if code & 0xff != sqlite::SQLITE_BUSY {
            self.0.check("checkpoint", code)?;
        }
        Ok(u32::try_from(frames).ok().zip(u32::try_from(done).ok()))
    }
}

/// The pages of a database without tables, in WAL mode.
pub(in crate::storage) fn initial_image(page_size: u32) -> Result<Vec<u8>, SqliteError> {
    register()?;
    let flags = sqlite::SQLITE_OPEN_READWRITE | sqlite::SQLITE_OPEN_CREATE;
    let connection = Connection::open(c":memory:", flags, None)?;
    let sql = format!("PRAGMA page_size={page_size}; PRAGMA application_id={APPLICATION_ID}; VACUUM;");
    let sql = CString::new(sql).expect("numbers contain no NUL byte");
    connection.run("make the first image", &sql)?;
    let mut size = 0;
    // SAFETY: the image has `size` bytes, is copied at once and freed by the function that SQLite names for it.
    let mut image = unsafe {
        let data = sqlite::sqlite3_serialize(connection.0, c"main".as_ptr(), &mut size, 0);
        if data.is_null() {
            connection.check("make the first image", sqlite::SQLITE_NOMEM)?;
        }
        let image = slice::from_raw_parts(data, size as usize).to_vec();
        sqlite::sqlite3_free(data.cast());
        image
    };
    // Write and read version 2 mean WAL mode (SQLite's file format, "File format version numbers"). `PRAGMA
    // journal_mode=WAL` sets them by a write that would bypass the WAL.
    image[18] = 2;
    image[19] = 2;
    Ok(image)
}
