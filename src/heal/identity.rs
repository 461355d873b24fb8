//! `identity.json`: whose data folder this is. The node's certificate, which only the holder of its key can show, and
//! the membership say the same.

use std::path::Path;

use anyhow::{Context, Result};
use tracing::info;

use super::{Notes, aside::set_aside, lost};
use crate::{
    cluster::{ClusterId, Membership, NodeId},
    pki::NodeTls,
    storage::{
        DataDir, DataDirError, IDENTITY_FORMAT, Identity,
        membership::{self, StoredMembership},
    },
};

const FILE: &str = "identity.json";
/// What a folder has without an identity only if the identity was lost.
const REMAINS: [&str; 3] = [membership::FILE, "raft-log", "database"];

/// The identity of this data folder, made anew if it is damaged or gone; none if the folder belongs to no member yet.
///
/// # Errors
/// When nothing proves whose folder it is: one line that says what to do. Also when a newer program wrote the identity,
/// or it cannot be read or written now.
pub fn identity(data: &DataDir, notes: &mut Notes) -> Result<Option<Identity>> {
    let path = data.path().join(FILE);
    match data.identity() {
        Ok(found) if speaks_of_another(data.path(), &found) => rebuild(
            data,
            &format!("{} is of another member than the certificate and the membership", path.display()),
            notes,
        ),
        Ok(found) => {
            data.check_identity(&found)?;
            Ok(Some(found))
        }
        // Only a member has any of these.
        Err(DataDirError::NoIdentity { .. }) if !REMAINS.iter().any(|name| data.path().join(name).exists()) => Ok(None),
        Err(DataDirError::NoIdentity { .. }) => rebuild(data, &format!("{} is gone", path.display()), notes),
        Err(error @ DataDirError::Damaged { .. }) => rebuild(data, &error.to_string(), notes),
        Err(error) => Err(error.into()),
    }
}

/// True if certificate and membership agree on another member than the identity names.
fn speaks_of_another(data: &Path, found: &Identity) -> bool {
    let Some((proven, membership)) = proven(data) else { return false };
    let fits = membership.cluster == found.cluster
        && (membership.get(found.node).is_some() || membership.removed(found.node).is_some());
    proven != (found.cluster, found.node) && !fits
}

/// The member that this host's certificate names, if its key is here and the membership knows it.
fn proven(data: &Path) -> Option<((ClusterId, NodeId), Membership)> {
    let (cluster, node) = NodeTls::load(&data.join("certificates")).ok()?.identity;
    let known =
        StoredMembership::read(data).ok().flatten().or_else(|| StoredMembership::read_copy(data).ok().flatten());
    let StoredMembership { membership, .. } = known?;
    let knows = membership.cluster == cluster && membership.get(node).is_some();
    knows.then_some(((cluster, node), membership))
}

fn rebuild(data: &DataDir, what: &str, notes: &mut Notes) -> Result<Option<Identity>> {
    let ((cluster, node), membership) = proven(data.path()).ok_or_else(|| lost(data.path(), what, None))?;
    let name = membership.get(node).map(|member| member.name.clone()).unwrap_or_default();
    let identity = Identity { format: IDENTITY_FORMAT, cluster, node, name, membership };
    set_aside(data.path(), FILE).with_context(|| format!("{what}; move it away"))?;
    data.restore_identity(&identity)?;
    let name = &identity.name;
    info!(node = name, %cluster, "the identity of this data folder is made anew");
    notes.add(format!(
        "{what}: it was made anew from this host's certificate and the membership, which say that it is {name}"
    ));
    Ok(Some(identity))
}
