//! Gives the rest of this process the Console that is open: its table of audits for the operations of an administrator.
//! Must never keep a Console or its database alive, and never lose what was done: what cannot be written into the table
//! now is kept here until this node or another one is PRIMARY and takes it; this node's `events.jsonl` has it at once.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};
use tracing::{info, warn};

use super::{
    Console,
    audit_log::{self, Begun, Operation},
    clock::unix_time,
    drills,
    store::{Store, StoreError},
};
use crate::{
    admin::{Act, Actor, Audit, BoxFuture, Outcome, Ticket},
    ask::{Asker, Topic},
    cluster::{NodeId, Role},
    events::{Event, Kind, Recorder, Severity},
    mutex::locked,
    node::Status,
    telemetry::AUDIT_ROWS_LOST,
};

/// How long the Console may take to open, for an operation that was asked for meanwhile.
const OPENS: Duration = Duration::from_secs(1);
/// How long one row may take: an operation must not wait for a database that does not answer.
const ROW: Duration = Duration::from_secs(2);
/// Rows that are kept until a PRIMARY takes them; the oldest go first.
const OWED: usize = 256;
/// Rows that are handed to a PRIMARY at a time.
const HANDFUL: usize = 16;
/// How long after its opening a Console writes what others have left unwritten: no takeover waits for that.
const SETTLE: Duration = Duration::from_secs(1);
/// Pause after a failed write, and the longest between two tries to hand rows on.
const PAUSE: Duration = Duration::from_secs(2);
const LONG_PAUSE: Duration = Duration::from_secs(30);

/// A handle on the Console that is open in this process, if one is. Clones are handles on the same.
#[derive(Clone)]
pub struct Inside(Arc<Shared>);

struct Shared {
    status: watch::Receiver<Arc<Status>>,
    events: Recorder,
    console: watch::Sender<Weak<Console>>,
    under_way: Mutex<HashMap<Ticket, Row>>,
    owed: Mutex<VecDeque<Owed>>,
    /// Notified when something is owed.
    owing: Notify,
}

/// A row that is in no table yet, and in this form on its way to the PRIMARY.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Owed {
    ticket: Ticket,
    row: Row,
    outcome: Outcome,
}

/// An operation as it was begun.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Row {
    time: i64,
    actor: Actor,
    act: Act,
    epoch: u64,
}

impl fmt::Debug for Inside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inside").finish_non_exhaustive()
    }
}

impl Inside {
    /// For the node with this status.
    pub fn new(status: watch::Receiver<Arc<Status>>, events: Recorder) -> Self {
        let (under_way, owed, owing) = Default::default();
        Self(Arc::new(Shared { status, events, console: watch::Sender::default(), under_way, owed, owing }))
    }

