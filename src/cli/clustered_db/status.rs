//! `twistcli clustered-db status`: the pool as a Console or this host's daemon sees it. The text on standard output is
//! word for word that of the interface that we keep; what it has no words for goes to standard error.

use std::io;

use jiff::Timestamp;

use super::StatusArgs;
use crate::{
    admin::{PoolHealth, PoolMember, PoolStatus, pool_status},
    cli::{
        client::ApiClient,
        columns::{self, harmless},
        status::repeat,
        stop::Stop,
    },
    clock::unix_time,
    control::Call,
    node::verdict::Health,
};

/// Prints the status and returns the exit code.
///
/// # Errors
/// When there is none, or the output cannot be written.
pub(super) fn run(client: &ApiClient, args: &StatusArgs) -> Result<u8, Stop> {
    let Some(interval) = args.watch else {
        let status = ask(client)?;
        columns::print(&text(&status, args.json, false)?)?;
        if !args.json {
            status.advice.iter().for_each(|advice| eprintln!("Note: {}", harmless(advice)));
        }
        return Ok(code(status.health));
    };
    repeat(interval, args.json, || text(&ask(client)?, args.json, true))
}

/// The status, by the Console or this host's daemon.
///
/// # Errors
/// When nobody answers.
pub(super) fn ask(client: &ApiClient) -> Result<PoolStatus, Stop> {
    match client {
        // A host that starts, or waits to be added, has this much of an API, too.
        ApiClient::Local(local) => {
            pool_status(&local.status()?, unix_time()).map_err(|error| Stop::refuse(&error.to_string()))
        }
        ApiClient::Remote(_) => client.call(&Call::get("clustered-db/status")),
    }
}

fn code(health: PoolHealth) -> u8 {
    let health = match health {
        PoolHealth::Healthy => Health::Healthy,
        PoolHealth::Degraded => Health::Degraded,
        PoolHealth::NoPrimary => Health::NoPrimary,
    };
    health as u8
}

fn text(status: &PoolStatus, json: bool, one_line: bool) -> Result<String, Stop> {
    let json = match (json, one_line) {
        (false, _) => return Ok(render(status)),
        (true, true) => serde_json::to_string(status),
        (true, false) => serde_json::to_string_pretty(status),
    };
    Ok(format!("{}\n", json.map_err(io::Error::from)?))
}

fn render(status: &PoolStatus) -> String {
    let line = |(number, member): (usize, &PoolMember)| {
        format!("{number}. Address: {}, State: {}\n", harmless(&member.name), harmless(&member.state_str))
    };
    format!(
        "Clustered DB status:\nLast updated: {}\nLoad balancer address: {}\nMembers:\n{}",
        date(&status.date),
        harmless(&status.settings.load_balancer_address),
        (1..).zip(&status.members).map(line).collect::<String>()
    )
}

/// As `28 Mar 22 18:25 UTC`.
fn date(text: &str) -> String {
    match text.parse::<Timestamp>() {
        Ok(time) => time.strftime("%d %b %y %H:%M UTC").to_string(),
        Err(_) => harmless(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The interface that we keep, byte for byte.
    #[test]
    fn the_text_is_the_one_that_administrators_know() {
        let member = |name: &str, state: &str| format!("{{\"name\":\"{name}\",\"stateStr\":\"{state}\"}}");
        let members = [("Console1", "PRIMARY"), ("Console2", "SECONDARY"), ("Console3", "SECONDARY")]
            .map(|(name, state)| member(&format!("{name}_address"), state));
        let json = format!(
            "{{\"date\":\"2022-03-28T18:25:59Z\",\"loadBalancerAddress\":\"load_balancer_address\",\
             \"seedConsoleAddress\":\"Console1_address\",\"health\":\"healthy\",\"members\":[{}]}}",
            members.join(",")
        );
        let status: PoolStatus = serde_json::from_str(&json).unwrap();
        let expected = "Clustered DB status:\n\
            Last updated: 28 Mar 22 18:25 UTC\n\
            Load balancer address: load_balancer_address\n\
            Members:\n\
            1. Address: Console1_address, State: PRIMARY\n\
            2. Address: Console2_address, State: SECONDARY\n\
            3. Address: Console3_address, State: SECONDARY\n";
        assert_eq!(render(&status), expected);
        assert_eq!(date("2026-01-02T03:04:05Z"), "02 Jan 26 03:04 UTC");
        assert_eq!([PoolHealth::Healthy, PoolHealth::Degraded, PoolHealth::NoPrimary].map(code), [0, 1, 2]);
    }

    #[test]
    fn nothing_of_it_moves_the_cursor_or_makes_a_line() {
        let json = "{\"date\":\"x\\ny\",\"loadBalancerAddress\":\"a\\u001b[2J\",\"seedConsoleAddress\":\"\",\
                    \"health\":\"degraded\",\"members\":[{\"name\":\"b\\n9. Address: c\",\"stateStr\":\"DOWN\"}]}";
        let text = render(&serde_json::from_str(json).unwrap());
        assert_eq!(text.lines().count(), 5, "{text}");
        assert!(!text.contains('\x1b'), "{text:?}");
    }
}
