//! The calls on an open database or `-wal` file. In the memory that SQLite provides, a [`Shim`] lies in front of the
//! real file, and its first field is what SQLite knows. Temporary files have no shim at all.
//!
//! By SQLite's contract, every function here gets a `sqlite3_file` that [`open`] has made, and is called by one thread
//! at a time.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    mem::size_of,
    ptr, slice,
    sync::Arc,
};

use libsqlite3_sys as sqlite;
use sqlite::{sqlite3_file, sqlite3_int64, sqlite3_io_methods, sqlite3_vfs};

use crate::storage::{
    capture::{Code, FULL, WalFile},
    gate::{Gate, Stop},
    watch::{self, Act, Place},
};

/// A file control of our own: it says that this connection makes the checkpoints. SQL cannot send it.
pub(super) const FCNTL_CHECKPOINTER: c_int = 0x5457_4c01;

/// The locks of a WAL writer and of a checkpoint, among those of the `-shm` file
/// (<https://www.sqlite.org/walformat.html>).
const WAL_WRITE_LOCK: c_int = 0;
const WAL_CKPT_LOCK: c_int = 1;
/// Offset in the wal-index header of the number of valid frames (`mxFrame`), which is in native byte order.
const SHM_FRAMES: usize = 16;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Database,
    Wal,
}

impl Kind {
    fn place(self) -> Place {
        match self {
            Self::Database => Place::Database,
            Self::Wal => Place::Wal,
        }
    }
}

/// An open file, in front of the real one.
#[repr(C, align(8))]
pub(super) struct Shim {
    base: sqlite3_file,
    gate: Arc<Gate>,
    kind: Kind,
    /// Only this connection may checkpoint.
    checkpointer: bool,
    /// The checkpointer is copying pages into the database file.
    copying: bool,
    /// First region of the wal-index.
    shm: *mut c_void,
}

static METHODS: sqlite3_io_methods = sqlite3_io_methods {
    iVersion: 2,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock),
    xUnlock: Some(unlock),
    xCheckReservedLock: Some(check_reserved_lock),
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(device_characteristics),
    xShmMap: Some(shm_map),
    xShmLock: Some(shm_lock),
    xShmBarrier: Some(shm_barrier),
    xShmUnmap: Some(shm_unmap),
    // No memory mapping: what SQLite reads must come through here.
    xFetch: None,
    xUnfetch: None,
};

/// Opens the real file behind a shim.
///
/// # Safety
/// As for `xOpen` of `sqlite3_vfs`; `file` has room for a [`Shim`] and a file of `real`.
pub(super) unsafe fn open(
    real: *mut sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
    gate: Arc<Gate>,
    kind: Kind,
) -> c_int {
    // SAFETY: the caller's promise. `pMethods` stays null until everything is in place, so a failure needs no close.
    unsafe {
        let below = below(file);
        (*below).pMethods = ptr::null();
        let Some(open) = (*real).xOpen else { return sqlite::SQLITE_CANTOPEN };
        if kind == Kind::Database && !gate.opened() {
            return sqlite::SQLITE_CANTOPEN;
        }
        // The file exists already: the first entry of the raft log has made it.
        let flags = if kind == Kind::Database { flags & !sqlite::SQLITE_OPEN_CREATE } else { flags };
        let running = watch::begin(kind.place(), Act::Open);
        let code = open(real, name, below, flags, out_flags);
        drop(running);
        if code != sqlite::SQLITE_OK {
            // There is no file yet to ask. This is the last error of the system calls that opening makes.
            let errno = (*real).xGetLastError.map_or(0, |last| last(real, 0, ptr::null_mut()));
            if errno != 0 {
                watch::failed(kind.place(), Act::Open, errno);
            }
            if let Some(close) = (*below).pMethods.as_ref().and_then(|methods| methods.xClose) {
                close(below);
            }
            if kind == Kind::Database {
                gate.closed();
            }
            return code;
        }
        let base = sqlite3_file { pMethods: &METHODS };
        let shim = Shim { base, gate, kind, checkpointer: false, copying: false, shm: ptr::null_mut() };
        file.cast::<Shim>().write(shim);
        sqlite::SQLITE_OK
    }
}

unsafe fn below(file: *mut sqlite3_file) -> *mut sqlite3_file {
    // SAFETY: SQLite allocates the size of a shim and a real file together.
    unsafe { file.cast::<u8>().add(size_of::<Shim>()).cast() }
}

