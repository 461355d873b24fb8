//! The SQLite VFS `twistlock`: a thin layer over the default VFS, which still does the work on files, locks and shared
//! memory.
//!
//! It opens only databases that have a live [`Gate`], shows the gate every write to the `-wal` file, lets only our own
//! checkpoints write to the database file, and refuses whatever would bypass the raft log: leaving WAL mode, rollback
//! journals, attached files. This folder has the only `unsafe` code of the program. Must never decide anything about
//! transactions.
//!
//! - `vfs.rs`: registration and the file system calls
//! - `vfs/file.rs`: the calls on an open file
//! - `vfs/connection.rs`: the few SQLite connections that we hold ourselves
//! - `vfs/replace.rs`: replaces the whole database at once, for a restore
//! - `vfs/range.rs`: has the disk write a part of a file, which is no business of SQLite but needs `unsafe`

use std::{
    collections::HashMap,
    ffi::{CStr, OsStr, c_char, c_int, c_void},
    mem::size_of,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    ptr,
    sync::{Arc, Mutex, MutexGuard, OnceLock, Weak},
};

use libsqlite3_sys as sqlite;
use sqlite::{sqlite3_file, sqlite3_int64, sqlite3_vfs};
use thiserror::Error;

use super::gate::Gate;
use crate::mutex::locked;

mod connection;
mod file;
mod range;
mod replace;

pub(super) use connection::{Checkpointer, initial_image};
pub(super) use range::write_back;
pub(super) use replace::replace;

/// Name under which SQLite knows the VFS.
pub const VFS_NAME: &str = "twistlock";
const VFS_NAME_C: &CStr = c"twistlock";
/// The first version without the checkpoint race that can corrupt a WAL database.
const OLDEST_SQLITE: c_int = 3_051_003;

/// An error of SQLite.
#[derive(Debug, Error)]
#[error("SQLite cannot {what}: {message} (code {code})")]
pub struct SqliteError {
    pub what: &'static str,
    pub message: String,
    pub code: i32,
}

/// The gates of the databases that may be opened, by absolute path.
fn registry() -> MutexGuard<'static, HashMap<PathBuf, Weak<Gate>>> {
    static REGISTRY: OnceLock<Mutex<HashMap<PathBuf, Weak<Gate>>>> = OnceLock::new();
    locked(REGISTRY.get_or_init(Mutex::default))
}

/// Lets connections open the gate's database through the VFS, until [`forget`] is called or the gate is dropped.
pub(super) fn admit(gate: &Arc<Gate>) -> Result<(), SqliteError> {
    register()?;
    registry().insert(gate.path().to_owned(), Arc::downgrade(gate));
    Ok(())
}

/// Lets nobody open the database any more.
pub(super) fn forget(gate: &Gate) {
    registry().remove(gate.path());
}

fn find(path: &Path) -> Option<Arc<Gate>> {
    registry().get(path)?.upgrade()
}

/// Registers the VFS, once for the process. Later calls return the result of the first one.
fn register() -> Result<(), SqliteError> {
    static DONE: OnceLock<Result<(), c_int>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        // SAFETY: `sqlite3_initialize` and `sqlite3_libversion_number` may be called at any time.
        let version = unsafe {
            sqlite::sqlite3_initialize();
            sqlite::sqlite3_libversion_number()
        };
        if version < OLDEST_SQLITE { Err(sqlite::SQLITE_MISMATCH) } else { install() }
    });
    done.map_err(|code| {
        let message = match code {
            sqlite::SQLITE_MISMATCH => "the linked SQLite is older than 3.51.3".into(),
            code => describe(code),
        };
        SqliteError { what: "take the VFS `twistlock`", message, code }
    })
}

