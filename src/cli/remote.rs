//! The API of a cluster, through its Consoles. Tries each address until one answers: only the PRIMARY's does. Must
//! never send a credential to a server whose certificate does not verify, nor repeat a request that changes something
//! and may have arrived.

use std::{
    cell::RefCell,
    thread,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ureq::{
    Agent, Body,
    http::{Method, Response, StatusCode},
};

use super::{
    place::{HTTPS_PORT, Place},
    stop::{EX_NOPERM, EX_TEMPFAIL, EX_UNAVAILABLE, Stop},
    untrusted,
};
use crate::{
    cluster::Membership,
    control::Call,
    https::{self, Failure, Limits, Trust},
};

/// How long one request may take: longer than the Console gives itself.
const LIMITS: Limits = Limits { connect: Duration::from_secs(3), request: Duration::from_secs(35) };
/// How long the download of a backup may take.
const DOWNLOAD: Duration = Duration::from_secs(3600);
/// How long it goes on while nobody answers: a takeover takes less.
const PATIENCE: Duration = Duration::from_secs(3);
/// Pause between two rounds.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest answer that is read.
const LONGEST: u64 = 8 << 20;
/// What is not encoded in a segment of a path.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Who asks.
#[derive(Clone)]
pub(super) enum Login {
    Token(String),
    Password { user: String, password: String },
}

impl Login {
    /// # Errors
    /// When no header can carry it.
    pub(super) fn token(text: &str) -> Result<Self, &'static str> {
        match !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic()) {
            true => Ok(Self::Token(text.to_owned())),
            false => Err("the token is empty, or has characters that no token has"),
        }
    }

    /// The value of the Authorization header.
    fn header(&self) -> String {
        match self {
            Self::Token(token) => format!("Bearer {token}"),
            // A command makes too few requests to begin and end a session for them.
            Self::Password { user, password } => {
                format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}")))
            }
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Token(_) => "the token".to_owned(),
            Self::Password { user, .. } => format!("the login of {user}"),
        }
    }
}

/// One segment of a path, encoded.
pub(super) fn segment(text: &str) -> String {
    utf8_percent_encode(text, SEGMENT).to_string()
}

/// A cluster that is reached through its Consoles.
pub(super) struct Remote {
    agent: Agent,
    /// The one that answered last comes first.
    places: RefCell<Vec<Place>>,
    pub trust: Trust,
    pub login: Login,
}

/// What goes wrong at one address.
struct Silence {
    place: Place,
    failure: Failure,
    why: String,
}

impl Remote {
    pub(super) fn new(places: Vec<Place>, trust: Trust, login: Login) -> Self {
        Self { agent: https::client(&trust, LIMITS), places: RefCell::new(places), trust, login }
    }

    /// All addresses that are tried.
    pub(super) fn places(&self) -> Vec<Place> {
        self.places.borrow().clone()
    }

    /// Has the members tried, too, from now on: the one that was named may lose the role.
    pub(super) fn learn(&self, membership: &Membership) {
        let mut places = self.places.borrow_mut();
        // A load balancer may have the usual port of HTTPS, while the Consoles behind it have their own.
        let port = places.first().and_then(|place| place.port()).or(Some(HTTPS_PORT));
        for member in &membership.roster.members {
            let place = Place::of(&member.address, port);
            if !places.contains(&place) {
                places.push(place);
            }
        }
    }

    /// Sends a request to the Console that answers. Returns the body of a success.
    ///
    /// # Errors
    /// When nobody answers, or the answer is no.
    pub(super) fn call(&self, call: &Call) -> Result<String, Stop> {
        let mut response = self.send(call)?;
        let status = response.status();
        if !status.is_success() {
            return Err(self.refused(&call.method, status, &https::refusal(&mut response)));
        }
        let text = response.body_mut().with_config().limit(LONGEST).read_to_string();
        text.map_err(|error| Stop::tell(EX_UNAVAILABLE, &format!("{}: the answer broke off: {error}", self.first())))
    }

    /// Fetches a file, which may take its time.
    ///
    /// # Errors
    /// When nobody answers.
    pub(super) fn download(&self, path: &str) -> Result<Response<Body>, Stop> {
        let patient = https::client(&self.trust, Limits { request: DOWNLOAD, ..LIMITS });
        let way =
            Self { agent: patient, places: self.places.clone(), trust: self.trust.clone(), login: self.login.clone() };
        let response = way.send(&Call::get(path))?;
        self.places.replace(way.places());
        Ok(response)
    }

