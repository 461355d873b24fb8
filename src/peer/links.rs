//! All established links of a node, polled by the consensus loop's thread. Owns their sockets and queues after the
//! hand-over. Must never block except in [`Links::poll`], and never do I/O on another thread.

use std::{
    collections::BTreeMap,
    io,
    net::UdpSocket,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use metrics::counter;
use mio::{Events, Interest, Poll, Registry, Token, Waker, event::Event};
use raft::eraftpb::{Message, MessageType};
use tokio::sync::watch;
use tracing::{error, info, warn};

use super::{
    codec::{self, CodecError, Frame, LENGTH, NodeReport},
    link::{Class, Established, Loss, Queues, Receiving, SCRATCH, Sending},
    memory::{Caller, Memory},
    udp::{Sent, Udp},
};
use crate::{
    cluster::NodeId,
    telemetry::{
        PEER_DEATHS, PEER_DROPPED,
        steps::{self, Step},
    },
};

const WAKE: Token = Token(0);
/// No peer ever has it: see [`Links::wait`].
const DATAGRAMS: Token = Token(usize::MAX - 1);
/// Hand-overs that may wait for the loop; a stuck loop must not collect connections.
const INBOX: usize = 64;
/// How long a planned stop waits for sockets to take what is queued.
const FAREWELL: Duration = Duration::from_millis(100);
/// How long after two processes with one identity were last seen the warning stays.
const DUPLICATES_FOR: Duration = Duration::from_secs(5);

/// Settings of [`Links`].
#[derive(Clone, Debug)]
pub struct LinksConfig {
    pub me: NodeId,
    /// All other members.
    pub peers: Vec<NodeId>,
    /// Limit of the bulk queue of each link, in bytes. Should hold what raft may have in flight to one follower; what
    /// does not fit is dropped and raft sends it again.
    pub bulk_bytes: usize,
    /// What is remembered of the peers, and decides whose links are used.
    pub memory: Memory,
}

impl LinksConfig {
    /// The usual limits.
    pub fn new(me: NodeId, peers: Vec<NodeId>) -> Self {
        Self { me, peers, bulk_bytes: 32 << 20, memory: Memory::default() }
    }
}

/// What happened on the links.
#[derive(Debug)]
pub enum PeerEvent {
    /// A raft message for this node; its sender is the authenticated peer.
    Raft(Message),
    /// What a peer says about itself.
    Report(NodeId, NodeReport),
    /// This node can send to the peer.
    Up(NodeId),
    /// This node can no longer send to the peer; what was queued is lost. `clean`: the peer said farewell, a planned
    /// stop.
    Down { peer: NodeId, clean: bool, reason: String },
    /// The peer can send to this node.
    InboundUp(NodeId),
    /// The peer can no longer send to this node.
    InboundDown { peer: NodeId, clean: bool },
    /// The peer's process is dead: see the module's documentation for what that means and assumes.
    Dead(NodeId),
    /// A member says that this node was removed from the cluster; once per reason that it gives.
    Removed { by: NodeId, reason: String },
    /// A member says that this node's program is too old for the cluster; once per reason that it gives.
    Outdated { by: NodeId, reason: String },
    /// A member says that this node lost some of its durable memory; once per reason that it gives.
    Forgot { by: NodeId, reason: String },
    /// Two processes use the identity of this peer; `gone`: both have not been seen for a while.
    DuplicateIdentity { peer: NodeId, gone: bool },
}

/// What the two halves know about a peer's links: written by the loop's thread and the dialler, watched by the dialler.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Signal {
    /// The link to the peer is up, or on its way to the loop.
    pub up: bool,
    /// The link from the peer is up.
    pub inbound: bool,
    /// A link was up since the peer's last death or farewell.
    pub alive: bool,
    /// Counts reasons to dial at once.
    pub nudges: u64,
}

