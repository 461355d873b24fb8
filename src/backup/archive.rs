//! The file of a backup: a gzipped tar of `manifest.json`, `console.db` and the databases of a service, so that any
//! host can look into it with its own tools; encrypted as a whole if there is a key. Reads and writes it as a stream
//! in bounded memory. Must never take anything in an archive for a path, and never call a database good that is not
//! what its manifest says.

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
    folder::{
        catalogue::{FIRST_DATABASE, LONGEST_PATH, is_path},
        places::MOST_DATABASES,
    },
    pacer::{PacedFile, Pacer},
    snapshot::{CHUNK, chunk_checksum},
    transaction::{CONSOLE_DATABASE, valid_page_size},
};

/// Version of the manifest of a backup without a service.
const FORMAT: u64 = 1;
/// Version of the manifest of one with a service.
const WITH_SERVICE: u64 = 2;
/// Largest manifest that is read, in bytes.
const MAX_MANIFEST: u64 = (64 << 10) + (MOST_DATABASES * (2 * LONGEST_PATH + 512)) as u64;
/// Names in the archive.
const MANIFEST: &str = "manifest.json";
const DATABASE: &str = "console.db";
const SERVICE: &str = "service";
/// Longest name that a header of tar has room for, in bytes.
const LONGEST_NAME: usize = 100;
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
    /// The databases of a service at the same raft index; none if the cluster has never had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Service>,
}

/// What a backup says of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Service {
    /// Raft index of the last change of the catalogue.
    pub changed: u64,
    /// The id of the next database.
    pub next: u32,
    /// By their ids, ascending.
    pub databases: Vec<Described>,
}

/// A database of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Described {
    pub id: u32,
    /// Below the folder of the service.
    pub path: String,
    pub page_size: u32,
    pub pages: u32,
    pub checksum: String,
    pub sha256: String,
}

/// A database as an archive has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub id: u32,
    /// Its name in the archive.
    pub name: String,
    /// Its path as an ordinary file.
    pub path: String,
    pub record: Record,
    pub sha256: String,
}

impl Content {
    /// Bytes of the database.
    pub fn bytes(&self) -> u64 {
        u64::from(self.record.pages) * u64::from(self.record.page_size)
    }
}

impl Manifest {
    /// The version of the manifest of a backup with or without a service.
    pub fn format(with_service: bool) -> u64 {
        if with_service { WITH_SERVICE } else { FORMAT }
    }

    /// Bytes of all databases.
    pub fn bytes(&self) -> u64 {
        self.listed().iter().map(Content::bytes).sum()
    }

    /// Bytes of the Console's database.
    pub fn console_bytes(&self) -> u64 {
        u64::from(self.pages) * u64::from(self.page_size)
    }

    /// What it has besides the Console's database, for people; empty if nothing.
    pub fn besides(&self) -> String {
        let Some(service) = &self.service else { return String::new() };
        let paths: Vec<_> = service.databases.iter().map(|database| database.path.as_str()).collect();
        match paths.len() {
            0 => ", and no database of the service".to_owned(),
            count => format!(", and {count} of the service: {}", paths.join(", ")),
        }
    }

    /// The databases in the order of the archive: the Console's, then those of the service.
    ///
    /// # Errors
    /// [`BackupError::Damaged`] for an impossible database.
    pub fn contents(&self) -> Result<Vec<Content>, BackupError> {
        let service = self.service.iter().flat_map(|service| &service.databases);
        let mut checksums = std::iter::once(&self.checksum).chain(service.map(|found| &found.checksum));
        if checksums.any(|checksum| u64::from_str_radix(checksum, 16).is_err()) {
            return Err(damaged("its checksum is not a number"));
        }
        let possible = |Record { page_size, pages, checksum, .. }: &Record| {
            if *pages == 0 { *checksum == 0 } else { valid_page_size(*page_size) }
        };
        let contents = self.listed();
        match contents.iter().all(|content| possible(&content.record)) {
            true => Ok(contents),
            false => Err(damaged("it describes an impossible database")),
        }
    }

    /// As [`Self::contents`], of a manifest that may be wrong.
    fn listed(&self) -> Vec<Content> {
        let record = |page_size, pages, checksum: &str| {
            let checksum = u64::from_str_radix(checksum, 16).unwrap_or(0);
            Record { index: self.index, page_size, pages, checksum }
        };
        let console = Content {
            id: CONSOLE_DATABASE,
            name: DATABASE.to_owned(),
            path: DATABASE.to_owned(),
            record: record(self.page_size, self.pages, &self.checksum),
            sha256: self.sha256.clone(),
        };
        let of_service = self.service.iter().flat_map(|service| &service.databases).map(|found| Content {
            id: found.id,
            name: name_of(found),
            path: format!("{SERVICE}/{}", found.path),
            record: record(found.page_size, found.pages, &found.checksum),
            sha256: found.sha256.clone(),
        });
        std::iter::once(console).chain(of_service).collect()
    }

