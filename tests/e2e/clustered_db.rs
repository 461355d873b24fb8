//! A pool as its administrator sees it: `twistcli clustered-db` on the members, at the Console and through the address of a
//! load balancer; its settings; how it becomes smaller; and every state that a member can have.

use std::{
    collections::BTreeMap,
    fs,
    net::{Shutdown, TcpListener, TcpStream},
    process::{Command, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use twistlock_ha::{
    admin::PoolStatus,
    cluster::Role,
    control::{self, Call},
    dev::NodeFile,
};

use super::{
    alone, beside,
    cluster::{Cluster, LIMIT, RESTART_AFTER},
    writers::{Pen, Writers},
};

/// Where the load balancer of the test listens, at the port of the Consoles.
const BALANCER: &str = "127.0.0.100";

/// Exit code, standard output and standard error.
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Said {
    #[track_caller]
    fn expect(self, code: i32, part: &str) -> Self {
        assert_eq!(self.code, Some(code), "{}{}", self.out, self.err);
        assert!(self.out.contains(part) || self.err.contains(part), "no {part:?} in: {}{}", self.out, self.err);
        self
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}{}", self.out, self.err))
    }
}

fn twistcli(cluster: &Cluster, args: &[&str]) -> Said {
    let file = cluster.file();
    let mut command = Command::new(env!("CARGO_BIN_EXE_twistcli"));
    command.args(args).env("TWISTLOCK_CACERT", file.ca).env_remove("TWISTLOCK_ADDRESS").stdin(Stdio::null());
    let Output { status, stdout, stderr } = command.output().unwrap();
    let [out, err] = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    Said { code: status.code(), out, err }
}

/// As the interface that we keep has it: `--address URL -u USER -p PASSWORD`.
fn there(cluster: &Cluster, address: &str, args: &[&str]) -> Said {
    let file = cluster.file();
    let url = format!("https://{address}:{}/", 8083 + cluster.port_offset);
    twistcli(cluster, &[&["clustered-db"], args, &["--address", &url, "-u", &file.user, "-p", &file.password]].concat())
}

/// On the host of a member.
fn here(cluster: &Cluster, node: usize, args: &[&str]) -> Said {
    let data = cluster.node(node).data;
    twistcli(cluster, &[&["clustered-db"], args, &["--data", data.to_str().unwrap()]].concat())
}

/// The text of a status, byte for byte but for the moment in it.
#[track_caller]
fn assert_shown(said: &Said, load_balancer: &str, members: &[(String, &str)]) {
    let line = said.out.lines().nth(1).unwrap_or_default();
    let date = line.strip_prefix("Last updated: ").unwrap_or_default();
    let shape: String = date
        .chars()
        .map(|c| {
            if c.is_ascii_digit() {
                '9'
            } else if c.is_alphabetic() {
                'a'
            } else {
                c
            }
        })
        .collect();
    assert_eq!(shape, "99 aaa 99 99:99 aaa", "{}", said.out);
    let lines =
        (1..).zip(members).map(|(number, (address, state))| format!("{number}. Address: {address}, State: {state}\n"));
    let expected = format!(
        "Clustered DB status:\nLast updated: {date}\nLoad balancer address: {load_balancer}\nMembers:\n{}",
        lines.collect::<String>()
    );
    assert_eq!(said.out, expected);
}

/// All of `members` with their states, by who is PRIMARY.
fn states(cluster: &Cluster, members: &[usize]) -> Vec<(String, &'static str)> {
    let primary = cluster.primary();
    let state = |node: usize| if node == primary { "PRIMARY" } else { "SECONDARY" };
    members.iter().map(|node| (cluster.node(*node).address, state(*node))).collect()
}

/// Hands each connection on to the first Console that accepts it.
fn balance(cluster: &Cluster) {
    let port = 8083 + cluster.port_offset;
    let listener = TcpListener::bind((BALANCER, port)).unwrap();
    let consoles: Vec<String> = cluster.file().nodes.into_iter().map(|node| node.address).collect();
    let pour = |mut from: TcpStream, mut to: TcpStream| {
        thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
    };
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let Some(console) = consoles.iter().find_map(|console| TcpStream::connect((console.as_str(), port)).ok())
            else {
                continue;
            };
            pour(client.try_clone().unwrap(), console.try_clone().unwrap());
            pour(console, client);
        }
    });
}

