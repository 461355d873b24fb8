//! One connection of a Defender, from its hello to its end. Must never acknowledge what a majority does not have, and
//! never serve anybody whose certificate is not that of a Defender of this cluster.

use std::{collections::VecDeque, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use axum::{
    Extension,
    extract::{ConnectInfo, Request, State},
    response::Response,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::oneshot,
    time::{Instant, sleep_until, timeout},
};

use super::{
    budget::{OWN, Share},
    hub::Seat,
    intake::Stored,
    line::{self, Heard, Line},
    registration::certify,
    tables::{self, Defender, Told},
    trust::newest,
};
use crate::{
    clients::{ClientCertificate, places::Visit},
    clock::unix_time,
    console::{Console, errors::ApiError, store::StoreError},
    defender::wire::{EVENT, EVENTS, Facts, FromConsole, FromDefender, Numbered, PROTOCOL, Policy, WINDOW},
    pki::{self, CertificateInfo},
    telemetry::DEFENDER_EVENTS,
};

/// Longest time from the upgrade to the hello.
const GREETING: Duration = Duration::from_secs(10);
/// How long the welcome may wait for its turn: its Defender gives up after 3 s.
const WELCOME: Duration = Duration::from_secs(2);
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
    mut request: Request,
) -> Result<Response, ApiError> {
    let refused = |why: &str| ApiError::Forbidden(format!("a Defender's certificate is needed here: {why}"));
    let Some(Extension(ClientCertificate(der))) = certificate else { return Err(refused("there is none")) };
    let (cluster, id) = pki::defender_identity(&der).map_err(|error| refused(&error.to_string()))?;
    if cluster != console.status.borrow().cluster {
        return Err(refused("this one is of another cluster"));
    }
    let (answer, upgraded) = line::upgrade(&mut request)?;
    let shut_out = console.defenders.shut_out();
    let defender = console.defenders.lookups.find(&console.store, &id).await?;
    let defender = defender.ok_or_else(|| refused("this one is not known any more: register the host again"))?;
    let info = CertificateInfo::read(&der).map_err(|error| refused(&error.to_string()))?;
    if info.not_after <= unix_time() {
        // Of a session that is resumed, TLS checks no certificate again.
        return Err(refused("this one has expired"));
    }
    let refusal = defender.refusal();
    if refusal.is_none() {
        visit.inspect(|Extension(visit)| visit.vouch());
    }
    let renew = is_due(&console, &der, &info);
    tokio::spawn(async move {
        let Ok(upgraded) = upgraded.await else { return }; // it is gone already
        let line = Line::new(TokioIo::new(upgraded), &console.defenders.budgets.read);
        if let Some(why) = refusal {
            return turn_away(line, why).await;
        }
        let seat = console.defenders.connect(&id, from.to_string(), shut_out);
        let number = defender.number;
        let mut session = Session { console: Arc::clone(&console), defender, renew, seat, line };
        let why = session.run().await;
        tracing::debug!(id, %from, "the connection of a Defender ends: {why}");
        drop(session);
        // Not at the end of a term: the next PRIMARY would wait for it.
        if !*console.closing.borrow() {
            drop(console.defenders.intake.hand_over(&console.store, (number, Vec::new()), None));
        }
    });
    Ok(answer)
}

