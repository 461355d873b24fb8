//! The database file of a primary while a snapshot is read from it: SQLite goes on writing, and nothing of that is seen.

use twistlock_ha::storage::{database::DatabaseError, snapshot::Resting};

use super::support::{Sql, assert_same_files, pair};

/// All pages, and whether they are what the checkpoint says.
fn read(resting: &Resting) -> std::io::Result<Vec<u8>> {
    let record = resting.record();
    let (mut all, mut chunk, mut checksum) = (Vec::new(), Vec::new(), 0);
    while all.len() < record.pages as usize * record.page_size as usize {
        checksum ^= resting.read((all.len() / record.page_size as usize) as u32, &mut chunk)?;
        all.extend_from_slice(&chunk);
    }
    assert_eq!(checksum, record.checksum);
    Ok(all)
}

#[test]
fn writers_go_on_while_the_file_rests() {
    let (mut first, mut second, primary) = pair(4096);
    let sql = Sql::open(&primary);
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
    for _ in 0..20 {
        sql.run("INSERT INTO t(data) VALUES (randomblob(100000))").unwrap();
    }
    let resting = first.database.rest().unwrap();
    let index = resting.record().index;
    assert_eq!((index, first.database.checkpointed()), (first.log.last_index(), index));
    // On the other node the file is what the log says at that index.
    second.follow_to(index);
    second.database.checkpoint().unwrap();
    let expected = std::fs::read(second.database.path()).unwrap();
    assert!(read(&resting).unwrap() == expected);
    for _ in 0..20 {
        sql.run("UPDATE t SET data = randomblob(90000) WHERE id % 3 = 0; DELETE FROM t WHERE id = 5").unwrap();
        assert!(read(&resting).unwrap() == expected);
    }
    assert!(first.log.last_index() > index);
    // A second reader gets the same checkpoint, and the file rests until both are done.
    let again = first.database.rest().unwrap();
    assert_eq!(again.record(), resting.record());
    drop(resting);
    assert!(first.database.is_held() && read(&again).unwrap() == expected);
    drop(again);
    assert!(!first.database.is_held());
    // SQLite's locks are still there: a writer that begins while another one writes is sent away.
    sql.run("BEGIN IMMEDIATE").unwrap();
    assert_eq!(Sql::open(&primary).run("BEGIN IMMEDIATE").unwrap_err().0 & 0xff, libsqlite3_sys::SQLITE_BUSY);
    sql.run("INSERT INTO t(data) VALUES (1); COMMIT").unwrap();
    second.follow();
    first.checkpoint_all();
    assert_same_files(&first.database, &second.database);
}

#[test]
fn a_checkpoint_and_a_demotion_end_the_rest() {
    let (mut first, mut second, primary) = pair(4096);
    let sql = Sql::open(&primary);
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data)").unwrap();
    let resting = first.database.rest().unwrap();
    sql.run("INSERT INTO t(data) VALUES (1)").unwrap();
    first.checkpoint_all();
    assert!(resting.is_broken() && !first.database.is_held());
    assert_eq!(read(&resting).unwrap_err().kind(), std::io::ErrorKind::Interrupted);
    let resting = first.database.rest().unwrap();
    read(&resting).unwrap();
    drop(sql);
    first.demote();
    assert!(read(&resting).is_err());
    assert!(matches!(first.database.rest(), Err(DatabaseError::Refused(_))));
    second.follow();
    assert!(matches!(second.database.rest(), Err(DatabaseError::Refused(_))));
}

#[test]
fn the_file_does_not_rest_while_a_reader_keeps_checkpoints_from_their_end() {
    let (mut first, _second, primary) = pair(4096);
    let (sql, reader) = (Sql::open(&primary), Sql::open(&primary));
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data); INSERT INTO t(data) VALUES (1)").unwrap();
    reader.run("BEGIN").unwrap();
    assert_eq!(reader.number("SELECT count(*) FROM t"), 1);
    sql.run("INSERT INTO t(data) VALUES (2)").unwrap();
    assert!(matches!(first.database.rest(), Err(DatabaseError::Refused(why)) if why.contains("try again")));
    reader.run("COMMIT").unwrap();
    read(&first.database.rest().unwrap()).unwrap();
}
