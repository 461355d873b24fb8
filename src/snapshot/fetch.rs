//! The receiving side: receives a snapshot from the primary into its staging folder. Must never leave anything behind
//! that counts unless the whole snapshot has arrived and is durable.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite, split},
    sync::mpsc::{self, Receiver, Sender},
    task,
};

use super::{
    CHUNKS, REPORT, STALL, frame,
    offer::{Offer, tell},
};
use crate::{
    cluster::{ClusterId, Member, NodeId, reach::Standing},
    mutex::locked,
    node::SyncProgress,
    peer::{OpenError, PeerIdentity, Purpose, open_stream},
    storage::snapshot::{
        Course, Incoming, Manifest, Own, SnapshotError,
        difference::{KEY, chunk_pages, map_bytes, patch},
        known,
    },
    telemetry::{SNAPSHOT_BYTES, SNAPSHOT_FAILURES, SNAPSHOT_LATENCY, SNAPSHOT_UNCHANGED},
};

/// How long the primary may take for the checkpoint that it makes first.
const CHECKPOINT: Duration = Duration::from_secs(60);

/// Why a snapshot was not fetched.
#[derive(Debug, Error)]
pub enum FetchError {
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The other side refused, and says why.
    #[error("it sends no snapshot: {0}")]
    Refused(String),
    #[error("the snapshot's connection failed: {0}")]
    Connection(io::Error),
    #[error("{0}")]
    Invalid(String),
    #[error(transparent)]
    Store(#[from] SnapshotError),
}

impl From<io::Error> for FetchError {
    fn from(error: io::Error) -> Self {
        Self::Connection(error)
    }
}

/// What was fetched.
#[derive(Debug, PartialEq)]
pub struct Fetched {
    /// What describes it.
    pub manifest: Manifest,
    /// Bytes of the databases that this node had already, so that they were not sent.
    pub unchanged: u64,
}

/// Fetches all databases from `member`, which should be the primary. What this node has of them, the Console's in
/// `own`, is not sent again, whatever else is in these files; without `own`, all is sent. When this returns, the
/// snapshot is complete and durable in the data folder, and the next start installs it.
///
/// # Errors
/// [`FetchError::Open`] or [`FetchError::Connection`] when there is no connection, or it breaks.
/// [`FetchError::Refused`] with the member's reason when it sends none. [`FetchError::Invalid`] when what it sends
/// cannot be used. [`FetchError::Store`] when the disk is full or fails. Nothing has changed then, and another attempt
/// may succeed.
pub async fn fetch(
    identity: &PeerIdentity,
    member: &Member,
    data: &Path,
    own: Option<Arc<File>>,
    progress: impl FnMut(SyncProgress),
) -> Result<Fetched, FetchError> {
    let start = Instant::now();
    let attempt = async {
        let mut stream = open_stream(identity, member, Purpose::Snapshot).await?;
        let cluster = identity.roster.cluster();
        let forgotten = (identity.standing == Standing::Forgotten).then_some(identity.me);
        receive(&mut stream, (cluster, forgotten), data, own, progress).await
    };
    let result = attempt.await;
    match &result {
        Ok(Fetched { manifest, unchanged }) => {
            metrics::histogram!(SNAPSHOT_LATENCY, "direction" => "fetched").record(start.elapsed().as_secs_f64());
            metrics::counter!(SNAPSHOT_BYTES, "direction" => "fetched").increment(manifest.bytes() - unchanged);
            metrics::counter!(SNAPSHOT_UNCHANGED, "direction" => "fetched").increment(*unchanged);
        }
        Err(_) => metrics::counter!(SNAPSHOT_FAILURES, "direction" => "fetched").increment(1),
    }
    result
}

/// What the network's side passes to the disk's side.
enum Part {
    Chunk(u64, Vec<u8>),
    /// Checksum of the chunk, which of its pages differ from this node's own, and these pages.
    Changed(u64, Vec<u8>, Vec<u8>),
    End,
}

/// Receives one snapshot of this cluster. `forgotten` is this node's id if it is one that forgot.
pub(super) async fn receive(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    (cluster, forgotten): (ClusterId, Option<NodeId>),
    data: &Path,
    own: Option<Arc<File>>,
    mut progress: impl FnMut(SyncProgress),
) -> Result<Fetched, FetchError> {
    let (manifest, key) = begin(stream).await?;
    if manifest.membership.cluster != cluster {
        let theirs = manifest.membership.cluster;
        return Err(FetchError::Invalid(format!("the snapshot is of cluster {theirs}, and this is cluster {cluster}")));
    }
    if forgotten.is_some_and(|me| manifest.votes(me)) {
        return Err(FetchError::Invalid(
            "its snapshot says that this node has a vote: it forgot, and must not have one before it is installed"
                .to_owned(),
        ));
    }
    if let Some(why) = manifest.lacks(&known(data)?) {
        return Err(FetchError::Invalid(why));
    }
    let (course, total) = (Course::new(&manifest), manifest.bytes());
    let own = own.map(|console| Own::new(data, console, &manifest));
    let offer = key.map_or_else(Offer::none, |key| Offer::begin(own, &key, &manifest));
    let (parts, to_disk) = mpsc::channel(CHUNKS);
    let (give_back, empty) = mpsc::channel(CHUNKS + 2);
    let folder = data.to_owned();
    let storing = task::spawn_blocking(move || store(folder, manifest, (to_disk, offer.own), &give_back));
    let mut now = SyncProgress { total, ..SyncProgress::default() };
    let (mut from, mut to) = split(stream);
    let received = tokio::select! {
        received = pass_on(&mut from, course, (parts, empty), &mut now, &mut progress) => received,
        never = tell(offer.tags, &mut to) => match never {},
    };
    let stored = storing.await.map_err(io::Error::other)?;
    received?;
    progress(now);
    Ok(Fetched { manifest: stored?, unchanged: now.unchanged })
}

/// The manifest; with a key if the primary asks what this node has.
async fn begin(stream: &mut (impl AsyncRead + Unpin)) -> Result<(Manifest, Option<[u8; KEY]>), FetchError> {
    let (key, length) = match frame::read_head(stream, CHECKPOINT).await? {
        (frame::MANIFEST, length) => (None, length),
        (frame::ASK, length) => {
            let mut key = [0; KEY];
            frame::read(stream, &mut key).await?;
            (Some(key), length - KEY)
        }
        (frame::REFUSED, length) => return Err(refused(&content(stream, length).await?)),
        _ => return Err(FetchError::Invalid("the stream does not begin with a manifest".to_owned())),
    };
    let bytes = content(stream, length).await?;
    let invalid = |why| FetchError::Invalid(format!("its manifest cannot be read: {why}"));
    Ok((Manifest::decode(&bytes).map_err(invalid)?, key))
}

/// Passes on what arrives until the end, or until nobody takes it: then the disk's side has failed, and says why.
async fn pass_on(
    stream: &mut (impl AsyncRead + Unpin),
    mut course: Course,
    (parts, mut empty): (Sender<Part>, Receiver<Vec<u8>>),
    now: &mut SyncProgress,
    progress: &mut impl FnMut(SyncProgress),
) -> Result<(), FetchError> {
    let mut reported = Instant::now();
    progress(*now);
    loop {
        let (page, pages) =
            course.current().map_or((1, 0), |(_, record, done)| (record.page_size, chunk_pages(&record, done)));
        let part = next(stream, pages, &mut empty).await?;
        let end = matches!(part, Part::End);
        match &part {
            Part::Chunk(_, chunk) => {
                now.bytes += chunk.len() as u64;
                course.advance(chunk.len() as u32 / page);
            }
            Part::Changed(_, _, changed) => {
                let chunk = u64::from(pages) * u64::from(page);
                now.bytes += chunk;
                now.unchanged += chunk.saturating_sub(changed.len() as u64);
                course.advance(pages);
            }
            Part::End => {}
        }
        if parts.send(part).await.is_err() || end {
            return Ok(());
        }
        if reported.elapsed() >= REPORT {
            reported = Instant::now();
            progress(*now);
        }
    }
}

/// What comes next: a chunk has so many pages.
async fn next(
    stream: &mut (impl AsyncRead + Unpin),
    pages: u32,
    empty: &mut Receiver<Vec<u8>>,
) -> Result<Part, FetchError> {
    let (map, length) = match frame::read_head(stream, STALL).await? {
        (frame::CHUNK, length) => (None, length),
        (frame::CHANGED, length) => (Some(vec![0; map_bytes(pages)]), length),
        (frame::END, _) => return Ok(Part::End),
        (frame::REFUSED, length) => return Err(refused(&content(stream, length).await?)),
        _ => return Err(FetchError::Invalid("a second manifest arrived".to_owned())),
    };
    let mut sum = [0; 8];
    frame::read(stream, &mut sum).await?;
    let sum = u64::from_le_bytes(sum);
    let Some(mut map) = map else {
        return Ok(Part::Chunk(sum, recycled(stream, length - 8, empty).await?));
    };
    let Some(length) = (length - 8).checked_sub(map.len()).filter(|_| !map.is_empty()) else {
        return Err(FetchError::Invalid("it does not say which pages differ".to_owned()));
    };
    frame::read(stream, &mut map).await?;
    Ok(Part::Changed(sum, map, recycled(stream, length, empty).await?))
}

/// Reads into memory that the disk's side has given back.
async fn recycled(
    stream: &mut (impl AsyncRead + Unpin),
    length: usize,
    empty: &mut Receiver<Vec<u8>>,
) -> io::Result<Vec<u8>> {
    let mut bytes = empty.try_recv().unwrap_or_default();
    bytes.resize(length, 0);
    frame::read(stream, &mut bytes).await?;
    Ok(bytes)
}

async fn content(stream: &mut (impl AsyncRead + Unpin), length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    frame::read(stream, &mut bytes).await?;
    Ok(bytes)
}

fn refused(reason: &[u8]) -> FetchError {
    FetchError::Refused(String::from_utf8_lossy(reason).into_owned())
}

/// The disk's side. The snapshot is complete only if [`Part::End`] arrives.
fn store(
    data: PathBuf,
    manifest: Manifest,
    mut from: (Receiver<Part>, Receiver<Vec<u8>>),
    give_back: &Sender<Vec<u8>>,
) -> Result<Manifest, SnapshotError> {
    // An earlier attempt, whose connection broke, may still be busy with its last write.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = locked(&ONE);
    let result = write_parts(&data, manifest, &mut from, give_back);
    if result.is_err() {
        Incoming::abandon(&data);
    }
    result
}

/// Writes what arrives, and this node's `own` pages where none had to be sent. Both are verified alike.
fn write_parts(
    data: &Path,
    manifest: Manifest,
    (parts, own): &mut (Receiver<Part>, Receiver<Vec<u8>>),
    give_back: &Sender<Vec<u8>>,
) -> Result<Manifest, SnapshotError> {
    let mut incoming = Incoming::begin(data, manifest)?;
    while let Some(part) = parts.blocking_recv() {
        let bytes = match part {
            Part::Chunk(sum, bytes) => {
                incoming.push(sum, &bytes)?;
                bytes
            }
            Part::Changed(sum, map, pages) => {
                let unasked = || SnapshotError::Damaged("pages are missing that this node has not offered".to_owned());
                let mut chunk = own.blocking_recv().ok_or_else(unasked)?;
                let page_size = incoming.page_size().ok_or_else(unasked)?;
                patch(&mut chunk, page_size, &map, &pages).map_err(SnapshotError::Damaged)?;
                incoming.push(sum, &chunk)?;
                pages
            }
            Part::End => return incoming.finish(),
        };
        let _ = give_back.try_send(bytes); // it may not be needed any more
    }
    Err(SnapshotError::Damaged(format!("it broke off after {} bytes", incoming.bytes())))
}
