//! The page, as an administrator uses it: headless Chromium through WebDriver, real daemons, the real join line. Owns the
//! story from the first sign-up to a takeover, and the proof that no text becomes markup. Must never reach a host but its own.

#[allow(dead_code, reason = "tests/e2e uses the rest")]
#[path = "join/agent.rs"]
mod agent;
#[path = "browser/defenders.rs"]
mod defenders;
#[path = "browser/driver.rs"]
mod driver;
#[allow(dead_code, reason = "tests/join.rs uses the rest")]
#[path = "join/host.rs"]
mod host;
#[path = "browser/pool.rs"]
mod pool;
#[path = "browser/service.rs"]
mod service;
#[path = "browser/setup.rs"]
mod setup;
#[path = "browser/stage.rs"]
mod stage;
#[path = "browser/waiting.rs"]
mod waiting;

use std::time::{Duration, Instant};

use driver::Browser;
use host::{Founder, Host, PASSWORD, wait_until};
use serde_json::json;
use stage::on_stage;
use twistlock_ha::pki;

/// How long anything may take; far above what a busy machine needs.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where the history, the nodes and everything else live.
const CLUSTER: &str = "#/manage/system/high-availability";

#[test]
fn from_the_first_sign_up_to_a_takeover() {
    on_stage("from_the_first_sign_up_to_a_takeover", || {
        let mut founder = Founder::start_without_administrator();
        let (mut second, mut third) = (founder.host(2), founder.host(3));
        stage::name_hosts(&[founder.host.address, second.address, third.address]);
        let browser = Browser::start(&[&founder.ca()]);
        sign_up_and_log_in(&browser);
        join(&browser, &mut [&mut second, &mut third]);
        let took_over = takeover(&browser, &mut founder);
        come_back(&browser, &mut founder, &took_over);
        without_a_primary(&browser, &mut founder, &mut second, &third);
        status_page(&browser, &mut founder, &mut second, &third);
    });
}

fn sign_up_and_log_in(browser: &Browser) {
    browser.open("");
    browser.wait_for("the page asks for the first administrator", "return heading() === 'Sign up'");
    browser.screenshots("sign-up");
    browser.fill("password", PASSWORD);
    browser.fill("again", "something else");
    browser.press("Create and log in");
    browser.wait_for("a slip is shown", "return text('.problem').includes('differ')");
    browser.fill("again", PASSWORD);
    browser.press("Create and log in");
    browser
        .wait_for("the cluster is shown", "return heading() === 'High Availability' && state('host1') === 'PRIMARY'");

    browser.press("Log out");
    browser.wait_for("the page asks who it is", "return heading() === 'Log in'");
    browser.screenshots("log-in");
    browser.fill("username", "admin");
    browser.fill("password", "not the password");
    browser.press("Log in");
    browser.wait_for("a wrong password is refused", "return text('.problem') !== ''");
    browser.fill("password", PASSWORD);
    browser.press("Log in");
    browser.wait_for("the cluster is shown again", "return state('host1') === 'PRIMARY'");
    assert_eq!(browser.run("return document.cookie"), "", "no script may see the session");
}

fn join(browser: &Browser, hosts: &mut [&mut Host]) {
    browser
        .wait_for("APPLY says what it needs", "return text('#apply-why').includes('on 2 more') && disabled('#apply')");
    browser.screenshots("alone");
    browser.press("Show the join line");
    browser.wait_for("the line is shown", "return text('#join-line').includes('| sudo bash')");
    browser.press("Copy");
    // Not what the button says, which is soon the old again.
    browser.wait_for("it says that it is copied", "return document.body.innerText.includes('Copied to the clipboard')");
    let line = browser.clipboard();
    assert_eq!(browser.run("return text('#join-line')"), line.as_str());
    let line = a_closed_line_vanishes(browser);

    for (number, host) in hosts.iter_mut().enumerate() {
        host.run_line(&line, "");
        host.wait_status_page("REQUEST_JOIN");
        let shown = format!("return state('{}') === 'REQUEST_JOIN'", host.name);
        browser.wait_for("the host asks to join", &shown);
        let fingerprint = host.fingerprint();
        assert!(browser.text("main").contains(&fingerprint), "the page shows the fingerprint of {}", host.name);
        let disabled = browser.run("return disabled('#apply')");
        assert_eq!(disabled, json!(number == 0), "APPLY needs exactly two that ask");
    }
    browser.screenshots("asking");
    browser.press("APPLY");
    browser.wait_for(
        "the question names the hosts",
        "return text('dialog').includes('host2') && text('dialog').includes('host3')",
    );
    browser.press("They are the same: APPLY");
    let begin = Instant::now();
    let both = "return state('host2') === 'SECONDARY' && state('host3') === 'SECONDARY' && healthy()";
    browser.wait_for("both are SECONDARY and the cluster is healthy", both);
    println!("  from APPLY to two SECONDARY hosts on the page: {:?}", begin.elapsed());
    browser.screenshots("whole");
}

