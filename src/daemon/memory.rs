//! Whether this node remembers all that it has promised: what its data folder says of that at a start, and how a node
//! that forgot begins again. Must never accept a raft log that has less than anything proves it had.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use raft::eraftpb::{ConfState, HardState};
use tracing::{error, info, warn};
use twistlock_ha::{
    cluster::reach::{Claim, Reach, Standing},
    config::Config,
    events::{Event, Kind, Scope, Severity},
    peer,
    storage::{
        DataDir, Identity,
        checkpoint::Record,
        make_private_dir,
        membership::StoredMembership,
        memory::{self, Memory},
        raft_log::{LogError, MIN_SEGMENT, Options, RaftLog, RealDisk},
        snapshot::Ready,
        transaction::CONSOLE_DATABASE,
    },
    telemetry,
};

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
    /// Forgets the others if the membership changed after they were remembered: what they did since is not known.
    pub fn forget_if_older(&self, stored: &StoredMembership) {
        if stored.index > self.edition {
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

/// Opens the raft log if it is whole. `snapshot` waits to be installed. A node that forgot gets an empty log and an
/// empty database of its own to watch the others with, unless the snapshot with which it begins again is there.
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
    let forgot = memory::forgotten(data.path(), identity.cluster).context("check whether this node forgot")?;
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

/// Opens the raft log, and compares it with what else is in the data folder. If it is not whole, that is noted before
/// anything is created, and the reason returned.
fn open_whole(config: &Config, data: &DataDir, identity: &Identity, kept: &Memory) -> Result<Whole> {
    let path = data.path();
    let found = match open_log(config, data, identity, memory::may_begin_log(path)) {
        Ok(log) => shortfall(data, &log, kept).map_or(Ok(log), Err),
        Err(error @ (LogError::Gone { .. } | LogError::Damaged { .. } | LogError::Foreign { .. })) => {
            Err(error.to_string())
        }
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

/// What the raft log lacks, as the rest of the data folder proves.
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

/// Makes room for a new raft log and begins it. The snapshot says where. May be done again.
fn begin_log_again(config: &Config, data: &DataDir, identity: &Identity) -> Result<(RaftLog, bool)> {
    let aside = memory::make_room_for_log(data.path(), identity.cluster).context("set the raft log aside")?;
    if let Some(aside) = aside {
        warn!(aside = %aside.display(), "the raft log that was not whole is kept there; delete it when nobody needs it");
    }
    let log = open_log(config, data, identity, true)?;
    memory::note_log(data.path()).context("note that there is a raft log")?;
    Ok((log, true))
}

/// Begins again, once the snapshot is in its place: this node is a member that has no vote yet.
///
/// # Errors
/// When the disk fails or is full. This node is still one that forgot then, and fetches another snapshot.
fn begin_again(data: &DataDir, identity: &Identity, log: &RaftLog, epoch: u64) -> Result<Event> {
    // A member never gets its vote back in the epoch in which it lost it: it may have voted in that epoch before.
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

/// Opens the raft log. A missing one is created only if the caller says so.
fn open_log(config: &Config, data: &DataDir, identity: &Identity, create: bool) -> Result<RaftLog, LogError> {
    let voters = identity.membership.voters().collect();
    let initial = ConfState { voters, ..ConfState::default() };
    let options = Options { segment_bytes: config.raft_log_segment_bytes as usize, create, ..Options::default() };
    let owner = (identity.cluster, identity.node);
    RaftLog::open(&data.path().join(memory::LOG), owner, initial, options, RealDisk)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, path::Path};

    use raft::eraftpb::Entry;
    use twistlock_ha::{found, heal};

    use super::*;

    const LAST: u64 = 5;

    fn config(data: &Path) -> Config {
        Config {
            data_folder: data.to_owned(),
            bind_address: Some("127.0.0.1".parse().unwrap()),
            high_availability_name: Some("first".to_owned()),
            raft_log_segment_bytes: MIN_SEGMENT as u64,
            ..Config::default()
        }
    }

    /// A member with entries in its raft log, and nothing else that tells of them.
    fn member(folder: &Path) -> (Config, DataDir, Identity) {
        let (config, data) = (config(folder), DataDir::open(folder).unwrap());
        let identity = found::found(&config, &data).unwrap();
        let (log, _) = start(&config, &data, &identity).unwrap().unwrap();
        assert!(log.recovered().created);
        let entries: Vec<_> = (2..=LAST).map(|index| Entry { index, term: 1, ..Entry::default() }).collect();
        log.append(&entries, None).unwrap().sync().unwrap();
        (config, data, identity)
    }

    fn start(config: &Config, data: &DataDir, identity: &Identity) -> Result<Whole> {
        open_whole(config, data, identity, &Memory::new(identity.cluster))
    }

    fn blank_first_record(log: &Path) {
        let segment = fs::read_dir(log).unwrap().map(|entry| entry.unwrap().path());
        let mut segments: Vec<_> = segment.filter(|path| path.to_string_lossy().contains("segment-")).collect();
        segments.sort();
        let mut bytes = fs::read(&segments[0]).unwrap();
        bytes[4096..].fill(0);
        fs::write(&segments[0], bytes).unwrap();
        segments[1..].iter().for_each(|path| fs::remove_file(path).unwrap());
    }

    #[test]
    fn a_start_that_dies_while_it_notes_a_loss_hides_nothing() {
        type Harm = fn(&Path);
        let harms: [(&str, Harm); 5] = [
            ("removed", |log| fs::remove_dir_all(log).unwrap()),
            ("emptied", |log| {
                fs::remove_dir_all(log).unwrap();
                fs::create_dir(log).unwrap();
            }),
            ("a link that leads nowhere", |log| {
                fs::remove_dir_all(log).unwrap();
                symlink("/nowhere/raft-log", log).unwrap();
            }),
            ("a file", |log| {
                fs::remove_dir_all(log).unwrap();
                fs::write(log, "").unwrap();
            }),
            ("without its first record", blank_first_record),
        ];
        for (what, harm) in harms {
            let folder = tempfile::tempdir().unwrap();
            let (config, data, identity) = member(folder.path());
            harm(&folder.path().join(memory::LOG));
            // The note cannot be written: a folder is in its place.
            let note = folder.path().join(memory::FORGOTTEN);
            fs::create_dir_all(note.join("inside")).unwrap();
            assert!(start(&config, &data, &identity).is_err(), "{what}: the loss is not noted");
            fs::remove_dir_all(&note).unwrap();
            let reason = start(&config, &data, &identity).unwrap().err();
            assert!(
                reason.is_some_and(|reason| reason.contains("is gone")),
                "{what}: the next start counts itself whole"
            );
            for round in 0..2 {
                let (log, again) = begin_log_again(&config, &data, &identity).unwrap();
                assert!(log.recovered().created && again, "{what}, attempt {round} to begin again");
            }
        }
    }

    #[test]
    fn attempts_to_begin_again_keep_the_raft_log_that_was_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let (config, data, identity) = member(folder.path());
        memory::note_forgotten(folder.path(), identity.cluster, "a test says so").unwrap();
        for _ in 0..5 {
            // The snapshot is not installed: the process dies, or the disk is full.
            let (log, _) = begin_log_again(&config, &data, &identity).unwrap();
            assert!(log.recovered().created);
        }
        let aside = fs::read_dir(folder.path().join(memory::ASIDE)).unwrap();
        let kept: Vec<_> = aside.map(|entry| entry.unwrap().path()).collect();
        let options = Options { segment_bytes: MIN_SEGMENT, helper: false, ..Options::default() };
        let last = |path: &PathBuf| {
            let owner = (identity.cluster, identity.node);
            RaftLog::open(path, owner, ConfState::default(), options, RealDisk).unwrap().last_index()
        };
        assert_eq!(kept.iter().map(last).collect::<Vec<_>>(), [LAST]);
    }

    #[test]
    fn an_identity_that_is_made_anew_permits_no_new_raft_log() {
        for left_over in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let (config, data, identity) = member(folder.path());
            StoredMembership { index: 1, membership: identity.membership.clone() }.write(folder.path()).unwrap();
            if left_over {
                memory::permit_new_log(folder.path()).unwrap();
            }
            fs::remove_file(folder.path().join("identity.json")).unwrap();
            fs::remove_dir_all(folder.path().join(memory::LOG)).unwrap();
            let rebuilt = heal::identity(&data, &mut heal::Notes::default()).unwrap().unwrap();
            assert_eq!(rebuilt, identity);
            let opened = open(&config, &data, &identity, &mut None).unwrap();
            assert!(opened.mind.forgotten.is_some() && !opened.first, "it counts as a new member");
        }
    }
}
