//! The calls of the kernel on the served folder, as the crate `fuser` brings them: translates each into one of the
//! [tree](super::tree), and its outcome into an answer. Must never wait on a thread that the kernel needs: whatever may
//! wait takes its reply along ([`super::waiting`]).
//!
//! What the kernel is told it may do, and what not (`docs/adr/0019-a-folder-through-fuse.md`): it caches attributes,
//! names and the absence of names, for nothing changes but through it. It writes through, so that each write can be
//! refused; it keeps the locks itself.

use std::{
    ffi::{OsStr, c_int},
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, Notifier, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use rustix::{
    fs::{FallocateFlags, OFlags, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, fallocate},
    io::Errno as Failure,
};

use super::{
    Trace,
    backing::Owner,
    sqlite::Part,
    tree::{Change, Entry, Tree, write_part},
    waiting::Waiting,
};

/// How long the kernel may believe what it knows. All changes go through it, and it knows what each of them changes.
const BELIEVED: Duration = Duration::from_secs(60);
/// The largest write in one call, in bytes: a page of a database always comes whole.
const LARGEST_WRITE: u32 = 1 << 20;
/// What programs take for a good size of a buffer, in bytes.
const BLOCK: u32 = 1 << 16;

/// The file system.
#[derive(Debug)]
pub(super) struct Calls {
    pub tree: Arc<Tree>,
    pub waiting: Arc<Waiting>,
    /// Tells the kernel what to forget.
    pub notifier: Arc<OnceLock<Notifier>>,
    pub told: Told,
}

/// Who is told of each call.
#[derive(Clone)]
pub(super) struct Told(pub Option<Trace>);

impl std::fmt::Debug for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Told").field(&self.0.is_some()).finish()
    }
}

impl Told {
    fn of(&self, call: &'static str) {
        if let Some(trace) = &self.0 {
            trace(call);
        }
    }
}

/// Bytes of a page of the kernel's cache, at least.
const CACHED: u64 = 4096;

/// Has the kernel forget the pages of a file from that of `from` to the one before that of `to`, which the call that
/// waits for its answer has locked.
fn forget(notifier: &OnceLock<Notifier>, number: INodeNo, from: u64, to: u64) {
    let (from, to) = (from / CACHED * CACHED, to / CACHED * CACHED);
    if let Some(notifier) = notifier.get().filter(|_| from < to) {
        // A file that it does not know, it has not cached.
        let _ = notifier.inval_inode(number, from as i64, (to - from) as i64);
    }
}

fn failure(error: Failure) -> Errno {
    Errno::from_i32(error.raw_os_error())
}

fn time(seconds: i64, nanoseconds: impl Into<u64>) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    base.and_then(|base| base.checked_add(Duration::from_nanos(nanoseconds.into()))).unwrap_or(UNIX_EPOCH)
}

fn kind(mode: u32) -> FileType {
    use rustix::fs::FileType as Kind;
    match Kind::from_raw_mode(mode) {
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharacterDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        _ => FileType::RegularFile,
    }
}

fn attributes(number: u64, stat: &Stat) -> FileAttr {
    let changed = time(stat.st_ctime, stat.st_ctime_nsec);
    FileAttr {
        ino: INodeNo(number),
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: changed,
        crtime: changed,
        kind: kind(stat.st_mode),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: stat.st_rdev as u32,
        blksize: BLOCK,
        flags: 0,
    }
}

/// The kernel remembers that there is no such file, too: SQLite looks for a journal before each read.
fn nothing() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

fn entry(reply: ReplyEntry, found: Result<Entry, Failure>) {
    match found {
        Ok(Entry { number, stat }) => reply.entry(&BELIEVED, &attributes(number, &stat), Generation(0)),
        Err(error) => reply.error(failure(error)),
    }
}

fn empty(reply: ReplyEmpty, done: Result<(), Failure>) {
    match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(failure(error)),
    }
}

fn attribute(reply: ReplyAttr, number: u64, found: Result<Stat, Failure>) {
    match found {
        Ok(stat) => reply.attr(&BELIEVED, &attributes(number, &stat)),
        Err(error) => reply.error(failure(error)),
    }
}

