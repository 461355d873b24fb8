//! Serves a folder as a PRIMARY does, and has `scripts/bench/folder.py` compare SQLite in it with SQLite in a folder beside it, on the
//! same disk. A commit waits until three files on that disk have it, which stand for the raft logs of three members: what the disks and
//! the folder cost, without the network. Must never answer before all three are synced. Needs root and /dev/fuse.

use std::{
    fs::File,
    io::{self, Write},
    process::Command,
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use twistlock_ha::storage::{
    ReplicateError, Replicator,
    folder::{Folder, FolderConfig, members::Members},
};

type Part = Arc<Vec<u8>>;

/// Three raft logs: that of this host, and those of two others.
struct Logs {
    own: Mutex<(File, u64)>,
    others: Vec<(SyncSender<(Part, bool)>, Mutex<Receiver<io::Result<()>>>)>,
}

fn append(file: &mut File, part: &[u8], sync: bool) -> io::Result<()> {
    file.write_all(part)?;
    if sync { file.sync_data() } else { Ok(()) }
}

impl Logs {
    fn new(mut file: impl FnMut(usize) -> io::Result<File>) -> io::Result<Self> {
        let mut others = Vec::new();
        for number in 1..3 {
            let mut file = file(number)?;
            let (parts, wanted) = sync_channel::<(Part, bool)>(8);
            let (done, answers) = sync_channel(8);
            thread::spawn(move || {
                while let Ok((part, last)) = wanted.recv() {
                    let result = append(&mut file, &part, last);
                    if last && done.send(result).is_err() {
                        return;
                    }
                }
            });
            others.push((parts, Mutex::new(answers)));
        }
        Ok(Self { own: Mutex::new((file(0)?, 0)), others })
    }
}

impl Replicator for Logs {
    fn replicate(&self, part: Vec<u8>, last: bool) -> Result<u64, ReplicateError> {
        let gone = |_| ReplicateError::Unknown("a log has ended".into());
        let failed = |error: io::Error| ReplicateError::Unknown(error.to_string());
        let mut own = self.own.lock().expect("no panic");
        let part = Arc::new(part);
        for (parts, _) in &self.others {
            parts.send((Arc::clone(&part), last)).map_err(|_| gone(()))?;
        }
        append(&mut own.0, &part, last).map_err(failed)?;
        own.1 += 1;
        for (_, answers) in self.others.iter().filter(|_| last) {
            answers.lock().expect("no panic").recv().map_err(|_| gone(()))?.map_err(failed)?;
        }
        Ok(own.1)
    }
}

fn main() -> Result<()> {
    let base = std::env::var("BENCH_DIR").unwrap_or_else(|_| "target".into());
    let root = tempfile::Builder::new().prefix("bench-folder-").tempdir_in(base)?;
    for name in ["native", "mount"] {
        std::fs::create_dir(root.path().join(name))?;
    }
    let logs = Logs::new(|number| File::create(root.path().join(format!("log{number}"))))?;
    let mut members = Members::open(&root.path().join("service"), 0)?;
    let registry = members.promote(1, Arc::new(logs))?;
    let config = FolderConfig { backing: members.files(), mount: root.path().join("mount") };
    let folder = Folder::mount(&config, Some(registry))?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/bench/folder.py");
    let folders = [root.path().join("native"), root.path().join("mount")];
    let status = Command::new("python3").arg(script).args(folders).status()?;
    folder.unmount(Instant::now() + Duration::from_secs(5))?;
    ensure!(status.success(), "{script} failed");
    Ok(())
}
