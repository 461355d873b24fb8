//! A service's databases in a folder that is served through FUSE: SQLite without any of our code in it, and what the
//! members have. Needs root and /dev/fuse.

mod kills;
mod modes;
mod refusals;
mod whole;
mod workload;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::unistd::{getegid, geteuid};
use tempfile::TempDir;
use twistlock_ha::storage::{
    Replicator,
    checkpoint::Saving,
    folder::{Folder, FolderConfig, Trace, members::Members, sqlite::Registry},
};

use super::support::{Log, Sql};

/// All journal modes that can be replicated.
const MODES: [&str; 4] = ["WAL", "DELETE", "TRUNCATE", "PERSIST"];

/// One member: its folder of the service.
struct Member {
    root: PathBuf,
    members: Members,
    next: u64,
}

impl Member {
    fn open(root: PathBuf, log: &Log) -> Self {
        let members = Members::open(&root, log.last_index()).unwrap();
        let next = members.applied() + 1;
        Self { root, members, next }
    }

    fn follow(&mut self, log: &Log) {
        while let Some((term, payload)) = log.entry(self.next) {
            match payload.as_slice() {
                [] => self.members.apply_empty(self.next, term).unwrap(),
                payload => self.members.apply(self.next, term, payload, log).unwrap(),
            }
            self.next += 1;
        }
    }
}

/// A primary that serves the folder, and a member that follows.
struct Site {
    root: TempDir,
    log: Arc<Log>,
    primary: Member,
    follower: Member,
    registry: Option<Arc<Registry>>,
    folder: Option<Folder>,
    /// Who the service runs as: user and group.
    owner: (u32, u32),
}

impl Site {
    fn new() -> Self {
        assert!(
            geteuid().is_root() && Path::new("/dev/fuse").exists(),
            "this test mounts a folder: run it as root where /dev/fuse is"
        );
        let (root, log) = (tempfile::tempdir().unwrap(), Log::new());
        fs::create_dir(root.path().join("mount")).unwrap();
        let member = |name| Member::open(root.path().join(name), &log);
        let (primary, follower) = (member("primary"), member("follower"));
        let owner = (geteuid().as_raw(), getegid().as_raw());
        Self { root, log, primary, follower, registry: None, folder: None, owner }
    }

    fn serving() -> Self {
        let mut site = Self::new();
        site.serve();
        site
    }

    /// A new epoch begins.
    fn serve(&mut self) {
        let log: Arc<dyn Replicator> = Arc::<Log>::clone(&self.log);
        self.serve_by(log);
    }

    fn serve_by(&mut self, replicator: Arc<dyn Replicator>) {
        self.serve_traced(replicator, None);
    }

    fn serve_traced(&mut self, replicator: Arc<dyn Replicator>, trace: Option<Trace>) {
        let term = self.log.new_term();
        self.primary.follow(&self.log);
        let registry = self.primary.members.promote(term, replicator).unwrap();
        registry.prepare(self.owner).unwrap();
        let config = FolderConfig { backing: self.primary.members.files(), mount: self.root.path().join("mount") };
        self.folder = Some(Folder::mount_traced(&config, Some(Arc::clone(&registry)), trace).unwrap());
        self.registry = Some(registry);
    }

    /// All that can be saved of what is committed up to this index is saved.
    fn checkpoint(&mut self, committed: u64) {
        let (members, mut savings) = (&mut self.primary.members, Vec::new());
        members.note_committed(committed);
        members.begin_checkpoint(&mut savings).unwrap();
        savings.into_iter().map(Saving::save).for_each(|saved| members.saved(saved).unwrap());
    }

    /// The epoch ends, and this member follows from its checkpoints.
    fn end(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        let members = &mut self.primary.members;
        assert!(members.close(Instant::now()).is_err(), "the folder is served");
        self.folder.take().unwrap().unmount(deadline).unwrap();
        self.registry = None;
        members.close(deadline).unwrap();
        members.reopen(&|| true).unwrap();
        self.primary.next = members.applied() + 1;
        self.primary.follow(&self.log);
    }

    fn registry(&self) -> &Registry {
        self.registry.as_ref().unwrap()
    }

    fn refusal(&self) -> String {
        self.registry().passage().last_refusal().unwrap_or_default()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("mount").join(name)
    }

    fn below(&self, name: &str) -> PathBuf {
        self.primary.members.files().join(name)
    }

    /// A connection that knows nothing of us, which makes the database if there is none.
    fn open(&self, name: &str) -> Sql {
        let path = self.path(name);
        if !path.exists() {
            File::create_new(&path).unwrap();
        }
        Sql::open_with(&path, None).unwrap()
    }

    /// Once nobody has a database open, the files of both members are equal, and SQLite finds them sound.
    fn compare(&mut self) {
        self.follower.follow(&self.log);
        let registry = self.registry();
        for database in self.follower.members.iter() {
            database.verify().unwrap();
            let path = self.follower.members.catalogue().path(database.id()).unwrap().to_owned();
            let guarded = registry.all().into_iter().find(|guarded| guarded.path() == path).unwrap();
            assert_eq!(guarded.behind(), 0, "{}", path.display());
            assert_eq!(guarded.checksum(), database.checksum(), "{}", path.display());
            assert_equal_files(&self.primary.members.files().join(&path), database.path());
            assert_eq!(digest_of(database.path(), "PRAGMA integrity_check"), "ok");
        }
    }
}

fn assert_equal_files(one: &Path, other: &Path) {
    let (one, other) = (fs::read(one).unwrap(), fs::read(other).unwrap());
    assert_eq!(one.len(), other.len());
    let differs = one.chunks(512).zip(other.chunks(512)).position(|(one, other)| one != other);
    assert_eq!(differs, None, "the first 512 bytes that differ");
}

/// What SQLite says about a copy of a database as a crash would leave it, with its journals.
fn digest_of(database: &Path, query: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy.db");
    for suffix in ["", "-wal", "-journal"] {
        let with = |path: &Path| PathBuf::from([path.as_os_str(), suffix.as_ref()].join("".as_ref()));
        if with(database).exists() {
            fs::copy(with(database), with(&copy)).unwrap();
        }
    }
    Sql::open_with(&copy, None).unwrap().text(query)
}

/// Starts a Python program in another process.
fn start_python(program: &str, arguments: &[&str]) -> std::process::Child {
    Command::new("python3").arg("-c").arg(program).args(arguments).spawn().unwrap()
}
