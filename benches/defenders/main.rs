//! What many Defenders cost: a dev cluster of three members, and a crowd of them that connect over loopback addresses, send events,
//! and lose their PRIMARY. `scripts/bench/defenders.sh` runs it. Must never report a figure of a run whose events are not all in the
//! database, each exactly once.

mod crowd;
mod handshakes;
mod site;

use std::{
    path::PathBuf,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Serialize;
use twistlock_ha::descriptors;

use crowd::Crowd;
use site::{Others, Site};

/// Longest time for what has to happen by itself.
const LIMIT: Duration = Duration::from_secs(120);
/// How long the first connections may take to begin: a crowd that nobody has lost.
const ARRIVE: Duration = Duration::from_secs(10);

/// Measures what many Defenders cost on one PRIMARY
#[derive(Debug, Parser)]
struct Options {
    /// Defenders that are connected at once [default: 10000; with --million 200]
    #[arg(long, value_name = "N")]
    defenders: Option<usize>,
    /// Events a second from all of them
    #[arg(long, value_name = "N", default_value_t = 2000.0)]
    rate: f64,
    /// Seconds of each part
    #[arg(long, value_name = "N", default_value_t = 15)]
    seconds: u64,
    /// Instead: a million events through 30 takeovers, then a count of them in the database
    #[arg(long)]
    million: bool,
    /// Events of --million
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    events: u64,
    /// Takeovers of --million
    #[arg(long, value_name = "N", default_value_t = 30)]
    takeovers: u64,
    /// Instead: what so many TLS handshakes of each kind cost, without a cluster
    #[arg(long, value_name = "N", conflicts_with = "million")]
    handshakes: Option<usize>,
    /// The program of the members
    #[arg(long, value_name = "FILE", default_value = env!("CARGO_BIN_EXE_twistlockd"))]
    program: PathBuf,
    /// Folder, and so the disk, of the members [default: that of temporary files]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Added to the ports of the members
    #[arg(long, value_name = "N", default_value_t = 3900)]
    port_offset: u16,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
    /// What cargo says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

/// Some times in milliseconds.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Times {
    count: usize,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

impl Times {
    fn of(mut spans: Vec<Duration>) -> Self {
        spans.sort();
        let at = |part: f64| {
            let place = ((spans.len().max(1) - 1) as f64 * part) as usize;
            spans.get(place).map_or(f64::NAN, |span| (span.as_secs_f64() * 1e5).round() / 100.0)
        };
        Self { count: spans.len(), p50_ms: at(0.5), p99_ms: at(0.99), max_ms: at(1.0) }
    }
}

/// What was found of many Defenders.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Figures {
    connected: usize,
    connect_seconds: f64,
    /// Memory of the PRIMARY's process that is not of files, for each connection.
    memory_kib: f64,
    /// Processors that the PRIMARY's process keeps busy: without Defenders, with all of them connected, and while they
    /// send events.
    cores: [f64; 3],
    events_a_second: f64,
    acknowledged: Times,
    /// Writes of others: without Defenders, with all of them connected, and while they send events.
    others_alone: Times,
    others_connected: Times,
    others_during: Times,
    /// From the signal to the welcome by another PRIMARY.
    back: Times,
    resumed: usize,
    in_full: usize,
    others_gap_ms: f64,
    events: u64,
}

/// What was found of a million events.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Million {
    defenders: usize,
    takeovers: u64,
    seconds: f64,
    resumed: usize,
    in_full: usize,
    made: u64,
    /// As the database has them: each exactly once.
    events: u64,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(count) = options.handshakes {
        let found = handshakes::Costs::measure(count)?;
        if options.json {
            return print_json(&found);
        }
        found.print();
        return Ok(());
    }
    descriptors::raise().map_err(anyhow::Error::msg)?;
    let site = Site::start(&options.program, options.dir.as_deref(), options.port_offset)?;
    if options.million {
        let found = million(&options, &site)?;
        return if options.json { print_json(&found) } else { print_million(&found) };
    }
    let found = measure(&options, &site)?;
    if options.json { print_json(&found) } else { print_figures(&found) }
}

fn print_json(found: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(found)?);
    Ok(())
}

