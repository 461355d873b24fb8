//! The pool's side of a meeting: the PRIMARY calls a host that waits. Must never say which pool it is before it knows
//! whom it talks to, as far as anybody told it.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use rustls::{AlertDescription, ClientConfig};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpSocket, TcpStream, lookup_host},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    MeetingError, Secret, broken,
    secret::{Bond, Side},
    wire::{NONCE, Offer, PATIENCE, PROTOCOL, STEP, Word, hear, read, refuse, say, unexpected, written},
};
use crate::{
    join::{JoinFile, JoinRequest},
    pki::{self, SigningRequest},
};

/// Longest time until a connection is there.
const CONNECT: Duration = Duration::from_secs(3);
/// What both ends derive from the TLS connection (RFC 8446 section 7.5).
pub(super) const MATERIAL: &[u8] = b"EXPORTER-twistlock-pool-meeting";

/// Calls hosts for one pool.
#[derive(Clone, Debug)]
pub struct Caller {
    /// See [`pki::calling_tls`].
    pub tls: Arc<ClientConfig>,
    /// None: hosts are known by their fingerprints.
    pub secret: Option<Secret>,
    /// The address to call from; none: any.
    pub from: Option<IpAddr>,
    /// What is offered, without the address.
    pub offer: Offer,
}

/// A host that was met. It forgets the meeting when this is dropped.
#[derive(Debug)]
pub struct Met<S = TcpStream> {
    stream: TlsStream<S>,
    /// Of its key.
    pub fingerprint: String,
    /// True if it has proven that it knows the secret.
    pub proven: bool,
    /// What it tells of itself. Its names and texts are not checked yet.
    pub request: JoinRequest,
}

impl Caller {
    /// Meets the host at this address, and learns what it tells of itself. With `expected`, only the host whose key has
    /// that fingerprint. Takes some seconds at most.
    ///
    /// # Errors
    /// [`MeetingError`]. The host has forgotten the meeting then.
    pub async fn meet(&self, host: &str, port: u16, expected: Option<&str>) -> Result<Met, MeetingError> {
        let stream = self.connect(host, port).await?;
        // Small words leave at once. It fails only if the host is gone.
        let _ = stream.set_nodelay(true);
        self.meet_on(stream, host, expected).await
    }

