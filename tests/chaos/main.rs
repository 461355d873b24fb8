//! A cluster of real daemons under random faults, with clients whose every answer is checked: no acknowledged write is lost, all
//! histories are linearizable, no two nodes are open at once, the databases are equal, nothing panics, and after each fault the
//! cluster is whole again by itself.
//!
//! `CHAOS_SECONDS`, `CHAOS_SEED`, `CHAOS_FAULTS` and `CHAOS_JSON` (a file) say how; scripts/chaos.sh sets them. A seed gives the
//! same faults in the same order at the same members' roles; when the processes meet them is up to the machine.

mod board;
#[path = "../e2e/cluster.rs"]
#[allow(dead_code, reason = "shared with the tests of tests/e2e, which use more of it")]
mod cluster;
#[path = "../e2e/databases.rs"]
mod databases;
mod disks;
mod faults;
mod linear;
mod load;
mod logs;
#[path = "../e2e/network.rs"]
#[allow(dead_code, reason = "shared with the tests of tests/e2e, which use more of it")]
mod network;
#[path = "../e2e/preload.rs"]
#[allow(dead_code, reason = "shared with the tests of tests/e2e, which use more of it")]
mod preload;
mod report;
#[path = "../e2e/sampler.rs"]
#[allow(dead_code, reason = "shared with the tests of tests/e2e, which use more of it")]
mod sampler;
mod site;
#[path = "../e2e/writers.rs"]
#[allow(dead_code, reason = "shared with the tests of tests/e2e, which use more of it")]
mod writers;

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use faults::{Begun, KINDS, Kind, Step};
use load::{Load, Shared};
use report::Report;
use sampler::Sampler;
use site::Site;

/// How long the cluster may take to be whole again after a fault: a member whose `promise-ms` was damaged is silent for 61 s.
const RECOVERY_LIMIT: Duration = Duration::from_secs(90);
/// From one comparison of the databases to the next.
const COMPARE_EVERY: Duration = Duration::from_secs(600);
/// From one look at a port to the next: each millisecond would be a flood for a machine that has clients and faults too.
const SAMPLE_EVERY: Duration = Duration::from_millis(4);
/// What is done unless a list says otherwise.
const DEFAULT_FAULTS: &str = "all";

/// What was asked for.
struct Settings {
    seconds: u64,
    seed: u64,
    kinds: Vec<Kind>,
}

impl Settings {
    fn read() -> Self {
        let number = |name: &str| {
            let text = env::var(name).ok().filter(|text| !text.is_empty())?;
            Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}: a number is needed")))
        };
        let list = env::var("CHAOS_FAULTS").ok().filter(|text| !text.is_empty());
        Self {
            seconds: number("CHAOS_SECONDS").unwrap_or(20),
            seed: number("CHAOS_SEED").unwrap_or_else(|| rand::random_range(0..1_000_000)),
            kinds: kinds_of(list.as_deref().unwrap_or(DEFAULT_FAULTS)).unwrap_or_else(|error| panic!("{error}")),
        }
    }
}

/// The kinds of a list: names or the beginnings of some, `all`, and with a `-` before them what is left out.
fn kinds_of(list: &str) -> Result<Vec<Kind>, String> {
    let mut chosen = BTreeSet::new();
    for word in list.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        let (name, wanted) = word.strip_prefix('-').map_or((word, true), |name| (name, false));
        let found: Vec<Kind> =
            KINDS.iter().filter(|(known, _)| name == "all" || known.starts_with(name)).map(|(_, kind)| *kind).collect();
        if found.is_empty() {
            let names: Vec<_> = KINDS.iter().map(|(name, _)| *name).collect();
            return Err(format!("found the fault \"{name}\", allowed: all, {}", names.join(", ")));
        }
        for kind in found {
            if wanted {
                chosen.insert(kind)
            } else {
                chosen.remove(&kind)
            };
        }
    }
    if chosen.is_empty() { Err(format!("\"{list}\" leaves no fault")) } else { Ok(chosen.into_iter().collect()) }
}

/// The run.
struct Chaos {
    settings: Settings,
    site: Site,
    shared: Arc<Shared>,
    report: Report,
    done: BTreeSet<Kind>,
    begin: Instant,
}

impl Chaos {
    fn run(settings: Settings) -> Report {
        let site = Site::start();
        let sampler = Sampler::start_every(SAMPLE_EVERY, 3, site.port_offset());
        let shared = Shared::new(&site.file());
        let begin = Instant::now();
        let mut chaos = Self { settings, site, shared, report: Report::default(), done: BTreeSet::new(), begin };
        chaos.rounds();
        chaos.finish(sampler);
        chaos.report
    }

