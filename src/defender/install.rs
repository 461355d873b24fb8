//! Makes this host a Defender, or takes that back: registers it, puts program and unit in their places, starts the
//! agent. Must never change anything before the registration has succeeded, leave half a file, or let two agents run.

use std::{
    env,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};

use super::{folder::Folder, register};

/// Environment variable for a folder that stands for a host, in tests.
const PREFIX: &str = "TWISTLOCK_PREFIX";
/// The folder of a Defender, and the only one that its unit may write to.
pub(super) const FOLDER: &str = "/var/lib/twistlock-defender";
const UNIT: &str = "defender.service";
const UNIT_TEXT: &str = include_str!("../../packaging/defender.service");
const NAME: &str = "defender";
/// How long an agent may take to end.
const STOP: Duration = Duration::from_secs(20);
/// Pause between two looks at it.
const PACE: Duration = Duration::from_millis(50);

/// What `defender uninstall` is told.
#[derive(Debug, clap::Args)]
pub(super) struct Removal {
    /// Delete its folder, too: key, certificate, policy, and events that no Console has yet
    #[arg(long)]
    purge: bool,
}

/// Where everything is on this host.
struct Host {
    /// Empty on a real one.
    prefix: PathBuf,
    /// The program is that of a Debian package.
    packaged: bool,
    folder: PathBuf,
}

impl Host {
    fn find(folder: &Path) -> Result<Self> {
        let prefix = PathBuf::from(env::var_os(PREFIX).unwrap_or_default());
        let real = prefix.as_os_str().is_empty();
        ensure!(real || prefix.is_absolute(), "{PREFIX} must be an absolute path");
        ensure!(!real || geteuid().is_root(), "this needs root: try the same with sudo");
        ensure!(
            !real || folder == Path::new(FOLDER) || !systemd(),
            "under systemd the folder is {FOLDER}: leave --folder out"
        );
        let packaged = real && env::current_exe().is_ok_and(|own| own == Path::new("/usr/bin").join(NAME));
        let mut host = Self { prefix, packaged, folder: PathBuf::new() };
        host.folder = host.at(folder);
        Ok(host)
    }

    fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        if path.starts_with(&self.prefix) {
            return path.to_owned();
        }
        self.prefix.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn has_systemd(&self) -> bool {
        self.prefix.as_os_str().is_empty() && systemd()
    }

    fn program(&self) -> PathBuf {
        self.at(if self.packaged { "/usr/bin" } else { "/usr/local/bin" }).join(NAME)
    }

    fn unit(&self) -> PathBuf {
        self.at("/etc/systemd/system").join(UNIT)
    }

    fn log(&self) -> PathBuf {
        self.at("/var/log/twistlock-defender.log")
    }
}

fn systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Registers this host and has the agent run from now on. It may be done again: then the agent is the newer program.
///
/// # Errors
/// When somebody else than root does it, no Console registers the host, or a file cannot be written or the agent not
/// started.
pub(super) fn install(folder: &Path, options: &register::Options) -> Result<()> {
    let host = Host::find(folder)?;
    register::register(&Folder::open(&host.folder)?, options)?;
    if !host.packaged {
        let own = env::current_exe().context("find this program")?;
        let program = fs::read(&own).with_context(|| format!("read {}", own.display()))?;
        place(&host.program(), 0o755, &program)?;
        if host.has_systemd() {
            place(&host.unit(), 0o644, UNIT_TEXT.as_bytes())?;
        }
    }
    if host.has_systemd() {
        for words in [&["daemon-reload"][..], &["enable", "--quiet", UNIT], &["restart", UNIT]] {
            systemctl(words)?;
        }
        println!("The Defender runs: systemctl status {UNIT}. The Consoles show it: twistcli defender list");
        return Ok(());
    }
    end(&host.folder)?;
    start(&host)
}

