//! Small disks for the nodes: image files with ext4, mounted by a loop device. Must never leave one frozen.

use std::{
    fs::{self, File},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use nix::fcntl::FallocateFlags;

/// Bytes of each disk; its image takes what is in use.
const SIZE: u64 = 1 << 30;

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Mounts a new disk on `data` in the folder of a node.
pub fn mount(node: &Path) {
    let (data, image) = (node.join("data"), node.join("disk"));
    fs::create_dir_all(&data).unwrap();
    File::create_new(&image).and_then(|file| file.set_len(SIZE)).unwrap();
    let (data, image) = (data.to_str().expect("a plain path"), image.to_str().expect("a plain path"));
    run("mkfs.ext4", &["-q", "-F", "-m", "0", image]);
    run("mount", &["-o", "loop", image, data]);
    fs::remove_dir(Path::new(data).join("lost+found")).unwrap();
    fs::set_permissions(data, fs::Permissions::from_mode(0o700)).unwrap();
}

/// Takes the disk of a node away, at the end.
pub fn unmount(node: &Path) {
    let _ = Command::new("umount").arg("--lazy").arg(node.join("data")).status();
}

/// Takes all space of the disk on this folder; returns what takes it. Writes nothing: that would load the other disks too.
pub fn fill(data: &Path) -> PathBuf {
    let path = data.join("ballast");
    let file = File::create(&path).unwrap();
    let (mut at, mut length) = (0, SIZE as i64);
    while length >= 4096 {
        match nix::fcntl::fallocate(&file, FallocateFlags::empty(), at, length) {
            Ok(()) => at += length,
            Err(_) => length /= 2,
        }
    }
    path
}

/// A frozen file system; thawed when this is dropped, or when this process is gone.
pub struct Frozen(Child);

impl Frozen {
    pub fn freeze(data: &Path) -> Self {
        let script = r#"trap "" TERM INT; fsfreeze -f "$1" && echo frozen; read -r _; fsfreeze -u "$1""#;
        let mut command = Command::new("sh");
        command.args(["-c", script, "freeze"]).arg(data).stdin(Stdio::piped()).stdout(Stdio::piped());
        // Whoever interrupts the test must not interrupt this.
        let mut child = command.process_group(0).spawn().unwrap();
        let mut line = [0; 6];
        let said = std::io::Read::read_exact(child.stdout.as_mut().expect("it is piped"), &mut line);
        assert!(said.is_ok(), "fsfreeze does not freeze {}", data.display());
        Self(child)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}
