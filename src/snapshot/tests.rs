//! Both sides of a snapshot's stream, connected by a pipe, and everything that can go wrong on it.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path, sync::Arc, sync::Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, copy, duplex, split};

use super::{
    FetchError, Fetched,
    fetch::receive,
    frame,
    serve::{Sent, send},
};
use crate::{
    cluster::ClusterId,
    storage::snapshot::{
        CHUNK, Manifest, Ready, Resting, SnapshotError, Whole, chunk_checksum,
        difference::KEY,
        tests::{manifest, resting, with_service},
    },
};

/// About 10 MB: more than the pipe and both sides hold in memory.
const PAGES: u32 = 20_000;

fn of_console(resting: Resting) -> Arc<Whole> {
    Arc::new(Whole::of_console(resting))
}

type Passed = (io::Result<Sent>, Result<Fetched, FetchError>);

/// Passes a snapshot to a node that has `own`, on streams of its own for each direction.
async fn pass_between(
    (mut from, mut to): (DuplexStream, DuplexStream),
    (whole, manifest): (Arc<Whole>, &Manifest),
    data: &Path,
    own: Option<Arc<File>>,
) -> Passed {
    let compares = own.is_some();
    let sending = async {
        let result = send(&mut from, manifest, whole, compares, |_| ()).await;
        drop(from);
        result
    };
    let receiving = async {
        let result = receive(&mut to, (ClusterId(7), None), data, own, |_| ()).await;
        drop(to);
        result
    };
    tokio::join!(sending, receiving)
}

async fn pass(resting: Resting, manifest: &Manifest, data: &Path, own: Option<Arc<File>>) -> Passed {
    pass_between(duplex(1 << 16), (of_console(resting), manifest), data, own).await
}

fn file_of(bytes: &[u8]) -> Option<Arc<File>> {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    Some(Arc::new(file))
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
    let sending =
        send(&mut from, &manifest, of_console(resting), false, |progress| sent.lock().unwrap().push(progress.bytes));
    // What this node has does not matter to a program that does not ask.
    let (own, notice) = (file_of(&image), |progress| seen.lock().unwrap().push(progress));
    let receiving = receive(&mut to, (ClusterId(7), None), data.path(), own, notice);
    let (sending, receiving) = tokio::join!(sending, receiving);
    assert_eq!(sending.unwrap().bytes, image.len() as u64);
    assert_eq!(receiving.unwrap(), Fetched { manifest: manifest.clone(), unchanged: 0 });
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
    let (resting, hold, image) = resting(1, PAGES, 40);
    let manifest = manifest(resting.record(), 3);
    let (mut from, mut to) = duplex(1 << 16);
    let sending = async {
        let result = send(&mut from, &manifest, of_console(resting), true, |_| ()).await;
        drop(from);
        result
    };
    // Progress is reported before the first chunk: most of the file has not been read then.
    let receiving = receive(&mut to, (ClusterId(7), None), data.path(), file_of(&image), |_| hold.break_off());
    let (sending, receiving) = tokio::join!(sending, receiving);
    assert!(sending.unwrap_err().to_string().contains("try again"));
    assert!(matches!(receiving, Err(FetchError::Refused(why)) if why.contains("try again")));
    nothing_is_ready(data.path());
}

#[tokio::test]
async fn a_file_that_is_not_what_its_checkpoint_says_is_never_complete() {
    let data = tempfile::tempdir().unwrap();
    for compares in [false, true] {
        let (good, _, image) = resting(1, PAGES, 40);
        let mut wrong = manifest(good.record(), 3);
        wrong.record.checksum ^= 1;
        let own = file_of(&image).filter(|_| compares);
        let (_, received) = pass(good, &wrong, data.path(), own).await;
        assert!(matches!(received, Err(FetchError::Store(SnapshotError::Damaged(_)))), "{received:?}");
        nothing_is_ready(data.path());
    }
}

/// The bytes of a whole stream.
async fn recorded(pages: u32) -> (Manifest, Vec<u8>) {
    let (resting, ..) = resting(1, pages, 40);
    let manifest = manifest(resting.record(), 3);
    let (mut from, mut to) = duplex(64 << 20);
    send(&mut from, &manifest, of_console(resting), false, |_| ()).await.unwrap();
    drop(from);
    let mut bytes = Vec::new();
    to.read_to_end(&mut bytes).await.unwrap();
    (manifest, bytes)
}

