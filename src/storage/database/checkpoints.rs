//! Checkpoints of one database, and the readers of its file: snapshots while it rests, copies while it follows. Must
//! never write a record of what was not synced.

use std::sync::Arc;

use super::{Database, DatabaseError, State, WAL_LIMIT, io_error};
use crate::storage::{
    checkpoint::{Record, Saved, Saving},
    gate::{Gate, Mark},
    online_copy::{CopyError, CopyId, FinishedCopy, OnlineCopy},
    replica::Replica,
    snapshot::Resting,
    transaction::CONSOLE_DATABASE,
    vfs::Checkpointer,
};

/// A checkpoint is repeated while the WAL is longer than this many bytes.
const REPEAT_ABOVE: u64 = WAL_LIMIT / 4;
/// How many passes of a checkpoint copy while others write.
const PASSES: u32 = 5;
/// How often a checkpoint is repeated so that the file rests.
const REST_TRIES: u32 = 5;

/// What [`Database::checkpoint`] has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The raft index of the durable checkpoint, C: the database does not need the raft log up to here.
    pub index: u64,
    /// False if readers or writers got in the way of the last pass: the file holds more than the database at C.
    pub complete: bool,
    /// Frames in the WAL; 0 on a secondary.
    pub frames: u32,
}

impl Database {
    /// Lets a checkpoint count only if `may_save` returns true for its raft index: what the raft log has up to there
    /// must be kept elsewhere first. It is called on the thread that makes the checkpoint.
    pub fn save_if(&mut self, may_save: impl Fn(u64) -> bool + Send + 'static) {
        self.may_save = Box::new(may_save);
    }

    /// Moves the durable checkpoint as far as possible. Writers have to wait for a moment only if the WAL has become
    /// very long. If the checkpoint is complete, the file is the database at C until the next call; on a primary the
    /// file can be longer than that. Breaks the hold of whoever reads the [resting](Database::rest) file.
    ///
    /// # Errors
    /// [`DatabaseError::Io`] or [`DatabaseError::Sqlite`] when the disk fails or is full. After a failed sync, and
    /// after any earlier failure, the database cannot be used any more: [`DatabaseError::Failed`].
    pub fn checkpoint(&mut self) -> Result<Checkpoint, DatabaseError> {
        let (reached, saving) = self.begin_checkpoint()?;
        saving.map_or(Ok(()), |saving| self.saved(saving.save()))?;
        Ok(Checkpoint { index: self.record.index, ..reached })
    }

    /// Begins a checkpoint without waiting for the disk. If there is something to save, the waiting is done by the
    /// [`Saving`] that is returned. Until its outcome comes back by [`Database::saved`], the old checkpoint counts, and
    /// no other one can begin.
    ///
    /// # Errors
    /// [`DatabaseError::Refused`] while the last one is being saved, or the database is being closed.
    /// [`DatabaseError::Io`] or [`DatabaseError::Sqlite`] when the disk fails or is full. [`DatabaseError::Failed`]
    /// after an earlier failure.
    pub fn begin_checkpoint(&mut self) -> Result<(Checkpoint, Option<Saving>), DatabaseError> {
        if self.saving {
            return Err(DatabaseError::Refused("the last checkpoint is still being saved"));
        }
        self.break_hold();
        if let Some(failed) = &self.failed {
            return Err(DatabaseError::Failed(failed.clone()));
        }
        let (record, complete, frames) = match &self.state {
            State::Following(replica) => (Some(replica.record()), true, 0),
            State::Serving(serving) => {
                let checkpointer = serving.checkpointer.as_ref();
                let checkpointer = checkpointer.ok_or(DatabaseError::Refused("the database is being closed"))?;
                let gate = &serving.primary.gate;
                let (record, complete, frames) = checkpoint_wal(gate, checkpointer)?;
                // A database that nobody writes to must not keep the raft log from being shortened.
                let index = serving.applied;
                let may_raise =
                    |record: &Record| record.index < index && gate.rests_at(record.index) && (self.may_save)(index);
                let raised = |record| if may_raise(&record) { Record { index, ..record } } else { record };
                (record.map(raised), complete, frames)
            }
            State::Closed { .. } => (None, false, 0),
        };
        let newer = record.filter(|record| record.index > self.record.index);
        let allowed = newer.filter(|record| (self.may_save)(record.index));
        let complete = complete && newer == allowed;
        let saving = allowed.map(|record| Saving {
            file: Arc::clone(&self.file),
            path: self.record_path.clone(),
            database: self.id,
            record,
        });
        self.saving = saving.is_some();
        Ok((Checkpoint { index: self.record.index, complete, frames }, saving))
    }

