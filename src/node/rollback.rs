//! Entries of this node's raft log that another primary replaces: keeps them in a file for the administrator, and shows
//! ROLLBACK until the database has caught up. Must never make the consensus loop wait for the disk.

use std::{
    fs::File,
    io,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use raft::{Storage, eraftpb::Entry};
use tracing::{info, warn};

use crate::{
    cluster::{ClusterId, NodeId},
    scheduling,
    storage::{
        raft_log::{RaftLog, RetainedTail},
        tail::{self, Draft},
    },
    telemetry,
};

use super::{
    NodeConfig,
    inbox::{Input, Sender},
    warning::Warning,
};

/// How long the status shows the warning with the name of the file.
const NOTE: Duration = Duration::from_secs(3600);

/// Keeps dropped tails, and knows whether a rollback is under way.
pub(super) struct Rollback {
    data: PathBuf,
    owner: (ClusterId, NodeId),
    sender: Sender,
    /// The database file. It must not be opened again here: closing it would drop SQLite's locks.
    database: Arc<File>,
    /// The rollback is over once the database has applied everything up to here.
    until: Option<u64>,
    /// When the warning in the status ends.
    noted: Option<Instant>,
}

impl Rollback {
    pub fn new(config: &NodeConfig, database: Arc<File>, sender: Sender) -> Self {
        let owner = (config.stored.membership.cluster, config.node);
        Self { data: config.data.clone(), owner, sender, database, until: None, noted: None }
    }

    /// True if `entries` replace others. Call it before they are appended.
    pub fn watch(&mut self, log: &RaftLog, entries: &[Entry]) -> bool {
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return false };
        if first.index > log.last_index() {
            return false;
        }
        let differs = |entry: &&Entry| log.term(entry.index).is_ok_and(|term| term != entry.term);
        let Some(conflict) = entries.iter().find(differs) else { return false };
        self.until = Some(last.index);
        match log.hold(conflict.index) {
            Some(held) if held.has_content() => self.save_tail(held, conflict.term),
            // Only the empty entry with which a primary begins its epoch: there is nothing to keep.
            _ => {
                info!(index = conflict.index, epoch = conflict.term, "ROLLBACK: entries without content were replaced")
            }
        }
        true
    }

    /// The tail was never acknowledged, so safety does not depend on this file. The administrator may still want it: it
    /// stays readable in the raft log until a thread has copied it, so only a crash in the next moments can lose it.
    fn save_tail(&mut self, held: RetainedTail, epoch: u64) {
        let dropped = held.last() - held.first() + 1;
        metrics::counter!(telemetry::ROLLBACK_ENTRIES).increment(dropped);
        self.noted = Some(Instant::now() + NOTE);
        let (folder, (cluster, node), sender) = (self.data.join(tail::FOLDER), self.owner, self.sender.clone());
        let database = Arc::clone(&self.database);
        let save = move || {
            scheduling::leisurely();
            finish(tail::write(&folder, cluster, node, &held), &database, epoch, &sender);
        };
        if let Err(error) = thread::Builder::new().name("rollback".to_owned()).spawn(save) {
            warn!(%error, entries = dropped, "the dropped tail of the raft log cannot be kept: no thread for it");
        }
    }

    /// Once per turn, with the index that the database has applied: true when a rollback is over.
    pub fn is_over(&mut self, applied: u64) -> bool {
        self.until.take_if(|until| *until <= applied).is_some()
    }

    /// Once per tick: true when the warning in the status should end.
    pub fn note_ends(&mut self) -> bool {
        self.noted.take_if(|until| *until <= Instant::now()).is_some()
    }
}

fn finish(draft: io::Result<Draft>, database: &File, epoch: u64, sender: &Sender) {
    let kept = match draft.and_then(|draft| draft.finish(Some(database))) {
        Ok((kept, removed)) => {
            for path in removed {
                info!(file = %path.display(), "the oldest dropped tail was removed: {} are kept", tail::MAX_FILES);
            }
            kept
        }
        Err(error) => return warn!(%error, "the dropped tail of the raft log cannot be kept"),
    };
    metrics::counter!(telemetry::ROLLBACK_TRANSACTIONS).increment(kept.transactions);
    let path = kept.path.with_extension("txt");
    warn!(
        entries = kept.dropped,
        kept = kept.kept,
        transactions = kept.transactions,
        epoch,
        file = %path.display(),
        "ROLLBACK: the tail of the raft log that no majority had was dropped and is kept in a file"
    );
    let text = format!(
        "{} transactions that only this node had, and that were never acknowledged, were dropped: see {}; there is nothing \
         else to do, and this warning ends by itself within {} minutes",
        kept.transactions,
        path.display(),
        NOTE.as_secs() / 60
    );
    sender.send(Input::Warning { about: Warning::Rollback, text: Some(text) });
}
