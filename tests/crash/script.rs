//! A random life of a raft log, and every state that it may be found in afterwards.

use std::path::Path;

use raft::{
    GetEntriesContext, Storage,
    eraftpb::{ConfState, Entry, EntryType, HardState},
};
use twistlock_ha::{
    cluster::ClusterId,
    storage::raft_log::{LogError, MIN_SEGMENT, Options, Owner, Pending, RaftLog},
};

use crate::model::{Model, Random};

pub const OWNER: Owner = (ClusterId(0x1234), 2);

/// Everything that a raft log says.
#[derive(Clone, Debug, PartialEq)]
pub struct Content {
    pub compacted: (u64, u64),
    pub entries: Vec<Entry>,
    pub hard: HardState,
    pub conf: (ConfState, u64),
}

impl Content {
    pub fn fresh() -> Self {
        let hard = HardState { term: 1, commit: 1, ..HardState::default() };
        Self { compacted: (1, 1), entries: Vec::new(), hard, conf: (conf(&[1, 2, 3]), 1) }
    }

    pub fn read(log: &RaftLog) -> Self {
        let first = log.first_index();
        let entries =
            Storage::entries(log, first, log.last_index() + 1, None, GetEntriesContext::empty(false)).unwrap();
        for entry in &entries {
            assert_eq!(log.term(entry.index).unwrap(), entry.term);
        }
        let state = log.initial_state().unwrap();
        let compacted = (first - 1, log.term(first - 1).unwrap());
        let conf = log.applied_conf();
        assert_eq!(state.conf_state, conf.0);
        Self { compacted, entries, hard: state.hard_state, conf }
    }

    pub fn last(&self) -> u64 {
        self.compacted.0 + self.entries.len() as u64
    }

    fn last_term(&self) -> u64 {
        self.entries.last().map_or(self.compacted.1, |entry| entry.term)
    }

    fn append(&mut self, entries: &[Entry], hard: Option<&HardState>) {
        if let Some(first) = entries.first() {
            self.entries.truncate((first.index - self.compacted.0 - 1) as usize);
            self.entries.extend_from_slice(entries);
        }
        if let Some(hard) = hard {
            self.hard = hard.clone();
        }
    }
}

pub fn conf(voters: &[u64]) -> ConfState {
    ConfState { voters: voters.to_vec(), ..ConfState::default() }
}

pub fn open(model: &Model) -> Result<RaftLog, LogError> {
    // A cache of a few entries, so that both ways of reading are taken.
    let options = Options { segment_bytes: MIN_SEGMENT, cache_bytes: 4000, helper: false, create: true };
    RaftLog::open(Path::new("raft"), OWNER, conf(&[1, 2, 3]), options, model.clone())
}

/// The states of a log in the order of its batches, and when they came.
pub struct History {
    pub states: Vec<Content>,
    /// Number of operations when the call that wrote the state began, and when it had returned.
    began: Vec<usize>,
    returned: Vec<usize>,
    /// (operations, state): from then on the state is on disk.
    synced: Vec<(usize, usize)>,
}

impl History {
    /// A log that has just been opened, with all its content on disk.
    pub fn new(first: Content, ops: usize) -> Self {
        Self { states: vec![first], began: vec![0], returned: vec![ops], synced: vec![(ops, 0)] }
    }

    pub fn now(&self) -> &Content {
        self.states.last().unwrap()
    }

    fn begin(&mut self, state: Content, ops: usize) -> usize {
        self.states.push(state);
        self.began.push(ops);
        self.returned.push(usize::MAX);
        self.states.len() - 1
    }

    fn returned(&mut self, ops: usize) {
        *self.returned.last_mut().unwrap() = ops;
    }

    fn synced(&mut self, state: usize, ops: usize) {
        self.synced.push((ops, state));
    }

    /// Checks what is found after `ops` operations are done and the next one may be under way.
    pub fn check(&self, found: &Content, ops: usize, killed: bool) -> Result<(), String> {
        let floor = if killed {
            self.returned.iter().rposition(|returned| *returned <= ops)
        } else {
            self.synced.iter().filter(|(when, _)| *when <= ops).map(|(_, state)| *state).max()
        };
        let floor = floor.unwrap_or(0);
        let ceiling = self.began.iter().rposition(|began| *began <= ops).unwrap_or(0);
        if self.states[floor..=ceiling].contains(found) {
            return Ok(());
        }
        let known = self.states.iter().position(|state| state == found);
        Err(format!("found state {known:?}, allowed are {floor}..={ceiling}: {}", describe(found)))
    }
}

pub fn describe(content: &Content) -> String {
    let terms: Vec<_> = content.entries.iter().map(|entry| (entry.index, entry.term, entry.data.len())).collect();
    format!("compacted {:?}, {:?}, conf {:?}, entries {terms:?}", content.compacted, content.hard, content.conf.1)
}

/// Runs random steps against a log, until `steps` are done or the log fails.
pub struct Script<'a> {
    pub log: RaftLog,
    pub model: &'a Model,
    pub history: History,
    pub random: Random,
    pending: Vec<(Pending, usize)>,
}

impl<'a> Script<'a> {
    pub fn new(log: RaftLog, model: &'a Model, first: Content, random: Random) -> Self {
        let history = History::new(first, model.ops());
        Self { log, model, history, random, pending: Vec::new() }
    }

