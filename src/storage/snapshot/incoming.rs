//! A snapshot that is arriving: every chunk is verified before it is written, and the whole before it counts. Whenever
//! the process dies, must never leave a folder with the name of a complete snapshot that is not one.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::statvfs::statvfs;

use super::{
    CHUNK, Course, INCOMING, MANIFEST, Manifest, READY, SnapshotError, chunk_checksum, install,
    service::{DATABASES, staged},
};
use crate::storage::{
    durable_write, fsync_dir,
    pacer::{PacedFile, Pacer},
};

/// Bytes of free space that are left for everything else on the same file system.
const SPARE: u64 = 64 << 20;

/// A snapshot on its way in. If it is dropped before its end, it leaves a folder that nobody uses.
#[derive(Debug)]
pub struct Incoming {
    data: PathBuf,
    folder: PathBuf,
    manifest: Manifest,
    course: Course,
    /// The database that is arriving.
    current: Option<Arriving>,
    bytes: u64,
}

#[derive(Debug)]
struct Arriving {
    id: u32,
    path: PathBuf,
    file: PacedFile,
    checksum: u64,
}

impl Arriving {
    fn begin(folder: &Path, id: u32) -> Result<Self, SnapshotError> {
        let path = staged(folder, id);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(SnapshotError::io("create", &path))?;
        // Whoever sends it keeps up with this pace, however long that takes.
        let file = PacedFile::new(file, Pacer::new(Duration::MAX));
        Ok(Self { id, path, file, checksum: 0 })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), SnapshotError> {
        self.file.write_all(bytes).map_err(SnapshotError::io("write", &self.path))
    }
}

impl Incoming {
    /// Makes room for the snapshot that the manifest describes. Deletes the remains of earlier attempts.
    ///
    /// # Errors
    /// [`SnapshotError::NoSpace`] when it does not fit beside the databases, [`SnapshotError::Io`] when the disk fails.
    pub fn begin(data: &Path, manifest: Manifest) -> Result<Self, SnapshotError> {
        install::clear(data)?;
        let space = statvfs(data).map_err(|errno| SnapshotError::io("get the free space of", data)(errno.into()))?;
        let free = space.blocks_available() * space.fragment_size();
        let needed = manifest.bytes() + SPARE;
        if free < needed {
            return Err(SnapshotError::NoSpace { path: data.to_owned(), needed, free });
        }
        let folder = data.join(INCOMING);
        let create =
            |folder: &Path| DirBuilder::new().mode(0o700).create(folder).map_err(SnapshotError::io("create", folder));
        create(&folder)?;
        if !manifest.service.records.is_empty() {
            create(&folder.join(DATABASES))?;
        }
        let course = Course::new(&manifest);
        Ok(Self { data: data.to_owned(), folder, manifest, course, current: None, bytes: 0 })
    }

    /// Frees the space of a failed attempt at once: the disk may be full. What cannot be deleted is deleted at the next
    /// attempt or start.
    pub fn abandon(data: &Path) {
        if let Err(error) = fs::remove_dir_all(data.join(INCOMING)) {
            tracing::debug!(%error, "cannot delete an incomplete snapshot now: the next attempt or start does");
        }
    }

    /// Bytes that have arrived.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Size of the pages that arrive next, in bytes; none once all have arrived.
    pub fn page_size(&mut self) -> Option<u32> {
        self.course.current().map(|(_, record, _)| record.page_size)
    }

