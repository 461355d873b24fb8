//! Clusters of more than three members: as many of them are lost at once as their size tolerates, under load.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{
    alone,
    cluster::{Cluster, LEASE_LOST, RESTART_AFTER},
    network,
    sampler::Sampler,
    writers::Writers,
};

/// Concurrent clients: the members of a large cluster need the processors, too.
const WRITERS: usize = 8;
/// From one attempt of the sampler at a port to the next.
const SAMPLE_EVERY: Duration = Duration::from_millis(4);

#[test]
fn timed_five_members_go_on_without_two() {
    let _alone = alone();
    network::in_private_network(|| lose(5, &[1, 2]));
}

#[test]
fn timed_seven_members_go_on_without_three() {
    let _alone = alone();
    network::in_private_network(|| lose(7, &[3]));
}

/// Kills the primary and the members that come first after it, so many in all each time. Then cuts the primary and as many
/// as are still a minority off from the others: those open their ports, after the primary has closed its own.
fn lose(members: usize, kills: &[usize]) {
    let cluster = Cluster::start_pool(members, RESTART_AFTER);
    let sampler = Sampler::start_every(SAMPLE_EVERY, members, cluster.port_offset);
    let writers = Writers::start(&cluster.file(), WRITERS);
    let beginning_with =
        |primary: usize, count: usize| (0..count).map(|at| (primary + at) % members).collect::<Vec<_>>();
    for count in kills {
        let lost = beginning_with(cluster.primary(), *count);
        let fault = Instant::now();
        lost.iter().for_each(|node| cluster.signal(*node, Signal::SIGKILL));
        let gap = writers.wait_success(fault, |node| !lost.contains(&node)).expect("a write on another node");
        println!("{members} members, {count} killed: gap {} ms", gap.as_millis());
        cluster.wait_healthy();
    }
    let minority = beginning_with(cluster.primary(), (members - 1) / 2);
    let fault = Instant::now();
    network::divide(&minority, cluster.port_offset);
    let gap = writers.wait_success(fault, |node| !minority.contains(&node)).expect("a write at the majority");
    let cut_off = minority.len();
    println!("{members} members, {cut_off} cut off with the primary: gap {} ms", gap.as_millis());
    network::heal();
    cluster.wait_healthy();
    let (written, sampled) = (writers.verify(), sampler.verify());
    println!("  {written}\n  {sampled}\n  {}", cluster.finish(LEASE_LOST));
}
