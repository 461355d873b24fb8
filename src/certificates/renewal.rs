//! Keeps the certificate of this node good: every member holds the key that unseals the authority, so each one signs
//! for itself, in time and without asking anybody. Must never change the node's key: certificate and key are two files,
//! and a crash between them would leave a node that cannot start. The Console's certificate is
//! [`super::console_tls`]'s.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::{sync::watch, time};
use tracing::{info, warn};

use crate::{
    clock::unix_time,
    cluster::{Membership, NodeId},
    node::Handle,
    pki::{self, Authority, NODE_CERTIFICATE, NODE_KEY, NodeTls, certificate_validity, is_due, request_with},
};

/// Time between two looks, and after a look at a certificate that is not good at this time or could not be renewed: the
/// clock may have been wrong.
const EVERY: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(10);

/// Looks after the certificate of the node in `dir`; new handshakes use what is sent through `tls`. Ends with the node.
pub async fn run(dir: PathBuf, handle: Handle, tls: watch::Sender<Arc<NodeTls>>) {
    let mut status = handle.status();
    let mut told = None;
    loop {
        let (membership, node) = (handle.membership().borrow().clone(), status.borrow().node);
        let problem = renew_if_due(&dir, &membership, node, &tls).err().map(|error| format!("{error:#}"));
        if let (Some(problem), true) = (&problem, problem != told) {
            warn!("the certificate of this node cannot be renewed; trying again: {problem}");
        }
        let pause = if problem.is_none() && is_good(&dir, unix_time()) { EVERY } else { SOON };
        told = problem;
        tokio::select! {
            () = time::sleep(pause) => {}
            ended = wait_for_the_end(&mut status) => return ended,
        }
    }
}

/// Looks for the first time, before any certificate is loaded or reported: one that is due is renewed before anybody
/// reads that it is overdue. [`run`] reports what goes wrong, and tries again.
pub fn at_start(dir: &Path, membership: &Membership, node: NodeId) {
    let due = read(dir, NODE_CERTIFICATE).and_then(|pem| Ok(certificate_validity(&pem)?));
    if due.is_ok_and(|(from, until)| is_due(from, until, unix_time())) && renew(dir, membership, node).is_ok() {
        info!("the certificate of this node is renewed");
    }
}

async fn wait_for_the_end<T>(status: &mut watch::Receiver<T>) {
    while status.changed().await.is_ok() {}
}

fn renew_if_due(dir: &Path, membership: &Membership, node: NodeId, tls: &watch::Sender<Arc<NodeTls>>) -> Result<()> {
    let (from, until) = certificate_validity(&read(dir, NODE_CERTIFICATE)?)?;
    if !is_due(from, until, unix_time()) {
        return Ok(());
    }
    renew(dir, membership, node)?;
    tls.send_replace(Arc::new(NodeTls::load(dir).context("load the new certificate")?));
    info!("the certificate of this node is renewed");
    Ok(())
}

/// True if the certificate in the folder is valid at this time.
fn is_good(dir: &Path, now: u64) -> bool {
    let validity = read(dir, NODE_CERTIFICATE).and_then(|pem| Ok(certificate_validity(&pem)?));
    validity.is_ok_and(|(from, until)| (from..until).contains(&now))
}

/// Signs the key of this node again.
///
/// # Errors
/// When a file cannot be read or written, or the authority cannot be unsealed: the certificate is as it was.
pub fn renew(dir: &Path, membership: &Membership, node: NodeId) -> Result<()> {
    let sealed =
        membership.shared.authority.as_ref().context("this cluster was set up without its certificate authority")?;
    let member = membership.get(node).context("this node is not a member")?;
    let authority = Authority::open(membership.cluster, sealed, dir)?;
    let csr = request_with(&read(dir, NODE_KEY)?, &member.name, &[])?;
    let certificate = authority.sign_request(&csr, node, &member.name, &[&member.address])?;
    pki::store_pem(dir, NODE_CERTIFICATE, &certificate, false)?;
    Ok(())
}

fn read(dir: &Path, file: &str) -> Result<String> {
    let path = dir.join(file);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cluster::{ClusterId, Member},
        pki::ClusterKey,
    };

    fn folder() -> (tempfile::TempDir, Membership) {
        let dir = tempfile::tempdir().unwrap();
        let cluster = ClusterId(7);
        let (authority, sealed) = Authority::establish(cluster, dir.path()).unwrap();
        authority.issue_node(1, "old", &["192.0.2.1"]).unwrap().save_node(dir.path()).unwrap();
        let mut membership = Membership::founded(cluster, vec![Member::founder(1, "new", "192.0.2.2", 8086)]);
        membership.shared.authority = Some(sealed);
        (dir, membership)
    }

    #[test]
    fn a_node_signs_its_own_key_again() {
        let (dir, membership) = folder();
        let (key, old) = (read(dir.path(), NODE_KEY).unwrap(), read(dir.path(), NODE_CERTIFICATE).unwrap());
        renew(dir.path(), &membership, 1).unwrap();
        let new = read(dir.path(), NODE_CERTIFICATE).unwrap();
        assert_eq!(read(dir.path(), NODE_KEY).unwrap(), key);
        assert_eq!(pki::certificate_key(&new).unwrap(), pki::certificate_key(&old).unwrap());
        assert_ne!(new, old);
        assert_eq!(NodeTls::load(dir.path()).unwrap().identity, (ClusterId(7), 1));
        assert!(renew(dir.path(), &membership, 2).unwrap_err().to_string().contains("not a member"));
        ClusterKey::generate().save(dir.path()).unwrap();
        assert!(renew(dir.path(), &membership, 1).is_err());
        assert_eq!(read(dir.path(), NODE_CERTIFICATE).unwrap(), new, "a failure leaves the old one");
    }

    #[test]
    fn one_that_a_wrong_clock_calls_bad_is_looked_at_again_soon() {
        let (dir, _) = folder();
        assert!(is_good(dir.path(), unix_time()));
        assert!(!is_good(dir.path(), 0) && !is_good(dir.path(), unix_time() + 800 * 86_400));
        assert!(!is_good(tempfile::tempdir().unwrap().path(), unix_time()));
    }

    #[test]
    fn one_that_is_overdue_at_a_start_is_renewed_before_anybody_reads_it() {
        let (dir, membership) = folder();
        let key = rcgen::KeyPair::from_pem(&read(dir.path(), NODE_KEY).unwrap()).unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.not_after = rcgen::date_time_ymd(2020, 1, 1);
        let expired = params.self_signed(&key).unwrap().pem();
        pki::store_pem(dir.path(), NODE_CERTIFICATE, &expired, false).unwrap();
        assert!(!is_good(dir.path(), unix_time()));
        at_start(dir.path(), &membership, 1);
        assert!(is_good(dir.path(), unix_time()));
        assert_eq!(NodeTls::load(dir.path()).unwrap().identity, (ClusterId(7), 1));
    }

    #[test]
    fn one_that_is_fresh_is_left_alone() {
        let (dir, membership) = folder();
        let before = read(dir.path(), NODE_CERTIFICATE).unwrap();
        at_start(dir.path(), &membership, 1);
        let tls = watch::Sender::new(Arc::new(NodeTls::load(dir.path()).unwrap()));
        renew_if_due(dir.path(), &membership, 1, &tls).unwrap();
        assert_eq!(read(dir.path(), NODE_CERTIFICATE).unwrap(), before);
    }
}
