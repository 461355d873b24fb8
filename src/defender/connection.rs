//! The way to the Console: dials every address until one answers, sends what is in the queue, and notes what the
//! Console has. Must never send an event that is not synced, nor take another word than the Console's for what is
//! stored.

use std::{collections::VecDeque, io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use futures_util::{SinkExt, StreamExt};
use rustls::ClientConfig;
use serde_json::json;
use tokio::{
    net::{TcpStream, lookup_host},
    task::JoinHandle,
    time::{Instant, interval, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{Message, protocol::WebSocketConfig},
};

use super::{
    facts::facts,
    folder::Settings,
    queue::Draft,
    watch::Shared,
    wire::{
        ANSWER, EVENTS, FromConsole, FromDefender, MESSAGE, Numbered, PATH, PING_MS, PROTOCOL, Policy, SILENCE_MS,
        WINDOW,
    },
};
use crate::{
    clock::unix_time_ms,
    cluster::program_version,
    mutex::locked,
    pki::{self, CONSOLE_NAME},
};

/// How long one address may take to accept a connection, and how long TLS and the upgrade may take then.
const CONNECT: Duration = Duration::from_secs(1);
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How long names may take to be resolved.
const RESOLVE: Duration = Duration::from_secs(5);
/// The pause after a failure is drawn from a span that grows from the first to the second of these.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
const SILENCE: Duration = Duration::from_millis(SILENCE_MS);
/// Addresses that are tried in one round.
const ADDRESSES: usize = 64;
/// Bytes of the events of a message: what is around each of them must fit, too.
const BATCH: usize = MESSAGE - 64 * 1024;
/// Bytes that are read from the socket at once.
const BUFFER: usize = 16 << 10;

type Socket = WebSocketStream<TlsStream<TcpStream>>;
type Reading = JoinHandle<io::Result<Vec<Numbered>>>;

/// Goes on for ever, except when something of this host fails.
///
/// # Errors
/// When the queue cannot be read or written.
pub(super) async fn run(shared: Shared, settings: Settings) -> Result<()> {
    let mut span = PAUSES.0;
    let mut tls = None;
    let mut last = None;
    loop {
        let mut session =
            Session { shared: &shared, settings: &settings, sent: 0, flying: VecDeque::new(), welcome: false };
        let ended = session.attempt(&mut tls, &mut last).await;
        if session.welcome {
            span = PAUSES.0;
        }
        match ended {
            Ok(Fatal(error)) => return Err(error),
            Err(error) => tracing::info!("no connection to the Console: {error:#}; trying again"),
        }
        tokio::time::sleep(span.mul_f64(rand::random())).await;
        span = (span * 2).min(PAUSES.1);
    }
}

/// Something of this host has failed: another process may do better.
struct Fatal(anyhow::Error);

/// Settings of TLS with what they were made of: as long as they are the same, a session may be resumed.
type Tls = ((String, String), Arc<ClientConfig>);

struct Session<'a> {
    shared: &'a Shared,
    settings: &'a Settings,
    /// The number of the last event that was sent or is stored.
    sent: u64,
    /// The last number of each message that is not acknowledged.
    flying: VecDeque<u64>,
    /// The Console has answered the hello.
    welcome: bool,
}

impl Session<'_> {
    /// One connection, from its address to its end.
    async fn attempt(&mut self, tls: &mut Option<Tls>, last: &mut Option<SocketAddr>) -> Result<Fatal> {
        let credentials = self.shared.folder.credentials()?;
        if tls.as_ref().is_none_or(|(known, _)| *known != credentials) {
            let key = self.shared.folder.key()?;
            let config = pki::defender_client_tls(&credentials.1, &credentials.0, &key)?;
            *tls = Some((credentials, config));
        }
        let config = tls.as_ref().map(|(_, config)| Arc::clone(config)).context("there are settings of TLS")?;
        let (mut socket, at) = dial(&self.settings.consoles, *last, config).await?;
        *last = Some(at);
        self.converse(&mut socket).await.with_context(|| format!("connected to {at}"))
    }

    async fn converse(&mut self, socket: &mut Socket) -> Result<Fatal> {
        let next = *self.shared.next.borrow();
        let hello =
            FromDefender::Hello { protocol: PROTOCOL, version: program_version().to_owned(), next, facts: facts() };
        say(socket, &hello).await?;
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
        if renew {
            let csr = pki::request_with(&self.shared.folder.key()?, &self.settings.name, &[])?;
            say(socket, &FromDefender::Renew { csr }).await?;
        }
        self.go_on(socket).await
    }

    /// Sends what there is, and notes what is stored, until the connection ends.
    async fn go_on(&mut self, socket: &mut Socket) -> Result<Fatal> {
        let mut appended = self.shared.next.subscribe();
        let mut pings = interval(Duration::from_millis(PING_MS));
        let mut heard = Instant::now();
        let mut reading: Option<Reading> = None;
        loop {
            let next = *appended.borrow_and_update();
            if reading.is_none() && self.flying.len() < WINDOW && self.sent + 1 < next {
                let (queue, from) = (Arc::clone(&self.shared.queue), self.sent + 1);
                reading = Some(tokio::task::spawn_blocking(move || locked(&queue).read(from, EVENTS, BATCH)));
            }
            tokio::select! {
                message = socket.next() => {
                    heard = Instant::now();
                    match message.context("the Console has closed the connection")?? {
                        Message::Text(text) => self.obey(&text)?,
                        Message::Close(_) => bail!("the Console has closed the connection"),
                        _ => {}
                    }
                }
                Some(read) = async { Some(reading.as_mut()?.await) } => {
                    reading = None;
                    let events = match read.map_err(io::Error::other).flatten() {
                        Ok(events) => events,
                        Err(error) => return Ok(Fatal(anyhow!(error).context("read the queue"))),
                    };
                    let Some(event) = events.last() else { continue };
                    self.sent = event.sequence;
                    self.flying.push_back(self.sent);
                    say(socket, &FromDefender::Events { events }).await?;
                }
                _ = appended.changed() => {}
                _ = pings.tick() => {
                    if heard.elapsed() >= SILENCE {
                        bail!("nothing has come for {} ms", SILENCE.as_millis());
                    }
                    timeout(SILENCE, socket.send(Message::Ping(Default::default()))).await.context("send a ping")??;
                }
            }
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
                folder.keep_certificate(&certificate)
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
        self.shared.folder.keep_authorities(authorities)
    }
}

/// Connects to the first address that answers as a Console, beginning with the one that did so last.
async fn dial(consoles: &[String], last: Option<SocketAddr>, tls: Arc<ClientConfig>) -> Result<(Socket, SocketAddr)> {
    let mut addresses: Vec<SocketAddr> = last.into_iter().collect();
    let mut why = anyhow!("no address is known");
    for console in consoles {
        match timeout(RESOLVE, lookup_host(console)).await {
            Ok(Ok(found)) => addresses.extend(found),
            Ok(Err(error)) => why = anyhow!(error).context(format!("resolve {console}")),
            Err(_) => why = anyhow!("resolve {console}: it takes too long"),
        }
    }
    let mut tried = Vec::new();
    for address in addresses {
        if tried.contains(&address) || tried.len() >= ADDRESSES {
            continue;
        }
        tried.push(address);
        match connect(address, Arc::clone(&tls)).await {
            Ok(socket) => return Ok((socket, address)),
            Err(error) => why = error.context(address.to_string()),
        }
    }
    Err(why)
}

async fn connect(address: SocketAddr, tls: Arc<ClientConfig>) -> Result<Socket> {
    let stream = timeout(CONNECT, TcpStream::connect(address)).await.context("it does not accept connections")??;
    stream.set_nodelay(true)?;
    let greeting = async {
        let stream = TlsConnector::from(tls).connect(pki::console_name(), stream).await?;
        let config = WebSocketConfig::default()
            .read_buffer_size(BUFFER)
            .max_message_size(Some(ANSWER))
            .max_frame_size(Some(ANSWER));
        let at = format!("ws://{CONSOLE_NAME}{PATH}");
        let (socket, _) = client_async_with_config(at, stream, Some(config)).await?;
        Ok(socket)
    };
    timeout(HANDSHAKE, greeting).await.context("it says nothing")?
}

async fn hear(socket: &mut Socket) -> Result<FromConsole> {
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

async fn say(socket: &mut Socket, message: &FromDefender) -> Result<()> {
    let text = serde_json::to_string(message)?;
    timeout(SILENCE, socket.send(Message::Text(text.into()))).await.context("the Console takes nothing")??;
    Ok(())
}
