//! A whole node, alone in its cluster.

use std::{
    path::Path,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use raft::eraftpb::{ConfState, Entry, HardState};
use tokio::{join, runtime::Runtime, time::timeout};

use super::{CheckpointPolicy, Exit, Handle, Lease, NodeConfig, Status, spawn};
use crate::{
    cluster::{ClusterId, Member, Membership, Timing, feature_level},
    peer::{Links, LinksConfig},
    storage::{
        checkpoint::Record,
        database::{Database, initial_transaction},
        databases::Databases,
        membership::StoredMembership,
        raft_log::{Options, RaftLog, RealDisk},
        transaction::CONSOLE_DATABASE,
    },
};

/// How long a test waits for what must happen by itself.
const LIMIT: Duration = Duration::from_secs(60);

/// The only member of a cluster.
fn config(data: &Path) -> NodeConfig {
    let member = Member::founder(1, "one", "127.0.0.1", 8086);
    NodeConfig {
        stored: StoredMembership { index: 1, membership: Membership::founded(ClusterId(7), vec![member]) },
        data: data.to_owned(),
        node: 1,
        name: "one".to_owned(),
        timing: Timing::default(),
        demotion_deadline: Duration::from_secs(5),
        checkpoints: CheckpointPolicy {
            bytes: 1 << 20,
            interval: Duration::from_secs(60),
            raft_log_limit: 1 << 30,
            scrub: Duration::ZERO,
        },
        page_size: 4096,
        fast_takeover: true,
        version: "1".to_owned(),
        level: feature_level(),
        lease: Lease::new().unwrap(),
        forgotten: None,
        reach: Default::default(),
        memory: Default::default(),
    }
}

/// Its raft log, still empty.
fn raft_log(data: &Path) -> RaftLog {
    let initial = ConfState { voters: vec![1], ..ConfState::default() };
    let options = Options { segment_bytes: 1 << 20, helper: false, ..Options::default() };
    RaftLog::open(&data.join("raft-log"), (ClusterId(7), 1), initial, options, RealDisk).unwrap()
}

/// Starts it with its database.
fn start(data: &Path, log: &RaftLog) -> (Handle, JoinHandle<Exit>) {
    let database = Database::open(data, CONSOLE_DATABASE, log.last_index()).unwrap();
    let links = Links::new(LinksConfig::new(1, Vec::new())).unwrap();
    spawn(config(data), log.clone(), Databases::of_console(database), links).unwrap()
}

/// Whoever looks at its status has to see which host it is.
#[test]
fn a_node_that_is_not_a_member_any_more_keeps_its_name() {
    let mut config = config(Path::new("/nowhere"));
    assert_eq!(config.name_in(&config.stored.membership), "one");
    config.name = "other".to_owned();
    assert_eq!(config.name_in(&config.stored.membership), "one");
    assert_eq!(config.name_in(&Membership::founded(ClusterId(7), Vec::new())), "other");
}

/// If a switchover ended the wait of an orderly stop, the process would end in the middle of the handover.
#[test]
fn each_who_asks_for_a_handover_waits_for_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let (handle, thread) = start(folder.path(), &raft_log(folder.path()));
    let mut status = handle.status();
    let handed_over = async {
        let begin = Instant::now();
        handle.hand_over(None).await;
        begin.elapsed()
    };
    let again = async {
        handle.hand_over(None).await;
    };
    let (first, ()) = Runtime::new().unwrap().block_on(async {
        timeout(LIMIT, status.wait_for(|status| status.serving().is_some())).await.unwrap().unwrap();
        join!(handed_over, again)
    });
    // There is nobody to take the role: the handover lasts as long as it may.
    let lasts = Duration::from_nanos(Timing::default().handover);
    assert!(first >= lasts, "{first:?} of {lasts:?}");
    handle.stop();
    assert_eq!(thread.join().unwrap(), Exit::Stopped);
}

/// Such an entry is not damage, which would make the member fetch the database again and again, and no reason to end.
#[test]
fn an_entry_of_a_newer_program_stops_a_member_that_says_so_and_keeps_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let log = raft_log(folder.path());
    let parts = [CONSOLE_DATABASE, 2].into_iter().flat_map(|id| initial_transaction(id, 4096).unwrap());
    let entry = |(index, data): (u64, Vec<u8>)| Entry { index, term: 1, data: data.into(), ..Entry::default() };
    let entries: Vec<_> = (2..).zip(parts).map(entry).collect();
    let hard = HardState { term: 1, commit: 3, ..HardState::default() };
    log.append(&entries, Some(&hard)).unwrap().sync().unwrap();
    let (handle, thread) = start(folder.path(), &log);
    let (mut status, refetch) = (handle.status(), handle.refetch_from());
    let mut wait = |until: &dyn Fn(&Status) -> bool| {
        let waited = async { timeout(LIMIT, status.wait_for(|status| until(status))).await.unwrap().unwrap().clone() };
        Runtime::new().unwrap().block_on(waited)
    };
    let warned = |status: &Status, text: &str| status.warnings.iter().any(|warning| warning.contains(text));
    wait(&|status| warned(status, "entry 3 is for database 2, which this program does not know: upgrade this node"));
    // There is no other member to elect: it was elected, and has refused.
    let seen = wait(&|status| warned(status, "a newer program than this one has written to the raft log"));
    assert_eq!((seen.applied, seen.serving()), (2, None));
    assert_eq!(*refetch.borrow(), None, "nothing is fetched");
    assert!(log.last_index() > 3, "the raft log goes on");
    handle.stop();
    assert_eq!(thread.join().unwrap(), Exit::Stopped);
    let record = folder.path().join("console.checkpoint");
    assert_eq!(Record::read(&record, CONSOLE_DATABASE).unwrap().index, 2, "a newer program goes on from there");
}
