//! What the Consoles serve, seen by a real TLS client: new names, certificates of an administrator, and the custom folder, all
//! without a restart.

use std::{
    fs,
    net::TcpStream,
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use serde_json::{Value, json};
use twistlock_ha::{
    admin::{Certificates, Custom},
    cluster::Role,
    control::{self, Call},
    events::Event,
    node::{CertificateSource, CertificateStatus, Status},
    pki::{CONSOLE_CERTIFICATE, CONSOLE_KEY, CONSOLE_NAME, CUSTOM_FOLDER, ClusterKeys},
    storage::membership::StoredMembership,
};

use super::{
    beside,
    cluster::{self, Cluster},
    held::Held,
    writers::Pen,
};

/// What a load balancer in front is called.
const BALANCER: &str = "console.example.com";
/// The addresses of the members, and the names of the list as `dev` makes it.
const MEMBERS: [&str; 3] = ["127.0.0.1", "127.0.0.2", "127.0.0.3"];

/// An authority that the cluster does not know.
pub struct Foreign {
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Foreign {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// A certificate for these names, and its key.
    pub fn issue(&self, names: &[&str]) -> (String, String) {
        let params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

fn all_names() -> Vec<&'static str> {
    MEMBERS.into_iter().chain([BALANCER]).collect()
}

/// A handshake that asks for `name` and trusts this authority alone.
pub fn trusts(cluster: &Cluster, node: usize, name: &str, authority: &str) -> bool {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.as_bytes()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut connection = ClientConnection::new(Arc::new(config), name.to_owned().try_into().unwrap()).unwrap();
    let Ok(mut socket) = TcpStream::connect(cluster.node(node).console_url.trim_start_matches("https://")) else {
        return false;
    };
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    while connection.is_handshaking() {
        if connection.complete_io(&mut socket).is_err() {
            return false;
        }
    }
    true
}

pub fn own_ca(cluster: &Cluster) -> String {
    fs::read_to_string(cluster.file().ca).unwrap()
}

fn operate<T: serde::de::DeserializeOwned>(cluster: &Cluster, operation: Call) -> Result<T, String> {
    let node = cluster.node(cluster.primary());
    control::ask(&node.control, &operation, cluster::LIMIT).map_err(|error| error.to_string())
}

fn console(status: &Status) -> Option<&CertificateStatus> {
    status.certificates.iter().find(|certificate| certificate.of == "console")
}

/// Waits until all three say of their Console's certificate what is expected.
fn wait_for_consoles(cluster: &Cluster, what: &str, expected: impl Fn(&CertificateStatus) -> bool) {
    cluster.wait_for(what, |statuses| {
        statuses.iter().all(|status| status.as_ref().and_then(console).is_some_and(&expected))
    });
}

fn wait_until_trusted(cluster: &Cluster, node: usize, name: &str, authority: &str) -> Duration {
    let begin = Instant::now();
    cluster.wait_for("a handshake that is trusted", |_| trusts(cluster, node, name, authority));
    begin.elapsed()
}

fn switch_over(cluster: &Cluster) {
    operate::<serde_json::Value>(cluster, Call::post("high-availability/switchover").with(json!({}))).unwrap();
    cluster.wait_healthy();
}

fn pids(cluster: &Cluster) -> Vec<Option<u32>> {
    cluster.file().nodes.iter().map(|node| node.pid).collect()
}

#[test]
fn new_names_are_served_by_all_without_a_restart() {
    let _beside = beside();
    let cluster = Cluster::start();
    let (ca, before, first) = (own_ca(&cluster), pids(&cluster), cluster.primary());
    let pen = Pen::new(&cluster.file());
    let mut held = Held::open(&cluster.file(), first, pen.authorization());
    assert!(!trusts(&cluster, first, BALANCER, &ca));
    let names: Vec<String> = all_names().into_iter().map(str::to_owned).collect();
    let set = Call::post("settings/certs").with(json!({ "consoleSAN": names }));
    let kept: Value = operate(&cluster, set).unwrap();
    assert_eq!(kept, json!({ "consoleSAN": names }));
    println!("  served {:?} after the change", wait_until_trusted(&cluster, first, BALANCER, &ca));
    held.prepare("GET", "");
    held.send_rest().expect("the connection goes on");
    held.read_answer();
    wait_for_consoles(&cluster, "the new name on all three", |console| {
        console.source == CertificateSource::Cluster && console.info.covers(BALANCER)
    });
    for _ in 0..2 {
        switch_over(&cluster);
        let node = cluster.primary();
        wait_until_trusted(&cluster, node, BALANCER, &ca);
        assert!(trusts(&cluster, node, &cluster.node(node).address, &ca));
    }
    assert_eq!(pids(&cluster), before, "nobody was started again");
    for node in 0..3 {
        wait_for_events(
            &cluster,
            node,
            &["for other names: beside those of each host 127.0.0.1", "was made anew, good until"],
        );
    }
    for wrong in ["https://a", "node.twistlock.internal", "*.twistlock.internal"] {
        let set = Call::post("settings/certs").with(json!({ "consoleSAN": [wrong] }));
        assert!(operate::<Value>(&cluster, set).unwrap_err().contains(wrong));
    }
    drop(held);
    println!("names: {}", cluster.finish(&[]));
}

#[test]
fn a_given_certificate_survives_a_takeover() {
    let _beside = beside();
    let cluster = Cluster::start();
    let (ca, foreign) = (own_ca(&cluster), Foreign::new());
    operate::<Value>(&cluster, Call::post("settings/certs").with(json!({ "consoleSAN": all_names() }))).unwrap();
    let give = |names: &[&str]| {
        let (certificate, key) = foreign.issue(names);
        let pem = [certificate, foreign.pem.clone(), key].concat();
        operate::<Custom>(&cluster, Call::post("settings/custom-certs").with(json!({ "certificate": pem })))
    };
    let why = give(&["127.0.0.1", "other.example.com"]).unwrap_err();
    let all = ["node2 (127.0.0.2)", "node3 (127.0.0.3)", BALANCER];
    assert!(all.iter().all(|name| why.contains(name)) && !why.contains("node1"), "{why}");
    assert!(trusts(&cluster, cluster.primary(), "127.0.0.1", &ca), "nothing was changed");
    give(&all_names()).unwrap();
    let first = cluster.primary();
    println!("  served {:?} after it was given", wait_until_trusted(&cluster, first, BALANCER, &foreign.pem));
    assert!(!trusts(&cluster, first, BALANCER, &ca));
    assert!(trusts(&cluster, first, CONSOLE_NAME, &ca), "hosts that join see the cluster's own");
    let given = |console: &CertificateStatus| console.source == CertificateSource::Upload && console.missing.is_empty();
    wait_for_consoles(&cluster, "the given certificate on all three", given);
    let membership = fs::read_to_string(cluster.node(first).data.join("membership.json")).unwrap();
    assert!(membership.contains("sealed_key") && !membership.contains("PRIVATE"));
    cluster.signal(first, Signal::SIGKILL);
    cluster.wait_for("another PRIMARY that serves it", |_| {
        (0..3).any(|node| node != first && trusts(&cluster, node, BALANCER, &foreign.pem))
    });
    cluster.wait_healthy();
    wait_for_consoles(&cluster, "the given certificate after the restart, too", given);
    operate::<Value>(&cluster, Call::delete("settings/custom-certs")).unwrap();
    wait_until_trusted(&cluster, cluster.primary(), BALANCER, &ca);
    assert!(operate::<Value>(&cluster, Call::delete("settings/custom-certs")).unwrap_err().contains("none to remove"));
    println!("given certificate: {}", cluster.finish(&[]));
}

/// Waits until a node has events of certificates with these parts.
fn wait_for_events(cluster: &Cluster, node: usize, parts: &[&str]) {
    let wanted = Call::get("high-availability/events?limit=400&kind=certificate");
    let read = || -> Vec<Event> {
        let control = cluster.node(node).control;
        control::ask(&control, &wanted, cluster::LIMIT).unwrap()
    };
    cluster.wait_for("events of certificates", |_| {
        let events = read();
        parts.iter().all(|part| events.iter().any(|event| event.sentence.contains(part)))
    });
}

/// As a disk, or whoever has had it in his hands, may leave it: the same on all members.
fn damage_given_certificate(cluster: &Cluster) {
    for node in 0..3 {
        let data = cluster.node(node).data;
        let mut known = StoredMembership::read(&data).unwrap().expect("a membership");
        let given = known.membership.shared.custom_certificate.as_mut().expect("a certificate");
        given.sealed_key = given.sealed_key.chars().rev().collect();
        known.write(&data).unwrap();
    }
}

fn warned(cluster: &Cluster, part: &str) -> bool {
    let primary = cluster.statuses().into_iter().flatten().find(|status| status.role == Role::Primary);
    primary.is_some_and(|status| status.warnings.iter().any(|warning| warning.contains(part)))
}

/// A host is removed that knows the key of the certificate, which nobody can unseal any more: the cluster key is replaced all the
/// same, and the administrator is told of both until he gives another one.
#[test]
fn a_given_certificate_does_not_keep_a_removed_hosts_key_in_use() {
    let _beside = beside();
    let cluster = Cluster::start_with("4", |_| {});
    let foreign = Foreign::new();
    let give = || {
        let (certificate, key) = foreign.issue(&all_names());
        let pem = [certificate, foreign.pem.clone(), key].concat();
        operate::<Custom>(&cluster, Call::post("settings/custom-certs").with(json!({ "certificate": pem }))).unwrap()
    };
    assert_eq!(give().exposed_to, [""; 0]);
    wait_for_consoles(&cluster, "it on all three", |console| console.source == CertificateSource::Upload);
    let key =
        |node: usize| ClusterKeys::load(&cluster.node(node).data.join("certificates")).unwrap().current.unwrap().id();
    let before = key(0);
    (0..3).for_each(|node| cluster.signal(node, Signal::SIGKILL));
    cluster.wait_for("three dead nodes", |_| cluster.file().nodes.iter().all(|node| node.pid.is_none()));
    damage_given_certificate(&cluster);
    cluster.wait_healthy();
    wait_for_consoles(&cluster, "the cluster's own on all three", |console| {
        console.source == CertificateSource::Cluster
    });
    cluster.wait_for("the warning", |_| warned(&cluster, "cannot be used here"));

    let primary = cluster.primary();
    let gone = cluster.node((primary + 1) % 3).name;
    let told: Value = operate(&cluster, Call::delete(format!("high-availability/members/{gone}"))).unwrap();
    let warning = told["warning"].as_str().unwrap_or_default();
    assert!(warning.contains(&gone) && warning.contains("private key"), "{told}");
    cluster.wait_for("another cluster key", |_| key(primary) != before && key((primary + 2) % 3) != before);
    for part in ["no member has any more", "upload it again", &format!("{gone} has the private key")] {
        cluster.wait_for("a warning", |_| warned(&cluster, part));
    }
    let history =
        ["was given to all Consoles by", "the cluster key is replaced", "has the private key of the certificate"];
    wait_for_events(&cluster, primary, &history);
    let known: Certificates = operate(&cluster, Call::get("settings/certs")).unwrap();
    assert_eq!(known.custom.unwrap().exposed_to, [gone]);

    assert_eq!(give().exposed_to, [""; 0]);
    wait_until_trusted(&cluster, primary, BALANCER, &foreign.pem);
    cluster.wait_for("no warning", |_| !warned(&cluster, "private key") && !warned(&cluster, "upload it again"));
}

/// As a tool that renews certificates does it: each file at one instant.
fn put(folder: &Path, name: &str, text: &str) {
    fs::create_dir_all(folder).unwrap();
    let new = folder.join(format!("{name}.new"));
    fs::write(&new, text).unwrap();
    fs::rename(new, folder.join(name)).unwrap();
}

#[test]
fn the_custom_folder_is_followed_and_a_broken_one_changes_nothing() {
    let _beside = beside();
    let cluster = Cluster::start_with("0", |_| {});
    let (ca, foreign, node) = (own_ca(&cluster), Foreign::new(), cluster.primary());
    let folder = cluster.node(node).data.join(CUSTOM_FOLDER);
    let (certificate, key) = foreign.issue(&all_names());
    put(&folder, CONSOLE_CERTIFICATE, &certificate);
    put(&folder, CONSOLE_KEY, &key);
    println!("  served {:?} after it was put there", wait_until_trusted(&cluster, node, BALANCER, &foreign.pem));
    let warned = |statuses: &[Option<Status>], part: &str| {
        statuses[node].as_ref().is_some_and(|status| status.warnings.iter().any(|warning| warning.contains(part)))
    };
    put(&folder, CONSOLE_KEY, "-----BEGIN PRIVATE KEY-----\nnothing\n-----END PRIVATE KEY-----\n");
    cluster.wait_for("a warning", |statuses| warned(statuses, "stays in use"));
    assert!(trusts(&cluster, node, BALANCER, &foreign.pem), "the old one goes on");
    let other = Foreign::new();
    let (certificate, key) = other.issue(&all_names());
    put(&folder, CONSOLE_CERTIFICATE, &certificate);
    put(&folder, CONSOLE_KEY, &key);
    wait_until_trusted(&cluster, node, BALANCER, &other.pem);
    cluster.wait_for("no warning", |statuses| !warned(statuses, "stays in use"));
    fs::remove_dir_all(&folder).unwrap();
    wait_until_trusted(&cluster, node, "127.0.0.1", &ca);
    assert_eq!(cluster.log(node).matches("stays in use").count(), 1, "said once");

    // At a start there is no old one.
    let node = (node + 1) % 3;
    let folder = cluster.node(node).data.join(CUSTOM_FOLDER);
    put(&folder, CONSOLE_CERTIFICATE, &certificate);
    cluster.signal(node, Signal::SIGKILL);
    cluster.wait_for("the end of the process", |_| cluster.node(node).pid.is_none());
    let run = Command::new(env!("CARGO_BIN_EXE_twistlockd"))
        .args(["run", "--config"])
        .arg(cluster.config_path(node))
        .output();
    let (said, run) = (|bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned(), run.unwrap());
    let said = said(&run.stderr);
    assert_eq!(run.status.code(), Some(69), "{said}");
    assert!(said.contains("console-cert.pem") && said.contains("console-key.pem is missing beside it"), "{said}");
}
