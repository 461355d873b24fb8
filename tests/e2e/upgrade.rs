//! A rolling upgrade to a program that is a version and a feature level ahead: the same one, which claims to be.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use twistlock_ha::{
    admin::{PoolStatus, SwitchoverReport},
    cluster::{
        Role, feature_level,
        level::{CLAIM_NEXT, is_older},
        program_version,
    },
    control::{self, Call},
    node::Status,
};

use super::{
    WRITERS, alone,
    cluster::{Cluster, FROZEN, LEASE_LOST, LIMIT, RESTART_AFTER},
    sampler::Sampler,
    writers::Writers,
};

/// Makes the program of the next version in a folder.
fn next_program(folder: &Path) -> PathBuf {
    let path = folder.join("next-twistlockd");
    let this = env!("CARGO_BIN_EXE_twistlockd");
    fs::write(&path, format!("#!/bin/sh\n{CLAIM_NEXT}=1 exec '{this}' \"$@\"\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Puts another program on a host, or takes it away again, and restarts the daemon as a package's upgrade does.
pub fn install(cluster: &Cluster, node: usize, program: Option<&Path>) {
    let place = cluster.config_path(node).with_file_name("twistlockd");
    match fs::remove_file(&place) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("{error}"),
        _ => {}
    }
    if let Some(program) = program {
        symlink(program, &place).unwrap();
    }
    let before = cluster.node(node).pid;
    if before.is_some() {
        cluster.signal(node, Signal::SIGTERM);
    }
    cluster.wait_for("the daemon starts again", |_| {
        let now = cluster.node(node).pid;
        now.is_some() && now != before
    });
}

fn levels<'a>(statuses: impl IntoIterator<Item = &'a Status>) -> Vec<u32> {
    statuses.into_iter().map(|status| status.membership.shared.level).collect()
}

fn hand_over(cluster: &Cluster, to: usize) {
    let operation = Call::post("high-availability/switchover").with(serde_json::json!({ "to": cluster.node(to).name }));
    let ask = || {
        let primary = cluster.node(cluster.primary()).control;
        control::ask::<SwitchoverReport>(&primary, &operation, LIMIT)
    };
    // The primary may not have heard yet that the other one is SECONDARY: it says so. On a machine that is slow just then
    // the role may have gone to the third member.
    cluster.wait_for("it is PRIMARY", |statuses| {
        let has_role = |status: &Status| status.role == Role::Primary;
        let serves = statuses.iter().any(|status| status.as_ref().is_some_and(has_role));
        let done = statuses[to].as_ref().is_some_and(has_role);
        if serves && !done {
            // What it says about a role that is not there any more is of no use either.
            let _ = ask();
        }
        done
    });
    cluster.wait_healthy();
}

/// Every order of old and new serves until the last one is new; nothing is lost; after that the old program is kept out.
#[test]
fn timed_a_rolling_upgrade_under_load() {
    let _alone = alone();
    let cluster = Cluster::start();
    let next = next_program(cluster.config_path(0).parent().unwrap());
    let (level, next_level) = (feature_level(), feature_level() + 1);
    let (sampler, writers) = (Sampler::start(cluster.port_offset), Writers::start(&cluster.file(), WRITERS));
    let begin = Instant::now();
    let first = cluster.primary();
    let (second, third) = ((first + 1) % 3, (first + 2) % 3);
    let same = |level| vec![level; 3];
    // There and back again, and there for good.
    for program in [Some(next.as_path()), None, Some(&next)] {
        install(&cluster, second, program);
        cluster.wait_healthy();
        assert_eq!(levels(&cluster.all_statuses()), same(level));
    }
    // The newer program serves a cluster of the older level, and the older one takes over from it.
    hand_over(&cluster, second);
    let shown = cluster.status(first);
    let versions: Vec<&str> = shown.members.iter().map(|member| member.version.as_str()).collect();
    assert_eq!(versions.iter().filter(|version| **version == program_version()).count(), 2, "{versions:?}");
    hand_over(&cluster, first);
    install(&cluster, third, Some(&next));
    cluster.wait_healthy();
    assert_eq!(levels(&cluster.all_statuses()), same(level));
    install(&cluster, first, Some(&next));
    let last = Instant::now();
    cluster.wait_for("the next level", |statuses| levels(statuses.iter().flatten()) == same(next_level));
    println!("  the level rose {} ms after the last program was exchanged", last.elapsed().as_millis());
    cluster.wait_healthy();
    kept_out(&cluster, &writers, &next);
    let (written, sampled) = (writers.verify(), sampler.verify());
    println!("rolling upgrade: {} s\n  {written}\n  {sampled}", begin.elapsed().as_secs());
    println!("  {}", cluster.finish(&["feature level"]));
}

/// Five members under load, one by one: whoever has the older program never serves what a newer one has served, and a newer one
/// does not take the role before most have it, unless it is told to.
#[test]
fn timed_a_rolling_upgrade_of_a_pool_of_five() {
    let _alone = alone();
    let cluster = Cluster::start_pool(5, RESTART_AFTER);
    let next = next_program(cluster.config_path(0).parent().unwrap());
    let version =
        |node: usize| cluster.statuses()[node].as_ref().map(|status| status.version.clone()).unwrap_or_default();
    let writers = Writers::start(&cluster.file(), 8);
    let pool_is = |statuses: &[Option<Status>], wanted: &str| {
        statuses.iter().flatten().all(|status| status.membership.shared.pool.version == wanted)
    };
    cluster.wait_for("the version of the pool", |statuses| pool_is(statuses, program_version()));
    let first = cluster.primary();
    let [second, third, fourth] = [1, 2, 3].map(|step| (first + step) % 5);
    install(&cluster, second, Some(&next));
    cluster.wait_healthy();
    let newer = version(second);
    assert!(is_older(program_version(), &newer), "{newer}");
    cluster.signal(first, Signal::SIGKILL);
    writers.wait_success(Instant::now(), |node| node != first).expect("a write after the kill");
    cluster.wait_healthy();
    assert_ne!(cluster.primary(), second, "most are older: nobody would be left if it failed, too");

    install(&cluster, third, Some(&next));
    cluster.wait_healthy();
    hand_over(&cluster, second);
    cluster.wait_for("the newer version of the pool", |statuses| pool_is(statuses, &newer));
    behind(&cluster, second, fourth, &newer);
    cluster.signal(second, Signal::SIGKILL);
    writers.wait_success(Instant::now(), |node| node == third).expect("a write at the other newer one");
    cluster.wait_healthy();
    // Three older ones are a majority, and none of them takes over.
    [second, third].into_iter().for_each(|node| cluster.freeze(node));
    poll_nobody_serves(&cluster, &[second, third]);
    [second, third].into_iter().for_each(|node| cluster.signal(node, Signal::SIGCONT));
    cluster.wait_healthy();
    assert!([second, third].contains(&cluster.primary()));

    for node in (0..5).filter(|node| ![second, third].contains(node)) {
        install(&cluster, node, Some(&next));
        cluster.wait_healthy();
    }
    let expected = [LEASE_LOST, FROZEN, &["feature level"]].concat();
    println!("rolling upgrade of five:\n  {}\n  {}", writers.verify(), cluster.finish(&expected));
}

/// The status says who is behind and what to do, and the role is not handed to it.
fn behind(cluster: &Cluster, primary: usize, older: usize, newer: &str) {
    let node = cluster.node(primary);
    let shown: PoolStatus = control::ask(&node.control, &Call::get("clustered-db/status"), LIMIT).unwrap();
    assert_eq!(shown.database_version, newer);
    let address = cluster.node(older).address;
    let member = shown.members.iter().find(|member| member.name == address).unwrap();
    let why = member.reason.clone().unwrap_or_default();
    assert!(member.state_str == "SECONDARY" && why.contains("does not become PRIMARY before version"), "{member:?}");
    let own = cluster.status(older);
    assert!(own.warnings.iter().any(|warning| warning.contains("does not become PRIMARY before version")), "{own:?}");
    let to = Call::post("high-availability/switchover").with(serde_json::json!({ "to": cluster.node(older).name }));
    let refused = control::ask::<SwitchoverReport>(&node.control, &to, LIMIT).unwrap_err().to_string();
    assert!(refused.contains("does not become PRIMARY before version"), "{refused}");
}

/// Looks for longer than two elections take.
fn poll_nobody_serves(cluster: &Cluster, frozen: &[usize]) {
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(3) {
        for (node, status) in cluster.statuses().iter().enumerate().filter(|(node, _)| !frozen.contains(node)) {
            assert_ne!(status.as_ref().map(|status| status.role), Some(Role::Primary), "node {node}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A host that goes back to the older program: its daemon does not start; if it does not know of the new level, because it was
/// away, nobody links with it.
fn kept_out(cluster: &Cluster, writers: &Writers, next: &Path) {
    let back = (cluster.primary() + 1) % 3;
    let (version, level, next_level) = (program_version(), feature_level(), feature_level() + 1);
    let refusal = format!("has feature level {level}, but the cluster runs level {next_level}: install version");
    let said = |cluster: &Cluster| {
        cluster.log(back).matches(&format!("cannot start: this host runs version {version}, which {refusal}")).count()
    };
    install(cluster, back, None);
    cluster.wait_for("it does not start", |_| said(cluster) > 0);
    let file = cluster.node(back).data.join("membership.json");
    let known = fs::read_to_string(&file).unwrap();
    let stale = known.replace(&format!("\"level\": {next_level}"), &format!("\"level\": {level}"));
    assert_ne!(known, stale);
    // As a program wrote it that knew no checksum.
    let stale: Vec<&str> = stale.lines().filter(|line| !line.contains("crc32c")).collect();
    let stale = stale.join("\n");
    fs::write(&file, stale).unwrap();
    cluster.wait_for("it shows why nobody links with it", |statuses| {
        let warnings = statuses[back].as_ref().map(|status| status.warnings.clone()).unwrap_or_default();
        warnings.iter().any(|warning| warning.contains(&refusal))
    });
    let refused = (0..3).filter(|node| *node != back).any(|node| {
        cluster.log(node).lines().any(|line| line.contains("refused a link from this node") && line.contains(&refusal))
    });
    assert!(refused, "the others say so, too");
    writers.wait_success(Instant::now(), |node| node != back).expect("a write without it");
    fs::write(&file, known).unwrap();
    install(cluster, back, Some(next));
    cluster.wait_healthy();
    assert_eq!(levels(&cluster.all_statuses()), vec![next_level; 3]);
}
