//! Where a member's data may be on this host: the folders that the installed settings, earlier ones, the unit and
//! running daemons point to. An installation that would found a cluster asks here first. Must never miss a place
//! because a file cannot be read: that is an error.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::ErrorKind,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{
    place::{Place, UNIT},
    voice::Failure,
};
use crate::{
    config::{self, EX_CONFIG},
    storage::{Identity, membership::StoredMembership},
};

/// Largest unit or environment file that is read, in bytes.
const MAX_FILE: u64 = 256 << 10;
/// What a member's data folder has, and what a node that lost its identity still has.
const PARTS: [&str; 4] = ["identity.json", "membership.json", "raft-log", "database"];
/// Folders of units, the administrator's first.
const UNIT_FOLDERS: [&str; 4] =
    ["/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"];

/// A folder, and what points to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trace {
    pub(super) folder: PathBuf,
    /// A part of a sentence.
    pub(super) named_by: String,
}

/// Variables of a process.
pub(super) type Variables = BTreeMap<String, String>;

/// What starts a daemon: its configuration file and its environment.
struct Start {
    config: PathBuf,
    variables: Variables,
    by: String,
}

/// Whose data a folder has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Data {
    Nothing,
    /// A member's. The number of members of its cluster.
    Member(usize),
    /// A node's, but nobody can tell which.
    Unclear,
}

impl Data {
    /// Looks into a folder.
    pub(super) fn of(folder: &Path) -> Self {
        match (StoredMembership::read(folder), Identity::read(folder)) {
            (Ok(Some(now)), Ok(_)) => Self::Member(now.membership.roster.members.len()),
            (Ok(None), Ok(first)) => Self::Member(first.membership.roster.members.len()),
            _ if PARTS.iter().any(|part| fs::symlink_metadata(folder.join(part)).is_ok()) => Self::Unclear,
            _ => Self::Nothing,
        }
    }

    /// True if others may count on this host.
    pub(super) fn has_peers(self) -> bool {
        !matches!(self, Self::Nothing | Self::Member(0 | 1))
    }
}

/// All folders that may hold a member's data, each once.
///
/// # Errors
/// When a file that would name one cannot be read.
pub(super) fn find(place: &Place) -> Result<Vec<Trace>, Failure> {
    let mut traces = vec![Trace { folder: place.at("/var/lib/twistlock"), named_by: "the default".to_owned() }];
    let mut starts = vec![installed(place)];
    starts.extend(unit_start(place)?);
    for folder in unit_folders(place)? {
        traces.push(Trace { folder, named_by: format!("a drop-in of {UNIT}") });
    }
    for daemon in Daemon::all(place) {
        let by = format!("the running daemon (pid {})", daemon.pid);
        traces.extend(daemon.folders().into_iter().map(|folder| Trace { folder, named_by: by.clone() }));
        starts.push(Start { config: daemon.config(place), variables: daemon.variables(), by });
    }
    for Start { config, variables, by } in starts {
        if let Some(folder) = data_folder(&config, &variables)? {
            traces.push(Trace { folder, named_by: by });
        }
    }
    for earlier in earlier_configs(place) {
        // An old one may be unreadable for a reason that was mended since.
        if let Ok(Some(folder)) = data_folder(&earlier, &Variables::new()) {
            traces.push(Trace { folder, named_by: earlier.display().to_string() });
        }
    }
    let mut seen = BTreeSet::new();
    traces.retain(|trace| {
        let folder = fs::canonicalize(&trace.folder).unwrap_or_else(|_| trace.folder.clone());
        place.has(&trace.folder) && seen.insert(folder)
    });
    Ok(traces)
}

/// The environment in which the installed daemon reads its settings: that of the running one, or of its unit; none if
/// there is neither.
///
/// # Errors
/// When a file of the unit cannot be read.
pub(super) fn environment(place: &Place) -> Result<Option<Variables>, Failure> {
    let running = Daemon::all(place).into_iter().find(|daemon| daemon.config(place) == place.config());
    match running {
        Some(daemon) => Ok(Some(daemon.variables())),
        None => Ok(unit_start(place)?.map(|start| start.variables)),
    }
}

