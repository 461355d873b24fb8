//! `twistlockd host` as an administrator runs it: the real program, a real node below a prefix. Nothing is played by the
//! test but the administrator, and the process that dies between two steps.

#[path = "host/container.rs"]
mod container;

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use twistlock_ha::{
    cluster::{ClusterId, Member, Membership},
    storage::{DataDir, IDENTITY_FORMAT, Identity},
};

/// Far above what anything should take: a busy machine fails no test.
const BOUND: Duration = Duration::from_secs(90);
/// The exit code after a step that `--stop-after` has named.
const STOPPED: i32 = 3;

/// A host as a folder, with an address of its own.
struct Host {
    folder: tempfile::TempDir,
    address: Ipv4Addr,
}

impl Host {
    fn new(number: u8) -> Self {
        let process = std::process::id() as u16;
        let folder = tempfile::Builder::new().prefix("twh").tempdir().unwrap();
        Self { folder, address: Ipv4Addr::new(127, 96 + number, (process >> 8) as u8, process as u8) }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn data(&self) -> PathBuf {
        self.at("var/lib/twistlock")
    }

    fn config(&self) -> PathBuf {
        self.at("etc/twistlock/twistlock.cfg")
    }

    /// Runs `twistlockd host`; its exit code and all that it says.
    fn host(&self, words: &[&str]) -> (i32, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_twistlockd"));
        command.arg("host").args(words).env("TWISTLOCK_PREFIX", self.folder.path()).current_dir(self.folder.path());
        let output = command.stdin(Stdio::null()).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8_lossy(&said).into_owned())
    }

    /// An installation with the settings of a test.
    fn install(&self, words: &[&str]) -> (i32, String) {
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("twistlock.cfg.example");
        let address = format!("BIND_ADDRESS={}", self.address);
        let settings =
            ["--set", &address, "--set", "HIGH_AVAILABILITY_ENABLED=true", "--config", example.to_str().unwrap()];
        self.host(&[&["install", "-sy"], &settings[..], words, &["console"]].concat())
    }

    fn succeeds(&self, (code, said): (i32, String)) -> String {
        let log = fs::read_to_string(self.at("var/log/twistlock/twistlockd.log")).unwrap_or_default();
        assert_eq!(code, 0, "{said}\n{log}");
        said
    }

    fn refuses(&self, expected: i32, why: &str, (code, said): (i32, String)) {
        assert!(code == expected && said.contains(why), "{code}: {said}");
    }

    /// Makes a folder that of a member of a cluster of so many.
    fn put_member(&self, folder: &Path, members: u64) {
        let all = (1..=members).map(|id| Member::founder(id, &format!("host{id}"), "192.0.2.1", 8086)).collect();
        let membership = Membership::founded(ClusterId(7), all);
        let identity =
            Identity { format: IDENTITY_FORMAT, cluster: ClusterId(7), node: 1, name: "host1".into(), membership };
        DataDir::open(folder).unwrap().create_identity(&identity).unwrap();
    }

    fn installed(&self, text: impl AsRef<[u8]>) {
        fs::create_dir_all(self.config().parent().unwrap()).unwrap();
        fs::write(self.config(), text).unwrap();
    }

    fn cluster(&self) -> String {
        cluster_of(&self.data())
    }

    fn pid(&self) -> Option<Pid> {
        let pid: i32 = fs::read_to_string(self.data().join("lock")).ok()?.trim().parse().ok()?;
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        program.file_name()?.to_str()?.starts_with("twistlockd").then(|| Pid::from_raw(pid))
    }
}

/// The cluster that a data folder belongs to, which another process may have.
fn cluster_of(data: &Path) -> String {
    Identity::read(data).unwrap().cluster.to_string()
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < BOUND, "waited too long until {what}");
        thread::park_timeout(Duration::from_millis(20));
    }
}

/// A daemon that was started by something else than an installation.
struct Daemon(Child);

