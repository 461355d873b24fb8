//! A node without a brain, for the tests beside it: links and handshakes, orders in, events out.

use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::Path,
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
    cluster::{ClusterId, Member, Membership, NodeId, feature_level, level::FORMAT_VERSION, reach::Standing},
    peer::{
        self, Edition, LeaseTerms, LinkSender, Links, LinksConfig, Memory, NodeReport, PeerEvent, PeerIdentity,
        Purpose, Roster, StreamCall,
        codec::{Frame, Hello, HelloReply, PROTOCOL_VERSION},
    },
    pki::{Authority, NodeTls},
};

/// The spans of the default configuration.
pub const TERMS: LeaseTerms = LeaseTerms { lease_ms: 400, promise_ms: 475 };
pub const CLUSTER: ClusterId = ClusterId(7);
const PATIENCE: Duration = Duration::from_secs(20);
pub fn authority(cluster: ClusterId) -> Authority {
    Authority::create(cluster).unwrap()
}

pub fn certificates(authority: &Authority, node: NodeId) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    authority.save_certificate(dir.path()).unwrap();
    authority.issue_node(node, "test", &[]).unwrap().save_node(dir.path()).unwrap();
    dir
}

/// Listeners of nodes 1.. on 127.77.`net`.`node`, and the membership that says so.
pub fn members(net: u8, count: u8) -> (Membership, Vec<TcpListener>) {
    let listeners: Vec<_> = (1..=count)
        .map(|id| peer::listen(SocketAddr::new(Ipv4Addr::new(127, 77, net, id).into(), 0)).unwrap())
        .collect();
    let member = |(id, listener): (u64, &TcpListener)| {
        let address = listener.local_addr().unwrap();
        Member::founder(id, &format!("node-{id}"), &address.ip().to_string(), address.port())
    };
    (Membership::founded(CLUSTER, (1..).zip(&listeners).map(member).collect()), listeners)
}

pub fn address(membership: &Membership, id: NodeId) -> SocketAddr {
    let member = membership.get(id).unwrap();
    SocketAddr::new(member.address.parse().unwrap(), member.port)
}

