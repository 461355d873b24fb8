//! What is said on the connection to the Console: sends what is in the queue, and notes what the Console has. Must
//! never send an event that is not synced, nor take another word than the Console's for what is stored.

use std::{collections::VecDeque, io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use futures_util::{SinkExt, StreamExt};
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_tungstenite::{WebSocketStream, tungstenite::Message};

use super::{
    dial::{dial, pause},
    facts::facts,
    folder::Settings,
    queue::Draft,
    shown::Shown,
    watch::Shared,
    wire::{EVENTS, FromConsole, FromDefender, MESSAGE, Numbered, PING_MS, PROTOCOL, Policy, SILENCE_MS, WINDOW},
};
use crate::{clock::unix_time_ms, cluster::program_version, mutex::locked, pki};

const SILENCE: Duration = Duration::from_millis(SILENCE_MS);
/// Bytes of the events of a message: of the first one of a connection, and at most. What is around each of them must
/// fit, too.
const BATCH: (usize, usize) = (16 << 10, MESSAGE - 64 * 1024);

type Reading = JoinHandle<io::Result<Vec<Numbered>>>;

/// Goes on for ever, except when something of this host fails.
///
/// # Errors
/// When the queue cannot be read or written.
pub(super) async fn run(shared: Shared, settings: Settings) -> Result<()> {
    let mut lost = Instant::now();
    let mut shown = Shown::default();
    let mut last = None;
    loop {
        let mut session = Session {
            shared: &shared,
            settings: &settings,
            sent: 0,
            flying: VecDeque::new(),
            stride: (1, BATCH.0),
            welcome: false,
            renew_at: None,
            renewed: false,
        };
        let ended = session.attempt(&mut shown, &mut last).await;
        if session.renewed {
            shown.renewed();
        }
        if session.welcome {
            lost = Instant::now();
        }
        match ended {
            Ok(Fatal(error)) => return Err(error),
            Err(error) => {
                tracing::info!("no connection to the Console: {error:#}; trying again");
                shown.failed(&error);
            }
        }
        tokio::time::sleep(pause(lost.elapsed(), rand::random())).await;
    }
}

/// Something of this host has failed: another process may do better.
struct Fatal(anyhow::Error);

struct Session<'a> {
    shared: &'a Shared,
    settings: &'a Settings,
    /// The number of the last event that was sent or is stored.
    sent: u64,
    /// The last number of each message that is not acknowledged.
    flying: VecDeque<u64>,
    /// How many messages may wait for their acknowledgement, and how many bytes of events each may have. Both grow with
    /// every acknowledgement: after a takeover all Defenders have something to send, and the Console has memory for a
    /// little of each.
    stride: (usize, usize),
    /// The Console has answered the hello.
    welcome: bool,
    /// When to ask for another certificate.
    renew_at: Option<Instant>,
    /// Another certificate has come.
    renewed: bool,
}

