//! Files of a member's data folder are damaged while it is down: the real daemon heals them and the member is SECONDARY again, or it
//! ends with one line. And whatever is given to a cluster in the place of a key: nothing that comes out has a piece of it.
//! `DAMAGE=all` damages each file in each way, and not a sample.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::json;
use twistlock_ha::{
    admin::Custom,
    cluster::{ClusterId, Role},
    control::{self, Call},
    events::Event,
    pki::Authority,
};

use super::{beside, cluster::Cluster, cluster::LIMIT, events::Api, writers::Pen};

/// What a member says that has mended something.
pub const MENDED: &[&str] = &[
    "was set aside",
    "made anew",
    "rebuilt from",
    "was moved to",
    "has made a new key",
    "has a new one of the cluster's authority",
    "is fetched from",
    "are fetched from",
    "was corrected",
    "cannot be read", // its events
    "is damaged",
    "this copy of the database is not applied to any further",
    "does not vote and is no candidate",
    "the database is left as it is",
    "new cluster key",
    "what all members share is not up to date",
    "cannot be used here",
    "stays as it was, and is tried again",
];

/// Every way to damage a file. The name of each says what it does.
const WAYS: [&str; 7] = ["removed", "emptied", "cut", "flipped", "a folder", "a loop", "foreign"];

fn damage(data: &Path, name: &str, way: &str) {
    let path = data.join(name);
    let bytes = fs::read(&path).unwrap_or_default();
    let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
    match way {
        "removed" => {}
        "emptied" => fs::write(&path, "").unwrap(),
        "cut" => fs::write(&path, &bytes[..bytes.len() / 2]).unwrap(),
        "flipped" => {
            let mut bytes = if bytes.is_empty() { b"x".to_vec() } else { bytes };
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
            fs::write(&path, bytes).unwrap();
        }
        "a folder" => fs::create_dir_all(path.join("inside")).unwrap(),
        "a loop" => symlink(&path, &path).unwrap(),
        "foreign" => fs::write(&path, fs::read(data.join("lock")).unwrap()).unwrap(),
        other => unreachable!("{other}"),
    }
}

/// Kills a member that is SECONDARY, damages its files, and waits until it is SECONDARY again.
fn heal(cluster: &Cluster, files: &[(&str, &str)]) {
    let node = (cluster.primary() + 1) % 3;
    cluster.signal(node, Signal::SIGKILL);
    cluster.wait_for("the end of the process", |_| cluster.node(node).pid.is_none());
    let begin = Instant::now();
    let data = cluster.node(node).data;
    files.iter().for_each(|(name, way)| damage(&data, name, way));
    cluster.wait_for(&format!("SECONDARY in spite of {files:?}"), |statuses| {
        statuses[node].as_ref().is_some_and(|status| status.role == Role::Secondary)
    });
    cluster.wait_healthy();
    println!("  {files:?}: SECONDARY again {:.1} s after the damage", begin.elapsed().as_secs_f64());
    assert!(!cluster.log(node).contains("panicked"));
}

#[test]
fn a_damaged_member_heals_by_itself() {
    let _beside = beside();
    let cluster = Cluster::start();
    let pen = Pen::new(&cluster.file());
    assert!(pen.write(cluster.primary(), "before"));
    let sample: &[&[(&str, &str)]] = &[
        &[
            ("identity.json", "flipped"),
            ("certificates/console-key.pem", "emptied"),
            ("database/console.checkpoint", "cut"),
        ],
        &[("membership.json", "cut"), ("certificates/node-key.pem", "flipped"), ("events.jsonl", "a folder")],
        &[
            ("certificates/cluster.key", "cut"),
            ("certificates/console-cert.pem", "flipped"),
            ("database/console.db", "removed"),
        ],
    ];
    sample.iter().for_each(|files| heal(&cluster, files));
    let node = (cluster.primary() + 1) % 3;
    cluster.wait_for("what was mended in the status", |statuses| {
        statuses[node].iter().any(|status| status.warnings.iter().any(|text| text.contains("check the disk")))
    });
    let wanted = Call::get("high-availability/events?limit=400");
    let events: Vec<Event> = control::ask(&cluster.node(node).control, &wanted, LIMIT).unwrap();
    assert!(events.iter().any(|event| event.sentence.contains("set aside")), "{events:#?}");
    if std::env::var("DAMAGE").is_ok_and(|all| all == "all") {
        let names = [
            "identity.json",
            "membership.json",
            "certificates/ca.pem",
            "certificates/node.pem",
            "certificates/node-key.pem",
            "certificates/console-cert.pem",
            "certificates/console-key.pem",
            "certificates/cluster.key",
            "database/console.checkpoint",
            "database/console.db",
            "database/console.db-wal",
            "snapshot.ready",
            "snapshot.incoming",
            "rollback",
            "events.jsonl",
            "join.json",
        ];
        for name in names {
            WAYS.iter()
                .filter(|way| **way != "cut" || name.contains('.'))
                .for_each(|way| heal(&cluster, &[(name, way)]));
        }
    }
    assert!(pen.write(cluster.primary(), "after"));
    println!("damage: {}", cluster.finish(MENDED));
}

