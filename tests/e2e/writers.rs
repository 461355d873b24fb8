//! Clients that write without pause to whichever node answers, and the proof that nothing they were told was wrong.
//! Must never take an attempt whose outcome is unknown for one that failed.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    path::Path,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use twistlock_ha::dev::ClusterFile;
use ureq::{
    Agent,
    tls::{Certificate, RootCerts, TlsConfig},
};

/// A refusal takes no time on loopback; only a frozen host lets a connection wait.
const CONNECT_LIMIT: Duration = Duration::from_millis(100);
/// A client gives one address this long before it tries the next one.
const REQUEST_LIMIT: Duration = Duration::from_millis(300);
/// The same of a patient client, for a name with three addresses or a balancer that may hold it back for a while.
const PATIENT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(2));
/// Pause after all three addresses failed, so that the clients leave the processors to the election.
const ROUND_PAUSE: Duration = Duration::from_millis(5);
/// Largest page of `GET tags`.
const PAGE: usize = 1000;

/// What a client knows about one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// 2xx: it must be there for ever.
    Acknowledged,
    /// 4xx: it must never be there.
    Failed,
    /// The connection was refused, so that nothing was sent: it must never be there.
    Refused,
    /// Anything else: it may be there or not.
    Unknown,
}

/// An HTTPS client that trusts the cluster's authority.
pub fn client(ca: &Path, limit: Duration) -> Agent {
    client_with(ca, CONNECT_LIMIT, limit)
}

fn client_with(ca: &Path, connect: Duration, limit: Duration) -> Agent {
    let certificate = Certificate::from_pem(&std::fs::read(ca).unwrap()).unwrap();
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(vec![certificate])))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build();
    let config = Agent::config_builder()
        .tls_config(tls)
        .proxy(None)
        .http_status_as_error(false)
        .timeout_connect(Some(connect))
        .timeout_global(Some(limit))
        .build();
    config.into()
}

/// Logs in at whichever node answers and returns the value of an Authorization header.
fn wait_for_login(cluster: &ClusterFile) -> String {
    let client = client(&cluster.ca, Duration::from_secs(10));
    let deadline = Instant::now() + super::cluster::LIMIT;
    loop {
        for node in &cluster.nodes {
            let body = json!({"username": cluster.user, "password": cluster.password});
            let answer = client.post(format!("{}/api/v1/authenticate", node.console_url)).send_json(body);
            if let Ok(mut answer) = answer
                && let Ok(value) = answer.body_mut().read_json::<Value>()
                && let Some(token) = value["token"].as_str()
            {
                return format!("Bearer {token}");
            }
        }
        assert!(Instant::now() < deadline, "nobody lets the administrator log in");
        thread::sleep(Duration::from_millis(20));
    }
}

/// One client that writes one tag at a time to one node.
pub struct Pen {
    cluster: ClusterFile,
    authorization: String,
}

impl Pen {
    /// Logs in.
    pub fn new(cluster: &ClusterFile) -> Self {
        Self { cluster: cluster.clone(), authorization: wait_for_login(cluster) }
    }

    /// The value of an Authorization header.
    pub fn authorization(&self) -> &str {
        &self.authorization
    }

    /// Writes a tag to a node: true if it was acknowledged.
    pub fn write(&self, node: usize, tag: &str) -> bool {
        let client = client(&self.cluster.ca, Duration::from_secs(5));
        post(&client, &self.cluster.nodes[node].console_url, &self.authorization, tag, "") == Outcome::Acknowledged
    }

    /// Writes a tag to a node: the status and the text of its answer, if there is one.
    pub fn attempt(&self, node: usize, tag: &str) -> Option<(u16, String)> {
        let client = client(&self.cluster.ca, Duration::from_secs(5));
        let request = client.post(format!("{}/api/v1/tags", self.cluster.nodes[node].console_url));
        let body = json!({"name": tag, "color": "#336699", "description": ""});
        let mut answer = request.header("authorization", &self.authorization).send_json(body).ok()?;
        Some((answer.status().as_u16(), answer.body_mut().read_to_string().ok()?))
    }

