//! The agent on a host that the Console looks after: watches files, keeps what it finds in a queue on disk, and hands
//! it to the PRIMARY. Must never lose an event that was taken, send one under another number, or need a Console to go
//! on. `docs/defender.md` has the protocol and what happens under each fault.

mod baseline;
mod connection;
pub mod dial;
mod facts;
mod folder;
mod install;
mod queue;
mod register;
mod shown;
mod watch;
pub mod wire;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex},
    thread,
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use tokio::{runtime::Builder, signal::unix, sync::oneshot};

use folder::Folder;
use queue::Queue;
use watch::{Shared, Watch};

/// Exit codes of sysexits: the command line is wrong; it could not be done.
const EX_USAGE: u8 = 64;
const EX_TEMPFAIL: u8 = 75;

/// The agent of Twistlock HA: watches files of this host and tells the Console
#[derive(Debug, Parser)]
#[command(name = "defender", version = crate::cluster::program_version(), arg_required_else_help = true)]
struct Arguments {
    /// Folder of its settings, certificate, and queue
    #[arg(long, value_name = "DIR", default_value = install::FOLDER, global = true)]
    folder: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Have this host registered by a Console, install program and unit, and start the agent
    Install(register::Options),
    /// Stop the agent, and take program and unit away
    Uninstall(install::Removal),
    /// Have this host registered by a Console
    Register(register::Options),
    /// Run until SIGTERM
    Run,
}

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print(); // a closed terminal is no reason for another error
            return if error.use_stderr() { ExitCode::from(EX_USAGE) } else { ExitCode::SUCCESS };
        }
    };
    tracing_subscriber::fmt().with_writer(std::io::stderr).without_time().with_target(false).with_ansi(false).init();
    let done = match &arguments.command {
        Command::Install(options) => install::install(&arguments.folder, options),
        Command::Uninstall(removal) => install::uninstall(&arguments.folder, removal),
        Command::Register(options) => {
            Folder::open(&arguments.folder).and_then(|folder| register::register(&folder, options))
        }
        Command::Run => run(arguments.folder),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("defender: {error:#}");
            ExitCode::from(EX_TEMPFAIL)
        }
    }
}

fn run(folder: PathBuf) -> Result<()> {
    let folder = Arc::new(Folder::open(&folder)?);
    let _lock = folder.lock()?;
    let settings = folder.settings()?.context("this host is not registered: defender register --help")?;
    let queue = Queue::open(&folder.queue(), settings.queue_bytes).context("open the queue")?;
    let next = tokio::sync::watch::Sender::new(queue.next());
    let (stored, policy) = (tokio::sync::watch::Sender::new(0), tokio::sync::watch::Sender::new(folder.policy()));
    let shared = Shared { folder, queue: Arc::new(Mutex::new(queue)), next, stored, policy };
    let watch = Watch::open(shared.clone())?;
    let (ended, end) = oneshot::channel();
    thread::Builder::new().name("watch".to_owned()).spawn(move || {
        // Nobody waits for it when the process ends.
        let _ = ended.send(watch.run());
    })?;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async move {
        let mut term = unix::signal(unix::SignalKind::terminate())?;
        let mut interrupt = unix::signal(unix::SignalKind::interrupt())?;
        tokio::select! {
            ended = connection::run(shared, settings) => ended,
            ended = end => ended.context("the watch of files has ended")?,
            _ = term.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        }
    })
}
