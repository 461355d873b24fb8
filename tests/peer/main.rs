//! Peer links over real sockets on loopback addresses: messages, priorities, refusals, deaths and farewells. Every test
//! has addresses of its own; nothing here decides anything, the events are what is checked.

mod datagrams;
mod membership;
mod names;
mod node;

use std::{
    io::Write,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use raft::eraftpb::MessageType;
use tokio::sync::watch;
use twistlock_ha::{
    cluster::{
        ClusterId, Member, Membership, NodeId, Role, feature_level,
        trust::{Holdings, KeyId},
    },
    peer::{
        self, Condition, LeaseTerms, Links, LinksConfig, NodeReport, PeerEvent, Reached, Refusal, RefusalCode,
        ReportExtension,
        codec::{Frame, Hello, HelloReply},
    },
    pki::Authority,
};

use crate::node::{
    Around, CLUSTER, Do, Node, TERMS, address, append, authority, call, certificates, cluster, hello, members, message,
};

/// Tells a process started by [`spawn_node`] which node to be.
const CHILD: &str = "TWISTLOCK_TEST_PEER";

#[test]
fn three_nodes_exchange_messages_and_reports() {
    let (_, mut nodes, _dirs) = cluster(1, 3);
    for node in &mut nodes {
        let others: Vec<_> = (1..=3).filter(|id| *id != node.me).collect();
        node.wait_linked(&others);
    }
    let report = NodeReport {
        state: Role::Primary,
        epoch: 3,
        applied: 10,
        committed: 11,
        lease_ms: Some(399),
        full: true,
        version: "1.2.3".to_owned(),
        more: Some(ReportExtension {
            level: 7,
            holds: Holdings { key: KeyId(1), trusts: KeyId(2), shows: KeyId(3) },
            free: Some(4),
            disk: Some(Condition::Bad),
            memory: None,
        }),
    };
    for node in &nodes {
        for to in (1..=3).filter(|to| *to != node.me) {
            let sizes = [0, 1, 5000, 3 << 20];
            let messages = (0u64..).zip(sizes).map(|(index, size)| append(node.me, to, index, size)).collect();
            node.order(Do::Send(messages));
            node.order(Do::Report(to, report.clone()));
        }
    }
    for node in &mut nodes {
        let me = node.me;
        for from in (1..=3).filter(|from| *from != me) {
            let got = |event: &PeerEvent| matches!(event, PeerEvent::Raft(got) if *got == append(from, me, 3, 3 << 20));
            if !node.seen.iter().any(got) {
                node.wait("large message", got);
            }
            // In order among themselves, whole and unchanged.
            let all = node.seen.iter().filter_map(|event| match event {
                PeerEvent::Raft(message) if message.from == from => Some(message.index),
                _ => None,
            });
            assert_eq!(all.collect::<Vec<_>>(), [0, 1, 2, 3]);
            let reported =
                |event: &PeerEvent| matches!(event, PeerEvent::Report(id, got) if *id == from && *got == report);
            if !node.seen.iter().any(reported) {
                node.wait("report", reported);
            }
        }
    }
    nodes.iter_mut().for_each(|node| node.end(Do::Stop));
}

#[test]
fn a_heartbeat_overtakes_64_mib_of_bulk() {
    let (_, mut nodes, _dirs) = cluster(2, 2);
    nodes.iter_mut().zip([2, 1]).for_each(|(node, other)| node.wait_linked(&[other]));
    // The receiver rests while everything is queued, so that what comes first is what the kernels had taken.
    let (resume, paused) = mpsc::channel();
    nodes[1].order(Do::Pause(paused));
    let mut messages: Vec<_> = (0..64).map(|index| append(1, 2, index, 1 << 20)).collect();
    messages.push(message(MessageType::MsgHeartbeat, 1, 2, 1000));
    nodes[0].order(Do::Send(messages));
    nodes[0].order(Do::Mark);
    nodes[0].log.wait_for(&["mark"], 1);
    drop(resume);
    let start = Instant::now();
    let is_raft = |event: &PeerEvent, index| matches!(event, PeerEvent::Raft(message) if message.index == index);
    let heartbeat = nodes[1].wait("heartbeat", |event| is_raft(event, 1000));
    let before = nodes[1].seen.iter().filter(|event| matches!(event, PeerEvent::Raft(_))).count() - 1;
    let last = nodes[1].wait("last bulk message", |event| is_raft(event, 63));
    println!("heartbeat after {:?} and {before} MiB, all after {:?}", heartbeat - start, last - start);
    assert!(before <= 16, "{before} MiB came before the heartbeat");
    nodes.iter_mut().for_each(|node| node.end(Do::Stop));
}

#[test]
fn a_farewell_is_not_a_death() {
    let (membership, mut nodes, dirs) = cluster(3, 3);
    nodes[0].wait_linked(&[2, 3]);
    nodes[1].wait_linked(&[1, 3]);
    nodes[1].end(Do::Stop);
    nodes[0].wait("planned end", |event| matches!(event, PeerEvent::Down { peer: 2, clean: true, .. }));
    nodes[0].log.wait_for(&["connection refused"], 1);
    let listener = peer::listen(address(&membership, 2)).unwrap();
    nodes[1] = Node::start(2, &membership, listener, dirs[1].path());
    nodes[0].wait("return", |event| matches!(event, PeerEvent::Up(2)));
    assert!(!nodes[0].saw_death());
    nodes.iter_mut().for_each(|node| node.end(Do::Stop));
}

#[test]
fn a_crashed_node_is_found_dead_once_and_found_again() {
    let (membership, mut nodes, dirs) = cluster(4, 2);
    nodes.iter_mut().zip([2, 1]).for_each(|(node, other)| node.wait_linked(&[other]));
    for _ in 0..2 {
        nodes[0].seen.clear();
        nodes[1].end(Do::Crash);
        nodes[0].wait("death", |event| matches!(event, PeerEvent::Dead(2)));
        let unplanned = |event: &PeerEvent| matches!(event, PeerEvent::Down { peer: 2, clean: false, .. });
        assert!(nodes[0].seen.iter().any(unplanned), "{:?}", nodes[0].seen);
        let listener = peer::listen(address(&membership, 2)).unwrap();
        let back = Instant::now();
        nodes[1] = Node::start(2, &membership, listener, dirs[1].path());
        let up = nodes[0].wait("return", |event| matches!(event, PeerEvent::Up(2)));
        println!("linked again {:?} after its return", up - back);
        nodes[0].wait_linked(&[2]);
        nodes[0].saw_death();
        let deaths = nodes[0].seen.iter().filter(|event| matches!(event, PeerEvent::Dead(_))).count();
        assert_eq!(deaths, 1);
    }
    nodes.iter_mut().for_each(|node| node.end(Do::Stop));
}

#[test]
fn a_port_that_outlives_its_process_delays_the_verdict_only() {
    let authority = authority(CLUSTER);
    let (membership, mut listeners) = members(13, 2);
    let dirs: Vec<_> = (1..=2).map(|id| certificates(&authority, id)).collect();
    // As the port guard does: somebody else has the listening socket too.
    let guard = listeners[1].try_clone().unwrap();
    let mut second = Node::start(2, &membership, listeners.pop().unwrap(), dirs[1].path());
    let mut first = Node::start(1, &membership, listeners.pop().unwrap(), dirs[0].path());
    first.wait_linked(&[2]);
    second.end(Do::Crash);
    first.wait("loss", |event| matches!(event, PeerEvent::Down { clean: false, .. }));
    let mut probes = 0;
    while probes < 3 {
        // The socket is non-blocking, as tokio wants it.
        probes += usize::from(guard.accept().is_ok());
    }
    assert!(!first.saw_death());
    let closed = Instant::now();
    drop(guard);
    let took = first.wait("death", |event| matches!(event, PeerEvent::Dead(2))) - closed;
    println!("found dead {took:?} after the port was closed");
    first.end(Do::Stop);
}

#[test]
fn a_node_whose_port_still_answers_is_not_dead() {
    let (_, mut nodes, _dirs) = cluster(5, 2);
    nodes.iter_mut().zip([2, 1]).for_each(|(node, other)| node.wait_linked(&[other]));
    // The loop of node 2 is gone, its handshakes go on: every new link ends at once.
    nodes[1].order(Do::Crash);
    nodes[1].links.take().unwrap().join().unwrap();
    let start = Instant::now();
    let lost = |event: &PeerEvent| matches!(event, PeerEvent::Down { clean: false, .. });
    for _ in 0..4 {
        nodes[0].wait("loss", lost);
    }
    assert!(!nodes[0].saw_death());
    assert!(start.elapsed() > Duration::from_millis(100), "dials without a pause");
    nodes[1].stop.send(true).unwrap();
    nodes[0].end(Do::Stop);
}

/// Not a test: the process that [`spawn_node`] starts.
#[test]
fn child_node() {
    let Ok(text) = std::env::var(CHILD) else { return };
    let (id, dir, membership): (NodeId, std::path::PathBuf, Membership) = serde_json::from_str(&text).unwrap();
    let listener = peer::listen(address(&membership, id)).unwrap();
    let mut node = Node::start(id, &membership, listener, &dir);
    loop {
        node.wait("end", |_| true);
        node.seen.clear();
    }
}

fn spawn_node(id: NodeId, dir: &Path, membership: &Membership) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_node", "--nocapture"])
        .env(CHILD, serde_json::to_string(&(id, dir, membership)).unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_killed_process_is_found_dead_within_milliseconds() {
    let authority = authority(CLUSTER);
    let (membership, mut listeners) = members(6, 3);
    let dirs: Vec<_> = (1..=3).map(|id| certificates(&authority, id)).collect();
    drop(listeners.pop());
    let nodes = (1..).zip(listeners).zip(&dirs);
    let mut nodes: Vec<_> =
        nodes.map(|((id, listener), dir)| Node::start(id, &membership, listener, dir.path())).collect();
    for round in 0..3 {
        let mut child = spawn_node(3, dirs[2].path(), &membership);
        for node in &mut nodes {
            node.seen.clear();
            node.wait_linked(&[3]);
        }
        // Links that lasted are dialled again at once, young ones only after a pause: both must find the death.
        let linked = Instant::now();
        while round == 0 && linked.elapsed() < Duration::from_millis(1100) {
            nodes[0].order(Do::Send(vec![message(MessageType::MsgHeartbeat, 1, 3, 0)]));
            nodes[0].order(Do::Send(vec![message(MessageType::MsgHeartbeat, 1, 2, 0)]));
            nodes[1].wait("heartbeat", |event| matches!(event, PeerEvent::Raft(_)));
        }
        let start = Instant::now();
        child.kill().unwrap();
        for node in &mut nodes {
            let took = node.wait("death", |event| matches!(event, PeerEvent::Dead(3))) - start;
            println!("node {}: found dead {took:?} after the kill", node.me);
            assert!(took < Duration::from_millis(100), "{took:?}");
        }
        child.wait().unwrap();
    }
    nodes.iter_mut().for_each(|node| node.end(Do::Stop));
}

#[test]
fn another_authority_is_refused_with_one_line_on_each_side() {
    let (membership, mut listeners) = members(7, 2);
    let (ours, theirs) = (certificates(&authority(CLUSTER), 1), certificates(&authority(CLUSTER), 2));
    let mut second = Node::start(2, &membership, listeners.pop().unwrap(), theirs.path());
    let mut first = Node::start(1, &membership, listeners.pop().unwrap(), ours.path());
    for node in [&first, &second] {
        node.log.wait_for(&["still no link"], 3);
        assert_eq!(node.log.count(&["WARN", "cannot link", "not signed by this cluster's authority"]), 1);
        assert_eq!(node.log.count(&["WARN", "refused a connection"]), 1);
        assert_eq!(node.log.count(&["WARN"]), 2);
    }
    for node in [&mut first, &mut second] {
        assert!(node.events.try_recv().is_err());
        node.end(Do::Stop);
    }
}

#[test]
fn wrong_hellos_are_refused_with_a_reason_and_one_line() {
    let authority = authority(CLUSTER);
    let (membership, mut listeners) = members(8, 2);
    let dirs: Vec<_> = (1..=2).map(|id| certificates(&authority, id)).collect();
    drop(listeners.pop());
    let mut node = Node::start(1, &membership, listeners.pop().unwrap(), dirs[0].path());
    let to = address(&membership, 1);
    let good = hello();
    // The same authority's key, used for another cluster's node and for a node that nobody admitted.
    let home = tempfile::tempdir().unwrap();
    authority.save(home.path()).unwrap();
    let foreign = certificates(&Authority::load(ClusterId(8), home.path()).unwrap(), 2);
    let stranger = certificates(&authority, 9);
    let second = dirs[1].path();
    let reached = |address: &str, port| {
        let reached = Some(Reached { address: address.to_owned(), port, index: 9 });
        Hello { reached, ..good.clone() }
    };
    let older = format!("which has feature level 1, but the cluster runs level {}", feature_level());
    let cases = [
        (second, Hello { cluster: ClusterId(8), ..good.clone() }, "the caller is of cluster"),
        (second, Hello { protocol: 2, ..good.clone() }, "protocol version 2"),
        (second, Hello { data_format: 9, ..good.clone() }, "data format 9"),
        (second, Hello { terms: LeaseTerms { lease_ms: 426, ..TERMS }, ..good.clone() }, "a lease of 426 ms"),
        (second, Hello { terms: LeaseTerms { promise_ms: 449, ..TERMS }, ..good.clone() }, "a promise of 449 ms"),
        (second, Hello { from: 3, ..good.clone() }, "the caller says that it is node 3"),
        (second, Hello { to: 2, ..good.clone() }, "the caller wants node 2"),
        (second, reached("a b", 1), "is neither a host name nor an IP address"),
        (second, reached("192.0.2.2", 0), "the caller says where it is reached, but port 0"),
        (second, Hello { level: None, ..good.clone() }, &older),
        (second, Hello { level: Some(1), ..good.clone() }, "runs version 1.2.3, which has feature level 1"),
        (foreign.path(), good.clone(), "the certificate is of cluster"),
        (stranger.path(), Hello { from: 9, ..good.clone() }, "node 9 is not another member"),
    ];
    for (dir, hello, reason) in cases {
        for _ in 0..3 {
            let bytes = Frame::Hello(hello.clone()).encode().unwrap();
            let outdated = hello.feature_level() < feature_level();
            let expected = if outdated { RefusalCode::Outdated } else { RefusalCode::Other };
            match call(dir, to, &bytes) {
                HelloReply::Refused(Refusal { code, reason: said }) => {
                    assert!(said.contains(reason) && code == expected, "{said}");
                }
                HelloReply::Accepted { .. } => panic!("accepted: {hello:?}"),
            }
        }
        node.log.wait_for(&["WARN", reason], 1);
        assert_eq!(node.log.count(&["WARN", reason]), 1, "{reason}");
    }
    assert!(matches!(call(second, to, &[3, 0, 0, 0, 3, 1, 1]), HelloReply::Refused(_)));
    assert_eq!(
        call(second, to, &Frame::Hello(good).encode().unwrap()),
        HelloReply::Accepted { level: Some(feature_level()), datagrams: false }
    );
    node.wait("good caller", |event| matches!(event, PeerEvent::InboundUp(2)));
    node.end(Do::Stop);
}

#[test]
fn a_member_address_that_leads_to_another_node_is_noticed() {
    let authority = authority(CLUSTER);
    let (mut membership, mut listeners) = members(9, 3);
    let dirs: Vec<_> = (1..=3).map(|id| certificates(&authority, id)).collect();
    let mut second = Node::start(2, &membership, listeners.remove(1), dirs[1].path());
    // Node 1 believes that node 3 is where node 2 is.
    membership.roster.members[2] = Member { id: 3, ..membership.roster.members[1].clone() };
    let mut first = Node::start(1, &membership, listeners.remove(0), dirs[0].path());
    first.log.wait_for(&["still no link", "certificate there is of node 2, expected is node 3"], 2);
    assert_eq!(first.log.count(&["WARN", "certificate there is of node 2"]), 1);
    first.wait_linked(&[2]);
    first.end(Do::Stop);
    second.end(Do::Stop);
}

#[test]
fn strangers_and_probes_do_not_disturb() {
    let (membership, mut nodes, _dirs) = cluster(10, 2);
    nodes[0].wait_linked(&[2]);
    let to = address(&membership, 1);
    let mut open = Vec::new();
    for number in 0..40u8 {
        let mut stream = std::net::TcpStream::connect(to).unwrap();
        if number % 2 == 0 {
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        }
        if number % 4 < 3 {
            drop(stream);
        } else {
            open.push(stream);
        }
    }
    nodes[0].log.wait_for(&["WARN", "refused a connection"], 1);
    nodes[1].order(Do::Send(vec![message(MessageType::MsgHeartbeat, 2, 1, 5)]));
    nodes[0].wait("heartbeat", |event| matches!(event, PeerEvent::Raft(message) if message.index == 5));
    assert_eq!(nodes[0].log.count(&["WARN", "refused a connection"]), 1, "one line for all of them");
    // And one at most that says how many they are.
    assert!(nodes[0].log.count(&["WARN"]) <= 2);
    nodes.iter_mut().for_each(|node| node.end(Do::Stop));
}

#[test]
fn a_round_trip_takes_microseconds() {
    let (_, mut nodes, _dirs) = cluster(11, 2);
    nodes.iter_mut().zip([2, 1]).for_each(|(node, other)| node.wait_linked(&[other]));
    let mut times = Vec::new();
    for index in 1..=500 {
        let start = Instant::now();
        nodes[0].order(Do::Send(vec![append(1, 2, index, 4096)]));
        nodes[1].wait("entry", |event| matches!(event, PeerEvent::Raft(message) if message.index == index));
        nodes[1].order(Do::Send(vec![message(MessageType::MsgAppendResponse, 2, 1, index)]));
        nodes[0].wait("answer", |event| matches!(event, PeerEvent::Raft(message) if message.index == index));
        times.push(start.elapsed());
    }
    times.sort();
    println!("append and answer, with four thread hops of the test: median {:?}, p99 {:?}", times[250], times[495]);
    assert!(times[250] < Duration::from_millis(20), "{:?}", times[250]);
    nodes.iter_mut().for_each(|node| node.end(Do::Stop));
}

#[test]
fn a_certificate_of_another_node_is_refused_at_the_start() {
    let authority = authority(CLUSTER);
    let (membership, mut listeners) = members(12, 2);
    let dir = certificates(&authority, 2);
    let (_links, sender) = Links::new(LinksConfig::new(1, vec![2])).unwrap();
    let Around { identity, .. } = Around::new(1, node::first(&membership), None, dir.path());
    let (_stop, stopped) = watch::channel(false);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let result = runtime.block_on(peer::run(listeners.remove(0), Arc::new(identity), sender, stopped));
    assert!(result.unwrap_err().to_string().contains("certificate is of node 2"));
}
