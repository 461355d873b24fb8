//! A node without consensus: what a test of the Console needs around the supervisor.

use std::{
    net::{IpAddr, Ipv4Addr, TcpStream},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU8, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{runtime::Runtime, sync::watch};
use twistlock_ha::{
    cluster::{ClusterId, Membership, Role},
    guard::PortGuard,
    node::{Lease, Status, lease::boottime},
    pki::{Pair, console_tls},
    storage::{
        EntrySource, ReplicateError, Replicator,
        database::{Database, PrimaryDatabase, initial_transaction},
        transaction::CONSOLE_DATABASE,
    },
    supervisor::{Supervisor, SupervisorConfig, SupervisorHandle},
    workload::{ConsolePorts, Setup},
};
use ureq::{
    Agent,
    tls::{Certificate, RootCerts, TlsConfig},
};

pub const HTTPS: u16 = 8083;
pub const HTTP: u16 = 8081;
pub const DEFENDER: u16 = 8084;
pub const PASSWORD: &str = "correct horse";
const LEASE: Duration = Duration::from_millis(400);
const LONG_LEASE: Duration = Duration::from_secs(3600);
const DEADLINE: Duration = Duration::from_secs(2);
const BOUND: Duration = Duration::from_secs(20);

/// Polls until the condition holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < BOUND, "waited too long until {what}");
        thread::park_timeout(Duration::from_millis(1));
    }
}

/// What the other nodes say to a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Majority {
    Agrees,
    /// Says nothing until another answer is set.
    Holds,
    Refuses,
    Unknown,
}

/// The raft log and the other nodes, in one.
pub struct Cluster {
    answer: Mutex<Majority>,
    changed: Condvar,
    waiting: AtomicU8,
    entries: Mutex<Vec<Vec<u8>>>,
}

impl Cluster {
    pub fn set(&self, answer: Majority) {
        *self.answer.lock().unwrap() = answer;
        self.changed.notify_all();
    }

    pub fn wait_for_a_commit(&self) {
        wait_until("a commit waits for the majority", || self.waiting.load(Ordering::SeqCst) > 0);
    }
}

impl Replicator for Cluster {
    fn replicate(&self, part: Vec<u8>, last: bool) -> Result<u64, ReplicateError> {
        let answer = self.answer.lock().unwrap();
        self.waiting.fetch_add(u8::from(last), Ordering::SeqCst);
        let answer = *self.changed.wait_while(answer, |answer| last && *answer == Majority::Holds).unwrap();
        self.waiting.fetch_sub(u8::from(last), Ordering::SeqCst);
        match answer {
            Majority::Refuses => Err(ReplicateError::Refused("the test refuses".into())),
            Majority::Unknown => Err(ReplicateError::Unknown("the test does not tell".into())),
            Majority::Agrees | Majority::Holds => {
                let mut entries = self.entries.lock().unwrap();
                entries.push(part);
                Ok(entries.len() as u64)
            }
        }
    }
}

impl EntrySource for Cluster {
    fn for_each(
        &self,
        first: u64,
        last: u64,
        each: &mut dyn FnMut(u64, &[u8]) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let entries = self.entries.lock().unwrap().clone();
        (first..=last).try_for_each(|index| each(index, &entries[index as usize - 1]))
    }
}

