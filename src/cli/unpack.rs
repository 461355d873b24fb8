//! `twistcli backup unpack`: a backup as ordinary files. Needs no daemon.

use std::path::PathBuf;

use clap::Args;

use super::{
    columns::{self, Cell, Paint, harmless, print_json},
    quantity::{date, size},
    stop::{EX_FOUND, EX_NOINPUT, Stop},
};
use crate::backup::{BackupError, Unpacked, unpack};

pub(super) const HELP: &str = "\
Reads the backup, checks all of it, and makes a new folder with console.db, and with the databases of the
service below service/, as they were at one moment. A member that runs is not needed, and nothing that is
there is changed.

Exit code: 0 done, 1 it is damaged, 64 wrong command line, 66 there is no such file, 75 refused.

Examples:
  twistcli backup unpack before-the-upgrade-0.1.0-1793383200.tar.gz /mnt/looked-at
  twistcli backup unpack daily-0.1.0-1793383200.tar.gz.sealed /mnt/looked-at --key /etc/twistlock/backup.key";

/// What is unpacked, and where to.
#[derive(Debug, Args)]
pub(super) struct Unpack {
    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// A folder that is not there yet
    #[arg(value_name = "FOLDER")]
    to: PathBuf,
    /// File of the key of an encrypted backup: that of BACKUP_KEY_FILE when it was made
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// Print what it has as JSON
    #[arg(long)]
    json: bool,
}

/// Carries it out.
///
/// # Errors
/// When it is damaged or refused, or the output cannot be written.
pub(super) fn run(options: &Unpack, paint: Paint) -> Result<(), Stop> {
    let done = unpack(&options.file, &options.to, options.key.as_deref()).map_err(|error| match &error {
        BackupError::Damaged(_) => Stop::tell(EX_FOUND, &error.to_string()),
        BackupError::NotFound(_) => Stop::tell(EX_NOINPUT, &error.to_string()),
        _ => Stop::refuse(&error.to_string()),
    })?;
    if options.json {
        return print_json(&done);
    }
    Ok(columns::print(&describe(&done, paint))?)
}

fn describe(done: &Unpacked, paint: Paint) -> String {
    let row =
        |file: &crate::backup::UnpackedFile| -> Vec<Cell> { vec![file.path.as_str().into(), size(file.bytes).into()] };
    let rows: Vec<Vec<Cell>> = done.files.iter().map(row).collect();
    let table = columns::table(&[("FILE", false), ("SIZE", true)], &rows, paint);
    let (node, made) = (harmless(&done.node), date(done.created));
    format!("{table}\nas of raft index {} on {node}, made {made} by version {}\n", done.index, harmless(&done.version))
}
