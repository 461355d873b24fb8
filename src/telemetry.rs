//! Log lines to standard error, and the numbers for Prometheus: owns the one table of metric names.
//! Must never open a port, must never depend on another module of ours but the clock, and never makes whoever logs wait for a reader.

mod lines;
mod repeats;

use std::{
    collections::VecDeque,
    fmt::{self as text, Write},
    io::IsTerminal,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
    time::Duration,
};

pub use lines::flush;

use anyhow::{Context, Result};
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use schemars::JsonSchema;
use serde::Serialize;
use tracing::{Event, Level, Subscriber, field};
use tracing_subscriber::{
    EnvFilter, Layer, Registry, fmt,
    layer::{Context as LayerContext, SubscriberExt},
    registry,
    reload::{self, Handle},
    util::SubscriberInitExt,
};

use crate::clock::{since_1970, unix_time_ms};

/// What lets the filter of the running log be exchanged; empty before [`init`].
static FILTER: OnceLock<Handle<EnvFilter, Registry>> = OnceLock::new();

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One line of text for a reader; colour only on a terminal.
    Human,
    /// One JSON object a line.
    Json,
}

/// Sends the process's log lines to standard error, from now on: through a bounded queue, and nobody waits for its other end.
/// [`flush`] belongs before each end of the process.
///
/// Under systemd (`JOURNAL_STREAM` is set) lines carry no time and no colour: the receiver adds its own time. Libraries
/// speak only when they are one step more severe than `level`.
///
/// # Errors
/// When it was called before.
pub fn init(format: Format, level: Level) -> Result<()> {
    let received = std::env::var_os("JOURNAL_STREAM").is_some();
    let colour = !received && std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = fmt::layer().with_writer(lines::start().context("start the log")?).with_ansi(colour);
    let (filter, handle) = reload::Layer::new(EnvFilter::try_new(filter(level)).context("build the log filter")?);
    let log = registry().with(filter).with(repeats::Repeats).with(Recent);
    match (format, received) {
        (Format::Human, true) => log.with(lines.compact().without_time()).try_init(),
        (Format::Human, false) => log.with(lines.compact()).try_init(),
        (Format::Json, true) => log.with(lines.json().flatten_event(true).without_time()).try_init(),
        (Format::Json, false) => log.with(lines.json().flatten_event(true)).try_init(),
    }
    .context("start the log")?;
    // Only one call gets here: the log can be started once.
    let _ = FILTER.set(handle);
    Ok(())
}

/// Lines of the log that are kept in memory.
pub const RECENT_LINES: usize = 2000;
/// Longest text of a line that is kept, in bytes; the rest is cut.
const RECENT_TEXT: usize = 2048;
/// Held for moments only: the consensus loop logs, too.
static RECENT: Mutex<VecDeque<Arc<Line>>> = Mutex::new(VecDeque::new());

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Line {
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// `ERROR`, `WARN`, `INFO`, `DEBUG` or `TRACE`.
    pub level: String,
    /// The message and its fields, without line breaks.
    pub text: String,
}

/// The last lines of this process's log, the oldest first.
pub fn recent(lines: usize) -> Vec<Line> {
    let recent = RECENT.lock().unwrap_or_else(PoisonError::into_inner);
    let last: Vec<_> = recent.iter().skip(recent.len().saturating_sub(lines)).cloned().collect();
    drop(recent);
    last.iter().map(|line| Line::clone(line)).collect()
}

/// Keeps the last lines in memory, for whoever cannot read the host's log.
struct Recent;

impl<S: Subscriber> Layer<S> for Recent {
    fn on_event(&self, event: &Event<'_>, _: LayerContext<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let line = Line { time_ms: unix_time_ms(), level: event.metadata().level().to_string(), text: text.finish() };
        let mut recent = RECENT.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.len() >= RECENT_LINES {
            recent.pop_front();
        }
        recent.push_back(Arc::new(line));
    }
}

