//! `identity.json`: the member that this data folder belongs to. The node's certificate, with its key, and the
//! membership prove the same. Must never guess it from less.

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
/// Files that only a member has: if one of them is here without an identity, the identity was lost.
const REMAINS: [&str; 3] = [membership::FILE, "raft-log", "database"];

/// The identity of this data folder, rebuilt if it is damaged or missing; `None` if the folder does not belong to a
/// member yet.
///
/// # Errors
/// When nothing proves whose folder it is. Also when a newer program wrote the identity, or it cannot be read or
/// written now. The start has to end; the error is one line that says what to do.
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
        // Without any of these the folder is new.
        Err(DataDirError::NoIdentity { .. }) if !REMAINS.iter().any(|name| data.path().join(name).exists()) => Ok(None),
        Err(DataDirError::NoIdentity { .. }) => rebuild(data, &format!("{} is missing", path.display()), notes),
        Err(error @ DataDirError::Damaged { .. }) => rebuild(data, &error.to_string(), notes),
        Err(error) => Err(error.into()),
    }
}

/// True if certificate and membership agree on a member, and it is not the one that the identity names.
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
    info!(node = name, %cluster, "the identity of this data folder was rebuilt");
    notes.add(format!(
        "{what}: it was rebuilt from this host's certificate and the membership, which say that this host is {name}"
    ));
    Ok(Some(identity))
}
