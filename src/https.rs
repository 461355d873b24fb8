//! HTTPS clients: whom they trust, how long they wait, and what a failure means. Blocking: for threads that may wait.
//! Must never use a proxy, follow a redirect, or take a request that may have arrived for one that certainly did not.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use rustls::{CertificateError, RootCertStore, pki_types::CertificateDer};
use thiserror::Error;
use ureq::{
    Agent, Body,
    config::Config,
    http::{Response, Uri},
    tls::{Certificate, RootCerts, TlsConfig, TlsConfigBuilder},
    unversioned::{
        resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver},
        transport::{DefaultConnector, NextTimeout},
    },
};

use crate::pki::pem::{self, PemError};

/// Longest sentence of a server that is repeated, in characters.
const LONGEST_REASON: usize = 500;
/// Longest answer that is read to find such a sentence.
const LONGEST_REFUSAL: u64 = 64 << 10;

/// The authorities whose servers are trusted.
#[derive(Clone, Debug, Default)]
pub struct Trust(Vec<CertificateDer<'static>>);

/// Why there is nobody to trust.
#[derive(Debug, Error)]
pub enum TrustError {
    /// The file cannot be read.
    #[error(transparent)]
    Unreadable(#[from] io::Error),
    /// Its text is damaged, or there is no certificate in it.
    #[error(transparent)]
    Pem(#[from] PemError),
    /// One of its certificates is none.
    #[error("one of its certificates cannot be used: {0}")]
    Certificate(rustls::Error),
}

impl Trust {
    /// The authorities whose certificates are in this PEM text.
    ///
    /// # Errors
    /// [`TrustError`] when the text has no certificate that can be used.
    pub fn pem(text: &[u8]) -> Result<Self, TrustError> {
        let found = pem::certificates(text)?;
        // What a client silently left out would be found out at the first server.
        let mut store = RootCertStore::empty();
        found.iter().try_for_each(|der| store.add(der.clone())).map_err(TrustError::Certificate)?;
        Ok(Self(found))
    }

    /// The authorities whose certificates are in this PEM file.
    ///
    /// # Errors
    /// [`TrustError`] when the text has no certificate that can be used.
    pub fn file(path: &Path) -> Result<Self, TrustError> {
        Self::pem(&fs::read(path)?)
    }

    /// The authorities that this host trusts. None if it has no list of them.
    #[must_use]
    pub fn system() -> Self {
        Self(rustls_native_certs::load_native_certs().certs)
    }

    fn tls(&self) -> TlsConfigBuilder {
        let roots = self.0.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
        TlsConfig::builder().root_certs(RootCerts::Specific(Arc::new(roots)))
    }

    /// These and the others.
    #[must_use]
    pub fn and(mut self, others: Self) -> Self {
        self.0.extend(others.0);
        self
    }
}

/// How long a client waits.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Until a connection is there; an address may swallow packets.
    pub connect: Duration,
    /// From the beginning of a request to the end of its answer.
    pub request: Duration,
}

/// A client. Statuses such as 404 are answers for it, not errors.
#[must_use]
pub fn client(trust: &Trust, limits: Limits) -> Agent {
    config(trust.tls(), limits).into()
}

/// A client that always dials `place` (`host:port`). The server has to prove the name in the URL.
///
/// # Errors
/// When that is no place.
pub fn client_at(trust: &Trust, limits: Limits, place: &str) -> Result<Agent, ureq::Error> {
    let way = Way(format!("https://{place}").parse::<Uri>().map_err(|_| ureq::Error::BadUri(place.to_owned()))?);
    Ok(Agent::with_parts(config(trust.tls(), limits), DefaultConnector::default(), way))
}

/// The way leads there, wherever a URL points.
#[derive(Debug)]
struct Way(Uri);

impl Resolver for Way {
    fn resolve(&self, _: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        DefaultResolver::default().resolve(&self.0, config, timeout)
    }
}

/// A client that talks to anybody. Only to fetch what is public, to be compared by a person: it must be told no secret.
#[must_use]
pub fn credulous_client(limits: Limits) -> Agent {
    config(TlsConfig::builder().disable_verification(true), limits).into()
}

fn config(tls: TlsConfigBuilder, limits: Limits) -> Config {
    let tls = tls.unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider())).build();
    Agent::config_builder()
        .tls_config(tls)
        .https_only(true)
        .proxy(None)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .timeout_connect(Some(limits.connect))
        .timeout_global(Some(limits.request))
        .build()
}

/// What a request without an answer means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The kernel of that host says that nobody listens. Nothing was sent.
    Refused,
    /// No connection came about. Nothing was sent.
    Unreachable,
    /// The server's certificate does not verify. Nothing was sent.
    Untrusted(Distrust),
    /// The request may have arrived.
    Unknown,
}

/// Why a certificate does not verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distrust {
    /// Nobody knows the authority that signed it.
    Issuer,
    /// It is for other names.
    Name,
    /// It is no longer valid, or not yet.
    Time,
    /// Anything else.
    Other,
}

