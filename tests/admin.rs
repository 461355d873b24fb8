//! The operations of an administrator on a real node: a cluster of one that is founded here, in this process.

use std::{
    net::IpAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use raft::eraftpb::ConfState;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use twistlock_ha::{
    admin::{Act, Actor, Admin, AdminConfig, AdminError, Audit, BoxFuture, Outcome, Ports, Ticket},
    cluster::{Role, Timing},
    config::Config,
    found,
    join::{JoinRequest, RequestState},
    node::{self, CheckpointPolicy, Exit, Handle, Lease, NodeConfig},
    peer::{Links, LinksConfig},
    pki::{self, CONSOLE_CERTIFICATE, CONSOLE_KEY, NODE_CERTIFICATE, NODE_KEY, NodeTls},
    storage::{
        DataDir,
        database::Database,
        databases::Databases,
        membership::StoredMembership,
        raft_log::{Options, RaftLog, RealDisk},
        transaction::CONSOLE_DATABASE,
    },
};

const VERSION: &str = "1.2.3";
const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
const LIMIT: Duration = Duration::from_secs(20);

/// Counts instead of opening and closing anything.
#[derive(Default)]
struct Counted {
    drained: AtomicUsize,
    resumed: AtomicUsize,
}

impl Ports for Counted {
    fn drain(&self, _why: &'static str) -> BoxFuture<'_, ()> {
        self.drained.fetch_add(1, Ordering::SeqCst);
        Box::pin(std::future::ready(()))
    }

    fn resume(&self) {
        self.resumed.fetch_add(1, Ordering::SeqCst);
    }

    fn reopened(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// Remembers instead of writing into a database.
#[derive(Default)]
struct Rows(Mutex<Vec<(Actor, Act, Option<Outcome>)>>);

impl Rows {
    /// What was begun and how it ended, the newest last, and forgets it.
    fn take(&self) -> Vec<String> {
        let rows = std::mem::take(&mut *self.0.lock().unwrap());
        let told = rows.into_iter().map(|(actor, act, outcome)| {
            let outcome = outcome.map_or("begun".to_owned(), |outcome| outcome.to_string());
            format!("{}: {} {}: {outcome}", actor.name, act.action, act.what)
        });
        told.collect()
    }
}

impl Audit for Rows {
    fn begin<'a>(&'a self, actor: &'a Actor, act: Act) -> BoxFuture<'a, Ticket> {
        let mut rows = self.0.lock().unwrap();
        rows.push((actor.clone(), act, None));
        let ticket = Ticket((rows.len() - 1).to_string());
        Box::pin(std::future::ready(ticket))
    }

    fn end(&self, ticket: Ticket, outcome: Outcome) -> BoxFuture<'_, ()> {
        let number: usize = ticket.0.parse().unwrap();
        let before = self.0.lock().unwrap()[number].2.replace(outcome);
        assert_eq!(before, None, "ended twice");
        Box::pin(std::future::ready(()))
    }
}

fn by(name: &str) -> Actor {
    Actor::user(name, HERE)
}

struct Founder {
    admin: Arc<Admin>,
    rows: Arc<Rows>,
    handle: Handle,
    ports: Arc<Counted>,
    thread: Option<JoinHandle<Exit>>,
    runtime: Runtime,
    _data: DataDir,
    _folder: TempDir,
}

impl Founder {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = DataDir::open(folder.path().join("data")).unwrap();
        let config = Config {
            data_folder: data.path().to_owned(),
            bind_address: Some(HERE),
            high_availability_name: Some("first".to_owned()),
            ..Config::default()
        };
        let identity = found::found(&config, &data).unwrap();
        let initial = ConfState { voters: vec![identity.node], ..ConfState::default() };
        let owner = (identity.cluster, identity.node);
        let log = RaftLog::open(&data.path().join("raft-log"), owner, initial, Options::default(), RealDisk).unwrap();
        let database = data.path().join("database");
        std::fs::create_dir(&database).unwrap();
        let database = Database::open(&database, CONSOLE_DATABASE, log.last_index()).unwrap();
        let (links, sender) = Links::new(LinksConfig::new(identity.node, Vec::new())).unwrap();
        let node_config = NodeConfig {
            stored: StoredMembership { index: 1, membership: identity.membership.clone() },
            data: data.path().to_owned(),
            node: identity.node,
            name: identity.name.clone(),
            timing: Timing::default(),
            demotion_deadline: Duration::from_secs(2),
            checkpoints: CheckpointPolicy {
                bytes: 1 << 20,
                interval: Duration::from_secs(60),
                raft_log_limit: 1 << 30,
                scrub: Duration::ZERO,
            },
            page_size: 4096,
            fast_takeover: true,
            version: VERSION.to_owned(),
            level: twistlock_ha::cluster::feature_level(),
            lease: Lease::new().unwrap(),
            forgotten: None,
            reach: Default::default(),
            memory: Default::default(),
        };
        let (handle, thread) = node::spawn(node_config, log, Databases::of_console(database), (links, sender)).unwrap();
        let ports = Arc::new(Counted::default());
        let admin_config = AdminConfig {
            certificates: data.path().join("certificates"),
            version: VERSION.to_owned(),
            https_port: Some(8083),
            data: data.path().to_owned(),
            pool_secret_file: None,
            bind: None,
        };
        let rows = Arc::new(Rows::default());
        let admin = Arc::new(Admin::new(admin_config, handle.clone(), ports.clone(), rows.clone()));
        let runtime = Runtime::new().unwrap();
        let mut status = handle.status();
        runtime.block_on(async {
            let primary = status.wait_for(|status| status.serving().is_some());
            assert_eq!(tokio::time::timeout(LIMIT, primary).await.unwrap().unwrap().role, Role::Primary);
        });
        Self { admin, rows, handle, ports, thread: Some(thread), runtime, _data: data, _folder: folder }
    }

    fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(async { tokio::time::timeout(LIMIT, future).await.expect("an answer in time") })
    }

    fn invite(&self) -> String {
        let invited = self.wait(self.admin.invite(Duration::from_secs(3600), &by("admin"))).unwrap();
        assert_eq!(invited.addresses, ["127.0.0.1:8083"]);
        assert!(invited.ca_pem.starts_with("-----BEGIN CERTIFICATE-----"));
        invited.token
    }

    fn ask(&self, token: &str, host: &Host) -> Result<RequestState, AdminError> {
        self.wait(self.admin.request(token, HERE, host.request.clone()))
    }

    fn refused<T: std::fmt::Debug>(&self, operation: impl Future<Output = Result<T, AdminError>>) -> String {
        match self.wait(operation) {
            Err(AdminError::Refused(why)) => why,
            other => panic!("not refused: {other:?}"),
        }
    }
}

impl Drop for Founder {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            assert_eq!(thread.join().unwrap(), Exit::Stopped);
        }
    }
}

