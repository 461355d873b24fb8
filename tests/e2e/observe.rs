//! What administrators and monitors get to see: notifications, metrics, the debug bundle, and what the scrub finds.

use std::{
    collections::HashSet,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::FileExt,
    process::Command,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;
use ring::hmac;
use serde_json::{Value, json};
use twistlock_ha::{
    cluster::Role,
    control::{self, Call},
    dev::NodeFile,
    events::{self, Event, Kind, Wanted},
    telemetry::{
        self, BACKUP_COPIED, BACKUP_LAST_SUCCESS, DAMAGE_FOUND, MEMORY_RESTORED, SERVICE_CONNECTIONS, SERVICE_UP,
    },
};

use super::{
    beside,
    cluster::{Cluster, LEASE_LOST, LIMIT},
    events::Api,
    writers::{Pen, client},
};

/// What a node says that has put another copy in the place of a damaged one.
const REPLACED: &str = "has replaced its copy";
const SECRET: &str = "the-key-of-the-signature";

/// One request that somebody sent.
#[derive(Clone, Debug)]
struct Received {
    head: String,
    body: String,
    answered: u16,
}

impl Received {
    fn header(&self, name: &str) -> &str {
        let line = self.head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
        line.unwrap_or_else(|| panic!("no {name} in {}", self.head))
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("JSON")
    }

    fn assert_signed(&self) {
        let key = hmac::Key::new(hmac::HMAC_SHA256, SECRET.as_bytes());
        let signed = format!("{}.{}", self.header("x-twistlock-timestamp"), self.body);
        let tag: String = hmac::sign(&key, signed.as_bytes()).as_ref().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(self.header("x-twistlock-signature"), format!("sha256={tag}"));
    }
}

/// A web server of a few lines that refuses the first two takeovers that it is told of.
struct Hook {
    address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
}

impl Hook {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let received = Arc::new(Mutex::new(Vec::new()));
        let list = Arc::clone(&received);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                answer(stream, &list);
            }
        });
        Self { address, received }
    }

    fn of_kind(&self, kind: &str) -> Vec<Received> {
        let all = self.received.lock().unwrap().clone();
        all.into_iter().filter(|received| received.json()["kind"] == kind).collect()
    }
}

fn answer(mut stream: TcpStream, list: &Mutex<Vec<Received>>) {
    let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(reader.read_line(&mut head).expect("a head") > 0, "{head}");
    }
    let head = head.replace("\r\n", "\n");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
    let mut body = vec![0; length.parse().expect("a number")];
    reader.read_exact(&mut body).expect("a body");
    let body = String::from_utf8(body).expect("text");
    let mut list = list.lock().unwrap();
    let takeovers = list.iter().filter(|known| known.body.contains("\"kind\":\"takeover\"")).count();
    let answered = if body.contains("\"kind\":\"takeover\"") && takeovers < 2 { 503 } else { 204 };
    list.push(Received { head, body, answered });
    let text = format!("HTTP/1.1 {answered} OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    stream.write_all(text.as_bytes()).expect("an answer");
}

