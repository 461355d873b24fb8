//! Tells people: each event that matters goes to the webhooks of the cluster and to the command of this host. One queue
//! and one task for each target, so that a slow one holds no other up. Must never run a shell, and never try for ever.

use std::{
    os::unix::process::CommandExt,
    process::{ExitCode, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::signal::{SigSet, Signal, killpg},
    unistd::Pid,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process,
    sync::{broadcast::error::RecvError, mpsc, watch},
    task::{self, JoinSet},
    time::{sleep, timeout},
};
use tracing::{info, warn};

use super::{
    Event, Kind, Recorder, Severity,
    webhook::{self, Failure},
};
use crate::{
    cluster::{Membership, shared::webhook::Webhook},
    descriptors,
    telemetry::NOTIFICATIONS,
};

/// Events that wait for one target.
const QUEUE: usize = 32;
/// Attempts for one event.
const ATTEMPTS: u32 = 7;
/// Pause after the first failure; each further one is twice as long.
const PAUSE: Duration = Duration::from_secs(1);
/// Longest time that the command may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// How the command is called in answers and in the log.
const COMMAND: &str = "NOTIFY_COMMAND";

/// First argument of the daemon's program that makes it [`launch`] the rest.
pub const LAUNCH: &str = "launch-command";
/// Exit code of a shell, too, for a program that cannot be run.
const CANNOT_RUN: u8 = 127;

/// `NOTIFY_COMMAND` of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// The program and its arguments, never empty.
    pub words: Vec<String>,
    pub severity: Severity,
    /// The daemon's program, by which it is launched: the command would inherit the signals that the daemon has
    /// blocked, and be deaf to SIGTERM.
    pub launcher: Option<&'static str>,
}

/// Turns this process into the command in the other arguments, with no signal blocked and the limit of open files in
/// the first one. Returns only when that fails.
pub fn launch() -> ExitCode {
    let mut words = std::env::args_os().skip(2);
    let files = words.next().and_then(|text| text.to_str()?.parse().ok());
    let (Some(files), Some(program)) = (files, words.next()) else { return ExitCode::from(CANNOT_RUN) };
    // The daemon has raised the limit for itself.
    descriptors::lower(files);
    let error = match SigSet::empty().thread_set_mask() {
        Ok(()) => std::process::Command::new(&program).args(words).exec(),
        Err(errno) => errno.into(),
    };
    eprintln!("{} cannot be run: {error}", program.display());
    ExitCode::from(CANNOT_RUN)
}

/// How a test went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Delivery {
    /// Name of the webhook, or NOTIFY_COMMAND.
    pub target: String,
    pub ok: bool,
    /// Why not; empty if it went well.
    pub detail: String,
}

/// Where events go.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Webhook(Webhook),
    Command(Command),
}

impl Target {
    fn name(&self) -> &str {
        match self {
            Self::Webhook(webhook) => &webhook.name,
            Self::Command(_) => COMMAND,
        }
    }

    fn severity(&self) -> Severity {
        match self {
            // An unknown value, which a newer version may have written, counts as the default.
            Self::Webhook(webhook) => webhook.severity.parse().unwrap_or(Severity::Warning),
            Self::Command(command) => command.severity,
        }
    }

    async fn deliver(&self, event: &Event, cluster: &str) -> Result<(), Failure> {
        let body = body(event, cluster);
        match self {
            Self::Webhook(webhook) => {
                let (webhook, kind, id) = (webhook.clone(), event.kind.word().to_owned(), event.id.clone());
                let posted = task::spawn_blocking(move || webhook::post(&webhook, &kind, &id, body.as_bytes())).await;
                posted.unwrap_or_else(|error| Err(Failure::passing(error.to_string())))
            }
            Self::Command(command) => run(command, body.as_bytes(), COMMAND_LIMIT).await,
        }
    }
}

/// The event, the cluster, and the sentence once more as `text`, which chat programs show.
fn body(event: &Event, cluster: &str) -> String {
    // An event is an object, and has no maps with keys that JSON lacks.
    let mut body = serde_json::to_value(event).unwrap_or_default();
    if let Value::Object(fields) = &mut body {
        fields.insert("cluster".to_owned(), json!(cluster));
        fields.insert("text".to_owned(), json!(format!("[{}] {}", event.severity, event.sentence)));
    }
    body.to_string()
}

