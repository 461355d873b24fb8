//! How each watched file was when it was last looked at. Owns what counts as a change. Must never be ahead of the
//! queue: what is in it was told by an event that is on disk, or need not be told.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File, Metadata},
    io::{self, Read},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use data_encoding::HEXLOWER;
use nix::{
    fcntl::OFlag,
    unistd::{Gid, Group, Uid, User},
};
use ring::digest;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::wire::Watched;
use crate::clock::since_1970;

/// The kind of an event that tells of a path.
pub(super) const FILE: &str = "file";
/// Bytes that are read at a time.
const CHUNK: usize = 64 << 10;
/// How near to a look a change must be to hide another one, in nanoseconds; the times of a disk that another host
/// serves may differ from ours.
const TICK: i64 = 2_000_000_000;
/// A time of change that no file has.
const UNSURE: i64 = i64::MIN;
/// `S_IFMT`, and what of the mode is shown.
const FORMAT: u32 = 0o170_000;
const PERMISSIONS: u32 = 0o7777;

/// What is known of one path. What tells whether it must be read again is not part of what is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Known {
    /// With the kind of the file.
    mode: u32,
    uid: u32,
    gid: u32,
    /// 0 but for files.
    size: u64,
    /// Of the content of a file that is not too long, or of the target of a link.
    sha256: Option<String>,
    /// Modification, change and inode.
    seen: (i64, i64, u64),
}

/// All of it, as it is kept.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Baseline {
    /// The events up to this number are in it.
    pub(super) through: u64,
    /// The paths of the policy below which everything is known.
    pub(super) complete: Vec<Watched>,
    /// By path, which [`shown`] writes.
    paths: BTreeMap<String, Known>,
}

impl Known {
    /// Looks at a path; none if there is nothing. A file that is as it was is not read again, unless it had been
    /// changed just before the last look: another change in the same tick of the kernel's clock would not show in its
    /// times.
    ///
    /// # Errors
    /// When it is there and cannot be looked at.
    pub(super) fn look(path: &Path, before: Option<&Self>, hash_bytes: u64) -> io::Result<Option<Self>> {
        let found = match fs::symlink_metadata(path) {
            Ok(found) => found,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let now = i64::try_from(since_1970().as_nanos()).unwrap_or(i64::MAX);
        let mut known = Self::of(&found);
        if let Some(before) = before.filter(|before| before.seen == known.seen && before.size == known.size) {
            known.sha256.clone_from(&before.sha256);
            return Ok(Some(known));
        }
        if known.seen.1 > now - TICK {
            known.seen.1 = UNSURE;
        }
        if found.is_symlink() {
            known.sha256 = Some(hex(digest::digest(&digest::SHA256, fs::read_link(path)?.as_os_str().as_bytes())));
        } else if found.is_file() && found.len() <= hash_bytes {
            known.sha256 = match content(path, hash_bytes) {
                Ok(sha256) => sha256,
                // It went away between the two looks.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            };
        }
        Ok(Some(known))
    }

    fn of(found: &Metadata) -> Self {
        let time = |seconds: i64, nanos: i64| seconds.saturating_mul(1_000_000_000).saturating_add(nanos);
        Self {
            mode: found.mode(),
            uid: found.uid(),
            gid: found.gid(),
            size: if found.is_file() { found.len() } else { 0 },
            sha256: None,
            seen: (time(found.mtime(), found.mtime_nsec()), time(found.ctime(), found.ctime_nsec()), found.ino()),
        }
    }

    pub(super) fn is_folder(&self) -> bool {
        self.mode & FORMAT == 0o040_000
    }

    /// True if nothing that is told is another. Without a hash on both sides the time of the last change tells.
    fn is_like(&self, other: &Self) -> bool {
        let content = match (&self.sha256, &other.sha256) {
            (Some(one), Some(other)) => one == other,
            (None, None) => self.is_folder() || self.seen.0 == other.seen.0,
            _ => false,
        };
        content && (self.mode, self.uid, self.gid, self.size) == (other.mode, other.uid, other.gid, other.size)
    }

    fn told(&self) -> Value {
        let kind = match self.mode & FORMAT {
            0o100_000 => "file",
            0o040_000 => "folder",
            0o120_000 => "link",
            _ => "other",
        };
        let owner = User::from_uid(Uid::from_raw(self.uid)).ok().flatten().map(|user| user.name);
        let group = Group::from_gid(Gid::from_raw(self.gid)).ok().flatten().map(|group| group.name);
        let mode = format!("{:04o}", self.mode & PERMISSIONS);
        json!({ "kind": kind, "mode": mode, "size": self.size, "sha256": self.sha256,
            "uid": self.uid, "gid": self.gid, "owner": owner, "group": group, "bits": self.mode })
    }

    /// The inverse of [`Self::told`]: it will be read again.
    fn of_told(told: &Value) -> Option<Self> {
        let number = |name: &str| told[name].as_u64();
        Some(Self {
            mode: u32::try_from(number("bits")?).ok()?,
            uid: u32::try_from(number("uid")?).ok()?,
            gid: u32::try_from(number("gid")?).ok()?,
            size: number("size")?,
            sha256: told["sha256"].as_str().map(str::to_owned),
            seen: (0, 0, 0),
        })
    }
}

/// SHA-256 of a file; none if it is longer than it may be by now. Opening a pipe in its place must not wait.
fn content(path: &Path, most: u64) -> io::Result<Option<String>> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = fs::OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let mut file: io::Take<File> = file.take(most + 1);
    let (mut context, mut chunk) = (digest::Context::new(&digest::SHA256), vec![0; CHUNK]);
    loop {
        match file.read(&mut chunk)? {
            0 if file.limit() == 0 => return Ok(None),
            0 => return Ok(Some(hex(context.finish()))),
            count => context.update(&chunk[..count]),
        }
    }
}

fn hex(digest: digest::Digest) -> String {
    HEXLOWER.encode(digest.as_ref())
}

impl Baseline {
    pub(super) fn get(&self, path: &Path) -> Option<&Known> {
        self.paths.get(&shown(path))
    }

