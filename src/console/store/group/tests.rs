//! Writers that share a transaction: who waits for whom, and who learns what.

use std::{fs, path::PathBuf};

use futures_util::poll;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode};
use tempfile::TempDir;
use tokio::task::{JoinHandle, yield_now};

use super::{super::Store, *};

const PATIENCE: Duration = Duration::from_secs(20);
const PAGE: usize = 4096;

/// A line before a database with one table.
struct Place {
    store: Store,
    line: Line,
    wal: PathBuf,
    _dir: TempDir,
}

impl Place {
    async fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("console.db");
        let options = SqliteConnectOptions::new().filename(&path).create_if_missing(true).page_size(PAGE as u32);
        let store = Store::new(options.journal_mode(SqliteJournalMode::Wal).pragma("wal_autocheckpoint", "0"));
        let line = store.line().clone();
        let mut turn = line.turn(PATIENCE).await.unwrap();
        for sql in [
            "CREATE TABLE t (name TEXT PRIMARY KEY)",
            "CREATE TABLE later (name TEXT REFERENCES t (name) DEFERRABLE INITIALLY DEFERRED)",
        ] {
            turn.write(sqlx::query(sql)).await.unwrap();
        }
        turn.commit().await.unwrap();
        Self { store, line, wal: dir.path().join("console.db-wal"), _dir: dir }
    }

    async fn names(&self) -> Vec<String> {
        let mut reading = self.store.read().await.unwrap();
        sqlx::query_scalar("SELECT name FROM t ORDER BY name").fetch_all(&mut *reading).await.unwrap()
    }

    /// Transactions so far: frames with the size of the database, see "WAL File Format" of SQLite.
    fn commits(&self) -> usize {
        let wal = fs::read(&self.wal).unwrap();
        wal[32..].chunks(24 + PAGE).filter(|frame| frame[4..8] != [0; 4]).count()
    }

    async fn poll_waiting(&self, count: usize) {
        while self.line.0.waiting.load(Ordering::SeqCst) < count {
            yield_now().await;
        }
    }

    /// Adds a name when it has its turn.
    fn add(&self, name: &'static str) -> JoinHandle<Result<(), StoreError>> {
        let line = self.line.clone();
        tokio::spawn(async move {
            let mut turn = line.turn(PATIENCE).await?;
            insert(&mut turn, name).await?;
            turn.commit().await
        })
    }
}

