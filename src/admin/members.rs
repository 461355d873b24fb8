//! Changes to the members that there are: removal, another address, a pause of automatic takeovers. Must never take the
//! majority away from a cluster unless it is told to by force.

use std::{ops::RangeInclusive, time::Duration};

use tracing::{info, warn};

use super::{AdminError, Operations};
use crate::{
    certificates::given,
    clock::unix_time,
    cluster::{
        Change, Membership, NodeId, Role,
        roster::{Pause, place},
    },
    node::MemberStatus,
};

/// How long automatic takeovers may be paused.
const PAUSE: RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(Pause::LONGEST);

impl Operations {
    /// Drops a member, by its name, its id or the beginning of its name. Returns what remains to be done about what it
    /// knows.
    ///
    /// # Errors
    /// [`AdminError`]; `Refused` when the rest has no majority that answers, unless `force`.
    pub(super) async fn remove(&self, member: &str, force: bool, by: &str) -> Result<Option<String>, AdminError> {
        self.primary()?;
        let _one = self.changing.lock().await;
        let (membership, status) = (self.membership(), self.status());
        let node = Self::member(&membership, member)?;
        let name = membership.name(node);
        if node == status.node {
            return Err(AdminError::Refused(format!(
                "{name} is PRIMARY: switch over to another member first, then remove it there"
            )));
        }
        if let Err(why) = leaves_a_majority(&membership, &status.members, node) {
            if !force {
                return Err(AdminError::Refused(why));
            }
            warn!(by, member = name, "a member is removed by force: {why}");
        }
        // After whatever it was given, also if the clock of an earlier primary was ahead.
        let given = membership.shared.custom_certificate.as_ref().map_or(0, |certificate| certificate.at);
        let membership = self.change(Change::Remove { node, at: unix_time().max(given), force }).await?;
        info!(by, member = name, node, force, "a member is removed");
        Ok(given::exposure(&membership))
    }

    /// No automatic takeover for so long. Returns when the pause ends, in seconds since 1970.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` for another span than one minute to 24 hours;
    /// `Unknown` if the role was lost before it was known whether it is in force.
    pub(super) async fn pause(&self, span: Duration, by: &str) -> Result<u64, AdminError> {
        self.primary()?;
        if !PAUSE.contains(&span) {
            return Err(AdminError::Refused("a pause lasts one minute to 24 hours".to_owned()));
        }
        let _one = self.changing.lock().await;
        let until = unix_time() + span.as_secs();
        self.change(Change::Pause { until }).await?;
        warn!(by, until, "automatic takeover is paused: if this node fails, no other takes over until the pause ends");
        Ok(until)
    }

    /// Ends a pause. While no primary is known, as when the only node that may be one is gone, it ends on this node
    /// alone: then this node may take over.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`] while another node is; `Unknown` if the role was lost before it was known whether it
    /// is in force.
    pub(super) async fn resume(&self, by: &str) -> Result<(), AdminError> {
        let status = self.status();
        if status.primary.is_none() && status.membership.roster.pause.is_some() {
            info!(by, "no primary is known: the pause is ended on this node alone");
            self.handle.ignore_pause();
            return Ok(());
        }
        self.primary()?;
        let _one = self.changing.lock().await;
        self.change(Change::Resume).await?;
        info!(by, "automatic takeover is possible again");
        Ok(())
    }

