//! Hosts as folders: each has its own loopback address and a prefix below which the join script installs. Must never leave a
//! daemon behind.

use std::{
    fs,
    net::Ipv4Addr,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU8, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use twistlock_ha::{cluster::Role, control, node::Status, pki};
use ureq::{
    Agent, SendBody,
    tls::{Certificate, RootCerts, TlsConfig},
};

const PASSWORD: &str = "Join-test-1234";
/// Far above what anything should take: a busy machine fails no test.
const BOUND: Duration = Duration::from_secs(90);

/// Polls until the condition holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < BOUND, "waited too long until {what}");
        thread::park_timeout(Duration::from_millis(20));
    }
}

/// The token that a line hands over.
pub fn token_of(line: &str) -> String {
    let from = line.find("TWJ1.").expect("a token in the line");
    line[from..].split('\'').next().unwrap().to_owned()
}

/// A process that was started by the script or by the test, by its data folder.
fn pid_of(data: &Path) -> Option<Pid> {
    let pid: i32 = fs::read_to_string(data.join("lock")).ok()?.trim().parse().ok()?;
    let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    program.file_name()?.to_str()?.starts_with("twistlockd").then(|| Pid::from_raw(pid))
}

fn stop(data: &Path, signal: Signal) {
    let Some(pid) = pid_of(data) else { return };
    // It may end by itself just now.
    let _ = kill(pid, signal);
    // Its program is gone before its files are, and with them the lock of the data folder.
    let lives = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with("State:") && !line.contains("Z (") && !line.contains("X ("))
    };
    wait_until("the daemon has ended", || !lives());
}

/// A cluster of one, with an administrator.
pub struct Founder {
    daemon: Child,
    folder: TempDir,
    /// Its address without the last number's place among the hosts of the cluster.
    network: (u8, u16),
    agent: Agent,
}

impl Founder {
    pub fn start() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(128);
        let network = (NEXT.fetch_add(1, Ordering::Relaxed), std::process::id() as u16);
        let folder = tempfile::Builder::new().prefix("twj").tempdir().unwrap();
        let (address, data) = (address(network, 1), folder.path().join("1/data"));
        fs::create_dir(folder.path().join("1")).unwrap();
        let config = folder.path().join("1/twistlock.cfg");
        let text = format!(
            "BIND_ADDRESS={address}\nDATA_FOLDER={}\nDATA_RECOVERY_ENABLED=false\nHIGH_AVAILABILITY_ENABLED=true\n\
             HIGH_AVAILABILITY_STATE=PRIMARY\nHIGH_AVAILABILITY_NAME=host1\n",
            data.display()
        );
        fs::write(&config, text).unwrap();
        let daemon = Command::new(env!("CARGO_BIN_EXE_twistlockd"))
            .args(["run", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stderr(fs::File::create(folder.path().join("1/log")).unwrap())
            .spawn()
            .unwrap();
        let ca = data.join("certificates").join(pki::CA_CERTIFICATE);
        wait_until("the founder has a CA", || ca.exists() && data.join("identity.json").exists());
        let founder = Self { daemon, network, agent: agent(&fs::read_to_string(&ca).unwrap()), folder };
        let url = founder.url("/_ping");
        wait_until("the founder serves", || founder.agent.get(&url).call().is_ok());
        founder.post_as("", "/signup", json!({"username": "admin", "password": PASSWORD}), 200);
        founder
    }

    fn url(&self, path: &str) -> String {
        format!("https://{}:8083/api/v1{path}", address(self.network, 1))
    }

    /// The authority's certificate.
    pub fn ca(&self) -> String {
        fs::read_to_string(self.folder.path().join("1/data/certificates").join(pki::CA_CERTIFICATE)).unwrap()
    }

    /// A host that has nothing yet.
    pub fn host(&self, number: u8) -> Host {
        let prefix = self.folder.path().join(number.to_string());
        fs::create_dir_all(&prefix).unwrap();
        let (name, agent) = (format!("host{number}"), self.agent.clone());
        Host { name, address: address(self.network, number), prefix, agent, daemon: None }
    }

    /// The line to run on other hosts.
    pub fn line(&self) -> String {
        let (status, text) = self.get_as(&basic(), "/high-availability/join-script");
        assert_eq!(status, 200, "{text}");
        let answer: Value = serde_json::from_str(&text).unwrap();
        answer["line"].as_str().unwrap().to_owned()
    }

    /// The status, as this node's Console or the control socket gives it.
    pub fn status(&self) -> Value {
        let socket = self.folder.path().join("1/data").join(control::SOCKET_NAME);
        let status = control::status(&socket, Duration::from_secs(5)).unwrap();
        serde_json::to_value(&status).unwrap()
    }

    pub fn post(&self, path: &str, body: Value, expected: u16) -> Value {
        self.post_as(&basic(), path, body, expected)
    }

    /// A request with this join token, with this whole header, or with none.
    pub fn post_as(&self, auth: &str, path: &str, body: Value, expected: u16) -> Value {
        let (status, text) = self.call("POST", auth, path, Some(&body));
        assert_eq!(status, expected, "POST {path}: {text}");
        serde_json::from_str(&text).unwrap_or_default()
    }

    pub fn delete(&self, path: &str, expected: u16) {
        let (status, text) = self.call("DELETE", &basic(), path, None);
        assert_eq!(status, expected, "DELETE {path}: {text}");
    }

    pub fn get_as(&self, auth: &str, path: &str) -> (u16, String) {
        self.call("GET", auth, path, None)
    }

    /// Asks to join with this token, and says only which status came back.
    pub fn knock(&self, token: &str, request: &Value) -> u16 {
        self.call("POST", token, "/high-availability/requests", Some(request)).0
    }

    fn call(&self, method: &str, auth: &str, path: &str, body: Option<&Value>) -> (u16, String) {
        call(&self.agent, method, auth, &self.url(path), body)
    }

    /// Has whoever is primary hand the role over to this host.
    pub fn switch_over_to(&self, host: &Host) {
        let addresses = [1, 2, 3].map(|number| address(self.network, number));
        let wish = json!({"to": host.name});
        // A primary that has just begun may not have heard yet that the other one is SECONDARY: it says so, and is asked again.
        wait_until("somebody takes the switchover", || {
            addresses.iter().any(|address| {
                let url = format!("https://{address}:8083/api/v1/high-availability/switchover");
                let answer = self.agent.post(&url).header("authorization", basic()).send_json(&wish);
                answer.is_ok_and(|answer| answer.status() == 202)
            })
        });
        wait_until("the switchover", || host.role() == Some(Role::Primary));
    }

    /// Resident memory of the daemon.
    pub fn memory_kib(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.daemon.id())).unwrap();
        let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Founder {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.daemon.id() as i32), Signal::SIGTERM);
        let _ = self.daemon.wait();
        if thread::panicking() {
            print_log("host1", &self.folder.path().join("1/log"));
        }
    }
}

