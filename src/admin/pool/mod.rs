//! The administration of a pool: its settings, the removal of a member by its address, and what its size tolerates.
//! Owns the checks; must never do any of it in HA mode, nor anything of HA mode's in a pool.

mod adding;
mod state;
mod status;

use serde::{Deserialize, Serialize};
use tracing::info;

pub use self::{
    adding::{AddedMember, NewMember, PoolAddition, PoolCandidate},
    state::pool_state,
    status::{PoolHealth, PoolMember, PoolStatus, pool_status},
};
use super::{AdminError, Operations};
use crate::{
    cluster::{
        Change, Member, Membership, NodeId,
        roster::{SizePolicy, majority, tolerated},
    },
    node::Status,
    pki,
};

/// Where a pool is reached. In the API: `Settings`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Settings")]
pub struct PoolSettings {
    /// Host name or IP address of the load balancer, without a port; empty if there is none.
    pub load_balancer_address: String,
    /// Address of the member that all others were added to.
    pub seed_console_address: String,
}

/// What is to be changed of [`PoolSettings`]; what is missing stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PoolWish {
    /// Host name or IP address of the load balancer, without a port; empty: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_balancer_address: Option<String>,
    /// Address of the only member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed_console_address: Option<String>,
}

/// How many members a pool has, and what that is worth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolSize {
    /// All members, also those without a vote.
    pub member_count: usize,
    /// How many of those with a vote must be up and reach each other.
    pub majority: usize,
    /// How many members may fail now, with those that are down at the moment.
    pub failures_tolerated: usize,
    /// How many members a pool of this size may lose, with all members up.
    pub failures_tolerated_by_size: usize,
    /// What would be better, in a sentence; empty if the size is as it should be.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub size_advice: String,
}

impl PoolSize {
    /// That of a membership, with so many of its voters up.
    pub fn of(membership: &Membership, up: usize) -> Self {
        let (members, voters) = (membership.roster.members.len(), membership.voters().count());
        Self {
            member_count: members,
            majority: majority(voters),
            failures_tolerated: up.min(voters).saturating_sub(majority(voters)),
            failures_tolerated_by_size: tolerated(members),
            size_advice: advice(membership.roster.size, members).unwrap_or_default(),
        }
    }

    /// A sentence for people.
    pub fn sentence(&self) -> String {
        let Self { member_count: members, majority, failures_tolerated, .. } = self;
        let failures = match failures_tolerated {
            0 => "no failure is tolerated".to_owned(),
            1 => "1 failure is tolerated".to_owned(),
            more => format!("{more} failures are tolerated"),
        };
        let s = if *members == 1 { "" } else { "s" };
        format!("The pool has {members} member{s}, of which {majority} must be up: {failures} now.")
    }
}

/// What has become of a removal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolRemoval {
    /// The pool without it.
    #[serde(flatten)]
    pub size: PoolSize,
    /// What remains to be done about what the removed member knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// The word of advice on a number of members.
fn advice(size: SizePolicy, members: usize) -> Option<String> {
    match size.missing(members) {
        0 if size.is_advised(members) => None,
        0 => Some(format!(
            "{members} members tolerate no more failures than {}: an odd number is better",
            members.saturating_sub(1)
        )),
        missing => Some(format!("a pool has {size} members: add {missing} more")),
    }
}

/// The settings of a pool.
pub fn pool_settings(membership: &Membership) -> PoolSettings {
    let seed = membership.roster.members.iter().min_by_key(|member| member.id);
    PoolSettings {
        load_balancer_address: membership.shared.pool.load_balancer.clone(),
        seed_console_address: seed.map(|member| member.address.clone()).unwrap_or_default(),
    }
}

/// The member at an address, with or without its port, or of this name.
fn by_address<'a>(membership: &'a Membership, wanted: &str) -> Result<&'a Member, AdminError> {
    let all = || membership.roster.members.iter();
    let mut at_address = all().filter(|member| member.address == wanted);
    match (at_address.next(), at_address.next()) {
        (Some(member), None) => return Ok(member),
        (Some(member), Some(_)) => {
            return Err(AdminError::Refused(format!(
                "more than one member is at {wanted}: name its port, too, as {}",
                member.place()
            )));
        }
        (None, _) => {}
    }
    let other = all().find(|member| member.place() == wanted || member.name == wanted);
    other.ok_or_else(|| {
        let known: Vec<&str> = all().map(|member| member.address.as_str()).collect();
        AdminError::Refused(format!("no member is at {wanted}: the members are at {}", known.join(", ")))
    })
}

/// Refuses in HA mode.
///
/// # Errors
/// `Refused`, with what to use instead.
pub(super) fn in_pool(membership: &Membership) -> Result<(), AdminError> {
    match membership.roster.size.is_pool() {
        true => Ok(()),
        false => Err(AdminError::Refused(
            "this cluster runs in HA mode, and is no pool: use `twistcli ha` (high-availability in the API)".to_owned(),
        )),
    }
}

