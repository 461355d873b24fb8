//! The two ways to a cluster behind one door: the control socket of this host's daemon, or the API of the Consoles. Commands
//! are written once, for the door. Must never decide what is permitted: both ways ask the same operations of the daemon.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use ureq::http::Method;

use super::{
    daemon::Local,
    past::Past,
    remote::{Remote, segment},
    stop::{EX_UNAVAILABLE, EX_USAGE, Stop},
};
use crate::{control::Operation, node::Status};

/// The way to a cluster.
pub(super) enum Door {
    Local(Local),
    Remote(Remote),
}

impl Door {
    /// What the files of this host tell of the time before, if it is this host's daemon that did not answer.
    pub(super) fn past(&self, stop: &Stop) -> Option<Past> {
        match self {
            Self::Local(local) if stop.is_unanswered() => Past::read(&local.data),
            _ => None,
        }
    }

    /// How the cluster is, as this host's daemon or the PRIMARY sees it.
    ///
    /// # Errors
    /// When nobody answers.
    pub(super) fn status(&self) -> Result<Status, Stop> {
        match self {
            Self::Local(local) => local.status(),
            Self::Remote(remote) => remote.status(),
        }
    }

    /// The same as the PRIMARY sees it, as far as it can be known; if it is another host's daemon: where to run `command`.
    ///
    /// # Errors
    /// When nobody answers, or another host is PRIMARY.
    pub(super) fn primary(&self, command: &str) -> Result<Status, Stop> {
        match self {
            Self::Local(local) => local.primary(command),
            // Only the PRIMARY's Console answers.
            Self::Remote(remote) => remote.status(),
        }
    }

    /// Has an operation carried out.
    ///
    /// # Errors
    /// When nobody answers, or it is refused.
    pub(super) fn operate<T: DeserializeOwned>(&self, operation: Operation) -> Result<T, Stop> {
        let answer = match self {
            Self::Local(local) => local.operate(&operation)?,
            Self::Remote(remote) => {
                let Some(call) = Call::of(&operation) else {
                    let why = "this is only possible on a host of the cluster, without --address";
                    return Err(Stop::tell(EX_USAGE, why));
                };
                let answer = remote.call(call.method, &call.path, call.body.as_ref())?;
                (call.take)(answer)
            }
        };
        serde_json::from_value(answer).map_err(|error| {
            let text =
                format!("the answer is not understood: {error}\n  twistcli and twistlockd are of different versions.");
            Stop::tell(EX_UNAVAILABLE, &text)
        })
    }
}

/// An operation as the API has it.
#[derive(Debug)]
struct Call {
    method: Method,
    path: String,
    body: Option<Value>,
    /// What the control socket would have answered.
    take: fn(Value) -> Value,
}

