//! Follows the node's role: opens the ports of the workload and runs it while this node is PRIMARY with a valid lease
//! and a living port guard, and closes and stops them otherwise. A level-triggered loop that compares what should be
//! with what is. Must never have a say in the role, and never keep the database longer than the demotion deadline: it
//! would rather end the process.

mod leased;
mod ports;
mod serve;

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::watch, time};

use self::{
    leased::{Opening, Phase},
    ports::Sockets,
    serve::{Seating, Server},
};
use crate::{
    guard::{GuardState, PortGuard},
    node::{Lease, Serving, Status, lease::boottime, trouble},
    telemetry,
    workload::{self, ConsoleServices, Setup, Workload},
};

/// Exit code when the demotion deadline was missed: EX_TEMPFAIL of sysexits, so that the service manager starts us
/// again.
pub const EXIT_DEADLINE: i32 = 75;
/// How long running requests may take to end at a planned switchover.
const DRAIN: Duration = Duration::from_millis(250);
/// Wait before the next attempt to open after a failure.
const RETRY: Duration = Duration::from_secs(1);
/// Time in which a dead port guard must be replaced while ports are open.
const WITHOUT_GUARD: Duration = Duration::from_millis(250);
/// How often the lease is looked at while only it is missing: nobody announces its beginning.
const LEASE_POLL: Duration = Duration::from_millis(10);
/// How long an opening after [`SupervisorHandle::resume`] is waited for.
const REOPENING: Duration = Duration::from_secs(5);
/// How often everything is compared even if nothing was announced.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// What the supervisor needs to know.
#[derive(Clone, Debug)]
pub struct SupervisorConfig {
    /// Where the ports are bound; the unspecified IPv6 address means all interfaces of both families.
    pub address: IpAddr,
    /// What the workload of each term is started with.
    pub workload: Setup,
    /// `DEMOTION_DEADLINE_MS`: from the loss of the role to the moment the database is free.
    pub demotion_deadline: Duration,
}

/// What the supervisor has reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SupervisorState {
    /// The ports are open.
    pub open: bool,
    /// The workload exists: the database is in use. True a little earlier and longer than `open`.
    pub running: bool,
    /// Why the ports are not open although this node is PRIMARY, in a sentence.
    pub problem: Option<String>,
}

/// Handle of a [`Supervisor`].
#[derive(Clone, Debug)]
pub struct SupervisorHandle {
    drained_for: watch::Sender<Option<&'static str>>,
    state: watch::Receiver<SupervisorState>,
}

impl SupervisorHandle {
    /// Closes the ports in order, as for a planned switchover (`why`): no new connection, running requests get 250 ms,
    /// then the workload stops. Returns when the database is free. Nothing is opened again before [`Self::resume`].
    pub async fn drain(&self, why: &'static str) {
        self.drained_for.send_replace(Some(why));
        let mut state = self.state.clone();
        // An error means that the supervisor has ended, and with it everything that it had open.
        let _ = state.wait_for(|state| !state.running && !state.open).await;
    }

    /// Takes [`Self::drain`] back, when its purpose is over, or was given up.
    pub fn resume(&self) {
        self.drained_for.send_replace(None);
    }

    /// Returns when the ports are open or cannot be opened, and after 5 s at the latest: another node may have the role
    /// by now.
    pub async fn reopened(&self) {
        let mut state = self.state.clone();
        let settled = state.wait_for(|state| state.open || state.problem.is_some());
        // An error means that the supervisor has ended: nothing will be opened.
        let _ = time::timeout(REOPENING, settled).await;
    }

    /// What the supervisor has reached, to read and to wait for.
    pub fn state(&self) -> watch::Receiver<SupervisorState> {
        self.state.clone()
    }
}

/// The loop that follows the role; see [`Supervisor::run`].
#[derive(Debug)]
pub struct Supervisor {
    config: SupervisorConfig,
    inputs: Inputs,
    serving: Serving,
    guard: PortGuard,
    state: watch::Sender<SupervisorState>,
    seating: Seating,
}

