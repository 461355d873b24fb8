//! `twistlock.cfg`: what it may say ([`KEYS`]) and the typed [`Config`] that comes out of it.
//!
//! The original of this file is sourced by a shell. This one is data: nothing in it is ever run. Every problem of a
//! file is collected and reported at once. Must never depend on another module of ours, and must never change anything
//! on disk.

mod audience;
mod edit;
mod keys;
mod line;
mod reader;
mod render;
pub mod service;
mod value;

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use thiserror::Error;

pub use audience::Audience;
pub use edit::Draft;
pub use keys::{KEYS, Key, LONGEST_LEASE};
pub use line::literal;
pub use reader::{Environment, parse};
pub use render::render;
use service::{PortPair, Readiness};

/// Largest file that is read, in bytes.
pub const MAX_FILE: usize = 256 * 1024;
/// Longest line, in bytes, without its line feed.
pub const MAX_LINE: usize = 4096;
/// Most problems, and most notes, that are kept of one file; the others are only counted.
pub const MAX_REPORTED: usize = 50;

/// Everything is as it should be (sysexits).
pub const EX_OK: u8 = 0;
/// The file cannot be read (sysexits).
pub const EX_NOINPUT: u8 = 66;
/// The file says something that is not allowed (sysexits).
pub const EX_CONFIG: u8 = 78;

