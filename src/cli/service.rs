//! `twistcli service`: the program beside the Console. Must never decide whether something may be done.

use std::{thread, time::Duration};

use clap::Subcommand;
use serde_json::Value;

use super::{
    args::DONE_OR_REFUSED,
    client::ApiClient,
    columns::{self, Cell, Paint, print_json, say},
    lists,
    quantity::{duration, moment, size},
    stop::Stop,
    target::Target,
};
use crate::{
    clock::unix_time_ms,
    control::Call,
    service::{DatabaseReport, FolderReport, Report, output::OutputLine},
};

/// How often new lines are asked for.
const PACE: Duration = Duration::from_millis(500);
/// Lines that are asked for at a time while they are followed.
const AT_A_TIME: u32 = 2000;
/// Exit code for a service that should be ready and is not.
const NOT_READY: u8 = 1;

const STATUS_HELP: &str = "\
It runs on the PRIMARY alone: on another member it is stopped, and that is how it should be.

Exit code: 0 it is ready, or stopped on purpose, 1 it is not ready, 64 wrong command line, 69 nobody answers,
75 refused, 77 the login is refused.

Examples:
  twistcli service status
  twistcli service status --json | jq .state";
const STOP_HELP: &str = "\
It gets SIGTERM, and after SERVICE_STOP_SECONDS SIGKILL. Its ports are closed; the Console goes on. It stays
stopped until `twistcli service start`, or until another member becomes PRIMARY.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Example:
  twistcli service stop";
const DATABASES_HELP: &str = "\
They are known where the service runs: on the PRIMARY. PAGES TO COPY are those whose committed content only the WAL
has; while there are any, the raft log is kept.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  twistcli service databases
  twistcli service databases --json | jq '.databases[].path'";
const LOGS_HELP: &str = "\
These are the lines that this node has in its memory, 2000 at most. All of them are in the log of the daemon, with
the target service: journalctl -u twistlockd.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  twistcli service logs -f
  twistcli service logs --lines 20 --json";

