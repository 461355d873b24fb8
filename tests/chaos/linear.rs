//! Whether a history of concurrent operations is linearizable: whether each operation may have happened at one moment between
//! its start and its end so that all answers follow. Must never accept a history for which there is no such order.
//!
//! The search is that of Wing and Gong with the memory of Lowe: walk along the starts and ends in the order of time, take any
//! operation whose answer fits the state, go back when an operation ends that was not taken, and never look twice at the same
//! set of taken operations with the same state.

use std::collections::HashMap;

/// Search steps after which a history counts as undecided.
const STEPS: u64 = 500_000;
/// An operation without an answer may happen at any later time, or never.
pub const NEVER: u64 = u64::MAX;

/// What is stored under one key; 0: nothing is there.
pub type Value = u32;
/// The values of all keys.
pub type State = Vec<Value>;

/// What a client did, and what it was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Replaced the value.
    Write { key: usize, value: Value },
    /// Replaced the value if it was `from`; `taken` says whether, none: nobody knows.
    Swap { key: usize, from: Value, to: Value, taken: Option<bool> },
    /// Read the values of all keys at once.
    Read { seen: State },
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    pub action: Action,
    /// When it was begun, in nanoseconds of one monotonic clock.
    pub begin: u64,
    /// When its answer was there, or [`NEVER`].
    pub end: u64,
}

/// What the search found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Linearizable,
    /// There is no order; these operations are the most that could be put into one.
    Violated(Vec<usize>),
    /// The search took too long.
    Undecided,
}

impl Action {
    /// Does it, if its answer fits the state.
    fn step(&self, state: &State) -> Option<State> {
        let put = |key: usize, value| {
            let mut next = state.clone();
            next[key] = value;
            next
        };
        match self {
            Self::Write { key, value } => Some(put(*key, *value)),
            Self::Swap { key, from, to, taken } => {
                let fits = state[*key] == *from;
                // Without an answer: if it changes nothing, it may as well never happen.
                (taken.unwrap_or(true) == fits).then(|| if fits { put(*key, *to) } else { state.clone() })
            }
            Self::Read { seen } => (seen == state).then(|| state.clone()),
        }
    }

    /// True if it may have given this value to this key.
    fn writes(&self, key: usize, value: Value) -> bool {
        match *self {
            Self::Write { key: own, value: written } => (own, written) == (key, value),
            Self::Swap { key: own, to, taken, .. } => (own, to) == (key, value) && taken != Some(false),
            Self::Read { .. } => false,
        }
    }

    /// True if its answer shows that this key had this value.
    fn shows(&self, key: usize, value: Value) -> bool {
        match self {
            Self::Write { .. } => false,
            Self::Swap { key: own, from, taken, .. } => *own == key && *from == value && *taken == Some(true),
            Self::Read { seen } => seen[key] == value,
        }
    }
}

/// The start of the last read that shows another value and ends before `last`, when this value was shown: it was written after
/// that read, because it cannot come back.
fn not_before(operations: &[Operation], key: usize, value: Value, last: u64) -> u64 {
    let other = |action: &Action| matches!(action, Action::Read { seen } if seen[key] != value);
    let reads = operations.iter().filter(|operation| operation.end < last && other(&operation.action));
    reads.map(|operation| operation.begin).max().unwrap_or(0)
}

/// True if the answer of this operation may be what it is because this key had this value.
fn rests_upon(action: &Action, key: usize, value: Value) -> bool {
    match *action {
        Action::Write { .. } => false,
        Action::Swap { key: own, taken: Some(false), .. } => own == key,
        Action::Swap { key: own, from, .. } => (own, from) == (key, value),
        Action::Read { ref seen } => seen[key] == value,
    }
}

