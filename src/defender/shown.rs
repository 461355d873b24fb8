//! Which certificate a Defender shows: the newest, or the one before if that one is refused. While an authority takes
//! the place of another, the Console signs with the one that comes; should it never come, the one before is still good.
//! Must never give up one of them because nobody answered.

use std::{io, sync::Arc};

use anyhow::{Error, Result};
use rustls::ClientConfig;

use super::folder::Folder;
use crate::pki;

/// Certificate and authorities, PEM.
type Credentials = (String, String);

/// The settings of TLS, which are made anew when what they are made of has changed: as long as it is the same, a
/// session may be resumed.
#[derive(Default)]
pub(super) struct Shown {
    before: bool,
    made: Option<(Credentials, Arc<ClientConfig>)>,
}

impl Shown {
    /// For the next connection.
    ///
    /// # Errors
    /// When something is missing or damaged: the host must be registered.
    pub(super) fn tls(&mut self, folder: &Folder) -> Result<Arc<ClientConfig>> {
        let (newest, authorities) = folder.credentials()?;
        let before = if self.before { folder.certificate_before()? } else { None };
        let credentials = (before.unwrap_or(newest), authorities);
        if let Some((known, config)) = &self.made
            && *known == credentials
        {
            return Ok(Arc::clone(config));
        }
        let config = pki::defender_client_tls(&credentials.1, &credentials.0, &folder.key()?)?;
        self.made = Some((credentials, Arc::clone(&config)));
        Ok(config)
    }

    /// Takes note of why a connection ended or was not made: one that a Console has refused in TLS is tried with the
    /// other certificate next.
    pub(super) fn failed(&mut self, error: &Error) {
        if is_refused(error) {
            self.before = !self.before;
        }
    }

    /// Takes note of a certificate that has come: it is shown from the next connection on.
    pub(super) fn renewed(&mut self) {
        self.before = false;
    }
}

/// True if the other end has refused the handshake: it does not take the certificate.
pub(super) fn is_refused(error: &Error) -> bool {
    let inner = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).filter_map(io::Error::get_ref);
    inner
        .filter_map(|inner| inner.downcast_ref::<rustls::Error>())
        .any(|error| matches!(error, rustls::Error::AlertReceived(_)))
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};
    use rustls::AlertDescription;

    use super::*;
    use crate::{cluster::ClusterId, pki::Authority};

    #[test]
    fn only_a_refused_handshake_brings_the_other_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        let authority = Authority::create(ClusterId(1)).unwrap();
        let csr = pki::request_with(&folder.key().unwrap(), "host", &[]).unwrap();
        let sign = || authority.sign_defender_request(&csr, &"a".repeat(32), "host").unwrap();
        folder.keep_authorities(authority.certificate_pem()).unwrap();
        let (first, second) = (sign(), sign());
        folder.keep_certificate(&first).unwrap();
        let mut shown = Shown::default();
        let shows = |shown: &mut Shown| {
            shown.tls(&folder).unwrap();
            shown.made.as_ref().unwrap().0.0.clone()
        };
        let refused = || {
            let alert = rustls::Error::AlertReceived(AlertDescription::UnknownCA);
            let error: Result<(), _> = Err(io::Error::new(io::ErrorKind::InvalidData, alert));
            error.context("connected").unwrap_err()
        };
        assert_eq!(shows(&mut shown), first);
        shown.failed(&refused());
        assert_eq!(shows(&mut shown), first, "there is no other one yet");
        folder.keep_certificate(&second).unwrap();
        shown.renewed();
        assert_eq!(shows(&mut shown), second);
        shown.failed(&anyhow!(io::Error::from(io::ErrorKind::ConnectionRefused)).context("dial"));
        assert_eq!(shows(&mut shown), second, "nobody answers, whatever is shown");
        shown.failed(&refused());
        assert_eq!(shows(&mut shown), first);
        shown.failed(&refused());
        assert_eq!(shows(&mut shown), second);
        folder.keep_certificate(&second).unwrap();
        assert_eq!(folder.certificate_before().unwrap().as_deref(), Some(first.as_str()), "the same is no other one");
    }
}
