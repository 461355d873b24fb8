//! What reading costs through our VFS beside plain SQLite: the same pages in two files on the same disk, in the same run, in turns.
//! `scripts/bench/reads.sh` runs it. Must never measure anything but SQLite's own calls: there is no other thread, and every
//! statement is prepared. Each statement has a transaction of its own, as every read of the Console has.
//!
//! SQLite is driven through its C interface: the way to the thread of an sqlx connection and back takes longer than what is measured.
//! `ROWS=n` sets the length of the table, `TURNS=n` how many there are, `BENCH_DIR` the folder (and so the disk).
#![allow(unsafe_code, reason = "an sqlx connection has a thread of its own, which costs more than what is measured")]

use std::{
    ffi::{CStr, CString},
    fs::File,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    ptr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use libsqlite3_sys as sqlite;
use twistlock_ha::storage::{
    EntrySource, ReplicateError, Replicator,
    database::{Database, PrimaryDatabase, initial_transaction},
    transaction::CONSOLE_DATABASE,
};

/// Reads of one turn.
const READS: u32 = 500;
/// Turns that do not count.
const WARM_UP: usize = 20;
/// One in so many rows is in the -wal in the end, all at the beginning of the table.
const LATE: i64 = 10;
const POINT: &CStr = c"SELECT length(body) FROM rows WHERE id = ?1";
const LIST: &CStr = c"SELECT name, body FROM rows WHERE id >= ?1 ORDER BY id LIMIT 50";

/// A cluster that agrees with everything and keeps nothing.
#[derive(Default)]
struct Alone(AtomicU64);

impl Replicator for Alone {
    fn replicate(&self, _part: Vec<u8>, _last: bool) -> Result<u64, ReplicateError> {
        Ok(self.0.fetch_add(1, Ordering::SeqCst) + 1)
    }
}

impl EntrySource for Alone {
    fn for_each(&self, _: u64, _: u64, _: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        Ok(())
    }
}

/// A connection with the two statements.
struct Sql {
    handle: *mut sqlite::sqlite3,
    statements: [*mut sqlite::sqlite3_stmt; 2],
}

impl Drop for Sql {
    fn drop(&mut self) {
        // SAFETY: all were made by this connection, and nobody uses them any more. Null is allowed.
        unsafe {
            for statement in self.statements {
                sqlite::sqlite3_finalize(statement);
            }
            sqlite::sqlite3_close(self.handle);
        }
    }
}

impl Sql {
    fn open(path: &Path, vfs: Option<&CStr>) -> Result<Self> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        let flags = sqlite::SQLITE_OPEN_READWRITE | sqlite::SQLITE_OPEN_FULLMUTEX;
        let mut sql = Self { handle: ptr::null_mut(), statements: [ptr::null_mut(); 2] };
        // SAFETY: the strings live through the call; the handle is closed by Drop, also after an error.
        let code = unsafe {
            sqlite::sqlite3_open_v2(name.as_ptr(), &mut sql.handle, flags, vfs.map_or(ptr::null(), CStr::as_ptr))
        };
        ensure!(code == sqlite::SQLITE_OK, "open {}: code {code}", path.display());
        for (name, value) in PrimaryDatabase::pragmas() {
            sql.run(&format!("PRAGMA {name}={value}"))?;
        }
        Ok(sql)
    }

    fn run(&self, text: &str) -> Result<()> {
        let sql = CString::new(text)?;
        // SAFETY: an open handle, a C string, no callback.
        let code = unsafe { sqlite::sqlite3_exec(self.handle, sql.as_ptr(), None, ptr::null_mut(), ptr::null_mut()) };
        ensure!(code == sqlite::SQLITE_OK, "{text}: code {code}");
        Ok(())
    }

    fn prepare(&mut self) -> Result<()> {
        for (sql, statement) in [POINT, LIST].into_iter().zip(&mut self.statements) {
            // SAFETY: an open handle and a C string; Drop finalizes the statement.
            let code = unsafe { sqlite::sqlite3_prepare_v2(self.handle, sql.as_ptr(), -1, statement, ptr::null_mut()) };
            ensure!(code == sqlite::SQLITE_OK, "prepare {}: code {code}", sql.to_string_lossy());
        }
        Ok(())
    }

    /// Runs a statement once for each of the ids, and takes all of its rows. Returns how many there were, and the time for one.
    fn read(&self, kind: usize, ids: &[i64]) -> Result<(u32, Duration)> {
        let statement = self.statements[kind];
        let (mut rows, mut code) = (0, sqlite::SQLITE_DONE);
        let begin = Instant::now();
        for &id in ids {
            // SAFETY: a prepared statement with one parameter, used by this thread alone; the columns are not kept.
            unsafe {
                sqlite::sqlite3_bind_int64(statement, 1, id);
                loop {
                    code = sqlite::sqlite3_step(statement);
                    if code != sqlite::SQLITE_ROW {
                        break;
                    }
                    rows += 1;
                    for column in 0..sqlite::sqlite3_column_count(statement) {
                        std::hint::black_box(sqlite::sqlite3_column_text(statement, column));
                    }
                }
                sqlite::sqlite3_reset(statement);
            }
            if code != sqlite::SQLITE_DONE {
                break;
            }
        }
        let took = begin.elapsed() / ids.len() as u32;
        ensure!(code == sqlite::SQLITE_DONE, "a read failed: code {code}");
        Ok((rows, took))
    }
}

