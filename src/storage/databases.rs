//! The databases of this node, which share one raft log: each has an id, and there is one applied index for all.
//!
//! An entry changes the database that it names, and all others only note its index: after each entry all are at the
//! same index. Each has a durable checkpoint of its own, so after a crash they may start at different indexes. Then an
//! entry goes only to those that do not have it yet. Must never pass over an entry of a database that this node does
//! not have, and never let go of an entry that one of them lacks.
//!
//! Those of a service ([`Members`]) come and go with entries of the raft log. Each member has them, whatever its
//! configuration says of a service.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak, atomic::Ordering},
    time::Instant,
};

use super::{
    EntrySource, Replicator,
    checkpoint::{Saved, Saving},
    database::{ApplyError, Database, DatabaseError, PrimaryDatabase},
    folder::{catalogue::Catalogue, members::Members, rest::rest, sqlite::Registry},
    online_copy::{CopyError, FinishedWhole, WholeCopy, WholeCopyId, check_pending},
    snapshot::Whole,
    transaction::{self, CONSOLE_DATABASE},
};

/// A database as the order of entries concerns it.
pub trait FollowsLog {
    /// The raft index up to which it has everything.
    fn applied(&self) -> u64;

    /// Applies a committed entry that is a part of a transaction of this database.
    ///
    /// # Errors
    /// [`ApplyError::Io`] for lack of space: the same entry can be applied again. After any other [`ApplyError`]
    /// nothing more is applied.
    fn apply(&mut self, index: u64, term: u64, payload: &[u8], source: &dyn EntrySource) -> Result<(), ApplyError>;

    /// Notes a committed entry that does not concern it.
    ///
    /// # Errors
    /// [`ApplyError`] when the database cannot note it, as after an earlier failure.
    fn apply_empty(&mut self, index: u64, term: u64) -> Result<(), ApplyError>;
}

impl FollowsLog for Database {
    fn applied(&self) -> u64 {
        Self::applied(self)
    }

    fn apply(&mut self, index: u64, term: u64, payload: &[u8], source: &dyn EntrySource) -> Result<(), ApplyError> {
        Self::apply(self, index, term, payload, source)
    }

    fn apply_empty(&mut self, index: u64, term: u64) -> Result<(), ApplyError> {
        Self::apply_empty(self, index, term)
    }
}

/// The databases of this node, by their ids. There is always at least one.
#[derive(Debug)]
pub struct Databases<D = Database> {
    own: BTreeMap<u32, D>,
    service: Option<Members>,
    /// What somebody may be reading.
    resting: Weak<Whole>,
}

/// All databases of this node, open for writing.
#[derive(Clone, Debug)]
pub struct Opened {
    pub own: Vec<Arc<PrimaryDatabase>>,
    /// Those of a service, for whoever serves its folder.
    pub service: Option<Arc<Registry>>,
}

impl<D: FollowsLog> Databases<D> {
    /// A set of these databases, by their ids. Panics if there is none.
    pub fn new(databases: impl IntoIterator<Item = (u32, D)>) -> Self {
        let databases = BTreeMap::from_iter(databases);
        assert!(!databases.is_empty(), "a node has at least one database");
        Self { own: databases, service: None, resting: Weak::new() }
    }

    /// The raft index up to which all of them have everything.
    pub fn applied(&self) -> u64 {
        let service = self.service.as_ref().and_then(Members::needs_behind);
        self.own.values().map(D::applied).chain(service).min().unwrap_or(0)
    }

    /// The raft index up to which at least one of them has everything. It is above [`Self::applied`] only after a
    /// start. The entry is in the raft log and committed.
    pub fn newest(&self) -> u64 {
        let service = self.service.as_ref().and_then(Members::newest);
        self.own.values().map(D::applied).chain(service).max().unwrap_or(0)
    }

    /// The database of this id, if it is none of a service.
    pub fn get(&self, id: u32) -> Option<&D> {
        self.own.get(&id)
    }

