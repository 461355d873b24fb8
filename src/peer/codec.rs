//! The language of the links: frames and their bytes, protocol version 1. Pure; owns every size limit of the wire. Must
//! never panic or allocate beyond what has arrived, whatever the bytes: they come from other hosts. Must never give
//! them to protobuf's parser, which recurses without bound (RUSTSEC-2024-0437).
//!
//! A frame is `length u32` (of what follows), `kind u8`, body. All integers are little-endian, byte strings are
//! `length u32` and bytes unless said otherwise. The layout of [`HelloReply`] and the first field of [`Hello`] stay the
//! same in all versions, so that two versions can tell each other what is wrong.
//!
//! Hellos, their answers and reports may go on behind what a program knows: it passes over that. Programs of feature level 1
//! did not; what came later is written only for those that say so in the TLS handshake ([`crate::pki::EXTENSIBLE`]), and
//! therefore stands last and is optional.

use raft::eraftpb::{ConfState, Entry, EntryType, Message, MessageType, Snapshot};
use thiserror::Error;

use crate::cluster::{
    ClusterId, NodeId, Role,
    level::FIRST_LEVEL,
    trust::{Holdings, KeyId},
};

/// Version of the protocol that this program speaks.
pub const PROTOCOL_VERSION: u16 = 1;
/// Largest frame without its length field, in bytes.
pub const MAX_FRAME: usize = 4 << 20;
/// Largest number of raft entries in one message.
pub const MAX_ENTRIES: usize = 4096;
/// Longest program version, in bytes.
pub const MAX_VERSION: usize = 64;
/// Longest address that a caller says, in bytes: that of a DNS name, as in the membership.
pub const MAX_ADDRESS: usize = 253;
/// Longest reason of a refusal, in bytes: a sentence and the name of a host.
pub const MAX_REASON: usize = 512;
/// Longest context of a message or an entry, in bytes: a change of the membership carries all of it in its entry.
pub const MAX_CONTEXT: usize = 64 << 10;
/// Longest data of a snapshot message, in bytes: it carries metadata, never the database.
pub const MAX_SNAPSHOT_DATA: usize = 64 << 10;
/// Largest number of members in one list of a snapshot's configuration.
pub const MAX_MEMBERS: usize = 64;

/// Bytes of a frame's length field.
pub(super) const LENGTH: usize = 4;
const ENTRY_MIN: usize = 1 + 8 + 8 + 4 + 4;
const FLAG_REJECT: u8 = 1;
const FLAG_SNAPSHOT: u8 = 2;

/// Kinds of frames; the numbers are the protocol's.
mod kind {
    pub const HELLO: u8 = 1;
    pub const HELLO_REPLY: u8 = 2;
    pub const RAFT: u8 = 3;
    pub const REPORT: u8 = 4;
}

/// Why bytes are not a frame, or a value cannot be one.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CodecError {
    #[error("protocol version {0} is not known to this program (it knows {PROTOCOL_VERSION})")]
    Version(u16),
    #[error("malformed frame: {0}")]
    Malformed(&'static str),
    #[error("too large for the protocol: {0}")]
    TooLarge(&'static str),
}
use CodecError::{Malformed, TooLarge};

/// The first frame on a link: who calls whom, and in which language.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub protocol: u16,
    pub cluster: ClusterId,
    pub from: NodeId,
    pub to: NodeId,
    /// Format of replicated commands that the caller writes ([`crate::cluster::command::FORMAT_VERSION`]).
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
    /// The caller fetches a cluster key that it can name; what follows the hello is not of this protocol. Feature level 2.
    Key,
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
    /// With the feature level of the answering program, if the caller has said its own.
    Accepted(Option<u32>),
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
}

/// What a node says about itself to the others. It is for status displays; the only decisions that rest on it are those of
/// the primary to go on with what all members have: the feature level, and what they hold.
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
    pub more: Option<More>,
}

/// What reports say since feature level 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct More {
    /// The feature level of the program.
    pub level: u32,
    /// What the node has on its disk.
    pub holds: Holdings,
}

