//! Reaches another member: addresses, TCP, TLS and hello, for links and for streams of other purposes. Must never wait
//! without a limit, and never take a node for the one it wants without its certificate.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use thiserror::Error;
use tokio::{
    net::{TcpSocket, TcpStream, lookup_host},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    PeerIdentity,
    codec::{Frame, Hello, HelloReply, PROTOCOL_VERSION, Purpose, Refusal, RefusalCode},
    hello::{HANDSHAKE, INCARNATION, certified, explain, read_frame, shortened, tune, write_frame},
};
use crate::{
    cluster::{
        Member,
        level::{FIRST_LEVEL, FORMAT_VERSION},
    },
    pki::NodeTls,
};

/// Time for resolving a name, and for each TCP connect.
const CONNECT: Duration = Duration::from_secs(1);

/// Why there is no connection to a member.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OpenError {
    /// No connection, or it ended: the network, or a host or process that is down.
    #[error("{0}")]
    Unreachable(String),
    /// One side refused the other.
    #[error("{0}")]
    Refused(Refusal),
}

/// Why an attempt failed.
pub(super) enum Failure {
    /// The host's kernel answered that nobody listens.
    NobodyListens,
    Other(OpenError),
}

impl Failure {
    pub fn unreachable(reason: impl Into<String>) -> Self {
        Self::Other(OpenError::Unreachable(reason.into()))
    }

    fn refused(reason: impl Into<String>) -> Self {
        Self::Other(OpenError::Refused(Refusal::other(reason)))
    }
}

/// Opens an authenticated connection to a member, which has accepted it for `purpose`. TLS 1.3 with both certificates;
/// what is said on it is up to the two ends. Takes some seconds at most. Not for links: [`super::run`] makes those by
/// itself.
///
/// # Errors
/// [`OpenError::Unreachable`] when there is no connection, or it ended: another attempt may succeed.
/// [`OpenError::Refused`] when one side refused the other, with the reason.
pub async fn open_stream(
    identity: &PeerIdentity,
    member: &Member,
    purpose: Purpose,
) -> Result<TlsStream<TcpStream>, OpenError> {
    match open(identity, member, purpose, |_| ()).await {
        Ok(opened) => Ok(opened.stream),
        Err(Failure::Other(error)) => Err(error),
        Err(Failure::NobodyListens) => {
            let (name, place) = (&member.name, member.place());
            Err(OpenError::Unreachable(format!("nobody listens on {place} of {name}: does twistlockd run there?")))
        }
    }
}

/// An authenticated connection that the other side has accepted.
pub(super) struct Opened {
    pub address: SocketAddr,
    pub stream: TlsStream<TcpStream>,
    /// It takes datagrams at that address.
    pub datagrams: bool,
}

/// Does what [`open_stream`] does, and tells `nobody_listens` each address where nobody listens.
pub(super) async fn open(
    identity: &PeerIdentity,
    member: &Member,
    purpose: Purpose,
    nobody_listens: impl Fn(SocketAddr),
) -> Result<Opened, Failure> {
    let (address, stream) = connect_any(identity, member, nobody_listens).await?;
    match timeout(HANDSHAKE, handshake(identity, member, purpose, stream)).await {
        Ok(result) => result.map(|(stream, datagrams)| Opened { address, stream, datagrams }),
        Err(_) => Err(Failure::unreachable("the handshake took too long")),
    }
}

/// Connects to the first of the member's addresses that answers. Names are resolved anew each time.
async fn connect_any(
    identity: &PeerIdentity,
    member: &Member,
    nobody_listens: impl Fn(SocketAddr),
) -> Result<(SocketAddr, TcpStream), Failure> {
    let host = (member.address.as_str(), member.port);
    let (mut addresses, mut failure) = match timeout(CONNECT, lookup_host(host)).await {
        Ok(Ok(found)) => {
            (found.collect::<Vec<_>>(), Failure::unreachable("its name has no address that this node can dial"))
        }
        Ok(Err(error)) => (Vec::new(), Failure::unreachable(error.to_string())),
        Err(_) => (Vec::new(), Failure::unreachable("resolving its name took too long")),
    };
    let caller = identity.roster.caller(member).map(|ip| SocketAddr::new(ip, member.port));
    addresses.extend(caller.filter(|caller| !addresses.contains(caller)));
    for address in addresses.into_iter().filter(|address| bind_for(identity, address).is_ok()) {
        failure = match timeout(CONNECT, connect(identity, address)).await {
            Ok(Ok(stream)) => return Ok((address, stream)),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                nobody_listens(address);
                Failure::NobodyListens
            }
            Ok(Err(error)) => Failure::unreachable(error.to_string()),
            Err(_) => Failure::unreachable("connecting took too long"),
        };
    }
    Err(failure)
}

