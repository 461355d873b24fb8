//! What the Consoles serve, as an administrator changes it: the list of names, and a certificate of their own. Owns the
//! checks; must never take a certificate that some member or the load balancer could not be reached with.

use serde::{Deserialize, Serialize};
use tracing::info;

use super::{Admin, AdminError, now};
use crate::{
    cluster::{Change, Membership, NodeId},
    node::CertificateStatus,
    pki::{self, CertificateInfo, ClusterKeys, Pair, PkiError},
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
    /// Who, and when, in seconds since 1970.
    pub by: String,
    pub at: u64,
    /// What of the members and the list it is not good for.
    pub missing: Vec<String>,
    #[serde(flatten)]
    pub info: CertificateInfo,
}

impl Admin {
    /// The certificates of this node, and what is known of those of all Consoles. Works on every member.
    pub fn certificates(&self) -> Certificates {
        let membership = self.membership();
        let custom = membership.custom_certificate.as_ref().and_then(|custom| {
            let info = pki::certificate_der(&custom.chain).and_then(|der| CertificateInfo::read(&der)).ok()?;
            let missing = missing(&membership, &self.config.console_addresses, &info, None);
            Some(Custom { by: custom.by.clone(), at: custom.at, missing, info })
        });
        let certificates = self.status().certificates.clone();
        Certificates { console_names: membership.console_names.clone(), certificates, custom }
    }

    /// Every Console's certificate is good for these names, too, from now on: each member makes its own anew, and serves it
    /// at once. Returns the list as it is kept.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn set_console_names(&self, names: Vec<String>, by: &str) -> Result<Vec<String>, AdminError> {
        self.primary()?;
        if let Some(name) = names.iter().find(|name| pki::is_reserved(name)) {
            return Err(AdminError::Refused(format!("{name:?} is a name that the cluster uses itself")));
        }
        let _one = self.changing.lock().await;
        let was = self.membership().console_names.clone();
        let membership = self.change(Change::ConsoleNames { names }).await?;
        info!(by, ?was, names = ?membership.console_names, "the names of the Console's certificates are changed");
        Ok(membership.console_names.clone())
    }

    /// All Consoles serve this certificate from now on: the chain and the private key as one PEM text.
    ///
    /// # Errors
    /// [`AdminError`]; `Refused` when it cannot be used, with all names that it lacks.
    pub async fn set_certificate(&self, pem: &str, by: &str) -> Result<Custom, AdminError> {
        self.primary()?;
        if pem.len() > MAX_UPLOAD {
            return Err(AdminError::Refused(format!(
                "the certificate is refused: it is longer than {MAX_UPLOAD} bytes"
            )));
        }
        let refused = |error: PkiError| AdminError::Refused(error.to_string());
        let pair = Pair::parse(pem, pem).map_err(refused)?;
        let at = now();
        pair.check(at).map_err(refused)?;
        let _one = self.changing.lock().await;
        let membership = self.membership();
        let info = pair.info().clone();
        let missing = missing(&membership, &self.config.console_addresses, &info, None);
        if !missing.is_empty() {
            return Err(AdminError::Refused(format!(
                "the certificate is refused: it is not good for {}. It is good for {}. Order one with all names, or change \
                 the list of names",
                missing.join(", "),
                if info.names.is_empty() { "no name at all".to_owned() } else { info.names.join(", ") }
            )));
        }
        let Some(authority) = &membership.authority else {
            let why = "this cluster was set up without its certificate authority, whose key protects an upload: put the \
                       certificate into custom-certificates/ in the data folder of each host instead";
            return Err(AdminError::Refused(why.to_owned()));
        };
        let keys = ClusterKeys::load(&self.config.certificates).map_err(refused)?;
        // The key in force, also while another one is announced: that one seals all anew.
        let key = keys.for_authority(authority).map_err(refused)?;
        let by: String = by.chars().take(MAX_BY).collect();
        let certificate = pair.seal(key, membership.cluster, &by, at).map_err(refused)?;
        self.change(Change::CustomCertificate { certificate: Some(certificate) }).await?;
        let CertificateInfo { subject, issuer, fingerprint, .. } = &info;
        info!(by, subject, issuer, fingerprint, "all Consoles are to serve a certificate that was given to them");
        Ok(Custom { by, at, missing, info })
    }

    /// All Consoles serve certificates of the cluster's own authority again.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn remove_certificate(&self, by: &str) -> Result<(), AdminError> {
        self.primary()?;
        let _one = self.changing.lock().await;
        if self.membership().custom_certificate.is_none() {
            return Err(AdminError::Refused(
                "no certificate was given to the Consoles: there is none to remove".into(),
            ));
        }
        self.change(Change::CustomCertificate { certificate: None }).await?;
        info!(by, "the Consoles are to serve the cluster's own certificates again");
        Ok(())
    }
}

