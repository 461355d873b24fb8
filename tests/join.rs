//! Joining, as an administrator does it: real daemons on loopback addresses, the real line in a real shell, APPLY over
//! HTTPS. Nothing is played by the test but the administrator and those who should not get in.

#[path = "join/backup.rs"]
mod backup;
#[path = "join/faults.rs"]
mod faults;
#[path = "join/host.rs"]
mod host;
#[path = "join/site.rs"]
mod site;

use std::time::{Duration, Instant};

use host::{Founder, Host, wait_until};
use serde_json::{Value, json};
use twistlock_ha::{admin::Custom, cluster::Role, control::Call};

/// Two hosts run the line, both show REQUEST_JOIN, APPLY, both are SECONDARY; what was written before and after is on both.
#[test]
fn two_hosts_join_with_the_line_and_have_everything() {
    let first = Founder::start();
    first.post("/tags", json!({"name": "before", "color": "#112233"}), 200);
    let line = first.line();
    let (mut second, mut third) = (first.host(2), first.host(3));
    let said = second.run_line(&line, "");
    assert!(said.contains("REQUEST_JOIN"), "{said}");
    let others = first.post("/high-availability/apply", json!({"fingerprints": ["AB"]}), 409);
    assert!(others["err"].as_str().unwrap().contains("compare the fingerprints"), "{others}");
    let refused = first.post("/high-availability/apply", Value::Null, 409);
    assert!(refused["err"].as_str().unwrap().contains("on 1 more"), "{refused}");

    // Killed and started again, it is still the same host to the cluster.
    let asked = second.fingerprint();
    second.kill();
    second.rename("renamed");
    second.start();
    wait_until("the same request is shown again", || second.role() == Some(Role::RequestJoin));
    second.wait_status_page("REQUEST_JOIN");
    assert_eq!(second.fingerprint(), asked);
    let requests = first.status()["membership"]["requests"].clone();
    assert_eq!((requests.as_array().map(Vec::len), &requests[0]["name"]), (Some(1), &json!("renamed")), "{requests}");

    let said = third.run_line(&line, "--wget");
    let requests = first.status()["membership"]["requests"].clone();
    for (host, said) in [(&second, &second.fingerprint()), (&third, &said)] {
        let request =
            requests.as_array().unwrap().iter().find(|request| request["name"] == host.name.as_str()).unwrap();
        assert!(said.contains(request["fingerprint"].as_str().unwrap()), "{said}\n{request}");
        assert!(!request.to_string().contains("BEGIN"), "{request}");
    }

    let begin = Instant::now();
    first.post("/high-availability/apply", Value::Null, 200);
    // At the worst moment: admitted, and nothing fetched yet, or half of it.
    second.kill();
    second.start();
    for host in [&second, &third] {
        wait_until("SECONDARY after APPLY", || host.role() == Some(Role::Secondary));
    }
    println!("  from APPLY to SECONDARY on both (one of them killed meanwhile): {:?}", begin.elapsed());
    wait_until("both have a vote", || {
        let status = first.status();
        status["members"].as_array().is_some_and(|all| all.len() == 3 && all.iter().all(|one| one["voter"] == true))
    });
    for host in [&second, &third] {
        assert!(!host.data().join("join.json").exists() && !host.data().join("join-request.json").exists());
    }

    // The token was good for this APPLY only, and a member has nothing to do.
    let mut late = first.host(4);
    let said = late.fails_to_run_line(&line);
    assert!(said.contains("any more") && said.contains("Get a new line"), "{said}");
    let text = first.post_as(&host::token_of(&line), "/high-availability/requests", late.request(), 403);
    assert!(!text["err"].as_str().unwrap().is_empty());
    let said = second.run_line(&first.line(), "");
    assert!(said.contains("nothing to do"), "{said}");

    leave_and_come_back(&first, &mut third);
    first.post("/tags", json!({"name": "after", "color": "#112233"}), 200);
    for host in [&second, &third] {
        first.switch_over_to(host);
        let names = host.tags();
        assert_eq!(names, ["after", "before"], "{}", host.name);
    }
}

