//! What an attacker would try: roles, sessions of browsers, odd and oversized requests.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::node::{HTTP, Node, PASSWORD};

fn started() -> Node {
    let node = Node::start();
    node.serve(1);
    node.signup();
    node
}

/// Every route of the document: method, path with something for each placeholder, and the roles that may; none if open.
fn routes(node: &Node, admin: &str) -> Vec<(String, String, Option<Vec<String>>)> {
    let document = node.ok("GET", "/api/v1/openapi.json", Some(admin), Value::Null);
    let mut all = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let parts = path.split('/').map(|part| if part.starts_with('{') { "not-there" } else { part });
        let path = parts.collect::<Vec<_>>().join("/");
        for (method, operation) in methods.as_object().unwrap() {
            let roles = operation["x-roles"].as_array();
            let roles = roles.map(|roles| roles.iter().map(|role| role.as_str().unwrap().to_owned()).collect());
            all.push((method.to_ascii_uppercase(), path.clone(), roles));
        }
    }
    all
}

#[test]
fn every_route_is_closed_to_strangers_and_to_other_roles() {
    let node = started();
    let admin = node.basic("admin", PASSWORD);
    let mut users = vec![("admin", admin.clone())];
    for role in ["operator", "auditor", "defenderManager"] {
        users.push((role, node.add_user(role, role)));
    }
    let all = routes(&node, &admin);
    assert!(all.len() > 30, "{}", all.len());
    let mut tried = 0;
    for (method, path, roles) in &all {
        // Without a body that would do anything.
        let ask = |auth: Option<&str>| {
            let mut headers = vec![("content-type", "application/json")];
            headers.extend(auth.map(|auth| ("authorization", auth)));
            let body = if matches!(&**method, "GET" | "DELETE") { "" } else { "[]" };
            node.begin(method, path, &headers, body).status().as_u16()
        };
        let Some(roles) = roles else {
            // A drill has a token of its own, which is nobody's login.
            let mut logins = users.iter().map(|(_, auth)| Some(auth.as_str())).chain([None, Some("Bearer TWD1.1.0.x")]);
            assert!(!path.contains("/drill/") || logins.all(|auth| ask(auth) == 401), "{method} {path}");
            continue;
        };
        for stranger in [None, Some("Bearer nonsense"), Some("Bearer TWJ1.a.b"), Some("Basic YTpi"), Some("x")] {
            let status = ask(stranger);
            // One guess of a password more than is free, and a join token that no cluster has made.
            let expected = [401, if stranger == Some("Basic YTpi") { 429 } else { 401 }];
            let join = stranger == Some("Bearer TWJ1.a.b") && [403, 404].contains(&status);
            assert!(expected.contains(&status) || join, "{method} {path} for {stranger:?}: {status}");
        }
        for (role, auth) in &users {
            let status = ask(Some(auth));
            let may = roles.iter().any(|one| one == role);
            assert_eq!(status != 403, may, "{method} {path} as {role}: {status}");
            assert!(status != 401 && status != 500, "{method} {path} as {role}: {status}");
            tried += 1;
        }
    }
    println!("{} routes, {tried} requests with a role", all.len());
}

/// The headers of our own page, and of a login in it.
fn page(origin: &str) -> Vec<(&'static str, String)> {
    vec![
        ("content-type", "application/json".to_owned()),
        ("x-twistlock-page", "1".to_owned()),
        ("origin", origin.to_owned()),
        ("sec-fetch-site", "same-origin".to_owned()),
    ]
}

