//! Damages the data folder of a member in every way, and starts it. `DAMAGE=all` flips every byte instead of a sample.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use raft::eraftpb::{ConfState, Entry, HardState};

use super::*;
use crate::{
    cluster::{Member, Membership, NodeId},
    config::Config,
    found,
    pki::{
        Authority, CA_CERTIFICATE, CLUSTER_KEY, CONSOLE_CERTIFICATE, CONSOLE_KEY, NODE_CERTIFICATE, NODE_KEY, NodeTls,
        Pair,
    },
    storage::{
        DataDir, Identity,
        database::{Database, initial_transaction},
        membership::{COPY, FILE, StoredMembership},
        raft_log::{Options, RaftLog, RealDisk},
        transaction::CONSOLE_DATABASE,
    },
};

/// The index of the entry with the membership in force, and of the last entry.
const CHANGED: u64 = 5;
const LAST: u64 = 7;
/// The files of a member, except the raft log.
const FILES: [&str; 10] = [
    "identity.json",
    "membership.json",
    "promise-ms",
    "certificates/ca.pem",
    "certificates/node.pem",
    "certificates/node-key.pem",
    "certificates/console-cert.pem",
    "certificates/console-key.pem",
    "certificates/cluster.key",
    "database/console.checkpoint",
];

fn open_log(data: &Path, identity: &Identity) -> RaftLog {
    let initial = ConfState { voters: vec![1, 2, 3], ..ConfState::default() };
    let options = Options { segment_bytes: 64 << 10, helper: false, ..Options::default() };
    RaftLog::open(&data.join("raft-log"), (identity.cluster, identity.node), initial, options, RealDisk).unwrap()
}

/// The data folder of the founder of a cluster that has three members by now.
fn member(data: &Path) -> Identity {
    let dir = DataDir::open(data).unwrap();
    let config = Config {
        data_folder: data.to_owned(),
        bind_address: Some("127.0.0.1".parse().unwrap()),
        high_availability_name: Some("first".to_owned()),
        ..Config::default()
    };
    let identity = found::found(&config, &dir).unwrap();
    let mut membership = identity.membership.clone();
    membership
        .roster
        .members
        .extend((2..=3).map(|id| Member::founder(id, &format!("n{id}"), &format!("127.0.0.{id}"), 8086)));
    membership.roster.next_id = 4;
    let log = open_log(data, &identity);
    let first = initial_transaction(CONSOLE_DATABASE, 4096).unwrap().remove(0);
    let entries: Vec<Entry> = (2..=LAST)
        .map(|index| Entry {
            index,
            term: 1,
            data: if index == 2 { first.clone().into() } else { Default::default() },
            context: if index == CHANGED { membership.encode().into() } else { Default::default() },
            ..Entry::default()
        })
        .collect();
    let hard = HardState { term: 1, commit: LAST, ..HardState::default() };
    log.append(&entries, Some(&hard)).unwrap().sync().unwrap();
    log.set_applied_conf(ConfState { voters: vec![1, 2, 3], ..ConfState::default() }, CHANGED).unwrap();
    StoredMembership { index: CHANGED, membership }.write(data).unwrap();
    fs::create_dir(data.join("database")).unwrap();
    let mut database = Database::open(&data.join("database"), CONSOLE_DATABASE, LAST).unwrap();
    for entry in &entries {
        match entry.data.is_empty() {
            true => database.apply_empty(entry.index, 1).unwrap(),
            false => database.apply(entry.index, 1, &entry.data, &log).unwrap(),
        }
    }
    let (_, saving) = database.begin_checkpoint().unwrap();
    database.saved(saving.unwrap().save()).unwrap();
    promised_earlier(std::time::Duration::from_millis(475), data, false, &mut Notes::default()).unwrap();
    fs::write(data.join(PROMISE), "475").unwrap();
    identity
}

/// What a start found.
struct Started {
    identity: Identity,
    stored: StoredMembership,
    distrusted: Option<String>,
    notes: Notes,
}

/// The part of the daemon's start that concerns the data folder.
fn start(data: &Path) -> Result<Option<Started>> {
    let mut notes = Notes::default();
    let dir = DataDir::open(data)?;
    prepare(data, &mut notes)?;
    let Some(identity) = identity(&dir, &mut notes)? else { return Ok(None) };
    let log = open_log(data, &identity);
    fs::create_dir_all(data.join("database"))?;
    let mut database = database(data, &log, &mut notes)?;
    let stored = membership(data, &identity, &log, &mut database, &mut notes)?;
    promised_earlier(std::time::Duration::from_millis(475), data, false, &mut notes)?;
    let names = |address: &str| vec!["first".to_owned(), address.to_owned()];
    certificates(data, &identity, &stored.membership, names, &mut notes)?;
    let dir = data.join("certificates");
    assert_eq!(NodeTls::load(&dir)?.identity, (identity.cluster, identity.node));
    Pair::load(&dir.join(CONSOLE_CERTIFICATE), &dir.join(CONSOLE_KEY))?;
    let distrusted = database.distrusted().map(str::to_owned);
    Ok(Some(Started { identity, stored, distrusted, notes }))
}

