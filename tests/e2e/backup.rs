//! Backups of real daemons: taken under load on any member, restored into the running cluster; and everything that must be
//! refused. The loss of all data folders stands in tests/join.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use twistlock_ha::{
    backup::{Backup, BackupState, Kind, Outcome, Started},
    cluster::Role,
    control::{self, Call},
};

use super::{
    WRITERS, alone, beside,
    cluster::{Cluster, FROZEN, LIMIT},
    disk::{in_private_mounts, run},
    writers::{Pen, Writers},
};

/// Between two looks at something under way.
const LOOK: Duration = Duration::from_millis(20);

pub fn ask<T: serde::de::DeserializeOwned>(cluster: &Cluster, node: usize, operation: Call) -> Result<T, String> {
    control::ask(&cluster.node(node).control, &operation, LIMIT).map_err(|error| error.to_string())
}

pub fn wait_ended(cluster: &Cluster, node: usize, started: &Started) -> Outcome {
    let deadline = Instant::now() + LIMIT;
    loop {
        let state: BackupState = ask(cluster, node, Call::get("settings/backup")).unwrap();
        if let Some(last) = state.last.filter(|last| last.number == started.number) {
            return last;
        }
        assert!(Instant::now() < deadline, "{started:?} does not end: {:?}", state.running);
        thread::sleep(LOOK);
    }
}

/// Makes a backup on a node, and returns its file.
pub fn make(cluster: &Cluster, node: usize, name: &str) -> PathBuf {
    let started: Started = ask(cluster, node, Call::post("backups?wait=false").with(name.to_owned())).unwrap();
    let outcome = wait_ended(cluster, node, &started);
    assert!(outcome.ok, "{}", outcome.text);
    println!("  {name} on {}: {} ms, {}", cluster.node(node).name, outcome.ms, outcome.text);
    folder(cluster, node).join(outcome.id)
}

pub fn folder(cluster: &Cluster, node: usize) -> PathBuf {
    cluster.config_path(node).with_file_name("backup")
}

pub fn begin_restore(cluster: &Cluster, node: usize, file: &Path, stop_console: bool) -> Result<Started, String> {
    ask(
        cluster,
        node,
        Call::post("restore")
            .with(json!({ "file": file.to_owned(), "stopConsole": stop_console, "unencrypted": false })),
    )
}

pub fn restore(cluster: &Cluster, file: &Path) -> Outcome {
    let node = cluster.primary();
    let started = begin_restore(cluster, node, file, true).unwrap();
    wait_ended(cluster, node, &started)
}

#[test]
fn timed_a_backup_under_load_and_the_exact_state_of_another_come_back() {
    let _alone = alone();
    let cluster = Cluster::start();
    let (primary, secondary) = (cluster.primary(), (cluster.primary() + 1) % 3);
    let writers = Writers::start(&cluster.file(), WRITERS);
    writers.wait_success(Instant::now(), |_| true).expect("they write");
    let under_load = [make(&cluster, secondary, "load2"), make(&cluster, primary, "load1")];
    let busy = writers.wait_success(Instant::now(), |_| true).expect("they still write");
    println!("  next write under the last backup after {} ms; {}", busy.as_millis(), writers.verify());
    let pen = Pen::new(&cluster.file());
    let before = pen.tags();
    let exact = make(&cluster, secondary, "exact");
    assert!(pen.write(primary, "written-afterwards"));
    let begin = Instant::now();
    let outcome = restore(&cluster, &exact);
    assert!(outcome.ok, "{}", outcome.text);
    assert_eq!(pen.call(primary, "GET", "/users", None).0, 401, "nobody is logged in after a restore");
    let pen = Pen::new(&cluster.file());
    println!("  restored in {} ms, logged in again after {} ms", outcome.ms, begin.elapsed().as_millis());
    assert!(pen.tags() == before, "not exactly the state of the backup");
    let audits = pen.call(primary, "GET", "/audits/mgmt", None).1;
    assert!(audits.contains("\"restore\"") && audits.contains("exact-"), "{audits}");
    for file in under_load {
        let outcome = restore(&cluster, &file);
        assert!(outcome.ok, "{}", outcome.text);
        let tags = Pen::new(&cluster.file()).tags();
        assert!(!tags.is_empty() && tags.iter().all(|tag| before.contains(tag)), "it has what nobody wrote");
    }
    assert!(Pen::new(&cluster.file()).write(primary, "goes-on"));
    println!("  {}", cluster.finish(&[]));
}