/// What the handshakes on tokio give the loop, or tell it: a link, a death, or what a member says of this node.
pub(super) enum Handover {
    Outbound(NodeId, Established),
    Inbound(NodeId, Established, Caller),
    Dead(NodeId),
    Removed { by: NodeId, reason: String },
    Outdated { by: NodeId, reason: String },
    Forgot { by: NodeId, reason: String },
    DuplicateIdentity(NodeId),
}

/// The peers that the loop knows. A peer's sender ends with its entry here, and so does everybody who waits for its
/// signal.
type Signals = BTreeMap<NodeId, watch::Sender<Signal>>;

struct Shared {
    waker: Waker,
    inbox: mpsc::SyncSender<Handover>,
    signals: watch::Sender<Signals>,
    /// This node takes datagrams.
    datagrams: AtomicBool,
}

/// The way to the loop's thread, for any thread.
#[derive(Clone)]
pub struct LinkSender(Arc<Shared>);

impl LinkSender {
    /// Makes the current or next [`Links::poll`] return at once.
    pub fn wake(&self) {
        // An eventfd takes any number of wake-ups; writing to it cannot fail while it is open, and we hold it.
        let _ = self.0.waker.wake();
    }

    /// Hands something to the loop. False if it is gone or stuck; a connection is closed then.
    pub(super) fn hand_over(&self, item: Handover) -> bool {
        let sent = self.0.inbox.try_send(item).is_ok();
        self.wake();
        sent
    }

    /// Whether this node takes datagrams beside its links.
    pub(super) fn takes_datagrams(&self) -> bool {
        self.0.datagrams.load(Ordering::Relaxed)
    }

    /// Changes the signal of a peer. False if the loop does not know the peer.
    pub(super) fn change_signal(&self, peer: NodeId, change: impl FnOnce(&mut Signal)) -> bool {
        self.0.update(peer, change)
    }

    /// What is known about the links of a peer; `None` if the loop does not know it.
    pub(super) fn signal(&self, peer: NodeId) -> Option<Signal> {
        self.0.signals.borrow().get(&peer).map(|signal| *signal.borrow())
    }

    /// Waits until the loop knows a peer. The receiver fails when the loop no longer knows the peer; `None` if nobody
    /// can tell.
    pub(super) async fn wait_for_signal(&self, peer: NodeId) -> Option<watch::Receiver<Signal>> {
        let mut signals = self.0.signals.subscribe();
        let known = signals.wait_for(|signals| signals.contains_key(&peer)).await.ok()?;
        known.get(&peer).map(|signal| signal.subscribe())
    }

    /// The peer's HA port refused a connection: reports its death if the rest of the evidence is there too.
    pub(super) fn report_dead(&self, peer: NodeId) -> bool {
        let mut dead = false;
        self.change_signal(peer, |signal| {
            dead = signal.alive && !signal.up && !signal.inbound;
            signal.alive &= !dead;
        });
        if dead {
            info!(peer, "the process of this node is dead: its links dropped and its port refuses connections");
            counter!(PEER_DEATHS).increment(1);
            dead = self.hand_over(Handover::Dead(peer));
            // A stuck loop was not told: the next refusal tries again.
            self.change_signal(peer, |signal| signal.alive |= !dead);
        }
        dead
    }
}

struct Peer {
    id: NodeId,
    /// Makes the tokens of its links, see [`Links::wait`]; never given twice, so that a late event cannot be taken for
    /// that of another peer.
    slot: usize,
    sending: Option<Sending>,
    receiving: Option<Receiving>,
}

/// The links of this node. See the module's documentation.
pub struct Links {
    config: LinksConfig,
    poll: Poll,
    ready: Events,
    inbox: mpsc::Receiver<Handover>,
    shared: Arc<Shared>,
    peers: Vec<Peer>,
    udp: Udp,
    /// The slot of the next new peer.
    next_slot: usize,
    /// Peers that two processes claim to be, with when that was last seen.
    duplicates: Vec<(NodeId, Instant)>,
    scratch: Box<[u8]>,
}