/// The page offers no line that is good for nothing, and makes another one only when it is asked to. Returns that one.
fn a_closed_line_vanishes(browser: &Browser) -> String {
    let revoke = "fetch('/api/v1/high-availability/join-script',
        { method: 'DELETE', headers: { 'X-Twistlock-Page': '1' } }).then((answer) => { window.revoked = answer.status });";
    browser.run(revoke);
    browser.wait_for("it is revoked", "return window.revoked === 200");
    let gone = "return text('#join-line') === '' && text('main').includes('is no longer valid')";
    browser.wait_for("the line is gone", gone);
    browser.press("Show the join line");
    browser.wait_for("another line is shown", "return text('#join-line').includes('| sudo bash')");
    // It stays when the status has it.
    browser.wait_for(
        "the status is newer than the line",
        "window.first ??= performance.now(); return performance.now() - window.first > 3500",
    );
    browser.text("#join-line")
}

/// Kills the primary; returns the name of the next one.
fn takeover(browser: &Browser, founder: &mut Founder) -> String {
    browser.run(
        "window.lines = []; const place = document.getElementById('connection');
         new MutationObserver(() => window.lines.push(place.textContent))
             .observe(place, { childList: true, subtree: true, characterData: true });",
    );
    let begin = Instant::now();
    founder.host.kill();
    browser
        .wait_for("the page has found the new PRIMARY", "return text('#connection').includes('took over from host1')");
    println!("  from kill -9 to the page on the new PRIMARY: {:?}", begin.elapsed());
    let said = browser.text("#connection");
    println!("  the page says: {said}");
    let lines = browser.run("return window.lines.join('|')").to_string();
    assert!(lines.contains("The PRIMARY does not answer; looking for the new one"), "{lines}");
    assert!(said.contains("You are still logged in") && said.contains("without a PRIMARY for"), "{said}");
    let name = said.split(' ').next().unwrap().to_owned();
    browser.wait_for("the new one is shown", &format!("return state('{name}') === 'PRIMARY'"));
    browser.wait_for(
        "the old one is unavailable",
        "return row('host1').includes('unavailable') && state('host1') === 'DOWN'",
    );
    let warned = "return document.querySelector('.banner').matches('.bad') && text('.banner').includes('host1')";
    browser.wait_for("the banner is honest", warned);
    let told = "return text('[aria-labelledby=card-history]').includes('took over from host1')";
    browser.wait_for("the history has the takeover", told);
    println!("  from kill -9 to the takeover in the history on the page: {:?}", begin.elapsed());
    assert!(begin.elapsed() < Duration::from_secs(15), "the history is live: it took {:?}", begin.elapsed());
    browser.screenshots("one-down");
    name
}

fn come_back(browser: &Browser, founder: &mut Founder, primary: &str) {
    // Still logged in: a write, on the new primary, without a word about a password.
    browser.go("#/tags", "Tags");
    browser.fill("name", "after the takeover");
    browser.press("Add");
    browser.wait_for("the tag is there", "return text('main .tag') === 'after the takeover'");
    founder.host.start();
    browser.go(CLUSTER, "High Availability");
    let back = format!("return state('host1') === 'SECONDARY' && state('{primary}') === 'PRIMARY' && healthy()");
    browser.wait_for("the old one is SECONDARY", &back);
    browser.press("Switch over …");
    browser.wait_for("the checks are shown", "return document.querySelectorAll('dialog .checks .ok').length > 4");
    browser.screenshots("switch-over");
    browser.choose("to", "host1");
    browser.wait_for("its checks are shown", "return text('dialog .check-area').includes('host1 becomes PRIMARY')");
    let begin = Instant::now();
    browser.press("Switch over");
    browser.wait_for(
        "the page has followed the role",
        "return state('host1') === 'PRIMARY' && text('#connection').includes('host1 took over')",
    );
    println!("  from the press of the button to the page on the next PRIMARY: {:?}", begin.elapsed());
}

/// What no page may say while nobody knows.
const CLAIMS: &str = "['Loading', 'Nothing', 'There is no', 'just now', 'serves the Console', 'until APPLY'].filter((claim) => text('main').includes(claim)).join()";

