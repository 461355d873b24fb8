//! The keys that clients change and read together, and the history of what they were told. A new set of keys takes the place
//! of the last one every few seconds, so that each history is short enough to be searched. Must never take an operation whose
//! outcome is unknown for one that failed.
//!
//! All keys of a board are tags whose names begin alike, so that one request reads them all at one moment:
//! a register has its value in the description and is replaced without a condition; a swap has it in its name, which
//! `PUT tags/OLD` changes only if it is still the old one; an element is there or not.

use std::sync::Mutex;

use serde_json::{Value as Json, json};

use crate::linear::{self, Action, NEVER, Operation, State, Value, Verdict};

pub const REGISTERS: usize = 3;
pub const SWAPS: usize = 2;
/// Elements that may be made on one board.
pub const ELEMENTS: usize = 48;
/// The kind of a request that reads.
pub const READ: u32 = 99;
/// Operations after which a board is full.
const FULL: usize = 300;

/// One set of keys.
pub struct Board {
    /// What all its tags begin with. Later boards come first in the list of tags.
    prefix: String,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    history: Vec<Operation>,
    elements: usize,
    next: Value,
    /// The newest values of the swaps that anybody was told.
    known: [Value; SWAPS],
}

/// A request that changes or reads a board, and what it means.
pub struct Request {
    pub method: &'static str,
    pub path: String,
    pub body: Option<Json>,
    meaning: Meaning,
}

#[derive(Clone, Copy)]
enum Meaning {
    Read,
    Write { key: usize, value: Value },
    Swap { key: usize, from: Value, to: Value },
}

/// What came back.
pub enum Answer {
    /// 2xx, with this content.
    Done(String),
    /// 404 or 409: the condition did not hold.
    Not,
    /// Nothing is known.
    Unknown,
}

impl Board {
    pub fn new(number: usize) -> Self {
        Self { prefix: format!("!{:05}-", 99_999 - number), inner: Mutex::default() }
    }

    /// The requests that make it: registers and swaps with the value 0. Each may be sent again until it answers 2xx or 409.
    pub fn foundation(&self) -> Vec<Json> {
        let registers = (0..REGISTERS).map(|key| self.tag(key, 0));
        registers.chain((0..SWAPS).map(|swap| self.tag(REGISTERS + swap, 0))).collect()
    }

    pub fn first_state() -> State {
        vec![0; REGISTERS + SWAPS + ELEMENTS]
    }

    pub fn full(&self) -> bool {
        self.inner().history.len() >= FULL
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().expect("no client panics with a board")
    }

    fn name(&self, key: usize, value: Value) -> String {
        let prefix = &self.prefix;
        match key {
            _ if key < REGISTERS => format!("{prefix}r{key}"),
            _ if key < REGISTERS + SWAPS => format!("{prefix}s{key}:{value}"),
            _ => format!("{prefix}t{key}"),
        }
    }

    fn tag(&self, key: usize, value: Value) -> Json {
        json!({"name": self.name(key, value), "color": "#123456", "description": value.to_string()})
    }

    /// A request by a number from 0 to 99 that says what kind it is, and one that chooses among the keys.
    pub fn request(&self, kind: u32, choice: usize) -> Request {
        let mut inner = self.inner();
        inner.next += 1;
        let value = inner.next;
        let put = |key: usize, old: Value, meaning| Request {
            method: "PUT",
            path: format!("/tags/{}", self.name(key, old)),
            body: Some(self.tag(key, value)),
            meaning,
        };
        match kind {
            0..20 => {
                let key = choice % REGISTERS;
                put(key, 0, Meaning::Write { key, value })
            }
            20..45 => {
                let swap = choice % SWAPS;
                // One time in eight with a value that may be an old one.
                let from = if choice % 8 == 7 { inner.known[swap] / 2 } else { inner.known[swap] };
                let key = REGISTERS + swap;
                put(key, from, Meaning::Swap { key, from, to: value })
            }
            45..60 if inner.elements < ELEMENTS => {
                let key = REGISTERS + SWAPS + inner.elements;
                inner.elements += 1;
                let meaning = Meaning::Swap { key, from: 0, to: 1 };
                Request { method: "POST", path: "/tags".into(), body: Some(self.tag(key, 1)), meaning }
            }
            60..68 if inner.elements > 0 => {
                let key = REGISTERS + SWAPS + choice % inner.elements;
                let meaning = Meaning::Swap { key, from: 1, to: 0 };
                Request { method: "DELETE", path: format!("/tags/{}", self.name(key, 1)), body: None, meaning }
            }
            _ => {
                let limit = REGISTERS + SWAPS + ELEMENTS;
                Request { method: "GET", path: format!("/tags?limit={limit}"), body: None, meaning: Meaning::Read }
            }
        }
    }

    /// Notes what came of a request that was sent.
    pub fn note(&self, request: &Request, answer: &Answer, begin: u64, end: u64) {
        let mut inner = self.inner();
        let taken = match answer {
            Answer::Done(_) => Some(true),
            Answer::Not => Some(false),
            Answer::Unknown => None,
        };
        let action = match (request.meaning, answer) {
            (Meaning::Read, Answer::Done(text)) => {
                let seen = self.read(text);
                for swap in 0..SWAPS {
                    inner.known[swap] = inner.known[swap].max(seen[REGISTERS + swap]);
                }
                Action::Read { seen }
            }
            // It changed nothing.
            (Meaning::Read, _) => return,
            // A register is always there: that it is not is a violation, which no order explains.
            (Meaning::Write { key, value }, Answer::Not) => {
                Action::Swap { key, from: Value::MAX, to: value, taken: Some(true) }
            }
            (Meaning::Write { key, value }, _) => Action::Write { key, value },
            (Meaning::Swap { key, from, to }, _) => Action::Swap { key, from, to, taken },
        };
        let end = if matches!(answer, Answer::Unknown) { NEVER } else { end };
        inner.history.push(Operation { action, begin, end });
    }

