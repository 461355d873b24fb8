//! `twistcli ha drill`: a takeover for practice, measured from outside as a client sees it, with proof that no
//! acknowledged write was lost. Must never begin unless all members are healthy, and never kill anything but the daemon
//! of this host.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use nix::{
    sys::{
        signal::{Signal, kill},
        socket::{getsockopt, sockopt::PeerCredentials},
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    args::DrillArgs,
    canary::{Acknowledged, Canary, Failed, consoles},
    client::ApiClient,
    columns::{self, print_json},
    daemon::{ANSWER_LIMIT, Local},
    place::Place,
    stop::{EX_FOUND, EX_NOPERM, EX_TEMPFAIL, EX_UNAVAILABLE, EX_USAGE, Stop},
};
use crate::{
    clock::unix_time,
    cluster::Role,
    control::{self, Call},
    node::{
        Status,
        verdict::{LAG_LIMIT, paused},
    },
};

/// Writes before the takeover, so that it comes in the middle of work.
const BEFORE: usize = 20;
/// Writes on the new PRIMARY.
const AFTER: usize = 50;
/// How long another member may take to serve.
const LIMIT: Duration = Duration::from_secs(60);
/// Most writes of one drill: reading and removing them must stay quick.
const MAX_WRITES: usize = 50_000;
/// How long the new PRIMARY may take to give the list of the writes, and to take the result.
const CHECK_LIMIT: Duration = Duration::from_secs(10);
/// Name of the record in the data folder, and how many drills it keeps.
const RECORD: &str = "drills.jsonl";
const KEPT: usize = 500;
/// Longest record that is read.
const MAX_RECORD: u64 = 1 << 20;

/// The result of a drill; one line of [`RECORD`].
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Outcome {
    at: String,
    version: String,
    /// `switchover` or `kill`.
    takeover: &'static str,
    from: String,
    to: Option<String>,
    /// From the last write that the old PRIMARY acknowledged to the first one of the new.
    outage_ms: Option<f64>,
    acknowledged: usize,
    acknowledged_by_new: usize,
    refused: u64,
    unknown: u64,
    /// Tags that were acknowledged and are not there: must be empty.
    missing: Vec<String>,
}

/// Runs a drill and returns the exit code.
///
/// # Errors
/// When it is refused or cannot be carried out.
pub(super) fn run(client: &ApiClient, args: &DrillArgs) -> Result<u8, Stop> {
    let command = if args.kill { "twistcli ha drill --kill" } else { "twistcli ha drill" };
    let status = client.primary(command)?;
    ready(&status, unix_time()).map_err(|why| Stop::refuse(&why))?;
    let (mut canary, takeover) = prepare(client, args, &status)?;
    eprintln!(
        "Writing until another member has taken over from {} ({}) ...",
        status.name,
        if args.kill { "its process is killed" } else { "switchover" }
    );
    let rehearsed = rehearse(&mut canary, takeover, LIMIT);
    let checked = rehearsed.map(|()| canary.missing(CHECK_LIMIT));
    let judged = checked.map_err(Broken::into_stop).and_then(|missing| missing.map_err(stop));
    let outcome = judged.map(|missing| outcome(&canary, &status, args.kill, missing));
    let (ok, text) = match &outcome {
        Ok(outcome) => (outcome.missing.is_empty() && outcome.to.is_some(), describe(outcome)),
        Err(_) => (false, "it broke off".to_owned()),
    };
    if let Err(why) = canary.end(ok, text.lines().next().unwrap_or_default(), CHECK_LIMIT) {
        eprintln!("twistcli: the drill could not be ended, and its tags named drill-... are left behind: {why}");
    }
    let outcome = outcome?;
    if let ApiClient::Local(local) = client
        && let Err(error) = record(&local.data, &outcome)
    {
        eprintln!("twistcli: the result could not be recorded in {}: {error}", local.data.join(RECORD).display());
    }
    if args.json {
        print_json(&outcome)?;
    } else {
        columns::print(&describe(&outcome))?;
    }
    Ok(match (&outcome.missing[..], &outcome.to) {
        ([], Some(_)) => 0,
        ([], None) => EX_TEMPFAIL,
        _ => EX_FOUND,
    })
}

