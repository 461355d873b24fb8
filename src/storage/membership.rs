//! The membership in force on this node, in `<data>/membership.json`: what the node has to know before it can talk to
//! the others. It is written before the raft log notes the configuration of the same entry. After a crash in between,
//! the entry is applied again and changes nothing here. Must never decide who votes: the raft log does.

use std::{
    fs::File,
    io::{self, ErrorKind, Read},
    path::Path,
};

use serde_json::Value;

use super::{checked, durable_write, replace_file, watch::Place};
use crate::cluster::{Membership, limits::MAX_ENCODED};

/// Name of the file in the data folder.
pub const FILE: &str = "membership.json";
/// Name of its copy. A member that no longer knew the others could ask nobody for the membership.
pub const COPY: &str = "membership.json.copy";
/// Version of the file that this program writes.
const FORMAT: u64 = 1;

/// A membership and the raft index of the entry that made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredMembership {
    pub index: u64,
    pub membership: Membership,
}

impl StoredMembership {
    /// Reads the file. `None` if there is no such file, as before the first start of a node.
    ///
    /// # Errors
    /// When the file cannot be read now. With a reason: `InvalidData` when it is damaged, `Unsupported` when a newer
    /// program wrote it.
    pub fn read(data: &Path) -> io::Result<Option<Self>> {
        Self::read_from(&data.join(FILE))
    }

    /// Reads the copy, which may be one change older.
    ///
    /// # Errors
    /// When the copy cannot be read now. With a reason: `InvalidData` when it is damaged, `Unsupported` when a newer
    /// program wrote it.
    pub fn read_copy(data: &Path) -> io::Result<Option<Self>> {
        Self::read_from(&data.join(COPY))
    }

    fn read_from(path: &Path) -> io::Result<Option<Self>> {
        let mut bytes = Vec::new();
        match File::open(path).and_then(|file| file.take(4 * MAX_ENCODED as u64).read_to_end(&mut bytes)) {
            Ok(_) => decode(&bytes).map(Some),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes this the membership in force, durably, and then writes the copy.
    ///
    /// # Errors
    /// When the disk fails or is full. Either the old membership or the new one is in force then.
    pub fn write(&self, data: &Path) -> io::Result<()> {
        let membership: Value = serde_json::from_slice(&self.membership.encode())?;
        let file = serde_json::json!({ "format": FORMAT, "index": self.index, "membership": membership });
        let bytes = checked::encode(file)?;
        replace_file(Place::Membership, &data.join(FILE), &bytes)?;
        durable_write(&data.join(COPY), &bytes)
    }
}

fn decode(bytes: &[u8]) -> io::Result<StoredMembership> {
    let damaged = |why: String| io::Error::new(ErrorKind::InvalidData, why);
    let file = checked::decode(bytes).map_err(damaged)?;
    for (format, known) in [(&file["format"], FORMAT), (&file["membership"]["format"], Membership::FORMAT.into())] {
        match format.as_u64() {
            Some(format) if format > known => {
                let why = format!("format {format} is not known to this program (it knows {known}): upgrade it");
                return Err(io::Error::new(ErrorKind::Unsupported, why));
            }
            Some(_) => {}
            None => return Err(damaged("it has no format".to_owned())),
        }
    }
    let index = file["index"].as_u64().ok_or_else(|| damaged("it has no index".to_owned()))?;
    let membership = Membership::decode(file["membership"].to_string().as_bytes()).map_err(damaged)?;
    Ok(StoredMembership { index, membership })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{ClusterId, Member};

    #[test]
    fn it_survives_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(StoredMembership::read(folder.path()).unwrap(), None);
        let members = vec![Member::founder(1, "a", "127.0.0.1", 8086)];
        let configuration = StoredMembership { index: 9, membership: Membership::founded(ClusterId(7), members) };
        configuration.write(folder.path()).unwrap();
        assert_eq!(StoredMembership::read(folder.path()).unwrap(), Some(configuration.clone()));
        assert_eq!(StoredMembership::read_copy(folder.path()).unwrap(), Some(configuration));
        let path = folder.path().join(FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        for damaged in [&text[1..], &text.replace("\"index\"", "\"other\""), &text.replace("127", "128"), ""] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(StoredMembership::read(folder.path()).unwrap_err().kind(), ErrorKind::InvalidData);
        }
        let bare: Vec<&str> = text.lines().filter(|line| !line.contains("crc32c")).collect();
        for (place, _) in bare.concat().match_indices("\"format\": 1") {
            let mut newer = bare.concat();
            newer.replace_range(place..place + 11, "\"format\": 2");
            std::fs::write(&path, newer).unwrap();
            assert_eq!(StoredMembership::read(folder.path()).unwrap_err().kind(), ErrorKind::Unsupported);
        }
    }
}
