//! What a stopped node has: its identity, its raft log, its database, and what that means for what may be lost. Reads
//! only, apart from the repair of a torn end of the raft log that every start makes.

use std::{
    fmt::Write,
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use nix::sys::statvfs::statvfs;
use raft::eraftpb::ConfState;

use super::{RecoverError, switch::STAGING};
use crate::{
    cluster::{Member, Membership, feature_level, level::outdated, program_version},
    config::Config,
    storage::{
        DataDir, Identity,
        checkpoint::Record,
        folder::{
            catalogue::Catalogue,
            places::{CATALOGUE, FOLDER as SERVICE},
        },
        make_private_dir,
        membership::StoredMembership,
        memory::{LOG, SCRATCH},
        raft_log::{LogError, Options, RaftLog, RealDisk},
        snapshot::Ready,
        transaction::CONSOLE_DATABASE,
    },
};

/// The database file and its checkpoint record, in `<data>/database`.
pub(super) const DATABASE: &str = "console.db";
pub(super) const CHECKPOINT: &str = "console.checkpoint";

/// A stopped node's data.
pub(super) struct Survivor {
    pub data: PathBuf,
    pub identity: Identity,
    pub membership: Membership,
    pub log: RaftLog,
    /// The last checkpoint of the database.
    pub checkpoint: Record,
    /// Bytes of the database file.
    pub database_bytes: u64,
    /// Why the raft log cannot be used; `log` is empty then.
    lost: Option<String>,
    /// When the raft log was last written.
    written: Option<SystemTime>,
    /// Bytes that the recovery needs, and bytes that are free.
    needed: u64,
    free: u64,
}

/// How the raft log of this configuration is laid out.
pub(super) fn log_options(config: &Config) -> Options {
    Options { segment_bytes: config.raft_log_segment_bytes as usize, helper: false, ..Options::default() }
}

impl Survivor {
    /// Looks at the data folder.
    ///
    /// # Errors
    /// When there is nothing to recover, or it is damaged.
    pub fn examine(data: &DataDir, config: &Config) -> Result<Self, RecoverError> {
        let path = data.path().to_owned();
        let identity = data.identity()?;
        let unusable = |what: &str| RecoverError::Unusable(format!("{}: {what}", path.display()));
        let membership = StoredMembership::read(&path)
            .map_err(RecoverError::io("read membership.json"))?
            .map_or_else(|| identity.membership.clone(), |configuration| configuration.membership);
        if membership.shared.level > feature_level() {
            let needed = (membership.shared.level_version.as_str(), membership.shared.level);
            return Err(RecoverError::Unusable(outdated("this host", (program_version(), feature_level()), needed)));
        }
        if Ready::find(&path).map_err(|error| unusable(&error.to_string()))?.is_some() {
            return Err(unusable("a snapshot waits to be installed: start and stop twistlockd once, then come back"));
        }
        let service =
            Catalogue::read(&path.join(SERVICE).join(CATALOGUE)).map_err(RecoverError::io("read catalogue.json"))?;
        if service.iter().next().is_some() {
            return Err(unusable(
                "a service has databases here (service/files), and this version makes a new cluster of the Console's alone: \
                 keep a copy of the whole folder, and recover with a version that takes them along",
            ));
        }
        let folder = path.join("raft-log");
        let written = newest(&folder);
        let voters = membership.voters().collect();
        let conf = ConfState { voters, ..ConfState::default() };
        let owner = (identity.cluster, identity.node);
        let database = path.join("database");
        let checkpoint = Record::read(&database.join(CHECKPOINT), CONSOLE_DATABASE)
            .map_err(RecoverError::io("read the checkpoint record"))?;
        let database_bytes = fs::metadata(database.join(DATABASE)).map_or(0, |file| file.len());
        let open = |folder: &Path, create| {
            RaftLog::open(folder, owner, conf.clone(), Options { create, ..log_options(config) }, RealDisk)
        };
        // An empty one must not take its place: the member would no longer know that it lost its log.
        let found = open(&folder, false).map_err(|error| error.to_string());
        let fits =
            |log: &RaftLog| checkpoint.index <= log.last_index() && log.first_index() <= checkpoint.index.max(1) + 1;
        let found = found.and_then(|log| if fits(&log) { Ok(log) } else { Err("it ends before the database".into()) });
        let (log, lost) = match found {
            Ok(log) => (log, None),
            Err(why) if checkpoint.index > 1 => {
                (without_log(&path, &checkpoint, conf.clone(), |folder| open(folder, true))?, Some(why))
            }
            Err(why) => return Err(unusable(&format!("its raft log cannot be used ({why}), and it has no database"))),
        };
        // About: compressed images take more space than their entries. A full disk ends the recovery without harm.
        let segments = 3 * config.raft_log_segment_bytes;
        let needed = database_bytes + log.size_bytes() + segments + (1 << 20);
        let free = statvfs(&path).map(|fs| fs.blocks_available() * fs.fragment_size());
        let free =
            free.map_err(|errno| RecoverError::Io { what: "look at the file system".into(), error: errno.into() })?;
        Ok(Self { data: path, identity, membership, log, checkpoint, database_bytes, lost, written, needed, free })
    }

    /// What the administrator types: the beginning of the cluster's id.
    pub fn cluster_name(&self) -> String {
        self.identity.cluster.to_string()[..8].to_owned()
    }

    /// This node among the members.
    pub fn member(&self) -> Option<&Member> {
        self.membership.get(self.identity.node).or_else(|| self.identity.membership.get(self.identity.node))
    }

    /// Checks that there is room for what is to be made beside the old data.
    ///
    /// # Errors
    /// [`RecoverError::Space`] when there is not: it says how much is needed.
    pub fn check_space(&self) -> Result<(), RecoverError> {
        if self.free >= self.needed {
            return Ok(());
        }
        Err(RecoverError::Space { path: self.data.clone(), needed: self.needed, free: self.free })
    }

    /// What will happen and what may be lost.
    pub fn explain(&self) -> String {
        let hard = self.log.hard_state();
        let last = self.log.last_index();
        let others: Vec<_> =
            self.membership.roster.members.iter().filter(|member| member.id != self.identity.node).collect();
        let list = |what: fn(&&Member) -> String| others.iter().map(what).collect::<Vec<_>>().join(" and ");
        let names = if others.is_empty() { "nobody".to_owned() } else { list(|member| member.name.clone()) };
        let written = self.written.map_or_else(
            || "at an unknown time".to_owned(),
            |time| {
                jiff::Timestamp::try_from(time).map_or_else(
                    |_| "at an unknown time".to_owned(),
                    |time| time.strftime("at %Y-%m-%d %H:%M:%S UTC").to_string(),
                )
            },
        );
        let mut text = format!(
            "This makes a new cluster of one member from the data of {} (node {} of cluster {}).\n\n\
             \u{20} database    up to index {} at its last checkpoint, {} bytes\n\
             \u{20} raft log    up to index {last} in epoch {}, last written {written}\n\
             \u{20} given up    {}\n\n\
             WHAT MAY BE LOST\n\
             \u{20} Transactions that {names} acknowledged without this node: a majority is two of three, and nobody can\n\
             \u{20} tell from here how many there are. If another member can still be started, recover the one whose raft\n\
             \u{20} log goes furthest.\n",
            self.identity.name,
            self.identity.node,
            self.identity.cluster,
            self.checkpoint.index,
            self.database_bytes,
            hard.term,
            list(|member| format!("{} ({})", member.name, member.place())),
        );
        if let Some(why) = &self.lost {
            let _ = writeln!(
                text,
                "  Everything behind the last checkpoint of the database: the raft log of this node cannot be used ({why})."
            );
        }
        if last > hard.commit {
            let _ = writeln!(
                text,
                "  Index {} to {last}: not known to be committed. They may have been acknowledged, so they are kept; a\n  \
                 client that got no answer may find that its write was made after all.",
                hard.commit + 1
            );
        }
        let _ = write!(
            text,
            "\nWHAT MUST BE TRUE\n\
             \u{20} {names} must be off, and must never be started again with their old data folders: together they would\n\
             \u{20} elect a primary of the old cluster, and two Consoles would serve different data. The new cluster\n\
             \u{20} refuses them.\n\n\
             WHAT IS DONE\n\
             \u{20} A copy of the database gets everything that the raft log has. Cluster id, authority, certificates and\n\
             \u{20} raft log are made anew; the names and the certificate that the Consoles were given and the webhooks stay.\n\
             \u{20} The old files are moved to a folder before-recover-..., where they stay, in\n\
             \u{20} {}\n\
             \u{20} Needed: about {} bytes; free: {} bytes.\n",
            self.data.display(),
            self.needed,
            self.free
        );
        text
    }
}

/// The staging folder of a recovery in this data folder.
pub(super) fn staging(data: &Path) -> PathBuf {
    data.join(STAGING)
}

/// An empty raft log that begins behind the database's last checkpoint, for a node whose own cannot be used.
fn without_log(
    data: &Path,
    checkpoint: &Record,
    conf: ConfState,
    open: impl Fn(&Path) -> Result<RaftLog, LogError>,
) -> Result<RaftLog, RecoverError> {
    let failed = |error| RecoverError::Io { what: "make room for an empty raft log".into(), error };
    let folder = data.join(SCRATCH);
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    make_private_dir(&folder).map_err(failed)?;
    let begin = || {
        let log = open(&folder.join(LOG))?;
        log.reset(checkpoint.index, 1, conf).map(|()| log)
    };
    begin().map_err(|error| failed(io::Error::other(error)))
}

fn newest(folder: &Path) -> Option<SystemTime> {
    let files = fs::read_dir(folder).ok()?;
    files.filter_map(|file| file.ok()?.metadata().ok()?.modified().ok()).max()
}
