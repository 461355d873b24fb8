//! The primary's side: reads the resting databases, and sends them, on threads that leave the processor to whoever
//! commits. Must never hold up checkpoints for longer than the other side takes to receive them.

use std::{
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy, sink, split},
    sync::mpsc::{self, Receiver, Sender},
    task::{self, JoinSet},
    time::{sleep, timeout},
};
use tracing::{error, info, warn};

use super::{CHUNKS, REPORT, STALL, frame};
use crate::{
    cluster::NodeId,
    events::{Event, Kind, Recorder, Scope, Severity},
    node::{Handle, SyncProgress},
    peer::StreamCall,
    scheduling,
    storage::snapshot::{
        ClusterKey, Course, Manifest, Resting, Whole,
        difference::{KEY, Tagger, chunk_pages},
    },
    telemetry::{SNAPSHOT_BYTES, SNAPSHOT_FAILURES, SNAPSHOT_LATENCY, SNAPSHOT_UNCHANGED},
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
    let StreamCall { from: peer, forgotten, compares, mut stream } = call;
    let (manifest, whole) = match offer(&handle, &data, forgotten.then_some(peer)).await {
        Ok(offer) => offer,
        Err(why) => {
            info!(peer, reason = why, "refused to send the whole database to this node");
            // If this does not arrive, the other side sees that the connection ends.
            let _ = refuse(&mut stream, &why).await;
            let _ = stream.shutdown().await;
            return;
        }
    };
    info!(peer, index = manifest.record.index, bytes = manifest.bytes(), "sending the whole database to this node");
    let report = |progress| handle.report_sync(peer, Some(progress));
    let result = send(&mut stream, &manifest, whole, compares, report).await;
    handle.report_sync(peer, None);
    // So that what has been sent arrives before the connection ends: it would be lost if something were left unread.
    let _ = stream.shutdown().await;
    if compares {
        let _ = timeout(STALL, copy(&mut stream, &mut sink())).await;
    }
    conclude(&events, &handle.name(peer), peer, result);
}

/// Takes the checkpoint to send. A member that forgot must lose its vote first: that is under way when it asks.
async fn offer(handle: &Handle, data: &Path, forgotten: Option<NodeId>) -> Result<(Manifest, Arc<Whole>), String> {
    let since = Instant::now();
    let (mut manifest, whole) = loop {
        match handle.snapshot(forgotten).await {
            Err(_) if forgotten.is_some() && since.elapsed() < DEMOTION => sleep(DEMOTION / 100).await,
            answer => break answer.map_err(|error| error.to_string())?,
        }
    };
    // Reads a small file that is in the page cache: not worth a thread.
    manifest.cluster_key =
        ClusterKey::read(data).map_err(|error| format!("its cluster key cannot be read: {error}"))?;
    Ok((manifest, whole))
}

