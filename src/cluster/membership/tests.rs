//! Every change from a membership of one host on, and what comes back from its bytes. Must never need a node.

use super::*;
use crate::cluster::{
    level::feature_level,
    limits::{MAX_CONSOLE_NAMES, MAX_ENCODED, MAX_ENCODED_BEFORE, MAX_NAME, MAX_NAMES, MAX_PEM, PER_NAME},
    roster::{MAX_ROSTER, MOST, Pause, SizePolicy},
    shared::{
        Invitation, MAX_CSR, MAX_OPEN, MAX_SHARED, Request,
        authority::{IncomingAuthority, SealedAuthority},
        console_certificate::{CustomCertificate, MAX_CHAIN, MAX_SEALED},
        console_names_that_fit,
        webhook::Webhook,
    },
    trust::KeyId,
};

fn request(id: NodeId) -> Request {
    Request {
        id: format!("request{id}"),
        name: format!("host{id}"),
        address: format!("127.0.0.{id}"),
        port: 8086,
        version: "1.2.3".to_owned(),
        level: feature_level(),
        fingerprint: format!("AB:{id}"),
        csr: String::new(),
        console_csr: String::new(),
        console_names: Vec::new(),
        clock_ms: 0,
        at: 10,
        until: 20,
    }
}

fn newcomer(id: NodeId) -> Newcomer {
    let request = format!("request{id}");
    Newcomer { id, request, certificate: String::new(), console_certificate: String::new() }
}

fn ask(membership: &Membership, id: NodeId) -> Membership {
    change(membership, Change::Request { request: request(id) }).unwrap()
}

fn one() -> Membership {
    Membership::founded(ClusterId(7), vec![Member::founder(1, "host1", "127.0.0.1", 8086)])
}

fn change(membership: &Membership, change: Change) -> Result<Membership, String> {
    membership.changed(&change, 1).map_err(|error| error.to_string())
}

/// A host that waited.
fn adopted(id: NodeId) -> Adoption {
    Adoption { request: request(id), newcomer: newcomer(id) }
}

#[test]
fn a_pool_takes_in_all_hosts_that_are_named_or_none() {
    let adopt = |membership: &Membership, ids: std::ops::RangeInclusive<NodeId>| {
        change(membership, Change::Adopt { hosts: ids.map(adopted).collect() })
    };
    assert!(adopt(&one(), 2..=3).unwrap_err().contains("join script"), "HA mode has APPLY");
    let mut pool = one();
    pool.roster.size = SizePolicy::pool();
    // From one to two, which is no complete pool yet, and on to seven.
    let two = change(&adopt(&pool, 2..=2).unwrap(), Change::Promote).unwrap();
    let five = adopt(&two, 3..=5).unwrap();
    assert_eq!((five.voters().count(), five.learners().collect::<Vec<_>>()), (2, vec![3, 4, 5]));
    let admission = five.get(4).and_then(|member| member.admission.clone()).unwrap();
    assert_eq!(admission.request, "request4", "by it the host picks up its certificates");
    let seven = adopt(&change(&five, Change::Promote).unwrap(), 6..=7).unwrap();
    assert_eq!(seven.roster.members.len(), 7);
    for (from, ids, why) in
        [(&seven, 8..=8, "more than the 7"), (&two, 3..=8, "more than the 7"), (&two, 1..=1, "meanwhile")]
    {
        assert!(adopt(from, ids).unwrap_err().contains(why));
    }
    let twin = Adoption { request: Request { name: "host1".to_owned(), ..request(3) }, newcomer: newcomer(3) };
    let error = change(&pool, Change::Adopt { hosts: vec![adopted(2), twin] }).unwrap_err();
    assert!(error.contains("cannot be told apart"), "{error}");
    assert!(change(&pool, Change::Adopt { hosts: Vec::new() }).is_err());
    // Who asks by a join script is left alone.
    let asked = ask(&two, 9);
    assert_eq!(change(&asked, Change::Adopt { hosts: vec![adopted(3)] }).unwrap().shared.requests.len(), 1);
}

