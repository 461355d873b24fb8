//! What a node says about itself, and its bytes. Must never renumber a role.

use super::{
    CodecError::{self, Malformed},
    MAX_VERSION,
    bytes::{Reader, Writer},
    kind,
};
use crate::cluster::{
    Role,
    reach::Reach,
    trust::{Holdings, KeyId},
};

/// What a node says about itself to the others. It is for status displays; the only decisions that rest on it are those
/// of the primary to go on with what all members have: the feature level, and what they hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeReport {
    pub state: Role,
    pub epoch: u64,
    pub applied: u64,
    pub committed: u64,
    /// Milliseconds of the lease that remain; only from a primary.
    pub lease_ms: Option<u64>,
    /// Its disk is full: it should not become primary.
    pub full: bool,
    pub version: String,
    /// None from a program of feature level 1, and for one.
    pub more: Option<ReportExtension>,
}

/// What reports say since feature level 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportExtension {
    /// The feature level of the program.
    pub level: u32,
    /// Bytes that are free for its data; none from a program that does not tell, and from one that cannot.
    pub free: Option<u64>,
    /// What the node has on its disk.
    pub holds: Holdings,
    /// How its disk does; none without `free`, and from a program that does not tell.
    pub disk: Option<Condition>,
    /// What it must remember; none from a program that does not tell, and without `disk`.
    pub memory: Option<Remembers>,
}

/// What a node says of its durable memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Remembers {
    /// It lost some of it, and takes part in nothing.
    pub forgotten: bool,
    pub reach: Reach,
}

/// How the disk of a node does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Condition {
    #[default]
    Good,
    Slow,
    /// It fails, or does not answer: the node should not become primary.
    Bad,
}

const CONDITIONS: [Condition; 3] = [Condition::Good, Condition::Slow, Condition::Bad];

/// Encodes a report with its length field.
///
/// # Errors
/// [`CodecError::TooLarge`] for a program version of more than [`MAX_VERSION`] bytes.
pub fn encode_report(report: &NodeReport) -> Result<Vec<u8>, CodecError> {
    let mut writer = Writer::new(kind::REPORT, 128);
    writer.0.push(role_code(report.state));
    writer.u64(report.epoch);
    writer.u64(report.applied);
    writer.u64(report.committed);
    writer.0.push(u8::from(report.lease_ms.is_some()));
    writer.u64(report.lease_ms.unwrap_or_default());
    writer.0.push(u8::from(report.full));
    writer.bytes(report.version.as_bytes(), MAX_VERSION, "program version")?;
    if let Some(ReportExtension { level, holds, free, disk, memory }) = &report.more {
        writer.u32(*level);
        for KeyId(id) in [holds.key, holds.trusts, holds.shows] {
            writer.0.extend_from_slice(&id.to_le_bytes());
        }
        // Behind what the first programs of this level read: they leave the rest alone. What comes behind it one day
        // has to come with it.
        if let Some(free) = free {
            writer.u64(*free);
            writer.0.extend(disk.map(|disk| disk as u8));
            if let Some(Remembers { forgotten, reach }) = memory.as_ref().filter(|_| disk.is_some()) {
                writer.0.push(u8::from(*forgotten));
                [reach.term, reach.vote, reach.acked, reach.committed]
                    .into_iter()
                    .for_each(|number| writer.u64(number));
            }
        }
    }
    writer.finish()
}

pub(super) fn decode_report(reader: &mut Reader<'_>) -> Result<NodeReport, CodecError> {
    let code = reader.u8()?;
    let state = ROLES.into_iter().find(|role| role_code(*role) == code).ok_or(Malformed("unknown role"))?;
    let (epoch, applied, committed) = (reader.u64()?, reader.u64()?, reader.u64()?);
    let (has_lease, lease) = (reader.bool()?, reader.u64()?);
    let full = reader.bool()?;
    let version = reader.text(MAX_VERSION)?;
    let more = reader.optional(decode_more)?;
    Ok(NodeReport { state, epoch, applied, committed, lease_ms: has_lease.then_some(lease), full, version, more })
}

fn decode_more(reader: &mut Reader<'_>) -> Result<ReportExtension, CodecError> {
    let level = reader.u32()?;
    let mut id = || Ok(KeyId(reader.u128()?));
    let holds = Holdings { key: id()?, trusts: id()?, shows: id()? };
    let free = reader.optional(Reader::u64)?;
    let known = |code: u8| CONDITIONS.get(usize::from(code)).copied().ok_or(Malformed("unknown condition of a disk"));
    let disk = reader.optional(Reader::u8)?.map(known).transpose()?;
    Ok(ReportExtension { level, holds, free, disk, memory: reader.optional(decode_memory)? })
}

fn decode_memory(reader: &mut Reader<'_>) -> Result<Remembers, CodecError> {
    let forgotten = reader.bool()?;
    let (term, vote, acked, committed) = (reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?);
    Ok(Remembers { forgotten, reach: Reach { term, vote, acked, committed } })
}

pub(super) const ROLES: [Role; 11] = [
    Role::RequestJoin,
    Role::Startup,
    Role::Startup2,
    Role::Recovering,
    Role::Secondary,
    Role::Primary,
    Role::Rollback,
    Role::Down,
    Role::Unknown,
    Role::Removed,
    // Never sent: a host that waits has no links.
    Role::Waiting,
];

/// The numbers on the wire; never renumber.
fn role_code(role: Role) -> u8 {
    match role {
        Role::RequestJoin => 0,
        Role::Startup => 1,
        Role::Startup2 => 2,
        Role::Recovering => 3,
        Role::Secondary => 4,
        Role::Primary => 5,
        Role::Rollback => 6,
        Role::Down => 7,
        Role::Unknown => 8,
        Role::Removed => 9,
        Role::Waiting => 10,
    }
}
