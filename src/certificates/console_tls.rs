//! What the Console of this host serves: keeps the TLS settings of each new connection in step with the membership, the
//! custom folder and the clock. Every member signs for itself. Must never change the Console's own key (certificate and
//! key are two files, and a crash between them would leave a node that cannot start), nor serve nothing because
//! something new is broken.
//!
//! What is served, first come first: the folder of this host, the certificate that an administrator has given to all
//! Consoles, the cluster's own. Hosts that join ask for a name of their own and always see the last one.

use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustls::ServerConfig;
use tokio::{sync::watch, task, time};
use tracing::{error, info};

use super::{
    custom_folder::CustomFolder,
    expiry::{Told, node_and_ca},
    given::{missing, warning},
};
use crate::{
    clock::unix_time,
    cluster::{Membership, NodeId, shared::console_certificate::CustomCertificate, trust::KeyId},
    node::{CertificateSource, CertificateStatus, Handle, Warning},
    pki::{
        self, Authority, CONSOLE_CERTIFICATE, CONSOLE_KEY, CONSOLE_NAME, CertificateInfo, ClusterKeys, NodeTls, Pair,
        Tickets, console_tls, defender_port_tls, is_due, request_with,
    },
};

/// Time between two looks at the custom folder.
const LOOK: Duration = Duration::from_secs(1);
/// Time between two looks at everything else that nobody announces: addresses of this host, the clock, what failed
/// before.
const SLOW_LOOK: Duration = Duration::from_secs(10);

/// The names that this host's Console is known by, for the address that the members use.
pub type LocalNames = Box<dyn Fn(&str) -> Vec<String> + Send + Sync>;

/// What this node's Console serves.
pub struct ConsoleTls {
    certificates: PathBuf,
    node: NodeId,
    local_names: LocalNames,
    own: Arc<Pair>,
    folder: CustomFolder,
    upload: Upload,
    served: watch::Sender<Arc<ServerConfig>>,
    /// For the port of the Defenders.
    for_defenders: watch::Sender<Arc<ServerConfig>>,
    /// Whom those settings trust, and the cluster key that the tickets come from.
    trusted: (String, Option<KeyId>),
    /// What is in `served`: that for all, and the cluster's own.
    serving: (Arc<Pair>, Arc<Pair>),
    /// What is wrong, by what it is about. Logged when it begins and when it changes.
    problems: [Option<String>; 3],
    told: Told,
    slow: Option<Instant>,
}

/// What is to be shown in the status.
#[derive(Debug, PartialEq)]
struct Shown {
    certificates: Vec<CertificateStatus>,
    warnings: [(Warning, Option<String>); 3],
}

/// The certificate that was given to all Consoles, as it was unsealed last.
#[derive(Default)]
struct Upload {
    sealed: Option<CustomCertificate>,
    pair: Option<Arc<Pair>>,
}

/// What can have a problem; the index in `problems`.
#[derive(Clone, Copy)]
enum About {
    Own,
    Upload,
    Folder,
}

impl fmt::Debug for ConsoleTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleTls").field("node", &self.node).finish_non_exhaustive()
    }
}

impl ConsoleTls {
    /// Reads what this node serves, and makes its own certificate anew if that is due. `data` is the data folder.
    ///
    /// # Errors
    /// When the Console's own certificate or the one in the custom folder cannot be used: nothing should start that
    /// serves another one than its administrator thinks.
    pub fn open(data: &Path, node: NodeId, membership: &Membership, local_names: LocalNames) -> Result<Self> {
        let certificates = data.join("certificates");
        let own = load(&certificates).context("load the certificate of the Console")?;
        let folder = CustomFolder::open(data).context("mend the two files or take them away")?;
        let settings = console_tls(&own, &own)?;
        let serving = (Arc::clone(&own), Arc::clone(&own));
        let served = watch::Sender::new(Arc::clone(&settings));
        let (upload, problems, told) = (Upload::default(), Default::default(), Told::default());
        let (for_defenders, trusted) = (watch::Sender::new(settings), Default::default());
        let mut tls = Self {
            certificates,
            node,
            local_names,
            own,
            folder,
            upload,
            served,
            for_defenders,
            trusted,
            serving,
            problems,
            told,
            slow: None,
        };
        tls.poll(membership, true);
        Ok(tls)
    }

    /// The settings for a connection that begins now.
    pub fn served(&self) -> watch::Receiver<Arc<ServerConfig>> {
        self.served.subscribe()
    }

