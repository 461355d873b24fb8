//! The conversation with the daemon of this host: what is said when it cannot be reached, refuses, or is not PRIMARY.
//! Must never ask twice for what changes something.

use std::{io, path::PathBuf, time::Duration};

use ureq::http::StatusCode;

use super::{
    login::LoginArgs,
    place::Place,
    remote::{Remote, changes_nothing},
    stop::{EX_UNAVAILABLE, Stop},
};
use crate::{
    cluster::Role,
    console::{UNKNOWN, cluster::Consoles},
    control::{self, Answer, Call, ControlError, OPERATION_TIMEOUT},
    node::Status,
};

/// How long one answer of the daemon may take.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long the outcome of an operation may take: the daemon gives up first.
const OUTCOME_LIMIT: Duration = OPERATION_TIMEOUT.saturating_add(ANSWER_LIMIT);

/// The daemon of this host.
pub(super) struct Local {
    /// Path of its control socket.
    pub socket: PathBuf,
    /// Its data folder; the folder of the socket if only that was named.
    pub data: PathBuf,
    /// `MANAGEMENT_PORT_HTTPS`, as far as it is known.
    pub https_port: u16,
}

impl Local {
    /// The Consoles of this host's cluster, for what only the API has.
    ///
    /// # Errors
    /// When the daemon does not answer, or there is no login.
    pub(super) fn consoles(&self, login: &LoginArgs) -> Result<Remote, Stop> {
        let status = self.status()?;
        let mut members: Vec<_> = status.membership.roster.members.iter().collect();
        members.sort_by_key(|member| Some(member.id) != status.primary);
        let port = self.port();
        let places = members.iter().map(|member| Place::of(&member.address, Some(port)));
        let trust = login.trust(Some(self.authority()))?;
        Ok(Remote::new(places.collect(), trust, login.resolve()?))
    }

    /// The certificate of the cluster's authority on this host.
    pub(super) fn authority(&self) -> PathBuf {
        self.data.join("certificates").join("ca.pem")
    }

    /// The port of the Consoles: the daemon knows it, whatever is installed here beside it.
    fn port(&self) -> u16 {
        let there = control::ask(&self.socket, &Call::get("high-availability/console"), ANSWER_LIMIT).ok();
        there.and_then(|there: Consoles| there.https_port).unwrap_or(self.https_port)
    }

    /// The cluster as the daemon sees it.
    ///
    /// # Errors
    /// When it does not answer.
    pub(super) fn status(&self) -> Result<Status, Stop> {
        control::status(&self.socket, ANSWER_LIMIT).map_err(|error| unanswered(&error))
    }

    /// The status, unless another host is PRIMARY as far as this host knows: then `command` has to be run there.
    ///
    /// # Errors
    /// When it does not answer, or another host is PRIMARY.
    pub(super) fn primary(&self, command: &str) -> Result<Status, Stop> {
        let status = self.status()?;
        match elsewhere(&status, command) {
            Some(text) => Err(Stop::refuse(&text)),
            None => Ok(status),
        }
    }

    /// Sends a request to the daemon. Returns the body of a success.
    ///
    /// # Errors
    /// When it does not answer or refuses.
    pub(super) fn call(&self, call: &Call) -> Result<String, Stop> {
        match control::send(&self.socket, call, OUTCOME_LIMIT) {
            Ok(answer) if answer.status.is_success() => Ok(answer.text),
            Ok(answer) => Err(refused(&answer)),
            Err(error @ ControlError::NoAnswer { .. }) if !changes_nothing(call) => {
                let text = format!("{}\n  Whether it was done is unknown. See: twistcli ha status", explain(&error));
                Err(Stop::tell(EX_UNAVAILABLE, &text))
            }
            Err(error) => Err(unanswered(&error)),
        }
    }
}

/// The text of the answer says whether the request was refused, or whether its outcome is unknown.
fn refused(answer: &Answer) -> Stop {
    let why = answer.reason();
    match answer.status == StatusCode::INTERNAL_SERVER_ERROR || why.starts_with(UNKNOWN) {
        true => Stop::tell(EX_UNAVAILABLE, &why),
        false => Stop::refuse(&why),
    }
}

