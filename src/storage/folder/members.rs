//! The databases of a service on one member. While it follows, each is a [`Database`] in the folder of the service, and
//! the catalogue says which there are. While it serves, they belong to a [`Registry`]. Owns what lies in
//! `DATA_FOLDER/service`: `files`, `checkpoints` and `catalogue.json`. Must never let an entry pass of a database that it
//! does not have.
//!
//! A member whose service has no database needs nothing of the raft log. Its catalogue is on the disk before anything
//! that comes later counts: see [`Members::is_unsettled`].

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use super::{
    catalogue::{self, Catalogue, Change},
    guarded::{Enters, Guarded, GuardedConfig},
    passage::Passage,
    places::Places,
    sqlite::Registry,
};
use crate::{
    mutex::locked,
    storage::{
        EntrySource, Replicator,
        checkpoint::{Record, Saved, Saving},
        clear_away,
        database::{ApplyError, Database, DatabaseError},
        folder_of, fsync_dir,
        gate::Stop,
        transaction::{self, TransactionError},
        vfs,
    },
};

/// What belongs to a folder that is served.
struct Serving {
    registry: Arc<Registry>,
    /// The durable checkpoints, by the ids of the databases.
    records: BTreeMap<u32, Record>,
}

/// Asked whether a checkpoint at a raft index may count.
type MaySave = Arc<dyn Fn(u64) -> bool + Send + Sync>;

/// The databases of a service on one member.
pub struct Members {
    places: Places,
    catalogue: Arc<Mutex<Catalogue>>,
    unsettled: Arc<AtomicBool>,
    /// Empty while it serves.
    databases: BTreeMap<u32, Database>,
    serving: Option<Serving>,
    /// Between serving and following: up to this raft index the files may be ahead of their checkpoints.
    closed: Option<u64>,
    applied: u64,
    /// What [`Self::checkpointed`] was when it was last known.
    checkpointed: u64,
    /// Why nothing of it can be used.
    lost: Option<String>,
    may_save: MaySave,
}

impl fmt::Debug for Members {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Members").field("root", &self.places.root).finish_non_exhaustive()
    }
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> DatabaseError + use<'a> {
    move |error| DatabaseError::Io { what, path: path.to_owned(), error }
}

impl Members {
    /// Opens the folder of a service in `root`, which is made with the first database: feed it the entries after
    /// [`Self::applied`]. `log_last` is the highest index in this node's raft log.
    ///
    /// # Errors
    /// Those of [`Database::open`]; [`DatabaseError::Damaged`] when the catalogue can never be read.
    pub fn open(root: &Path, log_last: u64) -> Result<Self, DatabaseError> {
        let mut members = Self::nothing(root)?;
        members.load(log_last, &|| true)?;
        Ok(members)
    }

    /// What lies there cannot be used: it applies nothing, and nothing in it changes. `why` is for
    /// people.
    ///
    /// # Errors
    /// [`DatabaseError::Io`] when the folder around it cannot be found.
    pub fn lost(root: &Path, why: String) -> Result<Self, DatabaseError> {
        Ok(Self { lost: Some(why), ..Self::nothing(root)? })
    }

    fn nothing(root: &Path) -> Result<Self, DatabaseError> {
        // As the databases have it, whose paths have no links.
        let around = folder_of(root);
        let around = std::fs::canonicalize(around).map_err(failed("open the folder", around))?;
        let root = root.file_name().map_or_else(|| around.clone(), |name| around.join(name));
        Ok(Self {
            places: Places { root },
            catalogue: Arc::default(),
            unsettled: Arc::default(),
            databases: BTreeMap::new(),
            serving: None,
            closed: None,
            applied: 0,
            checkpointed: 0,
            lost: None,
            may_save: Arc::new(|_| true),
        })
    }

