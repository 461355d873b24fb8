//! Keeps the certificate of this node good: every member holds the key that unseals the authority, so each one signs for
//! itself, in time and without asking anybody. Must never change the node's key: certificate and key are two files, and a
//! crash between them would leave a node that cannot start.
//!
//! The Console's certificate may be an administrator's own, and is only watched then. The cluster's own follows the address
//! of this host.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::{sync::watch, time};
use tracing::{info, warn};

use super::now;
use crate::{
    cluster::{Membership, NodeId},
    node::Handle,
    pki::{
        self, Authority, CONSOLE_CERTIFICATE, CONSOLE_KEY, NODE_CERTIFICATE, NODE_KEY, NodeTls, certificate_validity,
        request_with,
    },
    telemetry,
};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(3600);
/// From here on an administrator should know, in seconds before the end.
const WARN: u64 = 30 * 86_400;

/// Looks after the certificates in `dir`; new handshakes use what is sent through `tls`. Ends with the node.
pub async fn keep(dir: PathBuf, handle: Handle, tls: watch::Sender<Arc<NodeTls>>) {
    let mut looks = time::interval(EVERY);
    looks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    let mut status = handle.status();
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            ended = wait_for_the_end(&mut status) => return ended,
        }
        let (membership, node) = (handle.membership().borrow().clone(), status.borrow().node);
        if let Err(error) = look(&dir, &membership, node, &tls) {
            warn!("the certificate of this node is not renewed; the next attempt is in an hour: {error:#}");
        }
        handle.warn("certificates", ending(&dir, now()));
    }
}

async fn wait_for_the_end<T>(status: &mut watch::Receiver<T>) {
    while status.changed().await.is_ok() {}
}

fn look(dir: &Path, membership: &Membership, node: NodeId, tls: &watch::Sender<Arc<NodeTls>>) -> Result<()> {
    let (from, until) = certificate_validity(&read(dir, NODE_CERTIFICATE)?)?;
    if !is_due(from, until, now()) {
        return Ok(());
    }
    renew(dir, membership, node)?;
    tls.send_replace(Arc::new(NodeTls::load(dir).context("load the new certificate")?));
    info!("the certificate of this node is renewed");
    Ok(())
}

/// Less than a third of its life remains, or it has not begun: it was made when a clock was ahead.
fn is_due(from: u64, until: u64, now: u64) -> bool {
    now < from || until.saturating_sub(now) < until.saturating_sub(from) / 3
}

/// Signs the key of this node again.
///
/// # Errors
/// When a file cannot be read or written, or the authority cannot be unsealed: the certificate is as it was.
pub fn renew(dir: &Path, membership: &Membership, node: NodeId) -> Result<()> {
    let sealed = membership.authority.as_ref().context("this cluster was set up without its certificate authority")?;
    let member = membership.get(node).context("this node is not a member")?;
    let authority = Authority::open(membership.cluster, sealed, dir)?;
    let csr = request_with(&read(dir, NODE_KEY)?, &member.name, &[])?;
    let certificate = authority.sign_request(&csr, node, &member.name, &[&member.address])?;
    pki::store_pem(dir, NODE_CERTIFICATE, &certificate, false)?;
    Ok(())
}

/// Signs the Console's key again for `names` if its certificate is the cluster's and not good for the address at which this
/// host is reached now. To be called before the certificate is loaded.
///
/// # Errors
/// When a file cannot be read or written, or the authority cannot be unsealed: the certificate is as it was.
pub fn follow_address(dir: &Path, membership: &Membership, address: &str, names: &[String]) -> Result<()> {
    let Some(sealed) = &membership.authority else { return Ok(()) };
    if !pki::lacks_name(&read(dir, CONSOLE_CERTIFICATE)?, &sealed.certificate, address)? {
        return Ok(());
    }
    let authority = Authority::open(membership.cluster, sealed, dir)?;
    let csr = request_with(&read(dir, CONSOLE_KEY)?, address, &[])?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    pki::store_pem(dir, CONSOLE_CERTIFICATE, &authority.sign_console_request(&csr, &names)?, false)?;
    info!(address, "this host is reached at another address: the certificate of its Console is made for that");
    Ok(())
}

