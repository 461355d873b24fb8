//! Dropped tails: entries of this node's raft log that another primary's entries have replaced, kept for the
//! administrator in `<data>/rollback/`. Owns that folder. The cluster must never read it again, and it must never grow
//! without bound.
//!
//! No majority had these entries. So no client was told that they are committed, and this node's database never had
//! them: a transaction reaches SQLite's files on the primary, and the database file elsewhere, only when a majority has
//! it.
//!
//! `<UTC time>-epoch<E>-index<A>-<B>.tail` (mode 0600), integers little-endian: `"TLTAIL01"`, `cluster u128`, `node
//! u64`, `first u64`, `last u64` (of what was dropped), `epoch u64` (of the last dropped entry), `CRC-32C u32` of all
//! before, `0 u32`. Then for each entry that was kept: `index u64`, `term u64`, `type u32` (0 command, 2 membership),
//! `data length u32`, `context length u32`, `CRC-32C u32` of these 28 bytes, data and context, data, context. Beside it
//! is a `.txt` for people.

mod rows;
mod text;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, ErrorKind, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use raft::eraftpb::{Entry, EntryType};

use super::{clear_away, durable_write, folder_of, fsync_dir, make_private_dir, raft_log::RetainedTail};
use crate::{
    cluster::{ClusterId, NodeId},
    descriptors,
    little_endian::{u32_at, u64_at},
};
use text::Summary;

/// Folder of the tails, in the data folder.
pub const FOLDER: &str = "rollback";
/// Largest file, in bytes. Entries beyond that are counted, but not kept.
pub const MAX_BYTES: u64 = 64 << 20;
/// Files that are kept. The oldest is deleted when there are more.
pub const MAX_FILES: usize = 16;

const MAGIC: &[u8; 8] = b"TLTAIL01";
const HEADER: usize = 64;
const HEADER_CRC: usize = 56;
const ENTRY: usize = 32;
const ENTRY_CRC: usize = 28;

/// The header of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub cluster: ClusterId,
    pub node: NodeId,
    /// First and last index of what was dropped.
    pub first: u64,
    pub last: u64,
    /// Epoch of the last dropped entry.
    pub epoch: u64,
}

impl Header {
    fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..24].copy_from_slice(&self.cluster.0.to_le_bytes());
        for (at, value) in [(24, self.node), (32, self.first), (40, self.last), (48, self.epoch)] {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let crc = crc32c::crc32c(&bytes[..HEADER_CRC]);
        bytes[HEADER_CRC..HEADER_CRC + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER]) -> Result<Self, &'static str> {
        let long = |at| u64_at(bytes, at);
        if &bytes[..8] != MAGIC {
            return Err("it is not a dropped tail of a version that this program knows");
        }
        if u32_at(bytes, HEADER_CRC) != crc32c::crc32c(&bytes[..HEADER_CRC]) {
            return Err("the checksum of its header is wrong");
        }
        let cluster = ClusterId(u128::from(long(8)) | u128::from(long(16)) << 64);
        Ok(Self { cluster, node: long(24), first: long(32), last: long(40), epoch: long(48) })
    }
}

fn encode_entry(entry: &Entry, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&entry.index.to_le_bytes());
    out.extend_from_slice(&entry.term.to_le_bytes());
    let lengths = [entry.entry_type as u32, entry.data.len() as u32, entry.context.len() as u32];
    lengths.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
    let crc = crc32c::crc32c(&out[start..]);
    let crc = crc32c::crc32c_append(crc32c::crc32c_append(crc, &entry.data), &entry.context);
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(&entry.data);
    out.extend_from_slice(&entry.context);
}

/// A tail whose entries are written, but not synced yet.
pub struct Draft {
    path: PathBuf,
    file: File,
    header: Header,
    /// Entries in the file.
    kept: u64,
    summary: Summary,
}

/// A tail in its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The `.tail`; the readable `.txt` is beside it.
    pub path: PathBuf,
    /// Entries that were dropped, and how many of them are in the file.
    pub dropped: u64,
    pub kept: u64,
    /// Transactions among those in the file, whole or not.
    pub transactions: u64,
}

/// Writes the entries to a new file in `folder`, which is created if it is missing.
///
/// # Errors
/// When an entry cannot be read, or the disk fails or is full. No file is left then.
pub fn write(folder: &Path, cluster: ClusterId, node: NodeId, held: &RetainedTail) -> io::Result<Draft> {
    make_private_dir(folder)?;
    let header = Header { cluster, node, first: held.first(), last: held.last(), epoch: held.last_term() };
    let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%S%.3fZ");
    let name = format!("{time}-epoch{}-index{}-{}.tail", header.epoch, header.first, header.last);
    let path = folder.join(name);
    let file = descriptors::open(|| OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path))?;
    let mut draft = Draft { path, file, header, kept: 0, summary: Summary::default() };
    match draft.write_entries(held) {
        Ok(()) => Ok(draft),
        Err(error) => {
            let _ = fs::remove_file(&draft.path); // half of it explains nothing
            Err(error)
        }
    }
}

