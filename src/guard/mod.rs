//! The port guard: a small child process that keeps the promise "no lease, no open port" when the daemon itself is
//! frozen or stuck. This file owns the daemon's side: it starts the child, hands it the Console sockets, and replaces
//! it when it dies. It must never open a port without a living child that watches it, and never decides about roles.
//!
//! The child makes the sockets listen, not the daemon: so there is no moment at which a port is open and nobody would
//! close it. The kernel closes a listening socket for every holder at `shutdown()`. PR_SET_PDEATHSIG, by which the
//! child dies with the daemon, is tied to the *thread* that started it: that is why a thread of its own, which lives as
//! long as the [`PortGuard`], starts every child.

mod child;
mod wire;

use std::{
    io::{self, PipeReader, PipeWriter, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use tokio::sync::{oneshot, watch};

pub use child::main;
use wire::Kind;

use crate::node::Lease;

/// The hidden subcommand of the daemon's program that runs the child: see [`main()`].
pub const SUBCOMMAND: &str = "port-guard";
/// Connections that the kernel keeps for us before they are accepted.
const BACKLOG: i32 = 4096;
/// A child that does not answer within this time is killed and replaced.
const ANSWER: Duration = Duration::from_secs(1);
/// First and longest wait before the next child is started when children die at once.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// A child that lived this long was healthy: its successor starts without a wait.
const HEALTHY: Duration = Duration::from_secs(10);
/// Commands under way; the supervisor has one at a time.
const COMMANDS: usize = 8;

/// What is known about the child.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuardState {
    /// Process id of the living child; none while there is none, and then no port may be open.
    pub pid: Option<u32>,
    /// How often a child has closed the ports because the lease had lapsed.
    pub lapses: u64,
}

/// Handle of the guard. The child ends when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct PortGuard {
    // Before `wake`: the thread must find the channel closed when the pipe closes.
    commands: SyncSender<Request>,
    wake: Arc<PipeWriter>,
    state: watch::Receiver<GuardState>,
}

/// What the guard ends a service by.
#[derive(Debug)]
pub enum Charge {
    /// The file `cgroup.kill` of its cgroup, open for writing.
    Cgroup(OwnedFd),
    /// The process (pidfd) that ends the service when it gets SIGTERM.
    Keeper(OwnedFd),
}

impl Charge {
    fn message(&self) -> (Kind, BorrowedFd<'_>) {
        match self {
            Self::Cgroup(file) => (Kind::Cgroup, file.as_fd()),
            Self::Keeper(process) => (Kind::Keeper, process.as_fd()),
        }
    }
}

#[derive(Debug)]
struct Request {
    what: What,
    answer: oneshot::Sender<io::Result<()>>,
}

/// What the child is asked for.
#[derive(Debug)]
enum What {
    Open(Vec<OwnedFd>),
    Change(Vec<OwnedFd>),
    Charge(Charge),
    Release,
}

impl PortGuard {
    /// Starts `program port-guard` and waits until it is ready. `program` should be `/proc/self/exe`, which stays
    /// right when the file is replaced by an upgrade. `consensus` is the listening socket of the links between nodes,
    /// which the child keeps open as long as it lives: then "connection refused" on that port proves to the other
    /// nodes that the child is dead, too, and cannot hold a Console port open.
    ///
    /// # Errors
    /// When the child cannot be started or does not answer.
    pub fn spawn(program: PathBuf, lease: &Lease, consensus: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let lease = lease.shared().as_fd().try_clone_to_owned()?;
        let consensus = consensus.map(|socket| socket.try_clone_to_owned()).transpose()?;
        let (commands, requests) = sync_channel(COMMANDS);
        let (woken, wake) = io::pipe()?;
        let (publish, state) = watch::channel(GuardState::default());
        let keeper = Keeper {
            program,
            lease,
            consensus,
            ports: Vec::new(),
            charge: None,
            requests,
            woken,
            publish,
            sequence: 0,
        };
        let (first, ready) = sync_channel(1);
        thread::Builder::new().name("port-guard".into()).spawn(move || keeper.run(&first))?;
        ready.recv().map_err(|_| io::Error::other("the thread of the port guard has ended"))??;
        Ok(Self { commands, wake: Arc::new(wake), state })
    }

    /// Hands bound sockets to the child, which makes them listen: they are open when this returns.
    ///
    /// # Errors
    /// When there is no living child or the lease has lapsed. The caller then closes the sockets: nobody holds them.
    pub async fn open(&self, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.request(What::Open(owned(sockets)?)).await
    }

