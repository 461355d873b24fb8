//! From the bytes of a file to a configuration: collects every problem and note on the way. Pure: the environment is
//! passed in.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    Audience, Config, ConfigErrors, KEYS, Key, Loaded, MAX_FILE, MAX_LINE, MAX_REPORTED, Note, Problem, Severity,
    keys::{CONSOLE_CN, HEALTH_ALLOW, HEALTH_PORT, HOST_NAME_LINE, IGNORED, IGNORED_FAMILIES},
    line::{self, Line},
    service,
};

/// How long a socket's path may be, in bytes: `sun_path` of Linux without its final zero.
const MAX_SOCKET_PATH: usize = 107;
/// How much of a value a message repeats, in characters.
const MAX_SHOWN: usize = 80;
/// The lease ends this long before a new primary could serve at the earliest.
const LEASE_MARGIN: Duration = Duration::from_millis(50);

/// Looks up the variables of `${VAR-default}` in the environment.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Reads the text of a file.
///
/// # Errors
/// [`ConfigErrors::Invalid`] with all problems of the text.
pub fn parse(text: impl AsRef<[u8]>, file: &str, env: Environment<'_>) -> Result<Loaded, ConfigErrors> {
    read(text.as_ref(), file, env).finish()
}

/// What a file sets each key to, known or not. Reads as [`parse`] does, and refuses for the same reasons.
///
/// # Errors
/// [`ConfigErrors::Invalid`] with all problems of the text.
pub(super) fn assigned(
    text: &[u8],
    file: &str,
    env: Environment<'_>,
) -> Result<BTreeMap<String, Assigned>, ConfigErrors> {
    let mut reader = read(text, file, env);
    let assigned = std::mem::take(&mut reader.assigned);
    reader.finish().map(|_| assigned)
}

/// What the last line of a key sets it to.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Assigned {
    pub(super) value: String,
    /// What stands right of the `=`.
    pub(super) raw: String,
}

/// The lines of a file, without what editors of other systems put at their ends and before the first.
pub(super) fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    text.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line))
}

fn read<'a>(text: &[u8], file: &'a str, env: Environment<'a>) -> Reader<'a> {
    let mut reader = Reader::new(file, env);
    if text.len() > MAX_FILE {
        reader.problem(None, None, "a larger file", &format!("a file of up to {MAX_FILE} bytes"));
        return reader;
    }
    for (index, line) in lines(text).enumerate() {
        reader.line(index + 1, line);
    }
    reader.ignored();
    reader.health();
    reader.ports();
    reader.timing();
    reader.service();
    reader.other_rules();
    reader
}

struct Reader<'a> {
    file: &'a str,
    env: Environment<'a>,
    config: Config,
    /// The line that set a known key last.
    set: BTreeMap<&'static str, usize>,
    /// Known keys whose last value was refused: rules about several keys leave them alone.
    failed: BTreeSet<&'static str>,
    /// What the lines so far have set; a later `${VAR-default}` sees it, as in a shell.
    assigned: BTreeMap<String, Assigned>,
    /// Lines and keys that mean nothing here.
    ignored: Vec<(usize, String)>,
    notes: Vec<Note>,
    more_notes: usize,
    problems: Vec<Problem>,
    more_problems: usize,
}

impl<'a> Reader<'a> {
    fn new(file: &'a str, env: Environment<'a>) -> Self {
        Self {
            file,
            env,
            config: Config::default(),
            set: BTreeMap::new(),
            failed: BTreeSet::new(),
            assigned: BTreeMap::new(),
            ignored: Vec::new(),
            notes: Vec::new(),
            more_notes: 0,
            problems: Vec::new(),
            more_problems: 0,
        }
    }

    fn problem(&mut self, line: Option<usize>, key: Option<&str>, found: &str, allowed: &str) {
        if self.problems.len() == MAX_REPORTED {
            self.more_problems += 1;
            return;
        }
        self.problems.push(Problem {
            file: self.file.to_owned(),
            line,
            key: key.map(shown),
            found: shown(found),
            allowed: allowed.to_owned(),
        });
    }