/// Declares [`Config`] together with the value that [`KEYS`] is laid over, so that each field is written down once.
macro_rules! config {
    ($($(#[$meta:meta])* $field:ident: $type:ty,)*) => {
        /// All settings of a daemon, checked. [`Config::default`] holds the defaults of [`KEYS`].
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Config {
            $($(#[$meta])* pub $field: $type,)*
        }

        impl Config {
            /// Not a usable configuration: a place to put the defaults into.
            fn blank() -> Self {
                Self { $($field: Default::default(),)* }
            }
        }

        #[cfg(test)]
        const FIELDS: &[&str] = &[$(stringify!($field)),*];
    };
}

config! {
    /// `MANAGEMENT_PORT_HTTP`; none: no plain-HTTP listener.
    management_port_http: Option<u16>,
    /// `MANAGEMENT_PORT_HTTPS`; none: no HTTPS listener.
    management_port_https: Option<u16>,
    /// `COMMUNICATION_PORT`; none: no listener for Defenders.
    communication_port: Option<u16>,
    /// `DEFENDER_CONNECTIONS`: Defenders that may be connected at once.
    defender_connections: u32,
    /// `HEALTH_PORT`; none: no health port.
    health_port: Option<u16>,
    /// `HEALTH_ADDRESS`; none: `BIND_ADDRESS`. See [`Config::health_address`].
    health_address: Option<IpAddr>,
    /// `HEALTH_ALLOW`.
    health_allow: Audience,
    /// `METRICS_TOKEN`; none: whoever reaches the page may read the metrics.
    metrics_token: Option<Secret>,
    /// `BIND_ADDRESS`: where Console and consensus listen and from where consensus dials; none: all interfaces.
    bind_address: Option<IpAddr>,
    /// `CONSOLE_CN`; none: the host's name. See [`Config::common_name`].
    console_cn: Option<String>,
    /// `DATA_RECOVERY_ENABLED`.
    data_recovery_enabled: bool,
    /// `DATA_RECOVERY_VOLUME`, absolute.
    data_recovery_volume: PathBuf,
    /// `BACKUP_KEEP_DAILY`, `BACKUP_KEEP_WEEKLY`, `BACKUP_KEEP_MONTHLY`: how many automatic backups are kept.
    backup_keep_daily: u32,
    backup_keep_weekly: u32,
    backup_keep_monthly: u32,
    /// `BACKUP_KEY_FILE`, absolute; none: backups are not encrypted.
    backup_key_file: Option<PathBuf>,
    /// `BACKUP_URL`; none: backups are not copied elsewhere.
    backup_url: Option<String>,
    /// `BACKUP_CREDENTIALS_FILE`, absolute; none: the environment.
    backup_credentials_file: Option<PathBuf>,
    /// `BACKUP_DELAY_SECONDS`: from the start of the daemon to the first automatic backup.
    backup_delay: Duration,
    /// `DATA_FOLDER`, absolute.
    data_folder: PathBuf,
    /// `CONTROL_SOCKET`; none: inside the data folder. See [`Config::control_socket_path`].
    control_socket: Option<PathBuf>,
    /// `SYSTEMD_ENABLED`.
    systemd_enabled: bool,
    /// `RUN_CONSOLE_AS_ROOT`.
    run_console_as_root: bool,
    /// `LOG_FORMAT`.
    log_format: LogFormat,
    /// `LOG_LEVEL`.
    log_level: LogLevel,
    /// `NOTIFY_COMMAND`: program and arguments; empty: none.
    notify_command: Vec<String>,
    /// `NOTIFY_SEVERITY`.
    notify_severity: NotifySeverity,
    /// `HIGH_AVAILABILITY_ENABLED`.
    high_availability_enabled: bool,
    /// `HIGH_AVAILABILITY_STATE`: what the node is at its very first start, and meaningless afterwards.
    high_availability_state: FirstState,
    /// `HIGH_AVAILABILITY_PORT`; always present when high availability is enabled.
    high_availability_port: Option<u16>,
    /// `HIGH_AVAILABILITY_ADDRESS`: how other nodes reach this host; none: found out. Counts at the first start.
    high_availability_address: Option<String>,
    /// `HIGH_AVAILABILITY_NAME`; none: the host's name. Counts at the first start. See [`Config::member_name`].
    high_availability_name: Option<String>,
    /// `CLUSTERED_DB_ENABLED`.
    clustered_db_enabled: bool,
    /// `CLUSTERED_DB_SECRET_FILE`; none: members are added by their fingerprints.
    clustered_db_secret_file: Option<PathBuf>,
    /// `LEASE_MS`: how long ports may stay open without hearing from a majority.
    lease: Duration,
    /// `TICK_MS`: the period of the consensus loop; a heartbeat is one tick.
    tick: Duration,
    /// `ELECTION_TICKS`: silence of the primary, in ticks, after which a member campaigns.
    election_ticks: u32,
    /// `FAST_TAKEOVER`: elect a new primary at once when the old one's process is proven dead.
    fast_takeover: bool,
    /// `DEMOTION_DEADLINE_MS`: time for a demotion before the process gives up and exits.
    demotion_deadline: Duration,
    /// `DATABASE_PAGE_SIZE`, in bytes: a power of two from 512 to 65536. Used when the database is created.
    database_page_size: u32,
    /// `RAFT_LOG_SEGMENT_MB`, in bytes.
    raft_log_segment_bytes: u64,
    /// `RAFT_LOG_LIMIT_MB`, in bytes: the raft log is not kept longer than this for a member that is away.
    raft_log_limit: u64,
    /// `CHECKPOINT_MB`, in bytes: a checkpoint starts when SQLite's `-wal` file has grown to this.
    checkpoint_bytes: u64,
    /// `CHECKPOINT_SECONDS`: a checkpoint starts when the last one is this long ago and something was written since.
    checkpoint_interval: Duration,
    /// `SCRUB_SECONDS`; zero: never.
    scrub_interval: Duration,
    /// `SERVICE_COMMAND`: program and arguments; empty: no service beside the Console.
    service_command: Vec<String>,
    /// `SERVICE_FOLDER`, absolute.
    service_folder: Option<PathBuf>,
    /// `SERVICE_USER`.
    service_user: Option<String>,
    /// `SERVICE_PORTS`.
    service_ports: Vec<PortPair>,
    /// `SERVICE_READY`; none: the first of its ports accepts connections.
    service_ready: Option<Readiness>,
    /// `SERVICE_READY_SECONDS`.
    service_ready_limit: Duration,
    /// `SERVICE_STOP_SECONDS`.
    service_stop_limit: Duration,
    /// `SERVICE_RESTARTS`.
    service_restarts: u32,
    /// `SERVICE_ENVIRONMENT_FILE`, absolute.
    service_environment_file: Option<PathBuf>,
    /// `SERVICE_LOCAL_FILES`: patterns inside of `SERVICE_FOLDER`.
    service_local_files: Vec<String>,
}

/// True for a key whose value must not be shown.
pub fn is_secret(key: &str) -> bool {
    let known = KEYS.iter().find(|known| known.name == key);
    known.is_some_and(|known| known.slot(&mut Config::blank()).is_secret())
}

/// A value that is never shown: not in a message, and not by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The value itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// The least severe event for which a program is run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NotifySeverity {
    Info,
    #[default]
    Warning,
    Critical,
}

/// What a node is at its very first start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FirstState {
    /// Creates the cluster.
    #[default]
    Primary,
    /// Joins a cluster.
    Secondary,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One line of text for a reader.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// The least severe log line that is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogLevel {
    /// Something was lost or refused.
    Error,
    /// Something needs attention.
    Warn,
    /// What an administrator wants to know.
    #[default]
    Info,
    /// What a developer wants to know.
    Debug,
    /// Everything.
    Trace,
}

impl From<LogLevel> for tracing::Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Trace => Self::TRACE,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        let mut config = Self::blank();
        for key in KEYS {
            key.slot(&mut config).read(key.default).expect("a test reads every default");
        }
        config
    }
}

impl Config {
    /// The common name of the Console's certificate: `CONSOLE_CN`, or the name that the kernel knows for this host.
    pub fn common_name(&self) -> String {
        self.console_cn.clone().unwrap_or_else(host_name)
    }

    /// The name of this node among the members: `HIGH_AVAILABILITY_NAME`, or the name that the kernel knows for this
    /// host.
    pub fn member_name(&self) -> String {
        self.high_availability_name.clone().unwrap_or_else(host_name)
    }

    /// Where the health port listens; none: it is off. The unspecified IPv6 address means all interfaces of both
    /// families.
    pub fn health_address(&self) -> Option<SocketAddr> {
        let all = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        Some(SocketAddr::new(self.health_address.or(self.bind_address).unwrap_or(all), self.health_port?))
    }

