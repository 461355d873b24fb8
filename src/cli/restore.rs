//! `twistcli restore`: brings a backup back into the whole cluster, on the host that is PRIMARY. Shows what there is,
//! asks which one, and says what is lost. Everything else belongs to the daemon.

use std::{
    fs,
    io::{self, IsTerminal},
    path::{Path, PathBuf},
};

use clap::Args;

use super::{
    backup::{all_backups, backup_copies, backup_state, fetch_copy, wait_for_job},
    client::ApiClient,
    columns,
    quantity::{date, size},
    stop::{EX_NOINPUT, EX_USAGE, Stop, ask, confirm},
    target::Target,
};
use crate::{
    backup::{Backup, BackupId, BackupState, MemberBackups, RemoteBackup, Started},
    console::backups::File,
    control::Call,
};

/// The help of `twistcli restore`.
pub(super) const HELP: &str = "\
Runs on the PRIMARY's host. The Console is closed, the whole database is replaced by that of the backup, on
all members, and the Console is opened again. All that was written since the backup was made is lost, and
everybody has to log in again. The backup must have been made by exactly the same version. It is checked
before anything is changed.

Without a file, the backups of the folder are listed for you to choose from. With --remote you choose one of
the copies at BACKUP_URL, which is fetched into the folder first.

Exit code: 0 done, 1 it failed, 64 wrong command line, 66 there is no such backup, 69 nobody answers,
75 refused or not confirmed.

Examples:
  sudo twistcli restore
  sudo twistcli restore --data-recovery-folder /mnt/safe
  sudo twistcli restore --remote
  sudo twistcli restore /mnt/safe/daily-0.1.0-1793383200.tar.gz --stop-console --yes";

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    #[command(flatten)]
    target: Target,
    /// A backup, or a folder of backups [default: the folder of this host's backups]
    #[arg(value_name = "PATH")]
    path: Option<PathBuf>,
    /// A folder of backups
    #[arg(long, value_name = "DIR", conflicts_with = "path")]
    data_recovery_folder: Option<PathBuf>,
    /// Fetch a copy from BACKUP_URL [default: list them and ask]
    #[arg(long, value_name = "COPY", num_args = 0..=1, conflicts_with_all = ["path", "data_recovery_folder"])]
    remote: Option<Option<String>>,
    /// Close the Console for it; otherwise you are asked
    #[arg(long)]
    stop_console: bool,
    /// Accept a backup that is not encrypted although BACKUP_KEY_FILE is set: whoever can write there may have made it
    #[arg(long)]
    unencrypted: bool,
    /// Do not ask; needed where standard input is no terminal
    #[arg(long, short)]
    yes: bool,
}

/// A backup in a folder.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    path: PathBuf,
    id: BackupId,
}

/// Restores a backup.
///
/// # Errors
/// When nobody answers, it is refused, or nobody confirms.
pub(super) fn run(args: &RestoreArgs) -> Result<(), Stop> {
    let client = target_here(&args.target)?;
    let path = match &args.remote {
        Some(copy) => fetched(&client, copy.as_deref())?,
        None => named(&client, args)?,
    };
    let unreadable = |error: io::Error| Stop::tell(EX_NOINPUT, &format!("{}: {error}", path.display()));
    let file = fs::canonicalize(&path).map_err(unreadable)?;
    let status = client.primary(&format!("twistcli restore {}", file.display()))?;
    eprintln!(
        "{} replaces the whole database of {}.\nAll that was written since it was made is lost. The Console is closed meanwhile, \
         and everybody has to log in again.",
        columns::harmless(&file.display().to_string()),
        status.members.iter().map(|member| member.name.as_str()).collect::<Vec<_>>().join(", ")
    );
    if !args.stop_console && args.yes {
        return Err(Stop::tell(EX_USAGE, "a restore closes the Console: give --stop-console, too"));
    }
    confirm("Close the Console and restore it?", args.yes)?;
    let wanted = File { file, stop_console: true, unencrypted: args.unencrypted };
    let started: Started = client.call(&Call::post("restore").with(wanted))?;
    wait_for_job(&client, &started)
}

/// The file that was named, or chosen in a folder.
fn named(client: &ApiClient, args: &RestoreArgs) -> Result<PathBuf, Stop> {
    match args.path.as_ref().or(args.data_recovery_folder.as_ref()) {
        Some(path) if path.is_file() => Ok(path.clone()),
        Some(folder) => choose(folder),
        None => {
            let all: Vec<Backup> = client.call(&all_backups())?;
            let state: BackupState = client.call(&backup_state())?;
            eprint!("{}", elsewhere(&all, &state));
            choose(Path::new(&state.folder))
        }
    }
}