/// Sorts a failure.
#[must_use]
pub fn failure(error: &ureq::Error) -> Failure {
    match error {
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => Failure::Unreachable,
        ureq::Error::Rustls(error) => distrust(error),
        ureq::Error::Io(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused => Failure::Refused,
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Failure::Unreachable,
            _ => error.get_ref().and_then(|inner| inner.downcast_ref()).map_or(Failure::Unknown, distrust),
        },
        _ => Failure::Unknown,
    }
}

fn distrust(error: &rustls::Error) -> Failure {
    let rustls::Error::InvalidCertificate(error) = error else { return Failure::Unknown };
    Failure::Untrusted(match error {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => Distrust::Issuer,
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => Distrust::Name,
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => Distrust::Time,
        _ => Distrust::Other,
    })
}

/// Why a server says no: the `err` of its answer, fit for logs and terminals.
pub fn refusal(response: &mut Response<Body>) -> String {
    #[derive(serde::Deserialize)]
    struct Refusal {
        err: String,
    }
    let status = response.status();
    let text = response.body_mut().with_config().limit(LONGEST_REFUSAL).read_to_string().unwrap_or_default();
    let why = serde_json::from_str::<Refusal>(&text).map(|refusal| refusal.err).unwrap_or_default();
    let why: String = why.chars().filter(|c| !c.is_control()).take(LONGEST_REASON).collect();
    if why.is_empty() { format!("HTTP status {}", status.as_u16()) } else { why }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{SocketAddr, TcpListener, TcpStream},
        sync::mpsc,
        thread,
    };

    use socket2::{Domain, Socket, Type};

    use super::*;

    #[test]
    fn only_certificates_are_trusted() {
        let rcgen::CertifiedKey { cert, .. } = rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap();
        let two = format!("comment\n{}\n{}", cert.pem(), cert.pem());
        assert_eq!(Trust::pem(two.as_bytes()).unwrap().0.len(), 2);
        assert!(matches!(Trust::pem(b"hello").unwrap_err(), TrustError::Pem(PemError::NoCertificate)));
        let damaged = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(matches!(Trust::pem(damaged.as_bytes()).unwrap_err(), TrustError::Certificate(_)));
        let half = "-----BEGIN CERTIFICATE-----\nAAAA\n";
        assert!(matches!(Trust::pem(half.as_bytes()).unwrap_err(), TrustError::Pem(_)));
    }

    #[test]
    fn what_may_have_arrived_is_told_from_what_did_not() {
        let io = |kind: io::ErrorKind| failure(&ureq::Error::Io(kind.into()));
        assert_eq!(io(io::ErrorKind::ConnectionRefused), Failure::Refused);
        assert_eq!(io(io::ErrorKind::ConnectionReset), Failure::Unknown);
        assert_eq!(io(io::ErrorKind::HostUnreachable), Failure::Unreachable);
        assert_eq!(failure(&ureq::Error::Timeout(ureq::Timeout::Connect)), Failure::Unreachable);
        assert_eq!(failure(&ureq::Error::Timeout(ureq::Timeout::Global)), Failure::Unknown);
        let tls = |error: CertificateError| {
            let error = rustls::Error::InvalidCertificate(error);
            failure(&ureq::Error::Io(io::Error::new(io::ErrorKind::InvalidData, error)))
        };
        assert_eq!(tls(CertificateError::UnknownIssuer), Failure::Untrusted(Distrust::Issuer));
        assert_eq!(tls(CertificateError::NotValidForName), Failure::Untrusted(Distrust::Name));
        assert_eq!(tls(CertificateError::Expired), Failure::Untrusted(Distrust::Time));
        assert_eq!(tls(CertificateError::Revoked), Failure::Untrusted(Distrust::Other));
    }

    /// A host without power does not refuse a connection, as a name with the addresses of all hosts may lead to: it
    /// says nothing.
    #[test]
    fn an_address_that_swallows_packets_hides_no_other_one() {
        #[derive(Debug)]
        struct Both([SocketAddr; 2]);
        impl Resolver for Both {
            fn resolve(&self, _: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
                let mut all = self.empty();
                self.0.into_iter().for_each(|address| all.push(address));
                Ok(all)
            }
        }
        // Nobody accepts there: once the kernel's queue is full, it drops whatever comes.
        let deaf = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        deaf.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        deaf.listen(0).unwrap();
        let swallows = deaf.local_addr().unwrap().as_socket().unwrap();
        let dial = || TcpStream::connect_timeout(&swallows, Duration::from_millis(100));
        let queued: Vec<_> = (0..8).map_while(|_| dial().ok()).collect();
        assert_eq!(dial().unwrap_err().kind(), io::ErrorKind::TimedOut, "{} are queued", queued.len());

        let good = TcpListener::bind("127.0.0.1:0").unwrap();
        let addresses = Both([swallows, good.local_addr().unwrap()]);
        let (sender, came) = mpsc::channel();
        thread::spawn(move || sender.send(good.accept().map(drop)));
        let limits = Limits { connect: Duration::from_secs(1), request: Duration::from_secs(20) };
        let agent = Agent::with_parts(config(Trust::default().tls(), limits), DefaultConnector::default(), addresses);
        // It has no certificate to show: that it was reached is what counts.
        agent.get("https://console.example/").call().unwrap_err();
        came.recv_timeout(limits.request).expect("the second address is tried").unwrap();
    }
}