#[test]
fn two_hosts_are_admitted_and_get_a_vote_together() {
    let asked = ask(&ask(&one(), 2), 3);
    let admitted = change(&asked, Change::Admit { hosts: vec![newcomer(2), newcomer(3)] }).unwrap();
    assert_eq!(admitted.learners().collect::<Vec<_>>(), [2, 3]);
    assert_eq!(admitted.roster.next_id, 4);
    let all = change(&admitted, Change::Promote).unwrap();
    assert_eq!(all.voters().collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(all.roster.members.iter().map(|member| member.rank).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(change(&all, Change::Request { request: request(4) }).unwrap_err().contains("complete"));
    assert!(change(&ask(&one(), 2), Change::Admit { hosts: vec![newcomer(2)] }).unwrap_err().contains("1 requests"));
    assert!(change(&all, Change::Promote).unwrap_err().contains("already"));
    assert_eq!(Membership::decode(&all.encode()).unwrap(), all);
}

/// Days may pass until the new authority signs.
#[test]
fn a_host_may_join_while_an_authority_is_introduced_and_is_waited_for() {
    let authority = |name: &str| {
        let (certificate, sealed_key) = (name.to_owned(), "sealed".to_owned());
        SealedAuthority { certificate, sealed_key, key: None }
    };
    let mut alone = one();
    alone.shared.authority = Some(authority("old"));
    let coming = IncomingAuthority { authority: authority("new"), overlap: 60 };
    let both = change(&ask(&alone, 2), Change::IntroduceAuthority { coming }).unwrap();
    assert_eq!(both.public().shared.coming.unwrap().authority.sealed_key, "");
    let switch = |membership: &Membership, at| change(membership, Change::SwitchAuthority { at });
    let asked = ask(&both, 3);
    assert!(switch(&asked, 19).unwrap_err().contains("on their way"));
    assert!(switch(&asked, 20).unwrap().shared.requests.is_empty(), "they have expired");
    let admitted = change(&asked, Change::Admit { hosts: vec![newcomer(2), newcomer(3)] }).unwrap();
    assert!(switch(&admitted, 90).unwrap_err().contains("on their way"));
    let all = change(&admitted, Change::Promote).unwrap();
    assert_eq!(switch(&all, 90).unwrap().shared.authority, Some(authority("new")));
}

#[test]
fn a_removed_member_leaves_its_rank_and_keeps_its_id() {
    let asked = ask(&ask(&one(), 2), 3);
    let admitted = change(&asked, Change::Admit { hosts: vec![newcomer(2), newcomer(3)] }).unwrap();
    let all = change(&admitted, Change::Promote).unwrap();
    let remove = |node| Change::Remove { node, at: 99, force: false };
    assert!(change(&all, remove(1)).unwrap_err().contains("switch over"));
    assert!(change(&all, remove(9)).unwrap_err().contains("not a member"));
    let two = change(&all, remove(2)).unwrap();
    assert_eq!(two.removed(2).unwrap().name, "host2");
    let asked = ask(&two, 2);
    assert!(change(&asked, Change::Admit { hosts: vec![newcomer(2)] }).unwrap_err().contains("meanwhile"));
    let again = Newcomer { id: 4, ..newcomer(2) };
    let three = change(&asked, Change::Admit { hosts: vec![again] }).unwrap();
    assert_eq!((three.rank(4), three.rank(3)), (Some(1), Some(2)));
}

#[test]
fn what_cannot_be_told_apart_or_dialled_is_refused() {
    let join = |edit: fn(&mut Request)| {
        let mut request = request(2);
        edit(&mut request);
        change(&one(), Change::Request { request })
    };
    assert!(join(|host| host.name = "host1".to_owned()).unwrap_err().contains("told apart"));
    assert!(join(|host| host.address = "127.0.0.1".to_owned()).unwrap_err().contains("told apart"));
    assert!(join(|host| host.name = "<script>".to_owned()).unwrap_err().contains("not a host name"));
    assert!(join(|host| host.address = "a b".to_owned()).unwrap_err().contains("neither"));
    assert!(join(|host| host.port = 0).unwrap_err().contains("port 0"));
    assert!(join(|host| host.csr = " ".repeat(MAX_CSR + 1)).unwrap_err().contains("too long"));
    assert!(join(|host| host.console_names = vec!["a".repeat(99); 9]).unwrap_err().contains("too long"));
    let fitting = console_names_that_fit(["b".to_owned(), "c".repeat(254)].into_iter().chain(vec!["a".repeat(99); 9]));
    assert_eq!(fitting.len(), 8, "the first ones are kept");
    let many = console_names_that_fit(vec!["a".repeat(9); 99]);
    assert_eq!(many.len(), MAX_CONSOLE_NAMES);
    for names in [fitting, many] {
        let host = Request { console_names: names, ..request(2) };
        change(&one(), Change::Request { request: host }).unwrap();
    }
    assert!(join(|_| {}).is_ok());
}

#[test]
fn requests_and_invitations_are_bounded_and_expire() {
    let asked = ask(&one(), 2);
    let other = Request { fingerprint: "CD".to_owned(), ..request(2) };
    assert!(change(&asked, Change::Request { request: other.clone() }).unwrap_err().contains("reject one"));
    let later = Request { at: 20, until: 30, ..other };
    assert_eq!(change(&asked, Change::Request { request: later.clone() }).unwrap().shared.requests, [later]);
    assert_eq!(ask(&asked, 2).shared.requests.len(), 1);
    assert!(change(&asked, Change::Reject { request: "request2".into() }).unwrap().shared.requests.is_empty());
    assert!(change(&asked, Change::Reject { request: "other".into() }).is_err());
    let invite = |membership: &Membership, at| {
        let invitation = Invitation { hash: format!("{at:x}"), at, until: at + 100, by: "admin".to_owned() };
        change(membership, Change::Invite { invitation })
    };
    let mut invited = one();
    for at in 0..MAX_OPEN as u64 {
        invited = invite(&invited, at).unwrap();
    }
    assert_eq!(invite(&invited, 101).unwrap().shared.invitations.len(), MAX_OPEN - 1, "two have expired");
    let ends =
        |membership: &Membership| membership.shared.invitations.iter().map(|open| open.until).collect::<Vec<_>>();
    invited.shared.invitations[0].until = 900;
    let more = invite(&invited, 99).unwrap();
    assert_eq!(ends(&more), [900, 102, 103, 104, 105, 106, 107, 199], "the one that ends first gives way");
    assert_eq!(ends(&invite(&more, 99).unwrap())[..2], [900, 103]);
    assert!(change(&invited, Change::Uninvite).unwrap().shared.invitations.is_empty());
    let secret = Invitation { hash: "0123456789abcdef".repeat(4), at: 1, until: 900, by: "admin".to_owned() };
    let shown = &change(&one(), Change::Invite { invitation: secret.clone() }).unwrap().public().shared.invitations[0];
    assert_eq!((&shown.hash, shown.until, shown.by.as_str()), (&secret.id(), 900, ""));
    assert!(shown.hash.len() * 4 <= 64, "what is shown proves nothing: {shown:?}");
}

#[test]
fn a_pause_names_who_may_serve() {
    let paused = change(&one(), Change::Pause { until: 5 }).unwrap();
    assert_eq!(paused.roster.pause, Some(Pause { until: 5, primary: 1 }));
    assert_eq!(change(&paused, Change::Resume).unwrap(), one());
    assert!(change(&one(), Change::Resume).unwrap_err().contains("not paused"));
}

#[test]
fn names_of_the_console_are_dns_names_or_addresses() {
    let set = |names: &[&str]| {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        change(&one(), Change::ConsoleNames { names })
    };
    let good = ["lb.example.com", "LB.example.com", "*.example.com", "192.0.2.7", "2001:db8::7", "console", "a_b"];
    let set_to = set(&good).unwrap();
    assert_eq!(set_to.shared.console_names[0], "lb.example.com");
    assert_eq!(set_to.shared.console_names.len(), good.len() - 1, "each once");
    assert_eq!(Membership::decode(&set_to.encode()).unwrap(), set_to);
    assert!(set(&[]).unwrap().shared.console_names.is_empty());
    for wrong in
        ["", "a b", "https://a", "a:8083", "*.com", "*", "a.*.b", "-a", "a..b", "1.2.3", "1.2.3.4.5", "a\n", "ä"]
    {
        assert!(set(&[wrong]).unwrap_err().contains("cannot be in a certificate"), "{wrong}");
    }
    assert!(set(&["a".repeat(64).as_str()]).is_err());
    let many: Vec<String> = (0..33).map(|n| format!("h{n}")).collect();
    assert!(change(&one(), Change::ConsoleNames { names: many }).unwrap_err().contains("at most 32 names"));
    let long = (0..30).map(|n| format!("{n}x.{}.example", "a".repeat(60))).collect();
    assert!(change(&one(), Change::ConsoleNames { names: long }).unwrap_err().contains("2048"));
}

#[test]
fn a_custom_certificate_is_bounded_and_not_for_everybody() {
    let with = |chain: usize, key: usize| {
        let (chain, sealed_key) = ("c".repeat(chain), "k".repeat(key));
        let certificate = Some(CustomCertificate { chain, sealed_key, key: KeyId(1), by: "admin".to_owned(), at: 7 });
        change(&one(), Change::CustomCertificate { certificate })
    };
    assert!(with(MAX_CHAIN + 1, 1).unwrap_err().contains("too long"));
    assert!(with(1, MAX_SEALED + 1).unwrap_err().contains("too long"));
    let largest = with(MAX_CHAIN, MAX_SEALED).unwrap();
    assert_eq!(Membership::decode(&largest.encode()).unwrap(), largest);
    assert_eq!(largest.public(), one());
    assert_eq!(change(&largest, Change::CustomCertificate { certificate: None }).unwrap(), one());
}

#[test]
fn a_level_rises_and_never_falls_and_an_older_program_reads_past_it() {
    let raise =
        |membership: &Membership, level| change(membership, Change::Raise { level, version: format!("{level}.0") });
    let mut old = one();
    (old.shared.level, old.shared.level_version) = (1, String::new());
    assert!(!String::from_utf8(old.encode()).unwrap().contains("level"), "as before there were levels");
    assert_eq!(Membership::decode(&old.encode()).unwrap(), old);
    let raised = raise(&old, 7).unwrap();
    assert_eq!((raised.shared.level, raised.shared.level_version.as_str()), (7, "7.0"));
    assert_eq!(Membership::decode(&raised.encode()).unwrap(), raised);
    for level in [6, 7] {
        assert!(raise(&raised, level).unwrap_err().contains("level 7 already"));
    }
    let paused = change(&raised, Change::Pause { until: 5 }).unwrap();
    assert_eq!(paused.shared.level, 7);
}

#[test]
fn damaged_and_newer_bytes_are_refused() {
    let bytes = one().encode();
    assert!(Membership::decode(&bytes[1..]).is_err());
    let newer = String::from_utf8(bytes).unwrap().replace("\"format\":1", "\"format\":2");
    assert!(Membership::decode(newer.as_bytes()).unwrap_err().contains("newer"));
    assert!(Membership::decode(&vec![b' '; MAX_ENCODED + 1]).is_err());
}

/// What the programs wrote before roster and shared were types of their own, all of it at once.
const WRITTEN: &str = r#"{"format":1,"cluster":"00000000000000000000000000000007","members":[
{"id":1,"name":"host1","address":"127.0.0.1","port":8086,"rank":0,"voter":true},
{"id":2,"name":"host2","address":"::2","port":8087,"rank":1,"voter":false,
"admission":{"request":"r2","certificate":"node","console_certificate":"console"}}],
"next_id":4,"removed":[{"id":3,"name":"host3","at":9}],"pause":{"until":5,"primary":1},
"requests":[{"id":"r4","name":"host4","address":"127.0.0.4","port":8086,"version":"1.2.3","level":2,"fingerprint":"AB:4",
"csr":"csr4","console_csr":"csr5","console_names":["a.example"],"clock_ms":-3,"at":10,"until":20}],
"invitations":[{"hash":"00ff","at":1,"until":9,"by":"admin"}],
"authority":{"certificate":"ca1","sealed_key":"sealed1","key":"00000000000000000000000000000001"},
"console_names":["lb.example"],
"custom_certificate":{"chain":"chain","sealed_key":"sealed2","key":"00000000000000000000000000000001","by":"admin","at":7},
"level":2,"level_version":"1.0.0","rekey":{"next":"00000000000000000000000000000005"},
"coming":{"authority":{"certificate":"ca2","sealed_key":"sealed3"},"overlap":60},"retired":{"certificate":"ca0","until":4},
"webhooks":[{"name":"ops","url":"https://a.example","secret":"s","ca":"ca3","severity":"critical"}]}"#;

