//! Automatic backups: what is due when, by the files that are there, so that a restart changes nothing; and which ones
//! are not kept any longer. The decisions are pure; the loop only waits and carries them out.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::sleep;
use tracing::{info, warn};

use super::{Backup, BackupError, BackupId, Backups, Keep, Kind, blocking, folder::Folder};
use crate::{clock::unix_time, cluster::Role, mutex::locked, node::Warning, telemetry::BACKUP_LAST_SUCCESS};

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;
/// Longest wait between two looks at the clock, which may be set at any time.
const LOOK: Duration = Duration::from_secs(60);
/// Pause while one is due, and the node or another job is in the way.
const READY: Duration = Duration::from_secs(1);
/// So many seconds later for each place among the members: those who share a folder see what the one before has made.
const APART: u64 = 5;
/// Pause after a failure.
const AGAIN: Duration = Duration::from_secs(HOUR);

/// Seconds from one backup of a kind to the next. A day is a little shorter for the rarer ones, so that they fall on
/// the daily backup of the same hour and not on the next one.
fn interval(kind: Kind) -> u64 {
    match kind {
        Kind::Manual | Kind::Daily => DAY,
        Kind::Weekly => 7 * DAY - HOUR,
        Kind::Monthly => 30 * DAY - HOUR,
    }
}

fn kept(kind: Kind, keep: Keep) -> u32 {
    match kind {
        Kind::Manual => u32::MAX,
        Kind::Daily => keep.daily,
        Kind::Weekly => keep.weekly,
        Kind::Monthly => keep.monthly,
    }
}

/// When the next backup of a kind is due, in seconds since 1970. A file from the future was made with a wrong clock,
/// and does not count.
fn due(kind: Kind, list: &[Backup], now: u64) -> u64 {
    let times = list.iter().filter(|backup| backup.kind == kind).map(|backup| backup.time);
    times.filter(|time| *time <= now + HOUR).max().map_or(0, |newest| newest + interval(kind))
}

/// The rarer kinds that a new daily backup is, too.
fn also(list: &[Backup], now: u64, keep: Keep) -> Vec<Kind> {
    let rarer = [Kind::Weekly, Kind::Monthly].into_iter();
    rarer.filter(|kind| kept(*kind, keep) > 0 && due(*kind, list, now) <= now).collect()
}

/// The automatic backups that are not kept any longer. `list` is newest first. As in [`due`], files from the future do
/// not count: they would push out every new one. They stay until their time has come.
pub(super) fn surplus(list: &[Backup], keep: Keep, now: u64) -> Vec<String> {
    let counts = move |backup: &&Backup, kind| backup.kind == kind && backup.time <= now + HOUR;
    let of = |kind: Kind| list.iter().filter(move |backup| counts(backup, kind)).skip(kept(kind, keep) as usize);
    Kind::AUTOMATIC.into_iter().flat_map(of).map(|backup| backup.id.clone()).collect()
}

impl Backups {
    /// Makes backups when they are due, for as long as the node lives.
    pub async fn run_schedule(self: Arc<Self>) {
        if !self.config.enabled {
            return;
        }
        // While there is none, or the folder cannot be read, what is overdue counts from the start.
        let newest = self.list().await.ok().and_then(|list| list.first().map(|backup| backup.time));
        metrics::gauge!(BACKUP_LAST_SUCCESS).set(newest.unwrap_or_else(unix_time) as f64);
        // Not all members at once, and none in the middle of a start.
        let mut earliest = Instant::now() + self.config.delay * (1 + self.rank());
        loop {
            self.wait_until_due(earliest).await;
            earliest = Instant::now() + if self.automatic().await { Duration::ZERO } else { AGAIN };
        }
    }

    /// The place of this node among the members.
    fn rank(&self) -> u32 {
        let status = self.node.status().borrow().clone();
        let place = status.membership.roster.members.iter().position(|member| member.id == status.node);
        place.unwrap_or_default() as u32
    }

    async fn wait_until_due(self: &Arc<Self>, earliest: Instant) {
        loop {
            // A folder that cannot be read is one where a backup fails, with its reason.
            let look = |folder: &Folder| Ok((folder.list()?, folder.is_used_by_another()));
            let (list, elsewhere) = self.in_folder(look).await.unwrap_or_default();
            let (time, early) = (unix_time(), earliest.saturating_duration_since(Instant::now()));
            let turn = due(Kind::Daily, &list, time) + APART * u64::from(self.rank());
            let next = turn.max(time + early.as_secs());
            *locked(&self.next) = Some(next);
            let role = self.node.status().borrow().role;
            let ready =
                matches!(role, Role::Primary | Role::Secondary) && self.jobs.picture().0.is_none() && !elsewhere;
            let left = Duration::from_secs(next.saturating_sub(time)).max(early);
            if left.is_zero() && ready {
                return;
            }
            sleep(if left.is_zero() { READY } else { left.min(LOOK) }).await;
        }
    }

