//! One daemon of a dev cluster as a child process. Must never let it outlive this process.

use std::{
    fs::OpenOptions,
    io::{self, Read, Seek, SeekFrom},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    sys::{
        prctl::set_pdeathsig,
        signal::{SigSet, Signal, kill},
    },
    unistd::{Pid, getppid},
};

/// How long one daemon may take for an orderly stop. Its own limit is 10 s.
const STOP_LIMIT: Duration = Duration::from_secs(12);

/// Where a node's process stands.
pub(super) enum Process {
    /// It runs.
    Running(Child),
    /// It ended; it is started again at the given time, if ever.
    Ended { restart: Option<Instant> },
}

impl Process {
    /// Starts the daemon of one node. Its output is appended to `log`.
    ///
    /// Must be called on the main thread: the kernel ties the death signal to the thread that forks.
    ///
    /// # Errors
    /// When the log cannot be opened or the process cannot be started.
    pub(super) fn start(program: &Path, config: &Path, log: &Path) -> Result<Self> {
        let open = || OpenOptions::new().create(true).append(true).open(log);
        let out = open().with_context(|| format!("open {}", log.display()))?;
        let err = out.try_clone().context("duplicate the log's descriptor")?;
        let child = Command::new(program)
            .args(["dev", "--become-node"])
            .arg(config)
            .args(["--parent", &std::process::id().to_string()])
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            // A group of its own: Ctrl-C in the terminal reaches us alone, and we stop the nodes in order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        Ok(Self::Running(child))
    }

    /// Its process id while it runs.
    pub(super) fn pid(&self) -> Option<u32> {
        match self {
            Self::Running(child) => Some(child.id()),
            Self::Ended { .. } => None,
        }
    }

    /// The way it ended, if it did since the last call.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        match self {
            Self::Running(child) => child.try_wait().ok().flatten(),
            Self::Ended { .. } => None,
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            // It may have ended just now: then there is nothing to signal, and wait() has not been called, so the id is
            // ours.
            let _ = kill(Pid::from_raw(pid as i32), signal);
        }
    }

    /// Asks for an orderly stop.
    pub(super) fn ask_to_stop(&self) {
        self.signal(Signal::SIGTERM);
        // A frozen process hears it only when it is woken.
        self.signal(Signal::SIGCONT);
    }

    /// Ends it as a power failure would.
    pub(super) fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Waits for the end of an orderly stop, and enforces it when that takes too long. True if it was orderly.
    pub(super) fn wait(&mut self) -> bool {
        let Self::Running(child) = self else { return true };
        let deadline = Instant::now() + STOP_LIMIT;
        let mut status = child.try_wait();
        while matches!(status, Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
            status = child.try_wait();
        }
        let orderly = matches!(status, Ok(Some(status)) if status.success());
        if !matches!(status, Ok(Some(_))) {
            let _ = child.kill();
            let _ = child.wait();
        }
        *self = Self::Ended { restart: None };
        orderly
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Self::Running(child) = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// How a process ended, for people.
pub(super) fn explain(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(0), _) => "stopped".into(),
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(name) => format!("was killed by {name}"),
            Err(_) => format!("was killed by signal {signal}"),
        },
        (None, None) => "ended".into(),
    }
}

/// Turns this process into a node's daemon that dies with its parent. Returns only when that fails.
///
/// A step of its own because the death signal must be set in the child, and it outlives exec (prctl(2)).
pub(super) fn become_node(config: &Path, parent: i32) -> io::Error {
    // The signals that dev blocks for itself would stay blocked across exec, and the daemon deaf to SIGTERM.
    if let Err(errno) = SigSet::empty().thread_set_mask().and_then(|()| set_pdeathsig(Signal::SIGKILL)) {
        return errno.into();
    }
    if getppid() != Pid::from_raw(parent) {
        return io::Error::other("the dev cluster ended meanwhile");
    }
    match program() {
        Ok(program) => Command::new(program).args(["run", "--config"]).arg(config).exec(),
        Err(error) => error,
    }
}

/// The file of the running program.
///
/// # Errors
/// When the kernel does not tell.
pub(super) fn program() -> io::Result<PathBuf> {
    std::env::current_exe()
}

/// The last lines of a log, for an error message.
pub(super) fn tail(log: &Path, lines: usize) -> String {
    const WINDOW: u64 = 16 * 1024;
    let read = || -> io::Result<String> {
        let mut file = std::fs::File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(WINDOW)))?;
        let mut bytes = Vec::new();
        file.take(WINDOW).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_else(|error| format!("(cannot read {}: {error})", log.display()));
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].iter().map(|line| format!("    {line}\n")).collect()
}
