//! `twistcli ha status`: asks once, or again and again with `--watch`.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use super::{
    args::StatusArgs,
    client::ApiClient,
    columns::{self, Paint},
    stop::Stop,
    table,
};
use crate::{
    clock::{unix_time, unix_time_ms},
    node::verdict::judge,
};

/// Erases the screen from the upper left corner on.
const HOME_AND_CLEAR: &str = "\x1b[H\x1b[J";

/// Prints the status and returns the exit code.
///
/// # Errors
/// When there is none, or the output cannot be written.
pub(super) fn run(client: &ApiClient, args: &StatusArgs, paint: Paint) -> Result<u8, Stop> {
    let Some(interval) = args.watch else {
        let (text, code) =
            current(client, args.json, false, paint).or_else(|stop| old(client, args.json, paint, stop))?;
        columns::print(&text)?;
        return Ok(code);
    };
    repeat(interval, args.json, || current(client, args.json, true, paint).map(|(text, _)| text))
}

/// Prints what `current` says, again and again. On a terminal it replaces what was there, unless it is JSON.
///
/// # Errors
/// When `current` fails for a reason that does not pass, or the output cannot be written.
pub(super) fn repeat(interval: Duration, json: bool, current: impl Fn() -> Result<String, Stop>) -> Result<u8, Stop> {
    let redraw = io::stdout().is_terminal() && !columns::is_dumb() && !json;
    loop {
        match current() {
            Ok(text) if redraw => columns::print(&format!("{HOME_AND_CLEAR}{text}"))?,
            Ok(text) => columns::print(&text)?,
            // Trying a refused login again and again would keep everybody else from logging in.
            Err(stop) if !stop.passes() => return Err(stop),
            // Whoever does not answer may come back.
            Err(stop) => drop(stop.code()?),
        }
        std::thread::sleep(interval);
    }
}

/// What the files of this host tell while its daemon does not answer, and the exit code for it.
fn old(client: &ApiClient, json: bool, paint: Paint, stop: Stop) -> Result<(String, u8), Stop> {
    let Some(past) = client.past(&stop) else { return Err(stop) };
    let text = match json {
        true => {
            let json = past.json(unix_time_ms(), stop.why().trim_start_matches("twistcli: "));
            format!("{}\n", serde_json::to_string_pretty(&json).map_err(io::Error::from)?)
        }
        false => past.render(unix_time_ms(), paint),
    };
    Ok((text, stop.code()?))
}

/// The status as it is now: what to print, and the exit code.
fn current(client: &ApiClient, json: bool, one_line: bool, paint: Paint) -> Result<(String, u8), Stop> {
    let status = client.status()?;
    let code = judge(&status, unix_time()).health as u8;
    if !json {
        return Ok((table::render(&status, paint.0, unix_time()), code));
    }
    let text = if one_line { serde_json::to_string(&status) } else { serde_json::to_string_pretty(&status) };
    Ok((format!("{}\n", text.map_err(io::Error::from)?), code))
}