/// Everything that decides whether the ports should be open.
#[derive(Clone, Debug)]
struct Inputs {
    status: watch::Receiver<Arc<Status>>,
    lease: Lease,
    guard: watch::Receiver<GuardState>,
    drained_for: watch::Receiver<Option<&'static str>>,
}

/// Open ports, and what serves them.
#[derive(Debug)]
struct Front {
    sockets: Sockets,
    server: Server,
}

/// What runs while the ports are open.
#[derive(Debug)]
struct Running {
    console: Front,
    /// While the service beside it is ready.
    service: Option<Front>,
    workload: Workload,
    /// The guard's count of lapses at the opening: another count means that it has closed the ports.
    lapses: u64,
}

/// Why an opening that runs must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    /// It was drained, for the reason named.
    Drained(&'static str),
    Role,
    Lease,
    ClosedByGuard,
    NoGuard,
    NodeEnded,
}

impl Reason {
    fn sentence(self) -> &'static str {
        match self {
            Self::Drained(why) => why,
            Self::Role => "this node is not PRIMARY any more",
            Self::Lease => "the lease has lapsed",
            Self::ClosedByGuard => "the port guard has closed them",
            Self::NoGuard => "there is no living port guard",
            Self::NodeEnded => "the node has ended",
        }
    }
}

impl Inputs {
    /// Why an opening of this epoch must end now; none if it may go on. `without_guard`: since when no guard lives.
    fn objection(&self, epoch: u64, lapses: u64, without_guard: Option<Instant>) -> Option<Reason> {
        if self.status.has_changed().is_err() {
            return Some(Reason::NodeEnded);
        }
        if self.status.borrow().serving() != Some(epoch) {
            return Some(Reason::Role);
        }
        if !self.lease.is_valid() {
            return Some(Reason::Lease);
        }
        if self.guard.borrow().lapses != lapses {
            return Some(Reason::ClosedByGuard);
        }
        // After the reasons that leave no time for an orderly end.
        if let Some(why) = *self.drained_for.borrow() {
            return Some(Reason::Drained(why));
        }
        without_guard.filter(|since| since.elapsed() >= WITHOUT_GUARD).map(|_| Reason::NoGuard)
    }

    /// Returns when something was announced or the time is over.
    async fn changed(&mut self, wait: Duration) {
        let ended = tokio::select! {
            result = self.status.changed() => result.is_err(),
            result = self.guard.changed() => result.is_err(),
            result = self.drained_for.changed() => result.is_err(),
            () = time::sleep(wait) => false,
        };
        if ended {
            // A closed channel is ready for ever.
            time::sleep(wait.min(LEASE_POLL)).await;
        }
    }

    /// Returns when an opening of this epoch must end.
    async fn lost(&mut self, epoch: u64, lapses: u64) -> Reason {
        let mut without_guard = None;
        loop {
            match self.guard.borrow().pid {
                Some(_) => without_guard = None,
                None => without_guard = without_guard.or_else(|| Some(Instant::now())),
            }
            if let Some(reason) = self.objection(epoch, lapses, without_guard) {
                return reason;
            }
            // The lease is extended without a word, and nobody says when it ends: look again at each deadline.
            let left = Duration::from_nanos(self.lease.deadline().saturating_sub(boottime()));
            let wait = if without_guard.is_some() { left.min(LEASE_POLL) } else { left };
            // Timers are exact to a millisecond; one more avoids an extra round.
            self.changed(wait + Duration::from_millis(1)).await;
        }
    }
}

impl Supervisor {
    /// Prepares a supervisor and its handle, for a node with this status and this database. The guard must have been
    /// given the same lease.
    pub fn new(
        config: SupervisorConfig,
        (status, serving): (watch::Receiver<Arc<Status>>, Serving),
        lease: Lease,
        guard: PortGuard,
    ) -> (Self, SupervisorHandle) {
        let (state, seen) = watch::channel(SupervisorState::default());
        let (drain, drained_for) = watch::channel(None);
        let inputs = Inputs { status, lease, guard: guard.state(), drained_for };
        (
            Self { config, inputs, serving, guard, state, seating: Seating::default() },
            SupervisorHandle { drained_for: drain, state: seen },
        )
    }