/// A host that wants to join, with the keys that never leave it.
struct Host {
    request: JoinRequest,
    key: String,
    console_key: String,
}

fn host(number: u8) -> Host {
    let (name, address) = (format!("host{number}"), format!("127.0.0.{number}"));
    let (csr, key) = pki::node_request(&name, &[&address]).unwrap();
    let (console_csr, console_key) = pki::console_request(&["console.example", &address]).unwrap();
    let request = JoinRequest {
        port: 8086,
        version: VERSION.to_owned(),
        level: twistlock_ha::cluster::feature_level(),
        csr,
        console_csr,
        console_names: vec!["console.example".to_owned(), address.clone()],
        time_ms: clock(),
        name,
        address,
    };
    Host { request, key, console_key }
}

fn clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

fn pending(state: RequestState) -> String {
    match state {
        RequestState::Pending { id, .. } => id,
        other => panic!("{other:?}"),
    }
}

/// The certificates fit the keys that stayed with the host, and make it a node of this cluster.
fn can_start(state: &RequestState, host: &Host, folder: &Path) -> u64 {
    let RequestState::Admitted { node, certificate, console_certificate, ca, membership } = state else {
        panic!("{state:?}")
    };
    pki::store_pem(folder, pki::CA_CERTIFICATE, ca, false).unwrap();
    pki::store_pem(folder, NODE_KEY, &host.key, true).unwrap();
    pki::store_pem(folder, NODE_CERTIFICATE, certificate, false).unwrap();
    pki::store_pem(folder, CONSOLE_KEY, &host.console_key, true).unwrap();
    pki::store_pem(folder, CONSOLE_CERTIFICATE, console_certificate, false).unwrap();
    assert_eq!(NodeTls::load(folder).unwrap().identity, (membership.cluster, *node));
    pki::Pair::load(&folder.join(CONSOLE_CERTIFICATE), &folder.join(CONSOLE_KEY)).unwrap();
    assert!(
        membership.shared.authority.is_none()
            && membership.shared.invitations.is_empty()
            && membership.shared.requests.is_empty()
    );
    assert!(membership.roster.members.iter().all(|member| member.admission.is_none()));
    *node
}