fn install() -> Result<(), c_int> {
    // SAFETY: the default VFS lives as long as the process. The new one is leaked on purpose: SQLite keeps a pointer to
    // it. All its functions follow the contract of sqlite3_vfs.
    unsafe {
        let real = sqlite::sqlite3_vfs_find(ptr::null());
        if real.is_null() {
            return Err(sqlite::SQLITE_ERROR);
        }
        let shim = Box::new(sqlite3_vfs {
            iVersion: 2,
            szOsFile: (size_of::<file::Shim>() as c_int) + (*real).szOsFile,
            mxPathname: (*real).mxPathname,
            pNext: ptr::null_mut(),
            zName: VFS_NAME_C.as_ptr(),
            pAppData: real.cast(),
            xOpen: Some(open),
            xDelete: Some(delete),
            xAccess: Some(access),
            xFullPathname: Some(full_pathname),
            // Loading an extension is refused: it could bring another VFS.
            xDlOpen: Some(dl_open),
            xDlError: Some(dl_error),
            xDlSym: Some(dl_sym),
            xDlClose: Some(dl_close),
            xRandomness: Some(randomness),
            xSleep: Some(sleep),
            xCurrentTime: Some(current_time),
            xGetLastError: Some(get_last_error),
            xCurrentTimeInt64: Some(current_time_int64),
            xSetSystemCall: None,
            xGetSystemCall: None,
            xNextSystemCall: None,
        });
        match sqlite::sqlite3_vfs_register(Box::into_raw(shim), 0) {
            sqlite::SQLITE_OK => {}
            code => return Err(code),
        }
        match sqlite::sqlite3_auto_extension(Some(guard_connection)) {
            sqlite::SQLITE_OK => Ok(()),
            code => Err(code),
        }
    }
}

/// Offset in bytes of SQLite's locks in every database file. The page there is never written
/// (<https://www.sqlite.org/fileformat2.html>, "The Lock-Byte Page").
pub(super) fn lock_byte() -> u32 {
    // SAFETY: a test control that takes one integer; 0 only asks. (Tests move the locks to a lower offset that they can
    // reach.)
    unsafe { sqlite::sqlite3_test_control(sqlite::SQLITE_TESTCTRL_PENDING_BYTE, 0) as u32 }
}

