//! The canary of a drill: writes tags through the Consoles' API, one after the other, and remembers what each answer was.
//! Must never count a write as acknowledged that no Console has acknowledged.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use ureq::{Agent, http::StatusCode};

use super::remote::{Login, Place, segment};
use crate::{
    https::{self, Failure, Limits, Trust},
    node::Status,
};

/// A request may take far longer than any write of a cluster that serves. A host that does not answer at all is given up
/// sooner: another one may serve already.
const LIMITS: Limits = Limits { connect: Duration::from_millis(300), request: Duration::from_secs(2) };
/// Pause after an attempt that failed, so that refused connections are not tried in a busy loop.
const PAUSE: Duration = Duration::from_millis(1);
/// Tags in one page of the list: the most that the API gives.
const PAGE: usize = 1000;
/// Pages that are read at most.
const MAX_PAGES: usize = 1000;

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
    let console = |address: &str, name: &str| Console { name: name.to_owned(), url: Place::of(address, port).url() };
    let mut members: Vec<_> = status.membership.members.iter().collect();
    members.sort_by_key(|member| Some(member.id) != status.primary);
    members.into_iter().map(|member| console(&member.address, &member.name)).collect()
}

/// A write that was acknowledged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Acknowledged {
    /// Number of the tag.
    pub tag: u64,
    /// Which Console.
    pub console: usize,
    /// When its answer was there.
    pub at: Instant,
}

/// Writes and counts.
pub(super) struct Canary {
    agent: Agent,
    consoles: Vec<Console>,
    authorization: String,
    /// The session was begun here, and is ended here.
    own_session: bool,
    prefix: String,
    /// The Console that is tried first.
    current: usize,
    /// Number of the next tag.
    next: u64,
    /// True if an attempt to write the next tag had no answer.
    doubt: bool,
    /// All that was acknowledged.
    pub acknowledged: Vec<Acknowledged>,
    /// Attempts that certainly wrote nothing.
    pub refused: u64,
    /// Attempts whose outcome the client does not know.
    pub unknown: u64,
    /// Why the last attempt that failed did.
    pub last_failure: Option<String>,
}

/// The way to the API failed for good; the sentence says how.
#[derive(Debug)]
pub(super) enum Failed {
    /// Nobody answers as a Console does.
    Unreachable(String),
    /// The login is not good, or not good enough.
    Refused(String),
}

impl Canary {
    /// A canary whose tags begin with `prefix`.
    pub(super) fn new(consoles: Vec<Console>, trust: &Trust, prefix: &str) -> Self {
        Self {
            agent: https::client(trust, LIMITS),
            consoles,
            authorization: String::new(),
            own_session: false,
            prefix: prefix.to_owned(),
            current: 0,
            next: 0,
            doubt: false,
            acknowledged: Vec::new(),
            refused: 0,
            unknown: 0,
            last_failure: None,
        }
    }

    fn url(&self, rest: &str) -> String {
        format!("{}/api/v1/{rest}", self.consoles[self.current].url)
    }

    fn tag(&self, number: u64) -> String {
        format!("{}-{number}", self.prefix)
    }

    /// The name of the Console with this number.
    pub(super) fn name(&self, console: usize) -> &str {
        &self.consoles[console].name
    }

    /// Uses the session of a token, or begins one: each new PRIMARY would have to compute a password hash otherwise.
    ///
    /// # Errors
    /// When the Console cannot be reached or refuses.
    pub(super) fn log_in(&mut self, login: &Login) -> Result<(), Failed> {
        let (user, password) = match login {
            Login::Token(token) => {
                self.authorization = format!("Bearer {token}");
                return Ok(());
            }
            Login::Password { user, password } => (user, password),
        };
        let url = self.url("authenticate");
        let body = serde_json::json!({"username": user, "password": password});
        let mut response = self
            .agent
            .post(&url)
            .send_json(body)
            .map_err(|error| Failed::Unreachable(format!("log in at {url}: {error}")))?;
        let answer: serde_json::Value = response.body_mut().read_json().unwrap_or_default();
        match answer["token"].as_str() {
            Some(token) => {
                self.authorization = format!("Bearer {token}");
                self.own_session = true;
            }
            None => {
                let why = answer["err"].as_str().unwrap_or("no reason given");
                return Err(Failed::Refused(format!("log in at {url} as {user}: {}: {why}", response.status())));
            }
        }
        Ok(())
    }

