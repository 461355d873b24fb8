//! Accepts links from other members: TLS, hello, hand-over. Must never let strangers hold more than a few handshakes,
//! or spin when the process is out of file descriptors.

use std::{collections::HashSet, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream, lookup_host},
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};
use tracing::{debug, info, warn};

use super::{
    PeerIdentity, StreamCall,
    codec::{CodecError, Frame, Hello, HelloReply, PROTOCOL_VERSION, Purpose, Reached, Refusal, RefusalCode},
    duplicates::Duplicates,
    hello::{Complaints, HANDSHAKE, Subject, certified, explain, read_frame, shortened, tune, write_frame},
    link::Established,
    links::{Handover, LinkSender},
    memory::Caller,
};
use crate::{
    clients::places::{Acquaintances, Places, Room, Visit},
    cluster::{
        NodeId,
        level::{FORMAT_VERSION, outdated},
        reach::Standing,
        roster::check_host,
    },
    descriptors,
};

/// Handshakes under way at one time from one network of strangers.
const FROM_STRANGERS: usize = 16;
/// How often the names of members are looked up.
const LOOK_UP: Duration = Duration::from_secs(30);
/// Pause after accept failed, e.g. for want of file descriptors: it would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(super) async fn run(
    listener: TcpListener,
    identity: Arc<PeerIdentity>,
    sender: LinkSender,
    complaints: Arc<Complaints>,
) {
    let duplicates = Arc::new(Duplicates::default());
    let members = Acquaintances::new();
    let mut handshakes = JoinSet::new();
    handshakes.spawn(know_members(identity.clone(), members.clone()));
    let places = descriptors::budget().peers;
    let room = Room { places, from_one: FROM_STRANGERS, from_known: places / 2, reserved: places / 4 };
    let places = Places::new("peers", room, members);
    loop {
        while handshakes.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, from)) => {
                let Some(place) = places.enter(from.ip()).await else { continue };
                let (identity, sender) = (identity.clone(), sender.clone());
                let (complaints, duplicates) = (complaints.clone(), duplicates.clone());
                let call = Call { identity, sender, complaints, duplicates, from, visit: place.visit() };
                handshakes.spawn(async move {
                    tokio::select! {
                        () = call.answer(stream) => {}
                        () = place.ended() => {}
                    }
                });
            }
            // A connection that died while it waited says nothing about the listener.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                warn!(%error, "cannot accept connections of other nodes");
                if descriptors::are_short(&error) {
                    places.make_room();
                }
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Keeps the members' addresses up to date, and looks up their names: places are reserved for them.
async fn know_members(identity: Arc<PeerIdentity>, members: Arc<Acquaintances>) {
    let (mut editions, mut told) = identity.roster.changes();
    loop {
        let mut known = HashSet::new();
        for member in identity.roster.others(identity.me) {
            match member.address.parse() {
                Ok(address) => drop(known.insert(address)),
                // A member whose name cannot be looked up shares the places of everybody.
                Err(_) => known.extend(
                    timeout(HANDSHAKE, lookup_host((member.address.as_str(), member.port)))
                        .await
                        .ok()
                        .and_then(Result::ok)
                        .into_iter()
                        .flatten()
                        .map(|address| address.ip()),
                ),
            }
        }
        members.set_members(known.into_iter());
        tokio::select! {
            Ok(()) = editions.changed() => {}
            Ok(()) = told.changed() => {}
            () = sleep(LOOK_UP) => {}
        }
    }
}

/// Why a call was not answered.
enum Failure {
    /// The connection ended before it said anything useful: a probe, or a node that stopped.
    Gone(io::Error),
    /// Refused, with the reason to log.
    Because(Subject, String),
}

struct Call {
    identity: Arc<PeerIdentity>,
    sender: LinkSender,
    complaints: Arc<Complaints>,
    duplicates: Arc<Duplicates>,
    from: SocketAddr,
    visit: Visit,
}

