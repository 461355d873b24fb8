//! Hosts as folders: each has its own loopback address and a prefix below which the join script installs. Must never leave a
//! daemon behind.

use std::{
    fs,
    io::Write,
    net::Ipv4Addr,
    os::unix::{fs::symlink, net::UnixStream, process::CommandExt},
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
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sqlx::{ConnectOptions, sqlite::SqliteConnectOptions};
use tempfile::TempDir;
use twistlock_ha::{
    cluster::Role,
    control::{self, Call},
    node::Status,
    pki,
};
use ureq::{
    Agent, SendBody,
    tls::{Certificate, RootCerts, TlsConfig},
};

pub const PASSWORD: &str = "Join-test-1234";
/// Far above what anything should take: a busy machine fails no test.
const BOUND: Duration = Duration::from_secs(90);
/// How long an answer of a daemon may take.
const ANSWER: Duration = Duration::from_secs(30);

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
    // The first of its threads is gone before its files are, and with them the lock of the data folder: the last one takes them.
    let lives = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let first =
            status.lines().any(|line| line.starts_with("State:") && !line.contains("Z (") && !line.contains("X ("));
        first || fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|threads| threads.count() > 1)
    };
    wait_until("the daemon has ended", || !lives());
}

/// A cluster of one, with an administrator.
pub struct Founder {
    /// The host itself; no join script is run on it.
    pub host: Host,
    folder: TempDir,
    /// Its address without the last number's place among the hosts of the cluster.
    network: (u8, u16),
    agent: Agent,
}

impl Founder {
    pub fn start() -> Self {
        let founder = Self::start_without_administrator();
        founder.post_as("", "/signup", json!({"username": "admin", "password": PASSWORD}), 200);
        founder
    }