impl Session<'_> {
    /// One connection, from its address to its end.
    async fn attempt(&mut self, shown: &mut Shown, last: &mut Option<SocketAddr>) -> Result<Fatal> {
        let config = shown.tls(&self.shared.folder)?;
        let (mut socket, at) = dial(&self.settings.consoles, *last, None, &config).await?;
        *last = Some(at);
        self.converse(&mut socket).await.with_context(|| format!("connected to {at}"))
    }

    async fn converse<S: AsyncRead + AsyncWrite + Unpin>(&mut self, socket: &mut WebSocketStream<S>) -> Result<Fatal> {
        let next = *self.shared.next.borrow();
        let hello =
            FromDefender::Hello { protocol: PROTOCOL, version: program_version().to_owned(), next, facts: facts() };
        timeout(SILENCE, socket.send(text(&hello)?)).await.context("the Console takes nothing")??;
        let welcome = timeout(SILENCE, hear(socket)).await.context("the Console says nothing")??;
        let FromConsole::Welcome { stored, stored_time, policy, authorities, renew, .. } = welcome else {
            bail!("the Console does not say welcome");
        };
        if let Err(error) = self.take_up(stored, stored_time).await {
            return Ok(Fatal(error));
        }
        self.welcome = true;
        tracing::info!(stored, "connected to the Console");
        self.adopt(policy)?;
        self.trust(&authorities)?;
        self.renew_at = renew.then(Instant::now);
        self.go_on(socket).await
    }

    /// Sends what there is, and notes what is stored, until the connection ends. What the Console does not read yet
    /// holds nothing up but what is behind it: the Console says that it is there meanwhile.
    async fn go_on<S: AsyncRead + AsyncWrite + Unpin>(&mut self, socket: &mut WebSocketStream<S>) -> Result<Fatal> {
        let (mut sink, mut stream) = socket.split();
        let mut appended = self.shared.next.subscribe();
        let mut pings = interval(Duration::from_millis(PING_MS));
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut reading: Option<Reading> = None;
        // The one message that was begun and is not on its way yet.
        let mut writing = false;
        loop {
            let next = *appended.borrow_and_update();
            if reading.is_none() && self.flying.len() < self.stride.0 && self.sent + 1 < next {
                let (queue, from, bytes) = (Arc::clone(&self.shared.queue), self.sent + 1, self.stride.1);
                reading = Some(tokio::task::spawn_blocking(move || locked(&queue).read(from, EVENTS, bytes)));
            }
            let dead = heard + SILENCE;
            let message = tokio::select! {
                // What has come counts, also if nobody has looked for a while.
                biased;
                message = stream.next() => {
                    heard = Instant::now();
                    match message.context("the Console has closed the connection")?? {
                        Message::Text(text) => self.obey(&text)?,
                        Message::Close(_) => bail!("the Console has closed the connection"),
                        _ => {}
                    }
                    continue;
                }
                () = sleep_until(dead) => bail!("nothing has come for {} ms", SILENCE.as_millis()),
                written = sink.flush(), if writing => {
                    written?;
                    writing = false;
                    continue;
                }
                Some(read) = async { Some(reading.as_mut()?.await) }, if !writing => {
                    reading = None;
                    let events = match read.map_err(io::Error::other).flatten() {
                        Ok(events) => events,
                        Err(error) => return Ok(Fatal(anyhow!(error).context("read the queue"))),
                    };
                    let Some(event) = events.last() else { continue };
                    self.sent = event.sequence;
                    self.flying.push_back(self.sent);
                    text(&FromDefender::Events { events })?
                }
                _ = appended.changed() => continue,
                _ = pings.tick(), if !writing => Message::Ping(Default::default()),
                () = sleep_until(self.renew_at.unwrap_or(dead)), if !writing && self.renew_at.is_some() => {
                    self.renew_at = None;
                    let csr = pki::request_with(&self.shared.folder.key()?, &self.settings.name, &[])?;
                    text(&FromDefender::Renew { csr })?
                }
            };
            // Nothing is on its way: it is taken at once, and written while others are heard.
            sink.feed(message).await?;
            writing = true;
        }
    }

    /// Goes on where the Console says, and tells if that is not where this host was.
    async fn take_up(&mut self, stored: u64, stored_time: u64) -> Result<()> {
        let shared = self.shared.clone();
        let taken = tokio::task::spawn_blocking(move || -> Result<()> {
            let mut queue = locked(&shared.queue);
            let ahead = stored >= queue.next();
            let own = if ahead { None } else { queue.time_of(stored).context("read the queue")? };
            let other = own.is_some_and(|time| time != stored_time && stored_time > 0);
            if ahead || other {
                // This folder is an older copy of itself: under these numbers, the Console has other events.
                let event = json!({ "stored": stored, "next": queue.next() });
                tracing::warn!(stored, next = queue.next(), "the queue was set back: it goes on behind what is stored");
                queue.skip_to(stored + 1).context("go on behind what is stored")?;
                let draft = Draft { time: unix_time_ms(), kind: "setBack", event };
                queue.append(&[draft]).context("write into the queue")?;
                shared.next.send_replace(queue.next());
            }
            Ok(())
        });
        taken.await.context("look into the queue")??;
        self.sent = stored;
        self.shared.stored.send_replace(stored);
        Ok(())
    }

    fn obey(&mut self, text: &str) -> Result<()> {
        match serde_json::from_str(text).context("a message of the Console is not understood")? {
            FromConsole::Ack { stored } => {
                let stored = stored.min(self.sent);
                while self.flying.front().is_some_and(|last| *last <= stored) {
                    self.flying.pop_front();
                    self.stride = ((self.stride.0 + 1).min(WINDOW), (self.stride.1 * 2).min(BATCH.1));
                }
                self.shared.stored.send_if_modified(|known| {
                    let more = stored > *known;
                    *known = stored.max(*known);
                    more
                });
                Ok(())
            }
            FromConsole::Policy { policy } => self.adopt(policy),
            FromConsole::Certificate { certificate } => {
                let folder = &self.shared.folder;
                // What does not fit the key would be of no use at the next connection.
                pki::defender_client_tls(&folder.credentials()?.1, &certificate, &folder.key()?)?;
                tracing::info!("another certificate has come");
                self.renewed = true;
                folder.keep_certificate(&certificate)
            }
            FromConsole::Trust { authorities, renew_within_ms } => {
                // Not all Defenders at the same moment.
                let within = renew_within_ms.map(|ms| Duration::from_millis(ms).mul_f64(rand::random()));
                self.renew_at = within.map(|within| Instant::now() + within).or(self.renew_at);
                self.trust(&authorities)
            }
            FromConsole::Refused { reason } => bail!("the Console refuses: {reason}"),
            FromConsole::Welcome { .. } | FromConsole::Unknown => Ok(()),
        }
    }

    /// A policy is in force when it is on disk.
    fn adopt(&self, policy: Policy) -> Result<()> {
        if policy == *self.shared.policy.borrow() {
            return Ok(());
        }
        policy.check().map_err(|why| anyhow!("the policy cannot be used: {why}"))?;
        self.shared.folder.keep_policy(&policy)?;
        self.shared.policy.send_replace(policy);
        Ok(())
    }

    fn trust(&self, authorities: &str) -> Result<()> {
        let (certificate, known) = self.shared.folder.credentials()?;
        if authorities == known || authorities.is_empty() {
            return Ok(());
        }
        pki::defender_client_tls(authorities, &certificate, &self.shared.folder.key()?)?;
        tracing::info!("other authorities are trusted from now on");
        self.shared.folder.keep_authorities(authorities)
    }
}