/// The message of an event, and its fields.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Text {
    fn finish(self) -> String {
        let mut line = String::new();
        // A line stays one line, whatever somebody put into a name.
        for c in self.message.chars().chain(self.fields.chars()) {
            if line.len() >= RECENT_TEXT {
                break;
            }
            if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
        }
        line
    }

    fn add(&mut self, field: &field::Field, value: text::Arguments<'_>) {
        let written = if field.name() == "message" {
            self.message.write_fmt(value)
        } else {
            write!(self.fields, " {}={value}", field.name())
        };
        // A String takes everything; a value that cannot be formatted is left out.
        written.unwrap_or_default();
    }
}

impl field::Visit for Text {
    fn record_str(&mut self, field: &field::Field, value: &str) {
        self.add(field, format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &field::Field, value: &dyn text::Debug) {
        self.add(field, format_args!("{value:?}"));
    }
}

/// Exchanges the level of the running log. Does nothing before [`init`].
pub fn set_level(level: Level) {
    let filter = EnvFilter::try_new(filter(level)).ok();
    if let (Some(handle), Some(filter)) = (FILTER.get(), filter)
        && let Err(error) = handle.reload(filter)
    {
        tracing::error!(%error, "the level of the log stays as it was");
    }
}

fn filter(level: Level) -> String {
    let libraries = match level {
        Level::ERROR => Level::ERROR,
        Level::WARN | Level::INFO => Level::WARN,
        Level::DEBUG => Level::INFO,
        _ => Level::DEBUG,
    };
    format!("{libraries},twistlock_ha={level},twistlockd={level},twistcli={level}")
}

/// Gauge: 1 on the PRIMARY, 0 elsewhere.
pub const PRIMARY: &str = "twistlock_primary";
/// Gauge: the epoch in which this node is.
pub const EPOCH: &str = "twistlock_epoch";
/// Gauge, seconds: what is left of the lease; 0 on a node without one.
pub const LEASE_REMAINING: &str = "twistlock_lease_remaining_seconds";
/// Gauge, seconds: until the certificate of this node (label `of`: node or console) expires.
pub const CERTIFICATE_EXPIRY: &str = "twistlock_certificate_expiry_seconds";
/// Gauge: raft index up to which the database has everything, here.
pub const APPLIED_INDEX: &str = "twistlock_applied_index";
/// Histogram, seconds: one write transaction of the Console, the majority's answer included.
pub const COMMIT_LATENCY: &str = "twistlock_console_commit_seconds";
/// Histogram, seconds: one fsync of the raft log.
pub const SYNC_LATENCY: &str = "twistlock_raft_log_sync_seconds";
/// Counter, label `cause`: changes of this node's role.
pub const ROLE_CHANGES: &str = "twistlock_role_changes_total";
/// Counter: how often the database's checksum was not what the primary said.
pub const CHECKSUM_FAILURES: &str = "twistlock_checksum_failures_total";
/// Counter: entries of the raft log that another primary's entries have replaced.
pub const ROLLBACK_ENTRIES: &str = "twistlock_rollback_entries_total";
/// Counter: transactions among them that are kept in files.
pub const ROLLBACK_TRANSACTIONS: &str = "twistlock_rollback_transactions_total";
/// Gauge: 1 while the disk of this node is full.
pub const DISK_FULL: &str = "twistlock_disk_full";
/// Gauge: how the disk of this node does: 0 good, 1 slow, 2 it fails or does not answer.
pub const DISK_TROUBLE: &str = "twistlock_disk_trouble";
/// Gauge, seconds: for how long the oldest file operation has not come back.
pub const DISK_WAIT: &str = "twistlock_disk_wait_seconds";
/// Counter: file operations that failed, though not for want of space.
pub const DISK_FAILURES: &str = "twistlock_disk_failures_total";
/// Counter: processes of other members that were proven dead by a refused connection.
pub const PEER_DEATHS: &str = "twistlock_peer_deaths_total";
/// Counter, label `class`: messages that did not fit into the queue to a member.
pub const PEER_DROPPED: &str = "twistlock_peer_dropped_total";
/// Counter, label `why`: datagrams on the HA port's number that were of no use.
pub const PEER_DATAGRAMS_DROPPED: &str = "twistlock_peer_datagrams_dropped_total";
/// Gauge, label `member`: 1 while none of this node's datagrams is answered by a member that takes them.
pub const PEER_DATAGRAMS_UNHEARD: &str = "twistlock_peer_datagrams_unheard";
/// Counter, label `direction`: bytes of databases that were sent to other nodes or fetched from them.
pub const SNAPSHOT_BYTES: &str = "twistlock_snapshot_bytes_total";
/// Histogram, seconds, label `direction`: one whole database, sent or fetched.
pub const SNAPSHOT_LATENCY: &str = "twistlock_snapshot_seconds";
/// Counter, label `direction`: whole databases that could not be sent or fetched to their end.
pub const SNAPSHOT_FAILURES: &str = "twistlock_snapshot_failures_total";
/// Counter: how often the raft log has become too long to be kept for a member that is away.
pub const RAFT_LOG_OVERRUNS: &str = "twistlock_raft_log_overruns_total";
/// Gauge: 1 while this node takes part in nothing because it lost some of its durable memory.
pub const MEMORY_LOST: &str = "twistlock_memory_lost";
/// Gauge, seconds since 1970: when this process began again after that.
pub const MEMORY_RESTORED: &str = "twistlock_memory_restored_timestamp_seconds";
/// Gauge, seconds since 1970: when damage of this node's database was found last, by this process or an earlier one.
pub const DAMAGE_FOUND: &str = "twistlock_database_damage_timestamp_seconds";
/// Gauge, seconds since 1970: when the newest backup of this host was made.
pub const BACKUP_LAST_SUCCESS: &str = "twistlock_backup_last_success_timestamp_seconds";
/// Counter: backups of this host that failed.
pub const BACKUP_FAILURES: &str = "twistlock_backup_failures_total";
/// Gauge, seconds since 1970: when all backups of this host were at `BACKUP_URL` last.
pub const BACKUP_COPIED: &str = "twistlock_backup_copies_complete_timestamp_seconds";
/// Counter: attempts to copy backups of this host to `BACKUP_URL` that failed.
pub const BACKUP_COPY_FAILURES: &str = "twistlock_backup_copy_failures_total";

/// Histogram, seconds: from the last sign of the primary before to open ports, on the node that took over.
pub const TAKEOVER: &str = "twistlock_takeover_seconds";
/// Counter, label `reason`: takeovers by this node.
pub const FAILOVERS: &str = "twistlock_failovers_total";
/// Counter, label `severity`: events that this node recorded.
pub const EVENTS: &str = "twistlock_events_total";
/// Counter: events that could not be written to the file.
pub const EVENTS_LOST: &str = "twistlock_events_lost_total";
/// Counter: rows of the audit that no PRIMARY took before too many others waited.
pub const AUDIT_ROWS_LOST: &str = "twistlock_audit_rows_lost_total";
/// Counter, label `result`: notifications that were sent, failed for good, or dropped from a full queue.
pub const NOTIFICATIONS: &str = "twistlock_notifications_total";
/// Gauge, label `version`: always 1.
pub const BUILD_INFO: &str = "twistlock_build_info";
/// Gauge, label `role`: 1 for the role of this node, 0 for the others.
pub const ROLE: &str = "twistlock_role";
/// The roles as people see them; `node` has a test that these are all.
pub const ROLES: &[&str] = &[
    "REQUEST_JOIN",
    "STARTUP",
    "STARTUP2",
    "RECOVERING",
    "SECONDARY",
    "PRIMARY",
    "ROLLBACK",
    "DOWN",
    "UNKNOWN",
    "REMOVED",
];
/// Gauge: raft index that is known to be committed, here.
pub const COMMITTED_INDEX: &str = "twistlock_committed_index";
/// Gauge: sentences in which the status says that something is wrong.
pub const WARNINGS: &str = "twistlock_warnings";
/// Gauge, label `member`: entries that it is behind.
pub const MEMBER_LAG: &str = "twistlock_member_lag_entries";
/// Gauge, label `member`: the same in bytes of the raft log.
pub const MEMBER_LAG_BYTES: &str = "twistlock_member_lag_bytes";
/// Gauge, label `member`: 1 if it was heard of lately.
pub const MEMBER_UP: &str = "twistlock_member_up";
/// Gauge, label `member`, seconds: since it was heard of last.
pub const MEMBER_CONTACT: &str = "twistlock_member_last_contact_seconds";
/// Gauge: bytes of the raft log on disk.
pub const RAFT_LOG_BYTES: &str = "twistlock_raft_log_bytes";
/// Gauge: entries in the raft log.
pub const RAFT_LOG_ENTRIES: &str = "twistlock_raft_log_entries";
/// Gauge: bytes of the database as of its last checkpoint.
pub const DATABASE_BYTES: &str = "twistlock_database_bytes";
/// Gauge: bytes of the `-wal` file; 0 on a secondary.
pub const WAL_BYTES: &str = "twistlock_wal_bytes";
/// Gauge, seconds: for how long the last checkpoint has lacked something.
pub const CHECKPOINT_AGE: &str = "twistlock_checkpoint_age_seconds";
/// Gauge: bytes that are free in the file system of the data folder.
pub const DISK_FREE: &str = "twistlock_disk_free_bytes";
/// Gauge: connections to the Console.
pub const CONSOLE_CONNECTIONS: &str = "twistlock_console_connections";
/// The servers whose connections are counted.
const SERVERS: &[&str] = &["console", "console_http", "defender", "health", "peers"];
/// Counter: connections that were turned away, by server.
pub const CONNECTIONS_REFUSED: &str = "twistlock_connections_refused_total";
/// Counter: connections that were ended to make room for others, by server.
pub const CONNECTIONS_ENDED: &str = "twistlock_connections_ended_total";
/// Counter: logins that were refused, by why: the password was wrong, too many were wrong before, or too many came at once.
pub const LOGINS_REFUSED: &str = "twistlock_logins_refused_total";
/// Counter: files that could be opened only because a descriptor was held for them.
pub const DESCRIPTORS_SHORT: &str = "twistlock_descriptors_short_total";
/// Counter: lines that were not written to the log because they said again what was there.
pub const LOG_LINES_REPEATED: &str = "twistlock_log_lines_repeated_total";
/// Gauge: share of the database file that the scrub under way has read, or 1.
pub const SCRUB_PROGRESS: &str = "twistlock_scrub_progress_ratio";
/// Gauge: when a scrub has found nothing wrong last, in seconds since 1970.
pub const SCRUB_SUCCESS: &str = "twistlock_scrub_last_success_timestamp_seconds";
/// Counter: scrubs that found the database file damaged.
pub const SCRUB_FAILURES: &str = "twistlock_scrub_failures_total";

/// Counter: lines of the log that whoever reads standard error was too slow for.
pub const LOG_LINES_LOST: &str = "twistlock_log_lines_lost_total";

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Goes up only.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution of seconds.
    Latency,
}