#[test]
fn a_rolling_upgrade_reads_and_writes_what_the_older_programs_do() {
    let written = WRITTEN.replace('\n', "");
    let membership = Membership::decode(written.as_bytes()).unwrap();
    assert_eq!(String::from_utf8(membership.encode()).unwrap(), written, "the same bytes, so that they read it, too");
    let Membership { roster, shared, .. } = &membership;
    assert_eq!(roster.members[1].admission.as_ref().unwrap().console_certificate, "console");
    assert_eq!((roster.next_id, roster.removed[0].at, roster.pause.as_ref().unwrap().primary), (4, 9, 1));
    assert_eq!((shared.requests[0].clock_ms, shared.invitations[0].until, shared.level), (-3, 9, 2));
    assert_eq!(shared.coming.as_ref().unwrap().authority.key, None);
    assert_eq!(shared.rekey.unwrap().next, Some(KeyId(5)));
    let least = r#"{"format":1,"cluster":"00000000000000000000000000000007","members":[{"id":1,"name":"a","address":"b","port":1,"rank":0,"voter":true}],"next_id":2}"#;
    let first = Membership::decode(least.as_bytes()).unwrap();
    assert_eq!((String::from_utf8(first.encode()).unwrap().as_str(), first.shared.level), (least, 1));
}

