//! What the tests of the SQLite capture share: a raft log in a list, raw SQLite connections, a pair of nodes.
//! SQLite is driven through its C interface, because blob handles, file controls and the exact point where a connection
//! is closed matter here: that is the reason for the `unsafe`.

use std::{
    ffi::{CStr, CString, c_int},
    io,
    path::Path,
    process::Command,
    ptr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use libsqlite3_sys as sqlite;
use tempfile::TempDir;
use twistlock_ha::{
    storage::transaction::{CONSOLE_DATABASE, Pages, parts_at_end},
    storage::{
        EntrySource, ReplicateError, Replicator,
        database::{Database, PrimaryDatabase, initial_transaction},
        folder::catalogue::{Change, is_change},
    },
};

/// What the log says to the next transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Accept,
    Refuse,
    /// The outcome is unknown to the caller; the log has the transaction or not.
    Unknown {
        kept: bool,
    },
}

struct Inner {
    entries: Vec<(u64, Vec<u8>)>,
    term: u64,
    next: Answer,
    largest_part: usize,
    keep: bool,
}

/// A raft log in memory, of which everything is committed at once. Index 1 is the first entry.
pub struct Log {
    inner: Mutex<Inner>,
}

impl Log {
    pub fn new() -> Arc<Self> {
        let inner = Inner { entries: Vec::new(), term: 1, next: Answer::Accept, largest_part: 0, keep: true };
        Arc::new(Self { inner: Mutex::new(inner) })
    }

    /// What the next transaction is told; afterwards all are accepted again.
    pub fn answer(&self, next: Answer) {
        self.inner.lock().unwrap().next = next;
    }

    /// What the next transaction would be told.
    pub fn answered(&self) -> Answer {
        self.inner.lock().unwrap().next
    }

    /// The last entry that ends a transaction.
    pub fn last_commit(&self) -> u64 {
        let inner = self.inner.lock().unwrap();
        let ends = |(_, payload): &(u64, Vec<u8>)| parts_at_end(payload).is_some();
        inner.entries.iter().rposition(ends).map_or(0, |at| at as u64 + 1)
    }

    pub fn last_index(&self) -> u64 {
        self.inner.lock().unwrap().entries.len() as u64
    }

    pub fn entry(&self, index: u64) -> Option<(u64, Vec<u8>)> {
        self.inner.lock().unwrap().entries.get(index as usize - 1).cloned()
    }

    pub fn push(&self, payload: Vec<u8>) {
        let mut inner = self.inner.lock().unwrap();
        let term = inner.term;
        inner.entries.push((term, payload));
    }

    /// A new epoch begins, with its empty entry.
    pub fn new_term(&self) -> u64 {
        let mut inner = self.inner.lock().unwrap();
        inner.term += 1;
        inner.next = Answer::Accept;
        let term = inner.term;
        inner.entries.push((term, Vec::new()));
        term
    }

    /// From now on drops the content of what it accepts, so that memory can be measured.
    pub fn forget_content(&self) {
        self.inner.lock().unwrap().keep = false;
    }

    pub fn largest_part(&self) -> usize {
        self.inner.lock().unwrap().largest_part
    }
}

impl Replicator for Log {
    fn replicate(&self, part: Vec<u8>, last: bool) -> Result<u64, ReplicateError> {
        let mut inner = self.inner.lock().unwrap();
        if is_change(&part) {
            Change::decode(&part).expect("a primary writes what members can read");
            assert!(last);
        } else {
            let pages = Pages::decode(&part).expect("the gate writes what members can read");
            assert_eq!(pages.commit.is_some(), last);
        }
        inner.largest_part = inner.largest_part.max(part.len());
        let term = inner.term;
        if last {
            match std::mem::replace(&mut inner.next, Answer::Accept) {
                Answer::Accept => {}
                Answer::Refuse => return Err(ReplicateError::Refused("the test says no".into())),
                Answer::Unknown { kept } => {
                    if kept {
                        inner.entries.push((term, part));
                    }
                    return Err(ReplicateError::Unknown("the test does not say".into()));
                }
            }
        }
        let part = if inner.keep { part } else { Vec::new() };
        inner.entries.push((term, part));
        Ok(inner.entries.len() as u64)
    }
}

impl EntrySource for Log {
    fn for_each(&self, first: u64, last: u64, each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        for index in first..=last {
            let (_, payload) = self.entry(index).ok_or_else(|| io::Error::other("no such entry"))?;
            if !payload.is_empty() {
                each(index, &payload)?;
            }
        }
        Ok(())
    }
}

