//! One connection of a Defender, from its hello to its end. Must never acknowledge what a majority does not have, and
//! never serve anybody whose certificate is not that of a Defender of this cluster.

use std::{collections::VecDeque, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use axum::{
    Extension,
    extract::{
        ConnectInfo, State,
        ws::{Message, Utf8Bytes, WebSocket, WebSocketUpgrade},
    },
    response::Response,
};
use tokio::{
    sync::oneshot,
    time::{Instant, Sleep, sleep_until, timeout},
};

use super::{
    hub::Seat,
    intake::Stored,
    registration::certify,
    tables::{self, Defender},
    trust::newest,
};
use crate::{
    clients::{ClientCertificate, places::Visit},
    clock::unix_time,
    console::{Console, errors::ApiError, store::StoreError},
    defender::wire::{
        EVENT, EVENTS, Facts, FromConsole, FromDefender, MESSAGE, Numbered, PROTOCOL, SILENCE_MS, WINDOW,
    },
    pki::{self, CertificateInfo},
    telemetry::DEFENDER_EVENTS,
};

/// Longest time from the upgrade to the hello.
const GREETING: Duration = Duration::from_secs(10);
/// How long nothing may come from a Defender, which pings every second.
const SILENCE: Duration = Duration::from_millis(SILENCE_MS);
/// Bytes that are read at once: there may be many connections, and most messages are short.
const BUFFER: usize = 1 << 10;
/// Longest kind of an event, and version of a program, in bytes.
const WORD: usize = 64;
/// How often it is written that a Defender is there, at least.
const SEEN: Duration = Duration::from_secs(600);

/// `GET /defender` on the port of the Defenders.
pub(super) async fn upgrade(
    State(console): State<Arc<Console>>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    certificate: Option<Extension<ClientCertificate>>,
    visit: Option<Extension<Visit>>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, ApiError> {
    let refused = |why: &str| ApiError::Forbidden(format!("a Defender's certificate is needed here: {why}"));
    let Some(Extension(ClientCertificate(der))) = certificate else { return Err(refused("there is none")) };
    let (cluster, id) = pki::defender_identity(&der).map_err(|error| refused(&error.to_string()))?;
    if cluster != console.status.borrow().cluster {
        return Err(refused("this one is of another cluster"));
    }
    let shut_out = console.defenders.shut_out();
    let defender = tables::find(&console.store, &id).await?;
    let defender = defender.ok_or_else(|| refused("this one is not known any more: register the host again"))?;
    let info = CertificateInfo::read(&der).map_err(|error| refused(&error.to_string()))?;
    if info.not_after <= unix_time() {
        // Of a session that is resumed, TLS checks no certificate again.
        return Err(refused("this one has expired"));
    }
    if let Some(why) = defender.refusal() {
        return Ok(upgrade.on_upgrade(move |socket| turn_away(Line::new(socket), why)));
    }
    visit.inspect(|Extension(visit)| visit.vouch());
    let renew = is_due(&console, &der, &info);
    let upgrade = upgrade.read_buffer_size(BUFFER).max_message_size(MESSAGE).max_frame_size(MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let seat = console.defenders.connect(&id, from.to_string(), shut_out);
        let number = defender.number;
        let (console_of, line) = (Arc::clone(&console), Line::new(socket));
        let mut session = Session { console: console_of, defender, renew, seat, line };
        let why = session.run().await;
        tracing::debug!(id, %from, "the connection of a Defender ends: {why}");
        drop(session);
        // Not at the end of a term: the next PRIMARY would wait for it.
        if !*console.closing.borrow() {
            drop(console.defenders.intake.hand_over(&console.store, (number, Vec::new()), 0));
        }
    }))
}

/// Tells whoever may not connect why: a refusal of the upgrade would say it to nobody.
async fn turn_away(mut line: Line, why: &str) {
    // Behind the hello: whoever sends into a closed connection may lose what has come.
    if let Ok(Ok(_)) = timeout(GREETING, line.hear()).await
        && line.say(&FromConsole::Refused { reason: why.to_owned() }).await.is_ok()
    {
        line.close().await;
    }
}

