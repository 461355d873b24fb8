//! Builds the data of the new cluster in a staging folder, beside the old data. Must never write anywhere else: until
//! the switch, the old node can be started as if nothing had happened.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use indicatif::{ProgressBar, ProgressStyle};
use raft::eraftpb::{ConfState, EntryType};

use super::{
    RecoverError,
    survivor::{CHECKPOINT, DATABASE, Survivor, log_options, staging},
    switch::{Plan, discard},
};
use crate::{
    cluster::{
        ClusterId, Member, Membership, NodeId, shared::authority::SealedAuthority,
        shared::console_certificate::CustomCertificate,
    },
    config::Config,
    found,
    pki::{self, Authority, ClusterKey, ClusterKeys, Pair, PkiError},
    storage::{
        IDENTITY_FORMAT, Identity,
        database::{ApplyError, Database},
        databases::Databases,
        durable_write, fsync_dir, make_private_dir,
        membership::StoredMembership,
        raft_log::{RaftLog, RealDisk},
        transaction::CONSOLE_DATABASE,
    },
};

/// The survivor's node id in its new cluster.
const NODE: NodeId = 1;
/// Bytes copied at a time.
const COPY: usize = 1 << 20;

/// Makes everything, durably. Returns with the plan what the administrator should know of it.
///
/// # Errors
/// [`RecoverError`]; the old data is untouched, and the staging folder is gone.
pub(super) fn build(survivor: &Survivor, config: &Config) -> Result<(Plan, Vec<String>), RecoverError> {
    survivor.check_space()?;
    let built = fill(survivor, config, &staging(&survivor.data));
    if built.is_err()
        && let Err(error) = discard(&survivor.data)
    {
        // What failed first is what the administrator has to know; the next start tries again to remove it.
        eprintln!("twistlockd recover: {error}");
    }
    built
}

fn fill(survivor: &Survivor, config: &Config, staging: &Path) -> Result<(Plan, Vec<String>), RecoverError> {
    make_private_dir(staging).map_err(RecoverError::io(format!("create {}", staging.display())))?;
    let index = build_database(survivor, staging)?;
    let cluster = ClusterId(rand::random());
    let term = survivor.log.hard_state().term + 1;
    let owner = (cluster, NODE);
    let conf = ConfState { voters: vec![NODE], ..ConfState::default() };
    let make_log = || {
        let log = RaftLog::open(&staging.join("raft-log"), owner, conf.clone(), log_options(config), RealDisk)?;
        log.reset(index, term, conf.clone())
    };
    make_log()
        .map_err(|error| RecoverError::Io { what: "make the raft log".into(), error: io::Error::other(error) })?;
    let notes = build_identity(survivor, config, staging, cluster, index)?;
    sync_all(staging).map_err(RecoverError::io(format!("sync {}", staging.display())))?;
    Ok((Plan::new(), notes))
}

/// A copy of the database with everything that the raft log has, including the end that is not known to be committed.
/// Returns the index up to which it has everything.
fn build_database(survivor: &Survivor, staging: &Path) -> Result<u64, RecoverError> {
    let (from, to) = (survivor.data.join("database"), staging.join("database"));
    make_private_dir(&to).map_err(RecoverError::io(format!("create {}", to.display())))?;
    if survivor.checkpoint.index > 0 {
        let bar = progress("copying the database", survivor.database_bytes, true);
        copy(&from.join(DATABASE), &to.join(DATABASE), &bar).map_err(RecoverError::io("copy the database"))?;
        fs::copy(from.join(CHECKPOINT), to.join(CHECKPOINT)).map_err(RecoverError::io("copy the checkpoint record"))?;
        bar.finish();
    }
    let unusable = |what: String| RecoverError::Unusable(format!("this node's database cannot be used: {what}"));
    let last = survivor.log.last_index();
    let database = Database::open(&to, CONSOLE_DATABASE, last).map_err(|error| unusable(error.to_string()))?;
    let mut databases = Databases::of_console(database);
    let first = (databases.applied() + 1).max(survivor.log.first_index());
    let bar = progress("applying the raft log", (last + 1).saturating_sub(first), false);
    let mut failed = None;
    let result = survivor.log.entries_between(first, last, &mut |entry| {
        bar.inc(1);
        let applied = if entry.get_entry_type() == EntryType::EntryNormal && !entry.data.is_empty() {
            databases.apply(entry.index, entry.term, &entry.data, &survivor.log)
        } else {
            databases.apply_empty(entry.index, entry.term)
        };
        applied.map_err(|error: ApplyError| {
            failed = Some(error);
            io::Error::other("see the error that was kept")
        })
    });
    match (failed, result) {
        (None, Ok(())) => {}
        (Some(error), _) => return Err(unusable(error.to_string())),
        (None, Err(error)) => return Err(RecoverError::io("read the raft log")(error)),
    }
    bar.finish();
    let database = databases.console_mut();
    if database.is_empty() {
        return Err(unusable("it is empty".to_owned()));
    }
    database.verify().map_err(|error| unusable(error.to_string()))?;
    // In the middle of a transaction whose end never came, that is the beginning of the transaction.
    let reached = database.checkpoint().map_err(|error| unusable(error.to_string()))?;
    Ok(reached.index)
}

