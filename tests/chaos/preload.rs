//! The shim that is preloaded into each daemon (preload.c), and the page by which it is told what to do. Must never leave a
//! wish behind that nobody takes back.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

/// Bytes of one daemon's wish on the page, and of the page.
const SLOT: u64 = 64;
const PAGE: u64 = 4096;
/// The clock's part of a wish, and that of the disk.
const CLOCK_AT: u64 = 0;
const DISK_AT: u64 = 8;

/// Operations and files, by bits.
pub const READ: u32 = 1;
pub const WRITE: u32 = 2;
pub const SYNC: u32 = 4;
pub const OPEN: u32 = 8;
pub const LOG: u32 = 1;
pub const DATABASE: u32 = 2;
pub const ALL_FILES: u32 = 7;

/// What a disk does.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk {
    /// Which operations are hit.
    pub operations: u32,
    /// The errno that they fail with; 0: none.
    pub error: u32,
    /// Milliseconds that each takes longer.
    pub hang: u32,
    pub files: u32,
}

/// The compiled shim and its page.
pub struct Preload {
    library: PathBuf,
    page_path: PathBuf,
    page: File,
    folder: PathBuf,
}

impl Preload {
    /// Compiles the shim into a folder that has the nodes' folders too.
    pub fn build(folder: &Path) -> Self {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/chaos/preload.c");
        let library = folder.join("preload.so");
        let mut compiler = Command::new("cc");
        compiler
            .args(["-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC", "-o"])
            .arg(&library)
            .args([source, "-ldl"]);
        let status = compiler.status().expect("a C compiler runs: install the package gcc");
        assert!(status.success(), "{source} cannot be compiled");
        let page_path = folder.join("preload.page");
        let page = OpenOptions::new().create_new(true).read(true).write(true).open(&page_path).unwrap();
        page.set_len(PAGE).unwrap();
        Self { library, page_path, page, folder: folder.to_owned() }
    }

    /// Has the daemon of a node started with the shim.
    pub fn apply(&self, command: &mut Command, node: usize) {
        let data = self.folder.join(format!("node{}", node + 1)).join("data");
        let slot = node.to_string();
        command.env("LD_PRELOAD", &self.library).env("CHAOS_PAGE", &self.page_path);
        command.env("CHAOS_DATA", data).env("CHAOS_SLOT", slot);
    }

    /// Sets the disk of a node; the default is a good one.
    pub fn set_disk(&self, node: usize, disk: Disk) {
        let Disk { operations, error, hang, files } = disk;
        let at = node as u64 * SLOT + DISK_AT;
        let words: Vec<u8> = [error, hang, files].into_iter().flat_map(u32::to_ne_bytes).collect();
        // Which operations are hit comes last: until then nothing is.
        self.page.write_all_at(&0u32.to_ne_bytes(), at).unwrap();
        self.page.write_all_at(&words, at + 4).unwrap();
        self.page.write_all_at(&operations.to_ne_bytes(), at).unwrap();
    }

    /// Sets a node's wall clock ahead by so many nanoseconds, or back.
    pub fn set_clock(&self, node: usize, ahead: i64) {
        self.page.write_all_at(&ahead.to_ne_bytes(), node as u64 * SLOT + CLOCK_AT).unwrap();
    }

    /// Takes all wishes back.
    pub fn clear(&self) {
        for node in 0..3 {
            self.set_disk(node, Disk::default());
            self.set_clock(node, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::process::ExitStatusExt, process::Output, time::Instant};

    /// Has dd write a byte and sync it, under a wish.
    fn write(preload: &Preload, path: &Path) -> Output {
        let mut command = Command::new("dd");
        command.arg(format!("of={}", path.display())).args(["if=/dev/zero", "bs=1", "count=1", "conv=fsync"]);
        preload.apply(&mut command, 1);
        command.output().unwrap()
    }

    /// Each wish does what it says to the files it names, and to no others.
    #[test]
    fn the_shim_harms_what_it_is_told_to() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("node2/data");
        fs::create_dir_all(data.join("raft-log")).unwrap();
        let preload = Preload::build(folder.path());
        let (log, other, outside) = (data.join("raft-log/1"), data.join("x"), folder.path().join("x"));
        for (operations, files, path, fails) in [
            (WRITE, ALL_FILES, &other, true),
            (SYNC, LOG, &log, true),
            (SYNC, LOG, &other, false),
            (OPEN, DATABASE, &log, false),
            (OPEN, LOG, &log, true),
            (WRITE | SYNC, ALL_FILES, &outside, false),
            (0, ALL_FILES, &log, false),
        ] {
            preload.set_disk(1, Disk { operations, error: nix::errno::Errno::EIO as u32, hang: 0, files });
            let output = write(&preload, path);
            assert!(output.status.signal().is_none());
            assert_eq!(!output.status.success(), fails, "{operations} {files} {}: {output:?}", path.display());
        }
        preload.set_disk(1, Disk { operations: SYNC, error: 0, hang: 300, files: ALL_FILES });
        let begin = Instant::now();
        assert!(write(&preload, &log).status.success());
        assert!(begin.elapsed().as_millis() >= 300);
    }

    #[test]
    fn the_shim_steps_the_wall_clock() {
        let folder = tempfile::tempdir().unwrap();
        let preload = Preload::build(folder.path());
        let year = |days: i64| {
            preload.set_clock(0, days * 86_400_000_000_000);
            let mut command = Command::new("date");
            preload.apply(&mut command, 0);
            let output = command.arg("+%s").output().unwrap();
            String::from_utf8(output.stdout).unwrap().trim().parse::<i64>().unwrap()
        };
        let now = year(0);
        assert!((year(400) - now - 400 * 86_400).abs() < 60);
        assert!((year(-400) - now + 400 * 86_400).abs() < 60);
    }
}
