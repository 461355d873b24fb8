//! `membership.json`. Entries of the raft log carry the whole membership, so the newest one in force is taken from
//! there if the file is damaged, missing or an older copy. If the raft log no longer has it, it is in a copy of the
//! file, or comes from the other members with the whole database. Must never act on a membership that is older than
//! that of the raft log.

use std::{collections::BTreeSet, io, path::Path};

use anyhow::{Context, Result, anyhow};
use tracing::{info, warn};

use super::{Notes, aside::set_aside};
use crate::{
    cluster::Membership,
    storage::{
        Identity,
        database::Database,
        is_full, is_rot,
        membership::{FILE, StoredMembership},
        raft_log::RaftLog,
    },
};

/// The membership in force at the index from which raft goes on: that of the file, or a newer one from the raft log. If
/// neither has it, the database is distrusted: both are then fetched from another member.
///
/// # Errors
/// When a newer program wrote the file, when it cannot be read or written now, or when the raft log cannot be read. The
/// start has to end.
pub fn membership(
    data: &Path,
    identity: &Identity,
    log: &RaftLog,
    database: &mut Database,
    notes: &mut Notes,
) -> Result<StoredMembership> {
    let path = data.join(FILE);
    let read = known_membership(data, identity, notes)?;
    let gone = read.is_none();
    let known = read.unwrap_or_else(|| StoredMembership { index: 1, membership: identity.membership.clone() });
    // Later entries come into force once a majority is known to have them.
    let in_force = database.applied().max(log.hard_state().commit).min(log.last_index());
    let state = format!("{} was {}", path.display(), if gone { "damaged or missing" } else { "an older copy" });
    if let Some(newer) = newest(log, known.index, in_force)? {
        // A crash before the file was written is not damage, nor is a full disk.
        let usual = !gone && newer.index > database.applied();
        match newer.write(data) {
            Err(error) if usual && is_full(&error) => return Ok(known), // its entry is applied again
            written => written.with_context(|| format!("write {}", path.display()))?,
        }
        if usual {
            info!(index = newer.index, "the membership is taken from the raft log");
        } else {
            notes.add(format!("{state}: it was rebuilt from the raft log, as of index {}", newer.index));
        }
        return Ok(newer);
    }
    let (conf, changed) = log.applied_conf();
    // The raft log knows who votes even after the entry that said so is gone.
    let same_voters =
        BTreeSet::from_iter(known.membership.voters()) == BTreeSet::from_iter(conf.voters.iter().copied());
    let older = known.index < changed && changed < log.first_index() && !same_voters;
    if !gone && !older {
        return Ok(known);
    }
    // The membership was never changed, so the identity has it. Write it, or it would be lost with the identity.
    if changed <= 1 {
        if let Err(error) = known.write(data) {
            warn!(%error, "only the identity has the membership: {} cannot be written", path.display());
        }
        return Ok(known);
    }
    if conf.voters == [identity.node] && conf.voters_outgoing.is_empty() {
        let first = "this node goes on with the membership with which it began: check members, names and webhooks";
        notes.add(format!("{state}, the raft log does not have it any more, and this is the only member: {first}"));
        return Ok(known);
    }
    let why = format!("{state}, and the raft log does not have the membership any more");
    notes.add(format!("{why}: it is fetched from another member, with the whole database"));
    if database.distrusted().is_none() {
        database.distrust(why);
    }
    Ok(known)
}

/// The membership in the file, or else in its copy; `None` if neither can be used. A damaged file is set aside.
///
/// # Errors
/// When a newer program wrote the file, or when it cannot be read, moved away or written again now. The start has to
/// end.
pub fn known_membership(data: &Path, identity: &Identity, notes: &mut Notes) -> Result<Option<StoredMembership>> {
    let path = data.join(FILE);
    let damage = match StoredMembership::read(data).and_then(|read| of_this_cluster(read, identity)) {
        Ok(Some(known)) => {
            keep_copy(data, &known);
            return Ok(Some(known));
        }
        Ok(None) => None,
        Err(error) if is_rot(&error) => Some(error),
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    if damage.is_some() {
        set_aside(data, FILE).with_context(|| format!("{} is damaged: move it away", path.display()))?;
    }
    let state =
        damage.as_ref().map_or_else(|| "is missing".to_owned(), |why| format!("is damaged ({why}) and was set aside"));
    let copy = StoredMembership::read_copy(data).and_then(|read| of_this_cluster(read, identity));
    if let Ok(Some(copy)) = copy {
        copy.write(data).with_context(|| format!("write {}", path.display()))?;
        notes.add(format!("{} {state}: it was rebuilt from its copy, as of index {}", path.display(), copy.index));
        return Ok(Some(copy));
    }
    if damage.is_some() {
        notes.add(format!("{} {state}", path.display()));
    }
    Ok(None)
}

/// Writes the copy, which an older program did not make.
fn keep_copy(data: &Path, known: &StoredMembership) {
    let copied = StoredMembership::read_copy(data).is_ok_and(|copy| copy.as_ref() == Some(known));
    if !copied && let Err(error) = known.write(data) {
        warn!(%error, "{} cannot be copied", data.join(FILE).display());
    }
}

fn of_this_cluster(read: Option<StoredMembership>, identity: &Identity) -> io::Result<Option<StoredMembership>> {
    match read.as_ref().map(|known| known.membership.cluster).filter(|cluster| *cluster != identity.cluster) {
        None => Ok(read),
        Some(other) => {
            let why = format!("it is of cluster {other}, and this is a member of {}", identity.cluster);
            Err(io::Error::new(io::ErrorKind::InvalidData, why))
        }
    }
}

/// The newest membership in the entries of the raft log after `after` and up to `last`.
fn newest(log: &RaftLog, after: u64, last: u64) -> Result<Option<StoredMembership>> {
    let first = log.first_index().max(after + 1);
    let mut newest = None;
    let found = log.entries_between(first, last, &mut |entry| {
        if !entry.context.is_empty() {
            newest = Some((entry.index, entry.context.to_vec()));
        }
        Ok(())
    });
    found.context("look for the membership in the raft log")?;
    let decode = |(index, bytes): (u64, Vec<u8>)| {
        let membership = Membership::decode(&bytes).map_err(|why| anyhow!("entry {index} of the raft log: {why}"))?;
        Ok(StoredMembership { index, membership })
    };
    newest.map(decode).transpose()
}
