//! A service beside the Console as real processes: one that behaves, and those that do not. Its keeper is the real
//! program. What it is told, this test tells it.

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, User, geteuid},
};
use tokio::{runtime::Runtime, time::timeout};
use twistlock_ha::{
    guard::PortGuard,
    node::{Lease, lease::boottime},
    service::{Folder, PortPair, Readiness, Report, Service, Settings, Work, course::Limits},
};

/// Far above everything that is waited for.
const BOUND: Duration = Duration::from_secs(20);
/// As in the daemon.
const LEASE: Duration = Duration::from_millis(400);
/// Makes this program the owner of a service: see [`owner_process`].
const OWNER: &str = "TWISTLOCK_TEST_SERVICE";

/// A port of this host that nobody has.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Whether services are found by a cgroup, or by whom they descend from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    ByCgroup,
    ByDescent,
}

/// An ordinary folder, as a service finds one.
#[derive(Clone, Debug)]
struct PlainFolder(PathBuf);

impl Folder for PlainFolder {
    fn path(&self) -> &Path {
        &self.0
    }

    fn serve(&self, _: u64, (user, group): (u32, u32)) -> Work<'_> {
        let folder = self.0.clone();
        Box::pin(async move {
            let made = tokio::task::spawn_blocking(move || {
                if folder.is_dir() {
                    return Ok(()); // it is whose it is
                }
                std::fs::create_dir_all(&folder)?;
                let own = user == nix::unistd::geteuid().as_raw();
                if own { Ok(()) } else { std::os::unix::fs::chown(&folder, Some(user), Some(group)) }
            });
            made.await.map_err(io::Error::other)?
        })
    }

    fn withdraw(&self) -> Work<'_> {
        Box::pin(async { Ok(()) })
    }
}

/// A service whose program is a text of Python. It finds the port at which it is asked in PORT.
struct Site {
    folder: tempfile::TempDir,
    port: u16,
    settings: Settings,
}

impl Site {
    fn new(program: &str, found: Found) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let file = folder.path().join("environment");
        fs::write(&file, format!("PORT={port}\nPYTHONUNBUFFERED=1\n")).unwrap();
        let settings = Settings {
            program: env!("CARGO_BIN_EXE_twistlockd").into(),
            words: ["/usr/bin/env", "python3", "-c", program].map(str::to_owned).into(),
            user: None,
            folder: Arc::new(PlainFolder(folder.path().join("files"))),
            mark: folder.path().to_owned(),
            ports: vec![PortPair { outside: 1, inside: port, proxy: false }],
            ready: Readiness::Tcp(port),
            limits: Limits { ready: Duration::from_secs(10), stop: Duration::from_secs(15), restarts: 3 },
            environment_file: Some(file),
            node: "node1".to_owned(),
            guard: None,
            cgroups: found == Found::ByCgroup,
        };
        Self { folder, port, settings }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("files").join(name)
    }
}

/// A service that runs, on a runtime of its own.
struct Run {
    runtime: Runtime,
    service: Service,
}

impl Run {
    fn start(settings: Settings) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (service, runner) = Service::new(settings);
        runtime.spawn(runner.run());
        Self { runtime, service }
    }

    fn begin(&self) {
        self.runtime.block_on(self.service.run_in(7));
    }

    /// Waits until its report is as wanted.
    fn wait(&self, what: &str, is: impl FnMut(&Report) -> bool) -> Report {
        let mut report = self.service.report();
        let waiting =
            self.runtime.block_on(async { timeout(BOUND, report.wait_for(is)).await.map(|r| r.unwrap().clone()) });
        waiting.unwrap_or_else(|_| {
            panic!("waited too long until {what}: {:?}, {:?}", self.service.report().borrow(), self.output())
        })
    }

    fn ready(&self) -> u32 {
        self.wait("it is ready", Report::is_ready).pid.unwrap()
    }

    fn end(&self, in_order: bool) -> Duration {
        let begin = Instant::now();
        self.runtime.block_on(async { timeout(BOUND, self.service.end(in_order)).await }).expect("it ends");
        assert!(self.service.report().borrow().is_stopped());
        begin.elapsed()
    }

    fn output(&self) -> Vec<String> {
        self.service.journal().behind(0, 100).into_iter().map(|line| line.text).collect()
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) -> Duration {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < BOUND, "waited too long until {what}");
        thread::park_timeout(Duration::from_millis(1));
    }
    begin.elapsed()
}

/// Alive, and not only waiting for somebody to ask how it ended.
fn lives(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" Z")))
}

