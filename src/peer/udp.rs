//! The datagrams beside the links: one UDP socket on the number of the HA port, and a session for each direction of
//! each pair. Owns what is sent to whom by it. Must never answer a datagram, work for strangers without a limit, or be
//! the only way: what matters also goes by the links, unless the other end has just said that datagrams reach it.
//!
//! # Why a late, doubled or overtaken datagram extends no lease and no promise
//! - A lease counts from the *sending* of a round, which is its context, and grows only when a majority answered that
//!   very round. An answer that is late confirms an old round, which extends nothing; a second one is of a node that is
//!   counted already.
//! - A promise counts from the *receipt* of a heartbeat, which is never before its sending. A late one makes a voter
//!   wait for longer than it would have to, and never for less. One that another has overtaken is dropped, so that
//!   heartbeats held back on the way cannot keep a voter waiting again and again for a primary that has gone.
//! - A session ends with its link: when the other end dials anew (so nothing that an earlier process sent comes behind
//!   what the next one sends), when its process is dead, or when it says farewell. A link that is lost otherwise leaves
//!   its session for [`KEEP`]: TCP needs seconds for a new one when packets get lost.
//! - All else that goes by datagram is for raft, which takes the loss, doubling and reordering of everything.
//!   `tests/sim` runs with copies of all messages that are up to 5 s late.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use metrics::counter;
use mio::net::UdpSocket;
use raft::eraftpb::{Message, MessageType};
use rustls::Connection;
use tracing::info;

use super::{
    codec::Frame,
    datagram::{Flaw, Heard, LARGEST, Opener, Sealer, Secret, session_of},
};
use crate::{cluster::NodeId, telemetry};

/// How long a session outlives a link that was lost.
const KEEP: Duration = Duration::from_secs(10);
/// While the other end has said within this time that datagrams reach it, heartbeats go by the link only this often:
/// enough for a lease when datagrams stop.
const PROVEN: Duration = Duration::from_millis(100);
/// Without a sign for this long, datagrams are few: something on the way drops them.
const SILENT: Duration = Duration::from_secs(5);
/// One of so many heartbeats goes by datagram then, to find out when that is over.
const TRY: u32 = 8;
/// Datagrams that are read in one poll, so that ticks and links get their turn.
const READ_BUDGET: usize = 128;
/// Datagrams of no use in one span, after which the socket is not read until the span is over. The links do without it.
const USELESS: u32 = 500;
const SPAN: Duration = Duration::from_millis(100);
/// How many of the last 64 datagrams must be missing for the next ones to be sent twice, and three times.
const MUCH: u8 = 2;
const VERY_MUCH: u8 = 10;
/// Bytes of entries that go to one member in a second, and at once: a network that loses packets because it is full
/// must not be filled further.
const RATE: f64 = 4e6;
const BURST: f64 = 256e3;

/// The socket and the sessions of all pairs that this node is one of.
pub(super) struct Udp {
    socket: Option<UdpSocket>,
    ways: BTreeMap<NodeId, Way>,
    /// The socket may have more.
    pub readable: bool,
    useless: u32,
    span: Instant,
    scratch: [u8; LARGEST + 1],
}

/// Both directions between this node and another one.
#[derive(Default)]
struct Way {
    there: Option<There>,
    back: Option<Back>,
}

struct There {
    sealer: Sealer,
    to: SocketAddr,
    /// Since when its link is lost.
    lost: Option<Instant>,
    /// What the other end has heard, and when it has last said that it has heard more.
    heard: Heard,
    proven: Option<Instant>,
    /// Since when there was no sign, for the warning.
    since: Instant,
    silent: bool,
    held_back: u32,
    /// When a heartbeat went by the link last.
    by_link: Option<Instant>,
    /// Bytes of entries that may go, as of some time.
    allowance: (f64, Instant),
}

struct Back {
    opener: Opener,
    lost: Option<Instant>,
}

/// Whether a datagram has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    No,
    /// It went beside what goes by the link.
    Too,
    /// The link need not carry it.
    Enough,
}

impl Udp {
    /// Begins without a socket: everything goes by the links.
    pub fn new() -> Self {
        let (ways, span) = (BTreeMap::new(), Instant::now());
        Self { socket: None, ways, readable: false, useless: 0, span, scratch: [0; LARGEST + 1] }
    }

    /// Uses a socket from now on.
    pub fn open(&mut self, socket: UdpSocket) {
        self.socket = Some(socket);
        self.readable = true;
    }