/// Runs the command once in a clean environment. At the limit, ends it and everything that it has started.
async fn run(command: &Command, body: &[u8], limit: Duration) -> Result<(), Failure> {
    let permanent = |why: String| Failure { why, passes: false };
    let (program, arguments) = command.words.split_first().ok_or_else(|| permanent("it is empty".to_owned()))?;
    let mut launched = match command.launcher {
        Some(launcher) => process::Command::new(launcher),
        None => process::Command::new(program),
    };
    if command.launcher.is_some() {
        launched.args([LAUNCH, &descriptors::original().to_string(), program]);
    }
    let child = launched
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LANG", "C.UTF-8")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    let mut child = child.map_err(|error| permanent(format!("{program} cannot be run: {error}")))?;
    let group = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
    let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
    let work = async {
        if let Some(mut stdin) = stdin {
            let _ = stdin.write_all(body).await; // it need not read it
        }
        let mut said = Vec::new();
        // What it has started may keep the pipe open for longer than it lives.
        let status = tokio::select! {
            biased;
            () = listen(stderr, &mut said) => child.wait().await,
            status = child.wait() => status,
        };
        (status, said)
    };
    match timeout(limit, work).await {
        Ok((Ok(status), _)) if status.success() => Ok(()),
        Ok((Ok(status), said)) => {
            let said = String::from_utf8_lossy(&said);
            let line: String = said.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).collect();
            Err(Failure::passing(format!("{program} ended with {status}: {line}")))
        }
        Ok((Err(error), _)) => Err(Failure::passing(error.to_string())),
        Err(_) => {
            // And all that it has started: it has a process group of its own, whose number stays until it is waited
            // for.
            let _ = group.map(|group| killpg(group, Signal::SIGKILL));
            let _ = child.wait().await;
            Err(Failure::passing(format!("{program} was killed: it took longer than {limit:?}")))
        }
    }
}

/// Reads to the end, so that nobody waits for a full pipe; keeps the beginning, for a message.
async fn listen(stderr: Option<process::ChildStderr>, said: &mut Vec<u8>) {
    let Some(mut stderr) = stderr else { return };
    let mut bytes = [0; 512];
    while let Ok(length @ 1..) = stderr.read(&mut bytes).await {
        said.extend_from_slice(&bytes[..length.min(512_usize.saturating_sub(said.len()))]);
    }
}

/// Knows all targets.
#[derive(Clone, Debug)]
pub struct Notifier {
    node: String,
    membership: watch::Receiver<Arc<Membership>>,
    command: Option<Command>,
}

impl Notifier {
    /// The targets of this node: the webhooks of the membership and the command.
    pub fn new(node: &str, membership: watch::Receiver<Arc<Membership>>, command: Option<Command>) -> Self {
        Self { node: node.to_owned(), membership, command }
    }

    /// True if events are told to a program of this host.
    pub fn has_command(&self) -> bool {
        self.command.is_some()
    }

    fn targets(&self) -> Vec<Target> {
        let webhooks = self.membership.borrow().shared.webhooks.clone();
        let command = self.command.clone().map(Target::Command);
        webhooks.into_iter().map(Target::Webhook).chain(command).collect()
    }

    fn cluster(&self) -> String {
        self.membership.borrow().cluster.to_string()
    }

    /// Sends a test event to all targets at once, whatever their severity, without a second attempt.
    pub async fn test(&self) -> Vec<Delivery> {
        let mut event = Event::new(Kind::Test, Severity::Info, format!("this is a test of {}", self.node));
        event.node.clone_from(&self.node);
        let mut running = JoinSet::new();
        for target in self.targets() {
            let (event, cluster) = (event.clone(), self.cluster());
            running.spawn(async move {
                let result = target.deliver(&event, &cluster).await;
                let detail = result.as_ref().err().map(|failure| failure.why.clone()).unwrap_or_default();
                Delivery { target: target.name().to_owned(), ok: result.is_ok(), detail }
            });
        }
        let mut deliveries = running.join_all().await;
        deliveries.sort_by(|a, b| a.target.cmp(&b.target));
        deliveries
    }

    /// Sends what is recorded from now on, until the node ends.
    pub fn run(self, recorder: Recorder) -> impl Future<Output = ()> + Send + use<> {
        // From this moment on, not from the first turn of the task.
        let events = recorder.to_notify();
        drop(recorder);
        self.deliver(events)
    }

