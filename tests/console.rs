//! The Console as clients see it: real supervisor, port guard, TLS and replicated database on loopback. The test plays
//! the consensus loop: it sets status and lease, and is the majority that a commit waits for.

#[path = "console/clients.rs"]
mod clients;
#[path = "console/conformance.rs"]
mod conformance;
#[path = "console/fuzz.rs"]
mod fuzz;
#[path = "console/guessing.rs"]
mod guessing;
#[path = "console/node.rs"]
mod node;
#[path = "console/security.rs"]
mod security;
#[path = "console/users.rs"]
mod users;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, TcpListener, TcpStream},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use node::{Answer, HTTP, HTTPS, Majority, Node, PASSWORD, wait_until};
use serde_json::{Value, json};

#[test]
fn the_api_from_signup_to_tags() {
    let node = Node::start();
    node.serve(1);
    let basic = node.basic("admin", PASSWORD);

    assert_eq!(node.text("GET", "/api/v1/_ping", None).unwrap(), (200, "OK".into()));
    assert_eq!(node.text("GET", "/api/v1/_ping", Some("Basic bm9ib2R5OnRoZXJl")).unwrap().0, 200, "auth is tolerated");
    let initialized = |node: &Node| node.ok("GET", "/api/v1/settings/initialized", None, Value::Null);
    assert_eq!(initialized(&node), json!({"initialized": false}));
    node.fails(401, "GET", "/api/v1/tags", Some(&basic), Value::Null);
    node.fails(400, "POST", "/api/v1/signup", None, json!({"username": "a:b", "password": PASSWORD}));
    node.fails(400, "POST", "/api/v1/signup", None, json!({"username": "admin", "password": "short"}));
    node.signup();
    assert_eq!(initialized(&node), json!({"initialized": true}));
    let again = node.fails(400, "POST", "/api/v1/signup", None, json!({"username": "b", "password": PASSWORD}));
    assert_eq!(again, "system already initialized");

    let token = node.token();
    node.fails(401, "GET", "/api/v1/version", Some("Bearer nonsense"), Value::Null);
    assert_eq!(node.ok("GET", "/api/v1/version", Some(&token), Value::Null), json!(env!("CARGO_PKG_VERSION")));
    let status = node.ok("GET", "/api/v1/high-availability", Some(&basic), Value::Null);
    assert_eq!((&status["role"], &status["epoch"]), (&json!("PRIMARY"), &json!(1)));

    tags(&node, &token);

    let text = node.fails(404, "GET", "/api/v1/nothing", None, Value::Null);
    assert!(text.contains("/api/v1/nothing"), "{text}");
    node.fails(404, "GET", "/nothing", None, Value::Null);
    node.fails(405, "DELETE", "/api/v1/tags", Some(&token), Value::Null);
    let (status, page) = node.text("GET", "/", None).unwrap();
    assert!(status == 200 && page.contains("Twistlock HA"));
}

