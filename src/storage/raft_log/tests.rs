//! Tests of the log on the real file system, under raft, and from several threads; tests/crash has a model of the disk.

use std::{fs, os::unix::fs::PermissionsExt, sync::mpsc::channel, time::Duration};

use raft::{Config, RawNode};

use super::*;

const OWNER: Owner = (ClusterId(9), 1);

fn conf(voters: &[u64]) -> ConfState {
    ConfState { voters: voters.to_vec(), ..ConfState::default() }
}

fn open(dir: &Path, segment_bytes: usize) -> RaftLog {
    let options = Options { segment_bytes, ..Options::default() };
    RaftLog::open(dir, OWNER, conf(&[1]), options, RealDisk).unwrap()
}

fn entry(index: u64, term: u64, length: usize) -> Entry {
    Entry { index, term, data: vec![index as u8; length].into(), ..Entry::default() }
}

fn hard(term: u64, vote: u64, commit: u64) -> HardState {
    record::hard_state(term, vote, commit)
}

#[test]
fn a_new_log_begins_behind_index_one() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("raft");
    let log = open(&dir, 1 << 20);
    assert_eq!((log.first_index(), log.last_index(), log.term(1).unwrap()), (2, 1, 1));
    let state = log.initial_state().unwrap();
    assert_eq!((state.hard_state, state.conf_state), (hard(1, 0, 1), conf(&[1])));
    assert!(log.recovered().created);
    let unavailable = StorageError::SnapshotTemporarilyUnavailable;
    assert_eq!(log.snapshot(0, 2).unwrap_err(), raft::Error::Store(unavailable));
    assert_eq!(log.term(0).unwrap_err(), raft::Error::Store(StorageError::Compacted));
    assert_eq!(log.term(2).unwrap_err(), raft::Error::Store(StorageError::Unavailable));
    for file in fs::read_dir(&dir).unwrap() {
        assert_eq!(file.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn an_entry_that_has_changed_since_the_start_is_refused_with_its_place() {
    let root = tempfile::tempdir().unwrap();
    let log = open(root.path(), 1 << 20);
    log.append(&[entry(2, 1, 100)], Some(&hard(1, 0, 2))).unwrap().sync().unwrap();
    drop(log);
    let log = open(root.path(), 1 << 20);
    let path = segment::segment_path(root.path(), 1);
    let bytes = fs::read(&path).unwrap();
    let at = bytes.windows(100).position(|bytes| bytes == [2; 100]).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    DiskFile::write_at(&file, &[0; 100], at as u64).unwrap();
    let error = log.entries_between(2, 2, &mut |_| Ok(())).unwrap_err();
    let text = format!("{:#}", anyhow::Error::from(error).context("look"));
    assert!(text.starts_with(&format!("look: {} is damaged at offset ", path.display())), "{text}");
    assert_eq!(text.matches("entry 2 cannot be read back").count(), 1, "{text}");
    assert!(text.ends_with("cannot be read back"), "nobody has to do anything: {text}");
}

/// A disk on which no new file can be made while the flag is set.
struct Small(Arc<AtomicBool>);

impl Disk for Small {
    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        RealDisk.make_dir(dir)
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        if self.0.load(Ordering::Relaxed) { Err(io::ErrorKind::StorageFull.into()) } else { RealDisk.create(path) }
    }
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        RealDisk.open(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(path)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        RealDisk.sync_dir(dir)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        RealDisk.list(dir)
    }
}

/// As long as it says that there is room, appending works; afterwards votes still do; and space brings it back.
#[test]
fn on_a_full_disk_there_is_room_until_there_is_none() {
    let root = tempfile::tempdir().unwrap();
    let full = Arc::new(AtomicBool::new(false));
    let options = Options { segment_bytes: 1 << 20, helper: false, ..Options::default() };
    let log = RaftLog::open(root.path(), OWNER, conf(&[1]), options, Small(full.clone())).unwrap();
    log.retry();
    assert!(log.has_room([1 << 20, 1 << 19].map(|length: usize| length / 2)) && !log.is_full());
    full.store(true, Ordering::Relaxed);
    let (mut index, mut bytes) = (2, 0);
    for length in [10_000, 300_000, 1, 77_777].into_iter().cycle() {
        if !log.has_room([length, length]) {
            break;
        }
        let entries = [entry(index, 1, length), entry(index + 1, 1, length)];
        log.append(&entries, Some(&hard(1, 1, 1))).unwrap().sync().unwrap();
        (index, bytes) = (index + 2, bytes + 2 * length);
    }
    assert!(log.is_full() && bytes > 1 << 20, "{bytes} bytes fitted");
    // Each with the end of a batch and the copy of the state that a start makes: hundreds of elections.
    for term in 2..300 {
        log.append(&[], Some(&hard(term, 1, 1))).unwrap().sync().unwrap();
    }
    assert!(log.poison().is_none());
    log.compact(1).unwrap();
    full.store(false, Ordering::Relaxed);
    assert!(!log.has_room([300_000, 300_000]), "nobody has looked again yet");
    log.retry();
    assert!(!log.is_full() && log.has_room([300_000, 300_000]));
    log.append(&[entry(index, 300, 300_000)], Some(&hard(300, 1, 1))).unwrap().sync().unwrap();
    drop(log);
    assert_eq!(open(root.path(), 1 << 20).last_index(), index);
}

#[test]
fn entries_and_state_come_back_and_large_entries_fit() {
    let root = tempfile::tempdir().unwrap();
    let log = open(root.path(), 2 << 20);
    let largest = crate::storage::transaction::MAX_PART;
    let entries: Vec<_> = (2..12).map(|index| entry(index, 1, largest)).collect();
    log.append(&entries, Some(&hard(3, 2, 5))).unwrap().sync().unwrap();
    log.set_applied_conf(conf(&[1, 2]), 5).unwrap();
    drop(log);
    let log = open(root.path(), 2 << 20);
    assert_eq!((log.recovered().entries, log.recovered().torn_bytes), (10, 0));
    assert_eq!((log.hard_state(), log.applied_conf()), (hard(3, 2, 5), (conf(&[1, 2]), 5)));
    let context = || GetEntriesContext::empty(false);
    assert_eq!(log.entries(2, 12, None, context()).unwrap(), entries);
    assert_eq!(log.entries(3, 12, 0, context()).unwrap(), entries[1..2]);
    assert_eq!(log.entries(3, 12, 3 * largest as u64, context()).unwrap(), entries[1..3]);
    let mut seen = Vec::new();
    EntrySource::for_each(&log, 4, 11, &mut |index, bytes| {
        assert_eq!(bytes.len(), largest);
        seen.push(index);
        Ok(())
    })
    .unwrap();
    assert_eq!(seen, (4..=11).collect::<Vec<_>>());
    log.compact(5).unwrap();
    assert_eq!(log.snapshot(0, 2).unwrap().get_metadata().index, 5);
    assert!(log.entries(5, 6, None, context()).is_err());
    assert!(matches!(log.append(&[entry(12, 3, 3 << 20)], None), Err(LogError::Refused(_))));
    assert!(log.poison().is_none());
}

/// What a member lacks is told in bytes, over several files, and is unknown once it is gone.
#[test]
fn bytes_between_two_entries_are_known() {
    let root = tempfile::tempdir().unwrap();
    let log = open(&root.path().join("raft"), 64 << 10);
    let entries: Vec<_> = (2..=101).map(|index| entry(index, 1, 4000)).collect();
    for one in &entries {
        log.append(std::slice::from_ref(one), Some(&hard(1, 0, one.index))).unwrap().sync().unwrap();
    }
    assert_eq!((log.bytes_between(101, 101), log.bytes_between(90, 80)), (Some(0), Some(0)));
    let one = log.bytes_between(100, 101).unwrap();
    assert!((4000..4200).contains(&one), "{one}");
    let all = log.bytes_between(1, 101).unwrap();
    assert!((100 * 4000..100 * 4000 + (100 << 10)).contains(&all), "{all}");
    assert_eq!(log.bytes_between(100, 102), None);
    log.compact(50).unwrap();
    assert_eq!(log.bytes_between(30, 101), None);
    assert!(log.bytes_between(50, 101).unwrap() > 51 * 4000);
}

#[test]
fn files_are_used_again() {
    let root = tempfile::tempdir().unwrap();
    let log = open(root.path(), 64 << 10);
    for index in 2..600 {
        log.append(&[entry(index, 1, 1000)], Some(&hard(1, 0, index))).unwrap().sync().unwrap();
        if index % 20 == 0 {
            log.compact(index - 5).unwrap();
        }
    }
    assert!(log.size_bytes() <= 6 * (64 << 10), "{} bytes", log.size_bytes());
    drop(log);
    assert!(fs::read_dir(root.path()).unwrap().count() <= 6);
    let log = open(root.path(), 64 << 10);
    assert_eq!((log.first_index(), log.last_index()), (576, 599));
    log.append(&[entry(600, 1, 10)], None).unwrap().sync().unwrap();
}

#[test]
fn what_raft_must_not_ask_for_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let log = open(root.path(), 1 << 20);
    log.append(&[entry(2, 2, 1), entry(3, 2, 1)], Some(&hard(2, 1, 2))).unwrap();
    let refused = |entries: &[Entry], hard: Option<&HardState>| {
        assert!(matches!(log.append(entries, hard), Err(LogError::Refused(_))));
    };
    refused(&[entry(5, 2, 1)], None);
    refused(&[entry(2, 2, 1)], None);
    refused(&[entry(4, 2, 1), entry(6, 2, 1)], None);
    refused(&[], Some(&hard(1, 1, 2)));
    refused(&[], Some(&hard(2, 3, 2)));
    refused(&[], Some(&hard(2, 1, 4)));
    assert!(matches!(log.compact(3), Err(LogError::Refused(_))));
    assert_eq!((log.last_index(), log.hard_state()), (3, hard(2, 1, 2)));
}

