//! What is done to the cluster, and how it ends. Each fault keeps within what the cluster promises to survive: one member at a
//! time may lose its memory, and what only the others can see, such as an older copy of a member, is done while nothing else is
//! wrong. Must never harm two things of one member at once that would hide each other.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use rand::{RngExt, rngs::SmallRng};
use serde_json::json;
use twistlock_ha::{
    control::{self, Call},
    node::Status,
};

use crate::{
    disks::{self, Frozen},
    network,
    site::{Site, picture},
};

/// How long one step of an operation of the cluster may take.
const OPERATION_LIMIT: Duration = Duration::from_secs(30);
const STEP: Duration = Duration::from_millis(50);

/// Every kind of fault, and its name.
pub const KINDS: &[(&str, Kind)] = &[
    ("kill-one", Kind::KillOne),
    ("kill-two", Kind::KillTwo),
    ("kill-all", Kind::KillAll),
    ("restart", Kind::Restart),
    ("stop", Kind::Stop),
    ("partition-links", Kind::PartitionLinks),
    ("partition-host", Kind::PartitionHost),
    ("partition-pair", Kind::PartitionPair),
    ("one-way-in", Kind::OneWayIn),
    ("one-way-out", Kind::OneWayOut),
    ("loss", Kind::Loss),
    ("disk-full", Kind::DiskFull),
    ("disk-error", Kind::DiskError),
    ("disk-hang", Kind::DiskHang),
    ("disk-slow", Kind::DiskSlow),
    ("disk-freeze", Kind::DiskFreeze),
    ("amnesia-removed", Kind::LogRemoved),
    ("amnesia-emptied", Kind::LogEmptied),
    ("amnesia-segment", Kind::SegmentRemoved),
    ("old-log", Kind::OldLog),
    ("old-data", Kind::OldData),
    ("flip-log", Kind::FlipLog),
    ("flip-database", Kind::FlipDatabase),
    ("flip-small", Kind::FlipSmall),
    ("clock", Kind::Clock),
    ("switchover", Kind::Switchover),
    ("pause", Kind::Pause),
    ("rejoin", Kind::Rejoin),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    KillOne,
    KillTwo,
    KillAll,
    Restart,
    Stop,
    PartitionLinks,
    PartitionHost,
    PartitionPair,
    OneWayIn,
    OneWayOut,
    Loss,
    DiskFull,
    DiskError,
    DiskHang,
    DiskSlow,
    DiskFreeze,
    LogRemoved,
    LogEmptied,
    SegmentRemoved,
    OldLog,
    OldData,
    FlipLog,
    FlipDatabase,
    FlipSmall,
    Clock,
    Switchover,
    Pause,
    Rejoin,
}

impl Kind {
    pub fn name(self) -> &'static str {
        KINDS.iter().find(|(_, kind)| *kind == self).expect("every kind has a name").0
    }

    /// A member forgets something: one at a time.
    fn memory(self) -> bool {
        use Kind::*;
        matches!(self, LogRemoved | LogEmptied | SegmentRemoved | OldLog | OldData | FlipLog | FlipDatabase | FlipSmall)
    }

    /// Only while all else is well: what the cluster promises then it cannot promise otherwise.
    fn alone(self) -> bool {
        use Kind::*;
        matches!(self, SegmentRemoved | OldLog | OldData | FlipLog | FlipSmall | Rejoin)
    }

    /// True if its member's process or files are harmed: by one fault at a time.
    fn takes_member(self) -> bool {
        use Kind::*;
        self.memory()
            || matches!(self, Restart | Stop | DiskFull | DiskError | DiskHang | DiskSlow | DiskFreeze | Rejoin)
    }

    /// From the begin to the end, in milliseconds.
    fn span(self) -> std::ops::Range<u64> {
        use Kind::*;
        match self {
            KillOne | KillTwo | KillAll | Restart | Switchover => 0..1,
            Stop | PartitionLinks | PartitionHost | PartitionPair | OneWayIn | OneWayOut => 50..6000,
            Loss | DiskSlow | Pause | Clock => 1000..6000,
            DiskFull | DiskError | DiskHang | DiskFreeze => 1000..8000,
            _ => 200..4000,
        }
    }
}

/// One fault of an episode.
#[derive(Clone, Debug)]
pub struct Step {
    pub kind: Kind,
    /// It begins so long after the episode.
    pub at: Duration,
    pub lasts: Duration,
    /// Whether the PRIMARY is meant, or which other one.
    primary: bool,
    /// Chooses among what the kind leaves open.
    choice: u64,
}

