//! Accepts connections and serves them until the opening ends: TLS, HTTP/1.1, limits; or hands them to the service.
//! Must never write to a socket but through [`LeasedStream`].

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    extract::{ConnectInfo, Request},
    http::uri::Scheme,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::LazyConfigAcceptor;
use tower::ServiceExt;

use super::leased::{LeasedStream, Opening, Phase, Watches};
use crate::{
    clients::{
        ClientCertificate,
        places::{Acquaintances, Place, Places, Visit},
    },
    descriptors,
    mutex::locked,
    service::proxy::{self, Target},
    telemetry::{CONSOLE_CONNECTIONS, SERVICE_CONNECTIONS, steps::Step},
    workload::{self, Endpoint, Serves},
};

/// More than there are tasks: to wait for the end of all of them.
const TASKS: u32 = 1 << 20;
/// Lines in the head of a request.
const HEADERS: usize = 64;
/// Longest time for a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a handshake keeps its turn, where there are turns: who sends drop by drop holds nobody up.
const TURN: Duration = Duration::from_millis(250);
/// How long it waits for its turn. Behind that, its client would give up before the end (a Defender does after 5 s),
/// and all work would be for those who are gone: it is better told to come again. Not earlier: who comes again has lost
/// its place, and draws a pause before.
const PATIENCE: Duration = Duration::from_millis(4_500);
/// Longest time from the end of a request (or the start of the connection) to the end of the next request's head: also
/// the limit of an idle connection.
const HEAD: Duration = Duration::from_secs(10);
/// The size of the buffers. A request whose head does not fit is refused, at the latest at twice of this.
const BUFFER: usize = 64 << 10;
/// Pause after an error of accept that does not pass at once, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// All tasks of one opening. They end by themselves when the opening is closed.
#[derive(Debug)]
pub(super) struct Server {
    opening: Arc<Opening>,
    tasks: Arc<Semaphore>,
}

/// What every connection needs.
#[derive(Clone)]
struct Shared {
    opening: Arc<Opening>,
    endpoint: Arc<Endpoint>,
    /// One for each task.
    tasks: Arc<Semaphore>,
    places: Arc<Places>,
}

/// The places of each port, by the name of its endpoint. They are kept apart, so that nobody who fills one port shuts
/// others out of another. They outlive an opening, with what is known of the clients.
#[derive(Clone, Debug, Default)]
pub(super) struct Seating {
    ports: Arc<Mutex<HashMap<&'static str, Arc<Places>>>>,
    pub(super) acquaintances: Arc<Acquaintances>,
}

impl Seating {
    fn places(&self, endpoint: &Endpoint) -> Arc<Places> {
        let mut ports = locked(&self.ports);
        let places = ports.entry(endpoint.name).or_insert_with(|| {
            let known = if endpoint.apart { Acquaintances::new() } else { Arc::clone(&self.acquaintances) };
            Places::new(endpoint.name, endpoint.room, known)
        });
        Arc::clone(places)
    }
}

impl Server {
    /// Starts to accept on all listeners.
    pub(super) fn start(listeners: Vec<(Endpoint, TcpListener)>, opening: Arc<Opening>, seating: &Seating) -> Self {
        let tasks = Arc::new(Semaphore::new(TASKS as usize));
        for (endpoint, listener) in listeners {
            let (opening, places) = (Arc::clone(&opening), seating.places(&endpoint));
            let shared = Shared { opening, endpoint: Arc::new(endpoint), tasks: Arc::clone(&tasks), places };
            tokio::spawn(async move {
                let Ok(_task) = Arc::clone(&shared.tasks).acquire_owned().await else { return };
                let opening = Arc::clone(&shared.opening);
                tokio::select! {
                    () = opening.reached(Phase::Draining) => {}
                    () = accept(&listener, &shared) => {}
                }
            });
        }
        Self { opening, tasks }
    }

    /// Returns when no connection is left and nothing accepts one. The phase must have been advanced before, else it
    /// waits for the clients.
    pub(super) async fn finished(&self) {
        // An error would mean that the semaphore is closed, which nobody does.
        let _ = self.tasks.acquire_many(TASKS).await;
    }