fn unanswered(error: &ControlError) -> Stop {
    match error {
        // It runs, so what its files say is out of date.
        ControlError::Malformed { .. } => Stop::Unknown(explain(error)),
        _ => Stop::tell(EX_UNAVAILABLE, &explain(error)),
    }
}

/// Says which host to ask instead, and how.
fn elsewhere(status: &Status, command: &str) -> Option<String> {
    if matches!(status.role, Role::RequestJoin | Role::Waiting) {
        return Some(format!("{} has not joined yet. On the PRIMARY, run: {command}", status.name));
    }
    let id = status.primary.filter(|id| *id != status.node)?;
    let (name, address) = match status.members.iter().find(|member| member.id == id) {
        Some(member) => (member.name.clone(), format!(" ({})", member.address)),
        None => (format!("node {id}"), String::new()),
    };
    Some(format!("{} is {}; {name}{address} is PRIMARY. Run there: {command}", status.name, status.role))
}

/// Says why the daemon could not be reached, and what to do about it.
pub(super) fn explain(error: &ControlError) -> String {
    let hint = match error {
        ControlError::Unreachable { error, .. } => match error.kind() {
            io::ErrorKind::NotFound => {
                "There is no such socket. Is twistlockd running on this host? Try: systemctl status twistlockd\n  \
                 If it has another data folder, name it: --data DIR, --control PATH or TWISTLOCK_DATA=DIR.\n  \
                 For a cluster elsewhere, name its Consoles: --address https://HOST:8083"
            }
            io::ErrorKind::PermissionDenied => "Only the owner of the socket may use it. Try again with sudo.",
            io::ErrorKind::ConnectionRefused => {
                "twistlockd is not running; the socket is left over. Try: systemctl status twistlockd"
            }
            _ => "Is twistlockd running on this host? Try: systemctl status twistlockd",
        },
        ControlError::NoAnswer { .. } => {
            "twistlockd is there but does not answer: stopped, frozen or overloaded. Try: journalctl -u twistlockd -e"
        }
        ControlError::Malformed { .. } => {
            "twistcli and twistlockd have different versions. Install the same version of both."
        }
        ControlError::Path(_) => "Name the socket by a shorter path: --control PATH",
        ControlError::Refused(_) => "Try: journalctl -u twistlockd -e",
    };
    format!("{error}\n  {hint}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::verdict::tests::healthy;

    #[test]
    fn another_host_is_named_with_what_to_run_there() {
        let apply = "twistcli ha apply";
        let mut status = healthy();
        assert_eq!(elsewhere(&status, apply), None);
        (status.primary, status.role) = (Some(2), Role::Secondary);
        let expected = "node1 is SECONDARY; node2 (127.0.0.2:8086) is PRIMARY. Run there: twistcli ha apply";
        assert_eq!(elsewhere(&status, apply).unwrap(), expected);
        status.primary = None;
        assert_eq!(elsewhere(&status, apply), None, "the daemon says why");
    }

    #[test]
    fn a_refusal_is_told_from_what_nobody_knows() {
        let code = |status: u16, why: &str| {
            let text = format!("{{\"err\":\"{why}\"}}");
            refused(&Answer { status: StatusCode::from_u16(status).unwrap(), text }).code().unwrap()
        };
        assert_eq!((code(409, "no"), code(503, "4 operations are under way"), code(504, "not yet")), (75, 75, 75));
        assert_eq!((code(503, "outcome unknown: no majority"), code(500, "internal error")), (69, 69));
    }

    #[test]
    fn a_daemon_of_another_version_is_not_one_that_does_not_run() {
        let path = PathBuf::from("control.sock");
        let other = unanswered(&ControlError::Malformed { path: path.clone(), why: "no HTTP".into() });
        assert!(!other.is_unanswered() && other.why().ends_with("not understood: no HTTP"), "{other:?}");
        assert_eq!(other.code().unwrap(), 69);
        let gone = ControlError::Unreachable { path, error: io::ErrorKind::ConnectionRefused.into() };
        assert!(unanswered(&gone).is_unanswered());
    }
}