/// The faults of one episode, from the kinds that are wanted.
pub fn plan(rng: &mut SmallRng, wanted: &[Kind]) -> Vec<Step> {
    let count = if rng.random_range(0..10) < 7 { 1 } else { rng.random_range(2..4) };
    let mut steps: Vec<Step> = Vec::new();
    for number in 0..count {
        // The same numbers are drawn whatever is taken, so that a seed means the same with other faults of a list.
        let kind = wanted[rng.random_range(0..wanted.len())];
        let (primary, choice) = (rng.random_bool(0.5), rng.random());
        let (at, lasts) = (rng.random_range(0..2500), rng.random_range(kind.span()));
        // A pause cannot be ended while the disk of the PRIMARY is full, and is ended before the disk is.
        let dull = |one: Kind, other: Kind| one == Kind::Pause && other == Kind::DiskFull;
        let crowded = kind.alone()
            || steps.iter().any(|step| {
                step.kind.alone()
                    || (step.kind.memory() && kind.memory())
                    || dull(step.kind, kind)
                    || dull(kind, step.kind)
            });
        if number > 0 && crowded {
            continue;
        }
        let at = Duration::from_millis(if number == 0 { 0 } else { at });
        steps.push(Step { kind, at, lasts: Duration::from_millis(lasts), primary, choice });
    }
    steps
}

/// What ends a fault.
type End = Box<dyn FnOnce(&Site) -> Result<(), String>>;

/// A fault that has begun.
pub struct Begun {
    pub kind: Kind,
    /// What was done, for the report.
    pub text: String,
    pub until: Instant,
    member: Option<usize>,
    end: End,
}

impl Begun {
    pub fn end(self, site: &Site) -> Result<(), String> {
        (self.end)(site).map_err(|error| format!("{}: {error}", self.text))
    }
}

/// Begins a fault. None if all members it could hit have another one.
pub fn begin(step: &Step, site: &Site, others: &[Begun]) -> Option<Result<Begun, String>> {
    let taken: BTreeSet<usize> = others.iter().filter_map(|begun| begun.member).collect();
    let primary = site.primary().unwrap_or(0);
    let first = if step.primary { primary } else { (primary + 1 + (step.choice % 2) as usize) % 3 };
    let free = |node: &usize| !step.kind.takes_member() || !taken.contains(node);
    let node = (0..3).map(|more| (first + more) % 3).find(free)?;
    let role = if node == primary { "PRIMARY" } else { "SECONDARY" };
    let text = match step.kind {
        Kind::KillAll | Kind::Loss | Kind::Switchover | Kind::Pause => step.kind.name().to_owned(),
        Kind::KillTwo => format!("{} of node{} ({role}) and node{}", step.kind.name(), node + 1, (node + 1) % 3 + 1),
        _ => format!("{} of node{} ({role})", step.kind.name(), node + 1),
    };
    let begun = harm(step, site, node);
    let member = step.kind.takes_member().then_some(node);
    let until = Instant::now() + step.lasts;
    Some(begun.map(|(more, end)| Begun { kind: step.kind, text: format!("{text}{more}"), until, member, end }))
}

fn nothing() -> End {
    Box::new(|_| Ok(()))
}

/// Does it. Returns more about it, and what ends it.
fn harm(step: &Step, site: &Site, node: usize) -> Result<(String, End), String> {
    use Kind::*;
    let choice = step.choice;
    let plain = |end: End| Ok((String::new(), end));
    match step.kind {
        KillOne | KillTwo | KillAll | Restart | Stop => plain(send(step.kind, site, node)),
        PartitionLinks | PartitionHost | PartitionPair | OneWayIn | OneWayOut | Loss => wall(step, site, node),
        DiskFull => {
            let ballast = disks::fill(&site.node(node).data);
            plain(Box::new(move |_| fs::remove_file(ballast).map_err(|error| error.to_string())))
        }
        DiskError | DiskHang | DiskSlow => {
            let (rule, told) = bad_disk(step, &site.node(node).data);
            site.preload.set(node, &rule);
            let end = move |site: &Site| {
                site.preload.set(node, "");
                Ok(())
            };
            Ok((told, Box::new(end)))
        }
        DiskFreeze => {
            let frozen = Frozen::freeze(&site.node(node).data);
            plain(Box::new(move |_| {
                drop(frozen);
                Ok(())
            }))
        }
        LogRemoved | LogEmptied | SegmentRemoved | FlipLog | FlipDatabase | FlipSmall => {
            site.hold(node)?;
            let kind = step.kind;
            plain(Box::new(move |site| {
                let damaged = damage(kind, &site.node(node).data, choice);
                site.release(node)?;
                println!("    {} of node{}: {}", kind.name(), node + 1, damaged.map_err(|error| error.to_string())?);
                Ok(())
            }))
        }
        OldLog | OldData => put_back_later(step.kind, site, node),
        Clock => {
            let seconds =
                [1, 5, 60, 3600, 86_400, 400 * 86_400][(choice % 6) as usize] * if choice % 16 < 8 { 1 } else { -1 };
            site.preload.set_clock(node, seconds * 1_000_000_000);
            let end = move |site: &Site| {
                site.preload.set_clock(node, 0);
                Ok(())
            };
            Ok((format!(" by {seconds} s"), Box::new(end)))
        }
        Switchover => {
            let refused = operate(site, Call::post("high-availability/switchover").with(json!({}))).err();
            Ok((refused.map(|why| format!(": {why}")).unwrap_or_default(), nothing()))
        }
        Pause => {
            let refused = operate(site, Call::post("high-availability/pause").with(json!({ "seconds": 600 }))).err();
            let end = |site: &Site| wait_done("resume", || resume(site));
            Ok((refused.map(|why| format!(": {why}")).unwrap_or_default(), Box::new(end)))
        }
        Rejoin => {
            remove(site, node)?;
            plain(Box::new(move |site| join_again(site, node)))
        }
    }
}

