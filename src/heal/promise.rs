//! `promise-ms`: for how many milliseconds the promises of this node hold. With it, a process with another timing does
//! not vote while a promise of an earlier process still holds. Must never assume a shorter promise than may have been
//! given.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use tracing::warn;

use super::Notes;
use crate::{
    config::LONGEST_LEASE,
    storage::{durable_write, is_rot},
};

/// Name of the file in the data folder.
pub const PROMISE: &str = "promise-ms";
/// The longest that a promise can hold: the longest lease that a configuration may have, and a second, because a
/// promise counts from when its message arrives.
const LONGEST: Duration = Duration::from_millis(LONGEST_LEASE.as_millis() as u64 + 1000);

/// How long this process must neither vote nor campaign: the longest promise that an earlier process of this node may
/// have given. That can be longer than its `own` if the timing was changed. Notes its own in the file, for the next
/// process, if that is the longer one. `first`: no earlier process of this node has promised anything.
///
/// # Errors
/// When the file cannot be written, or cannot be read for a reason other than damage: a later start may succeed.
pub fn promised_earlier(own: Duration, data: &Path, first: bool, notes: &mut Notes) -> Result<Duration> {
    let path = data.join(PROMISE);
    let noted = match fs::read_to_string(&path) {
        _ if first => Some(Duration::ZERO),
        Ok(text) => text.trim().parse().ok().map(Duration::from_millis),
        Err(error) if error.kind() == ErrorKind::NotFound || is_rot(&error) => None,
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    let earlier = noted.unwrap_or(LONGEST).min(LONGEST);
    if noted.is_none() {
        let seconds = earlier.max(own).as_secs();
        notes.add(format!(
            "{} is damaged or missing: this node does not vote and is no candidate for {seconds} s, the longest promise \
             that it may have given before",
            path.display()
        ));
    } else if earlier < own {
        note_promise(own, &path)?;
    }
    Ok(if first { Duration::ZERO } else { earlier.max(own) })
}

fn note_promise(promise: Duration, path: &Path) -> Result<()> {
    durable_write(path, promise.as_millis().to_string().as_bytes()).with_context(|| format!("write {}", path.display()))
}

/// Writes this process's `own`, shorter promise into the file once the longer one of an earlier process has run out.
/// Not before: this process may crash as well.
pub async fn lower_promise(own: Duration, earlier: Duration, data: PathBuf) {
    tokio::time::sleep(earlier).await;
    if let Err(error) = note_promise(own, &data.join(PROMISE)) {
        warn!("the next start will wait longer than necessary: {error:#}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_the_longest_promise() {
        let data = tempfile::tempdir().unwrap();
        let (own, path) = (Duration::from_millis(475), data.path().join(PROMISE));
        let promised = |first| {
            let mut notes = Notes::default();
            let promised = promised_earlier(own, data.path(), first, &mut notes).unwrap();
            assert_eq!(notes.sentences().len(), usize::from(promised == LONGEST));
            promised
        };
        assert_eq!((promised(true), fs::read_to_string(&path).unwrap().as_str()), (Duration::ZERO, "475"));
        let samples =
            [("475", own), ("475\n", own), ("300", own), ("900", Duration::from_millis(900)), ("61000", LONGEST)];
        for (text, expected) in samples {
            fs::write(&path, text).unwrap();
            let mut notes = Notes::default();
            assert_eq!(promised_earlier(own, data.path(), false, &mut notes).unwrap(), expected, "{text}");
            assert_eq!(notes, Notes::default(), "{text}");
        }
        for damaged in [&b""[..], b"4\xf75", b"-1", b"4.5", b"x", b"99999999999999999999999"] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(promised(false), LONGEST);
            assert_eq!(fs::read(&path).unwrap(), damaged, "it stays until the promise has run out");
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(promised(false), LONGEST);
        fs::create_dir(&path).unwrap();
        assert_eq!(promised(false), LONGEST);
    }
}
