//! TLS for the meeting of a pool with a host that waits: neither end knows an authority of the other, so a certificate
//! counts for nothing but its key, which TLS proves that the other end has. Whose key that is, is up to
//! [`crate::meeting`]. Must never be used for anything else.

use std::sync::Arc;

use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
    server::{
        NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    version::{TLS12, TLS13},
};

use super::{
    NODE_CERTIFICATE, NODE_KEY, PkiError,
    authority::LEAF_DAYS,
    certificates, fingerprint, is_issued_by,
    params::{alternative_name, params},
    parse, peer_identity, pem, private_key, provider, validity,
};
use crate::cluster::{ClusterId, NodeId};

/// What both ends say in the TLS handshake of a meeting. A node that is a member does not know it, and refuses.
pub const MEETING: &[u8] = b"twistlock-pool";
/// The name in the certificate of a host that waits, which nobody checks.
const WAITING_NAME: &str = "waiting.twistlock.internal";

/// Accepts every certificate, and checks that the other end has its key.
#[derive(Debug)]
struct AnyKey(Arc<CryptoProvider>);

impl AnyKey {
    fn new() -> Arc<Self> {
        Arc::new(Self(provider()))
    }

    fn verify(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// TLS 1.2 is not offered.
fn only_newer() -> rustls::Error {
    rustls::Error::General("a meeting needs TLS 1.3".to_owned())
}

impl ServerCertVerifier for AnyKey {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_newer())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for AnyKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_newer())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

/// A certificate that a key (PEM) has signed for itself.
fn own(key: &str, name: &str, names: &[&str]) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), PkiError> {
    let unusable = |error: pem::PemError| PkiError::Generate(error.to_string());
    let pair = pem::key_pair(key).map_err(unusable)?;
    let mut params = params(name, LEAF_DAYS);
    for name in names {
        params.subject_alt_names.push(alternative_name(name)?);
    }
    Ok((params.self_signed(&pair)?.into(), pem::private_key(key).map_err(unusable)?))
}

/// The settings of a host that waits, with its key (PEM): whoever calls has to show a key.
///
/// # Errors
/// [`PkiError::Generate`] and [`PkiError::Tls`] when the key cannot be used.
pub fn waiting_tls(key: &str) -> Result<Arc<ServerConfig>, PkiError> {
    let (certificate, key) = own(key, WAITING_NAME, &[WAITING_NAME])?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(AnyKey::new())
        .with_single_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![MEETING.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// The settings with which a member of a pool calls a host that waits: it shows the node's certificate of this folder.
///
/// # Errors
/// [`PkiError::File`] and [`PkiError::Malformed`] when certificate or key cannot be read, [`PkiError::Tls`] when they
/// cannot be used together.
pub fn calling_tls(dir: &std::path::Path) -> Result<Arc<ClientConfig>, PkiError> {
    let (chain, key) = (certificates(&dir.join(NODE_CERTIFICATE))?, private_key(&dir.join(NODE_KEY))?);
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(AnyKey::new())
        .with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![MEETING.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// The settings of the HTTPS port of a host that waits: no authority has signed for it yet, so it shows a certificate
/// of its own for these names, with the key (PEM) whose fingerprint it tells.
///
/// # Errors
/// [`PkiError::Generate`] when key or names cannot be used, [`PkiError::Tls`] when certificate and key cannot.
pub fn waiting_console_tls(key: &str, names: &[&str]) -> Result<Arc<ServerConfig>, PkiError> {
    let (certificate, key) = own(key, names.first().copied().unwrap_or(WAITING_NAME), names)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// The name that the caller of a meeting gives to TLS; nobody checks it.
pub fn waiting_name() -> ServerName<'static> {
    ServerName::try_from(WAITING_NAME).expect("WAITING_NAME is a DNS name")
}

/// The fingerprint of the key in a certificate (DER), as [`super::SigningRequest::fingerprint`] writes it.
///
/// # Errors
/// [`PkiError::Identity`] when the bytes are not a certificate.
pub fn key_fingerprint(certificate: &[u8]) -> Result<String, PkiError> {
    Ok(fingerprint(parse(certificate)?.public_key().raw))
}

/// Which node of which cluster a certificate (DER) proves its holder to be, if one of these authorities (PEM) has
/// signed it and it is valid at this time, in seconds since 1970.
///
/// # Errors
/// [`PkiError::Identity`] when none has, or it is not a node's; [`PkiError::Custom`] when the authorities cannot be
/// read.
pub fn proven_node(certificate: &[u8], authorities: &str, now: u64) -> Result<(ClusterId, NodeId), PkiError> {
    let known = pem::certificates(authorities).map_err(|error| PkiError::Custom(error.to_string()))?;
    if !known.iter().any(|authority| is_issued_by(certificate, authority)) {
        return Err(PkiError::Identity("its certificate is not one of the authority that it names"));
    }
    let (from, until) = validity(&parse(certificate)?);
    if !(from..until).contains(&now) {
        return Err(PkiError::Identity("its certificate is not valid now: are both clocks right?"));
    }
    peer_identity(certificate)
}
