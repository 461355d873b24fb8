//! Many Defenders in one process. Each has a key, a certificate, an address and a TLS session of its own, and says what a real one
//! says; what it has to tell is a count in memory, and not a queue on disk. Must never count as stored what the Console has not
//! acknowledged.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use futures_util::{SinkExt, StreamExt};
use rustls::{ClientConfig, HandshakeKind};
use serde_json::{Value, json};
use tokio::{
    runtime::{Builder, Runtime},
    sync::Notify,
    time::{Instant as Moment, MissedTickBehavior, interval_at, sleep, sleep_until, timeout},
};
use tokio_tungstenite::tungstenite::Message;
use twistlock_ha::{
    clock::unix_time_ms,
    cluster::program_version,
    defender::{
        dial::{Socket, dial, pause},
        wire::{
            EVENTS, Facts, FromConsole, FromDefender, Numbered, PING_MS, PROTOCOL, REGISTER, Registered, Registration,
            SILENCE_MS, WINDOW,
        },
    },
    https::{self, Limits, Trust},
    mutex::locked,
    pki,
};
use ureq::Agent;

const SILENCE: Duration = Duration::from_millis(SILENCE_MS);
/// Rows of a page.
const PAGE: usize = 1000;
/// From one look at a condition to the next, and from one handing out of events to the next.
const LOOK: Duration = Duration::from_millis(5);
/// Requests at once.
const AT_ONCE: usize = 8;
/// How long a request may take.
const LIMITS: Limits = Limits { connect: Duration::from_secs(2), request: Duration::from_secs(30) };

/// A Console as its administrator reaches it.
#[derive(Clone)]
pub struct Desk {
    agent: Agent,
    url: String,
    authorization: String,
}

impl Desk {
    /// At this `url`, with the value of an Authorization header; it may be empty.
    pub fn new(ca: &Path, url: &str, authorization: &str) -> Result<Self> {
        let agent = https::client(&Trust::file(ca)?, LIMITS);
        Ok(Self { agent, url: url.to_owned(), authorization: authorization.to_owned() })
    }

    /// Sends a body, and returns what is answered.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let mut request = self.agent.post(format!("{}/api/v1{path}", self.url));
        if !self.authorization.is_empty() {
            request = request.header("authorization", &self.authorization);
        }
        let mut answer = request.send_json(body)?;
        let text = answer.body_mut().read_to_string()?;
        ensure!(answer.status().is_success(), "POST {path}: {} {text}", answer.status());
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }

    /// A page of the events of a Defender, the newest first, and where the next one begins.
    fn events(&self, id: &str, cursor: &str) -> Result<(Vec<Value>, Option<String>)> {
        let path = format!("/defenders/events?defender={id}&limit={PAGE}&cursor={cursor}");
        let request = self.agent.get(format!("{}/api/v1{path}", self.url));
        let mut answer = request.header("authorization", &self.authorization).call()?;
        let next = answer.headers().get("x-next-cursor").and_then(|next| next.to_str().ok()).map(str::to_owned);
        let text = answer.body_mut().with_config().limit(64 << 20).read_to_string()?;
        ensure!(answer.status().is_success(), "GET {path}: {} {text}", answer.status());
        Ok((serde_json::from_str(&text)?, next))
    }
}

/// One Defender.
struct Member {
    id: String,
    tls: Arc<ClientConfig>,
    from: IpAddr,
    /// Events that there are so far.
    made: AtomicU64,
    more: Notify,
}

/// What has become of all of them.
#[derive(Default)]
pub struct Tally {
    /// Those that the Console has welcomed.
    pub connected: AtomicUsize,
    /// Events that are stored.
    pub stored: AtomicU64,
    /// Handshakes of the last [`Crowd::count_arrivals`].
    pub resumed: AtomicUsize,
    pub full: AtomicUsize,
    arrivals: Mutex<Vec<Instant>>,
    /// From the moment when a message is made to that of its acknowledgement, if both are on one connection.
    waits: Mutex<Vec<Duration>>,
    trouble: Mutex<Option<String>>,
}

