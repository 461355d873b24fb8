//! One file of the log, and the supply of files to come. Owns the header of a segment (format version 1) and the names
//! in the folder. Must never look at records.
//!
//! A segment has its full size before its first record is written: a commit must neither extend a file nor wait until
//! one is made. Header (little-endian, in the first 4096 bytes): magic, `version u32`, `crc u32` (CRC-32C of the rest
//! of the 64 bytes), `cluster u128`, `node u64`, `sequence u64`, `salt u64` (random), `size u64`.
//!
//! Names: `segment-<sequence, 16 hexadecimal digits>`, `spare-<number>` for a file of full size whose content means
//! nothing, and `unfinished` for one that is being filled. A file gets its segment name only after its header is on
//! disk. So a segment with a bad header is damaged, not torn.

use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use super::{
    LogError, Options, Owner,
    disk::{Disk, DiskFile},
    record::ALIGN,
};
use crate::{
    cluster::ClusterId,
    little_endian::{u32_at, u64_at},
    storage::{
        is_full,
        pacer::{LARGEST, Pacer},
    },
};

/// Offset of the first record, in bytes: the page with the header is never written again.
pub const FIRST: usize = 4096;
const HEADER: usize = 64;
const MAGIC: &[u8; 8] = b"TWLKRAFT";
const VERSION: u32 = 1;
/// Unused files that are kept for later segments; further ones are removed.
const SPARES: usize = 2;
/// How much longer a new segment may take for the sake of those who commit, if nobody waits for it.
const PATIENCE: Duration = Duration::from_secs(2);

/// One file of the log.
pub struct Segment {
    pub sequence: u64,
    /// Size of the file in bytes, header included.
    pub size: usize,
    /// Start value of every record's checksum: the CRC of the header, and so of its sequence number and salt.
    pub seed: u32,
    pub file: Box<dyn DiskFile>,
}

fn encode_header(owner: Owner, sequence: u64, salt: u64, size: usize) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..32].copy_from_slice(&owner.0.0.to_le_bytes());
    bytes[32..40].copy_from_slice(&owner.1.to_le_bytes());
    bytes[40..48].copy_from_slice(&sequence.to_le_bytes());
    bytes[48..56].copy_from_slice(&salt.to_le_bytes());
    bytes[56..].copy_from_slice(&(size as u64).to_le_bytes());
    let crc = header_crc(&bytes);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn header_crc(bytes: &[u8; HEADER]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[16..])
}

impl Segment {
    /// Opens the file of a segment and checks its header.
    pub fn open(disk: &dyn Disk, dir: &Path, sequence: u64, owner: Owner) -> Result<Self, LogError> {
        let path = segment_path(dir, sequence);
        let file = disk.open(&path).map_err(LogError::io("open", &path))?;
        let mut bytes = [0; HEADER];
        match file.read_at(&mut bytes, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            result => result.map_err(LogError::io("read", &path))?,
        }
        let damaged = |reason: &str| LogError::damaged(&path, 0, reason);
        if bytes[..8] != *MAGIC {
            return Err(damaged("it does not begin like a segment of a raft log"));
        }
        // Checked first: a flipped bit must not pass for a newer version. Every version has the checksum here.
        let seed = u32_at(&bytes, 12);
        if header_crc(&bytes) != seed {
            return Err(damaged("the checksum of its header is wrong"));
        }
        let version = u32_at(&bytes, 8);
        if version > VERSION {
            return Err(LogError::Newer { path, found: version, known: VERSION });
        }
        let found = (ClusterId(u64_at(&bytes, 16) as u128 | (u64_at(&bytes, 24) as u128) << 64), u64_at(&bytes, 32));
        if found != owner {
            return Err(LogError::Foreign { path, found, expected: owner });
        }
        let size = u64_at(&bytes, 56);
        let actual = file.size().map_err(LogError::io("examine", &path))?;
        if u64_at(&bytes, 40) != sequence || size != actual {
            return Err(damaged("its header does not fit its name or size"));
        }
        Ok(Self { sequence, size: size as usize, seed, file })
    }

    /// The bytes from `offset` to the end of the file.
    pub fn read_from(&self, offset: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.size - offset];
        self.file.read_at(&mut bytes, offset as u64)?;
        Ok(bytes)
    }
}

