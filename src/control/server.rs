//! The daemon's side of the control socket: accepts, and speaks HTTP. Bounded in clients, bytes and time. Must never
//! interpret an operation, nor cut one off.

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

/// What is served. Each request has the [`Peer`] among its extensions.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    /// What is answered on the thread of the socket, and must never wait: whoever looks has an answer while everything
    /// else waits for the disk.
    pub at_once: Router,
    /// What may take its time: carried out on the daemon's runtime, to its end, whether the client waits or not. Its
    /// fallback answers what is nowhere.
    pub operations: Router,
}

/// The bound socket of a daemon. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct ControlSocket {
    path: PathBuf,
    listener: StdListener,
}

impl ControlSocket {
    /// Makes the socket, readable and writable by its owner only, in the place of a left-over one.
    /// The caller holds the lock of the data folder, so that a left-over socket has no living owner.
    ///
    /// # Errors
    /// When the path is too long, something that is not a socket is in the way, or the kernel refuses.
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

    /// Serves on a thread of its own until `stopped` says so: whoever asks for the status has it while everything else
    /// here waits for the disk. Must be called inside a tokio runtime, which carries out the operations.
    ///
    /// # Errors
    /// When the system has no thread for it.
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
    /// When the runtime cannot take the socket over. Errors of single clients are logged at debug level.
    pub async fn serve(self, routes: Routes, shutdown: impl Future<Output = ()> + Send) -> io::Result<()> {
        self.serve_with(routes, Handle::current(), shutdown).await
    }

    /// Serves; `workers` carry out the operations.
    async fn serve_with(
        self,
        routes: Routes,
        workers: Handle,
        shutdown: impl Future<Output = ()> + Send,
    ) -> io::Result<()> {
        let listener = UnixListener::from_std(self.listener.try_clone()?)?;
        let slots = Arc::new(Semaphore::new(descriptors::budget().control.min(MAX_CLIENTS)));
        let desk = Desk { operations: Arc::new(Semaphore::new(MAX_OPERATIONS)), workers };
        let operations = routes.operations.layer(middleware::from_fn_with_state(desk, carry_out));
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
        // A left-over file does no harm: the next start removes it.
        let _ = fs::remove_file(&self.path);
    }
}

/// One request and its answer.
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
    // What a client has asked for before it went away is done.
    server.half_close(true);
    let written = async {
        answered.notified().await;
        sleep(STEP_TIMEOUT).await;
    };
    tokio::select! {
        served = server.serve_connection(TokioIo::new(stream), service) => Ok(served?),
        () = written => anyhow::bail!("the client does not take its answer"),
    }
}

/// Where operations are carried out.
#[derive(Clone, Debug)]
struct Desk {
    operations: Arc<Semaphore>,
    workers: Handle,
}

/// In a task of its own, so that a client that goes away, or no longer waits, cannot stop an operation half-way.
async fn carry_out(State(desk): State<Desk>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let body = match timeout(STEP_TIMEOUT, to_bytes(body, MAX_REQUEST)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => {
            let why = format!("the body of a request has at most {MAX_REQUEST} bytes");
            return refusal(StatusCode::PAYLOAD_TOO_LARGE, &why);
        }
        Err(_) => return refusal(StatusCode::REQUEST_TIMEOUT, "the request did not arrive in time"),
    };
    let Ok(slot) = desk.operations.try_acquire_owned() else {
        let why = format!("{MAX_OPERATIONS} operations are under way already: try again");
        return refusal(StatusCode::SERVICE_UNAVAILABLE, &why);
    };
    let task = desk.workers.spawn(async move {
        let response = next.run(Request::from_parts(parts, Body::from(body))).await;
        let response = whole(response).await;
        drop(slot);
        response
    });
    match timeout(OPERATION_TIMEOUT, task).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => {
            let why = format!("the operation ended without an outcome: {error}");
            refusal(StatusCode::INTERNAL_SERVER_ERROR, &why)
        }
        Err(_) => {
            let limit = OPERATION_TIMEOUT.as_secs();
            let why =
                format!("not done within {limit} s, and still under way: look at the status before you try again");
            refusal(StatusCode::GATEWAY_TIMEOUT, &why)
        }
    }
}

/// An answer that is there to its end, so that only its writing is left.
async fn whole(response: Response) -> Response {
    let (parts, body) = response.into_parts();
    match timeout(OPERATION_TIMEOUT, to_bytes(body, MAX_REPLY)).await {
        Ok(Ok(bytes)) => Response::from_parts(parts, Body::from(bytes)),
        // One of events has no end.
        Err(_) => refusal(StatusCode::CONFLICT, "the answer does not end"),
        Ok(Err(_)) => {
            let why = format!("the answer is longer than {MAX_REPLY} bytes: ask for fewer rows");
            refusal(StatusCode::CONFLICT, &why)
        }
    }
}

/// An answer that says no, and why, as the API does.
pub fn refusal(status: StatusCode, why: &str) -> Response {
    (status, Json(json!({ "err": why }))).into_response()
}