    fn note(&mut self, severity: Severity, line: usize, text: &str) {
        if self.notes.len() == MAX_REPORTED {
            self.more_notes += 1;
            return;
        }
        self.notes.push(Note { severity, text: format!("{}:{line}: {text}", self.file) });
    }

    fn line(&mut self, number: usize, bytes: &[u8]) {
        if bytes.len() > MAX_LINE {
            let allowed = format!("a line of up to {MAX_LINE} bytes");
            return self.problem(Some(number), None, &format!("{} bytes", bytes.len()), &allowed);
        }
        let Ok(text) = std::str::from_utf8(bytes) else {
            return self.problem(Some(number), None, &String::from_utf8_lossy(bytes), "text in UTF-8");
        };
        if let Some(strange) = text.chars().find(|c| c.is_control() && *c != '\t') {
            return self.problem(Some(number), None, &strange.to_string(), "text without control characters");
        }
        if line::trim(text) == HOST_NAME_LINE {
            let raw = HOST_NAME_LINE.split_once('=').map_or("", |(_, raw)| raw);
            return self.assign(number, CONSOLE_CN, raw, String::new());
        }
        match line::split(text) {
            Ok(Line::Nothing) => {}
            Ok(Line::Assignment(name, value)) => {
                let earlier = |name: &str| self.assigned.get(name).map(|assigned| assigned.value.clone());
                let lookup = |name: &str| earlier(name).or_else(|| (self.env)(name));
                match line::value(value, &lookup) {
                    Ok(read) => self.assign(number, name, value, read),
                    Err(refused) => {
                        let key = known(name);
                        self.failed.extend(key.map(|key| key.name));
                        let secret = key.is_some_and(|key| key.slot(&mut self.config).is_secret());
                        let found = if secret { NOT_SHOWN } else { &refused.found };
                        self.problem(Some(number), Some(name), found, refused.allowed);
                    }
                }
            }
            Err(refused) => self.problem(Some(number), None, &refused.found, refused.allowed),
        }
    }

    fn assign(&mut self, line: usize, name: &str, raw: &str, value: String) {
        if let Some(key) = known(name) {
            self.assign_known(line, key, &value);
        } else if IGNORED.contains(&name) || IGNORED_FAMILIES.iter().any(|family| name.starts_with(family)) {
            self.ignored.push((line, name.to_owned()));
        } else {
            let hint = match nearest(name) {
                Some(near) => format!("; did you mean {near}?"),
                None => String::new(),
            };
            self.note(Severity::Warning, line, &format!("{}: unknown key, not used{hint}", shown(name)));
        }
        self.assigned.insert(name.to_owned(), Assigned { value, raw: raw.to_owned() });
    }

    fn assign_known(&mut self, line: usize, key: &'static Key, value: &str) {
        if let Some(earlier) = self.set.insert(key.name, line) {
            let text = format!("{}: set a second time; line {earlier} does not count", key.name);
            self.note(Severity::Warning, line, &text);
        }
        if key.slot(&mut self.config).read(value).is_some() {
            self.failed.remove(key.name);
        } else {
            self.failed.insert(key.name);
            let secret = key.slot(&mut self.config).is_secret();
            let shown = if secret { NOT_SHOWN } else { value };
            self.problem(Some(line), Some(key.name), shown, &key.allowed());
        }
    }

    /// One information line for all keys that mean nothing here.
    fn ignored(&mut self) {
        let Some((line, _)) = self.ignored.first() else { return };
        let names: BTreeSet<&str> = self.ignored.iter().map(|(_, name)| name.as_str()).collect();
        let mut list: Vec<&str> = names.iter().copied().take(8).collect();
        if names.len() > list.len() {
            list.push("...");
        }
        let text = format!("not used here: {}", shown(&list.join(", ")));
        self.note(Severity::Info, *line, &text);
    }

