//! The steps of a command, in their order: shown, done, or done up to one of them. Each may be done again, after the
//! process has died anywhere. Must never decide anything while steps are done: what is to be done was decided before.

use super::voice::{EX_USAGE, Failure, Voice};

/// Exit code of a process that ends after the step that a test has named, as if it had been killed there.
pub(super) const STOPPED: u8 = 3;

type Act<'a> = Box<dyn FnOnce() -> Result<(), Failure> + 'a>;

/// One step.
struct Step<'a> {
    name: &'static str,
    what: String,
    act: Act<'a>,
}

/// What is to be done.
#[derive(Default)]
pub(super) struct Plan<'a> {
    steps: Vec<Step<'a>>,
}

impl<'a> Plan<'a> {
    /// Adds a step; `what` is a line of `--dry-run`.
    pub(super) fn step(
        &mut self,
        name: &'static str,
        what: impl Into<String>,
        act: impl FnOnce() -> Result<(), Failure> + 'a,
    ) {
        self.steps.push(Step { name, what: what.into(), act: Box::new(act) });
    }

    /// Shows the steps, or does them.
    ///
    /// # Errors
    /// The failure of the first step that fails: those behind it are not done. Also when `stop_after` is not the name
    /// of a step; nothing is done then.
    pub(super) fn carry_out(self, dry_run: bool, stop_after: Option<&str>, voice: &Voice) -> Result<(), Failure> {
        if let Some(last) = stop_after
            && !self.steps.iter().any(|step| step.name == last)
        {
            let names: Vec<_> = self.steps.iter().map(|step| step.name).collect();
            return Err(Failure::new(EX_USAGE, format!("found --stop-after {last}, allowed: {}", names.join(" "))));
        }
        for Step { name, what, act } in self.steps {
            if dry_run {
                voice.say(&format!("would: {name:<9} {what}"));
                continue;
            }
            voice.note(&format!("step {name}: {what}"));
            act()?;
            if stop_after == Some(name) {
                return Err(Failure::new(STOPPED, format!("stopped after the step {name}")));
            }
        }
        if dry_run {
            voice.say("Nothing was changed.");
        }
        Ok(())
    }
}