#[test]
fn two_hosts_ask_and_are_admitted_together() {
    let founder = Founder::start();
    let admin = &founder.admin;
    let token = founder.invite();
    assert_eq!(admin.check_token(&token, HERE), Ok(()));
    let (mut second, mut third) = (host(2), host(3));
    let id = pending(founder.ask(&token, &second).unwrap());
    assert_eq!(pending(founder.ask(&token, &second).unwrap()), id, "asking again must not make another request");
    (second.request.name, second.request.address) = ("other2".to_owned(), "127.0.0.22".to_owned());
    second.request.version = "1.2.4".to_owned();
    assert_eq!(pending(founder.ask(&token, &second).unwrap()), id);
    let requests = founder.handle.membership().borrow().shared.requests.clone();
    let [one] = &requests[..] else { panic!("{requests:?}") };
    assert_eq!((&*one.name, &*one.address, &*one.version), ("other2", "127.0.0.22", "1.2.4"), "the newest counts");
    let JoinRequest { csr, console_csr, .. } = second.request;
    second.request = JoinRequest { csr, console_csr, ..host(2).request };
    assert_eq!(pending(founder.ask(&token, &second).unwrap()), id);
    assert!(founder.refused(admin.apply(None, &by("admin"))).contains("on 1 more"));
    third.request.time_ms = clock() + 5_000;
    let other = pending(founder.ask(&token, &third).unwrap());
    let why = founder.refused(admin.apply(None, &by("admin")));
    assert!(why.contains("clock of host3") && why.contains("ahead"), "{why}");
    third.request.time_ms = clock();
    assert_eq!(pending(founder.ask(&token, &third).unwrap()), other);
    let public = serde_json::to_string(&admin.status().membership.public()).unwrap();
    assert!(public.contains("host2") && !public.contains(&id) && !public.contains("BEGIN"), "{public}");
    assert!(admin.request_state("0123").is_none());

    let asking =
        || founder.handle.membership().borrow().shared.requests.iter().map(|one| one.fingerprint.clone()).collect();
    let mut compared: Vec<String> = asking();
    for other in [vec![], compared[..1].to_vec(), vec![compared[0].clone(); 2]] {
        assert!(founder.refused(admin.apply(Some(other), &by("admin"))).contains("compare the fingerprints again"));
    }
    compared.reverse();
    assert_eq!(founder.wait(admin.apply(Some(compared), &by("admin"))).unwrap(), [2, 3]);
    let state = admin.request_state(&id).unwrap();
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(can_start(&state, &second, folder.path()), 2);
    assert_eq!(can_start(&admin.request_state(&other).unwrap(), &third, folder.path()), 3);
    assert!(matches!(admin.check_token(&token, HERE), Err(AdminError::Denied(_))), "APPLY closes the invitations");
    assert_eq!(founder.ask(&token, &second).unwrap(), state, "its key proves who lost the answer");
    assert!(matches!(founder.ask(&token, &host(4)), Err(AdminError::Denied(_))));
    assert!(founder.refused(admin.apply(None, &by("admin"))).contains("complete"));
}

#[test]
fn a_host_that_was_turned_down_needs_a_new_script() {
    let founder = Founder::start();
    let admin = &founder.admin;
    let token = founder.invite();
    let second = host(2);
    let id = pending(founder.ask(&token, &second).unwrap());
    assert!(founder.refused(admin.reject("host9", &by("admin"))).contains("host2"));
    founder.wait(admin.reject("host2", &by("carla"))).unwrap();
    let rejected = admin.request_state(&id).unwrap();
    assert!(matches!(&rejected, RequestState::Rejected { reason } if reason.contains("carla")));
    assert_eq!(founder.ask(&token, &second).unwrap(), rejected);
    let newer = founder.invite();
    assert_ne!(pending(founder.ask(&newer, &second).unwrap()), id);
    founder.wait(admin.uninvite(&by("admin"))).unwrap();
    assert!(matches!(admin.check_token(&newer, HERE), Err(AdminError::Denied(_))));
}

/// Each fetch of the script by an administrator is an invitation.
#[test]
fn the_ninth_invitation_closes_the_one_that_ends_first() {
    let founder = Founder::start();
    let admin = &founder.admin;
    let long = founder.wait(admin.invite(Duration::from_secs(7 * 86_400), &by("admin"))).unwrap().token;
    let tokens: Vec<String> = (0..8).map(|_| founder.invite()).collect();
    let denied = admin.check_token(&tokens[0], HERE);
    assert!(matches!(&denied, Err(AdminError::Denied(why)) if why.contains("get a new join script")), "{denied:?}");
    for token in tokens[1..].iter().chain([&long]) {
        assert_eq!(admin.check_token(token, HERE), Ok(()));
    }
}