/// How a request ended.
#[derive(Debug)]
pub enum Answer {
    Status(u16),
    /// Without any response.
    None(#[allow(dead_code)] String),
}

/// An answer.
pub struct Reply {
    pub status: u16,
    pub headers: ureq::http::HeaderMap,
    pub text: String,
}

impl Reply {
    /// The value of a header; empty without one.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

pub struct Node {
    pub address: IpAddr,
    pub majority: Arc<Cluster>,
    pub handle: SupervisorHandle,
    pub guard: PortGuard,
    pub runtime: Runtime,
    agent: Agent,
    status: watch::Sender<Arc<Status>>,
    serving: watch::Sender<Option<Arc<PrimaryDatabase>>>,
    lease: Lease,
    /// Whether a thread extends the lease; held while either changes the lease, so that neither undoes the other's.
    extending: Arc<Mutex<bool>>,
    database: Mutex<Database>,
    _dir: TempDir,
}

/// An address for each node of each test process, so that all can have the default ports at the same time.
fn own_address() -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(64);
    let process = std::process::id();
    Ipv4Addr::new(127, NEXT.fetch_add(1, Ordering::SeqCst), (process >> 8) as u8, process as u8)
}

fn status(role: Role, epoch: u64) -> Status {
    Status {
        cluster: ClusterId(1),
        node: 1,
        name: "one".into(),
        version: "0".into(),
        role,
        reason: String::new(),
        epoch,
        primary: None,
        applied: 0,
        committed: 0,
        lease_ms: None,
        members: Vec::new(),
        membership: Membership::founded(ClusterId(1), Vec::new()),
        warnings: Vec::new(),
        certificates: Vec::new(),
        serving: false,
        waiting: None,
        recent: Default::default(),
    }
}

impl Node {
    /// A SECONDARY.
    pub fn start() -> Self {
        let address = own_address();
        let made = rcgen::generate_simple_self_signed(vec![address.to_string()]).unwrap();
        let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        let pair = Pair::parse(&certificate, &key).unwrap();
        let dir = TempDir::new().unwrap();
        let majority = Arc::new(Cluster {
            answer: Mutex::new(Majority::Agrees),
            changed: Condvar::new(),
            waiting: AtomicU8::new(0),
            entries: Mutex::new(initial_transaction(CONSOLE_DATABASE, 4096).unwrap()),
        });
        let database = Mutex::new(Database::open(dir.path(), CONSOLE_DATABASE, 0).unwrap());
        let lease = Lease::new().unwrap();
        let guard = PortGuard::spawn(env!("CARGO_BIN_EXE_twistlockd").into(), &lease, None).unwrap();
        let (publish, status) = watch::channel(Arc::new(status(Role::Secondary, 0)));
        let (serving, database_lent) = watch::channel(None);
        let config = SupervisorConfig {
            address: address.into(),
            workload: Setup {
                ports: ConsolePorts { https: Some(HTTPS), http: Some(HTTP), defender: Some(DEFENDER) },
                tls: watch::channel(console_tls(&pair, &pair).unwrap()).1,
                defender_tls: watch::channel(console_tls(&pair, &pair).unwrap()).1,
                defenders: 64,
                services: None,
                service: None,
            },
            demotion_deadline: DEADLINE,
        };
        let (supervisor, handle) = Supervisor::new(config, (status, database_lent), lease.clone(), guard.clone());
        let runtime = Runtime::new().unwrap();
        runtime.spawn(supervisor.run());
        let agent = agent(&certificate);
        std::fs::write(dir.path().join("console.pem"), &certificate).unwrap();
        let extending = Arc::new(Mutex::new(false));
        keep_extending(lease.clone(), Arc::clone(&extending));
        let (address, status, _dir) = (address.into(), publish, dir);
        Self { address, majority, handle, guard, runtime, agent, status, serving, lease, extending, database, _dir }
    }

    /// The file of the certificate that the ports serve.
    pub fn certificate(&self) -> std::path::PathBuf {
        self._dir.path().join("console.pem")
    }

    /// Becomes PRIMARY with a lease.
    pub fn promote(&self, epoch: u64) {
        let mut database = self.database.lock().unwrap();
        let entries = self.majority.entries.lock().unwrap().clone();
        for (index, entry) in (1..).zip(&entries).skip(database.applied() as usize) {
            database.apply(index, 1, entry, &*self.majority).unwrap();
        }
        let replicator: Arc<dyn Replicator> = Arc::clone(&self.majority) as _;
        let primary = database.promote(epoch, replicator).unwrap();
        self.serving.send_replace(Some(primary));
        let status = Status { serving: true, ..status(Role::Primary, epoch) };
        self.status.send_replace(Arc::new(status));
        self.extend_lease();
    }

