//! What the database thread does next: compares what the loop wants with where the thread stands. Pure, and the only
//! place that knows: whoever waits, waits until there is a step. Must never look at a file, a clock or the mailbox
//! itself.

use std::time::Duration;

use super::Goal;
use crate::storage::raft_log::ORIGIN;

/// One thing to do. After it, everything is compared again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A last checkpoint, and the end.
    Close,
    /// Close the database, and go back to its checkpoint.
    Demote,
    /// Say that everything of the demotions up to here is closed.
    ReportDemotion(u64),
    /// A majority has what SQLite has written already.
    NoteCommitted,
    /// Open the database for writing in this epoch.
    Promote(u64),
    /// What this epoch's primary would need cannot be applied: the disk is full.
    Refuse(u64),
    /// The saver has done what it was asked for.
    TakeSaved,
    /// Let the database file rest for whoever asked.
    Rest,
    /// Begin or end the copy that was asked for.
    Copy,
    /// The disk has become full, or has space again.
    NoteFull,
    Checkpoint,
    /// Apply some more of the raft log.
    Apply,
    /// Compare what the scrub has read, and let it read more.
    Scrub,
}

/// Where the thread stands.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Standing {
    /// The databases have everything up to here.
    pub applied: u64,
    /// The epoch in which it is open for writing.
    pub epoch: Option<u64>,
    /// Nothing is applied any more: its content is not to be trusted, or a newer program has written what comes next.
    pub halted: bool,
    /// One of them has no content yet, and that was told in this epoch.
    pub reported_empty: Option<u64>,
    /// The epoch in which opening failed: not tried again in it.
    pub refused: u64,
    /// The last demotion that was told of.
    pub demotion: u64,
    /// The disk is full, as far as was noted.
    pub full: bool,
    /// How long nothing is applied yet because the disk was full.
    pub pause: Option<Duration>,
    /// A checkpoint is due, and nothing of the thread's own stands against it.
    pub checkpoint: bool,
    /// The saver works.
    pub saving: bool,
    /// The scrub wants to read.
    pub scrub: bool,
    pub mail: Mail,
}

/// What is in the mailbox.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mail {
    pub snapshot: bool,
    pub copy: bool,
    /// From the saver.
    pub saved: bool,
    /// From the reader of the scrub.
    pub read: bool,
}

impl Standing {
    /// The most urgent first: a takeover waits for the first ones, and the last ones have time. What may come again and
    /// again, as applying does, leaves room for all else that is due.
    pub fn next(&self, goal: &Goal) -> Option<Step> {
        if goal.stop {
            return Some(Step::Close);
        }
        self.of_role(goal).or_else(|| self.of_mail(goal)).or_else(|| self.of_upkeep(goal))
    }

    fn of_role(&self, goal: &Goal) -> Option<Step> {
        match (self.epoch, goal.epoch) {
            (Some(epoch), wanted) if wanted != Some(epoch) => Some(Step::Demote),
            (Some(_), _) => self.is_behind(goal).then_some(Step::NoteCommitted),
            (None, _) if goal.demotion != self.demotion => Some(Step::ReportDemotion(goal.demotion)),
            (None, Some(epoch)) if epoch != self.refused && self.is_behind(goal) => {
                self.pause.map(|_| Step::Refuse(epoch))
            }
            (None, Some(epoch)) if epoch != self.refused && self.reported_empty != Some(epoch) => {
                Some(Step::Promote(epoch))
            }
            (None, _) => None,
        }
    }

    fn of_mail(&self, goal: &Goal) -> Option<Step> {
        // A membership is on its way to its file: that takes moments, unless the disk is full.
        let in_a_moment = goal.pinned && !goal.full;
        match self.mail {
            Mail { saved: true, .. } => Some(Step::TakeSaved),
            Mail { snapshot: true, .. } if !in_a_moment => Some(Step::Rest),
            Mail { copy: true, .. } => Some(Step::Copy),
            _ => None,
        }
    }

    fn of_upkeep(&self, goal: &Goal) -> Option<Step> {
        if goal.full != self.full {
            return Some(Step::NoteFull);
        }
        if self.checkpoint && !goal.pinned {
            return Some(Step::Checkpoint);
        }
        if self.epoch.is_none() && self.is_behind(goal) {
            return self.pause.is_none().then_some(Step::Apply);
        }
        // A scrub of the PRIMARY's file begins with a checkpoint, which must not be while checkpoints are pinned, nor
        // beside another.
        let kept = (goal.pinned || self.saving) && self.epoch.is_some();
        let may_scrub = !self.halted && !kept && self.epoch == goal.epoch;
        (may_scrub && (self.scrub || self.mail.read)).then_some(Step::Scrub)
    }

