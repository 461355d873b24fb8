//! The queue, cut and damaged at every byte.

use std::collections::BTreeMap;

use tempfile::TempDir;

use super::*;

const LIMIT: u64 = 64 << 20;

fn draft(text: &str) -> Draft {
    Draft { time: 7, kind: "test", event: json!({ "text": text }) }
}

fn all(queue: &mut Queue) -> Vec<(u64, String)> {
    let from = queue.oldest();
    let events = queue.read(from, usize::MAX, usize::MAX).unwrap();
    let text = |event: &Numbered| event.event["text"].as_str().unwrap_or(&event.kind).to_owned();
    events.iter().map(|event| (event.sequence, text(event))).collect()
}

fn segments(folder: &Path) -> Vec<PathBuf> {
    names(folder).unwrap().into_iter().map(|first| path_of(folder, first)).collect()
}

#[test]
fn events_keep_their_numbers_through_starts() {
    let dir = TempDir::new().unwrap();
    let mut queue = Queue::open(dir.path(), LIMIT).unwrap();
    assert_eq!((queue.next(), queue.oldest(), queue.read(0, 9, 9).unwrap()), (1, 1, vec![]));
    queue.append(&[draft("a"), draft("b")]).unwrap();
    queue.append(&[draft("c")]).unwrap();
    let expected = [(1, "a".to_owned()), (2, "b".to_owned()), (3, "c".to_owned())];
    assert_eq!(all(&mut queue), expected);
    let mut queue = Queue::open(dir.path(), LIMIT).unwrap();
    assert_eq!((queue.next(), all(&mut queue)), (4, expected.to_vec()));
    let some = |queue: &mut Queue, from, events, bytes| -> Vec<u64> {
        queue.read(from, events, bytes).unwrap().iter().map(|event| event.sequence).collect()
    };
    assert_eq!(some(&mut queue, 2, 9, 999), [2, 3]);
    assert_eq!(some(&mut queue, 1, 2, 999), [1, 2]);
    assert_eq!(some(&mut queue, 3, 2, 999), [3]);
    assert_eq!(some(&mut queue, 1, 9, 0), [1], "one in any case");
    assert_eq!((queue.time_of(3).unwrap(), queue.time_of(4).unwrap()), (Some(7), None));
    // All of it is acknowledged: the count goes on.
    queue.release(99).unwrap();
    let mut queue = Queue::open(dir.path(), LIMIT).unwrap();
    queue.append(&[draft(&"x".repeat(9000))]).unwrap();
    let long = queue.read(4, 1, 0).unwrap().remove(0);
    assert!(long.sequence == 4 && long.event["tooLong"].as_u64() > Some(9000), "{long:?}");
}

/// Whatever a crash leaves of the last write, what was taken before is there, and no number that may have been sent is
/// given again.
#[test]
fn a_log_that_is_cut_at_any_byte_keeps_what_is_before_the_cut() {
    let dir = TempDir::new().unwrap();
    let mut queue = Queue::open(dir.path(), LIMIT).unwrap();
    let texts = ["a", "bb", "", "ccc"];
    let mut ends = vec![HEADER];
    for text in texts {
        queue.append(&[draft(text)]).unwrap();
        ends.push(queue.last().bytes as usize);
    }
    let path = segments(dir.path()).remove(0);
    let bytes = fs::read(&path).unwrap();
    for length in 0..=bytes.len() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join(path.file_name().unwrap()), &bytes[..length]).unwrap();
        let mut queue = Queue::open(dir.path(), LIMIT).unwrap();
        let whole = ends.iter().skip(1).filter(|end| **end <= length).count();
        let mut found = all(&mut queue);
        let torn = !ends.contains(&length);
        assert_eq!(torn, found.last().is_some_and(|(_, text)| text == "cut"), "{length}: {found:?}");
        found.truncate(whole);
        let texts: Vec<&str> = found.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(texts, texts_of(&texts_before(whole)), "{length}");
        assert!(queue.next() > whole as u64);
        let next = queue.next();
        queue.append(&[draft("later")]).unwrap();
        let mut again = Queue::open(dir.path(), LIMIT).unwrap();
        let last = all(&mut again).pop().unwrap();
        assert_eq!((again.next(), last), (next + 1, (next, "later".to_owned())), "{length}");
        assert_eq!(all(&mut again).iter().filter(|(_, text)| text == "cut").count(), usize::from(torn), "told once");
    }

    fn texts_before(whole: usize) -> Vec<String> {
        ["a", "bb", "", "ccc"].into_iter().take(whole).map(str::to_owned).collect()
    }
    fn texts_of(texts: &[String]) -> Vec<&str> {
        texts.iter().map(String::as_str).collect()
    }
}

