//! The waiting side of a meeting. Must never tell anything of this host to a caller that has not proven itself, and
//! never let two take it.

use std::{
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Mutex, OwnedMutexGuard},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    MeetingError, Secret,
    caller::MATERIAL,
    secret::{Bond, Side},
    wire::{NONCE, Offer, PATIENCE, PROTOCOL, STEP, Word, hear, read, refuse, say, unexpected, written},
};
use crate::{
    clients::{
        network,
        throttle::{Limits, Throttle},
    },
    clock::unix_time,
    cluster::{feature_level, level::outdated, program_version},
    join::{Candidate, JoinFile},
    pki,
};

/// Callers of one network that were refused.
const REFUSED: Limits = Limits { free: 10, longest: Duration::from_secs(30) };

/// What becomes of a host that waits is decided by whoever holds this: a sign-up, or one meeting. True once it is
/// decided.
#[derive(Clone, Debug, Default)]
pub struct Desk(Arc<Mutex<bool>>);

impl Desk {
    /// Whoever has it decides. None while somebody else does, and once it is decided.
    pub fn take(&self) -> Option<OwnedMutexGuard<bool>> {
        Arc::clone(&self.0).try_lock_owned().ok().filter(|decided| !**decided)
    }
}

/// A host that waits.
pub struct Waiting {
    candidate: Candidate,
    tls: Arc<ServerConfig>,
    secret: Option<Secret>,
    desk: Desk,
    refused: Throttle<IpAddr>,
}

/// True if a caller wanted something else than a meeting. Members call so where a host that waits was taken in and has
/// not been told: they must not keep it from being told. Nothing was computed for it yet.
fn is_for_another(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    inner == Some(&rustls::Error::NoApplicationProtocol)
}

impl Waiting {
    /// With this secret; none: it takes the first pool that calls.
    ///
    /// # Errors
    /// [`pki::PkiError`] when the key cannot be used.
    pub fn new(candidate: Candidate, secret: Option<Secret>, desk: Desk) -> Result<Self, pki::PkiError> {
        let tls = pki::waiting_tls(candidate.key())?;
        Ok(Self { candidate, tls, secret, desk, refused: Throttle::new(REFUSED) })
    }

    /// The host itself.
    pub fn candidate(&self) -> &Candidate {
        &self.candidate
    }

    /// Where it is decided what becomes of this host.
    pub fn desk(&self) -> &Desk {
        &self.desk
    }