#[test]
fn another_owner_and_a_newer_format_are_refused() {
    let root = tempfile::tempdir().unwrap();
    drop(open(root.path(), 1 << 20));
    let again = |owner| RaftLog::open(root.path(), owner, conf(&[1]), Options::default(), RealDisk).err().unwrap();
    let error = again((ClusterId(10), 3)).to_string();
    assert!(error.contains(&ClusterId(9).to_string()) && error.contains(&ClusterId(10).to_string()), "{error}");
    let path = segment_path(root.path(), 1);
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    DiskFile::write_at(&file, &2u32.to_le_bytes(), 8).unwrap();
    assert!(matches!(again(OWNER), LogError::Damaged { .. }), "a turned bit is no newer program");
    let mut header = [0; 64];
    DiskFile::read_at(&file, &mut header, 0).unwrap();
    let crc = crc32c::crc32c_append(crc32c::crc32c(&header[..12]), &header[16..]);
    DiskFile::write_at(&file, &crc.to_le_bytes(), 12).unwrap();
    assert!(matches!(again(OWNER), LogError::Newer { found: 2, known: 1, .. }));
}

#[test]
fn appending_reading_and_syncing_run_side_by_side() {
    let root = tempfile::tempdir().unwrap();
    let options = Options { segment_bytes: 256 << 10, cache_bytes: 8 << 10, ..Options::default() };
    let log = RaftLog::open(root.path(), OWNER, conf(&[1]), options, RealDisk).unwrap();
    let (work, queue) = sync_channel::<Pending>(4);
    std::thread::scope(|scope| {
        scope.spawn(move || queue.into_iter().for_each(|pending| pending.sync().unwrap()));
        let reader = log.clone();
        scope.spawn(move || {
            let mut next = 2;
            while next < 2000 {
                let last = reader.last_index();
                reader
                    .entries_between(next, last, &mut |entry| {
                        assert_eq!((entry.index, entry.data.len()), (next, 700));
                        next += 1;
                        Ok(())
                    })
                    .unwrap();
                if last > 200 {
                    reader.compact(reader.hard_state().commit.min(next - 1)).unwrap();
                }
            }
        });
        for index in 2..2000 {
            work.send(log.append(&[entry(index, 1, 700)], Some(&hard(1, 0, index))).unwrap()).unwrap();
        }
        drop(work);
    });
    assert_eq!(log.last_index(), 1999);
}