    /// Files of earlier versions know neither a health port that is on by itself nor a choice of who is answered there.
    fn health(&mut self) {
        let Some(port) = self.config.health_port else { return };
        let others = [
            ("MANAGEMENT_PORT_HTTP", self.config.management_port_http),
            ("MANAGEMENT_PORT_HTTPS", self.config.management_port_https),
            ("COMMUNICATION_PORT", self.config.communication_port),
            ("HIGH_AVAILABILITY_PORT", self.config.high_availability_port),
        ];
        match self.set.get(HEALTH_PORT).copied() {
            None => {
                let Some((other, _)) = others.iter().find(|(_, other)| *other == Some(port)) else { return };
                self.config.health_port = None;
                let line = self.set.get(other).copied().unwrap_or_default();
                let text = format!("{other}: it has port {port}, so there is no status page: give it a HEALTH_PORT");
                self.note(Severity::Info, line, &text);
            }
            Some(line) if !self.set.contains_key(HEALTH_ALLOW) => {
                self.config.health_allow = Audience::everybody();
                let text = "HEALTH_PORT: everybody is answered there, as in earlier versions: say who in HEALTH_ALLOW";
                self.note(Severity::Info, line, text);
            }
            Some(_) => {}
        }
    }

    /// Two services may not share a port.
    fn ports(&mut self) {
        let ports = [
            ("MANAGEMENT_PORT_HTTP", self.config.management_port_http),
            ("MANAGEMENT_PORT_HTTPS", self.config.management_port_https),
            ("COMMUNICATION_PORT", self.config.communication_port),
            ("HIGH_AVAILABILITY_PORT", self.config.high_availability_port),
            (HEALTH_PORT, self.config.health_port),
        ];
        for (index, (second, port)) in ports.iter().enumerate() {
            for (first, other) in &ports[..index] {
                let Some(port) = port.filter(|_| port == other) else { continue };
                if self.failed.contains(first) || self.failed.contains(second) {
                    continue;
                }
                // The later line is the one to blame; a default has no line.
                let (blamed, has_it) =
                    if self.set.get(first) > self.set.get(second) { (*first, *second) } else { (*second, *first) };
                let allowed = format!("a port that no other service has ({has_it} has this one)");
                self.problem(self.set.get(blamed).copied(), Some(blamed), &port.to_string(), &allowed);
            }
        }
        let needed_for = [
            ("HIGH_AVAILABILITY_ENABLED", self.config.high_availability_enabled),
            ("CLUSTERED_DB_ENABLED", self.config.clustered_db_enabled),
        ];
        if let Some((key, _)) = needed_for.into_iter().find(|(_, enabled)| *enabled)
            && self.config.high_availability_port.is_none()
            && !self.failed.contains("HIGH_AVAILABILITY_PORT")
        {
            let line = self.set.get("HIGH_AVAILABILITY_PORT").copied();
            let allowed = format!("a port from 1 to 65535 while {key}=true");
            self.problem(line, Some("HIGH_AVAILABILITY_PORT"), "", &allowed);
        }
    }

    /// The lease must end before another node can serve (`docs/design.md`, "Lease and promise"), and outlive a few lost
    /// heartbeats.
    fn timing(&mut self) {
        const INVOLVED: [&str; 3] = ["LEASE_MS", "TICK_MS", "ELECTION_TICKS"];
        if INVOLVED.iter().any(|key| self.failed.contains(key)) {
            return;
        }
        let Config { lease, tick, election_ticks, .. } = self.config;
        let longest = (tick * (election_ticks - 1)).saturating_sub(LEASE_MARGIN).as_millis();
        let shortest = (tick * 4).as_millis();
        if (shortest..=longest).contains(&lease.as_millis()) {
            return;
        }
        let allowed = format!(
            "{shortest} to {longest} with TICK_MS={} and ELECTION_TICKS={election_ticks} \
             (4 * TICK_MS to (ELECTION_TICKS - 1) * TICK_MS - {})",
            tick.as_millis(),
            LEASE_MARGIN.as_millis()
        );
        let line = INVOLVED.iter().find_map(|key| self.set.get(key)).copied();
        self.problem(line, Some("LEASE_MS"), &lease.as_millis().to_string(), &allowed);
    }

