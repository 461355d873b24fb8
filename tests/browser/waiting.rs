//! The page of a host that waits for a pool: whoever signs up there is the Administrator of the pool that it founds.

use std::{
    fs::{self, File},
    net::{Ipv4Addr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
};

use super::{
    driver::Browser,
    host::{PASSWORD, wait_until},
    stage,
};

const ADDRESS: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// A daemon with an empty data folder. Ends with this value.
struct Waiting(Child);

impl Waiting {
    fn start(folder: &Path) -> Self {
        let place = folder.display();
        let config = format!(
            "BIND_ADDRESS={ADDRESS}\nDATA_FOLDER={place}/data\nDATA_RECOVERY_ENABLED=false\n\
             DATA_RECOVERY_VOLUME={place}/backup\nSYSTEMD_ENABLED=false\nRUN_CONSOLE_AS_ROOT=true\n\
             HIGH_AVAILABILITY_NAME=host1\nCLUSTERED_DB_ENABLED=true\n"
        );
        let file = folder.join("twistlock.cfg");
        fs::write(&file, config).unwrap();
        let log = File::create(folder.join("log")).unwrap();
        let mut daemon = Command::new(env!("CARGO_BIN_EXE_twistlockd"));
        daemon.args(["run", "--config"]).arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Self(daemon.spawn().unwrap())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// See the module.
pub fn play() {
    let folder = tempfile::Builder::new().prefix("twp").tempdir().unwrap();
    let _host = Waiting::start(folder.path());
    stage::name_hosts(&[ADDRESS]);
    wait_until("the page answers", || TcpStream::connect((ADDRESS, 8083)).is_ok());
    // Nobody has signed its certificate yet, and the pool's own comes after the sign-up.
    let browser = Browser::start_credulous();
    browser.open("");
    browser.wait_for("the page asks for the first administrator", "return heading() === 'Sign up'");
    browser.fill("password", "short");
    browser.fill("again", "short");
    browser.press("Create and log in");
    browser.wait_for("it is refused", "return text('.problem').includes('12')");
    browser.fill("password", PASSWORD);
    browser.fill("again", PASSWORD);
    browser.press("Create and log in");
    browser.wait_for("the pool is shown", "return heading() === 'High Availability' && state('host1') === 'PRIMARY'");
    browser.wait_for(
        "it says what is missing",
        "return text('#pool-size').includes('A pool has 3 to 7 members: add 2 more.')",
    );
    browser.screenshots("pool-seed");
    browser.press("Log out");
    browser.wait_for("the page asks who it is", "return heading() === 'Log in'");
    browser.fill("username", "admin");
    browser.fill("password", PASSWORD);
    browser.press("Log in");
    browser.wait_for("it is the Administrator", "return state('host1') === 'PRIMARY' && !!button('Add')");
    browser.assert_clean();
}