impl Draft {
    fn write_entries(&mut self, held: &RetainedTail) -> io::Result<()> {
        let mut out = BufWriter::new(&self.file);
        out.write_all(&self.header.encode())?;
        let (mut size, mut bytes, mut full) = (HEADER as u64, Vec::new(), false);
        held.for_each(&mut |entry| {
            bytes.clear();
            encode_entry(&entry, &mut bytes);
            // The first entries are the ones to keep: whatever followed was built on them.
            full |= size + bytes.len() as u64 > MAX_BYTES;
            if !full {
                size += bytes.len() as u64;
                self.kept += 1;
                self.summary.add(&entry);
                out.write_all(&bytes)?;
            }
            Ok(())
        })?;
        out.flush()
    }

    /// Makes the file durable, writes its summary, which compares it with the `database` file, and removes the oldest
    /// files beyond [`MAX_FILES`]. Returns what was kept, and the paths of the removed files. The database file is
    /// never opened here: closing any descriptor of it would drop SQLite's locks on it (POSIX).
    ///
    /// # Errors
    /// When the disk fails or is full. The `.tail` file may be there all the same.
    pub fn finish(self, database: Option<&File>) -> io::Result<(Kept, Vec<PathBuf>)> {
        self.file.sync_all()?;
        let folder = folder_of(&self.path);
        fsync_dir(folder)?;
        let text = self.summary.render(&self.header, &self.path, self.kept, database);
        durable_write(&self.path.with_extension("txt"), text.as_bytes())?;
        let removed = prune(folder)?;
        let Self { path, header, kept, summary, .. } = self;
        let dropped = header.last - header.first + 1;
        Ok((Kept { path, dropped, kept, transactions: summary.transactions() }, removed))
    }
}

/// Removes the oldest tails beyond [`MAX_FILES`], with their summaries. Their names begin with the time, so they sort
/// by age.
fn prune(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut tails = Vec::new();
    for file in fs::read_dir(folder)? {
        let path = file?.path();
        if path.extension().is_some_and(|extension| extension == "tail") {
            tails.push(path);
        }
    }
    tails.sort();
    tails.truncate(tails.len().saturating_sub(MAX_FILES));
    for tail in &tails {
        fs::remove_file(tail)?;
        clear_away(&tail.with_extension("txt"))?;
    }
    Ok(tails)
}

/// Reads a file back, for the administrator's tools and for tests.
///
/// # Errors
/// When the file cannot be read. `InvalidData` with a reason when it is damaged or ends early.
pub fn read(path: &Path) -> io::Result<(Header, Vec<Entry>)> {
    let damaged = |reason: &str| io::Error::new(ErrorKind::InvalidData, format!("{}: {reason}", path.display()));
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    let (head, mut rest) = bytes.split_first_chunk::<HEADER>().ok_or_else(|| damaged("it is too short"))?;
    let header = Header::decode(head).map_err(damaged)?;
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (entry, length) = decode_entry(rest)
            .ok_or_else(|| damaged(&format!("the entry after the first {} is damaged or incomplete", entries.len())))?;
        entries.push(entry);
        rest = &rest[length..];
    }
    Ok((header, entries))
}

