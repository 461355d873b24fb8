//! What a replicated COMMIT costs beside a local one, for a single writer: a new tag and its row in the audit log, on the same
//! disk, in the same run, in turns. `scripts/bench/commit.sh` runs it. Must never compare different spans: both are that of the
//! COMMIT alone, without the statements before it, without HTTP and without waiting for a turn.
//!
//! The replicated figure is the daemon's own: its histogram `twistlock_console_commit_seconds` keeps an exact sum, and with
//! one writer the difference of two readings is one commit. A turn in which the daemon wrote something of its own, such as an
//! event, does not count.
//! `COUNT=n` sets the number of commits of each kind, `BENCH_DIR` the folder (and so the disk).

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sqlx::{
    ConnectOptions, Connection, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use twistlock_ha::{
    control::{self, Call},
    dev::{ClusterFile, read_cluster},
};
use ureq::{
    Agent,
    tls::{Certificate, RootCerts, TlsConfig},
};

const METRIC: &str = "twistlock_console_commit_seconds";
const WARM_UP: usize = 100;
/// Turns that may be left out.
const MAX_DISTURBED: usize = 20;
const INSERT: &str = "INSERT INTO tags (name, color, description) VALUES (?, ?, ?)";
const AUDIT: &str = "INSERT INTO audits (time, user, source, action, what, ok, difference) \
                     VALUES (unixepoch(), 'admin', '127.0.0.1', 'create', ?, 1, ?)";

/// A dev cluster that is stopped when dropped.
struct Dev(Child);

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

fn main() -> Result<()> {
    let count = std::env::var("COUNT").ok().and_then(|text| text.parse().ok()).unwrap_or(2_000usize);
    let base = std::env::var_os("BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = base.join(format!("twistlock-bench-{}", std::process::id()));
    let outcome = measure(&folder, count);
    std::fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
    outcome
}

fn measure(folder: &Path, count: usize) -> Result<()> {
    let _dev = start(folder)?;
    let cluster = read_cluster(folder)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut local = runtime.block_on(open_local(&folder.join("local.db")))?;
    let agent = agent(&cluster)?;
    let (url, socket) = primary(&cluster)?;
    let token = login(&agent, &cluster, &url)?;
    let (mut locals, mut replicated, mut requests) = (Vec::new(), Vec::new(), Vec::new());
    let mut before = reading(&socket)?;
    let mut number = 0;
    while replicated.len() < count + WARM_UP {
        let name = format!("bench-{number:08}");
        number += 1;
        let local = runtime.block_on(insert(&mut local, &name))?;
        let request = post(&agent, &url, &token, &name)?;
        let after = reading(&socket)?;
        if after.1 == before.1 + 1 {
            locals.push(local);
            requests.push(request);
            replicated.push(Duration::from_secs_f64(after.0 - before.0));
        } else if number > replicated.len() + MAX_DISTURBED {
            bail!(
                "the daemon made more commits than there were requests, {MAX_DISTURBED} times: is somebody else writing?"
            );
        }
        before = after;
    }
    println!("{count} commits of each kind, in turns, one writer, {}", folder.display());
    let local = report("local SQLite (WAL, synchronous=FULL)", locals);
    let replicated = report("replicated to three nodes", replicated);
    report("the whole HTTPS request", requests);
    println!("ratio of the medians, replicated to local: {:.2}", replicated / local);
    Ok(())
}

/// Prints the distribution and returns the median in seconds.
fn report(name: &str, mut spans: Vec<Duration>) -> f64 {
    spans.drain(..WARM_UP);
    spans.sort();
    let at = |part: f64| spans[((spans.len() - 1) as f64 * part) as usize].as_secs_f64();
    println!("  {name:<40} median {:7.3} ms   p99 {:7.3} ms", at(0.5) * 1e3, at(0.99) * 1e3);
    at(0.5)
}

fn start(folder: &Path) -> Result<Dev> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_twistlockd"))
        .args(["dev", "--quiet", "--port-offset", "3900", "--dir"])
        .arg(folder)
        .stdout(Stdio::piped())
        .spawn()
        .context("start the dev cluster")?;
    let output = child.stdout.take().context("its output is piped")?;
    let dev = Dev(child);
    let ready = BufReader::new(output).lines().map_while(Result::ok).any(|line| line.contains("Ctrl-C stops"));
    if ready { Ok(dev) } else { bail!("the dev cluster did not become ready") }
}

async fn open_local(path: &Path) -> Result<SqliteConnection> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    let mut connection = options.connect().await.context("open the local database")?;
    for schema in [
        include_str!("../src/console/migrations/0001_first.sql"),
        include_str!("../src/console/migrations/0002_api.sql"),
    ] {
        sqlx::raw_sql(schema).execute(&mut connection).await.context("make the same tables")?;
    }
    Ok(connection)
}

async fn insert(connection: &mut SqliteConnection, name: &str) -> Result<Duration> {
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.context("begin locally")?;
    let tag = sqlx::query(INSERT).bind(name).bind("#336699").bind("a tag of the benchmark");
    tag.execute(&mut *transaction).await.context("insert locally")?;
    let difference = serde_json::json!({
        "name": {"old": null, "new": name}, "color": {"old": null, "new": "#336699"},
        "description": {"old": null, "new": "a tag of the benchmark"},
    });
    let audit = sqlx::query(AUDIT).bind(format!("tag '{name}'")).bind(difference.to_string());
    audit.execute(&mut *transaction).await.context("insert locally")?;
    let start = Instant::now();
    transaction.commit().await.context("commit locally")?;
    Ok(start.elapsed())
}

fn agent(cluster: &ClusterFile) -> Result<Agent> {
    let certificate = Certificate::from_pem(&std::fs::read(&cluster.ca)?)?;
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(vec![certificate])))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build();
    let config = Agent::config_builder().tls_config(tls).proxy(None).timeout_global(Some(Duration::from_secs(10)));
    Ok(config.build().into())
}

fn primary(cluster: &ClusterFile) -> Result<(String, PathBuf)> {
    for node in &cluster.nodes {
        let status = control::status(&node.control, Duration::from_secs(5))?;
        if status.primary == Some(status.node) {
            return Ok((node.console_url.clone(), node.control.clone()));
        }
    }
    bail!("no node is PRIMARY")
}

fn login(agent: &Agent, cluster: &ClusterFile, url: &str) -> Result<String> {
    let body = serde_json::json!({"username": cluster.user, "password": cluster.password});
    let answer: serde_json::Value =
        agent.post(format!("{url}/api/v1/authenticate")).send_json(body)?.body_mut().read_json()?;
    Ok(format!("Bearer {}", answer["token"].as_str().context("a token")?))
}

fn post(agent: &Agent, url: &str, token: &str, name: &str) -> Result<Duration> {
    let body = serde_json::json!({"name": name, "color": "#336699", "description": "a tag of the benchmark"});
    let start = Instant::now();
    let mut answer = agent.post(format!("{url}/api/v1/tags")).header("authorization", token).send_json(body)?;
    answer.body_mut().read_to_string()?;
    Ok(start.elapsed())
}

/// Sum in seconds and count of the daemon's commits so far.
fn reading(socket: &Path) -> Result<(f64, u64)> {
    let text = control::send(socket, &Call::get("/metrics"), Duration::from_secs(5))?.text;
    let find = |suffix: &str| {
        let head = format!("{METRIC}_{suffix} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&head));
        line.map(str::trim).with_context(|| format!("no {head}in the metrics"))
    };
    Ok((find("sum")?.parse()?, find("count")?.parse()?))
}
