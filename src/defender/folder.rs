//! The folder of a Defender: its settings, its key and certificate, the authorities that it trusts, the last policy.
//! Must never leave half a file, nor a key that others can read.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::wire::Policy;

const SETTINGS: &str = "defender.json";
const KEY: &str = "key.pem";
const CERTIFICATE: &str = "certificate.pem";
/// The certificate before: that of an authority which is introduced is worth nothing if another one takes its place.
const BEFORE: &str = "certificate.before.pem";
const AUTHORITIES: &str = "ca.pem";
const POLICY: &str = "policy.json";
const LOCK: &str = "lock";
/// The folder of the queue.
const QUEUE: &str = "queue";
/// What the watch knows of the files.
const BASELINE: &str = "baseline.json";
/// Longest file that is read as a whole, in bytes.
const LONGEST: u64 = 256 << 20;

/// What a registration has settled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Settings {
    /// `host:port` of the Consoles' port for Defenders; a name may have many addresses.
    pub(super) consoles: Vec<String>,
    /// How this host is called.
    pub(super) name: String,
    /// Its id with the Console.
    pub(super) id: String,
    /// Bytes that the queue may take.
    pub(super) queue_bytes: u64,
}

/// The folder. Only its owner can look into it.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
}

/// As long as this is there, no other process runs a Defender with this folder.
pub(super) struct Lock {
    _file: Flock<File>,
}

impl Folder {
    /// Makes it if it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.with_context(|| format!("make the folder {}", path.display()))?;
        Ok(Self { path: path.to_owned() })
    }

    /// Takes it for this process.
    ///
    /// # Errors
    /// When another process has it.
    pub(super) fn lock(&self) -> Result<Lock> {
        self.try_lock()?.context("another Defender runs with this folder")
    }

    /// Takes it, if no other process has it.
    ///
    /// # Errors
    /// When the file that says so cannot be opened or written.
    pub(super) fn try_lock(&self) -> Result<Option<Lock>> {
        let path = self.path.join(LOCK);
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.with_context(|| format!("open {}", path.display()))?;
        let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, error)) => return Err(error).with_context(|| format!("lock {}", path.display())),
        };
        let named = file.set_len(0).and_then(|()| file.write_all(std::process::id().to_string().as_bytes()));
        named.with_context(|| format!("write {}", path.display()))?;
        Ok(Some(Lock { _file: file }))
    }

    /// The process that took the folder last, by its id.
    pub(super) fn holder(&self) -> Option<i32> {
        self.text(LOCK).ok()??.trim().parse().ok()
    }

    /// What was settled; none before a registration.
    ///
    /// # Errors
    /// When the file is damaged or cannot be read.
    pub(super) fn settings(&self) -> Result<Option<Settings>> {
        self.json(SETTINGS)
    }

    pub(super) fn keep_settings(&self, settings: &Settings) -> Result<()> {
        self.keep_json(SETTINGS, settings)
    }

    /// The last policy, or the one that watches nothing. One that is damaged counts as none: the Console has it.
    pub(super) fn policy(&self) -> Policy {
        let read = self.json(POLICY).unwrap_or_else(|error| {
            tracing::warn!("the last policy cannot be read: {error:#}");
            None
        });
        read.unwrap_or_default()
    }

    pub(super) fn keep_policy(&self, policy: &Policy) -> Result<()> {
        self.keep_json(POLICY, policy)
    }

    /// The key, which is made if there is none.
    ///
    /// # Errors
    /// When it cannot be made or kept.
    pub(super) fn key(&self) -> Result<String> {
        if let Some(key) = self.text(KEY)? {
            return Ok(key);
        }
        let key = crate::pki::new_key()?;
        self.keep(KEY, key.as_bytes())?;
        Ok(key)
    }

    /// Certificate and authorities, PEM.
    ///
    /// # Errors
    /// When one of them is missing or cannot be read.
    pub(super) fn credentials(&self) -> Result<(String, String)> {
        let certificate = self.text(CERTIFICATE)?.context("there is no certificate: register this host")?;
        let authorities = self.text(AUTHORITIES)?.context("there is no authority to trust: register this host")?;
        Ok((certificate, authorities))
    }

    /// The certificate before, if there was one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn certificate_before(&self) -> Result<Option<String>> {
        self.text(BEFORE)
    }

    pub(super) fn keep_certificate(&self, pem: &str) -> Result<()> {
        match self.text(CERTIFICATE)? {
            Some(before) if before != pem => self.keep(BEFORE, before.as_bytes())?,
            _ => {}
        }
        self.keep(CERTIFICATE, pem.as_bytes())
    }

    pub(super) fn keep_authorities(&self, pem: &str) -> Result<()> {
        self.keep(AUTHORITIES, pem.as_bytes())
    }

    pub(super) fn queue(&self) -> PathBuf {
        self.path.join(QUEUE)
    }

    /// What the watch has kept.
    ///
    /// # Errors
    /// When it is damaged or cannot be read.
    pub(super) fn baseline<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        self.json(BASELINE)
    }

    pub(super) fn keep_baseline<T: Serialize>(&self, baseline: &T) -> Result<()> {
        self.keep_json(BASELINE, baseline)
    }

    fn json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).with_context(|| format!("{} is damaged", self.path.join(name).display()))
    }

    fn keep_json<T: Serialize>(&self, name: &str, value: &T) -> Result<()> {
        self.keep(name, &serde_json::to_vec(value)?)
    }

    fn text(&self, name: &str) -> Result<Option<String>> {
        let path = self.path.join(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let mut text = String::new();
        let read = file.take(LONGEST + 1).read_to_string(&mut text);
        read.with_context(|| format!("read {}", path.display()))?;
        ensure!(text.len() as u64 <= LONGEST, "{} is too long", path.display());
        Ok(Some(text))
    }

    /// Replaces a file as a whole, durably.
    fn keep(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        let write = || {
            let temporary = self.path.join(format!("{name}.new"));
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.path)?.sync_all()
        };
        write().with_context(|| format!("write {}", path.display()))
    }
}
