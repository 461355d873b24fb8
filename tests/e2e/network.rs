//! A private network for one test and the walls in it. Needs root and nftables. Must never touch the host's network.

use std::{
    fmt::Write as _,
    io::Write,
    process::{Command, Stdio},
};

use nix::{
    sched::{CloneFlags, unshare},
    unistd::geteuid,
};

/// `HIGH_AVAILABILITY_PORT` before the offset.
const HA_PORT: u16 = 8086;

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
        test();
    };
    let thread = std::thread::Builder::new().name("private network".into()).spawn(enter).unwrap();
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Cuts the consensus links between one node and the others. Clients still reach all of them: the harder case.
/// Packets are dropped at their arrival, so that nobody is told.
pub fn isolate(node: usize, port_offset: u16) {
    let (address, port) = (format!("127.0.0.{}", node + 1), HA_PORT + port_offset);
    let mut rules = String::from("table ip wall { chain input { type filter hook input priority 0;\n");
    for (side, end) in [("saddr", "dport"), ("saddr", "sport"), ("daddr", "dport"), ("daddr", "sport")] {
        // Writing to a String cannot fail.
        let _ = writeln!(rules, "ip {side} {address} tcp {end} {port} drop");
    }
    rules.push_str("} }\n");
    run("nft", &["-f", "-"], &rules);
}

/// Takes the wall down.
pub fn heal() {
    run("nft", &["delete", "table", "ip", "wall"], "");
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
