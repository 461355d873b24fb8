//! `twistcli backup`: makes, checks, fetches and deletes backups of all databases. The daemon carries out each step.
//! Must never overwrite a file of the administrator's.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use ureq::http::Method;

use super::{
    args::DONE_OR_REFUSED,
    client::ApiClient,
    columns::{self, Cell, Paint, print_json, progress_bar, say, watched},
    quantity::{date, duration, size},
    remote::{Remote, segment},
    stop::{EX_FOUND, EX_IOERR, EX_TEMPFAIL, EX_UNAVAILABLE, EX_USAGE, Stop, confirm},
    target::Target,
    unpack,
};
use crate::{
    backup::{Backup, BackupState, CopyState, MemberBackups, Outcome, RemoteBackup, Started},
    control::Call,
    https,
};

const CREATE_HELP: &str = "\
The backup is made from one host's copy of the database: this host's, or with --address the PRIMARY's. It is
opened and checked before it counts as good. Replication goes on meanwhile.

Exit code: 0 done, 1 the backup is not good, 64 wrong command line, 69 nobody answers, 75 refused, 77 the
login is refused.

Examples:
  twistcli backup create before-the-upgrade
  twistcli backup create nightly --no-wait";

const VERIFY_HELP: &str = "\
Opens the backup and checks all of it: checksums, every page, and the database's own integrity check.

Exit code: 0 it is good, 1 it is damaged, 64 wrong command line, 69 nobody answers, 75 refused,
77 the login is refused.

Examples:
  twistcli backup verify before-the-upgrade-0.1.0-1793383200.tar.gz";

const LIST_HELP: &str = "\
The backups of all members, each with the member in whose folder it lies. If a member does not answer within
a few seconds, it is unknown what it has. With --remote: the copies at BACKUP_URL, those of all members and
of former clusters.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  twistcli backup list
  twistcli backup list --remote";

const FETCH_HELP: &str = "\
Brings a copy from BACKUP_URL into the folder of this host's backups, where it is called fetched-NODE-NAME.
It is kept until somebody deletes it. `twistcli restore --remote` does this by itself.

Exit code: 0 done, 1 it could not be fetched, 64 wrong command line, 69 nobody answers, 75 refused.

Examples:
  sudo twistcli backup fetch 4711/node2/daily-0.1.0-1793383200.tar.gz";

const DOWNLOAD_HELP: &str = "\
Exit code: 0 done, 64 wrong command line, 69 nobody answers, 74 the file cannot be written, 75 refused,
77 the login is refused.

Examples:
  twistcli backup download before-the-upgrade-0.1.0-1793383200.tar.gz
  twistcli backup download before-the-upgrade-0.1.0-1793383200.tar.gz --to /mnt/safe";

