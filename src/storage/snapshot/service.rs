//! What a snapshot says of the databases of a service: the catalogue, and of each its size and checksum, all as of the
//! snapshot's raft index. Owns that part of the manifest, and the order in which the databases of a snapshot come.
//! Must never describe a database that the catalogue does not have, or leave one out.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{DATABASE, Manifest, SnapshotError};
use crate::storage::{
    checkpoint::Record,
    folder::{catalogue::Catalogue, places::Places},
    is_rot,
    transaction::{CONSOLE_DATABASE, valid_page_size},
};

/// The folder of a service's databases, in that of a snapshot; each is called by its id.
pub(super) const DATABASES: &str = "databases";

/// The databases of a service at the index of a snapshot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServicePart {
    /// Which there are; untouched if the cluster has never had one.
    pub catalogue: Catalogue,
    /// The record of each, by its id. One without content has 0 pages.
    pub records: BTreeMap<u32, Record>,
}

/// A [`ServicePart`] as it is sent.
#[derive(Serialize, Deserialize)]
pub(super) struct Encoded {
    catalogue: Catalogue,
    databases: Vec<EncodedDatabase>,
}

#[derive(Serialize, Deserialize)]
struct EncodedDatabase {
    id: u32,
    page_size: u32,
    pages: u32,
    checksum: u64,
}

impl ServicePart {
    /// None for a cluster that has never had a service: its snapshots are as they were before there were any.
    pub(super) fn encode(&self) -> Option<Encoded> {
        let databases = self.records.iter().map(|(id, record)| EncodedDatabase {
            id: *id,
            page_size: record.page_size,
            pages: record.pages,
            checksum: record.checksum,
        });
        let encoded = || Encoded { catalogue: self.catalogue.clone(), databases: databases.collect() };
        (!self.catalogue.is_untouched()).then(encoded)
    }

    /// Checks what another program has written, as of a raft index.
    pub(super) fn decode(encoded: Encoded, index: u64) -> Result<Self, String> {
        let Encoded { catalogue, databases } = encoded;
        catalogue.check(index)?;
        let mut records = BTreeMap::new();
        for EncodedDatabase { id, page_size, pages, checksum } in databases {
            let possible = if pages == 0 { checksum == 0 } else { valid_page_size(page_size) };
            if !possible || records.insert(id, Record { index, page_size, pages, checksum }).is_some() {
                return Err(format!("it describes database {id} impossibly"));
            }
        }
        match catalogue.is_untouched() || !catalogue.iter().map(|(id, _)| id).eq(records.keys().copied()) {
            true => Err("its databases are not those of its catalogue".to_owned()),
            false => Ok(Self { catalogue, records }),
        }
    }
}

impl Manifest {
    /// The databases of the snapshot in the order in which they are sent: the Console's, then those of the service by
    /// their ids.
    pub fn contents(&self) -> impl Iterator<Item = (u32, Record)> {
        let service = self.service.records.iter().map(|(id, record)| (*id, *record));
        std::iter::once((CONSOLE_DATABASE, self.record)).chain(service)
    }

    /// Bytes of one of the databases.
    pub(super) fn bytes_of(&self, id: u32) -> u64 {
        self.contents().find(|(other, _)| *other == id).map_or(0, |(_, record)| bytes(&record))
    }

    /// Why a node with this catalogue must not install the snapshot: it would lose a database without a trace. None if
    /// it may.
    pub fn lacks(&self, known: &Catalogue) -> Option<String> {
        let theirs = self.service.catalogue.changed();
        if known.changed() <= theirs || known.changed() > self.record.index {
            // One that is older than what this node knows is followed by the entries in between.
            return None;
        }
        let known_at = known.changed();
        let names: Vec<_> = known.iter().filter(|(id, _)| !self.service.records.contains_key(id)).collect();
        let names: Vec<_> = names.into_iter().map(|(id, path)| format!("{id} ({})", path.display())).collect();
        let which = if names.is_empty() { "changes".to_owned() } else { names.join(", ") };
        Some(format!(
            "it lacks databases of the service that this node has ({which}): its catalogue is of raft index {theirs}, and \
             the one here of {known_at}, although the snapshot is of {}; it is not installed. Upgrade the primary if it is \
             older than this node, or take the service's files from here before this member is removed and joined anew",
            self.record.index
        ))
    }
}