#[test]
fn whoever_guesses_tokens_is_not_listened_to_any_more() {
    let founder = Founder::start();
    let token = founder.invite();
    let wrong = format!("{}{}", &token[..token.len() - 1], if token.ends_with('0') { '1' } else { '0' });
    let guess = |from| founder.admin.check_token(&wrong, from).unwrap_err();
    for _ in 0..10 {
        assert!(matches!(guess(HERE), AdminError::Denied(why) if why.contains("not good")));
    }
    assert!(matches!(guess(HERE), AdminError::TooMany(_)));
    assert!(matches!(founder.ask(&wrong, &host(2)), Err(AdminError::TooMany(_))));
    let elsewhere = "127.0.0.9".parse().unwrap();
    assert!(matches!(guess(elsewhere), AdminError::Denied(_)));
    assert_eq!(founder.admin.check_token(&token, HERE), Ok(()), "others must not keep a host away");
    pending(founder.ask(&token, &host(2)).unwrap());
}

#[test]
fn members_move_pause_and_leave() {
    let founder = Founder::start();
    let admin = &founder.admin;
    let token = founder.invite();
    for number in [2, 3] {
        pending(founder.ask(&token, &host(number)).unwrap());
    }
    founder.wait(admin.apply(None, &by("admin"))).unwrap();
    let before = founder.handle.editions().borrow().index;
    let ann = by("admin");
    let moved = admin.readdress("host3", None, Some("127.0.0.33".to_owned()), None, &ann);
    founder.wait(moved).unwrap();
    assert_eq!(founder.handle.membership().borrow().get(3).unwrap().address, "127.0.0.33");
    // What the links tell the others: which membership it is, too.
    let edition = founder.handle.editions().borrow().clone();
    assert!(edition.index > before && edition.membership == *founder.handle.membership().borrow());
    let same = admin.readdress("3", None, None, Some(8086), &ann);
    assert!(founder.refused(same).contains("already"));
    let taken = admin.readdress("host3", Some("host2".to_owned()), None, None, &ann);
    assert!(founder.refused(taken).contains("told apart"));

    assert!(founder.refused(admin.pause(Duration::from_secs(59), &by("admin"))).contains("one minute"));
    let until = founder.wait(admin.pause(Duration::from_secs(60), &by("admin"))).unwrap();
    let pause = founder.handle.membership().borrow().roster.pause.clone().unwrap();
    assert_eq!((pause.until, pause.primary), (until, 1));
    founder.wait(admin.resume(&by("admin"))).unwrap();
    assert!(founder.refused(admin.resume(&by("admin"))).contains("not paused"));

    assert!(founder.refused(admin.remove("first", true, &by("admin"))).contains("switch over"));
    assert!(founder.refused(admin.remove("host", false, &by("admin"))).contains("more than one"));
    founder.wait(admin.remove("host3", false, &by("admin"))).unwrap();
    let membership = founder.handle.membership().borrow().clone();
    assert!(membership.get(3).is_none() && membership.removed(3).is_some_and(|gone| gone.name == "host3"));
}

#[test]
fn a_switchover_without_a_target_leaves_the_ports_alone() {
    let founder = Founder::start();
    let report = founder.admin.check_switchover(None).unwrap();
    let failed: Vec<_> = report.checks.iter().filter(|check| !check.ok).map(|check| check.name.as_str()).collect();
    assert_eq!((failed, report.to, report.gap_ms), (vec!["target"], None, None));
    let why = founder.refused(founder.admin.switchover(None, &by("admin")));
    assert!(why.contains("no other member"), "{why}");
    assert!(founder.refused(founder.admin.switchover(Some("first"), &by("admin"))).contains("already"));
    assert_eq!(founder.ports.drained.load(Ordering::SeqCst), 0);
    assert_eq!(founder.ports.resumed.load(Ordering::SeqCst), 0);
}

#[test]
fn a_node_that_stops_does_not_say_that_nothing_happened() {
    let founder = Founder::start();
    founder.handle.stop();
    let answer = founder.wait(founder.admin.pause(Duration::from_secs(60), &by("admin")));
    assert!(matches!(answer, Err(AdminError::Unknown(_) | AdminError::NotPrimary { .. })), "{answer:?}");
}

