//! A new backup: copy, check, pack, read again, and only then its name. And the same checks for a backup that is there.
//! Must never leave a file under a backup's name that was not read again to its end.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use sqlx::{ConnectOptions, Connection, sqlite::SqliteConnectOptions};
use tracing::{info, warn};

use super::{
    BackupError, BackupId, Backups, Kind, Started, Work,
    archive::{self, Content, Described, Manifest, Service},
    blocking,
    cipher::Secret,
    copy::{CopiedAll, Pace, copy, place},
    folder::{Workshop, create},
    jobs::Job,
    members::Way,
    name, of_backup,
};
use crate::{
    admin::{Actor, Outcome, Record},
    clock::unix_time,
    events::{self, Event, Scope, Severity},
    node::Warning,
    scheduling,
    storage::{
        pacer::{self, PacedFile, Pacer},
        transaction::CONSOLE_DATABASE,
    },
    telemetry::{BACKUP_FAILURES, BACKUP_LAST_SUCCESS},
};

/// Name in the workshop.
const ARCHIVE: &str = "archive";
/// Pieces in which the copy is packed, in bytes.
const PIECE: u64 = 1 << 20;

impl Backups {
    /// Begins a backup that an administrator wants.
    ///
    /// # Errors
    /// [`BackupError::Name`] for a name that no backup can have, [`BackupError::Refused`] while something else is under
    /// way. Whether the backup succeeds is in its outcome.
    pub async fn create(self: &Arc<Self>, name: &str, by: &Actor) -> Result<Started, BackupError> {
        let record = self.admin.begin(by, of_backup("create", name)).await;
        let begun = name::check_name(name).and_then(|()| self.begin_backup(name));
        let (job, id) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                record.end(Outcome::from(&error)).await;
                return Err(error);
            }
        };
        info!(%by, id = job.id(), "a backup begins");
        let (all, started) = (self.clone(), Started::from(&*job));
        tokio::spawn(async move { all.make(&job, &id, Some(record)).await });
        Ok(started)
    }

    /// Begins to check a backup: opens it, compares its checksums, and lets SQLite look through the database.
    ///
    /// # Errors
    /// [`BackupError::NotFound`] when it is not on this host; the text says where it is. [`BackupError::Hangs`] when
    /// the folder does not answer, [`BackupError::Refused`] while something else is under way.
    pub async fn verify(self: &Arc<Self>, id: &str, by: &Actor) -> Result<Started, BackupError> {
        let record = self.admin.begin(by, of_backup("verify", id)).await;
        let (path, id, job) = match self.begin_verification(id).await {
            Ok(begun) => begun,
            Err(error) => {
                record.end(Outcome::from(&error)).await;
                return Err(error);
            }
        };
        info!(%by, id = job.id(), "a backup is verified");
        let (all, started) = (self.clone(), Started::from(&*job));
        tokio::spawn(async move {
            let result = all.unpack(&path, id.sealed, &job, move |manifest| check_time(&id, manifest)).await;
            let result = result.map(|(manifest, ..)| {
                let (node, index, besides) = (&manifest.node, manifest.index, manifest.besides());
                format!("the backup is good: the database of {node} at raft index {index}{besides}")
            });
            match &result {
                Ok(_) => info!(id = job.id(), "the backup is good"),
                Err(error) => warn!(id = job.id(), %error, "the backup could not be verified"),
            }
            record.end(Outcome::of(&result)).await;
            all.jobs.end(&job, &result);
        });
        Ok(started)
    }

    async fn begin_verification(&self, id: &str) -> Result<(PathBuf, BackupId, Arc<Job>), BackupError> {
        let path = self.or_where(id, Way::There(&format!("verify {id}")), self.path(id).await).await?;
        let id = BackupId::read(id)?;
        let job = self.jobs.begin(Work::Verify, id.to_string())?;
        Ok((path, id, job))
    }

    /// Takes the turn for a new backup of this name.
    pub(super) fn begin_backup(&self, name: &str) -> Result<(Arc<Job>, BackupId), BackupError> {
        let (name, version, sealed) = (name.to_owned(), self.config.version.clone(), self.config.key_file.is_some());
        let id = BackupId { name, version, time: unix_time(), sealed };
        Ok((self.jobs.begin(Work::Create, id.to_string())?, id))
    }

    /// Makes the backup whose turn it is. True if there is one now. `record` belongs to whoever asked for it, if
    /// anybody did.
    pub(super) async fn make(self: &Arc<Self>, job: &Arc<Job>, id: &BackupId, record: Option<Record>) -> bool {
        let (all, step_by_step, name) = (self.clone(), Arc::clone(job), id.clone());
        // Whoever commits goes before all of it.
        let made = scheduling::apart("backup", move || async move { all.steps(&step_by_step, &name).await }).await;
        let lost = |error| Err(BackupError::Unknown(format!("it ended without an outcome: {error}")));
        let result = made.unwrap_or_else(lost);
        if let Some(record) = record {
            record.end(Outcome::of(&result)).await;
        }
        match &result {
            Ok(_) => {
                // Without automatic ones nobody waits for the next.
                if self.config.enabled {
                    metrics::gauge!(BACKUP_LAST_SUCCESS).set(id.time as f64);
                }
                self.node.warn(Warning::Backup, None);
                self.tell(Severity::Info, Scope::Local, format!("the backup {} is good", job.id()));
            }
            Err(error) => {
                warn!(id = job.id(), %error, "the backup failed");
                metrics::counter!(BACKUP_FAILURES).increment(1);
                let kind = if id.kind() == Kind::Manual { "the last backup" } else { "the automatic backup" };
                let sentence = format!("{kind} of this host failed: {error}");
                self.tell(Severity::Warning, Scope::Node, sentence.clone());
                self.node.warn(Warning::Backup, Some(sentence));
            }
        }
        let outcome = self.jobs.end(job, &result);
        if outcome.ok {
            self.offsite.wake();
            info!(id = job.id(), ms = outcome.ms, "the backup is done: {}", outcome.text);
        }
        outcome.ok
    }

    /// Records an event.
    pub(super) fn tell(&self, severity: Severity, scope: Scope, sentence: String) {
        self.events.record(Event::new(events::Kind::Backup, severity, sentence).scope(scope));
    }

    async fn steps(self: &Arc<Self>, job: &Arc<Job>, id: &BackupId) -> Result<String, BackupError> {
        let (all, database) = (self.clone(), self.config.data.join("database/console.db"));
        let (workshop, secret) = blocking(move || {
            let workshop = all.folder.workshop()?;
            // Never opened here: closing it would take SQLite's locks away.
            let length = std::fs::metadata(&database).map_err(BackupError::io("look at", &database))?.len();
            // The copy, and an archive that could not be compressed.
            all.folder.check_space(2 * length)?;
            Ok((Arc::new(workshop), all.secret()?))
        })
        .await?;
        let copied = copy(&self.node, &workshop, job, &|bytes| self.folder.check_space(2 * bytes)).await?;
        job.step("lets SQLite check the copies", 0);
        for (id, copied) in &copied.databases {
            check_copy(&workshop, *id, copied.record.pages).await?;
        }
        let manifest = self.manifest(id, &copied)?;
        let (all, id, packing) = (self.clone(), id.clone(), Arc::clone(job));
        blocking(move || all.pack(&workshop, &manifest, secret.as_ref(), &id, &packing)).await
    }

    fn manifest(&self, id: &BackupId, copied: &CopiedAll) -> Result<Manifest, BackupError> {
        let status = self.node.status().borrow().clone();
        let missing = |id| BackupError::Refused(format!("database {id} was not copied"));
        let console = copied.databases.get(&CONSOLE_DATABASE).ok_or_else(|| missing(CONSOLE_DATABASE))?;
        let record = &console.record;
        let describe = |(id, path): (u32, &Path)| {
            let found = copied.databases.get(&id).ok_or_else(|| missing(id))?;
            Ok(Described {
                id,
                path: path.display().to_string(),
                page_size: found.record.page_size,
                pages: found.record.pages,
                checksum: format!("{:016x}", found.record.checksum),
                sha256: found.sha256.clone(),
            })
        };
        let catalogue = &copied.catalogue;
        let service = match catalogue.is_untouched() {
            true => None,
            false => Some(Service {
                changed: catalogue.changed(),
                next: catalogue.next(),
                databases: catalogue.iter().map(describe).collect::<Result<_, BackupError>>()?,
            }),
        };
        Ok(Manifest {
            format: Manifest::format(service.is_some()),
            version: id.version.clone(),
            name: id.name.clone(),
            cluster: status.cluster.to_string(),
            node: status.name.clone(),
            index: record.index,
            epoch: status.epoch,
            created: id.time,
            page_size: record.page_size,
            pages: record.pages,
            checksum: format!("{:016x}", record.checksum),
            sha256: console.sha256.clone(),
            service,
        })
    }

    /// Packs the copies, reads the archive again to its end, and gives it its name.
    fn pack(
        &self,
        workshop: &Workshop,
        manifest: &Manifest,
        secret: Option<&Secret>,
        id: &BackupId,
        job: &Job,
    ) -> Result<String, BackupError> {
        let to = workshop.join(ARCHIVE);
        job.step("compresses the copies", manifest.bytes());
        let open = |content: &Content| {
            let inner = std::fs::File::open(place(workshop, content.id))?;
            Ok(Paced { inner, job, pace: Pace::new(), since: 0 })
        };
        archive::write(create(&to)?, manifest, open, secret).map_err(BackupError::io("write", &to))?;
        job.step("reads the backup again", manifest.bytes());
        let mut pace = Pace::new();
        let found = archive::read(
            &to,
            id.sealed,
            secret,
            |_| Ok(()),
            |_, chunk| {
                job.advance(chunk.len() as u64);
                pace.rest();
                Ok(())
            },
        )?;
        if &found != manifest {
            return Err(BackupError::Damaged("its manifest is not the one that was written".to_owned()));
        }
        let length = std::fs::metadata(&to).map_err(BackupError::io("look at", &to))?.len();
        self.folder.publish(&to, id)?;
        for content in manifest.contents()? {
            let from = place(workshop, content.id);
            pacer::remove(&from).map_err(BackupError::io("delete", &from))?;
        }
        Ok(format!(
            "{length} bytes of the database of {} at raft index {} ({} bytes){}",
            manifest.node,
            manifest.index,
            manifest.console_bytes(),
            manifest.besides()
        ))
    }

    /// Unpacks a backup and checks all of it. The databases lie in the workshop afterwards: returns where the
    /// Console's is.
    pub(super) async fn unpack(
        self: &Arc<Self>,
        path: &Path,
        sealed: bool,
        job: &Arc<Job>,
        accept: impl FnOnce(&Manifest) -> Result<(), BackupError> + Send + 'static,
    ) -> Result<(Manifest, Workshop, PathBuf), BackupError> {
        let (all, path, unpacking) = (self.clone(), path.to_owned(), Arc::clone(job));
        let (manifest, workshop) = blocking(move || {
            let workshop = all.folder.workshop()?;
            // A lost key must not block a backup that was never encrypted.
            let secret = if sealed { all.secret()? } else { None };
            let mut open: Option<(u32, PathBuf, PacedFile)> = None;
            let synced = |open: Option<(u32, PathBuf, PacedFile)>| match open {
                Some((_, to, file)) => file.sync_all().map_err(BackupError::io("write", &to)),
                None => Ok(()),
            };
            let accept = |manifest: &Manifest| {
                accept(manifest)?;
                unpacking.step("reads the backup", manifest.bytes());
                all.folder.check_space(manifest.bytes())
            };
            let mut pace = Pace::new();
            let manifest = archive::read(&path, sealed, secret.as_ref(), accept, |content, chunk| {
                if open.as_ref().is_none_or(|(id, ..)| *id != content.id) {
                    synced(open.take())?;
                    let to = place(&workshop, content.id);
                    // Without rests: those after each piece are enough.
                    let file = PacedFile::new(create(&to)?, Pacer::new(Duration::ZERO));
                    open = Some((content.id, to, file));
                }
                let Some((_, to, file)) = &mut open else { return Ok(()) };
                io::Write::write_all(file, chunk).map_err(BackupError::io("write", to))?;
                unpacking.advance(chunk.len() as u64);
                pace.rest();
                Ok(())
            })?;
            synced(open)?;
            Ok((manifest, workshop))
        })
        .await?;
        job.step("lets SQLite check the databases", 0);
        for content in manifest.contents()? {
            check_copy(&workshop, content.id, content.record.pages).await?;
        }
        let copy = place(&workshop, CONSOLE_DATABASE);
        Ok((manifest, workshop, copy))
    }
}