/// Checks whether a drill may begin. The error says why not.
fn ready(status: &Status, now: u64) -> Result<(), String> {
    let see = "\n  A drill takes one member away: all of them must be healthy. See: twistcli ha status";
    if status.primary != Some(status.node) {
        return Err(format!("{} is {}, and no PRIMARY is known{see}", status.name, status.role));
    }
    if paused(status, now).is_some() {
        return Err("automatic takeover is paused\n  End the pause first: twistcli ha resume".to_owned());
    }
    let (members, size) = (status.members.len(), status.membership.roster.size);
    if !size.permits(members) {
        return Err(format!("the cluster has {members} of {size} members{see}"));
    }
    for member in &status.members {
        let wanted = if member.id == status.node { Role::Primary } else { Role::Secondary };
        if member.state != wanted || !member.voter {
            return Err(format!("{} is {}{see}", member.name, member.state));
        }
        if member.lag > LAG_LIMIT {
            return Err(format!("{} is {} entries behind{see}", member.name, member.lag));
        }
    }
    Ok(())
}

/// What the API answers when a drill begins.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Begun {
    token: String,
    prefix: String,
    https_port: Option<u16>,
}

/// Begins a drill. Returns a canary with its token, and how the role is to be taken.
fn prepare(client: &ApiClient, args: &DrillArgs, status: &Status) -> Result<(Canary, Takeover), Stop> {
    if args.kill && matches!(client, ApiClient::Remote(_)) {
        let why = "--kill ends the daemon of this host: run it on the PRIMARY, without --address";
        return Err(Stop::tell(EX_USAGE, why));
    }
    let console = args.target.console()?;
    let (named, trust) = match &console {
        ApiClient::Remote(remote) if matches!(client, ApiClient::Remote(_)) => {
            (remote.places().first().and_then(Place::port), remote.trust.clone())
        }
        ApiClient::Remote(remote) => (None, remote.trust.clone()),
        ApiClient::Local(local) => (None, args.target.login().trust(Some(local.authority()))?),
    };
    let plan = json!({ "takeover": if args.kill { "kill" } else { "switchover" } });
    let begun: Begun = console.call(&Call::post("high-availability/drill").with(plan))?;
    let port = args.https_port.or(named).or(begun.https_port);
    // Each member is asked at its own address: a load balancer would hide who answers.
    let canary = Canary::new(consoles(status, port), &trust, &begun.token, &begun.prefix);
    let takeover = match client {
        ApiClient::Local(Local { socket, data, .. }) if args.kill => {
            Takeover::Kill { socket: socket.clone(), lock: data.join("lock") }
        }
        _ => Takeover::Switchover(Box::new(canary.switchover())),
    };
    Ok((canary, takeover))
}

fn stop(failed: Failed) -> Stop {
    match failed {
        Failed::Unreachable(why) => Stop::tell(EX_UNAVAILABLE, &why),
        Failed::Refused(why) => Stop::tell(EX_NOPERM, &why),
    }
}

/// How the role is taken from the PRIMARY.
enum Takeover {
    /// A switchover, which the Console begins.
    Switchover(Box<dyn FnOnce() -> Result<(), String> + Send>),
    /// The daemon of this host is killed. The lock of its data folder has its pid in it.
    Kill { socket: PathBuf, lock: PathBuf },
}

/// Why a rehearsal broke off.
enum Broken {
    /// The takeover was refused.
    Refused(String),
    /// The API refuses the canary.
    Api(Failed),
    /// The API did not acknowledge enough writes to begin. Has its last answer.
    Never(Option<String>),
}

impl Broken {
    fn into_stop(self) -> Stop {
        match self {
            Self::Refused(why) => Stop::refuse(&why),
            Self::Api(failed) => stop(failed),
            Self::Never(last) => Stop::refuse(&format!(
                "the takeover never began: fewer than {BEFORE} writes were acknowledged\n  The last error: {}",
                last.as_deref().unwrap_or("none: the writes are too slow")
            )),
        }
    }
}

impl Takeover {
    fn take(self) -> Result<(), String> {
        match self {
            Self::Kill { socket, lock } => kill_daemon(&socket, &lock),
            Self::Switchover(begin) => begin().map_err(|why| format!("the switchover: {why}")),
        }
    }
}

/// Kills the process that the kernel names as the owner of the control socket. The lock file must name it, too.
fn kill_daemon(socket: &Path, lock: &Path) -> Result<(), String> {
    let stream = control::connect(socket, ANSWER_LIMIT).map_err(|error| format!("find the daemon: {error}"))?;
    let owner = getsockopt(&stream, PeerCredentials).map_err(|error| format!("find the daemon: {error}"))?.pid();
    let text = fs::read_to_string(lock).map_err(|error| format!("{}: {error}", lock.display()))?;
    if text.trim().parse() != Ok(owner) || owner <= 1 {
        return Err(format!(
            "process {owner} serves the control socket, but {} names {}: which one is the daemon?",
            lock.display(),
            text.trim()
        ));
    }
    kill(Pid::from_raw(owner), Signal::SIGKILL).map_err(|error| format!("kill process {owner}: {error}"))
}

