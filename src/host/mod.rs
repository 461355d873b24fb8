//! `twistlockd host`: installs, upgrades, uninstalls the node of a host, and has it join a cluster. The scripts fetch
//! and verify the program; what is done to the host is here. Must never read `twistlock.cfg` but through
//! [`crate::config`].

mod aside;
mod files;
mod install;
mod join;
mod options;
mod package;
mod place;
mod plan;
mod preflight;
mod service;
mod settings;
#[cfg(test)]
mod tests;
mod traces;
mod voice;

use std::process::ExitCode;

use clap::Subcommand;
use nix::sys::stat::{Mode, umask};

use options::Options;
use voice::Voice;

/// The end of every help.
const EXIT_CODES: &str = "\
Flags can be combined: -syj. Everything that is said goes to twistlock-install.log in the current folder, too.

Environment: TWISTLOCK_PREFIX=DIR puts everything below DIR and runs the node as the current user, without systemd (for tests)

Exit code: 0 done, 64 wrong command line, 66 a file is missing, 69 the node did not start or the cluster cannot be reached,
73 cannot write, 75 blocked by a check of this host, 77 not allowed or refused, 78 error in twistlock.cfg";

/// What is to be done to this host.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Install the node of this host; done again, it repairs or changes it
    Install(Options),
    /// Install another version, with the settings that are there: install -j
    Upgrade(Options),
    /// Remove the program from this host; data, backups and twistlock.cfg stay: install -u
    Uninstall(Options),
    /// Have this host ask to join a cluster; the join script starts it
    Join(join::Options),
    /// What the Debian package does
    #[command(hide = true)]
    Package {
        /// The moment in the life of the package
        #[arg(value_enum)]
        moment: package::Moment,
    },
}

/// Runs the command; tells why it failed.
pub fn main(command: Command) -> ExitCode {
    // Folders on the way must be open to others; what is private says so itself.
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    let (mut voice, done);
    match command {
        Command::Install(options) => {
            voice = Voice::new("install", options.accept, options.debug);
            done = install::run(&options, &mut voice);
        }
        Command::Upgrade(options) => {
            voice = Voice::new("upgrade", options.accept, options.debug);
            done = install::run(&Options { keep: true, ..options }, &mut voice);
        }
        Command::Uninstall(options) => {
            voice = Voice::new("uninstall", options.accept, options.debug);
            done = install::run(&Options { uninstall: true, ..options }, &mut voice);
        }
        Command::Join(options) => {
            voice = Voice::new("join", true, options.debug);
            done = join::run(&options, &voice);
        }
        Command::Package { moment } => {
            voice = Voice::new("twistlock-ha", true, false);
            done = package::run(moment, &voice);
        }
    }
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            voice.fail(&failure);
            ExitCode::from(failure.code)
        }
    }
}