fn decode_entry(bytes: &[u8]) -> Option<(Entry, usize)> {
    let head = bytes.get(..ENTRY)?;
    let (data, context) = (u32_at(head, 20) as usize, u32_at(head, 24) as usize);
    let body = bytes.get(ENTRY..ENTRY.checked_add(data)?.checked_add(context)?)?;
    if crc32c::crc32c_append(crc32c::crc32c(&head[..ENTRY_CRC]), body) != u32_at(head, ENTRY_CRC) {
        return None;
    }
    let entry_type = match u32_at(head, 16) {
        0 => EntryType::EntryNormal,
        1 => EntryType::EntryConfChange,
        _ => EntryType::EntryConfChangeV2,
    };
    let (index, term) = (u64_at(head, 0), u64_at(head, 8));
    let (data_bytes, context_bytes) = body.split_at(data);
    let (data, context) = (data_bytes.to_vec().into(), context_bytes.to_vec().into());
    Some((Entry { entry_type, index, term, data, context, ..Entry::default() }, ENTRY + body.len()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use raft::eraftpb::ConfState;

    use super::*;
    use crate::storage::{
        folder::catalogue,
        raft_log::{Options, RaftLog, RealDisk},
        transaction::{Commit, PagesBuilder},
    };

    fn log(dir: &Path) -> RaftLog {
        let conf = ConfState { voters: vec![1], ..ConfState::default() };
        RaftLog::open(dir, (ClusterId(9), 1), conf, Options::default(), RealDisk).unwrap()
    }

    fn pages(transaction: u64, part: u32, commit: bool) -> Vec<u8> {
        let mut builder = PagesBuilder::new(1, transaction, part, 512);
        [2, 3, 4, 9].iter().for_each(|number| builder.push(*number, &[*number as u8; 512]));
        builder.finish(commit.then_some(Commit { database_pages: 9, checksum: 5 }))
    }

    fn entry(index: u64, term: u64, data: Vec<u8>) -> Entry {
        Entry { index, term, data: data.into(), ..Entry::default() }
    }

    #[test]
    fn replaced_entries_are_kept_and_told() {
        let root = tempfile::tempdir().unwrap();
        let log = log(&root.path().join("raft-log"));
        let old = vec![
            entry(2, 1, pages(7, 0, true)),
            entry(3, 1, Vec::new()),
            entry(4, 1, pages(8, 0, false)),
            entry(5, 1, pages(8, 1, true)),
            entry(6, 1, pages(9, 0, false)),
        ];
        log.append(&old, None).unwrap().sync().unwrap();
        assert!(log.hold(7).is_none() && log.hold(1).is_none());
        let held = log.hold(3).unwrap();
        log.append(&[entry(3, 2, Vec::new())], None).unwrap().sync().unwrap();
        assert_eq!(log.last_index(), 3);
        let folder = root.path().join(FOLDER);
        let (kept, removed) = write(&folder, ClusterId(9), 1, &held).unwrap().finish(None).unwrap();
        assert_eq!((kept.dropped, kept.kept, kept.transactions, removed.len()), (4, 4, 2, 0));
        assert_eq!(fs::metadata(&kept.path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(kept.path.to_string_lossy().ends_with("Z-epoch1-index3-6.tail"), "{}", kept.path.display());
        let (header, entries) = read(&kept.path).unwrap();
        assert_eq!(header, Header { cluster: ClusterId(9), node: 1, first: 3, last: 6, epoch: 1 });
        assert_eq!(entries, old[1..]);
        let text = fs::read_to_string(kept.path.with_extension("txt")).unwrap();
        assert!(text.contains("transaction 0000000000000008, entries 4 to 5"), "{text}");
        assert!(text.contains("pages 2-4, 9"), "{text}");
        assert!(text.contains("transaction 0000000000000009") && text.contains("incomplete"), "{text}");
        let bytes = fs::read(&kept.path).unwrap();
        for (at, cut) in [(9, 0), (HEADER + 3, 0), (bytes.len() - 1, 0), (0, 1), (0, bytes.len() - 9)] {
            let mut bad = bytes[..bytes.len() - cut].to_vec();
            bad[at] ^= u8::from(cut == 0);
            fs::write(&kept.path, bad).unwrap();
            assert_eq!(read(&kept.path).unwrap_err().kind(), ErrorKind::InvalidData, "{at} {cut}");
        }
    }

    #[test]
    fn a_services_transactions_stand_between_those_of_the_console_and_show_no_rows() {
        let mut other = PagesBuilder::new(5, 11, 0, 4096);
        other.push(1, &[1; 4096]);
        let change = catalogue::Change::Add("x.db".into()).encode(5).unwrap();
        let all = [pages(8, 0, false), change, other.finish(None), pages(8, 1, true)];
        let mut summary = text::Summary::default();
        (2..).zip(all).for_each(|(index, data)| summary.add(&entry(index, 1, data)));
        assert_eq!(summary.transactions(), 2);
        let header = Header { cluster: ClusterId(9), node: 1, first: 2, last: 5, epoch: 1 };
        let text = summary.render(&header, Path::new("x"), 4, None);
        assert!(
            text.contains("transaction 0000000000000008, entries 2 to 5\n    pages 2-4, 9 (4 of 512 bytes)"),
            "{text}"
        );
        assert!(text.contains("transaction 000000000000000b of database 5, entries 4 to 4, incomplete"), "{text}");
        assert!(text.contains("entry 3: a database of the service"), "{text}");
    }

    #[test]
    fn only_the_newest_files_stay() {
        let root = tempfile::tempdir().unwrap();
        let log = log(&root.path().join("raft-log"));
        log.append(&[entry(2, 1, pages(7, 0, true))], None).unwrap().sync().unwrap();
        let folder = root.path().join(FOLDER);
        make_private_dir(&folder).unwrap();
        for day in 10..10 + MAX_FILES {
            for kind in ["tail", "txt"] {
                fs::write(folder.join(format!("200001{day}T000000.000Z-epoch1-index2-2.{kind}")), "").unwrap();
            }
        }
        fs::write(folder.join("note-of-the-administrator"), "").unwrap();
        let draft = write(&folder, ClusterId(9), 1, &log.hold(2).unwrap()).unwrap();
        let (kept, removed) = draft.finish(None).unwrap();
        assert_eq!(removed, [folder.join("20000110T000000.000Z-epoch1-index2-2.tail")]);
        assert!(kept.path.exists());
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 2 * MAX_FILES + 1);
    }
}
