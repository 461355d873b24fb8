//! Who a Defender is that connects: those who come while one query is on its way share the next one, as thousands do
//! after a takeover. Must never answer from what was read before somebody has asked.

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex},
};

use tokio::sync::oneshot;

use super::tables::{self, Defender};
use crate::{
    console::store::{Store, StoreError},
    mutex::locked,
};

/// The most that one query looks for.
const AT_ONCE: usize = 256;

type Found = Result<Option<Defender>, StoreError>;

/// Who is looked for. As many as connect at once, at most.
#[derive(Debug, Default)]
pub(super) struct Lookups {
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    asked: Vec<(String, oneshot::Sender<Found>)>,
    /// There is a task that looks for them.
    running: bool,
}

impl Lookups {
    /// The Defender with this id.
    ///
    /// # Errors
    /// Those of a read.
    pub(super) async fn find(self: &Arc<Self>, store: &Store, id: &str) -> Found {
        let (answer, found) = oneshot::channel();
        let begin = {
            let mut waiting = locked(&self.waiting);
            waiting.asked.push((id.to_owned(), answer));
            !mem::replace(&mut waiting.running, true)
        };
        if begin {
            let (lookups, store) = (Arc::clone(self), store.clone());
            tokio::spawn(async move {
                while let Some(next) = lookups.next() {
                    look(&store, next).await;
                }
            });
        }
        // It answers everybody.
        found.await.unwrap_or(Ok(None))
    }

    /// Those that share the next query. None ends the task.
    fn next(&self) -> Option<Vec<(String, oneshot::Sender<Found>)>> {
        let mut waiting = locked(&self.waiting);
        let count = waiting.asked.len().min(AT_ONCE);
        waiting.running = count > 0;
        waiting.running.then(|| waiting.asked.drain(..count).collect())
    }
}

async fn look(store: &Store, asked: Vec<(String, oneshot::Sender<Found>)>) {
    let ids: Vec<&str> = asked.iter().map(|(id, _)| id.as_str()).collect();
    let found = tables::find_all(store, &ids).await;
    let found: Result<HashMap<String, Defender>, StoreError> =
        found.map(|all| all.into_iter().map(|defender| (defender.id.clone(), defender)).collect());
    for (id, answer) in asked {
        let one = found.as_ref().map(|all| all.get(&id).cloned()).map_err(StoreError::clone);
        // Whoever has gone away needs no answer.
        let _ = answer.send(one);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::test_console::TestConsole;

    #[tokio::test]
    async fn each_finds_itself_and_nobody_else() {
        let test = TestConsole::start().await;
        let insert = "INSERT INTO defenders (id, name, key, registered, modified, seen, expires) \
                      SELECT 'd' || value, 'n' || value, 'k' || value, 1, 1, 1, 1 FROM json_each(?)";
        let all = serde_json::to_string(&(0..1000).collect::<Vec<_>>()).unwrap();
        test.console.store.write(sqlx::query(insert).bind(all)).await.unwrap();
        let lookups = Arc::new(Lookups::default());
        let mut asked = tokio::task::JoinSet::new();
        for number in 0..1010 {
            let (lookups, store) = (Arc::clone(&lookups), test.console.store.clone());
            asked.spawn(async move { (number, lookups.find(&store, &format!("d{number}")).await.unwrap()) });
        }
        while let Some(done) = asked.join_next().await {
            let (number, found) = done.unwrap();
            let expected = (number < 1000).then(|| format!("n{number}"));
            assert_eq!(found.map(|defender| defender.name), expected);
        }
        assert!(locked(&lookups.waiting).asked.is_empty());
        test.console.store.close().await;
        assert!(lookups.find(&test.console.store, "d1").await.is_err());
    }
}