/// Narrows the span of what has no answer, without changing whether there is an order. None if it may as well never have
/// happened: nothing that may come after it rests upon it.
fn narrow(operations: &[Operation], index: usize) -> Option<Operation> {
    let mut lost = operations[index].clone();
    let (key, value) = match lost.action {
        Action::Write { key, value } | Action::Swap { key, to: value, .. } => (key, value),
        Action::Read { .. } => return None,
    };
    let writers = |value| operations.iter().filter(|other| other.action.writes(key, value)).count();
    let last_shown = |value| {
        let shows = operations.iter().filter(|other| other.action.shows(key, value));
        shows.map(|other| other.begin).max().unwrap_or(0)
    };
    if let Action::Swap { from, .. } = lost.action
        && writers(from) <= usize::from(from != 0)
    {
        // What it replaced does not come back: whoever saw that came before.
        lost.begin = lost.begin.max(last_shown(from));
    }
    let others = || operations.iter().enumerate().filter(|(other, _)| *other != index).map(|(_, operation)| operation);
    let once = value != 0 && writers(value) == 1;
    let seen = others().filter(|other| other.action.shows(key, value)).map(|other| other.end).min();
    if let Some(end) = seen.filter(|_| once) {
        // Before the first answer that shows it, and after the reads before the last one that do not.
        lost.end = end.max(lost.begin);
        lost.begin = lost.begin.max(not_before(operations, key, value, last_shown(value))).min(lost.end);
        return Some(lost);
    }
    let replaced = |action: &Action| match *action {
        Action::Write { key: own, .. } => own == key,
        Action::Swap { key: own, from, taken, .. } => (own, from) == (key, value) && taken != Some(false),
        Action::Read { .. } => false,
    };
    if once && !others().any(|other| replaced(&other.action)) {
        // Nobody saw it, and nobody could undo it: it comes after all reads.
        lost.begin = lost.begin.max(not_before(operations, key, value, NEVER));
    }
    others().any(|other| other.end >= lost.begin && rests_upon(&other.action, key, value)).then_some(lost)
}

/// The operations with their numbers; those without an answer narrowed, or left out.
fn settle(operations: &[Operation]) -> Vec<(usize, Operation)> {
    let settled = operations.iter().enumerate().filter_map(|(index, operation)| {
        let narrowed = if operation.end == NEVER { narrow(operations, index) } else { Some(operation.clone()) };
        Some((index, narrowed?))
    });
    settled.collect()
}

/// A start or an end in the list of those that are not taken yet.
#[derive(Clone, Copy)]
struct Event {
    operation: usize,
    /// The position of the end that belongs to a start; none for an end.
    end: Option<usize>,
    previous: usize,
    next: usize,
}

/// Starts and ends in the order of time, linked with each other. Position 0 is before the first.
struct Events(Vec<Event>);

impl Events {
    fn new(operations: &[(usize, Operation)]) -> Self {
        // At the same time a start comes first: such operations overlap.
        let mut order: Vec<(u64, bool, usize)> = Vec::new();
        for (number, (_, operation)) in operations.iter().enumerate() {
            order.push((operation.begin, false, number));
            order.push((operation.end, true, number));
        }
        order.sort_unstable();
        let mut events = vec![Event { operation: usize::MAX, end: None, previous: 0, next: 1 }];
        let mut starts = vec![0; operations.len()];
        for (position, (_, ends, operation)) in (1..).zip(order) {
            if ends {
                events[starts[operation]].end = Some(position);
            } else {
                starts[operation] = position;
            }
            events.push(Event { operation, end: None, previous: position - 1, next: position + 1 });
        }
        Self(events)
    }

    fn unlink(&mut self, position: usize) {
        let Event { previous, next, .. } = self.0[position];
        self.0[previous].next = next;
        if let Some(event) = self.0.get_mut(next) {
            event.previous = previous;
        }
    }

    fn link(&mut self, position: usize) {
        let Event { previous, next, .. } = self.0[position];
        self.0[previous].next = position;
        if let Some(event) = self.0.get_mut(next) {
            event.previous = position;
        }
    }

    fn take(&mut self, start: usize) {
        self.unlink(start);
        self.unlink(self.0[start].end.expect("it is a start"));
    }

    fn give_back(&mut self, start: usize) {
        self.link(self.0[start].end.expect("it is a start"));
        self.link(start);
    }
}

