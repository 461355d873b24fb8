//! `twistcli debug bundle`: one archive with what is needed to investigate a problem. Works even if the daemon does
//! not run. Must never put a key, a token, a password or anything of the database into it.

use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use clap::{Args, Subcommand};
use flate2::{Compression, write::GzEncoder};
use jiff::Timestamp;

use crate::{
    clock::unix_time,
    cluster::program_version,
    config,
    control::{self, Call},
    events::{self, MAX_PAGE, Wanted},
};

/// The output cannot be made (sysexits).
const EX_CANTCREAT: u8 = 73;
/// Longest time for one answer of the daemon.
const ASK: Duration = Duration::from_secs(3);
/// Longest time for the output of another program.
const SPEAK: Duration = Duration::from_secs(10);
/// Bytes of the log that are put into the archive, from its end.
const LOG: u64 = 2 << 20;
/// Lines asked of the journal.
const JOURNAL_LINES: &str = "5000";
/// Files of the data folder that are listed.
const FILES: usize = 2000;
/// What stands where a secret was.
const REDACTED: &str = "(redacted)";

const BUNDLE_HELP: &str = "\
In the archive: status, events, metrics, configuration without its secrets, versions, the names and sizes of
the files in the data folder, and the end of the log. Never: keys, certificates, tokens, the database.

Exit code: 0 done (also when the daemon does not run), 64 wrong command line, 73 the archive cannot be
written.

Examples:
  sudo twistcli debug bundle
  sudo twistcli debug bundle -o /tmp/bundle.tar.gz";

/// Commands of `twistcli debug`.
#[derive(Debug, Subcommand)]
pub(super) enum Debug {
    /// Collect what is needed to investigate a problem, without secrets
    #[command(after_help = BUNDLE_HELP)]
    Bundle(BundleArgs),
}

#[derive(Debug, Args)]
pub(super) struct BundleArgs {
    /// The archive [default: twistlock-debug-HOST-TIME.tar.gz in this folder]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The daemon's configuration file
    #[arg(long, value_name = "FILE", default_value = "/etc/twistlock/twistlock.cfg")]
    config: PathBuf,
    /// The daemon's data folder [default: what the configuration file says]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// A file with the daemon's log, if it is not in the journal
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

/// Makes the archive and prints where it is.
pub(super) fn run(args: &BundleArgs) -> io::Result<u8> {
    let loaded = config::load(&args.config).map(|loaded| loaded.config);
    let known = loaded.as_ref().ok();
    let data = args.data.clone().or_else(|| known.map(|config| config.data_folder.clone()));
    let data = data.unwrap_or_else(|| config::Config::default().data_folder);
    // The folder on the command line need not be that of the configuration file.
    let socket = match known {
        Some(config) if args.data.is_none() => config.control_socket_path(),
        _ => data.join(control::SOCKET_NAME),
    };
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    let time = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let name = format!("twistlock-debug-{host}-{time}");
    let output = args.output.clone().unwrap_or_else(|| format!("{name}.tar.gz").into());
    match write(&output, &name, &parts(args, &data, &socket)) {
        Ok(()) => {
            println!("{}", output.display());
            eprintln!("Check it before you pass it on: it has the names and addresses of your hosts.");
            Ok(0)
        }
        Err(error) => {
            eprintln!("twistcli: cannot write {}: {error}", output.display());
            Ok(EX_CANTCREAT)
        }
    }
}

fn write(output: &Path, folder: &str, parts: &[(&str, String)]) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(output)?;
    let mut archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
    for (name, text) in parts {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(unix_time());
        archive.append_data(&mut header, format!("{folder}/{name}"), text.as_bytes())?;
    }
    archive.into_inner()?.finish()?.sync_all()
}

