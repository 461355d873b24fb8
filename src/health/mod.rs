//! The health port: plain HTTP for load balancers and monitors on every member, also where the Console's ports are closed. Owns its
//! listener and what it answers. Must never say that this node serves unless it does while the bytes leave, never take part in
//! a decision, and never show secrets or who the members are.
//!
//! Each connection carries one request: a check opens one, gets its answer and is done, and an idle client holds nothing.

mod answers;
mod checks;
mod claim;
mod metrics;

use std::{fmt, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use axum::{Router, extract::ConnectInfo};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::{sleep, timeout},
};
use tower::ServiceExt;

use crate::{
    clients::places::{Acquaintances, Place, Places},
    descriptors,
    node::{Handle, Lease, Pulse, Status},
};
use claim::{Claim, ClaimedStream};

pub use metrics::{MetricsPage, Permission};

/// Longest time for the head of a request.
const HEAD: Duration = Duration::from_secs(2);
/// Longest life of a connection.
const CONNECTION: Duration = Duration::from_secs(10);
/// Largest head of a request in bytes, and the size of the buffers: the smallest that hyper takes.
const BUFFER: usize = 8 << 10;
/// Connections that the kernel keeps waiting.
const BACKLOG: i32 = 128;
/// Wait before the next attempt to open the port.
const RETRY: Duration = Duration::from_secs(1);
/// Pause after an error of accept that does not pass at once, as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the answers are made of.
#[derive(Clone)]
pub struct Sources {
    pub status: watch::Receiver<Arc<Status>>,
    pub lease: Lease,
    pub pulse: Pulse,
    /// Whether the Console's ports are open.
    pub open: Arc<dyn Fn() -> bool + Send + Sync>,
    /// Folder of the certificates.
    pub certificates: PathBuf,
    pub metrics: MetricsPage,
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").field("lease", &self.lease).field("pulse", &self.pulse).finish_non_exhaustive()
    }
}

impl Sources {
    /// The epoch in which this node serves clients at this very moment: it is PRIMARY, its lease is valid and its ports are open.
    fn serves(&self) -> Option<u64> {
        let epoch = self.status.borrow().serving()?;
        ((self.open)() && self.lease.is_valid()).then_some(epoch)
    }
}

/// Serves the health port until the task is dropped or the node ends. A port that cannot be opened is tried again and again: a
/// cluster must not lose a member because a monitor's port is taken. The status shows why.
pub async fn serve(address: SocketAddr, sources: Sources, node: Handle) {
    const ABOUT: &str = "health";
    let mut shown = None;
    let listener = loop {
        let problem = match listen(address) {
            Ok(listener) => break listener,
            Err(error) => format!("the health port {address} is not open: {error}; does another program use it?"),
        };
        if shown.as_ref() != Some(&problem) {
            tracing::warn!("{problem}");
            node.warn(ABOUT, Some(problem.clone()));
            shown = Some(problem);
        }
        sleep(RETRY).await;
    };
    if shown.is_some() {
        node.warn(ABOUT, None);
    }
    tracing::info!(%address, "the health port is open");
    accept(&listener, sources).await;
}

/// Listens on an address; on the unspecified IPv6 one for all interfaces of both families.
///
/// # Errors
/// When the address is not one of this host, or the port is taken.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // For connections of an earlier process that the kernel still remembers.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

async fn accept(listener: &TcpListener, sources: Sources) {
    let (room, members) = (descriptors::room(descriptors::budget().health), Acquaintances::new());
    let places = Places::new("health", room, Arc::clone(&members));
    let router = answers::router(sources.clone());
    let mut ended = sources.status.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = node_ends(&mut ended) => return,
        };
        match accepted {
            Ok((stream, from)) => {
                members.set_members(sources.status.borrow().membership.addresses());
                let Some(place) = places.enter(from.ip()).await else { continue };
                let claim = Claim::new(sources.clone());
                let router = router.clone();
                tokio::spawn(async move {
                    // A client that is too slow is dropped; what it missed is not worth a line.
                    let _ = timeout(CONNECTION, connection(stream, from, &place, claim, router)).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept a connection to the health port: {error}");
                if descriptors::are_short(&error) {
                    places.make_room();
                }
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn node_ends(status: &mut watch::Receiver<Arc<Status>>) {
    while status.changed().await.is_ok() {}
}

async fn connection(stream: TcpStream, from: SocketAddr, place: &Place, claim: Arc<Claim>, router: Router) {
    // Small answers leave at once. It fails only if the client is gone.
    let _ = stream.set_nodelay(true);
    let stream = ClaimedStream::new(stream, Arc::clone(&claim));
    let visit = place.visit();
    let service = router.map_request(move |mut request: axum::extract::Request<_>| {
        request.extensions_mut().insert(Arc::clone(&claim));
        request.extensions_mut().insert(ConnectInfo(from));
        visit.busy();
        request
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(BUFFER)
        // An answer that claims the role is checked as its connection's; see `claim`.
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    tokio::select! {
        () = place.ended() => {}
        served = served => if let Err(error) = served {
            tracing::debug!("a connection to the health port ended: {error}");
        }
    }
}
