//! HEALS. Mends what a start finds damaged in the data folder: each file is made anew from the others that prove what
//! must be in it, or the start ends with one line that names the file and the command to type. `docs/formats.md` has
//! the whole list. Damaged files are moved into `damaged/`, which keeps the newest.
//!
//! Must never guess: what nothing proves is an error. Must never touch the raft log, which has its own rules, and never
//! act on an older membership than the raft log has.

mod aside;
mod certificates;
mod data;
mod identity;
mod membership;
mod modes;
mod promise;
mod shape;

use std::path::Path;

use anyhow::{Error, Result, anyhow};
use tracing::warn;

use crate::storage::{DataDir, DataDirError};
pub use aside::FOLDER;
pub use certificates::certificates;
pub use data::database;
pub use identity::identity;
pub use membership::{known_membership, membership};
pub use promise::{PROMISE, lower_promise, promised_earlier};

/// Sentences that are kept for history and status; all of them are in the log.
const MAX_NOTES: usize = 16;

/// What was mended at this start, in sentences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes(Vec<String>);

impl Notes {
    /// Logs what was mended, and keeps it for history and status.
    pub fn add(&mut self, sentence: String) {
        warn!("{sentence}");
        if self.0.len() < MAX_NOTES {
            self.0.push(sentence);
        }
    }

    /// What was mended.
    pub fn sentences(&self) -> &[String] {
        &self.0
    }
}

/// Opens and locks the data folder.
///
/// # Errors
/// [`DataDirError`] when another process has the folder, or it cannot be made or locked. One line that says what to do
/// when the lock is not a file: somebody else may have locked the right one.
pub fn open(folder: &Path) -> Result<DataDir> {
    DataDir::open(folder).map_err(|error| match error {
        DataDirError::Io { path, .. } if path.ends_with("lock") && path.is_dir() => anyhow!(
            "{} is not a file: make sure that no other twistlockd uses {}, move it away, and start again",
            path.display(),
            folder.display()
        ),
        error => error.into(),
    })
}

/// Puts modes and owners right, and moves away what stands in the place of a file and is none. To be called before
/// anything else looks at the data folder, which must be locked.
///
/// # Errors
/// When something is too open, or in the place of a file, and cannot be changed or moved: one line that says which.
pub fn prepare(data: &Path, notes: &mut Notes) -> Result<()> {
    modes::tighten(data)?;
    shape::mend(data, notes)
}

/// The one line: `what` is lost, and nothing else in the data folder proves that this host is the member `name`.
fn lost(data: &Path, what: &str, name: Option<&str>) -> Error {
    let (data, name) = (data.display(), name.unwrap_or("NAME"));
    anyhow!(
        "{what}, and nothing else in {data} proves which member this host is: bring the file back from a copy of this folder, or \
         run `twistcli ha remove {name}` on the PRIMARY, then `twistcli ha join-script` there, and its script on this host"
    )
}

#[cfg(test)]
mod tests;
