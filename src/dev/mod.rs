//! `twistlockd dev`: a whole cluster of real daemons on loopback addresses, to try it out and to watch it fail
//! over. Owns the processes and the folder they live in. Must never do anything to a node that could not happen
//! to a host: the daemons do not know that they are part of this.

mod client;
mod failover;
mod layout;
mod process;
mod screen;
mod service;
mod watch;

use std::{
    net::TcpListener,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

pub use layout::{ClusterFile, NodeFile};

use client::Client;
use layout::{Layout, Shape};
use process::Process;
use screen::Screen;
use service::ServiceOptions;
use watch::Watch;

/// Something of the host does not work (sysexits EX_UNAVAILABLE).
const EX_UNAVAILABLE: u8 = 69;
/// How long the cluster may take to elect its first primary and serve.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// How often processes and states are looked at.
const STEP_MS: u16 = 50;

/// Options of `twistlockd dev`.
#[derive(Args, Debug)]
pub struct Options {
    /// Folder of the cluster; kept. One that an earlier run left is used again [default: a new temporary one]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Keep the temporary folder
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    shape: Shape,
    #[command(flatten)]
    service: ServiceOptions,
    /// Start a node that ended again after this many seconds; 0: never
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    restart_after: Duration,
    /// Show a failover first: write a tag, kill the primary, and wait until another node has taken over
    #[arg(long)]
    show_failover: bool,
    /// Print the introduction only, no changes
    #[arg(short, long)]
    quiet: bool,
    /// Used by dev itself, for each of its children
    #[arg(long, hide = true, requires = "parent")]
    become_node: Option<PathBuf>,
    /// Used by dev itself, with --become-node
    #[arg(long, hide = true)]
    parent: Option<i32>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("a number of seconds from 0 to 86400 is allowed".into()),
    }
}

/// Runs the cluster until SIGINT or SIGTERM. Must be called on the main thread, before any other thread is started.
#[must_use]
pub fn main(options: Options) -> ExitCode {
    if let (Some(config), Some(parent)) = (&options.become_node, options.parent) {
        eprintln!("twistlockd dev: {}", process::become_node(config, parent));
        return ExitCode::from(EX_UNAVAILABLE);
    }
    match Dev::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("twistlockd dev: {error:#}");
            ExitCode::from(EX_UNAVAILABLE)
        }
    }
}

/// The running cluster.
struct Dev {
    program: PathBuf,
    layout: Layout,
    processes: Vec<Process>,
    watch: Watch,
    signals: SignalFd,
    screen: Screen,
    restart_after: Duration,
    quiet: bool,
    show_failover: bool,
    service: ServiceOptions,
}

impl Dev {
    fn run(options: &Options) -> Result<()> {
        let signals = catch_signals().context("wait for signals")?;
        let temporary = options.dir.is_none();
        let dir = options.dir.clone().unwrap_or_else(temporary_dir);
        let layout = Layout::open(&dir, options.shape)?;
        options.service.apply(&layout)?;
        let mut dev = Self::start(layout, signals, options)?;
        let outcome = dev.live();
        dev.stop();
        // A failed start is worth looking at: its folder stays.
        if temporary && !options.keep && outcome.is_ok() {
            std::fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
        } else {
            dev.screen.say(&format!("The files are kept in {}", dir.display()));
        }
        outcome
    }

    fn start(mut layout: Layout, signals: SignalFd, options: &Options) -> Result<Self> {
        check_ports(&layout)?;
        let program = process::program().context("find this program's file")?;
        let mut processes = Vec::new();
        for index in 0..layout.cluster.nodes.len() {
            processes.push(Process::start(&program, &layout.config_path(index), &layout.log_path(index))?);
        }
        layout.set_pids(&pids(&processes))?;
        let sockets = layout.cluster.nodes.iter().map(|node| node.control.clone()).collect();
        let watch = Watch::start(sockets).context("start to watch the nodes")?;
        let mut screen = Screen::new(options.quiet);
        let found = if layout.existed { "again, with the data that was there" } else { "with fresh data" };
        screen.event(&format!("{} nodes started {found}; waiting for a primary", processes.len()));
        let Options { restart_after, quiet, show_failover, .. } = *options;
        let service = options.service.clone();
        Ok(Self { program, layout, processes, watch, signals, screen, restart_after, quiet, show_failover, service })
    }

