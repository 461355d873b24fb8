//! What the database thread does next: compares what the loop wants with where the thread stands. Pure, and the only
//! place that decides it: the thread waits until there is a step. Must never look at a file, a clock or the mailbox
//! itself.

use std::time::Duration;

use super::Goal;
use crate::storage::raft_log::ORIGIN;

/// One thing to do. After each step everything is compared again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Make a last checkpoint, and end.
    Close,
    /// Close the databases, and go back to their checkpoints.
    Demote,
    /// Report that everything that the demotions up to this one had to close is closed.
    ReportDemotion(u64),
    /// Note that a majority has what SQLite has already written.
    NoteCommitted,
    /// Open the databases for writing in this epoch.
    Promote(u64),
    /// Report that the primary of this epoch cannot get ready here: the disk is full.
    Refuse(u64),
    /// Take the outcome of the saver.
    TakeSaved,
    /// Let the database file rest for those who asked for a snapshot.
    Rest,
    /// Begin or end the copies that were asked for.
    Copy,
    /// Note that the disk has become full, or has space again.
    NoteFull,
    Checkpoint,
    /// Apply some more of the raft log.
    Apply,
    /// Check what the scrub has read, and let it read more.
    Scrub,
}

/// Where the thread stands.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Standing {
    /// The databases have everything up to this index.
    pub applied: u64,
    /// The epoch in which the databases are open for writing.
    pub epoch: Option<u64>,
    /// Nothing is applied any more: the content cannot be trusted, or a newer program has written the next entry.
    pub halted: bool,
    /// The epoch in which it was reported that a database has no content yet; `None` once all have.
    pub reported_empty: Option<u64>,
    /// The epoch in which opening failed; it is not tried again in that epoch.
    pub refused: u64,
    /// The last demotion that was reported as done.
    pub demotion: u64,
    /// The disk is full, by the last [`Step::NoteFull`].
    pub full: bool,
    /// How much longer applying pauses because the disk was full.
    pub pause: Option<Duration>,
    /// A checkpoint is due, and nothing in the thread forbids it.
    pub checkpoint: bool,
    /// The saver is busy.
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
    /// The most urgent step first: a takeover waits for the first ones; the last ones have time. A step that may come
    /// again and again, such as applying, comes after everything else that is due, except the scrub.
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
        // A membership is being written to its file. That takes moments, unless the disk is full.
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
        // A scrub of the PRIMARY's file begins with a checkpoint. There must be none while checkpoints are pinned or
        // another is being saved.
        let kept = (goal.pinned || self.saving) && self.epoch.is_some();
        let may_scrub = !self.halted && !kept && self.epoch == goal.epoch;
        (may_scrub && (self.scrub || self.mail.read)).then_some(Step::Scrub)
    }

    /// True if there is something to apply.
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
            // A thread that applies nothing any more is asked, and refuses with the reason.
            (Standing { halted: true, ..f() }, primary(51), Some(Step::Promote(7))),
            (Standing { refused: 7, ..f() }, primary(50), None),
            (Standing { refused: 6, ..f() }, primary(50), Some(Step::Promote(7))),
            (Standing { refused: 7, ..f() }, primary(51), Some(Step::Apply)),
            (Standing { pause: PAUSE, ..f() }, primary(51), Some(Step::Refuse(7))),
            (Standing { pause: PAUSE, refused: 7, ..f() }, primary(51), None),
            (Standing { pause: PAUSE, ..f() }, primary(50), Some(Step::Promote(7))),
            // The loop was asked for the first transaction, and proposes it.
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

    /// A SECONDARY under load applies all the time.
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
        // On a full disk that may take long, so those who asked get an answer.
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
