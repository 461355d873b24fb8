//! The running node of this host: found, asked, stopped and started, with systemd or without. Must never send a signal
//! to a process that is not proven to be the node of this data folder.

use std::{
    fs, io,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    files,
    place::{Place, UNIT, low_port, own_user},
    traces::{Daemon, Data},
    voice::{EX_TEMPFAIL, EX_UNAVAILABLE, Failure, Voice},
};
use crate::{cluster::Role, config::Config, control, node::Status};

/// How long a node may take to start and to stop.
const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// How often a condition is looked at.
const PACE: Duration = Duration::from_millis(100);
/// How long an answer of the daemon may take.
const ANSWER: Duration = Duration::from_secs(5);
/// How often systemd may start a node in vain before nobody waits for it any more.
const START_TRIES: u32 = 3;
/// Lines of a log that are shown after a failure.
const LAST_LINES: usize = 20;
/// What may be read of a log for them, in bytes.
const LAST_BYTES: u64 = 64 << 10;

/// The node of this host under its settings.
pub(super) struct Service<'a> {
    pub(super) place: &'a Place,
    pub(super) config: &'a Config,
    pub(super) voice: &'a Voice,
}

/// What was started, for those who wait for it.
pub(super) enum Started {
    Unit,
    Process(Child),
}