/// True if a Defender should ask for another certificate: less than a third of its life is left, or another authority
/// signs from now on.
fn is_due(console: &Console, der: &[u8], info: &CertificateInfo) -> bool {
    let status = Arc::clone(&console.status.borrow());
    let shared = &status.membership.shared;
    let Some(authority) = newest(shared) else { return false };
    // TLS has proven that one of those that are trusted did: a signature is not checked again if there is no choice.
    let signed = || pki::certificate_der(authority).is_ok_and(|ca| pki::is_issued_by(der, &ca));
    pki::is_due(info.not_before, info.not_after, unix_time()) || (shared.trusted().count() > 1 && !signed())
}

/// The WebSocket, and when something has come by it last.
struct Line {
    socket: WebSocket,
    heard: Instant,
    /// Ends a while after something was heard, and is set again only then: a ping costs no timer.
    quiet: Pin<Box<Sleep>>,
}

impl Line {
    fn new(socket: WebSocket) -> Self {
        let heard = Instant::now();
        Self { socket, heard, quiet: Box::pin(sleep_until(heard + SILENCE)) }
    }

    /// The next message that is no ping; pings are answered below this.
    ///
    /// # Errors
    /// Why there is none any more.
    async fn hear(&mut self) -> Result<Utf8Bytes, String> {
        loop {
            tokio::select! {
                biased;
                received = self.socket.recv() => {
                    self.heard = Instant::now();
                    match received {
                        Some(Ok(Message::Text(text))) => return Ok(text),
                        Some(Ok(Message::Close(_))) | None => return Err("it was closed".to_owned()),
                        Some(Ok(_)) => {}
                        Some(Err(error)) => return Err(error.to_string()),
                    }
                }
                () = self.quiet.as_mut() => {
                    let until = self.heard + SILENCE;
                    if until <= Instant::now() {
                        return Err("nothing came for too long".to_owned());
                    }
                    self.quiet.as_mut().reset(until);
                }
            }
        }
    }

    /// A Defender that takes nothing for that long is as dead as one that says nothing.
    async fn say(&mut self, message: &FromConsole) -> Result<(), String> {
        let text = serde_json::to_string(message).map_err(|error| error.to_string())?;
        let sent = timeout(SILENCE, self.socket.send(Message::Text(text.into()))).await;
        sent.map_err(|_| "it takes nothing".to_owned())?.map_err(|error| error.to_string())
    }

    async fn close(&mut self) {
        // It may be gone already.
        let _ = timeout(SILENCE, self.socket.send(Message::Close(None))).await;
    }
}

/// A connection that was upgraded.
struct Session {
    console: Arc<Console>,
    defender: Defender,
    renew: bool,
    seat: Seat,
    line: Line,
}

/// Events that have come and wait for those before them, and the length of their text.
type Waiting = VecDeque<(Vec<Numbered>, usize)>;

