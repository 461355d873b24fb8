//! The folder as a file system: whatever is done to it is done to the folder below.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions, Permissions},
    io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink},
    time::{Duration, Instant, UNIX_EPOCH},
};

use nix::sys::statvfs::statvfs;

use super::stage::{Stage, python, start_python};

#[test]
fn files_folders_links_and_modes_are_those_of_the_folder_below() {
    let stage = Stage::new();
    let (path, below) = (|name| stage.path(name), |name| stage.below(name));
    fs::create_dir_all(path("a b/ä ö/c")).unwrap();
    fs::write(path("a b/ä ö/c/naïve \"file\"\n.txt"), "content").unwrap();
    assert_eq!(fs::read(below("a b/ä ö/c/naïve \"file\"\n.txt")).unwrap(), b"content");
    // A folder is renamed above open files.
    let open = File::open(path("a b/ä ö/c/naïve \"file\"\n.txt")).unwrap();
    fs::rename(path("a b"), path("z")).unwrap();
    assert!(fs::metadata(path("a b")).is_err_and(|error| error.kind() == ErrorKind::NotFound));
    assert_eq!(fs::read_to_string(path("z/ä ö/c/naïve \"file\"\n.txt")).unwrap(), "content");
    assert_eq!(open.metadata().unwrap().len(), 7);
    // Links of both kinds.
    fs::hard_link(path("z/ä ö/c/naïve \"file\"\n.txt"), path("second")).unwrap();
    assert_eq!(fs::metadata(path("second")).unwrap().nlink(), 2);
    assert_eq!(fs::metadata(path("second")).unwrap().ino(), open.metadata().unwrap().ino());
    fs::write(path("second"), "longer content").unwrap();
    assert_eq!(fs::read_to_string(path("z/ä ö/c/naïve \"file\"\n.txt")).unwrap(), "longer content");
    symlink("second", path("symbolic")).unwrap();
    assert_eq!(fs::read_link(path("symbolic")).unwrap().to_str(), Some("second"));
    assert_eq!(fs::read_to_string(path("symbolic")).unwrap(), "longer content");
    // Modes, also those that a mask of this process would take away, and times.
    OpenOptions::new().write(true).create_new(true).mode(0o640).open(path("private")).unwrap();
    for mode in [0o600, 0o4755, 0o000, 0o666] {
        fs::set_permissions(path("private"), Permissions::from_mode(mode)).unwrap();
        assert_eq!(fs::metadata(below("private")).unwrap().mode() & 0o7777, mode);
    }
    let time = UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    File::options().write(true).open(path("private")).unwrap().set_modified(time).unwrap();
    assert_eq!(fs::metadata(below("private")).unwrap().modified().unwrap(), time);
    assert_eq!(fs::metadata(path("private")).unwrap().modified().unwrap(), time);
    // Removal.
    assert!(fs::remove_dir(path("z")).is_err_and(|error| error.kind() == ErrorKind::DirectoryNotEmpty));
    fs::remove_dir_all(path("z")).unwrap();
    fs::remove_file(path("symbolic")).unwrap();
    let left: BTreeSet<_> = fs::read_dir(below("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["private".into(), "second".into()].into());
}

#[test]
fn a_rename_replaces_and_exchanges() {
    let stage = Stage::new();
    for name in ["one", "two", "three"] {
        fs::write(stage.path(name), name).unwrap();
    }
    let replaced = File::open(stage.path("two")).unwrap();
    fs::rename(stage.path("one"), stage.path("two")).unwrap();
    assert_eq!(fs::read_to_string(stage.path("two")).unwrap(), "one");
    let mut text = String::new();
    (&replaced).read_to_string(&mut text).unwrap();
    assert_eq!((text.as_str(), replaced.metadata().unwrap().nlink()), ("two", 0), "who has it open keeps it");
    let program = "import ctypes, os, sys\n\
                   libc = ctypes.CDLL(None, use_errno=True)\n\
                   a, b = (os.fsencode(name) for name in sys.argv[1:])\n\
                   for flags in (1, 2):\n    print(libc.renameat2(-100, a, -100, b, flags), ctypes.get_errno())";
    let (two, three) = (stage.path("two"), stage.path("three"));
    assert_eq!(python(program, &[&two, &three]), "-1 17\n0 17", "not over another file; exchanged");
    assert_eq!(fs::read_to_string(two).unwrap(), "three");
    assert_eq!(fs::read_to_string(three).unwrap(), "one");
}

#[test]
fn many_files_of_any_name_are_listed_once() {
    let stage = Stage::new();
    let names: BTreeSet<_> = (0..3000).map(|number| format!("file {number} {}", "ß".repeat(number % 90))).collect();
    names.iter().for_each(|name| fs::write(stage.path(name), name).unwrap());
    let listed: Vec<_> =
        fs::read_dir(stage.path("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(listed.len(), names.len());
    assert_eq!(BTreeSet::from_iter(listed), names);
    for name in &names {
        assert_eq!(fs::read_to_string(stage.path(name)).unwrap(), *name);
        fs::remove_file(stage.path(name)).unwrap();
        // Looked for, and made again: nobody believes that there is none.
        assert!(!stage.path(name).exists());
    }
    fs::write(stage.path(names.first().unwrap()), "again").unwrap();
    assert_eq!(fs::read_to_string(stage.path(names.first().unwrap())).unwrap(), "again");
    assert_eq!(fs::read_dir(stage.below("")).unwrap().count(), 1);
}

#[test]
fn a_large_file_is_what_was_written_and_is_below_at_once() {
    const PIECE: usize = 300_001;
    const HOLE: u64 = 5 << 30;
    let stage = Stage::new();
    let mut file = File::options().read(true).write(true).create_new(true).open(stage.path("large")).unwrap();
    let below = File::open(stage.below("large")).unwrap();
    for number in 0..100u64 {
        file.write_all(&vec![number as u8; PIECE]).unwrap();
        let mut last = [0];
        below.read_exact_at(&mut last, (number + 1) * PIECE as u64 - 1).unwrap();
        assert_eq!(last[0], number as u8, "no write is kept back");
    }
    file.seek(SeekFrom::Start(HOLE)).unwrap();
    file.write_all(b"far away").unwrap();
    assert_eq!(fs::metadata(stage.path("large")).unwrap().len(), HOLE + 8);
    assert!(fs::metadata(stage.path("large")).unwrap().blocks() < 1 << 17, "the hole takes no space");
    file.set_len(PIECE as u64 + 1).unwrap();
    assert_eq!(below.metadata().unwrap().len(), PIECE as u64 + 1);
    file.set_len(PIECE as u64 + 3).unwrap();
    let mut end = [9; 3];
    file.read_exact_at(&mut end, PIECE as u64).unwrap();
    assert_eq!(end, [1, 0, 0]);
    let mut appended = File::options().append(true).open(stage.path("large")).unwrap();
    appended.write_all(b"end").unwrap();
    drop(appended);
    file.read_exact_at(&mut end, PIECE as u64 + 3).unwrap();
    assert_eq!(&end, b"end");
    file.sync_all().unwrap();
}

#[test]
fn a_file_that_is_open_outlives_its_name_and_its_inode_number_is_not_mixed_up() {
    let stage = Stage::new();
    for round in 0..50 {
        let mut file = File::options().read(true).write(true).create_new(true).open(stage.path("x")).unwrap();
        writeln!(file, "{round}").unwrap();
        if round % 2 == 0 {
            fs::remove_file(stage.path("x")).unwrap();
            assert_eq!(file.metadata().unwrap().nlink(), 0);
            file.set_len(1).unwrap();
            fs::write(stage.path("x"), "other").unwrap();
            assert_eq!((file.metadata().unwrap().len(), fs::metadata(stage.path("x")).unwrap().len()), (1, 5));
        }
        drop(file);
        fs::remove_file(stage.path("x")).unwrap();
    }
    assert_eq!(fs::read_dir(stage.below("")).unwrap().count(), 0);
}

/// As the `-shm` file of SQLite is used.
#[test]
fn processes_share_what_they_map() {
    let stage = Stage::new();
    let program = "import mmap, sys\n\
                   file = open(sys.argv[1], 'r+b')\n\
                   memory = mmap.mmap(file.fileno(), 32768)\n\
                   print(memory[100], flush=True)\n\
                   sys.stdin.readline()\n\
                   print(memory[100], flush=True)\n\
                   memory[200] = 5\n\
                   print('written', flush=True)\n\
                   sys.stdin.readline()";
    let file = File::options().read(true).write(true).create_new(true).open(stage.path("x-shm")).unwrap();
    file.write_all_at(&[0], 32767).unwrap();
    file.write_all_at(&[1], 100).unwrap();
    let mut other = start_python(program, &[&stage.path("x-shm")]);
    let (mut input, mut output) = (other.stdin.take().unwrap(), BufReader::new(other.stdout.take().unwrap()).lines());
    assert_eq!(output.next().unwrap().unwrap(), "1");
    let writer = "import mmap, sys\n\
                  file = open(sys.argv[1], 'r+b')\n\
                  memory = mmap.mmap(file.fileno(), 32768)\n\
                  memory[100] = 7";
    python(writer, &[&stage.path("x-shm")]);
    writeln!(input).unwrap();
    assert_eq!(output.next().unwrap().unwrap(), "7", "what one process stores another one loads");
    assert_eq!(output.next().unwrap().unwrap(), "written");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 200).unwrap();
    assert_eq!(byte, [5], "and reads");
    drop(input);
    assert!(other.wait().unwrap().success());
    let mut stage = stage;
    drop(file);
    stage.unmount();
    assert_eq!(fs::read(stage.below("x-shm")).unwrap()[100], 7);
}

#[test]
fn locks_are_between_processes() {
    let stage = Stage::new();
    fs::write(stage.path("x"), "").unwrap();
    let program = "import fcntl, sys\n\
                   file = open(sys.argv[1], 'r+')\n\
                   fcntl.lockf(file, fcntl.LOCK_EX, 1, 0x40000000)\n\
                   print('locked', flush=True)\n\
                   sys.stdin.readline()";
    let mut other = start_python(program, &[&stage.path("x")]);
    let mut output = BufReader::new(other.stdout.take().unwrap()).lines();
    assert_eq!(output.next().unwrap().unwrap(), "locked");
    let attempt = "import fcntl, sys\n\
                   file = open(sys.argv[1], 'r+')\n\
                   for start in (0x40000000, 0x40000001):\n    \
                   try: print(fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, start))\n    \
                   except OSError as error: print(error.errno)";
    assert_eq!(python(attempt, &[&stage.path("x")]), "11\nNone");
    // A dead process holds nothing.
    other.kill().unwrap();
    other.wait().unwrap();
    assert_eq!(python(attempt, &[&stage.path("x")]), "None\nNone");
}

#[test]
fn a_user_of_its_own_has_its_own_files_and_no_others() {
    let stage = Stage::new();
    // The folder around it is this user's alone.
    fs::set_permissions(stage.root.path(), Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(stage.path(""), Permissions::from_mode(0o777)).unwrap();
    fs::write(stage.path("secret"), "root's").unwrap();
    fs::set_permissions(stage.path("secret"), Permissions::from_mode(0o600)).unwrap();
    let program = "import os, sys\n\
                   os.setgid(65534); os.setuid(65534); os.umask(0o027)\n\
                   os.chdir(sys.argv[1])\n\
                   open('mine', 'w').write('x'); os.mkdir('folder'); os.symlink('mine', 'link'); os.mkfifo('pipe')\n\
                   for act in (lambda: open('secret'), lambda: os.chown('mine', 0, 0), lambda: os.chmod('secret', 0o777)):\n    \
                   try: act(); print('done')\n    \
                   except PermissionError as error: print(error.errno)";
    assert_eq!(python(program, &[&stage.path("")]), "13\n1\n1");
    for (name, mode) in [("mine", 0o100_640), ("folder", 0o40_750), ("pipe", 0o10_640), ("link", 0o120_777)] {
        let found = fs::symlink_metadata(stage.below(name)).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode()), (65534, 65534, mode), "{name}");
    }
}

#[test]
fn space_is_that_of_the_file_system_below() {
    let stage = Stage::new();
    let (above, below) = (statvfs(&stage.path("")).unwrap(), statvfs(&stage.below("")).unwrap());
    assert_eq!((above.blocks(), above.fragment_size()), (below.blocks(), below.fragment_size()));
    assert_eq!(above.name_max(), below.name_max());
    assert!(above.blocks_available() > 0);
}

#[test]
fn an_end_waits_for_open_files_until_its_deadline() {
    let mut stage = Stage::new();
    fs::write(stage.path("x"), "content").unwrap();
    let mut file = File::open(stage.path("x")).unwrap();
    let started = Instant::now();
    stage.folder.take().unwrap().unmount(started + Duration::from_millis(100)).unwrap();
    assert!(started.elapsed() >= Duration::from_millis(100));
    assert!(file.read_to_string(&mut String::new()).is_err(), "whoever still has it open is told");
    drop(file);
    assert_eq!(fs::read_dir(stage.path("")).unwrap().count(), 0, "nothing is mounted any more");
    stage.mount();
    assert_eq!(fs::read_to_string(stage.path("x")).unwrap(), "content");
    stage.unmount();
}
