//! Peer links over real sockets on loopback addresses: messages, priorities, refusals, deaths and farewells. Every test
//! has addresses of its own; nothing here decides anything, the events are what is checked.

use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use raft::eraftpb::{Entry, Message, MessageType};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::watch,
};
use tracing::Dispatch;
use twistlock_ha::{
    cluster::{
        ClusterId, Member, Membership, NodeId, Role,
        command::FORMAT_VERSION,
        membership::{Change, Newcomer, Request},
    },
    peer::{
        self, LeaseTerms, LinkSender, Links, LinksConfig, NodeReport, OpenError, PeerEvent, PeerIdentity, Purpose,
        Refusal, RefusalCode, SnapshotCall,
        codec::{Frame, Hello, HelloReply, PROTOCOL_VERSION},
    },
    pki::{Authority, NodeTls},
};

/// The spans of the default configuration.
const TERMS: LeaseTerms = LeaseTerms { lease_ms: 400, promise_ms: 475 };
const CLUSTER: ClusterId = ClusterId(7);
const PATIENCE: Duration = Duration::from_secs(20);
/// Tells a process started by [`spawn_node`] which node to be.
const CHILD: &str = "TWISTLOCK_TEST_PEER";

fn authority(cluster: ClusterId) -> Authority {
    Authority::create(cluster).unwrap()
}

fn certificates(authority: &Authority, node: NodeId) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    authority.save_certificate(dir.path()).unwrap();
    authority.issue_node(node, "test", &[]).unwrap().save_node(dir.path()).unwrap();
    dir
}

/// Listeners of nodes 1.. on 127.77.`net`.`node`, and the membership that says so.
fn members(net: u8, count: u8) -> (Membership, Vec<TcpListener>) {
    let listeners: Vec<_> = (1..=count)
        .map(|id| peer::listen(SocketAddr::new(Ipv4Addr::new(127, 77, net, id).into(), 0)).unwrap())
        .collect();
    let member = |(id, listener): (u64, &TcpListener)| {
        let address = listener.local_addr().unwrap();
        Member::founder(id, &format!("node-{id}"), &address.ip().to_string(), address.port())
    };
    (Membership::founded(CLUSTER, (1..).zip(&listeners).map(member).collect()), listeners)
}

fn address(membership: &Membership, id: NodeId) -> SocketAddr {
    let member = membership.get(id).unwrap();
    SocketAddr::new(member.address.parse().unwrap(), member.port)
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn count(&self, words: &[&str]) -> usize {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
    }

    fn wait_for(&self, words: &[&str], count: usize) {
        let start = Instant::now();
        while self.count(words) < count {
            assert!(
                start.elapsed() < PATIENCE,
                "no {words:?} in:\n{}",
                String::from_utf8_lossy(&self.0.lock().unwrap())
            );
            std::thread::yield_now();
        }
    }
}

enum Do {
    Send(Vec<Message>),
    /// These are the other members now.
    Peers(Vec<NodeId>),
    Report(NodeId, NodeReport),
    /// Writes "mark" to the log.
    Mark,
    /// Does nothing until the other end of the channel is dropped.
    Pause(mpsc::Receiver<()>),
    /// Farewell, then the end.
    Stop,
    /// The end without a farewell.
    Crash,
}

/// What a node knows of the others, how it learns of changes, and where calls for snapshots go. One at a time.
struct Around {
    identity: PeerIdentity,
    members: watch::Sender<Arc<Membership>>,
    snapshots: tokio::sync::mpsc::Receiver<SnapshotCall>,
}

impl Around {
    fn new(me: NodeId, membership: &Membership, bind: Option<IpAddr>, certificates: &Path) -> Self {
        let members = watch::Sender::new(Arc::new(membership.clone()));
        let (snapshot_sender, snapshots) = tokio::sync::mpsc::channel(1);
        let tls = watch::Sender::new(Arc::new(NodeTls::load(certificates).unwrap()));
        let identity = PeerIdentity {
            me,
            version: "1.2.3".to_owned(),
            membership: members.subscribe(),
            bind,
            terms: TERMS,
            tls: tls.subscribe(),
            snapshots: snapshot_sender,
        };
        Self { identity, members, snapshots }
    }
}

