//! What a Console shows its clients: certificate chains with their keys, what is in them, and the TLS settings made of
//! them. Owns the checks of a certificate that an administrator brings; must never log a key, or accept one that does
//! not fit.

use std::{fmt, net::IpAddr, path::Path, sync::Arc};

use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use serde::{Deserialize, Serialize};
use x509_parser::{
    certificate::X509Certificate,
    extensions::GeneralName,
    oid_registry::{OID_PKCS1_MD5WITHRSAENC, OID_PKCS1_SHA1WITHRSA, OID_SIG_ED25519},
    public_key::PublicKey,
};

use super::{
    CONSOLE_NAME, ClusterKey, PkiError, UNREADABLE, fingerprint, parse,
    pem::{self, PemError},
    provider, read_file,
    sealed::Purpose,
    validity,
};
use crate::cluster::{ClusterId, shared::console_certificate::CustomCertificate};

/// Certificates in one chain, at most.
const MAX_CERTIFICATES: usize = 8;
/// Smallest RSA key that is accepted, in bits: rustls and today's browsers refuse smaller ones.
const MIN_RSA: usize = 2048;
/// How many days before its end a certificate is reported.
const EXPIRY_DAYS: [u64; 3] = [30, 7, 1];

/// What is in a certificate, for people and for those who watch it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct CertificateInfo {
    pub subject: String,
    pub issuer: String,
    /// The host names and IP addresses that it is good for.
    pub names: Vec<String>,
    /// From when to when it is valid, in seconds since 1970.
    pub not_before: u64,
    pub not_after: u64,
    /// SHA-256, as browsers show it.
    pub fingerprint: String,
}

impl CertificateInfo {
    /// Reads a certificate (DER).
    ///
    /// # Errors
    /// [`PkiError::Identity`] when the bytes are not a certificate, or its names cannot be parsed.
    pub fn read(der: &[u8]) -> Result<Self, PkiError> {
        let parsed = parse(der)?;
        let (not_before, not_after) = validity(&parsed);
        let shown = |text: String| text.chars().filter(|c| !c.is_control()).collect();
        Ok(Self {
            subject: shown(parsed.subject().to_string()),
            issuer: shown(parsed.issuer().to_string()),
            names: names(&parsed)?,
            not_before,
            not_after,
            fingerprint: fingerprint(der),
        })
    }

    /// How near its end is at this time (seconds since 1970): the last of [`EXPIRY_DAYS`] that it has reached, 0 once
    /// it has expired; none while there is time enough.
    pub fn expiry_step(&self, now: u64) -> Option<u64> {
        match self.not_after.saturating_sub(now) {
            0 => Some(0),
            left => EXPIRY_DAYS.into_iter().rev().find(|days| left <= days * 86_400),
        }
    }

    /// True if the certificate is good for this host name or IP address.
    pub fn covers(&self, wanted: &str) -> bool {
        let wanted = wanted.trim_end_matches('.').to_ascii_lowercase();
        if let Ok(address) = wanted.parse::<IpAddr>() {
            return self.names.iter().any(|name| name.parse() == Ok(address));
        }
        self.names.iter().any(|name| {
            // A wildcard stands for one whole label.
            let under = |domain: &str| wanted.split_once('.').is_some_and(|(_, rest)| rest == domain);
            *name == wanted || name.strip_prefix("*.").is_some_and(under)
        })
    }
}

fn names(parsed: &X509Certificate<'_>) -> Result<Vec<String>, PkiError> {
    let found = parsed.subject_alternative_name().map_err(|_| UNREADABLE)?;
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).ok().map(IpAddr::from);
            v4.or_else(|| <[u8; 16]>::try_from(*bytes).ok().map(IpAddr::from)).map(|address| address.to_string())
        }
        _ => None,
    };
    Ok(found.map(|found| found.value.general_names.iter().filter_map(name).collect()).unwrap_or_default())
}

/// True if this certificate (DER) was signed by the authority with that one (DER), as its signature proves.
pub fn is_issued_by(certificate: &[u8], authority: &[u8]) -> bool {
    let (Ok(certificate), Ok(authority)) = (parse(certificate), parse(authority)) else { return false };
    certificate.issuer().as_raw() == authority.subject().as_raw()
        && certificate.verify_signature(Some(authority.public_key())).is_ok()
}

/// A certificate chain that begins with its own certificate, and the private key that belongs to it.
pub struct Pair {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    certified: Arc<CertifiedKey>,
    info: CertificateInfo,
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pair").field("info", &self.info).finish_non_exhaustive()
    }
}

impl Pair {
    /// Reads a chain and a key, both PEM; they may be one text.
    ///
    /// # Errors
    /// [`PkiError::Custom`] with a sentence for whoever brought the two: the PEM cannot be read, a part is missing, the
    /// key is too weak, or it does not belong to the first certificate. [`PkiError::Identity`] when that certificate
    /// cannot be parsed.
    pub fn parse(certificates: &str, key: &str) -> Result<Self, PkiError> {
        let unreadable = |error: PemError| custom(format!("its PEM cannot be read: {error}"));
        Self::new(pem::certificates(certificates).map_err(unreadable)?, pem::private_key(key).map_err(unreadable)?)
    }

    fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, PkiError> {
        let first = chain.first().ok_or_else(|| custom("there is no certificate in PEM form"))?;
        if chain.len() > MAX_CERTIFICATES {
            return Err(custom(format!("it has more than {MAX_CERTIFICATES} certificates")));
        }
        let info = CertificateInfo::read(first)?;
        check_key(first)?;
        let certified = CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider());
        let certified = certified.map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => custom(format!(
                "the private key does not belong to the first certificate ({}): a chain begins with its own certificate",
                info.subject
            )),
            error => custom(format!("the key cannot be used: {error}")),
        })?;
        Ok(Self { certified: Arc::new(certified), chain, key, info })
    }

    /// Reads a chain and its key from two files.
    ///
    /// # Errors
    /// [`PkiError::File`] when a file cannot be read. [`PkiError::Malformed`] when the two cannot be used together; it
    /// names the file of the certificate.
    pub fn load(certificate: &Path, key: &Path) -> Result<Self, PkiError> {
        Self::parse(&read_file(certificate)?, &read_file(key)?).map_err(|error| match error {
            PkiError::File { .. } => error,
            error => PkiError::Malformed {
                path: certificate.into(),
                expected: "a certificate that can be used with its key",
                detail: error.to_string(),
            },
        })
    }

    /// What is in the first certificate.
    pub fn info(&self) -> &CertificateInfo {
        &self.info
    }

    /// Shows this certificate whatever a client asks for.
    pub(super) fn resolver(&self) -> Arc<dyn ResolvesServerCert> {
        Arc::new(ByName { served: Arc::clone(&self.certified), own: Arc::clone(&self.certified) })
    }

    /// True if the first certificate was signed by the authority with that certificate (DER).
    pub fn is_signed_by(&self, authority: &[u8]) -> bool {
        is_issued_by(&self.chain[0], authority)
    }

    /// True if chain and key are the same.
    pub fn is_same(&self, other: &Self) -> bool {
        self.chain == other.chain && self.key == other.key
    }

    /// Checks whether an administrator's certificate can be taken at this time (seconds since 1970): its chain must be
    /// in order, valid, and for servers.
    ///
    /// # Errors
    /// [`PkiError::Custom`] with a sentence: a certificate has expired, is not valid yet, or is signed with SHA-1 or
    /// MD5; the chain is not in order; or its first certificate is not for servers. [`PkiError::Identity`] when a
    /// certificate cannot be parsed.
    pub fn check(&self, now: u64) -> Result<(), PkiError> {
        for (place, der) in self.chain.iter().enumerate() {
            let info = CertificateInfo::read(der)?;
            let parsed = parse(der)?;
            let subject = &info.subject;
            if info.not_after <= now {
                return Err(custom(format!("{subject} has expired on {}", date(info.not_after))));
            }
            if info.not_before > now {
                return Err(custom(format!("{subject} is not valid before {}", date(info.not_before))));
            }
            let algorithm = &parsed.signature_algorithm.algorithm;
            let own = parsed.issuer() == parsed.subject();
            if !own && [OID_PKCS1_SHA1WITHRSA, OID_PKCS1_MD5WITHRSAENC].contains(algorithm) {
                return Err(custom(format!("{subject} is signed with SHA-1 or MD5, which no client accepts any more")));
            }
            if let Some(next) = self.chain.get(place + 1)
                && !is_issued_by(der, next)
            {
                return Err(custom(format!(
                    "the chain is not in order: {subject} was issued by {}, but {} comes next",
                    info.issuer,
                    CertificateInfo::read(next)?.subject
                )));
            }
        }
        let first = parse(&self.chain[0])?;
        let usage = first.extended_key_usage().map_err(|_| UNREADABLE)?;
        if usage.is_some_and(|usage| !usage.value.server_auth && !usage.value.any) {
            return Err(custom(format!("{} is not for servers (its extended key usage)", self.info.subject)));
        }
        Ok(())
    }

    /// Who issued the last certificate of the chain, if clients are unlikely to know that issuer: it is not in the
    /// chain, this host does not trust it, and it is none of `known` (PEM). None if the last certificate signed itself.
    ///
    /// # Errors
    /// [`PkiError::Identity`] when the last certificate cannot be parsed.
    pub fn missing_issuer<'a>(&self, known: impl Iterator<Item = &'a str>) -> Result<Option<String>, PkiError> {
        let Some(last) = self.chain.last() else { return Ok(None) };
        let parsed = parse(last)?;
        if parsed.issuer().as_raw() == parsed.subject().as_raw() {
            return Ok(None);
        }
        let known = known.filter_map(|pem| pem::certificates(pem).ok()).flatten();
        let issued =
            known.chain(rustls_native_certs::load_native_certs().certs).any(|issuer| is_issued_by(last, &issuer));
        (!issued).then(|| CertificateInfo::read(last).map(|info| info.issuer)).transpose()
    }

    /// Certificate and key, the key encrypted, for all members to keep.
    ///
    /// # Errors
    /// [`PkiError::Sealed`] when the private key is too long for the cipher. No real one is.
    pub fn seal(&self, key: &ClusterKey, cluster: ClusterId, by: &str, at: u64) -> Result<CustomCertificate, PkiError> {
        let sealed_key = key.seal(Purpose::Console, cluster, self.key.secret_der())?;
        Ok(CustomCertificate { chain: as_pem(&self.chain), sealed_key, key: key.id(), by: by.to_owned(), at })
    }

    /// The inverse of [`Pair::seal`].
    ///
    /// # Errors
    /// [`PkiError::Sealed`] when it was sealed with another key or for another cluster, or is damaged.
    /// [`PkiError::Custom`] and [`PkiError::Identity`] when chain and key cannot be used together.
    pub fn unseal(cluster: ClusterId, sealed: &CustomCertificate, key: &ClusterKey) -> Result<Self, PkiError> {
        let der = key.unseal(Purpose::Console, cluster, &sealed.sealed_key)?;
        let key = PrivateKeyDer::try_from(der).map_err(|_| PkiError::Sealed("it is not a private key"))?;
        Self::new(pem::certificates(&sealed.chain).map_err(|error| custom(error.to_string()))?, key)
    }
}