    /// Becomes PRIMARY and waits until the ports are open.
    pub fn serve(&self, epoch: u64) {
        let begin = Instant::now();
        self.promote(epoch);
        self.wait_until_open();
        println!("open {:?} after the promotion", begin.elapsed());
    }

    pub fn wait_until_open(&self) {
        wait_until("the Console is open", || self.handle.state().borrow().open);
    }

    /// Becomes SECONDARY, as far as the supervisor is concerned.
    pub fn demote(&self) {
        self.set_lease(0, false);
        self.status.send_replace(Arc::new(status(Role::Secondary, 0)));
        self.serving.send_replace(None);
    }

    /// Demotes the database: proves that nobody holds it. The replay comes with the next promotion.
    pub fn take_database_back(&self) {
        self.database.lock().unwrap().demote(Instant::now() + DEADLINE).unwrap();
    }

    pub fn extend_lease(&self) {
        self.set_lease(boottime() + LEASE.as_nanos() as u64, true);
    }

    /// A lease that outlives the test, for what is not about leases: a busy machine may not run who extends it for longer
    /// than it lasts.
    pub fn hold_lease(&self) {
        self.set_lease(boottime() + LONG_LEASE.as_nanos() as u64, false);
    }

    fn set_lease(&self, deadline: u64, extend: bool) {
        let mut extending = self.extending.lock().unwrap();
        *extending = extend;
        self.lease.set(deadline).unwrap();
    }

    /// Extends no more; returns the deadline.
    pub fn let_lease_lapse(&self) -> u64 {
        *self.extending.lock().unwrap() = false;
        self.lease.deadline()
    }

    /// True if all ports refuse connections.
    pub fn refused(&self) -> bool {
        [HTTPS, HTTP, DEFENDER].into_iter().all(|port| {
            let result = TcpStream::connect((self.address, port));
            result.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
        })
    }

    pub fn basic(&self, name: &str, password: &str) -> String {
        format!("Basic {}", BASE64_STANDARD.encode(format!("{name}:{password}")))
    }

    pub fn signup(&self) {
        let login = json!({"username": "admin", "password": PASSWORD}).to_string();
        assert_eq!(self.call_raw(HTTPS, "POST", "/api/v1/signup", None, login).unwrap().0, 200);
    }

    /// Logs in; returns the value of the Authorization header.
    pub fn token(&self) -> String {
        let login = json!({"username": "admin", "password": PASSWORD});
        let answer = self.ok("POST", "/api/v1/authenticate", None, login);
        format!("Bearer {}", answer["token"].as_str().unwrap())
    }

    /// A request that must be answered with 200 and JSON.
    pub fn ok(&self, method: &str, path: &str, auth: Option<&str>, body: Value) -> Value {
        let (status, text) = self.call_port(HTTPS, method, path, auth, body).unwrap();
        assert_eq!(status, 200, "{method} {path}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// A request that must fail with this status and `{"err": ...}`; returns that text.
    pub fn fails(&self, expected: u16, method: &str, path: &str, auth: Option<&str>, body: Value) -> String {
        let (status, text) = self.call_port(HTTPS, method, path, auth, body).unwrap();
        assert_eq!(status, expected, "{method} {path}: {text}");
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text}"));
        value["err"].as_str().unwrap().to_owned()
    }

    /// A request without a body.
    pub fn text(&self, method: &str, path: &str, auth: Option<&str>) -> Result<(u16, String), ureq::Error> {
        self.call_port(HTTPS, method, path, auth, Value::Null)
    }

    pub fn call_port(
        &self,
        port: u16,
        method: &str,
        path: &str,
        auth: Option<&str>,
        body: Value,
    ) -> Result<(u16, String), ureq::Error> {
        // A string stands for itself, so that a test can send what is not JSON.
        let body = body.as_str().map_or_else(|| body.to_string(), str::to_owned);
        self.call_raw(port, method, path, auth, body)
    }

    fn call_raw(
        &self,
        port: u16,
        method: &str,
        path: &str,
        auth: Option<&str>,
        body: String,
    ) -> Result<(u16, String), ureq::Error> {
        call(&self.agent, &format!("https://{}:{port}{path}", self.address), method, auth, body)
    }

    /// The body of an answer that has no end of its own.
    pub fn read(&self, path: &str, auth: &str) -> impl std::io::Read + use<> {
        let url = format!("https://{}:{HTTPS}{path}", self.address);
        let response = self.agent.get(url).header("authorization", auth).call().unwrap();
        assert_eq!(response.status(), 200);
        response.into_body().into_reader()
    }

    /// A request with headers and a body as they are; the answer with its headers.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        let mut response = self.begin(method, path, headers, body);
        let text = response.body_mut().read_to_string().unwrap();
        Reply { status: response.status().as_u16(), headers: response.headers().clone(), text }
    }

