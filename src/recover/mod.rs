//! `twistlockd recover --force-new-cluster`: makes a cluster of one out of the data of a stopped survivor, when the
//! majority is gone for good. Owns what the administrator reads and confirms. Must never be reached by a running node
//! on its own, and never destroy anything: what it replaces is set aside.

mod build;
mod survivor;
mod switch;

use std::{
    fs,
    io::{self, BufRead, IsTerminal, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;
use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};
use thiserror::Error;

use crate::{
    config,
    events::{Event, Kind, Recorder, Severity},
    storage::{DataDir, DataDirError},
};

use survivor::Survivor;
pub use switch::{Interrupted, finish_interrupted};

/// Exit codes of sysexits.
const EX_USAGE: u8 = 64;
const EX_DATAERR: u8 = 65;
const EX_NOINPUT: u8 = 66;
const EX_CANTCREAT: u8 = 73;
const EX_IOERR: u8 = 74;
const EX_TEMPFAIL: u8 = 75;

/// Options of `twistlockd recover`.
#[derive(Args, Debug)]
pub struct Options {
    /// Make a new cluster of one member from this node's data: the way back when two of three hosts are lost for good
    #[arg(long)]
    force_new_cluster: bool,
    /// Configuration file of the node
    #[arg(long, value_name = "FILE", default_value = "/etc/twistlock/twistlock.cfg")]
    config: PathBuf,
    /// For scripts: the name of the lost cluster (the first 8 digits of its id), instead of typing it
    #[arg(long, value_name = "NAME")]
    confirm: Option<String>,
    /// Say what would be done and what may be lost, then stop
    #[arg(long)]
    dry_run: bool,
}

/// Why nothing was recovered. The old data is as it was.
#[derive(Debug, Error)]
pub enum RecoverError {
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Data(#[from] DataDirError),
    /// The data of this node cannot be used.
    #[error("{0}")]
    Unusable(String),
    #[error("not enough space: {needed} bytes are needed in {}, and {free} are free", path.display())]
    Space { path: PathBuf, needed: u64, free: u64 },
    #[error("cannot {what}: {error}")]
    Io { what: String, error: io::Error },
}

impl RecoverError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => EX_USAGE,
            Self::Data(DataDirError::Locked { .. }) => EX_TEMPFAIL,
            Self::Data(DataDirError::NoIdentity { .. }) => EX_NOINPUT,
            Self::Data(DataDirError::Io { .. }) | Self::Io { .. } => EX_IOERR,
            Self::Data(_) | Self::Unusable(_) => EX_DATAERR,
            Self::Space { .. } => EX_CANTCREAT,
        }
    }

    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |error| Self::Io { what, error }
    }
}

/// Runs the command.
#[must_use]
pub fn main(options: &Options) -> ExitCode {
    let loaded = match config::load(&options.config) {
        Ok(loaded) => loaded,
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::from(errors.exit_code());
        }
    };
    match run(options, &loaded.config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("twistlockd recover: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(options: &Options, config: &config::Config) -> Result<(), RecoverError> {
    if !options.force_new_cluster {
        return Err(RecoverError::Usage(
            "say --force-new-cluster to make a new cluster of one member from this node's data; --dry-run shows what \
             may be lost"
                .to_owned(),
        ));
    }
    let by = geteuid();
    become_owner(&config.data_folder)?;
    // Fails while the daemon runs.
    let data = DataDir::open(&config.data_folder)?;
    if options.dry_run && switch::under_way(data.path())?.is_some() {
        println!(
            "An earlier recovery was interrupted while it put the new files in place. This command without --dry-run, or \
             the next start of twistlockd, completes it.\n--dry-run: nothing was changed."
        );
        return Ok(());
    }
    if let Some(done) = finish_interrupted(data.path())? {
        println!("An earlier recovery was interrupted while it put the new files in place. It is complete now.");
        report(&done);
        note(data.path(), config, by);
        return Ok(());
    }
    let survivor = Survivor::examine(&data, config)?;
    println!("{}", survivor.explain());
    if options.dry_run {
        println!("--dry-run: nothing was changed.");
        return Ok(());
    }
    confirm(options.confirm.as_deref(), &survivor.cluster_name())?;
    let (plan, notes) = build::build(&survivor, config)?;
    report(&switch::execute(data.path(), &plan)?);
    note(data.path(), config, by);
    notes.iter().for_each(|note| println!("\n{note}"));
    Ok(())
}

/// Root becomes the owner of the data folder, for good: the daemon could not open what root makes. Without root,
/// nothing changes.
fn become_owner(data: &Path) -> Result<(), RecoverError> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let folder = match fs::metadata(data) {
        Ok(folder) => folder,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(DataDirError::NoIdentity { path: data.to_owned() }.into());
        }
        Err(error) => return Err(RecoverError::io(format!("look at {}", data.display()))(error)),
    };
    let (user, group) = (Uid::from_raw(folder.uid()), Gid::from_raw(folder.gid()));
    if user.is_root() {
        return Ok(());
    }
    // The groups first: afterwards there is no right to give them up.
    setgroups(&[group])
        .and_then(|()| setresgid(group, group, group))
        .and_then(|()| setresuid(user, user, user))
        .map_err(|errno| RecoverError::Io {
            what: format!("become user {user} and group {group}, whose {} is", data.display()),
            error: errno.into(),
        })
}

fn report(done: &Interrupted) {
    println!("\nThe node is now the only member of a new cluster.");
    println!("  set aside   {}", done.aside.display());
    println!("  next        systemctl start twistlockd; then add hosts with the join script, and press APPLY");
    println!("  never       start the other members of the old cluster again with their old data folders");
}

/// There is no audit to write into: the events of this node have who did it.
fn note(data: &Path, config: &config::Config, by: Uid) {
    let node = config.member_name();
    match Recorder::start(&node, data) {
        Ok(events) => {
            let sentence =
                format!("a new cluster of one was made out of the data of {node} (twistlockd recover, by uid {by})");
            events.record(Event::new(Kind::Audit, Severity::Critical, sentence).field("uid", by.as_raw()));
            events.flush();
        }
        Err(error) => eprintln!("twistlockd recover: this is not in the events of the node: {error}"),
    }
}

/// The administrator has to name the cluster that is given up.
fn confirm(given: Option<&str>, name: &str) -> Result<(), RecoverError> {
    let refuse = |what: String| Err(RecoverError::Usage(what));
    if let Some(given) = given {
        return match given.eq_ignore_ascii_case(name) {
            true => Ok(()),
            false => refuse(format!("--confirm {given}: the cluster of this node is {name}; nothing was changed")),
        };
    }
    if !io::stdin().is_terminal() {
        return refuse(format!("nobody is at the terminal: say --confirm {name} if that is what you want"));
    }
    print!("Type the name of the cluster that is given up ({name}) to go on: ");
    let mut answer = String::new();
    io::stdout().flush().and_then(|()| io::stdin().lock().read_line(&mut answer)).map_err(RecoverError::io("ask"))?;
    match answer.trim().eq_ignore_ascii_case(name) {
        true => Ok(()),
        false => refuse("that is not its name: nothing was changed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_name_of_the_cluster_confirms() {
        assert!(confirm(Some("5F3a9c01"), "5f3a9c01").is_ok());
        assert_eq!(confirm(Some("5f3a9c02"), "5f3a9c01").unwrap_err().exit_code(), EX_USAGE);
        assert_eq!(confirm(Some(""), "5f3a9c01").unwrap_err().exit_code(), EX_USAGE);
    }
}
