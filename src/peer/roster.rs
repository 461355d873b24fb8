//! Where the members are reached: by the membership, or by the word of a member that has a newer one. A member that was
//! away while another one moved could not answer it otherwise, and so would never be sent the change. Must never let
//! anybody speak for another member, or make a member of anybody.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex},
};

use tokio::sync::watch;
use tracing::info;

use super::codec::Reached;
use crate::{
    cluster::{ClusterId, Member, Membership, NodeId},
    mutex::locked,
};

/// A membership and the raft index of the entry that made it.
#[derive(Clone, Debug)]
pub struct Edition {
    pub index: u64,
    pub membership: Arc<Membership>,
}

/// The members, with the addresses to dial, this node included. Changes are followed.
pub struct Roster {
    editions: watch::Receiver<Edition>,
    /// What members with a newer edition said about themselves. Bounded by the number of members.
    told: watch::Sender<BTreeMap<NodeId, Reached>>,
    /// From where members called last. Bounded by the number of members.
    callers: Mutex<BTreeMap<NodeId, IpAddr>>,
}

impl Roster {
    /// Follows the memberships that are in force on this node.
    pub fn new(editions: watch::Receiver<Edition>) -> Self {
        Self { editions, told: watch::Sender::new(BTreeMap::new()), callers: Mutex::default() }
    }

    /// The cluster to which all of them belong.
    pub fn cluster(&self) -> ClusterId {
        self.editions.borrow().membership.cluster
    }

    /// The membership in force on this node.
    pub fn membership(&self) -> Arc<Membership> {
        self.editions.borrow().membership.clone()
    }

    /// A member, with the address to dial.
    pub fn member(&self, id: NodeId) -> Option<Member> {
        let edition = self.editions.borrow().clone();
        edition.membership.get(id).map(|member| placed(member, edition.index, self.told.borrow().get(&id)))
    }

    /// All members but `me`, with the addresses to dial. Forgets what this node knows better by now.
    pub(super) fn others(&self, me: NodeId) -> Vec<Member> {
        let Edition { index, membership } = self.editions.borrow().clone();
        self.told.send_if_modified(|told| {
            told.retain(|id, reached| reached.index > index && membership.get(*id).is_some());
            false // nobody dials differently for it
        });
        locked(&self.callers).retain(|id, _| membership.get(*id).is_some());
        let told = self.told.borrow();
        let others = membership.roster.members.iter().filter(|member| member.id != me);
        others.map(|member| placed(member, index, told.get(&member.id))).collect()
    }

    /// Receivers that change when [`Roster::others`] may have.
    pub(super) fn changes(&self) -> (watch::Receiver<Edition>, watch::Receiver<BTreeMap<NodeId, Reached>>) {
        (self.editions.clone(), self.told.subscribe())
    }

    /// What this node says about itself; nothing if it is not a member in its own membership.
    pub(super) fn own(&self, me: NodeId) -> Option<Reached> {
        let Edition { index, membership } = self.editions.borrow().clone();
        let member = membership.get(me)?;
        Some(Reached { address: member.address.clone(), port: member.port, index })
    }

    /// Notes from where a member, proven by its certificate, has called.
    pub(super) fn called(&self, by: NodeId, from: IpAddr) {
        if self.member(by).is_some() {
            locked(&self.callers).insert(by, from.to_canonical());
        }
    }

    /// Another address to dial a member at that is known by a name: from there it called last. The name may lead there
    /// only later, as that of a pod that was started anew, whose old address is remembered for half a minute.
    pub(super) fn caller(&self, member: &Member) -> Option<IpAddr> {
        let named = member.address.parse::<IpAddr>().is_err();
        locked(&self.callers).get(&member.id).copied().filter(|_| named)
    }

    /// Notes what a member, proven by its certificate, says about itself.
    pub(super) fn hear(&self, from: NodeId, reached: Reached) {
        let before = self.member(from);
        // Only what is newer than this node's membership and than what was said before counts.
        let (newest, known) = (self.editions.borrow().index, before.is_some());
        let news = self.told.send_if_modified(|told| {
            let newer = known && reached.index > told.get(&from).map_or(newest, |said| said.index.max(newest));
            if newer {
                told.insert(from, reached);
            }
            newer
        });
        if let (true, Some(before), Some(after)) = (news, before, self.member(from)) {
            let Member { name, address, port, .. } = &after;
            if (address, *port) != (&before.address, before.port) {
                info!(
                    peer = from,
                    name, address, port, "says that it is at another address: this node has missed that change"
                );
            }
        }
    }
}

