//! The file of a backup: a gzipped tar of `manifest.json` and `console.db`, so that any host can look into it with its
//! own tools; encrypted as a whole if there is a key. Reads and writes it as a stream in bounded memory. Must never
//! take anything in an archive for a path, and never call a database good that is not what its manifest says.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read, Write},
    path::Path,
    time::Duration,
};

use data_encoding::HEXLOWER;
use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use super::{
    BackupError,
    cipher::{MAGIC, Opener, Sealer, Secret},
};
use crate::storage::{
    checkpoint::Record,
    pacer::{PacedFile, Pacer},
    snapshot::{CHUNK, chunk_checksum},
    transaction::valid_page_size,
};

/// Version of the manifest that this program writes.
const FORMAT: u64 = 1;
/// Largest manifest that is read, in bytes.
const MAX_MANIFEST: u64 = 64 << 10;
/// Names in the archive.
const MANIFEST: &str = "manifest.json";
const DATABASE: &str = "console.db";
/// What each gzip file begins with.
const GZIP: &[u8] = &[0x1f, 0x8b];
/// Padding at the end of a tar file that is skipped, in bytes.
const MAX_PADDING: u64 = 1 << 20;

/// What a backup is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub format: u64,
    /// Version of the program that made it.
    pub version: String,
    /// Its name when it was made.
    pub name: String,
    pub cluster: String,
    /// The member whose copy of the database it is.
    pub node: String,
    /// Raft index of the database.
    pub index: u64,
    pub epoch: u64,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    pub page_size: u32,
    pub pages: u32,
    /// Checksum of all pages, as the members compare it, in hexadecimal.
    pub checksum: String,
    /// SHA-256 of the database file, in hexadecimal.
    pub sha256: String,
}

impl Manifest {
    pub const FORMAT: u64 = FORMAT;

    /// Bytes of the database.
    pub fn bytes(&self) -> u64 {
        u64::from(self.pages) * u64::from(self.page_size)
    }

    /// The part that describes the database.
    pub fn record(&self) -> Result<Record, BackupError> {
        let checksum = u64::from_str_radix(&self.checksum, 16).map_err(|_| damaged("its checksum is not a number"))?;
        Ok(Record { index: self.index, page_size: self.page_size, pages: self.pages, checksum })
    }

    fn decode(bytes: &[u8]) -> Result<Self, BackupError> {
        let value: serde_json::Value =
            serde_json::from_slice(bytes).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        // The format comes first: a newer one may differ in everything else.
        if value["format"].as_u64() != Some(FORMAT) {
            return Err(BackupError::Refused(format!(
                "the backup has format {}, which this program does not know",
                value["format"]
            )));
        }
        let found: Self = serde_json::from_value(value).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        if found.pages == 0 || !valid_page_size(found.page_size) {
            return Err(damaged("it describes an impossible database"));
        }
        Ok(found)
    }
}

fn damaged(why: impl Into<String>) -> BackupError {
    BackupError::Damaged(why.into())
}

/// A SHA-256 that is being computed.
pub(super) struct Digest(Context);

impl Digest {
    pub fn new() -> Self {
        Self(Context::new(&SHA256))
    }

    pub fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Hexadecimal.
    pub fn finish(self) -> String {
        HEXLOWER.encode(self.0.finish().as_ref())
    }
}

/// Where the compressed archive goes.
enum Sink {
    Plain(BufWriter<PacedFile>),
    Sealed(Box<Sealer<BufWriter<PacedFile>>>),
}

impl Sink {
    fn new(file: File, secret: Option<&Secret>) -> io::Result<Self> {
        // Without rests: whoever reads what is packed takes them.
        let file = BufWriter::new(PacedFile::new(file, Pacer::new(Duration::ZERO)));
        Ok(match secret {
            None => Self::Plain(file),
            Some(secret) => Self::Sealed(Box::new(Sealer::new(file, secret)?)),
        })
    }

    fn finish(self) -> io::Result<PacedFile> {
        let file = match self {
            Self::Plain(file) => file,
            Self::Sealed(sealer) => sealer.finish()?,
        };
        file.into_inner().map_err(io::IntoInnerError::into_error)
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(file) => file.write(bytes),
            Self::Sealed(sealer) => sealer.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(file) => file.flush(),
            Self::Sealed(sealer) => sealer.flush(),
        }
    }
}

/// Writes an archive and makes its content durable, not its name.
///
/// # Errors
/// When the database cannot be read, or the archive cannot be written.
pub(super) fn write(file: File, manifest: &Manifest, database: impl Read, secret: Option<&Secret>) -> io::Result<()> {
    // The fast level: what the others save is not worth the processor time of a host that serves.
    let mut tar = tar::Builder::new(GzEncoder::new(Sink::new(file, secret)?, Compression::fast()));
    let header = |bytes: u64| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes);
        header.set_mode(0o600);
        header.set_mtime(manifest.created);
        header
    };
    let text = serde_json::to_vec_pretty(manifest)?;
    tar.append_data(&mut header(text.len() as u64), MANIFEST, text.as_slice())?;
    tar.append_data(&mut header(manifest.bytes()), DATABASE, database)?;
    tar.into_inner()?.finish()?.finish()?.sync_all()
}

