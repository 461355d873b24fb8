//! Which databases a service has: their ids, and where they lie below its folder. Changes are entries of the raft log,
//! in order with the transactions, so that each member knows a database before its first page arrives. Owns their
//! format and `catalogue.json`. Must never give an id twice.
//!
//! Layout of an entry (`docs/formats.md`), little-endian; its beginning is that of a part of a transaction:
//! `version u8 = 1`, `kind u8 = 2 (catalogue)`, `flags u8 = 1 (commit)`, `0 u8`, `database u32`, `0 u64`, `0 u32`,
//! `change u8` (1 add, 2 rename, 3 remove), three bytes of 0, `length u32`, then the path in UTF-8, `length` bytes; none
//! for a removal. Must never panic on any input: these bytes come from other hosts and from disk.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Component, Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    cluster::level::FORMAT_VERSION,
    little_endian::find_u32,
    storage::{
        checked, durable_write,
        transaction::{self, TransactionError},
    },
};

/// Ids of a service's databases begin here: the Console's is the first.
pub const FIRST_DATABASE: u32 = 2;
/// Longest path of a database below the folder, in bytes: that of Linux.
pub const LONGEST_PATH: usize = 4096;

const KIND_CATALOGUE: u8 = 2;
const HEADER: usize = 28;
const FORMAT: u32 = 1;

/// A change of the catalogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Add(PathBuf),
    Rename(PathBuf),
    Remove,
}

/// True for an entry that changes the catalogue, by its header alone.
pub fn is_change(bytes: &[u8]) -> bool {
    bytes.first() == Some(&FORMAT_VERSION) && bytes.get(1) == Some(&KIND_CATALOGUE)
}

/// A path as an entry has it; none if a database cannot have it.
fn text_of(path: &Path) -> Option<&str> {
    let normal = path.components().all(|component| matches!(component, Component::Normal(_)));
    path.to_str().filter(|text| normal && !text.is_empty() && text.len() <= LONGEST_PATH)
}

/// True for a path that a database can have.
pub fn is_path(path: &Path) -> bool {
    text_of(path).is_some()
}

impl Change {
    /// Encodes it. None for a path that no database can have: it is not UTF-8, too long, or leads elsewhere.
    pub fn encode(&self, database: u32) -> Option<Vec<u8>> {
        let (change, path) = match self {
            Self::Add(path) => (1, text_of(path)?),
            Self::Rename(path) => (2, text_of(path)?),
            Self::Remove => (3, ""),
        };
        let mut out = vec![FORMAT_VERSION, KIND_CATALOGUE, 1, 0];
        out.extend_from_slice(&database.to_le_bytes());
        out.extend_from_slice(&[0; 12]);
        out.extend_from_slice(&[change, 0, 0, 0]);
        out.extend_from_slice(&(path.len() as u32).to_le_bytes());
        out.extend_from_slice(path.as_bytes());
        Some(out)
    }

    /// Decodes and checks one: the database, and what becomes of it.
    ///
    /// # Errors
    /// [`TransactionError::Version`] for another format version, [`TransactionError::Malformed`] for anything that no
    /// member of this version would have written.
    pub fn decode(bytes: &[u8]) -> Result<(u32, Self), TransactionError> {
        let database = transaction::database(bytes)?;
        let malformed = TransactionError::Malformed("change of the catalogue");
        if !is_change(bytes) || bytes.len() < HEADER || find_u32(bytes, 16) != Some(0) || database < FIRST_DATABASE {
            return Err(malformed);
        }
        let path = &bytes[HEADER..];
        let Ok(text) = std::str::from_utf8(path) else { return Err(malformed) };
        if find_u32(bytes, 24) != u32::try_from(path.len()).ok() {
            return Err(malformed);
        }
        let path = PathBuf::from(text);
        let change = match bytes[20] {
            1 if text_of(&path).is_some() => Self::Add(path),
            2 if text_of(&path).is_some() => Self::Rename(path),
            3 if text.is_empty() => Self::Remove,
            _ => return Err(malformed),
        };
        Ok((database, change))
    }
}