unsafe fn shim<'a>(file: *mut sqlite3_file) -> &'a mut Shim {
    // SAFETY: `open` has written it; SQLite uses a file from one thread at a time.
    unsafe { &mut *file.cast::<Shim>() }
}

/// Calls a method of the real file.
macro_rules! real {
    ($file:expr, $method:ident, $missing:expr $(, $arg:expr)*) => {{
        let below = below($file);
        match (*(*below).pMethods).$method {
            Some(method) => method(below $(, $arg)*),
            None => $missing,
        }
    }};
}

/// Runs an operation of the real file under the watch, and reports a failure to it with the kernel's error number.
unsafe fn watched(file: *mut sqlite3_file, place: Place, act: Act, operation: impl FnOnce() -> c_int) -> c_int {
    let running = watch::begin(place, act);
    let code = operation();
    drop(running);
    if code == FULL {
        watch::refused();
    } else if code & 0xff == sqlite::SQLITE_IOERR && code != sqlite::SQLITE_IOERR_SHORT_READ {
        let mut errno: c_int = 0;
        let out = (&raw mut errno).cast::<c_void>();
        // SAFETY: an open file, and an integer to write.
        unsafe { real!(file, xFileControl, sqlite::SQLITE_NOTFOUND, sqlite::SQLITE_FCNTL_LAST_ERRNO, out) };
        watch::failed(place, act, errno);
    }
    code
}

/// The real file below a shim, for the gate.
struct Real(*mut sqlite3_file, Place);