/// A raw connection. Errors are SQLite's extended codes.
pub struct Sql(*mut sqlite::sqlite3);

// SAFETY: opened with SQLITE_OPEN_FULLMUTEX.
unsafe impl Send for Sql {}

impl Drop for Sql {
    fn drop(&mut self) {
        // SAFETY: opened by us; no statement or blob outlives a method.
        let code = unsafe { sqlite::sqlite3_close(self.0) };
        assert_eq!(code, sqlite::SQLITE_OK, "a connection could not be closed");
    }
}

impl Sql {
    pub fn open_with(path: &Path, vfs: Option<&CStr>) -> Result<Self, c_int> {
        let name = CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
        let mut db = ptr::null_mut();
        let flags = sqlite::SQLITE_OPEN_READWRITE | sqlite::SQLITE_OPEN_FULLMUTEX | sqlite::SQLITE_OPEN_URI;
        // SAFETY: the strings live through the call; the handle is closed by Drop.
        unsafe {
            let code = sqlite::sqlite3_open_v2(name.as_ptr(), &mut db, flags, vfs.map_or(ptr::null(), CStr::as_ptr));
            let connection = Self(db);
            if code != sqlite::SQLITE_OK {
                return Err(code);
            }
            sqlite::sqlite3_extended_result_codes(db, 1);
            Ok(connection)
        }
    }

    /// A connection to the primary's database, as small and as eager to spill as can be.
    pub fn open(primary: &PrimaryDatabase) -> Self {
        let sql = Self::open_with(&primary.path, Some(c"twistlock")).expect("the database opens");
        sql.run("PRAGMA synchronous=NORMAL; PRAGMA wal_autocheckpoint=0; PRAGMA foreign_keys=ON").unwrap();
        sql
    }

    pub fn run(&self, text: &str) -> Result<(), (c_int, String)> {
        let text = CString::new(text).unwrap();
        // SAFETY: an open handle, a C string, no callback.
        unsafe {
            let code = sqlite::sqlite3_exec(self.0, text.as_ptr(), None, ptr::null_mut(), ptr::null_mut());
            if code == sqlite::SQLITE_OK {
                return Ok(());
            }
            Err((code, CStr::from_ptr(sqlite::sqlite3_errmsg(self.0)).to_string_lossy().into_owned()))
        }
    }

    /// The first column of the first row, as text; empty if there is none.
    pub fn text(&self, query: &str) -> String {
        self.try_text(query).unwrap_or_else(|code| panic!("{query}: code {code}"))
    }

    pub fn try_text(&self, query: &str) -> Result<String, c_int> {
        let query = CString::new(query).unwrap();
        let mut statement = ptr::null_mut();
        // SAFETY: the statement is finalized before this returns; the text is copied before.
        unsafe {
            let code = sqlite::sqlite3_prepare_v2(self.0, query.as_ptr(), -1, &mut statement, ptr::null_mut());
            if code != sqlite::SQLITE_OK {
                return Err(code);
            }
            let step = sqlite::sqlite3_step(statement);
            let mut text = String::new();
            if step == sqlite::SQLITE_ROW {
                let value = sqlite::sqlite3_column_text(statement, 0);
                if !value.is_null() {
                    text = CStr::from_ptr(value.cast()).to_string_lossy().into_owned();
                }
            }
            let code = sqlite::sqlite3_finalize(statement);
            if code == sqlite::SQLITE_OK { Ok(text) } else { Err(code) }
        }
    }

    pub fn number(&self, query: &str) -> i64 {
        self.text(query).parse().unwrap_or_else(|_| panic!("{query} gives no number"))
    }

    /// Writes into a blob in place.
    pub fn write_blob(&self, table: &str, row: i64, offset: usize, bytes: &[u8]) -> Result<(), c_int> {
        let table = CString::new(table).unwrap();
        let mut blob = ptr::null_mut();
        // SAFETY: the blob is closed before this returns.
        unsafe {
            let (main, column) = (c"main".as_ptr(), c"data".as_ptr());
            let code = sqlite::sqlite3_blob_open(self.0, main, table.as_ptr(), column, row, 1, &mut blob);
            if code != sqlite::SQLITE_OK {
                sqlite::sqlite3_blob_close(blob);
                return Err(code);
            }
            let room = (sqlite::sqlite3_blob_bytes(blob) as usize).saturating_sub(offset);
            let length = bytes.len().min(room) as c_int;
            let written = sqlite::sqlite3_blob_write(blob, bytes.as_ptr().cast(), length, offset.min(room) as c_int);
            let closed = sqlite::sqlite3_blob_close(blob);
            [written, closed].into_iter().find(|code| *code != sqlite::SQLITE_OK).map_or(Ok(()), Err)
        }
    }

