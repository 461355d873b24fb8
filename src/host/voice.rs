//! What the `host` commands say, to whoever runs them and to their log, and how they end when they fail. Must never put
//! the value of a setting into the log: people send that file when they ask for help.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, BufRead, IsTerminal, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::{Command, Output, Stdio},
};

/// Exit codes of sysexits.
pub(super) const EX_USAGE: u8 = 64;
pub(super) const EX_NOINPUT: u8 = 66;
pub(super) const EX_UNAVAILABLE: u8 = 69;
pub(super) const EX_CANTCREAT: u8 = 73;
pub(super) const EX_TEMPFAIL: u8 = 75;
pub(super) const EX_NOPERM: u8 = 77;
/// Longest answer of one command, in bytes.
const MAX_ANSWER: usize = 1 << 20;

/// Where a run's log is, in the current folder.
const LOG: &str = "twistlock-install.log";

/// Why a command ends without having done what it was asked for.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) code: u8,
    lines: Vec<String>,
}

impl Failure {
    pub(super) fn new(code: u8, why: impl fmt::Display) -> Self {
        Self { code, lines: vec![why.to_string()] }
    }

    /// Adds a sentence that says what to do.
    pub(super) fn hint(mut self, line: impl fmt::Display) -> Self {
        self.lines.push(line.to_string());
        self
    }

    /// For a file or folder that cannot be made or moved.
    pub(super) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::new(EX_CANTCREAT, format!("{} cannot be written: {error}", path.display()))
    }
}

impl From<crate::config::ConfigErrors> for Failure {
    fn from(errors: crate::config::ConfigErrors) -> Self {
        Self::new(errors.exit_code(), "the settings have errors: nothing was changed").hint(errors)
    }
}

/// Standard output and error, and the log.
pub(super) struct Voice {
    /// The command, as messages name it.
    name: &'static str,
    log: Option<File>,
    /// Show every command that is run.
    debug: bool,
    /// Answer every question with yes.
    accept: bool,
    /// Say nothing.
    silent: bool,
}

impl Voice {
    pub(super) fn new(name: &'static str, accept: bool, debug: bool) -> Self {
        Self { name, log: None, debug, accept, silent: false }
    }

    /// Says nothing, and answers every question with yes.
    #[cfg(test)]
    pub(super) fn silent() -> Self {
        Self { silent: true, ..Self::new("test", true, false) }
    }

    /// Also writes everything that is said from now on to the log in the current folder.
    pub(super) fn open_log(&mut self) {
        match OpenOptions::new().create(true).append(true).mode(0o600).open(LOG) {
            Ok(file) => self.log = Some(file),
            Err(error) => self.complain(&format!("warning: {LOG} cannot be written here ({error}): going on without")),
        }
        // The value of a setting may be a secret.
        let hide = |argument: String| match argument.split_once('=') {
            Some((key, _)) if key.starts_with(|c: char| c.is_ascii_uppercase() || c == '-') => format!("{key}=..."),
            _ => argument,
        };
        let said: Vec<String> = std::env::args().skip(1).map(hide).collect();
        self.note(&format!("\n---- {}: {}", jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ"), said.join(" ")));
    }

    /// Writes to the log alone.
    pub(super) fn note(&self, text: &str) {
        if let Some(mut log) = self.log.as_ref() {
            let _ = writeln!(log, "{text}"); // a full disk is reported by what matters more
        }
    }

    /// Says something on standard output, and in the log.
    pub(super) fn say(&self, text: &str) {
        if self.silent {
            return;
        }
        let _ = writeln!(io::stdout(), "{text}"); // a closed terminal must not stop half of an installation
        self.note(text);
    }

    /// Says something on standard error, and in the log.
    pub(super) fn complain(&self, text: &str) {
        let _ = writeln!(io::stderr(), "{text}"); // as above
        self.note(text);
    }

    /// Says that something should be otherwise, but is in nobody's way.
    pub(super) fn warn(&self, text: &str) {
        self.complain(&format!("warning  {text}"));
    }

    /// Says why the command fails, and what to do.
    pub(super) fn fail(&self, failure: &Failure) {
        for (index, line) in failure.lines.iter().enumerate() {
            let start = if index == 0 { format!("{}: ", self.name) } else { "  ".to_owned() };
            self.complain(&format!("{start}{line}"));
        }
    }

    /// True if the answer is yes.
    pub(super) fn confirm(&self, question: &str) -> bool {
        if self.accept {
            return true;
        }
        if !io::stdin().is_terminal() {
            self.complain(&format!("{question} Nobody is there to answer; -s answers yes."));
            return false;
        }
        let _ = write!(io::stdout(), "{question} [y/N] "); // see `say`
        let _ = io::stdout().flush();
        let mut answer = String::new();
        let read = io::stdin().lock().read_line(&mut answer);
        read.is_ok() && matches!(answer.trim().to_lowercase().as_str(), "y" | "yes")
    }

    /// True if every question is answered with yes.
    pub(super) fn accepts(&self) -> bool {
        self.accept
    }

    /// Runs a program to its end.
    pub(super) fn run(&self, command: &[&str]) -> io::Result<Output> {
        if self.debug {
            self.complain(&format!("+ {}", command.join(" ")));
        }
        let (program, arguments) = command.split_first().unwrap_or((&"true", &[]));
        let mut output = Command::new(program).args(arguments).stdin(Stdio::null()).output()?;
        output.stdout.truncate(MAX_ANSWER);
        Ok(output)
    }

    /// What a program says, without blanks around it; none if it is not there or fails. Its errors go to the log.
    pub(super) fn ask(&self, command: &[&str]) -> Option<String> {
        let output = self.run(command).ok()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        if !errors.is_empty() {
            self.note(errors.trim_end());
        }
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// True if a program is there and succeeds.
    pub(super) fn does(&self, command: &[&str]) -> bool {
        self.ask(command).is_some()
    }
}
