//! The certificate that an administrator has given to all Consoles, as the membership has it: what it is not good for,
//! and who else knows its key. Pure.

use std::collections::BTreeSet;

use crate::{
    cluster::{Membership, NodeId, shared::console_certificate::CustomCertificate},
    pki::{self, CertificateInfo},
};

/// When a certificate is to count as given: after all removals so far, whatever the clocks of earlier primaries said;
/// or, if it has the key of the one in its place, when that was given.
pub(crate) fn given_at(membership: &Membership, new: &CustomCertificate) -> u64 {
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
pub(crate) fn exposed_to(membership: &Membership) -> Vec<String> {
    let Some(certificate) = &membership.shared.custom_certificate else { return Vec::new() };
    let gone = membership.roster.removed.iter().filter(|removed| removed.at >= certificate.at);
    let names: BTreeSet<&str> = gone.map(|removed| removed.name.as_str()).collect();
    names.into_iter().map(str::to_owned).collect()
}

/// Says that somebody else knows the key of the certificate that the Consoles were given, and what to do about it.
pub(crate) fn exposure(membership: &Membership) -> Option<String> {
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

/// What an administrator should do about the certificate that the Consoles were given: who else knows its key, and that
/// no Console can unseal it any more.
pub(crate) fn warning(membership: &Membership) -> Option<String> {
    let stranded = membership.shared.certificate_is_stranded().then(|| {
        "the certificate that was given to all Consoles is sealed with a cluster key that no member has any more: a Console that \
         starts again serves the cluster's own; upload it again (twistcli certs upload)"
            .to_owned()
    });
    let sentences: Vec<String> = exposure(membership).into_iter().chain(stranded).collect();
    (!sentences.is_empty()).then(|| sentences.join("; "))
}

/// What clients may reach the Consoles by, and this certificate is not good for: each member by its address or its name
/// (also as the first part of a longer one), and the names of the list. For one member `only`, or for all.
pub(crate) fn missing(membership: &Membership, info: &CertificateInfo, only: Option<NodeId>) -> Vec<String> {
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
            membership.roster.removed.push(Removed { id, name: gone.name, at, address: String::new() });
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
