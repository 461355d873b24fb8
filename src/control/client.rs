//! The client's side of the control socket: blocking, bounded in time and bytes. Must never retry: the caller knows
//! what an unanswered request means.

use std::{
    fmt,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};
use thiserror::Error;
use ureq::{
    Agent, Body, SendBody,
    config::Config,
    http::{Method, Request, Response, StatusCode, Uri},
    unversioned::{
        resolver::{ResolvedSocketAddrs, Resolver},
        transport::{Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport},
    },
};

use super::{MAX_REPLY, check_path};
use crate::{mutex::locked, node::Status};

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

/// One request of the API, wherever it goes.
#[derive(Clone, PartialEq, Eq)]
pub struct Call {
    /// As HTTP has it.
    pub method: Method,
    /// Below `/api/v1/`, its parts encoded; one that begins with a slash is the whole.
    pub path: String,
    /// JSON, for methods that have one.
    pub body: Option<Value>,
}

impl fmt::Debug for Call {
    /// Without the body, which may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path)
    }
}

impl Call {
    fn new(method: Method, path: impl Into<String>) -> Self {
        Self { method, path: path.into(), body: None }
    }

    /// Asks for something.
    pub fn get(path: impl Into<String>) -> Self {
        Self::new(Method::GET, path)
    }

    /// Has something done.
    pub fn post(path: impl Into<String>) -> Self {
        Self::new(Method::POST, path)
    }

    /// Puts something in the place of what there is.
    pub fn put(path: impl Into<String>) -> Self {
        Self::new(Method::PUT, path)
    }

    /// Changes a part of something.
    pub fn patch(path: impl Into<String>) -> Self {
        Self::new(Method::PATCH, path)
    }

    /// Does away with something.
    pub fn delete(path: impl Into<String>) -> Self {
        Self::new(Method::DELETE, path)
    }

    /// With this body. It has no maps with keys that JSON lacks.
    #[must_use]
    pub fn with(self, body: impl Serialize) -> Self {
        Self { body: Some(serde_json::to_value(body).unwrap_or_default()), ..self }
    }

    /// The path as it is sent.
    pub fn target(&self) -> String {
        if self.path.starts_with('/') { self.path.clone() } else { format!("/api/v1/{}", self.path) }
    }

    /// Sends it to whoever answers at `base`, with what the Authorization header is to carry.
    ///
    /// # Errors
    /// When it cannot be sent, or no answer comes.
    pub fn run(&self, agent: &Agent, base: &str, login: Option<&str>) -> Result<Response<Body>, ureq::Error> {
        let mut request = Request::builder().method(self.method.clone()).uri(format!("{base}{}", self.target()));
        if let Some(login) = login {
            request = request.header("authorization", login);
        }
        match &self.body {
            Some(body) => agent.run(request.header("content-type", "application/json").body(body.to_string())?),
            None => agent.run(request.body(SendBody::none())?),
        }
    }
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Of HTTP.
    pub status: StatusCode,
    /// Its body.
    pub text: String,
}

impl Answer {
    /// Why the daemon says no.
    pub fn reason(&self) -> String {
        let value: Value = serde_json::from_str(&self.text).unwrap_or_default();
        value["err"].as_str().map_or_else(|| format!("HTTP status {}", self.status.as_u16()), str::to_owned)
    }
}

/// Asks the daemon behind `path` one thing and waits for the answer, `limit` at most.
///
/// # Errors
/// [`ControlError::Path`] or [`ControlError::Unreachable`] when nobody was asked, [`ControlError::NoAnswer`] when it
/// may have been done nevertheless, [`ControlError::Malformed`] when the answer cannot be understood. A refusal is an
/// answer here.
pub fn send(path: &Path, call: &Call, limit: Duration) -> Result<Answer, ControlError> {
    check_path(path).map_err(|error| ControlError::Path(error.to_string()))?;
    let unreachable = |error| ControlError::Unreachable { path: path.to_owned(), error };
    let wire = Wire(Mutex::new(Some(connect(path, limit).map_err(unreachable)?)));
    let config = Agent::config_builder().proxy(None).max_redirects(0).http_status_as_error(false);
    let config = config.timeout_global(Some(limit)).build();
    let failed = |error| failure(path, error);
    // Every request of HTTP/1.1 names a host, though nobody asks here for one.
    let sent = call.run(&Agent::with_parts(config, wire, Nowhere), "http://localhost", None);
    let mut response = sent.map_err(failed)?;
    let text = response.body_mut().with_config().limit(MAX_REPLY as u64 + 1).read_to_string().map_err(failed)?;
    Ok(Answer { status: response.status(), text })
}

