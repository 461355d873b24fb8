//! The cluster key: what members share so that each of them can sign for the cluster. Owns its file and the sealing of
//! private keys; must never be logged, replicated or sent but to a member over a node's own TLS connection.

use std::{fmt, fs, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    digest,
};

use super::{CLUSTER_KEY, NEXT_CLUSTER_KEY, PkiError, malformed, remove_file, rename_file, write_file};
use crate::cluster::{ClusterId, shared::authority::SealedAuthority, trust::KeyId};

/// Length of the key in bytes.
const LENGTH: usize = 32;
/// Goes before a key in the digest that names it: no digest of the key for another use is ever its name.
const NAME: &[u8] = b"twistlock cluster key name v1";

/// What is sealed. The seal covers it, so that one kind of secret is never taken for another.
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

    /// The bytes, to be given to another member.
    pub fn bytes(&self) -> &[u8; LENGTH] {
        &self.0
    }

    /// The name of the key. The key is random, so nobody can find it by its name.
    pub fn id(&self) -> KeyId {
        KeyId(digest_of(&[NAME, self.0.as_slice()].concat()))
    }

    /// Reads the key in the folder of certificates.
    ///
    /// # Errors
    /// [`PkiError::File`] when the file cannot be read, [`PkiError::Malformed`] when it does not have the length of a
    /// key.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        Self::read(dir, CLUSTER_KEY)
    }

    fn read(dir: &Path, name: &str) -> Result<Self, PkiError> {
        let path = dir.join(name);
        let bytes = fs::read(&path).map_err(|error| PkiError::File { action: "read", path: path.clone(), error })?;
        let key = <[u8; LENGTH]>::try_from(bytes.as_slice());
        key.map(Self)
            .map_err(|_| malformed(path, "a cluster key", format!("{} bytes instead of {LENGTH}", bytes.len())))
    }

    /// Writes the key, mode 0600.
    ///
    /// # Errors
    /// [`PkiError::File`] when the file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), PkiError> {
        write_file(&dir.join(CLUSTER_KEY), self.0, 0o600)
    }

    fn cipher(&self) -> Result<LessSafeKey, PkiError> {
        let key =
            UnboundKey::new(&AES_256_GCM, &self.0).map_err(|_| PkiError::Sealed("the cluster key is not usable"))?;
        Ok(LessSafeKey::new(key))
    }

    /// Encrypts with a random nonce. Returns the nonce and the text, as base64. A cluster seals a handful of times in
    /// its life, so random nonces do not repeat.
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

/// The cluster keys that a member has: the one in use, and the one that was announced to take its place. Both are kept
/// until the membership says that the authority was sealed with the new one, so that a crash at any moment leaves the
/// right one.
#[derive(Debug)]
pub struct ClusterKeys {
    /// In [`CLUSTER_KEY`].
    pub current: Option<ClusterKey>,
    /// In [`NEXT_CLUSTER_KEY`].
    pub next: Option<ClusterKey>,
}

