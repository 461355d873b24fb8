//! Links that follow a changing membership: newcomers, removed members, moves, snapshots and copied identities.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::{Duration, Instant},
};

use raft::eraftpb::MessageType;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use twistlock_ha::{
    cluster::{
        Member, Membership, NodeId, feature_level,
        membership::{Change, Newcomer},
        reach::{Claim, Standing},
        shared::Request,
    },
    peer::{
        self, Edition, OpenError, PeerEvent, Purpose, Refusal, RefusalCode,
        codec::{Frame, Hello, HelloReply},
    },
    pki::{Authority, NodeTls},
};

use crate::node::{
    Around, CLUSTER, Do, Node, address, append, authority, call, certificates, cluster, first, hello, members, message,
};

/// The membership after a host was admitted: a member without a vote.
fn joined(membership: &Membership, id: NodeId, to: SocketAddr) -> Membership {
    let request = Request {
        id: format!("request-{id}"),
        name: format!("node-{id}"),
        address: to.ip().to_string(),
        port: to.port(),
        version: "1.2.3".to_owned(),
        level: 1,
        fingerprint: String::new(),
        csr: String::new(),
        console_csr: String::new(),
        console_names: Vec::new(),
        clock_ms: 0,
        at: 1,
        until: 2,
    };
    let newcomer =
        Newcomer { id, request: request.id.clone(), certificate: String::new(), console_certificate: String::new() };
    let asked = membership.changed(&Change::Request { request }, 1).unwrap();
    asked.changed(&Change::Admit { hosts: vec![newcomer] }, 1).unwrap()
}

/// Two members, and what a third one needs.
fn two_of_three(net: u8) -> (Membership, Vec<Node>, TcpListener, Vec<TempDir>) {
    let authority = authority(CLUSTER);
    let (mut membership, mut listeners) = members(net, 3);
    let dirs: Vec<_> = (1..=3).map(|id| certificates(&authority, id)).collect();
    let third = listeners.pop().unwrap();
    membership.roster.members.pop();
    membership.roster.next_id = 3;
    let nodes = (1..).zip(listeners).zip(&dirs);
    let mut nodes: Vec<_> =
        nodes.map(|((id, listener), dir)| Node::start(id, &membership, listener, dir.path())).collect();
    nodes.iter_mut().zip([2, 1]).for_each(|(node, other)| node.wait_linked(&[other]));
    (membership, nodes, third, dirs)
}