/// Sends a signal to some. Returns what takes it back.
fn send(kind: Kind, site: &Site, node: usize) -> End {
    let (count, signal) = match kind {
        Kind::Restart => (1, Signal::SIGTERM),
        Kind::Stop => (1, Signal::SIGSTOP),
        Kind::KillTwo => (2, Signal::SIGKILL),
        Kind::KillAll => (3, Signal::SIGKILL),
        _ => (1, Signal::SIGKILL),
    };
    (0..count).for_each(|more| site.signal((node + more) % 3, signal));
    if kind != Kind::Stop {
        return nothing();
    }
    Box::new(move |site| {
        site.signal(node, Signal::SIGCONT);
        Ok(())
    })
}

/// A wall in the network, or one with holes.
fn wall(step: &Step, site: &Site, node: usize) -> Result<(String, End), String> {
    let port = network::HA_PORT + site.port_offset();
    let address = |node: usize| format!("127.0.0.{}", node % 3 + 1);
    let (own, other) = (address(node), address(node + 1 + (step.choice % 2) as usize));
    let links = |from: &str, verdict: &str| {
        // Datagrams have the number at both ends.
        ["tcp dport", "tcp sport", "udp dport"].map(|side| format!("{from} {side} {port} {verdict}\n")).concat()
    };
    let observer = crate::sampler::OBSERVER;
    let percent = [2, 10, 30][(step.choice / 2 % 3) as usize];
    let (text, rules) = match step.kind {
        Kind::PartitionLinks => {
            (String::new(), links(&format!("ip saddr {own}"), "drop") + &links(&format!("ip daddr {own}"), "drop"))
        }
        Kind::PartitionHost => {
            let open = format!("ip saddr {observer} accept\nip daddr {observer} accept\n");
            (String::new(), format!("{open}ip saddr {own} drop\nip daddr {own} drop\n"))
        }
        Kind::PartitionPair => {
            let both = [(&own, &other), (&other, &own)];
            let rules = both.map(|(from, to)| links(&format!("ip saddr {from} ip daddr {to}"), "drop"));
            (format!(" from {other}"), rules.concat())
        }
        Kind::OneWayIn => (String::new(), links(&format!("ip daddr {own}"), "drop")),
        Kind::OneWayOut => (String::new(), links(&format!("ip saddr {own}"), "drop")),
        _ => {
            let random = format!("numgen random mod 100 < {percent} drop");
            (format!(" {percent} %, all links"), links("", &random))
        }
    };
    let name = format!("wall{}", step.choice);
    network::raise(&name, &rules);
    let end = move |_: &Site| {
        network::remove(&name);
        Ok(())
    };
    Ok((text, Box::new(end)))
}

/// The rule, and the same for people.
fn bad_disk(step: &Step, data: &Path) -> (String, String) {
    let choice = step.choice;
    let operations = ["ws", "s", "r", "rwso"][(choice % 4) as usize];
    let files = ["", "raft-log/", "database/"][(choice / 4 % 3) as usize];
    let (operations, action) = match step.kind {
        Kind::DiskError => (operations, "eio".to_owned()),
        Kind::DiskHang => (operations, "hang".to_owned()),
        _ => ("s", format!("delay:{}", [20, 100, 300, 1500][(choice / 16 % 4) as usize])),
    };
    let rule = format!("{operations} {}/{files} {action}\n", data.display());
    (rule, format!(" {operations} data/{files} {action}"))
}

