//! One connection of a Defender, from its hello to its end. Must never acknowledge what a majority does not have, and
//! never serve anybody whose certificate is not that of a Defender of this cluster.

use std::{collections::VecDeque, future::Future, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use axum::{
    Extension,
    extract::{
        ConnectInfo, State,
        ws::{Message, WebSocket, WebSocketUpgrade},
    },
    response::Response,
};
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    hub::Seat,
    policy_of,
    registration::certify,
    tables::{self, Defender},
};
use crate::{
    clients::{ClientCertificate, places::Visit},
    console::{
        Console,
        errors::ApiError,
        store::{Store, StoreError},
    },
    defender::wire::{
        EVENT, EVENTS, Facts, FromConsole, FromDefender, MESSAGE, Numbered, PROTOCOL, SILENCE_MS, WINDOW,
    },
    pki::{self, CertificateInfo},
    telemetry::{DEFENDER_EVENTS, DEFENDERS},
};

/// Longest time from the upgrade to the hello.
const GREETING: Duration = Duration::from_secs(10);
/// How long nothing may come from a Defender, which pings every second.
const SILENCE: Duration = Duration::from_millis(SILENCE_MS);
/// Bytes that are read at once: there may be many connections, and most messages are short.
const BUFFER: usize = 8 << 10;
/// Longest kind of an event, and version of a program, in bytes.
const WORD: usize = 64;
/// How often it is written that a Defender is there.
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
    let defender = tables::find(&console.store, &id).await?.filter(|defender| !defender.withdrawn);
    let defender = defender.ok_or_else(|| refused("this one is withdrawn"))?;
    visit.inspect(|Extension(visit)| visit.vouch());
    let signed_by_old = is_due(&console, &der);
    let upgrade = upgrade.read_buffer_size(BUFFER).max_message_size(MESSAGE).max_frame_size(MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let seat = console.defenders.connect(&id, from.to_string());
        metrics::gauge!(DEFENDERS).increment(1.0);
        let number = defender.number;
        let mut session = Session { console: Arc::clone(&console), defender, renew: signed_by_old, seat, socket };
        let why = session.run().await;
        tracing::debug!(id, %from, "the connection of a Defender ends: {why}");
        drop(session);
        metrics::gauge!(DEFENDERS).decrement(1.0);
        // Not at the end of a term: the next PRIMARY would wait for as many writes as there are Defenders.
        let closing = *console.closing.borrow();
        if !closing && let Err(error) = tables::seen(&console.store, number).await {
            tracing::debug!(id, "it could not be written when a Defender was there last: {error}");
        }
    }))
}

/// True if a Defender should ask for another certificate: less than a third of its life is left, or another authority
/// signs now.
fn is_due(console: &Console, der: &[u8]) -> bool {
    let status = console.status.borrow();
    let Some(authority) = &status.membership.shared.authority else { return false };
    let signed = pki::certificate_der(&authority.certificate).is_ok_and(|ca| pki::is_issued_by(der, &ca));
    let due = |info: CertificateInfo| pki::is_due(info.not_before, info.not_after, crate::clock::unix_time());
    !signed || CertificateInfo::read(der).is_ok_and(due)
}

/// A connection that was upgraded.
struct Session {
    console: Arc<Console>,
    defender: Defender,
    renew: bool,
    seat: Seat,
    socket: WebSocket,
}

type Storing = Pin<Box<dyn Future<Output = Result<Option<u64>, StoreError>> + Send>>;

