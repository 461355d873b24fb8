//! Files of the folder that are no databases, and so stay on this host: which, so that somebody says so. Must never
//! hold more names than it may.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};

use crate::mutex::locked;

/// Names that are kept.
pub const MOST_PLAIN: usize = 1000;
/// Folders inside folders that are looked into.
const DEEPEST: usize = 64;

/// The files that are known to be on this host alone, by their paths below the folder.
#[derive(Debug, Default)]
pub(super) struct Plain(Mutex<BTreeSet<PathBuf>>);

impl Plain {
    pub fn note(&self, path: &Path) {
        let mut paths = locked(&self.0);
        if paths.len() < MOST_PLAIN {
            paths.insert(path.to_owned());
        }
    }

    /// It is gone, or a database.
    pub fn forget(&self, path: &Path) {
        locked(&self.0).remove(path);
    }

    /// At most [`MOST_PLAIN`].
    pub fn list(&self) -> Vec<PathBuf> {
        locked(&self.0).iter().cloned().collect()
    }

    /// Notes what lies in the folder `files`, but for what `belongs` to a database.
    pub fn look(&self, files: &Path, belongs: &dyn Fn(&Path) -> bool) {
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            // What cannot be read is not counted: this is for people.
            for entry in fs::read_dir(files.join(&folder)).into_iter().flatten().flatten() {
                let path = folder.join(entry.file_name());
                let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
                if is_folder && path.components().count() < DEEPEST {
                    folders.push(path);
                } else if !is_folder && !belongs(&path) {
                    self.note(&path);
                }
            }
            if locked(&self.0).len() >= MOST_PLAIN {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_no_database_is_counted_up_to_a_limit() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("a")).unwrap();
        for name in ["a/key.pem", "a/x.db", "b"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let plain = Plain::default();
        plain.look(folder.path(), &|path| path == Path::new("a/x.db"));
        assert_eq!(plain.list(), [Path::new("a/key.pem"), Path::new("b")]);
        plain.forget(Path::new("b"));
        (0..2 * MOST_PLAIN).for_each(|number| plain.note(Path::new(&number.to_string())));
        assert_eq!(plain.list().len(), MOST_PLAIN);
    }
}
