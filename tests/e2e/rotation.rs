//! What all members share is replaced while they run and die: the cluster key and the certificate authority.

use std::{
    cell::Cell,
    collections::HashSet,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use twistlock_ha::{
    cluster::{
        Membership, Role,
        trust::{Holdings, KeyId},
    },
    control::{self, Call},
    node::Status,
    pki::{Authority, ClusterKeys, NodeTls},
    storage::membership::StoredMembership,
};

use super::{
    beside,
    certificates::{own_ca, trusts},
    cluster::{Cluster, LEASE_LOST, LIMIT, RESTART_AFTER},
    preload::Preload,
    writers,
};

/// What a node says that looks for a key which the primary took along that made it.
pub const NOT_YET: &[&str] = &["what all members share is not up to date on this node"];
/// How long a step that must not be taken is awaited, and one that may be over already.
const MEANWHILE: Duration = Duration::from_secs(2);
/// How often a step may be over before the primary dies.
const ROUNDS: usize = 10;

fn certificates(cluster: &Cluster, node: usize) -> PathBuf {
    cluster.node(node).data.join("certificates")
}

/// Has whoever is primary begin with it.
fn begin(cluster: &Cluster, operation: &Call) {
    cluster.wait_for("somebody begins", |_| {
        let primary = cluster.node(cluster.primary()).control;
        control::ask::<serde_json::Value>(&primary, operation, LIMIT).is_ok()
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
        membership.shared.rekey.is_none() && membership.shared.coming.is_none() && membership.shared.retired.is_none()
    };
    let quiet = |statuses: &[Option<Status>]| statuses.iter().flatten().all(|status| settled(&status.membership));
    wait_other(cluster, "all hold the new one", before, of, quiet)
}

/// Waits until all hold another one than before in a picture in which it is quiet, and returns what that picture shows: in the
/// next one a member may say for a moment that it still uses the old one.
fn wait_other(
    cluster: &Cluster,
    what: &str,
    before: KeyId,
    of: impl Fn(&Holdings) -> KeyId,
    quiet: impl Fn(&[Option<Status>]) -> bool,
) -> KeyId {
    let now = Cell::new(before);
    cluster.wait_for(what, |statuses| {
        now.set(common(statuses, &of).filter(|_| quiet(statuses)).unwrap_or_default());
        now.get() != before && now.get() != KeyId::default()
    });
    now.get()
}

/// Whatever this node believes about the cluster, it can unseal the authority with what is on its disk. Both change under us:
/// what was read in the order of their writing counts.
fn unseals(cluster: &Cluster, node: usize) -> bool {
    let data = cluster.node(node).data;
    let known = StoredMembership::read(&data).unwrap().map(|known| known.membership);
    // Never changed, it is what the node began with.
    let first = || {
        let text = fs::read_to_string(data.join("identity.json")).unwrap();
        let identity: serde_json::Value = serde_json::from_str(&text).unwrap();
        serde_json::from_value::<Membership>(identity["membership"].clone()).unwrap()
    };
    let membership = known.unwrap_or_else(first);
    let sealed = membership.shared.authority.unwrap();
    Authority::open(membership.cluster, &sealed, &certificates(cluster, node)).is_ok()
}

fn all_unseal(cluster: &Cluster) {
    for node in 0..3 {
        let good = (0..5).any(|_| unseals(cluster, node));
        assert!(good, "node {} cannot unseal the authority", node + 1);
    }
}

/// A step of a rotation: its name, and how it is told from the others.
struct Step {
    name: &'static str,
    /// A member that does not answer keeps the cluster at this step.
    held: bool,
    /// Nothing comes after it: it looks like the time before the rotation, but for what the primary holds.
    last: bool,
    is: fn(&Membership) -> bool,
}

/// Kills the primary at a step of a rotation, again in another rotation if the step was over before it died.
fn killed_at(cluster: &Cluster, operation: &Call, step: &Step, before: &mut KeyId, of: fn(&Holdings) -> KeyId) {
    for round in 1..=ROUNDS {
        let frozen = step.held.then(|| (cluster.primary() + 1) % 3);
        frozen.into_iter().for_each(|node| cluster.freeze(node));
        begin(cluster, operation);
        let hit = kill_at(cluster, step, frozen, |holds| of(holds) != *before);
        all_unseal(cluster);
        cluster.wait_healthy();
        *before = wait_replaced(cluster, *before, of);
        all_unseal(cluster);
        if hit {
            println!("  killed at the step {:?}, in round {round}", step.name);
            return;
        }
    }
    panic!("the step {:?} was over each time before the primary died", step.name);
}

/// Returns whether the primary was at that step just before it died, and the others still are if they are held there.
fn kill_at(cluster: &Cluster, step: &Step, frozen: Option<usize>, is_new: impl Fn(&Holdings) -> bool) -> bool {
    let (deadline, primary) = (Instant::now() + MEANWHILE, cluster.primary());
    let at_step = |status: &Status| (step.is)(&status.membership);
    let holds_new =
        |status: &Status| status.members.iter().any(|member| member.id == status.node && is_new(&member.holds));
    let control = cluster.node(primary).control;
    let mut seen = false;
    while !seen && Instant::now() < deadline {
        seen =
            control::status(&control, LIMIT).is_ok_and(|status| at_step(&status) && (!step.last || holds_new(&status)));
    }
    cluster.signal(primary, Signal::SIGKILL);
    frozen.into_iter().for_each(|node| cluster.signal(node, Signal::SIGCONT));
    let others = cluster.statuses();
    let still = others.iter().flatten().any(|status| status.node as usize - 1 != primary && at_step(status));
    seen && (still || !step.held)
}

#[test]
fn the_cluster_key_is_replaced_whoever_dies_meanwhile() {
    let _beside = beside();
    let tools = tempfile::tempdir().unwrap();
    let preload = Preload::build(tools.path());
    let cluster = Cluster::start_under(&preload.environment(), RESTART_AFTER, |_| {});
    let mut before = wait_replaced(&cluster, KeyId::default(), |holds| holds.key);
    let steps = [
        Step {
            name: "wanted",
            held: false,
            last: false,
            is: |now| now.shared.rekey.is_some_and(|rekey| rekey.next.is_none()),
        },
        Step {
            name: "announced",
            held: true,
            last: false,
            is: |now| now.shared.rekey.is_some_and(|rekey| rekey.next.is_some()),
        },
        Step { name: "sealed", held: false, last: true, is: |now| now.shared.rekey.is_none() },
    ];
    for step in &steps {
        // A key is not announced before it is on the disk, and the old one is needed until the membership is.
        let slow = match step.name {
            "wanted" => "s /certificates delay:300\n",
            "sealed" => "s /membership delay:300\n",
            _ => "",
        };
        preload.set(0, slow);
        killed_at(&cluster, &Call::post("high-availability/rotate-key"), step, &mut before, |holds| holds.key);
    }
    a_member_is_away(&cluster, before);
    a_key_file_is_damaged(&cluster);
    let set_aside = ["the file is set aside, and its key is fetched from the other members"];
    println!("cluster key: {}", cluster.finish(&[LEASE_LOST, NOT_YET, &set_aside].concat()));
}

/// Nothing is sealed with a key that a member does not have; it gets it when it is back.
fn a_member_is_away(cluster: &Cluster, before: KeyId) {
    let away = (cluster.primary() + 1) % 3;
    cluster.freeze(away);
    begin(cluster, &Call::post("high-availability/rotate-key"));
    cluster.wait_for("a new key is announced", |statuses| {
        primary_of(statuses)
            .is_some_and(|status| status.membership.shared.rekey.is_some_and(|rekey| rekey.next.is_some()))
    });
    let begin = Instant::now();
    while begin.elapsed() < MEANWHILE {
        let statuses = cluster.statuses();
        let status = primary_of(&statuses).expect("a primary");
        assert!(status.membership.shared.rekey.is_some(), "sealed without a member");
    }
    cluster.signal(away, Signal::SIGCONT);
    wait_replaced(cluster, before, |holds| holds.key);
    all_unseal(cluster);
}

/// A disk that has lost it: the node gets the key from the others when it starts, and keeps what was there.
fn a_key_file_is_damaged(cluster: &Cluster) {
    let node = (cluster.primary() + 1) % 3;
    let file = certificates(cluster, node).join("cluster.key");
    fs::write(&file, b"half a key").unwrap();
    assert!(!unseals(cluster, node));
    cluster.signal(node, Signal::SIGKILL);
    cluster.wait_for("it has the key again", |_| unseals(cluster, node));
    assert_eq!(fs::read(file.with_extension("key.damaged")).unwrap(), b"half a key");
    cluster.wait_healthy();
}

/// The host that is gone does not get the key that the others use from then on.
#[test]
fn a_removed_host_does_not_have_the_next_cluster_key() {
    let _beside = beside();
    let cluster = Cluster::start();
    let before = wait_replaced(&cluster, KeyId::default(), |holds| holds.key);
    let gone = (cluster.primary() + 1) % 3;
    begin(&cluster, &Call::delete(format!("high-availability/members/{}?force=false", cluster.node(gone).name)));
    let quiet = |statuses: &[Option<Status>]| {
        primary_of(statuses).is_some_and(|status| status.membership.shared.rekey.is_none())
    };
    let now = wait_other(&cluster, "the rest has another key", before, |holds| holds.key, quiet);
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
    let _beside = beside();
    let cluster = Cluster::start();
    let mut before = wait_replaced(&cluster, KeyId::default(), |holds| holds.shows);
    let steps = [
        Step { name: "introduced", held: true, last: false, is: |now| now.shared.coming.is_some() },
        Step { name: "signing", held: false, last: false, is: |now| now.shared.retired.is_some() },
        Step {
            name: "alone",
            held: false,
            last: true,
            is: |now| now.shared.coming.is_none() && now.shared.retired.is_none(),
        },
    ];
    for step in &steps {
        let old = trusted(&cluster, 0);
        killed_at(
            &cluster,
            &Call::post("high-availability/rotate-ca").with(serde_json::json!({ "overlapSec": 1 })),
            step,
            &mut before,
            |holds| holds.shows,
        );
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

/// During the overlap the Consoles go on showing what clients know, and give them what comes next; then one changes into the
/// other, on the next primary, too.
#[test]
fn clients_have_the_overlap_to_get_the_next_authority() {
    let _beside = beside();
    let cluster = Cluster::start();
    let before = wait_replaced(&cluster, KeyId::default(), |holds| holds.shows);
    let (old, primary) = (own_ca(&cluster), cluster.primary());
    let known = |node: usize, ca: &str| trusts(&cluster, node, &format!("127.0.0.{}", node + 1), ca);
    begin(&cluster, &Call::post("high-availability/rotate-ca").with(serde_json::json!({ "overlapSec": 5 })));
    let client = writers::client(&cluster.file().ca, LIMIT);
    let url = format!("{}/api/v1/certs/ca.pem", cluster.node(primary).console_url);
    let both = client.get(&url).call().unwrap().into_body().read_to_string().unwrap();
    let next = &both[both.rfind("-----BEGIN").unwrap()..];
    assert_eq!(both.matches("BEGIN CERTIFICATE").count(), 2, "{both}");
    assert!(known(primary, &old) && !known(primary, next));
    let coming = control::status(&cluster.node(primary).control, LIMIT).unwrap().membership.shared.coming;
    assert!(coming.is_some(), "the overlap was over before it was looked at");
    wait_replaced(&cluster, before, |holds| holds.shows);
    assert!(known(primary, next) && !known(primary, &old));
    cluster.signal(primary, Signal::SIGKILL);
    cluster.wait_for("another node serves", |statuses| {
        primary_of(statuses).is_some_and(|now| now.node as usize - 1 != primary)
    });
    let then = cluster.primary();
    cluster.wait_for("it shows the new one", |_| known(then, next));
    assert!(!known(then, &old));
    println!("overlap: {}", cluster.finish(&[LEASE_LOST, NOT_YET].concat()));
}
