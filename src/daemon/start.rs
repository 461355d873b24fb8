//! What a start finds in the data folder and makes of it: whose it is, the raft log, earlier promises, the node's settings.
//! Must never change what it cannot explain.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use raft::eraftpb::ConfState;
use tracing::{info, warn};
use twistlock_ha::{
    cluster::{ClusterId, FEATURE_LEVEL, Membership, PROGRAM_VERSION, Role, Timing, level},
    config::{Config, FirstState, Secret},
    found,
    health::{self, HealthPort, MetricsPage, Subject},
    node::{CheckpointPolicy, Lease, NodeConfig, Status},
    peer::LeaseTerms,
    recover,
    storage::{
        DataDir, Identity,
        configuration::Configuration,
        durable_write,
        raft_log::{Options, RaftLog, RealDisk},
    },
};

/// File in the data folder that says for how many milliseconds a voter's promise holds.
pub(super) const PROMISE: &str = "promise-ms";

/// The data folder, with an interrupted recovery completed before anything looks at whose it is.
pub(crate) fn open_data(config: &Config) -> Result<DataDir> {
    let data = DataDir::open(&config.data_folder)?;
    if let Some(done) = recover::finish_interrupted(data.path())? {
        info!(aside = %done.aside.display(), "an interrupted recovery is complete: this is a new cluster of one member");
    }
    Ok(data)
}

/// Opens the health port, if there is to be one: it tells from now on where this host stands.
pub(super) fn health_port(config: &Config) -> Result<Option<HealthPort>> {
    let Some(address) = config.health_address() else { return Ok(None) };
    let settings = health::Settings {
        address,
        optional: config.health_port == Config::default().health_port,
        allow: config.health_allow.clone(),
        certificates: config.data_folder.join("certificates"),
        metrics: metrics_page(config)?,
        console_port: config.management_port_https,
    };
    let nobody = Membership::founded(ClusterId(0), Vec::new());
    HealthPort::open(settings, starting(&config.member_name(), &nobody)).map(Some)
}

/// Has the health port say that this member starts: it has to read its raft log, and perhaps a whole database.
pub(super) fn show_start(health: &HealthPort, name: &str, membership: &Membership) {
    health.show(starting(name, membership));
}

fn starting(name: &str, membership: &Membership) -> Subject {
    let reason = "reads its raft log and its database".to_owned();
    Subject::still(Status::without_node(name.to_owned(), PROGRAM_VERSION, membership.public(), Role::Startup, reason))
}

/// What Prometheus reads.
pub(super) fn metrics_page(config: &Config) -> Result<MetricsPage> {
    MetricsPage::new(config.metrics_token.as_ref().map(Secret::reveal))
}

/// What a node becomes that is nothing yet. Later the role in the configuration means nothing any more.
pub(super) fn first_start(config: &Config, data: &DataDir) -> Result<Identity> {
    let folder = data.path().display();
    if !config.high_availability_enabled {
        bail!("{folder} is empty and HIGH_AVAILABILITY_ENABLED is false: set it to true to found or join a cluster");
    }
    match config.high_availability_state {
        FirstState::Primary => found::found(config, data).with_context(|| format!("found a cluster in {folder}")),
        FirstState::Secondary => bail!(
            "{folder} is empty and HIGH_AVAILABILITY_STATE is SECONDARY: run the join script of the cluster on this \
             host (the PRIMARY shows it: twistcli ha join-script, or Manage > System > High Availability)"
        ),
    }
}

pub(crate) fn lease_terms(config: &Config) -> LeaseTerms {
    LeaseTerms { lease_ms: config.lease.as_millis() as u32, promise_ms: promise(config).as_millis() as u32 }
}

/// A voter keeps its promise for one tick less than it counts: the first may come at once.
pub(super) fn promise(config: &Config) -> Duration {
    config.tick * (config.election_ticks - 1)
}

