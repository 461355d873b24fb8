//! The client's side of the control socket: blocking, bounded in time and bytes. Must never retry: the caller knows what
//! an unanswered request means.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream as StdStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::de::DeserializeOwned;
use socket2::{Domain, SockAddr, Socket, Type};
use thiserror::Error;

use super::{ApiReply, MAX_REPLY, Operation, Place, Reply, Request, check_path, encode};
use crate::node::Status;

/// Why there is no usable answer.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The path cannot be the path of a socket.
    #[error("{0}")]
    Path(String),
    /// Nobody answers on the socket.
    #[error("cannot connect to {path}: {error}", path = path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// Somebody took the request, but no complete answer came in time.
    #[error("no answer on {path}: {error}", path = path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// What went wrong while waiting.
        error: io::Error,
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

/// Asks the daemon behind `path` one thing and waits for the answer, `limit` at most.
///
/// # Errors
/// See [`ControlError`]; a refusal by the daemon is [`Reply::Err`], not an error here.
pub fn request(path: &Path, request: &Request, limit: Duration) -> Result<Reply, ControlError> {
    check_path(path).map_err(|error| ControlError::Path(error.to_string()))?;
    let deadline = Instant::now() + limit;
    let mut stream =
        connect(path, limit).map_err(|error| ControlError::Unreachable { path: path.to_owned(), error })?;
    let line = exchange(&mut stream, request, deadline)
        .map_err(|error| ControlError::NoAnswer { path: path.to_owned(), error })?;
    serde_json::from_slice(&line)
        .map_err(|error| ControlError::Malformed { path: path.to_owned(), why: error.to_string() })
}

/// Asks the daemon behind `path` for its status.
///
/// # Errors
/// Those of [`request`], and [`ControlError::Refused`].
pub fn status(path: &Path, limit: Duration) -> Result<Status, ControlError> {
    expect(path, &Request::Status {}, limit)
}

/// Has the daemon behind `path` carry out an operation, and waits for its answer.
///
/// # Errors
/// Those of [`request`], and [`ControlError::Refused`]. After [`ControlError::NoAnswer`] it may have been done.
pub fn operate<T: DeserializeOwned>(path: &Path, operation: Operation, limit: Duration) -> Result<T, ControlError> {
    expect(path, &Request::Administer { operation }, limit)
}

/// Has the daemon behind `path` carry out a request of the Console's API.
///
/// # Errors
/// Those of [`request`], and [`ControlError::Refused`] where there is no Console. What the API refuses is a reply.
pub fn api(
    path: &Path,
    method: &str,
    target: &str,
    body: Option<serde_json::Value>,
    limit: Duration,
) -> Result<ApiReply, ControlError> {
    expect(path, &Request::Api { method: method.to_owned(), path: target.to_owned(), body }, limit)
}

/// Asks the daemon behind `path` where the Consoles are.
///
/// # Errors
/// Those of [`request`], and [`ControlError::Refused`].
pub fn place(path: &Path, limit: Duration) -> Result<Place, ControlError> {
    expect(path, &Request::Place {}, limit)
}

fn expect<T: DeserializeOwned>(path: &Path, question: &Request, limit: Duration) -> Result<T, ControlError> {
    match request(path, question, limit)? {
        Reply::Ok(value) => serde_json::from_value(value)
            .map_err(|error| ControlError::Malformed { path: path.to_owned(), why: error.to_string() }),
        Reply::Err(why) => Err(ControlError::Refused(why)),
    }
}

/// A connection to the daemon behind `path`.
///
/// # Errors
/// What the kernel says.
pub fn connect(path: &Path, limit: Duration) -> io::Result<StdStream> {
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