    /// Takes note that a Console is open.
    pub(super) fn opened(&self, console: &Arc<Console>) {
        self.0.console.send_replace(Arc::downgrade(console));
        let (inside, store) = (self.clone(), console.store.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = store.closing() => {}
                () = inside.catch_up(&store) => {}
            }
        });
    }

    /// Takes note that no Console is open.
    pub(super) fn closed(&self) {
        self.0.console.send_replace(Weak::new());
    }

    /// The Console that is open. On a PRIMARY this waits for it, for a moment.
    pub(super) async fn console(&self) -> Option<Arc<Console>> {
        let mut console = self.0.console.subscribe();
        if self.0.status.borrow().role == Role::Primary {
            let _ = timeout(OPENS, console.wait_for(|console| console.strong_count() > 0)).await;
        }
        console.borrow().upgrade()
    }

    /// Says why there is no Console here.
    pub(super) fn elsewhere(&self) -> String {
        let status = self.0.status.borrow();
        match status.primary.filter(|primary| *primary != status.node).and_then(|id| status.membership.get(id)) {
            Some(primary) => format!("only the PRIMARY does this: run it on {}", primary.name),
            None => "the Console is not open here: see twistcli ha status".to_owned(),
        }
    }

    /// Writes what is owed, and the outcome of operations whose members could not write it.
    async fn catch_up(&self, store: &Store) {
        sleep(SETTLE).await;
        while let Err(error) = self.settle(store).await {
            tracing::debug!("the audit could not be brought up to date: {error}; trying again");
            sleep(PAUSE).await;
        }
    }

    /// Writes what is owed.
    async fn pay(&self, store: &Store) -> Result<(), StoreError> {
        loop {
            let Some(Owed { ticket, row, outcome }) = locked(&self.0.owed).front().cloned() else { return Ok(()) };
            self.write_row(store, self.0.events.node(), &ticket, &row, Some(&outcome)).await?;
            self.forget(&ticket);
        }
    }

    fn forget(&self, ticket: &Ticket) {
        locked(&self.0.owed).retain(|owed| owed.ticket != *ticket);
    }

    async fn settle(&self, store: &Store) -> Result<(), StoreError> {
        self.pay(store).await?;
        for row in audit_log::begun(store).await? {
            // A drill goes on under the next PRIMARY, and tells its outcome itself.
            let fresh = row.action == audit_log::DRILL && unix_time() - row.time < drills::LONGEST;
            if fresh || locked(&self.0.under_way).contains_key(&Ticket(row.ticket.clone())) {
                continue;
            }
            let outcome = verdict(&row, &self.0.status.borrow());
            info!(action = row.action, what = row.what, %outcome, "the outcome of an operation is written into the audit");
            audit_log::settle(store, row, &outcome).await?;
        }
        Ok(())
    }

    async fn write_row(
        &self,
        store: &Store,
        member: &str,
        ticket: &Ticket,
        row: &Row,
        outcome: Option<&Outcome>,
    ) -> Result<(), StoreError> {
        let Row { time, actor, act, epoch } = row;
        let at = (member, *epoch);
        audit_log::write_operation(store, &Operation { ticket, time: *time, actor, act, at, outcome }).await
    }

    /// Hands what is owed to whoever is PRIMARY, for as long as the node lives.
    pub async fn hand_on(self, asker: Asker) {
        let mut pause = PAUSE;
        loop {
            if locked(&self.0.owed).is_empty() {
                self.0.owing.notified().await;
                pause = PAUSE;
            }
            let (me, primary) = (self.0.status.borrow().node, self.0.status.borrow().primary);
            match self.hand_to(primary, me, &asker).await {
                Ok(()) => pause = PAUSE,
                Err(why) => {
                    tracing::debug!("rows of the audit wait here: {why}");
                    // Another PRIMARY may take them at once.
                    let mut status = self.0.status.clone();
                    let another = status.wait_for(|now| now.primary.is_some() && now.primary != primary);
                    let _ = timeout(pause, another).await;
                    pause = (2 * pause).min(LONG_PAUSE);
                }
            }
        }
    }

    async fn hand_to(&self, primary: Option<NodeId>, me: NodeId, asker: &Asker) -> Result<(), String> {
        let primary = primary.ok_or("no PRIMARY is known")?;
        if primary == me {
            let console = self.console().await.ok_or("the Console is not open yet")?;
            return self.pay(&console.store).await.map_err(|error| error.to_string());
        }
        let rows: Vec<Owed> = locked(&self.0.owed).iter().take(HANDFUL).cloned().collect();
        let taken: usize = asker.ask(primary, Topic::Audit, &rows).await.map_err(|error| error.to_string())?;
        rows.iter().take(taken).for_each(|row| self.forget(&row.ticket));
        info!(rows = taken, primary, "what was done on this host is in the audit now, written by the PRIMARY");
        if taken == 0 { Err("the PRIMARY took nothing".to_owned()) } else { Ok(()) }
    }

    /// Writes the rows of another member, which has proven that it is `member`. Returns how many of them it need not
    /// keep.
    ///
    /// # Errors
    /// A sentence when there is no Console here, or not even the first row could be written.
    pub async fn take_over(&self, member: &str, rows: Value) -> Result<Value, String> {
        let rows: Vec<Value> = serde_json::from_value(rows).map_err(|error| format!("no rows of an audit: {error}"))?;
        let console = self.console().await.ok_or_else(|| self.elsewhere())?;
        let mut taken = 0_usize;
        for row in rows.into_iter().take(HANDFUL) {
            let sound = serde_json::from_value::<Owed>(row).ok().filter(|owed| owed.ticket.is_sound());
            let Some(Owed { ticket, row, outcome }) = sound else {
                // Refused, it would come again and again.
                metrics::counter!(AUDIT_ROWS_LOST).increment(1);
                warn!(member, "the audit lacks a row of another member, which this program does not understand");
                taken += 1;
                continue;
            };
            match self.write_row(&console.store, member, &ticket, &row, Some(&outcome)).await {
                Ok(()) => taken += 1,
                Err(error) if taken == 0 => return Err(error.to_string()),
                Err(_) => break,
            }
        }
        Ok(taken.into())
    }

    /// Writes a row. True if it is in the table now.
    async fn write(&self, ticket: &Ticket, row: &Row, outcome: Option<&Outcome>) -> bool {
        let Some(store) = self.console().await.map(|console| console.store.clone()) else { return false };
        match timeout(ROW, self.write_row(&store, self.0.events.node(), ticket, row, outcome)).await {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => {
                warn!(by = %row.actor, action = %row.act.action, "no row of the audit was written: {error}")
            }
            Err(_) => warn!(by = %row.actor, action = %row.act.action, "no row of the audit was written in time"),
        }
        false
    }

    /// Records the row in this node's own file, and keeps it for whoever is PRIMARY.
    fn owe(&self, ticket: Ticket, row: Row, outcome: Outcome) {
        let (Actor { name, source }, Act { action, what, .. }) = (&row.actor, &row.act);
        let severity = if outcome.is_done() { Severity::Info } else { Severity::Warning };
        let event = Event::new(Kind::Audit, severity, format!("{name}: {action} {what}: {outcome}"));
        self.0.events.record(
            event.field("user", name.as_str()).field("source", source.as_str()).field("action", action.as_ref()),
        );
        let mut owed = locked(&self.0.owed);
        if owed.len() >= OWED
            && let Some(Owed { row, outcome, .. }) = owed.pop_front()
        {
            metrics::counter!(AUDIT_ROWS_LOST).increment(1);
            let (by, Act { action, what, .. }) = (&row.actor, &row.act);
            warn!(%by, %action, what, %outcome, "the audit lacks this: no PRIMARY took it before {OWED} others came; see twistcli ha events here");
        }
        owed.push_back(Owed { ticket, row, outcome });
        drop(owed);
        self.0.owing.notify_one();
    }
}