fn refs<'a>(headers: &'a [(&'static str, String)]) -> Vec<(&'a str, &'a str)> {
    headers.iter().map(|(name, value)| (*name, &**value)).collect()
}

#[test]
fn the_page_has_a_cookie_that_other_sites_and_scripts_cannot_use() {
    let node = started();
    let origin = format!("https://{}:{}", node.address, super::HTTPS);
    let (login, tags) = (json!({"username": "admin", "password": PASSWORD}).to_string(), "/api/v1/tags");
    let ours = page(&origin);
    let reply = node.send("POST", "/api/v1/authenticate", &refs(&ours), &login);
    assert_eq!(reply.status, 200, "{}", reply.text);
    assert!(!reply.text.contains("token"), "scripts do not see it: {}", reply.text);
    let cookie = reply.header("set-cookie").to_owned();
    for part in ["__Host-twistlock=", "; Path=/", "; Secure", "; HttpOnly", "; SameSite=Strict", "; Max-Age=1800"] {
        assert!(cookie.contains(part), "{cookie}");
    }
    assert!(!cookie.contains("Domain"));
    let planted = cookie.split(';').next().unwrap().to_owned();
    let with = |headers: &[(&'static str, String)], cookie: &str| {
        let mut headers = headers.to_vec();
        headers.push(("cookie", cookie.to_owned()));
        headers
    };
    let post = |headers: &[(&'static str, String)], name: &str| {
        node.send("POST", tags, &refs(headers), &json!({ "name": name }).to_string()).status
    };
    assert_eq!(node.send("GET", tags, &[("cookie", &planted)], "").status, 200);
    assert_eq!(post(&with(&ours, &planted), "ours"), 200);
    let json = ("content-type", "application/json".to_owned());
    let marked = ("x-twistlock-page", "1".to_owned());
    assert_eq!(post(&with(std::slice::from_ref(&json), &planted), "no header"), 403);
    assert_eq!(post(&with(&[json, marked], &planted), "no origin"), 403);
    assert_eq!(post(&with(&page("https://evil.example"), &planted), "evil"), 403);
    let mut cross = with(&ours, &planted);
    cross[3].1 = "cross-site".to_owned();
    assert_eq!(post(&cross, "cross"), 403);
    // GETs that change something. This node gives no invitations, and says so to its own page alone.
    let get = |path: &str, headers: &[(&str, &str)]| node.send("GET", &format!("/api/v1/{path}"), headers, "").status;
    assert_eq!(get("authenticate/renew", &[("cookie", &planted)]), 403);
    for path in ["high-availability/join-script", "scripts/console.sh"] {
        assert_eq!(get(path, &[("cookie", &planted)]), 403, "{path}");
        assert_eq!(get(path, &refs(&with(&ours, &planted))), 404, "{path}");
    }

    // A login ends the session that was planted in the browser, and never takes its token over.
    let again = node.send("POST", "/api/v1/authenticate", &refs(&with(&ours, &planted)), &login);
    let fresh = again.header("set-cookie").split(';').next().unwrap().to_owned();
    assert_ne!(fresh, planted);
    let reply = node.send("GET", tags, &[("cookie", &planted)], "");
    assert_eq!((reply.status, reply.header("www-authenticate")), (401, "Bearer"));
    // An Authorization header is never helped out by a cookie.
    assert_eq!(node.send("GET", tags, &[("cookie", &fresh), ("authorization", "Bearer x")], "").status, 401);
    let out = node.send("POST", "/api/v1/logout", &refs(&with(&ours, &fresh)), "");
    assert!(out.status == 200 && out.header("set-cookie").contains("Max-Age=0"), "{}", out.text);
    assert_eq!(node.send("GET", tags, &[("cookie", &fresh)], "").status, 401);
}

#[test]
fn the_page_does_not_log_in_over_plain_http() {
    let node = started();
    let login = json!({"username": "admin", "password": PASSWORD}).to_string();
    let head = format!(
        "POST /api/v1/authenticate HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Twistlock-Page: 1\r\n\
         Origin: https://x\r\nX-Forwarded-Proto: https\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        login.len()
    );
    let answer = raw(&node, &[head.as_bytes(), login.as_bytes()].concat());
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("HTTPS only"), "{answer}");
    assert!(!answer.to_ascii_lowercase().contains("set-cookie") && !answer.contains("strict-transport-security"));
}

/// Sends bytes to the plain port and reads what comes until the end.
fn raw(node: &Node, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect((node.address, HTTP)).unwrap();
    // It may be cut off before all of it is sent.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    // A reset after the answer is fine: the rest of an oversized request was not read.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn every_answer_has_the_headers_that_browsers_heed() {
    let node = started();
    for path in ["/api/v1/_ping", "/api/v1/tags", "/api/v1/nothing", "/nothing"] {
        let reply = node.send("GET", path, &[], "");
        let has = |name: &str, part: &str| assert!(reply.header(name).contains(part), "{path}: {:?}", reply.headers);
        has("x-content-type-options", "nosniff");
        has("cache-control", "no-store");
        has("content-security-policy", "default-src 'none'");
        has("content-security-policy", "frame-ancestors 'none'");
        has("x-frame-options", "DENY");
        has("referrer-policy", "no-referrer");
        has("strict-transport-security", "max-age=31536000");
    }
}

#[test]
fn odd_requests_are_refused_and_nothing_breaks() {
    let node = started();
    let admin = node.token();
    let auth = ("authorization", &*admin);
    let post =
        |media: &str, body: &str| node.send("POST", "/api/v1/tags", &[auth, ("content-type", media)], body).status;
    assert_eq!(post("text/plain", r#"{"name": "x"}"#), 415);
    assert_eq!(post("application/x-www-form-urlencoded", "name=x"), 415);
    assert_eq!(post("multipart/form-data; boundary=x", "--x--"), 415);
    assert_eq!(post("application/json", "\u{0}"), 400);
    assert_eq!(post("application/json", &format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000))), 422);
    assert_eq!(post("application/json", r#"{"name": "a\u0000b"}"#), 400);
    for path in [
        "/api/v1/programs/..%2f..%2f..%2fetc%2fpasswd",
        "/api/v1/programs/%2e%2e/%2e%2e/etc/passwd",
        "/api/v1/../../etc/passwd",
        "/api/v1//tags",
        "/api/v1/tags/",
        "/..%00",
        "/api/v1/users/%ff%fe",
    ] {
        let reply = node.send("GET", path, &[auth], "");
        assert!([400, 404, 405].contains(&reply.status), "{path}: {}", reply.status);
        assert!(!reply.text.contains("root:"));
    }
    // A name of a request never becomes a header of the answer.
    let reply = node.send("DELETE", "/api/v1/tags/x%0d%0aSet-Cookie:%20a=b", &[auth], "");
    assert!(reply.status == 404 && reply.header("set-cookie").is_empty());
    assert!(serde_json::from_str::<Value>(&reply.text).is_ok(), "{}", reply.text);
    node.fails(401, "GET", "/api/v1/tags", Some(&format!("Bearer {}", "a".repeat(30_000))), Value::Null);
    node.ok("GET", "/api/v1/tags", Some(&admin), Value::Null);
}

#[test]
fn heads_are_limited_in_size_number_and_time() {
    let node = started();
    let ping = "GET /api/v1/_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n";
    let with = |more: &str| raw(&node, format!("{ping}{more}\r\n").as_bytes());
    assert!(with("").starts_with("HTTP/1.1 200"));
    let large = with(&format!("A: {}\r\n", "b".repeat(300_000)));
    // The reset may overtake the answer.
    assert!(large.is_empty() || large.starts_with("HTTP/1.1 431"), "{large}");
    assert!(with(&"A: b\r\n".repeat(100)).starts_with("HTTP/1.1 431"));
    // What a proxy in between and we would read differently.
    assert!(with("Content-Length: 5\r\nContent-Length: 6\r\n").starts_with("HTTP/1.1 400"));
    let tls = raw(&node, b"\x16\x03\x01\x02\x00\x01");
    assert!(tls.is_empty() || tls.starts_with("HTTP/1.1 400"), "{tls}");
    // One byte at a time is not enough either: the limit is for the whole head.
    let begin = Instant::now();
    let mut slow = TcpStream::connect((node.address, HTTP)).unwrap();
    slow.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut byte = [0];
    for sent in ping.bytes().cycle() {
        let closed = slow.write_all(&[sent]).is_err()
            || match slow.read(&mut byte) {
                Ok(_) => true,
                Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
            };
        if closed {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "a slow head keeps its connection");
    }
    println!("a slow head was given up after {:?}", begin.elapsed());
}