/// Commands of `twistcli service`.
#[derive(Debug, Subcommand)]
pub(super) enum Service {
    /// Show how the service is, on this node or on the PRIMARY (--address)
    #[command(after_help = STATUS_HELP)]
    Status {
        #[command(flatten)]
        target: Target,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the databases in the folder of the service, and what was refused
    #[command(after_help = DATABASES_HELP)]
    Databases {
        #[command(flatten)]
        target: Target,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Start the service that was stopped
    #[command(after_help = DONE_OR_REFUSED)]
    Start {
        #[command(flatten)]
        target: Target,
        /// Print how it is as JSON
        #[arg(long)]
        json: bool,
    },
    /// Stop the service on the PRIMARY, for maintenance
    #[command(after_help = STOP_HELP)]
    Stop {
        #[command(flatten)]
        target: Target,
        /// Print how it is as JSON
        #[arg(long)]
        json: bool,
    },
    /// End the service and start it again
    #[command(after_help = DONE_OR_REFUSED)]
    Restart {
        #[command(flatten)]
        target: Target,
        /// Print how it is as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the last lines that the service has written
    #[command(after_help = LOGS_HELP)]
    Logs {
        #[command(flatten)]
        target: Target,
        /// At most this many
        #[arg(long, value_name = "COUNT", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=2000))]
        lines: u32,
        /// Go on with what it writes, until interrupted
        #[arg(long, short)]
        follow: bool,
        /// Print them as JSON (with --follow: one line each)
        #[arg(long)]
        json: bool,
    },
}

/// Carries a command out, and returns the exit code.
///
/// # Errors
/// When nobody answers, or it is refused.
pub(super) fn run(command: &Service, paint: Paint) -> Result<u8, Stop> {
    match command {
        Service::Status { target, json } => status(&target.client()?, *json, paint),
        Service::Databases { target, json } => databases(&target.client()?, *json, paint).map(|()| 0),
        Service::Start { target, json } => operate(&target.client()?, "start", "is started", *json),
        Service::Stop { target, json } => operate(&target.client()?, "stop", "is told to end", *json),
        Service::Restart { target, json } => operate(&target.client()?, "restart", "begins again", *json),
        Service::Logs { target, lines, follow, json } => logs(&target.client()?, *lines, *follow, *json).map(|()| 0),
    }
}

fn status(client: &ApiClient, json: bool, paint: Paint) -> Result<u8, Stop> {
    let report: Report = client.call(&Call::get("service"))?;
    if json {
        print_json(&report)?;
    } else {
        columns::print(&render(&report, unix_time_ms(), paint))?;
    }
    let well = report.is_ready() || report.is_stopped() || report.held;
    Ok(if well { 0 } else { NOT_READY })
}

/// How a service is, for people.
fn render(report: &Report, now: u64, paint: Paint) -> String {
    let code = match report.state.as_str() {
        "ready" => "32",
        "stopped" => "",
        _ => "33",
    };
    let held = if report.held { ", by an administrator" } else { "" };
    let since = duration(now.saturating_sub(report.since_ms));
    let state = paint.text(code, &columns::harmless(&report.state));
    let mut lines = vec![("state", format!("{state}{held}, for {since}"))];
    lines.push(("command", columns::harmless(&report.command.join(" "))));
    lines.push(("folder", columns::harmless(&report.folder.display().to_string())));
    lines.push(("ports", columns::harmless(&report.ports.join(", "))));
    if let Some(pid) = report.pid {
        lines.push(("pid", pid.to_string()));
    }
    lines.push(("restarts", report.restarts.to_string()));
    for (name, text) in [("last end", &report.ended), ("problem", &report.problem)] {
        if let Some(text) = text {
            lines.push((name, columns::harmless(text)));
        }
    }
    lines.iter().map(|(name, text)| format!("{name:9} {text}\n")).collect()
}

fn databases(client: &ApiClient, json: bool, paint: Paint) -> Result<(), Stop> {
    let report: FolderReport = client.call(&Call::get("service/databases"))?;
    if json { print_json(&report) } else { Ok(columns::print(&list(&report, paint))?) }
}

/// What is in the folder of a service, for people.
fn list(report: &FolderReport, paint: Paint) -> String {
    if !report.served {
        return "The folder is not served here: this node is not PRIMARY.\n".to_owned();
    }
    let row = |database: &DatabaseReport| -> Vec<Cell> {
        vec![
            database.id.map_or_else(|| "-".to_owned(), |id| id.to_string()).into(),
            columns::harmless(&database.path.display().to_string()).into(),
            database.mode.clone().unwrap_or_else(|| "-".to_owned()).into(),
            database.pages.to_string().into(),
            size(u64::from(database.pages) * u64::from(database.page_size)).into(),
            database.commits.to_string().into(),
            database.behind.to_string().into(),
        ]
    };
    let heads = [
        ("ID", true),
        ("FILE", false),
        ("MODE", false),
        ("PAGES", true),
        ("SIZE", true),
        ("COMMITS", true),
        ("PAGES TO COPY", true),
    ];
    let mut text = columns::table(&heads, &report.databases.iter().map(row).collect::<Vec<_>>(), paint);
    if report.other_files > 0 {
        text.push_str(&format!("other files, on this host alone: {}\n", report.other_files));
    }
    if let Some(why) = &report.last_refusal {
        text.push_str(&format!("last refused: {}\n", columns::harmless(why)));
    }
    text
}

fn operate(client: &ApiClient, action: &str, done: &str, json: bool) -> Result<u8, Stop> {
    let report: Report = client.call(&Call::post(format!("service/{action}")))?;
    if json {
        print_json(&report)?;
    } else {
        say(&format!("The service {done}."))?;
        eprintln!("Next: twistcli service status");
    }
    Ok(0)
}

fn logs(client: &ApiClient, lines: u32, follow: bool, json: bool) -> Result<(), Stop> {
    let ask = |behind: u64, lines: u32| -> Result<Vec<Value>, Stop> {
        client.call(&Call::get(format!("service/logs?lines={lines}&behind={behind}")))
    };
    let mut found = ask(0, lines)?;
    if !follow && json {
        return print_json(&found);
    }
    let mut last = 0;
    loop {
        for (line, value) in lists::rows::<OutputLine>(&found)?.iter().zip(&found) {
            last = line.number;
            match json {
                true => columns::print(&format!("{value}\n"))?,
                false => columns::print(&format!("{} {}\n", moment(line.time_ms), columns::harmless(&line.text)))?,
            }
        }
        if !follow {
            return Ok(());
        }
        thread::sleep(PACE);
        found = ask(last, AT_A_TIME)?;
        // The node began anew, and so did its numbers.
        if found.is_empty() && ask(0, 1)?.first().and_then(|line| line["number"].as_u64()).is_some_and(|n| n < last) {
            last = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn databases_are_listed_with_what_was_refused() {
        assert!(list(&FolderReport::default(), Paint(false)).contains("not PRIMARY"));
        let database = DatabaseReport {
            id: Some(2),
            path: "a/x.db".into(),
            mode: Some("wal".to_owned()),
            page_size: 4096,
            pages: 3,
            commits: 17,
            behind: 1,
        };
        let refusal = Some("y.db: no".to_owned());
        let report = FolderReport { served: true, databases: vec![database], other_files: 4, last_refusal: refusal };
        let text = list(&report, Paint(false));
        let words: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(words, ["2", "a/x.db", "wal", "3", "12.0", "KiB", "17", "1"]);
        assert!(text.ends_with("other files, on this host alone: 4\nlast refused: y.db: no\n"), "{text}");
    }

    #[test]
    fn a_service_is_shown_with_what_is_wrong() {
        let report = Report {
            state: "waiting".to_owned(),
            since_ms: 1_000,
            command: vec!["/bin/a".to_owned(), "b".to_owned()],
            folder: "/srv/a".into(),
            ports: vec!["443:8443".to_owned()],
            restarts: 3,
            problem: Some("it does not stay up".to_owned()),
            ..Report::default()
        };
        let expected = "\
state     waiting, for 2 s
command   /bin/a b
folder    /srv/a
ports     443:8443
restarts  3
problem   it does not stay up
";
        assert_eq!(render(&report, 3_000, Paint(false)), expected);
    }
}
