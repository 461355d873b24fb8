//! Two small processes of the daemon's program. The keeper stands between the daemon and a service: it starts it, ends
//! it when it is told to or when the daemon is gone, collects what it leaves behind, and says how it ended. The
//! launcher becomes the service. Both must never outlive their purpose, never decide anything, and never read what the
//! service writes.
//!
//! The keeper's standard input is a pipe from the daemon: first one line of JSON ([`Task`]), then a line for each
//! order; its end means that the daemon is gone. Standard output is a pipe to the daemon with one line for each report.
//! Standard error is the pipe that gets what the service writes.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        resource::{Resource, setrlimit},
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Gid, Pid, Uid, geteuid, getppid, setgroups, setresgid, setresuid, setsid},
};
use rustix::thread::{CapabilitySet, clear_ambient_capability_set, remove_capability_from_bounding_set};
use serde::{Deserialize, Serialize};

use super::group::{Group, descendants};
use crate::descriptors;

/// First argument of the daemon's program that makes it the [`keep`]er.
pub const KEEPER: &str = "service-keeper";
/// First argument of the daemon's program that makes it the [`launch`]er.
pub const LAUNCHER: &str = "service-launch";
/// Exit code of a shell, too, for a program that cannot be run.
const CANNOT_RUN: u8 = 127;
/// Longest order, and longest task, in bytes.
const LONGEST: usize = 1 << 20;

/// Order: SIGTERM to the first process of the service.
pub(super) const TERMINATE: &[u8] = b"terminate\n";
/// Order: SIGKILL to all of it.
pub(super) const KILL: &[u8] = b"kill\n";
/// Report: the service's first process, by its number.
pub(super) const RUNS: &str = "runs ";
/// Report: nothing of the service is left, and how it ended.
pub(super) const ENDED: &str = "ended ";

/// What is to be started, and as whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Task {
    /// The folder of its cgroup; none: whatever descends from the keeper is the service.
    pub(super) cgroup: Option<PathBuf>,
    /// None: the daemon's own user.
    pub(super) user: Option<Account>,
    /// Soft limit of open files.
    pub(super) files: u64,
    /// Where it is started.
    pub(super) folder: PathBuf,
    /// The program and its arguments.
    pub(super) words: Vec<String>,
    /// All of its environment.
    pub(super) environment: Vec<(String, String)>,
}

/// A user as the kernel knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Account {
    pub(super) user: u32,
    pub(super) group: u32,
    pub(super) groups: Vec<u32>,
}

/// Runs the keeper until nothing of its service is left.
pub fn keep() -> ExitCode {
    match Keeper::start().and_then(|mut keeper| keeper.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot be kept: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Keeper {
    /// Not `io::stdin()`, which reads ahead: orders must be seen by `poll`.
    input: File,
    pending: Vec<u8>,
    signals: SignalFd,
    group: Group,
    /// The first process, until it is waited for.
    first: Option<Pid>,
    how: Option<String>,
}

impl Keeper {
    fn start() -> io::Result<Self> {
        prctl::set_name(c"twistlock-keep")?;
        // A terminal's signals do not reach this process group; the daemon decides.
        let mut seen = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
            seen.add(signal);
        }
        seen.thread_set_mask()?;
        let signals = SignalFd::with_flags(&seen, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        // What the service lets go of comes here, and is found by that.
        prctl::set_child_subreaper(true)?;
        let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        Ok(Self { input, pending: Vec::new(), signals, group: Group::Descendants, first: None, how: None })
    }

    fn run(&mut self) -> io::Result<()> {
        let Some(line) = self.line()? else { return Ok(()) };
        let task: Task = serde_json::from_slice(&line)?;
        self.group = task.cgroup.clone().map_or(Group::Descendants, Group::Cgroup);
        let launcher = launcher(&line)?;
        self.first = Some(Pid::from_raw(launcher));
        report(&format!("{RUNS}{launcher}"));
        while self.how.is_none() {
            // The daemon is gone, or wants us to be, or talks what is not understood.
            if !self.wait().unwrap_or(false) {
                let ended = self.group.kill();
                self.reap();
                self.group.remove();
                return ended;
            }
        }
        let left = self.left_behind();
        let ended = self.group.kill();
        self.reap();
        let how = self.how.take().unwrap_or_default();
        let left =
            if left { "; it left processes behind, which were killed (it has to stay in the foreground)" } else { "" };
        match ended {
            Ok(()) => report(&format!("{ENDED}{how}{left}")),
            Err(error) => report(&format!("{ENDED}{how}; {error}")),
        }
        self.group.remove();
        Ok(())
    }

    /// Waits for an order or a signal; false when all is to end.
    fn wait(&mut self) -> io::Result<bool> {
        let mut ready =
            [PollFd::new(self.input.as_fd(), PollFlags::POLLIN), PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let (order, signal) = (ready[0].any() == Some(true), ready[1].any() == Some(true));
        if signal {
            while let Some(signal) = self.signals.read_signal()? {
                if signal.ssi_signo == Signal::SIGTERM as u32 {
                    return Ok(false);
                }
            }
            self.reap();
        }
        if order {
            let Some(line) = self.line()? else { return Ok(false) };
            match [line.as_slice(), b"\n"].concat().as_slice() {
                // It may have ended in the meantime.
                TERMINATE => {
                    let _ = self.first.map(|first| kill(first, Signal::SIGTERM));
                }
                KILL => self.group.kill()?,
                _ => return Err(io::Error::other("an order that is not known")),
            }
        }
        Ok(true)
    }

    /// Waits for all that has ended, also what the service has let go of.
    fn reap(&mut self) {
        loop {
            let how = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, format!("exit code {code}")),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, signal.to_string()),
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            if self.first == Some(how.0) {
                (self.first, self.how) = (None, Some(how.1));
            }
        }
    }

    fn left_behind(&self) -> bool {
        match &self.group {
            Group::Cgroup(path) => fs::read_to_string(path.join("cgroup.events"))
                .is_ok_and(|text| text.lines().any(|line| line == "populated 1")),
            Group::Descendants => {
                i32::try_from(std::process::id()).is_ok_and(|own| descendants(own).is_ok_and(|found| !found.is_empty()))
            }
        }
    }

    /// The next line of the daemon, without its end; none when the daemon is gone.
    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let rest = self.pending.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.pending, rest);
                line.pop();
                return Ok(Some(line));
            }
            let mut bytes = [0; 4096];
            let length = match self.input.read(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if length == 0 || self.pending.len() > LONGEST {
                return Ok(None);
            }
            self.pending.extend_from_slice(&bytes[..length]);
        }
    }
}