/// Runs the daemon of a member until it is up or has ended.
fn run(config: &Path, control_socket: &Path) -> Option<Output> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_twistlockd"))
        .args(["run", "--config"])
        .arg(config)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + LIMIT;
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "neither up nor ended");
        if control::status(control_socket, Duration::from_millis(200)).is_ok() {
            child.kill().unwrap();
            let said = child.wait_with_output().unwrap();
            assert!(!String::from_utf8_lossy(&said.stderr).contains("panicked"));
            return None;
        }
        poll_pause();
    }
    Some(child.wait_with_output().unwrap())
}

fn poll_pause() {
    std::thread::sleep(Duration::from_millis(20));
}

/// What cannot be mended, and what is too open: each a start of the real daemon.
#[test]
fn what_cannot_be_mended_is_one_line() {
    let _beside = beside();
    let cluster = Cluster::start_with("0", |_| {});
    let node = (cluster.primary() + 1) % 3;
    let (config, data, socket) = (cluster.config_path(node), cluster.node(node).data, cluster.node(node).control);
    cluster.signal(node, Signal::SIGKILL);
    cluster.wait_for("the end of the process", |_| cluster.node(node).pid.is_none());
    let kept = tempfile::tempdir().unwrap();
    let copy = |from: &Path, to: &Path| {
        let _ = fs::remove_dir_all(to);
        assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
    };
    copy(&data, &kept.path().join("data"));
    let lines: &[(&[(&str, &str)], &str)] = &[
        (&[("certificates/node-key.pem", "cut"), ("certificates/cluster.key", "cut")], "node-key.pem"),
        (&[("identity.json", "emptied"), ("certificates/node-key.pem", "removed")], "identity.json"),
        (
            &[("identity.json", "removed"), ("membership.json", "removed"), ("membership.json.copy", "removed")],
            "identity.json",
        ),
        (&[("lock", "a folder")], "lock"),
    ];
    for (files, named) in lines {
        files.iter().for_each(|(name, way)| damage(&data, name, way));
        let ended = run(&config, &socket).unwrap_or_else(|| panic!("{files:?}: it runs"));
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(69), "{files:?}: {said}");
        let last: Vec<&str> = said.lines().filter(|line| line.contains("cannot start")).collect();
        assert!(last.len() == 1 && last[0].contains(named) && !said.contains("panicked"), "{files:?}: {said}");
        println!("  {files:?}: {}", last[0]);
        copy(&kept.path().join("data"), &data);
    }
    // The data folder is a link, and everybody may do everything.
    let elsewhere: PathBuf = kept.path().join("moved");
    fs::rename(&data, &elsewhere).unwrap();
    symlink(&elsewhere, &data).unwrap();
    let mode = |name: &str, bits| fs::set_permissions(data.join(name), fs::Permissions::from_mode(bits)).unwrap();
    let open = [("", 0o777), ("certificates", 0o777), ("certificates/node-key.pem", 0o666), ("identity.json", 0)];
    open.into_iter().for_each(|(name, bits)| mode(name, bits));
    assert!(run(&config, &socket).is_none(), "it runs");
    let bits = |name: &str| fs::metadata(data.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        [bits(""), bits("certificates"), bits("certificates/node-key.pem"), bits("identity.json")],
        [0o755, 0o700, 0o600, 0o600]
    );
}

/// Texts in the place of a key, and the key that is in them.
fn broken_keys() -> (Vec<String>, String) {
    let issued = Authority::create(ClusterId(7)).unwrap().issue_console(&["a.example"]).unwrap();
    let whole = format!("{}{}", issued.cert_pem, issued.key_pem);
    let texts = vec![
        whole.replace('\n', ""),
        whole.replace('\n', " "),
        whole.replace("PRIVATE KEY-----", "PRIVATE KEY"),
        whole.replace("-----END PRIVATE KEY-----", ""),
        issued.key_pem.replace("-----BEGIN PRIVATE KEY-----", "-----BEGIN EC PRIVATE KEY-----"),
        issued.key_pem.lines().nth(1).unwrap().to_owned(),
        format!("\u{feff}{}", issued.key_pem.replace('M', "?")),
    ];
    let secret: String = issued.key_pem.lines().filter(|line| !line.starts_with("-----")).collect();
    (texts, secret)
}

