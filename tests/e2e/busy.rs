//! A host whose processors other programs keep busy: that is no fault, and the role stays where it is.

use std::{
    fs,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::{
    alone,
    cluster::{Cluster, FROZEN},
    pace_until,
    sampler::Sampler,
    writers::Writers,
};

/// Busy processes for each processor.
const FOR_EACH: usize = 16;
/// How long they keep the host busy: some hundred heartbeats.
const BUSY: Duration = Duration::from_secs(10);
/// Clients, which get their turn like the busy processes.
const CLIENTS: usize = 4;
/// The threads that must not wait for their turn; names end after 15 bytes.
const URGENT: [&str; 3] = ["consensus", "raft-log-sync", "twistlock-guard"];
/// The number of SCHED_RR.
const ROUND_ROBIN: u32 = 2;

/// Processes that do nothing, as fast as they can.
struct Busy(Vec<Child>);

impl Busy {
    fn start(count: usize) -> Self {
        let spin = |_| Command::new("sh").args(["-c", "while :; do :; done"]).stdin(Stdio::null()).spawn().unwrap();
        Self((0..count).map(spin).collect())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It ends in no other way.
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

/// A number of `/proc/PID/status`.
fn status(pid: &str, name: &str, radix: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    u64::from_str_radix(value.split_whitespace().next().unwrap(), radix).unwrap()
}

/// The program of each node and of its port guard stays in memory if the kernel permits it, and the node says whether it
/// does. Whoever may lock as much as he likes (CAP_IPC_LOCK) finds it locked.
fn check_memory(cluster: &Cluster) {
    const MAY_LOCK: u64 = 1 << 14;
    let may = status("self", "CapEff:", 16) & MAY_LOCK != 0;
    for (index, node) in cluster.file().nodes.iter().enumerate() {
        let said = cluster.log(index).contains("the program stays in memory");
        assert!(said || !may, "{} may lock its memory", node.name);
        let pid = node.pid.unwrap();
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|entry| entry.unwrap().path());
        let children = tasks.map(|task| fs::read_to_string(task.join("children")).unwrap_or_default());
        for process in children.collect::<String>().split_whitespace().chain([&*pid.to_string()]) {
            let locked = status(process, "VmLck:", 10);
            assert_eq!(locked > 0, said, "{}, process {process}: {locked} KiB are locked", node.name);
        }
    }
}

/// Name and scheduling policy of each thread of a process and of its child, the port guard (proc_pid_stat(5), field 41).
fn threads(pid: u32) -> Vec<(String, u32)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let folder = entry.unwrap().path();
        // A thread may have ended by now.
        let Ok(stat) = fs::read_to_string(folder.join("stat")) else { continue };
        let (name, rest) = stat.split_once('(').unwrap().1.rsplit_once(')').unwrap();
        found.push((name.to_owned(), rest.split_whitespace().nth(38).unwrap().parse().unwrap()));
        let children = fs::read_to_string(folder.join("children")).unwrap_or_default();
        found.extend(children.split_whitespace().flat_map(|child| threads(child.parse().unwrap())));
    }
    found
}

/// Whether real-time priority is permitted, by the word of all nodes. Those threads have it that need it, and no others.
fn is_permitted(cluster: &Cluster) -> bool {
    let said = |text: &str| (0..3).filter(|node| cluster.log(*node).contains(text)).count();
    let (permitted, refused) = (said("have real-time priority"), said("have ordinary priority"));
    assert_eq!((permitted + refused, permitted * refused), (3, 0), "each node says what it has, and all the same");
    for node in cluster.file().nodes {
        let threads = threads(node.pid.unwrap());
        for name in URGENT {
            assert!(threads.iter().any(|(thread, _)| thread == name), "{}: no thread {name} in {threads:?}", node.name);
        }
        for (name, policy) in threads {
            let expected = permitted > 0 && URGENT.contains(&&*name);
            assert_eq!(policy == ROUND_ROBIN, expected, "{}, {name}: policy {policy}", node.name);
        }
    }
    permitted > 0
}

fn epochs(cluster: &Cluster) -> Vec<u64> {
    cluster.statuses().into_iter().flatten().map(|status| status.epoch).collect()
}

/// Where the kernel refuses real-time priority, the log says that this may cost the role.
#[test]
fn timed_the_role_stays_while_all_processors_are_busy() {
    let _alone = alone();
    let cluster = Cluster::start();
    let permitted = is_permitted(&cluster);
    check_memory(&cluster);
    let sampler = Sampler::start(cluster.port_offset);
    let writers = Writers::start(&cluster.file(), CLIENTS);
    let (primary, before) = (cluster.primary(), epochs(&cluster));
    let begin = Instant::now();
    let busy = Busy::start(FOR_EACH * thread::available_parallelism().unwrap().get());
    pace_until(begin + BUSY);
    let written = writers.successes_since(begin);
    drop(busy);
    let (verified, sampled) = (writers.verify(), sampler.verify());
    println!("  {written} writes in {BUSY:?}\n  {verified}\n  {sampled}");
    if !permitted {
        println!("  real-time priority is not permitted here: the role might have moved");
        return;
    }
    assert_eq!((cluster.primary(), epochs(&cluster)), (primary, before), "the role moved");
    println!("  {}", cluster.finish(FROZEN));
}
