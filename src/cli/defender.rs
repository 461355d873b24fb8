//! `twistcli defender`: the agents of other hosts, what they have told, and what they watch.

use std::{fs, path::PathBuf, time::Duration};

use clap::Subcommand;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    args::{DONE_OR_REFUSED, span},
    columns::{self, Cell, Paint, print_json, say},
    lists,
    quantity::{date, duration, moment},
    remote::segment,
    stop::{EX_NOINPUT, Stop},
    target::Target,
};
use crate::{
    control::Call,
    defender::wire::{Facts, Policy, Watched},
};

const POLICY_HELP: &str = "\
Without --set, the policy in force is shown. A file has what the API takes, as:
  { \"paths\": [{ \"path\": \"/etc\", \"recursive\": true }], \"perMinute\": 10, \"hashBytes\": 67108864 }

Exit code: 0 done, 64 wrong command line, 66 the file cannot be read, 69 nobody answers, 75 refused,
77 the login is refused.

Examples:
  twistcli defender policy
  twistcli defender policy --json > policy.json && twistcli defender policy --set policy.json";
const TOKEN_HELP: &str = "\
`twistcli defender install-script` does all of it in one line. Without it, whoever has the token may
register hosts until it ends. On such a host:
  defender register --console HOST:8083 --token-file FILE && defender run

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  twistcli defender token
  twistcli defender token --for 7d";

const SETTINGS_HELP: &str = "\
Without a span, the settings in force are shown. Who is away for longer than the first is told of
by an event, which goes to the webhooks, too. Who is away for longer than the second is removed: its
certificate is worth nothing from then on, and the host must be registered again. What it has told
stays.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  twistcli defender settings
  twistcli defender settings --alert-after 1h --remove-after 7d";
/// The states of the API.
const STATES: [&str; 5] = ["connected", "away", "alert", "removed", "withdrawn"];
const INSTALL_HELP: &str = "\
Run the line as root on each host that is to become a Defender. It fetches the program from the
Console, checks it, registers the host, installs the unit where systemd runs, and starts the agent.
Run again, it installs the version that the Console has by then. Options go behind the line, as in:
  ... | sudo bash -s -- --name web1

The line goes to standard output, everything else to standard error. It carries a secret: whoever
has it may register hosts until it ends.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  twistcli defender install-script
  twistcli defender install-script --for 7d --script > defender.sh";

/// Commands of `twistcli defender`.
#[derive(Debug, Subcommand)]
pub(super) enum Defender {
    /// List the Defenders, and whether they are connected
    #[command(after_help = DONE_OR_REFUSED)]
    List {
        #[command(flatten)]
        target: Target,
        /// Also those that were removed or withdrawn
        #[arg(long)]
        all: bool,
        /// Only those in this state; alert: away for too long
        #[arg(long, value_name = "STATE", value_parser = STATES)]
        state: Option<String>,
        /// Only those whose name or host name has this in it
        #[arg(long, value_name = "TEXT")]
        name: Option<String>,
        /// Only those whose program is of this version
        #[arg(long, value_name = "VERSION")]
        of_version: Option<String>,
        /// Print them as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what Defenders have told, the newest first
    #[command(after_help = DONE_OR_REFUSED)]
    Events {
        #[command(flatten)]
        target: Target,
        /// Only those of the Defender with this id
        #[arg(long, value_name = "ID")]
        defender: Option<String>,
        /// Only those of this kind: file, dropped, ..., or others: all but file
        #[arg(long, value_name = "KIND")]
        kind: Option<String>,
        /// Show at most this many
        #[arg(long, value_name = "NUMBER", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
        limit: u32,
        /// Print them as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what all Defenders watch, or set it
    #[command(after_help = POLICY_HELP)]
    Policy {
        #[command(flatten)]
        target: Target,
        /// File with the policy that is to be in force
        #[arg(long, value_name = "FILE")]
        set: Option<PathBuf>,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the line that makes a host a Defender
    #[command(after_help = INSTALL_HELP)]
    InstallScript {
        #[command(flatten)]
        target: Target,
        /// How long it is good
        #[arg(long = "for", value_name = "SPAN", default_value = "1d", value_parser = span)]
        span: Duration,
        /// Print the script itself instead of the line that fetches it
        #[arg(long)]
        script: bool,
        /// Print the line, the script (with --script) and the expiry as JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a token with which hosts become Defenders
    #[command(after_help = TOKEN_HELP)]
    Token {
        #[command(flatten)]
        target: Target,
        /// How long it is good
        #[arg(long = "for", value_name = "SPAN", default_value = "1d", value_parser = span)]
        span: Duration,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show after which absence a Defender is told of and removed, or set it
    #[command(after_help = SETTINGS_HELP)]
    Settings {
        #[command(flatten)]
        target: Target,
        /// From the last connection to the alert, 15m to 30d
        #[arg(long, value_name = "SPAN", value_parser = span)]
        alert_after: Option<Duration>,
        /// From the last connection to the removal, up to 365d
        #[arg(long, value_name = "SPAN", value_parser = span, conflicts_with = "never_remove")]
        remove_after: Option<Duration>,
        /// Remove none, however long it is away
        #[arg(long)]
        never_remove: bool,
        /// Print them as JSON
        #[arg(long)]
        json: bool,
    },
    /// Shut a Defender out for good
    #[command(after_help = DONE_OR_REFUSED)]
    Withdraw {
        #[command(flatten)]
        target: Target,
        /// Its id
        #[arg(value_name = "ID")]
        id: String,
    },
}

/// A row of the list.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Row {
    id: String,
    name: String,
    state: String,
    connected: bool,
    last_seen: u64,
    certificate_expiration: u64,
    version: String,
    compatible_version: bool,
    facts: Facts,
}

/// A row of the events.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Event {
    name: String,
    sequence: u64,
    time: u64,
    kind: String,
    event: Value,
}

#[derive(Serialize, Deserialize)]
struct Line {
    line: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    script: Option<String>,
    until: u64,
}

#[derive(Deserialize)]
struct Invitation {
    token: String,
    until: u64,
}

/// Carries a command out.
///
/// # Errors
/// When nobody answers, or it is refused.
pub(super) fn run(command: &Defender, paint: Paint) -> Result<(), Stop> {
    match command {
        Defender::List { target, all, state, name, of_version, json } => {
            let mut path = format!("defenders?all={all}");
            for (key, wanted) in [("state", state), ("name", name), ("version", of_version)] {
                let wanted = wanted.as_ref().map(|wanted| format!("&{key}={}", segment(wanted)));
                path.push_str(&wanted.unwrap_or_default());
            }
            let found = lists::all(&target.console()?, &path)?;
            if *json { print_json(&found) } else { Ok(columns::print(&table(&found, paint)?)?) }
        }
        Defender::Events { target, defender, kind, limit, json } => {
            let of = defender.as_ref().map(|id| format!("&defender={}", segment(id))).unwrap_or_default();
            let kind = kind.as_ref().map(|kind| format!("&kind={}", segment(kind))).unwrap_or_default();
            let call = Call::get(format!("defenders/events?cursor=first&limit={limit}{of}{kind}"));
            let found: Vec<Value> = target.console()?.call(&call)?;
            if *json { print_json(&found) } else { Ok(columns::print(&events(&found, paint)?)?) }
        }
        Defender::Policy { target, set, json } => policy(target, set.as_ref(), *json, paint),
        Defender::InstallScript { target, span, script, json } => {
            let body = json!({ "validSec": span.as_secs(), "script": script });
            let made: Line = target.console()?.call(&Call::post("defenders/install-script").with(body))?;
            if *json {
                return print_json(&made);
            }
            eprintln!("Run this as root on each host that is to become a Defender, until {}:", date(made.until));
            match made.script {
                Some(script) => Ok(columns::print(&script)?),
                None => say(&made.line),
            }
        }
        Defender::Token { target, span, json } => {
            let body = json!({ "validSec": span.as_secs() });
            let made: Value = target.console()?.call(&Call::post("defenders/tokens").with(body))?;
            if *json {
                return print_json(&made);
            }
            let Invitation { token, until } = lists::rows(&[made])?.remove(0);
            eprintln!("This token registers hosts until {}:", date(until));
            say(&token)
        }
        Defender::Settings { target, alert_after, remove_after, never_remove, json } => {
            let remove_after = if *never_remove { Some(Duration::ZERO) } else { *remove_after };
            settings(target, *alert_after, remove_after, *json)
        }
        Defender::Withdraw { target, id } => {
            target.console()?.have_done(&Call::delete(format!("defenders/{}", segment(id))))?;
            say(&format!("The Defender {id} is withdrawn."))
        }
    }
}

fn policy(target: &Target, set: Option<&PathBuf>, json: bool, paint: Paint) -> Result<(), Stop> {
    let call = match set {
        None => Call::get("defenders/policy"),
        Some(path) => {
            let unread = |why: String| Stop::tell(EX_NOINPUT, &format!("{} cannot be read: {why}", path.display()));
            let text = fs::read_to_string(path).map_err(|error| unread(error.to_string()))?;
            let body: Value = serde_json::from_str(&text).map_err(|error| unread(error.to_string()))?;
            Call::post("defenders/policy").with(body)
        }
    };
    let policy: Policy = target.console()?.call(&call)?;
    if json {
        return print_json(&policy);
    }
    let Policy { version, paths, per_minute, hash_bytes } = &policy;
    say(&format!(
        "Version {version}: {per_minute} events of one path a minute, hashes of files up to {hash_bytes} bytes"
    ))?;
    let row = |Watched { path, recursive }: &Watched| -> Vec<Cell> {
        vec![path.as_str().into(), if *recursive { "all below" } else { "what is in it" }.into()]
    };
    let rows: Vec<Vec<Cell>> = paths.iter().map(row).collect();
    Ok(columns::print(&columns::table(&[("PATH", false), ("WATCHED", false)], &rows, paint))?)
}

/// The settings of an absence.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Absence {
    alert_sec: u64,
    remove_sec: u64,
}

fn settings(target: &Target, alert: Option<Duration>, remove: Option<Duration>, json: bool) -> Result<(), Stop> {
    let console = target.console()?;
    let mut set: Absence = console.call(&Call::get("settings/defenders"))?;
    if alert.is_some() || remove.is_some() {
        // What is not named stays as it is.
        set.alert_sec = alert.map_or(set.alert_sec, |span| span.as_secs());
        set.remove_sec = remove.map_or(set.remove_sec, |span| span.as_secs());
        set = console.call(&Call::post("settings/defenders").with(json!(set)))?;
    }
    if json {
        return print_json(&set);
    }
    say(&format!("Told of after  {}", duration(1000 * set.alert_sec)))?;
    match set.remove_sec {
        0 => say("Removed after  never"),
        seconds => say(&format!("Removed after  {}", duration(1000 * seconds))),
    }
}

fn table(found: &[Value], paint: Paint) -> Result<String, Stop> {
    let row = |row: Row| {
        let colour = match row.state.as_str() {
            "connected" => "32",
            "away" => "33",
            _ => "31",
        };
        let state = Cell::coloured(colour, &row.state);
        let version = if row.compatible_version { row.version } else { format!("{} (other)", row.version) };
        let seen = if row.connected { String::new() } else { date(row.last_seen) };
        vec![
            row.name.into(),
            state,
            seen.into(),
            version.into(),
            row.facts.hostname.into(),
            date(row.certificate_expiration).into(),
            row.id.into(),
        ]
    };
    let rows: Vec<Vec<Cell>> = lists::rows::<Row>(found)?.into_iter().map(row).collect();
    let heads = ["NAME", "STATE", "LAST SEEN", "VERSION", "HOST", "CERTIFICATE ENDS", "ID"].map(|head| (head, false));
    Ok(columns::table(&heads, &rows, paint))
}

fn events(found: &[Value], paint: Paint) -> Result<String, Stop> {
    let row = |event: Event| {
        let word = |name: &str| event.event[name].as_str().unwrap_or_default().to_owned();
        let what = match event.kind.as_str() {
            "file" => format!("{} {}", word("change"), word("path")),
            _ => event.event.to_string(),
        };
        let owner = event.event["after"]["owner"].as_str().unwrap_or_default().to_owned();
        vec![
            moment(event.time).into(),
            event.name.into(),
            event.sequence.to_string().into(),
            event.kind.into(),
            owner.into(),
            what.into(),
        ]
    };
    let rows: Vec<Vec<Cell>> = lists::rows::<Event>(found)?.into_iter().map(row).collect();
    let heads = [
        ("TIME (UTC)", false),
        ("DEFENDER", false),
        ("NUMBER", true),
        ("KIND", false),
        ("OWNER", false),
        ("WHAT", false),
    ];
    Ok(columns::table(&heads, &rows, paint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_read_well() {
        let row = json!({ "id": "ab", "name": "web1", "state": "away", "connected": false, "lastSeen": 1_793_383_200, "version": "9.9",
            "certificateExpiration": 1_793_383_200, "facts": { "hostname": "web1.example" }, "later": 1 });
        let text = table(&[row], Paint(false)).unwrap();
        let line = text.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(line, "web1 away 2026-10-30 18:00 UTC 9.9 (other) web1.example 2026-10-30 18:00 UTC ab");
        let file = json!({ "path": "/etc/passwd", "change": "modified", "after": { "owner": "root" } });
        let event = |kind, event| json!({ "name": "web1", "sequence": 7, "time": 1_793_383_207_000_u64, "kind": kind, "event": event });
        let text = events(&[event("file", file), event("dropped", json!({ "count": 3 }))], Paint(false)).unwrap();
        assert!(text.contains("file     root   modified /etc/passwd") && text.contains("{\"count\":3}"), "{text}");
    }
}
