//! The audit of a real cluster: what is done through each door, and what is refused there, with who it was and how it ended,
//! also when another member serves by then.

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use twistlock_ha::control::{self, Call, ControlError};

use super::{beside, cluster::Cluster, routes};

const LIMIT: Duration = Duration::from_secs(30);

/// `twistcli` of who is logged in on that host, and nowhere else. Exit code and all that it says.
pub fn here(cluster: &Cluster, index: usize, args: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
    command.args(args).arg("--data").arg(cluster.node(index).data).stdin(std::process::Stdio::null());
    for name in ["TWISTLOCK_ADDRESS", "TWISTLOCK_USER", "TWISTLOCK_PASSWORD", "TWISTLOCK_TOKEN"] {
        command.env_remove(name);
    }
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (output.status.code(), text)
}

/// All rows of the audit, the newest first.
fn rows(cluster: &Cluster) -> Vec<Value> {
    let (code, text) = here(cluster, cluster.primary(), &["audits", "--limit", "1000", "--json"]);
    assert_eq!(code, Some(0), "{text}");
    serde_json::from_str(&text).unwrap()
}

/// The newest rows, those only that `before` had not, when they are as wanted.
fn wait_rows(cluster: &Cluster, before: usize, wanted: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    let begin = Instant::now();
    loop {
        let all = rows(cluster);
        let new = &all[..all.len() - before];
        if wanted(new) {
            return new.to_vec();
        }
        assert!(begin.elapsed() < LIMIT, "{new:#?}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// One of each kind, as it is refused if it can be; and what it leaves: nothing, or the action of its row and what its outcome
/// begins with.
fn operations() -> Vec<(Call, Option<(&'static str, &'static str)>)> {
    let refused = |action| Some((action, "refused: "));
    let member = |rest: &str| format!("high-availability/members/nobody{rest}");
    vec![
        (Call::get("high-availability/join-script?validSec=0"), refused("invite")),
        (Call::delete("high-availability/join-script"), Some(("uninvite", "done"))),
        (Call::post("high-availability/apply"), refused("apply")),
        (Call::delete("high-availability/requests/nobody"), refused("reject")),
        (Call::delete(member("?force=true")), refused("remove")),
        (Call::post("high-availability/switchover").with(json!({ "dryRun": true })), None),
        (Call::post("high-availability/switchover").with(json!({ "to": "nobody" })), refused("switchover")),
        (Call::post("high-availability/pause").with(json!({ "seconds": 1 })), refused("pause")),
        (Call::post("high-availability/resume"), refused("resume")),
        (Call::post("high-availability/rotate-ca").with(json!({ "overlapSec": 0 })), refused("rotate")),
        (Call::post("settings/notifications/test"), Some(("test", "done"))),
        (Call::get("high-availability/events"), None),
        (Call::put(member("/address")).with(json!({})), refused("readdress")),
        (Call::get("settings/certs"), None),
        (Call::post("settings/certs").with(json!({ "consoleSAN": ["no name"] })), refused("set")),
        (Call::post("settings/custom-certs").with(json!({ "certificate": "no PEM" })), refused("set")),
        (Call::delete("settings/custom-certs"), refused("delete")),
        (Call::get("backups"), None),
        (Call::get("settings/backup"), None),
        (Call::post("backups?wait=false").with("no/name"), refused("create")),
        (Call::post("backups/nobody/verify?wait=false"), refused("verify")),
        (Call::patch("backups/nobody").with("nobody"), refused("rename")),
        (Call::delete("backups/nobody"), refused("delete")),
        (Call::get("settings/backup/copies"), None),
        (Call::post("settings/backup/copies/fetch").with("nobody"), refused("fetch")),
        (Call::post("restore").with(json!({ "file": "/nowhere", "stopConsole": true })), refused("restore")),
        (Call::post("high-availability/rotate-key"), Some(("rotate", "done"))),
    ]
}

/// Every operation by the control socket: exactly the rows that it must leave.
fn each_operation_by_the_socket(cluster: &Cluster) {
    let socket = cluster.node(cluster.primary()).data.join(control::SOCKET_NAME);
    for (operation, expected) in operations() {
        let before = rows(cluster).len();
        let answer = control::ask::<Value>(&socket, &operation, LIMIT);
        let all = rows(cluster);
        let new = &all[..all.len() - before];
        match (new, expected) {
            ([], None) => {}
            ([row], Some((action, outcome))) => {
                let told = row["outcome"].as_str().unwrap();
                assert!(row["action"] == action && told.starts_with(outcome), "{operation:?}: {row}");
                assert_eq!(row["ok"], outcome == "done", "{operation:?}: {row}");
                assert!(row["source"].as_str().unwrap().starts_with("local on node"), "{row}");
                if let Err(ControlError::Refused(why)) = &answer {
                    assert_eq!(told, format!("refused: {why}"), "{operation:?}");
                }
            }
            other => panic!("{operation:?}: {answer:?}, {other:?}"),
        }
        if let Some((_, outcome)) = expected {
            assert_eq!(answer.is_ok(), outcome == "done", "{operation:?}: {answer:?}");
        }
    }
}

/// What is done and refused on a SECONDARY stands in the audit as well, by the hand of whoever is PRIMARY.
fn done_on_a_secondary(cluster: &Cluster) {
    let (before, primary) = (rows(cluster).len(), cluster.primary());
    let there = cluster.node((primary + 1) % 3);
    let on_it = |operation: Call| control::ask::<Value>(&there.data.join(control::SOCKET_NAME), &operation, LIMIT);
    let refused = on_it(Call::post("high-availability/pause").with(json!({ "seconds": 60 }))).unwrap_err().to_string();
    let elsewhere = on_it(Call::get("users")).unwrap_err().to_string();
    assert_eq!(elsewhere, format!("only the PRIMARY does this: run it on {}", cluster.node(primary).name));
    on_it(Call::post("backups?wait=false").with("of-a-secondary")).unwrap();
    on_it(Call::post("backups/none-0.1.0-1.tar.gz/verify?wait=false")).unwrap_err();
    let mut new = wait_rows(cluster, before, |new| new.len() >= 3 && new.iter().all(|row| row["outcome"] != "begun"));
    new.sort_by_key(|row| row["action"].as_str().unwrap().to_owned());
    let told: Vec<_> = new.iter().map(|row| (row["action"].as_str().unwrap(), row["ok"].as_bool().unwrap())).collect();
    assert_eq!(told, [("create", true), ("pause", false), ("verify", false)], "{new:#?}");
    for row in &new {
        let source = row["source"].as_str().unwrap();
        assert!(source.starts_with(&format!("local on {}, uid ", there.name)), "{row}");
    }
    let why = new[1]["outcome"].as_str().unwrap();
    assert_eq!(why, format!("refused: only the PRIMARY does this: run it on {}", cluster.node(primary).name));
    assert!(refused.contains(why.trim_start_matches("refused: ")), "{refused}");

    // While there is no PRIMARY it is kept.
    let before = rows(cluster).len();
    cluster.signal(primary, Signal::SIGKILL);
    on_it(Call::delete("high-availability/requests/nobody")).unwrap_err();
    cluster.wait_healthy();
    let new = wait_rows(cluster, before, |new| new.iter().any(|row| row["action"] == "reject"));
    let row = new.iter().find(|row| row["action"] == "reject").unwrap();
    assert!(row["outcome"].as_str().unwrap().starts_with("refused: "), "{row}");
}

#[test]
fn the_audit_has_who_did_what_through_each_door_and_how_it_ended() {
    let _beside = beside();
    let cluster = Cluster::start();
    cluster.wait_healthy();
    each_operation_by_the_socket(&cluster);
    cluster.wait_healthy();
    routes::each_leaves_its_rows(&cluster);
    cluster.wait_healthy();

    // The API, with a login of its own.
    let before = rows(&cluster).len();
    let file = cluster.file();
    let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
    command.args(["ha", "remove", "node9", "--yes", "--address", &cluster.node(cluster.primary()).console_url]);
    command.env("TWISTLOCK_CACERT", &file.ca).env("TWISTLOCK_USER", &file.user);
    let output = command.env("TWISTLOCK_PASSWORD", &file.password).output().unwrap();
    assert_eq!(output.status.code(), Some(75), "{output:?}");
    let new = wait_rows(&cluster, before, |new| new.iter().any(|row| row["action"] == "remove"));
    let removal: Vec<_> = new.iter().filter(|row| row["action"] == "remove").collect();
    assert_eq!(removal.len(), 1);
    assert_eq!((&removal[0]["user"], &removal[0]["ok"]), (&file.user.as_str().into(), &false.into()), "{new:?}");

    // What only the API has, without a password: who may use the socket may do it.
    let before = rows(&cluster).len();
    for (args, code) in [
        (&["tags", "add", "of-root"][..], 0),
        (&["tags", "add", "of-root"], 75),
        (&["tags", "list"], 0),
        (&["users", "list"], 0),
        (&["logs"], 0),
    ] {
        let (found, text) = here(&cluster, cluster.primary(), args);
        assert_eq!(found, Some(code), "{args:?}: {text}");
    }
    let new = wait_rows(&cluster, before, |new| new.len() >= 2);
    let told: Vec<_> = new.iter().map(|row| (row["action"].as_str().unwrap(), row["ok"].as_bool().unwrap())).collect();
    assert_eq!(told, [("create", false), ("create", true)], "{new:?}");
    let elsewhere = here(&cluster, (cluster.primary() + 1) % 3, &["tags", "list"]);
    assert_ne!(elsewhere.0, Some(0), "a SECONDARY has no Console: {elsewhere:?}");

    done_on_a_secondary(&cluster);

    // Its outcome is written by the member that serves by then.
    let (before, from) = (rows(&cluster).len(), cluster.primary());
    let (code, text) = here(&cluster, from, &["ha", "switchover"]);
    assert_eq!(code, Some(0), "{text}");
    let new = wait_rows(&cluster, before, |new| matches!(new, [row] if row["outcome"] == "done"));
    assert_eq!((&new[0]["action"], &new[0]["ok"]), (&"switchover".into(), &true.into()));
    assert_ne!(cluster.primary(), from);

    // A drill, by whoever may kill the daemon anyway.
    cluster.wait_healthy();
    let before = rows(&cluster).len();
    let (code, text) = here(&cluster, cluster.primary(), &["ha", "drill"]);
    assert_eq!(code, Some(0), "{text}");
    let new = rows(&cluster);
    let new = &new[..new.len() - before];
    assert!(matches!(new, [row] if row["action"] == "drill" && row["ok"] == true), "{new:#?}");
    assert!(new[0]["difference"]["result"]["new"].as_str().unwrap().contains(" took over from "), "{new:#?}");
    assert!(!here(&cluster, cluster.primary(), &["tags", "list"]).1.contains("drill-"));
    println!("audit: {}", cluster.finish(&["automatic takeover is paused"]));
}
