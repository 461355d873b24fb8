//! What a host that joins keeps in its data folder, in the order in which it is written:
//!
//! 1. `join.json`, written by the join script: token, addresses, the cluster's CA. It may be replaced at any time.
//! 2. `certificates/`: the keys of node and Console. Made once: the cluster knows this host by them.
//! 3. `join-request.json`: by which name the cluster has the request. The token is worth nothing any more after APPLY.
//! 4. The certificates, then the snapshot with the cluster key.
//! 5. `identity.json`: from here on the host is a member. Then the files of 1 and 3 go.
//!
//! After a crash between any two of them, joining goes on from there. Must never write an identity before all else is
//! durable.

use std::{fs, io, path::Path};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tracing::warn;

use super::{JoinRequest, RequestState, Token};
use crate::{
    cluster::{Membership, NodeId, feature_level, shared::console_names_that_fit},
    pki,
    storage::{DataDir, IDENTITY_FORMAT, Identity, durable_write, fsync_dir, make_private_dir},
};

/// What the join script leaves.
pub const JOIN_FILE: &str = "join.json";
const REQUEST_FILE: &str = "join-request.json";
/// Longest of these files, in bytes.
const LIMIT: u64 = 64 << 10;
/// How many addresses are tried.
const MAX_ADDRESSES: usize = 16;

/// The content of `join.json`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinFile {
    pub token: String,
    /// `host:port` of the members' Consoles.
    pub addresses: Vec<String>,
    /// The authority's certificate, PEM.
    pub ca: String,
    /// True if a pool has added this host while it waited: it is admitted already, and the token is good for nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub adopted: bool,
}

impl JoinFile {
    /// Reads the file and checks it against itself: the CA must be the one that the token vouches for.
    ///
    /// # Errors
    /// When the file is gone or damaged, or contradicts itself. The sentence names the file; a new join script writes
    /// it again.
    pub fn read(data: &Path) -> Result<Self> {
        let path = data.join(JOIN_FILE);
        let file: Self = read_json(&path)?.with_context(|| format!("{} is gone", path.display()))?;
        file.check().with_context(|| format!("{} cannot be used", path.display()))?;
        Ok(file)
    }

    /// Writes the file, durably.
    pub(super) fn save(&self, data: &Path) -> Result<()> {
        let path = data.join(JOIN_FILE);
        let write = || durable_write(&path, &serde_json::to_vec(self)?);
        write().with_context(|| format!("write {}", path.display()))
    }

    /// Checks the content against itself.
    pub(super) fn check(&self) -> Result<()> {
        let token: Token = self.token.parse().map_err(anyhow::Error::msg)?;
        let ca = pki::certificate_der(&self.ca).context("the CA is not a certificate in PEM form")?;
        ensure!(token.trusts(&ca), "the CA is not the one that the join token vouches for: run the join script again");
        ensure!((1..=MAX_ADDRESSES).contains(&self.addresses.len()), "1 to {MAX_ADDRESSES} addresses are allowed");
        for address in &self.addresses {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
            ensure!(address.len() <= 300 && address.chars().all(plain), "{address:?} is not host:port");
        }
        Ok(())
    }
}

/// The content of `join-request.json`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Asked {
    /// The cluster's secret name of the request.
    pub id: String,
}

impl Asked {
    /// Reads the file. None also if it is damaged: the cluster tells the name of a request again to whoever makes it
    /// again.
    pub fn read(data: &Path) -> Result<Option<Self>> {
        let path = data.join(REQUEST_FILE);
        read_json(&path).or_else(|error| {
            warn!("{error:#}: this host asks again");
            remove(&path).map(|()| None)
        })
    }

    /// Keeps it, durably.
    pub fn save(&self, data: &Path) -> Result<()> {
        let path = data.join(REQUEST_FILE);
        let write = || durable_write(&path, &serde_json::to_vec(self)?);
        write().with_context(|| format!("write {}", path.display()))
    }

    /// Removes the file: the request is to be made again, or was turned down.
    pub fn forget(data: &Path) -> Result<()> {
        remove(&data.join(REQUEST_FILE))
    }
}

/// The two signing requests of this host. Their keys stay in their files.
pub(super) struct Requests {
    pub node: String,
    pub console: String,
}

impl Requests {
    /// Signing requests for the keys of an earlier attempt, or for new ones. The names of the certificates are not in
    /// them: the cluster decides those.
    ///
    /// # Errors
    /// When keys cannot be made, read or written.
    pub fn prepare(certificates: &Path, name: &str) -> Result<Self> {
        make_private_dir(certificates).with_context(|| format!("create {}", certificates.display()))?;
        Ok(Self {
            node: request(certificates, pki::NODE_KEY, name)?,
            console: request(certificates, pki::CONSOLE_KEY, name)?,
        })
    }
}

