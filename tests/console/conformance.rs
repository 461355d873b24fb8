//! What RFC 9110 and 9112 say about requests that are odd, but not wrong, and about wrong ones, over plain HTTP and TLS.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
    time::Duration,
};

use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};

use super::node::{HTTP, HTTPS, Node};

/// More than the kernel's buffers take, and more than a body may have.
const LARGE: usize = 30 << 20;

fn started() -> Node {
    let node = Node::start();
    node.serve(1);
    node.hold_lease();
    node
}

fn plain(node: &Node) -> TcpStream {
    let stream = TcpStream::connect((node.address, HTTP)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// A connection over TLS that offers these protocols.
fn secure(node: &Node, protocols: &[&[u8]]) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(node.certificate()).unwrap() {
        roots.add(certificate.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    let name = ServerName::IpAddress(node.address.into());
    let stream = TcpStream::connect((node.address, HTTPS)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), stream)
}

/// Sends a request and returns all that comes until the connection ends.
fn ask(mut stream: impl Read + Write, request: &str) -> String {
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

fn code(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or(answer)
}

#[test]
fn every_version_that_is_spoken_can_be_chosen() {
    let node = started();
    let old = "GET /api/v1/_ping HTTP/1.0\r\n\r\n";
    let new = "GET /api/v1/_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    for (protocols, request) in [
        (&[][..], new),
        (&[&b"http/1.1"[..]], new),
        (&[b"h2", b"http/1.1"], new),
        (&[b"http/1.0"], old),
        (&[b"http/1.1", b"http/1.0"], old),
    ] {
        let answer = ask(secure(&node, protocols), request);
        assert_eq!(code(&answer), "200", "{protocols:?}: {answer}");
    }
    assert_eq!(code(&ask(plain(&node), old)), "200");
}

#[test]
fn hosts_and_expectations_are_checked() {
    let node = started();
    for (more, expected) in [
        ("", "400"),
        ("Host: a\r\nHost: a\r\n", "400"),
        ("Host: a b\r\n", "400"),
        ("Host: a\r\n", "200"),
        ("Host:\r\n", "200"),
        ("Host: a\r\nExpect: wonders\r\n", "417"),
        ("Host: a\r\nTransfer-Encoding: gzip, chunked\r\n", "501"),
        ("Host: a\r\nTransfer-Encoding: gzip\r\n", "400"),
        ("Host: a\r\nContent-Length: -1\r\n", "400"),
        ("Host : a\r\n", "400"),
    ] {
        let answer = ask(plain(&node), &format!("GET /api/v1/_ping HTTP/1.1\r\n{more}Connection: close\r\n\r\n"));
        assert_eq!(code(&answer), expected, "{more:?}: {answer}");
    }
}

#[test]
fn methods_are_told_and_heads_have_no_body() {
    let node = started();
    let with = |line: &str| ask(plain(&node), &format!("{line} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"));
    let allow = |answer: &str| {
        let line = answer.lines().find_map(|line| line.strip_prefix("allow: ")).unwrap_or_default();
        let mut methods: Vec<_> = line.split(',').map(|method| method.trim().to_owned()).collect();
        methods.sort();
        methods
    };
    let patch = with("PATCH /api/v1/_ping");
    assert_eq!((code(&patch), allow(&patch)), ("405", vec!["GET".to_owned(), "HEAD".to_owned()]), "{patch}");
    let options = with("OPTIONS /api/v1/tags");
    assert_eq!(code(&options), "204");
    assert!(["GET", "HEAD", "POST"].iter().all(|method| allow(&options).contains(&(*method).to_owned())), "{options}");
    let server = with("OPTIONS *");
    assert!(code(&server) == "204" && allow(&server).contains(&"DELETE".to_owned()), "{server}");
    assert_eq!(code(&with("OPTIONS /api/v1/nothing")), "404");
    assert_eq!(code(&with("TRACE /api/v1/_ping")), "405");
    for path in ["/", "/ui/app.js", "/api/v1/_ping", "/api/v1/settings/initialized"] {
        let (get, head) = (with(&format!("GET {path}")), with(&format!("HEAD {path}")));
        let (fields, _) = get.split_once("\r\n\r\n").unwrap();
        let without_date =
            |text: &str| text.lines().filter(|line| !line.starts_with("date:")).collect::<Vec<_>>().join("\n");
        assert_eq!(without_date(&head).trim_end(), without_date(fields), "{path}");
    }
}

/// A client that asks first is told at once, and has no reason to send. One that does not ask gets the same answer in spite of
/// what it goes on sending.
#[test]
fn a_body_that_is_too_long_is_refused_early_and_the_answer_arrives() {
    let node = started();
    let head = format!(
        "POST /api/v1/signup HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {LARGE}\r\n"
    );
    for round in 0..12 {
        let asked = ask(plain(&node), &format!("{head}Expect: 100-continue\r\n\r\n"));
        assert_eq!(code(&asked), "413", "round {round}: {asked}");
    }
    let body = "1".repeat(LARGE);
    for round in 0..3 {
        let sent = ask(plain(&node), &format!("{head}\r\n{body}"));
        assert_eq!(code(&sent), "413", "round {round}: {sent}");
        let sent = ask(secure(&node, &[]), &format!("{head}\r\n{body}"));
        assert_eq!(code(&sent), "413", "round {round}, TLS: {sent}");
    }
}
