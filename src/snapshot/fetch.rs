//! The receiving side: receives a snapshot from the primary into its staging folder. Must never leave anything behind
//! that counts unless the whole snapshot has arrived and is durable.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use thiserror::Error;
use tokio::{
    io::AsyncRead,
    sync::mpsc::{self, Receiver, Sender},
    task,
};

use super::{CHUNKS, REPORT, STALL, frame};
use crate::{
    cluster::{ClusterId, Member, NodeId, reach::Standing},
    mutex::locked,
    node::SyncProgress,
    peer::{OpenError, PeerIdentity, Purpose, open_stream},
    storage::snapshot::{Incoming, Manifest, SnapshotError},
    telemetry::{SNAPSHOT_BYTES, SNAPSHOT_FAILURES, SNAPSHOT_LATENCY},
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

/// Fetches the whole database from `member`, which should be the primary. When this returns, the snapshot is complete
/// and durable in the data folder, and the next start installs it.
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
    progress: impl FnMut(SyncProgress),
) -> Result<Manifest, FetchError> {
    let start = Instant::now();
    let attempt = async {
        let mut stream = open_stream(identity, member, Purpose::Snapshot).await?;
        let cluster = identity.roster.cluster();
        let forgotten = (identity.standing == Standing::Forgotten).then_some(identity.me);
        receive(&mut stream, (cluster, forgotten), data, progress).await
    };
    let result = attempt.await;
    match &result {
        Ok(manifest) => {
            metrics::histogram!(SNAPSHOT_LATENCY, "direction" => "fetched").record(start.elapsed().as_secs_f64());
            metrics::counter!(SNAPSHOT_BYTES, "direction" => "fetched").increment(manifest.bytes());
        }
        Err(_) => metrics::counter!(SNAPSHOT_FAILURES, "direction" => "fetched").increment(1),
    }
    result
}

/// What the network's side passes to the disk's side.
enum Part {
    Chunk(u64, Vec<u8>),
    End,
}

/// Receives one snapshot of this cluster. `forgotten` is this node's id if it is one that forgot.
pub(super) async fn receive(
    stream: &mut (impl AsyncRead + Unpin),
    (cluster, forgotten): (ClusterId, Option<NodeId>),
    data: &Path,
    mut progress: impl FnMut(SyncProgress),
) -> Result<Manifest, FetchError> {
    let manifest = match frame::read_head(stream, CHECKPOINT).await? {
        (frame::MANIFEST, length) => {
            let bytes = content(stream, length).await?;
            let invalid = |why| FetchError::Invalid(format!("its manifest cannot be read: {why}"));
            Manifest::decode(&bytes).map_err(invalid)?
        }
        (frame::REFUSED, length) => return Err(refused(&content(stream, length).await?)),
        _ => return Err(FetchError::Invalid("the stream does not begin with a manifest".to_owned())),
    };
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
    let total = manifest.bytes();
    let (parts, to_disk) = mpsc::channel(CHUNKS);
    let (give_back, mut empty) = mpsc::channel(CHUNKS + 2);
    let folder = data.to_owned();
    let storing = task::spawn_blocking(move || store(folder, manifest, to_disk, &give_back));
    let (mut bytes, mut reported) = (0, Instant::now());
    progress(SyncProgress { bytes, total });
    let received = loop {
        let part = match next(stream, &mut empty).await {
            Ok(part) => part,
            Err(error) => break Err(error),
        };
        let end = matches!(part, Part::End);
        if let Part::Chunk(_, chunk) = &part {
            bytes += chunk.len() as u64;
        }
        // If nobody takes it, the disk's side has failed. It says why below.
        if parts.send(part).await.is_err() || end {
            break Ok(());
        }
        if reported.elapsed() >= REPORT {
            reported = Instant::now();
            progress(SyncProgress { bytes, total });
        }
    };
    drop(parts);
    let stored = storing.await.map_err(io::Error::other)?;
    received?;
    progress(SyncProgress { bytes, total });
    Ok(stored?)
}

async fn next(stream: &mut (impl AsyncRead + Unpin), empty: &mut Receiver<Vec<u8>>) -> Result<Part, FetchError> {
    match frame::read_head(stream, STALL).await? {
        (frame::CHUNK, length) => {
            let mut sum = [0; 8];
            frame::read(stream, &mut sum).await?;
            let mut bytes = empty.try_recv().unwrap_or_default();
            bytes.resize(length - sum.len(), 0);
            frame::read(stream, &mut bytes).await?;
            Ok(Part::Chunk(u64::from_le_bytes(sum), bytes))
        }
        (frame::END, _) => Ok(Part::End),
        (frame::REFUSED, length) => Err(refused(&content(stream, length).await?)),
        _ => Err(FetchError::Invalid("a second manifest arrived".to_owned())),
    }
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
    mut parts: Receiver<Part>,
    give_back: &Sender<Vec<u8>>,
) -> Result<Manifest, SnapshotError> {
    // An earlier attempt, whose connection broke, may still be busy with its last write.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = locked(&ONE);
    let result = write_parts(&data, manifest, &mut parts, give_back);
    if result.is_err() {
        Incoming::abandon(&data);
    }
    result
}

fn write_parts(
    data: &Path,
    manifest: Manifest,
    parts: &mut Receiver<Part>,
    give_back: &Sender<Vec<u8>>,
) -> Result<Manifest, SnapshotError> {
    let mut incoming = Incoming::begin(data, manifest)?;
    while let Some(part) = parts.blocking_recv() {
        match part {
            Part::Chunk(sum, bytes) => {
                incoming.push(sum, &bytes)?;
                let _ = give_back.try_send(bytes); // it may not be needed any more
            }
            Part::End => return incoming.finish(),
        }
    }
    Err(SnapshotError::Damaged(format!("it broke off after {} bytes", incoming.bytes())))
}
