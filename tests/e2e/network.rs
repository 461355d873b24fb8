//! A private network for one test and the walls in it. Needs root and nftables. Must never touch the host's network.

use std::{
    fmt::Write as _,
    io::Write,
    net::SocketAddr,
    process::{Command, Stdio},
};

use super::sampler::OBSERVER;
use nix::{
    sched::{CloneFlags, unshare},
    unistd::geteuid,
};

/// `HIGH_AVAILABILITY_PORT` before the offset.
pub const HA_PORT: u16 = 8086;

/// What members say to each other: links and datagrams.
const BOTH: &str = "meta l4proto { tcp, udp } th";

/// Where clients come from, and where a balancer listens: no wall hits it.
pub const CLIENTS: &str = "127.0.0.101";

/// What a wall cuts off.
#[derive(Clone, Copy)]
pub enum Wall {
    /// The links between one node and both others. Clients still reach all of them: the harder case.
    Links,
    /// The whole host: only the sampler still reaches it.
    Host,
}

/// Runs `test` on a thread with a network namespace of its own, whose loopback is up. Threads and processes that the test
/// starts are in it too; it is gone with the last of them.
pub fn in_private_network(test: impl FnOnce() + Send + 'static) {
    assert!(
        geteuid().is_root(),
        "this test makes a network namespace: run it as root, or leave it out with --skip partition"
    );
    let enter = move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
        run("ip", &["link", "set", "lo", "up"], "");
        // Clients that do not choose an address would come from 127.0.0.1, which is node1's: a wall would hit them.
        run("ip", &["address", "add", &format!("{CLIENTS}/8"), "dev", "lo"], "");
        for to in ["127.0.0.0/8", "127.0.0.1", CLIENTS] {
            let route = ["route", "change", "local", to, "dev", "lo", "table", "local", "proto", "kernel"];
            run("ip", &[&route[..], &["scope", "host", "src", CLIENTS]].concat(), "");
        }
        test();
    };
    let thread = std::thread::Builder::new().name("private network".into()).spawn(enter).unwrap();
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Puts a wall around one node. Packets are dropped at their arrival, so that nobody is told.
pub fn isolate(node: usize, wall: Wall, port_offset: u16) {
    let (address, port) = (format!("127.0.0.{}", node + 1), HA_PORT + port_offset);
    let mut rules = String::new();
    for side in ["saddr", "daddr"] {
        // Writing to a String cannot fail.
        let _ = match wall {
            Wall::Links => {
                let links = format!("ip {side} {address} {BOTH}");
                writeln!(rules, "{links} dport {port} drop\n{links} sport {port} drop")
            }
            Wall::Host => {
                writeln!(rules, "ip saddr {OBSERVER} accept\nip daddr {OBSERVER} accept\nip {side} {address} drop")
            }
        };
    }
    raise("wall", &rules);
}

/// Cuts the links between these nodes and all others. Clients still reach all of them.
pub fn divide(nodes: &[usize], port_offset: u16) {
    let some: Vec<String> = nodes.iter().map(|node| format!("127.0.0.{}", node + 1)).collect();
    let (some, port) = (some.join(", "), HA_PORT + port_offset);
    let between = [("saddr", "daddr"), ("daddr", "saddr")];
    let rules = between.map(|(these, others)| {
        ["dport", "sport"]
            .map(|end| format!("ip {these} {{ {some} }} ip {others} != {{ {some} }} {BOTH} {end} {port} drop\n"))
    });
    raise("wall", &rules.concat().concat());
}

/// Loses so many of a hundred packets between the members, at their arrival, those of handshakes too.
pub fn lose(percent: u8, port_offset: u16) {
    let port = HA_PORT + port_offset;
    // Datagrams have this number at both ends: one rule for them, so that they are not lost twice as often.
    let rule = |packets| format!("{packets} {port} numgen random mod 100 < {percent} drop\n");
    raise("wall", &["tcp dport", "tcp sport", "udp dport"].map(rule).concat());
}

/// Cuts all members off from one another.
pub fn cut(port_offset: u16) {
    let port = HA_PORT + port_offset;
    raise("wall", &["dport", "sport"].map(|end| format!("{BOTH} {end} {port} drop\n")).concat());
}

/// Takes that wall down.
pub fn heal() {
    remove("wall");
}

/// Puts up a wall of this name out of lines for nftables, which see each packet at its arrival.
pub fn raise(name: &str, rules: &str) {
    let table = format!("table ip {name} {{ chain input {{ type filter hook input priority 0;\n{rules}}}\n}}\n");
    run("nft", &["-f", "-"], &table);
}

/// Leads connections from one address to the HA port of another one to somebody else, until that is removed by its name.
pub fn detour(name: &str, from: &str, to: &str, via: SocketAddr) {
    let rule = format!("ip saddr {from} ip daddr {to} tcp dport {HA_PORT} dnat to {via}");
    let table = format!("table ip {name} {{ chain out {{ type nat hook output priority -100;\n{rule}\n}}\n}}\n");
    run("nft", &["-f", "-"], &table);
}

/// Takes the wall or the detour of this name down.
pub fn remove(name: &str) {
    run("nft", &["delete", "table", "ip", name], "");
}

fn run(program: &str, args: &[&str], input: &str) {
    let spawned = Command::new(program).args(args).stdin(Stdio::piped()).spawn();
    let mut child = spawned.unwrap_or_else(|error| {
        panic!("cannot run {program}: {error}. Install the packages iproute2 and nftables (scripts/check.sh does)")
    });
    child.stdin.take().expect("it is piped").write_all(input.as_bytes()).unwrap();
    let status = child.wait().unwrap();
    assert!(status.success(), "{program} {args:?}: {status}");
}