/// Where the compressed archive comes from.
enum Source {
    Plain(BufReader<File>),
    Sealed(Box<Opener<BufReader<File>>>),
}

impl Read for Source {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(file) => file.read(bytes),
            Self::Sealed(opener) => opener.read(bytes),
        }
    }
}

/// Tells by its first bytes whether a file is an encrypted archive; none if it is no archive at all.
///
/// # Errors
/// [`BackupError::Io`] when the file cannot be opened or read.
pub(super) fn is_sealed(path: &Path) -> Result<Option<bool>, BackupError> {
    let mut head = Vec::new();
    let file = File::open(path).map_err(BackupError::io("open", path))?;
    file.take(MAGIC.len() as u64).read_to_end(&mut head).map_err(BackupError::io("read", path))?;
    Ok(if head == MAGIC { Some(true) } else { head.starts_with(GZIP).then_some(false) })
}

/// Reads an archive to its end and checks everything that can be checked without SQLite. `accept` sees the manifest
/// before the database is read and may refuse it; `each` gets the database in order.
///
/// # Errors
/// [`BackupError::Damaged`] for anything but a whole, sound backup. [`BackupError::Refused`] without the key of an
/// encrypted one, and for a newer format; [`BackupError::Io`] when the file cannot be opened. An error of `accept` or
/// `each` ends the reading.
pub(super) fn read(
    path: &Path,
    sealed: bool,
    secret: Option<&Secret>,
    accept: impl FnOnce(&Manifest) -> Result<(), BackupError>,
    mut each: impl FnMut(&[u8]) -> Result<(), BackupError>,
) -> Result<Manifest, BackupError> {
    let file = File::open(path).map_err(BackupError::io("open", path))?;
    let unreadable = |error: io::Error| damaged(format!("it cannot be read: {error}"));
    let source = match (sealed, secret) {
        (false, _) => Source::Plain(BufReader::new(file)),
        (true, Some(secret)) => {
            Source::Sealed(Box::new(Opener::new(BufReader::new(file), secret).map_err(unreadable)?))
        }
        (true, None) => {
            return Err(BackupError::Refused(
                "the backup is encrypted: set BACKUP_KEY_FILE to the file of its key".into(),
            ));
        }
    };
    let mut tar = tar::Archive::new(GzDecoder::new(source));
    let manifest = {
        // Raw: otherwise long names and other headers of any size would be read into memory before an entry is seen.
        let mut entries = tar.entries().map_err(unreadable)?.raw(true);
        let mut next = |name: &str| {
            let entry = entries.next().ok_or_else(|| damaged(format!("{name} is missing")))?.map_err(unreadable)?;
            let plain = entry.header().entry_type().is_file() && &*entry.path_bytes() == name.as_bytes();
            if plain { Ok(entry) } else { Err(damaged(format!("{name} is not where it should be"))) }
        };
        let manifest = read_manifest(next(MANIFEST)?)?;
        accept(&manifest)?;
        let entry = next(DATABASE)?;
        if entry.size() != manifest.bytes() {
            return Err(damaged(format!("its database has {} bytes instead of {}", entry.size(), manifest.bytes())));
        }
        read_database(entry, &manifest, &mut each)?;
        if entries.next().is_some() {
            return Err(damaged("there is more in it than there should be"));
        }
        manifest
    };
    // gzip's own checksum, and the end of the encryption, come last.
    let rest = io::copy(&mut tar.into_inner().take(MAX_PADDING), &mut io::sink()).map_err(unreadable)?;
    if rest == MAX_PADDING { Err(damaged("there is more in it than there should be")) } else { Ok(manifest) }
}

fn read_manifest(entry: impl Read) -> Result<Manifest, BackupError> {
    let mut text = Vec::new();
    let length = entry.take(MAX_MANIFEST + 1).read_to_end(&mut text);
    match length.map_err(|error| damaged(format!("{MANIFEST}: {error}")))? as u64 {
        0..=MAX_MANIFEST => Manifest::decode(&text),
        _ => Err(damaged(format!("{MANIFEST} is too long"))),
    }
}

