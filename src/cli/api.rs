//! The Console's API for the commands that need it: by the daemon of this host where it is PRIMARY and nobody is named to log in
//! as, else by the Consoles with a login. Must never ask for a password of who may do all of it on this host anyway.

use serde::de::DeserializeOwned;
use serde_json::Value;
use ureq::http::Method;

use super::{
    daemon::{ANSWER_LIMIT, Local},
    door::Door,
    remote::Remote,
    stop::{EX_UNAVAILABLE, Stop},
    target::Target,
};
use crate::{
    control::{self, ApiReply, ControlError, OPERATION_TIMEOUT},
    https::Trust,
};

/// The way to the API.
pub(super) enum Api {
    /// As who is logged in on this host: the daemon says who that is.
    Here(Local, Trust),
    There(Remote),
}

impl Target {
    /// The API of the cluster that is meant: this host's if no other is named.
    ///
    /// # Errors
    /// When it cannot be found, or there is no login.
    pub(super) fn api(&self) -> Result<Api, Stop> {
        let local = match self.door()? {
            Door::Remote(remote) => return Ok(Api::There(remote)),
            Door::Local(local) => local,
        };
        let status = local.status()?;
        if status.primary == Some(status.node) && !self.login().is_named() {
            let trust = self.login().trust(Some(local.authority()))?;
            return Ok(Api::Here(local, trust));
        }
        local.consoles(self.login()).map(Api::There)
    }
}

impl Api {
    /// Asks for something.
    ///
    /// # Errors
    /// When nobody answers as they should.
    pub(super) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Stop> {
        match self {
            Self::There(remote) => remote.get(path),
            Self::Here(..) => serde_json::from_value(self.call(Method::GET, path, None)?)
                .map_err(|error| Stop::tell(EX_UNAVAILABLE, &format!("{path}: the answer is not understood: {error}"))),
        }
    }

    /// Has something done. The answer is `null` where there is nothing to tell.
    ///
    /// # Errors
    /// When nobody answers, or the answer is no.
    pub(super) fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, Stop> {
        let local = match self {
            Self::There(remote) => return remote.call(method, path, body),
            Self::Here(local, _) => local,
        };
        let limit = OPERATION_TIMEOUT.saturating_add(ANSWER_LIMIT);
        match control::api(&local.socket, method.as_str(), path, body.cloned(), limit) {
            Ok(ApiReply { status: 200..300, body, .. }) => Ok(body),
            Ok(ApiReply { status, body, .. }) => {
                let why = body["err"].as_str().unwrap_or("no reason given");
                Err(match status {
                    500.. => Stop::tell(EX_UNAVAILABLE, why),
                    _ => Stop::refuse(&format!("not done: {why}")),
                })
            }
            Err(ControlError::Refused(why)) => Err(Stop::refuse(&why)),
            Err(error @ ControlError::NoAnswer { .. }) if method != Method::GET => Err(Stop::tell(
                EX_UNAVAILABLE,
                &format!("{error}\n  Whether it was done is unknown: look before you repeat it."),
            )),
            Err(error) => Err(Stop::tell(EX_UNAVAILABLE, &error.to_string())),
        }
    }
}