/// The databases of a service, as of a raft index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Catalogue {
    format: u32,
    /// Raft index of the last change.
    changed: u64,
    /// The id of the next database.
    next: u32,
    databases: BTreeMap<u32, PathBuf>,
}

impl Default for Catalogue {
    fn default() -> Self {
        Self { format: FORMAT, changed: 0, next: FIRST_DATABASE, databases: BTreeMap::new() }
    }
}

impl Catalogue {
    /// Reads `catalogue.json`; an empty catalogue if there is none.
    ///
    /// # Errors
    /// When it cannot be read now. `InvalidData` when it is damaged, or a newer program has written it.
    pub fn read(path: &Path) -> io::Result<Self> {
        let bytes = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            bytes => bytes?,
        };
        let damaged = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        let value = checked::decode(&bytes).map_err(damaged)?;
        match value.get("format").and_then(serde_json::Value::as_u64) {
            Some(found) if found > u64::from(FORMAT) => {
                Err(damaged(format!("it has format {found}, and this program knows up to {FORMAT}: upgrade this node")))
            }
            _ => serde_json::from_value(value).map_err(|error| damaged(error.to_string())),
        }
    }

    /// Makes it durable.
    ///
    /// # Errors
    /// When the disk fails or is full: the file has the old content or the new one.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        durable_write(path, &checked::encode(serde_json::to_value(self)?)?)
    }

    /// Checks one that another host has sent, as of a raft index.
    ///
    /// # Errors
    /// A sentence when no member of this version has such a catalogue.
    pub fn check(&self, index: u64) -> Result<(), &'static str> {
        let sound = |(id, path): (u32, &Path)| (FIRST_DATABASE..self.next).contains(&id) && text_of(path).is_some();
        let mut paths: Vec<_> = self.iter().map(|(_, path)| path).collect();
        // A path comes before those that lie below it.
        paths.sort_unstable();
        match self {
            Self { format, .. } if *format != FORMAT => Err("the catalogue has another format"),
            Self { changed, .. } if *changed > index => Err("the catalogue is newer than the databases"),
            Self { next, .. } if *next < FIRST_DATABASE || !self.iter().all(sound) => {
                Err("the catalogue names an impossible database")
            }
            _ if paths.windows(2).any(|pair| pair[1].starts_with(pair[0])) => Err("two databases are in one place"),
            _ => Ok(()),
        }
    }

    /// True if no entry has ever changed it: there is no service, or it has never had a database.
    pub fn is_untouched(&self) -> bool {
        self.changed == 0
    }

    /// Raft index of the last change.
    pub fn changed(&self) -> u64 {
        self.changed
    }

    /// The id of the next database.
    pub fn next(&self) -> u32 {
        self.next
    }

    /// The databases: id and path below the folder.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Path)> {
        self.databases.iter().map(|(id, path)| (*id, path.as_path()))
    }

    /// Where a database lies.
    pub fn path(&self, id: u32) -> Option<&Path> {
        self.databases.get(&id).map(PathBuf::as_path)
    }

    /// Makes a change that the raft log has at `index`. Does nothing if it has made it before.
    ///
    /// # Errors
    /// A sentence when the change does not fit: no primary of this version has proposed it. Nothing has changed then.
    pub fn apply(&mut self, index: u64, id: u32, change: &Change) -> Result<(), &'static str> {
        if index <= self.changed {
            return Ok(());
        }
        let taken = |path: &PathBuf| self.databases.values().any(|other| other == path);
        match change {
            Change::Add(_) if id < self.next => return Err("the id of a new database was given before"),
            Change::Add(path) | Change::Rename(path) if taken(path) => return Err("two databases with one path"),
            Change::Rename(_) | Change::Remove if !self.databases.contains_key(&id) => return Err("no such database"),
            _ => {}
        }
        match change {
            Change::Add(path) => {
                self.next = id.saturating_add(1);
                self.databases.insert(id, path.clone());
            }
            Change::Rename(path) => {
                self.databases.insert(id, path.clone());
            }
            Change::Remove => {
                self.databases.remove(&id);
            }
        }
        self.changed = index;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::storage::transaction::{continues, parts_at_end};

    #[test]
    fn a_change_is_a_whole_transaction_of_its_database() {
        for change in [Change::Add("a b/ä.db".into()), Change::Rename("x".into()), Change::Remove] {
            let bytes = change.encode(7).unwrap();
            assert_eq!(Change::decode(&bytes), Ok((7, change)));
            assert!(is_change(&bytes) && !continues(&bytes));
            assert_eq!((parts_at_end(&bytes), transaction::database(&bytes)), (Some(1), Ok(7)));
            // A program that does not know it refuses it.
            assert!(transaction::Pages::decode(&bytes).is_err());
            assert!(Change::decode(&bytes[..bytes.len() - 1]).is_err());
        }
        for path in ["", "/etc/x", "a/../x", "..", "."] {
            assert_eq!(Change::Add(path.into()).encode(7), None, "{path:?}");
        }
        assert_eq!(Change::Add("x".repeat(LONGEST_PATH + 1).into()).encode(7), None);
        assert!(Change::decode(&Change::Remove.encode(1).unwrap()).is_err(), "the Console's database stays");
    }

    #[test]
    fn a_catalogue_survives_and_takes_each_change_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalogue.json");
        let mut catalogue = Catalogue::read(&path).unwrap();
        catalogue.apply(5, 2, &Change::Add("a".into())).unwrap();
        catalogue.apply(6, 3, &Change::Add("b".into())).unwrap();
        catalogue.apply(7, 2, &Change::Remove).unwrap();
        catalogue.write(&path).unwrap();
        let mut again = Catalogue::read(&path).unwrap();
        assert_eq!(again, catalogue);
        for (index, id, change) in [(5, 2, Change::Add("a".into())), (7, 2, Change::Remove)] {
            again.apply(index, id, &change).unwrap();
        }
        assert_eq!(again, catalogue, "made before");
        for (id, change) in [
            (2, Change::Add("a".into())),
            (4, Change::Add("b".into())),
            (2, Change::Rename("c".into())),
            (9, Change::Remove),
        ] {
            assert!(again.apply(8, id, &change).is_err(), "{change:?}");
        }
        again.apply(8, 3, &Change::Rename("a".into())).unwrap();
        assert_eq!(again.iter().collect::<Vec<_>>(), [(3, Path::new("a"))]);
        let mut damaged = fs::read(&path).unwrap();
        damaged[20] ^= 1;
        fs::write(&path, damaged).unwrap();
        assert_eq!(Catalogue::read(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_catalogue_of_another_host_is_checked() {
        let with = |paths: &[&str]| {
            let mut catalogue = Catalogue::default();
            for (at, path) in (0..).zip(paths) {
                catalogue.apply(5 + u64::from(at), 2 + at, &Change::Add(path.into())).unwrap();
            }
            catalogue
        };
        let good = with(&["a/b", "a/c", "a.db", "ab"]);
        good.check(8).unwrap();
        good.check(7).unwrap_err();
        Catalogue::default().check(0).unwrap();
        for paths in [["a", "a/b"], ["a/b/c", "a"], ["../x", "y"], ["/etc/passwd", "y"], ["", "y"]] {
            assert!(with(&paths).check(9).is_err(), "{paths:?}");
        }
        for odd in [Catalogue { format: 2, ..good.clone() }, Catalogue { next: 3, ..good }] {
            odd.check(9).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..80), at in 0usize..40, value: u8) {
            let _ = Change::decode(&bytes);
            let mut mutated = Change::Add("some/path".into()).encode(5).unwrap();
            let at = at % mutated.len();
            mutated[at] = value;
            let _ = Change::decode(&mutated);
        }
    }
}