    fn decode(bytes: &[u8]) -> Result<Self, BackupError> {
        let value: serde_json::Value =
            serde_json::from_slice(bytes).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        // The format comes first: a newer one may differ in everything else.
        let Some(format @ (FORMAT | WITH_SERVICE)) = value["format"].as_u64() else {
            return Err(BackupError::Refused(format!(
                "the backup has format {}, which this program does not know",
                value["format"]
            )));
        };
        let found: Self = serde_json::from_value(value).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        let service = found.service.as_ref();
        let possible = |service: &Service| {
            let ids = service.databases.iter().map(|database| database.id);
            let ordered = ids.clone().zip(ids.skip(1)).all(|(id, next)| id < next);
            let known = |found: &Described| {
                (FIRST_DATABASE..service.next).contains(&found.id) && is_path(Path::new(&found.path))
            };
            ordered && service.databases.iter().all(known)
        };
        if found.pages == 0 || service.is_some() != (format == WITH_SERVICE) || !service.is_none_or(possible) {
            return Err(damaged("it describes an impossible database"));
        }
        found.contents()?;
        Ok(found)
    }
}

/// Where the archive has a database of a service: by its path, unless no header has room for that.
fn name_of(found: &Described) -> String {
    let name = format!("{SERVICE}/{}", found.path);
    if name.len() <= LONGEST_NAME { name } else { format!("{SERVICE}.by-id/{}", found.id) }
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

/// Writes an archive and makes its content durable, not its name. `open` opens the databases, in the order of
/// [`Manifest::contents`].
///
/// # Errors
/// When a database cannot be read, or the archive cannot be written.
pub(super) fn write<R: Read>(
    file: File,
    manifest: &Manifest,
    mut open: impl FnMut(&Content) -> io::Result<R>,
    secret: Option<&Secret>,
) -> io::Result<()> {
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
    for content in manifest.listed() {
        tar.append_data(&mut header(content.bytes()), &content.name, open(&content)?)?;
    }
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
/// before the databases are read and may refuse it; `each` gets them piece by piece, in order.
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
    mut each: impl FnMut(&Content, &[u8]) -> Result<(), BackupError>,
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
        for content in manifest.contents()? {
            let entry = next(&content.name)?;
            let (found, expected) = (entry.size(), content.bytes());
            if found != expected {
                return Err(damaged(format!("{} has {found} bytes instead of {expected}", content.name)));
            }
            read_database(entry, &content, &mut each)?;
        }
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
    content: &Content,
    each: &mut impl FnMut(&Content, &[u8]) -> Result<(), BackupError>,
) -> Result<(), BackupError> {
    let record = content.record;
    // Also of one without content: it has to be begun.
    each(content, &[])?;
    let (mut done, mut checksum, mut digest, mut bytes) = (0, 0, Digest::new(), Vec::new());
    while done < record.pages {
        let count = (record.pages - done).min(CHUNK as u32 / record.page_size);
        bytes.resize(count as usize * record.page_size as usize, 0);
        entry.read_exact(&mut bytes).map_err(|error| damaged(format!("it cannot be read: {error}")))?;
        checksum ^= chunk_checksum(done, record.page_size, &bytes);
        digest.add(&bytes);
        each(content, &bytes)?;
        done += count;
    }
    if checksum != record.checksum || digest.finish() != content.sha256 {
        return Err(damaged(format!("{} does not have the checksum of its manifest", content.name)));
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
            service: None,
        };
        (manifest, image)
    }

    /// A sample with databases of a service, at these paths and of so many pages; all images, one after the other.
    pub fn with_service(pages: u32, service: &[(&str, u32)]) -> (Manifest, Vec<u8>) {
        let (mut manifest, mut images) = sample(pages);
        let mut databases = Vec::new();
        for (id, (path, pages)) in (2..).zip(service) {
            let (one, image) = sample(*pages);
            let (path, checksum, sha256) = ((*path).to_owned(), one.checksum, one.sha256);
            databases.push(Described { id, path, page_size: 512, pages: *pages, checksum, sha256 });
            images.extend(image);
        }
        let next = 2 + databases.len() as u32;
        manifest.service = Some(Service { changed: 33, next, databases });
        manifest.format = WITH_SERVICE;
        (manifest, images)
    }

    pub fn made(folder: &Path, manifest: &Manifest, images: &[u8], secret: Option<&Secret>) -> std::path::PathBuf {
        let path = folder.join("archive");
        let mut rest = images;
        let open = |content: &Content| {
            let (one, later) = rest.split_at((content.bytes() as usize).min(rest.len()));
            rest = later;
            Ok(one)
        };
        write(File::create(&path).unwrap(), manifest, open, secret).unwrap();
        path
    }

    fn load(path: &Path, secret: Option<&Secret>) -> Result<(Manifest, Vec<u8>), BackupError> {
        let mut image = Vec::new();
        let keep = |_: &Content, bytes: &[u8]| {
            image.extend_from_slice(bytes);
            Ok(())
        };
        let manifest = read(path, secret.is_some(), secret, |_| Ok(()), keep)?;
        Ok((manifest, image))
    }

    fn names(path: &Path) -> Vec<String> {
        let mut tar = tar::Archive::new(GzDecoder::new(File::open(path).unwrap()));
        let name = |entry: io::Result<tar::Entry<'_, _>>| entry.unwrap().path().unwrap().display().to_string();
        tar.entries().unwrap().map(name).collect()
    }

    #[test]
    fn a_backup_without_a_service_is_what_it_was_before_there_were_any() {
        let folder = tempfile::tempdir().unwrap();
        let (manifest, image) = sample(9);
        let path = made(folder.path(), &manifest, &image, None);
        assert_eq!(names(&path), ["manifest.json", "console.db"]);
        let text = String::from_utf8(serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
        assert!(text.starts_with("{\n  \"format\": 1,") && !text.contains("service"), "{text}");
        let names: Vec<_> = text.lines().filter_map(|line| line.split('"').nth(1)).collect();
        let known = [
            "format",
            "version",
            "name",
            "cluster",
            "node",
            "index",
            "epoch",
            "created",
            "page_size",
            "pages",
            "checksum",
            "sha256",
        ];
        assert_eq!(names, known);
    }

    #[test]
    fn the_databases_of_a_service_have_their_paths_and_all_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let long = "long/".repeat(40) + "x.db";
        let (manifest, images) = with_service(20, &[("a b/ä.db", 3000), ("empty", 0), (&long, 7)]);
        let path = made(folder.path(), &manifest, &images, None);
        let expected = ["manifest.json", "console.db", "service/a b/ä.db", "service/empty", "service.by-id/4"];
        assert_eq!(names(&path), expected);
        let (found, read_again) = load(&path, None).unwrap();
        assert!(found == manifest && read_again == images && found.bytes() == images.len() as u64);
        let mut begun = Vec::new();
        read(
            &path,
            false,
            None,
            |_| Ok(()),
            |content, bytes| {
                if bytes.is_empty() {
                    begun.push(content.id);
                }
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(begun, [1, 2, 3, 4]);
        // Whichever of them is not what the manifest says.
        for at in [0, 20 * 512, images.len() - 1] {
            let mut odd = images.clone();
            odd[at] ^= 1;
            let error = load(&made(folder.path(), &manifest, &odd, None), None).unwrap_err();
            assert!(error.to_string().contains("does not have the checksum"), "{error}");
        }
        let service = |change: fn(&mut Service)| {
            let mut odd = manifest.clone();
            if let Some(service) = &mut odd.service {
                change(service);
            }
            load(&made(folder.path(), &odd, &images, None), None).map(|_| ())
        };
        service(|_| {}).unwrap();
        let changes: [fn(&mut Service); 5] = [
            |service| service.databases[0].path = "/etc/passwd".into(),
            |service| service.databases.swap(0, 1),
            |service| service.next = 4,
            |service| service.databases[1].id = 2,
            |service| service.databases[2].sha256 = "0".into(),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            assert!(service(change).is_err(), "{number}");
        }
        let above = Described { path: "../x".into(), ..manifest.service.clone().unwrap().databases.remove(0) };
        let service = Some(Service { databases: vec![above], ..manifest.service.clone().unwrap() });
        let odd = serde_json::to_vec(&Manifest { service, ..manifest }).unwrap();
        assert!(Manifest::decode(&odd).is_err());
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
        let error = read(&sealed, true, None, |_| Ok(()), |_, _| Ok(())).unwrap_err();
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
            let image = [&image[..], &vec![0; 20_000]].concat();
            let path = made(folder.path(), &odd, &image, None);
            assert!(load(&path, None).is_err(), "{odd:?}");
        }
        let path = made(folder.path(), &manifest, &image, None);
        let refuse = |_: &Manifest| Err(BackupError::Refused("no".into()));
        let error = read(&path, false, None, refuse, |_, _| panic!("nothing may be read")).unwrap_err();
        assert_eq!(error.to_string(), "no");
    }
}
