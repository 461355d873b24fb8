//! Keys and certificates: the cluster's certificate authority, the certificates of nodes and Console, and the rustls
//! configurations made of them. Owns `<data>/certificates/`. Must never send a private key anywhere, write one into a
//! file that others can read, or accept a peer on anything but a certificate of the cluster's own authority.
//!
//! A node certificate names its holder twice: the DNS name [`PEER_NAME`], the same for all nodes, says "a node", and
//! the URI `twistlock://<cluster id>/node/<node id>` says which one. Addresses are listed too, for people; nothing
//! checks them, so that a host may change its address.

mod authority;
mod console;
mod defender;
mod meeting;
mod params;
pub mod pem;
mod request;
mod sealed;
mod tickets;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite,
    client::Resumption,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use thiserror::Error;
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer, time::ASN1Time};

use crate::{
    cluster::{ClusterId, NodeId, trust::KeyId},
    mutex::locked,
};

pub use authority::{Authority, Issued, authority_made_at, is_reserved};
pub use console::{CertificateInfo, Pair, as_pem, console_tls, is_issued_by, reseal};
pub use defender::{console_name, defender_client_tls, defender_identity, defender_port_tls};
pub use meeting::{MEETING, calling_tls, key_fingerprint, proven_node, waiting_console_tls, waiting_name, waiting_tls};
pub use request::{
    SigningRequest, certificate_key, certificate_validity, console_request, is_signed_by, new_key, node_request,
    request_with,
};
pub use sealed::{ClusterKey, ClusterKeys};
pub use tickets::Tickets;

use authority::LEAF_DAYS;

/// The authority's certificate, on every node.
pub const CA_CERTIFICATE: &str = "ca.pem";
/// The authority's private key, as a file: only `twistlockd dev` has one, for tests. Members keep it sealed in the
/// membership.
pub const CA_KEY: &str = "ca-key.pem";
/// This node's certificate and key.
pub const NODE_CERTIFICATE: &str = "node.pem";
pub const NODE_KEY: &str = "node-key.pem";
/// The Console's certificate and key.
pub const CONSOLE_CERTIFICATE: &str = "console-cert.pem";
pub const CONSOLE_KEY: &str = "console-key.pem";
/// The key that unseals the authority's private key; only on members.
pub const CLUSTER_KEY: &str = "cluster.key";
/// The cluster key that is to take its place.
pub const NEXT_CLUSTER_KEY: &str = "cluster.key.next";
/// The DNS name in every node certificate, which TLS checks. `.internal` is reserved for private use.
pub const PEER_NAME: &str = "node.twistlock.internal";
/// The DNS name in every Console certificate of the cluster's own authority. A client that asks for it is always shown
/// that certificate, whatever an administrator has others see: hosts that join trust nothing else.
pub const CONSOLE_NAME: &str = "console.twistlock.internal";
/// The folder in the data folder where an administrator puts certificate and key for the Console of this host, by the
/// names of [`CONSOLE_CERTIFICATE`] and [`CONSOLE_KEY`].
pub const CUSTOM_FOLDER: &str = "custom-certificates";
/// What both ends of a link say in the TLS handshake when they accept frames that go on behind what they know (feature
/// level 2). An older program neither offers nor chooses it, and is sent only what it knows.
pub const EXTENSIBLE: &[u8] = b"twistlock/2";