/// True if eight characters in a row of the secret are in the text, also where the text has lost or got other line breaks.
fn leaks(text: &str, secret: &str) -> bool {
    let runs: std::collections::HashSet<&[u8]> = secret.as_bytes().windows(8).collect();
    text.as_bytes().windows(8).any(|part| runs.contains(part))
}

/// Gives the texts to a running cluster by all doors. Returns what they answer.
fn give_to_all_doors(cluster: &Cluster, texts: &[String], path: &Path) -> String {
    let (primary, api, file) = (cluster.primary(), Api::new(cluster), cluster.file());
    let mut said = String::new();
    for text in texts {
        let give = Call::post("settings/custom-certs").with(json!({ "certificate": text }));
        let given = control::ask::<Custom>(&file.nodes[primary].control, &give, LIMIT);
        said += &format!("{}\n", given.unwrap_err());
        let hook = |secret: &str, ca: &str| json!({"webhooks": [{"name": "w", "url": "https://127.0.0.1:1/x", "secret": secret, "ca": ca}]});
        let short = text.chars().take(128).collect::<String>();
        for (path, body) in [
            ("settings/custom-certs", json!({ "certificate": text })),
            ("settings/custom-certs", json!(text)),
            ("settings/custom-certs", json!({ "certificate": [text] })),
            ("settings/notifications", hook(text, text)),
            ("settings/notifications", hook(&short, &short)),
            (
                "settings/notifications",
                json!({"webhooks": [{"name": "w", "url": "https://127.0.0.1:1/x", "secret": short}]}),
            ),
            ("settings/notifications", json!({ "webhooks": text })),
        ] {
            let (status, answer) = api.post(primary, path, &body);
            assert!(status != 404, "{path}");
            said += &answer;
        }
        fs::write(path, text).unwrap();
        for arguments in [&["certs", "upload"][..], &["certs", "upload", "--key"]] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
            command.args(arguments).arg(path).args((arguments.len() > 2).then_some(path));
            command.arg("--address").arg(&file.nodes[primary].console_url).env("TWISTLOCK_CACERT", &file.ca);
            let login = command.env("TWISTLOCK_USER", &file.user).env("TWISTLOCK_PASSWORD", &file.password);
            let output = login.output().unwrap();
            assert!(!output.status.success());
            said += &format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        }
    }
    said
}

#[test]
fn no_key_comes_out_again() {
    let _beside = beside();
    let cluster = Cluster::start();
    let (texts, secret) = broken_keys();
    let (file, pen, folder) = (cluster.file(), Pen::new(&cluster.file()), tempfile::tempdir().unwrap());
    assert!(leaks(&texts[0], &secret), "a leak is seen");
    let mut said = give_to_all_doors(&cluster, &texts, &folder.path().join("key.pem"));
    // As files of a host that starts.
    let node = (cluster.primary() + 1) % 3;
    for (number, text) in texts.iter().enumerate().step_by(3) {
        cluster.signal(node, Signal::SIGKILL);
        cluster.wait_for("the end of the process", |_| cluster.node(node).pid.is_none());
        let name = ["node-key.pem", "console-key.pem", "cluster.key"][number / 3];
        fs::write(file.nodes[node].data.join("certificates").join(name), text).unwrap();
        cluster.wait_healthy();
    }
    let custom = file.nodes[node].data.join("custom-certificates");
    fs::create_dir(&custom).unwrap();
    for name in ["console-cert.pem", "console-key.pem"] {
        fs::write(custom.join(name), &texts[0]).unwrap();
    }
    cluster.wait_for("what it says of the folder", |statuses| {
        statuses[node]
            .as_ref()
            .is_some_and(|status| status.warnings.iter().any(|text| text.contains("custom-certificates")))
    });
    for status in cluster.statuses().iter().flatten() {
        said += &serde_json::to_string(status).unwrap();
    }
    for path in
        ["audits/mgmt?limit=400", "high-availability/events?limit=400", "settings/notifications", "settings/certs"]
    {
        said += &pen.call(cluster.primary(), "GET", &format!("/{path}"), None).1;
    }
    (0..3).for_each(|node| said += &cluster.log(node));
    said += &fs::read_to_string(file.nodes[node].data.join("events.jsonl")).unwrap();
    let found: Vec<&str> = said.lines().filter(|line| leaks(line, &secret)).collect();
    assert!(found.is_empty(), "{found:#?}");
}