    /// From the first election to the signal that ends it all.
    fn live(&mut self) -> Result<()> {
        let start = Instant::now();
        let client = Client::new(&self.layout.cluster.ca)?;
        while !self.serves(&client) {
            if self.wait()? {
                return Ok(());
            }
            self.check_start(start)?;
        }
        let ready = start.elapsed().as_secs_f64();
        let restart = match self.restart_after {
            Duration::ZERO => "it stays down".into(),
            after => format!("it starts again after {} s", after.as_secs_f64()),
        };
        let rows = screen::rows(&self.layout.cluster, &self.watch.latest());
        let text = screen::introduction(&self.layout, &rows, &restart, &self.twistcli());
        self.screen.say(&format!("\nThe cluster is ready ({ready:.1} s).\n\n{text}\n"));
        if let Some(text) = self.service.introduction(&self.layout) {
            self.screen.say(&format!("{text}\n"));
        }
        if self.quiet {
            self.watch.calm_down();
        }
        if self.show_failover {
            failover::show(&self.layout.cluster, &self.processes, &client, &mut self.screen)?;
        }
        while !self.wait()? {
            self.reap()?;
            self.restart()?;
            let rows = screen::rows(&self.layout.cluster, &self.watch.latest());
            self.screen.show(&rows);
        }
        Ok(())
    }

    /// What a node runs: this program, or the one that lies in its folder, as on a host that is upgraded before the
    /// others.
    fn program_of(&self, index: usize) -> PathBuf {
        let own = self.layout.config_path(index).with_file_name("twistlockd");
        if own.exists() { own } else { self.program.clone() }
    }

    /// How the administration tool is called: it lies beside this program, or cargo has not built it yet.
    fn twistcli(&self) -> String {
        let tool = self.program.with_file_name("twistcli");
        if tool.exists() { tool.display().to_string() } else { "cargo run --release --bin twistcli --".into() }
    }

    /// True if a primary answers and the administrator can log in there.
    fn serves(&self, client: &Client) -> bool {
        let ClusterFile { nodes, user, password, .. } = &self.layout.cluster;
        let answers = self.watch.latest();
        let primary = answers
            .iter()
            .position(|answer| answer.as_ref().is_some_and(|status| status.role == crate::cluster::Role::Primary));
        let Some(primary) = primary.and_then(|index| nodes.get(index)) else { return false };
        // The primary may change under us; then the next round asks the new one.
        client.ping(&primary.console_url) && client.sign_up(&primary.console_url, user, password).is_ok()
    }

    /// Ends a start that cannot succeed any more, with what the nodes have to say about it.
    fn check_start(&mut self, start: Instant) -> Result<()> {
        for (index, process) in self.processes.iter_mut().enumerate() {
            if let Some(status) = process.ended() {
                let (name, log) = (&self.layout.cluster.nodes[index].name, self.layout.log_path(index));
                bail!("{name} {}; the end of its log:\n{}", process::explain(status), process::tail(&log, 12));
            }
        }
        if start.elapsed() < READY_LIMIT {
            return Ok(());
        }
        let logs: String = (0..self.processes.len())
            .map(|index| {
                format!(
                    "  {}:\n{}",
                    self.layout.log_path(index).display(),
                    process::tail(&self.layout.log_path(index), 6)
                )
            })
            .collect();
        bail!("no Console answers after {} s; the ends of the logs:\n{logs}", READY_LIMIT.as_secs())
    }