    pub fn in_transaction(&self) -> bool {
        // SAFETY: an open handle.
        unsafe { sqlite::sqlite3_get_autocommit(self.0) == 0 }
    }

    pub fn checkpoint(&self, mode: c_int) -> c_int {
        // SAFETY: an open handle.
        unsafe { sqlite::sqlite3_wal_checkpoint_v2(self.0, ptr::null(), mode, ptr::null_mut(), ptr::null_mut()) }
    }
}

/// A database that follows the log, in a folder of its own.
pub struct Node {
    pub folder: TempDir,
    pub database: Database,
    pub log: Arc<Log>,
    /// First index that has not been fed yet.
    next: u64,
}

impl Node {
    pub fn new(log: &Arc<Log>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let database = Database::open(folder.path(), CONSOLE_DATABASE, 0).unwrap();
        Self { folder, database, log: Arc::clone(log), next: 1 }
    }

    /// Feeds everything new; every transaction's checksum is checked by that.
    pub fn follow(&mut self) {
        self.follow_to(u64::MAX);
    }

    pub fn follow_to(&mut self, index: u64) {
        while self.next <= index
            && let Some((term, payload)) = self.log.entry(self.next)
        {
            self.database.apply(self.next, term, &payload, &*self.log).unwrap();
            self.next += 1;
        }
    }

    /// The process dies and starts again.
    pub fn crash(&mut self) {
        let log_last = self.log.last_index();
        self.database = Database::open(self.folder.path(), CONSOLE_DATABASE, log_last).unwrap();
        self.next = self.database.applied() + 1;
    }

    pub fn promote(&mut self) -> Arc<PrimaryDatabase> {
        let term = self.log.new_term();
        self.follow();
        let log: Arc<dyn Replicator> = Arc::<Log>::clone(&self.log);
        self.database.promote(term, log).unwrap()
    }

    pub fn demote(&mut self) {
        self.database.demote(Instant::now() + Duration::from_secs(5)).unwrap();
        assert_eq!(self.database.applied(), self.database.checkpointed());
        self.next = self.database.applied() + 1;
    }

    /// Checkpoints a primary without readers: that must get to the end.
    pub fn checkpoint_all(&mut self) {
        let checkpoint = self.database.checkpoint().unwrap();
        assert!(checkpoint.complete, "{checkpoint:?}");
    }
}

/// A log with its initial transaction.
pub fn new_log(page_size: u32) -> Arc<Log> {
    let log = Log::new();
    for part in initial_transaction(CONSOLE_DATABASE, page_size).unwrap() {
        log.push(part);
    }
    log
}

/// A primary and a secondary.
pub fn pair(page_size: u32) -> (Node, Node, Arc<PrimaryDatabase>) {
    let log = new_log(page_size);
    let (mut first, second) = (Node::new(&log), Node::new(&log));
    let primary = first.promote();
    (first, second, primary)
}

/// The files are the same, byte for byte. Another process looks: closing a descriptor in this one drops SQLite's locks.
pub fn assert_same_files(one: &Database, other: &Database) {
    let output = Command::new("cmp").arg(one.path()).arg(other.path()).output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The file of one begins with all of the file of the other.
pub fn assert_same_beginning(one: &Database, other: &Database) {
    let length = std::fs::metadata(other.path()).unwrap().len().to_string();
    let output = Command::new("cmp").args(["-n", &length]).arg(one.path()).arg(other.path()).output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// SQLite itself finds a copy of a secondary's file sound.
pub fn assert_sound(secondary: &Database) {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy.db");
    std::fs::copy(secondary.path(), &copy).unwrap();
    let sql = Sql::open_with(&copy, None).unwrap();
    assert_eq!(sql.text("PRAGMA integrity_check"), "ok");
    assert_eq!(sql.text("PRAGMA journal_mode"), "wal");
}

/// Moves SQLite's lock bytes in this whole process; before any database is opened.
pub fn move_locks(byte: u32) {
    // SAFETY: the test control takes one integer.
    unsafe { sqlite::sqlite3_test_control(sqlite::SQLITE_TESTCTRL_PENDING_BYTE, byte) };
}