    /// Meets whoever is at the other end of this connection.
    pub(super) async fn meet_on<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
        address: &str,
        expected: Option<&str>,
    ) -> Result<Met<S>, MeetingError> {
        let connector = TlsConnector::from(Arc::clone(&self.tls));
        let shaken = timeout(STEP, connector.connect(pki::waiting_name(), stream)).await;
        let mut stream = match shaken {
            Ok(shaken) => shaken.map_err(|error| explain(&error))?,
            Err(_) => return Err(MeetingError::NotWaiting),
        };
        let met = self.talk(&mut stream, address, expected).await;
        match met {
            Ok((fingerprint, proven, request)) => Ok(Met { stream, fingerprint, proven, request }),
            Err(error) => {
                refuse(&mut stream, &error).await;
                Err(error)
            }
        }
    }

    async fn talk<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: &mut TlsStream<S>,
        address: &str,
        expected: Option<&str>,
    ) -> Result<(String, bool, JoinRequest), MeetingError> {
        let fingerprint = {
            let connection = stream.get_ref().1;
            let shown = connection.peer_certificates().and_then(|chain| chain.first());
            let speaks = connection.alpn_protocol() == Some(pki::MEETING);
            let shown = shown.filter(|_| speaks).ok_or(MeetingError::NotWaiting)?;
            pki::key_fingerprint(shown).map_err(|error| MeetingError::Broken(error.to_string()))?
        };
        if let Some(expected) = expected
            && expected != fingerprint
        {
            let expected = expected.to_owned();
            return Err(MeetingError::Fingerprint { found: fingerprint, expected });
        }
        let proven = self.prove(stream, &fingerprint).await?;
        let offer = Offer { address: address.to_owned(), ..self.offer.clone() };
        say(stream, &Word::Offer { offer }).await?;
        let Word::Candidate { request } = hear(stream, STEP).await? else { return Err(unexpected("candidate")) };
        let asks = SigningRequest::parse(&request.csr).map_err(|error| MeetingError::Stranger(error.to_string()))?;
        if asks.fingerprint() != fingerprint {
            let why = "it asks for a certificate for another key than it has shown";
            return Err(MeetingError::Stranger(why.to_owned()));
        }
        Ok((fingerprint, proven, request))
    }

    /// Greets, and proves that both know the secret. False if neither has one.
    async fn prove<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: &mut TlsStream<S>,
        fingerprint: &str,
    ) -> Result<bool, MeetingError> {
        let caller: [u8; NONCE] = rand::random();
        let greeting = Word::Greeting { protocol: PROTOCOL, nonce: written(&caller), secret: self.secret.is_some() };
        say(stream, &greeting).await?;
        let Word::Greeting { protocol, nonce, secret: theirs } = hear(stream, STEP).await? else {
            return Err(unexpected("greeting"));
        };
        if protocol != PROTOCOL {
            return Err(MeetingError::Protocol { theirs: protocol, ours: PROTOCOL });
        }
        let secret = match (&self.secret, theirs) {
            (None, false) => return Ok(false),
            (None, true) => return Err(MeetingError::SecretMissingHere),
            (Some(_), false) => return Err(MeetingError::SecretMissingThere),
            (Some(secret), true) => secret,
        };
        let material = stream.get_ref().1.export_keying_material([0; 32], MATERIAL, None);
        let material = material.map_err(|error| MeetingError::Broken(error.to_string()))?;
        let bond = Bond { material, caller, host: read(&nonce)?, fingerprint: fingerprint.to_owned() };
        say(stream, &Word::Proof { proof: secret.prove(Side::Caller, &bond) }).await?;
        let Word::Proof { proof } = hear(stream, STEP).await? else { return Err(unexpected("proof")) };
        if secret.is_proven(Side::Host, &bond, &proof) { Ok(true) } else { Err(MeetingError::WrongSecret) }
    }

    /// Connects to the first of the host's addresses that answers.
    async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, MeetingError> {
        let unreachable = |why: String| MeetingError::Unreachable(why);
        let found = timeout(CONNECT, lookup_host((host, port))).await;
        let found = found.map_err(|_| unreachable("resolving its name took too long".to_owned()))?;
        let found = found.map_err(|error| unreachable(format!("its name has no address: {error}")))?;
        let mut failure = unreachable("it has no address that this host can call".to_owned());
        for address in found {
            failure = match timeout(CONNECT, self.dial(address)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    unreachable(format!("nobody listens on {address}: does twistlockd run there?"))
                }
                Ok(Err(error)) => unreachable(format!("{address}: {error}")),
                Err(_) => unreachable(format!("{address} does not answer")),
            };
        }
        Err(failure)
    }

    async fn dial(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        let own = self.from.filter(|own| !own.is_unspecified() && own.is_ipv4() == address.is_ipv4());
        if let Some(own) = own {
            socket.bind(SocketAddr::new(own, 0))?;
        }
        socket.connect(address).await
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Met<S> {
    /// Has the host keep itself free for this pool until the meeting ends.
    ///
    /// # Errors
    /// [`MeetingError::Busy`] when somebody else was faster.
    pub async fn reserve(&mut self) -> Result<(), MeetingError> {
        say(&mut self.stream, &Word::Reserve).await?;
        match hear(&mut self.stream, STEP).await? {
            Word::Ready => Ok(()),
            _ => Err(unexpected("ready")),
        }
    }

    /// Tells the host that the pool has taken it in: where the Consoles are, and the id of its admission. Returns when
    /// the host has that on its disk.
    ///
    /// # Errors
    /// [`MeetingError`]: the host may have it or not. It is told again by another meeting.
    pub async fn adopt(&mut self, file: JoinFile, id: String) -> Result<(), MeetingError> {
        say(&mut self.stream, &Word::Adopt { file, id }).await?;
        match hear(&mut self.stream, PATIENCE).await? {
            Word::Adopted => Ok(()),
            _ => Err(unexpected("adopted")),
        }
    }
}

/// Why there is no TLS connection. A member refuses a protocol that it does not know.
fn explain(error: &io::Error) -> MeetingError {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(
            rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)
            | rustls::Error::InvalidMessage(_)
            | rustls::Error::NoApplicationProtocol,
        ) => MeetingError::NotWaiting,
        Some(error) => MeetingError::Broken(error.to_string()),
        None => broken(io::Error::new(error.kind(), error.to_string())),
    }
}
