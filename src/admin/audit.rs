//! Who acts, and what is written down of it: the words of the audit, and the trait by which [`Admin`](super::Admin) has
//! them written. Must never know where that is, and never let an operation end without a word.

use std::{borrow::Cow, fmt, net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::runtime::Handle;

use super::{AdminError, BoxFuture};

/// Under what name a row keeps its ticket and outcome, among the fields of what is changed: no field has it.
pub const RECORD: &str = "record";
/// Where a row says that whoever acted was logged in on the host itself.
const LOCAL: &str = "local";

/// Whoever has something done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// Name of a user of the Console, or of the host's system for who comes through the control socket.
    pub name: String,
    /// Where the request came from: an address, or the host itself with the number of its user.
    pub source: String,
}

impl Actor {
    /// A user of the Console.
    pub fn user(name: &str, from: IpAddr) -> Self {
        Self { name: name.to_owned(), source: from.to_string() }
    }

    /// A user of the host `node`, by the control socket.
    pub fn local(name: &str, uid: u32, node: &str) -> Self {
        Self { name: name.to_owned(), source: format!("{LOCAL} on {node}, uid {uid}") }
    }

    /// A host that is no member yet.
    pub fn host(name: &str, from: IpAddr) -> Self {
        Self { name: format!("host {name}"), source: from.to_string() }
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source.starts_with(LOCAL) {
            true => write!(f, "{} ({})", self.name, self.source),
            false => f.write_str(&self.name),
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Act {
    /// A word, as "remove".
    pub action: Cow<'static, str>,
    /// The thing, as "member 'node3'".
    pub what: String,
    /// The details: `{"field": {"old": ..., "new": ...}}`, or null. Never a secret.
    pub difference: Value,
}

impl Act {
    /// Something without details.
    pub fn new(action: &'static str, what: impl Into<String>) -> Self {
        Self { action: action.into(), what: what.into(), difference: Value::Null }
    }

    /// With the details of what is wished.
    #[must_use]
    pub fn wish(self, wish: &impl Serialize) -> Self {
        Self { difference: difference(&Value::Null, wish), ..self }
    }

    /// With what is changed.
    #[must_use]
    pub fn change(self, old: &impl Serialize, new: &impl Serialize) -> Self {
        Self { difference: difference(old, new), ..self }
    }
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Done,
    /// Why not. Nothing was changed.
    Refused(String),
    /// It was begun, and not reached.
    Failed(String),
    /// Why nobody can say. It may have happened or not.
    Unknown(String),
}

impl Outcome {
    /// What a result means.
    pub fn of<T, E>(result: &Result<T, E>) -> Self
    where
        Self: for<'e> From<&'e E>,
    {
        match result {
            Ok(_) => Self::Done,
            Err(error) => error.into(),
        }
    }

    /// Whether it was done.
    pub fn is_done(&self) -> bool {
        *self == Self::Done
    }
}

impl From<&AdminError> for Outcome {
    fn from(error: &AdminError) -> Self {
        match error {
            AdminError::Unknown(why) => Self::Unknown(why.clone()),
            other => Self::Refused(other.to_string()),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Refused(why) => write!(f, "refused: {why}"),
            Self::Failed(why) => write!(f, "failed: {why}"),
            Self::Unknown(why) => write!(f, "unknown: {why}"),
        }
    }
}

/// Stands for an operation that was begun, in whatever the [`Audit`] writes to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ticket(pub String);

impl Ticket {
    const DIGITS: usize = 16;

    /// Unlike any other.
    pub fn new() -> Self {
        Self(format!("{:0width$x}", rand::random::<u64>(), width = Self::DIGITS))
    }

    /// Whether it can have been made by [`Self::new`]: one that comes from elsewhere need not.
    pub fn is_sound(&self) -> bool {
        self.0.len() == Self::DIGITS && self.0.bytes().all(|byte| byte.is_ascii_hexdigit())
    }
}

impl Default for Ticket {
    fn default() -> Self {
        Self::new()
    }
}

/// Writes down what is done. Neither step fails: what cannot be written where it belongs is kept, and written there
/// later.
pub trait Audit: Send + Sync {
    /// Before it is done.
    fn begin<'a>(&'a self, actor: &'a Actor, act: Act) -> BoxFuture<'a, Ticket>;

    /// When it is over.
    fn end(&self, ticket: Ticket, outcome: Outcome) -> BoxFuture<'_, ()>;
}

/// An operation that was begun and must [end](Self::end). If it does not, because whoever asked has gone away in the
/// middle, that is written down.
pub struct Record {
    audit: Arc<dyn Audit>,
    ticket: Option<Ticket>,
}

impl Record {
    /// Writes down that it begins.
    pub async fn begin(audit: &Arc<dyn Audit>, actor: &Actor, act: Act) -> Self {
        let (own, begins, actor) = (Arc::clone(audit), Arc::clone(audit), actor.clone());
        // A task of its own: if whoever waits for this goes away, the record is made all the same, and its end says so.
        let begun = tokio::spawn(async move {
            let ticket = begins.begin(&actor, act).await;
            Self { audit: begins, ticket: Some(ticket) }
        });
        match begun.await {
            Ok(record) => record,
            Err(error) => {
                tracing::error!("the beginning of an operation is not in the audit: {error}");
                Self { audit: own, ticket: None }
            }
        }
    }

    /// The operation's ticket.
    pub fn ticket(&self) -> Option<&Ticket> {
        self.ticket.as_ref()
    }

    /// Writes down how it ended.
    pub async fn end(mut self, outcome: Outcome) {
        if let Some(ticket) = self.ticket.take() {
            let audit = Arc::clone(&self.audit);
            // A task of its own: whoever waits for this may be gone by the time that it is written.
            let written = tokio::spawn(async move { audit.end(ticket, outcome).await });
            if let Err(error) = written.await {
                tracing::error!("the end of an operation is not in the audit: {error}");
            }
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // Without a runtime the process ends, and the row says "begun" until the next PRIMARY has looked at it.
        if let (Some(ticket), Ok(runtime)) = (self.ticket.take(), Handle::try_current()) {
            let audit = Arc::clone(&self.audit);
            let gone = Outcome::Unknown("whoever asked went away before the end: look at the status".to_owned());
            runtime.spawn(async move { audit.end(ticket, gone).await });
        }
    }
}

/// The fields in which two states of a thing differ: `{"field": {"old": ..., "new": ...}}`. Null stands for "did not
/// exist" and "does not exist any more".
pub fn difference(old: &impl Serialize, new: &impl Serialize) -> Value {
    let fields = |value: Value| match value {
        Value::Object(fields) => fields,
        Value::Null => Map::new(),
        other => Map::from_iter([("value".to_owned(), other)]),
    };
    // What cannot be written as JSON was not sent as JSON either.
    let old = fields(serde_json::to_value(old).unwrap_or_default());
    let new = fields(serde_json::to_value(new).unwrap_or_default());
    let mut changed = Map::new();
    for name in old.keys().chain(new.keys()) {
        let (before, after) = (old.get(name), new.get(name));
        if before != after {
            changed.insert(name.clone(), json!({ "old": before, "new": after }));
        }
    }
    Value::Object(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_recorded() {
        let old = json!({"a": 1, "b": 2});
        assert_eq!(difference(&old, &json!({"a": 1, "b": 3})), json!({"b": {"old": 2, "new": 3}}));
        assert_eq!(difference(&old, &old), json!({}));
        assert_eq!(difference(&Value::Null, &json!({"a": 1})), json!({"a": {"old": null, "new": 1}}));
        assert_eq!(difference(&"x", &"y"), json!({"value": {"old": "x", "new": "y"}}));
    }

    #[test]
    fn an_outcome_and_an_actor_are_told_in_words() {
        assert_eq!(Outcome::of(&Ok::<_, AdminError>(())).to_string(), "done");
        let refused = Outcome::from(&AdminError::NotPrimary { primary: Some("node2".to_owned()) });
        assert_eq!(refused.to_string(), "refused: only the PRIMARY does this: run it on node2");
        assert!(!refused.is_done() && Outcome::Done.is_done());
        assert_eq!(Actor::local("root", 0, "node1").to_string(), "root (local on node1, uid 0)");
        assert_eq!(Actor::user("ann", [192, 0, 2, 1].into()).to_string(), "ann");
    }

    /// Writes nothing before it is told to, and notes what ends.
    struct Slow(tokio::sync::Semaphore, tokio::sync::watch::Sender<Vec<Outcome>>);

    impl Audit for Slow {
        fn begin<'a>(&'a self, _: &'a Actor, _: Act) -> BoxFuture<'a, Ticket> {
            Box::pin(async { self.0.acquire().await.map(|_| Ticket::new()).unwrap() })
        }

        fn end(&self, _: Ticket, outcome: Outcome) -> BoxFuture<'_, ()> {
            self.1.send_modify(|ended| ended.push(outcome));
            Box::pin(async {})
        }
    }

    /// Else its row would say "begun" for ever, and a later PRIMARY would guess what became of it.
    #[tokio::test]
    async fn who_goes_away_before_the_row_is_written_leaves_an_end_too() {
        let (ended, mut seen) = tokio::sync::watch::channel(Vec::new());
        let slow = Arc::new(Slow(tokio::sync::Semaphore::new(0), ended));
        let audit: Arc<dyn Audit> = slow.clone();
        let actor = Actor::local("root", 0, "node1");
        let begin = Record::begin(&audit, &actor, Act::new("switchover", "high availability"));
        tokio::time::timeout(std::time::Duration::from_millis(1), begin).await.err().expect("it waits");
        slow.0.add_permits(1);
        let ended = seen.wait_for(|ended| !ended.is_empty()).await.unwrap();
        assert!(matches!(&ended[..], [Outcome::Unknown(why)] if why.contains("went away")), "{ended:?}");
    }
}