/// The file of a segment.
pub fn segment_path(dir: &Path, sequence: u64) -> PathBuf {
    dir.join(format!("segment-{sequence:016x}"))
}

/// What the folder of a log holds, by name.
#[derive(Default)]
pub struct Names {
    /// Sequence numbers, ascending.
    pub segments: Vec<u64>,
    /// Numbers of the spare files.
    pub spares: Vec<u64>,
    pub unfinished: bool,
}

impl Names {
    /// Sorts the names by kind. Ignores those that are not the log's.
    pub fn parse(list: &[String]) -> Self {
        let mut names = Self::default();
        for name in list {
            if let Some(digits) = name.strip_prefix("segment-").filter(|digits| digits.len() == 16) {
                names.segments.extend(u64::from_str_radix(digits, 16));
            } else if let Some(digits) = name.strip_prefix("spare-") {
                names.spares.extend(digits.parse::<u64>());
            } else if name == "unfinished" {
                names.unfinished = true;
            }
        }
        names.segments.sort_unstable();
        names
    }
}

/// A file of full size whose content means nothing any more. Somebody may still be reading the segment that it was.
pub struct Spare {
    path: PathBuf,
    segment: Arc<Segment>,
}

/// The folder of a log, and what all new segments have in common.
struct Files {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    owner: Owner,
    size: usize,
}

impl Files {
    /// Makes a new file of full size, at this pace. Its bytes are really written: space that is only reserved costs
    /// extra at each sync.
    fn fill(&self, mut pacer: Pacer) -> Result<(PathBuf, Box<dyn DiskFile>), LogError> {
        let path = self.dir.join("unfinished");
        let mut fill = || -> io::Result<Box<dyn DiskFile>> {
            let file = self.disk.create(&path)?;
            let zeros = vec![0; self.size.min(LARGEST as usize)];
            pacer.in_steps(0..self.size as u64, |from, bytes| {
                file.write_at(&zeros[..bytes as usize], from)?;
                file.sync_data()
            })?;
            Ok(file)
        };
        match fill() {
            Ok(file) => Ok((path, file)),
            Err(error) => {
                // The next attempt empties the file anyway. This frees its space until then.
                let _ = self.disk.remove(&path);
                if is_full(&error) {
                    return Err(LogError::Full { path: self.dir.clone(), needed: self.size as u64 });
                }
                Err(LogError::io("fill", &path)(error))
            }
        }
    }

    fn spare_path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("spare-{number}"))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), LogError> {
        self.disk.rename(from, to).map_err(LogError::io("rename", from))?;
        self.disk.sync_dir(&self.dir).map_err(LogError::io("sync", &self.dir))
    }

    fn remove(&self, path: &Path) -> Result<(), LogError> {
        self.disk.remove(path).map_err(LogError::io("remove", path))?;
        self.disk.sync_dir(&self.dir).map_err(LogError::io("sync", &self.dir))
    }
}

/// A segment to be made. It is apart from the supply, because making it takes long and nobody should wait without need.
pub struct Job {
    files: Arc<Files>,
    spare: Option<(PathBuf, Box<dyn DiskFile>)>,
    sequence: u64,
}

impl Job {
    /// Makes the segment, durably. Give the result to [`Supply::finish`]. It takes its time until `hurry` is true.
    ///
    /// # Errors
    /// [`LogError::Full`] changes nothing: try again. Any other error is fatal for the log.
    pub fn run(self, hurry: &Arc<AtomicBool>) -> Result<Segment, LogError> {
        let Self { files, spare, sequence } = self;
        let pacer = Pacer::until(PATIENCE, Arc::clone(hurry));
        let (path, file) = spare.map_or_else(|| files.fill(pacer), Ok)?;
        let header = encode_header(files.owner, sequence, rand::random(), files.size);
        let seed = header_crc(&header);
        file.write_at(&header, 0).map_err(LogError::io("write", &path))?;
        file.sync_data().map_err(LogError::io("sync", &path))?;
        files.rename(&path, &segment_path(&files.dir, sequence))?;
        Ok(Segment { sequence, size: files.size, seed, file })
    }
}

/// A segment that leaves the log; apart from the supply, as a [`Job`] is.
pub struct Retiring {
    files: Arc<Files>,
    segment: Arc<Segment>,
    /// Where it is kept for reuse; `None` if there are enough spare files.
    spare: Option<PathBuf>,
}