impl Audit for Inside {
    fn begin<'a>(&'a self, actor: &'a Actor, act: Act) -> BoxFuture<'a, Ticket> {
        Box::pin(async move {
            let ticket = Ticket::new();
            let (time, actor, epoch) = (unix_time(), actor.clone(), self.0.status.borrow().epoch);
            let row = Row { time, actor, act, epoch };
            // First: whoever finds the row in the table must see that it is still worked on.
            locked(&self.0.under_way).insert(ticket.clone(), row.clone());
            self.write(&ticket, &row, None).await;
            ticket
        })
    }

    fn end(&self, ticket: Ticket, outcome: Outcome) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let Some(row) = locked(&self.0.under_way).get(&ticket).cloned() else { return };
            if !self.write(&ticket, &row, Some(&outcome)).await {
                self.owe(ticket.clone(), row, outcome);
            }
            locked(&self.0.under_way).remove(&ticket);
        })
    }
}

/// Who is logged in on this host: an extension of a request that did not come through a port.
#[derive(Clone, Debug)]
pub(super) struct Within(pub(super) Actor);

/// The outcome of an operation whose member could not write it, as far as this PRIMARY can see.
fn verdict(row: &Begun, status: &Status) -> Outcome {
    let unknown = |why: String| Outcome::Unknown(format!("{why}: see twistcli ha events"));
    let elsewhere = row.member != *status.name;
    let later = status.epoch > row.epoch;
    let member = row.what.strip_prefix("member '").and_then(|rest| rest.strip_suffix('\''));
    match (row.action.as_str(), member) {
        ("switchover", _) if elsewhere && later => Outcome::Done,
        ("switchover", _) => Outcome::Failed(format!("{} is PRIMARY, again or still", status.name)),
        ("remove", Some(member)) => {
            // A pool's members are removed by their addresses.
            let is =
                |id: u64, name: &str, address: &str| name == member || address == member || id.to_string() == member;
            let there = status.membership.roster.members.iter().any(|known| is(known.id, &known.name, &known.address));
            let gone = status.membership.roster.removed.iter().any(|gone| is(gone.id, &gone.name, &gone.address));
            match (there, gone) {
                (true, _) => Outcome::Failed(format!("{member} is still a member")),
                (false, true) => Outcome::Done,
                (false, false) => unknown(format!("there is no member {member}")),
            }
        }
        _ => unknown(format!("{} lost the primary role, or the database was replaced, before the end", row.member)),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::test_console::status, *};
    use crate::cluster::{ClusterId, Member, Membership, roster::Removed};

    fn begun(action: &str, what: &str) -> Begun {
        Begun::sample(action, what, "node2", 7)
    }

    /// What a new PRIMARY says of what another one began and did not come to finish.
    #[test]
    fn an_operation_that_outlived_its_primary_is_judged_by_what_has_become_of_it() {
        let founder = |id| Member::founder(id, &format!("node{id}"), &format!("127.0.0.{id}"), 8086);
        let mut status = status();
        status.name = "node1".to_owned();
        status.epoch = 8;
        status.membership = Membership::founded(ClusterId(1), (1..=2).map(founder).collect());
        status.membership.roster.removed.push(Removed {
            id: 3,
            name: "node3".to_owned(),
            at: 1,
            address: String::new(),
        });
        let told = |row: &Begun, status: &Status| verdict(row, status).to_string();
        assert_eq!(told(&begun("switchover", "high availability"), &status), "done");
        assert_eq!(told(&begun("remove", "member 'node3'"), &status), "done");
        assert_eq!(told(&begun("remove", "member '3'"), &status), "done");
        assert_eq!(told(&begun("remove", "member 'node2'"), &status), "failed: node2 is still a member");
        assert!(told(&begun("remove", "member 'node9'"), &status).starts_with("unknown: there is no member node9"));
        assert!(
            told(&begun("apply", "high availability"), &status).starts_with("unknown: node2 lost the primary role")
        );
        status.name = "node2".to_owned();
        let stayed = "failed: node2 is PRIMARY, again or still";
        assert_eq!(told(&begun("switchover", "high availability"), &status), stayed);
    }
}
