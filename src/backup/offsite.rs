//! Copies of the backups elsewhere: whatever is in this host's folder is brought to the place of `BACKUP_URL`, soon
//! after it was made, and is tried again until that succeeds; and copies are fetched from there. On a thread of its own
//! that leaves the network and the processor to others. Must never harm a backup in the folder, nor delete a copy that
//! is not an automatic backup of this very member beyond what is kept.

use std::{
    future::Future,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::{sync::Notify, time::timeout};
use tracing::{info, warn};

use super::{
    Backup, BackupError, BackupId, Backups, CopyRunning, CopyState, Started, Work,
    copy::Pace,
    jobs::Job,
    name::FETCHED,
    schedule::surplus,
    store::{Place, RemoteBackup, Store, fetched, segment},
};
use crate::{
    admin::{Act, Actor, audit},
    clock::unix_time,
    events::{Scope, Severity},
    mutex::locked,
    node::Warning,
    scheduling,
    telemetry::{BACKUP_COPIED, BACKUP_COPY_FAILURES},
};

/// How often the place is looked at although nothing is new.
const IDLE: Duration = Duration::from_secs(6 * 3600);
/// Pause after the first failure; it doubles with each, up to the longest.
const AGAIN: Duration = Duration::from_secs(30);
const LONGEST: Duration = Duration::from_secs(3600);
/// Most copies in one answer.
const SHOWN: usize = 1_000;
/// Where a fetched copy is written first.
const PART: &str = "fetched";

/// What is known about the copies.
#[derive(Debug, Default)]
pub(super) struct Offsite {
    state: Option<Mutex<CopyState>>,
    news: Notify,
    /// One list at a time, however many ask.
    listing: Arc<tokio::sync::Mutex<()>>,
}

impl Offsite {
    pub fn new(url: Option<String>) -> Self {
        let state = url.map(|url| Mutex::new(CopyState { url, ..CopyState::default() }));
        Self { state, ..Self::default() }
    }

    /// Says that there is a new backup in the folder.
    pub fn wake(&self) {
        self.news.notify_one();
    }

    pub fn picture(&self) -> Option<CopyState> {
        self.state.as_ref().map(|state| locked(state).clone())
    }

    fn note(&self, change: impl FnOnce(&mut CopyState)) {
        if let Some(state) = &self.state {
            let mut state: MutexGuard<'_, CopyState> = locked(state);
            change(&mut state);
        }
    }
}

fn no_url() -> BackupError {
    BackupError::Refused("BACKUP_URL is not set: there is no place of copies".to_owned())
}

/// Runs `work` on a thread of its own: it hashes, encrypts and waits for disks.
async fn apart<T, F>(work: impl FnOnce() -> F + Send + 'static) -> Result<T, BackupError>
where
    T: Send + 'static,
    F: Future<Output = Result<T, BackupError>>,
{
    let result = scheduling::apart("backup-copies", work).await;
    result.unwrap_or_else(|error| Err(BackupError::Unknown(format!("it ended without an outcome: {error}"))))
}

/// The backups of the folder that have no copy of their length, the newest first. Those that were fetched are there
/// already.
fn missing<'a>(here: &'a [Backup], there: &[RemoteBackup]) -> Vec<&'a Backup> {
    let is_there =
        |backup: &Backup| there.iter().any(|copy| copy.backup.id == backup.id && copy.backup.bytes == backup.bytes);
    here.iter().filter(|backup| !backup.name.starts_with(FETCHED) && !is_there(backup)).collect()
}

/// The copies that are not kept any longer: by the same rule as in the folder, so that a host that begins anew with an
/// empty folder keeps what it has there; and never one that is in the folder.
fn outdated(here: &[Backup], there: &[RemoteBackup], keep: super::Keep, now: u64) -> Vec<String> {
    let list: Vec<Backup> = there.iter().map(|copy| copy.backup.clone()).collect();
    let mut gone = surplus(&list, keep, now);
    gone.retain(|id| !here.iter().any(|backup| backup.id == *id));
    gone
}

impl Backups {
    fn store(&self) -> Result<Store, BackupError> {
        Store::open(self.config.url.as_deref().ok_or_else(no_url)?, self.config.credentials.as_deref())
    }

    /// The copies at `BACKUP_URL`, of all members and clusters, newest first, and of these at most 1,000.
    ///
    /// # Errors
    /// [`BackupError::Remote`] when the place cannot be used, refuses or does not answer in time.
    /// [`BackupError::Refused`] without `BACKUP_URL`, and for a file of credentials that cannot be used.
    pub async fn copies(self: &Arc<Self>) -> Result<Vec<RemoteBackup>, BackupError> {
        // Held to the end of the work, even if nobody waits for it any more.
        let turn = self.offsite.listing.clone().lock_owned().await;
        let all = self.clone();
        let list = async move {
            let _turn = turn;
            let mut list = all.store()?.list(None).await?;
            list.truncate(SHOWN);
            Ok(list)
        };
        apart(move || list).await
    }