impl Call {
    async fn answer(self, stream: TcpStream) {
        let result = timeout(HANDSHAKE, self.handshake(stream)).await;
        let peer = match result {
            Ok(Ok(peer)) => peer,
            Ok(Err(Failure::Gone(error))) => {
                debug!(from = %self.from, %error, "a connection ended during the handshake");
                return;
            }
            Ok(Err(Failure::Because(subject, reason))) => {
                if self.complaints.is_new(subject, &reason) {
                    match subject {
                        Subject::Caller(peer) => {
                            warn!(peer, from = %self.from, reason, "refused a link from this node")
                        }
                        _ => warn!(from = %self.from, reason, "refused a connection to the high availability port"),
                    }
                }
                return;
            }
            Err(_) => {
                let (subject, reason) = (Subject::Stranger(self.from.ip()), "the handshake took too long");
                if self.complaints.is_new(subject, reason) {
                    info!(from = %self.from, reason, "gave up a connection to the high availability port");
                }
                return;
            }
        };
        self.complaints.settle(Subject::Caller(peer));
        self.complaints.settle(Subject::Stranger(self.from.ip()));
    }

    async fn handshake(&self, stream: TcpStream) -> Result<NodeId, Failure> {
        tune(&stream, Purpose::Link).map_err(Failure::Gone)?;
        let stranger = Subject::Stranger(self.from.ip());
        let failed = |error| match explain(&error) {
            Some(reason) => Failure::Because(stranger, reason),
            None => Failure::Gone(error),
        };
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await.map_err(failed)?;
        self.visit.greeted();
        let server = self.identity.tls.borrow().server.clone();
        let mut stream = start.into_stream(server).await.map_err(failed)?;
        let cluster = self.identity.roster.cluster();
        let caller = certified(cluster, stream.get_ref().1.peer_certificates());
        let hello = read_frame(&mut stream).await.map_err(failed)?;
        let verdict = match &caller {
            Ok(peer) => self.check(*peer, hello),
            Err(reason) => Err(Refusal::other(reason.clone())),
        };
        match (verdict, caller) {
            (Ok(welcome), Ok(peer)) => {
                let level = self.identity.level_for(stream.get_ref().1.alpn_protocol());
                let accepted = HelloReply::Accepted { level, datagrams: self.sender.takes_datagrams() };
                write_frame(&mut stream, &Frame::HelloReply(accepted)).await.map_err(failed)?;
                self.welcome(peer, welcome, stream).map_err(Failure::Gone)?;
                Ok(peer)
            }
            (verdict, caller) => {
                let refusal = verdict.err().unwrap_or_else(|| Refusal::other(""));
                let (code, reason) = (refusal.code, refusal.reason.clone());
                refuse(stream, refusal).await;
                if code == RefusalCode::Busy {
                    return Err(Failure::Gone(io::Error::other(reason))); // nothing is wrong
                }
                Err(Failure::Because(caller.map_or(stranger, Subject::Caller), reason))
            }
        }
    }

    /// Hands an accepted connection to whoever serves it.
    fn welcome(&self, peer: NodeId, welcome: Welcome, stream: TlsStream<TcpStream>) -> io::Result<()> {
        match welcome {
            Welcome::Link(caller) => {
                let (socket, tls) = stream.into_inner();
                let link = Established { socket: socket.into_std()?, tls: tls.into(), datagrams: None };
                if !self.sender.hand_over(Handover::Inbound(peer, link, caller)) {
                    debug!(peer, "the consensus loop takes no new link");
                }
            }
            Welcome::Snapshot { place, forgotten, compares } => {
                tune(stream.get_ref().0, Purpose::Snapshot)?;
                place.send(StreamCall { from: peer, forgotten, compares, stream });
            }
            Welcome::Short(place) => {
                place.send(StreamCall { from: peer, forgotten: false, compares: false, stream });
            }
        }
        Ok(())
    }

