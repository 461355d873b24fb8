//! Looks into the database files of nodes that have been stopped. Must never compare them while one of them runs.

use std::{fs, path::Path};

use sqlx::{ConnectOptions, Connection, sqlite::SqliteConnectOptions};
use twistlock_ha::dev::NodeFile;

/// Where the record of a checkpoint has its raft index (src/storage/checkpoint.rs).
const RECORD_INDEX: std::ops::Range<usize> = 24..32;

/// Fails the test unless all nodes stopped at the same raft index with the same database, byte for byte, and SQLite finds
/// nothing wrong with it. Returns a line for the report.
pub fn compare(nodes: &[NodeFile]) -> String {
    let mut all = Vec::new();
    for node in nodes {
        let folder = node.data.join("database");
        for cache in ["console.db-wal", "console.db-shm", "console.db-journal"] {
            assert!(!folder.join(cache).exists(), "{}: {cache} is there after an orderly stop", node.name);
        }
        all.push((&node.name, checkpointed(node), folder.join("console.db")));
    }
    let indexes: Vec<_> = all.iter().map(|(name, index, _)| (name, index)).collect();
    assert!(indexes.iter().all(|(_, index)| *index == indexes[0].1), "stopped at different indexes: {indexes:?}");
    let (first, images) = (&all[0].0, all.iter().map(|(.., path)| fs::read(path).unwrap()).collect::<Vec<_>>());
    let mut tags = Vec::new();
    for ((name, _, path), image) in all.iter().zip(&images) {
        assert_eq!(image.len(), images[0].len(), "{name} and {first}: different sizes");
        let odd = image.iter().zip(&images[0]).position(|(one, other)| one != other);
        assert!(odd.is_none(), "{name} and {first} differ at byte {odd:?} at index {}", indexes[0].1);
        tags.push(check(path));
    }
    let (size, index) = (images[0].len(), indexes[0].1);
    let count = nodes.len();
    format!(
        "{count} databases at index {index} equal byte for byte: {size} bytes, {} tags, integrity_check ok",
        tags[0]
    )
}

/// The raft index up to which the database file has everything; the node may run.
pub fn checkpointed(node: &NodeFile) -> u64 {
    let record = fs::read(node.data.join("database/console.checkpoint")).unwrap();
    assert_eq!(&record[..8], b"TLCKPT01", "another format of the record: this test must learn it");
    u64::from_le_bytes(record[RECORD_INDEX].try_into().expect("8 bytes"))
}

/// Has an ordinary SQLite check the file, and returns the number of tags in it.
fn check(path: &Path) -> i64 {
    // Immutable: not even a lock or a WAL beside it.
    let options = SqliteConnectOptions::new().filename(path).read_only(true).immutable(true);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut connection = options.connect().await.unwrap();
        let found: Vec<String> = sqlx::query_scalar("PRAGMA integrity_check").fetch_all(&mut connection).await.unwrap();
        assert_eq!(found, ["ok"], "{}", path.display());
        let tags = sqlx::query_scalar("SELECT count(*) FROM tags").fetch_one(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        tags
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The comparison must be known to object.
    #[test]
    fn a_changed_byte_another_index_and_a_cache_are_seen() {
        let folder = tempfile::tempdir().unwrap();
        let nodes = ["one", "two", "three"].map(|name| make_node(folder.path(), name));
        let objects = || {
            let nodes = nodes.clone();
            std::thread::spawn(move || compare(&nodes)).join().is_err()
        };
        assert!(compare(&nodes).starts_with("3 databases at index 7 equal"));
        let database = nodes[2].data.join("database");
        for (name, at) in [("console.db", 4096 + 9), ("console.checkpoint", RECORD_INDEX.start)] {
            let good = fs::read(database.join(name)).unwrap();
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(database.join(name), bad).unwrap();
            assert!(objects(), "{name}");
            fs::write(database.join(name), good).unwrap();
        }
        fs::write(database.join("console.db-wal"), "").unwrap();
        assert!(objects());
    }

    /// A stopped node with an empty table of tags at index 7.
    fn make_node(folder: &Path, name: &str) -> NodeFile {
        let data = folder.join(name);
        let database = data.join("database");
        fs::create_dir_all(&database).unwrap();
        let mut record = b"TLCKPT01".to_vec();
        record.resize(48, 0);
        record[RECORD_INDEX].copy_from_slice(&7u64.to_le_bytes());
        fs::write(database.join("console.checkpoint"), record).unwrap();
        let options = SqliteConnectOptions::new().filename(database.join("console.db")).create_if_missing(true);
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let mut connection = options.connect().await.unwrap();
            sqlx::query("CREATE TABLE tags (name TEXT)").execute(&mut connection).await.unwrap();
            connection.close().await.unwrap();
        });
        let (address, console_url) = (String::new(), String::new());
        NodeFile { name: name.to_owned(), address, pid: None, console_url, control: data.join("control"), data }
    }
}
