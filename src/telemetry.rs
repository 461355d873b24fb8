//! Log lines to standard error, and the numbers for Prometheus; [`table`] has the metrics. Must never open a port, must
//! never depend on a module of ours that knows anything, and never makes whoever logs wait for a reader.

mod lines;
mod repeats;
pub mod steps;
mod table;

use std::{
    collections::VecDeque,
    fmt::{self as text, Write},
    io::IsTerminal,
    sync::{Arc, Mutex, OnceLock},
    thread,
    time::Duration,
};

pub use lines::flush;
pub use table::*;

use anyhow::{Context, Result};
use metrics::{Unit, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use schemars::JsonSchema;
use serde::Serialize;
use tracing::{Event, Level, Subscriber, field};
use tracing_subscriber::{
    EnvFilter, Layer, Registry, fmt,
    layer::{Context as LayerContext, SubscriberExt},
    registry,
    reload::{self, Handle},
    util::SubscriberInitExt,
};

use crate::{
    clock::{since_1970, unix_time_ms},
    mutex::locked,
};

/// What lets the filter of the running log be exchanged; empty before [`init`].
static FILTER: OnceLock<Handle<EnvFilter, Registry>> = OnceLock::new();

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One line of text for a reader; colour only on a terminal.
    Human,
    /// One JSON object a line.
    Json,
}

/// Sends the process's log lines to standard error, from now on: through a bounded queue, and nobody waits for its
/// other end. [`flush`] belongs before each end of the process.
///
/// Under systemd (`JOURNAL_STREAM` is set) lines carry no time and no colour: the receiver adds its own time. Libraries
/// speak only when they are one step more severe than `level`.
///
/// # Errors
/// When it was called before.
pub fn init(format: Format, level: Level) -> Result<()> {
    let received = std::env::var_os("JOURNAL_STREAM").is_some();
    let colour = !received && std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = fmt::layer().with_writer(lines::start().context("start the log")?).with_ansi(colour);
    let (filter, handle) = reload::Layer::new(EnvFilter::try_new(filter(level)).context("build the log filter")?);
    let log = registry().with(filter).with(repeats::Repeats).with(Recent);
    match (format, received) {
        (Format::Human, true) => log.with(lines.compact().without_time()).try_init(),
        (Format::Human, false) => log.with(lines.compact()).try_init(),
        (Format::Json, true) => log.with(lines.json().flatten_event(true).without_time()).try_init(),
        (Format::Json, false) => log.with(lines.json().flatten_event(true)).try_init(),
    }
    .context("start the log")?;
    // Only one call gets here: the log can be started once.
    let _ = FILTER.set(handle);
    steps::measure(level == Level::TRACE);
    Ok(())
}

/// Lines of the log that are kept in memory.
pub const RECENT_LINES: usize = 2000;
/// Longest text of a line that is kept, in bytes; the rest is cut.
const RECENT_TEXT: usize = 2048;
/// Held for moments only: the consensus loop logs, too.
static RECENT: Mutex<VecDeque<Arc<Line>>> = Mutex::new(VecDeque::new());

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Line {
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// `ERROR`, `WARN`, `INFO`, `DEBUG` or `TRACE`.
    pub level: String,
    /// The message and its fields, without line breaks.
    pub text: String,
}

/// The last lines of this process's log, the oldest first.
pub fn recent(lines: usize) -> Vec<Line> {
    let recent = locked(&RECENT);
    let last: Vec<_> = recent.iter().skip(recent.len().saturating_sub(lines)).cloned().collect();
    drop(recent);
    last.iter().map(|line| Line::clone(line)).collect()
}

/// Keeps the last lines in memory, for whoever cannot read the host's log.
struct Recent;

impl<S: Subscriber> Layer<S> for Recent {
    fn on_event(&self, event: &Event<'_>, _: LayerContext<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let line = Line { time_ms: unix_time_ms(), level: event.metadata().level().to_string(), text: text.finish() };
        let mut recent = locked(&RECENT);
        if recent.len() >= RECENT_LINES {
            recent.pop_front();
        }
        recent.push_back(Arc::new(line));
    }
}

/// The message of an event, and its fields.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Text {
    fn finish(self) -> String {
        let mut line = String::new();
        // A line stays one line, whatever somebody put into a name.
        for c in self.message.chars().chain(self.fields.chars()) {
            if line.len() >= RECENT_TEXT {
                break;
            }
            if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
        }
        line
    }

    fn add(&mut self, field: &field::Field, value: text::Arguments<'_>) {
        let written = if field.name() == "message" {
            self.message.write_fmt(value)
        } else {
            write!(self.fields, " {}={value}", field.name())
        };
        // A String takes everything; a value that cannot be formatted is left out.
        written.unwrap_or_default();
    }
}

