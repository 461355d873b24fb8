//! Clients that change and read boards, and clients that write tags which must stay for ever, each without pause at whichever
//! node answers. They note what they were told. Must never send one request twice.

use std::{
    collections::HashMap,
    env, fs, io,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng, rngs::SmallRng};
use serde_json::{Value as Json, json};
use twistlock_ha::dev::ClusterFile;
use ureq::Agent;

use crate::{
    board::{self, Answer, Board, Request},
    linear::Verdict,
    writers::{self, Pen},
};

/// Clients of the boards, and those that only add tags.
const BOARD_CLIENTS: usize = 6;
const LEDGER_CLIENTS: usize = 3;
/// From one request of a client to its next one.
const PACE: Duration = Duration::from_millis(40);
/// How long an answer may take.
const REQUEST_LIMIT: Duration = Duration::from_millis(1500);
/// A board is replaced at this age, full or not.
const BOARD_LIFE: Duration = Duration::from_secs(12);
/// After this time without the end of a client's request something hangs that must not.
const CLIENT_LIMIT: Duration = Duration::from_secs(20);

/// Where that is kept which explains what went wrong.
pub fn kept() -> PathBuf {
    env::temp_dir().join("chaos-kept")
}

/// What a request told its client.
enum Outcome {
    Answer(Answer),
    /// The connection was refused: nothing was sent.
    NotSent,
    /// 401: the session is not known; nothing was done.
    Stranger,
    /// Another 4xx: nothing was done, though there was no reason to refuse it.
    Refused(u16, String),
}

/// Sums for the report.
#[derive(Default)]
pub struct Counts {
    pub operations: AtomicU64,
    pub acknowledged: AtomicU64,
    pub unknown: AtomicU64,
    pub not_sent: AtomicU64,
    pub boards: AtomicU64,
    pub searched: AtomicU64,
    pub undecided: AtomicU64,
}

/// What all clients share; it outlives their pauses.
pub struct Shared {
    cluster: ClusterFile,
    origin: Instant,
    board: RwLock<Arc<Board>>,
    boards: AtomicU64,
    authorization: RwLock<String>,
    stop: AtomicBool,
    pub counts: Counts,
    /// Ends of acknowledged changes, in nanoseconds since the origin.
    ends: Mutex<Vec<u64>>,
    /// Each tag that must stay, and whether it was acknowledged; none: nobody knows.
    ledger: Mutex<HashMap<String, Option<bool>>>,
    violations: Mutex<Vec<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The running clients.
pub struct Load {
    threads: Vec<JoinHandle<()>>,
}

impl Shared {
    pub fn new(cluster: &ClusterFile) -> Arc<Self> {
        Arc::new(Self {
            cluster: cluster.clone(),
            origin: Instant::now(),
            board: RwLock::new(Arc::new(Board::new(0))),
            boards: AtomicU64::new(0),
            authorization: RwLock::new(Pen::new(cluster).authorization().to_owned()),
            stop: AtomicBool::new(false),
            counts: Counts::default(),
            ends: Mutex::default(),
            ledger: Mutex::default(),
            violations: Mutex::default(),
        })
    }