/// A disk on which no new file can be made, or none can be kept for later, while somebody holds the gate for that.
#[derive(Clone, Default)]
struct Gated {
    gate: Arc<RwLock<()>>,
    created: Arc<AtomicU64>,
    exit: Arc<RwLock<()>>,
    leaving: Arc<AtomicU64>,
}

impl Disk for Gated {
    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        RealDisk.make_dir(dir)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.created.fetch_add(1, Ordering::SeqCst);
        drop(self.gate.read().unwrap());
        RealDisk.create(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        RealDisk.open(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        if to.file_name().is_some_and(|name| name.to_string_lossy().starts_with("spare")) {
            self.leaving.fetch_add(1, Ordering::SeqCst);
            drop(self.exit.read().unwrap());
        }
        RealDisk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        RealDisk.sync_dir(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        RealDisk.list(dir)
    }
}

fn wait_until(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}

#[test]
fn appending_does_not_wait_for_a_file_that_is_being_filled() {
    let root = tempfile::tempdir().unwrap();
    let (size, disk) = (64 << 10, Gated::default());
    let options = Options { segment_bytes: size, ..Options::default() };
    let log = RaftLog::open(root.path(), OWNER, conf(&[1]), options, disk.clone()).unwrap();
    let segments = || log.core.shared.read_state().segments.len();
    wait_until(|| log.size_bytes() == 3 * size as u64);
    let closed = disk.gate.write().unwrap();
    let (done, wait) = channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut index = 1;
            let mut append = || {
                index += 1;
                log.append(&[entry(index, 1, 20_000)], Some(&hard(1, 0, index))).unwrap().sync().unwrap();
                index
            };
            let taken = |count| segments() > count;
            while !taken(1) {
                append();
            }
            wait_until(|| disk.created.load(Ordering::SeqCst) == 4);
            // From here on the helper is at work on a file.
            while !taken(2) {
                append();
            }
            log.compact(append()).unwrap();
            done.send(()).unwrap();
            // Now nothing is ready, and the next segment has to be waited for.
            while !taken(2) {
                append();
            }
        });
        let result = wait.recv_timeout(Duration::from_secs(20));
        drop(closed);
        result.expect("appending waited for the helper");
    });
}