#[test]
fn a_takeover_notifies_once_in_spite_of_failures_and_the_bundle_has_no_secrets() {
    let _beside = beside();
    let hook = Hook::start();
    let folder = tempfile::tempdir().unwrap();
    let (script, said) = (folder.path().join("notify.sh"), folder.path().join("said"));
    let mask = folder.path().join("mask");
    let text =
        format!("cat >> {0}; echo >> {0}; grep SigBlk /proc/self/status > {1}\n", said.display(), mask.display());
    std::fs::write(&script, text).unwrap();
    let cluster = Cluster::start();
    cluster.configure("NOTIFY_COMMAND", &format!("\"/bin/sh {}\"", script.display()));
    cluster.configure("METRICS_TOKEN", "0123456789-metrics-token");
    cluster.restart_all();
    let api = Api::new(&cluster);
    let primary = cluster.primary();
    let url = format!("http://{}/path-of-the-hook", hook.address);
    let wish = json!({ "webhooks": [{ "name": "ops", "url": url, "secret": SECRET }] });
    assert_eq!(api.post(primary, "settings/notifications", &wish), (200, String::new()));
    let odd = json!({ "webhooks": [{ "name": "ops", "url": "file:///etc/passwd" }] });
    assert_eq!(api.post(primary, "settings/notifications", &odd).0, 400);
    let shown = api.get(primary, "settings/notifications").1.to_string();
    assert!(shown.contains("\"signed\":true") && !shown.contains(SECRET), "{shown}");
    assert!(!api.get(primary, "high-availability").1.to_string().contains("path-of-the-hook"));
    let audits = api.get(primary, "audits/mgmt?limit=5").1.to_string();
    assert!(audits.contains(&format!("http://{}", hook.address)) && audits.contains("urlDigest"), "{audits}");
    assert!(!audits.contains("path-of-the-hook") && !audits.contains(SECRET), "{audits}");
    let (status, text) = api.post(primary, "settings/notifications/test", &json!(null));
    assert_eq!(status, 200, "{text}");
    assert_eq!(text.matches("\"ok\":true").count(), 2, "{text}");
    hook.of_kind("test")[0].assert_signed();
    let blocked = std::fs::read_to_string(&mask).unwrap();
    assert_eq!(blocked.split_whitespace().last(), Some("0000000000000000"), "the command is not deaf to signals");
    cluster.signal(primary, Signal::SIGKILL);
    cluster.wait_for("a notification that was taken", |_| {
        hook.of_kind("takeover").iter().any(|received| received.answered == 204)
    });
    cluster.wait_healthy();
    let told = hook.of_kind("takeover");
    told.iter().for_each(Received::assert_signed);
    let taken: Vec<u16> = told.iter().map(|received| received.answered).collect();
    assert_eq!(taken, [503, 503, 204], "tried again until it was taken, and then no more");
    let ids: HashSet<String> = told.iter().map(|received| received.json()["id"].to_string()).collect();
    assert_eq!(ids.len(), 1);
    assert!(told[0].json()["text"].as_str().unwrap().contains("took over from"));
    cluster.wait_for("the command to have been run for the same event", |_| {
        let text = std::fs::read_to_string(&said).unwrap_or_default();
        text.lines().any(|line| ids.iter().any(|id| line.contains(id.trim_matches('"'))))
    });
    assert_no_secrets(&cluster, folder.path());
    println!("notifications: {}", cluster.finish(&[]));
}

