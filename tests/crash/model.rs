//! A disk in memory that remembers every operation, so that the world can be stopped after, or in the middle of, each one.
//!
//! What a power loss leaves: everything synced; of each 512-byte sector written since, any of its versions, whatever
//! the order of the writes; of the directory operations since the last sync of the directory, any first part of them.
//! A failed sync leaves the pages clean: they can be read, and never reach the disk by themselves.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use twistlock_ha::storage::raft_log::{Disk, DiskFile};

const SECTOR: usize = 512;

/// Splitmix64: the same numbers from the same seed on every version of every crate.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

/// The files after a crash.
pub type Image = BTreeMap<String, Vec<u8>>;

#[derive(Clone)]
pub enum Op {
    Create(String, usize),
    Rename(String, String),
    Remove(String),
    SyncDir,
    Write(usize, usize, Arc<[u8]>),
    Sync(usize),
    FailedSync(usize),
}

#[derive(Default)]
struct World {
    names: BTreeMap<String, usize>,
    files: Vec<Vec<u8>>,
    trace: Vec<Op>,
    /// The operation with this number fails with an I/O error.
    fail_at: Option<usize>,
    /// Most bytes of all files together.
    quota: Option<usize>,
}

impl World {
    /// Fails if this operation is the one to fail.
    fn begin(&mut self) -> io::Result<()> {
        if self.fail_at == Some(self.trace.len()) {
            self.fail_at = None;
            return Err(io::Error::other("made to fail"));
        }
        Ok(())
    }

    fn missing() -> io::Error {
        io::Error::from(io::ErrorKind::NotFound)
    }
}

/// The disk. Clones are the same disk.
#[derive(Clone, Default)]
pub struct Model {
    world: Arc<Mutex<World>>,
    /// What was on it from the beginning.
    image: Arc<Image>,
}

struct ModelFile {
    world: Arc<Mutex<World>>,
    id: usize,
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

impl Model {
    pub fn new(image: Image) -> Self {
        let names = image.keys().cloned().zip(0..).collect();
        let world = World { names, files: image.values().cloned().collect(), ..World::default() };
        Self { world: Arc::new(Mutex::new(world)), image: Arc::new(image) }
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// Number of operations so far.
    pub fn ops(&self) -> usize {
        self.lock().trace.len()
    }

    pub fn fail_at(&self, op: Option<usize>) {
        self.lock().fail_at = op;
    }

    pub fn set_quota(&self, quota: Option<usize>) {
        self.lock().quota = quota;
    }

    /// The files as a reader sees them now: what a killed process leaves.
    pub fn live(&self) -> Image {
        let world = self.lock();
        world.names.iter().map(|(name, id)| (name.clone(), world.files[*id].clone())).collect()
    }

    /// A copy of all operations, to be replayed by [`Platter`].
    pub fn trace(&self) -> Vec<Op> {
        self.lock().trace.clone()
    }

    pub fn platter(&self) -> Platter {
        Platter::new(&self.image)
    }
}

impl Disk for Model {
    fn make_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut world = self.lock();
        world.begin()?;
        let id = world.files.len();
        world.files.push(Vec::new());
        world.names.insert(name(path), id);
        world.trace.push(Op::Create(name(path), id));
        Ok(Box::new(ModelFile { world: self.world.clone(), id }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let id = *self.lock().names.get(&name(path)).ok_or_else(World::missing)?;
        Ok(Box::new(ModelFile { world: self.world.clone(), id }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut world = self.lock();
        world.begin()?;
        let id = world.names.remove(&name(from)).ok_or_else(World::missing)?;
        assert!(world.names.insert(name(to), id).is_none(), "{} replaced", to.display());
        world.trace.push(Op::Rename(name(from), name(to)));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut world = self.lock();
        world.begin()?;
        let id = world.names.remove(&name(path)).ok_or_else(World::missing)?;
        world.files[id] = Vec::new();
        world.trace.push(Op::Remove(name(path)));
        Ok(())
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        let mut world = self.lock();
        world.begin()?;
        world.trace.push(Op::SyncDir);
        Ok(())
    }

    fn list(&self, _: &Path) -> io::Result<Vec<String>> {
        Ok(self.lock().names.keys().cloned().collect())
    }
}

fn put(file: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    file.resize(file.len().max(offset + bytes.len()), 0);
    file[offset..offset + bytes.len()].copy_from_slice(bytes);
}

impl DiskFile for ModelFile {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let world = self.world.lock().unwrap();
        let file = &world.files[self.id];
        let found = file.get(offset as usize..offset as usize + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(found);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut world = self.world.lock().unwrap();
        world.begin()?;
        let used: usize = world.files.iter().map(Vec::len).sum();
        let grown = (offset as usize + bytes.len()).saturating_sub(world.files[self.id].len());
        if grown > 0 && world.quota.is_some_and(|quota| used + grown > quota) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        put(&mut world.files[self.id], offset as usize, bytes);
        world.trace.push(Op::Write(self.id, offset as usize, bytes.into()));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut world = self.world.lock().unwrap();
        if let Err(error) = world.begin() {
            world.trace.push(Op::FailedSync(self.id));
            return Err(error);
        }
        world.trace.push(Op::Sync(self.id));
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.world.lock().unwrap().files[self.id].len() as u64)
    }
}

/// Offset and bytes of a write that no sync covers yet.
type Written = (usize, Arc<[u8]>);

/// What has really reached the disk, as the operations go by.
pub struct Platter {
    names: BTreeMap<String, usize>,
    files: HashMap<usize, Vec<u8>>,
    dirty: BTreeMap<usize, Vec<Written>>,
    /// Directory operations since the last sync of it.
    directory: Vec<Op>,
}

fn apply(names: &mut BTreeMap<String, usize>, op: &Op) {
    match op {
        Op::Create(name, id) => {
            names.insert(name.clone(), *id);
        }
        Op::Rename(from, to) => {
            let id = names.remove(from).expect("directory operations stay in order");
            names.insert(to.clone(), id);
        }
        Op::Remove(name) => {
            names.remove(name);
        }
        _ => unreachable!("not an operation on a directory"),
    }
}

impl Platter {
    fn new(image: &Image) -> Self {
        let names = image.keys().cloned().zip(0..).collect();
        let files = image.values().cloned().enumerate().collect();
        Self { names, files, dirty: BTreeMap::new(), directory: Vec::new() }
    }

    /// One operation has begun; only a sync changes what is certain.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Create(..) | Op::Rename(..) | Op::Remove(_) => self.directory.push(op.clone()),
            Op::SyncDir => self.directory.drain(..).for_each(|op| apply(&mut self.names, &op)),
            Op::Write(id, offset, bytes) => self.dirty.entry(*id).or_default().push((*offset, bytes.clone())),
            Op::Sync(id) => {
                for (offset, bytes) in self.dirty.remove(id).unwrap_or_default() {
                    put(self.files.entry(*id).or_default(), offset, &bytes);
                }
            }
            Op::FailedSync(id) => {
                self.dirty.remove(id);
            }
        }
    }

