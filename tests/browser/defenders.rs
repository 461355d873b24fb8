//! Defenders on the page: a host is installed with the line that the page shows, gets its policy from the page, and what it
//! tells is seen there.

use std::fs;

use serde_json::json;

use super::{
    agent::{Agent, said},
    driver::Browser,
    host::{Founder, basic, wait_until},
};

const ROWS: &str = "text('[aria-label=Defenders] tbody')";

/// The whole story.
pub fn play(browser: &Browser, founder: &Founder) {
    let agent = Agent::new();
    install(browser, &agent);
    policy(browser, &agent);
    events(browser, &agent);
    settings(browser, founder);
    withdraw(browser, &agent);
}

fn install(browser: &Browser, agent: &Agent) {
    browser.go("#/manage/defenders", "Defenders");
    browser.wait_for("there is none", "return text('main').includes('There is no Defender yet')");
    browser.press("Show the install line");
    browser.wait_for("the line is shown", "return text('#install-line').endsWith('/scripts/defender.sh | sudo bash')");
    browser.press("Copy");
    browser.wait_for("it says that it is copied", "return document.body.innerText.includes('Copied to the clipboard')");
    let line = browser.clipboard();
    assert_eq!(browser.text("#install-line"), line);
    let output = agent.run_line(&line, "--name web1");
    assert!(output.status.success(), "{}", said(&output));
    browser.wait_for("it is connected", &format!("return {ROWS}.includes('web1') && {ROWS}.includes('connected')"));
    browser.screenshots("defenders");
    browser.fill("name", "no-such");
    browser.press("Search");
    browser.wait_for("none is found", "return text('main').includes('No Defender is like that')");
    browser.fill("name", "WEB");
    browser.choose("state", "connected");
    browser.press("Search");
    browser.wait_for("it is found", &format!("return {ROWS}.includes('web1')"));
}

fn policy(browser: &Browser, agent: &Agent) {
    browser.go("#/manage/defenders/policy", "Defender policy");
    browser.press("Add a path");
    let name = browser.run("return document.querySelector('[name^=path-]').name");
    let name = name.as_str().unwrap();
    browser.fill(name, "not/absolute");
    browser.press("Save as version 1");
    browser.wait_for("what is no path is refused", "return problems().includes('a path must be absolute')");
    browser.fill(name, &agent.watched().display().to_string());
    browser.press("Save as version 1");
    browser.wait_for("it is in force", "return text('[aria-label=Versions] tbody').includes('1 in force')");
    let version = r#""version":1"#;
    wait_until("the Defender has it", || agent.file("policy.json").contains(version));
    browser.press("Add a path");
    let last = "return [...document.querySelectorAll('[name^=path-]')].at(-1).name";
    browser.fill(browser.run(last).as_str().unwrap(), "/etc/hosts");
    browser.press("Save as version 2");
    browser.wait_for("it is in force", "return text('[aria-label=Versions] tbody').includes('2 in force')");
    browser.screenshots("defender-policy");
    browser.press("Show in the form");
    browser.wait_for(
        "the form has the old one",
        "return problems().includes('in force again when you save it, as version 3')",
    );
    browser.press("Save as version 3");
    browser.wait_for("it is in force", "return text('[aria-label=Versions] tbody').includes('3 in force')");
    let paths = browser.run("return [...document.querySelectorAll('[name^=path-]')].map((one) => one.value)");
    assert_eq!(paths, json!([agent.watched()]));
}

fn events(browser: &Browser, agent: &Agent) {
    let version = r#""version":3"#;
    wait_until("the Defender has it", || agent.file("policy.json").contains(version));
    browser.go("#/manage/defenders/events", "Defender events");
    let known = "return text('[aria-label=Events] tbody').includes('knows what there is')";
    browser.wait_for("it knows what there is", known);
    agent.write("first");
    let path = agent.watched().join("first").display().to_string();
    let shown = format!("return text('[aria-label=Events] tbody').includes({})", json!(format!("created {path}")));
    browser.wait_for("the event is shown by itself", &shown);
    fs::write(agent.watched().join("first"), "changed").unwrap();
    let shown = format!("return text('[aria-label=Events] tbody').includes({})", json!(format!("modified {path}")));
    browser.wait_for("the next one, too", &shown);
    browser.screenshots("defender-events");
    browser.choose("kind", "others");
    browser.press("Search");
    browser.wait_for("files are left out", "return !text('[aria-label=Events] tbody').includes('created')");
    browser.go("#/manage/defenders", "Defenders");
    browser.press("Events");
    browser.wait_for("those of one are shown", "return text('main').includes('Only those of web1')");
    browser.press("Show those of all");
    browser.wait_for("all are shown", "return !text('main').includes('Only those of')");
}

fn settings(browser: &Browser, founder: &Founder) {
    browser.go("#/manage/defenders", "Defenders");
    browser.fill("alert", "0.1");
    browser.press("Save");
    browser.wait_for("what is too short is refused", "return problems().includes('alertSec must be 900 to')");
    browser.fill("alert", "2");
    browser.fill("removal", "48");
    browser.press("Save");
    browser.wait_for("it is saved", "return said('Saved')");
    let (_, text) = founder.get_as(&basic(), "/settings/defenders");
    let set: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(set, json!({ "alertSec": 7_200, "removeSec": 172_800 }));
}

fn withdraw(browser: &Browser, agent: &Agent) {
    browser.press("Withdraw");
    browser.wait_for("it is asked", "return text('dialog h2') === 'Withdraw web1?'");
    browser.screenshots("defender-withdraw");
    browser.press("Withdraw");
    browser.wait_for("it is gone from the list", "return text('main').includes('There is no Defender yet')");
    wait_until("the Defender is told", || agent.log().contains("this Defender is withdrawn"));
    browser.choose("state", "withdrawn");
    browser.press("Search");
    browser.wait_for("it can be found", &format!("return {ROWS}.includes('shut out')"));
}
