//! A host that waits until a pool adds it: the keys by which it is known, what it tells of itself, and what it keeps of
//! the pool. From there on it joins as any other host. Must never keep a word of a pool that contradicts itself.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::{
    JoinFile, JoinRequest,
    files::{Asked, Host, Requests},
};
use crate::{
    clock::unix_time_ms,
    pki::{self, SigningRequest},
};

/// A host that may be added.
pub struct Candidate {
    host: Host,
    requests: Requests,
    key: String,
    fingerprint: String,
}

impl Candidate {
    /// With the keys of an earlier start in the folder of the certificates, or with new ones.
    ///
    /// # Errors
    /// When keys cannot be made, read or written.
    pub fn prepare(certificates: &Path, host: Host) -> Result<Self> {
        let requests = Requests::prepare(certificates, &host.name)?;
        let path = certificates.join(pki::NODE_KEY);
        let key = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let parsed = SigningRequest::parse(&requests.node);
        let fingerprint = parsed.with_context(|| format!("use {}", path.display()))?.fingerprint().to_owned();
        Ok(Self { host, requests, key, fingerprint })
    }

    /// What this host is called.
    pub fn name(&self) -> &str {
        &self.host.name
    }

    /// The key of the node, PEM: by it the host is known.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// SHA-256 of that key, which whoever adds the host compares.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// What it tells of itself to a pool that reaches it at this address.
    pub fn request(&self, address: &str) -> JoinRequest {
        self.host.request(&self.requests, address, unix_time_ms())
    }

    /// Keeps which pool has added this host, and by which id that knows it. From here on the host joins, whenever it is
    /// started.
    ///
    /// # Errors
    /// When the two contradict each other, or a file cannot be written. The host goes on waiting then.
    pub fn adopted(data: &Path, file: &JoinFile, id: &str) -> Result<()> {
        file.check()?;
        // In this order: what is there without the other one is not looked at.
        Asked { id: id.to_owned() }.save(data)?;
        file.save(data)
    }
}