/// One frame.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    Hello(Hello),
    HelloReply(HelloReply),
    Raft(Box<Message>),
    Report(NodeReport),
}

impl Frame {
    /// Encodes the frame with its length field.
    ///
    /// # Errors
    /// [`CodecError::TooLarge`], or [`CodecError::Malformed`] for a raft message that must not travel.
    pub fn encode(&self) -> Result<Vec<u8>, CodecError> {
        match self {
            Frame::Hello(hello) => encode_hello(hello),
            Frame::HelloReply(reply) => encode_reply(reply),
            Frame::Raft(message) => encode_raft(message),
            Frame::Report(report) => encode_report(report),
        }
    }

    /// Decodes kind and body: a frame without its length field.
    ///
    /// # Errors
    /// [`CodecError::Version`] for a hello in another protocol version, else [`CodecError::Malformed`].
    pub fn decode(bytes: &[u8]) -> Result<Frame, CodecError> {
        if bytes.len() > MAX_FRAME {
            return Err(Malformed("frame too long"));
        }
        let mut reader = Reader(bytes);
        let frame = match reader.u8()? {
            kind::HELLO => Frame::Hello(decode_hello(&mut reader)?),
            kind::HELLO_REPLY => Frame::HelloReply(decode_reply(&mut reader)?),
            kind::RAFT => Frame::Raft(Box::new(decode_raft(&mut reader)?)),
            kind::REPORT => Frame::Report(decode_report(&mut reader)?),
            _ => return Err(Malformed("unknown kind of frame")),
        };
        // A later version may say more in the others; what raft is told must be understood whole.
        let whole = reader.0.is_empty() || !matches!(frame, Frame::Raft(_));
        if whole { Ok(frame) } else { Err(Malformed("bytes left over")) }
    }
}

/// The length that a frame's first four bytes announce, checked against [`MAX_FRAME`].
///
/// # Errors
/// [`CodecError::Malformed`] for an impossible length.
pub fn frame_length(header: [u8; LENGTH]) -> Result<usize, CodecError> {
    match u32::from_le_bytes(header) as usize {
        0 => Err(Malformed("empty frame")),
        length if length > MAX_FRAME => Err(Malformed("frame too long")),
        length => Ok(length),
    }
}

/// Encodes a raft message with its length field.
///
/// # Errors
/// [`CodecError::TooLarge`], or [`CodecError::Malformed`] for a message that must not travel.
pub fn encode_raft(message: &Message) -> Result<Vec<u8>, CodecError> {
    let payload: usize = message.entries.iter().map(|entry| ENTRY_MIN + entry.data.len() + entry.context.len()).sum();
    let mut writer = Writer::new(kind::RAFT, 128 + payload);
    if message.entries.len() > MAX_ENTRIES {
        return Err(TooLarge("raft entries"));
    }
    writer.0.push(message_code(message.msg_type)?);
    let snapshot = message.snapshot.as_ref();
    writer.0.push(u8::from(message.reject) * FLAG_REJECT + u8::from(snapshot.is_some()) * FLAG_SNAPSHOT);
    for field in [message.to, message.from, message.term, message.log_term, message.index, message.commit] {
        writer.u64(field);
    }
    writer.u64(message.commit_term);
    writer.u64(message.request_snapshot);
    writer.u64(message.reject_hint);
    writer.u64(message.deprecated_priority);
    writer.u64(message.priority.cast_unsigned());
    writer.bytes(&message.context, MAX_CONTEXT, "message context")?;
    if let Some(snapshot) = snapshot {
        encode_snapshot(&mut writer, snapshot)?;
    }
    writer.u32(message.entries.len() as u32);
    for entry in &message.entries {
        writer.0.push(entry_code(entry.entry_type));
        writer.u64(entry.term);
        writer.u64(entry.index);
        writer.bytes(&entry.data, MAX_FRAME, "raft entry")?;
        writer.bytes(&entry.context, MAX_CONTEXT, "entry context")?;
    }
    writer.finish()
}