fn taken<T: Default>(values: &Mutex<T>) -> T {
    std::mem::take(&mut *locked(values))
}

fn noted<T>(values: &Mutex<Vec<T>>, value: T) {
    locked(values).push(value);
}

/// Many Defenders. They end when this is dropped.
pub struct Crowd {
    members: Vec<Arc<Member>>,
    consoles: Arc<[String]>,
    pub tally: Arc<Tally>,
    runtime: Runtime,
    /// How many events were handed out, and to whom the next one goes.
    given: u64,
}

impl Crowd {
    /// Registers so many hosts, some at a time. None is connected yet.
    pub fn register(desk: &Desk, token: &str, consoles: Vec<String>, count: usize) -> Result<Self> {
        let some = |first: usize| -> Result<Vec<(usize, Member)>> {
            let numbers = (first..count).step_by(AT_ONCE);
            numbers.map(|number| Ok((number, Member::register(desk, token, number)?))).collect()
        };
        let mut members = Vec::new();
        thread::scope(|scope| -> Result<()> {
            let all: Vec<_> = (0..AT_ONCE).map(|first| scope.spawn(move || some(first))).collect();
            for one in all {
                members.extend(one.join().map_err(|_| anyhow::anyhow!("a registration has panicked"))??);
            }
            Ok(())
        })?;
        members.sort_by_key(|(number, _)| *number);
        let members = members.into_iter().map(|(_, member)| Arc::new(member)).collect();
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        Ok(Self { members, consoles: consoles.into(), tally: Arc::default(), runtime, given: 0 })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Has all of them connect, within the `span`, and go on for ever.
    pub fn start(&self, span: Duration) {
        for (number, member) in (0u32..).zip(&self.members) {
            let (member, consoles, tally) = (Arc::clone(member), Arc::clone(&self.consoles), Arc::clone(&self.tally));
            let begin = span.mul_f64(f64::from(number) / self.len() as f64);
            self.runtime.spawn(async move {
                sleep(begin).await;
                live(&member, &consoles, &tally).await;
            });
        }
    }

    /// Gives each of them so many events more.
    pub fn give(&mut self, each: u64) {
        self.given += each * self.len() as u64;
        for member in &self.members {
            member.made.fetch_add(each, Relaxed);
            member.more.notify_one();
        }
    }

    /// Gives so many events a second to one after the other, for so long.
    pub fn pace(&mut self, rate: f64, span: Duration) {
        let (begin, before) = (Instant::now(), self.given);
        while begin.elapsed() < span {
            let due = before + (rate * begin.elapsed().as_secs_f64()) as u64;
            for number in self.given..due {
                let member = &self.members[(number % self.members.len() as u64) as usize];
                member.made.fetch_add(1, Relaxed);
                member.more.notify_one();
            }
            self.given = self.given.max(due);
            thread::sleep(LOOK);
        }
    }

    /// Events that there are so far.
    pub fn given(&self) -> u64 {
        self.given
    }

    /// From now on arrivals are counted: to be called before the PRIMARY is harmed.
    pub fn count_arrivals(&self) {
        drop((taken(&self.tally.arrivals), taken(&self.tally.waits)));
        self.tally.resumed.store(0, Relaxed);
        self.tally.full.store(0, Relaxed);
    }

    /// When they were welcomed since then, in order.
    pub fn arrivals(&self) -> Vec<Instant> {
        locked(&self.tally.arrivals).clone()
    }

    /// How long events have waited for their acknowledgement since this was asked for last.
    pub fn waits(&self) -> Vec<Duration> {
        taken(&self.tally.waits)
    }

    /// Waits until a condition is true.
    pub fn wait_for(&self, what: &str, limit: Duration, condition: impl Fn(&Tally) -> bool) -> Result<()> {
        let begin = Instant::now();
        while !condition(&self.tally) {
            if begin.elapsed() > limit {
                let (connected, stored) = (self.tally.connected.load(Relaxed), self.tally.stored.load(Relaxed));
                let trouble = taken(&self.tally.trouble).unwrap_or_default();
                bail!(
                    "{what}: not within {limit:?}: {connected} of {} are connected, {stored} of {} events are stored; \
                     one of them says: {trouble}",
                    self.len(),
                    self.given
                );
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Waits until every event is stored.
    pub fn wait_stored(&self, limit: Duration) -> Result<()> {
        let given = self.given;
        self.wait_for("every event is stored", limit, |tally| tally.stored.load(Relaxed) >= given)
    }

    /// Asks the Console for all events of each, and compares them with what was made. Returns how many there are.
    pub fn verify(&self, desk: &Desk) -> Result<u64> {
        let some = |first: usize| -> Result<u64> {
            self.members.iter().skip(first).step_by(AT_ONCE).map(|member| member.verify(desk)).sum()
        };
        let mut count = 0;
        thread::scope(|scope| -> Result<()> {
            let all: Vec<_> = (0..AT_ONCE).map(|first| scope.spawn(move || some(first))).collect();
            for one in all {
                count += one.join().map_err(|_| anyhow::anyhow!("a comparison has panicked"))??;
            }
            Ok(())
        })?;
        ensure!(count == self.given, "{count} events are there instead of {}", self.given);
        Ok(count)
    }
}

impl Member {
    fn register(desk: &Desk, token: &str, number: usize) -> Result<Self> {
        let name = format!("crowd-{number}");
        let key = pki::new_key()?;
        let csr = pki::request_with(&key, &name, &[])?;
        let body = Registration { token: token.to_owned(), name, csr };
        let mut answer = desk.agent.post(format!("{}{REGISTER}", desk.url)).send_json(&body)?;
        let text = answer.body_mut().read_to_string()?;
        ensure!(answer.status().is_success(), "register: {} {text}", answer.status());
        let Registered { id, certificate, authorities } = serde_json::from_str(&text)?;
        let tls = pki::defender_client_tls(&authorities, &certificate, &key)?;
        // As many networks as there are Defenders, and some hundred sites.
        let [.., second, third] = (number as u32 + 1).to_be_bytes();
        let from = IpAddr::from([127, 77, second, third]);
        Ok(Self { id, tls, from, made: AtomicU64::new(0), more: Notify::new() })
    }
}

impl Member {
    /// Compares all events that the Console shows with those that were made. Returns how many there are.
    fn verify(&self, desk: &Desk) -> Result<u64> {
        let made = self.made.load(Relaxed);
        let (mut next, mut cursor) = (made, Some("first".to_owned()));
        while let Some(at) = cursor {
            let (events, following) = desk.events(&self.id, &at)?;
            for event in events {
                let (sequence, own) = (event["sequence"].as_u64(), event["event"]["number"].as_u64());
                ensure!(
                    next > 0 && sequence == Some(next) && own == sequence,
                    "{}: event {next} is missing, or another one comes twice: {event}",
                    self.id
                );
                next -= 1;
            }
            cursor = following;
        }
        ensure!(next == 0, "{}: the events up to {next} are missing", self.id);
        Ok(made)
    }
}

/// Connects again and again.
async fn live(member: &Member, consoles: &[String], tally: &Tally) {
    let (mut lost, mut last, mut stored) = (Instant::now(), None::<SocketAddr>, 0);
    loop {
        let ended = match dial(consoles, last, Some(member.from), &member.tls).await {
            Ok((socket, at)) => {
                last = Some(at);
                let mut talk =
                    Talk { member, tally, socket, sent: 0, flying: VecDeque::new(), stride: 1, welcome: false };
                let ended = talk.go_on(&mut stored).await;
                if talk.welcome {
                    lost = Instant::now();
                    tally.connected.fetch_sub(1, Relaxed);
                }
                ended
            }
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            *locked(&tally.trouble) = Some(format!("{error:#}"));
        }
        sleep(pause(lost.elapsed(), rand::random())).await;
    }
}

/// What is said on one connection.
struct Talk<'a> {
    member: &'a Member,
    tally: &'a Tally,
    socket: Socket,
    sent: u64,
    /// The last number of each message that is not acknowledged, and when that was sent.
    flying: VecDeque<(u64, Instant)>,
    /// Messages that may wait for their acknowledgement.
    stride: usize,
    welcome: bool,
}

impl Talk<'_> {
    async fn go_on(&mut self, stored: &mut u64) -> Result<()> {
        let next = self.member.made.load(Relaxed) + 1;
        let (version, facts) =
            (program_version().to_owned(), Facts { hostname: "crowd".to_owned(), ..Facts::default() });
        self.say(&FromDefender::Hello { protocol: PROTOCOL, version, next, facts }).await?;
        let welcome = timeout(SILENCE, self.hear()).await.context("no welcome")??;
        let Some(FromConsole::Welcome { stored: known, .. }) = welcome else { bail!("no welcome, but {welcome:?}") };
        ensure!(known >= *stored, "the Console has forgotten what it had acknowledged: {known} of {stored}");
        self.note(stored, known);
        (self.sent, self.welcome) = (known, true);
        let resumed = self.socket.get_ref().get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed);
        let kind = if resumed { &self.tally.resumed } else { &self.tally.full };
        kind.fetch_add(1, Relaxed);
        self.tally.connected.fetch_add(1, Relaxed);
        noted(&self.tally.arrivals, Instant::now());
        let begin = Moment::now() + Duration::from_millis(PING_MS).mul_f64(rand::random());
        let mut pings = interval_at(begin, Duration::from_millis(PING_MS));
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut heard, member) = (Moment::now(), self.member);
        loop {
            self.send().await?;
            tokio::select! {
                biased;
                message = self.hear() => {
                    heard = Moment::now();
                    match message? {
                        Some(FromConsole::Ack { stored: known }) => self.note(stored, known),
                        Some(FromConsole::Refused { reason }) => bail!("the Console refuses: {reason}"),
                        _ => {}
                    }
                }
                () = member.more.notified() => {}
                _ = pings.tick() => self.socket.send(Message::Ping(Default::default())).await?,
                () = sleep_until(heard + SILENCE) => bail!("nothing has come for too long"),
            }
        }
    }

