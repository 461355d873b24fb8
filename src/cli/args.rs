//! The command line of `twistcli ha`: commands, their arguments, and the text of their help. Pure: nothing is carried
//! out here.

use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand};

use super::target::Target;
use crate::events::Kind;

const STATUS_HELP: &str = "\
While the daemon of this host does not answer, its files tell what was: that is marked as OLD, with its age,
and the exit code is 69.

Exit code: 0 healthy, 1 degraded (it serves, but something needs attention), 2 no primary,
64 wrong command line, 69 nobody answers, 77 the login is refused.

Examples:
  twistcli ha status
  twistcli ha status --watch 0.5
  twistcli ha status --json | jq .role
  twistcli ha status --address https://host1:8083,https://host2:8083,https://host3:8083 --tlscacert ca.pem";
/// The help of commands that need no further explanation.
pub(super) const DONE_OR_REFUSED: &str = "\
Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused or not confirmed
(the message says why and what to do), 77 the login is refused.";

/// Commands of `twistcli ha`.
#[derive(Debug, Subcommand)]
pub(super) enum Ha {
    /// Show the cluster as this host's daemon sees it; works on every node, PRIMARY or not
    #[command(after_help = STATUS_HELP)]
    Status(StatusArgs),
    /// Show what has happened: takeovers and their reasons, members, pauses, disks, backups
    #[command(after_help = EVENTS_HELP)]
    Events(EventsArgs),
    /// Print the line that makes another host ask for admission
    #[command(after_help = JOIN_SCRIPT_HELP)]
    JoinScript(JoinScriptArgs),
    /// Admit the hosts that ask to join, after you have compared their fingerprints
    #[command(after_help = APPLY_HELP)]
    Apply(ApplyArgs),
    /// Turn down a host that asks to join
    #[command(after_help = DONE_OR_REFUSED)]
    Reject {
        #[command(flatten)]
        target: Target,
        /// Its name
        #[arg(value_name = "NODE")]
        node: String,
    },
    /// Close all invitations: join scripts that were given out no longer work
    #[command(after_help = DONE_OR_REFUSED)]
    Revoke {
        #[command(flatten)]
        target: Target,
    },
    /// Remove a member for good, dead or alive
    #[command(after_help = REMOVE_HELP)]
    Remove(RemoveArgs),
    /// Hand the PRIMARY role over to another member
    #[command(visible_alias = "step-down", after_help = SWITCHOVER_HELP)]
    Switchover(SwitchoverArgs),
    /// Suspend automatic takeover for a while, for maintenance
    #[command(after_help = PAUSE_HELP)]
    Pause {
        #[command(flatten)]
        target: Target,
        /// How long; the pause ends by itself
        #[arg(long = "for", value_name = "SPAN", default_value = "30m", value_parser = span)]
        span: Duration,
    },
    /// End a pause: automatic takeover works again
    #[command(after_help = DONE_OR_REFUSED)]
    Resume {
        #[command(flatten)]
        target: Target,
    },
    /// Replace the cluster key, which protects the private key of the certificate authority
    #[command(after_help = ROTATE_KEY_HELP)]
    RotateKey {
        #[command(flatten)]
        target: Target,
    },
    /// Replace the certificate authority, and with it all certificates, while the cluster runs
    #[command(after_help = ROTATE_CA_HELP)]
    RotateCa(RotateCaArgs),
    /// Send a test event to all webhooks, and to the command of the host that sends it
    #[command(after_help = TEST_NOTIFICATIONS_HELP)]
    TestNotifications {
        #[command(flatten)]
        target: Target,
        /// Print the result of each as JSON
        #[arg(long)]
        json: bool,
    },
    /// Change the address, port or name of a member
    #[command(after_help = SET_ADDRESS_HELP)]
    SetAddress(SetAddressArgs),
    /// Rehearse a takeover: keep writing, take over, measure the outage, prove that nothing was lost
    #[command(after_help = DRILL_HELP)]
    Drill(DrillArgs),
}

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    pub target: Target,
    /// Print the status as JSON (with --watch: one line each time)
    #[arg(long)]
    pub json: bool,
    /// Refresh every SECONDS (at least 0.1) until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = interval)]
    pub watch: Option<Duration>,
}

const EVENTS_HELP: &str = "\
Without --address: what this host has recorded in its events.jsonl; this works on every node, even while its
daemon does not run. With --address: the history of the cluster, which each PRIMARY continues.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 77 the login is refused.

Examples:
  twistcli ha events
  twistcli ha events --kind takeover --since 7d
  twistcli ha events --json | jq '.[0]'";

