//! What the handshakes of both sides share: the hello frames over tokio, socket options, certificate checks, and one
//! log line per peer and cause. Must never log the same complaint again while nothing has changed.

use std::{
    collections::VecDeque,
    io,
    net::IpAddr,
    os::fd::AsFd,
    sync::{LazyLock, Mutex},
    time::Duration,
};

use rustls::{AlertDescription, CertificateError, pki_types::CertificateDer};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::codec::{CodecError, Frame, MAX_REASON, Purpose, frame_length};
use crate::{
    cluster::{ClusterId, NodeId},
    mutex::locked,
    pki,
};

/// Time for TLS and hello together, on both sides.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(5);
/// Largest hello frame: both kinds are far below it.
const MAX_HELLO: usize = 1024;
/// Unsent bytes that the kernel may hold for a link: what a heartbeat may have to wait for there.
const NOT_SENT: u32 = 128 << 10;
/// Data that nobody acknowledges for this long ends a link. Short, because TCP's own retries get slower and slower:
/// dialling anew finds a healed network sooner.
const USER_TIMEOUT: Duration = Duration::from_secs(2);
/// That span where whole databases go: a disk that stalls must not end the transfer.
const STREAM_TIMEOUT: Duration = Duration::from_secs(30);
/// Complaints remembered, so that they are not repeated.
const COMPLAINTS: usize = 128;

/// Tells this process from all others that have the same node's identity, now or at another time.
pub(super) static INCARNATION: LazyLock<u64> = LazyLock::new(rand::random);

/// Sets the options of a link's socket.
pub(super) fn tune(socket: &impl AsFd, purpose: Purpose) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(match purpose {
        Purpose::Link | Purpose::Key | Purpose::Question => USER_TIMEOUT,
        Purpose::Snapshot => STREAM_TIMEOUT,
    }))?;
    socket.set_tcp_notsent_lowat(NOT_SENT)?;
    let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(1)).with_interval(Duration::from_secs(1));
    socket.set_tcp_keepalive(&keepalive.with_retries(3))
}

/// Reads one hello frame.
pub(super) async fn read_frame(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Result<Frame, CodecError>> {
    let mut header = [0; 4];
    stream.read_exact(&mut header).await?;
    let length = match frame_length(header) {
        Ok(length) if length <= MAX_HELLO => length,
        Ok(_) => return Ok(Err(CodecError::Malformed("too long for a hello"))),
        Err(error) => return Ok(Err(error)),
    };
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(Frame::decode(&body))
}

/// Writes one frame.
pub(super) async fn write_frame(stream: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> io::Result<()> {
    let bytes = frame.encode().map_err(io::Error::other)?;
    stream.write_all(&bytes).await?;
    stream.flush().await
}

/// The first certificate of the other side, as the node that it names.
pub(super) fn certified(cluster: ClusterId, chain: Option<&[CertificateDer<'_>]>) -> Result<NodeId, String> {
    let certificate = chain.and_then(|chain| chain.first()).ok_or("no certificate was presented")?;
    let (theirs, node) = pki::peer_identity(certificate).map_err(|error| error.to_string())?;
    if theirs != cluster {
        return Err(format!("the certificate is of cluster {theirs}, this is cluster {cluster}"));
    }
    Ok(node)
}

/// Cuts a reason to what a reply can carry.
pub(super) fn shortened(mut reason: String) -> String {
    reason.truncate(reason.floor_char_boundary(MAX_REASON));
    reason
}

/// A TLS error as a sentence that says what to do about it; `None` if the connection just ended.
pub(super) fn explain(error: &io::Error) -> Option<String> {
    use CertificateError::{BadSignature, UnknownIssuer};
    let tls = match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(tls) => tls,
        None if error.kind() == io::ErrorKind::Other || error.kind() == io::ErrorKind::InvalidData => {
            return Some(error.to_string());
        }
        None => return None,
    };
    Some(match tls {
        rustls::Error::InvalidCertificate(UnknownIssuer | BadSignature) => {
            "its certificate is not signed by this cluster's authority (is it a node of another cluster?)".to_owned()
        }
        rustls::Error::AlertReceived(
            AlertDescription::UnknownCA | AlertDescription::DecryptError | AlertDescription::BadCertificate,
        ) => "it says that our certificate is not signed by its cluster's authority".to_owned(),
        rustls::Error::NoCertificatesPresented => "it presented no certificate".to_owned(),
        other => other.to_string(),
    })
}

/// Whom a complaint is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    /// A member, as this node dials it.
    Dialled(NodeId),
    /// A certified node, as it calls.
    Caller(NodeId),
    /// Somebody who did not get as far as proving who they are.
    Stranger(IpAddr),
}

/// Remembers what was logged already. Bounded: the oldest complaint is forgotten first.
#[derive(Default)]
pub(super) struct Complaints(Mutex<VecDeque<(Subject, String)>>);

impl Complaints {
    /// True if this is new and should be logged.
    pub fn is_new(&self, subject: Subject, cause: &str) -> bool {
        let mut known = locked(&self.0);
        if known.iter().any(|(about, said)| *about == subject && said == cause) {
            return false;
        }
        if known.len() >= COMPLAINTS {
            known.pop_front();
        }
        known.push_back((subject, cause.to_owned()));
        true
    }

    /// Forgets the complaints about one with whom all is well: the next one is news.
    pub fn settle(&self, subject: Subject) {
        locked(&self.0).retain(|(about, _)| *about != subject);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_is_news_once_until_settled() {
        let complaints = Complaints::default();
        assert!(complaints.is_new(Subject::Caller(1), "a") && complaints.is_new(Subject::Caller(1), "b"));
        assert!(!complaints.is_new(Subject::Caller(1), "a") && complaints.is_new(Subject::Dialled(1), "a"));
        complaints.settle(Subject::Caller(1));
        assert!(complaints.is_new(Subject::Caller(1), "a") && !complaints.is_new(Subject::Dialled(1), "a"));
        for number in 0..2 * COMPLAINTS {
            complaints.is_new(Subject::Caller(2), &number.to_string());
        }
        assert_eq!(complaints.0.lock().unwrap().len(), COMPLAINTS);
    }

    #[test]
    fn a_reason_is_cut_between_characters() {
        assert_eq!(shortened("é".repeat(MAX_REASON)).len(), MAX_REASON);
        assert_eq!(shortened(format!("x{}", "é".repeat(MAX_REASON))).len(), MAX_REASON - 1);
    }
}