/// Sends a request that must succeed. An answer without a body is `null`.
///
/// # Errors
/// [`ControlError::Refused`] with the reason when the daemon says no. Otherwise the error of [`send`].
/// [`ControlError::Malformed`] also when the answer is not a `T`.
pub fn ask<T: DeserializeOwned>(path: &Path, call: &Call, limit: Duration) -> Result<T, ControlError> {
    let answer = send(path, call, limit)?;
    if !answer.status.is_success() {
        return Err(ControlError::Refused(answer.reason()));
    }
    let text = if answer.text.is_empty() { "null" } else { &answer.text };
    serde_json::from_str(text)
        .map_err(|error| ControlError::Malformed { path: path.to_owned(), why: error.to_string() })
}

/// Asks the daemon behind `path` for its status.
///
/// # Errors
/// [`ControlError::Unreachable`] when no daemon runs there. Otherwise the error of [`ask`].
pub fn status(path: &Path, limit: Duration) -> Result<Status, ControlError> {
    ask(path, &Call::get("high-availability"), limit)
}

/// A connection to the daemon behind `path`.
///
/// # Errors
/// When nobody listens on the path, this user may not connect, or the daemon has too many connections waiting for
/// longer than `limit`.
pub fn connect(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // connect() on a Unix socket waits for room in the listener's queue, and the send time-out is what bounds that.
    socket.set_write_timeout(Some(limit))?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(socket.into())
}

fn failure(path: &Path, error: ureq::Error) -> ControlError {
    let path = path.to_owned();
    match error {
        ureq::Error::Io(error) => ControlError::NoAnswer { path, error },
        ureq::Error::Timeout(_) => ControlError::NoAnswer { path, error: io::ErrorKind::TimedOut.into() },
        other => ControlError::Malformed { path, why: other.to_string() },
    }
}

/// The connection that is there already, for the one request that it is for.
#[derive(Debug)]
struct Wire(Mutex<Option<UnixStream>>);

impl Connector for Wire {
    type Out = Stream;

    fn connect(&self, details: &ConnectionDetails, _: Option<()>) -> Result<Option<Stream>, ureq::Error> {
        let buffers = LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(locked(&self.0).take().map(|stream| Stream { stream, buffers }))
    }
}

/// No name has to be looked up.
#[derive(Debug)]
struct Nowhere;

impl Resolver for Nowhere {
    fn resolve(&self, _: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let mut addresses = self.empty();
        addresses.push(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        Ok(addresses)
    }
}

#[derive(Debug)]
struct Stream {
    stream: UnixStream,
    buffers: LazyBuffers,
}

impl Transport for Stream {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.stream.set_write_timeout(timeout.not_zero().map(|left| *left))?;
        let sent = self.stream.write_all(&self.buffers.output()[..amount]);
        sent.map_err(|error| in_time(error, timeout))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.stream.set_read_timeout(timeout.not_zero().map(|left| *left))?;
        let count = loop {
            match self.stream.read(self.buffers.input_append_buf()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read.map_err(|error| in_time(error, timeout))?,
            }
        };
        self.buffers.input_appended(count);
        Ok(count > 0)
    }

    fn is_open(&mut self) -> bool {
        // For one request.
        false
    }
}

fn in_time(error: io::Error, timeout: NextTimeout) -> ureq::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ureq::Error::Timeout(timeout.reason),
        _ => error.into(),
    }
}