/// What the web page and other clients do.
#[test]
fn the_api_makes_lists_gives_renames_and_deletes() {
    let _beside = beside();
    let cluster = Cluster::start();
    let (primary, pen) = (cluster.primary(), Pen::new(&cluster.file()));
    let call = |method: &str, path: &str, body: Option<Value>| pen.call(primary, method, path, body);
    let (status, text) = call("POST", "/backups", Some(json!("mine")));
    let made: Started = serde_json::from_str(&text).unwrap();
    assert_eq!(status, 200, "{text}");
    let list: Vec<Backup> = serde_json::from_str(&call("GET", "/backups", None).1).unwrap();
    assert_eq!((list.len(), &list[0].id, list[0].kind), (1, &made.id, Kind::Manual));
    let path = format!("/backups/{}", made.id);
    let (status, bytes) = pen.download(primary, &path);
    assert!(status == 200 && bytes == fs::read(folder(&cluster, primary).join(&made.id)).unwrap());
    assert_eq!(call("POST", &format!("{path}/verify"), None).0, 200);
    let (status, text) = call("PATCH", &path, Some(json!("other")));
    let renamed: Backup = serde_json::from_str(&text).unwrap();
    assert_eq!((status, &*renamed.name, renamed.time), (200, "other", list[0].time));
    for name in ["../../etc/cron.d/x", "", "a/b", "daily", "a\r\nSet-Cookie: b", "..", "<script>"] {
        assert_eq!(call("POST", "/backups", Some(json!(name))).0, 400, "{name:?}");
        let path = format!("/backups/{}", renamed.id);
        assert_eq!(call("PATCH", &path, Some(json!(name))).0, 400, "{name:?}");
    }
    fs::write(folder(&cluster, primary).join("../secret-0.1.0-1.tar.gz"), "x").unwrap();
    for id in ["..%2Fsecret-0.1.0-1.tar.gz", "%2Fetc%2Fpasswd", "..%2Fdata%2Fidentity.json", "none-0.1.0-1.tar.gz"] {
        for (method, body) in [("GET", None), ("DELETE", None), ("PATCH", Some(json!("x")))] {
            assert_eq!(call(method, &format!("/backups/{id}"), body).0, 404, "{method} {id}");
        }
        assert_eq!(call("POST", &format!("/backups/{id}/verify"), None).0, 404, "{id}");
        let decoded = id.replace("%2F", "/");
        assert_eq!(call("POST", &format!("/backups/{id}/restore"), Some(json!({ "confirm": decoded }))).0, 404, "{id}");
    }
    // Without the id once more nothing is begun. A browser test restores.
    for body in [json!({ "confirm": "yes" }), json!({}), json!({ "confirm": renamed.id, "force": true })] {
        let status = call("POST", &format!("/backups/{}/restore", renamed.id), Some(body)).0;
        assert!(matches!(status, 400 | 422), "{status}");
    }
    assert_eq!(call("GET", &path, None).0, 404, "the old name");
    assert_eq!(call("DELETE", &format!("/backups/{}", renamed.id), None).0, 200);
    let state: BackupState = serde_json::from_str(&call("GET", "/settings/backup", None).1).unwrap();
    assert!(!state.enabled && state.newest.is_none() && state.last.is_some_and(|last| last.ok), "nothing is left");
    those_of_other_members_are_listed(&cluster, &call);
    println!("  {}", cluster.finish(FROZEN));
}