/// A node without a brain: the loop's thread and the tokio side.
struct Node {
    me: NodeId,
    events: mpsc::Receiver<(Instant, PeerEvent)>,
    seen: Vec<PeerEvent>,
    orders: mpsc::Sender<Do>,
    wake: LinkSender,
    stop: watch::Sender<bool>,
    log: Log,
    members: watch::Sender<Arc<Membership>>,
    snapshots: tokio::sync::mpsc::Receiver<SnapshotCall>,
    links: Option<JoinHandle<()>>,
    handshakes: Option<JoinHandle<()>>,
}

impl Node {
    fn start(me: NodeId, membership: &Membership, listener: TcpListener, certificates: &Path) -> Self {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_max_level(tracing::Level::DEBUG)
            .with_writer(move || writer.clone())
            .finish();
        let dispatch = Dispatch::new(subscriber);
        let peers = membership.members.iter().map(|member| member.id).filter(|id| *id != me).collect();
        let config = LinksConfig { bulk_bytes: 80 << 20, ..LinksConfig::new(me, peers) };
        let (mut links, wake) = Links::new(config).unwrap();
        let (orders, inbox) = mpsc::channel();
        let (outbox, events) = mpsc::channel();
        let links_dispatch = dispatch.clone();
        let links = std::thread::spawn(move || {
            tracing::dispatcher::with_default(&links_dispatch, || drive(&mut links, &inbox, &outbox));
        });
        let bind = Some(listener.local_addr().unwrap().ip());
        let Around { identity, members, snapshots } = Around::new(me, membership, bind, certificates);
        let (stop, stopped) = watch::channel(false);
        let sender = wake.clone();
        let handshakes = std::thread::spawn(move || {
            tracing::dispatcher::with_default(&dispatch, || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(peer::run(listener, Arc::new(identity), sender, stopped)).unwrap();
            });
        });
        let (links, handshakes) = (Some(links), Some(handshakes));
        Self { me, events, seen: Vec::new(), orders, wake, stop, log, members, snapshots, links, handshakes }
    }

    fn order(&self, order: Do) {
        self.orders.send(order).unwrap();
        self.wake.wake();
    }

    /// Both halves follow a change of the membership.
    fn follow(&self, membership: &Membership) {
        self.know(membership);
        self.members.send_replace(Arc::new(membership.clone()));
    }

    /// The loop alone follows.
    fn know(&self, membership: &Membership) {
        self.order(Do::Peers(membership.members.iter().map(|member| member.id).collect()));
    }

    /// Waits for an event; all events on the way are kept in `seen`.
    fn wait(&mut self, what: &str, wanted: impl Fn(&PeerEvent) -> bool) -> Instant {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let (at, event) = self
                .events
                .recv_timeout(left)
                .unwrap_or_else(|_| panic!("node {}: no {what}, {:?}", self.me, self.seen));
            let found = wanted(&event);
            self.seen.push(event);
            if found {
                return at;
            }
        }
    }

    fn wait_linked(&mut self, peers: &[NodeId]) {
        let linked = |seen: &[PeerEvent]| {
            let up = |id| seen.iter().any(|event| matches!(event, PeerEvent::Up(up) if *up == id));
            let inbound = |id| seen.iter().any(|event| matches!(event, PeerEvent::InboundUp(up) if *up == id));
            peers.iter().all(|id| up(*id) && inbound(*id))
        };
        while !linked(&self.seen) {
            self.wait("link", |_| true);
        }
    }

    fn saw_death(&mut self) -> bool {
        self.seen.extend(self.events.try_iter().map(|(_, event)| event));
        self.seen.iter().any(|event| matches!(event, PeerEvent::Dead(_)))
    }

    fn end(&mut self, how: Do) {
        // The order of a planned stop, and the least favourable one for a crash: the port goes last.
        let planned = matches!(how, Do::Stop);
        let handshakes = self.handshakes.take().unwrap();
        if planned {
            self.stop.send(true).unwrap();
            handshakes.join().unwrap();
            self.order(how);
            self.links.take().unwrap().join().unwrap();
        } else {
            self.order(how);
            self.links.take().unwrap().join().unwrap();
            self.stop.send(true).unwrap();
            handshakes.join().unwrap();
        }
    }
}

