//! The whole content of a database is replaced by that of a file: one transaction of many entries, of which every member has all
//! or nothing, wherever it is given up, refused, or ended by a crash.

use std::path::PathBuf;

use tempfile::TempDir;
use twistlock_ha::storage::database::{PrimaryDatabase, ReplaceError};

use super::support::{Answer, Node, Sql, assert_same_files, assert_sound, pair};

const PAGE_SIZE: u32 = 4096;

/// A file with a database of some megabytes, another one than those of the nodes.
fn other_database() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.db");
    std::fs::write(&path, "").unwrap();
    let sql = Sql::open_with(&path, None).unwrap();
    sql.run(&format!("PRAGMA page_size={PAGE_SIZE}; CREATE TABLE other(id INTEGER PRIMARY KEY, data)")).unwrap();
    sql.run("BEGIN").unwrap();
    for _ in 0..40 {
        sql.run("INSERT INTO other(data) VALUES (randomblob(100000))").unwrap();
    }
    sql.run("COMMIT").unwrap();
    drop(sql);
    (folder, path)
}

fn filled(primary: &PrimaryDatabase) {
    let sql = Sql::open(primary);
    sql.run("CREATE TABLE t(id INTEGER PRIMARY KEY, data); INSERT INTO t(data) VALUES (randomblob(300000))").unwrap();
}

fn tables(primary: &PrimaryDatabase) -> String {
    Sql::open(primary).text("SELECT group_concat(name) FROM sqlite_schema")
}

/// The present primary gives the role up, and the other one has everything that the log has.
fn hand_over(first: &mut Node, second: &mut Node, primary: std::sync::Arc<PrimaryDatabase>) -> String {
    drop(primary);
    let log_had = first.log.last_index();
    first.crash();
    let new = second.promote();
    first.follow();
    assert!(first.log.last_index() > log_had);
    let found = tables(&new);
    assert_sound(&first.database);
    // What it serves is the same as what the follower has.
    Sql::open(&new).run("CREATE TABLE goes_on(x)").unwrap();
    first.follow();
    second.checkpoint_all();
    first.database.checkpoint().unwrap();
    assert_same_files(&first.database, &second.database);
    found
}

#[test]
fn the_content_of_the_file_comes_to_all_in_many_entries() {
    let (mut first, mut second, primary) = pair(PAGE_SIZE);
    let (_folder, other) = other_database();
    filled(&primary);
    let before = first.log.last_index();
    let mut steps = Vec::new();
    let go_on = |done, total| {
        steps.push((done, total));
        true
    };
    primary.replace(&other, go_on).unwrap();
    assert!(steps.len() >= 3 && steps.windows(2).all(|two| two[0].0 <= two[1].0), "{steps:?}");
    assert!(first.log.last_index() > before + 1, "it has more than one part");
    assert_eq!(tables(&primary), "other");
    assert_eq!(Sql::open(&primary).number("SELECT count(*) FROM other"), 40);
    // Everything is in the checkpoint of both, and the one goes on where the other stopped.
    second.follow();
    first.checkpoint_all();
    second.database.checkpoint().unwrap();
    assert_same_files(&first.database, &second.database);
    assert_eq!(hand_over(&mut first, &mut second, primary), "other");
}

#[test]
fn given_up_at_any_step_nothing_has_changed() {
    let (mut first, mut second, primary) = pair(PAGE_SIZE);
    let (_folder, other) = other_database();
    filled(&primary);
    let before = first.log.last_index();
    for step in 1..=3 {
        let mut seen = 0;
        let go_on = |_, _| {
            seen += 1;
            seen < step
        };
        assert!(matches!(primary.replace(&other, go_on), Err(ReplaceError::Refused(_))), "step {step}");
        assert_eq!(tables(&primary), "t");
        assert_eq!(first.log.last_index(), before, "nothing came to the log");
    }
    primary.replace(&other, |_, _| true).unwrap();
    assert_eq!(hand_over(&mut first, &mut second, primary), "other");
}

#[test]
fn refused_at_its_end_nothing_has_changed() {
    let (mut first, mut second, primary) = pair(PAGE_SIZE);
    let (_folder, other) = other_database();
    filled(&primary);
    first.log.answer(Answer::Refuse);
    assert!(matches!(primary.replace(&other, |_, _| true), Err(ReplaceError::Refused(_))));
    assert_eq!(tables(&primary), "t");
    // The parts of what was refused are in the log, and nobody's.
    Sql::open(&primary).run("INSERT INTO t(data) VALUES (randomblob(9000))").unwrap();
    assert_eq!(hand_over(&mut first, &mut second, primary), "t");
}

#[test]
fn an_unknown_outcome_is_the_whole_new_content_or_the_whole_old_one() {
    for kept in [false, true] {
        let (mut first, mut second, primary) = pair(PAGE_SIZE);
        let (_folder, other) = other_database();
        filled(&primary);
        first.log.answer(Answer::Unknown { kept });
        assert!(matches!(primary.replace(&other, |_, _| true), Err(ReplaceError::Unknown(_))));
        let expected = if kept { "other" } else { "t" };
        assert_eq!(hand_over(&mut first, &mut second, primary), expected, "kept: {kept}");
    }
}

/// A follower that dies between any two parts has the old content until it has the last one.
#[test]
fn a_follower_that_dies_at_any_part_goes_on() {
    let (mut first, mut second, primary) = pair(PAGE_SIZE);
    let (_folder, other) = other_database();
    filled(&primary);
    second.follow();
    let before = first.log.last_index();
    primary.replace(&other, |_, _| true).unwrap();
    let last = first.log.last_index();
    for index in before + 1..=last {
        second.follow_to(index);
        let applied = second.database.applied();
        assert!(applied == index || index < last && applied <= index, "{applied} at {index}");
        second.crash();
    }
    second.follow();
    assert_eq!(second.database.applied(), last);
    first.checkpoint_all();
    second.database.checkpoint().unwrap();
    assert_same_files(&first.database, &second.database);
    assert_sound(&second.database);
}