    /// Takes the next chunk, of the next database if the last one is complete. According to the sender, its checksum is
    /// `claimed`.
    ///
    /// # Errors
    /// [`SnapshotError::Damaged`] when it is not the next chunk, [`SnapshotError::Io`] when it cannot be written. The
    /// attempt has failed then.
    pub fn push(&mut self, claimed: u64, bytes: &[u8]) -> Result<(), SnapshotError> {
        let Some((id, record, done)) = self.course.current() else {
            return Err(SnapshotError::Damaged("it is longer than its databases".to_owned()));
        };
        let page_size = record.page_size as usize;
        let count = (bytes.len() / page_size) as u32;
        if bytes.is_empty() || bytes.len() > CHUNK || !bytes.len().is_multiple_of(page_size) {
            return Err(SnapshotError::Damaged(format!("a chunk has {} bytes", bytes.len())));
        }
        if count > record.pages - done {
            return Err(SnapshotError::Damaged(format!("database {id} is longer than its {} pages", record.pages)));
        }
        let computed = chunk_checksum(done, record.page_size, bytes);
        if computed != claimed {
            return Err(SnapshotError::Damaged(format!(
                "the {count} pages after page {done} of database {id} have the checksum {computed:016x}, not {claimed:016x}"
            )));
        }
        let mut current = match self.current.take() {
            Some(current) if current.id == id => current,
            _ => Arriving::begin(&self.folder, id)?,
        };
        current.write(bytes)?;
        current.checksum ^= computed;
        self.course.advance(count);
        self.bytes += bytes.len() as u64;
        if done + count < record.pages {
            self.current = Some(current);
            return Ok(());
        }
        if current.checksum != record.checksum {
            return Err(SnapshotError::Damaged(format!(
                "all pages of database {id} have arrived, with the checksum {:016x} instead of {:016x}",
                current.checksum, record.checksum
            )));
        }
        current.file.sync_all().map_err(SnapshotError::io("sync", &current.path))
    }

