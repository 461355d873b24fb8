//! What the Consoles serve, as an administrator changes it: the list of names, and a certificate of their own. Owns the
//! checks; must never take a certificate that some member or the load balancer could not be reached with.

use serde::{Deserialize, Serialize};
use tracing::info;

use super::{AdminError, Operations};
use crate::{
    certificates::given::{exposed_to, given_at, missing},
    clock::unix_time,
    cluster::Change,
    node::CertificateStatus,
    pki::{self, Authority, CertificateInfo, ClusterKeys, Pair, PkiError},
};

/// Longest text with a certificate chain and its key that is looked at, in bytes.
pub const MAX_UPLOAD: usize = 48 << 10;
/// Longest name of the one who gave a certificate that is kept, in characters.
const MAX_BY: usize = 64;

/// What there is to know about the certificates of this node and of the Consoles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Certificates {
    /// What every Console's certificate is good for beside the names of its own host.
    #[serde(rename = "consoleSAN")]
    pub console_names: Vec<String>,
    /// Those that this node uses.
    pub certificates: Vec<CertificateStatus>,
    /// The certificate that an administrator has given all Consoles; a folder of a host may take precedence there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub custom: Option<Custom>,
}

/// A certificate that an administrator has given all Consoles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Custom {
    /// Who, and when the key was given first, in seconds since 1970.
    pub by: String,
    pub at: u64,
    /// What of the members and the list it is not good for.
    pub missing: Vec<String>,
    /// Members that were removed since: they know its private key.
    #[serde(default, rename = "exposedTo", skip_serializing_if = "Vec::is_empty")]
    pub exposed_to: Vec<String>,
    #[serde(flatten)]
    pub info: CertificateInfo,
}

/// Which authority signs a Defender's certificate while another one is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signer {
    /// The one that signs for the members, too.
    Present,
    /// The one that will sign for them before long; it is trusted already. Only for those who keep the certificate that
    /// they have: if a member is removed, another authority takes its place.
    Newest,
}

impl Operations {
    /// The certificates of this node, and what is known of those of all Consoles. Works on every member.
    pub(super) fn certificates(&self) -> Certificates {
        let membership = self.membership();
        let custom = membership.shared.custom_certificate.as_ref().and_then(|custom| {
            let info = pki::certificate_der(&custom.chain).and_then(|der| CertificateInfo::read(&der)).ok()?;
            let (missing, exposed_to) = (missing(&membership, &info, None), exposed_to(&membership));
            Some(Custom { by: custom.by.clone(), at: custom.at, missing, exposed_to, info })
        });
        let certificates = self.status().certificates.clone();
        Certificates { console_names: membership.shared.console_names.clone(), certificates, custom }
    }

    /// Signs the request of a Defender.
    ///
    /// # Errors
    /// As those of [`super::Admin::certify_defender`].
    pub(super) fn certify_defender(&self, csr: &str, id: &str, name: &str, by: Signer) -> Result<String, AdminError> {
        self.primary()?;
        let membership = self.membership();
        let coming = membership.shared.coming.as_ref().map(|coming| &coming.authority).filter(|_| by == Signer::Newest);
        let sealed = coming.or(membership.shared.authority.as_ref());
        let sealed = sealed.ok_or_else(|| AdminError::Refused("this cluster has no authority".to_owned()))?;
        let refused = |error: PkiError| AdminError::Refused(error.to_string());
        let authority = Authority::open(membership.cluster, sealed, &self.config.certificates).map_err(refused)?;
        authority.sign_defender_request(csr, id, name).map_err(refused)
    }

