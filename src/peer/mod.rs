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
pub mod codec;
mod dial;
mod hello;
mod link;
mod links;

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    sync::Arc,
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{sync::watch, task::JoinSet};

pub use self::{
    codec::{LeaseTerms, NodeReport},
    links::{LinkSender, Links, LinksConfig, PeerEvent},
};
use crate::{
    cluster::{Membership, NodeId},
    pki::NodeTls,
};

/// Connections that wait in the kernel to be accepted.
const BACKLOG: i32 = 128;

/// Who this node is, for the handshakes.
pub struct PeerIdentity {
    pub me: NodeId,
    /// Program version, told to the others.
    pub version: String,
    /// The cluster, and all members with the addresses to dial, this node included.
    pub membership: Membership,
    /// The address that this node dials from; any if none.
    pub bind: Option<IpAddr>,
    /// This node's spans; callers whose spans do not fit are refused.
    pub terms: LeaseTerms,
    pub tls: NodeTls,
}

/// Opens the HA port. Do this before [`run`], and before anything that should be undone if the port is taken.
///
/// # Errors
/// What the kernel says, e.g. address in use.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
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
    let expected = (identity.membership.cluster, identity.me);
    if identity.tls.identity != expected {
        let (cluster, node) = identity.tls.identity;
        let text = format!(
            "this host's certificate is of node {node} in cluster {cluster}, but this is node {} in cluster {}",
            expected.1, expected.0
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let complaints = Arc::new(hello::Complaints::default());
    let mut tasks = JoinSet::new();
    tasks.spawn(accept::run(listener, identity.clone(), sender.clone(), complaints.clone()));
    for member in identity.membership.members.iter().filter(|member| member.id != identity.me) {
        if let Some(dialler) = dial::Dialler::new(member.clone(), &identity, &sender, &complaints) {
            tasks.spawn(dialler.run());
        }
    }
    // The tasks have no end of their own; an error here only says that nobody can ask for the end any more.
    let _ = shutdown.wait_for(|stop| *stop).await;
    tasks.shutdown().await;
    Ok(())
}
