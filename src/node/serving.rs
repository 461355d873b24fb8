//! The databases that this node has open for writing, the Console's and those of a service: lends them to the rest of
//! the process while this node is PRIMARY, and fences all of them. Used by the consensus loop. Must never lend a
//! database that is not open, nor wait until one is given back.

use std::sync::Arc;

use tokio::sync::watch;

use crate::storage::{
    database::PrimaryDatabase, databases::Opened, folder::sqlite::Registry, transaction::CONSOLE_DATABASE,
};

/// Where the rest of the process finds the database of a PRIMARY, open for writing.
///
/// Drop every clone of it, and close every connection to it, as soon as the role changes: the daemon exits if that
/// takes longer than the demotion deadline.
pub type Serving = watch::Receiver<Option<Arc<PrimaryDatabase>>>;

/// Where the rest of the process finds the databases of a service while this node is PRIMARY.
///
/// Take their folder away as soon as the role changes: see [`Serving`].
pub type ServingFolder = watch::Receiver<Option<Arc<Registry>>>;

/// The loop's side: the databases from when they are opened until they are fenced.
pub(super) struct OpenDatabases {
    databases: Vec<Arc<PrimaryDatabase>>,
    service: Option<Arc<Registry>>,
    lent: watch::Sender<Option<Arc<PrimaryDatabase>>>,
    lent_service: watch::Sender<Option<Arc<Registry>>>,
}

impl OpenDatabases {
    /// No database is open yet.
    pub fn new() -> (Self, Serving, ServingFolder) {
        let ((lent, serving), (lent_service, folder)) = (watch::channel(None), watch::channel(None));
        (Self { databases: Vec::new(), service: None, lent, lent_service }, serving, folder)
    }

    /// Takes the databases that have just been opened for writing; the role is about to be PRIMARY.
    pub fn offer(&mut self, opened: Opened) {
        (self.databases, self.service) = (opened.own, opened.service);
    }

    /// Lends the databases, and returns true, if the Console's is open. Call it before the status says that this node
    /// is PRIMARY.
    pub fn lend(&self) -> bool {
        let console = self.databases.iter().find(|database| database.id == CONSOLE_DATABASE);
        let Some(database) = console else { return false };
        if !self.lent.borrow().as_ref().is_some_and(|lent| Arc::ptr_eq(lent, database)) {
            self.lent_service.send_replace(self.service.clone());
            self.lent.send_replace(Some(Arc::clone(database)));
        }
        true
    }

    /// Stops lending them. Call it after the status says that this node does not serve, so that no reader of the status
    /// misses it.
    pub fn withdraw(&self) {
        if self.lent.borrow().is_some() {
            self.lent.send_replace(None);
            self.lent_service.send_replace(None);
        }
    }

    /// Bytes of their `-wal` files, but those of a service.
    pub fn wal_bytes(&self) -> u64 {
        self.databases.iter().map(|database| database.gate().wal_bytes()).sum()
    }

    /// True if one of them refuses transactions.
    pub fn is_fenced(&self) -> bool {
        let service = self.service.as_ref().is_some_and(|registry| registry.passage().is_fenced());
        service || self.databases.iter().any(|database| database.gate().is_fenced())
    }

    /// From now on this node cannot commit a transaction. It takes effect at once, whichever thread writes.
    pub fn fence(&mut self) {
        self.databases.drain(..).for_each(|database| database.gate().fence());
        if let Some(registry) = self.service.take() {
            registry.passage().fence();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{
        EntrySource, ReplicateError, Replicator,
        database::{Database, initial_transaction},
        folder::members::Members,
    };

    struct Nobody(Vec<Vec<u8>>);

    impl Replicator for Nobody {
        fn replicate(&self, _: Vec<u8>, _: bool) -> Result<u64, ReplicateError> {
            Err(ReplicateError::Refused("there is nobody".to_owned()))
        }
    }

    impl EntrySource for Nobody {
        fn for_each(
            &self,
            first: u64,
            last: u64,
            each: &mut dyn FnMut(u64, &[u8]) -> std::io::Result<()>,
        ) -> std::io::Result<()> {
            (first..=last).try_for_each(|index| each(index, &self.0[index as usize - 1]))
        }
    }

    #[test]
    fn a_database_is_lent_while_it_is_open_and_fenced_before_it_is_withdrawn() {
        let folder_of_it = tempfile::tempdir().unwrap();
        let entries = Nobody(initial_transaction(CONSOLE_DATABASE, 4096).unwrap());
        let mut database = Database::open(folder_of_it.path(), CONSOLE_DATABASE, 0).unwrap();
        for (index, entry) in (1..).zip(&entries.0) {
            database.apply(index, 1, entry, &entries).unwrap();
        }
        let (mut open, serving, folder) = OpenDatabases::new();
        assert!(!open.lend() && serving.borrow().is_none());
        let replicator = Arc::new(entries);
        let mut members = Members::open(&folder_of_it.path().join("service"), 2).unwrap();
        let service = Some(members.promote(7, Arc::<Nobody>::clone(&replicator)).unwrap());
        open.offer(Opened { own: vec![database.promote(7, replicator).unwrap()], service });
        assert!(serving.borrow().is_none(), "the role is not PRIMARY yet");
        assert!(open.lend() && open.lend() && !open.is_fenced());
        let lent = serving.borrow().clone().unwrap();
        let registry = folder.borrow().clone().unwrap();
        assert_eq!(lent.epoch, 7);
        open.fence();
        assert!(lent.gate().is_fenced() && serving.borrow().is_some() && !open.lend());
        assert!(registry.passage().is_fenced());
        open.withdraw();
        assert!(serving.borrow().is_none() && folder.borrow().is_none());
    }
}