/// The address to dial from, or an error if it is of another family.
fn bind_for(identity: &PeerIdentity, address: &SocketAddr) -> io::Result<Option<IpAddr>> {
    match identity.bind {
        Some(bind) if bind.is_ipv4() != address.is_ipv4() => Err(io::ErrorKind::Unsupported.into()),
        bind => Ok(bind.filter(|bind| !bind.is_unspecified())),
    }
}

/// Connects from this node's own address.
pub(super) async fn connect(identity: &PeerIdentity, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(bind) = bind_for(identity, &address)? {
        socket.bind(SocketAddr::new(bind, 0))?;
    }
    socket.connect(address).await
}

async fn handshake(
    identity: &PeerIdentity,
    member: &Member,
    purpose: Purpose,
    stream: TcpStream,
) -> Result<(TlsStream<TcpStream>, bool), Failure> {
    let failed = |error: io::Error| match explain(&error) {
        Some(reason) => Failure::refused(reason),
        None => Failure::unreachable(format!("the handshake failed: {error}")),
    };
    tune(&stream, purpose).map_err(failed)?;
    let connector = TlsConnector::from(identity.tls.borrow().client.clone());
    let mut stream = connector.connect(NodeTls::peer_name(), stream).await.map_err(failed)?;
    let cluster = identity.roster.cluster();
    let node = certified(cluster, stream.get_ref().1.peer_certificates()).map_err(Failure::refused)?;
    if node != member.id {
        let reason = format!("the certificate there is of node {node}, expected is node {}", member.id);
        return Err(Failure::refused(reason));
    }
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        cluster,
        from: identity.me,
        to: node,
        data_format: FORMAT_VERSION,
        terms: identity.terms,
        purpose,
        incarnation: *INCARNATION,
        version: identity.version.clone(),
        reached: identity.roster.own(identity.me),
        level: identity.level_for(stream.get_ref().1.alpn_protocol()),
        standing: identity.standing,
        compares: true,
    };
    // In TLS 1.3 the other side checks our certificate after our side is done: a failed write may have an alert
    // waiting that says why, so the answer is read in any case.
    let written = write_frame(&mut stream, &Frame::Hello(hello)).await;
    match read_frame(&mut stream).await.and_then(|reply| written.map(|()| reply)).map_err(failed)? {
        Ok(Frame::HelloReply(HelloReply::Accepted { level, datagrams })) => {
            check_level(identity, member, level.unwrap_or(FIRST_LEVEL)).map_err(Failure::refused)?;
            Ok((stream, datagrams))
        }
        Ok(Frame::HelloReply(HelloReply::Refused(Refusal { code, reason }))) => {
            let reason = match code {
                RefusalCode::Other => format!("it refuses this node: {}", shortened(reason)),
                RefusalCode::Removed | RefusalCode::Busy | RefusalCode::Outdated | RefusalCode::Forgot => {
                    shortened(reason)
                }
            };
            Err(Failure::Other(OpenError::Refused(Refusal { code, reason })))
        }
        Ok(_) => Err(Failure::refused("its answer is not one to a hello")),
        Err(error) => Err(Failure::refused(error.to_string())),
    }
}

/// Refuses a member whose program does not have what the cluster relies on: it is not sent anything, either.
fn check_level(identity: &PeerIdentity, member: &Member, has: u32) -> Result<(), String> {
    let ours = identity.roster.membership();
    if has >= ours.shared.level {
        return Ok(());
    }
    Err(format!(
        "the program of {} has feature level {has}, but the cluster runs level {}: install version {} or newer there",
        member.name, ours.shared.level, ours.shared.level_version
    ))
}