    /// The opening that is served.
    pub(super) fn opening(&self) -> &Opening {
        &self.opening
    }
}

async fn accept(listener: &TcpListener, shared: &Shared) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let Some(place) = shared.places.enter(from.ip()).await else { continue };
                let Ok(task) = Arc::clone(&shared.tasks).acquire_owned().await else { return };
                let shared = shared.clone();
                match shared.endpoint.serves {
                    Serves::Http { .. } => drop(tokio::spawn(connection(stream, from, shared, (place, task)))),
                    Serves::Service(target) => drop(tokio::spawn(carry(stream, (from, target), shared, (place, task)))),
                }
            }
            // The listening socket was shut down by the guard or by ourselves: the opening ends in a moment.
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => {
                shared.opening.reached(Phase::Draining).await;
            }
            Err(error) if is_of_the_client(&error) => {}
            Err(error) => {
                tracing::error!("cannot accept a connection to a port of {}: {error}", shared.endpoint.name);
                if descriptors::are_short(&error) {
                    shared.places.make_room();
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_of_the_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

async fn connection(
    stream: TcpStream,
    from: SocketAddr,
    shared: Shared,
    (place, _task): (Place, OwnedSemaphorePermit),
) {
    let opening = Arc::clone(&shared.opening);
    metrics::gauge!(CONSOLE_CONNECTIONS).increment(1.0);
    // Small answers leave at once. It fails only if the client is gone.
    let _ = stream.set_nodelay(true);
    let (stream, control) = LeasedStream::new(stream, Arc::clone(&opening));
    let served = async {
        let watches = stream.watches();
        // In a box, which is given back when somebody else goes on with the stream.
        if let Err(error) = Box::pin(serve(stream, (from, place.visit(), watches), shared)).await {
            tracing::debug!("a connection to {} ended: {error:#}", workload::NAME);
        }
        // After an upgrade somebody else goes on with the stream, and keeps the place for as long as that takes.
        control.dropped().await;
    };
    tokio::select! {
        biased;
        // Drops everything, the request that runs too; the stream resets the connection.
        () = opening.reached(Phase::Closed) => {}
        () = place.ended() => {}
        () = served => {}
    }
    control.end();
    metrics::gauge!(CONSOLE_CONNECTIONS).decrement(1.0);
    drop(place);
}

/// A connection to the service.
async fn carry(
    stream: TcpStream,
    (from, target): (SocketAddr, Target),
    shared: Shared,
    (place, _task): (Place, OwnedSemaphorePermit),
) {
    let Ok(to) = stream.local_addr() else { return };
    metrics::gauge!(SERVICE_CONNECTIONS).increment(1.0);
    place.visit().stays();
    // It fails only if the client is gone.
    let _ = stream.set_nodelay(true);
    proxy::keep_alive(&stream);
    let (stream, _control) = LeasedStream::new(stream, Arc::clone(&shared.opening));
    let mut stream = stream.in_halves();
    tokio::select! {
        biased;
        () = shared.opening.reached(Phase::Closed) => {}
        carried = proxy::carry(&mut stream, (from, to), target) => if let Err(error) = carried {
            tracing::debug!("a connection to {} ended: {error}", workload::SERVICE_NAME);
            stream.reset();
        },
    }
    metrics::gauge!(SERVICE_CONNECTIONS).decrement(1.0);
}

/// The address that a connection comes from, its place, and what it is measured by.
type Client = (SocketAddr, Visit, Arc<Watches>);

async fn serve(stream: LeasedStream, from: Client, shared: Shared) -> anyhow::Result<()> {
    let Serves::Http { tls, router, handshakes } = &shared.endpoint.serves else { return Ok(()) };
    let router = router.clone();
    let Some(tls) = tls else {
        return http(stream, from, (Scheme::HTTP, None), router, &shared.opening).await;
    };
    let visit = from.1.clone();
    let greeting = async {
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
        visit.greeted();
        in_turn(handshakes.as_deref(), async {
            // The settings of this instant: certificates are exchanged while connections go on.
            let tls = Arc::clone(&tls.borrow());
            start.into_stream(tls).await
        })
        .await
    };
    let stream = tokio::select! {
        biased;
        // It has not asked for anything yet: a switchover need not wait for it.
        () = shared.opening.reached(Phase::Draining) => return Ok(()),
        stream = tokio::time::timeout(HANDSHAKE, greeting) => stream??,
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let certificate = certificate.map(|der| ClientCertificate(der.to_vec()));
    http(stream, from, (Scheme::HTTPS, certificate), router, &shared.opening).await
}

/// Does the work when its turn has come.
///
/// # Errors
/// When it has not come in time, and those of the work.
async fn in_turn<T>(turns: Option<&Semaphore>, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let Some(turns) = turns else { return work.await };
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "too many others are before it");
    // The inner error would mean that it is closed, which nobody does.
    let turn = tokio::time::timeout(PATIENCE, turns.acquire()).await.map_err(late)?;
    let mut work = pin!(work);
    match tokio::time::timeout(TURN, work.as_mut()).await {
        Ok(done) => done,
        Err(_) => {
            drop(turn);
            work.await
        }
    }
}

async fn http<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    (from, visit, watches): Client,
    (scheme, certificate): (Scheme, Option<ClientCertificate>),
    router: Router,
    opening: &Opening,
) -> anyhow::Result<()> {
    let (answered, answering) = (visit.clone(), Arc::clone(&watches));
    let service = router.map_request(move |mut request: Request<_>| {
        visit.busy();
        watches.reading.stop(Step::RequestRead);
        request.extensions_mut().insert(ConnectInfo(from));
        request.extensions_mut().insert(visit.clone());
        // By how it came, not by what its head says: cookies are for TLS only.
        request.extensions_mut().insert(scheme.clone());
        certificate.iter().for_each(|known| drop(request.extensions_mut().insert(known.clone())));
        request
    });
    let service = TowerToHyperService::new(service.map_response(move |response| {
        answered.idle();
        answering.writing.start();
        response
    }));
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(BUFFER).max_headers(HEADERS);
    let mut connection = pin!(server.serve_connection(TokioIo::new(stream), service).with_upgrades());
    tokio::select! {
        result = connection.as_mut() => return Ok(result?),
        () = opening.reached(Phase::Draining) => connection.as_mut().graceful_shutdown(),
    }
    Ok(connection.await?)
}

#[cfg(test)]
mod tests {
    use axum::{
        http::{
            StatusCode,
            header::{CONNECTION, UPGRADE},
        },
        routing::get,
    };
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::node::{Lease, lease::boottime};

    #[tokio::test]
    async fn handshakes_have_turns_and_one_that_takes_long_holds_nobody_up() {
        let (turns, begin) = (Semaphore::new(1), std::time::Instant::now());
        tokio::select! {
            biased;
            never = in_turn(Some(&turns), std::future::pending::<io::Result<()>>()) => unreachable!("{never:?}"),
            done = in_turn(Some(&turns), async { Ok(()) }) => done.unwrap(),
        }
        assert!(begin.elapsed() >= TURN, "it was not its turn");
        assert_eq!(turns.available_permits(), 1);
        let _kept = turns.acquire().await.unwrap();
        let error = in_turn(Some(&turns), async { Ok(()) }).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begin.elapsed() >= PATIENCE);
    }

    /// Turns the connection into an echo.
    async fn echo(mut request: Request) -> (StatusCode, [(axum::http::HeaderName, &'static str); 2]) {
        tokio::spawn(async move {
            let upgraded = TokioIo::new(hyper::upgrade::on(&mut request).await.unwrap());
            let (mut reading, mut writing) = tokio::io::split(upgraded);
            let _ = tokio::io::copy(&mut reading, &mut writing).await;
        });
        (StatusCode::SWITCHING_PROTOCOLS, [(CONNECTION, "upgrade"), (UPGRADE, "echo")])
    }

    async fn exchange(client: &mut TcpStream) -> io::Result<[u8; 4]> {
        client.write_all(b"ping").await?;
        let mut answer = [0; 4];
        client.read_exact(&mut answer).await.map(|_| answer)
    }

    #[tokio::test]
    async fn a_connection_that_was_upgraded_has_its_place_until_the_opening_ends_and_not_longer() {
        let lease = Lease::new().unwrap();
        lease.set(boottime() + Duration::from_secs(60).as_nanos() as u64).unwrap();
        let opening = Opening::with(Box::new(|| true), lease);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(echo));
        let (name, port, room) = ("console", at.port(), descriptors::room(8));
        let serves = Serves::Http { tls: None, router, handshakes: None };
        let endpoint = Endpoint { name, port, serves, room, apart: false };
        let server = Server::start(vec![(endpoint, listener)], Arc::clone(&opening), &Seating::default());
        let mut client = TcpStream::connect(at).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n").await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await.unwrap());
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        assert_eq!(&exchange(&mut client).await.unwrap(), b"ping");
        opening.advance(Phase::Draining);
        assert_eq!(&exchange(&mut client).await.unwrap(), b"ping", "what runs may go on for a while");
        let mut finished = pin!(server.finished());
        assert!(tokio::time::timeout(Duration::from_millis(20), finished.as_mut()).await.is_err());
        opening.advance(Phase::Closed);
        finished.await;
        assert!(exchange(&mut client).await.is_err(), "no byte leaves any more");
    }

    /// A port of a service behind which every byte comes back, until the client has said its last one.
    async fn echoing(connections: usize) -> (SocketAddr, Lease, Arc<Opening>, Server) {
        let inside = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = Target { port: inside.local_addr().unwrap().port(), proxy: false };
        tokio::spawn(async move {
            while let Ok((stream, _)) = inside.accept().await {
                tokio::spawn(async move {
                    let (mut reading, mut writing) = stream.into_split();
                    let _ = tokio::io::copy(&mut reading, &mut writing).await;
                });
            }
        });
        let lease = Lease::new().unwrap();
        lease.set(boottime() + Duration::from_secs(60).as_nanos() as u64).unwrap();
        let opening = Opening::with(Box::new(|| true), lease.clone());
        let listener = crate::clients::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        listener.listen(1024).unwrap();
        let listener = TcpListener::from_std(listener.into()).unwrap();
        let at = listener.local_addr().unwrap();
        let room = descriptors::common_room(connections);
        let endpoint =
            Endpoint { name: "service", port: at.port(), serves: Serves::Service(target), room, apart: true };
        let server = Server::start(vec![(endpoint, listener)], Arc::clone(&opening), &Seating::default());
        (at, lease, opening, server)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn two_thousand_connections_to_the_service_go_on_at_once() {
        const CONNECTIONS: usize = 2000;
        // Each has four ends in this process.
        let (_, most) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, most, most).unwrap();
        assert!(most > 4 * CONNECTIONS as u64 + 100, "the test needs more files: ulimit -Hn");
        let (at, _lease, opening, server) = echoing(CONNECTIONS).await;
        let mut all = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut client = TcpStream::connect(at).await.unwrap();
            assert_eq!(&exchange(&mut client).await.unwrap(), b"ping");
            all.push(client);
        }
        // One more is turned away, and nobody has to make room for it.
        let mut late = TcpStream::connect(at).await.unwrap();
        assert!(exchange(&mut late).await.is_err());
        for client in &mut all {
            assert_eq!(&exchange(client).await.unwrap(), b"ping");
        }
        // Half of them say that they are done, and get the last word back.
        for mut client in all.drain(..CONNECTIONS / 2) {
            client.write_all(b"last").await.unwrap();
            client.shutdown().await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "last");
        }
        opening.advance(Phase::Draining);
        assert_eq!(&exchange(&mut all[0]).await.unwrap(), b"ping", "what runs may go on for a while");
        opening.advance(Phase::Closed);
        server.finished().await;
        for client in &mut all {
            assert!(exchange(client).await.is_err(), "no byte leaves any more");
        }
    }

    #[tokio::test]
    async fn no_byte_of_the_service_leaves_without_a_lease() {
        let (at, lease, _opening, _server) = echoing(8).await;
        let mut client = TcpStream::connect(at).await.unwrap();
        assert_eq!(&exchange(&mut client).await.unwrap(), b"ping");
        lease.set(boottime()).unwrap();
        assert_eq!(exchange(&mut client).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
