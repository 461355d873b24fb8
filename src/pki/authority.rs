//! The cluster's certificate authority: makes and signs certificates. Decides every name in them; must never take a
//! name, a usage or an extension from a signing request.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};

use super::{
    CA_CERTIFICATE, CA_KEY, CONSOLE_CERTIFICATE, CONSOLE_KEY, CONSOLE_NAME, ClusterKey, ClusterKeys, NODE_CERTIFICATE,
    NODE_KEY, PEER_NAME, PkiError, SigningRequest, certificate_key, certificate_validity, fingerprint, malformed,
    params::{BACKDATE, alternative_name, params},
    pem, read_file,
    sealed::Purpose,
    write_file,
};
use crate::{
    clock::unix_time,
    cluster::{ClusterId, NodeId, shared::authority::SealedAuthority},
};

const CA_DAYS: u32 = 3650;
pub(super) const LEAF_DAYS: u32 = 365;

/// A certificate and its private key, both PEM.
#[derive(Clone)]
pub struct Issued {
    pub cert_pem: String,
    pub key_pem: String,
}

impl Issued {
    /// Writes certificate and key (mode 0600) as this node's.
    ///
    /// # Errors
    /// [`PkiError::File`] when a file cannot be written.
    pub fn save_node(&self, dir: &Path) -> Result<(), PkiError> {
        write_file(&dir.join(NODE_KEY), &self.key_pem, 0o600)?;
        write_file(&dir.join(NODE_CERTIFICATE), &self.cert_pem, 0o644)
    }

    /// Writes certificate and key (mode 0600) as the Console's.
    ///
    /// # Errors
    /// [`PkiError::File`] when a file cannot be written.
    pub fn save_console(&self, dir: &Path) -> Result<(), PkiError> {
        write_file(&dir.join(CONSOLE_KEY), &self.key_pem, 0o600)?;
        write_file(&dir.join(CONSOLE_CERTIFICATE), &self.cert_pem, 0o644)
    }
}

/// The cluster's certificate authority: ECDSA P-256.
pub struct Authority {
    cluster: ClusterId,
    cert_pem: String,
    key: KeyPair,
}