/// A text of this length that differs from others by its beginning; a certificate has the line ends of PEM, as Windows
/// writes them.
fn long(begin: impl fmt::Display, length: usize) -> String {
    format!("{begin:x<length$}")
}

fn long_pem(length: usize) -> String {
    format!("{}\r\n", "A".repeat(64)).chars().cycle().take(length).collect()
}

/// One host, and all that is shared at its limit.
fn with_all_at_its_limit(size: SizePolicy) -> Membership {
    let mut membership = one();
    membership.roster.size = size;
    membership.shared.level = 3;
    let authority =
        |key| SealedAuthority { certificate: long_pem(2048), sealed_key: long("", 2048), key: Some(KeyId(key)) };
    let webhook = |n: u32| Webhook {
        name: long(n, 64),
        url: long(n, 512),
        secret: Some(long(n, 128)),
        ca: Some(long_pem(MAX_PEM)),
        severity: "critical".to_owned(),
    };
    let custom = CustomCertificate {
        chain: long_pem(MAX_CHAIN),
        sealed_key: long("", MAX_SEALED),
        key: KeyId(u128::MAX),
        by: long("", MAX_NAME),
        at: u64::MAX,
    };
    // 31 names of 63 bytes, and one of what is left of 2048.
    let names = (0..MAX_CONSOLE_NAMES).map(|n| if n < 31 { long(format!("n{n}-"), 63) } else { long("n-", 63) + ".a" });
    let changes = [
        Change::Authority { authority: authority(u128::MAX) },
        Change::ConsoleNames { names: names.collect() },
        Change::CustomCertificate { certificate: Some(custom) },
        Change::Notify { webhooks: (0..3).map(webhook).collect() },
        Change::PoolVersion { version: long("1.2.3-", MAX_NAME - 2) },
        Change::IntroduceAuthority { coming: IncomingAuthority { authority: authority(0), overlap: u64::MAX } },
    ];
    let membership = changes.into_iter().fold(membership, |membership, next| change(&membership, next).unwrap());
    (0..MAX_OPEN as u64).fold(membership, |membership, n| {
        let (at, until) = (1_700_000_000, u64::MAX - n);
        let invitation = Invitation { hash: long(n, 64), at, until, by: long("", MAX_NAME) };
        change(&membership, Change::Invite { invitation }).unwrap()
    })
}

