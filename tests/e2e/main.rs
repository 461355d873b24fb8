//! Real daemons, real signals, real packets: what must hold when the worst happens. Safety is always asserted; speed is
//! reported and only bounded generously, so that a busy machine fails nothing.
//!
//! *Gap*: the time from just before the fault to the end of the first acknowledged write that was started after it and
//! answered by another node than the one at fault, by any of 16 clients that try all three addresses.
//! `ROUNDS=n` sets how often each fault is repeated.
//!
//! Tests that measure, or load the machine, have names that begin with `timed_`. Each runs alone; the others run beside one
//! another, and may run beside other work.

mod adding;
#[path = "../join/agent.rs"]
mod agent;
mod amnesia;
mod audit;
mod backup;
mod balancers;
mod between;
mod busy;
mod certificates;
mod cluster;
mod clustered_db;
mod copies;
mod damage;
mod databases;
mod defenders;
mod disk;
mod drill;
mod earlier;
mod events;
mod exactly_once;
mod floods;
mod health;
mod held;
mod network;
mod observe;
mod pool;
mod preload;
mod recover;
mod remote;
mod restores;
mod rollback;
mod rotation;
mod routes;
mod sampler;
mod service;
mod snapshot;
#[path = "../cli/terminal.rs"]
mod terminal;
mod trouble;
mod upgrade;
mod waiting;
mod writers;

use std::{
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    thread,
    time::{Duration, Instant},
};

use cluster::{Cluster, FROZEN, LEASE_LOST};
use held::Held;
use network::Wall;
use nix::sys::signal::Signal;
use sampler::Sampler;
use twistlock_ha::{
    admin::SwitchoverReport,
    control::{self, Call},
    node::Status,
};
use writers::Writers;

/// Concurrent clients.
const WRITERS: usize = 16;
/// How long a frozen node stays frozen.
const FREEZE: Duration = Duration::from_secs(5);

/// What is done to the primary, again and again.
struct Fault<'a> {
    name: &'a str,
    rounds: usize,
    /// Log lines above INFO that belong to it, by a part of their text.
    expected: &'a [&'a str],
    /// The role ends with the lease: then there is time enough to see the ports closed before another node opens its own.
    by_lease: bool,
}

/// Held by tests while they run.
static RUNNING: RwLock<()> = RwLock::new(());

/// Two clusters at once would measure each other.
fn alone() -> RwLockWriteGuard<'static, ()> {
    assert_ne!(is_timed(), Some(false), "the name of a test that runs alone begins with timed_");
    RUNNING.write().unwrap_or_else(PoisonError::into_inner)
}

/// For a cluster that waits most of the time, and says nothing about how long.
fn beside() -> RwLockReadGuard<'static, ()> {
    assert_ne!(is_timed(), Some(true), "a test whose name begins with timed_ runs alone");
    RUNNING.read().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the test of this thread has a name that says so. Unknown where the harness gives it no thread of its own.
fn is_timed() -> Option<bool> {
    let thread = thread::current();
    let name = thread.name().filter(|name| *name != "main")?;
    Some(name.rsplit("::").next().is_some_and(|name| name.starts_with("timed_")))
}

