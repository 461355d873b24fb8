//! A backup into the cluster: unpacked and checked beside the running Console, then put in the place of the whole
//! database as one transaction of the cluster while the Console is closed. All members get it as they get any other
//! transaction, so that they have the old state or the new one, whoever dies on the way. Must never touch the database
//! with less than a whole, verified backup of this very version.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use serde_json::json;
use sqlx::{
    ConnectOptions, Connection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode},
};
use tracing::{info, warn};

use super::{
    BackupError, BackupId, Backups, Started, Work,
    archive::{self, Manifest},
    blocking,
    jobs::Job,
    make::check_time,
    members::Way,
    of_backup,
};
use crate::{
    admin::{
        Actor, AdminError, Record, Ticket,
        audit::{self, RECORD},
    },
    clock::unix_time,
    cluster::Role,
    events::{Scope, Severity},
    node::MemberStatus,
    storage::database::{PrimaryDatabase, ReplaceError},
};

/// Longest name of a file that is repeated, in characters.
const LONGEST_LABEL: usize = 160;
/// Free space that must remain on the disk of the data folder, in bytes.
const SPARE: u64 = 64 << 20;

impl From<AdminError> for BackupError {
    fn from(error: AdminError) -> Self {
        match error {
            AdminError::Unknown(why) => Self::Unknown(why),
            other => Self::Refused(other.to_string()),
        }
    }
}

/// What the person who asks for a restore knows and accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// The Console is closed for it.
    pub stop_console: bool,
    /// Anybody who can write where the file lies may have made it: it is not encrypted, although this host has a key.
    pub unencrypted: bool,
}

/// Which backup is restored.
#[derive(Clone, Copy, Debug)]
pub enum RestoreFrom<'a> {
    /// A file of this host.
    File(&'a Path),
    /// One of the folder, by its id.
    Folder(&'a str),
}

impl RestoreFrom<'_> {
    /// What [`Source`] calls it, before anybody has looked at the file.
    fn label(self) -> String {
        let name = match self {
            Self::File(file) => file.file_name().map(|name| name.to_string_lossy()).unwrap_or_default(),
            Self::Folder(id) => id.into(),
        };
        name.chars().filter(|c| !c.is_control()).take(LONGEST_LABEL).collect()
    }
}

/// The file that is restored. Its name may be anything; its content says what it is.
struct Source {
    /// How it is called in messages and in the audit.
    label: String,
    id: Option<BackupId>,
    sealed: bool,
}

impl Source {
    /// Reads the beginning of a file.
    fn of(file: &Path) -> Result<Self, BackupError> {
        if !file.is_file() {
            return Err(BackupError::NotFound(format!("there is no file {}", file.display())));
        }
        let name = file.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let label = RestoreFrom::File(file).label();
        let sealed = archive::is_sealed(file)?.ok_or_else(|| {
            BackupError::Refused(format!(
                "{label} is no backup: one is a .tar.gz or .tar.gz.sealed that `twistcli backup create` or a member has made"
            ))
        })?;
        Ok(Self { id: BackupId::parse(&name), label, sealed })
    }
}

impl Backups {
    /// Begins to put the content of a backup, a file of this host, in the place of the cluster's database.
    ///
    /// # Errors
    /// [`BackupError::Refused`] on a node that is not PRIMARY, without what must be [`Agreed`] to, for a backup of
    /// another version, and while something else is under way. [`BackupError::NotFound`] when it is not on this host;
    /// the text says where it is. [`BackupError::Hangs`] when its disk does not answer. Whether the restore succeeds is
    /// in its outcome.
    pub async fn restore(
        self: &Arc<Self>,
        from: RestoreFrom<'_>,
        agreed: Agreed,
        by: &Actor,
    ) -> Result<Started, BackupError> {
        let record = self.admin.begin(by, of_backup("restore", &from.label())).await;
        let (file, source, job) = match self.begin_restore(from, agreed).await {
            Ok(begun) => begun,
            Err(error) => {
                record.end(audit::Outcome::from(&error)).await;
                return Err(error);
            }
        };
        let (all, started, by) = (self.clone(), Started::from(&*job), by.clone());
        info!(%by, id = job.id(), "a restore begins");
        tokio::spawn(async move {
            let result = all.bring_back(&file, &source, &job, (&by, &record)).await;
            match &result {
                Ok(text) => {
                    info!(%by, id = job.id(), "the backup was restored: {text}");
                    let sentence = format!("the backup {} was restored: {text}", job.id());
                    all.tell(Severity::Warning, Scope::Cluster, sentence);
                }
                Err(error) => {
                    warn!(%by, id = job.id(), %error, "the restore failed");
                    all.tell(Severity::Warning, Scope::Node, format!("the restore of {} failed: {error}", job.id()));
                }
            }
            record.end(audit::Outcome::of(&result)).await;
            all.jobs.end(&job, &result);
        });
        Ok(started)
    }