#[derive(Debug, Args)]
pub(super) struct EventsArgs {
    #[command(flatten)]
    pub target: Target,
    /// Show at most this many, the newest first
    #[arg(long, value_name = "COUNT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=400))]
    pub limit: u32,
    /// Only events about this, such as takeover, membership or disk
    #[arg(long, value_name = "KIND")]
    pub kind: Option<Kind>,
    /// Only what happened in this span
    #[arg(long, value_name = "SPAN", value_parser = span)]
    pub since: Option<Duration>,
    /// Print them as JSON, with all fields
    #[arg(long)]
    pub json: bool,
}

const JOIN_SCRIPT_HELP: &str = "\
The line goes to standard output, everything else to standard error. It carries a secret: whoever has
it may ask to join, nothing more. `twistcli ha apply` admits the hosts and closes the invitation.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  twistcli ha join-script
  twistcli ha join-script --valid 2h
  twistcli ha join-script --script > join.sh";

#[derive(Debug, Args)]
pub(super) struct JoinScriptArgs {
    #[command(flatten)]
    pub target: Target,
    /// How long hosts may use it
    #[arg(long, value_name = "SPAN", default_value = "1h", value_parser = span)]
    pub valid: Duration,
    /// Print the script itself instead of the line that fetches it
    #[arg(long)]
    pub script: bool,
    /// Print the line, the script (with --script) and the expiry as JSON
    #[arg(long)]
    pub json: bool,
}

const APPLY_HELP: &str = "\
Compare each fingerprint with the one that the join script showed on that host. A host whose fingerprint
changes after you have seen it is not admitted.

Exit code: 0 done and all members up, 64 wrong command line, 69 nobody answers,
75 refused, not confirmed, or not all up within the time given by --wait, 77 the login is refused.

Examples:
  twistcli ha apply
  twistcli ha apply --yes --no-wait";

#[derive(Debug, Args)]
pub(super) struct ApplyArgs {
    #[command(flatten)]
    pub target: Target,
    /// Do not ask; needed where standard input is no terminal
    #[arg(long, short)]
    pub yes: bool,
    /// Return as soon as they are admitted; they then copy the database and get their votes by themselves
    #[arg(long)]
    pub no_wait: bool,
    /// How long to wait until all are SECONDARY
    #[arg(long, value_name = "SPAN", default_value = "1h", value_parser = span, conflicts_with = "no_wait")]
    pub wait: Duration,
}

const REMOVE_HELP: &str = "\
The member loses its vote, its certificate is refused for good, and it stops serving. Its data stays on its
disk. To bring it back, run the join script on it again; to replace it, run the script on another host. It
still knows its secrets, such as the private key of a certificate that was uploaded (twistcli certs upload).
The PRIMARY itself cannot be removed: run `twistcli ha switchover` first.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused or not confirmed,
77 the login is refused.

Examples:
  twistcli ha remove host3
  twistcli ha remove host3 --yes";

#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    #[command(flatten)]
    pub target: Target,
    /// Its name or id
    #[arg(value_name = "NODE")]
    pub node: String,
    /// Remove it even if no majority of the remaining members answers: the cluster may then stop serving
    #[arg(long)]
    pub force: bool,
    /// Do not ask; needed where standard input is no terminal
    #[arg(long, short)]
    pub yes: bool,
}

const SWITCHOVER_HELP: &str = "\
The ports of the PRIMARY are closed, the last write is replicated, then the other member takes the role. No
acknowledged write is lost, and two hosts never answer at the same time. With --address the gap is measured
from here: the longest time for which no Console answered.

Exit code: 0 done (with --dry-run: it could be done), 64 wrong command line, 69 nobody
answers, 75 refused (with --dry-run: it would be), 77 the login is refused.

Examples:
  twistcli ha switchover
  twistcli ha switchover --to host2
  twistcli ha switchover --dry-run";

#[derive(Debug, Args)]
pub(super) struct SwitchoverArgs {
    #[command(flatten)]
    pub target: Target,
    /// Hand over to this member [default: the best prepared one]
    #[arg(long, value_name = "NODE")]
    pub to: Option<String>,
    /// Make all checks, but change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print the checks and the write gap as JSON
    #[arg(long)]
    pub json: bool,
}

const PAUSE_HELP: &str = "\
While paused, only the current PRIMARY may serve: if it fails, nobody takes over until the pause ends.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  twistcli ha pause
  twistcli ha pause --for 2h";

const ROTATE_KEY_HELP: &str = "\
All members fetch a new cluster key from each other; when each has it on its disk, the certificate
authority's private key is encrypted with it. This also happens by itself whenever a member is removed.

Exit code: 0 begun (twistcli ha status shows how far it is), 64 wrong command line, 69 the daemon cannot be
reached, 75 refused.

Example:
  twistcli ha rotate-key";
const ROTATE_CA_HELP: &str = "\
First, all members trust the new authority beside the old one, for the time of the overlap. Give the new
ca.pem, in certificates/ of the data folder, to your clients in that time. Then the new authority signs: all
certificates of nodes and Consoles are reissued, and the old authority is no longer trusted. Join scripts
that were given out stop working.