/// The rows of the audit that are about the pool, the oldest first: action, what it was done to, outcome.
fn audited(cluster: &Cluster) -> Vec<(String, String, String)> {
    let data = cluster.node(cluster.primary()).data;
    let rows = twistcli(cluster, &["audits", "--json", "--data", data.to_str().unwrap()]).json();
    let word = |row: &Value, name: &str| row[name].as_str().unwrap_or_default().to_owned();
    let about = |row: &&Value| ["configure", "remove", "apply", "invite"].contains(&row["action"].as_str().unwrap());
    let rows = rows.as_array().unwrap().iter().rev().filter(about);
    rows.map(|row| (word(row, "action"), word(row, "what"), word(row, "outcome"))).collect()
}

#[test]
fn a_pool_is_shown_configured_and_made_smaller() {
    let _beside = beside();
    let cluster = Cluster::start_pool(7, "0");
    let all: Vec<usize> = (0..7).collect();
    let primary = cluster.primary();
    let address = cluster.node(primary).address;
    assert_shown(&there(&cluster, &address, &["status"]).expect(0, ""), "", &states(&cluster, &all));
    balance(&cluster);
    there(&cluster, BALANCER, &["status"]).expect(69, "so nothing was sent");
    let set = ["configure", "--load-balancer-address", BALANCER];
    there(&cluster, &address, &set).expect(0, "Load balancer address: 127.0.0.100");
    let begin = Instant::now();
    wait_until("the certificate has the address of the load balancer", || {
        there(&cluster, BALANCER, &["status"]).code == Some(0)
    });
    println!("  the load balancer's address is in the certificate after {} ms", begin.elapsed().as_millis());
    assert_shown(&there(&cluster, BALANCER, &["status"]).expect(0, ""), BALANCER, &states(&cluster, &all));
    for node in [primary, (primary + 1) % 7] {
        assert_shown(&here(&cluster, node, &["status"]).expect(0, ""), BALANCER, &states(&cluster, &all));
    }
    let json = there(&cluster, BALANCER, &["status", "--json"]).json();
    assert_eq!(
        (&json["majority"], &json["failuresTolerated"], &json["health"]),
        (&4.into(), &3.into(), &"healthy".into())
    );
    refusals(&cluster, primary);
    shrink(&cluster, primary);
    let rows = audited(&cluster);
    let expected = ("configure".to_owned(), "clustered-db/settings".to_owned(), "done".to_owned());
    assert!(rows.contains(&expected), "{rows:#?}");
    let removals = rows.iter().filter(|(action, _, outcome)| action == "remove" && outcome == "done");
    assert_eq!(removals.count(), 4, "{rows:#?}");
}

/// What is refused, and changes nothing.
fn refusals(cluster: &Cluster, primary: usize) {
    let address = cluster.node(primary).address;
    for (args, part) in [
        (&["configure", "--load-balancer-address", "https://lb.example"][..], "cannot be in a certificate"),
        (&["configure", "--seed-console-address", "127.0.0.50"], "only while it is alone"),
        (&["remove", "--member-address", "127.0.0.99"], "the members are at 127.0.0.1"),
        (&["remove", "--member-address", &address], "switch over to another member first"),
    ] {
        there(cluster, BALANCER, args).expect(75, part);
    }
    there(cluster, BALANCER, &["configure"]).expect(64, "--load-balancer-address");
    here(cluster, (primary + 1) % 7, &["remove", "--member-address", "127.0.0.7"]).expect(75, "PRIMARY");
    for args in [&["ha", "apply", "--yes"][..], &["ha", "join-script"]] {
        let data = cluster.node(primary).data;
        twistcli(cluster, &[args, &["--data", data.to_str().unwrap()]].concat()).expect(75, "");
    }
    let rows = audited(cluster);
    let refused = |action: &str| rows.iter().any(|(one, _, outcome)| one == action && outcome.starts_with("refused: "));
    assert!(["configure", "remove", "invite"].into_iter().all(refused), "{rows:#?}");
}

