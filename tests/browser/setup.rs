//! What an administrator sets up by hand: backups, certificates, notifications, logins. Each step is looked at from the other
//! side, too: the file on the disk, the handshake, what the receiver got.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    thread,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};

use super::{
    PATIENCE,
    driver::Browser,
    host::{Founder, PASSWORD},
    stage::NAME,
};

/// What a load balancer in front is called.
const BALANCER: &str = "lb.example.test";
/// The key, as WebDriver has it.
const ENTER: char = '\u{e007}';

/// What the API says to an administrator.
fn get(founder: &Founder, path: &str) -> Value {
    let basic = format!("Basic {}", BASE64_STANDARD.encode(format!("admin:{PASSWORD}")));
    let (status, text) = founder.get_as(&basic, path);
    assert_eq!(status, 200, "GET {path}: {text}");
    serde_json::from_str(&text).unwrap()
}

/// Makes a backup, and does with it all that the page offers.
pub fn backups(browser: &Browser, founder: &Founder) {
    browser.go("#/manage/system/backup", "Backup & Restore");
    browser.fill("name", "no/name");
    browser.press("Back up now");
    browser.wait_for("a bad name is refused", "return text('main .problem').includes('backup')");
    browser.fill("name", "before");
    browser.press("Back up now");
    browser.wait_for("it is in the list", "return text('[aria-label=Backups] tbody').includes('before')");
    browser.press("Rename");
    browser.fill("name", "kept");
    browser.press("Rename");
    browser.wait_for(
        "it has the other name",
        "return text('[aria-label=Backups] tbody strong') === 'kept' && !document.querySelector('dialog')",
    );
    browser.press("Check");
    browser.wait_for("it is sound", "return said('kept is sound')");
    browser.wait_for("its outcome is shown", "return text('.facts').includes('Last')");
    browser.screenshots("backups");

    let listed = get(founder, "/backups");
    let id = listed[0]["id"].as_str().unwrap().to_owned();
    browser.press("Restore …");
    browser.wait_for("the command is shown", "return text('#restore-command').includes('twistcli restore ')");
    let command = browser.text("#restore-command");
    browser.press("Copy");
    browser.wait_for("it says that it is copied", "return document.body.innerText.includes('Copied')");
    assert_eq!(browser.clipboard(), command);
    let path = command.rsplit(' ').next().unwrap();
    assert!(path.ends_with(&format!("/{id}")) && fs::metadata(path).unwrap().is_file(), "{command}");
    browser.screenshots("backups-restore");
    browser.fill("typed", "another");
    browser.press("Restore");
    browser.wait_for("a slip is shown", "return text('dialog .problem').includes('Type kept')");
    // What is written now is gone after it, and the session, too.
    let basic = format!("Basic {}", BASE64_STANDARD.encode(format!("admin:{PASSWORD}")));
    founder.post_as(&basic, "/tags", json!({ "name": "after the backup" }), 200);
    browser.fill("typed", "kept");
    browser.press("Restore");
    browser.wait_for("the page asks who it is", "return heading() === 'Log in'");
    browser.fill("username", "admin");
    browser.fill("password", PASSWORD);
    browser.press("Log in");
    browser.wait_for("it is where it was", "return heading() === 'Backup & Restore'");
    browser.wait_for("the outcome is shown", "return text('.facts').includes('all members have the database')");
    assert_eq!(get(founder, "/tags"), json!([]));
    browser.screenshots("backups-restored");

    let bytes = browser.download("//a[@aria-label='Download kept']", &id);
    assert_eq!(bytes, fs::read(path).unwrap(), "what was downloaded is what lies on the disk");
    browser.press("Delete");
    browser.wait_for("it is asked", "return text('dialog h2') === 'Delete kept?'");
    browser.press("Delete");
    browser.wait_for("it is gone", "return text('main').includes('There is no backup on')");
    assert!(fs::metadata(path).is_err());
}

/// An authority of the administrator's own.
pub struct Authority {
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// A certificate for these names with its key, as one text.
    fn issue(&self, names: &[String]) -> String {
        let params = CertificateParams::new(names).unwrap();
        let key = KeyPair::generate().unwrap();
        params.signed_by(&key, &self.issuer).unwrap().pem() + &self.pem + &key.serialize_pem()
    }
}

