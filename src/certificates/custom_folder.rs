//! The folder in which an administrator puts a certificate for the Console of this host: looks whether it has changed,
//! and reads it once it rests. Must never write there.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use tracing::warn;

use crate::pki::{CONSOLE_CERTIFICATE, CONSOLE_KEY, CUSTOM_FOLDER, Pair, PkiError};

/// What tells whether a file is still the same: device, inode, length, time of change.
type FileState = Option<(u64, u64, u64, i64, i64)>;

/// The folder as it was seen last.
#[derive(Debug)]
pub(super) struct CustomFolder {
    path: PathBuf,
    seen: [FileState; 2],
    /// It has changed and was not read since.
    stale: bool,
    /// What is in use from there.
    pair: Option<Arc<Pair>>,
    /// Why what is there now is not in use.
    problem: Option<String>,
}

impl CustomFolder {
    /// Reads the folder for the first time.
    ///
    /// # Errors
    /// When there is one of the two files, and the two cannot be used together.
    pub fn open(data: &Path) -> Result<Self, PkiError> {
        let path = data.join(CUSTOM_FOLDER);
        let seen = states(&path)?;
        let pair = read(&path, seen)?.map(Arc::new);
        Ok(Self { path, seen, stale: false, pair, problem: None })
    }

    /// Looks again. Files that change are read once they were the same at two looks in a row: whoever replaces both
    /// does not do so at one instant. True if what is in use, or the problem, is another one than before.
    pub fn poll(&mut self, now: u64) -> bool {
        let before = self.problem.clone();
        match states(&self.path) {
            Err(error) => self.problem = Some(self.broken(&error)),
            Ok(seen) if seen != self.seen => (self.seen, self.stale) = (seen, true),
            Ok(_) if self.stale => {
                self.stale = false;
                return self.take(now) || before != self.problem;
            }
            Ok(_) => {}
        }
        before != self.problem
    }

    /// Takes over what is there if it is good. True if something else is in use from now on.
    fn take(&mut self, now: u64) -> bool {
        let found = read(&self.path, self.seen).and_then(|pair| match pair {
            Some(pair) => pair.check(now).map(|()| Some(pair)),
            None => Ok(None),
        });
        match found {
            Ok(found) => {
                self.problem = None;
                let same = match (&found, &self.pair) {
                    (Some(new), Some(old)) => new.is_same(old),
                    (new, old) => new.is_none() && old.is_none(),
                };
                if !same {
                    self.pair = found.map(Arc::new);
                }
                !same
            }
            Err(error) => {
                self.problem = Some(self.broken(&error));
                false
            }
        }
    }

    fn broken(&self, error: &PkiError) -> String {
        let rest = if self.pair.is_some() { "the one that was there before stays in use" } else { "it is not used" };
        format!("the certificate in {} cannot be used, and {rest}: {error}", self.path.display())
    }

    /// What is in use from there.
    pub fn pair(&self) -> Option<&Arc<Pair>> {
        self.pair.as_ref()
    }

    /// Why what is there now is not in use, in a sentence.
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }
}

