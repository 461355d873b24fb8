//! What a service has is never left out: a member that lost a database of it fetches all of them, and a backup of any
//! member has them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use nix::sys::signal::Signal;
use twistlock_ha::{cluster::Role, storage::checkpoint::Record};

use super::{
    super::{
        backup::make,
        beside,
        cluster::{Cluster, FROZEN, LEASE_LOST},
        damage::MENDED,
    },
    FOLDER_LOST,
    folder::{MODES, ask, files, wait_for_answer},
    free_port,
};

/// What a node installs is logged so.
const INSTALLED: &str = "the snapshot has become this node's database";

/// Kills a member that is SECONDARY, does something to its data, and waits until it has fetched all databases.
fn lose(cluster: &Cluster, node: usize, what: &str, harm: impl FnOnce(PathBuf)) {
    let before = cluster.log(node).matches(INSTALLED).count();
    cluster.signal(node, Signal::SIGKILL);
    cluster.wait_for("the end of the process", |_| cluster.node(node).pid.is_none());
    harm(cluster.node(node).data.join("service"));
    cluster.wait_for(&format!("all databases again after {what}"), |statuses| {
        let secondary = statuses[node].as_ref().is_some_and(|status| status.role == Role::Secondary);
        secondary && cluster.log(node).matches(INSTALLED).count() > before
    });
}

fn wait_equal(cluster: &Cluster) {
    for mode in MODES {
        cluster.wait_for("the same file everywhere", |_| {
            let images: Vec<_> = files(cluster, mode).iter().map(|path| fs::read(path).unwrap_or_default()).collect();
            !images[0].is_empty() && images.iter().all(|image| *image == images[0])
        });
    }
}

/// The names in a backup, and that of its databases SQLite says "ok".
fn look_into(backup: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let done = Command::new("tar").arg("xzf").arg(backup).arg("-C").arg(folder.path()).status().unwrap();
    assert!(done.success());
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.path().join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["format"], 2, "{manifest}");
    for mode in MODES {
        let path = folder.path().join(format!("service/{mode}.db"));
        let program = "import sqlite3, sys; db = sqlite3.connect('file:%s?immutable=1' % sys.argv[1], uri=True); \
                       print(db.execute('SELECT count(*) FROM rows').fetchone()[0], *db.execute('PRAGMA integrity_check').fetchone())";
        let output = Command::new("python3").arg("-c").arg(program).arg(&path).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "30 ok", "{mode}: {output:?}");
    }
}

#[test]
fn a_member_that_lost_a_database_of_the_service_gets_all_of_them_and_backups_have_them() {
    let _beside = beside();
    let program = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/service/app.py");
    let inside = free_port();
    let cluster = Cluster::start_service(&format!("python3 {} {inside}", program.display()), inside);
    cluster.configure("CHECKPOINT_SECONDS", "1");
    cluster.restart_all();
    let port = cluster.service_port();
    let primary = wait_for_answer(port, |_| true).node;
    let write = |numbers: std::ops::RangeInclusive<u32>| {
        for mode in MODES {
            for number in numbers.clone() {
                let (code, text) = ask(primary, port, &format!("POST /{mode}/{number}")).unwrap();
                assert_eq!(code, 200, "{text}");
            }
        }
    };
    write(1..=10);
    let away = (primary + 1) % 3;
    // Before that it could make them anew of its raft log.
    let records = cluster.node(away).data.join("service/checkpoints");
    cluster.wait_for("checkpoints of the service's databases", |_| {
        [2, 3]
            .into_iter()
            .all(|id| Record::read(&records.join(id.to_string()), id).is_ok_and(|record| record.pages > 0))
    });
    lose(&cluster, away, "a database was removed", |service| fs::remove_file(service.join("files/delete.db")).unwrap());
    write(11..=20);
    lose(&cluster, away, "the catalogue was damaged", |service| {
        fs::write(service.join("catalogue.json"), "{").unwrap();
    });
    write(21..=30);
    cluster.wait_for("all entries everywhere", |statuses| {
        let applied: Vec<_> = statuses.iter().flatten().map(|status| status.applied).collect();
        applied.len() == 3 && applied.iter().all(|index| *index == applied[0])
    });
    for node in [primary, away] {
        look_into(&make(&cluster, node, "whole"));
    }
    // The application's own checkpoint, so that its file has everything.
    for mode in MODES {
        assert_eq!(ask(primary, port, &format!("GET /{mode}")).unwrap().0, 200);
    }
    wait_equal(&cluster);
    println!("{}", cluster.finish(&[LEASE_LOST, FOLDER_LOST, FROZEN, MENDED, &["the service has ended ("]].concat()));
}
