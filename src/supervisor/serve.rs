//! Accepts connections and serves them until the opening ends: TLS, HTTP/1.1, limits. Must never write to a socket but
//! through [`LeasedStream`].

use std::{collections::HashMap, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

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
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};
use tokio_rustls::LazyConfigAcceptor;
use tower::ServiceExt;

use super::{
    leased::{LeasedStream, Opening, Phase},
    ports::Service,
};
use crate::{
    clients::places::{Acquaintances, Place, Places, Visit},
    descriptors::{self, Budget},
    telemetry::CONSOLE_CONNECTIONS,
};

/// More than there are tasks: to wait for the end of all of them.
const TASKS: u32 = 1 << 20;
/// Lines in the head of a request.
const HEADERS: usize = 64;
/// Longest time for a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Longest time from the end of a request (or the start of the connection) to the end of the next request's head: also
/// the limit of an idle connection.
const HEAD: Duration = Duration::from_secs(10);
/// The size of the buffers. A request whose head does not fit is refused, at the latest at twice of this.
const BUFFER: usize = 64 << 10;
/// Pause after an error of accept that does not pass at once, as too many open files.
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
    tls: watch::Receiver<Arc<ServerConfig>>,
    router: Router,
    /// One for each task.
    tasks: Arc<Semaphore>,
    places: Arc<Places>,
}

/// The places of each port. They are kept apart, so that whoever takes those of one port shuts nobody out of another, and outlive
/// an opening with what is known of the clients.
#[derive(Clone, Debug)]
pub(super) struct Seating {
    ports: Arc<HashMap<Service, Arc<Places>>>,
    pub(super) acquaintances: Arc<Acquaintances>,
}

impl Seating {
    pub(super) fn new() -> Self {
        let (Budget { https, http, defender, .. }, acquaintances) = (descriptors::budget(), Acquaintances::new());
        let places = |name, places| Places::new(name, descriptors::room(places), Arc::clone(&acquaintances));
        let ports = HashMap::from([
            (Service::Https, places("console", https)),
            (Service::Http, places("console_http", http)),
            (Service::Defender, places("defender", defender)),
        ]);
        Self { ports: Arc::new(ports), acquaintances }
    }
}

impl Server {
    /// Starts to accept on all listeners.
    pub(super) fn start(
        listeners: Vec<(Service, TcpListener)>,
        opening: Arc<Opening>,
        tls: watch::Receiver<Arc<ServerConfig>>,
        router: Router,
        seating: &Seating,
    ) -> Self {
        let tasks = Arc::new(Semaphore::new(TASKS as usize));
        for (service, listener) in listeners {
            let Some(places) = seating.ports.get(&service).cloned() else { continue };
            let (opening, tls) = (Arc::clone(&opening), tls.clone());
            let shared = Shared { opening, tls, router: router.clone(), tasks: Arc::clone(&tasks), places };
            tokio::spawn(async move {
                let Ok(_task) = Arc::clone(&shared.tasks).acquire_owned().await else { return };
                let opening = Arc::clone(&shared.opening);
                tokio::select! {
                    () = opening.reached(Phase::Draining) => {}
                    () = accept(service, &listener, &shared) => {}
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

async fn accept(service: Service, listener: &TcpListener, shared: &Shared) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let Some(place) = shared.places.enter(from.ip()).await else { continue };
                let Ok(task) = Arc::clone(&shared.tasks).acquire_owned().await else { return };
                tokio::spawn(connection(service, stream, from, shared.clone(), (place, task)));
            }
            // The listening socket was shut down by the guard or by ourselves: the opening ends in a moment.
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => {
                shared.opening.reached(Phase::Draining).await;
            }
            Err(error) if is_of_the_client(&error) => {}
            Err(error) => {
                tracing::error!("cannot accept a connection to the Console: {error}");
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
    service: Service,
    stream: TcpStream,
    from: SocketAddr,
    shared: Shared,
    (place, _task): (Place, OwnedSemaphorePermit),
) {
    let opening = Arc::clone(&shared.opening);
    metrics::gauge!(CONSOLE_CONNECTIONS).increment(1.0);
    // Small answers leave at once. It fails only if the client is gone.
    let _ = stream.set_nodelay(true);
    let stream = LeasedStream::new(stream, Arc::clone(&opening));
    tokio::select! {
        biased;
        // Drops everything, the request that runs too; the stream resets the connection.
        () = opening.reached(Phase::Closed) => {}
        () = place.ended() => {}
        result = serve(service, stream, (from, place.visit()), shared) => {
            if let Err(error) = result {
                tracing::debug!("a connection to the Console ended: {error:#}");
            }
        }
    }
    metrics::gauge!(CONSOLE_CONNECTIONS).decrement(1.0);
    drop(place);
}

/// The address that a connection comes from, and its place.
type Client = (SocketAddr, Visit);

async fn serve(service: Service, stream: LeasedStream, from: Client, shared: Shared) -> anyhow::Result<()> {
    if service == Service::Http {
        return http(stream, from, Scheme::HTTP, shared).await;
    }
    let visit = from.1.clone();
    let greeting = async {
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
        visit.greeted();
        // The settings of this instant: certificates are exchanged while connections go on.
        let tls = Arc::clone(&shared.tls.borrow());
        start.into_stream(tls).await
    };
    let stream = tokio::select! {
        biased;
        // It has not asked for anything yet: a switchover need not wait for it.
        () = shared.opening.reached(Phase::Draining) => return Ok(()),
        stream = tokio::time::timeout(HANDSHAKE, greeting) => stream??,
    };
    if service == Service::Defender {
        tracing::debug!("closed a connection to the Defender port: Defenders are not supported yet");
        return Ok(());
    }
    http(stream, from, Scheme::HTTPS, shared).await
}

async fn http<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    (from, visit): Client,
    scheme: Scheme,
    shared: Shared,
) -> anyhow::Result<()> {
    let answered = visit.clone();
    let service = shared.router.map_request(move |mut request: Request<_>| {
        visit.busy();
        request.extensions_mut().insert(ConnectInfo(from));
        request.extensions_mut().insert(visit.clone());
        // How it came, not what its head says: cookies are for TLS only.
        request.extensions_mut().insert(scheme.clone());
        request
    });
    let service = service.map_response(move |response| {
        answered.idle();
        response
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(BUFFER)
        .max_headers(HEADERS)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    let mut connection = pin!(connection);
    tokio::select! {
        result = connection.as_mut() => return Ok(result?),
        () = shared.opening.reached(Phase::Draining) => connection.as_mut().graceful_shutdown(),
    }
    Ok(connection.await?)
}