async fn replay(bytes: &[u8], cluster: ClusterId, data: &Path, own: Option<Arc<File>>) -> Result<Manifest, FetchError> {
    let (mut from, mut to): (DuplexStream, DuplexStream) = duplex(1 << 16);
    let sending = async {
        let result = from.write_all(bytes).await;
        drop(from);
        result
    };
    let receiving = async {
        let result = receive(&mut to, (cluster, None), data, own, |_| ()).await;
        drop(to);
        result
    };
    tokio::join!(sending, receiving).1.map(|fetched| fetched.manifest)
}

#[tokio::test]
async fn a_stream_that_ends_early_or_is_changed_leaves_nothing() {
    let data = tempfile::tempdir().unwrap();
    let (manifest, bytes) = recorded(5000).await;
    assert_eq!(replay(&bytes, ClusterId(7), data.path(), None).await.unwrap(), manifest);
    let data = tempfile::tempdir().unwrap();
    let error = replay(&bytes, ClusterId(8), data.path(), None).await.unwrap_err();
    assert!(error.to_string().contains("of cluster"), "{error}");
    let begin = 5 + manifest.encode().len();
    for length in [0, 3, begin - 1, begin, begin + 4, begin + 13, begin + (1 << 20), bytes.len() - 6, bytes.len() - 1] {
        assert!(replay(&bytes[..length], ClusterId(7), data.path(), None).await.is_err(), "{length} bytes");
        nothing_is_ready(data.path());
    }
    // Kinds, lengths, a checksum, content.
    for at in [0, 1, 4, begin, begin + 1, begin + 4, begin + 5, begin + 13, begin + 99_999, bytes.len() - 5] {
        let mut changed = bytes.clone();
        changed[at] ^= 0x40;
        assert!(replay(&changed, ClusterId(7), data.path(), None).await.is_err(), "byte {at}");
        nothing_is_ready(data.path());
    }
}

#[tokio::test]
async fn frames_have_limits() {
    for (kind, length) in [
        (frame::MANIFEST, u32::MAX),
        (frame::CHUNK, (1 << 20) + 9),
        (frame::CHUNK, 8),
        (frame::END, 1),
        (frame::ASK, KEY as u32 - 1),
        (frame::TAGS, 8 * 2048 + 1),
        (frame::CHANGED, (1 << 20) + 8 + 256 + 1),
        (frame::CHANGED, 8),
        (9, 0),
    ] {
        let mut head = vec![kind];
        head.extend_from_slice(&length.to_le_bytes());
        assert!(frame::read_head(&mut &head[..], super::STALL).await.is_err(), "kind {kind} with {length} bytes");
    }
}

/// What a node may have when it needs a database, and the most pages that it has to be sent.
fn own_copies(image: &[u8]) -> Vec<(&'static str, Vec<u8>, usize)> {
    let changed = |pages: &[usize]| {
        let mut own = image.to_vec();
        pages.iter().for_each(|page| own[page * 512 + 7] ^= 1);
        own
    };
    let mut shifted = vec![9];
    shifted.extend_from_slice(image);
    let all = image.len() / 512;
    // From the first page that is missing on, to the end.
    let shorter = |length: usize| (image[..length].to_vec(), all - length / 512);
    let ((cut, cut_pages), (torn, torn_pages)) = (shorter(CHUNK), shorter(3 * CHUNK + 700));
    vec![
        ("the same", image.to_vec(), 0),
        ("a flipped bit in the first page", changed(&[0]), 1),
        ("some old pages", changed(&[1, 2047, 2048, 9999, all - 1]), 5),
        ("a database that has grown", cut, cut_pages),
        ("a torn end", torn, torn_pages),
        ("a database that has shrunk", [image, &[5; 3 << 20]].concat(), 0),
        ("nothing", Vec::new(), all),
        ("zeros", vec![0; image.len()], all),
        ("another content, as of another size of pages", shifted, all),
    ]
}

