//! The folder of the service on this host: served while this node is PRIMARY, and an empty one that takes no writes
//! otherwise. Must never look at a path below its own mount.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::{sync::Mutex, task::spawn_blocking};
use tracing::{info, warn};
use twistlock_ha::{
    config::service::folder_lacks,
    node::ServingFolder,
    service::{DatabaseReport, Folder, FolderReport, Work},
    storage::folder::{self, FolderConfig, guarded::Figures, point::MountPoint},
};

/// How long somebody else, such as a shell, may keep a file of it open when it is taken away.
const PATIENCE: Duration = Duration::from_millis(100);

/// The folder that the service finds at a mount point.
pub(super) struct MountedFolder {
    path: PathBuf,
    serving: ServingFolder,
    /// Why it cannot be mounted here.
    obstacle: Option<String>,
    now: Mutex<Now>,
}

/// What lies on the mount point.
#[derive(Default)]
struct Now {
    /// The folder, and the epoch that it belongs to. Goes before what it lies on.
    served: Option<(u64, folder::Folder)>,
    _point: Option<MountPoint>,
}

impl fmt::Debug for MountedFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MountedFolder").field("path", &self.path).finish_non_exhaustive()
    }
}

impl MountedFolder {
    /// Takes the mount point. A host that cannot mount there takes part all the same: the service does not start on it.
    pub fn new(path: PathBuf, serving: ServingFolder) -> Self {
        // Said before somebody has put anything into it.
        let (point, obstacle) = match (MountPoint::take(&path), folder_lacks().first()) {
            (Err(error), _) => (None, Some(error.to_string())),
            (Ok(point), lack) => (Some(point), lack.cloned()),
        };
        Self { path, serving, obstacle, now: Mutex::new(Now { served: None, _point: point }) }
    }

    /// Why the service cannot run on this host, for the status.
    pub fn obstacle(&self) -> Option<&str> {
        self.obstacle.as_deref()
    }

    /// Files of the folder that are on this host alone, while it is served here.
    pub fn plain_files(&self) -> Vec<PathBuf> {
        self.serving.borrow().as_ref().map_or_else(Vec::new, |registry| registry.plain_files())
    }

    /// Gives the mount point back, at the end of the node.
    pub async fn leave(&self) {
        let now = std::mem::take(&mut *self.now.lock().await);
        if let Err(error) = spawn_blocking(move || drop(now)).await {
            warn!("the folder of the service was not taken away: {error}");
        }
    }

    async fn mount(&self, epoch: u64, owner: (u32, u32)) -> io::Result<()> {
        if let Some(obstacle) = &self.obstacle {
            return Err(io::Error::other(obstacle.clone()));
        }
        let mut now = self.now.lock().await;
        if now.served.as_ref().is_some_and(|(served, _)| *served == epoch) {
            return Ok(()); // the service begins again in the same epoch
        }
        unmount(&mut now).await?;
        let registry = self.serving.borrow().clone().filter(|registry| registry.passage().epoch() == epoch);
        let registry =
            registry.ok_or_else(|| io::Error::other(format!("this node is not PRIMARY in epoch {epoch} any more")))?;
        let mount = self.path.clone();
        let begun = Instant::now();
        let served = spawn_blocking(move || {
            registry.prepare(owner)?;
            let config = FolderConfig { backing: registry.files(), mount };
            folder::Folder::mount(&config, Some(registry)).map_err(io::Error::other)
        });
        now.served = Some((epoch, served.await.map_err(io::Error::other)??));
        let ms = begun.elapsed().as_millis() as u64;
        info!(epoch, ms, "the folder of the service is served at {}", self.path.display());
        Ok(())
    }
}

/// Takes the folder away, if it is served. Whoever still has a file of it open gets an error.
async fn unmount(now: &mut Now) -> io::Result<()> {
    let Some((_, served)) = now.served.take() else { return Ok(()) };
    let unmounted = spawn_blocking(move || served.unmount(Instant::now() + PATIENCE));
    unmounted.await.map_err(io::Error::other)?.map_err(io::Error::other)
}

impl Folder for MountedFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn serve(&self, epoch: u64, owner: (u32, u32)) -> Work<'_> {
        Box::pin(self.mount(epoch, owner))
    }

    fn withdraw(&self) -> Work<'_> {
        Box::pin(async {
            let mut now = self.now.lock().await;
            unmount(&mut now).await
        })
    }

    fn report(&self) -> FolderReport {
        let Some(registry) = self.serving.borrow().clone() else { return FolderReport::default() };
        let report = |figures: Figures| DatabaseReport {
            id: figures.id,
            path: figures.path,
            mode: figures.wal.map(|wal| if wal { "wal" } else { "rollback" }.to_owned()),
            page_size: figures.page_size,
            pages: figures.pages,
            commits: figures.commits,
            behind: figures.behind as u64,
        };
        let mut databases: Vec<_> = registry.all().iter().map(|guarded| report(guarded.figures())).collect();
        databases.sort_by(|one, other| one.path.cmp(&other.path));
        let other_files = registry.plain_files().len() as u64;
        FolderReport { served: true, databases, other_files, last_refusal: registry.passage().last_refusal() }
    }
}
