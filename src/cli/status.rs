//! `twistcli ha status`: asks once, or again and again with `--watch`.

use std::{
    io::{self, IsTerminal, Write},
    path::Path,
};

use super::{
    args::StatusArgs,
    daemon::{ANSWER_LIMIT, EX_UNAVAILABLE, explain},
    health::judge,
    next::now,
    table,
};
use crate::control;

/// Erases the screen from the upper left corner on.
const HOME_AND_CLEAR: &str = "\x1b[H\x1b[J";

/// Prints the status and returns the exit code.
///
/// # Errors
/// When the output cannot be written.
pub(super) fn run(socket: &Path, args: &StatusArgs) -> io::Result<u8> {
    let Some(interval) = args.watch else {
        let (text, code) = look(socket, args.json, false);
        return print(&text, code);
    };
    let redraw = io::stdout().is_terminal() && !args.json;
    loop {
        let (text, code) = look(socket, args.json, true);
        let frame = if redraw { format!("{HOME_AND_CLEAR}{text}") } else { text };
        // An unreachable daemon may come back: go on looking.
        print(&frame, code)?;
        std::thread::sleep(interval);
    }
}

fn print(text: &str, code: u8) -> io::Result<u8> {
    if code == EX_UNAVAILABLE {
        eprint!("{text}");
        return Ok(code);
    }
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(code)
}

/// One look at the daemon: what to print and the exit code for it.
fn look(socket: &Path, json: bool, one_line: bool) -> (String, u8) {
    let status = match control::status(socket, ANSWER_LIMIT) {
        Ok(status) => status,
        Err(error) => return (format!("{}\n", explain(&error)), EX_UNAVAILABLE),
    };
    let code = judge(&status, now()).health as u8;
    if !json {
        return (table::render(&status, table::colour(&io::stdout()), now()), code);
    }
    let encoded = if one_line { serde_json::to_string(&status) } else { serde_json::to_string_pretty(&status) };
    match encoded {
        Ok(text) => (format!("{text}\n"), code),
        Err(error) => (format!("twistcli: cannot encode the status: {error}\n"), EX_UNAVAILABLE),
    }
}