impl Session {
    /// Returns why it ends.
    async fn run(&mut self) -> String {
        let (mut policies, mut trusts) = (self.console.defenders.policies(), self.console.defenders.trusts());
        // In boxes: what is done once or seldom takes no memory in between.
        if let Err(why) = Box::pin(self.greet()).await {
            return self.refuse(why).await;
        }
        let (mut closing, mut end) = (self.console.closing.subscribe(), self.seat.end.clone());
        // Those who come at the same moment, after a takeover, do not say so at the same moment.
        let seldom = || Instant::now() + SEEN.mul_f64(1.0 - rand::random::<f64>() / 2.0);
        let mut seen = seldom();
        let mut waiting = Waiting::new();
        let mut storing: Option<oneshot::Receiver<Stored>> = None;
        loop {
            if storing.is_none() && !waiting.is_empty() {
                let bytes = waiting.iter().map(|(_, bytes)| bytes).sum();
                let events: Vec<Numbered> = waiting.drain(..).flat_map(|(events, _)| events).collect();
                storing = Some(self.hand_over(events, bytes));
            }
            let answer = tokio::select! {
                Some(stored) = async { Some(storing.as_mut()?.await) } => {
                    storing = None;
                    match stored {
                        Ok(Ok(Some(stored))) => Some(FromConsole::Ack { stored }),
                        Ok(Ok(None)) => return self.refuse("this Defender is withdrawn".to_owned()).await,
                        Ok(Err(error)) => return format!("its events could not be stored: {error}"),
                        Err(_) => return "its events could not be stored: the Console ends".to_owned(),
                    }
                }
                heard = self.line.hear() => {
                    let text = match heard {
                        Ok(text) => text,
                        Err(why) => return why,
                    };
                    match self.obey(&text, &mut waiting).await {
                        Ok(answer) => answer,
                        Err(why) => return self.refuse(why).await,
                    }
                }
                Ok(()) = policies.changed() => {
                    let policy = policies.borrow_and_update().clone();
                    policy.map(|policy| FromConsole::Policy { policy: (*policy).clone() })
                }
                Ok(()) = trusts.changed() => trusts.borrow_and_update().as_ref().map(|trust| trust.told()),
                () = async { drop(closing.wait_for(|closing| *closing).await) } => {
                    // Whoever connects again finds the next PRIMARY.
                    self.line.close().await;
                    return "the port closes".to_owned();
                }
                why = async { end.wait_for(Option::is_some).await.ok().and_then(|why| *why) } => {
                    return self.refuse(why.unwrap_or_default().to_owned()).await;
                }
                () = sleep_until(seen) => {
                    seen = seldom();
                    drop(self.hand_over(Vec::new(), 0));
                    None
                }
            };
            if let Some(answer) = answer
                && let Err(why) = self.line.say(&answer).await
            {
                return why;
            }
        }
    }

    fn hand_over(&self, events: Vec<Numbered>, bytes: usize) -> oneshot::Receiver<Stored> {
        let Console { defenders, store, .. } = &*self.console;
        defenders.intake.hand_over(store, (self.defender.number, events), bytes)
    }

    /// The hello and its answer.
    async fn greet(&mut self) -> Result<(), String> {
        let hello = timeout(GREETING, self.line.hear()).await.map_err(|_| "no hello came in time".to_owned())??;
        let Ok(FromDefender::Hello { protocol, version, facts, .. }) = serde_json::from_str(&hello) else {
            return Err("the first message must be a hello".to_owned());
        };
        if protocol != PROTOCOL {
            return Err(format!(
                "this Console speaks protocol {PROTOCOL}, the Defender {protocol}: install the other version"
            ));
        }
        let (version, facts) = (shortened(version), bounded(facts));
        let known = &self.defender;
        let same = known.version == version
            && Facts { uptime_sec: 0, ..known.facts.clone() } == Facts { uptime_sec: 0, ..facts.clone() };
        if !same || crate::console::clock::unix_time() - known.seen > 2 * SEEN.as_secs() as i64 {
            let noted = tables::note(&self.console.store, known.number, &version, &facts).await;
            noted.map_err(|error| format!("the Console cannot write at the moment: {error}"))?;
        }
        let unread = |error: StoreError| format!("the Console cannot read at the moment: {error}");
        if self.seat.again {
            // What the connection before stores yet is left out when it comes again.
            let now = tables::find(&self.console.store, &self.defender.id).await.map_err(unread)?;
            let now = now.filter(|defender| !defender.withdrawn);
            self.defender = now.ok_or("this Defender is not known any more")?;
        }
        let (stored, stored_time) = (self.defender.stored, self.defender.stored_time);
        let policy = self.console.defenders.policy(&self.console.store).await.map_err(unread)?;
        let authorities = self.console.status.borrow().membership.shared.trust_bundle();
        let welcome =
            FromConsole::Welcome { protocol: PROTOCOL, stored, stored_time, policy, authorities, renew: self.renew };
        self.line.say(&welcome).await
    }

    /// What a message asks for at once. Events wait for their turn.
    async fn obey(&mut self, text: &str, waiting: &mut Waiting) -> Result<Option<FromConsole>, String> {
        let message = serde_json::from_str(text).map_err(|error| format!("a message is not understood: {error}"))?;
        match message {
            FromDefender::Events { events } => {
                check(&events)?;
                metrics::counter!(DEFENDER_EVENTS).increment(events.len() as u64);
                if waiting.len() >= WINDOW {
                    return Err(format!("more than {WINDOW} messages wait for their acknowledgement"));
                }
                waiting.push_back((events, text.len()));
                Ok(None)
            }
            FromDefender::Renew { csr } => {
                let certificate = Box::pin(certify(&self.console, &csr, &self.defender)).await;
                let certificate = certificate.map_err(|error| format!("no certificate can be made: {error}"))?;
                self.renew = false;
                Ok(Some(FromConsole::Certificate { certificate }))
            }
            FromDefender::Hello { .. } => Err("a second hello".to_owned()),
            FromDefender::Unknown => Ok(None),
        }
    }

