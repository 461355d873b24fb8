//! What all members share beside the roster: the requests of hosts that want to join and what permits them to ask,
//! certificates ([`authority`], [`console_certificate`]), where events are sent ([`webhook`]), and what only pools have
//! ([`pool`]). Must never know who is a member.

pub mod authority;
pub mod console_certificate;
pub mod pool;
pub mod webhook;

use serde::{Deserialize, Serialize};

use self::{
    authority::{IncomingAuthority, KeyExchange, MAX_AUTHORITIES, RetiredAuthority, SealedAuthority},
    console_certificate::{CustomCertificate, MAX_ADDED_ENCODED, MAX_CUSTOM},
    pool::{MAX_POOL, Pool},
    webhook::{MAX_WEBHOOK, MAX_WEBHOOKS, Webhook},
};
use super::{
    level,
    limits::{Impossible, MAX_CONSOLE_NAMES, MAX_NAME, MAX_NAMES, PER_NAME, fits, in_json},
    roster::{MOST, place},
    validity::in_force,
};

/// Invitations that may be open at one time.
pub(super) const MAX_OPEN: usize = 8;
/// Bytes of one invitation.
const MAX_INVITATION: usize = 2 * MAX_NAME + 256;
/// Longest signing request, in bytes of PEM: for a P-256 key it needs about 500.
pub(super) const MAX_CSR: usize = 1024;
/// Bytes of one request: five names, two signing requests, and names for a certificate.
const MAX_REQUEST: usize = 5 * MAX_NAME + 2 * in_json(MAX_CSR) + MAX_NAMES + 320;
/// Bytes of what the members of a cluster share, with all at its limit: a member waits for at most [`MOST`] - 1 hosts.
pub(super) const MAX_SHARED: usize = (MOST - 1) * MAX_REQUEST
    + MAX_OPEN * MAX_INVITATION
    + MAX_AUTHORITIES
    + MAX_CUSTOM
    + MAX_ADDED_ENCODED
    + MAX_WEBHOOKS * MAX_WEBHOOK
    + MAX_POOL
    + MAX_NAME
    + 512;

/// What all members share, whoever they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shared {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requests: Vec<Request>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub invitations: Vec<Invitation>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<SealedAuthority>,
    /// What every Console's certificate is good for beside the names of its own host: those of a load balancer, say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub console_names: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub custom_certificate: Option<CustomCertificate>,
    /// The feature level in force: what the programs of all members have. Never lowered.
    #[serde(default = "level::first", skip_serializing_if = "level::is_first")]
    pub level: u32,
    /// Version of the program that raised it: older ones may not take part.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub level_version: String,
    /// See [`authority`], these three.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rekey: Option<KeyExchange>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coming: Option<IncomingAuthority>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retired: Option<RetiredAuthority>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub webhooks: Vec<Webhook>,
    #[serde(default, skip_serializing_if = "Pool::is_empty")]
    pub pool: Pool,
}

impl Shared {
    /// What the members of a new cluster share: the feature level of the program that founds it.
    pub fn founded() -> Self {
        Self {
            requests: Vec::new(),
            invitations: Vec::new(),
            authority: None,
            console_names: Vec::new(),
            custom_certificate: None,
            level: level::feature_level(),
            level_version: level::program_version().to_owned(),
            rekey: None,
            coming: None,
            retired: None,
            webhooks: Vec::new(),
            pool: Pool::default(),
        }
    }

    /// When no more may be open, the one gives way that ends first: whoever wants a script gets one.
    pub(super) fn invite(&mut self, invitation: &Invitation) -> Result<(), Impossible> {
        fits("an invitation", invitation, MAX_INVITATION)?;
        self.invitations.retain(|open| open.in_force(invitation.at));
        while self.invitations.len() >= MAX_OPEN {
            let first = (0..self.invitations.len()).min_by_key(|place| self.invitations[*place].until).unwrap_or(0);
            self.invitations.remove(first);
        }
        self.invitations.push(invitation.clone());
        Ok(())
    }

