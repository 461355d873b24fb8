//! Puts the new files in the place of the old ones, so that a crash at any moment leaves either the old node or a
//! switch that the next start completes. Must never remove an old file: it is moved aside.
//!
//! Once everything in the staging folder is durable, a plan is written; that is the decision. Then each name is moved
//! aside and its new version is moved in. Every step can be repeated: what is still in the staging folder is still to
//! be done.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::RecoverError;
use crate::storage::{
    durable_write, fsync_dir, make_private_dir,
    membership::{COPY, FILE},
};

/// Where the new files are made.
pub(super) const STAGING: &str = "recover-new";
/// The decision: while it is there, the switch is under way.
const PLAN: &str = "recover.json";
const FORMAT: u32 = 1;
/// What is replaced, the identity last: until it is there, nothing else can be taken for the new node's.
const NAMES: [&str; 7] = ["raft-log", "raft-log.created", "database", FILE, COPY, "certificates", "identity.json"];

/// A switch that was decided.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    format: u32,
    /// Name of the folder for the old files.
    aside: String,
}

impl Plan {
    pub fn new() -> Self {
        let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
        Self { format: FORMAT, aside: format!("before-recover-{time}") }
    }
}

/// A switch that has been completed.
#[derive(Debug)]
pub struct Interrupted {
    /// Where the old files are.
    pub aside: PathBuf,
}

/// Decides and carries out.
///
/// # Errors
/// [`RecoverError::Io`]; after the decision, the next start of the node goes on.
pub(super) fn execute(data: &Path, plan: &Plan) -> Result<Interrupted, RecoverError> {
    let write = || durable_write(&data.join(PLAN), &serde_json::to_vec(plan)?);
    write().map_err(RecoverError::io(format!("write {}", data.join(PLAN).display())))?;
    carry_out(data, plan, &mut || Ok(()))
}

/// Completes a switch that a crash has interrupted. If there is none, the remains of an attempt without a decision are
/// removed: they may be as large as the database. Every start of the node calls this, with the lock of the data folder.
///
/// # Errors
/// [`RecoverError::Io`], or [`RecoverError::Unusable`] for a plan of a newer version.
pub fn finish_interrupted(data: &Path) -> Result<Option<Interrupted>, RecoverError> {
    match under_way(data)? {
        Some(plan) => carry_out(data, &plan, &mut || Ok(())).map(Some),
        None => discard(data).map(|()| None),
    }
}

/// The switch that a crash has interrupted.
///
/// # Errors
/// [`RecoverError::Io`] when the plan cannot be read, [`RecoverError::Unusable`] when a newer version wrote it.
pub(super) fn under_way(data: &Path) -> Result<Option<Plan>, RecoverError> {
    let path = data.join(PLAN);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(RecoverError::io(format!("read {}", path.display()))(error)),
    };
    match serde_json::from_slice::<Plan>(&text) {
        Ok(plan) if plan.format == FORMAT && !plan.aside.contains('/') => Ok(Some(plan)),
        Ok(plan) if plan.format > FORMAT => {
            Err(RecoverError::Unusable(format!("{} was written by a newer version of this program", path.display())))
        }
        // All that it decides is a name: that of the folder for the old files.
        _ => {
            let (path, staging) = (path.display(), data.join(STAGING));
            Err(RecoverError::Unusable(format!(
                "{path} is damaged. If {} is there, the recovery is not complete: run `echo '{{\"format\":1,\"aside\":\
                 \"before-recover-again\"}}' > {path}` and start again. If it is not there, run `rm {path}`",
                staging.display()
            )))
        }
    }
}

/// Removes the staging folder. Only for a recovery that was not decided.
///
/// # Errors
/// [`RecoverError::Io`] when a file cannot be moved or removed.
pub(super) fn discard(data: &Path) -> Result<(), RecoverError> {
    let staging = data.join(STAGING);
    match fs::remove_dir_all(&staging) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(RecoverError::io(format!("remove {}", staging.display()))(error))
        }
        _ => Ok(()),
    }
}

