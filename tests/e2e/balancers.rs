//! Real HAProxy and nginx with the shipped configuration files in front of three real nodes, and a client without a balancer: what a
//! takeover costs them. Must never judge by speed: the figures are reported.

use std::{
    fs::{self, File},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use twistlock_ha::{
    admin::SwitchoverReport,
    control::{self, Call},
    dev::{ClusterFile, NodeFile},
};

use super::{
    alone,
    cluster::{Cluster, FROZEN, LEASE_LOST, LIMIT},
    network::{self, CLIENTS as HERE, Wall},
    writers::{self, Writers},
};

/// 50 writes a second.
const CLIENTS: usize = 10;
const PACE: Duration = Duration::from_millis(200);
/// How long each fault is watched after the next primary has answered.
const WATCH: Duration = Duration::from_secs(2);
/// The balancer's ports before the offset.
const CONSOLE: u16 = 8088;
const DEFENDERS: u16 = 8089;

/// A balancer in front of a cluster.
struct Balancer {
    child: Child,
    folder: TempDir,
}

impl Balancer {
    /// Starts `program` with a shipped file, in which addresses, ports and paths are those of this test.
    fn start(program: &str, file: &str, arguments: &[&str], cluster: &Cluster) -> Self {
        let folder = tempfile::Builder::new().prefix("tw-balancer").tempdir().unwrap();
        let path = folder.path().join(file);
        fs::write(&path, adapted(file, cluster, folder.path())).unwrap();
        let log = File::create(folder.path().join("log")).unwrap();
        let spawned = Command::new(program)
            .args(arguments)
            .arg(&path)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        let child = spawned.unwrap_or_else(|error| {
            panic!("cannot run {program}: {error}. Install haproxy, nginx, libnginx-mod-stream (scripts/check.sh does)")
        });
        let balancer = Self { child, folder };
        balancer.wait_open(CONSOLE + cluster.port_offset);
        balancer
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    fn wait_open(&self, port: u16) {
        let deadline = Instant::now() + LIMIT;
        while TcpStream::connect((HERE, port)).is_err() {
            assert!(Instant::now() < deadline, "the balancer does not listen:\n{}", self.log());
            poll_pause();
        }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        }
        let _ = self.child.wait();
        if thread::panicking() {
            println!("--- the balancer\n{}", self.log());
        }
    }
}

/// A shipped file with this test's addresses, ports and paths.
fn adapted(file: &str, cluster: &Cluster, folder: &Path) -> String {
    let shipped = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("packaging/lb").join(file);
    let mut text = fs::read_to_string(shipped).unwrap();
    let offset = cluster.port_offset;
    let mut replace = |old: &str, new: String| {
        assert!(text.contains(old), "{file} has no \"{old}\"");
        text = text.replace(old, &new);
    };
    for (port, ours) in [(8083, CONSOLE), (8084, DEFENDERS)] {
        match file {
            "haproxy.cfg" => replace(&format!("bind :{port}"), format!("bind {HERE}:{}", ours + offset)),
            _ => replace(&format!("listen {port}"), format!("listen {HERE}:{}", ours + offset)),
        }
    }
    for node in 1..=3 {
        for port in [8083, 8084] {
            replace(&format!("192.0.2.1{node}:{port}"), format!("127.0.0.{node}:{}", port + offset));
        }
    }
    if file == "haproxy.cfg" {
        replace("port 8083", format!("port {}", 8083 + offset));
        replace("/etc/haproxy/twistlock-ca.pem", cluster.file().ca.display().to_string());
    } else {
        replace("/run/nginx.pid", folder.join("pid").display().to_string());
        replace("/var/log/nginx/error.log", folder.join("log").display().to_string());
    }
    text
}

fn poll_pause() {
    thread::sleep(Duration::from_millis(5));
}

fn pace_watch() {
    thread::sleep(WATCH);
}

/// Asks all nodes but one directly, until one answers: that is when the takeover was over for a client without a balancer.
fn start_probe(cluster: &ClusterFile, but: usize) -> JoinHandle<Option<Instant>> {
    let cluster = cluster.clone();
    thread::spawn(move || {
        let client = writers::client(&cluster.ca, Duration::from_millis(300));
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            for (_, node) in cluster.nodes.iter().enumerate().filter(|(index, _)| *index != but) {
                if client.get(format!("{}/api/v1/_ping", node.console_url)).call().is_ok() {
                    return Some(Instant::now());
                }
            }
            poll_pause();
        }
        None
    })
}