    /// Episodes, with a comparison of the databases now and then and at the end.
    fn rounds(&mut self) {
        let mut rng = SmallRng::seed_from_u64(self.settings.seed);
        let end = self.begin + Duration::from_secs(self.settings.seconds);
        let (mut round, mut number) = (0, 0);
        while Instant::now() < end {
            round += 1;
            let load = Load::start(&self.shared, self.settings.seed, round);
            let next = end.min(Instant::now() + COMPARE_EVERY);
            let mut whole = true;
            while whole && Instant::now() < next {
                number += 1;
                let steps = faults::plan(&mut rng, &self.settings.kinds);
                wait_until(Instant::now() + Duration::from_millis(rng.random_range(300..1500)));
                whole = self.episode(number, &steps);
            }
            load.stop(&self.shared);
            // Nothing more can be learned from a cluster that does not come back.
            if !whole {
                return;
            }
            self.compare(Instant::now() < end);
        }
    }

    /// Does the faults, ends them, and waits until all is well. False if it does not come.
    fn episode(&mut self, number: usize, steps: &[Step]) -> bool {
        let begin = Instant::now();
        let (mut waiting, mut begun, mut texts): (Vec<&Step>, Vec<Begun>, Vec<String>) =
            (steps.iter().collect(), Vec::new(), Vec::new());
        let mut kinds = Vec::new();
        while !waiting.is_empty() || !begun.is_empty() {
            let now = Instant::now();
            if let Some(at) = waiting.iter().position(|step| begin + step.at <= now) {
                let step = waiting.remove(at);
                match faults::begin(step, &self.site, &begun) {
                    None => {}
                    Some(Ok(one)) => {
                        texts.push(format!("{} {:.1} s", one.text, step.lasts.as_secs_f64()));
                        kinds.push(one.kind);
                        begun.push(one);
                    }
                    Some(Err(error)) => self.shared.accuse(format!("episode {number}: {}: {error}", step.kind.name())),
                }
            } else if let Some(at) = begun.iter().position(|one| one.until <= now) {
                if let Err(error) = begun.remove(at).end(&self.site) {
                    self.shared.accuse(format!("episode {number}: {error}"));
                }
            } else {
                wait_until(now + Duration::from_millis(5));
            }
        }
        self.done.extend(&kinds);
        let ended = Instant::now();
        let healed = self.wait_healed(ended);
        let outage = self.shared.longest_silence(begin, Instant::now());
        let recovery = healed.as_ref().ok().map(|()| ended.elapsed());
        let said = recovery.map_or("NOT whole".into(), |time| format!("whole after {:.2} s", time.as_secs_f64()));
        let (clock, outage_s) = (self.begin.elapsed().as_secs(), outage.as_secs_f64());
        println!("{:02}:{:02} {number}: {}; outage {outage_s:.2} s, {said}", clock / 60, clock % 60, texts.join(" + "));
        self.report.add(&kinds, outage, recovery);
        let mut ends: BTreeMap<(usize, String), usize> = BTreeMap::new();
        self.site.take_ends().into_iter().for_each(|end| *ends.entry(end).or_default() += 1);
        for ((node, how), times) in ends {
            println!("    the daemon of node{} ended by itself {times} times: {how}", node + 1);
        }
        if let Err(picture) = healed {
            self.shared.accuse(format!(
                "episode {number} ({}): not whole again after {} s: {picture}",
                texts.join(" + "),
                RECOVERY_LIMIT.as_secs()
            ));
            return false;
        }
        true
    }

    /// Waits for three members in their places and for an acknowledged change after that.
    fn wait_healed(&self, since: Instant) -> Result<(), String> {
        self.site.wait_whole(RECOVERY_LIMIT)?;
        let from = Instant::now();
        while !self.shared.success_after(from) {
            if since.elapsed() > RECOVERY_LIMIT {
                return Err("all members are in their places, and no change is acknowledged".into());
            }
            wait_until(Instant::now() + Duration::from_millis(5));
        }
        Ok(())
    }

    /// Nobody writes: looks for what was acknowledged, and compares the databases.
    fn compare(&mut self, go_on: bool) {
        self.shared.verify_ledger();
        match self.site.compare(go_on) {
            Ok(line) => self.report.notes.push(line),
            Err(error) => self.shared.accuse(error),
        }
    }

