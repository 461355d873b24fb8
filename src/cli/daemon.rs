//! The conversation with the daemon of this host: what is said when it cannot be reached, refuses, or is not PRIMARY. Must
//! never ask twice for what changes something.

use std::{io, path::PathBuf, time::Duration};

use serde_json::Value;

use super::{
    login::LoginArgs,
    place::Place,
    remote::Remote,
    stop::{EX_UNAVAILABLE, Stop},
};
use crate::{
    cluster::Role,
    control::{self, ControlError, OPERATION_TIMEOUT, Operation},
    node::Status,
};

/// How long one answer of the daemon may take.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long the outcome of an operation may take: the daemon gives up first.
const OUTCOME_LIMIT: Duration = OPERATION_TIMEOUT.saturating_add(ANSWER_LIMIT);

/// The daemon of this host.
pub(super) struct Local {
    /// Where it listens.
    pub socket: PathBuf,
    /// Its data folder. Of a bare socket: the folder that the socket is in.
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
        let place = control::place(&self.socket, ANSWER_LIMIT).ok();
        place.and_then(|place| place.https_port).unwrap_or(self.https_port)
    }

    /// The daemon's picture of the cluster.
    ///
    /// # Errors
    /// When it does not answer.
    pub(super) fn status(&self) -> Result<Status, Stop> {
        control::status(&self.socket, ANSWER_LIMIT).map_err(|error| unanswered(&error))
    }

    /// The same, unless another host is PRIMARY as far as this host knows: then `command` has to be run there.
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

    /// Has the daemon carry an operation out.
    ///
    /// # Errors
    /// When it does not answer or refuses.
    pub(super) fn operate(&self, operation: &Operation) -> Result<Value, Stop> {
        control::operate(&self.socket, operation.clone(), OUTCOME_LIMIT).map_err(|error| match error {
            ControlError::Refused(why) => match control::status(&self.socket, ANSWER_LIMIT) {
                // The role may have gone between our look and the request.
                Ok(status) if status.primary.is_some() && status.primary != Some(status.node) => {
                    let there = elsewhere(&status, &command(operation)).unwrap_or_default();
                    Stop::refuse(&format!("{why}\n  {there}"))
                }
                _ => Stop::refuse(&why),
            },
            ControlError::NoAnswer { .. } => {
                let text = format!("{}\n  Whether it was done is unknown. See: twistcli ha status", explain(&error));
                Stop::tell(EX_UNAVAILABLE, &text)
            }
            other => unanswered(&other),
        })
    }
}

fn unanswered(error: &ControlError) -> Stop {
    Stop::tell(EX_UNAVAILABLE, &explain(error))
}

/// Which host has to be asked instead, and how.
fn elsewhere(status: &Status, command: &str) -> Option<String> {
    if status.role == Role::RequestJoin {
        return Some(format!("{} has not joined yet. On the PRIMARY, run: {command}", status.name));
    }
    let id = status.primary.filter(|id| *id != status.node)?;
    let (name, address) = match status.members.iter().find(|member| member.id == id) {
        Some(member) => (member.name.clone(), format!(" ({})", member.address)),
        None => (format!("node {id}"), String::new()),
    };
    Some(format!("{} is {}; {name}{address} is PRIMARY. Run there: {command}", status.name, status.role))
}