#[tokio::test]
async fn only_pages_that_the_receiver_does_not_have_are_sent() {
    let (_, _, image) = resting(1, PAGES, 40);
    for (what, own, most) in own_copies(&image) {
        let data = tempfile::tempdir().unwrap();
        let (resting, ..) = resting(1, PAGES, 40);
        let manifest = manifest(resting.record(), 3);
        let (sent, fetched) = pass(resting, &manifest, data.path(), file_of(&own)).await;
        let (sent, fetched) = (sent.unwrap(), fetched.unwrap());
        assert!(sent.bytes <= most as u64 * 512, "{what}: {sent:?}");
        assert_eq!(sent.bytes + sent.unchanged, image.len() as u64, "{what}");
        assert_eq!(fetched, Fetched { manifest: manifest.clone(), unchanged: sent.unchanged }, "{what}");
        let stored = std::fs::read(data.path().join("snapshot.ready/console.db")).unwrap();
        assert!(stored == image, "{what}");
        assert_eq!(Ready::find(data.path()).unwrap().unwrap().manifest(), &manifest);
    }
}

#[tokio::test]
async fn a_file_that_changes_meanwhile_does_no_harm() {
    let (data, (resting, _, image)) = (tempfile::tempdir().unwrap(), resting(1, PAGES, 40));
    let (manifest, own) = (manifest(resting.record(), 3), file_of(&image).unwrap());
    let (mut from, mut to) = duplex(1 << 12);
    let sending = send(&mut from, &manifest, of_console(resting), true, |_| ());
    let spoil = own.clone();
    let receiving = receive(&mut to, (ClusterId(7), None), data.path(), Some(own), |_| {
        (0..PAGES as u64).step_by(3).for_each(|page| spoil.write_all_at(b"rot", page * 512).unwrap());
    });
    let (_, fetched) = tokio::join!(sending, receiving);
    assert_eq!(fetched.unwrap().manifest, manifest);
    assert!(std::fs::read(data.path().join("snapshot.ready/console.db")).unwrap() == image);
}

/// Passes a snapshot of which only the pages arrive that differ, and changes what the sender says at one place, or ends
/// it there. Returns also how long it was.
async fn pass_through(data: &Path, own: &[u8], limit: usize, change: Option<usize>) -> (Passed, usize) {
    let (resting, ..) = resting(1, 5000, 40);
    let manifest = manifest(resting.record(), 3);
    let ((from, near), (far, to)) = (duplex(1 << 16), duplex(1 << 16));
    let relaying = async {
        let ((mut said, mut answers), (mut asks, mut hears)) = (split(near), split(far));
        let forth = async {
            let (mut length, mut byte) = (0, [0]);
            while length < limit && said.read_exact(&mut byte).await.is_ok() {
                byte[0] ^= if change == Some(length) { 0x40 } else { 0 };
                length += 1;
                if hears.write_all(&byte).await.is_err() {
                    break;
                }
            }
            length
        };
        tokio::select! {
            length = forth => length,
            never = async { copy(&mut asks, &mut answers).await.unwrap_or_default(); std::future::pending().await } => never,
        }
    };
    let passing = pass_between((from, to), (of_console(resting), &manifest), data, file_of(own));
    tokio::join!(passing, relaying)
}

#[tokio::test]
async fn differences_that_end_early_or_are_changed_leave_nothing() {
    let (resting, _, mut own) = resting(1, 5000, 40);
    let begin = 5 + KEY + manifest(resting.record(), 3).encode().len();
    own[77] ^= 1;
    own[3000 * 512] ^= 1;
    let data = tempfile::tempdir().unwrap();
    let ((_, whole), length) = pass_through(data.path(), &own, usize::MAX, None).await;
    assert_eq!(whole.unwrap().unchanged, 4998 * 512);
    // Head, checksum, map and a page each for the first two chunks, and no page for the last one.
    let chunk = 5 + 8 + 256 + 512;
    assert_eq!(length, begin + 2 * chunk + (5 + 8 + 113) + 5);
    let data = tempfile::tempdir().unwrap();
    for limit in [0, 4, 5, 36, 37, begin - 1, begin, begin + 5, begin + 13, begin + 269, begin + chunk, length - 1] {
        let ((_, cut), _) = pass_through(data.path(), &own, limit, None).await;
        assert!(cut.is_err(), "{limit} bytes");
        nothing_is_ready(data.path());
    }
    // Kinds, lengths, a checksum, which pages differ, content. Not a longer manifest: the rest would be waited for.
    let second = begin + chunk;
    for at in [0, 4, begin, begin + 1, begin + 5, begin + 13, begin + 268, begin + 400, second + 5, second + 20] {
        let ((_, changed), _) = pass_through(data.path(), &own, usize::MAX, Some(at)).await;
        assert!(changed.is_err(), "byte {at}");
        nothing_is_ready(data.path());
    }
}