    /// A member is called or reached otherwise from now on.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` when no member is meant, or more than one, when nothing would change, and
    /// when the name or the place is another member's; `Unknown` if the role was lost before it was known whether it is
    /// in force.
    pub(super) async fn readdress(
        &self,
        member: &str,
        new_name: Option<String>,
        address: Option<String>,
        port: Option<u16>,
        by: &str,
    ) -> Result<(), AdminError> {
        self.primary()?;
        let _one = self.changing.lock().await;
        let membership = self.membership();
        let node = Self::member(&membership, member)?;
        let Some(old) = membership.get(node) else { return Err(AdminError::Refused("the member is gone".to_owned())) };
        let name = new_name.unwrap_or_else(|| old.name.clone());
        let address = address.unwrap_or_else(|| old.address.clone());
        let port = port.unwrap_or(old.port);
        if (&name, &address, port) == (&old.name, &old.address, old.port) {
            return Err(AdminError::Refused(format!("{name} is reached at {} already", old.place())));
        }
        let now_at = format!("{name} ({})", place(&address, port));
        self.change(Change::Readdress { node, name, address, port }).await?;
        info!(by, node, was = format!("{} ({})", old.name, old.place()), now_at, "a member has moved");
        Ok(())
    }
}

/// Refuses a removal after which fewer than a majority of the voters would answer.
fn leaves_a_majority(membership: &Membership, members: &[MemberStatus], node: NodeId) -> Result<(), String> {
    let rest: Vec<NodeId> = membership.voters().filter(|id| *id != node).collect();
    let silent = |id: &NodeId| {
        let state = members.iter().find(|member| member.id == *id).map(|member| member.state);
        matches!(state, None | Some(Role::Down | Role::Unknown))
    };
    let missing: Vec<String> = rest.iter().filter(|id| silent(id)).map(|id| membership.name(*id)).collect();
    if 2 * (rest.len() - missing.len()) > rest.len() {
        return Ok(());
    }
    let gone = membership.name(node);
    let missing = missing.join(" and ");
    Err(format!(
        "without {gone} there is no majority: {missing} does not answer, and the Console would be closed at once. Bring \
         {missing} back, or remove {missing} instead; force removes {gone} all the same"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{ClusterId, Member};

    fn membership(count: NodeId) -> Membership {
        let member = |id| Member::founder(id, &format!("node{id}"), &format!("127.0.0.{id}"), 8086);
        Membership::founded(ClusterId(7), (1..=count).map(member).collect())
    }

    fn member(id: NodeId, state: Role) -> MemberStatus {
        MemberStatus {
            id,
            name: format!("node{id}"),
            address: String::new(),
            state,
            epoch: 1,
            applied: 1,
            lag: 0,
            lag_bytes: Some(0),
            lease_ms: None,
            last_contact_ms: None,
            version: String::new(),
            voter: true,
            sync: None,
            full: false,
            free: None,
            level: 0,
            holds: Default::default(),
        }
    }

    #[test]
    fn a_removal_needs_a_majority_of_the_rest() {
        let three = membership(3);
        let all_up = [member(1, Role::Primary), member(2, Role::Secondary), member(3, Role::Secondary)];
        assert_eq!(leaves_a_majority(&three, &all_up, 3), Ok(()));
        let one_down = [member(1, Role::Primary), member(2, Role::Secondary), member(3, Role::Down)];
        assert_eq!(leaves_a_majority(&three, &one_down, 3), Ok(()));
        let why = leaves_a_majority(&three, &one_down, 2).unwrap_err();
        assert!(why.contains("without node2") && why.contains("node3 does not answer"), "{why}");
        assert!(leaves_a_majority(&three, &all_up[..2], 2).is_err(), "a member without a status does not answer");
        assert_eq!(leaves_a_majority(&membership(2), &all_up[..2], 2), Ok(()), "one member is its own majority");
    }

    #[test]
    fn members_are_found_by_name_id_and_the_beginning_of_a_name() {
        let mut three = membership(3);
        three.roster.members[2].name = "backup.example".to_owned();
        assert_eq!(Operations::member(&three, "node2"), Ok(2));
        assert_eq!(Operations::member(&three, "3"), Ok(3));
        assert_eq!(Operations::member(&three, "back"), Ok(3));
        let why = |wanted| Operations::member(&three, wanted).unwrap_err().to_string();
        assert!(why("node").contains("more than one"));
        assert!(why("other").contains("node1, node2, backup.example"));
        assert!(why("").contains("there is no member"));
    }
}