impl Links {
    /// No links yet; they come through the [`LinkSender`], which [`super::run`] wants.
    ///
    /// # Errors
    /// When the kernel has no epoll or eventfd to give.
    pub fn new(config: LinksConfig) -> io::Result<(Self, LinkSender)> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), WAKE)?;
        let (inbox_sender, inbox) = mpsc::sync_channel(INBOX);
        let (signals, datagrams) = (watch::Sender::new(Signals::new()), AtomicBool::new(false));
        let shared = Arc::new(Shared { waker, inbox: inbox_sender, signals, datagrams });
        let (ready, scratch) = (Events::with_capacity(64), vec![0; SCRATCH].into_boxed_slice());
        let sender = LinkSender(shared.clone());
        let first = config.peers.clone();
        let (peers, duplicates, udp) = (Vec::new(), Vec::new(), Udp::new());
        let mut links = Self { config, poll, ready, inbox, shared, peers, udp, next_slot: 0, duplicates, scratch };
        links.set_peers(&first);
        Ok((links, sender))
    }

    /// Takes and sends datagrams beside the links that come up from now on.
    ///
    /// # Errors
    /// When the socket cannot be used. Everything goes by the links then.
    pub fn use_datagrams(&mut self, socket: UdpSocket) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        let mut socket = mio::net::UdpSocket::from_std(socket);
        self.poll.registry().register(&mut socket, DATAGRAMS, Interest::READABLE)?;
        self.udp.open(socket);
        self.shared.datagrams.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Members that take datagrams and have not said for a while that any of this node's came.
    pub fn unheard_by(&self) -> impl Iterator<Item = NodeId> {
        self.udp.unheard()
    }

    /// Follows a change of the members: `peers` are all others from now on. The links of those that are not among them
    /// any more end with a farewell, as far as that is possible without waiting; no event tells of it.
    pub fn set_peers(&mut self, peers: &[NodeId]) {
        for mut gone in self.peers.extract_if(.., |peer| !peers.contains(&peer.id)) {
            info!(peer = gone.id, "this node is no longer a member: its links are closed");
            gone.close(self.poll.registry());
            self.udp.forget(gone.id);
        }
        for id in peers.iter().filter(|id| **id != self.config.me) {
            if !self.peers.iter().any(|peer| peer.id == *id) {
                self.peers.push(Peer { id: *id, slot: self.next_slot, sending: None, receiving: None });
                self.next_slot += 1;
            }
        }
        self.config.peers = self.peers.iter().map(|peer| peer.id).collect();
        let known = &self.peers;
        self.shared.signals.send_if_modified(|signals| {
            let before = signals.len();
            signals.retain(|id, _| known.iter().any(|peer| peer.id == *id));
            let mut changed = signals.len() != before;
            for peer in known {
                changed |= !signals.contains_key(&peer.id);
                signals.entry(peer.id).or_default();
            }
            changed
        });
    }

    /// Waits until something arrives, [`LinkSender::wake`] is called, or the time is over (whole milliseconds, rounded
    /// up), and appends what happened to `events`. It also writes what waited for a socket.
    ///
    /// # Errors
    /// When epoll fails, which only a bug or a lack of kernel memory explains.
    pub fn poll(&mut self, timeout: Duration, events: &mut Vec<PeerEvent>) -> io::Result<()> {
        let busy = self.udp.has_work() || self.peers.iter().any(Peer::has_work);
        let timeout = if busy { Duration::ZERO } else { timeout };
        self.wait(timeout)?;
        let begun = steps::begin();
        while let Ok(item) = self.inbox.try_recv() {
            self.take_over(item, events);
        }
        let me = self.config.me;
        self.udp.receive(|message| {
            if message.to == me {
                events.push(PeerEvent::Raft(message));
            }
        });
        for peer in &mut self.peers {
            peer.step(me, &mut self.scratch, &self.shared, self.poll.registry(), events, &mut self.udp);
        }
        for (peer, _) in self.duplicates.extract_if(.., |(_, seen)| seen.elapsed() > DUPLICATES_FOR) {
            events.push(PeerEvent::DuplicateIdentity { peer, gone: true });
        }
        if begun.runs() && !events.is_empty() {
            begun.end(Step::LoopReceive);
        }
        Ok(())
    }

    fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        match self.poll.poll(&mut self.ready, Some(timeout)) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for event in &self.ready {
            self.udp.readable |= event.token() == DATAGRAMS;
            // Tokens are 1 + 2 * slot for the link to a peer and one more for the link from it.
            if let Some(number) = event.token().0.checked_sub(1)
                && let Some(peer) = self.peers.iter_mut().find(|peer| peer.slot == number / 2)
            {
                peer.mark(event, number % 2 == 0);
            }
        }
        Ok(())
    }

    /// Sends a raft message to `message.to`: at once if the socket takes it, else as soon as it does. Entries and
    /// snapshots queue behind each other, everything else goes before them. A datagram goes beside it, or in its place.
    /// Returns false if the message was dropped because there is no link or its queue is full; raft must be told when
    /// it was a snapshot.
    pub fn send(&mut self, message: &Message) -> bool {
        let class = match message.msg_type {
            // Empty ones too: an append that overtakes another would be rejected and cost a round trip.
            MessageType::MsgAppend | MessageType::MsgSnapshot => Class::Bulk,
            _ => Class::Control,
        };
        if !self.udp.knows(message.to) {
            return self.send_frame(message.to, class, || codec::encode_raft(message));
        }
        let encoded = codec::encode_raft(message);
        let sent = encoded.as_ref().map_or(Sent::No, |frame| self.udp.send(message, &frame[LENGTH..]));
        let stuck = |link: &mut Sending| class == Class::Bulk && link.is_busy();
        match sent {
            Sent::Enough => true,
            // What is lost is sent again by raft, sooner than by TCP: it would only be in the way of what comes later.
            Sent::Too if self.link_to(message.to).is_none_or(stuck) => true,
            _ => self.send_frame(message.to, class, || encoded),
        }
    }

    /// Sends this node's report to a peer. Returns false if it was dropped.
    pub fn send_report(&mut self, to: NodeId, report: &NodeReport) -> bool {
        let extensible = self.link_to(to).is_some_and(|link| link.extensible);
        let more = report.more.filter(|_| extensible);
        self.send_frame(to, Class::Control, || codec::encode_report(&NodeReport { more, ..report.clone() }))
    }

    fn link_to(&mut self, to: NodeId) -> Option<&mut Sending> {
        self.peers.iter_mut().find(|peer| peer.id == to).and_then(|peer| peer.sending.as_mut())
    }

    fn send_frame(&mut self, to: NodeId, class: Class, encode: impl FnOnce() -> Result<Vec<u8>, CodecError>) -> bool {
        let Some(link) = self.link_to(to) else { return false };
        let sent = match encode() {
            Ok(frame) => link.send(class, frame),
            Err(error) => {
                warn!(peer = to, %error, "a message cannot be sent");
                false
            }
        };
        if !sent {
            let class = if class == Class::Bulk { "bulk" } else { "control" };
            counter!(PEER_DROPPED, "class" => class).increment(1);
        }
        sent
    }

    /// True if this node can send to the peer at the moment.
    pub fn is_up(&self, peer: NodeId) -> bool {
        self.peers.iter().any(|known| known.id == peer && known.sending.is_some())
    }

    fn take_over(&mut self, item: Handover, events: &mut Vec<PeerEvent>) {
        let item = match item {
            // Also from a member that is not known here: an older copy of a data folder does not know the newer
            // members.
            Handover::Forgot { by, reason } => return events.push(PeerEvent::Forgot { by, reason }),
            Handover::DuplicateIdentity(peer) if self.peers.iter().any(|known| known.id == peer) => {
                return self.see_duplicate(peer, events);
            }
            item => item,
        };
        let id = match &item {
            Handover::Outbound(id, _)
            | Handover::Inbound(id, ..)
            | Handover::Dead(id)
            | Handover::DuplicateIdentity(id) => *id,
            Handover::Removed { by, .. } | Handover::Outdated { by, .. } | Handover::Forgot { by, .. } => *by,
        };
        let registry = self.poll.registry();
        // Not from a peer that was dropped meanwhile: its links end here.
        let Some(peer) = self.peers.iter_mut().find(|peer| peer.id == id) else { return };
        let token = Token(1 + 2 * peer.slot);
        match item {
            Handover::Removed { by, reason } => events.push(PeerEvent::Removed { by, reason }),
            Handover::Outdated { by, reason } => events.push(PeerEvent::Outdated { by, reason }),
            Handover::Forgot { .. } | Handover::DuplicateIdentity(_) => {}
            // A link that came up since the verdict belongs to a new process.
            Handover::Dead(_) if peer.sending.is_some() || peer.receiving.is_some() => {}
            Handover::Dead(id) => {
                self.udp.forget(id);
                events.push(PeerEvent::Dead(id));
            }
            Handover::Outbound(id, link) => {
                self.udp.there(id, link.datagrams, &link.tls);
                let mut link = Sending::new(link, Queues::new(self.config.bulk_bytes));
                if let Err(error) = registry.register(&mut link.socket, token, Interest::READABLE | Interest::WRITABLE)
                {
                    warn!(peer = id, %error, "cannot use a new link");
                    self.shared.update(id, |signal| signal.up = peer.sending.is_some());
                    return;
                }
                if let Some(mut old) = peer.sending.replace(link) {
                    let _ = registry.deregister(&mut old.socket);
                }
                events.push(PeerEvent::Up(id));
            }
            // What came from it since it was accepted may show that it has less than it had: it is refused when it
            // calls again.
            Handover::Inbound(id, _, caller) if !self.config.memory.admit(id, &caller) => {}
            Handover::Inbound(id, link, _) => {
                self.udp.back(id, &link.tls);
                let mut link = Receiving::new(link);
                if let Err(error) = registry.register(&mut link.socket, Token(token.0 + 1), Interest::READABLE) {
                    warn!(peer = id, %error, "cannot use a new link");
                    return;
                }
                // The peer dials again only when its old link is of no use any more, even if we have not noticed yet.
                if let Some(mut old) = peer.receiving.replace(link) {
                    let _ = registry.deregister(&mut old.socket);
                }
                self.shared.update(id, |signal| {
                    (signal.inbound, signal.alive) = (true, true);
                    signal.nudges += 1;
                });
                events.push(PeerEvent::InboundUp(id));
            }
        }
    }

    fn see_duplicate(&mut self, peer: NodeId, events: &mut Vec<PeerEvent>) {
        match self.duplicates.iter_mut().find(|(known, _)| *known == peer) {
            Some((_, seen)) => *seen = Instant::now(),
            None => {
                error!(peer, "two processes use the identity of this node: stop one of the two");
                self.duplicates.push((peer, Instant::now()));
                events.push(PeerEvent::DuplicateIdentity { peer, gone: false });
            }
        }
    }

    /// Says farewell on all links, so that the others do not take the stop for a crash, after sending what is queued.
    /// Blocks for 100 ms at most. No links are left afterwards.
    pub fn shutdown(&mut self) {
        let deadline = Instant::now() + FAREWELL;
        for peer in &mut self.peers {
            peer.sending.iter_mut().for_each(Sending::farewell);
            if let Some(link) = peer.receiving.take() {
                link.close();
            }
        }
        while self.peers.iter().any(|peer| peer.sending.as_ref().is_some_and(Sending::is_busy)) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.wait(left.min(Duration::from_millis(10))).is_err() {
                break;
            }
            self.peers.iter_mut().filter_map(|peer| peer.sending.as_mut()).for_each(Sending::flush);
        }
        for peer in &mut self.peers {
            if let Some(link) = peer.sending.take() {
                link.close();
            }
        }
    }
}