/// With the member that has them, and what cannot be done from here says where it can; who does not answer is named.
fn those_of_other_members_are_listed(cluster: &Cluster, call: &dyn Fn(&str, &str, Option<Value>) -> (u16, String)) {
    let primary = cluster.primary();
    let (one, other) = ((primary + 1) % 3, (primary + 2) % 3);
    let (name, file) = (cluster.node(one).name, make(cluster, one, "elsewhere"));
    let id = file.file_name().unwrap().to_str().unwrap();
    let list = || serde_json::from_str::<Vec<Backup>>(&call("GET", "/backups", None).1).unwrap();
    let places = |list: &[Backup]| list.iter().map(|one| (one.node.clone(), one.id.clone())).collect::<Vec<_>>();
    assert_eq!(places(&list()), [(name.clone(), id.to_owned())]);
    for node in 0..3 {
        let told: Vec<Backup> = ask(cluster, node, Call::get("backups?limit=1000")).unwrap();
        assert_eq!(places(&told), [(name.clone(), id.to_owned())], "as {} sees it", cluster.node(node).name);
    }
    let (path, there) = (format!("/backups/{id}"), folder(cluster, one).display().to_string());
    let again = Some(json!({ "confirm": id }));
    for (method, path, body, what) in [
        ("GET", path.clone(), None, format!("make {name} PRIMARY: twistcli ha switchover --to {name}")),
        ("POST", format!("{path}/restore"), again, format!("make {name} PRIMARY")),
        ("POST", format!("{path}/verify"), None, format!("Run there: sudo twistcli backup verify {id}")),
        ("PATCH", path.clone(), Some(json!("mine")), format!("Run there: sudo twistcli backup rename {id} mine")),
        ("DELETE", path, None, format!("Run there: sudo twistcli backup delete {id}")),
    ] {
        let (status, text) = call(method, &path, body);
        let lies = format!("It lies on {name}, in {there}");
        assert!(status == 404 && text.contains(&lies) && text.contains(&what), "{method} {path}: {status} {text}");
    }
    cluster.signal(other, Signal::SIGSTOP);
    let begin = Instant::now();
    assert_eq!(places(&list()), [(name, id.to_owned())]);
    let (took, silent) = (begin.elapsed(), cluster.node(other).name);
    let state: BackupState = serde_json::from_str(&call("GET", "/settings/backup", None).1).unwrap();
    // The history has that it went, while it is away, and that it came back.
    let told = |what: &str| {
        call("GET", "/high-availability/events?kind=member&limit=50", None).1.contains(&format!("{silent} {what}"))
    };
    cluster.wait_for("the history says that it went DOWN", |_| told("went DOWN: it was SECONDARY"));
    cluster.signal(other, Signal::SIGCONT);
    cluster.wait_for("the history says that it is back", |_| told("is back"));
    assert!(took < LIMIT / 2, "{took:?}");
    let counts: Vec<_> = state.members.iter().map(|member| (member.node.clone(), member.backups)).collect();
    assert!(
        counts.contains(&(silent.clone(), None)) && counts.iter().any(|(_, count)| *count == Some(1)),
        "{counts:?}"
    );
    let problem = state.members.into_iter().find_map(|member| member.problem).unwrap();
    assert!(problem.starts_with(&format!("{silent} does not answer: ")), "{problem}");
    println!("  {silent} was stopped: the list took {} ms; {problem}", took.as_millis());
    cluster.wait_healthy();
}