impl Authority {
    /// Makes a new authority, valid for ten years.
    ///
    /// It has no name constraints: the Console's names are the administrator's choice, and X.509 libraries differ in
    /// what they understand. What keeps Console certificates from being used by nodes is in
    /// [`crate::pki::peer_identity`].
    ///
    /// # Errors
    /// [`PkiError::Generate`] when the key or the certificate cannot be made.
    pub fn create(cluster: ClusterId) -> Result<Self, PkiError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        // The cluster id in the name lets TLS tell "another cluster's authority" from "a forged signature".
        let mut params = params(&format!("Twistlock {cluster}"), CA_DAYS);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let cert_pem = params.self_signed(&key)?.pem();
        Ok(Self { cluster, cert_pem, key })
    }

    /// Makes the authority of a new cluster and the key that its members share, and writes what belongs into this
    /// folder: the authority's private key is nowhere but in the sealed form, which goes into the membership.
    ///
    /// # Errors
    /// [`PkiError::Generate`] when a key or the certificate cannot be made, [`PkiError::File`] when a file cannot be
    /// written. Another attempt makes another authority.
    pub fn establish(cluster: ClusterId, dir: &Path) -> Result<(Self, SealedAuthority), PkiError> {
        let (authority, key) = (Self::create(cluster)?, ClusterKey::generate());
        let sealed = authority.seal(&key)?;
        key.save(dir)?;
        authority.save_certificate(dir)?;
        Ok((authority, sealed))
    }

    /// Reads the authority of `cluster` from its folder.
    ///
    /// # Errors
    /// [`PkiError::File`] when a file cannot be read, [`PkiError::Malformed`] when the one of the key does not hold a
    /// private key. The certificate is parsed only when something is to be signed.
    pub fn load(cluster: ClusterId, dir: &Path) -> Result<Self, PkiError> {
        let cert_pem = read_file(&dir.join(CA_CERTIFICATE))?;
        let path = dir.join(CA_KEY);
        let key = pem::key_pair(read_file(&path)?).map_err(|error| malformed(path, "a private key", error))?;
        Ok(Self { cluster, cert_pem, key })
    }

    /// The private key, encrypted so that only members can use it.
    ///
    /// # Errors
    /// [`PkiError::Sealed`] when the private key is too long for the cipher. No real one is.
    pub fn seal(&self, key: &ClusterKey) -> Result<SealedAuthority, PkiError> {
        let sealed_key = key.seal(Purpose::Authority, self.cluster, &self.key.serialize_der())?;
        Ok(SealedAuthority { certificate: self.cert_pem.clone(), sealed_key, key: Some(key.id()) })
    }

    /// [`Authority::unseal`] with the key in this folder that fits.
    ///
    /// # Errors
    /// [`PkiError::Sealed`] when this node does not have the key (yet), or the authority cannot be unsealed with it.
    /// [`PkiError::File`] and [`PkiError::Malformed`] when a key of this folder cannot be read.
    pub fn open(cluster: ClusterId, sealed: &SealedAuthority, dir: &Path) -> Result<Self, PkiError> {
        Self::unseal(cluster, sealed, ClusterKeys::load(dir)?.for_authority(sealed)?)
    }

    /// The inverse of [`Authority::seal`].
    ///
    /// # Errors
    /// [`PkiError::Sealed`] when it was sealed with another key or for another cluster, is damaged, or does not belong
    /// to the authority's certificate. [`PkiError::Identity`] when that certificate cannot be parsed.
    pub fn unseal(cluster: ClusterId, sealed: &SealedAuthority, key: &ClusterKey) -> Result<Self, PkiError> {
        let der = key.unseal(Purpose::Authority, cluster, &sealed.sealed_key)?;
        let key = KeyPair::try_from(der.as_slice()).map_err(|_| PkiError::Sealed("it is not a private key"))?;
        if certificate_key(&sealed.certificate)? != fingerprint(&key.subject_public_key_info()) {
            return Err(PkiError::Sealed("it does not belong to the authority's certificate"));
        }
        Ok(Self { cluster, cert_pem: sealed.certificate.clone(), key })
    }

    /// Writes certificate and key (mode 0600).
    ///
    /// # Errors
    /// [`PkiError::File`] when a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), PkiError> {
        write_file(&dir.join(CA_KEY), self.key.serialize_pem(), 0o600)?;
        self.save_certificate(dir)
    }

    /// Writes the certificate alone: a node that does not sign needs nothing else.
    ///
    /// # Errors
    /// [`PkiError::File`] when the file cannot be written.
    pub fn save_certificate(&self, dir: &Path) -> Result<(), PkiError> {
        write_file(&dir.join(CA_CERTIFICATE), &self.cert_pem, 0o644)
    }

    pub(super) fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// The authority's certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.cert_pem
    }

    /// Makes key and certificate of a node, valid for a year, for both ends of TLS. `name` and `addresses` (host names
    /// or IP addresses) are for people.
    ///
    /// # Errors
    /// [`PkiError::Generate`] when the key cannot be made, or an address cannot be in a certificate.
    /// [`PkiError::Identity`] when this host's clock is before the beginning of the authority.
    pub fn issue_node(&self, node: NodeId, name: &str, addresses: &[&str]) -> Result<Issued, PkiError> {
        let (cert_pem, key) = self.with_new_key(self.node_params(node, name, addresses)?)?;
        Ok(Issued { cert_pem, key_pem: key.serialize_pem() })
    }

    /// Signs the request of a host, whose key stays where it is. Of the request only the key counts; the names in it
    /// mean nothing, because the cluster decides who somebody is.
    ///
    /// # Errors
    /// [`PkiError::Request`] when the request is not sound, [`PkiError::Generate`] when an address cannot be in a
    /// certificate. [`PkiError::Identity`] when this host's clock is before the beginning of the authority.
    pub fn sign_request(&self, csr: &str, node: NodeId, name: &str, addresses: &[&str]) -> Result<String, PkiError> {
        let request = SigningRequest::parse(csr)?;
        self.certify(self.node_params(node, name, addresses)?, request.key())
    }

    fn node_params(&self, node: NodeId, name: &str, addresses: &[&str]) -> Result<CertificateParams, PkiError> {
        let mut params = params(name, LEAF_DAYS);
        let uri = format!("twistlock://{}/node/{node}", self.cluster);
        params.subject_alt_names = vec![SanType::DnsName(PEER_NAME.try_into()?), SanType::URI(uri.try_into()?)];
        for address in addresses {
            params.subject_alt_names.push(alternative_name(address)?);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok(params)
    }

    /// Makes key and certificate of the Console, valid for a year, for `names` (host names or IP addresses) and
    /// [`CONSOLE_NAME`]; the first one is the common name.
    ///
    /// # Errors
    /// [`PkiError::Name`] when there is no name, or one that nodes or Consoles use among themselves.
    /// [`PkiError::Generate`] when the key cannot be made, or a name cannot be in a certificate. [`PkiError::Identity`]
    /// when this host's clock is before the beginning of the authority.
    pub fn issue_console(&self, names: &[&str]) -> Result<Issued, PkiError> {
        let (cert_pem, key) = self.with_new_key(console_params(names)?)?;
        Ok(Issued { cert_pem, key_pem: key.serialize_pem() })
    }

    /// Signs the request of a Console, whose key stays where it is.
    ///
    /// # Errors
    /// [`PkiError::Request`] when the request is not sound. [`PkiError::Name`] when there is no name, or one that nodes
    /// or Consoles use among themselves, [`PkiError::Generate`] when one cannot be in a certificate.
    /// [`PkiError::Identity`] when this host's clock is before the beginning of the authority.
    pub fn sign_console_request(&self, csr: &str, names: &[&str]) -> Result<String, PkiError> {
        let request = SigningRequest::parse(csr)?;
        self.certify(console_params(names)?, request.key())
    }

    fn with_new_key(&self, params: CertificateParams) -> Result<(String, KeyPair), PkiError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        Ok((self.certify(params, &key)?, key))
    }

    pub(super) fn certify(&self, mut params: CertificateParams, key: &impl PublicKeyData) -> Result<String, PkiError> {
        let now = unix_time();
        check_clock(&self.cert_pem, now)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let issuer = Issuer::from_ca_cert_pem(&self.cert_pem, &self.key)?;
        Ok(params.signed_by(key, &issuer)?.pem())
    }
}

