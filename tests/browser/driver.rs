//! A browser: Chromium behind its driver, and the dozen commands of the WebDriver protocol that the tests need. No crate for
//! them: they are JSON over HTTP, and the crates bring a licence that deny.toml does not list, or a second HTTP client.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;
use ureq::Agent;

use super::{PATIENCE, stage::NAME};

/// What scripts of the tests may use: how the page is looked at.
const WORDS: &str = r#"
    const text = (css) => document.querySelector(css)?.textContent ?? '';
    const heading = () => text('main h1');
    const disabled = (css) => document.querySelector(css).disabled;
    const rows = () => [...document.querySelectorAll('[aria-label=Nodes] tbody tr')];
    const row = (name) => rows().find((row) => row.querySelector('strong').textContent === name)?.textContent ?? '';
    const state = (name) => rows().find((row) => row.querySelector('strong').textContent === name)
        ?.querySelector('.badge').textContent;
    const button = (label) => [...document.querySelectorAll('button')].find((one) => one.textContent === label);
    const said = (words) => [...document.querySelectorAll('.toast')].some((one) => one.textContent.includes(words));
    const problems = () => [...document.querySelectorAll('.problem')].map((one) => one.textContent).join('|');
    const healthy = () => document.querySelector('.banner')?.matches('.good') ?? false;
"#;

/// A browser window. Ends with this value.
pub struct Browser {
    driver: Child,
    session: String,
    agent: Agent,
    _folder: TempDir,
}

impl Browser {
    /// A fresh browser that trusts these authorities and nothing else that is new.
    pub fn start(authorities: &[&str]) -> Self {
        Self::start_like(authorities, false)
    }

    /// A fresh browser whose user goes on whatever it warns of.
    pub fn start_credulous() -> Self {
        Self::start_like(&[], true)
    }