/// What can be wrong with keys and certificates.
#[derive(Debug, Error)]
pub enum PkiError {
    #[error("cannot {action} {}: {error}", path.display())]
    File { action: &'static str, path: PathBuf, error: io::Error },
    #[error("{} does not hold {expected}: {detail}", path.display())]
    Malformed { path: PathBuf, expected: &'static str, detail: String },
    #[error("cannot make a certificate: {0}")]
    Generate(String),
    #[error("the name '{0}' cannot be in a Console certificate")]
    Name(String),
    #[error("certificate and key cannot be used: {0}")]
    Tls(rustls::Error),
    #[error("{0}")]
    Identity(&'static str),
    #[error("the signing request is refused: {0}")]
    Request(&'static str),
    #[error("a private key of the cluster cannot be unsealed: {0}")]
    Sealed(&'static str),
    #[error("the certificate is refused: {0}")]
    Custom(String),
}

impl From<rustls::Error> for PkiError {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(error)
    }
}

impl From<rcgen::Error> for PkiError {
    fn from(error: rcgen::Error) -> Self {
        Self::Generate(error.to_string())
    }
}

/// The SHA-256 fingerprint of a certificate (DER): upper-case hexadecimal pairs with colons, as browsers show it.
pub fn fingerprint(certificate: &[u8]) -> String {
    let SupportedCipherSuite::Tls13(suite) = ring::cipher_suite::TLS13_AES_128_GCM_SHA256 else {
        unreachable!("the TLS 1.3 suite is one of TLS 1.3")
    };
    let digest = suite.common.hash_provider.hash(certificate);
    let pairs: Vec<String> = digest.as_ref().iter().map(|byte| format!("{byte:02X}")).collect();
    pairs.join(":")
}

/// Names an authority by its certificate (PEM).
///
/// # Errors
/// [`PkiError::Identity`] when the text is not a certificate.
pub fn authority_id(pem: &str) -> Result<KeyId, PkiError> {
    Ok(KeyId(sealed::digest_of(&certificate_der(pem)?)))
}

const UNREADABLE: PkiError = PkiError::Identity("the certificate cannot be parsed");

/// Parses a certificate (DER).
fn parse(certificate: &[u8]) -> Result<X509Certificate<'_>, PkiError> {
    X509Certificate::from_der(certificate).map(|(_, parsed)| parsed).map_err(|_| UNREADABLE)
}

/// From when to when a certificate is valid, in seconds since 1970.
fn validity(parsed: &X509Certificate<'_>) -> (u64, u64) {
    let seconds = |time: ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    (seconds(parsed.validity().not_before), seconds(parsed.validity().not_after))
}

/// True if less than a third of its life remains, or it has not begun: it was made when a clock was ahead.
pub fn is_due(from: u64, until: u64, now: u64) -> bool {
    now < from || until.saturating_sub(now) < until.saturating_sub(from) / 3
}

/// Which node of which cluster a certificate (DER) was made for. Says nothing about who signed it: TLS checks that.
///
/// # Errors
/// [`PkiError::Identity`] when the certificate cannot be parsed, or does not name exactly one node.
pub fn peer_identity(certificate: &[u8]) -> Result<(ClusterId, NodeId), PkiError> {
    holder(certificate, parse_identity, "the certificate is not one of a node")
}

/// Whom the one URI of this kind in a certificate (DER) names; `none` says that there is no such URI.
fn holder<T>(certificate: &[u8], read: fn(&str) -> Option<T>, none: &'static str) -> Result<T, PkiError> {
    let parsed = parse(certificate)?;
    let names = parsed.subject_alternative_name().ok().flatten().ok_or(PkiError::Identity(none))?;
    let mut identities = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => read(uri),
        _ => None,
    });
    match (identities.next(), identities.next()) {
        (Some(identity), None) => Ok(identity),
        (Some(_), Some(_)) => Err(PkiError::Identity("the certificate names more than one node")),
        (None, _) => Err(PkiError::Identity(none)),
    }
}

fn parse_identity(uri: &str) -> Option<(ClusterId, NodeId)> {
    let (cluster, node) = uri.strip_prefix("twistlock://")?.split_once("/node/")?;
    let node: NodeId = node.parse().ok()?;
    Some((cluster.parse().ok()?, node)).filter(|_| node != 0)
}

/// What a node needs for its links: TLS 1.3 only, both ends prove themselves with a certificate of the cluster's
/// authority, no session resumption (so that nothing ever flows back on a link that only sends).
#[derive(Clone)]
pub struct NodeTls {
    pub client: Arc<ClientConfig>,
    pub server: Arc<ServerConfig>,
    /// Whom this node's own certificate was made for.
    pub identity: (ClusterId, NodeId),
}

impl NodeTls {
    /// Reads [`CA_CERTIFICATE`], [`NODE_CERTIFICATE`] and [`NODE_KEY`] in `dir`.
    ///
    /// # Errors
    /// [`PkiError::File`] when a file cannot be read, [`PkiError::Malformed`] when it does not hold what it should.
    /// [`PkiError::Identity`] when the node's certificate names no node, [`PkiError::Tls`] when it does not belong to
    /// the key.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&dir.join(CA_CERTIFICATE))? {
            roots.add(certificate)?;
        }
        let (chain, key) = (certificates(&dir.join(NODE_CERTIFICATE))?, private_key(&dir.join(NODE_KEY))?);
        let identity = peer_identity(&chain[0])?;
        let roots = Arc::new(roots);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
            .build()
            .map_err(|error| malformed(dir.join(CA_CERTIFICATE), "a certificate authority", error))?;
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())?;
        server.alpn_protocols = vec![EXTENSIBLE.to_vec()];
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)?;
        client.alpn_protocols = vec![EXTENSIBLE.to_vec()];
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        Ok(Self { client: Arc::new(client), server: Arc::new(server), identity })
    }

    /// The name that every node's certificate carries, as TLS wants it.
    pub fn peer_name() -> ServerName<'static> {
        ServerName::try_from(PEER_NAME).expect("PEER_NAME is a DNS name")
    }
}

/// The cryptography of all our TLS. Never the process-wide default: a library that installs another must not change our
/// links.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// All certificates of a PEM file: at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    pem::certificates(read_file(path)?).map_err(|error| malformed(path.into(), "a certificate", error))
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, PkiError> {
    pem::private_key(read_file(path)?).map_err(|error| malformed(path.into(), "a private key", error))
}

fn malformed(path: PathBuf, expected: &'static str, detail: impl ToString) -> PkiError {
    PkiError::Malformed { path, expected, detail: detail.to_string() }
}

fn read_file(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|error| PkiError::File { action: "read", path: path.into(), error })
}

