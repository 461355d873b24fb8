//! Access to the folder of the backups, which may be on a network disk that does not answer. Must never leave more than
//! a few threads waiting for it, nor anybody who asked.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::timeout};

use super::{BackupError, blocking};

/// How many accesses may run at once; each one that hangs keeps its thread meanwhile.
const AT_ONCE: usize = 4;
/// How long anybody waits for a turn, and then for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Lets a few threads at a time into the folder of the backups, where they may hang.
#[derive(Debug)]
pub(super) struct FolderAccess {
    turns: Arc<Semaphore>,
    patience: Duration,
}

impl Default for FolderAccess {
    fn default() -> Self {
        Self { turns: Arc::new(Semaphore::new(AT_ONCE)), patience: PATIENCE }
    }
}

impl FolderAccess {
    /// Does something short with what lies at `path`.
    ///
    /// # Errors
    /// [`BackupError::Hangs`] when the disk does not answer in time: the work may still be done later. Otherwise the
    /// error of `work`.
    pub async fn run<T: Send + 'static>(
        &self,
        path: &Path,
        work: impl FnOnce() -> Result<T, BackupError> + Send + 'static,
    ) -> Result<T, BackupError> {
        let hangs = || BackupError::Hangs(path.to_owned());
        let turn = timeout(self.patience, self.turns.clone().acquire_owned()).await;
        let turn = turn.ok().and_then(Result::ok).ok_or_else(hangs)?;
        // The turn ends with the work, whether somebody still waits for it or not.
        let work = blocking(move || {
            let _turn = turn;
            work()
        });
        timeout(self.patience, work).await.unwrap_or_else(|_| Err(hangs()))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{File, OpenOptions},
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    /// Opening a named pipe takes until somebody opens its other end.
    #[tokio::test]
    async fn a_disk_that_hangs_keeps_a_few_threads_and_nobody_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let access = FolderAccess { patience: Duration::from_millis(20), ..FolderAccess::default() };
        let begun = Arc::new(AtomicUsize::new(0));
        for _ in 0..3 * AT_ONCE {
            let (begun, path) = (begun.clone(), pipe.clone());
            let answer = access.run(&pipe, move || {
                begun.fetch_add(1, Ordering::SeqCst);
                File::open(&path).map_err(BackupError::io("open", &path))
            });
            assert!(matches!(answer.await, Err(BackupError::Hangs(_))));
        }
        assert!(begun.load(Ordering::SeqCst) <= AT_ONCE);
        assert_eq!(access.turns.available_permits(), 0, "each of them is still in it");
        // Again and again: who opens the pipe later needs another writer.
        while access.turns.available_permits() < AT_ONCE {
            let other = OpenOptions::new().write(true).read(true).open(&pipe).unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
            drop(other);
        }
        assert_eq!(access.run(&pipe, || Ok(5)).await.unwrap(), 5, "it answers again");
    }
}