fn request(dir: &Path, key_name: &str, name: &str) -> Result<String> {
    let path = dir.join(key_name);
    let key = match fs::read_to_string(&path) {
        Ok(key) => key,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = pki::new_key()?;
            pki::store_pem(dir, key_name, &key, true)?;
            key
        }
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    pki::request_with(&key, name, &[])
        .with_context(|| format!("{} cannot be used: move it away, and run the join script again", path.display()))
}

/// What a host was admitted with.
pub(super) struct Admitted {
    pub node: NodeId,
    pub membership: Membership,
}

impl Admitted {
    /// Writes the certificates of an [`RequestState::Admitted`] and checks them: they must fit the keys and the CA that
    /// the token vouched for.
    ///
    /// # Errors
    /// When the answer contradicts itself, or a file cannot be written.
    pub fn save(state: RequestState, file: &JoinFile, certificates: &Path) -> Result<Self> {
        let RequestState::Admitted { node, certificate, console_certificate, ca, membership } = state else {
            bail!("this host has not been admitted");
        };
        let der = |pem: &str| pki::certificate_der(pem).context("read a CA certificate");
        ensure!(der(&ca)? == der(&file.ca)?, "the cluster answered with another CA than the join token vouches for");
        let files = [
            // With the others that are trusted while it is being replaced.
            (pki::CA_CERTIFICATE, &ca),
            (pki::NODE_CERTIFICATE, &certificate),
            (pki::CONSOLE_CERTIFICATE, &console_certificate),
        ];
        for (name, pem) in files {
            pki::store_pem(certificates, name, pem, false)?;
        }
        let found = pki::NodeTls::load(certificates).context("use the certificate that the cluster gave")?.identity;
        let expected = (membership.cluster, node);
        ensure!(found == expected, "the cluster gave a certificate for node {} instead of node {node}", found.1);
        pki::Pair::load(&certificates.join(pki::CONSOLE_CERTIFICATE), &certificates.join(pki::CONSOLE_KEY))
            .context("use the Console certificate that the cluster gave")?;
        ensure!(membership.get(node).is_some(), "the cluster answered without this host among its members");
        Ok(Self { node, membership })
    }

    /// Makes the data folder a member's. This is the last step.
    ///
    /// # Errors
    /// When the identity cannot be written, or the files that only joining needs cannot be removed.
    pub fn become_member(self, data: &DataDir) -> Result<Identity> {
        let name = self.membership.get(self.node).map(|member| member.name.clone()).unwrap_or_default();
        let Self { node, membership } = self;
        let identity = Identity { format: IDENTITY_FORMAT, cluster: membership.cluster, node, name, membership };
        data.create_identity(&identity)?;
        clear(data.path())?;
        Ok(identity)
    }
}

/// Removes what only a host that joins needs. Called when there is an identity: a crash may have left them.
///
/// # Errors
/// When they cannot be removed: the token should not stay.
pub fn clear(data: &Path) -> Result<()> {
    [JOIN_FILE, REQUEST_FILE].into_iter().try_for_each(|name| remove(&data.join(name)))
}

/// What this host tells about itself, without its signing requests and its clock.
#[derive(Clone, Debug)]
pub struct Host {
    pub name: String,
    /// None: the address from which it reaches the primary.
    pub address: Option<String>,
    /// `HIGH_AVAILABILITY_PORT`.
    pub port: u16,
    pub version: String,
    /// Of its Console certificate, beside its own address.
    pub console_names: Vec<String>,
}

impl Host {
    /// What this host sends to ask: `address` is where the members reach it.
    pub(super) fn request(&self, requests: &Requests, address: &str, time_ms: u64) -> JoinRequest {
        let mut console_names = self.console_names.clone();
        if !console_names.iter().any(|name| name == address) {
            // The names by which members and administrators reach it come first: the rest may not fit.
            console_names.insert(console_names.len().min(1), address.to_owned());
        }
        let console_names = console_names_that_fit(console_names);
        JoinRequest {
            name: self.name.clone(),
            address: address.to_owned(),
            port: self.port,
            version: self.version.clone(),
            level: feature_level(),
            csr: requests.node.clone(),
            console_csr: requests.console.clone(),
            console_names,
            time_ms,
        }
    }
}

/// Reads a small file of JSON; none if there is no such file.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    use io::Read;
    let mut text = Vec::new();
    match fs::File::open(path).and_then(|file| file.take(LIMIT).read_to_end(&mut text)) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    }
    let value = serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))?;
    Ok(Some(value))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => {
            fsync_dir(path.parent().unwrap_or(Path::new("."))).with_context(|| format!("remove {}", path.display()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("remove {}", path.display())),
    }
}