/// Keeps a certificate that was signed elsewhere, or the key to it (`secret`: mode 0600), under one of the names above.
///
/// # Errors
/// [`PkiError::File`] when the file cannot be written.
pub fn store_pem(dir: &Path, name: &str, pem: &str, secret: bool) -> Result<(), PkiError> {
    write_file(&dir.join(name), pem, if secret { 0o600 } else { 0o644 })
}

/// The DER form of the first certificate in a PEM text.
///
/// # Errors
/// [`PkiError::Identity`] when the text has no certificate in PEM form.
pub fn certificate_der(pem: &str) -> Result<CertificateDer<'static>, PkiError> {
    let found = pem::certificates(pem).map_err(|_| PkiError::Identity("this is not a certificate in PEM form"))?;
    found.into_iter().next().ok_or(PkiError::Identity("this is not a certificate in PEM form"))
}

/// Replaces a file so that a crash leaves the old or the new one, and the key is never readable by others in between.
fn write_file(path: &Path, content: impl AsRef<[u8]>, mode: u32) -> Result<(), PkiError> {
    // Two tasks may renew the same file, and both would write to the same temporary one.
    static WRITING: Mutex<()> = Mutex::new(());
    let _one = locked(&WRITING);
    let write = || {
        let temporary = path.with_extension("pem.new");
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(content.as_ref())?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(|error| PkiError::File { action: "write", path: path.into(), error })
}

/// Removes a file if it is there, durably.
fn remove_file(path: &Path) -> Result<(), PkiError> {
    let remove = || match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all(),
    };
    remove().map_err(|error| PkiError::File { action: "remove", path: path.into(), error })
}

/// Moves a file into the place of another one, durably.
fn rename_file(from: &Path, to: &Path) -> Result<(), PkiError> {
    let rename = || {
        fs::rename(from, to)?;
        File::open(to.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    rename().map_err(|error| PkiError::File { action: "rename", path: from.into(), error })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const CLUSTER: ClusterId = ClusterId(0xabcd);

    fn der(pem: &str) -> CertificateDer<'static> {
        certificate_der(pem).unwrap()
    }

    #[test]
    fn a_third_of_the_life_before_the_end_it_is_time() {
        assert!(!is_due(0, 300, 200));
        assert!(is_due(0, 300, 201));
        assert!(is_due(0, 300, 400));
        assert!(!is_due(0, 300, 0));
        assert!(!is_due(100, 400, 100));
        assert!(is_due(100, 400, 99), "made with a clock that was ahead");
    }

    #[test]
    fn a_node_certificate_names_its_node() {
        let authority = Authority::create(CLUSTER).unwrap();
        let node = authority.issue_node(3, "c", &["127.0.0.3", "c.example"]).unwrap();
        assert_eq!(peer_identity(&der(&node.cert_pem)).unwrap(), (CLUSTER, 3));
    }

    #[test]
    fn a_console_certificate_is_not_a_node() {
        let authority = Authority::create(CLUSTER).unwrap();
        let console = authority.issue_console(&["console.example", "127.0.0.1"]).unwrap();
        assert!(peer_identity(&der(&console.cert_pem)).is_err());
        for name in [PEER_NAME, "*.twistlock.internal", ""] {
            assert!(matches!(authority.issue_console(&[name]), Err(PkiError::Name(_))), "{name}");
        }
    }

    #[test]
    fn identities_are_parsed_strictly() {
        let cluster = CLUSTER.to_string();
        assert_eq!(parse_identity(&format!("twistlock://{cluster}/node/7")), Some((CLUSTER, 7)));
        for node in ["0", "-1", "7/8", "", "x"] {
            assert_eq!(parse_identity(&format!("twistlock://{cluster}/node/{node}")), None);
        }
        assert_eq!(parse_identity("twistlock://abcd/node/7"), None);
    }

    #[test]
    fn saved_files_load_again_and_keys_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(CLUSTER).unwrap();
        authority.save(dir.path()).unwrap();
        let authority = Authority::load(CLUSTER, dir.path()).unwrap();
        authority.issue_node(2, "b", &[]).unwrap().save_node(dir.path()).unwrap();
        authority.issue_console(&["b.example"]).unwrap().save_console(dir.path()).unwrap();
        assert_eq!(NodeTls::load(dir.path()).unwrap().identity, (CLUSTER, 2));
        Pair::load(&dir.path().join(CONSOLE_CERTIFICATE), &dir.path().join(CONSOLE_KEY)).unwrap();
        for key in [CA_KEY, NODE_KEY, CONSOLE_KEY] {
            assert_eq!(fs::metadata(dir.path().join(key)).unwrap().permissions().mode() & 0o777, 0o600, "{key}");
        }
        fs::write(dir.path().join(NODE_KEY), "not a key").unwrap();
        assert!(matches!(NodeTls::load(dir.path()), Err(PkiError::Malformed { .. })));
    }

    #[test]
    fn the_fingerprint_is_sha256_with_colons() {
        // The digest of no bytes at all, from FIPS 180-4's examples.
        assert!(fingerprint(b"").starts_with("E3:B0:C4:42:98:FC:1C:14:"));
        assert_eq!(fingerprint(b"").len(), 32 * 3 - 1);
    }
}
