//! `twistcli`: the administration tool. Owns its command line and its exit codes. Must never touch the data folder or talk
//! to other hosts: everything it knows comes from the daemon's control socket.

pub mod health;
mod status;
mod table;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, CommandFactory, Parser, Subcommand, error::ErrorKind};
use clap_complete::Shell;

use crate::{
    config::{self, ConfigErrors},
    control::{self, ControlError, Reply, Request},
};

pub use table::render as render_table;

/// Wrong command line (sysexits EX_USAGE); not clap's 2, which means "no primary" here.
const EX_USAGE: u8 = 64;
/// The daemon cannot be reached (sysexits EX_UNAVAILABLE).
const EX_UNAVAILABLE: u8 = 69;
/// Writing the output failed (sysexits EX_IOERR).
const EX_IOERR: u8 = 74;
/// The daemon refused what was asked (sysexits EX_TEMPFAIL).
const EX_TEMPFAIL: u8 = 75;

/// Data folder when nothing else is said.
const DEFAULT_DATA: &str = "/var/lib/twistlock";
/// Environment variable that names the data folder.
const DATA_VARIABLE: &str = "TWISTLOCK_DATA";
/// How long one answer of the daemon may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Administer Twistlock HA on this host
#[derive(Debug, Parser)]
#[command(name = "twistcli", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// High availability: look at the cluster, hand the PRIMARY role over
    #[command(subcommand)]
    Ha(Ha),
    /// Print a shell completion script
    #[command(after_help = "Example: twistcli completions bash > /etc/bash_completion.d/twistcli")]
    Completions {
        /// The shell it is for
        shell: Shell,
    },
    /// Print the manual page in roff format
    #[command(after_help = "Example: twistcli man > /usr/local/share/man/man1/twistcli.1")]
    Man,
}

#[derive(Debug, Subcommand)]
enum Ha {
    /// Show the cluster as this host's daemon sees it; works on every node, PRIMARY or not
    #[command(after_help = EXIT_CODES)]
    Status(StatusArgs),
    /// Hand the PRIMARY role of this host over to another member
    StepDown {
        #[command(flatten)]
        target: Target,
        /// Why; goes into the daemons' logs
        #[arg(long, value_name = "TEXT", default_value = "asked for by the administrator")]
        reason: String,
    },
}

const EXIT_CODES: &str = "\
Exit code: 0 healthy, 1 degraded (it serves, but something needs attention), 2 no primary,
64 wrong command line, 69 the daemon cannot be reached.";

/// Which daemon of this host is meant: at most one of the three.
#[derive(Debug, Args)]
struct Target {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH", group = "target")]
    control: Option<PathBuf>,
    /// The daemon's data folder [default: $TWISTLOCK_DATA, else /var/lib/twistlock]
    #[arg(long, value_name = "DIR", group = "target")]
    data: Option<PathBuf>,
    /// The daemon's configuration file, which names the data folder or the socket
    #[arg(long, value_name = "FILE", group = "target")]
    config: Option<PathBuf>,
}

impl Target {
    /// Where the daemon listens.
    ///
    /// # Errors
    /// The problems of the configuration file.
    fn socket(&self) -> Result<PathBuf, ConfigErrors> {
        if let Some(path) = &self.control {
            return Ok(path.clone());
        }
        if let Some(file) = &self.config {
            return Ok(config::load(file)?.config.control_socket_path());
        }
        let variable = || std::env::var_os(DATA_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
        let data = self.data.clone().or_else(variable).unwrap_or_else(|| DEFAULT_DATA.into());
        Ok(data.join(control::SOCKET_NAME))
    }
}

#[derive(Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    target: Target,
    /// Print the status as JSON (with --watch: one line per look)
    #[arg(long)]
    json: bool,
    /// Look again every SECONDS (at least 0.1) until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = interval)]
    watch: Option<Duration>,
}

fn interval(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("a number of seconds from 0.1 to 86400 is allowed".into()),
    }
}