    /// Returns the first answer, whatever it says. Each address is tried, again for a while if none answers.
    ///
    /// # Errors
    /// When nobody answers, or a request that changes something got lost.
    pub(super) fn send(&self, call: &Call) -> Result<Response<Body>, Stop> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut silent = Vec::new();
            for place in self.places() {
                match self.attempt(&place, call) {
                    // It was PRIMARY a moment ago, and nothing was changed there.
                    Ok(response) if response.status() == StatusCode::SERVICE_UNAVAILABLE && changes_nothing(call) => {
                        let why = https::refusal(&mut { response });
                        silent.push(Silence { place, failure: Failure::Unreachable, why });
                    }
                    Ok(response) => {
                        self.prefer(&place);
                        return Ok(response);
                    }
                    Err(silence) if silence.failure == Failure::Unknown && !changes_nothing(call) => {
                        let text = format!(
                            "{}: the connection was lost before the answer came: {}\n  Whether it was done is unknown: check \
                             before you repeat it. See: twistcli ha status",
                            silence.place, silence.why
                        );
                        return Err(Stop::Unknown(text));
                    }
                    Err(silence) => silent.push(silence),
                }
            }
            // Whoever answers there will not be trusted later, either.
            let hopeless = silent.iter().any(|silence| matches!(silence.failure, Failure::Untrusted(_)));
            if hopeless || Instant::now() > deadline {
                return Err(self.nobody(&silent));
            }
            thread::sleep(PAUSE);
        }
    }

    fn attempt(&self, place: &Place, call: &Call) -> Result<Response<Body>, Silence> {
        let silence = |failure, why| Silence { place: place.clone(), failure, why };
        let sent = call.run(&self.agent, &place.to_string(), Some(&self.login.header()));
        sent.map_err(|error| silence(https::failure(&error), error.to_string()))
    }

    /// Where the last request was answered.
    pub(super) fn first(&self) -> String {
        self.places.borrow().first().map(Place::to_string).unwrap_or_default()
    }

    fn prefer(&self, place: &Place) {
        let mut places = self.places.borrow_mut();
        if let Some(at) = places.iter().position(|other| other == place) {
            places[..=at].rotate_right(1);
        }
    }

    fn nobody(&self, silent: &[Silence]) -> Stop {
        let distrusted = silent.iter().find_map(|silence| match silence.failure {
            Failure::Untrusted(why) => Some((silence, why)),
            _ => None,
        });
        if let Some((silence, why)) = distrusted {
            return Stop::tell(EX_UNAVAILABLE, &untrusted::explain(&silence.place, why, &silence.why));
        }
        let mut text = "no Console answers".to_owned();
        for Silence { place, failure, why } in silent {
            let why = if *failure == Failure::Refused { "connection refused" } else { why.as_str() };
            text.push_str(&format!("\n  {place}: {why}"));
            if place.port().is_none() {
                text.push_str(" (port 443, as none was named; a Console has 8083 unless it was changed)");
            }
        }
        text.push_str(
            "\n  Only the PRIMARY's Console accepts connections: name all members, each with --address. If none accepts, run \
             `twistcli ha status` on one of them.",
        );
        Stop::tell(EX_UNAVAILABLE, &text)
    }

    /// What an answer other than a success means.
    pub(super) fn refused(&self, method: &Method, status: StatusCode, why: &str) -> Stop {
        let (place, who) = (self.first(), self.login.name());
        match status.as_u16() {
            401 => {
                let text = format!("{place} does not accept {who}: {why}\n  Name another one with --user, or --token.");
                Stop::tell(EX_NOPERM, &text)
            }
            403 => Stop::tell(EX_NOPERM, &format!("{place} does not permit this to {who}: {why}")),
            404 if why.starts_with("there is nothing at") => {
                let text = format!("{place}: {why}\n  twistcli and the Console have different versions.");
                Stop::tell(EX_UNAVAILABLE, &text)
            }
            500.. if *method != Method::GET => Stop::tell(EX_UNAVAILABLE, &format!("{place}: {why}")),
            500.. => Stop::tell(EX_UNAVAILABLE, &format!("{place}: {why}\n  Try again, or see the log there.")),
            _ => Stop::tell(EX_TEMPFAIL, &format!("not done: {why}")),
        }
    }
}

/// True for what may be asked again without harm. A join script makes an invitation.
pub(super) fn changes_nothing(call: &Call) -> bool {
    call.method == Method::GET && !call.path.starts_with("high-availability/join-script")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::verdict::tests::healthy;

    #[test]
    fn members_are_learnt_once_and_with_the_port_that_was_named() {
        let named = Place::parse("https://lb.example:9083").unwrap();
        let login = Login::token("t").unwrap();
        let remote = Remote::new(vec![named.clone()], Trust::default(), login);
        let mut status = healthy();
        status.membership.roster.members[2].address = "2001:db8::3".into();
        remote.learn(&status.membership);
        remote.learn(&status.membership);
        let urls: Vec<String> = remote.places().iter().map(Place::to_string).collect();
        let expected = [
            "https://lb.example:9083",
            "https://127.0.0.1:9083",
            "https://127.0.0.2:9083",
            "https://[2001:db8::3]:9083",
        ];
        assert_eq!(urls, expected);
        remote.prefer(&Place::of("127.0.0.2", Some(9083)));
        assert_eq!(remote.first(), "https://127.0.0.2:9083");
        assert_eq!(remote.places()[1], named);
    }

    #[test]
    fn what_goes_into_a_path_or_a_header_stays_there() {
        assert_eq!(segment("a/b?c#d e%ä.."), "a%2Fb%3Fc%23d%20e%25%C3%A4..");
        assert!(Login::token("a\r\nb").is_err() && Login::token("").is_err());
        let login = Login::Password { user: "Jörg".into(), password: "a:b\r\n".into() };
        assert!(login.header().bytes().all(|byte| byte.is_ascii_graphic() || byte == b' '));
    }
}