    fn finish(&mut self, sampler: Sampler) {
        let sampled = thread::spawn(move || sampler.verify()).join();
        let overlaps = sampled.is_err();
        match sampled {
            Ok(line) => self.report.notes.push(line),
            Err(panic) => {
                let text = panic.downcast::<String>().map_or("see above".into(), |text| *text);
                self.shared.accuse(format!("the sampler: {text}"));
            }
        }
        let (mut panics, mut errors) = (Vec::new(), Vec::new());
        for node in 0..3 {
            let (panicked, odd) = logs::odd_lines(&self.site.log(node), &self.done);
            let name = |line: &String| format!("node{}: {line}", node + 1);
            panics.extend(panicked.iter().map(name));
            errors.extend(odd.iter().map(name));
        }
        for (what, lines) in [("panics", &panics), ("unexpected errors", &errors)] {
            if !lines.is_empty() {
                self.shared.accuse(format!(
                    "{} {what} in the logs:\n  {}",
                    lines.len(),
                    lines[..lines.len().min(5)].join("\n  ")
                ));
            }
        }
        let counts = &self.shared.counts;
        let of = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let violations = self.shared.violations();
        let lost = violations.iter().filter(|text| text.contains("are lost")).count() as u64;
        self.report.totals = vec![
            ("operations", of(&counts.operations)),
            ("acknowledged", of(&counts.acknowledged)),
            ("unknown", of(&counts.unknown)),
            ("refused connections", of(&counts.not_sent)),
            ("tags kept", self.shared.ledger_size() as u64),
            ("histories", of(&counts.boards)),
            ("operations in them", of(&counts.searched)),
            ("undecided", of(&counts.undecided)),
            ("lost", lost),
            ("violations", violations.len() as u64),
            ("two primaries", u64::from(overlaps)),
            ("panics", panics.len() as u64),
            ("unexpected errors", errors.len() as u64),
        ];
        self.report.violations = violations;
        if !self.report.violations.is_empty() {
            self.keep_logs();
        }
    }

    /// Keeps the logs of a run in which something went wrong.
    fn keep_logs(&mut self) {
        let folder = load::kept();
        let kept = fs::create_dir_all(&folder).and_then(|()| {
            (0..3).try_for_each(|node| fs::write(folder.join(format!("node{}.log", node + 1)), self.site.log(node)))
        });
        self.report.notes.push(match kept {
            Ok(()) => format!("the logs are kept in {}", folder.display()),
            Err(error) => format!("the logs could not be kept in {}: {error}", folder.display()),
        });
    }
}

fn wait_until(time: Instant) {
    thread::sleep(time.saturating_duration_since(Instant::now()));
}

#[test]
fn chaos() {
    let settings = Settings::read();
    let (seed, seconds) = (settings.seed, settings.seconds);
    let names: Vec<_> = settings.kinds.iter().map(|kind| kind.name()).collect();
    println!("seed {seed}, {seconds} s, faults: {}", names.join(","));
    let (send, receive) = std::sync::mpsc::channel();
    network::in_private_network(move || {
        // What is mounted is seen by what this thread starts, and gone with the last of it.
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        let private = std::process::Command::new("mount").args(["--make-rprivate", "/"]).status();
        assert!(private.is_ok_and(|status| status.success()), "mounts cannot be made private");
        send.send(Chaos::run(settings)).expect("somebody waits for it");
    });
    let report = receive.recv().expect("the run ends with a report");
    println!("\n{}", report.text());
    println!("again: scripts/chaos.sh --seconds {seconds} --seed {seed} --faults {}", names.join(","));
    if let Some(path) = env::var_os("CHAOS_JSON").filter(|path| !path.is_empty()) {
        fs::write(path, format!("{}\n", report.json(seed, seconds))).unwrap();
    }
    assert!(report.violations.is_empty(), "{} violations, see above", report.violations.len());
}

#[test]
fn a_list_of_faults_is_understood() {
    let names =
        |list: &str| kinds_of(list).map(|kinds| kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(","));
    assert_eq!(names("kill"), Ok("kill-one,kill-two,kill-all".into()));
    assert_eq!(names("stop, loss"), Ok("stop,loss".into()));
    assert_eq!(names("kill,-kill-all"), Ok("kill-one,kill-two".into()));
    assert_eq!(kinds_of("all").map(|kinds| kinds.len()), Ok(KINDS.len()));
    assert!(names("nonsense").unwrap_err().starts_with("found the fault \"nonsense\", allowed: all, kill-one"));
    assert_eq!(names("stop,-stop"), Err("\"stop,-stop\" leaves no fault".into()));
}