    /// The same without reading the answer's body, which may have no end.
    pub fn begin(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> ureq::http::Response<ureq::Body> {
        let url = format!("https://{}:{HTTPS}{path}", self.address);
        let mut request = ureq::http::Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.agent.run(request.body(body.to_owned()).unwrap()).unwrap()
    }

    /// Creates a user by the Administrator; returns his Basic header.
    pub fn add_user(&self, name: &str, role: &str) -> String {
        let user = json!({"username": name, "password": PASSWORD, "role": role}).to_string();
        let (status, text) =
            self.call_raw(HTTPS, "POST", "/api/v1/users", Some(&self.basic("admin", PASSWORD)), user).unwrap();
        assert_eq!(status, 200, "{text}");
        self.basic(name, PASSWORD)
    }

    /// Posts a tag in another thread.
    pub fn post_in_background(&self, token: &str, name: &str) -> JoinHandle<Answer> {
        let (agent, token) = (self.agent.clone(), token.to_owned());
        let (url, body) = (format!("https://{}:{HTTPS}/api/v1/tags", self.address), json!({"name": name}).to_string());
        thread::spawn(move || match call(&agent, &url, "POST", Some(&token), body) {
            Ok((status, _)) => Answer::Status(status),
            Err(error) => Answer::None(error.to_string()),
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Lets everything end that a test left under way.
        self.majority.set(Majority::Unknown);
        self.demote();
    }
}

fn keep_extending(lease: Lease, extending: Arc<Mutex<bool>>) {
    // Ends with the node.
    thread::spawn(move || {
        while Arc::strong_count(&extending) > 1 {
            // A lease that has lapsed needs the majority again: nobody extends it by himself. The time is taken before
            // the look at the lease, as a real one counts from the time of the question.
            let now = boottime();
            let extends = extending.lock().unwrap();
            if *extends && now < lease.deadline() {
                lease.set(now + LEASE.as_nanos() as u64).unwrap();
            }
            drop(extends);
            thread::park_timeout(Duration::from_millis(25));
        }
    });
}

fn agent(certificate: &str) -> Agent {
    let root = Certificate::from_pem(certificate.as_bytes()).unwrap();
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&[root]))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build();
    Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        .timeout_global(Some(BOUND))
        .allow_non_standard_methods(true)
        .build()
        .into()
}

fn call(
    agent: &Agent,
    url: &str,
    method: &str,
    auth: Option<&str>,
    body: String,
) -> Result<(u16, String), ureq::Error> {
    let mut request = ureq::http::Request::builder().method(method).uri(url);
    if let Some(auth) = auth {
        request = request.header("authorization", auth);
    }
    let mut response = if body == "null" {
        agent.run(request.body(()).unwrap())?
    } else {
        agent.run(request.header("content-type", "application/json").body(body).unwrap())?
    };
    Ok((response.status().as_u16(), response.body_mut().read_to_string()?))
}
