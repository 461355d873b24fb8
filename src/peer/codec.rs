//! The language of the links: frames and their bytes, protocol version 1. Pure; owns every size limit of the wire. Must
//! never panic or allocate beyond what has arrived, whatever the bytes: they come from other hosts. Must never give
//! them to protobuf's parser, which recurses without bound (RUSTSEC-2024-0437).
//!
//! A frame is `length u32` (of what follows), `kind u8`, body. All integers are little-endian, byte strings are
//! `length u32` and bytes unless said otherwise. The layout of [`HelloReply`] and the first field of [`Hello`] stay the
//! same in all versions, so that two versions can tell each other what is wrong.
//!
//! Hellos, their answers and reports may go on behind what a program knows: it passes over that. Programs of feature
//! level 1 did not; what came later is written only for those that say so in the TLS handshake
//! ([`crate::pki::EXTENSIBLE`]), and therefore stands last and is optional.

mod bytes;
mod greeting;
mod raft_message;
mod report;

use raft::eraftpb::Message;
use thiserror::Error;

use self::{
    bytes::Reader,
    greeting::{decode_hello, decode_reply, encode_hello, encode_reply},
    raft_message::decode_raft,
    report::decode_report,
};
pub use self::{
    greeting::{Hello, HelloReply, LeaseTerms, Purpose, Reached, Refusal, RefusalCode},
    raft_message::encode_raft,
    report::{Condition, NodeReport, Remembers, ReportExtension, encode_report},
};
use crate::cluster::limits::MAX_ENCODED;

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
pub const MAX_CONTEXT: usize = MAX_ENCODED;
/// Longest data of a snapshot message, in bytes: it carries metadata, never the database.
pub const MAX_SNAPSHOT_DATA: usize = 64 << 10;
/// Largest number of members in one list of a snapshot's configuration.
pub const MAX_MEMBERS: usize = 64;

/// Bytes of a frame's length field.
pub(super) const LENGTH: usize = 4;

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
use CodecError::Malformed;

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
    /// [`CodecError::TooLarge`] when something in it is longer than the protocol allows, [`CodecError::Malformed`] for
    /// a raft message that must not travel.
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
    /// [`CodecError::Version`] for a hello in another protocol version, [`CodecError::Malformed`] for anything else
    /// that is not a frame.
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
/// [`CodecError::Malformed`] for a frame that is empty or longer than [`MAX_FRAME`].
pub fn frame_length(header: [u8; LENGTH]) -> Result<usize, CodecError> {
    match u32::from_le_bytes(header) as usize {
        0 => Err(Malformed("empty frame")),
        length if length > MAX_FRAME => Err(Malformed("frame too long")),
        length => Ok(length),
    }
}

#[cfg(test)]
mod tests;
