//! Datagrams beside the links: what they take off them, what strangers get for theirs, and members without any.

use std::{
    collections::BTreeMap,
    net::UdpSocket,
    thread,
    time::{Duration, Instant},
};

use raft::eraftpb::MessageType;
use tempfile::TempDir;
use twistlock_ha::peer::{self, PeerEvent};

use super::node::{CLUSTER, Do, Node, address, authority, certificates, first, members, message};

/// Heartbeats that each of the two sends.
const ROUNDS: u64 = 200;

/// Two nodes that are linked, the second one with or without datagrams.
fn two(net: u8, second_has_them: bool) -> ([Node; 2], Vec<std::net::SocketAddr>, Vec<TempDir>) {
    let authority = authority(CLUSTER);
    let (membership, listeners) = members(net, 2);
    let dirs: Vec<_> = (1..=2).map(|id| certificates(&authority, id)).collect();
    let mut nodes = (1..).zip(listeners).map(|(id, listener)| {
        let socket = (id == 1 || second_has_them).then(|| peer::listen_for_datagrams(listener.local_addr().unwrap()));
        let socket = socket.map(|socket| socket.expect("the number is free for datagrams, too"));
        Node::start_beside(id, first(&membership), listener, dirs[id as usize - 1].path(), socket)
    });
    let mut nodes = [nodes.next().unwrap(), nodes.next().unwrap()];
    nodes[0].wait_linked(&[2]);
    nodes[1].wait_linked(&[1]);
    (nodes, vec![address(&membership, 1), address(&membership, 2)], dirs)
}

/// Both send a heartbeat every 5 ms.
fn pace_rounds(nodes: &[Node; 2]) {
    let begin = Instant::now();
    for round in 1..=ROUNDS {
        nodes[0].order(Do::Send(vec![message(MessageType::MsgHeartbeat, 1, 2, round)]));
        nodes[1].order(Do::Send(vec![message(MessageType::MsgHeartbeat, 2, 1, round)]));
        thread::sleep((begin + Duration::from_millis(5) * round as u32).saturating_duration_since(Instant::now()));
    }
}

/// How often each heartbeat came, once the last has come.
fn wait_rounds(node: &mut Node) -> BTreeMap<u64, usize> {
    // What comes in the end goes by the link only, and is behind everything else there.
    node.wait(
        "the last message",
        |event| matches!(event, PeerEvent::Raft(message) if message.msg_type == MessageType::MsgAppend),
    );
    let mut came = BTreeMap::new();
    for event in &node.seen {
        if let PeerEvent::Raft(message) = event
            && message.msg_type == MessageType::MsgHeartbeat
        {
            *came.entry(message.index).or_default() += 1;
        }
    }
    came
}

fn exchange(nodes: &mut [Node; 2]) -> [BTreeMap<u64, usize>; 2] {
    pace_rounds(nodes);
    nodes[0].order(Do::Send(vec![message(MessageType::MsgAppend, 1, 2, 0)]));
    nodes[1].order(Do::Send(vec![message(MessageType::MsgAppend, 2, 1, 0)]));
    nodes.each_mut().map(wait_rounds)
}

#[test]
fn heartbeats_go_by_datagram_and_few_by_the_link_as_well() {
    let (mut nodes, _, _dirs) = two(40, true);
    for came in exchange(&mut nodes) {
        let all: usize = came.values().sum();
        println!("{ROUNDS} heartbeats came {all} times");
        assert_eq!(came.len() as u64, ROUNDS, "none is lost: {came:?}");
        // The first ones go both ways, and then one in 100 ms.
        assert!(all > ROUNDS as usize && all < ROUNDS as usize * 9 / 5, "{all}");
    }
}

#[test]
fn a_member_without_datagrams_is_sent_none() {
    let (mut nodes, _, _dirs) = two(41, false);
    for came in exchange(&mut nodes) {
        assert!(came.len() as u64 == ROUNDS && came.values().all(|times| *times == 1), "{came:?}");
    }
}

/// Strangers get no answer, cannot say anything, and cost no heartbeat.
#[test]
fn datagrams_of_strangers_cost_nothing() {
    let (mut nodes, addresses, _dirs) = two(42, true);
    let stranger = UdpSocket::bind("127.77.42.9:0").unwrap();
    stranger.set_nonblocking(true).unwrap();
    for number in 0..20_000u32 {
        let length = number as usize % 1400;
        // The kernel may have no room for it.
        let _ = stranger.send_to(&vec![number as u8; length], addresses[number as usize % 2]);
    }
    for came in exchange(&mut nodes) {
        assert_eq!(came.len() as u64, ROUNDS, "none is lost: {came:?}");
    }
    assert!(stranger.recv(&mut [0; 2000]).is_err(), "a stranger was answered");
}

/// A process that begins again has sessions of its own, on the same number.
#[test]
fn datagrams_come_back_with_the_links() {
    let (mut nodes, addresses, dirs) = two(43, true);
    exchange(&mut nodes);
    nodes[1].end(Do::Crash);
    nodes[0].wait("the loss of the link", |event| matches!(event, PeerEvent::Down { .. }));
    let listener = peer::listen(addresses[1]).unwrap();
    let socket = peer::listen_for_datagrams(addresses[1]).unwrap();
    let edition = nodes[1].editions.borrow().clone();
    nodes[1] = Node::start_beside(2, edition, listener, dirs[1].path(), Some(socket));
    nodes[0].seen.clear();
    nodes[0].wait_linked(&[2]);
    nodes[1].wait_linked(&[1]);
    for came in exchange(&mut nodes) {
        let all: usize = came.values().sum();
        assert!(came.len() as u64 == ROUNDS && all > ROUNDS as usize && all < ROUNDS as usize * 9 / 5, "{came:?}");
    }
}
