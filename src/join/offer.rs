//! What the join script says about the cluster to the program that it has fetched. Must never hold a secret other than
//! the token.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{JoinFile, files::read_json};
use crate::cluster::{ClusterId, NodeId};

/// Everything that a host needs to ask to join.
#[derive(Serialize, Deserialize)]
pub struct Offer {
    /// What the daemon asks with.
    pub join: JoinFile,
    pub cluster: ClusterId,
    /// The members when the script was made.
    pub members: Vec<NodeId>,
    /// The id that the next one gets.
    pub next_id: NodeId,
    /// When the script expires, in seconds since 1970.
    pub until: u64,
    /// Version of the program.
    pub version: String,
    /// The text of `twistlock.cfg`, as the members have it.
    pub config: String,
    /// Keys for which the PRIMARY has a value that is a secret.
    pub withheld: Vec<String>,
}

impl Offer {
    /// Reads the file that the join script has written.
    ///
    /// # Errors
    /// When the file is gone or damaged, or contradicts itself. The sentence names the file.
    pub fn read(path: &Path) -> Result<Self> {
        let offer: Self = read_json(path)?.with_context(|| format!("{} is gone", path.display()))?;
        offer.join.check().with_context(|| format!("{} cannot be used", path.display()))?;
        Ok(offer)
    }
}
