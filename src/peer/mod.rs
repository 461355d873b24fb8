//! TALKS. Links between nodes: mutual TLS 1.3, a small versioned encoding, bounded queues. Must never decide anything
//! about roles, and never let what a peer sends grow memory beyond its limits.
//!
//! Every node dials every other one, from its own address, and only *sends* on that link; it only *receives* on links
//! that others dialled. So each direction fails and recovers by itself, and a reader never waits for a writer.
//!
//! The work is split in two. [`run`] lives on tokio: it accepts, dials, and does the TLS and hello handshakes, which
//! may be slow. Established links are handed to [`Links`], which the consensus loop's own thread owns and polls:
//! heartbeats and commits take no hop through a runtime and do not suffer from what else runs there.
//!
//! Beside the links go datagrams (UDP on the HA port's number, `udp` and `datagram`): heartbeats and their answers,
//! votes, and, while packets get lost, small entries and their answers. They are a second way and never the only one: a
//! member whose program or firewall does not let them in is reached by the links alone. The answer to a hello says who
//! takes them.
//!
//! Both halves follow the membership. [`run`] watches it and dials whom it names; the loop calls [`Links::set_peers`].
//! Either may be first: a member that is not yet in both is refused, or waits. A caller says where it is reached by its
//! own membership: a node that has missed the change of an address dials what it was told until it has caught up
//! ([`Roster`]).
//!
//! # Dead processes
//! A process that is killed loses all links at once, without TLS close_notify, and its host's kernel then answers
//! "connection refused" on its HA port. [`PeerEvent::Dead`] is reported when all of this holds for a peer: a link was
//! up since its last death or farewell, no link in either direction is up now, and a connection to its HA port was
//! refused. Elections may rest on it, so know what it assumes:
//! - the member's address and HA port belong to its host and to twistlockd: no address translation, no proxy, no other
//!   host that takes the address over while the member runs;
//! - nothing on the way forges refusals for a live process: a firewall must *drop* what it blocks. A rule that rejects
//!   with a TCP reset, put into place while links are up, looks exactly like a death;
//! - the listening socket lives as long as the process: whoever binds it ([`listen`]) keeps it open until the last
//!   moment, and a planned stop says farewell first ([`Links::shutdown`]).

mod accept;
mod assembler;
pub mod codec;
mod connect;
mod datagram;
mod dial;
mod duplicates;
mod hello;
mod link;
mod links;
mod memory;
mod roster;
mod udp;

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    sync::Arc,
};

use tokio::{
    net::TcpStream,
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
};
use tokio_rustls::server::TlsStream;

pub use self::{
    codec::{Condition, LeaseTerms, NodeReport, Purpose, Reached, Refusal, RefusalCode, Remembers, ReportExtension},
    connect::{OpenError, open_stream},
    links::{LinkSender, Links, LinksConfig, PeerEvent},
    memory::Memory,
    roster::{Edition, Roster},
};
use crate::{
    clients,
    cluster::{Member, NodeId, reach::Standing},
    pki::{EXTENSIBLE, NodeTls},
};

/// Connections that wait in the kernel to be accepted.
const BACKLOG: i32 = 1024;

/// Who this node is, for the handshakes.
pub struct PeerIdentity {
    pub me: NodeId,
    /// Program version, told to the others.
    pub version: String,
    /// The cluster, and all members with the addresses to dial. Its changes are followed.
    pub roster: Roster,
    /// The address that this node dials from; any if none.
    pub bind: Option<IpAddr>,
    /// This node's spans; callers whose spans do not fit are refused.
    pub terms: LeaseTerms,
    /// Settings for the handshakes that begin from now on.
    pub tls: watch::Receiver<Arc<NodeTls>>,
    /// Takes the calls of members that want a snapshot. While it is full, they are told to try again.
    pub snapshots: mpsc::Sender<StreamCall>,
    /// Takes the calls of members that want a cluster key.
    pub keys: mpsc::Sender<StreamCall>,
    /// Takes the calls of members that ask something.
    pub questions: mpsc::Sender<StreamCall>,
    /// What this node's program can do: see [`crate::cluster::level`].
    pub level: u32,
    /// What this node had of what it must remember when its process started.
    pub standing: Standing,
    /// What this node remembers of the others.
    pub memory: Memory,
}

