//! The first frame on a link and its answer: who calls whom, in which language, what for, and why not. Must never
//! change the layout of [`HelloReply`] nor the first field of [`Hello`].

use thiserror::Error;

use super::{
    CodecError::{self, Malformed},
    MAX_ADDRESS, MAX_REASON, MAX_VERSION, PROTOCOL_VERSION,
    bytes::{Reader, Writer},
    kind,
};
use crate::cluster::{
    ClusterId, NodeId,
    level::FIRST_LEVEL,
    reach::{Claim, Standing},
};

/// The first frame on a link: who calls whom, and in which language.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub protocol: u16,
    pub cluster: ClusterId,
    pub from: NodeId,
    pub to: NodeId,
    /// Format of replicated commands that the caller writes ([`crate::cluster::level::FORMAT_VERSION`]).
    pub data_format: u8,
    /// How long the caller keeps its ports open and keeps its promises: see [`LeaseTerms`].
    pub terms: LeaseTerms,
    /// What the connection is for.
    pub purpose: Purpose,
    /// Random number of the caller's process: two processes with the identity of one node give themselves away.
    pub incarnation: u64,
    /// Program version, for people.
    pub version: String,
    /// Where the caller is reached; none if it does not know itself as a member.
    pub reached: Option<Reached>,
    /// The feature level of the caller's program; none for one that does not say, or a receiver that could not read it.
    pub level: Option<u32>,
    /// What the caller has of what it must remember. Only with a level.
    pub standing: Standing,
    /// The caller can say which pages of a database it has, so that it is sent only the others. Only with a standing.
    pub compares: bool,
}

impl Hello {
    /// The feature level of the caller's program.
    pub fn feature_level(&self) -> u32 {
        self.level.unwrap_or(FIRST_LEVEL)
    }
}

/// Where a node is reached by its own membership, which may be newer than that of whom it calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reached {
    pub address: String,
    pub port: u16,
    /// Raft index of the entry that made that membership.
    pub index: u64,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A link: frames from the caller, nothing back.
    Link,
    /// The caller fetches a snapshot of the database; what follows the hello is not of this protocol.
    Snapshot,
    /// The caller fetches a cluster key that it can name; what follows the hello is not of this protocol. Feature level
    /// 2.
    Key,
    /// The caller asks one thing; what follows the hello is not of this protocol. Nothing hangs on the answer, so that
    /// this needs no feature level: an older program refuses it, and counts as one that does not answer.
    Question,
}

/// The two spans that must fit together on all members, or two nodes could have open ports at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseTerms {
    /// Milliseconds for which a primary keeps its ports open without an answer.
    pub lease_ms: u32,
    /// Milliseconds for which a voter surely elects nobody else after it has answered.
    pub promise_ms: u32,
}

impl LeaseTerms {
    /// Milliseconds that must lie between the end of a lease and the end of a promise.
    pub const MARGIN_MS: u32 = 50;

    /// True if a lease on either side ends before the promise of the other.
    pub fn fit(&self, other: &Self) -> bool {
        let ends_first = |lease: u32, promise: u32| lease.saturating_add(Self::MARGIN_MS) <= promise;
        ends_first(self.lease_ms, other.promise_ms) && ends_first(other.lease_ms, self.promise_ms)
    }
}

/// The answer to [`Hello`]: accepted, or the reason why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HelloReply {
    /// With the feature level of the answering program, if the caller has said its own, and whether it takes datagrams
    /// on the number of its HA port. Only with a level.
    Accepted {
        level: Option<u32>,
        datagrams: bool,
    },
    Refused(Refusal),
}

/// Why a node was refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{reason}")]
pub struct Refusal {
    pub code: RefusalCode,
    /// A sentence for people.
    pub reason: String,
}

impl Refusal {
    /// A refusal that programs need not tell from others.
    pub fn other(reason: impl Into<String>) -> Self {
        Self { code: RefusalCode::Other, reason: reason.into() }
    }
}

/// What a program can make of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalCode {
    /// Nothing but the reason: it may pass by itself, as for a newcomer that is not known everywhere yet, or not.
    Other,
    /// The caller was a member once and is none any more. Final: no id is given twice.
    Removed,
    /// Not now.
    Busy,
    /// The cluster runs a feature level that the caller's program does not have.
    Outdated,
    /// The caller has less than it had on its disk before: it lost some of its durable memory.
    Forgot,
}