/// A host that joins.
pub struct Host {
    pub name: String,
    address: Ipv4Addr,
    prefix: PathBuf,
    agent: Agent,
    /// The daemon, if the test has started it and not the script.
    daemon: Option<Child>,
}

impl Host {
    pub fn data(&self) -> PathBuf {
        self.prefix.join("var/lib/twistlock")
    }

    /// Runs the line as an administrator would, but below the prefix. Returns what it said; it must succeed.
    pub fn run_line(&mut self, line: &str, options: &str) -> String {
        let output = self.run(line, options);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{}: {said}\n{}", self.name, String::from_utf8_lossy(&output.stderr));
        said
    }

    /// The same; it must fail.
    pub fn fails_to_run_line(&mut self, line: &str) -> String {
        let output = self.run(line, "");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    fn run(&mut self, line: &str, options: &str) -> Output {
        let line = line.strip_suffix("| sudo bash").expect("the line ends in a shell");
        let arguments = format!("--bind {} --name {} {options}", self.address, self.name);
        let command = format!("set -o pipefail; {line} | bash -s -- {arguments}");
        Command::new("bash").args(["-c", &command]).env("TWISTLOCK_PREFIX", &self.prefix).output().unwrap()
    }

    /// Ends the daemon as a power failure would.
    pub fn kill(&mut self) {
        stop(&self.data(), Signal::SIGKILL);
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.wait();
        }
    }

    /// As an administrator who edits the configuration.
    pub fn rename(&mut self, name: &str) {
        let path = self.prefix.join("etc/twistlock/twistlock.cfg");
        let text = fs::read_to_string(&path).unwrap();
        let key = "HIGH_AVAILABILITY_NAME=";
        let kept = text.lines().filter(|line| !line.starts_with(key));
        let lines: Vec<&str> = kept.collect();
        assert_ne!(lines.len(), text.lines().count(), "{text}");
        fs::write(&path, format!("{}\n{key}{name}\n", lines.join("\n"))).unwrap();
        self.name = name.to_owned();
    }

