//! The cluster key: what members share so that each of them can sign for the cluster. Owns its file and the sealing of
//! private keys; must never be logged, replicated or sent but to a member over a node's own TLS connection.

use std::{fmt, fs, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use super::{CLUSTER_KEY, PkiError, malformed, write_file};
use crate::cluster::ClusterId;

/// Length of the key in bytes.
const LENGTH: usize = 32;

/// What is sealed, so that nothing else that this key seals is taken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The private key of the cluster's authority.
    Authority,
    /// The private key of a certificate that an administrator has given the Console.
    Console,
}

impl Purpose {
    fn label(self) -> &'static [u8] {
        match self {
            Self::Authority => b"twistlock certificate authority key v1",
            Self::Console => b"twistlock custom console key v1",
        }
    }
}

/// 32 random bytes that all members have, and nobody else.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey([u8; LENGTH]);

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterKey(secret)")
    }
}

impl ClusterKey {
    /// A new key.
    pub fn generate() -> Self {
        Self(rand::random())
    }

    /// A key that came from another member.
    pub fn new(bytes: [u8; LENGTH]) -> Self {
        Self(bytes)
    }

    /// For another member.
    pub fn bytes(&self) -> &[u8; LENGTH] {
        &self.0
    }

    /// Reads the key in the folder of certificates.
    ///
    /// # Errors
    /// [`PkiError::File`] or [`PkiError::Malformed`].
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let path = dir.join(CLUSTER_KEY);
        let bytes = fs::read(&path).map_err(|source| PkiError::File { action: "read", path: path.clone(), source })?;
        let key = <[u8; LENGTH]>::try_from(bytes.as_slice());
        key.map(Self)
            .map_err(|_| malformed(path, "a cluster key", format!("{} bytes instead of {LENGTH}", bytes.len())))
    }

    /// Writes the key, mode 0600.
    ///
    /// # Errors
    /// [`PkiError::File`].
    pub fn save(&self, dir: &Path) -> Result<(), PkiError> {
        write_file(&dir.join(CLUSTER_KEY), self.0, 0o600)
    }

    fn cipher(&self) -> Result<LessSafeKey, PkiError> {
        let key =
            UnboundKey::new(&AES_256_GCM, &self.0).map_err(|_| PkiError::Sealed("the cluster key is not usable"))?;
        Ok(LessSafeKey::new(key))
    }

    /// Encrypts with a random nonce, which stands before the text; base64. A cluster seals a handful of times in its
    /// life, so that random nonces do not meet.
    pub(super) fn seal(&self, purpose: Purpose, cluster: ClusterId, secret: &[u8]) -> Result<String, PkiError> {
        let nonce: [u8; NONCE_LEN] = rand::random();
        let mut text = secret.to_vec();
        self.cipher()?
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), bound_to(purpose, cluster), &mut text)
            .map_err(|_| PkiError::Sealed("it is too long"))?;
        Ok(STANDARD.encode([nonce.as_slice(), &text].concat()))
    }

    pub(super) fn unseal(&self, purpose: Purpose, cluster: ClusterId, sealed: &str) -> Result<Vec<u8>, PkiError> {
        let bytes = STANDARD.decode(sealed).map_err(|_| PkiError::Sealed("it is not base64"))?;
        let (nonce, text) = bytes.split_first_chunk::<NONCE_LEN>().ok_or(PkiError::Sealed("it is too short"))?;
        let mut text = text.to_vec();
        let opened = self
            .cipher()?
            .open_in_place(Nonce::assume_unique_for_key(*nonce), bound_to(purpose, cluster), &mut text)
            .map_err(|_| PkiError::Sealed("it was sealed with another key or for another cluster, or is damaged"))?;
        Ok(opened.to_vec())
    }
}

fn bound_to(purpose: Purpose, cluster: ClusterId) -> Aad<Vec<u8>> {
    Aad::from([purpose.label(), &cluster.0.to_be_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{
        cluster::membership::SealedAuthority,
        pki::{Authority, certificate_der, peer_identity},
    };

    const CLUSTER: ClusterId = ClusterId(0xabcd);

    #[test]
    fn a_sealed_authority_signs_after_it_is_unsealed() {
        let key = ClusterKey::generate();
        let authority = Authority::create(CLUSTER).unwrap();
        let sealed = authority.seal(&key).unwrap();
        assert_ne!(sealed, authority.seal(&key).unwrap(), "the nonce must differ");
        let again = Authority::unseal(CLUSTER, &sealed, &key).unwrap();
        assert_eq!(again.certificate_pem(), authority.certificate_pem());
        let issued = again.issue_node(5, "e", &[]).unwrap();
        assert_eq!(peer_identity(&certificate_der(&issued.cert_pem).unwrap()).unwrap(), (CLUSTER, 5));
    }

    #[test]
    fn another_key_cluster_or_certificate_and_damage_are_refused() {
        let key = ClusterKey::generate();
        let authority = Authority::create(CLUSTER).unwrap();
        let sealed = authority.seal(&key).unwrap();
        let why = |cluster, sealed: &SealedAuthority, key: &ClusterKey| {
            Authority::unseal(cluster, sealed, key).err().expect("refused").to_string()
        };
        assert!(why(CLUSTER, &sealed, &ClusterKey::generate()).contains("another key"));
        assert!(why(ClusterId(1), &sealed, &key).contains("another cluster"));
        let other = Authority::create(CLUSTER).unwrap().seal(&key).unwrap();
        let mixed = SealedAuthority { certificate: other.certificate, ..sealed.clone() };
        assert!(why(CLUSTER, &mixed, &key).contains("does not belong"));
        let mut bytes = STANDARD.decode(&sealed.sealed_key).unwrap();
        for at in [0, NONCE_LEN, bytes.len() - 1] {
            bytes[at] ^= 1;
            let damaged = SealedAuthority { sealed_key: STANDARD.encode(&bytes), ..sealed.clone() };
            assert!(why(CLUSTER, &damaged, &key).contains("damaged"));
            bytes[at] ^= 1;
        }
        for text in ["", "AAAA", "not base64!"] {
            let damaged = SealedAuthority { sealed_key: text.to_owned(), ..sealed.clone() };
            assert!(Authority::unseal(CLUSTER, &damaged, &key).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_sealed_for_one_purpose_is_not_taken_for_another() {
        let key = ClusterKey::generate();
        let sealed = key.seal(Purpose::Console, CLUSTER, b"secret").unwrap();
        assert_eq!(key.unseal(Purpose::Console, CLUSTER, &sealed).unwrap(), b"secret");
        assert!(key.unseal(Purpose::Authority, CLUSTER, &sealed).is_err());
    }

    #[test]
    fn the_key_file_is_private_and_of_one_length() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(ClusterKey::load(dir.path()), Err(PkiError::File { .. })));
        let key = ClusterKey::generate();
        key.save(dir.path()).unwrap();
        assert_eq!(ClusterKey::load(dir.path()).unwrap(), key);
        let path = dir.path().join(CLUSTER_KEY);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&path, "short").unwrap();
        assert!(matches!(ClusterKey::load(dir.path()), Err(PkiError::Malformed { .. })));
        assert_eq!(format!("{key:?}"), "ClusterKey(secret)");
    }
}
