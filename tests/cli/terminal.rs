//! A program on a real pseudo-terminal, and somebody who reads and types. Must never wait without end.

use std::{
    fs::OpenOptions,
    io::{Read, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt},
};

/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(60);

/// A running program and its terminal.
pub struct Terminal {
    master: PtyMaster,
    child: Child,
    seen: String,
    /// Up to where somebody has read.
    read: usize,
}

impl Terminal {
    /// Runs a command on a terminal of its own, with more in its environment.
    pub fn run(command: &[&str], environment: &[(&str, &str)]) -> Self {
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let path = ptsname_r(&master).unwrap();
        let side = || {
            let file = OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits()).open(&path);
            Stdio::from(file.unwrap())
        };
        // setsid makes the terminal the one that /dev/tty is for the program.
        let child = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .args(command)
            .env_remove("NO_COLOR")
            .envs(environment.iter().copied())
            .stdin(side())
            .stdout(side())
            .stderr(side())
            .spawn()
            .unwrap();
        Self { master, child, seen: String::new(), read: 0 }
    }

    /// Waits until this text comes, behind what was waited for before.
    pub fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(at) = self.seen[self.read..].find(text) {
                self.read += at + text.len();
                return;
            }
            assert!(self.listen(deadline), "{text:?} did not come; the terminal shows:\n{}", self.seen);
        }
    }

    /// Types a line.
    pub fn type_line(&mut self, text: &str) {
        writeln!(self.master, "{text}").unwrap();
    }

    /// Waits for the end of the program. Returns its exit code and all that the terminal has shown.
    pub fn wait_end(mut self) -> (i32, String) {
        let deadline = Instant::now() + LIMIT;
        while self.listen(deadline) {}
        assert!(Instant::now() < deadline, "it does not end; the terminal shows:\n{}", self.seen);
        let status = self.child.wait().unwrap();
        (status.code().unwrap_or(-1), std::mem::take(&mut self.seen))
    }

    /// Reads on; false at the end of the program or of our patience.
    fn listen(&mut self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut wanted = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        if left.is_zero() || poll(&mut wanted, PollTimeout::try_from(left).unwrap()).unwrap() == 0 {
            return false;
        }
        let mut bytes = [0; 4096];
        // When nobody has the other side open any more, reading fails.
        match self.master.read(&mut bytes) {
            Ok(count @ 1..) => {
                self.seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
                true
            }
            _ => false,
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
