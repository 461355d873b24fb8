//! The place of the copies, `BACKUP_URL`: what lies there under a backup's name, put, fetched and deleted. Each copy is
//! called `CLUSTER/NODE/FILE` below the URL. Sends and receives in bounded memory. Must never touch anything there that
//! has no backup's name, and never let a credential into a message.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt;
use object_store::{
    ObjectStore, ObjectStoreExt, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    local::LocalFileSystem,
    path::Path as Key,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{
    Backup, BackupError, BackupId,
    folder::{create, describe},
    name, wire,
};
use crate::config;

/// Most names that are looked at.
const MAX_NAMES: usize = 100_000;
/// Most backups that are listed.
const MAX_LIST: usize = 20_000;
/// Bytes that are sent in one request; more if there would be too many requests of a large backup.
const PART: u64 = 8 << 20;
/// Most parts of one object: S3 knows 10,000.
const MAX_PARTS: u64 = 9_000;
/// Longest time of a request without much content, its repetitions included; and for each next piece of an answer.
const QUICK: Duration = Duration::from_secs(60);
/// Repetitions of one request, and the time for all of them.
const RETRIES: usize = 3;
const RETRY_FOR: Duration = Duration::from_secs(150);
/// Largest file of credentials, in bytes.
const MAX_CREDENTIALS: u64 = 64 << 10;
/// Longest explanation of somebody else that is repeated, in characters.
const LONGEST_REASON: usize = 300;

/// A copy in the place of `BACKUP_URL`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RemoteBackup {
    /// `CLUSTER/NODE/FILE`: its name below `BACKUP_URL`.
    pub place: String,
    /// The number of the cluster that it was made in.
    pub cluster: String,
    /// The member that made it.
    pub node: String,
    pub backup: Backup,
}

/// The name of a copy, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub cluster: String,
    pub node: String,
    pub id: BackupId,
}

impl Place {
    /// Takes `CLUSTER/NODE/FILE` apart; none if it is anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('/');
        let (cluster, node, id) = (parts.next()?, parts.next()?, parts.next()?);
        let id = BackupId::parse(id)?;
        let sound = parts.next().is_none() && is_segment(cluster) && is_segment(node);
        sound.then(|| Self { cluster: cluster.to_owned(), node: node.to_owned(), id })
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.cluster, self.node, self.id)
    }
}

fn is_segment(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=64).contains(&text.len()) && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(plain)
}

/// A member's name as part of a copy's name.
pub(super) fn segment(member: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '_' };
    let text: String = member.chars().map(plain).take(60).collect();
    if is_segment(&text) { text } else { format!("n{text}") }
}

/// What a fetched copy is called in the folder: a manual backup, so that nobody deletes it by itself.
pub(super) fn fetched(place: &Place) -> BackupId {
    let name: String = format!("{}{}-{}", name::FETCHED, place.node, place.id.name).chars().take(64).collect();
    BackupId { name, ..place.id.clone() }
}

/// The place where copies of backups are kept. Shows nothing of its credentials.
pub(super) struct Store {
    inner: Arc<dyn ObjectStore>,
    below: Key,
    /// Of `file://`.
    folder: Option<PathBuf>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("below", &self.below).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the place. Nothing is asked of it yet.
    ///
    /// # Errors
    /// [`BackupError::Remote`] when there is no such folder, or the settings of S3 are not complete.
    /// [`BackupError::Refused`] when the URL or the file of credentials is wrong.
    pub fn open(url: &str, credentials: Option<&Path>) -> Result<Self, BackupError> {
        if let Some(folder) = url.strip_prefix("file://") {
            // One that is not there is not made: it may be a file system that is not mounted.
            let inner = LocalFileSystem::new_with_prefix(folder).map_err(remote)?.with_fsync(true);
            return Ok(Self { inner: Arc::new(inner), below: Key::default(), folder: Some(PathBuf::from(folder)) });
        }
        let rest = url.strip_prefix("s3://").ok_or_else(|| {
            BackupError::Refused("BACKUP_URL is like s3://BUCKET/FOLDER or file:///FOLDER".to_owned())
        })?;
        let (bucket, below) = rest.split_once('/').unwrap_or((rest, ""));
        let mut builder = AmazonS3Builder::from_env();
        for (key, value) in credentials.map(read_credentials).transpose()?.unwrap_or_default() {
            builder = builder.with_config(key, value);
        }
        let wire = wire::Connector::new().map_err(|error| BackupError::Remote(error.to_string()))?;
        let retry = RetryConfig { max_retries: RETRIES, retry_timeout: RETRY_FOR, ..RetryConfig::default() };
        let builder = builder.with_bucket_name(bucket).with_retry(retry).with_http_connector(wire);
        let inner = Arc::new(builder.build().map_err(remote)?);
        Ok(Self { inner, below: Key::from(below.trim_matches('/')), folder: None })
    }

