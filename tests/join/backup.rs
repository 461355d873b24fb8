//! Everything is lost but one backup: a new cluster is founded, gets it, and other hosts join.

use std::fs;

use serde_json::json;
use twistlock_ha::{
    backup::{BackupState, Outcome, Started},
    control::Call,
};

use super::{
    host::{Founder, Host, wait_until},
    site::Site,
};

fn outcome(host: &Host, started: &Started) -> Outcome {
    let mut last = None;
    wait_until("it is over", || {
        let state: BackupState = host.operate(Call::get("settings/backup")).unwrap();
        last = state.last.filter(|last| last.number == started.number);
        last.is_some()
    });
    last.expect("it was there")
}

#[test]
fn after_the_loss_of_all_data_folders_a_backup_brings_everything_back() {
    let mut site = Site::complete();
    for number in 0..50 {
        site.founder.post("/tags", json!({"name": format!("kept{number}"), "color": "#112233"}), 200);
    }
    let before = site.wait_whole();
    let host = site.host(1);
    let started: Started = host.operate(Call::post("backups?wait=false").with("last")).unwrap();
    let made = outcome(host, &started);
    assert!(made.ok, "{}", made.text);
    let state: BackupState = host.operate(Call::get("settings/backup")).unwrap();
    let safe = tempfile::tempdir().unwrap();
    let file = safe.path().join(&made.id);
    fs::copy(std::path::Path::new(&state.folder).join(&made.id), &file).unwrap();
    site.founder.post("/tags", json!({"name": "too-late", "color": "#112233"}), 200);
    for index in 0..3 {
        site.host(index).wipe();
    }
    drop(site);

    let founder = Founder::start();
    founder.post("/tags", json!({"name": "of the new cluster", "color": "#112233"}), 200);
    let started = founder
        .host
        .operate(Call::post("restore").with(json!({ "file": file, "stopConsole": true, "unencrypted": false })))
        .unwrap();
    let done = outcome(&founder.host, &started);
    assert!(done.ok, "{}", done.text);
    assert_eq!(founder.host.tags(), before);
    let mut site = Site::complete_of(founder);
    assert_eq!(site.wait_whole(), before, "on all three");
    // What was restored goes on as any other state does.
    site.founder.post("/tags", json!({"name": "afterwards", "color": "#112233"}), 200);
    assert_eq!(site.wait_whole().len(), before.len() + 1);
    println!("  {} tags are back on three new hosts: {} ms for the restore", before.len(), done.ms);
    for index in 0..3 {
        site.host(index).kill();
    }
}