/// From seven members to three, each step with a write; a removed member serves nothing, and is not asked any more.
fn shrink(cluster: &Cluster, primary: usize) {
    let pen = Pen::new(&cluster.file());
    let mut left: Vec<usize> = (0..7).collect();
    let tolerated = [(6, 2), (5, 2), (4, 1), (3, 1)];
    for (count, failures) in tolerated {
        let gone = *left.iter().rev().find(|node| **node != primary).unwrap();
        let node = cluster.node(gone);
        let said =
            there(cluster, BALANCER, &["remove", "--member-address", &node.address, "--json"]).expect(0, "").json();
        assert_eq!((&said["memberCount"], &said["failuresTolerated"]), (&count.into(), &failures.into()), "{said}");
        assert_eq!(said["sizeAdvice"].is_string(), count % 2 == 0, "{said}");
        left.retain(|node| *node != gone);
        assert!(pen.write(primary, &format!("with-{count}")), "a write with {count} members");
        wait_until("the removed member says so", || here(cluster, gone, &["status"]).out.contains("State: REMOVED"));
        let own = format!("Address: {}, State: REMOVED", node.address);
        here(cluster, gone, &["status"]).expect(1, &own);
        assert!(TcpStream::connect((node.address.as_str(), 8083 + cluster.port_offset)).is_err(), "it serves");
    }
    let shown = there(cluster, BALANCER, &["status"]);
    // Those that have just gone are shown for a while.
    assert!(shown.out.contains("State: REMOVED"), "{}", shown.out);
    let [one, other] = [0, 1].map(|at| *left.iter().filter(|node| **node != primary).nth(at).unwrap());
    cluster.freeze(one);
    let down = format!("Address: {}, State: DOWN", cluster.node(one).address);
    wait_until("it is DOWN", || there(cluster, BALANCER, &["status"]).out.contains(&down));
    there(cluster, BALANCER, &["status"]).expect(1, "is DOWN, last heard of");
    let refused = there(cluster, BALANCER, &["remove", "--member-address", &cluster.node(other).address]);
    refused.expect(75, "there is no majority");
    cluster.signal(one, Signal::SIGCONT);
    assert!(pen.write(primary, "with all three"));
}

/// Polls until the condition holds.
fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < LIMIT, "not within {} s: {what}", LIMIT.as_secs());
        thread::sleep(Duration::from_millis(20));
    }
}