fn decode_raft(reader: &mut Reader<'_>) -> Result<Message, CodecError> {
    let mut message = Message { msg_type: message_type(reader.u8()?)?, ..Message::default() };
    let flags = reader.u8()?;
    if flags & !(FLAG_REJECT | FLAG_SNAPSHOT) != 0 {
        return Err(Malformed("unknown flags"));
    }
    message.reject = flags & FLAG_REJECT != 0;
    message.to = reader.u64()?;
    message.from = reader.u64()?;
    message.term = reader.u64()?;
    message.log_term = reader.u64()?;
    message.index = reader.u64()?;
    message.commit = reader.u64()?;
    message.commit_term = reader.u64()?;
    message.request_snapshot = reader.u64()?;
    message.reject_hint = reader.u64()?;
    message.deprecated_priority = reader.u64()?;
    message.priority = reader.u64()?.cast_signed();
    message.context = reader.bytes(MAX_CONTEXT)?.to_vec().into();
    if flags & FLAG_SNAPSHOT != 0 {
        message.snapshot = Some(decode_snapshot(reader)?).into();
    }
    let count = reader.count(MAX_ENTRIES, ENTRY_MIN)?;
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        entries.push(Entry {
            entry_type: entry_type(reader.u8()?)?,
            term: reader.u64()?,
            index: reader.u64()?,
            data: reader.bytes(MAX_FRAME)?.to_vec().into(),
            context: reader.bytes(MAX_CONTEXT)?.to_vec().into(),
            ..Entry::default()
        });
    }
    message.entries = entries.into();
    Ok(message)
}

fn encode_snapshot(writer: &mut Writer, snapshot: &Snapshot) -> Result<(), CodecError> {
    let metadata = snapshot.get_metadata();
    writer.u64(metadata.index);
    writer.u64(metadata.term);
    let members = metadata.get_conf_state();
    writer.0.push(u8::from(members.auto_leave));
    for list in [&members.voters, &members.learners, &members.voters_outgoing, &members.learners_next] {
        if list.len() > MAX_MEMBERS {
            return Err(TooLarge("members"));
        }
        writer.u32(list.len() as u32);
        list.iter().for_each(|id| writer.u64(*id));
    }
    writer.bytes(&snapshot.data, MAX_SNAPSHOT_DATA, "snapshot data")
}

fn decode_snapshot(reader: &mut Reader<'_>) -> Result<Snapshot, CodecError> {
    let mut snapshot = Snapshot::default();
    let metadata = snapshot.mut_metadata();
    metadata.index = reader.u64()?;
    metadata.term = reader.u64()?;
    let auto_leave = reader.bool()?;
    let mut list = || -> Result<Vec<u64>, CodecError> {
        let count = reader.count(MAX_MEMBERS, 8)?;
        (0..count).map(|_| reader.u64()).collect()
    };
    *metadata.mut_conf_state() = ConfState {
        voters: list()?,
        learners: list()?,
        voters_outgoing: list()?,
        learners_next: list()?,
        auto_leave,
        ..ConfState::default()
    };
    snapshot.data = reader.bytes(MAX_SNAPSHOT_DATA)?.to_vec().into();
    Ok(snapshot)
}

fn encode_hello(hello: &Hello) -> Result<Vec<u8>, CodecError> {
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
    });
    writer.u64(hello.incarnation);
    writer.bytes(hello.version.as_bytes(), MAX_VERSION, "program version")?;
    writer.0.push(u8::from(hello.reached.is_some()));
    if let Some(Reached { address, port, index }) = &hello.reached {
        writer.bytes(address.as_bytes(), MAX_ADDRESS, "address")?;
        writer.0.extend_from_slice(&port.to_le_bytes());
        writer.u64(*index);
    }
    hello.level.into_iter().for_each(|level| writer.u32(level));
    writer.finish()
}