fn named(name: &'static str) -> Query<'static, Sqlite, SqliteArguments> {
    sqlx::query("INSERT INTO t VALUES (?)").bind(name)
}

async fn insert(turn: &mut Turn, name: &'static str) -> Result<(), StoreError> {
    turn.write(named(name)).await.map(|_| ())
}

#[tokio::test]
async fn whoever_waits_shares_a_commit_and_one_that_fails_takes_nobody_along() {
    let place = Place::new().await;
    let before = place.commits();
    let mut first = place.line.turn(PATIENCE).await.unwrap();
    insert(&mut first, "a").await.unwrap();
    let mut others = Vec::new();
    for (name, count) in [("b", 1), ("a", 2), ("c", 3), ("c", 4), ("d", 5), ("b", 6)] {
        others.push(place.add(name));
        place.poll_waiting(count).await;
    }
    first.commit().await.unwrap();
    let mut failed = 0;
    for other in others {
        match other.await.unwrap() {
            Ok(()) => {}
            Err(StoreError::Duplicate) => failed += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!((failed, place.names().await), (3, ["a", "b", "c", "d"].map(str::to_owned).to_vec()));
    assert_eq!(place.commits() - before, 1, "one COMMIT for all");
    place.add("e").await.unwrap().unwrap();
    assert_eq!(place.commits() - before, 2, "one that is alone has its own");
}

/// It goes on when nobody waits for it any more, and so does what it is remembered by.
#[tokio::test]
async fn a_change_of_logins_is_noticed_by_its_revision() {
    let place = Place::new().await;
    let before = place.line.login_revision();
    place.add("other").await.unwrap().unwrap();
    assert_eq!(place.line.login_revision(), before);
    let mut turn = place.line.turn(PATIENCE).await.unwrap();
    turn.changes_logins();
    insert(&mut turn, "user").await.unwrap();
    let mut commit = Box::pin(turn.commit());
    assert!(poll!(commit.as_mut()).is_pending());
    drop(commit);
    // It has its turn when the one before has ended.
    drop(place.line.turn(PATIENCE).await.unwrap());
    assert_eq!(place.names().await, ["other", "user"]);
    assert_eq!(place.line.login_revision(), before + 1);
}

#[tokio::test]
async fn the_number_of_parts_has_a_limit() {
    let place = Place::new().await;
    let before = place.commits();
    let first = place.line.turn(PATIENCE).await.unwrap();
    let names: Vec<&'static str> = (0..PARTS + 5).map(|n| &*format!("{n}").leak()).collect();
    let others: Vec<_> = names.iter().map(|name| place.add(name)).collect();
    place.poll_waiting(names.len()).await;
    drop(first);
    for other in others {
        other.await.unwrap().unwrap();
    }
    assert_eq!(place.names().await.len(), names.len());
    assert!(place.commits() - before >= 2, "{} commits", place.commits() - before);
}

#[tokio::test]
async fn who_goes_away_is_undone_and_missed_by_nobody() {
    let place = Place::new().await;
    let mut first = place.line.turn(PATIENCE).await.unwrap();
    insert(&mut first, "kept").await.unwrap();
    // In the line when it goes away: the first one counts on it to commit.
    let waits = place.add("waited");
    place.poll_waiting(1).await;
    let mut first = Box::pin(first.commit());
    waits.abort();
    assert!(waits.await.unwrap_err().is_cancelled());
    first.as_mut().await.unwrap();
    // It has written, and is not the last one.
    let mut first = place.line.turn(PATIENCE).await.unwrap();
    insert(&mut first, "first").await.unwrap();
    let line = place.line.clone();
    let gone = tokio::spawn(async move {
        let mut turn = line.turn(PATIENCE).await.unwrap();
        insert(&mut turn, "gone").await.unwrap();
    });
    place.poll_waiting(1).await;
    let last = place.add("last");
    place.poll_waiting(2).await;
    first.commit().await.unwrap();
    gone.await.unwrap();
    last.await.unwrap().unwrap();
    // It has written, and is the last one.
    let mut first = place.line.turn(PATIENCE).await.unwrap();
    insert(&mut first, "again").await.unwrap();
    let line = place.line.clone();
    let gone = tokio::spawn(async move {
        let mut turn = line.turn(PATIENCE).await.unwrap();
        insert(&mut turn, "gone").await.unwrap();
    });
    place.poll_waiting(1).await;
    first.commit().await.unwrap();
    gone.await.unwrap();
    assert_eq!(place.names().await, ["again", "first", "kept", "last"]);
}

/// Its savepoint and its statement are one message, and nobody hears how far that got.
#[tokio::test]
async fn a_part_that_is_cut_off_at_its_savepoint_takes_nobody_along() {
    let place = Place::new().await;
    let connection = place.line.connection().await.unwrap();
    let mut group = Group::new(connection, place.line.0.rollbacks.clone());
    group.run(named("a"), false, false).await.unwrap();
    group.run(named("b"), true, false).await.unwrap();
    for (got, name) in [(0, "c"), (1, "d"), (2, "e"), (0, "f"), (0, "g"), (1, "h")] {
        let (before, count) = group.before(true);
        for sql in before.split_terminator("; ").take(got) {
            group.send(sql.to_owned()).await.unwrap();
        }
        if got == count {
            group.send("INSERT INTO t VALUES ('cut off')".to_owned()).await.unwrap();
        }
        group.undo = true;
        assert!(group.usable().is_err(), "nothing is sent behind it");
        group.clean().await.unwrap();
        assert_eq!(group.run(named(name), true, false).await.unwrap().changed, 1);
        group.run(named("fails"), true, false).await.unwrap();
        group.undo = true;
        group.clean().await.unwrap();
    }
    let seen = sqlx::query("SELECT name FROM t ORDER BY name");
    assert!(group.run(seen, false, true).await.unwrap().first.is_some());
    group.commit(&place.line).await.unwrap();
    assert_eq!(place.names().await, ["a", "b", "c", "d", "e", "f", "g", "h"]);
    let mut turn = place.line.turn(PATIENCE).await.unwrap();
    let mut cut = Box::pin(insert(&mut turn, "begins"));
    // Sent, and perhaps done.
    let _ = poll!(cut.as_mut());
    drop(cut);
    drop(turn);
    place.add("last").await.unwrap().unwrap();
    assert_eq!(place.names().await.last().unwrap(), "last");
    assert!(!place.names().await.contains(&"begins".to_owned()));
    place.store.close().await;
}

#[tokio::test]
async fn a_commit_that_fails_is_told_to_all_who_have_a_part_in_it() {
    let place = Place::new().await;
    let mut first = place.line.turn(PATIENCE).await.unwrap();
    insert(&mut first, "a").await.unwrap();
    let dangling = sqlx::query("INSERT INTO later VALUES ('nobody')");
    first.write(dangling).await.unwrap();
    let (second, third) = (place.add("b"), place.add("c"));
    place.poll_waiting(2).await;
    assert!(matches!(first.commit().await, Err(StoreError::Statement(_))));
    for other in [second, third] {
        assert!(matches!(other.await.unwrap(), Err(StoreError::Statement(_))));
    }
    assert!(place.names().await.is_empty());
    place.add("d").await.unwrap().unwrap();
    assert_eq!(place.names().await, ["d"]);
}

#[tokio::test]
async fn nobody_in_the_line_outstays_the_database() {
    let place = Place::new().await;
    let mut first = place.line.turn(PATIENCE).await.unwrap();
    insert(&mut first, "a").await.unwrap();
    let waits = place.add("b");
    place.poll_waiting(1).await;
    let store = place.store.clone();
    let closing = tokio::spawn(async move { store.close().await });
    let refused = waits.await.unwrap();
    assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{refused:?}");
    assert!(matches!(place.add("c").await.unwrap(), Err(StoreError::Unavailable(_))));
    first.commit().await.unwrap();
    closing.await.unwrap();
}

/// What SQLite does by itself when the disk is full, for example.
#[tokio::test]
async fn a_transaction_that_sqlite_rolls_back_is_told_to_all_and_nothing_of_it_is_left() {
    for joined in [1, 2] {
        let place = Place::new().await;
        let mut first = place.line.turn(PATIENCE).await.unwrap();
        insert(&mut first, "a").await.unwrap();
        let more: Vec<_> = ["b", "c"][..joined - 1].iter().map(|name| place.add(name)).collect();
        place.poll_waiting(more.len()).await;
        let line = place.line.clone();
        let breaks = tokio::spawn(async move {
            let mut turn = line.turn(PATIENCE).await?;
            // Whoever does not look at an error gets no further.
            let _ = turn.write(sqlx::query("INSERT OR ROLLBACK INTO t VALUES ('a')")).await;
            insert(&mut turn, "orphan").await?;
            turn.commit().await
        });
        place.poll_waiting(joined).await;
        let last = place.add("z");
        place.poll_waiting(joined + 1).await;
        let failed = first.commit().await;
        assert!(matches!(failed, Err(StoreError::Unavailable(_))), "{failed:?}");
        for other in more.into_iter().chain([breaks]) {
            let failed = other.await.unwrap();
            assert!(matches!(failed, Err(StoreError::Unavailable(_))), "{failed:?}");
        }
        last.await.unwrap().unwrap();
        assert_eq!(place.names().await, ["z"], "the next transaction is another one");
    }
}

/// A refusal because of what another one has written, too, is an answer that waits.
#[tokio::test]
async fn an_answer_waits_for_what_it_saw() {
    for fails in [false, true] {
        let place = Place::new().await;
        let mut first = place.line.turn(PATIENCE).await.unwrap();
        insert(&mut first, "a").await.unwrap();
        if fails {
            let dangling = sqlx::query("INSERT INTO later VALUES ('nobody')");
            first.write(dangling).await.unwrap();
        }
        let line = place.line.clone();
        let mut answer = Box::pin(settled(async move {
            let mut turn = line.turn(PATIENCE).await.unwrap();
            insert(&mut turn, "a").await
        }));
        assert!(poll!(answer.as_mut()).is_pending());
        place.poll_waiting(1).await;
        let line = place.line.clone();
        let mut last = Box::pin(async move { line.turn(PATIENCE).await.unwrap() });
        assert!(poll!(last.as_mut()).is_pending());
        place.poll_waiting(2).await;
        let first = tokio::spawn(first.commit());
        // It holds the transaction open once the other one has been refused.
        let last = tokio::select! {
            last = last => last,
            _ = &mut answer => panic!("it was answered before the COMMIT"),
        };
        for _ in 0..100 {
            yield_now().await;
            assert!(poll!(answer.as_mut()).is_pending(), "it was answered before the COMMIT");
        }
        last.commit().await.map_or_else(|_| assert!(fails), |()| assert!(!fails));
        assert_eq!(first.await.unwrap().is_err(), fails);
        match (answer.await, fails) {
            (Ok(Err(StoreError::Duplicate)), false) | (Err(StoreError::Statement(_)), true) => {}
            other => panic!("{other:?}"),
        }
    }
}
