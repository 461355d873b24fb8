//! The canary of a drill: writes through the Consoles' API with the token of the drill, one after the other, and
//! remembers what each answer was. Must never count a write as acknowledged that no Console has acknowledged.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use ureq::{
    Agent, Body,
    http::{Response, StatusCode},
};

use super::place::Place;
use crate::{
    https::{self, Failure, Limits, Trust},
    node::Status,
};

/// A request may take far longer than any write of a cluster that serves. A host that does not answer at all is given
/// up sooner: another one may serve already.
const LIMITS: Limits = Limits { connect: Duration::from_millis(300), request: Duration::from_secs(2) };
/// Pause after an attempt that failed, so that refused connections are not tried in a busy loop.
const PAUSE: Duration = Duration::from_millis(1);
/// What a drill asks for: see `console::drills`.
const WRITES: &str = "high-availability/drill/writes";
const TAKEOVER: &str = "high-availability/drill/takeover";
const END: &str = "high-availability/drill/end";

/// The Console of one member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Console {
    /// The member's name.
    pub name: String,
    /// `https://HOST:PORT`.
    pub url: String,
}

/// The Consoles of all members, that of the PRIMARY first.
pub(super) fn consoles(status: &Status, port: Option<u16>) -> Vec<Console> {
    let console =
        |address: &str, name: &str| Console { name: name.to_owned(), url: Place::of(address, port).to_string() };
    let mut members: Vec<_> = status.membership.roster.members.iter().collect();
    members.sort_by_key(|member| Some(member.id) != status.primary);
    members.into_iter().map(|member| console(&member.address, &member.name)).collect()
}

/// A write that was acknowledged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Acknowledged {
    /// Number of the write.
    pub tag: u64,
    /// Which Console.
    pub console: usize,
    /// When its answer came.
    pub at: Instant,
}

/// Writes and counts.
pub(super) struct Canary {
    agent: Agent,
    consoles: Vec<Console>,
    authorization: String,
    prefix: String,
    /// The Console that is tried first.
    current: usize,
    /// Number of the next write.
    next: u64,
    /// All that was acknowledged.
    pub acknowledged: Vec<Acknowledged>,
    /// Attempts that certainly wrote nothing.
    pub refused: u64,
    /// Attempts whose outcome the client does not know.
    pub unknown: u64,
    /// Why the last failed attempt failed.
    pub last_failure: Option<String>,
}

/// Why the API is of no more use. The sentence says what happened.
#[derive(Debug)]
pub(super) enum Failed {
    /// Nobody answers as a Console does.
    Unreachable(String),
    /// The drill is over, or the Console does not know it.
    Refused(String),
}

impl Canary {
    /// A canary of the drill that has this token, and whose tags begin with `prefix`.
    pub(super) fn new(consoles: Vec<Console>, trust: &Trust, token: &str, prefix: &str) -> Self {
        Self {
            agent: https::client(trust, LIMITS),
            consoles,
            authorization: format!("Bearer {token}"),
            prefix: prefix.to_owned(),
            current: 0,
            next: 0,
            acknowledged: Vec::new(),
            refused: 0,
            unknown: 0,
            last_failure: None,
        }
    }

    fn url(&self, rest: &str) -> String {
        format!("{}/api/v1/{rest}", self.consoles[self.current].url)
    }

    /// The name of the Console with this number.
    pub(super) fn name(&self, console: usize) -> &str {
        &self.consoles[console].name
    }

    /// Tries once to write the next tag, and goes to the next Console if that fails.
    ///
    /// # Errors
    /// When the Console says that the drill is over.
    pub(super) fn attempt(&mut self) -> Result<(), Failed> {
        let url = self.url(WRITES);
        let answer = self.post(&url, &json!(self.next)).map(|response| response.status());
        match answer {
            // Or an earlier attempt got through unseen: the same write counts once.
            Ok(status) if status.is_success() => {
                self.acknowledged.push(Acknowledged { tag: self.next, console: self.current, at: Instant::now() });
                self.next += 1;
                return Ok(());
            }
            Ok(status) if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS => {
                return Err(Failed::Refused(format!("{url} refuses a write of the drill: {status}")));
            }
            Err(ref error) if https::failure(error) == Failure::Refused => self.refused += 1,
            // A Console that answers may itself not know the outcome of the write.
            Ok(_) | Err(_) => self.unknown += 1,
        }
        let why = answer.map_or_else(|error| error.to_string(), |status| status.to_string());
        self.last_failure = Some(format!("{url}: {why}"));
        self.go_on();
        Ok(())
    }

