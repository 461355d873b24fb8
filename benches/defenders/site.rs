//! The cluster that the Defenders connect to, and others who write meanwhile. Must never leave a process or a folder behind.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;
use twistlock_ha::{
    cluster::Role,
    control,
    dev::{ClusterFile, NodeFile, read_cluster},
    https::{self, Limits, Trust},
    mutex::locked,
};

use super::{LIMIT, Times, crowd::Desk};

/// `COMMUNICATION_PORT` of a dev cluster without an offset.
const PORT: u16 = 8084;
/// Rows that the Console is to keep.
const KEPT: u32 = 10_000_000;
/// Others who write, and how long each waits after a write.
const OTHERS: usize = 4;
const PACE: Duration = Duration::from_millis(20);
/// How long a request of theirs may take, and a look at a member.
const LIMITS: Limits = Limits { connect: Duration::from_millis(500), request: Duration::from_secs(5) };
const LOOK: Duration = Duration::from_millis(20);

/// A dev cluster, which is stopped and removed when this is dropped.
pub struct Site {
    dev: Child,
    folder: PathBuf,
    port_offset: u16,
    authorization: String,
}

impl Drop for Site {
    fn drop(&mut self) {
        // It is our child, and not waited for yet.
        let _ = kill(Pid::from_raw(self.dev.id() as i32), Signal::SIGTERM);
        let _ = self.dev.wait();
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("{} is left: {error}", self.folder.display());
        }
    }
}

impl Site {
    /// Starts three members, and has the Console keep whatever comes.
    pub fn start(program: &Path, dir: Option<&Path>, port_offset: u16) -> Result<Self> {
        let base = dir.map_or_else(std::env::temp_dir, Path::to_owned);
        let folder = base.join(format!("twistlock-defenders-{}", std::process::id()));
        let mut dev = Command::new(program)
            .args(["dev", "--quiet", "--restart-after", "1", "--port-offset", &port_offset.to_string(), "--dir"])
            .arg(&folder)
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let output = dev.stdout.take().context("its output is piped")?;
        let mut site = Self { dev, folder, port_offset, authorization: String::new() };
        let mut lines = BufReader::new(output).lines().map_while(Result::ok);
        if !lines.any(|line| line.contains("Ctrl-C stops")) {
            bail!("the dev cluster did not become ready");
        }
        // It must not wait for somebody who reads.
        thread::spawn(move || lines.for_each(drop));
        let cluster = site.cluster()?;
        let body = json!({ "username": cluster.user, "password": cluster.password });
        let session = site.desk()?.post("/authenticate", &body)?;
        site.authorization = format!("Bearer {}", session["token"].as_str().context("a token")?);
        site.desk()?.post("/settings/retention", &json!({ "defenderEventRows": KEPT }))?;
        Ok(site)
    }

    fn cluster(&self) -> Result<ClusterFile> {
        read_cluster(&self.folder)
    }

    /// The ports for Defenders.
    pub fn consoles(&self) -> Vec<String> {
        let nodes = self.cluster().map(|cluster| cluster.nodes).unwrap_or_default();
        nodes.iter().map(|node| format!("{}:{}", node.address, PORT + self.port_offset)).collect()
    }