fn tags(node: &Node, token: &str) {
    let path = "/api/v1/tags";
    let auth = Some(token);
    let tag = |name: &str| json!({"name": name, "color": "#00ff7f", "description": "d"});
    for name in ["b", "a", "c d/e"] {
        assert_eq!(node.ok("POST", path, auth, tag(name)), tag(name));
    }
    node.fails(409, "POST", path, auth, tag("a"));
    node.fails(400, "POST", path, auth, json!({"name": "x", "color": "red"}));
    node.fails(422, "POST", path, auth, json!({"color": ""}));
    node.fails(400, "POST", path, auth, Value::String("{".into()));
    node.fails(413, "POST", path, auth, json!({"name": "x", "description": "y".repeat(1 << 20)}));
    node.fails(401, "POST", path, None, tag("z"));
    let names = |query: &str| -> Vec<String> {
        let list = node.ok("GET", &format!("{path}{query}"), auth, Value::Null);
        list.as_array().unwrap().iter().map(|tag| tag["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(""), ["a", "b", "c d/e"]);
    assert_eq!(names("?limit=1&offset=1"), ["b"]);
    node.fails(400, "GET", "/api/v1/tags?limit=0", auth, Value::Null);
    node.fails(400, "GET", "/api/v1/tags?limit=1001", auth, Value::Null);
    node.fails(400, "GET", "/api/v1/tags?offset=-1", auth, Value::Null);
    node.ok("PUT", "/api/v1/tags/b", auth, json!({"name": "b2"}));
    node.fails(409, "PUT", "/api/v1/tags/b2", auth, tag("a"));
    node.fails(404, "PUT", "/api/v1/tags/b", auth, tag("b"));
    assert_eq!(node.text("DELETE", "/api/v1/tags/c%20d%2Fe", auth).unwrap().0, 200);
    node.fails(404, "DELETE", "/api/v1/tags/c%20d%2Fe", auth, Value::Null);
    assert_eq!(names(""), ["a", "b2"]);
}

#[test]
fn guessing_a_password_is_slowed_down_but_a_session_goes_on() {
    let node = Node::start();
    node.serve(1);
    node.signup();
    let token = node.token();
    let login = |password: &str| json!({"username": "admin", "password": password});
    for _ in 0..6 {
        let text = node.fails(401, "POST", "/api/v1/authenticate", None, login("wrong password"));
        assert_eq!(text, "wrong user name or password");
    }
    node.fails(429, "POST", "/api/v1/authenticate", None, login("wrong password"));
    node.fails(429, "POST", "/api/v1/authenticate", None, login("another one"));
    node.ok("GET", "/api/v1/tags", Some(&token), Value::Null);
    let stranger = json!({"username": "nobody", "password": PASSWORD});
    node.fails(401, "POST", "/api/v1/authenticate", None, stranger);
}

/// A page that watches must not delay a switchover: its stream ends in order, with the reason, before connections are reset.
#[test]
fn a_stream_ends_in_order_when_the_ports_close() {
    let node = Node::start();
    node.serve(1);
    node.signup();
    let token = node.token();
    let path = "/api/v1/high-availability/stream";
    node.fails(401, "GET", path, None, Value::Null);
    let mut stream = BufReader::new(node.read(path, &token));
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    assert_eq!(line, "event: status\n");
    let begin = Instant::now();
    node.runtime.block_on(node.handle.drain("a test"));
    println!("drained in {:?} with a stream open", begin.elapsed());
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.starts_with("data: {") && rest.ends_with("event: end\ndata: closing\n\n"), "{rest}");
}

#[test]
fn no_response_leaves_after_the_lease_and_the_ports_refuse() {
    let node = Node::start();
    node.serve(1);
    node.signup();
    let token = node.token();
    node.majority.set(Majority::Holds);
    let posting = node.post_in_background(&token, "held");
    node.majority.wait_for_a_commit();
    // The lease ends without a word to the supervisor.
    let deadline = node.let_lease_lapse();
    let answer = posting.join().unwrap();
    assert!(matches!(answer, Answer::None(_)), "{answer:?}");
    assert!(twistlock_ha::node::lease::boottime() >= deadline);
    wait_until("the ports refuse", || node.refused());
    assert!(node.handle.state().borrow().running, "the commit still holds the database");
    node.majority.set(Majority::Unknown);
    wait_until("the database is free", || !node.handle.state().borrow().running);
}

/// Reads come from snapshots beside the writer. A session that was not looked up before is read from one, too.
#[test]
fn reads_are_answered_while_a_commit_is_held_back_and_its_own_response_is_not() {
    let node = Node::start();
    node.serve(1);
    node.hold_lease();
    node.signup();
    let sessions: Vec<_> = (0..8).map(|_| node.token()).collect();
    node.ok("POST", "/api/v1/tags", Some(&sessions[0]), json!({"name": "a"}));
    node.majority.set(Majority::Holds);
    let mut posts = vec![node.post_in_background(&sessions[0], "b")];
    node.majority.wait_for_a_commit();
    posts.extend((0..8).map(|n| node.post_in_background(&sessions[0], &format!("c{n}"))));
    thread::scope(|scope| {
        for session in &sessions {
            scope.spawn(|| {
                for path in ["/api/v1/authenticate", "/api/v1/audits/mgmt", "/api/v1/settings/initialized"] {
                    node.ok("GET", path, Some(session), Value::Null);
                }
                let tags = node.ok("GET", "/api/v1/tags", Some(session), Value::Null);
                assert_eq!(tags.as_array().unwrap().len(), 1, "nothing that no majority has: {tags}");
            });
        }
    });
    assert!(!posts.iter().any(thread::JoinHandle::is_finished), "nobody is answered before the COMMIT");
    node.majority.set(Majority::Agrees);
    for post in posts {
        let answer = post.join().unwrap();
        assert!(matches!(answer, Answer::Status(200)), "{answer:?}");
    }
    assert_eq!(node.ok("GET", "/api/v1/tags", Some(&sessions[0]), Value::Null).as_array().unwrap().len(), 10);
}

#[test]
fn demotion_resets_connections_frees_the_database_and_loses_nothing() {
    let node = Node::start();
    node.serve(1);
    node.signup();
    let token = node.token();
    node.ok("POST", "/api/v1/tags", Some(&token), json!({"name": "kept"}));
    let mut idle = TcpStream::connect((node.address, HTTP)).unwrap();
    idle.write_all(b"GET /api/v1/_ping HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut bytes = [0; 4096];
    let read = idle.read(&mut bytes).unwrap();
    assert!(bytes[..read].starts_with(b"HTTP/1.1 200"));

    let begin = Instant::now();
    node.demote();
    assert_eq!(idle.read(&mut bytes).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    let reset = begin.elapsed();
    wait_until("the ports refuse", || node.refused());
    println!("demotion: connections reset after {reset:?}, ports refuse after {:?}", begin.elapsed());
    node.take_database_back();

    // The token and the cached schema are in the database: nobody is logged out.
    node.serve(2);
    let list = node.ok("GET", "/api/v1/tags", Some(&token), Value::Null);
    assert_eq!(list[0]["name"], "kept");
}

#[test]
fn a_drain_lets_running_requests_end_and_can_be_taken_back() {
    let node = Node::start();
    node.serve(1);
    node.signup();
    let token = node.token();
    node.majority.set(Majority::Holds);
    let posting = node.post_in_background(&token, "last");
    node.majority.wait_for_a_commit();
    let handle = node.handle.clone();
    let draining = node.runtime.spawn(async move { handle.drain("a test").await });
    wait_until("the ports refuse", || node.refused());
    node.majority.set(Majority::Agrees);
    let answer = posting.join().unwrap();
    assert!(matches!(answer, Answer::Status(200)), "{answer:?}");
    node.runtime.block_on(draining).unwrap();
    assert!(node.refused());
    node.handle.resume();
    node.wait_until_open();
    assert_eq!(node.ok("GET", "/api/v1/tags", Some(&token), Value::Null)[0]["name"], "last");
}

#[test]
fn a_drain_is_bounded() {
    let node = Node::start();
    node.serve(1);
    node.signup();
    let token = node.token();
    node.majority.set(Majority::Holds);
    let posting = node.post_in_background(&token, "stuck");
    node.majority.wait_for_a_commit();
    let handle = node.handle.clone();
    let draining = node.runtime.spawn(async move { handle.drain("a test").await });
    let answer = posting.join().unwrap();
    assert!(matches!(answer, Answer::None(_)), "{answer:?}");
    node.majority.set(Majority::Agrees);
    node.runtime.block_on(draining).unwrap();
}

#[test]
fn an_unknown_outcome_is_never_a_definite_failure() {
    let node = Node::start();
    node.serve(1);
    node.signup();
    let token = node.token();
    node.majority.set(Majority::Unknown);
    let text = node.fails(503, "POST", "/api/v1/tags", Some(&token), json!({"name": "perhaps"}));
    assert!(text.contains("outcome unknown"), "{text}");
    let login = json!({"username": "admin", "password": PASSWORD});
    node.fails(503, "POST", "/api/v1/authenticate", None, login);
    // The database is fenced now: what was not committed is not shown, whether it can still be read or not.
    let (status, text) = node.text("GET", "/api/v1/tags", Some(&token)).unwrap();
    assert!(status == 503 || (status == 200 && text == "[]"), "{status} {text}");
}

#[test]
fn a_refused_write_is_reported_and_the_next_one_works() {
    let node = Node::start();
    node.serve(1);
    node.signup();
    let token = node.token();
    node.majority.set(Majority::Refuses);
    node.fails(503, "POST", "/api/v1/tags", Some(&token), json!({"name": "a"}));
    node.majority.set(Majority::Agrees);
    node.ok("POST", "/api/v1/tags", Some(&token), json!({"name": "a"}));
}

#[test]
fn a_port_in_use_is_named_and_tried_again() {
    let node = Node::start();
    let other = TcpListener::bind((node.address, HTTPS)).unwrap();
    node.promote(1);
    let state = node.handle.state();
    wait_until("the problem is shown", || state.borrow().problem.is_some());
    let problem = state.borrow().problem.clone().unwrap();
    assert!(problem.contains(&format!("{}:{HTTPS}", node.address)), "{problem}");
    assert!(!state.borrow().open && TcpStream::connect((node.address, HTTP)).is_err());
    drop(other);
    node.wait_until_open();
    assert_eq!(state.borrow().problem, None);
}

#[test]
fn the_ports_stay_open_while_a_dead_guard_is_replaced() {
    let node = Node::start();
    node.serve(1);
    let guard = node.guard.state();
    let first = guard.borrow().pid.unwrap();
    kill(Pid::from_raw(first as i32), Signal::SIGKILL).unwrap();
    wait_until("another guard lives", || guard.borrow().pid.is_some_and(|pid| pid != first));
    assert_eq!(node.text("GET", "/api/v1/_ping", None).unwrap().0, 200);
    node.demote();
    wait_until("the ports refuse", || node.refused());
}

#[test]
fn a_lapse_that_the_guard_saw_first_is_followed_by_a_clean_opening() {
    let node = Node::start();
    node.serve(1);
    let opened = node.handle.state();
    // As after a short freeze: the lease lapses, and is valid again before the supervisor looks.
    node.let_lease_lapse();
    wait_until("the ports refuse", || node.refused());
    node.extend_lease();
    node.wait_until_open();
    assert!(opened.borrow().open);
}

const FROZEN: &str = "TWISTLOCK_TEST_FROZEN";

/// Another process, because it must be frozen: see the next test.
#[test]
fn frozen_process() {
    if std::env::var_os(FROZEN).is_none() {
        return;
    }
    let node = Node::start();
    node.serve(1);
    println!("@ {}", node.address);
    // Until the test is gone.
    std::io::stdin().read_to_string(&mut String::new()).unwrap();
}

#[test]
fn a_frozen_process_answers_nothing_when_it_wakes() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "frozen_process", "--nocapture", "--test-threads=1"]).env(FROZEN, "1");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let address = lines.find_map(|line| Some(line.unwrap().split_once("@ ")?.1.to_owned())).unwrap();
    let address: IpAddr = address.parse().unwrap();
    let signal = |signal| kill(Pid::from_raw(child.id() as i32), signal).unwrap();

    let ping = b"GET /api/v1/_ping HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut client = TcpStream::connect((address, HTTP)).unwrap();
    client.write_all(ping).unwrap();
    let mut bytes = [0; 4096];
    assert!(client.read(&mut bytes).unwrap() > 0);
    signal(Signal::SIGSTOP);
    wait_until("all threads are frozen", || {
        std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap().all(|thread| {
            let stat = std::fs::read_to_string(thread.unwrap().path().join("stat")).unwrap();
            stat.rsplit_once(") ").unwrap().1.starts_with('T')
        })
    });
    // The kernel takes it for the frozen process.
    client.write_all(ping).unwrap();
    wait_until("the port refuses", || TcpStream::connect((address, HTTP)).is_err());
    signal(Signal::SIGCONT);
    let end = client.read(&mut bytes);
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    child.kill().unwrap();
    child.wait().unwrap();
}

const STUCK: &str = "TWISTLOCK_TEST_STUCK";

/// Another process, because it must end: see the next test.
#[test]
fn stuck_process() {
    if std::env::var_os(STUCK).is_none() {
        return;
    }
    let node = Node::start();
    node.serve(1);
    node.signup();
    let token = node.token();
    node.majority.set(Majority::Holds);
    let _posting = node.post_in_background(&token, "stuck");
    node.majority.wait_for_a_commit();
    node.demote();
    wait_until("the process ends", || false);
}

#[test]
fn a_missed_demotion_deadline_ends_the_process() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "stuck_process", "--nocapture", "--test-threads=1"]).env(STUCK, "1");
    let begin = Instant::now();
    assert_eq!(command.output().unwrap().status.code(), Some(twistlock_ha::supervisor::EXIT_DEADLINE));
    println!("ended after {:?}", begin.elapsed());
}