pub(super) fn open_log(config: &Config, data: &DataDir, identity: &Identity) -> Result<RaftLog> {
    let voters = identity.membership.voters().collect();
    let initial = ConfState { voters, ..ConfState::default() };
    let options = Options { segment_bytes: config.raft_log_segment_bytes as usize, ..Options::default() };
    let owner = (identity.cluster, identity.node);
    let log = RaftLog::open(&data.path().join("raft-log"), owner, initial, options, RealDisk)?;
    let recovered = log.recovered();
    // A node that forgot its log would forget whom it voted for, and could vote twice in one epoch.
    let marker = data.path().join("raft-log.created");
    if !recovered.created {
        info!(
            entries = recovered.entries,
            segments = recovered.segments,
            torn_bytes = recovered.torn_bytes,
            unproven_bytes = recovered.unproven_bytes,
            "raft log opened"
        );
    } else if marker.exists() {
        bail!(
            "the raft log in {} is gone, but this node has had one ({} says so): bring it back, or remove this member \
             from the cluster and join it anew",
            data.path().join("raft-log").display(),
            marker.display()
        );
    }
    if !marker.exists() {
        durable_write(&marker, b"").with_context(|| format!("write {}", marker.display()))?;
        info!("raft log created");
    }
    Ok(log)
}

/// How long this process must neither vote nor campaign: the longest promise that an earlier one of this node may have
/// given, which can be longer than ours if the timing was changed. Its own is noted for the next one.
pub(super) fn promised_earlier(own: Duration, path: &Path) -> Result<Duration> {
    let earlier = match std::fs::read_to_string(path) {
        Ok(text) => text.trim().parse().with_context(|| format!("{}: \"{text}\" is no number", path.display()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    let earlier = Duration::from_millis(earlier);
    if earlier < own {
        note_promise(own, path)?;
    }
    Ok(earlier.max(own))
}

pub(super) fn note_promise(promise: Duration, path: &Path) -> Result<()> {
    durable_write(path, promise.as_millis().to_string().as_bytes()).with_context(|| format!("write {}", path.display()))
}

/// Lowers the note when the longer promise of an earlier process has run out, and not before: this one may crash, too.
pub(super) async fn lower_promise(own: Duration, earlier: Duration, path: PathBuf) {
    tokio::time::sleep(earlier).await;
    if let Err(error) = note_promise(own, &path) {
        warn!("the next start will wait longer than it has to: {error:#}");
    }
}

/// Refuses to touch the data of a cluster that relies on what this program does not have.
pub(super) fn refuse_if_outdated(membership: &Membership) -> Result<()> {
    if membership.level > FEATURE_LEVEL {
        let needed = (membership.level_version.as_str(), membership.level);
        bail!("{}", level::outdated("this host", (PROGRAM_VERSION, FEATURE_LEVEL), needed));
    }
    Ok(())
}

pub(super) fn node_config(
    config: &Config,
    identity: &Identity,
    configuration: Configuration,
    quiet: Duration,
    lease: Lease,
) -> NodeConfig {
    NodeConfig {
        configuration,
        data: config.data_folder.clone(),
        node: identity.node,
        name: identity.name.clone(),
        timing: Timing {
            tick: config.tick.as_nanos() as u64,
            election_ticks: config.election_ticks as usize,
            lease: config.lease.as_nanos() as u64,
            quiet: quiet.as_nanos() as u64,
            ..Timing::default()
        },
        demotion_deadline: config.demotion_deadline,
        checkpoints: CheckpointPolicy {
            bytes: config.checkpoint_bytes,
            interval: config.checkpoint_interval,
            raft_log_limit: config.raft_log_limit,
            scrub: config.scrub_interval,
        },
        page_size: config.database_page_size,
        version: PROGRAM_VERSION.to_owned(),
        level: FEATURE_LEVEL,
        fast_takeover: config.fast_takeover,
        lease,
    }
}