/// A primary that takes a page for the same which is not: as if two pages had the same tag.
#[tokio::test]
async fn a_page_that_only_looks_the_same_is_refused() {
    let (good, _, image) = resting(1, 9, 40);
    let mut own = image.clone();
    own[8 * 512] ^= 1;
    let manifest = manifest(good.record(), 3).encode();
    // Whatever it says of the chunk: the checksum of the database is another one.
    for sum in [good.record().checksum, chunk_checksum(0, 512, &own)] {
        let mut said = Vec::new();
        frame::write(&mut said, frame::ASK, &[1; KEY], &manifest).await.unwrap();
        frame::write(&mut said, frame::CHANGED, &sum.to_le_bytes(), &[0, 0]).await.unwrap();
        frame::write(&mut said, frame::END, &[], &[]).await.unwrap();
        let data = tempfile::tempdir().unwrap();
        let refused = replay(&said, ClusterId(7), data.path(), file_of(&own)).await;
        assert!(matches!(refused, Err(FetchError::Store(SnapshotError::Damaged(_)))), "{refused:?}");
        nothing_is_ready(data.path());
        // The same from a node that has the page.
        let taken = replay(&said, ClusterId(7), data.path(), file_of(&image)).await;
        assert_eq!(taken.is_ok(), sum == good.record().checksum, "{taken:?}");
    }
}

/// A receiver that says nonsense of what it has gets whole chunks, or nothing.
#[tokio::test]
async fn wrong_tags_are_no_reason_to_send_less() {
    for (tags, sent) in [(9 * 8, Some(9 * 512)), (0, Some(9 * 512)), (8 * 8, None), (10 * 8, None), (71, None)] {
        let (resting, ..) = resting(1, 9, 40);
        let manifest = manifest(resting.record(), 3);
        let (mut from, mut to) = duplex(1 << 16);
        frame::write(&mut to, frame::TAGS, &vec![0x5a; tags], &[]).await.unwrap();
        let result = send(&mut from, &manifest, of_console(resting), true, |_| ()).await;
        assert_eq!(result.ok().map(|sent| sent.bytes), sent, "{tags} bytes");
    }
}

/// A primary with a service whose databases have so many pages.
fn serving(pages: &[u32]) -> (Arc<Whole>, Manifest) {
    let (console, ..) = resting(1, 3000, 40);
    let (manifest, service) = with_service(manifest(console.record(), 3), pages);
    let catalogue = manifest.service.catalogue.clone();
    (Arc::new(Whole { console, catalogue, service: (2..).zip(service).collect() }), manifest)
}

/// What a service's databases have, from the first id on.
fn images(pages: &[u32]) -> Vec<Vec<u8>> {
    (2..).zip(pages).map(|(id, pages)| resting(id, *pages, 40).2).collect()
}

