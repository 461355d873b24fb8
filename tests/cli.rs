//! The command line of `twistcli`, word for word: every file in `tests/cli` is a session that must come out as written,
//! and `ha status` is run against a real control socket with invented states behind it.
//! `TRYCMD=overwrite cargo test --test cli` writes the sessions anew.

#[path = "cli/kubernetes.rs"]
mod kubernetes;
#[path = "cli/terminal.rs"]
mod terminal;

use std::{
    path::Path,
    process::{Command, Output},
    thread,
};

use axum::{
    Json, Router,
    extract::Path as Name,
    http::{StatusCode, Uri},
    response::Response,
    routing::{delete, get, post, put},
};
use serde_json::{Value, json};
use terminal::Terminal;
use twistlock_ha::{
    admin::{Certificates, Check, Custom, SwitchoverReport},
    cluster::{ClusterId, Member, Membership, Role, shared::Request},
    control::{self, ControlSocket, Routes},
    events::{Event, Kind, Severity},
    node::{CertificateSource, CertificateStatus, MemberStatus, Status},
    pki::CertificateInfo,
    storage::membership::StoredMembership,
};

#[test]
fn sessions() {
    trycmd::TestCases::new()
        .env("NO_COLOR", "1")
        .env("COLUMNS", "110")
        .env("TWISTLOCK_DATA", "/nonexistent/twistlock")
        .register_bin("twistcli", Path::new(env!("CARGO_BIN_EXE_twistcli")))
        .case("tests/cli/*.trycmd");
}

/// A daemon that does nothing, and answers as the real one would.
fn frozen(status: Value) -> Routes {
    let api = |path: &str| format!("/api/v1/{path}");
    let ha = |path: &str| format!("/api/v1/high-availability/{path}");
    let nothing = async || Json(json!({}));
    let custom = async |Json(body): Json<Value>| {
        assert_eq!(body["certificate"], "chain\n\nkey\n", "both files");
        Json(certificates().custom)
    };
    let operations = Router::new()
        .route(&ha("join-script"), get(join_script).delete(nothing))
        .route(&ha("apply"), post(apply))
        .route(&ha("switchover"), post(switchover))
        .route(&ha("pause"), post(async |Json(body): Json<Value>| Json(json!({ "until": body["seconds"] }))))
        .route(&ha("resume"), post(nothing))
        .route(&ha("requests/{host}"), delete(reject))
        .route(&ha("members/{member}"), delete(nothing))
        .route(&ha("events"), get(async || Json(event_of_a_newer_program())))
        .route(&ha("members/{member}/address"), put(nothing))
        .route(&api("settings/certs"), get(async || Json(certificates())).post(async |body: Json<Value>| body))
        .route(&api("settings/custom-certs"), post(custom).delete(nothing));
    let at_once = Router::new().route(&api("high-availability"), get(async || Json(status)));
    Routes { at_once, operations }
}

async fn join_script(uri: Uri) -> Json<Value> {
    let script = uri.query().is_some_and(|query| query.contains("script=true")).then_some("#!/bin/bash\n");
    Json(
        json!({ "line": "curl -sS ... | sudo bash", "script": script, "until": 1_793_383_200, "id": "1", "script_url": "" }),
    )
}

async fn apply(Json(body): Json<Value>) -> Json<Value> {
    assert_eq!(body, json!({ "fingerprints": ["AB:CD"] }), "those that were shown");
    Json(json!({ "admitted": [3] }))
}

async fn switchover(Json(body): Json<Value>) -> Json<SwitchoverReport> {
    let checks = vec![
        Check { name: "host1 is up".into(), ok: true, detail: String::new() },
        Check { name: "caught up".into(), ok: body["to"].is_null(), detail: "7 entries behind".into() },
    ];
    let gap_ms = (body["dryRun"] != true).then_some(41.26);
    Json(SwitchoverReport { checks, to: Some("host1".into()), gap_ms })
}

async fn reject(Name(host): Name<String>) -> Response {
    control::refusal(StatusCode::CONFLICT, &format!("no host {host} asks to join"))
}

