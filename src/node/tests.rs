//! A whole node, alone in its cluster.

use std::time::Duration;

use raft::eraftpb::{ConfState, Entry, HardState};
use tokio::{runtime::Runtime, time::timeout};

use super::{CheckpointPolicy, Exit, Lease, NodeConfig, Status, spawn};
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

/// Waits for what must happen without anybody's help.
const LIMIT: Duration = Duration::from_secs(60);

/// The only member of a cluster.
fn config(data: &std::path::Path) -> NodeConfig {
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

/// Neither damage, which would have it fetch the database again and again, nor a reason to end.
#[test]
fn an_entry_of_a_newer_program_stops_a_member_that_says_so_and_keeps_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let owner = (ClusterId(7), 1);
    let initial = ConfState { voters: vec![1], ..ConfState::default() };
    let options = Options { segment_bytes: 1 << 20, helper: false, ..Options::default() };
    let log = RaftLog::open(&folder.path().join("raft-log"), owner, initial, options, RealDisk).unwrap();
    let parts = [CONSOLE_DATABASE, 2].into_iter().flat_map(|id| initial_transaction(id, 4096).unwrap());
    let entry = |(index, data): (u64, Vec<u8>)| Entry { index, term: 1, data: data.into(), ..Entry::default() };
    let entries: Vec<_> = (2..).zip(parts).map(entry).collect();
    let hard = HardState { term: 1, commit: 3, ..HardState::default() };
    log.append(&entries, Some(&hard)).unwrap().sync().unwrap();
    let database = Database::open(folder.path(), CONSOLE_DATABASE, log.last_index()).unwrap();
    let (links, waker) = Links::new(LinksConfig::new(1, Vec::new())).unwrap();
    let databases = Databases::of_console(database);
    let (handle, thread) = spawn(config(folder.path()), log.clone(), databases, (links, waker)).unwrap();
    let (mut status, refetch) = (handle.status(), handle.refetch_from());
    let mut wait = |until: &dyn Fn(&Status) -> bool| {
        let waited = async { timeout(LIMIT, status.wait_for(|status| until(status))).await.unwrap().unwrap().clone() };
        Runtime::new().unwrap().block_on(waited)
    };
    let warned = |status: &Status, text: &str| status.warnings.iter().any(|warning| warning.contains(text));
    wait(&|status| warned(status, "entry 3 is for database 2, which this program does not know: upgrade this node"));
    // Nobody else can be elected here: it was, and has refused.
    let seen = wait(&|status| warned(status, "a newer program than this one has written to the raft log"));
    assert_eq!((seen.applied, seen.serving()), (2, None));
    assert_eq!(*refetch.borrow(), None, "nothing is fetched");
    assert!(log.last_index() > 3, "the raft log goes on");
    handle.stop();
    assert_eq!(thread.join().unwrap(), Exit::Stopped);
    let record = folder.path().join("console.checkpoint");
    assert_eq!(Record::read(&record, CONSOLE_DATABASE).unwrap().index, 2, "a newer program goes on from there");
}
