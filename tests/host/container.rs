//! A node as a container runs it: what the Containerfile puts together, in a root of its own that cannot be written, as
//! a user without rights, with volumes as Kubernetes mounts them, and with the settings that
//! `twistcli console export kubernetes` writes. The base image is played by the libraries of this host; nothing else is
//! in the root, not even a shell.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use serde_json::Value;

use super::wait_until;

const CONTAINERFILE: &str = include_str!("../../packaging/container/Containerfile");
/// What a container runtime does for a pod: the root is read-only, the volumes belong to root and to the pod's group.
const RUNTIME: &str = r#"
set -e
mount --make-rprivate /
ip link set lo up
mount --bind "$ROOT" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount --bind /dev/urandom "$ROOT/dev/urandom"
mount --bind /dev/null "$ROOT/dev/null"
for volume in twistlock twistlock-backup; do
    mount -t tmpfs -o "mode=2775,uid=0,gid=${USER_AND_GROUP#*:}" volume "$ROOT/var/lib/$volume"
done
mount -o remount,bind,ro "$ROOT"
cd "$ROOT"
exec setpriv --no-new-privs chroot --userspec="$USER_AND_GROUP" --groups= "$ROOT" "$@"
"#;

/// The root of an image, and how it is started.
struct Image {
    root: tempfile::TempDir,
    environment: Vec<(String, String)>,
    user: String,
    entrypoint: Vec<String>,
    command: Vec<String>,
}

impl Image {
    /// Does what the Containerfile says. Nothing of it needs a program of the base image.
    fn build(context: &Path) -> Self {
        let root = tempfile::Builder::new().prefix("twc").tempdir().unwrap();
        let mut image =
            Self { root, environment: Vec::new(), user: String::new(), entrypoint: Vec::new(), command: Vec::new() };
        let list = |text: &str| serde_json::from_str::<Vec<String>>(text).unwrap();
        for line in CONTAINERFILE.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (step, rest) = line.split_once(' ').unwrap();
            match step {
                "FROM" => image.base(context),
                "COPY" => image.copy(context, &rest.split(' ').collect::<Vec<_>>()),
                "ENV" => image.environment.extend(rest.split_once('=').map(|(name, to)| (name.into(), to.into()))),
                "USER" => image.user = rest.to_owned(),
                "ENTRYPOINT" => image.entrypoint = list(rest),
                "CMD" => image.command = list(rest),
                "EXPOSE" => {}
                other => panic!("this test does not know {other}"),
            }
        }
        image
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.path().join(path.trim_start_matches('/'))
    }

    /// What programs need to begin at all: the C library, and places for what a container runtime mounts.
    fn base(&self, context: &Path) {
        for folder in ["proc", "dev", "etc/twistlock", "var/lib/twistlock", "var/lib/twistlock-backup"] {
            fs::create_dir_all(self.at(folder)).unwrap();
        }
        for file in ["dev/urandom", "dev/null"] {
            fs::write(self.at(file), "").unwrap();
        }
        let output = Command::new("ldd").arg(context.join("twistlockd")).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        for library in text.split_whitespace().filter(|word| word.starts_with('/')) {
            fs::create_dir_all(self.at(library).parent().unwrap()).unwrap();
            fs::copy(library, self.at(library)).unwrap();
        }
    }

    fn copy(&self, context: &Path, words: &[&str]) {
        let (to, files) = words.split_last().unwrap();
        fs::create_dir_all(self.at(to)).unwrap();
        for file in files {
            fs::copy(context.join(file), self.at(to).join(file)).unwrap();
        }
    }

    /// Starts it as the first process of a container.
    fn run(&self) -> Container {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child", "bash", "-c", RUNTIME]);
        command.arg("bash").args(&self.entrypoint).args(&self.command);
        command.envs(self.environment.iter().filter(|(name, _)| name != "PATH").cloned());
        command.env("ROOT", self.root.path()).env("USER_AND_GROUP", &self.user);
        command.env("TWISTLOCK_POD_ADDRESS", "twistlock-console-0.twistlock-members");
        let log = self.root.path().with_extension("log");
        command.stdin(Stdio::null()).stdout(File::create(&log).unwrap());
        command.stderr(File::options().append(true).open(&log).unwrap());
        Container { outer: command.spawn().unwrap(), log }
    }
}