impl Operations {
    /// Refuses in a pool.
    ///
    /// # Errors
    /// `Refused`, with what to use instead.
    pub(super) fn in_ha_mode(&self, what: &str) -> Result<(), AdminError> {
        match self.membership().roster.size.is_pool() {
            false => Ok(()),
            true => Err(AdminError::Refused(format!(
                "{what} belongs to HA mode, and this is a pool: use `twistcli clustered-db add`, which takes new members by \
                 their address"
            ))),
        }
    }

    /// The pool as this node sees it; works on every member.
    pub(super) fn pool_status(&self, now: u64) -> Result<PoolStatus, AdminError> {
        pool_status(&self.status(), now)
    }

    /// The settings of the pool; works on every member.
    pub(super) fn pool_settings(&self) -> Result<PoolSettings, AdminError> {
        let membership = self.membership();
        in_pool(&membership)?;
        Ok(pool_settings(&membership))
    }

    /// Changes where the pool is reached.
    ///
    /// # Errors
    /// As those of [`super::Admin::configure_pool`].
    pub(super) async fn configure_pool(&self, wish: PoolWish, by: &str) -> Result<PoolSettings, AdminError> {
        self.primary()?;
        let _one = self.changing.lock().await;
        let membership = self.membership();
        in_pool(&membership)?;
        let changes = settings_changes(&membership, &wish)?;
        for change in &changes {
            // Before the first one is made, so that it is all or nothing.
            let possible = membership.changed(change, self.status().node);
            possible.map_err(|why| AdminError::Refused(why.to_string()))?;
        }
        let was = pool_settings(&membership);
        for change in changes {
            self.change(change).await?;
        }
        let now = pool_settings(&self.membership());
        if was != now {
            info!(by, ?was, ?now, "the settings of the pool are changed");
        }
        Ok(now)
    }

    /// Drops the member at an address.
    ///
    /// # Errors
    /// As those of [`super::Admin::remove_from_pool`].
    pub(super) async fn remove_from_pool(&self, address: &str, by: &str) -> Result<PoolRemoval, AdminError> {
        self.primary()?;
        let membership = self.membership();
        in_pool(&membership)?;
        let node = by_address(&membership, address)?.id;
        let warning = self.remove(&node.to_string(), false, by).await?;
        let membership = self.membership();
        let size = PoolSize::of(&membership, up(&membership, &self.status()));
        info!(by, address, members = size.member_count, tolerated = size.failures_tolerated, "the pool is smaller");
        Ok(PoolRemoval { size, warning })
    }
}

/// How many members with a vote are up, as this node sees it.
fn up(membership: &Membership, status: &Status) -> usize {
    let is_up = |node: &NodeId| status.members.iter().any(|member| member.id == *node && state::counts(member.state));
    membership.voters().filter(is_up).count()
}

