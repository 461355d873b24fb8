//! The daemon of a host that is not yet a member: serves its control socket and asks to join until it is a member. Runs
//! before the node's parts are built, and leaves a data folder from which they can be. Must never open a port of the
//! Console's.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use tokio::{
    sync::{mpsc, watch},
    task,
};
use tracing::{info, warn};
use twistlock_ha::{
    cluster::{ClusterId, Membership, Role, feature_level, program_version, reach::Standing},
    config::Config,
    console,
    control::{ControlSocket, NOT_JOINED},
    found,
    health::{HealthPort, Subject},
    join::{self, Host, Newcomer, Stage},
    node::{Status, SyncProgress},
    peer::{Edition, Memory, PeerIdentity, Roster},
    pki::NodeTls,
    snapshot::{self, Fetched},
    storage::{DataDir, DataDirError},
};

use crate::daemon::{Signals, begin_long_start, lease_terms};

/// How often systemd hears that all is well, at least: a small part of any time-out that makes sense.
const ALIVE: Duration = Duration::from_secs(1);

/// How the time before the node ended.
pub(crate) enum Outcome {
    /// The data folder is ready for a start: it is a member's, or nobody has asked to join.
    Ready,
    /// Asked to stop.
    Stopped,
}

/// Joins a cluster, if that is what this host is to do.
///
/// # Errors
/// When the data folder holds another node's data, the disk fails, or the control socket cannot be made.
pub(crate) fn join_first(
    config: &Config,
    data: &DataDir,
    signals: &Signals,
    health: Option<&HealthPort>,
) -> Result<Outcome> {
    match data.identity() {
        Ok(_) => {
            if let Err(error) = join::clear(data.path()) {
                warn!("the files of the join script are no longer needed, but cannot be removed: {error:#}");
            }
        }
        Err(DataDirError::NoIdentity { .. }) if join::wanted(data.path()) => {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .context("start the runtime")?;
            let outcome = runtime.block_on(joining(config, data, signals, health));
            // A question to the cluster may still be under way.
            runtime.shutdown_background();
            return outcome;
        }
        // Whoever builds the parts says what to do about it.
        Err(_) => {}
    }
    Ok(Outcome::Ready)
}

async fn joining(config: &Config, data: &DataDir, signals: &Signals, health: Option<&HealthPort>) -> Result<Outcome> {
    let host = host(config);
    let (progress, seen) = watch::channel(None);
    let (stage, shown) = watch::channel(Stage::Asking { name: host.name.clone(), problem: None });
    let socket = config.control_socket_path();
    let control = ControlSocket::bind(&socket).with_context(|| format!("bind {}", socket.display()))?;
    let applicant = Arc::new(Applicant { stage: shown.clone(), progress: seen, version: host.version.clone() });
    let (picture, shown_outside) = watch::channel(applicant.status());
    if let Some(health) = health {
        health.show(Subject { status: shown_outside, life: None });
    }
    let picturing = task::spawn(keep_picture(Arc::clone(&applicant), picture));
    let routes = console::applicant(move || applicant.status(), NOT_JOINED);
    let serving = task::spawn(control.serve(routes, std::future::pending()));
    let informing = task::spawn(service_manager(shown));
    let fetch = async |newcomer: Newcomer<'_>| fetch(config, data.path(), newcomer, &progress).await;
    let outcome = tokio::select! {
        joined = join::run(data, host, &stage, fetch) => joined.map(|_| Outcome::Ready),
        () = signals.asked_to_stop() => Ok(Outcome::Stopped),
    };
    // The socket must be gone before the node makes its own.
    serving.abort();
    let _ = serving.await;
    informing.abort();
    let _ = informing.await;
    picturing.abort();
    begin_long_start();
    outcome
}

/// What this host tells about itself.
pub(crate) fn host(config: &Config) -> Host {
    let name = config.member_name();
    let address = config.high_availability_address.clone().or_else(|| config.bind_address.map(|own| own.to_string()));
    let console_names = found::console_names(config, address.as_ref().unwrap_or(&name));
    let port = config.high_availability_port.unwrap_or(8086);
    Host { name, address, port, version: program_version().to_owned(), console_names }
}