fn measure(options: &Options, site: &Site) -> Result<Figures> {
    let count = options.defenders.unwrap_or(10_000);
    let span = Duration::from_secs(options.seconds);
    let desk = site.desk()?;
    let mut crowd = Crowd::register(&desk, &site.invite(&desk)?, site.consoles(), count)?;
    eprintln!("{count} Defenders are registered");
    let others = Others::start(site)?;
    let (others_alone, alone) = busy(site, || others.times(span))?;

    let (before, begin) = (site.memory()?, Instant::now());
    crowd.start(ARRIVE);
    crowd.wait_for("all are connected", LIMIT, |tally| tally.connected.load(Relaxed) == count)?;
    let connect_seconds = begin.elapsed().as_secs_f64();
    let (others_connected, connected_only) = busy(site, || others.times(span))?;
    let connected = crowd.tally.connected.load(Relaxed);
    let memory_kib = site.memory()?.saturating_sub(before) as f64 / count as f64;
    eprintln!("{connected} Defenders are connected");

    drop((crowd.waits(), others.taken()));
    let (begin, stored) = (Instant::now(), crowd.tally.stored.load(Relaxed));
    let ((), during) = busy(site, || crowd.pace(options.rate, span))?;
    let stored = crowd.tally.stored.load(Relaxed) - stored;
    let events_a_second = stored as f64 / begin.elapsed().as_secs_f64();
    let (acknowledged, others_during) = (Times::of(crowd.waits()), Times::of(others.taken()));
    crowd.wait_stored(LIMIT)?;

    crowd.count_arrivals();
    let killed = site.kill_primary()?;
    crowd.pace(options.rate, Duration::from_secs(5));
    crowd.wait_for("all are connected again", LIMIT, |tally| tally.connected.load(Relaxed) == count)?;
    let arrivals = crowd.arrivals();
    ensure!(arrivals.len() >= count, "{} welcomes after the fault", arrivals.len());
    let back = Times::of(arrivals.iter().map(|at| at.duration_since(killed)).collect());
    crowd.wait_stored(LIMIT)?;
    let others_gap_ms =
        others.gap_after(killed).context("nobody else has written after the fault")?.as_secs_f64() * 1e3;
    drop(others);
    let events = crowd.verify(&site.desk()?)?;
    let (resumed, in_full) = (crowd.tally.resumed.load(Relaxed), crowd.tally.full.load(Relaxed));
    Ok(Figures {
        connected,
        connect_seconds,
        memory_kib,
        cores: [alone, connected_only, during],
        events_a_second,
        acknowledged,
        others_alone,
        others_connected,
        others_during,
        back,
        resumed,
        in_full,
        others_gap_ms,
        events,
    })
}

/// Does something, and returns how many processors the PRIMARY has kept busy meanwhile.
fn busy<T>(site: &Site, work: impl FnOnce() -> T) -> Result<(T, f64)> {
    let (before, begin) = (site.cpu()?, Instant::now());
    let done = work();
    let used = site.cpu()?.saturating_sub(before).as_secs_f64() / begin.elapsed().as_secs_f64();
    Ok((done, (used * 100.0).round() / 100.0))
}

fn million(options: &Options, site: &Site) -> Result<Million> {
    let count = options.defenders.unwrap_or(200);
    let (each, takeovers) = (options.events / count.max(1) as u64, options.takeovers);
    ensure!(takeovers > 0 && each >= takeovers, "at least one event of each Defender for each takeover is needed");
    let desk = site.desk()?;
    let mut crowd = Crowd::register(&desk, &site.invite(&desk)?, site.consoles(), count)?;
    crowd.start(Duration::from_secs(1));
    crowd.wait_for("all are connected", LIMIT, |tally| tally.connected.load(Relaxed) == count)?;
    crowd.count_arrivals();
    let begin = Instant::now();
    for takeover in 1..=takeovers {
        let now = each * takeover / takeovers - each * (takeover - 1) / takeovers;
        let half = crowd.given() + now * count as u64 / 2;
        crowd.give(now);
        crowd.wait_for("half of it is stored", LIMIT, |tally| tally.stored.load(Relaxed) >= half)?;
        site.kill_primary()?;
        crowd.wait_stored(LIMIT)?;
        site.wait_healthy()?;
        eprintln!("takeover {takeover}: {} events are stored", crowd.given());
    }
    let seconds = begin.elapsed().as_secs_f64();
    let events = crowd.verify(&site.desk()?)?;
    let (resumed, in_full) = (crowd.tally.resumed.load(Relaxed), crowd.tally.full.load(Relaxed));
    let made = crowd.given();
    Ok(Million { defenders: count, takeovers, seconds, resumed, in_full, made, events })
}

fn print_figures(found: &Figures) -> Result<()> {
    let row = |name: &str, value: String| println!("{name:<44} {value:>12}");
    let times = |name: &str, Times { p50_ms, p99_ms, max_ms, count }: &Times| {
        println!("{name:<44} {p50_ms:>12.1} {p99_ms:>10.1} {max_ms:>10.1} {count:>9}");
    };
    row("connected Defenders", found.connected.to_string());
    row("until all were connected, s", format!("{:.1}", found.connect_seconds));
    row("memory of the PRIMARY for each, KiB", format!("{:.1}", found.memory_kib));
    for (when, cores) in ["no Defenders", "all connected", "all send events"].into_iter().zip(found.cores) {
        row(&format!("processors of the PRIMARY: {when}"), format!("{cores:.2}"));
    }
    row("events a second", format!("{:.0}", found.events_a_second));
    row("resumed sessions after the takeover", format!("{} of {}", found.resumed, found.resumed + found.in_full));
    row("events, each exactly once", found.events.to_string());
    row("others: no write after the kill for, ms", format!("{:.0}", found.others_gap_ms));
    println!("\n{:<44} {:>12} {:>10} {:>10} {:>9}", "milliseconds", "p50", "p99", "max", "count");
    times("an event is acknowledged", &found.acknowledged);
    times("connected again after kill -9", &found.back);
    times("a write of others: no Defenders", &found.others_alone);
    times("a write of others: all connected", &found.others_connected);
    times("a write of others: all send events", &found.others_during);
    Ok(())
}

fn print_million(found: &Million) -> Result<()> {
    let Million { defenders, takeovers, seconds, resumed, in_full, made, events } = found;
    println!("{defenders} Defenders, {takeovers} takeovers in {seconds:.0} s");
    println!("{} connections after a fault, {resumed} of them resumed", resumed + in_full);
    println!("{made} events made, {events} in the database, each exactly once");
    Ok(())
}