/// Ends the agent, and takes program and unit away.
///
/// # Errors
/// When somebody else than root does it, the agent does not end, or a file cannot be removed.
pub(super) fn uninstall(folder: &Path, removal: &Removal) -> Result<()> {
    let host = Host::find(folder)?;
    if host.has_systemd() && (host.packaged || host.unit().exists()) {
        systemctl(&["disable", "--quiet", "--now", UNIT])?;
    }
    end(&host.folder)?;
    if !host.packaged {
        remove(&host.unit())?;
        if host.has_systemd() {
            systemctl(&["daemon-reload"])?;
        }
        // A node of the cluster gives it out.
        if !host.program().with_file_name("twistlockd").exists() {
            remove(&host.program())?;
        }
    }
    let shown = host.folder.display();
    if removal.purge {
        match fs::remove_dir_all(&host.folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("delete {shown}"));
            }
            _ => println!("{shown} is deleted."),
        }
    } else {
        println!("Left in place: {shown} (to delete it: rm -r {shown})");
    }
    println!("The Consoles still know this host: twistcli defender withdraw ID shuts its certificate out.");
    Ok(())
}

fn systemctl(words: &[&str]) -> Result<()> {
    let status = Command::new("systemctl").args(words).status().context("run systemctl")?;
    ensure!(status.success(), "systemctl {} failed: see systemctl status {UNIT}", words.join(" "));
    Ok(())
}

/// Starts the agent where no service manager does.
fn start(host: &Host) -> Result<()> {
    let log = host.log();
    let parent = log.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    let open = File::options().create(true).append(true).open(&log);
    let open = open.with_context(|| format!("open {}", log.display()))?;
    let mut command = Command::new("setsid");
    command.arg(host.program()).arg("--folder").arg(&host.folder).arg("run").current_dir("/");
    command.stdin(Stdio::null()).stdout(open.try_clone()?).stderr(open);
    let agent = command.spawn().context("run setsid")?;
    println!("No systemd here: the Defender runs as pid {}, its log is {}.", agent.id(), log.display());
    println!("Starting it at boot is up to this host's service manager: {} run", host.program().display());
    Ok(())
}

/// Ends the agent that runs with this folder, if one does.
fn end(folder: &Path) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    let folder = Folder::open(folder)?;
    let begin = Instant::now();
    // Whoever has the lock has written there who it is.
    while folder.try_lock()?.is_none() {
        let agent = folder.holder().filter(|pid| is_agent(*pid));
        let pid = agent.context("another process has the folder, and does not say which: end it")?;
        ensure!(begin.elapsed() < STOP, "the Defender (pid {pid}) does not end");
        if let Err(error) = kill(Pid::from_raw(pid), Signal::SIGTERM)
            && error != nix::errno::Errno::ESRCH
        {
            bail!("the Defender (pid {pid}) cannot be ended: {error}");
        }
        thread::sleep(PACE);
    }
    Ok(())
}

/// A number may be that of another process by now. After an upgrade the program of a process is called "deleted".
fn is_agent(pid: i32) -> bool {
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    program.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(NAME))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("delete {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Writes a file as a whole. A program that runs keeps the old one.
fn place(path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
    let write = || {
        let parent = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent)?;
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        drop(file);
        fs::rename(&new, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(prefix: &Path) -> Host {
        let mut host = Host { prefix: prefix.to_owned(), packaged: false, folder: PathBuf::new() };
        host.folder = host.at(FOLDER);
        host
    }

    #[test]
    fn everything_is_below_the_prefix() {
        let dir = tempfile::tempdir().unwrap();
        let host = host(dir.path());
        for path in [host.program(), host.unit(), host.log(), host.folder.clone()] {
            assert!(path.starts_with(dir.path()), "{}", path.display());
        }
        assert_eq!(host.at(&host.folder), host.folder, "what is below stays");
    }

    #[test]
    fn files_are_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/defender.service");
        place(&path, 0o644, UNIT_TEXT.as_bytes()).unwrap();
        place(&path, 0o755, b"new").unwrap();
        assert_eq!(
            (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().permissions().mode() & 0o777),
            (b"new".to_vec(), 0o755)
        );
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        remove(&path).unwrap();
        remove(&path).unwrap();
    }

    #[test]
    fn the_unit_knows_the_same_folder() {
        assert!(UNIT_TEXT.contains(&format!("StateDirectory={}", FOLDER.rsplit('/').next().unwrap())));
    }

    #[test]
    fn nobody_is_ended_where_nobody_runs() {
        let dir = tempfile::tempdir().unwrap();
        end(&dir.path().join("none")).unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        drop(folder.lock().unwrap());
        let own = std::process::id() as i32;
        assert_eq!((folder.holder(), is_agent(own)), (Some(own), false));
        // It is only what stands there: nobody holds it, so nobody is ended.
        end(dir.path()).unwrap();
    }
}