    /// The database of this id, if it is none of a service, mutable.
    pub fn get_mut(&mut self, id: u32) -> Option<&mut D> {
        self.own.get_mut(&id)
    }

    /// All but those of a service, in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = &D> {
        self.own.values()
    }

    /// Applies a committed entry with content to the database that it names; the others note its index.
    ///
    /// # Errors
    /// The [`ApplyError`] of the database. Nothing has changed anywhere if the entry is [of a newer
    /// program](ApplyError::is_of_newer_program), or if the disk was full.
    pub fn apply(&mut self, index: u64, term: u64, payload: &[u8], source: &dyn EntrySource) -> Result<(), ApplyError> {
        let id = transaction::database(payload).map_err(|error| ApplyError::Command { index, error })?;
        match (self.own.get_mut(&id), &mut self.service) {
            (Some(database), _) if database.applied() < index => database.apply(index, term, payload, source)?,
            (Some(_), _) => {}
            (None, Some(service)) => service.apply(index, term, payload, source)?,
            (None, None) => return Err(ApplyError::UnknownDatabase { index, database: id }),
        }
        self.apply_empty(index, term)
    }

    /// Has all of them note a committed entry that is no command: a new primary's first entry, or a change of the
    /// members.
    ///
    /// # Errors
    /// The [`ApplyError`] of the first database that cannot note it. Those after it have not, either.
    pub fn apply_empty(&mut self, index: u64, term: u64) -> Result<(), ApplyError> {
        let mut behind = self.own.values_mut().filter(|database| database.applied() < index);
        behind.try_for_each(|database| database.apply_empty(index, term))?;
        self.service.as_mut().map_or(Ok(()), |service| service.apply_empty(index, term))
    }
}

impl Databases {
    /// The Console's database alone.
    pub fn of_console(console: Database) -> Self {
        Self::new([(CONSOLE_DATABASE, console)])
    }

    /// The Console's database, and those of a service.
    pub fn with_service(console: Database, service: Members) -> Self {
        Self { service: Some(service), ..Self::of_console(console) }
    }

    /// The Console's database.
    pub fn console(&self) -> &Database {
        self.get(CONSOLE_DATABASE).expect("the Console's database is always there")
    }

    /// The Console's database, mutable.
    pub fn console_mut(&mut self) -> &mut Database {
        self.get_mut(CONSOLE_DATABASE).expect("the Console's database is always there")
    }

    /// Those of a service.
    pub fn service(&self) -> Option<&Members> {
        self.service.as_ref()
    }

    /// All that follow, those of a service included.
    fn all(&self) -> impl Iterator<Item = &Database> {
        self.own.values().chain(self.service.iter().flat_map(Members::iter))
    }

    /// A database that follows, also one of a service.
    pub fn following(&self, id: u32) -> Option<&Database> {
        self.all().find(|database| database.id() == id)
    }

    /// The first that follows with this id or a higher one.
    pub fn following_from(&self, id: u32) -> Option<&Database> {
        self.all().filter(|database| database.id() >= id).min_by_key(|database| database.id())
    }

    /// All that follow, those of a service included.
    pub fn all_mut(&mut self) -> impl Iterator<Item = &mut Database> {
        self.own.values_mut().chain(self.service.iter_mut().flat_map(Members::iter_mut))
    }

    /// The lowest of the durable checkpoints: no database needs the raft log up to there.
    pub fn checkpointed(&self) -> u64 {
        let service = self.service.as_ref().and_then(Members::checkpointed);
        self.iter().map(Database::checkpointed).chain(service).min().unwrap_or(0)
    }

    /// The ids of those that have no content yet: the primary must propose their first transactions.
    pub fn empty(&self) -> impl Iterator<Item = u32> {
        self.iter().filter(|database| database.is_empty()).map(Database::id)
    }