/// The number that a process has written into a file.
fn pid_in(file: &Path) -> u32 {
    let mut pid = None;
    wait_until("a process has written its number", || {
        pid = fs::read_to_string(file).ok().and_then(|text| text.strip_suffix('\n')?.parse().ok());
        pid.is_some()
    });
    pid.unwrap()
}

fn listens(port: u16) -> bool {
    std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
}

/// Serves the port for ever.
const SERVE: &str = "
import os, signal, socket, sys, time
def serve():
    listener = socket.create_server(('127.0.0.1', int(os.environ['PORT'])))
    while True:
        listener.accept()[0].close()
";
/// Leaves a process behind that belongs to nobody: another session, and its parent has ended.
const FORK_AWAY: &str = "
def fork_away():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with open('away', 'w') as file: file.write(str(os.getpid()) + '\\n')
            time.sleep(1000)
        os._exit(0)
    os.wait()
";

fn program(parts: &[&str]) -> String {
    parts.concat()
}

#[test]
fn a_service_knows_where_it_is_and_has_no_power_over_this_host() {
    for found in [Found::ByCgroup, Found::ByDescent] {
        let tell = "
print('node', os.environ['TWISTLOCK_NODE'], 'epoch', os.environ['TWISTLOCK_EPOCH'], 'in', os.getcwd())
print('folder', os.environ['TWISTLOCK_FOLDER'], 'secrets', [n for n in os.environ if n.startswith('CARGO')])
for line in open('/proc/self/status'):
    if line.split(':')[0] in ('CapEff', 'CapPrm', 'CapBnd', 'CapAmb', 'NoNewPrivs', 'SigBlk', 'Uid'): print(line.strip())
print('session', os.getsid(0) == os.getpid(), 'stdin', os.readlink('/proc/self/fd/0'))
print('to standard error', file=sys.stderr)
serve()
";
        let mut site = Site::new(&program(&[SERVE, tell]), found);
        let nobody = geteuid().is_root().then(|| User::from_name("nobody").unwrap().unwrap());
        if nobody.is_some() {
            site.settings.user = Some("nobody".to_owned());
            // So that it gets to its folder.
            fs::set_permissions(site.folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        let run = Run::start(site.settings.clone());
        run.begin();
        let pid = run.ready();
        assert!(lives(pid) && listens(site.port));
        wait_until("all is written", || run.output().iter().any(|line| line.contains("standard error")));
        let said = run.output().join("\n");
        let folder = site.file("").display().to_string().trim_end_matches('/').to_owned();
        assert!(said.contains(&format!("node node1 epoch 7 in {folder}\nfolder {folder} secrets []")), "{said}");
        assert!(said.contains("session True stdin /dev/null\nto standard error"), "{said}");
        assert!(said.contains("NoNewPrivs:\t1") && said.contains("SigBlk:\t0000000000000000"), "{said}");
        if let Some(nobody) = &nobody {
            for name in ["CapEff", "CapPrm", "CapBnd", "CapAmb"] {
                assert!(said.contains(&format!("{name}:\t0000000000000000")), "{said}");
            }
            assert!(said.contains(&format!("Uid:\t{0}\t{0}\t{0}\t{0}", nobody.uid)), "{said}");
        }
        let took = run.end(true);
        assert!(took < Duration::from_secs(10), "SIGTERM is enough: {took:?}");
        assert!(!lives(pid) && !listens(site.port));
    }
}

#[test]
fn who_ignores_the_signal_and_forks_away_is_killed_with_all_that_it_has_started() {
    for found in [Found::ByCgroup, Found::ByDescent] {
        let stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nfork_away()\nserve()\n";
        let mut site = Site::new(&program(&[SERVE, FORK_AWAY, stubborn]), found);
        let run = Run::start(site.settings.clone());
        run.begin();
        let (pid, away) = (run.ready(), pid_in(&site.file("away")));
        assert!(lives(pid) && lives(away));
        let took = run.end(false);
        println!("{found:?}: killed and gone after {took:?}");
        assert!(took < Duration::from_secs(10) && !lives(pid) && !lives(away), "{took:?}");
        // In order, which it does not care for.
        site.settings.limits.stop = Duration::from_millis(500);
        fs::remove_file(site.file("away")).unwrap();
        let run = Run::start(site.settings.clone());
        run.begin();
        let (pid, away) = (run.ready(), pid_in(&site.file("away")));
        let took = run.end(true);
        assert!(took >= Duration::from_millis(500), "it has its time: {took:?}");
        assert!(!lives(pid) && !lives(away), "{found:?}");
    }
}

#[test]
fn a_frozen_service_is_killed_too() {
    let mut site = Site::new(&program(&[SERVE, "serve()\n"]), Found::ByCgroup);
    site.settings.limits.stop = Duration::from_millis(500);
    let run = Run::start(site.settings.clone());
    run.begin();
    let pid = run.ready();
    kill(Pid::from_raw(pid as i32), Signal::SIGSTOP).unwrap();
    run.end(true);
    assert!(!lives(pid));
}

#[test]
fn who_goes_into_the_background_is_told_that_it_may_not() {
    for found in [Found::ByCgroup, Found::ByDescent] {
        let site = Site::new(&program(&[SERVE, FORK_AWAY, "fork_away()\n"]), found);
        let run = Run::start(site.settings.clone());
        run.begin();
        let away = pid_in(&site.file("away"));
        let report = run.wait("it has failed", |report| report.ended.is_some());
        assert!(report.ended.as_ref().unwrap().contains("exit code 0; it left processes behind"), "{report:?}");
        run.end(false);
        assert!(!lives(away));
    }
}

#[test]
fn who_ends_at_once_is_started_again_and_then_another_member_is_to_try() {
    let mut site = Site::new("import sys; print('bad day'); sys.exit(3)", Found::ByCgroup);
    site.settings.limits.restarts = 1;
    let run = Run::start(site.settings);
    let mut asks = run.service.asks();
    run.begin();
    let asked = run.runtime.block_on(async { timeout(BOUND, asks.changed()).await });
    asked.expect("in time").unwrap();
    let why = asks.borrow_and_update().clone().unwrap();
    assert!(why.contains("failed 2 times") && why.ends_with("exit code 3"), "{why}");
    wait_until("all is read", || run.output() == ["bad day", "bad day"]);
    run.end(false);
    // The role has come back, and nothing is better.
    run.begin();
    let report = run
        .wait("it is given up", |report| report.problem.as_ref().is_some_and(|text| text.contains("no other member")));
    assert_eq!(report.restarts, 4);
    assert!(!asks.has_changed().unwrap());
    run.end(false);
}

#[test]
fn who_is_never_ready_is_ended_and_tried_again() {
    let mut site = Site::new("import time; time.sleep(1000)", Found::ByCgroup);
    site.settings.limits.ready = Duration::from_millis(300);
    let run = Run::start(site.settings);
    run.begin();
    let first = run.wait("it runs", |report| report.pid.is_some()).pid.unwrap();
    let report = run.wait("it has failed", |report| report.restarts == 1);
    assert!(!lives(first) && report.ended.is_some(), "{report:?}");
    run.end(false);
}

#[test]
fn what_cannot_be_started_says_why() {
    let mut site = Site::new("", Found::ByCgroup);
    site.settings.words = vec!["/no/such/program".to_owned()];
    let run = Run::start(site.settings.clone());
    run.begin();
    let report = run.wait("it has failed", |report| report.ended.is_some());
    assert!(report.ended.as_ref().unwrap().contains("exit code 127"), "{report:?}");
    let why = "cannot start the service: /no/such/program in /";
    wait_until("it is read why", || run.output().first().is_some_and(|line| line.starts_with(why)));
    run.end(false);
    site.settings.user = Some("no-such-user-here".to_owned());
    let run = Run::start(site.settings);
    run.begin();
    let report = run.wait("it has failed", |report| report.ended.is_some());
    assert!(report.ended.as_ref().unwrap().contains("no-such-user-here is no user of this host"), "{report:?}");
    run.end(false);
}

#[test]
fn a_flood_of_output_holds_nobody_up() {
    let flood = "
import threading
def flood():
    line = ('x' * 5000 + '\\n') * 100
    while True: sys.stdout.write(line)
threading.Thread(target=flood, daemon=True).start()
serve()
";
    let site = Site::new(&program(&[SERVE, flood]), Found::ByCgroup);
    let run = Run::start(site.settings.clone());
    run.begin();
    let pid = run.ready();
    wait_until("much was written", || run.service.journal().behind(20_000, 1).len() == 1);
    let all = run.service.journal().behind(0, usize::MAX);
    assert!(all.len() <= 2000 && all.iter().all(|line| line.text.len() < 2100));
    assert!(listens(site.port) && run.end(true) < BOUND && !lives(pid));
}

#[test]
fn an_administrator_stops_it_whatever_the_role() {
    let site = Site::new(&program(&[SERVE, "serve()\n"]), Found::ByCgroup);
    let run = Run::start(site.settings.clone());
    run.begin();
    let first = run.ready();
    run.runtime.block_on(run.service.restart());
    let second = run.wait("it runs again", |report| report.is_ready() && report.pid != Some(first)).pid.unwrap();
    assert!(!lives(first) && lives(second));
    run.runtime.block_on(run.service.hold(true));
    run.wait("it is stopped", |report| report.is_stopped() && report.held);
    run.begin();
    run.runtime.block_on(run.service.restart());
    run.runtime.block_on(run.service.hold(false));
    let report = run.wait("it is ready", Report::is_ready);
    assert!(!report.held && report.restarts == 0);
    run.end(true);
}

#[test]
fn it_says_itself_that_it_is_ready() {
    let notify = "
time.sleep(0.2)
address = os.environ['NOTIFY_SOCKET']
address = '\\0' + address[1:] if address[0] == '@' else address
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1', address)
time.sleep(1000)
";
    let mut site = Site::new(&program(&[SERVE, notify]), Found::ByCgroup);
    site.settings.ready = Readiness::Notify;
    let run = Run::start(site.settings);
    let begin = Instant::now();
    run.begin();
    run.ready();
    assert!(begin.elapsed() >= Duration::from_millis(200));
    run.end(false);
}

/// Nobody extends the lease any more, as if the daemon were frozen: the guard ends the service, and the service is gone
/// at about the time when the lease is.
#[test]
fn the_port_guard_ends_the_service_when_nobody_extends_the_lease() {
    for found in [Found::ByCgroup, Found::ByDescent] {
        let mut site = Site::new(&program(&[SERVE, FORK_AWAY, "fork_away()\nserve()\n"]), found);
        let lease = Lease::new().unwrap();
        let extend = |lease: &Lease| lease.set(boottime() + LEASE.as_nanos() as u64).unwrap();
        extend(&lease);
        let guard = PortGuard::spawn(env!("CARGO_BIN_EXE_twistlockd").into(), &lease, None).unwrap();
        site.settings.guard = Some(guard);
        let run = Run::start(site.settings.clone());
        let (stop, stopped) = std::sync::mpsc::sync_channel::<()>(1);
        let extended = lease.clone();
        let extending = thread::spawn(move || {
            while stopped.recv_timeout(Duration::from_millis(20)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                extend(&extended);
            }
        });
        run.begin();
        let (pid, away) = (run.ready(), pid_in(&site.file("away")));
        drop(stop);
        extending.join().unwrap();
        let took = wait_until("nothing of it lives", || !lives(pid) && !lives(away));
        println!("{found:?}: gone {took:?} after the last extension of a lease of {LEASE:?}");
        assert!(took <= LEASE + Duration::from_secs(1), "{took:?}");
        run.end(false);
    }
}

/// The owner process: not a test of its own. Runs a service and says its number, until it is killed.
#[test]
fn owner_process() {
    let Ok(found) = std::env::var(OWNER) else { return };
    let found = if found == "cgroup" { Found::ByCgroup } else { Found::ByDescent };
    let site = Site::new(&program(&[SERVE, FORK_AWAY, "fork_away()\nserve()\n"]), found);
    let run = Run::start(site.settings.clone());
    run.begin();
    println!("@ {} {} {}", run.ready(), pid_in(&site.file("away")), site.folder.path().display());
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read_line(&mut String::new());
}

#[test]
fn a_daemon_that_is_killed_takes_its_service_with_it() {
    for found in ["cgroup", "descent"] {
        let mut owner = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "owner_process", "--nocapture", "--test-threads=1"])
            .env(OWNER, found)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(owner.stdout.take().unwrap()).lines().map(Result::unwrap);
        let said = lines.find_map(|line| line.split_once("@ ").map(|(_, said)| said.to_owned())).unwrap();
        let (pids, folder) = said.rsplit_once(' ').unwrap();
        let pids: Vec<u32> = pids.split(' ').map(|pid| pid.parse().unwrap()).collect();
        assert!(pids.iter().all(|pid| lives(*pid)));
        owner.kill().unwrap();
        owner.wait().unwrap();
        let took = wait_until("nothing of the service lives", || pids.iter().all(|pid| !lives(*pid)));
        println!("{found}: gone {took:?} after the daemon was killed");
        fs::remove_dir_all(folder).unwrap();
    }
}
