//! Shows what was recorded: `ha events`, `audits` and `logs`. Must never print anything that a terminal would act on.

use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;

use super::{
    args::{EventsArgs, span},
    client::ApiClient,
    columns::{self, Cell, Paint, print_json},
    lists,
    quantity::moment,
    remote::segment,
    stop::{EX_FOUND, Stop},
    target::Target,
};
use crate::{
    control::Call,
    events::{self, Event, Severity, Wanted, notify::Delivery},
};

/// The help of `twistcli audits`.
pub(super) const AUDITS_HELP: &str = "\
Every change, even if it was refused, and every login. On the PRIMARY's host, whoever may use the daemon's
socket needs no login; elsewhere the role Administrator or Auditor is needed.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  twistcli audits
  twistcli audits --by ann --since 1d
  twistcli audits --limit 1000 --json";

#[derive(Debug, Args)]
pub(super) struct AuditsArgs {
    #[command(flatten)]
    target: Target,
    /// Show at most this many, the newest first
    #[arg(long, value_name = "COUNT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    /// Only what this user did
    #[arg(long = "by", value_name = "NAME")]
    by: Option<String>,
    /// Only what happened in this span
    #[arg(long, value_name = "SPAN", value_parser = span)]
    since: Option<Duration>,
    /// Print them as JSON
    #[arg(long)]
    json: bool,
}

/// The help of `twistcli logs`.
pub(super) const LOGS_HELP: &str = "\
The PRIMARY keeps its last lines in memory, so its daemon must run. On a host with systemd,
`journalctl -u twistlockd` has the whole log of this host. On the PRIMARY's host, whoever may use the
daemon's socket needs no login; elsewhere the role Administrator or Auditor is needed.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  twistcli logs
  twistcli logs --lines 1000 --json";

#[derive(Debug, Args)]
pub(super) struct LogsArgs {
    #[command(flatten)]
    target: Target,
    /// Show at most this many lines, the newest last
    #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=2000))]
    lines: u32,
    /// Print them as JSON
    #[arg(long)]
    json: bool,
}

/// `twistcli ha events`.
///
/// # Errors
/// When nobody answers.
pub(super) fn events(client: &ApiClient, args: &EventsArgs, paint: Paint) -> Result<(), Stop> {
    let since = args.since.and_then(|since| Timestamp::from_second(before(since)).ok());
    let wanted = Wanted { limit: Some(args.limit), kind: args.kind, since, ..Wanted::default() };
    let asked = client.call(&Call::get(format!("high-availability/events?{}", query(&wanted))));
    let found: Vec<Event> = asked.or_else(|stop| from_files(client, &wanted, stop))?;
    if args.json {
        return print_json(&found);
    }
    let row = |event: &Event| {
        let code = match event.severity {
            Severity::Info => "",
            Severity::Warning => "33",
            Severity::Critical => "1;31",
        };
        let time = u64::try_from(event.time.as_millisecond()).unwrap_or(0);
        vec![
            moment(time).into(),
            event.node.as_str().into(),
            Cell::coloured(code, event.kind.word()),
            event.sentence.as_str().into(),
        ]
    };
    let rows: Vec<Vec<Cell>> = found.iter().map(row).collect();
    let heads = [("TIME (UTC)", false), ("NODE", false), ("KIND", false), ("WHAT HAPPENED", false)];
    Ok(columns::print(&columns::table(&heads, &rows, paint))?)
}

/// The fields as a query. Names and values are words, numbers and dates: only the dates have something to encode.
fn query(wanted: &Wanted) -> String {
    let fields = serde_json::to_value(wanted).unwrap_or_default();
    let pair =
        |(name, value): (&String, &Value)| format!("{name}={}", segment(value.as_str().unwrap_or(&value.to_string())));
    fields.as_object().into_iter().flatten().map(pair).collect::<Vec<_>>().join("&")
}

/// The events of this host, while its daemon does not answer.
fn from_files(client: &ApiClient, wanted: &Wanted, stop: Stop) -> Result<Vec<Event>, Stop> {
    let ApiClient::Local(local) = client else { return Err(stop) };
    let path = local.data.join(events::FILE);
    if !stop.is_unanswered() || !path.is_file() {
        return Err(stop);
    }
    let found = events::read(&local.data, wanted).map_err(|_| stop)?;
    let text = format!("twistlockd on this host does not answer: these are from {}", path.display());
    eprintln!("{}", columns::harmless(&text));
    Ok(found)
}

/// `twistcli ha test-notifications`. Returns the exit code.
///
/// # Errors
/// When nobody answers, or it is not permitted.
pub(super) fn test_notifications(client: &ApiClient, json: bool, paint: Paint) -> Result<u8, Stop> {
    let sent: Vec<Delivery> = client.call(&Call::post("settings/notifications/test"))?;
    let fine = !sent.is_empty() && sent.iter().all(|delivery| delivery.ok);
    if json {
        print_json(&sent)?;
    } else if sent.is_empty() {
        columns::print("Nobody is notified: there is no webhook, and NOTIFY_COMMAND is not set on that host.\n")?;
    } else {
        let row = |delivery: &Delivery| {
            let result = if delivery.ok { Cell::coloured("32", "got it") } else { Cell::coloured("1;31", "failed") };
            vec![delivery.target.as_str().into(), result, delivery.detail.as_str().into()]
        };
        let rows: Vec<Vec<Cell>> = sent.iter().map(row).collect();
        columns::print(&columns::table(&[("TARGET", false), ("RESULT", false), ("WHY", false)], &rows, paint))?;
    }
    Ok(if fine { 0 } else { EX_FOUND })
}