/// Asks all members for the status of the pool, again and again.
struct Watch {
    over: Arc<AtomicBool>,
    /// Each state of each member, with the member that first showed it.
    seen: Arc<Mutex<BTreeMap<(String, String), String>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Watch {
    fn start(cluster: &Cluster) -> Self {
        let (over, seen) = (Arc::new(AtomicBool::new(false)), Arc::<Mutex<BTreeMap<_, _>>>::default());
        let follow = |node: NodeFile| {
            let (over, seen) = (Arc::clone(&over), Arc::clone(&seen));
            thread::spawn(move || poll_states(&node, &over, &seen))
        };
        let threads = cluster.file().nodes.into_iter().map(follow).collect();
        Self { over, seen, threads }
    }

    fn has(&self, state: &str) -> bool {
        self.seen.lock().unwrap().keys().any(|(seen, _)| seen == state)
    }

    fn wait_seen(&self, state: &str) {
        wait_until(&format!("a member that is {state}"), || self.has(state));
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

fn poll_states(node: &NodeFile, over: &AtomicBool, seen: &Mutex<BTreeMap<(String, String), String>>) {
    let ask = Call::get("clustered-db/status");
    while !over.load(Ordering::Relaxed) {
        let shown = control::ask::<PoolStatus>(&node.control, &ask, Duration::from_millis(500));
        for member in shown.map(|shown| shown.members).unwrap_or_default() {
            seen.lock().unwrap().entry((member.state_str, member.name)).or_insert_with(|| node.name.clone());
        }
        thread::sleep(Duration::from_millis(3));
    }
}

#[test]
fn timed_every_state_of_a_member_is_seen() {
    let _alone = alone();
    let cluster = Cluster::start_pool(5, RESTART_AFTER);
    let watch = Watch::start(&cluster);
    ["PRIMARY", "SECONDARY"].into_iter().for_each(|state| watch.wait_seen(state));
    let after = |steps: usize| (cluster.primary() + steps) % 5;

    // A frozen member, and one that starts meanwhile and has never heard of it.
    let (frozen, killed) = (after(1), after(2));
    cluster.freeze(frozen);
    cluster.signal(killed, Signal::SIGKILL);
    ["DOWN", "STARTUP"].into_iter().for_each(|state| watch.wait_seen(state));
    let unknown = format!("Address: {}, State: UNKNOWN", cluster.node(frozen).address);
    wait_until("it has not heard of the frozen one", || here(&cluster, killed, &["status"]).out.contains(&unknown));
    let shown = there(&cluster, &cluster.node(cluster.primary()).address, &["status"]);
    assert!(shown.out.contains(&format!("Address: {}, State: DOWN", cluster.node(frozen).address)), "{}", shown.out);
    cluster.signal(frozen, Signal::SIGCONT);
    cluster.wait_healthy();

    // A member that has lost its raft log begins again with a copy of the database, first without a vote.
    let lost = after(1);
    let data = cluster.node(lost).data;
    cluster.without_restarts(|| {
        cluster.signal(lost, Signal::SIGKILL);
        let proc = format!("/proc/{}/stat", cluster.node(lost).pid.unwrap());
        wait_until("its end", || fs::read_to_string(&proc).is_ok_and(|stat| stat.contains(") Z ")));
        fs::remove_dir_all(data.join("raft-log")).unwrap();
    });
    ["RECOVERING", "STARTUP2"].into_iter().for_each(|state| watch.wait_seen(state));
    cluster.wait_healthy();

    rolled_back(&cluster, &watch);

    let gone = cluster.node(after(1));
    let removal = ["remove", "--member-address", &gone.address];
    let said = there(&cluster, &cluster.node(cluster.primary()).address, &removal).expect(0, "is removed.");
    assert!(
        said.out.contains("The pool has 4 members, of which 3 must be up: 1 failure is tolerated now."),
        "{}",
        said.out
    );
    assert!(said.err.contains("an odd number is better"), "{}", said.err);
    watch.wait_seen("REMOVED");
    for ((state, address), by) in &*watch.seen.lock().unwrap() {
        println!("  {state:11} {address}, first seen by {by}");
    }
}

/// The primary writes while the others are frozen, and is then frozen itself: what only it has is dropped when it comes back.
fn rolled_back(cluster: &Cluster, watch: &Watch) {
    let pen = Pen::new(&cluster.file());
    let old = cluster.primary();
    let others: Vec<usize> = (0..5).filter(|node| *node != old).collect();
    others.iter().for_each(|node| cluster.freeze(*node));
    assert!(!pen.write(old, "lost"), "a write that one node has was acknowledged");
    cluster.freeze(old);
    others.iter().for_each(|node| cluster.signal(*node, Signal::SIGKILL));
    cluster.wait_for("another primary", |statuses| {
        let serves = |node: &usize| statuses[*node].as_ref().is_some_and(|status| status.role == Role::Primary);
        others.iter().any(serves)
    });
    let writers = Writers::start(&cluster.file(), 8);
    let begin = Instant::now();
    wait_until("some hundred writes", || writers.successes_since(begin) > 300);
    cluster.signal(old, Signal::SIGCONT);
    watch.wait_seen("ROLLBACK");
    println!("  {}", writers.verify());
    cluster.wait_healthy();
}

/// HA mode has its own commands.
#[test]
fn a_cluster_in_ha_mode_is_no_pool() {
    let _beside = beside();
    let cluster = Cluster::start();
    let address = cluster.node(cluster.primary()).address;
    for args in [
        &["status"][..],
        &["configure", "--load-balancer-address", "lb.example"],
        &["remove", "--member-address", "127.0.0.3"],
    ] {
        there(&cluster, &address, args).expect(75, "this cluster runs in HA mode");
        here(&cluster, cluster.primary(), args).expect(75, "this cluster runs in HA mode");
    }
    let socket = cluster.node(cluster.primary()).control;
    let body = json!({ "loadBalancerAddress": "lb.example" });
    control::ask::<Value>(&socket, &Call::post("clustered-db/settings").with(body), LIMIT).unwrap_err();
    println!("no pool: {}", cluster.finish(&[]));
}
