//! The primary's side: reads the resting database file, and sends it, on threads that leave the processor to whoever
//! commits. Must never hold up checkpoints for longer than the other side takes to receive the file.

use std::{
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    sync::mpsc::{self, Receiver, Sender},
    task::{self, JoinSet},
    time::sleep,
};
use tracing::{error, info, warn};

use super::{CHUNKS, REPORT, frame};
use crate::{
    cluster::NodeId,
    events::{Event, Kind, Recorder, Scope, Severity},
    node::{Handle, SyncProgress},
    peer::StreamCall,
    scheduling,
    storage::snapshot::{ClusterKey, Manifest, Resting},
    telemetry::{SNAPSHOT_BYTES, SNAPSHOT_FAILURES, SNAPSHOT_LATENCY},
};

/// Snapshots that are sent at the same time: two hosts may join together.
const AT_ONCE: usize = 2;
/// How long a request of a member that forgot waits until its vote has been taken away.
const DEMOTION: Duration = Duration::from_secs(5);

/// Answers requests for snapshots until no more can come. `data` is the data folder.
pub async fn serve(handle: Handle, events: Recorder, mut calls: Receiver<StreamCall>, data: PathBuf) {
    let mut running = JoinSet::new();
    while let Some(mut call) = calls.recv().await {
        while running.try_join_next().is_some() {}
        if running.len() < AT_ONCE {
            let (handle, events, data) = (handle.clone(), events.clone(), data.clone());
            running.spawn(async move {
                let sent = scheduling::apart("snapshot-send", || answer(handle, events, call, data)).await;
                if let Err(error) = sent {
                    warn!(%error, "the whole database is not sent: no thread for it");
                }
            });
        } else if refuse(&mut call.stream, "the database is being sent to other nodes: try again later").await.is_ok() {
            let _ = call.stream.shutdown().await;
        }
    }
}

async fn answer(handle: Handle, events: Recorder, call: StreamCall, data: PathBuf) {
    let StreamCall { from: peer, forgotten, mut stream } = call;
    let (manifest, resting) = match offer(&handle, &data, forgotten.then_some(peer)).await {
        Ok(offer) => offer,
        Err(why) => {
            info!(peer, reason = why, "refused to send the whole database to this node");
            // If this does not arrive, the other side sees that the connection ends.
            let _ = refuse(&mut stream, &why).await;
            let _ = stream.shutdown().await;
            return;
        }
    };
    let total = manifest.bytes();
    info!(peer, index = manifest.record.index, bytes = total, "sending the whole database to this node");
    let report = |bytes| handle.report_sync(peer, Some(SyncProgress { bytes, total }));
    let result = send(&mut stream, &manifest, resting, report).await;
    handle.report_sync(peer, None);
    // So that what has been sent arrives before the connection ends.
    let _ = stream.shutdown().await;
    conclude(&events, &handle.name(peer), peer, result);
}

/// Takes the checkpoint to send. A member that forgot must lose its vote first: that is under way when it asks.
async fn offer(handle: &Handle, data: &Path, forgotten: Option<NodeId>) -> Result<(Manifest, Resting), String> {
    let since = Instant::now();
    let (mut manifest, resting) = loop {
        match handle.snapshot(forgotten).await {
            Err(_) if forgotten.is_some() && since.elapsed() < DEMOTION => sleep(DEMOTION / 100).await,
            answer => break answer.map_err(|error| error.to_string())?,
        }
    };
    // Reads a small file that is in the page cache: not worth a thread.
    manifest.cluster_key =
        ClusterKey::read(data).map_err(|error| format!("its cluster key cannot be read: {error}"))?;
    Ok((manifest, resting))
}

