//! The one reader of PEM. Passes over the byte order mark that Windows editors leave. Must never repeat in an error
//! what it has read: that may be a private key.

use rcgen::KeyPair;
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{Error, PemObject},
};
use thiserror::Error;

/// What some editors write at the beginning of a file.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// What is wrong with a text that should be PEM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PemError {
    #[error("a line with -----BEGIN does not end with -----: the text has lost its line breaks")]
    Begin,
    #[error("a section has no -----END line: the text is cut off, or has lost its line breaks")]
    End,
    #[error("a section is not base64: the text is damaged")]
    Base64,
    #[error("there is no certificate in PEM form")]
    NoCertificate,
    #[error("there is no private key in PEM form (one that is encrypted with a password must be decrypted first)")]
    NoKey,
    #[error("the private key cannot be used: it is damaged, or of a kind that is not known here")]
    Key,
    #[error("the text cannot be read")]
    Other,
}

/// Leaves out the line that the library quotes.
impl From<Error> for PemError {
    fn from(error: Error) -> Self {
        match error {
            Error::IllegalSectionStart { .. } => Self::Begin,
            Error::MissingSectionEnd { .. } => Self::End,
            Error::Base64Decode(_) => Self::Base64,
            _ => Self::Other,
        }
    }
}

fn content(text: &[u8]) -> &[u8] {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// All certificates of a text, at least one. Sections of other kinds are passed over.
///
/// # Errors
/// [`PemError::NoCertificate`] when there is none. [`PemError::Begin`], [`PemError::End`] or [`PemError::Base64`] when
/// the text is damaged.
pub fn certificates(text: impl AsRef<[u8]>) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(content(text.as_ref())).collect::<Result<_, _>>()?;
    if found.is_empty() { Err(PemError::NoCertificate) } else { Ok(found) }
}

/// The first private key of a text.
///
/// # Errors
/// [`PemError::NoKey`] when there is none. [`PemError::Begin`], [`PemError::End`] or [`PemError::Base64`] when the text
/// is damaged.
pub fn private_key(text: impl AsRef<[u8]>) -> Result<PrivateKeyDer<'static>, PemError> {
    PrivateKeyDer::from_pem_slice(content(text.as_ref())).map_err(|error| match error {
        Error::NoItemsFound => PemError::NoKey,
        error => error.into(),
    })
}

/// The private key in a PEM text, ready to sign with.
///
/// # Errors
/// [`PemError::NoKey`] when there is none, [`PemError::Key`] when it is damaged or of an unknown kind, another
/// [`PemError`] when the text is not PEM.
pub(super) fn key_pair(text: impl AsRef<[u8]>) -> Result<KeyPair, PemError> {
    KeyPair::try_from(&private_key(text)?).map_err(|_| PemError::Key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cluster::ClusterId,
        pki::{Authority, Issued},
    };

    fn issued() -> Issued {
        Authority::create(ClusterId(7)).unwrap().issue_console(&["a.example"]).unwrap()
    }

    /// True if eight bytes in a row of the secret are in the text.
    fn leaks(text: &str, secret: &str) -> bool {
        let secret: Vec<&str> = secret.lines().filter(|line| !line.starts_with("-----")).collect();
        let secret = secret.concat();
        secret.as_bytes().windows(8).any(|run| text.as_bytes().windows(8).any(|part| part == run))
    }

    #[test]
    fn a_byte_order_mark_and_windows_line_ends_mean_nothing() {
        let Issued { cert_pem, key_pem } = issued();
        let text = format!("{cert_pem}{key_pem}");
        for text in [format!("\u{feff}{text}"), text.replace('\n', "\r\n"), format!("\u{feff}some words\r\n{text}")] {
            assert_eq!(certificates(&text).unwrap(), certificates(&cert_pem).unwrap());
            assert_eq!(private_key(&text).unwrap(), private_key(&key_pem).unwrap());
            key_pair(&text).unwrap();
        }
    }

    #[test]
    fn no_error_says_what_was_read() {
        let Issued { cert_pem, key_pem } = issued();
        let flat = key_pem.replace('\n', "");
        let whole = format!("{cert_pem}{key_pem}");
        let mut broken = vec![
            flat.clone(),
            whole.replace('\n', ""),
            whole.replace('\n', " "),
            whole.replace("-----END", "----END"),
            whole.replace("PRIVATE KEY-----", "PRIVATE KEY"),
            key_pem.replace("-----BEGIN PRIVATE KEY-----\n", ""),
            key_pem.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY"),
            key_pem.replace("PRIVATE KEY", "RSA PRIVATE KEY"),
            key_pem.replace('M', "!"),
            String::new(),
        ];
        broken.extend((0..whole.len()).step_by(7).map(|end| whole[..end].to_owned()));
        for text in broken {
            let errors = [
                certificates(&text).err().map(|error| format!("{error} {error:?}")),
                private_key(&text).err().map(|error| format!("{error} {error:?}")),
                key_pair(&text).err().map(|error| format!("{error} {error:?}")),
            ];
            for error in errors.into_iter().flatten() {
                assert!(!leaks(&error, &key_pem) && !leaks(&error, &cert_pem), "{error}");
            }
        }
        assert_eq!(private_key(&flat), Err(PemError::End));
        assert!(leaks(&flat, &key_pem), "the test sees a leak");
    }
}