/// What the other members have. It is not in the list to choose from, as their files are not on this host.
fn elsewhere(all: &[Backup], state: &BackupState) -> String {
    let line = |member: &MemberBackups| {
        let node = &member.node;
        if let Some(problem) = &member.problem {
            return Some(format!("What {node} has is unknown: {problem}"));
        }
        let newest = &all.iter().find(|backup| backup.node == *node)?.id;
        let (folder, here) = (member.folder.as_deref().unwrap_or_default(), &state.folder);
        Some(format!(
            "{node} has backups in {folder}, the newest {newest}: to restore one, copy it into {here} here, or make {node} PRIMARY \
             (twistcli ha switchover --to {node}) and run this there"
        ))
    };
    let lines = state.members.iter().skip(1).filter_map(line);
    lines.map(|line| format!("{}\n", columns::harmless(&line))).collect()
}

/// Fetches a copy from `BACKUP_URL` into the folder. Returns its path.
fn fetched(client: &ApiClient, copy: Option<&str>) -> Result<PathBuf, Stop> {
    // A copy in another host's folder would be of no use.
    client.primary("twistcli restore --remote")?;
    let state: BackupState = client.call(&backup_state())?;
    let place = match copy {
        Some(place) => place.to_owned(),
        None => {
            let found: Vec<RemoteBackup> = client.call(&backup_copies())?;
            let line = |copy: &RemoteBackup| {
                format!("{}  {}  {}", columns::harmless(&copy.place), date(copy.backup.time), size(copy.backup.bytes))
            };
            let lines: Vec<String> = found.iter().map(line).collect();
            let what = state.copies.map_or_else(|| "BACKUP_URL".to_owned(), |copies| copies.url);
            found[pick(&lines, &columns::harmless(&what))?].place.clone()
        }
    };
    Ok(Path::new(&state.folder).join(fetch_copy(client, &place)?))
}

/// The daemon of this host: the file is there, and whoever may restore it.
fn target_here(target: &Target) -> Result<ApiClient, Stop> {
    match target.client()? {
        ApiClient::Remote(_) => {
            let why = "a restore is made on the PRIMARY's host, without --address (and without TWISTLOCK_ADDRESS)";
            Err(Stop::tell(EX_USAGE, why))
        }
        client => Ok(client),
    }
}

/// Lists the backups of a folder and asks for one.
fn choose(folder: &Path) -> Result<PathBuf, Stop> {
    let found = backups(folder).map_err(|error| Stop::tell(EX_NOINPUT, &format!("{}: {error}", folder.display())))?;
    let width = found.iter().map(|one| one.id.name.chars().count()).max().unwrap_or(0);
    let line = |one: &Found| {
        let name = columns::harmless(&one.id.name);
        format!("{name:width$}  {}  {}", columns::harmless(&one.id.version), date(one.id.time))
    };
    let lines: Vec<String> = found.iter().map(line).collect();
    Ok(found[pick(&lines, &folder.display().to_string())?].path.clone())
}

/// Lists what there is and asks for the number of one.
fn pick(lines: &[String], place: &str) -> Result<usize, Stop> {
    if lines.is_empty() {
        return Err(Stop::tell(EX_NOINPUT, &format!("{place}: there are no backups in it")));
    }
    for (number, line) in lines.iter().enumerate() {
        eprintln!("{number}: {line}");
    }
    if !io::stdin().is_terminal() {
        return Err(Stop::tell(EX_USAGE, "standard input is no terminal: name the file of the backup"));
    }
    let answer = ask("Which one (a number)?")?;
    let chosen = answer.parse::<usize>().ok().filter(|number| *number < lines.len());
    chosen.ok_or_else(|| Stop::refuse(&format!("{answer:?} is none of the numbers")))
}

/// The backups of a folder, the newest first.
fn backups(folder: &Path) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let id = path.file_name().and_then(|name| name.to_str()).and_then(|name| BackupId::read(name).ok());
        found.extend(id.map(|id| Found { path, id }));
    }
    found.sort_by(|a, b| b.id.time.cmp(&a.id.time).then_with(|| a.path.cmp(&b.path)));
    Ok(found)
}