/// The segments of a raft log, the oldest first.
fn segments(data: &Path) -> io::Result<Vec<PathBuf>> {
    let entries: io::Result<Vec<_>> = fs::read_dir(data.join("raft-log"))?.map(|entry| Ok(entry?.path())).collect();
    let mut all = entries?;
    all.retain(|path| path.is_file());
    all.sort();
    Ok(all)
}

/// Harms the files of a member that does not run. Returns what it did.
fn damage(kind: Kind, data: &Path, choice: u64) -> io::Result<String> {
    let pick = |all: Vec<PathBuf>| {
        let at = choice as usize % all.len().max(1);
        all.into_iter().nth(at).ok_or_else(|| io::Error::other("there is no such file"))
    };
    match kind {
        Kind::LogRemoved => fs::remove_dir_all(data.join("raft-log")).map(|()| "raft-log removed".into()),
        Kind::LogEmptied => {
            segments(data)?.iter().try_for_each(fs::remove_file)?;
            Ok("raft-log emptied".into())
        }
        Kind::SegmentRemoved => {
            let path = pick(segments(data)?)?;
            fs::remove_file(&path).map(|()| format!("{} removed", path.display()))
        }
        Kind::FlipLog => flip(&pick(segments(data)?)?, choice),
        Kind::FlipDatabase => flip(&data.join("database/console.db"), choice),
        _ => {
            let small = ["membership.json", "promise-ms", "raft-log.created", "database/console.checkpoint"];
            flip(&pick(small.map(|name| data.join(name)).into_iter().filter(|path| path.exists()).collect())?, choice)
        }
    }
}

/// Turns one bit over, of those that are not zeros at the end of a file.
fn flip(path: &Path, choice: u64) -> io::Result<String> {
    let mut bytes = fs::read(path)?;
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    if used == 0 {
        return Ok(format!("{} has nothing to be turned over", path.display()));
    }
    let at = (choice >> 8) as usize % used;
    bytes[at] ^= 1 << (choice % 8);
    fs::write(path, bytes)?;
    Ok(format!("{}: a bit of byte {at} turned over", path.display()))
}

/// Copies what a member has now; the end puts it back, when the others have gone on.
fn put_back_later(kind: Kind, site: &Site, node: usize) -> Result<(String, End), String> {
    let data = &site.node(node).data;
    let what = if kind == Kind::OldLog { data.join("raft-log") } else { data.clone() };
    let copy = data.with_file_name("copy");
    let run = |program: &str, arguments: &[&Path]| {
        let status = Command::new(program).args(arguments).status().map_err(|error| format!("{program}: {error}"))?;
        if status.success() { Ok(()) } else { Err(format!("{program} {arguments:?}: {status}")) }
    };
    site.hold(node)?;
    let copied = run("cp", &[Path::new("-a"), &what, &copy]);
    site.release(node)?;
    copied?;
    let end = move |site: &Site| {
        site.hold(node)?;
        let put = empty(&what).map_err(|error| error.to_string()).and_then(|()| {
            run("cp", &[Path::new("-a"), &copy.join("."), &what])?;
            fs::remove_dir_all(&copy).map_err(|error| error.to_string())
        });
        site.release(node)?;
        put
    };
    Ok((String::new(), Box::new(end)))
}

/// Removes everything in a folder, and not the folder: it may be a mount point.
fn empty(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
    }
    Ok(())
}

/// Has whoever is PRIMARY do something.
fn operate(site: &Site, operation: Call) -> Result<serde_json::Value, String> {
    let primary = site.primary().ok_or("there is no PRIMARY")?;
    control::ask(&site.node(primary).control, &operation, OPERATION_LIMIT).map_err(|error| error.to_string())
}

/// Ends a pause. Without a PRIMARY that is done on each node alone, so that there is one.
fn resume(site: &Site) -> Result<(), String> {
    if site.primary().is_none() {
        for node in 0..3 {
            let operation = Call::post("high-availability/resume");
            let _ = control::send(&site.node(node).control, &operation, OPERATION_LIMIT);
        }
    }
    match operate(site, Call::post("high-availability/resume")) {
        // It may have been done though its outcome was unknown.
        Err(why) if !why.contains("is not paused") => Err(why),
        _ => Ok(()),
    }
}

/// Tries until it is done.
fn wait_done(what: &str, mut act: impl FnMut() -> Result<(), String>) -> Result<(), String> {
    let deadline = Instant::now() + 2 * OPERATION_LIMIT;
    loop {
        match act() {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(format!("{what}: {error}")),
            Err(_) => thread::sleep(STEP),
        }
    }
}