impl ClusterKeys {
    /// Reads the keys in the folder of certificates. One that is not there is none.
    ///
    /// # Errors
    /// [`PkiError::File`] when a file is there and cannot be read. [`PkiError::Malformed`] when it does not have the
    /// length of a key: [`ClusterKeys::load_sound`] goes on without it.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let read = |name| match ClusterKey::read(dir, name) {
            Ok(key) => Ok(Some(key)),
            Err(PkiError::File { error, .. }) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        Ok(Self { current: read(CLUSTER_KEY)?, next: read(NEXT_CLUSTER_KEY)? })
    }

    /// Reads the keys, and keeps a file that holds none under another name: the other members have what was in it. Also
    /// returns what was wrong.
    ///
    /// # Errors
    /// [`PkiError::File`] when a file cannot be read, or one that holds no key cannot be moved away.
    pub fn load_sound(dir: &Path) -> Result<(Self, Vec<PkiError>), PkiError> {
        let mut damaged = Vec::new();
        for name in [CLUSTER_KEY, NEXT_CLUSTER_KEY] {
            if let Err(error @ PkiError::Malformed { .. }) = ClusterKey::read(dir, name) {
                rename_file(&dir.join(name), &dir.join(format!("{name}.damaged")))?;
                damaged.push(error);
            }
        }
        Ok((Self::load(dir)?, damaged))
    }

    /// The key with this name.
    pub fn find(&self, id: KeyId) -> Option<&ClusterKey> {
        self.current.iter().chain(&self.next).find(|key| key.id() == id)
    }

    /// The key with which the authority was sealed.
    ///
    /// # Errors
    /// [`PkiError::Sealed`] when this node does not have it (yet): the other members do.
    pub fn for_authority(&self, sealed: &SealedAuthority) -> Result<&ClusterKey, PkiError> {
        let key = match sealed.key {
            Some(id) => self.find(id),
            None => self.current.as_ref(),
        };
        key.ok_or(PkiError::Sealed("this node does not have the cluster key (yet)"))
    }

    /// Keeps the announced key beside the one in use.
    ///
    /// # Errors
    /// [`PkiError::File`] when the file cannot be written: the announced key is not kept.
    pub fn keep_next(&mut self, dir: &Path, key: ClusterKey) -> Result<(), PkiError> {
        write_file(&dir.join(NEXT_CLUSTER_KEY), key.0, 0o600)?;
        self.next = Some(key);
        Ok(())
    }

    /// Puts the announced key in the place of the one in use, in one step.
    ///
    /// # Errors
    /// [`PkiError::File`] when the file cannot be moved: the key in use is still the old one.
    pub fn use_next(&mut self, dir: &Path) -> Result<(), PkiError> {
        rename_file(&dir.join(NEXT_CLUSTER_KEY), &dir.join(CLUSTER_KEY))?;
        self.current = self.next.take().or(self.current.take());
        Ok(())
    }

    /// Forgets the announced key: another one was announced instead, or none is wanted any more.
    ///
    /// # Errors
    /// [`PkiError::File`] when the file cannot be removed: the announced key is still kept.
    pub fn forget_next(&mut self, dir: &Path) -> Result<(), PkiError> {
        remove_file(&dir.join(NEXT_CLUSTER_KEY))?;
        self.next = None;
        Ok(())
    }
}

/// The first 128 bits of the SHA-256 digest.
pub(super) fn digest_of(bytes: &[u8]) -> u128 {
    let digest = digest::digest(&digest::SHA256, bytes);
    digest.as_ref().iter().take(16).fold(0, |sum, byte| sum << 8 | u128::from(*byte))
}

fn bound_to(purpose: Purpose, cluster: ClusterId) -> Aad<Vec<u8>> {
    Aad::from([purpose.label(), &cluster.0.to_be_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{
        cluster::shared::authority::SealedAuthority,
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
    fn an_announced_key_takes_its_place_only_when_it_is_told_to() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let (authority, old) = Authority::establish(CLUSTER, dir).unwrap();
        let mut keys = ClusterKeys::load(dir).unwrap();
        let next = ClusterKey::generate();
        let new = authority.seal(&next).unwrap();
        assert_eq!((new.key, old.key), (Some(next.id()), keys.current.as_ref().map(ClusterKey::id)));
        assert!(keys.for_authority(&new).is_err() && keys.find(next.id()).is_none());
        keys.keep_next(dir, next.clone()).unwrap();
        let mode = fs::metadata(dir.join(NEXT_CLUSTER_KEY)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        for sealed in [&old, &new] {
            Authority::open(CLUSTER, sealed, dir).unwrap();
        }
        keys.use_next(dir).unwrap();
        assert_eq!((keys.next.as_ref(), ClusterKey::load(dir).unwrap()), (None, next));
        Authority::open(CLUSTER, &new, dir).unwrap();
        assert!(
            Authority::open(CLUSTER, &old, dir).err().unwrap().to_string().contains("does not have the cluster key")
        );
        keys.forget_next(dir).unwrap();
        keys.keep_next(dir, ClusterKey::generate()).unwrap();
        keys.forget_next(dir).unwrap();
        assert!(ClusterKeys::load(dir).unwrap().next.is_none() && !dir.join(NEXT_CLUSTER_KEY).exists());
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