/// A disk that lies: any byte is another one. Each number still means one event or none.
#[test]
fn a_damaged_log_never_gives_a_number_again() {
    let dir = TempDir::new().unwrap();
    let mut queue = Queue::open(dir.path(), LIMIT).unwrap();
    queue.append(&[draft("a"), draft("b"), draft("c")]).unwrap();
    let known: BTreeMap<u64, String> = all(&mut queue).into_iter().collect();
    let path = segments(dir.path()).remove(0);
    let bytes = fs::read(&path).unwrap();
    for at in 0..bytes.len() {
        let dir = TempDir::new().unwrap();
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x41;
        fs::write(dir.path().join(path.file_name().unwrap()), &damaged).unwrap();
        let mut queue = Queue::open(dir.path(), LIMIT).unwrap();
        queue.append(&[draft("later")]).unwrap();
        let found = all(&mut queue);
        for (number, text) in &found {
            let new = text == "later" || text == "cut";
            assert_eq!(known.get(number), (!new).then_some(text), "byte {at}: {found:?}");
        }
        assert!(found.iter().any(|(_, text)| text == "cut"), "byte {at}: {found:?}");
    }
}

#[test]
fn the_oldest_go_when_it_is_full_and_that_is_told() {
    let dir = TempDir::new().unwrap();
    let mut queue = Queue::open(dir.path(), 3 * SEGMENT).unwrap();
    let batch = vec![draft(&"x".repeat(4000)); 100];
    let mut told = Vec::new();
    for _ in 0..20 {
        let (full, before) = (queue.is_full(batch.len() * 4050), queue.oldest());
        queue.append(&batch).unwrap();
        let last = queue.next() - 1;
        let newest = queue.read(last, 1, 0).unwrap().remove(0);
        assert_eq!(full, newest.kind == "dropped");
        if full {
            let number = |name: &str| newest.event[name].as_u64().unwrap();
            assert_eq!((number("first"), number("last")), (before, queue.oldest() - 1));
            assert_eq!(number("count"), queue.oldest() - before);
            told.push(number("last"));
        }
        let size: u64 = segments(dir.path()).iter().map(|path| fs::metadata(path).unwrap().len()).sum();
        assert!(size <= 3 * SEGMENT + 500_000, "{size}");
    }
    assert!(told.len() > 2);
    let events = queue.read(0, usize::MAX, usize::MAX).unwrap();
    assert!(events.windows(2).all(|pair| pair[0].sequence + 1 == pair[1].sequence));
    // What is acknowledged is no loss when it goes.
    queue.release(queue.next() - 1).unwrap();
    assert_eq!(segments(dir.path()).len(), 1);
}

#[test]
fn a_queue_that_was_set_back_goes_on_behind_what_is_known() {
    let dir = TempDir::new().unwrap();
    let mut queue = Queue::open(dir.path(), LIMIT).unwrap();
    queue.append(&[draft("a")]).unwrap();
    queue.skip_to(50).unwrap();
    assert_eq!((queue.next(), all(&mut queue).len(), queue.oldest()), (50, 0, 50));
    queue.append(&[draft("b")]).unwrap();
    let mut queue = Queue::open(dir.path(), LIMIT).unwrap();
    assert_eq!(all(&mut queue), [(50, "b".to_owned())]);
}