impl PeerIdentity {
    /// What this node says about its program to an end of a TLS connection that speaks `protocol`.
    fn level_for(&self, protocol: Option<&[u8]>) -> Option<u32> {
        (protocol == Some(EXTENSIBLE)).then_some(self.level)
    }
}

/// A member that wants a stream of its own: its call was accepted, what follows is up to the one who takes it.
pub struct StreamCall {
    /// The member, proven by its certificate.
    pub from: NodeId,
    /// It lost some of its durable memory and begins again.
    pub forgotten: bool,
    /// It can say which pages of a database it has.
    pub compares: bool,
    pub stream: TlsStream<TcpStream>,
}

/// Opens the HA port. Do this before [`run`], and before anything that should be undone if the port is taken.
///
/// # Errors
/// When the kernel refuses, e.g. because the address is in use.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = clients::bind(address)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Opens the same port for datagrams, for [`Links::use_datagrams`].
///
/// # Errors
/// When the kernel refuses, e.g. because the address is in use. Everything goes by the links then.
pub fn listen_for_datagrams(address: SocketAddr) -> io::Result<UdpSocket> {
    UdpSocket::bind(address)
}

/// Accepts and dials until `shutdown` turns true (or its sender is gone), and hands established links to `sender`.
/// Returns with the listener closed; links that were handed over go on.
///
/// # Errors
/// When the listener cannot be used, or the node's certificate is not this node's ([`io::ErrorKind::InvalidInput`]).
pub async fn run(
    listener: TcpListener,
    identity: Arc<PeerIdentity>,
    sender: LinkSender,
    mut shutdown: watch::Receiver<bool>,
) -> io::Result<()> {
    let expected = (identity.roster.cluster(), identity.me);
    let (cluster, node) = identity.tls.borrow().identity;
    if (cluster, node) != expected {
        let text = format!(
            "this host's certificate is of node {node} in cluster {cluster}, but this is node {} in cluster {}",
            expected.1, expected.0
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let complaints = Arc::new(hello::Complaints::default());
    let mut accepting = JoinSet::new();
    accepting.spawn(accept::run(listener, identity.clone(), sender.clone(), complaints.clone()));
    let (mut editions, mut told) = identity.roster.changes();
    let mut diallers = Diallers { dialled: BTreeMap::new(), tasks: JoinSet::new(), identity, sender, complaints };
    // Neither the tasks nor the membership have an end of their own; an error of `shutdown` only says that nobody can
    // ask for the end any more.
    let dialling = async {
        loop {
            editions.mark_unchanged();
            told.mark_unchanged();
            diallers.dial_members();
            tokio::select! {
                Ok(()) = editions.changed() => {}
                Ok(()) = told.changed() => {}
                else => std::future::pending().await,
            }
        }
    };
    tokio::select! {
        _ = shutdown.wait_for(|stop| *stop) => {}
        () = dialling => {}
    }
    diallers.tasks.shutdown().await;
    accepting.shutdown().await;
    Ok(())
}

/// One task per other member.
struct Diallers {
    dialled: BTreeMap<NodeId, (Member, AbortHandle)>,
    tasks: JoinSet<()>,
    identity: Arc<PeerIdentity>,
    sender: LinkSender,
    complaints: Arc<hello::Complaints>,
}

impl Diallers {
    /// Dials all other members at the addresses that they have now, and nobody else.
    fn dial_members(&mut self) {
        let members = self.identity.roster.others(self.identity.me);
        // Those that were stopped at earlier changes.
        while self.tasks.try_join_next().is_some() {}
        let place = |member: &Member| (member.name.clone(), member.address.clone(), member.port);
        self.dialled.retain(|id, (member, task)| {
            let stays = members.iter().any(|now| now.id == *id && place(now) == place(member));
            if !stays {
                task.abort();
            }
            stays
        });
        for member in members {
            if !self.dialled.contains_key(&member.id) {
                let (identity, sender) = (self.identity.clone(), self.sender.clone());
                let task = self.tasks.spawn(dial::run(member.clone(), identity, sender, self.complaints.clone()));
                self.dialled.insert(member.id, (member, task));
            }
        }
    }
}
