//! The page of the service beside the Console: how it is, what it says, and its buttons.

use std::{fs, net::Ipv4Addr};

use super::{driver::Browser, pool::Pool, stage};

/// Says what it was asked for.
const PROGRAM: &str = "
import http.server, sys
class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(204)
        self.end_headers()
print('<b>the site</b> has begun', flush=True)
http.server.ThreadingHTTPServer.allow_reuse_address = True
http.server.ThreadingHTTPServer(('127.0.0.1', 18080), Site).serve_forever()
";
const PAGE: &str = "#/manage/system/service";

/// See the module.
pub fn play() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("site.py");
    fs::write(&program, PROGRAM).unwrap();
    let command = format!("python3 {}", program.display());
    let pool = Pool::start(&["--service", &command, "--service-ports", "18081:18080"]);
    stage::name_hosts(&[1, 2, 3].map(|number| Ipv4Addr::new(127, 0, 0, number)));
    let file = pool.file();
    let browser = Browser::start(&[&fs::read_to_string(&file.ca).unwrap()]);
    browser.open(PAGE);
    browser.wait_for("the page asks who it is", "return heading() === 'Log in'");
    browser.fill("username", &file.user);
    browser.fill("password", &file.password);
    browser.press("Log in");
    browser.wait_for(
        "it is ready",
        "return heading() === 'Service' && text('#service').includes('ready clients reach it')",
    );
    let shown = browser.text("#service");
    assert!(shown.contains("18081:18080") && shown.contains("site.py"), "{shown}");
    browser.wait_for("what it says, as text", "return text('.log').includes('<b>the site</b> has begun')");
    assert_eq!(
        browser.run("return [...document.querySelectorAll('.buttons .button')].map((one) => one.disabled).join()"),
        "true,false,false"
    );
    browser.screenshots("service");

    browser.press("Stop");
    browser.wait_for("it is asked", "return text('dialog').includes('lose their connections')");
    browser.run("[...document.querySelectorAll('dialog [type=submit]')].at(-1).click()");
    browser.wait_for("it is stopped, and why", "return text('#service').includes('An administrator stopped it')");
    browser.screenshots("service-stopped");
    browser.press("Start");
    browser.wait_for("it is ready again", "return text('#service').includes('ready clients reach it')");
    browser.assert_clean();
}