    /// Starts the installed daemon.
    pub fn start(&mut self) {
        let log = fs::File::options().append(true).open(self.log()).unwrap();
        let daemon = self.command().stderr(log).process_group(0).spawn().unwrap();
        self.daemon = Some(daemon);
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.prefix.join("usr/local/bin/twistlockd"));
        command.args(["run", "--config"]).arg(self.prefix.join("etc/twistlock/twistlock.cfg")).stdin(Stdio::null());
        command
    }

    fn log(&self) -> PathBuf {
        self.prefix.join("var/log/twistlock/twistlockd.log")
    }

    /// Runs a daemon with this join file until it shows why it cannot ask; returns that.
    pub fn cannot_ask_with(&mut self, file: &Value) -> String {
        fs::create_dir_all(self.data()).unwrap();
        fs::write(self.data().join("join.json"), file.to_string()).unwrap();
        let config = self.prefix.join("bad.cfg");
        let text = format!(
            "BIND_ADDRESS={}\nDATA_FOLDER={}\nHIGH_AVAILABILITY_ENABLED=true\nHIGH_AVAILABILITY_STATE=SECONDARY\n",
            self.address,
            self.data().display()
        );
        fs::write(&config, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_twistlockd"));
        command.args(["run", "--config"]).arg(&config).stdin(Stdio::null()).stderr(Stdio::null());
        self.daemon = Some(command.spawn().unwrap());
        wait_until("it shows a problem", || self.status().is_some_and(|status| !status.warnings.is_empty()));
        let reason = self.status().unwrap().reason;
        self.kill();
        reason
    }

    fn status(&self) -> Option<Status> {
        control::status(&self.data().join(control::SOCKET_NAME), Duration::from_secs(5)).ok()
    }

    /// What this host's own daemon says that it is.
    pub fn role(&self) -> Option<Role> {
        let status = self.status()?;
        // Not before the cluster has heard it.
        let asks = status.role == Role::RequestJoin && !status.reason.contains("waits for APPLY");
        (!asks).then_some(status.role)
    }

    /// The fingerprint that this host shows.
    pub fn fingerprint(&self) -> String {
        let reason = self.status().unwrap().reason;
        reason.rsplit(' ').next().unwrap().to_owned()
    }

    /// The names of the tags, from this host's Console.
    pub fn tags(&self) -> Vec<String> {
        let url = format!("https://{}:8083/api/v1/tags", self.address);
        wait_until("the Console answers", || self.agent.get(&url).call().is_ok());
        let (status, text) = call(&self.agent, "GET", &basic(), &url, None);
        assert_eq!(status, 200, "{text}");
        let tags: Vec<Value> = serde_json::from_str(&text).unwrap();
        tags.iter().map(|tag| tag["name"].as_str().unwrap().to_owned()).collect()
    }

    /// A request to join that is in order.
    pub fn request(&self) -> Value {
        let csr = || pki::request_with(&pki::new_key().unwrap(), &self.name, &[]).unwrap();
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64;
        json!({
            "name": self.name, "address": self.address.to_string(), "port": 8086, "version": env!("CARGO_PKG_VERSION"),
            "csr": csr(), "console_csr": csr(), "console_names": [self.address.to_string()], "time_ms": now,
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if thread::panicking() {
            print_log(&self.name, &self.log());
        }
        self.kill();
    }
}

fn print_log(name: &str, path: &Path) {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(15).collect();
    lines.iter().rev().for_each(|line| println!("{name}: {line}"));
}

fn address((cluster, process): (u8, u16), number: u8) -> Ipv4Addr {
    // Clusters of one process, and processes, apart from each other: all use the default ports.
    Ipv4Addr::new(127, cluster, (process >> 6) as u8, ((process & 63) as u8) << 2 | (number - 1))
}

fn basic() -> String {
    use base64::{Engine, prelude::BASE64_STANDARD};
    format!("Basic {}", BASE64_STANDARD.encode(format!("admin:{PASSWORD}")))
}

fn agent(ca: &str) -> Agent {
    let root = Certificate::from_pem(ca.as_bytes()).unwrap();
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&[root]))
        .unversioned_rustls_crypto_provider(std::sync::Arc::new(rustls::crypto::ring::default_provider()))
        .build();
    let config = Agent::config_builder()
        .tls_config(tls)
        .proxy(None)
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(30)))
        .build();
    config.into()
}

fn call(agent: &Agent, method: &str, auth: &str, url: &str, body: Option<&Value>) -> (u16, String) {
    let mut request = ureq::http::Request::builder().method(method).uri(url);
    match auth {
        "" => {}
        token if token.starts_with("TWJ1") => request = request.header("authorization", format!("Bearer {token}")),
        header => request = request.header("authorization", header),
    }
    let body = match body {
        Some(body) => {
            request = request.header("content-type", "application/json");
            SendBody::from_owned_reader(std::io::Cursor::new(body.to_string()))
        }
        None => SendBody::none(),
    };
    let mut response = agent.run(request.body(body).unwrap()).unwrap();
    (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
}