/// Where the search is: what was taken, and what it left.
struct Search {
    operations: Vec<(usize, Operation)>,
    events: Events,
    /// The state before each operation that was taken, and where that one starts.
    stack: Vec<(usize, State)>,
    state: State,
    /// What was taken: of the operations with an answer, and of those without.
    answered: Vec<u64>,
    lost: Vec<u64>,
    /// How many with an answer are not taken yet: the others need not happen.
    left: usize,
    /// Where it was before: with what state after which operations with an answer, and each time after which without.
    seen: HashMap<(Vec<u64>, State), Vec<Vec<u64>>>,
    best: Vec<usize>,
}

impl Search {
    fn new(first: &State, operations: &[Operation]) -> Self {
        let operations = settle(operations);
        let none = vec![0; operations.len().div_ceil(64)];
        let (events, state, lost) = (Events::new(&operations), first.clone(), none.clone());
        let (stack, seen, best) = (Vec::new(), HashMap::new(), Vec::new());
        let left = operations.iter().filter(|(_, operation)| operation.end != NEVER).count();
        Self { operations, events, stack, state, answered: none, lost, left, seen, best }
    }

    fn is_lost(&self, event: usize) -> bool {
        self.operations[self.events.0[event].operation].1.end == NEVER
    }

    fn mark(&mut self, event: usize, taken: bool) {
        let number = self.events.0[event].operation;
        let set = if self.is_lost(event) { &mut self.lost } else { &mut self.answered };
        let bit = 1 << (number % 64);
        if taken { set[number / 64] |= bit } else { set[number / 64] &= !bit }
    }

    /// Takes the operation that starts here, if its answer fits and nothing is known to be in vain after it.
    fn take(&mut self, start: usize) -> bool {
        let Some(next) = self.operations[self.events.0[start].operation].1.action.step(&self.state) else {
            return false;
        };
        self.mark(start, true);
        let before = self.seen.entry((self.answered.clone(), next.clone())).or_default();
        // To have more of those left that need not happen is never worse.
        let less = |set: &Vec<u64>| set.iter().zip(&self.lost).all(|(one, now)| one & !now == 0);
        if before.iter().any(less) {
            self.mark(start, false);
            return false;
        }
        before.push(self.lost.clone());
        self.stack.push((start, std::mem::replace(&mut self.state, next)));
        self.events.take(start);
        self.left -= usize::from(!self.is_lost(start));
        true
    }

    /// Takes the last operation back: returns where it starts, none if there is none.
    fn back(&mut self) -> Option<usize> {
        if self.stack.len() >= self.best.len() {
            let number = |start: &usize| self.operations[self.events.0[*start].operation].0;
            self.best = self.stack.iter().map(|(start, _)| number(start)).collect();
        }
        let (start, before) = self.stack.pop()?;
        self.mark(start, false);
        self.state = before;
        self.events.give_back(start);
        self.left += usize::from(!self.is_lost(start));
        Some(start)
    }
}