/// Harms the primary, and returns what ends the harm.
fn harm(cluster: &Cluster, primary: usize, fault: &str) -> impl FnOnce(&Cluster) + use<> {
    let end: fn(&Cluster, usize) = match fault {
        "kill -9" => {
            cluster.signal(primary, Signal::SIGKILL);
            |_, _| ()
        }
        "SIGSTOP" => {
            cluster.freeze(primary);
            |cluster, primary| cluster.signal(primary, Signal::SIGCONT)
        }
        "host cut off" => {
            network::isolate(primary, Wall::Host, cluster.port_offset);
            |_, _| network::heal()
        }
        _ => {
            let operation = Call::post("high-availability/switchover").with(serde_json::json!({}));
            let _: SwitchoverReport = control::ask(&cluster.node(primary).control, &operation, LIMIT).unwrap();
            |_, _| ()
        }
    };
    move |cluster| end(cluster, primary)
}

/// Lets clients write to one name while the primary is killed, frozen, cut off and switched over, and reports what each cost.
fn measure(name: &str, cluster: &Cluster, port: u16) {
    let mut seen = cluster.file();
    // The name in the certificates of a dev cluster.
    let console_url = format!("https://localhost:{port}");
    seen.nodes = vec![NodeFile { console_url, ..seen.nodes[0].clone() }];
    let writers = Writers::start_paced(&seen, CLIENTS, PACE);
    for fault in ["kill -9", "SIGSTOP", "host cut off", "switchover"] {
        let primary = cluster.primary();
        let probe = start_probe(&cluster.file(), primary);
        let (failed, before) = (writers.not_acknowledged(), Instant::now());
        let end = harm(cluster, primary, fault);
        let over = probe.join().unwrap().expect("a next primary") - before;
        writers.wait_success(before + over, |_| true).unwrap_or_else(|| panic!("{name}, {fault}: no write"));
        pace_watch();
        let (silence, failed) = (writers.longest_silence(before), writers.not_acknowledged() - failed);
        println!(
            "  {name}, {fault}: takeover {} ms, longest time without an acknowledged write {} ms (added: {} ms), {failed} \
             writes failed",
            over.as_millis(),
            silence.as_millis(),
            silence.saturating_sub(over).as_millis()
        );
        end(cluster);
        cluster.wait_healthy();
    }
    println!("  {name}: {}", writers.verify());
}

/// Runs the test in a network of its own, in which names mean these addresses.
fn in_private_names(addresses: &'static [&str], test: impl FnOnce() + Send + 'static) {
    network::in_private_network(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        let folder = tempfile::tempdir().unwrap();
        let hosts = folder.path().join("hosts");
        // curl has an address of its own for localhost, and is given another name.
        let lines: String = addresses.iter().map(|address| format!("{address} localhost twistlock.test\n")).collect();
        fs::write(&hosts, lines).unwrap();
        let mounts: [&[&str]; 2] = [&["--make-rprivate", "/"], &["--bind", hosts.to_str().unwrap(), "/etc/hosts"]];
        for arguments in mounts {
            assert!(Command::new("mount").args(arguments).status().unwrap().success());
        }
        test();
    });
}

fn balanced(program: &'static str, file: &'static str, arguments: &'static [&str]) {
    let _alone = alone();
    in_private_names(&[HERE], move || {
        let cluster = Cluster::start();
        let balancer = Balancer::start(program, file, arguments, &cluster);
        measure(program, &cluster, CONSOLE + cluster.port_offset);
        drop(balancer);
        println!("  {}", cluster.finish(&[LEASE_LOST, FROZEN].concat()));
    });
}

#[test]
fn timed_haproxy_finds_the_next_primary() {
    balanced("haproxy", "haproxy.cfg", &["-db", "-f"]);
}

#[test]
fn timed_nginx_finds_the_next_primary() {
    balanced("nginx", "nginx.conf", &["-g", "daemon off;", "-c"]);
}

/// One name with three addresses, as round-robin DNS has it: a client that tries them all needs no balancer.
#[test]
fn timed_a_client_that_tries_all_addresses_of_a_name_finds_the_next_primary() {
    let _alone = alone();
    in_private_names(&["127.0.0.1", "127.0.0.2", "127.0.0.3"], || {
        let cluster = Cluster::start();
        measure("round-robin DNS", &cluster, 8083 + cluster.port_offset);
        let url = format!("https://twistlock.test:{}/api/v1/_ping", 8083 + cluster.port_offset);
        let ping = Command::new("curl").args(["-fsSk", &url]).output().expect("curl (scripts/check.sh installs it)");
        assert!(ping.status.success(), "curl: {}", String::from_utf8_lossy(&ping.stderr));
        println!("  {}", cluster.finish(&[LEASE_LOST, FROZEN].concat()));
    });
}
