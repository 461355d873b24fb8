//! A pool as its administrator makes it: hosts that wait, a sign-up, and the commands. Real processes in a network of their
//! own, each with an address and a data folder.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;
use tempfile::TempDir;
use twistlock_ha::{
    cluster::Role,
    control,
    https::{self, Limits, Trust},
    node::Status,
};
use ureq::Agent;

use super::{beside, cluster::LIMIT, network};

const PASSWORD: &str = "Pool-test-1234";
const LIMITS: Limits = Limits { connect: Duration::from_secs(2), request: Duration::from_secs(20) };

/// One host. Its daemon ends with this.
struct Host {
    number: usize,
    folder: PathBuf,
    daemon: Option<Child>,
}

impl Host {
    /// Starts a host that has nothing yet but its configuration.
    fn start(site: &Path, number: usize, secret: Option<&str>) -> Self {
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

    fn run(&mut self) {
        let log = File::options().create(true).append(true).open(self.folder.join("log")).unwrap();
        let mut daemon = Command::new(env!("CARGO_BIN_EXE_twistlockd"));
        daemon.args(["run", "--config"]).arg(self.folder.join("twistlock.cfg"));
        self.daemon = Some(daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap());
    }

    fn end(&mut self, signal: Signal) {
        if let Some(mut daemon) = self.daemon.take() {
            kill(Pid::from_raw(daemon.id() as i32), signal).unwrap();
            daemon.wait().unwrap();
        }
    }

    fn address(&self) -> String {
        format!("127.0.0.{}", self.number)
    }

    fn url(&self, path: &str) -> String {
        format!("https://{}:8083/api/v1/{path}", self.address())
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap()
    }

    fn status(&self) -> Option<Status> {
        control::status(&self.data().join("control.sock"), Duration::from_secs(2)).ok()
    }

    fn role(&self) -> Option<Role> {
        self.status().map(|status| status.role)
    }

    #[track_caller]
    fn wait_role(&self, role: Role) {
        self.wait_for(&role.to_string(), || self.role() == Some(role));
    }

    #[track_caller]
    fn wait_for(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !condition() {
            assert!(begin.elapsed() < LIMIT, "host{}: not {what}: {:?}\n{}", self.number, self.role(), self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn fingerprint(&self) -> String {
        self.status().and_then(|status| status.waiting).expect("it waits").fingerprint
    }

    /// As a browser would that has seen the warning about the certificate.
    fn sign_up(&self) -> (u16, String) {
        let login = json!({ "username": "admin", "password": PASSWORD });
        let mut answer = https::credulous_client(LIMITS).post(self.url("signup")).send_json(login).unwrap();
        (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
    }

    /// A client that trusts the authority of this host's pool.
    fn agent(&self) -> Agent {
        https::client(&Trust::file(&self.data().join("certificates/ca.pem")).unwrap(), LIMITS)
    }

    /// Writes a tag, by name and password. The status of the answer; none if there was none.
    fn write(&self, agent: &Agent, tag: &str) -> Option<u16> {
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

fn site() -> TempDir {
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
