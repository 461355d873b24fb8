//! TELLS. What happened to this node and, on the PRIMARY, to the cluster: each thing is an [`Event`], which goes into a
//! file on every node, from the PRIMARY also into the replicated database, and to whoever wants to be notified.
//!
//! Must never hold anybody up: whoever records an event goes on at once, and a full queue or disk costs events, which
//! are counted, and nothing else.

mod certificates;
mod file;
pub mod notify;
mod observer;
mod recorder;
mod webhook;

use std::{collections::BTreeMap, fmt};

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::clock::unix_time_ms;

pub use file::{FILE, read};
pub use notify::Notifier;
pub use observer::record_changes;
pub use recorder::Recorder;
pub use webhook::check_url;

/// Longest sentence and longest text in a field, in bytes.
const MAX_TEXT: usize = 500;
/// Fields of one event.
const MAX_FIELDS: usize = 16;
/// Events in one answer, at most.
pub const MAX_PAGE: u32 = 400;

/// Declares an enumeration of words: the same in files, API and metrics.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        pub enum $name {
            $($(#[$doc])* #[serde(rename = $word)] $variant,)+
        }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The word for it.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                self.word()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.word())
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let known = Self::ALL.iter().copied().find(|known| known.word() == text);
                let all = || Self::ALL.iter().map(|known| known.word()).collect::<Vec<_>>().join(", ");
                known.ok_or_else(|| format!("{text:?} is none of: {}", all()))
            }
        }
    };
}

words! {
    /// What an event is about.
    Kind {
        /// A node has become PRIMARY and its ports are open.
        Takeover = "takeover",
        /// This node's role has changed.
        Role = "role",
        /// No PRIMARY is known, or one is known again.
        Primary = "primary",
        /// The state of another member has changed.
        Member = "member",
        /// Who belongs to the cluster.
        Membership = "membership",
        /// Automatic takeover was paused or resumed.
        Pause = "pause",
        /// A whole database was sent or installed.
        Snapshot = "snapshot",
        /// A disk is full, or has space again.
        Disk = "disk",
        /// Transactions that nobody acknowledged were dropped.
        Rollback = "rollback",
        /// A copy of the database is damaged.
        Damage = "damage",
        /// Something else that the status warns of.
        Warning = "warning",
        /// A backup or a restore.
        Backup = "backup",
        /// Certificates, the authority that signs them, and the key that protects it.
        Certificate = "certificate",
        /// What somebody did on this host while its audit could not be written.
        Audit = "audit",
        /// Defenders that are away for too long, are there again, or are removed.
        Defender = "defender",
        /// A test of the notifications.
        Test = "test",
    }
}

words! {
    /// How much an event matters.
    Severity {
        /// Good to know.
        Info = "info",
        /// Somebody should look.
        Warning = "warning",
        /// Somebody should look now.
        Critical = "critical",
    }
}

/// A word of a list that newer programs may have made longer: one that is not known is kept as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Word<T> {
    /// One of the list.
    Known(T),
    /// What a newer program says.
    Other(String),
}

impl<T: AsRef<str>> Word<T> {
    /// As it is written.
    pub fn word(&self) -> &str {
        match self {
            Self::Known(known) => known.as_ref(),
            Self::Other(word) => word,
        }
    }
}

impl<T> From<T> for Word<T> {
    fn from(known: T) -> Self {
        Self::Known(known)
    }
}

impl<T: PartialEq> PartialEq<T> for Word<T> {
    fn eq(&self, other: &T) -> bool {
        matches!(self, Self::Known(known) if known == other)
    }
}

/// Who has to hear of an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scope {
    /// Only the file of this node.
    #[default]
    Local,
    /// Nobody else knows: this node notifies, whatever its role.
    Node,
    /// All nodes see it: the PRIMARY notifies, and writes it into the history.
    Cluster,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Unlike that of any other, and in the order of time for the events of one node.
    pub id: String,
    pub time: Timestamp,
    /// Name of the node that recorded it.
    pub node: String,
    pub kind: Word<Kind>,
    /// One that is not known is as good as a warning.
    #[serde(deserialize_with = "severity")]
    pub severity: Severity,
    /// What happened, for people.
    pub sentence: String,
    /// What happened, for programs.
    #[serde(default)]
    pub fields: BTreeMap<String, Value>,
    #[serde(skip)]
    pub scope: Scope,
}