/// What has to be changed for a wish: the load balancer first, which can be refused for more reasons.
fn settings_changes(membership: &Membership, wish: &PoolWish) -> Result<Vec<Change>, AdminError> {
    let (mut changes, now) = (Vec::new(), pool_settings(membership));
    if *wish == PoolWish::default() {
        return Err(AdminError::Refused("nothing is to be changed: name an address".to_owned()));
    }
    if let Some(address) = wish.load_balancer_address.as_ref().filter(|new| **new != now.load_balancer_address) {
        if pki::is_reserved(address) {
            return Err(AdminError::Refused(format!("{address:?} is a name that the cluster uses itself")));
        }
        changes.push(Change::LoadBalancer { address: address.clone() });
    }
    if let Some(address) = wish.seed_console_address.as_ref().filter(|new| **new != now.seed_console_address) {
        let [Member { id, name, port, .. }] = membership.roster.members.as_slice() else {
            return Err(AdminError::Refused(format!(
                "the seed's address can be changed only while it is alone: the pool has {} members, which know it as {}",
                membership.roster.members.len(),
                now.seed_console_address
            )));
        };
        let (node, name, address, port) = (*id, name.clone(), address.clone(), *port);
        changes.push(Change::Readdress { node, name, address, port });
    }
    Ok(changes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::ClusterId;

    fn pool(members: NodeId) -> Membership {
        let member = |id| Member::founder(id, &format!("node{id}"), &format!("10.0.0.{id}"), 8086);
        let mut membership = Membership::founded(ClusterId(7), (1..=members).map(member).collect());
        membership.roster.size = SizePolicy::pool();
        membership
    }

    fn load_balancer(address: &str) -> PoolWish {
        PoolWish { load_balancer_address: Some(address.to_owned()), seed_console_address: None }
    }

    #[test]
    fn each_size_has_its_majority_and_its_word_of_advice() {
        let of = |members| PoolSize::of(&pool(members), members as usize);
        // Members, majority, failures tolerated: the table of the interface that we keep.
        for (members, most, failures) in [(3, 2, 1), (4, 3, 1), (5, 3, 2), (6, 4, 2), (7, 4, 3)] {
            let size = of(members);
            assert_eq!(
                (size.majority, size.failures_tolerated_by_size, size.failures_tolerated),
                (most, failures, failures)
            );
            assert_eq!(size.size_advice.is_empty(), members % 2 == 1, "{size:?}");
        }
        assert!(of(4).size_advice.starts_with("4 members tolerate no more failures than 3"), "{:?}", of(4));
        assert_eq!(of(1).size_advice, "a pool has 3 to 7 members: add 2 more");
        assert_eq!(of(1).sentence(), "The pool has 1 member, of which 1 must be up: no failure is tolerated now.");
        let two_down = PoolSize::of(&pool(7), 5);
        assert_eq!((two_down.failures_tolerated, two_down.failures_tolerated_by_size), (1, 3));
        assert_eq!(two_down.sentence(), "The pool has 7 members, of which 4 must be up: 1 failure is tolerated now.");
        assert_eq!(PoolSize::of(&pool(5), 2).failures_tolerated, 0);
    }

    #[test]
    fn a_member_is_found_by_its_address() {
        let mut five = pool(5);
        let id = |five: &Membership, wanted: &str| by_address(five, wanted).map(|member| member.id);
        assert_eq!(id(&five, "10.0.0.4"), Ok(4));
        assert_eq!(id(&five, "10.0.0.4:8086"), Ok(4));
        assert_eq!(id(&five, "node4"), Ok(4));
        assert!(id(&five, "10.0.0.9").unwrap_err().to_string().contains("the members are at 10.0.0.1, 10.0.0.2"));
        five.roster.members[4].address = "10.0.0.4".to_owned();
        five.roster.members[4].port = 9086;
        assert!(id(&five, "10.0.0.4").unwrap_err().to_string().contains("10.0.0.4:8086"));
        assert_eq!(id(&five, "10.0.0.4:9086"), Ok(5));
    }

    #[test]
    fn the_load_balancer_is_one_of_the_names_of_the_certificates() {
        let changed = |pool: &Membership, wish: &PoolWish| {
            let changes = settings_changes(pool, wish)?;
            let next = |pool: Membership, change: &Change| pool.changed(change, 1);
            changes.iter().try_fold(pool.clone(), next).map_err(|why| AdminError::Refused(why.to_string()))
        };
        let mut three = pool(3);
        three.shared.console_names = vec!["old.example".to_owned()];
        let set = changed(&three, &load_balancer("LB.example")).unwrap();
        assert_eq!(set.shared.console_names, ["old.example", "lb.example"]);
        assert_eq!(pool_settings(&set).load_balancer_address, "lb.example");
        assert_eq!(settings_changes(&set, &load_balancer("lb.example")), Ok(Vec::new()), "it is so already");
        let names = Change::ConsoleNames { names: vec!["old.example".to_owned()] };
        assert!(set.changed(&names, 1).unwrap_err().to_string().contains("lb.example is the address of the load"));
        let other = changed(&set, &load_balancer("10.0.0.100")).unwrap();
        assert_eq!(other.shared.console_names, ["old.example", "10.0.0.100"]);
        let none = changed(&other, &load_balancer("")).unwrap();
        assert_eq!((none.shared.console_names.len(), none.shared.pool.load_balancer.as_str()), (1, ""));
        for wrong in ["https://lb.example", "lb.example:443", "*.example.com", "no name"] {
            assert!(changed(&three, &load_balancer(wrong)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_seed_is_called_otherwise_only_while_it_is_alone() {
        let seed = PoolWish { load_balancer_address: None, seed_console_address: Some("10.0.0.50".to_owned()) };
        let moved = settings_changes(&pool(1), &seed).unwrap();
        assert!(
            matches!(&moved[..], [Change::Readdress { node: 1, address, .. }] if address == "10.0.0.50"),
            "{moved:?}"
        );
        let why = settings_changes(&pool(2), &seed).unwrap_err().to_string();
        assert!(why.contains("only while it is alone") && why.contains("10.0.0.1"), "{why}");
        let same = PoolWish { load_balancer_address: None, seed_console_address: Some("10.0.0.1".to_owned()) };
        assert_eq!(settings_changes(&pool(2), &same), Ok(Vec::new()));
        assert!(settings_changes(&pool(2), &PoolWish::default()).is_err());
        let mut ha = pool(3);
        ha.roster.size = SizePolicy::ha();
        assert!(in_pool(&ha).unwrap_err().to_string().contains("HA mode") && in_pool(&pool(3)).is_ok());
    }
}