impl Call {
    /// None: the API does not have it.
    fn of(operation: &Operation) -> Option<Self> {
        let nothing: fn(Value) -> Value = |_| Value::Null;
        let whole: fn(Value) -> Value = |answer| answer;
        let call = |method, path: &str, body, take| {
            Some(Self { method, path: format!("high-availability/{path}"), body, take })
        };
        let settings =
            |method, path: &str, body, take| Some(Self { method, path: format!("settings/{path}"), body, take });
        match operation {
            Operation::Invite { valid_s, script } => {
                call(Method::GET, &format!("join-script?validSec={valid_s}&script={script}"), None, whole)
            }
            Operation::Uninvite {} => call(Method::DELETE, "join-script", None, nothing),
            Operation::Apply { fingerprints } => {
                let body = json!({ "fingerprints": fingerprints });
                call(Method::POST, "apply", Some(body), |answer| answer["admitted"].clone())
            }
            Operation::Reject { host } => call(Method::DELETE, &format!("requests/{}", segment(host)), None, nothing),
            Operation::Remove { node, force } => {
                let path = format!("members/{}?force={force}", segment(node));
                call(Method::DELETE, &path, None, |answer| answer["warning"].clone())
            }
            Operation::Pause { seconds } => {
                call(Method::POST, "pause", Some(json!({ "seconds": seconds })), |answer| answer["until"].clone())
            }
            Operation::Resume {} => call(Method::POST, "resume", None, nothing),
            Operation::RotateKey {} => call(Method::POST, "rotate-key", None, nothing),
            Operation::RotateCa { overlap_s } => {
                call(Method::POST, "rotate-ca", Some(json!({ "overlapSec": overlap_s })), nothing)
            }
            Operation::Readdress { node, new_name, address, port } => {
                let body = json!({ "name": new_name, "address": address, "port": port });
                call(Method::PUT, &format!("members/{}/address", segment(node)), Some(body), nothing)
            }
            Operation::Events { wanted } => {
                // Names and values are words, numbers and dates: only the dates have something to encode.
                let fields = serde_json::to_value(wanted).unwrap_or_default();
                let pairs =
                    fields.as_object().into_iter().flatten().map(|(name, value)| {
                        format!("{name}={}", segment(value.as_str().unwrap_or(&value.to_string())))
                    });
                call(Method::GET, &format!("events?{}", pairs.collect::<Vec<_>>().join("&")), None, whole)
            }
            Operation::TestNotifications {} => settings(Method::POST, "notifications/test", None, whole),
            Operation::Certificates {} => settings(Method::GET, "certs", None, |answer| answer),
            Operation::SetConsoleNames { names } => {
                let body = json!({ "consoleSAN": names });
                settings(Method::POST, "certs", Some(body), |answer| answer["consoleSAN"].clone())
            }
            Operation::SetCertificate { pem } => {
                settings(Method::POST, "custom-certs", Some(json!({ "certificate": pem.0 })), |answer| answer)
            }
            Operation::RemoveCertificate {} => settings(Method::DELETE, "custom-certs", None, nothing),
            // It answers before it is done: see `handover`.
            Operation::Switchover { .. } => None,
            other => Self::of_backups(other),
        }
    }

    fn of_backups(operation: &Operation) -> Option<Self> {
        let call = |method, path: &str, body| Some(Self { method, path: path.to_owned(), body, take: |answer| answer });
        let one = |id: &str| format!("backups/{}", segment(id));
        match operation {
            Operation::Backups {} => call(Method::GET, "backups?limit=1000", None),
            Operation::BackupState {} => call(Method::GET, "settings/backup", None),
            Operation::Backup { called } => call(Method::POST, "backups?wait=false", Some(json!(called))),
            Operation::VerifyBackup { id } => call(Method::POST, &format!("{}/verify?wait=false", one(id)), None),
            Operation::RenameBackup { id, called } => call(Method::PATCH, &one(id), Some(json!(called))),
            Operation::DeleteBackup { id } => call(Method::DELETE, &one(id), None),
            Operation::BackupCopies {} => call(Method::GET, "settings/backup/copies?limit=1000", None),
            // The file is one of the host's, and whoever may do this is there, too.
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Kind, Wanted};

    #[test]
    fn names_cannot_leave_their_place_in_a_path() {
        let call = Call::of(&Operation::Remove { node: "../x?force=true#".into(), force: false }).unwrap();
        assert_eq!(call.path, "high-availability/members/..%2Fx%3Fforce%3Dtrue%23?force=false");
        assert_eq!(call.method, Method::DELETE);
        let call = Call::of(&Operation::Pause { seconds: 90 }).unwrap();
        assert_eq!((call.take)(json!({ "until": 5 })), json!(5));
        let call = Call::of(&Operation::SetConsoleNames { names: vec!["lb".into()] }).unwrap();
        assert_eq!((call.path.as_str(), call.body), ("settings/certs", Some(json!({ "consoleSAN": ["lb"] }))));
        let since = "2026-11-22T18:00:00Z".parse().ok();
        let wanted = Wanted { limit: Some(5), kind: Some(Kind::Takeover), since, ..Wanted::default() };
        let path = Call::of(&Operation::Events { wanted }).unwrap().path;
        assert_eq!(path, "high-availability/events?kind=takeover&limit=5&since=2026-11-22T18%3A00%3A00Z");
    }
}
