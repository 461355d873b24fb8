//! HEALS. Repairs what a start finds damaged in the data folder: each file is rebuilt from others that prove what must
//! be in it, or the start ends with one line that names the file and the command to type. `docs/formats.md` lists all
//! files. Damaged files are moved into `damaged/`, which keeps the newest.
//!
//! Must never guess: what nothing proves is an error. Must never touch the raft log, which has its own rules, and never
//! act on a membership that is older than that of the raft log.

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
pub use data::{database, service};
pub use identity::identity;
pub use membership::{known_membership, membership};
pub use promise::{PROMISE, lower_promise, promised_earlier};

/// Sentences that are kept for events and status; the log has all of them.
const MAX_NOTES: usize = 16;

/// What this start has repaired, in sentences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes(Vec<String>);

impl Notes {
    /// Logs a repair, and keeps the sentence for events and status: the first 16.
    pub fn add(&mut self, sentence: String) {
        warn!("{sentence}");
        if self.0.len() < MAX_NOTES {
            self.0.push(sentence);
        }
    }

    /// The kept sentences, in order.
    pub fn sentences(&self) -> &[String] {
        &self.0
    }
}

/// Opens and locks the data folder.
///
/// # Errors
/// [`DataDirError`] when another process has the folder, or it cannot be created or locked. If the lock is not a file,
/// one line that says what to do: another process may have locked the right one.
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

/// Corrects modes and owners, and moves away whatever is in the place of a file and is not one. Call it before anything
/// else looks at the data folder, which must be locked.
///
/// # Errors
/// When something is too open and cannot be changed, or is in the place of a file and cannot be moved. The start has to
/// end; the error is one line that says what to do.
pub fn prepare(data: &Path, notes: &mut Notes) -> Result<()> {
    modes::tighten(data)?;
    shape::mend(data, notes)
}

/// The error if `what` is lost and nothing else in the data folder proves that this host is the member `name`.
fn lost(data: &Path, what: &str, name: Option<&str>) -> Error {
    let (data, name) = (data.display(), name.unwrap_or("NAME"));
    anyhow!(
        "{what}, and nothing else in {data} proves which member this host is: bring the file back from a copy of this folder, or \
         run `twistcli ha remove {name}` on the PRIMARY, then `twistcli ha join-script` there, and its script on this host"
    )
}

#[cfg(test)]
mod tests;
