//! Whoever guesses learns nothing, and keeps nobody out.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use super::node::{DEFENDER, HTTP, HTTPS, Node, PASSWORD};

/// A connection to a port of the node from another address of this host.
fn connect(node: &Node, from: IpAddr, port: u16) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
    socket.connect(&SocketAddr::new(node.address, port).into()).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// What a client sees of an answer: its status, what would tell it from another one, and how long it took.
struct Seen {
    status: u16,
    /// Without the date.
    text: String,
    time: Duration,
}

fn ask(node: &Node, from: IpAddr, head: &str, body: &str) -> Seen {
    let mut stream = connect(node, from, HTTP);
    let length = body.len();
    let begin = Instant::now();
    write!(stream, "{head}\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let time = begin.elapsed();
    let lines: Vec<_> = text.lines().filter(|line| !line.to_ascii_lowercase().starts_with("date:")).collect();
    Seen { status: text.split(' ').nth(1).unwrap().parse().unwrap(), text: lines.join("\n"), time }
}

/// A way to say who one is.
type Way = fn(&Node, IpAddr, &str, &str) -> Seen;

fn by_basic(node: &Node, from: IpAddr, name: &str, password: &str) -> Seen {
    ask(node, from, &format!("GET /api/v1/version HTTP/1.1\r\nAuthorization: {}", node.basic(name, password)), "")
}

fn by_login(node: &Node, from: IpAddr, name: &str, password: &str) -> Seen {
    let login = json!({"username": name, "password": password}).to_string();
    ask(node, from, "POST /api/v1/authenticate HTTP/1.1", &login)
}

/// Guesses until the answer is a wait of more than a second, so that the next answers come within it; tells how many guesses
/// were looked at.
fn wait_exhausted(mut guess: impl FnMut(usize) -> Seen) -> usize {
    let mut looked_at = 0;
    for number in 0.. {
        let seen = guess(number);
        match seen.status {
            429 if !seen.text.contains("try again in 1 s") => break,
            429 => thread::park_timeout(Duration::from_millis(50)),
            _ => looked_at += 1,
        }
    }
    looked_at
}

/// The one rule: whoever has to wait is told so before anybody looks whether the guess is right, in each way to log in.
#[test]
fn from_an_address_that_has_to_wait_right_and_wrong_are_the_same() {
    let node = Node::start();
    node.serve(1);
    node.hold_lease();
    node.signup();
    node.add_user("other", "auditor");
    let owner = IpAddr::from([127, 0, 0, 9]);
    for (guest, way) in [by_basic as Way, by_login].into_iter().enumerate() {
        let guesser = IpAddr::from([127, 0, 7, guest as u8 + 1]);
        // The owner is at work: what is right is remembered.
        assert_eq!(by_basic(&node, owner, "admin", PASSWORD).status, 200);
        let first = way(&node, guesser, "admin", "a guess at it");
        let nobody = way(&node, guesser, "nobody", "a guess at it");
        assert_eq!((first.status, &first.text), (401, &nobody.text), "it is not told who exists");
        for name in ["nobody", "admin"] {
            let looked_at = wait_exhausted(|number| way(&node, guesser, name, &format!("guess {number}")));
            assert!(looked_at <= 8, "{looked_at} guesses were looked at");
        }
        for other in [by_basic as Way, by_login] {
            let seen = ["wrong", PASSWORD].map(|password| other(&node, guesser, "admin", password));
            assert_eq!((seen[0].status, seen[1].status), (429, 429), "{}", seen[1].text);
            let plain = |seen: &Seen| seen.text.chars().filter(|c| !c.is_ascii_digit()).collect::<String>();
            assert_eq!(plain(&seen[0]), plain(&seen[1]));
            println!("wrong after {:?}, right after {:?}", seen[0].time, seen[1].time);
        }
        // An address that somebody else writes into the request changes nothing.
        let head = format!(
            "GET /api/v1/version HTTP/1.1\r\nX-Forwarded-For: 127.0.0.9\r\nForwarded: for=127.0.0.9\r\nX-Real-IP: 127.0.0.9\r\nAuthorization: {}",
            node.basic("admin", PASSWORD)
        );
        assert_eq!(ask(&node, guesser, &head, "").status, 429);
        // And nobody else is kept out.
        assert_eq!(by_basic(&node, owner, "admin", PASSWORD).status, 200);
        assert_eq!(by_login(&node, owner, "admin", PASSWORD).status, 200);
        assert_eq!(by_login(&node, guesser, "other", PASSWORD).status, 200, "the guesses were at another account");
    }
}

/// The old password of a change, too; and a new opening of the ports, as after a takeover, begins with what is known.
#[test]
fn guesses_count_for_the_old_password_and_beyond_a_takeover() {
    let node = Node::start();
    node.serve(1);
    node.hold_lease();
    node.signup();
    let token = node.token();
    let change = |old: &str| {
        let body = json!({"oldPassword": old, "newPassword": "another good horse"});
        let (status, text) = node.call_port(HTTPS, "PUT", "/api/v1/users/password", Some(&token), body).unwrap();
        Seen { status, text, time: Duration::ZERO }
    };
    let looked_at = wait_exhausted(|number| change(&format!("guess {number}")));
    assert!((6..=8).contains(&looked_at), "{looked_at} guesses were looked at");
    assert_eq!((change("wrong").status, change(PASSWORD).status), (429, 429));
    node.demote();
    super::wait_until("the database is free", || !node.handle.state().borrow().running);
    node.take_database_back();
    node.serve(2);
    node.hold_lease();
    // The wait may be over by now, but not what led to it.
    let login = |number: usize| json!({"username": "admin", "password": format!("guess {number}")});
    let again =
        [1, 2].map(|number| node.call_port(HTTPS, "POST", "/api/v1/authenticate", None, login(number)).unwrap().0);
    assert_eq!(again[1], 429, "{again:?}");
    node.ok("GET", "/api/v1/tags", Some(&token), Value::Null);
}

/// Places are kept apart, and whoever is silent makes room: 2,000 connections shut nobody out, wherever they go.
#[test]
fn silent_connections_shut_nobody_out() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let node = Node::start();
    node.serve(1);
    node.hold_lease();
    node.signup();
    for port in [DEFENDER, HTTPS, HTTP] {
        let flood: Vec<_> = (0..2000u16)
            .map(|number| connect(&node, IpAddr::from([127, 1, (number % 4) as u8, (number / 4 % 50) as u8 + 1]), port))
            .collect();
        let mut times: Vec<_> = (0..10)
            .map(|_| {
                let begin = Instant::now();
                // Each from anew, as a client that has never been here.
                let seen = by_login(&node, IpAddr::from([127, 2, 0, 1]), "admin", PASSWORD);
                assert_eq!(seen.status, 200, "{}", seen.text);
                node.token();
                begin.elapsed()
            })
            .collect();
        times.sort();
        println!("{} silent connections to {port}: two logins took {:?} to {:?}", flood.len(), times[0], times[9]);
        assert!(times[5] < Duration::from_secs(2), "{times:?}");
    }
}

/// Many who log in at once get an answer each, at once or after a moment; nothing is ever lost without a word.
#[test]
fn many_logins_at_once_are_answered() {
    let node = Node::start();
    node.serve(1);
    node.hold_lease();
    node.signup();
    let mut all: Vec<_> = (0..250u16)
        .map(|number| {
            let mut stream = connect(&node, IpAddr::from([127, 3, 0, (number % 125) as u8 + 1]), HTTP);
            // As many accounts, so that each needs a hash of its own.
            let login = json!({"username": format!("user{number}"), "password": PASSWORD}).to_string();
            write!(stream, "POST /api/v1/authenticate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{login}", login.len()).unwrap();
            stream
        })
        .collect();
    let mut counts = std::collections::BTreeMap::new();
    for stream in &mut all {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let status: u16 = text.split(' ').nth(1).unwrap().parse().unwrap();
        assert_eq!([503, 429].contains(&status), text.to_ascii_lowercase().contains("retry-after: "), "{text}");
        *counts.entry(status).or_insert(0) += 1;
    }
    println!("250 logins at once: {counts:?}");
    assert!(counts.keys().all(|status| [401, 503].contains(status)) && counts[&401] > 1, "{counts:?}");
}
