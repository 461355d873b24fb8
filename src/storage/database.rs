//! One replicated database on this node: its file, its checkpoint record, and the changes between following and
//! serving.
//!
//! One thread owns a [`Database`]. A secondary feeds it the committed entries of the raft log. A primary promotes it,
//! and from then on transactions come from SQLite through the [`Gate`]. Must never serve or follow in doubt: what fails
//! half-way starts again from the last checkpoint.

mod checkpoints;

use std::{
    fs::{self, File},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use thiserror::Error;

pub use checkpoints::Checkpoint;

use super::transaction::{CONSOLE_DATABASE, Commit, PagesBuilder};
use super::{
    EntrySource, Replicator,
    capture::FULL,
    checkpoint::Record,
    checksum::PageTable,
    clear_away, folder_of, fsync_dir,
    gate::{Gate, GateConfig},
    is_full, is_rot,
    replica::Replica,
    scrub::page_checksums,
    snapshot::CheckpointHold,
    vfs::{self, Checkpointer, SqliteError},
};
pub use super::{replica::ApplyError, vfs::VFS_NAME};

/// How long a connection waits for another writer before it gets SQLITE_BUSY.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// A WAL that has grown beyond this many bytes is cut back to them when it restarts. A checkpoint that leaves a longer
/// one makes the writers wait for a moment, so that it can restart.
const WAL_LIMIT: u64 = 64 << 20;

/// Why the database cannot do something.
#[derive(Debug, Error)]
pub enum DatabaseError {
    #[error("cannot {what} {path}: {error}")]
    Io { what: &'static str, path: PathBuf, error: io::Error },
    /// The record says that the file has pages, but the file is gone.
    #[error("{0} is missing, although its checkpoint record exists")]
    Missing(PathBuf),
    /// The checkpoint record or a page of the file cannot be read, now or later.
    #[error("{path} is damaged: {why}")]
    Damaged { path: PathBuf, why: String },
    #[error(transparent)]
    Sqlite(#[from] SqliteError),
    /// Connections were not closed before the deadline. The process must exit: nothing else can close their files.
    #[error("{connections} connections still have the database open")]
    StillOpen { connections: usize },
    /// The database is not what the primary's was.
    #[error("database differs from the primary's at index {index}: checksum {computed:016x}, expected {expected:016x}")]
    Diverged { index: u64, expected: u64, computed: u64 },
    #[error("{0}")]
    Refused(&'static str),
    /// An earlier failure.
    #[error("the database is not used any more: {0}")]
    Failed(String),
}

impl DatabaseError {
    /// True if the only trouble is that the disk has no space: nothing has changed, and the same can be tried again.
    /// Never true of a failed sync, whatever its reason.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Io { what, error, .. } => *what == "write" && is_full(error),
            Self::Sqlite(error) => error.code & 0xff == FULL,
            _ => false,
        }
    }
}

/// Why the content of a database was not replaced.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ReplaceError {
    /// Nothing has changed.
    #[error("{0}")]
    Refused(String),
    /// The role was lost meanwhile: the members have the whole new content or the whole old one.
    #[error("{0}")]
    Unknown(String),
}

/// A database file for a folder that is served.
pub(super) struct Lent {
    pub file: Arc<File>,
    /// What it has, as of `index`.
    pub table: PageTable,
    pub index: u64,
}

/// How the database file can be read for a scrub.
#[derive(Debug)]
pub enum Scrubbable {
    /// Not at all.
    Not,
    /// Page by page: [`Database::differs`] knows what each page must be.
    Follows { file: Arc<File>, page_size: u32, pages: u32 },
    /// While it [rests](Database::rest).
    Serves,
}

/// A database that is open for writing on the primary. Connections open it through the VFS [`VFS_NAME`] and set
/// [`PrimaryDatabase::pragmas`].
#[derive(Debug)]
pub struct PrimaryDatabase {
    /// Which database it is.
    pub id: u32,
    /// The database file.
    pub path: PathBuf,
    /// The epoch of this promotion.
    pub epoch: u64,
    gate: Arc<Gate>,
}

impl PrimaryDatabase {
    /// What each connection has to set, in this order: among others, foreign keys are enforced, and a busy database is
    /// waited for.
    pub fn pragmas() -> [(&'static str, String); 6] {
        [
            ("busy_timeout", BUSY_TIMEOUT.as_millis().to_string()),
            ("journal_mode", "WAL".to_owned()),
            ("synchronous", "NORMAL".to_owned()),
            ("foreign_keys", "ON".to_owned()),
            ("wal_autocheckpoint", "0".to_owned()),
            ("journal_size_limit", WAL_LIMIT.to_string()),
        ]
    }

    /// Replaces the whole content of the database with that of a file that nobody has open, in one transaction that a
    /// majority has when this returns. `go_on` gets the pages done and their total, and stops the work by returning
    /// false. Nobody else may write meanwhile.
    ///
    /// # Errors
    /// [`ReplaceError::Refused`] when it cannot be done or `go_on` stopped it: nothing has changed.
    /// [`ReplaceError::Unknown`] when the role was lost meanwhile: the members have the whole new content or the whole
    /// old one.
    pub fn replace(&self, from: &Path, go_on: impl FnMut(u32, u32) -> bool) -> Result<(), ReplaceError> {
        vfs::replace(&self.gate, from, go_on).map_err(|error| {
            let why = match self.gate.last_refusal() {
                Some(reason) => format!("{error}: {reason}"),
                None => error.to_string(),
            };
            if self.gate.is_fenced() { ReplaceError::Unknown(why) } else { ReplaceError::Refused(why) }
        })
    }

    /// Size of a page in bytes.
    pub fn page_size(&self) -> u32 {
        self.gate.page_size()
    }

    /// The gate of this promotion: fence it from any thread.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }
}

struct Serving {
    primary: Arc<PrimaryDatabase>,
    /// None only while [`Database::demote`] is under way.
    checkpointer: Option<Checkpointer>,
    applied: u64,
}

enum State {
    Following(Replica),
    Serving(Serving),
    /// Between the two: nobody has the database open, and what the file has beyond its checkpoint (up to index
    /// `touched`) does not count.
    Closed {
        touched: u64,
    },
}

/// A replicated database on this node: it follows, or it serves.
pub struct Database {
    id: u32,
    path: PathBuf,
    record_path: PathBuf,
    file: Arc<File>,
    record: Record,
    state: State,
    /// Once set, nothing is applied or promoted any more.
    failed: Option<String>,
    /// Why nothing of it can be used, known since the start: it must be fetched from another member.
    distrusted: Option<String>,
    /// A sync of the file failed: not even going back to the checkpoint helps, because its pages may be lost.
    sync_failed: bool,
    /// Held by whoever reads the file while it rests at the last checkpoint.
    hold: Option<CheckpointHold>,
    /// A checkpoint is being saved.
    saving: bool,
    /// Asked whether a checkpoint at a raft index may count, once the file has all that belongs to it.
    may_save: MaySave,
}

/// See [`Database::save_if`].
type MaySave = Box<dyn Fn(u64) -> bool + Send>;

impl Database {
    /// Opens the database `id` in the folder `dir`, which exists, and goes back to its last checkpoint: feed it the
    /// entries after [`Database::applied`]. `log_last_index` is the highest index in this node's raft log. Up to there
    /// the file may be ahead of what is being applied.
    ///
    /// # Errors
    /// [`DatabaseError::Missing`] when the record has pages and there is no file, and [`DatabaseError::Damaged`] when
    /// the record or the file will never be readable: the node needs another member's database. [`DatabaseError::Io`]
    /// for whatever a later start may be spared.
    pub fn open(dir: &Path, id: u32, log_last_index: u64) -> Result<Self, DatabaseError> {
        Self::open_at(places(dir, id)?, id, log_last_index)
    }

    /// As [`Self::open`], with the paths of the file and of its checkpoint record.
    pub(super) fn open_at(
        (path, record_path): (PathBuf, PathBuf),
        id: u32,
        log_last_index: u64,
    ) -> Result<Self, DatabaseError> {
        let record = Record::read(&record_path, id).map_err(|error| unreadable(&record_path, error))?;
        if record.pages > 0 && !path.exists() {
            return Err(DatabaseError::Missing(path));
        }
        let file = open_file(&path)?;
        let replica = Replica::at(Arc::clone(&file), id, &record, log_last_index.max(record.index), &|| true)
            .map_err(|error| unreadable(&path, error))?;
        Ok(Self::new(id, path, record_path, file, record, replica))
    }

    /// A database in the same place of which nothing can be used. It applies nothing, cannot be promoted, and leaves
    /// the files as they are. The next start puts a fetched one in their place. `why` is for people.
    ///
    /// # Errors
    /// [`DatabaseError::Io`] when the file cannot be created or read.
    pub fn lost(dir: &Path, id: u32, why: String) -> Result<Self, DatabaseError> {
        let (path, record_path) = places(dir, id)?;
        let file = open_file(&path)?;
        let record = Record::default();
        let replica = Replica::at(Arc::clone(&file), id, &record, 0, &|| true)
            .map_err(|source| io_error("read", &path, source))?;
        let mut database = Self::new(id, path, record_path, file, record, replica);
        database.distrust(why);
        Ok(database)
    }

    fn new(id: u32, path: PathBuf, record_path: PathBuf, file: Arc<File>, record: Record, replica: Replica) -> Self {
        let state = State::Following(replica);
        Self {
            id,
            path,
            record_path,
            file,
            record,
            state,
            failed: None,
            distrusted: None,
            sync_failed: false,
            hold: None,
            saving: false,
            may_save: Box::new(|_| true),
        }
    }

    /// Which database it is.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Declares that nothing of it counts from now on. Only before it is used.
    pub fn distrust(&mut self, why: String) {
        self.failed = Some(why.clone());
        self.distrusted = Some(why);
    }

    /// Why nothing of it counts.
    pub fn distrusted(&self) -> Option<&str> {
        self.distrusted.as_deref()
    }

    /// The raft index up to which the database has everything.
    pub fn applied(&self) -> u64 {
        match &self.state {
            State::Following(replica) => replica.applied,
            State::Serving(serving) => serving.applied,
            State::Closed { .. } => self.record.index,
        }
    }

    /// The durable checkpoint.
    pub(super) fn record(&self) -> Record {
        self.record
    }

    /// The raft index of the durable checkpoint, C.
    pub fn checkpointed(&self) -> u64 {
        self.record.index
    }

    /// True if not even the initial transaction has been applied.
    pub fn is_empty(&self) -> bool {
        matches!(&self.state, State::Following(replica) if replica.table.pages() == 0)
    }

    /// Checksum of the whole database: on a secondary at [`Database::applied`], on a primary at its last transaction.
    pub fn checksum(&self) -> u64 {
        match &self.state {
            State::Following(replica) => replica.table.checksum(),
            State::Serving(serving) => serving.primary.gate.checksum(),
            State::Closed { .. } => self.record.checksum,
        }
    }

    /// Compares the checksum of a following database with the one that its last transaction stated. Does nothing on a
    /// primary.
    ///
    /// # Errors
    /// [`DatabaseError::Diverged`] when the two differ: this copy must be replaced by that of another member.
    pub fn verify(&self) -> Result<(), DatabaseError> {
        match &self.state {
            State::Following(replica) if replica.claim != replica.table.checksum() => {
                let (expected, computed) = (replica.claim, replica.table.checksum());
                Err(DatabaseError::Diverged { index: replica.applied, expected, computed })
            }
            _ => Ok(()),
        }
    }

    /// How a scrub can read the file now.
    pub fn scrubbable(&self) -> Scrubbable {
        match &self.state {
            State::Following(replica) if replica.table.pages() > 0 && self.failed.is_none() => Scrubbable::Follows {
                file: Arc::clone(&self.file),
                page_size: replica.table.page_size(),
                pages: replica.table.pages(),
            },
            State::Serving(_) if self.failed.is_none() => Scrubbable::Serves,
            _ => Scrubbable::Not,
        }
    }

    /// Compares the checksums of pages after page `done`, as they were just read, with what they must be. A page that
    /// differs is read again, as it may have been written meanwhile. Returns the number of the first that still
    /// differs.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn differs(&self, done: u32, sums: &[u64]) -> io::Result<Option<u32>> {
        let State::Following(replica) = &self.state else { return Ok(None) };
        for (number, sum) in (done + 1..).zip(sums) {
            let Some(expected) = replica.table.get(number) else { break };
            if expected != *sum && page_checksums(&self.file, replica.table.page_size(), number - 1, 1)? != [expected] {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    /// As [`Self::verify`], but only once the file cannot be ahead of what has been applied.
    ///
    /// # Errors
    /// [`DatabaseError::Diverged`] when the two differ: this copy must be replaced by that of another member.
    pub fn verify_settled(&self) -> Result<(), DatabaseError> {
        match &self.state {
            State::Following(replica) if replica.applied <= replica.touched => Ok(()),
            _ => self.verify(),
        }
    }

    /// Bytes of the `-wal` file up to the end of the last transaction; 0 on a secondary. A checkpoint does not lower
    /// it; the next transaction does, if the checkpoint had copied everything.
    pub fn wal_bytes(&self) -> u64 {
        match &self.state {
            State::Following(_) | State::Closed { .. } => 0,
            State::Serving(serving) => serving.primary.gate.wal_bytes(),
        }
    }

    /// Bytes of the database file as of the last checkpoint.
    pub fn file_bytes(&self) -> u64 {
        u64::from(self.record.pages) * u64::from(self.record.page_size)
    }

    /// Size of a page in bytes; 0 if the database is empty.
    pub fn page_size(&self) -> u32 {
        match &self.state {
            State::Following(replica) => replica.table.page_size(),
            State::Serving(serving) => serving.primary.gate.page_size(),
            State::Closed { .. } => self.record.page_size,
        }
    }

    /// The open database file, for whoever reads it beside this. See [`Database::path`] for why not to open another
    /// one.
    pub fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// The database file. While this node is the primary, nobody may open and close it through another descriptor: that
    /// drops SQLite's locks (POSIX).
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn following(&mut self, index: u64) -> Result<&mut Replica, ApplyError> {
        if let Some(failed) = &self.failed {
            return Err(ApplyError::Failed(failed.clone()));
        }
        match &mut self.state {
            State::Following(replica) => Ok(replica),
            State::Serving(_) | State::Closed { .. } => Err(ApplyError::Primary { index }),
        }
    }

    /// Applies a committed command entry. `source` reads the earlier parts of its transaction again.
    ///
    /// # Errors
    /// [`ApplyError::Io`] for lack of space: the same entry can be applied again. After any other [`ApplyError`],
    /// nothing more is applied until the database is opened or demoted again. After [`ApplyError::Diverged`], it needs
    /// another member's copy.
    pub fn apply(&mut self, index: u64, term: u64, payload: &[u8], source: &dyn EntrySource) -> Result<(), ApplyError> {
        if payload.is_empty() {
            return self.apply_empty(index, term);
        }
        let result = self.following(index)?.apply(index, term, payload, source);
        self.note_failure(result)
    }

    /// Applies a committed entry that is no command: a new primary's first entry, or a change of the members.
    ///
    /// # Errors
    /// [`ApplyError::Failed`] after an earlier failure, [`ApplyError::Primary`] on a primary,
    /// [`ApplyError::OutOfOrder`] when the entry was applied before.
    pub fn apply_empty(&mut self, index: u64, term: u64) -> Result<(), ApplyError> {
        let result = self.following(index)?.apply_empty(index, term);
        self.note_failure(result)
    }

    fn note_failure(&mut self, result: Result<(), ApplyError>) -> Result<(), ApplyError> {
        if let Err(error) = &result
            && !error.is_full()
        {
            self.failed = Some(error.to_string());
        }
        result
    }

    /// Notes a committed entry while this node is the primary: SQLite has its pages already.
    pub fn note_committed(&mut self, index: u64) {
        if let State::Serving(serving) = &mut self.state {
            serving.applied = serving.applied.max(index);
        }
    }

    /// Opens the database for writing. Call it when everything of earlier epochs is applied.
    ///
    /// # Errors
    /// [`DatabaseError::Refused`] when it is empty or open already, [`DatabaseError::Diverged`] when it differs from
    /// the primary's, [`DatabaseError::Failed`] after an earlier failure, [`DatabaseError::Io`] or
    /// [`DatabaseError::Sqlite`] when it cannot be opened. It follows again then, if need be from its last checkpoint.
    /// If not even that can be read, it [is closed](Database::is_closed).
    pub fn promote(
        &mut self,
        epoch: u64,
        replicator: Arc<dyn Replicator>,
    ) -> Result<Arc<PrimaryDatabase>, DatabaseError> {
        if let Some(failed) = &self.failed {
            return Err(DatabaseError::Failed(failed.clone()));
        }
        self.verify()?;
        let State::Following(replica) = &mut self.state else {
            return Err(DatabaseError::Refused("the database is open for writing already"));
        };
        if replica.table.pages() == 0 {
            return Err(DatabaseError::Refused("the database is empty: its first entry has not been applied"));
        }
        replica.trim().map_err(|source| io_error("resize", &self.path, source))?;
        remove_cache(&self.path)?;
        let applied = replica.applied;
        let table = std::mem::replace(&mut replica.table, PageTable::empty(0));
        // If opening fails, and then going back to the checkpoint, too, this must not be taken for an empty database.
        self.state = State::Closed { touched: applied };
        let gate = Arc::new(Gate::new(GateConfig {
            path: self.path.clone(),
            database: self.id,
            epoch,
            replicator,
            table,
            index: applied,
            lock_byte: vfs::lock_byte(),
            file: Arc::clone(&self.file),
        }));
        match vfs::admit(&gate).and_then(|()| Checkpointer::open(&gate)) {
            Ok(checkpointer) => {
                let primary = Arc::new(PrimaryDatabase { id: self.id, path: self.path.clone(), epoch, gate });
                let checkpointer = Some(checkpointer);
                self.state = State::Serving(Serving { primary: Arc::clone(&primary), checkpointer, applied });
                Ok(primary)
            }
            Err(error) => {
                vfs::forget(&gate);
                self.reopen(&|| true)?;
                Err(error.into())
            }
        }
    }

    /// Gives the file to a folder that is served, where the application's own SQLite writes to it. Call it when
    /// everything of earlier epochs is applied. This database is used up: open it again when the folder is not served
    /// any more.
    ///
    /// # Errors
    /// [`DatabaseError::Refused`] when it is open for writing, [`DatabaseError::Diverged`] when it differs from the
    /// primary's, [`DatabaseError::Failed`] after an earlier failure, [`DatabaseError::Io`] when its size cannot be
    /// changed or what another primary has left beside it cannot be removed.
    pub(super) fn lend(self) -> Result<Lent, DatabaseError> {
        if let Some(failed) = &self.failed {
            return Err(DatabaseError::Failed(failed.clone()));
        }
        self.verify()?;
        let State::Following(replica) = self.state else {
            return Err(DatabaseError::Refused("the database is open for writing already"));
        };
        replica.trim().map_err(|source| io_error("resize", &self.path, source))?;
        remove_cache(&self.path)?;
        Ok(Lent { file: self.file, index: replica.applied, table: replica.table })
    }

    /// Fences the gate and waits until nobody has the database open. From then on another node may serve. The database
    /// cannot be used here until [`Database::reopen`]. Does nothing on a secondary.
    ///
    /// # Errors
    /// [`DatabaseError::StillOpen`] after the deadline: exit the process.
    pub fn close(&mut self, deadline: Instant) -> Result<(), DatabaseError> {
        self.break_hold();
        let State::Serving(serving) = &mut self.state else {
            return Ok(());
        };
        let gate = Arc::clone(&serving.primary.gate);
        gate.fence();
        vfs::forget(&gate);
        serving.checkpointer = None;
        if !gate.wait_closed(deadline) {
            return Err(DatabaseError::StillOpen { connections: gate.open_connections() });
        }
        let touched = serving.applied.max(gate.last_index());
        self.state = State::Closed { touched };
        Ok(())
    }

    /// Goes back to the last checkpoint after [`Database::close`]: feed it the entries after [`Database::applied`]
    /// again. Reads the whole file, for as long as `go_on` returns true.
    ///
    /// # Errors
    /// [`DatabaseError::Io`] when the file cannot be read, or `go_on` returned false: try again.
    /// [`DatabaseError::Failed`] after a failed sync: only a new process can use the database.
    pub fn reopen(&mut self, go_on: &dyn Fn() -> bool) -> Result<(), DatabaseError> {
        match self.state {
            State::Closed { touched } => self.fall_back(touched, go_on),
            State::Following(_) | State::Serving(_) => Ok(()),
        }
    }

    /// True between [`Database::close`] and the end of [`Database::reopen`].
    pub fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed { .. })
    }

    /// [`Database::close`] and [`Database::reopen`] in one.
    ///
    /// # Errors
    /// [`DatabaseError::StillOpen`] after the deadline: exit the process. [`DatabaseError::Io`] or
    /// [`DatabaseError::Failed`] when the file cannot be used: it stays closed.
    pub fn demote(&mut self, deadline: Instant) -> Result<(), DatabaseError> {
        self.close(deadline)?;
        self.reopen(&|| true)
    }

    /// Goes back to the last checkpoint. Up to index `touched` the file may be ahead of it.
    fn fall_back(&mut self, touched: u64, go_on: &dyn Fn() -> bool) -> Result<(), DatabaseError> {
        if self.sync_failed {
            return Err(DatabaseError::Failed(self.failed.clone().unwrap_or_default()));
        }
        remove_cache(&self.path)?;
        let touched = touched.max(self.record.index);
        let replica = Replica::at(Arc::clone(&self.file), self.id, &self.record, touched, go_on)
            .map_err(|source| io_error("read", &self.path, source))?;
        self.state = State::Following(replica);
        self.failed = None;
        Ok(())
    }
}

/// The first transaction of a cluster's raft log, as encoded parts: a database without tables. The primary proposes it
/// when its database is empty.
///
/// # Errors
/// [`DatabaseError::Sqlite`] when SQLite cannot make the image.
pub fn initial_transaction(id: u32, page_size: u32) -> Result<Vec<Vec<u8>>, DatabaseError> {
    let image = vfs::initial_image(page_size)?;
    let mut table = PageTable::empty(page_size);
    let mut changes = Vec::new();
    let mut builder = PagesBuilder::new(id, rand::random::<u64>() >> 1, 0, page_size);
    for (number, page) in (1..).zip(image.chunks_exact(page_size as usize)) {
        changes.push((number, super::checksum::page_checksum(number, page)));
        builder.push(number, page);
    }
    let preview = table.preview(changes.len() as u32, changes);
    let commit = Commit { database_pages: preview.pages, checksum: preview.checksum };
    table.accept(preview);
    Ok(vec![builder.finish(Some(commit))])
}

/// The database file and its checkpoint record.
fn places(dir: &Path, id: u32) -> Result<(PathBuf, PathBuf), DatabaseError> {
    // SQLite resolves links in the path that it opens, and ours must be equal to its.
    let dir = fs::canonicalize(dir).map_err(|source| io_error("open the folder", dir, source))?;
    let name = if id == CONSOLE_DATABASE { "console".to_owned() } else { format!("database{id}") };
    Ok((dir.join(format!("{name}.db")), dir.join(format!("{name}.checkpoint"))))
}

/// Opens or creates the file, and deletes what a primary has left beside it.
fn open_file(path: &Path) -> Result<Arc<File>, DatabaseError> {
    remove_cache(path)?;
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = file.map_err(|source| io_error("open", path, source))?;
    fsync_dir(folder_of(path)).map_err(|source| io_error("sync the folder of", path, source))?;
    Ok(Arc::new(file))
}

fn unreadable(path: &Path, error: io::Error) -> DatabaseError {
    if is_rot(&error) {
        return DatabaseError::Damaged { path: path.to_owned(), why: error.to_string() };
    }
    io_error("read", path, error)
}

fn io_error(what: &'static str, path: &Path, error: io::Error) -> DatabaseError {
    DatabaseError::Io { what, path: path.to_owned(), error }
}

/// Deletes `-wal` and `-shm`, which are only a cache of the primary that wrote them, and a journal, which is never
/// ours.
fn remove_cache(path: &Path) -> Result<(), DatabaseError> {
    for suffix in ["-wal", "-shm", "-journal"] {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        clear_away(Path::new(&name)).map_err(|source| io_error("remove", Path::new(&name), source))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