    /// Takes the outcome of what [`Database::begin_checkpoint`] returned.
    ///
    /// # Errors
    /// [`DatabaseError::Io`] when it could not be saved: the old checkpoint counts. After a failed sync the database
    /// cannot be used any more.
    pub fn saved(&mut self, saved: Saved) -> Result<(), DatabaseError> {
        self.saving = false;
        if let Err(source) = saved.synced {
            self.failed = Some(format!("a sync of {} failed: {source}", self.path.display()));
            self.sync_failed = true;
            return Err(io_error("sync", &self.path, source));
        }
        saved.written.map_err(|source| io_error("write", &self.record_path, source))?;
        // If the database has gone back to the checkpoint before this one meanwhile, it needs the raft log from there
        // on.
        let went_back = matches!(&self.state, State::Following(replica) if replica.applied < saved.record.index);
        if !went_back {
            self.record = saved.record;
        }
        Ok(())
    }

    /// Lets somebody read the database as of a checkpoint while others go on writing. The file rests until everybody
    /// who got it has dropped it, or until the next [`Database::checkpoint`] or [`Database::demote`]. Only on a
    /// primary.
    ///
    /// # Errors
    /// [`DatabaseError::Refused`] on a secondary, and while readers keep the checkpoint from being complete: try again.
    /// Otherwise the error of that checkpoint.
    pub fn rest(&mut self) -> Result<Resting, DatabaseError> {
        if !matches!(self.state, State::Serving(_)) {
            return Err(DatabaseError::Refused("only the primary's database file rests between checkpoints"));
        }
        if !self.is_held() {
            let mut tries = 0..REST_TRIES;
            while !self.checkpoint()?.complete {
                tries.next().ok_or(DatabaseError::Refused("readers keep the database file from resting: try again"))?;
            }
        }
        // A second reader gets the checkpoint of the first one: another checkpoint would end that.
        let hold = self.hold.get_or_insert_default().clone();
        Ok(Resting::new(Arc::clone(&self.file), self.record, hold))
    }

    /// True on a primary while no transaction has been committed since its last checkpoint, and none is under way: what
    /// it has is what it had there, as of anything that is committed by now.
    pub(in crate::storage) fn is_unchanged_since_checkpoint(&self) -> bool {
        let State::Serving(serving) = &self.state else { return false };
        let last = serving.primary.gate.last_index();
        last <= self.record.index && serving.primary.gate.rests_at(last)
    }

    /// Begins a copy of a database that goes on following meanwhile. An earlier copy ends. Only the Console's has
    /// content from the beginning.
    ///
    /// # Errors
    /// [`CopyError::Ended`] on a primary, and while the file is ahead of what has been applied.
    pub fn begin_copy(&mut self) -> Result<OnlineCopy, CopyError> {
        let replica = self.whole()?;
        let table = &replica.table;
        let (copy, tracking) = OnlineCopy::begin(Arc::clone(&replica.file), table.page_size(), table.pages());
        replica.copy = Some(tracking);
        Ok(copy)
    }

    /// How many pages a copy lacks, and their size.
    ///
    /// # Errors
    /// [`CopyError::Ended`] as [`Self::finish_copy`].
    pub fn copy_lacks(&mut self, copy: &CopyId) -> Result<(usize, u32), CopyError> {
        let replica = self.whole()?;
        let record = replica.record();
        let tracking = replica.copy.as_ref().ok_or_else(ended_since)?;
        Ok((tracking.pending(copy, &record)?, record.page_size))
    }

