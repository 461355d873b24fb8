//! The words of a meeting: a length (u32, little-endian) and so many bytes of JSON each. Must never read a word without
//! a limit of length and time.

use std::{io, time::Duration};

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};

use super::{MeetingError, broken};
use crate::{
    cluster::ClusterId,
    join::{JoinFile, JoinRequest},
};

/// Of this program.
pub(super) const PROTOCOL: u32 = 1;
/// Bytes of a nonce.
pub(super) const NONCE: usize = 32;
/// Longest word, in bytes: the longest has the certificates of two authorities.
const LONGEST: usize = 64 << 10;
/// Longest sentence of the other side that is repeated, in characters.
const SENTENCE: usize = 500;
/// How long one word may take.
pub(super) const STEP: Duration = Duration::from_secs(5);
/// How long the caller may take where it waits for other hosts, or for a majority.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Which pool calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    pub cluster: ClusterId,
    /// The certificates of its authorities, PEM.
    pub authority: String,
    /// Name of the member that calls.
    pub by: String,
    /// Version of its program.
    pub version: String,
    /// The feature level that the pool runs.
    pub level: u32,
    /// By which address the pool reaches the host.
    pub address: String,
}

/// Why somebody ends a meeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Refusal {
    Protocol,
    /// Whoever says so has none.
    NoSecret,
    /// Whoever says so has one, and the other none.
    NeedsSecret,
    WrongSecret,
    Busy,
    #[serde(other)]
    Other,
}

/// What is said.
#[derive(Serialize, Deserialize)]
#[serde(tag = "word", rename_all = "kebab-case")]
#[allow(clippy::large_enum_variant, reason = "one at a time exists, on its way")]
pub(super) enum Word {
    /// Both: the first word. Every version has these three.
    Greeting { protocol: u32, nonce: String, secret: bool },
    /// Both, if both have a secret: the caller first.
    Proof { proof: String },
    /// The caller.
    Offer { offer: Offer },
    /// The host: what it tells of itself.
    Candidate { request: JoinRequest },
    /// The caller means it: nobody else may have the host until the connection ends.
    Reserve,
    /// The host: it is reserved.
    Ready,
    /// The caller: the pool has taken the host in.
    Adopt { file: JoinFile, id: String },
    /// The host: it has that on its disk.
    Adopted,
    /// Both, instead of anything else.
    Refused { why: Refusal, text: String },
}

pub(super) async fn say(stream: &mut (impl AsyncWrite + Unpin), word: &Word) -> Result<(), MeetingError> {
    let write = async {
        let json = serde_json::to_vec(word)?;
        let length = u32::try_from(json.len()).ok().filter(|length| *length as usize <= LONGEST);
        let length = length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a word is too long"))?;
        stream.write_u32_le(length).await?;
        stream.write_all(&json).await?;
        stream.flush().await
    };
    match timeout(STEP, write).await {
        Ok(written) => written.map_err(broken),
        Err(_) => Err(MeetingError::Unreachable("it does not read".to_owned())),
    }
}

/// The next word; a refusal is an error.
pub(super) async fn hear(stream: &mut (impl AsyncRead + Unpin), limit: Duration) -> Result<Word, MeetingError> {
    let read = async {
        let length = stream.read_u32_le().await? as usize;
        if length > LONGEST {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a word is too long"));
        }
        let mut json = vec![0; length];
        stream.read_exact(&mut json).await?;
        serde_json::from_slice(&json).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
    };
    let word = match timeout(limit, read).await {
        Ok(read) => read.map_err(broken)?,
        Err(_) => return Err(MeetingError::Unreachable(format!("it said nothing for {} s", limit.as_secs()))),
    };
    let Word::Refused { why, text } = word else { return Ok(word) };
    let text: String = text.chars().filter(|c| !c.is_control()).take(SENTENCE).collect();
    Err(match why {
        Refusal::NoSecret => MeetingError::SecretMissingThere,
        Refusal::NeedsSecret => MeetingError::SecretMissingHere,
        Refusal::WrongSecret => MeetingError::WrongSecret,
        Refusal::Busy => MeetingError::Busy,
        Refusal::Protocol | Refusal::Other => MeetingError::Refused(text),
    })
}

/// Tells the other side why this one goes.
pub(super) async fn refuse(stream: &mut (impl AsyncWrite + Unpin), error: &MeetingError) {
    let word = Word::Refused { why: error.refusal(), text: error.to_string() };
    // Whoever is gone need not know.
    let _ = say(stream, &word).await;
    let _ = timeout(STEP, stream.shutdown()).await;
}

pub(super) fn unexpected(wanted: &str) -> MeetingError {
    MeetingError::Broken(format!("another word than {wanted} came"))
}

/// A nonce, as it is sent.
pub(super) fn written(nonce: &[u8; NONCE]) -> String {
    HEXLOWER.encode(nonce)
}

/// A nonce that was sent.
pub(super) fn read(nonce: &str) -> Result<[u8; NONCE], MeetingError> {
    let bytes = HEXLOWER_PERMISSIVE.decode(nonce.as_bytes()).ok().and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or_else(|| MeetingError::Broken("its nonce is none".to_owned()))
}
