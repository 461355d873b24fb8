//! Log lines as they leave a process. The log of a process can be set up once, so each sample runs in a child of its own.

use std::{
    env, fs,
    io::{self, BufRead, BufReader, Read},
    path::Path,
    process::{Command, Output, Stdio},
};

use tracing::Level;
use twistlock_ha::telemetry::{self, Format};

const SAMPLE: &str = "TELEMETRY_SAMPLE";

/// Writes one sample and the second set-up's outcome, when it is the child; otherwise it has nothing to do.
#[test]
fn child() {
    let format = match env::var(SAMPLE).as_deref() {
        Ok("human") => Format::Human,
        Ok("json") => Format::Json,
        _ => return,
    };
    telemetry::init(format, Level::INFO).expect("the first set-up");
    tracing::info!(target: "twistlock_ha::node", epoch = 7, "role is PRIMARY");
    tracing::info!(target: "sqlx", "too quiet a library");
    tracing::debug!(target: "twistlock_ha::node", "too quiet a line");
    telemetry::set_level(Level::WARN);
    tracing::info!(target: "twistlock_ha::node", "too quiet from now on");
    assert!(telemetry::init(format, Level::INFO).is_err(), "the second set-up");
    telemetry::flush();
}

/// Far more than a pipe and the queue take.
const FLOOD: usize = 20_000;

/// Logs far more than anybody reads, says so, and ends when it may: when it is the child.
#[test]
fn flooding_child() {
    if env::var(SAMPLE).as_deref() != Ok("flood") {
        return;
    }
    // Whoever asks for more than the usual gets all of it: nothing counts as a repetition.
    telemetry::init(Format::Human, Level::DEBUG).expect("the first set-up");
    for number in 0..FLOOD {
        tracing::debug!(target: "twistlock_ha::node", number, "one of many");
    }
    println!("\nall are logged");
    io::stdin().read_to_end(&mut Vec::new()).expect("the end of the input");
    tracing::info!(target: "twistlock_ha::node", "the last line");
    telemetry::flush();
}

/// The consensus loop logs, too: a pipe that nobody reads must not stop it.
#[test]
fn whoever_logs_does_not_wait_for_a_reader_and_nothing_is_lost_in_silence() {
    let mut child = Command::new(env::current_exe().expect("this program"))
        .args(["--exact", "flooding_child", "--nocapture"])
        .env(SAMPLE, "flood")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("run the child");
    let mut out = BufReader::new(child.stdout.take().expect("its output"));
    assert!(out.by_ref().lines().map_while(Result::ok).any(|line| line == "all are logged"), "it stands still");
    let (mut read, mut told, mut last) = (0, 0, String::new());
    for line in BufReader::new(child.stderr.take().expect("its log")).lines().map_while(Result::ok) {
        read += usize::from(line.contains("one of many"));
        if line.contains("lines of the log were dropped") {
            let lines = line.rsplit("lines=").next().and_then(|number| number.parse::<usize>().ok());
            told += lines.expect("how many");
            child.stdin.take();
        }
        last = line;
    }
    out.read_to_end(&mut Vec::new()).expect("the rest of its output");
    assert!(child.wait().expect("its end").success());
    assert!(told > 0 && read + told == FLOOD, "{read} were read and {told} are said to be dropped");
    assert!(last.ends_with("the last line"), "{last}");
}

fn sample(format: &str, under_systemd: bool) -> String {
    let mut command = Command::new(env::current_exe().expect("this program"));
    command.args(["--exact", "child", "--nocapture"]).env(SAMPLE, format).env_remove("JOURNAL_STREAM");
    if under_systemd {
        command.env("JOURNAL_STREAM", "8:1");
    }
    let Output { status, stderr, .. } = command.output().expect("run the child");
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    let lines = String::from_utf8(stderr).expect("text");
    assert_eq!(lines.lines().count(), 1, "{lines}");
    lines.trim_end().to_owned()
}

