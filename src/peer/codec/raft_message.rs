//! The bytes of raft's messages. Must never send what raft tells itself, nor give bytes to protobuf's parser.

use raft::eraftpb::{ConfState, Entry, EntryType, Message, MessageType, Snapshot};

use super::{
    CodecError::{self, Malformed, TooLarge},
    MAX_CONTEXT, MAX_ENTRIES, MAX_FRAME, MAX_MEMBERS, MAX_SNAPSHOT_DATA,
    bytes::{Reader, Writer},
    kind,
};

const ENTRY_MIN: usize = 1 + 8 + 8 + 4 + 4;
const FLAG_REJECT: u8 = 1;
const FLAG_SNAPSHOT: u8 = 2;

/// Encodes a raft message with its length field.
///
/// # Errors
/// [`CodecError::TooLarge`] when it has too many entries or is too long, [`CodecError::Malformed`] when it must not
/// travel.
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

pub(super) fn decode_raft(reader: &mut Reader<'_>) -> Result<Message, CodecError> {
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

/// Messages that one node may send to another, with their numbers on the wire. Not in it: what raft tells itself, and
/// MsgPropose. Only the primary proposes, and a proposed configuration change would reach protobuf's parser.
pub(super) const MESSAGES: [(MessageType, u8); 13] = [
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

pub(super) fn entry_type(code: u8) -> Result<EntryType, CodecError> {
    match code {
        0 => Ok(EntryType::EntryNormal),
        1 => Ok(EntryType::EntryConfChange),
        2 => Ok(EntryType::EntryConfChangeV2),
        _ => Err(Malformed("unknown raft entry")),
    }
}
