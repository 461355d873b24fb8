//! The recent past of this node: the changes of its role with their causes, and the warnings by kind. It is part of the
//! published status, so that a reader who keeps a history misses nothing. Must never grow without bound.

use std::collections::{BTreeMap, VecDeque};

use super::warning::Warning;
use crate::cluster::{Cause, NodeId, Phase, role::Transition};

/// Changes that are remembered: enough for a reader that looks twice a second.
const REMEMBERED: usize = 32;

/// How the primary before this node was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// It handed its role over: a switchover, an orderly stop, or a full disk.
    HandedOver,
    /// Its host refused connections: the process was dead.
    ProcessDead,
    /// Nothing was heard of it for an election time-out.
    NotHeard,
    /// It reported that it was no longer primary.
    GaveUp,
    /// It was this node itself.
    Regained,
    /// There has been none since this process started.
    FirstStart,
}

impl Loss {
    /// Every way.
    pub const ALL: [Self; 6] =
        [Self::HandedOver, Self::ProcessDead, Self::NotHeard, Self::GaveUp, Self::Regained, Self::FirstStart];

    /// The word for it in events and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::HandedOver => "handed_over",
            Self::ProcessDead => "process_dead",
            Self::NotHeard => "not_heard",
            Self::GaveUp => "gave_up",
            Self::Regained => "regained",
            Self::FirstStart => "first_start",
        }
    }
}

/// Which primary a new one follows, and how that one was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Takeover {
    /// The primary before; `None` if this process has not known any.
    pub from: Option<NodeId>,
    pub loss: Loss,
    /// When it was lost, in nanoseconds of [`super::lease::boottime`]: when it was last heard of, or when it gave the
    /// role up.
    pub since: Option<u64>,
}

/// One change of this node's phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleChange {
    /// Number of this change, counted from 1 in each process.
    pub number: u64,
    /// When, in nanoseconds of [`super::lease::boottime`].
    pub at: u64,
    pub epoch: u64,
    pub from: Phase,
    pub to: Phase,
    pub cause: Cause,
    pub sentence: &'static str,
    /// Only for a change to [`Phase::Primary`].
    pub takeover: Option<Takeover>,
}

/// The recent past, as it is published.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recent {
    /// Oldest first.
    pub role_changes: VecDeque<RoleChange>,
    /// The warnings in force, except those that follow from the rest of the status.
    pub warnings: BTreeMap<Warning, String>,
}

/// Follows who is primary, and remembers the changes of this node's role.
#[derive(Debug, Default)]
pub(super) struct History {
    changes: VecDeque<RoleChange>,
    count: u64,
    primary: Option<NodeId>,
    /// How and when that primary was lost, as far as is known.
    lost: Option<(Loss, u64)>,
    takeover: Option<Takeover>,
}

impl History {
    /// `node` is primary now.
    pub fn primary_is(&mut self, node: NodeId) {
        (self.primary, self.lost) = (Some(node), None);
    }

    /// The primary has handed its role over to this node.
    pub fn handed_over(&mut self, by: NodeId, now: u64) {
        if self.primary == Some(by) {
            let since = self.lost.map_or(now, |(_, since)| since);
            self.lost = Some((Loss::HandedOver, since));
        }
    }

    /// A node reports that it is not primary.
    pub fn not_primary(&mut self, node: NodeId, now: u64) {
        if self.primary == Some(node) && self.lost.is_none() {
            self.lost = Some((Loss::GaveUp, now));
        }
    }

    /// A node's process is dead; it was last heard of at `heard`.
    pub fn dead(&mut self, node: NodeId, heard: u64) {
        if self.primary == Some(node) && self.lost.is_none() {
            self.lost = Some((Loss::ProcessDead, heard));
        }
    }

    /// The last known primary: the caller has to find out when it was last heard of.
    pub fn lost_primary(&self) -> Option<NodeId> {
        self.primary
    }