    /// Goes to the last checkpoints. Up to `touched` the files may be ahead of them.
    fn load(&mut self, touched: u64, go_on: &dyn Fn() -> bool) -> Result<(), DatabaseError> {
        let path = self.places.catalogue();
        let catalogue = Catalogue::read(&path).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => DatabaseError::Damaged { path: path.clone(), why: error.to_string() },
            _ => DatabaseError::Io { what: "read", path: path.clone(), error },
        })?;
        let mut databases = BTreeMap::new();
        for (id, path) in catalogue.iter() {
            if !go_on() {
                return Err(failed("read", path)(io::ErrorKind::Interrupted.into()));
            }
            databases.insert(id, self.open_database(id, path, touched)?);
        }
        self.applied = databases.values().map(Database::applied).min().unwrap_or_else(|| catalogue.changed());
        self.databases = databases;
        *locked(&self.catalogue) = catalogue;
        self.unsettled.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn open_database(&self, id: u32, path: &Path, log_last: u64) -> Result<Database, DatabaseError> {
        self.places.make_room(path).map_err(failed("make room for", path))?;
        let path = self.places.files().join(path);
        let mut database = Database::open_at((path, self.places.record(id)), id, log_last)?;
        let may_save = Arc::clone(&self.may_save);
        database.save_if(move |index| may_save(index));
        Ok(database)
    }

    /// The folder that is served, and that all members have.
    pub fn files(&self) -> PathBuf {
        self.places.files()
    }

    /// The raft index up to which all of them have everything.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// The raft index up to which all of them have everything, if there is any that needs what comes behind it.
    pub fn needs_behind(&self) -> Option<u64> {
        (!self.is_empty()).then_some(self.applied)
    }

    /// The raft index up to which at least one of them has everything; none if there is none.
    pub fn newest(&self) -> Option<u64> {
        match self.serving {
            Some(_) => self.needs_behind(),
            None => self.databases.values().map(Database::applied).max(),
        }
    }

    /// True if no member has a database of the service.
    pub fn is_empty(&self) -> bool {
        locked(&self.catalogue).iter().next().is_none()
    }

    /// Why nothing of it can be used, if that is so.
    pub fn why_lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }

    /// What they belong to while it serves.
    pub fn registry(&self) -> Option<&Registry> {
        self.serving.as_ref().map(|serving| &*serving.registry)
    }

    /// The databases while it follows.
    pub fn iter(&self) -> impl Iterator<Item = &Database> {
        self.databases.values()
    }

    /// The databases while it follows, mutable.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Database> {
        self.databases.values_mut()
    }

    /// What the catalogue has.
    pub fn catalogue(&self) -> Catalogue {
        locked(&self.catalogue).clone()
    }

    /// True while a change of the catalogue is on its way, or its outcome is unknown. A majority may have it, and this
    /// member's disk may not: no checkpoint of any database of this node may be made then, or a start from there would
    /// leave the change out.
    pub fn is_unsettled(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.unsettled)
    }

    /// Lets a checkpoint count only if `may_save` returns true for its raft index.
    pub fn save_if(&mut self, may_save: impl Fn(u64) -> bool + Clone + Send + Sync + 'static) {
        self.databases.values_mut().for_each(|database| database.save_if(may_save.clone()));
        self.may_save = Arc::new(may_save);
    }

    /// Applies a committed entry with content.
    ///
    /// # Errors
    /// The [`ApplyError`] of the database. Nothing has changed anywhere if the entry is of a newer program, or if the
    /// disk was full.
    pub fn apply(&mut self, index: u64, term: u64, payload: &[u8], source: &dyn EntrySource) -> Result<(), ApplyError> {
        if let Some(why) = &self.lost {
            return Err(ApplyError::Failed(why.clone()));
        }
        let command = |error: TransactionError| ApplyError::Command { index, error };
        if catalogue::is_change(payload) {
            let (id, change) = Change::decode(payload).map_err(command)?;
            self.change(index, id, &change)?;
            return self.apply_empty(index, term);
        }
        let id = transaction::database(payload).map_err(command)?;
        match self.databases.get_mut(&id) {
            Some(database) if database.applied() < index => database.apply(index, term, payload, source)?,
            Some(_) => {}
            // Removed by a later entry, which this member has made already.
            None if id < locked(&self.catalogue).next() => {}
            None => return Err(ApplyError::UnknownDatabase { index, database: id }),
        }
        self.apply_empty(index, term)
    }

    /// Has all of them note a committed entry.
    ///
    /// # Errors
    /// The [`ApplyError`] of the first database that cannot note it.
    pub fn apply_empty(&mut self, index: u64, term: u64) -> Result<(), ApplyError> {
        let mut behind = self.databases.values_mut().filter(|database| database.applied() < index);
        behind.try_for_each(|database| database.apply_empty(index, term))?;
        self.applied = self.applied.max(index);
        Ok(())
    }

    /// Notes a committed entry while it serves: the files have it already.
    pub fn note_committed(&mut self, index: u64) {
        if self.serving.is_some() {
            self.applied = self.applied.max(index);
        }
    }

    fn change(&mut self, index: u64, id: u32, change: &Change) -> Result<(), ApplyError> {
        let io = |error| ApplyError::Io { index, error };
        let mut changed = locked(&self.catalogue).clone();
        if index <= changed.changed() {
            return Ok(());
        }
        changed.apply(index, id, change).map_err(|what| ApplyError::OutOfOrder { index, what })?;
        match change {
            Change::Add(path) => {
                self.places.make().map_err(io)?;
                self.places.make_room(path).map_err(io)?;
                // What this member has there was never committed: a former primary's transaction failed.
                clear_away(&self.places.files().join(path)).map_err(io)?;
                begin(&self.places, index, id).map_err(io)?;
                let opened = self.open_database(id, path, index).map_err(|error| io(io::Error::other(error)))?;
                changed.write(&self.places.catalogue()).map_err(io)?;
                self.databases.insert(id, opened);
            }
            Change::Rename(path) => {
                let Some(database) = self.databases.remove(&id) else {
                    return Err(ApplyError::UnknownDatabase { index, database: id });
                };
                let (from, to) = (database.path().to_owned(), self.places.files().join(path));
                drop(database);
                self.places.make_room(path).map_err(io)?;
                std::fs::rename(&from, &to).map_err(io)?;
                fsync_dir(folder_of(&to)).map_err(io)?;
                changed.write(&self.places.catalogue()).map_err(io)?;
                let opened = self.open_database(id, path, index).map_err(|error| io(io::Error::other(error)))?;
                self.databases.insert(id, opened);
            }
            Change::Remove => {
                changed.write(&self.places.catalogue()).map_err(io)?;
                if let Some(database) = self.databases.remove(&id) {
                    clear_away(database.path()).map_err(io)?;
                }
                clear_away(&self.places.record(id)).map_err(io)?;
            }
        }
        *locked(&self.catalogue) = changed;
        Ok(())
    }

    /// Gives all databases to a folder that is served. Call it when everything of earlier epochs is applied.
    ///
    /// # Errors
    /// The error of the first that cannot be opened: [reopen](Self::reopen) all then.
    pub fn promote(&mut self, epoch: u64, replicator: Arc<dyn Replicator>) -> Result<Arc<Registry>, DatabaseError> {
        let passage = Arc::new(Passage::new(epoch, replicator));
        let enters: Arc<dyn Enters> = Arc::new(Door {
            places: self.places.clone(),
            catalogue: Arc::clone(&self.catalogue),
            unsettled: Arc::clone(&self.unsettled),
            passage: Arc::clone(&passage),
            order: Mutex::default(),
        });
        let (lock_byte, spill, files) = (vfs::lock_byte(), self.places.spill(), self.places.files());
        let registry = Registry::new(Arc::clone(&passage), Arc::clone(&enters), lock_byte, self.places.clone());
        let catalogue = locked(&self.catalogue).clone();
        let mut records = BTreeMap::new();
        self.closed = Some(self.applied);
        for (id, database) in std::mem::take(&mut self.databases) {
            let Some(path) = catalogue.path(id) else { continue };
            records.insert(id, database.record());
            let lent = database.lend()?;
            let config = GuardedConfig {
                path: path.to_owned(),
                id: Some(id),
                file: lent.file,
                table: lent.table,
                index: lent.index,
                lock_byte,
                spill: spill.clone(),
            };
            registry.add(Arc::new(Guarded::new(config, Arc::clone(&passage), Arc::clone(&enters))));
        }
        if files.exists() {
            remove_caches(&files, &mut 0).map_err(failed("clear", &files))?;
        }
        let registry = Arc::new(registry);
        self.checkpointed = records.values().map(|record: &Record| record.index).min().unwrap_or(self.applied);
        self.serving = Some(Serving { registry: Arc::clone(&registry), records });
        self.closed = None;
        Ok(registry)
    }

    /// Fences the databases, and waits until their folder is not served any more: they cannot be used here until
    /// [`Self::reopen`]. Does nothing while it follows.
    ///
    /// # Errors
    /// [`DatabaseError::StillOpen`] after the deadline: exit the process.
    pub fn close(&mut self, deadline: Instant) -> Result<(), DatabaseError> {
        let Some(serving) = &self.serving else { return Ok(()) };
        serving.registry.passage().fence();
        if !serving.registry.wait_withdrawn(deadline) {
            return Err(DatabaseError::StillOpen { connections: 1 });
        }
        let newest = serving.registry.all().iter().map(|guarded| guarded.index()).max();
        self.closed = Some(newest.unwrap_or(0).max(self.applied));
        self.serving = None;
        Ok(())
    }

    /// Goes back to the last checkpoints after [`Self::close`]: feed it the entries after [`Self::applied`] again.
    ///
    /// # Errors
    /// The error of the first that cannot go back: it stays closed.
    pub fn reopen(&mut self, go_on: &dyn Fn() -> bool) -> Result<(), DatabaseError> {
        let Some(touched) = self.closed else { return Ok(()) };
        self.load(touched, go_on)?;
        self.closed = None;
        Ok(())
    }

    /// True between [`Self::close`] and the end of [`Self::reopen`].
    pub fn is_closed(&self) -> bool {
        self.closed.is_some()
    }

    /// Begins a checkpoint of each, as [`Database::begin_checkpoint`] does. If one of them fails, those begun before it
    /// must be saved all the same.
    ///
    /// # Errors
    /// Those of [`Database::begin_checkpoint`].
    pub fn begin_checkpoint(&mut self, savings: &mut Vec<Saving>) -> Result<(), DatabaseError> {
        self.look_again();
        let Some(serving) = &self.serving else {
            let mut begin =
                |database: &mut Database| database.begin_checkpoint().map(|(_, saving)| savings.extend(saving));
            return self.databases.values_mut().try_for_each(&mut begin);
        };
        for guarded in serving.registry.all() {
            let Some(id) = guarded.id() else { continue };
            let before = serving.records.get(&id).map_or(0, |record| record.index);
            let Some(record) = guarded.holds(self.applied).filter(|record| record.index > before) else { continue };
            // The file must not be durable before the raft log: not an error, the next one tries again.
            if (self.may_save)(record.index) && serving.registry.passage().make_durable().is_ok() {
                let (file, path) = (guarded.file(), self.places.record(id));
                savings.push(Saving { file, path, database: id, record });
            }
        }
        Ok(())
    }

    /// Takes the outcome of one of those that [`Self::begin_checkpoint`] has begun.
    ///
    /// # Errors
    /// [`DatabaseError::Io`] when it could not be saved: the old checkpoint counts.
    pub fn saved(&mut self, saved: Saved) -> Result<(), DatabaseError> {
        let id = saved.database;
        if let Some(database) = self.databases.get_mut(&id) {
            return database.saved(saved);
        }
        let Some(serving) = &mut self.serving else { return Ok(()) };
        let path = self.places.record(id);
        saved.synced.map_err(failed("sync", &path))?;
        saved.written.map_err(failed("write", &path))?;
        let record = serving.records.entry(id).or_insert(saved.record);
        if record.index < saved.record.index {
            *record = saved.record;
        }
        self.look_again();
        Ok(())
    }

    /// The lowest of the durable checkpoints: no database needs the raft log up to there. None if there is no database.
    pub fn checkpointed(&self) -> Option<u64> {
        match self.serving {
            Some(_) => (!self.is_empty()).then_some(self.checkpointed),
            None => self.databases.values().map(Database::checkpointed).min(),
        }
    }

    /// Finds out how far the checkpoints are while it serves. What was known before one was added holds for it, too: it
    /// begins later.
    fn look_again(&mut self) {
        let Some(serving) = self.serving.as_mut().filter(|_| !self.unsettled.load(Ordering::SeqCst)) else { return };
        let catalogue = locked(&self.catalogue).clone();
        for (id, _) in catalogue.iter() {
            let read = || Record::read(&self.places.record(id), id).unwrap_or_default();
            serving.records.entry(id).or_insert_with(read);
        }
        serving.records.retain(|id, _| catalogue.path(*id).is_some());
        self.checkpointed = serving.records.values().map(|record| record.index).min().unwrap_or(self.applied);
    }

    /// Bytes of the files, as of the last checkpoints.
    pub fn file_bytes(&self) -> u64 {
        let served = self.serving.iter().flat_map(|serving| serving.records.values());
        let bytes = served.map(|record| u64::from(record.pages) * u64::from(record.page_size)).sum::<u64>();
        bytes + self.databases.values().map(Database::file_bytes).sum::<u64>()
    }
}

