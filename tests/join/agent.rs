//! A host that becomes a Defender: a prefix below which the line of the Console installs the real agent, and a folder that
//! is watched. Must never leave an agent behind.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
    thread,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

/// A host below a prefix, and the agent that runs there. Ends with this value.
pub struct Agent {
    prefix: TempDir,
}

impl Agent {
    /// A host without a Defender.
    pub fn new() -> Self {
        let prefix = tempfile::Builder::new().prefix("twdefender").tempdir().unwrap();
        fs::create_dir(prefix.path().join("watched")).unwrap();
        Self { prefix }
    }

    /// The installed program.
    pub fn program(&self) -> PathBuf {
        self.prefix.path().join("usr/local/bin/defender")
    }

    /// Its folder.
    pub fn folder(&self) -> PathBuf {
        self.prefix.path().join("var/lib/twistlock-defender")
    }

    /// What is watched.
    pub fn watched(&self) -> PathBuf {
        self.prefix.path().join("watched")
    }

    /// Puts a file there that is whole at once: it is one event.
    pub fn write(&self, name: &str) {
        let elsewhere = self.prefix.path().join(name);
        fs::write(&elsewhere, name).unwrap();
        fs::rename(elsewhere, self.watched().join(name)).unwrap();
    }

    /// Runs the line as an administrator would.
    pub fn run_line(&self, line: &str, options: &str) -> Output {
        let line = line.strip_suffix("| sudo bash").expect("the line ends in a shell");
        let command = format!("set -o pipefail; {line} | bash -s -- {options}");
        Command::new("bash").args(["-c", &command]).env("TWISTLOCK_PREFIX", self.prefix.path()).output().unwrap()
    }

    /// Runs a command of the installed program.
    pub fn defender(&self, words: &[&str]) -> Output {
        let mut command = Command::new(self.program());
        command.arg("--folder").arg(self.folder()).args(words).env("TWISTLOCK_PREFIX", self.prefix.path());
        command.output().unwrap()
    }

    /// The process of the agent, if it runs.
    pub fn pid(&self) -> Option<Pid> {
        let pid: i32 = fs::read_to_string(self.folder().join("lock")).ok()?.trim().parse().ok()?;
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        program.starts_with(self.prefix.path()).then(|| Pid::from_raw(pid))
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.prefix.path().join("var/log/twistlock-defender.log")).unwrap_or_default()
    }

    /// A file of its folder; nothing if there is none.
    pub fn file(&self, name: &str) -> String {
        fs::read_to_string(self.folder().join(name)).unwrap_or_default()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("--- the Defender:\n{}", self.log());
        }
        if let Some(pid) = self.pid() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// All that a command has printed.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}