fn installed(place: &Place) -> Start {
    let config = place.config();
    Start { by: format!("the installed {}", config.display()), config, variables: std::env::vars().collect() }
}

fn earlier_configs(place: &Place) -> Vec<PathBuf> {
    let folder = place.config().parent().map(Path::to_owned).unwrap_or_default();
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("twistlock.cfg.before-"))
        .map(|entry| entry.path())
        .collect()
}

/// The data folder that a file names; none if there is no such file.
fn data_folder(file: &Path, variables: &Variables) -> Result<Option<PathBuf>, Failure> {
    match config::load_in(file, &|name| variables.get(name).cloned()) {
        Ok(loaded) => Ok(Some(loaded.config.data_folder)),
        Err(config::ConfigErrors::Unreadable { error, .. }) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(errors) => {
            let why = format!("{} cannot be used, so nobody can tell where this host's data is", file.display());
            let mend = format!("Mend it (twistlockd check-config {}), or move it away.", file.display());
            Err(Failure::new(EX_CONFIG, why).hint(errors).hint(mend).hint("Nothing was changed."))
        }
    }
}

/// The lines of the unit and its drop-ins, as key and value.
fn unit_lines(place: &Place) -> Result<Vec<(String, String)>, Failure> {
    if !place.is_real() {
        return Ok(Vec::new());
    }
    let mut files = Vec::new();
    for folder in UNIT_FOLDERS.map(PathBuf::from) {
        files.push(folder.join(UNIT));
        let drop_ins = fs::read_dir(folder.join(format!("{UNIT}.d"))).into_iter().flatten().flatten();
        files.extend(
            drop_ins.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "conf")),
        );
    }
    let mut lines = Vec::new();
    for file in files {
        let text = read_small(&file)?.replace("\\\n", " ");
        let pairs = text.lines().filter_map(|line| line.trim().split_once('='));
        let pairs = pairs.filter(|(key, _)| !key.starts_with(['#', ';']));
        lines.extend(pairs.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned())));
    }
    Ok(lines)
}

/// A file's text; empty if there is no such file.
fn read_small(path: &Path) -> Result<String, Failure> {
    use std::io::Read;
    let mut bytes = Vec::new();
    match fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes)) {
        Ok(_) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(Failure::new(EX_CONFIG, format!("{} cannot be read: {error}", path.display()))),
    }
}

fn unit_start(place: &Place) -> Result<Option<Start>, Failure> {
    let mut start = None;
    let mut variables = Variables::new();
    for (key, value) in unit_lines(place)? {
        match key.as_str() {
            "ExecStart" if !value.is_empty() => start = Some(config_argument(&words(&value))),
            "Environment" => variables.extend(words(&value).iter().filter_map(|word| assignment(word))),
            "EnvironmentFile" => {
                let text = read_small(Path::new(value.trim_start_matches('-')))?;
                let lines = text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';']));
                // Quotes may begin behind the "=".
                variables.extend(lines.filter_map(|line| assignment(&words(line).join(" "))));
            }
            _ => {}
        }
    }
    let default = || place.config();
    Ok(start.map(|config| Start { config: config.unwrap_or_else(default), variables, by: UNIT.to_owned() }))
}

fn unit_folders(place: &Place) -> Result<Vec<PathBuf>, Failure> {
    let lines = unit_lines(place)?;
    let paths = lines.iter().filter(|(key, _)| key == "ReadWritePaths").flat_map(|(_, value)| words(value));
    Ok(paths.map(|path| PathBuf::from(path.trim_start_matches(['-', '+']).replace("%%", "%"))).collect())
}

fn assignment(word: &str) -> Option<(String, String)> {
    word.split_once('=').map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
}

/// The words of a line of a unit: separated by blanks, unless they are in quotes or behind a backslash.
fn words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match (letter, quote) {
            (letter, Some(open)) if letter == open => quote = None,
            ('"' | '\'', None) => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            ('\\', _) => word.get_or_insert_default().extend(letters.next()),
            (letter, None) if letter.is_whitespace() => words.extend(word.take()),
            (letter, _) => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    words
}