/// What a cluster with a certificate of its administrator says of it.
fn certificates() -> Certificates {
    let info = CertificateInfo {
        subject: "CN=console.example".into(),
        issuer: "CN=Example CA".into(),
        names: vec!["console.example".into(), "192.0.2.1".into()],
        not_before: 1_793_383_200,
        not_after: 1_793_383_200 + 365 * 86_400,
        fingerprint: "AB:CD".into(),
    };
    let source = CertificateSource::Upload;
    Certificates {
        console_names: vec!["console.example".into()],
        certificates: vec![CertificateStatus { of: "console".into(), source, missing: Vec::new(), info: info.clone() }],
        custom: Some(Custom { by: "ann".into(), at: 1_793_383_200, missing: Vec::new(), exposed_to: Vec::new(), info }),
    }
}

#[test]
fn certificates_of_the_consoles_are_shown_and_given() {
    let folder = tempfile::tempdir().unwrap();
    let (chain, key) = (folder.path().join("chain.pem"), folder.path().join("key.pem"));
    std::fs::write(&chain, "chain\n").unwrap();
    std::fs::write(&key, "key\n").unwrap();
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
        let status = picture([Role::Secondary, Role::Primary, Role::Secondary]);
        let output = beside(status, |data| command.arg("certs").args(args).arg("--data").arg(data).output().unwrap());
        let text =
            format!("{}{}", String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        (output.status.code().unwrap(), text)
    };
    let (code, text) = run(&["list"]);
    assert_eq!(code, 0, "{text}");
    for part in ["console  upload", "CN=Example CA", "console.example, 192.0.2.1", "uploaded by ann"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let (code, text) = run(&["upload", chain.to_str().unwrap(), "--key", key.to_str().unwrap()]);
    assert!(code == 0 && text.contains("All Consoles serve the certificate CN=console.example"), "{text}");
    let (code, text) = run(&["upload", "/nonexistent/chain.pem"]);
    assert!(code == 66 && text.contains("/nonexistent/chain.pem"), "{text}");
    let (code, text) = run(&["set-names", "lb.example", "192.0.2.7"]);
    assert!(code == 0 && text.contains("also valid for lb.example, 192.0.2.7."), "{text}");
    assert!(run(&["set-names", "--none"]).1.contains("its host only"));
    assert_eq!(run(&["set-names"]).0, 64, "to take all away has to be said");
    let (code, text) = run(&["remove"]);
    assert!(code == 64 && text.contains("--yes"), "nobody can be asked: {text}");
    assert!(run(&["remove", "--yes"]).1.contains("authority again"));
}

/// The picture that node 2 has of a cluster whose members are in these states.
fn picture(states: [Role; 3]) -> Status {
    let member = |id: u64| MemberStatus {
        voter: true,
        sync: None,
        full: false,
        free: Some(40 << 30),
        level: twistlock_ha::cluster::feature_level(),
        holds: Default::default(),
        id,
        name: format!("host{id}"),
        address: format!("192.0.2.{id}:8086"),
        state: states[id as usize - 1],
        epoch: 8,
        applied: 1_000,
        lag: 0,
        lag_bytes: Some(0),
        lease_ms: None,
        last_contact_ms: Some(9_000),
        version: "0.1.0".into(),
    };
    let founder = |id| Member::founder(id, &format!("host{id}"), &format!("192.0.2.{id}"), 8086);
    Status {
        cluster: ClusterId(1),
        node: 2,
        name: "host2".into(),
        version: "0.1.0".into(),
        role: states[1],
        reason: "invented".into(),
        epoch: 8,
        primary: None,
        applied: 1_000,
        committed: 1_000,
        lease_ms: None,
        members: (1..=3).map(member).collect(),
        membership: Membership::founded(ClusterId(1), (1..=3).map(founder).collect()),
        warnings: Vec::new(),
        certificates: Vec::new(),
        serving: false,
        waiting: None,
        recent: Default::default(),
    }
}

/// Runs `act` with the data folder of a daemon that tells `status`.
fn beside<T>(status: Status, act: impl FnOnce(&Path) -> T) -> T {
    beside_one_that_says(json!(status), act)
}

/// Runs `act` with the data folder of a daemon that tells `status`, which may be one that this program does not know.
fn beside_one_that_says<T>(status: Value, act: impl FnOnce(&Path) -> T) -> T {
    let folder = tempfile::tempdir().unwrap();
    let socket = ControlSocket::bind(&folder.path().join("control.sock")).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let shutdown = async move { stopped.await.unwrap_or(()) };
        runtime.block_on(socket.serve(frozen(status), shutdown)).unwrap();
    });
    let done = act(folder.path());
    stop.send(()).unwrap();
    server.join().unwrap();
    done
}