fn states(folder: &Path) -> Result<[FileState; 2], PkiError> {
    let state = |name| {
        let path = folder.join(name);
        match fs::metadata(&path) {
            Ok(found) => Ok(Some((found.dev(), found.ino(), found.len(), found.mtime(), found.mtime_nsec()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(PkiError::File { action: "look at", path, error }),
        }
    };
    Ok([state(CONSOLE_CERTIFICATE)?, state(CONSOLE_KEY)?])
}

fn read(folder: &Path, states: [FileState; 2]) -> Result<Option<Pair>, PkiError> {
    let (certificate, key) = (folder.join(CONSOLE_CERTIFICATE), folder.join(CONSOLE_KEY));
    let (there, missing) = match states {
        [None, None] => return Ok(None),
        [Some(_), Some(_)] => {
            let pair = Pair::load(&certificate, &key)?;
            // Whoever puts it there may know that all clients have that authority.
            if let Some(issuer) = pair.missing_issuer(std::iter::empty())? {
                warn!(
                    "the chain in {} ends before its issuer, {issuer}, which this host does not trust by itself: append its \
                     certificate, or clients may not be able to verify it",
                    certificate.display()
                );
            }
            return Ok(Some(pair));
        }
        [Some(_), None] => (certificate, CONSOLE_KEY),
        [None, Some(_)] => (key, CONSOLE_CERTIFICATE),
    };
    let detail = format!("{missing} is missing beside it");
    Err(PkiError::Malformed { path: there, expected: "a certificate that can be used with its key", detail })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::unix_time,
        cluster::ClusterId,
        pki::{Authority, Issued, store_pem},
    };

    const NOW: u64 = 1 << 40; // nothing is checked against it but what must have expired

    fn put(dir: &Path, issued: &Issued) {
        fs::create_dir_all(dir.join(CUSTOM_FOLDER)).unwrap();
        issued.save_console(&dir.join(CUSTOM_FOLDER)).unwrap();
    }

    fn issued(name: &str) -> Issued {
        Authority::create(ClusterId(7)).unwrap().issue_console(&[name]).unwrap()
    }

    fn name(folder: &CustomFolder) -> Option<String> {
        folder.pair().map(|pair| pair.info().names[0].clone())
    }

    #[test]
    fn files_are_followed_once_they_rest() {
        let dir = tempfile::tempdir().unwrap();
        let mut folder = CustomFolder::open(dir.path()).unwrap();
        assert!(folder.pair().is_none() && !folder.poll(unix_time()));
        put(dir.path(), &issued("a.example"));
        assert!(!folder.poll(unix_time()), "it may still be written to");
        assert!(folder.poll(unix_time()) && name(&folder).unwrap() == "a.example");
        assert!(!folder.poll(unix_time()));
        // The certificate first and its key after a while: as soon as both are there.
        let next = issued("b.example");
        let path = dir.path().join(CUSTOM_FOLDER);
        store_pem(&path, CONSOLE_CERTIFICATE, &next.cert_pem, false).unwrap();
        assert!(!folder.poll(unix_time()));
        assert!(folder.poll(unix_time()) && folder.problem().unwrap().contains("does not belong"));
        assert!(!folder.poll(unix_time()), "said once");
        assert_eq!(name(&folder).unwrap(), "a.example");
        store_pem(&path, CONSOLE_KEY, &next.key_pem, true).unwrap();
        assert!(!folder.poll(unix_time()) && folder.poll(unix_time()));
        assert_eq!((name(&folder).unwrap().as_str(), folder.problem()), ("b.example", None));
        fs::remove_file(path.join(CONSOLE_KEY)).unwrap();
        assert!(!folder.poll(unix_time()) && folder.poll(unix_time()));
        assert!(folder.problem().unwrap().contains("console-key.pem is missing") && folder.pair().is_some());
        fs::remove_dir_all(&path).unwrap();
        assert!(!folder.poll(unix_time()) && folder.poll(unix_time()));
        assert!(folder.pair().is_none() && folder.problem().is_none(), "taken away on purpose");
    }

    #[test]
    fn one_that_has_expired_does_not_take_the_place_of_a_good_one() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), &issued("a.example"));
        let mut folder = CustomFolder::open(dir.path()).unwrap();
        put(dir.path(), &issued("b.example"));
        assert!(!folder.poll(NOW) && folder.poll(NOW));
        assert!(folder.problem().unwrap().contains("has expired"));
        assert_eq!(name(&folder).unwrap(), "a.example");
    }

    #[test]
    fn what_is_broken_at_the_start_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), &issued("a.example"));
        let path = dir.path().join(CUSTOM_FOLDER);
        let why = || CustomFolder::open(dir.path()).unwrap_err().to_string();
        issued("b.example").save_console(&path).unwrap();
        CustomFolder::open(dir.path()).unwrap();
        store_pem(&path, CONSOLE_KEY, &issued("c.example").key_pem, true).unwrap();
        assert!(why().contains("console-cert.pem") && why().contains("does not belong"), "{}", why());
        store_pem(&path, CONSOLE_KEY, "nothing", true).unwrap();
        assert!(why().contains("no private key"), "{}", why());
        fs::remove_file(path.join(CONSOLE_CERTIFICATE)).unwrap();
        assert!(why().contains("console-key.pem") && why().contains("console-cert.pem is missing"), "{}", why());
    }
}