/// A bar on a terminal; nothing elsewhere.
fn progress(what: &'static str, length: u64, bytes: bool) -> ProgressBar {
    let units = if bytes { "{bytes}/{total_bytes}" } else { "{pos}/{len} entries" };
    let style = ProgressStyle::with_template(&format!("{{msg:24}} [{{bar:40}}] {units} {{eta}}"));
    let bar = ProgressBar::new(length).with_message(what);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn copy(from: &Path, to: &Path, bar: &ProgressBar) -> io::Result<()> {
    let mut from = File::open(from)?;
    let mut to = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    let mut buffer = vec![0; COPY];
    loop {
        match from.read(&mut buffer)? {
            0 => return to.sync_all(),
            length => {
                to.write_all(&buffer[..length])?;
                bar.inc(length as u64);
            }
        }
    }
}

/// Identity, membership, authority and certificates of the new cluster. What an administrator has set for the old one
/// stays.
fn build_identity(
    survivor: &Survivor,
    config: &Config,
    staging: &Path,
    cluster: ClusterId,
    index: u64,
) -> Result<Vec<String>, RecoverError> {
    let old = survivor.member();
    let name = old.map_or(&survivor.identity.name, |member| &member.name).clone();
    let address = old.map_or_else(|| config.common_name(), |member| member.address.clone());
    let port = old.map_or(config.high_availability_port.unwrap_or(8086), |member| member.port);
    let certificates = staging.join("certificates");
    make_private_dir(&certificates).map_err(RecoverError::io("create the folder of the certificates"))?;
    let list = &survivor.membership.shared.console_names;
    let make_certificates = || -> Result<SealedAuthority, PkiError> {
        let (authority, sealed) = Authority::establish(cluster, &certificates)?;
        authority.issue_node(NODE, &name, &[&address])?.save_node(&certificates)?;
        let names = found::console_names(config, &address);
        let new = list.iter().filter(|name| !names.contains(name) && !pki::is_reserved(name));
        let names: Vec<&str> = names.iter().chain(new).map(String::as_str).collect();
        authority.issue_console(&names)?.save_console(&certificates)?;
        Ok(sealed)
    };
    let sealed = make_certificates()
        .map_err(|error| RecoverError::Io { what: "make the certificates".into(), error: io::Error::other(error) })?;
    let mut membership = Membership::founded(cluster, vec![Member::founder(NODE, &name, &address, port)]);
    membership.shared.authority = Some(sealed);
    membership.shared.console_names.clone_from(list);
    membership.shared.webhooks.clone_from(&survivor.membership.shared.webhooks);
    let (given, notes) = given_certificate(survivor, cluster, &certificates);
    membership.shared.custom_certificate = given;
    let written = RecoverError::io("write the identity");
    let identity = Identity { format: IDENTITY_FORMAT, cluster, node: NODE, name, membership: membership.clone() };
    let write = || {
        StoredMembership { index, membership }.write(staging)?;
        durable_write(&staging.join("raft-log.created"), b"")?;
        durable_write(&staging.join("identity.json"), &serde_json::to_vec_pretty(&identity)?)
    };
    write().map_err(written)?;
    Ok(notes)
}

/// The certificate that the old cluster's Consoles were given, sealed for the new one; or why it is not there.
fn given_certificate(
    survivor: &Survivor,
    cluster: ClusterId,
    certificates: &Path,
) -> (Option<CustomCertificate>, Vec<String>) {
    let Some(given) = &survivor.membership.shared.custom_certificate else { return (None, Vec::new()) };
    let carry = || -> Result<CustomCertificate, PkiError> {
        let keys = ClusterKeys::load(&survivor.data.join("certificates"))?;
        let old = keys.find(given.key).ok_or(PkiError::Sealed("this node does not have the cluster key"))?;
        let pair = Pair::unseal(survivor.membership.cluster, given, old)?;
        pair.seal(&ClusterKey::load(certificates)?, cluster, &given.by, given.at)
    };
    match carry() {
        Ok(certificate) => {
            let note = "The certificate that was given to the Consoles is served again. The hosts that are given up have its \
                        private key: if they may be in other hands, have it revoked and give another one.";
            (Some(certificate), vec![note.to_owned()])
        }
        Err(error) => {
            let note = format!(
                "The certificate that was given to the Consoles could not be taken over: {error}. The Console serves one of the \
                 new cluster's own authority. Next, when the node runs: twistcli certs upload"
            );
            (None, vec![note])
        }
    }
}

/// Makes a folder and everything in it durable.
fn sync_all(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_all(&entry.path())?;
        } else {
            File::open(entry.path())?.sync_all()?;
        }
    }
    fsync_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::DataDir;

    /// A node of cluster 7 that has nothing yet.
    fn survivor(folder: &Path) -> (Survivor, Config, DataDir, Identity) {
        let data = DataDir::open(folder).unwrap();
        let config = Config { raft_log_segment_bytes: 1 << 20, ..Config::default() };
        let cluster = ClusterId(7);
        let membership = Membership::founded(cluster, vec![Member::founder(NODE, "node1", "127.0.0.1", 8086)]);
        let identity = Identity { format: IDENTITY_FORMAT, cluster, node: NODE, name: "node1".into(), membership };
        data.create_identity(&identity).unwrap();
        let conf = ConfState { voters: vec![NODE], ..ConfState::default() };
        let log = RaftLog::open(&folder.join("raft-log"), (cluster, NODE), conf, log_options(&config), RealDisk);
        drop(log.unwrap());
        (Survivor::examine(&data, &config).unwrap(), config, data, identity)
    }

    #[test]
    fn to_look_at_a_member_without_a_raft_log_creates_none() {
        let folder = tempfile::tempdir().unwrap();
        let (_, config, data, _) = survivor(folder.path());
        let log = folder.path().join("raft-log");
        fs::remove_dir_all(&log).unwrap();
        fs::create_dir(&log).unwrap();
        let error = Survivor::examine(&data, &config).err().unwrap().to_string();
        assert!(error.contains("is gone"), "{error}");
        assert_eq!(fs::read_dir(&log).unwrap().count(), 0);
    }

    #[test]
    fn a_given_certificate_is_sealed_for_the_new_cluster_or_it_is_said() {
        let (folder, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mut survivor, ..) = survivor(folder.path());
        let cluster = ClusterId(9);
        assert_eq!(given_certificate(&survivor, cluster, new.path()), (None, Vec::new()), "there is none");
        let issued = Authority::create(ClusterId(8)).unwrap().issue_console(&["lb.example"]).unwrap();
        let pair = Pair::parse(&issued.cert_pem, &issued.key_pem).unwrap();
        let old = ClusterKey::generate();
        ClusterKey::generate().save(new.path()).unwrap();
        survivor.membership.shared.custom_certificate = Some(pair.seal(&old, ClusterId(7), "ann", 5).unwrap());
        let (given, notes) = given_certificate(&survivor, cluster, new.path());
        assert!(given.is_none() && notes[0].contains("does not have the cluster key"), "{notes:?}");
        assert!(notes[0].contains("twistcli certs upload"), "{notes:?}");
        let certificates = folder.path().join("certificates");
        make_private_dir(&certificates).unwrap();
        old.save(&certificates).unwrap();
        let (given, notes) = given_certificate(&survivor, cluster, new.path());
        let given = given.unwrap();
        assert!(Pair::unseal(cluster, &given, &ClusterKey::load(new.path()).unwrap()).unwrap().is_same(&pair));
        assert_eq!((given.by.as_str(), given.at), ("ann", 5));
        assert!(notes[0].contains("have its private key"), "{notes:?}");
    }

    /// The disk may be full: whatever is left would take the space of the next attempt.
    #[test]
    fn an_attempt_that_fails_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (survivor, config, data, identity) = survivor(folder.path());
        // It has no database, which is known only once one was made from its raft log.
        assert!(matches!(build(&survivor, &config), Err(RecoverError::Unusable(what)) if what.contains("it is empty")));
        assert!(!staging(folder.path()).exists());
        assert_eq!(data.identity().unwrap(), identity);
    }
}