    pub(super) fn set(&mut self, path: &Path, known: Option<Known>) {
        match known {
            Some(known) => drop(self.paths.insert(shown(path), known)),
            None => drop(self.paths.remove(&shown(path))),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.paths.len()
    }

    pub(super) fn paths(&self) -> impl Iterator<Item = PathBuf> {
        self.paths.keys().map(|text| meant(text))
    }

    /// All that is below a folder.
    pub(super) fn below(&self, folder: &Path) -> Vec<PathBuf> {
        let start = format!("{}/", shown(folder).trim_end_matches('/'));
        self.paths.range(start.clone()..).map_while(|(text, _)| text.starts_with(&start).then(|| meant(text))).collect()
    }

    /// Forgets what is not wanted any more.
    pub(super) fn retain(&mut self, wanted: impl Fn(&Path) -> bool) {
        self.paths.retain(|text, _| wanted(&meant(text)));
    }

    /// The change of a path as an event tells it; none if there is none.
    pub(super) fn change(&self, path: &Path, after: Option<&Known>) -> Option<Value> {
        let before = self.get(path);
        let change = match (before, after) {
            (None, None) => return None,
            (Some(before), Some(after)) if before.is_like(after) => return None,
            (Some(before), Some(after)) if before.sha256 == after.sha256 && before.size == after.size => "attributes",
            (Some(_), Some(_)) => "modified",
            (None, Some(_)) => "created",
            (Some(_), None) => "deleted",
        };
        let (before, after) = (before.map(Known::told), after.map(Known::told));
        Some(json!({ "path": shown(path), "change": change, "before": before, "after": after }))
    }

    /// Takes in what an event of the queue tells, which a crash has kept from it.
    pub(super) fn catch_up(&mut self, number: u64, kind: &str, event: &Value) {
        self.through = self.through.max(number);
        let Some(path) = event["path"].as_str().filter(|_| kind == FILE) else { return };
        match Known::of_told(&event["after"]) {
            Some(known) => drop(self.paths.insert(path.to_owned(), known)),
            None => drop(self.paths.remove(path)),
        }
    }
}

/// A path as text, from which [`meant`] makes the same again: bytes that are no UTF-8, and backslashes, are escaped.
pub(super) fn shown(path: &Path) -> String {
    let mut text = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => text.push_str("\\x5c"),
                c => text.push(c),
            }
        }
        for byte in chunk.invalid() {
            text.push_str("\\x");
            text.push_str(&HEXLOWER.encode(&[*byte]));
        }
    }
    text
}

