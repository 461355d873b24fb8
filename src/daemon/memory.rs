//! Whether this node remembers all that it has promised: what its data folder says of that at a start, and how a node that
//! forgot begins again. Must never let a raft log count that has less than anything proves it had.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use raft::eraftpb::{ConfState, HardState};
use tracing::{error, info, warn};
use twistlock_ha::{
    cluster::{
        command::CONSOLE_DATABASE,
        reach::{Claim, Reach, Standing},
    },
    config::Config,
    events::{Event, Kind, Scope, Severity},
    peer,
    storage::{
        DataDir, Identity,
        checkpoint::Record,
        configuration::Configuration,
        make_private_dir,
        memory::{self, Memory},
        raft_log::{LogError, MIN_SEGMENT, Options, RaftLog, RealDisk},
        snapshot::Ready,
    },
    telemetry,
};

use super::start::open_log;

/// What a node knows of its own memory and of the others'.
pub(super) struct Mind {
    /// Why it takes part in nothing; none if it is whole.
    pub forgotten: Option<String>,
    pub reach: Reach,
    pub others: peer::Memory,
    /// Raft index of the membership that was in force when the others were remembered.
    edition: u64,
}

impl Mind {
    /// Follows the membership with which the node starts. What changed since the others were remembered is not known.
    pub fn follow(&self, configuration: &Configuration) {
        if configuration.index > self.edition {
            self.others.clear();
        }
    }
}

/// What a node starts with.
pub(super) struct Opened {
    pub mind: Mind,
    pub log: RaftLog,
    /// Where its database is, if it is only there to watch the others.
    pub scratch: Option<PathBuf>,
    /// No earlier process of this node can have promised anything.
    pub first: bool,
    /// It begins again with the snapshot: see [`Opened::install`].
    again: bool,
    /// What somebody is to be notified of.
    pub event: Option<Event>,
}

impl Opened {
    /// Puts the snapshot in its place.
    ///
    /// # Errors
    /// What the next start tries again.
    pub fn install(&mut self, data: &DataDir, identity: &Identity, snapshot: &Ready) -> Result<()> {
        snapshot.install(&self.log, identity.node).context("install the snapshot")?;
        if self.again {
            self.event = Some(begin_again(data, identity, &self.log, snapshot.manifest().epoch)?);
        }
        Ok(())
    }

    /// What it says to the others.
    pub fn standing(&self) -> Standing {
        match self.mind.forgotten {
            Some(_) => Standing::Forgotten,
            None => Standing::Whole(Claim::of(&self.log.hard_state(), self.log.last_index())),
        }
    }
}

/// Opens the raft log if it is whole. `snapshot` waits to be installed. A node that forgot gets an empty log and an empty
/// database of its own to watch the others with, unless the snapshot with which it begins again is there.
///
/// # Errors
/// When files cannot be read or written.
pub(super) fn open(
    config: &Config,
    data: &DataDir,
    identity: &Identity,
    snapshot: &mut Option<Ready>,
) -> Result<Opened> {
    let kept = Memory::read(data.path(), identity.cluster).unwrap_or_else(|why| {
        warn!("{why}");
        Memory::new(identity.cluster)
    });
    let forgot = memory::forgotten(data.path(), identity.cluster).context("look whether this node forgot")?;
    let whole = match (forgot, &snapshot) {
        (Some(reason), None) => Err(reason),
        (Some(reason), Some(ready)) if ready.manifest().votes(identity.node) => Err(reason),
        (Some(_), Some(_)) => begin_log_again(config, data, identity).map(Ok)?,
        (None, _) => open_whole(config, data, identity, &kept)?,
    };
    metrics::gauge!(telemetry::MEMORY_LOST).set(f64::from(u8::from(whole.is_err())));
    let (path, others, edition) = (data.path(), peer::Memory::new(kept.others), kept.edition);
    match whole {
        Ok((log, again)) => {
            let first = log.recovered().created && !again;
            let mind =
                Mind { forgotten: None, reach: if again { Reach::default() } else { kept.own }, others, edition };
            Ok(Opened { mind, log, scratch: None, first, again, event: None })
        }
        Err(reason) => {
            *snapshot = None;
            let log = scratch_log(data, identity)?;
            error!(reason, "this node lost some of its durable memory: it takes part in nothing until it is whole");
            let sentence = format!("{} lost some of its durable memory: {reason}", identity.name);
            let event = Event::new(Kind::Damage, Severity::Critical, sentence).scope(Scope::Node);
            let mind = Mind { forgotten: Some(reason), reach: kept.own, others, edition };
            // What it remembers of the others may be as old: it accuses nobody.
            mind.others.clear();
            let scratch = path.join(memory::SCRATCH).join("database");
            make_private_dir(&scratch).with_context(|| format!("create {}", scratch.display()))?;
            let scratch = Some(scratch);
            Ok(Opened { mind, log, scratch, first: false, again: false, event: Some(event) })
        }
    }
}

