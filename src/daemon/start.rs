//! What a start finds in the data folder: whose it is, the raft log, earlier promises, the node's settings. Must never
//! change what it cannot explain.

use std::{
    net::{IpAddr, Ipv6Addr},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tracing::{info, warn};
use twistlock_ha::{
    cluster::{ClusterId, Membership, Role, Timing, feature_level, level, program_version, reach::Standing},
    config::{Config, FirstState, Secret},
    events::Event,
    found,
    heal::{self, Notes},
    health::{self, HealthPort, MetricsPage, Subject},
    node::{CheckpointPolicy, Lease, NodeConfig, Status},
    peer::LeaseTerms,
    recover,
    storage::{
        DataDir, Identity, database::Database, databases::Databases, membership::StoredMembership, raft_log::RaftLog,
        snapshot::Ready, transaction::CONSOLE_DATABASE,
    },
};

use super::{
    damage,
    memory::{self as mind, Mind, Opened},
};

/// Opens the data folder. Closes to others what they could use of it, moves away what should be a file and is none, and
/// completes an interrupted recovery before anything looks at whose folder it is.
pub(crate) fn open_data(config: &Config, notes: &mut Notes) -> Result<DataDir> {
    let data = heal::open(&config.data_folder)?;
    heal::prepare(data.path(), notes)?;
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
fn show_start(health: &HealthPort, name: &str, membership: &Membership) {
    health.show(starting(name, membership));
}

fn starting(name: &str, membership: &Membership) -> Subject {
    let reason = "reads its raft log and its database".to_owned();
    Subject::still(Status::without_node(name.to_owned(), program_version(), membership.public(), Role::Startup, reason))
}

/// What Prometheus reads.
pub(super) fn metrics_page(config: &Config) -> Result<MetricsPage> {
    MetricsPage::new(config.metrics_token.as_ref().map(Secret::reveal))
}

/// What a new node becomes. After that the role in the configuration means nothing.
pub(super) fn first_start(config: &Config, data: &DataDir) -> Result<Identity> {
    let folder = data.path().display();
    if config.clustered_db_enabled {
        // With an empty folder this host would have waited, and be a member by now.
        let what = found::remains(data).unwrap_or("nothing");
        bail!("{folder} has {what}, but no identity.json: bring it back, or set the folder aside to wait for a pool");
    }
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

/// Where all ports are opened.
pub(crate) fn bind_address(config: &Config) -> IpAddr {
    config.bind_address.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED))
}

pub(crate) fn lease_terms(config: &Config) -> LeaseTerms {
    LeaseTerms { lease_ms: config.lease.as_millis() as u32, promise_ms: promise(config).as_millis() as u32 }
}

/// A voter keeps its promise for one tick less than it counts: the first may come at once.
pub(super) fn promise(config: &Config) -> Duration {
    config.tick * (config.election_ticks - 1)
}

/// What the start found in the data folder.
pub(super) struct Found {
    pub stored: StoredMembership,
    pub log: RaftLog,
    pub databases: Databases,
    /// That another copy of the database was put in place.
    pub replaced: Option<Event>,
    /// See [`heal::promised_earlier`].
    pub quiet: Duration,
    pub mind: Mind,
    /// What this node says of its own memory.
    pub standing: Standing,
}

/// Opens what this node remembers: the raft log first, which the rest has to fit.
pub(super) fn open_memory(
    config: &Config,
    data: &DataDir,
    identity: &Identity,
    health: Option<&HealthPort>,
    notes: &mut Notes,
) -> Result<Found> {
    let snapshot = Ready::find(data.path()).context("look for a snapshot to be installed")?;
    let known = heal::known_membership(data.path(), identity, notes)?;
    let members = known.as_ref().map_or(&identity.membership, |known| &known.membership);
    refuse_if_outdated(members)?;
    if let Some(health) = health {
        show_start(health, &identity.name, members);
    }
    let mut snapshot = snapshot.filter(|snapshot| {
        let ours = snapshot.manifest().membership.cluster == identity.cluster;
        if !ours {
            warn!("a snapshot of another cluster waits in snapshot.ready of the data folder: it is not installed");
        }
        ours
    });
    let mut opened = mind::open(config, data, identity, &mut snapshot)?;
    let damage = damage::last(data.path());
    let replaced = snapshot.as_ref().map(|ready| damage::replaced(&identity.name, ready, damage.as_ref()));
    if let Some(snapshot) = snapshot {
        refuse_if_outdated(&snapshot.manifest().membership)?;
        opened.install(data, identity, &snapshot)?;
    }
    let standing = opened.standing();
    let Opened { mind, log, scratch, first, event, .. } = opened;
    let start = Instant::now();
    let mut database = match &scratch {
        Some(folder) => Database::open(folder, CONSOLE_DATABASE, log.last_index()).context("open an empty database")?,
        None => heal::database(data.path(), &log, notes)?,
    };
    info!(index = database.applied(), ms = start.elapsed().as_millis() as u64, "database opened at its checkpoint");
    let stored = match (&scratch, known) {
        (None, _) => heal::membership(data.path(), identity, &log, &mut database, notes)?,
        (Some(_), Some(known)) => known,
        (Some(_), None) => StoredMembership { index: 1, membership: identity.membership.clone() },
    };
    mind.forget_if_older(&stored);
    refuse_if_outdated(&stored.membership)?;
    let quiet = heal::promised_earlier(promise(config), data.path(), first, notes)?;
    let replaced = event.or(replaced);
    let around = scratch.as_deref().and_then(Path::parent).unwrap_or(data.path());
    let databases = Databases::with_service(database, heal::service(around, &log, notes)?);
    Ok(Found { stored, log, databases, replaced, quiet, mind, standing })
}

/// Refuses to touch the data of a cluster that relies on what this program does not have.
pub(super) fn refuse_if_outdated(membership: &Membership) -> Result<()> {
    if membership.shared.level > feature_level() {
        let needed = (membership.shared.level_version.as_str(), membership.shared.level);
        bail!("{}", level::outdated("this host", (program_version(), feature_level()), needed));
    }
    Ok(())
}

pub(super) fn node_config(
    config: &Config,
    identity: &Identity,
    stored: StoredMembership,
    quiet: Duration,
    lease: Lease,
    mind: Mind,
) -> NodeConfig {
    NodeConfig {
        stored,
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
        version: program_version().to_owned(),
        level: feature_level(),
        fast_takeover: config.fast_takeover,
        lease,
        forgotten: mind.forgotten,
        reach: mind.reach,
        memory: mind.others,
    }
}
