//! Where the browser tests play: a mount, network and host name of their own, in which `console.test` is all three hosts.
//! Must never change anything outside.

use std::{
    env, fs,
    net::Ipv4Addr,
    path::Path,
    process::{Command, Stdio},
};

use nix::unistd::geteuid;

/// The name of the Console in the browser, and of this host in the namespaces, so that it is in every host's certificate.
pub const NAME: &str = "console.test";
/// The file that is bound over /etc/hosts; its presence says that we are on the stage.
const HOSTS: &str = "TWISTLOCK_TEST_HOSTS";
const PROGRAMS: [&str; 6] = ["chromium", "chromedriver", "certutil", "unshare", "ip", "mount"];

/// Runs `play` in namespaces of its own: this test binary again, for this one test.
pub fn on_stage(test: &str, play: impl FnOnce()) {
    if env::var_os(HOSTS).is_some() {
        return play();
    }
    if let Some(missing) = missing() {
        // CI installs what is needed: there, a missing program is a mistake.
        assert!(!(geteuid().is_root() && env::var("CI").is_ok_and(|ci| ci == "true")), "{missing}");
        println!("skipped: {missing}");
        return;
    }
    let hosts = tempfile::NamedTempFile::new().unwrap();
    let script = format!(
        "set -e; hostname {NAME}; ip link set lo up; mount --bind \"${HOSTS}\" /etc/hosts; exec \"$0\" --exact \"$1\" --nocapture"
    );
    let status = Command::new("unshare")
        .args(["--mount", "--uts", "--net", "--propagation", "private", "bash", "-c", &script])
        .arg(env::current_exe().unwrap())
        .arg(test)
        .env(HOSTS, hosts.path())
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{test} failed on its stage");
}

/// What this machine lacks.
fn missing() -> Option<String> {
    if !geteuid().is_root() {
        return Some("the browser tests make namespaces: run them as root".to_owned());
    }
    let path = format!("{}:/usr/sbin:/sbin", env::var("PATH").unwrap_or_default());
    let there = |program: &&str| path.split(':').any(|folder| Path::new(folder).join(program).exists());
    let lacks: Vec<_> = PROGRAMS.into_iter().filter(|program| !there(program)).collect();
    (!lacks.is_empty()).then(|| format!("{} not installed (scripts/check.sh names the packages)", lacks.join(", ")))
}

/// From now on the name of the Console has these addresses, as with round-robin DNS.
pub fn name_hosts(addresses: &[Ipv4Addr]) {
    let lines: String = addresses.iter().map(|address| format!("{address} {NAME}\n")).collect();
    // Written in place: the file is bound.
    fs::write(env::var_os(HOSTS).unwrap(), format!("127.0.0.1 localhost\n{lines}")).unwrap();
}
