//! The folder for damaged files: keeps the newest few for the administrator to look at. Must never keep more than
//! those.

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use crate::storage::{clear_away, fsync_dir, make_private_dir};

/// Name of the folder in the data folder.
pub const FOLDER: &str = "damaged";
/// How many files are kept there.
const KEPT: usize = 16;

/// Moves a file or folder of the data folder there. `name` is its path in the data folder. Returns its new path; `None`
/// if there was nothing.
pub(super) fn set_aside(data: &Path, name: &str) -> io::Result<Option<PathBuf>> {
    let (from, folder) = (data.join(name), data.join(FOLDER));
    match fs::symlink_metadata(&from) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        result => result?,
    };
    if fs::symlink_metadata(&folder).is_ok_and(|found| !found.is_dir()) {
        clear_away(&folder)?; // only this program uses the name, and only for a folder
    }
    make_private_dir(&folder)?;
    let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%S%.6fZ");
    let to = folder.join(format!("{time}-{}", name.replace('/', "-")));
    fs::rename(&from, &to)?;
    fsync_dir(&folder)?;
    fsync_dir(from.parent().unwrap_or(data))?;
    prune(&folder);
    Ok(Some(to))
}

/// Deletes the oldest ones: names begin with the time.
fn prune(folder: &Path) {
    let Ok(found) = fs::read_dir(folder) else { return };
    let mut names: Vec<_> = found.filter_map(|entry| Some(entry.ok()?.path())).collect();
    names.sort();
    let old = names.len().saturating_sub(KEPT);
    for path in &names[..old] {
        let _ = clear_away(path); // the next call tries again
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_kept_whatever_they_are() {
        let data = tempfile::tempdir().unwrap();
        assert_eq!(set_aside(data.path(), "a").unwrap(), None);
        fs::write(data.path().join(FOLDER), "in the way").unwrap();
        fs::create_dir(data.path().join("b")).unwrap();
        let mut last = PathBuf::new();
        for number in 0..20 {
            fs::write(data.path().join("b/c"), number.to_string()).unwrap();
            last = set_aside(data.path(), "b/c").unwrap().unwrap();
        }
        assert_eq!(fs::read_to_string(&last).unwrap(), "19");
        assert!(last.ends_with(format!("damaged/{}", last.file_name().unwrap().to_string_lossy())));
        std::os::unix::fs::symlink("/nowhere", data.path().join("link")).unwrap();
        set_aside(data.path(), "link").unwrap().unwrap();
        set_aside(data.path(), "b").unwrap().unwrap();
        assert!(fs::read_dir(data.path().join(FOLDER)).unwrap().count() <= KEPT);
        assert!(!data.path().join("b").exists());
    }
}