    /// The port at which every member has a page about itself; none if it is off, or if only its own host reaches it.
    /// The hosts of a cluster are taken to have the same one.
    pub fn status_port(&self) -> Option<u16> {
        self.health_port.filter(|_| self.health_address.is_none_or(|address| !address.is_loopback()))
    }

    /// The Unix socket for local administration: `CONTROL_SOCKET`, or `control.sock` in the data folder.
    pub fn control_socket_path(&self) -> PathBuf {
        self.control_socket.clone().unwrap_or_else(|| self.data_folder.join("control.sock"))
    }
}

/// The name that the kernel knows for this host.
pub fn host_name() -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    name.filter(|name| !name.is_empty()).unwrap_or_else(|| "localhost".to_owned())
}

/// A valid file: its settings and what is still to be said about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// Warnings and information, in the order of the file, for the caller to log.
    pub notes: Vec<Note>,
}

/// How much a [`Note`] matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Good to know.
    Info,
    /// Probably not what was meant.
    Warning,
}

/// Something to say about a valid file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// How much it matters.
    pub severity: Severity,
    /// `file:line: KEY: what about it`, without the severity.
    pub text: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Info => "info",
            Severity::Warning => "warning",
        };
        write!(f, "{severity}: {}", self.text)
    }
}

/// One line of a file that is not allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Name of the file as the caller gave it.
    pub file: String,
    /// Number of the line from 1; none if the file as a whole is meant.
    pub line: Option<usize>,
    /// The key, if the line got that far.
    pub key: Option<String>,
    /// What stands there, shortened.
    pub found: String,
    /// What may stand there.
    pub allowed: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file)?;
        if let Some(line) = self.line {
            write!(f, "{line}:")?;
        }
        if let Some(key) = &self.key {
            write!(f, " {key}:")?;
        }
        write!(f, " found \"{}\", allowed: {}", self.found, self.allowed)
    }
}

/// Why there is no configuration.
#[derive(Debug, Error)]
pub enum ConfigErrors {
    /// The file could not be read at all.
    #[error("{file}: cannot be read: {error}")]
    Unreadable {
        /// Name of the file.
        file: String,
        /// What the system said.
        error: io::Error,
    },
    /// The file says something that is not allowed; one line for each problem.
    #[error("{}", list(problems, *more))]
    Invalid {
        /// The first problems in the order of the file, at most [`MAX_REPORTED`].
        problems: Vec<Problem>,
        /// How many more there are.
        more: usize,
    },
}

impl ConfigErrors {
    /// The exit code by sysexits: [`EX_NOINPUT`] or [`EX_CONFIG`].
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Unreadable { .. } => EX_NOINPUT,
            Self::Invalid { .. } => EX_CONFIG,
        }
    }
}

fn list(problems: &[Problem], more: usize) -> String {
    let mut lines: Vec<String> = problems.iter().map(Problem::to_string).collect();
    if more > 0 {
        lines.push(format!("... and {more} more problems"));
    }
    lines.join("\n")
}

/// Reads and checks a file; `${VAR-default}` sees the environment of this process.
///
/// # Errors
/// [`ConfigErrors::Unreadable`] when the file cannot be read, [`ConfigErrors::Invalid`] with all its problems at once.
pub fn load(path: &Path) -> Result<Loaded, ConfigErrors> {
    load_in(path, &|name| std::env::var(name).ok())
}

/// Reads and checks a file as a process with this environment does.
///
/// # Errors
/// [`ConfigErrors::Unreadable`] when the file cannot be read, [`ConfigErrors::Invalid`] with all its problems at once.
pub fn load_in(path: &Path, env: Environment<'_>) -> Result<Loaded, ConfigErrors> {
    parse(read(path)?, &path.display().to_string(), env)
}

/// The bytes of a file, for [`parse`] and [`Draft`].
///
/// # Errors
/// [`ConfigErrors::Unreadable`] when the file cannot be opened or read. What it says is not looked at.
pub fn read(path: &Path) -> Result<Vec<u8>, ConfigErrors> {
    let mut bytes = Vec::new();
    // One byte more than allowed is enough to know that the file is too large; a device never ends.
    match File::open(path).and_then(|file| file.take(MAX_FILE as u64 + 1).read_to_end(&mut bytes)) {
        Ok(_) => Ok(bytes),
        Err(error) => Err(ConfigErrors::Unreadable { file: path.display().to_string(), error }),
    }
}

/// What `twistlockd check-config FILE` prints, without a line feed at its end, and the exit code by sysexits.
pub fn check(path: &Path) -> (String, u8) {
    match load(path) {
        Ok(Loaded { config, mut notes }) => {
            notes.extend(service::host(&config));
            let mut lines: Vec<String> = notes.iter().map(Note::to_string).collect();
            let warnings = notes.iter().filter(|note| note.severity == Severity::Warning).count();
            let verdict = match warnings {
                0 => "valid".to_owned(),
                1 => "valid, with 1 warning".to_owned(),
                n => format!("valid, with {n} warnings"),
            };
            lines.push(format!("{}: {verdict}", path.display()));
            (lines.join("\n"), EX_OK)
        }
        Err(errors) => (errors.to_string(), errors.exit_code()),
    }
}