    /// Compares what the caller says with what its certificate says and what this node knows.
    fn check(&self, certified: NodeId, hello: Result<Frame, CodecError>) -> Result<Welcome, Refusal> {
        let hello = match hello {
            Ok(Frame::Hello(hello)) => hello,
            Ok(_) => return Err(Refusal::other("the first frame is not a hello")),
            Err(CodecError::Version(theirs)) => {
                return Err(Refusal::other(format!(
                    "protocol version {theirs}, but node {} knows {PROTOCOL_VERSION}: bring both to the same release",
                    self.identity.me
                )));
            }
            Err(error) => return Err(Refusal::other(error.to_string())),
        };
        self.check_terms(certified, &hello).map_err(Refusal::other)?;
        self.check_member(hello.from).inspect_err(|_| self.detect_older_copy(&hello))?;
        self.check_level(&hello)?;
        match hello.purpose {
            Purpose::Link => {
                let caller = Caller { life: hello.incarnation, standing: hello.standing };
                let welcome = self.check_link(hello.from, caller)?;
                self.identity.roster.called(hello.from, self.from.ip());
                if let Some(reached) = hello.reached {
                    self.identity.roster.hear(hello.from, reached);
                }
                Ok(welcome)
            }
            Purpose::Snapshot => {
                let place = self.place(&self.identity.snapshots, "can give no more snapshots")?;
                let forgotten = hello.standing == Standing::Forgotten;
                Ok(Welcome::Snapshot { place, forgotten, compares: hello.compares })
            }
            Purpose::Key => Ok(Welcome::Short(self.place(&self.identity.keys, "is giving its key to others")?)),
            Purpose::Question => Ok(Welcome::Short(self.place(&self.identity.questions, "is answering others")?)),
        }
    }

    /// A place in a queue of calls. While it is full, the caller is told what this node `does`.
    fn place(&self, queue: &mpsc::Sender<StreamCall>, does: &str) -> Result<mpsc::OwnedPermit<StreamCall>, Refusal> {
        queue.clone().try_reserve_owned().map_err(|_| Refusal {
            code: RefusalCode::Busy,
            reason: format!("node {} {does} at the moment: try again", self.identity.me),
        })
    }

    /// Checks that the two understand each other, and that the call is for this node.
    fn check_terms(&self, certified: NodeId, hello: &Hello) -> Result<(), String> {
        let Hello { cluster, from, to, data_format, terms, .. } = *hello;
        let ours = self.identity.roster.cluster();
        if cluster != ours {
            return Err(format!("the caller is of cluster {cluster}, this is cluster {ours}"));
        }
        if from != certified {
            return Err(format!("the caller says that it is node {from}, its certificate is of node {certified}"));
        }
        if to != self.identity.me {
            return Err(format!("the caller wants node {to}, this is node {}", self.identity.me));
        }
        if data_format != FORMAT_VERSION {
            return Err(format!(
                "data format {data_format}, but node {to} knows {FORMAT_VERSION}: bring both to the same release"
            ));
        }
        if !terms.fit(&self.identity.terms) {
            let own = self.identity.terms;
            return Err(format!(
                "a lease of {} ms and a promise of {} ms do not fit node {to}'s {} and {} ms: set LEASE_MS, TICK_MS and \
                 ELECTION_TICKS alike on all nodes",
                terms.lease_ms, terms.promise_ms, own.lease_ms, own.promise_ms
            ));
        }
        match &hello.reached {
            Some(Reached { address, port, .. }) => {
                let name = format!("node-{from}");
                let odd = |error| format!("the caller says where it is reached, but {error}");
                check_host(&name, address, *port).map_err(odd)
            }
            None => Ok(()),
        }
    }

    fn check_member(&self, from: NodeId) -> Result<(), Refusal> {
        let ours = self.identity.roster.membership();
        if let Some(removed) = ours.removed(from) {
            // A time that no calendar has is shown as the number that it is.
            let at = i64::try_from(removed.at).ok().and_then(|at| jiff::Timestamp::from_second(at).ok());
            let at = at.map_or_else(|| format!("second {}", removed.at), |at| at.to_string());
            let name = &removed.name;
            let reason =
                format!("node {from} ({name}) was removed from the cluster at {at}; run the join script to come back");
            return Err(Refusal { code: RefusalCode::Removed, reason });
        }
        if from == self.identity.me || ours.get(from).is_none() {
            return Err(not_yet(from));
        }
        Ok(())
    }