fn rounds(default: usize) -> usize {
    std::env::var("ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Repeats a fault under load and reports the gaps. `prepare` opens connections to the primary, `harm` harms it, and
/// `recover` ends the harm once another node has answered.
fn repeat<T>(
    fault: &Fault<'_>,
    prepare: impl Fn(&Cluster, usize, &str) -> T,
    harm: impl Fn(&Cluster, usize, &mut T),
    recover: impl Fn(&Cluster, usize, T),
) {
    let name = fault.name;
    let cluster = Cluster::start();
    let sampler = Sampler::start(cluster.port_offset);
    let writers = Writers::start(&cluster.file(), WRITERS);
    let (mut gaps, mut margins) = (Vec::new(), Vec::new());
    for round in 1..=fault.rounds {
        let primary = cluster.primary();
        let mut prepared = prepare(&cluster, primary, writers.authorization());
        let before = Instant::now();
        harm(&cluster, primary, &mut prepared);
        let gap = writers.wait_success(before, |node| node != primary);
        let gap = gap.unwrap_or_else(|| panic!("{name}, round {round}: no write succeeded on another node"));
        let margin = sampler.wait_margin(primary, before);
        assert!(
            margin.is_some() || !fault.by_lease,
            "{name}, round {round}: another node opened its ports before those of {} were seen closed; {}",
            cluster.node(primary).name,
            sampler.verify()
        );
        let closed = margin.map_or("not seen".into(), |margin| format!("{:.1} ms", margin.as_secs_f64() * 1e3));
        let lost = cluster.node(primary).name;
        println!("  {name} {round}: {lost} lost, gap {} ms, all ports closed for {closed}", gap.as_millis());
        gaps.push(gap);
        margins.extend(margin);
        recover(&cluster, primary, prepared);
        cluster.wait_healthy();
    }
    let (written, sampled) = (writers.verify(), sampler.verify());
    let compared = cluster.finish(fault.expected);
    report(name, &mut gaps);
    let (seen, least) = (margins.len(), margins.iter().min().map_or(0.0, |margin| margin.as_secs_f64() * 1e3));
    println!("  old ports seen closed before others opened: {seen} of {} times, at least {least:.1} ms", gaps.len());
    println!("  {written}\n  {sampled}\n  {compared}");
}

fn report(name: &str, gaps: &mut [Duration]) {
    gaps.sort();
    let ms = |gap: &Duration| gap.as_millis();
    let median = &gaps[gaps.len() / 2];
    let (first, last) = (&gaps[0], &gaps[gaps.len() - 1]);
    println!("{name}: n={} gap min/median/max = {}/{}/{} ms", gaps.len(), ms(first), ms(median), ms(last));
}

fn send(signal: Signal) -> impl Fn(&Cluster, usize, &mut ()) {
    move |cluster, primary, ()| cluster.signal(primary, signal)
}

#[test]
fn timed_kill_9_of_the_primary() {
    let _alone = alone();
    let fault = Fault { name: "kill -9", rounds: rounds(5), expected: &[], by_lease: false };
    repeat(&fault, |_, _, _| (), send(Signal::SIGKILL), |_, _, ()| {});
}

#[test]
fn timed_sigterm_of_the_primary() {
    let _alone = alone();
    let fault = Fault { name: "SIGTERM", rounds: rounds(3), expected: &[], by_lease: false };
    let process = |cluster: &Cluster, primary: usize, _: &str| cluster.node(primary).pid;
    // Until it has ended it answers as a SECONDARY: the next round must not take it for one.
    let again = |cluster: &Cluster, node: usize, before: Option<u32>| {
        cluster.wait_for("a new process", |_| cluster.node(node).pid.is_some_and(|pid| Some(pid) != before));
    };
    repeat(&fault, process, |cluster, primary, _| cluster.signal(primary, Signal::SIGTERM), again);
}

/// Planned: the ports are drained, the last transaction is replicated, then the role goes over.
#[test]
fn timed_switchover_under_load() {
    let _alone = alone();
    let fault = Fault { name: "switchover", rounds: rounds(5), expected: &[], by_lease: false };
    let ask = |cluster: &Cluster, primary: usize, (): &mut ()| {
        let operation = Call::post("high-availability/switchover").with(serde_json::json!({}));
        let report: SwitchoverReport =
            control::ask(&cluster.node(primary).control, &operation, cluster::LIMIT).unwrap();
        assert!(report.checks.iter().all(|check| check.ok), "{report:?}");
    };
    repeat(&fault, |_, _, _| (), ask, |_, _, ()| {});
}

/// The new primary is killed while the old one is still coming back: what both acknowledged must be there.
#[test]
fn timed_kill_9_of_the_next_primary_too() {
    let _alone = alone();
    let cluster = Cluster::start();
    let sampler = Sampler::start(cluster.port_offset);
    let writers = Writers::start(&cluster.file(), WRITERS);
    let mut gaps = Vec::new();
    for round in 1..=rounds(5) {
        let first = cluster.primary();
        let before = cluster.node(first).pid;
        let fault = Instant::now();
        cluster.signal(first, Signal::SIGKILL);
        writers.wait_success(fault, |node| node != first).expect("a write on the next primary");
        let second = cluster.primary();
        assert_ne!(first, second, "round {round}");
        // As early as a process can be harmful: it exists, and may not even have opened its raft log.
        cluster.wait_for("the old primary's new process", |_| {
            cluster.node(first).pid.is_some_and(|pid| Some(pid) != before)
        });
        let fault = Instant::now();
        cluster.signal(second, Signal::SIGKILL);
        gaps.push(writers.wait_success(fault, |node| node != second).expect("a write after the second kill"));
        cluster.wait_healthy();
    }
    let (written, sampled) = (writers.verify(), sampler.verify());
    let compared = cluster.finish(LEASE_LOST);
    report("kill -9 of the next primary while the old one comes back", &mut gaps);
    println!("  {written}\n  {sampled}\n  {compared}");
}

/// The cable is out, in, and out again: some absences are shorter than a lease, some longer than an election.
#[test]
fn timed_a_loose_cable() {
    let _alone = alone();
    network::in_private_network(|| {
        let cluster = Cluster::start();
        let sampler = Sampler::start(cluster.port_offset);
        let writers = Writers::start(&cluster.file(), WRITERS);
        for round in 0..rounds(3) {
            for (out, back) in [(100, 50), (450, 20), (900, 300), (600, 10), (2000, 700)] {
                let primary = cluster.primary();
                network::isolate(primary, Wall::Links, cluster.port_offset);
                pace_until(Instant::now() + Duration::from_millis(out));
                network::heal();
                pace_until(Instant::now() + Duration::from_millis(back));
            }
            cluster.wait_healthy();
            writers.wait_success(Instant::now(), |_| true).unwrap_or_else(|| panic!("no write after round {round}"));
        }
        let (written, sampled) = (writers.verify(), sampler.verify());
        let compared = cluster.finish(LEASE_LOST);
        println!("loose cable: {written}\n  {sampled}\n  {compared}");
    });
}

/// Connections that were in use before the process was frozen get a request each while it is: nothing may come back on
/// them when it wakes, neither of what it knew before nor of a write.
#[test]
fn timed_sigstop_of_the_primary() {
    let _alone = alone();
    let expected = [LEASE_LOST, FROZEN].concat();
    let fault = Fault { name: "SIGSTOP", rounds: rounds(3), expected: &expected, by_lease: true };
    let prepare = |cluster: &Cluster, primary: usize, authorization: &str| {
        let mut held = [(); 4].map(|()| Held::open(&cluster.file(), primary, authorization));
        let body = r##"{"name":"asked-of-the-frozen","color":"#336699","description":""}"##;
        let requests = [("GET", ""), ("GET", ""), ("POST", body), ("GET", "")];
        held.iter_mut().zip(requests).for_each(|(held, (method, body))| held.prepare(method, body));
        held[3].send_half().expect("the primary reads");
        (Instant::now(), held)
    };
    let freeze = |cluster: &Cluster, primary: usize, (since, held): &mut (Instant, [Held; 4])| {
        *since = Instant::now();
        cluster.freeze(primary);
        // With the lease still valid.
        held[0].send_rest().expect("the kernel takes it");
    };
    let wake = |cluster: &Cluster, primary: usize, (since, mut held): (Instant, [Held; 4])| {
        // With another primary, which has acknowledged writes that this one does not know.
        held[1..].iter_mut().for_each(|held| held.send_rest().expect("the kernel takes it"));
        pace_until(since + FREEZE);
        cluster.signal(primary, Signal::SIGCONT);
        let ends = held.map(Held::wait_end);
        println!("  asked while frozen, nothing answered: {ends:?}");
    };
    repeat(&fault, prepare, freeze, wake);
}

/// The held connection must be known to object when something comes back.
#[test]
fn timed_a_held_connection_sees_an_answer() {
    let _alone = alone();
    let cluster = Cluster::start();
    let writers = Writers::start(&cluster.file(), 1);
    let mut held = Held::open(&cluster.file(), cluster.primary(), writers.authorization());
    held.prepare("GET", "");
    held.send_half().unwrap();
    held.send_rest().unwrap();
    assert!(thread::spawn(move || held.wait_end()).join().is_err());
    writers.verify();
    cluster.finish(&[]);
}

fn pace_until(deadline: Instant) {
    thread::sleep(deadline.saturating_duration_since(Instant::now()));
}

#[test]
fn timed_kill_9_of_all_three() {
    let _alone = alone();
    let cluster = Cluster::start();
    let sampler = Sampler::start(cluster.port_offset);
    let writers = Writers::start(&cluster.file(), WRITERS);
    let mut gaps = Vec::new();
    for _ in 0..rounds(5) {
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
    let compared = cluster.finish(&[]);
    report(&format!("kill -9 of all three (restarted after {} s)", cluster::RESTART_AFTER), &mut gaps);
    println!("  {written}\n  {sampled}\n  {compared}");
}

/// The primary cannot reach the other nodes, but clients reach it: it must close its ports by itself.
#[test]
fn timed_partition_of_the_primary() {
    partition("partition", rounds(3), Wall::Links);
}

/// Nobody reaches the primary but the sampler, which looks whether its ports close.
#[test]
fn timed_partition_of_the_primary_from_everybody() {
    partition("partition of the host", rounds(3), Wall::Host);
}

fn partition(name: &'static str, rounds: usize, wall: Wall) {
    let _alone = alone();
    network::in_private_network(move || {
        let fault = Fault { name, rounds, expected: LEASE_LOST, by_lease: true };
        let prepare = |cluster: &Cluster, primary: usize, authorization: &str| {
            let mut held = Held::open(&cluster.file(), primary, authorization);
            held.prepare("GET", "");
            held
        };
        let isolate = |cluster: &Cluster, primary: usize, _: &mut Held| {
            network::isolate(primary, wall, cluster.port_offset);
        };
        let heal = |_: &Cluster, _: usize, mut held: Held| {
            // A connection of the former term may be reset already, or be cut off: either way nothing comes back.
            let _ = held.send_rest();
            if matches!(wall, Wall::Host) {
                network::heal();
            }
            held.wait_end();
            if matches!(wall, Wall::Links) {
                network::heal();
            }
        };
        repeat(&fault, prepare, isolate, heal);
    });
}

/// A member that is away for thousands of transactions and several checkpoints comes back from the raft log alone: the
/// others have compacted theirs before, and must not have let go of what it lacks.
#[test]
fn timed_the_raft_log_is_compacted_but_kept_for_a_member_that_is_away() {
    let _alone = alone();
    let cluster = Cluster::start();
    cluster.configure("CHECKPOINT_SECONDS", "1");
    cluster.configure("LOG_LEVEL", "debug");
    cluster.restart_all();
    let writers = Writers::start(&cluster.file(), WRITERS);
    let compactions = |node| cluster.log(node).matches("raft log compacted").count();
    cluster.wait_for("a compaction on every node", |_| (0..3).all(|node| compactions(node) > 0));
    let away = (cluster.primary() + 1) % 3;
    let applied =
        |statuses: &[Option<Status>]| statuses.iter().flatten().map(|status| status.applied).max().unwrap_or(0);
    let begin = applied(&cluster.statuses());
    cluster.freeze(away);
    cluster.wait_for("2000 entries without the frozen node", |statuses| applied(statuses) > begin + 2000);
    cluster.signal(away, Signal::SIGCONT);
    cluster.wait_healthy();
    let written = writers.verify();
    println!("compaction: {written}\n  {}", cluster.finish(&[]));
}
