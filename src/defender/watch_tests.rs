//! The watch over files in a folder, one round at a time.

use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;

use super::*;
use crate::defender::wire::Numbered;

struct Host {
    state: TempDir,
    files: TempDir,
    shared: Shared,
}

impl Host {
    fn new(per_minute: u32) -> Self {
        let (state, files) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let path = files.path().to_str().unwrap().to_owned();
        let policy =
            Policy { version: 1, paths: vec![Watched { path, recursive: true }], per_minute, ..Policy::default() };
        let shared = Self::shared(state.path(), policy);
        Self { state, files, shared }
    }

    fn shared(state: &Path, policy: Policy) -> Shared {
        let folder = Arc::new(Folder::open(state).unwrap());
        let queue = Queue::open(&folder.queue(), 64 << 20).unwrap();
        let next = watch::Sender::new(queue.next());
        let (stored, policy) = (watch::Sender::new(0), watch::Sender::new(policy));
        Shared { folder, queue: Arc::new(Mutex::new(queue)), next, stored, policy }
    }

    /// As after the end of the process, whether it kept its baseline or not.
    fn start_again(&mut self) -> Watch {
        let policy = self.shared.policy.borrow().clone();
        self.shared = Self::shared(self.state.path(), policy);
        self.start()
    }

    fn start(&self) -> Watch {
        let mut watch = Watch::open(self.shared.clone()).unwrap();
        settle(&mut watch);
        watch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// What of the files is in the queue: name and change.
    fn told(&self) -> Vec<String> {
        let events = locked(&self.shared.queue).read(1, usize::MAX, usize::MAX).unwrap();
        let root = format!("{}/", self.files.path().display());
        let told = |event: &Numbered| {
            let (path, change) = (event.event["path"].as_str()?, event.event["change"].as_str()?);
            Some(format!("{change} {}", path.strip_prefix(&root).unwrap_or(".")))
        };
        events.iter().filter(|event| event.kind == FILE).filter_map(told).collect()
    }
}

/// Rounds until nothing is left to look at. Notices of what is done already are there at once.
fn settle(watch: &mut Watch) {
    for _ in 0..20 {
        watch.round().unwrap();
        if watch.dirty.is_empty() {
            return;
        }
    }
    panic!("there is always more: {:?}", watch.dirty);
}

#[test]
fn what_changes_is_told_and_what_was_there_is_not() {
    let host = Host::new(100);
    fs::create_dir(host.path("d")).unwrap();
    fs::write(host.path("d/old"), "1").unwrap();
    let mut watch = host.start();
    assert_eq!(host.told(), Vec::<String>::new());
    let first = locked(&host.shared.queue).read(1, 9, 9999).unwrap().remove(0);
    assert_eq!((first.kind.as_str(), &first.event["paths"]), (BASELINE, &json!(3)));
    fs::write(host.path("d/old"), "2").unwrap();
    fs::write(host.path("new"), "2").unwrap();
    settle(&mut watch);
    // Its notices come in the order in which things happened, and it looks in the order of the paths.
    assert_eq!(host.told(), ["modified d/old", "created new"]);
    fs::create_dir_all(host.path("e/f")).unwrap();
    fs::write(host.path("e/f/deep"), "3").unwrap();
    settle(&mut watch);
    assert_eq!(host.told()[2..], ["created e", "created e/f", "created e/f/deep"]);
    fs::set_permissions(host.path("e/f/deep"), fs::Permissions::from_mode(0o700)).unwrap();
    settle(&mut watch);
    assert_eq!(host.told()[5..], ["attributes e/f/deep"]);
    fs::rename(host.path("e"), host.path("g")).unwrap();
    settle(&mut watch);
    let told = host.told();
    for expected in ["deleted e", "deleted e/f", "deleted e/f/deep", "created g", "created g/f", "created g/f/deep"] {
        assert_eq!(told[6..].iter().filter(|told| *told == expected).count(), 1, "{expected}: {told:?}");
    }
    assert_eq!(told.len(), 12, "{told:?}");
    fs::write(host.path("g/f/deep"), "4").unwrap();
    settle(&mut watch);
    assert_eq!(host.told()[12..], ["modified g/f/deep"], "it is watched where it is now");
}

/// A start finds what happened meanwhile, and tells nothing again: whatever was kept of the baseline.
#[test]
fn a_start_tells_each_change_once() {
    let mut host = Host::new(100);
    fs::write(host.path("a"), "1").unwrap();
    drop(host.start());
    // What was there at first is known from the first moment on.
    fs::write(host.path("a"), "2").unwrap();
    let watch = host.start_again();
    assert_eq!(host.told(), ["modified a"]);
    // It dies before it keeps the baseline again.
    drop(watch);
    fs::write(host.path("b"), "3").unwrap();
    let mut watch = host.start_again();
    assert_eq!(host.told(), ["modified a", "created b"]);
    // Acknowledged is not enough: the baseline on disk does not have them yet.
    host.shared.stored.send_replace(99);
    watch.round().unwrap();
    assert!(watch.kept_through < 2 && locked(&host.shared.queue).oldest() == 1);
    watch.keep().unwrap();
    drop(watch);
    fs::remove_file(host.path("a")).unwrap();
    drop(host.start_again());
    assert_eq!(host.told(), ["modified a", "created b", "deleted a"]);
}

#[test]
fn a_path_that_changes_all_the_time_is_held_back_and_counted() {
    let host = Host::new(2);
    let mut watch = host.start();
    for number in 0..10 {
        fs::write(host.path("a"), number.to_string()).unwrap();
        settle(&mut watch);
    }
    assert_eq!(host.told(), ["created a", "modified a"]);
    let pace = watch.paces.get_mut(&host.path("a")).unwrap();
    assert!(pace.held >= 8, "{}", pace.held);
    pace.since = pace.since.checked_sub(MINUTE).unwrap();
    settle(&mut watch);
    let last = locked(&host.shared.queue).read(1, 99, 99_999).unwrap().pop().unwrap();
    assert!(last.event["heldBack"].as_u64() >= Some(8), "{last:?}");
    assert_eq!(host.told(), ["created a", "modified a", "modified a"]);
}

#[test]
fn notices_that_got_lost_do_no_harm() {
    let host = Host::new(100);
    fs::write(host.path("a"), "1").unwrap();
    let mut watch = host.start();
    fs::write(host.path("a"), "2").unwrap();
    fs::write(host.path("b"), "2").unwrap();
    while watch.inotify.read_events().is_ok() {}
    watch.round().unwrap();
    assert_eq!(host.told(), Vec::<String>::new());
    watch.look_at_everything();
    settle(&mut watch);
    assert_eq!(host.told(), ["modified a", "created b"]);
}

#[test]
fn another_policy_is_another_baseline() {
    let host = Host::new(100);
    fs::create_dir(host.path("d")).unwrap();
    fs::write(host.path("d/a"), "1").unwrap();
    let mut watch = host.start();
    let set = |paths: &[&str], version| {
        let paths = paths.iter().map(|path| Watched { path: host.path(path).display().to_string(), recursive: false });
        host.shared.policy.send_replace(Policy { version, paths: paths.collect(), ..Policy::default() });
    };
    set(&["d"], 2);
    settle(&mut watch);
    fs::write(host.path("other"), "1").unwrap();
    fs::write(host.path("d/a"), "2").unwrap();
    settle(&mut watch);
    assert_eq!(host.told(), ["modified d/a"]);
    // A single file, and one that is not there yet.
    set(&["other", "later"], 3);
    settle(&mut watch);
    fs::write(host.path("d/a"), "3").unwrap();
    fs::write(host.path("other"), "2").unwrap();
    fs::write(host.path("later"), "1").unwrap();
    settle(&mut watch);
    assert_eq!(host.told(), ["modified d/a", "created later", "modified other"]);
}