pub(super) fn encode_hello(hello: &Hello) -> Result<Vec<u8>, CodecError> {
    let mut writer = Writer::new(kind::HELLO, 128);
    writer.0.extend_from_slice(&hello.protocol.to_le_bytes());
    writer.0.extend_from_slice(&hello.cluster.0.to_le_bytes());
    writer.u64(hello.from);
    writer.u64(hello.to);
    writer.0.push(hello.data_format);
    writer.0.extend_from_slice(&hello.terms.lease_ms.to_le_bytes());
    writer.0.extend_from_slice(&hello.terms.promise_ms.to_le_bytes());
    writer.0.push(match hello.purpose {
        Purpose::Link => 0,
        Purpose::Snapshot => 1,
        Purpose::Key => 2,
        Purpose::Question => 3,
    });
    writer.u64(hello.incarnation);
    writer.bytes(hello.version.as_bytes(), MAX_VERSION, "program version")?;
    writer.0.push(u8::from(hello.reached.is_some()));
    if let Some(Reached { address, port, index }) = &hello.reached {
        writer.bytes(address.as_bytes(), MAX_ADDRESS, "address")?;
        writer.0.extend_from_slice(&port.to_le_bytes());
        writer.u64(*index);
    }
    if let Some(level) = hello.level {
        writer.u32(level);
        encode_standing(&mut writer, &hello.standing);
        if hello.standing != Standing::Unsaid {
            writer.0.push(u8::from(hello.compares));
        }
    }
    writer.finish()
}

pub(super) fn decode_hello(reader: &mut Reader<'_>) -> Result<Hello, CodecError> {
    let protocol = reader.u16()?;
    if protocol != PROTOCOL_VERSION {
        return Err(CodecError::Version(protocol));
    }
    Ok(Hello {
        protocol,
        cluster: ClusterId(reader.u128()?),
        from: reader.u64()?,
        to: reader.u64()?,
        data_format: reader.u8()?,
        terms: LeaseTerms { lease_ms: reader.u32()?, promise_ms: reader.u32()? },
        purpose: match reader.u8()? {
            0 => Purpose::Link,
            1 => Purpose::Snapshot,
            2 => Purpose::Key,
            3 => Purpose::Question,
            _ => return Err(Malformed("unknown purpose")),
        },
        incarnation: reader.u64()?,
        version: reader.text(MAX_VERSION)?,
        reached: if reader.bool()? { Some(decode_reached(reader)?) } else { None },
        level: reader.optional(Reader::u32)?,
        standing: reader.optional(decode_standing)?.unwrap_or_default(),
        compares: reader.optional(Reader::bool)?.unwrap_or(false),
    })
}

fn encode_standing(writer: &mut Writer, standing: &Standing) {
    match standing {
        Standing::Unsaid => {}
        Standing::Forgotten => writer.0.push(1),
        Standing::Whole(Claim { term, vote, last }) => {
            writer.0.push(2);
            [term, vote, last].into_iter().for_each(|number| writer.u64(*number));
        }
    }
}

fn decode_standing(reader: &mut Reader<'_>) -> Result<Standing, CodecError> {
    match reader.u8()? {
        1 => Ok(Standing::Forgotten),
        2 => Ok(Standing::Whole(Claim { term: reader.u64()?, vote: reader.u64()?, last: reader.u64()? })),
        _ => Err(Malformed("unknown standing")),
    }
}

fn decode_reached(reader: &mut Reader<'_>) -> Result<Reached, CodecError> {
    let address = reader.text(MAX_ADDRESS)?;
    Ok(Reached { address, port: reader.u16()?, index: reader.u64()? })
}

pub(super) fn encode_reply(reply: &HelloReply) -> Result<Vec<u8>, CodecError> {
    let mut writer = Writer::new(kind::HELLO_REPLY, MAX_REASON);
    let (code, reason) = match reply {
        HelloReply::Accepted { .. } => (1, ""),
        HelloReply::Refused(refusal) => (refusal_code(refusal.code), refusal.reason.as_str()),
    };
    writer.0.push(code);
    writer.bytes(reason.as_bytes(), MAX_REASON, "reason")?;
    if let HelloReply::Accepted { level: Some(level), datagrams } = reply {
        writer.u32(*level);
        writer.0.push(u8::from(*datagrams));
    }
    writer.finish()
}

pub(super) fn decode_reply(reader: &mut Reader<'_>) -> Result<HelloReply, CodecError> {
    let (code, reason) = match (reader.u8()?, reader.text(MAX_REASON)?) {
        (1, reason) if reason.is_empty() => {
            let level = reader.optional(Reader::u32)?;
            return Ok(HelloReply::Accepted { level, datagrams: reader.optional(Reader::bool)?.unwrap_or(false) });
        }
        (1, _) => return Err(Malformed("accepted with a reason")),
        (2, reason) => (RefusalCode::Removed, reason),
        (3, reason) => (RefusalCode::Busy, reason),
        (4, reason) => (RefusalCode::Outdated, reason),
        (5, reason) => (RefusalCode::Forgot, reason),
        // Codes of a later version, too: their reason says what this program does not understand.
        (_, reason) => (RefusalCode::Other, reason),
    };
    Ok(HelloReply::Refused(Refusal { code, reason }))
}

/// The numbers on the wire, besides 1 for an acceptance; never renumber.
fn refusal_code(code: RefusalCode) -> u8 {
    match code {
        RefusalCode::Other => 0,
        RefusalCode::Removed => 2,
        RefusalCode::Busy => 3,
        RefusalCode::Outdated => 4,
        RefusalCode::Forgot => 5,
    }
}
