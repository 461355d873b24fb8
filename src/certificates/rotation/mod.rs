//! RENEWS what all members share: keeps this node's cluster key, trust and certificates as the membership says, and, on
//! the primary, takes the next step when all members are ready for it ([`crate::cluster::shared::authority`] has the
//! steps). Must never take a key or an authority away that a member may still need, and never log a key.
//!
//! Everything follows from the membership and from what is on the disk, again and again: a node that was away, was
//! killed or has just become primary goes on from there.

mod authority;
mod exchange;
mod key;

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Result;
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tracing::{info, warn};

use crate::{
    cluster::{
        Change, Membership,
        trust::{Holdings, KeyId},
    },
    node::{ChangeError, Handle, MemberStatus, Status, Warning},
    peer::PeerIdentity,
    pki::{ClusterKeys, NodeTls},
};

pub use exchange::serve;

/// Time between two looks while something is going on, and while nothing is.
const PACE: Duration = Duration::from_millis(250);
const IDLE: Duration = Duration::from_secs(5);
/// A step that takes longer is shown to the administrator: a member that it needs may be away.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the rotation needs of the node.
pub struct Parts {
    /// The data folder.
    pub data: PathBuf,
    /// Its folder of certificates and keys.
    pub certificates: PathBuf,
    /// The running node.
    pub handle: Handle,
    /// To fetch keys from other members.
    pub peers: Arc<PeerIdentity>,
    /// Where new handshakes between members take their settings from.
    pub tls: watch::Sender<Arc<NodeTls>>,
}

/// Looks after what all members share, until the node ends.
pub async fn run(parts: Parts) {
    let mut membership = parts.handle.membership();
    let mut status = parts.handle.status();
    let mut rotation = Rotation {
        parts,
        keys: None,
        behind: false,
        stale: false,
        reported: None,
        problem: None,
        shown: None,
        waiting: None,
    };
    while membership.has_changed().is_ok() {
        let now = membership.borrow_and_update().clone();
        let result = rotation.poll(&now).await;
        rotation.complain(&now, result.err());
        let changed = async {
            tokio::select! {
                ended = membership.changed() => ended.is_ok(),
                ended = status.changed(), if is_busy(&now) => ended.is_ok(),
            }
        };
        let busy = is_busy(&now) || rotation.behind;
        if let Ok(false) = timeout(if busy { PACE } else { IDLE }, changed).await {
            return;
        }
    }
}

fn is_busy(membership: &Membership) -> bool {
    membership.shared.rekey.is_some() || membership.shared.coming.is_some() || membership.shared.retired.is_some()
}

struct Rotation {
    parts: Parts,
    /// What is in the folder; none before the first look at it.
    keys: Option<ClusterKeys>,
    /// The membership in force is not in its file yet, and the key in use waits for that.
    behind: bool,
    /// The files of certificates may be newer than what is in use.
    stale: bool,
    reported: Option<Holdings>,
    /// What was logged last, and what is shown.
    problem: Option<String>,
    shown: Option<String>,
    /// The step that is under way, and since when.
    waiting: Option<(String, Instant)>,
}

impl Rotation {
    async fn poll(&mut self, membership: &Membership) -> Result<()> {
        let status = self.parts.handle.status().borrow().clone();
        let member = membership.get(status.node).is_some();
        if membership.shared.authority.is_none() || membership.shared.level < 2 || !member {
            return Ok(());
        }
        // Each looks at its own: a key that cannot be fetched must not keep a node from following the authority.
        let key = self.follow_key(membership).await;
        self.follow_trust(membership)?;
        let shows = self.follow_certificates(membership, status.node)?;
        self.report(membership, shows)?;
        if status.primary == Some(status.node) {
            self.lead(membership, &status).await?;
        }
        key
    }

    /// The primary's part: at most one step at a time.
    async fn lead(&mut self, membership: &Membership, status: &Status) -> Result<()> {
        if membership.shared.rekey.is_some() {
            self.lead_key(membership, status).await
        } else {
            self.lead_authority(membership, status).await
        }
    }

    /// Tells the others what they wait for.
    fn report(&mut self, membership: &Membership, shows: KeyId) -> Result<()> {
        let holds = Holdings { key: self.held_key(membership), trusts: authority::newest(membership)?, shows };
        if self.reported != Some(holds) {
            self.parts.handle.report_holdings(holds);
            self.reported = Some(holds);
        }
        Ok(())
    }

    /// Makes a change; one that came too late or too early is made at the next look if it is still wanted. True if it
    /// is made.
    async fn change(&self, change: Change, done: &str) -> Result<bool> {
        match self.parts.handle.change(change).await {
            Ok(_) => info!("{done}"),
            Err(ChangeError::Busy | ChangeError::NotPrimary) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }

    /// Logs each problem once, and shows those that last and steps that take long.
    fn complain(&mut self, membership: &Membership, error: Option<anyhow::Error>) {
        let problem = error.map(|error| format!("{error:#}"));
        if let (Some(text), true) = (&problem, problem != self.problem) {
            warn!("what all members share is not up to date on this node (the next attempt follows): {text}");
        }
        self.problem = problem;
        let step = step(membership, &self.parts.handle.status().borrow());
        self.waiting = step.map(|step| match self.waiting.take() {
            Some((before, since)) if before == step => (before, since),
            _ => (step, Instant::now()),
        });
        let slow = self.waiting.as_ref().filter(|(_, since)| since.elapsed() > PATIENCE).map(|(step, _)| step.clone());
        let shown = self.problem.clone().or(slow);
        // Only news: what is shown is a change of the status, which leads to the next look.
        if shown != self.shown {
            self.parts.handle.warn(Warning::Rotation, shown.clone());
            self.shown = shown;
        }
    }
}

/// What the rotation waits for, in a sentence; none if it waits for nobody, or if this node is not primary.
fn step(membership: &Membership, status: &Status) -> Option<String> {
    if status.primary != Some(status.node) {
        return None;
    }
    let (what, wanted): (_, fn(&MemberStatus, KeyId) -> bool) =
        if let Some(next) = membership.shared.rekey.map(|rekey| rekey.next) {
            (("the cluster key", next?), |member, key| member.holds.key == key)
        } else if membership.shared.coming.is_some() {
            (("the certificate authority", authority::newest(membership).ok()?), |member, id| member.holds.trusts == id)
        } else if membership.shared.retired.is_some() {
            (("the certificate authority", authority::newest(membership).ok()?), |member, id| member.holds.shows == id)
        } else {
            return None;
        };
    let (what, id) = what;
    let missing: Vec<&str> =
        status.members.iter().filter(|member| !wanted(member, id)).map(|member| member.name.as_str()).collect();
    let names = missing.join(" and ");
    (!missing.is_empty())
        .then(|| format!("{what} is being replaced, which waits for {names}: bring it up, or remove it"))
}

/// True if all members meet the condition by their last report.
fn all(membership: &Membership, status: &Status, condition: impl Fn(&Holdings) -> bool) -> bool {
    membership
        .roster
        .members
        .iter()
        .all(|member| status.members.iter().any(|known| known.id == member.id && condition(&known.holds)))
}
