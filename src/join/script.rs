//! The join script and the programs that it downloads, as the primary gives them out. Must never put anything into the
//! script that is not quoted, and never a secret but the token that its reader has or was just given.

mod defender;

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::Mutex,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use data_encoding::HEXLOWER;
use ring::digest;

use super::{JoinFile, Offer, Token};
use crate::{
    cluster::{Membership, NodeId, program_version, roster::place},
    config::{self, Config, FirstState},
    mutex::locked,
    pki::CONSOLE_NAME,
};

const TEMPLATE: &str = include_str!("console.sh.in");
/// What every script does to fetch a program, in place of the line that is [`FETCH_MARK`].
const FETCH: &str = include_str!("fetch.sh.in");
const FETCH_MARK: &str = "@FETCH@";
/// The daemon's own program, even when its file has been replaced since.
const OWN_PROGRAM: &str = "/proc/self/exe";
/// Bytes that are read at a time to compute a checksum.
const CHUNK: usize = 256 << 10;

/// Everything that another host needs to join.
#[derive(Debug)]
pub struct JoinAssets {
    /// `twistlock.cfg` of a newcomer.
    config: String,
    /// Keys that this node has a value for, which is in no script.
    withheld: Vec<&'static str>,
    https_port: Option<u16>,
    /// `COMMUNICATION_PORT`.
    defender_port: Option<u16>,
    /// Checksums by name, each with what tells whether the file is still the same.
    checksums: Mutex<HashMap<&'static str, (FileState, String)>>,
    /// The folder of this node's program.
    beside: PathBuf,
}

type FileState = (u64, u64, u64, i64, i64);

/// A program that other hosts may download.
#[derive(Debug)]
pub struct Program {
    pub file: File,
    pub length: u64,
    /// In hexadecimal digits.
    pub sha256: String,
}

/// Why there is no script.
#[derive(Debug, thiserror::Error)]
pub enum JoinAssetsError {
    #[error("MANAGEMENT_PORT_HTTPS is off, and other hosts join through it: set it on all members")]
    NoHttps,
    #[error("this cluster has no certificate authority in its membership")]
    NoAuthority,
    #[error("COMMUNICATION_PORT is off, and Defenders connect to it: set it on all members")]
    NoDefenderPort,
    #[error("this host has no program {0} beside twistlockd: install it on all members")]
    NoProgram(&'static str),
    #[error("the join token is not one of this cluster, or it has expired")]
    Token,
    #[error("cannot read this node's program: {0}")]
    Program(io::Error),
}

impl From<io::Error> for JoinAssetsError {
    fn from(error: io::Error) -> Self {
        Self::Program(error)
    }
}

impl JoinAssets {
    /// Prepares what a node gives out with this configuration: newcomers get the same, except what belongs to this host
    /// alone.
    pub fn new(config: &Config) -> Self {
        let newcomer = Config {
            bind_address: None,
            // One of this host, unless it keeps the port to itself.
            health_address: config.health_address.filter(|address| address.is_loopback()),
            console_cn: None,
            control_socket: None,
            high_availability_address: None,
            high_availability_name: None,
            high_availability_enabled: true,
            high_availability_state: FirstState::Secondary,
            // These are secrets, and so may be the arguments of a command: a host that asks to join may not read them
            // yet.
            metrics_token: None,
            notify_command: Vec::new(),
            ..config.clone()
        };
        let withheld = [
            config.metrics_token.is_some().then_some("METRICS_TOKEN"),
            (!config.notify_command.is_empty()).then_some("NOTIFY_COMMAND"),
        ];
        let own = std::env::current_exe().unwrap_or_default();
        Self {
            config: config::render(&newcomer),
            withheld: withheld.into_iter().flatten().collect(),
            https_port: config.management_port_https,
            defender_port: config.communication_port,
            checksums: Mutex::default(),
            beside: own.parent().map(PathBuf::from).unwrap_or_default(),
        }
    }

    /// Opens `twistlockd`, `twistcli` or `defender`; none if there is no such program. Blocks: its checksum is
    /// computed, once.
    ///
    /// # Errors
    /// When the program's file cannot be opened or read.
    pub fn program(&self, name: &str) -> io::Result<Option<Program>> {
        let (name, path) = match name {
            "twistlockd" => ("twistlockd", PathBuf::from(OWN_PROGRAM)),
            "twistcli" => ("twistcli", self.beside.join("twistcli")),
            "defender" => ("defender", self.beside.join("defender")),
            _ => return Ok(None),
        };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let found = file.metadata()?;
        let state = (found.dev(), found.ino(), found.len(), found.mtime(), found.mtime_nsec());
        // The lock is held while it is computed: whoever comes meanwhile needs the same.
        let mut checksums = locked(&self.checksums);
        let known = checksums.get(name).filter(|(known, _)| *known == state).map(|(_, sha256)| sha256.clone());
        let sha256 = match known {
            Some(sha256) => sha256,
            None => {
                let sha256 = checksum(file.try_clone()?)?;
                checksums.insert(name, (state, sha256.clone()));
                sha256
            }
        };
        drop(checksums);
        io::Seek::rewind(&mut &file)?;
        Ok(Some(Program { file, length: found.len(), sha256 }))
    }

