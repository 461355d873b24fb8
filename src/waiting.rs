//! The daemon of a host that waits for a pool: with `CLUSTERED_DB_ENABLED=true` and an empty data folder it founds
//! nothing by itself. A sign-up makes it the seed of a new pool; the PRIMARY of a pool takes it in. Runs before the
//! node's parts are built. Must never do both, nor answer as a PRIMARY would.

mod front;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    task::{self, JoinHandle},
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};
use twistlock_ha::{
    clock::unix_time,
    cluster::{ClusterId, Membership, Role, program_version, roster::place},
    config::Config,
    console::{self, Seed, SignUp},
    control::{ControlSocket, NOT_IN_A_POOL},
    events::{Event, Kind, Recorder, Severity},
    found,
    health::{HealthPort, Subject},
    join::{self, Candidate, JoinFile},
    meeting::{Desk, MeetingError, Offer, Secret, Waiting},
    node::{self, Status},
    peer, pki,
    storage::{DataDir, DataDirError},
};

use crate::{
    daemon::{Signals, begin_long_start, bind_address},
    joining::{self, Outcome},
};
use front::Front;

/// Callers that are talked to at once.
const CALLERS: usize = 8;
/// How often systemd hears that all is well.
const ALIVE: Duration = Duration::from_secs(1);
/// How long answers that are on their way may take once it is decided what becomes of this host.
const LAST_ANSWERS: Duration = Duration::from_secs(2);
/// Pause after an error of accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Waits for a pool, if that is what this host is to do.
///
/// # Errors
/// When a key, the secret or a port cannot be used, or the disk fails.
pub(crate) fn wait_first(
    config: &Config,
    data: &DataDir,
    signals: &Signals,
    health: Option<&HealthPort>,
) -> Result<Outcome> {
    let unused = matches!(data.identity(), Err(DataDirError::NoIdentity { .. })) && found::remains(data).is_none();
    if !config.clustered_db_enabled || !unused || join::wanted(data.path()) {
        return Ok(Outcome::Ready);
    }
    // Nobody was told that it had succeeded.
    Seed::forget(data.path())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    let outcome = runtime.block_on(wait(config, data, signals, health));
    runtime.shutdown_background();
    outcome
}

async fn wait(config: &Config, data: &DataDir, signals: &Signals, health: Option<&HealthPort>) -> Result<Outcome> {
    let candidate = Candidate::prepare(&data.path().join("certificates"), joining::host(config))?;
    let secret = config.clustered_db_secret_file.as_deref().map(Secret::read);
    let secret = secret.transpose().map_err(anyhow::Error::msg)?;
    let (desk, key) = (Desk::default(), candidate.key().to_owned());
    let status = Arc::new(picture(config, &candidate, secret.is_some()));
    let host = Waiting::new(candidate, secret, desk.clone()).context("use the key of this host")?;
    let events = Recorder::start(&status.name, data.path()).context("start the events")?;
    let socket = config.control_socket_path();
    let control = ControlSocket::bind(&socket).with_context(|| format!("bind {}", socket.display()))?;
    let address = SocketAddr::new(bind_address(config), config.high_availability_port.unwrap_or(8086));
    let listener = peer::listen(address).and_then(TcpListener::from_std);
    let listener = listener.with_context(|| format!("listen for a pool on {address}"))?;
    let (sign_ups, signed_up) = mpsc::channel(1);
    let names = found::console_names(config, &status.name);
    let front = Front::open(config, (key.as_str(), names.as_slice()), console::waiting(sign_ups))?;

    let shown = Arc::clone(&status);
    let routes = console::applicant(move || Arc::clone(&shown), NOT_IN_A_POOL);
    let serving = task::spawn(control.serve(routes, std::future::pending()));
    if let Some(health) = health {
        health.show(Subject::still((*status).clone()));
    }
    let informing = task::spawn(service_manager(status.reason.clone()));
    let (closing, closed) = watch::channel(false);
    let (adopted, adoption) = mpsc::channel(1);
    let reception =
        Reception { host, data: data.path().to_owned(), events: events.clone(), adopted, closed: closed.clone() };
    let mut tasks = vec![task::spawn(Arc::new(reception).receive(listener))];
    tasks.extend(front.map(|front| task::spawn(front.serve(closed))));
    say_that_it_waits(&status, &events);

    let outcome = decide(config, data, (signals, desk), (signed_up, adoption), &events).await;
    closing.send_replace(true);
    // What is left of them would keep ports that the node needs.
    for task in tasks {
        end(task).await;
    }
    serving.abort();
    let _ = serving.await;
    informing.abort();
    events.flush();
    begin_long_start();
    outcome
}

/// Ends a task that was told to end.
async fn end(task: JoinHandle<()>) {
    let stop = task.abort_handle();
    if timeout(LAST_ANSWERS, task).await.is_err() {
        stop.abort();
    }
}

