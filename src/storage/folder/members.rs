//! The databases of a service on one member. While it follows, each is a [`Database`] in the folder of the service, and
//! the catalogue says which there are. While it serves, they belong to a [`Registry`]. Owns what lies in
//! `DATA_FOLDER/service`: `files`, `checkpoints` and `catalogue.json`. Must never let an entry pass of a database that it
//! does not have.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, lchown},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
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
        checkpoint::Record,
        clear_away,
        database::{ApplyError, Database, DatabaseError},
        folder_of, fsync_dir,
        gate::Stop,
        make_private_dir,
        transaction::{self, TransactionError},
        vfs,
    },
};

/// The databases of a service on one member.
pub struct Members {
    places: Places,
    catalogue: Arc<Mutex<Catalogue>>,
    /// Empty while it serves.
    databases: BTreeMap<u32, Database>,
    applied: u64,
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> DatabaseError + use<'a> {
    move |error| DatabaseError::Io { what, path: path.to_owned(), error }
}

impl Members {
    /// Opens the folder of a service, or makes it: feed it the entries after [`Self::applied`]. `log_last` is the
    /// highest index in this node's raft log.
    ///
    /// # Errors
    /// Those of [`Database::open`]; [`DatabaseError::Damaged`] when the catalogue can never be read.
    pub fn open(root: &Path, log_last: u64) -> Result<Self, DatabaseError> {
        make_private_dir(root).map_err(failed("create", root))?;
        // As the databases have it, whose paths have no links.
        let root = std::fs::canonicalize(root).map_err(failed("open the folder", root))?;
        let places = Places { root };
        for folder in [places.files(), places.spill(), places.records()] {
            make_private_dir(&folder).map_err(failed("create", &folder))?;
        }
        let path = places.catalogue();
        let catalogue = Catalogue::read(&path).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => DatabaseError::Damaged { path: path.clone(), why: error.to_string() },
            _ => DatabaseError::Io { what: "read", path: path.clone(), error },
        })?;
        let mut members =
            Self { places, catalogue: Arc::default(), databases: BTreeMap::new(), applied: catalogue.changed() };
        for (id, path) in catalogue.iter() {
            let database = members.open_database(id, path, log_last)?;
            members.databases.insert(id, database);
        }
        let least = members.databases.values().map(Database::applied).min();
        members.applied = least.unwrap_or(members.applied);
        *locked(&members.catalogue) = catalogue;
        Ok(members)
    }

    fn open_database(&self, id: u32, path: &Path, log_last: u64) -> Result<Database, DatabaseError> {
        let path = self.places.files().join(path);
        let folder = folder_of(&path);
        make_private_dir(folder).map_err(failed("create", folder))?;
        Database::open_at((path, self.places.record(id)), id, log_last)
    }

    /// The folder that is served, and that all members have.
    pub fn files(&self) -> PathBuf {
        self.places.files()
    }

    /// The raft index up to which all of them have everything.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// The databases while it follows.
    pub fn iter(&self) -> impl Iterator<Item = &Database> {
        self.databases.values()
    }

    /// What the catalogue has.
    pub fn catalogue(&self) -> Catalogue {
        locked(&self.catalogue).clone()
    }

    /// Applies a committed entry with content.
    ///
    /// # Errors
    /// The [`ApplyError`] of the database. Nothing has changed anywhere if the entry is of a newer program, or if the
    /// disk was full.
    pub fn apply(&mut self, index: u64, term: u64, payload: &[u8], source: &dyn EntrySource) -> Result<(), ApplyError> {
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

    fn change(&mut self, index: u64, id: u32, change: &Change) -> Result<(), ApplyError> {
        let io = |error| ApplyError::Io { index, error };
        let mut changed = locked(&self.catalogue).clone();
        if index <= changed.changed() {
            return Ok(());
        }
        changed.apply(index, id, change).map_err(|what| ApplyError::OutOfOrder { index, what })?;
        match change {
            Change::Add(path) => {
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
                make_private_dir(folder_of(&to)).map_err(io)?;
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
    /// The error of the first that cannot be opened: open all again.
    pub fn promote(&mut self, epoch: u64, replicator: Arc<dyn Replicator>) -> Result<Arc<Registry>, DatabaseError> {
        let passage = Arc::new(Passage::new(epoch, replicator));
        let enters: Arc<dyn Enters> = Arc::new(Door {
            places: self.places.clone(),
            catalogue: Arc::clone(&self.catalogue),
            passage: Arc::clone(&passage),
        });
        let (lock_byte, spill) = (vfs::lock_byte(), self.places.spill());
        let registry = Registry::new(Arc::clone(&passage), Arc::clone(&enters), lock_byte, spill.clone());
        let catalogue = locked(&self.catalogue).clone();
        let files = self.places.files();
        for (id, database) in std::mem::take(&mut self.databases) {
            let Some(path) = catalogue.path(id) else { continue };
            let lent = database.lend()?;
            hand_over(&files, path).map_err(failed("give away", path))?;
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
        remove_caches(&self.places.files(), &mut 0).map_err(failed("clear", &self.places.files()))?;
        Ok(Arc::new(registry))
    }

    /// Makes what the files of a folder that is served hold durable, and notes it: no database needs the raft log up to
    /// the index that this returns. `committed` is the raft index up to which everything is committed.
    ///
    /// # Errors
    /// [`DatabaseError::Io`] when the disk fails or is full. After a failed sync the process must end.
    pub fn checkpoint(&self, registry: &Registry, committed: u64) -> Result<u64, DatabaseError> {
        let mut least = committed;
        for guarded in registry.all() {
            let Some(id) = guarded.id() else { continue };
            let path = self.places.record(id);
            let mut record = Record::read(&path, id).map_err(failed("read", &path))?;
            if let Some(reached) = guarded.save(committed).map_err(failed("sync", guarded.path()))?
                && reached.index > record.index
            {
                reached.write(&path, id).map_err(failed("write", &path))?;
                record = reached;
            }
            least = least.min(record.index);
        }
        Ok(least)
    }
}

/// Gives a database and the folders around it to whoever owns the folder of the service: members have made them.
fn hand_over(files: &Path, path: &Path) -> io::Result<()> {
    let owner = std::fs::metadata(files)?;
    for made in path.ancestors().filter(|made| !made.as_os_str().is_empty()) {
        let made = files.join(made);
        let found = std::fs::symlink_metadata(&made)?;
        if (found.uid(), found.gid()) != (owner.uid(), owner.gid()) && (found.uid(), found.gid()) == (0, 0) {
            lchown(&made, Some(owner.uid()), Some(owner.gid()))?;
        }
    }
    Ok(())
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
    passage: Arc<Passage>,
}

impl Enters for Door {
    fn enter(&self, path: &Path) -> Result<u32, Stop> {
        let mut catalogue = locked(&self.catalogue);
        let id = catalogue.next();
        self.change(&mut catalogue, id, &Change::Add(path.to_owned()), |index| begin(&self.places, index, id))?;
        Ok(id)
    }

    fn leave(&self, id: u32) -> Result<(), Stop> {
        self.change(&mut locked(&self.catalogue), id, &Change::Remove, |_| clear_away(&self.places.record(id)))
    }
}

impl Door {
    /// Has a majority take a change, and then this member. `before` is done before the catalogue has it.
    fn change(
        &self,
        catalogue: &mut Catalogue,
        id: u32,
        change: &Change,
        before: impl FnOnce(u64) -> io::Result<()>,
    ) -> Result<(), Stop> {
        let Some(entry) = change.encode(id) else {
            return Err(self.passage.refuse(format!("{change:?}: a database needs a path in UTF-8")));
        };
        let index = self.passage.propose(entry, true)?;
        let mut changed = catalogue.clone();
        let broken = |error: &dyn std::fmt::Display| {
            self.passage.fence_because(format!("database {id} of the service: a change could not be noted: {error}"))
        };
        changed.apply(index, id, change).map_err(|why| broken(&why))?;
        let written = before(index).and_then(|()| changed.write(&self.places.catalogue()));
        written.map_err(|error| broken(&error))?;
        *catalogue = changed;
        Ok(())
    }
}
