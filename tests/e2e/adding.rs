//! `add` that is interrupted at each step, or meant for hosts that nobody has proven: all of them become members or none, nothing is
//! changed meanwhile, and the same command works afterwards. Real processes in a network of their own, with somebody between
//! the PRIMARY and a host.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Instant,
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use twistlock_ha::cluster::Role;

use super::{
    beside,
    between::{self, Between, Side, Word},
    cluster::LIMIT,
    network,
    terminal::Terminal,
    waiting::{Host, PASSWORD, SECRET, add, at, line, site, voters},
};

/// The words at which a meeting is stopped.
const RESERVE: Word = (Side::Caller, 4);
const READY: Word = (Side::Host, 4);
const ADOPT: Word = (Side::Caller, 5);
const ADOPTED: Word = (Side::Host, 5);

/// Hosts that wait, the first one signed up.
fn pool(site: &Path, count: usize, secret: Option<&str>) -> Vec<Host> {
    let hosts: Vec<Host> = (1..=count).map(|number| Host::start(site, number, secret)).collect();
    hosts.iter().for_each(|host| host.wait_role(Role::Waiting));
    assert_eq!(hosts[0].sign_up().0, 200);
    hosts[0].wait_role(Role::Primary);
    let agent = hosts[0].agent();
    hosts[0].wait_for("logged in", || hosts[0].write(&agent, "first") == Some(200));
    // The last change of the membership that comes by itself.
    hosts[0].wait_for("known by its version", || {
        hosts[0].status().is_some_and(|status| !status.membership.shared.pool.version.is_empty())
    });
    hosts
}

fn addresses(hosts: &[Host]) -> Vec<String> {
    hosts.iter().map(Host::address).collect()
}

/// What an `add` may change: the membership of the pool, with the index of its entry, and the folders of the hosts.
#[derive(Debug, PartialEq)]
struct Picture {
    membership: String,
    folders: Vec<BTreeMap<PathBuf, Vec<u8>>>,
}

impl Picture {
    fn of(primary: &Host, waiting: &[Host]) -> Self {
        let membership = fs::read_to_string(primary.data().join("membership.json")).unwrap();
        Self { membership, folders: waiting.iter().map(|host| files(&host.data())).collect() }
    }

    /// Nothing was changed on either side, and the hosts wait.
    #[track_caller]
    fn assert_same(&self, primary: &Host, waiting: &[Host]) {
        waiting.iter().for_each(|host| host.wait_role(Role::Waiting));
        let now = Self::of(primary, waiting);
        for (was, is) in self.folders.iter().zip(&now.folders) {
            let other = was.keys().chain(is.keys()).filter(|path| was.get(*path) != is.get(*path)).collect::<Vec<_>>();
            assert!(other.is_empty(), "these files were changed: {other:?}");
        }
        assert_eq!(*self, now);
    }
}

/// All files below a folder but those that tell what has happened, and which process uses it.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let (path, kind, name) = (entry.path(), entry.file_type().unwrap(), entry.file_name());
        if kind.is_dir() {
            found.extend(files(&path));
        } else if kind.is_file() && name != "lock" && !name.to_string_lossy().starts_with("events") {
            found.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    found
}

