//! `twistcli`: the administration tool. Owns its command line and its exit codes. Everything it knows comes from the daemon's
//! control socket; only `ha drill` talks to the Consoles, and writes its record into the data folder. Must never touch
//! anything else there, and must never print a password.

mod args;
mod bundle;
mod canary;
mod catch_up;
mod daemon;
mod drill;
pub mod health;
mod next;
mod operate;
mod progress;
mod status;
mod table;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};
use clap_complete::Shell;

use crate::control::Operation;
use args::{Ha, Place, Target};
use daemon::{Daemon, EX_IOERR, EX_USAGE, Stop};

pub use table::render as render_table;

/// Administer Twistlock HA on this host
#[derive(Debug, Parser)]
#[command(name = "twistcli", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// High availability: look at the cluster, change its members, hand the PRIMARY role over
    #[command(subcommand)]
    Ha(Ha),
    /// What somebody needs who is asked for help
    #[command(subcommand)]
    Debug(bundle::Debug),
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

/// Runs the tool with the arguments of the process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = match cli.command {
        Command::Ha(command) => ha(&command),
        Command::Debug(bundle::Debug::Bundle(args)) => bundle::run(&args),
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

fn ha(command: &Ha) -> io::Result<u8> {
    match command {
        Ha::Status(args) => at_daemon(&args.target, |place| Ok(status::run(&place.socket, args)?)),
        Ha::JoinScript(args) => operate(&args.target, |daemon| operate::join_script(daemon, args)),
        Ha::Apply(args) => operate(&args.target, |daemon| operate::apply(daemon, args)),
        Ha::Reject { target, node } => {
            let reject = Operation::Reject { host: node.clone() };
            operate(target, |daemon| operate::simple(daemon, reject, &format!("{node} is turned down.")))
        }
        Ha::Revoke { target } => {
            let done = "All invitations are closed: no join script that was given out is good any more.";
            operate(target, |daemon| operate::simple(daemon, Operation::Uninvite {}, done))
        }
        Ha::Remove(args) => operate(&args.target, |daemon| operate::remove(daemon, args)),
        Ha::Switchover(args) => operate(&args.target, |daemon| operate::switchover(daemon, args)),
        Ha::Pause { target, span } => operate(target, |daemon| operate::pause(daemon, span.as_secs())),
        Ha::Resume { target } => {
            let done = "The pause is over: the members take over by themselves again.";
            operate(target, |daemon| operate::simple(daemon, Operation::Resume {}, done))
        }
        Ha::RotateKey { target } => {
            let done = "The members exchange the cluster key now. See: twistcli ha status";
            operate(target, |daemon| operate::simple(daemon, Operation::RotateKey {}, done))
        }
        Ha::RotateCa(args) => operate(&args.target, |daemon| operate::rotate_ca(daemon, args)),
        Ha::SetAddress(args) => operate(&args.target, |daemon| operate::set_address(daemon, args)),
        Ha::Drill(args) => at_daemon(&args.target, |place| drill::run(place, args)),
    }
}

fn operate(target: &Target, command: impl FnOnce(&Daemon<'_>) -> Result<(), Stop>) -> io::Result<u8> {
    at_daemon(target, |place| command(&Daemon(&place.socket)).map(|()| 0))
}

/// Runs `command` with the place of the daemon, or tells why there is none.
fn at_daemon(target: &Target, command: impl FnOnce(&Place) -> Result<u8, Stop>) -> io::Result<u8> {
    let place = match target.place() {
        Ok(place) => place,
        Err(errors) => {
            eprintln!("twistcli: {errors}");
            return Ok(errors.exit_code());
        }
    };
    match command(&place) {
        Ok(code) | Err(Stop::Told(code)) => Ok(code),
        Err(Stop::Output(error)) => Err(error),
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