/// Tells whoever may not connect why: a refusal of the upgrade would say it to nobody.
async fn turn_away<S: AsyncRead + AsyncWrite + Unpin>(mut line: Line<S>, why: &str) {
    // Behind the hello: whoever sends into a closed connection may lose what has come.
    if let Ok(Ok(_)) = timeout(GREETING, line.text()).await
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

/// A connection that was upgraded.
struct Session<S> {
    console: Arc<Console>,
    defender: Defender,
    renew: bool,
    seat: Seat,
    line: Line<S>,
}

/// Events that have come and wait for those before them or for room, and the length of their text.
type Waiting = VecDeque<(Vec<Told>, usize)>;

/// The wait for a share of what may be written.
type Turn = Pin<Box<dyn Future<Output = Share> + Send>>;

/// Bytes that a message with this policy takes in memory, with what it is made of; none, if each connection may have
/// that at any time.
fn weight(policy: &Policy) -> usize {
    let bytes = policy.paths.iter().map(|watched| 3 * (watched.path.len() + 64)).sum();
    if bytes > OWN { bytes } else { 0 }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<S> {
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
        let (mut seen, mut waiting) = (seldom(), Waiting::new());
        let (mut storing, mut turn) = (None::<oneshot::Receiver<Stored>>, None::<Turn>);
        loop {
            if storing.is_none() {
                storing = self.hand_over_waiting(&mut waiting);
            }
            // Until the message is written.
            let mut room = None;
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
                heard = self.line.hear() => match heard {
                    Ok(Heard::Room) => None,
                    Ok(Heard::Text(text)) => match self.obey(&text, &mut waiting).await {
                        Ok(answer) => answer,
                        Err(why) => return self.refuse(why).await,
                    },
                    Err(why) => return why,
                },
                Ok(()) = policies.changed() => {
                    let bytes = policies.borrow().as_ref().map_or(0, |policy| weight(policy));
                    let budget = &self.console.defenders.budgets.written;
                    turn.get_or_insert_with(|| Box::pin(Arc::clone(budget).take(bytes)));
                    None
                }
                Some(share) = async { Some(turn.as_mut()?.await) } => {
                    (room, turn) = (Some(share), None);
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
                    drop(self.hand_over(Vec::new(), None));
                    None
                }
            };
            if let Some(answer) = answer
                && let Err(why) = self.line.say(&answer).await
            {
                return why;
            }
            drop(room);
        }
    }

    /// Has stored what has come, as far as there is room for it.
    fn hand_over_waiting(&mut self, waiting: &mut Waiting) -> Option<oneshot::Receiver<Stored>> {
        let (mut all, mut room) = (Vec::new(), None::<Share>);
        while let Some((events, bytes)) = waiting.pop_front() {
            let Some(share) = self.line.hand_on(bytes) else {
                waiting.push_front((events, bytes));
                break;
            };
            all.extend(events);
            room = Some(match room.take() {
                Some(room) => room.and(share),
                None => share,
            });
        }
        room.map(|room| self.hand_over(all, Some(room)))
    }

    fn hand_over(&self, events: Vec<Told>, room: Option<Share>) -> oneshot::Receiver<Stored> {
        let Console { defenders, store, .. } = &*self.console;
        defenders.intake.hand_over(store, (self.defender.number, events), room)
    }

    /// The hello and its answer.
    async fn greet(&mut self) -> Result<(), String> {
        let hello = timeout(GREETING, self.line.text()).await.map_err(|_| "no hello came in time".to_owned())??;
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
        let room = Arc::clone(&self.console.defenders.budgets.written).take(weight(&policy));
        let late = |_| "the Console has too much to say to others at the moment".to_owned();
        let _room = timeout(WELCOME, room).await.map_err(late)?;
        let policy = (*policy).clone();
        let authorities = self.console.status.borrow().membership.shared.trust_bundle();
        let welcome =
            FromConsole::Welcome { protocol: PROTOCOL, stored, stored_time, policy, authorities, renew: self.renew };
        self.line.say(&welcome).await
    }

    /// What a message asks for at once. Events wait for their turn.
    async fn obey(&mut self, text: &str, waiting: &mut Waiting) -> Result<Option<FromConsole>, String> {
        let message = serde_json::from_str(text).map_err(|error| format!("a message is not understood: {error}"))?;
        if let FromDefender::Events { events } = message {
            metrics::counter!(DEFENDER_EVENTS).increment(events.len() as u64);
            if waiting.len() >= WINDOW {
                return Err(format!("more than {WINDOW} messages wait for their acknowledgement"));
            }
            waiting.push_back((told(events)?, text.len()));
            return Ok(None);
        }
        self.line.spare(text.len());
        match message {
            FromDefender::Renew { csr } => {
                let certificate = Box::pin(certify(&self.console, &csr, &self.defender)).await;
                let certificate = certificate.map_err(|error| format!("no certificate can be made: {error}"))?;
                self.renew = false;
                Ok(Some(FromConsole::Certificate { certificate }))
            }
            FromDefender::Hello { .. } => Err("a second hello".to_owned()),
            FromDefender::Events { .. } | FromDefender::Unknown => Ok(None),
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

/// Events as they are kept until they are stored.
///
/// # Errors
/// When no Defender sends such.
fn told(events: Vec<Numbered>) -> Result<Vec<Told>, String> {
    let ascending = events.windows(2).all(|pair| pair[0].sequence < pair[1].sequence);
    let numbers = events.iter().all(|event| (1..=i64::MAX as u64).contains(&event.sequence));
    if events.is_empty() || events.len() > EVENTS || !ascending || !numbers {
        return Err(format!("a message has 1 to {EVENTS} events, their numbers ascend and begin at 1"));
    }
    let one = |event: Numbered| {
        let event = Told::from(event);
        let word = event.kind.len() <= WORD && event.kind.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if !word || event.event.len() > EVENT || event.time > i64::MAX as u64 {
            return Err(format!("event {} is too long, or its kind is no word", event.sequence));
        }
        Ok(event)
    };
    events.into_iter().map(one).collect()
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
    use futures_util::{SinkExt, StreamExt};
    use serde_json::json;
    use tokio::{
        net::{TcpSocket, TcpStream},
        sync::mpsc,
        task::JoinSet,
        time::{interval, sleep},
    };
    use tokio_tungstenite::{WebSocketStream, accept_async, client_async, tungstenite};

    use super::{
        super::budget::{Budget, Budgets},
        *,
    };
    use crate::{
        console::test_console::TestConsole,
        defender::wire::{MESSAGE, PING_MS, SILENCE_MS, Watched},
    };

    const SILENCE: Duration = Duration::from_millis(SILENCE_MS);
    /// Bytes of the buffers of the kernel: it doubles them.
    const KERNEL: u32 = 8 << 10;
    /// Defenders that have much to say, and how much: as many messages as may be on the way, and the events of each.
    const CROWD: u64 = 16;
    const EACH: u64 = 25;
    /// What all of them may have in memory.
    const ROOM: usize = 1 << 20;

    /// A listener whose connections hold little on their way.
    fn listener() -> tokio::net::TcpListener {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(KERNEL).unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        socket.listen(128).unwrap()
    }

    async fn dial(at: SocketAddr) -> WebSocketStream<TcpStream> {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_send_buffer_size(KERNEL).unwrap();
        client_async("ws://console/defender", socket.connect(at).await.unwrap()).await.unwrap().0
    }

    /// Serves those that connect, one Defender after the other: the ids are numbers. Tells why each connection ends.
    async fn serve(
        console: Arc<Console>,
        listener: tokio::net::TcpListener,
        room: Arc<Budget>,
        ended: mpsc::Sender<String>,
    ) {
        for id in 0.. {
            let (stream, from) = listener.accept().await.unwrap();
            let stream = accept_async(stream).await.unwrap().into_inner();
            let defender = tables::find(&console.store, &id.to_string()).await.unwrap().unwrap();
            let seat = console.defenders.connect(&defender.id, from.to_string(), 0);
            let line = Line::new(stream, &room);
            let mut session = Session { console: Arc::clone(&console), defender, renew: false, seat, line };
            let ended = ended.clone();
            tokio::spawn(async move {
                let why = session.run().await;
                let _ = ended.send(why).await;
            });
        }
    }

    fn message(first: u64) -> String {
        let event = |sequence| Numbered { sequence, time: 1, kind: "file".to_owned(), event: json!("x".repeat(8000)) };
        serde_json::to_string(&FromDefender::Events { events: (first..first + EACH).map(event).collect() }).unwrap()
    }

    async fn greet(socket: &mut WebSocketStream<TcpStream>) {
        let hello =
            FromDefender::Hello { protocol: PROTOCOL, version: "1".to_owned(), next: 1, facts: Facts::default() };
        let hello = serde_json::to_string(&hello).unwrap();
        socket.send(tungstenite::Message::Text(hello.into())).await.unwrap();
        let welcome = socket.next().await.unwrap().unwrap();
        assert!(welcome.to_text().unwrap().contains("welcome"), "{welcome}");
    }

    /// Sends all that it has, and counts what was taken, until all is acknowledged; then it only pings. Returns the
    /// longest silence; none if the connection ends before.
    async fn tell_much(socket: WebSocketStream<TcpStream>, taken: mpsc::UnboundedSender<usize>) -> Option<Duration> {
        let (mut sink, mut stream) = socket.split();
        let write = async {
            for number in 0..WINDOW as u64 {
                let text = message(1 + number * EACH);
                let bytes = text.len();
                assert!(bytes < MESSAGE);
                if sink.send(tungstenite::Message::Text(text.into())).await.is_ok() {
                    taken.send(bytes).unwrap();
                }
            }
            std::future::pending().await
        };
        let read = async {
            let (mut heard, mut longest) = (Instant::now(), Duration::ZERO);
            let last = serde_json::to_string(&FromConsole::Ack { stored: WINDOW as u64 * EACH }).unwrap();
            while let Some(Ok(message)) = stream.next().await {
                longest = longest.max(heard.elapsed());
                heard = Instant::now();
                if message.to_text().is_ok_and(|text| text == last) {
                    return Some(longest);
                }
            }
            None
        };
        let longest = tokio::select! {
            longest = read => longest,
            longest = write => longest,
        };
        tokio::spawn(tell_little(sink.reunite(stream).unwrap(), None));
        longest
    }

    /// One that has little to say: pings. Tells when it is answered after the policy has come.
    async fn tell_little(mut socket: WebSocketStream<TcpStream>, mut answered: Option<oneshot::Sender<()>>) {
        let mut pings = interval(Duration::from_millis(PING_MS / 4));
        let mut policy = false;
        loop {
            tokio::select! {
                _ = pings.tick() => drop(socket.send(tungstenite::Message::Ping(Default::default())).await),
                message = socket.next() => match message {
                    Some(Ok(tungstenite::Message::Text(text))) => policy |= text.contains("\"policy\""),
                    Some(Ok(_)) if policy => drop(answered.take().map(|answered| answered.send(()))),
                    Some(Ok(_)) => {}
                    _ => return,
                }
            }
        }
    }

    /// COMMITs are held for longer than a connection may be silent, while many Defenders have a backlog: memory stays
    /// within its limit, no connection ends, whoever has little to say notices nothing, and in the end all is there
    /// once.
    #[tokio::test]
    async fn who_sends_more_than_is_committed_waits_and_loses_nothing() {
        let test = TestConsole::start().await;
        let (console, store) = (&test.console, &test.console.store);
        let insert = "INSERT INTO defenders (id, name, key, registered, modified, seen, expires) \
                      SELECT value, value, value, 1, 1, 1, 1 FROM json_each(?)";
        let ids: Vec<String> = (0..=CROWD).map(|id| id.to_string()).collect();
        store.write(sqlx::query(insert).bind(json!(ids).to_string())).await.unwrap();
        let (room, listener) = (Budgets::of(ROOM, 0).read, listener());
        let at = listener.local_addr().unwrap();
        let (ended, mut end) = mpsc::channel(64);
        let serving = tokio::spawn(serve(Arc::clone(console), listener, Arc::clone(&room), ended));
        let mut sockets = Vec::new();
        for _ in 0..=CROWD {
            let mut socket = dial(at).await;
            greet(&mut socket).await;
            sockets.push(socket);
        }
        let quiet = sockets.remove(0);
        let intake = &console.defenders.intake;
        intake.hold(true);
        let (taken, mut all_taken) = mpsc::unbounded_channel();
        let mut crowd = JoinSet::new();
        for socket in sockets {
            crowd.spawn(tell_much(socket, taken.clone()));
        }
        let policy = Policy {
            version: 9,
            paths: vec![Watched { path: "/etc".to_owned(), recursive: true }],
            ..Policy::default()
        };
        let begin = Instant::now();
        console.defenders.announce(policy);
        let (answered, answer) = oneshot::channel();
        tokio::spawn(tell_little(quiet, Some(answered)));
        answer.await.unwrap();
        while begin.elapsed() < SILENCE + SILENCE / 4 || room.used() < ROOM {
            sleep(Duration::from_millis(10)).await;
        }
        let (mut bytes, mut whole) = (0, 0);
        while let Ok(more) = all_taken.try_recv() {
            (bytes, whole) = (bytes + more, whole + 1);
        }
        println!("{whole} messages with {bytes} bytes taken, {} of the room used", room.used());
        intake.hold(false);
        drop(intake.hand_over(store, (1, Vec::new()), None));
        let told = crowd.join_all().await;
        assert_eq!(end.try_recv().ok(), None, "no connection has ended");
        assert!(told.iter().all(|longest| longest.is_some_and(|longest| longest < SILENCE)), "{told:?}");
        let query = "SELECT count(*), count(DISTINCT defender || '.' || sequence) FROM defender_events";
        let counts: (u64, u64) = sqlx::query_as(query).fetch_one(&mut *store.read().await.unwrap()).await.unwrap();
        let events = CROWD * WINDOW as u64 * EACH;
        assert_eq!(counts, (events, events));
        // What a connection has besides: its own share and what the kernel holds on both sides.
        let most = ROOM + CROWD as usize * (OWN + 6 * KERNEL as usize);
        assert!(bytes < most, "{bytes} bytes were taken, {most} have room");
        assert_eq!(room.used(), 0);
        serving.abort();
    }

    #[test]
    fn events_that_no_defender_sends_are_refused() {
        let event = |sequence, kind: &str, length| Numbered {
            sequence,
            time: 1,
            kind: kind.to_owned(),
            event: json!("x".repeat(length)),
        };
        assert_eq!(told(vec![event(1, "file", 9), event(3, "file", 9)]).unwrap().len(), 2);
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
            assert!(told(bad.clone()).is_err(), "{bad:?}");
        }
    }
}
