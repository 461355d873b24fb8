//! Where the events of all Defenders go: what has come while one transaction was on its way, and for a moment after it,
//! shares the next one. So thousands of Defenders are one writer among others, which most of the time find nobody in
//! the line. Must never answer before the COMMIT has returned, nor let what one Defender sent cost another its answer.

use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::oneshot;

use super::{
    budget::Share,
    tables::{self, Delivery},
};
use crate::{
    console::store::{Store, StoreError},
    mutex::locked,
};

/// A transaction takes no further delivery when it has so many events, or bytes of text: others wait for its turn.
const EVENTS: usize = 256;
const BYTES: usize = 256 << 10;
/// From the end of a transaction to the next one, unless that one is full already: no Defender waits for its
/// acknowledgement, and people who save something do.
const GAP: Duration = Duration::from_millis(20);
/// Deliveries of one transaction, at most.
const DELIVERIES: usize = 1024;

/// The number up to which all events of the Defender are stored; none if it is not known (any more).
pub(super) type Stored = Result<Option<u64>, StoreError>;

/// What waits for its transaction. Whoever hands over events has a share of the budget for them, also when the
/// connection has ended meanwhile: that bounds it.
#[derive(Debug, Default)]
pub(super) struct Intake {
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    deliveries: VecDeque<Waiter>,
    /// There is a task that stores them.
    running: bool,
}

#[derive(Debug)]
struct Waiter {
    delivery: Delivery,
    /// Of its text: given back when it is stored.
    room: Option<Share>,
    answer: oneshot::Sender<Stored>,
}

impl Intake {
    /// Has events stored that take this `room`; without events, it is noted that the Defender is there. Whoever does
    /// not wait for the answer takes nothing back.
    pub(super) fn hand_over(
        self: &Arc<Self>,
        store: &Store,
        delivery: Delivery,
        room: Option<Share>,
    ) -> oneshot::Receiver<Stored> {
        let (answer, stored) = oneshot::channel();
        let mut waiting = locked(&self.waiting);
        waiting.deliveries.push_back(Waiter { delivery, room, answer });
        if !mem::replace(&mut waiting.running, true) {
            let (intake, store) = (Arc::clone(self), store.clone());
            tokio::spawn(async move {
                while let Some((next, full)) = intake.next() {
                    store_and_answer(&store, next).await;
                    if !full {
                        tokio::time::sleep(GAP).await;
                    }
                }
            });
        }
        stored
    }

    /// From now on nothing is stored; or else from the next time that something is handed over, all is again.
    #[cfg(test)]
    pub(super) fn hold(&self, held: bool) {
        locked(&self.waiting).running = held;
    }

    /// What shares the next transaction, and whether there is more than that. None ends the task.
    fn next(&self) -> Option<(Vec<Waiter>, bool)> {
        let mut waiting = locked(&self.waiting);
        let (mut count, mut events, mut bytes) = (0, 0, 0);
        for waiter in waiting.deliveries.iter().take(DELIVERIES) {
            if events >= EVENTS || bytes >= BYTES {
                break;
            }
            let room = waiter.room.as_ref().map_or(0, Share::bytes);
            (count, events, bytes) = (count + 1, events + waiter.delivery.1.len(), bytes + room);
        }
        let full = count < waiting.deliveries.len();
        waiting.running = count > 0;
        waiting.running.then(|| (waiting.deliveries.drain(..count).collect(), full))
    }
}

async fn store_and_answer(store: &Store, waiters: Vec<Waiter>) {
    let (mut deliveries, mut answers, mut rooms) = (Vec::new(), Vec::new(), Vec::new());
    for Waiter { delivery, room, answer } in waiters {
        deliveries.push(delivery);
        answers.push(answer);
        rooms.push(room);
    }
    // Whoever has gone away needs no answer.
    match tables::store_all(store, &deliveries).await {
        Ok(stored) => stored.into_iter().zip(answers).for_each(|(stored, answer)| drop(answer.send(Ok(stored)))),
        // Nothing was written, for the sake of one of them that the database does not accept.
        Err(StoreError::Duplicate | StoreError::Statement(_)) if deliveries.len() > 1 => {
            for (delivery, answer) in deliveries.into_iter().zip(answers) {
                let stored = tables::store_all(store, &[delivery]).await;
                let _ = answer.send(stored.map(|mut stored| stored.pop().flatten()));
            }
        }
        Err(error) => answers.into_iter().for_each(|answer| drop(answer.send(Err(error.clone())))),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{budget::Budgets, tables::Told},
        *,
    };
    use crate::console::test_console::TestConsole;

    #[tokio::test]
    async fn one_whose_events_are_not_accepted_costs_the_others_nothing() {
        let test = TestConsole::start().await;
        let store = &test.console.store;
        let insert = "INSERT INTO defenders (id, name, key, registered, modified, seen, expires) \
                      VALUES ('d', 'n', 'k', 1, 1, 1, 1), ('e', 'n', 'l', 1, 1, 1, 1)";
        store.write(sqlx::query(insert)).await.unwrap();
        let number = |id: &'static str| async move { tables::find(store, id).await.unwrap().unwrap().number };
        let (good, bad) = (number("d").await, number("e").await);
        // Its first event is there, and it does not know: as no Console leaves it.
        let there = "INSERT INTO defender_events (defender, sequence, time, received, kind, event) VALUES (?, 1, 1, 1, 'a', '{}')";
        store.write(sqlx::query(there).bind(bad)).await.unwrap();
        let events =
            |count| (1..=count).map(|sequence| Told { sequence, time: 1, kind: "a".into(), event: "{}".into() });
        let intake = Arc::new(Intake::default());
        let hand_over = |number, count| intake.hand_over(store, (number, events(count).collect()), None);
        let all = [hand_over(good, 3), hand_over(bad, 2), hand_over(good, 5), hand_over(bad + 9, 1)];
        let mut answers = Vec::new();
        for answer in all {
            answers.push(answer.await.unwrap().ok());
        }
        assert_eq!(answers, [Some(Some(3)), None, Some(Some(5)), Some(None)]);
        assert!(!locked(&intake.waiting).running || locked(&intake.waiting).deliveries.is_empty());
    }

    #[tokio::test]
    async fn what_waits_shares_a_transaction_within_limits() {
        let intake = Arc::new(Intake::default());
        intake.hold(true);
        let test = TestConsole::start().await;
        let event = Told { sequence: 1, time: 1, kind: "a".into(), event: "{}".into() };
        let budget = Budgets::default().read;
        for bytes in [BYTES - 1, 1, 7, BYTES, 1] {
            let room = Arc::clone(&budget).take(bytes).await;
            drop(intake.hand_over(&test.console.store, (1, vec![event.clone()]), Some(room)));
        }
        let shares = || intake.next().map(|(waiters, full)| (waiters.len(), full));
        let expected = [Some((2, true)), Some((2, true)), Some((1, false)), None];
        assert_eq!([shares(), shares(), shares(), shares()], expected);
        assert_eq!(budget.used(), 0, "what is not kept any more takes no room");
        assert!(!locked(&intake.waiting).running);
    }
}