    async fn begin_restore(
        self: &Arc<Self>,
        from: RestoreFrom<'_>,
        agreed: Agreed,
    ) -> Result<(PathBuf, Source, Arc<Job>), BackupError> {
        self.admin.check_primary()?;
        let file = match from {
            RestoreFrom::File(file) => file.to_owned(),
            RestoreFrom::Folder(id) => self.or_where(id, Way::Here, self.path(id).await).await?,
        };
        let path = file.clone();
        let source = self.access.run(&file, move || Source::of(&path)).await?;
        // Its name may say so already, before anything is unpacked.
        if let Some(id) = &source.id {
            self.check_version(&id.version)?;
        }
        if !source.sealed && self.config.key_file.is_some() && !agreed.unencrypted {
            return Err(BackupError::Refused(format!(
                "{} is not encrypted, although BACKUP_KEY_FILE is set: whoever can write to its folder may have made it; ask again \
                 with --unencrypted if you know where it is from",
                source.label
            )));
        }
        if !agreed.stop_console {
            return Err(BackupError::Refused(
                "the Console serves: a restore closes it for a while and replaces everything in it; ask again with --stop-console"
                    .to_owned(),
            ));
        }
        let job = self.jobs.begin(Work::Restore, source.label.clone())?;
        Ok((file, source, job))
    }

    fn check_version(&self, version: &str) -> Result<(), BackupError> {
        let own = &self.config.version;
        if version == own {
            return Ok(());
        }
        Err(BackupError::Refused(format!(
            "the backup was made by version {version}, and this is {own}: install version {version} on all members, restore, and \
             upgrade afterwards"
        )))
    }

    async fn bring_back(
        self: &Arc<Self>,
        file: &Path,
        source: &Source,
        job: &Arc<Job>,
        (by, record): (&Actor, &Record),
    ) -> Result<String, BackupError> {
        let (all, id) = (self.clone(), source.id.clone());
        // The file may have been renamed: the manifest counts.
        let accept = move |manifest: &Manifest| {
            all.check_version(&manifest.version)?;
            id.map_or(Ok(()), |id| check_time(&id, manifest))?;
            all.check_service(manifest)?;
            all.check_page_size(manifest.page_size)?;
            all.check_room(manifest.bytes(), true)
        };
        let (manifest, _workshop, copy) = self.unpack(file, source.sealed, job, accept).await?;
        job.step("prepares the database", 0);
        prepare(&copy, &source.label, by, record.ticket()).await?;
        // Checked again, while nothing is closed yet: unpacking takes time, and others write meanwhile.
        let (all, bytes) = (self.clone(), manifest.bytes());
        blocking(move || all.check_room(bytes, false)).await?;
        job.step("closes the Console", 0);
        let (all, replacing) = (self.clone(), Arc::clone(job));
        let work = async move {
            let gone = || BackupError::Refused("this node is not PRIMARY any more: nothing was changed".to_owned());
            let database = all.node.serving().borrow().clone().ok_or_else(gone)?;
            blocking(move || replace(&database, &copy, &replacing)).await
        };
        self.admin.with_console_closed(&by.name, "a restore", work).await??;
        let bytes = manifest.bytes();
        Ok(format!(
            "all members have the database of {} at raft index {} ({bytes} bytes)",
            manifest.node, manifest.index
        ))
    }

