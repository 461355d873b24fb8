//! The daemon's side of the control socket: accepts connections and speaks HTTP, with limits of clients, size and time.
//! Must never interpret an operation, or cut one off.

use std::{
    fs,
    future::Future,
    io,
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::UnixListener as StdListener,
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, to_bytes},
    extract::{Request, State},
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use serde_json::json;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    net::{UnixListener, UnixStream},
    runtime::{Builder, Handle},
    sync::{Notify, Semaphore, watch},
    time::{sleep, timeout},
};
use tower::ServiceExt;

use super::{MAX_CLIENTS, MAX_OPERATIONS, MAX_REPLY, MAX_REQUEST, OPERATION_TIMEOUT, Peer, STEP_TIMEOUT, check_path};
use crate::descriptors;

/// What is served. Each request has its [`Peer`] among its extensions.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    /// Answered on the thread of the socket. It must never wait: it still answers while everything else waits for the
    /// disk.
    pub at_once: Router,
    /// Everything that may take time. It runs on the daemon's runtime to its end, whether the client waits or not. Its
    /// fallback answers unknown paths.
    pub operations: Router,
}

/// The bound socket of a daemon. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct ControlSocket {
    path: PathBuf,
    listener: StdListener,
}

impl ControlSocket {
    /// Creates the socket, readable and writable by its owner only. It replaces a left-over one: the caller holds the
    /// lock of the data folder, so no living process owns that.
    ///
    /// # Errors
    /// When the path is too long, something else than a socket is in the way, or the kernel refuses.
    pub fn bind(path: &Path) -> io::Result<Self> {
        check_path(path)?;
        match fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => fs::remove_file(path)?,
            Ok(_) => {
                let text = format!("{} exists and is not a socket: move it away", path.display());
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.bind(&SockAddr::unix(path)?)?;
        // Nobody can connect before listen(), so the permissions are in force before the first client.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        socket.listen(MAX_CLIENTS as i32)?;
        socket.set_nonblocking(true)?;
        Ok(Self { path: path.to_owned(), listener: socket.into() })
    }

    /// Serves on a thread of its own until `stopped` is true, so that the status is answered even while everything else
    /// waits for the disk. Must be called inside a tokio runtime, which runs the operations.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn spawn(self, routes: Routes, mut stopped: watch::Receiver<bool>) -> io::Result<()> {
        let (workers, own) = (Handle::current(), Builder::new_current_thread().enable_all().build()?);
        let stopped = async move { drop(stopped.wait_for(|stopped| *stopped).await) };
        let serve = move || {
            if let Err(error) = own.block_on(self.serve_with(routes, workers, stopped)) {
                tracing::error!(%error, "the control socket cannot be served");
            }
        };
        thread::Builder::new().name("control".to_owned()).spawn(serve).map(drop)
    }

    /// Answers clients until `shutdown` completes. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the runtime cannot take over the socket. Errors of single clients are logged at debug level.
    pub async fn serve(self, routes: Routes, shutdown: impl Future<Output = ()> + Send) -> io::Result<()> {
        self.serve_with(routes, Handle::current(), shutdown).await
    }

