//! `twistcli`: the administration tool. Owns its command line and its exit codes. It learns everything from one
//! [client] of the API, by the control socket of this host's daemon or by the Consoles; while that daemon does not
//! answer, its [files](past) tell what was. Must never change the data folder (but for the record that `ha drill`
//! writes there), and must never print a password.

mod args;
mod backup;
mod bundle;
mod canary;
mod catch_up;
mod certs;
mod client;
mod clustered_db;
mod columns;
mod daemon;
mod defender;
mod drill;
mod handover;
mod kubernetes;
mod lists;
mod login;
mod next;
mod operate;
mod past;
mod place;
mod progress;
mod prompt;
mod quantity;
mod records;
mod remote;
mod restore;
mod service;
mod status;
mod stop;
mod table;
mod tags;
mod target;
mod unpack;
mod untrusted;
mod users;
mod version;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};
use clap_complete::Shell;

use crate::control::Call;
use args::Ha;
use backup::Backups;
use certs::Certs;
use client::ApiClient;
use clustered_db::ClusteredDb;
use columns::{Paint, When};
use defender::Defender;
use kubernetes::Console;
use records::{AuditsArgs, LogsArgs};
use restore::RestoreArgs;
use service::Service;
use stop::{EX_IOERR, EX_USAGE, Stop};
use tags::Tags;
use target::Target;
use users::Users;
use version::VersionArgs;

pub use table::render as render_table;

const HELP: &str = "\
Without --address, commands go to the daemon of this host (as root, or as the owner of its data folder).
With --address they go to the Consoles of a cluster elsewhere, with a user's name and password or a token.

Environment:
  TWISTLOCK_ADDRESS   https://HOST:PORT of the Consoles, separated by commas
  TWISTLOCK_USER      user of the API
  TWISTLOCK_PASSWORD  the user's password
  TWISTLOCK_TOKEN     a session's token, instead of user and password
  TWISTLOCK_CACERT    certificate of the authority that signed the Consoles' certificates
  TWISTLOCK_DATA      data folder of this host's daemon
  NO_COLOR            no colours

Exit codes, the same everywhere:
   0  done, or all is well
   1  done, and something is wrong: the cluster is degraded, a write is missing, a backup is damaged
   2  no PRIMARY (only `ha status` and `clustered-db status`)
  64  wrong command line
  66  a file that was named cannot be read
  69  nobody answers, or nobody who can be trusted
  74  the output cannot be written
  75  refused, not confirmed, or not complete in time: the message says why and what to do
  77  the login is refused, or its role does not permit this
  78  the configuration file is wrong

Examples:
  sudo twistcli ha status
  twistcli ha status --address https://console.example.com:8083 --user ann
  twistcli certs ca --address https://console.example.com:8083 > ca.pem";