impl Event {
    /// Something that has happened just now. The [`Recorder`] adds the node.
    pub fn new(kind: Kind, severity: Severity, sentence: impl Into<String>) -> Self {
        let now = unix_time_ms() as i64;
        Self {
            id: format!("{now:012x}{:08x}", rand::random::<u32>()),
            time: Timestamp::from_millisecond(now).unwrap_or_default(),
            node: String::new(),
            kind: kind.into(),
            severity,
            sentence: shortened(sentence.into()),
            fields: BTreeMap::new(),
            scope: Scope::Local,
        }
    }

    /// Whom it concerns; without it only this node's file has it.
    #[must_use]
    pub fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Adds a field; the seventeenth and later ones are left out.
    #[must_use]
    pub fn field(mut self, name: &str, value: impl Into<Value>) -> Self {
        if self.fields.len() < MAX_FIELDS {
            let value = match value.into() {
                Value::String(text) => Value::String(shortened(text)),
                other => other,
            };
            self.fields.insert(name.to_owned(), value);
        }
        self
    }
}

fn severity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Severity, D::Error> {
    Ok(match Word::deserialize(deserializer)? {
        Word::Known(severity) => severity,
        Word::Other(_) => Severity::Warning,
    })
}

fn shortened(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_TEXT));
    text.retain(|c| !c.is_control());
    text
}

/// Which events are wanted, newest first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// At most so many, up to [`MAX_PAGE`]; 50 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 400))]
    pub limit: Option<u32>,
    /// Leave out so many of the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u32>,
    /// Instead of an offset: the `X-Next-Cursor` of the page before, or `first`. The answer comes as fast for the last
    /// page as for the first, and has no `X-Total-Count`. The events of one host have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    /// Only these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<Kind>,
    /// Only those at this time or later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
}

impl Wanted {
    /// How many, and behind how many.
    ///
    /// # Errors
    /// When none or too many are wanted: a sentence that says how many may be.
    pub fn page(&self) -> Result<(u32, u32), String> {
        let limit = self.limit.unwrap_or(50);
        if (1..=MAX_PAGE).contains(&limit) {
            Ok((limit, self.offset.unwrap_or(0)))
        } else {
            Err(format!("limit must be 1 to {MAX_PAGE}"))
        }
    }

    fn admits(&self, event: &Event) -> bool {
        self.kind.is_none_or(|kind| event.kind == kind) && self.since.is_none_or(|since| since <= event.time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_bounded_and_reads_as_it_was_written() {
        let mut event = Event::new(Kind::Backup, Severity::Info, format!("{}\n", "ä".repeat(400)));
        for number in 0..20 {
            event = event.field(&format!("f{number:02}"), "x".repeat(1000));
        }
        assert!(event.sentence.len() <= MAX_TEXT && event.fields.len() == MAX_FIELDS);
        let text = serde_json::to_string(&event).unwrap();
        assert!(text.len() < 10_000 && text.contains("\"kind\":\"backup\"") && text.contains("Z\""), "{text}");
        assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event);
    }

    #[test]
    fn words_are_read_back_and_others_refused() {
        for kind in Kind::ALL {
            assert_eq!(kind.word().parse(), Ok(*kind));
        }
        assert!("Takeover".parse::<Kind>().unwrap_err().contains("takeover, role"));
        assert!(Severity::Info < Severity::Warning && Severity::Warning < Severity::Critical);
    }

    #[test]
    fn what_a_newer_program_has_recorded_is_read_by_its_words() {
        let event = Event::new(Kind::Role, Severity::Info, "node2 sings");
        let mut value = serde_json::to_value(&event).unwrap();
        (value["kind"], value["severity"], value["later"]) = ("song".into(), "loud".into(), 1.into());
        let read: Event = serde_json::from_value(value).unwrap();
        assert_eq!(
            (read.kind.word(), read.severity, read.sentence.as_str()),
            ("song", Severity::Warning, "node2 sings")
        );
        assert!(read.kind != Kind::Role && event.kind == Kind::Role);
        let wanted = Wanted { kind: Some(Kind::Role), ..Wanted::default() };
        assert!(!wanted.admits(&read) && wanted.admits(&event) && Wanted::default().admits(&read));
        assert_eq!(serde_json::to_value(&read).unwrap()["kind"], "song");
    }

    #[test]
    fn a_page_has_a_limit() {
        let wanted = |limit| Wanted { limit, ..Wanted::default() }.page();
        assert_eq!((wanted(None), wanted(Some(400))), (Ok((50, 0)), Ok((400, 0))));
        assert!(wanted(Some(0)).is_err() && wanted(Some(401)).is_err());
    }
}