/// A request with all at its limit, from a host that came before or after others.
fn largest_request(n: u64) -> Request {
    let names = vec![long("a", MAX_NAMES / 4 - PER_NAME); 4];
    Request {
        id: long(n, MAX_NAME),
        name: long(format!("host{n}-"), MAX_NAME),
        address: long(format!("10.0.0.{n}."), MAX_NAME),
        version: long("1.2.3-", MAX_NAME),
        fingerprint: long(n, MAX_NAME),
        csr: long_pem(MAX_CSR),
        console_csr: long_pem(MAX_CSR),
        console_names: names,
        clock_ms: i64::MIN,
        at: 1_700_000_000,
        until: u64::MAX,
        port: u16::MAX,
        ..request(n)
    }
}

/// What the primary makes of all requests.
fn apply(membership: &Membership) -> Membership {
    let newcomer = |(id, request): (NodeId, &Request)| Newcomer {
        id,
        request: request.id.clone(),
        certificate: long_pem(MAX_PEM),
        console_certificate: long_pem(MAX_PEM),
    };
    let hosts = (membership.roster.next_id..).zip(&membership.shared.requests).map(newcomer).collect();
    change(membership, Change::Admit { hosts }).unwrap()
}

#[test]
fn seven_members_with_everything_at_its_limit_fit() {
    let size = |membership: &Membership| {
        let length = |part: serde_json::Value| part.to_string().len();
        let roster = length(serde_json::to_value(&membership.roster).unwrap());
        let shared = length(serde_json::to_value(&membership.shared).unwrap());
        let all = membership.encode();
        assert!(roster <= MAX_ROSTER && shared <= MAX_SHARED && all.len() <= MAX_ENCODED, "{roster} {shared}");
        assert_eq!(Membership::decode(&all).unwrap(), *membership);
        (roster, shared, all.len())
    };
    let mut membership = with_all_at_its_limit(SizePolicy::pool());
    let ask = |membership: &Membership, n| change(membership, Change::Request { request: largest_request(n) }).unwrap();
    membership = (2..=7).fold(membership, |membership, n| ask(&membership, n));
    assert!(change(&membership, Change::Request { request: largest_request(8) }).unwrap_err().contains("complete"));
    let asked = size(&membership);
    // As many removals as are remembered, each of a host that was admitted with all at its limit.
    membership = change(&apply(&membership), Change::Promote).unwrap();
    membership.roster.removed = (0..32)
        .map(|n| (u64::MAX - n, long(n, MAX_NAME)))
        .map(|(id, name)| Removed { id, address: name.clone(), name, at: u64::MAX })
        .collect();
    for node in 2..=7 {
        membership = change(&membership, Change::Remove { node, at: u64::MAX, force: true }).unwrap();
    }
    assert_eq!((membership.roster.removed.len(), membership.roster.members.len()), (32, 1));
    membership = change(&membership, Change::Pause { until: u64::MAX }).unwrap();
    membership = (8..=13).fold(membership, |membership, n| ask(&membership, n));
    size(&membership);
    let admitted = apply(&membership);
    assert_eq!(admitted.roster.members.len(), MOST);
    let admitted = size(&admitted);
    println!(
        "roster, shared and all of a pool of {MOST}: {asked:?} while they ask, {admitted:?} when they are admitted"
    );
    // Not far from it: a limit that nothing comes near says nothing.
    assert!(admitted.0 * 4 > MAX_ROSTER * 3 && asked.1 * 4 > MAX_SHARED * 3, "{asked:?} {admitted:?}");
}