fn decode_hello(reader: &mut Reader<'_>) -> Result<Hello, CodecError> {
    let protocol = u16::from_le_bytes(reader.array()?);
    if protocol != PROTOCOL_VERSION {
        return Err(CodecError::Version(protocol));
    }
    Ok(Hello {
        protocol,
        cluster: ClusterId(u128::from_le_bytes(reader.array()?)),
        from: reader.u64()?,
        to: reader.u64()?,
        data_format: reader.u8()?,
        terms: LeaseTerms {
            lease_ms: u32::from_le_bytes(reader.array()?),
            promise_ms: u32::from_le_bytes(reader.array()?),
        },
        purpose: match reader.u8()? {
            0 => Purpose::Link,
            1 => Purpose::Snapshot,
            2 => Purpose::Key,
            _ => return Err(Malformed("unknown purpose")),
        },
        incarnation: reader.u64()?,
        version: reader.text(MAX_VERSION)?,
        reached: if reader.bool()? { Some(decode_reached(reader)?) } else { None },
        level: reader.optional(Reader::u32)?,
    })
}

fn decode_reached(reader: &mut Reader<'_>) -> Result<Reached, CodecError> {
    let address = reader.text(MAX_ADDRESS)?;
    Ok(Reached { address, port: u16::from_le_bytes(reader.array()?), index: reader.u64()? })
}

fn encode_reply(reply: &HelloReply) -> Result<Vec<u8>, CodecError> {
    let mut writer = Writer::new(kind::HELLO_REPLY, MAX_REASON);
    let (code, reason) = match reply {
        HelloReply::Accepted(_) => (1, ""),
        HelloReply::Refused(refusal) => (refusal_code(refusal.code), refusal.reason.as_str()),
    };
    writer.0.push(code);
    writer.bytes(reason.as_bytes(), MAX_REASON, "reason")?;
    if let HelloReply::Accepted(Some(level)) = reply {
        writer.u32(*level);
    }
    writer.finish()
}

fn decode_reply(reader: &mut Reader<'_>) -> Result<HelloReply, CodecError> {
    let (code, reason) = match (reader.u8()?, reader.text(MAX_REASON)?) {
        (1, reason) if reason.is_empty() => return Ok(HelloReply::Accepted(reader.optional(Reader::u32)?)),
        (1, _) => return Err(Malformed("accepted with a reason")),
        (2, reason) => (RefusalCode::Removed, reason),
        (3, reason) => (RefusalCode::Busy, reason),
        (4, reason) => (RefusalCode::Outdated, reason),
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
    }
}

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
    if let Some(More { level, holds }) = &report.more {
        writer.u32(*level);
        for KeyId(id) in [holds.key, holds.trusts, holds.shows] {
            writer.0.extend_from_slice(&id.to_le_bytes());
        }
    }
    writer.finish()
}

fn decode_report(reader: &mut Reader<'_>) -> Result<NodeReport, CodecError> {
    let code = reader.u8()?;
    let state = ROLES.into_iter().find(|role| role_code(*role) == code).ok_or(Malformed("unknown role"))?;
    let (epoch, applied, committed) = (reader.u64()?, reader.u64()?, reader.u64()?);
    let (has_lease, lease) = (reader.bool()?, reader.u64()?);
    let full = reader.bool()?;
    let version = reader.text(MAX_VERSION)?;
    let more = reader.optional(decode_more)?;
    Ok(NodeReport { state, epoch, applied, committed, lease_ms: has_lease.then_some(lease), full, version, more })
}

fn decode_more(reader: &mut Reader<'_>) -> Result<More, CodecError> {
    let level = reader.u32()?;
    let mut id = || Ok(KeyId(u128::from_le_bytes(reader.array()?)));
    Ok(More { level, holds: Holdings { key: id()?, trusts: id()?, shows: id()? } })
}

const ROLES: [Role; 10] = [
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
    }
}

