//! Keys and certificates. A host that has the cluster's key can open the authority, which is in the membership. So it
//! can sign for itself, and make a new key for one that was lost. Must never use a key whose certificate does not prove
//! that it belongs to this host, and never replace what an administrator has installed, as long as it can be used.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rustls::pki_types::CertificateDer;

use super::{Notes, aside::set_aside, lost};
use crate::{
    cluster::{Membership, NodeId},
    pki::{
        self, Authority, CA_CERTIFICATE, CONSOLE_CERTIFICATE, CONSOLE_KEY, ClusterKeys, NODE_CERTIFICATE, NODE_KEY,
        NodeTls, Pair, PkiError, certificate_der, is_issued_by, pem,
    },
    storage::{Identity, make_private_dir},
};

/// Replaces keys and certificates in the data folder that cannot be used with new ones. `names`: returns the names of
/// this host's Console, given the address that the members use.
///
/// # Errors
/// When the node's own key or certificate is lost, and nothing proves that this host is a member. Also when a file
/// cannot be written or moved away. The start has to end; the error is one line that says what to do.
pub fn certificates(
    data: &Path,
    identity: &Identity,
    membership: &Membership,
    names: impl Fn(&str) -> Vec<String>,
    notes: &mut Notes,
) -> Result<()> {
    let dir = data.join("certificates");
    make_private_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
    for error in ClusterKeys::load_sound(&dir)?.1 {
        notes.add(format!("{error}: the file is set aside, and its key is fetched from the other members"));
    }
    let mut host = Host { data, dir, node: identity.node, identity, membership, notes };
    host.trust()?;
    host.node()?;
    host.console(names)
}

struct Host<'a> {
    data: &'a Path,
    dir: PathBuf,
    node: NodeId,
    identity: &'a Identity,
    membership: &'a Membership,
    notes: &'a mut Notes,
}

impl Host<'_> {
    /// The trusted authorities. An outdated file is left alone: the running node updates it.
    fn trust(&mut self) -> Result<()> {
        let path = self.dir.join(CA_CERTIFICATE);
        let ours = self.trusted();
        let found = fs::read(&path).ok().and_then(|text| pem::certificates(text).ok()).unwrap_or_default();
        if ours.is_empty() || ours.iter().any(|one| found.contains(one)) {
            return Ok(());
        }
        self.aside(CA_CERTIFICATE)?;
        pki::store_pem(&self.dir, CA_CERTIFICATE, &self.membership.shared.trust_bundle(), false)?;
        self.notes.add(format!("{} was damaged or missing: it was rebuilt from the membership", path.display()));
        Ok(())
    }

    /// The key that proves to the other members who this host is.
    fn node(&mut self) -> Result<()> {
        let Err(why) = self.node_is_sound() else { return Ok(()) };
        let member = self.membership.get(self.node);
        let name = member.map_or(self.identity.name.as_str(), |member| member.name.as_str());
        let (Ok(authority), Some(member)) = (self.authority(), member) else {
            return Err(lost(
                self.data,
                &format!("the key or the certificate of this node cannot be used ({why})"),
                Some(name),
            ));
        };
        let issued =
            authority.issue_node(self.node, name, &[&member.address]).context("make the node's certificate")?;
        self.aside(NODE_KEY)?;
        self.aside(NODE_CERTIFICATE)?;
        issued.save_node(&self.dir)?;
        self.notes.add(format!(
            "the key or the certificate of this node could not be used ({why}): it has made a new key, which the cluster's \
             authority has signed"
        ));
        Ok(())
    }

    fn node_is_sound(&self) -> Result<(), String> {
        let tls = NodeTls::load(&self.dir).map_err(|error| error.to_string())?;
        let path = self.dir.join(NODE_CERTIFICATE);
        if tls.identity != (self.identity.cluster, self.node) {
            return Err(format!(
                "{} is of another node: number {} of cluster {}",
                path.display(),
                tls.identity.1,
                tls.identity.0
            ));
        }
        let trusted = self.trusted();
        let own = fs::read_to_string(&path).ok().and_then(|pem| certificate_der(&pem).ok());
        let signed = own.is_some_and(|own| trusted.iter().any(|authority| is_issued_by(&own, authority)));
        if signed || trusted.is_empty() {
            Ok(())
        } else {
            Err(format!("{} is damaged: the cluster's authority has not signed it", path.display()))
        }
    }

    /// The certificate that the Console shows to clients, unless an administrator has installed another one.
    fn console(&mut self, names: impl Fn(&str) -> Vec<String>) -> Result<()> {
        let Err(why) = Pair::load(&self.dir.join(CONSOLE_CERTIFICATE), &self.dir.join(CONSOLE_KEY)) else {
            return Ok(());
        };
        let address = self.membership.get(self.node).map_or("localhost", |member| member.address.as_str());
        let names: Vec<String> = names(address).into_iter().filter(|name| !pki::is_reserved(name)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (authority, until) = match self.authority() {
            Ok(authority) => (authority, ""),
            // No client trusts this one, but the node can run and fetch the cluster's key. With that key it gets a new
            // certificate.
            Err(_) => (
                Authority::create(self.identity.cluster)?,
                "; no client trusts it before this host has the cluster's key again",
            ),
        };
        let issued = authority.issue_console(&names).context("make the Console's certificate")?;
        self.aside(CONSOLE_KEY)?;
        self.aside(CONSOLE_CERTIFICATE)?;
        issued.save_console(&self.dir)?;
        self.notes.add(format!(
            "the Console's own key or certificate could not be used ({why}): it has a new one of the cluster's authority{until}"
        ));
        Ok(())
    }

    /// The certificates of the authorities that the membership trusts.
    fn trusted(&self) -> Vec<CertificateDer<'static>> {
        self.membership.shared.trusted().filter_map(|pem| certificate_der(pem).ok()).collect()
    }

    fn authority(&self) -> Result<Authority, PkiError> {
        let none = PkiError::Identity("this cluster was set up without its certificate authority");
        Authority::open(self.membership.cluster, self.membership.shared.authority.as_ref().ok_or(none)?, &self.dir)
    }

    fn aside(&self, name: &str) -> Result<()> {
        let path = self.dir.join(name);
        set_aside(self.data, &format!("certificates/{name}"))
            .with_context(|| format!("{} is damaged and cannot be moved away", path.display()))?;
        Ok(())
    }
}