/// Encrypts the private key of an administrator's certificate with another cluster key.
///
/// # Errors
/// [`PkiError::Sealed`] when `old` is not the key with which it was sealed, or the text is damaged.
pub fn reseal(
    cluster: ClusterId,
    sealed: &CustomCertificate,
    old: &ClusterKey,
    new: &ClusterKey,
) -> Result<CustomCertificate, PkiError> {
    let der = old.unseal(Purpose::Console, cluster, &sealed.sealed_key)?;
    let sealed_key = new.seal(Purpose::Console, cluster, &der)?;
    Ok(CustomCertificate { sealed_key, key: new.id(), ..sealed.clone() })
}

/// Refuses keys that are too weak or that browsers do not know.
fn check_key(certificate: &[u8]) -> Result<(), PkiError> {
    let parsed = parse(certificate)?;
    let key = parsed.public_key();
    match key.parsed() {
        Ok(PublicKey::RSA(rsa)) if rsa.key_size() < MIN_RSA => {
            Err(custom(format!("its RSA key has {} bits, at least {MIN_RSA} are needed", rsa.key_size())))
        }
        _ if key.algorithm.algorithm == OID_SIG_ED25519 => {
            Err(custom("browsers do not accept Ed25519 keys: use one on the curve P-256, or RSA"))
        }
        _ => Ok(()),
    }
}

fn custom(why: impl Into<String>) -> PkiError {
    PkiError::Custom(why.into())
}

/// A day as people write it, in UTC.
fn date(seconds: u64) -> String {
    let day = i64::try_from(seconds).ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    day.map_or_else(|| seconds.to_string(), |day| day.strftime("%Y-%m-%d").to_string())
}

/// Certificates in the form of PEM.
pub fn as_pem(chain: &[CertificateDer<'_>]) -> String {
    use base64::{Engine, prelude::BASE64_STANDARD};
    let mut text = String::new();
    for der in chain {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let encoded = BASE64_STANDARD.encode(der);
        for at in (0..encoded.len()).step_by(64) {
            text.push_str(&encoded[at..encoded.len().min(at + 64)]);
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

/// Chooses by the name that a client asks for: hosts that join trust the cluster's own authority alone.
#[derive(Debug)]
struct ByName {
    served: Arc<CertifiedKey>,
    own: Arc<CertifiedKey>,
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let internal = hello.server_name().is_some_and(|name| name.eq_ignore_ascii_case(CONSOLE_NAME));
        Some(Arc::clone(if internal { &self.own } else { &self.served }))
    }
}

/// TLS for the Console's ports: TLS 1.2 and 1.3, HTTP/1.1 and 1.0, no client certificate. Clients that ask for
/// [`CONSOLE_NAME`] get the cluster's `own` certificate, all others what is `served`.
///
/// # Errors
/// [`PkiError::Tls`] when the cryptography that this program was built with has neither TLS 1.2 nor 1.3.
pub fn console_tls(served: &Pair, own: &Pair) -> Result<Arc<ServerConfig>, PkiError> {
    let certificates = ByName { served: Arc::clone(&served.certified), own: Arc::clone(&own.certified) };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(certificates));
    config.alpn_protocols = vec![b"http/1.1".to_vec(), b"http/1.0".to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
#[path = "console_tests.rs"]
mod tests;