    /// Answers one caller. Returns the pool that has taken this host in, once `keep` has put that on the disk; none
    /// when the caller only looked. The error has been told to the caller.
    ///
    /// # Errors
    /// [`MeetingError`]: nothing was changed.
    pub async fn receive<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
        from: IpAddr,
        keep: impl FnOnce(&JoinFile, &str) -> Result<(), String>,
    ) -> Result<Option<Offer>, MeetingError> {
        let from = network(from);
        if self.refused.attempt(&from, Instant::now()).is_err() {
            return Err(MeetingError::Refused("too many callers from there were refused: it has to wait".to_owned()));
        }
        let acceptor = TlsAcceptor::from(Arc::clone(&self.tls));
        let mut stream = match timeout(STEP, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                if is_for_another(&error) {
                    self.refused.forgive(&from);
                }
                return Err(MeetingError::Unreachable(format!("no TLS connection: {error}")));
            }
            Err(_) => return Err(MeetingError::Unreachable("the TLS handshake took too long".to_owned())),
        };
        let talked = self.talk(&mut stream, keep).await;
        match &talked {
            Ok(_) => self.refused.succeeded(&from),
            Err(error) => refuse(&mut stream, error).await,
        }
        talked
    }

    async fn talk<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: &mut TlsStream<S>,
        keep: impl FnOnce(&JoinFile, &str) -> Result<(), String>,
    ) -> Result<Option<Offer>, MeetingError> {
        if stream.get_ref().1.alpn_protocol() != Some(pki::MEETING) {
            return Err(MeetingError::Stranger("it did not call for a meeting".to_owned()));
        }
        self.prove(stream).await?;
        let Word::Offer { offer } = hear(stream, STEP).await? else { return Err(unexpected("offer")) };
        check(&offer, stream)?;
        let request = self.candidate.request(&offer.address);
        say(stream, &Word::Candidate { request }).await?;
        match hear(stream, PATIENCE).await {
            Ok(Word::Reserve) => {}
            Ok(_) => return Err(unexpected("reserve")),
            // It has seen enough, or waits for somebody to compare the fingerprint.
            Err(_) => return Ok(None),
        }
        let mut desk = self.desk.take().ok_or(MeetingError::Busy)?;
        say(stream, &Word::Ready).await?;
        let Word::Adopt { file, id } = hear(stream, PATIENCE).await? else { return Err(unexpected("adopt")) };
        if file.ca != offer.authority {
            return Err(MeetingError::Stranger("it names another authority than it has offered".to_owned()));
        }
        keep(&file, &id).map_err(|why| MeetingError::Refused(format!("the host cannot keep it: {why}")))?;
        *desk = true;
        // It is on the disk: whoever does not hear of it asks again, and is told that nobody waits here.
        let _ = say(stream, &Word::Adopted).await;
        Ok(Some(offer))
    }

    /// Greets, and demands the proof of the secret if this host has one, before it gives its own.
    async fn prove<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: &mut TlsStream<S>) -> Result<(), MeetingError> {
        let Word::Greeting { protocol, nonce, secret: theirs } = hear(stream, STEP).await? else {
            return Err(unexpected("greeting"));
        };
        if protocol != PROTOCOL {
            return Err(MeetingError::Protocol { theirs: protocol, ours: PROTOCOL });
        }
        let secret = match (&self.secret, theirs) {
            (None, false) => None,
            (None, true) => return Err(MeetingError::SecretMissingHere),
            (Some(_), false) => return Err(MeetingError::SecretMissingThere),
            (Some(secret), true) => Some(secret),
        };
        let host: [u8; NONCE] = rand::random();
        say(stream, &Word::Greeting { protocol: PROTOCOL, nonce: written(&host), secret: secret.is_some() }).await?;
        let Some(secret) = secret else { return Ok(()) };
        let material = stream.get_ref().1.export_keying_material([0; 32], MATERIAL, None);
        let material = material.map_err(|error| MeetingError::Broken(error.to_string()))?;
        let fingerprint = self.candidate.fingerprint().to_owned();
        let bond = Bond { material, caller: read(&nonce)?, host, fingerprint };
        let Word::Proof { proof } = hear(stream, STEP).await? else { return Err(unexpected("proof")) };
        if !secret.is_proven(Side::Caller, &bond, &proof) {
            return Err(MeetingError::WrongSecret);
        }
        say(stream, &Word::Proof { proof: secret.prove(Side::Host, &bond) }).await
    }
}

/// The caller must be a node of the cluster that it offers, and that must be one that this program can be a member of.
fn check<S>(offer: &Offer, stream: &TlsStream<S>) -> Result<(), MeetingError> {
    let stranger = |why: String| MeetingError::Stranger(format!("it cannot be a member of a pool: {why}"));
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let shown = shown.ok_or_else(|| stranger("it has no certificate".to_owned()))?;
    let proven = pki::proven_node(shown, &offer.authority, unix_time());
    let (cluster, _) = proven.map_err(|error| stranger(error.to_string()))?;
    if cluster != offer.cluster {
        return Err(stranger(format!("its certificate is of cluster {cluster}, and it offers {}", offer.cluster)));
    }
    if offer.level > feature_level() {
        let needed = (offer.version.as_str(), offer.level);
        return Err(MeetingError::Refused(outdated("this host", (program_version(), feature_level()), needed)));
    }
    Ok(())
}