    /// Records a change. `heard`: when the primary before was last heard of.
    pub fn note(&mut self, node: NodeId, epoch: u64, transition: &Transition, now: u64, heard: Option<u64>) {
        match transition.to {
            Phase::Promoting => self.takeover = Some(self.takeover(node, heard)),
            Phase::Demoting if transition.from == Phase::Primary => {
                (self.primary, self.lost) = (Some(node), Some((Loss::Regained, now)));
            }
            _ => {}
        }
        self.count += 1;
        let Transition { from, cause, to, sentence } = *transition;
        let takeover = self.takeover.take_if(|_| to != Phase::Promoting).filter(|_| to == Phase::Primary);
        self.changes.push_back(RoleChange { number: self.count, at: now, epoch, from, to, cause, sentence, takeover });
        if self.changes.len() > REMEMBERED {
            self.changes.pop_front();
        }
    }

    fn takeover(&self, node: NodeId, heard: Option<u64>) -> Takeover {
        let (loss, since) = match (self.primary, self.lost) {
            (None, _) => (Loss::FirstStart, None),
            (Some(_), Some((loss, since))) => (loss, Some(since)),
            (Some(primary), None) if primary == node => (Loss::Regained, None),
            (Some(_), None) => (Loss::NotHeard, heard),
        };
        Takeover { from: self.primary, loss, since }
    }

    /// The remembered changes, oldest first.
    pub fn changes(&self) -> &VecDeque<RoleChange> {
        &self.changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::role::transition;

    fn promote(history: &mut History, now: u64, heard: Option<u64>) -> Takeover {
        for (from, cause) in [(Phase::Secondary, Cause::ElectionWon), (Phase::Promoting, Cause::DatabaseOpened)] {
            history.note(1, 5, &transition(from, cause).unwrap(), now, heard);
        }
        let last = history.changes().back().unwrap();
        assert_eq!((last.to, history.changes()[history.changes().len() - 2].takeover), (Phase::Primary, None));
        last.takeover.unwrap()
    }

    fn takeover(steps: impl Fn(&mut History)) -> Takeover {
        let mut history = History::default();
        steps(&mut history);
        promote(&mut history, 1000, Some(400))
    }

    #[test]
    fn each_way_to_lose_a_primary_is_told_apart() {
        let by_two = |loss, since| Takeover { from: Some(2), loss, since: Some(since) };
        let first = Takeover { from: None, loss: Loss::FirstStart, since: None };
        assert_eq!(takeover(|_| ()), first);
        assert_eq!(takeover(|h| h.primary_is(2)), by_two(Loss::NotHeard, 400));
        let dead = |h: &mut History| (h.primary_is(2), h.dead(2, 300), h.not_primary(2, 900));
        assert_eq!(takeover(|h| _ = dead(h)), by_two(Loss::ProcessDead, 300));
        let other = |h: &mut History| (h.primary_is(2), h.dead(3, 300), h.handed_over(3, 9), h.not_primary(3, 9));
        assert_eq!(takeover(|h| _ = other(h)), by_two(Loss::NotHeard, 400));
        assert_eq!(takeover(|h| _ = (h.primary_is(2), h.not_primary(2, 500))), by_two(Loss::GaveUp, 500));
        // The loss begins when the old primary closes its ports, not when it hands over.
        let planned = |h: &mut History| (h.primary_is(2), h.not_primary(2, 500), h.handed_over(2, 600));
        assert_eq!(takeover(|h| _ = planned(h)), by_two(Loss::HandedOver, 500));
        // How an earlier primary was lost does not matter.
        let older = |h: &mut History| (h.primary_is(3), h.dead(3, 100), h.primary_is(2));
        assert_eq!(takeover(|h| _ = older(h)), by_two(Loss::NotHeard, 400));
    }

    #[test]
    fn a_role_can_come_back() {
        let mut history = History::default();
        promote(&mut history, 100, None);
        history.primary_is(1);
        let lapsed = transition(Phase::Primary, Cause::LeaseLapsed).unwrap();
        history.note(1, 5, &lapsed, 200, None);
        let again = promote(&mut history, 300, None);
        assert_eq!(again, Takeover { from: Some(1), loss: Loss::Regained, since: Some(200) });
        for _ in 0..2 * REMEMBERED {
            history.note(1, 5, &lapsed, 400, None);
        }
        assert_eq!(history.changes().len(), REMEMBERED);
        assert_eq!(history.changes().back().map(|change| change.number), Some(5 + 2 * REMEMBERED as u64));
    }
}