    /// Sends any request to a node: the status and the text of its answer.
    pub fn call(&self, node: usize, method: &str, path: &str, body: Option<Value>) -> (u16, String) {
        let (status, bytes) = self.send(node, method, path, body);
        (status, String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The status and the content of a file.
    pub fn download(&self, node: usize, path: &str) -> (u16, Vec<u8>) {
        self.send(node, "GET", path, None)
    }

    fn send(&self, node: usize, method: &str, path: &str, body: Option<Value>) -> (u16, Vec<u8>) {
        let client = client(&self.cluster.ca, Duration::from_secs(30));
        let url = format!("{}/api/v1{path}", self.cluster.nodes[node].console_url);
        let request = ureq::http::Request::builder().method(method).uri(url);
        let request = request.header("authorization", &self.authorization);
        let answer = match body {
            Some(body) => {
                client.run(request.header("content-type", "application/json").body(body.to_string()).unwrap())
            }
            None => client.run(request.body(()).unwrap()),
        };
        let mut answer = answer.unwrap();
        let bytes = answer.body_mut().with_config().limit(1 << 30).read_to_vec().unwrap();
        (answer.status().as_u16(), bytes)
    }

    /// The names of all tags.
    pub fn tags(&self) -> BTreeSet<String> {
        all_tags(&self.cluster, &self.authorization).into_keys().collect()
    }

    /// True if the cluster has the tag.
    pub fn has(&self, tag: &str) -> bool {
        all_tags(&self.cluster, &self.authorization).contains_key(tag)
    }
}

/// A write that was acknowledged.
#[derive(Clone, Copy)]
struct Success {
    started: Instant,
    finished: Instant,
    node: usize,
}

struct Shared {
    cluster: ClusterFile,
    authorization: String,
    next: AtomicU64,
    /// Characters in the description of each tag.
    length: usize,
    /// How many clients there are, and how each goes about it.
    clients: usize,
    manner: Manner,
    stop: AtomicBool,
    outcomes: Mutex<HashMap<String, Outcome>>,
    successes: Mutex<Vec<Success>>,
    succeeded: Condvar,
}

/// How clients write.
#[derive(Clone, Copy)]
struct Manner {
    /// From the start of one write to the start of the next; none: at once.
    pace: Option<Duration>,
    /// How long a connection and a whole write may take.
    limits: (Duration, Duration),
    /// Every second client makes a new connection for each write.
    reconnect: bool,
}

impl Manner {
    const HURRIED: Self = Self { pace: None, limits: (CONNECT_LIMIT, REQUEST_LIMIT), reconnect: false };
}

/// Concurrent clients, running until they are told to stop.
pub struct Writers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Writers {
    /// Starts `count` clients.
    pub fn start(cluster: &ClusterFile, count: usize) -> Self {
        Self::start_long(cluster, count, 3)
    }

    /// Starts `count` clients whose tags have descriptions of `length` characters, which no compression makes shorter.
    pub fn start_long(cluster: &ClusterFile, count: usize, length: usize) -> Self {
        Self::start_like(cluster, count, length, Manner::HURRIED)
    }

    /// Starts `count` clients that make one write per `pace` each, and are patient: half of them keep their connection, the
    /// others make a new one for each write.
    pub fn start_paced(cluster: &ClusterFile, count: usize, pace: Duration) -> Self {
        Self::start_like(cluster, count, 3, Manner { pace: Some(pace), limits: PATIENT, reconnect: true })
    }

    fn start_like(cluster: &ClusterFile, count: usize, length: usize, manner: Manner) -> Self {
        let shared = Arc::new(Shared {
            cluster: cluster.clone(),
            authorization: wait_for_login(cluster),
            next: AtomicU64::new(0),
            length,
            clients: count,
            manner,
            stop: AtomicBool::new(false),
            outcomes: Mutex::new(HashMap::new()),
            successes: Mutex::new(Vec::new()),
            succeeded: Condvar::new(),
        });
        let run = |index| {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name(format!("writer{index}"))
                .spawn(move || shared.write_until_stopped(index))
                .unwrap()
        };
        let threads = (0..count).map(run).collect();
        let writers = Self { shared, threads };
        // A fault before the first write would show nothing.
        writers.wait_success(Instant::now(), |_| true).expect("a first write");
        writers
    }

    /// The time from `fault` to the end of the first acknowledged write that was started after it and answered by a node
    /// that `counts`. None if there is no such write within the limit.
    pub fn wait_success(&self, fault: Instant, counts: impl Fn(usize) -> bool) -> Option<Duration> {
        let deadline = Instant::now() + super::cluster::LIMIT;
        let mut successes = self.shared.successes.lock().unwrap();
        loop {
            let after = successes.iter().rev().take_while(|success| success.finished > fault);
            let first =
                after.filter(|success| success.started > fault && counts(success.node)).min_by_key(|s| s.finished);
            if let Some(first) = first {
                return Some(first.finished - fault);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            successes = self.shared.succeeded.wait_timeout(successes, left).unwrap().0;
        }
    }

    /// How many writes were acknowledged since then.
    pub fn successes_since(&self, from: Instant) -> usize {
        self.shared.successes.lock().unwrap().iter().filter(|success| success.finished > from).count()
    }

    /// The longest time without the end of an acknowledged write since `from`.
    pub fn longest_silence(&self, from: Instant) -> Duration {
        let successes = self.shared.successes.lock().unwrap();
        let mut ends: Vec<Instant> =
            successes.iter().map(|success| success.finished).filter(|end| *end > from).collect();
        ends.sort();
        let starts = std::iter::once(from).chain(ends.iter().copied());
        starts.zip(&ends).map(|(start, end)| *end - start).max().unwrap_or_default()
    }

    /// How many writes were not acknowledged so far.
    pub fn not_acknowledged(&self) -> usize {
        let outcomes = self.shared.outcomes.lock().unwrap();
        outcomes.values().filter(|outcome| **outcome != Outcome::Acknowledged).count()
    }

    /// The value of the Authorization header that they use.
    pub fn authorization(&self) -> &str {
        &self.shared.authorization
    }

    /// Stops the clients.
    pub fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }

    /// Stops the clients and compares what they were told with what the cluster has. Returns a line for the report.
    pub fn verify(mut self) -> String {
        self.stop();
        let outcomes = self.shared.outcomes.lock().unwrap();
        let there = all_tags(&self.shared.cluster, &self.shared.authorization);
        let mut counts = [0; 4];
        let (mut lost, mut undead) = (Vec::new(), Vec::new());
        for (tag, outcome) in outcomes.iter() {
            counts[*outcome as usize] += 1;
            match (outcome, there.contains_key(tag)) {
                (Outcome::Acknowledged, false) => lost.push(tag),
                (Outcome::Failed | Outcome::Refused, true) => undead.push(tag),
                _ => {}
            }
        }
        assert!(
            lost.is_empty(),
            "{} acknowledged writes are lost, for example {:?}",
            lost.len(),
            &lost[..lost.len().min(9)]
        );
        assert!(undead.is_empty(), "writes that were refused are there: {:?}", &undead[..undead.len().min(9)]);
        let [acknowledged, failed, refused, unknown] = counts;
        assert!(failed == 0, "{failed} writes got a 4xx, though all tags are unique and valid");
        format!(
            "{acknowledged} writes acknowledged, all there; {refused} connections refused; {unknown} outcomes unknown"
        )
    }
}

impl Shared {
    fn write_until_stopped(&self, index: usize) {
        let Manner { pace, limits: (connect, limit), reconnect } = self.manner;
        let mut client = client_with(&self.cluster.ca, connect, limit);
        // One after the other, not all at once.
        let ahead = pace.unwrap_or_default() * index as u32 / self.clients as u32;
        let (mut next, reconnect) = (Instant::now() + ahead, reconnect && index % 2 == 1);
        let nodes = self.cluster.nodes.len();
        let (mut node, mut failures) = (index % nodes, 0);
        while !self.stop.load(Ordering::Relaxed) {
            let tag = format!("tag-{:08}", self.next.fetch_add(1, Ordering::Relaxed));
            if let Some(pace) = pace {
                next = pace_to(next) + pace;
            }
            if reconnect {
                client = client_with(&self.cluster.ca, connect, limit);
            }
            let started = Instant::now();
            let url = &self.cluster.nodes[node].console_url;
            let outcome = post(&client, url, &self.authorization, &tag, &description(&tag, self.length));
            let finished = Instant::now();
            self.outcomes.lock().unwrap().insert(tag, outcome);
            if outcome == Outcome::Acknowledged {
                failures = 0;
                self.successes.lock().unwrap().push(Success { started, finished, node });
                self.succeeded.notify_all();
                continue;
            }
            (node, failures) = ((node + 1) % nodes, failures + 1);
            if failures % nodes == 0 {
                pace_round();
            }
        }
    }
}

/// Returns at that time; at once, with the present, if it is over.
fn pace_to(time: Instant) -> Instant {
    thread::sleep(time.saturating_duration_since(Instant::now()));
    time.max(Instant::now())
}

fn pace_round() {
    thread::sleep(ROUND_PAUSE);
}

/// Characters of three bytes each that follow no pattern, different for each tag.
fn description(tag: &str, length: usize) -> String {
    let mut state = tag
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |state: u64, byte| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from_u32(0x4e00 + (state % 0x5000) as u32).unwrap_or('x')
    };
    (0..length).map(|_| next()).collect()
}

/// Posts one tag.
fn post(client: &Agent, url: &str, authorization: &str, tag: &str, description: &str) -> Outcome {
    let body = json!({"name": tag, "color": "#336699", "description": description});
    let request = client.post(format!("{url}/api/v1/tags")).header("authorization", authorization);
    match request.send_json(body) {
        Ok(mut answer) => {
            // Read to the end so that the connection is used again.
            let text = answer.body_mut().read_to_string();
            match (answer.status().as_u16(), text) {
                (200..300, _) => Outcome::Acknowledged,
                (status @ 400..500, text) => {
                    println!("  {url}: {status} for {tag}: {text:?}");
                    Outcome::Failed
                }
                _ => Outcome::Unknown,
            }
        }
        Err(ureq::Error::Io(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Outcome::Refused,
        Err(_) => Outcome::Unknown,
    }
}

/// All tags that the primary has, by name.
fn all_tags(cluster: &ClusterFile, authorization: &str) -> HashMap<String, Value> {
    let client = client(&cluster.ca, Duration::from_secs(30));
    let mut tags = HashMap::new();
    loop {
        let page = wait_page(cluster, &client, authorization, tags.len());
        let full = page.len() == PAGE;
        for mut tag in page {
            // Its name is enough, and a long description would fill the memory.
            tag.as_object_mut().expect("a tag is an object").remove("description");
            let name = tag["name"].as_str().expect("a tag has a name").to_owned();
            assert!(tags.insert(name.clone(), tag).is_none(), "{name} is there twice");
        }
        if !full {
            return tags;
        }
    }
}

fn wait_page(cluster: &ClusterFile, client: &Agent, authorization: &str, offset: usize) -> Vec<Value> {
    let deadline = Instant::now() + super::cluster::LIMIT;
    loop {
        for node in &cluster.nodes {
            let url = format!("{}/api/v1/tags?limit={PAGE}&offset={offset}", node.console_url);
            if let Ok(mut answer) = client.get(url).header("authorization", authorization).call()
                && answer.status() == 200
                && let Ok(page) = answer.body_mut().with_config().limit(64 << 20).read_json()
            {
                return page;
            }
        }
        assert!(Instant::now() < deadline, "nobody lets the tags be read");
        thread::sleep(Duration::from_millis(20));
    }
}
