//! `twistcli ha drill` against a real cluster: the rehearsal must measure, prove, clean up and record what it says.

use std::process::{Command, Output};

use twistlock_ha::{cluster::Role, node::MemberStatus};

use super::{
    beside,
    cluster::{Cluster, RESTART_AFTER},
};

/// Runs a drill on the primary and returns its exit code and what it found.
fn drill(cluster: &Cluster, options: &[&str]) -> (Option<i32>, serde_json::Value) {
    let file = cluster.file();
    let node = cluster.node(cluster.primary());
    let port = node.console_url.rsplit_once(':').unwrap().1.to_owned();
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_twistcli"))
        .args(["ha", "drill", "--json", "--https-port", &port, "--data"])
        .arg(&node.data)
        .args(options)
        .env("TWISTLOCK_USER", &file.user)
        .env("TWISTLOCK_PASSWORD", &file.password)
        .output()
        .unwrap();
    let text = String::from_utf8(stdout).unwrap();
    println!("  drill {options:?} on {}: {status}\n{text}{}", node.name, String::from_utf8(stderr).unwrap());
    (status.code(), serde_json::from_str(&text).unwrap_or_default())
}

/// As a drill sees it: through the eyes of the primary.
fn wait_seen_up(cluster: &Cluster) {
    cluster.wait_for("a PRIMARY that sees all of them up", |statuses| {
        let up = |member: &MemberStatus| matches!(member.state, Role::Primary | Role::Secondary);
        let primary = statuses.iter().flatten().find(|status| status.role == Role::Primary);
        primary.is_some_and(|status| status.members.iter().all(up))
    });
}

/// A drill of each kind.
fn rehearse(cluster: &Cluster) {
    for (options, takeover) in [(&["--kill"][..], "kill"), (&[], "switchover")] {
        wait_seen_up(cluster);
        let before = cluster.node(cluster.primary());
        let (code, outcome) = drill(cluster, options);
        assert_eq!(code, Some(0));
        assert_eq!((&outcome["takeover"], &outcome["from"]), (&takeover.into(), &before.name.as_str().into()));
        assert_ne!(outcome["to"], outcome["from"]);
        assert!(outcome["outage_ms"].as_f64().is_some_and(|ms| ms > 0.0));
        assert!(outcome["acknowledged_by_new"].as_u64() >= Some(50));
        assert_eq!(outcome["missing"].as_array().map(Vec::len), Some(0));
        let record = std::fs::read_to_string(before.data.join("drills.jsonl")).unwrap();
        let last: serde_json::Value = serde_json::from_str(record.lines().last().unwrap()).unwrap();
        assert_eq!(last, outcome);
    }
}

#[test]
fn a_drill_finds_every_write_in_pools_of_five_and_seven() {
    let _beside = beside();
    for members in [5, 7] {
        let cluster = Cluster::start_pool(members, RESTART_AFTER);
        rehearse(&cluster);
        wait_seen_up(&cluster);
        println!("drill of {members}: {}", cluster.finish(&[]));
    }
}

#[test]
fn a_drill_measures_the_takeover_and_finds_every_write() {
    let _beside = beside();
    let cluster = Cluster::start();
    rehearse(&cluster);
    wait_seen_up(&cluster);
    // Somebody who may not log in disturbs nobody.
    let primary = cluster.primary();
    assert_eq!(drill(&cluster, &["--password", "wrong"]).0, Some(77));
    assert_eq!(drill(&cluster, &["--token", "wrong"]).0, Some(77));
    assert_eq!(cluster.primary(), primary);
    println!("drill: {}", cluster.finish(&[]));
}