impl Shared {
    fn update(&self, peer: NodeId, change: impl FnOnce(&mut Signal)) -> bool {
        let signals = self.signals.borrow();
        signals.get(&peer).map(|signal| signal.send_modify(change)).is_some()
    }
}

impl Peer {
    /// Ends both links with a farewell, as far as that is possible without waiting.
    fn close(&mut self, registry: &Registry) {
        if let Some(mut link) = self.sending.take() {
            let _ = registry.deregister(&mut link.socket);
            link.farewell();
            link.close();
        }
        if let Some(mut link) = self.receiving.take() {
            let _ = registry.deregister(&mut link.socket);
            link.close();
        }
    }

    /// True if the next poll must not wait.
    fn has_work(&self) -> bool {
        self.sending.as_ref().is_some_and(|link| link.readable || link.failed.is_some())
            || self.receiving.as_ref().is_some_and(|link| link.readable)
    }

    fn mark(&mut self, event: &Event, outbound: bool) {
        let readable = event.is_readable() || event.is_read_closed() || event.is_error();
        match (&mut self.sending, &mut self.receiving) {
            (Some(link), _) if outbound => {
                link.readable |= readable;
                link.flush();
            }
            (_, Some(link)) if !outbound => link.readable |= readable,
            _ => {}
        }
    }