fn read_database(
    mut entry: impl Read,
    manifest: &Manifest,
    each: &mut impl FnMut(&[u8]) -> Result<(), BackupError>,
) -> Result<(), BackupError> {
    let record = manifest.record()?;
    let (mut done, mut checksum, mut digest, mut bytes) = (0, 0, Digest::new(), Vec::new());
    while done < record.pages {
        let count = (record.pages - done).min(CHUNK as u32 / record.page_size);
        bytes.resize(count as usize * record.page_size as usize, 0);
        entry.read_exact(&mut bytes).map_err(|error| damaged(format!("it cannot be read: {error}")))?;
        checksum ^= chunk_checksum(done, record.page_size, &bytes);
        digest.add(&bytes);
        each(&bytes)?;
        done += count;
    }
    if checksum != record.checksum || digest.finish() != manifest.sha256 {
        return Err(damaged("its database does not have the checksum of its manifest"));
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A manifest of so many pages of 512 bytes, and these pages.
    pub fn sample(pages: u32) -> (Manifest, Vec<u8>) {
        let image: Vec<u8> = (0..pages as usize * 512).map(|at| (at / 16 * (at / 512 + 1)) as u8).collect();
        let mut digest = Digest::new();
        digest.add(&image);
        let manifest = Manifest {
            format: FORMAT,
            version: "0.1.0".into(),
            name: "sample".into(),
            cluster: "7".into(),
            node: "node1".into(),
            index: 40,
            epoch: 3,
            created: 1_790_000_000,
            page_size: 512,
            pages,
            checksum: format!("{:016x}", chunk_checksum(0, 512, &image)),
            sha256: digest.finish(),
        };
        (manifest, image)
    }

    fn made(folder: &Path, manifest: &Manifest, image: &[u8], secret: Option<&Secret>) -> std::path::PathBuf {
        let path = folder.join("archive");
        write(File::create(&path).unwrap(), manifest, image, secret).unwrap();
        path
    }

    fn load(path: &Path, secret: Option<&Secret>) -> Result<(Manifest, Vec<u8>), BackupError> {
        let mut image = Vec::new();
        let keep = |bytes: &[u8]| {
            image.extend_from_slice(bytes);
            Ok(())
        };
        let manifest = read(path, secret.is_some(), secret, |_| Ok(()), keep)?;
        Ok((manifest, image))
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("key");
        std::fs::write(&key, "a pass phrase of mine").unwrap();
        let secret = Secret::read(&key).unwrap();
        let (manifest, image) = sample(5000);
        for secret in [None, Some(&secret)] {
            let path = made(folder.path(), &manifest, &image, secret);
            let (found, read) = load(&path, secret).unwrap();
            assert!(found == manifest && read == image);
            assert!(std::fs::metadata(&path).unwrap().len() < image.len() as u64 / 2, "it is compressed");
        }
        let sealed = folder.path().join("archive");
        assert_eq!((is_sealed(&sealed).unwrap(), is_sealed(&key).unwrap()), (Some(true), None));
        let error = read(&sealed, true, None, |_| Ok(()), |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("BACKUP_KEY_FILE"), "{error}");
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let (manifest, image) = sample(200);
        let path = made(folder.path(), &manifest, &image, None);
        let good = std::fs::read(&path).unwrap();
        let step = (good.len() / 300).max(1);
        for at in (0..good.len()).step_by(step) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            std::fs::write(&path, &bad).unwrap();
            // Not every bit of a gzip file means something: bytes 3 to 9 tell time and system, and of a periodic text
            // one distance is as good as another. What is read is right, or nothing is.
            let right = |(found, read): (Manifest, Vec<u8>)| found == manifest && read == image;
            assert!(load(&path, None).map_or(true, right), "byte {at}");
            std::fs::write(&path, &good[..at]).unwrap();
            assert!(load(&path, None).is_err(), "{at} bytes");
        }
    }

    /// A few kilobytes of gzip could ask for any amount of memory.
    #[test]
    fn a_long_name_is_no_manifest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("archive");
        let mut tar = tar::Builder::new(GzEncoder::new(File::create(&path).unwrap(), Compression::fast()));
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(8 << 20);
        tar.append_data(&mut header, "././@LongLink", io::repeat(b'x').take(8 << 20)).unwrap();
        tar.into_inner().unwrap().finish().unwrap();
        let error = load(&path, None).unwrap_err();
        assert!(error.to_string().contains("manifest.json is not where it should be"), "{error}");
    }

    #[test]
    fn a_database_that_is_not_its_manifests_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (manifest, image) = sample(20);
        for change in [
            |m: &mut Manifest| m.sha256 = m.sha256.replace('a', "b"),
            |m: &mut Manifest| m.checksum = "0".into(),
            |m: &mut Manifest| m.checksum = "x".into(),
            |m: &mut Manifest| m.format = 2,
            |m: &mut Manifest| m.page_size = 1000,
        ] {
            let mut odd = manifest.clone();
            change(&mut odd);
            let length = odd.bytes() as usize;
            let image = [&image[..], &vec![0; 20_000]].concat();
            let path = made(folder.path(), &odd, &image[..length], None);
            assert!(load(&path, None).is_err(), "{odd:?}");
        }
        let path = made(folder.path(), &manifest, &image, None);
        let refuse = |_: &Manifest| Err(BackupError::Refused("no".into()));
        let error = read(&path, false, None, refuse, |_| panic!("nothing may be read")).unwrap_err();
        assert_eq!(error.to_string(), "no");
    }
}