pub fn certificates(browser: &Browser, founder: &Founder, own: &Authority) {
    const SERVED: &str = "text('[aria-label=Certificates] tbody')";
    browser.go("#/manage/certificates", "Certificates");
    browser.wait_for("it says until when", &format!("return /in \\d+ days/.test({SERVED})"));
    browser.fill("names", &format!("{BALANCER}\n{NAME}"));
    browser.press("Save and reissue");
    browser.wait_for("the new certificate is shown", &format!("return {SERVED}.includes('{BALANCER}')"));
    browser.fill("names", "not a name!");
    browser.press("Save and reissue");
    browser.wait_for("what is no name is refused", "return text('.problem').includes('cannot be in a certificate')");

    browser.fill("certificate", &own.issue(&[NAME.to_owned()]));
    browser.press("Upload");
    let lacks = format!("return problems().includes('{BALANCER}') && problems().includes('host1')");
    browser.wait_for("it says which names are missing", &lacks);
    browser.screenshots("certificate-refused");
    let address = founder.host.address.to_string();
    let names = [NAME, BALANCER, "host1", &address].map(str::to_owned);
    browser.fill("certificate", &own.issue(&names));
    browser.press("Upload");
    browser.wait_for("it is in use", "return text('main').includes('Uploaded for all Consoles by admin')");
    browser.screenshots("certificate-of-ones-own");
    // Connections from now on have the new one, which this browser trusts.
    browser.open("#/manage/certificates");
    browser.wait_for("the page goes on", "return text('main').includes('Uploaded for all Consoles by admin')");
    browser.press("Go back to the certificate of the cluster …");
    browser.press("Go back");
    browser.wait_for(
        "that of the cluster is back",
        "return !text('main').includes('Uploaded for all Consoles') && !document.querySelector('dialog')",
    );
}

/// Takes one event and accepts it; its head and its body.
fn receive(listener: &TcpListener) -> (String, String) {
    let (mut stream, _) = listener.accept().unwrap();
    let mut reading = BufReader::new(stream.try_clone().unwrap());
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(reading.read_line(&mut head).unwrap(), 0, "{head}");
    }
    let head = head.to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    reading.read_exact(&mut body).unwrap();
    stream.write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n").unwrap();
    (head, String::from_utf8(body).unwrap())
}

pub fn notifications(browser: &Browser, founder: &Founder) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, received) = mpsc::channel();
    thread::spawn(move || sender.send(receive(&listener)));

    browser.go("#/manage/system/settings", "Settings");
    browser.wait_for("there is none yet", "return text('main').includes('There is no webhook')");
    assert_eq!(browser.run("return button('Send a test').disabled"), json!(true));
    browser.press("Add a webhook");
    assert_eq!(browser.run("return document.activeElement.name"), "name-1", "one can type at once");
    browser.fill("name-1", "pager");
    browser.fill("url-1", "no address");
    browser.fill("secret-1", "of the receiver");
    browser.press("Save webhooks");
    browser.wait_for("a bad address is refused", "return problems().includes('the address of webhook')");
    browser.fill("url-1", &format!("http://{address}/hook"));
    browser.choose("severity-1", "critical");
    browser.press("Save webhooks");
    browser.wait_for("it is saved", "return said('events go to 1 webhook')");
    browser.press("Send a test");
    browser.wait_for("the result is shown", "return text('.checks .ok').includes('pager: delivered')");
    let (head, body) = received.recv_timeout(PATIENCE).unwrap();
    assert!(head.contains("x-twistlock-signature:") && body.contains("this is a test"), "{head}{body}");
    // Nobody listens there any more.
    assert!(TcpStream::connect(address).is_err());
    browser.press("Send a test");
    browser.wait_for("the failure is shown", "return text('.checks .bad').includes('pager: failed')");
    browser.screenshots("settings");

    // The secret stays for the same name and address only, and is not dropped without a word.
    browser.fill("name-2", "other");
    browser.press("Save webhooks");
    browser.wait_for("the secret is asked for", "return problems().includes('Enter the secret of other again')");
    let saved = get(founder, "/settings/notifications");
    assert_eq!(
        saved["webhooks"][0],
        json!({"name": "pager", "url": format!("http://{address}/hook"), "ca": null, "severity": "critical", "signed": true})
    );
    browser.press("Remove");
    browser.press("Save webhooks");
    browser.wait_for("there is none again", "return text('main').includes('There is no webhook')");
}

pub fn logins(browser: &Browser, founder: &Founder) {
    browser.fill("sessions", "0");
    browser.press("Save logins");
    browser.wait_for("what is out of range is refused", "return problems().includes('must be 1 to 1000')");
    browser.fill("sessions", "7");
    // By the keyboard alone.
    browser.fill("idle", &format!("45{ENTER}"));
    browser.wait_for("it is saved", "return said('for future sessions and passwords')");
    let logon = get(founder, "/settings/logon");
    let found = (&logon["sessionsPerUser"], &logon["sessionTimeoutSec"], &logon["strongPassword"]);
    assert_eq!(found, (&json!(7), &json!(45 * 60), &json!(false)));
}
