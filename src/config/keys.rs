//! The one table of keys: parser, defaults, messages and `twistlock.cfg.example` all come from it. Holds no logic.

use std::{ops::RangeInclusive, time::Duration};

use super::{
    Config,
    value::{Slot, Unit},
};

/// The line by which the original sets `CONSOLE_CN`. It is the only command substitution that is understood, and it is
/// understood as these very characters: nothing is run.
pub(super) const HOST_NAME_LINE: &str =
    "CONSOLE_CN=$(hostname --fqdn 2>/dev/null); if [[ $? == 1 ]]; then CONSOLE_CN=$(hostname); fi";
/// The key that [`HOST_NAME_LINE`] sets.
pub(super) const CONSOLE_CN: &str = "CONSOLE_CN";

/// The key of the port whose default gives way to other services.
pub(super) const HEALTH_PORT: &str = "HEALTH_PORT";
/// The key that decides who is answered there.
pub(super) const HEALTH_ALLOW: &str = "HEALTH_ALLOW";

/// Keys of the original that mean nothing here. They are skipped, with one line of information for all of them.
pub(super) const IGNORED: &[&str] = &["DEFENDER_CN", "DEFENDER_LISTENER_TYPE", "READ_ONLY_FS", "SELINUX"];
/// The beginnings of further such keys.
pub(super) const IGNORED_FAMILIES: &[&str] = &["DOCKER_", "SCAP_", "SELINUX_", "KUBERNETES_", "OPENSHIFT_"];

/// The longest lease that `LEASE_MS` may ask for.
pub const LONGEST_LEASE: Duration = Duration::from_secs(60);

/// One key of `twistlock.cfg`.
pub struct Key {
    /// What stands left of the `=`.
    pub name: &'static str,
    /// Title of the banner under which the key stands.
    pub section: &'static str,
    /// Title of the group inside the section.
    pub group: &'static str,
    /// Its value when no line sets it.
    pub default: &'static str,
    /// What it means, in lines that fit behind a `# `.
    pub doc: &'static [&'static str],
    slot: fn(&mut Config) -> Slot<'_>,
}

impl Key {
    /// The place of this key's value inside a configuration.
    pub(super) fn slot<'a>(&self, config: &'a mut Config) -> Slot<'a> {
        (self.slot)(config)
    }

    /// What may stand right of the `=`, as the end of a sentence.
    pub fn allowed(&self) -> String {
        self.slot(&mut Config::blank()).allowed()
    }
}

fn ms(value: &mut Duration, bounds: RangeInclusive<u64>) -> Slot<'_> {
    Slot::Span { value, unit: Unit::Milliseconds, min: *bounds.start(), max: *bounds.end() }
}

fn mebibytes(value: &mut u64, bounds: RangeInclusive<u64>) -> Slot<'_> {
    Slot::Mebibytes { value, min: *bounds.start(), max: *bounds.end() }
}

const NETWORK: &str = "Network configuration";
const GENERAL: &str = "General configuration";
const AVAILABILITY: &str = "High availability settings";
const TIMING: &str = "Lease and election timing";
const STORAGE: &str = "Database and raft log";
const SERVICE: &str = "A service beside the Console";