fn conclude(events: &Recorder, name: &str, peer: NodeId, result: io::Result<Sent>) {
    match result {
        Ok(Sent { bytes, seconds }) => {
            info!(peer, bytes, ms = (seconds * 1e3) as u64, "the whole database was sent to this node");
            let sentence = format!("the whole database was sent to {name} ({bytes} bytes in {seconds:.1} s)");
            let event = Event::new(Kind::Snapshot, Severity::Info, sentence).scope(Scope::Cluster);
            events.record(event.field("member", name).field("bytes", bytes));
            metrics::histogram!(SNAPSHOT_LATENCY, "direction" => "sent").record(seconds);
            metrics::counter!(SNAPSHOT_BYTES, "direction" => "sent").increment(bytes);
        }
        Err(error) => {
            warn!(peer, %error, "the whole database could not be sent to this node; it asks again");
            metrics::counter!(SNAPSHOT_FAILURES, "direction" => "sent").increment(1);
        }
    }
}

/// What was sent.
#[derive(Debug)]
pub(super) struct Sent {
    pub bytes: u64,
    pub seconds: f64,
}

/// Sends one snapshot. If the file stops resting, the other side is told why the snapshot breaks off.
pub(super) async fn send(
    stream: &mut (impl AsyncWrite + Unpin),
    manifest: &Manifest,
    resting: Resting,
    report: impl Fn(u64),
) -> io::Result<Sent> {
    let start = Instant::now();
    report(0);
    frame::write(stream, frame::MANIFEST, &manifest.encode(), &[]).await?;
    let (chunks, mut ready) = mpsc::channel(CHUNKS);
    let (give_back, empty) = mpsc::channel(CHUNKS + 2);
    let reading = task::spawn_blocking(move || read(&resting, &chunks, empty));
    let (mut bytes, mut reported) = (0, start);
    while let Some((sum, chunk)) = ready.recv().await {
        let chunk: Vec<u8> = chunk;
        frame::write(stream, frame::CHUNK, &u64::to_le_bytes(sum), &chunk).await?;
        bytes += chunk.len() as u64;
        let _ = give_back.try_send(chunk); // the reader may be done, and need no more memory
        if reported.elapsed() >= REPORT {
            reported = Instant::now();
            report(bytes);
        }
    }
    let read = reading.await.map_err(io::Error::other)?;
    if let Err(error) = read {
        refuse(stream, &error.to_string()).await?;
        return Err(error);
    }
    frame::write(stream, frame::END, &[], &[]).await?;
    Ok(Sent { bytes, seconds: start.elapsed().as_secs_f64() })
}

/// Reads the whole file in chunks. Ends early when nobody takes them any more.
fn read(resting: &Resting, chunks: &Sender<(u64, Vec<u8>)>, mut empty: Receiver<Vec<u8>>) -> io::Result<()> {
    let record = resting.record();
    let (mut done, mut checksum) = (0, 0);
    while done < record.pages {
        let mut bytes = empty.try_recv().unwrap_or_default();
        let sum = resting.read(done, &mut bytes).map_err(|error| match error.kind() {
            ErrorKind::Interrupted => io::Error::new(ErrorKind::Interrupted, format!("try again: {error}")),
            _ => io::Error::new(error.kind(), format!("its database file cannot be read: {error}")),
        })?;
        done += bytes.len() as u32 / record.page_size;
        checksum ^= sum;
        if chunks.blocking_send((sum, bytes)).is_err() {
            return Err(io::Error::new(ErrorKind::BrokenPipe, "the connection is gone"));
        }
    }
    if checksum != record.checksum {
        error!(
            index = record.index,
            "this primary's database file does not have the checksum of its checkpoint: switch over to another member"
        );
        return Err(io::Error::new(ErrorKind::InvalidData, "its own database file is damaged"));
    }
    Ok(())
}

async fn refuse(stream: &mut (impl AsyncWrite + Unpin), why: &str) -> io::Result<()> {
    let end = why.floor_char_boundary(frame::MAX_REASON);
    frame::write(stream, frame::REFUSED, &why.as_bytes()[..end], &[]).await
}