/// Name and content of each file. A file that cannot be had says why instead.
fn parts(args: &BundleArgs, data: &Path, socket: &Path) -> Vec<(&'static str, String)> {
    let ask = |path: &str| match control::send(socket, &Call::get(path), ASK) {
        Ok(answer) if answer.status.is_success() => answer.text,
        Ok(answer) => format!("refused: {}\n", answer.reason()),
        Err(error) => format!("not available: {error}\n"),
    };
    let indented = |text: String| match serde_json::from_str::<serde_json::Value>(&text) {
        Ok(value) => serde_json::to_string_pretty(&value).unwrap_or_default(),
        Err(_) => text,
    };
    let events = match events::read(data, &Wanted { limit: Some(MAX_PAGE), ..Wanted::default() }) {
        Ok(events) => serde_json::to_string_pretty(&events).unwrap_or_default(),
        Err(error) => format!("not available: {error}\n"),
    };
    let configuration = match read_end(&args.config, config::MAX_FILE as u64) {
        Ok(text) => redacted_settings(&text),
        Err(error) => format!("{}: {error}\n", args.config.display()),
    };
    vec![
        ("about.txt", about(args, data)),
        ("status.json", indented(ask("high-availability"))),
        ("metrics.txt", ask("/metrics")),
        ("events.json", redacted(&events)),
        ("twistlock.cfg", configuration),
        ("files.txt", files(data)),
        ("log.txt", redacted(&log(args))),
    ]
}

fn about(args: &BundleArgs, data: &Path) -> String {
    let program = |name: &str, arguments: &[&str]| {
        said(name, arguments, SPEAK).unwrap_or_else(|error| format!("{name}: {error}\n"))
    };
    format!(
        "time          {}\ntwistcli      {}\ntwistlockd    {}kernel        {}service       {}configuration {}\ndata folder   {}\n\n{}",
        Timestamp::now(),
        program_version(),
        program("twistlockd", &["--version"]),
        program("uname", &["-a"]),
        program("systemctl", &["is-active", "twistlockd"]),
        args.config.display(),
        data.display(),
        program("df", &["-h", &data.display().to_string()]),
    )
}

fn log(args: &BundleArgs) -> String {
    let text = match &args.log {
        Some(file) => read_end(file, LOG),
        None => said("journalctl", &["-u", "twistlockd", "-n", JOURNAL_LINES, "--no-pager", "-o", "short-iso"], SPEAK),
    };
    text.unwrap_or_else(|error| format!("not available: {error}\n"))
}

/// What a program says, the last bytes of it. One that hangs, as `df` does on a file system that is gone, is left to
/// itself.
fn said(program: &str, arguments: &[&str], limit: Duration) -> io::Result<String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let stdout = child.stdout.take().ok_or_else(|| io::Error::other("it has no output"))?;
    let (sender, text) = mpsc::sync_channel(1);
    thread::spawn(move || sender.send(last_bytes(stdout, LOG as usize)));
    let Ok(text) = text.recv_timeout(limit) else {
        let _ = child.kill(); // it may have ended just now
        return Err(io::Error::new(io::ErrorKind::TimedOut, format!("it did not end within {limit:?}")));
    };
    child.wait()?;
    text
}

/// The last bytes of a stream, from the beginning of a line if there were more.
fn last_bytes(mut from: impl Read, most: usize) -> io::Result<String> {
    let (mut bytes, mut cut) = (Vec::new(), false);
    while from.by_ref().take(most as u64).read_to_end(&mut bytes)? > 0 {
        if bytes.len() > most {
            bytes.drain(..bytes.len() - most);
            cut = true;
        }
    }
    let begin = if cut { bytes.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1) } else { 0 };
    Ok(String::from_utf8_lossy(&bytes[begin..]).into_owned())
}

/// The last bytes of a file.
fn read_end(path: &Path, most: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A configuration file without the values of its secrets, those in comments included.
fn redacted_settings(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let plain = line.trim_start_matches(['#', ' ', '\t']);
        match plain.split_once('=') {
            Some((key, value)) if is_secret(key.trim()) && !value.is_empty() => {
                let _ = writeln!(out, "{}={REDACTED}", &line[..line.len() - value.len() - 1]); // into memory
            }
            _ => {
                let _ = writeln!(out, "{}", redacted_line(line));
            }
        }
    }
    out
}