#[test]
fn a_member_that_is_added_later_is_linked_both_ways() {
    let (membership, mut nodes, listener, dirs) = two_of_three(14);
    let all = joined(&membership, 3, listener.local_addr().unwrap());
    assert!(!all.get(3).unwrap().voter);
    // The newcomer knows first and is turned away; then one loop knows and then its handshakes, and the other way round.
    let mut third = Node::start(3, &all, listener, dirs[2].path());
    third.log.wait_for(&["WARN", "node 3 is not another member of this cluster (yet)"], 2);
    nodes[0].know(&all);
    nodes[1].dial(&all);
    nodes[1].log.wait_for(&["refused a link", "node 3 is not another member"], 1);
    assert!(nodes.iter_mut().all(|node| node.events.try_recv().is_err()), "no link with half a member");
    nodes[0].dial(&all);
    nodes[1].know(&all);
    let start = Instant::now();
    third.wait_linked(&[1, 2]);
    println!("linked {:?} after all knew", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    for node in &mut nodes {
        node.wait_linked(&[3]);
        node.order(Do::Send(vec![append(node.me, 3, 5, 100)]));
        third.order(Do::Send(vec![message(MessageType::MsgAppendResponse, 3, node.me, 5)]));
        node.wait("answer", |event| matches!(event, PeerEvent::Raft(message) if message.from == 3));
        assert!(!node.seen.iter().any(|event| matches!(event, PeerEvent::Down { .. } | PeerEvent::InboundDown { .. })));
    }
    for from in [1, 2] {
        let got = |event: &PeerEvent| matches!(event, PeerEvent::Raft(message) if message.from == from);
        if !third.seen.iter().any(got) {
            third.wait("entry", got);
        }
    }
    nodes.iter_mut().chain([&mut third]).for_each(|node| node.end(Do::Stop));
}

/// Its data folder is of a time when it was alone: it would elect itself while the others serve.
#[test]
fn the_only_voter_learns_from_members_that_it_does_not_know_that_it_forgot() {
    let authority = authority(CLUSTER);
    let (mut membership, mut listeners) = members(19, 1);
    membership.roster.next_id = 2;
    let dirs = [1, 2].map(|id| certificates(&authority, id));
    let standing = |term, last| Standing::Whole(Claim { term, vote: 1, last });
    let listener = listeners.pop().unwrap();
    let mut node = Node::start_as(1, standing(2, 50), first(&membership), listener, dirs[0].path(), None);
    let forgot =
        |event: &PeerEvent| matches!(event, PeerEvent::Forgot { by: 2, reason } if reason.contains("older copy"));
    let to = address(&membership, 1);
    // One that waits to be admitted proves nothing.
    for standing in [Standing::Unsaid, Standing::Forgotten, standing(2, 50), standing(0, 0)] {
        let told = Frame::Hello(Hello { standing, ..hello() }).encode().unwrap();
        assert!(matches!(call(dirs[1].path(), to, &told), HelloReply::Refused(_)));
    }
    node.order(Do::Mark);
    node.log.wait_for(&["mark"], 1);
    assert!(!node.events.try_iter().any(|(_, event)| forgot(&event)));
    let told = Frame::Hello(Hello { standing: standing(9, 40), ..hello() }).encode().unwrap();
    let reply = call(dirs[1].path(), to, &told);
    assert!(matches!(&reply, HelloReply::Refused(Refusal { code: RefusalCode::Other, .. })), "{reply:?}");
    node.wait("a word of what it forgot", forgot);
    node.end(Do::Stop);
}

#[test]
fn a_removed_member_is_cut_and_told_why() {
    let (mut membership, mut nodes, _dirs) = cluster(15, 3);
    (1..)
        .zip(&mut nodes)
        .for_each(|(me, node)| node.wait_linked(&[1, 2, 3].map(|id| if id == me { me % 3 + 1 } else { id })));
    let whole = membership.clone();
    membership = membership.changed(&Change::Remove { node: 2, at: 1_767_225_600, force: false }, 1).unwrap();
    for node in [0, 2] {
        nodes[node].follow(&membership);
        nodes[node].seen.clear();
    }
    let removed =
        "node 2 (node-2) was removed from the cluster at 2026-01-01T00:00:00Z; run the join script to come back";
    for by in [1, 3] {
        let told = |event: &PeerEvent| matches!(event, PeerEvent::Removed { by: from, reason } if *from == by && *reason == removed);
        if !nodes[1].seen.iter().any(told) {
            nodes[1].wait("refusal", told);
        }
        let lost = |event: &PeerEvent| matches!(event, PeerEvent::Down { peer, clean: true, .. } if *peer == by);
        assert!(nodes[1].seen.iter().any(lost), "{:?}", nodes[1].seen);
    }
    assert!(!nodes[1].saw_death());
    // Its place is not given to another one, and a second change finds it again as new.
    for node in [0, 2] {
        nodes[node].follow(&membership);
        nodes[node].follow(&whole);
        nodes[node].wait_linked(&[2]);
    }
    nodes[1].wait("return", |event| matches!(event, PeerEvent::Up(_)));
    let told = nodes[1].seen.iter().filter(|event| matches!(event, PeerEvent::Removed { .. })).count();
    assert_eq!(told, 2, "once by each");
    for (from, to) in [(0, 2), (2, 0)] {
        let id = nodes[to].me;
        let heartbeat = message(MessageType::MsgHeartbeat, nodes[from].me, id, 77);
        nodes[from].order(Do::Send(vec![heartbeat]));
        nodes[to].wait("heartbeat", |event| matches!(event, PeerEvent::Raft(message) if message.index == 77));
    }
    nodes.iter_mut().for_each(|node| node.end(Do::Stop));
}

#[test]
fn a_change_of_address_is_followed() {
    let (membership, mut nodes, dirs) = cluster(16, 2);
    nodes.iter_mut().zip([2, 1]).for_each(|(node, other)| node.wait_linked(&[other]));
    // Announced before the node moves: what is linked stays linked.
    let listener = peer::listen("127.77.16.9:0".parse().unwrap()).unwrap();
    let to = listener.local_addr().unwrap();
    let (name, address, port) = ("moved".to_owned(), to.ip().to_string(), to.port());
    let moved = membership.changed(&Change::Readdress { node: 2, name, address, port }, 1).unwrap();
    nodes[0].seen.clear();
    nodes[0].follow(&moved);
    nodes[0].order(Do::Send(vec![message(MessageType::MsgHeartbeat, 1, 2, 5)]));
    nodes[1].wait("heartbeat", |event| matches!(event, PeerEvent::Raft(message) if message.index == 5));
    nodes[1].end(Do::Stop);
    nodes[0].wait("end", |event| matches!(event, PeerEvent::Down { peer: 2, .. }));
    nodes[1] = Node::start(2, &moved, listener, dirs[1].path());
    nodes[0].seen.clear();
    nodes[0].wait_linked(&[2]);
    nodes[0].log.wait_for(&["linked", "name=\"moved\"", &to.to_string()], 1);
    nodes.iter_mut().for_each(|node| node.end(Do::Stop));
}

/// Two members, of which the first one has moved: it, with the membership that says so, and the second one, which was away
/// at that time and still looks for it where it was.
fn moved_and_behind(net: u8) -> (Membership, [Node; 2], Vec<TempDir>) {
    let authority = authority(CLUSTER);
    let (membership, mut listeners) = members(net, 2);
    let dirs: Vec<_> = (1..=2).map(|id| certificates(&authority, id)).collect();
    let stays = listeners.pop().unwrap();
    drop(listeners); // nobody listens at the old address of the first one
    let listener = peer::listen(SocketAddr::new([127, 77, net, 9].into(), 0)).unwrap();
    let to = listener.local_addr().unwrap();
    let change = Change::Readdress { node: 1, name: "moved".into(), address: to.ip().to_string(), port: to.port() };
    let moved = membership.changed(&change, 1).unwrap();
    let second = Node::start(2, &membership, stays, dirs[1].path());
    second.log.wait_for(&["peer=1", "cannot reach this node"], 1);
    let edition = Edition { index: 5, membership: Arc::new(moved.clone()) };
    let first = Node::start_with(1, edition, listener, dirs[0].path());
    (moved, [first, second], dirs)
}

#[test]
fn a_node_that_missed_a_change_of_address_is_linked_with_the_moved_member_both_ways() {
    let (moved, mut nodes, dirs) = moved_and_behind(20);
    nodes.iter_mut().zip([2, 1]).for_each(|(node, other)| node.wait_linked(&[other]));
    nodes[1].log.wait_for(&["linked", "peer=1", &address(&moved, 1).to_string()], 1);
    assert_eq!(nodes[1].log.count(&["says that it is at another address"]), 1);
    // As raft brings a node up to date: the entry that it lacks, and its answer.
    nodes[0].order(Do::Send(vec![append(1, 2, 5, 100)]));
    nodes[1].wait("entry", |event| matches!(event, PeerEvent::Raft(message) if message.index == 5));
    nodes[1].order(Do::Send(vec![message(MessageType::MsgAppendResponse, 2, 1, 5)]));
    nodes[0].wait("answer", |event| matches!(event, PeerEvent::Raft(message) if message.index == 5));
    // It has caught up, and so its own membership counts again, which has learnt of one more move.
    nodes[0].end(Do::Stop);
    nodes[1].wait("end", |event| matches!(event, PeerEvent::Down { peer: 1, .. }));
    nodes[1].seen.clear();
    let listener = peer::listen("127.77.20.8:0".parse().unwrap()).unwrap();
    let to = listener.local_addr().unwrap();
    let change = Change::Readdress { node: 1, name: "again".into(), address: to.ip().to_string(), port: to.port() };
    let again = Arc::new(moved.changed(&change, 1).unwrap());
    nodes[1].editions.send_replace(Edition { index: 6, membership: again });
    nodes[0] = Node::start_with(1, Edition { index: 5, membership: Arc::new(moved) }, listener, dirs[0].path());
    nodes[1].wait_linked(&[1]);
    nodes[1].log.wait_for(&["linked", "name=\"again\"", &to.to_string()], 1);
    nodes.iter_mut().for_each(|node| node.end(Do::Stop));
}

#[test]
fn new_certificates_are_used_from_the_next_handshake_on() {
    let authority = authority(CLUSTER);
    let (membership, mut listeners) = members(19, 2);
    let stale = Authority::create(CLUSTER).unwrap();
    let (first, second, wrong) = (certificates(&authority, 1), certificates(&authority, 2), certificates(&stale, 2));
    let mut second_node = Node::start(2, &membership, listeners.pop().unwrap(), wrong.path());
    let mut first_node = Node::start(1, &membership, listeners.pop().unwrap(), first.path());
    first_node.log.wait_for(&["cannot link", "not signed by this cluster's authority"], 1);
    second_node.log.wait_for(&["refused a connection"], 1);
    second_node.tls.send_replace(Arc::new(NodeTls::load(second.path()).unwrap()));
    first_node.wait_linked(&[2]);
    second_node.wait_linked(&[1]);
    // What is linked stays linked.
    second_node.tls.send_replace(Arc::new(NodeTls::load(wrong.path()).unwrap()));
    second_node.order(Do::Send(vec![message(MessageType::MsgHeartbeat, 2, 1, 5)]));
    first_node.wait("heartbeat", |event| matches!(event, PeerEvent::Raft(message) if message.index == 5));
    first_node.end(Do::Stop);
    second_node.end(Do::Stop);
}

#[test]
fn a_stream_for_a_snapshot_goes_to_who_takes_it() {
    let (membership, mut nodes, listener, dirs) = two_of_three(17);
    let address = listener.local_addr().unwrap();
    let all = joined(&membership, 3, address);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let Around { identity, .. } = Around::new(3, first(&all), Some(address.ip()), dirs[2].path());
    let primary = all.get(1).unwrap();
    let open = || runtime.block_on(peer::open_stream(&identity, primary, Purpose::Snapshot));
    let refused = |result: Result<_, OpenError>| match result.map(|_: tokio_rustls::client::TlsStream<_>| ()) {
        Err(OpenError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    };
    let stranger = refused(open());
    assert!(stranger.reason.contains("node 3 is not another member") && stranger.code == RefusalCode::Other);
    // Links are not needed for it: the handshakes alone know of the member.
    nodes[0].dial(&all);
    let mut stream = open().unwrap();
    let busy = refused(open());
    assert_eq!((busy.code, busy.reason.contains("try again")), (RefusalCode::Busy, true), "{busy}");
    assert_eq!(nodes[0].log.count(&["WARN", "no more snapshots"]), 0, "it is no fault");
    runtime.block_on(async {
        let mut call = nodes[0].snapshots.recv().await.unwrap();
        assert_eq!(call.from, 3);
        stream.write_all(b"which?").await.unwrap();
        let mut heard = [0; 6];
        call.stream.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"which?");
        call.stream.write_all(&vec![7; 100_000]).await.unwrap();
        call.stream.shutdown().await.unwrap();
        let mut whole = Vec::new();
        stream.read_to_end(&mut whole).await.unwrap();
        assert_eq!(whole, vec![7; 100_000]);
    });
    drop(open().unwrap());
    let gone = Change::Remove { node: 3, at: 0, force: false };
    nodes[0].dial(&all.changed(&gone, 1).unwrap());
    let removed = refused(open());
    assert!(removed.code == RefusalCode::Removed && removed.reason.contains("removed from the cluster"), "{removed}");
    let nobody = Member { port: 1, ..primary.clone() };
    let nobody = runtime.block_on(peer::open_stream(&identity, &nobody, Purpose::Snapshot));
    assert!(matches!(nobody, Err(OpenError::Unreachable(reason)) if reason.contains("nobody listens")));
    nodes.iter_mut().for_each(|node| node.end(Do::Stop));
}

#[test]
fn two_processes_with_one_identity_are_noticed_and_the_second_is_refused() {
    let (membership, mut nodes, dirs) = cluster(18, 2);
    nodes.iter_mut().zip([2, 1]).for_each(|(node, other)| node.wait_linked(&[other]));
    let twin = Frame::Hello(hello());
    let call = || call(dirs[1].path(), address(&membership, 1), &twin.encode().unwrap());
    nodes[0].seen.clear();
    assert_eq!(call(), HelloReply::Accepted { level: Some(feature_level()), datagrams: false }, "it may be a restart");
    nodes[1].wait("theft", |event| matches!(event, PeerEvent::Down { peer: 1, .. }));
    nodes[1].wait("return", |event| matches!(event, PeerEvent::Up(1)));
    // The twin hangs up each time, so its call is no theft unless the true one is back.
    nodes[0].wait("twin", |event| matches!(event, PeerEvent::InboundUp(2)));
    nodes[0].wait("return", |event| matches!(event, PeerEvent::InboundUp(2)));
    let start = Instant::now();
    for _ in 0..3 {
        match call() {
            HelloReply::Refused(Refusal { reason, .. }) => assert!(reason.contains("two processes use"), "{reason}"),
            HelloReply::Accepted { .. } => panic!("the true one was robbed"),
        }
    }
    nodes[0].wait("alarm", |event| matches!(event, PeerEvent::DuplicateIdentity { peer: 2, gone: false }));
    nodes[0].log.wait_for(&["ERROR", "two processes use the identity of this node"], 1);
    nodes[1].order(Do::Send(vec![message(MessageType::MsgHeartbeat, 2, 1, 5)]));
    nodes[0].wait("heartbeat", |event| matches!(event, PeerEvent::Raft(message) if message.index == 5));
    nodes[0].wait("end of the alarm", |event| matches!(event, PeerEvent::DuplicateIdentity { peer: 2, gone: true }));
    assert!(start.elapsed() > Duration::from_secs(4));
    assert_eq!(nodes[0].log.count(&["ERROR"]), 1);
    nodes.iter_mut().for_each(|node| node.end(Do::Stop));
}