    /// Opens or lets go of some of several sockets: these are all that are to be open, those included that are so
    /// already. One that is let go of has been shut down by the caller.
    ///
    /// # Errors
    /// When there is no living child, or the lease has lapsed since [`Self::open`], or one of them cannot listen. The
    /// child holds none then, and has shut them down.
    pub async fn change(&self, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.request(What::Change(owned(sockets)?)).await
    }

    /// From now on the child ends this service when the lease is about to lapse, and when the daemon is gone. One at a
    /// time: it forgets the former one.
    ///
    /// # Errors
    /// When there is no living child: then the service must not begin.
    pub async fn charge(&self, charge: Charge) -> io::Result<()> {
        self.request(What::Charge(charge)).await
    }

    /// Lets go of all sockets and of the service. The caller has shut them down before: nobody needs to wait for this
    /// to refuse clients.
    ///
    /// # Errors
    /// When there is no living child, which then holds nothing anyway.
    pub async fn release(&self) -> io::Result<()> {
        self.request(What::Release).await
    }

    async fn request(&self, what: What) -> io::Result<()> {
        let gone = |_| io::Error::new(io::ErrorKind::NotConnected, "the port guard has ended");
        let (answer, answered) = oneshot::channel();
        let busy = |_| io::Error::new(io::ErrorKind::WouldBlock, "the port guard is busy");
        self.commands.try_send(Request { what, answer }).map_err(busy)?;
        (&*self.wake).write_all(&[0])?;
        answered.await.map_err(gone)?
    }

    /// The child's state, to wait for changes.
    pub fn state(&self) -> watch::Receiver<GuardState> {
        self.state.clone()
    }
}