/// The daemon may be gone: then nobody needs to know.
fn report(text: &str) {
    let _ = io::stdout().write_all(format!("{text}\n").as_bytes()).and_then(|()| io::stdout().flush());
}

/// Starts the process that becomes the service.
fn launcher(task: &[u8]) -> io::Result<i32> {
    let output = || io::stderr().as_fd().try_clone_to_owned().map(Stdio::from);
    let mut child = Command::new("/proc/self/exe")
        .arg0("twistlockd")
        .args([LAUNCHER, &std::process::id().to_string()])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(output()?)
        .stderr(output()?)
        .spawn()?;
    if let Some(mut input) = child.stdin.take() {
        // One that dies at once says why by its end.
        let _ = input.write_all(task);
    }
    i32::try_from(child.id()).map_err(io::Error::other)
}

/// Turns this process into the service that standard input describes. Returns only when that fails.
pub fn launch() -> ExitCode {
    let Err(error) = become_service();
    eprintln!("{error}");
    ExitCode::from(CANNOT_RUN)
}

fn become_service() -> Result<std::convert::Infallible, String> {
    let mut text = Vec::new();
    let read = io::stdin().take(LONGEST as u64).read_to_end(&mut text);
    let task: Task = read
        .and_then(|_| Ok(serde_json::from_slice(&text)?))
        .map_err(|error| format!("not started by a daemon (this command is internal to twistlockd): {error}"))?;
    let what = |what: &'static str| move |error: io::Error| format!("cannot start the service: {what}: {error}");
    // No terminal of the daemon's is its own.
    setsid().map_err(io::Error::from).map_err(what("begin a session"))?;
    if let Some(cgroup) = &task.cgroup {
        fs::write(cgroup.join("cgroup.procs"), "0").map_err(what("enter its cgroup"))?;
    }
    limits(task.files).map_err(what("set its limits"))?;
    if let Some(account) = &task.user {
        become_user(account).map_err(what("become SERVICE_USER"))?;
    }
    prctl::set_no_new_privs().map_err(io::Error::from).map_err(what("give privileges up"))?;
    // After the change of the user, which would undo it. A keeper that died before this line is noticed by the
    // comparison.
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from).map_err(what("be tied to its keeper"))?;
    let parent = std::env::args().nth(2).and_then(|text| text.parse::<i32>().ok());
    if parent != Some(getppid().as_raw()) {
        return Err("cannot start the service: its keeper is gone".to_owned());
    }
    SigSet::empty().thread_set_mask().map_err(io::Error::from).map_err(what("unblock signals"))?;
    let (program, arguments) = task.words.split_first().ok_or("SERVICE_COMMAND is empty")?;
    let error = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(task.environment)
        .current_dir(&task.folder)
        .stdin(Stdio::null())
        .exec();
    Err(format!("cannot start the service: {program} in {}: {error}", task.folder.display()))
}

/// Not the daemon's raised limit of files, no dumps of memory in its folder, and no way to go before others.
fn limits(files: u64) -> io::Result<()> {
    descriptors::lower(files);
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    Ok(setrlimit(Resource::RLIMIT_RTPRIO, 0, 0)?)
}

/// Gives up everything that the superuser has; whoever is not the superuser can only stay who it is.
fn become_user(account: &Account) -> io::Result<()> {
    let (user, group) = (Uid::from_raw(account.user), Gid::from_raw(account.group));
    if !geteuid().is_root() {
        let same = geteuid() == user;
        return if same { Ok(()) } else { Err(io::Error::other("only the superuser can start it as another user")) };
    }
    clear_ambient_capability_set()?;
    for number in 0..64 {
        // Behind the last one that this kernel knows.
        if remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)).is_err() {
            break;
        }
    }
    setgroups(&account.groups.iter().map(|group| Gid::from_raw(*group)).collect::<Vec<_>>())?;
    setresgid(group, group, group)?;
    Ok(setresuid(user, user, user)?)
}