/// Seconds since 1970, so long ago.
fn before(span: Duration) -> i64 {
    Timestamp::now().as_second().saturating_sub(i64::try_from(span.as_secs()).unwrap_or(i64::MAX)).max(0)
}

/// A row of the audits.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Audit {
    time: u64,
    user: String,
    source: String,
    action: String,
    what: String,
    ok: bool,
    difference: Value,
}

/// `twistcli audits`.
///
/// # Errors
/// When nobody answers, or it is refused.
pub(super) fn audits(args: &AuditsArgs, paint: Paint) -> Result<(), Stop> {
    let mut path = format!("audits/mgmt?limit={}", args.limit);
    if let Some(by) = &args.by {
        path.push_str(&format!("&user={}", segment(by)));
    }
    if let Some(since) = args.since {
        path.push_str(&format!("&since={}", before(since)));
    }
    let found: Vec<Value> = args.target.console()?.call(&Call::get(path))?;
    if args.json {
        return print_json(&found);
    }
    let rows = lists::rows::<Audit>(&found)?;
    Ok(columns::print(&audit_table(&rows, paint))?)
}

fn audit_table(rows: &[Audit], paint: Paint) -> String {
    let row = |audit: &Audit| {
        let action = match audit.ok {
            true => audit.action.as_str().into(),
            false => Cell::coloured("1;31", &format!("{} FAILED", audit.action)),
        };
        let time = moment(audit.time.saturating_mul(1000));
        let mut what = audit.what.clone();
        if let Value::Object(fields) = &audit.difference {
            let changed = fields.iter().map(|(name, change)| format!("{name}: {}", change_text(change)));
            what.push_str(&format!(" {}", changed.collect::<Vec<_>>().join(", ")));
        }
        vec![time.into(), audit.user.as_str().into(), audit.source.as_str().into(), action, what.trim().into()]
    };
    let rows: Vec<Vec<Cell>> = rows.iter().map(row).collect();
    let heads = [("TIME (UTC)", false), ("USER", false), ("FROM", false), ("ACTION", false), ("WHAT", false)];
    columns::table(&heads, &rows, paint)
}

/// `{"old": 1, "new": 2}` as `1 -> 2`.
fn change_text(change: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match (change.get("old"), change.get("new")) {
        (Some(old), Some(new)) => format!("{} -> {}", text(old), text(new)),
        (None, Some(new)) => text(new),
        (Some(old), None) => format!("{} -> nothing", text(old)),
        (None, None) => text(change),
    }
}

/// A line of the log.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Line {
    time_ms: u64,
    level: String,
    text: String,
}

/// `twistcli logs`.
///
/// # Errors
/// When nobody answers, or it is refused.
pub(super) fn logs(args: &LogsArgs, paint: Paint) -> Result<(), Stop> {
    let hint = "It has these lines in its memory. Its whole log: journalctl -u twistlockd -e; what happened: twistcli ha events";
    let client = args.target.console().map_err(|stop| stop.or_else_try(hint))?;
    let found: Vec<Value> = client.call(&Call::get(format!("logs/console?lines={}", args.lines)))?;
    if args.json {
        return print_json(&found);
    }
    let lines = lists::rows::<Line>(&found)?;
    let line = |line: &Line| {
        let code = match line.level.as_str() {
            "ERROR" => "1;31",
            "WARN" => "33",
            _ => "",
        };
        let level = paint.text(code, &format!("{:5}", columns::harmless(&line.level)));
        format!("{} {level} {}\n", moment(line.time_ms), columns::harmless(&line.text))
    };
    Ok(columns::print(&lines.iter().map(line).collect::<String>())?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::events::Kind;

    #[test]
    fn what_is_wanted_of_the_events_is_a_query() {
        let since = "2026-11-22T18:00:00Z".parse().ok();
        let wanted = Wanted { limit: Some(5), kind: Some(Kind::Takeover), since, ..Wanted::default() };
        assert_eq!(query(&wanted), "kind=takeover&limit=5&since=2026-11-22T18%3A00%3A00Z");
    }

    #[test]
    fn an_audit_tells_what_was_changed_and_what_failed() {
        let audit = |ok, difference| Audit {
            time: 1_793_383_207,
            user: "ann".into(),
            source: "192.0.2.7".into(),
            action: "change".into(),
            what: "user 'bob'".into(),
            ok,
            difference,
        };
        let rows = [audit(true, json!({ "role": { "old": "admin", "new": "auditor" } })), audit(false, Value::Null)];
        let expected = "\
TIME (UTC)           USER  FROM       ACTION         WHAT
2026-10-30 18:00:07  ann   192.0.2.7  change         user 'bob' role: admin -> auditor
2026-10-30 18:00:07  ann   192.0.2.7  change FAILED  user 'bob'
";
        assert_eq!(audit_table(&rows, Paint(false)), expected);
        assert_eq!(change_text(&json!({ "new": [1] })), "[1]");
        assert_eq!(change_text(&json!("changed")), "changed");
    }
}