/// Text for one of SQLite's result codes.
fn describe(code: c_int) -> String {
    // SAFETY: returns a static string, or null for a code that it does not know.
    unsafe {
        let text = sqlite::sqlite3_errstr(code);
        if text.is_null() { "unknown".into() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    }
}

/// SQLite calls this for each new connection of the process. Ours get an authorizer, for what no VFS can see.
unsafe extern "C" fn guard_connection(
    db: *mut sqlite::sqlite3,
    _message: *mut *mut c_char,
    _api: *const sqlite::sqlite3_api_routines,
) -> c_int {
    // SAFETY: `db` is an open connection, and SQLITE_FCNTL_VFS_POINTER writes one pointer.
    unsafe {
        let mut vfs: *mut sqlite3_vfs = ptr::null_mut();
        let out = ptr::from_mut(&mut vfs).cast();
        sqlite::sqlite3_file_control(db, c"main".as_ptr(), sqlite::SQLITE_FCNTL_VFS_POINTER, out);
        if vfs.is_null() || CStr::from_ptr((*vfs).zName) != VFS_NAME_C {
            return sqlite::SQLITE_OK;
        }
        sqlite::sqlite3_set_authorizer(db, Some(authorize), ptr::null_mut())
    }
}

/// Denies ATTACH of a persistent database: a transaction over two files is not atomic in WAL mode, and a URI could name
/// another VFS. Temporary and in-memory databases are harmless; VACUUM attaches one.
unsafe extern "C" fn authorize(
    _context: *mut c_void,
    action: c_int,
    first: *const c_char,
    _second: *const c_char,
    _third: *const c_char,
    _fourth: *const c_char,
) -> c_int {
    if action != sqlite::SQLITE_ATTACH {
        return sqlite::SQLITE_OK;
    }
    // SAFETY: SQLite passes a C string, or null where the file name is not a literal.
    let name = (!first.is_null()).then(|| unsafe { CStr::from_ptr(first) }.to_bytes());
    if matches!(name, Some(b"" | b":memory:")) {
        return sqlite::SQLITE_OK;
    }
    tracing::warn!("ATTACH refused: a replicated database cannot be used together with another file");
    sqlite::SQLITE_DENY
}

/// The VFS below a shim.
unsafe fn real(vfs: *mut sqlite3_vfs) -> *mut sqlite3_vfs {
    // SAFETY: `install` has put it there.
    unsafe { (*vfs).pAppData.cast() }
}

unsafe extern "C" fn open(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite gives `szOsFile` bytes at `file`; a name is a C string that lives until the file is closed.
    unsafe {
        (*file).pMethods = ptr::null();
        let real = real(vfs);
        let persistent = sqlite::SQLITE_OPEN_MAIN_DB
            | sqlite::SQLITE_OPEN_WAL
            | sqlite::SQLITE_OPEN_MAIN_JOURNAL
            | sqlite::SQLITE_OPEN_SUPER_JOURNAL;
        if flags & persistent == 0 || (name.is_null() && flags & sqlite::SQLITE_OPEN_MAIN_DB != 0) {
            let Some(open) = (*real).xOpen else { return sqlite::SQLITE_CANTOPEN };
            return open(real, name, file, flags, out_flags);
        }
        if name.is_null() {
            return sqlite::SQLITE_CANTOPEN;
        }
        let path = CStr::from_ptr(name).to_bytes();
        let (path, kind) = if flags & sqlite::SQLITE_OPEN_MAIN_DB != 0 {
            (path, file::Kind::Database)
        } else if flags & sqlite::SQLITE_OPEN_WAL != 0 {
            (path.strip_suffix(b"-wal").unwrap_or(path), file::Kind::Wal)
        } else {
            tracing::warn!("rollback journal refused: a replicated database stays in WAL mode");
            return sqlite::SQLITE_CANTOPEN;
        };
        let Some(gate) = find(Path::new(OsStr::from_bytes(path))) else {
            return sqlite::SQLITE_CANTOPEN;
        };
        file::open(real, name, file, flags, out_flags, gate, kind)
    }
}

/// Forwards a call to the VFS below, which becomes its first argument.
macro_rules! forward {
    ($name:ident, $method:ident, ($($arg:ident: $type:ty),*) -> $out:ty, $missing:expr) => {
        unsafe extern "C" fn $name(vfs: *mut sqlite3_vfs, $($arg: $type),*) -> $out {
            // SAFETY: the arguments come from SQLite and go on unchanged to a VFS of the same interface.
            unsafe {
                let real = real(vfs);
                match (*real).$method {
                    Some(method) => method(real, $($arg),*),
                    None => $missing,
                }
            }
        }
    };
}

forward!(delete, xDelete, (name: *const c_char, sync: c_int) -> c_int, sqlite::SQLITE_IOERR_DELETE);
forward!(access, xAccess, (name: *const c_char, flags: c_int, out: *mut c_int) -> c_int, sqlite::SQLITE_IOERR_ACCESS);
forward!(
    full_pathname, xFullPathname, (name: *const c_char, length: c_int, out: *mut c_char) -> c_int, sqlite::SQLITE_CANTOPEN
);
forward!(randomness, xRandomness, (length: c_int, out: *mut c_char) -> c_int, 0);
forward!(sleep, xSleep, (microseconds: c_int) -> c_int, 0);
forward!(current_time, xCurrentTime, (out: *mut f64) -> c_int, sqlite::SQLITE_ERROR);
forward!(current_time_int64, xCurrentTimeInt64, (out: *mut sqlite3_int64) -> c_int, sqlite::SQLITE_ERROR);
forward!(get_last_error, xGetLastError, (length: c_int, out: *mut c_char) -> c_int, 0);

unsafe extern "C" fn dl_open(_vfs: *mut sqlite3_vfs, _name: *const c_char) -> *mut c_void {
    ptr::null_mut()
}

unsafe extern "C" fn dl_error(_vfs: *mut sqlite3_vfs, length: c_int, out: *mut c_char) {
    const TEXT: &CStr = c"extensions are not loaded here";
    if length as usize > TEXT.to_bytes().len() && !out.is_null() {
        // SAFETY: `out` has room for `length` bytes.
        unsafe { ptr::copy_nonoverlapping(TEXT.as_ptr(), out, TEXT.to_bytes_with_nul().len()) };
    }
}

type Symbol = unsafe extern "C" fn(*mut sqlite3_vfs, *mut c_void, *const c_char);

unsafe extern "C" fn dl_sym(_vfs: *mut sqlite3_vfs, _library: *mut c_void, _name: *const c_char) -> Option<Symbol> {
    None
}

unsafe extern "C" fn dl_close(_vfs: *mut sqlite3_vfs, _library: *mut c_void) {}