/// What stands behind `--config`.
fn config_argument(arguments: &[String]) -> Option<PathBuf> {
    let at = arguments.iter().position(|argument| argument == "--config" || argument.starts_with("--config="))?;
    let value = arguments[at].strip_prefix("--config=").map(str::to_owned);
    value.or_else(|| arguments.get(at + 1).cloned()).map(PathBuf::from)
}

/// A running daemon of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Daemon {
    pub(super) pid: i32,
}

impl Daemon {
    /// All daemons of this host. Those inside containers are not this host's.
    pub(super) fn all(place: &Place) -> Vec<Self> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let daemons = pids.filter(|pid| *pid != std::process::id() as i32).filter_map(Self::of);
        daemons.filter(|daemon| place.has(&daemon.config(place))).collect()
    }

    /// The process, if it is a daemon that runs.
    pub(super) fn of(pid: i32) -> Option<Self> {
        let daemon = Self { pid };
        let program = fs::read_link(daemon.file("exe")).ok()?;
        let own = fs::read_link("/proc/self/ns/pid").ok();
        // A replaced program is still "twistlockd (deleted)".
        let named = program.file_name()?.to_str()?.starts_with("twistlockd");
        let runs = daemon.arguments().get(1).is_some_and(|command| command == "run");
        (named && runs && fs::read_link(daemon.file("ns/pid")).ok() == own).then_some(daemon)
    }

    /// The daemon that has the lock of this data folder. The number in the lock file proves nothing: it comes back.
    pub(super) fn of_data(place: &Place, data: &Path) -> Option<Self> {
        let lock = fs::metadata(data.join("lock")).ok()?;
        let same =
            |open: PathBuf| fs::metadata(open).is_ok_and(|open| (open.dev(), open.ino()) == (lock.dev(), lock.ino()));
        Self::all(place).into_iter().find(|daemon| daemon.open_files().into_iter().any(same))
    }

    fn file(self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid))
    }

    fn open_files(self) -> Vec<PathBuf> {
        fs::read_dir(self.file("fd")).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    }

    fn strings(self, name: &str) -> Vec<String> {
        let bytes = fs::read(self.file(name)).unwrap_or_default();
        bytes.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned()).collect()
    }

    fn arguments(self) -> Vec<String> {
        self.strings("cmdline")
    }

    /// The configuration file that it was started with.
    pub(super) fn config(self, place: &Place) -> PathBuf {
        let named = config_argument(&self.arguments()).unwrap_or_else(|| place.config());
        // As the process sees it.
        fs::read_link(self.file("cwd")).map_or_else(|_| named.clone(), |folder| folder.join(&named))
    }

    fn variables(self) -> Variables {
        let texts = self.strings("environ");
        let pairs = texts.iter().filter_map(|text| text.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// The data folders whose locks it has, whatever its settings say by now.
    fn folders(self) -> Vec<PathBuf> {
        let files = self.open_files().into_iter().filter_map(|open| fs::read_link(open).ok());
        let locks = files.filter(|file| file.file_name().is_some_and(|name| name == "lock"));
        locks.filter_map(|lock| lock.parent().map(Path::to_owned)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_unit_are_told_apart() {
        let line = r#"twistlockd run --config "/etc/my twistlock.cfg" 'A=b c' d\ e"#;
        assert_eq!(words(line), ["twistlockd", "run", "--config", "/etc/my twistlock.cfg", "A=b c", "d e"]);
        assert_eq!(config_argument(&words(line)), Some("/etc/my twistlock.cfg".into()));
        assert_eq!(config_argument(&words("x --config=/a")), Some("/a".into()));
        assert_eq!(config_argument(&words("x run")), None);
    }

    #[test]
    fn data_that_nobody_can_explain_counts_as_a_members() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Data::of(folder.path()), Data::Nothing);
        fs::create_dir(folder.path().join("raft-log")).unwrap();
        assert_eq!(Data::of(folder.path()), Data::Unclear);
        assert!(Data::Unclear.has_peers() && Data::Member(2).has_peers());
        assert!(!Data::Member(1).has_peers() && !Data::Nothing.has_peers());
    }
}