    pub fn run(&mut self, steps: usize) -> Result<(), LogError> {
        for _ in 0..steps {
            self.step()?;
        }
        Ok(())
    }

    pub fn step(&mut self) -> Result<(), LogError> {
        match self.random.below(20) {
            0..8 => self.append(false)?,
            8..11 => self.append(true)?,
            11..13 => self.vote()?,
            13..16 => self.sync()?,
            16 => self.compact()?,
            17 => self.configure()?,
            18 if self.random.one_in(4) => self.reset()?,
            _ => self.commit()?,
        }
        if self.random.one_in(6) {
            assert_eq!(&Content::read(&self.log), self.history.now());
        }
        Ok(())
    }

    fn write(&mut self, entries: &[Entry], hard: Option<&HardState>) -> Result<(), LogError> {
        let mut next = self.history.now().clone();
        next.append(entries, hard);
        let state = self.history.begin(next, self.model.ops());
        let pending = self.log.append(entries, hard)?;
        self.history.returned(self.model.ops());
        self.pending.push((pending, state));
        if self.random.one_in(2) { self.sync() } else { Ok(()) }
    }

    fn append(&mut self, replace: bool) -> Result<(), LogError> {
        let now = self.history.now().clone();
        let mut hard = now.hard.clone();
        let mut first = now.last() + 1;
        if replace {
            first -= self.random.below(now.last() - hard.commit + 1);
        }
        // An entry that replaces another one has a term of its own.
        if replace || self.random.one_in(5) {
            hard.term = hard.term.max(now.last_term()) + 1;
            hard.vote = self.random.below(4);
        }
        let count = 1 + self.random.below(4);
        let entries: Vec<_> = (first..first + count).map(|index| self.entry(index, hard.term)).collect();
        if self.random.one_in(3) {
            hard.commit += self.random.below(first + count - hard.commit);
        }
        let hard = (hard != now.hard).then_some(hard);
        self.write(&entries, hard.as_ref())
    }

    fn entry(&mut self, index: u64, term: u64) -> Entry {
        let length = match self.random.below(8) {
            0 => 0,
            1 => 5000,
            2 => 512,
            _ => self.random.below(900),
        };
        let fill = self.random.next() as u8;
        let mut entry = Entry { index, term, ..Entry::default() };
        // Often the same bytes in the same place as before: what a resent or rewritten page looks like.
        entry.data = vec![if self.random.one_in(2) { 7 } else { fill }; length as usize].into();
        if self.random.one_in(6) {
            entry.set_entry_type(EntryType::EntryConfChangeV2);
            entry.context = vec![fill; 9].into();
        }
        entry
    }

    fn vote(&mut self) -> Result<(), LogError> {
        let mut hard = self.history.now().hard.clone();
        hard.term += 1;
        hard.vote = 1 + self.random.below(3);
        self.write(&[], Some(&hard))
    }

    fn commit(&mut self) -> Result<(), LogError> {
        let now = self.history.now();
        let (mut hard, last) = (now.hard.clone(), now.last());
        hard.commit += self.random.below(last - hard.commit + 1);
        self.write(&[], Some(&hard))
    }

    /// Syncs any of the outstanding appends; those before it are then covered, and dropped or synced later.
    pub fn sync(&mut self) -> Result<(), LogError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let at = self.random.below(self.pending.len() as u64) as usize;
        let (pending, state) = self.pending.remove(at);
        pending.sync()?;
        self.history.synced(state, self.model.ops());
        Ok(())
    }

    fn whole(&mut self, next: Content, call: impl FnOnce(&RaftLog) -> Result<(), LogError>) -> Result<(), LogError> {
        let state = self.history.begin(next, self.model.ops());
        call(&self.log)?;
        self.history.returned(self.model.ops());
        self.history.synced(state, self.model.ops());
        Ok(())
    }

    fn compact(&mut self) -> Result<(), LogError> {
        let mut next = self.history.now().clone();
        let to = next.compacted.0 + self.random.below(next.hard.commit - next.compacted.0 + 1);
        if to == next.compacted.0 {
            // Nothing to do, so nothing is synced either.
            return self.log.compact(to);
        }
        let gone = (to - next.compacted.0) as usize;
        next.compacted = (to, next.entries[gone - 1].term);
        next.entries.drain(..gone);
        self.whole(next, |log| log.compact(to))
    }

    fn configure(&mut self) -> Result<(), LogError> {
        let mut next = self.history.now().clone();
        let voters = if self.random.one_in(2) { conf(&[1, 2, 3]) } else { conf(&[2, 3, 4, 5]) };
        next.conf = (voters.clone(), next.hard.commit);
        let index = next.hard.commit;
        self.whole(next, |log| log.set_applied_conf(voters, index))
    }

    fn reset(&mut self) -> Result<(), LogError> {
        let mut next = self.history.now().clone();
        let index = next.hard.commit + self.random.below(6);
        let term = next.hard.term + self.random.below(2);
        if term > next.hard.term {
            (next.hard.term, next.hard.vote) = (term, 0);
        }
        next.hard.commit = index;
        next.compacted = (index, term);
        next.entries.clear();
        next.conf = (conf(&[1, 2]), index);
        self.whole(next, |log| log.reset(index, term, conf(&[1, 2])))
    }
}