    /// The values of all keys in a list of tags. What is not there is a value that no order explains, unless it is an element.
    fn read(&self, text: &str) -> State {
        let mut seen = Self::first_state();
        seen[..REGISTERS + SWAPS].fill(Value::MAX);
        let tags: Vec<Json> = serde_json::from_str(text).unwrap_or_default();
        for tag in &tags {
            let Some(name) = tag["name"].as_str().and_then(|name| name.strip_prefix(&self.prefix)) else { continue };
            let (key, value) = match name.split_at(1) {
                ("r", key) => (key, tag["description"].as_str().unwrap_or_default()),
                ("s", key) => key.split_once(':').unwrap_or_default(),
                (_, key) => (key, "1"),
            };
            if let (Ok(key), Ok(value)) = (key.parse::<usize>(), value.parse()) {
                // One that is there twice is no value either.
                let twice = (REGISTERS..REGISTERS + SWAPS).contains(&key) && seen[key] != Value::MAX;
                seen[key] = if twice { Value::MAX - 1 } else { value };
            }
        }
        seen
    }

    /// Looks for an order of all that was noted. Returns the number of operations, and what is wrong.
    pub fn check(&self) -> (usize, Verdict, Option<String>) {
        let inner = self.inner();
        let verdict = linear::check(&Self::first_state(), &inner.history);
        let explanation = match &verdict {
            Verdict::Linearizable => None,
            Verdict::Undecided => Some(format!("board {}: the search for an order took too long", self.prefix)),
            Verdict::Violated(best) => Some(self.explain(&inner.history, best)),
        };
        (inner.history.len(), verdict, explanation)
    }

    /// All that was noted, a line for each operation.
    pub fn history(&self) -> String {
        self.inner().history.iter().map(|operation| format!("{operation:?}\n")).collect()
    }

    /// What tells its file from those of others.
    pub fn label(&self) -> &str {
        self.prefix.trim_matches(['!', '-'])
    }

    fn explain(&self, history: &[Operation], best: &[usize]) -> String {
        let mut text = format!(
            "board {}: not linearizable; {} of {} operations can be put into an order",
            self.prefix,
            best.len(),
            history.len()
        );
        let mut left: Vec<usize> = (0..history.len()).filter(|index| !best.contains(index)).collect();
        left.sort_by_key(|index| history[*index].begin);
        for (what, some) in [
            ("the last ones in order", &best[best.len().saturating_sub(6)..]),
            ("then none of", &left[..left.len().min(8)]),
        ] {
            text.push_str(&format!("\n  {what}:"));
            for index in some {
                let Operation { action, begin, end } = &history[*index];
                let end = if *end == NEVER { "never".to_owned() } else { (end / 1000).to_string() };
                text.push_str(&format!("\n    {}..{end} us {action:?}", begin / 1000));
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(tags: &[Json]) -> Answer {
        Answer::Done(serde_json::to_string(tags).unwrap())
    }

    /// Requests and answers become the history that was meant, and a stale answer is found through all of it.
    #[test]
    fn what_a_board_reads_is_what_was_written() {
        let stale = |stale: bool| {
            let board = Board::new(3);
            let mut tags = board.foundation();
            tags.push(json!({"name": "other", "description": "9"}));
            let read = board.request(99, 0);
            assert_eq!(read.path, format!("/tags?limit={}", Board::first_state().len()));
            board.note(&read, &list(&tags), 0, 1);
            let (write, swap, make) = (board.request(0, 1), board.request(20, 0), board.request(45, 0));
            assert_eq!((write.method, swap.method, make.method), ("PUT", "PUT", "POST"));
            assert_eq!(swap.path, format!("/tags/!99996-s{REGISTERS}:0"));
            for (time, request) in [(2, &write), (4, &swap), (6, &make)] {
                board.note(request, &list(&[]), time, time + 1);
            }
            tags[1] = write.body.unwrap();
            tags[REGISTERS] = swap.body.unwrap();
            if !stale {
                tags.push(make.body.unwrap());
            }
            board.note(&board.request(99, 0), &list(&tags), 8, 9);
            let remove = board.request(60, 0);
            assert_eq!((remove.method, &*remove.path), ("DELETE", &*format!("/tags/!99996-t{}", REGISTERS + SWAPS)));
            board.note(&remove, &Answer::Unknown, 10, 11);
            board.check()
        };
        assert_eq!(stale(false), (6, Verdict::Linearizable, None));
        let (_, verdict, explanation) = stale(true);
        assert!(matches!(verdict, Verdict::Violated(_)));
        assert!(explanation.unwrap().contains("not linearizable; 4 of 6"));
    }

    #[test]
    fn a_lost_register_and_a_doubled_swap_are_found() {
        let board = Board::new(0);
        let mut tags = board.foundation();
        tags.push(board.tag(REGISTERS, 5));
        board.note(&board.request(99, 0), &list(&tags), 0, 1);
        assert!(matches!(board.check().1, Verdict::Violated(_)));
        let board = Board::new(0);
        board.note(&board.request(0, 0), &Answer::Not, 0, 1);
        assert!(matches!(board.check().1, Verdict::Violated(_)));
    }
}