    /// A link to a member is up, which takes datagrams at the address `to`; none if it does not.
    pub fn there(&mut self, peer: NodeId, to: Option<SocketAddr>, tls: &Connection) {
        let local = self.socket.as_ref().and_then(|socket| socket.local_addr().ok());
        let there = local.zip(to).zip(Secret::of(tls)).map(|((local, to), secret)| There {
            sealer: Sealer::new(secret),
            to: reachable(local, to),
            lost: None,
            heard: Heard::default(),
            proven: None,
            since: Instant::now(),
            silent: false,
            held_back: 0,
            by_link: None,
            allowance: (BURST, Instant::now()),
        });
        self.ways.entry(peer).or_default().there = there;
    }

    /// A link from a member is up.
    pub fn back(&mut self, peer: NodeId, tls: &Connection) {
        let secret = self.socket.as_ref().and_then(|_| Secret::of(tls));
        let back = secret.map(|secret| Back { opener: Opener::new(secret), lost: None });
        self.ways.entry(peer).or_default().back = back;
    }

    /// Links of a member are lost, without a farewell.
    pub fn lost(&mut self, peer: NodeId, there: bool, back: bool) {
        let Some(way) = self.ways.get_mut(&peer) else { return };
        let now = Instant::now();
        if let Some(session) = way.there.as_mut().filter(|_| there) {
            session.lost = Some(now);
        }
        if let Some(session) = way.back.as_mut().filter(|_| back) {
            session.lost = Some(now);
        }
    }

    /// A member's process is gone, or it is no member any more.
    pub fn forget(&mut self, peer: NodeId) {
        self.ways.remove(&peer);
    }

    /// True if the socket is to be read at once.
    pub fn has_work(&self) -> bool {
        self.readable && self.socket.is_some() && !self.is_flooded()
    }

    fn is_flooded(&self) -> bool {
        self.useless >= USELESS && self.span.elapsed() < SPAN
    }

    /// True if a member takes datagrams.
    pub fn knows(&self, peer: NodeId) -> bool {
        self.ways.get(&peer).is_some_and(|way| way.there.is_some())
    }

    /// Sends a frame, without its length field, if it is of use.
    pub fn send(&mut self, message: &Message, frame: &[u8]) -> Sent {
        use MessageType::{MsgAppend, MsgAppendResponse, MsgHeartbeat, MsgHeartbeatResponse, MsgSnapshot};
        let Some(socket) = &self.socket else { return Sent::No };
        let Some(Way { there: Some(there), back }) = self.ways.get_mut(&message.to) else { return Sent::No };
        let heard = back.as_ref().map(|back| back.opener.heard()).unwrap_or_default();
        let (now, gaps) = (Instant::now(), there.heard.gaps.max(heard.gaps));
        if there.lost.is_some_and(|lost| now - lost > KEEP) {
            self.ways.entry(message.to).or_default().there = None;
            return Sent::No;
        }
        let proven = there.proven.is_some_and(|at| now - at < PROVEN);
        let copies = match gaps {
            0..MUCH => 1,
            MUCH..VERY_MUCH => 2,
            _ => 3,
        };
        let pulse = matches!(message.msg_type, MsgHeartbeat | MsgHeartbeatResponse);
        match message.msg_type {
            MsgSnapshot => return Sent::No,
            // TCP serves them as well, unless it waits for what was lost.
            MsgAppend | MsgAppendResponse if gaps == 0 => return Sent::No,
            _ if !Sealer::fits(frame.len()) => return Sent::No,
            MsgAppend if !there.affords(copies * frame.len(), now) => return Sent::No,
            _ if pulse && there.is_silent(message.to, now) && !there.is_turn() => return Sent::No,
            _ => {}
        }
        // The next heartbeat is a copy, too.
        let copies = if pulse { copies.div_ceil(2) } else { copies };
        there.sealer.seal(heard, frame, copies, |datagram| {
            // Whatever keeps it from leaving counts as a loss on the way.
            let _ = socket.send_to(datagram, there.to);
        });
        if pulse && proven && !there.is_due_by_link(now) { Sent::Enough } else { Sent::Too }
    }

