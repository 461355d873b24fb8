//! Accepts links from other members: TLS, hello, hand-over. Must never let strangers hold more than a few handshakes,
//! or spin when the process is out of file descriptors.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tracing::{debug, info, warn};

use super::{
    PeerIdentity,
    codec::{CodecError, Frame, Hello, HelloReply, PROTOCOL_VERSION},
    hello::{Complaints, HANDSHAKE, Subject, certified, explain, read_frame, shortened, tune, write_frame},
    link::Established,
    links::{Handover, LinkSender},
};
use crate::{cluster::NodeId, cluster::command::FORMAT_VERSION};

/// Handshakes under way at one time; the next ones wait in the kernel.
const HANDSHAKES: usize = 16;
/// Pause after accept failed, e.g. for want of file descriptors: it would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(super) async fn run(
    listener: TcpListener,
    identity: Arc<PeerIdentity>,
    sender: LinkSender,
    complaints: Arc<Complaints>,
) {
    let mut handshakes = JoinSet::new();
    let mut failing = false;
    loop {
        while handshakes.try_join_next().is_some() {}
        if handshakes.len() >= HANDSHAKES {
            handshakes.join_next().await;
        }
        match listener.accept().await {
            Ok((stream, from)) => {
                failing = false;
                let call = Call { identity: identity.clone(), complaints: complaints.clone(), from };
                handshakes.spawn(call.answer(stream, sender.clone()));
            }
            // A connection that died while it waited says nothing about the listener.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                if !failing {
                    warn!(%error, "cannot accept connections of other nodes");
                }
                failing = true;
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Why a call was not answered.
enum Refusal {
    /// The connection ended before it said anything useful: a probe, or a node that stopped.
    Gone(io::Error),
    /// Refused, with the reason to log.
    Because(Subject, String),
}

struct Call {
    identity: Arc<PeerIdentity>,
    complaints: Arc<Complaints>,
    from: SocketAddr,
}

impl Call {
    async fn answer(self, stream: TcpStream, sender: LinkSender) {
        let result = timeout(HANDSHAKE, self.handshake(stream)).await;
        let (peer, link) = match result {
            Ok(Ok(accepted)) => accepted,
            Ok(Err(Refusal::Gone(error))) => {
                debug!(from = %self.from, %error, "a connection ended during the handshake");
                return;
            }
            Ok(Err(Refusal::Because(subject, reason))) => {
                if self.complaints.is_new(subject, &reason) {
                    match subject {
                        Subject::Caller(peer) => warn!(peer, from = %self.from, reason, "refused a link of this node"),
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
        if !sender.hand_over(Handover::Inbound(peer, link)) {
            debug!(peer, "the consensus loop takes no new link");
        }
    }

    async fn handshake(&self, stream: TcpStream) -> Result<(NodeId, Established), Refusal> {
        tune(&stream).map_err(Refusal::Gone)?;
        let stranger = Subject::Stranger(self.from.ip());
        let failed = |error| match explain(&error) {
            Some(reason) => Refusal::Because(stranger, reason),
            None => Refusal::Gone(error),
        };
        let acceptor = TlsAcceptor::from(self.identity.tls.server.clone());
        let mut stream = acceptor.accept(stream).await.map_err(failed)?;
        let caller = certified(self.identity.membership.cluster, stream.get_ref().1.peer_certificates());
        let hello = read_frame(&mut stream).await.map_err(failed)?;
        let verdict = match &caller {
            Ok(peer) => self.check(*peer, hello),
            Err(reason) => Err(reason.clone()),
        };
        match (verdict, caller) {
            (Ok(()), Ok(peer)) => {
                write_frame(&mut stream, &Frame::HelloReply(HelloReply::Accepted)).await.map_err(failed)?;
                let (socket, tls) = stream.into_inner();
                Ok((peer, Established { socket: socket.into_std().map_err(Refusal::Gone)?, tls: tls.into() }))
            }
            (verdict, caller) => {
                let reason = verdict.err().unwrap_or_default();
                refuse(stream, &reason).await;
                Err(Refusal::Because(caller.map_or(stranger, Subject::Caller), reason))
            }
        }
    }

    /// Compares what the caller says with what its certificate says and what this node knows.
    fn check(&self, certified: NodeId, hello: Result<Frame, CodecError>) -> Result<(), String> {
        let hello = match hello {
            Ok(Frame::Hello(hello)) => hello,
            Ok(_) => return Err("the first frame is not a hello".to_owned()),
            Err(CodecError::Version(theirs)) => {
                return Err(format!(
                    "protocol version {theirs}, but node {} knows {PROTOCOL_VERSION}: bring both to the same release",
                    self.identity.me
                ));
            }
            Err(error) => return Err(error.to_string()),
        };
        let Hello { cluster, from, to, data_format, terms, .. } = hello;
        let ours = &self.identity.membership;
        if cluster != ours.cluster {
            return Err(format!("the caller is of cluster {cluster}, this is cluster {}", ours.cluster));
        }
        if from != certified {
            return Err(format!("the caller says that it is node {from}, its certificate is of node {certified}"));
        }
        if to != self.identity.me {
            return Err(format!("the caller wants node {to}, this is node {}", self.identity.me));
        }
        if from == self.identity.me || ours.get(from).is_none() {
            return Err(format!("node {from} is not another member of this cluster"));
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
        Ok(())
    }
}

/// Tells the caller why, as well as that is possible: it may be gone.
async fn refuse(mut stream: TlsStream<TcpStream>, reason: &str) {
    let reply = Frame::HelloReply(HelloReply::Refused(shortened(reason.to_owned())));
    if write_frame(&mut stream, &reply).await.is_ok() {
        let _ = stream.shutdown().await;
    }
}