    /// The script for a token that was checked. Blocks as [`Self::program`] does.
    ///
    /// # Errors
    /// When the token is not one of this cluster or has expired, when the nodes have no HTTPS port or the cluster has
    /// no certificate authority, and when a program cannot be read.
    pub fn script(&self, membership: &Membership, primary: NodeId, token: &str) -> Result<String, JoinAssetsError> {
        let ca = &membership.shared.authority.as_ref().ok_or(JoinAssetsError::NoAuthority)?.certificate;
        let parsed: Token = token.parse().map_err(|_| JoinAssetsError::Token)?;
        let invitation = membership.shared.invitations.iter().find(|open| parsed.has_hash(&open.hash));
        let until = invitation.ok_or(JoinAssetsError::Token)?.until;
        let addresses = self.addresses(membership, primary)?;
        let list = quoted_list(&addresses);
        let offer = Offer {
            join: JoinFile { token: token.to_owned(), addresses, ca: ca.clone(), adopted: false },
            cluster: membership.cluster,
            members: membership.roster.members.iter().map(|member| member.id).collect(),
            next_id: membership.roster.next_id,
            until,
            version: program_version().to_owned(),
            config: self.config.clone(),
            withheld: self.withheld.iter().map(|key| (*key).to_owned()).collect(),
        };
        let offer = serde_json::to_string(&offer).map_err(io::Error::from)?;
        let programs = [self.program("twistlockd")?, self.program("twistcli")?, self.program("defender")?];
        let length: u64 = programs.iter().flatten().map(|program| program.length).sum();
        let sums = programs.map(|program| quote(&program.map(|program| program.sha256).unwrap_or_default()));
        let [daemon, cli, defender] = sums;
        let values = [
            ("@TOKEN@", quote(token)),
            ("@ADDRESSES@", list),
            ("@UNTIL@", until.to_string()),
            ("@VERSION@", quote(program_version())),
            ("@ARCHITECTURE@", quote(std::env::consts::ARCH)),
            ("@DAEMON_SHA256@", daemon),
            ("@CLI_SHA256@", cli),
            ("@DEFENDER_SHA256@", defender),
            ("@KIB@", length.div_ceil(1024).to_string()),
            ("@CA@", quote(ca)),
            ("@CONSOLE_NAME@", quote(CONSOLE_NAME)),
            ("@OFFER@", quote(&offer)),
        ];
        Ok(fill(TEMPLATE, &values))
    }

    /// Where the script is.
    ///
    /// # Errors
    /// When the nodes have no HTTPS port.
    pub fn url(&self, membership: &Membership, primary: NodeId) -> Result<String, JoinAssetsError> {
        let addresses = self.addresses(membership, primary)?;
        let first = addresses.first().ok_or(JoinAssetsError::NoHttps)?;
        Ok(format!("https://{first}/api/v1/scripts/console.sh"))
    }

    /// The line to run on another host. It trusts this cluster's authority alone, and therefore asks the primary for
    /// [`CONSOLE_NAME`]; the token is in no command line that other users of that host could read. Without `-f`: a
    /// refusal is a script, too, see [`refusal`].
    ///
    /// # Errors
    /// When the nodes have no HTTPS port, or the cluster has no certificate authority.
    pub fn line(&self, membership: &Membership, primary: NodeId, token: &str) -> Result<String, JoinAssetsError> {
        self.line_for("console.sh", membership, primary, token)
    }

    /// The line that fetches the script of this name.
    fn line_for(
        &self,
        script: &str,
        membership: &Membership,
        primary: NodeId,
        token: &str,
    ) -> Result<String, JoinAssetsError> {
        let ca = &membership.shared.authority.as_ref().ok_or(JoinAssetsError::NoAuthority)?.certificate;
        let addresses = self.addresses(membership, primary)?;
        let (ca, place) = (BASE64_STANDARD.encode(ca), addresses.first().ok_or(JoinAssetsError::NoHttps)?);
        Ok(format!(
            "curl -sS --noproxy '*' --connect-to ::{place} --cacert <(base64 -d <<<{ca}) -H @<(echo 'Authorization: Bearer {token}') \
             https://{CONSOLE_NAME}/api/v1/scripts/{script} | sudo bash"
        ))
    }