/// Pause before the state of a job is asked for again.
const PACE: Duration = Duration::from_millis(250);
/// Longest wait for the end of a job.
const LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Commands of `twistcli backup`.
#[derive(Debug, Subcommand)]
pub(super) enum Backups {
    /// Make a backup now
    #[command(after_help = CREATE_HELP)]
    Create {
        #[command(flatten)]
        target: Target,
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        /// Return as soon as it has begun
        #[arg(long)]
        no_wait: bool,
    },
    /// List the backups of all members, the newest first, and how they are set up
    #[command(after_help = LIST_HELP)]
    List {
        #[command(flatten)]
        target: Target,
        /// List the copies at BACKUP_URL instead
        #[arg(long)]
        remote: bool,
        /// Print the backups and how they are set up as JSON
        #[arg(long)]
        json: bool,
    },
    /// Fetch a copy from BACKUP_URL into this host's folder
    #[command(after_help = FETCH_HELP)]
    Fetch {
        #[command(flatten)]
        target: Target,
        /// CLUSTER/NODE/FILE, as `backup list --remote` shows it
        #[arg(value_name = "COPY")]
        place: String,
    },
    /// Fetch a backup from the PRIMARY
    #[command(after_help = DOWNLOAD_HELP)]
    Download {
        #[command(flatten)]
        target: Target,
        /// Its file name, as `backup list` shows it
        #[arg(value_name = "BACKUP")]
        id: String,
        /// Folder, or name of the new file
        #[arg(long, value_name = "PATH", default_value = ".")]
        to: PathBuf,
    },
    /// Open a backup and check all of it
    #[command(after_help = VERIFY_HELP)]
    Verify {
        #[command(flatten)]
        target: Target,
        /// Its file name, as `backup list` shows it
        #[arg(value_name = "BACKUP")]
        id: String,
    },
    /// Make ordinary files of a backup
    #[command(after_help = unpack::HELP)]
    Unpack(unpack::Unpack),
    /// Rename a manual backup
    #[command(after_help = DONE_OR_REFUSED)]
    Rename {
        #[command(flatten)]
        target: Target,
        /// Its file name, as `backup list` shows it
        #[arg(value_name = "BACKUP")]
        id: String,
        /// Its new name
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Delete a backup
    #[command(after_help = DONE_OR_REFUSED)]
    Delete {
        #[command(flatten)]
        target: Target,
        /// Its file name, as `backup list` shows it
        #[arg(value_name = "BACKUP")]
        id: String,
        /// Do not ask; needed where standard input is no terminal
        #[arg(long, short)]
        yes: bool,
    },
}

/// Carries a command out.
///
/// # Errors
/// When nobody answers, or it is refused.
pub(super) fn run(command: &Backups, paint: Paint) -> Result<(), Stop> {
    match command {
        Backups::Create { target, name, no_wait } => {
            let client = target.client()?;
            let started: Started = client.call(&Call::post("backups?wait=false").with(name))?;
            if *no_wait {
                return say(&format!("{} is being made. See: twistcli backup list", started.id));
            }
            wait_for_job(&client, &started)
        }
        Backups::List { target, remote: true, json } => list_copies(&target.client()?, *json, paint),
        Backups::List { target, remote: false, json } => list(&target.client()?, *json, paint),
        Backups::Fetch { target, place } => fetch_copy(&target.client()?, place).map(|_| ()),
        Backups::Download { target, id, to } => download(&target.client()?, id, to),
        Backups::Verify { target, id } => {
            let client = target.client()?;
            let call = Call::post(format!("{}/verify?wait=false", one(id)));
            let started: Started = client.call(&call)?;
            wait_for_job(&client, &started)
        }
        Backups::Unpack(options) => unpack::run(options, paint),
        Backups::Rename { target, id, name } => {
            let renamed: Backup = target.client()?.call(&Call::patch(one(id)).with(name))?;
            say(&format!("It is now called {}.", renamed.id))
        }
        Backups::Delete { target, id, yes } => {
            let client = target.client()?;
            confirm(&format!("Delete the backup {id} for good?"), *yes)?;
            client.have_done(&Call::delete(one(id)))?;
            say(&format!("{id} is deleted."))
        }
    }
}

/// Asks for the backups of all members that answer, the newest first.
pub(super) fn all_backups() -> Call {
    Call::get("backups?limit=1000")
}

/// Asks a host how its backups are set up and what is under way.
pub(super) fn backup_state() -> Call {
    Call::get("settings/backup")
}

/// Asks for the copies at `BACKUP_URL`, of all members and clusters, the newest first.
pub(super) fn backup_copies() -> Call {
    Call::get("settings/backup/copies?limit=1000")
}

/// The path of a backup.
fn one(id: &str) -> String {
    format!("backups/{}", segment(id))
}

fn list(client: &ApiClient, json: bool, paint: Paint) -> Result<(), Stop> {
    let found: Vec<Backup> = client.call(&all_backups())?;
    let state: BackupState = client.call(&backup_state())?;
    if json {
        return print_json(&serde_json::json!({ "backups": found, "state": state }));
    }
    Ok(columns::print(&describe(&found, &state, paint))?)
}

fn list_copies(client: &ApiClient, json: bool, paint: Paint) -> Result<(), Stop> {
    let found: Vec<RemoteBackup> = client.call(&backup_copies())?;
    if json {
        return print_json(&serde_json::json!(found));
    }
    Ok(columns::print(&copies_table(&found, paint))?)
}

/// The copies as a table, in the order given.
pub(super) fn copies_table(found: &[RemoteBackup], paint: Paint) -> String {
    let row = |copy: &RemoteBackup| -> Vec<Cell> {
        let locked = if copy.backup.encrypted { "encrypted" } else { "" };
        vec![copy.place.as_str().into(), date(copy.backup.time).into(), size(copy.backup.bytes).into(), locked.into()]
    };
    let rows: Vec<Vec<Cell>> = found.iter().map(row).collect();
    columns::table(&[("COPY", false), ("MADE", false), ("SIZE", true), ("", false)], &rows, paint)
}

/// Has a copy fetched into the folder of this host. Returns its name there.
pub(super) fn fetch_copy(client: &ApiClient, place: &str) -> Result<String, Stop> {
    client.host()?;
    let started: Started = client.call(&Call::post("settings/backup/copies/fetch").with(place))?;
    wait_for_job(client, &started)?;
    Ok(started.id)
}

fn describe(found: &[Backup], state: &BackupState, paint: Paint) -> String {
    let row = |backup: &Backup| -> Vec<Cell> {
        let kind = format!("{:?}", backup.kind).to_lowercase();
        let locked = if backup.encrypted { "encrypted" } else { "" };
        let made = (date(backup.time).into(), size(backup.bytes).into());
        vec![backup.node.as_str().into(), backup.id.as_str().into(), kind.into(), made.0, made.1, locked.into()]
    };
    let rows: Vec<Vec<Cell>> = found.iter().map(row).collect();
    let heads = [("MEMBER", false), ("BACKUP", false), ("KIND", false), ("MADE", false), ("SIZE", true), ("", false)];
    let mut text = columns::table(&heads, &rows, paint);
    // The first is this host, whose own lines follow.
    for member in state.members.iter().skip(1) {
        let line = columns::harmless(&member_line(member));
        text.push_str(&format!("\n{}", if member.problem.is_some() { paint.text("33", &line) } else { line }));
    }
    if state.members.len() > 1 {
        text.push('\n');
    }
    let free = state.free.map_or_else(String::new, |free| format!(", {} free", size(free)));
    text.push_str(&format!("\nfolder {}{free}\n", columns::harmless(&state.folder)));
    let next = state.next.map_or_else(String::new, |next| format!(", the next one at {}", date(next)));
    let automatic = if state.enabled { format!("on{next}") } else { "off".to_owned() };
    text.push_str(&format!("automatic backups: {automatic}\n"));
    if let Some(copies) = &state.copies {
        text.push_str(&format!("{}\n", columns::harmless(&copies_line(copies))));
    }
    if let Some(running) = &state.running {
        let line = format!("under way: {} ({} of {})", running.step, size(running.done), size(running.total));
        text.push_str(&format!("{}\n", columns::harmless(&line)));
    }
    if let Some(last) = &state.last {
        let line = format!("{}: {}", last.id, last.text);
        text.push_str(&format!("last: {} {}\n", paint.mark(last.ok), columns::harmless(&line)));
    }
    text
}

/// What another member has, or that nobody knows.
fn member_line(member: &MemberBackups) -> String {
    let node = &member.node;
    if let Some(problem) = &member.problem {
        return format!("{node}: unknown, {problem}");
    }
    let newest = member.newest.map_or_else(String::new, |newest| format!(", the newest of {}", date(newest)));
    let automatic = if member.enabled == Some(true) { "on" } else { "off" };
    let (count, folder) = (member.backups.unwrap_or(0), member.folder.as_deref().unwrap_or_default());
    let count = if count == 1 { "1 backup".to_owned() } else { format!("{count} backups") };
    format!("{node}: {count} in {folder}{newest}; automatic backups: {automatic}")
}

fn copies_line(copies: &CopyState) -> String {
    let how = match copies {
        CopyState { running: Some(running), missing, .. } => {
            let more = if *missing > 1 { format!(", {} more to come", missing - 1) } else { String::new() };
            format!("{} is being copied, {} of {}{more}", running.id, size(running.done), size(running.total))
        }
        CopyState { problem: Some(problem), .. } => format!("not complete: {problem}"),
        CopyState { complete: Some(time), .. } => format!("complete at {}", date(*time)),
        _ => "not checked yet".to_owned(),
    };
    format!("copies at {}: {how}", copies.url)
}

/// Waits for a job to end, with a progress bar on a terminal.
///
/// # Errors
/// When it failed, or nobody can say how it ended.
pub(super) fn wait_for_job(client: &ApiClient, started: &Started) -> Result<(), Stop> {
    let begun = Instant::now();
    let bar = progress_bar();
    loop {
        let state: BackupState = client.call(&backup_state()).inspect_err(|_| bar.abandon())?;
        let ended = state.last.filter(|last| last.number >= started.number);
        if let Some(last) = ended {
            bar.finish_and_clear();
            return if last.number == started.number { outcome(&last) } else { lost(started) };
        }
        let Some(running) = state.running.filter(|running| running.number == started.number) else {
            // The job is just ending, or another host answers than the one that does it.
            if begun.elapsed() > Duration::from_secs(5) {
                bar.abandon();
                return lost(started);
            }
            thread::sleep(PACE);
            continue;
        };
        if begun.elapsed() > LIMIT {
            bar.abandon();
            return Err(Stop::tell(
                EX_TEMPFAIL,
                &format!("{}: not done within a day: see twistcli backup list", started.id),
            ));
        }
        bar.set_length(running.total.max(1));
        bar.set_position(running.done);
        bar.set_message(columns::harmless(&format!(
            "{}  {} of {}",
            running.step,
            size(running.done),
            size(running.total)
        )));
        thread::sleep(PACE);
    }
}

fn lost(started: &Started) -> Result<(), Stop> {
    let text = format!("{}: it is unknown how it ended: see twistcli backup list", started.id);
    Err(Stop::tell(EX_UNAVAILABLE, &text))
}

fn outcome(last: &Outcome) -> Result<(), Stop> {
    let text = columns::harmless(&format!("{}: {} ({})", last.id, last.text, duration(last.ms)));
    if last.ok { say(&text) } else { Err(Stop::tell(EX_FOUND, &text)) }
}

fn download(client: &ApiClient, id: &str, to: &Path) -> Result<(), Stop> {
    let ApiClient::Remote(remote) = client else {
        let why = "without --address the backups are files of this host: copy them from the folder that `twistcli backup list` names";
        return Err(Stop::tell(EX_USAGE, why));
    };
    // Only a name: the server must not choose where this host writes.
    if id.is_empty() || id.contains(['/', '\0']) || id == "." || id == ".." {
        return Err(Stop::tell(EX_USAGE, &format!("{id:?} is no file name of a backup")));
    }
    let path = if to.is_dir() { to.join(id) } else { to.to_owned() };
    let failed = |error: io::Error| Stop::tell(EX_IOERR, &format!("{}: {error}", path.display()));
    if path.exists() {
        return Err(failed(io::ErrorKind::AlreadyExists.into()));
    }
    // Half a backup must not look like a whole one. The mode: a backup has all of the Console's secrets.
    let partial = path.with_added_extension("part");
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial).map_err(failed)?;
    let fetched = fetch(remote, id, &mut file).and_then(|bytes| {
        file.sync_all().and_then(|()| fs::hard_link(&partial, &path)).map_err(failed)?;
        Ok(bytes)
    });
    // It has its final name by now, or is of no use.
    let _ = fs::remove_file(&partial);
    say(&format!("{}: {}", path.display(), size(fetched?)))
}