    /// Every Console's certificate is good for these names, too, from now on: each member makes its own anew, and
    /// serves it at once. Returns the list as it is kept.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` for a name that the cluster uses itself, or one that cannot be in a
    /// certificate; `Unknown` if the role was lost before it was known whether it is in force.
    pub(super) async fn set_console_names(&self, names: Vec<String>, by: &str) -> Result<Vec<String>, AdminError> {
        self.primary()?;
        if let Some(name) = names.iter().find(|name| pki::is_reserved(name)) {
            return Err(AdminError::Refused(format!("{name:?} is a name that the cluster uses itself")));
        }
        let _one = self.changing.lock().await;
        let was = self.membership().shared.console_names.clone();
        let membership = self.change(Change::ConsoleNames { names }).await?;
        info!(by, ?was, names = ?membership.shared.console_names, "the names of the Console's certificates are changed");
        Ok(membership.shared.console_names.clone())
    }

    /// All Consoles serve this certificate from now on: the chain and the private key as one PEM text.
    ///
    /// # Errors
    /// [`AdminError`]; `Refused` when it cannot be used, with all names that it lacks.
    pub(super) async fn set_certificate(&self, pem: &str, by: &str) -> Result<Custom, AdminError> {
        self.primary()?;
        if pem.len() > MAX_UPLOAD {
            return Err(AdminError::Refused(format!(
                "the certificate is refused: it is longer than {MAX_UPLOAD} bytes"
            )));
        }
        let refused = |error: PkiError| AdminError::Refused(error.to_string());
        let pair = Pair::parse(pem, pem).map_err(refused)?;
        pair.check(unix_time()).map_err(refused)?;
        let _one = self.changing.lock().await;
        let membership = self.membership();
        if let Some(issuer) = pair.missing_issuer(membership.shared.trusted()).map_err(refused)? {
            return Err(AdminError::Refused(format!(
                "the certificate is refused: its chain ends before its issuer, {issuer}, which this host does not trust by itself, \
                 so that clients may not be able to verify it. Append the certificate of that authority to the file"
            )));
        }
        let info = pair.info().clone();
        let missing = missing(&membership, &info, None);
        if !missing.is_empty() {
            return Err(AdminError::Refused(format!(
                "the certificate is refused: it is not good for {}. It is good for {}. Order one with all names, or change \
                 the list of names",
                missing.join(", "),
                if info.names.is_empty() { "no name at all".to_owned() } else { info.names.join(", ") }
            )));
        }
        let Some(authority) = &membership.shared.authority else {
            let why = "this cluster was set up without its certificate authority, whose key protects an upload: put the \
                       certificate into custom-certificates/ in the data folder of each host instead";
            return Err(AdminError::Refused(why.to_owned()));
        };
        let keys = ClusterKeys::load(&self.config.certificates).map_err(refused)?;
        // The key in force, also while another one is announced: that one seals all anew.
        let key = keys.for_authority(authority).map_err(refused)?;
        let by: String = by.chars().take(MAX_BY).collect();
        let mut certificate = pair.seal(key, membership.cluster, &by, unix_time()).map_err(refused)?;
        let at = given_at(&membership, &certificate);
        certificate.at = at;
        let membership = self.change(Change::CustomCertificate { certificate: Some(certificate) }).await?;
        let CertificateInfo { subject, issuer, fingerprint, .. } = &info;
        info!(by, subject, issuer, fingerprint, "all Consoles are to serve a certificate that was given to them");
        Ok(Custom { by, at, missing, exposed_to: exposed_to(&membership), info })
    }

    /// All Consoles serve certificates of the cluster's own authority again.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` if none was given; `Unknown` if the role was lost before it was known
    /// whether it is in force.
    pub(super) async fn remove_certificate(&self, by: &str) -> Result<(), AdminError> {
        self.primary()?;
        let _one = self.changing.lock().await;
        if self.membership().shared.custom_certificate.is_none() {
            return Err(AdminError::Refused(
                "no certificate was given to the Consoles: there is none to remove".into(),
            ));
        }
        self.change(Change::CustomCertificate { certificate: None }).await?;
        info!(by, "the Consoles are to serve the cluster's own certificates again");
        Ok(())
    }
}
