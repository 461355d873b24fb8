//! The data folder of a service, served through FUSE: an unmodified application works in it as in any other folder,
//! and what it does to its SQLite databases passes the [gate](super::gate).
//!
//! - `mod.rs`: the mount, from its beginning to its end
//! - `fuse.rs`: the calls of the kernel; `waiting.rs`: those that may wait, apart from those that read
//! - `tree.rs`: numbers, names and what is open; `paths.rs`: its inode table; `backing.rs`: the folder below
//! - `sqlite.rs`: which file belongs to which database
//! - `guarded.rs`: the gate of one database; `journal.rs`, `overlay.rs` and `image.rs`: its transactions with a
//!   rollback journal; `guarded/wal.rs`, `units.rs` and `guarded/doubt.rs`: its WAL
//! - `point.rs`: the mount point while nothing is served; `plain.rs`: the files that are no databases
//! - `passage.rs`: what all databases share, the way to the majority
//! - `catalogue.rs`: which databases there are; `places.rs`: where they lie; `members.rs`: those of one member, following
//!   or serving; `rest.rs`: all of a primary at one raft index
//!
//! Must never open a path below its own mount: the call would wait for this very process.

mod backing;
pub mod catalogue;
mod fuse;
pub mod guarded;
mod image;
mod journal;
pub mod members;
mod overlay;
pub mod passage;
mod paths;
pub mod places;
pub mod plain;
pub mod point;
pub mod rest;
pub mod sqlite;
mod tree;
mod units;
mod waiting;

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use fuser::{BackgroundSession, Config, Session, SessionACL};
use nix::errno::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use thiserror::Error;

use self::{
    fuse::{Calls, Told},
    sqlite::Registry,
    tree::Tree,
    waiting::Waiting,
};

/// What the mount is called in `/proc/mounts`.
const NAME: &str = "twistlock";
/// How often an unmount is tried while files are open.
const STEP: Duration = Duration::from_millis(2);

/// Why a folder is not served.
#[derive(Debug, Error)]
pub enum FolderError {
    #[error("cannot open the folder {}: {error}", path.display())]
    Backing { path: PathBuf, error: io::Error },
    #[error(
        "cannot mount on {}: {error}; it needs /dev/fuse (modprobe fuse), CAP_SYS_ADMIN, and an existing folder",
        path.display()
    )]
    Mount { path: PathBuf, error: io::Error },
    #[error("this node is not PRIMARY any more")]
    Fenced,
    #[error("cannot unmount {}: {error}", path.display())]
    Unmount { path: PathBuf, error: io::Error },
}

/// Is told of each call of the kernel by its name, when it is done and not answered yet. Must not open anything below
/// the mount.
pub type Trace = Arc<dyn Fn(&'static str) + Send + Sync>;

/// Which folder is served, and where.
#[derive(Clone, Debug)]
pub struct FolderConfig {
    /// The folder below, which nobody else changes while it is served.
    pub backing: PathBuf,
    /// Where the service finds it: an existing folder.
    pub mount: PathBuf,
}

/// A folder that is served, until this is dropped.
#[derive(Debug)]
pub struct Folder {
    mount: PathBuf,
    /// None once it is unmounted.
    session: Option<BackgroundSession>,
}

impl Folder {
    /// Mounts the folder. Whoever opens a file of it is answered from then on. Without a registry it is no more than a
    /// folder; with one, its databases pass their gates.
    ///
    /// # Errors
    /// [`FolderError`] when the folder below cannot be opened, the kernel refuses, or the registry is fenced: nothing is
    /// mounted then.
    pub fn mount(config: &FolderConfig, registry: Option<Arc<Registry>>) -> Result<Self, FolderError> {
        Self::mount_traced(config, registry, None)
    }

    /// As [`Self::mount`], and tells of each call.
    ///
    /// # Errors
    /// As [`Self::mount`].
    pub fn mount_traced(
        config: &FolderConfig,
        registry: Option<Arc<Registry>>,
        trace: Option<Trace>,
    ) -> Result<Self, FolderError> {
        let failed = |error| FolderError::Mount { path: config.mount.clone(), error };
        let served = registry.as_ref().map(|registry| registry.serve().ok_or(FolderError::Fenced)).transpose()?;
        let tree = Tree::new(&config.backing, registry)
            .map_err(|errno| FolderError::Backing { path: config.backing.clone(), error: errno.into() })?;
        remove_dead(&config.mount).map_err(failed)?;
        let notifier = Arc::new(OnceLock::new());
        let (tree, waiting) = (Arc::new(tree), Arc::new(Waiting::new(served)));
        let calls = Calls { tree, waiting, notifier: Arc::clone(&notifier), told: Told(trace) };
        let mut options = Config::default();
        options.n_threads = Some(waiting::THREADS);
        let device = attach(&config.mount).map_err(failed)?;
        let session = Session::from_fd(calls, device, SessionACL::All, options).and_then(Session::spawn);
        let session = session.inspect_err(|_| {
            let _ = unmount(&config.mount, UnmountFlags::DETACH); // it answers nobody
        });
        let session = session.map_err(failed)?;
        notifier.get_or_init(|| session.notifier());
        Ok(Self { mount: config.mount.clone(), session: Some(session) })
    }

    /// Where the service finds it.
    pub fn path(&self) -> &Path {
        &self.mount
    }

    /// Takes the folder away as soon as nobody has a file of it open; at the deadline in any case. Who still has one
    /// then gets `ENOTCONN` or `ECONNABORTED`.
    ///
    /// # Errors
    /// [`FolderError::Unmount`] when the kernel refuses.
    pub fn unmount(mut self, deadline: Instant) -> Result<(), FolderError> {
        self.end(deadline)
    }

    fn end(&mut self, deadline: Instant) -> Result<(), FolderError> {
        let Some(session) = self.session.take() else { return Ok(()) };
        let failed = |error| FolderError::Unmount { path: self.mount.clone(), error };
        loop {
            let late = Instant::now() >= deadline;
            let flags = if late { UnmountFlags::FORCE | UnmountFlags::DETACH } else { UnmountFlags::empty() };
            match unmount(&self.mount, flags) {
                // Somebody else was quicker.
                Ok(()) | Err(rustix::io::Errno::INVAL) => break,
                Err(rustix::io::Errno::BUSY) if !late => std::thread::sleep(STEP),
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        session.join().map_err(failed)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = self.end(Instant::now()) {
            tracing::warn!("{error}");
        }
    }
}

/// Mounts a file system that whoever has the answer serves. The crate fuser could do that, but when it ends it would
/// take away what lies below, too.
fn attach(path: &Path) -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    // The service has a user of its own. The kernel checks what each user may do.
    let options = format!(
        "fd={},rootmode=40000,user_id={user},group_id={group},default_permissions,allow_other",
        device.as_raw_fd()
    );
    let options = CString::new(options).map_err(io::Error::other)?;
    mount(NAME, path, "fuse", MountFlags::NOSUID | MountFlags::NODEV, options.as_c_str())?;
    Ok(device.into())
}

/// Takes away what a killed process has left mounted there: it answers nobody.
fn remove_dead(mount: &Path) -> io::Result<()> {
    while let Err(error) = fs::metadata(mount) {
        if error.raw_os_error() != Some(Errno::ENOTCONN as i32) {
            return Err(error);
        }
        unmount(mount, UnmountFlags::DETACH)?;
    }
    Ok(())
}