/// One metric as it is described to whoever collects it.
#[derive(Debug)]
pub struct Metric {
    /// One of the names above.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// What it tells, in one sentence.
    pub help: &'static str,
    /// Its label, if it has one, and the values of that, as far as they are known before.
    pub label: Option<(&'static str, &'static [&'static str])>,
}

impl Metric {
    const fn by(self, label: &'static str, values: &'static [&'static str]) -> Self {
        Self { label: Some((label, values)), ..self }
    }

    /// So that it is there, and 0, before anything has happened: what is not there cannot be waited for.
    fn begin(&self) {
        let labels = |value: Option<&'static str>| match (self.label, value) {
            (Some((label, _)), Some(value)) => vec![metrics::Label::new(label, value)],
            _ => Vec::new(),
        };
        let values: Vec<_> = match self.label {
            None => vec![None],
            Some((_, values)) => values.iter().copied().map(Some).collect(),
        };
        for value in values {
            match self.kind {
                Kind::Counter => counter!(self.name, labels(value)).increment(0),
                Kind::Latency => drop(histogram!(self.name, labels(value))),
                // A value that nobody has measured would be wrong.
                Kind::Gauge => {}
            }
        }
    }
}

const fn metric(name: &'static str, kind: Kind, help: &'static str) -> Metric {
    Metric { name, kind, help, label: None }
}

/// Every metric that this program writes.
pub const METRICS: &[Metric] = &[
    metric(PRIMARY, Kind::Gauge, "1 on the PRIMARY, 0 elsewhere."),
    metric(EPOCH, Kind::Gauge, "The epoch in which this node is."),
    metric(LEASE_REMAINING, Kind::Gauge, "Seconds that are left of the lease of this node; 0 without one."),
    metric(CERTIFICATE_EXPIRY, Kind::Gauge, "Seconds until a certificate of this node expires, by what it is of.")
        .by("of", &["node", "console"]),
    metric(APPLIED_INDEX, Kind::Gauge, "Raft index up to which the database of this node has everything."),
    metric(COMMIT_LATENCY, Kind::Latency, "Seconds of one write transaction of the Console, its replication included."),
    metric(SYNC_LATENCY, Kind::Latency, "Seconds that one fsync of the raft log took."),
    metric(ROLE_CHANGES, Kind::Counter, "Changes of the role of this node, by cause.").by("cause", &[]),
    metric(CHECKSUM_FAILURES, Kind::Counter, "How often the checksum of the database was wrong."),
    metric(ROLLBACK_ENTRIES, Kind::Counter, "Entries of the raft log that another primary's entries have replaced."),
    metric(
        ROLLBACK_TRANSACTIONS,
        Kind::Counter,
        "Transactions that were dropped unacknowledged and are kept in files.",
    ),
    metric(DISK_FULL, Kind::Gauge, "1 while the disk of this node is full."),
    metric(PEER_DEATHS, Kind::Counter, "Processes of other members that were proven dead by a refused connection."),
    metric(PEER_DROPPED, Kind::Counter, "Messages that did not fit into the queue to a member, by class.")
        .by("class", &["bulk", "control"]),
    metric(PEER_DATAGRAMS_DROPPED, Kind::Counter, "Datagrams to the high availability port that were of no use, by why.")
        .by("why", &["unknown", "forged", "repeated", "malformed"]),
    metric(
        PEER_DATAGRAMS_UNHEARD,
        Kind::Gauge,
        "1 while a member answers no datagram (UDP) of this node, else 0: it matters only when packets get lost.",
    )
    .by("member", &[]),
    metric(SNAPSHOT_BYTES, Kind::Counter, "Bytes of whole databases that were sent or fetched, by direction.")
        .by("direction", &["sent", "fetched"]),
    metric(SNAPSHOT_LATENCY, Kind::Latency, "Seconds that one whole database took, by direction.")
        .by("direction", &["sent", "fetched"]),
    metric(SNAPSHOT_FAILURES, Kind::Counter, "Whole databases that could not be sent or fetched, by direction.")
        .by("direction", &["sent", "fetched"]),
    metric(MEMORY_LOST, Kind::Gauge, "1 while this node lost some of its durable memory and does not count, else 0."),
    metric(MEMORY_RESTORED, Kind::Gauge, "When this node has begun again after that last, in seconds since 1970."),
    metric(DAMAGE_FOUND, Kind::Gauge, "When the database of this node was last found damaged, in seconds since 1970."),
    metric(
        BACKUP_LAST_SUCCESS,
        Kind::Gauge,
        "When the newest backup of this host was made, or else this process began, in seconds since 1970.",
    ),
    metric(BACKUP_FAILURES, Kind::Counter, "Backups of this host that failed."),
    metric(BACKUP_COPIED, Kind::Gauge, "When all backups of this host were at BACKUP_URL last, in seconds since 1970."),
    metric(BACKUP_COPY_FAILURES, Kind::Counter, "Attempts to copy backups of this host to BACKUP_URL that failed."),
    metric(TAKEOVER, Kind::Latency, "Seconds from the last sign of the former PRIMARY to open ports on this node."),
    metric(FAILOVERS, Kind::Counter, "Takeovers by this node, by the reason why the former PRIMARY was lost.")
        .by("reason", &["handed_over", "process_dead", "not_heard", "gave_up", "regained"]),
    metric(EVENTS, Kind::Counter, "Events that this node recorded, by severity.")
        .by("severity", &["info", "warning", "critical"]),
    metric(
        EVENTS_LOST,
        Kind::Counter,
        "Events that could not be written to events.jsonl, or in time into the history.",
    ),
    metric(AUDIT_ROWS_LOST, Kind::Counter, "Rows that the audit lacks: no PRIMARY took them from this host in time."),
    metric(
        NOTIFICATIONS,
        Kind::Counter,
        "Notifications by result: sent, failed (after retries) or dropped (queue full).",
    )
    .by("result", &["sent", "failed", "dropped"]),
    metric(RAFT_LOG_OVERRUNS, Kind::Counter, "How often the raft log was too long for a member that was away."),
    metric(BUILD_INFO, Kind::Gauge, "Always 1; the version of this program is a label.").by("version", &[]),
    metric(ROLE, Kind::Gauge, "1 for the role that this node has, 0 for all others.").by("role", ROLES),
    metric(COMMITTED_INDEX, Kind::Gauge, "Raft index that this node knows to be committed."),
    metric(WARNINGS, Kind::Gauge, "How many warnings the status of this node shows: twistcli ha status names them."),
    metric(MEMBER_LAG, Kind::Gauge, "Raft entries that a member is behind, as seen from this node.").by("member", &[]),
    metric(MEMBER_LAG_BYTES, Kind::Gauge, "The same in bytes of the raft log.").by("member", &[]),
    metric(MEMBER_UP, Kind::Gauge, "1 if this node has heard of a member within the last second.").by("member", &[]),
    metric(MEMBER_CONTACT, Kind::Gauge, "Seconds since this node has heard of a member.").by("member", &[]),
    metric(RAFT_LOG_BYTES, Kind::Gauge, "Bytes of the raft log on the disk of this node."),
    metric(RAFT_LOG_ENTRIES, Kind::Gauge, "Entries in the raft log of this node."),
    metric(DATABASE_BYTES, Kind::Gauge, "Bytes of the database as of its last checkpoint."),
    metric(WAL_BYTES, Kind::Gauge, "Bytes of the -wal file of the PRIMARY; 0 elsewhere."),
    metric(CHECKPOINT_AGE, Kind::Gauge, "Seconds for which the last checkpoint has lacked something; 0 if it has all."),
    metric(DISK_FREE, Kind::Gauge, "Bytes that are free in the file system of the data folder."),
    metric(DISK_TROUBLE, Kind::Gauge, "How the disk of this node does: 0 good, 1 slow, 2 it fails or does not answer."),
    metric(DISK_WAIT, Kind::Gauge, "Seconds for which the oldest file operation of this node has not come back."),
    metric(DISK_FAILURES, Kind::Counter, "File operations of this node that failed, though not for want of space."),
    metric(CONSOLE_CONNECTIONS, Kind::Gauge, "Connections to the Console of this node."),
    metric(
        CONNECTIONS_REFUSED,
        Kind::Counter,
        "Connections that were turned away because there were too many, in all or from their network, by server.",
    )
    .by("server", SERVERS),
    metric(
        CONNECTIONS_ENDED,
        Kind::Counter,
        "Connections without a request that were ended to make room for new ones, by server.",
    )
    .by("server", SERVERS),
    metric(
        LOGINS_REFUSED,
        Kind::Counter,
        "Logins that were refused: wrong ones, those that had to wait after wrong ones, and those that were too many at once.",
    )
    .by("why", &["wrong", "wait", "busy"]),
    metric(
        DESCRIPTORS_SHORT,
        Kind::Counter,
        "How often a file of this node needed a descriptor that was held back, because none was left.",
    ),
    metric(
        LOG_LINES_REPEATED,
        Kind::Counter,
        "Lines that were counted instead of written to the log, because they said again what was there.",
    ),
    metric(
        SCRUB_PROGRESS,
        Kind::Gauge,
        "Share of the database file that the scrub under way has read; 1 after its end.",
    ),
    metric(
        SCRUB_SUCCESS,
        Kind::Gauge,
        "When a scrub has found nothing wrong last, or else this process began, in seconds since 1970.",
    ),
    metric(SCRUB_FAILURES, Kind::Counter, "Scrubs that found the database file damaged."),
    metric(
        LOG_LINES_LOST,
        Kind::Counter,
        "Lines of the log that were dropped because whoever reads standard error was too slow.",
    ),
];

/// The table above as a page for people.
pub fn reference() -> String {
    let mut page = String::from(
        "# Metrics\n\nMade from the table in `src/telemetry.rs` by `UPDATE_EXPECT=1 cargo test --test telemetry`. They are \
         at `/metrics` of the Console\n(with `METRICS_TOKEN` or a login) and of the health port of every member \
         (`HEALTH_PORT`,\nwhere `HEALTH_ALLOW` or the token lets a reader in).\n\n| name | type | label | meaning |\n|---|---|---|---|\n",
    );
    for Metric { name, kind, help, label } in METRICS {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Latency => "histogram",
        };
        let label = match label {
            None => String::new(),
            Some((label, [])) => format!("`{label}`"),
            Some((label, values)) => format!("`{label}`: {}", values.join(", ")),
        };
        page.push_str(&format!("| `{name}` | {kind} | {label} | {help} |\n"));
    }
    page
}

/// Upper bounds of the latency histograms, in seconds: from a fast disk to one that is in trouble.
const BUCKETS: &[f64] =
    &[0.000_1, 0.000_25, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// How often samples that nobody has collected are folded into their histograms, so that they cannot pile up.
const UPKEEP: Duration = Duration::from_secs(5);

/// The process's metrics: `render()` gives the text that Prometheus reads. The first call starts the collection.
///
/// # Errors
/// When another recorder is installed already, or no thread can be started.
pub fn metrics_handle() -> Result<PrometheusHandle> {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    if let Some(handle) = HANDLE.get() {
        return Ok(handle.clone());
    }
    let mut builder = PrometheusBuilder::new();
    for metric in METRICS.iter().filter(|metric| metric.kind == Kind::Latency) {
        let matcher = Matcher::Full(metric.name.to_owned());
        builder = builder.set_buckets_for_metric(matcher, BUCKETS).context("set histogram buckets")?;
    }
    let handle = builder.install_recorder().context("install the metrics recorder")?;
    for Metric { name, kind, help, .. } in METRICS {
        match kind {
            Kind::Counter => describe_counter!(*name, *help),
            Kind::Gauge => describe_gauge!(*name, *help),
            Kind::Latency => describe_histogram!(*name, Unit::Seconds, *help),
        }
    }
    METRICS.iter().for_each(Metric::begin);
    let upkeep = handle.clone();
    let run = move || {
        loop {
            thread::sleep(UPKEEP);
            upkeep.run_upkeep();
            repeats::tell();
        }
    };
    thread::Builder::new().name("metrics".to_owned()).spawn(run).context("start the metrics thread")?;
    Ok(HANDLE.get_or_init(|| handle).clone())
}

/// Sets a gauge that is a time to the present, in seconds since 1970.
pub fn note_now(gauge: &'static str) {
    gauge!(gauge).set(since_1970().as_secs_f64());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_one_step_quieter() {
        assert_eq!(filter(Level::INFO), "WARN,twistlock_ha=INFO,twistlockd=INFO,twistcli=INFO");
        for level in [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE] {
            EnvFilter::try_new(filter(level)).unwrap();
        }
    }

    #[test]
    fn the_last_lines_are_kept_and_stay_lines() {
        let subscriber = registry().with(Recent);
        tracing::subscriber::with_default(subscriber, || {
            for number in 0..RECENT_LINES + 5 {
                tracing::info!(number, "counted");
            }
            tracing::warn!(name = "a\nb", long = "x".repeat(RECENT_TEXT * 2), "odd");
        });
        let lines = recent(usize::MAX);
        assert_eq!(lines.len(), RECENT_LINES);
        let last = &recent(1)[0];
        assert!(last.text.starts_with("odd name=a\\nb long=xxx") && last.text.len() == RECENT_TEXT, "{}", last.text);
        assert_eq!((&*last.level, &*recent(2)[0].text), ("WARN", &*format!("counted number={}", RECENT_LINES + 4)));
    }

    #[test]
    fn metrics_are_described_and_rendered() {
        let handle = metrics_handle().unwrap();
        metrics::counter!(ROLE_CHANGES, "cause" => "test").increment(1);
        metrics::histogram!(COMMIT_LATENCY).record(0.000_3);
        let text = metrics_handle().unwrap().render();
        assert!(text.contains("twistlock_role_changes_total{cause=\"test\"} 1"), "{text}");
        assert!(text.contains("twistlock_console_commit_seconds_bucket{le=\"0.0005\"} 1"), "{text}");
        assert!(text.contains("# HELP twistlock_role_changes_total Changes"), "{text}");
        drop(handle);
    }
}