    /// `host:port` of the members' Console ports, the primary's first.
    fn addresses(&self, membership: &Membership, primary: NodeId) -> Result<Vec<String>, JoinAssetsError> {
        let port = self.https_port.ok_or(JoinAssetsError::NoHttps)?;
        let mut members: Vec<_> = membership.roster.members.iter().collect();
        members.sort_by_key(|member| member.id != primary);
        Ok(members.iter().map(|member| place(&member.address, port)).collect())
    }
}

fn checksum(mut file: File) -> io::Result<String> {
    let mut context = digest::Context::new(&digest::SHA256);
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(HEXLOWER.encode(context.finish().as_ref())),
            count => context.update(&chunk[..count]),
        }
    }
}

/// Words of a shell.
fn quoted_list(words: &[String]) -> String {
    words.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ")
}

/// Puts each value where its mark stands. What was put in is not looked at again: it may look like a mark.
fn fill(template: &str, values: &[(&str, String)]) -> String {
    let mut script = String::with_capacity(template.len() + FETCH.len() + 32_768);
    for line in template.lines() {
        if line == FETCH_MARK {
            script.push_str(FETCH);
            continue;
        }
        let mark = values.iter().find(|(mark, _)| line.starts_with("readonly ") && line.contains(mark));
        match mark.and_then(|(mark, value)| Some((line.split_once(mark)?, value))) {
            Some(((before, after), value)) => script.extend([before, value, after]),
            None => script.push_str(line),
        }
        script.push('\n');
    }
    script
}

/// What a script is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The host becomes a member.
    Join,
    /// The host becomes a Defender.
    Defender,
}

/// What is answered instead of a script: a script that says why there is none. `later` if it is worth another attempt.
pub fn refusal(purpose: Purpose, why: &str, later: bool) -> String {
    let (word, again) = match purpose {
        Purpose::Join => ("join", "twistcli ha join-script"),
        Purpose::Defender => ("defender", "twistcli defender install-script"),
    };
    let (hint, code) = if later {
        ("Run the same line again in a while.".to_owned(), 75)
    } else {
        (format!("Get a new line: {again}, on the PRIMARY. Nothing was changed on this host."), 77)
    };
    let (why, hint) = (quote(&format!("{word}: {why}")), quote(&format!("  {hint}")));
    format!("#!/bin/sh\nprintf '%s\\n' {why} {hint} >&2\nexit {code}\n")
}

