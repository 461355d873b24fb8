//! What the Consoles serve, as an administrator changes it: the list of names, and a certificate of their own. Owns the
//! checks; must never take a certificate that some member or the load balancer could not be reached with.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use tracing::info;

use super::{AdminError, Operations};
use crate::{
    clock::unix_time,
    cluster::{Change, Membership, NodeId, shared::console_certificate::CustomCertificate},
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

    /// Every Console's certificate is good for these names, too, from now on: each member makes its own anew, and serves it
    /// at once. Returns the list as it is kept.
    ///
    /// # Errors
    /// [`AdminError`].
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
    /// [`AdminError`].
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

/// When a certificate is to count as given: after all removals so far, whatever the clocks of earlier primaries said; or, if
/// it has the key of the one in its place, when that was given.
fn given_at(membership: &Membership, new: &CustomCertificate) -> u64 {
    let key = |certificate: &CustomCertificate| pki::certificate_key(&certificate.chain).ok();
    let same = membership
        .shared
        .custom_certificate
        .as_ref()
        .filter(|known| key(known).is_some_and(|known| key(new) == Some(known)));
    let after = membership.roster.removed.iter().map(|removed| removed.at.saturating_add(1)).max().unwrap_or(0);
    same.map_or(new.at.max(after), |known| known.at)
}

/// The members that were removed since the Consoles were given their certificate: each had its private key.
fn exposed_to(membership: &Membership) -> Vec<String> {
    let Some(certificate) = &membership.shared.custom_certificate else { return Vec::new() };
    let gone = membership.roster.removed.iter().filter(|removed| removed.at >= certificate.at);
    let names: BTreeSet<&str> = gone.map(|removed| removed.name.as_str()).collect();
    names.into_iter().map(str::to_owned).collect()
}

/// That somebody else knows the key of the certificate that the Consoles were given, and what to do about it.
pub(super) fn exposure(membership: &Membership) -> Option<String> {
    let exposed = exposed_to(membership);
    (!exposed.is_empty()).then(|| {
        format!(
            "{} has the private key of the certificate that was given to all Consoles, and is not a member any more: upload one \
             with another key, or go back to the cluster's own (twistcli certs upload, twistcli certs remove); have the old one \
             revoked if that host is not in your hands",
            exposed.join(" and ")
        )
    })
}

/// What an administrator should do about the certificate that the Consoles were given: who else knows its key, and that no
/// Console can unseal it any more.
pub(super) fn warning(membership: &Membership) -> Option<String> {
    let stranded = membership.shared.certificate_is_stranded().then(|| {
        "the certificate that was given to all Consoles is sealed with a cluster key that no member has any more: a Console that \
         starts again serves the cluster's own; upload it again (twistcli certs upload)"
            .to_owned()
    });
    let sentences: Vec<String> = exposure(membership).into_iter().chain(stranded).collect();
    (!sentences.is_empty()).then(|| sentences.join("; "))
}

/// What clients may reach the Consoles by, and this certificate is not good for: each member by its address or its name (also
/// as the first part of a longer one), and the names of the list. For one member `only`, or for all.
pub(super) fn missing(membership: &Membership, info: &CertificateInfo, only: Option<NodeId>) -> Vec<String> {
    let begins_with =
        |name: &str| info.names.iter().any(|full| full.split_once('.').is_some_and(|(host, _)| host == name));
    let members = membership.roster.members.iter().filter(|member| only.is_none_or(|node| node == member.id));
    let lacking = members.filter(|member| {
        let name = member.name.to_ascii_lowercase();
        !info.covers(&member.address) && !info.covers(&name) && !begins_with(&name)
    });
    let mut missing: Vec<String> = lacking.map(|member| format!("{} ({})", member.name, member.address)).collect();
    for name in membership.shared.console_names.iter().filter(|name| !info.covers(name)) {
        let member = format!("({name})");
        if !missing.iter().any(|known| known == name || known.ends_with(&member)) {
            missing.push(name.clone());
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cluster::{ClusterId, Member, roster::Removed, trust::KeyId},
        pki::Authority,
    };

    fn info(names: &[&str]) -> CertificateInfo {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        let (subject, issuer, fingerprint) = Default::default();
        CertificateInfo { subject, issuer, names, not_before: 0, not_after: 0, fingerprint }
    }

    fn membership() -> Membership {
        let places = [("host1", "192.0.2.1"), ("host2", "192.0.2.2"), ("host3", "three.example.com")];
        let members = (1..).zip(places).map(|(id, (name, address))| Member::founder(id, name, address, 8086));
        let mut membership = Membership::founded(ClusterId(7), members.collect());
        membership.shared.console_names = vec!["console.example.com".to_owned(), "2001:db8::7".to_owned()];
        membership
    }

    #[test]
    fn a_member_is_reached_by_its_address_or_its_name() {
        let lacks = |names: &[&str]| missing(&membership(), &info(names), None);
        let all = lacks(&[]);
        let expected = [
            "host1 (192.0.2.1)",
            "host2 (192.0.2.2)",
            "host3 (three.example.com)",
            "console.example.com",
            "2001:db8::7",
        ];
        assert_eq!(all, expected);
        let rest = lacks(&["192.0.2.1", "host2.example.com", "*.example.com", "2001:db8:0::7"]);
        assert_eq!(rest, Vec::<String>::new());
        assert_eq!(lacks(&["192.0.2.1", "host22.example.com", "*.example.com", "2001:db8::7"]), ["host2 (192.0.2.2)"]);
        // A wildcard of one label does not cover a deeper name, nor the domain itself.
        assert!(!info(&["*.example.com"]).covers("a.b.example.com") && !info(&["*.example.com"]).covers("example.com"));
        assert_eq!(missing(&membership(), &info(&["*.example.com", "2001:db8::7"]), Some(3)), Vec::<String>::new());
    }

    #[test]
    fn whoever_was_removed_after_a_key_was_given_knows_it() {
        let other = Authority::create(ClusterId(8)).unwrap();
        let given = |at| {
            let issued = other.issue_console(&["a.example"]).unwrap();
            let (chain, sealed_key) = (issued.cert_pem, String::new());
            CustomCertificate { chain, sealed_key, key: KeyId(1), by: "admin".to_owned(), at }
        };
        let mut membership = membership();
        let remove = |membership: &mut Membership, id, at| {
            let gone = membership.roster.members.pop().unwrap();
            membership.roster.removed.push(Removed { id, name: gone.name, at });
        };
        remove(&mut membership, 3, 50);
        let first = given(20);
        assert_eq!(given_at(&membership, &first), 51, "the clock of that primary is behind");
        membership.shared.custom_certificate = Some(CustomCertificate { at: 51, ..first.clone() });
        assert_eq!((exposed_to(&membership), warning(&membership)), (Vec::new(), None), "removed before");
        remove(&mut membership, 2, 51);
        assert_eq!(exposed_to(&membership), ["host2"]);
        assert!(warning(&membership).unwrap().starts_with("host2 has the private key"));
        assert_eq!(given_at(&membership, &CustomCertificate { at: 99, ..first }), 51, "the same key is no better");
        let second = given(99);
        assert_eq!(given_at(&membership, &second), 99);
        membership.shared.custom_certificate = Some(second);
        assert_eq!(warning(&membership), None);
    }
}