impl WalFile for Real {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> Result<(), Code> {
        // SAFETY: the pointer is that of the call in progress, and the length is that of the buffer.
        let code = unsafe {
            let (data, length) = (bytes.as_mut_ptr().cast(), bytes.len() as c_int);
            watched(self.0, self.1, Act::Read, || {
                real!(self.0, xRead, sqlite::SQLITE_IOERR_READ, data, length, offset as sqlite3_int64)
            })
        };
        if code == sqlite::SQLITE_OK { Ok(()) } else { Err(code) }
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Code> {
        // SAFETY: as above.
        let code = unsafe {
            let (data, length) = (bytes.as_ptr().cast(), bytes.len() as c_int);
            watched(self.0, self.1, Act::Write, || {
                real!(self.0, xWrite, sqlite::SQLITE_IOERR_WRITE, data, length, offset as sqlite3_int64)
            })
        };
        if code == sqlite::SQLITE_OK { Ok(()) } else { Err(code) }
    }
}

unsafe extern "C" fn close(file: *mut sqlite3_file) -> c_int {
    // SAFETY: the last call on this file. The real file is closed first: when the gate counts no connections, nobody
    // holds a lock.
    unsafe {
        let code = real!(file, xClose, sqlite::SQLITE_OK);
        let shim = file.cast::<Shim>().read();
        (*file).pMethods = ptr::null();
        if shim.kind == Kind::Database {
            shim.gate.closed();
        }
        code
    }
}

unsafe extern "C" fn read(file: *mut sqlite3_file, data: *mut c_void, length: c_int, offset: sqlite3_int64) -> c_int {
    // SAFETY: passed on unchanged.
    unsafe {
        let place = shim(file).kind.place();
        watched(file, place, Act::Read, || real!(file, xRead, sqlite::SQLITE_IOERR_READ, data, length, offset))
    }
}

unsafe extern "C" fn write(
    file: *mut sqlite3_file,
    data: *const c_void,
    length: c_int,
    offset: sqlite3_int64,
) -> c_int {
    // SAFETY: `data` has `length` bytes.
    unsafe {
        let shim = shim(file);
        if shim.kind == Kind::Database {
            if shim.checkpointer && shim.copying {
                return watched(file, Place::Database, Act::Write, || {
                    real!(file, xWrite, sqlite::SQLITE_IOERR_WRITE, data, length, offset)
                });
            }
            shim.gate.refuse("a write to the database file outside a checkpoint".into());
            return sqlite::SQLITE_IOERR_WRITE;
        }
        let bytes = slice::from_raw_parts(data.cast::<u8>(), length as usize);
        match shim.gate.wal_write(&mut Real(file, Place::Wal), offset as u64, bytes) {
            Ok(()) => sqlite::SQLITE_OK,
            Err(Stop::File(code)) => code,
            Err(Stop::Full) => FULL,
            Err(Stop::Gate) => sqlite::SQLITE_IOERR_WRITE,
        }
    }
}

unsafe extern "C" fn truncate(file: *mut sqlite3_file, size: sqlite3_int64) -> c_int {
    // SAFETY: passed on, after a check.
    unsafe {
        let shim = shim(file);
        if shim.kind == Kind::Database {
            // SQLite truncates the database only at the end of a checkpoint that has reached the end of the WAL.
            if !std::mem::take(&mut shim.copying) {
                shim.gate.refuse("a change of the database file's size outside a checkpoint".into());
                return sqlite::SQLITE_IOERR_TRUNCATE;
            }
        }
        let place = shim.kind.place();
        watched(file, place, Act::Resize, || real!(file, xTruncate, sqlite::SQLITE_IOERR_TRUNCATE, size))
    }
}

/// Does nothing: the raft log has the transaction, and the checkpoint syncs the database file itself.
unsafe extern "C" fn sync(_file: *mut sqlite3_file, _flags: c_int) -> c_int {
    sqlite::SQLITE_OK
}

unsafe extern "C" fn file_size(file: *mut sqlite3_file, size: *mut sqlite3_int64) -> c_int {
    // SAFETY: passed on unchanged.
    unsafe { real!(file, xFileSize, sqlite::SQLITE_IOERR_FSTAT, size) }
}

unsafe extern "C" fn lock(file: *mut sqlite3_file, level: c_int) -> c_int {
    // In WAL mode SQLite locks the database file exclusively only to leave WAL mode, or to checkpoint and delete the
    // WAL when the last connection closes. Neither must happen here.
    if level > sqlite::SQLITE_LOCK_SHARED {
        return sqlite::SQLITE_BUSY;
    }
    // SAFETY: passed on unchanged.
    unsafe { real!(file, xLock, sqlite::SQLITE_IOERR_LOCK, level) }
}

unsafe extern "C" fn unlock(file: *mut sqlite3_file, level: c_int) -> c_int {
    // SAFETY: passed on unchanged.
    unsafe { real!(file, xUnlock, sqlite::SQLITE_IOERR_UNLOCK, level) }
}

unsafe extern "C" fn check_reserved_lock(file: *mut sqlite3_file, out: *mut c_int) -> c_int {
    // SAFETY: passed on unchanged.
    unsafe { real!(file, xCheckReservedLock, sqlite::SQLITE_IOERR_CHECKRESERVEDLOCK, out) }
}

unsafe extern "C" fn file_control(file: *mut sqlite3_file, op: c_int, arg: *mut c_void) -> c_int {
    // SAFETY: `op` says what `arg` is, as used below; all else is passed on unchanged.
    unsafe {
        let shim = shim(file);
        match op {
            FCNTL_CHECKPOINTER => {
                shim.checkpointer = true;
                return sqlite::SQLITE_OK;
            }
            // SQLite ignores the result of this call. Without `copying`, the first page that it copies is refused.
            sqlite::SQLITE_FCNTL_CKPT_START => shim.copying = shim.checkpointer && shim.gate.may_copy(),
            // Bigger chunks would make the file longer than the database. A mapping would bypass this VFS.
            sqlite::SQLITE_FCNTL_CHUNK_SIZE | sqlite::SQLITE_FCNTL_MMAP_SIZE => return sqlite::SQLITE_NOTFOUND,
            sqlite::SQLITE_FCNTL_PRAGMA => {
                // Three strings: a place for an answer, the pragma's name, and its argument or null.
                let arg = arg.cast::<*mut c_char>();
                let (name, value) = (*arg.add(1), *arg.add(2));
                let name = CStr::from_ptr(name).to_string_lossy().to_ascii_lowercase();
                let value = (!value.is_null()).then(|| CStr::from_ptr(value).to_string_lossy().to_ascii_lowercase());
                if let Some(reason) = refused_pragma(&name, value.as_deref()) {
                    *arg = sqlite::sqlite3_mprintf(c"%s".as_ptr(), reason.as_ptr());
                    return sqlite::SQLITE_ERROR;
                }
            }
            _ => {}
        }
        real!(file, xFileControl, sqlite::SQLITE_NOTFOUND, op, arg)
    }
}

/// Why a PRAGMA is refused, in words for whoever sent it; `None` if it is not.
fn refused_pragma(name: &str, value: Option<&str>) -> Option<&'static CStr> {
    match (name, value) {
        ("journal_mode", Some(value)) if value != "wal" => Some(c"this database is replicated: journal_mode stays WAL"),
        ("locking_mode", Some(value)) if value != "normal" => {
            Some(c"this database is replicated: locking_mode stays NORMAL")
        }
        ("page_size", Some(_)) => Some(c"this database is replicated: page_size cannot be changed"),
        ("mmap_size", Some(value)) if value != "0" => Some(c"this database is replicated: mmap_size stays 0"),
        ("wal_checkpoint", _) => Some(c"this database is replicated: the daemon makes the checkpoints"),
        _ => None,
    }
}