    /// The settings for a Defender's connection that begins now. Without an authority they ask for no certificate, and
    /// nobody is served who shows none.
    pub fn for_defenders(&self) -> watch::Receiver<Arc<ServerConfig>> {
        self.for_defenders.subscribe()
    }

    /// Keeps all of it in step until the node ends. Looks at once when the certificate of the node is `renewed`: what
    /// was said about the old one is over then.
    pub async fn run(mut self, handle: Handle, mut renewed: watch::Receiver<Arc<NodeTls>>) {
        let mut membership = handle.membership();
        let mut looks = time::interval(LOOK);
        looks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        let mut shown = None;
        loop {
            let announced = tokio::select! {
                changed = membership.changed() => match changed {
                    Ok(()) => true,
                    Err(_) => return,
                },
                Ok(()) = renewed.changed() => true,
                _ = looks.tick() => false,
            };
            let known = membership.borrow_and_update().clone();
            // Reads, signs and fsyncs.
            let looked = task::spawn_blocking(move || {
                let all = self.poll(&known, announced);
                (self, all)
            });
            // Cancelled: the node ends. A panic would have ended the process.
            let Ok((tls, all)) = looked.await else { return };
            self = tls;
            if let Some(all) = all.filter(|all| shown.as_ref() != Some(all)) {
                handle.show_certificates(all.certificates.clone());
                all.warnings.iter().for_each(|(about, text)| handle.warn(*about, text.clone()));
                shown = Some(all);
            }
        }
    }

    /// Looks once. Returns what is to be shown, if it may have changed.
    fn poll(&mut self, membership: &Membership, announced: bool) -> Option<Shown> {
        let now = unix_time();
        let slow = announced || self.slow.is_none_or(|last| last.elapsed() >= SLOW_LOOK);
        let changed = self.folder.poll(now);
        self.note(About::Folder, self.folder.problem().map(str::to_owned));
        if !slow && !changed {
            return None;
        }
        self.slow = Some(Instant::now());
        let renewed = self.renew_own(membership, now);
        self.note(
            About::Own,
            renewed.err().map(|error| {
                format!("the cluster's own certificate of this Console stays as it was, and is tried again: {error:#}")
            }),
        );
        let unsealed = self.unseal(membership);
        self.note(
            About::Upload,
            unsealed.err().map(|error| {
                format!(
                    "the certificate that was given to all Consoles cannot be used here: {error:#}; upload it again"
                )
            }),
        );
        self.serve_defenders(membership);
        self.serve();
        let certificates = self.certificates(membership);
        let text = |sentences: Vec<String>| (!sentences.is_empty()).then(|| sentences.join("; "));
        let ends = text(self.told.tell(&certificates, now));
        let problems = text(self.problems.iter().flatten().cloned().chain(lacking(&certificates)).collect());
        let warnings = [
            (Warning::Certificates, problems),
            (Warning::GivenCertificate, warning(membership)),
            (Warning::CertificateExpiry, ends),
        ];
        Some(Shown { certificates, warnings })
    }

    /// Signs the Console's key again when the certificate of the cluster's own authority ends or is for other names
    /// than it should be. A certificate of another authority in its place stays.
    fn renew_own(&mut self, membership: &Membership, now: u64) -> Result<()> {
        let (Some(sealed), Some(member)) = (&membership.shared.authority, membership.get(self.node)) else {
            return Ok(());
        };
        let ca = pki::certificate_der(&sealed.certificate)?;
        let info = self.own.info();
        if info.issuer != CertificateInfo::read(&ca)?.subject {
            return Ok(());
        }
        let names = own_names((self.local_names)(&member.address), &membership.shared.console_names);
        let is: BTreeSet<&str> = info.names.iter().map(String::as_str).collect();
        let should: BTreeSet<&str> = names.iter().map(String::as_str).chain([CONSOLE_NAME]).collect();
        if is == should && !is_due(info.not_before, info.not_after, now) && self.own.is_signed_by(&ca) {
            return Ok(());
        }
        let authority = Authority::open(membership.cluster, sealed, &self.certificates)?;
        let path = self.certificates.join(CONSOLE_KEY);
        let key = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let csr = request_with(&key, &member.name, &[])?;
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let certificate = authority.sign_console_request(&csr, &names)?;
        let own = Pair::parse(&certificate, &key)?;
        pki::store_pem(&self.certificates, CONSOLE_CERTIFICATE, &certificate, false)?;
        info!(?names, "the cluster's own certificate of this Console is made anew");
        self.own = Arc::new(own);
        Ok(())
    }