    /// The only voter has every admission in its own raft log before anybody else hears of it. If a certified member
    /// that it does not know has a longer log, this node has an older copy of its own, of a time before it had others:
    /// nobody else would find out, as it calls nobody, and it would elect itself.
    fn detect_older_copy(&self, hello: &Hello) {
        let (ours, me) = (self.identity.roster.membership(), self.identity.me);
        let unknown = ours.get(hello.from).is_none() && hello.from >= ours.roster.next_id;
        let (Standing::Whole(own), Standing::Whole(theirs)) = (self.identity.standing, hello.standing) else { return };
        if !unknown || !ours.voters().eq([me]) || (theirs.term <= own.term && theirs.last <= own.last) {
            return;
        }
        let (by, known) = (hello.from, hello.reached.as_ref());
        let from = known.map_or_else(|| self.from.ip().to_string(), |reached| reached.address.clone());
        let reason = format!(
            "node {by} at {from} is a member of this cluster with a longer raft log, and is not known here: the data folder is an \
             older copy, of a time when this was the only member; move it away and run the join script of the cluster on this host"
        );
        if !self.sender.hand_over(Handover::Forgot { by, reason }) {
            debug!(peer = by, "the consensus loop is not told that this node forgot");
        }
    }

    /// A program that does not have what the cluster relies on would misread what it is sent.
    fn check_level(&self, hello: &Hello) -> Result<(), Refusal> {
        let (ours, has) = (self.identity.roster.membership(), hello.feature_level());
        if has >= ours.shared.level {
            return Ok(());
        }
        let who = ours.name(hello.from);
        let reason = outdated(&who, (&hello.version, has), (&ours.shared.level_version, ours.shared.level));
        Err(Refusal { code: RefusalCode::Outdated, reason })
    }

    fn check_link(&self, from: NodeId, caller: Caller) -> Result<Welcome, Refusal> {
        // The loop follows the membership, too, but it may not have got there yet.
        let signal = self.sender.signal(from).ok_or_else(|| not_yet(from))?;
        if self.duplicates.calls(from, caller.life, signal.inbound) {
            let reason = format!(
                "two processes use the identity of node {from}, and the other one is linked: was its data folder \
                 copied? Stop one of the two"
            );
            if !self.sender.hand_over(Handover::DuplicateIdentity(from)) {
                debug!(peer = from, "the consensus loop is not told of the duplicate identity");
            }
            return Err(Refusal::other(reason));
        }
        match self.identity.memory.objection(from, &caller) {
            None => Ok(Welcome::Link(caller)),
            Some(why) => {
                let reason =
                    format!("node {from} lost some of its durable memory, as node {} knows: {why}", self.identity.me);
                Err(Refusal { code: RefusalCode::Forgot, reason })
            }
        }
    }
}

/// What an accepted call gets.
enum Welcome {
    Link(Caller),
    /// With a place in the queue of those who give snapshots, and what the caller says of itself.
    Snapshot {
        place: mpsc::OwnedPermit<StreamCall>,
        forgotten: bool,
        compares: bool,
    },
    /// With a place in the queue of those who give keys, or answer questions.
    Short(mpsc::OwnedPermit<StreamCall>),
}

fn not_yet(from: NodeId) -> Refusal {
    Refusal::other(format!("node {from} is not another member of this cluster (yet)"))
}

/// Tells the caller why, as well as that is possible: it may be gone.
async fn refuse(mut stream: TlsStream<TcpStream>, Refusal { code, reason }: Refusal) {
    let reply = Frame::HelloReply(HelloReply::Refused(Refusal { code, reason: shortened(reason) }));
    if write_frame(&mut stream, &reply).await.is_ok() {
        let _ = stream.shutdown().await;
    }
}