/// Copies a backup into a file. Returns its length.
fn fetch(remote: &Remote, id: &str, file: &mut fs::File) -> Result<u64, Stop> {
    let mut response = remote.download(&one(id))?;
    if !response.status().is_success() {
        let status = response.status();
        return Err(remote.refused(&Method::GET, status, &https::refusal(&mut response)));
    }
    let length = response.body().content_length();
    let bar = match length {
        Some(length) if watched() => ProgressBar::new(length),
        _ => ProgressBar::hidden(),
    };
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3} %  {bytes} of {total_bytes}, {eta} left") {
        bar.set_style(style.progress_chars("##-"));
    }
    let mut reader = bar.wrap_read(response.body_mut().as_reader());
    let mut chunk = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        let count = reader.read(&mut chunk).map_err(|error| {
            Stop::tell(EX_UNAVAILABLE, &format!("{}: the download broke off: {error}", remote.first()))
        })?;
        if count == 0 {
            break;
        }
        file.write_all(&chunk[..count]).map_err(|error| Stop::tell(EX_IOERR, &format!("write the backup: {error}")))?;
        total += count as u64;
    }
    bar.finish_and_clear();
    match length {
        Some(length) if length != total => Err(Stop::tell(
            EX_UNAVAILABLE,
            &format!("{}: the download broke off after {}", remote.first(), size(total)),
        )),
        _ => Ok(total),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_each_member_has_is_told_and_what_is_unknown_too() {
        let member = |node: &str, backups: Option<u32>, problem: Option<&str>| MemberBackups {
            node: node.to_owned(),
            folder: backups.map(|_| "/backup".to_owned()),
            enabled: backups.map(|_| false),
            backups,
            newest: backups.filter(|count| *count > 0).map(|_| 1_793_383_200),
            problem: problem.map(str::to_owned),
            time: 1_793_383_207,
        };
        let made = serde_json::json!({
            "id": "mine-0.1.0-1793383200.tar.gz", "node": "node2", "name": "mine", "version": "0.1.0",
            "time": 1_793_383_200, "bytes": 5000, "kind": "manual", "encrypted": false,
        });
        let members = [
            member("node1", Some(0), None),
            member("node2", Some(1), None),
            member("node3", None, Some("node3 does not answer: nobody listens")),
        ];
        let state = serde_json::json!({
            "enabled": false, "folder": "/b", "free": null, "encrypted": false, "keep": { "daily": 1, "weekly": 1, "monthly": 1 },
            "next": null, "newest": null, "running": null, "last": null, "members": members,
        });
        let (found, state) = (serde_json::from_value(made).unwrap(), serde_json::from_value(state).unwrap());
        let expected = "\
MEMBER  BACKUP                        KIND    MADE                     SIZE
node2   mine-0.1.0-1793383200.tar.gz  manual  2026-10-30 18:00 UTC  4.9 KiB

node2: 1 backup in /backup, the newest of 2026-10-30 18:00 UTC; automatic backups: off
node3: unknown, node3 does not answer: nobody listens

folder /b
automatic backups: off
";
        assert_eq!(describe(&[found], &state, Paint(false)), expected);
    }
}