    /// Says why it ends. Returns that.
    async fn refuse(&mut self, reason: String) -> String {
        if self.line.say(&FromConsole::Refused { reason: reason.clone() }).await.is_ok() {
            self.line.close().await;
        }
        reason
    }
}

/// Refuses events that no Defender sends.
fn check(events: &[Numbered]) -> Result<(), String> {
    let ascending = events.windows(2).all(|pair| pair[0].sequence < pair[1].sequence);
    let numbers = events.iter().all(|event| (1..=i64::MAX as u64).contains(&event.sequence));
    if events.is_empty() || events.len() > EVENTS || !ascending || !numbers {
        return Err(format!("a message has 1 to {EVENTS} events, their numbers ascend and begin at 1"));
    }
    for event in events {
        let word = event.kind.len() <= WORD && event.kind.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if !word || event.event.to_string().len() > EVENT || event.time > i64::MAX as u64 {
            return Err(format!("event {} is too long, or its kind is no word", event.sequence));
        }
    }
    Ok(())
}

fn shortened(text: String) -> String {
    text.chars().filter(|c| !c.is_control()).take(WORD).collect()
}

fn bounded(facts: Facts) -> Facts {
    let Facts { hostname, kernel, system, architecture, uptime_sec } = facts;
    let [hostname, kernel, system, architecture] = [hostname, kernel, system, architecture].map(shortened);
    Facts { hostname, kernel, system, architecture, uptime_sec }
}

#[cfg(test)]
mod tests {
    use axum::{Router, routing::get};
    use futures_util::SinkExt;
    use serde_json::json;
    use tokio::{
        net::{TcpListener, TcpStream},
        sync::mpsc,
    };
    use tokio_tungstenite::{client_async, tungstenite};

    use super::*;

    #[tokio::test]
    async fn a_connection_on_which_nothing_comes_is_dead_after_three_seconds() {
        let (ended, mut end) = mpsc::channel(1);
        let serve = async move |upgrade: WebSocketUpgrade| {
            upgrade.on_upgrade(async move |socket| {
                let mut line = Line::new(socket);
                let why = line.hear().await.map(|text| text.to_string());
                ended.send((why, line.heard.elapsed())).await.unwrap();
            })
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, Router::new().route("/", get(serve))).await });
        let stream = TcpStream::connect(at).await.unwrap();
        let (mut client, _) = client_async(format!("ws://{at}/"), stream).await.unwrap();
        // It counts from what has come last, and a ping is something.
        tokio::time::sleep(SILENCE / 2).await;
        client.send(tungstenite::Message::Ping(Default::default())).await.unwrap();
        let (why, silence) = end.recv().await.unwrap();
        assert_eq!(why, Err("nothing came for too long".to_owned()));
        assert!(silence >= SILENCE && silence < SILENCE * 2, "{silence:?}");
    }

    #[test]
    fn events_that_no_defender_sends_are_refused() {
        let event = |sequence, kind: &str, length| Numbered {
            sequence,
            time: 1,
            kind: kind.to_owned(),
            event: json!("x".repeat(length)),
        };
        assert_eq!(check(&[event(1, "file", 9), event(3, "file", 9)]), Ok(()));
        for bad in [
            vec![],
            vec![event(0, "file", 9)],
            vec![event(u64::MAX, "file", 9)],
            vec![event(2, "file", 9), event(2, "file", 9)],
            vec![event(3, "file", 9), event(2, "file", 9)],
            vec![event(1, "a b", 9)],
            vec![event(1, "file", EVENT)],
            (1..=EVENTS as u64 + 1).map(|number| event(number, "file", 1)).collect(),
        ] {
            assert!(check(&bad).is_err(), "{bad:?}");
        }
    }
}