/// Messages that one node may send to another, with their numbers on the wire. Not in it: what raft tells itself, and
/// MsgPropose. Only the primary proposes, and a proposed configuration change would reach protobuf's parser.
const MESSAGES: [(MessageType, u8); 13] = [
    (MessageType::MsgAppend, 3),
    (MessageType::MsgAppendResponse, 4),
    (MessageType::MsgRequestVote, 5),
    (MessageType::MsgRequestVoteResponse, 6),
    (MessageType::MsgSnapshot, 7),
    (MessageType::MsgHeartbeat, 8),
    (MessageType::MsgHeartbeatResponse, 9),
    (MessageType::MsgTransferLeader, 13),
    (MessageType::MsgTimeoutNow, 14),
    (MessageType::MsgReadIndex, 15),
    (MessageType::MsgReadIndexResp, 16),
    (MessageType::MsgRequestPreVote, 17),
    (MessageType::MsgRequestPreVoteResponse, 18),
];

fn message_code(wanted: MessageType) -> Result<u8, CodecError> {
    let found = MESSAGES.iter().find(|(message, _)| *message == wanted);
    found.map(|(_, code)| *code).ok_or(Malformed("this raft message must not travel"))
}

fn message_type(wanted: u8) -> Result<MessageType, CodecError> {
    let found = MESSAGES.iter().find(|(_, code)| *code == wanted);
    found.map(|(message, _)| *message).ok_or(Malformed("unknown raft message"))
}

fn entry_code(entry: EntryType) -> u8 {
    match entry {
        EntryType::EntryNormal => 0,
        EntryType::EntryConfChange => 1,
        EntryType::EntryConfChangeV2 => 2,
    }
}

fn entry_type(code: u8) -> Result<EntryType, CodecError> {
    match code {
        0 => Ok(EntryType::EntryNormal),
        1 => Ok(EntryType::EntryConfChange),
        2 => Ok(EntryType::EntryConfChangeV2),
        _ => Err(Malformed("unknown raft entry")),
    }
}

/// Builds one frame; the length is filled in at the end.
struct Writer(Vec<u8>);

impl Writer {
    fn new(kind: u8, capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(LENGTH + 1 + capacity);
        bytes.extend_from_slice(&[0, 0, 0, 0, kind]);
        Self(bytes)
    }

    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, value: &[u8], limit: usize, what: &'static str) -> Result<(), CodecError> {
        if value.len() > limit {
            return Err(TooLarge(what));
        }
        self.u32(value.len() as u32);
        self.0.extend_from_slice(value);
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<u8>, CodecError> {
        let length = self.0.len() - LENGTH;
        if length > MAX_FRAME {
            return Err(TooLarge("frame"));
        }
        self.0[..LENGTH].copy_from_slice(&(length as u32).to_le_bytes());
        Ok(self.0)
    }
}

/// Takes a body apart. Every read is checked against what is left.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], CodecError> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(Malformed("frame too short"))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(Malformed("frame too short"))?;
        self.0 = rest;
        Ok(*head)
    }

    /// What came with a later version, if it is there.
    fn optional<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T, CodecError>) -> Result<Option<T>, CodecError> {
        if self.0.is_empty() { Ok(None) } else { read(self).map(Some) }
    }

    fn u8(&mut self) -> Result<u8, CodecError> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32, CodecError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, CodecError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn bool(&mut self) -> Result<bool, CodecError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed("neither true nor false")),
        }
    }

    /// A number of items that follow, `size` bytes each at least: never more than the rest can hold.
    fn count(&mut self, limit: usize, size: usize) -> Result<usize, CodecError> {
        let count = self.u32()? as usize;
        if count > limit || count > self.0.len() / size {
            return Err(Malformed("impossible count"));
        }
        Ok(count)
    }

    fn bytes(&mut self, limit: usize) -> Result<&'a [u8], CodecError> {
        let length = self.u32()? as usize;
        if length > limit {
            return Err(Malformed("byte string too long"));
        }
        self.take(length)
    }

    fn text(&mut self, limit: usize) -> Result<String, CodecError> {
        let text = std::str::from_utf8(self.bytes(limit)?).map_err(|_| Malformed("text is not UTF-8"))?;
        Ok(text.to_owned())
    }
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