/// What an administrator should know about certificates that end soon; notes for all of them how long they are good.
fn ending(dir: &Path, now: u64) -> Option<String> {
    let mut sentences = Vec::new();
    for (of, file) in [("node", NODE_CERTIFICATE), ("console", CONSOLE_CERTIFICATE)] {
        let validity = read(dir, file).and_then(|pem| Ok(certificate_validity(&pem)?));
        let Ok((_, until)) = validity else { continue }; // whoever needs the file says so
        let left = until.saturating_sub(now);
        metrics::gauge!(telemetry::CERTIFICATE_EXPIRY, "of" => of).set(left as f64);
        if left < WARN {
            let days = left / 86_400;
            sentences
                .push(format!("the certificate {file} expires in {days} days: put a new one into {}", dir.display()));
        }
    }
    (!sentences.is_empty()).then(|| sentences.join("; "))
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
        authority.issue_console(&["console.example"]).unwrap().save_console(dir.path()).unwrap();
        let mut membership = Membership::founded(cluster, vec![Member::founder(1, "new", "192.0.2.2", 8086)]);
        membership.authority = Some(sealed);
        (dir, membership)
    }

    #[test]
    fn a_third_of_the_life_before_the_end_it_is_time() {
        assert!(!is_due(0, 300, 200));
        assert!(is_due(0, 300, 201));
        assert!(is_due(0, 300, 400));
        assert!(!is_due(0, 300, 0));
        assert!(!is_due(100, 400, 100));
        assert!(is_due(100, 400, 99), "made with a clock that was ahead");
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
    fn one_that_is_fresh_is_left_alone() {
        let (dir, membership) = folder();
        let before = read(dir.path(), NODE_CERTIFICATE).unwrap();
        let tls = watch::Sender::new(Arc::new(NodeTls::load(dir.path()).unwrap()));
        look(dir.path(), &membership, 1, &tls).unwrap();
        assert_eq!(read(dir.path(), NODE_CERTIFICATE).unwrap(), before);
    }

    #[test]
    fn the_certificate_of_the_console_follows_the_address() {
        let (dir, membership) = folder();
        let names = |all: &[&str]| all.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let follow = |membership: &Membership, address: &str| {
            follow_address(dir.path(), membership, address, &names(&["new", address])).unwrap();
            read(dir.path(), CONSOLE_CERTIFICATE).unwrap()
        };
        let (key, old) = (read(dir.path(), CONSOLE_KEY).unwrap(), read(dir.path(), CONSOLE_CERTIFICATE).unwrap());
        assert_eq!(follow(&membership, "CONSOLE.example"), old, "it is good for that");
        let new = follow(&membership, "192.0.2.9");
        let ca = &membership.authority.as_ref().unwrap().certificate;
        assert!(!pki::lacks_name(&new, ca, "192.0.2.9").unwrap() && pki::lacks_name(&new, ca, "192.0.2.1").unwrap());
        assert!(pki::lacks_name(&new, ca, "console.example").unwrap() && !pki::lacks_name(&new, ca, "new").unwrap());
        let path = |name| dir.path().join(name);
        pki::console_server_config(&path(CONSOLE_CERTIFICATE), &path(CONSOLE_KEY)).unwrap();
        assert_eq!(read(dir.path(), CONSOLE_KEY).unwrap(), key);
        let own = Authority::create(ClusterId(8)).unwrap();
        own.issue_console(&["own.example"]).unwrap().save_console(dir.path()).unwrap();
        let own = read(dir.path(), CONSOLE_CERTIFICATE).unwrap();
        assert_eq!(follow(&membership, "192.0.2.10"), own, "that of somebody else stays");
    }

    #[test]
    fn the_administrator_is_told_a_month_ahead() {
        let (dir, _) = folder();
        assert_eq!(ending(dir.path(), now()), None);
        let text = ending(dir.path(), now() + 340 * 86_400).unwrap();
        assert!(text.contains("node.pem expires in 2") && text.contains("console-cert.pem expires in 2"), "{text}");
    }
}
