//! The program of the next version, which takes long to build.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use super::beside;

/// Builds the daemon that is ahead, if it is not built yet. What both builds have in common is taken from where cargo keeps it
/// already.
pub fn next_program() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let next = target.join("next-version");
    // With a test among the targets cargo chooses the features of the dependencies as it does for this test, and need not
    // build them again.
    let targets = ["--bin", "twistlockd", "--test", "tidy"];
    // What cargo tells a test about its package makes build scripts of dependencies run again, and half of them be built anew.
    let of_this_package = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    // It may take its time: the clusters of other tests run meanwhile.
    let mut cargo = Command::new("nice");
    cargo.arg(env!("CARGO"));
    env::vars().filter(|(name, _)| of_this_package(name)).for_each(|(name, _)| {
        cargo.env_remove(name);
    });
    let status = cargo
        .args(["build", "--offline", "--locked", "--quiet", "--features", "next-version"])
        .args(targets)
        .arg("--target-dir")
        .arg(&next)
        .env("CARGO_BUILD_BUILD_DIR", target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(status.success(), "the next version cannot be built");
    next.join("debug/twistlockd")
}

/// Early, so that it is there when [`super::upgrade`] needs it: the clusters of other tests wait most of the time.
#[test]
fn the_next_version_can_be_built() {
    let _beside = beside();
    assert!(next_program().is_file());
}
