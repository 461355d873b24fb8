//! What the keys of a service say: its ports, when it is ready, and the rules over several of them. Pure, but for
//! [`host`], which looks at this host. Must never start anything.

use std::{
    fmt, fs,
    path::{Component, Path},
};

use super::{Config, Note, Severity};

/// Ports that one service may have.
pub const MOST_PORTS: usize = 8;
/// Longest user name, in bytes (`useradd`).
const MAX_USER: usize = 32;
/// Patterns of files that are not replicated, at most.
const MAX_PATTERNS: usize = 32;
/// Longest text of a key, in bytes. Escaped it still fits into a line.
const MAX_TEXT: usize = 512;

/// One port of a service: `OUTSIDE:INSIDE`, or `OUTSIDE:INSIDE+proxy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortPair {
    /// The port that clients reach, on the PRIMARY alone.
    pub outside: u16,
    /// The port at which the service listens, on 127.0.0.1.
    pub inside: u16,
    /// Whether the service is told who connects, by the PROXY protocol, version 2.
    pub proxy: bool,
}

impl fmt::Display for PortPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}{}", self.outside, self.inside, if self.proxy { "+proxy" } else { "" })
    }
}

impl PortPair {
    fn read(text: &str) -> Option<Self> {
        let (text, proxy) = text.strip_suffix("+proxy").map_or((text, false), |text| (text, true));
        let (outside, inside) = text.split_once(':')?;
        Some(Self { outside: port(outside)?, inside: port(inside)?, proxy })
    }

    /// Reads a list; `None` if it is not allowed.
    pub(super) fn list(text: &str) -> Option<Vec<Self>> {
        let pairs: Vec<Self> = list(text).map(Self::read).collect::<Option<_>>()?;
        let outside = |pair: &Self| pairs.iter().filter(|other| other.outside == pair.outside).count();
        (pairs.len() <= MOST_PORTS && pairs.iter().all(|pair| outside(pair) == 1)).then_some(pairs)
    }
}

/// How it is known that a service can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It answers a GET of this path at this port of 127.0.0.1 with 2xx or 3xx.
    Http { port: u16, path: String },
    /// It accepts connections at this port of 127.0.0.1.
    Tcp(u16),
    /// It says so itself (`sd_notify`).
    Notify,
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http { port, path } => write!(f, "http://127.0.0.1:{port}{path}"),
            Self::Tcp(port) => write!(f, "tcp:{port}"),
            Self::Notify => f.write_str("notify"),
        }
    }
}

impl Readiness {
    /// Reads a value; `None` if it is not allowed.
    pub(super) fn read(text: &str) -> Option<Self> {
        if text == "notify" {
            return Some(Self::Notify);
        }
        if let Some(text) = text.strip_prefix("tcp:") {
            return port(text).map(Self::Tcp);
        }
        let rest = text.strip_prefix("http://127.0.0.1:").or_else(|| text.strip_prefix("http://localhost:"))?;
        let (number, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let fine = text.len() <= MAX_TEXT && path.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#');
        let path = if path.is_empty() { "/" } else { path };
        fine.then_some(Self::Http { port: port(number)?, path: path.to_owned() })
    }
}

fn port(text: &str) -> Option<u16> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| plain && *port > 0)
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty())
}

/// The name of a user; `None` if no user can have it.
pub(super) fn user(text: &str) -> Option<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let fine = (1..=MAX_USER).contains(&text.len()) && text.chars().all(fits) && !text.starts_with('-');
    fine.then(|| text.to_owned())
}

/// Patterns of paths inside the folder; `None` if one leads out of it.
pub(super) fn patterns(text: &str) -> Option<Vec<String>> {
    let inside = |text: &str| {
        let mut parts = Path::new(text).components();
        parts.all(|part| matches!(part, Component::Normal(_))) && !text.chars().any(char::is_control)
    };
    let all: Vec<String> = list(text).map(str::to_owned).collect();
    (text.len() <= MAX_TEXT && all.len() <= MAX_PATTERNS && all.iter().all(|text| inside(text))).then_some(all)
}

