//! Backups of real daemons copied to a real S3: `rclone serve s3`, which checks each request's signature and keeps the objects as
//! files, so that the test sees what lies there.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use twistlock_ha::{
    backup::{BackupState, CopyState, Kind, RemoteBackup, Started},
    control::Call,
};

use super::{
    backup::{ask, folder, make, restore, wait_ended},
    beside,
    cluster::{Cluster, LIMIT},
    writers::Pen,
};

/// Where scripts/check.sh puts it.
const PROGRAM: &str = "target/rclone/rclone";
/// The only key that it knows.
const KEY: &str = "AKIATEST,a-secret-of-the-store";

/// A running store.
struct Server {
    process: Option<Child>,
    folder: PathBuf,
    port: u16,
}

impl Server {
    fn start(folder: &Path) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut server = Self { process: None, folder: folder.to_owned(), port };
        server.run();
        server
    }

    fn run(&mut self) {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join(PROGRAM);
        let process = Command::new(program)
            .args([
                "serve",
                "s3",
                "--config",
                "/dev/null",
                "--vfs-cache-mode",
                "off",
                "--dir-cache-time",
                // With none at all it forgets directories all the time, and answers after minutes.
                "200ms",
                "--addr",
            ])
            .arg(format!("127.0.0.1:{}", self.port))
            .args(["--auth-key", KEY])
            .arg(&self.folder)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.process = Some(process);
        self.wait_open();
    }

    fn wait_open(&self) {
        let deadline = Instant::now() + LIMIT;
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(Instant::now() < deadline, "the store does not open its port");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn copies(cluster: &Cluster, node: usize) -> Vec<RemoteBackup> {
    ask(cluster, node, Call::get("settings/backup/copies?limit=1000")).unwrap_or_default()
}

fn state(cluster: &Cluster, node: usize) -> CopyState {
    let state: Result<BackupState, String> = ask(cluster, node, Call::get("settings/backup"));
    state.ok().and_then(|state| state.copies).unwrap_or_default()
}

fn warned(cluster: &Cluster, node: usize) -> bool {
    let status = cluster.statuses()[node].clone();
    status.is_some_and(|status| status.warnings.iter().any(|warning| warning.contains("but not copied")))
}

fn set_up(cluster: &Cluster, server: &Server, secret: &str) {
    let credentials = cluster.config_path(0).with_file_name("credentials");
    let endpoint = format!("http://127.0.0.1:{}", server.port);
    let text = format!(
        "[default]\naws_access_key_id = AKIATEST\naws_secret_access_key = {secret}\nAWS_ENDPOINT={endpoint}\nAWS_ALLOW_HTTP=true\n"
    );
    fs::write(&credentials, text).unwrap();
    cluster.configure("DATA_RECOVERY_ENABLED", "true");
    cluster.configure("BACKUP_DELAY_SECONDS", "1");
    cluster.configure("BACKUP_KEEP_DAILY", "2");
    cluster.configure("BACKUP_URL", "s3://bucket/ha/console");
    cluster.configure("BACKUP_CREDENTIALS_FILE", credentials.to_str().unwrap());
}

/// What lies in the store below `BACKUP_URL`.
fn below(server: &Server) -> PathBuf {
    server.folder.join("bucket/ha/console")
}

fn of_member(cluster: &Cluster, node: usize, list: &[RemoteBackup]) -> Vec<RemoteBackup> {
    list.iter().filter(|copy| copy.node == cluster.node(node).name).cloned().collect()
}

#[test]
fn backups_are_copied_to_an_s3_and_come_back() {
    if !Path::new(env!("CARGO_MANIFEST_DIR")).join(PROGRAM).exists() {
        // As in the browser tests: CI installs what is needed, so there it is a mistake.
        assert!(!std::env::var("CI").is_ok_and(|ci| ci == "true"), "{PROGRAM} is missing");
        println!("skipped: {PROGRAM} is missing; scripts/check.sh installs it with pip where it can");
        return;
    }
    let _beside = beside();
    let store = tempfile::tempdir().unwrap();
    fs::create_dir(store.path().join("bucket")).unwrap();
    let mut server = Server::start(store.path());
    let cluster = Cluster::start();
    // With a wrong secret the store refuses, the backups are good, and the administrator knows.
    set_up(&cluster, &server, "another-secret");
    cluster.restart_all();
    cluster.wait_for("warnings", |_| (0..3).all(|node| warned(&cluster, node)));
    let problem = state(&cluster, 0).problem.unwrap_or_default();
    assert!(problem.contains("BACKUP_URL") && !problem.contains("another-secret"), "{problem}");
    println!("  refused: {problem}");
    set_up(&cluster, &server, "a-secret-of-the-store");

    let (primary, pen) = (cluster.primary(), Pen::new(&cluster.file()));
    assert!(pen.write(primary, "kept"));
    let before = pen.tags();
    // It makes all that its host has go at once.
    let files: Vec<PathBuf> = (0..3).map(|node| make(&cluster, node, "mine")).collect();
    let listed = wait_all_copied(&cluster, &server);
    let first = below(&server).join(&of_member(&cluster, primary, &listed)[0].place);
    the_store_is_away(&cluster, &mut server, first.parent().unwrap());

    let other = (primary + 1) % 3;
    let name = files[other].file_name().unwrap().to_str().unwrap();
    let copy = of_member(&cluster, other, &listed).into_iter().find(|copy| copy.backup.id == name).unwrap();
    let fetched = a_copy_comes_back(&cluster, primary, &copy.place);
    assert!(fs::read(&fetched).unwrap() == fs::read(&files[other]).unwrap());
    let outcome = restore(&cluster, &fetched);
    assert!(outcome.ok, "{}", outcome.text);
    let pen = Pen::new(&cluster.file());
    assert!(pen.tags() == before);

    // The same in one command, on the host.
    assert!(pen.write(primary, "once-more"));
    assert!(twistcli(&cluster, &["backup", "list", "--remote"]).contains(&copy.place));
    let done = twistcli(&cluster, &["restore", "--remote", &copy.place, "--stop-console", "--yes"]);
    assert!(done.contains("already") && done.contains("all members have the database"), "{done}");
    assert!(Pen::new(&cluster.file()).tags() == before);
    println!("  {}", cluster.finish(&["could not be copied", "the copy could not be fetched"]));
}

/// What `twistcli` says on the PRIMARY's host, where it succeeds.
fn twistcli(cluster: &Cluster, args: &[&str]) -> String {
    let data = cluster.node(cluster.primary()).data;
    let output = Command::new(env!("CARGO_BIN_EXE_twistcli")).args(args).arg("--data").arg(data).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{args:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

/// Three automatic ones and a manual one of each member are there, and are the same.
fn wait_all_copied(cluster: &Cluster, server: &Server) -> Vec<RemoteBackup> {
    let primary = cluster.primary();
    cluster.wait_for("all copies", |_| copies(cluster, primary).len() == 12);
    cluster.wait_for("the end of the warnings", |_| (0..3).all(|node| !warned(cluster, node)));
    let listed = copies(cluster, primary);
    for kind in Kind::AUTOMATIC {
        assert_eq!(listed.iter().filter(|copy| copy.backup.kind == kind).count(), 3, "{kind:?}");
    }
    for node in 0..3 {
        let of_node = of_member(cluster, node, &listed);
        assert_eq!(of_node.len(), 4, "{listed:?}");
        for copy in of_node {
            let local = fs::read(folder(cluster, node).join(&copy.backup.id)).unwrap();
            assert!(fs::read(below(server).join(&copy.place)).unwrap() == local, "{}", copy.place);
        }
    }
    listed
}

/// The store does not answer for a while, and nobody minds. Afterwards everything is there, and what is old is gone.
fn the_store_is_away(cluster: &Cluster, server: &mut Server, home: &Path) {
    let primary = cluster.primary();
    for time in 1..=4 {
        fs::write(home.join(format!("daily-0.1.0-{time}.tar.gz")), "old").unwrap();
    }
    fs::write(home.join("notes.txt"), "mine").unwrap();
    server.stop();
    let large: Vec<u8> = (0..20u32 << 18).flat_map(|at| at.wrapping_mul(2_654_435_761).to_be_bytes()).collect();
    fs::write(folder(cluster, primary).join("large-0.1.0-7.tar.gz"), &large).unwrap();
    make(cluster, primary, "meanwhile");
    cluster.wait_for("a warning", |_| warned(cluster, primary));
    assert!(Pen::new(&cluster.file()).write(primary, "after"), "the Console goes on");
    server.run();
    make(cluster, primary, "again");
    cluster.wait_for("the end of the warning", |_| !warned(cluster, primary));
    let has = |name: &str| home.join(name).exists();
    assert!(fs::read(home.join("large-0.1.0-7.tar.gz")).unwrap() == large, "sent in parts");
    let old: Vec<bool> = (1..=4).map(|time| has(&format!("daily-0.1.0-{time}.tar.gz"))).collect();
    assert_eq!(old, [false, false, false, true], "the two newest daily ones are kept");
    assert!(has("notes.txt") && state(cluster, primary).missing == 0);
}

/// The folder of a host is lost; a copy of another member comes into it.
fn a_copy_comes_back(cluster: &Cluster, node: usize, place: &str) -> PathBuf {
    for file in fs::read_dir(folder(cluster, node)).unwrap() {
        let path = file.unwrap().path();
        if path.is_file() {
            fs::remove_file(path).unwrap();
        }
    }
    let fetch = |place: String| {
        let started: Started = ask(cluster, node, Call::post("settings/backup/copies/fetch").with(place)).unwrap();
        wait_ended(cluster, node, &started)
    };
    let outcome = fetch(place.replace("mine", "none"));
    assert!(!outcome.ok && outcome.text.contains("there is no copy"), "{}", outcome.text);
    let outcome = fetch(place.to_owned());
    assert!(outcome.ok && outcome.id.starts_with("fetched-"), "{outcome:?}");
    // A second time it is found in the folder.
    let again = fetch(place.to_owned());
    assert!(again.ok && again.text.contains("already"), "{again:?}");
    folder(cluster, node).join(&outcome.id)
}
