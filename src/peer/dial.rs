//! Dials the other members: connect, TLS, hello, hand-over, and again when a link is lost. Finds out whether a peer
//! that vanished is dead. Must never retry without a pause, or suspect a peer that said farewell.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use socket2::SockRef;
use tokio::{
    net::{TcpSocket, TcpStream, lookup_host},
    sync::watch,
    time::{sleep, timeout},
};
use tokio_rustls::TlsConnector;
use tracing::{debug, info, warn};

use super::{
    PeerIdentity,
    codec::{Frame, Hello, HelloReply, PROTOCOL_VERSION},
    hello::{Complaints, HANDSHAKE, Subject, certified, explain, read_frame, shortened, tune, write_frame},
    link::Established,
    links::{Handover, LinkSender, Signal},
};
use crate::{
    cluster::{Member, command::FORMAT_VERSION},
    pki::NodeTls,
};

/// Time for resolving a name, and for each TCP connect.
const CONNECT: Duration = Duration::from_secs(1);
/// First and longest pause between attempts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// A link that lasted for this long counts as a good one: after it, dialling starts without a pause.
const STEADY: Duration = Duration::from_secs(1);
/// How long, and how often, a peer whose links dropped is probed. Its port may outlive it by some milliseconds: the
/// port guard holds the socket too and dies only after it.
const PROBE_FOR: Duration = Duration::from_millis(100);
const PROBE_EVERY: Duration = Duration::from_millis(2);

/// Why an attempt failed.
enum Failure {
    /// The host's kernel answered that nobody listens.
    NobodyListens,
    /// No connection, or it ended: the network, or a host or process that is down.
    Unreachable(String),
    /// One side refused the other: needs an administrator.
    Refused(String),
}

/// Keeps one member dialled.
pub(super) struct Dialler {
    member: Member,
    identity: Arc<PeerIdentity>,
    sender: LinkSender,
    complaints: Arc<Complaints>,
    signal: watch::Receiver<Signal>,
    /// Where the last link went, for probes.
    last: Option<SocketAddr>,
}

impl Dialler {
    /// `None` for a member that [`super::Links`] does not know.
    pub fn new(
        member: Member,
        identity: &Arc<PeerIdentity>,
        sender: &LinkSender,
        complaints: &Arc<Complaints>,
    ) -> Option<Self> {
        let signal = sender.signal(member.id)?.subscribe();
        let (identity, sender, complaints) = (identity.clone(), sender.clone(), complaints.clone());
        Some(Self { member, identity, sender, complaints, signal, last: None })
    }

    /// Dials, hands over, waits until the link is lost, and begins again. Never ends.
    pub async fn run(mut self) {
        let mut pause = PAUSE.0;
        let mut lost = false;
        loop {
            let mut before = *self.signal.borrow_and_update();
            let result = if lost && before.alive { self.dial_and_probe().await } else { self.dial().await };
            lost = false;
            match result {
                Ok((address, link)) => {
                    self.last = Some(address);
                    let start = Instant::now();
                    if self.establish(address, link).await && start.elapsed() > STEADY {
                        pause = PAUSE.0;
                        lost = true;
                        continue;
                    }
                    // A link that was lost so soon may be lost again: look after the peer's life, but do not hurry.
                    before = *self.signal.borrow_and_update();
                    if before.alive && !before.up {
                        self.probe().await;
                    }
                }
                Err(failure) => self.complain(failure),
            }
            // Jitter keeps the members from dialling each other in step.
            let jittered = pause.mul_f64(rand::random_range(0.5..1.0));
            let nudged = self.signal.wait_for(|signal| signal.nudges != before.nudges);
            if timeout(jittered, nudged).await.is_ok() {
                // At once when the peer calls, but not in a circle when links come and go.
                sleep(PROBE_EVERY).await;
            }
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// Hands a link over and waits until it is lost. False if the loop did not take it.
    async fn establish(&mut self, address: SocketAddr, link: Established) -> bool {
        let (peer, name) = (self.member.id, &self.member.name);
        let Some(signal) = self.sender.signal(peer) else { return false };
        // Before the hand-over: the loop may lose the link before this task runs again.
        signal.send_modify(|signal| (signal.up, signal.alive) = (true, true));
        if !self.sender.hand_over(Handover::Outbound(peer, link)) {
            signal.send_modify(|signal| signal.up = false);
            return false;
        }
        self.complaints.settle(Subject::Dialled(peer));
        info!(peer, name, %address, "linked");
        // An error would mean that the sender is gone, but this task holds it.
        let _ = self.signal.wait_for(|signal| !signal.up).await;
        true
    }

    fn complain(&self, failure: Failure) {
        let (peer, address) = (self.member.id, format!("{}:{}", self.member.address, self.member.port));
        let subject = Subject::Dialled(peer);
        match failure {
            Failure::Refused(reason) if self.complaints.is_new(subject, &reason) => {
                warn!(peer, address, reason, "cannot link with this node");
            }
            Failure::Unreachable(reason) if self.complaints.is_new(subject, &reason) => {
                info!(peer, address, reason, "cannot reach this node, trying again");
            }
            Failure::NobodyListens if self.complaints.is_new(subject, "connection refused") => {
                info!(peer, address, reason = "connection refused", "cannot reach this node, trying again");
            }
            Failure::Refused(reason) | Failure::Unreachable(reason) => debug!(peer, reason, "still no link"),
            Failure::NobodyListens => debug!(peer, "still no link"),
        }
    }

    /// One attempt, and beside it a look at whether the peer is dead: only a TLS handshake proves it alive, since a
    /// dead process's port may accept connections for a moment.
    async fn dial_and_probe(&self) -> Result<(SocketAddr, Established), Failure> {
        let (probe, dial) = (self.probe(), self.dial());
        tokio::pin!(probe, dial);
        tokio::select! {
            biased;
            dead = &mut probe => if dead { Err(Failure::NobodyListens) } else { dial.await },
            result = &mut dial => match result {
                Err(_) if probe.await => Err(Failure::NobodyListens),
                result => result,
            },
        }
    }

    /// True as soon as the peer is known to be dead; false if that did not turn out in time.
    async fn probe(&self) -> bool {
        let Some(address) = self.last else { return false };
        let end = Instant::now() + PROBE_FOR;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            match timeout(left, self.connect(address)).await {
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    // The attempt beside this one may have come to the same verdict before.
                    if self.sender.condemn(self.member.id) || !self.signal.borrow().alive {
                        return true;
                    }
                }
                // A reset instead of an orderly end leaves nothing behind in either kernel.
                Ok(Ok(stream)) => drop(SockRef::from(&stream).set_linger(Some(Duration::ZERO))),
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => {}
                Ok(Err(_)) | Err(_) => return false,
            }
            sleep(PROBE_EVERY).await;
        }
    }