    /// Verifies the whole once everything has arrived, and makes it a complete snapshot, which the next start installs.
    ///
    /// # Errors
    /// [`SnapshotError::Damaged`] when pages are missing, [`SnapshotError::Io`] when the disk fails.
    pub fn finish(mut self) -> Result<Manifest, SnapshotError> {
        if let Some((id, record, done)) = self.course.current() {
            let pages = record.pages;
            return Err(SnapshotError::Damaged(format!("{done} of {pages} pages of database {id} have arrived")));
        }
        let Self { data, folder, manifest, .. } = self;
        for (id, _) in manifest.contents().filter(|(_, record)| record.pages == 0) {
            let empty = Arriving::begin(&folder, id)?;
            empty.file.sync_all().map_err(SnapshotError::io("sync", &empty.path))?;
        }
        if !manifest.service.records.is_empty() {
            let databases = folder.join(DATABASES);
            fsync_dir(&databases).map_err(SnapshotError::io("sync", &databases))?;
        }
        let path = folder.join(MANIFEST);
        durable_write(&path, &manifest.encode()).map_err(SnapshotError::io("write", &path))?;
        let ready = data.join(READY);
        let publish = || -> io::Result<()> {
            fs::rename(&folder, &ready)?;
            fsync_dir(&data)
        };
        publish().map_err(SnapshotError::io("rename", &folder))?;
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::snapshot::{
        DATABASE, Ready, Resting,
        tests::{manifest, resting, with_service},
    };

    fn chunks(seed: u8, pages: u32) -> (Manifest, Vec<(u64, Vec<u8>)>) {
        let (resting, ..) = resting(seed, pages, 40);
        (manifest(resting.record(), 3), chunks_of(&resting))
    }

    fn chunks_of(resting: &Resting) -> Vec<(u64, Vec<u8>)> {
        let (mut all, mut done) = (Vec::new(), 0);
        while done < resting.record().pages {
            let mut bytes = Vec::new();
            let sum = resting.read(done, &mut bytes).unwrap();
            done += bytes.len() as u32 / 512;
            all.push((sum, bytes));
        }
        all
    }

    fn take(data: &Path, manifest: &Manifest, chunks: &[(u64, Vec<u8>)]) -> Result<Manifest, SnapshotError> {
        let mut incoming = Incoming::begin(data, manifest.clone())?;
        for (sum, bytes) in chunks {
            incoming.push(*sum, bytes)?;
        }
        incoming.finish()
    }

    #[test]
    fn a_whole_snapshot_becomes_ready_and_remains_are_deleted() {
        let data = tempfile::tempdir().unwrap();
        let (manifest, chunks) = chunks(1, 5000);
        fs::create_dir(data.path().join(INCOMING)).unwrap();
        fs::write(data.path().join(INCOMING).join(DATABASE), "old").unwrap();
        assert_eq!(take(data.path(), &manifest, &chunks).unwrap(), manifest);
        assert_eq!(Ready::find(data.path()).unwrap().unwrap().manifest(), &manifest);
        let image: Vec<u8> = chunks.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        assert!(fs::read(data.path().join(READY).join(DATABASE)).unwrap() == image);
        // A second one replaces the first, which nobody has installed.
        take(data.path(), &manifest, &chunks).unwrap();
        assert!(!data.path().join(INCOMING).exists());
    }

    #[test]
    fn every_kind_of_damage_is_refused() {
        let (good, chunks) = chunks(1, 5000);
        let damage = |what: &str, manifest: &Manifest, chunks: &[(u64, Vec<u8>)]| {
            let data = tempfile::tempdir().unwrap();
            let error = take(data.path(), manifest, chunks).expect_err(what);
            assert!(matches!(error, SnapshotError::Damaged(_)), "{what}: {error}");
            assert!(Ready::find(data.path()).unwrap().is_none(), "{what}");
        };
        let mut flipped = chunks.clone();
        flipped[1].1[77] ^= 1;
        damage("a flipped bit", &good, &flipped);
        flipped[1].0 = chunk_checksum(2048, 512, &flipped[1].1);
        damage("a flipped bit, with the right checksum of its chunk", &good, &flipped);
        damage("a chunk too few", &good, &chunks[..2]);
        damage("a chunk too many", &good, &[&chunks[..], &chunks[..1]].concat());
        let mut swapped = chunks.clone();
        swapped.swap(0, 1);
        damage("chunks in another order", &good, &swapped);
        let mut odd = chunks.clone();
        odd[0].1.pop();
        damage("half a page", &good, &odd);
        damage("nothing", &good, &[(0, Vec::new())]);
        let mut wrong = good.clone();
        wrong.record.checksum ^= 1;
        damage("another checksum in the manifest", &wrong, &chunks);
        let mut wrong = good.clone();
        wrong.record.pages += 1;
        damage("another size in the manifest", &wrong, &chunks);
    }

    /// All or none: whichever of the databases is not complete.
    #[test]
    fn a_snapshot_of_several_databases_needs_all_of_them() {
        let (plain, console) = chunks(1, 3000);
        let (with, service) = with_service(plain, &[2500, 0, 3]);
        let parts = [vec![console], service.iter().map(chunks_of).collect()].concat();
        let whole = parts.concat();
        assert_eq!(whole.len(), 2 + 2 + 1);
        let data = tempfile::tempdir().unwrap();
        assert_eq!(take(data.path(), &with, &whole).unwrap(), with);
        let ready = data.path().join(READY);
        for (id, chunks) in [1, 2, 3, 4].into_iter().zip(&parts) {
            let image: Vec<u8> = chunks.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
            assert!(fs::read(staged(&ready, id)).unwrap() == image, "database {id}");
        }
        assert_eq!(Ready::find(data.path()).unwrap().unwrap().manifest(), &with);
        let refused = |what: &str, chunks: &[(u64, Vec<u8>)]| {
            let data = tempfile::tempdir().unwrap();
            let error = take(data.path(), &with, chunks).expect_err(what);
            assert!(matches!(error, SnapshotError::Damaged(_)), "{what}: {error}");
            assert!(Ready::find(data.path()).unwrap().is_none(), "{what}");
        };
        (0..whole.len()).for_each(|count| refused("the end is missing", &whole[..count]));
        refused("the Console's alone", &parts[0]);
        refused("the service's alone", &parts[1..].concat());
        refused("one twice", &[&whole[..], &parts[3]].concat());
        refused("another order", &[parts[0].clone(), parts[3].clone(), parts[1].clone()].concat());
    }

    #[test]
    fn a_full_disk_is_seen_before_anything_is_written() {
        let data = tempfile::tempdir().unwrap();
        let (mut manifest, _) = chunks(1, 1);
        (manifest.record.pages, manifest.record.page_size) = (u32::MAX, 65536);
        let error = Incoming::begin(data.path(), manifest).unwrap_err();
        assert!(matches!(error, SnapshotError::NoSpace { .. }), "{error}");
        assert!(!data.path().join(INCOMING).exists());
    }
}