fn drive(links: &mut Links, orders: &mpsc::Receiver<Do>, events: &mpsc::Sender<(Instant, PeerEvent)>) {
    let mut batch = Vec::new();
    loop {
        links.poll(Duration::from_secs(1), &mut batch).unwrap();
        for event in batch.drain(..) {
            let _ = events.send((Instant::now(), event));
        }
        for order in orders.try_iter() {
            match order {
                Do::Send(messages) => messages.iter().for_each(|message| assert!(links.send(message))),
                Do::Peers(peers) => links.set_peers(&peers),
                Do::Report(to, report) => assert!(links.send_report(to, &report)),
                Do::Mark => tracing::info!("mark"),
                Do::Pause(until) => assert!(until.recv().is_err()),
                Do::Stop => return links.shutdown(),
                Do::Crash => return,
            }
        }
    }
}

fn message(msg_type: MessageType, from: NodeId, to: NodeId, index: u64) -> Message {
    Message { msg_type, from, to, index, ..Message::default() }
}

fn append(from: NodeId, to: NodeId, index: u64, size: usize) -> Message {
    let entry = Entry { index, data: vec![index as u8; size].into(), ..Entry::default() };
    Message { entries: vec![entry].into(), ..message(MessageType::MsgAppend, from, to, index) }
}

fn cluster(net: u8, count: u8) -> (Membership, Vec<Node>, Vec<TempDir>) {
    let authority = authority(CLUSTER);
    let (membership, listeners) = members(net, count);
    let dirs: Vec<_> = (1..=u64::from(count)).map(|id| certificates(&authority, id)).collect();
    let nodes = (1..).zip(listeners).zip(&dirs);
    let nodes = nodes.map(|((id, listener), dir)| Node::start(id, &membership, listener, dir.path())).collect();
    (membership, nodes, dirs)
}

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
        version: "1.2.3".to_owned(),
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

/// Calls a node as somebody who has the certificate in `dir` and says `hello`.
fn call(dir: &Path, to: SocketAddr, hello: &[u8]) -> HelloReply {
    let tls = NodeTls::load(dir).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(to).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(tls.client);
        let mut stream = connector.connect(NodeTls::peer_name(), stream).await.unwrap();
        stream.write_all(hello).await.unwrap();
        let length = stream.read_u32_le().await.unwrap();
        let mut body = vec![0; length as usize];
        stream.read_exact(&mut body).await.unwrap();
        match Frame::decode(&body).unwrap() {
            Frame::HelloReply(reply) => reply,
            other => panic!("{other:?}"),
        }
    })
}