    async fn dial(&self) -> Result<(SocketAddr, Established), Failure> {
        let (address, stream) = self.connect_any().await?;
        match timeout(HANDSHAKE, self.handshake(stream)).await {
            Ok(result) => result.map(|link| (address, link)),
            Err(_) => Err(Failure::Unreachable("the handshake took too long".to_owned())),
        }
    }

    /// Connects to the first of the member's addresses that answers. Names are resolved anew each time.
    async fn connect_any(&self) -> Result<(SocketAddr, TcpStream), Failure> {
        let host = (self.member.address.as_str(), self.member.port);
        let addresses = match timeout(CONNECT, lookup_host(host)).await {
            Ok(Ok(addresses)) => addresses,
            Ok(Err(error)) => return Err(Failure::Unreachable(error.to_string())),
            Err(_) => return Err(Failure::Unreachable("resolving its name took too long".to_owned())),
        };
        let mut failure = Failure::Unreachable("its name has no address that this node can dial".to_owned());
        for address in addresses.filter(|address| self.bind_for(address).is_ok()) {
            failure = match timeout(CONNECT, self.connect(address)).await {
                Ok(Ok(stream)) => return Ok((address, stream)),
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    // Only where the last link went: another address of the name may never have been the member's.
                    if self.last == Some(address) {
                        self.sender.condemn(self.member.id);
                    }
                    Failure::NobodyListens
                }
                Ok(Err(error)) => Failure::Unreachable(error.to_string()),
                Err(_) => Failure::Unreachable("connecting took too long".to_owned()),
            };
        }
        Err(failure)
    }

    /// The address to dial from, or an error if it is of another family.
    fn bind_for(&self, address: &SocketAddr) -> io::Result<Option<IpAddr>> {
        match self.identity.bind {
            Some(bind) if bind.is_ipv4() != address.is_ipv4() => Err(io::ErrorKind::Unsupported.into()),
            bind => Ok(bind.filter(|bind| !bind.is_unspecified())),
        }
    }

    async fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if let Some(bind) = self.bind_for(&address)? {
            socket.bind(SocketAddr::new(bind, 0))?;
        }
        socket.connect(address).await
    }

    async fn handshake(&self, stream: TcpStream) -> Result<Established, Failure> {
        let failed = |error: io::Error| match explain(&error) {
            Some(reason) => Failure::Refused(reason),
            None => Failure::Unreachable(format!("the handshake failed: {error}")),
        };
        tune(&stream).map_err(failed)?;
        let connector = TlsConnector::from(self.identity.tls.client.clone());
        let mut stream = connector.connect(NodeTls::peer_name(), stream).await.map_err(failed)?;
        let cluster = self.identity.membership.cluster;
        let node = certified(cluster, stream.get_ref().1.peer_certificates()).map_err(Failure::Refused)?;
        if node != self.member.id {
            let reason = format!("the certificate there is of node {node}, expected is node {}", self.member.id);
            return Err(Failure::Refused(reason));
        }
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            cluster,
            from: self.identity.me,
            to: node,
            data_format: FORMAT_VERSION,
            terms: self.identity.terms,
            version: self.identity.version.clone(),
        };
        // In TLS 1.3 the other side checks our certificate after our side is done: a failed write may have an alert
        // waiting that says why, so the answer is read in any case.
        let written = write_frame(&mut stream, &Frame::Hello(hello)).await;
        match read_frame(&mut stream).await.and_then(|reply| written.map(|()| reply)).map_err(failed)? {
            Ok(Frame::HelloReply(HelloReply::Accepted)) => {
                let (socket, tls) = stream.into_inner();
                Ok(Established { socket: socket.into_std().map_err(failed)?, tls: tls.into() })
            }
            Ok(Frame::HelloReply(HelloReply::Refused(reason))) => {
                Err(Failure::Refused(format!("it refuses this node: {}", shortened(reason))))
            }
            Ok(_) => Err(Failure::Refused("its answer is not one to a hello".to_owned())),
            Err(error) => Err(Failure::Refused(error.to_string())),
        }
    }
}