async fn hear<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut WebSocketStream<S>) -> Result<FromConsole> {
    loop {
        match socket.next().await.context("the Console has closed the connection")?? {
            Message::Text(text) => {
                let message = serde_json::from_str(&text).context("a message of the Console is not understood")?;
                match message {
                    FromConsole::Refused { reason } => bail!("the Console refuses: {reason}"),
                    message => return Ok(message),
                }
            }
            Message::Close(_) => bail!("the Console has closed the connection"),
            _ => {}
        }
    }
}

fn text(message: &FromDefender) -> Result<Message> {
    Ok(Message::Text(serde_json::to_string(message)?.into()))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::{
        net::{TcpSocket, TcpStream},
        sync::watch,
    };
    use tokio_tungstenite::{accept_async, client_async};

    use super::{
        super::{folder::Folder, queue::Queue},
        *,
    };

    /// Bytes of the buffers of the kernel: it doubles them.
    const KERNEL: u32 = 16 << 10;
    const EVENTS_MADE: u64 = 400;

    /// Both ends of a connection that holds little on its way.
    async fn ends() -> (TcpStream, TcpStream) {
        let [console, agent] = [(); 2].map(|()| TcpSocket::new_v4().unwrap());
        console.set_recv_buffer_size(KERNEL).unwrap();
        agent.set_send_buffer_size(KERNEL).unwrap();
        console.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = console.listen(1).unwrap();
        let agent = agent.connect(listener.local_addr().unwrap()).await.unwrap();
        (listener.accept().await.unwrap().0, agent)
    }

    /// A Console that has welcomed, and then does not read for `span`; it says that it is there, or not.
    async fn held_up(socket: &mut WebSocketStream<TcpStream>, span: Duration, beats: bool) {
        let welcome = FromConsole::Welcome {
            protocol: PROTOCOL,
            stored: 0,
            stored_time: 0,
            policy: Policy::default(),
            authorities: String::new(),
            renew: false,
        };
        socket.next().await.unwrap().unwrap();
        socket.send(Message::Text(serde_json::to_string(&welcome).unwrap().into())).await.unwrap();
        let mut pace = interval(Duration::from_millis(PING_MS));
        let end = Instant::now() + span;
        while Instant::now() < end {
            pace.tick().await;
            if beats && socket.send(Message::Pong(Default::default())).await.is_err() {
                return;
            }
        }
    }

    /// Reads and acknowledges until all events are there, each once.
    async fn read_all(socket: &mut WebSocketStream<TcpStream>) {
        let mut stored = 0;
        while stored < EVENTS_MADE {
            let Message::Text(text) = socket.next().await.unwrap().unwrap() else { continue };
            let FromDefender::Events { events } = serde_json::from_str(&text).unwrap() else { continue };
            for event in events {
                assert_eq!(event.sequence, stored + 1);
                stored += 1;
            }
            let ack = serde_json::to_string(&FromConsole::Ack { stored }).unwrap();
            socket.send(Message::Text(ack.into())).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_console_that_does_not_read_is_waited_for_as_long_as_it_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Arc::new(Folder::open(dir.path()).unwrap());
        folder.keep_certificate("").unwrap();
        folder.keep_authorities("").unwrap();
        let mut queue = Queue::open(&folder.queue(), 8 << 20).unwrap();
        let draft = || Draft { time: 1, kind: "file", event: json!({ "path": "x".repeat(4000) }) };
        (0..EVENTS_MADE / 50).for_each(|_| queue.append(&(0..50).map(|_| draft()).collect::<Vec<_>>()).unwrap());
        let shared = Shared {
            folder,
            next: watch::Sender::new(queue.next()),
            queue: Arc::new(Mutex::new(queue)),
            stored: watch::Sender::new(0),
            policy: watch::Sender::new(Policy::default()),
        };
        let settings =
            Settings { consoles: Vec::new(), name: "a".to_owned(), id: "a".to_owned(), queue_bytes: 8 << 20 };
        let mut both = Vec::new();
        for beats in [true, false] {
            let ((console, agent), settings) = (ends().await, settings.clone());
            let shared = Shared { stored: watch::Sender::new(0), ..shared.clone() };
            both.push(async move {
                // As it is after some acknowledgements: more than the kernel holds.
                let mut session = Session {
                    shared: &shared,
                    settings: &settings,
                    sent: 0,
                    flying: VecDeque::new(),
                    stride: (WINDOW, BATCH.1),
                    welcome: false,
                    renew_at: None,
                    renewed: false,
                };
                let console = async {
                    let mut socket = accept_async(console).await.unwrap();
                    held_up(&mut socket, SILENCE + SILENCE / 2, beats).await;
                    if beats {
                        read_all(&mut socket).await;
                    }
                    std::future::pending::<()>().await;
                };
                let agent = async {
                    let (mut socket, _) = client_async("ws://console/defender", agent).await.unwrap();
                    session.converse(&mut socket).await.map(|Fatal(error)| error)
                };
                let mut known = shared.stored.subscribe();
                tokio::select! {
                    ended = agent => Err(ended.unwrap_or_else(|error| error).to_string()),
                    () = console => Ok(()),
                    all = known.wait_for(|stored| *stored == EVENTS_MADE) => all.map(drop).map_err(|_| String::new()),
                }
            });
        }
        let (silent, patient) = (both.pop().unwrap(), both.pop().unwrap());
        let (patient, silent) = tokio::join!(patient, silent);
        assert_eq!(silent, Err("nothing has come for 3000 ms".to_owned()));
        assert_eq!(patient, Ok(()), "it waits, and all is acknowledged then");
    }
}