/// A key and what is wrong with it: the value, and what is allowed.
pub(super) type Wrong = (&'static str, String, String);

/// The rules over several keys.
pub(super) fn rules(config: &Config) -> Vec<Wrong> {
    let mut wrong = Vec::new();
    if config.service_command.is_empty() {
        return wrong;
    }
    let mut say = |key, found: String, allowed: &str| wrong.push((key, found, allowed.to_owned()));
    if !config.bind_address.is_some_and(|address| address.is_loopback()) {
        say(
            "SERVICE_COMMAND",
            config.service_command.join(" "),
            "empty, or BIND_ADDRESS is one of 127.0.0.0/8: this version replicates the SQLite databases in SERVICE_FOLDER and \
             no other file of it, and no restore puts them back, so that a service can only be tried on one machine \
             (twistlockd dev --service)",
        );
    }
    match &config.service_folder {
        None => say("SERVICE_FOLDER", String::new(), "an absolute path while SERVICE_COMMAND is set"),
        Some(folder) if folder.starts_with(&config.data_folder) || config.data_folder.starts_with(folder) => {
            let found = folder.display().to_string();
            say("SERVICE_FOLDER", found, "a folder that is not inside DATA_FOLDER, nor around it");
        }
        Some(_) => {}
    }
    if config.service_user.is_none() {
        say("SERVICE_USER", String::new(), "the name of a user while SERVICE_COMMAND is set");
    }
    if config.service_ready.is_none() && config.service_ports.is_empty() {
        say(
            "SERVICE_READY",
            String::new(),
            "http://127.0.0.1:PORT/PATH, tcp:PORT or notify while SERVICE_PORTS is empty",
        );
    }
    wrong.extend(ports(config));
    wrong
}

/// A port of the service may be none of ours, nor one of its own on the other side.
fn ports(config: &Config) -> Vec<Wrong> {
    let ours = [
        ("MANAGEMENT_PORT_HTTP", config.management_port_http),
        ("MANAGEMENT_PORT_HTTPS", config.management_port_https),
        ("COMMUNICATION_PORT", config.communication_port),
        ("HIGH_AVAILABILITY_PORT", config.high_availability_port),
        ("HEALTH_PORT", config.health_port),
    ];
    let mut wrong = Vec::new();
    for pair in &config.service_ports {
        for port in [pair.outside, pair.inside] {
            let holder = ours.iter().find(|(_, other)| *other == Some(port)).map(|(name, _)| *name);
            if let Some(name) = holder {
                wrong.push((
                    "SERVICE_PORTS",
                    pair.to_string(),
                    format!("a port that no other key has ({name} has {port})"),
                ));
            }
        }
        if config.service_ports.iter().any(|other| other.inside == pair.outside) {
            let allowed = "two ports that differ: the service listens at the second one, this program at the first";
            wrong.push(("SERVICE_PORTS", pair.to_string(), allowed.to_owned()));
        }
    }
    wrong
}

/// What this host lacks for a service, for whoever checks a file there. Empty without a service.
pub fn host(config: &Config) -> Vec<Note> {
    if config.service_command.is_empty() {
        return Vec::new();
    }
    let mut notes = Vec::new();
    let mut say = |severity, text: String| notes.push(Note { severity, text });
    let what = "SERVICE_FOLDER: SQLite databases in it are replicated, its other files are not in this version";
    say(Severity::Warning, what.to_owned());
    let program = config.service_command.first().map(String::as_str).unwrap_or_default();
    if !Path::new(program).is_file() {
        say(Severity::Warning, format!("SERVICE_COMMAND: there is no file {program} on this host"));
    }
    if let Some(file) = config.service_environment_file.as_ref().filter(|file| !file.is_file()) {
        say(Severity::Warning, format!("SERVICE_ENVIRONMENT_FILE: there is no file {}", file.display()));
    }
    if let Some(user) = &config.service_user {
        match nix::unistd::User::from_name(user) {
            Ok(Some(found)) if found.uid.is_root() => {
                say(
                    Severity::Warning,
                    format!("SERVICE_USER: {user} is the superuser: give the service a user of its own"),
                );
            }
            Ok(Some(_)) => {}
            _ => say(
                Severity::Warning,
                format!("SERVICE_USER: there is no user {user} on this host: useradd --system {user}"),
            ),
        }
    }
    for lack in folder_lacks() {
        say(Severity::Warning, format!("SERVICE_FOLDER: {lack}"));
    }
    let cgroup2 = |mounts: String| mounts.lines().any(|line| line.split(' ').nth(2) == Some("cgroup2"));
    if !fs::read_to_string("/proc/self/mounts").is_ok_and(cgroup2) {
        let text = "SERVICE_COMMAND: there is no cgroup v2 on this host: processes of the service are found one by one to be ended";
        say(Severity::Warning, text.to_owned());
    }
    if !nix::unistd::geteuid().is_root() {
        let text = "SERVICE_USER: only the superuser can start a service as another user";
        say(Severity::Info, text.to_owned());
    }
    notes
}

/// What this process lacks on this host to serve a folder; empty if nothing.
pub fn folder_lacks() -> Vec<String> {
    let mut lacks = Vec::new();
    match fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => lacks.push(
            "there is no /dev/fuse on this host (modprobe fuse; in a container, --device /dev/fuse): it cannot be served".into(),
        ),
        Err(error) => lacks.push(format!("/dev/fuse cannot be opened ({error}): it cannot be served")),
    }
    let sets = rustix::thread::capabilities(None).map(|sets| sets.effective);
    if !sets.is_ok_and(|effective| effective.contains(rustix::thread::CapabilitySet::SYS_ADMIN)) {
        lacks.push(
            "this user lacks CAP_SYS_ADMIN (root has it; in a container, --cap-add SYS_ADMIN): the folder cannot be mounted".into(),
        );
    }
    lacks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_pairs_and_nothing_else() {
        let pairs = PortPair::list("443:8443, 3012:3013+proxy").unwrap();
        let shown: Vec<String> = pairs.iter().map(PortPair::to_string).collect();
        assert_eq!(shown, ["443:8443", "3012:3013+proxy"]);
        assert_eq!(PortPair::list(""), Some(vec![]));
        for wrong in ["443", "443:", "0:1", "1:65536", "443:8443+", "443:1,443:2", "+1:2", "1:2:3", "a:b"] {
            assert_eq!(PortPair::list(wrong), None, "{wrong}");
        }
        assert_eq!(PortPair::list("1:11,2:12,3:13,4:14,5:15,6:16,7:17,8:18,9:19"), None);
    }

    #[test]
    fn readiness_is_asked_on_this_host_alone() {
        for right in ["http://127.0.0.1:80/alive?x=1", "tcp:8443", "notify"] {
            assert_eq!(Readiness::read(right).unwrap().to_string(), right);
        }
        assert_eq!(Readiness::read("http://localhost:80").unwrap().to_string(), "http://127.0.0.1:80/");
        for wrong in [
            "http://10.0.0.1:80/",
            "https://127.0.0.1:80/",
            "http://127.0.0.1/",
            "tcp:",
            "tcp:0",
            "http://127.0.0.1:1/ä",
        ] {
            assert_eq!(Readiness::read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn patterns_stay_inside_the_folder() {
        assert_eq!(patterns("cache/**, logs/*.log").unwrap(), ["cache/**", "logs/*.log"]);
        for wrong in ["/etc/**", "../x", "a/../../b"] {
            assert_eq!(patterns(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_user_has_a_usual_name() {
        assert_eq!(user("www-data").as_deref(), Some("www-data"));
        for wrong in ["", "-x", "a b", "a:b", "root\n"] {
            assert_eq!(user(wrong), None, "{wrong}");
        }
    }
}