    /// Reads what is there and finds out whether a link is lost.
    fn step(
        &mut self,
        me: NodeId,
        scratch: &mut [u8],
        shared: &Shared,
        registry: &Registry,
        events: &mut Vec<PeerEvent>,
        udp: &mut Udp,
    ) {
        let mut inbound = self.receive(me, scratch, false, events);
        let outbound = self.watch(scratch, inbound.as_ref().is_some_and(|loss| !loss.clean));
        if outbound.as_ref().is_some_and(|loss| !loss.clean) && inbound.is_none() {
            // The farewell may be on the other link only: look before the peer is suspected.
            inbound = self.receive(me, scratch, true, events);
        }
        let farewell = [&inbound, &outbound].into_iter().flatten().any(|loss| loss.clean);
        let peer = self.id;
        if inbound.is_some() {
            if let Some(mut link) = self.receiving.take() {
                let _ = registry.deregister(&mut link.socket);
            }
            events.push(PeerEvent::InboundDown { peer, clean: farewell });
        }
        if let Some(loss) = &outbound {
            if let Some(mut link) = self.sending.take() {
                let _ = registry.deregister(&mut link.socket);
            }
            events.push(PeerEvent::Down { peer, clean: farewell, reason: loss.reason.clone() });
        }
        match farewell {
            true => udp.forget(peer),
            false => udp.lost(peer, outbound.is_some(), inbound.is_some()),
        }
        if let Some(loss) = outbound.as_ref().or(inbound.as_ref()) {
            info!(peer, planned = farewell, reason = loss.reason, "a link is down");
            shared.update(peer, |signal| {
                signal.up &= outbound.is_none();
                signal.inbound &= inbound.is_none();
                signal.alive &= !farewell;
                // The dialler waits for the end of its own link anyway; this one may be news.
                signal.nudges += u64::from(inbound.is_some());
            });
        }
    }

    fn watch(&mut self, scratch: &mut [u8], force: bool) -> Option<Loss> {
        let link = self.sending.as_mut()?;
        let failed = link.failed.take();
        let read = if link.readable || force || failed.is_some() { link.watch(scratch) } else { None };
        match (read, failed) {
            // A write fails also when the other node has said farewell and gone.
            (Some(loss), _) if loss.clean => Some(loss),
            (read, failed) => failed.or(read),
        }
    }

    fn receive(&mut self, me: NodeId, scratch: &mut [u8], force: bool, events: &mut Vec<PeerEvent>) -> Option<Loss> {
        let peer = self.id;
        let link = self.receiving.as_mut().filter(|link| link.readable || force)?;
        let mut take = |frame| {
            events.push(match frame {
                Frame::Raft(message) if message.from == peer && message.to == me => PeerEvent::Raft(*message),
                Frame::Report(report) => PeerEvent::Report(peer, report),
                _ => return Err("a frame that does not belong on this link".to_owned()),
            });
            Ok(())
        };
        link.receive(scratch, &mut take).err()
    }
}