    /// Follows the certificate in the membership. One that cannot be unsealed is tried at every look: the cluster key
    /// may be on its way.
    fn unseal(&mut self, membership: &Membership) -> Result<()> {
        let wanted = &membership.shared.custom_certificate;
        if self.upload.sealed == *wanted && self.upload.pair.is_some() == wanted.is_some() {
            return Ok(());
        }
        // Sealed anew with another cluster key, it is the same; this node may have to fetch that key first.
        let chain = |sealed: &Option<CustomCertificate>| sealed.as_ref().map(|sealed| sealed.chain.clone());
        if chain(&self.upload.sealed) != chain(wanted) {
            self.upload = Upload::default();
        }
        if let Some(sealed) = wanted {
            let keys = ClusterKeys::load(&self.certificates)?;
            let key = keys.find(sealed.key).context("this node does not have the cluster key that sealed it (yet)")?;
            self.upload.pair = Some(Arc::new(Pair::unseal(membership.cluster, sealed, key)?));
        }
        self.upload.sealed = wanted.clone();
        Ok(())
    }

    fn chosen(&self) -> (CertificateSource, &Arc<Pair>) {
        let folder = self.folder.pair().map(|pair| (CertificateSource::Folder, pair));
        let upload = || self.upload.pair.as_ref().map(|pair| (CertificateSource::Upload, pair));
        folder.or_else(upload).unwrap_or((CertificateSource::Cluster, &self.own))
    }

    /// Serves what is chosen, from the next connection on.
    fn serve(&mut self) {
        let (source, pair) = self.chosen();
        let pair = Arc::clone(pair);
        let same = |one: &Pair, other: &Pair| one.is_same(other);
        if same(&pair, &self.serving.0) && same(&self.own, &self.serving.1) {
            return;
        }
        match console_tls(&pair, &self.own) {
            Ok(settings) => {
                self.served.send_replace(settings);
                let CertificateInfo { subject, issuer, fingerprint, names, .. } = pair.info();
                info!(?source, subject, issuer, ?names, fingerprint, "the Console serves this certificate from now on");
                self.serving = (pair, Arc::clone(&self.own));
            }
            Err(error) => error!("the Console goes on serving the certificate that it has: {error}"),
        }
    }

    /// Called before [`Self::serve`], which notes what is served.
    fn serve_defenders(&mut self, membership: &Membership) {
        let trusted = membership.shared.trust_bundle();
        // Without the key, which may be on its way, nobody resumes a session.
        let tickets = self.tickets(membership, &trusted).unwrap_or_else(|error| {
            tracing::debug!("Defenders have to shake hands in full: {error}");
            None
        });
        let trusted = (trusted, tickets.as_ref().map(Tickets::key));
        if trusted == self.trusted && self.own.is_same(&self.serving.1) {
            return;
        }
        match defender_port_tls(&self.own, membership.shared.trusted(), tickets) {
            Ok(settings) => {
                settings.into_iter().for_each(|settings| drop(self.for_defenders.send_replace(settings)));
                self.trusted = trusted;
            }
            Err(error) => error!("the port of the Defenders goes on with the settings that it has: {error}"),
        }
    }

    /// Made with the key that seals the authority: all members change it at the same entry.
    fn tickets(&self, membership: &Membership, trusted: &str) -> Result<Option<Tickets>, pki::PkiError> {
        let Some(sealed) = &membership.shared.authority else { return Ok(None) };
        let keys = ClusterKeys::load(&self.certificates)?;
        Ok(Some(Tickets::new(keys.for_authority(sealed)?, membership.cluster, trusted)))
    }

    fn certificates(&self, membership: &Membership) -> Vec<CertificateStatus> {
        let (source, pair) = self.chosen();
        // Others have folders of their own.
        let of = if source == CertificateSource::Upload { None } else { Some(self.node) };
        let missing = missing(membership, pair.info(), of);
        let console = CertificateStatus { of: "console".to_owned(), source, missing, info: pair.info().clone() };
        let mut all = vec![console];
        all.extend(node_and_ca(&self.certificates));
        all
    }

    fn note(&mut self, about: About, problem: Option<String>) {
        let noted = &mut self.problems[about as usize];
        if *noted != problem {
            match &problem {
                Some(problem) => error!("{problem}"),
                None => info!("the problem with a certificate of the Console is over"),
            }
            *noted = problem;
        }
    }
}