    /// True while there is something to apply.
    pub fn is_behind(&self, goal: &Goal) -> bool {
        !self.halted && self.applied.max(ORIGIN) < goal.applied
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Option<Duration> = Some(Duration::from_millis(1));

    fn follows() -> Standing {
        Standing { applied: 50, ..Standing::default() }
    }

    fn serves() -> Standing {
        Standing { epoch: Some(7), ..follows() }
    }

    fn all() -> Mail {
        Mail { snapshot: true, copy: true, saved: true, read: true }
    }

    fn at(applied: u64) -> Goal {
        Goal { applied, ..Goal::default() }
    }

    fn primary(applied: u64) -> Goal {
        Goal { epoch: Some(7), ..at(applied) }
    }

    #[test]
    fn it_follows_and_is_opened_when_it_has_everything() {
        let f = follows;
        for (standing, goal, step) in [
            (f(), at(50), None),
            (f(), at(51), Some(Step::Apply)),
            (Standing::default(), at(ORIGIN), None),
            (Standing { pause: PAUSE, ..f() }, at(51), None),
            (Standing { halted: true, ..f() }, at(51), None),
            (f(), primary(51), Some(Step::Apply)),
            (f(), primary(50), Some(Step::Promote(7))),
            // One that applies nothing any more says so.
            (Standing { halted: true, ..f() }, primary(51), Some(Step::Promote(7))),
            (Standing { refused: 7, ..f() }, primary(50), None),
            (Standing { refused: 6, ..f() }, primary(50), Some(Step::Promote(7))),
            (Standing { refused: 7, ..f() }, primary(51), Some(Step::Apply)),
            (Standing { pause: PAUSE, ..f() }, primary(51), Some(Step::Refuse(7))),
            (Standing { pause: PAUSE, refused: 7, ..f() }, primary(51), None),
            (Standing { pause: PAUSE, ..f() }, primary(50), Some(Step::Promote(7))),
            // The first transaction was asked for, and is on its way.
            (Standing { reported_empty: Some(7), ..Standing::default() }, primary(1), None),
            (Standing { reported_empty: Some(6), ..Standing::default() }, primary(1), Some(Step::Promote(7))),
            (Standing { reported_empty: Some(7), ..Standing::default() }, primary(2), Some(Step::Apply)),
        ] {
            assert_eq!(standing.next(&goal), step, "{standing:?} {goal:?}");
        }
    }

    #[test]
    fn a_demotion_comes_before_all_else_and_is_told_once() {
        let demoted = Goal { demotion: 3, ..at(60) };
        let busy = Standing { checkpoint: true, scrub: true, mail: all(), ..serves() };
        assert_eq!(busy.next(&demoted), Some(Step::Demote));
        assert_eq!(busy.next(&Goal { epoch: Some(8), ..demoted }), Some(Step::Demote), "it is primary again already");
        let closed = Standing { epoch: None, ..busy };
        assert_eq!(closed.next(&demoted), Some(Step::ReportDemotion(3)));
        assert_eq!(closed.next(&Goal { epoch: Some(8), ..demoted }), Some(Step::ReportDemotion(3)));
        let told = Standing { demotion: 3, mail: Mail::default(), checkpoint: false, scrub: false, ..closed };
        assert_eq!(told.next(&demoted), Some(Step::Apply));
        assert_eq!(busy.next(&Goal { stop: true, ..demoted }), Some(Step::Close));
    }

    #[test]
    fn a_primary_notes_what_is_committed_and_does_the_rest_one_by_one() {
        let mut standing = Standing { checkpoint: true, scrub: true, mail: all(), ..serves() };
        let goal = Goal { full: true, ..primary(51) };
        assert_eq!(standing.next(&goal), Some(Step::NoteCommitted));
        standing.applied = 51;
        assert_eq!(standing.next(&goal), Some(Step::TakeSaved));
        standing.mail.saved = false;
        assert_eq!(standing.next(&goal), Some(Step::Rest));
        standing.mail.snapshot = false;
        assert_eq!(standing.next(&goal), Some(Step::Copy));
        standing.mail.copy = false;
        assert_eq!(standing.next(&goal), Some(Step::NoteFull));
        standing.full = true;
        assert_eq!(standing.next(&goal), Some(Step::Checkpoint));
        (standing.checkpoint, standing.saving) = (false, true);
        assert_eq!(standing.next(&goal), None, "the scrub of a PRIMARY does not go beside the saver");
        standing.saving = false;
        assert_eq!(standing.next(&goal), Some(Step::Scrub));
        (standing.scrub, standing.mail.read) = (false, false);
        assert_eq!(standing.next(&goal), None);
    }

    /// A SECONDARY under load applies without an end.
    #[test]
    fn applying_holds_up_no_copy_and_no_checkpoint_but_the_scrub() {
        let behind = Standing { scrub: true, mail: Mail { read: true, ..Mail::default() }, ..follows() };
        assert_eq!(behind.next(&at(60)), Some(Step::Apply));
        assert_eq!(behind.next(&at(50)), Some(Step::Scrub));
        assert_eq!(Standing { pause: PAUSE, ..behind }.next(&at(60)), None);
        assert_eq!(Standing { checkpoint: true, ..behind }.next(&at(60)), Some(Step::Checkpoint));
        let asked = Standing { mail: Mail { copy: true, ..Mail::default() }, ..behind };
        assert_eq!(asked.next(&at(60)), Some(Step::Copy));
    }

    #[test]
    fn what_a_pin_forbids_waits_for_its_end() {
        let standing = Standing { checkpoint: true, scrub: true, mail: Mail { snapshot: true, ..all() }, ..serves() };
        let standing = Standing { mail: Mail { saved: false, copy: false, ..standing.mail }, ..standing };
        let pinned = Goal { pinned: true, ..primary(50) };
        assert_eq!(standing.next(&pinned), None);
        assert_eq!(standing.next(&primary(50)), Some(Step::Rest));
        // On a full disk that may take long: whoever asked hears of it.
        let full = Standing { full: true, ..standing };
        assert_eq!(full.next(&Goal { full: true, ..pinned }), Some(Step::Rest));
        let copied = Standing { epoch: None, checkpoint: true, mail: Mail::default(), ..standing };
        assert_eq!(
            copied.next(&Goal { epoch: None, ..pinned }),
            Some(Step::Scrub),
            "that of a SECONDARY writes nothing"
        );
    }
}
