//! Entry of the daemon: reads the command line and starts what it asks for. Must never do anything before the port
//! guard is dispatched: that process has to stay as small as the program allows.

mod daemon;
mod joining;
mod waiting;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use twistlock_ha::{config, dev, events::notify, guard, host, recover, service::keeper};

/// Active/passive high availability for a management Console with a replicated SQLite database.
#[derive(Parser)]
#[command(version = twistlock_ha::cluster::program_version(), about, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run this host's node until SIGTERM (hands the primary role over first)
    Run {
        /// Configuration file
        #[arg(long, value_name = "FILE", default_value = "/etc/twistlock/twistlock.cfg")]
        config: PathBuf,
    },
    /// Check a configuration file and report every problem at once
    CheckConfig {
        /// Configuration file
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Install, upgrade or uninstall the node of this host, or have it join a cluster
    #[command(subcommand)]
    Host(host::Command),
    /// Make a new cluster from this stopped node when the other two are lost for good
    Recover(recover::Options),
    /// Start a whole cluster on loopback addresses, to try it out and to watch it fail over
    Dev(dev::Options),
}

/// The command line is wrong (sysexits).
const EX_USAGE: u8 = 64;

/// How long a panic may take to be reported.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(3);

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|first| first == guard::SUBCOMMAND) {
        return guard::main();
    }
    if std::env::args_os().nth(1).is_some_and(|first| first == notify::LAUNCH) {
        return notify::launch();
    }
    match std::env::args_os().nth(1) {
        Some(first) if first == keeper::KEEPER => return keeper::keep(),
        Some(first) if first == keeper::LAUNCHER => return keeper::launch(),
        _ => {}
    }
    die_of_panics();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print(); // a closed terminal is no reason for another error
            return if error.use_stderr() { ExitCode::from(EX_USAGE) } else { ExitCode::SUCCESS };
        }
    };
    match arguments.command {
        Command::Run { config } => daemon::run(&config),
        Command::CheckConfig { file } => {
            let (report, code) = config::check(&file);
            if code == config::EX_OK {
                println!("{report}")
            } else {
                eprintln!("{report}")
            }
            ExitCode::from(code)
        }
        Command::Host(command) => host::main(command),
        Command::Recover(options) => recover::main(&options),
        Command::Dev(options) => dev::main(options),
    }
}

/// A thread that panicked would leave the others running with half of the truth: the process ends, and is restarted.
fn die_of_panics() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // Nobody may read what is reported; the process ends in any case.
        let _ = std::thread::Builder::new().spawn(|| {
            std::thread::sleep(LAST_WORDS);
            std::process::abort();
        });
        twistlock_ha::telemetry::flush();
        report(panic);
        std::process::abort();
    }));
}
