//! A served socket with an invented daemon behind it: every request, every limit.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream as StdStream},
    thread,
};

use tokio::sync::oneshot;

use super::*;
use crate::cluster::{ClusterId, Role};

#[derive(Default)]
struct Fake {
    released: tokio::sync::Notify,
}

impl ControlHandler for Fake {
    fn status(&self) -> Arc<Status> {
        Arc::new(Status {
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
            recent: Default::default(),
        })
    }

    /// Tells what it was asked to do, in the words of the debugger.
    fn administer(&self, _: Peer, operation: Operation) -> Answer<'_> {
        Box::pin(async move {
            match operation {
                Operation::Reject { host } if host == "nobody" => Err("no such host asks".to_owned()),
                Operation::Pause { .. } => {
                    // Longer than any client of these tests waits: the switch is thrown by another one.
                    self.released.notified().await;
                    Ok(7.into())
                }
                Operation::Resume {} => {
                    self.released.notify_waiters();
                    Ok(serde_json::Value::Null)
                }
                other => Ok(format!("{other:?}").into()),
            }
        })
    }

    fn metrics(&self) -> String {
        "twistlock_role 1\n".into()
    }
}

/// Runs `test` against a served socket, then shuts the server down and checks that the file is gone.
fn with_server(test: impl FnOnce(&Path)) {
    serve_and(Arc::new(Fake::default()), test);
}

fn serve_and(handler: Arc<dyn ControlHandler>, test: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SOCKET_NAME);
    let (stop, stopped) = oneshot::channel::<()>();
    let socket = ControlSocket::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let shutdown = async move { stopped.await.unwrap_or(()) };
        runtime.block_on(socket.serve(handler, shutdown)).unwrap();
    });
    test(&path);
    stop.send(()).unwrap();
    server.join().unwrap();
    assert!(!path.exists());
}

#[test]
fn questions_are_answered() {
    with_server(|path| {
        let limit = Duration::from_secs(10);
        let mode = fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let status = status(path, limit).unwrap();
        assert_eq!((status.name.as_str(), status.epoch, status.primary), ("node1", 4, Some(2)));
        let metrics = request(path, &Request::Metrics {}, limit).unwrap();
        assert_eq!(metrics, Reply::Ok("twistlock_role 1\n".into()));
    });
}

fn raw(path: &Path, bytes: &[u8]) -> String {
    let mut stream = StdStream::connect(path).unwrap();
    stream.write_all(bytes).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn the_wire_format_is_fixed_and_nonsense_is_refused() {
    with_server(|path| {
        let resume = b"{\"command\":\"administer\",\"operation\":{\"name\":\"resume\"}}\n{\"command\":\"metrics\"}\n";
        assert_eq!(raw(path, resume), "{\"ok\":null}\n{\"ok\":\"twistlock_role 1\\n\"}\n");
        let half = b"{\"command\":\"administer\",\"operation\":{\"name\":\"remove\",\"node\":\"host3\"}}\n";
        assert!(raw(path, half).contains("missing field `force`"));
        let more = b"{\"command\":\"administer\",\"operation\":{\"name\":\"uninvite\",\"x\":1}}\n";
        assert!(raw(path, more).contains("unknown field `x`"));
        assert!(raw(path, b"{\"command\":\"explode\"}\n").starts_with("{\"err\":\"request not understood"));
        assert!(raw(path, b"\xff\n").starts_with("{\"err\":\"request not understood"));
        assert!(raw(path, b"{\"command\":\"status\"}").starts_with("{\"err\":\"a request is one line"));
    });
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
fn every_operation_reaches_the_handler_as_it_was_sent() {
    let operations = [
        Operation::Invite { valid_s: 3600, script: true },
        Operation::Uninvite {},
        Operation::Apply { fingerprints: Some(vec!["AB:CD".into()]) },
        Operation::Apply { fingerprints: None },
        Operation::Reject { host: "host2".into() },
        Operation::Remove { node: "host3".into(), force: true },
        Operation::Switchover { to: Some("host2".into()), dry_run: true },
        Operation::Switchover { to: None, dry_run: false },
        Operation::Readdress { node: "2".into(), new_name: None, address: Some("192.0.2.9".into()), port: Some(9) },
        Operation::SetConsoleNames { names: vec!["lb.example".into()] },
        Operation::SetCertificate { pem: SecretText("-----BEGIN".into()) },
    ];
    assert!(!format!("{operations:?}").contains("BEGIN"));
    with_server(|path| {
        let limit = Duration::from_secs(10);
        for operation in operations {
            let told: String = operate(path, operation.clone(), limit).unwrap();
            assert_eq!(told, format!("{operation:?}"));
        }
        let refused = operate::<()>(path, Operation::Reject { host: "nobody".into() }, limit);
        assert!(matches!(refused, Err(ControlError::Refused(why)) if why == "no such host asks"));
    });
}

#[test]
fn operations_are_bounded_and_outlive_their_clients() {
    with_server(|path| {
        let pause = || operate::<u64>(path, Operation::Pause { seconds: 1 }, Duration::from_millis(200));
        for _ in 0..MAX_OPERATIONS {
            assert!(matches!(pause(), Err(ControlError::NoAnswer { .. })));
        }
        let full = operate::<u64>(path, Operation::Pause { seconds: 1 }, Duration::from_secs(10));
        assert!(matches!(&full, Err(ControlError::Refused(why)) if why.contains("under way already")), "{full:?}");
        // The status is still told.
        assert_eq!(status(path, Duration::from_secs(10)).unwrap().node, 1);
    });
}

#[test]
fn a_host_that_has_not_joined_refuses_operations() {
    struct Waiting;
    impl ControlHandler for Waiting {
        fn status(&self) -> Arc<Status> {
            Fake::default().status()
        }
    }
    serve_and(Arc::new(Waiting), |path| {
        let limit = Duration::from_secs(10);
        let refused = operate::<Vec<u64>>(path, Operation::Apply { fingerprints: None }, limit);
        assert!(matches!(refused, Err(ControlError::Refused(why)) if why == NOT_JOINED));
        assert_eq!(status(path, limit).unwrap().node, 1);
    });
}
