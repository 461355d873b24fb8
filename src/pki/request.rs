//! Signing requests: a host makes a key, and asks for a certificate without giving the key away. Owns their making and
//! their checking; must never let anything but a sound P-256 key through.

use rcgen::{CertificateSigningRequestParams, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKey, PublicKeyData};
use x509_parser::{certification_request::X509CertificationRequest, extensions::ParsedExtension, prelude::FromDer};

use super::{
    PkiError, certificate_der, fingerprint,
    params::{alternative_name, params},
    parse, pem, validity,
};

/// Longest signing request that is accepted, in bytes of PEM.
const MAX_REQUEST: usize = 4096;
/// Days of validity in the parameters of a request, which has none.
const NONE: u32 = 0;

/// A new private key, PEM.
///
/// # Errors
/// [`PkiError::Generate`] when the key cannot be made.
pub fn new_key() -> Result<String, PkiError> {
    Ok(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?.serialize_pem())
}

/// Makes a key for a node and the signing request for it: `(request, key)`, both PEM. The names are for people who look
/// at the request; the authority decides the real ones.
///
/// # Errors
/// [`PkiError::Generate`] when the key cannot be made, or an address cannot be in a certificate.
pub fn node_request(name: &str, addresses: &[&str]) -> Result<(String, String), PkiError> {
    let key = new_key()?;
    Ok((request_with(&key, name, addresses)?, key))
}

/// A new key for a Console, and a request for a certificate with these names.
///
/// # Errors
/// [`PkiError::Generate`] when the key cannot be made, or a name cannot be in a certificate.
pub fn console_request(names: &[&str]) -> Result<(String, String), PkiError> {
    node_request(names.first().copied().unwrap_or_default(), names)
}

/// A signing request for a private key (PEM) that exists already.
///
/// # Errors
/// [`PkiError::Generate`] when the text is not a private key, or an address cannot be in a certificate.
pub fn request_with(key: &str, name: &str, addresses: &[&str]) -> Result<String, PkiError> {
    let key = pem::key_pair(key).map_err(|error| PkiError::Generate(error.to_string()))?;
    let mut params = params(name, NONE);
    for address in addresses {
        params.subject_alt_names.push(alternative_name(address)?);
    }
    Ok(params.serialize_request(&key)?.pem()?)
}

/// A signing request that is sound: signed by the key that it is for, an ECDSA key on P-256.
pub struct SigningRequest {
    key: PublicKey,
    fingerprint: String,
}

impl SigningRequest {
    /// Checks a request, PEM.
    ///
    /// # Errors
    /// [`PkiError::Request`] with what is wrong: the request is too long, cannot be parsed, is not signed by its own
    /// key, or is for a key of another kind.
    pub fn parse(pem: &str) -> Result<Self, PkiError> {
        if pem.len() > MAX_REQUEST {
            return Err(PkiError::Request("it is too long"));
        }
        // Verifies the signature, too.
        let CertificateSigningRequestParams { public_key: key, .. } = CertificateSigningRequestParams::from_pem(pem)
            .map_err(|error| match error {
                rcgen::Error::InvalidCertificationRequestSignature => {
                    PkiError::Request("its signature is not that of its own key")
                }
                rcgen::Error::UnsupportedSignatureAlgorithm => {
                    PkiError::Request("its key is not an ECDSA key on P-256")
                }
                rcgen::Error::UnsupportedExtension => PkiError::Request("it asks for an unknown extension"),
                _ => PkiError::Request("it cannot be parsed"),
            })?;
        // The library takes the algorithm of the signature for the key's: look at the key itself.
        let (_, der) =
            x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|_| PkiError::Request("it is not PEM"))?;
        let (rest, request) =
            X509CertificationRequest::from_der(&der.contents).map_err(|_| PkiError::Request("it cannot be parsed"))?;
        let stated = request.certification_request_info.subject_pki.raw;
        let understood = key.subject_public_key_info();
        if *key.algorithm() != PKCS_ECDSA_P256_SHA256 || stated != understood || !rest.is_empty() {
            return Err(PkiError::Request("its key is not an ECDSA key on P-256"));
        }
        Ok(Self { fingerprint: fingerprint(&understood), key })
    }

    /// SHA-256 of the public key (SubjectPublicKeyInfo), as [`fingerprint`] writes it.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    pub(super) fn key(&self) -> &PublicKey {
        &self.key
    }
}

/// The fingerprint of the key in a certificate (PEM), as [`SigningRequest::fingerprint`] writes it.
///
/// # Errors
/// [`PkiError::Identity`] when the text is not a certificate.
pub fn certificate_key(pem: &str) -> Result<String, PkiError> {
    let der = certificate_der(pem)?;
    Ok(fingerprint(parse(&der)?.public_key().raw))
}

/// From when to when a certificate (PEM) is valid, in seconds since 1970.
///
/// # Errors
/// [`PkiError::Identity`] when the text is not a certificate.
pub fn certificate_validity(pem: &str) -> Result<(u64, u64), PkiError> {
    let der = certificate_der(pem)?;
    Ok(validity(&parse(&der)?))
}