    /// Completes a copy: it is the database at what is applied now.
    ///
    /// # Errors
    /// [`CopyError::Changed`] when too many pages were written meanwhile: read them, and try again.
    /// [`CopyError::Ended`] when the database does not follow, or has gone back to a checkpoint: begin another copy.
    pub fn finish_copy(&mut self, copy: &CopyId) -> Result<FinishedCopy, CopyError> {
        let replica = self.whole()?;
        let tracking = replica.copy.as_ref().ok_or_else(ended_since)?;
        let finished = tracking.finish(copy, &replica.file, replica.record())?;
        replica.copy = None;
        Ok(finished)
    }

    /// The following database, if its file is what its last transaction stated.
    fn whole(&mut self) -> Result<&mut Replica, CopyError> {
        let ended = |why: &str| Err(CopyError::Ended(why.to_owned()));
        if self.failed.is_some() {
            return ended("this node's database is not used any more: see its status");
        }
        let State::Following(replica) = &mut self.state else {
            return ended("the role of this node is changing");
        };
        if replica.table.pages() == 0 && self.id == CONSOLE_DATABASE {
            return ended("this node has no database yet");
        }
        if replica.half_applied {
            return ended("this node's disk is full: it waits for space to apply the next transaction");
        }
        match replica.claim == replica.table.checksum() {
            true => Ok(replica),
            false if replica.applied < replica.touched => {
                ended("this node still replays its raft log: try again in a moment")
            }
            false => ended("this node's database is damaged: it must be restored from the primary first"),
        }
    }

    /// True while somebody reads the resting file.
    pub fn is_held(&self) -> bool {
        self.hold.as_ref().is_some_and(|hold| hold.is_wanted())
    }

    pub(super) fn break_hold(&mut self) {
        if let Some(hold) = self.hold.take() {
            hold.break_off();
        }
    }
}

fn ended_since() -> CopyError {
    CopyError::Ended("the database has gone back to a checkpoint since the copy began".to_owned())
}

/// Copies the WAL into the database file. Returns what it has reached, whether the last pass got to the end of the WAL,
/// and the number of frames in the WAL.
///
/// SQLite restarts the WAL only when a writer begins while nothing is left to copy. Under load there is always
/// something: what was written during the pass. The next pass has less to do. If that is not enough, one pass keeps the
/// writers out.
fn checkpoint_wal(gate: &Gate, checkpointer: &Checkpointer) -> Result<(Option<Record>, bool, u32), DatabaseError> {
    let (mut last, mut frames) = checkpoint_pass(gate, checkpointer, false)?;
    let mut reached = last;
    for pass in 1..=PASSES {
        let restart = pass == PASSES;
        let limit = if restart { WAL_LIMIT } else { REPEAT_ABOVE };
        if last.is_none() || gate.wal_bytes() <= limit {
            break;
        }
        (last, frames) = checkpoint_pass(gate, checkpointer, restart)?;
        reached = [reached, last].into_iter().flatten().max_by_key(|mark| mark.index);
    }
    let page_size = gate.page_size();
    let record = |mark: Mark| Record { index: mark.index, page_size, pages: mark.pages, checksum: mark.checksum };
    Ok((reached.map(record), last.is_some(), frames))
}

/// One pass. Returns what it has reached, if that was the end of the WAL, and the number of frames in the WAL.
fn checkpoint_pass(
    gate: &Gate,
    checkpointer: &Checkpointer,
    restart: bool,
) -> Result<(Option<Mark>, u32), DatabaseError> {
    gate.begin_checkpoint(restart);
    let result = checkpointer.run(restart);
    // SQLite counts the frames that the WAL had when the checkpoint began.
    let reached = result.as_ref().ok().copied().flatten().filter(|(frames, done)| frames == done);
    let mark = gate.end_checkpoint(reached.map(|(frames, _)| frames));
    Ok((mark, result?.map_or(0, |(frames, _)| frames)))
}