fn number(name: &str, otherwise: i64) -> i64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn main() -> Result<()> {
    let base = std::env::var_os("BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = base.join(format!("twistlock-reads-{}", std::process::id()));
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let outcome = measure(&folder, number("ROWS", 400_000), number("TURNS", 300) as usize);
    std::fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
    outcome
}

fn measure(folder: &Path, rows: i64, rounds: usize) -> Result<()> {
    let cluster = Arc::new(Alone::default());
    let mut database = Database::open(folder, CONSOLE_DATABASE, 0)?;
    for part in initial_transaction(CONSOLE_DATABASE, 4096)? {
        database.apply(cluster.0.fetch_add(1, Ordering::SeqCst) + 1, 1, &part, &*cluster)?;
    }
    let primary = database.promote(1, Arc::clone(&cluster) as Arc<dyn Replicator>)?;
    let mut ours = Sql::open(&primary.path, Some(c"twistlock"))?;
    ours.run("CREATE TABLE rows (id INTEGER PRIMARY KEY, name TEXT, body TEXT)")?;
    ours.run(&format!(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows}) \
         INSERT INTO rows SELECT i, 'row ' || i, hex(randomblob(60)) FROM n"
    ))?;
    ensure!(database.checkpoint()?.complete, "the checkpoint is not complete");
    let copy = folder.join("plain.db");
    // Through the descriptor that is open: closing another one would drop SQLite's locks.
    io::copy(&mut &*database.file(), &mut File::create(&copy)?)?;
    let mut plain = Sql::open(&copy, None)?;
    let size = std::fs::metadata(&copy)?.len() >> 20;
    println!("{rows} rows, {size} MiB, {rounds} turns of {READS} reads each, {}", folder.display());
    ours.prepare()?;
    plain.prepare()?;
    compare("database file", [&ours, &plain], rows, rounds)?;
    for sql in [&ours, &plain] {
        sql.run(&format!("UPDATE rows SET body = hex(randomblob(60)) WHERE id <= {}", rows / LATE))?;
    }
    compare("-wal", [&ours, &plain], rows / LATE, rounds)
}

/// Reads rows up to that one from both in turns, and prints the medians and their ratio.
fn compare(place: &str, both: [&Sql; 2], rows: i64, rounds: usize) -> Result<()> {
    for (kind, name, count) in [(0, "a row by its key", READS), (1, "a list of 50 rows", READS / 10)] {
        let mut spans = [Vec::new(), Vec::new()];
        for round in 0..rounds + WARM_UP {
            let ids: Vec<_> = (0..count).map(|_| 1 + (rand::random::<u32>() as i64) % (rows - 50)).collect();
            let mut found = [0; 2];
            // Each goes first in every second turn.
            for side in [round % 2, 1 - round % 2] {
                let (rows, took) = both[side].read(kind, &ids)?;
                found[side] = rows;
                spans[side].push(took);
            }
            ensure!(found[0] == found[1] && found[0] >= count, "they have read different things: {found:?}");
        }
        let [ours, plain] = spans.map(|mut spans| {
            spans.drain(..WARM_UP);
            spans.sort();
            spans[spans.len() / 2].as_secs_f64() * 1e6
        });
        println!(
            "  {name} from the {place:<13} {ours:8.2} us, plain SQLite {plain:8.2} us, ratio of the medians {:.3}",
            ours / plain
        );
    }
    Ok(())
}