    /// What the workload does for the cluster. It needs this supervisor's handle, so it comes after [`Self::new`].
    pub fn offer(&mut self, services: ConsoleServices) {
        self.config.workload.services = Some(services);
    }

    /// Runs until the node's status channel closes; everything is closed and stopped then.
    pub async fn run(mut self) {
        while self.inputs.status.has_changed().is_ok() {
            let serving = self.inputs.status.borrow().serving();
            let Some(epoch) = serving else {
                self.publish(|state| state.problem = None);
                self.inputs.changed(LONGEST_WAIT).await;
                continue;
            };
            let drained = self.inputs.drained_for.borrow().is_some();
            if drained || !self.inputs.lease.is_valid() {
                self.inputs.changed(if drained { LONGEST_WAIT } else { LEASE_POLL }).await;
                continue;
            }
            let lapses = self.inputs.guard.borrow().lapses;
            match self.open(epoch, lapses).await {
                Ok(mut running) => {
                    self.publish(|state| *state = SupervisorState { open: true, running: true, problem: None });
                    tracing::info!("{} is open (epoch {epoch})", workload::NAME);
                    let reason = self.attend(epoch, &mut running).await;
                    self.close(running, reason).await;
                }
                Err(error) => {
                    // Not logged when the role was lost meanwhile: that was not a failure.
                    if self.inputs.objection(epoch, lapses, None).is_none() {
                        let problem = format!("{error:#}");
                        tracing::error!("{} is not open: {problem}; trying again", workload::NAME);
                        self.publish(|state| state.problem = Some(problem));
                        self.inputs.changed(RETRY).await;
                    }
                }
            }
        }
    }

    fn publish(&self, change: impl FnOnce(&mut SupervisorState)) {
        self.state.send_if_modified(|state| {
            let before = state.clone();
            change(state);
            *state != before
        });
    }

    /// Starts the workload, then opens the ports. Gives up as soon as the role is lost.
    async fn open(&mut self, epoch: u64, lapses: u64) -> anyhow::Result<Running> {
        self.publish(|state| state.running = true);
        // Looked at after that was said: whoever drains either waits for the end of this workload, or keeps it from
        // beginning.
        let drained = self.inputs.drained_for.borrow().map(|why| anyhow::anyhow!("{why}"));
        let started = match drained {
            Some(why) => Err(why),
            None => Workload::start(epoch, self.inputs.status.clone(), &self.serving, &self.config.workload),
        };
        let workload = started.inspect_err(|_| self.publish(|state| state.running = false))?;
        let mut watched = self.inputs.clone();
        let result = tokio::select! {
            biased;
            reason = watched.lost(epoch, lapses) => Err(anyhow::anyhow!("{}", reason.sentence())),
            result = self.open_ports(epoch, &workload) => result,
        };
        match result {
            Ok(console) => Ok(Running { console, service: None, workload, lapses }),
            Err(error) => {
                self.within(Duration::ZERO, workload.stop(false)).await;
                // The guard may still be about to open what was given up: this comes after it.
                let _ = self.guard.release().await;
                self.publish(|state| state.running = false);
                Err(error)
            }
        }
    }

    async fn open_ports(&self, epoch: u64, workload: &Workload) -> anyhow::Result<Front> {
        workload.ready().await?;
        let sockets = Sockets::bind(self.config.address, workload.endpoints())?;
        sockets.open(&self.guard).await?;
        self.seating.acquaintances.set_members(self.inputs.status.borrow().membership.addresses());
        self.front(epoch, sockets)
    }

    /// Serves what is open.
    fn front(&self, epoch: u64, sockets: Sockets) -> anyhow::Result<Front> {
        let opening = Opening::new(epoch, self.inputs.lease.clone(), self.inputs.status.clone());
        let server = Server::start(sockets.listeners()?, opening, &self.seating);
        Ok(Front { sockets, server })
    }