#[test]
fn appending_does_not_wait_for_a_segment_that_leaves() {
    let root = tempfile::tempdir().unwrap();
    let (size, disk) = (64 << 10, Gated::default());
    let options = Options { segment_bytes: size, ..Options::default() };
    let log = RaftLog::open(root.path(), OWNER, conf(&[1]), options, disk.clone()).unwrap();
    // A segment takes three of them.
    let append = |index| log.append(&[entry(index, 1, 20_000)], Some(&hard(1, 0, index))).unwrap().sync().unwrap();
    (2..=10).for_each(append);
    wait_until(|| crate::mutex::locked(&log.core.shared.supply).ready() == 2);
    let closed = disk.exit.write().unwrap();
    let (done, wait) = channel();
    std::thread::scope(|scope| {
        scope.spawn(|| log.compact(10).unwrap());
        wait_until(|| disk.leaving.load(Ordering::SeqCst) == 1);
        scope.spawn(|| {
            assert!(log.has_room_now([20_000]));
            (11..=14).for_each(append);
            done.send(()).unwrap();
        });
        let result = wait.recv_timeout(Duration::from_secs(20));
        drop(closed);
        result.expect("appending waited for the compaction");
    });
    assert_eq!((log.first_index(), log.last_index()), (11, 14));
}

/// One step of a raft node of one member: persist, then apply.
fn drive(node: &mut RawNode<RaftLog>, log: &RaftLog) -> Vec<Entry> {
    let mut applied = Vec::new();
    while node.has_ready() {
        let mut ready = node.ready();
        applied.append(&mut ready.take_committed_entries());
        log.append(ready.entries(), ready.hs()).unwrap().sync().unwrap();
        let mut light = node.advance(ready);
        if let Some(commit) = light.commit_index() {
            let mut hard = log.hard_state();
            hard.commit = commit;
            drop(log.append(&[], Some(&hard)).unwrap());
        }
        applied.append(&mut light.take_committed_entries());
        node.advance_apply();
    }
    applied
}

#[test]
fn raft_runs_on_it_and_comes_back() {
    let root = tempfile::tempdir().unwrap();
    let logger = slog::Logger::root(slog::Discard, slog::o!());
    let mut proposed = 0;
    for life in 1..=3u64 {
        let log = open(root.path(), 64 << 10);
        let applied = log.first_index() - 1;
        let config = Config { id: 1, applied, max_inflight_msgs: 16, max_size_per_msg: 1 << 20, ..Config::default() };
        let mut node = RawNode::new(&config, log.clone(), &logger).unwrap();
        node.campaign().unwrap();
        let mut seen: Vec<_> = drive(&mut node, &log);
        for _ in 0..100 {
            node.propose(vec![], vec![life as u8; 2000]).unwrap();
            proposed += 1;
            seen.append(&mut drive(&mut node, &log));
        }
        let commands = seen.iter().filter(|entry| !entry.data.is_empty()).count();
        let expected = if life == 1 { 100 } else { 150 };
        assert_eq!((commands, node.raft.term), (expected, life + 1), "life {life}");
        assert_eq!(log.last_index(), 1 + proposed + life);
        log.compact(log.last_index() - 50).unwrap();
    }
}
