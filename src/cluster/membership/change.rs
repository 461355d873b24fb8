//! How a [`Membership`] may change, and what each change needs. Must never give out a membership that the members could
//! not read or go on with; the rules of admission, trust and levels are in their own files.

use serde::{Deserialize, Serialize};

use super::{
    Membership,
    admission::{Adoption, Newcomer},
};
use crate::cluster::{
    level::{FIRST_LEVEL, POOLS},
    limits::{Impossible, LONG_MEMBERSHIPS, MAX_ENCODED, MAX_ENCODED_BEFORE, MAX_NAME, fits},
    roster::{MAX_ROSTER, NodeId, Pause},
    shared::{
        Invitation, MAX_SHARED, Request,
        authority::{IncomingAuthority, SealedAuthority},
        console_certificate::{CustomCertificate, sound_names},
        webhook::{Webhook, check_webhooks},
    },
    trust::KeyId,
};

/// A change that an administrator (or, for [`Change::Promote`], the primary itself) wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "change")]
pub enum Change {
    /// Lets hosts that know the secret ask for admission.
    Invite { invitation: Invitation },
    /// Closes all invitations.
    Uninvite,
    /// A host asks for admission.
    Request { request: Request },
    /// Turns a request down.
    Reject { request: String },
    /// Takes all hosts that ask in as members without a vote, and closes the invitations.
    Admit { hosts: Vec<Newcomer> },
    /// Takes hosts that waited into a pool, as members without a vote. Requests and invitations stay as they are.
    Adopt { hosts: Vec<Adoption> },
    /// Keeps the certificate authority.
    Authority { authority: SealedAuthority },
    /// Gives all members a vote, in one joint change.
    Promote,
    /// Takes the vote of a member that lost some of its durable memory; with [`Change::Promote`] it gets it back.
    Demote { node: NodeId },
    /// Drops a member; `at` in seconds since 1970. `force`: even if the rest has no majority that answers.
    Remove { node: NodeId, at: u64, force: bool },
    /// A member is reached at another address from now on.
    Readdress { node: NodeId, name: String, address: String, port: u16 },
    /// Sends events there from now on, and nowhere else.
    Notify { webhooks: Vec<Webhook> },
    /// No automatic takeover until then, in seconds since 1970.
    Pause { until: u64 },
    /// Automatic takeover again.
    Resume,
    /// The programs of all members have this feature level; `version` is that of the primary's.
    Raise { level: u32, version: String },
    /// The cluster key is to be replaced.
    Rekey,
    /// The primary has made a cluster key; all members fetch it.
    AnnounceKey { id: KeyId },
    /// All members have the announced cluster key: the authority is sealed with it, and so is the certificate that was
    /// given to the Consoles, if there is one.
    Reseal { authority: SealedAuthority, certificate: Option<CustomCertificate> },
    /// All members are to trust this authority, too.
    IntroduceAuthority { coming: IncomingAuthority },
    /// All members trust it: it signs from now on; `at` in seconds since 1970.
    SwitchAuthority { at: u64 },
    /// All members show certificates of the authority that signs: the old one is not trusted any more.
    DropAuthority,
    /// What all Consoles' certificates are good for, beside the names of their hosts.
    ConsoleNames { names: Vec<String> },
    /// What all Consoles serve; none: certificates of the cluster's authority.
    CustomCertificate { certificate: Option<CustomCertificate> },
    /// The address of a pool's load balancer; empty: there is none.
    LoadBalancer { address: String },
    /// A program of this version is the PRIMARY of a pool, for the first time.
    PoolVersion { version: String },
}

impl Change {
    /// The level that must be in force for this change. Whoever adds a change has to decide about it here.
    pub(in crate::cluster) fn needs(&self) -> u32 {
        match self {
            Change::Invite { .. }
            | Change::Uninvite
            | Change::Request { .. }
            | Change::Reject { .. }
            | Change::Admit { .. }
            | Change::Adopt { .. }
            | Change::Authority { .. }
            | Change::Promote
            | Change::Demote { .. }
            | Change::Remove { .. }
            | Change::Readdress { .. }
            | Change::Pause { .. }
            | Change::Resume
            | Change::Raise { .. } => FIRST_LEVEL,
            Change::Rekey
            | Change::AnnounceKey { .. }
            | Change::Reseal { .. }
            | Change::IntroduceAuthority { .. }
            | Change::SwitchAuthority { .. }
            | Change::DropAuthority
            | Change::ConsoleNames { .. }
            | Change::CustomCertificate { .. }
            | Change::Notify { .. } => 2,
            Change::LoadBalancer { .. } | Change::PoolVersion { .. } => POOLS,
        }
    }
}