/// A removed member knows it, and joins again as a new one; its old data is set aside, once, wherever the line was cut off before.
fn leave_and_come_back(first: &Founder, host: &mut Host) {
    first.delete(&format!("/high-availability/members/{}", host.name), 200);
    wait_until("the removed host knows it", || host.role() == Some(Role::Removed));
    let line = first.line();
    host.dies_after(&["program", "stop", "user", "config", "aside", "join-file", "unit"], &line);
    let said = host.run_line(&line, "");
    assert!(said.contains("REQUEST_JOIN"), "{said}");
    let aside = |path: &std::path::Path| path.file_name().unwrap().to_string_lossy().starts_with("twistlock.removed-");
    let folders = std::fs::read_dir(host.data().parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    let kept: Vec<_> = folders.filter(|path| aside(path)).collect();
    assert!(kept.len() == 1 && kept[0].join("database").exists(), "{kept:?}");
    first.post("/high-availability/apply", Value::Null, 200);
    wait_until("SECONDARY again", || host.role() == Some(Role::Secondary));
    wait_until("three votes", || {
        let status = first.status();
        status["members"].as_array().is_some_and(|all| all.len() == 3 && all.iter().all(|one| one["voter"] == true))
    });
}

/// Tokens that are not good, and the hosts that have them.
#[test]
fn who_may_not_join_does_not() {
    let (first, other) = (Founder::start(), Founder::start());
    let (line, foreign) = (first.line(), other.line());
    let host = first.host(2);
    let requests = "/high-availability/requests";

    let wrong = format!("{}{}", &host::token_of(&line)[..70], "0".repeat(64));
    let refused = first.post_as(&wrong, requests, host.request(), 403);
    let other_cluster = first.post_as(&host::token_of(&foreign), requests, host.request(), 403);
    assert!(other_cluster["err"].as_str().unwrap().contains("another cluster"), "{refused} {other_cluster}");
    assert_eq!(first.get_as(&wrong, "/scripts/console.sh").0, 403);
    assert_eq!(first.get_as(&wrong, "/programs/twistlockd").0, 403);
    assert_eq!(first.get_as("", "/high-availability/requests/guess").0, 404);
    for path in ["/high-availability", "/high-availability/join-script", "/scripts/console.sh", "/programs/twistcli"] {
        assert_eq!(first.get_as("", path).0, 401, "{path}");
    }
    let mut broken = host.request();
    broken["csr"] = json!("-----BEGIN CERTIFICATE REQUEST-----");
    first.post_as(&host::token_of(&line), requests, broken, 409);

    // A join file that contradicts itself, or another cluster's CA behind a good token.
    let nowhere = ["127.0.0.1:1"];
    let file = |token: &str, ca: &str| json!({"token": token, "addresses": nowhere, "ca": ca});
    let mut host = host;
    for (file, problem) in [
        (file(&host::token_of(&line), &other.ca()), "vouches for"),
        (file("TWJ1.x", &first.ca()), "not a join token"),
        (file(&host::token_of(&line), &first.ca()), "127.0.0.1:1: "),
    ] {
        let said = host.cannot_ask_with(&file);
        assert!(said.contains(problem) && said.contains("cannot ask to join"), "{said}");
    }
}

/// Wherever the line is cut off, the next one goes on from there: one request, from a host that runs.
#[test]
fn the_line_may_be_cut_off_after_each_step() {
    let first = Founder::start();
    let (mut second, line) = (first.host(2), first.line());
    second.dies_after(&["program", "stop", "user", "config", "join-file", "unit"], &line);
    second.run_line(&line, "");
    assert_eq!(second.role(), Some(Role::RequestJoin));
    let asked = second.fingerprint();
    // With a daemon that runs, and has asked already.
    second.dies_after(&["program", "stop", "join-file", "start"], &line);
    second.run_line(&line, "");
    assert_eq!((second.role(), second.fingerprint()), (Some(Role::RequestJoin), asked));
    let requests = first.status()["membership"]["requests"].clone();
    assert_eq!(requests.as_array().map(Vec::len), Some(1), "{requests}");
}

/// Turned down, a host says so and waits for a new script; with that it can ask again, with the same key.
#[test]
fn a_host_that_was_turned_down_asks_again_with_a_new_script() {
    let first = Founder::start();
    let mut second = first.host(2);
    second.run_line(&first.line(), "");
    let asked = second.fingerprint();
    first.delete(&format!("/high-availability/requests/{}", second.name), 200);
    wait_until("the host knows that it was turned down", || second.role() == Some(Role::Removed));
    second.run_line(&first.line(), "");
    assert_eq!((second.role(), second.fingerprint()), (Some(Role::RequestJoin), asked));
    let requests = first.status()["membership"]["requests"].clone();
    assert_eq!(requests.as_array().map(Vec::len), Some(1), "{requests}");
}

/// Nobody who guesses gets in, fills the memory or keeps a real host away.
#[test]
fn ten_thousand_bogus_requests_change_nothing() {
    let first = Founder::start();
    let mut second = first.host(2);
    let before = first.memory_kib();
    let begin = Instant::now();
    let mut answers = std::collections::BTreeMap::new();
    for number in 0..10_000 {
        let token = format!("TWJ1.{:064x}.{number:064x}", 7);
        *answers.entry(first.knock(&token, &second.request())).or_insert(0) += 1;
    }
    println!("  10000 bogus requests in {:?}: {answers:?}", begin.elapsed());
    assert!(answers.keys().all(|status| [401, 403, 429].contains(status)), "{answers:?}");
    let grown = first.memory_kib().saturating_sub(before);
    assert!(grown < 64 << 10, "grown by {grown} KiB");
    assert_eq!(first.status()["membership"]["requests"], Value::Null);
    // It comes from the same address as those who guess, which is heard again after some seconds.
    let line = first.line();
    wait_until("the address is heard again", || first.get_as(&host::token_of(&line), "/scripts/console.sh").0 == 200);
    second.run_line(&line, "");
    assert!(begin.elapsed() < Duration::from_secs(300));
}

/// The Consoles serve a certificate that hosts which join cannot know: the line and the daemon ask for the cluster's own.
#[test]
fn hosts_join_although_the_consoles_serve_a_certificate_of_another_authority() {
    let first = Founder::start();
    let line = first.line();
    let (_, audits) = first.get_as(&host::basic(), "/audits/mgmt?limit=5");
    assert!(audits.contains("\"invite\""), "{audits}");
    let made = rcgen::generate_simple_self_signed(vec![first.host.address.to_string()]).unwrap();
    let pem = [made.cert.pem(), made.signing_key.serialize_pem()].concat();
    let _: Custom =
        first.host.operate(Call::post("settings/custom-certs").with(json!({ "certificate": pem }))).unwrap();
    let url = first.host.url("/_ping");
    let others = first.agent_for(Duration::from_secs(5));
    wait_until("the certificate is served", || others.get(&url).call().is_err());
    let (mut second, mut third) = (first.host(2), first.host(3));
    // wget cannot be told which name to ask for.
    for (host, options) in [(&mut second, ""), (&mut third, "--wget")] {
        let said = host.run_line(&line, options);
        assert!(said.contains("Downloading twistlockd") && said.contains("REQUEST_JOIN"), "{said}");
    }
    let _: Value = first.host.operate(Call::post("high-availability/apply")).unwrap();
    for host in [&second, &third] {
        wait_until("SECONDARY after APPLY", || host.role() == Some(Role::Secondary));
        // It serves the same one, which is not good for it: said, and not hidden.
        wait_until("the newcomer says what its certificate lacks", || {
            let warnings = host.status().map(|status| status.warnings).unwrap_or_default();
            warnings.iter().any(|warning| warning.contains(&format!("({})", host.address)))
        });
    }
}