struct Container {
    outer: Child,
    log: PathBuf,
}

impl Container {
    /// The first process inside, as this host sees it, once it is the daemon.
    fn daemon(&self) -> Option<i32> {
        let outer = self.outer.id();
        let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).ok()?;
        let pid = children.split_whitespace().next()?.parse().ok()?;
        fs::read_link(format!("/proc/{pid}/exe")).ok()?.ends_with("twistlockd").then_some(pid)
    }

    /// The code of a probe of the kubelet.
    fn probe(&self, path: &str) -> Option<u16> {
        let network = File::open(format!("/proc/{}/ns/net", self.daemon()?)).ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: pod\r\nAccept: */*\r\nConnection: close\r\n\r\n");
        // On a thread of its own, which alone goes over to the network of the container.
        let probe = move || {
            setns(network, CloneFlags::CLONE_NEWNET).unwrap();
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, 8085)).ok()?;
            stream.write_all(request.as_bytes()).ok()?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).ok()?;
            answer.split(' ').nth(1)?.parse().ok()
        };
        thread::spawn(probe).join().unwrap()
    }

    /// Runs a program inside, as `kubectl exec` does.
    fn exec(&self, words: &[&str]) -> String {
        let pid = self.daemon().unwrap().to_string();
        let mut command = Command::new("nsenter");
        command.args(["--target", &pid, "--mount", "--pid", "--net", "--root", "--wd=/"]);
        command.args(["--setgid", "2674", "--setuid", "2674"]).args(words);
        let output = command.env("TWISTLOCK_DATA", "/var/lib/twistlock/data").output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        String::from_utf8(said).unwrap()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.outer.kill();
        let _ = self.outer.wait();
        let _ = fs::remove_file(&self.log);
    }
}

#[test]
fn a_container_without_rights_serves() {
    let unshared = || Command::new("unshare").args(["--mount", "--pid", "--net", "--fork", "true"]).status();
    if !geteuid().is_root() || !unshared().is_ok_and(|status| status.success()) {
        println!("skipped: this user cannot make namespaces");
        return;
    }
    let context = Path::new(env!("CARGO_BIN_EXE_twistlockd")).parent().unwrap();
    let image = Image::build(context);
    let export =
        Command::new(env!("CARGO_BIN_EXE_twistcli")).args(["console", "export", "kubernetes"]).output().unwrap();
    let manifests = String::from_utf8(export.stdout).unwrap();
    let (_, config) = manifests.split_once("  twistlock.cfg: |\n").unwrap();
    let config = config.lines().map_while(|line| line.strip_prefix("    ")).map(|line| format!("{line}\n"));
    fs::write(image.at("etc/twistlock/twistlock.cfg"), config.collect::<String>()).unwrap();

    let mut container = image.run();
    let log = || fs::read_to_string(image.root.path().with_extension("log")).unwrap();
    wait_until("it serves", || {
        assert!(container.outer.try_wait().unwrap().is_none(), "{}", log());
        container.probe("/primary") == Some(200)
    });
    assert_eq!(container.probe("/livez?within=10000&waiting=200"), Some(200));
    let status = container.exec(&["/usr/local/bin/twistcli", "ha", "status", "--json"]);
    let status: Value = serde_json::from_str(&status).unwrap_or_else(|error| panic!("{error}: {status}"));
    assert_eq!((&status["role"], &status["name"]), (&"PRIMARY".into(), &status["members"][0]["name"]), "{status}");
    let pid = container.daemon().unwrap();
    let proc = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for line in ["Uid:\t2674\t2674\t2674\t2674", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Groups:\t \n"] {
        assert!(proc.contains(line), "{line} is not in {proc}");
    }
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    let end = container.outer.wait().unwrap();
    assert_eq!((end.code(), end.signal()), (Some(0), None), "{}", log());
    let said = log();
    println!("{said}");
    for line in said.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert_ne!(line["level"], "ERROR", "{line}");
    }
}
