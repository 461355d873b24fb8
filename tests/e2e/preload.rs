//! The library that is preloaded into daemons (faults/preload.c), and the page by which it is told what to do to their files and
//! clocks. Must never leave a rule behind that nobody takes back.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
};

/// Bytes of the page, and where the rules begin: behind a clock for each slot.
const PAGE: usize = 4096;
const SLOTS: usize = 16;
const RULES_AT: usize = SLOTS * 8;

/// The compiled library and its page.
pub struct Preload {
    library: PathBuf,
    page_path: PathBuf,
    page: File,
    /// Of each slot.
    rules: Mutex<[String; SLOTS]>,
}

/// Compiles a program of tests/e2e/faults with the C compiler that Rust links with.
pub fn compile(folder: &Path, source: &str, arguments: &[&str]) -> PathBuf {
    let out = folder.join(source.replace(".c", ".bin"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/faults").join(source);
    let mut compiler = Command::new("cc");
    compiler.args(["-Wall", "-Wextra", "-Werror", "-O2", "-o"]).args([&out, &source]).args(arguments);
    let status = compiler.status().expect("a C compiler runs");
    assert!(status.success(), "{} cannot be compiled", source.display());
    out
}

impl Preload {
    /// Compiles the library into a folder, and makes the page beside it.
    pub fn build(folder: &Path) -> Self {
        let library = compile(folder, "preload.c", &["-shared", "-fPIC", "-ldl"]);
        let page_path = folder.join("preload.page");
        let page = OpenOptions::new().create_new(true).read(true).write(true).open(&page_path).unwrap();
        page.set_len(PAGE as u64).unwrap();
        Self { library, page_path, page, rules: Mutex::default() }
    }

    /// What a daemon must have in its environment.
    pub fn environment(&self) -> [(&str, &Path); 2] {
        [("LD_PRELOAD", &self.library), ("TEST_FAULTS_PAGE", &self.page_path)]
    }

    /// Has a daemon started with the library and with the clock of a slot of its own.
    pub fn apply(&self, command: &mut Command, slot: usize) {
        command.envs(self.environment()).env("TEST_FAULTS_SLOT", slot.to_string());
    }

    /// Sets the rules of a slot, which are for all daemons, after those of the slots before it; "": none.
    pub fn set(&self, slot: usize, rules: &str) {
        let mut all = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        rules.clone_into(&mut all[slot]);
        let mut text = format!("0{}", all.concat()).into_bytes();
        assert!(text.len() < PAGE - RULES_AT, "too many rules");
        let force = if text.len() > 1 { b"1" } else { b"0" };
        text.resize(PAGE - RULES_AT, b'\n');
        // They are in force when all of them are there.
        for (bytes, at) in [(&b"0"[..], RULES_AT), (&text, RULES_AT), (force, RULES_AT)] {
            self.page.write_all_at(bytes, at as u64).unwrap();
        }
    }

    /// Sets the wall clock of a slot ahead by so many nanoseconds, or back.
    pub fn set_clock(&self, slot: usize, ahead: i64) {
        self.page.write_all_at(&ahead.to_ne_bytes(), slot as u64 * 8).unwrap();
    }

    /// Takes everything back.
    pub fn clear(&self) {
        for slot in 0..SLOTS {
            self.set(slot, "");
            self.set_clock(slot, 0);
        }
    }
}

/// Whatever happens, nothing hangs for ever.
impl Drop for Preload {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::process::ExitStatusExt, process::Output, time::Instant};

    /// Has dd write a byte and sync it.
    fn write(preload: &Preload, path: &Path) -> Output {
        let mut command = Command::new("dd");
        command.arg(format!("of={}", path.display())).args(["if=/dev/zero", "bs=1", "count=1", "conv=fsync"]);
        preload.apply(&mut command, 1);
        command.output().unwrap()
    }

    /// Each rule does what it says to the files it names, and to no others.
    #[test]
    fn files_are_harmed_as_the_rules_say() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("node2/data");
        fs::create_dir_all(data.join("raft-log")).unwrap();
        let preload = Preload::build(folder.path());
        let (log, other, outside) = (data.join("raft-log/1"), data.join("x"), folder.path().join("x"));
        for (rules, path, fails) in [
            ("w /node2/data/ eio", &other, true),
            ("s /node2/data/raft-log/ eio", &log, true),
            ("s /node2/data/raft-log/ eio", &other, false),
            ("o /node2/data/database/ eio", &log, false),
            ("o /node2/data/raft-log/ eio", &log, true),
            ("w raft-log$ eio", &log, false),
            ("w raft-log/1$ eio", &log, true),
            ("r /node2/ eio\nws /node2/ eio", &log, true),
            ("ws /node2/data/ eio", &outside, false),
            ("", &log, false),
        ] {
            preload.set(1, rules);
            let output = write(&preload, path);
            assert!(output.status.signal().is_none());
            assert_eq!(!output.status.success(), fails, "{rules} {}: {output:?}", path.display());
        }
        preload.set(1, "s /node2/ delay:300");
        let begin = Instant::now();
        assert!(write(&preload, &log).status.success());
        assert!(begin.elapsed().as_millis() >= 300);
    }

    #[test]
    fn the_wall_clock_is_set() {
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