/// True if a certificate (PEM) says that this authority (PEM) signed it. Two authorities of one cluster have the same
/// name: their keys tell them apart. Proves nothing; TLS checks signatures.
///
/// # Errors
/// [`PkiError::Identity`] when one of the two texts is not a certificate.
pub fn is_signed_by(pem: &str, authority: &str) -> Result<bool, PkiError> {
    let (der, authority) = (certificate_der(pem)?, certificate_der(authority)?);
    let (parsed, authority) = (parse(&der)?, parse(&authority)?);
    let signer = parsed.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(found) => found.key_identifier.as_ref().map(|id| id.0),
        _ => None,
    });
    let own = authority.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(found) => Some(found.0),
        _ => None,
    });
    Ok(parsed.issuer().as_raw() == authority.subject().as_raw() && signer.is_some() && signer == own)
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, PKCS_ECDSA_P384_SHA384, PKCS_ED25519};
    use x509_parser::certificate::X509Certificate;

    use super::*;
    use crate::{
        cluster::ClusterId,
        pki::{Authority, PEER_NAME, peer_identity},
    };

    const CLUSTER: ClusterId = ClusterId(0xabcd);

    #[test]
    fn only_the_key_of_a_request_counts() {
        let authority = Authority::create(CLUSTER).unwrap();
        // A host that would like to be node 1 and every node's Console.
        let evil = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut wish = params("node1", NONE);
        let uri = format!("twistlock://{CLUSTER}/node/1");
        wish.subject_alt_names =
            vec![rcgen::SanType::URI(uri.try_into().unwrap()), alternative_name("console.example").unwrap()];
        wish.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let csr = wish.serialize_request(&evil).unwrap().pem().unwrap();
        let signed = authority.sign_request(&csr, 4, "host4", &["192.0.2.4"]).unwrap();
        assert_eq!(peer_identity(&certificate_der(&signed).unwrap()).unwrap(), (CLUSTER, 4));
        let der = certificate_der(&signed).unwrap();
        let (_, parsed) = X509Certificate::from_der(&der).unwrap();
        assert!(!parsed.is_ca());
        let text = format!("{:?}", parsed.subject_alternative_name().unwrap().unwrap().value);
        assert!(text.contains(PEER_NAME) && !text.contains("console.example") && !text.contains("/node/1\""), "{text}");
        assert!(parsed.subject().to_string().contains("host4"));
        assert_eq!(SigningRequest::parse(&csr).unwrap().fingerprint(), certificate_key(&signed).unwrap());
        let console = authority.sign_console_request(&csr, &["other.example"]).unwrap();
        assert!(peer_identity(&certificate_der(&console).unwrap()).is_err());
        assert!(authority.sign_console_request(&csr, &[PEER_NAME]).is_err());
    }

    #[test]
    fn unsound_requests_are_refused() {
        let (csr, _) = node_request("host", &["192.0.2.1", "host.example"]).unwrap();
        assert!(csr.len() <= 1024, "{}", csr.len());
        SigningRequest::parse(&csr).unwrap();
        // Another key put into a signed request: the signature does not fit any more.
        let (other, _) = node_request("host", &["192.0.2.1", "host.example"]).unwrap();
        let der = |pem: &str| x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap().1.contents;
        let point = |der: &[u8]| {
            let (_, request) = X509CertificationRequest::from_der(der).unwrap();
            request.certification_request_info.subject_pki.subject_public_key.data.to_vec()
        };
        let (mut forged, stolen) = (der(&csr), point(&der(&other)));
        let own = point(&forged);
        let at = forged.windows(own.len()).position(|window| window == own).unwrap();
        forged[at..at + own.len()].copy_from_slice(&stolen);
        let error = SigningRequest::parse(&pem(&forged)).err().unwrap().to_string();
        assert!(error.contains("its own key"), "{error}");
        for kind in [&PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
            let key = KeyPair::generate_for(kind).unwrap();
            let csr = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
            let error = SigningRequest::parse(&csr).err().unwrap().to_string();
            assert!(error.contains("P-256"), "{error}");
        }
        let long = format!("{csr}{}", " ".repeat(MAX_REQUEST));
        for wrong in ["", "-----BEGIN CERTIFICATE REQUEST-----", &csr[..csr.len() / 2], &long] {
            assert!(matches!(SigningRequest::parse(wrong), Err(PkiError::Request(_))), "{wrong}");
        }
    }

    fn pem(der: &[u8]) -> String {
        use base64::{Engine, engine::general_purpose::STANDARD};
        let begin = "-----BEGIN CERTIFICATE REQUEST-----";
        format!("{begin}\n{}\n-----END CERTIFICATE REQUEST-----\n", STANDARD.encode(der))
    }

    #[test]
    fn a_key_is_used_again() {
        let (first, key) = console_request(&["console.example", "192.0.2.1"]).unwrap();
        let second = request_with(&key, "other", &[]).unwrap();
        let fingerprint = |csr: &str| SigningRequest::parse(csr).unwrap().fingerprint().to_owned();
        assert_eq!(fingerprint(&first), fingerprint(&second));
        assert!(request_with("no key", "other", &[]).is_err());
    }

    #[test]
    fn authorities_of_one_cluster_are_told_apart() {
        let (old, new) = (Authority::create(CLUSTER).unwrap(), Authority::create(CLUSTER).unwrap());
        let console = old.issue_console(&["console.example"]).unwrap().cert_pem;
        for leaf in [old.issue_node(1, "a", &[]).unwrap().cert_pem, console] {
            assert!(is_signed_by(&leaf, old.certificate_pem()).unwrap());
            assert!(!is_signed_by(&leaf, new.certificate_pem()).unwrap());
        }
    }

    #[test]
    fn an_expiry_is_a_year_ahead() {
        let issued = Authority::create(CLUSTER).unwrap().issue_node(1, "a", &[]).unwrap();
        let now = crate::clock::unix_time();
        let (from, until) = certificate_validity(&issued.cert_pem).unwrap();
        assert!(from < now && (363..=365).contains(&((until - now) / 86_400)), "{from} {now} {until}");
    }
}