/// Removes a member, and all that its host has.
fn remove(site: &Site, node: usize) -> Result<(), String> {
    let name = site.node(node).name.clone();
    // A PRIMARY is not removed: it hands the role over first.
    wait_done("another PRIMARY", || {
        if site.primary() != Some(node) {
            return Ok(());
        }
        operate(site, Call::post("high-availability/switchover").with(json!({})))?;
        Err("it has not gone over yet".into())
    })?;
    wait_done("remove", || {
        let member = |status: &Status| status.membership.roster.members.iter().any(|member| member.name == name);
        let removed = operate(site, Call::delete(format!("high-availability/members/{}?force=false", name.clone())));
        let primary = site.primary().and_then(|primary| site.statuses()[primary].clone());
        match primary {
            Some(status) if !member(&status) => Ok(()),
            _ => Err(removed.err().unwrap_or_else(|| "it is a member still".into())),
        }
    })?;
    site.hold(node)?;
    empty(&site.node(node).data).map_err(|error| error.to_string())
}

/// Lets the host of a removed member ask to join, and admits it.
fn join_again(site: &Site, node: usize) -> Result<(), String> {
    let mut line = String::new();
    wait_done("invite", || {
        let invited = operate(site, Call::get("high-availability/join-script?validSec=600"))?;
        line = invited["line"].as_str().unwrap_or_default().to_owned();
        Ok(())
    })?;
    let from = line.find("TWJ1.").ok_or("no token in the line")?;
    let token = line[from..].split('\'').next().unwrap_or_default();
    let file = site.file();
    let ca = fs::read_to_string(&file.ca).map_err(|error| error.to_string())?;
    let addresses: Vec<_> = file.nodes.iter().map(|node| node.console_url.replace("https://", "")).collect();
    let join = json!({"token": token, "addresses": addresses, "ca": ca});
    fs::write(site.node(node).data.join("join.json"), join.to_string()).map_err(|error| error.to_string())?;
    site.release(node)?;
    wait_done("apply", || operate(site, Call::post("high-availability/apply")).map(drop))?;
    let vote = |status: &Status| status.membership.roster.members.iter().filter(|member| member.voter).count() == 3;
    wait_done("a vote", || {
        let statuses = site.statuses();
        if statuses.iter().flatten().any(vote) { Ok(()) } else { Err(picture(&statuses)) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    /// What a seed means, and that no plan asks for more than the cluster promises.
    #[test]
    fn plans_are_the_same_for_a_seed_and_within_the_promises() {
        let all: Vec<Kind> = KINDS.iter().map(|(_, kind)| *kind).collect();
        let plans = |seed| {
            let mut rng = SmallRng::seed_from_u64(seed);
            (0..500).map(|_| plan(&mut rng, &all)).collect::<Vec<_>>()
        };
        assert_eq!(format!("{:?}", plans(7)), format!("{:?}", plans(7)));
        assert_ne!(format!("{:?}", plans(7)), format!("{:?}", plans(8)));
        let mut seen = BTreeSet::new();
        for steps in plans(7) {
            seen.extend(steps.iter().map(|step| step.kind));
            assert!(steps.iter().filter(|step| step.kind.memory()).count() <= 1, "{steps:?}");
            assert!(steps.len() == 1 || !steps.iter().any(|step| step.kind.alone()), "{steps:?}");
        }
        assert_eq!(seen.len(), KINDS.len(), "every kind comes up");
    }

    #[test]
    fn damage_is_done() {
        let folder = tempfile::tempdir().unwrap();
        let (data, log) = (folder.path(), folder.path().join("raft-log"));
        fs::create_dir_all(&log).unwrap();
        let whole = [1, 2, 3, 0, 0];
        fs::write(log.join("0001"), whole).unwrap();
        for choice in [0x1_02, 0x2_07, 0x3_00] {
            damage(Kind::FlipLog, data, choice).unwrap();
            let now = fs::read(log.join("0001")).unwrap();
            let bits = now.iter().zip(whole).map(|(one, other)| (one ^ other).count_ones()).sum::<u32>();
            assert_eq!(bits, 1, "{now:?}");
            fs::write(log.join("0001"), whole).unwrap();
        }
        damage(Kind::LogEmptied, data, 0).unwrap();
        assert!(log.exists() && segments(data).unwrap().is_empty());
        damage(Kind::LogRemoved, data, 0).unwrap();
        assert!(!log.exists() && damage(Kind::SegmentRemoved, data, 0).is_err());
    }
}