    /// Keeps the copies complete for as long as the node lives.
    pub async fn run_copies(self: Arc<Self>) {
        if self.config.url.is_none() {
            return;
        }
        let (mut wait, mut failures) = (self.config.delay, 0);
        loop {
            // Either is a reason to look.
            let _ = timeout(wait, self.offsite.news.notified()).await;
            let all = self.clone();
            let result = apart(move || async move { all.mirror().await }).await;
            self.offsite.note(|state| state.running = None);
            wait = match result {
                Ok(()) => {
                    failures = 0;
                    metrics::gauge!(BACKUP_COPIED).set(unix_time() as f64);
                    self.offsite.note(|state| (state.complete, state.problem) = (Some(unix_time()), None));
                    self.node.warn(Warning::BackupCopies, None);
                    IDLE
                }
                Err(error) => {
                    let wait = AGAIN.saturating_mul(1 << failures.min(10)).min(LONGEST);
                    failures += 1;
                    warn!(%error, again_in = ?wait, "the backups of this host could not be copied");
                    metrics::counter!(BACKUP_COPY_FAILURES).increment(1);
                    self.offsite.note(|state| state.problem = Some(error.to_string()));
                    let sentence = format!("backups of this host were made, but not copied: {error}");
                    self.node.warn(Warning::BackupCopies, Some(sentence));
                    wait
                }
            };
        }
    }

    /// Brings everything there that is missing, and deletes what is not kept.
    async fn mirror(&self) -> Result<(), BackupError> {
        let status = self.node.status().borrow().clone();
        let (cluster, node) = (status.cluster.to_string(), segment(&status.name));
        drop(status);
        let place = |id: BackupId| Place { cluster: cluster.clone(), node: node.clone(), id };
        let store = self.store()?;
        let mut there = store.list(Some((&cluster, &node))).await?;
        let here = self.folder.list()?;
        let todo = missing(&here, &there);
        let mut left = todo.len() as u32;
        // A file that cannot be read does not hold up the others.
        let mut problem = None;
        for backup in todo {
            self.offsite.note(|state| state.missing = left);
            let to = place(BackupId::read(&backup.id)?);
            match self.mirror_one(&store, &to, backup, &there).await {
                Ok(()) => {
                    let text = format!("the backup {} is copied to {to}", backup.id);
                    info!(id = backup.id, bytes = backup.bytes, "the backup was copied");
                    self.tell(Severity::Info, Scope::Local, text);
                    // One of another length was there.
                    there.retain(|copy| copy.backup.id != backup.id);
                    there.push(RemoteBackup {
                        place: to.to_string(),
                        cluster: to.cluster,
                        node: to.node,
                        backup: backup.clone(),
                    });
                    left -= 1;
                }
                Err(BackupError::Io { .. }) if self.folder.find(&to.id).is_err() => left -= 1, // deleted meanwhile
                Err(error @ BackupError::Io { .. }) => problem = Some(error),
                Err(error) => return Err(error),
            }
        }
        self.offsite.note(|state| (state.missing, state.running) = (left, None));
        there.sort_by_key(|copy| std::cmp::Reverse(copy.backup.time));
        for id in outdated(&self.folder.list()?, &there, self.config.keep, unix_time()) {
            store.delete(&place(BackupId::read(&id)?)).await?;
            info!(id, "a copy of an automatic backup is not kept any longer");
        }
        problem.map_or(Ok(()), Err)
    }

    async fn mirror_one(
        &self,
        store: &Store,
        to: &Place,
        backup: &Backup,
        there: &[RemoteBackup],
    ) -> Result<(), BackupError> {
        let total = backup.bytes;
        self.offsite.note(|state| state.running = Some(CopyRunning { id: backup.id.clone(), done: 0, total }));
        // A weekly backup is the daily one of the same second under another name.
        let automatic = |kind| super::Kind::AUTOMATIC.contains(&kind);
        let same = |copy: &&RemoteBackup| {
            let other = &copy.backup;
            automatic(other.kind)
                && automatic(backup.kind)
                && (other.time, other.bytes, other.encrypted) == (backup.time, total, backup.encrypted)
        };
        if let Some(twin) = there.iter().find(same).and_then(|copy| Place::parse(&copy.place))
            && store.twin(&twin, to, total).await
        {
            return Ok(());
        }
        let path = self.folder.find(&to.id)?;
        let mut pace = Pace::new();
        let each = |bytes| {
            self.offsite.note(|state| state.running.iter_mut().for_each(|running| running.done += bytes));
            pace.rest();
        };
        store.put(to, &path, total, each).await
    }