/// Looks for an order of these operations that begins with this state.
pub fn check(first: &State, operations: &[Operation]) -> Verdict {
    let mut search = Search::new(first, operations);
    let (mut steps, mut at) = (0, search.events.0[0].next);
    // First those with an answer are tried: the others may wait.
    let mut try_lost = false;
    while search.left > 0 {
        steps += 1;
        if steps > STEPS {
            return Verdict::Undecided;
        }
        let is_start = at < search.events.0.len() && search.events.0[at].end.is_some();
        if is_start {
            let taken = search.is_lost(at) == try_lost && search.take(at);
            at = search.events.0[if taken { 0 } else { at }].next;
            try_lost &= !taken;
        } else if !try_lost {
            // One has ended here that was not taken, or all are taken.
            (try_lost, at) = (true, search.events.0[0].next);
        } else {
            // Nothing fits: some operation before was the wrong one.
            let Some(start) = search.back() else { return Verdict::Violated(search.best) };
            (try_lost, at) = (search.is_lost(start), search.events.0[start].next);
        }
    }
    Verdict::Linearizable
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(begin: u64, end: u64, action: Action) -> Operation {
        Operation { action, begin, end }
    }

    fn write(key: usize, value: Value) -> Action {
        Action::Write { key, value }
    }

    fn read(seen: &[Value]) -> Action {
        Action::Read { seen: seen.to_vec() }
    }

    fn swap(from: Value, to: Value, taken: Option<bool>) -> Action {
        Action::Swap { key: 0, from, to, taken }
    }

    fn accepted(operations: &[Operation]) -> bool {
        let keys = operations.iter().find_map(|operation| match &operation.action {
            Action::Read { seen } => Some(seen.len()),
            _ => None,
        });
        match check(&vec![0; keys.unwrap_or(1)], operations) {
            Verdict::Linearizable => true,
            Verdict::Violated(_) => false,
            Verdict::Undecided => panic!("small histories are decided"),
        }
    }

    #[test]
    fn what_cannot_have_happened_is_rejected() {
        // A read after a write does not show it.
        assert!(!accepted(&[at(0, 1, write(0, 1)), at(2, 3, read(&[0]))]));
        assert!(accepted(&[at(0, 3, write(0, 1)), at(2, 3, read(&[0]))]));
        // What was read once is gone again.
        assert!(!accepted(&[at(0, 9, write(0, 1)), at(1, 2, read(&[1])), at(3, 4, read(&[0]))]));
        // Two snapshots that each show one of two writes, and not the other's.
        let two = [at(0, 9, write(0, 1)), at(0, 9, write(1, 2)), at(1, 8, read(&[1, 0])), at(1, 8, read(&[0, 2]))];
        assert!(!accepted(&two));
        assert!(accepted(&two[..3]));
        // Two swaps from the same value both succeed; one that fails though the value was there all the time.
        assert!(!accepted(&[at(0, 9, swap(0, 1, Some(true))), at(0, 9, swap(0, 2, Some(true)))]));
        assert!(accepted(&[at(0, 9, swap(0, 1, Some(true))), at(0, 9, swap(0, 2, Some(false)))]));
        assert!(!accepted(&[at(0, 1, swap(0, 1, Some(false)))]));
        // A value that nobody wrote.
        assert!(!accepted(&[at(0, 1, read(&[7]))]));
    }

    #[test]
    fn what_has_no_answer_may_happen_later_or_never() {
        let lost = at(0, NEVER, write(0, 1));
        assert!(accepted(&[lost.clone(), at(2, 3, read(&[0])), at(4, 5, read(&[1]))]));
        assert!(accepted(&[lost.clone(), at(2, 3, read(&[0])), at(4, 5, read(&[0]))]));
        assert!(!accepted(&[lost.clone(), at(2, 3, read(&[1])), at(4, 5, read(&[0]))]));
        // Not before it was begun.
        assert!(!accepted(&[at(4, NEVER, write(0, 1)), at(2, 3, read(&[1]))]));
        // A swap that may have happened explains one that failed.
        assert!(accepted(&[at(0, NEVER, swap(0, 1, None)), at(2, 3, swap(0, 2, Some(false)))]));
        assert!(!accepted(&[
            at(0, NEVER, swap(0, 1, None)),
            at(2, 3, swap(0, 2, Some(false))),
            at(4, 5, swap(0, 3, Some(true)))
        ]));
    }

    #[test]
    fn the_report_names_what_could_be_ordered() {
        let history = [at(0, 1, write(0, 1)), at(2, 3, read(&[1])), at(4, 5, read(&[0]))];
        assert_eq!(check(&vec![0], &history), Verdict::Violated(vec![0, 1]));
    }

    /// Many operations without an answer must not make the search endless.
    #[test]
    fn unanswered_writes_do_not_make_it_slow() {
        let mut history: Vec<Operation> = (1..60).map(|value| at(0, NEVER, write(0, value))).collect();
        history.extend((0..100).map(|turn| at(100 + 2 * turn, 101 + 2 * turn, read(&[(turn / 2) as Value]))));
        assert!(accepted(&history));
        history.push(at(1000, 1001, read(&[3])));
        assert!(!accepted(&history));
    }

    /// Tries every order: what the search must agree with.
    fn by_trial(state: &State, left: &[Operation]) -> bool {
        if left.iter().all(|operation| operation.end == NEVER) {
            return true;
        }
        let limit = left.iter().map(|operation| operation.end).min().unwrap_or(NEVER);
        (0..left.len()).any(|index| {
            let next = (left[index].begin <= limit).then(|| left[index].action.step(state)).flatten();
            next.is_some_and(|next| by_trial(&next, &[&left[..index], &left[index + 1..]].concat()))
        })
    }

    const KEYS: usize = 2;

    /// Any operations at all, with values that are written once.
    fn any_history() -> impl Strategy<Value = Vec<Operation>> {
        let one = (0..5u8, 0..KEYS, 0..6 as Value, 0..6 as Value, 0..20u64, 0..12u64, 0..4u8);
        prop::collection::vec(one, 1..7).prop_map(|all| {
            let turn = |(number, (kind, key, one, other, begin, length, lost)): (usize, _)| {
                let value = number as Value + 1;
                let lost = lost == 0 && kind != 0;
                let action = match kind {
                    0 | 1 => Action::Read { seen: vec![one, other] },
                    2 | 3 => Action::Write { key, value },
                    _ => Action::Swap { key, from: one, to: value, taken: (!lost).then_some(other % 2 == 0) },
                };
                let end = if lost { NEVER } else { begin + length };
                Operation { action, begin, end }
            };
            all.into_iter().enumerate().map(turn).collect()
        })
    }

    /// A history that did happen: each operation at its middle, in this order.
    fn true_history(most: usize) -> impl Strategy<Value = Vec<Operation>> {
        let one = (0..5u8, 0..KEYS, 0..3usize, 1..40u64, 1..40u64, 0..5u8);
        prop::collection::vec(one, 1..most).prop_map(|all| {
            let (mut state, mut past) = (vec![0; KEYS], vec![0]);
            let mut history = Vec::new();
            for (number, (kind, key, back, before, after, lost)) in all.into_iter().enumerate() {
                let (moment, value) = (100 + 10 * number as u64, number as Value + 1);
                let lost = lost == 0 && kind > 1;
                let from = past[past.len().saturating_sub(back + 1)];
                let action = match kind {
                    0 | 1 => Action::Read { seen: state.clone() },
                    2 | 3 => Action::Write { key, value },
                    _ => Action::Swap { key, from, to: value, taken: (!lost).then_some(state[key] == from) },
                };
                // One without an answer may have found another value.
                state = action.step(&state).unwrap_or(state);
                past.push(value);
                history.push(Operation {
                    action,
                    begin: moment - before,
                    end: if lost { NEVER } else { moment + after },
                });
            }
            history
        })
    }

    proptest! {
        #[test]
        fn the_search_agrees_with_trying_every_order(history in any_history()) {
            prop_assert_eq!(check(&vec![0; KEYS], &history) == Verdict::Linearizable, by_trial(&vec![0; KEYS], &history));
        }

        #[test]
        fn what_did_happen_is_accepted(history in true_history(60)) {
            prop_assert_eq!(check(&vec![0; KEYS], &history), Verdict::Linearizable);
        }

        /// A read of a value that was overwritten before the read began is found in the middle of anything.
        #[test]
        fn a_stale_read_is_rejected(history in true_history(16)) {
            let end = 10_000;
            let more = [
                Operation { action: Action::Write { key: 0, value: 901 }, begin: end, end: end + 1 },
                Operation { action: Action::Write { key: 0, value: 902 }, begin: end + 2, end: end + 3 },
                Operation { action: Action::Swap { key: 0, from: 901, to: 903, taken: Some(true) }, begin: end + 4, end: end + 5 },
            ];
            let all = [&history[..], &more].concat();
            prop_assert!(matches!(check(&vec![0; KEYS], &all), Verdict::Violated(_)));
        }
    }
}