/// Begins a command, and leaves it.
fn begin(host: &Host, args: &[&str]) -> Child {
    let line = line(host, args);
    let mut command = Command::new(&line[0]);
    command.args(&line[1..]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Exit code, and all that it has said.
fn end(command: Child) -> (Option<i32>, String) {
    let output = command.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

/// Adds hosts at one of them, and stops before a word of the first. What comes meanwhile gets the command; the word is
/// never said. Returns what the command has said at its end.
fn interrupted(
    hosts: &mut [Host],
    to_add: &[String],
    word: Word,
    harm: impl FnOnce(&mut [Host], &mut Child),
) -> (Option<i32>, String) {
    let between = Between::stand(&hosts[0].address(), &to_add[0], word);
    let mut command = begin(&hosts[0], &add(to_add, &[]));
    between.wait_stopped();
    harm(hosts, &mut command);
    drop(between);
    end(command)
}

#[test]
fn an_interrupted_add_takes_all_hosts_in_or_none() {
    let _beside = beside();
    network::in_private_network(|| {
        let site = site();
        let mut hosts = pool(site.path(), 5, Some(SECRET));
        let two = addresses(&hosts[1..3]);
        let before = Picture::of(&hosts[0], &hosts[1..]);

        // The PRIMARY is killed before a host is reserved, and when one is.
        for word in [RESERVE, READY] {
            let (code, text) = interrupted(&mut hosts, &two, word, |hosts, _| hosts[0].end(Signal::SIGKILL));
            assert_ne!(code, Some(0), "{word:?}: {text}");
            hosts[0].run();
            hosts[0].wait_role(Role::Primary);
            before.assert_same(&hosts[0], &hosts[1..]);
        }
        // A host is killed.
        let (code, text) = interrupted(&mut hosts, &two, RESERVE, |hosts, _| hosts[1].end(Signal::SIGKILL));
        assert!(code == Some(75) && text.contains("127.0.0.2: "), "{text}");
        hosts[1].run();
        before.assert_same(&hosts[0], &hosts[1..]);
        // The command is killed: what it has begun comes to its end, and that is written down.
        interrupted(&mut hosts, &two, RESERVE, |hosts, command| {
            command.kill().unwrap();
            hosts[0].wait_for("done with it", || !audits(&hosts[0]).iter().any(|row| row["outcome"] == "begun"));
        });
        println!("  the command is killed: {}", audits(&hosts[0])[0]["outcome"]);
        before.assert_same(&hosts[0], &hosts[1..]);

        // The PRIMARY is killed when both are members, and neither was told: the same command tells them.
        interrupted(&mut hosts, &two, ADOPT, |hosts, _| hosts[0].end(Signal::SIGKILL));
        hosts[0].run();
        hosts[0].wait_role(Role::Primary);
        assert_eq!(hosts[0].status().unwrap().membership.roster.members.len(), 3, "all or none");
        hosts[1..].iter().for_each(|host| assert_eq!(host.role(), Some(Role::Waiting)));
        let (code, text) = at(&hosts[0], &add(&two, &[]));
        assert!(code == Some(0) && text.contains("All 3 members are up"), "{text}");
        assert_eq!(text.matches("is a member since an earlier request").count(), 2, "{text}");
        grow(&mut hosts);
    });
}

/// The rows of the audit, the newest first.
fn audits(host: &Host) -> Vec<Value> {
    let (code, text) = at(host, &["audits", "--json"]);
    assert_eq!(code, Some(0), "{text}");
    serde_json::from_str(&text).unwrap()
}

/// From three to five members: a host is killed when it is one and does not know it, then the PRIMARY when that host knows, and
/// it does not.
fn grow(hosts: &mut [Host]) {
    let two = addresses(&hosts[3..]);
    let (code, text) = interrupted(hosts, &two, ADOPT, |hosts, _| hosts[3].end(Signal::SIGKILL));
    assert!(code == Some(75) && text.contains("127.0.0.4 does not know that it is a member"), "{text}");
    assert!(text.contains("127.0.0.5 (host5, node 5) is added."), "{text}");
    hosts[3].run();
    hosts[3].wait_role(Role::Waiting);
    let (code, text) = interrupted(hosts, &two, ADOPTED, |hosts, _| hosts[0].end(Signal::SIGKILL));
    assert_ne!(code, Some(0), "{text}");
    let primary = || hosts[1..].iter().find(|host| host.role() == Some(Role::Primary));
    hosts[1].wait_for("led by another member", || primary().is_some());
    let address = primary().unwrap().address();
    hosts[0].run();
    let primary = hosts.iter().find(|host| host.address() == address).unwrap();
    // Both know by now. One that begins as a member at this moment cannot be met, and may not know, for all that the PRIMARY sees.
    primary.wait_for("told that nothing is left to be done", || {
        let (code, text) = at(primary, &add(&two, &[]));
        code == Some(75) && text.contains("127.0.0.4 is the member host4 already")
    });
    primary.wait_for("with five votes", || voters(primary) == 5);
}

#[test]
fn whoever_stands_between_or_repeats_is_refused() {
    let _beside = beside();
    network::in_private_network(|| {
        let site = site();
        let mut hosts = pool(site.path(), 2, Some(SECRET));
        let (here, one) = (hosts[0].address(), addresses(&hosts[1..]));
        let before = Picture::of(&hosts[0], &hosts[1..]);
        // He passes on every word, with all that TLS needs: the secret is proven to other connections than his.
        let (code, text) = between::impostor(&here, &one[0], site.path(), || at(&hosts[0], &add(&one, &[])));
        let why = "the secrets of CLUSTERED_DB_SECRET_FILE differ, or somebody stands between";
        assert!(code == Some(75) && text.contains(&format!("{}: {why}", one[0])), "{text}");
        hosts[1].wait_for("aware of him", || hosts[1].log().contains(&format!("a caller was refused: {why}")));
        before.assert_same(&hosts[0], &hosts[1..]);

        // What both have said is said again, to each of them.
        let mut said = [Vec::new(), Vec::new()];
        let between = Between::stand(&here, &one[0], RESERVE);
        let command = begin(&hosts[0], &add(&one, &[]));
        between.wait_stopped();
        for (said, now) in said.iter_mut().zip(between.cut()) {
            *said = now;
        }
        drop(between);
        assert_eq!(end(command).0, Some(75));
        let [caller, host] = said;
        assert!(caller.len() > 1000 && host.len() > 1000, "{} and {} bytes", caller.len(), host.len());
        let mut replay = TcpStream::connect((one[0].as_str(), network::HA_PORT)).unwrap();
        replay.set_read_timeout(Some(LIMIT)).unwrap();
        // The host may have had enough before the end.
        drop(replay.write_all(&caller));
        drop(replay.read_to_end(&mut Vec::new()));
        before.assert_same(&hosts[0], &hosts[1..]);
        let (code, text) = between::parrot(&here, &one[0], host, || at(&hosts[0], &add(&one, &[])));
        assert!(code == Some(75) && text.contains(&one[0]), "{text}");
        before.assert_same(&hosts[0], &hosts[1..]);

        let (code, text) = at(&hosts[0], &add(&one, &[]));
        assert!(code == Some(0) && text.contains("All 2 members are up"), "{text}");
        hosts[1].end(Signal::SIGTERM);
    });
}

/// Without a secret it is up to the administrator to compare, and to him alone.
#[test]
fn without_a_secret_a_host_is_added_when_somebody_has_compared() {
    let _beside = beside();
    network::in_private_network(|| {
        let site = site();
        let hosts = pool(site.path(), 2, None);
        let (one, print) = (addresses(&hosts[1..]), hosts[1].fingerprint());
        the_seed_is_called_otherwise(&hosts[0]);
        let before = Picture::of(&hosts[0], &hosts[1..]);

        let (code, text) = at(&hosts[0], &add(&one, &[]));
        assert!(code == Some(75) && text.contains(&print) && text.contains("--member-fingerprint"), "{text}");
        let login = data_encoding::BASE64.encode(format!("admin:{PASSWORD}").as_bytes());
        let call = hosts[0].agent().post(hosts[0].url("clustered-db/members"));
        let call = call.header("authorization", format!("Basic {login}"));
        let mut answer = call.send_json(json!({ "members": [{ "address": one[0] }] })).unwrap();
        let why = answer.body_mut().read_to_string().unwrap();
        assert!(answer.status() == 409 && why.contains(&print), "{} {why}", answer.status());
        let (code, text) = asked(&hosts[0], &one, &print, "n");
        assert!(code == 75 && text.contains("not confirmed; nothing was changed"), "{text}");

        // Somebody between has another key: whoever has compared is safe. Else the host is: he is no member of the pool.
        between::impostor(&hosts[0].address(), &one[0], site.path(), || {
            let (code, text) = at(&hosts[0], &add(&one, &["--member-fingerprint", &print]));
            assert!(code == Some(75) && text.contains(&format!("and not {print}")), "{text}");
            let (code, text) = at(&hosts[0], &add(&one, &[]));
            assert!(code == Some(75) && text.contains("it cannot be a member of a pool"), "{text}");
        });
        before.assert_same(&hosts[0], &hosts[1..]);

        let watches = Watches::start(&hosts[0]);
        let (code, text) = asked(&hosts[0], &one, &print, "y");
        assert!(code == 0 && text.contains("All 2 members are up"), "{text}");
        watches.end_with("127.0.0.2");
        let (code, text) = at(&hosts[0], &["clustered-db", "configure", "--seed-console-address", "127.0.0.61"]);
        assert!(code == Some(75) && text.contains("only while it is alone"), "{text}");
    });
}

/// Its address is only what the others will know it by.
fn the_seed_is_called_otherwise(seed: &Host) {
    for address in ["127.0.0.61", "127.0.0.1"] {
        let (code, text) = at(seed, &["clustered-db", "configure", "--seed-console-address", address]);
        assert!(code == Some(0) && text.contains(&format!("Seed Console address: {address}")), "{text}");
        let shown = format!("1. Address: {address}, State: PRIMARY");
        seed.wait_for(&shown, || at(seed, &["clustered-db", "status"]).1.contains(&shown));
    }
}

/// Adds hosts on a terminal, waits for a text, and answers the question.
fn asked(host: &Host, to_add: &[String], shows: &str, answer: &str) -> (i32, String) {
    let line = line(host, &add(to_add, &[]));
    let line: Vec<&str> = line.iter().map(String::as_str).collect();
    let mut terminal = Terminal::run(&line, &[]);
    terminal.wait_for(shows);
    terminal.wait_for("Each fingerprint must be the one that the host itself shows.");
    terminal.wait_for("Add them? [y/N]");
    terminal.type_line(answer);
    terminal.wait_end()
}

/// `status --watch`, on a terminal and as lines of JSON.
struct Watches {
    terminal: Terminal,
    lines: Child,
}

impl Watches {
    fn start(host: &Host) -> Self {
        let line = line(host, &["clustered-db", "status", "--watch=0.2"]);
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let mut terminal = Terminal::run(&line, &[]);
        // Each time the screen is drawn anew.
        for _ in 0..2 {
            terminal.wait_for("\x1b[");
            terminal.wait_for("1. Address: 127.0.0.1, State: PRIMARY");
        }
        Self { terminal, lines: begin(host, &["clustered-db", "status", "--watch=0.2", "--json"]) }
    }

    /// Returns when both have shown a second member that is up.
    fn end_with(mut self, address: &str) {
        self.terminal.wait_for(&format!("2. Address: {address}, State: SECONDARY"));
        let (begin, mut lines) = (Instant::now(), BufReader::new(self.lines.stdout.take().unwrap()).lines());
        let up =
            |status: &Value| status["members"][1]["name"] == address && status["members"][1]["stateStr"] == "SECONDARY";
        while !up(&serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap()) {
            assert!(begin.elapsed() < LIMIT, "the member is not shown");
        }
        self.lines.kill().unwrap();
        self.lines.wait().unwrap();
    }
}