    /// What everybody may see: no keys, no webhooks, no requests that could be picked up. Of an invitation there is its
    /// [`Invitation::id`], of an authority that is introduced its certificate.
    pub(super) fn public(&self) -> Self {
        let (invitations, webhooks) = (self.invitations.iter().map(Invitation::public).collect(), Vec::new());
        let (authority, custom_certificate) = (None, None);
        let mut public = Self { invitations, authority, custom_certificate, webhooks, ..self.clone() };
        if let Some(coming) = &mut public.coming {
            coming.authority.sealed_key.clear();
        }
        for request in &mut public.requests {
            (request.id, request.csr, request.console_csr) = Default::default();
        }
        public
    }
}

/// A host that asks to join (REQUEST_JOIN).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Random and secret between the host and the cluster: whoever knows it may pick up the answer.
    pub id: String,
    pub name: String,
    pub address: String,
    pub port: u16,
    /// Version of its program.
    pub version: String,
    /// What its program can do.
    #[serde(default = "level::first", skip_serializing_if = "level::is_first")]
    pub level: u32,
    /// Fingerprint of its public key, which both sides show.
    pub fingerprint: String,
    /// Its signing request for the node's certificate, PEM.
    pub csr: String,
    /// Its signing request for the Console's certificate, PEM, and the names that it is to have.
    pub console_csr: String,
    pub console_names: Vec<String>,
    /// Milliseconds by which its clock is ahead of the primary's.
    pub clock_ms: i64,
    /// When it came and when it expires, in seconds since 1970.
    pub at: u64,
    pub until: u64,
}

/// The permission to ask for admission: what a join script carries is the secret to this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// SHA-256 of the secret, in hexadecimal digits.
    pub hash: String,
    /// When it was made and when it expires, in seconds since 1970.
    pub at: u64,
    pub until: u64,
    /// Who made it.
    pub by: String,
}

/// Hexadecimal digits of an invitation's hash by which it is known to those who may not use it.
const INVITATION_ID: usize = 16;

impl Request {
    /// Refuses one that is longer than its limits.
    pub(super) fn check(&self) -> Result<(), Impossible> {
        let names: usize = self.console_names.iter().map(|name| name.len() + PER_NAME).sum();
        let csr = self.csr.len().max(self.console_csr.len());
        let label = self.version.len().max(self.id.len()).max(self.fingerprint.len());
        if csr > MAX_CSR || names > MAX_NAMES || label > MAX_NAME {
            return Err(Impossible("the request is too long".to_owned()));
        }
        fits("the request", self, MAX_REQUEST)
    }

    /// Where the host is reached.
    pub fn place(&self) -> String {
        place(&self.address, self.port)
    }

    /// True while an administrator may admit the host; `now` in seconds since 1970.
    pub fn in_force(&self, now: u64) -> bool {
        in_force(self.at, self.until, now)
    }
}

impl Invitation {
    /// True while hosts may ask for admission with it; `now` in seconds since 1970.
    pub fn in_force(&self, now: u64) -> bool {
        in_force(self.at, self.until, now)
    }

    /// What tells it from others: too little of its hash to prove anything.
    pub fn id(&self) -> String {
        self.hash.chars().take(INVITATION_ID).collect()
    }

    /// That there is one, and until when.
    fn public(&self) -> Self {
        Self { hash: self.id(), by: String::new(), ..*self }
    }
}

/// Of the names that a host would like in its Console certificate, the first ones that a request may have.
pub fn console_names_that_fit(names: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut room = MAX_NAMES;
    let fits = |name: &String| {
        let left = room.checked_sub(name.len() + PER_NAME).filter(|_| !name.is_empty() && name.len() <= MAX_NAME);
        room = left.unwrap_or(room);
        left.is_some()
    };
    names.into_iter().filter(fits).take(MAX_CONSOLE_NAMES).collect()
}
