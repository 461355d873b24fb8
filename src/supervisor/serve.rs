//! Accepts connections and serves them until the opening ends: TLS, HTTP/1.1, limits. Must never write to a socket but
//! through [`LeasedStream`].

use std::{io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

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
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use super::{
    leased::{LeasedStream, Opening, Phase},
    ports::Service,
};
use crate::{
    clients::{Clients, Counted},
    telemetry::CONSOLE_CONNECTIONS,
};

/// Connections at once over all ports; further ones wait in the kernel's queue.
const CONNECTIONS: u32 = 1024;
/// Connections at once from one network, so that none can have all of them. Half of them, because all clients behind a
/// load balancer come from the same one.
const FROM_ONE: usize = 512;
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
    places: Arc<Semaphore>,
}

/// What every connection needs.
#[derive(Clone)]
struct Shared {
    opening: Arc<Opening>,
    tls: watch::Receiver<Arc<ServerConfig>>,
    router: Router,
    places: Arc<Semaphore>,
    clients: Arc<Clients>,
}

impl Server {
    /// Starts to accept on all listeners.
    pub(super) fn start(
        listeners: Vec<(Service, TcpListener)>,
        opening: Arc<Opening>,
        tls: watch::Receiver<Arc<ServerConfig>>,
        router: Router,
    ) -> Self {
        let places = Arc::new(Semaphore::new(CONNECTIONS as usize));
        let clients = Clients::new("console", FROM_ONE);
        for (service, listener) in listeners {
            let clients = Arc::clone(&clients);
            let (opening, places, tls) = (Arc::clone(&opening), Arc::clone(&places), tls.clone());
            let shared = Shared { opening, tls, router: router.clone(), places, clients };
            tokio::spawn(async move {
                let opening = Arc::clone(&shared.opening);
                tokio::select! {
                    () = opening.reached(Phase::Draining) => {}
                    () = accept(service, &listener, &shared) => {}
                }
            });
        }
        Self { opening, places }
    }

    /// Returns when no connection is left and nothing accepts one. The phase must have been advanced before, else it
    /// waits for the clients.
    pub(super) async fn finished(&self) {
        // Those who accept hold a place, too. An error would mean that the semaphore is closed, which nobody does.
        let _ = self.places.acquire_many(CONNECTIONS).await;
    }

    /// The opening that is served.
    pub(super) fn opening(&self) -> &Opening {
        &self.opening
    }
}

async fn accept(service: Service, listener: &TcpListener, shared: &Shared) {
    loop {
        // Before accepting: the kernel's queue is the place to wait.
        let Ok(place) = Arc::clone(&shared.places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, from)) => {
                // Closed at once: the place is for somebody else.
                let Some(counted) = shared.clients.enter(from.ip()) else { continue };
                tokio::spawn(connection(service, stream, from, shared.clone(), (place, counted)));
            }
            // The listening socket was shut down by the guard or by ourselves: the opening ends in a moment.
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => {
                shared.opening.reached(Phase::Draining).await;
            }
            Err(error) if is_of_the_client(&error) => {}
            Err(error) => {
                tracing::error!("cannot accept a connection to the Console: {error}");
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
    place: (OwnedSemaphorePermit, Counted),
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
        result = serve(service, stream, from, shared) => {
            if let Err(error) = result {
                tracing::debug!("a connection to the Console ended: {error:#}");
            }
        }
    }
    metrics::gauge!(CONSOLE_CONNECTIONS).decrement(1.0);
    drop(place);
}

async fn serve(service: Service, stream: LeasedStream, from: SocketAddr, shared: Shared) -> anyhow::Result<()> {
    if service == Service::Http {
        return http(stream, from, Scheme::HTTP, shared).await;
    }
    // The settings of this instant: certificates are exchanged while connections go on.
    let tls = TlsAcceptor::from(Arc::clone(&shared.tls.borrow()));
    let stream = tokio::select! {
        biased;
        // It has not asked for anything yet: a switchover need not wait for it.
        () = shared.opening.reached(Phase::Draining) => return Ok(()),
        stream = tokio::time::timeout(HANDSHAKE, tls.accept(stream)) => stream??,
    };
    if service == Service::Defender {
        tracing::debug!("closed a connection to the Defender port: Defenders are not supported yet");
        return Ok(());
    }
    http(stream, from, Scheme::HTTPS, shared).await
}

async fn http<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    from: SocketAddr,
    scheme: Scheme,
    shared: Shared,
) -> anyhow::Result<()> {
    let service = shared.router.map_request(move |mut request: Request<_>| {
        request.extensions_mut().insert(ConnectInfo(from));
        // How it came, not what its head says: cookies are for TLS only.
        request.extensions_mut().insert(scheme.clone());
        request
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