    /// What a power loss leaves while `torn` is under way: part of it, if it is a write, may be there.
    pub fn power_loss(&self, torn: Option<&Op>, random: &mut Random) -> Image {
        let likely = [1, 2, 9][random.below(3) as usize];
        let mut names = self.names.clone();
        let done = random.below(self.directory.len() as u64 + 1) as usize;
        self.directory[..done].iter().for_each(|op| apply(&mut names, op));
        let mut image = Image::new();
        for (name, id) in names {
            let mut file = self.files.get(&id).cloned().unwrap_or_default();
            let mut writes: Vec<(usize, &[u8])> =
                self.dirty.get(&id).into_iter().flatten().map(|(offset, bytes)| (*offset, &bytes[..])).collect();
            match torn {
                Some(Op::Write(torn, offset, bytes)) if *torn == id => {
                    let length = random.below(bytes.len() as u64 + 1) as usize;
                    writes.push((*offset, &bytes[..length]));
                }
                _ => {}
            }
            let mut sectors: BTreeMap<usize, Vec<(usize, &[u8])>> = BTreeMap::new();
            for (offset, bytes) in writes {
                let (mut offset, mut bytes) = (offset, bytes);
                while !bytes.is_empty() {
                    let (part, rest) = bytes.split_at(bytes.len().min(SECTOR - offset % SECTOR));
                    sectors.entry(offset / SECTOR).or_default().push((offset, part));
                    (offset, bytes) = (offset + part.len(), rest);
                }
            }
            for versions in sectors.values() {
                // 1: mostly the oldest version, 2: any, 9: mostly the newest.
                let count = versions.len() as u64;
                let version = match (likely, random.below(4)) {
                    (1, 0) | (2, _) => random.below(count + 1),
                    (9, 1..) => count,
                    (9, _) => random.below(count + 1),
                    _ => 0,
                };
                for (offset, part) in &versions[..version as usize] {
                    put(&mut file, *offset, part);
                }
            }
            image.insert(name, file);
        }
        image
    }
}
