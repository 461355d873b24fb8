//! The durable record that the database file holds everything up to raft index C (`docs/design.md`, "Checkpoints,
//! replay and rollback").
//!
//! It is one small file that is replaced as a whole, so it always has the old record or the new one. Must be written
//! only after the database file was synced.
//!
//! Layout, 48 bytes, little-endian: `"TLCKPT01"`, `database u32`, `page_size u32`, `pages u32`, `0 u32`, `index u64`,
//! `checksum u64`, `CRC-32C u32` of all bytes before it, `0 u32`.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{
    pacer::Pacer,
    replace_file,
    vfs::write_back,
    watch::{Act, Place, run},
};
use crate::little_endian::{u32_at, u64_at};

const MAGIC: &[u8; 8] = b"TLCKPT01";
const SIZE: usize = 48;
const CRC_AT: usize = 40;

/// What the database file is known to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Raft index C; 0 if there has never been a checkpoint.
    pub index: u64,
    /// Size of a page in bytes; 0 for a database without pages.
    pub page_size: u32,
    /// Size of the database at C, in pages.
    pub pages: u32,
    /// Checksum of the database at C.
    pub checksum: u64,
}

impl Record {
    fn encode(&self, database: u32) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&database.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.page_size.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.pages.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.index.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.checksum.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..CRC_AT]);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8], database: u32) -> Result<Self, &'static str> {
        let bytes: &[u8; SIZE] = bytes.try_into().map_err(|_| "it has the wrong length")?;
        let (word, long) = (|at| u32_at(bytes, at), |at| u64_at(bytes, at));
        if &bytes[..8] != MAGIC {
            return Err("it is not a checkpoint record of a version that this program knows");
        }
        if word(CRC_AT) != crc32c::crc32c(&bytes[..CRC_AT]) {
            return Err("its checksum is wrong");
        }
        if word(8) != database {
            return Err("it belongs to another database");
        }
        let record = Self { index: long(24), page_size: word(12), pages: word(16), checksum: long(32) };
        if record.pages > 0 && !crate::storage::transaction::valid_page_size(record.page_size) {
            return Err("it names an impossible page size");
        }
        Ok(record)
    }

    /// Reads the record. If there is no file, it is the default one.
    ///
    /// # Errors
    /// When the file cannot be read now. `InvalidData` with a reason when it is damaged or belongs to another database.
    pub fn read(path: &Path, database: u32) -> io::Result<Self> {
        match fs::read(path) {
            Ok(bytes) => Self::decode(&bytes, database).map_err(|what| io::Error::new(ErrorKind::InvalidData, what)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    /// Makes the record durable.
    ///
    /// # Errors
    /// When the disk fails or is full. The file then has either the old record or the new one.
    pub fn write(&self, path: &Path, database: u32) -> io::Result<()> {
        replace_file(Place::Checkpoint, path, &self.encode(database))
    }
}

/// Makes a checkpoint durable: waits for the disk, on any thread, while the database goes on being used. What is
/// written to the file meanwhile is ahead of the record, as at any other time. There is one at a time for each
/// database.
#[derive(Debug)]
#[must_use = "the database waits for the outcome"]
pub struct Saving {
    pub(super) file: Arc<File>,
    pub(super) path: PathBuf,
    pub(super) database: u32,
    pub(super) record: Record,
}

/// The outcome of a [`Saving`], for [`super::database::Database::saved`].
#[derive(Debug)]
pub struct Saved {
    pub(super) database: u32,
    pub(super) record: Record,
    pub(super) synced: io::Result<()>,
    pub(super) written: io::Result<()>,
}

impl Saving {
    /// Syncs the file, then writes the record.
    pub fn save(self) -> Saved {
        self.save_paced(Pacer::new(Duration::ZERO))
    }

    /// As [`Self::save`], at this pace.
    pub fn save_paced(self, mut pacer: Pacer) -> Saved {
        let bytes = u64::from(self.record.pages) * u64::from(self.record.page_size);
        let sync = |work: &dyn Fn() -> io::Result<()>| run(Place::Database, Act::Sync, work);
        let paced = pacer.in_steps(0..bytes, |from, bytes| sync(&|| write_back(&self.file, from, bytes)));
        let synced = paced.and_then(|()| sync(&|| self.file.sync_all()));
        let written = if synced.is_ok() { self.record.write(&self.path, self.database) } else { Ok(()) };
        Saved { database: self.database, record: self.record, synced, written }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.checkpoint");
        assert_eq!(Record::read(&path, 1).unwrap(), Record::default());
        let record = Record { index: 77, page_size: 4096, pages: 9, checksum: u64::MAX - 5 };
        record.write(&path, 1).unwrap();
        assert_eq!(Record::read(&path, 1).unwrap(), record);
        assert_eq!(Record::read(&path, 2).unwrap_err().kind(), ErrorKind::InvalidData);
        let bytes = fs::read(&path).unwrap();
        for at in 0..CRC_AT + 4 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 4;
            assert!(Record::decode(&damaged, 1).is_err(), "byte {at}");
        }
        assert!(Record::decode(&bytes[1..], 1).is_err());
    }
}
