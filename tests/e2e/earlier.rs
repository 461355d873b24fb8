//! A rolling upgrade from the program of an earlier commit, which scripts/upgrade-from.sh builds. Asks nothing but what both
//! answer: the status page and the API.

use std::{
    env, fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    WRITERS, alone,
    cluster::{Cluster, FROZEN, LEASE_LOST, LIMIT},
    sampler::Sampler,
    upgrade::install,
    writers::{Pen, Writers},
};

/// The port of the status page of a `dev` cluster, without its offset.
const STATUS_PORT: u16 = 8085;
const STEP: Duration = Duration::from_millis(50);

/// The status page of each node, as JSON; null for one that does not answer.
fn pages(cluster: &Cluster) -> Vec<Value> {
    let config = ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(1))).build();
    let agent = ureq::Agent::new_with_config(config);
    let port = STATUS_PORT + cluster.port_offset;
    let ask = |address: &str| {
        let request = agent.get(format!("http://{address}:{port}/status")).header("accept", "application/json");
        request.call().ok()?.body_mut().read_json().ok()
    };
    let address = |node: &str| node.split(':').next().unwrap_or_default().to_owned();
    cluster.file().nodes.iter().map(|node| ask(&address(&node.address)).unwrap_or_default()).collect()
}

/// Waits until one node serves and the others follow it, and returns its position.
fn wait_in_place(cluster: &Cluster) -> usize {
    let deadline = Instant::now() + LIMIT;
    loop {
        let pages = pages(cluster);
        let count = |state: &str| pages.iter().filter(|page| page["state"] == state).count();
        let leader = pages.iter().position(|page| page["serves"] == true);
        let same = pages.iter().all(|page| page["epoch"] == pages[0]["epoch"]);
        if let (1, 2, true, Some(leader)) = (count("PRIMARY"), count("SECONDARY"), same, leader) {
            return leader;
        }
        assert!(Instant::now() < deadline, "not one PRIMARY and two SECONDARY within {LIMIT:?}: {pages:#?}");
        thread::sleep(STEP);
    }
}

fn hand_over(cluster: &Cluster, pen: &Pen, to: usize) {
    let name = cluster.node(to).name;
    let deadline = Instant::now() + LIMIT;
    loop {
        let primary = wait_in_place(cluster);
        if primary == to {
            return;
        }
        assert!(Instant::now() < deadline, "{name} does not become PRIMARY");
        // The answer may be that the other one is not known as SECONDARY yet.
        let (status, text) = pen.call(primary, "POST", "/high-availability/switchover", Some(json!({ "to": name })));
        println!("  the role is to go to {name}: {status} {text}");
        wait_role_moves(cluster, primary);
    }
}

fn wait_role_moves(cluster: &Cluster, from: usize) {
    let deadline = Instant::now() + Duration::from_secs(2);
    while Instant::now() < deadline && pages(cluster)[from]["serves"] == true {
        thread::sleep(STEP);
    }
}

/// Every order of old and new serves; nothing is lost. Unless `OLD_PROGRAM` names one, the old program is this one: then the test
/// shows that it works itself.
#[test]
fn timed_an_upgrade_from_an_earlier_commit() {
    let _alone = alone();
    let new = PathBuf::from(env!("CARGO_BIN_EXE_twistlockd"));
    let old = env::var_os("OLD_PROGRAM").map_or_else(|| new.clone(), PathBuf::from);
    let cluster = Cluster::start_other(&old);
    let first = wait_in_place(&cluster);
    let (second, third) = ((first + 1) % 3, (first + 2) % 3);
    let (sampler, writers) = (Sampler::start(cluster.port_offset), Writers::start(&cluster.file(), WRITERS));
    let pen = Pen::new(&cluster.file());
    let begin = Instant::now();
    let upgrade = |node: usize| {
        install(&cluster, node, Some(&new));
        let serves = wait_in_place(&cluster);
        writers.wait_success(Instant::now(), |node| node == serves).expect("a write after the upgrade");
    };
    upgrade(second);
    // The new program serves two old ones, and one of those takes over from it.
    hand_over(&cluster, &pen, second);
    writers.wait_success(Instant::now(), |node| node == second).expect("a write on the new program");
    hand_over(&cluster, &pen, third);
    writers.wait_success(Instant::now(), |node| node == third).expect("a write on the old program");
    upgrade(first);
    // It has the role, which goes to a new one while it is replaced.
    upgrade(third);
    for node in 0..3 {
        let pid = cluster.node(node).pid.expect("it runs");
        let runs = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        assert_eq!(runs, fs::canonicalize(&new).unwrap(), "{}", cluster.node(node).name);
    }
    cluster.wait_healthy();
    let (written, sampled) = (writers.verify(), sampler.verify());
    println!("upgrade from an earlier commit: {} s\n  {written}\n  {sampled}", begin.elapsed().as_secs());
    println!("  {}", cluster.finish(&[LEASE_LOST, FROZEN].concat()));
}
