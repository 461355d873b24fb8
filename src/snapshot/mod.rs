//! TRANSFERS. Sends all databases of the primary to another node over a connection of their own: [`serve()`] on the
//! primary, [`fetch()`] and [`refetch()`] on the node that needs it. What arrives is verified and staged
//! ([`crate::storage::snapshot`]), and installed when the process next starts. Pages that the receiver has already are
//! not sent ([`crate::storage::snapshot::difference`]). Must never hold up a writer or the consensus loop, and never
//! have more than a few chunks in memory.

mod fetch;
mod frame;
mod offer;
mod refetch;
mod serve;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use fetch::{FetchError, Fetched, fetch};
pub use refetch::refetch;
pub use serve::serve;

pub use crate::storage::snapshot::Manifest;

/// A stream on which nothing moves for this long is closed.
const STALL: Duration = Duration::from_secs(10);
/// Chunks between the disk and the network, on each side.
const CHUNKS: usize = 2;
/// Shortest time between two reports of progress.
const REPORT: Duration = Duration::from_millis(100);