    async fn deliver(mut self, mut events: tokio::sync::broadcast::Receiver<Event>) {
        let mut workers: Vec<(Target, mpsc::Sender<Event>)> = Vec::new();
        loop {
            let wanted = self.targets();
            // A worker whose queue is gone ends when it is empty.
            workers.retain(|(target, _)| wanted.contains(target));
            for target in wanted {
                if !workers.iter().any(|(known, _)| *known == target) {
                    let (queue, taken) = mpsc::channel(QUEUE);
                    tokio::spawn(work(target.clone(), self.cluster(), taken));
                    workers.push((target, queue));
                }
            }
            let event = tokio::select! {
                event = events.recv() => event,
                changed = self.membership.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
            };
            match event {
                Ok(event) => {
                    for (target, queue) in workers.iter().filter(|(target, _)| event.severity >= target.severity()) {
                        if queue.try_send(event.clone()).is_err() {
                            metrics::counter!(NOTIFICATIONS, "result" => "dropped").increment(1);
                            warn!(target = target.name(), "a notification was dropped: too many wait already");
                        }
                    }
                }
                Err(RecvError::Lagged(missed)) => {
                    metrics::counter!(NOTIFICATIONS, "result" => "dropped").increment(missed);
                }
                Err(RecvError::Closed) => return,
            }
        }
    }
}

/// Delivers to one target, one event after the other.
async fn work(target: Target, cluster: String, mut events: mpsc::Receiver<Event>) {
    while let Some(event) = events.recv().await {
        let mut pause = PAUSE;
        for attempt in 1..=ATTEMPTS {
            match target.deliver(&event, &cluster).await {
                Ok(()) => {
                    metrics::counter!(NOTIFICATIONS, "result" => "sent").increment(1);
                    info!(target = target.name(), event = event.id, attempt, "a notification was sent");
                    break;
                }
                Err(failure) if attempt < ATTEMPTS && failure.passes => {
                    info!(target = target.name(), attempt, reason = failure.why, "a notification is tried again");
                    sleep(pause).await;
                    pause *= 2;
                }
                Err(failure) => {
                    metrics::counter!(NOTIFICATIONS, "result" => "failed").increment(1);
                    let (target, reason) = (target.name(), failure.why);
                    warn!(target, attempt, reason, "nobody was notified: {}", event.sentence);
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(words: &[&str]) -> Command {
        let words = words.iter().map(|word| (*word).to_owned()).collect();
        Command { words, severity: Severity::Info, launcher: None }
    }

    #[tokio::test]
    async fn a_command_gets_the_event_and_a_clean_environment() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("said");
        let script = folder.path().join("script.sh");
        let text = format!("cat > {0}; echo >> {0}; env >> {0}; echo \"$1\" >> {0}", file.display());
        std::fs::write(&script, text).unwrap();
        let event = Event::new(Kind::Test, Severity::Critical, "a test; $(touch /tmp/no)");
        let target = Target::Command(command(&["/bin/sh", script.to_str().unwrap(), "$(id)"]));
        target.deliver(&event, "c1").await.unwrap();
        let said = std::fs::read_to_string(&file).unwrap();
        assert!(
            said.contains("\"text\":\"[critical] a test; $(touch /tmp/no)\"") && said.contains("\"cluster\":\"c1\"")
        );
        assert!(said.ends_with("$(id)\n"), "{said}");
        let variables: Vec<_> = said.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
        assert!(variables.iter().all(|name| ["PATH", "LANG", "PWD", "OLDPWD", "SHLVL", "_"].contains(name)), "{said}");
    }

    #[tokio::test]
    async fn a_command_that_fails_says_why() {
        let missing = run(&command(&["/no/such/program"]), b"{}", COMMAND_LIMIT).await.unwrap_err();
        assert!(!missing.passes && missing.why.contains("/no/such/program cannot be run"), "{missing:?}");
        let failing = run(&command(&["/bin/ls", "/no/such/file"]), b"{}", COMMAND_LIMIT).await.unwrap_err();
        assert!(failing.passes && failing.why.contains("/bin/ls ended with"), "{failing:?}");
    }
    #[tokio::test]
    async fn what_takes_too_long_is_killed_with_all_that_it_has_started() {
        let folder = tempfile::tempdir().unwrap();
        let (file, script) = (folder.path().join("pid"), folder.path().join("script.sh"));
        std::fs::write(&script, format!("sleep 300 & echo $! > {0}; wait", file.display())).unwrap();
        let slow = command(&["/bin/sh", script.to_str().unwrap()]);
        let killed = run(&slow, b"{}", Duration::from_millis(500)).await.unwrap_err();
        assert!(killed.passes && killed.why.contains("was killed"), "{killed:?}");
        let sleeper = std::fs::read_to_string(&file).unwrap();
        assert!(poll_is_gone(sleeper.trim()).await, "{sleeper} lives");
    }

    /// One that has ended may not have been waited for yet by whoever took it over.
    async fn poll_is_gone(pid: &str) -> bool {
        for _ in 0..200 {
            match std::fs::read_to_string(format!("/proc/{pid}/status")) {
                Ok(status) if !status.contains("State:\tZ") => sleep(Duration::from_millis(10)).await,
                _ => return true,
            }
        }
        false
    }
}