/// Every operation that changes something, refused and done: one row each, with who it was and how it ended.
#[test]
fn each_operation_is_in_the_audit_with_its_outcome() {
    let founder = Founder::start();
    let (admin, ann) = (&founder.admin, by("ann"));
    let one = |what: &str| match founder.rows.take().as_slice() {
        [row] => row.clone(),
        rows => panic!("{what}: {rows:?}"),
    };
    let refused = |row: String, begins: &str, why: &str| {
        assert!(row.starts_with(&format!("ann: {begins}: refused: ")) && row.contains(why), "{row}");
    };
    let (minute, day) = (Duration::from_secs(60), Duration::from_secs(86_400));
    founder.refused(admin.invite(8 * day, &ann));
    refused(one("invite"), "invite high availability", "seven days");
    let token = founder.invite();
    assert_eq!(one("invite"), "admin: invite high availability: done");
    founder.ask(&token, &host(2)).unwrap();
    assert_eq!(one("ask"), "host host2: ask to join host 'host2': done");
    assert!(founder.ask("nonsense", &host(2)).is_err());
    assert!(one("ask").starts_with("host host2: ask to join host 'host2': refused: "));
    founder.refused(admin.apply(None, &ann));
    refused(one("apply"), "apply high availability", "on 1 more");
    founder.refused(admin.reject("host9", &ann));
    refused(one("reject"), "reject request to join 'host9'", "host2");
    founder.wait(admin.reject("host2", &ann)).unwrap();
    assert_eq!(one("reject"), "ann: reject request to join 'host2': done");
    founder.wait(admin.uninvite(&ann)).unwrap();
    assert_eq!(one("uninvite"), "ann: uninvite high availability: done");
    founder.refused(admin.remove("first", true, &ann));
    refused(one("remove"), "remove member 'first'", "switch over");
    founder.refused(admin.readdress("first", None, None, None, &ann));
    refused(one("readdress"), "readdress member 'first'", "already");
    founder.refused(admin.resume(&ann));
    refused(one("resume"), "resume high availability", "not paused");
    founder.wait(admin.pause(minute, &ann)).unwrap();
    assert_eq!(one("pause"), "ann: pause high availability: done");
    founder.refused(admin.switchover(None, &ann));
    refused(one("switchover"), "switchover high availability", "no other member");
    assert!(founder.wait(admin.begin_switchover(None, &ann)).unwrap().objections().is_some());
    refused(one("switchover"), "switchover high availability", "no other member");
    assert!(admin.check_switchover(None).unwrap().objections().is_some());
    assert_eq!(founder.rows.take(), Vec::<String>::new(), "a look is no row");
    founder.wait(admin.rotate_cluster_key(&ann)).unwrap();
    assert_eq!(one("rotate"), "ann: rotate cluster key: done");
    founder.refused(admin.rotate_authority(91 * day, &ann));
    refused(one("rotate"), "rotate certificate authority", "90 days");
    founder.wait(admin.set_console_names(vec!["lb.example".to_owned()], &ann)).unwrap();
    assert_eq!(one("names"), "ann: set settings/certs: done");
    founder.refused(admin.set_certificate("no PEM", &ann));
    refused(one("certificate"), "set settings/custom-certs", "");
    founder.refused(admin.remove_certificate(&ann));
    refused(one("certificate"), "delete settings/custom-certs", "none to remove");
    founder.wait(admin.set_webhooks(Vec::new(), &ann)).unwrap();
    assert_eq!(one("webhooks"), "ann: set notifications: done");
    founder.wait(admin.test_notifications(&ann, std::future::ready(())));
    assert_eq!(one("test"), "ann: test notifications: done");
}

#[test]
fn an_operation_that_nobody_waits_for_any_more_has_an_end_in_the_audit() {
    let founder = Founder::start();
    let ann = by("ann");
    founder.wait(async {
        let never =
            founder.admin.audited(&ann, Act::new("sleep", "bed"), std::future::pending::<Result<(), AdminError>>());
        assert!(tokio::time::timeout(Duration::from_millis(10), never).await.is_err());
        loop {
            if founder.rows.0.lock().unwrap().iter().all(|(.., outcome)| outcome.is_some()) {
                return;
            }
            tokio::task::yield_now().await;
        }
    });
    let rows = founder.rows.take();
    assert!(rows.len() == 1 && rows[0].starts_with("ann: sleep bed: unknown: whoever asked went away"), "{rows:?}");
}