/// Writes before, during and after the takeover, for at most `limit`.
fn rehearse(canary: &mut Canary, takeover: Takeover, limit: Duration) -> Result<(), Broken> {
    let deadline = Instant::now() + limit;
    let mut takeover = Some(takeover);
    let mut under_way: Option<JoinHandle<Result<(), String>>> = None;
    while after(&canary.acknowledged).len() < AFTER
        && Instant::now() < deadline
        && canary.acknowledged.len() < MAX_WRITES
    {
        canary.attempt().map_err(Broken::Api)?;
        if canary.acknowledged.len() >= BEFORE
            && let Some(takeover) = takeover.take()
        {
            under_way = Some(thread::spawn(move || takeover.take()));
        }
        if under_way.as_ref().is_some_and(JoinHandle::is_finished)
            && let Some(ended) = under_way.take()
        {
            joined(ended)?;
        }
    }
    if takeover.is_some() {
        return Err(Broken::Never(canary.last_failure.take()));
    }
    match under_way {
        Some(ended) => joined(ended),
        None => Ok(()),
    }
}

fn joined(ended: JoinHandle<Result<(), String>>) -> Result<(), Broken> {
    ended.join().unwrap_or_else(|_| Err("the takeover panicked".to_owned())).map_err(Broken::Refused)
}

/// The writes since another Console than the first one answered.
fn after(acknowledged: &[Acknowledged]) -> &[Acknowledged] {
    let first = acknowledged.first().map(|write| write.console);
    let at = acknowledged.iter().position(|write| Some(write.console) != first).unwrap_or(acknowledged.len());
    &acknowledged[at..]
}

fn outcome(canary: &Canary, status: &Status, kill: bool, missing: Vec<String>) -> Outcome {
    let all = &canary.acknowledged;
    let after = after(all);
    let before = &all[..all.len() - after.len()];
    let outage = before.last().zip(after.first()).map(|(last, first)| first.at.duration_since(last.at));
    Outcome {
        at: Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        version: status.version.clone(),
        takeover: if kill { "kill" } else { "switchover" },
        from: status.name.clone(),
        to: after.first().map(|write| canary.name(write.console).to_owned()),
        // Tenths of a millisecond: more would be noise.
        outage_ms: outage.map(|outage| (outage.as_secs_f64() * 10_000.0).round() / 10.0),
        acknowledged: all.len(),
        acknowledged_by_new: after.len(),
        refused: canary.refused,
        unknown: canary.unknown,
        missing,
    }
}

fn describe(outcome: &Outcome) -> String {
    let Outcome { from, acknowledged, acknowledged_by_new, refused, unknown, .. } = outcome;
    let mut text = match (&outcome.to, outcome.outage_ms) {
        (Some(to), Some(ms)) => format!("{to} took over from {from} ({}). Outage: {ms:.1} ms.\n", outcome.takeover),
        _ => format!("No other member took over from {from} within {} s.\n", LIMIT.as_secs()),
    };
    text.push_str(&format!(
        "  {acknowledged} writes acknowledged, {acknowledged_by_new} of them by the new PRIMARY; {refused} connections refused; \
         {unknown} outcomes unknown to the client.\n"
    ));
    match outcome.missing.len() {
        0 => text.push_str("  Every acknowledged write is there: nothing was lost.\n"),
        lost => {
            let some = outcome.missing.iter().take(10).cloned().collect::<Vec<_>>().join(", ");
            text.push_str(&format!("  {lost} ACKNOWLEDGED WRITES ARE MISSING: {some}\n"));
        }
    }
    text
}

