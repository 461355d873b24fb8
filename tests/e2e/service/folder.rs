//! An application with SQLite that knows nothing of us, on three nodes: what it was told is stored is there afterwards,
//! whatever happens to its process and to the daemon. Must never judge by speed: the figures are reported.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Deserialize;
use twistlock_ha::{
    admin::SwitchoverReport,
    control::{self, Call},
    service::FolderReport,
};

use super::{
    super::{
        amnesia::{AGAIN, EXPECTED},
        audit::here,
        beside,
        cluster::{Cluster, LEASE_LOST, LIMIT},
    },
    FOLDER_LOST, free_port, wait_until_gone,
};

pub const MODES: [&str; 2] = ["wal", "delete"];

/// What the application says of itself.
#[derive(Clone, Debug)]
pub struct Said {
    pub node: usize,
    epoch: u64,
    pid: i32,
    /// What it took to begin, in milliseconds.
    began_ms: u64,
}

/// What a database of it has.
#[derive(Debug, Deserialize)]
struct Content {
    rows: BTreeSet<u64>,
    found: Vec<String>,
}

/// The status code of an answer, and its text.
pub fn ask(node: usize, port: u16, request: &str) -> io::Result<(u16, String)> {
    let address = SocketAddr::from(([127, 0, 0, node as u8 + 1], port));
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(format!("{request} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let odd = || io::Error::other(format!("an odd answer: {text:?}"));
    let code = text.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(odd)?;
    let (_, body) = text.split_once("\r\n\r\n").ok_or_else(odd)?;
    Ok((code, body.to_owned()))
}

fn says(node: usize, port: u16) -> Option<Said> {
    let (_, text) = ask(node, port, "GET /").ok()?;
    let words: Vec<_> = text.split(' ').collect();
    let [_, epoch, pid, began_ms] = words[..] else { return None };
    Some(Said { node, epoch: epoch.parse().ok()?, pid: pid.parse().ok()?, began_ms: began_ms.parse().ok()? })
}

/// Waits until the application answers as wanted on some node.
pub fn wait_for_answer(port: u16, is: impl Fn(&Said) -> bool) -> Said {
    let begin = Instant::now();
    loop {
        if let Some(said) = (0..3).find_map(|node| says(node, port).filter(&is)) {
            return said;
        }
        assert!(begin.elapsed() < LIMIT, "the application does not answer");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A client of one database, which writes one row after the other.
struct Writer {
    mode: &'static str,
    /// It was told that they are stored.
    stored: BTreeSet<u64>,
    /// It does not know.
    open: BTreeSet<u64>,
}

impl Writer {
    fn write(mode: &'static str, port: u16, stored: &AtomicU64, end: &AtomicBool) -> Self {
        let (mut writer, mut node) = (Self { mode, stored: BTreeSet::new(), open: BTreeSet::new() }, 0);
        for number in 1.. {
            if end.load(Ordering::SeqCst) {
                break;
            }
            match ask(node, port, &format!("POST /{mode}/{number}")) {
                Ok((200, _)) => {
                    writer.stored.insert(number);
                    stored.fetch_add(1, Ordering::SeqCst);
                }
                // Nobody has taken it.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => node = (node + 1) % 3,
                _ => {
                    writer.open.insert(number);
                }
            }
        }
        writer
    }

    /// All that is stored is there, and nothing that nobody has asked for.
    fn compare(&self, node: usize, port: u16) {
        let (code, text) = ask(node, port, &format!("GET /{}", self.mode)).unwrap();
        assert_eq!(code, 200, "{text}");
        let content: Content = serde_json::from_str(&text).unwrap();
        assert_eq!(content.found, ["ok"], "{}", self.mode);
        let lost: Vec<_> = self.stored.difference(&content.rows).collect();
        assert!(lost.is_empty(), "{}: stored, and lost: {lost:?}", self.mode);
        let odd: Vec<_> =
            content.rows.iter().filter(|row| !self.stored.contains(row) && !self.open.contains(row)).collect();
        assert!(odd.is_empty(), "{}: nobody was told of them, or they were refused: {odd:?}", self.mode);
        println!(
            "  {}: {} rows were acknowledged and are there, {} are open",
            self.mode,
            self.stored.len(),
            self.open.len()
        );
    }
}

/// What members have of a database.
pub fn files(cluster: &Cluster, mode: &str) -> Vec<PathBuf> {
    (0..3).map(|node| cluster.node(node).data.join(format!("service/files/{mode}.db"))).collect()
}

/// Where the application finds its folder.
fn mount_of(cluster: &Cluster, node: usize) -> PathBuf {
    cluster.config_path(node).with_file_name("service")
}

/// Waits until each client was told of some more rows.
fn wait_for_more(counts: &[AtomicU64; 2]) {
    let before = counts.each_ref().map(|count| count.load(Ordering::SeqCst));
    let begin = Instant::now();
    while counts.iter().zip(before).any(|(count, before)| count.load(Ordering::SeqCst) < before + 10) {
        assert!(begin.elapsed() < LIMIT, "nobody writes");
        thread::sleep(Duration::from_millis(5));
    }
}

fn harm(cluster: &Cluster, port: u16, counts: &[AtomicU64; 2]) -> usize {
    let first = wait_for_answer(port, |_| true);
    wait_for_more(counts);

    // The application dies alone.
    let begin = Instant::now();
    kill(Pid::from_raw(first.pid), Signal::SIGKILL).unwrap();
    let again = wait_for_answer(port, |said| said.pid != first.pid);
    println!(
        "  kill -9 of the application: it answers again after {:?}, {} ms its own start",
        begin.elapsed(),
        again.began_ms
    );
    assert_eq!((again.node, again.epoch), (first.node, first.epoch));
    wait_for_more(counts);

    // The daemon dies: what is mounted there answers nobody, and the application is gone with it.
    let begin = Instant::now();
    cluster.signal(again.node, Signal::SIGKILL);
    let next = wait_for_answer(port, |said| said.epoch > again.epoch);
    println!(
        "  kill -9 of the daemon: it answers at another node after {:?}, {} ms its own start",
        begin.elapsed(),
        next.began_ms
    );
    assert_ne!(next.node, again.node);
    wait_until_gone(again.pid);
    wait_for_more(counts);
    cluster.wait_healthy();

    // In order, while clients write.
    let begin = Instant::now();
    let call = Call::post("high-availability/switchover").with(serde_json::json!({}));
    let _: SwitchoverReport = control::ask(&cluster.node(next.node).control, &call, LIMIT).unwrap();
    let last = wait_for_answer(port, |said| said.epoch > next.epoch);
    println!(
        "  a switchover: it answers at another node after {:?}, {} ms its own start",
        begin.elapsed(),
        last.began_ms
    );
    wait_for_more(counts);

    // A member loses its raft log and the databases: it fetches all of them, while clients write.
    let begin = Instant::now();
    forget(cluster, (last.node + 1) % 3);
    println!("  a member that lost everything has all databases again after {:?}", begin.elapsed());
    wait_for_more(counts);
    last.node
}

fn forget(cluster: &Cluster, node: usize) {
    let (pid, data) = (cluster.node(node).pid.unwrap(), cluster.node(node).data);
    cluster.without_restarts(|| {
        cluster.signal(node, Signal::SIGKILL);
        wait_until_gone(pid as i32);
        fs::remove_dir_all(data.join("raft-log")).unwrap();
        fs::remove_dir_all(data.join("service")).unwrap();
    });
    cluster.wait_for("the member begins again", |_| cluster.log(node).contains(AGAIN));
    cluster.wait_healthy();
}

#[test]
fn an_application_with_sqlite_loses_nothing() {
    let _beside = beside();
    let program = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/service/app.py");
    let inside = free_port();
    let cluster = Cluster::start_service(&format!("python3 {} {inside}", program.display()), inside);
    let port = cluster.service_port();
    let (end, counts) = (AtomicBool::new(false), MODES.map(|_| AtomicU64::new(0)));
    let (writers, node) = thread::scope(|scope| {
        let writers: Vec<_> = MODES
            .iter()
            .zip(&counts)
            .map(|(mode, stored)| scope.spawn(|| Writer::write(mode, port, stored, &end)))
            .collect();
        let node = harm(&cluster, port, &counts);
        end.store(true, Ordering::SeqCst);
        (writers.into_iter().map(|writer| writer.join().unwrap()).collect::<Vec<_>>(), node)
    });
    // What cannot be replicated is refused, and leaves nothing.
    let (code, text) = ask(node, port, "POST /delete-memory/999999").unwrap();
    assert_eq!(code, 500, "{text}");
    for writer in &writers {
        writer.compare(node, port);
    }
    let (_, text) = here(&cluster, node, &["service", "databases", "--json"]);
    let report: FolderReport = serde_json::from_str(&text).unwrap();
    let seen = |name: &str, mode: &str| {
        let found = report.databases.iter().find(|database| database.path.to_str() == Some(name));
        found.is_some_and(|found| found.id.is_some() && found.commits > 0 && found.mode.as_deref() == Some(mode))
    };
    assert!(seen("wal.db", "wal") && seen("delete.db", "rollback"), "{text}");
    assert!(report.last_refusal.is_some_and(|why| why.starts_with("delete.db: a change outside")), "{text}");
    // Who starts it by hand elsewhere founds no second database.
    for other in (0..3).filter(|other| *other != node) {
        let error = File::create(mount_of(&cluster, other).join("wal.db")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    }
    fs::write(mount_of(&cluster, node).join("key.pem"), "a key").unwrap();
    cluster.wait_for("a warning about the file", |statuses| {
        let warnings = statuses[node].iter().flat_map(|status| &status.warnings);
        warnings.into_iter().any(|warning| warning.contains("1 file of the service's folder is no SQLite database"))
    });
    for mode in MODES {
        cluster.wait_for("the same file everywhere", |_| {
            let images: Vec<_> = files(&cluster, mode).into_iter().map(|path| fs::read(path).unwrap()).collect();
            images.iter().all(|image| *image == images[0])
        });
    }
    let mounts: Vec<_> = (0..3).map(|node| mount_of(&cluster, node)).collect();
    let expected = [
        LEASE_LOST,
        FOLDER_LOST,
        EXPECTED,
        &["the service has ended (", "outside of a transaction", "is no SQLite database"],
    ];
    println!("{}", cluster.finish(&expected.concat()));
    let left = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.iter().any(|mount| left.contains(mount.to_str().unwrap())), "{left}");
}
