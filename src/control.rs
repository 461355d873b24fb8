//! The local administration socket: a Unix stream socket that speaks one JSON object per line, in both directions.
//! Owns the protocol, its limits, the server side in the daemon and the blocking client. Must never decide anything: what a
//! request means is up to the [`ControlHandler`], and who may ask is up to the file permissions (owner only).

use std::{
    fs,
    future::Future,
    io::{self, Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, PermissionsExt},
        net::{UnixListener as StdListener, UnixStream as StdStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, Type};
use thiserror::Error;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::timeout,
};

use crate::node::Status;

/// Name of the socket in the data folder.
pub const SOCKET_NAME: &str = "control.sock";
/// Longest request line in bytes, newline included.
pub const MAX_REQUEST: usize = 64 * 1024;
/// Longest reply line in bytes, newline included: the text of all metrics fits many times.
pub const MAX_REPLY: usize = 1024 * 1024;
/// Clients served at the same time; further ones wait in the kernel's queue.
pub const MAX_CLIENTS: usize = 16;
/// Longest time for one step of a conversation: reading a request or writing its reply.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// `sun_path` of Linux holds 108 bytes, one of them the closing zero (unix(7)).
const MAX_PATH: usize = 107;

/// What an administrator may ask for. On the wire: `{"command":"status"}`, `{"command":"step-down","reason":"..."}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The node's [`Status`].
    Status {},
    /// Hand the PRIMARY role over to another member. The reason is logged.
    StepDown {
        /// Why, in the administrator's words.
        reason: String,
    },
    /// The metrics in Prometheus text format, as one JSON string.
    Metrics {},
}

/// The answer to one request: `{"ok": ...}` or `{"err": "..."}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply {
    /// It was done; the value is what was asked for, `null` when there is nothing to tell.
    Ok(serde_json::Value),
    /// It was not done, and why, as one sentence.
    Err(String),
}

/// Why there is no usable answer.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The path cannot be the path of a socket.
    #[error("{0}")]
    Path(String),
    /// Nobody answers on the socket.
    #[error("cannot connect to {path}: {source}", path = path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody took the request, but no complete answer came in time.
    #[error("no answer on {path}: {source}", path = path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// What went wrong while waiting.
        source: io::Error,
    },
    /// The answer is not what this program understands.
    #[error("answer on {path} not understood: {why}", path = path.display())]
    Malformed {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The daemon understood the request and refused it.
    #[error("{0}")]
    Refused(String),
}

/// What the daemon does for its local administrator. The calls are short: they run on the runtime's threads.
pub trait ControlHandler: Send + Sync {
    /// The newest picture of this node.
    fn status(&self) -> Arc<Status>;

    /// Starts to hand the PRIMARY role over; does not wait until that is done.
    ///
    /// # Errors
    /// One sentence for the administrator, for example that this node is not PRIMARY.
    fn step_down(&self, reason: &str) -> Result<(), String>;

    /// All metrics in Prometheus text format.
    fn metrics(&self) -> String {
        String::new()
    }
}