    fn post(&self, url: &str, body: &Value) -> Result<Response<Body>, ureq::Error> {
        self.agent.post(url).header("authorization", &self.authorization).send_json(body)
    }

    /// Goes on to the next Console.
    fn go_on(&mut self) {
        self.current = (self.current + 1) % self.consoles.len();
        std::thread::sleep(PAUSE);
    }

    /// Returns what asks the Console of the current PRIMARY for the switchover of the drill.
    pub(super) fn switchover(&self) -> impl FnOnce() -> Result<(), String> + Send + 'static {
        let (agent, url, authorization) = (self.agent.clone(), self.url(TAKEOVER), self.authorization.clone());
        move || {
            let mut answer = match agent.post(url).header("authorization", authorization).send_empty() {
                Ok(answer) => answer,
                // The ports may be closed before the answer: the writes show whether another member takes over.
                Err(error) if https::failure(&error) == Failure::Unknown => return Ok(()),
                Err(error) => return Err(error.to_string()),
            };
            if answer.status().is_success() { Ok(()) } else { Err(https::refusal(&mut answer)) }
        }
    }

    /// The acknowledged tags that the current PRIMARY does not have.
    ///
    /// # Errors
    /// When no Console gives the list in time.
    pub(super) fn missing(&mut self, limit: Duration) -> Result<Vec<String>, Failed> {
        let deadline = Instant::now() + limit;
        let there = loop {
            match self.list() {
                Ok(there) => break there,
                Err(failed) if Instant::now() > deadline => return Err(failed),
                Err(_) => self.go_on(),
            }
        };
        let missing = self.acknowledged.iter().filter(|write| !there.contains(&write.tag));
        Ok(missing.map(|write| format!("{}{}", self.prefix, write.tag)).collect())
    }

    /// All writes of this canary.
    fn list(&self) -> Result<BTreeSet<u64>, Failed> {
        let url = self.url(WRITES);
        let failed = |why: String| Failed::Unreachable(format!("read the writes at {url}: {why}"));
        let request = self.agent.get(&url).header("authorization", &self.authorization);
        let mut response = request.call().map_err(|error| failed(error.to_string()))?;
        if !response.status().is_success() {
            return Err(failed(response.status().to_string()));
        }
        response.body_mut().read_json().map_err(|error| failed(error.to_string()))
    }

    /// Ends the drill: its writes are removed, and its result goes into the audits.
    ///
    /// # Errors
    /// What the last Console said, when none took it in time.
    pub(super) fn end(&mut self, ok: bool, text: &str, limit: Duration) -> Result<(), String> {
        let deadline = Instant::now() + limit;
        loop {
            let url = self.url(END);
            let why = match self.post(&url, &json!({ "ok": ok, "text": text })) {
                Ok(answer) if answer.status().is_success() => return Ok(()),
                Ok(mut answer) => https::refusal(&mut answer),
                Err(error) => error.to_string(),
            };
            if Instant::now() > deadline {
                return Err(format!("{url}: {why}"));
            }
            self.go_on();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::verdict::tests::healthy;

    #[test]
    fn the_primary_is_tried_first_and_addresses_become_urls() {
        let mut status = healthy();
        status.primary = Some(2);
        status.membership.roster.members[2].address = "2001:db8::3".into();
        let urls: Vec<String> = consoles(&status, Some(8083)).into_iter().map(|console| console.url).collect();
        assert_eq!(urls, ["https://127.0.0.2:8083", "https://127.0.0.1:8083", "https://[2001:db8::3]:8083"]);
    }
}