#[test]
fn what_cannot_be_restored_is_refused_and_changes_nothing() {
    let _beside = beside();
    let cluster = Cluster::start();
    let (primary, pen) = (cluster.primary(), Pen::new(&cluster.file()));
    assert!(pen.write(primary, "kept"));
    let good = make(&cluster, primary, "good");
    assert!(pen.write(primary, "after"));
    let refused = |node, file: &Path, stop, part: &str| {
        let error = begin_restore(&cluster, node, file, stop).unwrap_err();
        assert!(error.contains(part), "{error}");
    };
    refused(primary, &good, false, "--stop-console");
    refused((primary + 1) % 3, &good, true, "only the PRIMARY does this");
    let name = good.file_name().unwrap().to_str().unwrap();
    let other = good.with_file_name(name.replace("-0.1.0-", "-9.9.9-"));
    fs::copy(&good, &other).unwrap();
    refused(primary, &other, true, "was made by version 9.9.9, and this is 0.1.0");
    refused(primary, Path::new("/etc/passwd"), true, "passwd is no backup");
    refused(primary, &good.with_file_name("none-0.1.0-5.tar.gz"), true, "there is no file");
    let bytes = fs::read(&good).unwrap();
    for (what, at) in [("first", 40), ("middle", bytes.len() / 2), ("last", bytes.len() - 3)] {
        let mut bad = bytes.clone();
        bad[at] ^= 0x20;
        let file = good.with_file_name(format!("{what}-0.1.0-7.tar.gz"));
        fs::write(&file, bad).unwrap();
        let outcome = restore(&cluster, &file);
        assert!(!outcome.ok && outcome.text.contains("damaged"), "{what}: {}", outcome.text);
        let id = file.file_name().unwrap().to_str().unwrap().to_owned();
        let started: Started = ask(&cluster, primary, Call::post(format!("backups/{id}/verify?wait=false"))).unwrap();
        let outcome = wait_ended(&cluster, primary, &started);
        assert!(!outcome.ok && outcome.text.contains("damaged"), "{what}: {}", outcome.text);
    }
    // Another one under a name that says another time.
    let other = good.with_file_name("good-0.1.0-7.tar.gz");
    fs::copy(&good, &other).unwrap();
    let outcome = restore(&cluster, &other);
    assert!(!outcome.ok && outcome.text.contains("another one under this name"), "{}", outcome.text);
    let id = other.file_name().unwrap().to_str().unwrap().to_owned();
    let started: Started = ask(&cluster, primary, Call::post(format!("backups/{id}/verify?wait=false"))).unwrap();
    assert!(wait_ended(&cluster, primary, &started).text.contains("another one under this name"));
    fs::write(good.with_file_name("text-0.1.0-7.tar.gz"), "not an archive").unwrap();
    refused(primary, &good.with_file_name("text-0.1.0-7.tar.gz"), true, "is no backup");
    assert!(pen.has("kept") && pen.has("after"), "and everybody is still logged in");
    // Under whatever name: what it is stands in it.
    let renamed = good.with_file_name("of last week.bak");
    fs::copy(&good, &renamed).unwrap();
    let outcome = restore(&cluster, &renamed);
    assert!(outcome.ok, "{}", outcome.text);
    let pen = Pen::new(&cluster.file());
    assert!(pen.has("kept") && !pen.has("after"));
    println!("  {}", cluster.finish(&["the restore failed", "could not be verified"]));
}

/// It was done, somebody was told so, and at that moment the PRIMARY dies: the next one has it.
#[test]
fn a_restore_that_is_done_outlives_the_primary() {
    let _beside = beside();
    let cluster = Cluster::start();
    let primary = cluster.primary();
    let pen = Pen::new(&cluster.file());
    assert!(pen.write(primary, "kept"));
    let file = make(&cluster, primary, "whole");
    let before = pen.tags();
    assert!(pen.write(primary, "after"));
    let started = begin_restore(&cluster, primary, &file, true).unwrap();
    let outcome = wait_ended(&cluster, primary, &started);
    cluster.signal(primary, Signal::SIGKILL);
    assert!(outcome.ok, "{}", outcome.text);
    cluster.wait_for("a new primary", |statuses| {
        let serves = |status: &twistlock_ha::node::Status| status.role == Role::Primary;
        statuses.iter().enumerate().any(|(node, status)| node != primary && status.as_ref().is_some_and(serves))
    });
    let pen = Pen::new(&cluster.file());
    assert!(pen.tags() == before, "a restore that was reported as done is lost");
    assert!(pen.write(cluster.primary(), "goes-on"));
    cluster.wait_healthy();
    println!("  {}", cluster.finish(&[]));
}

#[test]
fn members_that_share_a_folder_make_one_daily_backup() {
    let _beside = beside();
    let cluster = Cluster::start();
    let shared = cluster.config_path(0).with_file_name("shared");
    cluster.configure("DATA_RECOVERY_ENABLED", "true");
    cluster.configure("DATA_RECOVERY_VOLUME", shared.to_str().unwrap());
    cluster.configure("BACKUP_DELAY_SECONDS", "3");
    cluster.restart_all();
    let state = |node| ask::<BackupState>(&cluster, node, Call::get("settings/backup")).ok();
    let tomorrow =
        |state: BackupState| state.newest.zip(state.next).is_some_and(|(newest, next)| next >= newest + 86_400);
    cluster.wait_for("nothing due", |_| (0..3).all(|node| state(node).is_some_and(tomorrow)));
    let list: Vec<Backup> = ask(&cluster, 0, Call::get("backups?limit=1000")).unwrap();
    for kind in Kind::AUTOMATIC {
        assert_eq!(list.iter().filter(|backup| backup.kind == kind).count(), 1, "{list:?}");
    }
    let warned = cluster.statuses().into_iter().flatten().any(|status| status.warnings.join(" ").contains("backup"));
    assert!(!warned, "{:?}", cluster.statuses());
    println!("  {}", cluster.finish(&[]));
}