/// Administer Twistlock HA: the cluster of this host, or one elsewhere
#[derive(Debug, Parser)]
#[command(name = "twistcli", version = crate::cluster::program_version(), max_term_width = 110, after_help = HELP)]
struct Cli {
    /// Colours in tables
    #[arg(long, value_enum, value_name = "WHEN", default_value_t, global = true, hide_possible_values = true)]
    color: When,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// High availability: look at the cluster, change its members, hand the PRIMARY role over
    #[command(subcommand)]
    Ha(Ha),
    /// A pool of three to seven members: its status, settings and members
    #[command(subcommand)]
    ClusteredDb(ClusteredDb),
    /// Users of the Console and their roles
    #[command(subcommand)]
    Users(Users),
    /// Labels that the Console keeps
    #[command(subcommand)]
    Tags(Tags),
    /// Agents on other hosts: list them, show what they have told, set what they watch
    #[command(subcommand)]
    Defender(Defender),
    /// The service beside the Console: how it is, start and stop it, what it writes
    #[command(subcommand)]
    Service(Service),
    /// Certificates of the Consoles, and of the authority that signs them
    #[command(subcommand)]
    Certs(Certs),
    /// Backups of the database: make, list, check, fetch and delete them
    #[command(subcommand)]
    Backup(Backups),
    /// Restore a backup to the whole cluster, on the PRIMARY's host
    #[command(after_help = restore::HELP)]
    Restore(RestoreArgs),
    /// Consoles on other systems: what Kubernetes needs to run them
    #[command(subcommand)]
    Console(Console),
    /// Show who changed what and who logged in
    #[command(after_help = records::AUDITS_HELP)]
    Audits(AuditsArgs),
    /// Show the last lines of the PRIMARY's log
    #[command(after_help = records::LOGS_HELP)]
    Logs(LogsArgs),
    /// Show the versions of this program and of the cluster's members
    #[command(after_help = version::HELP)]
    Version(VersionArgs),
    /// Collect what is needed to investigate a problem
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
    let paint = Paint::new(cli.color);
    let result = match &cli.command {
        Command::Ha(command) => ha(command, paint),
        Command::ClusteredDb(command) => clustered_db::run(command),
        Command::Users(command) => users::run(command, paint).map(|()| 0),
        Command::Tags(command) => tags::run(command, paint).map(|()| 0),
        Command::Defender(command) => defender::run(command, paint).map(|()| 0),
        Command::Service(command) => service::run(command, paint),
        Command::Certs(command) => certs::run(command, paint).map(|()| 0),
        Command::Backup(command) => backup::run(command, paint).map(|()| 0),
        Command::Restore(args) => restore::run(args).map(|()| 0),
        Command::Console(command) => kubernetes::run(command).map(|()| 0),
        Command::Audits(args) => records::audits(args, paint).map(|()| 0),
        Command::Logs(args) => records::logs(args, paint).map(|()| 0),
        Command::Version(args) => version::run(args, paint),
        Command::Debug(bundle::Debug::Bundle(args)) => bundle::run(args).map_err(Stop::from),
        Command::Completions { shell } => write(&completions(*shell)),
        Command::Man => manual().map_err(Stop::from).and_then(|text| write(&text)),
    };
    match result.or_else(Stop::code) {
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

fn ha(command: &Ha, paint: Paint) -> Result<u8, Stop> {
    match command {
        Ha::Status(args) => status::run(&args.target.client()?, args, paint),
        Ha::Events(args) => records::events(&args.target.client()?, args, paint).map(|()| 0),
        Ha::JoinScript(args) => at(&args.target, |client| operate::join_script(client, args)),
        Ha::Apply(args) => at(&args.target, |client| operate::apply(client, args)),
        Ha::Reject { target, node } => at(target, |client| operate::reject(client, node)),
        Ha::Revoke { target } => {
            let done = "All invitations are closed: join scripts that were given out no longer work.";
            let call = Call::delete("high-availability/join-script");
            at(target, |client| operate::simple(client, "revoke", &call, done))
        }
        Ha::Remove(args) => at(&args.target, |client| operate::remove(client, args)),
        Ha::Switchover(args) => at(&args.target, |client| operate::switchover(client, args, paint)),
        Ha::Pause { target, span } => at(target, |client| operate::pause(client, span.as_secs())),
        Ha::Resume { target } => {
            let done = "The pause is over: automatic takeover works again.";
            let call = Call::post("high-availability/resume");
            at(target, |client| operate::simple(client, "resume", &call, done))
        }
        Ha::RotateKey { target } => {
            let done = "The members are replacing the cluster key. See: twistcli ha status";
            let call = Call::post("high-availability/rotate-key");
            at(target, |client| operate::simple(client, "rotate-key", &call, done))
        }
        Ha::TestNotifications { target, json } => records::test_notifications(&target.client()?, *json, paint),
        Ha::RotateCa(args) => at(&args.target, |client| operate::rotate_ca(client, args)),
        Ha::SetAddress(args) => at(&args.target, |client| operate::set_address(client, args)),
        Ha::Drill(args) => drill::run(&args.target.client()?, args),
    }
}

/// Runs a command on the cluster that `target` names.
fn at(target: &Target, command: impl FnOnce(&ApiClient) -> Result<(), Stop>) -> Result<u8, Stop> {
    command(&target.client()?).map(|()| 0)
}

fn write(text: &[u8]) -> Result<u8, Stop> {
    io::stdout().write_all(text)?;
    Ok(0)
}

fn completions(shell: Shell) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "twistcli", &mut text);
    text
}

/// One page: the tool itself, then every command with its options.
fn manual() -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    // build() gives the nested commands their full names.
    let mut root = Cli::command();
    root.build();
    clap_mangen::Man::new(root.clone()).render(&mut text)?;
    let mut waiting: Vec<&clap::Command> = root.get_subcommands().collect();
    waiting.reverse();
    while let Some(command) = waiting.pop() {
        if command.get_name() == "help" {
            continue;
        }
        if command.has_subcommands() {
            let below: Vec<_> = command.get_subcommands().collect();
            waiting.extend(below.into_iter().rev());
            continue;
        }
        let page = clap_mangen::Man::new(command.clone());
        page.render_name_section(&mut text)?;
        page.render_synopsis_section(&mut text)?;
        page.render_description_section(&mut text)?;
        page.render_options_section(&mut text)?;
        page.render_extra_section(&mut text)?;
    }
    Ok(text)
}