    /// The same, as it is right after the installation.
    pub fn start_without_administrator() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(128);
        let network = (NEXT.fetch_add(1, Ordering::Relaxed), std::process::id() as u16);
        let folder = tempfile::Builder::new().prefix("twj").tempdir().unwrap();
        // Nobody trusts anything yet: this agent is replaced below.
        let mut host = Host::new(folder.path(), network, 1, Agent::new_with_defaults());
        let data = host.data();
        host.install(&format!(
            "BIND_ADDRESS={}\nDATA_FOLDER={}\nDATA_RECOVERY_ENABLED=false\nDATA_RECOVERY_VOLUME={}\n\
             HIGH_AVAILABILITY_ENABLED=true\n\
             HIGH_AVAILABILITY_STATE=PRIMARY\nHIGH_AVAILABILITY_NAME=host1\n",
            host.address,
            data.display(),
            folder.path().join("backups").display()
        ));
        host.start();
        let ca = data.join("certificates").join(pki::CA_CERTIFICATE);
        wait_until("the founder has a CA", || ca.exists() && data.join("identity.json").exists());
        let agent = agent(&fs::read_to_string(&ca).unwrap(), ANSWER);
        host.agent = agent.clone();
        let founder = Self { host, network, agent, folder };
        let url = founder.url("/_ping");
        wait_until("the founder serves", || founder.agent.get(&url).call().is_ok());
        founder
    }

    fn url(&self, path: &str) -> String {
        self.host.url(path)
    }

    /// The authority's certificate.
    pub fn ca(&self) -> String {
        fs::read_to_string(self.host.data().join("certificates").join(pki::CA_CERTIFICATE)).unwrap()
    }

    /// A client that trusts the cluster and waits this long.
    pub fn agent_for(&self, limit: Duration) -> Agent {
        agent(&self.ca(), limit)
    }

    /// A host that has nothing yet.
    pub fn host(&self, number: u8) -> Host {
        Host::new(self.folder.path(), self.network, number, self.agent.clone())
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
        serde_json::to_value(self.host.status().unwrap()).unwrap()
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
        let text = fs::read_to_string(format!("/proc/{}/status", pid_of(&self.host.data()).unwrap())).unwrap();
        let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

/// A host that joins.
pub struct Host {
    pub name: String,
    pub address: Ipv4Addr,
    prefix: PathBuf,
    agent: Agent,
    /// The daemon, if the test has started it and not the script.
    daemon: Option<Child>,
}

impl Host {
    fn new(folder: &Path, network: (u8, u16), number: u8, agent: Agent) -> Self {
        let (name, prefix) = (format!("host{number}"), folder.join(number.to_string()));
        fs::create_dir_all(&prefix).unwrap();
        Self { name, address: address(network, number), prefix, agent, daemon: None }
    }

    /// Puts the program and a configuration where the script would.
    fn install(&self, config: &str) {
        for file in [self.program(), self.config(), self.log()] {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
        }
        symlink(env!("CARGO_BIN_EXE_twistlockd"), self.program()).unwrap();
        fs::write(self.config(), config).unwrap();
        fs::write(self.log(), "").unwrap();
    }

    fn program(&self) -> PathBuf {
        self.prefix.join("usr/local/bin/twistlockd")
    }

    fn config(&self) -> PathBuf {
        self.prefix.join("etc/twistlock/twistlock.cfg")
    }

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

    /// The same with a line that is dead; it must say so and end as one that is refused.
    pub fn fails_to_run_line(&mut self, line: &str) -> String {
        let output = self.run(line, "");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(77), "{said}");
        said
    }

    /// The process that the line starts dies after each of these steps in turn; each time the line is run anew.
    pub fn dies_after(&mut self, steps: &[&str], line: &str) {
        for step in steps {
            let output = self.run(line, &format!("--stop-after {step}"));
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(3), "{step}: {said}");
            assert!(said.contains(&format!("stopped after the step {step}")), "{said}");
        }
    }

    fn run(&mut self, line: &str, options: &str) -> Output {
        let line = line.strip_suffix("| sudo bash").expect("the line ends in a shell");
        let arguments = format!("--bind {} --name {} {options}", self.address, self.name);
        let command = format!("set -o pipefail; {line} | bash -s -- {arguments}");
        Command::new("bash").args(["-c", &command]).env("TWISTLOCK_PREFIX", &self.prefix).output().unwrap()
    }

    /// Waits until the status page of this host says so.
    pub fn wait_status_page(&self, what: &str) {
        let url = format!("http://{}:8085/status", self.address);
        wait_until(&format!("the status page of {} says {what}", self.name), || {
            let answer = self.agent.get(&url).header("accept", "text/html").call();
            answer.is_ok_and(|mut answer| answer.body_mut().read_to_string().is_ok_and(|page| page.contains(what)))
        });
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

    /// Ends the daemon in order.
    pub fn end(&mut self) {
        stop(&self.data(), Signal::SIGTERM);
        self.kill();
    }

    /// A disk that had to be replaced.
    pub fn wipe(&mut self) {
        self.kill();
        fs::remove_dir_all(self.data()).unwrap();
    }

    /// What another host is when the folders of this one, which must be stopped, are copied there.
    pub fn copy_to(&self, other: &Host) {
        let config = fs::read_to_string(self.config()).unwrap();
        let path = |host: &Host| host.prefix.display().to_string();
        let config = config.replace(&path(self), &path(other));
        other.install(&config.replace(&self.address.to_string(), &other.address.to_string()));
        copy(&self.data(), &other.data());
    }

    /// The host has another address from now on; it must be stopped.
    pub fn move_to(&mut self, address: Ipv4Addr) {
        let config = fs::read_to_string(self.config()).unwrap();
        assert!(config.contains(&self.address.to_string()), "{config}");
        fs::write(self.config(), config.replace(&self.address.to_string(), &address.to_string())).unwrap();
        self.address = address;
    }

    /// Starts the installed daemon.
    pub fn start(&mut self) {
        let log = fs::File::options().append(true).open(self.log()).unwrap();
        let daemon = self.command().stderr(log).process_group(0).spawn().unwrap();
        self.daemon = Some(daemon);
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.program());
        command.args(["run", "--config"]).arg(self.config()).stdin(Stdio::null());
        command
    }

    /// What the daemon has logged.
    pub fn said(&self) -> String {
        fs::read_to_string(self.log()).unwrap()
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

    pub fn status(&self) -> Option<Status> {
        control::status(&self.socket(), ANSWER).ok()
    }

    fn socket(&self) -> PathBuf {
        self.data().join(control::SOCKET_NAME)
    }

    /// Has the daemon carry out an operation.
    pub fn operate<T: DeserializeOwned>(&self, operation: Call) -> Result<T, String> {
        control::ask(&self.socket(), &operation, ANSWER).map_err(|error| error.to_string())
    }

    /// Sends an operation and waits for no answer.
    pub fn send(&self, operation: Call) -> UnixStream {
        let mut stream = control::connect(&self.socket(), ANSWER).unwrap();
        let (method, target, body) = (&operation.method, operation.target(), operation.body.unwrap_or_default());
        let (kind, body) = ("content-type: application/json", body.to_string());
        let head = format!("{method} {target} HTTP/1.1\r\nhost: localhost\r\n{kind}\r\ncontent-length: {}", body.len());
        stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).unwrap();
        stream
    }

    /// The names of the tags in the database file of a SECONDARY to which nothing is written.
    pub fn file_tags(&self) -> Vec<String> {
        let copy = tempfile::NamedTempFile::new().unwrap();
        fs::copy(self.data().join("database/console.db"), copy.path()).unwrap();
        let options = SqliteConnectOptions::new().filename(copy.path()).read_only(true).immutable(true);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut connection = options.connect().await.unwrap();
            sqlx::query_scalar("SELECT name FROM tags ORDER BY name").fetch_all(&mut connection).await.unwrap()
        })
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
        let url = self.url("/tags");
        wait_until("the Console answers", || self.agent.get(&url).call().is_ok());
        let mut names = Vec::new();
        loop {
            let url = format!("{url}?limit=1000&offset={}", names.len());
            let (status, text) = call(&self.agent, "GET", &basic(), &url, None);
            assert_eq!(status, 200, "{text}");
            let tags: Vec<Value> = serde_json::from_str(&text).unwrap();
            if tags.is_empty() {
                return names;
            }
            names.extend(tags.iter().map(|tag| tag["name"].as_str().unwrap().to_owned()));
        }
    }

    pub fn url(&self, path: &str) -> String {
        format!("https://{}:8083/api/v1{path}", self.address)
    }

    /// The header of a session on this host's Console.
    pub fn log_in(&self) -> String {
        let body = json!({"username": "admin", "password": PASSWORD});
        let (status, text) = call(&self.agent, "POST", "", &self.url("/authenticate"), Some(&body));
        assert_eq!(status, 200, "{text}");
        let answer: Value = serde_json::from_str(&text).unwrap();
        format!("Bearer {}", answer["token"].as_str().unwrap())
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

/// Copies a folder, without what belongs to the running daemon.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (kind, to) = (entry.file_type().unwrap(), to.join(entry.file_name()));
        if kind.is_dir() {
            copy(&entry.path(), &to);
        } else if kind.is_file() && entry.file_name() != "lock" {
            fs::copy(entry.path(), to).unwrap();
        }
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

pub fn basic() -> String {
    use base64::{Engine, prelude::BASE64_STANDARD};
    format!("Basic {}", BASE64_STANDARD.encode(format!("admin:{PASSWORD}")))
}

fn agent(ca: &str, limit: Duration) -> Agent {
    let root = Certificate::from_pem(ca.as_bytes()).unwrap();
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&[root]))
        .unversioned_rustls_crypto_provider(std::sync::Arc::new(rustls::crypto::ring::default_provider()))
        .build();
    let config = Agent::config_builder()
        .tls_config(tls)
        .proxy(None)
        .http_status_as_error(false)
        .timeout_global(Some(limit))
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