    /// Why nothing of one of them counts, if that is so.
    pub fn distrusted(&self) -> Option<&str> {
        let service = || self.service.as_ref().and_then(Members::why_lost);
        self.all().find_map(Database::distrusted).or_else(service)
    }

    /// Bytes of all files as of their last checkpoints.
    pub fn file_bytes(&self) -> u64 {
        self.iter().map(Database::file_bytes).sum::<u64>() + self.service.as_ref().map_or(0, Members::file_bytes)
    }

    /// Bytes of all `-wal` files, but those of a service.
    pub fn wal_bytes(&self) -> u64 {
        self.iter().map(Database::wal_bytes).sum()
    }

    /// Lets all databases be read as of one raft index until the last reader drops them, while others go on writing:
    /// see [`Database::rest`]. Only on a primary.
    ///
    /// # Errors
    /// Those of [`Database::rest`].
    pub fn rest(&mut self) -> Result<Arc<Whole>, DatabaseError> {
        if let Some(whole) = self.resting.upgrade().filter(|whole| !whole.is_broken()) {
            return Ok(whole);
        }
        let whole = Arc::new(self.rest_anew()?);
        // Whoever comes while somebody reads it gets the same: another one would end that.
        self.resting = Arc::downgrade(&whole);
        Ok(whole)
    }

    fn rest_anew(&mut self) -> Result<Whole, DatabaseError> {
        let Self { own, service, .. } = self;
        let console = own.get_mut(&CONSOLE_DATABASE).expect("the Console's database is always there");
        if let Some((service, registry)) = service.as_ref().and_then(|service| Some((service, service.registry()?)))
            && !service.catalogue().is_untouched()
        {
            return rest(console, service, registry);
        }
        let whole = Whole::of_console(console.rest()?);
        // The first database of a service may have come meanwhile.
        let came =
            |service: &Members| service.is_unsettled().load(Ordering::SeqCst) || !service.catalogue().is_untouched();
        if service.as_ref().is_some_and(came) {
            return Err(DatabaseError::Refused("a service gets its first database: try again"));
        }
        Ok(whole)
    }

    /// Which databases a service has, as of what is applied.
    pub fn catalogue(&self) -> Catalogue {
        self.service.as_ref().map(Members::catalogue).unwrap_or_default()
    }

    /// Begins a copy of all databases, which go on following meanwhile. An earlier copy ends.
    ///
    /// # Errors
    /// Those of [`Database::begin_copy`].
    pub fn begin_copy(&mut self) -> Result<WholeCopy, CopyError> {
        // Without those of a service it would look as if there were none.
        if let Some(why) = self.distrusted() {
            return Err(CopyError::Ended(format!("{why}: it must be restored from the primary first")));
        }
        let catalogue = self.catalogue();
        let databases = self.all_mut().map(|database| Ok((database.id(), database.begin_copy()?)));
        Ok(WholeCopy { databases: databases.collect::<Result<_, CopyError>>()?, catalogue })
    }

    /// Completes a copy: all are as of what is applied now.
    ///
    /// # Errors
    /// Those of [`Database::finish_copy`]. [`CopyError::Ended`] when databases were added or removed meanwhile.
    pub fn finish_copy(&mut self, copy: &WholeCopyId) -> Result<FinishedWhole, CopyError> {
        if copy.changed != self.catalogue().changed() || self.newest() != self.applied() {
            return Err(CopyError::Ended("databases were added or removed since the copy began".to_owned()));
        }
        let unknown = || CopyError::Ended("a database was not there when the copy began".to_owned());
        let of = |database: &Database| copy.copies.get(&database.id()).ok_or_else(unknown);
        let lacks: Vec<_> =
            self.all_mut().map(|database| database.copy_lacks(of(database)?)).collect::<Result<_, _>>()?;
        check_pending(lacks.iter().copied())?;
        self.all_mut().map(|database| Ok((database.id(), database.finish_copy(of(database)?)?))).collect()
    }

