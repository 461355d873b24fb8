//! What APPLY and requests refuse, without a cluster. With one: `tests/admin.rs`.

use super::*;
use crate::cluster::{ClusterId, Member, feature_level};

const VERSION: &str = "1.2.3";

fn join(name: &str) -> JoinRequest {
    let (csr, _) = pki::node_request(name, &["192.0.2.9"]).unwrap();
    let (console_csr, _) = pki::console_request(&["console.example"]).unwrap();
    JoinRequest {
        name: name.to_owned(),
        address: "192.0.2.9".to_owned(),
        port: 8086,
        version: VERSION.to_owned(),
        level: feature_level(),
        csr,
        console_csr,
        console_names: vec!["console.example".to_owned(), "192.0.2.9".to_owned(), "2001:db8::9".to_owned()],
        time_ms: 0,
    }
}

fn request(name: &str) -> Request {
    let JoinRequest { name, address, port, version, level, csr, console_csr, console_names, .. } = join(name);
    let fingerprint = SigningRequest::parse(&csr).unwrap().fingerprint().to_owned();
    let id = format!("secret-{name}");
    let (clock_ms, at, until) = (0, 10, 20);
    Request {
        id,
        name,
        address,
        port,
        version,
        level,
        fingerprint,
        csr,
        console_csr,
        console_names,
        clock_ms,
        at,
        until,
    }
}

fn membership(members: NodeId, requests: &[Request]) -> Membership {
    let member = |id| Member::founder(id, &format!("node{id}"), &format!("192.0.2.{id}"), 8086);
    let mut founded = Membership::founded(ClusterId(7), (1..=members).map(member).collect());
    founded.shared.requests = requests.to_vec();
    founded
}

fn why(membership: &Membership, now: u64) -> Vec<String> {
    objections(membership, now)
}

#[test]
fn apply_names_everything_that_is_in_the_way_at_once() {
    assert_eq!(why(&membership(1, &[request("b"), request("c")]), 19), Vec::<String>::new());
    assert_eq!(why(&membership(2, &[request("c")]), 19), Vec::<String>::new());
    assert!(why(&membership(3, &[]), 19)[0].contains("complete"));
    let early = why(&membership(1, &[request("b")]), 19);
    assert!(early.len() == 1 && early[0].contains("run the join script on 1 more"), "{early:?}");
    // Another version is no hindrance, a program that lacks what the cluster relies on is.
    let newer = Request { version: "9.0.0".to_owned(), level: feature_level() + 1, ..request("b") };
    assert_eq!(why(&membership(2, &[newer]), 19), Vec::<String>::new());
    let older = Request { version: "1.0.0".to_owned(), level: feature_level() - 1, clock_ms: -1_001, ..request("b") };
    let late = Request { clock_ms: 1_000, until: 19, ..request("c") };
    let mut all = membership(1, &[older, late]);
    all.roster.members[0].voter = false;
    let found = why(&all, 19).join("\n");
    let (has, level) = (feature_level() - 1, feature_level());
    for part in [
        &*format!(
            "b runs version 1.0.0, which has feature level {has}, but the cluster runs level {level}: install version"
        ),
        "the clock of b is 1001 ms behind",
        "the request of c has expired",
        "node1 is still being brought up to date",
    ] {
        assert!(found.contains(part), "{part}: {found}");
    }
    assert!(!found.contains("clock of c"), "{found}");
}

#[test]
fn what_a_host_says_is_checked() {
    assert_eq!(sound(&join("b")).unwrap().len(), 95);
    let refused = |edit: fn(&mut JoinRequest)| {
        let mut request = join("b");
        edit(&mut request);
        sound(&request).unwrap_err()
    };
    assert!(refused(|host| host.name = "a b".to_owned()).contains("not a host name"));
    assert!(refused(|host| host.port = 0).contains("port 0"));
    assert!(refused(|host| host.version = "1\n2".to_owned()).contains("not readable"));
    assert!(refused(|host| host.version = "1".repeat(65)).contains("not readable"));
    assert!(refused(|host| host.console_names.clear()).contains("1 to 32"));
    assert!(refused(|host| host.console_names = vec!["a".to_owned(); 33]).contains("1 to 32"));
    assert!(refused(|host| host.console_names.push("<b>".to_owned())).contains("cannot be in"));
    assert!(refused(|host| host.csr = "no".to_owned()).contains("the node's certificate: "));
    assert!(refused(|host| host.console_csr = "no".to_owned()).contains("the Console's certificate: "));
    assert!(refused(|host| host.console_csr = host.csr.clone()).contains("key of its own"));
}

#[test]
fn a_request_is_found_by_name_fingerprint_and_id() {
    let (b, c) = (request("b"), request("c"));
    let both = [b.clone(), c.clone()];
    for wanted in ["b", "secret-b", &b.fingerprint[..11]] {
        assert_eq!(find(&both, wanted).unwrap().name, "b", "{wanted}");
    }
    assert!(find(&both, "d").unwrap_err().contains("b and c ask to join"));
    assert!(find(&both, "").is_err());
    assert!(find(&[], "b").unwrap_err().contains("no host"));
    let twin = Request { fingerprint: format!("{}:00", &b.fingerprint[..11]), ..c };
    assert!(find(&[b.clone(), twin], &b.fingerprint[..11]).unwrap_err().contains("more than one"));
}

#[test]
fn asking_again_with_the_same_keys_changes_nothing() {
    let old = request("b");
    let key = pki::new_key().unwrap();
    let console = |csr: &str| Request { console_csr: csr.to_owned(), at: 11, until: 21, clock_ms: 9, ..old.clone() };
    let (first, second) = (pki::request_with(&key, "b", &[]).unwrap(), pki::request_with(&key, "b", &[]).unwrap());
    assert!(says_the_same(&console(&first), &console(&second)));
    assert!(!says_the_same(&old, &console(&first)), "another key for the Console must be noted");
    assert!(!says_the_same(&old, &Request { clock_ms: 500, ..old.clone() }));
    assert!(!says_the_same(&old, &Request { version: "2".to_owned(), ..old.clone() }));
}

#[test]
fn rejections_are_remembered_for_old_tokens_only_and_not_for_ever() {
    let mut rejections = Rejections::default();
    for number in 0..2 * REMEMBERED {
        rejections.add(&request(&format!("host{number}")), vec![format!("hash{number}")], "admin");
    }
    assert_eq!(rejections.0.len(), REMEMBERED);
    let id = format!("secret-host{}", 2 * REMEMBERED - 1);
    let Some(RequestState::Rejected { reason }) = rejections.find(|rejected| rejected.id == id) else { panic!() };
    assert!(reason.contains("admin"));
    assert!(rejections.find(|rejected| rejected.id == "secret-host0").is_none());
    rejections.forget(&id);
    assert!(rejections.find(|rejected| rejected.id == id).is_none() && rejections.0.len() == REMEMBERED - 1);
}

#[test]
fn secrets_are_compared_whole() {
    assert!(same_secret("abc", "abc"));
    for other in ["abd", "ab", "abcd", ""] {
        assert!(!same_secret("abc", other), "{other}");
    }
}
