//! A backup as ordinary files, made by anybody who has it and its key: no Console has to run. Must never give the
//! wanted folder its name before all of it was read and checked, and never write over anything.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    BackupError,
    archive::{self, Content},
    cipher::Secret,
    folder::create,
};
use crate::storage::{fsync_dir, make_private_dir};

/// What was unpacked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unpacked {
    /// Version of the program that made the backup.
    pub version: String,
    /// The member whose databases these are.
    pub node: String,
    /// The raft index of all of them.
    pub index: u64,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    pub files: Vec<UnpackedFile>,
}

/// A database.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UnpackedFile {
    /// Below the new folder: `console.db`, or `service/` and the path in the folder of the service.
    pub path: String,
    pub bytes: u64,
}

/// Unpacks a backup into a new folder. `key` is the file of its key, if it is encrypted.
///
/// # Errors
/// [`BackupError::NotFound`] and [`BackupError::Refused`] when there is no such backup, something has the name of the
/// folder, or the key is missing or unfit; [`BackupError::Damaged`] for anything but a whole, sound backup. There is no
/// new folder then.
pub fn unpack(backup: &Path, to: &Path, key: Option<&Path>) -> Result<Unpacked, BackupError> {
    if !backup.is_file() {
        return Err(BackupError::NotFound(format!("there is no file {}", backup.display())));
    }
    if fs::symlink_metadata(to).is_ok() {
        return Err(BackupError::Refused(format!("{} is there already: name a folder that is not", to.display())));
    }
    let sealed = archive::is_sealed(backup)?;
    let sealed = sealed.ok_or_else(|| BackupError::Refused(format!("{} is no backup", backup.display())))?;
    let secret = key.filter(|_| sealed).map(Secret::read).transpose()?;
    if sealed && secret.is_none() {
        return Err(BackupError::Refused("the backup is encrypted: name the file of its key with --key".to_owned()));
    }
    let mut name = to.file_name().map(ToOwned::to_owned).unwrap_or_default();
    name.push(".new");
    let staging = to.with_file_name(name);
    make_private_dir(&staging).map_err(BackupError::io("create", &staging))?;
    let result = fill(backup, sealed, secret.as_ref(), &staging).and_then(|unpacked| {
        fs::rename(&staging, to).map_err(BackupError::io("rename", &staging))?;
        let around = to.parent().filter(|around| !around.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fsync_dir(around).map_err(BackupError::io("sync", around))?;
        Ok(unpacked)
    });
    if result.is_err() {
        // It has no name that anybody would take for a whole one.
        let _ = fs::remove_dir_all(&staging);
    }
    result
}

fn fill(backup: &Path, sealed: bool, secret: Option<&Secret>, staging: &Path) -> Result<Unpacked, BackupError> {
    let mut current: Option<(u32, PathBuf, File)> = None;
    let each = |content: &Content, bytes: &[u8]| {
        if current.as_ref().is_none_or(|(id, ..)| *id != content.id) {
            sync(current.take())?;
            let path = staging.join(&content.path);
            if let Some(around) = path.parent() {
                make_private_dir(around).map_err(BackupError::io("create", around))?;
            }
            let file = create(&path)?;
            current = Some((content.id, path, file));
        }
        let Some((_, path, file)) = &mut current else { return Ok(()) };
        file.write_all(bytes).map_err(BackupError::io("write", path))
    };
    let manifest = archive::read(backup, sealed, secret, |_| Ok(()), each)?;
    sync(current)?;
    let contents = manifest.contents()?;
    let files = contents.iter().map(|content| UnpackedFile { path: content.path.clone(), bytes: content.bytes() });
    Ok(Unpacked {
        files: files.collect(),
        version: manifest.version,
        node: manifest.node,
        index: manifest.index,
        created: manifest.created,
    })
}

fn sync(file: Option<(u32, PathBuf, File)>) -> Result<(), BackupError> {
    let Some((_, path, file)) = file else { return Ok(()) };
    file.sync_all().map_err(BackupError::io("write", &path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::archive::tests::{made, with_service};

    #[test]
    fn a_backup_becomes_ordinary_files_or_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("key");
        fs::write(&key, "a pass phrase of mine").unwrap();
        let secret = Secret::read(&key).unwrap();
        let long = "long/".repeat(40) + "x.db";
        let (manifest, images) = with_service(20, &[("a b/ä.db", 3000), ("empty", 0), (&long, 7)]);
        let to = folder.path().join("here");
        for secret in [None, Some(&secret)] {
            let backup = made(folder.path(), &manifest, &images, secret);
            let key = secret.map(|_| key.as_path());
            let unpacked = unpack(&backup, &to, key).unwrap();
            let paths: Vec<_> = unpacked.files.iter().map(|file| file.path.as_str()).collect();
            assert_eq!(paths, ["console.db", "service/a b/ä.db", "service/empty", &format!("service/{long}")]);
            let found: Vec<u8> = paths.iter().flat_map(|path| fs::read(to.join(path)).unwrap()).collect();
            assert!(found == images && unpacked.index == 40);
            assert!(unpack(&backup, &to, key).unwrap_err().to_string().contains("is there already"));
            fs::remove_dir_all(&to).unwrap();
            if secret.is_some() {
                assert!(unpack(&backup, &to, None).unwrap_err().to_string().contains("--key"));
            }
            let whole = fs::read(&backup).unwrap();
            fs::write(&backup, &whole[..whole.len() - 9]).unwrap();
            assert!(matches!(unpack(&backup, &to, key).unwrap_err(), BackupError::Damaged(_)));
            let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(left.len(), 2, "{left:?}");
        }
    }
}