    /// The databases of a service cannot be put back as one with the Console's.
    fn check_service(&self, manifest: &Manifest) -> Result<(), BackupError> {
        let Some(service) = manifest.service.as_ref().filter(|service| !service.databases.is_empty()) else {
            return Ok(());
        };
        let paths: Vec<_> = service.databases.iter().map(|database| database.path.as_str()).collect();
        Err(BackupError::Refused(format!(
            "the backup also has databases of the service ({}), which this version does not put back: twistcli backup \
             unpack makes ordinary files of them; nothing was changed",
            paths.join(", ")
        )))
    }

    fn check_page_size(&self, page_size: u32) -> Result<(), BackupError> {
        let here = self.node.serving().borrow().as_ref().map(|database| database.page_size());
        match here.filter(|own| *own != page_size) {
            None => Ok(()),
            Some(own) => Err(BackupError::Refused(format!(
                "the backup has pages of {page_size} bytes, and this cluster's database has {own}: found a new cluster with \
                 DATABASE_PAGE_SIZE={page_size}, and restore it there"
            ))),
        }
    }

    /// Checks that there is room for the transaction on all members that vote, and on this host also for the copy, if
    /// that is still `to_unpack`.
    fn check_room(&self, bytes: u64, to_unpack: bool) -> Result<(), BackupError> {
        let data = &self.config.data;
        let status = self.node.status().borrow().clone();
        // Never opened here: closing it would take SQLite's locks away.
        let now = std::fs::metadata(data.join("database/console.db")).map(|found| found.len()).unwrap_or_default();
        let mut others = status.members.iter().filter(|member| member.voter && member.id != status.node);
        others.try_for_each(|member| check_member(member, needed_elsewhere(bytes, now)))?;
        let device = |path: &Path| std::fs::metadata(path).map(|found| found.dev()).ok();
        let needed = needed_here(bytes, now, to_unpack && device(data) == device(&self.config.folder));
        let free = super::folder::free(data)?;
        if free < needed {
            return Err(BackupError::Refused(format!(
                "{needed} bytes are needed in the data folder {} for the restore, and {free} are free: free some space there; \
                 nothing was changed",
                data.display()
            )));
        }
        Ok(())
    }
}

/// Refuses when a member has no room. It takes the transaction into its raft log and its database: without the space it
/// would hold everybody up while the Console is closed.
fn check_member(member: &MemberStatus, needed: u64) -> Result<(), BackupError> {
    let name = &member.name;
    if matches!(member.state, Role::Down | Role::Unknown) {
        return Err(BackupError::Refused(format!(
            "{name} is not heard of, so nobody knows whether it has the space for the restore: start it, or remove it from the \
             cluster; nothing was changed"
        )));
    }
    if member.full {
        return Err(BackupError::Refused(format!(
            "the disk of {name} is full: free some space there first, or it cannot take the restore; nothing was changed"
        )));
    }
    // An older program does not tell: if it has no room, the restore is given up.
    match member.free.filter(|free| *free < needed) {
        None => Ok(()),
        Some(free) => Err(BackupError::Refused(format!(
            "{needed} bytes are needed in the data folder of {name} for the restore, and {free} are free: free some space there; \
             nothing was changed"
        ))),
    }
}

/// Bytes that a restore takes on another member, whose database has `now`: in the raft log, and in the database.
fn needed_elsewhere(bytes: u64, now: u64) -> u64 {
    bytes.saturating_add(bytes.saturating_sub(now)).saturating_add(SPARE)
}

/// Bytes that it takes on this host: the `-wal` file is added, and the unpacked copy if that lies on the same file
/// system.
fn needed_here(bytes: u64, now: u64, copy: bool) -> u64 {
    (1 + u64::from(copy)).saturating_mul(bytes).saturating_add(needed_elsewhere(bytes, now))
}

fn replace(database: &PrimaryDatabase, copy: &Path, job: &Arc<Job>) -> Result<(), BackupError> {
    let size = u64::from(database.page_size());
    let (mut before, mut total_before) = (0, 0);
    let (telling, sent_before) = (Arc::clone(job), AtomicU32::new(0));
    // A step of its own: from here on nothing waits for this host's disk alone.
    let sent = move |sent: u32, total: u32| {
        let before = sent_before.swap(sent, Ordering::Relaxed);
        if before == 0 {
            telling.step("sends it to the members", u64::from(total) * size);
        }
        telling.advance(u64::from(sent.saturating_sub(before)) * size);
    };
    database.gate().tell_sent(Some(Box::new(sent)));
    let done = database.replace(copy, |done, total| {
        if total != total_before {
            total_before = total;
            job.step("replaces the database of the cluster", u64::from(total) * size);
        }
        job.advance(u64::from(done.saturating_sub(before)) * size);
        before = done;
        true
    });
    database.gate().tell_sent(None);
    done.map_err(|error| match error {
        ReplaceError::Refused(why) => BackupError::Refused(format!("{why}; nothing was changed")),
        ReplaceError::Unknown(why) => BackupError::Unknown(format!(
            "{why}; this node lost its role meanwhile: the members have the whole backup or the whole old state; find out which \
             before you try again"
        )),
    })
}