/// The parts fit into the whole, beside `{"format":1,"cluster":"..."`.
const _: () = assert!(MAX_ROSTER + MAX_SHARED + 128 <= MAX_ENCODED);

impl Membership {
    /// The membership after a change that `primary` makes.
    ///
    /// # Errors
    /// [`Impossible`], with a sentence for the administrator.
    pub fn changed(&self, change: &Change, primary: NodeId) -> Result<Self, Impossible> {
        let mut next = self.clone();
        match change {
            Change::Invite { invitation } => next.shared.invite(invitation)?,
            Change::Uninvite => next.shared.invitations.clear(),
            Change::Request { request } => next.request(request)?,
            Change::Reject { request } => {
                let place = next.shared.requests.iter().position(|open| open.id == *request);
                next.shared.requests.remove(place.ok_or_else(|| Impossible("there is no such request".to_owned()))?);
            }
            Change::Admit { hosts } => next.admit(hosts)?,
            Change::Adopt { hosts } => next.adopt(hosts)?,
            Change::Authority { authority } => next.shared.keep_authority(authority)?,
            Change::Notify { webhooks } => {
                check_webhooks(webhooks)?;
                next.shared.webhooks.clone_from(webhooks);
            }
            Change::Promote => next.roster.promote()?,
            Change::Demote { node } => next.roster.demote(*node)?,
            Change::Remove { node, at, .. } => {
                next.roster.remove(*node, *at, primary)?;
                next.shared.distrust();
            }
            Change::Readdress { node, name, address, port } => next.roster.readdress(*node, name, address, *port)?,
            Change::Pause { until } => next.roster.pause = Some(Pause { until: *until, primary }),
            Change::Resume => next.roster.resume()?,
            Change::Raise { level, version } => next.raise(*level, version)?,
            Change::Rekey => next.shared.rekey()?,
            Change::AnnounceKey { id } => next.shared.announce_key(*id)?,
            Change::Reseal { authority, certificate } => next.shared.reseal(authority, certificate.as_ref())?,
            Change::IntroduceAuthority { coming } => next.shared.introduce_authority(coming)?,
            Change::SwitchAuthority { at } => {
                if self.has_newcomers(*at) {
                    return Err(Impossible(
                        "hosts are on their way into the cluster: the new authority signs when they have a vote"
                            .to_owned(),
                    ));
                }
                next.shared.switch_authority(*at)?;
            }
            Change::DropAuthority => next.shared.drop_authority()?,
            Change::ConsoleNames { names } => {
                self.shared.check_load_balancer_is_in(names)?;
                next.shared.console_names = sound_names(names)?;
            }
            Change::LoadBalancer { address } => next.shared.set_load_balancer(address)?,
            Change::PoolVersion { version } => next.shared.raise_pool_version(version)?,
            Change::CustomCertificate { certificate } => {
                next.shared.custom_certificate = next.shared.sound_certificate(certificate.clone())?;
            }
        }
        next.roster.end_admissions();
        next.check()?;
        next.check_length()?;
        Ok(next)
    }

    /// Also checked here, although each part has its limits: an entry that no member can read would stop them all.
    fn check_length(&self) -> Result<(), Impossible> {
        fits("the roster", &self.roster, MAX_ROSTER)?;
        fits("what the members share", &self.shared, MAX_SHARED)?;
        let most = if self.shared.level < LONG_MEMBERSHIPS { MAX_ENCODED_BEFORE } else { MAX_ENCODED };
        match self.encode().len() {
            length if length <= most => Ok(()),
            length => Err(Impossible(format!("a membership of {length} bytes is longer than {most}"))),
        }
    }

    fn raise(&mut self, level: u32, version: &str) -> Result<(), Impossible> {
        if level <= self.shared.level {
            return Err(Impossible(format!("the cluster runs feature level {} already", self.shared.level)));
        }
        fits("the version", &version, MAX_NAME)?;
        let before = std::mem::replace(&mut self.shared.level, level);
        self.shared.level_version = version.to_owned();
        // Removals so far could not have the cluster key replaced.
        if before < 2 && !self.roster.removed.is_empty() {
            self.shared.distrust();
        }
        Ok(())
    }
}