impl Service<'_> {
    /// The process that has the data folder, or that was started for it a moment ago.
    pub(super) fn daemon(&self) -> Option<Daemon> {
        let of_data = Daemon::of_data(self.place, &self.config.data_folder);
        of_data.or_else(|| {
            let pid = fs::read_to_string(self.place.pid_file()).ok()?.trim().parse().ok()?;
            let daemon = Daemon::of(pid)?;
            (daemon.config(self.place) == self.place.config()).then_some(daemon)
        })
    }

    /// True if the node runs or is being started.
    pub(super) fn runs(&self) -> bool {
        let active =
            || self.place.has_unit(self.voice) && self.voice.does(&["systemctl", "is-active", "--quiet", UNIT]);
        self.daemon().is_some() || active()
    }

    /// What the node says about itself; none if it does not answer.
    pub(super) fn status(&self) -> Option<Status> {
        control::status(&self.config.control_socket_path(), ANSWER).ok()
    }

    /// Moves the PRIMARY role to a member that stays up, while everything still runs. The stop alone would hand it
    /// over, too, but only a switchover looks first whether another member can take it.
    pub(super) fn leave_role(&self) {
        let alone = !Data::of(&self.config.data_folder).has_peers();
        if alone || self.status().is_none_or(|status| status.role != Role::Primary) {
            return;
        }
        self.voice.say("This node is PRIMARY: the role moves to another member first");
        let cli = self.place.bin().join("twistcli").display().to_string();
        let config = self.place.config().display().to_string();
        if !self.voice.does(&[&cli, "ha", "switchover", "--config", &config]) {
            self.voice.warn("no switchover (see the log); the role is handed over while the node stops");
        }
    }

    /// Stops the node.
    ///
    /// # Errors
    /// When systemd does not stop the unit, or the process does not end even when it is killed.
    pub(super) fn stop(&self) -> Result<(), Failure> {
        // Active or not: between two attempts to start it, a unit is neither active nor stopped, and the next attempt
        // would come while its data moves.
        if self.place.has_unit(self.voice) {
            let state =
                self.voice.run(&["systemctl", "is-active", UNIT]).map(|output| output.stdout).unwrap_or_default();
            if state.trim_ascii() != b"inactive" {
                self.voice.say("Stopping the node");
            }
            if !self.voice.does(&["systemctl", "stop", UNIT]) {
                return Err(Failure::new(EX_TEMPFAIL, format!("{UNIT} does not stop: see systemctl status {UNIT}")));
            }
            self.voice.does(&["systemctl", "reset-failed", UNIT]);
        }
        if let Some(Daemon { pid }) = self.daemon() {
            self.voice.say(&format!("Stopping the node (pid {pid})"));
            self.end(pid, Signal::SIGTERM)
                .or_else(|()| {
                    self.voice.warn(&format!("it did not end within {} s, and is killed", STOP_LIMIT.as_secs()));
                    self.end(pid, Signal::SIGKILL)
                })
                .map_err(|()| Failure::new(EX_TEMPFAIL, format!("the node (pid {pid}) does not end")))?;
        }
        files::remove(&self.place.pid_file())
    }

    fn end(&self, pid: i32, signal: Signal) -> Result<(), ()> {
        let _ = kill(Pid::from_raw(pid), signal); // it may end by itself just now
        let begin = Instant::now();
        while lives(pid) {
            if begin.elapsed() > STOP_LIMIT {
                return Err(());
            }
            thread::sleep(PACE);
        }
        Ok(())
    }

    /// Starts the node and does not wait for it.
    ///
    /// # Errors
    /// When systemd refuses, or the process or its log cannot be made.
    pub(super) fn start(&self) -> Result<Started, Failure> {
        self.voice.say("Starting the node");
        if self.place.uses_systemd(self.config) {
            // The unit counts as started only when the node is ready: that is watched here, where more can be said.
            for command in [&["daemon-reload"][..], &["enable", "--quiet", UNIT], &["restart", "--no-block", UNIT]] {
                if !self.voice.does(&[&["systemctl"], command].concat()) {
                    let text = format!("systemctl {} failed: see systemctl status {UNIT}", command.join(" "));
                    return Err(Failure::new(EX_UNAVAILABLE, text));
                }
            }
            return Ok(Started::Unit);
        }
        let command = self.command();
        let (pid_file, log) = (self.place.pid_file(), self.place.log());
        files::folder(&pid_file, 0o755)?;
        files::folder(&log, 0o750)?;
        let open = fs::File::options().create(true).append(true).open(&log).map_err(Failure::write(&log))?;
        let errors = open.try_clone().map_err(Failure::write(&log))?;
        let mut setsid = Command::new("setsid");
        // A group of its own would be in the way of a session of its own.
        setsid.args(&command).stdin(Stdio::null()).stdout(open).stderr(errors).current_dir("/");
        let child =
            setsid.spawn().map_err(|error| Failure::new(EX_UNAVAILABLE, format!("setsid cannot be run: {error}")))?;
        fs::write(&pid_file, format!("{}\n", child.id())).map_err(Failure::write(&pid_file))?;
        self.voice.say(&format!("No systemd here: the node runs as pid {}, its log is {}", child.id(), log.display()));
        self.voice.say(&format!("Starting it at boot is up to this host's service manager: {}", command.join(" ")));
        Ok(Started::Process(child))
    }

    /// The command that runs the node as its user.
    fn command(&self) -> Vec<String> {
        let user = self.place.run_user(self.config);
        let mut command = Vec::new();
        if user != own_user() {
            command.extend(["setpriv", "--reuid", &user, "--regid", &user, "--init-groups"].map(str::to_owned));
            if low_port(self.config) {
                let capability = ["--inh-caps", "+net_bind_service", "--ambient-caps", "+net_bind_service"];
                command.extend(capability.map(str::to_owned));
            }
        }
        command.push(self.place.bin().join("twistlockd").display().to_string());
        command.extend(["run", "--config"].map(str::to_owned));
        command.push(self.place.config().display().to_string());
        command
    }

    /// Waits until `done` returns something. None if the node gives up, or the time is over.
    pub(super) fn wait<T>(&self, started: &mut Started, mut done: impl FnMut() -> Option<T>) -> Option<T> {
        let begin = Instant::now();
        while begin.elapsed() < START_LIMIT {
            let gave_up = self.gave_up(started);
            if let Some(found) = done() {
                return Some(found);
            }
            if gave_up {
                return None;
            }
            thread::sleep(PACE);
        }
        None
    }

    /// Waits until the node is ready, and says how it is.
    ///
    /// # Errors
    /// When the node gives up, or is not ready within a minute. The end of its log has been shown by then.
    pub(super) fn wait_until_ready(&self, mut started: Started) -> Result<(), Failure> {
        let cli = self.place.bin().join("twistcli").display().to_string();
        let config = self.place.config().display().to_string();
        let mut last = String::new();
        let ready = self.wait(&mut started, || {
            let output = self.voice.run(&[&cli, "ha", "status", "--config", &config]).ok()?;
            last = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim_end().to_owned();
            // 0 healthy, 1 degraded: a node of its own is degraded until the others have joined.
            matches!(output.status.code(), Some(0 | 1)).then_some(())
        });
        if ready.is_some() {
            self.voice.say(&last);
            return Ok(());
        }
        self.voice.complain(&last);
        self.show_log();
        let failure = Failure::new(EX_UNAVAILABLE, "the node is installed, but it did not become ready");
        Err(failure.hint("Its last lines are above; then do this again."))
    }

    /// True when it is of no use to wait any longer.
    fn gave_up(&self, started: &mut Started) -> bool {
        match started {
            Started::Process(child) => !matches!(child.try_wait(), Ok(None)),
            Started::Unit => {
                let failed = self.voice.does(&["systemctl", "is-failed", "--quiet", UNIT]);
                let tries = self.voice.ask(&["systemctl", "show", "-p", "NRestarts", "--value", UNIT]);
                failed || tries.and_then(|tries| tries.parse().ok()).is_some_and(|tries: u32| tries >= START_TRIES)
            }
        }
    }

    /// Shows the end of the node's log.
    pub(super) fn show_log(&self) {
        let text = if self.place.uses_systemd(self.config) {
            self.voice.ask(&["journalctl", "-u", UNIT, "-n", "20", "--no-pager"]).unwrap_or_default()
        } else {
            last_lines(&self.place.log()).unwrap_or_default()
        };
        self.voice.complain(&text);
    }
}

/// False once a process has let go of its files, even where nobody has collected it yet. Its program is gone earlier.
fn lives(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let state = status.lines().find_map(|line| line.strip_prefix("State:"));
    state.is_some_and(|state| !state.trim_start().starts_with(['Z', 'X']))
}

fn last_lines(path: &Path) -> io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LAST_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(LAST_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(LAST_LINES)..].join("\n"))
}
