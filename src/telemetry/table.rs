//! The one table of metrics: the name of each, what it is, what it tells, and its label. Whoever writes one names it by
//! a constant from here.

use metrics::{counter, histogram};

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
    /// One of the names below.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// What it tells, in one sentence.
    pub help: &'static str,
    /// Its label, if it has one, and the values of that, as far as they are known before.
    pub label: Option<(&'static str, &'static [&'static str])>,
}

impl Metric {
    /// So that it is there, and 0, before anything has happened: what is not there cannot be waited for.
    pub(super) fn begin(&self) {
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

/// Makes a constant of each name, and [`METRICS`] of all.
macro_rules! table {
    (@label) => { None };
    (@label $label:literal $values:expr) => { Some(($label, $values)) };
    ($($name:ident = $text:literal, $kind:ident $(by $label:literal $values:expr)?, $help:literal;)*) => {
        $(#[doc = $help] pub const $name: &str = $text;)*

        /// Every metric that this program writes.
        pub const METRICS: &[Metric] = &[
            $(Metric { name: $name, kind: Kind::$kind, help: $help, label: table!(@label $($label $values)?) },)*
        ];
    };
}

/// The roles as people see them; `node` has a test that these are all.
pub const ROLES: &[&str] = &[
    "WAITING",
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
/// The servers whose connections are counted.
const SERVERS: &[&str] = &["console", "console_http", "defender", "health", "peers", "service"];

table! {
    PRIMARY = "twistlock_primary", Gauge, "1 on the PRIMARY, 0 elsewhere.";
    EPOCH = "twistlock_epoch", Gauge, "The epoch in which this node is.";
    LEASE_REMAINING = "twistlock_lease_remaining_seconds", Gauge,
        "Seconds that are left of the lease of this node; 0 without one.";
    CERTIFICATE_EXPIRY = "twistlock_certificate_expiry_seconds", Gauge by "of" &["node", "console"],
        "Seconds until a certificate of this node expires, by what it is of.";
    APPLIED_INDEX = "twistlock_applied_index", Gauge,
        "Raft index up to which the database of this node has everything.";
    COMMIT_LATENCY = "twistlock_console_commit_seconds", Latency,
        "Seconds of one COMMIT of the Console, its replication included. Several writes may share it.";
    WRITES = "twistlock_console_writes_total", Counter,
        "Writes of the Console that are committed.";
    SYNC_LATENCY = "twistlock_raft_log_sync_seconds", Latency, "Seconds that one fsync of the raft log took.";
    ROLE_CHANGES = "twistlock_role_changes_total", Counter by "cause" &[],
        "Changes of the role of this node, by cause.";
    CHECKSUM_FAILURES = "twistlock_checksum_failures_total", Counter,
        "How often the checksum of the database was wrong.";
    ROLLBACK_ENTRIES = "twistlock_rollback_entries_total", Counter,
        "Entries of the raft log that another primary's entries have replaced.";
    ROLLBACK_TRANSACTIONS = "twistlock_rollback_transactions_total", Counter,
        "Transactions that were dropped unacknowledged and are kept in files.";
    DISK_FULL = "twistlock_disk_full", Gauge, "1 while the disk of this node is full.";
    PEER_DEATHS = "twistlock_peer_deaths_total", Counter,
        "Processes of other members that were proven dead by a refused connection.";
    PEER_DROPPED = "twistlock_peer_dropped_total", Counter by "class" &["bulk", "control"],
        "Messages that did not fit into the queue to a member, by class.";
    PEER_DATAGRAMS_DROPPED = "twistlock_peer_datagrams_dropped_total", Counter by "why" &["unknown", "forged", "repeated", "malformed"],
        "Datagrams to the high availability port that were of no use, by why.";
    PEER_DATAGRAMS_UNHEARD = "twistlock_peer_datagrams_unheard", Gauge by "member" &[],
        "1 while a member answers no datagram (UDP) of this node, else 0: it matters only when packets get lost.";
    SNAPSHOT_BYTES = "twistlock_snapshot_bytes_total", Counter by "direction" &["sent", "fetched"],
        "Bytes of databases that were sent or fetched, by direction.";
    SNAPSHOT_UNCHANGED = "twistlock_snapshot_unchanged_bytes_total", Counter by "direction" &["sent", "fetched"],
        "Bytes of databases that the receiver had already, so that they were not sent, by direction.";
    SNAPSHOT_LATENCY = "twistlock_snapshot_seconds", Latency by "direction" &["sent", "fetched"],
        "Seconds that one whole database took, by direction.";
    SNAPSHOT_FAILURES = "twistlock_snapshot_failures_total", Counter by "direction" &["sent", "fetched"],
        "Whole databases that could not be sent or fetched, by direction.";
    MEMORY_LOST = "twistlock_memory_lost", Gauge,
        "1 while this node lost some of its durable memory and does not count, else 0.";
    MEMORY_RESTORED = "twistlock_memory_restored_timestamp_seconds", Gauge,
        "When this node has begun again after that last, in seconds since 1970.";
    DAMAGE_FOUND = "twistlock_database_damage_timestamp_seconds", Gauge,
        "When the database of this node was last found damaged, in seconds since 1970.";
    BACKUP_LAST_SUCCESS = "twistlock_backup_last_success_timestamp_seconds", Gauge,
        "When the newest backup of this host was made, or else this process began, in seconds since 1970.";
    BACKUP_FAILURES = "twistlock_backup_failures_total", Counter, "Backups of this host that failed.";
    BACKUP_COPIED = "twistlock_backup_copies_complete_timestamp_seconds", Gauge,
        "When all backups of this host were at BACKUP_URL last, in seconds since 1970.";
    BACKUP_COPY_FAILURES = "twistlock_backup_copy_failures_total", Counter,
        "Attempts to copy backups of this host to BACKUP_URL that failed.";
    TAKEOVER = "twistlock_takeover_seconds", Latency,
        "Seconds from the last sign of the former PRIMARY to open ports on this node.";
    FAILOVERS = "twistlock_failovers_total", Counter by "reason" &["handed_over", "process_dead", "not_heard", "gave_up", "regained"],
        "Takeovers by this node, by the reason why the former PRIMARY was lost.";
    EVENTS = "twistlock_events_total", Counter by "severity" &["info", "warning", "critical"],
        "Events that this node recorded, by severity.";
    EVENTS_LOST = "twistlock_events_lost_total", Counter,
        "Events that could not be written to events.jsonl, or in time into the history.";
    AUDIT_ROWS_LOST = "twistlock_audit_rows_lost_total", Counter,
        "Rows that the audit lacks: no PRIMARY took them from this host in time.";
    RETENTION_ROWS = "twistlock_retention_rows_total", Counter by "table" &["audits", "events", "defender_events"],
        "Old rows that this node deleted because settings/retention keeps no more, by table.";
    NOTIFICATIONS = "twistlock_notifications_total", Counter by "result" &["sent", "failed", "dropped"],
        "Notifications by result: sent, failed (after retries) or dropped (queue full).";
    RAFT_LOG_OVERRUNS = "twistlock_raft_log_overruns_total", Counter,
        "How often the raft log was too long for a member that was away.";
    BUILD_INFO = "twistlock_build_info", Gauge by "version" &[], "Always 1; the version of this program is a label.";
    ROLE = "twistlock_role", Gauge by "role" ROLES, "1 for the role that this node has, 0 for all others.";
    COMMITTED_INDEX = "twistlock_committed_index", Gauge, "Raft index that this node knows to be committed.";
    WARNINGS = "twistlock_warnings", Gauge,
        "How many warnings the status of this node shows: twistcli ha status names them.";
    MEMBER_LAG = "twistlock_member_lag_entries", Gauge by "member" &[],
        "Raft entries that a member is behind, as seen from this node.";
    MEMBER_LAG_BYTES = "twistlock_member_lag_bytes", Gauge by "member" &[], "The same in bytes of the raft log.";
    MEMBER_UP = "twistlock_member_up", Gauge by "member" &[],
        "1 if this node has heard of a member within the last second.";
    MEMBER_CONTACT = "twistlock_member_last_contact_seconds", Gauge by "member" &[],
        "Seconds since this node has heard of a member.";
    RAFT_LOG_BYTES = "twistlock_raft_log_bytes", Gauge, "Bytes of the raft log on the disk of this node.";
    RAFT_LOG_ENTRIES = "twistlock_raft_log_entries", Gauge, "Entries in the raft log of this node.";
    DATABASE_BYTES = "twistlock_database_bytes", Gauge, "Bytes of the database as of its last checkpoint.";
    WAL_BYTES = "twistlock_wal_bytes", Gauge, "Bytes of the -wal file of the PRIMARY; 0 elsewhere.";
    CHECKPOINT_AGE = "twistlock_checkpoint_age_seconds", Gauge,
        "Seconds for which the last checkpoint has lacked something; 0 if it has all.";
    DISK_FREE = "twistlock_disk_free_bytes", Gauge, "Bytes that are free in the file system of the data folder.";
    DISK_TROUBLE = "twistlock_disk_trouble", Gauge,
        "How the disk of this node does: 0 good, 1 slow, 2 it fails or does not answer.";
    DISK_WAIT = "twistlock_disk_wait_seconds", Gauge,
        "Seconds for which the oldest file operation of this node has not come back.";
    DISK_FAILURES = "twistlock_disk_failures_total", Counter,
        "File operations of this node that failed, though not for want of space.";
    CONSOLE_CONNECTIONS = "twistlock_console_connections", Gauge, "Connections to the Console of this node.";
    SERVICE_UP = "twistlock_service_up", Gauge,
        "1 while the service beside the Console is ready on this node, else 0.";
    SERVICE_RESTARTS = "twistlock_service_restarts_total", Counter,
        "How often the service beside the Console was started again because it had failed.";
    SERVICE_CONNECTIONS = "twistlock_service_connections", Gauge,
        "Connections to the service beside the Console.";
    SERVICE_BYTES = "twistlock_service_bytes_total", Counter by "direction" &["in", "out"],
        "Bytes from clients to the service beside the Console, and from it to them, by direction.";
    SERVICE_UNREACHABLE = "twistlock_service_unreachable_total", Counter,
        "Connections of clients that were closed because the service did not accept one.";
    DEFENDERS = "twistlock_defenders_connected", Gauge, "Defenders that are connected to this node.";
    DEFENDERS_AWAY = "twistlock_defenders_away", Gauge,
        "Defenders without a connection for longer than settings/defenders permits, as the PRIMARY has found; 0 elsewhere.";
    DEFENDERS_REMOVED = "twistlock_defenders_removed_total", Counter,
        "Defenders that this node removed because they had been away for too long.";
    DEFENDER_EVENTS = "twistlock_defender_events_total", Counter,
        "Events that Defenders have sent to this node, those that were known included.";
    DEFENDER_BYTES = "twistlock_defender_bytes", Gauge by "way" &["read", "written"],
        "Bytes of what Defenders have sent and is not committed yet, and of what is on its way to them.";
    DEFENDERS_WAITING = "twistlock_defenders_waiting", Gauge by "way" &["read", "written"],
        "Defenders that are not read, or not told something long, until there is memory for it.";
    CONNECTIONS_REFUSED = "twistlock_connections_refused_total", Counter by "server" SERVERS,
        "Connections that were turned away because there were too many, in all or from their network, by server.";
    CONNECTIONS_ENDED = "twistlock_connections_ended_total", Counter by "server" SERVERS,
        "Connections without a request that were ended to make room for new ones, by server.";
    LOGINS_REFUSED = "twistlock_logins_refused_total", Counter by "why" &["wrong", "wait", "busy"],
        "Logins that were refused: wrong ones, those that had to wait after wrong ones, and those that were too many at once.";
    DESCRIPTORS_SHORT = "twistlock_descriptors_short_total", Counter,
        "How often a file of this node needed a descriptor that was held back, because none was left.";
    LOG_LINES_REPEATED = "twistlock_log_lines_repeated_total", Counter,
        "Lines that were counted instead of written to the log, because they said again what was there.";
    SCRUB_PROGRESS = "twistlock_scrub_progress_ratio", Gauge,
        "Share of the database file that the scrub under way has read; 1 after its end.";
    SCRUB_SUCCESS = "twistlock_scrub_last_success_timestamp_seconds", Gauge,
        "When a scrub has found nothing wrong last, or else this process began, in seconds since 1970.";
    SCRUB_FAILURES = "twistlock_scrub_failures_total", Counter, "Scrubs that found the database file damaged.";
    LOG_LINES_LOST = "twistlock_log_lines_lost_total", Counter,
        "Lines of the log that were dropped because whoever reads standard error was too slow.";
}

/// The table above as a page for people.
pub fn reference() -> String {
    let mut page = String::from(
        "# Metrics\n\nMade from the table in `src/telemetry/table.rs` by `UPDATE_EXPECT=1 cargo test --test telemetry`. They are \
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
