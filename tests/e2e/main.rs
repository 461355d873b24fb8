//! Real daemons, real signals, real packets: what must hold when the worst happens. Safety is always asserted; speed is
//! reported and only bounded generously, so that a busy machine fails nothing.
//!
//! *Gap*: the time from just before the fault to the end of the first acknowledged write that was started after it and
//! answered by another node than the one at fault, by any of 16 clients that try all three addresses.
//! `ROUNDS=n` sets how often each fault is repeated. The tests run one after another.

mod cluster;
mod network;
mod sampler;
mod writers;

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use cluster::Cluster;
use nix::sys::signal::Signal;
use sampler::Sampler;
use twistlock_ha::cluster::Role;
use writers::{Outcome, Writers};

/// Concurrent clients.
const WRITERS: usize = 16;
/// How long a frozen node stays frozen.
const FREEZE: Duration = Duration::from_secs(5);

/// Two clusters at once would measure each other.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn rounds(default: usize) -> usize {
    std::env::var("ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Repeats a fault under load and reports the gaps. `fault` harms the primary at the given position; `recover` ends the
/// harm once another node has answered.
fn repeat(name: &str, rounds: usize, fault: impl Fn(&Cluster, usize), recover: impl Fn(&Cluster, usize)) {
    let cluster = Cluster::start();
    let sampler = Sampler::start(cluster.port_offset);
    let writers = Writers::start(&cluster.file(), WRITERS);
    let mut gaps = Vec::new();
    for round in 1..=rounds {
        let primary = cluster.primary();
        let before = Instant::now();
        fault(&cluster, primary);
        let gap = writers.wait_success(before, |node| node != primary);
        let gap = gap.unwrap_or_else(|| panic!("{name}, round {round}: no write succeeded on another node"));
        println!("  {name} {round}: {} lost, gap {} ms", cluster.node(primary).name, gap.as_millis());
        gaps.push(gap);
        recover(&cluster, primary);
        cluster.wait_healthy();
    }
    let (written, sampled) = (writers.verify(), sampler.verify());
    cluster.wait_level();
    cluster.check_logs(&[]);
    report(name, &mut gaps);
    println!("  {written}\n  {sampled}");
}

fn report(name: &str, gaps: &mut [Duration]) {
    gaps.sort();
    let ms = |gap: &Duration| gap.as_millis();
    let median = &gaps[gaps.len() / 2];
    let (first, last) = (&gaps[0], &gaps[gaps.len() - 1]);
    println!("{name}: n={} gap min/median/max = {}/{}/{} ms", gaps.len(), ms(first), ms(median), ms(last));
}

#[test]
fn kill_9_of_the_primary() {
    let _alone = alone();
    repeat("kill -9", rounds(20), |cluster, primary| cluster.signal(primary, Signal::SIGKILL), |_, _| {});
}

#[test]
fn sigterm_of_the_primary() {
    let _alone = alone();
    repeat("SIGTERM", rounds(5), |cluster, primary| cluster.signal(primary, Signal::SIGTERM), |_, _| {});
}

#[test]
fn sigstop_of_the_primary() {
    let _alone = alone();
    let wake = |cluster: &Cluster, primary: usize| {
        let deadline = Instant::now() + FREEZE;
        let stale = ask_the_frozen(cluster, primary);
        pace_until(deadline);
        cluster.signal(primary, Signal::SIGCONT);
        if let Some(stale) = stale.join().unwrap() {
            panic!("the woken node answered a request with {stale}");
        }
    };
    repeat("SIGSTOP", rounds(5), |cluster, primary| cluster.signal(primary, Signal::SIGSTOP), wake);
}

fn pace_until(deadline: Instant) {
    thread::sleep(deadline.saturating_duration_since(Instant::now()));
}

/// Starts a request to the frozen node and returns the status of its answer, if it gave a successful one. Its port may be
/// shut by the port guard already; then there is nothing to hear, and that is well.
fn ask_the_frozen(cluster: &Cluster, node: usize) -> thread::JoinHandle<Option<u16>> {
    let (file, client) = (cluster.file(), writers::client(&cluster.file().ca, FREEZE * 2));
    thread::spawn(move || {
        let url = format!("{}/api/v1/_ping", file.nodes[node].console_url);
        client.get(url).call().ok().map(|answer| answer.status().as_u16()).filter(|status| *status < 500)
    })
}

/// The harder half of "nothing stale": a connection that was open and in use before the freeze.
#[test]
fn a_woken_primary_answers_nothing_on_old_connections() {
    let _alone = alone();
    let cluster = Cluster::start();
    let file = cluster.file();
    let authorization = writers::wait_for_login(&file);
    let primary = cluster.primary();
    let url = file.nodes[primary].console_url.clone();
    let client = writers::client(&file.ca, FREEZE * 4);
    assert_eq!(writers::post(&client, &url, &authorization, "before"), Outcome::Acknowledged);
    cluster.signal(primary, Signal::SIGSTOP);
    let list = {
        let (client, url, authorization) = (client.clone(), url.clone(), authorization.clone());
        // The agent keeps the connection of the POST: this request waits in the frozen process's socket.
        thread::spawn(move || {
            let answer = client.get(format!("{url}/api/v1/tags")).header("authorization", &authorization).call();
            answer.ok().map(|answer| answer.status().as_u16())
        })
    };
    cluster.wait_for("another PRIMARY", |statuses| {
        let other = |(index, status): (usize, &Option<_>)| {
            index != primary && status.as_ref().is_some_and(|s: &twistlock_ha::node::Status| s.role == Role::Primary)
        };
        statuses.iter().enumerate().any(other)
    });
    let now = (0..3).find(|index| {
        *index != primary && cluster.statuses()[*index].as_ref().is_some_and(|s| s.role == Role::Primary)
    });
    let now = &file.nodes[now.expect("it was there a moment ago")].console_url;
    wait_written(&file, now, &authorization);
    cluster.signal(primary, Signal::SIGCONT);
    let answer = list.join().unwrap();
    assert!(answer.is_none_or(|status| status >= 500), "the woken node answered {answer:?}");
    cluster.wait_healthy();
    cluster.check_logs(&[]);
}

fn wait_written(file: &twistlock_ha::dev::ClusterFile, url: &str, authorization: &str) {
    let client = writers::client(&file.ca, Duration::from_secs(5));
    let deadline = Instant::now() + cluster::LIMIT;
    let mut number = 0;
    while writers::post(&client, url, authorization, &format!("after-{number}")) != Outcome::Acknowledged {
        assert!(Instant::now() < deadline, "the new primary takes no write");
        number += 1;
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn kill_9_of_all_three() {
    let _alone = alone();
    let cluster = Cluster::start();
    let sampler = Sampler::start(cluster.port_offset);
    let writers = Writers::start(&cluster.file(), WRITERS);
    let mut gaps = Vec::new();
    for _ in 0..rounds(3) {
        let before: Vec<Option<u32>> = cluster.file().nodes.iter().map(|node| node.pid).collect();
        let fault = Instant::now();
        (0..3).for_each(|node| cluster.signal(node, Signal::SIGKILL));
        let dead = Instant::now();
        let gap = writers.wait_success(dead, |_| true).expect("a write after the restart");
        gaps.push(gap + (dead - fault));
        cluster.wait_for("three new processes", |_| {
            cluster.file().nodes.iter().zip(&before).all(|(node, old)| node.pid.is_some() && node.pid != *old)
        });
        cluster.wait_healthy();
    }
    let (written, sampled) = (writers.verify(), sampler.verify());
    cluster.wait_level();
    cluster.check_logs(&[]);
    report(&format!("kill -9 of all three (restarted after {} s)", cluster::RESTART_AFTER), &mut gaps);
    println!("  {written}\n  {sampled}");
}

#[test]
fn partition_of_the_primary() {
    let _alone = alone();
    network::in_private_network(|| {
        let wall = |cluster: &Cluster, primary: usize| network::isolate(primary, cluster.port_offset);
        repeat("partition", rounds(5), wall, |_, _| network::heal());
    });
}