/// Every key, in the order of the example file.
pub static KEYS: &[Key] = &[
    Key {
        name: "MANAGEMENT_PORT_HTTP",
        section: NETWORK,
        group: "Console ports",
        default: "",
        doc: &["Plain-HTTP port of the user interface and the API. Empty: off."],
        slot: |config| Slot::Port(&mut config.management_port_http),
    },
    Key {
        name: "MANAGEMENT_PORT_HTTPS",
        section: NETWORK,
        group: "Console ports",
        default: "8083",
        doc: &["HTTPS port of the user interface and the API. Empty: off."],
        slot: |config| Slot::Port(&mut config.management_port_https),
    },
    Key {
        name: "COMMUNICATION_PORT",
        section: NETWORK,
        group: "Console ports",
        default: "8084",
        doc: &["Port to which Defenders connect. Empty: off."],
        slot: |config| Slot::Port(&mut config.communication_port),
    },
    Key {
        name: "DEFENDER_CONNECTIONS",
        section: NETWORK,
        group: "Console ports",
        default: "12000",
        doc: &[
            "Defenders that may be connected at once. Each needs an open file and some 20 KiB of memory on the PRIMARY; if the",
            "process may have fewer files open (LimitNOFILE= in the unit), fewer Defenders find a place.",
        ],
        slot: |config| Slot::Count { value: &mut config.defender_connections, min: 16, max: 100_000 },
    },
    Key {
        name: "BIND_ADDRESS",
        section: NETWORK,
        group: "Network address of this host",
        default: "",
        doc: &[
            "IP address on which all ports are opened and from which the other nodes are dialled.",
            "Empty: all interfaces.",
        ],
        slot: |config| Slot::Address(&mut config.bind_address),
    },
    Key {
        name: HEALTH_PORT,
        section: NETWORK,
        group: "Health port",
        default: "8085",
        doc: &[
            "Plain-HTTP port that answers on every member, PRIMARY or not: /status is a page that says how the cluster is, for",
            "people; / is 200 on the PRIMARY and 503 elsewhere; /secondary, /livez, /readyz?verbose and /metrics tell more, for",
            "load balancers and monitors. Empty: off.",
        ],
        slot: |config| Slot::Port(&mut config.health_port),
    },
    Key {
        name: "HEALTH_ADDRESS",
        section: NETWORK,
        group: "Health port",
        default: "",
        doc: &["IP address on which the health port is opened. Empty: BIND_ADDRESS."],
        slot: |config| Slot::Address(&mut config.health_address),
    },
    Key {
        name: HEALTH_ALLOW,
        section: NETWORK,
        group: "Health port",
        default: "members",
        doc: &[
            "Who is answered on the health port, besides this host itself. The word members stands for the addresses of the",
            "members. Name the load balancers and monitors here: HEALTH_ALLOW=members,192.0.2.7,10.1.0.0/16. Everybody else",
            "gets 403. A reader of /metrics who has the METRICS_TOKEN may come from anywhere.",
        ],
        slot: |config| Slot::Audience(&mut config.health_allow),
    },
    Key {
        name: "METRICS_TOKEN",
        section: NETWORK,
        group: "Health port",
        default: "",
        doc: &[
            "Token that a reader of /metrics sends: Authorization: Bearer TOKEN. Empty: the health port shows the metrics",
            "to everybody who is answered there.",
        ],
        slot: |config| Slot::Secret(&mut config.metrics_token),
    },
    Key {
        name: CONSOLE_CN,
        section: NETWORK,
        group: "Certificate",
        default: "",
        doc: &[
            "Common name of the Console's certificate. The line below stands for the name of this host.",
            "It is the only command that is understood here, and it is not run.",
        ],
        slot: |config| Slot::CommonName(&mut config.console_cn),
    },
    Key {
        name: "DATA_RECOVERY_ENABLED",
        section: GENERAL,
        group: "Backups",
        default: "true",
        doc: &["Back up automatically; daily, weekly and monthly backups are kept."],
        slot: |config| Slot::Choice(&mut config.data_recovery_enabled),
    },
    Key {
        name: "DATA_RECOVERY_VOLUME",
        section: GENERAL,
        group: "Backups",
        default: "/var/lib/twistlock-backup",
        doc: &[
            "Folder of the backups. A disk of its own is best: a failure that takes the data should not take the backups as well.",
        ],
        slot: |config| Slot::Folder(&mut config.data_recovery_volume),
    },
    Key {
        name: "BACKUP_KEEP_DAILY",
        section: GENERAL,
        group: "Backups",
        default: "7",
        doc: &["How many daily backups are kept."],
        slot: |config| Slot::Count { value: &mut config.backup_keep_daily, min: 1, max: 1000 },
    },
    Key {
        name: "BACKUP_KEEP_WEEKLY",
        section: GENERAL,
        group: "Backups",
        default: "4",
        doc: &["How many weekly backups are kept."],
        slot: |config| Slot::Count { value: &mut config.backup_keep_weekly, min: 0, max: 1000 },
    },
    Key {
        name: "BACKUP_KEEP_MONTHLY",
        section: GENERAL,
        group: "Backups",
        default: "6",
        doc: &["How many monthly backups are kept."],
        slot: |config| Slot::Count { value: &mut config.backup_keep_monthly, min: 0, max: 1000 },
    },
    Key {
        name: "BACKUP_KEY_FILE",
        section: GENERAL,
        group: "Backups",
        default: "",
        doc: &[
            "File with a key or pass phrase of 16 to 1024 bytes: backups are encrypted with it, and cannot be read without it.",
            "Keep a copy of it elsewhere, but not beside the backups. Empty: they are not encrypted.",
        ],
        slot: |config| Slot::OptionalPath(&mut config.backup_key_file),
    },
    Key {
        name: "BACKUP_URL",
        section: GENERAL,
        group: "Backups",
        default: "",
        doc: &[
            "Where each backup of this host is copied to: s3://BUCKET/FOLDER, of Amazon or any other S3, or file:///FOLDER, as a",
            "mounted share. A copy lies there as CLUSTER/NODE/FILE. Use the same on all nodes, and BACKUP_KEY_FILE with it:",
            "whoever reads the bucket reads everything otherwise. Empty: nowhere.",
        ],
        slot: |config| Slot::Location(&mut config.backup_url),
    },
    Key {
        name: "BACKUP_CREDENTIALS_FILE",
        section: GENERAL,
        group: "Backups",
        default: "",
        doc: &[
            "File for s3:// with lines such as AWS_ACCESS_KEY_ID=..., AWS_SECRET_ACCESS_KEY=..., AWS_REGION=..., and for an S3",
            "that is not Amazon's AWS_ENDPOINT=https://HOST:PORT. Read at each use. Empty: the environment of the daemon has",
            "them, or the host is a machine of Amazon with a role.",
        ],
        slot: |config| Slot::OptionalPath(&mut config.backup_credentials_file),
    },
    Key {
        name: "BACKUP_DELAY_SECONDS",
        section: GENERAL,
        group: "Backups",
        default: "600",
        doc: &[
            "Seconds after a start before which no automatic backup begins, even if one was missed. The second and the",
            "third member wait two and three times as long, so that they do not all begin at once.",
        ],
        slot: |config| Slot::Span { value: &mut config.backup_delay, unit: Unit::Seconds, min: 1, max: 86_400 },
    },
    Key {
        name: "DATA_FOLDER",
        section: GENERAL,
        group: "Data",
        default: "/var/lib/twistlock",
        doc: &["Folder of the database, the raft log, certificates and scripts. Only its owner may enter it."],
        slot: |config| Slot::Folder(&mut config.data_folder),
    },
    Key {
        name: "CONTROL_SOCKET",
        section: GENERAL,
        group: "Data",
        default: "",
        doc: &["Unix socket for administration on this host. Empty: control.sock in DATA_FOLDER."],
        slot: |config| Slot::OptionalPath(&mut config.control_socket),
    },
    Key {
        name: "SYSTEMD_ENABLED",
        section: GENERAL,
        group: "Service",
        default: "true",
        doc: &["Install and enable systemd units."],
        slot: |config| Slot::Choice(&mut config.systemd_enabled),
    },
    Key {
        name: "RUN_CONSOLE_AS_ROOT",
        section: GENERAL,
        group: "Service",
        default: "false",
        doc: &["Run as root. Otherwise an unprivileged user runs it, and ports below 1024 need a capability."],
        slot: |config| Slot::Choice(&mut config.run_console_as_root),
    },
    Key {
        name: "LOG_FORMAT",
        section: GENERAL,
        group: "Log",
        default: "human",
        doc: &["Text for people, or one JSON object per line."],
        slot: |config| Slot::Choice(&mut config.log_format),
    },
    Key {
        name: "LOG_LEVEL",
        section: GENERAL,
        group: "Log",
        default: "info",
        doc: &[
            "The least severe line that is written.",
            "At trace, lines also say where the time of requests and writes goes.",
        ],
        slot: |config| Slot::Choice(&mut config.log_level),
    },
    Key {
        name: "NOTIFY_COMMAND",
        section: GENERAL,
        group: "Notifications",
        default: "",
        doc: &[
            "Program that is run for each event that somebody should know of: its path and its arguments, separated by blanks.",
            "No shell reads it. It gets the event as JSON on standard input and has 10 seconds. Webhooks are set up in the",
            "Console, for all members.",
        ],
        slot: |config| Slot::Command(&mut config.notify_command),
    },
    Key {
        name: "NOTIFY_SEVERITY",
        section: GENERAL,
        group: "Notifications",
        default: "warning",
        doc: &["The least severe event for which NOTIFY_COMMAND is run."],
        slot: |config| Slot::Choice(&mut config.notify_severity),
    },
    Key {
        name: "HIGH_AVAILABILITY_ENABLED",
        section: AVAILABILITY,
        group: "Cluster of three nodes",
        default: "false",
        doc: &["Run this host as one of three nodes, of which one is PRIMARY."],
        slot: |config| Slot::Choice(&mut config.high_availability_enabled),
    },
    Key {
        name: "HIGH_AVAILABILITY_STATE",
        section: AVAILABILITY,
        group: "Cluster of three nodes",
        default: "PRIMARY",
        doc: &[
            "PRIMARY on the first node, SECONDARY on the two others. It describes the first start only:",
            "later the nodes decide who is PRIMARY, and this line may stay as it is.",
        ],
        slot: |config| Slot::Choice(&mut config.high_availability_state),
    },
    Key {
        name: "HIGH_AVAILABILITY_PORT",
        section: AVAILABILITY,
        group: "Cluster of three nodes",
        default: "8086",
        doc: &["Port of the links between the nodes: TCP, and UDP of the same number where no firewall drops it."],
        slot: |config| Slot::Port(&mut config.high_availability_port),
    },
    Key {
        name: "HIGH_AVAILABILITY_ADDRESS",
        section: AVAILABILITY,
        group: "Cluster of three nodes",
        default: "",
        doc: &[
            "Address by which the other nodes reach this host. Only the first start uses this and the name below.",
            "Empty: BIND_ADDRESS, or else the first address of this host that others can reach.",
        ],
        slot: |config| Slot::CommonName(&mut config.high_availability_address),
    },
    Key {
        name: "HIGH_AVAILABILITY_NAME",
        section: AVAILABILITY,
        group: "Cluster of three nodes",
        default: "",
        doc: &["Name of this node, unlike that of any other. Empty: the name of this host."],
        slot: |config| Slot::CommonName(&mut config.high_availability_name),
    },
    Key {
        name: "CLUSTERED_DB_ENABLED",
        section: AVAILABILITY,
        group: "Pool of three to seven members",
        default: "false",
        doc: &[
            "Make this host a member of a pool: with an empty data folder it waits. Create the first user on one host, at once,",
            "and add the others there (twistcli clustered-db add). See docs/pool.md. HIGH_AVAILABILITY_PORT, _ADDRESS and _NAME",
            "count for it, too.",
        ],
        slot: |config| Slot::Choice(&mut config.clustered_db_enabled),
    },
    Key {
        name: "CLUSTERED_DB_SECRET_FILE",
        section: AVAILABILITY,
        group: "Pool of three to seven members",
        default: "",
        doc: &[
            "File with a secret of 32 to 1024 bytes, the same on all hosts of the pool (openssl rand -hex 32 makes one): a host",
            "that waits and the pool that adds it prove to each other that they know it. Empty: whoever adds a host compares",
            "the fingerprint of its key.",
        ],
        slot: |config| Slot::OptionalPath(&mut config.clustered_db_secret_file),
    },
    Key {
        name: "LEASE_MS",
        section: TIMING,
        group: "Timing",
        default: "400",
        doc: &[
            "Milliseconds for which the PRIMARY keeps its ports open without hearing from a majority.",
            "At most (ELECTION_TICKS - 1) * TICK_MS - 50, so that it has closed them before another node opens its own,",
            "and at least 4 * TICK_MS. Use the same timing on all nodes.",
        ],
        slot: |config| ms(&mut config.lease, 100..=LONGEST_LEASE.as_millis() as u64),
    },
    Key {
        name: "TICK_MS",
        section: TIMING,
        group: "Timing",
        default: "25",
        doc: &["Milliseconds between two heartbeats."],
        slot: |config| ms(&mut config.tick, 5..=1_000),
    },
    Key {
        name: "ELECTION_TICKS",
        section: TIMING,
        group: "Timing",
        default: "20",
        doc: &["Heartbeats without a sign of the PRIMARY after which a node wants to take over."],
        slot: |config| Slot::Count { value: &mut config.election_ticks, min: 10, max: 200 },
    },
    Key {
        name: "FAST_TAKEOVER",
        section: TIMING,
        group: "Timing",
        default: "true",
        doc: &[
            "Take over at once when the PRIMARY's host refuses connections to HIGH_AVAILABILITY_PORT after its links broke.",
            "Set it to false where something else may refuse them in its name: a firewall that rejects instead of",
            "dropping, or a proxy. A takeover then always waits until ELECTION_TICKS have passed.",
        ],
        slot: |config| Slot::Choice(&mut config.fast_takeover),
    },
    Key {
        name: "DEMOTION_DEADLINE_MS",
        section: TIMING,
        group: "Timing",
        default: "2000",
        doc: &["Milliseconds in which a node must have given up the PRIMARY role; then the process ends itself."],
        slot: |config| ms(&mut config.demotion_deadline, 500..=60_000),
    },
    Key {
        name: "DATABASE_PAGE_SIZE",
        section: STORAGE,
        group: "Database",
        default: "4096",
        doc: &["Page size of the database in bytes. It is used when the database is created, and never later."],
        slot: |config| Slot::PageSize(&mut config.database_page_size),
    },
    Key {
        name: "CHECKPOINT_MB",
        section: STORAGE,
        group: "Database",
        default: "16",
        doc: &["Size of the -wal file at which its pages are moved into the database file."],
        slot: |config| mebibytes(&mut config.checkpoint_bytes, 1..=4096),
    },
    Key {
        name: "CHECKPOINT_SECONDS",
        section: STORAGE,
        group: "Database",
        default: "60",
        doc: &["Seconds after which that happens although the -wal file is smaller."],
        slot: |config| Slot::Span { value: &mut config.checkpoint_interval, unit: Unit::Seconds, min: 1, max: 3600 },
    },
    Key {
        name: "SCRUB_SECONDS",
        section: STORAGE,
        group: "Database",
        default: "86400",
        doc: &[
            "Seconds from the end of one scrub to the next: the database file is read again, page by page, so that what has",
            "rotted on the disk is found before it is needed. A damaged copy is replaced by that of another member. 0: never.",
        ],
        slot: |config| Slot::Span { value: &mut config.scrub_interval, unit: Unit::Seconds, min: 0, max: 31_536_000 },
    },
    Key {
        name: "RAFT_LOG_SEGMENT_MB",
        section: STORAGE,
        group: "Raft log",
        default: "16",
        doc: &["Size of one file of the raft log. The space is taken ahead."],
        slot: |config| mebibytes(&mut config.raft_log_segment_bytes, 4..=64),
    },
    Key {
        name: "RAFT_LOG_LIMIT_MB",
        section: STORAGE,
        group: "Raft log",
        default: "1024",
        doc: &[
            "Size of the raft log up to which it is kept for a member that is away. A member that was away for longer",
            "gets the whole database when it comes back.",
        ],
        slot: |config| mebibytes(&mut config.raft_log_limit, 64..=1_048_576),
    },
    Key {
        name: "SERVICE_COMMAND",
        section: SERVICE,
        group: "Process",
        default: "",
        doc: &[
            "Program that the PRIMARY runs, with its arguments, separated by blanks. No shell reads it. It has to stay in the",
            "foreground. Of its files, only SQLite databases are replicated in this version: so it is only taken where",
            "BIND_ADDRESS is one of 127.0.0.0/8, to try it out. Empty: only the Console.",
        ],
        slot: |config| Slot::Command(&mut config.service_command),
    },
    Key {
        name: "SERVICE_FOLDER",
        section: SERVICE,
        group: "Process",
        default: "",
        doc: &[
            "Folder of its data, in which it is started: a mount point, empty but while it runs here. What it does to SQLite",
            "databases in there is committed when a majority of the members has it. Needs /dev/fuse and CAP_SYS_ADMIN.",
        ],
        slot: |config| Slot::OptionalPath(&mut config.service_folder),
    },
    Key {
        name: "SERVICE_USER",
        section: SERVICE,
        group: "Process",
        default: "",
        doc: &["User that it runs as. It has no capabilities, and cannot get any."],
        slot: |config| Slot::User(&mut config.service_user),
    },
    Key {
        name: "SERVICE_ENVIRONMENT_FILE",
        section: SERVICE,
        group: "Process",
        default: "",
        doc: &[
            "File with lines NAME=VALUE, read at each start: its environment, beside TWISTLOCK_NODE, TWISTLOCK_EPOCH and",
            "TWISTLOCK_FOLDER. Empty: nothing else but a PATH.",
        ],
        slot: |config| Slot::OptionalPath(&mut config.service_environment_file),
    },
    Key {
        name: "SERVICE_LOCAL_FILES",
        section: SERVICE,
        group: "Process",
        default: "",
        doc: &[
            "Files of its folder that nobody misses after a takeover: cache/**,logs/**. The status does not count them.",
        ],
        slot: |config| Slot::Patterns(&mut config.service_local_files),
    },
    Key {
        name: "SERVICE_PORTS",
        section: SERVICE,
        group: "Ports",
        default: "",
        doc: &[
            "Ports that clients reach, each with the port of 127.0.0.1 at which the service listens: 443:8443. They are open on",
            "the PRIMARY alone, while the service is ready. With +proxy behind it, the service is told the client's address by",
            "the PROXY protocol, version 2.",
        ],
        slot: |config| Slot::PortPairs(&mut config.service_ports),
    },
    Key {
        name: "SERVICE_READY",
        section: SERVICE,
        group: "Readiness and restarts",
        default: "",
        doc: &[
            "How it is known that the service can be used: it answers at http://127.0.0.1:PORT/PATH with 2xx or 3xx, it accepts",
            "connections at tcp:PORT, or it says so itself (notify: sd_notify). Empty: tcp and the inner one of its first port.",
        ],
        slot: |config| Slot::Readiness(&mut config.service_ready),
    },
    Key {
        name: "SERVICE_READY_SECONDS",
        section: SERVICE,
        group: "Readiness and restarts",
        default: "60",
        doc: &["Seconds that it may take to become ready; then it is ended and started again."],
        slot: |config| Slot::Span { value: &mut config.service_ready_limit, unit: Unit::Seconds, min: 1, max: 3600 },
    },
    Key {
        name: "SERVICE_STOP_SECONDS",
        section: SERVICE,
        group: "Readiness and restarts",
        default: "10",
        doc: &["Seconds from SIGTERM to SIGKILL at a planned stop. When the lease is lost it is killed at once."],
        slot: |config| Slot::Span { value: &mut config.service_stop_limit, unit: Unit::Seconds, min: 1, max: 300 },
    },
    Key {
        name: "SERVICE_RESTARTS",
        section: SERVICE,
        group: "Readiness and restarts",
        default: "5",
        doc: &[
            "How often it is started again within 60 seconds; after that, another member takes the role over, once. Then the",
            "service is tried again every 30 seconds.",
        ],
        slot: |config| Slot::Count { value: &mut config.service_restarts, min: 0, max: 100 },
    },
];

#[cfg(test)]
mod tests {
    use super::super::FIELDS;

    #[test]
    fn each_setting_has_a_key() {
        let table = include_str!("keys.rs");
        let without: Vec<&&str> = FIELDS.iter().filter(|field| !table.contains(&format!("config.{field}"))).collect();
        assert!(without.is_empty(), "no line of the file can set {without:?}");
    }
}