/// `step` is called before each change on disk: tests let it fail.
fn carry_out(data: &Path, plan: &Plan, step: &mut dyn FnMut() -> io::Result<()>) -> Result<Interrupted, RecoverError> {
    let aside = data.join(&plan.aside);
    let mut work = || -> io::Result<()> {
        step()?;
        make_private_dir(&aside)?;
        for name in NAMES {
            let (new, current, old) = (data.join(STAGING).join(name), data.join(name), aside.join(name));
            if !exists(&new)? {
                continue; // moved in already
            }
            if exists(&current)? {
                step()?;
                fs::rename(&current, &old)?;
                fsync_dir(&aside)?;
                fsync_dir(data)?;
            }
            step()?;
            fs::rename(&new, &current)?;
            fsync_dir(data)?;
        }
        step()?;
        match fs::remove_dir_all(data.join(STAGING)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fsync_dir(data)?;
        step()?;
        fs::remove_file(data.join(PLAN))?;
        fsync_dir(data)
    };
    work().map_err(RecoverError::io("put the new files in place (start the node, or this command, again)"))?;
    Ok(Interrupted { aside })
}

fn exists(path: &Path) -> io::Result<bool> {
    path.try_exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(data: &Path) -> Vec<String> {
        let read = |name: &&str| {
            let path = data.join(name);
            let file = if path.is_dir() { path.join("file") } else { path };
            fs::read_to_string(file).unwrap_or_else(|_| "none".to_owned())
        };
        NAMES.iter().map(read).collect()
    }

    fn put(folder: &Path, text: &str, without: &str) {
        for name in NAMES.iter().filter(|name| **name != without) {
            let path = folder.join(name);
            let directory = !name.contains('.');
            fs::create_dir_all(if directory { &path } else { folder }).unwrap();
            fs::write(if directory { path.join("file") } else { path }, text).unwrap();
        }
    }

    /// Interrupted before every single change on disk, and completed by the next start.
    #[test]
    fn a_crash_at_every_step_is_made_good() {
        let mut crashed = 0;
        for crash_at in 0.. {
            let root = tempfile::tempdir().unwrap();
            let data = root.path();
            // A node whose membership never changed has no such file.
            put(data, "old", "membership.json");
            put(&data.join(STAGING), "new", "");
            fs::write(data.join("lock"), "stays").unwrap();
            let plan = Plan::new();
            durable_write(&data.join(PLAN), &serde_json::to_vec(&plan).unwrap()).unwrap();
            let mut steps = 0;
            let result = carry_out(data, &plan, &mut || {
                steps += 1;
                if steps > crash_at { Err(io::Error::other("crash")) } else { Ok(()) }
            });
            crashed += usize::from(result.is_err());
            let finished = finish_interrupted(data).unwrap();
            assert_eq!(finished.is_some(), result.is_err());
            assert_eq!(content(data), ["new"; 7]);
            let kept = content(&data.join(&plan.aside));
            assert_eq!(kept, ["old", "old", "old", "none", "old", "old", "old"], "crash at {crash_at}");
            assert!(!data.join(STAGING).exists() && data.join("lock").exists());
            assert!(finish_interrupted(data).unwrap().is_none());
            if result.is_ok() {
                break;
            }
        }
        assert_eq!(crashed, 16);
    }

    #[test]
    fn without_a_plan_the_old_node_stands() {
        let root = tempfile::tempdir().unwrap();
        put(root.path(), "old", "");
        put(&root.path().join(STAGING), "new", "");
        assert!(finish_interrupted(root.path()).unwrap().is_none());
        assert_eq!(content(root.path()), ["old"; 7]);
        assert!(!root.path().join(STAGING).exists(), "it takes the space of the next attempt");
        put(&root.path().join(STAGING), "new", "");
        fs::write(root.path().join(PLAN), "{\"format\":2,\"aside\":\"x\"}").unwrap();
        assert!(matches!(finish_interrupted(root.path()), Err(RecoverError::Unusable(_))));
        fs::write(root.path().join(PLAN), "{\"format\":1,\"aside\":\"../x\"}").unwrap();
        assert!(matches!(finish_interrupted(root.path()), Err(RecoverError::Unusable(_))));
        assert_eq!(content(root.path()), ["old"; 7]);
        assert_eq!(content(&root.path().join(STAGING)), ["new"; 7], "the other version may need it");
    }
}