impl Retiring {
    /// Takes it out of the log, durably. Only then may the next one leave: the numbers of those that remain must have
    /// no gap.
    ///
    /// # Errors
    /// Any error is fatal for the log.
    pub fn run(self) -> Result<Option<Spare>, LogError> {
        let Self { files, segment, spare } = self;
        let from = segment_path(&files.dir, segment.sequence);
        let Some(path) = spare else { return files.remove(&from).map(|()| None) };
        files.rename(&from, &path)?;
        Ok(Some(Spare { path, segment }))
    }
}

/// The segments to come: their headers are on disk, and they have no records.
pub struct Supply {
    files: Arc<Files>,
    ready: VecDeque<Arc<Segment>>,
    spares: Vec<Spare>,
    next_sequence: u64,
    next_spare: u64,
    /// A [`Job`] is under way. One at a time: segments appear in the order of their numbers.
    busy: bool,
}

impl Supply {
    /// Takes over the spare files of a folder. New segments are numbered from `next_sequence`.
    pub fn new(
        disk: Arc<dyn Disk>,
        dir: &Path,
        owner: Owner,
        options: &Options,
        names: &Names,
        next_sequence: u64,
    ) -> Result<Self, LogError> {
        let size = options.segment_bytes.next_multiple_of(ALIGN);
        let files = Arc::new(Files { disk, dir: dir.to_owned(), owner, size });
        if names.unfinished {
            files.remove(&dir.join("unfinished"))?;
        }
        let mut spares = Vec::new();
        for number in &names.spares {
            let path = files.spare_path(*number);
            let file = files.disk.open(&path).map_err(LogError::io("open", &path))?;
            let actual = file.size().map_err(LogError::io("examine", &path))?;
            if actual == size as u64 && spares.len() < SPARES {
                spares.push(Spare { path, segment: Arc::new(Segment { sequence: 0, size, seed: 0, file }) });
            } else {
                files.remove(&path)?;
            }
        }
        let next_spare = names.spares.iter().max().map_or(0, |last| last + 1);
        Ok(Self { files, ready: VecDeque::new(), spares, next_sequence, next_spare, busy: false })
    }

    /// Bytes of the files that are ready or kept as spares.
    pub fn size_bytes(&self) -> u64 {
        ((self.ready.len() + self.spares.len()) * self.files.size) as u64
    }

    /// Size of every segment that comes from here.
    pub fn segment_size(&self) -> usize {
        self.files.size
    }

    /// True if there is a file that can be reused.
    pub fn has_spare(&self) -> bool {
        !self.spares.is_empty()
    }

    /// Segments that are ready.
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// Begins to make the next segment; `None` while one is being made.
    pub fn begin(&mut self) -> Option<Job> {
        if self.busy {
            return None;
        }
        self.busy = true;
        let unused = self.spares.iter().position(|spare| Arc::strong_count(&spare.segment) == 1);
        let spare = unused.map(|at| {
            let Spare { path, segment } = self.spares.swap_remove(at);
            (path, Arc::into_inner(segment).expect("nobody else can reach a spare").file)
        });
        Some(Job { files: self.files.clone(), spare, sequence: self.next_sequence })
    }

    /// Takes the segment that a [`Job`] has made.
    ///
    /// # Errors
    /// The error of the job. After [`LogError::Full`] another job can be begun.
    pub fn finish(&mut self, made: Result<Segment, LogError>) -> Result<(), LogError> {
        self.busy = false;
        self.ready.push_back(Arc::new(made?));
        self.next_sequence += 1;
        Ok(())
    }

    /// The next segment, if one is ready.
    pub fn take(&mut self) -> Option<Arc<Segment>> {
        self.ready.pop_front()
    }

    /// Begins to take a segment out of the log for good. One at a time: see [`Retiring::run`].
    pub fn begin_retiring(&mut self, segment: Arc<Segment>) -> Retiring {
        let spare = (self.spares.len() < SPARES && segment.size == self.files.size).then(|| {
            self.next_spare += 1;
            self.files.spare_path(self.next_spare - 1)
        });
        Retiring { files: self.files.clone(), segment, spare }
    }

    /// Takes the file that a [`Retiring`] has kept, if any.
    pub fn retired(&mut self, spare: Option<Spare>) {
        self.spares.extend(spare);
    }
}
