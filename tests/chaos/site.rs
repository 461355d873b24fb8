//! The three daemons of a cluster as children of this process, each with the preloaded library and a keeper that starts it again
//! as a service manager would. Must never let a daemon outlive this process, nor start one whose files are being harmed.

use std::{
    fs::{self, OpenOptions},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use twistlock_ha::{
    cluster::Role,
    control,
    dev::{ClusterFile, NodeFile},
    node::Status,
};

use crate::{cluster::Cluster, databases, disks, preload::Preload};

/// From the end of a daemon to its next start.
const RESTART_AFTER: Duration = Duration::from_secs(1);
/// How often the keeper looks.
const STEP: Duration = Duration::from_millis(20);
/// How long a process may take to start or to be gone after SIGKILL.
const PROCESS_LIMIT: Duration = Duration::from_secs(30);
/// How long an orderly stop may take: the daemon's own limit and a busy machine.
const STOP_LIMIT: Duration = Duration::from_secs(30);
const ANSWER_LIMIT: Duration = Duration::from_millis(500);

/// One daemon, as its keeper sees it.
struct Daemon {
    child: Option<Child>,
    /// It is to run; false while its files are being harmed.
    wanted: bool,
    /// When it ended.
    ended: Option<Instant>,
    /// It was asked to end, or killed, and has not been started again.
    ending: bool,
}

struct Member {
    node: NodeFile,
    config: PathBuf,
    daemon: Mutex<Daemon>,
}

impl Member {
    fn daemon(&self) -> MutexGuard<'_, Daemon> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running cluster.
pub struct Site {
    /// Made the cluster; its own daemons are stopped.
    cluster: Cluster,
    members: Arc<Vec<Member>>,
    pub preload: Arc<Preload>,
    /// Each end of a daemon that nobody caused: node and how.
    ends: Arc<Mutex<Vec<(usize, String)>>>,
    stop: Arc<AtomicBool>,
    keeper: Option<JoinHandle<()>>,
}

impl Site {
    /// Founds a cluster on small disks of its own, and goes on with daemons under the preloaded library.
    pub fn start() -> Self {
        let cluster = Cluster::start_with("0", |folder| {
            for name in ["node1", "node2", "node3"] {
                disks::mount(&folder.join(name));
            }
        });
        // Many checkpoints: each fault should meet some, and the raft log should be compacted again and again.
        cluster.configure("CHECKPOINT_SECONDS", "5");
        let file = cluster.file();
        for index in 0..3 {
            cluster.signal(index, Signal::SIGTERM);
        }
        cluster
            .wait_for("the end of the first daemons", |_| cluster.file().nodes.iter().all(|node| node.pid.is_none()));
        let folder = file.nodes[0].data.parent().and_then(Path::parent).expect("DIR/nodeN/data").to_owned();
        let preload = Arc::new(Preload::build(&folder));
        let member = |(index, node): (usize, &NodeFile)| {
            let config = cluster.config_path(index);
            name_member(&config, &node.name);
            let daemon = Mutex::new(Daemon { child: None, wanted: true, ended: None, ending: false });
            Member { node: node.clone(), config, daemon }
        };
        let members: Arc<Vec<_>> = Arc::new(file.nodes.iter().enumerate().map(member).collect());
        let mut site = Self { cluster, members, preload, ends: Arc::default(), stop: Arc::default(), keeper: None };
        site.keep();
        site.wait_whole(PROCESS_LIMIT).unwrap_or_else(|picture| panic!("the cluster does not begin: {picture}"));
        site
    }

    /// Starts the thread that starts all daemons: the kernel ends them with it.
    fn keep(&mut self) {
        let (members, preload) = (Arc::clone(&self.members), Arc::clone(&self.preload));
        let (ends, stop) = (Arc::clone(&self.ends), Arc::clone(&self.stop));
        let run = move || {
            while !stop.load(Ordering::Relaxed) {
                for (index, member) in members.iter().enumerate() {
                    look_after(member, index, &preload, &ends);
                }
                wait_step();
            }
        };
        self.keeper = Some(thread::Builder::new().name("keeper".into()).spawn(run).expect("a thread can be started"));
    }

    pub fn file(&self) -> ClusterFile {
        self.cluster.file()
    }

    pub fn port_offset(&self) -> u16 {
        self.cluster.port_offset
    }

    pub fn node(&self, index: usize) -> &NodeFile {
        &self.members[index].node
    }

    /// All that a node has logged.
    pub fn log(&self, index: usize) -> String {
        let bytes = fs::read(log_path(&self.members[index].config)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What each node says; none for one that does not answer.
    pub fn statuses(&self) -> Vec<Option<Status>> {
        let ask = |member: &Member| control::status(&member.node.control, ANSWER_LIMIT).ok();
        thread::scope(|scope| {
            let asked: Vec<_> = self.members.iter().map(|member| scope.spawn(move || ask(member))).collect();
            asked.into_iter().map(|one| one.join().ok().flatten()).collect()
        })
    }

    /// The position of the PRIMARY, if one says that it is.
    pub fn primary(&self) -> Option<usize> {
        let is_primary = |status: &Option<Status>| status.as_ref().is_some_and(|status| status.role == Role::Primary);
        self.statuses().iter().position(is_primary)
    }

    /// Waits until there is one PRIMARY with two SECONDARY, all voters. Returns the last picture if there is not.
    pub fn wait_whole(&self, limit: Duration) -> Result<(), String> {
        let deadline = Instant::now() + limit;
        loop {
            let statuses = self.statuses();
            if whole(&statuses) && !self.members.iter().any(|member| member.daemon().ending) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(picture(&statuses));
            }
            wait_step();
        }
    }

    pub fn signal(&self, index: usize, signal: Signal) {
        let mut daemon = self.members[index].daemon();
        daemon.ending |= matches!(signal, Signal::SIGKILL | Signal::SIGTERM);
        if let Some(child) = &daemon.child {
            // It may have ended by itself just now, and is not waited for yet.
            let _ = kill(Pid::from_raw(child.id() as i32), signal);
        }
    }

    /// Kills a daemon and keeps it down until [`Site::release`]. Returns when it is gone.
    pub fn hold(&self, index: usize) -> Result<(), String> {
        self.members[index].daemon().wanted = false;
        self.signal(index, Signal::SIGKILL);
        self.wait_child(index, false, PROCESS_LIMIT)
    }

    /// Lets it be started again, and waits until it is.
    pub fn release(&self, index: usize) -> Result<(), String> {
        self.members[index].daemon().wanted = true;
        self.wait_child(index, true, PROCESS_LIMIT)
    }

    fn wait_child(&self, index: usize, there: bool, limit: Duration) -> Result<(), String> {
        let deadline = Instant::now() + limit;
        while self.members[index].daemon().child.is_some() != there {
            if Instant::now() > deadline {
                let what = if there { "start" } else { "end" };
                return Err(format!("{} does not {what} within {} s", self.members[index].node.name, limit.as_secs()));
            }
            wait_step();
        }
        Ok(())
    }

    /// Ends of daemons that nobody caused, since the last call.
    pub fn take_ends(&self) -> Vec<(usize, String)> {
        std::mem::take(&mut self.ends.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Stops all in an orderly way, compares their databases, and starts them again unless it is the end. Nobody may write.
    pub fn compare(&self, go_on: bool) -> Result<String, String> {
        let mut compared = self.stop_and_compare();
        // The last PRIMARY goes back to its checkpoint, and may be stopped before it has everything again.
        for _ in 0..2 {
            if compared.as_ref().is_err_and(|error| error.contains("stopped at different indexes")) {
                self.start_again()?;
                compared = self.stop_and_compare();
            }
        }
        if go_on {
            self.start_again()?;
        }
        compared
    }

    fn start_again(&self) -> Result<(), String> {
        (0..3).try_for_each(|index| self.release(index))?;
        self.wait_whole(PROCESS_LIMIT)
    }

    fn stop_and_compare(&self) -> Result<String, String> {
        self.wait_level(PROCESS_LIMIT)?;
        self.wait_whole(PROCESS_LIMIT)?;
        let last = self.primary().unwrap_or(0);
        let order: Vec<usize> = (0..3).filter(|index| *index != last).chain([last]).collect();
        for index in &order {
            self.members[*index].daemon().wanted = false;
        }
        for group in [&order[..2], &order[2..]] {
            group.iter().for_each(|index| self.signal(*index, Signal::SIGTERM));
            group.iter().try_for_each(|index| self.wait_child(*index, false, STOP_LIMIT))?;
        }
        let nodes = self.file().nodes;
        let compared = thread::spawn(move || databases::compare(&nodes)).join();
        compared.map_err(|panic| match panic.downcast::<String>() {
            Ok(text) => format!("the databases: {text}"),
            Err(_) => "the databases differ: see above".to_owned(),
        })
    }

    /// Waits until all have applied the same, and nothing has come for longer than a status may be old.
    fn wait_level(&self, limit: Duration) -> Result<(), String> {
        let deadline = Instant::now() + limit;
        let mut last = (0, Instant::now());
        loop {
            let statuses = self.statuses();
            let committed = statuses.iter().flatten().map(|status| status.committed).max().unwrap_or(0);
            let known = statuses.iter().flatten().filter(|status| status.applied == committed).count();
            if known < 3 || last.0 != committed {
                last = (committed, Instant::now());
            }
            if last.1.elapsed() > Duration::from_millis(1100) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("not level: {}", picture(&statuses)));
            }
            wait_step();
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.preload.clear();
        for index in 0..3 {
            self.members[index].daemon().wanted = false;
            self.signal(index, Signal::SIGKILL);
        }
        for index in 0..3 {
            let _ = self.wait_child(index, false, PROCESS_LIMIT);
        }
        self.stop.store(true, Ordering::Relaxed);
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
        for member in self.members.iter() {
            disks::unmount(member.config.parent().expect("a file in a folder"));
        }
    }
}

/// One PRIMARY, two SECONDARY, all under it, all with a vote, and no change under way.
pub fn whole(statuses: &[Option<Status>]) -> bool {
    let known: Vec<&Status> = statuses.iter().flatten().collect();
    let count = |role| known.iter().filter(|status| status.role == role).count();
    let voters = |status: &&Status| {
        status.membership.roster.members.len() == 3
            && status.membership.roster.members.iter().all(|member| member.voter)
    };
    known.len() == 3
        && (count(Role::Primary), count(Role::Secondary)) == (1, 2)
        && known.iter().all(|status| status.epoch == known[0].epoch && status.primary == known[0].primary)
        && known.iter().all(voters)
}

/// What the nodes say, in short.
pub fn picture(statuses: &[Option<Status>]) -> String {
    let tell = |(index, status): (usize, &Option<Status>)| match status {
        Some(status) => format!(
            "{} {} epoch {} applied {}: {} {:?}",
            status.name, status.role, status.epoch, status.applied, status.reason, status.warnings
        ),
        None => format!("node{} no answer", index + 1),
    };
    statuses.iter().enumerate().map(tell).collect::<Vec<_>>().join("; ")
}

fn log_path(config: &Path) -> PathBuf {
    config.with_file_name("log")
}

/// A member that joins anew is named by its configuration file.
fn name_member(config: &Path, name: &str) {
    let text = fs::read_to_string(config).unwrap();
    let others: Vec<&str> = text.lines().filter(|line| !line.starts_with("HIGH_AVAILABILITY_NAME=")).collect();
    fs::write(config, format!("{}\nHIGH_AVAILABILITY_NAME={name}\n", others.join("\n"))).unwrap();
}

/// Notes the end of a daemon, and starts it again when its time has come.
fn look_after(member: &Member, index: usize, preload: &Preload, ends: &Mutex<Vec<(usize, String)>>) {
    let mut daemon = member.daemon();
    if let Some(child) = &mut daemon.child {
        let Ok(Some(status)) = child.try_wait() else { return };
        (daemon.child, daemon.ended) = (None, Some(Instant::now()));
        // Killed or asked to stop: that was us.
        if status.signal() != Some(Signal::SIGKILL as i32) && status.code() != Some(0) {
            ends.lock().unwrap_or_else(PoisonError::into_inner).push((index, status.to_string()));
        }
    }
    if daemon.wanted && daemon.ended.is_none_or(|ended| ended.elapsed() >= RESTART_AFTER) {
        let open = || OpenOptions::new().create(true).append(true).open(log_path(&member.config)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_twistlockd"));
        // The child asks the kernel to end it with this thread.
        command.args(["dev", "--parent", &std::process::id().to_string(), "--become-node"]).arg(&member.config);
        preload.apply(&mut command, index);
        let spawned = command.stdin(Stdio::null()).stdout(open()).stderr(open()).spawn();
        daemon.child = Some(spawned.expect("the program can be started"));
        daemon.ending = false;
    }
}

fn wait_step() {
    thread::sleep(STEP);
}
