//! The command line of `twistcli`, word for word: every file in `tests/cli` is a session that must come out as written,
//! and `ha status` is run against a real control socket with invented states behind it.
//! `TRYCMD=overwrite cargo test --test cli` writes the sessions anew.

use std::{
    path::Path,
    process::{Command, Output},
    sync::Arc,
    thread,
};

use twistlock_ha::{
    cluster::{ClusterId, Member, Membership, Role},
    control::{ControlHandler, ControlSocket},
    node::{MemberStatus, Status},
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

struct Frozen(Status);

impl ControlHandler for Frozen {
    fn status(&self) -> Arc<Status> {
        Arc::new(self.0.clone())
    }

    fn step_down(&self, reason: &str) -> Result<(), String> {
        Err(format!("refused for a test: {reason}"))
    }
}

/// The picture that node 2 has of a cluster whose members are in these states.
fn picture(states: [Role; 3]) -> Status {
    let member = |id: u64| MemberStatus {
        voter: true,
        sync: None,
        id,
        name: format!("host{id}"),
        address: format!("192.0.2.{id}:8086"),
        state: states[id as usize - 1],
        epoch: 8,
        applied: 1_000,
        lag: 0,
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
        database: None,
    }
}

/// Runs `twistcli ha ARGS --data FOLDER` beside a daemon that tells `status`.
fn twistcli(status: Status, args: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let socket = ControlSocket::bind(&folder.path().join("control.sock")).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let shutdown = async move { stopped.await.unwrap_or(()) };
        runtime.block_on(socket.serve(Arc::new(Frozen(status)), shutdown)).unwrap();
    });
    let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
    let output = command.arg("ha").args(args).arg("--data").arg(folder.path()).output().unwrap();
    stop.send(()).unwrap();
    server.join().unwrap();
    output
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

#[test]
fn a_refusal_is_told_with_its_reason() {
    let output = twistcli(picture([Role::Primary; 3]), &["step-down", "--reason", "why not"]);
    assert_eq!(output.status.code(), Some(75));
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text, "twistcli: not done: refused for a test: why not\n");
}