    /// Reads what is there and gives what is of use to `take`.
    pub fn receive(&mut self, mut take: impl FnMut(Message)) {
        if !self.has_work() {
            return;
        }
        if self.span.elapsed() >= SPAN {
            (self.span, self.useless) = (Instant::now(), 0);
        }
        for _ in 0..READ_BUDGET {
            let Some(socket) = &self.socket else { return };
            let length = match socket.recv_from(&mut self.scratch) {
                Ok((length, _)) => length,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return self.readable = false,
                // This concerns something sent before, not a datagram that is there.
                Err(_) => continue,
            };
            match self.open_datagram(length) {
                Ok(Some(message)) => take(message),
                Ok(None) => {}
                Err(flaw) => {
                    self.useless += 1;
                    counter!(telemetry::PEER_DATAGRAMS_DROPPED, "why" => word(flaw)).increment(1);
                    if self.is_flooded() {
                        return;
                    }
                }
            }
        }
    }

    fn open_datagram(&mut self, length: usize) -> Result<Option<Message>, Flaw> {
        let datagram = &mut self.scratch[..length];
        let session = session_of(datagram).ok_or(Flaw::Unknown)?;
        let of = |way: &Way| way.back.as_ref().is_some_and(|back| back.opener.session() == session);
        let (peer, way) = self.ways.iter_mut().find(|(_, way)| of(way)).ok_or(Flaw::Unknown)?;
        let Some(back) = way.back.as_mut() else { return Err(Flaw::Unknown) };
        if back.lost.is_some_and(|lost| lost.elapsed() > KEEP) {
            way.back = None;
            return Err(Flaw::Unknown);
        }
        let opened = back.opener.open(datagram)?;
        if let Some(there) = &mut way.there {
            there.note(*peer, opened.heard);
        }
        match opened.frame.map(|frame| Frame::decode(&frame)) {
            None => Ok(None),
            // It could only keep a voter waiting for a primary that has gone.
            Some(Ok(Frame::Raft(message))) if opened.overtaken && message.msg_type == MessageType::MsgHeartbeat => {
                Ok(None)
            }
            Some(Ok(Frame::Raft(message))) if message.from == *peer && travels(&message) => Ok(Some(*message)),
            Some(_) => Err(Flaw::Malformed),
        }
    }

    /// Members that take datagrams and have not said for a while that any of this node's came.
    pub fn unheard(&self) -> impl Iterator<Item = NodeId> {
        self.ways.iter().filter(|(_, way)| way.there.as_ref().is_some_and(|there| there.silent)).map(|(peer, _)| *peer)
    }
}

impl There {
    /// The other end says what it has heard.
    fn note(&mut self, peer: NodeId, heard: Heard) {
        let more = heard.session == self.sealer.session()
            && heard.number > self.heard.number
            && heard.number <= self.sealer.number();
        if more {
            (self.heard, self.proven, self.since) = (heard, Some(Instant::now()), Instant::now());
            if std::mem::take(&mut self.silent) {
                info!(peer, "datagrams reach this node again");
            }
        }
    }

    fn is_silent(&mut self, peer: NodeId, now: Instant) -> bool {
        if now - self.since > SILENT && self.sealer.number() > self.heard.number + 64 && !self.silent {
            self.silent = true;
            info!(
                peer,
                to = %self.to,
                "no datagram to this node is answered: does a firewall drop UDP? Everything goes on by TCP, but \
                 when packets get lost, only datagrams would save the role"
            );
        }
        self.silent
    }

    fn affords(&mut self, bytes: usize, now: Instant) -> bool {
        let (left, at) = self.allowance;
        let left = (left + RATE * (now - at).as_secs_f64()).min(BURST);
        let affords = left >= bytes as f64;
        self.allowance = (if affords { left - bytes as f64 } else { left }, now);
        affords
    }

    fn is_turn(&mut self) -> bool {
        self.held_back = (self.held_back + 1) % TRY;
        self.held_back == 0
    }

    fn is_due_by_link(&mut self, now: Instant) -> bool {
        let due = self.by_link.is_none_or(|at| now - at >= PROVEN);
        if due {
            self.by_link = Some(now);
        }
        due
    }
}

/// What may come by datagram.
fn travels(message: &Message) -> bool {
    message.msg_type != MessageType::MsgSnapshot
}

/// A socket for both families takes addresses of the older one in the form of the newer.
fn reachable(local: SocketAddr, to: SocketAddr) -> SocketAddr {
    match to.ip() {
        IpAddr::V4(ip) if local.is_ipv6() => SocketAddr::new(ip.to_ipv6_mapped().into(), to.port()),
        _ => to,
    }
}

fn word(flaw: Flaw) -> &'static str {
    match flaw {
        Flaw::Unknown => "unknown",
        Flaw::Forged => "forged",
        Flaw::Repeated => "repeated",
        Flaw::Malformed => "malformed",
    }
}