/// The catalogue of a data folder; an untouched one if it has none, or one that is damaged: that is replaced.
///
/// # Errors
/// [`SnapshotError::Io`] when it cannot be read now.
pub fn known(data: &Path) -> Result<Catalogue, SnapshotError> {
    let path = Places::of(data).catalogue();
    match Catalogue::read(&path) {
        Err(error) if !is_rot(&error) => Err(SnapshotError::io("read", &path)(error)),
        known => Ok(known.unwrap_or_default()),
    }
}

/// The file of a database in the folder of a snapshot.
pub(super) fn staged(folder: &Path, id: u32) -> PathBuf {
    match id {
        CONSOLE_DATABASE => folder.join(DATABASE),
        id => folder.join(DATABASES).join(id.to_string()),
    }
}

/// Bytes of a database.
pub(super) fn bytes(record: &Record) -> u64 {
    u64::from(record.pages) * u64::from(record.page_size)
}

/// How far a snapshot is on its way: database by database, page by page.
#[derive(Debug)]
pub struct Course {
    contents: Vec<(u32, Record)>,
    at: usize,
    done: u32,
}

impl Course {
    /// Before the first page.
    pub fn new(manifest: &Manifest) -> Self {
        Self { contents: manifest.contents().collect(), at: 0, done: 0 }
    }

    /// The database of the next page, and how many of its pages came before; none at the end.
    pub fn current(&mut self) -> Option<(u32, Record, u32)> {
        loop {
            let (id, record) = *self.contents.get(self.at)?;
            if self.done < record.pages {
                return Some((id, record, self.done));
            }
            self.skip();
        }
    }

    /// So many pages of the database are done.
    pub fn advance(&mut self, pages: u32) {
        self.done += pages;
    }

    /// The rest of the database is done.
    pub fn skip(&mut self) {
        (self.at, self.done) = (self.at + 1, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{
        folder::catalogue::Change,
        snapshot::tests::{manifest, resting, with_service},
    };

    #[test]
    fn a_service_survives_and_odd_ones_are_refused() {
        let (console, ..) = resting(1, 9, 40);
        let plain = manifest(console.record(), 3);
        assert!(String::from_utf8(plain.encode()).unwrap().starts_with("{\"format\":1,"));
        let (with, _) = with_service(plain, &[5, 0, 2]);
        let text = String::from_utf8(with.encode()).unwrap();
        assert_eq!(Manifest::decode(text.as_bytes()).unwrap(), with);
        for (from, to) in [
            ("\"format\":2", "\"format\":1"),
            ("\"format\":2", "\"format\":3"),
            ("\"service\":", "\"other\":"),
            ("\"id\":4", "\"id\":5"),
            ("\"id\":4", "\"id\":3"),
            ("\"pages\":5", "\"pages\":0"),
            ("\"changed\":32", "\"changed\":41"),
            ("\"changed\":32", "\"changed\":0"),
            ("\"4\":\"", "\"5\":\""),
            ("\"4\":\"", "\"4\":\"/"),
            ("\"4\":\"", "\"4\":\"../"),
        ] {
            let odd = text.replacen(from, to, 1);
            assert!(odd != text && Manifest::decode(odd.as_bytes()).is_err(), "{to}");
        }
        let mut course = Course::new(&with);
        let mut seen = Vec::new();
        while let Some((id, record, done)) = course.current() {
            assert_eq!((record.index, done), (40, 0));
            seen.push(id);
            course.advance(record.pages);
        }
        assert_eq!(seen, [1, 2, 4], "one without content has nothing to send");
    }

    #[test]
    fn whoever_knows_a_later_catalogue_sees_what_is_missing() {
        let (console, ..) = resting(1, 9, 40);
        let plain = manifest(console.record(), 3);
        let (with, _) = with_service(plain.clone(), &[5, 0, 2]);
        let known = with.service.catalogue.clone();
        assert_eq!(with.lacks(&known), None);
        assert_eq!(with.lacks(&Catalogue::default()), None);
        assert_eq!(plain.lacks(&Catalogue::default()), None);
        let why = plain.lacks(&known).unwrap();
        assert!(why.contains("2 (files/2.db), 3 (files/3.db), 4 (files/4.db)"), "{why}");
        let mut later = known.clone();
        later.apply(39, 2, &Change::Remove).unwrap();
        assert!(with.lacks(&later).unwrap().contains("changes"));
        let mut newer = known;
        newer.apply(41, 5, &Change::Add("files/5.db".into())).unwrap();
        assert_eq!(with.lacks(&newer), None, "entry 41 comes again");
    }
}