/// Runs the tool with the arguments of the process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = match cli.command {
        Command::Ha(Ha::Status(args)) => at_socket(&args.target, |socket| status::run(socket, &args)),
        Command::Ha(Ha::StepDown { target, reason }) => at_socket(&target, |socket| Ok(step_down(socket, reason))),
        Command::Completions { shell } => completions(shell),
        Command::Man => manual(),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        // `twistcli ... | head` closes our output early: no reason to complain.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("twistcli: cannot write the output: {error}");
            ExitCode::from(EX_IOERR)
        }
    }
}

fn usage(error: &clap::Error) -> ExitCode {
    let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    // Nothing is left to tell a reader who closed both outputs.
    let _ = error.print();
    if asked_for { ExitCode::SUCCESS } else { ExitCode::from(EX_USAGE) }
}

/// Runs `command` with the socket, or tells why there is none.
fn at_socket(target: &Target, command: impl FnOnce(&Path) -> io::Result<u8>) -> io::Result<u8> {
    match target.socket() {
        Ok(socket) => command(&socket),
        Err(errors) => {
            eprintln!("twistcli: {errors}");
            Ok(errors.exit_code())
        }
    }
}

fn completions(shell: Shell) -> io::Result<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "twistcli", &mut text);
    io::stdout().write_all(&text)?;
    Ok(0)
}

fn manual() -> io::Result<u8> {
    let mut text = Vec::new();
    // build() gives the nested commands their full names.
    let mut root = Cli::command();
    root.build();
    clap_mangen::Man::new(root.clone()).render(&mut text)?;
    let leaves = root.get_subcommands().flat_map(|command| command.get_subcommands());
    for leaf in leaves.filter(|leaf| leaf.get_name() != "help") {
        let page = clap_mangen::Man::new(leaf.clone());
        page.render_name_section(&mut text)?;
        page.render_synopsis_section(&mut text)?;
        page.render_description_section(&mut text)?;
        page.render_options_section(&mut text)?;
        page.render_extra_section(&mut text)?;
    }
    io::stdout().write_all(&text)?;
    Ok(0)
}

fn step_down(socket: &Path, reason: String) -> u8 {
    match control::request(socket, &Request::StepDown { reason }, ANSWER_LIMIT) {
        Ok(Reply::Ok(_)) => {
            println!("The PRIMARY role is being handed over. See: twistcli ha status");
            0
        }
        Ok(Reply::Err(why)) => {
            eprintln!("twistcli: not done: {why}");
            EX_TEMPFAIL
        }
        Err(error) => {
            eprintln!("{}", explain(&error));
            EX_UNAVAILABLE
        }
    }
}

/// What went wrong on the way to the daemon, and what to do about it.
fn explain(error: &ControlError) -> String {
    let hint = match error {
        ControlError::Unreachable { source, .. } => match source.kind() {
            io::ErrorKind::NotFound => {
                "There is no such socket. Is twistlockd running on this host? Try: systemctl status twistlockd\n  \
                 If its data folder is another one, name it: --data DIR, --control PATH or TWISTLOCK_DATA=DIR."
            }
            io::ErrorKind::PermissionDenied => "Only the owner of the socket may use it. Try again with sudo.",
            io::ErrorKind::ConnectionRefused => {
                "The socket is left over: twistlockd does not run. Try: systemctl status twistlockd"
            }
            _ => "Is twistlockd running on this host? Try: systemctl status twistlockd",
        },
        ControlError::NoAnswer { .. } => {
            "twistlockd is there but does not answer: stopped, frozen or overloaded. Try: journalctl -u twistlockd -e"
        }
        ControlError::Malformed { .. } => {
            "twistcli and twistlockd are of different versions. Install the same on both."
        }
        ControlError::Path(_) => "Name the socket by a shorter path: --control PATH",
        ControlError::Refused(_) => "Try: journalctl -u twistlockd -e",
    };
    format!("twistcli: {error}\n  {hint}")
}