/// Makes the record of a database that has no content before `index`, so that it does not need what is before it.
fn begin(places: &Places, index: u64, id: u32) -> io::Result<()> {
    Record { index: index - 1, ..Record::default() }.write(&places.record(id), id)
}

/// Deletes what an earlier primary has left beside databases that the members did not know.
fn remove_caches(folder: &Path, depth: &mut u32) -> io::Result<()> {
    /// Folders inside folders.
    const DEEPEST: u32 = 256;
    if *depth >= DEEPEST {
        return Ok(());
    }
    *depth += 1;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_caches(&entry.path(), depth)?;
            continue;
        }
        let name = entry.file_name();
        let suffix = [b"-wal".as_slice(), b"-shm", b"-journal"].into_iter().find(|end| name.as_bytes().ends_with(end));
        let Some(suffix) = suffix else { continue };
        let path = entry.path();
        let base = &path.as_os_str().as_bytes()[..path.as_os_str().len() - suffix.len()];
        let mut header = [0; 16];
        let database = File::open(Path::new(std::ffi::OsStr::from_bytes(base)))
            .and_then(|file| std::os::unix::fs::FileExt::read_exact_at(&file, &mut header, 0));
        if database.is_ok() && &header == super::image::MAGIC {
            clear_away(&path)?;
        }
    }
    *depth -= 1;
    Ok(())
}

