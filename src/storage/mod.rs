//! REMEMBERS. What survives a crash on this host.
pub mod checkpoint;
pub mod checksum;
pub mod database;
pub mod gate;
pub mod replica;
pub mod vfs;
pub mod wal;

use thiserror::Error;

/// Why a captured transaction did not get a majority.
#[derive(Debug, Clone, Error)]
pub enum ReplicateError {
    /// It is certain that the transaction will never be committed: the last part was never proposed.
    #[error("not replicated: {0}")]
    Refused(String),
    /// The last part was proposed; the new primary's raft log decides. The caller must fence itself.
    #[error("outcome unknown: {0}")]
    Unknown(String),
}

/// Where captured transactions go: the consensus loop in a daemon, a test double of it in tests of the capture.
pub trait Replicator: Send + Sync {
    /// Proposes one encoded part ([`crate::cluster::command`]). For `last == false` it returns as soon as the part is accepted
    /// (it blocks only to bound the parts in flight) and the returned index is meaningless. For `last == true` it
    /// blocks until a majority has the whole transaction in its raft logs and returns the raft index of the last part.
    ///
    /// # Errors
    /// See [`ReplicateError`].
    fn replicate(&self, part: Vec<u8>, last: bool) -> Result<u64, ReplicateError>;
}

/// Where the parts of a long transaction are read again when its last part commits: the raft log, or a test's list.
pub trait EntrySource {
    /// Calls `each` with index and payload of every command entry in `first..=last`, in order, in bounded memory.
    ///
    /// # Errors
    /// Read errors and those of `each`.
    fn for_each(
        &self,
        first: u64,
        last: u64,
        each: &mut dyn FnMut(u64, &[u8]) -> std::io::Result<()>,
    ) -> std::io::Result<()>;
}
