//! Clients that send slowly, and more of them than there are places.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Duration,
};

use serde_json::Value;

use super::node::{HTTP, Node, PASSWORD, wait_until};

/// Streams of the status at once: the limit of the Console.
const STREAMS: usize = 64;
const STREAM: &str = "/api/v1/high-availability/stream";

/// One answer with its body: the status.
fn answer(stream: &mut impl BufRead) -> u16 {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        assert_ne!(stream.read_line(&mut line).unwrap(), 0, "the connection has ended: {lines:?}");
        if line == "\r\n" {
            break;
        }
        lines.push(line.trim_end().to_ascii_lowercase());
    }
    assert!(!lines.contains(&"connection: close".to_owned()), "{lines:?}");
    let length = lines.iter().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    stream.read_exact(&mut body).unwrap();
    lines[0].split(' ').nth(1).unwrap().parse().unwrap()
}

/// Many clients send the head of a request and its body one after the other, as Python's. The answer may be known before
/// the body has come: then it must still be an answer, and not a connection that ends in the middle of a request.
#[test]
fn an_early_answer_does_not_end_the_connection_of_who_still_sends() {
    let node = Node::start();
    node.serve(1);
    node.hold_lease();
    node.signup();
    let mut stream = TcpStream::connect((node.address, HTTP)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut reading = BufReader::new(stream.try_clone().unwrap());
    let body = "{\"name\": \"slow\"}";
    for (method, path, expected) in [
        ("POST", "/api/v1/nothing", 404),
        ("DELETE", "/api/v1/tags", 405),
        ("POST", "/api/v1/tags", 401),
        ("GET", "/api/v1/_ping", 200),
        ("POST", "/api/v1/signup", 422),
    ] {
        let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n");
        write!(stream, "{head}Content-Length: {}\r\n\r\n", body.len()).unwrap();
        // Another client is served in the meantime.
        assert_eq!(node.text("GET", "/api/v1/_ping", None).unwrap().0, 200);
        stream.write_all(body.as_bytes()).unwrap();
        assert_eq!(answer(&mut reading), expected, "{method} {path}");
    }
}

#[test]
fn streams_are_limited_in_number_and_free_their_place() {
    let node = Node::start();
    node.serve(1);
    node.hold_lease();
    node.signup();
    let token = node.token();
    let mut streams: Vec<_> = (0..STREAMS).map(|_| node.read(STREAM, &token)).collect();
    let refused = node.fails(503, "GET", STREAM, Some(&token), Value::Null);
    assert!(refused.contains("64 streams"), "{refused}");
    // They hold no other request up, and each of them is served.
    assert_eq!(node.text("GET", "/api/v1/tags", Some(&node.basic("admin", PASSWORD))).unwrap().0, 200);
    for stream in &mut streams {
        let mut first = [0; 13];
        stream.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"event: status");
    }
    streams.pop();
    wait_until("the place of the stream that was left is free", || {
        node.begin("GET", STREAM, &[("authorization", &token)], "").status() == 200
    });
}