/// The member with the address to dial, by the membership of `index` and what the member said.
fn placed(member: &Member, index: u64, told: Option<&Reached>) -> Member {
    match told.filter(|told| told.index > index) {
        Some(told) => Member { address: told.address.clone(), port: told.port, ..member.clone() },
        None => member.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::membership::Change;

    fn reached(address: &str, index: u64) -> Reached {
        Reached { address: address.to_owned(), port: 8086, index }
    }

    fn roster() -> (watch::Sender<Edition>, Roster) {
        let members = (1..=3).map(|id| Member::founder(id, &format!("n{id}"), &format!("192.0.2.{id}"), 8086));
        let membership = Arc::new(Membership::founded(ClusterId(7), members.collect()));
        let sender = watch::Sender::new(Edition { index: 5, membership });
        let roster = Roster::new(sender.subscribe());
        (sender, roster)
    }

    fn addresses(roster: &Roster) -> Vec<String> {
        let others = roster.others(3);
        let alone = |member: &Member| roster.member(member.id).as_ref() == Some(member);
        assert!(others.iter().all(alone), "both ways to ask agree: {others:?}");
        others.into_iter().map(|member| member.address).collect()
    }

    #[test]
    fn what_a_member_says_counts_until_this_node_knows_better() {
        let (sender, roster) = roster();
        let (mut editions, mut told) = roster.changes();
        roster.hear(1, reached("192.0.2.91", 5));
        roster.hear(1, reached("192.0.2.92", 4));
        assert!(!told.has_changed().unwrap(), "no newer than what this node has");
        assert_eq!(addresses(&roster), ["192.0.2.1", "192.0.2.2"]);
        roster.hear(1, reached("192.0.2.93", 9));
        assert!(told.has_changed().unwrap());
        told.mark_unchanged();
        roster.hear(1, reached("192.0.2.94", 8));
        assert!(!told.has_changed().unwrap(), "an older call that is answered later");
        assert_eq!(addresses(&roster), ["192.0.2.93", "192.0.2.2"]);
        // Back where it was: that is news, too.
        roster.hear(1, reached("192.0.2.1", 10));
        assert_eq!(addresses(&roster), ["192.0.2.1", "192.0.2.2"]);
        roster.hear(1, reached("192.0.2.95", 12));
        let old = roster.membership();
        let moved = Change::Readdress { node: 1, name: "n1".into(), address: "192.0.2.96".into(), port: 1 };
        let membership = Arc::new(old.changed(&moved, 1).unwrap());
        sender.send_replace(Edition { index: 11, membership: membership.clone() });
        assert!(editions.has_changed().unwrap());
        editions.mark_unchanged();
        assert_eq!(addresses(&roster), ["192.0.2.95", "192.0.2.2"], "not yet that far");
        sender.send_replace(Edition { index: 12, membership });
        assert_eq!(addresses(&roster), ["192.0.2.96", "192.0.2.2"]);
        assert!(roster.told.borrow().is_empty());
    }

    #[test]
    fn only_a_member_that_is_known_by_its_name_is_dialled_where_it_called_from() {
        let (sender, roster) = roster();
        let from: IpAddr = "::ffff:192.0.2.77".parse().unwrap();
        [1, 2, 9].into_iter().for_each(|id| roster.called(id, from));
        let named = Member::founder(2, "n2", "n2.example", 8086);
        assert_eq!(roster.caller(&named), Some("192.0.2.77".parse().unwrap()));
        assert_eq!(roster.caller(&roster.member(1).unwrap()), None, "it has an address");
        assert_eq!(roster.caller(&Member::founder(9, "n9", "n9.example", 8086)), None, "a stranger");
        let gone = roster.membership().changed(&Change::Remove { node: 2, at: 1, force: false }, 1).unwrap();
        sender.send_replace(Edition { index: 6, membership: Arc::new(gone) });
        roster.others(3);
        assert_eq!(roster.caller(&named), None, "no member any more");
    }

    #[test]
    fn nobody_becomes_a_member_by_what_they_say() {
        let (sender, roster) = roster();
        roster.hear(9, reached("192.0.2.9", 100));
        assert!(roster.told.borrow().is_empty() && roster.member(9).is_none());
        roster.hear(2, reached("192.0.2.92", 100));
        assert_eq!(addresses(&roster), ["192.0.2.1", "192.0.2.92"]);
        let gone = roster.membership().changed(&Change::Remove { node: 2, at: 1, force: false }, 1).unwrap();
        sender.send_replace(Edition { index: 6, membership: Arc::new(gone) });
        assert_eq!(addresses(&roster), ["192.0.2.1"]);
        assert!(roster.told.borrow().is_empty());
        assert_eq!((roster.own(2), roster.own(3)), (None, Some(reached("192.0.2.3", 6))));
    }
}