/// Makes the unpacked database what the cluster gets: nobody is logged in, and the audit tells where it came from. Both
/// are part of the one transaction.
async fn prepare(copy: &Path, id: &str, by: &Actor, ticket: Option<&Ticket>) -> Result<(), BackupError> {
    let failed =
        |error: sqlx::Error| BackupError::Refused(format!("the unpacked database cannot be prepared: {error}"));
    // A journal beside the file would have to be moved with it.
    let options = SqliteConnectOptions::new()
        .filename(copy)
        .create_if_missing(false)
        .journal_mode(SqliteJournalMode::Delete)
        .disable_statement_logging();
    let mut connection = options.connect().await.map_err(failed)?;
    let result = note(&mut connection, id, by, ticket).await;
    connection.close().await.map_err(failed)?;
    result.map_err(failed)
}

async fn note(
    connection: &mut sqlx::SqliteConnection,
    id: &str,
    by: &Actor,
    ticket: Option<&Ticket>,
) -> Result<(), sqlx::Error> {
    let mut writing = connection.begin().await?;
    sqlx::query("DELETE FROM tokens").execute(&mut *writing).await?;
    // As `console::audits` writes it; a version restores its own backups only, so that the columns are known. The row
    // that was written when it began goes with the database that is replaced: this one takes its place, under the same
    // ticket.
    let insert =
        "INSERT INTO audits (time, user, source, action, what, ok, difference) VALUES (?, ?, ?, 'restore', ?, 1, ?)";
    let (time, act) = (unix_time() as i64, of_backup("restore", id));
    let ticket = ticket.map(|Ticket(ticket)| json!({ RECORD: { "ticket": ticket, "outcome": "done" } }));
    let insert = sqlx::query(insert).bind(time).bind(by.name.clone()).bind(by.source.clone()).bind(act.what);
    insert.bind(ticket.unwrap_or_default().to_string()).execute(&mut *writing).await?;
    writing.commit().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_is_the_raft_log_the_growth_the_wal_and_the_copy() {
        assert_eq!((needed_elsewhere(100, 100), needed_elsewhere(100, 30)), (100 + SPARE, 170 + SPARE));
        assert_eq!((needed_here(100, 30, true), needed_here(100, 900, false)), (370 + SPARE, 200 + SPARE));
        assert_eq!(needed_here(u64::MAX, 0, true), u64::MAX, "a manifest may claim anything");
    }

    #[test]
    fn a_member_without_space_or_without_a_word_is_in_the_way() {
        let member: MemberStatus = serde_json::from_value(serde_json::json!({
            "id": 2, "name": "node2", "address": "127.0.0.2:8086", "state": "SECONDARY", "epoch": 1, "applied": 2, "lag": 0,
            "lease_ms": null, "last_contact_ms": 5, "version": "0.1.0", "voter": true, "sync": null, "free": 1000
        }))
        .unwrap();
        let refused = |member: &MemberStatus, needed| check_member(member, needed).map_err(|error| error.to_string());
        assert_eq!(refused(&member, 1000), Ok(()));
        assert!(refused(&member, 1001).unwrap_err().contains("the data folder of node2"));
        assert_eq!(refused(&MemberStatus { free: None, ..member.clone() }, 1001), Ok(()), "an older program");
        assert!(refused(&MemberStatus { full: true, ..member.clone() }, 0).unwrap_err().contains("is full"));
        for state in [Role::Down, Role::Unknown] {
            assert!(refused(&MemberStatus { state, ..member.clone() }, 0).unwrap_err().contains("not heard of"));
        }
    }
}