    /// In a folder, only the member itself may read its files, whatever rights they were made with: they hold all
    /// secrets of the Console.
    fn prepare(&self, place: &Place) -> Result<(), BackupError> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let cluster = folder.join(&place.cluster);
        let node = cluster.join(&place.node);
        let made = fs::create_dir(&cluster).or_else(unless_there);
        let made = made.and_then(|()| fs::DirBuilder::new().mode(0o700).create(&node).or_else(unless_there));
        made.map_err(|error| BackupError::Remote(format!("{} cannot be created: {error}", node.display())))
    }

    fn key(&self, place: &Place) -> Key {
        let below = self.below.clone();
        below.join(place.cluster.as_str()).join(place.node.as_str()).join(place.id.to_string())
    }

    /// All copies, or those of one member of one cluster; newest first.
    ///
    /// # Errors
    /// [`BackupError::Remote`] when the place refuses or does not answer in time, and when there are too many files.
    pub async fn list(&self, of: Option<(&str, &str)>) -> Result<Vec<RemoteBackup>, BackupError> {
        let under = match of {
            Some((cluster, node)) => self.below.clone().join(cluster).join(node),
            None => self.below.clone(),
        };
        let (mut stream, mut found, mut looked) = (self.inner.list(Some(&under)), Vec::new(), 0);
        while let Some(next) = timeout(QUICK, stream.next()).await.map_err(|_| late())? {
            let meta = next.map_err(remote)?;
            let parts: Option<Vec<String>> = meta
                .location
                .prefix_match(&self.below)
                .map(|parts| parts.map(|part| part.as_ref().to_owned()).collect());
            if let Some(place) = parts.and_then(|parts| Place::parse(&parts.join("/"))) {
                let backup = describe(&place.id, meta.size);
                found.push(RemoteBackup { place: place.to_string(), cluster: place.cluster, node: place.node, backup });
            }
            looked += 1;
            if looked == MAX_NAMES || found.len() == MAX_LIST {
                return Err(BackupError::Remote(format!("there are more than {looked} files: tidy it up")));
            }
        }
        found.sort_by(|one, other| (other.backup.time, &one.place).cmp(&(one.backup.time, &other.place)));
        Ok(found)
    }

    /// Length of a copy.
    ///
    /// # Errors
    /// [`BackupError::NotFound`] when there is no such copy. [`BackupError::Remote`] when the place refuses or does not
    /// answer in time.
    pub async fn length(&self, place: &Place) -> Result<u64, BackupError> {
        let asked = timeout(QUICK, self.inner.head(&self.key(place))).await.map_err(|_| late())?;
        match asked {
            Ok(meta) => Ok(meta.size),
            Err(object_store::Error::NotFound { .. }) => {
                Err(BackupError::NotFound(format!("there is no copy {place} at BACKUP_URL")))
            }
            Err(error) => Err(remote(error)),
        }
    }

    /// Sends a file; `each` is told of every part. Afterwards the copy is there in its whole length, or as it was
    /// before. Each part carries a SHA-256 that is signed, so that S3 does not take a damaged one.
    ///
    /// # Errors
    /// [`BackupError::Remote`] when the place refuses or does not answer in time. [`BackupError::Io`] when the file
    /// cannot be read.
    pub async fn put(
        &self,
        place: &Place,
        path: &Path,
        length: u64,
        mut each: impl FnMut(u64),
    ) -> Result<(), BackupError> {
        let (key, part) = (self.key(place), part(length));
        self.prepare(place)?;
        let mut file = fs::File::open(path).map_err(BackupError::io("open", path))?;
        if length <= part {
            let bytes = read_part(&mut file, path, length)?;
            let sent = timeout(RETRY_FOR, self.inner.put(&key, bytes.into())).await;
            sent.map_err(|_| late())?.map_err(remote)?;
            each(length);
        } else {
            let begun = timeout(QUICK, self.inner.put_multipart(&key)).await;
            let mut upload = begun.map_err(|_| late())?.map_err(remote)?;
            let mut sent = async || -> Result<(), BackupError> {
                let mut done = 0;
                while done < length {
                    let bytes = read_part(&mut file, path, part.min(length - done))?;
                    let count = bytes.len() as u64;
                    let sent = timeout(RETRY_FOR, upload.put_part(bytes.into())).await;
                    sent.map_err(|_| late())?.map_err(remote)?;
                    done += count;
                    each(count);
                }
                timeout(RETRY_FOR, upload.complete()).await.map_err(|_| late())?.map_err(remote)?;
                Ok(())
            };
            if let Err(error) = sent().await {
                // Parts that stay behind are nobody's, and cost money. What they were is told by the first error.
                let _ = timeout(QUICK, upload.abort()).await;
                return Err(error);
            }
        }
        match self.length(place).await? {
            found if found == length => Ok(()),
            found => Err(BackupError::Remote(format!("{place} has {found} bytes there instead of {length}"))),
        }
    }

    /// Lets the place itself copy what lies there to another name. False if it cannot.
    pub async fn twin(&self, from: &Place, to: &Place, length: u64) -> bool {
        let copied = timeout(RETRY_FOR, self.inner.copy(&self.key(from), &self.key(to))).await;
        matches!(copied, Ok(Ok(()))) && self.length(to).await.is_ok_and(|found| found == length)
    }

    /// Fetches a copy into a new file; `each` is told of every piece.
    ///
    /// # Errors
    /// [`BackupError::Remote`] when the place refuses, does not answer in time, or has another length there.
    /// [`BackupError::Io`] when the new file cannot be written.
    pub async fn fetch(
        &self,
        place: &Place,
        to: &Path,
        length: u64,
        mut each: impl FnMut(u64),
    ) -> Result<(), BackupError> {
        let mut file = create(to)?;
        let asked = timeout(QUICK, self.inner.get(&self.key(place))).await.map_err(|_| late())?;
        let (mut stream, mut done) = (asked.map_err(remote)?.into_stream(), 0);
        while let Some(bytes) = timeout(QUICK, stream.next()).await.map_err(|_| late())? {
            let bytes = bytes.map_err(remote)?;
            done += bytes.len() as u64;
            if done > length {
                break;
            }
            file.write_all(&bytes).map_err(BackupError::io("write", to))?;
            each(bytes.len() as u64);
        }
        if done != length {
            return Err(BackupError::Remote(format!("{place} ended after {done} bytes of {length}")));
        }
        file.sync_all().map_err(BackupError::io("write", to))
    }

    /// Deletes a copy.
    ///
    /// # Errors
    /// [`BackupError::Remote`] when the place refuses or does not answer in time. That there is no such copy is no
    /// error.
    pub async fn delete(&self, place: &Place) -> Result<(), BackupError> {
        let deleted = timeout(QUICK, self.inner.delete(&self.key(place))).await.map_err(|_| late())?;
        match deleted {
            Err(object_store::Error::NotFound { .. }) => Ok(()),
            other => other.map_err(remote),
        }
    }
}