    /// True while somebody reads a resting file.
    pub fn is_held(&self) -> bool {
        self.iter().any(Database::is_held)
    }

    /// True while one of them is closed and not reopened.
    pub fn is_closed(&self) -> bool {
        self.iter().any(Database::is_closed) || self.service.as_ref().is_some_and(Members::is_closed)
    }

    /// See [`Database::note_committed`].
    pub fn note_committed(&mut self, index: u64) {
        self.own.values_mut().for_each(|database| database.note_committed(index));
        self.service.iter_mut().for_each(|service| service.note_committed(index));
    }

    /// See [`Database::save_if`]. While a change of a service's catalogue is on its way, no checkpoint counts.
    pub fn save_if(&mut self, may_save: impl Fn(u64) -> bool + Clone + Send + Sync + 'static) {
        let unsettled = self.service.as_ref().map(Members::is_unsettled).unwrap_or_default();
        // Asked in this order: what is known to be handed out then was on its way before.
        let may_save = move |index| may_save(index) && !unsettled.load(Ordering::SeqCst);
        self.own.values_mut().for_each(|database| database.save_if(may_save.clone()));
        self.service.iter_mut().for_each(|service| service.save_if(may_save.clone()));
    }

    /// Begins a checkpoint of each, as [`Database::begin_checkpoint`] does. If one of them fails, those begun before it
    /// must be saved all the same.
    pub fn begin_checkpoint(&mut self) -> (Vec<Saving>, Result<(), DatabaseError>) {
        let mut savings = Vec::new();
        let mut begin = |database: &mut Database| database.begin_checkpoint().map(|(_, saving)| savings.extend(saving));
        let result = self.own.values_mut().try_for_each(&mut begin);
        let result = result.and_then(|()| match &mut self.service {
            Some(service) => service.begin_checkpoint(&mut savings),
            None => Ok(()),
        });
        (savings, result)
    }

    /// Takes the outcomes of what [`Self::begin_checkpoint`] returned.
    ///
    /// # Errors
    /// [`DatabaseError::Io`] of the first that could not be saved: its old checkpoint counts. The new ones of the
    /// others count.
    pub fn saved(&mut self, saved: Vec<Saved>) -> Result<(), DatabaseError> {
        let mut result = Ok(());
        for saved in saved {
            match (self.own.get_mut(&saved.database), &mut self.service) {
                (Some(database), _) => result = result.and(database.saved(saved)),
                (None, Some(service)) => result = result.and(service.saved(saved)),
                (None, None) => {}
            }
        }
        result
    }

    /// Opens all for writing, or none. Call it when everything of earlier epochs is applied.
    ///
    /// # Errors
    /// The error of the first that cannot be opened, from [`Database::promote`]. None is open then: they have gone back
    /// to their checkpoints, and follow again from there. If not even that was possible, one [is
    /// closed](Self::is_closed).
    pub fn promote(&mut self, epoch: u64, replicator: &Arc<dyn Replicator>) -> Result<Opened, DatabaseError> {
        let open = |database: &mut Database| database.promote(epoch, Arc::clone(replicator));
        let own: Result<Vec<_>, _> = self.own.values_mut().map(open).collect();
        let promoted = own.and_then(|own| {
            let service = self.service.as_mut().map(|service| service.promote(epoch, Arc::clone(replicator)));
            Ok(Opened { own, service: service.transpose()? })
        });
        if promoted.is_err() {
            // Nobody has opened them yet.
            self.close(Instant::now())?;
            self.reopen(&|| true)?;
        }
        promoted
    }

    /// Closes all: see [`Database::close`].
    ///
    /// # Errors
    /// [`DatabaseError::StillOpen`] of the first that is open after the deadline: exit the process. Others may still be
    /// open.
    pub fn close(&mut self, deadline: Instant) -> Result<(), DatabaseError> {
        self.own.values_mut().try_for_each(|database| database.close(deadline))?;
        self.service.as_mut().map_or(Ok(()), |service| service.close(deadline))
    }

