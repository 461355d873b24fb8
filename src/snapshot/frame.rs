//! The frames of a snapshot's stream: `kind u8, length u32` (little-endian), then that many bytes. Owns their limits.
//! Must never read more into memory than they allow.
//!
//! The databases of a snapshot come one after the other, as the manifest has them, each from its first chunk on.
//!
//! The sender begins with [`MANIFEST`], [`ASK`] or [`REFUSED`]; [`CHUNK`]s and [`CHANGED`]s follow, then [`END`] or
//! [`REFUSED`]. After [`ASK`], and only then, the receiver answers each chunk beforehand with [`TAGS`].

use std::{
    io::{self, ErrorKind},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};

use super::STALL;
use crate::{
    little_endian::u32_at,
    storage::snapshot::{
        CHUNK as CHUNK_BYTES, MAX_MANIFEST,
        difference::{KEY, TAG, map_bytes},
    },
};

/// A manifest as JSON.
pub(super) const MANIFEST: u8 = 1;
/// The checksum of the pages (u64, little-endian), then the pages.
pub(super) const CHUNK: u8 = 2;
/// Everything has been sent.
pub(super) const END: u8 = 3;
/// There is no snapshot, or no more of it: a sentence says why.
pub(super) const REFUSED: u8 = 4;
/// A key, then a manifest as JSON: the receiver says what it has. Only to one that knows this, by its hello.
pub(super) const ASK: u8 = 5;
/// From the receiver: the tags of the pages in its own next chunk; empty if it has no more of this database. All chunks
/// of it behind that come whole.
pub(super) const TAGS: u8 = 6;
/// For each [`TAGS`]: the checksum of the pages in the chunk (u64, little-endian), which of them differ (a bit each),
/// then these pages.
pub(super) const CHANGED: u8 = 7;

/// Longest reason, in bytes.
pub(super) const MAX_REASON: usize = 1024;
/// Most pages in a chunk.
const MAX_PAGES: usize = CHUNK_BYTES / 512;
/// Bytes that must be sent within [`STALL`].
const PIECE: usize = 64 << 10;

/// Reads the kind and length of the next frame, which must begin within `patience`.
pub(super) async fn read_head(stream: &mut (impl AsyncRead + Unpin), patience: Duration) -> io::Result<(u8, usize)> {
    let mut head = [0; 5];
    timeout(patience, stream.read_exact(&mut head)).await.map_err(|_| stalled(patience))??;
    let length = u32_at(&head, 1) as usize;
    let limit = match head[0] {
        MANIFEST => MAX_MANIFEST,
        CHUNK => CHUNK_BYTES + 8,
        END => 0,
        REFUSED => MAX_REASON,
        ASK => KEY + MAX_MANIFEST,
        TAGS => MAX_PAGES * TAG,
        CHANGED => 8 + map_bytes(MAX_PAGES as u32) + CHUNK_BYTES,
        other => return Err(io::Error::new(ErrorKind::InvalidData, format!("frame kind {other} is unknown"))),
    };
    let least = match head[0] {
        ASK => KEY,
        CHUNK | CHANGED => 9,
        _ => 0,
    };
    if length > limit || length < least {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("a frame of kind {} has {length} bytes", head[0])));
    }
    Ok((head[0], length))
}

/// Fills `bytes`. Fails if none arrive for [`STALL`].
pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin), bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match timeout(STALL, stream.read(&mut bytes[done..])).await {
            Ok(Ok(0)) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count?,
            Err(_) => return Err(stalled(STALL)),
        }
    }
    Ok(())
}

/// Writes one frame with its content in two parts. Fails if the other side reads nothing for [`STALL`].
pub(super) async fn write(
    stream: &mut (impl AsyncWrite + Unpin),
    kind: u8,
    first: &[u8],
    rest: &[u8],
) -> io::Result<()> {
    let length = (first.len() + rest.len()) as u32;
    let mut head = Vec::with_capacity(5 + first.len());
    head.push(kind);
    head.extend_from_slice(&length.to_le_bytes());
    head.extend_from_slice(first);
    for piece in head.chunks(PIECE).chain(rest.chunks(PIECE)) {
        timeout(STALL, stream.write_all(piece)).await.map_err(|_| stalled(STALL))??;
    }
    if !matches!(kind, CHUNK | CHANGED) {
        timeout(STALL, stream.flush()).await.map_err(|_| stalled(STALL))??;
    }
    Ok(())
}

fn stalled(patience: Duration) -> io::Error {
    io::Error::new(ErrorKind::TimedOut, format!("nothing moved for {} s", patience.as_secs()))
}