fn owned(sockets: &[BorrowedFd<'_>]) -> io::Result<Vec<OwnedFd>> {
    sockets.iter().map(|socket| socket.try_clone_to_owned()).collect()
}

/// The thread that starts children and talks to them.
struct Keeper {
    program: PathBuf,
    lease: OwnedFd,
    consensus: Option<OwnedFd>,
    /// What the child holds, to hand it to its successor.
    ports: Vec<OwnedFd>,
    /// The service that the child ends, too.
    charge: Option<Charge>,
    requests: Receiver<Request>,
    woken: PipeReader,
    publish: watch::Sender<GuardState>,
    sequence: u32,
}

/// A child and the socket to it. Dropping it kills the child.
struct Link {
    child: Child,
    socket: OwnedFd,
}

impl Drop for Link {
    fn drop(&mut self) {
        // It may be dead already. SIGKILL cannot be refused, so the wait is short.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Why a child is no longer served.
enum End {
    /// The handle is gone: the daemon ends.
    Finished,
    Died(String),
}

impl Keeper {
    fn run(mut self, first: &SyncSender<io::Result<()>>) {
        let mut link = match self.start() {
            Ok(link) => link,
            Err(error) => return drop(first.send(Err(error))),
        };
        if first.send(Ok(())).is_err() {
            return;
        }
        let mut wait = BACK_OFF.0;
        loop {
            let since = Instant::now();
            let End::Died(reason) = self.serve(&link) else { return };
            self.publish.send_modify(|state| state.pid = None);
            tracing::error!("the port guard process {} is gone ({reason}); starting another", link.child.id());
            drop(link);
            if since.elapsed() >= HEALTHY {
                wait = BACK_OFF.0;
            } else if !self.pause(wait) {
                return;
            }
            link = loop {
                wait = (wait * 2).min(BACK_OFF.1);
                match self.start() {
                    Ok(link) => break link,
                    Err(error) => tracing::error!("cannot start the port guard process: {error}"),
                }
                if !self.pause(wait) {
                    return;
                }
            };
        }
    }

    /// Waits without a child: requests fail meanwhile. False when the handle is gone.
    fn pause(&mut self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        loop {
            match self.requests.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(request) => {
                    if matches!(request.what, What::Release) {
                        self.ports.clear();
                        self.charge = None;
                    }
                    let error = io::Error::new(io::ErrorKind::NotConnected, "there is no living port guard process");
                    let _ = request.answer.send(Err(error));
                }
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
    }

    fn start(&mut self) -> io::Result<Link> {
        let (socket, other) = wire::pair()?;
        let child = Command::new(&self.program)
            .arg0("twistlockd")
            .arg(SUBCOMMAND)
            .arg(std::process::id().to_string())
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(other))
            .stdout(Stdio::null())
            .spawn()?;
        let link = Link { child, socket };
        let given: Vec<_> =
            [Some(&self.lease), self.consensus.as_ref()].into_iter().flatten().map(AsFd::as_fd).collect();
        exchange(&link, &mut self.sequence, Kind::Start, &given, &self.publish)?;
        if !self.ports.is_empty() {
            let held: Vec<_> = self.ports.iter().map(AsFd::as_fd).collect();
            exchange(&link, &mut self.sequence, Kind::Hold, &held, &self.publish)?;
        }
        if let Some(charge) = &self.charge {
            let (kind, given) = charge.message();
            exchange(&link, &mut self.sequence, kind, &[given], &self.publish)?;
        }
        self.publish.send_modify(|state| state.pid = Some(link.child.id()));
        Ok(link)
    }

    /// Serves requests until the child or the handle is gone.
    fn serve(&mut self, link: &Link) -> End {
        loop {
            let mut ready = [
                PollFd::new(link.socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.woken.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return End::Died(format!("poll: {error}")),
            }
            let (from_child, from_daemon) = (ready[0].any() == Some(true), ready[1].any() == Some(true));
            if from_child {
                match wire::receive(&link.socket) {
                    Ok(Some(message)) => note_lapse(message.kind, &self.publish),
                    Ok(None) => return End::Died("it closed its socket".into()),
                    Err(error) => return End::Died(error.to_string()),
                }
            }
            if from_daemon {
                // As many bytes as requests at most: the rest of them wakes us again.
                match self.woken.read(&mut [0; COMMANDS]) {
                    Ok(_) => {}
                    Err(error) => return End::Died(format!("wake-up pipe: {error}")),
                }
                if let Some(end) = self.carry_out(link) {
                    return end;
                }
            }
        }
    }

    fn carry_out(&mut self, link: &Link) -> Option<End> {
        loop {
            let request = match self.requests.try_recv() {
                Ok(request) => request,
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => return Some(End::Finished),
            };
            let result = self.ask(link, request.what);
            let broken = match &result {
                Err(error) if error.kind() != io::ErrorKind::PermissionDenied => Some(End::Died(error.to_string())),
                _ => None,
            };
            if result.is_err() {
                self.ports.clear();
            }
            // The asker may have given up; its sockets are closed by itself then.
            let _ = request.answer.send(result);
            if broken.is_some() {
                return broken;
            }
        }
    }
}

impl Keeper {
    /// Passes one request on, and remembers what the child holds then.
    fn ask(&mut self, link: &Link, what: What) -> io::Result<()> {
        let kind = match what {
            What::Charge(charge) => {
                let charge = self.charge.insert(charge);
                let (kind, given) = charge.message();
                return exchange(link, &mut self.sequence, kind, &[given], &self.publish);
            }
            What::Open(ports) => {
                self.ports = ports;
                Kind::Open
            }
            What::Change(ports) => {
                self.ports = ports;
                Kind::Change
            }
            What::Release => {
                self.ports.clear();
                self.charge = None;
                Kind::Release
            }
        };
        let given: Vec<_> = self.ports.iter().map(AsFd::as_fd).collect();
        exchange(link, &mut self.sequence, kind, &given, &self.publish)
    }
}

fn note_lapse(kind: Kind, publish: &watch::Sender<GuardState>) {
    if kind == Kind::Lapsed {
        tracing::warn!("the lease lapsed while ports were open; the port guard has closed them");
        publish.send_modify(|state| state.lapses += 1);
    }
}

/// Sends one message and waits for its answer, at most [`ANSWER`]. "Permission denied" is the child's refusal; every
/// other error means that the child is of no use any more.
fn exchange(
    link: &Link,
    sequence: &mut u32,
    kind: Kind,
    sockets: &[BorrowedFd<'_>],
    publish: &watch::Sender<GuardState>,
) -> io::Result<()> {
    *sequence = sequence.wrapping_add(1);
    wire::send(&link.socket, kind, *sequence, sockets)?;
    let until = Instant::now() + ANSWER;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(link.socket.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "the port guard process does not answer")),
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "the port guard process has ended");
        let message = wire::receive(&link.socket)?.ok_or_else(gone)?;
        match message.kind {
            Kind::Done if message.sequence == *sequence => return Ok(()),
            Kind::Refused if message.sequence == *sequence => {
                let text = "the port guard refused: the lease has lapsed or a socket cannot listen";
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
            }
            other => note_lapse(other, publish),
        }
    }
}
