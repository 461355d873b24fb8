//! The daemon's side of the control socket: accepts, reads requests, writes replies. Bounded in clients, bytes and time.
//! Must never interpret an operation, nor cut one off.

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

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    runtime::{Builder, Handle},
    sync::{Semaphore, watch},
    time::timeout,
};

use super::{
    ControlHandler, MAX_CLIENTS, MAX_OPERATIONS, MAX_REPLY, MAX_REQUEST, OPERATION_TIMEOUT, Peer, Reply, Request,
    STEP_TIMEOUT, check_path, encode,
};
use crate::{descriptors, node::Status};

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

    /// Serves on a thread of its own until `stopped` says so: whoever asks for the status has it while everything else here
    /// waits for the disk. Must be called inside a tokio runtime, which carries out the operations.
    ///
    /// # Errors
    /// When the system has no thread for it.
    pub fn spawn(self, handler: Arc<dyn ControlHandler>, mut stopped: watch::Receiver<bool>) -> io::Result<()> {
        let (workers, own) = (Handle::current(), Builder::new_current_thread().enable_all().build()?);
        let stopped = async move { drop(stopped.wait_for(|stopped| *stopped).await) };
        let serve = move || {
            if let Err(error) = own.block_on(self.serve_with(handler, workers, stopped)) {
                tracing::error!(%error, "the control socket cannot be served");
            }
        };
        thread::Builder::new().name("control".to_owned()).spawn(serve).map(drop)
    }

    /// Answers clients until `shutdown` completes. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the runtime cannot take the socket over. Errors of single clients are logged at debug level.
    pub async fn serve(
        self,
        handler: Arc<dyn ControlHandler>,
        shutdown: impl Future<Output = ()> + Send,
    ) -> io::Result<()> {
        self.serve_with(handler, Handle::current(), shutdown).await
    }

    /// The same with operations that are carried out by `workers`.
    async fn serve_with(
        self,
        handler: Arc<dyn ControlHandler>,
        workers: Handle,
        shutdown: impl Future<Output = ()> + Send,
    ) -> io::Result<()> {
        let listener = UnixListener::from_std(self.listener.try_clone()?)?;
        let slots = Arc::new(Semaphore::new(descriptors::budget().control.min(MAX_CLIENTS)));
        let operations = Arc::new(Semaphore::new(MAX_OPERATIONS));
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
                    let (handler, operations) = (Arc::clone(&handler), Arc::clone(&operations));
                    let desk = Desk { handler, operations, workers: workers.clone() };
                    tokio::spawn(async move {
                        if let Err(error) = desk.converse(stream).await {
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

/// What became of an operation: its answer, or a sentence.
type Outcome = Result<serde_json::Value, String>;

/// Where requests are answered.
struct Desk {
    handler: Arc<dyn ControlHandler>,
    operations: Arc<Semaphore>,
    workers: Handle,
}

impl Desk {
    async fn converse(&self, mut stream: UnixStream) -> io::Result<()> {
        let peer = Peer::of(&stream)?;
        let (reader, mut writer) = stream.split();
        let mut reader = BufReader::new(reader);
        loop {
            let mut line = Vec::new();
            let mut limited = (&mut reader).take(MAX_REQUEST as u64);
            timeout(STEP_TIMEOUT, limited.read_until(b'\n', &mut line)).await??;
            if line.is_empty() {
                return Ok(());
            }
            let complete = line.ends_with(b"\n");
            let reply = if complete {
                self.answer(&peer, &line).await
            } else {
                Reply::Err(format!("a request is one line of at most {MAX_REQUEST} bytes"))
            };
            let mut bytes = encode(&reply)?;
            if bytes.len() > MAX_REPLY {
                bytes = encode(&Reply::Err(format!("the answer is longer than {MAX_REPLY} bytes")))?;
            }
            timeout(STEP_TIMEOUT, writer.write_all(&bytes)).await??;
            if !complete {
                return Ok(());
            }
        }
    }

    async fn answer(&self, peer: &Peer, line: &[u8]) -> Reply {
        let request = match serde_json::from_slice::<Request>(line) {
            Ok(request) => request,
            Err(error) => return Reply::Err(format!("request not understood: {error}")),
        };
        match request {
            Request::Status {} => {
                // Whoever reads a status, and passes it on for help, must not pass secrets on.
                let status = self.handler.status();
                let public = Status { membership: status.membership.public(), ..status.as_ref().clone() };
                match serde_json::to_value(public) {
                    Ok(value) => Reply::Ok(value),
                    Err(error) => Reply::Err(format!("cannot encode the status: {error}")),
                }
            }
            Request::Metrics {} => Reply::Ok(self.handler.metrics().into()),
            Request::Place {} => match serde_json::to_value(self.handler.place()) {
                Ok(value) => Reply::Ok(value),
                Err(error) => Reply::Err(format!("cannot encode the answer: {error}")),
            },
            Request::Api { method, path, body } => {
                let (handler, peer) = (Arc::clone(&self.handler), peer.clone());
                self.carry_out(async move { handler.api(peer, method, path, body).await }).await
            }
            Request::Administer { operation } => {
                let (handler, peer) = (Arc::clone(&self.handler), peer.clone());
                self.carry_out(async move { handler.administer(peer, operation).await }).await
            }
        }
    }

    /// In a task of its own, so that a client that goes away, or no longer waits, cannot stop an operation half-way.
    async fn carry_out(&self, work: impl Future<Output = Outcome> + Send + 'static) -> Reply {
        let Ok(slot) = Arc::clone(&self.operations).try_acquire_owned() else {
            return Reply::Err(format!("{MAX_OPERATIONS} operations are under way already: try again"));
        };
        let task = self.workers.spawn(async move {
            let outcome = work.await;
            drop(slot);
            outcome
        });
        match timeout(OPERATION_TIMEOUT, task).await {
            Ok(Ok(Ok(value))) => Reply::Ok(value),
            Ok(Ok(Err(why))) => Reply::Err(why),
            Ok(Err(error)) => Reply::Err(format!("the operation ended without an outcome: {error}")),
            Err(_) => Reply::Err(format!(
                "not done within {} s, and still under way: look at the status before you try again",
                OPERATION_TIMEOUT.as_secs()
            )),
        }
    }
}