    /// Tries once to write the next tag, and goes to the next Console if that fails.
    ///
    /// # Errors
    /// When the Console says that the login is not good.
    pub(super) fn attempt(&mut self) -> Result<(), Failed> {
        let body =
            serde_json::json!({"name": self.tag(self.next), "color": "", "description": "rehearsal of a takeover"});
        let request = self.agent.post(self.url("tags")).header("authorization", &self.authorization);
        let answer = request.send_json(body).map(|response| response.status());
        match answer {
            // An earlier attempt got through unseen.
            Ok(status) if status.is_success() || status == StatusCode::CONFLICT && self.doubt => {
                self.acknowledged.push(Acknowledged { tag: self.next, console: self.current, at: Instant::now() });
                self.next += 1;
                self.doubt = false;
                return Ok(());
            }
            Ok(status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::CONFLICT)) => {
                return Err(Failed::Refused(format!("{} refuses to write a tag: {status}", self.url("tags"))));
            }
            Err(ref error) if https::failure(error) == Failure::Refused => self.refused += 1,
            // What a Console answers may still hide a write whose outcome it does not know itself.
            Ok(_) | Err(_) => {
                self.unknown += 1;
                self.doubt = true;
            }
        }
        let why = answer.map_or_else(|error| error.to_string(), |status| status.to_string());
        self.last_failure = Some(format!("{}: {why}", self.url("tags")));
        self.current = (self.current + 1) % self.consoles.len();
        std::thread::sleep(PAUSE);
        Ok(())
    }

    /// The acknowledged tags that the present PRIMARY does not have.
    ///
    /// # Errors
    /// When no Console gives the list in time.
    pub(super) fn missing(&mut self, limit: Duration) -> Result<Vec<String>, Failed> {
        let deadline = Instant::now() + limit;
        let there = loop {
            match self.list() {
                Ok(there) => break there,
                Err(failed) if Instant::now() > deadline => return Err(failed),
                Err(_) => {
                    self.current = (self.current + 1) % self.consoles.len();
                    std::thread::sleep(PAUSE);
                }
            }
        };
        Ok(self.acknowledged.iter().map(|write| self.tag(write.tag)).filter(|tag| !there.contains(tag)).collect())
    }

    /// All tags of this canary.
    fn list(&self) -> Result<BTreeSet<String>, Failed> {
        let mut there = BTreeSet::new();
        for page in 0..MAX_PAGES {
            let url = self.url(&format!("tags?limit={PAGE}&offset={}", page * PAGE));
            let failed = |why: String| Failed::Unreachable(format!("read the tags at {url}: {why}"));
            let request = self.agent.get(&url).header("authorization", &self.authorization);
            let mut response = request.call().map_err(|error| failed(error.to_string()))?;
            if !response.status().is_success() {
                return Err(failed(response.status().to_string()));
            }
            let tags: Vec<serde_json::Value> =
                response.body_mut().read_json().map_err(|error| failed(error.to_string()))?;
            let names = tags.iter().filter_map(|tag| tag["name"].as_str());
            there.extend(names.filter(|name| name.starts_with(&self.prefix)).map(str::to_owned));
            if tags.len() < PAGE {
                return Ok(there);
            }
        }
        Err(Failed::Refused(format!("there are more than {} tags: too many to look through", PAGE * MAX_PAGES)))
    }

    /// Removes all tags of this canary, and ends its session. Returns how many tags may have been left.
    pub(super) fn clean_up(&self) -> u64 {
        let gone = |number: &u64| {
            let url = self.url(&format!("tags/{}", segment(&self.tag(*number))));
            let request = self.agent.delete(&url).header("authorization", &self.authorization);
            request.call().is_ok_and(|answer| answer.status().is_success() || answer.status() == StatusCode::NOT_FOUND)
        };
        // The last one may have been written by an attempt without an answer.
        let end = self.next + u64::from(self.doubt);
        let left = (0..end).filter(|number| !gone(number)).count() as u64;
        if self.own_session {
            // Otherwise it ends by itself, later.
            let _ = self.agent.post(self.url("logout")).header("authorization", &self.authorization).send_empty();
        }
        left
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
        status.membership.members[2].address = "2001:db8::3".into();
        let urls: Vec<String> = consoles(&status, Some(8083)).into_iter().map(|console| console.url).collect();
        assert_eq!(urls, ["https://127.0.0.2:8083", "https://127.0.0.1:8083", "https://[2001:db8::3]:8083"]);
    }
}
