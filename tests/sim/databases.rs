//! The databases of a simulated node: the real [`Databases`] over values in memory, two of them behind one raft log. Must never
//! change what was written.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    io,
};

use rand::RngExt;
use twistlock_ha::storage::{
    EntrySource,
    database::ApplyError,
    databases::{Databases, FollowsLog},
    transaction::{CONSOLE_DATABASE, Pages, PagesBuilder},
};

use super::{node::Node, world::World};

/// The databases of the cluster.
pub const IDS: [u32; 2] = [CONSOLE_DATABASE, 7];

/// One database: its values in the order in which they were written, as of a raft index.
#[derive(Clone, Debug)]
pub struct Values {
    id: u32,
    pub values: Vec<u64>,
    pub applied: u64,
    /// Stands for the values, so that comparing them does not take longer with each.
    pub digest: u64,
}

/// That of every beginning, where the raft log begins.
pub fn empty(ids: &[u32]) -> Databases<Values> {
    Databases::new(ids.iter().map(|id| (*id, Values { id: *id, values: Vec::new(), applied: 1, digest: 0 })))
}

/// Those of `from` that are in `ids`; whatever is missing begins.
pub fn known(ids: &[u32], from: &Databases<Values>) -> Databases<Values> {
    of(empty(ids).iter().map(|database| from.get(database.id).unwrap_or(database).clone()).collect())
}

/// All of them as they are, to put them elsewhere.
pub fn copied(from: &Databases<Values>) -> Vec<Values> {
    from.iter().cloned().collect()
}

/// These databases.
pub fn of(databases: Vec<Values>) -> Databases<Values> {
    Databases::new(databases.into_iter().map(|database| (database.id, database)))
}

/// The database that a value is written to: no order in which the two take turns.
pub fn database_of(value: u64) -> u32 {
    IDS[usize::from(value % 5 % 2 == 1)]
}

/// The entry that writes a value.
pub fn encode(value: u64) -> Vec<u8> {
    PagesBuilder::new(database_of(value), value, 0, 512).finish(None)
}

/// The value that an entry writes; none for what is no command.
pub fn decode(data: &[u8]) -> Option<u64> {
    Some(Pages::decode(data).ok()?.transaction)
}

/// One part is all that there is of a transaction here.
pub struct Nothing;

impl EntrySource for Nothing {
    fn for_each(&self, _: u64, _: u64, _: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        Ok(())
    }
}

impl FollowsLog for Values {
    fn applied(&self) -> u64 {
        self.applied
    }

    fn apply(&mut self, index: u64, term: u64, payload: &[u8], _: &dyn EntrySource) -> Result<(), ApplyError> {
        let value = decode(payload).expect("an entry that somebody wrote");
        assert_eq!(database_of(value), self.id, "the value {value} is in the wrong database");
        self.values.push(value);
        let mut hasher = DefaultHasher::new();
        (self.digest, value).hash(&mut hasher);
        self.digest = hasher.finish();
        self.apply_empty(index, term)
    }

    fn apply_empty(&mut self, index: u64, _: u64) -> Result<(), ApplyError> {
        assert!(index > self.applied, "index {index} came to database {} again", self.id);
        self.applied = index;
        Ok(())
    }
}

/// All databases of a node that has just applied an entry stand there, and are what they were on whoever was there first.
pub fn compare(states: &mut BTreeMap<(u64, u32), u64>, node: &Node, index: u64) {
    for database in node.databases.iter() {
        let Values { id, applied, digest, .. } = *database;
        assert!(applied >= index, "database {id} of node {} was left behind index {index}", node.id);
        let known = *states.entry((applied, id)).or_insert(digest);
        assert_eq!(known, digest, "database {id} of node {} differs at index {applied}", node.id);
    }
}

impl World {
    /// The databases have checkpoints of their own: a crash comes between the two, too.
    pub fn checkpoint(&mut self, at: usize) {
        let Node { knows, databases, checkpoint, .. } = &mut self.nodes[at];
        let skipped = self.checkpoint_rng.random_range(0..4);
        for (_, id) in knows.iter().enumerate().filter(|(place, _)| *place != skipped) {
            if let (Some(saved), Some(state)) = (checkpoint.get_mut(*id), databases.get(*id)) {
                *saved = state.clone();
            }
        }
    }
}