fn conclude(events: &Recorder, name: &str, peer: NodeId, result: io::Result<Sent>) {
    match result {
        Ok(Sent { bytes, unchanged, seconds }) => {
            let ms = (seconds * 1e3) as u64;
            info!(peer, bytes, unchanged, ms, "the whole database was sent to this node");
            let had = if unchanged > 0 { format!("; it had the other {unchanged} bytes") } else { String::new() };
            let sentence = format!("the whole database was sent to {name} ({bytes} bytes in {seconds:.1} s{had})");
            let event = Event::new(Kind::Snapshot, Severity::Info, sentence).scope(Scope::Cluster);
            events.record(event.field("member", name).field("bytes", bytes).field("unchanged", unchanged));
            metrics::histogram!(SNAPSHOT_LATENCY, "direction" => "sent").record(seconds);
            metrics::counter!(SNAPSHOT_BYTES, "direction" => "sent").increment(bytes);
            metrics::counter!(SNAPSHOT_UNCHANGED, "direction" => "sent").increment(unchanged);
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
    /// Bytes that the other side had.
    pub unchanged: u64,
    pub seconds: f64,
}

/// Sends one snapshot; only what the other side does not have, if it `compares`. If the file stops resting, the other
/// side is told why the snapshot breaks off.
pub(super) async fn send(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    manifest: &Manifest,
    whole: Arc<Whole>,
    compares: bool,
    report: impl Fn(SyncProgress),
) -> io::Result<Sent> {
    let (start, course, total) = (Instant::now(), Course::new(manifest), manifest.bytes());
    report(SyncProgress { total, ..SyncProgress::default() });
    let (mut from, mut to) = split(stream);
    let key: Option<[u8; KEY]> = compares.then(rand::random);
    match &key {
        Some(key) => frame::write(&mut to, frame::ASK, key, &manifest.encode()).await?,
        None => frame::write(&mut to, frame::MANIFEST, &manifest.encode(), &[]).await?,
    }
    let (heard, tags) = mpsc::channel(CHUNKS);
    let (pieces, ready) = mpsc::channel(CHUNKS);
    let (give_back, empty) = mpsc::channel(CHUNKS + 2);
    let comparing = key.map(|key| (Tagger::new(&key), tags));
    let reading = task::spawn_blocking(move || read(&whole, comparing, &pieces, empty));
    let hearing = async {
        match compares {
            true => hear(&mut from, course, heard).await,
            false => Ok(()),
        }
    };
    let saying = async {
        let now = say(&mut to, ready, &give_back, (total, &report)).await?;
        if let Err(error) = reading.await.map_err(io::Error::other)? {
            refuse(&mut to, &error.to_string()).await?;
            return Err(error);
        }
        frame::write(&mut to, frame::END, &[], &[]).await?;
        Ok(now)
    };
    let ((), SyncProgress { bytes, unchanged, .. }) = tokio::try_join!(hearing, saying)?;
    Ok(Sent { bytes: bytes - unchanged, unchanged, seconds: start.elapsed().as_secs_f64() })
}

/// Hands on what the other side says it has, until it has said all. Whoever reads the file may have no use for it any
/// more.
async fn hear(stream: &mut (impl AsyncRead + Unpin), mut course: Course, heard: Sender<Vec<u8>>) -> io::Result<()> {
    while let Some((_, record, done)) = course.current() {
        let (frame::TAGS, length) = frame::read_head(stream, STALL).await? else {
            return Err(io::Error::new(ErrorKind::InvalidData, "it does not say what it has"));
        };
        let mut tags = vec![0; length];
        frame::read(stream, &mut tags).await?;
        match length {
            0 => course.skip(),
            _ => course.advance(chunk_pages(&record, done)),
        }
        if heard.send(tags).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// Sends the pieces, as long as there are any.
async fn say(
    stream: &mut (impl AsyncWrite + Unpin),
    mut ready: Receiver<Piece>,
    give_back: &Sender<Vec<u8>>,
    (total, report): (u64, &impl Fn(SyncProgress)),
) -> io::Result<SyncProgress> {
    let mut now = SyncProgress { total, ..SyncProgress::default() };
    let mut reported = Instant::now();
    while let Some(Piece { kind, head, bytes, unchanged }) = ready.recv().await {
        frame::write(stream, kind, &head, &bytes).await?;
        now.bytes += bytes.len() as u64 + unchanged;
        now.unchanged += unchanged;
        let _ = give_back.try_send(bytes); // the reader may be done, and need no more memory
        if reported.elapsed() >= REPORT {
            reported = Instant::now();
            report(now);
        }
    }
    Ok(now)
}

/// A chunk, or what the other side lacks of it.
struct Piece {
    kind: u8,
    head: Vec<u8>,
    bytes: Vec<u8>,
    /// Bytes of the chunk that it has.
    unchanged: u64,
}

/// Reads all databases, one after the other. Ends early when nobody takes them any more.
fn read(
    whole: &Whole,
    mut comparing: Option<(Tagger, Receiver<Vec<u8>>)>,
    pieces: &Sender<Piece>,
    mut empty: Receiver<Vec<u8>>,
) -> io::Result<()> {
    whole.all().try_for_each(|resting| read_one(resting, comparing.as_mut(), pieces, &mut empty))
}

/// Reads a whole database in chunks, and compares them with what the other side has.
fn read_one(
    resting: &Resting,
    mut comparing: Option<&mut (Tagger, Receiver<Vec<u8>>)>,
    pieces: &Sender<Piece>,
    empty: &mut Receiver<Vec<u8>>,
) -> io::Result<()> {
    let gone = || io::Error::new(ErrorKind::BrokenPipe, "the connection is gone");
    let record = resting.record();
    let (mut done, mut checksum) = (0, 0);
    while done < record.pages {
        let mut bytes = empty.try_recv().unwrap_or_default();
        let sum = resting.read(done, &mut bytes).map_err(|error| match error.kind() {
            ErrorKind::Interrupted => io::Error::new(ErrorKind::Interrupted, format!("try again: {error}")),
            _ => io::Error::new(error.kind(), format!("its database file cannot be read: {error}")),
        })?;
        let whole = bytes.len();
        let (mut kind, mut head) = (frame::CHUNK, sum.to_le_bytes().to_vec());
        if let Some((tagger, tags)) = comparing.as_deref_mut() {
            let theirs = tags.blocking_recv().ok_or_else(gone)?;
            if theirs.is_empty() {
                // It has no more of this database.
                comparing = None;
            } else {
                let map = tagger.keep_different(done, record.page_size, &theirs, &mut bytes);
                head.extend(
                    map.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "it has chunks of another size"))?,
                );
                kind = frame::CHANGED;
            }
        }
        done += whole as u32 / record.page_size;
        checksum ^= sum;
        let unchanged = (whole - bytes.len()) as u64;
        pieces.blocking_send(Piece { kind, head, bytes, unchanged }).map_err(|_| gone())?;
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