    fn start_like(authorities: &[&str], credulous: bool) -> Self {
        let folder = tempfile::Builder::new().prefix("twb").tempdir().unwrap();
        trust(folder.path(), authorities);
        let mut driver = Command::new("chromedriver")
            .args(["--port=0"])
            .env("HOME", folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(driver.stdout.take().unwrap());
        let port = port_of(&mut said);
        // Nobody reads on, and a full pipe would stop the driver.
        thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        let agent: Agent = Agent::config_builder()
            .proxy(None)
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .build()
            .into();
        let mut browser = Self { driver, session: format!("http://127.0.0.1:{port}/session"), agent, _folder: folder };
        let profile = browser._folder.path().join("profile");
        let answer = browser.call("POST", "", &capabilities(&profile, credulous));
        browser.session = format!("{}/{}", browser.session, answer["sessionId"].as_str().unwrap());
        browser.call("POST", "/timeouts", &json!({"script": PATIENCE.as_millis() as u64}));
        let granted = json!({"descriptor": {"name": "clipboard-read"}, "state": "granted"});
        browser.open("");
        browser.call("POST", "/permissions", &granted);
        browser
    }

    /// One command; its value, or a failed test.
    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        self.try_call(method, path, body).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    fn try_call(&self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        let request = ureq::http::Request::builder().method(method).uri(format!("{}{path}", self.session));
        let sent = match method {
            "POST" => {
                self.agent.run(request.header("content-type", "application/json").body(body.to_string()).unwrap())
            }
            _ => self.agent.run(request.body(()).unwrap()),
        };
        let mut response = sent.map_err(|error| error.to_string())?;
        let limit = response.body_mut().with_config().limit(64 << 20);
        let answer: Value = limit.read_json().map_err(|error| error.to_string())?;
        match answer["value"]["error"].as_str() {
            Some(error) => Err(format!("{error}: {}", answer["value"]["message"].as_str().unwrap_or_default())),
            None => Ok(answer["value"].clone()),
        }
    }

    fn devtools(&self, command: &str, parameters: Value) -> Value {
        self.call("POST", "/goog/cdp/execute", &json!({"cmd": command, "params": parameters}))
    }

    /// Loads the page anew, at this hash.
    pub fn open(&self, hash: &str) {
        self.call("POST", "/url", &json!({"url": "about:blank"}));
        self.call("POST", "/url", &json!({"url": format!("https://{NAME}:8083/{hash}")}));
    }

    /// Loads a page of another server.
    pub fn visit(&self, url: &str) {
        self.call("POST", "/url", &json!({"url": url}));
    }

    /// Opens a page by its link.
    pub fn go(&self, hash: &str, title: &str) {
        self.run(&format!("window.location.hash = {}", json!(hash)));
        self.wait_for("the page is opened", &format!("return heading() === {}", json!(title)));
    }

    /// The links of all pages, with their titles.
    pub fn pages(&self) -> Vec<(String, String)> {
        let links = self.run("return [...document.querySelectorAll('#nav a')].map((link) => [link.getAttribute('href'), link.textContent])");
        let pair = |link: &Value| {
            let title = link[1].as_str().unwrap();
            (link[0].as_str().unwrap().to_owned(), if title == "Console" { "Console log" } else { title }.to_owned())
        };
        links.as_array().unwrap().iter().map(pair).collect()
    }

    /// Runs a script in the page; see [`WORDS`].
    pub fn run(&self, script: &str) -> Value {
        self.call("POST", "/execute/sync", &json!({"script": format!("{WORDS}{script}"), "args": []}))
    }

    pub fn text(&self, css: &str) -> String {
        self.run(&format!("return text({})", json!(css))).as_str().unwrap().to_owned()
    }

    /// Polls until the script returns true.
    pub fn wait_for(&self, what: &str, script: &str) {
        let begin = Instant::now();
        let script = json!({"script": format!("{WORDS}{script}"), "args": []});
        while self.try_call("POST", "/execute/sync", &script) != Ok(Value::Bool(true)) {
            if begin.elapsed() > PATIENCE {
                self.shoot("failed", 1280, false);
                panic!("waited too long until {what}; the page says: {}", self.text("body"));
            }
            thread::park_timeout(Duration::from_millis(50));
        }
    }

    /// The last element that a selector or an XPath finds: a dialog comes after the page.
    fn find(&self, using: &str, value: &str) -> String {
        let begin = Instant::now();
        loop {
            let found = self.call("POST", "/elements", &json!({"using": using, "value": value}));
            let ids = found.as_array().and_then(|found| found.last()).and_then(Value::as_object);
            if let Some(id) = ids.and_then(|ids| ids.values().next()).and_then(Value::as_str) {
                return id.to_owned();
            }
            assert!(begin.elapsed() < PATIENCE, "there is no {value}; the page says: {}", self.text("body"));
            thread::park_timeout(Duration::from_millis(50));
        }
    }

    /// Types into a field, by its name, as with a keyboard.
    pub fn fill(&self, name: &str, text: &str) {
        let id = self.find("css selector", &format!("[name={name}]"));
        self.call("POST", &format!("/element/{id}/clear"), &json!({}));
        self.call("POST", &format!("/element/{id}/value"), &json!({"text": text}));
    }

    /// Chooses an entry of a list.
    pub fn choose(&self, name: &str, value: &str) {
        let id = self.find("css selector", &format!("[name={name}] option[value={}]", json!(value)));
        self.call("POST", &format!("/element/{id}/click"), &json!({}));
    }

    /// Clicks a button with the mouse: it must be visible, enabled, not covered, and not that of a form which is being sent.
    pub fn press(&self, label: &str) {
        let begin = Instant::now();
        loop {
            let idle = "not(@disabled) and not(@type='submit' and ancestor::form[@aria-busy])";
            let id = self.find("xpath", &format!("//button[normalize-space(.)='{label}' and {idle}]"));
            match self.try_call("POST", &format!("/element/{id}/click"), &json!({})) {
                Ok(_) => return,
                // The page was drawn anew at this moment, or a message was in the way.
                Err(error) => assert!(begin.elapsed() < PATIENCE, "{label}: {error}"),
            }
            thread::park_timeout(Duration::from_millis(50));
        }
    }

    /// Clicks a link that downloads a file of this name; its bytes.
    pub fn download(&self, link: &str, name: &str) -> Vec<u8> {
        let folder = self._folder.path().join("downloads");
        fs::create_dir_all(&folder).unwrap();
        self.devtools("Page.setDownloadBehavior", json!({"behavior": "allow", "downloadPath": folder}));
        let id = self.find("xpath", link);
        self.call("POST", &format!("/element/{id}/click"), &json!({}));
        let (begin, file) = (Instant::now(), folder.join(name));
        // It has another name until it is whole.
        while !file.exists() {
            assert!(begin.elapsed() < PATIENCE, "{name} was not downloaded");
            thread::park_timeout(Duration::from_millis(20));
        }
        fs::read(file).unwrap()
    }

    /// What a paste would give.
    pub fn clipboard(&self) -> String {
        let script =
            "const done = arguments[0]; navigator.clipboard.readText().then(done, (error) => done('' + error))";
        let text = self.call("POST", "/execute/async", &json!({"script": script, "args": []}));
        text.as_str().unwrap().to_owned()
    }

    /// From the next [`Self::open`] on, every text in every answer of the API ends in `text`.
    pub fn poison(&self, text: &str) {
        let source = include_str!("poison.js").replace("POISON", &json!(text).to_string());
        self.devtools("Page.addScriptToEvaluateOnNewDocument", json!({"source": source}));
    }

    /// Pictures of the whole page: narrow and wide, light and dark. Nothing may be wider than the window.
    pub fn screenshots(&self, name: &str) {
        for (width, dark) in [(400, false), (400, true), (1280, true), (1280, false)] {
            self.shoot(name, width, dark);
            let overflow =
                self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth");
            assert!(
                overflow.as_i64().is_some_and(|overflow| overflow <= 0),
                "{name} is too wide at {width} px: {overflow}"
            );
        }
    }

    fn shoot(&self, name: &str, width: u32, dark: bool) {
        let theme = if dark { "dark" } else { "light" };
        self.devtools(
            "Emulation.setEmulatedMedia",
            // Without motion: a picture in the middle of a change of colours shows neither.
            json!({"features": [
                {"name": "prefers-color-scheme", "value": theme},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ]}),
        );
        let size = |height: &Value| json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.devtools("Emulation.setDeviceMetricsOverride", size(&json!(800)));
        let height = self.run("return Math.max(600, document.documentElement.scrollHeight)");
        self.devtools("Emulation.setDeviceMetricsOverride", size(&height));
        let shot = self.devtools("Page.captureScreenshot", json!({"format": "png", "captureBeyondViewport": true}));
        self.devtools("Emulation.setDeviceMetricsOverride", size(&json!(900)));
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/screenshots");
        fs::create_dir_all(&folder).unwrap();
        let png = BASE64_STANDARD.decode(shot["data"].as_str().unwrap()).unwrap();
        fs::write(folder.join(format!("{name}-{width}-{theme}.png")), png).unwrap();
    }

    /// Nothing ran that is not ours, and the page made no mistake.
    pub fn assert_clean(&self) {
        assert_eq!(self.run("return typeof window.hacked"), "undefined");
        let strange =
            "return document.querySelectorAll('img, iframe, object, body script, main svg[onload], [onerror]').length";
        assert_eq!(self.run(strange), 0);
        let log = self.call("POST", "/se/log", &json!({"type": "browser"}));
        let bad = |entry: &&Value| {
            let message = entry["message"].as_str().unwrap_or_default();
            ["Content Security Policy", "Refused to", "Uncaught", "TrustedHTML", "TrustedScript"]
                .iter()
                .any(|word| message.contains(word))
        };
        let bad: Vec<_> = log.as_array().unwrap().iter().filter(bad).collect();
        assert!(bad.is_empty(), "{bad:?}");
        // Last, since the browser notes it down: even a mistake in the page could not make markup out of text.
        let markup = "try { document.body.insertAdjacentHTML('beforeend', '<b></b>'); return 'done' } catch { return 'refused' }";
        assert_eq!(self.run(markup), "refused");
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Ends the browser; without it, the driver would leave it behind.
        let _ = self.try_call("DELETE", "", &Value::Null);
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

/// Puts the authorities where Chromium looks for those that a user has added.
fn trust(home: &Path, authorities: &[&str]) {
    let (folder, file) = (home.join(".pki/nssdb"), home.join("ca.pem"));
    fs::create_dir_all(&folder).unwrap();
    let database = format!("sql:{}", folder.display());
    let certutil = |arguments: &[&str]| {
        let output = Command::new("certutil").args(["-d", &database]).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    certutil(&["-N", "--empty-password"]);
    for (number, authority) in authorities.iter().enumerate() {
        fs::write(&file, authority).unwrap();
        certutil(&["-A", "-t", "C,,", "-n", &number.to_string(), "-i", file.to_str().unwrap()]);
    }
}

/// The driver says where it listens.
fn port_of(said: &mut impl BufRead) -> u16 {
    let mut all = String::new();
    loop {
        let mut line = String::new();
        assert_ne!(said.by_ref().take(4096).read_line(&mut line).unwrap(), 0, "chromedriver has ended: {all}");
        if let Some((_, port)) = line.rsplit_once("successfully on port ") {
            return port.trim().trim_end_matches('.').parse().unwrap();
        }
        all.push_str(&line);
    }
}

fn capabilities(profile: &Path, credulous: bool) -> Value {
    let profile = format!("--user-data-dir={}", profile.display());
    // With the system's resolver all addresses of a name are tried; Chromium's own takes the first one of a hosts file.
    let arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-features=AsyncDns",
        "--hide-scrollbars",
        &profile,
    ];
    json!({"capabilities": {"alwaysMatch": {
        "acceptInsecureCerts": credulous,
        "goog:chromeOptions": {"args": arguments},
        "goog:loggingPrefs": {"browser": "ALL"},
    }}})
}
