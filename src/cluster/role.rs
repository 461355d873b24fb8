//! What a node is at the moment.

use std::fmt;

use serde::{Deserialize, Serialize};

/// State of a member as people see it: the same words in UI, CLI, API and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Role {
    /// Belongs to nobody yet: waits to become the seed of a pool, or to be added to one.
    Waiting,
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
    /// No longer a member.
    Removed,
    /// Not heard of yet; or in a state that only a newer program has a word for.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Role::Waiting => "WAITING",
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

/// Where a member stands on its way to the primary's role and back. Finer than [`Role`]: people see the role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Neither votes nor campaigns: an earlier process of this node may have promised its vote.
    Startup,
    Secondary,
    /// Won the election; takes over the database. Ports are closed.
    Promoting,
    Primary,
    /// Gave the role up; closes ports, workload and database. Neither votes nor campaigns, so that no other node can
    /// open its ports before these are closed.
    Demoting,
}

impl Phase {
    /// The word that people see. A demoting node re-applies what the cluster agreed on.
    pub fn role(self) -> Role {
        match self {
            Phase::Startup => Role::Startup,
            Phase::Secondary | Phase::Promoting => Role::Secondary,
            Phase::Primary => Role::Primary,
            Phase::Demoting => Role::Recovering,
        }
    }
}

/// Why a phase ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    QuietPeriodOver,
    ElectionWon,
    DatabaseOpened,
    LeaseLapsed,
    LeadershipLost,
    Handover,
    /// A transaction was proposed and its outcome cannot be known here.
    OutcomeUnknown,
    /// The database could not be opened, or failed while in use.
    DatabaseFailed,
    /// The disk of this host fails, or does not answer.
    DiskFailed,
    DatabaseClosed,
    /// The cluster relies on what this program does not have, or a newer one was primary of the pool.
    Outdated,
}

/// One permitted change of phase with the sentence that is logged for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    pub from: Phase,
    pub cause: Cause,
    pub to: Phase,
    pub sentence: &'static str,
}

const fn edge(from: Phase, cause: Cause, to: Phase, sentence: &'static str) -> Transition {
    Transition { from, cause, to, sentence }
}

/// All permitted changes. What is not here cannot happen: asking for it is a bug and panics.
#[rustfmt::skip]
pub const TRANSITIONS: &[Transition] = &[
    edge(Phase::Startup, Cause::QuietPeriodOver, Phase::Secondary,
        "may vote again: a promise that this node gave before it started has expired"),
    edge(Phase::Secondary, Cause::ElectionWon, Phase::Promoting,
        "won the election: takes over the database before it opens its ports"),
    edge(Phase::Promoting, Cause::DatabaseOpened, Phase::Primary,
        "is primary: a majority confirmed the epoch and the database has every acknowledged transaction"),
    edge(Phase::Promoting, Cause::LeaseLapsed, Phase::Demoting,
        "gives up before its ports were open: no majority answered within the lease"),
    edge(Phase::Promoting, Cause::LeadershipLost, Phase::Demoting,
        "gives up before its ports were open: another node is being elected"),
    edge(Phase::Promoting, Cause::DatabaseFailed, Phase::Demoting,
        "gives up before its ports were open: the database cannot be opened here"),
    edge(Phase::Promoting, Cause::DiskFailed, Phase::Demoting,
        "gives up before its ports were open: the disk of this host fails or does not answer"),
    edge(Phase::Promoting, Cause::Handover, Phase::Demoting,
        "gives up before its ports were open: it was asked to stop"),
    edge(Phase::Promoting, Cause::OutcomeUnknown, Phase::Demoting,
        "gives up before its ports were open: the first transaction of the database was not confirmed"),
    edge(Phase::Promoting, Cause::Outdated, Phase::Demoting,
        "gives up before its ports were open: this program is older than what the cluster relies on"),
    edge(Phase::Primary, Cause::LeaseLapsed, Phase::Demoting,
        "closes its ports: no majority answered within the lease"),
    edge(Phase::Primary, Cause::LeadershipLost, Phase::Demoting,
        "closes its ports: another node is being elected"),
    edge(Phase::Primary, Cause::Handover, Phase::Demoting,
        "closes its ports: the role is handed over as asked"),
    edge(Phase::Primary, Cause::OutcomeUnknown, Phase::Demoting,
        "closes its ports: the outcome of a transaction is unknown here, the cluster's raft log decides it"),
    edge(Phase::Primary, Cause::DatabaseFailed, Phase::Demoting,
        "closes its ports: the database failed on this host"),
    edge(Phase::Primary, Cause::DiskFailed, Phase::Demoting,
        "closes its ports: the disk of this host fails or does not answer"),
    edge(Phase::Demoting, Cause::DatabaseClosed, Phase::Secondary,
        "is secondary: ports, workload and database are closed and its raft log is the truth again"),
];

/// The change that `cause` makes in phase `from`; none if the table does not permit it.
pub fn transition(from: Phase, cause: Cause) -> Option<Transition> {
    TRANSITIONS.iter().copied().find(|edge| edge.from == from && edge.cause == cause)
}

/// The span in which the primary may keep its ports open, on one clock. Times are nanoseconds of CLOCK_BOOTTIME.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lease {
    deadline: Option<u64>,
}

impl Lease {
    /// A round sent at `sent` was answered by a majority: open until `sent + span`. Never shortens.
    pub fn confirm(&mut self, sent: u64, span: u64) {
        self.deadline = self.deadline.max(Some(sent + span));
    }

    pub fn revoke(&mut self) {
        self.deadline = None;
    }

    pub fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    pub fn is_valid(&self, now: u64) -> bool {
        self.deadline.is_some_and(|deadline| now < deadline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_edge_is_unique_and_says_why() {
        for (at, edge) in TRANSITIONS.iter().enumerate() {
            assert!(!edge.sentence.is_empty());
            assert_eq!(transition(edge.from, edge.cause), Some(*edge));
            assert!(TRANSITIONS[at + 1..].iter().all(|other| (other.from, other.cause) != (edge.from, edge.cause)));
        }
    }

    #[test]
    fn only_demoting_leads_away_from_the_ports() {
        assert!(TRANSITIONS.iter().all(|edge| edge.from != Phase::Primary || edge.to == Phase::Demoting));
        assert!(TRANSITIONS.iter().all(|edge| edge.to != Phase::Primary || edge.from == Phase::Promoting));
    }

    #[test]
    fn a_lease_ends_at_its_deadline_and_never_shrinks() {
        let mut lease = Lease::default();
        assert!(!lease.is_valid(0));
        lease.confirm(100, 50);
        lease.confirm(90, 50);
        assert!(lease.is_valid(149) && !lease.is_valid(150));
        lease.revoke();
        assert!(!lease.is_valid(0));
    }
}
