//! All processes of a service, as one thing that can be ended: a cgroup, or, where there is no cgroup v2, everything
//! that descends from its keeper. Must never name a process that is not part of it.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// The beginning of the name of a service's cgroup.
const PREFIX: &str = "twistlock-service-";
/// Time for processes to be gone after SIGKILL; who waits for a broken disk takes longer.
pub(super) const DEATH: Duration = Duration::from_secs(5);
/// How often the descendants of a process are looked for while they are ended.
const LOOK_MS: u16 = 5;

/// Where a service's processes are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Group {
    /// A cgroup of version 2: its folder.
    Cgroup(PathBuf),
    /// The descendants of whoever keeps it.
    Descendants,
}

impl Group {
    /// The group of the service whose data is in `folder`: always the same one for the same folder. Ends what an
    /// earlier process has left in it.
    ///
    /// # Errors
    /// When there is a cgroup that cannot be emptied.
    pub(super) fn prepare(folder: &Path) -> io::Result<Self> {
        let Some(parent) = own_cgroup() else { return Ok(Self::Descendants) };
        let about = fs::metadata(folder)?;
        let path = parent.join(format!("{PREFIX}{:x}-{:x}", about.dev(), about.ino()));
        match fs::create_dir(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            // Read-only in most containers, and not ours where the service manager has not delegated it.
            Err(_) => return Ok(Self::Descendants),
        }
        if !path.join("cgroup.kill").exists() {
            let _ = fs::remove_dir(&path);
            return Ok(Self::Descendants);
        }
        let group = Self::Cgroup(path);
        group.kill()?;
        Ok(group)
    }

    /// What ends all of a cgroup when a 1 is written to it.
    pub(super) fn kill_file(&self) -> io::Result<Option<OwnedFd>> {
        match self {
            Self::Cgroup(path) => Ok(Some(OpenOptions::new().write(true).open(path.join("cgroup.kill"))?.into())),
            Self::Descendants => Ok(None),
        }
    }

    /// Ends all processes and waits until they are gone, for [`DEATH`] at most. For descendants, those of this process.
    pub(super) fn kill(&self) -> io::Result<()> {
        let begin = Instant::now();
        match self {
            Self::Cgroup(path) => kill_cgroup(path, begin),
            Self::Descendants => kill_descendants(begin),
        }
    }

    /// Forgets the group when nothing is left in it.
    pub(super) fn remove(&self) {
        if let Self::Cgroup(path) = self {
            // Whoever is left keeps it, and the next start finds it.
            let _ = fs::remove_dir(path);
        }
    }
}

fn kill_cgroup(path: &Path, begin: Instant) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path.join("cgroup.kill"))?;
    loop {
        // The kernel tells of a change of this file by POLLPRI: it is opened before it is read.
        let events = File::open(path.join("cgroup.events"))?;
        if fs::read_to_string(path.join("cgroup.events"))?.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        file.write_all(b"1")?;
        if begin.elapsed() >= DEATH {
            return Err(still_there());
        }
        let mut changed = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        match poll(&mut changed, PollTimeout::from(20_u8)) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn still_there() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("processes of the service are still there {DEATH:?} after SIGKILL"))
}

/// One process as the kernel lists it.
struct Listed {
    parent: i32,
    dead: bool,
    /// In ticks since the start of the host: with the number, the name of a process.
    begun: u64,
}

fn listed(pid: i32) -> Option<Listed> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses, and may contain some itself.
    let (_, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let dead = matches!(fields.first(), Some(&("Z" | "X")));
    Some(Listed { parent: fields.get(1)?.parse().ok()?, dead, begun: fields.get(19)?.parse().ok()? })
}

/// All living descendants of a process.
pub(super) fn descendants(of: i32) -> io::Result<Vec<(i32, u64)>> {
    let mut all = HashMap::new();
    for entry in fs::read_dir("/proc")? {
        let pid = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        if let Some((pid, listed)) = pid.and_then(|pid| Some((pid, listed(pid)?))) {
            all.insert(pid, listed);
        }
    }
    let (mut found, mut next) = (Vec::new(), vec![of]);
    while let Some(parent) = next.pop() {
        for (pid, listed) in all.iter().filter(|(_, listed)| listed.parent == parent) {
            next.push(*pid);
            if !listed.dead {
                found.push((*pid, listed.begun));
            }
        }
    }
    Ok(found)
}

fn kill_descendants(begin: Instant) -> io::Result<()> {
    let own = i32::try_from(std::process::id()).unwrap_or(i32::MAX);
    loop {
        let found = descendants(own)?;
        if found.is_empty() {
            return Ok(());
        }
        if begin.elapsed() >= DEATH {
            return Err(still_there());
        }
        for (pid, begun) in found {
            kill_one(pid, begun);
        }
        let _ = poll(&mut [], PollTimeout::from(LOOK_MS));
    }
}

/// Its number may be another process's by now: the descriptor is taken first, and then it is looked at again.
fn kill_one(pid: i32, begun: u64) {
    let Some(raw) = Pid::from_raw(pid) else { return };
    let Ok(process) = pidfd_open(raw, PidfdFlags::empty()) else { return };
    if listed(pid).is_some_and(|listed| listed.begun == begun) {
        // An error says that it is gone.
        let _ = pidfd_send_signal(process, Signal::KILL);
    }
}

/// The folder of this process's own cgroup of version 2.
fn own_cgroup() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mount = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, place, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(place))
    })?;
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // Outside of what this process sees, it begins with "..".
    (!path.split('/').any(|part| part == "..")).then(|| mount.join(path))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn descendants_are_found_at_any_depth_and_nobody_else() {
        let mut child = Command::new("/bin/sh")
            .args(["-c", "sh -c 'sleep 300 & echo $!; wait' & wait"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
        let sleeper: i32 = line.trim().parse().unwrap();
        let id = i32::try_from(child.id()).unwrap();
        let found = descendants(id).unwrap();
        assert!(found.iter().any(|(pid, _)| *pid == sleeper) && found.len() == 2, "{found:?}");
        assert!(found.iter().all(|(pid, _)| *pid != id));
        // A number that has changed hands is left alone.
        let begun = found.iter().find(|(pid, _)| *pid == sleeper).unwrap().1;
        kill_one(sleeper, begun + 1);
        assert!(listed(sleeper).is_some_and(|listed| !listed.dead));
        for (pid, begun) in found {
            kill_one(pid, begun);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let gone = |pid| listed(pid).is_none_or(|listed| listed.dead);
        let begin = Instant::now();
        while !gone(sleeper) {
            assert!(begin.elapsed() < DEATH, "it lives");
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}