    /// Sends what there is.
    async fn send(&mut self) -> Result<()> {
        let made = self.member.made.load(Relaxed);
        while self.sent < made && self.flying.len() < self.stride {
            let numbers = self.sent + 1..=made.min(self.sent + EVENTS as u64);
            let event = |sequence| Numbered {
                sequence,
                time: unix_time_ms(),
                kind: "file".to_owned(),
                event: json!({
                    "path": format!("/srv/crowd/{sequence}"), "change": "changed", "number": sequence,
                    "after": { "size": sequence, "mode": "644", "uid": 0, "gid": 0, "sha256": format!("{sequence:064x}") },
                }),
            };
            self.sent = *numbers.end();
            self.flying.push_back((self.sent, Instant::now()));
            let events = numbers.map(event).collect();
            self.say(&FromDefender::Events { events }).await?;
        }
        Ok(())
    }

    /// All up to `known` are stored.
    fn note(&mut self, stored: &mut u64, known: u64) {
        while let Some((_, since)) = self.flying.pop_front_if(|(last, _)| *last <= known) {
            noted(&self.tally.waits, since.elapsed());
            self.stride = (self.stride + 1).min(WINDOW);
        }
        self.tally.stored.fetch_add(known.saturating_sub(*stored), Relaxed);
        *stored = known.max(*stored);
    }

    async fn say(&mut self, message: &FromDefender) -> Result<()> {
        let text = serde_json::to_string(message)?;
        timeout(SILENCE, self.socket.send(Message::Text(text.into()))).await.context("the Console takes nothing")??;
        Ok(())
    }

    /// The next message; none for one that is no text.
    async fn hear(&mut self) -> Result<Option<FromConsole>> {
        match self.socket.next().await.context("the Console has closed the connection")?? {
            Message::Text(text) => Ok(Some(serde_json::from_str(&text)?)),
            Message::Close(_) => bail!("the Console has closed the connection"),
            _ => Ok(None),
        }
    }
}