    /// Waits one step. True if a signal asks us to stop.
    fn wait(&self) -> Result<bool> {
        let mut fds = [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(STEP_MS)) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(errno) => return Err(errno).context("wait for signals"),
        }
        Ok(self.signals.read_signal().context("read a signal")?.is_some())
    }

    /// Notes the nodes that ended.
    fn reap(&mut self) -> Result<()> {
        let mut changed = false;
        for (index, process) in self.processes.iter_mut().enumerate() {
            let Some(status) = process.ended() else { continue };
            let pid = process.pid().unwrap_or_default();
            let again = match self.restart_after {
                Duration::ZERO => "stays down".into(),
                after => format!("starts again in {} s", after.as_secs_f64()),
            };
            let name = &self.layout.cluster.nodes[index].name;
            self.screen.event(&format!("{name} (pid {pid}) {}; it {again}", process::explain(status)));
            let restart = (!self.restart_after.is_zero()).then(|| Instant::now() + self.restart_after);
            *process = Process::Ended { restart };
            changed = true;
        }
        if changed { self.layout.set_pids(&pids(&self.processes)) } else { Ok(()) }
    }

    /// Starts the nodes whose time has come.
    fn restart(&mut self) -> Result<()> {
        for index in 0..self.processes.len() {
            let Process::Ended { restart: Some(time) } = self.processes[index] else { continue };
            if Instant::now() < time {
                continue;
            }
            let (config, log) = (self.layout.config_path(index), self.layout.log_path(index));
            self.processes[index] = Process::start(&self.program_of(index), &config, &log)?;
            self.layout.set_pids(&pids(&self.processes))?;
            let pid = self.processes[index].pid().unwrap_or_default();
            let name = &self.layout.cluster.nodes[index].name;
            self.screen.event(&format!("{name} started again (pid {pid})"));
        }
        Ok(())
    }

    /// Stops all nodes in an orderly way, the primary last: it would only hand its role to a node that is stopped next.
    fn stop(&mut self) {
        self.screen.event("stopping");
        let answers = self.watch.latest();
        let is_primary =
            |index: usize| answers[index].as_ref().is_some_and(|status| status.role == crate::cluster::Role::Primary);
        let (last, first): (Vec<usize>, Vec<usize>) = (0..self.processes.len()).partition(|index| is_primary(*index));
        for group in [first, last] {
            for index in &group {
                self.processes[*index].ask_to_stop();
            }
            for index in group {
                if !self.processes[index].wait() {
                    let name = &self.layout.cluster.nodes[index].name;
                    self.screen.event(&format!("{name} did not stop in an orderly way: see its log"));
                }
            }
        }
        if let Err(error) = self.layout.set_pids(&pids(&self.processes)) {
            self.screen.say(&format!("{error:#}"));
        }
    }
}

fn pids(processes: &[Process]) -> Vec<Option<u32>> {
    processes.iter().map(Process::pid).collect()
}

/// From here on SIGINT and SIGTERM are read from a descriptor. Threads and processes started later inherit the mask; a
/// node takes it off again.
fn catch_signals() -> nix::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

fn temporary_dir() -> PathBuf {
    std::env::temp_dir().join(format!("twistlock-dev-{:08x}", rand::random::<u32>()))
}

/// Says which port is taken before each daemon says it in a log of its own.
fn check_ports(layout: &Layout) -> Result<()> {
    for (address, port) in layout.endpoints() {
        if let Err(error) = TcpListener::bind((address, port)) {
            bail!("cannot listen on {address}:{port}: {error}. Another cluster? Try --port-offset 1000");
        }
    }
    Ok(())
}

/// Reads `cluster.json` of a dev cluster.
///
/// # Errors
/// When it is not there or not understood.
pub fn read_cluster(dir: &Path) -> Result<ClusterFile> {
    let path = dir.join("cluster.json");
    let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("understand {}", path.display()))
}