/// Refuses a backup of another time under this name: somebody would restore it as if it were this one.
pub(super) fn check_time(id: &BackupId, manifest: &Manifest) -> Result<(), BackupError> {
    if id.time == manifest.created {
        return Ok(());
    }
    Err(BackupError::Damaged(format!(
        "its name says that it was made at {}, and its manifest says {} (seconds since 1970): it is another one under this name",
        id.time, manifest.created
    )))
}

/// Reads at a pace that leaves time to others, and tells how far it is.
struct Paced<'a> {
    inner: std::fs::File,
    job: &'a Job,
    pace: Pace,
    since: u64,
}

impl Read for Paced<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(bytes)?;
        self.job.advance(count as u64);
        self.since += count as u64;
        if self.since >= PIECE {
            self.since = 0;
            self.pace.rest();
        }
        Ok(count)
    }
}

/// Lets SQLite look through a copy of so many pages. What it cannot judge of a service's database, as one that needs an
/// extension of its application, is what all members have: their checksums say so.
async fn check_copy(workshop: &Workshop, id: u32, pages: u32) -> Result<(), BackupError> {
    match check_integrity(&place(workshop, id)).await {
        Err(Checked::Unreadable(why)) if id != CONSOLE_DATABASE => {
            if pages > 0 {
                warn!(
                    database = id,
                    why, "SQLite cannot look through the copy of a service's database; it is kept as it is"
                );
            }
            Ok(())
        }
        Err(Checked::Unsound(why) | Checked::Unreadable(why)) => {
            let which = if id == CONSOLE_DATABASE { "its database".to_owned() } else { format!("database {id}") };
            Err(BackupError::Damaged(format!("SQLite finds in {which}: {why}")))
        }
        Ok(()) => Ok(()),
    }
}

/// What SQLite finds.
enum Checked {
    Unsound(String),
    Unreadable(String),
}

/// Lets SQLite look through a database that nobody else has open.
async fn check_integrity(path: &Path) -> Result<(), Checked> {
    // Immutable: not even a lock or a WAL beside it.
    let options =
        SqliteConnectOptions::new().filename(path).read_only(true).immutable(true).disable_statement_logging();
    let found: Result<Vec<String>, sqlx::Error> = async {
        let mut connection = options.connect().await?;
        let found = sqlx::query_scalar("PRAGMA integrity_check(10)").fetch_all(&mut connection).await;
        connection.close().await?;
        found
    }
    .await;
    match found {
        Ok(found) if found == ["ok"] => Ok(()),
        Ok(found) => Err(Checked::Unsound(found.join("; "))),
        Err(error) => Err(Checked::Unreadable(error.to_string())),
    }
}