    fn primary(&self) -> Result<NodeFile> {
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            for node in self.cluster()?.nodes {
                let status = control::status(&node.control, LIMITS.connect);
                if status.is_ok_and(|status| status.role == Role::Primary) {
                    return Ok(node);
                }
            }
            thread::sleep(LOOK);
        }
        bail!("no member is PRIMARY")
    }

    /// The Console of the PRIMARY.
    pub fn desk(&self) -> Result<Desk> {
        Desk::new(&self.cluster()?.ca, &self.primary()?.console_url, &self.authorization)
    }

    /// A token for hosts that register.
    pub fn invite(&self, desk: &Desk) -> Result<String> {
        let invitation = desk.post("/defenders/tokens", &json!({}))?;
        Ok(invitation["token"].as_str().context("a token")?.to_owned())
    }

    /// Memory of the PRIMARY's process that is not of files, in KiB.
    pub fn memory(&self) -> Result<u64> {
        let pid = self.primary()?.pid.context("the PRIMARY runs")?;
        let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    /// Processor time that the PRIMARY's process has used so far.
    pub fn cpu(&self) -> Result<Duration> {
        let pid = self.primary()?.pid.context("the PRIMARY runs")?;
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // Behind the name, which may have blanks in it; the ticks are hundredths of a second.
        let fields = text.rsplit_once(") ").context("a name in parentheses")?.1.split(' ');
        let ticks: u64 = fields.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap_or(0)).sum();
        Ok(Duration::from_millis(ticks * 10))
    }

    /// Kills it with SIGKILL. Returns when that was.
    pub fn kill_primary(&self) -> Result<Instant> {
        let pid = self.primary()?.pid.context("the PRIMARY runs")?;
        let at = Instant::now();
        kill(Pid::from_raw(pid as i32), Signal::SIGKILL)?;
        Ok(at)
    }

    /// Waits until all members are in their places.
    pub fn wait_healthy(&self) -> Result<()> {
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            let nodes = self.cluster()?.nodes;
            let roles = nodes.iter().filter_map(|node| control::status(&node.control, LIMITS.connect).ok());
            let roles: Vec<Role> = roles.map(|status| status.role).collect();
            let count = |role| roles.iter().filter(|known| **known == role).count();
            if (count(Role::Primary), count(Role::Secondary)) == (1, nodes.len() - 1) {
                return Ok(());
            }
            thread::sleep(LOOK);
        }
        bail!("the members are not in their places within {LIMIT:?}")
    }
}

/// Others who write tags, one after the other, at whichever Console answers. They stop when this is dropped.
pub struct Others {
    stop: Arc<AtomicBool>,
    writes: Arc<Mutex<Vec<(Instant, Duration)>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for Others {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            // It has said on standard error why it has panicked.
            let _ = thread.join();
        }
    }
}

impl Others {
    /// Begins to write.
    pub fn start(site: &Site) -> Result<Self> {
        let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::<Mutex<Vec<_>>>::default());
        let cluster = site.cluster()?;
        let mut threads = Vec::new();
        for other in 0..OTHERS {
            let (stop, writes) = (Arc::clone(&stop), Arc::clone(&writes));
            let (nodes, authorization) = (cluster.nodes.clone(), site.authorization.clone());
            let agent = https::client(&Trust::file(&cluster.ca)?, LIMITS);
            threads.push(thread::spawn(move || {
                let mut number = 0;
                while !stop.load(Relaxed) {
                    number += 1;
                    let tag =
                        json!({ "name": format!("other-{other}-{number}"), "color": "#336699", "description": "" });
                    for node in &nodes {
                        let begin = Instant::now();
                        let request = agent.post(format!("{}/api/v1/tags", node.console_url));
                        let answer = request.header("authorization", &authorization).send_json(&tag);
                        if answer.is_ok_and(|mut answer| {
                            answer.status().is_success() && answer.body_mut().read_to_string().is_ok()
                        }) {
                            locked(&writes).push((begin, begin.elapsed()));
                            break;
                        }
                    }
                    thread::sleep(PACE);
                }
            }));
        }
        Ok(Self { stop, writes, threads })
    }

    /// How long their writes took since this was asked for last.
    pub fn taken(&self) -> Vec<Duration> {
        std::mem::take(&mut *locked(&self.writes)).into_iter().map(|(_, took)| took).collect()
    }

    /// How long their writes take during this span.
    pub fn times(&self, span: Duration) -> Times {
        drop(self.taken());
        thread::sleep(span);
        Times::of(self.taken())
    }

    /// From `fault` to the end of the first write that began after it.
    pub fn gap_after(&self, fault: Instant) -> Option<Duration> {
        let writes = locked(&self.writes);
        let ends = writes.iter().filter(|(begin, _)| *begin > fault).map(|(begin, took)| *begin + *took);
        ends.min().map(|end| end.duration_since(fault))
    }
}