impl field::Visit for Text {
    fn record_str(&mut self, field: &field::Field, value: &str) {
        self.add(field, format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &field::Field, value: &dyn text::Debug) {
        self.add(field, format_args!("{value:?}"));
    }
}

/// Exchanges the level of the running log. Does nothing before [`init`].
pub fn set_level(level: Level) {
    steps::measure(level == Level::TRACE);
    let filter = EnvFilter::try_new(filter(level)).ok();
    if let (Some(handle), Some(filter)) = (FILTER.get(), filter)
        && let Err(error) = handle.reload(filter)
    {
        tracing::error!(%error, "the level of the log stays as it was");
    }
}

fn filter(level: Level) -> String {
    let libraries = match level {
        Level::ERROR => Level::ERROR,
        Level::WARN | Level::INFO => Level::WARN,
        Level::DEBUG => Level::INFO,
        _ => Level::DEBUG,
    };
    // It has a line for each statement, at DEBUG.
    let statements = if level == Level::TRACE { ",sqlx=INFO" } else { "" };
    // The crate fuser warns of each call of the kernel that a file system need not have, and of each answer to somebody
    // who was killed meanwhile.
    let libraries = format!("{libraries},fuser=ERROR,fuser::reply=OFF");
    // What the service beside the Console writes has a target of its own.
    format!("{libraries},twistlock_ha={level},twistlockd={level},twistcli={level},service={level}{statements}")
}

/// Upper bounds of the latency histograms, in seconds: from a fast disk to one that is in trouble.
const BUCKETS: &[f64] =
    &[0.000_1, 0.000_25, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// How often samples that nobody has collected are folded into their histograms, so that they cannot pile up.
const UPKEEP: Duration = Duration::from_secs(5);

/// The process's metrics: `render()` gives the text that Prometheus reads. The first call starts the collection.
///
/// # Errors
/// When another recorder is installed already, or no thread can be started.
pub fn metrics_handle() -> Result<PrometheusHandle> {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    if let Some(handle) = HANDLE.get() {
        return Ok(handle.clone());
    }
    let mut builder = PrometheusBuilder::new();
    for metric in METRICS.iter().filter(|metric| metric.kind == Kind::Latency) {
        let matcher = Matcher::Full(metric.name.to_owned());
        builder = builder.set_buckets_for_metric(matcher, BUCKETS).context("set histogram buckets")?;
    }
    let handle = builder.install_recorder().context("install the metrics recorder")?;
    for Metric { name, kind, help, .. } in METRICS {
        match kind {
            Kind::Counter => describe_counter!(*name, *help),
            Kind::Gauge => describe_gauge!(*name, *help),
            Kind::Latency => describe_histogram!(*name, Unit::Seconds, *help),
        }
    }
    METRICS.iter().for_each(Metric::begin);
    let upkeep = handle.clone();
    let run = move || {
        loop {
            thread::sleep(UPKEEP);
            upkeep.run_upkeep();
            repeats::tell();
            steps::tell();
        }
    };
    thread::Builder::new().name("metrics".to_owned()).spawn(run).context("start the metrics thread")?;
    Ok(HANDLE.get_or_init(|| handle).clone())
}

/// Sets a gauge that is a time to the present, in seconds since 1970.
pub fn note_now(gauge: &'static str) {
    gauge!(gauge).set(since_1970().as_secs_f64());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_one_step_quieter() {
        assert_eq!(
            filter(Level::INFO),
            "WARN,fuser=ERROR,fuser::reply=OFF,twistlock_ha=INFO,twistlockd=INFO,twistcli=INFO,service=INFO"
        );
        for level in [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE] {
            EnvFilter::try_new(filter(level)).unwrap();
        }
    }

    #[test]
    fn the_last_lines_are_kept_and_stay_lines() {
        let subscriber = registry().with(Recent);
        tracing::subscriber::with_default(subscriber, || {
            for number in 0..RECENT_LINES + 5 {
                tracing::info!(number, "counted");
            }
            tracing::warn!(name = "a\nb", long = "x".repeat(RECENT_TEXT * 2), "odd");
        });
        let lines = recent(usize::MAX);
        assert_eq!(lines.len(), RECENT_LINES);
        let last = &recent(1)[0];
        assert!(last.text.starts_with("odd name=a\\nb long=xxx") && last.text.len() == RECENT_TEXT, "{}", last.text);
        assert_eq!((&*last.level, &*recent(2)[0].text), ("WARN", &*format!("counted number={}", RECENT_LINES + 4)));
    }

    #[test]
    fn metrics_are_described_and_rendered() {
        let handle = metrics_handle().unwrap();
        metrics::counter!(ROLE_CHANGES, "cause" => "test").increment(1);
        metrics::histogram!(COMMIT_LATENCY).record(0.000_3);
        let text = metrics_handle().unwrap().render();
        assert!(text.contains("twistlock_role_changes_total{cause=\"test\"} 1"), "{text}");
        assert!(text.contains("twistlock_console_commit_seconds_bucket{le=\"0.0005\"} 1"), "{text}");
        assert!(text.contains("# HELP twistlock_role_changes_total Changes"), "{text}");
        drop(handle);
    }
}
