//! A primary with transactions that nobody else has comes back: they are dropped, kept in a file, and shown.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::sys::signal::Signal;
use twistlock_ha::{
    cluster::Role,
    storage::{tail, transaction::Pages},
};

use super::{
    alone,
    cluster::{Cluster, FROZEN, LEASE_LOST, ROLLED_BACK},
    writers::Pen,
};

/// The primary writes while the others are frozen; what they have of it in their sockets dies with them. They start again
/// and go on without it. `back` brings the former primary back.
fn drop_a_tail(cluster: &Cluster, pen: &Pen, round: usize, back: Signal) {
    let old = cluster.primary();
    let others = [(old + 1) % 3, (old + 2) % 3];
    let [lost, before, after] = ["lost", "before", "after"].map(|when| format!("{when}-{round}"));
    assert!(pen.write(old, &before));
    others.iter().for_each(|node| cluster.freeze(*node));
    let unknown = |cluster: &Cluster| cluster.log(old).matches("is decided by the next primary").count();
    let known = unknown(cluster);
    assert!(!pen.write(old, &lost), "a write that one node has was acknowledged");
    cluster.wait_for("a transaction whose outcome is unknown", |_| unknown(cluster) > known);
    cluster.freeze(old);
    others.iter().for_each(|node| cluster.signal(*node, Signal::SIGKILL));
    cluster.wait_for("another primary", |statuses| {
        let serves = |node: &usize| statuses[*node].as_ref().is_some_and(|status| status.role == Role::Primary);
        others.iter().any(serves)
    });
    let new = cluster.primary();
    assert!(pen.write(new, &after));
    let rollbacks = |cluster: &Cluster| cluster.log(old).matches(ROLLED_BACK).count();
    let rolled_back = rollbacks(cluster);
    cluster.signal(old, back);
    cluster.wait_for("a rollback", |_| rollbacks(cluster) > rolled_back);
    cluster.wait_healthy();
    assert!(pen.has(&before) && pen.has(&after) && !pen.has(&lost));
    let kept = tails(cluster, old);
    assert!(kept.iter().any(|path| holds(path, &lost)), "{lost} is in none of {kept:?}");
    assert!(!kept.iter().any(|path| holds(path, &after)), "{after} was not dropped");
    let told = kept
        .iter()
        .any(|path| fs::read_to_string(path.with_extension("txt")).unwrap().contains(&format!("\"{lost}\"")));
    assert!(told, "no summary names the row of {lost}");
    let notes = cluster.status(old).warnings;
    assert!(notes.iter().any(|note| note.contains(".txt")), "{notes:?}");
}

fn tails(cluster: &Cluster, node: usize) -> Vec<PathBuf> {
    let folder = cluster.node(node).data.join(tail::FOLDER);
    let paths = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|kind| kind == "tail")).collect()
}

/// True if a page image in the file shows the text.
fn holds(path: &Path, text: &str) -> bool {
    let (_, entries) = tail::read(path).unwrap();
    entries.iter().filter(|entry| !entry.data.is_empty()).any(|entry| {
        let pages = Pages::decode(&entry.data).unwrap();
        pages.iter().any(|(_, image)| image.windows(text.len()).any(|window| window == text.as_bytes()))
    })
}

#[test]
fn timed_a_tail_that_nobody_else_has_is_dropped_and_kept() {
    let _alone = alone();
    let cluster = Cluster::start();
    let pen = Pen::new(&cluster.file());
    drop_a_tail(&cluster, &pen, 1, Signal::SIGKILL);
    drop_a_tail(&cluster, &pen, 2, Signal::SIGCONT);
    println!("rollback: {}", cluster.finish(&[LEASE_LOST, FROZEN].concat()));
}