/// Two of three hosts die: each page is grey and dated, says what to do, and its actions are off; then all is fresh at once.
fn without_a_primary(browser: &Browser, founder: &mut Founder, second: &mut Host, third: &Host) {
    let pages = browser.pages();
    assert!(pages.len() >= 8, "{pages:?}");
    // An open question is off, too.
    browser.press("Switch over …");
    browser.wait_for("the checks are shown", "return document.querySelectorAll('dialog .checks .ok').length > 4");
    founder.host.kill();
    second.kill();
    let begin = Instant::now();
    browser.wait_for("the page is grey", "return document.body.matches('.stale')");
    let took = begin.elapsed();
    println!("  from the loss of the majority to the grey page: {took:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    let submit = "return disabled('dialog [type=submit]') && document.querySelector('dialog [type=submit]').title.includes('no PRIMARY')";
    browser.wait_for("the question is off", submit);
    browser.press("Cancel");
    let said = browser.text("#connection");
    for part in ["No PRIMARY answers", "as of ", " s ago", "sudo twistcli ha status", "host3"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let link = browser.run("return [...document.querySelectorAll('#connection a')].map((link) => link.href).join(' ')");
    assert!(link.as_str().unwrap().contains(&format!("http://{}:8085/status", third.address)), "{link}");
    let told = browser.text("main");
    assert!(told.contains("Unknown: no PRIMARY answers") && told.contains("was PRIMARY at "), "{told}");
    assert_eq!(
        browser.run("return [state('host1'), state('host2'), state('host3')].join()"),
        "UNKNOWN,UNKNOWN,UNKNOWN"
    );
    browser.screenshots("no-primary");
    browser.run("window.before = row('host3')");
    browser.wait_for("ages go on", "return / s ago/.test(row('host3')) && row('host3') !== window.before");
    for (hash, title) in pages.iter().chain(&[(CLUSTER.to_owned(), "High Availability".to_owned())]) {
        browser.go(hash, title);
        browser.wait_for("it claims nothing", &format!("return {CLAIMS} === ''"));
        let off = "return [...document.querySelectorAll('main button')].every((one) => one.disabled)";
        browser.wait_for("its actions are off", off);
        let why =
            "return [...document.querySelectorAll('main [data-off]')].every((one) => one.title.includes('no PRIMARY'))";
        assert_eq!(browser.run(why), true, "{title}");
        println!(
            "  {title} without a PRIMARY: {:?}",
            browser.run("return text('main .empty')").as_str().unwrap_or_default()
        );
    }
    browser.go("#/manage/certificates", "Certificates");
    assert_eq!(
        browser.run("return document.querySelector('[name=names]')"),
        json!(null),
        "unknown names cannot be saved"
    );
    browser.go("#/manage/authentication/users", "Users");
    browser.wait_for("it says that it does not know", "return text('main .empty').includes('Unknown')");
    browser.screenshots("no-primary-users");
    second.start();
    browser.wait_for(
        "the page is fresh again",
        "return !document.body.matches('.stale') && text('main td').includes('admin') && button('Add').disabled === false",
    );
    assert_eq!(browser.run("return document.querySelectorAll('[data-off], [aria-disabled]').length"), 0);
    browser.go(CLUSTER, "High Availability");
    browser.wait_for("somebody is PRIMARY", "return [state('host2'), state('host3')].includes('PRIMARY')");
    browser.assert_clean();
}

/// What a new visitor finds: the status page of the member that is left, which leads to the Console when there is one again.
fn status_page(browser: &Browser, founder: &mut Founder, second: &mut Host, third: &Host) {
    second.kill();
    third.wait_status_page("NO PRIMARY");
    browser.visit(&format!("http://{}:8085/", third.address));
    let unknown = "return heading().includes('NO PRIMARY') && text('main').includes('unknown, last seen')";
    browser.wait_for("the page says that it does not know", unknown);
    browser.screenshots("status-page-no-primary");
    founder.host.start();
    second.start();
    browser.wait_for("the page follows by itself", "return heading().includes('is PRIMARY (3 of 3 members up)')");
    browser.screenshots("status-page");
    let console =
        browser.run("return [...document.querySelectorAll('a')].find((link) => link.href.startsWith('https:')).href");
    assert!(console.as_str().unwrap().ends_with(":8083/"), "{console}");
}

fn log_in(browser: &Browser) {
    browser.open("");
    browser.wait_for("the login is shown", "return heading() === 'Log in'");
    browser.fill("username", "admin");
    browser.fill("password", PASSWORD);
    browser.press("Log in");
    browser.wait_for("the cluster is shown", "return state('host1') === 'PRIMARY'");
}

#[test]
fn what_an_administrator_sets_up_does_what_the_page_says() {
    on_stage("what_an_administrator_sets_up_does_what_the_page_says", || {
        let founder = Founder::start();
        stage::name_hosts(&[founder.host.address]);
        let own = setup::Authority::new();
        let browser = Browser::start(&[&founder.ca(), &own.pem]);
        log_in(&browser);
        setup::backups(&browser, &founder);
        setup::notifications(&browser, &founder);
        setup::logins(&browser, &founder);
        setup::certificates(&browser, &founder, &own);
        browser.assert_clean();
    });
}

#[test]
fn defenders_are_installed_watched_and_withdrawn() {
    on_stage("defenders_are_installed_watched_and_withdrawn", || {
        let founder = Founder::start();
        stage::name_hosts(&[founder.host.address]);
        let browser = Browser::start(&[&founder.ca()]);
        log_in(&browser);
        defenders::play(&browser, &founder);
        browser.assert_clean();
    });
}

/// Defenders with these names, and one of them as a path that is watched.
fn hostile_defenders(founder: &Founder, names: &[&str]) {
    let invitation = founder.post("/defenders/tokens", json!({}), 200);
    for name in names {
        let csr = pki::request_with(&pki::new_key().unwrap(), "host", &[]).unwrap();
        let registration = json!({"token": invitation["token"], "name": name, "csr": csr});
        founder.post_as("", "/defenders/register", registration, 200);
    }
    let path = format!("/{}", names[0].replace('/', ""));
    founder.post("/defenders/policy", json!({"paths": [{"path": path}]}), 200);
}

#[test]
fn a_host_that_waits_is_signed_up_on_its_page() {
    on_stage("a_host_that_waits_is_signed_up_on_its_page", waiting::play);
}

#[test]
fn a_pool_shows_its_members_and_what_they_tolerate() {
    on_stage("a_pool_shows_its_members_and_what_they_tolerate", pool::play);
}

#[test]
fn a_service_is_shown_stopped_and_started() {
    on_stage("a_service_is_shown_stopped_and_started", service::play);
}

/// Names that people and programs choose come back as they were written, in every place that shows them.
#[test]
fn no_text_becomes_markup() {
    const HOSTILE: [&str; 3] = [
        "<img src=x onerror=\"window.hacked=1\">",
        "\"'><svg onload=window.hacked=1><script>window.hacked=1</script>",
        "javascript:window.hacked=1//{{7*7}}${7*7}",
    ];
    on_stage("no_text_becomes_markup", || {
        let founder = Founder::start();
        stage::name_hosts(&[founder.host.address]);
        hostile_defenders(&founder, &HOSTILE);
        for name in HOSTILE {
            founder.post("/tags", json!({"name": name, "color": "", "description": name}), 200);
            let user = json!({"username": name.replace(':', ";"), "password": "A-long-Pass-1234", "role": "auditor"});
            founder.post("/users", user, 200);
            founder.post_as("", "/authenticate", json!({"username": name, "password": name}), 401);
        }
        // Nobody listens there: a test of it fails, and says for whom.
        let hook = json!({"name": &HOSTILE[0], "url": "http://127.0.0.1:9/"});
        founder.post("/settings/notifications", json!({"webhooks": [hook]}), 200);
        let browser = Browser::start(&[&founder.ca()]);
        log_in(&browser);
        let pages = browser.pages();
        assert!(pages.len() >= 8, "{pages:?}");
        for (hash, title) in &pages {
            browser.go(hash, title);
            browser.screenshots(&format!("page-{}", title.to_lowercase().replace([' ', '&'], "-")));
        }
        for (hash, title, change) in [
            ("#/tags", "Tags", (":", ":")),
            ("#/manage/authentication/users", "Users", (":", ";")),
            ("#/manage/logs/history", "History", (":", ":")),
            ("#/manage/defenders", "Defenders", (":", ":")),
        ] {
            browser.go(hash, title);
            for name in HOSTILE {
                let shown = json!(name.replace(change.0, change.1)).to_string();
                browser.wait_for(
                    "the name is shown as it is",
                    &format!("return document.querySelector('main').textContent.includes({shown})"),
                );
            }
        }
        browser.go("#/manage/system/settings", "Settings");
        browser.press("Send a test");
        let failed = json!(format!("{}: failed", HOSTILE[0]));
        browser.wait_for("the target is shown as it is", &format!("return text('.checks .bad').includes({failed})"));
        // And now every text of every answer, also where the daemon would not let one in.
        browser.poison(HOSTILE[1]);
        for (hash, title) in &pages {
            browser.open(hash);
            browser.wait_for("the page is shown", &format!("return heading() === {}", json!(title)));
            // What these ask for may not be there, and then they show a sentence of their own, or it is in fields.
            let others = ["Backup & Restore", "Certificates", "Settings", "Defender events"];
            let place = if others.contains(&title.as_str()) { "body" } else { "main" };
            browser.wait_for("the poison has come", &format!("return text('{place}').includes('<svg onload')"));
        }
        for (_, title) in &pages {
            println!("  {title}: nothing but text");
        }
        browser.assert_clean();
        wait_until("the founder still serves", || founder.get_as("", "/_ping").0 == 200);
    });
}
