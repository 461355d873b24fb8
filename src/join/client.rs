//! Asks the Consoles of a cluster over HTTPS. Blocking: runs on threads that may wait. Must never trust another
//! authority than the one it was given, follow a redirect, or read an answer without a bound.
//!
//! It dials the members' addresses and asks each for [`CONSOLE_NAME`]: for that name alone, a Console always has a
//! certificate of the cluster's authority.

use std::{
    net::{IpAddr, ToSocketAddrs, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result};
use ureq::{Agent, Body, http::Response};

use super::{JoinFile, JoinRequest, RequestState};
use crate::{
    https::{self, Limits, Trust},
    pki::CONSOLE_NAME,
};

/// Longest time for one question.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest time until a connection is there: an address may swallow packets.
const CONNECT: Duration = Duration::from_secs(3);
/// Longest answer in bytes.
const ANSWER: u64 = 256 << 10;

/// What a Console says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    State(Box<RequestState>),
    /// There is no such request (any more).
    NotFound,
    /// The token does not permit it.
    Denied(String),
    /// Something is in the way that an administrator has to change.
    Refused(String),
    /// Nobody gave an answer that counts: one sentence for each address.
    Nobody(String),
}

/// A client that trusts one authority only.
pub(super) struct Client {
    consoles: Vec<Console>,
    token: String,
}

/// One Console, with connections of its own.
struct Console {
    address: String,
    agent: Agent,
}

impl Console {
    fn url(&self, path: &str) -> String {
        format!("https://{CONSOLE_NAME}/api/v1/high-availability/{path}")
    }
}

impl Client {
    /// Gets ready to ask the Consoles of a join file. Connects to none of them yet.
    ///
    /// # Errors
    /// When the CA of the file cannot be read, or an address is not one.
    pub fn new(file: &JoinFile) -> Result<Self> {
        let trust = Trust::pem(file.ca.as_bytes()).context("read the CA of the join file")?;
        let limits = Limits { connect: CONNECT, request: LIMIT };
        let console = |address: &String| {
            let agent = https::client_at(&trust, limits, address)?;
            Ok::<_, anyhow::Error>(Console { address: address.clone(), agent })
        };
        let consoles = file.addresses.iter().map(console).collect::<Result<_>>()?;
        Ok(Self { consoles, token: file.token.clone() })
    }

    /// Makes a request to join; `request` is told from which address of this host the Console is reached. Returns who
    /// answered, too.
    pub fn ask(&self, request: impl Fn(Option<IpAddr>) -> JoinRequest) -> (String, Answer) {
        self.first(|console| {
            let call = console.agent.post(console.url("requests"));
            let own = own_address(&console.address);
            call.header("authorization", format!("Bearer {}", self.token)).send_json(request(own))
        })
    }

    /// Where the request with this id stands.
    pub fn poll(&self, id: &str) -> (String, Answer) {
        self.first(|console| console.agent.get(console.url(&format!("requests/{id}"))).call())
    }

    /// The first answer that counts: only the PRIMARY's ports are open, and nobody knows who that is at the moment.
    fn first(&self, call: impl Fn(&Console) -> Result<Response<Body>, ureq::Error>) -> (String, Answer) {
        let mut silent = Vec::new();
        for console in &self.consoles {
            let address = &console.address;
            match call(console).map_err(anyhow::Error::from).and_then(understand) {
                Ok(Answer::Nobody(why)) => silent.push(format!("{address}: {why}")),
                Ok(answer) => return (address.clone(), answer),
                Err(error) => silent.push(format!("{address}: {error:#}")),
            }
        }
        let all: Vec<&str> = self.consoles.iter().map(|console| console.address.as_str()).collect();
        (all.join(", "), Answer::Nobody(silent.join("; ")))
    }
}

fn understand(mut response: Response<Body>) -> Result<Answer> {
    let status = response.status().as_u16();
    if (200..300).contains(&status) {
        let body = response.body_mut().with_config().limit(ANSWER);
        let state: RequestState = body.read_json().context("understand the answer")?;
        return Ok(Answer::State(Box::new(state)));
    }
    let why = https::refusal(&mut response);
    Ok(match status {
        401 | 403 => Answer::Denied(why),
        404 => Answer::NotFound,
        // A time-out, too many attempts, or no primary at the moment: later.
        408 | 429 | 500.. => Answer::Nobody(why),
        _ => Answer::Refused(why),
    })
}

/// The address of this host from which packets leave for `place` (`host:port`). Sends nothing.
fn own_address(place: &str) -> Option<IpAddr> {
    let target = place.to_socket_addrs().ok()?.next()?;
    let unspecified: IpAddr = if target.is_ipv4() { [0u8; 4].into() } else { [0u8; 16].into() };
    let socket = UdpSocket::bind((unspecified, 0)).ok()?;
    socket.connect(target).ok()?;
    Some(socket.local_addr().ok()?.ip())
}
