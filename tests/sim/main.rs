//! Deterministic simulation of the consensus core: real `Cluster`s over a fake network, disk and clock.
//! The invariants of `src/lib.rs` are checked after every step. `SEED=n` replays one seed, `SEEDS=n` sets how many
//! are run. Owns no real time, no real files, no threads inside one seed.

mod acts;
mod databases;
mod disk;
mod gate;
mod memory;
mod network;
mod node;
mod world;

use std::{collections::BTreeSet, ops::RangeInclusive};

use twistlock_ha::cluster::Timing;
use world::World;

/// Sizes of clusters.
const SIZES: RangeInclusive<u64> = 3..=7;
/// Simulated time under faults, with three members, and after everything was healed, in nanoseconds. More members have as many faults
/// in less time: one seed costs about the same in each size.
const STORM: u64 = 12_000_000_000;
const CALM: u64 = 6_000_000_000;

/// Three seeds in four have three members, as all clusters of today; each other size has a sixteenth.
fn size(seed: u64) -> u64 {
    Some(seed % 16).filter(|size| SIZES.contains(size)).unwrap_or(3)
}

/// A quarter of all seeds, of each size.
fn is_pool(seed: u64) -> bool {
    seed / 16 % 4 == 1
}

fn run(seed: u64, timing: Timing) -> node::Summary {
    let found = if is_pool(seed) { World::pool } else { World::new };
    let mut world = found(seed, size(seed), timing);
    world.datagrams = true;
    finish(world)
}