/// Enters new databases into the catalogue of a primary.
struct Door {
    places: Places,
    catalogue: Arc<Mutex<Catalogue>>,
    unsettled: Arc<AtomicBool>,
    passage: Arc<Passage>,
    /// Held by whoever makes a change, until a majority has it.
    order: Mutex<()>,
}

impl Enters for Door {
    fn enter(&self, path: &Path) -> Result<u32, Stop> {
        let _order = locked(&self.order);
        let id = locked(&self.catalogue).next();
        self.change(id, &Change::Add(path.to_owned()), |index| begin(&self.places, index, id))?;
        Ok(id)
    }

    fn leave(&self, id: u32) -> Result<(), Stop> {
        let _order = locked(&self.order);
        self.change(id, &Change::Remove, |_| clear_away(&self.places.record(id)))
    }
}

impl Door {
    /// Has a majority take a change, and then this member. `before` is done before the catalogue has it.
    fn change(&self, id: u32, change: &Change, before: impl FnOnce(u64) -> io::Result<()>) -> Result<(), Stop> {
        let Some(entry) = change.encode(id) else {
            return Err(self.passage.refuse(format!("{change:?}: a database needs a path in UTF-8")));
        };
        self.unsettled.store(true, Ordering::SeqCst);
        let index = self.passage.propose(entry, true).inspect_err(|_| {
            // Refused: it will never be made. Whoever is fenced does not know, and goes back to the checkpoints.
            self.unsettled.store(self.passage.is_fenced(), Ordering::SeqCst);
        })?;
        let mut changed = locked(&self.catalogue).clone();
        let broken = |error: &dyn fmt::Display| {
            self.passage.fence_because(format!("database {id} of the service: a change could not be noted: {error}"))
        };
        changed.apply(index, id, change).map_err(|why| broken(&why))?;
        let written = before(index).and_then(|()| changed.write(&self.places.catalogue()));
        written.map_err(|error| broken(&error))?;
        *locked(&self.catalogue) = changed;
        self.unsettled.store(false, Ordering::SeqCst);
        Ok(())
    }
}