#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

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
    pub fn count(&self, words: &[&str]) -> usize {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
    }

    pub fn wait_for(&self, words: &[&str], count: usize) {
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

pub enum Do {
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

/// The membership that a cluster begins with.
pub fn first(membership: &Membership) -> Edition {
    Edition { index: 1, membership: Arc::new(membership.clone()) }
}

/// What a node knows of the others, how it learns of changes, and where calls for snapshots go. One at a time.
pub struct Around {
    pub identity: PeerIdentity,
    pub editions: watch::Sender<Edition>,
    pub snapshots: tokio::sync::mpsc::Receiver<StreamCall>,
    pub tls: watch::Sender<Arc<NodeTls>>,
}

impl Around {
    pub fn new(me: NodeId, edition: Edition, bind: Option<IpAddr>, certificates: &Path) -> Self {
        let editions = watch::Sender::new(edition);
        let (snapshot_sender, snapshots) = tokio::sync::mpsc::channel(1);
        let tls = watch::Sender::new(Arc::new(NodeTls::load(certificates).unwrap()));
        let identity = PeerIdentity {
            me,
            version: "1.2.3".to_owned(),
            roster: Roster::new(editions.subscribe()),
            bind,
            terms: TERMS,
            tls: tls.subscribe(),
            snapshots: snapshot_sender,
            keys: tokio::sync::mpsc::channel(1).0,
            questions: tokio::sync::mpsc::channel(1).0,
            level: feature_level(),
            standing: Standing::Unsaid,
            memory: Memory::default(),
        };
        Self { identity, editions, snapshots, tls }
    }
}

/// A node without a brain: the loop's thread and the tokio side.
pub struct Node {
    pub me: NodeId,
    pub events: mpsc::Receiver<(Instant, PeerEvent)>,
    pub seen: Vec<PeerEvent>,
    pub orders: mpsc::Sender<Do>,
    pub wake: LinkSender,
    pub stop: watch::Sender<bool>,
    pub log: Log,
    pub editions: watch::Sender<Edition>,
    pub snapshots: tokio::sync::mpsc::Receiver<StreamCall>,
    pub tls: watch::Sender<Arc<NodeTls>>,
    pub links: Option<JoinHandle<()>>,
    pub handshakes: Option<JoinHandle<()>>,
}

impl Node {
    pub fn start(me: NodeId, membership: &Membership, listener: TcpListener, certificates: &Path) -> Self {
        Self::start_with(me, first(membership), listener, certificates)
    }

    pub fn start_with(me: NodeId, edition: Edition, listener: TcpListener, certificates: &Path) -> Self {
        Self::start_as(me, Standing::Unsaid, edition, listener, certificates, None)
    }

    /// One that takes datagrams beside the links.
    pub fn start_beside(
        me: NodeId,
        edition: Edition,
        listener: TcpListener,
        certificates: &Path,
        datagrams: Option<UdpSocket>,
    ) -> Self {
        Self::start_as(me, Standing::Unsaid, edition, listener, certificates, datagrams)
    }

    /// One that says this about its memory.
    pub fn start_as(
        me: NodeId,
        standing: Standing,
        edition: Edition,
        listener: TcpListener,
        certificates: &Path,
        datagrams: Option<UdpSocket>,
    ) -> Self {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_max_level(tracing::Level::DEBUG)
            .with_writer(move || writer.clone())
            .finish();
        let dispatch = Dispatch::new(subscriber);
        let peers = edition.membership.roster.members.iter().map(|member| member.id).filter(|id| *id != me).collect();
        let config = LinksConfig { bulk_bytes: 80 << 20, ..LinksConfig::new(me, peers) };
        let (mut links, wake) = Links::new(config).unwrap();
        datagrams.into_iter().for_each(|socket| links.use_datagrams(socket).unwrap());
        let (orders, inbox) = mpsc::channel();
        let (outbox, events) = mpsc::channel();
        let links_dispatch = dispatch.clone();
        let links = std::thread::spawn(move || {
            tracing::dispatcher::with_default(&links_dispatch, || drive(&mut links, &inbox, &outbox));
        });
        let bind = Some(listener.local_addr().unwrap().ip());
        let Around { mut identity, editions, snapshots, tls } = Around::new(me, edition, bind, certificates);
        identity.standing = standing;
        let (stop, stopped) = watch::channel(false);
        let sender = wake.clone();
        let handshakes = std::thread::spawn(move || {
            tracing::dispatcher::with_default(&dispatch, || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(peer::run(listener, Arc::new(identity), sender, stopped)).unwrap();
            });
        });
        let (links, handshakes) = (Some(links), Some(handshakes));
        Self { me, events, seen: Vec::new(), orders, wake, stop, log, editions, snapshots, tls, links, handshakes }
    }

    pub fn order(&self, order: Do) {
        self.orders.send(order).unwrap();
        self.wake.wake();
    }

    /// Both halves follow a change of the membership.
    pub fn follow(&self, membership: &Membership) {
        self.know(membership);
        self.dial(membership);
    }

    /// The handshakes alone follow.
    pub fn dial(&self, membership: &Membership) {
        let membership = Arc::new(membership.clone());
        self.editions.send_modify(|edition| *edition = Edition { index: edition.index + 1, membership });
    }

    /// The loop alone follows.
    pub fn know(&self, membership: &Membership) {
        self.order(Do::Peers(membership.roster.members.iter().map(|member| member.id).collect()));
    }

    /// Waits for an event; all events on the way are kept in `seen`.
    pub fn wait(&mut self, what: &str, wanted: impl Fn(&PeerEvent) -> bool) -> Instant {
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

    pub fn wait_linked(&mut self, peers: &[NodeId]) {
        let linked = |seen: &[PeerEvent]| {
            let up = |id| seen.iter().any(|event| matches!(event, PeerEvent::Up(up) if *up == id));
            let inbound = |id| seen.iter().any(|event| matches!(event, PeerEvent::InboundUp(up) if *up == id));
            peers.iter().all(|id| up(*id) && inbound(*id))
        };
        while !linked(&self.seen) {
            self.wait("link", |_| true);
        }
    }

    pub fn saw_death(&mut self) -> bool {
        self.seen.extend(self.events.try_iter().map(|(_, event)| event));
        self.seen.iter().any(|event| matches!(event, PeerEvent::Dead(_)))
    }

    pub fn end(&mut self, how: Do) {
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

pub fn message(msg_type: MessageType, from: NodeId, to: NodeId, index: u64) -> Message {
    Message { msg_type, from, to, index, ..Message::default() }
}

pub fn append(from: NodeId, to: NodeId, index: u64, size: usize) -> Message {
    let entry = Entry { index, data: vec![index as u8; size].into(), ..Entry::default() };
    Message { entries: vec![entry].into(), ..message(MessageType::MsgAppend, from, to, index) }
}

pub fn cluster(net: u8, count: u8) -> (Membership, Vec<Node>, Vec<TempDir>) {
    let authority = authority(CLUSTER);
    let (membership, listeners) = members(net, count);
    let dirs: Vec<_> = (1..=u64::from(count)).map(|id| certificates(&authority, id)).collect();
    let nodes = (1..).zip(listeners).zip(&dirs);
    let nodes = nodes.map(|((id, listener), dir)| Node::start(id, &membership, listener, dir.path())).collect();
    (membership, nodes, dirs)
}

/// Calls a node as somebody who has the certificate in `dir` and says `hello`.
pub fn call(dir: &Path, to: SocketAddr, hello: &[u8]) -> HelloReply {
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

/// What node 2 would say to node 1, from a process of its own.
pub fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        cluster: CLUSTER,
        from: 2,
        to: 1,
        data_format: FORMAT_VERSION,
        terms: TERMS,
        purpose: Purpose::Link,
        incarnation: 5,
        version: "1.2.3".to_owned(),
        reached: None,
        level: Some(feature_level()),
        standing: Standing::Unsaid,
        compares: false,
    }
}
