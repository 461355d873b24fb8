//! Members that are known by a name whose address changes, as those of pods do. The names stand in a file that is
//! /etc/hosts for this test alone.

use std::{fs, net::TcpListener, path::PathBuf, process::Command, thread};

use nix::{
    sched::{CloneFlags, unshare},
    unistd::geteuid,
};
use tempfile::TempDir;
use twistlock_ha::{
    cluster::{Member, Membership},
    peer::{self, PeerEvent},
};

use crate::node::{CLUSTER, Do, Node, authority, certificates};

/// The names of this test, and where they lead.
struct Names(PathBuf);

impl Names {
    fn lead_second_to(&self, address: &str) {
        fs::write(&self.0, format!("127.77.22.1 first.test\n{address} second.test\n")).unwrap();
    }
}

/// Runs the test on a thread that alone sees the names, with all that it starts.
fn with_names(test: fn(&Names)) {
    if !geteuid().is_root() {
        println!("skipped: only root can put a file in the place of /etc/hosts");
        return;
    }
    let enter = move || {
        let folder = tempfile::tempdir().unwrap();
        let names = Names(folder.path().join("hosts"));
        names.lead_second_to("127.77.22.2");
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        for arguments in [["--make-rprivate", "", "/"], ["--bind", names.0.to_str().unwrap(), "/etc/hosts"]] {
            let status = Command::new("mount").args(arguments.iter().filter(|word| !word.is_empty())).status().unwrap();
            assert!(status.success(), "mount {arguments:?}");
        }
        test(&names);
    };
    if let Err(panic) = thread::spawn(enter).join() {
        std::panic::resume_unwind(panic);
    }
}

/// Two members that know each other by their names alone.
fn two() -> (Membership, [Node; 2], Vec<TempDir>) {
    let authority = authority(CLUSTER);
    let listeners = ["127.77.22.1:0", "127.77.22.2:0"].map(|address| peer::listen(address.parse().unwrap()).unwrap());
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let named = [(1, "first.test"), (2, "second.test")].into_iter().zip(&listeners);
    let members = named.map(|((id, name), listener)| Member::founder(id, name, name, port(listener)));
    let membership = Membership::founded(CLUSTER, members.collect());
    let dirs: Vec<_> = (1..=2).map(|id| certificates(&authority, id)).collect();
    let [first, second] = listeners;
    let nodes =
        [Node::start(1, &membership, first, dirs[0].path()), Node::start(2, &membership, second, dirs[1].path())];
    (membership, nodes, dirs)
}

#[test]
fn a_member_is_found_by_its_name_wherever_that_leads() {
    with_names(|names| {
        let (membership, mut nodes, dirs) = two();
        nodes.iter_mut().zip([2, 1]).for_each(|(node, other)| node.wait_linked(&[other]));
        let port = membership.get(2).unwrap().port;
        // Its name leads to the new address at once, or only after the first one has had to find it by itself.
        for (address, at_once) in [("127.77.22.12", true), ("127.77.22.13", false)] {
            nodes[1].end(Do::Crash);
            nodes[0].wait("end", |event| matches!(event, PeerEvent::Down { peer: 2, .. }));
            nodes[0].seen.clear();
            if at_once {
                names.lead_second_to(address);
            }
            let listener = peer::listen(format!("{address}:{port}").parse().unwrap()).unwrap();
            nodes[1] = Node::start(2, &membership, listener, dirs[1].path());
            nodes.iter_mut().zip([2, 1]).for_each(|(node, other)| node.wait_linked(&[other]));
            nodes[0].log.wait_for(&["linked", "peer=2", &format!("{address}:{port}")], 1);
        }
        nodes.iter_mut().for_each(|node| node.end(Do::Stop));
    });
}
