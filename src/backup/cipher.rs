//! The encryption of a backup: the whole file in sealed pieces, so that it is read and written as a stream. Owns the
//! format; must never let a byte out that has not been verified.
//!
//! `"TLSEAL01"`, 16 bytes of salt, then pieces of 65,536 bytes (the last one shorter, maybe empty), each with
//! AES-256-GCM's tag of 16 bytes. The nonce is the number of the piece (u64, big-endian) and a word that is 1 for the
//! last piece only: pieces can be neither changed, moved, dropped nor added. The key is argon2id of the key file's
//! content with the salt, so each file has a key of its own, and a pass phrase will do.

use std::{
    fmt, fs,
    io::{self, ErrorKind, Read, Write},
    path::Path,
};

use argon2::Argon2;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use super::BackupError;

/// What each encrypted file begins with.
pub(super) const MAGIC: &[u8; 8] = b"TLSEAL01";
const SALT: usize = 16;
const PIECE: usize = 64 << 10;
const TAG: usize = 16;
/// A key file is no shorter and no longer than this, in bytes, without the line feed at its end.
const KEY: std::ops::RangeInclusive<usize> = 16..=1024;

/// The content of `BACKUP_KEY_FILE`. Shows nothing of itself.
#[derive(Clone)]
pub(super) struct Secret(Vec<u8>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// Reads a key file.
    ///
    /// # Errors
    /// [`BackupError::Refused`], which names the file, when it cannot be read or is too short or too long.
    pub fn read(path: &Path) -> Result<Self, BackupError> {
        let refused =
            |why: String| BackupError::Refused(format!("BACKUP_KEY_FILE {} cannot be used: {why}", path.display()));
        let mut bytes = Vec::new();
        let file = fs::File::open(path).map_err(|error| refused(error.to_string()))?;
        file.take(*KEY.end() as u64 + 2).read_to_end(&mut bytes).map_err(|error| refused(error.to_string()))?;
        if bytes.ends_with(b"\n") {
            bytes.pop();
        }
        if !KEY.contains(&bytes.len()) {
            return Err(refused(format!("it must hold {} to {} bytes", KEY.start(), KEY.end())));
        }
        Ok(Self(bytes))
    }

    fn key(&self, salt: &[u8; SALT]) -> io::Result<LessSafeKey> {
        let mut bytes = [0; 32];
        Argon2::default()
            .hash_password_into(&self.0, salt, &mut bytes)
            .map_err(|error| io::Error::other(format!("the key cannot be derived: {error}")))?;
        let key = UnboundKey::new(&AES_256_GCM, &bytes).map_err(|_| io::Error::other("the key cannot be used"))?;
        Ok(LessSafeKey::new(key))
    }
}