/// Appends to the record, and drops the oldest lines of a long one.
fn record(data: &Path, outcome: &Outcome) -> io::Result<()> {
    let path = data.join(RECORD);
    // The folder belongs to the daemon's user, and root may run this: a link must lead nowhere.
    let mut options = OpenOptions::new();
    options.custom_flags(nix::libc::O_NOFOLLOW).mode(0o600);
    let mut text = String::new();
    match options.clone().read(true).open(&path) {
        Ok(file) => {
            file.take(MAX_RECORD).read_to_string(&mut text)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let new = serde_json::to_string(outcome)?;
    let lines: Vec<&str> = text.lines().chain([new.as_str()]).collect();
    let kept = lines[lines.len().saturating_sub(KEPT)..].join("\n");
    let staging = data.join(format!("{RECORD}.new"));
    match fs::remove_file(&staging) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = options.write(true).create_new(true).open(&staging)?;
    writeln!(file, "{kept}")?;
    file.sync_all()?;
    fs::rename(&staging, &path)
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, sync::Arc};

    use rustls::{ServerConfig, ServerConnection};

    use super::*;
    use crate::{cli::canary::Console, cluster::roster::Pause, https::Trust, node::verdict::tests::healthy};

    #[test]
    fn only_a_healthy_cluster_is_put_to_the_test() {
        assert_eq!(ready(&healthy(), 0), Ok(()));
        let refused = |edit: fn(&mut Status)| {
            let mut status = healthy();
            edit(&mut status);
            ready(&status, 0).unwrap_err()
        };
        assert!(refused(|status| status.members[2].state = Role::Down).starts_with("node3 is DOWN"));
        assert!(refused(|status| status.members[2].lag = LAG_LIMIT + 1).contains("entries behind"));
        assert!(refused(|status| status.members[1].voter = false).starts_with("node2 is SECONDARY"));
        assert!(refused(|status| drop(status.members.pop())).contains("2 of 3 members"));
        assert!(refused(|status| status.primary = None).contains("no PRIMARY is known"));
        let pause = |status: &mut Status| status.membership.roster.pause = Some(Pause { until: 1, primary: 1 });
        assert!(refused(pause).contains("twistcli ha resume"));
    }

    fn sample() -> Outcome {
        Outcome {
            at: "2026-11-22T18:00:00Z".into(),
            version: "0.1.0".into(),
            takeover: "kill",
            from: "node1".into(),
            to: Some("node2".into()),
            outage_ms: Some(31.4),
            acknowledged: 90,
            acknowledged_by_new: 50,
            refused: 7,
            unknown: 1,
            missing: Vec::new(),
        }
    }

    /// Answers 503 to everything, as long as the tests run. Returns its address and writes its certificate.
    fn busy_console(ca: &Path) -> String {
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        fs::write(ca, cert.pem()).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
        let tls = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key);
        let (tls, listener) = (Arc::new(tls.unwrap()), TcpListener::bind("127.0.0.1:0").unwrap());
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut connection = ServerConnection::new(tls.clone()).unwrap();
                let mut stream = rustls::Stream::new(&mut connection, &mut stream);
                // A client that goes away is no matter: the next one is served.
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream
                    .write_all(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                let _ = stream.flush();
            }
        });
        format!("https://{address}")
    }

    /// A Console that answers, and acknowledges nothing: nobody may read that another member did not take over.
    #[test]
    fn a_takeover_that_was_not_begun_is_not_called_a_failed_one() {
        let folder = tempfile::tempdir().unwrap();
        let ca = folder.path().join("ca.pem");
        let url = busy_console(&ca);
        let trust = Trust::file(&ca).unwrap();
        let mut canary = Canary::new(vec![Console { name: "node1".into(), url }], &trust, "token", "drill-1-");
        let takeover = Takeover::Kill { socket: "/nowhere".into(), lock: "/nowhere".into() };
        let ended = rehearse(&mut canary, takeover, Duration::from_millis(300));
        let Err(Broken::Never(Some(last))) = ended else { panic!("the takeover was begun") };
        assert!(last.ends_with("/drill/writes: 503 Service Unavailable"), "{last}");
        assert!(canary.acknowledged.is_empty() && canary.unknown > 0);
    }

    #[test]
    fn the_new_primary_begins_where_another_console_answers() {
        let at = Instant::now();
        let write = |(tag, console)| Acknowledged { tag, console, at };
        let writes: Vec<_> = [(0, 1), (1, 1), (2, 0), (3, 0)].map(write).to_vec();
        assert_eq!(after(&writes).iter().map(|write| write.tag).collect::<Vec<_>>(), [2, 3]);
        assert!(after(&writes[..2]).is_empty());
        assert!(after(&[]).is_empty());
    }

    #[test]
    fn a_loss_is_said_aloud() {
        let text = describe(&sample());
        assert!(text.starts_with("node2 took over from node1 (kill). Outage: 31.4 ms.\n"), "{text}");
        assert!(text.ends_with("nothing was lost.\n"), "{text}");
        let lost = Outcome { missing: vec!["drill-1-7".into()], ..sample() };
        assert!(describe(&lost).contains("1 ACKNOWLEDGED WRITES ARE MISSING: drill-1-7"));
    }

    #[test]
    fn the_record_is_bounded_and_follows_no_link() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(RECORD);
        fs::write(&path, "{}\n".repeat(KEPT + 5)).unwrap();
        record(folder.path(), &sample()).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), KEPT);
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!((last["takeover"].as_str(), last["outage_ms"].as_f64()), (Some("kill"), Some(31.4)));
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        assert!(record(folder.path(), &sample()).is_err());
    }
}