/// With words that no program of this version has.
fn event_of_a_newer_program() -> Value {
    let event = Event::new(Kind::Role, Severity::Info, "node2 sings");
    let mut event = json!(event);
    (event["kind"], event["severity"], event["later"]) = (json!("song"), json!("loud"), json!([1]));
    json!([event, Event::new(Kind::Role, Severity::Info, "node1 follows")])
}

#[test]
fn what_a_newer_daemon_says_is_shown_by_its_words() {
    let mut status = json!(picture([Role::Secondary, Role::Primary, Role::Secondary]));
    status["members"][2]["state"] = json!("SINGING");
    status["later"] = json!({ "a": 1 });
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
        let output = beside_one_that_says(status.clone(), |data| {
            command.arg("ha").args(args).arg("--data").arg(data).output().unwrap()
        });
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let text = run(&["events"]);
    let song = text.lines().find(|line| line.contains("node2 sings")).unwrap();
    assert!(song.contains(" song ") && text.lines().count() == 3, "{text}");
    let found: Value = serde_json::from_str(&run(&["events", "--json"])).unwrap();
    assert_eq!((&found[0]["kind"], &found[1]["kind"]), (&json!("song"), &json!("role")));
    let text = run(&["status"]);
    assert!(text.contains("UNKNOWN") && text.contains("PRIMARY"), "{text}");
}

/// Runs `twistcli ha ARGS --data FOLDER` beside a daemon that tells `status`.
fn twistcli(status: Status, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
    beside(status, |folder| command.arg("ha").args(args).arg("--data").arg(folder).output().unwrap())
}

/// The same on a terminal.
fn on_terminal(status: Status, args: &[&str], talk: impl FnOnce(&mut Terminal)) -> (i32, String) {
    beside(status, |folder| {
        let mut command = vec![env!("CARGO_BIN_EXE_twistcli"), "ha"];
        command.extend(args);
        command.extend(["--data", folder.to_str().unwrap()]);
        let mut terminal = Terminal::run(&command, &[]);
        talk(&mut terminal);
        terminal.wait_end()
    })
}

#[test]
fn the_exit_code_tells_how_the_cluster_is() {
    use Role::{Down, Primary, Secondary};
    for (states, code, headline) in [
        ([Primary, Secondary, Secondary], 0, "HEALTHY: host1 is PRIMARY (3 of 3 members up)"),
        ([Primary, Secondary, Down], 1, "DEGRADED: host1 is PRIMARY (2 of 3 members up)"),
        ([Down, Secondary, Secondary], 2, "NO PRIMARY: nobody serves the Console (2 of 3 members up)"),
    ] {
        let output = twistcli(picture(states), &["status"]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.starts_with(headline), "{text}");
        assert!(text.contains("host2*  192.0.2.2:8086  SECONDARY"), "{text}");
        assert!(!text.contains('\x1b'), "colours without a terminal: {text}");
    }
}