    /// Begins to fetch a copy (`CLUSTER/NODE/FILE`) into the folder.
    ///
    /// # Errors
    /// [`BackupError::NotFound`] for anything but `CLUSTER/NODE/FILE`, [`BackupError::Refused`] while something else is
    /// under way and without `BACKUP_URL`. Whether there is such a copy is in the outcome.
    pub async fn fetch(self: &Arc<Self>, place: &str, by: &Actor) -> Result<Started, BackupError> {
        let record = self.admin.begin(by, Act::new("fetch", format!("copy '{place}'"))).await;
        let (place, id, job) = match self.begin_fetch(place) {
            Ok(begun) => begun,
            Err(error) => {
                record.end(audit::Outcome::from(&error)).await;
                return Err(error);
            }
        };
        info!(%by, id = job.id(), %place, "a copy of a backup is fetched");
        let (all, started, fetching) = (self.clone(), Started::from(&*job), Arc::clone(&job));
        tokio::spawn(async move {
            let backups = all.clone();
            let result = apart(move || async move { backups.bring_here(&place, &id, &fetching).await }).await;
            match &result {
                Ok(text) => info!(id = job.id(), "the copy was fetched: {text}"),
                Err(error) => warn!(id = job.id(), %error, "the copy could not be fetched"),
            }
            record.end(audit::Outcome::of(&result)).await;
            all.jobs.end(&job, &result);
        });
        Ok(started)
    }

    fn begin_fetch(&self, place: &str) -> Result<(Place, BackupId, Arc<Job>), BackupError> {
        self.config.url.as_ref().ok_or_else(no_url)?;
        let none = || BackupError::NotFound("a copy is named CLUSTER/NODE/FILE, as the list has it".to_owned());
        let place = Place::parse(place).ok_or_else(none)?;
        let id = fetched(&place);
        let job = self.jobs.begin(Work::Fetch, id.to_string())?;
        Ok((place, id, job))
    }

    async fn bring_here(&self, place: &Place, id: &BackupId, job: &Job) -> Result<String, BackupError> {
        job.step("asks for the copy", 0);
        let store = self.store()?;
        let length = store.length(place).await?;
        if let Ok(path) = self.folder.find(id) {
            let found = std::fs::metadata(&path).map_err(BackupError::io("look at", &path))?.len();
            if found == length {
                return Ok("it is in the folder already".to_owned());
            }
        }
        let workshop = self.folder.workshop()?;
        self.folder.check_space(length)?;
        job.step("fetches the copy", length);
        let mut pace = Pace::new();
        let mut since = 0;
        let each = |bytes| {
            job.advance(bytes);
            since += bytes;
            if since >= 1 << 20 {
                since = 0;
                pace.rest();
            }
        };
        store.fetch(place, &workshop.join(PART), length, each).await?;
        self.folder.publish(&workshop.join(PART), id)?;
        Ok(format!("{length} bytes of {place}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::{Keep, Kind, folder::describe};

    fn backup(name: &str, time: u64, bytes: u64) -> Backup {
        let id = BackupId { name: name.into(), version: "0.1.0".into(), time, sealed: false };
        describe(&id, bytes)
    }

    fn copy(backup: &Backup) -> RemoteBackup {
        let (cluster, node) = ("1".to_owned(), "n".to_owned());
        RemoteBackup { place: format!("1/n/{}", backup.id), cluster, node, backup: backup.clone() }
    }

    #[test]
    fn what_is_missing_is_carried_and_nothing_twice() {
        let here = [backup("daily", 9, 5), backup("mine", 7, 5), backup("fetched-n-x", 5, 5), backup("old", 3, 5)];
        let there = [copy(&here[0]), copy(&backup("old", 3, 4))];
        let ids: Vec<&str> = missing(&here, &there).into_iter().map(|backup| &*backup.name).collect();
        assert_eq!(ids, ["mine", "old"], "one of another length is not that copy");
    }

    #[test]
    fn a_host_that_begins_anew_keeps_its_copies() {
        let keep = Keep { daily: 2, weekly: 1, monthly: 0 };
        let there: Vec<RemoteBackup> =
            [("daily", 9), ("mine", 8), ("daily", 7), ("daily", 5), ("weekly", 5), ("daily", 3)]
                .map(|(name, time)| copy(&backup(name, time, 1)))
                .into();
        let gone = outdated(&[], &there, keep, 10);
        assert_eq!(gone, ["daily-0.1.0-5.tar.gz", "daily-0.1.0-3.tar.gz"], "manual ones stay, and so do the newest");
        assert_eq!(outdated(&[backup("daily", 3, 1)], &there, keep, 10), ["daily-0.1.0-5.tar.gz"]);
        assert!(there.iter().any(|copy| copy.backup.kind == Kind::Manual));
    }

    #[tokio::test]
    async fn work_apart_ends_with_its_outcome_even_when_it_panics() {
        assert_eq!(apart(|| async { Ok(5) }).await.unwrap(), 5);
        let ended: Result<(), BackupError> = apart(|| async { panic!("on purpose") }).await;
        assert!(matches!(ended, Err(BackupError::Unknown(_))));
    }
}