fn unless_there(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }
}

/// Bytes of one part of a file of this length.
fn part(length: u64) -> u64 {
    PART.max(length.div_ceil(MAX_PARTS).next_multiple_of(1 << 20))
}

fn read_part(file: &mut fs::File, path: &Path, count: u64) -> Result<Vec<u8>, BackupError> {
    let mut bytes = vec![0; count as usize];
    file.read_exact(&mut bytes).map_err(BackupError::io("read", path))?;
    Ok(bytes)
}

fn late() -> BackupError {
    BackupError::Remote("it does not answer in time".to_owned())
}

/// What the other side says, in one line of bounded length.
fn remote(error: object_store::Error) -> BackupError {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        let more = inner.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = inner.source();
    }
    // S3 explains itself in XML behind a long line of the client's own.
    let part = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>")).map(|(inner, _)| inner.to_owned())
    };
    if let Some(code) = part("Code") {
        text = format!("it refuses: {code}: {}", part("Message").unwrap_or_default());
    }
    let words: Vec<&str> =
        text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()).collect();
    BackupError::Remote(words.join(" ").chars().take(LONGEST_REASON).collect())
}

/// Reads `KEY=VALUE` lines: the names of AWS's environment variables in capital or small letters, as its own file of
/// credentials has them, with blanks around the `=` or without. The values are read like those of `twistlock.cfg`.
fn read_credentials(path: &Path) -> Result<Vec<(AmazonS3ConfigKey, String)>, BackupError> {
    let refused =
        |why: String| BackupError::Refused(format!("BACKUP_CREDENTIALS_FILE {} cannot be used: {why}", path.display()));
    let mut text = String::new();
    let file = fs::File::open(path).map_err(|error| refused(error.to_string()))?;
    let read = file.take(MAX_CREDENTIALS + 1).read_to_string(&mut text).map_err(|error| refused(error.to_string()))?;
    if read as u64 > MAX_CREDENTIALS {
        return Err(refused("it is too long".to_owned()));
    }
    let (mut found, mut profiles) = (Vec::new(), 0);
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if line.starts_with('[') && line.ends_with(']') {
            profiles += 1;
            if profiles > 1 {
                return Err(refused(format!("line {number} begins a second profile; there may be one only")));
            }
            continue;
        }
        // Never the line itself: it may be a secret.
        let wrong = || refused(format!("line {number} is not like AWS_ACCESS_KEY_ID=..., or not known"));
        let (key, value) = line.split_once('=').ok_or_else(wrong)?;
        let key = key.trim().to_ascii_lowercase();
        let known = key.parse().ok().filter(|_| key.starts_with("aws_")).ok_or_else(wrong)?;
        // As in AWS's own file, a value may be empty, and a # behind a blank begins a comment.
        let value = if value.trim_start().starts_with('#') { "" } else { value };
        let allowed =
            |allowed| refused(format!("line {number} has a value that cannot be read: {allowed} is allowed there"));
        found.push((known, config::literal(value).map_err(allowed)?));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn place(text: &str) -> Place {
        Place::parse(text).unwrap()
    }

    #[test]
    fn places_are_taken_apart() {
        let text = "17/node1/daily-0.1.0-5.tar.gz";
        assert_eq!(place(text).to_string(), text);
        for odd in [
            "node1/daily-0.1.0-5.tar.gz",
            "17/../daily-0.1.0-5.tar.gz",
            "17/node1/x/daily-0.1.0-5.tar.gz",
            "17/node1/notes.txt",
            "17//daily-0.1.0-5.tar.gz",
            "/17/node1/daily-0.1.0-5.tar.gz",
        ] {
            assert!(Place::parse(odd).is_none(), "{odd}");
        }
        for member in ["node1", "[::1]*", "ä.b", "..", "", &"x".repeat(200)] {
            assert!(is_segment(&segment(member)), "{member}");
        }
        assert_eq!((&*segment("node1.example"), &*segment("a:b")), ("node1.example", "a_b"));
        let back = fetched(&place(text));
        assert_eq!(back.to_string(), "fetched-node1-daily-0.1.0-5.tar.gz");
        let long = format!("17/{}/{}-0.1.0-5.tar.gz.sealed", "n".repeat(60), "x".repeat(64));
        assert!(BackupId::parse(&fetched(&place(&long)).to_string()).is_some());
    }

    #[test]
    fn parts_are_few_enough_and_bounded() {
        assert_eq!(part(5), PART);
        assert_eq!(part(PART * MAX_PARTS), PART);
        for length in [PART * MAX_PARTS + 1, 1 << 40] {
            assert!(length.div_ceil(part(length)) <= 10_000);
        }
    }

    #[tokio::test]
    async fn a_folder_holds_copies_and_other_things_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("file://{}", folder.path().display());
        let store = Store::open(&url, None).unwrap();
        assert!(store.list(None).await.unwrap().is_empty());
        let (file, large) = (folder.path().join("mine.txt"), PART as usize + 7);
        let content: Vec<u8> = (0..large).map(|at| (at / 5) as u8).collect();
        fs::write(&file, &content).unwrap();
        let (one, two) = (place("17/node1/daily-0.1.0-5.tar.gz"), place("17/node2/a-0.1.0-6.tar.gz"));
        let mut told = 0;
        store.put(&one, &file, large as u64, |bytes| told += bytes).await.unwrap();
        assert_eq!(told, large as u64);
        let mode = fs::metadata(folder.path().join("17/node1")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "nobody else may read it");
        store.put(&two, &file, 10, |_| {}).await.unwrap();
        let weekly = place("17/node1/weekly-0.1.0-5.tar.gz");
        assert!(store.twin(&one, &weekly, large as u64).await);
        fs::write(folder.path().join("17/node1/notes.txt"), "x").unwrap();
        let places: Vec<String> = store.list(None).await.unwrap().into_iter().map(|found| found.place).collect();
        assert_eq!(places, [two.to_string(), one.to_string(), weekly.to_string()]);
        assert_eq!(store.list(Some(("17", "node1"))).await.unwrap().len(), 2);
        let back = folder.path().join("back");
        store.fetch(&one, &back, large as u64, |_| {}).await.unwrap();
        assert!(fs::read(&back).unwrap() == content);
        let short = store.fetch(&two, &folder.path().join("short"), 11, |_| {}).await.unwrap_err();
        assert!(short.to_string().contains("10 bytes of 11"), "{short}");
        store.delete(&one).await.unwrap();
        store.delete(&one).await.unwrap();
        assert!(matches!(store.length(&one).await, Err(BackupError::NotFound(_))));
        assert!(folder.path().join("17/node1/notes.txt").exists() && file.exists());
    }

    #[test]
    fn what_the_other_side_says_is_one_short_line() {
        let of = |text: &str| {
            remote(object_store::Error::Generic { store: "S3", source: text.to_owned().into() }).to_string()
        };
        let xml = "GET http://a/b: 403\n<Error><Code>SignatureDoesNotMatch</Code><Message>no\nway</Message></Error>";
        assert!(of(xml).ends_with("it refuses: SignatureDoesNotMatch: no way"), "{}", of(xml));
        let long = of(&format!("a\u{1b}[2J {}", "x".repeat(5000)));
        assert!(long.len() < 400 && !long.contains('\u{1b}'), "{long}");
    }

    #[test]
    fn what_cannot_be_used_is_said_without_its_secrets() {
        let folder = tempfile::tempdir().unwrap();
        let missing = Store::open(&format!("file://{}/none", folder.path().display()), None).unwrap_err();
        assert!(matches!(missing, BackupError::Remote(_)), "{missing}");
        let path = folder.path().join("credentials");
        for (text, good) in [
            ("[default]\naws_access_key_id = A\naws_secret_access_key = hidden\n", true),
            ("# keys\nAWS_ACCESS_KEY_ID=A\nAWS_SECRET_ACCESS_KEY=\"hidden\"\nAWS_ENDPOINT=http://a:1\n", true),
            ("\u{feff}AWS_ACCESS_KEY_ID='A' # key\r\nAWS_SECRET_ACCESS_KEY=\"hidden\"  # and this\r\n", true),
            ("aws_access_key_id = A # key\naws_secret_access_key = 'hid'den\n", true),
            ("AWS_ACCESS_KEY_ID=A\nAWS_SECRET_ACCESS_KEY='hidden\n", false),
            ("AWS_ACCESS_KEY_ID=A\nAWS_SECRET_ACCESS_KEY=hidden more\n", false),
            ("AWS_ACCESS_KEY_ID=A\nAWS_SECRET_ACCESS_KEY=$(hidden)\n", false),
            ("[default]\n[other]\n", false),
            ("hidden\n", false),
            ("SECRET=hidden\n", false),
        ] {
            fs::write(&path, text).unwrap();
            match read_credentials(&path) {
                Ok(found) => {
                    assert!(
                        good && found.len() >= 2 && (found[0].1.as_str(), found[1].1.as_str()) == ("A", "hidden"),
                        "{text}"
                    );
                }
                Err(error) => assert!(!good && !error.to_string().contains("hidden"), "{error}"),
            }
        }
        fs::write(&path, "AWS_ACCESS_KEY_ID=A\nAWS_SECRET_ACCESS_KEY=hidden\n").unwrap();
        let store = Store::open("s3://bucket/folder", Some(&path)).unwrap();
        assert!(!format!("{store:?}").contains("hidden"), "{store:?}");
    }
}
