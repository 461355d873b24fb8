//! One node's process: builds the parts, joins them, and takes them apart in order. The only place where parts are
//! wired.

mod administration;
mod damage;
mod folder;
mod memory;
mod service;
mod signals;
mod start;
mod systemd;
mod tasks;

use std::{
    fs::File,
    net::SocketAddr,
    os::{fd::AsFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::{
    sync::{mpsc, watch},
    task,
};
use tracing::{Level, error, info, warn};
use twistlock_ha::{
    ask::{self, Asker},
    certificates::{console_tls::ConsoleTls, renewal, rotation},
    cluster::{NodeId, feature_level, program_version, reach::Standing},
    config::{self, Config, LogFormat, NotifySeverity, Severity},
    console::{self, Inside},
    control::ControlSocket,
    descriptors,
    events::{
        self, Event, Kind, Notifier, Recorder,
        Severity::{Critical, Info},
        notify,
    },
    found,
    guard::PortGuard,
    heal::{self, Notes},
    health::{self, HealthPort, MetricsPage},
    join::JoinAssets,
    node::{self, Exit, Handle, Lease, Warning, lease::boottime},
    peer::{self, Links, LinksConfig, PeerIdentity, Roster},
    pki::NodeTls,
    scheduling,
    service::Service,
    snapshot,
    storage::{DataDir, Identity},
    supervisor::{Supervisor, SupervisorConfig, SupervisorHandle, SupervisorState},
    telemetry,
    workload::{ConsolePorts, ConsoleServices, Setup},
};

use crate::{
    joining::{self, Outcome},
    waiting,
};
use administration::Colleague;
use folder::MountedFolder;
pub(crate) use signals::Signals;
use start::{Found, first_start, node_config, open_memory, promise};
pub(crate) use start::{bind_address, lease_terms, open_data};
pub(crate) use systemd::begin_long_start;
use systemd::service_manager;
use tasks::{Need, Tasks};

/// Exit codes of sysexits: something of the host does not work; an input or output failed.
const EX_UNAVAILABLE: u8 = 69;
const EX_IOERR: u8 = 74;
const EX_TEMPFAIL: u8 = 75;
/// How long a planned stop may take before the process ends anyway.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Questions of other members that may wait.
const QUESTIONS: usize = 8;
/// Members that may wait for the cluster key: when it is replaced, all of them want it at once.
const KEY_CALLS: usize = 8;
/// How long the end of the port guard process may take.
const GUARD_LIMIT: Duration = Duration::from_secs(2);

/// Runs the node that this configuration file describes, until SIGTERM or SIGINT.
pub(crate) fn run(path: &Path) -> ExitCode {
    let in_memory = scheduling::stay_in_memory();
    let loaded = match config::load(path) {
        Ok(loaded) => loaded,
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::from(errors.exit_code());
        }
    };
    let format = match loaded.config.log_format {
        LogFormat::Human => telemetry::Format::Human,
        LogFormat::Json => telemetry::Format::Json,
    };
    if let Err(error) = telemetry::init(format, Level::from(loaded.config.log_level)) {
        eprintln!("twistlockd: {error:#}");
        return ExitCode::from(EX_UNAVAILABLE);
    }
    scheduling::say_if_it_stays(in_memory);
    for note in &loaded.notes {
        match note.severity {
            Severity::Warning => warn!("{note}"),
            _ => info!("{note}"),
        }
    }
    if let Err(why) = descriptors::raise() {
        error!("cannot start: {why}");
        telemetry::flush();
        return ExitCode::from(EX_UNAVAILABLE);
    }
    let code = end(live(path, &loaded.config));
    telemetry::flush();
    code
}

/// Says how the process ends, or begins it again.
fn end(exit: Result<Exit>) -> ExitCode {
    match exit {
        Ok(Exit::Stopped) => ExitCode::SUCCESS,
        Ok(Exit::Fatal(why)) => {
            error!(reason = why, "the node ends itself: a restart begins from what is durable");
            ExitCode::from(EX_IOERR)
        }
        Ok(Exit::Restart(why)) => {
            info!(reason = why, "the node begins again");
            begin_long_start();
            begin_again()
        }
        Err(error) => {
            error!("cannot start: {error:#}");
            ExitCode::from(EX_UNAVAILABLE)
        }
    }
}

/// From the first look at the data folder to the end of the node.
fn live(path: &Path, config: &Config) -> Result<Exit> {
    let signals = Signals::take(path.to_owned(), config.clone())?;
    let mut notes = Notes::default();
    let data = open_data(config, &mut notes)?;
    let health = start::health_port(config)?;
    if let Outcome::Stopped = waiting::wait_first(config, &data, &signals, health.as_ref())? {
        return Ok(Exit::Stopped);
    }
    if let Outcome::Stopped = joining::join_first(config, &data, &signals, health.as_ref())? {
        return Ok(Exit::Stopped);
    }
    drop(data);
    let exit = Parts::build(config, health, notes)?.run(&signals)?;
    Ok(if signals.leave() { as_stopped(exit) } else { exit })
}

/// Becomes a new process of the same program, with the same number: whoever watches it sees nothing of it. Everything
/// that is open is closed by that.
fn begin_again() -> ExitCode {
    let mut arguments = std::env::args_os();
    descriptors::restore();
    let mut command = Command::new("/proc/self/exe");
    command.arg0(arguments.next().unwrap_or_else(|| "twistlockd".into())).args(arguments);
    telemetry::flush();
    let error = command.exec();
    error!(%error, "the program cannot be started again from within");
    ExitCode::from(EX_TEMPFAIL)
}

/// Everything that runs, in the order in which it was built.
struct Parts {
    config: Config,
    /// See [`heal::promised_earlier`].
    quiet: Duration,
    /// What was mended at this start.
    notes: Notes,
    /// Held for its lock.
    _data: DataDir,
    identity: Identity,
    listener: std::net::TcpListener,
    lease: Lease,
    guard: PortGuard,
    node_tls: NodeTls,
    links: peer::LinkSender,
    events: Recorder,
    handle: Handle,
    thread: JoinHandle<Exit>,
    /// The open database file.
    database: Arc<File>,
    health: Option<HealthPort>,
    /// That another copy of the database was put in place: told when there is somebody to be notified.
    replaced: Option<Event>,
    /// What this node says of its own memory, and what it remembers of the others.
    standing: Standing,
    remembered: peer::Memory,
}

impl Parts {
    fn build(config: &Config, health: Option<HealthPort>, mut notes: Notes) -> Result<Self> {
        let data = open_data(config, &mut notes)?;
        let identity = match heal::identity(&data, &mut notes)? {
            None => first_start(config, &data)?,
            Some(identity) => identity,
        };
        let address = SocketAddr::new(bind_address(config), config.high_availability_port.unwrap_or(8086));
        let listener = peer::listen(address).with_context(|| format!("listen for the other members on {address}"))?;
        let lease = Lease::new().context("make the lease")?;
        let guard = PortGuard::spawn(PathBuf::from("/proc/self/exe"), &lease, Some(listener.as_fd()))
            .context("start the port guard")?;
        telemetry::metrics_handle().context("start the metrics")?;
        let events = Recorder::start(&identity.name, data.path()).context("start the events")?;
        let version = program_version();
        let starts = Event::new(Kind::Role, Info, format!("{} starts (version {version})", identity.name));
        events.record(starts.field("version", version));
        let Found { stored, log, databases, replaced, quiet, mind, standing } =
            open_memory(config, &data, &identity, health.as_ref(), &mut notes)?;
        let names = |address: &str| found::console_names(config, address);
        heal::certificates(data.path(), &identity, &stored.membership, names, &mut notes)?;
        let certificates = data.path().join("certificates");
        renewal::at_start(&certificates, &stored.membership, identity.node);
        let node_tls = NodeTls::load(&certificates).context("load the certificates of this node")?;
        let others: Vec<NodeId> =
            identity.membership.roster.members.iter().map(|m| m.id).filter(|id| *id != identity.node).collect();
        let remembered = mind.others.clone();
        let links = LinksConfig { memory: remembered.clone(), ..LinksConfig::new(identity.node, others) };
        let (mut links, sender) = Links::new(links).context("make the peer links")?;
        let datagrams = peer::listen_for_datagrams(address).and_then(|socket| links.use_datagrams(socket));
        if let Err(error) = datagrams {
            warn!(%address, %error, "no datagrams (UDP) are taken from the other members: all goes by TCP alone");
        }
        let node_config = node_config(config, &identity, stored, quiet, lease.clone(), mind);
        let database = databases.console().file();
        let (handle, thread) =
            node::spawn(node_config, log, databases, (links, sender.clone())).context("start the node")?;
        let config = config.clone();
        Ok(Self {
            config,
            quiet,
            notes,
            _data: data,
            identity,
            listener,
            lease,
            guard,
            node_tls,
            links: sender,
            events,
            handle,
            thread,
            database,
            health,
            replaced,
            standing,
            remembered,
        })
    }

    fn run(self, signals: &Signals) -> Result<Exit> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("start the runtime")?;
        let (events, name) = (self.events.clone(), self.identity.name.clone());
        let exit = runtime.block_on(self.serve(signals));
        events.record(ends(&name, &exit));
        events.flush();
        // Whatever a task still does must not keep the process: everything that matters has been closed by now.
        runtime.shutdown_background();
        exit
    }

    async fn serve(self, signals: &Signals) -> Result<Exit> {
        let (stop, stopped) = watch::channel(false);
        let socket = self.config.control_socket_path();
        let control = ControlSocket::bind(&socket).with_context(|| format!("bind {}", socket.display()))?;
        let console_tls = self.console_tls().context("load what the Console serves")?;
        let mut tasks = Tasks::default();
        let (service, folder) = self.service(&mut tasks).unzip();
        let (mut supervisor, ports) = self.supervisor(&console_tls, service.as_ref());
        if let Some((service, folder)) = service.clone().zip(folder.clone()) {
            let following = service::follow(service, ports.clone(), self.handle.clone());
            tasks.spawn("state of the service", Need::Steady, following);
            let local = self.config.service_local_files.clone();
            let watching = service::watch_files(folder, local, self.handle.clone());
            tasks.spawn("files of the service", Need::Steady, watching);
        }
        let (peers, questions) = self.share_with_others(&mut tasks);
        let services = self.services((&ports, service), Asker::new(peers.clone()), &mut tasks)?;
        tasks.spawn("answers for members", Need::Steady, ask::serve(self.colleague(&services), questions));
        control.spawn(console::local(&services), stopped.clone()).context("start the thread of the control socket")?;
        supervisor.offer(services);
        self.show_node(&ports, &mut tasks);
        let served = console_tls.run(self.handle.clone(), peers.tls.clone());
        tasks.spawn("certificates of the Console", Need::Steady, served);
        self.tell_of_it(&ports, &mut tasks);
        let peers = task::spawn(peer::run(self.listener, peers, self.links, stopped));
        tasks.spawn("supervisor", Need::Vital, supervisor.run());
        info!(node = self.identity.name, cluster = %self.identity.cluster, "node runs");
        let mut node = task::spawn_blocking(move || self.thread.join());
        tokio::select! {
            ended = &mut node => {
                let exit = flatten(ended);
                if matches!(exit, Exit::Restart(_)) {
                    stop.send_replace(true);
                    tasks.end().await;
                    end_of_guard(self.guard).await;
                }
                return Ok(exit);
            }
            ended = peers => ended.context("peer links panicked")?.context("run the peer links")?,
            why = tasks.lost(self.handle.status()) => return Ok(Exit::Fatal(why)),
            () = signals.asked_to_stop() => {}
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        let exit = stop_in_order(&ports, &self.handle, &mut node, stop_limit(&self.config)).await;
        stop.send_replace(true);
        tasks.end().await;
        if let Some(folder) = folder {
            folder.leave().await;
        }
        Ok(exit)
    }

    /// What the control socket of this node does, and its Console for the cluster.
    fn services(
        &self,
        (ports, service): (&SupervisorHandle, Option<Service>),
        asker: Asker,
        tasks: &mut Tasks,
    ) -> Result<ConsoleServices> {
        let inside = Inside::new(self.handle.status(), self.events.clone());
        tasks.spawn("audit rows for the PRIMARY", Need::Steady, inside.clone().hand_on(asker.clone()));
        let admin = Arc::new(administration::admin(&self.config, &self.handle, ports.clone(), inside.clone()));
        let backups = administration::backups(&self.config, &self.handle, admin.clone(), self.events.clone(), asker);
        // These two end at once if there is nothing for them to do.
        tasks.spawn("automatic backups", Need::Finite, backups.clone().run_schedule());
        tasks.spawn("copies of backups", Need::Finite, backups.clone().run_copies());
        let (notifier, notifying) = self.notifier();
        tasks.spawn("notifications", Need::Steady, notifying);
        Ok(ConsoleServices {
            admin,
            inside,
            backups,
            join_assets: Arc::new(JoinAssets::new(&self.config)),
            events: self.events.clone(),
            notifier,
            metrics: self.metrics()?,
            high_availability: self.config.high_availability_enabled || self.config.clustered_db_enabled,
            status_port: self.config.status_port(),
            lease: self.lease.clone(),
            data: self.config.data_folder.clone(),
            service,
        })
    }

    /// Who answers other members.
    fn colleague(&self, services: &ConsoleServices) -> Arc<Colleague> {
        let (inside, backups) = (services.inside.clone(), services.backups.clone());
        Arc::new(Colleague { inside, backups, membership: self.handle.membership() })
    }

    /// What Prometheus reads.
    fn metrics(&self) -> Result<MetricsPage> {
        start::metrics_page(&self.config)
    }

    /// Who is to be told of events, and what tells them.
    fn notifier(&self) -> (Notifier, impl Future<Output = ()> + use<>) {
        let severity = match self.config.notify_severity {
            NotifySeverity::Info => events::Severity::Info,
            NotifySeverity::Warning => events::Severity::Warning,
            NotifySeverity::Critical => events::Severity::Critical,
        };
        let words = self.config.notify_command.clone();
        let command =
            (!words.is_empty()).then_some(notify::Command { words, severity, launcher: Some("/proc/self/exe") });
        let notifier = Notifier::new(&self.identity.name, self.handle.membership(), command);
        (notifier.clone(), notifier.run(self.events.clone()))
    }

    /// Whom the others take this node for, what they ask, and the tasks that exchange with them what else goes beside
    /// the links.
    fn share_with_others(&self, tasks: &mut Tasks) -> (Arc<PeerIdentity>, mpsc::Receiver<peer::StreamCall>) {
        let (snapshots, calls) = mpsc::channel(1);
        let (keys, key_calls) = mpsc::channel(KEY_CALLS);
        let (questions, asked) = mpsc::channel(QUESTIONS);
        let (certificates, tls) = watch::channel(Arc::new(self.node_tls.clone()));
        let folder = self.config.data_folder.join("certificates");
        let renewing = renewal::run(folder.clone(), self.handle.clone(), certificates.clone());
        tasks.spawn("certificate of this node", Need::Steady, renewing);
        let peers = PeerIdentity {
            me: self.identity.node,
            version: program_version().to_owned(),
            level: feature_level(),
            roster: Roster::new(self.handle.editions()),
            bind: self.config.bind_address,
            terms: lease_terms(&self.config),
            tls,
            snapshots,
            keys,
            questions,
            standing: self.standing,
            memory: self.remembered.clone(),
        };
        let (peers, data) = (Arc::new(peers), self.config.data_folder.clone());
        let sending = snapshot::serve(self.handle.clone(), self.events.clone(), calls, data.clone());
        tasks.spawn("snapshots for members", Need::Steady, sending);
        // It ends when it has one: the node begins again with that.
        tasks.spawn(
            "snapshot for this node",
            Need::Finite,
            snapshot::refetch(self.handle.clone(), peers.clone(), data.clone(), self.database.clone()),
        );
        tasks.spawn("cluster keys for members", Need::Steady, rotation::serve(folder.clone(), key_calls));
        let parts = rotation::Parts {
            data,
            certificates: folder,
            handle: self.handle.clone(),
            peers: peers.clone(),
            tls: certificates,
        };
        tasks.spawn("cluster key and authority", Need::Steady, rotation::run(parts));
        (peers, asked)
    }

    /// Follows the node for those who look at it from outside.
    fn tell_of_it(&self, ports: &SupervisorHandle, tasks: &mut Tasks) {
        if let Some(event) = &self.replaced {
            self.events.record(event.clone());
        }
        spawn_reporters(&self.events, &self.handle, ports, tasks);
        let own = promise(&self.config);
        if self.quiet > own {
            let lowering = heal::lower_promise(own, self.quiet, self.config.data_folder.clone());
            tasks.spawn("promise of earlier settings", Need::Finite, lowering);
        }
        let telling = damage::tell_mended(self.notes.clone(), self.events.clone(), self.handle.clone());
        tasks.spawn("mended files", Need::Finite, telling);
    }

    /// Has the health port answer about this node from now on.
    fn show_node(&self, ports: &SupervisorHandle, tasks: &mut Tasks) {
        let Some(health) = &self.health else { return };
        let state = ports.state();
        let life = health::Life {
            lease: self.lease.clone(),
            pulse: self.handle.pulse(),
            open: Arc::new(move || state.borrow().open),
        };
        health.show(health::Subject { status: self.handle.status(), life: Some(life) });
        let (mut problem, handle) = (health.problem(), self.handle.clone());
        tasks.spawn("problem of the health port", Need::Steady, async move {
            loop {
                let now = problem.borrow_and_update().clone();
                handle.warn(Warning::Health, now);
                if problem.changed().await.is_err() {
                    return;
                }
            }
        });
    }

    /// The service beside the Console, if there is to be one: it runs when this node is PRIMARY.
    fn service(&self, tasks: &mut Tasks) -> Option<(Service, Arc<MountedFolder>)> {
        let folder = self.config.service_folder.clone().filter(|_| !self.config.service_command.is_empty())?;
        let folder = Arc::new(MountedFolder::new(folder, self.handle.serving_folder()));
        let (service, runner) = service::of(&self.config, &self.identity.name, folder.clone(), self.guard.clone())?;
        tasks.spawn("service", Need::Steady, runner.run());
        Some((service, folder))
    }

    fn supervisor(&self, tls: &ConsoleTls, service: Option<&Service>) -> (Supervisor, SupervisorHandle) {
        let supervisor = SupervisorConfig {
            address: bind_address(&self.config),
            workload: Setup {
                ports: ConsolePorts {
                    https: self.config.management_port_https,
                    http: self.config.management_port_http,
                    defender: self.config.communication_port,
                },
                tls: tls.served(),
                defender_tls: tls.for_defenders(),
                defenders: self.config.defender_connections as usize,
                services: None,
                service: service.map(|service| (service.clone(), self.config.service_stop_limit)),
            },
            demotion_deadline: self.config.demotion_deadline,
        };
        let node = (self.handle.status(), self.handle.serving());
        Supervisor::new(supervisor, node, self.lease.clone(), self.guard.clone())
    }

    /// What the Console serves. Its own certificate follows the address of this host.
    fn console_tls(&self) -> Result<ConsoleTls> {
        let config = self.config.clone();
        let local_names = Box::new(move |address: &str| found::console_names(&config, address));
        let membership = self.handle.membership().borrow().clone();
        ConsoleTls::open(&self.config.data_folder, self.identity.node, &membership, local_names)
    }
}

/// How this process of the node ends.
fn ends(name: &str, exit: &Result<Exit>) -> Event {
    let (severity, why) = match exit {
        Ok(Exit::Stopped) => (Info, "stops as it was asked to".to_owned()),
        Ok(Exit::Restart(why)) => (Info, format!("begins again: {why}")),
        Ok(Exit::Fatal(why)) => (Critical, format!("ends itself: {why}")),
        Err(error) => (Critical, format!("cannot go on: {error:#}")),
    };
    Event::new(Kind::Role, severity, format!("{name} {why}")).field("ended", true)
}

/// Starts what tells the history, the status and the service manager how the node is.
fn spawn_reporters(recorder: &Recorder, handle: &Handle, ports: &SupervisorHandle, tasks: &mut Tasks) {
    let (opened, open) = watch::channel(None);
    tasks.spawn("history", Need::Steady, events::record_changes(recorder.clone(), handle.status(), open));
    tasks.spawn("problems of the ports", Need::Steady, report_problems(ports.clone(), handle.clone(), opened));
    // Without it the service manager would end this process.
    tasks.spawn("service manager", Need::Vital, service_manager(handle.status()));
}

/// Hands the role over and ends the loop, whose end `node` tells.
async fn stop_in_order(
    ports: &SupervisorHandle,
    handle: &Handle,
    node: &mut task::JoinHandle<std::thread::Result<Exit>>,
    limit: Duration,
) -> Exit {
    let orderly = async {
        ports.drain("this node stops").await;
        handle.hand_over(None).await;
        handle.stop();
        node.await
    };
    match tokio::time::timeout(limit, orderly).await {
        Ok(ended) => as_stopped(flatten(ended)),
        Err(_) => Exit::Fatal(format!("an orderly stop took longer than {} s", limit.as_secs())),
    }
}

/// A service has its own time to end.
fn stop_limit(config: &Config) -> Duration {
    let service = if config.service_command.is_empty() { Duration::ZERO } else { config.service_stop_limit };
    STOP_LIMIT + service
}

/// A process that was about to begin again when it was told to stop does stop.
fn as_stopped(exit: Exit) -> Exit {
    match exit {
        Exit::Restart(_) => Exit::Stopped,
        exit => exit,
    }
}

/// The port guard holds the HA port, which the next process wants to open.
async fn end_of_guard(guard: PortGuard) {
    let mut state = guard.state();
    drop(guard);
    // An error says that the thread that keeps the child has ended, and the child with it.
    let ended = async { while state.changed().await.is_ok() {} };
    if tokio::time::timeout(GUARD_LIMIT, ended).await.is_err() {
        warn!("the port guard process does not end");
    }
}

fn flatten(ended: Result<std::thread::Result<Exit>, task::JoinError>) -> Exit {
    match ended {
        Ok(Ok(exit)) => exit,
        Ok(Err(_)) | Err(_) => Exit::Fatal("the consensus loop panicked".to_owned()),
    }
}

/// Shows in the node's status why ports are not open, and tells when they are.
async fn report_problems(ports: SupervisorHandle, handle: Handle, opened: watch::Sender<Option<u64>>) {
    let mut state = ports.state();
    let (mut shown, mut was_open) = (None, false);
    while state.changed().await.is_ok() {
        let SupervisorState { problem, open, .. } = state.borrow_and_update().clone();
        if open && !std::mem::replace(&mut was_open, open) {
            opened.send_replace(Some(boottime()));
        }
        was_open = open;
        if problem != shown {
            handle.warn(Warning::Ports, problem.clone());
            shown = problem;
        }
    }
}
