//! The client's side of the control socket: blocking, with limits of time and size. Must never retry: only the caller
//! knows what an unanswered request means.

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

/// Why there is no answer that can be used.
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
    /// The request was sent, but no complete answer came in time. It may have been carried out.
    #[error("no answer on {path}: {error}", path = path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// What went wrong while waiting.
        error: io::Error,
    },
    /// This program does not understand the answer: the other side may be another version.
    #[error("answer on {path} not understood: {why}", path = path.display())]
    Malformed {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The daemon refused the request. It says why.
    #[error("{0}")]
    Refused(String),
}

/// One request to the API, wherever it is sent.
#[derive(Clone, PartialEq, Eq)]
pub struct Call {
    /// The method of HTTP.
    pub method: Method,
    /// The path below `/api/v1/`, its parts encoded. One that begins with a slash is sent as it is.
    pub path: String,
    /// A body of JSON, for methods that have one.
    pub body: Option<Value>,
}

impl fmt::Debug for Call {
    /// Leaves out the body, which may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path)
    }
}

impl Call {
    fn new(method: Method, path: impl Into<String>) -> Self {
        Self { method, path: path.into(), body: None }
    }

    /// A request to read something.
    pub fn get(path: impl Into<String>) -> Self {
        Self::new(Method::GET, path)
    }

    /// A request to do something.
    pub fn post(path: impl Into<String>) -> Self {
        Self::new(Method::POST, path)
    }

    /// A request to replace something.
    pub fn put(path: impl Into<String>) -> Self {
        Self::new(Method::PUT, path)
    }

    /// A request to change a part of something.
    pub fn patch(path: impl Into<String>) -> Self {
        Self::new(Method::PATCH, path)
    }

    /// A request to delete something.
    pub fn delete(path: impl Into<String>) -> Self {
        Self::new(Method::DELETE, path)
    }

    /// Adds a body. The keys of its maps must be strings: otherwise the body is `null`.
    #[must_use]
    pub fn with(self, body: impl Serialize) -> Self {
        Self { body: Some(serde_json::to_value(body).unwrap_or_default()), ..self }
    }

    /// The path as it is sent.
    pub fn target(&self) -> String {
        if self.path.starts_with('/') { self.path.clone() } else { format!("/api/v1/{}", self.path) }
    }

    /// Sends it to `base`, a scheme with a host and a port, with `login` as its Authorization header.
    ///
    /// # Errors
    /// When it cannot be sent, or no answer comes in the time that `agent` allows.
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
    /// The status of HTTP.
    pub status: StatusCode,
    /// Its body.
    pub text: String,
}

impl Answer {
    /// Why the daemon refused, or else the status.
    pub fn reason(&self) -> String {
        let value: Value = serde_json::from_str(&self.text).unwrap_or_default();
        value["err"].as_str().map_or_else(|| format!("HTTP status {}", self.status.as_u16()), str::to_owned)
    }
}

/// Sends one request to the daemon on the socket `path`, and waits for the answer for at most `limit`.
///
/// # Errors
/// [`ControlError::Path`] or [`ControlError::Unreachable`] when nothing was sent, [`ControlError::NoAnswer`] when the
/// request may have been carried out all the same, [`ControlError::Malformed`] when the answer cannot be understood. A
/// refusal is an [`Answer`], and no error.
pub fn send(path: &Path, call: &Call, limit: Duration) -> Result<Answer, ControlError> {
    check_path(path).map_err(|error| ControlError::Path(error.to_string()))?;
    let unreachable = |error| ControlError::Unreachable { path: path.to_owned(), error };
    let connector = OneConnection(Mutex::new(Some(connect(path, limit).map_err(unreachable)?)));
    let config = Agent::config_builder().proxy(None).max_redirects(0).http_status_as_error(false);
    let config = config.timeout_global(Some(limit)).build();
    let failed = |error| failure(path, error);
    // Every request of HTTP/1.1 names a host, though nobody reads it here.
    let sent = call.run(&Agent::with_parts(config, connector, FixedAddress), "http://localhost", None);
    let mut response = sent.map_err(failed)?;
    let text = response.body_mut().with_config().limit(MAX_REPLY as u64 + 1).read_to_string().map_err(failed)?;
    Ok(Answer { status: response.status(), text })
}

/// Sends a request that must succeed, and decodes the answer. One without a body is decoded as `null`.
///
/// # Errors
/// [`ControlError::Refused`] with the reason when the daemon refuses. [`ControlError::Malformed`] also when the answer
/// is not a `T`. Otherwise the error of [`send`].
pub fn ask<T: DeserializeOwned>(path: &Path, call: &Call, limit: Duration) -> Result<T, ControlError> {
    let answer = send(path, call, limit)?;
    if !answer.status.is_success() {
        return Err(ControlError::Refused(answer.reason()));
    }
    let text = if answer.text.is_empty() { "null" } else { &answer.text };
    serde_json::from_str(text)
        .map_err(|error| ControlError::Malformed { path: path.to_owned(), why: error.to_string() })
}

/// Asks the daemon on the socket `path` for its status.
///
/// # Errors
/// [`ControlError::Unreachable`] when no daemon runs there. Otherwise the error of [`ask`].
pub fn status(path: &Path, limit: Duration) -> Result<Status, ControlError> {
    ask(path, &Call::get("high-availability"), limit)
}

/// Connects to the daemon on the socket `path`.
///
/// # Errors
/// When nobody listens on the path, when this user may not connect, or when the queue of connections stays full for
/// `limit`.
pub fn connect(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // connect() on a Unix socket waits for room in the listener's queue, for as long as the time-out of sending allows.
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

/// Hands out the connection that is there already, once.
#[derive(Debug)]
struct OneConnection(Mutex<Option<UnixStream>>);

impl Connector for OneConnection {
    type Out = Stream;

    fn connect(&self, details: &ConnectionDetails, _: Option<()>) -> Result<Option<Stream>, ureq::Error> {
        let buffers = LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(locked(&self.0).take().map(|stream| Stream { stream, buffers }))
    }
}

/// Resolves every name to the same address, which nobody uses.
#[derive(Debug)]
struct FixedAddress;

impl Resolver for FixedAddress {
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
        sent.map_err(|error| with_reason(error, timeout))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.stream.set_read_timeout(timeout.not_zero().map(|left| *left))?;
        let count = loop {
            match self.stream.read(self.buffers.input_append_buf()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read.map_err(|error| with_reason(error, timeout))?,
            }
        };
        self.buffers.input_appended(count);
        Ok(count > 0)
    }

    fn is_open(&mut self) -> bool {
        // It is for one request only.
        false
    }
}

fn with_reason(error: io::Error, timeout: NextTimeout) -> ureq::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ureq::Error::Timeout(timeout.reason),
        _ => error.into(),
    }
}