/// Refuses to sign by a clock that is before the beginning of the authority. Such a clock is wrong: what it dates could
/// have expired for everybody else.
fn check_clock(authority: &str, now: u64) -> Result<(), PkiError> {
    if now < certificate_validity(authority)?.0 {
        return Err(PkiError::Identity(
            "the clock of this host is wrong: it is before the certificate authority was made",
        ));
    }
    Ok(())
}

/// When an authority with this certificate was made, in seconds since 1970.
///
/// # Errors
/// [`PkiError::Identity`] when the text is not a certificate.
pub fn authority_made_at(pem: &str) -> Result<u64, PkiError> {
    Ok(certificate_validity(pem)?.0 + BACKDATE.as_secs())
}

/// True for a name that nodes or Consoles use among themselves, and for a wildcard that would cover it.
pub fn is_reserved(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let covers = |reserved: &str| name.strip_prefix('*').is_some_and(|rest| reserved.ends_with(rest));
    [PEER_NAME, CONSOLE_NAME].iter().any(|reserved| name == *reserved || covers(reserved))
}

fn console_params(names: &[&str]) -> Result<CertificateParams, PkiError> {
    let first = names.first().ok_or_else(|| PkiError::Name(String::new()))?;
    let mut params = params(first, LEAF_DAYS);
    for name in names {
        if is_reserved(name) || name.is_empty() {
            return Err(PkiError::Name((*name).to_owned()));
        }
        params.subject_alt_names.push(alternative_name(name)?);
    }
    params.subject_alt_names.push(alternative_name(CONSOLE_NAME)?);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    Ok(params)
}
