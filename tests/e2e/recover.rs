//! Two hosts are lost for good: the third becomes a new cluster of one with everything that it has, and the others stay out.

use std::{
    fs::{self, File, Metadata, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use twistlock_ha::{
    cluster::Role,
    control::{self, Call},
    dev::{ClusterFile, NodeFile},
    node::{CertificateSource, Status},
    pki::{self, Authority, CertificateInfo, ClusterKey, NodeTls},
    storage::{DataDir, Identity},
};

use super::{
    beside,
    certificates::Foreign,
    cluster::{Cluster, LIMIT},
    terminal::Terminal,
    writers::Pen,
};

/// A daemon that nobody starts again.
struct Daemon {
    child: Child,
    node: NodeFile,
    log: PathBuf,
}

impl Daemon {
    fn start(cluster: &Cluster, index: usize) -> Self {
        let node = cluster.node(index);
        let log = node.data.with_file_name("log-alone");
        let file = File::create(&log).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_twistlockd"));
        command.args(["run", "--config"]).arg(cluster.config_path(index)).stdin(Stdio::null());
        let child = command.stdout(Stdio::null()).stderr(file).spawn().unwrap();
        Self { child, node, log }
    }

    fn wait_for(&self, what: &str, condition: impl Fn(&Status, &str) -> bool) -> Status {
        let deadline = Instant::now() + LIMIT;
        loop {
            let log = fs::read_to_string(&self.log).unwrap();
            if let Ok(status) = control::status(&self.node.control, Duration::from_millis(500))
                && condition(&status, &log)
            {
                return status;
            }
            assert!(Instant::now() < deadline, "{}: no {what}; its log:\n{log}", self.node.name);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn recover(cluster: &Cluster, index: usize, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_twistlockd"));
    command.args(["recover", "--config"]).arg(cluster.config_path(index)).args(more).stdin(Stdio::null());
    let output = command.output().unwrap();
    println!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    output
}

/// The same on a terminal, with an administrator who types. Returns the exit code.
fn on_terminal(cluster: &Cluster, index: usize, typed: &[&str]) -> i32 {
    let config = cluster.config_path(index);
    let command = ["recover", "--force-new-cluster", "--config", config.to_str().unwrap()];
    let mut terminal = Terminal::run(&[&[env!("CARGO_BIN_EXE_twistlockd")][..], &command].concat(), &[]);
    for line in typed {
        terminal.wait_for(") to go on: ");
        terminal.type_line(line);
    }
    let (code, seen) = terminal.wait_end();
    println!("{seen}");
    code
}

fn identity(data: &Path) -> Identity {
    DataDir::open(data).unwrap().identity().unwrap()
}

/// The user of the unit, where there is no such user.
const OWNER: u32 = 54_321;

/// As on a real host: the administrator is root, and the data folder belongs to somebody else, who can reach it.
fn give_away(data: &Path) {
    let top = data.ancestors().find(|path| path.parent() == Some(&std::env::temp_dir())).unwrap();
    for folder in data.ancestors().skip(1).take_while(|folder| folder.starts_with(top)) {
        fs::set_permissions(folder, Permissions::from_mode(0o711)).unwrap();
    }
    every_file(data, &|path, _| std::os::unix::fs::lchown(path, Some(OWNER), Some(OWNER)).unwrap());
}

fn every_file(path: &Path, act: &dyn Fn(&Path, &Metadata)) {
    let metadata = fs::symlink_metadata(path).unwrap();
    act(path, &metadata);
    if metadata.is_dir() {
        fs::read_dir(path).unwrap().for_each(|file| every_file(&file.unwrap().path(), act));
    }
}

/// As a crash in the middle of the switch leaves it, on a host that was told to join besides.
fn interrupt(data: &Path) {
    fs::create_dir(data.join("recover-new")).unwrap();
    fs::rename(data.join("identity.json"), data.join("recover-new/identity.json")).unwrap();
    fs::write(data.join("recover.json"), r#"{"format":1,"aside":"before-recover-interrupted"}"#).unwrap();
    fs::write(data.join("join.json"), "{}").unwrap();
}

/// The Consoles get another name and a certificate of another authority, which clients of the returned file trust.
fn give_names_and_certificate(cluster: &Cluster, node: usize) -> ClusterFile {
    let control = cluster.node(node).control;
    let operate = |operation: Call| control::ask::<serde_json::Value>(&control, &operation, LIMIT).unwrap();
    operate(Call::post("settings/certs").with(serde_json::json!({ "consoleSAN": ["lb.example.com"] })));
    let foreign = Foreign::new();
    let (certificate, key) = foreign.issue(&["127.0.0.1", "127.0.0.2", "127.0.0.3", "lb.example.com"]);
    let pem = [certificate, key].concat();
    operate(Call::post("settings/custom-certs").with(serde_json::json!({ "certificate": pem })));
    let mut file = cluster.file();
    file.ca = file.ca.with_file_name("foreign-ca.pem");
    fs::write(&file.ca, &foreign.pem).unwrap();
    file
}

/// Both are there again; clients that know nothing of the new cluster show that the certificate is served.
fn expect_names_and_certificate(survivor: &Daemon, data: &Path) {
    let served = survivor.wait_for("what it serves", |status, _| !status.certificates.is_empty()).certificates;
    let console = served.iter().find(|certificate| certificate.of == "console").unwrap();
    assert_eq!(console.source, CertificateSource::Upload);
    let own = fs::read_to_string(data.join("certificates/console-cert.pem")).unwrap();
    let own = CertificateInfo::read(&pki::certificate_der(&own).unwrap()).unwrap();
    assert!(own.covers("lb.example.com") && own.covers("127.0.0.1"), "{own:?}");
}

fn wait_all_dead(cluster: &Cluster) {
    cluster.wait_for("three dead nodes", |_| cluster.file().nodes.iter().all(|node| node.pid.is_none()));
}

/// The new identity, authority and certificates belong together, and the old files were set aside.
fn expect_new_cluster(data: &Path, before: &Identity) -> Identity {
    let after = identity(data);
    assert!(after.cluster != before.cluster && after.membership.roster.members.len() == 1);
    let aside = fs::read_dir(data).unwrap().map(|file| file.unwrap().path());
    let aside = aside.filter(|path| path.to_string_lossy().contains("before-recover-")).collect::<Vec<_>>();
    assert_eq!(aside.len(), 1);
    for file in ["identity.json", "raft-log", "database/console.db", "certificates/node-key.pem"] {
        assert!(aside[0].join(file).exists(), "{file} was not set aside");
    }
    assert_eq!(NodeTls::load(&data.join("certificates")).unwrap().identity, (after.cluster, after.node));
    let sealed = after.membership.shared.authority.as_ref().expect("a new authority");
    let key = ClusterKey::load(&data.join("certificates")).unwrap();
    Authority::unseal(after.cluster, sealed, &key).unwrap();
    after
}

#[test]
fn a_survivor_becomes_a_new_cluster_of_one() {
    let _beside = beside();
    let cluster = Cluster::start_with("0", |_| {});
    let old = cluster.primary();
    let file = give_names_and_certificate(&cluster, old);
    let pen = Pen::new(&file);
    let other = (old + 1) % 3;
    let acknowledged: Vec<_> = (0..50).map(|number| format!("acknowledged-{number}")).collect();
    assert!(acknowledged.iter().all(|tag| pen.write(old, tag)));
    // One that only the survivor has: for all it knows, the others acknowledged it.
    cluster.freeze(other);
    cluster.freeze((old + 2) % 3);
    assert!(!pen.write(old, "in-the-tail"));
    let running = recover(&cluster, old, &["--force-new-cluster"]);
    assert_eq!(running.status.code(), Some(75), "it runs");
    (0..3).for_each(|node| cluster.signal(node, Signal::SIGKILL));
    wait_all_dead(&cluster);

    let data = cluster.node(old).data;
    let before = identity(&data);
    let name = before.cluster.to_string()[..8].to_owned();
    let root = nix::unistd::geteuid().is_root();
    if root {
        give_away(&data);
    } else {
        eprintln!("SKIPPED: not root, so that a recovery for another user is not tested");
    }
    assert_eq!(recover(&cluster, old, &[]).status.code(), Some(64));
    assert_eq!(recover(&cluster, old, &["--force-new-cluster"]).status.code(), Some(64), "nobody confirmed");
    assert_eq!(recover(&cluster, old, &["--force-new-cluster", "--confirm", "00000000"]).status.code(), Some(64));
    assert_eq!(recover(&cluster, old, &["--force-new-cluster", "--dry-run"]).status.code(), Some(0));
    assert_eq!(on_terminal(&cluster, old, &["00000000"]), 64, "a wrong name was typed");
    assert_eq!(identity(&data), before, "nothing was changed so far");
    // An attempt that was ended by force takes space, and must not be in the way.
    fs::create_dir(data.join("recover-new")).unwrap();
    fs::write(data.join("recover-new/rest"), "rest").unwrap();
    if root {
        give_away(&data);
    }
    assert_eq!(on_terminal(&cluster, old, &[&name]), 0);
    if root {
        every_file(&data, &|path, metadata| {
            assert_eq!((metadata.uid(), metadata.gid()), (OWNER, OWNER), "{}", path.display());
        });
    }

    let after = expect_new_cluster(&data, &before);
    interrupt(&data);
    assert_eq!(recover(&cluster, old, &["--force-new-cluster", "--dry-run"]).status.code(), Some(0));
    assert!(data.join("recover.json").exists() && !data.join("identity.json").exists(), "--dry-run changes nothing");
    let survivor = Daemon::start(&cluster, old);
    let status = survivor.wait_for("PRIMARY", |status, _| status.role == Role::Primary);
    assert_eq!((status.cluster, status.members.len()), (after.cluster, 1));
    expect_names_and_certificate(&survivor, &data);
    let pen = Pen::new(&file);
    assert!(pen.write(old, "after-the-recovery"));
    for tag in acknowledged.iter().map(String::as_str).chain(["in-the-tail", "after-the-recovery"]) {
        assert!(pen.has(tag), "{tag} is lost");
    }

    // A member of the old cluster comes back: it is refused, and cannot serve alone.
    let lost = Daemon::start(&cluster, other);
    lost.wait_for("refusal", |status, log| {
        status.role == Role::Secondary && log.contains("not signed by this cluster's authority")
    });
    let status = survivor.wait_for("its own view", |status, _| status.role == Role::Primary);
    assert_eq!(status.members.len(), 1);
}
