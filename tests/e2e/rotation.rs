//! What all members share is replaced while they run and die: the cluster key and the certificate authority.

use std::{
    collections::HashSet,
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use twistlock_ha::{
    cluster::{
        Membership, Role,
        trust::{Holdings, KeyId},
    },
    control::{self, Operation},
    node::Status,
    pki::{Authority, ClusterKeys, NodeTls},
    storage::configuration::Configuration,
};

use super::{
    alone,
    cluster::{Cluster, LEASE_LOST, LIMIT},
};

/// What a node says that looks for a key which the primary took along that made it.
const NOT_YET: &[&str] = &["what all members share is not up to date on this node"];
/// How long a step that must not be taken is awaited.
const MEANWHILE: Duration = Duration::from_secs(2);

fn certificates(cluster: &Cluster, node: usize) -> PathBuf {
    cluster.node(node).data.join("certificates")
}

/// Has whoever is primary begin with it.
fn begin(cluster: &Cluster, operation: &Operation) {
    cluster.wait_for("somebody begins", |_| {
        let primary = cluster.node(cluster.primary()).control;
        control::operate::<()>(&primary, operation.clone(), LIMIT).is_ok()
    });
}

fn primary_of(statuses: &[Option<Status>]) -> Option<&Status> {
    statuses.iter().flatten().find(|status| status.role == Role::Primary)
}

/// What the primary has heard that all members hold, if that is the same.
fn common<T: Copy + PartialEq>(statuses: &[Option<Status>], of: impl Fn(&Holdings) -> T) -> Option<T> {
    let status = primary_of(statuses)?;
    let all: Vec<T> = status.members.iter().map(|member| of(&member.holds)).collect();
    all.iter().all(|one| *one == all[0]).then(|| all[0])
}

/// Waits until all hold something else than before, and nothing is under way.
fn wait_replaced(cluster: &Cluster, before: KeyId, of: impl Fn(&Holdings) -> KeyId + Copy) -> KeyId {
    let settled = |membership: &Membership| {
        membership.rekey.is_none() && membership.coming.is_none() && membership.retired.is_none()
    };
    cluster.wait_for("all hold the new one", |statuses| {
        let quiet = statuses.iter().flatten().all(|status| settled(&status.membership));
        quiet && common(statuses, of).is_some_and(|now| now != before && now != KeyId::default())
    });
    common(&cluster.statuses(), of).expect("it was there a moment ago")
}

/// Whatever this node believes about the cluster, it can unseal the authority with what is on its disk. Both change under us:
/// what was read in the order of their writing counts.
fn unseals(cluster: &Cluster, node: usize) -> bool {
    let data = cluster.node(node).data;
    let known = Configuration::read(&data).unwrap().map(|known| known.membership);
    // Never changed, it is what the node began with.
    let first = || {
        let text = fs::read_to_string(data.join("identity.json")).unwrap();
        let identity: serde_json::Value = serde_json::from_str(&text).unwrap();
        serde_json::from_value::<Membership>(identity["membership"].clone()).unwrap()
    };
    let membership = known.unwrap_or_else(first);
    let sealed = membership.authority.unwrap();
    Authority::open(membership.cluster, &sealed, &certificates(cluster, node)).is_ok()
}

fn all_unseal(cluster: &Cluster) {
    for node in 0..3 {
        let good = (0..5).any(|_| unseals(cluster, node));
        assert!(good, "node {} cannot unseal the authority", node + 1);
    }
}

/// Waits for a step, which may be over before it is seen, and kills the primary there.
fn kill_at(cluster: &Cluster, step: impl Fn(&Membership) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(3);
    poll_until(deadline, || primary_of(&cluster.statuses()).is_some_and(|status| step(&status.membership)));
    let primary = cluster.primary();
    all_unseal(cluster);
    cluster.signal(primary, Signal::SIGKILL);
    all_unseal(cluster);
}

fn poll_until(deadline: Instant, condition: impl Fn() -> bool) {
    while !condition() && Instant::now() < deadline {
        thread::yield_now();
    }
}

#[test]
fn the_cluster_key_is_replaced_whoever_dies_meanwhile() {
    let _alone = alone();
    let cluster = Cluster::start();
    let key = |holds: &Holdings| holds.key;
    let mut before = wait_replaced(&cluster, KeyId::default(), key);
    let wanted = |membership: &Membership| membership.rekey.is_some();
    let announced = |membership: &Membership| membership.rekey.is_some_and(|rekey| rekey.next.is_some());
    let over = |membership: &Membership| membership.rekey.is_none();
    let steps: [(&str, &dyn Fn(&Membership) -> bool); 3] =
        [("wanted", &wanted), ("announced", &announced), ("sealed", &over)];
    for (name, step) in steps {
        let start = Instant::now();
        begin(&cluster, &Operation::RotateKey {});
        kill_at(&cluster, step);
        cluster.wait_healthy();
        let now = wait_replaced(&cluster, before, key);
        all_unseal(&cluster);
        println!("  killed when the new key was {name}: in use everywhere after {:?}", start.elapsed());
        before = now;
    }
    a_member_is_away(&cluster, before);
    println!("cluster key: {}", cluster.finish(&[LEASE_LOST, NOT_YET].concat()));
}

/// Nothing is sealed with a key that a member does not have; it gets it when it is back.
fn a_member_is_away(cluster: &Cluster, before: KeyId) {
    let away = (cluster.primary() + 1) % 3;
    cluster.freeze(away);
    begin(cluster, &Operation::RotateKey {});
    cluster.wait_for("a new key is announced", |statuses| {
        primary_of(statuses).is_some_and(|status| status.membership.rekey.is_some_and(|rekey| rekey.next.is_some()))
    });
    poll_until(Instant::now() + MEANWHILE, || false);
    let status = primary_of(&cluster.statuses()).cloned().expect("a primary");
    assert!(status.membership.rekey.is_some(), "sealed without a member");
    cluster.signal(away, Signal::SIGCONT);
    wait_replaced(cluster, before, |holds| holds.key);
    all_unseal(cluster);
}

/// The host that is gone does not get the key that the others use from then on.
#[test]
fn a_removed_host_does_not_have_the_next_cluster_key() {
    let _alone = alone();
    let cluster = Cluster::start();
    let before = wait_replaced(&cluster, KeyId::default(), |holds| holds.key);
    let gone = (cluster.primary() + 1) % 3;
    begin(&cluster, &Operation::Remove { node: cluster.node(gone).name, force: false });
    cluster.wait_for("the rest has another key", |statuses| {
        let quiet = primary_of(statuses).is_some_and(|status| status.membership.rekey.is_none());
        quiet && common(statuses, |holds| holds.key).is_some_and(|now| now != before)
    });
    let now = common(&cluster.statuses(), |holds| holds.key).unwrap();
    for node in 0..3 {
        let keys = ClusterKeys::load(&certificates(&cluster, node)).unwrap();
        assert_eq!(keys.find(now).is_some(), node != gone, "{}", cluster.node(node).name);
    }
    cluster.wait_for("it knows that it was removed", |statuses| {
        statuses[gone].as_ref().is_some_and(|status| status.role == Role::Removed)
    });
}

fn trusted(cluster: &Cluster, node: usize) -> String {
    fs::read_to_string(certificates(cluster, node).join("ca.pem")).unwrap()
}

#[test]
fn the_authority_is_replaced_whoever_dies_meanwhile() {
    let _alone = alone();
    let cluster = Cluster::start();
    let shows = |holds: &Holdings| holds.shows;
    let mut before = wait_replaced(&cluster, KeyId::default(), shows);
    let coming = |membership: &Membership| membership.coming.is_some();
    let retired = |membership: &Membership| membership.retired.is_some();
    let over = |membership: &Membership| membership.coming.is_none() && membership.retired.is_none();
    let steps: [(&str, &dyn Fn(&Membership) -> bool); 3] =
        [("introduced", &coming), ("signing", &retired), ("alone", &over)];
    for (name, step) in steps {
        let (start, old) = (Instant::now(), trusted(&cluster, 0));
        begin(&cluster, &Operation::RotateCa { overlap_s: 1 });
        kill_at(&cluster, step);
        cluster.wait_healthy();
        before = wait_replaced(&cluster, before, shows);
        println!("  killed when the new authority was {name}: the old one is gone after {:?}", start.elapsed());
        let bundles: HashSet<String> = (0..3).map(|node| trusted(&cluster, node)).collect();
        assert_eq!(bundles.len(), 1);
        assert!(bundles.iter().all(|bundle| bundle.matches("BEGIN CERTIFICATE").count() == 1 && *bundle != old));
    }
    // All links anew, with what is on the disks alone.
    cluster.restart_all();
    for node in 0..3 {
        let identity = NodeTls::load(&certificates(&cluster, node)).unwrap().identity;
        assert_eq!(identity.1, node as u64 + 1);
    }
    println!("authority: {}", cluster.finish(&[LEASE_LOST, NOT_YET].concat()));
}