#[test]
fn every_member_makes_encrypted_backups_by_itself() {
    let _beside = beside();
    let cluster = Cluster::start();
    assert!(Pen::new(&cluster.file()).write(cluster.primary(), "kept"));
    let plain = make(&cluster, cluster.primary(), "plain");
    let key = cluster.config_path(0).with_file_name("backup.key");
    fs::write(&key, "a pass phrase of the administrator").unwrap();
    cluster.configure("DATA_RECOVERY_ENABLED", "true");
    cluster.configure("BACKUP_DELAY_SECONDS", "1");
    cluster.configure("BACKUP_KEY_FILE", key.to_str().unwrap());
    cluster.restart_all();
    let listed = |node| {
        let all: Vec<Backup> = ask(&cluster, node, Call::get("backups?limit=1000")).unwrap_or_default();
        let own = |backup: &Backup| backup.node == cluster.node(node).name && backup.kind != Kind::Manual;
        all.into_iter().filter(own).collect::<Vec<_>>()
    };
    cluster.wait_for("the first backups", |_| (0..3).all(|node| listed(node).len() == 3));
    for node in 0..3 {
        let kinds: Vec<Kind> = listed(node).iter().map(|backup| backup.kind).collect();
        assert!(Kind::AUTOMATIC.iter().all(|kind| kinds.contains(kind)), "{kinds:?}");
        assert!(listed(node).iter().all(|backup| backup.encrypted));
    }
    let primary = cluster.primary();
    let file = folder(&cluster, primary).join(&listed(primary)[0].id);
    let outcome = restore(&cluster, &file);
    assert!(outcome.ok && Pen::new(&cluster.file()).has("kept"), "{}", outcome.text);
    // Whoever can write to the folder could have made one that is not encrypted.
    let error = begin_restore(&cluster, primary, &plain, true).unwrap_err();
    assert!(error.contains("--unencrypted"), "{error}");
    let operation = Call::post("restore").with(json!({ "file": plain, "stopConsole": true, "unencrypted": true }));
    let started: Started = ask(&cluster, primary, operation).unwrap();
    let outcome = wait_ended(&cluster, primary, &started);
    assert!(outcome.ok && Pen::new(&cluster.file()).has("kept"), "{}", outcome.text);
    // Not due again: a restart makes none.
    cluster.restart_all();
    let state = |node| ask::<BackupState>(&cluster, node, Call::get("settings/backup")).ok();
    let tomorrow =
        |state: BackupState| state.newest.zip(state.next).is_some_and(|(newest, next)| next >= newest + 86_400);
    cluster.wait_for("tomorrow's backups", |_| (0..3).all(|node| state(node).is_some_and(tomorrow)));
    println!("  {}", cluster.finish(&[]));
}

#[test]
fn a_disk_that_is_too_small_is_left_alone() {
    let _beside = beside();
    in_private_mounts(|| {
        let node = 1;
        let cluster = Cluster::start_with(super::cluster::RESTART_AFTER, |dir| {
            let small = dir.join(format!("node{}", node + 1)).join("backup");
            fs::create_dir_all(&small).unwrap();
            run("mount", &["-t", "tmpfs", "-o", "size=32m", "tmpfs", small.to_str().unwrap()]);
        });
        let started: Started = ask(&cluster, node, Call::post("backups?wait=false").with("large")).unwrap();
        let outcome = wait_ended(&cluster, node, &started);
        assert!(!outcome.ok && outcome.text.contains("free some space"), "{}", outcome.text);
        let warned = |cluster: &Cluster| {
            let status = cluster.statuses()[node].clone();
            status.is_some_and(|status| status.warnings.iter().any(|warning| warning.contains("backup of this host")))
        };
        cluster.wait_for("a warning in the status", |_| warned(&cluster));
        assert_eq!(fs::read_dir(folder(&cluster, node)).unwrap().count(), 0, "nothing is left over");
        println!("  {}", cluster.finish(&["the backup failed"]));
    });
}