/// Judges by the kind of the key, or by its name if only a newer version knows it. The arguments of a command may be
/// secrets, too.
fn is_secret(key: &str) -> bool {
    let words = ["TOKEN", "SECRET", "PASSWORD", "PASSPHRASE", "CREDENTIAL", "KEY", "COMMAND"];
    let upper = key.to_ascii_uppercase();
    config::is_secret(key) || words.iter().any(|word| upper.contains(word))
}

fn redacted(text: &str) -> String {
    text.lines().map(|line| redacted_line(line) + "\n").collect()
}

/// Join tokens, what stands behind `Bearer` and `Basic`, and logins in addresses.
fn redacted_line(line: &str) -> String {
    let mut words = Vec::new();
    let mut login = false;
    for word in line.split(' ') {
        let bare = word.trim_matches(|c: char| !c.is_ascii_alphanumeric());
        words.push(if login && !bare.is_empty() || word.contains("TWJ1.") {
            REDACTED.to_owned()
        } else {
            without_login(word)
        });
        login = matches!(bare.to_ascii_lowercase().as_str(), "bearer" | "basic");
    }
    words.join(" ")
}

fn without_login(word: &str) -> String {
    let Some((scheme, rest)) = word.split_once("://") else { return word.to_owned() };
    let end = rest.find('/').unwrap_or(rest.len());
    match rest[..end].rfind('@') {
        Some(at) => format!("{scheme}://{REDACTED}{}", &rest[at..]),
        None => word.to_owned(),
    }
}

/// Names, sizes, modes and times; not a byte of the content.
fn files(data: &Path) -> String {
    let mut out = String::from("mode      bytes  changed               name\n");
    let mut folders = vec![data.to_owned()];
    let mut count = 0;
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) => {
                let _ = writeln!(out, "{}: {error}", folder.display());
                continue;
            }
        };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            count += 1;
            if count > FILES {
                out.push_str("...\n");
                return out;
            }
            let Ok(found) = fs::symlink_metadata(&path) else { continue };
            let time = Timestamp::from_second(found.mtime()).unwrap_or_default();
            let (mode, length, name) = (found.mode() & 0o7777, found.len(), path.strip_prefix(data).unwrap_or(&path));
            let _ = writeln!(out, "{mode:04o} {length:>10}  {time}  {}", name.display());
            if found.is_dir() {
                folders.push(path);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_says_last_is_taken_and_one_that_hangs_holds_nothing_up() {
        let long = said("seq", &["1000000"], SPEAK).unwrap();
        assert!(long.len() as u64 <= LOG && long.ends_with("\n999999\n1000000\n"), "{} bytes", long.len());
        let first: u32 = long.lines().next().unwrap().parse().unwrap();
        assert_eq!(long.lines().count() as u32, 1_000_001 - first);
        assert_eq!(said("printf", &["a\nb"], SPEAK).unwrap(), "a\nb");
        let hung = said("sleep", &["600"], Duration::from_millis(50)).unwrap_err();
        assert_eq!(hung.kind(), io::ErrorKind::TimedOut);
        assert!(said("no such program", &[], SPEAK).is_err());
    }

    #[test]
    fn secrets_do_not_pass() {
        let text = "METRICS_TOKEN=0123456789abcdef\n#  METRICS_TOKEN=\"fedcba9876543210\"\nLEASE_MS=400\n\
                    PROXY_URL=https://me:very-secret@host/b\nNOTIFY_COMMAND=\"/bin/notify --key zzz\"\nMETRICS_TOKEN=\n";
        let clean = redacted_settings(text);
        for secret in ["0123456789abcdef", "fedcba9876543210", "very-secret", "zzz"] {
            assert!(!clean.contains(secret), "{clean}");
        }
        assert!(clean.contains("LEASE_MS=400\n") && clean.ends_with("METRICS_TOKEN=\n"), "{clean}");
        assert!(clean.contains("PROXY_URL=https://(redacted)@host/b"), "{clean}");
        let log =
            redacted("run: curl -H 'Authorization: Bearer abc.def' and TWJ1.xyz, or Basic dTpw\nrole is PRIMARY\n");
        assert!(!["abc.def", "xyz", "dTpw"].iter().any(|secret| log.contains(secret)), "{log}");
        assert!(log.ends_with("role is PRIMARY\n"));
    }
}