/// Fetches the whole database from whoever is primary: the other members refuse.
async fn fetch(
    config: &Config,
    data: &Path,
    newcomer: Newcomer<'_>,
    progress: &watch::Sender<Option<SyncProgress>>,
) -> Result<()> {
    let tls = NodeTls::load(&data.join("certificates")).context("load the certificates of this node")?;
    // Index 0: whatever a member says about itself is newer.
    let edition = Edition { index: 0, membership: Arc::new(newcomer.membership.clone()) };
    let (_editions, editions) = watch::channel(edition);
    let (_settings, tls) = watch::channel(Arc::new(tls));
    // Nobody calls a host that does not listen.
    let ((snapshots, _), (keys, _), (questions, _)) = (mpsc::channel(1), mpsc::channel(1), mpsc::channel(1));
    let identity = PeerIdentity {
        me: newcomer.node,
        version: program_version().to_owned(),
        level: feature_level(),
        roster: Roster::new(editions),
        bind: config.bind_address,
        terms: lease_terms(config),
        tls,
        snapshots,
        keys,
        questions,
        standing: Standing::Unsaid,
        memory: Memory::default(),
    };
    let host = newcomer.console.rsplit_once(':').map_or(newcomer.console, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let mut members: Vec<_> =
        newcomer.membership.roster.members.iter().filter(|m| m.voter && m.id != newcomer.node).collect();
    members.sort_by_key(|member| member.address != host);
    let mut problems = Vec::new();
    for member in members {
        let report = |now| {
            progress.send_replace(Some(now));
        };
        match snapshot::fetch(&identity, member, data, None, report).await {
            Ok(Fetched { manifest, .. }) => {
                info!(from = member.name, bytes = manifest.bytes(), "the whole database has been fetched");
                return Ok(());
            }
            Err(error) => problems.push(format!("{}: {error}", member.name)),
        }
    }
    bail!("{}", problems.join("; "))
}

/// Keeps what the health port shows of this host.
async fn keep_picture(applicant: Arc<Applicant>, picture: watch::Sender<Arc<Status>>) {
    let (mut stage, mut progress) = (applicant.stage.clone(), applicant.progress.clone());
    loop {
        picture.send_replace(applicant.status());
        let changed = tokio::select! {
            changed = stage.changed() => changed,
            changed = progress.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

/// Tells systemd that the daemon is up although its node is not: nobody knows how long an administrator takes.
async fn service_manager(mut stage: watch::Receiver<Stage>) {
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    loop {
        let line = describe(&stage.borrow_and_update()).1;
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(&line), sd_notify::NotifyState::Watchdog]);
        if let Ok(Err(_)) = tokio::time::timeout(ALIVE, stage.changed()).await {
            return;
        }
    }
}

/// The role and the sentence that people see.
fn describe(stage: &Stage) -> (Role, String) {
    match stage {
        Stage::Asking { name, problem: None } => (Role::RequestJoin, format!("{name} asks to join the cluster")),
        Stage::Asking { name, problem: Some(problem) } => {
            (Role::RequestJoin, format!("{name} cannot ask to join: {problem}"))
        }
        Stage::Waiting { name, fingerprint, console } => (
            Role::RequestJoin,
            format!("{name} has asked {console} to join and waits for APPLY; fingerprint of its key {fingerprint}"),
        ),
        Stage::Refused { name, reason } => {
            (Role::Removed, format!("{name} may not join: {reason}; run a new join script on this host"))
        }
        Stage::Admitted { problem: None, .. } => {
            (Role::Startup2, "admitted; fetches the database from the primary".to_owned())
        }
        Stage::Admitted { problem: Some(problem), .. } => {
            (Role::Startup2, format!("admitted, but the database could not be fetched: {problem}"))
        }
    }
}

/// What the local administrator can do meanwhile: look.
struct Applicant {
    stage: watch::Receiver<Stage>,
    progress: watch::Receiver<Option<SyncProgress>>,
    version: String,
}

impl Applicant {
    fn status(&self) -> Arc<Status> {
        let stage = self.stage.borrow().clone();
        let (role, mut reason) = describe(&stage);
        if let (Stage::Admitted { problem: None, .. }, Some(SyncProgress { bytes, total, .. })) =
            (&stage, *self.progress.borrow())
        {
            reason.push_str(&format!(": {} of {} MiB", bytes >> 20, total.div_ceil(1 << 20)));
        }
        let (node, name, membership) = match &stage {
            Stage::Asking { name, .. } | Stage::Waiting { name, .. } | Stage::Refused { name, .. } => {
                (0, name.clone(), Membership::founded(ClusterId(0), Vec::new()))
            }
            Stage::Admitted { node, membership, .. } => {
                let name = membership.get(*node).map(|member| member.name.clone()).unwrap_or_default();
                (*node, name, (**membership).clone())
            }
        };
        let warnings = match &stage {
            Stage::Asking { problem: Some(_), .. }
            | Stage::Refused { .. }
            | Stage::Admitted { problem: Some(_), .. } => {
                vec![reason.clone()]
            }
            _ => Vec::new(),
        };
        let status = Status::without_node(name, &self.version, membership, role, reason);
        Arc::new(Status { node, warnings, ..status })
    }
}