/// One word of a shell, whatever is in it.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, process::Command};

    use super::*;
    use crate::{
        cluster::{
            ClusterId, Member,
            shared::{Invitation, authority::SealedAuthority},
        },
        pki::{Authority, certificate_der},
    };

    /// A membership with an authority and an open invitation, and its token.
    pub(super) fn invited() -> (Membership, String) {
        let ca = Authority::create(ClusterId(7)).unwrap().certificate_pem().to_owned();
        let token = Token::new(&certificate_der(&ca).unwrap());
        let members = vec![Member::founder(1, "a", "192.0.2.1", 8086), Member::founder(2, "b", "2001:db8::2", 8086)];
        let mut membership = Membership::founded(ClusterId(7), members);
        membership.shared.authority = Some(SealedAuthority { certificate: ca, sealed_key: String::new(), key: None });
        membership.shared.invitations =
            vec![Invitation { hash: token.secret_hash(), at: 1, until: u64::MAX >> 1, by: "a".into() }];
        (membership, token.to_string())
    }

    pub(super) fn shell(script: &str) -> String {
        let output = Command::new("bash").args(["-c", script]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Checks a script, and writes it without its last line: then it can be looked at, and does nothing.
    pub(super) fn sound(folder: &Path, script: &str) -> PathBuf {
        assert!(!script.lines().any(|line| line.starts_with("readonly ") && line.contains("=@")), "a mark is left");
        let path = folder.join("script.sh");
        fs::write(&path, script).unwrap();
        match Command::new("shellcheck").arg(&path).output() {
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
            Err(error) => println!("NOT CHECKED: shellcheck cannot be run: {error}"),
        }
        let body = script.strip_suffix("main \"$@\"\n").expect("main is called in the last line");
        fs::write(&path, body).unwrap();
        path
    }

    #[test]
    fn a_shell_reads_a_quoted_word_as_it_was() {
        let evil = "it's $(touch /tmp/x) `id` \\ \" ${HOME} @TOKEN@\nand more'";
        assert_eq!(shell(&format!("printf %s {}", quote(evil))), evil);
    }

    #[test]
    fn marks_in_values_stay_what_they_are() {
        let script = fill(TEMPLATE, &[("@TOKEN@", quote("@CA@")), ("@CA@", quote("x"))]);
        assert!(script.contains("readonly TOKEN='@CA@'\n") && script.contains("readonly CA='x'\n"));
    }

    #[test]
    fn the_script_is_sound_and_says_what_the_cluster_says() {
        let (membership, token) = invited();
        let assets = JoinAssets::new(&Config { console_cn: Some("first.example".into()), ..Config::default() });
        assert!(matches!(assets.script(&membership, 1, &Token::new(b"x").to_string()), Err(JoinAssetsError::Token)));
        let script = assets.script(&membership, 2, &token).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = sound(dir.path(), &script);
        let look = |what: &str| shell(&format!(". {}; {what}", path.display()));
        assert_eq!(look("printf '%s ' \"${ADDRESSES[@]}\""), "[2001:db8::2]:8083 192.0.2.1:8083 ");
        let path = dir.path().join("offer.json");
        fs::write(&path, look("printf %s \"$OFFER\"")).unwrap();
        let offer = Offer::read(&path).unwrap();
        assert_eq!((offer.join.token, offer.join.addresses.len()), (token, 2));
        assert_eq!((offer.members, offer.next_id, offer.cluster), (vec![1, 2], 3, ClusterId(7)));
        let loaded = config::parse(&offer.config, "twistlock.cfg", &|_| None).unwrap();
        assert!(loaded.config.high_availability_enabled && loaded.config.console_cn.is_none(), "{:?}", loaded.notes);
        assert_eq!(loaded.config.high_availability_state, FirstState::Secondary);
        assert!(
            (TEMPLATE.lines().count() + FETCH.lines().count()) < 150,
            "what is done to a host belongs into the program"
        );
    }

    #[test]
    fn no_script_tells_the_secrets_of_the_configuration() {
        let text = "METRICS_TOKEN=metrics-secret-42\nNOTIFY_COMMAND='/usr/bin/page --key paging-secret-42'\n";
        let config = config::parse(text, "twistlock.cfg", &|_| None).unwrap().config;
        assert!(config.metrics_token.is_some() && !config.notify_command.is_empty());
        let (membership, token) = invited();
        let script = JoinAssets::new(&config).script(&membership, 1, &token).unwrap();
        assert!(!script.contains("secret-42"));
        assert!(script.contains(r#""withheld":["METRICS_TOKEN","NOTIFY_COMMAND"]"#));
    }

    #[test]
    fn a_refusal_says_why_and_ends_as_one() {
        let run = |script: &str| Command::new("bash").args(["-c", script]).output().unwrap();
        let output = run(&refusal(Purpose::Join, "it's $(over) `now`", false));
        assert_eq!(output.status.code(), Some(77));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.starts_with("join: it's $(over) `now`\n") && said.contains("ha join-script"), "{said}");
        assert_eq!(run(&refusal(Purpose::Join, "busy", true)).status.code(), Some(75));
        let output = run(&refusal(Purpose::Defender, "over", false));
        assert!(String::from_utf8_lossy(&output.stderr).contains("twistcli defender install-script"));
    }

    #[test]
    fn the_line_hands_over_ca_and_token_unseen() {
        let (membership, token) = invited();
        let line = JoinAssets::new(&Config::default()).line(&membership, 1, &token).unwrap();
        // `curl` and `sudo` that only tell what they were given.
        let tell = "curl() { for a in \"$@\"; do case $a in @*) cat \"${a#@}\";; /*) cat \"$a\";; *) echo \"$a\";; esac; done; }; \
                    sudo() { cat; }; ";
        let told = shell(&format!("{tell}{line}"));
        let ca = &membership.shared.authority.unwrap().certificate;
        assert!(told.contains(ca.as_str()) && told.contains(&format!("Authorization: Bearer {token}")), "{told}");
        assert!(!told.lines().any(|word| word.starts_with("-f")), "a refusal has to reach the shell: {told}");
        assert!(told.contains("--connect-to\n::192.0.2.1:8083\n"), "{told}");
        assert!(told.ends_with("https://console.twistlock.internal/api/v1/scripts/console.sh\n"), "{told}");
    }

    #[test]
    fn programs_are_told_apart_from_other_names() {
        let assets = JoinAssets::new(&Config::default());
        let program = assets.program("twistlockd").unwrap().unwrap();
        let own = fs::read("/proc/self/exe").unwrap();
        assert_eq!(program.length, own.len() as u64);
        assert_eq!(program.sha256, HEXLOWER.encode(digest::digest(&digest::SHA256, &own).as_ref()));
        let mut first = [0; 4];
        (&program.file).read_exact(&mut first).unwrap();
        assert_eq!(first, own[..4]);
        assert!(assets.program("../twistlockd").unwrap().is_none());
        assert!(!Path::new("/proc/self").join("twistcli").exists() && assets.program("passwd").unwrap().is_none());
    }
}