/// The debug bundle of a node that runs and of one that does not.
fn assert_no_secrets(cluster: &Cluster, folder: &std::path::Path) {
    let node = cluster.node(0);
    let mut secrets = vec![SECRET.to_owned(), "0123456789-metrics-token".to_owned(), cluster.file().password];
    for file in ["node-key.pem", "console-key.pem"] {
        let pem = std::fs::read_to_string(node.data.join("certificates").join(file)).unwrap();
        secrets.push(pem.lines().nth(1).unwrap().to_owned());
    }
    let log = cluster.config_path(0).with_file_name("log");
    for (name, data) in [("up", node.data.clone()), ("down", folder.to_owned())] {
        let archive = folder.join(format!("{name}.tar.gz"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
        command.args(["debug", "bundle", "-o"]).arg(&archive).arg("--config").arg(cluster.config_path(0));
        let output = command.arg("--data").arg(data).arg("--log").arg(&log).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = Command::new("tar").arg("-xzOf").arg(&archive).output().unwrap();
        let text = String::from_utf8(text.stdout).unwrap();
        for part in ["NOTIFY_COMMAND", "METRICS_TOKEN=(redacted)", "node runs", "certificates/node-key.pem"] {
            assert!(text.contains(part) || name == "down" && part.ends_with(".pem"), "{name}: no {part}");
        }
        assert_eq!(text.contains("twistlock_epoch "), name == "up");
        for secret in &secrets {
            assert!(!text.contains(secret.as_str()), "{name}: a secret is in the bundle");
        }
    }
}

/// The metrics of a node, by the Console.
fn scrape(api: &Api, node: usize, authorization: Option<&str>) -> (u16, String) {
    let client = client(&api.file.ca, Duration::from_secs(5));
    let call = client.get(format!("{}/metrics", api.file.nodes[node].console_url));
    let call = authorization.into_iter().fold(call, |call, value| call.header("authorization", value));
    let mut answer = call.call().expect("the PRIMARY answers");
    (answer.status().as_u16(), answer.body_mut().read_to_string().expect("text"))
}

/// Changes one bit in the middle of a page of a node's database file, as a bad disk would.
fn flip(node: &NodeFile, page: u64) {
    let path = node.data.join("database/console.db");
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let (at, mut byte) = ((page - 1) * 4096 + 2000, [0]);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

/// What a node has recorded, also while its process begins again.
fn in_file(cluster: &Cluster, node: usize, kind: Kind) -> Vec<Event> {
    events::read(&cluster.node(node).data, &Wanted { kind: Some(kind), ..Wanted::default() }).expect("events")
}

fn wait_repaired(cluster: &Cluster, node: usize) {
    cluster.wait_for("the damage to be found", |_| !in_file(cluster, node, Kind::Damage).is_empty());
    cluster.wait_for("another database", |_| {
        in_file(cluster, node, Kind::Damage).iter().any(|event| event.sentence.contains(REPLACED))
    });
    cluster.wait_healthy();
    cluster.wait_for("all SECONDARY up, as the PRIMARY sees them", |statuses| {
        let primary = statuses.iter().flatten().find(|status| status.role == Role::Primary);
        primary.is_some_and(|status| status.members.iter().all(|m| matches!(m.state, Role::Primary | Role::Secondary)))
    });
}

#[test]
fn a_flipped_bit_is_found_and_repaired_and_all_metrics_are_there() {
    let _beside = beside();
    let cluster = Cluster::start();
    cluster.configure("SCRUB_SECONDS", "1");
    cluster.configure("CHECKPOINT_SECONDS", "1");
    cluster.restart_all();
    let (api, pen) = (Api::new(&cluster), Pen::new(&cluster.file()));
    assert!(pen.write(cluster.primary(), "before-the-damage"));
    let missing = |text: &str| {
        let has = |name: &str| text.lines().any(|line| !line.starts_with('#') && line.starts_with(name));
        // Nobody has made a backup or copied one yet, nothing is damaged, and there is no service.
        let absent =
            [BACKUP_LAST_SUCCESS, BACKUP_COPIED, DAMAGE_FOUND, MEMORY_RESTORED, SERVICE_UP, SERVICE_CONNECTIONS];
        let names = telemetry::METRICS.iter().map(|metric| metric.name).filter(|name| !absent.contains(name));
        names.filter(|name| !has(name)).collect::<Vec<_>>()
    };
    let scrape_all = || scrape(&api, cluster.primary(), Some(&api.authorization));
    let clean = "the scrub of the database file found nothing wrong";
    cluster.wait_for("a scrub", |_| cluster.log(cluster.primary()).contains(clean));
    let (status, text) = scrape_all();
    assert_eq!((status, missing(&text)), (200, Vec::new()));
    assert_eq!(scrape(&api, cluster.primary(), None).0, 401);
    println!("  {} lines of metrics, every name of the table among them", text.lines().count());
    let away = (cluster.primary() + 1) % 3;
    flip(&cluster.node(away), 3);
    wait_repaired(&cluster, away);
    let primary = cluster.primary();
    flip(&cluster.node(primary), 3);
    cluster.wait_for("the role to leave the damaged PRIMARY", |statuses| {
        statuses[primary].as_ref().is_some_and(|status| status.role != Role::Primary)
    });
    wait_repaired(&cluster, primary);
    assert!(pen.has("before-the-damage"));
    assert!(pen.write(cluster.primary(), "after-the-damage"));
    for node in [away, primary] {
        // By the process that came after: the one that found the damage has not lived long enough to be heard.
        let told = in_file(&cluster, node, Kind::Damage).into_iter().find(|event| event.sentence.contains(REPLACED));
        println!("  {}", told.unwrap().sentence);
        let text = control::send(&cluster.node(node).control, &Call::get("/metrics"), LIMIT).unwrap().text;
        assert!(text.lines().any(|line| line.starts_with(DAMAGE_FOUND)), "{text}");
    }
    let expected = [
        "this copy of the database is not applied to any further",
        "the database file of this PRIMARY is damaged: the role goes to another member",
        "the database is left as it is: it has to be fetched again",
    ];
    println!("scrub: {}", cluster.finish(&[LEASE_LOST, &expected[..]].concat()));
}