#[test]
fn what_is_longer_than_its_part_may_be_is_refused() {
    let refused = |edit: fn(&mut Request)| {
        let mut request = largest_request(2);
        edit(&mut request);
        change(&one(), Change::Request { request }).unwrap_err()
    };
    assert!(refused(|request| request.csr = "\u{1}".repeat(MAX_CSR)).contains("too long"));
    assert!(refused(|request| request.id = "\u{1}".repeat(MAX_NAME)).contains("too long"));
    let invitation = Invitation { hash: "a".to_owned(), at: 1, until: 9, by: long("", 2000) };
    assert!(change(&one(), Change::Invite { invitation }).unwrap_err().contains("too long"));
    let authority = SealedAuthority { certificate: long("", 2049), sealed_key: String::new(), key: None };
    assert!(change(&one(), Change::Authority { authority }).unwrap_err().contains("too long"));
    // Programs of level 2 stop at an entry that is longer than they read.
    let mut old = with_all_at_its_limit(SizePolicy::ha());
    old.shared.level = 2;
    assert!(old.encode().len() > MAX_ENCODED_BEFORE);
    assert!(change(&old, Change::Pause { until: 5 }).unwrap_err().contains("longer than 32768"));
}

#[test]
fn an_admission_is_over_when_its_host_votes() {
    let asked = ask(&ask(&one(), 2), 3);
    let mut all = change(&asked, Change::Admit { hosts: vec![newcomer(2), newcomer(3)] }).unwrap();
    let open = |membership: &Membership| membership.roster.members.iter().filter(|one| one.admission.is_some()).count();
    all = change(&all, Change::Pause { until: 5 }).unwrap();
    assert_eq!(open(&all), 2, "they may not have fetched their certificates yet");
    let kept = all.roster.members[2].admission.clone();
    all = change(&all, Change::Promote).unwrap();
    assert_eq!(open(&all), 0);
    all.roster.members[2].admission = kept;
    assert_eq!(open(&change(&all, Change::Resume).unwrap()), 0, "one that an older program has left");
}