/// A folder in memory, if possible: there are hundreds of them, each for a moment.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// A folder that is never changed: tests damage copies of it.
struct Original {
    folder: tempfile::TempDir,
    identity: Identity,
}

impl Original {
    fn new() -> Self {
        let folder = folder();
        let identity = member(folder.path());
        Self { folder, identity }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Damages a copy and starts it. It must be as before, or say in one line what to do. Returns what was repaired.
    fn damaged(&self, what: &str, damage: impl FnOnce(&Path)) -> Result<Notes> {
        let copied = folder();
        copy(self.folder.path(), copied.path());
        damage(copied.path());
        let started = match start(copied.path()) {
            Ok(started) => started.unwrap_or_else(|| panic!("{what}: taken for a folder of nobody")),
            Err(error) => {
                let line = format!("{error:#}");
                // True if the line has the name of the file, without its folder.
                let named = |name: &str| line.contains(name.rsplit('/').next().unwrap_or(name));
                let says = !line.contains('\n') && line.contains("twistcli") && what.split(" and ").any(named);
                assert!(says, "{what}: {line}");
                return Err(error);
            }
        };
        let Identity { cluster, node, name, .. } = &started.identity;
        assert_eq!((*cluster, *node, name.as_str()), (self.identity.cluster, 1, "first"), "{what}");
        assert_eq!((started.stored.index, started.stored.membership.roster.members.len()), (CHANGED, 3), "{what}");
        assert_eq!(started.distrusted, None, "{what}");
        let again = start(copied.path()).unwrap().unwrap();
        assert!(again.notes.sentences().iter().all(|note| note.contains(PROMISE)), "{what}: {:?}", again.notes);
        Ok(started.notes)
    }
}

#[test]
fn every_file_may_be_lost_emptied_cut_flipped_or_something_else() {
    let original = Original::new();
    assert_eq!(original.damaged("nothing", |_| {}).unwrap(), Notes::default());
    let other = Original::new();
    let step = if std::env::var("DAMAGE").is_ok_and(|all| all == "all") { 1 } else { 61 };
    for name in FILES {
        let bytes = fs::read(original.path(name)).unwrap();
        let put = |what: &str, bytes: &[u8]| {
            let written = |data: &Path| fs::write(data.join(name), bytes).unwrap();
            original.damaged(&format!("{name} {what}"), written)
        };
        let one = |notes: Result<Notes>| assert!(!notes.unwrap().sentences().is_empty(), "{name}: nothing is said");
        // A cluster key that cannot be proven wrong here is fetched while the node runs.
        let silent = name.ends_with(CLUSTER_KEY);
        let removed = original.damaged(name, |data| fs::remove_file(data.join(name)).unwrap());
        // Without a record the database begins with the raft log, as that of a new member does.
        let usual = silent || name.ends_with("checkpoint");
        assert_eq!(removed.unwrap().sentences().is_empty(), usual, "{name}");
        one(put("emptied", b""));
        if name != PROMISE {
            one(put("cut", &bytes[..bytes.len() / 2])); // half a number is one, too
        }
        if !silent {
            one(put("of zeros", &vec![0; bytes.len()]));
        }
        one(original.damaged(name, |data| {
            fs::remove_file(data.join(name)).unwrap();
            fs::create_dir_all(data.join(name).join("inside")).unwrap();
        }));
        one(original.damaged(name, |data| {
            fs::remove_file(data.join(name)).unwrap();
            symlink(data.join(name), data.join(name)).unwrap();
        }));
        let linked = original.damaged(name, |data| {
            fs::rename(data.join(name), data.join("elsewhere")).unwrap();
            symlink("elsewhere", data.join("link")).unwrap();
            symlink(data.join("link"), data.join(name)).unwrap();
        });
        assert_eq!(linked.unwrap(), Notes::default(), "{name}: a link is as good as the file");
        for at in (0..bytes.len()).step_by(if bytes.len() < 64 { 1 } else { step }) {
            for bit in [0, 7] {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                put(&format!("flipped at {at}.{bit}"), &flipped).unwrap();
            }
        }
        for with in FILES.iter().filter(|with| **with != name) {
            put(&format!("like {with}"), &fs::read(original.path(with)).unwrap()).unwrap();
        }
        // Of another cluster, as a wrong restore leaves it.
        if name != "database/console.checkpoint" && name != PROMISE {
            put("of another member", &fs::read(other.path(name)).unwrap()).unwrap();
        }
    }
}

#[test]
fn two_that_are_lost_at_once_are_mended_or_named() {
    let original = Original::new();
    for (first, one) in FILES.iter().enumerate() {
        for two in &FILES[..first] {
            let lost = |data: &Path| [one, two].iter().for_each(|name| fs::write(data.join(name), "lost").unwrap());
            let result = original.damaged(&format!("{one} and {two}"), lost);
            // Who this host is, is proven by its own key, or by the cluster's.
            let node = |name: &str| [NODE_KEY, NODE_CERTIFICATE].iter().any(|file| name.ends_with(file));
            let proof = |name: &str| name.ends_with(CLUSTER_KEY) || name == "identity.json";
            let pair = |one: &str, two: &str| node(one) && proof(two);
            let ca = |one: &str, two: &str| one.ends_with(CA_CERTIFICATE) && two == "identity.json";
            let named = [(one, two), (two, one)].iter().any(|(one, two)| pair(one, two) || ca(one, two));
            assert_eq!(result.is_err(), named, "{one} and {two}: {result:?}");
        }
    }
}

#[test]
fn an_older_membership_gives_way_to_that_of_the_raft_log() {
    let original = Original::new();
    let notes = original.damaged("an older copy", |data| {
        let membership = original.identity.membership.clone();
        StoredMembership { index: 3, membership }.write(data).unwrap();
    });
    assert!(notes.unwrap().sentences()[0].contains("older copy"));
}

#[test]
fn what_the_raft_log_has_let_go_of_is_fetched() {
    let original = Original::new();
    let start_without = |names: &[&str]| {
        let copied = folder();
        copy(original.folder.path(), copied.path());
        open_log(copied.path(), &original.identity).compact(CHANGED + 1).unwrap();
        names.iter().for_each(|name| fs::write(copied.path().join(name), "damaged").unwrap());
        start(copied.path()).unwrap().unwrap()
    };
    for names in [&[FILE, COPY][..], &["database/console.checkpoint"]] {
        let started = start_without(names);
        assert!(started.distrusted.unwrap().contains(names[0].rsplit('/').next().unwrap()), "{names:?}");
        assert!(started.notes.sentences().iter().any(|note| note.contains("fetched from another member")), "{names:?}");
    }
    // An older one has other voters than the raft log, whether it is the file or the copy that is left of it.
    for names in [&[][..], &[FILE]] {
        let copied = folder();
        copy(original.folder.path(), copied.path());
        open_log(copied.path(), &original.identity).compact(CHANGED + 1).unwrap();
        let membership = original.identity.membership.clone();
        StoredMembership { index: 3, membership }.write(copied.path()).unwrap();
        names.iter().for_each(|name| fs::write(copied.path().join(name), "damaged").unwrap());
        let started = start(copied.path()).unwrap().unwrap();
        assert!(started.distrusted.unwrap().contains("older copy"), "{names:?}");
    }
    let started = start_without(&[FILE]);
    assert_eq!((started.distrusted, started.stored.membership.roster.members.len()), (None, 3));
    assert!(started.notes.sentences()[0].contains("rebuilt from its copy"));
    assert_eq!(start_without(&[COPY]).notes, Notes::default(), "the next start writes it again");
    assert_eq!(start_without(&["certificates/node-key.pem"]).distrusted, None);
}

#[test]
fn a_new_key_is_signed_by_the_authority_of_the_membership() {
    let original = Original::new();
    let copied = folder();
    copy(original.folder.path(), copied.path());
    let dir = copied.path().join("certificates");
    let key = fs::read(dir.join(NODE_KEY)).unwrap();
    // Of another node of the same cluster, which both would have to answer for.
    let Membership { shared, cluster, .. } = original.identity.membership.clone();
    Authority::open(cluster, &shared.authority.unwrap(), &dir)
        .unwrap()
        .issue_node(2 as NodeId, "n2", &[])
        .unwrap()
        .save_node(&dir)
        .unwrap();
    let swapped = fs::read(dir.join(NODE_KEY)).unwrap();
    let started = start(copied.path()).unwrap().unwrap();
    assert!(started.notes.sentences()[0].contains("is of another node: number 2"), "{:?}", started.notes);
    let new = fs::read(dir.join(NODE_KEY)).unwrap();
    assert!(new != key && new != swapped, "nobody else has its key");
    assert!(fs::read_dir(copied.path().join(FOLDER)).unwrap().count() == 2);
}
