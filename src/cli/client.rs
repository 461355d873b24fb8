//! The API of a cluster, by one of its two ways: the control socket of this host's daemon, or the Consoles with a
//! login. Both serve the same API, so that a command is written once. Must never decide what is permitted: that is up
//! to the daemon.

use serde::de::{DeserializeOwned, IgnoredAny};

use super::{
    daemon::Local,
    past::Past,
    remote::Remote,
    stop::{EX_UNAVAILABLE, EX_USAGE, Stop},
};
use crate::{control::Call, node::Status};

/// Asks a cluster, through the daemon of this host or through its Consoles.
pub(super) enum ApiClient {
    Local(Local),
    Remote(Remote),
}

impl ApiClient {
    /// What the files of this host tell, if it is this host's daemon that did not answer.
    pub(super) fn past(&self, stop: &Stop) -> Option<Past> {
        match self {
            Self::Local(local) if stop.is_unanswered() => Past::read(&local.data),
            _ => None,
        }
    }

    /// The status of the cluster as this host's daemon or the PRIMARY sees it.
    ///
    /// # Errors
    /// When nobody answers.
    pub(super) fn status(&self) -> Result<Status, Stop> {
        match self {
            Self::Local(local) => local.status(),
            Self::Remote(remote) => {
                let status: Status = self.call(&Call::get("high-availability"))?;
                remote.learn(&status.membership);
                Ok(status)
            }
        }
    }

    /// The status as the PRIMARY sees it. If this host's daemon knows that another host is PRIMARY, the error says
    /// where to run `command`.
    ///
    /// # Errors
    /// When nobody answers, or another host is PRIMARY.
    pub(super) fn primary(&self, command: &str) -> Result<Status, Stop> {
        match self {
            Self::Local(local) => local.primary(command),
            // Only the PRIMARY's Console answers.
            Self::Remote(_) => self.status(),
        }
    }

    /// The daemon of this host.
    ///
    /// # Errors
    /// When the command goes to Consoles.
    pub(super) fn host(&self) -> Result<&Local, Stop> {
        match self {
            Self::Local(local) => Ok(local),
            Self::Remote(_) => {
                Err(Stop::tell(EX_USAGE, "this is only possible on a host of the cluster, without --address"))
            }
        }
    }

    /// Sends a request and parses the answer.
    ///
    /// # Errors
    /// When nobody answers as they should, or the answer is no.
    pub(super) fn call<T: DeserializeOwned>(&self, call: &Call) -> Result<T, Stop> {
        let text = match self {
            Self::Local(local) => local.call(call)?,
            Self::Remote(remote) => remote.call(call)?,
        };
        serde_json::from_str(if text.is_empty() { "null" } else { &text }).map_err(|error| {
            let text = match self {
                Self::Local(_) => {
                    format!("the answer is not understood: {error}\n  twistcli and twistlockd have different versions.")
                }
                Self::Remote(remote) => format!(
                    "{}{}: the answer is not understood: {error}\n  Is this a Console, and of the same version?",
                    remote.first(),
                    call.target()
                ),
            };
            Stop::tell(EX_UNAVAILABLE, &text)
        })
    }

    /// Sends a request whose answer says no more than that it is done.
    ///
    /// # Errors
    /// Those of [`Self::call`].
    pub(super) fn have_done(&self, call: &Call) -> Result<(), Stop> {
        self.call(call).map(|IgnoredAny| ())
    }
}
