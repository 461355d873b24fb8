//! A raft log on a fake disk: what was written can be read at once, but only what was synced survives a crash, and of
//! the rest any prefix may.

use std::{cell::RefCell, collections::VecDeque, rc::Rc};

use raft::{
    GetEntriesContext, RaftState, Storage, StorageError,
    eraftpb::{ConfState, Entry, HardState, Snapshot},
};

/// One image of the log: entries from index 2 on (index 1 is where every log begins) and the hard state.
#[derive(Clone, Default)]
pub struct Image {
    pub entries: Vec<Entry>,
    pub hard_state: HardState,
}

impl Image {
    fn append(&mut self, entries: &[Entry], hard_state: Option<&HardState>) {
        if let Some(first) = entries.first() {
            assert!(first.index >= 2 && first.index <= self.last() + 1, "a gap in the log");
            self.entries.truncate(first.index as usize - 2);
            self.entries.extend_from_slice(entries);
        }
        if let Some(hard_state) = hard_state {
            self.hard_state = hard_state.clone();
        }
    }

    pub fn last(&self) -> u64 {
        self.entries.len() as u64 + 1
    }

    pub fn entry(&self, index: u64) -> Option<&Entry> {
        self.entries.get((index as usize).checked_sub(2)?)
    }
}

struct Write {
    number: u64,
    entries: Vec<Entry>,
    hard_state: Option<HardState>,
}

struct State {
    now: Image,
    durable: Image,
    unsynced: VecDeque<Write>,
    /// The configuration in force and its index; durable as soon as it is set.
    conf: (ConfState, u64),
}

/// Shared handle, so that the node, raft and the world all see the same log.
#[derive(Clone)]
pub struct SimLog(Rc<RefCell<State>>);

impl SimLog {
    /// That of a cluster of so many founders, in which nothing was written yet.
    pub fn new(founders: u64) -> Self {
        let mut image = Image::default();
        image.hard_state.term = 1;
        image.hard_state.commit = 1;
        let conf = (ConfState { voters: (1..=founders).collect(), ..ConfState::default() }, 1);
        Self(Rc::new(RefCell::new(State { now: image.clone(), durable: image, unsynced: VecDeque::new(), conf })))
    }

    pub fn set_conf(&self, conf: ConfState, index: u64) {
        self.0.borrow_mut().conf = (conf, index);
    }

    pub fn conf(&self) -> (ConfState, u64) {
        self.0.borrow().conf.clone()
    }

    /// Another disk is in the place of this one. Nothing that runs uses it.
    pub fn replace(&self, image: Image, conf: (ConfState, u64)) {
        *self.0.borrow_mut() = State { now: image.clone(), durable: image, unsynced: VecDeque::new(), conf };
    }

    pub fn conf_index(&self) -> u64 {
        self.0.borrow().conf.1
    }

    pub fn append(&self, number: u64, entries: Vec<Entry>, hard_state: Option<HardState>) {
        let mut state = self.0.borrow_mut();
        state.now.append(&entries, hard_state.as_ref());
        state.unsynced.push_back(Write { number, entries, hard_state });
    }

    /// Everything up to this number reached the disk.
    pub fn sync(&self, number: u64) {
        let mut state = self.0.borrow_mut();
        while state.unsynced.front().is_some_and(|write| write.number <= number) {
            if let Some(write) = state.unsynced.pop_front() {
                state.durable.append(&write.entries, write.hard_state.as_ref());
            }
        }
    }

    /// Power loss: a prefix of the unsynced writes survives, the last of them perhaps in part.
    pub fn crash(&self, survive: usize, part: usize) {
        let mut state = self.0.borrow_mut();
        let unsynced: Vec<_> = state.unsynced.drain(..).collect();
        for (at, write) in unsynced.into_iter().enumerate().take(survive + 1) {
            if at < survive {
                state.durable.append(&write.entries, write.hard_state.as_ref());
            } else if !write.entries.is_empty() {
                let part = part % write.entries.len();
                state.durable.append(&write.entries[..part], None);
            }
        }
        state.now = state.durable.clone();
    }

    pub fn durable<T>(&self, read: impl FnOnce(&Image) -> T) -> T {
        read(&self.0.borrow().durable)
    }

    pub fn read<T>(&self, read: impl FnOnce(&Image) -> T) -> T {
        read(&self.0.borrow().now)
    }

    /// At a start: everything that the database has is committed, whatever the lazily written mark says.
    pub fn raise_commit(&self, index: u64) {
        let mut state = self.0.borrow_mut();
        state.now.hard_state.commit = state.now.hard_state.commit.max(index);
        state.durable = state.now.clone();
    }
}

impl Storage for SimLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let conf = self.0.borrow().conf.0.clone();
        Ok(RaftState::new(self.read(|image| image.hard_state.clone()), conf))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        let mut entries = self.read(|image| image.entries[low as usize - 2..high as usize - 2].to_vec());
        raft::util::limit_size(&mut entries, max.into());
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == 1 {
            return Ok(1);
        }
        let unavailable = raft::Error::Store(StorageError::Unavailable);
        self.read(|image| image.entry(index).map(|entry| entry.term)).ok_or(unavailable)
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(2)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.read(Image::last))
    }

    fn snapshot(&self, _: u64, _: u64) -> raft::Result<Snapshot> {
        Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable))
    }
}