#[test]
fn wrong_hellos_are_refused_with_a_reason_and_one_line() {
    let authority = authority(CLUSTER);
    let (membership, mut listeners) = members(8, 2);
    let dirs: Vec<_> = (1..=2).map(|id| certificates(&authority, id)).collect();
    drop(listeners.pop());
    let mut node = Node::start(1, &membership, listeners.pop().unwrap(), dirs[0].path());
    let to = address(&membership, 1);
    let good = Hello {
        protocol: PROTOCOL_VERSION,
        cluster: CLUSTER,
        from: 2,
        to: 1,
        data_format: FORMAT_VERSION,
        terms: TERMS,
        purpose: Purpose::Link,
        incarnation: 5,
        version: "1.2.3".to_owned(),
    };
    // The same authority's key, used for another cluster's node and for a node that nobody admitted.
    let home = tempfile::tempdir().unwrap();
    authority.save(home.path()).unwrap();
    let foreign = certificates(&Authority::load(ClusterId(8), home.path()).unwrap(), 2);
    let stranger = certificates(&authority, 9);
    let second = dirs[1].path();
    let cases = [
        (second, Hello { cluster: ClusterId(8), ..good.clone() }, "the caller is of cluster"),
        (second, Hello { protocol: 2, ..good.clone() }, "protocol version 2"),
        (second, Hello { data_format: 9, ..good.clone() }, "data format 9"),
        (second, Hello { terms: LeaseTerms { lease_ms: 426, ..TERMS }, ..good.clone() }, "a lease of 426 ms"),
        (second, Hello { terms: LeaseTerms { promise_ms: 449, ..TERMS }, ..good.clone() }, "a promise of 449 ms"),
        (second, Hello { from: 3, ..good.clone() }, "the caller says that it is node 3"),
        (second, Hello { to: 2, ..good.clone() }, "the caller wants node 2"),
        (foreign.path(), good.clone(), "the certificate is of cluster"),
        (stranger.path(), Hello { from: 9, ..good.clone() }, "node 9 is not another member"),
    ];
    for (dir, hello, reason) in cases {
        for _ in 0..3 {
            let bytes = Frame::Hello(hello.clone()).encode().unwrap();
            match call(dir, to, &bytes) {
                HelloReply::Refused(Refusal { code, reason: said }) => {
                    assert!(said.contains(reason) && code == RefusalCode::Other, "{said}");
                }
                HelloReply::Accepted => panic!("accepted: {hello:?}"),
            }
        }
        node.log.wait_for(&["WARN", reason], 1);
        assert_eq!(node.log.count(&["WARN", reason]), 1, "{reason}");
    }
    assert!(matches!(call(second, to, &[3, 0, 0, 0, 3, 1, 1]), HelloReply::Refused(_)));
    assert_eq!(call(second, to, &Frame::Hello(good).encode().unwrap()), HelloReply::Accepted);
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
    membership.members[2] = Member { id: 3, ..membership.members[1].clone() };
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
    assert_eq!(nodes[0].log.count(&["WARN"]), 1, "one line for all of them");
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
    let Around { identity, .. } = Around::new(1, &membership, None, dir.path());
    let (_stop, stopped) = watch::channel(false);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let result = runtime.block_on(peer::run(listeners.remove(0), Arc::new(identity), sender, stopped));
    assert!(result.unwrap_err().to_string().contains("certificate is of node 2"));
}

/// The membership after a host was admitted: a member without a vote.
fn joined(membership: &Membership, id: NodeId, to: SocketAddr) -> Membership {
    let request = Request {
        id: format!("request-{id}"),
        name: format!("node-{id}"),
        address: to.ip().to_string(),
        port: to.port(),
        version: "1.2.3".to_owned(),
        fingerprint: String::new(),
        csr: String::new(),
        clock_ms: 0,
        at: 1,
        until: 2,
    };
    let newcomer = Newcomer { id, request: request.id.clone(), certificate: String::new() };
    let asked = membership.changed(&Change::Request { request }, 1).unwrap();
    asked.changed(&Change::Admit { hosts: vec![newcomer] }, 1).unwrap()
}