fn finish(mut world: World) -> node::Summary {
    let storm = STORM * 3 / world.size;
    world.storm_until(storm);
    world.heal();
    world.run_until(storm + CALM);
    world.assert_alive();
    world.summary()
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// A vote was given back, one of the members that knew of it forgot, and the other had the configuration on disk but not that it
/// was committed; the third had the longer log, and did not know of the vote.
#[test]
fn a_vote_that_is_on_the_disk_of_one_is_known_to_all_that_are_left() {
    for seed in [4319, 7782] {
        finish(World::new(seed, 3, Timing::default()));
    }
}

#[test]
fn invariants_hold_on_every_seed() {
    if let Some(seed) = number("SEED") {
        println!("seed {seed}: {:?}", run(seed, Timing::default()));
        return;
    }
    let seeds = number("SEEDS").unwrap_or(2000);
    let threads = std::thread::available_parallelism().map_or(2, usize::from) as u64;
    let mut total = [(); 5].map(|()| node::Summary::default());
    std::thread::scope(|scope| {
        let share = |first| (first..seeds).step_by(threads as usize);
        let workers: Vec<_> = (0..threads)
            .map(|first| {
                scope.spawn(move || {
                    let mut sum = [(); 5].map(|()| node::Summary::default());
                    for seed in share(first) {
                        let result = std::panic::catch_unwind(|| run(seed, Timing::default()));
                        match result {
                            Ok(one) => sum[(size(seed) - SIZES.start()) as usize].add(&one),
                            Err(_) => panic!("seed {seed} failed: SEED={seed} cargo test --test sim replays it"),
                        }
                    }
                    sum
                })
            })
            .collect();
        for worker in workers {
            match worker.join() {
                Ok(sums) => total.iter_mut().zip(&sums).for_each(|(total, sum)| total.add(sum)),
                Err(cause) => std::panic::resume_unwind(cause),
            }
        }
    });
    for (size, total) in SIZES.zip(&total) {
        println!("{size} members: {total:?}");
        assert_something_happened(if size == 3 { seeds / 4 * 3 } else { seeds / 16 }, total);
    }
    let mut all = node::Summary::default();
    total.iter().for_each(|one| all.add(one));
    assert!(all.raised > seeds / 80 && all.again > seeds / 6, "{all:?}");
    assert!(all.versions > seeds / 4 && all.behind > seeds / 80, "{all:?}");
}

/// A simulation in which nothing happens proves nothing.
fn assert_something_happened(seeds: u64, total: &node::Summary) {
    assert!(total.acknowledged > seeds * 20 && total.takeovers > seeds && total.crashes > seeds, "{total:?}");
    assert!(total.removed > seeds / 4 && total.joined > seeds / 20, "{total:?}");
    assert!(total.forgot > seeds / 5 && total.programs > seeds / 4, "{total:?}");
    assert!(total.late > seeds * 20 && total.datagrams > total.late, "{total:?}");
}

/// How long the service is interrupted when its primary dies for good, in milliseconds: least, median and most.
fn interruption(size: u64, dead: usize, tells: f64) -> (u64, u64, u64) {
    let mut took: Vec<u64> = (0..40)
        .map(|seed| {
            let mut world = World::new(seed, size, Timing::default());
            world.heal();
            (world.tells, world.late) = (tells, 0.0);
            world.run_until(CALM / 2);
            world.lose_primary(dead) / 1_000_000
        })
        .collect();
    took.sort_unstable();
    (took[0], took[took.len() / 2], took[took.len() - 1])
}

/// Whoever may take over does not wait for its number, but for those who are there: with seven members it takes no longer than with
/// three. Measured from the death of the process to open ports; the survivors learn of it (fast path), or find out by its silence.
#[test]
fn a_takeover_takes_no_longer_with_more_members() {
    for size in SIZES {
        let minority = (size as usize - 1) / 2;
        for dead in BTreeSet::from([1, minority]) {
            let (fast, silent) = (interruption(size, dead, 1.0), interruption(size, dead, 0.0));
            println!("{size} members, {dead} dead: fast path {fast:?} ms, time-out {silent:?} ms");
            assert!(fast.1 < 150 && fast.2 < 1_000, "{size} members, {dead} dead: {fast:?} ms");
            assert!(silent.1 < 800 && silent.2 < 1_500, "{size} members, {dead} dead: {silent:?} ms");
        }
    }
}

#[test]
fn a_seed_runs_the_same_twice() {
    for seed in [1, 77, 4242, 5, 7] {
        assert_eq!(run(seed, Timing::default()), run(seed, Timing::default()), "seed {seed}");
    }
}

/// Only the node that was primary when the pause began may come back as primary, however long that takes.
#[test]
fn while_takeover_is_paused_nobody_takes_over() {
    for seed in 0..50 {
        let mut world = World::new(seed, 3, Timing::default());
        world.heal();
        world.run_until(CALM);
        world.pause();
        let before = world.crash_primary();
        let takeovers = world.summary().takeovers;
        world.run_until(2 * CALM);
        assert_eq!(world.primary(), Some(before), "seed {seed}: {:?}", world.summary());
        assert_eq!(world.summary().takeovers, takeovers + 1, "seed {seed}: only it comes back");
    }
}

/// A planned handover never waits for an election time-out: neither when raft has just forgotten who answers, as it does
/// every 20 ticks, nor when the member that got the order could not serve well and stays where it is.
#[test]
fn a_handover_is_carried_out_whenever_it_is_asked_for() {
    let mut longest = (0, 0);
    for seed in 0..60 {
        let mut world = World::new(seed, 3, Timing::default());
        world.heal();
        world.run_until(CALM);
        for round in 0..20 {
            world.run_until(CALM + round * 1_037_000_000);
            longest = longest.max((world.hand_over_primary(None), seed));
        }
    }
    let (longest, seed) = (longest.0 / 1_000_000, longest.1);
    println!("the longest handover took {longest} ms (seed {seed})");
    assert!(longest < 450, "seed {seed}: {longest} ms");
}

/// Whoever is named gets the role, also when the order reaches it while it is still replaying what it wrote as a primary a
/// moment ago: it begins as soon as it is done. Only an order that is late itself lets the third member have the role.
#[test]
fn a_member_that_is_behind_for_a_moment_carries_the_order_out() {
    const ROUNDS: u64 = 20;
    let mut elsewhere = 0;
    for seed in 0..ROUNDS {
        let mut world = World::new(seed, 3, Timing::default());
        world.heal();
        world.run_until(CALM);
        for round in 0..ROUNDS {
            world.run_until(CALM + round * 1_037_000_000);
            let to = (world.primary().expect("somebody serves") + 1) % 3;
            world.fall_behind(to, (10 + 5 * round) * 1_000_000);
            world.hand_over_primary(Some(to));
            elsewhere += u64::from(world.primary() != Some(to));
        }
    }
    println!("{elsewhere} of {} handovers went to another member", ROUNDS * ROUNDS);
    // The network of the simulation delays one message in fifty by up to 400 ms.
    assert!(elsewhere < ROUNDS * ROUNDS / 20, "{elsewhere} handovers went to another member");
}

/// It keeps its vote and its raft log, and whoever installs a program that knows the database finds everything there.
#[test]
fn a_member_that_does_not_know_a_database_votes_and_never_serves() {
    for seed in 0..20 {
        let mut world = World::new(seed, 3, Timing::default());
        world.heal();
        world.run_until(CALM);
        let primary = world.primary().expect("somebody serves");
        let (older, third) = ((primary + 1) % 3, (primary + 2) % 3);
        world.install_databases(older, 1);
        world.run_for(3_000);
        world.assert_halted(older);
        // It is one of the two that acknowledge, and one of the two that elect.
        world.stop(third);
        let before = world.summary().acknowledged;
        world.run_for(1_000);
        assert!(world.summary().acknowledged > before + 10, "seed {seed}: its acknowledgements do not count");
        world.start(third);
        world.run_for(3_000);
        world.stop(primary);
        world.run_for(5_000);
        assert_eq!(world.primary(), Some(third), "seed {seed}: it has voted");
        world.assert_halted(older);
        world.start(primary);
        world.install_databases(older, 2);
        world.run_for(5_000);
        world.hand_over_primary(Some(older));
        assert_eq!(world.primary(), Some(older), "seed {seed}: the newer program goes on where the older one stopped");
        world.assert_alive();
    }
}

/// The checks can fail: a lease that outlives the voters' promise opens two nodes' ports, and that is found.
#[test]
fn a_lease_that_is_too_long_is_caught() {
    let timing = Timing { lease: 900_000_000, ..Timing::default() };
    let caught = (0..300).any(|seed| std::panic::catch_unwind(|| run(seed, timing)).is_err());
    assert!(caught, "300 seeds with a lease of 900 ms found nothing");
}

/// The same for nodes that nobody compares with what they had before.
#[test]
fn a_member_that_forgot_and_counts_is_caught() {
    let caught = (0..300).any(|seed| {
        let storm = || {
            let mut world = World::new(seed, 3, Timing::default());
            world.trusting = true;
            world.storm_until(STORM);
        };
        std::panic::catch_unwind(storm).is_err()
    });
    assert!(caught, "300 seeds with members that forget found nothing");
}

/// The same for a program that does not know that the cluster runs a newer feature level than its own.
#[test]
fn an_older_program_that_would_serve_is_caught() {
    let caught = (0..2000).any(|seed| {
        let storm = || {
            let mut world = World::new(seed, 3, Timing::default());
            world.blind = true;
            world.storm_until(STORM);
        };
        std::panic::catch_unwind(storm).is_err()
    });
    assert!(caught, "2,000 seeds with programs that do not know their level found nothing");
}

/// The same in a pool, for programs that do not know that they are older than its database.
#[test]
fn an_older_version_that_would_serve_is_caught() {
    let caught = (0..300).any(|seed| {
        let storm = || {
            let mut world = World::pool(seed, 3, Timing::default());
            world.blind = true;
            world.storm_until(STORM);
        };
        std::panic::catch_unwind(storm).is_err()
    });
    assert!(caught, "300 seeds with programs that do not know their version found nothing");
}