#[test]
fn json_is_the_whole_status() {
    let output = twistcli(picture([Role::Primary, Role::Secondary, Role::Rollback]), &["status", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let status: Status = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((status.node, status.members[2].state), (2, Role::Rollback));
    assert!(String::from_utf8(output.stdout).unwrap().contains("\"state\": \"ROLLBACK\""));
}

/// The cluster as its PRIMARY, node 2, sees it.
fn primary() -> Status {
    let mut status = picture([Role::Secondary, Role::Primary, Role::Secondary]);
    status.primary = Some(2);
    status
}

/// Exit code, standard output and standard error.
fn told(status: Status, args: &[&str]) -> (i32, String, String) {
    let output = twistcli(status, args);
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    (output.status.code().unwrap(), out, err)
}

#[test]
fn a_refusal_is_told_with_its_reason() {
    let (code, _, err) = told(primary(), &["reject", "host9"]);
    assert_eq!((code, err.as_str()), (75, "twistcli: not done: no host host9 asks to join\n"));
}

#[test]
fn another_host_is_named_when_this_one_is_not_primary() {
    let mut elsewhere = picture([Role::Primary, Role::Secondary, Role::Secondary]);
    elsewhere.primary = Some(1);
    for (args, command) in [
        (&["apply", "--yes"][..], "apply"),
        (&["switchover", "--to", "host3"], "switchover --to host3"),
        (&["step-down"], "switchover"),
        (&["remove", "host3", "--force"], "remove host3 --force"),
        (&["join-script"], "join-script"),
        (&["resume"], "resume"),
        (&["set-address", "host3", "--port", "9"], "set-address host3 --port 9"),
        (&["drill", "--kill"], "drill --kill"),
    ] {
        let (code, out, err) = told(elsewhere.clone(), args);
        let there = "twistcli: not done: host2 is SECONDARY; host1 (192.0.2.1:8086) is PRIMARY. Run there: twistcli ha";
        assert_eq!((code, out.as_str(), err), (75, "", format!("{there} {command}\n")));
    }
}

#[test]
fn operations_say_what_was_done() {
    let json = told(primary(), &["join-script", "--json"]);
    assert!(json.1.contains("\"until\": 1793383200"), "{json:?}");
    for (args, code, out) in [
        (&["join-script"][..], 0, "curl -sS ... | sudo bash\n"),
        (&["join-script", "--script"], 0, "#!/bin/bash\n"),
        (&["revoke"], 0, "All invitations are closed: join scripts that were given out no longer work.\n"),
        (&["remove", "host3", "--yes"], 0, "host3 is removed.\n"),
        (
            &["switchover"],
            0,
            "✓ host1 is up\n✓ caught up: 7 entries behind\nhost1 is PRIMARY. Nobody could write for 41.3 ms.\n",
        ),
        (
            &["switchover", "--dry-run", "--to", "host1"],
            75,
            "✓ host1 is up\n✗ caught up: 7 entries behind\nThe role stays where it is: see what is marked above.\n",
        ),
        (
            &["pause", "--for", "2h"],
            0,
            "PAUSED until 1970-01-01 02:00 UTC: nobody takes over if host2 fails meanwhile.\n",
        ),
        (&["resume"], 0, "The pause is over: automatic takeover works again.\n"),
        (
            &["set-address", "host3", "--to", "192.0.2.33"],
            0,
            "The members dial the new address from now on. See: twistcli ha status\n",
        ),
    ] {
        let (found, text, err) = told(primary(), args);
        assert_eq!((found, text.as_str()), (code, out), "{args:?}: {err}");
    }
}

/// Two members, and a host that asks.
fn asked() -> Status {
    let mut status = primary();
    status.members.pop();
    let gone = status.membership.roster.members.pop().unwrap();
    status.membership.shared.requests.push(Request {
        id: "only the host may know this".into(),
        name: gone.name,
        address: gone.address,
        port: gone.port,
        version: "0.1.0".into(),
        level: 1,
        fingerprint: "AB:CD".into(),
        csr: String::new(),
        console_csr: String::new(),
        console_names: Vec::new(),
        clock_ms: 3,
        at: 0,
        until: u64::MAX,
    });
    status
}

#[test]
fn nothing_is_admitted_or_removed_without_a_yes() {
    for args in [&["apply"][..], &["remove", "host1"]] {
        let (code, out, err) = told(asked(), args);
        assert_eq!((code, out.as_str()), (64, ""), "{err}");
        assert!(err.ends_with("standard input is no terminal: give --yes to go on without a question\n"), "{err}");
    }
    let (code, out, err) = told(asked(), &["apply", "--yes", "--no-wait"]);
    assert_eq!((code, out.as_str()), (0, "Admitted: host3 (node 3).\n"), "{err}");
    assert!(err.contains("host3 (192.0.2.3:8086), version 0.1.0, clock 3 ms ahead\n    fingerprint AB:CD\n"), "{err}");
    // The members of this daemon never come up.
    let (code, _, err) = told(asked(), &["apply", "--yes", "--wait", "1s"]);
    assert_eq!(code, 75);
    assert!(err.contains("1 to come: not up within 1 s"), "{err}");
    let (code, _, err) = told(primary(), &["apply", "--yes"]);
    assert_eq!((code, err.as_str()), (75, "twistcli: not done: no host asks to join\n"));
}

#[test]
fn a_status_shows_who_asks_and_keeps_secrets() {
    let (code, text, _) = told(asked(), &["status"]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("host3   192.0.2.3:8086  REQUEST_JOIN"), "{text}");
    assert!(
        text.contains("\n    AB:CD\nNext: 1 host asks to join; compare the fingerprint, then `twistcli ha apply`\n")
    );
    let (_, json, _) = told(asked(), &["status", "--json"]);
    assert!(json.contains("AB:CD") && !json.contains("only the host may know this"), "{json}");
}

#[test]
fn a_drill_needs_a_healthy_cluster_and_a_login() {
    let sick = picture([Role::Down, Role::Primary, Role::Secondary]);
    let (code, _, err) = told(Status { primary: Some(2), ..sick }, &["drill", "--kill"]);
    assert_eq!(code, 75);
    assert!(err.starts_with("twistcli: not done: host1 is DOWN\n"), "{err}");
    let (code, _, err) = told(primary(), &["drill", "--token", "x", "--tlscacert", "/nonexistent/ca.pem"]);
    assert_eq!(code, 66);
    assert!(err.contains("/nonexistent/ca.pem: No such file") && err.contains("--tlscacert names"), "{err}");
}

#[test]
fn on_a_terminal_nobody_is_admitted_without_a_yes() {
    for (answer, code, last) in [
        ("n", 75, "twistcli: not done: not confirmed; nothing was changed"),
        ("", 75, "twistcli: not done: not confirmed; nothing was changed"),
        ("yes", 0, "Next: twistcli ha status --watch"),
    ] {
        let (found, seen) = on_terminal(asked(), &["apply", "--no-wait"], |terminal| {
            terminal.wait_for("AB:CD");
            terminal.wait_for("Admit them? [y/N] ");
            terminal.type_line(answer);
        });
        assert_eq!((found, seen.trim_end().ends_with(last)), (code, true), "{answer:?}: {seen}");
        assert_eq!(seen.contains("Admitted: host3 (node 3)."), code == 0, "{seen}");
    }
    let (code, seen) = on_terminal(primary(), &["remove", "host3"], |terminal| {
        terminal.wait_for("Remove host3? [y/N] ");
        terminal.type_line("y");
    });
    assert_eq!((code, seen.contains("host3 is removed.")), (0, true), "{seen}");
}

#[test]
fn colours_are_for_terminals_unless_somebody_says_otherwise() {
    let coloured = |args: &[&str]| on_terminal(primary(), args, |_| {}).1.contains("\x1b[1;32mPRIMARY\x1b[0m");
    assert!(coloured(&["status"]));
    assert!(!coloured(&["status", "--color", "never"]));
    let piped = |args: &[&str]| told(primary(), args).1.contains('\x1b');
    assert!(!piped(&["status"]) && !piped(&["status", "--color=never"]));
    assert!(piped(&["status", "--color=always"]));
}

#[test]
fn a_password_is_asked_for_and_not_shown() {
    let mut command = vec![env!("CARGO_BIN_EXE_twistcli"), "ha", "status", "--user", "ann"];
    // Nobody listens there.
    command.extend(["--address", "https://127.0.0.1:9"]);
    let mut terminal = Terminal::run(&command, &[("TWISTLOCK_TOKEN", "not for ann")]);
    terminal.wait_for("Password of ann: ");
    terminal.type_line("s3cret-word");
    let (code, seen) = terminal.wait_end();
    assert_eq!(code, 69, "{seen}");
    assert!(seen.contains("https://127.0.0.1:9: connection refused"), "{seen}");
    assert!(!seen.contains("s3cret-word"), "{seen}");
}

/// What a daemon left that ran until 30 s ago; it said that it ends, or did not.
fn left(ended: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let membership = picture([Role::Secondary; 3]).membership;
    StoredMembership { index: 9, membership }.write(folder.path()).unwrap();
    let event = |ago: i64, kind, sentence: &str, (name, value): (&str, &str)| {
        let mut event = Event::new(kind, Severity::Info, sentence).field(name, value);
        event.time -= jiff::SignedDuration::from_secs(ago);
        event.node = "host2".into();
        serde_json::to_string(&event).unwrap() + "\n"
    };
    let mut lines = vec![
        event(300, Kind::Role, "host2 starts (version 0.1.0)", ("version", "0.1.0")),
        event(290, Kind::Role, "host2 follows", ("to", "Secondary")),
        event(280, Kind::Primary, "host1 is PRIMARY (epoch 8)", ("primary", "host1")),
    ];
    if ended {
        lines.push(event(30, Kind::Role, "host2 stops as it was asked to", ("ended", "yes")));
    }
    std::fs::write(folder.path().join(twistlock_ha::events::FILE), lines.concat()).unwrap();
    folder
}

#[test]
fn without_a_daemon_its_files_tell_what_was_and_say_that_it_is_old() {
    let run = |folder: &Path, args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
        let output = command.args(args).arg("--data").arg(folder).env_remove("TWISTLOCK_ADDRESS").output().unwrap();
        let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        (output.status.code().unwrap(), out, err)
    };
    let ended = left(true);
    let (code, out, err) = run(ended.path(), &["ha", "status"]);
    assert!(code == 69 && err.contains("Is twistlockd running on this host?"), "{code} {err}");
    assert!(out.starts_with("OLD: twistlockd on host2 does not answer."), "{out}");
    let lines =
        ["30 s ago: host2 stops as it was asked to", "SECONDARY, since ", "host1, since ", "host3 (192.0.2.3:8086)"];
    assert!(lines.iter().all(|line| out.contains(line)), "{out}");
    let (code, out, _) = run(ended.path(), &["ha", "status", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &json["stale"], &json["role"]), (69, &true.into(), &serde_json::Value::Null), "{out}");
    let age = json["ageMs"].as_u64().unwrap();
    assert!((30_000..90_000).contains(&age) && json["why"].as_str().unwrap().starts_with("cannot connect"), "{out}");
    let (_, out, _) = run(left(false).path(), &["ha", "status"]);
    assert!(out.contains("; its end was not recorded"), "{out}");

    let (code, out, err) = run(ended.path(), &["ha", "events", "--limit", "2"]);
    assert_eq!((code, out.lines().count()), (0, 3), "{out}{err}");
    assert!(out.contains("host2 stops as it was asked to") && err.contains("does not answer: these are from"), "{err}");
    let (code, out, err) = run(ended.path(), &["version"]);
    assert!(code == 69 && err.contains("cannot connect"), "{code} {err}");
    let expected = "WHO       STATE    VERSION\ntwistcli  -        0.1.0\nhost1     UNKNOWN  -\nhost2     UNKNOWN  0.1.0\nhost3     UNKNOWN  -\n";
    assert_eq!(out, expected);
    let (code, out, err) = run(ended.path(), &["logs"]);
    assert_eq!((code, out.as_str()), (69, ""));
    assert!(err.contains("journalctl -u twistlockd -e; what happened: twistcli ha events"), "{err}");
    // A daemon that is there, and a folder with nothing: as ever.
    let nothing = tempfile::tempdir().unwrap();
    for args in [&["ha", "status"][..], &["ha", "events"]] {
        let (code, out, err) = run(nothing.path(), args);
        assert!(code == 69 && out.is_empty() && err.contains("cannot connect"), "{args:?}: {out}{err}");
    }
    assert_eq!(run(nothing.path(), &["version"]).1, "WHO       STATE  VERSION\ntwistcli  -      0.1.0\n");
}