#[test]
fn the_defender_port_has_nothing_for_those_without_a_certificate() {
    let node = Node::start();
    node.serve(1);
    let ask = |path: &str| node.call_port(node::DEFENDER, "GET", path, None, Value::Null).unwrap().0;
    assert_eq!((ask("/"), ask("/api/v1/_ping"), ask("/defender")), (404, 404, 403));
}

/// Requests that wait for each other share a transaction. Its COMMIT decides on all of them, also on one that another's
/// write has stood in the way of.
#[test]
fn a_refused_commit_is_the_answer_to_all_that_share_it() {
    let node = Node::start();
    node.serve(1);
    node.hold_lease();
    node.signup();
    let token = node.token();
    node.majority.set(Majority::Holds);
    let held = node.post_in_background(&token, "held");
    node.majority.wait_for_a_commit();
    let others = ["a", "a", "b", "a", "c", "b"].map(|name| node.post_in_background(&token, name));
    node.majority.set(Majority::Refuses);
    for post in others.into_iter().chain([held]) {
        let answer = post.join().unwrap();
        assert!(matches!(answer, Answer::Status(503)), "{answer:?}");
    }
    node.majority.set(Majority::Agrees);
    assert_eq!(node.ok("GET", "/api/v1/tags", Some(&token), Value::Null), json!([]));
    for name in ["held", "a", "b", "c"] {
        node.ok("POST", "/api/v1/tags", Some(&token), json!({ "name": name }));
    }
}

#[test]
fn many_clients_write_at_once() {
    let node = Node::start();
    node.serve(1);
    node.signup();
    let (node, basic) = (&node, &node.basic("admin", PASSWORD));
    let begin = Instant::now();
    thread::scope(|scope| {
        for writer in 0..16 {
            scope.spawn(move || {
                for number in 0..20 {
                    let tag = json!({"name": format!("{writer}-{number}")});
                    node.ok("POST", "/api/v1/tags", Some(basic), tag);
                }
            });
        }
    });
    println!("16 writers, 320 tags in {:?}", begin.elapsed());
    let list = node.ok("GET", "/api/v1/tags?limit=1000", Some(basic), Value::Null);
    assert_eq!(list.as_array().unwrap().len(), 320);
    assert!(begin.elapsed() < Duration::from_secs(30));
}
