//! What the tests of a served folder share: a mount in a folder of its own, and other processes that use it.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::unistd::geteuid;
use tempfile::TempDir;
use twistlock_ha::storage::folder::{Folder, FolderConfig};

/// How long an end may take.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// A folder and where it is served.
pub struct Stage {
    pub root: TempDir,
    /// None while it is not served.
    pub folder: Option<Folder>,
}

impl Stage {
    pub fn new() -> Self {
        assert!(
            geteuid().is_root() && Path::new("/dev/fuse").exists(),
            "this test mounts a folder: run it as root where /dev/fuse is"
        );
        let root = tempfile::tempdir().unwrap();
        for name in ["backing", "mount"] {
            std::fs::create_dir(root.path().join(name)).unwrap();
        }
        let mut stage = Self { root, folder: None };
        stage.mount();
        stage
    }

    pub fn mount(&mut self) {
        self.folder =
            Some(Folder::mount(&FolderConfig { backing: self.below(""), mount: self.path("") }, None).unwrap());
    }

    pub fn unmount(&mut self) {
        self.folder.take().unwrap().unmount(Instant::now() + PATIENCE).unwrap();
    }

    /// A file as the service finds it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("mount").join(name)
    }

    /// The same file in the folder below.
    pub fn below(&self, name: &str) -> PathBuf {
        self.root.path().join("backing").join(name)
    }
}

/// Runs a Python program in another process, and returns what it prints. Its arguments are paths.
pub fn python(program: &str, arguments: &[&Path]) -> String {
    let output = Command::new("python3").arg("-c").arg(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Starts a Python program that reads from its standard input when it may go on.
pub fn start_python(program: &str, arguments: &[&Path]) -> std::process::Child {
    let mut command = Command::new("python3");
    command.arg("-c").arg(program).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}