/// What clients may reach the Consoles by, and this certificate is not good for: each member by its address or its name (also
/// as the first part of a longer one), the names of the list, and further `places` (`host:port`). For one member `only`, or
/// for all.
pub(super) fn missing(
    membership: &Membership,
    places: &[String],
    info: &CertificateInfo,
    only: Option<NodeId>,
) -> Vec<String> {
    let begins_with =
        |name: &str| info.names.iter().any(|full| full.split_once('.').is_some_and(|(host, _)| host == name));
    let members = membership.members.iter().filter(|member| only.is_none_or(|node| node == member.id));
    let lacking = members.filter(|member| {
        let name = member.name.to_ascii_lowercase();
        !info.covers(&member.address) && !info.covers(&name) && !begins_with(&name)
    });
    let mut missing: Vec<String> = lacking.map(|member| format!("{} ({})", member.name, member.address)).collect();
    let hosts = places.iter().map(|place| host(place));
    let names = membership.console_names.iter().map(String::as_str).chain(hosts);
    for name in names.filter(|name| !info.covers(name)) {
        let member = format!("({name})");
        if !missing.iter().any(|known| known == name || known.ends_with(&member)) {
            missing.push(name.to_owned());
        }
    }
    missing
}

/// The host of `host:port`.
fn host(place: &str) -> &str {
    let host = place.rsplit_once(':').map_or(place, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{ClusterId, Member};

    fn info(names: &[&str]) -> CertificateInfo {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        let (subject, issuer, fingerprint) = Default::default();
        CertificateInfo { subject, issuer, names, not_before: 0, not_after: 0, fingerprint }
    }

    fn membership() -> Membership {
        let places = [("host1", "192.0.2.1"), ("host2", "192.0.2.2"), ("host3", "three.example.com")];
        let members = (1..).zip(places).map(|(id, (name, address))| Member::founder(id, name, address, 8086));
        let mut membership = Membership::founded(ClusterId(7), members.collect());
        membership.console_names = vec!["console.example.com".to_owned(), "2001:db8::7".to_owned()];
        membership
    }

    #[test]
    fn a_member_is_reached_by_its_address_or_its_name() {
        let lacks = |names: &[&str]| missing(&membership(), &["lb.example.com:8083".to_owned()], &info(names), None);
        let all = lacks(&[]);
        let expected = [
            "host1 (192.0.2.1)",
            "host2 (192.0.2.2)",
            "host3 (three.example.com)",
            "console.example.com",
            "2001:db8::7",
            "lb.example.com",
        ];
        assert_eq!(all, expected);
        let rest = lacks(&["192.0.2.1", "host2.example.com", "*.example.com", "2001:db8:0::7"]);
        assert_eq!(rest, Vec::<String>::new());
        assert_eq!(lacks(&["192.0.2.1", "host22.example.com", "*.example.com", "2001:db8::7"]), ["host2 (192.0.2.2)"]);
        // A wildcard of one label does not cover a deeper name, nor the domain itself.
        assert!(!info(&["*.example.com"]).covers("a.b.example.com") && !info(&["*.example.com"]).covers("example.com"));
        assert_eq!(
            missing(&membership(), &[], &info(&["*.example.com", "2001:db8::7"]), Some(3)),
            Vec::<String>::new()
        );
    }

    #[test]
    fn the_host_of_a_place_is_found() {
        assert_eq!(["a:1", "[2001:db8::1]:8083", "a"].map(host), ["a", "2001:db8::1", "a"]);
    }
}