/// Returns when it is decided what becomes of this host.
async fn decide(
    config: &Config,
    data: &DataDir,
    (signals, desk): (&Signals, Desk),
    (mut signed_up, mut adoption): (mpsc::Receiver<SignUp>, mpsc::Receiver<Offer>),
    events: &Recorder,
) -> Result<Outcome> {
    let mut front_is_open = true;
    loop {
        tokio::select! {
            biased;
            Some(offer) = adoption.recv() => {
                let Offer { cluster, by, authority, .. } = offer;
                let authority = pki::certificate_der(&authority).map(|der| pki::fingerprint(&der)).unwrap_or_default();
                info!(%cluster, by, authority, "a pool has taken this host in: it joins");
                let text = format!("{by} has taken this host into pool {cluster}");
                events.record(Event::new(Kind::Membership, Severity::Info, text).field("authority", authority));
                return Ok(Outcome::Ready);
            }
            sign_up = signed_up.recv(), if front_is_open => {
                front_is_open = sign_up.is_some();
                if let Some(sign_up) = sign_up
                    && found_pool(config, data, &desk, sign_up)?
                {
                    let text = "a sign-up has made this host the seed of a new pool";
                    events.record(Event::new(Kind::Membership, Severity::Info, text));
                    return Ok(Outcome::Ready);
                }
            }
            () = signals.asked_to_stop() => return Ok(Outcome::Stopped),
        }
    }
}

/// Founds a pool with whoever has signed up. False if that was refused.
fn found_pool(config: &Config, data: &DataDir, desk: &Desk, SignUp { seed, answer }: SignUp) -> Result<bool> {
    // Whoever has signed up may be gone: what was done is done all the same.
    let tell = |said| drop(answer.send(said));
    let Some(mut decided) = desk.take() else {
        tell(Err("this host is being added to a pool just now: look at its status".to_owned()));
        return Ok(false);
    };
    if let Err(error) = found::address(config) {
        tell(Err(format!("{error:#}")));
        return Ok(false);
    }
    let founded = seed.save(data.path()).and_then(|()| found::found_pool(config, data));
    match founded {
        Ok(_) => {
            *decided = true;
            tell(Ok(()));
            Ok(true)
        }
        Err(error) => {
            tell(Err(format!("the pool cannot be founded: {error:#}")));
            // Its keys may have been replaced: the next start waits with those that are there then.
            Err(error.context("found a pool"))
        }
    }
}

/// Where callers come in.
struct Reception {
    host: Waiting,
    data: PathBuf,
    events: Recorder,
    adopted: mpsc::Sender<Offer>,
    closed: watch::Receiver<bool>,
}

impl Reception {
    async fn receive(self: Arc<Self>, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(CALLERS));
        let mut closed = self.closed.clone();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = closed.wait_for(|closed| *closed) => return,
            };
            match accepted {
                Ok((stream, from)) => {
                    // Whoever finds no place is turned away at once, and may come again.
                    let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
                    let reception = Arc::clone(&self);
                    task::spawn(async move {
                        reception.talk(stream, from.ip().to_canonical()).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    warn!("cannot accept a caller: {error}");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn talk(&self, stream: TcpStream, from: IpAddr) {
        // Small words leave at once. It fails only if the caller is gone.
        let _ = stream.set_nodelay(true);
        let keep =
            |file: &JoinFile, id: &str| Candidate::adopted(&self.data, file, id).map_err(|error| format!("{error:#}"));
        match self.host.receive(stream, from, keep).await {
            // The other end is there for as long as this host waits.
            Ok(Some(offer)) => drop(self.adopted.send(offer).await),
            Ok(None) => info!(%from, "a pool has looked at this host, and was told what it is"),
            // Whoever only knocks at ports.
            Err(MeetingError::Unreachable(why)) => debug!(%from, why, "a caller is gone"),
            Err(error) => {
                warn!(%from, "a caller was refused: {error}");
                let event = Event::new(Kind::Audit, Severity::Warning, format!("a caller was refused: {error}"));
                self.events.record(event.field("from", from.to_string()));
            }
        }
    }
}

/// What this host shows.
fn picture(config: &Config, candidate: &Candidate, secret: bool) -> Status {
    let name = candidate.name().to_owned();
    let address = found::address(config).unwrap_or_else(|_| name.clone());
    let port = config.high_availability_port.unwrap_or(8086);
    let console = config.management_port_https.map(|port| format!("https://{}/", place(&address, port)));
    let waiting = node::Waiting {
        fingerprint: candidate.fingerprint().to_owned(),
        since: unix_time(),
        secret,
        address: place(&address, port),
        console,
    };
    let reason = format!("{name} waits for a pool; fingerprint of its key {}", waiting.fingerprint);
    let nobody = Membership::founded(ClusterId(0), Vec::new());
    let status = Status::without_node(name, program_version(), nobody, Role::Waiting, reason);
    Status { waiting: Some(waiting), ..status }
}

fn say_that_it_waits(status: &Status, events: &Recorder) {
    let Some(node::Waiting { fingerprint, address, console, secret, .. }) = &status.waiting else { return };
    info!(
        fingerprint,
        address,
        console = console.as_deref().unwrap_or("none"),
        secret,
        "WAITING: sign up at the Console of this host at once to make it the first member of a pool, or have a pool add it"
    );
    let text = format!("{} waits for a pool", status.name);
    events.record(Event::new(Kind::Membership, Severity::Info, text).field("fingerprint", fingerprint.as_str()));
}

/// Tells systemd that the daemon is up although its node is not: nobody knows how long an administrator takes.
async fn service_manager(line: String) {
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    loop {
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(&line), sd_notify::NotifyState::Watchdog]);
        sleep(ALIVE).await;
    }
}