    /// Goes back to the last checkpoint of each after [`Self::close`]: see [`Database::reopen`].
    ///
    /// # Errors
    /// The error of the first that cannot go back to its checkpoint, from [`Database::reopen`]. It stays closed, and so
    /// do those after it.
    pub fn reopen(&mut self, go_on: &dyn Fn() -> bool) -> Result<(), DatabaseError> {
        self.own.values_mut().try_for_each(|database| database.reopen(go_on))?;
        self.service.as_mut().map_or(Ok(()), |service| service.reopen(go_on))
    }
}

#[cfg(test)]
mod tests {
    use std::{io, path::Path};

    use super::*;
    use crate::storage::{
        checksum::page_checksum,
        transaction::{Commit, PagesBuilder},
    };

    const OTHER: u32 = 2;

    /// A raft log that begins with index 1.
    struct Entries(Vec<Vec<u8>>);

    impl EntrySource for Entries {
        fn for_each(
            &self,
            first: u64,
            last: u64,
            each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
        ) -> io::Result<()> {
            (first..=last).try_for_each(|index| each(index, &self.0[index as usize - 1]))
        }
    }

    /// Part 0 or 1 of a transaction that writes two pages, each in its own part.
    fn part(database: u32, transaction: u64, part: u32) -> Vec<u8> {
        let (image, number) = ([transaction as u8; 512], part + 1);
        let mut builder = PagesBuilder::new(database, transaction, part, 512);
        builder.push(number, &image);
        let checksum = page_checksum(1, &image) ^ page_checksum(2, &image);
        builder.finish((part == 1).then_some(Commit { database_pages: 2, checksum }))
    }

    /// Two databases; parts of both stand between each other, and an entry that is no command among them.
    fn entries() -> Entries {
        let (one, two) = (CONSOLE_DATABASE, OTHER);
        let parts =
            [(one, 1, 0), (two, 1, 0), (one, 1, 1), (two, 1, 1), (two, 2, 0), (one, 2, 0), (two, 2, 1), (one, 2, 1)];
        let mut entries: Vec<_> = parts.into_iter().map(|(id, number, at)| part(id, number, at)).collect();
        entries.insert(4, Vec::new());
        Entries(entries)
    }

    fn open(folder: &Path, ids: &[u32], last: u64) -> Databases {
        Databases::new(ids.iter().map(|id| (*id, Database::open(folder, *id, last).unwrap())))
    }

    fn feed(databases: &mut Databases, entries: &Entries, last: u64) -> Result<(), ApplyError> {
        for index in databases.applied() + 1..=last {
            match entries.0[index as usize - 1].as_slice() {
                [] => databases.apply_empty(index, 1)?,
                payload => databases.apply(index, 1, payload, entries)?,
            }
            assert!(databases.iter().all(|database| database.applied() >= index), "all stand at the same index");
        }
        Ok(())
    }

    /// Content of both files at an index, on a member that has never been away.
    fn expected(last: u64) -> Vec<Vec<u8>> {
        let folder = tempfile::tempdir().unwrap();
        let mut databases = open(folder.path(), &[CONSOLE_DATABASE, OTHER], 0);
        feed(&mut databases, &entries(), last).unwrap();
        assert_eq!((databases.applied(), databases.newest()), (last, last));
        files(&databases)
    }

    fn files(databases: &Databases) -> Vec<Vec<u8>> {
        databases.iter().map(|database| std::fs::read(database.path()).unwrap()).collect()
    }

    fn checkpoint(databases: &mut Databases) {
        let (savings, result) = databases.begin_checkpoint();
        result.unwrap();
        databases.saved(savings.into_iter().map(Saving::save).collect()).unwrap();
    }