type Whole = Result<(RaftLog, bool), String>;

/// Opens the raft log, and compares it with what else is in the data folder. If it is not whole, that is noted, and the reason
/// returned.
fn open_whole(config: &Config, data: &DataDir, identity: &Identity, kept: &Memory) -> Result<Whole> {
    let path = data.path();
    let new = memory::may_begin_log(path);
    let found = match open_log(config, data, identity) {
        Ok(log) if log.recovered().created && !new => {
            Err(format!("the raft log in {} is gone", path.join(memory::LOG).display()))
        }
        Ok(log) => shortfall(data, &log, kept).map_or(Ok(log), Err),
        Err(error @ (LogError::Damaged { .. } | LogError::Foreign { .. })) => Err(error.to_string()),
        Err(error) => return Err(error.into()),
    };
    match found {
        Ok(log) => {
            memory::note_log(path).context("note that there is a raft log")?;
            tell(&log);
            Ok(Ok((log, false)))
        }
        Err(reason) => {
            memory::note_forgotten(path, identity.cluster, &reason).context("note that this node forgot")?;
            Ok(Err(reason))
        }
    }
}

/// What the rest of the data folder proves the raft log to lack.
fn shortfall(data: &DataDir, log: &RaftLog, kept: &Memory) -> Option<String> {
    let last = log.last_index();
    let record = data.path().join("database/console.checkpoint");
    // One that cannot be read proves nothing; whoever opens the database mends it.
    let database = Record::read(&record, CONSOLE_DATABASE).map_or(0, |record| record.index);
    if database > last {
        return Some(format!("its database has index {database}, and its raft log ends at index {last}"));
    }
    kept.own.missing(&Claim::of(&log.hard_state(), last))
}

fn tell(log: &RaftLog) {
    let recovered = log.recovered();
    if recovered.created {
        info!("raft log created");
    } else {
        info!(
            entries = recovered.entries,
            segments = recovered.segments,
            torn_bytes = recovered.torn_bytes,
            unproven_bytes = recovered.unproven_bytes,
            "raft log opened"
        );
    }
}

/// Sets the raft log aside and begins a new one. The snapshot says where. May be done again.
fn begin_log_again(config: &Config, data: &DataDir, identity: &Identity) -> Result<(RaftLog, bool)> {
    let aside = memory::set_log_aside(data.path()).context("set the raft log aside")?;
    if let Some(aside) = aside {
        warn!(aside = %aside.display(), "the raft log that was not whole is kept there; delete it when nobody needs it");
    }
    let log = open_log(config, data, identity)?;
    memory::note_log(data.path()).context("note that there is a raft log")?;
    Ok((log, true))
}

/// The snapshot is in its place: this node is a member again that has no vote yet.
///
/// # Errors
/// Those of the file system; then it forgot, and fetches another snapshot.
fn begin_again(data: &DataDir, identity: &Identity, log: &RaftLog, epoch: u64) -> Result<Event> {
    // Nobody gets its vote in the epoch in which its vote was taken: in that it may have voted before.
    let hard = log.hard_state();
    let hard = HardState { term: hard.term.max(epoch), vote: identity.node, ..hard };
    log.append(&[], Some(&hard)).and_then(|pending| pending.sync()).context("begin the raft log")?;
    memory::begun_again(data.path(), &Memory::new(identity.cluster)).context("note that this node has begun again")?;
    let index = log.last_index();
    info!(index, "this node begins again behind the snapshot; it gets its vote back when it has caught up");
    telemetry::note_now(telemetry::MEMORY_RESTORED);
    let sentence = format!(
        "{} has begun again at index {index} after it lost some of its durable memory; it gets its vote back when it has caught \
         up. Its old raft log is kept in {} of its data folder",
        identity.name,
        memory::ASIDE
    );
    Ok(Event::new(Kind::Damage, Severity::Warning, sentence).scope(Scope::Node))
}

/// An empty log, and a place for an empty database, for a node that only watches.
fn scratch_log(data: &DataDir, identity: &Identity) -> Result<RaftLog> {
    let scratch = data.path().join(memory::SCRATCH);
    if scratch.exists() {
        fs::remove_dir_all(&scratch).with_context(|| format!("delete {}", scratch.display()))?;
    }
    make_private_dir(&scratch).with_context(|| format!("create {}", scratch.display()))?;
    let owner = (identity.cluster, identity.node);
    let voters = identity.membership.voters().collect();
    let initial = ConfState { voters, ..ConfState::default() };
    let options = Options { segment_bytes: MIN_SEGMENT, helper: false, ..Options::default() };
    Ok(RaftLog::open(&scratch.join(memory::LOG), owner, initial, options, RealDisk)?)
}