If you removed a host that you do not trust, this shuts it out: it knows the old authority's key, and could
pass for a member until this is over. Choose a short overlap then, and restart the members one by one.

Exit code: 0 begun (twistcli ha status shows how far it is), 64 wrong command line, 69 the daemon cannot be
reached, 75 refused or not confirmed.

Examples:
  twistcli ha rotate-ca
  twistcli ha rotate-ca --overlap 7d --yes";

#[derive(Debug, Args)]
pub(super) struct RotateCaArgs {
    #[command(flatten)]
    pub target: Target,
    /// How long the new authority is trusted before it signs
    #[arg(long, value_name = "SPAN", default_value = "1d", value_parser = span)]
    pub overlap: Duration,
    /// Do not ask; needed where standard input is no terminal
    #[arg(long, short)]
    pub yes: bool,
}

const TEST_NOTIFICATIONS_HELP: &str = "\
This host's daemon sends it, PRIMARY or not; with --address the PRIMARY. The webhooks are set on the page
(Manage > System > Settings) or with POST settings/notifications, the command with NOTIFY_COMMAND on each
host.

Exit code: 0 all received it, 1 one did not, or nobody is to be notified, 64 wrong command line, 69 nobody
answers, 75 refused, 77 the login is refused.

Example:
  twistcli ha test-notifications";
const SET_ADDRESS_HELP: &str = "\
What you do not name stays the same. The member may be up or down; the others dial the new address at once.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  twistcli ha set-address host3 --to 192.0.2.13
  twistcli ha set-address host3 --to host3.example.com --port 9086 --name host3b";

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("new").required(true).multiple(true).args(["to", "port", "name"])))]
pub(super) struct SetAddressArgs {
    #[command(flatten)]
    pub target: Target,
    /// Its current name or id
    #[arg(value_name = "NODE")]
    pub node: String,
    /// New host name or IP address
    #[arg(long, value_name = "HOST")]
    pub to: Option<String>,
    /// New HIGH_AVAILABILITY_PORT
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// New name
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
}

const DRILL_HELP: &str = "\
Runs on the PRIMARY, where whoever may use the daemon's socket needs no login, or with --address, and only
when all three members are healthy and nothing is paused. It writes tags named drill-... through the API,
one after the other. Meanwhile another member takes over: by a switchover or, with --kill, because the
daemon of this host is killed, as in a crash (its service manager starts it again). It goes on until the new
PRIMARY has acknowledged 50 writes, checks that every acknowledged tag is there, and removes them all. The
result is printed and, on the PRIMARY, appended to drills.jsonl in the data folder. The audits have one row
for the drill.

Exit code: 0 nothing was lost, 1 an acknowledged write is missing, 64 wrong command line, 69 daemon or
Console cannot be reached, 75 refused, or no other member took over, 77 the login is refused.

Examples:
  sudo twistcli ha drill
  sudo twistcli ha drill --kill --json
  twistcli ha drill --address https://console.example.com:8083 --user ann";

#[derive(Debug, Args)]
pub(super) struct DrillArgs {
    #[command(flatten)]
    pub target: Target,
    /// Kill the PRIMARY's process instead of a switchover
    #[arg(long)]
    pub kill: bool,
    /// The Consoles' HTTPS port [default: that of --address, else the one that the daemon knows]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub https_port: Option<u16>,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// A span in seconds, for `--watch`.
pub(super) fn interval(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("it must be a number of seconds from 0.1 to 86400".into()),
    }
}

/// A whole number with its unit: `90s`, `30m`, `2h`, `1d`. The daemon says what is allowed where.
pub(super) fn span(text: &str) -> Result<Duration, String> {
    let parsed = text.char_indices().next_back().and_then(|(at, unit)| {
        let unit = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3_600,
            'd' => 86_400,
            _ => return None,
        };
        let digits = text[..at].bytes().all(|byte| byte.is_ascii_digit());
        text[..at]
            .parse::<u64>()
            .ok()
            .filter(|count| digits && (1..=1_000_000).contains(count))
            .map(|count| count * unit)
    });
    parsed.map(Duration::from_secs).ok_or_else(|| "it must be a number with its unit: 90s, 30m, 2h or 1d".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_a_number_and_a_unit() {
        let seconds = |text| span(text).map(|span| span.as_secs()).ok();
        assert_eq!(["90s", "30m", "2h", "1d"].map(seconds), [Some(90), Some(1_800), Some(7_200), Some(86_400)]);
        for bad in ["", "30", "m", "0m", "+1m", "-1m", "1.5h", "1 h", "1y", "9999999999d", "1h30m", "ä"] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }
}