fn meant(text: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((before, behind)) = rest.split_once("\\x") {
        bytes.extend(before.bytes());
        let digits = behind.get(..2).and_then(|digits| HEXLOWER.decode(digits.as_bytes()).ok());
        match digits {
            Some(byte) => bytes.extend(byte),
            None => bytes.extend(b"\\x"),
        }
        rest = behind.get(2..).unwrap_or_default();
    }
    bytes.extend(rest.bytes());
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_path_comes_back_from_its_text() {
        for bytes in [&b"/etc/passwd"[..], b"/a\\x5cb", b"/\xff\xfe/\xc3\xa4", b"\\", b"/a\\"] {
            let path = PathBuf::from(OsString::from_vec(bytes.to_vec()));
            assert_eq!(meant(&shown(&path)), path, "{bytes:?}");
        }
        assert_eq!(shown(Path::new("/ä b")), "/ä b");
    }

    #[test]
    fn only_what_is_told_is_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mut baseline = Baseline::default();
        let look = |baseline: &Baseline| Known::look(&path, baseline.get(&path), 10).unwrap();
        let step = |baseline: &mut Baseline| -> Option<String> {
            let after = look(baseline);
            let change = baseline.change(&path, after.as_ref());
            baseline.set(&path, after);
            change.map(|change| change["change"].as_str().unwrap().to_owned())
        };
        assert_eq!(step(&mut baseline), None);
        fs::write(&path, "one").unwrap();
        assert_eq!(step(&mut baseline).as_deref(), Some("created"));
        assert_eq!(step(&mut baseline), None);
        fs::write(&path, "one").unwrap();
        assert_eq!(step(&mut baseline), None, "written again, it is the same");
        fs::write(&path, "two").unwrap();
        assert_eq!(step(&mut baseline).as_deref(), Some("modified"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(step(&mut baseline).as_deref(), Some("attributes"));
        fs::write(&path, "longer than ten").unwrap();
        assert_eq!(step(&mut baseline).as_deref(), Some("modified"));
        assert_eq!(baseline.get(&path).unwrap().sha256, None);
        fs::remove_file(&path).unwrap();
        assert_eq!(step(&mut baseline).as_deref(), Some("deleted"));
        symlink("/nowhere", &path).unwrap();
        assert_eq!(step(&mut baseline).as_deref(), Some("created"));
    }

    #[test]
    fn what_an_event_told_is_no_change_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "one").unwrap();
        let after = Known::look(&path, None, 10).unwrap();
        let told = Baseline::default().change(&path, after.as_ref()).unwrap();
        // As a start finds it that lost the baseline, but not the event.
        let mut baseline = Baseline::default();
        baseline.catch_up(7, FILE, &told);
        assert_eq!((baseline.through, baseline.len()), (7, 1));
        let again = Known::look(&path, baseline.get(&path), 10).unwrap();
        assert_eq!(baseline.change(&path, again.as_ref()), None);
        fs::remove_file(&path).unwrap();
        let gone = baseline.change(&path, None).unwrap();
        baseline.catch_up(8, FILE, &gone);
        assert_eq!((baseline.through, baseline.len()), (8, 0));
    }

    #[test]
    fn what_is_below_a_folder_is_found() {
        let mut baseline = Baseline::default();
        let known = Known { mode: 0, uid: 0, gid: 0, size: 0, sha256: None, seen: (0, 0, 0) };
        for path in ["/a", "/a/b", "/a/b/c", "/a-b", "/b"] {
            baseline.set(Path::new(path), Some(known.clone()));
        }
        assert_eq!(baseline.below(Path::new("/a")), [Path::new("/a/b"), Path::new("/a/b/c")]);
        assert_eq!(baseline.below(Path::new("/")).len(), 5);
    }
}