    /// Serves. `workers` run the operations.
    async fn serve_with(
        self,
        routes: Routes,
        workers: Handle,
        shutdown: impl Future<Output = ()> + Send,
    ) -> io::Result<()> {
        let listener = UnixListener::from_std(self.listener.try_clone()?)?;
        let slots = Arc::new(Semaphore::new(descriptors::budget().control.min(MAX_CLIENTS)));
        let limited = Workers { slots: Arc::new(Semaphore::new(MAX_OPERATIONS)), runtime: workers };
        let operations = routes.operations.layer(middleware::from_fn_with_state(limited, carry_out));
        let router = routes.at_once.fallback_service(operations);
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            let accepted = async {
                let slot = Arc::clone(&slots).acquire_owned().await;
                (slot, listener.accept().await)
            };
            let (slot, accepted) = tokio::select! {
                accepted = accepted => accepted,
                () = &mut shutdown => return Ok(()),
            };
            match accepted {
                Ok((stream, _)) => {
                    let router = router.clone();
                    tokio::spawn(async move {
                        if let Err(error) = converse(router, stream).await {
                            tracing::debug!(%error, "control client gone");
                        }
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a control client");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // A left-over file does no harm: the next start replaces it.
        let _ = fs::remove_file(&self.path);
    }
}

/// Reads one request and writes its answer.
async fn converse(router: Router, stream: UnixStream) -> anyhow::Result<()> {
    let (peer, answered) = (Peer::of(&stream)?, Arc::new(Notify::new()));
    let there = Arc::clone(&answered);
    let service = router.map_request(move |mut request: axum::http::Request<_>| {
        request.extensions_mut().insert(peer.clone());
        request
    });
    let service = TowerToHyperService::new(service.map_response(move |response| {
        there.notify_one();
        response
    }));
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(STEP_TIMEOUT).max_buf_size(MAX_REQUEST).keep_alive(false);
    // What a client has asked for is done even if it goes away.
    server.half_close(true);
    let written = async {
        answered.notified().await;
        sleep(STEP_TIMEOUT).await;
    };
    tokio::select! {
        served = server.serve_connection(TokioIo::new(stream), service) => Ok(served?),
        () = written => anyhow::bail!("the client does not read its answer"),
    }
}

/// Where operations run, and how many more may.
#[derive(Clone, Debug)]
struct Workers {
    slots: Arc<Semaphore>,
    runtime: Handle,
}

/// Runs an operation in a task of its own, so that a client that goes away, or no longer waits, cannot stop it
/// half-way.
async fn carry_out(State(workers): State<Workers>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let body = match timeout(STEP_TIMEOUT, to_bytes(body, MAX_REQUEST)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => {
            let why = format!("the body of a request has at most {MAX_REQUEST} bytes");
            return refusal(StatusCode::PAYLOAD_TOO_LARGE, &why);
        }
        Err(_) => return refusal(StatusCode::REQUEST_TIMEOUT, "the request did not arrive in time"),
    };
    let Ok(slot) = workers.slots.try_acquire_owned() else {
        let why = format!("{MAX_OPERATIONS} operations are under way already: try again later");
        return refusal(StatusCode::SERVICE_UNAVAILABLE, &why);
    };
    let task = workers.runtime.spawn(async move {
        let response = next.run(Request::from_parts(parts, Body::from(body))).await;
        let response = whole(response).await;
        drop(slot);
        response
    });
    match timeout(OPERATION_TIMEOUT, task).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => {
            let why = format!("the operation ended without a result: {error}");
            refusal(StatusCode::INTERNAL_SERVER_ERROR, &why)
        }
        Err(_) => {
            let limit = OPERATION_TIMEOUT.as_secs();
            let why = format!("not done within {limit} s, and still under way: check the status before you try again");
            refusal(StatusCode::GATEWAY_TIMEOUT, &why)
        }
    }
}

/// Collects the whole answer, so that only writing it is left to do.
async fn whole(response: Response) -> Response {
    let (parts, body) = response.into_parts();
    match timeout(OPERATION_TIMEOUT, to_bytes(body, MAX_REPLY)).await {
        Ok(Ok(bytes)) => Response::from_parts(parts, Body::from(bytes)),
        // A stream of events has no end.
        Err(_) => refusal(StatusCode::CONFLICT, "the answer does not end"),
        Ok(Err(_)) => {
            let why = format!("the answer is longer than {MAX_REPLY} bytes: ask for fewer rows");
            refusal(StatusCode::CONFLICT, &why)
        }
    }
}

/// An answer that refuses and says why, in the form of the API.
pub fn refusal(status: StatusCode, why: &str) -> Response {
    (status, Json(json!({ "err": why }))).into_response()
}