/// Two members, and what a third one needs.
fn two_of_three(net: u8) -> (Membership, Vec<Node>, TcpListener, Vec<TempDir>) {
    let authority = authority(CLUSTER);
    let (mut membership, mut listeners) = members(net, 3);
    let dirs: Vec<_> = (1..=3).map(|id| certificates(&authority, id)).collect();
    let third = listeners.pop().unwrap();
    membership.members.pop();
    membership.next_id = 3;
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
    nodes[1].members.send_replace(Arc::new(all.clone()));
    nodes[1].log.wait_for(&["refused a link", "node 3 is not another member"], 1);
    assert!(nodes.iter_mut().all(|node| node.events.try_recv().is_err()), "no link with half a member");
    nodes[0].members.send_replace(Arc::new(all.clone()));
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

#[test]
fn a_stream_for_a_snapshot_goes_to_who_takes_it() {
    let (membership, mut nodes, listener, dirs) = two_of_three(17);
    let address = listener.local_addr().unwrap();
    let all = joined(&membership, 3, address);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let Around { identity, .. } = Around::new(3, &all, Some(address.ip()), dirs[2].path());
    let primary = all.get(1).unwrap();
    let open = || runtime.block_on(peer::open_stream(&identity, primary, Purpose::Snapshot));
    let refused = |result: Result<_, OpenError>| match result.map(|_: tokio_rustls::client::TlsStream<_>| ()) {
        Err(OpenError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    };
    let stranger = refused(open());
    assert!(stranger.reason.contains("node 3 is not another member") && stranger.code == RefusalCode::Other);
    // Links are not needed for it: the handshakes alone know of the member.
    nodes[0].members.send_replace(Arc::new(all.clone()));
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
        call.stream.write_all(&[7; 100_000]).await.unwrap();
        call.stream.shutdown().await.unwrap();
        let mut whole = Vec::new();
        stream.read_to_end(&mut whole).await.unwrap();
        assert_eq!(whole, vec![7; 100_000]);
    });
    drop(open().unwrap());
    let gone = Change::Remove { node: 3, at: 0, force: false };
    nodes[0].members.send_replace(Arc::new(all.changed(&gone, 1).unwrap()));
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
    let twin = Frame::Hello(Hello {
        protocol: PROTOCOL_VERSION,
        cluster: CLUSTER,
        from: 2,
        to: 1,
        data_format: FORMAT_VERSION,
        terms: TERMS,
        purpose: Purpose::Link,
        incarnation: 5,
        version: "1.2.3".to_owned(),
    });
    let call = || call(dirs[1].path(), address(&membership, 1), &twin.encode().unwrap());
    nodes[0].seen.clear();
    assert_eq!(call(), HelloReply::Accepted, "it may be a restart");
    nodes[1].wait("theft", |event| matches!(event, PeerEvent::Down { peer: 1, .. }));
    nodes[1].wait("return", |event| matches!(event, PeerEvent::Up(1)));
    // The twin hangs up each time, so its call is no theft unless the true one is back.
    nodes[0].wait("twin", |event| matches!(event, PeerEvent::InboundUp(2)));
    nodes[0].wait("return", |event| matches!(event, PeerEvent::InboundUp(2)));
    let start = Instant::now();
    for _ in 0..3 {
        match call() {
            HelloReply::Refused(Refusal { reason, .. }) => assert!(reason.contains("two processes use"), "{reason}"),
            HelloReply::Accepted => panic!("the true one was robbed"),
        }
    }
    nodes[0].wait("alarm", |event| matches!(event, PeerEvent::Twins { peer: 2, gone: false }));
    nodes[0].log.wait_for(&["ERROR", "two processes use the identity of this node"], 1);
    nodes[1].order(Do::Send(vec![message(MessageType::MsgHeartbeat, 2, 1, 5)]));
    nodes[0].wait("heartbeat", |event| matches!(event, PeerEvent::Raft(message) if message.index == 5));
    nodes[0].wait("end of the alarm", |event| matches!(event, PeerEvent::Twins { peer: 2, gone: true }));
    assert!(start.elapsed() > Duration::from_secs(4));
    assert_eq!(nodes[0].log.count(&["ERROR"]), 1);
    nodes.iter_mut().for_each(|node| node.end(Do::Stop));
}