impl Session {
    /// Returns why it ends.
    async fn run(&mut self) -> String {
        let mut policies = self.console.defenders.policies();
        if let Err(why) = self.greet().await {
            return self.refuse(why).await;
        }
        let (mut closing, mut end) = (self.console.closing.subscribe(), self.seat.end.clone());
        let (mut silent, mut seen) = (Instant::now() + SILENCE, Instant::now() + SEEN);
        let mut waiting: VecDeque<Vec<Numbered>> = VecDeque::new();
        let mut storing: Option<Storing> = None;
        loop {
            if storing.is_none() && !waiting.is_empty() {
                let events: Vec<Numbered> = waiting.drain(..).flatten().collect();
                storing = Some(store(self.console.store.clone(), self.defender.number, events));
            }
            let answer = tokio::select! {
                Some(stored) = async { Some(storing.as_mut()?.await) } => {
                    storing = None;
                    match stored {
                        Ok(Some(stored)) => Some(FromConsole::Ack { stored }),
                        Ok(None) => return self.refuse("this Defender is withdrawn".to_owned()).await,
                        Err(error) => return format!("its events could not be stored: {error}"),
                    }
                }
                received = self.socket.recv() => {
                    silent = Instant::now() + SILENCE;
                    let text = match received {
                        Some(Ok(Message::Text(text))) => text,
                        Some(Ok(Message::Close(_))) | None => return "it was closed".to_owned(),
                        // Pings are answered below this.
                        Some(Ok(_)) => continue,
                        Some(Err(error)) => return error.to_string(),
                    };
                    match self.hear(&text, &mut waiting).await {
                        Ok(answer) => answer,
                        Err(why) => return self.refuse(why).await,
                    }
                }
                Ok(()) = policies.changed() => {
                    let policy = policies.borrow_and_update().clone();
                    policy.map(|policy| FromConsole::Policy { policy: (*policy).clone() })
                }
                () = async { drop(closing.wait_for(|closing| *closing).await) } => {
                    // Whoever connects again finds the next PRIMARY.
                    let _ = self.socket.send(Message::Close(None)).await;
                    return "the port closes".to_owned();
                }
                why = async { end.wait_for(Option::is_some).await.ok().and_then(|why| *why) } => {
                    return self.refuse(why.unwrap_or_default().to_owned()).await;
                }
                () = sleep_until(silent) => return "nothing came for too long".to_owned(),
                () = sleep_until(seen) => {
                    seen = Instant::now() + SEEN;
                    if let Err(error) = tables::seen(&self.console.store, self.defender.number).await {
                        tracing::debug!("it could not be written that a Defender is there: {error}");
                    }
                    None
                }
            };
            if let Some(answer) = answer
                && let Err(why) = self.say(&answer).await
            {
                return why;
            }
        }
    }

    /// The hello and its answer.
    async fn greet(&mut self) -> Result<(), String> {
        let hello = timeout(GREETING, async {
            loop {
                match self.socket.recv().await {
                    Some(Ok(Message::Text(text))) => return Ok(text),
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    _ => return Err("no hello came".to_owned()),
                }
            }
        });
        let hello = hello.await.map_err(|_| "no hello came in time".to_owned())??;
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
        if !same || crate::console::clock::unix_time() - known.seen > SEEN.as_secs() as i64 {
            let noted = tables::note(&self.console.store, known.number, &version, &facts).await;
            noted.map_err(|error| format!("the Console cannot write at the moment: {error}"))?;
        }
        // Read after the connection before was told to end: what that one stores yet is left out when it comes again.
        let unread = |error: StoreError| format!("the Console cannot read at the moment: {error}");
        let Defender { stored, stored_time, .. } = tables::find(&self.console.store, &self.defender.id)
            .await
            .map_err(unread)?
            .ok_or("this Defender is not known any more")?;
        let policy = policy_of(&self.console.store).await.map_err(unread)?;
        let authorities = self.console.status.borrow().membership.shared.trust_bundle();
        let welcome =
            FromConsole::Welcome { protocol: PROTOCOL, stored, stored_time, policy, authorities, renew: self.renew };
        self.say(&welcome).await
    }

    /// What a message asks for at once. Events wait for their turn.
    async fn hear(&mut self, text: &str, waiting: &mut VecDeque<Vec<Numbered>>) -> Result<Option<FromConsole>, String> {
        let message = serde_json::from_str(text).map_err(|error| format!("a message is not understood: {error}"))?;
        match message {
            FromDefender::Events { events } => {
                check(&events)?;
                metrics::counter!(DEFENDER_EVENTS).increment(events.len() as u64);
                if waiting.len() >= WINDOW {
                    return Err(format!("more than {WINDOW} messages wait for their acknowledgement"));
                }
                waiting.push_back(events);
                Ok(None)
            }
            FromDefender::Renew { csr } => {
                let certificate = certify(&self.console, &csr, &self.defender).await;
                let certificate = certificate.map_err(|error| format!("no certificate can be made: {error}"))?;
                self.renew = false;
                Ok(Some(FromConsole::Certificate { certificate }))
            }
            FromDefender::Hello { .. } => Err("a second hello".to_owned()),
            FromDefender::Unknown => Ok(None),
        }
    }

    async fn say(&mut self, message: &FromConsole) -> Result<(), String> {
        let text = serde_json::to_string(message).map_err(|error| error.to_string())?;
        self.socket.send(Message::Text(text.into())).await.map_err(|error| error.to_string())
    }

    /// Says why it ends. Returns that.
    async fn refuse(&mut self, reason: String) -> String {
        // It may be gone already.
        let _ = self.say(&FromConsole::Refused { reason: reason.clone() }).await;
        let _ = self.socket.send(Message::Close(None)).await;
        reason
    }
}

fn store(store: Store, number: i64, events: Vec<Numbered>) -> Storing {
    Box::pin(async move { tables::store_events(&store, number, &events).await })
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
    use serde_json::json;

    use super::*;

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
