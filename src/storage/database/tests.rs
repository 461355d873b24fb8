//! A database that cannot be opened or written, and what must hold for its parts.

use super::*;
use crate::storage::ReplicateError;

struct Nothing;

impl EntrySource for Nothing {
    fn for_each(&self, _: u64, _: u64, _: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        Ok(())
    }
}

impl Replicator for Nothing {
    fn replicate(&self, _: Vec<u8>, _: bool) -> Result<u64, ReplicateError> {
        Err(ReplicateError::Refused("nobody is there".to_owned()))
    }
}

#[test]
fn a_database_that_cannot_be_opened_nor_read_again_does_not_pass_for_an_empty_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut database = Database::open(folder.path(), CONSOLE_DATABASE, 0).unwrap();
    let parts = initial_transaction(CONSOLE_DATABASE, 4096).unwrap();
    database.apply(2, 1, &parts[0], &Nothing).unwrap();
    database.checkpoint().unwrap();
    let good = std::mem::replace(&mut database.file, Arc::new(File::options().write(true).open("/dev/null").unwrap()));
    // SQLite does not find the file, and what goes back to the checkpoint cannot read it.
    fs::rename(database.path(), folder.path().join("elsewhere")).unwrap();
    assert!(database.promote(2, Arc::new(Nothing)).is_err());
    assert!(database.is_closed() && !database.is_empty());
    assert_eq!((database.applied(), database.checkpointed()), (2, 2));
    let (_, saving) = database.begin_checkpoint().unwrap();
    assert!(saving.is_none());
    database.file = good;
    database.reopen(&|| true).unwrap();
    database.verify().unwrap();
    assert!(!database.is_closed() && !database.is_empty());
}

#[test]
fn a_database_on_a_full_disk_is_not_copied_and_is_not_called_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let mut database = Database::open(folder.path(), CONSOLE_DATABASE, 0).unwrap();
    let page = |byte: u8| {
        let mut builder = PagesBuilder::new(CONSOLE_DATABASE, byte.into(), 0, 512);
        builder.push(1, &[byte; 512]);
        builder.push(2, &[byte; 512]);
        let checksum = [1, 2].map(|number| crate::storage::checksum::page_checksum(number, &[byte; 512]));
        builder.finish(Some(Commit { database_pages: 2, checksum: checksum[0] ^ checksum[1] }))
    };
    database.apply(2, 1, &page(1), &Nothing).unwrap();
    database.begin_copy().unwrap();
    // Whatever is done to it fails.
    let full = Arc::new(File::options().write(true).open("/dev/full").unwrap());
    let State::Following(replica) = &mut database.state else { panic!("it follows") };
    let good = std::mem::replace(&mut replica.file, full);
    assert!(replica.apply(3, 1, &page(2), &Nothing).is_err());
    let error = database.begin_copy().unwrap_err().to_string();
    assert!(error.contains("disk is full"), "{error}");
    let State::Following(replica) = &mut database.state else { panic!("it follows") };
    replica.file = good;
    database.apply(3, 1, &page(2), &Nothing).unwrap();
    database.begin_copy().unwrap();
}

#[test]
fn the_parts_may_go_to_other_threads() {
    fn send<T: Send>() {}
    fn shared<T: Send + Sync>() {}
    send::<Database>();
    shared::<PrimaryDatabase>();
}
