//! What is said on the connection to the Console: sends what is in the queue, and notes what the Console has. Must
//! never send an event that is not synced, nor take another word than the Console's for what is stored.

use std::{collections::VecDeque, io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use futures_util::{SinkExt, StreamExt};
use serde_json::json;
use tokio::{
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout, timeout_at},
};
use tokio_tungstenite::tungstenite::Message;

use super::{
    dial::{Socket, dial, pause},
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

    async fn converse(&mut self, socket: &mut Socket) -> Result<Fatal> {
        let next = *self.shared.next.borrow();
        let hello =
            FromDefender::Hello { protocol: PROTOCOL, version: program_version().to_owned(), next, facts: facts() };
        say(socket, &hello, Instant::now() + SILENCE).await?;
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

    /// Sends what there is, and notes what is stored, until the connection ends.
    async fn go_on(&mut self, socket: &mut Socket) -> Result<Fatal> {
        let mut appended = self.shared.next.subscribe();
        let mut pings = interval(Duration::from_millis(PING_MS));
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut reading: Option<Reading> = None;
        loop {
            let next = *appended.borrow_and_update();
            if reading.is_none() && self.flying.len() < self.stride.0 && self.sent + 1 < next {
                let (queue, from, bytes) = (Arc::clone(&self.shared.queue), self.sent + 1, self.stride.1);
                reading = Some(tokio::task::spawn_blocking(move || locked(&queue).read(from, EVENTS, bytes)));
            }
            let dead = heard + SILENCE;
            tokio::select! {
                // What has come counts, also if nobody has looked for a while.
                biased;
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
                    say(socket, &FromDefender::Events { events }, dead).await?;
                }
                _ = appended.changed() => {}
                _ = pings.tick() => {
                    timeout_at(dead, socket.send(Message::Ping(Default::default()))).await.context("send a ping")??;
                }
                () = sleep_until(self.renew_at.unwrap_or(dead)), if self.renew_at.is_some() => {
                    self.renew_at = None;
                    let csr = pki::request_with(&self.shared.folder.key()?, &self.settings.name, &[])?;
                    say(socket, &FromDefender::Renew { csr }, dead).await?;
                }
                () = sleep_until(dead) => bail!("nothing has come for {} ms", SILENCE.as_millis()),
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

/// Until the moment when the connection counts as dead.
async fn say(socket: &mut Socket, message: &FromDefender, until: Instant) -> Result<()> {
    let text = serde_json::to_string(message)?;
    timeout_at(until, socket.send(Message::Text(text.into()))).await.context("the Console takes nothing")??;
    Ok(())
}