impl Daemon {
    fn start(config: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_twistlockd"));
        command.args(["run", "--config"]).arg(config).stdin(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The process dies after each step in turn; each time all is begun anew, and the last time brought to its end. First where
/// nothing is, then over a node that runs and stays what it was, and at last when everything goes.
#[test]
fn a_process_may_die_after_each_step() {
    let host = Host::new(0);
    let steps = ["role", "stop", "user", "folders", "program", "config", "manual", "unit"];
    for step in steps {
        host.refuses(STOPPED, &format!("stopped after the step {step}"), host.install(&["--stop-after", step]));
    }
    let said = host.succeeds(host.install(&[]));
    assert!(said.contains("PRIMARY") && said.contains("Done."), "{said}");
    let (cluster, pid) = (host.cluster(), host.pid());
    assert!(pid.is_some(), "{said}");
    for step in [&steps[..], &["start"]].concat() {
        host.refuses(STOPPED, "", host.install(&["-j", "--stop-after", step]));
    }
    let said = host.succeeds(host.install(&["-j"]));
    assert!(host.cluster() == cluster && host.pid() != pid, "{said}");

    // What is dropped is set aside whole, however often it is begun.
    for step in ["aside", "folders", "config"] {
        host.refuses(STOPPED, "", host.install(&["-jf", "--stop-after", step]));
    }
    let kept: Vec<_> = fs::read_dir(host.at("var/lib")).unwrap().map(|entry| entry.unwrap().path()).collect();
    let aside = kept.iter().filter(|path| path.to_string_lossy().contains("twistlock.dropped-"));
    assert_eq!(aside.clone().filter(|path| cluster_of(path) == cluster).count(), 1, "{kept:?}");
    host.succeeds(host.install(&["-jf"]));
    assert_ne!(host.cluster(), cluster);

    for step in ["role", "stop", "files"] {
        host.refuses(STOPPED, "", host.host(&["uninstall", "-s", "--stop-after", step]));
    }
    let said = host.succeeds(host.host(&["uninstall", "-s"]));
    assert!(said.contains("Left in place"), "{said}");
    assert!(host.pid().is_none() && !host.at("usr/local/bin/twistlockd").exists() && host.data().exists());
    let log = fs::read_to_string(host.at("twistlock-install.log")).unwrap();
    assert!(log.contains("step program") && log.contains("--set BIND_ADDRESS=... "), "{log}");
}

/// With CLUSTERED_DB_ENABLED=true the installation founds nothing: the host waits, and is not asked to be anything again.
#[test]
fn a_host_of_a_pool_is_installed_and_waits() {
    let host = Host::new(9);
    let said = host.succeeds(host.install(&["--set", "CLUSTERED_DB_ENABLED=true"]));
    assert!(said.contains("WAITING: ") && said.contains("fingerprint of its key"), "{said}");
    assert!(said.contains("Done. This host waits for a pool: sign up at https://"), "{said}");
    assert!(host.pid().is_some() && !host.data().join("identity.json").exists());
    let key = fs::read(host.data().join("certificates/node-key.pem")).unwrap();
    host.succeeds(host.install(&["-j"]));
    assert_eq!(fs::read(host.data().join("certificates/node-key.pem")).unwrap(), key, "it keeps its fingerprint");
    // A member of a pool is no host that waits for another one.
    host.put_member(&host.at("srv/pool"), 3);
    let folder = format!("DATA_FOLDER={}", host.at("srv/pool").display());
    let settings = ["--set", "CLUSTERED_DB_ENABLED=true", "--set", &folder, "--dry-run"];
    host.refuses(77, "CLUSTERED_DB_ENABLED=true would have this host wait", host.install(&settings));
}

/// Scripts fetch, verify and start the program. Settings have one reader, and what is done to a host is done by `host`.
#[test]
fn scripts_are_short_and_leave_the_settings_to_the_program() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let scripts = ["scripts/install.sh", "src/join/console.sh.in", "src/join/defender.sh.in", "src/join/fetch.sh.in"];
    let package = ["postinst", "prerm", "postrm"].map(|name| format!("packaging/debian/{name}"));
    for path in scripts.iter().map(|path| (*path).to_owned()).chain(package) {
        let text = fs::read_to_string(root.join(&path)).expect("read a script");
        assert!(text.lines().count() < 120, "{path} is too long: what it does belongs into src/host");
        for sign in ["DATA_FOLDER", "DATA_RECOVERY", "MANAGEMENT_PORT", "sed -n", "awk"] {
            assert!(!text.contains(sign), "{path} has {sign}: twistlock.cfg has one reader, src/config");
        }
    }
}

#[test]
fn a_dry_run_lists_the_steps_and_changes_nothing() {
    let host = Host::new(1);
    let said = host.succeeds(host.install(&["--dry-run"]));
    for step in ["stop", "user", "folders", "program", "config", "unit", "start"] {
        assert!(said.contains(&format!("would: {step} ")), "{step}: {said}");
    }
    let mut left: Vec<_> = fs::read_dir(host.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["twistlock-install.log"]);
}

#[test]
fn what_cannot_be_is_refused_with_a_code_for_each() {
    let host = Host::new(2);
    host.refuses(64, "the component is missing", host.host(&["install", "-s"]));
    host.refuses(64, "'-q'", host.host(&["install", "-sq", "console"]));
    host.refuses(64, "allowed: flags, then", host.host(&["install", "daemon"]));
    host.refuses(64, "'-f'", host.host(&["install", "-uf"]));
    host.refuses(64, "KEY=VALUE", host.install(&["--set", "key=1"]));
    host.refuses(66, "there is no folder /nowhere", host.install(&["--program", "/nowhere"]));
    host.refuses(66, "twistlockd is not in", host.install(&["--program", "/etc"]));
    host.refuses(78, "MANAGEMENT_PORT_HTTPS", host.install(&["--set", "MANAGEMENT_PORT_HTTPS=70000"]));
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("twistlock.cfg.example");
    let without_s = ["install", "-y", "--config", example.to_str().unwrap(), "console"];
    host.refuses(77, "the terms were not accepted", host.host(&without_s));
    assert!(!host.at("usr").exists() && !host.at("etc").exists());
}

/// A daemon of a member has its data wherever somebody once said so. Nobody founds another cluster beside it.
#[test]
fn no_cluster_is_founded_beside_the_data_of_a_member() {
    let host = Host::new(3);
    let elsewhere = host.at("srv/tw");
    let refused = |words: &[&str], named_by: &str| {
        let (code, said) = host.install(&[words, &["--dry-run"]].concat());
        let all = [named_by, "belongs to a cluster of 3 members", "twistlockd recover", "Nothing was changed"];
        assert!(code == 77 && all.iter().all(|part| said.contains(part)), "{code}: {said}");
    };
    host.put_member(&elsewhere, 3);
    host.succeeds(host.install(&["--dry-run"]));

    // Named by the installed settings, in all the ways in which they can be written.
    let folder = elsewhere.display().to_string();
    for line in [
        format!("\u{feff}DATA_FOLDER={folder}\n"),
        format!("  DATA_FOLDER={folder}   # big disk\r\n"),
        format!("DATA_FOLDER=\"{folder}\" # x\n"),
        format!("DATA_FOLDER=${{TW_NONE:-{}}}/tw\n", host.at("srv").display()),
    ] {
        host.installed(&line);
        refused(&[], "the installed");
        refused(&["-f"], "the installed");
        let other = format!("DATA_FOLDER={}", host.at("srv/another").display());
        refused(&["-j", "--set", &other], "the installed");
        // As the member that it is, it goes on.
        let said = host.succeeds(host.install(&["-j", "--dry-run"]));
        assert!(said.contains(&format!("make {folder} and")), "{said}");
    }
    // So does one whose own port has become the default of another: it has no such other.
    host.installed(format!("DATA_FOLDER={folder}\nMANAGEMENT_PORT_HTTPS=8085\n"));
    host.succeeds(host.install(&["-j", "--dry-run"]));
    host.installed(format!("DATA_FOLDER=~/tw\nDATA_FOLDER={folder} x\n"));
    host.refuses(78, "nobody can tell where this host's data is", host.install(&["--dry-run"]));

    // By the settings before those, by the default, and by a folder that nobody can read.
    host.installed(format!("DATA_FOLDER={}\n", host.at("srv/new").display()));
    fs::write(host.config().with_file_name("twistlock.cfg.before-20260101T000000Z"), format!("DATA_FOLDER={folder}\n"))
        .unwrap();
    refused(&[], "twistlock.cfg.before-20260101T000000Z");
    fs::remove_file(host.config().with_file_name("twistlock.cfg.before-20260101T000000Z")).unwrap();
    host.put_member(&host.data(), 3);
    let other = format!("DATA_FOLDER={}", host.at("srv/another").display());
    refused(&["--set", &other], "the default");
    fs::write(host.data().join("identity.json"), "{").unwrap();
    host.refuses(77, "cannot be read", host.install(&["--set", &other, "--dry-run"]));
    fs::remove_dir_all(host.data()).unwrap();

    // By a daemon that runs with settings that nothing else names.
    let own = host.at("own.cfg");
    let (data, address) = (host.at("srv/own"), host.address);
    let text = format!(
        "DATA_FOLDER={}\nBIND_ADDRESS={address}\nHIGH_AVAILABILITY_ENABLED=true\nDATA_RECOVERY_ENABLED=false\n\
         DATA_RECOVERY_VOLUME={}\n",
        data.display(),
        host.at("backups").display()
    );
    fs::write(&own, text).unwrap();
    let daemon = Daemon::start(&own);
    wait_until("the daemon has its identity", || data.join("identity.json").exists());
    let (_, said) = host.install(&["--dry-run"]);
    assert!(said.contains(&format!("the data in {} will not be used any more", data.display())), "{said}");
    drop(daemon);
}