#[tokio::test]
async fn all_databases_of_a_service_come_along_and_only_what_differs() {
    const SIZES: [u32; 4] = [5000, 0, 2049, 7];
    let (_, _, console) = resting(1, 3000, 40);
    let images = images(&SIZES);
    let total = console.len() as u64 + images.iter().map(|image| image.len() as u64).sum::<u64>();
    for (what, has, most) in
        [("nothing", 0, total), ("older ones", 1, 3 * 512 + 7 * 512), ("all but a moved one", 2, 3 * 512)]
    {
        let data = tempfile::tempdir().unwrap();
        let (whole, manifest) = serving(&SIZES);
        if has > 0 {
            let files = data.path().join("service/files/files");
            std::fs::create_dir_all(&files).unwrap();
            for (id, image) in (2..).zip(&images) {
                let mut own = image.clone();
                own.iter_mut().step_by(4096 * 512).for_each(|byte| *byte ^= 1);
                std::fs::write(files.join(format!("{id}.db")), own).unwrap();
            }
            if has == 1 {
                std::fs::remove_file(files.join("5.db")).unwrap();
            }
        }
        let own = file_of(&console).filter(|_| has > 0);
        let (sent, fetched) = pass_between(duplex(1 << 16), (whole, &manifest), data.path(), own).await;
        let (sent, fetched) = (sent.unwrap(), fetched.unwrap());
        assert!(sent.bytes <= most + 512, "{what}: {sent:?}");
        assert_eq!(sent.bytes + sent.unchanged, total, "{what}");
        assert_eq!(fetched, Fetched { manifest: manifest.clone(), unchanged: sent.unchanged }, "{what}");
        let ready = data.path().join("snapshot.ready");
        assert!(std::fs::read(ready.join("console.db")).unwrap() == console, "{what}");
        for (id, image) in (2..).zip(&images) {
            let staged = std::fs::read(ready.join("databases").join(u32::to_string(&id))).unwrap();
            assert!(&staged == image, "{what}: database {id}");
        }
        assert_eq!(Ready::find(data.path()).unwrap().unwrap().manifest(), &manifest);
    }
}

/// Whatever breaks off in whichever database: nothing of any of them counts.
#[tokio::test]
async fn all_databases_arrive_or_none() {
    let (whole, manifest) = serving(&[2500, 3]);
    let (mut from, mut to) = duplex(64 << 20);
    send(&mut from, &manifest, whole, false, |_| ()).await.unwrap();
    drop(from);
    let mut bytes = Vec::new();
    to.read_to_end(&mut bytes).await.unwrap();
    let data = tempfile::tempdir().unwrap();
    assert_eq!(replay(&bytes, ClusterId(7), data.path(), None).await.unwrap(), manifest);
    let console = 5 + manifest.encode().len() + 2 * (5 + 8) + 3000 * 512;
    let second = console + 2 * (5 + 8) + 2500 * 512;
    assert_eq!(bytes.len(), second + (5 + 8) + 3 * 512 + 5);
    let data = tempfile::tempdir().unwrap();
    for length in [console - 1, console, console + 1, console + (1 << 20) + 13, second, second + 13, bytes.len() - 5] {
        assert!(replay(&bytes[..length], ClusterId(7), data.path(), None).await.is_err(), "{length} bytes");
        nothing_is_ready(data.path());
        // An end where something is missing.
        let ended = [&bytes[..length], &bytes[bytes.len() - 5..]].concat();
        assert_eq!(replay(&ended, ClusterId(7), data.path(), None).await.is_ok(), length == bytes.len() - 5);
        let _ = std::fs::remove_dir_all(data.path().join("snapshot.ready"));
    }
    for at in [console + 5, console + 99, second + 5, second + 99] {
        let mut changed = bytes.clone();
        changed[at] ^= 0x40;
        assert!(replay(&changed, ClusterId(7), data.path(), None).await.is_err(), "byte {at}");
        nothing_is_ready(data.path());
    }
}

/// A primary that knows nothing of the service would take it away from a member that has it.
#[tokio::test]
async fn a_snapshot_without_a_database_of_this_node_is_refused_before_it_is_fetched() {
    let (_, with) = serving(&[9, 3]);
    let data = tempfile::tempdir().unwrap();
    std::fs::create_dir(data.path().join("service")).unwrap();
    with.service.catalogue.write(&data.path().join("service/catalogue.json")).unwrap();
    let (console, _, image) = resting(1, 3000, 40);
    let without = manifest(console.record(), 3);
    let (sent, fetched) = pass(console, &without, data.path(), file_of(&image)).await;
    let error = fetched.unwrap_err().to_string();
    assert!(error.contains("2 (files/2.db), 3 (files/3.db)") && error.contains("not installed"), "{error}");
    assert!(sent.is_err() && !data.path().join("snapshot.incoming").exists());
}