#[test]
fn a_pool_has_three_to_seven_members_and_ha_mode_three() {
    let (ha, pool) = (SizePolicy::ha(), SizePolicy::pool());
    assert_eq!((ha.to_string().as_str(), pool.to_string().as_str()), ("3", "3 to 7"));
    let permitted = |size: SizePolicy| (0..9).filter(|members| size.permits(*members)).collect::<Vec<_>>();
    assert_eq!((permitted(ha), permitted(pool)), (vec![3], vec![3, 4, 5, 6, 7]));
    assert_eq!((0..9).filter(|members| pool.is_advised(*members)).collect::<Vec<_>>(), [3, 5, 7]);
    assert_eq!((pool.missing(1), pool.missing(4)), (2, 0));
    let mut few = one();
    few.roster.size = pool;
    assert_eq!(Membership::decode(&few.encode()).unwrap(), few);
    few = (2..=3).fold(few, |few, id| ask(&few, id));
    assert_eq!(few.shared.requests.len(), 2);
    few = change(&few, Change::Admit { hosts: vec![newcomer(2), newcomer(3)] }).unwrap();
    few = change(&few, Change::Promote).unwrap();
    let four = change(&ask(&few, 4), Change::Admit { hosts: vec![newcomer(4)] }).unwrap();
    assert_eq!((four.roster.members.len(), four.rank(4)), (4, Some(3)));
    few.roster.size = SizePolicy { least: 3, most: MOST + 1 };
    assert!(change(&few, Change::Pause { until: 5 }).unwrap_err().contains("not possible"));
}
