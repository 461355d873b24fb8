//! The HTTPS port of a host that waits for a pool: connections with limits of number and time. Must never keep the port
//! once it is decided what becomes of the host.

use std::{net::SocketAddr, pin::pin, time::Duration};

use anyhow::{Context, Result};
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
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;
use tracing::{debug, info, warn};
use twistlock_ha::{
    clients::{
        self,
        places::{Acquaintances, Place, Places},
    },
    config::Config,
    descriptors, pki,
};

use crate::daemon::bind_address;

/// Connections that the kernel keeps waiting.
const BACKLOG: i32 = 128;
/// Longest time for a TLS handshake, and for the head of a request.
const HEAD: Duration = Duration::from_secs(10);
/// Longest life of a connection.
const CONNECTION: Duration = Duration::from_secs(60);
/// Size of the buffers, and largest head of a request.
const BUFFER: usize = 16 << 10;
/// Pause after an error of accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The open port.
pub(super) struct Front {
    listener: TcpListener,
    tls: TlsAcceptor,
    router: Router,
}

impl Front {
    /// Opens the port of the configuration; none if it is off. `key` is PEM, and the certificate is for these names.
    ///
    /// # Errors
    /// When the key cannot be used, or the port is not free.
    pub(super) fn open(config: &Config, (key, names): (&str, &[String]), router: Router) -> Result<Option<Self>> {
        let Some(port) = config.management_port_https else { return Ok(None) };
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let tls = pki::waiting_console_tls(key, &names).context("make a certificate for the HTTPS port")?;
        let address = SocketAddr::new(bind_address(config), port);
        let open = || {
            let socket = clients::bind(address)?;
            socket.listen(BACKLOG)?;
            TcpListener::from_std(socket.into())
        };
        let listener = open().with_context(|| format!("open {address} for the sign-up (MANAGEMENT_PORT_HTTPS)"))?;
        Ok(Some(Self { listener, tls: TlsAcceptor::from(tls), router }))
    }

    /// Serves until `closing` is true; then answers what was asked, and ends.
    pub(super) async fn serve(self, mut closing: watch::Receiver<bool>) {
        let Self { listener, tls, router } = self;
        let room = descriptors::room(descriptors::budget().https);
        let places = Places::new("console", room, Acquaintances::new());
        let mut connections = JoinSet::new();
        let over = closing.clone();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
                () = closed(&mut closing) => break,
            };
            match accepted {
                Ok((stream, from)) => {
                    let Some(place) = places.enter(from.ip()).await else { continue };
                    let served = connection(stream, from, place, (tls.clone(), router.clone()), over.clone());
                    connections.spawn(async move { drop(timeout(CONNECTION, served).await) });
                }
                Err(error) => {
                    warn!("cannot accept a connection to the sign-up: {error}");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        info!("the port of the sign-up is closed");
        while connections.join_next().await.is_some() {}
    }
}

/// Returns when the port is to be closed.
async fn closed(closing: &mut watch::Receiver<bool>) {
    // An error would mean that nobody can say so any more.
    let _ = closing.wait_for(|closing| *closing).await;
}

async fn connection(
    stream: TcpStream,
    from: SocketAddr,
    place: Place,
    (tls, router): (TlsAcceptor, Router),
    mut closing: watch::Receiver<bool>,
) {
    // Small answers leave at once. It fails only if the client is gone.
    let _ = stream.set_nodelay(true);
    let visit = place.visit();
    let shaken = tokio::select! {
        shaken = timeout(HEAD, tls.accept(stream)) => shaken,
        () = place.ended() => return,
        () = closed(&mut closing) => return,
    };
    let Ok(Ok(stream)) = shaken else { return };
    visit.greeted();
    let service = router.map_request(move |mut request: Request<_>| {
        request.extensions_mut().insert(ConnectInfo(from));
        request.extensions_mut().insert(Scheme::HTTPS);
        visit.busy();
        request
    });
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(BUFFER);
    let mut served = pin!(server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service)));
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = place.ended() => return,
        () = closed(&mut closing) => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        debug!("a connection to the sign-up ended: {error}");
    }
}