fn check_path(path: &Path) -> io::Result<()> {
    let length = path.as_os_str().as_bytes().len();
    if length <= MAX_PATH {
        return Ok(());
    }
    let text = format!(
        "control socket path {} has {length} bytes, the kernel allows {MAX_PATH}: choose a shorter folder",
        path.display()
    );
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
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

    /// Answers clients until `shutdown` completes. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the runtime cannot take the socket over. Errors of single clients are logged at debug level.
    pub async fn serve(
        self,
        handler: Arc<dyn ControlHandler>,
        shutdown: impl Future<Output = ()> + Send,
    ) -> io::Result<()> {
        let listener = UnixListener::from_std(self.listener.try_clone()?)?;
        let slots = Arc::new(Semaphore::new(MAX_CLIENTS));
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
                    let handler = Arc::clone(&handler);
                    tokio::spawn(async move {
                        if let Err(error) = converse(stream, handler.as_ref()).await {
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

/// [`ControlSocket::bind`] and [`ControlSocket::serve`] in one call.
///
/// # Errors
/// Those of the two.
pub async fn serve(
    path: &Path,
    handler: Arc<dyn ControlHandler>,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    ControlSocket::bind(path)?.serve(handler, shutdown).await
}

async fn converse(mut stream: UnixStream, handler: &dyn ControlHandler) -> io::Result<()> {
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
            answer(&line, handler)
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

fn answer(line: &[u8], handler: &dyn ControlHandler) -> Reply {
    let request = match serde_json::from_slice::<Request>(line) {
        Ok(request) => request,
        Err(error) => return Reply::Err(format!("request not understood: {error}")),
    };
    match request {
        Request::Status {} => match serde_json::to_value(handler.status().as_ref()) {
            Ok(value) => Reply::Ok(value),
            Err(error) => Reply::Err(format!("cannot encode the status: {error}")),
        },
        Request::StepDown { reason } => match handler.step_down(&reason) {
            Ok(()) => Reply::Ok(serde_json::Value::Null),
            Err(why) => Reply::Err(why),
        },
        Request::Metrics {} => Reply::Ok(handler.metrics().into()),
    }
}

fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(message)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Asks the daemon behind `path` one thing and waits for the answer, `limit` at most.
///
/// # Errors
/// See [`ControlError`]; a refusal by the daemon is [`Reply::Err`], not an error here.
pub fn request(path: &Path, request: &Request, limit: Duration) -> Result<Reply, ControlError> {
    check_path(path).map_err(|error| ControlError::Path(error.to_string()))?;
    let deadline = Instant::now() + limit;
    let mut stream =
        connect(path, limit).map_err(|source| ControlError::Unreachable { path: path.to_owned(), source })?;
    let line = exchange(&mut stream, request, deadline)
        .map_err(|source| ControlError::NoAnswer { path: path.to_owned(), source })?;
    serde_json::from_slice(&line)
        .map_err(|error| ControlError::Malformed { path: path.to_owned(), why: error.to_string() })
}

/// Asks the daemon behind `path` for its status.
///
/// # Errors
/// Those of [`request`], and [`ControlError::Refused`].
pub fn status(path: &Path, limit: Duration) -> Result<Status, ControlError> {
    match request(path, &Request::Status {}, limit)? {
        Reply::Ok(value) => serde_json::from_value(value)
            .map_err(|error| ControlError::Malformed { path: path.to_owned(), why: error.to_string() }),
        Reply::Err(why) => Err(ControlError::Refused(why)),
    }
}

fn connect(path: &Path, limit: Duration) -> io::Result<StdStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // connect() on a Unix socket waits for room in the listener's queue, and the send time-out is what bounds that.
    socket.set_write_timeout(Some(limit))?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(socket.into())
}

fn exchange(stream: &mut StdStream, request: &Request, deadline: Instant) -> io::Result<Vec<u8>> {
    stream.write_all(&encode(request)?)?;
    let mut line = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let count = match stream.read(&mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        line.extend_from_slice(&chunk[..count]);
        if line.ends_with(b"\n") {
            return Ok(line);
        }
        if line.len() > MAX_REPLY {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is too long"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{ClusterId, Role};
    use std::thread;
    use tokio::sync::oneshot;

    struct Fake;

    impl ControlHandler for Fake {
        fn status(&self) -> Arc<Status> {
            Arc::new(Status {
                cluster: ClusterId(7),
                node: 1,
                name: "node1".into(),
                version: "1.2.3".into(),
                role: Role::Secondary,
                reason: "another node is PRIMARY".into(),
                epoch: 4,
                primary: Some(2),
                applied: 10,
                committed: 11,
                lease_ms: None,
                members: Vec::new(),
                membership: crate::cluster::Membership::founded(ClusterId(7), Vec::new()),
                warnings: Vec::new(),
                database: None,
            })
        }

        fn step_down(&self, reason: &str) -> Result<(), String> {
            if reason == "test" { Ok(()) } else { Err("this node is not PRIMARY".into()) }
        }

        fn metrics(&self) -> String {
            "twistlock_role 1\n".into()
        }
    }

    /// Runs `test` against a served socket, then shuts the server down and checks that the file is gone.
    fn with_server(test: impl FnOnce(&Path)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SOCKET_NAME);
        let (stop, stopped) = oneshot::channel::<()>();
        let socket = ControlSocket::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let shutdown = async move { stopped.await.unwrap_or(()) };
            runtime.block_on(socket.serve(Arc::new(Fake), shutdown)).unwrap();
        });
        test(&path);
        stop.send(()).unwrap();
        server.join().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn questions_are_answered() {
        with_server(|path| {
            let limit = Duration::from_secs(10);
            let mode = fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            let status = status(path, limit).unwrap();
            assert_eq!((status.name.as_str(), status.epoch, status.primary), ("node1", 4, Some(2)));
            let ask = |reason: &str| request(path, &Request::StepDown { reason: reason.into() }, limit).unwrap();
            assert_eq!(ask("test"), Reply::Ok(serde_json::Value::Null));
            assert_eq!(ask("other"), Reply::Err("this node is not PRIMARY".into()));
            let metrics = request(path, &Request::Metrics {}, limit).unwrap();
            assert_eq!(metrics, Reply::Ok("twistlock_role 1\n".into()));
        });
    }

    fn raw(path: &Path, bytes: &[u8]) -> String {
        let mut stream = StdStream::connect(path).unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn the_wire_format_is_fixed_and_nonsense_is_refused() {
        with_server(|path| {
            let two = raw(path, b"{\"command\":\"step-down\",\"reason\":\"test\"}\n{\"command\":\"metrics\"}\n");
            assert_eq!(two, "{\"ok\":null}\n{\"ok\":\"twistlock_role 1\\n\"}\n");
            assert!(raw(path, b"{\"command\":\"explode\"}\n").starts_with("{\"err\":\"request not understood"));
            assert!(raw(path, b"\xff\n").starts_with("{\"err\":\"request not understood"));
            assert!(raw(path, b"{\"command\":\"status\"}").starts_with("{\"err\":\"a request is one line"));
        });
    }

    #[test]
    fn more_clients_than_slots_are_served_in_turn() {
        with_server(|path| {
            let clients: Vec<_> = (0..3 * MAX_CLIENTS)
                .map(|_| {
                    let path = path.to_owned();
                    thread::spawn(move || status(&path, Duration::from_secs(20)).map(|status| status.node))
                })
                .collect();
            for client in clients {
                assert_eq!(client.join().unwrap().unwrap(), 1);
            }
        });
    }

    #[test]
    fn paths_are_checked_before_anything_is_touched() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("x".repeat(120));
        assert!(ControlSocket::bind(&long).unwrap_err().to_string().contains("the kernel allows 107"));
        assert!(matches!(status(&long, STEP_TIMEOUT), Err(ControlError::Path(_))));
        let file = folder.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert!(ControlSocket::bind(&file).unwrap_err().to_string().contains("is not a socket"));
        assert_eq!(fs::read(&file).unwrap(), b"precious");
        let missing = folder.path().join("missing");
        assert!(matches!(status(&missing, STEP_TIMEOUT), Err(ControlError::Unreachable { .. })));
    }

    #[test]
    fn a_frozen_daemon_is_given_up_in_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SOCKET_NAME);
        let _never_served = ControlSocket::bind(&path).unwrap();
        let limit = Duration::from_millis(50);
        assert!(matches!(status(&path, limit), Err(ControlError::NoAnswer { .. })));
    }
}
