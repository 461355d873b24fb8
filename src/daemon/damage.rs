//! Tells of damage: of this node's database, which an earlier process has found (that process begins again at once,
//! with another copy, before anybody has scraped its counters, and maybe before anybody was notified), and of files
//! that this start has mended. Must never keep a node from starting.

use std::{path::Path, time::Duration};

use tracing::warn;
use twistlock_ha::{
    events::{self, Event, Kind, Recorder, Scope, Severity, Wanted},
    heal::Notes,
    node::{Handle, Warning},
    storage::snapshot::Ready,
    telemetry::{DAMAGE_FOUND, note_now},
};

/// A copy that is replaced so soon after damage is replaced because of it.
const SOON: Duration = Duration::from_secs(3600);
/// How long the status says what was mended.
const SHOWN: Duration = Duration::from_secs(600);

/// When damage was last found here. The metrics go on from there.
pub(super) fn last(data: &Path) -> Option<Event> {
    let wanted = Wanted { kind: Some(Kind::Damage), limit: Some(events::MAX_PAGE), ..Wanted::default() };
    let found = events::read(data, &wanted).unwrap_or_else(|error| {
        warn!(%error, "the events of earlier processes cannot be read");
        Vec::new()
    });
    let last = found.into_iter().find(|event| event.severity == Severity::Critical)?;
    metrics::gauge!(DAMAGE_FOUND).set(last.time.as_second() as f64);
    Some(last)
}

/// The event that another copy of the database was put in place. Somebody has to hear of it if the one before was
/// damaged.
pub(super) fn replaced(name: &str, snapshot: &Ready, damage: Option<&Event>) -> Event {
    let index = snapshot.manifest().record.index;
    let now = Event::new(Kind::Snapshot, Severity::Info, "").time;
    let recent = damage.filter(|damage| now.duration_since(damage.time).unsigned_abs() < SOON);
    let event = match recent {
        None => {
            let sentence = format!("{name} installs the whole database as of raft index {index}, which was fetched");
            Event::new(Kind::Snapshot, Severity::Info, sentence)
        }
        Some(damage) => {
            let sentence = format!(
                "{name} has replaced its copy of the database, which was damaged, by one as of raft index {index}: check its \
                 disk and memory ({})",
                damage.sentence
            );
            Event::new(Kind::Damage, Severity::Warning, sentence).scope(Scope::Node)
        }
    };
    event.field("index", index)
}

/// Tells history and status what was mended at this start.
pub(super) async fn tell_mended(notes: Notes, events: Recorder, handle: Handle) {
    if notes.sentences().is_empty() {
        return;
    }
    note_now(DAMAGE_FOUND);
    for sentence in notes.sentences() {
        events.record(Event::new(Kind::Damage, Severity::Warning, sentence.clone()).scope(Scope::Node));
    }
    let text = format!(
        "{}; check the disk of this host (this warning ends by itself {} min after the start)",
        notes.sentences().join("; "),
        SHOWN.as_secs() / 60
    );
    handle.warn(Warning::Mended, Some(text));
    tokio::time::sleep(SHOWN).await;
    handle.warn(Warning::Mended, None);
}
