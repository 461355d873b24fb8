//! Both sides of a snapshot's stream, connected by a pipe, and everything that can go wrong on it.

use std::{path::Path, sync::Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::{
    FetchError,
    fetch::receive,
    frame,
    serve::{Sent, send},
};
use crate::{
    cluster::ClusterId,
    storage::snapshot::{
        Manifest, Ready, Resting, SnapshotError,
        tests::{manifest, resting},
    },
};

/// About 10 MB: more than the pipe and both sides hold in memory.
const PAGES: u32 = 20_000;

async fn pass(
    resting: Resting,
    manifest: &Manifest,
    data: &Path,
) -> (std::io::Result<Sent>, Result<Manifest, FetchError>) {
    let (mut from, mut to) = duplex(1 << 16);
    let sending = async {
        let result = send(&mut from, manifest, resting, |_| ()).await;
        drop(from);
        result
    };
    let receiving = async {
        let result = receive(&mut to, (ClusterId(7), None), data, |_| ()).await;
        drop(to);
        result
    };
    tokio::join!(sending, receiving)
}

fn nothing_is_ready(data: &Path) {
    assert!(Ready::find(data).unwrap().is_none());
}

#[tokio::test]
async fn a_database_arrives_whole() {
    let data = tempfile::tempdir().unwrap();
    let (resting, hold, image) = resting(1, PAGES, 40);
    let manifest = manifest(resting.record(), 3);
    let (mut from, mut to) = duplex(1 << 16);
    let (sent, seen) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let sending = send(&mut from, &manifest, resting, |bytes| sent.lock().unwrap().push(bytes));
    let receiving = receive(&mut to, (ClusterId(7), None), data.path(), |progress| seen.lock().unwrap().push(progress));
    let (sending, receiving) = tokio::join!(sending, receiving);
    assert_eq!(sending.unwrap().bytes, image.len() as u64);
    assert_eq!(receiving.unwrap(), manifest);
    assert!(!hold.is_wanted(), "the file is free again");
    let ready = Ready::find(data.path()).unwrap().unwrap();
    assert_eq!(ready.manifest(), &manifest);
    assert!(std::fs::read(data.path().join("snapshot.ready/console.db")).unwrap() == image);
    assert!(sent.lock().unwrap().is_sorted());
    let last = *seen.lock().unwrap().last().unwrap();
    assert_eq!((last.bytes, last.total), (image.len() as u64, image.len() as u64));
}

#[tokio::test]
async fn a_broken_hold_ends_the_stream_on_both_sides() {
    let data = tempfile::tempdir().unwrap();
    let (resting, hold, _) = resting(1, PAGES, 40);
    let manifest = manifest(resting.record(), 3);
    let (mut from, mut to) = duplex(1 << 16);
    let sending = async {
        let result = send(&mut from, &manifest, resting, |_| ()).await;
        drop(from);
        result
    };
    // Progress is reported before the first chunk: most of the file has not been read then.
    let receiving = receive(&mut to, (ClusterId(7), None), data.path(), |_| hold.break_off());
    let (sending, receiving) = tokio::join!(sending, receiving);
    assert!(sending.unwrap_err().to_string().contains("try again"));
    assert!(matches!(receiving, Err(FetchError::Refused(why)) if why.contains("try again")));
    nothing_is_ready(data.path());
}

#[tokio::test]
async fn a_file_that_is_not_what_its_checkpoint_says_is_never_complete() {
    let data = tempfile::tempdir().unwrap();
    let (good, ..) = resting(1, PAGES, 40);
    let mut wrong = manifest(good.record(), 3);
    wrong.record.checksum ^= 1;
    let (_, received) = pass(good, &wrong, data.path()).await;
    assert!(matches!(received, Err(FetchError::Store(SnapshotError::Damaged(_)))), "{received:?}");
    nothing_is_ready(data.path());
}

/// The bytes of a whole stream.
async fn recorded(pages: u32) -> (Manifest, Vec<u8>) {
    let (resting, ..) = resting(1, pages, 40);
    let manifest = manifest(resting.record(), 3);
    let (mut from, mut to) = duplex(64 << 20);
    send(&mut from, &manifest, resting, |_| ()).await.unwrap();
    drop(from);
    let mut bytes = Vec::new();
    to.read_to_end(&mut bytes).await.unwrap();
    (manifest, bytes)
}

async fn replay(bytes: &[u8], cluster: ClusterId, data: &Path) -> Result<Manifest, FetchError> {
    let (mut from, mut to): (DuplexStream, DuplexStream) = duplex(1 << 16);
    let sending = async {
        let result = from.write_all(bytes).await;
        drop(from);
        result
    };
    let receiving = async {
        let result = receive(&mut to, (cluster, None), data, |_| ()).await;
        drop(to);
        result
    };
    tokio::join!(sending, receiving).1
}

#[tokio::test]
async fn a_stream_that_ends_early_or_is_changed_leaves_nothing() {
    let data = tempfile::tempdir().unwrap();
    let (manifest, bytes) = recorded(5000).await;
    assert_eq!(replay(&bytes, ClusterId(7), data.path()).await.unwrap(), manifest);
    let data = tempfile::tempdir().unwrap();
    let error = replay(&bytes, ClusterId(8), data.path()).await.unwrap_err();
    assert!(error.to_string().contains("of cluster"), "{error}");
    let begin = 5 + manifest.encode().len();
    for length in [0, 3, begin - 1, begin, begin + 4, begin + 13, begin + (1 << 20), bytes.len() - 6, bytes.len() - 1] {
        assert!(replay(&bytes[..length], ClusterId(7), data.path()).await.is_err(), "{length} bytes");
        nothing_is_ready(data.path());
    }
    // Kinds, lengths, a checksum, content.
    for at in [0, 1, 4, begin, begin + 1, begin + 4, begin + 5, begin + 13, begin + 99_999, bytes.len() - 5] {
        let mut changed = bytes.clone();
        changed[at] ^= 0x40;
        assert!(replay(&changed, ClusterId(7), data.path()).await.is_err(), "byte {at}");
        nothing_is_ready(data.path());
    }
}

#[tokio::test]
async fn frames_have_limits() {
    for (kind, length) in
        [(frame::MANIFEST, u32::MAX), (frame::CHUNK, (1 << 20) + 9), (frame::CHUNK, 8), (frame::END, 1), (9, 0)]
    {
        let mut head = vec![kind];
        head.extend_from_slice(&length.to_le_bytes());
        assert!(frame::read_head(&mut &head[..], super::STALL).await.is_err(), "kind {kind} with {length} bytes");
    }
}
