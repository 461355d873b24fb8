//! Waits until newcomers have caught up, with a progress bar on a terminal. Must never change anything: the members get
//! their votes by themselves, whether somebody waits or not.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::{
    client::ApiClient,
    columns::{progress_bar, say},
    quantity::size,
    stop::{EX_TEMPFAIL, Stop},
};
use crate::{
    cluster::Role,
    node::{Status, SyncProgress},
};

/// Pause before the status is asked for again.
const PACE: Duration = Duration::from_millis(200);

/// How far the newcomers are.
#[derive(Debug, PartialEq, Eq)]
struct Progress {
    /// All copies that are under way, together.
    sync: SyncProgress,
    /// Who is not up yet, with the state.
    pending: Vec<String>,
}

impl Progress {
    fn of(status: &Status) -> Self {
        let up = |role| matches!(role, Role::Primary | Role::Secondary);
        let pending = status.members.iter().filter(|member| !member.voter || !up(member.state));
        let mut pending: Vec<String> = pending.map(|member| format!("{} {}", member.name, member.state)).collect();
        // A pool grows as its administrator likes.
        let size = status.membership.roster.size;
        let missing = if size.is_pool() { 0 } else { size.missing(status.members.len()) };
        if missing > 0 {
            pending.push(format!("{missing} to come"));
        }
        let mut sync = SyncProgress::default();
        for copy in status.members.iter().filter_map(|member| member.sync) {
            (sync.bytes, sync.total) = (sync.bytes + copy.bytes, sync.total + copy.total);
        }
        Self { sync, pending }
    }
}

/// Returns when all members are up. With `quietly`, standard output is left alone.
///
/// # Errors
/// When the daemon cannot be reached, gives the role up, or `limit` is over.
pub(super) fn wait(client: &ApiClient, limit: Duration, quietly: bool) -> Result<(), Stop> {
    let start = Instant::now();
    let bar = progress_bar();
    loop {
        let status = client.status().inspect_err(|_| bar.abandon())?;
        let progress = Progress::of(&status);
        if progress.pending.is_empty() {
            bar.finish_and_clear();
            let seconds = start.elapsed().as_secs_f64();
            let text = format!("All {} members are up ({seconds:.1} s).", status.members.len());
            if quietly {
                eprintln!("{text}");
                return Ok(());
            }
            return say(&text);
        }
        let waits_for = progress.pending.join(", ");
        if start.elapsed() > limit {
            bar.abandon();
            let text = format!("{waits_for}: not up within {} s\n  See: twistcli ha status --watch", limit.as_secs());
            return Err(Stop::tell(EX_TEMPFAIL, &text));
        }
        let SyncProgress { bytes, total, .. } = progress.sync;
        // A bar without a length would show 0 of 0 as complete.
        bar.set_length(total.max(1));
        bar.set_position(bytes);
        let copied = if total > 0 { format!("{} of {}  ", size(bytes), size(total)) } else { String::new() };
        bar.set_message(format!("{copied}{waits_for}"));
        thread::sleep(PACE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::verdict::tests::healthy;

    #[test]
    fn all_are_up_when_nobody_is_pending() {
        let mut status = healthy();
        assert_eq!(Progress::of(&status).pending, Vec::<String>::new());
        status.members[1].voter = false;
        status.members[1].state = Role::Startup2;
        status.members[1].sync = Some(SyncProgress { bytes: 5, total: 10, unchanged: 0 });
        status.members[2].state = Role::Down;
        status.members[2].sync = Some(SyncProgress { bytes: 1, total: 10, unchanged: 0 });
        let progress = Progress::of(&status);
        assert_eq!(progress.pending, ["node2 STARTUP2", "node3 DOWN"]);
        assert_eq!(progress.sync, SyncProgress { bytes: 6, total: 20, unchanged: 0 });
        status.members.pop();
        assert_eq!(Progress::of(&status).pending, ["node2 STARTUP2", "1 to come"]);
        // SECONDARY without a vote is not there yet.
        status.members[1].state = Role::Secondary;
        assert_eq!(Progress::of(&status).pending[0], "node2 SECONDARY");
    }
}
