//! A pool as its administrator makes it: hosts that wait, a sign-up, and the commands. Real processes in a network of their
//! own, each with an address and a data folder.

use std::{
    fs::{self, File},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use twistlock_ha::{
    cluster::Role,
    control,
    https::{self, Limits, Trust},
    node::Status,
};
use ureq::Agent;

use super::{beside, cluster::LIMIT, network};

pub const SECRET: &str = "0123456789abcdef0123456789abcdef";
pub const PASSWORD: &str = "Pool-test-1234";
pub const LIMITS: Limits = Limits { connect: Duration::from_secs(2), request: Duration::from_secs(20) };

/// One host. Its daemon ends with this.
pub struct Host {
    number: usize,
    folder: PathBuf,
    daemon: Option<Child>,
}

impl Host {
    /// Starts a host that has nothing yet but its configuration.
    pub fn start(site: &Path, number: usize, secret: Option<&str>) -> Self {
        let folder = site.join(format!("host{number}"));
        fs::create_dir_all(&folder).unwrap();
        let place = folder.display();
        let mut config = format!(
            "BIND_ADDRESS=127.0.0.{number}\nDATA_FOLDER={place}/data\nDATA_RECOVERY_ENABLED=false\n\
             DATA_RECOVERY_VOLUME={place}/backup\nSYSTEMD_ENABLED=false\nRUN_CONSOLE_AS_ROOT=true\n\
             HIGH_AVAILABILITY_NAME=host{number}\nCLUSTERED_DB_ENABLED=true\n"
        );
        if let Some(secret) = secret {
            fs::write(folder.join("secret"), format!("{secret}\n")).unwrap();
            config.push_str(&format!("CLUSTERED_DB_SECRET_FILE={place}/secret\n"));
        }
        fs::write(folder.join("twistlock.cfg"), config).unwrap();
        let mut host = Self { number, folder, daemon: None };
        host.run();
        host
    }

    /// Starts its daemon.
    pub fn run(&mut self) {
        let log = File::options().create(true).append(true).open(self.folder.join("log")).unwrap();
        let mut daemon = Command::new(env!("CARGO_BIN_EXE_twistlockd"));
        daemon.args(["run", "--config"]).arg(self.folder.join("twistlock.cfg"));
        self.daemon = Some(daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap());
    }

    /// Ends its daemon by a signal.
    pub fn end(&mut self, signal: Signal) {
        if let Some(mut daemon) = self.daemon.take() {
            kill(Pid::from_raw(daemon.id() as i32), signal).unwrap();
            daemon.wait().unwrap();
        }
    }

    /// Where it is.
    pub fn address(&self) -> String {
        format!("127.0.0.{}", self.number)
    }

    /// A path of its Console's API.
    pub fn url(&self, path: &str) -> String {
        format!("https://{}:8083/api/v1/{path}", self.address())
    }

    /// Its data folder.
    pub fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// What its daemon has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap()
    }

    /// What its daemon says.
    pub fn status(&self) -> Option<Status> {
        control::status(&self.data().join("control.sock"), Duration::from_secs(2)).ok()
    }

    /// What it is.
    pub fn role(&self) -> Option<Role> {
        self.status().map(|status| status.role)
    }

    /// Waits until it is that.
    #[track_caller]
    pub fn wait_role(&self, role: Role) {
        self.wait_for(&role.to_string(), || self.role() == Some(role));
    }

    /// Waits for a condition.
    #[track_caller]
    pub fn wait_for(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !condition() {
            assert!(begin.elapsed() < LIMIT, "host{}: not {what}: {:?}\n{}", self.number, self.role(), self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Of its key, as it shows it itself.
    pub fn fingerprint(&self) -> String {
        self.status().and_then(|status| status.waiting).expect("it waits").fingerprint
    }

    /// As a browser would that has seen the warning about the certificate.
    pub fn sign_up(&self) -> (u16, String) {
        let login = json!({ "username": "admin", "password": PASSWORD });
        let mut answer = https::credulous_client(LIMITS).post(self.url("signup")).send_json(login).unwrap();
        (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
    }

    /// A client that trusts the authority of this host's pool.
    pub fn agent(&self) -> Agent {
        https::client(&Trust::file(&self.data().join("certificates/ca.pem")).unwrap(), LIMITS)
    }

    /// Writes a tag, by name and password. The status of the answer; none if there was none.
    pub fn write(&self, agent: &Agent, tag: &str) -> Option<u16> {
        let login = data_encoding::BASE64.encode(format!("admin:{PASSWORD}").as_bytes());
        let call = agent.post(self.url("tags")).header("authorization", format!("Basic {login}"));
        call.send_json(json!({ "name": tag, "color": "#112233" })).ok().map(|answer| answer.status().as_u16())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.end(Signal::SIGKILL);
    }
}

/// A folder for the hosts of a test.
pub fn site() -> TempDir {
    tempfile::Builder::new().prefix("twp").tempdir().unwrap()
}

#[test]
fn a_sign_up_makes_a_host_that_waits_the_seed_of_a_pool() {
    let _beside = beside();
    network::in_private_network(|| {
        let site = site();
        let mut host = Host::start(site.path(), 1, None);
        host.wait_role(Role::Waiting);
        let (fingerprint, waiting) = (host.fingerprint(), host.status().unwrap());
        assert!(waiting.reason.contains(&fingerprint) && host.log().contains(&fingerprint), "{waiting:?}");
        // It is known by the same key after a restart.
        host.end(Signal::SIGTERM);
        host.run();
        host.wait_role(Role::Waiting);
        assert_eq!(host.fingerprint(), fingerprint);
        let anybody = https::credulous_client(LIMITS);
        let get = |path: &str| {
            let mut answer = anybody.get(host.url(path)).call().unwrap();
            (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
        };
        assert_eq!(get("_ping").0, 503, "no balancer takes it for a PRIMARY");
        assert_eq!(get("settings/initialized"), (200, "{\"initialized\":false}".to_owned()));
        let begin = Instant::now();
        assert_eq!(host.sign_up().0, 200);
        host.wait_role(Role::Primary);
        let agent = host.agent();
        host.wait_for("logged in", || host.write(&agent, "first") == Some(200));
        println!("  from the sign-up to the first write: {} ms", begin.elapsed().as_millis());
        let size = host.status().unwrap().membership;
        assert!(size.roster.size.is_pool() && size.roster.members.len() == 1);
        assert_eq!(host.sign_up(), (400, "{\"err\":\"system already initialized\"}".to_owned()));
        // Killed, it is the member that it was.
        host.end(Signal::SIGKILL);
        host.run();
        host.wait_role(Role::Primary);
        host.wait_for("there with its tag", || host.write(&agent, "first") == Some(409));
    });
}

/// The command line of `twistcli` with these arguments, at the Console of a host.
pub fn line(host: &Host, args: &[&str]) -> Vec<String> {
    let (url, ca) = (format!("https://{}:8083/", host.address()), host.data().join("certificates/ca.pem"));
    let there = ["--address", &url, "-u", "admin", "-p", PASSWORD, "--tlscacert", ca.to_str().unwrap()];
    let whole = [&[env!("CARGO_BIN_EXE_twistcli")], args, &there].concat();
    whole.into_iter().map(str::to_owned).collect()
}

/// `twistcli` with these arguments, at the Console of a host: exit code, and all that it says.
pub fn at(host: &Host, args: &[&str]) -> (Option<i32>, String) {
    let line = line(host, args);
    let mut command = Command::new(&line[0]);
    command.args(&line[1..]);
    said(command)
}

/// `twistcli` on a host.
fn on(host: &Host, args: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
    command.args(args).arg("--data").arg(host.data());
    said(command)
}

fn said(mut command: Command) -> (Option<i32>, String) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

/// The arguments of `add` for these hosts.
pub fn add<'a>(addresses: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    let named = addresses.iter().flat_map(|address| ["--member-address", address.as_str()]);
    ["clustered-db", "add"].into_iter().chain(named).chain(more.iter().copied()).collect()
}

/// How many members of the pool have a vote, as a host sees it.
pub fn voters(host: &Host) -> usize {
    host.status().map_or(0, |status| status.membership.voters().count())
}

/// The first of these hosts that acknowledges a write, and how long that took.
fn first_write(hosts: &[Host], among: std::ops::Range<usize>, agent: &Agent, tag: &str) -> Duration {
    let begin = Instant::now();
    hosts[among.start].wait_for("one of them PRIMARY", || {
        hosts[among.clone()].iter().any(|host| matches!(host.write(agent, tag), Some(200 | 409)))
    });
    begin.elapsed()
}

/// As docs/pool.md says: five hosts wait, one is signed up, the others are added in one command.
#[test]
fn five_hosts_that_wait_become_a_pool_that_goes_on_without_two() {
    let _beside = beside();
    network::in_private_network(|| {
        let site = site();
        let start = |number| Host::start(site.path(), number, Some(SECRET));
        let mut hosts: Vec<Host> = (1..=5).map(start).collect();
        let stranger = Host::start(site.path(), 6, Some("ffffffffffffffffffffffffffffffff"));
        let without = Host::start(site.path(), 7, None);
        for host in hosts.iter().chain([&stranger, &without]) {
            host.wait_role(Role::Waiting);
        }
        assert_eq!(on(&hosts[1], &["clustered-db", "fingerprint"]), (Some(0), format!("{}\n", hosts[1].fingerprint())));
        let begin = Instant::now();
        assert_eq!(hosts[0].sign_up().0, 200);
        hosts[0].wait_role(Role::Primary);
        let agent = hosts[0].agent();
        hosts[0].wait_for("logged in", || hosts[0].write(&agent, "first") == Some(200));
        let seeded = begin.elapsed();
        let all: Vec<String> = hosts[1..].iter().map(Host::address).collect();

        // Each is refused by its name, with all that were named beside it.
        let refused = [
            (stranger.address(), "the secrets of CLUSTERED_DB_SECRET_FILE differ"),
            (without.address(), "CLUSTERED_DB_SECRET_FILE is set here, but not there"),
            ("127.0.0.9".to_owned(), "nobody listens"),
            ("127.0.0.1".to_owned(), "already"),
        ];
        for (address, why) in refused {
            let with = [all.clone(), vec![address.clone()]].concat();
            let named = if address == "127.0.0.1" { std::slice::from_ref(&address) } else { &with };
            let (code, text) = at(&hosts[0], &add(named, &[]));
            assert!(code == Some(75) && text.contains(why) && text.contains(&address), "{address}: {code:?} {text}");
        }
        let wrong = ["AB"; 32].join(":");
        let (code, text) = at(&hosts[0], &add(&all[..1], &["--member-fingerprint", &wrong]));
        assert!(code == Some(75) && text.contains("and not AB:AB"), "{text}");
        for host in hosts[1..].iter().chain([&stranger, &without]) {
            assert_eq!(host.role(), Some(Role::Waiting), "nothing was changed");
        }
        assert_eq!(voters(&hosts[0]), 1);

        let adding = Instant::now();
        let (code, text) = at(&hosts[0], &add(&all, &[]));
        assert!(code == Some(0) && text.contains("All 5 members are up"), "{text}");
        let (added, whole) = (adding.elapsed(), begin.elapsed());
        println!(
            "  sign-up {} ms, add of four {} ms, in all {} ms",
            seeded.as_millis(),
            added.as_millis(),
            whole.as_millis()
        );
        assert_eq!(voters(&hosts[0]), 5);
        let (_, audits) = at(&hosts[0], &["audits", "--limit", "50"]);
        assert!(audits.contains("look at FAILED") && audits.contains("127.0.0.6"), "{audits}");

        // Two of five at the same moment, the PRIMARY among them.
        for host in &mut hosts[..2] {
            host.end(Signal::SIGKILL);
        }
        println!("  two of five killed: a write after {} ms", first_write(&hosts, 2..5, &agent, "second").as_millis());
        hosts[..2].iter_mut().for_each(Host::run);
        let back = |host: &Host| matches!(host.role(), Some(Role::Primary | Role::Secondary));
        hosts[0].wait_for("back", || hosts.iter().all(back));

        removed_and_added_again(&mut hosts, &agent);
    });
}

/// A member that was removed serves nothing, and is added again only with an empty data folder.
fn removed_and_added_again(hosts: &mut [Host], agent: &Agent) {
    let primary = || hosts.iter().position(|host| host.role() == Some(Role::Primary));
    hosts[0].wait_for("ruled", || primary().is_some());
    let primary = primary().unwrap();
    let gone = if primary == 4 { 3 } else { 4 };
    let address = hosts[gone].address();
    let (code, text) = at(&hosts[primary], &["clustered-db", "remove", "--member-address", &address]);
    assert_eq!(code, Some(0), "{text}");
    hosts[gone].wait_role(Role::Removed);
    for _ in 0..2 {
        let (code, text) = at(&hosts[primary], &add(std::slice::from_ref(&address), &[]));
        assert!(code == Some(75) && text.contains("no host waits there"), "{text}");
        // Nor after a restart.
        hosts[gone].end(Signal::SIGTERM);
        hosts[gone].run();
        hosts[gone].wait_role(Role::Removed);
    }
    assert!(TcpStream::connect((address.as_str(), 8083)).is_err(), "it serves nothing");
    hosts[gone].end(Signal::SIGTERM);
    fs::rename(hosts[gone].data(), hosts[gone].folder.join("aside")).unwrap();
    hosts[gone].run();
    hosts[gone].wait_role(Role::Waiting);
    let (code, text) = at(&hosts[primary], &add(std::slice::from_ref(&address), &["--json"]));
    assert!(code == Some(0), "{text}");
    let json = text.split_once('\n').map_or("", |_| &text[..text.rfind('}').map_or(0, |end| end + 1)]);
    let added: Value = serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(added["members"][0]["address"], address);
    hosts[primary].wait_for("five again", || voters(&hosts[primary]) == 5);
    assert_eq!(hosts[primary].write(agent, "third"), Some(200));
}
