//! How a command ends: its exit codes, what it says if it ends early, and the question before what cannot be undone.

use std::io::{self, IsTerminal, Write};

/// It was done, and something is wrong: degraded, a write is missing, a backup is damaged.
pub(super) const EX_FOUND: u8 = 1;
/// Wrong command line (sysexits EX_USAGE); not clap's 2, which means "no primary" here.
pub(super) const EX_USAGE: u8 = 64;
/// A file that was named cannot be read (sysexits EX_NOINPUT).
pub(super) const EX_NOINPUT: u8 = 66;
/// Nobody answers (sysexits EX_UNAVAILABLE).
pub(super) const EX_UNAVAILABLE: u8 = 69;
/// Writing the output failed (sysexits EX_IOERR).
pub(super) const EX_IOERR: u8 = 74;
/// Refused, by the cluster or by the administrator (sysexits EX_TEMPFAIL).
pub(super) const EX_TEMPFAIL: u8 = 75;
/// The login is refused, or its role does not permit this (sysexits EX_NOPERM).
pub(super) const EX_NOPERM: u8 = 77;

/// Why a command ends early.
#[derive(Debug)]
pub(super) enum Stop {
    /// This has to be said, with this exit code.
    Why { code: u8, text: String },
    /// A request or its answer was lost: it may have been done.
    Unknown(String),
    /// Everything has been said; this is the exit code.
    Told(u8),
    /// The output cannot be written.
    Output(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl Stop {
    /// Stops with this sentence and exit code.
    pub(super) fn tell(code: u8, why: &str) -> Self {
        Self::Why { code, text: format!("twistcli: {why}") }
    }

    /// A refusal: nothing was changed.
    pub(super) fn refuse(why: &str) -> Self {
        Self::tell(EX_TEMPFAIL, &format!("not done: {why}"))
    }

    /// True if the same may succeed in a moment, as when nobody answers now.
    pub(super) fn passes(&self) -> bool {
        match self {
            Self::Why { code, .. } | Self::Told(code) => matches!(*code, EX_UNAVAILABLE | EX_TEMPFAIL),
            Self::Unknown(_) => true,
            Self::Output(_) => false,
        }
    }

    /// True if nobody answered.
    pub(super) fn is_unanswered(&self) -> bool {
        matches!(self, Self::Why { code: EX_UNAVAILABLE, .. })
    }

    /// What is said, without the advice.
    pub(super) fn why(&self) -> &str {
        match self {
            Self::Why { text, .. } | Self::Unknown(text) => text.lines().next().unwrap_or_default(),
            Self::Told(_) | Self::Output(_) => "",
        }
    }

    /// Adds a hint if nobody answered.
    pub(super) fn or_else_try(self, hint: &str) -> Self {
        match self {
            Self::Why { code, text } if code == EX_UNAVAILABLE => Self::Why { code, text: format!("{text}\n  {hint}") },
            other => other,
        }
    }

    /// The exit code, after everything has been said.
    ///
    /// # Errors
    /// When the output could not be written.
    pub(super) fn code(self) -> io::Result<u8> {
        match self {
            Self::Why { code, text } => {
                eprintln!("{text}");
                Ok(code)
            }
            Self::Unknown(text) => {
                eprintln!("twistcli: {text}");
                Ok(EX_UNAVAILABLE)
            }
            Self::Told(code) => Ok(code),
            Self::Output(error) => Err(error),
        }
    }
}

/// Asks the administrator; `yes` answers in advance.
///
/// # Errors
/// Anything but a yes, and no terminal to ask on.
pub(super) fn confirm(question: &str, yes: bool) -> Result<(), Stop> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(Stop::tell(EX_USAGE, "standard input is no terminal: give --yes to go on without a question"));
    }
    match ask(&format!("{question} [y/N]"))?.to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Stop::refuse("not confirmed; nothing was changed")),
    }
}

/// Asks for one line on standard input.
///
/// # Errors
/// When it cannot be read.
pub(super) fn ask(question: &str) -> io::Result<String> {
    eprint!("{question} ");
    io::stderr().flush()?;
    let mut answer = String::new();
    if io::stdin().read_line(&mut answer)? == 0 {
        // The end of the input leaves the cursor behind the question.
        eprintln!();
    }
    Ok(answer.trim().to_owned())
}