    fn now(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Adds to what must not be.
    pub fn accuse(&self, what: String) {
        println!("VIOLATION: {what}");
        lock(&self.violations).push(what);
    }

    pub fn violations(&self) -> Vec<String> {
        lock(&self.violations).clone()
    }

    /// The end of the first acknowledged change that ended after this.
    pub fn success_after(&self, from: Instant) -> bool {
        let from = (from - self.origin).as_nanos() as u64;
        lock(&self.ends).iter().rev().take_while(|end| **end > from).count() > 0
    }

    /// The longest time without the end of an acknowledged change in this span.
    pub fn longest_silence(&self, from: Instant, to: Instant) -> Duration {
        let (from, to) = ((from - self.origin).as_nanos() as u64, (to - self.origin).as_nanos() as u64);
        let mut ends: Vec<u64> = lock(&self.ends).iter().copied().filter(|end| (from..to).contains(end)).collect();
        ends.sort_unstable();
        let starts = std::iter::once(from).chain(ends.iter().copied());
        let longest = starts.zip(ends.iter().copied().chain([to])).map(|(start, end)| end - start).max();
        Duration::from_nanos(longest.unwrap_or(to - from))
    }

    /// Compares the tags that must stay with those that are there. Nobody may write.
    pub fn verify_ledger(&self) -> usize {
        let there = Pen::new(&self.cluster).tags();
        let ledger = lock(&self.ledger);
        let sort = |what: &dyn Fn(&str, Option<bool>) -> bool| {
            let found = ledger.iter().filter(|(tag, told)| what(tag.as_str(), **told));
            let mut found: Vec<String> = found.map(|(tag, _)| tag.clone()).collect();
            found.sort();
            found
        };
        let lost = sort(&|tag, told| told == Some(true) && !there.contains(tag));
        let undead = sort(&|tag, told| told == Some(false) && there.contains(tag));
        if !lost.is_empty() {
            self.accuse(format!(
                "{} acknowledged writes are lost, for example {:?}",
                lost.len(),
                &lost[..lost.len().min(9)]
            ));
        }
        if !undead.is_empty() {
            self.accuse(format!("writes that were refused are there: {:?}", &undead[..undead.len().min(9)]));
        }
        lost.len()
    }

    /// How many writes of tags that must stay were acknowledged.
    pub fn ledger_size(&self) -> usize {
        lock(&self.ledger).values().filter(|told| **told == Some(true)).count()
    }

    fn send(&self, client: &Agent, node: usize, request: (&str, &str, Option<&Json>)) -> Outcome {
        let (method, path, body) = request;
        let url = format!("{}/api/v1{path}", self.cluster.nodes[node].console_url);
        let authorization = self.authorization.read().expect("nobody panics with it").clone();
        let built = ureq::http::Request::builder().method(method).uri(url).header("authorization", authorization);
        let answer = match body {
            Some(body) => {
                let typed = built.header("content-type", "application/json");
                client.run(typed.body(body.to_string()).expect("a plain request"))
            }
            None => client.run(built.body(()).expect("a plain request")),
        };
        let mut answer = match answer {
            Ok(answer) => answer,
            Err(ureq::Error::Io(error)) if error.kind() == io::ErrorKind::ConnectionRefused => return Outcome::NotSent,
            Err(_) => return Outcome::Answer(Answer::Unknown),
        };
        // Read to the end so that the connection is used again.
        match (answer.status().as_u16(), answer.body_mut().read_to_string()) {
            (200..300, Ok(text)) => Outcome::Answer(Answer::Done(text)),
            // The status alone acknowledges a change; a list that broke off says nothing.
            (200..300, Err(_)) if method != "GET" => Outcome::Answer(Answer::Done(String::new())),
            (404 | 409, _) => Outcome::Answer(Answer::Not),
            (401, _) => Outcome::Stranger,
            (status @ 400..500, text) => Outcome::Refused(status, text.unwrap_or_default()),
            _ => Outcome::Answer(Answer::Unknown),
        }
    }

    /// Sends a request and counts what came back; none if it was not sent or not looked at.
    fn attempt(&self, client: &Agent, node: usize, request: (&str, &str, Option<&Json>)) -> (Option<Answer>, u64, u64) {
        let begin = self.now();
        let outcome = self.send(client, node, request);
        let end = self.now();
        let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        count(&self.counts.operations);
        let answer = match outcome {
            Outcome::Answer(answer) => {
                match answer {
                    Answer::Unknown => count(&self.counts.unknown),
                    _ => count(&self.counts.acknowledged),
                };
                if matches!(answer, Answer::Done(_)) && request.0 != "GET" {
                    lock(&self.ends).push(end);
                }
                Some(answer)
            }
            Outcome::NotSent => {
                count(&self.counts.not_sent);
                None
            }
            Outcome::Stranger => {
                self.log_in(client, node);
                None
            }
            Outcome::Refused(status, text) => {
                self.accuse(format!("{} {} was refused with {status}: {text}", request.0, request.1));
                None
            }
        };
        (answer, begin, end)
    }

    fn log_in(&self, client: &Agent, node: usize) {
        let body = json!({"username": self.cluster.user, "password": self.cluster.password});
        if let Outcome::Answer(Answer::Done(text)) = self.send(client, node, ("POST", "/authenticate", Some(&body)))
            && let Ok(answer) = serde_json::from_str::<Json>(&text)
            && let Some(token) = answer["token"].as_str()
        {
            *self.authorization.write().expect("nobody panics with it") = format!("Bearer {token}");
        }
    }

    fn use_boards(&self, index: usize, seed: u64) {
        let mut rng = SmallRng::seed_from_u64(seed.wrapping_add(index as u64));
        let client = writers::client(&self.cluster.ca, REQUEST_LIMIT);
        let (mut node, mut next, mut lost) = (index % 3, Instant::now(), false);
        while !self.stopped() {
            next = pace_to(next) + PACE;
            let board = self.board.read().expect("nobody panics with it").clone();
            // While nobody answers it only reads: hundreds of changes that may have happened make the search endless.
            let kind = if lost { board::READ } else { rng.random_range(0..100) };
            let request = board.request(kind, rng.random_range(0..1 << 16));
            let Request { method, path, body, .. } = &request;
            let (answer, begin, end) = self.attempt(&client, node, (method, path, body.as_ref()));
            if let Some(answer) = &answer {
                board.note(&request, answer, begin, end);
            }
            lost = matches!(answer, None | Some(Answer::Unknown));
            if lost {
                node = (node + 1) % 3;
            }
        }
    }

    fn add_tags(&self, index: usize, round: u64) {
        let client = writers::client(&self.cluster.ca, REQUEST_LIMIT);
        let (mut node, mut next, mut number) = (index % 3, Instant::now(), 0);
        while !self.stopped() {
            next = pace_to(next) + PACE;
            let tag = format!("w{index}-{round:02}-{number:06}");
            number += 1;
            let body = json!({"name": tag, "color": "#336699", "description": "stays"});
            let (answer, ..) = self.attempt(&client, node, ("POST", "/tags", Some(&body)));
            let told = match answer {
                Some(Answer::Done(_)) => Some(true),
                // It is there already, or there is no such page: neither can be.
                Some(Answer::Not) => {
                    self.accuse(format!("the new tag {tag} was refused"));
                    None
                }
                Some(Answer::Unknown) => None,
                None => Some(false),
            };
            lock(&self.ledger).insert(tag, told);
            if told != Some(true) {
                node = (node + 1) % 3;
            }
        }
    }

    /// Makes boards, one after the other, and checks each when its last client has left it.
    fn keep_boards(&self) {
        let client = writers::client(&self.cluster.ca, REQUEST_LIMIT);
        let mut made = Instant::now();
        let mut node = 0;
        loop {
            let old = self.board.read().expect("nobody panics with it").clone();
            if !self.stopped() && !old.full() && made.elapsed() < BOARD_LIFE {
                drop(old);
                pace_to(Instant::now() + PACE);
                continue;
            }
            let new = Arc::new(Board::new(self.boards.fetch_add(1, Ordering::Relaxed) as usize + 1));
            if !self.stopped() {
                for tag in new.foundation() {
                    while !self.stopped() {
                        let sent = self.send(&client, node, ("POST", "/tags", Some(&tag)));
                        if matches!(sent, Outcome::Answer(Answer::Done(_) | Answer::Not)) {
                            break;
                        }
                        node = (node + 1) % 3;
                        pace_to(Instant::now() + PACE);
                    }
                }
            }
            // After a stop nobody uses the new one before it was made: see `start`.
            *self.board.write().expect("nobody panics with it") = new;
            self.wait_left(&old);
            self.check(&old);
            made = Instant::now();
            if self.stopped() {
                return;
            }
        }
    }

    fn wait_left(&self, board: &Arc<Board>) {
        let deadline = Instant::now() + CLIENT_LIMIT;
        while Arc::strong_count(board) > 1 {
            assert!(Instant::now() < deadline, "a client has not returned from its request");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn check(&self, board: &Board) {
        let (operations, verdict, explanation) = board.check();
        self.counts.boards.fetch_add(1, Ordering::Relaxed);
        self.counts.searched.fetch_add(operations as u64, Ordering::Relaxed);
        if verdict != Verdict::Linearizable {
            let _ = fs::create_dir_all(kept())
                .and_then(|()| fs::write(kept().join(format!("board-{}", board.label())), board.history()));
        }
        if verdict == Verdict::Undecided {
            self.counts.undecided.fetch_add(1, Ordering::Relaxed);
            println!("  {}", explanation.unwrap_or_default());
        } else if let Some(explanation) = explanation {
            self.accuse(explanation);
        }
    }

    /// Makes the board that the clients begin with. The cluster must be healthy.
    fn first_board(&self) {
        let pen = Pen::new(&self.cluster);
        let board = Board::new(self.boards.fetch_add(1, Ordering::Relaxed) as usize + 1);
        let primary = self.wait_serving();
        for tag in board.foundation() {
            let (status, text) = pen.call(primary, "POST", "/tags", Some(tag));
            assert!(matches!(status, 200 | 409), "no board: {status} {text}");
        }
        *self.board.write().expect("nobody panics with it") = Arc::new(board);
    }

    /// The node whose Console answers.
    fn wait_serving(&self) -> usize {
        let client = writers::client(&self.cluster.ca, REQUEST_LIMIT);
        let deadline = Instant::now() + CLIENT_LIMIT;
        loop {
            for (index, node) in self.cluster.nodes.iter().enumerate() {
                if client.get(format!("{}/api/v1/_ping", node.console_url)).call().is_ok() {
                    return index;
                }
            }
            assert!(Instant::now() < deadline, "no Console answers");
            thread::sleep(PACE);
        }
    }
}

impl Load {
    /// Starts the clients; `round` makes their tags different from those before the last stop.
    pub fn start(shared: &Arc<Shared>, seed: u64, round: u64) -> Self {
        shared.stop.store(false, Ordering::Relaxed);
        shared.first_board();
        let mut threads = Vec::new();
        let mut spawn = |name: String, run: Box<dyn FnOnce(&Shared) + Send>| {
            let shared = Arc::clone(shared);
            let thread = thread::Builder::new().name(name).spawn(move || run(&shared));
            threads.push(thread.expect("a thread can be started"));
        };
        for index in 0..BOARD_CLIENTS {
            spawn(format!("client{index}"), Box::new(move |shared| shared.use_boards(index, seed)));
        }
        for index in 0..LEDGER_CLIENTS {
            spawn(format!("writer{index}"), Box::new(move |shared| shared.add_tags(index, round)));
        }
        spawn("boards".into(), Box::new(Shared::keep_boards));
        Self { threads }
    }

    /// Stops them and checks what they were told last.
    pub fn stop(self, shared: &Shared) {
        shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            if thread.join().is_err() {
                shared.accuse("a client ended with a panic: see above".into());
            }
        }
    }
}

/// Returns at that time, at once if it is over, with the present.
fn pace_to(time: Instant) -> Instant {
    thread::sleep(time.saturating_duration_since(Instant::now()));
    time.max(Instant::now())
}