    /// What the keys of a service must be together.
    fn service(&mut self) {
        if self.failed.iter().any(|key| key.starts_with("SERVICE_")) {
            return;
        }
        for (key, found, allowed) in service::rules(&self.config) {
            let line = self.set.get(key).or_else(|| self.set.get("SERVICE_COMMAND")).copied();
            self.problem(line, Some(key), &found, &allowed);
        }
    }

    fn other_rules(&mut self) {
        let socket = self.config.control_socket_path();
        if socket.as_os_str().len() > MAX_SOCKET_PATH {
            let line = self.set.get("CONTROL_SOCKET").or_else(|| self.set.get("DATA_FOLDER")).copied();
            let allowed =
                format!("a socket's path of up to {MAX_SOCKET_PATH} bytes (empty: control.sock in DATA_FOLDER)");
            self.problem(line, Some("CONTROL_SOCKET"), &socket.display().to_string(), &allowed);
        }
        if self.config.clustered_db_secret_file.is_some() && !self.config.clustered_db_enabled {
            let line = self.set.get("CLUSTERED_DB_SECRET_FILE").copied().unwrap_or_default();
            let text = "CLUSTERED_DB_SECRET_FILE: not used without CLUSTERED_DB_ENABLED=true";
            self.note(Severity::Warning, line, text);
        }
    }

    fn finish(mut self) -> Result<Loaded, ConfigErrors> {
        if !self.problems.is_empty() {
            self.problems.sort_by_key(|problem| problem.line);
            return Err(ConfigErrors::Invalid { problems: self.problems, more: self.more_problems });
        }
        if self.more_notes > 0 {
            let text = format!("{}: {} more notes", self.file, self.more_notes);
            self.notes.push(Note { severity: Severity::Warning, text });
        }
        Ok(Loaded { config: self.config, notes: self.notes })
    }
}

/// What a message says in the place of a secret.
const NOT_SHOWN: &str = "a value that is not shown";

fn known(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// A piece of a file as a message may repeat it: on one line, printable, not too long.
fn shown(text: &str) -> String {
    let mut out: String = text.chars().take(MAX_SHOWN).flat_map(|c| c.escape_debug()).collect();
    // A message has its own quotation marks around this; the file's need no escaping.
    out = out.replace("\\\"", "\"").replace("\\'", "'");
    if text.chars().nth(MAX_SHOWN).is_some() {
        out.push_str("...");
    }
    out
}

/// The known key that an unknown one was probably meant to be.
fn nearest(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_uppercase();
    if name.len() > 64 {
        return None;
    }
    let (distance, key) = KEYS.iter().map(|key| (distance(&name, key.name), key.name)).min()?;
    (distance <= (key.len() / 4).max(2)).then_some(key)
}

/// How many single letters must be inserted, removed or replaced to turn one word into the other.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_allowed_and_names_are_unique() {
        let mut config = Config::blank();
        for key in KEYS {
            assert!(key.slot(&mut config).read(key.default).is_some(), "{}", key.name);
            assert_eq!(KEYS.iter().filter(|other| other.name == key.name).count(), 1, "{}", key.name);
        }
    }

    #[test]
    fn distance_counts_single_edits() {
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("LEASE_MS", "LEASE_MS"), 0);
    }

    #[test]
    fn the_nearest_key_is_offered_only_when_it_is_near() {
        assert_eq!(nearest("MANAGEMENT_PORT_HTPS"), Some("MANAGEMENT_PORT_HTTPS"));
        assert_eq!(nearest("lease_ms"), Some("LEASE_MS"));
        assert_eq!(nearest("SOMETHING_ELSE"), None);
    }
}