fn nonce(number: u64, last: bool) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    bytes[8..].copy_from_slice(&u32::from(last).to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Encrypts what is written to it.
pub(super) struct Sealer<W: Write> {
    inner: W,
    key: LessSafeKey,
    number: u64,
    piece: Vec<u8>,
}

impl<W: Write> Sealer<W> {
    pub fn new(mut inner: W, secret: &Secret) -> io::Result<Self> {
        let salt: [u8; SALT] = rand::random();
        let key = secret.key(&salt)?;
        inner.write_all(MAGIC)?;
        inner.write_all(&salt)?;
        Ok(Self { inner, key, number: 0, piece: Vec::with_capacity(PIECE + TAG) })
    }

    fn flush_piece(&mut self, last: bool) -> io::Result<()> {
        self.key
            .seal_in_place_append_tag(nonce(self.number, last), Aad::from(MAGIC), &mut self.piece)
            .map_err(|_| io::Error::other("the backup cannot be encrypted"))?;
        self.inner.write_all(&self.piece)?;
        self.number += 1;
        self.piece.clear();
        Ok(())
    }

    /// Writes the last piece. Without it the file cannot be read.
    pub fn finish(mut self) -> io::Result<W> {
        self.flush_piece(true)?;
        Ok(self.inner)
    }
}

impl<W: Write> Write for Sealer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.piece.len() == PIECE {
            self.flush_piece(false)?;
        }
        let count = bytes.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Decrypts what it reads.
pub(super) struct Opener<R: Read> {
    inner: R,
    key: LessSafeKey,
    number: u64,
    /// The piece behind the present one, still sealed: empty behind the last one.
    next: Vec<u8>,
    plain: Vec<u8>,
    at: usize,
}

impl<R: Read> Opener<R> {
    pub fn new(mut inner: R, secret: &Secret) -> io::Result<Self> {
        let (mut magic, mut salt) = ([0; MAGIC.len()], [0; SALT]);
        inner.read_exact(&mut magic)?;
        inner.read_exact(&mut salt)?;
        if &magic != MAGIC {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                "it is not an encrypted backup that this program knows",
            ));
        }
        let key = secret.key(&salt)?;
        let mut opener = Self { inner, key, number: 0, next: Vec::new(), plain: Vec::new(), at: 0 };
        opener.next = opener.read_piece()?;
        if opener.next.is_empty() {
            return Err(io::Error::new(ErrorKind::InvalidData, "its end is missing"));
        }
        Ok(opener)
    }

    fn read_piece(&mut self) -> io::Result<Vec<u8>> {
        let mut piece = Vec::with_capacity(PIECE + TAG);
        (&mut self.inner).take((PIECE + TAG) as u64).read_to_end(&mut piece)?;
        Ok(piece)
    }

    fn open_next(&mut self) -> io::Result<()> {
        let mut piece = std::mem::take(&mut self.next);
        if piece.is_empty() {
            return Ok(());
        }
        self.next = self.read_piece()?;
        let last = self.next.is_empty();
        let length = self.key.open_in_place(nonce(self.number, last), Aad::from(MAGIC), &mut piece).map(|p| p.len());
        let length = length.map_err(|_| {
            io::Error::new(ErrorKind::InvalidData, "it was changed, or BACKUP_KEY_FILE does not hold its key")
        })?;
        piece.truncate(length);
        (self.plain, self.at) = (piece, 0);
        self.number += 1;
        Ok(())
    }
}

impl<R: Read> Read for Opener<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.at == self.plain.len() {
            self.plain.clear();
            self.at = 0;
            self.open_next()?;
        }
        let count = bytes.len().min(self.plain.len() - self.at);
        bytes[..count].copy_from_slice(&self.plain[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> Secret {
        Secret(text.as_bytes().to_vec())
    }

    fn seal(plain: &[u8]) -> Vec<u8> {
        let mut sealer = Sealer::new(Vec::new(), &secret("correct horse battery")).unwrap();
        sealer.write_all(plain).unwrap();
        sealer.finish().unwrap()
    }

    fn open(sealed: &[u8], key: &str) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        Opener::new(sealed, &secret(key))?.read_to_end(&mut plain)?;
        Ok(plain)
    }

    #[test]
    fn what_is_sealed_is_opened_with_its_key_only() {
        for length in [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE] {
            let plain: Vec<u8> = (0..length).map(|at| (at / 3) as u8).collect();
            let sealed = seal(&plain);
            assert!(open(&sealed, "correct horse battery").unwrap() == plain, "{length}");
            assert!(open(&sealed, "another horse battery").is_err());
        }
    }

    #[test]
    fn no_change_goes_unseen() {
        let plain = vec![7; 2 * PIECE + 100];
        let sealed = seal(&plain);
        let (head, piece) = (MAGIC.len() + SALT, PIECE + TAG);
        let bad = |what: &str, bytes: &[u8]| assert!(open(bytes, "correct horse battery").is_err(), "{what}");
        for at in [0, 9, head, head + piece + 5, sealed.len() - 1] {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            bad(&format!("byte {at}"), &changed);
        }
        for length in [0, 8, head, head + 3, head + piece, head + 2 * piece, sealed.len() - 1] {
            bad(&format!("{length} bytes"), &sealed[..length]);
        }
        let mut swapped = sealed[..head].to_vec();
        swapped.extend_from_slice(&sealed[head + piece..head + 2 * piece]);
        swapped.extend_from_slice(&sealed[head..head + piece]);
        swapped.extend_from_slice(&sealed[head + 2 * piece..]);
        bad("pieces in another order", &swapped);
        bad("more at the end", &[&sealed[..], b"x"].concat());
    }

    #[test]
    fn a_key_file_has_limits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        assert!(Secret::read(&path).is_err());
        for (content, good) in [("short", false), ("sixteen bytes ok\n", true), (&*"x".repeat(1025), false)] {
            fs::write(&path, content).unwrap();
            assert_eq!(Secret::read(&path).is_ok(), good, "{content}");
        }
        assert!(!format!("{:?}", secret("hidden")).contains("hidden"));
    }
}