    /// Makes the backup that is due. True if all went well.
    async fn automatic(self: &Arc<Self>) -> bool {
        let Ok((job, id)) = self.begin_backup(Kind::Daily.word()) else {
            return true; // something else has just begun: it is still due
        };
        info!(id = job.id(), "an automatic backup begins");
        if !self.make(&job, &id, None).await {
            return false;
        }
        let all = self.clone();
        let tidied = blocking(move || all.rotate(&id)).await;
        if let Err(error) = &tidied {
            warn!(%error, "the older automatic backups could not be tidied up");
            self.node.warn(Warning::Backup, Some(format!("old backups of this host could not be tidied up: {error}")));
        }
        // Again: its weekly and monthly links are there now.
        self.offsite.wake();
        tidied.is_ok()
    }

    /// Keeps a new daily backup as a rarer one, too, if one is due; deletes what is not kept any longer.
    fn rotate(&self, made: &BackupId) -> Result<(), BackupError> {
        let list = self.folder.list()?;
        for kind in also(&list, made.time, self.config.keep) {
            self.folder.link(made, &BackupId { name: kind.word().to_owned(), ..made.clone() })?;
        }
        for id in surplus(&self.folder.list()?, self.config.keep, made.time) {
            self.folder.delete(&BackupId::read(&id)?)?;
            info!(id, "an automatic backup is not kept any longer");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::folder::describe;

    const KEEP: Keep = Keep { daily: 7, weekly: 4, monthly: 3 };

    fn backup(kind: Kind, time: u64) -> Backup {
        let (name, version) = (kind.word().to_owned(), "0.1.0".to_owned());
        describe(&BackupId { name, version, time, sealed: false }, 1)
    }

    /// What there is after so many days of daily backups, each `late` seconds later in the day than the one before.
    fn after(days: u64, late: u64) -> Vec<Backup> {
        let mut list: Vec<Backup> = Vec::new();
        for day in 0..days {
            let time = 1_790_000_000 + day * (DAY + late);
            assert!(due(Kind::Daily, &list, time) <= time, "day {day}");
            list.insert(0, backup(Kind::Daily, time));
            let also = also(&list, time, KEEP);
            list.splice(0..0, also.into_iter().map(|kind| backup(kind, time)));
            let gone = surplus(&list, KEEP, time);
            list.retain(|backup| !gone.contains(&backup.id));
        }
        list
    }

    #[test]
    fn daily_weekly_and_monthly_ones_are_kept() {
        for late in [0, 20] {
            let list = after(200, late);
            let of = |kind| list.iter().filter(|backup| backup.kind == kind).map(|b| b.time).collect::<Vec<_>>();
            let (daily, weekly, monthly) = (of(Kind::Daily), of(Kind::Weekly), of(Kind::Monthly));
            assert_eq!((daily.len(), weekly.len(), monthly.len()), (7, 4, 3), "{late}");
            let apart = |times: &[u64], days: u64| times.windows(2).all(|two| (two[0] - two[1] + HOUR) / DAY == days);
            assert!(apart(&daily, 1) && apart(&weekly, 7) && apart(&monthly, 30), "{late}");
        }
        assert_eq!(after(1, 0).len(), 3, "the first one is of every kind");
    }

    #[test]
    fn a_missed_one_is_due_at_once_and_a_wrong_clock_stops_nothing() {
        let time = 1_790_000_000;
        assert_eq!(due(Kind::Daily, &[], time), 0);
        let list = [backup(Kind::Manual, time), backup(Kind::Daily, time - 5 * DAY)];
        assert_eq!(due(Kind::Daily, &list, time), time - 4 * DAY);
        let list = [backup(Kind::Daily, time + 900 * DAY), backup(Kind::Daily, time - 10)];
        assert_eq!(due(Kind::Daily, &list, time), time - 10 + DAY);
    }

    #[test]
    fn what_was_made_with_a_wrong_clock_does_not_push_out_the_others() {
        let time = 1_790_000_000;
        let days = [time + 900 * DAY, time + 800 * DAY, time, time - DAY];
        let list: Vec<Backup> = days.into_iter().map(|time| backup(Kind::Daily, time)).collect();
        let keep = Keep { daily: 1, weekly: 1, monthly: 1 };
        assert_eq!(surplus(&list, keep, time), [list[3].id.clone()], "the new one stays");
        assert_eq!(surplus(&list, keep, time + 1000 * DAY).len(), 3, "and once their time has come they count");
    }

    #[test]
    fn manual_ones_are_never_deleted() {
        let list: Vec<Backup> = (0..50).map(|at| backup(Kind::Manual, 1000 - at)).collect();
        assert!(surplus(&list, Keep { daily: 1, weekly: 0, monthly: 0 }, 2000).is_empty());
    }
}
