//! A cluster with the hosts that have joined it, and a client that writes to whoever is PRIMARY. Must never take a write
//! whose outcome is unknown for one that was acknowledged.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use twistlock_ha::{cluster::Role, control::Call};
use ureq::{Agent, http::StatusCode};

use super::host::{Founder, Host, wait_until};

/// How long an invitation is good, in seconds.
const VALID: u64 = 600;

/// A cluster. Its founder is host 0.
pub struct Site {
    pub joined: Vec<Host>,
    pub founder: Founder,
}

impl Site {
    /// The founder, and two hosts that have asked to join.
    pub fn asking() -> Self {
        Self::asking_of(Founder::start())
    }

    /// The same with a founder that has done something before.
    pub fn asking_of(founder: Founder) -> Self {
        let mut site = Self { joined: vec![founder.host(2), founder.host(3)], founder };
        let line = site.line();
        for host in &mut site.joined {
            host.run_line(&line, "");
        }
        site
    }

    /// Three members.
    pub fn complete() -> Self {
        Self::complete_of(Founder::start())
    }

    /// The same with a founder that has done something before.
    pub fn complete_of(founder: Founder) -> Self {
        let site = Self::asking_of(founder);
        site.operate::<Value>(Call::post("high-availability/apply")).unwrap();
        site.wait_whole();
        site
    }

    pub fn host(&mut self, index: usize) -> &mut Host {
        match index {
            0 => &mut self.founder.host,
            _ => &mut self.joined[index - 1],
        }
    }

    fn hosts(&self) -> impl Iterator<Item = &Host> {
        std::iter::once(&self.founder.host).chain(&self.joined)
    }

    /// The only PRIMARY.
    pub fn primary(&self) -> usize {
        let mut found = Vec::new();
        wait_until("there is one PRIMARY", || {
            let primaries = self.hosts().enumerate().filter(|(_, host)| host.role() == Some(Role::Primary));
            found = primaries.map(|(index, _)| index).collect();
            found.len() == 1
        });
        found[0]
    }

    /// The PRIMARY has it done.
    pub fn operate<T: serde::de::DeserializeOwned>(&self, operation: Call) -> Result<T, String> {
        self.hosts().nth(self.primary()).unwrap().operate(operation)
    }

    /// The line to run on other hosts, from whoever is PRIMARY.
    pub fn line(&self) -> String {
        let invite = Call::get(format!("high-availability/join-script?validSec={VALID}"));
        self.operate::<Value>(invite).unwrap()["line"].as_str().unwrap().to_owned()
    }

    /// How many votes there are, and how many hosts ask, as the PRIMARY sees it.
    pub fn votes_and_requests(&self) -> Option<(usize, usize)> {
        let primary = self.hosts().filter_map(Host::status).find(|status| status.role == Role::Primary)?;
        let votes = primary.membership.roster.members.iter().filter(|member| member.voter).count();
        Some((votes, primary.membership.shared.requests.len()))
    }

    /// Waits for one PRIMARY and two SECONDARY hosts with three votes that have the same, and makes sure that they do.
    /// Returns the names of the tags.
    pub fn wait_whole(&self) -> Vec<String> {
        wait_until("three members, all up, all with the same", || {
            let all: Vec<_> = self.hosts().filter_map(Host::status).collect();
            let count = |role| all.iter().filter(|status| status.role == role).count();
            let whole = |status: &twistlock_ha::node::Status| {
                let members = &status.members;
                members.len() == 3 && members.iter().all(|member| member.voter) && status.applied == all[0].applied
            };
            let members: Vec<_> = all.iter().filter(|status| status.role != Role::Removed).collect();
            (count(Role::Primary), count(Role::Secondary)) == (1, 2) && members.into_iter().all(whole)
        });
        let mut there = Vec::new();
        // What a host says of itself may be older than the last write.
        wait_until("the same tags on all", || {
            let mut files = Vec::new();
            for host in self.hosts() {
                match host.role() {
                    Some(Role::Primary) => there = host.tags(),
                    Some(Role::Secondary) => files.push(host.file_tags()),
                    _ => {}
                }
            }
            files.len() == 2 && files.iter().all(|tags| *tags == there)
        });
        there
    }
}

/// One write that was acknowledged.
struct Written {
    tag: String,
    /// The address of the host.
    by: usize,
    at: Instant,
}

/// A client that writes without pause to whoever answers.
pub struct Writer {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    thread: JoinHandle<Vec<Written>>,
}

/// What the writer has seen.
pub struct Account {
    pub tags: Vec<String>,
    /// The hosts that acknowledged writes, each as often as the role came to it.
    pub hosts: Vec<usize>,
    /// The longest times without an acknowledged write, the longest first: while the role was somewhere else, and others.
    pub takeovers: Vec<Duration>,
    pub pauses: Vec<Duration>,
}

impl Writer {
    /// Begins; the indexes of the hosts in the account are those of this list.
    pub fn start(site: &Site, more: &[&Host]) -> Self {
        let urls: Vec<String> = site.hosts().chain(more.iter().copied()).map(|host| host.url("/tags")).collect();
        let agent = site.founder.agent_for(Duration::from_secs(2));
        let session = site.hosts().nth(site.primary()).unwrap().log_in();
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, counted) = (stop.clone(), count.clone());
        let thread = thread::spawn(move || write(&agent, &urls, &session, &stopped, &counted));
        let writer = Self { stop, count, thread };
        writer.wait_more();
        writer
    }

    /// Waits for a write that begins from now on.
    pub fn wait_more(&self) {
        let before = self.count.load(Ordering::Relaxed);
        wait_until("writes are acknowledged", || self.count.load(Ordering::Relaxed) > before + 1);
    }

    /// Ends it.
    pub fn finish(self) -> Account {
        self.stop.store(true, Ordering::Relaxed);
        let written = self.thread.join().unwrap();
        let mut hosts = vec![written[0].by];
        let (mut takeovers, mut pauses) = (Vec::new(), Vec::new());
        for pair in written.windows(2) {
            let gap = pair[1].at - pair[0].at;
            if pair[0].by == pair[1].by {
                pauses.push(gap);
            } else {
                hosts.push(pair[1].by);
                takeovers.push(gap);
            }
        }
        pauses.sort_by(|a, b| b.cmp(a));
        pauses.truncate(3);
        Account { tags: written.into_iter().map(|one| one.tag).collect(), hosts, takeovers, pauses }
    }
}

fn write(agent: &Agent, urls: &[String], session: &str, stop: &AtomicBool, count: &AtomicUsize) -> Vec<Written> {
    let (mut written, mut by) = (Vec::new(), 0);
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let tag = format!("w{number:06}");
        let body = json!({"name": tag, "color": "#112233"});
        let answer = agent.post(&urls[by]).header("authorization", session).send_json(body);
        if answer.is_ok_and(|answer| answer.status() == StatusCode::OK) {
            written.push(Written { tag, by, at: Instant::now() });
            count.fetch_add(1, Ordering::Relaxed);
        } else {
            by = (by + 1) % urls.len();
        }
    }
    written
}
