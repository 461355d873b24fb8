//! `twistcli clustered-db`: a pool, by the names and the output that its administrators know. Owns the command line of
//! these commands and what they say; what is permitted is up to the daemon.

mod add;
mod configure;
mod fingerprint;
mod remove;
mod status;

use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand};

use super::{args::interval, at, columns, stop::Stop, target::Target};
use crate::admin::PoolSize;

const STATUS_HELP: &str = "\
Without --address: the pool as this host's daemon sees it; works on every member, PRIMARY or not. What is
wrong is told on standard error.

Exit code: 0 healthy, 1 degraded (it serves, but something needs attention), 2 no PRIMARY,
64 wrong command line, 69 nobody answers, 75 refused (HA mode), 77 the login is refused.

Examples:
  twistcli clustered-db status --address https://lb.example.com:8083/ -u admin -p PASSWORD
  twistcli clustered-db status --watch
  twistcli clustered-db status --json | jq .failuresTolerated";
const CONFIGURE_HELP: &str = "\
The address of the load balancer becomes one of the names of all Consoles' certificates. The seed's address
can be changed only while no other member was added.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused (the message says why and what to
do), 77 the login is refused.

Examples:
  twistcli clustered-db configure --load-balancer-address lb.example.com --address https://10.0.0.1:8083 -p PASSWORD
  twistcli clustered-db configure --seed-console-address 10.0.0.1";
const REMOVE_HELP: &str = "\
A member is removed only if a majority of the others is up. It says REMOVED then, and serves nothing; its
data have to be set aside before it can be added again.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused (the message says why and what to
do), 77 the login is refused.

Example:
  twistcli clustered-db remove --member-address 10.0.0.5 --address https://lb.example.com:8083 -u admin -p PASSWORD";

/// Commands of `twistcli clustered-db`.
#[derive(Debug, Subcommand)]
pub(super) enum ClusteredDb {
    /// Show the members of the pool and their states
    #[command(after_help = STATUS_HELP)]
    Status(StatusArgs),
    /// Set the address of the load balancer, or of the seed
    #[command(after_help = CONFIGURE_HELP)]
    Configure(ConfigureArgs),
    /// Add hosts that wait to the pool
    #[command(after_help = add::HELP)]
    Add(add::AddArgs),
    /// Show the fingerprint of this host's key, while it waits for a pool
    #[command(after_help = fingerprint::HELP)]
    Fingerprint(fingerprint::FingerprintArgs),
    /// Remove a member of the pool
    #[command(after_help = REMOVE_HELP)]
    Remove(RemoveArgs),
}

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    target: Target,
    /// Print the status as JSON (with --watch: one line each time)
    #[arg(long)]
    json: bool,
    /// Refresh every SECONDS (at least 0.1) until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = interval)]
    watch: Option<Duration>,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("setting").required(true)))]
pub(super) struct ConfigureArgs {
    #[command(flatten)]
    target: Target,
    /// Host name or IP address of the load balancer, without a port; empty: there is none
    #[arg(long, value_name = "ADDRESS", group = "setting")]
    load_balancer_address: Option<String>,
    /// Address of the first member, while it is alone
    #[arg(long, value_name = "ADDRESS", group = "setting")]
    seed_console_address: Option<String>,
    /// Print the settings as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    #[command(flatten)]
    target: Target,
    /// Address of the member, as the status shows it
    #[arg(long, value_name = "ADDRESS")]
    member_address: String,
    /// Print what the pool tolerates then as JSON
    #[arg(long)]
    json: bool,
}

/// Carries a command out. Returns the exit code.
///
/// # Errors
/// When nobody answers, or it is refused.
pub(super) fn run(command: &ClusteredDb) -> Result<u8, Stop> {
    match command {
        ClusteredDb::Status(args) => status::run(&args.target.client()?, args),
        ClusteredDb::Configure(args) => at(&args.target, |client| configure::run(client, args)),
        ClusteredDb::Add(args) => at(args.target(), |client| add::run(client, args)),
        ClusteredDb::Fingerprint(args) => at(args.target(), |client| fingerprint::run(client, args)),
        ClusteredDb::Remove(args) => at(&args.target, |client| remove::run(client, args)),
    }
}

/// Says what the pool tolerates now; a word of advice goes to standard error.
fn tell_size(size: &PoolSize) -> Result<(), Stop> {
    columns::say(&size.sentence())?;
    if !size.size_advice.is_empty() {
        eprintln!("Note: {}", columns::harmless(&size.size_advice));
    }
    Ok(())
}
