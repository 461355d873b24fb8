//! A switchover through the Consoles, measured from here: asks them all the time whether one is there, until another
//! member is PRIMARY. Must never begin a second one because the answer to the first got lost.

use std::{
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use ureq::{
    Agent,
    http::{Method, StatusCode},
};

use super::{
    client::ApiClient,
    place::Place,
    remote::Remote,
    stop::{EX_UNAVAILABLE, Stop},
};
use crate::{
    admin::SwitchoverReport,
    console::cluster::Switchover,
    control::Call,
    https::{self, Limits},
    node::Status,
};

/// How long a Console may take to say that it is there: one that is gone must not hide one that has come.
const LIMITS: Limits = Limits { connect: Duration::from_millis(300), request: Duration::from_secs(1) };
/// Pause between two questions.
const PACE: Duration = Duration::from_millis(2);
/// How often it asks who is PRIMARY while nothing seems to change.
const LOOK: Duration = Duration::from_millis(250);
/// A switchover that has not happened by then has been given up by the daemon.
const STAYS: Duration = Duration::from_secs(8);
/// How long another PRIMARY is awaited.
const LIMIT: Duration = Duration::from_secs(60);

/// Makes the checks, and hands the role over unless one fails. `before` is the status of a moment ago.
///
/// # Errors
/// When nobody answers, it is refused, or the role does not go.
pub(super) fn switchover(
    client: &ApiClient,
    remote: &Remote,
    before: &Status,
    to: Option<&str>,
    dry_run: bool,
) -> Result<SwitchoverReport, Stop> {
    let checked = ask(remote, to, true)?;
    if dry_run || checked.checks.iter().any(|check| !check.ok) {
        return Ok(checked);
    }
    let report = ask(remote, to, false)?;
    if report.checks.iter().any(|check| !check.ok) {
        return Ok(report);
    }
    let (to, gap) = watch(client, remote, before)?;
    Ok(SwitchoverReport { checks: checked.checks, to: Some(to), gap_ms: Some(gap.as_secs_f64() * 1e3) })
}

/// The request for a switchover.
pub(super) fn switchover_to(wanted: Switchover) -> Call {
    Call::post("high-availability/switchover").with(wanted)
}

/// Asks once. It is no error if the answer to the real request is lost: the ports may have been closed before it.
fn ask(remote: &Remote, to: Option<&str>, dry_run: bool) -> Result<SwitchoverReport, Stop> {
    let begun = SwitchoverReport { checks: Vec::new(), to: None, gap_ms: None };
    let wanted = Switchover { to: to.map(str::to_owned), dry_run };
    let mut response = match remote.send(&switchover_to(wanted)) {
        Ok(response) => response,
        Err(Stop::Unknown(_)) if !dry_run => return Ok(begun),
        Err(stop) => return Err(stop),
    };
    let status = response.status();
    let text = response.body_mut().read_to_string().unwrap_or_default();
    let answer: Value = serde_json::from_str(&text).unwrap_or_default();
    match serde_json::from_value(answer.clone()) {
        // A failed check comes with the report, too.
        Ok(report) if status.is_success() || status == StatusCode::CONFLICT => Ok(report),
        _ if status.is_success() => Ok(begun),
        _ => Err(remote.refused(&Method::POST, status, answer["err"].as_str().unwrap_or("no reason given"))),
    }
}

/// Returns who is PRIMARY, and the longest time for which no Console answered.
fn watch(client: &ApiClient, remote: &Remote, before: &Status) -> Result<(String, Duration), Stop> {
    let begun = Instant::now();
    let mut pulse = Pulse { agent: https::client(&remote.trust, LIMITS), places: remote.places() };
    let (mut last, mut gap, mut looked) = (begun, Duration::ZERO, begun);
    while begun.elapsed() < LIMIT {
        let first = pulse.places.first().cloned();
        if pulse.beats() {
            let silent = last.elapsed();
            last = Instant::now();
            let odd = silent > gap || pulse.places.first() != first.as_ref();
            gap = gap.max(silent);
            if odd || looked.elapsed() > LOOK {
                let asked = Instant::now();
                let status = client.status();
                // It tries again while nobody answers: better a gap that is a little too long than one that was not
                // seen.
                gap = gap.max(asked.elapsed());
                if let Ok(status) = status {
                    if status.node != before.node && status.primary == Some(status.node) {
                        return Ok((status.name, gap));
                    }
                    if begun.elapsed() > STAYS {
                        let text = format!("{} is PRIMARY again, or still: see its log for the reason", status.name);
                        return Err(Stop::refuse(&text));
                    }
                    last = Instant::now();
                }
                looked = Instant::now();
            }
        }
        thread::sleep(PACE);
    }
    let text = format!(
        "the switchover has begun, and no Console has answered for {} s: see twistcli ha status",
        LIMIT.as_secs()
    );
    Err(Stop::tell(EX_UNAVAILABLE, &text))
}

/// Whether any Console is there.
struct Pulse {
    agent: Agent,
    places: Vec<Place>,
}

impl Pulse {
    /// Asks each once, the one that answered last first.
    fn beats(&mut self) -> bool {
        let there = |place: &Place| {
            let answer = self.agent.get(format!("{place}/api/v1/_ping")).call();
            answer.is_ok_and(|answer| answer.status().is_success())
        };
        let found = self.places.iter().position(there);
        if let Some(at) = found {
            self.places[..=at].rotate_right(1);
        }
        found.is_some()
    }
}
