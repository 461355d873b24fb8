//! How a [`Membership`] may change, and what each change needs. Must never give out a membership that the members could not
//! read or go on with; the rules of admission, trust and levels are in their own files.

use serde::{Deserialize, Serialize};

use super::{Membership, admission::Newcomer};
use crate::cluster::{
    level::FIRST_LEVEL,
    limits::{Impossible, MAX_ENCODED, MAX_NAME},
    roster::{NodeId, Pause, Removed},
    shared::{
        Invitation, Request,
        authority::{Coming, SealedAuthority},
        console_certificate::{CustomCertificate, sound_names},
        webhook::{Webhook, check_webhooks},
    },
    trust::KeyId,
};

/// Removed members that are remembered, newest last, so that they can be told why they are refused.
const REMEMBERED: usize = 32;
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
    /// Keeps the certificate authority.
    Authority { authority: SealedAuthority },
    /// Gives all members a vote, in one joint change.
    Promote,
    /// Takes the vote of a member that lost some of its durable memory; with [`Change::Promote`] it gets it back.
    Demote { node: NodeId },
    /// Drops a member; `at` in seconds since 1970. `force` although the rest has no majority that answers.
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
    /// All members have the announced cluster key: the authority is sealed with it, and so is the certificate that was given
    /// to the Consoles, if there is one.
    Reseal { authority: SealedAuthority, certificate: Option<CustomCertificate> },
    /// All members are to trust this authority, too.
    IntroduceAuthority { coming: Coming },
    /// All members trust it: it signs from now on; `at` in seconds since 1970.
    SwitchAuthority { at: u64 },
    /// All members show certificates of the authority that signs: the old one is not trusted any more.
    DropAuthority,
    /// What all Consoles' certificates are good for, beside the names of their hosts.
    ConsoleNames { names: Vec<String> },
    /// What all Consoles serve; none: certificates of the cluster's authority.
    CustomCertificate { certificate: Option<CustomCertificate> },
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
        }
    }
}

impl Membership {
    /// The membership after a change that `primary` makes.
    ///
    /// # Errors
    /// [`Impossible`], with a sentence for the administrator.
    pub fn changed(&self, change: &Change, primary: NodeId) -> Result<Self, Impossible> {
        let mut next = self.clone();
        match change {
            Change::Invite { invitation } => next.invite(invitation),
            Change::Uninvite => next.invitations.clear(),
            Change::Request { request } => next.request(request)?,
            Change::Reject { request } => {
                let place = next.requests.iter().position(|open| open.id == *request);
                next.requests.remove(place.ok_or_else(|| Impossible("there is no such request".to_owned()))?);
            }
            Change::Admit { hosts } => next.admit(hosts)?,
            Change::Authority { authority } => next.authority = Some(authority.clone()),
            Change::Notify { webhooks } => {
                check_webhooks(webhooks)?;
                next.webhooks.clone_from(webhooks);
            }
            Change::Promote => {
                if self.learners().next().is_none() {
                    return Err(Impossible("all members have a vote already".to_owned()));
                }
                next.members.iter_mut().for_each(|member| member.voter = true);
            }
            Change::Demote { node } => {
                let member = next.members.iter_mut().find(|member| member.id == *node && member.voter);
                member.ok_or_else(|| no_member(*node))?.voter = false;
            }
            Change::Remove { node, at, .. } => next.remove(*node, *at, primary)?,
            Change::Readdress { node, name, address, port } => {
                let member = next.members.iter_mut().find(|member| member.id == *node);
                let member = member.ok_or_else(|| no_member(*node))?;
                (member.name, member.address, member.port) = (name.clone(), address.clone(), *port);
            }
            Change::Pause { until } => next.pause = Some(Pause { until: *until, primary }),
            Change::Resume => {
                if next.pause.take().is_none() {
                    return Err(Impossible("automatic takeover is not paused".to_owned()));
                }
            }
            Change::Raise { level, version } => next.raise(*level, version)?,
            Change::Rekey => next.rekey()?,
            Change::AnnounceKey { id } => next.announce_key(*id)?,
            Change::Reseal { authority, certificate } => next.reseal(authority, certificate.as_ref())?,
            Change::IntroduceAuthority { coming } => next.introduce_authority(coming)?,
            Change::SwitchAuthority { at } => next.switch_authority(*at)?,
            Change::DropAuthority => next.drop_authority()?,
            Change::ConsoleNames { names } => next.console_names = sound_names(names)?,
            Change::CustomCertificate { certificate } => {
                next.custom_certificate = next.sound_certificate(certificate.clone())?;
            }
        }
        next.check()?;
        // Checked here, too: an entry that no member can read would stop them all.
        match next.encode().len() {
            0..=MAX_ENCODED => Ok(next),
            length => Err(Impossible(format!("a membership of {length} bytes is longer than {MAX_ENCODED}"))),
        }
    }

    fn raise(&mut self, level: u32, version: &str) -> Result<(), Impossible> {
        if level <= self.level {
            return Err(Impossible(format!("the cluster runs feature level {} already", self.level)));
        }
        if version.len() > MAX_NAME {
            return Err(Impossible("the version is too long".to_owned()));
        }
        let before = std::mem::replace(&mut self.level, level);
        self.level_version = version.to_owned();
        // Removals so far could not have the cluster key replaced.
        if before < 2 && !self.removed.is_empty() {
            self.distrust();
        }
        Ok(())
    }

    fn remove(&mut self, node: NodeId, at: u64, primary: NodeId) -> Result<(), Impossible> {
        let place = self.members.iter().position(|member| member.id == node).ok_or_else(|| no_member(node))?;
        if node == primary {
            let name = &self.members[place].name;
            return Err(Impossible(format!("{name} is PRIMARY: switch over to another member first, then remove it")));
        }
        let gone = self.members.remove(place);
        // Nobody could become primary any more.
        self.pause.take_if(|pause| pause.primary == gone.id);
        if self.removed.len() >= REMEMBERED {
            self.removed.remove(0);
        }
        self.removed.push(Removed { id: gone.id, name: gone.name, at });
        self.distrust();
        Ok(())
    }
}

fn no_member(node: NodeId) -> Impossible {
    Impossible(format!("node {node} is not a member of this cluster"))
}