/// The command line that asks for an operation.
pub(super) fn command(operation: &Operation) -> String {
    let option = |name: &str, value: &Option<String>| match value {
        Some(value) => format!(" --{name} {value}"),
        None => String::new(),
    };
    let flag = |name: &str, on: bool| if on { format!(" --{name}") } else { String::new() };
    let text = match operation {
        Operation::Invite { valid_s, script } => {
            let valid = if *valid_s == 3600 { String::new() } else { format!(" --valid {valid_s}s") };
            format!("join-script{valid}{}", flag("script", *script))
        }
        Operation::Uninvite {} => "revoke".to_owned(),
        Operation::Apply { .. } => "apply".to_owned(),
        Operation::Reject { host } => format!("reject {host}"),
        Operation::Remove { node, force } => format!("remove {node}{}", flag("force", *force)),
        Operation::Switchover { to, dry_run } => {
            format!("switchover{}{}", option("to", to), flag("dry-run", *dry_run))
        }
        Operation::Pause { seconds } => format!("pause --for {seconds}s"),
        Operation::Resume {} => "resume".to_owned(),
        Operation::RotateKey {} => "rotate-key".to_owned(),
        Operation::RotateCa { overlap_s } => format!("rotate-ca --overlap {overlap_s}s"),
        Operation::TestNotifications {} => "test-notifications".to_owned(),
        Operation::Events { .. } => "events".to_owned(),
        Operation::Readdress { node, new_name, address, port } => format!(
            "set-address {node}{}{}{}",
            option("to", address),
            option("port", &port.map(|port| port.to_string())),
            option("name", new_name)
        ),
        Operation::Certificates {} => return "twistcli certs list".to_owned(),
        Operation::SetConsoleNames { names } => return format!("twistcli certs set-names {}", names.join(" ")),
        Operation::SetCertificate { .. } => return "twistcli certs upload FILE".to_owned(),
        Operation::RemoveCertificate {} => return "twistcli certs remove".to_owned(),
        of_backups => return backup_command(of_backups),
    };
    format!("twistcli ha {text}")
}

fn backup_command(operation: &Operation) -> String {
    match operation {
        Operation::Backups {} => "twistcli backup list".to_owned(),
        Operation::BackupState {} => "twistcli backup status".to_owned(),
        Operation::Backup { called } => format!("twistcli backup create {called}"),
        Operation::VerifyBackup { id } => format!("twistcli backup verify {id}"),
        Operation::RenameBackup { id, called } => format!("twistcli backup rename {id} {called}"),
        Operation::DeleteBackup { id } => format!("twistcli backup delete {id}"),
        Operation::BackupCopies {} => "twistcli backup list --remote".to_owned(),
        Operation::FetchBackup { place } => format!("twistcli backup fetch {place}"),
        Operation::Restore { file, .. } => format!("twistcli restore {}", file.display()),
        _ => "twistcli --help".to_owned(),
    }
}

/// What went wrong on the way to the daemon, and what to do about it.
pub(super) fn explain(error: &ControlError) -> String {
    let hint = match error {
        ControlError::Unreachable { error, .. } => match error.kind() {
            io::ErrorKind::NotFound => {
                "There is no such socket. Is twistlockd running on this host? Try: systemctl status twistlockd\n  \
                 If its data folder is another one, name it: --data DIR, --control PATH or TWISTLOCK_DATA=DIR.\n  \
                 For a cluster elsewhere, name its Consoles: --address https://HOST:8083"
            }
            io::ErrorKind::PermissionDenied => "Only the owner of the socket may use it. Try again with sudo.",
            io::ErrorKind::ConnectionRefused => {
                "The socket is left over: twistlockd does not run. Try: systemctl status twistlockd"
            }
            _ => "Is twistlockd running on this host? Try: systemctl status twistlockd",
        },
        ControlError::NoAnswer { .. } => {
            "twistlockd is there but does not answer: stopped, frozen or overloaded. Try: journalctl -u twistlockd -e"
        }
        ControlError::Malformed { .. } => {
            "twistcli and twistlockd are of different versions. Install the same on both."
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
    fn commands_are_written_as_they_are_typed() {
        for (operation, text) in [
            (Operation::Invite { valid_s: 3600, script: true }, "join-script --script"),
            (Operation::Invite { valid_s: 60, script: false }, "join-script --valid 60s"),
            (Operation::Remove { node: "host3".into(), force: true }, "remove host3 --force"),
            (Operation::Switchover { to: Some("host2".into()), dry_run: true }, "switchover --to host2 --dry-run"),
            (Operation::Pause { seconds: 1800 }, "pause --for 1800s"),
            (
                Operation::Readdress { node: "2".into(), new_name: None, address: Some("a".into()), port: Some(9) },
                "set-address 2 --to a --port 9",
            ),
        ] {
            assert_eq!(command(&operation), format!("twistcli ha {text}"));
        }
    }
}
