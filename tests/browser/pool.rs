//! The page of a pool of five: what it tolerates, its load balancer, a member less, and the form for one more.

use std::{
    io::{BufRead, BufReader},
    net::Ipv4Addr,
    process::{Child, Command, Stdio},
    thread,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use twistlock_ha::dev::{ClusterFile, read_cluster};

use super::{
    CLUSTER,
    driver::Browser,
    host::wait_until,
    stage::{self, NAME},
};

const MEMBERS: u8 = 5;

/// A dev cluster. Ends with this value.
pub struct Pool {
    dev: Child,
    folder: TempDir,
}

impl Pool {
    /// Started with these arguments; all nodes are members when it returns.
    pub fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("twp").tempdir().unwrap();
        let mut dev = Command::new(env!("CARGO_BIN_EXE_twistlockd"))
            .args(["dev", "--dir"])
            .arg(folder.path())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(dev.stdout.take().unwrap()).lines();
        let ready = said.by_ref().map_while(Result::ok).any(|line| line.contains("The cluster is ready"));
        thread::spawn(move || said.map_while(Result::ok).for_each(drop));
        let pool = Self { dev, folder };
        assert!(ready, "the dev cluster is not ready");
        pool
    }

    /// Who its nodes are, and how to log in.
    pub fn file(&self) -> ClusterFile {
        read_cluster(self.folder.path()).unwrap()
    }

    /// Exit code of `twistcli clustered-db`, by the name of the load balancer.
    fn balanced(&self, args: &[&str]) -> Option<i32> {
        let file = self.file();
        let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
        command.arg("clustered-db").args(args).args([
            "--address",
            &format!("https://{NAME}:8083/"),
            "-p",
            &file.password,
        ]);
        command.env("TWISTLOCK_CACERT", file.ca).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().code()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if matches!(self.dev.try_wait(), Ok(None)) {
            let _ = kill(Pid::from_raw(self.dev.id() as i32), Signal::SIGTERM);
        }
        let _ = self.dev.wait();
    }
}

/// See the module.
pub fn play() {
    let pool = Pool::start(&["--members", &MEMBERS.to_string()]);
    let addresses: Vec<Ipv4Addr> = (1..=MEMBERS).map(|number| Ipv4Addr::new(127, 0, 0, number)).collect();
    stage::name_hosts(&addresses);
    let file = pool.file();
    // The name by which the browser comes is no name of the Consoles before it is that of the load balancer.
    let set = file.nodes.iter().any(|node| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
        command.args(["clustered-db", "configure", "--load-balancer-address", NAME, "--data"]).arg(&node.data);
        command.stderr(Stdio::null()).status().unwrap().success()
    });
    assert!(set, "no member is PRIMARY");
    wait_until("the certificates have the name", || pool.balanced(&["status"]) == Some(0));
    let ca = std::fs::read_to_string(&file.ca).unwrap();
    let browser = Browser::start(&[&ca]);
    browser.open(CLUSTER);
    browser.wait_for("the page asks who it is", "return heading() === 'Log in'");
    browser.fill("username", &file.user);
    browser.fill("password", &file.password);
    browser.press("Log in");
    browser.wait_for("five members are shown", "return rows().length === 5 && healthy()");
    browser.wait_for("it says what they tolerate", "return text('#pool-size').includes('2 failures are tolerated')");
    browser.wait_for("the load balancer is shown", &format!("return text('#load-balancer') === '{NAME}'"));
    assert_eq!(
        browser.run("return !!button('APPLY') || text('main').includes('join line')"),
        false,
        "HA mode has these"
    );
    browser.screenshots("pool");

    refused_and_said(&browser);

    let gone = "[...document.querySelectorAll('[aria-label^=\"Remove node\"]')].at(-1)";
    let name = browser.run(&format!("return {gone}.title.replace('Remove ', '')"));
    browser.run(&format!("{gone}.click()"));
    browser.wait_for("it is asked", "return text('dialog').includes('leaves the pool')");
    browser.screenshots("pool-remove");
    browser.fill("typed", name.as_str().unwrap());
    browser.press("Remove");
    browser.wait_for("four are left", "return rows().length === 4 && !document.querySelector('dialog')");
    browser.wait_for("it gives a word of advice", "return text('#pool-size').includes('an odd number is better')");
    browser.screenshots("pool-of-four");
    browser.assert_clean();
}

/// What a form was refused stays to be read while the page is drawn again and again, and goes when the form is sent again.
fn refused_and_said(browser: &Browser) {
    // Each status draws the page: what does not belong there is gone then.
    let drawn_again = |what: &str| {
        browser.run("document.querySelector('#pool-size').textContent = 'not drawn yet'");
        browser.wait_for(what, "return text('#pool-size').includes('tolerated')");
    };
    browser.fill("balancer", "no name");
    browser.press("Save the load balancer");
    browser.wait_for("what is no address is refused", "return problems().includes('cannot be in a certificate')");
    browser.press("Add");
    browser.wait_for("both are needed", "return problems().includes('Enter the address and the fingerprint')");
    drawn_again("the page is drawn again");
    let both = "return problems().includes('cannot be in a certificate') && problems().includes('Enter the address')";
    assert_eq!(browser.run(both), true, "{}", browser.run("return problems()"));
    browser.screenshots("pool-refused");
    browser.fill("address", "127.0.0.99");
    browser.fill("fingerprint", "AB:CD");
    browser.press("Add");
    browser.wait_for("a host that does not wait is refused", "return problems().includes('is no fingerprint')");
    assert_eq!(browser.run("return problems().includes('Enter the address')"), false, "the former slip is gone");
    browser.fill("balancer", NAME);
    browser.press("Save the load balancer");
    browser.wait_for("what was refused is forgotten", "return !problems().includes('certificate')");
    drawn_again("the page is drawn once more");
    assert_eq!(browser.run("return problems().includes('is no fingerprint')"), true);
    browser.go("#/tags", "Tags");
    assert_eq!(browser.run("return problems().replaceAll('|', '')"), "", "another page has nothing of it");
    browser.go(CLUSTER, "High Availability");
    browser.wait_for("five members are shown again", "return rows().length === 5 && healthy()");
    assert_eq!(browser.run("return problems().replaceAll('|', '')"), "", "it was left");
}
