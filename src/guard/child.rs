//! The port guard process. Owns duplicates of the open sockets and closes them for every holder when the lease deadline
//! passes; ends the service a little before that, and when its daemon is gone. Must never decide anything else, never
//! block on the daemon, never outlive it, and stay small: one thread, hardly any allocation, asleep unless something
//! happens.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    process::ExitCode,
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigSet, Signal},
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
    unistd::getppid,
};
use rustix::{
    net::{Shutdown, listen, shutdown},
    process::pidfd_send_signal,
};

use super::{
    BACKLOG, Charge,
    wire::{self, Kind},
};
use crate::{
    node::lease::{boottime, read_shared},
    scheduling,
};

/// Files that this process may have open: some sockets, the lease and the timer.
const FILES: u64 = 64;
/// The service is ended so much before the deadline at which the ports close: it takes some milliseconds to be gone.
const EARLY: Duration = Duration::from_millis(20);

/// Runs the guard until its daemon is gone. Standard input is the socket to the daemon, the second argument the
/// daemon's process id.
pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("port guard: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    // The order matters: a parent that dies before this line is noticed by the comparison, one that dies after it
    // takes the guard with it.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let parent = std::env::args().nth(2).and_then(|text| text.parse::<i32>().ok());
    if parent != Some(getppid().as_raw()) {
        return Err(io::Error::other("not started by a daemon (this command is internal to twistlockd)"));
    }
    prctl::set_name(c"twistlock-guard")?;
    // Whether these are permitted, the daemon has logged.
    let _ = scheduling::try_urgent();
    let _ = scheduling::stay_in_memory();
    // The daemon has raised the limit for itself.
    let (files, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, files.min(FILES), most)?;
    // A terminal's Ctrl-C and a service manager's stop reach the whole group; the daemon decides when ports close.
    let mut decided_by_daemon = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        decided_by_daemon.add(signal);
    }
    decided_by_daemon.thread_block()?;
    let socket = io::stdin();
    Guard::new(socket.as_fd())?.run()
}

struct Guard<'a> {
    socket: BorrowedFd<'a>,
    /// On CLOCK_BOOTTIME, so that a host that wakes from suspend closes its ports at once.
    timer: TimerFd,
    lease: Option<File>,
    /// Kept open only so that the kernel refuses connections to it no sooner than this process is dead, too.
    consensus: Vec<OwnedFd>,
    ports: Vec<OwnedFd>,
    service: Option<Charge>,
}

/// The daemon may be gone in any way.
impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.end_service();
    }
}

impl<'a> Guard<'a> {
    fn new(socket: BorrowedFd<'a>) -> io::Result<Self> {
        let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
        Ok(Self { socket, timer, lease: None, consensus: Vec::new(), ports: Vec::new(), service: None })
    }

    fn run(mut self) -> io::Result<()> {
        loop {
            self.watch()?;
            let mut ready =
                [PollFd::new(self.socket, PollFlags::POLLIN), PollFd::new(self.timer.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            if ready[0].any() == Some(true) && !self.receive()? {
                return Ok(());
            }
        }
    }

    /// Closes the ports if the deadline has passed, else sets the timer to it. The daemon extends the deadline in
    /// memory without telling: it is read again each time the older one passes.
    fn watch(&mut self) -> io::Result<()> {
        let deadline = self.deadline();
        if self.service.is_some() {
            let at = deadline.saturating_sub(EARLY.as_nanos() as u64);
            if boottime() < at {
                return self.wake_at(at);
            }
            self.end_service();
        }
        if self.ports.is_empty() {
            return Ok(self.timer.unset()?);
        }
        if boottime() < deadline {
            return self.wake_at(deadline);
        }
        for port in self.ports.drain(..) {
            // "Not connected" means that the daemon was faster.
            let _ = shutdown(&port, Shutdown::Both);
        }
        self.timer.unset()?;
        // A frozen daemon reads it later; if it never does, nobody needs it.
        let _ = wire::send(self.socket, Kind::Lapsed, 0, &[]);
        Ok(())
    }

    fn wake_at(&self, at: u64) -> io::Result<()> {
        let at = TimeSpec::new((at / 1_000_000_000) as i64, (at % 1_000_000_000) as i64);
        Ok(self.timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?)
    }

    /// SIGKILL to all processes of the service. It may have ended by itself, or be ended by the daemon just now.
    fn end_service(&mut self) {
        match self.service.take() {
            Some(Charge::Cgroup(kill)) => {
                let _ = rustix::io::write(&kill, b"1");
            }
            Some(Charge::Keeper(keeper)) => {
                let _ = pidfd_send_signal(&keeper, rustix::process::Signal::TERM);
                // It may be frozen.
                let _ = pidfd_send_signal(&keeper, rustix::process::Signal::CONT);
            }
            None => {}
        }
    }

    /// A lease that cannot be read counts as lapsed.
    fn deadline(&self) -> u64 {
        self.lease.as_ref().and_then(|memory| read_shared(memory).ok()).unwrap_or(0)
    }

    /// Carries out one message; false when the daemon is gone.
    fn receive(&mut self) -> io::Result<bool> {
        let Some(message) = wire::receive(self.socket)? else { return Ok(false) };
        let answer = match self.carry_out(message.kind, message.descriptors) {
            Ok(()) => Kind::Done,
            Err(error) => {
                eprintln!("port guard: {error}");
                // One of them may listen already, and the daemon may be frozen before it can close it.
                for port in self.ports.drain(..) {
                    let _ = shutdown(&port, Shutdown::Both);
                }
                Kind::Refused
            }
        };
        match wire::send(self.socket, answer, message.sequence, &[]) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            other => other.map(|()| true),
        }
    }

    fn carry_out(&mut self, kind: Kind, mut descriptors: Vec<OwnedFd>) -> io::Result<()> {
        match kind {
            Kind::Start if self.lease.is_none() && !descriptors.is_empty() => {
                self.lease = Some(File::from(descriptors.remove(0)));
                self.consensus = descriptors;
            }
            Kind::Open if self.ports.is_empty() => {
                if boottime() >= self.deadline() {
                    return Err(io::Error::other("the lease lapsed before the ports were open"));
                }
                // Held before they listen, so that from the first moment somebody is there to close them.
                self.ports = descriptors;
                for port in &self.ports {
                    listen(port, BACKLOG)?;
                }
            }
            Kind::Hold if self.ports.is_empty() => self.ports = descriptors,
            Kind::Change if self.ports.is_empty() || boottime() >= self.deadline() => {
                return Err(io::Error::other("the lease has lapsed, and the ports are closed"));
            }
            Kind::Change => {
                // Each of those that stay is held twice for a moment, and none of them by nobody.
                let former = std::mem::replace(&mut self.ports, descriptors);
                for port in &self.ports {
                    listen(port, BACKLOG)?;
                }
                drop(former);
            }
            Kind::Cgroup if descriptors.len() == 1 => self.service = descriptors.pop().map(Charge::Cgroup),
            Kind::Keeper if descriptors.len() == 1 => self.service = descriptors.pop().map(Charge::Keeper),
            Kind::Release => {
                self.ports.clear();
                self.service = None;
            }
            _ => return Err(io::Error::other(format!("message {kind:?} out of order"))),
        }
        Ok(())
    }
}
