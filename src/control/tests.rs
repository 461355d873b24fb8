//! A served socket with a fake daemon: every limit, and what another version gets as an answer.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream as StdStream},
    sync::Arc,
    thread,
};

use axum::{
    Extension, Json, Router,
    http::StatusCode,
    routing::{get, post},
};
use serde_json::{Value, json};
use tokio::sync::{Notify, oneshot};

use super::*;
use crate::{
    cluster::{ClusterId, Role},
    node::Status,
};

fn picture() -> Status {
    Status {
        cluster: ClusterId(7),
        node: 1,
        name: "node1".into(),
        version: "1.2.3".into(),
        role: Role::Secondary,
        reason: "another node is PRIMARY".into(),
        epoch: 4,
        primary: Some(2),
        applied: 10,
        committed: 11,
        lease_ms: None,
        members: Vec::new(),
        membership: crate::cluster::Membership::founded(ClusterId(7), Vec::new()),
        warnings: Vec::new(),
        certificates: Vec::new(),
        serving: false,
        waiting: None,
        recent: Default::default(),
    }
}

/// Its `wait` ends when somebody else asks for `release`: longer than any client of these tests waits.
fn routes() -> Routes {
    let released = Arc::new(Notify::new());
    let release = Arc::clone(&released);
    let at_once = Router::new().route("/api/v1/high-availability", get(async || Json(picture())));
    let operations = Router::new()
        .route("/api/v1/echo", post(async |Json(body): Json<Value>| Json(body)))
        .route("/api/v1/who", get(async |Extension(peer): Extension<Peer>| Json(peer.uid)))
        .route("/api/v1/refuse", post(async || refusal(StatusCode::CONFLICT, "no such host asks")))
        .route("/api/v1/long", get(async || "x".repeat(MAX_REPLY + 1)))
        .route(
            "/api/v1/wait",
            post(async move || {
                released.notified().await;
                Json(7)
            }),
        )
        .route("/api/v1/release", post(async move || release.notify_waiters()));
    Routes { at_once, operations }
}

const LIMIT: Duration = Duration::from_secs(10);

/// Runs `test` against a served socket, then shuts the server down and checks that the file is gone.
fn with_server(test: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SOCKET_NAME);
    let (stop, stopped) = oneshot::channel::<()>();
    let socket = ControlSocket::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let shutdown = async move { stopped.await.unwrap_or(()) };
        runtime.block_on(socket.serve(routes(), shutdown)).unwrap();
    });
    test(&path);
    stop.send(()).unwrap();
    server.join().unwrap();
    assert!(!path.exists());
}

#[test]
fn who_asks_is_whom_the_kernel_names_and_the_answer_is_that_of_the_routes() {
    with_server(|path| {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(status(path, LIMIT).unwrap(), picture());
        let uid: u32 = ask(path, &Call::get("who"), LIMIT).unwrap();
        assert_eq!(uid, nix::unistd::Uid::current().as_raw());
        let body = json!({ "name": "ä\n", "list": [1, null] });
        assert_eq!(ask::<Value>(path, &Call::post("echo").with(&body), LIMIT).unwrap(), body);
        let refused = ask::<Value>(path, &Call::post("refuse"), LIMIT);
        assert!(matches!(refused, Err(ControlError::Refused(why)) if why == "no such host asks"));
        assert_eq!(send(path, &Call::get("/nowhere"), LIMIT).unwrap().status, StatusCode::NOT_FOUND);
        let call = Call::post("settings/custom-certs").with("-----BEGIN");
        assert!(!format!("{call:?}").contains("BEGIN"));
    });
}

#[test]
fn what_is_too_long_is_refused_in_both_directions() {
    with_server(|path| {
        let long = send(path, &Call::post("echo").with("x".repeat(MAX_REQUEST)), LIMIT).unwrap();
        assert!(long.status == StatusCode::PAYLOAD_TOO_LARGE && long.reason().contains("at most 65536 bytes"));
        let long = send(path, &Call::get("long"), LIMIT).unwrap();
        assert!(long.reason().contains("ask for fewer rows"), "{}", long.reason());
    });
}

/// Sends `bytes` and returns what comes until the end.
fn raw(path: &Path, bytes: &[u8]) -> String {
    let mut stream = StdStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// Up to 0.1 this socket spoke JSON lines. While a host is upgraded, one of the two programs is the older one.
#[test]
fn a_client_and_a_daemon_of_before_get_an_answer_that_they_can_tell_from_a_good_one() {
    with_server(|path| {
        // It reads up to the end of a line, finds no JSON, and says that the two have different versions.
        for command in
            ["{\"command\":\"status\"}\n", "{\"command\":\"administer\",\"operation\":{\"name\":\"resume\"}}\n"]
        {
            let answer = raw(path, command.as_bytes());
            assert!(answer.starts_with("HTTP/1.1 400 ") && answer.ends_with('\n'), "{answer}");
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SOCKET_NAME);
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let daemon = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = [0; 512];
        let _ = stream.read(&mut head).unwrap();
        stream.write_all(b"{\"err\":\"request not understood: expected value at line 1 column 1\"}\n").unwrap();
        // It waits for the next line.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let told = status(&path, LIMIT).unwrap_err();
    assert!(matches!(told, ControlError::Malformed { .. }), "{told:?}");
    daemon.join().unwrap();
}

#[test]
fn more_clients_than_slots_are_served_in_turn() {
    with_server(|path| {
        let clients: Vec<_> = (0..3 * MAX_CLIENTS)
            .map(|_| {
                let path = path.to_owned();
                thread::spawn(move || status(&path, Duration::from_secs(20)).map(|status| status.node))
            })
            .collect();
        for client in clients {
            assert_eq!(client.join().unwrap().unwrap(), 1);
        }
    });
}

#[test]
fn paths_are_checked_before_anything_is_touched() {
    let folder = tempfile::tempdir().unwrap();
    let long = folder.path().join("x".repeat(120));
    assert!(ControlSocket::bind(&long).unwrap_err().to_string().contains("the kernel allows 107"));
    assert!(matches!(status(&long, STEP_TIMEOUT), Err(ControlError::Path(_))));
    let file = folder.path().join("file");
    fs::write(&file, "precious").unwrap();
    assert!(ControlSocket::bind(&file).unwrap_err().to_string().contains("is not a socket"));
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let missing = folder.path().join("missing");
    assert!(matches!(status(&missing, STEP_TIMEOUT), Err(ControlError::Unreachable { .. })));
}

#[test]
fn a_frozen_daemon_is_given_up_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SOCKET_NAME);
    let _never_served = ControlSocket::bind(&path).unwrap();
    let limit = Duration::from_millis(50);
    assert!(matches!(status(&path, limit), Err(ControlError::NoAnswer { .. })));
}

#[test]
fn operations_are_bounded_and_outlive_their_clients() {
    with_server(|path| {
        for _ in 0..MAX_OPERATIONS {
            let given_up = send(path, &Call::post("wait"), Duration::from_millis(200));
            assert!(matches!(given_up, Err(ControlError::NoAnswer { .. })), "{given_up:?}");
        }
        let full = send(path, &Call::post("release"), LIMIT).unwrap();
        assert!(full.status == 503 && full.reason().contains("under way already"), "{full:?}");
        // The status is still told.
        assert_eq!(status(path, LIMIT).unwrap().node, 1);
    });
}