fn owner(request: &Request) -> Owner {
    Owner { user: request.uid(), group: request.gid() }
}

fn moment(time: Option<TimeOrNow>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(TimeOrNow::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(TimeOrNow::SpecificTime(time)) => match time.duration_since(UNIX_EPOCH) {
            Ok(since) => Timespec { tv_sec: since.as_secs() as i64, tv_nsec: since.subsec_nanos().into() },
            // Whole seconds are enough for what is older than that.
            Err(before) => Timespec { tv_sec: -(before.duration().as_secs() as i64), tv_nsec: 0 },
        },
    }
}

fn open_flags(flags: c_int) -> OFlags {
    OFlags::from_bits_retain(flags as u32)
}

impl Calls {
    /// What was read stays in the cache of the kernel. Files of a database need no call when they are closed.
    fn open_answer(&self, number: u64) -> FopenFlags {
        match self.tree.part(number) {
            Some(Part::Wal(guarded)) if guarded.is_wal_stale() => FopenFlags::FOPEN_NOFLUSH,
            Some(_) => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
            None => FopenFlags::FOPEN_KEEP_CACHE,
        }
    }
}

impl Filesystem for Calls {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // The nearest value that it takes is not needed: each kernel takes this one.
        let _ = config.set_max_write(LARGEST_WRITE);
        // Without it, a folder is searched and changed by one process at a time.
        let _ = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.tree.look_up(parent.0, name);
        self.told.of("lookup");
        match found {
            Err(Failure::NOENT) => reply.entry(&BELIEVED, &nothing(), Generation(0)),
            found => entry(reply, found),
        }
    }

    fn forget(&self, _request: &Request, number: INodeNo, count: u64) {
        self.tree.forget(number.0, count);
    }

    fn getattr(&self, _request: &Request, number: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        let found = self.tree.attributes(number.0, handle.map(|handle| handle.0));
        self.told.of("getattr");
        attribute(reply, number.0, found);
    }

    fn setattr(
        &self,
        _request: &Request,
        number: INodeNo,
        mode: Option<u32>,
        user: Option<u32>,
        group: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _changed: Option<SystemTime>,
        handle: Option<FileHandle>,
        _created: Option<SystemTime>,
        _checked: Option<SystemTime>,
        _backed_up: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let times = (accessed.is_some() || modified.is_some())
            .then(|| Timestamps { last_access: moment(accessed), last_modification: moment(modified) });
        let change = Change { mode, user, group, size, times };
        let (tree, number, handle) = (Arc::clone(&self.tree), number.0, handle.map(|handle| handle.0));
        let told = self.told.clone();
        let work = move |room: Result<&[u8], Failure>| {
            let changed = room.and_then(|_| tree.change(number, handle, &change));
            told.of("setattr");
            attribute(reply, number, changed);
        };
        match size.and(self.tree.part(number)) {
            Some(_) => self.waiting.run(b"", work),
            None => work(Ok(b"")),
        }
    }

    fn readlink(&self, _request: &Request, number: INodeNo, reply: ReplyData) {
        match self.tree.read_symlink(number.0) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(failure(error)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        device: u32,
        reply: ReplyEntry,
    ) {
        entry(reply, self.tree.make_node((parent.0, name), mode, device.into(), owner(request)));
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        entry(reply, self.tree.make_folder(parent.0, name, mode, owner(request)));
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (tree, told) = (Arc::clone(&self.tree), self.told.clone());
        self.waiting.run(name.as_bytes(), move |name| {
            let removed = name.and_then(|name| tree.remove(parent.0, OsStr::from_bytes(name), false));
            told.of("unlink");
            empty(reply, removed);
        });
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.tree.remove(parent.0, name, true));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        entry(reply, self.tree.make_symlink(parent.0, name, target, owner(request)));
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let flags = rustix::fs::RenameFlags::from_bits_retain(flags.bits());
        empty(reply, self.tree.rename((parent.0, name), (new_parent.0, new_name), flags));
    }

    fn link(&self, _request: &Request, number: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(reply, self.tree.link(number.0, parent.0, name));
    }

    fn open(&self, _request: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.tree.open(number.0, open_flags(flags.0));
        self.told.of("open");
        match opened {
            Ok(handle) => reply.opened(FileHandle(handle), self.open_answer(number.0)),
            Err(error) => reply.error(failure(error)),
        }
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let created = self.tree.create((parent.0, name), mode, open_flags(flags), owner(request));
        self.told.of("create");
        match created {
            Ok((Entry { number, stat }, handle)) => {
                let attributes = attributes(number, &stat);
                let flags = self.open_answer(number);
                reply.created(&BELIEVED, &attributes, Generation(0), FileHandle(handle), flags);
            }
            Err(error) => reply.error(failure(error)),
        }
    }

    fn read(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = self.tree.read(handle.0, offset, size);
        self.told.of("read");
        match read {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(failure(error)),
        }
    }

    fn write(
        &self,
        _request: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        bytes: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let open = match self.tree.opened(handle.0) {
            Ok(open) => open,
            Err(error) => return reply.error(failure(error)),
        };
        let told = self.told.clone();
        let answer = move |done: Result<(), Failure>, count: usize| {
            told.of("write");
            match done {
                Ok(()) => reply.written(count as u32),
                Err(error) => reply.error(failure(error)),
            }
        };
        let Some(part) = self.tree.part(open.number) else {
            return answer(self.tree.write(&open, offset, bytes), bytes.len());
        };
        let notifier = Arc::clone(&self.notifier);
        self.waiting.run(bytes, move |bytes| {
            let forget = |from, to| forget(&notifier, number, from, to);
            let done = bytes.and_then(|bytes| write_part(&part, &open, offset, bytes, &forget));
            answer(done, bytes.map_or(0, <[u8]>::len));
        });
    }

    fn flush(&self, _request: &Request, _number: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.tree.close(handle.0);
        self.told.of("release");
        reply.ok();
    }

    fn fsync(&self, _request: &Request, _number: INodeNo, handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        let open = match self.tree.opened(handle.0) {
            Ok(open) => open,
            Err(error) => return reply.error(failure(error)),
        };
        // The raft log makes a database durable, and its journals count for nothing after a crash.
        if self.tree.part(open.number).is_some() {
            self.told.of("fsync");
            return reply.ok();
        }
        self.waiting.run(b"", move |room| {
            let synced = room.and_then(|_| {
                open.file.sync_all().map_err(|error| Failure::from_io_error(&error).unwrap_or(Failure::IO))
            });
            empty(reply, synced);
        });
    }

    fn opendir(&self, _request: &Request, number: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.tree.open_folder(number.0) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(error) => reply.error(failure(error)),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listed = match self.tree.listed(handle.0) {
            Ok(listed) => listed,
            Err(error) => return reply.error(failure(error)),
        };
        let first = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, name) in listed.iter().enumerate().skip(first) {
            let kind = kind(name.kind.as_raw_mode());
            if reply.add(INodeNo(name.inode), at as u64 + 1, kind, OsStr::from_bytes(name.name.as_bytes())) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.tree.close_folder(handle.0);
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _number: INodeNo, reply: ReplyStatfs) {
        match self.tree.space() {
            Ok(space) => reply.statfs(
                space.f_blocks,
                space.f_bfree,
                space.f_bavail,
                space.f_files,
                space.f_ffree,
                space.f_bsize as u32,
                space.f_namemax as u32,
                space.f_frsize as u32,
            ),
            Err(error) => reply.error(failure(error)),
        }
    }

    fn fallocate(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = FallocateFlags::from_bits_retain(mode as u32);
        let done = self.tree.opened(handle.0).and_then(|open| match self.tree.part(open.number) {
            None => fallocate(&open.file, mode, offset, length),
            // Who needs it writes instead.
            Some(_) => Err(Failure::OPNOTSUPP),
        });
        empty(reply, done);
    }
}
