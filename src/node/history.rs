//! What this node went through lately: the changes of its role with their causes, and the warnings by their kind. Part
//! of the published picture, so that whoever keeps a history misses none. Must never grow without bound.

use std::collections::{BTreeMap, VecDeque};

use super::warning::Warning;
use crate::cluster::{Cause, NodeId, Phase, role::Transition};

/// Changes that are remembered: a reader that looks twice a second misses none.
const REMEMBERED: usize = 32;

/// How the primary before this node was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// It handed its role over: a switchover, an orderly stop, or a full disk.
    HandedOver,
    /// Its host refuses connections: the process is dead.
    ProcessDead,
    /// Nothing was heard of it for the time of an election.
    NotHeard,
    /// It said itself that it is not primary any more.
    GaveUp,
    /// It was this node itself.
    Regained,
    /// There was none since this process started.
    FirstStart,
}

impl Loss {
    /// All of them.
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

/// Whose place a new primary takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Takeover {
    /// The primary before; none if none was known since this process started.
    pub from: Option<NodeId>,
    pub loss: Loss,
    /// When it was lost, in nanoseconds of the clock of [`super::lease::boottime`]: the last sign of it, or the moment
    /// in which it gave the role up.
    pub since: Option<u64>,
}

/// One change of this node's phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleChange {
    /// Counts all changes of this process, from 1.
    pub number: u64,
    /// When, on the clock of [`super::lease::boottime`].
    pub at: u64,
    pub epoch: u64,
    pub from: Phase,
    pub to: Phase,
    pub cause: Cause,
    pub sentence: &'static str,
    /// Only where it leads to [`Phase::Primary`].
    pub takeover: Option<Takeover>,
}

/// The newest past, as it is published.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recent {
    /// Oldest first.
    pub role_changes: VecDeque<RoleChange>,
    /// The warnings in force, but for those that follow from the rest of the status.
    pub warnings: BTreeMap<Warning, String>,
}

/// Follows the primaries, and remembers the changes of this node.
#[derive(Debug, Default)]
pub(super) struct History {
    changes: VecDeque<RoleChange>,
    count: u64,
    primary: Option<NodeId>,
    /// How and when that one was lost, as far as it is known by now.
    lost: Option<(Loss, u64)>,
    takeover: Option<Takeover>,
}

impl History {
    /// `node` is primary by now.
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

    /// A node says that it is not primary.
    pub fn not_primary(&mut self, node: NodeId, now: u64) {
        if self.primary == Some(node) && self.lost.is_none() {
            self.lost = Some((Loss::GaveUp, now));
        }
    }

    /// A node's process is dead, and was heard last at `heard`.
    pub fn dead(&mut self, node: NodeId, heard: u64) {
        if self.primary == Some(node) && self.lost.is_none() {
            self.lost = Some((Loss::ProcessDead, heard));
        }
    }

    /// Whom to ask when the last sign of the primary came.
    pub fn lost_primary(&self) -> Option<NodeId> {
        self.primary
    }

    /// Takes note of a change. `heard`: the last sign of the primary before.
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

    /// For the picture.
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
        // It begins when the old primary closes, not when it lets go.
        let planned = |h: &mut History| (h.primary_is(2), h.not_primary(2, 500), h.handed_over(2, 600));
        assert_eq!(takeover(|h| _ = planned(h)), by_two(Loss::HandedOver, 500));
        // What became of an earlier primary does not matter.
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