    /// Opens and closes the ports of the service as it becomes ready and ends, until everything has to be closed.
    async fn attend(&mut self, epoch: u64, running: &mut Running) -> Reason {
        let lapses = running.lapses;
        let Some(service) = running.workload.service() else { return self.inputs.lost(epoch, lapses).await };
        let mut report = service.report();
        loop {
            let ready = report.borrow_and_update().is_ready();
            let mut watched = self.inputs.clone();
            let mut retry = LONGEST_WAIT;
            if ready != running.service.is_some() {
                let changed = tokio::select! {
                    biased;
                    reason = watched.lost(epoch, lapses) => return reason,
                    changed = self.change_service(epoch, running) => changed,
                };
                match changed {
                    Ok(true) => self.publish(|state| state.problem = None),
                    Ok(false) => return Reason::ClosedByGuard,
                    Err(error) => {
                        let problem = format!("{} is not open: {error:#}", workload::SERVICE_NAME);
                        tracing::error!("{problem}; trying again");
                        self.publish(|state| state.problem = Some(problem));
                        retry = RETRY;
                    }
                }
            }
            tokio::select! {
                biased;
                reason = watched.lost(epoch, lapses) => return reason,
                changed = report.changed() => if changed.is_err() {
                    // It has ended with the node, and is not announced any more.
                    return watched.lost(epoch, lapses).await;
                },
                () = time::sleep(retry) => {}
            }
        }
    }

    /// Opens the ports of the service, or closes them. False: the guard does not go along, and watches none any more.
    async fn change_service(&self, epoch: u64, running: &mut Running) -> anyhow::Result<bool> {
        if let Some(front) = running.service.take() {
            drop(front.sockets);
            front.server.opening().advance(Phase::Closed);
            front.server.finished().await;
            tracing::info!("{} is closed", workload::SERVICE_NAME);
            return Ok(running.console.sockets.alone(&self.guard).await.is_ok());
        }
        let sockets = Sockets::bind(self.config.address, running.workload.service_endpoints())?;
        if let Err(error) = sockets.open_beside(&running.console.sockets, &self.guard).await {
            tracing::error!("{error:#}");
            return Ok(false);
        }
        running.service = Some(self.front(epoch, sockets)?);
        tracing::info!("{} is open (epoch {epoch})", workload::SERVICE_NAME);
        Ok(true)
    }

    /// Closes the ports and resets the connections first, then stops the workload and lets go of the database.
    async fn close(&self, running: Running, reason: Reason) {
        let begin = Instant::now();
        let Running { console, service, workload, .. } = running;
        let in_order = matches!(reason, Reason::Drained(_));
        let servers: Vec<Server> = [Some(console), service].into_iter().flatten().map(|front| front.server).collect();
        self.publish(|state| state.open = false);
        if in_order {
            workload.wind_down();
            servers.iter().for_each(|server| server.opening().advance(Phase::Draining));
            let all = async {
                for server in &servers {
                    server.finished().await;
                }
            };
            // What does not end in time is reset.
            let _ = time::timeout(DRAIN, all).await;
        }
        servers.iter().for_each(|server| server.opening().advance(Phase::Closed));
        // The role is still here then: nobody waits for this node.
        let patience = if in_order { workload.patience() } else { Duration::ZERO };
        self.within(patience, async {
            for server in &servers {
                server.finished().await;
            }
            workload.stop(in_order).await;
        })
        .await;
        // It only drops duplicates of sockets that are shut down; a dead guard holds none.
        let _ = self.guard.release().await;
        self.publish(|state| state.running = false);
        tracing::info!("{} is closed after {:?}: {}", workload::NAME, begin.elapsed(), reason.sentence());
    }

    /// Ends the process when the demotion deadline, and `patience` behind it, has passed: another node may need us to
    /// be gone. Not while the disk does not answer: the ports are closed, the others go on without us, and a new
    /// process would wait for the same disk.
    async fn within(&self, patience: Duration, work: impl Future<Output = ()>) {
        let limit = self.config.demotion_deadline + patience;
        let mut work = std::pin::pin!(work);
        while time::timeout(limit, &mut work).await.is_err() {
            let Some(trouble) = trouble() else {
                tracing::error!(
                    "the workload did not stop within {limit:?}: ending the process so that it starts anew"
                );
                telemetry::flush();
                std::process::exit(EXIT_DEADLINE);
            };
            tracing::warn!("the workload has not stopped yet: {trouble}");
        }
    }
}