unsafe extern "C" fn sector_size(file: *mut sqlite3_file) -> c_int {
    // SAFETY: passed on unchanged.
    unsafe { real!(file, xSectorSize, 4096) }
}

unsafe extern "C" fn device_characteristics(file: *mut sqlite3_file) -> c_int {
    // Without the first, SQLite repeats commit frames to fill a sector. Without the second, it syncs the WAL's header.
    let ours = sqlite::SQLITE_IOCAP_POWERSAFE_OVERWRITE | sqlite::SQLITE_IOCAP_SEQUENTIAL;
    // SAFETY: passed on unchanged.
    unsafe { (real!(file, xDeviceCharacteristics, 0) | ours) & !sqlite::SQLITE_IOCAP_BATCH_ATOMIC }
}

unsafe extern "C" fn shm_map(
    file: *mut sqlite3_file,
    region: c_int,
    size: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    // SAFETY: passed on; SQLite keeps the mapping until `xShmUnmap`.
    unsafe {
        let code = watched(file, Place::WalIndex, Act::Open, || {
            real!(file, xShmMap, sqlite::SQLITE_IOERR_SHMMAP, region, size, extend, out)
        });
        if code == sqlite::SQLITE_OK && region == 0 && !out.is_null() {
            shim(file).shm = *out;
        }
        code
    }
}

/// The number of valid frames according to the wal-index.
unsafe fn frames(shim: &Shim) -> Option<u32> {
    // SAFETY: the first region, at least 32 KiB, is mapped while the pointer is set. Another connection may be writing
    // the header: one aligned word is read, as SQLite itself does.
    (!shim.shm.is_null()).then(|| unsafe { shim.shm.cast::<u8>().add(SHM_FRAMES).cast::<u32>().read_volatile() })
}

unsafe extern "C" fn shm_lock(file: *mut sqlite3_file, first: c_int, count: c_int, flags: c_int) -> c_int {
    // SAFETY: passed on, after a check.
    unsafe {
        let shim = shim(file);
        let exclusive = flags & sqlite::SQLITE_SHM_EXCLUSIVE != 0;
        let unlock = flags & sqlite::SQLITE_SHM_UNLOCK != 0;
        if exclusive && !unlock && (first, count) == (WAL_CKPT_LOCK, 1) && !shim.checkpointer {
            return sqlite::SQLITE_BUSY;
        }
        if exclusive && !unlock && (first, count) == (WAL_WRITE_LOCK, 1) && !shim.checkpointer {
            // The lock is not fair: without this, a writer that never pauses would always get it first.
            if shim.gate.is_restarting() {
                return sqlite::SQLITE_BUSY;
            }
        }
        if exclusive && unlock && (first, count) == (WAL_WRITE_LOCK, 1) {
            // Before the next writer can get the lock. For the checkpointer, too, though it has written nothing and the
            // gate has nothing to do then.
            shim.gate.write_lock_released(frames(shim));
        }
        real!(file, xShmLock, sqlite::SQLITE_IOERR_SHMLOCK, first, count, flags)
    }
}

unsafe extern "C" fn shm_barrier(file: *mut sqlite3_file) {
    // SAFETY: passed on unchanged.
    unsafe { real!(file, xShmBarrier, ()) }
}

unsafe extern "C" fn shm_unmap(file: *mut sqlite3_file, delete: c_int) -> c_int {
    // SAFETY: passed on; the mapping is not used after this.
    unsafe {
        shim(file).shm = ptr::null_mut();
        real!(file, xShmUnmap, sqlite::SQLITE_OK, delete)
    }
}