    /// Wherever it stops, and whichever of the two has its checkpoint on the disk by then.
    #[test]
    fn whoever_has_an_entry_already_does_not_get_it_again_after_a_crash() {
        let (entries, all) = (entries(), [CONSOLE_DATABASE, OTHER]);
        let last = entries.0.len() as u64;
        assert_eq!(expected(last)[0], [2; 1024]);
        for (stop, saved) in
            (1..=last).flat_map(|stop| [vec![], vec![all[0]], vec![all[1]], all.to_vec()].map(|saved| (stop, saved)))
        {
            let folder = tempfile::tempdir().unwrap();
            let mut databases = open(folder.path(), &all, 0);
            feed(&mut databases, &entries, stop).unwrap();
            for id in &saved {
                databases.get_mut(*id).unwrap().checkpoint().unwrap();
            }
            let least = databases.checkpointed();
            drop(databases);
            let mut databases = open(folder.path(), &all, last);
            assert_eq!(databases.applied(), least, "{stop} {saved:?}");
            assert!(
                least <= stop && (saved.len() == 2 || least == 0),
                "an entry that one lacks is kept: {stop} {saved:?}"
            );
            feed(&mut databases, &entries, last).unwrap();
            assert_eq!(files(&databases), expected(last), "{stop} {saved:?}");
            checkpoint(&mut databases);
            assert_eq!((databases.checkpointed(), databases.newest()), (last, last));
        }
    }

    #[test]
    fn an_entry_of_a_database_that_is_not_known_changes_nothing_and_waits_for_a_newer_program() {
        let (entries, folder) = (entries(), tempfile::tempdir().unwrap());
        let mut older = Databases::of_console(Database::open(folder.path(), CONSOLE_DATABASE, 0).unwrap());
        for _ in 0..2 {
            let error = feed(&mut older, &entries, 9).unwrap_err();
            assert!(matches!(error, ApplyError::UnknownDatabase { index: 2, database: OTHER }), "{error}");
            assert!(error.is_of_newer_program() && !error.is_full());
            assert!(error.to_string().ends_with("upgrade this node"), "{error}");
            assert_eq!((older.applied(), older.newest()), (1, 1));
        }
        let error = older.apply(2, 1, &[9, 9], &entries).unwrap_err();
        assert!(error.is_of_newer_program() && error.to_string().ends_with("upgrade this node"), "{error}");
        // Nothing of it is lost: it is saved, and another program goes on from there.
        checkpoint(&mut older);
        drop(older);
        let mut newer = open(folder.path(), &[CONSOLE_DATABASE, OTHER], 9);
        feed(&mut newer, &entries, 9).unwrap();
        assert_eq!(files(&newer), expected(9));
    }

    #[test]
    fn a_full_disk_leaves_all_where_they_were() {
        struct Full(bool, u64);
        impl FollowsLog for Full {
            fn applied(&self) -> u64 {
                self.1
            }
            fn apply(&mut self, index: u64, _: u64, _: &[u8], _: &dyn EntrySource) -> Result<(), ApplyError> {
                if self.0 {
                    return Err(ApplyError::Io { index, error: io::ErrorKind::StorageFull.into() });
                }
                self.1 = index;
                Ok(())
            }
            fn apply_empty(&mut self, index: u64, _: u64) -> Result<(), ApplyError> {
                self.1 = index;
                Ok(())
            }
        }
        let entries = entries();
        let mut databases = Databases::new([(CONSOLE_DATABASE, Full(false, 0)), (OTHER, Full(true, 0))]);
        databases.apply(1, 1, &entries.0[0], &entries).unwrap();
        assert!(databases.apply(2, 1, &entries.0[1], &entries).unwrap_err().is_full());
        assert_eq!((databases.applied(), databases.newest()), (1, 1));
        databases.get_mut(OTHER).unwrap().0 = false;
        databases.apply(2, 1, &entries.0[1], &entries).unwrap();
        assert_eq!((databases.applied(), databases.newest()), (2, 2));
    }
}