/// Which clients will object to the certificate, for the administrator.
fn lacking(certificates: &[CertificateStatus]) -> Option<String> {
    let console =
        certificates.iter().find(|certificate| certificate.of == "console" && !certificate.missing.is_empty())?;
    let missing = console.missing.join(", ");
    Some(format!("the Console's certificate is not good for {missing}: clients that use these names refuse it"))
}

/// What the cluster's own certificate is to be good for: names of this host first, then the list.
fn own_names(local: Vec<String>, list: &[String]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in local.iter().chain(list) {
        let name = match name.parse::<std::net::IpAddr>() {
            Ok(address) => address.to_string(),
            Err(_) => name.to_ascii_lowercase(),
        };
        if !pki::is_reserved(&name) && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn load(certificates: &Path) -> Result<Arc<Pair>, pki::PkiError> {
    Ok(Arc::new(Pair::load(&certificates.join(CONSOLE_CERTIFICATE), &certificates.join(CONSOLE_KEY))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cluster::{ClusterId, Member, trust::KeyId},
        pki::ClusterKey,
    };

    fn founded() -> (tempfile::TempDir, Membership) {
        let dir = tempfile::tempdir().unwrap();
        let certificates = dir.path().join("certificates");
        std::fs::create_dir(&certificates).unwrap();
        let (authority, sealed) = Authority::establish(ClusterId(7), &certificates).unwrap();
        authority.issue_console(&["host1", "192.0.2.1"]).unwrap().save_console(&certificates).unwrap();
        let mut membership = Membership::founded(ClusterId(7), vec![Member::founder(1, "host1", "192.0.2.1", 8086)]);
        membership.shared.authority = Some(sealed);
        (dir, membership)
    }

    fn open(dir: &Path, membership: &Membership) -> ConsoleTls {
        let local = |address: &str| vec!["HOST1".to_owned(), address.to_owned()];
        ConsoleTls::open(dir, 1, membership, Box::new(local)).unwrap()
    }

    #[test]
    fn the_own_certificate_follows_address_list_and_authority() {
        let (dir, mut membership) = founded();
        let mut tls = open(dir.path(), &membership);
        let mut served = tls.served();
        let first = tls.own.info().clone();
        assert_eq!(first.names, ["host1", "192.0.2.1", CONSOLE_NAME]);
        let quiet = |shown: Shown| shown.warnings.iter().all(|(_, text)| text.is_none());
        assert!(quiet(tls.poll(&membership, true).unwrap()) && tls.own.info() == &first, "as it should be");
        membership.roster.members[0].address = "192.0.2.9".to_owned();
        membership.shared.console_names = vec!["lb.example".to_owned(), "host1".to_owned()];
        tls.poll(&membership, true);
        assert_eq!(tls.own.info().names, ["host1", "192.0.2.9", "lb.example", CONSOLE_NAME]);
        assert!(served.has_changed().unwrap());
        served.mark_unchanged();
        assert_eq!(open(dir.path(), &membership).own.info(), tls.own.info(), "it is in its file");
        // Another authority of the same cluster.
        let key = ClusterKey::load(&tls.certificates).unwrap();
        let authority = Authority::create(ClusterId(7)).unwrap();
        membership.shared.authority = Some(authority.seal(&key).unwrap());
        tls.poll(&membership, true);
        assert!(tls.own.is_signed_by(&pki::certificate_der(authority.certificate_pem()).unwrap()));
        assert!(served.has_changed().unwrap());
    }

    #[test]
    fn what_fails_leaves_what_there_is_and_is_shown() {
        let (dir, mut membership) = founded();
        let mut tls = open(dir.path(), &membership);
        let before = tls.own.info().clone();
        ClusterKey::generate().save(&tls.certificates).unwrap();
        membership.shared.console_names = vec!["lb.example".to_owned()];
        membership.shared.custom_certificate = Some(CustomCertificate {
            chain: String::new(),
            sealed_key: "AAAA".into(),
            key: KeyId(1),
            by: "a".into(),
            at: 1,
        });
        let Shown { certificates, warnings: [(_, warning), _, _] } = tls.poll(&membership, true).unwrap();
        let warning = warning.unwrap();
        assert!(warning.contains("stays as it was") && warning.contains("upload it again"), "{warning}");
        assert!(warning.contains("not good for lb.example"), "{warning}");
        assert_eq!((&certificates[0].info, certificates[0].source), (&before, CertificateSource::Cluster));
        let (authority, _) = Authority::establish(ClusterId(8), dir.path()).unwrap();
        authority.issue_console(&["own.example"]).unwrap().save_console(&tls.certificates).unwrap();
        let mut tls = open(dir.path(), &membership);
        tls.poll(&membership, true);
        assert_eq!(tls.own.info().names[0], "own.example", "that of another authority is its administrator's");
    }

    #[test]
    fn the_folder_comes_before_an_upload_before_the_clusters_own() {
        let (dir, mut membership) = founded();
        let mut tls = open(dir.path(), &membership);
        let other = Authority::create(ClusterId(8)).unwrap();
        let (upload, folder) = (other.issue_console(&["192.0.2.1"]).unwrap(), other.issue_console(&["host1"]).unwrap());
        let key = ClusterKey::load(&tls.certificates).unwrap();
        let pair = Pair::parse(&upload.cert_pem, &upload.key_pem).unwrap();
        membership.shared.custom_certificate = Some(pair.seal(&key, ClusterId(7), "admin", 1).unwrap());
        let source = |tls: &mut ConsoleTls| tls.poll(&membership, true).unwrap().certificates[0].source;
        assert_eq!(source(&mut tls), CertificateSource::Upload);
        let path = dir.path().join(pki::CUSTOM_FOLDER);
        std::fs::create_dir(&path).unwrap();
        folder.save_console(&path).unwrap();
        assert_eq!(source(&mut tls), CertificateSource::Upload, "not before it rests");
        assert_eq!(source(&mut tls), CertificateSource::Folder);
        std::fs::remove_dir_all(&path).unwrap();
        assert_eq!((source(&mut tls), source(&mut tls)), (CertificateSource::Folder, CertificateSource::Upload));
        membership.shared.custom_certificate = None;
        assert_eq!(tls.poll(&membership, true).unwrap().certificates[0].source, CertificateSource::Cluster);
    }

    #[test]
    fn another_cluster_key_changes_nothing_of_what_is_served() {
        let (dir, mut membership) = founded();
        let mut tls = open(dir.path(), &membership);
        let upload = Authority::create(ClusterId(8)).unwrap().issue_console(&["192.0.2.1"]).unwrap();
        let pair = Pair::parse(&upload.cert_pem, &upload.key_pem).unwrap();
        let (old, next) = (ClusterKey::load(&tls.certificates).unwrap(), ClusterKey::generate());
        membership.shared.custom_certificate = Some(pair.seal(&old, ClusterId(7), "admin", 1).unwrap());
        let shown = |tls: &mut ConsoleTls, membership: &Membership| {
            let Shown { certificates, warnings: [(_, warning), ..] } = tls.poll(membership, true).unwrap();
            (certificates[0].source, certificates[0].info == *pair.info(), warning)
        };
        let good = (CertificateSource::Upload, true, None);
        assert_eq!(shown(&mut tls, &membership), good);
        let given = membership.shared.custom_certificate.clone().unwrap();
        let authority =
            Authority::open(ClusterId(7), membership.shared.authority.as_ref().unwrap(), &tls.certificates).unwrap();
        membership.shared.custom_certificate = Some(pki::reseal(ClusterId(7), &given, &old, &next).unwrap());
        membership.shared.authority = Some(authority.seal(&next).unwrap());
        let (source, same, warning) = shown(&mut tls, &membership);
        assert!(warning.unwrap().contains("(yet)"), "a node that was away has to fetch the key");
        assert_eq!((source, same), (CertificateSource::Upload, true), "it goes on with what it has");
        let mut keys = ClusterKeys::load(&tls.certificates).unwrap();
        keys.keep_next(&tls.certificates, next).unwrap();
        assert_eq!(shown(&mut tls, &membership), good);
        keys.use_next(&tls.certificates).unwrap();
        assert_eq!(shown(&mut tls, &membership), good);
        // A node that starts has nothing but its files.
        assert_eq!(shown(&mut open(dir.path(), &membership), &membership), good);
        // Left behind by a replacement of the key: it is served until the next start, and everybody is told.
        membership.shared.custom_certificate = Some(given);
        let told =
            |tls: &mut ConsoleTls| tls.poll(&membership, true).unwrap().warnings[1].1.clone().unwrap_or_default();
        assert!(told(&mut tls).contains("upload it again"));
        assert_eq!(shown(&mut tls, &membership).0, CertificateSource::Upload);
        let mut started = open(dir.path(), &membership);
        assert!(told(&mut started).contains("upload it again"));
        assert_eq!(shown(&mut started, &membership).0, CertificateSource::Cluster);
    }
}