#[test]
fn a_reader_gets_one_line_with_the_time() {
    let line = sample("human", false);
    assert!(line.ends_with(" INFO twistlock_ha::node: role is PRIMARY epoch=7"), "{line}");
    assert!(line.starts_with("20") && line.contains('T') && !line.contains('\u{1b}'), "{line}");
}

#[test]
fn the_receiver_adds_its_own_time() {
    assert_eq!(sample("human", true).trim_start(), "INFO twistlock_ha::node: role is PRIMARY epoch=7");
}

#[test]
fn json_has_one_object_a_line() {
    for under_systemd in [false, true] {
        let line = sample("json", under_systemd);
        let object: serde_json::Value = serde_json::from_str(&line).expect("an object");
        assert_eq!((&object["level"], &object["message"]), (&"INFO".into(), &"role is PRIMARY".into()));
        assert_eq!((&object["epoch"], &object["target"]), (&7.into(), &"twistlock_ha::node".into()));
        assert_eq!(object.get("timestamp").is_none(), under_systemd, "{line}");
    }
}

/// The page for people, as the table says it. `UPDATE_EXPECT=1` writes it.
#[test]
fn the_reference_is_that_of_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/observability/METRICS.md");
    if env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&path, telemetry::reference()).expect("write the reference");
    }
    let page = fs::read_to_string(&path).expect("packaging/observability/METRICS.md");
    assert_eq!(page, telemetry::reference(), "UPDATE_EXPECT=1 cargo test --test telemetry writes it");
}

/// The names of metrics in a text.
fn metrics_in(text: &str) -> Vec<&str> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(|c| !is_name(c)).filter(|word| word.starts_with("twistlock_")).collect()
}

fn check_names(text: &str) {
    let names = metrics_in(text);
    assert!(names.len() > 10);
    for name in names {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        assert!(telemetry::METRICS.iter().any(|metric| metric.name == base || metric.name == name), "{name}");
    }
}

#[test]
fn alerts_name_metrics_that_exist_and_prometheus_takes_them() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/observability");
    let rules = folder.join("alerts.yml");
    check_names(&fs::read_to_string(&rules).expect("alerts.yml"));
    // scripts/check.sh puts it there.
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/promtool/promtool");
    let promtool = if own.exists() { own } else { "promtool".into() };
    for (arguments, file) in [(["check", "rules"], rules), (["test", "rules"], folder.join("alerts_test.yml"))] {
        match Command::new(&promtool).args(arguments).arg(file).output() {
            Ok(output) => assert!(output.status.success(), "{output:?}"),
            Err(error) => println!("promtool is not installed ({error}): the rules are not run"),
        }
    }
}

#[test]
fn the_dashboard_is_json_and_asks_for_metrics_that_exist() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/observability/dashboard.json");
    let text = fs::read_to_string(path).expect("dashboard.json");
    let dashboard: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut all = String::new();
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        let targets = panel["targets"].as_array().expect("targets");
        assert!(!targets.is_empty() && panel["title"].is_string(), "{panel}");
        for target in targets {
            let expression = target["expr"].as_str().expect("an expression");
            assert!(!metrics_in(expression).is_empty(), "{expression}");
            all.push_str(expression);
            all.push('\n');
        }
    }
    check_names(&all);
}

fn sources(folder: &Path, out: &mut String) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            out.push_str(&fs::read_to_string(path).expect("a source file"));
        }
    }
}

#[test]
fn every_metric_that_is_written_is_described() {
    let mut text = String::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut text);
    for call in ["counter!(", "gauge!(", "histogram!("] {
        for (at, _) in text.match_indices(call) {
            let Some(name) = text[at + call.len()..].trim_start().strip_prefix('"') else { continue };
            let name = name.split('"').next().unwrap_or_default();
            let described = telemetry::METRICS.iter().any(|metric| metric.name == name);
            assert!(described, "{name} is written but not in the table of src/telemetry/table.rs");
        }
    }
}
