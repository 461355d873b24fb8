//! What a node is at the moment.

use std::fmt;

use serde::{Deserialize, Serialize};

/// State of a member as people see it: the same words in UI, CLI, API and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Role {
    /// Asked to join; waits for the administrator.
    RequestJoin,
    /// Starting: reads its raft log, neither votes nor campaigns yet.
    Startup,
    /// Initial sync; no vote yet.
    Startup2,
    /// Its database is being brought back to a known state.
    Recovering,
    /// Replicates; its Console ports are closed.
    Secondary,
    /// Runs the workload; its Console ports are open while the lease is valid.
    Primary,
    /// Discards an unacknowledged tail.
    Rollback,
    /// Unreachable, as seen from another member.
    Down,
    /// Not heard of yet.
    Unknown,
    /// No longer a member.
    Removed,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Role::RequestJoin => "REQUEST_JOIN",
            Role::Startup => "STARTUP",
            Role::Startup2 => "STARTUP2",
            Role::Recovering => "RECOVERING",
            Role::Secondary => "SECONDARY",
            Role::Primary => "PRIMARY",
            Role::Rollback => "ROLLBACK",
            Role::Down => "DOWN",
            Role::Unknown => "UNKNOWN",
            Role::Removed => "REMOVED",
        })
    }
}
